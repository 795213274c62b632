//! The delivery machine: decides when to connect, what to send, what to spill and what to report.
//!
//! Pure: no clock, socket, thread, randomness or file. Time is an argument (since the driver's start), the seed of
//! the jitter too. Four kinds of methods: questions (`phase`, `stats`, …), `on_*` (something happened), commands
//! (`start`, `flush_now`, `stop`), and `poll_*` (what the driver must do now). One file per phase; this one holds the
//! state, the questions and the clock. `tests/rust/emitter_simulation.rs` drives it through random schedules against a
//! model.

mod flushing;
mod linking;
mod refusing;
mod reporting;
mod sending;
mod spilling;
mod stopping;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use serde_json::json;

use crate::backoff::Backoff;
use crate::breaker::Breaker;
use crate::emitter::config::EmitterConfig;
use crate::emitter::item::{Gap, GapReason, Item};
use crate::emitter::ledger::Ledger;
use crate::emitter::report::{Coalesced, Objectives, Report, SloMonitor};
use crate::emitter::spill::Op;
use crate::emitter::spill::parked::Wanted;
use crate::emitter::spill::store::{RESERVE_FIRST, Recovered};
use crate::emitter::window::Window;
use crate::error::Error;

use refusing::Refusing;

pub use crate::emitter::ledger::Time;

/// A link that confirms nothing for this long while memory is full is called stalled, and memory moves to disk.
const STALL: Duration = Duration::from_millis(100);

/// How the peer confirms what it received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confirm {
    /// Our hub: cumulative acks.
    Acks,
    /// Any WebSocket server: a Ping carries the seq, its Pong proves that everything before it was read.
    Pings,
    /// A Python object: `send` returned.
    Sends,
}

/// The peer's answer when a link comes up.
#[derive(Clone, Copy, Debug)]
pub struct Welcome {
    /// How it confirms.
    pub confirm: Confirm,
    /// Highest seq that it has of us; 0 if unknown.
    pub have: u64,
    /// How many events may be unconfirmed at once.
    pub credit: u64,
}

/// Where the emitter stands with its link.
#[derive(Clone, Debug)]
pub enum Phase {
    /// Not started: events go to the spill.
    Idle,
    /// Between attempts.
    Waiting {
        /// Next attempt.
        until: Time,
    },
    /// An attempt is under way.
    Connecting,
    /// The link is up.
    Live(Live),
    /// No link any more; what is left goes to the spill.
    Stopped,
}

/// A link that is up.
#[derive(Clone, Debug)]
pub struct Live {
    welcome: Welcome,
    /// Whether it has confirmed anything yet.
    proven: bool,
    /// Last sign that bytes move.
    progress: Time,
    /// Last confirmation, or when there was nothing to confirm.
    confirmed: Time,
    /// Ping under way.
    barrier: Option<Barrier>,
    /// Highest seq that a Ping stood for.
    barred: u64,
    unbarred_bytes: usize,
    idle_ping: bool,
    /// Its silence was not held against it, because we did not run ourselves; once, until it says something.
    excused: bool,
    /// The hub was asked for its ack up to here.
    asked: u64,
}

/// A Ping under way.
#[derive(Clone, Copy, Debug)]
struct Barrier {
    /// The seq that it stands for.
    number: u64,
    since: Time,
}

/// A flush: everything that was spilled when the link came up.
#[derive(Clone, Debug)]
struct Flush {
    target: u64,
    since: Time,
    flushed: u64,
    failed: u64,
    /// Events a second, lately.
    rate: f64,
    /// When that was measured last, and how many were flushed then.
    measured: (Time, u64),
    next_report: Time,
}

/// Result of a flush, as users see it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlushOutcome {
    /// Spilled events confirmed.
    pub flushed: u64,
    /// Events tried and not confirmed.
    pub failed: u64,
    /// Spilled events left.
    pub remaining: u64,
}

/// What the driver has to do.
#[derive(Debug)]
pub enum Action {
    /// Open a link.
    Connect,
    /// Drop the link.
    Disconnect,
    /// Give the spill's thread something to do.
    Spill(Op),
    /// Tell the health bus.
    Report(Report),
    /// Log a flush's end; its waiters are told.
    Flushed(FlushOutcome),
    /// Drop these: they are confirmed, or in the spill.
    Release(Vec<Item>),
    /// The event is parked: whoever waits for its delivery is told.
    Refused {
        /// The event.
        seq: u64,
        /// The peer's words.
        reason: Arc<str>,
    },
    /// Put these into the outbox as new events, and tell the machine what became of each.
    Requeue(Vec<Wanted>),
}

