//! The driver: one task per emitter that carries out what the [machine](super::machine) decides. It owns the machine,
//! the link and the way to the spill's thread; everything else reaches it as a [`Command`].

use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::mpsc as blocking;
use std::task::Poll;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use tokio::sync::mpsc;

use crate::clock::since_boot;
use crate::emitter::config::Durability;
use crate::emitter::item::{Identity, Item};
use crate::emitter::link::{self, Link, LinkEvent, PeerEvent};
use crate::emitter::machine::{Action, FlushOutcome, Machine, Snapshot, Time, Welcome};
use crate::emitter::outbox::{Beyond, Pushed};
use crate::emitter::report::Report;
use crate::emitter::ring::sync::Syncer;
use crate::emitter::spill::parked::Wanted;
use crate::emitter::spill::{self, Done, Op};
use crate::emitter::{Health, Reply, RingDisk, Shared};
use crate::error::{Error, ErrorKind, Result};

/// While the link is down nothing is urgent: events gather so long that blocks fill and rows are few.
const LINGER_DOWN: Duration = Duration::from_millis(5);
/// After a burst more is likely to come: the driver looks again after this instead of having itself woken. tokio's
/// timers are a millisecond coarse.
const LINGER_BURST: Duration = Duration::from_millis(1);
/// While the machine is suspended, tokio's timers stand still, and our clock does not: it looks so often, to see at once
/// that hours have passed.
const NAP: Duration = Duration::from_secs(2);
/// So many events at once are a burst.
const BURST: u64 = 32;

/// What a handle asks of the driver.
pub(super) enum Command {
    /// Connect, and answer when the link is up or the spill cannot be opened.
    Start(Reply<()>),
    /// Answer when the link is up.
    AwaitLive(Reply<()>),
    /// Answer when the link was ever up.
    AwaitReady(Reply<()>),
    /// Answer when the event is confirmed; `provisional`: its seq was given before the spill was read.
    AwaitAck { seq: u64, provisional: bool, reply: Reply<()> },
    /// Answer with the final seq of an event that came before the spill was open, once it is in the ring.
    AwaitKept { seq: u64, reply: Reply<u64> },
    /// Flush now.
    Flush(Reply<FlushOutcome>),
    /// Answer when everything accepted so far is confirmed.
    Drain(Reply<()>),
    /// Show stored events.
    Peek { after: u64, max_bytes: usize, reply: blocking::SyncSender<Result<Vec<Item>>> },
    /// Word from a [`Peer`](link::Peer).
    Peer(PeerEvent),
    /// Send until the deadline, store the rest, close, answer.
    Stop { drain: Duration, reply: Reply<()> },
}

impl Command {
    /// Answers when no driver will: nobody may wait for ever.
    pub(super) fn refuse(self, error: impl Fn() -> Error) {
        match self {
            Self::Start(reply)
            | Self::AwaitLive(reply)
            | Self::AwaitReady(reply)
            | Self::AwaitAck { reply, .. }
            | Self::Drain(reply) => reply(Err(error())),
            Self::Flush(reply) => reply(Err(error())),
            Self::AwaitKept { reply, .. } => reply(Err(error())),
            Self::Peek { reply, .. } => drop(reply.send(Err(error()))), // the reader may have gone
            Self::Stop { reply, .. } => reply(Ok(())),                  // it is stopped, which is what was wanted
            Self::Peer(_) => {}
        }
    }
}

#[derive(Default)]
struct Waiters {
    live: Vec<Reply<()>>,
    ready: Vec<Reply<()>>,
    flushed: Vec<Reply<FlushOutcome>>,
    stopped: Vec<Reply<()>>,
    /// By the seq of the event that has to be confirmed.
    delivered: BTreeMap<u64, Vec<Reply<()>>>,
    /// By the seq up to which everything has to be confirmed or given up.
    drained: BTreeMap<u64, Vec<Reply<()>>>,
}

struct Driver {
    shared: Arc<Shared>,
    machine: Machine,
    identity: Identity,
    link: Option<Link>,
    connecting: Option<Connecting>,
    peer: Option<mpsc::UnboundedSender<PeerEvent>>,
    ops: blocking::Sender<Op>,
    waiters: Waiters,
    base: u64,
    /// Highest seq among the events that came before the spill was open and are where their durability wants them.
    kept: u64,
    /// Noted in the ring as confirmed up to here.
    noted: u64,
    /// Events given up by the spill of which those who wait have been told.
    dropped: u64,
}

type Connecting = std::pin::Pin<Box<dyn Future<Output = Result<(Link, Welcome)>> + Send>>;

