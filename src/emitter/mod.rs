//! The sending half: events go into the [outbox], the [machine] decides what becomes of them, the [driver] does it over
//! the [link], and what cannot go out waits in the [spill].

pub mod config;
mod driver;
pub mod item;
pub mod ledger;
pub mod link;
pub mod machine;
pub mod outbox;
pub mod report;
pub mod ring;
pub mod spill;
pub mod window;

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc as blocking;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::mpsc;

use crate::clock::since_boot;
use crate::error::{Error, ErrorKind, Result};
use crate::runtime::{self, Room};
use config::{Durability, EmitterConfig};
use driver::Command;
use item::{Identity, Item};
use link::{PeerEvent, Target};
use machine::{FlushOutcome, Snapshot};
use outbox::{Counts, Outbox, Pushed};
use report::Report;
use ring::Ring;
use ring::sync::{Disk, Syncer};

/// An answer to a question asked of the driver; called once, from its thread, and must not block.
pub type Reply<T> = Box<dyn FnOnce(Result<T>) + Send>;

/// Takes reports for the health bus; called from the driver's thread, and must not block.
pub type Reporter = Arc<dyn Fn(Health) + Send + Sync>;

/// A report with the totals and the time of day at which it was made.
#[derive(Clone, Debug)]
pub struct Health {
    /// What happened.
    pub report: Report,
    /// Unix time in seconds.
    pub unix: f64,
    /// Events accepted live.
    pub emits: u64,
    /// Events spilled.
    pub spills: u64,
    /// Spilled events confirmed.
    pub flushes: u64,
    /// Spilled events not confirmed yet.
    pub depth: u64,
}

struct Shared {
    config: EmitterConfig,
    target: Target,
    outbox: Arc<Outbox>,
    /// Once the spill is open and there is a ring.
    syncer: OnceLock<Arc<Syncer>>,
    /// When it was made, since the machine's boot.
    origin: Duration,
    generation: u64,
    /// The machine as of the driver's last step.
    published: Mutex<Snapshot>,
    identity: Mutex<Option<Identity>>,
    reporter: Mutex<Option<Reporter>>,
}

/// A broadcaster's handle: cheap to clone, usable from any thread.
#[derive(Clone)]
pub struct Emitter {
    shared: Arc<Shared>,
    commands: mpsc::UnboundedSender<Command>,
    /// The other end, until the driver takes it at first use.
    unclaimed: Arc<Mutex<Option<mpsc::UnboundedReceiver<Command>>>>,
    driven: Arc<AtomicBool>,
}

/// See [`Emitter::downgrade`].
pub struct PeerVoice(mpsc::WeakUnboundedSender<Command>);

impl PeerVoice {
    /// Answers, if anybody still listens.
    pub fn say(&self, event: PeerEvent) {
        if let Some(commands) = self.0.upgrade() {
            drop(commands.send(Command::Peer(event)));
        }
    }
}

/// Numbers and names for `get_stats`.
#[derive(Clone, Debug)]
pub struct Stats {
    /// From the outbox, up to date.
    pub counts: Counts,
    /// From the machine, as of its last step.
    pub snapshot: Snapshot,
    /// Name towards the hub, once the spill is open.
    pub identity: Option<Identity>,
    /// Age of the oldest unconfirmed event, in seconds.
    pub oldest_unacked_age: f64,
    /// How long 99 of 100 of the newest syncs took at most; `None` before the first.
    pub fsync_p99: Option<Duration>,
}

impl Stats {
    /// Spilled events not confirmed yet.
    #[must_use]
    pub fn depth(&self) -> u64 {
        (self.counts.spilled as i64 + self.snapshot.balance).max(0) as u64
    }

    /// Events that were spilled, on arrival or after a lost link.
    #[must_use]
    pub fn spilled(&self) -> u64 {
        self.counts.spilled + self.snapshot.demoted
    }
}

impl Emitter {
    /// An emitter that is not started: nothing is opened yet.
    ///
    /// # Errors
    /// [`ErrorKind::Config`].
    pub fn new(config: EmitterConfig, target: Target) -> Result<Self> {
        config.validate()?;
        link::check_tls(&config)?;
        let (commands, receiver) = mpsc::unbounded_channel();
        let snapshot = Snapshot { breaker: "closed", success_rate: 1.0, ..Snapshot::default() };
        let shared = Arc::new(Shared {
            outbox: Arc::new(Outbox::new(&config)?),
            syncer: OnceLock::new(),
            config,
            target,
            origin: since_boot(),
            generation: runtime::generation(),
            published: Mutex::new(snapshot),
            identity: Mutex::default(),
            reporter: Mutex::default(),
        });
        let unclaimed = Arc::new(Mutex::new(Some(receiver)));
        Ok(Self { shared, commands, unclaimed, driven: Arc::default() })
    }