/// What goes over the link.
#[derive(Debug)]
pub enum Outgoing {
    /// Events or a gap.
    Item(Item),
    /// A Ping that carries this number; its echo comes back through [`Machine::on_pong`].
    Ping(u64),
    /// Our hub is asked for the ack of what it has.
    AckNow,
}

/// Numbers for `get_stats`.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Whether the link is up.
    pub live: bool,
    /// Whether it ever was.
    pub ready: bool,
    /// Confirmed up to here.
    pub acked_seq: u64,
    /// Bytes in flight.
    pub in_flight_bytes: u64,
    /// Events in flight.
    pub in_flight: u64,
    /// See [`Ledger::balance`].
    pub balance: i64,
    /// Events accepted live that had to be spilled.
    pub demoted: u64,
    /// Spilled events confirmed.
    pub flushed: u64,
    /// Events given up by the spill.
    pub dropped: u64,
    /// Events parked now.
    pub parked: u64,
    /// Parked events that had to make room for newer ones.
    pub parked_dropped: u64,
    /// Bytes in the spill's file.
    pub spill_bytes: u64,
    /// Bytes held in memory.
    pub held: usize,
    /// See [`Ledger::settled`].
    pub settled: u64,
    /// `closed`, `open`, `half_open`.
    pub breaker: &'static str,
    /// Whether the disk refuses writes.
    pub degraded: bool,
    /// Links established after the first.
    pub reconnects: u64,
    /// Last trouble, for people.
    pub last_error: Option<Arc<str>>,
    /// Since when the oldest unconfirmed event waits.
    pub oldest: Option<Time>,
    /// Share of events accepted live over a minute.
    pub success_rate: f64,
    /// Seconds of the last flush.
    pub flush_latency: Option<f64>,
    /// Events that the flush under way has yet to bring.
    pub flush_remaining: u64,
    /// Events a second that it brought lately; 0 without one.
    pub flush_rate: f64,
    /// Bytes that may be unconfirmed on the link.
    pub window: usize,
}

/// Where the files are of what is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Files {
    Kept,
    /// Somebody has removed one: a crash would lose what is in it.
    Gone,
    /// They are back, but what is held up to this seq lies in a ring whose file is gone.
    Leaving {
        upto: u64,
        back: bool,
    },
}