/// Runs until the emitter is stopped.
pub(super) async fn run(shared: Arc<Shared>, mut commands: mpsc::UnboundedReceiver<Command>) {
    let mut pending = Vec::new();
    let (sender, mut done) = mpsc::unbounded_channel();
    // The spill first: without it no seq is final. A failure is told to whoever asked to start; the next may try again.
    let opened = loop {
        match open(&shared, sender.clone(), &mut done).await {
            Ok(opened) => break opened,
            Err(error) => {
                if refuse(&shared, &error, &mut pending, &mut commands).await {
                    for command in pending {
                        command.refuse(stopped);
                    }
                    return turn_away(commands);
                }
            }
        }
    };
    let Opened { machine, ops, identity, base, kept } = opened;
    let driver = Driver {
        shared,
        machine,
        identity,
        link: None,
        connecting: None,
        peer: None,
        ops,
        waiters: Waiters::default(),
        base,
        kept,
        noted: 0,
        dropped: 0,
    };
    driver.run(pending, commands, done).await;
}

struct Opened {
    machine: Machine,
    ops: blocking::Sender<Op>,
    identity: Identity,
    base: u64,
    kept: u64,
}

async fn open(
    shared: &Arc<Shared>,
    sender: mpsc::UnboundedSender<Done>,
    done: &mut mpsc::UnboundedReceiver<Done>,
) -> Result<Opened> {
    let seed = getrandom::u64().unwrap_or_else(|_| shared.now().as_nanos() as u64);
    let tell = move |what| {
        // The driver outlives its interest in the last answers.
        drop(sender.send(what));
    };
    let ops = spill::spawn(&shared.config, seed, tell)?;
    let recovered = match done.recv().await {
        Some(Done::Opened(opened)) => opened?,
        _ => return Err(Error::new(ErrorKind::SpillIo, "the spill's thread ended at once")),
    };
    let base = recovered.next_seq - 1;
    let kept = shared.outbox.attach(base, recovered.ring.clone());
    let machine = Machine::new(shared.config.clone(), &recovered, seed);
    let identity = Identity { emitter: recovered.emitter, epoch: recovered.epoch };
    *shared.identity.lock() = Some(identity.clone());
    if let Some(ring) = recovered.ring {
        let disk = RingDisk { ring: Mutex::new(ring), outbox: Arc::clone(&shared.outbox) };
        shared.syncer.get_or_init(|| Arc::new(Syncer::new(Box::new(disk))));
    }
    Ok(Opened { machine, ops, identity, base, kept })
}

/// Tells everyone who waits why the spill cannot be opened, then sleeps until somebody asks to start again; `true` if
/// nobody ever will.
async fn refuse(
    shared: &Shared,
    error: &Error,
    pending: &mut Vec<Command>,
    commands: &mut mpsc::UnboundedReceiver<Command>,
) -> bool {
    let again = || Error::new(error.kind(), error.report());
    shared.published.lock().last_error = Some(error.report().into());
    let mut waiting: VecDeque<Command> = std::mem::take(pending).into();
    while let Ok(command) = commands.try_recv() {
        waiting.push_back(command);
    }
    let mut told = false;
    loop {
        told |= waiting.is_empty();
        let next = if told { commands.recv().await } else { waiting.pop_front() };
        match next {
            None => return true,
            Some(Command::Stop { reply, .. }) => {
                let lost = shared.outbox.counts().last_seq > 0;
                reply(if lost { Err(again()) } else { Ok(()) });
                pending.extend(waiting);
                return true;
            }
            Some(Command::Start(reply)) if told => {
                pending.push(Command::Start(reply));
                return false;
            }
            Some(Command::Start(reply)) => reply(Err(again())),
            Some(Command::Flush(reply)) => reply(Err(again())),
            Some(Command::AwaitKept { reply, .. }) => reply(Err(again())),
            Some(Command::Peek { reply, .. }) => drop(reply.send(Err(again()))),
            Some(command) => pending.push(command), // waits for a link or a delivery, which may still come
        }
    }
}

