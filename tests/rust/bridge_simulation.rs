//! Hubs' machines on a sequencer whose live messages are lost, doubled, delayed and reordered, whose links break and go
//! deaf, and which is emptied, full, or falls back to an older copy of itself, under another leader or one that led
//! before; through simulated time. Hubs leave it for a log of their own when it is away. `SIM_SCHEDULES=n` runs more
//! schedules, `SIM_SEED=n` one.
//!
//! The oracle: what a hub appends is, at each offset of an epoch, what the sequencer put there, each offset once and in
//! order, with nothing left out unless the log began anew; and once the network is quiet every hub has everything, and what
//! it has is still what the sequencer has there: no offset was used twice without another epoch.

use std::collections::BTreeMap;
use std::time::Duration;

use fastrand::Rng;
use safe_broadcaster::hub::bridge::machine::{Action, Body, Machine, Settings};
use safe_broadcaster::hub::bridge::sequencer::Sequencer;
use safe_broadcaster::hub::bridge::{Batch, Claim, Entry, Filled, Message, Place, Stretch, block};
use safe_broadcaster::hub::entry::Record;

const SETTINGS: Settings = Settings {
    probe_interval: Duration::from_secs(2),
    bus_timeout: Duration::from_secs(5),
    attempts: 3,
    cooldown: Duration::from_secs(5),
    keep: 20,
};
const STEP: Duration = Duration::from_millis(50);

/// The log of a hub, as far as the machine says.
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
struct Hub {
    name: String,
    machine: Machine,
    linked: bool,
    deaf: bool,
    /// Live messages on their way, with the time at which they arrive.
    coming: Vec<(Duration, Message)>,
    /// Stretches of the stream on their way, with the offset from which they were asked for.
    read: Vec<(Duration, u64, Filled)>,
    /// Its log is its own at the moment.
    local: bool,
    /// What it has handed out since its log began, by offset.
    log: BTreeMap<u64, u64>,
    epoch: String,
    next: u64,
    batches: u64,
    told: bool,
}

