//! The delivery machine: decides when to connect, what to send, what to spill and what to report.
//!
//! Pure: no clock, socket, thread, randomness or file. Time is an argument (since the driver's start), the seed of
//! the jitter too. Four kinds of methods: questions (`phase`, `stats`, …), `on_*` (something happened), commands
//! (`start`, `flush`, `stop`), and `poll_*` (what the driver must do now). `tests/rust/emitter_simulation.rs` drives it
//! through random schedules against a model.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use fastrand::Rng;
use serde_json::json;

use crate::emitter::backoff::Backoff;
use crate::emitter::breaker::Breaker;
use crate::emitter::config::EmitterConfig;
use crate::emitter::item::{Gap, Item};
use crate::emitter::ledger::Ledger;
use crate::emitter::outbox::Fresh;
use crate::emitter::report::{Coalesced, Objectives, Report, SloMonitor};
use crate::emitter::spill::store::Recovered;
use crate::emitter::spill::{Done, Op};
use crate::error::{Error, ErrorKind};

pub use crate::emitter::ledger::Time;

/// Bytes per append to the spill: one transaction of a few milliseconds.
const APPEND_BYTES: usize = 2 << 20;
/// Bytes read from the spill at a time, and the level below which more is read.
const READ_BYTES: usize = 1 << 20;
/// On a link that confirms by Pong, a Ping follows at least every so many bytes.
const BARRIER_BYTES: usize = 256 << 10;
/// A link that confirms nothing for this long while memory is full is called stalled, and memory moves to disk.
const STALL: Duration = Duration::from_millis(100);
/// The spill rests for this after a failed operation.
const SPILL_RETRY: Duration = Duration::from_secs(1);
/// Something unconfirmed for so many `ack_timeout`s ends the link even if bytes still move: a peer that swallows
/// everything and answers nothing.
const HOPELESS: u32 = 4;
/// First reservation of seqs; doubles with each one used up, so that their number stays small at any rate.
const RESERVE_FIRST: u64 = 10_000;
const RESERVE_MAX: u64 = 4_000_000;

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
    /// Ping under way, and the seq that it stands for.
    barrier: Option<u64>,
    /// Highest seq that a Ping stood for.
    barred: u64,
    unbarred_bytes: usize,
    idle_ping: bool,
}

/// A flush: everything that was spilled when the link came up.
#[derive(Clone, Debug)]
struct Flush {
    target: u64,
    since: Time,
    flushed: u64,
    failed: u64,
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
    /// Buffers that nobody needs any more.
    Recycle(Vec<Item>),
}