impl Driver {
    async fn run(
        mut self,
        pending: Vec<Command>,
        mut commands: mpsc::UnboundedReceiver<Command>,
        mut done: mpsc::UnboundedReceiver<Done>,
    ) {
        for command in pending {
            self.command(command);
        }
        let (mut hold, mut orphaned): (Option<Time>, bool) = (None, false);
        loop {
            let now = self.shared.now();
            // While it lingers only the link is served: small fetches in between would wake peer and caller for nothing.
            if hold.is_none_or(|until| now >= until) {
                let fetched = self.fetch();
                hold = match (self.machine.is_live(), fetched) {
                    (_, 0) => None,
                    (false, _) => Some(now + LINGER_DOWN),
                    (true, BURST..) => Some(now + LINGER_BURST),
                    (true, _) => None,
                };
            }
            // A busy link must not keep the timers from their turn.
            if self.machine.deadline(now).is_some_and(|at| at <= now) {
                self.time();
            }
            self.act();
            self.publish();
            if self.machine.is_closed() {
                break;
            }
            // Either a timer brings us back, or we sleep until the bell; if neither, there is more to fetch already.
            let asleep = hold.is_some() || self.shared.outbox.arm();
            let now = self.shared.now();
            let timer = hold.into_iter().chain(self.machine.deadline(now)).min().map(|at| at.saturating_sub(now));
            let Self { shared, machine, link, connecting, .. } = &mut self;
            let moved = poll_fn(|cx| {
                let Some(link) = link else { return Poll::Pending };
                let now = shared.now(); // not when it fell asleep
                match link.poll(cx, &mut || machine.poll_outgoing(now)) {
                    Poll::Ready(event) => Poll::Ready(Some(event)),
                    // Asking for something to send may have shown that something has to be done first.
                    Poll::Pending if machine.has_actions() => Poll::Ready(None),
                    Poll::Pending => Poll::Pending,
                }
            });
            let woken = tokio::select! {
                biased;
                command = commands.recv(), if !orphaned => Woken::Command(command),
                done = done.recv() => Woken::Spill(done),
                event = moved => Woken::Link(event),
                opened = async { connecting.as_mut().expect("guarded").await }, if connecting.is_some() => Woken::Opened(opened),
                () = shared.outbox.bell.notified(), if hold.is_none() => Woken::More,
                () = tokio::time::sleep(timer.unwrap_or_default().min(NAP)), if timer.is_some() => Woken::More,
                () = std::future::ready(()), if !asleep => Woken::More,
            };
            match woken {
                Woken::Command(Some(command)) => self.command(command),
                // Every handle is gone: nobody can stop us any more, so we do it ourselves.
                Woken::Command(None) => {
                    orphaned = true;
                    self.fetch(); // what the last handle left must be stored before the spill is closed
                    self.machine.stop(self.shared.now(), self.shared.now());
                }
                Woken::Spill(done) => self.spill(done),
                Woken::Link(Some(event)) => self.link(event),
                Woken::Opened(opened) => self.opened(opened),
                Woken::Link(None) | Woken::More => {}
            }
            if !asleep {
                // Other emitters share this thread.
                tokio::task::yield_now().await;
            }
        }
        self.end();
        turn_away(commands);
    }

    fn fetch(&mut self) -> u64 {
        let fresh = self.shared.outbox.take();
        if fresh.is_empty() {
            return 0;
        }
        let now = self.shared.now();
        let mut events = 0;
        for fresh in fresh {
            events += fresh.item.events();
            let since = fresh.since.saturating_sub(self.shared.origin);
            self.machine.on_accepted(now, fresh, since);
        }
        events
    }

    /// Carries out everything that the machine wants done.
    fn act(&mut self) {
        while let Some(action) = self.machine.poll_action() {
            match action {
                Action::Connect => self.connect(),
                Action::Disconnect => self.disconnect(),
                Action::Spill(op) => {
                    if self.ops.send(op).is_err() {
                        let error = Error::new(ErrorKind::SpillIo, "the spill's thread is gone");
                        self.machine.on_spill(self.shared.now(), Done::Closed(Err(error)));
                    }
                }
                Action::Report(report) => self.report(report),
                Action::Flushed(outcome) => {
                    for reply in self.waiters.flushed.drain(..) {
                        reply(Ok(outcome));
                    }
                }
                Action::Release(items) => {
                    self.note_acked();
                    drop(items);
                }
                Action::Refused { seq, reason } => {
                    for reply in self.waiters.delivered.remove(&seq).into_iter().flatten() {
                        reply(Err(refused(seq, &reason)));
                    }
                }
                Action::Requeue(wanted) => {
                    for Wanted { id, json } in wanted {
                        // Accepted as any other event; if it is not, the spill offers it again.
                        let seq = match self.shared.outbox.push(&json, Some(true)) {
                            Ok(Pushed::Accepted { seq, .. }) => Some(seq),
                            _ => None,
                        };
                        self.machine.on_requeued(id, seq);
                    }
                }
            }
        }
    }

    /// For the next process, should it find the ring: before events are dropped, only this tells that they were
    /// confirmed; and what the receiver has of a block is not to be sent to another one.
    fn note_acked(&mut self) {
        let acked = self.machine.acked();
        if std::mem::replace(&mut self.noted, acked) != acked {
            self.shared.outbox.note_acked(acked);
        }
    }

