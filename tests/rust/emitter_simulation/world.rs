//! The world of one schedule: a process that runs the driver's loop on simulated time, a disk, a network, a receiver,
//! and everything that goes wrong between them.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fastrand::Rng;
use futures_util::FutureExt;
use safe_broadcaster::emitter::config::{Durability, EmitterConfig, WhenFull};
use safe_broadcaster::emitter::item::{Gap, GapReason, Identity, Item};
use safe_broadcaster::emitter::machine::{Action, Confirm, Machine, Outgoing, Snapshot, Welcome};
use safe_broadcaster::emitter::outbox::{Beyond, Outbox, Pushed};
use safe_broadcaster::emitter::ring::{Ring, revive};
use safe_broadcaster::emitter::spill::Done;
use safe_broadcaster::error::{Error, ErrorKind};

use crate::disk::Disk;
use crate::peer::{Answer, Receiver, Wire, id_of};

/// Events parked, and sent again afterwards, in all schedules: a simulation in which none is proves nothing of it.
pub(crate) static PARKED: AtomicU64 = AtomicU64::new(0);
pub(crate) static REQUEUED: AtomicU64 = AtomicU64::new(0);
/// Lines shown of a failed schedule.
const TRACE: usize = 80;
const MILLI: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
// As in driver.rs.
const LINGER_DOWN: Duration = Duration::from_millis(5);
const LINGER_BURST: Duration = Duration::from_millis(1);
const BURST: u64 = 32;
const MESSAGES_PER_TURN: usize = 512;
/// More turns of the loop than this at one instant are a busy loop.
const MOST_TURNS: u32 = 20_000;

/// An event that was accepted.
struct Emission {
    seq: u64,
    /// Lost with the memory of a crashed process before its seq was promised on disk: nobody can know of it.
    untraceable: bool,
}

enum Command {
    Flush,
    /// Somebody waits for the delivery of this seq.
    Await(u64),
    Stop(Duration),
}

/// What the driver sleeps on.
struct Sleep {
    pause: Option<Duration>,
    timer: Option<Duration>,
    asleep: bool,
}

/// One life of the program.
struct Process {
    outbox: Outbox,
    /// `None` until the spill is open.
    machine: Option<Machine>,
    opens_at: Duration,
    commands: VecDeque<Command>,
    dones: VecDeque<Done>,
    sleep: Option<Sleep>,
    linger: Option<Duration>,
    connecting: Option<(Duration, Option<u64>)>,
    /// Emissions whose seq is not final yet.
    provisional: Vec<usize>,
    /// Emissions that came before the ring was open and found no room in it.
    unkept: Vec<usize>,
    /// Everything up to here is waited for.
    awaited: u64,
    /// Somebody has removed the ring's file; then there is another.
    ring_gone: Option<Duration>,
    ended: bool,
}

#[derive(Default)]
struct Tally {
    connects: u64,
    hurried: u64,
    idle_wakes: u64,
    lives: u64,
    /// Events written to links, again and again if need be.
    written: u64,
    actions: u64,
    slept: Duration,
}

pub(crate) struct World {
    rng: Rng,
    now: Duration,
    config: EmitterConfig,
    process: Process,
    disk: Disk,
    /// The ring's bytes as the last process left them.
    left: Option<Vec<u8>>,
    receiver: Receiver,
    wire: Option<Wire>,
    /// A connection that the emitter has left; what it wrote may still arrive.
    ghost: Option<Wire>,
    emissions: Vec<Emission>,
    /// The last process ended when a file of it was gone, or was being put back.
    bereft: bool,
    /// What such a process has lost.
    excused: Vec<Gap>,
    refuse_until: Duration,
    fail_until: Duration,
    latency: u64,
    disk_latency: u64,
    padding: usize,
    /// One of so many events is refused; 0: none.
    poison: u32,
    tally: Tally,
    turns_of_time: u32,
    pub(crate) trace: Option<VecDeque<String>>,
}

fn pick<T: Copy>(rng: &mut Rng, choices: &[T]) -> T {
    choices[rng.usize(..choices.len())]
}

/// Without the contents of blocks.
fn brief(what: &impl std::fmt::Debug) -> String {
    let text = format!("{what:?}");
    let mut parts = text.split("Block { bytes: ");
    let mut short = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        short.push_str(part.rfind("\", first: ").map_or(part, |at| &part[at + 3..]));
    }
    short
}

fn is_new_ring(done: &Done) -> bool {
    matches!(done, Done::NewRing(_))
}

