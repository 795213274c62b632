//! Hubs' machines on a sequencer whose live messages are lost, doubled, delayed and reordered, whose links break and go
//! deaf, and which is emptied or falls back to an older copy of itself; through simulated time. `SIM_SCHEDULES=n` runs
//! more schedules, `SIM_SEED=n` one.
//!
//! The oracle: what a hub appends is, at each offset of an epoch, what the sequencer put there, each offset once and in
//! order, with nothing left out unless the log began anew; and once the network is quiet every hub has everything.

use std::collections::BTreeMap;
use std::time::Duration;

use fastrand::Rng;
use safe_broadcaster::hub::bridge::machine::{Action, Body, Machine, Settings};
use safe_broadcaster::hub::bridge::sequencer::Sequencer;
use safe_broadcaster::hub::bridge::{Batch, Claim, Entry, Message, block};
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
struct Hub {
    name: String,
    machine: Machine,
    linked: bool,
    deaf: bool,
    /// Live messages on their way, with the time at which they arrive.
    coming: Vec<(Duration, Message)>,
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
            if self.hubs[n].machine.may_append() && self.rng.u8(..) < 60 {
                self.append(n);
                self.act(n);
            }
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
            _ => {}
        }
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
            hub.machine.heard(message);
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
                Message::Head { epoch: epoch.clone(), head: block.last() }
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
        self.hubs[n].machine.offer(&appended.epoch, appended.first, appended.count, Body::Own(records));
    }

    fn act(&mut self, n: usize) {
        while let Some(action) = self.hubs[n].machine.next_action() {
            let reachable = self.up && self.hubs[n].linked;
            match action {
                Action::Connect if self.up => {
                    let (fresh, run) = (self.fresh(), self.life.to_string());
                    let hub = &mut self.hubs[n];
                    (hub.linked, hub.deaf) = (true, false);
                    hub.coming.clear();
                    let place = self.sequencer.join(&run, &hub.machine.known(), &fresh);
                    hub.machine.connected(self.now, &place);
                }
                Action::Join if reachable => {
                    let (fresh, run) = (self.fresh(), self.life.to_string());
                    let hub = &mut self.hubs[n];
                    let place = self.sequencer.join(&run, &hub.machine.known(), &fresh);
                    hub.machine.joined(&place);
                }
                Action::Fill { from, most } if reachable => {
                    let most = most.min(self.rng.usize(1..6));
                    let filled = self.sequencer.fill(from, most);
                    self.hubs[n].machine.filled(filled);
                }
                Action::Probe(number) if reachable => {
                    let place = self.sequencer.probe(&self.hubs[n].name, self.now, 3 * SETTINGS.probe_interval);
                    self.send(n, &Message::Probe { number, place });
                }
                Action::Connect | Action::Join | Action::Fill { .. } | Action::Probe(_) => {
                    self.hubs[n].machine.lost(self.now, "the bus is away");
                }
                Action::Disconnect => {
                    self.hubs[n].linked = false;
                    self.hubs[n].coming.clear();
                }
                Action::Begin { epoch, head } => {
                    let hub = &mut self.hubs[n];
                    (hub.epoch, hub.next) = (epoch, head + 1);
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
        for record in records {
            let want = self.truth.get(&(hub.epoch.clone(), hub.next));
            let got = std::str::from_utf8(record.json()).expect("text");
            assert_eq!(Some(got), want.map(|n| format!("{{\"n\":{n}}}")).as_deref(), "{} at {}", hub.name, hub.next);
            hub.next += 1;
        }
    }

    fn settle(&mut self) {
        (self.faults, self.up) = (false, true);
        for _ in 0..600 {
            self.step();
            let place = self.sequencer.place();
            let has = |hub: &Hub| hub.machine.is_up() && hub.epoch == place.epoch && hub.next == place.head + 1;
            if self.hubs.iter().all(has) && self.hubs.iter().all(|hub| !hub.told) {
                return;
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