    fn connect(&mut self) {
        let (sender, events) = mpsc::unbounded_channel();
        self.peer = Some(sender);
        let (shared, identity, next) = (Arc::clone(&self.shared), self.identity.clone(), self.machine.next_to_send());
        self.connecting = Some(Box::pin(async move {
            link::connect(shared.target.clone(), &shared.config, identity, next, events).await
        }));
    }

    fn disconnect(&mut self) {
        if let Some(link) = self.link.take() {
            tokio::spawn(link.close());
        }
        self.connecting = None;
        self.peer = None;
    }

    fn opened(&mut self, opened: Result<(Link, Welcome)>) {
        self.connecting = None;
        self.fetch(); // what was accepted without a link belongs to the flush
        let now = self.shared.now();
        match opened {
            Ok((link, welcome)) => match self.machine.on_link_up(now, welcome) {
                Ok(()) => self.link = Some(link),
                Err(error) => self.machine.on_connect_failed(now, &error),
            },
            Err(error) => self.machine.on_connect_failed(now, &error),
        }
    }

    fn link(&mut self, event: LinkEvent) {
        let now = self.shared.now();
        let outcome = match event {
            LinkEvent::Ack(upto) => self.machine.on_ack(now, upto),
            LinkEvent::Nack { seq, reason } => self.machine.on_nack(now, seq, &reason),
            LinkEvent::Credit(credit) => {
                self.machine.on_credit(credit);
                Ok(())
            }
            LinkEvent::Pong(number) => {
                self.machine.on_pong(now, number);
                Ok(())
            }
            LinkEvent::Progress => {
                self.machine.on_progress(now);
                Ok(())
            }
            LinkEvent::Down(error) => Err(error),
        };
        if let Err(error) = outcome {
            self.disconnect();
            self.machine.on_link_down(now, &error);
        }
    }

    fn spill(&mut self, done: Option<Done>) {
        let Some(done) = done else { return };
        if let Done::NewRing(ring) = &done {
            let last = self.shared.outbox.move_to(ring.clone());
            if let Some(syncer) = self.shared.syncer.get() {
                syncer.give_up(last, "the outbox's file was removed");
            }
            self.shared.outbox.note_acked(self.machine.acked());
            self.fetch(); // what is in the old one is known to the machine, which moves it into the spill
        }
        self.machine.on_spill(self.shared.now(), done);
    }

    fn time(&mut self) {
        let counts = self.shared.outbox.counts();
        let depth = (counts.spilled as i64 + self.machine.snapshot().balance).max(0) as u64;
        self.machine.on_time(self.shared.now(), counts.live, counts.live + counts.spilled, depth);
    }

    fn command(&mut self, command: Command) {
        let now = self.shared.now();
        match command {
            Command::Start(reply) => {
                self.waiters.live.push(reply);
                self.machine.start(now);
            }
            Command::AwaitLive(reply) => self.waiters.live.push(reply),
            Command::AwaitReady(reply) => self.waiters.ready.push(reply),
            Command::AwaitAck { seq, provisional, reply } => {
                let seq = if provisional { seq + self.base } else { seq };
                if let Some(reason) = self.machine.refusal_of(seq) {
                    reply(Err(refused(seq, &reason)));
                } else if self.machine.is_gap(seq) {
                    reply(Err(given_up()));
                } else {
                    self.machine.want(seq);
                    self.waiters.delivered.entry(seq).or_default().push(reply);
                }
            }
            Command::AwaitKept { seq, reply } => {
                let seq = seq + self.base;
                reply(if seq <= self.kept { Ok(seq) } else { Err(not_kept()) });
            }
            Command::Flush(reply) => {
                self.fetch();
                self.waiters.flushed.push(reply);
                self.machine.flush_now(now);
            }
            Command::Drain(reply) => {
                self.fetch();
                let last = self.machine.taken();
                self.machine.want(last);
                self.waiters.drained.entry(last).or_default().push(reply);
            }
            Command::Peek { after, max_bytes, reply } => {
                self.fetch();
                let after = after.max(self.machine.acked()); // what is confirmed may still be on disk
                if after < self.machine.stored_upto() {
                    // If the thread is gone, so is `reply`, and the reader is told by that.
                    drop(self.ops.send(Op::Peek { after, max_bytes, reply }));
                } else {
                    // On its way to the disk, or not worth the way. The reader may have gone.
                    drop(reply.send(Ok(self.machine.spilled_in_memory(after, max_bytes))));
                }
            }
            Command::Peer(event) => {
                if let Some(peer) = &self.peer {
                    // Word of a link that is gone already.
                    drop(peer.send(event));
                }
            }
            Command::Stop { drain, reply } => {
                self.fetch();
                self.waiters.stopped.push(reply);
                self.machine.stop(now, now + drain);
            }
        }
    }

