//! The durable log: what is acknowledged or delivered is in a file first, so that it outlives a killed hub.
//!
//! ```text
//!  sessions ─▶ ops ─▶ thread sb-log { ledger judges · sqlite stores a group } ─▶ outcomes ─▶ settle ─▶ state
//!  publishers ▶ ┘                                                                           └─▶ acks, subscribers
//! ```
//!
//! One thread owns the file. While it stores one group, the next one gathers; a group is one transaction of many
//! emitters' records and marks. Everything takes the same way in the same order, `hello` too: its answer counts what
//! was on its way. The outcomes are settled in the hub's runtime, a slice at a time, so that subscribers keep up.

pub mod ledger;
pub mod sqlite;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, mpsc as blocking};
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::mpsc;

use ledger::Ledger;
use sqlite::{LogStore, Recovered};

use super::emitters::{Emitters, REMEMBERED};
use super::log::{Log, LogLimits, Noting, cost};
use super::ops::{self, Op, Outcome};
use super::service::Part;
use super::shared::Shared;
use crate::error::{Error, ErrorKind, Result};
use crate::wire::close::CloseCode;

/// A group is stored at this size even if more waits: a transaction of some milliseconds.
const GROUP_BYTES: usize = 4 << 20;
/// What subscribers are told of a disk that refuses events.
const REFUSED: &str = "Events cannot be stored at the moment; their emitters keep them.";
/// What is told of a thread that has panicked. It is not started again: a panic is a fault of this program, and what it
/// left of its books cannot be trusted with offsets that must never repeat. A new process reads them from the file.
const DEAD: &str = "the thread of the hub's log has died; start the hub again, and report this";

/// Outcomes in the order in which they are to be settled.
pub(super) type Outcomes = mpsc::UnboundedReceiver<Vec<Outcome>>;

/// The hub's end of the log's thread.
pub(super) struct History {
    ops: blocking::Sender<Op>,
    pub(super) status: Arc<Status>,
}

/// What the log's thread tells of itself.
#[derive(Debug, Default)]
pub(super) struct Status {
    /// Emitters whose mark is remembered.
    pub(super) known_emitters: AtomicUsize,
    /// Transactions so far.
    pub(super) commits: AtomicU64,
    /// Groups that could not be stored.
    pub(super) failures: AtomicU64,
    /// Whether the last one could not.
    pub(super) degraded: AtomicBool,
    /// Why.
    pub(super) error: Mutex<Option<String>>,
    /// Where a damaged file was moved to.
    pub(super) set_aside: Mutex<Option<PathBuf>>,
    /// The thread has panicked.
    dead: AtomicBool,
    /// It is to panic at its next op.
    #[cfg(test)]
    panics: AtomicBool,
}

/// Tells of the end of the log's thread, if it was none that anybody wanted.
struct Witness(Arc<Status>);

impl Drop for Witness {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.dead.store(true, Ordering::Relaxed);
            self.0.degraded.store(true, Ordering::Relaxed);
            *self.0.error.lock() = Some(DEAD.to_owned());
        }
    }
}

/// Opens the log and starts its thread. `fresh` is the epoch of a log that begins.
///
/// # Errors
/// [`ErrorKind::LogLocked`], [`ErrorKind::LogCorrupt`], see [`LogStore::open`]; [`ErrorKind::LogIo`] if there is no
/// thread.
pub(super) fn open(path: &Path, limits: LogLimits, fresh: &str) -> Result<(History, Outcomes, Recovered)> {
    let (sender, ops) = blocking::channel();
    let (outcomes, settled) = mpsc::unbounded_channel();
    let (opened, waiting) = blocking::sync_channel(1);
    let status = Arc::new(Status::default());
    let worker_status = status.clone();
    let (path, fresh) = (path.to_owned(), fresh.to_owned());
    let work = move || {
        let (store, mut recovered) = match LogStore::open(&path, limits, &fresh) {
            Ok(opened) => opened,
            Err(error) => return drop(opened.send(Err(error))), // the opener waits: it cannot fail
        };
        let mut emitters = Emitters::new(REMEMBERED);
        for mark in recovered.marks.drain(..) {
            emitters.recall(&mark.name, mark.epoch, mark.have);
        }
        *worker_status.set_aside.lock() = recovered.set_aside.take();
        let witness = Witness(worker_status.clone());
        let worker =
            Worker { _witness: witness, store, ledger: Ledger::new(emitters), outcomes, status: worker_status };
        worker.tell();
        if opened.send(Ok(recovered)).is_ok() {
            worker.run(&ops);
        }
    };
    let no_thread = |error| Error::new(ErrorKind::LogIo, "cannot start the thread of the hub's log").with_source(error);
    thread::Builder::new().name("sb-log".to_owned()).spawn(work).map_err(no_thread)?;
    let recovered =
        waiting.recv().map_err(|_| Error::new(ErrorKind::LogIo, "the thread of the hub's log ended at once"))??;
    Ok((History { ops: sender, status }, settled, recovered))
}