    /// The settings.
    #[must_use]
    pub fn config(&self) -> &EmitterConfig {
        &self.shared.config
    }

    /// Fails in a child that inherited this handle over `fork`.
    ///
    /// # Errors
    /// [`ErrorKind::Forked`].
    pub fn check_process(&self) -> Result<()> {
        runtime::check_generation(self.shared.generation, "broadcaster")
    }

    /// Where reports go from now on.
    pub fn report_to(&self, reporter: Reporter) {
        *self.shared.reporter.lock() = Some(reporter);
    }

    /// Accepts an event, given as JSON. `live` overrides what is known of the link. What `level` promises holds once
    /// [`await_level`](Self::await_level) has answered; [`Durability::Memory`] at once, [`Durability::Process`] too
    /// unless the seq is provisional.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`], [`ErrorKind::Forked`], [`ErrorKind::EventTooLarge`], [`ErrorKind::SpillFull`] where the
    /// policy is to raise, and [`ErrorKind::Config`] for a level that needs a file that there is not.
    pub fn push(&self, json: &[u8], level: Durability, live: Option<bool>) -> Result<Pushed> {
        self.check_process()?;
        let own = self.shared.config.durability;
        if own == Durability::Memory && matches!(level, Durability::Process | Durability::Power) {
            let text = "a broadcaster with durability='memory' has no file that an event could be kept in: give it durability='process' or higher";
            return Err(Error::new(ErrorKind::Config, text));
        }
        if level == Durability::Power {
            self.shared.outbox.promise();
        }
        if json.len() > self.shared.config.max_event_bytes {
            let (is, may) = (json.len(), self.shared.config.max_event_bytes);
            let text = format!("the event is {is} bytes of JSON, max_event_bytes={may}: split it, or raise the limit");
            return Err(Error::new(ErrorKind::EventTooLarge, text));
        }
        let pushed = self.shared.outbox.push(json, live)?;
        if !self.driven.load(Ordering::Relaxed) {
            self.drive()?; // an emit before `start` spills too
        }
        Ok(pushed)
    }

