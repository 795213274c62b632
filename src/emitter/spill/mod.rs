//! The spill: where events wait on disk while the link is down or the peer is slow.
//!
//! [`store`] is the file, [`rows`] what is in it, [`scrub`] what is checked of it in calm moments, [`salvage`] what becomes of it when it is
//! damaged; this module is the one thread that owns it.
//! Work goes in as [`Op`]s, answers come back as [`Done`]s, both in order. The caller keeps at most a handful of
//! operations under way, so the queues stay short.

mod files;
pub mod inspect;
pub mod parked;
mod reserve;
pub mod reunion;
mod rows;
pub mod salvage;
mod scrub;
pub mod store;

use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;

use crate::emitter::config::{Durability, EmitterConfig};
use crate::emitter::item::{Gap, Item};
use crate::emitter::outbox::Outbox;
use crate::emitter::ring::Ring;
use crate::error::{Error, ErrorKind, Result};
use parked::{Parking, Wanted};
use salvage::Damage;
use store::{Limits, Recovered, SpillStore};

/// Work for the spill's thread.
#[derive(Debug)]
pub enum Op {
    /// Store items behind those already there; spare what is `in_flight` or older when room is needed.
    Append {
        /// In seq order, directly after what is stored.
        items: Vec<Item>,
        /// Highest seq handed to the link.
        in_flight: u64,
        /// Everything up to here is acknowledged.
        acked: u64,
    },
    /// Read items after a seq.
    Read {
        /// The seq before the first wanted.
        after: u64,
        /// Stop when this much is together.
        max_bytes: usize,
    },
    /// Forget everything up to a seq.
    Trim {
        /// The last seq to forget.
        upto: u64,
    },
    /// Promise that seqs up to this one may be used.
    Reserve {
        /// The last seq promised.
        upto: u64,
        /// Everything up to here is acknowledged.
        acked: u64,
    },
    /// Take an event out of the stream that the peer refuses.
    Park {
        /// Its seq.
        seq: u64,
        /// The event, if it is in memory.
        json: Option<Bytes>,
        /// The peer's words.
        reason: Arc<str>,
    },
    /// Forget parked events that are in the stream again.
    Unpark {
        /// Their keys.
        ids: Vec<i64>,
    },
    /// Write next to nothing: does the disk work again?
    Probe,
    /// Show stored items after `after` to a reader in another thread.
    Peek {
        /// The seq before the first wanted.
        after: u64,
        /// Stop when this much is together.
        max_bytes: usize,
        /// Where the reader waits.
        reply: mpsc::SyncSender<Result<Vec<Item>>>,
    },
    /// End cleanly.
    Close {
        /// First seq for the next process.
        next_seq: u64,
        /// Everything up to here is acknowledged.
        acked: u64,
    },
}

/// What became of an [`Op`].
#[derive(Debug)]
pub enum Done {
    /// First of all: the file is open, or the thread has ended because it cannot be used.
    Opened(Result<Recovered>),
    /// Stored; `dropped` had to make room.
    Appended {
        /// Last seq now stored.
        upto: u64,
        /// What was given up.
        dropped: Vec<Gap>,
        /// Bytes stored now.
        bytes: u64,
    },
    /// Nothing was stored; the items are still the caller's.
    AppendFailed(Error),
    /// The items read.
    Read(Result<Vec<Item>>),
    /// Forgotten, or tried in vain (then it is sent again at worst).
    Trimmed {
        /// What was asked for.
        result: Result<()>,
        /// Bytes stored now.
        bytes: u64,
    },
    /// The promise is on disk, or not.
    Reserved {
        /// The last seq promised.
        upto: u64,
        /// Whether it is.
        result: Result<()>,
    },
    /// The event is parked and a gap stands in its place, or nothing has changed.
    Parked {
        /// The event.
        seq: u64,
        /// What it took.
        result: Result<Parking>,
        /// Bytes stored now.
        bytes: u64,
    },
    /// Parked events are forgotten, or not.
    Unparked {
        /// Their keys.
        ids: Vec<i64>,
        /// Whether they are.
        result: Result<()>,
        /// Events parked now.
        parked: u64,
    },
    /// Parked events that somebody wants to be sent again; told again and again until they are forgotten.
    Wanted(Vec<Wanted>),
    /// Whether the disk takes writes.
    Probed(Result<()>),
    /// Before the answer to the operation that noticed it: the file was damaged, and a new one has what could be read.
    Damaged {
        /// What became of it.
        damage: Damage,
        /// Bytes stored now.
        bytes: u64,
    },
    /// Files of ours are not where they were; told until they are. What is stored would be lost with this process.
    FilesGone(Error),
    /// The ring's file was gone: what comes from now on belongs into this one, and what is in the old one into the spill.
    NewRing(Ring),
    /// All files are at their places again, with all that is stored.
    FilesBack,
    /// The file is closed and unlocked.
    Closed(Result<()>),
}