/// The log in memory as an earlier life of the hub left it, and the age of its oldest entry: the present on the log's
/// scale of time.
pub(super) fn replay(recovered: Recovered, limits: LogLimits, noting: Noting) -> (Log, Duration) {
    let Recovered { epoch, head, entries, now, .. } = recovered;
    let oldest = entries.first().map_or(0, |(at, _)| *at);
    let since = |at: i64| Duration::from_millis(at.saturating_sub(oldest).max(0) as u64);
    let now = if entries.is_empty() { Duration::ZERO } else { since(now) };
    let mut log = Log::resume(epoch, head - entries.len() as u64, limits).noting(noting);
    for (at, record) in entries {
        log.append(record, since(at).min(now));
    }
    (log, now)
}

impl History {
    /// Gives the op back if the log is closed.
    pub(super) fn send(&self, op: Op) -> std::result::Result<(), Box<Op>> {
        self.ops.send(op).map_err(|closed| Box::new(closed.0))
    }

    /// What is to be said of the thread, if it has died.
    pub(super) fn death(&self) -> Option<Error> {
        self.status.dead.load(Ordering::Relaxed).then(|| Error::new(ErrorKind::LogIo, DEAD))
    }
}

struct Worker {
    // Dropped first: who notices the end of the outcomes finds the reason.
    _witness: Witness,
    store: LogStore,
    ledger: Ledger,
    outcomes: mpsc::UnboundedSender<Vec<Outcome>>,
    status: Arc<Status>,
}

impl Worker {
    fn run(mut self, ops: &blocking::Receiver<Op>) {
        let mut closing = None;
        while closing.is_none()
            && let Ok(first) = ops.recv()
        {
            let (mut group, mut bytes, mut next) = (Vec::new(), 0, Some(first));
            while let Some(op) = next {
                match op {
                    Op::Close { done } => {
                        closing = Some(done);
                        break;
                    }
                    op => self.judge(op, &mut group, &mut bytes),
                }
                next = if bytes < GROUP_BYTES { ops.try_recv().ok() } else { None };
            }
            self.store_group(group);
        }
        // Whoever opens the file next relies on it being closed, not on how well that went.
        let Self { store, status, .. } = self;
        if let Err(error) = store.close() {
            *status.error.lock() = Some(error.report());
        }
        if let Some(done) = closing {
            done.send(()).unwrap_or_default(); // nobody may wait for it
        }
    }

    fn judge(&mut self, op: Op, group: &mut Vec<Outcome>, bytes: &mut usize) {
        #[cfg(test)]
        assert!(!self.status.panics.load(Ordering::Relaxed), "as the test wants it");
        match op {
            Op::Turn { turn, flow, bytes: waiting } => {
                let verdict = self.ledger.judge(&turn);
                *bytes += waiting;
                group.push(Outcome::Turn { turn, flow, bytes: waiting, verdict });
            }
            Op::Publish { records, reply } => {
                *bytes += records.iter().map(cost).sum::<usize>();
                group.push(Outcome::Publish { records, reply, error: None });
            }
            Op::Release { id, name } => self.ledger.release(id, &name),
            Op::Close { .. } => {} // the caller's
        }
    }