/// See the [module](self).
#[expect(clippy::struct_excessive_bools, reason = "each says whether one operation of the spill's thread is under way")]
pub struct Machine {
    config: EmitterConfig,
    rng: Rng,
    phase: Phase,
    ledger: Ledger,
    backoff: Backoff,
    breaker: Breaker,
    slo: SloMonitor,
    spills: Coalesced,
    losses: Coalesced,
    loss: Option<Gap>,
    actions: VecDeque<Action>,
    flush: Option<Flush>,
    flush_wanted: bool,
    flush_latency: Option<Duration>,
    tokens: (f64, Time),
    window: Window,
    /// Somebody waits for the confirmation of everything up to here.
    wanted: u64,
    ready: bool,
    links: u64,
    stopping: Option<Time>,
    last_error: Option<Arc<str>>,
    last_topic: Option<String>,
    // The spill's thread: at most one operation of each kind is under way.
    appending: bool,
    /// The append under way may give events up: what is sent meanwhile could be among them.
    giving_up: bool,
    reading: bool,
    trimming: Option<u64>,
    trimmed: u64,
    reserving: bool,
    probing: bool,
    reserved: u64,
    reserve_step: u64,
    refusing: Refusing,
    spill_bytes: u64,
    /// Something has just failed on the disk: nothing is tried there before this.
    spill_pause: Option<Time>,
    /// The last write failed.
    degraded: bool,
    files: Files,
    closing: bool,
    closed: bool,
    spill_failed: Option<Error>,
    next_second: Time,
}
impl Machine {
    /// A machine that goes on where an earlier process ended. `seed` drives the jitter.
    #[must_use]
    pub fn new(config: EmitterConfig, recovered: &Recovered, seed: u64) -> Self {
        let ledger = Ledger::new(recovered);
        let mut machine = Self {
            rng: Rng::with_seed(seed),
            phase: Phase::Idle,
            backoff: Backoff::new(config.backoff_initial, config.backoff_max, config.backoff_multiplier, config.jitter),
            breaker: Breaker::new(config.breaker_threshold, config.breaker_cooldown),
            slo: SloMonitor::new(Objectives {
                success_rate: config.slo_emit_success_rate,
                depth: config.slo_spill_depth,
                depth_alert: config.slo_spill_depth_alert,
                flush: config.slo_flush_latency,
            }),
            spills: Coalesced::new(config.report_interval),
            losses: Coalesced::new(config.report_interval),
            loss: None,
            actions: VecDeque::new(),
            flush: None,
            flush_wanted: false,
            flush_latency: None,
            tokens: (0.0, Time::ZERO),
            window: Window::new(config.outbox_bytes),
            wanted: 0,
            ready: false,
            links: 0,
            stopping: None,
            last_error: None,
            last_topic: None,
            appending: false,
            giving_up: false,
            reading: false,
            trimming: None,
            trimmed: recovered.base,
            reserving: false,
            probing: false,
            reserved: recovered.reserved,
            reserve_step: RESERVE_FIRST,
            refusing: Refusing::new(&config, recovered.parked),
            spill_bytes: recovered.bytes,
            spill_pause: None,
            degraded: false,
            files: Files::Kept,
            closing: false,
            closed: false,
            spill_failed: None,
            next_second: Time::ZERO,
            ledger,
            config,
        };
        let held = recovered.held.iter().filter_map(Item::gap);
        let gaps = recovered.gaps.iter().copied().filter(|gap| gap.to > recovered.base).chain(held);
        for gap in gaps.filter(|gap| gap.reason != GapReason::Refused) {
            machine.lost(gap);
        }
        if let Some(damage) = &recovered.damage {
            machine.report_damage(damage);
        }
        machine
    }

    /// Whether the link is up.
    #[must_use]
    pub fn is_live(&self) -> bool {
        matches!(self.phase, Phase::Live(_))
    }