/// Starts the spill's thread, which opens the file and says [`Done::Opened`]. It ends after [`Op::Close`], or when the
/// sender is dropped.
///
/// # Errors
/// No thread could be started.
pub fn spawn(config: &EmitterConfig, seed: u64, done: impl Fn(Done) + Send + 'static) -> Result<mpsc::Sender<Op>> {
    let (path, limits, emitter) = (config.spill_path.clone(), Limits::from(config), config.emitter_id.clone());
    let segments = (config.durability != Durability::Memory).then(|| Outbox::segments(config));
    let (sender, ops) = mpsc::channel();
    let work = move || match SpillStore::open(&path, limits, emitter.as_deref(), seed, segments) {
        Ok((store, recovered)) => {
            done(Done::Opened(Ok(recovered)));
            run(store, &Inbox::of(ops), done);
        }
        Err(error) => done(Done::Opened(Err(error))),
    };
    let spawned = thread::Builder::new().name("sb-spill".to_owned()).spawn(work);
    spawned.map_err(|error| Error::new(ErrorKind::SpillIo, "cannot start the spill's thread").with_source(error))?;
    Ok(sender)
}

/// Free pages given back at a time, between operations: 4 MiB, a few milliseconds.
const SHRINK_PAGES: u32 = 256;

/// How often others are looked after: whoever removed a file of ours, or marked parked events to be sent again.
const LOOK: Duration = Duration::from_secs(1);
/// Bytes of parked events handed out at a time.
const WANTED_BYTES: usize = 1 << 20;

/// Pause between steps of what is done in calm moments: half of the time at most is taken for it.
const PAUSE: Duration = Duration::from_millis(1);

/// Where the operations come in. Whoever is at something long sees here that one has come, and leaves it there.
#[derive(Clone)]
struct Inbox(Arc<Mutex<Incoming>>);

struct Incoming {
    ops: mpsc::Receiver<Op>,
    next: Option<Op>,
}

impl Inbox {
    fn of(ops: mpsc::Receiver<Op>) -> Self {
        Self(Arc::new(Mutex::new(Incoming { ops, next: None })))
    }

    /// The next operation.
    fn take(&self, patience: Duration) -> Result<Op, mpsc::RecvTimeoutError> {
        let mut incoming = self.0.lock();
        incoming.next.take().map_or_else(|| incoming.ops.recv_timeout(patience), Ok)
    }

    /// Waits a moment for the next operation, or the end, and tells whether it has come.
    fn waits(&self) -> bool {
        let mut incoming = self.0.lock();
        if incoming.next.is_none() {
            incoming.next = match incoming.ops.recv_timeout(PAUSE) {
                Ok(op) => Some(op),
                Err(mpsc::RecvTimeoutError::Timeout) => return false,
                Err(mpsc::RecvTimeoutError::Disconnected) => None,
            };
        }
        true
    }
}