    fn drive(&self) -> Result<()> {
        let Some(receiver) = self.unclaimed.lock().take() else { return Ok(()) };
        let runtime = runtime::handle(Room::Emitter)?;
        runtime.spawn(driver::run(Arc::clone(&self.shared), receiver));
        self.driven.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn ask<T>(&self, reply: Reply<T>, command: impl FnOnce(Reply<T>) -> Command) {
        let usable = self.check_process().and_then(|()| self.drive());
        match usable {
            Err(error) => reply(Err(error)),
            // The driver answers everything that it receives; what it does not is answered here.
            Ok(()) => {
                if let Err(mpsc::error::SendError(command)) = self.commands.send(command(reply)) {
                    command.refuse(driver::stopped);
                }
            }
        }
    }

    /// Opens the spill and connects; answers when the link is up.
    pub fn start(&self, reply: Reply<()>) {
        self.ask(reply, Command::Start);
    }

    /// Answers when the link is up.
    pub fn await_live(&self, reply: Reply<()>) {
        self.ask(reply, Command::AwaitLive);
    }

    /// Answers when the link was ever up.
    pub fn await_ready(&self, reply: Reply<()>) {
        self.ask(reply, Command::AwaitReady);
    }

    /// Answers when the event has reached the level; `seq` and `provisional` as [`push`](Self::push) gave them.
    pub fn await_level(&self, level: Durability, seq: u64, provisional: bool, reply: Reply<()>) {
        match level {
            Durability::Delivered => self.ask(reply, |reply| Command::AwaitAck { seq, provisional, reply }),
            Durability::Process | Durability::Power if provisional => {
                let shared = Arc::clone(&self.shared);
                let then: Reply<u64> = Box::new(move |kept| match kept {
                    Ok(seq) if level == Durability::Power => shared.sync(seq..=seq, reply),
                    Ok(_) => reply(Ok(())),
                    Err(error) => reply(Err(error)),
                });
                self.ask(then, |reply| Command::AwaitKept { seq, reply });
            }
            Durability::Power => self.shared.sync(seq..=seq, reply),
            Durability::Memory | Durability::Process => reply(Ok(())),
        }
    }

    /// Answers when all events with these final seqs survive power loss; if one may not, for all of them. What else was
    /// emitted in between counts too.
    pub fn await_synced(&self, seqs: RangeInclusive<u64>, reply: Reply<()>) {
        self.shared.sync(seqs, reply);
    }

    /// Blocks until the event with this final seq survives power loss.
    ///
    /// # Errors
    /// [`ErrorKind::SpillIo`]: the disk refused; [`ErrorKind::Config`]: there is no file, or not yet.
    pub fn sync_upto(&self, seq: u64) -> Result<()> {
        self.check_process()?;
        self.shared.syncer()?.wait(seq)
    }

    /// Runs `waiter` when the outbox has room again.
    pub fn when_room(&self, waiter: outbox::Waiter) {
        self.shared.outbox.when_room(waiter);
    }

    /// Flushes now; answers with the result.
    pub fn flush(&self, reply: Reply<FlushOutcome>) {
        self.ask(reply, Command::Flush);
    }

    /// Answers when everything accepted so far is confirmed.
    pub fn drain(&self, reply: Reply<()>) {
        self.ask(reply, Command::Drain);
    }

    /// Accepts nothing more, sends for at most `drain`, stores the rest, closes everything; then answers.
    pub fn stop(&self, drain: Duration, reply: Reply<()>) {
        if let Err(error) = self.check_process() {
            return reply(Err(error)); // before any lock, which a thread of the parent may have held at the fork
        }
        self.shared.outbox.close();
        if !self.driven.load(Ordering::Relaxed) && self.shared.outbox.counts().last_seq == 0 {
            // Nothing was ever done: no file, no thread. Later calls find the channel closed.
            drop(self.unclaimed.lock().take());
            return reply(Ok(()));
        }
        self.ask(reply, |reply| Command::Stop { drain, reply });
    }

    /// Word from the [`Peer`](link::Peer).
    pub fn peer_says(&self, event: PeerEvent) {
        // After the end nobody listens any more.
        drop(self.commands.send(Command::Peer(event)));
    }

    /// A way for the [`Peer`](link::Peer) to answer that does not keep the emitter alive.
    #[must_use]
    pub fn downgrade(&self) -> PeerVoice {
        PeerVoice(self.commands.downgrade())
    }

    /// Stored items after `after`, oldest first, about `max_bytes` of them. Blocks for a read of the disk.
    ///
    /// # Errors
    /// The spill cannot be read, or the broadcaster is stopped.
    pub fn peek(&self, after: u64, max_bytes: usize) -> Result<Vec<Item>> {
        self.check_process()?;
        self.drive()?;
        let (reply, answer) = blocking::sync_channel(1);
        self.commands.send(Command::Peek { after, max_bytes, reply }).map_err(|_| driver::stopped())?;
        answer.recv().map_err(|_| driver::stopped())?
    }

    /// Numbers for `get_stats`; reads counters only.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let snapshot = self.shared.published.lock().clone();
        let age = snapshot.oldest.map_or(0.0, |since| self.shared.now().saturating_sub(since).as_secs_f64());
        Stats {
            counts: self.shared.outbox.counts(),
            snapshot,
            identity: self.shared.identity.lock().clone(),
            oldest_unacked_age: age,
            fsync_p99: self.shared.syncer.get().and_then(|syncer| syncer.p99()),
        }
    }
}

impl Shared {
    fn syncer(&self) -> Result<&Arc<Syncer>> {
        let none = || {
            Error::new(
                ErrorKind::Config,
                "there is no file to sync: start the broadcaster, with durability='process' or higher",
            )
        };
        self.syncer.get().ok_or_else(none)
    }

    fn sync(&self, seqs: RangeInclusive<u64>, reply: Reply<()>) {
        match self.syncer() {
            Ok(syncer) => syncer.request(seqs, reply),
            Err(error) => reply(Err(error)),
        }
    }
}

/// The ring as the [`Syncer`] knows it.
struct RingDisk {
    ring: Mutex<Ring>,
    outbox: Arc<Outbox>,
}

impl Disk for RingDisk {
    fn written(&self) -> u64 {
        self.ring.lock().last()
    }

    fn sync(&self) -> std::io::Result<()> {
        let ring = self.ring.lock().clone(); // an `fdatasync` takes long
        ring.sync()
    }

    fn part(&self) -> u64 {
        self.outbox.part()
    }

    fn renew(&self) {
        *self.ring.lock() = self.outbox.ring();
    }
}

#[cfg(test)]
#[path = "../../tests/rust/support/config.rs"]
pub(crate) mod tests;