    /// Whether the link was ever up.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.ready
    }

    /// Whether the file is closed and nothing is left to do; with the error if something could not be stored.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Why the last events could not be stored while stopping, if so.
    pub fn take_failure(&mut self) -> Option<Error> {
        self.spill_failed.take()
    }

    /// Whether a crash would lose what is stored, because somebody has removed a file.
    #[must_use]
    pub fn is_bereft(&self) -> bool {
        self.files != Files::Kept
    }

    /// Confirmed up to here.
    #[must_use]
    pub fn acked(&self) -> u64 {
        self.ledger.acked()
    }

    /// Taken from the outbox up to here.
    #[must_use]
    pub fn taken(&self) -> u64 {
        self.ledger.taken()
    }

    /// First seq that the next link will carry, for `hello`.
    #[must_use]
    pub fn next_to_send(&self) -> u64 {
        self.ledger.acked() + 1
    }

    /// On disk up to here.
    #[must_use]
    pub fn stored_upto(&self) -> u64 {
        self.ledger.spill_last()
    }

    /// Spilled items after `seq` that are not on disk, about `max_bytes` of them.
    #[must_use]
    pub fn spilled_in_memory(&self, seq: u64, max_bytes: usize) -> Vec<Item> {
        let mut bytes = 0;
        let held = self.ledger.oldest_held(usize::MAX).into_iter().filter_map(|item| item.after(seq));
        let spilled = held.take_while(|item| item.first() <= self.ledger.spilled_upto());
        let within = spilled.take_while(|item| {
            let more = bytes < max_bytes;
            bytes += item.bytes();
            more
        });
        within.collect()
    }

    /// Whether `seq` was given up.
    #[must_use]
    pub fn is_gap(&self, seq: u64) -> bool {
        self.ledger.events_between(seq - 1, seq) == 0
    }

    /// Numbers for `get_stats`.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let ledger = &self.ledger;
        Snapshot {
            live: self.is_live(),
            ready: self.ready,
            acked_seq: ledger.acked(),
            in_flight_bytes: ledger.in_flight_bytes() as u64,
            in_flight: ledger.events_between(ledger.acked(), ledger.sent()),
            balance: ledger.balance(),
            demoted: ledger.demoted,
            flushed: ledger.flushed,
            dropped: ledger.dropped,
            parked: self.refusing.parked(),
            parked_dropped: self.refusing.dropped(),
            spill_bytes: self.spill_bytes,
            held: ledger.held(),
            settled: ledger.settled(),
            breaker: self.breaker.name(),
            degraded: self.degraded || self.is_bereft(),
            reconnects: self.links.saturating_sub(1),
            last_error: self.last_error.clone(),
            oldest: ledger.oldest(),
            success_rate: self.slo.success_rate(),
            flush_latency: self.flush_latency.map(|took| took.as_secs_f64()),
            flush_remaining: self.flush.as_ref().map_or(0, |flush| self.flush_remaining(flush)),
            flush_rate: self.flush.as_ref().map_or(0.0, |flush| flush.rate),
            window: self.window_bytes(),
        }
    }

    /// When [`on_time`](Self::on_time) wants to be called next; `None`: not before something happens.
    #[must_use]
    pub fn deadline(&self, now: Time) -> Option<Time> {
        let mut times = [None; 12];
        times[0] = match &self.phase {
            Phase::Waiting { until } => Some(*until),
            _ => None,
        };
        times[1] = self.spills.deadline();
        times[2] = self.losses.deadline();
        times[3] = self.stopping.filter(|_| !matches!(self.phase, Phase::Stopped));
        times[4] = self.spill_pause;
        times[5] = self.flush.as_ref().and_then(|flush| self.slo.flush_deadline(flush.since));
        times[6] = self.slo.is_moving().then_some(self.next_second);
        if let Phase::Live(live) = &self.phase {
            times[7] = Some(self.link_deadline(live));
            times[8] = self.flush_pause(now).map(|pause| now + pause);
            let stalled = self.ledger.held() >= self.config.outbox_bytes && self.may_append();
            times[9] = stalled.then_some(live.confirmed + STALL);
            times[10] = self.flush.as_ref().map(|flush| flush.next_report);
            times[11] = self.refusing.pause(now);
        }
        times.into_iter().flatten().min().map(|time| time.max(now))
    }

    /// Time has passed. `accepted_live`, `accepted` and `depth` are totals as of now, for the objectives; zeros leave
    /// them alone.
    pub fn on_time(&mut self, now: Time, accepted_live: u64, accepted: u64, depth: u64) {
        self.connect_if_due(now);
        if let Phase::Live(live) = &self.phase
            && now >= self.link_deadline(live)
        {
            let idle = !self.awaits_confirmation(live);
            self.check_silence(now, idle);
        }
        if self.spill_pause.is_some_and(|until| now >= until) {
            self.spill_pause = None;
            self.reserve();
        }
        if accepted > 0 && now >= self.next_second {
            self.next_second = now + Duration::from_secs(1);
            for report in self.slo.observe(now, accepted_live, accepted, depth) {
                self.report(report);
            }
        }
        if let Some(flush) = &self.flush {
            let report = self.slo.flush_took(now.saturating_sub(flush.since), false);
            self.actions.extend(report.map(Action::Report));
        }
        self.after(now);
    }

    /// The next thing that the driver has to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Whether [`poll_action`](Self::poll_action) has anything.
    #[must_use]
    pub fn has_actions(&self) -> bool {
        !self.actions.is_empty()
    }

    /// Runs after every event: whatever has become possible or necessary.
    fn after(&mut self, now: Time) {
        if let Some(count) = self.spills.due(now) {
            self.report_spills(count);
        }
        if let Some(count) = self.losses.due(now)
            && let Some(gap) = self.loss.take()
        {
            let details = json!({"count": count, "from": gap.from, "to": gap.to, "reason": gap.reason.as_str()});
            self.report(Report::bad("broadcaster_loss", gap.reason.as_str(), count, details));
        }
        self.report_flush(now);
        self.settle_files();
        self.check_stop(now);
        self.plan_park();
        self.plan_append(now);
        self.plan_probe();
        self.plan_trim();
        self.plan_requeue();
        self.plan_unpark();
        self.plan_close();
    }
}

#[cfg(test)]
mod tests;