fn run(mut store: SpillStore, inbox: &Inbox, done: impl Fn(Done)) {
    let mut shrinking = false;
    let mut calm_since = Instant::now();
    let mut looked: Option<Instant> = None;
    loop {
        if looked.is_none_or(|at| at.elapsed() >= LOOK) {
            looked = Some(Instant::now());
            store.mend().into_iter().for_each(&done);
            // A disk that cannot be read now is asked again; its trouble is told by the operations of the stream.
            let wanted = if store.parked() > 0 { store.wanted(WANTED_BYTES).unwrap_or_default() } else { Vec::new() };
            if !wanted.is_empty() {
                done(Done::Wanted(wanted));
            }
            tell_damage(&mut store, &done);
        }
        let scrub_after = store.scrub_after();
        let patience = match scrub_after {
            _ if shrinking => Duration::ZERO,
            Some(after) => after.saturating_sub(calm_since.elapsed()).clamp(PAUSE, LOOK),
            None => LOOK,
        };
        let op = match inbox.take(patience) {
            Ok(op) => op,
            Err(mpsc::RecvTimeoutError::Disconnected) => return,
            Err(mpsc::RecvTimeoutError::Timeout) if shrinking => {
                shrinking = store.shrink(SHRINK_PAGES).unwrap_or(false);
                continue;
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                if scrub_after.is_some_and(|after| calm_since.elapsed() >= after) {
                    store.scrub(until_busy(inbox.clone()));
                    tell_damage(&mut store, &done);
                }
                continue;
            }
        };
        let (answer, end) = match op {
            Op::Append { items, in_flight, acked } => {
                let upto = items.last().map_or(0, Item::last);
                let answer = match store.append(&items, in_flight, acked) {
                    Ok(dropped) => Done::Appended { upto, dropped, bytes: store.bytes() },
                    Err(error) => Done::AppendFailed(error),
                };
                (Some(answer), false)
            }
            Op::Read { after, max_bytes } => (Some(Done::Read(store.read(after, max_bytes))), false),
            Op::Trim { upto } => {
                let result = store.trim(upto);
                shrinking = store.bytes() == 0;
                (Some(Done::Trimmed { result, bytes: store.bytes() }), false)
            }
            Op::Reserve { upto, acked } => (Some(Done::Reserved { upto, result: store.reserve(upto, acked) }), false),
            Op::Probe => (Some(Done::Probed(store.probe())), false),
            Op::Park { seq, json, reason } => {
                let result = store.park(seq, json.as_deref(), &reason);
                (Some(Done::Parked { seq, result, bytes: store.bytes() }), false)
            }
            Op::Unpark { ids } => {
                let result = store.unpark(&ids);
                (Some(Done::Unparked { ids, result, parked: store.parked() }), false)
            }
            Op::Peek { after, max_bytes, reply } => {
                // The reader may have given up meanwhile.
                drop(reply.send(store.read(after, max_bytes)));
                (None, false)
            }
            Op::Close { next_seq, acked } => (Some(Done::Closed(store.end(next_seq, acked))), true),
        };
        tell_damage(&mut store, &done);
        if end {
            drop(store); // before it is said
            answer.into_iter().for_each(done);
            return;
        }
        answer.into_iter().for_each(&done);
        calm_since = Instant::now();
    }
}

/// Whether what goes on should be left, asked often: half of the time it rests.
fn until_busy(inbox: Inbox) -> impl FnMut() -> bool + Send + 'static {
    let mut worked_since = Instant::now();
    move || {
        if worked_since.elapsed() < PAUSE {
            return false;
        }
        let busy = inbox.waits();
        worked_since = Instant::now();
        busy
    }
}

fn tell_damage(store: &mut SpillStore, done: &impl Fn(Done)) {
    if let Some(damage) = store.take_damage() {
        done(Done::Damaged { damage, bytes: store.bytes() });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::emitter::tests::config;
    use crate::wire::block::BlockBuilder;

    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn what_is_rotten_is_told_although_nobody_asks() {
        let home = tempfile::tempdir().expect("writable");
        let config = EmitterConfig { spill_path: home.path().join("spill.db"), ..config() };
        let (mut store, _) =
            SpillStore::open(&config.spill_path, Limits::from(&config), None, 1, None).expect("usable");
        for seq in 1..=40 {
            let mut builder = BlockBuilder::new(seq, bytes::BytesMut::new());
            builder.push(&vec![b' '; 64 << 10]);
            let item = Item::Events(builder.seal().expect("not empty"));
            store.append(&[item], 0, 0).expect("stored");
        }
        store.close(41, 0).expect("closed");
        rusqlite::Connection::open(&config.spill_path)
            .and_then(|db| db.execute("UPDATE item SET crc = 0 WHERE first = 35", []))
            .expect("writable");
        let (sender, told) = mpsc::channel();
        let ops = spawn(&config, 1, move |done| drop(sender.send(done))).expect("a thread");
        let Ok(Done::Opened(Ok(recovered))) = told.recv_timeout(PATIENCE) else { panic!("not opened") };
        assert!(recovered.damage.is_none());
        let Ok(Done::Damaged { damage, .. }) = told.recv_timeout(PATIENCE) else { panic!("not told") };
        assert_eq!(damage.unreadable.iter().map(|gap| (gap.from, gap.to)).collect::<Vec<_>>(), [(35, 35)]);
        ops.send(Op::Close { next_seq: 41, acked: 0 }).expect("it listens");
        assert!(matches!(told.recv_timeout(PATIENCE), Ok(Done::Closed(Ok(())))));
    }

    #[test]
    fn whoever_is_at_something_long_sees_that_work_has_come_and_leaves_it() {
        let (sender, ops) = mpsc::channel();
        let inbox = Inbox::of(ops);
        assert!(!inbox.waits());
        let mut busy = until_busy(inbox.clone());
        sender.send(Op::Trim { upto: 7 }).expect("it listens");
        while !busy() {}
        assert!(matches!(inbox.take(PATIENCE), Ok(Op::Trim { upto: 7 })));
        drop(sender);
        assert!(inbox.waits() && inbox.take(PATIENCE).is_err(), "the end has come");
    }
}