pub(crate) fn config(rng: &mut Rng, big: bool) -> EmitterConfig {
    let millis = |n| Duration::from_millis(n);
    EmitterConfig {
        spill_path: "unused".into(),
        durability: pick(rng, &[Durability::Memory, Durability::Process, Durability::Process]),
        emitter_id: None,
        outbox_bytes: if big { 1 << 20 } else { pick(rng, &[300, 1000, 5000, 64 << 10]) },
        spill_max_events: pick(rng, &[5, 30, 200, 100_000]),
        spill_max_bytes: if big { 8 << 20 } else { pick(rng, &[2000, 20_000, 1 << 30, 1 << 30]) },
        spill_max_age: None,
        when_full: match rng.u8(..10) {
            0 => WhenFull::DropNewest,
            1 => WhenFull::Wait,
            2 => WhenFull::Raise,
            _ => WhenFull::DropOldest,
        },
        poison_tries: rng.u32(1..5),
        parked_max_events: pick(rng, &[2, 1000]),
        parked_max_bytes: 1 << 30,
        backoff_initial: millis(rng.u64(20..500)),
        backoff_max: 2 * SECOND,
        backoff_multiplier: 2.0,
        jitter: pick(rng, &[0.0, 0.5]),
        connect_timeout: SECOND,
        ack_timeout: millis(rng.u64(500..3000)),
        ping_interval: millis(rng.u64(500..5000)),
        breaker_threshold: rng.u32(1..6),
        breaker_cooldown: millis(rng.u64(500..5000)),
        report_interval: SECOND,
        max_event_bytes: if big { 128 << 10 } else { 1000 },
        headers: Vec::new(),
        token: None,
        ssl_ca: None,
        stamp: false,
        flush_rate: (rng.u8(..4) == 0).then(|| rng.f64() * 480.0 + 20.0),
        slo_emit_success_rate: 0.99,
        slo_spill_depth: 10,
        slo_spill_depth_alert: 100,
        slo_flush_latency: SECOND,
    }
}

impl Process {
    fn new(config: &EmitterConfig, opens_at: Duration) -> Self {
        Self {
            outbox: Outbox::new(config).expect("memory"),
            machine: None,
            opens_at,
            commands: VecDeque::new(),
            dones: VecDeque::new(),
            sleep: None,
            linger: None,
            connecting: None,
            provisional: Vec::new(),
            unkept: Vec::new(),
            awaited: 0,
            ring_gone: None,
            ended: false,
        }
    }
}

impl World {
    pub(crate) fn new(seed: u64, traced: bool) -> Self {
        let mut rng = Rng::with_seed(seed);
        let big = rng.u8(..25) == 0;
        let config = config(&mut rng, big);
        let mut receiver =
            Receiver::new(pick(&mut rng, &[Confirm::Acks, Confirm::Acks, Confirm::Pings, Confirm::Sends]));
        if rng.u8(..3) == 0 {
            receiver.credit = rng.u64(1..60);
        }
        let latency = pick(&mut rng, &[0, 500, 20_000, 200_000]);
        let disk_latency = pick(&mut rng, &[0, 2000, 30_000, 1_500_000]);
        let poison = pick(&mut rng, &[0, 0, 5, 40, 200]);
        let mut world = Self {
            now: Duration::ZERO,
            process: Process::new(&config, Duration::ZERO),
            disk: Disk::new(&config),
            left: None,
            config,
            receiver,
            wire: None,
            ghost: None,
            emissions: Vec::new(),
            bereft: false,
            excused: Vec::new(),
            refuse_until: Duration::ZERO,
            fail_until: Duration::ZERO,
            latency,
            disk_latency,
            padding: if big { 120_000 } else { 60 },
            poison,
            tally: Tally::default(),
            turns_of_time: 0,
            trace: traced.then(VecDeque::new),
            rng,
        };
        world.begin();
        world
    }