    /// Makes the machine's state visible to callers, and answers those whose time has come.
    fn publish(&mut self) {
        self.note_acked();
        let snapshot = self.machine.snapshot();
        let Snapshot { live, held, settled, spill_bytes, .. } = snapshot;
        let (ready, acked, dropped) = (snapshot.ready, snapshot.acked_seq, snapshot.dropped);
        *self.shared.published.lock() = snapshot;
        self.shared.outbox.tell(Beyond { live, held, settled, spill_bytes });
        if live {
            self.waiters.live.drain(..).for_each(|reply| reply(Ok(())));
        }
        if ready {
            self.waiters.ready.drain(..).for_each(|reply| reply(Ok(())));
        }
        while let Some(entry) = self.waiters.drained.first_entry().filter(|entry| *entry.key() <= acked) {
            entry.remove().into_iter().for_each(|reply| reply(Ok(())));
        }
        if std::mem::replace(&mut self.dropped, dropped) != dropped {
            // At once: when the receiver confirms what follows, a gap is forgotten and would look like a delivery.
            let machine = &self.machine;
            self.waiters.delivered.retain(|seq, replies| {
                let lost = machine.is_gap(*seq);
                if lost {
                    replies.drain(..).for_each(|reply| reply(Err(given_up())));
                }
                !lost
            });
        }
        while let Some(entry) = self.waiters.delivered.first_entry().filter(|entry| *entry.key() <= acked) {
            entry.remove().into_iter().for_each(|reply| reply(Ok(())));
        }
    }

    fn report(&self, report: Report) {
        let reporter = self.shared.reporter.lock().clone();
        if let Some(reporter) = reporter {
            let counts = self.shared.outbox.counts();
            let snapshot = self.machine.snapshot();
            *self.shared.published.lock() = snapshot.clone(); // whoever hears of it may look at once
            let unix = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64());
            reporter(Health {
                report,
                unix,
                emits: counts.live,
                spills: counts.spilled + snapshot.demoted,
                flushes: snapshot.flushed,
                depth: (counts.spilled as i64 + snapshot.balance).max(0) as u64,
            });
        }
    }

    fn end(mut self) {
        self.disconnect();
        self.publish();
        let Waiters { live, ready, flushed, stopped: waiting, delivered, drained } = self.waiters;
        let unmet = live.into_iter().chain(ready);
        let unmet = unmet.chain(delivered.into_values().flatten()).chain(drained.into_values().flatten());
        unmet.for_each(|reply| reply(Err(stopped())));
        for reply in flushed {
            reply(Err(stopped()));
        }
        // What the spill refused is still in the ring, where there is one, and the next process finds it.
        let in_memory = self.shared.config.durability == Durability::Memory;
        let lost = in_memory || self.machine.is_bereft();
        let failure = self.machine.take_failure().filter(|_| lost);
        for reply in waiting {
            reply(failure.as_ref().map_or(Ok(()), |error| Err(Error::new(error.kind(), error.report()))));
        }
    }
}

/// Nobody serves these any more; later ones are refused by the handle, which finds the channel closed.
fn turn_away(mut commands: mpsc::UnboundedReceiver<Command>) {
    commands.close();
    while let Ok(command) = commands.try_recv() {
        command.refuse(stopped);
    }
}

pub(super) fn stopped() -> Error {
    Error::new(ErrorKind::Closed, "the broadcaster is stopped; make a new one")
}

enum Woken {
    Command(Option<Command>),
    Spill(Option<Done>),
    Link(Option<LinkEvent>),
    Opened(Result<(Link, Welcome)>),
    More,
}

fn not_kept() -> Error {
    let text = "the outbox was full of an earlier process's events: this one is accepted, but would not survive a killed process";
    Error::new(ErrorKind::SpillFull, text)
}

fn refused(seq: u64, reason: &str) -> Error {
    let text = format!("the peer refused the event (seq {seq}): {reason}; it is parked in the spill");
    Error::new(ErrorKind::EventRefused, text)
}

fn given_up() -> Error {
    Error::new(
        ErrorKind::SpillFull,
        "the event was dropped before its delivery: the spill was full, it was too old, or the disk lost it",
    )
}

impl Shared {
    /// Time since the emitter was made: the machine's clock.
    pub(super) fn now(&self) -> Time {
        since_boot().saturating_sub(self.origin)
    }
}