struct World {
    rng: Rng,
    now: Duration,
    sequencer: Sequencer,
    up: bool,
    full: bool,
    life: u64,
    epochs: u64,
    hubs: Vec<Hub>,
    /// What lies where: the number of each record ever appended, by epoch and offset.
    truth: BTreeMap<(String, u64), u64>,
    records: u64,
    faults: bool,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let hub = |n: usize, rng: &mut Rng| Hub {
            name: format!("hub-{n}"),
            machine: Machine::new(SETTINGS, rng.u64(..)),
            linked: false,
            deaf: false,
            coming: Vec::new(),
            read: Vec::new(),
            local: false,
            log: BTreeMap::new(),
            epoch: String::new(),
            next: 1,
            batches: 0,
            told: false,
        };
        let hubs = (0..3).map(|n| hub(n, &mut rng)).collect();
        Self {
            rng,
            now: Duration::ZERO,
            sequencer: Sequencer::new(30),
            up: true,
            full: false,
            life: 1,
            epochs: 0,
            hubs,
            truth: BTreeMap::new(),
            records: 0,
            faults: true,
        }
    }

    fn fresh(&mut self) -> String {
        self.epochs += 1;
        format!("epoch-{}", self.epochs)
    }

    fn step(&mut self) {
        self.now += STEP;
        if self.faults {
            self.break_something();
        }
        for n in 0..self.hubs.len() {
            self.hear(n);
            self.hubs[n].machine.tick(self.now);
            self.act(n);
            self.leave(n);
            if self.hubs[n].machine.may_append() && self.rng.u8(..) < 60 {
                self.append(n);
                self.act(n);
            }
        }
    }

    /// Time passes, and nobody appends.
    fn probe_only(&mut self) {
        self.now += STEP;
        for n in 0..self.hubs.len() {
            self.hear(n);
            self.hubs[n].machine.tick(self.now);
            self.act(n);
        }
    }

    fn break_something(&mut self) {
        let n = self.rng.usize(..self.hubs.len());
        match self.rng.u16(..1000) {
            0..6 => self.lose(n, "the connection broke"),
            6..9 => self.hubs[n].deaf = true,
            9..12 => {
                self.up = !self.up;
                if !self.up {
                    self.end_life();
                }
            }
            12 => self.sequencer.flush(),
            13 => {
                self.end_life();
                let lost = self.rng.usize(..4);
                self.sequencer.fall_back(lost);
            }
            14 => {
                let head = self.sequencer.place().head;
                self.sequencer.trim(self.rng.u64(..=head + 1));
            }
            15 => self.full = !self.full,
            _ => {}
        }
    }

    /// Now and then a hub goes on alone, where it may.
    fn leave(&mut self, n: usize) {
        let alone = self.faults && self.rng.u8(..) < 30;
        let hub = &mut self.hubs[n];
        if alone && hub.machine.has_given_up(self.now) && hub.machine.may_leave() {
            hub.machine.leave();
            hub.local = true;
        }
    }

    /// The servers lead in turns.
    fn run(&self) -> String {
        format!("server-{}", self.life % 3)
    }

    fn end_life(&mut self) {
        self.life += 1;
        for n in 0..self.hubs.len() {
            self.lose(n, "the bus went away");
        }
    }

    fn lose(&mut self, n: usize, why: &str) {
        if self.hubs[n].linked {
            self.hubs[n].machine.lost(self.now, why);
            self.act(n);
        }
    }

    fn hear(&mut self, n: usize) {
        let now = self.now;
        let hub = &mut self.hubs[n];
        let mut due: Vec<_> = hub.coming.extract_if(.., |(at, _)| *at <= now).collect();
        due.sort_by_key(|(at, _)| *at);
        for (_, message) in due {
            hub.machine.heard(now, message);
        }
        let due: Vec<_> = self.hubs[n].read.extract_if(.., |(at, ..)| *at <= now).collect();
        for (_, from, filled) in due {
            self.hubs[n].machine.filled(from, filled);
        }
        self.act(n);
    }

    /// To one hub, late, twice or never.
    fn send(&mut self, n: usize, message: &Message) {
        let hub = &mut self.hubs[n];
        if !hub.linked || hub.deaf {
            return;
        }
        let copies = if self.faults { [1, 1, 1, 1, 1, 1, 2, 0][self.rng.usize(..8)] } else { 1 };
        for _ in 0..copies {
            let late = if self.faults { STEP * self.rng.u32(..6) } else { Duration::ZERO };
            hub.coming.push((self.now + late, message.clone()));
        }
    }

    fn append(&mut self, n: usize) {
        if self.full {
            self.hubs[n].machine.refused(self.now, "full");
            return;
        }
        let count = self.rng.u64(1..4);
        let numbers: Vec<u64> = (0..count).map(|i| self.records + i).collect();
        self.records += count;
        let record = |n: &u64| Record::event(format!("{{\"n\":{n}}}").into()).expect("valid");
        let records: Vec<_> = numbers.iter().map(record).collect();
        let fresh = self.fresh();
        let hub = &mut self.hubs[n];
        hub.batches += 1;
        let entry = Entry { claim: Claim::Plain, count, records: block::encode(&records) };
        let batch = Batch { number: hub.batches, known: hub.machine.known(), fresh, entries: vec![entry] };
        let (mut appended, mut block) = self.sequencer.append(&self.hubs[n].name, &batch, 3);
        let by = (self.hubs[n].name.clone(), batch.number);
        let epoch = appended.epoch.clone();
        if let Some(block) = &block {
            for (offset, number) in (block.first..).zip(&numbers) {
                // A bus that fell back may use an offset again only in another epoch, if anybody has seen the first.
                self.truth.insert((epoch.clone(), offset), *number);
            }
            let message = if self.rng.u8(..) < 40 {
                Message::Head { epoch: epoch.clone(), head: block.last(), by: Some(by) }
            } else {
                Message::Block { epoch: epoch.clone(), by, block: block.clone() }
            };
            for n in 0..self.hubs.len() {
                self.send(n, &message);
            }
        }
        if self.faults && self.rng.u8(..) < 20 {
            // The answer is lost, and the batch is sent again: it is in the stream once.
            self.lose(n, "the answer was lost");
            (appended, block) = self.sequencer.append(&self.hubs[n].name, &batch, 3);
            assert_eq!(block, None);
        }
        self.hubs[n].machine.kept();
        self.hubs[n].machine.offer(&appended.epoch, appended.first, appended.count, Body::Own(records));
    }

    fn act(&mut self, n: usize) {
        while let Some(action) = self.hubs[n].machine.next_action() {
            let reachable = self.up && self.hubs[n].linked;
            match action {
                Action::Connect if self.up => {
                    let (fresh, run) = (self.fresh(), self.run());
                    let hub = &mut self.hubs[n];
                    (hub.linked, hub.deaf) = (true, false);
                    let place = self.sequencer.join(&run, &hub.machine.known(), &fresh);
                    hub.machine.connected(self.now, &place);
                }
                Action::Join if reachable => {
                    let (fresh, run) = (self.fresh(), self.run());
                    let hub = &mut self.hubs[n];
                    let place = self.sequencer.join(&run, &hub.machine.known(), &fresh);
                    hub.machine.joined(&place);
                }
                Action::Fill { from, most } if reachable => {
                    let most = most.min(self.rng.usize(1..6));
                    let late = if self.faults { STEP * self.rng.u32(..4) } else { Duration::ZERO };
                    self.hubs[n].read.push((self.now + late, from, self.sequencer.fill(from, most)));
                }
                Action::Probe(number) if reachable => {
                    let refuses = self.full.then(|| "full".to_owned());
                    let place = self.sequencer.probe(&self.hubs[n].name, self.now, 3 * SETTINGS.probe_interval);
                    let place = Place { refuses, ..place };
                    self.send(n, &Message::Probe { number, place });
                }
                Action::Connect | Action::Join | Action::Fill { .. } | Action::Probe(_) => {
                    self.hubs[n].machine.lost(self.now, "the bus is away");
                }
                Action::Disconnect => {
                    self.hubs[n].linked = false;
                    self.hubs[n].coming.clear();
                    self.hubs[n].read.clear();
                }
                Action::Begin { epoch, head } => {
                    let hub = &mut self.hubs[n];
                    (hub.epoch, hub.next, hub.local) = (epoch, head + 1, false);
                    hub.log.clear();
                }
                Action::Append { count, skip, body } => self.check(n, body.into_records(count, skip)),
                Action::Tell(trouble) => {
                    let told = std::mem::replace(&mut self.hubs[n].told, trouble.is_some());
                    assert!(told || trouble.is_some(), "healthy is told after trouble only");
                }
            }
        }
    }

    fn check(&mut self, n: usize, records: Vec<Record>) {
        let hub = &mut self.hubs[n];
        assert!(!hub.local, "{}: the stream comes into a log that is another one", hub.name);
        for record in records {
            let want = self.truth.get(&(hub.epoch.clone(), hub.next));
            let got = std::str::from_utf8(record.json()).expect("text");
            assert_eq!(Some(got), want.map(|n| format!("{{\"n\":{n}}}")).as_deref(), "{} at {}", hub.name, hub.next);
            hub.log.extend(want.map(|n| (hub.next, *n)));
            hub.next += 1;
        }
    }

    fn settle(&mut self) {
        (self.faults, self.up, self.full) = (false, true, false);
        for _ in 0..600 {
            self.step();
            let place = self.sequencer.place();
            let has =
                |hub: &Hub| hub.machine.is_up() && !hub.local && hub.epoch == place.epoch && hub.next == place.head + 1;
            if self.hubs.iter().all(has) && self.hubs.iter().all(|hub| !hub.told) {
                return self.compare();
            }
        }
        let of = |hub: &Hub| (hub.name.clone(), hub.epoch.clone(), hub.next, hub.told, format!("{:?}", hub.machine));
        panic!(
            "a hub never got everything: {:?} {:#?}",
            self.sequencer.place(),
            self.hubs.iter().map(of).collect::<Vec<_>>()
        );
    }
}