    fn note(&mut self, what: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push_back(format!("{:>10.4}s {}", self.now.as_secs_f64(), what()));
            if trace.len() > TRACE {
                trace.pop_front();
            }
        }
    }

    fn micros(&mut self, most: u64) -> Duration {
        Duration::from_micros(self.rng.u64(0..=most))
    }

    // ── The process ─────────────────────────────────────────────────────────────────────────────────────────────────

    fn begin(&mut self) {
        self.tally.lives += 1;
        let opens_at = self.now + self.micros(self.disk_latency);
        self.process = Process::new(&self.config, opens_at);
    }

    fn open(&mut self) {
        let durable = self.config.durability != Durability::Memory;
        let segments = durable.then(|| Outbox::segments(&self.config));
        let left = self.left.take().and_then(|bytes| revive(&bytes).expect("memory"));
        let (recovered, adopts) = self.disk.recover(left.as_ref(), segments);
        self.note(|| {
            let (held, ring) = (brief(&recovered.held), if adopts { "adopted" } else { "new" });
            format!(
                "open: next {} base {} last {} held {held} ring {ring}",
                recovered.next_seq, recovered.base, recovered.last
            )
        });
        for gap in recovered.gaps.iter().copied().chain(recovered.held.iter().filter_map(Item::gap)) {
            if gap.reason == GapReason::Crash {
                self.check_crash(gap);
            }
        }
        let base = recovered.next_seq - 1;
        let identity = Identity { emitter: recovered.emitter.clone(), epoch: recovered.epoch.clone() };
        let ring = match left {
            Some(left) if adopts => Some(left.ring),
            _ => segments.map(|segments| Ring::simulated(segments, &identity, 1).expect("memory")),
        };
        if let Some(ring) = &ring {
            ring.resume(base, recovered.base);
        }
        let kept = self.process.outbox.attach(base, ring);
        for id in std::mem::take(&mut self.process.provisional) {
            let seq = &mut self.emissions[id].seq;
            *seq += base;
            if *seq > kept {
                self.process.unkept.push(id); // whoever waits for it is told
            }
        }
        let mut machine = Machine::new(self.config.clone(), &recovered, self.rng.u64(..));
        machine.start(self.now);
        self.process.machine = Some(machine);
    }

    /// The driver's loop, until it sleeps. Follows `Driver::run` line by line.
    fn drive(&mut self) {
        if self.process.machine.is_none() {
            if self.now < self.process.opens_at {
                return;
            }
            self.open();
        }
        let mut turns = 0;
        while !self.process.ended {
            turns += 1;
            assert!(turns < MOST_TURNS, "the driver spins");
            let acted = self.process.sleep.is_none() && self.turn();
            if self.process.ended || !self.wake(acted) {
                return;
            }
        }
    }

    /// The part of the loop before the `select!`.
    fn turn(&mut self) -> bool {
        let fetched = self.fetch();
        let acted = self.act();
        self.publish();
        let Process { machine: Some(machine), outbox, linger, sleep, ended, .. } = &mut self.process else {
            return false;
        };
        if machine.is_closed() {
            *ended = true;
            return true;
        }
        if fetched > 0 {
            *linger = match (machine.is_live(), fetched) {
                (false, _) => Some(LINGER_DOWN),
                (true, BURST..) => Some(LINGER_BURST),
                _ => None,
            };
        }
        let pause = linger.take();
        let asleep = pause.is_some() || outbox.arm();
        let deadline = machine.deadline(self.now);
        let pause = pause.map(|pause| self.now + pause);
        let timer = [pause, deadline].into_iter().flatten().min();
        *sleep = Some(Sleep { pause, timer, asleep });
        acted || fetched > 0
    }

    /// The `select!`: whatever is ready, in its order of preference. `false`: nothing is.
    fn wake(&mut self, acted: bool) -> bool {
        let Some(Sleep { pause, timer, asleep }) = self.process.sleep.take() else { return true };
        if let Some(command) = self.process.commands.pop_front() {
            self.command(&command);
        } else if let Some(done) = self.process.dones.pop_front() {
            self.note(|| format!("done {}", brief(&done)));
            let now = self.now;
            if let (Done::Appended { dropped, .. }, Some(wire)) = (&done, &self.wire) {
                let sent = dropped.iter().find(|gap| gap.from <= wire.written);
                assert!(sent.is_none(), "{sent:?} is given up, and {} were sent", wire.written);
            }
            if let Done::NewRing(ring) = &done {
                let confirmed = self.machine().acked();
                self.process.outbox.move_to(ring.clone());
                self.process.outbox.note_acked(confirmed);
                self.process.ring_gone = None;
                self.fetch();
            }
            self.machine().on_spill(now, done);
        } else if self.link() || self.opened() {
        } else if pause.is_none() && self.process.outbox.bell.notified().now_or_never().is_some() {
            self.time();
        } else if timer.is_some_and(|at| at <= self.now) {
            let before = self.position();
            self.time();
            if !acted && pause.is_none() && before == self.position() {
                self.tally.idle_wakes += 1;
            }
        } else if asleep {
            self.process.sleep = Some(Sleep { pause, timer, asleep });
            return false;
        }
        true
    }

    fn machine(&mut self) -> &mut Machine {
        self.process.machine.as_mut().expect("open")
    }

    fn position(&mut self) -> (bool, u64) {
        let machine = self.machine();
        (machine.has_actions(), machine.acked())
    }

    fn fetch(&mut self) -> u64 {
        let fresh = self.process.outbox.take();
        let (mut events, now) = (0, self.now);
        for fresh in fresh {
            events += fresh.item.events();
            self.note(|| format!("fetched {}..{}", fresh.item.first(), fresh.item.last()));
            self.machine().on_accepted(now, fresh, now);
        }
        events
    }

    fn act(&mut self) -> bool {
        let mut busy = false;
        while let Some(action) = self.machine().poll_action() {
            busy = true;
            match action {
                Action::Connect => self.connect(),
                Action::Disconnect => self.disconnect(),
                Action::Spill(op) => {
                    self.note(|| format!("spill {}", brief(&op)));
                    let delay = self.micros(self.disk_latency);
                    let acked = self.machine().acked();
                    self.disk.submit(self.now, self.now + delay, op, acked);
                }
                Action::Report(report) => self.note(|| format!("report {} {:?}", report.event_type, report.details)),
                Action::Flushed(outcome) => {
                    self.note(|| format!("flushed {outcome:?}"));
                    assert!(outcome.failed <= outcome.remaining, "{outcome:?}: more failed than remain");
                }
                Action::Release(items) => {
                    let acked = self.machine().acked();
                    self.process.outbox.note_acked(acked);
                    drop(items);
                }
                Action::Refused { seq, reason } => {
                    self.note(|| format!("refused {seq}: {reason}"));
                    let known = self.machine().refusal_of(seq);
                    assert!(known.is_some(), "whoever asks for seq {seq} now is not told");
                }
                Action::Requeue(wanted) => {
                    for each in wanted {
                        let id = id_of(&each.json);
                        let seq = match self.process.outbox.push(&each.json, Some(true)) {
                            Ok(Pushed::Accepted { seq, .. }) => Some(seq),
                            _ => None,
                        };
                        self.note(|| format!("event {id} again as {seq:?}"));
                        self.receiver.requeued.insert(id);
                        self.machine().on_requeued(each.id, seq);
                        if let Some(seq) = seq {
                            self.emissions[id as usize] = Emission { seq, untraceable: false };
                        }
                    }
                }
            }
        }
        busy
    }

    fn publish(&mut self) {
        let acked = self.machine().acked();
        self.process.outbox.note_acked(acked);
        let snapshot = self.machine().snapshot();
        let outbox = &self.process.outbox;
        let Snapshot { live, held, settled, spill_bytes, .. } = snapshot;
        outbox.tell(Beyond { live, held, settled, spill_bytes });
        let counts = outbox.counts();
        let depth = counts.spilled as i64 + snapshot.balance;
        assert!(depth >= 0, "{depth} events are spilled: {counts:?} {snapshot:?}");
        let unconfirmed = counts.last_seq - snapshot.acked_seq;
        assert!(depth as u64 <= unconfirmed, "{depth} spilled, {unconfirmed} unconfirmed: {counts:?} {snapshot:?}");
        let most = 4 * self.config.outbox_bytes + 2 * (self.padding + 64);
        assert!(snapshot.held <= 2 * most, "{} bytes in memory, {most} allowed", snapshot.held);
    }

    fn time(&mut self) {
        let counts = self.process.outbox.counts();
        let now = self.now;
        let depth = (counts.spilled as i64 + self.machine().snapshot().balance).max(0) as u64;
        self.machine().on_time(now, counts.live, counts.live + counts.spilled, depth);
    }

    fn command(&mut self, command: &Command) {
        self.fetch();
        let now = self.now;
        match command {
            Command::Flush => self.machine().flush_now(now),
            Command::Await(seq) => {
                self.machine().want(*seq);
                self.process.awaited = self.process.awaited.max(*seq);
            }
            Command::Stop(drain) => self.machine().stop(now, now + *drain),
        }
    }

    // ── The link ────────────────────────────────────────────────────────────────────────────────────────────────────

    fn connect(&mut self) {
        self.tally.connects += 1;
        let next = self.machine().next_to_send();
        let refused = self.now < self.refuse_until || (self.now < self.fail_until && self.rng.u8(..4) == 0);
        let at = self.now + self.micros(self.latency * 2 + 100);
        self.note(|| format!("connect from {next}, refused: {refused}"));
        self.process.connecting = Some((at, (!refused).then_some(next)));
    }

    fn disconnect(&mut self) {
        self.note(|| "disconnect".to_owned());
        self.process.connecting = None;
        if let Some(wire) = self.wire.take() {
            // What is on its way may arrive or not.
            self.ghost = self.rng.bool().then_some(wire.abandon());
        }
    }

    fn opened(&mut self) -> bool {
        let Some((_, next)) = self.process.connecting.filter(|(at, _)| *at <= self.now) else { return false };
        self.process.connecting = None;
        self.fetch();
        let now = self.now;
        let Some(next) = next else {
            self.machine().on_connect_failed(now, &Error::new(ErrorKind::ConnectRefused, "refused"));
            return true;
        };
        self.ghost = None; // a receiver ends the older connection of the same emitter
        let welcome: Welcome = self.receiver.hello(next);
        let acked = welcome.have.max(next - 1);
        self.note(|| format!("up: {welcome:?}"));
        match self.machine().on_link_up(now, welcome) {
            Ok(()) => {
                let room = self.rng.usize(1..200);
                self.wire = Some(Wire::new(self.latency, room, acked, welcome.credit));
            }
            Err(error) => panic!("the link is refused: {}", error.report()),
        }
        true
    }

    /// `Link::poll`: news first, then as many frames as the peer takes.
    fn link(&mut self) -> bool {
        let now = self.now;
        let Some(wire) = &mut self.wire else { return false };
        let Some(machine) = &mut self.process.machine else { return false };
        let sends = self.receiver.confirm == Confirm::Sends;
        if let Some(answer) = wire.news(now) {
            let outcome = match answer {
                Answer::Ack(upto) => {
                    wire.busy = false;
                    machine.on_ack(now, upto)
                }
                Answer::Credit(credit) => {
                    machine.on_credit(credit);
                    Ok(())
                }
                Answer::Pong(number) => {
                    machine.on_pong(now, number);
                    Ok(())
                }
                Answer::Nack(seq) => {
                    // What is behind it has to come, and to be asked for, again.
                    (wire.written, wire.asked) = (wire.written.min(seq - 1), wire.asked.min(seq - 1));
                    machine.on_nack(now, seq, "simulated")
                }
                Answer::Refused => Err(Error::new(ErrorKind::FrameRefused, "not that")),
                Answer::Down => Err(Error::new(ErrorKind::ConnectRefused, "down")),
            };
            self.note(|| format!("news {answer:?}"));
            if let Err(error) = outcome {
                assert!(error.kind() != ErrorKind::Protocol, "{}", error.report());
                self.disconnect();
                self.machine().on_link_down(now, &error);
            }
            return true;
        }
        let mut sent = Vec::new();
        while sent.len() < MESSAGES_PER_TURN && !wire.is_blocked() && !wire.busy {
            let Some(frame) = machine.poll_outgoing(now) else { break };
            if let Outgoing::Item(Item::Gap(gap)) = &frame
                && gap.reason == GapReason::Refused
            {
                let parked = (gap.from..=gap.to).all(|seq| self.disk.ever_parked.contains_key(&seq));
                assert!(parked, "{gap:?} is told and not parked");
            }
            if let Outgoing::Item(item) = &frame {
                self.tally.written += item.events();
            }
            sent.push(match &frame {
                Outgoing::Item(item) => (item.first(), item.last(), item.events()),
                Outgoing::Ping(number) => (*number, 0, 0),
                Outgoing::AckNow => (0, 0, 0),
            });
            wire.busy = sends;
            wire.write(now, frame, &mut self.rng);
        }
        let (acked, awaited) = (machine.acked(), self.process.awaited);
        let unasked = wire.written > acked.max(wire.asked) && awaited > acked.max(wire.asked);
        if self.receiver.confirm == Confirm::Acks && sent.len() < MESSAGES_PER_TURN && !wire.is_blocked() {
            assert!(!unasked, "{awaited} is awaited, {} sent, and {} asked for", wire.written, wire.asked);
        }
        let turned = !sent.is_empty() || machine.has_actions();
        if !sent.is_empty() {
            machine.on_progress(now);
            self.note(|| format!("sent {sent:?}"));
        }
        turned
    }

    // ── What happens ────────────────────────────────────────────────────────────────────────────────────────────────

    fn emit(&mut self) {
        if self.process.ended {
            return;
        }
        let id = self.emissions.len();
        let padding = "x".repeat(self.rng.usize(0..=self.padding));
        let json = format!("{{\"id\":{id},\"pad\":\"{padding}\"}}");
        if let Ok(Pushed::Accepted { seq, provisional, .. }) = self.process.outbox.push(json.as_bytes(), None) {
            self.emissions.push(Emission { seq, untraceable: false });
            let poisoned = self.poison > 0 && self.rng.u32(..self.poison) == 0;
            let times = if self.rng.bool() { u32::MAX } else { self.rng.u32(1..6) };
            self.receiver.expect(if poisoned { times } else { 0 });
            if provisional {
                self.process.provisional.push(id);
            }
        }
    }

    fn crash(&mut self) {
        self.note(|| "crash".to_owned());
        self.disk.crash(&mut self.rng);
        if let Some(wire) = self.wire.take() {
            self.ghost = self.rng.bool().then_some(wire.abandon());
        }
        let highest = self.receiver.highest();
        assert!(highest <= self.disk.reserved, "seq {highest} was sent, {} are promised", self.disk.reserved);
        self.leave();
        self.forgive();
        self.begin();
    }

    /// The process is gone: what of its ring stays.
    fn leave(&mut self) {
        if let Some(machine) = &self.process.machine {
            self.bereft = machine.is_bereft() || self.process.ring_gone.is_some();
            let found = self.disk.has_ring && self.process.ring_gone.is_none();
            self.left = found.then(|| self.process.outbox.snapshot());
        }
    }

    /// What was only in memory under seqs that the disk never promised leaves no trace; whoever stopped the emitter
    /// in that state was told so. A ring keeps all of it, but for what came before it was there.
    fn forgive(&mut self) {
        let durable = self.config.durability != Durability::Memory && self.process.ring_gone.is_none();
        let opening = std::mem::take(&mut self.process.provisional);
        let unkept = std::mem::take(&mut self.process.unkept);
        let Self { emissions, receiver, disk, .. } = self;
        for (id, emission) in emissions.iter_mut().enumerate() {
            let kept = receiver.received[id] == emission.seq || disk.has(emission.seq);
            let early = opening.binary_search(&id).is_ok() || (!kept && unkept.binary_search(&id).is_ok());
            if early || (!durable && emission.seq > disk.reserved && !kept) {
                emission.untraceable = true;
            }
        }
    }

    /// With a ring a crash loses nothing that had been accepted.
    fn check_crash(&mut self, gap: Gap) {
        if self.config.durability == Durability::Memory || self.bereft {
            self.excused.push(gap);
            return;
        }
        let within = |gap: &Gap, seq| (gap.from..=gap.to).contains(&seq);
        let lost = |(id, each): &(usize, &Emission)| {
            let told_before = each.untraceable
                || self.process.provisional.binary_search(id).is_ok()
                || self.excused.iter().any(|gap| within(gap, each.seq));
            within(&gap, each.seq) && !told_before && self.receiver.received[*id] == 0
        };
        let found = self.emissions.iter().enumerate().find(lost).map(|(id, each)| (id, each.seq));
        assert!(found.is_none(), "the crash has lost {found:?} in {gap:?}, which the ring held");
    }

    fn restart(&mut self) {
        if self.process.machine.is_none() {
            return;
        }
        self.process.outbox.close();
        let drain = self.micros(2_000_000);
        self.note(|| format!("stop within {drain:?}"));
        self.process.commands.push_back(Command::Stop(drain));
        let limit = self.now + 60 * SECOND;
        while !self.process.ended {
            assert!(self.now < limit, "the emitter does not stop");
            self.advance(limit);
        }
        let failure = self.machine().take_failure();
        self.note(|| format!("stopped: {failure:?}"));
        self.leave();
        if failure.is_some() {
            self.forgive();
        }
        assert!(self.wire.is_none(), "the link outlives the emitter");
        self.begin();
    }

    fn kill_link(&mut self, heard: bool) {
        self.note(|| format!("the link dies, heard of: {heard}"));
        let at = self.now + self.micros(self.latency);
        let Self { wire, receiver, rng, .. } = self;
        if let Some(wire) = wire {
            receiver.take_part(wire, rng);
            wire.die(heard.then_some(at));
        }
    }

    /// The machine is suspended: time passes at once. Most links do not outlive it.
    fn sleep(&mut self) {
        let asleep = self.micros(3_600_000_000);
        self.note(|| format!("asleep for {asleep:?}"));
        if self.rng.u8(..4) > 0 {
            self.kill_link(false);
        }
        self.now += asleep;
        self.tally.slept += asleep;
    }

    /// Somebody removes the ring's file, which is noticed after a while.
    fn lose_ring(&mut self) {
        let delay = self.micros(2_000_000);
        let Process { machine: Some(_), ring_gone: ring_gone @ None, ended: false, .. } = &mut self.process else {
            return;
        };
        if self.disk.has_ring {
            *ring_gone = Some(self.now + delay);
            self.note(|| format!("the ring's file is removed, to be noticed after {delay:?}"));
        }
    }

    fn mend(&mut self) {
        let identity = Identity { emitter: "simulated".to_owned(), epoch: "epoch".to_owned() };
        let ring = Ring::simulated(Outbox::segments(&self.config), &identity, 2).expect("memory");
        ring.note_last(self.process.outbox.counts().last_seq + 1000);
        let gone = Error::new(ErrorKind::SpillIo, "removed");
        self.process.dones.extend([Done::FilesGone(gone), Done::NewRing(ring), Done::FilesBack]);
    }

    fn happen(&mut self) {
        self.tally.actions += 1;
        match self.rng.u8(..100) {
            0..35 => self.emit(),
            35..55 => {
                let most = if self.padding > 1000 { 12 } else { 80 };
                for _ in 0..self.rng.u64(1..most) {
                    self.emit();
                }
            }
            55..64 => self.kill_link(true),
            64..67 => self.kill_link(false),
            67..72 => {
                let outage = self.micros(8_000_000);
                self.refuse_until = self.now + outage;
                self.kill_link(true);
            }
            72..76 => {
                self.note(|| "the receiver forgets".to_owned());
                self.kill_link(true);
                self.receiver.forget();
                self.ghost = None;
            }
            76..80 => self.crash(),
            80..84 => self.restart(),
            84..86 => {
                self.tally.hurried += 1;
                self.process.commands.push_back(Command::Flush);
            }
            86..87 if self.process.machine.is_some() => {
                let last = self.process.outbox.counts().last_seq;
                self.process.commands.push_back(Command::Await(last));
            }
            86..87 => {} // it waits until the seqs are final
            87..91 => {
                match self.rng.u8(..3) {
                    0 => self.disk.failing = self.rng.f64(),
                    1 => self.disk.full = true,
                    _ => self.disk.rotting = self.rng.f64() / 4.0,
                }
                let outage = self.micros(6_000_000);
                self.fail_until = self.now + outage;
            }
            93 => self.sleep(),
            91..94 => {
                let mute = self.micros(6_000_000);
                self.receiver.mute_until = self.now + mute;
            }
            94 => self.disk.want(&mut self.rng),
            95 => self.lose_ring(),
            96 => self.receiver.patience = pick(&mut self.rng, &[0, 1000, 100_000, 900_000]),
            97.. => {
                let credit = self.rng.u64(1..100);
                let Self { receiver, wire: Some(wire), rng, now, .. } = self else { return };
                receiver.grant(credit, wire, *now, rng);
            }
        }
    }

    /// Lets the driver run, then time pass until something happens, at most until `limit`.
    fn advance(&mut self, limit: Duration) {
        self.drive();
        let process = &self.process;
        if process.ended {
            return;
        }
        let times = [
            process.machine.is_none().then_some(process.opens_at),
            process.sleep.as_ref().and_then(|sleep| sleep.timer),
            process.connecting.map(|(at, _)| at),
            self.disk.queue.front().map(|(at, _)| *at),
            process.ring_gone,
            self.wire.as_ref().and_then(Wire::next_time),
            self.ghost.as_ref().and_then(Wire::next_time),
            process.machine.as_ref().and_then(|_| self.disk.next_look()),
        ];
        self.turns_of_time += 1;
        assert!(self.turns_of_time < 1_000_000, "time stands still");
        let next = times.into_iter().flatten().min().unwrap_or(limit).min(limit);
        self.now = self.now.max(next);
        if self.now >= self.fail_until {
            self.disk.heal();
        }
        while let Some(done) = self.disk.work(self.now, &mut self.rng) {
            self.process.dones.push_back(done);
        }
        if self.process.machine.is_some() {
            self.process.dones.extend(self.disk.look(self.now));
        }
        if self.process.ring_gone.is_some_and(|at| at <= self.now) && !self.process.dones.iter().any(is_new_ring) {
            self.mend();
        }
        for wire in [&mut self.ghost, &mut self.wire].into_iter().flatten() {
            while self.receiver.work(wire, self.now, &mut self.rng) {}
        }
        // Timers are a millisecond coarse.
        if let Some(Sleep { timer: Some(timer), .. }) = &mut self.process.sleep
            && *timer <= self.now
            && self.rng.u8(..4) == 0
        {
            *timer += MILLI;
        }
    }

    /// Runs the whole schedule.
    pub(crate) fn run(&mut self) {
        for _ in 0..self.rng.u32(10..70) {
            self.happen();
            let pause = match self.rng.u8(..10) {
                0..4 => Duration::ZERO,
                4..9 => self.micros(300_000),
                _ => self.micros(8_000_000),
            };
            let until = self.now + pause;
            self.drive();
            while self.now < until {
                self.advance(until);
            }
        }
        self.settle();
    }

    /// The faults stop: everything must drain, and then the books must be right.
    fn settle(&mut self) {
        self.note(|| "the faults stop".to_owned());
        self.fail_until = self.now;
        self.refuse_until = self.now;
        self.receiver.mute_until = self.now;
        self.receiver.patience = self.receiver.patience.min(10_000);
        self.disk.heal();
        let pace = self.config.flush_rate.map_or(0.0, |rate| self.emissions.len() as f64 / rate);
        // A small credit costs a round trip each time that it is used up.
        let trip = Duration::from_micros(2 * self.latency + self.receiver.patience) + 10 * MILLI;
        let trips = self.emissions.len() as u64 / self.receiver.credit + 1;
        let attempts = 2 * (self.config.poison_tries + 1) * self.receiver.poisoned() as u32;
        let refused = self.config.backoff_max.max(self.config.breaker_cooldown) * attempts;
        let limit = self.now + 120 * SECOND + Duration::from_secs_f64(pace * 2.0) + trip * trips as u32 + refused;
        while !self.is_drained() {
            assert!(self.now < limit, "it does not drain: {:?}", self.process.machine.as_ref().map(Machine::snapshot));
            self.advance(limit);
        }
        self.check();
        self.process.outbox.close();
        self.process.commands.push_back(Command::Stop(SECOND));
        while !self.process.ended {
            assert!(self.now < limit + 10 * SECOND, "the emitter does not stop");
            self.advance(limit + 10 * SECOND);
        }
        let (taken, failure) = (self.machine().taken(), self.machine().take_failure());
        assert!(failure.is_none(), "{failure:?}");
        assert!(!self.disk.has_ring, "a clean end leaves the ring behind");
        let left = self.disk.recover(None, None).0;
        let found = (left.next_seq, left.base, left.last, left.gaps.len(), left.bytes);
        assert_eq!(found, (taken + 1, taken, taken, 0, 0), "a clean end leaves something behind");
    }

    fn is_drained(&mut self) -> bool {
        self.drive();
        let Some(machine) = &self.process.machine else { return false };
        machine.is_live()
            && !machine.snapshot().degraded
            && machine.acked() == self.process.outbox.counts().last_seq
            && self.disk.is_idle()
            && !self.disk.is_wanted()
            && self.process.dones.is_empty()
    }

    fn check(&mut self) {
        for (id, emission) in self.emissions.iter().enumerate() {
            let arrived = self.receiver.received[id] > 0;
            let known = arrived || emission.untraceable || self.receiver.was_told_of(emission.seq);
            assert!(known, "event {id} with seq {} is lost silently", emission.seq);
        }
        for (seq, json) in &self.disk.ever_parked {
            let id = id_of(json);
            let again = self.receiver.requeued.contains(&id);
            assert!(self.receiver.was_told_of(*seq), "seq {seq} is parked and no gap tells of it");
            assert!(again || self.receiver.received[id as usize] == 0, "event {id} is parked and delivered");
            assert!(again || self.emissions[id as usize].seq == *seq, "event {id} is parked twice");
        }
        PARKED.fetch_add(self.disk.ever_parked.len() as u64, Ordering::Relaxed);
        REQUEUED.fetch_add(self.receiver.requeued.len() as u64, Ordering::Relaxed);
        let counts = self.process.outbox.counts();
        let snapshot = self.machine().snapshot();
        assert_eq!(counts.spilled as i64 + snapshot.balance, 0, "{counts:?} {snapshot:?}");
        assert_eq!((snapshot.held, snapshot.in_flight, snapshot.in_flight_bytes), (0, 0, 0));
        assert_eq!(snapshot.settled, counts.last_seq);
        assert_ne!(snapshot.breaker, "open");
        assert!(!self.disk.needless, "events were given up although confirmed ones took the room");
        let Tally { connects, hurried, idle_wakes, lives, written, actions, slept } = self.tally;
        let awake = self.now.saturating_sub(slept);
        let shortest = self.config.backoff_initial.mul_f64(1.0 - self.config.jitter);
        let most = lives + hurried + (awake.as_secs_f64() / shortest.as_secs_f64()) as u64 + 1;
        assert!(connects <= most, "{connects} attempts to connect, {most} allowed");
        // Pacing wakes once or twice for each spilled event, whatever comes of it.
        let paced = if self.config.flush_rate.is_some() { 2 * written } else { 0 };
        let most = 50 + 3 * awake.as_secs() + 3 * actions + paced + 2 * self.receiver.refusals;
        assert!(idle_wakes <= most, "the driver woke {idle_wakes} times for nothing, {most} allowed");
    }
}