/// What goes over the link.
#[derive(Debug)]
pub enum Outgoing {
    /// Events or a gap.
    Item(Item),
    /// A Ping that carries this number; its echo comes back through [`Machine::on_pong`].
    Ping(u64),
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
    ready: bool,
    links: u64,
    stopping: Option<Time>,
    last_error: Option<Arc<str>>,
    last_topic: Option<String>,
    // The spill's thread: at most one operation of each kind is under way.
    appending: bool,
    reading: bool,
    trimming: Option<u64>,
    trimmed: u64,
    reserving: bool,
    reserved: u64,
    reserve_step: u64,
    spill_bytes: u64,
    /// Something has just failed on the disk: nothing is tried there before this.
    spill_pause: Option<Time>,
    /// The last write failed.
    degraded: bool,
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
            ready: false,
            links: 0,
            stopping: None,
            last_error: None,
            last_topic: None,
            appending: false,
            reading: false,
            trimming: None,
            trimmed: recovered.base,
            reserving: false,
            reserved: recovered.next_seq - 1,
            reserve_step: RESERVE_FIRST,
            spill_bytes: recovered.bytes,
            spill_pause: None,
            degraded: false,
            closing: false,
            closed: false,
            spill_failed: None,
            next_second: Time::ZERO,
            ledger,
            config,
        };
        for gap in recovered.gaps.iter().filter(|gap| gap.to > recovered.base) {
            machine.lost(*gap);
        }
        machine
    }

    // ── Questions ───────────────────────────────────────────────────────────────────────────────────────────────────

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
            spill_bytes: self.spill_bytes,
            held: ledger.held(),
            settled: ledger.settled(),
            breaker: self.breaker.name(),
            degraded: self.degraded,
            reconnects: self.links.saturating_sub(1),
            last_error: self.last_error.clone(),
            oldest: ledger.oldest(),
            success_rate: self.slo.success_rate(),
            flush_latency: self.flush_latency.map(|took| took.as_secs_f64()),
        }
    }

    /// When [`on_time`](Self::on_time) wants to be called next; `None`: not before something happens.
    #[must_use]
    pub fn deadline(&self, now: Time) -> Option<Time> {
        let mut times = [None; 10];
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
        }
        times.into_iter().flatten().min().map(|time| time.max(now))
    }

    fn link_deadline(&self, live: &Live) -> Time {
        if self.awaits_confirmation(live) {
            let silent = live.progress + self.config.ack_timeout;
            return silent.min(live.confirmed + self.config.ack_timeout * HOPELESS);
        }
        match live.welcome.confirm {
            Confirm::Sends => Time::MAX,
            Confirm::Acks | Confirm::Pings => live.progress + self.config.ping_interval,
        }
    }

    fn awaits_confirmation(&self, live: &Live) -> bool {
        self.ledger.sent() > self.ledger.acked() || live.barrier.is_some() || live.idle_ping
    }

    // ── Commands ────────────────────────────────────────────────────────────────────────────────────────────────────

    /// Connect from now on, for ever.
    pub fn start(&mut self, now: Time) {
        if matches!(self.phase, Phase::Idle) {
            self.phase = Phase::Waiting { until: now };
            self.on_time(now, 0, 0, 0);
        }
    }

    /// Flush now: do not wait for the backoff. The end is told by [`Action::Flushed`].
    pub fn flush_now(&mut self, now: Time) {
        self.flush_wanted = true;
        if let Phase::Waiting { until } = &mut self.phase {
            *until = now;
            self.connect_if_due(now);
        }
        self.settle_flush(now);
        if self.flush_wanted && matches!(self.phase, Phase::Idle | Phase::Waiting { .. } | Phase::Stopped) {
            self.end_flush(1); // not started, or the breaker forbids it: as in seed 000, the oldest counts as failed
        }
    }

    /// Accept nothing new; send until `deadline`, then store the rest and close.
    pub fn stop(&mut self, now: Time, deadline: Time) {
        self.stopping = Some(self.stopping.map_or(deadline, |earlier| earlier.min(deadline)));
        self.after(now);
    }

    // ── Events ──────────────────────────────────────────────────────────────────────────────────────────────────────

    /// Fetched from the outbox. `since`: when its first event was accepted.
    pub fn on_accepted(&mut self, now: Time, fresh: Fresh, since: Time) {
        let live = self.is_live();
        let events = fresh.item.events();
        let spilled = if live { fresh.spilled } else { events };
        if spilled > 0 {
            self.spills.add(spilled);
            if self.last_topic.is_none() {
                self.last_topic = topic_of(&fresh.item);
            }
        }
        if let Item::Gap(gap) = fresh.item {
            self.lost(gap);
        }
        if live && self.ledger.is_drained() {
            self.nothing_was_due(now);
        }
        self.ledger.take(fresh, since, live);
        self.reserve();
        self.after(now);
    }

    fn nothing_was_due(&mut self, now: Time) {
        if let Phase::Live(live) = &mut self.phase {
            live.confirmed = live.confirmed.max(now);
            live.progress = live.progress.max(now);
        }
    }

    /// The link is up.
    ///
    /// # Errors
    /// The peer claims to have events that were never sent: the spill was restored from a copy, or its emitter's name is
    /// used twice. Going on would make the peer drop new events as duplicates. The link must be dropped.
    pub fn on_link_up(&mut self, now: Time, welcome: Welcome) -> Result<(), Error> {
        if welcome.have > self.ledger.taken() {
            let text = format!(
                "the hub has events up to seq {} of this emitter, which never sent more than {}: is its emitter_id used twice, or its spill restored from a copy? give it another emitter_id",
                welcome.have,
                self.ledger.taken()
            );
            return Err(Error::new(ErrorKind::Protocol, text));
        }
        let failures = self.backoff.failures();
        self.links += 1;
        self.phase = Phase::Live(Live {
            welcome,
            proven: false,
            progress: now,
            confirmed: now,
            barrier: None,
            barred: self.ledger.acked(),
            unbarred_bytes: 0,
            idle_ping: false,
        });
        self.spills.calm();
        let first = !std::mem::replace(&mut self.ready, true);
        let details = json!({"first": first, "attempts": failures + 1, "reconnects": self.links - 1});
        self.report(Report::good("broadcaster_ready", details));
        self.acknowledge(now, welcome.have);
        if self.ledger.spilled_upto() > self.ledger.acked() {
            let target = self.ledger.taken();
            self.flush = Some(Flush { target, since: now, flushed: 0, failed: 0 });
        }
        self.tokens = (1.0, now);
        self.settle_flush(now);
        self.after(now);
        Ok(())
    }

    /// An attempt failed.
    pub fn on_connect_failed(&mut self, now: Time, error: &Error) {
        let pause = self.backoff.next(&mut self.rng);
        let text = error.report();
        let details = json!({
            "error": text, "attempt": self.backoff.failures(), "retry_in": (pause.as_secs_f64() * 1000.0).round() / 1000.0
        });
        self.report(Report::bad("broadcaster_connection_failed", "ws_not_ready", 1, details));
        self.last_error = Some(text.into());
        if !matches!(self.phase, Phase::Stopped) {
            self.phase = Phase::Waiting { until: now + pause };
        }
        if self.flush_wanted {
            self.end_flush(1);
        }
        self.after(now);
    }

    /// The link broke.
    pub fn on_link_down(&mut self, now: Time, error: &Error) {
        let Phase::Live(live) = &self.phase else { return };
        if !live.proven {
            // Connecting succeeded but nothing was ever confirmed: to the breaker that is a failure, and the pause grows.
            self.breaker.lost(now);
        }
        self.last_error = Some(error.report().into());
        let failed = self.ledger.events_between(self.ledger.acked(), self.ledger.sent());
        let before = self.ledger.demoted;
        self.ledger.link_lost();
        self.spills.add(self.ledger.demoted - before);
        let pause = self.backoff.next(&mut self.rng);
        if !matches!(self.phase, Phase::Stopped) {
            self.phase = Phase::Waiting { until: now + pause };
        }
        if let Some(flush) = &mut self.flush {
            flush.failed = failed;
        }
        if self.flush_wanted {
            self.end_flush(failed.max(1));
        }
        self.after(now);
    }

    /// The peer has everything up to `upto`.
    ///
    /// # Errors
    /// It was not sent that much: the link must be dropped.
    pub fn on_ack(&mut self, now: Time, upto: u64) -> Result<(), Error> {
        if upto > self.ledger.sent() {
            let text = format!("the peer acknowledged seq {upto}, but only {} were sent", self.ledger.sent());
            return Err(Error::new(ErrorKind::Protocol, text));
        }
        self.acknowledge(now, upto);
        self.after(now);
        Ok(())
    }

    /// The echo of a Ping.
    pub fn on_pong(&mut self, now: Time, number: u64) {
        let Phase::Live(live) = &mut self.phase else { return };
        live.progress = now;
        if std::mem::take(&mut live.idle_ping) {
            // A quiet link that answers has proven itself, too: losing it later is no reason to open the breaker.
            live.proven = true;
            self.backoff.reset();
            self.breaker.confirmed();
        }
        // A peer may answer only the newest of several Pings (RFC 6455 §5.5.3), so the number is cumulative.
        if live.barrier.is_some_and(|barrier| number >= barrier) {
            live.barrier = None;
        }
        if live.welcome.confirm == Confirm::Pings {
            let upto = number.min(live.barred);
            self.acknowledge(now, upto);
        }
        if self.ledger.sent() == self.ledger.acked() {
            self.prove(); // nothing to confirm, and the peer lives
        }
        self.after(now);
    }

    /// Replaces the hub's grant.
    pub fn on_credit(&mut self, credit: u64) {
        if let Phase::Live(live) = &mut self.phase {
            live.welcome.credit = credit;
        }
    }

    /// Bytes moved in either direction.
    pub fn on_progress(&mut self, now: Time) {
        if let Phase::Live(live) = &mut self.phase {
            live.progress = now;
        }
    }

    /// The spill's thread has done something.
    pub fn on_spill(&mut self, now: Time, done: Done) {
        match done {
            Done::Appended { upto, dropped, bytes } => {
                self.appending = false;
                self.spill_bytes = bytes;
                self.spill_written();
                let free = self.ledger.note_stored(upto, &dropped, now);
                self.recycle(free);
                for gap in dropped {
                    self.lost(gap);
                }
            }
            Done::AppendFailed(error) => {
                self.appending = false;
                self.spill_refused(now, &error);
                if matches!(self.phase, Phase::Stopped) {
                    self.spill_failed = Some(error);
                }
            }
            Done::Read(Ok(items)) => {
                self.reading = false;
                self.ledger.note_read(items);
            }
            Done::Read(Err(error)) => {
                self.reading = false;
                self.pause_spill(now, &error);
            }
            Done::Trimmed { result, bytes } => {
                let upto = self.trimming.take();
                self.spill_bytes = bytes;
                match result {
                    Ok(()) => self.trimmed = upto.unwrap_or(self.trimmed),
                    Err(error) => self.pause_spill(now, &error),
                }
            }
            Done::Reserved { upto, result } => {
                self.reserving = false;
                match result {
                    Ok(()) => {
                        self.reserved = self.reserved.max(upto);
                        self.reserve_step = (self.reserve_step * 2).min(RESERVE_MAX);
                        self.spill_written();
                    }
                    Err(error) => self.spill_refused(now, &error),
                }
                self.reserve();
            }
            Done::Opened(_) => {} // it made this machine
            Done::Closed(result) => {
                if let Err(error) = result {
                    self.spill_failed.get_or_insert(error);
                }
                self.closed = true;
            }
        }
        self.after(now);
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

    // ── What to do ──────────────────────────────────────────────────────────────────────────────────────────────────

    /// The next thing that the driver has to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// Whether [`poll_action`](Self::poll_action) has anything.
    #[must_use]
    pub fn has_actions(&self) -> bool {
        !self.actions.is_empty()
    }

    /// The next thing for the link, if it may send now. Ask until `None`, then flush.
    pub fn poll_outgoing(&mut self, now: Time) -> Option<Outgoing> {
        let Phase::Live(live) = &self.phase else { return None };
        let confirm = live.welcome.confirm;
        if live.idle_ping && live.barrier.is_none() {
            return Some(self.ping(self.ledger.sent()));
        }
        let due = confirm == Confirm::Pings && live.barrier.is_none() && self.ledger.sent() > live.barred;
        if due && live.unbarred_bytes >= BARRIER_BYTES {
            return Some(self.ping(self.ledger.sent()));
        }
        if let Some(item) = self.next_item(now) {
            if self.ledger.sent() == self.ledger.acked() {
                self.nothing_was_due(now);
            }
            self.ledger.note_sent(&item);
            if let Phase::Live(live) = &mut self.phase {
                live.unbarred_bytes += item.bytes();
            }
            return Some(Outgoing::Item(item));
        }
        due.then(|| self.ping(self.ledger.sent()))
    }

    fn ping(&mut self, number: u64) -> Outgoing {
        if let Phase::Live(live) = &mut self.phase {
            live.barrier = Some(number);
            live.barred = number;
            live.unbarred_bytes = 0;
        }
        Outgoing::Ping(number)
    }

    fn next_item(&mut self, now: Time) -> Option<Item> {
        let Phase::Live(live) = &self.phase else { return None };
        let (sent, acked) = (self.ledger.sent(), self.ledger.acked());
        let window_full = self.ledger.in_flight_bytes() >= self.config.outbox_bytes;
        if window_full || sent - acked >= live.welcome.credit {
            return None;
        }
        let item = self.ledger.next_item();
        self.plan_read();
        let Ok(Some(item)) = item else { return None };
        if item.last() > self.reserved {
            return None; // not promised on disk yet: a crash could use the seq again
        }
        self.pace(item, now)
    }

    /// Holds spilled events to `flush_rate`.
    fn pace(&mut self, item: Item, now: Time) -> Option<Item> {
        let (Some(rate), true) = (self.config.flush_rate, item.first() <= self.ledger.spilled_upto()) else {
            return Some(item);
        };
        let Item::Events(block) = &item else { return Some(item) };
        let (tokens, at) = self.tokens;
        // A tenth of a second may be saved up, so that coarse timers do not lower the rate.
        let tokens = (tokens + (now.saturating_sub(at)).as_secs_f64() * rate).min((rate / 10.0).max(1.0));
        self.tokens = (tokens, now);
        let part = block.head(tokens as u64)?;
        self.tokens.0 -= part.count() as f64;
        Some(Item::Events(part))
    }

    /// How long `flush_rate` forbids the next event; `None` if something else holds it up, which will tell.
    fn flush_pause(&self, now: Time) -> Option<Duration> {
        let rate = self.config.flush_rate?;
        let (tokens, at) = self.tokens;
        let missing = 1.0 - tokens - now.saturating_sub(at).as_secs_f64() * rate;
        let paced = missing > 0.0 && self.ledger.sent() < self.ledger.spilled_upto();
        paced.then(|| Duration::from_secs_f64((missing / rate).max(0.001)))
    }

    // ── Decisions ───────────────────────────────────────────────────────────────────────────────────────────────────

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
        self.check_stop(now);
        self.plan_append(now);
        self.plan_trim();
        self.plan_close();
    }

    fn connect_if_due(&mut self, now: Time) {
        let Phase::Waiting { until } = self.phase else { return };
        if now < until || self.stopping.is_some_and(|deadline| now >= deadline) {
            return;
        }
        if let Some(until) = self.breaker.forbids(now) {
            self.phase = Phase::Waiting { until };
        } else {
            self.phase = Phase::Connecting;
            self.actions.push_back(Action::Connect);
        }
    }

    fn check_silence(&mut self, now: Time, idle: bool) {
        if idle {
            if let Phase::Live(live) = &mut self.phase {
                live.idle_ping = true;
                live.progress = now;
                live.confirmed = now;
            }
            return;
        }
        let text = format!("nothing was confirmed and no byte moved for {:?}", self.config.ack_timeout);
        self.actions.push_back(Action::Disconnect);
        self.on_link_down(now, &Error::new(ErrorKind::ConnectTimeout, text));
    }

    fn acknowledge(&mut self, now: Time, upto: u64) {
        let before = self.ledger.acked();
        let (free, flushed) = self.ledger.ack(upto);
        if self.ledger.acked() == before {
            return;
        }
        if let Phase::Live(live) = &mut self.phase {
            live.progress = now;
            live.confirmed = now;
        }
        self.prove();
        self.recycle(free);
        if let Some(flush) = &mut self.flush {
            flush.flushed += flushed;
        }
        self.settle_flush(now);
    }

    /// The peer has shown that it works, not merely that it accepts connections.
    fn prove(&mut self) {
        if let Phase::Live(live) = &mut self.phase {
            live.proven = true;
        }
        self.backoff.reset();
        self.breaker.confirmed();
    }

    /// Ends the flush under way if everything that was spilled when it began is confirmed.
    fn settle_flush(&mut self, now: Time) {
        if let Some(flush) = &self.flush
            && (self.ledger.acked() >= flush.target || self.ledger.acked() >= self.ledger.spilled_upto())
            && self.is_live()
        {
            let took = now.saturating_sub(flush.since);
            self.flush_latency = Some(took);
            let report = self.slo.flush_took(took, true);
            self.actions.extend(report.map(Action::Report));
            self.end_flush(0);
        } else if self.flush.is_none() && self.flush_wanted && self.is_live() {
            if self.ledger.spilled_upto() > self.ledger.acked() {
                let target = self.ledger.taken();
                self.flush = Some(Flush { target, since: now, flushed: 0, failed: 0 });
            } else {
                self.end_flush(0);
            }
        }
    }

    fn end_flush(&mut self, failed: u64) {
        let left = self.ledger.events_between(self.ledger.acked(), self.ledger.spilled_upto());
        let (flushed, tried) = self.flush.take().map_or((0, 0), |flush| (flush.flushed, flush.failed));
        let failed = failed.max(tried).min(left);
        let outcome = FlushOutcome { flushed, failed, remaining: left };
        if flushed > 0 || failed > 0 {
            let latency = self.flush_latency.map(|took| took.as_secs_f64());
            let details = json!({"flushed": flushed, "failed": failed, "remaining": left, "seconds": latency});
            self.report(Report::good("broadcaster_flush_complete", details));
        }
        if std::mem::take(&mut self.flush_wanted) {
            self.actions.push_back(Action::Flushed(outcome));
        }
    }

    /// Every failure on the disk pauses all work there: a disk that fails at once would otherwise be asked again at once.
    fn pause_spill(&mut self, now: Time, error: &Error) {
        self.last_error = Some(error.report().into());
        self.spill_pause = Some(now + SPILL_RETRY);
    }

    fn spill_refused(&mut self, now: Time, error: &Error) {
        self.pause_spill(now, error);
        if !std::mem::replace(&mut self.degraded, true) {
            let details = json!({"degraded": true, "error": error.report()});
            self.report(Report::bad("broadcaster_degraded", "spill_failed", 1, details));
        }
    }

    fn spill_written(&mut self) {
        if std::mem::take(&mut self.degraded) {
            self.report(Report::good("broadcaster_degraded", json!({"degraded": false})));
        }
    }

    fn may_append(&self) -> bool {
        !self.appending && !self.closing && self.spill_pause.is_none()
    }

    fn plan_append(&mut self, now: Time) {
        if !self.may_append() {
            return;
        }
        let items = match &self.phase {
            Phase::Live(live) => {
                let (held, bound) = (self.ledger.held(), self.config.outbox_bytes);
                // While older events are still being flushed, newer ones cannot go out and need not fill memory; and a
                // link that confirms nothing must not make callers wait.
                let behind = self.ledger.is_behind() && held >= bound / 2;
                let stalled = held >= bound && now >= live.confirmed + STALL;
                if !behind && !stalled {
                    return;
                }
                self.ledger.oldest_held(APPEND_BYTES)
            }
            _ => self.ledger.oldest_held(APPEND_BYTES),
        };
        if !items.is_empty() {
            self.appending = true;
            let (in_flight, acked) = (self.ledger.sent(), self.ledger.acked());
            self.actions.push_back(Action::Spill(Op::Append { items, in_flight, acked }));
        }
    }

    fn plan_read(&mut self) {
        let may = !self.reading && !self.closing && self.spill_pause.is_none();
        let unread = self.ledger.is_behind() && self.ledger.read_upto() < self.ledger.spill_last();
        if may && unread && self.ledger.ahead_bytes() < READ_BYTES / 2 {
            self.reading = true;
            let after = self.ledger.read_upto();
            self.actions.push_back(Action::Spill(Op::Read { after, max_bytes: READ_BYTES }));
        }
    }

    fn plan_trim(&mut self) {
        let upto = self.ledger.acked(); // also noted as the base, which must not go back
        if self.trimming.is_none()
            && !self.closing
            && self.spill_pause.is_none()
            && upto.min(self.ledger.spill_last()) > self.trimmed
        {
            self.trimming = Some(upto);
            self.actions.push_back(Action::Spill(Op::Trim { upto }));
        }
    }

    /// Keeps a promise on disk ahead of the seqs in use.
    fn reserve(&mut self) {
        let used = self.ledger.taken();
        let free = !self.reserving && !self.closing && self.spill_pause.is_none();
        // The step has doubled since the last promise, of which half is used up then.
        if free && used + self.reserve_step / 4 > self.reserved {
            self.reserving = true;
            let upto = used + self.reserve_step;
            self.actions.push_back(Action::Spill(Op::Reserve { upto, acked: self.ledger.acked() }));
        }
    }

    fn check_stop(&mut self, now: Time) {
        let Some(deadline) = self.stopping else { return };
        let hopeless = matches!(self.phase, Phase::Idle);
        if matches!(self.phase, Phase::Stopped) || !(self.ledger.is_drained() || now >= deadline || hopeless) {
            return;
        }
        if self.is_live() {
            self.ledger.link_lost();
        }
        self.phase = Phase::Stopped;
        self.actions.push_back(Action::Disconnect);
        if self.flush_wanted {
            self.end_flush(1);
        }
    }

    fn plan_close(&mut self) {
        let quiet = !self.appending && !self.reading && self.trimming.is_none() && !self.reserving;
        let stored = self.ledger.oldest_held(1).is_empty() || self.spill_failed.is_some();
        if matches!(self.phase, Phase::Stopped) && quiet && stored && !self.closing {
            self.closing = true;
            let (next_seq, acked) = (self.ledger.taken() + 1, self.ledger.acked());
            self.actions.push_back(Action::Spill(Op::Close { next_seq, acked }));
        }
    }

    // ── Reports ─────────────────────────────────────────────────────────────────────────────────────────────────────

    fn report(&mut self, report: Report) {
        self.actions.push_back(Action::Report(report));
    }

    fn report_spills(&mut self, count: u64) {
        let reason = if self.breaker.name() == "open" {
            "breaker_open"
        } else if self.ledger.oldest().is_some() && self.links > 0 && self.backoff.failures() <= 1 {
            "send_failed"
        } else {
            "ws_not_ready"
        };
        let details = json!({
            "spilled": count,
            "error": self.last_error.as_deref().unwrap_or(reason),
            "topic": self.last_topic.take().unwrap_or_else(|| "unknown".to_owned()),
        });
        self.report(Report::bad("broadcaster_spill", reason, count, details));
    }

    fn lost(&mut self, gap: Gap) {
        self.losses.add(gap.count());
        self.loss = Some(match self.loss {
            Some(known) => Gap { from: known.from.min(gap.from), to: known.to.max(gap.to), reason: gap.reason },
            None => gap,
        });
    }

    fn recycle(&mut self, items: Vec<Item>) {
        if !items.is_empty() {
            self.actions.push_back(Action::Recycle(items));
        }
    }
}

fn topic_of(item: &Item) -> Option<String> {
    let Item::Events(block) = item else { return None };
    let (_, json) = block.events().next()?;
    let head = crate::wire::event::EventHead::parse(&json).ok()?;
    Some(head.topic.into_owned()).filter(|topic| !topic.is_empty())
}

#[cfg(test)]
mod tests;