impl World {
    fn compare(&self) {
        for hub in &self.hubs {
            for (offset, number) in &hub.log {
                let now = self.truth.get(&(hub.epoch.clone(), *offset));
                assert_eq!(now, Some(number), "{} believes in what is not there at {offset}", hub.name);
            }
        }
    }
}

fn run(seed: u64) -> u64 {
    let mut world = World::new(seed);
    let steps = world.rng.usize(100..1500);
    for _ in 0..steps {
        world.step();
    }
    world.settle();
    world.records
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn every_hub_has_what_the_sequencer_numbered_once_and_in_order() {
    if let Some(seed) = number("SIM_SEED") {
        run(seed);
        return;
    }
    let mut records = 0;
    for seed in 0..number("SIM_SCHEDULES").unwrap_or(300) {
        let caught = std::panic::catch_unwind(|| run(seed));
        records += caught.unwrap_or_else(|_| panic!("SIM_SEED={seed} fails"));
    }
    assert!(records > 1000, "the schedules are too quiet: {records} records");
}

#[test]
fn a_hub_that_is_deaf_finds_out_within_two_probes_and_says_so() {
    let mut world = World::new(1);
    world.settle();
    world.hubs[0].deaf = true;
    let began = world.now;
    while !world.hubs[0].told && world.now < began + Duration::from_secs(60) {
        world.step();
    }
    let took = world.now.saturating_sub(began);
    assert!(took <= 2 * SETTINGS.probe_interval + SETTINGS.probe_interval / 2, "{took:?}");
    world.settle();
    assert_eq!(world.hubs[0].machine.counts().deaf, 1);
}

#[test]
fn a_bus_that_stays_away_opens_the_breaker_and_is_back_within_its_pause() {
    let mut world = World::new(2);
    world.settle();
    (world.faults, world.up) = (false, false);
    world.end_life();
    for _ in 0..1200 {
        world.step();
    }
    for hub in &world.hubs {
        assert!(hub.told && hub.machine.circuit() == "open", "{}", hub.machine.circuit());
        assert!(hub.machine.has_given_up(world.now));
        assert!(hub.machine.counts().failures < 25, "it does not hammer: {:?}", hub.machine.counts());
    }
    let began = world.now;
    world.settle();
    let took = world.now.saturating_sub(began);
    assert!(took <= SETTINGS.cooldown + Duration::from_secs(2), "{took:?}");
    assert!(world.hubs.iter().all(|hub| hub.machine.circuit() == "closed"));
}

#[test]
fn a_stream_that_falls_back_under_a_living_link_is_found_out_by_a_probe() {
    let mut world = World::new(3);
    world.settle();
    while world.sequencer.place().head < 5 {
        world.step();
    }
    world.settle();
    let before = world.sequencer.place();
    world.sequencer.fall_back(1);
    for _ in 0..100 {
        world.probe_only();
    }
    assert_ne!(world.sequencer.place().epoch, before.epoch);
    world.settle();
}

#[test]
fn a_full_bus_is_told_once_and_its_end_once() {
    let mut world = World::new(4);
    world.settle();
    world.full = true;
    let mut news = 0;
    let mut told = vec![false; world.hubs.len()];
    for n in 0..1200 {
        world.full = n < 900;
        world.step();
        for (hub, told) in world.hubs.iter().zip(&mut told) {
            news += u32::from(std::mem::replace(told, hub.told) != hub.told);
            assert!(hub.machine.is_up(), "it can be heard");
        }
        if n == 899 {
            assert!(world.hubs.iter().all(|hub| hub.told && hub.machine.has_given_up(world.now)));
        }
    }
    assert_eq!(news, 2 * world.hubs.len() as u32);
    world.settle();
}

fn at(epoch: &str, head: u64) -> Place {
    Place { epoch: epoch.to_owned(), head, run: "r/1".to_owned(), ..Place::default() }
}

fn actions(machine: &mut Machine) -> Vec<String> {
    std::iter::from_fn(|| machine.next_action()).map(|action| format!("{action:?}")).collect()
}

/// One that has joined, whose first probe came round.
fn joined(epoch: &str, head: u64) -> Machine {
    let mut machine = Machine::new(SETTINGS, 1);
    machine.tick(Duration::ZERO);
    machine.connected(Duration::ZERO, &at(epoch, head));
    machine.heard(Duration::ZERO, Message::Probe { number: 1, place: at(epoch, head) });
    assert!(machine.is_up());
    actions(&mut machine);
    machine
}

fn stretch(first: u64, count: u64) -> Stretch {
    Stretch { first, count, records: vec![0; 4 * count as usize].into() }
}

#[test]
fn what_was_read_in_another_epoch_is_not_taken_for_a_loss_in_this_one() {
    let mut machine = joined("e1", 0);
    machine.offer("e1", 1, 1, Body::Encoded(stretch(1, 1).records));
    machine.heard(Duration::ZERO, Message::Head { epoch: "e1".to_owned(), head: 3, by: None });
    assert!(actions(&mut machine).last().expect("some").contains("Fill { from: 2"));
    // The stream begins anew before it is read, and the hub hears of it before it has the answer.
    machine.heard(Duration::ZERO, Message::Head { epoch: "e2".to_owned(), head: 5, by: None });
    machine.joined(&at("e2", 5));
    let before = machine.counts().restarts;
    let blocks = (2..=5).map(|first| stretch(first, 1)).collect();
    machine.filled(2, Filled { place: at("e2", 5), blocks });
    machine.filled(1, Filled { place: at("e2", 5), blocks: (1..=5).map(|first| stretch(first, 1)).collect() });
    assert_eq!((machine.counts().restarts, machine.has("e2", 5)), (before, true));
    let begun = actions(&mut machine).iter().filter(|action| action.starts_with("Begin")).count();
    assert_eq!(begun, 1, "no record of the new epoch is missing");
}

#[test]
fn an_attempt_that_hangs_is_told_within_a_probe_interval() {
    let mut machine = joined("e", 0);
    let mut now = SETTINGS.probe_interval;
    machine.tick(now);
    machine.heard(now, Message::Probe { number: 2, place: at("e", 0) });
    now += STEP;
    machine.lost(now, "reset");
    machine.tick(now);
    assert_eq!(actions(&mut machine).last().map(String::as_str), Some("Connect"));
    let due = machine.deadline().expect("it has to tell");
    assert_eq!(due, now + SETTINGS.probe_interval);
    machine.tick(due);
    assert_eq!(actions(&mut machine), [r#"Tell(Some("reset"))"#]);
    assert_eq!((machine.deadline(), machine.trouble()), (None, Some("reset")));
}