    fn store_group(&mut self, mut group: Vec<Outcome>) {
        let (marks, forgotten) = (self.ledger.marks(), self.ledger.forgotten());
        let idle = marks.is_empty() && forgotten.is_empty() && group.iter().all(|outcome| outcome.records().is_empty());
        let stored = if idle { Ok(()) } else { self.commit(&group, &marks, &forgotten) };
        match stored {
            Ok(()) => self.ledger.keep(),
            Err(error) => {
                self.ledger.take_back();
                let cause = Error::new(ErrorKind::LogIo, error.report());
                for outcome in &mut group {
                    outcome.fail(&cause);
                }
                self.status.failures.fetch_add(1, Ordering::Relaxed);
                self.status.degraded.store(true, Ordering::Relaxed);
                *self.status.error.lock() = Some(error.report());
            }
        }
        self.tell();
        // An error means that the hub is gone, and everyone who could be answered with it.
        drop(self.outcomes.send(group));
    }

    fn commit(&mut self, group: &[Outcome], marks: &[sqlite::Mark], forgotten: &[String]) -> Result<()> {
        self.store.commit(group.iter().flat_map(Outcome::records), marks, forgotten)?;
        self.status.commits.fetch_add(1, Ordering::Relaxed);
        // What is stored is stored: a ring that is too large for now is told, and no reason to refuse anything.
        match self.store.make_room() {
            Ok(()) => {
                if self.status.degraded.swap(false, Ordering::Relaxed) {
                    *self.status.error.lock() = None;
                }
            }
            Err(error) => {
                self.status.degraded.store(true, Ordering::Relaxed);
                *self.status.error.lock() = Some(error.report());
            }
        }
        Ok(())
    }

    fn tell(&self) {
        self.status.known_emitters.store(self.ledger.len(), Ordering::Relaxed);
    }
}

/// Acts on what the log's thread has done, until it ends.
pub(super) async fn settle(shared: Arc<Shared>, status: Arc<Status>, mut outcomes: Outcomes) {
    let mut told = false;
    while let Some(group) = outcomes.recv().await {
        ops::settle(&shared, group).await;
        tell_subscribers(&shared, &status, &mut told);
    }
    tell_subscribers(&shared, &status, &mut told);
    // For a hub that stops that is said already; else what they have sent is not stored and never will be.
    shared.with(|state, _| {
        for (id, role) in state.registry.sessions() {
            if !role.subscribes() {
                state.registry.order_close(id, CloseCode::Degraded);
            }
        }
    });
}

/// Says that events cannot be stored, or that they can be again, where that is news.
fn tell_subscribers(shared: &Shared, status: &Status, told: &mut bool) {
    let degraded = status.degraded.load(Ordering::Relaxed);
    if std::mem::replace(told, degraded) != degraded {
        let trouble = degraded.then(|| REFUSED.to_owned());
        shared.with(|state, _| state.trouble(Part::Log, trouble));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::ops::Keeper;
    use crate::hub::registry::Role;
    use crate::hub::{Hub, HubConfig};
    use crate::wire::topic::Pattern;

    #[tokio::test]
    async fn a_thread_that_dies_is_told_to_all_and_everything_else_goes_on() {
        let home = tempfile::tempdir().expect("writable");
        let config = HubConfig { port: 0, log_path: Some(home.path().join("log.db")), ..HubConfig::default() };
        let hub = Hub::start(config.clone()).expect("starts");
        let publish = || hub.publish(br#"{"type":"a"}"#[..].into());
        let before = publish().expect("stored");
        let id = hub.shared.with(|state, _| {
            let id = state.registry.open(Role::Subscriber);
            state.preset(id, &[Pattern::parse("*").expect("valid")]);
            id
        });
        let log = hub.shared.keeper.as_ref().and_then(Keeper::log).expect("durable");
        log.status.panics.store(true, Ordering::Relaxed);
        // One that was on its way may hear that the hub was stopped, every later one hears why.
        while publish().expect_err("dead").kind() != ErrorKind::LogIo {}
        let stats = hub.stats();
        assert_eq!((stats.degraded, stats.log_error.as_deref()), (true, Some(DEAD)));
        let told = || {
            let mut items = std::collections::VecDeque::new();
            hub.shared.with(|state, _| state.take(id, usize::MAX, &mut items));
            format!("{items:?}").contains("degraded")
        };
        while !told() {
            tokio::task::yield_now().await;
        }
        hub.stop().await;
        // The file was given up in order, and another life goes on with it.
        let again = Hub::start(config).expect("starts again");
        let offset = again.publish(br#"{"type":"b"}"#[..].into()).expect("stored").offset;
        assert_eq!(offset, before.offset + 1);
    }
}
