//! The spill's file: items in seq order in a SQLite table, bounded by events, bytes and age, on a disk that may be full
//! or give back other bytes than it was given (`docs/decisions/0012-a-bad-disk.md`).
//!
//! A row is a whole [block](crate::wire::block), not an event: SQLite's cost per row is then shared by some hundred
//! events (`docs/decisions/0003-spill-rows-are-blocks.md`). The on-disk format is guarded by `user_version`.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};

use crate::clock::{Clock, FileClock, unix_millis};
use crate::emitter::config::{EmitterConfig, WhenFull};
use crate::emitter::item::{Gap, GapReason, Identity, Item};
use crate::emitter::ring::{self, Left, Ring};
use crate::emitter::spill::parked::{self, Bounds, Parking, Wanted};
use crate::emitter::spill::reserve::{RESERVE_BYTES, Reserve};
use crate::emitter::spill::reunion::{Reunion, Stored, reunite};
use crate::emitter::spill::salvage::{self, Damage, Numbering};
use crate::emitter::spill::scrub::{self, Scrub};
use crate::error::{Error, ErrorKind, Result};
use crate::sqlite::{self, Lock, PAGE, Purpose, damaged, get, put};
use crate::wire::block::Block;
use crate::wire::position::epoch_from;

/// Marks the file as ours in SQLite's header ("SBsp").
pub(super) const APPLICATION_ID: i64 = 0x5342_7370;
/// Version of the tables below. They are frozen: a change needs a new number and a migration.
pub(super) const FORMAT: i64 = 1;
const SCHEMA: &str = "
    CREATE TABLE item (
        first INTEGER PRIMARY KEY, last INTEGER NOT NULL,   -- seqs covered
        stored_at INTEGER NOT NULL,                         -- milliseconds on the file's clock
        reason TEXT,                                        -- of a gap; NULL for events
        data BLOB,                                          -- a block; NULL for a gap
        crc INTEGER NOT NULL                                -- CRC32C of all that; last, so that it is read last
    );
    CREATE INDEX gap ON item (first) WHERE data IS NULL;    -- all of them are told at the start
    CREATE TABLE parked (
        id INTEGER PRIMARY KEY,                             -- in the order of parking
        epoch TEXT NOT NULL, seq INTEGER NOT NULL,          -- the place that the event had in the stream
        reason TEXT NOT NULL,                               -- the peer's words
        parked_at INTEGER NOT NULL,                         -- milliseconds on the file's clock
        wanted INTEGER NOT NULL DEFAULT 0,                  -- 1: to be sent again, as a new event
        json BLOB NOT NULL,
        crc INTEGER NOT NULL,                               -- CRC32C of its place and the event
        UNIQUE (epoch, seq)
    );";
/// 4 MiB: the reserve has to hold it.
const WAL_PAGES: i64 = 256;
/// Bytes of events that are read when the file is opened: those that go on the wire first. The rest is left to
/// [`scrub`](SpillStore::scrub), or is checked when it is read.
const HEAD: usize = 1 << 20;
/// A file that could not be salvaged is not tried again before this.
const SALVAGE_RETRY: Duration = Duration::from_secs(60);
/// Rows forgotten at a time while the disk is full.
const TRIM_ROWS: u32 = 256;
pub(super) const PURPOSE: Purpose = Purpose {
    setting: "spill_path",
    noun: "a spill",
    alone: "give each broadcaster its own spill_path, or stop the other",
    application_id: APPLICATION_ID,
    format: FORMAT,
    wal_pages: WAL_PAGES,
    schema: SCHEMA,
    locked: ErrorKind::SpillLocked,
    unusable: ErrorKind::SpillCorrupt,
};

/// Seqs promised at each opening without a ring, in the transaction that says who is here: from then on none is used, or
/// lost with the process, without a trace. The machine promises more as they are used up.
pub const RESERVE_FIRST: u64 = 10_000;

/// Bounds of the spill and the policy at them.
#[derive(Clone, Debug)]
pub struct Limits {
    events: u64,
    bytes: u64,
    age: Option<Duration>,
    drop_oldest: bool,
    parked: Bounds,
}

impl From<&EmitterConfig> for Limits {
    fn from(config: &EmitterConfig) -> Self {
        Self {
            events: config.spill_max_events,
            bytes: config.spill_max_bytes,
            age: config.spill_max_age,
            drop_oldest: config.when_full == WhenFull::DropOldest,
            parked: Bounds { events: config.parked_max_events, bytes: config.parked_max_bytes },
        }
    }
}

/// What an earlier process left.
#[derive(Clone, Debug)]
pub struct Recovered {
    /// Name towards the hub.
    pub emitter: String,
    /// Epoch of all seqs.
    pub epoch: String,
    /// The next seq that may be assigned.
    pub next_seq: u64,
    /// Seqs up to here are promised; see [`SpillStore::reserve`].
    pub reserved: u64,
    /// Everything up to here is acknowledged or given up for good.
    pub base: u64,
    /// Last seq stored; `base` if nothing is.
    pub last: u64,
    /// Gaps among the stored items.
    pub gaps: Vec<Gap>,
    /// Bytes of stored events.
    pub bytes: u64,
    /// Age of the oldest stored item.
    pub oldest: Option<Duration>,
    /// Events parked beside the stream.
    pub parked: u64,
    /// What follows the stored items up to `next_seq` and lies in the ring, gaps between included.
    pub held: Vec<Item>,
    /// The ring for what comes; `None`: the outbox needs none.
    pub ring: Option<Ring>,
    /// The file was damaged: this is what could be saved, under a new epoch.
    pub damage: Option<Damage>,
}

/// What the file holds, kept along with every change, in memory and in the file: counting rows would cost more than
/// storing them, and keep a large spill from being sent after a start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage {
    pub(super) events: u64,
    pub(super) bytes: u64,
}

impl Usage {
    /// What is stored of it, and the last seq of all items then.
    fn load(tx: &Connection) -> rusqlite::Result<Option<(Self, u64)>> {
        let Some(text) = get::<String>(tx, "totals")? else { return Ok(None) };
        let mut numbers = text.split(' ').map(str::parse);
        let mut number = || numbers.next().and_then(Result::ok).ok_or_else(|| damaged("its totals are no numbers"));
        Ok(Some((Self { events: number()?, bytes: number()? }, number()?)))
    }

    pub(super) fn store(&self, tx: &Connection, last: u64) -> rusqlite::Result<()> {
        put(tx, "totals", format!("{} {} {last}", self.events, self.bytes))
    }

    /// Counted anew. It takes long: each row is looked up.
    pub(super) fn count(tx: &Connection) -> rusqlite::Result<Self> {
        let sql = "SELECT coalesce(sum(last - first + 1), 0), coalesce(sum(length(data)), 0) FROM item
                   WHERE data IS NOT NULL";
        tx.query_row(sql, [], |row| Ok(Self { events: row.get(0)?, bytes: row.get(1)? }))
    }

    pub(super) fn add(&mut self, item: &Item) {
        self.events += item.events();
        self.bytes += item.bytes() as u64;
    }

    fn remove(&mut self, events: u64, bytes: u64) {
        self.events = self.events.saturating_sub(events);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

/// What the running process knows of its numbers, should the file lose it.
#[derive(Clone, Debug, Default)]
pub(super) struct Meta {
    pub(super) emitter: String,
    pub(super) epoch: String,
    /// Seqs up to here may have been used.
    pub(super) reserved: u64,
    /// Everything up to here is acknowledged.
    pub(super) base: u64,
    /// Last seq stored.
    pub(super) last: u64,
}

impl Meta {
    pub(super) fn store(&self, tx: &Connection) -> rusqlite::Result<()> {
        put(tx, "emitter", &self.emitter)?;
        put(tx, "epoch", &self.epoch)?;
        put(tx, "base", self.base)?;
        put(tx, "reserved", self.reserved)
    }
}

/// A row that is as it was written.
pub(super) struct Row {
    pub(super) item: Item,
    pub(super) stored_at: i64,
}

/// The open file and its lock. One owner, one thread.
#[derive(Debug)]
pub struct SpillStore {
    db: Connection,
    path: PathBuf,
    limits: Limits,
    usage: Usage,
    /// Events parked.
    parked: u64,
    meta: Meta,
    ring: Option<Ring>,
    clock: FileClock,
    reserve: Reserve,
    /// Bytes stored since the WAL was folded back, about.
    unfolded: u64,
    /// The WAL could not be folded back, even with the reserve: nothing more may go into it but what makes it smaller.
    stuck: bool,
    damage: Option<Damage>,
    scrub: Scrub,
    /// A damaged file could not be salvaged.
    unsalvaged: Option<Instant>,
    lock: Lock,
}

impl SpillStore {
    /// Opens or creates the spill, alone: a second owner is refused. `emitter` is the name asked for; without one the
    /// stored name stays, or a random one is made from `seed`. `segments`: how large a ring is wanted beside it; one
    /// that an earlier process left is read in any case. Of a damaged file what can be read is saved.
    ///
    /// # Errors
    /// [`ErrorKind::SpillLocked`] names the owner's pid; [`ErrorKind::SpillCorrupt`] what else is wrong with the path;
    /// [`ErrorKind::SpillIo`]: there is no room, for the ring or even for this.
    pub fn open(
        path: &Path,
        limits: Limits,
        emitter: Option<&str>,
        seed: u64,
        segments: Option<usize>,
    ) -> Result<(Self, Recovered)> {
        Self::open_at(path, limits, emitter, seed, segments, &Clock::system())
    }

    pub(crate) fn open_at(
        path: &Path,
        limits: Limits,
        emitter: Option<&str>,
        seed: u64,
        segments: Option<usize>,
        clock: &Clock,
    ) -> Result<(Self, Recovered)> {
        let mut random = fastrand::Rng::with_seed(seed);
        let wish = Wish { emitter, random: [random.u64(..), random.u64(..)], segments };
        salvage::finish(path).map_err(|error| PURPOSE.unusable(path, error))?;
        let mut lock = PURPOSE.lock(path)?;
        let place = sqlite::beside(path, ".ring");
        let mut left = ring::recover(&place)?;
        let mut reserve = Reserve::of(path);
        let mut damage = None;
        let mut opened = begin(path, &mut lock, &mut reserve, clock, &wish, left.as_ref());
        if let Err(cause) = &opened
            && sqlite::is_damage(cause)
        {
            let (epoch, cause, unix) = (epoch_from(random.u64(..)), cause.to_string(), unix_millis());
            let numbering = Numbering::Lost { epoch: &epoch, ring: left.as_ref() };
            let mut salvaged = salvage::salvage(path, &numbering, cause.clone(), unix);
            if salvaged.as_ref().is_err_and(sqlite::is_full) {
                reserve.release();
                salvaged = salvage::salvage(path, &numbering, cause, unix);
            }
            let salvaged = salvaged.map_err(|error| unopened(path, error))?;
            if let (Some(left), Some(upto)) = (&mut left, salvaged.in_ring) {
                // Under the new seqs, what is in both could not be told any more.
                left.blocks = left.blocks.iter().filter_map(|block| block.after(upto)).collect();
            }
            damage = Some(salvaged.damage);
            drop(lock);
            lock = PURPOSE.lock(path)?;
            opened = begin(path, &mut lock, &mut reserve, clock, &wish, left.as_ref());
        }
        let (Loaded { db, usage, clock, meta, parked, oldest }, mut recovered, adopted) =
            opened.map_err(|error| unopened(path, error))?;
        let scrub = Scrub::Rows { at: meta.base, upto: meta.last };
        let mut store = Self {
            db,
            path: path.to_owned(),
            limits,
            usage,
            parked,
            meta,
            ring: None,
            clock,
            reserve,
            unfolded: 0,
            stuck: false,
            damage: None,
            scrub,
            unsalvaged: None,
            lock,
        };
        recovered.oldest = oldest.map(|at| Duration::from_millis((store.clock.now() - at).max(0) as u64));
        recovered.damage = damage;
        store.ring = match (left, segments) {
            (Some(left), _) if adopted => {
                left.ring.resume(recovered.next_seq - 1, recovered.base);
                Some(left.ring)
            }
            (left, Some(segments)) => {
                drop(left); // the file is cut and made anew under it
                let identity = Identity { emitter: recovered.emitter.clone(), epoch: recovered.epoch.clone() };
                let ring = Ring::create(&place, segments, &identity, random.u64(..))?;
                ring.resume(recovered.next_seq - 1, recovered.base);
                Some(ring)
            }
            (Some(left), None) => {
                // Should it stay, the next start knows that everything in it was taken over.
                left.ring.remove().unwrap_or_default();
                None
            }
            (None, None) => None,
        };
        recovered.ring.clone_from(&store.ring);
        drop(store.reserve.hold()); // without it nothing is appended, which tells
        Ok((store, recovered))
    }

    /// What became of a file that was found damaged since the last call.
    pub fn take_damage(&mut self) -> Option<Damage> {
        self.damage.take()
    }

    /// Bytes of stored events.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.usage.bytes
    }

    /// Stores items behind those already there and forgets everything up to `acked`, in one transaction; then makes
    /// room if a bound is passed, sparing what is on its way (`in_flight` and older). Returns what had to go.
    ///
    /// # Errors
    /// [`ErrorKind::SpillIo`]: nothing of this call is stored, and the same call may be tried again.
    pub fn append(&mut self, items: &[Item], in_flight: u64, acked: u64) -> Result<Vec<Gap>> {
        let weight: u64 = items.iter().map(|item| item.bytes() as u64 + 64).sum();
        self.require_room(weight)?;
        let promised = self.ring.as_ref().is_some_and(Ring::has_promised);
        let stored = self.attempt(|store| {
            let limits = store.limits.clone();
            store.write(promised, |tx, usage, meta, now| {
                // First: what is confirmed must not take the room of what is not, and a hole between the two would not
                // be told from a lost event after a crash.
                trim(tx, usage, meta, acked)?;
                for item in items {
                    insert(tx, item, now)?;
                    usage.add(item);
                    meta.last = meta.last.max(item.last());
                }
                make_room(tx, &limits, usage, in_flight, now)
            })
        });
        self.unfolded += weight;
        match &stored {
            Err(error) if sqlite::is_full(error) => self.make_way(),
            // SQLite folds the WAL back too, but does not say if it cannot. It must not grow beyond the reserve.
            _ if self.unfolded >= WAL_PAGES as u64 * PAGE as u64 => self.fold(),
            _ => {}
        }
        stored.map_err(|error| failed(&self.path, "write", error))
    }

    /// Items after `seq`, oldest first, until `max_bytes` are together (at least one item if there is any).
    ///
    /// # Errors
    /// [`ErrorKind::SpillIo`].
    pub fn read(&mut self, seq: u64, max_bytes: usize) -> Result<Vec<Item>> {
        let read = self.attempt(|store| store.read_items(seq, max_bytes));
        read.map_err(|error| failed(&self.path, "read", error))
    }

    fn read_items(&self, seq: u64, max_bytes: usize) -> rusqlite::Result<Vec<Item>> {
        let mut query = self.db.prepare_cached(
            "SELECT first, last, stored_at, reason, data, crc FROM item
             WHERE first >= coalesce((SELECT max(first) FROM item WHERE first <= ?1), 0) ORDER BY first",
        )?;
        let mut rows = query.query([seq + 1])?;
        let (mut items, mut bytes, mut before) = (Vec::new(), 0, None);
        let known = seq.max(self.meta.base);
        while bytes < max_bytes {
            let Some(row) = rows.next()? else {
                if before.unwrap_or(known) < self.meta.last {
                    return Err(damaged("its last rows are missing"));
                }
                break;
            };
            let item = read_row(row)?.item;
            let follows = before.map_or(item.first() <= known + 1, |before| item.first() == before + 1);
            if !follows {
                return Err(damaged("rows are missing"));
            }
            before = Some(item.last());
            if let Some(item) = item.after(seq) {
                bytes += item.bytes().max(64);
                items.push(item);
            }
        }
        Ok(items)
    }

    /// Takes the event `seq` out of the stream and parks it; a gap stands in its place from now on. `held` is the event
    /// if it is in memory, where it may not have been stored. Survives power loss: the peer is told of the gap next.
    ///
    /// # Errors
    /// [`ErrorKind::SpillIo`]: nothing has changed.
    pub fn park(&mut self, seq: u64, held: Option<&[u8]>, reason: &str) -> Result<Parking> {
        let bounds = self.limits.parked;
        let parking = self.must(self.meta.base, |store| {
            store.write(true, |tx, usage, _, now| {
                let stored = parked::row_of(tx, seq)?;
                let of_row = stored.as_ref().and_then(|(_, block)| block.events().find(|(at, _)| *at == seq));
                let json = held.map(Bytes::copy_from_slice).or(of_row.map(|(_, json)| json));
                let dropped = match json {
                    Some(json) => parked::park(tx, bounds, (seq, &json), reason, now)?,
                    None => Vec::new(), // given up meanwhile by a bound
                };
                if let Some((at, block)) = stored {
                    tx.prepare_cached("DELETE FROM item WHERE first = ?1")?.execute([block.first()])?;
                    usage.remove(block.count(), block.bytes().len() as u64);
                    let before = if seq > block.first() { block.head(seq - block.first()) } else { None };
                    let gap = Item::Gap(Gap { from: seq, to: seq, reason: GapReason::Refused });
                    let after = block.after(seq).map(Item::Events);
                    for item in before.map(Item::Events).into_iter().chain([gap]).chain(after) {
                        usage.add(&item);
                        insert(tx, &item, at)?;
                    }
                }
                Ok(Parking { parked: parked::usage(tx)?.0, dropped })
            })
        })?;
        self.parked = parking.parked;
        Ok(parking)
    }

    /// Forgets parked events that are in the stream again.
    ///
    /// # Errors
    /// [`ErrorKind::SpillIo`]: they are still parked.
    pub fn unpark(&mut self, ids: &[i64]) -> Result<()> {
        self.parked = self.must(self.meta.base, |store| {
            store.write(false, |tx, _, _, _| {
                parked::unpark(tx, ids)?;
                Ok(parked::usage(tx)?.0)
            })
        })?;
        Ok(())
    }

    /// Events parked.
    #[must_use]
    pub fn parked(&self) -> u64 {
        self.parked
    }

    /// Parked events that somebody wants to be sent again, about `max_bytes` of them.
    ///
    /// # Errors
    /// [`ErrorKind::SpillIo`].
    pub fn wanted(&mut self, max_bytes: usize) -> Result<Vec<Wanted>> {
        let wanted = self.attempt(|store| parked::wanted(&store.db, max_bytes));
        wanted.map_err(|error| failed(&self.path, "read", error))
    }

    /// Forgets everything up to and including `seq`: the peer has it.
    ///
    /// # Errors
    /// [`ErrorKind::SpillIo`]: still stored, and sent again at worst.
    pub fn trim(&mut self, seq: u64) -> Result<()> {
        self.must(seq, |store| store.write(false, |tx, usage, meta, _| trim(tx, usage, meta, seq)))
    }

    /// Promises that seqs up to `seq` may have been used, so that a process after a crash uses none of them again,
    /// and notes that the peer has everything up to `acked`. Survives power loss: a repeated seq would be dropped by
    /// the hub as a duplicate.
    ///
    /// # Errors
    /// [`ErrorKind::SpillIo`].
    pub fn reserve(&mut self, seq: u64, acked: u64) -> Result<()> {
        self.must(acked, |store| {
            store.write(true, |tx, usage, meta, _| {
                put(tx, "reserved", seq)?;
                meta.reserved = seq;
                trim(tx, usage, meta, acked)
            })
        })
    }

    /// Writes next to nothing, to see whether the disk works again.
    ///
    /// # Errors
    /// [`ErrorKind::SpillIo`]: it does not.
    pub fn probe(&mut self) -> Result<()> {
        self.require_room(1)?;
        let written = self.attempt(|store| store.write(false, |tx, _, meta, _| put(tx, "base", meta.base)));
        written.map_err(|error| failed(&self.path, "write", error))
    }

    /// Ends cleanly: the peer has everything up to `acked`, and the next process goes on with exactly `next_seq`. If not
    /// everything before it is stored, because the disk refused it, the ring stays for the next process.
    ///
    /// # Errors
    /// [`ErrorKind::SpillIo`]: the next process skips to the reserved seq instead.
    pub fn close(mut self, next_seq: u64, acked: u64) -> Result<()> {
        self.end(next_seq, acked)
    }

    /// What [`close`](Self::close) does before the file is closed.
    pub(super) fn end(&mut self, next_seq: u64, acked: u64) -> Result<()> {
        self.must(acked, |store| {
            store.write(true, |tx, usage, meta, _| {
                trim(tx, usage, meta, acked)?;
                put(tx, "next_seq", next_seq)
            })
        })?;
        if self.meta.last + 1 >= next_seq
            && let Some(ring) = self.ring.take()
        {
            // Should it stay, the next start finds nothing in it that is not known.
            drop(ring.remove());
        }
        Ok(())
    }

    /// Gives free pages back to the file system, at most `pages`; returns whether more are left.
    ///
    /// # Errors
    /// [`ErrorKind::SpillIo`].
    pub fn shrink(&mut self, pages: u32) -> Result<bool> {
        sqlite::shrink(&self.db, pages).map_err(|error| failed(&self.path, "shrink", error))
    }

    /// How long nobody should have wanted anything before the next step of [`scrub`](Self::scrub); `None`: it is done.
    #[must_use]
    pub fn scrub_after(&self) -> Option<Duration> {
        self.scrub.after()
    }

    /// Checks a part of what was not checked when the file was opened: each row once, then all pages at once, which is
    /// given up when `busy` says so and begun again later. What it finds is treated as if it had been found by an
    /// operation.
    pub fn scrub(&mut self, busy: impl FnMut() -> bool + Send + 'static) {
        let checked = match self.scrub {
            Scrub::Rows { at, upto } => self.read_items(at.max(self.meta.base), scrub::STEP).map(|items| {
                let next = items.last().map(Item::last).filter(|last| *last < upto);
                next.map_or(Scrub::Parked { after: 0 }, |at| Scrub::Rows { at, upto })
            }),
            Scrub::Parked { after } => parked::check(&self.db, after, scrub::STEP)
                .map(|next| next.map_or(Scrub::Whole { tries: 0 }, |after| Scrub::Parked { after })),
            Scrub::Whole { tries } => self.check_whole(busy).map(|done| match done {
                Some(()) => Scrub::Done,
                None => Scrub::Whole { tries: tries + 1 },
            }),
            Scrub::Done => return,
        };
        // A disk that cannot be read is told by the operations of the stream, and what cannot be salvaged is tried again
        // by them, and by the next start.
        self.scrub = *checked.as_ref().unwrap_or(&Scrub::Done);
        if let Err(cause) = checked
            && sqlite::is_damage(&cause)
        {
            self.salvage(&cause);
        }
    }

    fn check_whole(&mut self, busy: impl FnMut() -> bool + Send + 'static) -> rusqlite::Result<Option<()>> {
        let counted = sqlite::unless(&mut self.db, busy, |db| {
            sqlite::check_pages(db)?;
            check_index(db)?;
            Usage::count(db)
        })?;
        let Some(counted) = counted else { return Ok(None) };
        if counted != self.usage {
            // If it fails it is found again.
            drop(self.must(self.meta.base, |store| {
                store.write(false, |_, usage, _, _| {
                    *usage = counted;
                    Ok(())
                })
            }));
        }
        Ok(Some(()))
    }

    /// One transaction, which survives power loss if it is `durable`; what is kept along changes only if it commits.
    fn write<T>(
        &mut self,
        durable: bool,
        work: impl Fn(&Connection, &mut Usage, &mut Meta, i64) -> rusqlite::Result<T>,
    ) -> rusqlite::Result<T> {
        let (mut usage, mut meta) = (self.usage, self.meta.clone());
        let (now, anchor) = (self.clock.now(), self.clock.unstored());
        let level = |level: &str| self.db.pragma_update(None, "synchronous", level);
        let mut run = || -> rusqlite::Result<T> {
            // `&mut self` is the check. Immediate: whoever marks parked events from another process is waited for, while
            // a transaction that has begun to read would fail.
            let tx = Transaction::new_unchecked(&self.db, TransactionBehavior::Immediate)?;
            if let Some(anchor) = &anchor {
                put(&tx, "clock", anchor)?;
            }
            let before = (usage, meta.last);
            let value = work(&tx, &mut usage, &mut meta, now)?;
            if (usage, meta.last) != before {
                usage.store(&tx, meta.last)?;
            }
            tx.commit()?;
            Ok(value)
        };
        let value = if durable {
            level("FULL")?;
            let done = run();
            level("NORMAL")?;
            done?
        } else {
            run()?
        };
        self.clock.note_stored();
        (self.usage, self.meta) = (usage, meta);
        Ok(value)
    }

    /// Does what may be done again on a file that was salvaged in between.
    fn attempt<T>(&mut self, work: impl Fn(&mut Self) -> rusqlite::Result<T>) -> rusqlite::Result<T> {
        match work(self) {
            Err(cause) if sqlite::is_damage(&cause) && self.salvage(&cause) => work(self),
            other => other,
        }
    }

    /// Does what makes the spill smaller, or safer: on a full disk too.
    fn must<T>(&mut self, acked: u64, work: impl Fn(&mut Self) -> rusqlite::Result<T>) -> Result<T> {
        let mut done = self.attempt(&work);
        if done.as_ref().is_err_and(sqlite::is_full) {
            self.reserve.release();
            done = self.trim_in_parts(acked).and_then(|()| self.attempt(&work));
            self.make_way();
        }
        done.map_err(|error| failed(&self.path, "write", error))
    }

    /// One large transaction would need room for all of it in the WAL; small ones use the same room again.
    fn trim_in_parts(&mut self, seq: u64) -> rusqlite::Result<()> {
        loop {
            sqlite::checkpoint(&self.db)?;
            let upto: Option<u64> = self.db.query_row(
                "SELECT max(last) FROM
                 (SELECT last FROM item WHERE first <= ?1 AND last <= ?1 ORDER BY first LIMIT ?2)",
                [seq, u64::from(TRIM_ROWS)],
                |row| row.get(0),
            )?;
            let Some(upto) = upto else { return Ok(()) };
            self.write(false, |tx, usage, meta, _| trim(tx, usage, meta, upto.max(meta.base)))?;
        }
    }

    /// Nothing is added unless what follows from it can be undone: with the reserve in place, or within the file.
    fn require_room(&mut self, bytes: u64) -> Result<()> {
        if self.stuck {
            self.make_way();
        }
        if self.stuck {
            return Err(no_room(&self.path, "write", std::io::Error::other("its WAL cannot be folded back")));
        }
        let Err(error) = self.reserve.hold() else { return Ok(()) };
        let free = sqlite::pragma(&self.db, "freelist_count").unwrap_or(0) as u64 * PAGE as u64;
        if free > 2 * bytes + (1 << 20) { Ok(()) } else { Err(no_room(&self.path, "write", error)) }
    }

    /// The disk is full: the reserve lets the WAL be folded back, which makes its space free for what comes next.
    fn make_way(&mut self) {
        self.reserve.release();
        self.fold();
        drop(self.reserve.hold()); // tried again before anything is added
    }

    fn fold(&mut self) {
        match sqlite::checkpoint(&self.db) {
            Ok(()) => (self.unfolded, self.stuck) = (0, false),
            Err(error) if sqlite::is_full(&error) && self.reserve.is_held() => self.make_way(),
            Err(error) => self.stuck = sqlite::is_full(&error), // what is stored is safe in the WAL
        }
    }

    /// Replaces the damaged file by what can be read of it, within the same epoch: this process knows its numbers.
    fn salvage(&mut self, cause: &rusqlite::Error) -> bool {
        if self.unsalvaged.is_some_and(|at| at.elapsed() < SALVAGE_RETRY) {
            return false;
        }
        self.unsalvaged = Some(Instant::now());
        let Ok(none) = Connection::open_in_memory() else { return false };
        // The worst is that its WAL is folded back first.
        drop(sqlite::distrust(&self.db));
        drop(std::mem::replace(&mut self.db, none));
        let salvaged = salvage::salvage(&self.path, &Numbering::Kept(&self.meta), cause.to_string(), unix_millis());
        let Ok(salvaged) = salvaged else {
            // As it was: what can be read is read, and the next start tries again.
            if let Ok(db) = PURPOSE.connect(&self.path, false) {
                self.db = db;
            }
            return false;
        };
        let Ok((db, survey)) = PURPOSE.open(&self.path, &mut self.lock).and_then(|db| {
            let survey = survey(&db)?;
            sqlite::trust(&db)?;
            Ok((db, survey))
        }) else {
            return false; // the next operation finds no tables, and comes back here
        };
        (self.db, self.usage, self.unfolded, self.stuck, self.unsalvaged) = (db, survey.usage, 0, false, None);
        self.meta.last = survey.last;
        self.scrub = Scrub::default(); // every row was just read
        self.damage = Some(salvaged.damage);
        self.parked = parked::usage(&self.db).map_or(0, |usage| usage.0);
        true
    }
}

/// What is wanted of a start.
struct Wish<'a> {
    emitter: Option<&'a str>,
    /// For a name and an epoch, should they be needed.
    random: [u64; 2],
    segments: Option<usize>,
}

/// An open file, and what it tells.
struct Loaded {
    db: Connection,
    usage: Usage,
    oldest: Option<i64>,
    clock: FileClock,
    meta: Meta,
    parked: u64,
}

/// Opens the file and puts it together with what is left in the ring. If it is damaged, nothing has changed in it.
fn begin(
    path: &Path,
    lock: &mut Lock,
    reserve: &mut Reserve,
    clock: &Clock,
    wish: &Wish<'_>,
    left: Option<&Left>,
) -> rusqlite::Result<(Loaded, Recovered, bool)> {
    let mut loaded = Loaded::load(path, lock, clock);
    if loaded.as_ref().is_err_and(sqlite::is_full) {
        reserve.release();
        loaded = Loaded::load(path, lock, clock);
    }
    let mut loaded = loaded?;
    let mut recovered = loaded.recover(wish, left);
    if recovered.as_ref().is_err_and(sqlite::is_full) {
        reserve.release();
        sqlite::checkpoint(&loaded.db)?;
        recovered = loaded.recover(wish, left);
    }
    let (recovered, adopted) = recovered?;
    sqlite::trust(&loaded.db)?;
    Ok((loaded, recovered, adopted))
}

impl Loaded {
    fn load(path: &Path, lock: &mut Lock, clock: &Clock) -> rusqlite::Result<Self> {
        let db = PURPOSE.open(path, lock)?;
        let Survey { usage, last, oldest, newest } = survey(&db)?;
        let clock = FileClock::resume(clock.clone(), get::<String>(&db, "clock")?.as_deref(), newest);
        let meta = Meta { last, ..Meta::default() };
        Ok(Self { db, usage, oldest, clock, meta, parked: 0 })
    }

    /// Puts together what the file and the ring tell. The ring either stays in use, which is told, or what is in it is
    /// taken over into the file.
    fn recover(
        &mut self,
        &Wish { emitter, random, segments }: &Wish<'_>,
        left: Option<&Left>,
    ) -> rusqlite::Result<(Recovered, bool)> {
        let mut usage = self.usage;
        let (now, anchor) = (self.clock.now(), self.clock.unstored());
        self.db.pragma_update(None, "synchronous", "FULL")?; // there is a promise in it
        let tx = self.db.unchecked_transaction()?;
        let taken_over: Option<i64> = get(&tx, "taken_over")?;
        let left = left.filter(|left| taken_over != Some(left.id as i64));
        let (stored_name, stored_epoch): (Option<String>, Option<String>) = (get(&tx, "emitter")?, get(&tx, "epoch")?);
        // A ring without its file goes on by itself if it tells everything: which seqs were given, and by whom.
        let ours = left.filter(|left| match (&left.identity, &stored_epoch) {
            (Some(identity), Some(epoch)) => identity.epoch == *epoch,
            (Some(_), None) => left.same_boot,
            (None, _) => false,
        });
        let known = left.and_then(|left| left.identity.clone());
        let former = stored_name.or_else(|| known.as_ref().map(|known| known.emitter.clone()));
        let name = emitter.map(str::to_owned).or_else(|| former.clone()).unwrap_or_else(|| epoch_from(random[0]));
        // Another name means other high-water marks at the hub: seqs under it start a history of their own.
        let kept = if former.as_deref() == Some(&name) {
            stored_epoch.clone().or_else(|| ours.and(known).map(|known| known.epoch))
        } else {
            None
        };
        let epoch = kept.clone().unwrap_or_else(|| epoch_from(random[1]));
        let base: u64 = get(&tx, "base")?.unwrap_or(0);
        let stored = Stored {
            base,
            last: self.meta.last.max(base),
            reserved: get(&tx, "reserved")?.unwrap_or(0),
            next_seq: get(&tx, "next_seq")?,
        };
        let Reunion { base, mut last, next_seq, mut held } = reunite(stored, left, ours.is_some());
        // What is in the ring stays there as it was, also an event that was parked since.
        let refused = match (&stored_epoch, &ours) {
            (Some(epoch), Some(_)) => parked::gaps_in(&held, parked::seqs_behind(&tx, epoch, last)?),
            _ => Vec::new(),
        };
        let adopts = left.is_some_and(|left| {
            let roomy = segments.is_some_and(|segments| left.is_usable(segments) && left.ring.used() * 2 <= segments);
            roomy && ours.is_some() && kept.is_some()
        });
        // What a cleanly ended process had left of its promise was never used; with a ring the exact seq is known.
        let reserved = next_seq - 1 + if segments.is_none() { RESERVE_FIRST } else { 0 };
        let mut meta = Meta { emitter: name, epoch, reserved, base, last };
        // Rows that the ring knows to be confirmed must not leave a hole before what comes.
        trim(&tx, &mut usage, &mut meta, base)?;
        if !adopts {
            let behind = held.drain(..).filter_map(|item| item.after(last));
            for item in behind.flat_map(|item| item.without(&refused)) {
                insert(&tx, &item, now)?;
                usage.add(&item);
            }
            last = next_seq - 1;
            if let Some(left) = left {
                put(&tx, "taken_over", left.id as i64)?;
            }
        }
        meta.last = last;
        meta.store(&tx)?;
        usage.store(&tx, last)?;
        if let Some(anchor) = anchor {
            put(&tx, "clock", anchor)?;
        }
        tx.execute("DELETE FROM meta WHERE key = 'next_seq'", [])?; // there again after the next clean stop
        let mut gaps: Vec<Gap> = gap_rows(&tx)?.iter().filter_map(|row| row.item.gap()).collect();
        gaps.extend(refused.into_iter().filter(|_| adopts));
        let (bytes, parked) = (usage.bytes, parked::usage(&tx)?.0);
        tx.commit()?; // at last, so that a file that is found damaged here is salvaged as it was
        self.db.pragma_update(None, "synchronous", "NORMAL")?;
        self.clock.note_stored();
        (self.usage, self.meta, self.parked) = (usage, meta.clone(), parked);
        let Meta { emitter, epoch, .. } = meta;
        let recovered = Recovered {
            emitter,
            epoch,
            next_seq,
            reserved,
            base,
            last,
            gaps,
            bytes,
            oldest: None,
            parked,
            held,
            ring: None,
            damage: None,
        };
        Ok((recovered, adopts))
    }
}

#[derive(Default)]
struct Survey {
    usage: Usage,
    last: u64,
    oldest: Option<i64>,
    newest: Option<i64>,
}

/// Looks at the file's own values, its first rows, its last one and its gaps, which is the same work however much is
/// stored.
fn survey(db: &Connection) -> rusqlite::Result<Survey> {
    let base: Option<u64> = get(db, "base")?;
    let totals = Usage::load(db)?;
    let numbers = [base.is_some(), get::<u64>(db, "reserved")?.is_some(), totals.is_some()];
    if numbers != [get::<String>(db, "epoch")?.is_some(); 3] {
        return Err(damaged("some of its own values are missing"));
    }
    for key in ["emitter", "next_seq", "clock", "taken_over"] {
        get::<rusqlite::types::Value>(db, key)?;
    }
    let base = base.unwrap_or(0);
    let (usage, last) = totals.unwrap_or_default();
    let gaps = gap_rows(db)?;
    let sql = "SELECT first, last, stored_at, reason, data, crc FROM item ORDER BY first DESC LIMIT 1";
    let end = db.query_row(sql, [], read_row).optional()?;
    if end.as_ref().map_or(base, |row| row.item.last()).max(base) != last {
        return Err(damaged("its last rows are missing"));
    }
    let (mut oldest, mut known, mut bytes) = (None, base, 0);
    let mut query = db.prepare("SELECT first, last, stored_at, reason, data, crc FROM item ORDER BY first")?;
    let mut rows = query.query([])?;
    while bytes < HEAD
        && let Some(row) = rows.next()?
    {
        let Row { item, stored_at } = read_row(row)?;
        let follows = if bytes == 0 { item.first() <= known + 1 } else { item.first() == known + 1 };
        if !follows || item.first() == 0 {
            return Err(damaged("rows are missing"));
        }
        known = item.last();
        bytes += item.bytes() + 64;
        oldest = oldest.or((item.events() > 0).then_some(stored_at));
    }
    // In the order of the rows, only gaps are newer than what follows them.
    let newest = gaps.iter().chain(&end).map(|row| row.stored_at).max();
    Ok(Survey { usage, last, oldest, newest })
}

/// The index of the gaps must have just those in the table, which SQLite's quick check does not look at.
fn check_index(db: &Connection) -> rusqlite::Result<()> {
    let gaps = |source: &str| {
        let sql = format!("SELECT count(*), total(first) FROM item {source} WHERE data IS NULL");
        db.query_row(&sql, [], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, f64>(1)?)))
    };
    if gaps("INDEXED BY gap")? == gaps("NOT INDEXED")? {
        Ok(())
    } else {
        Err(damaged("the index of the gaps has others than the table"))
    }
}

/// All gaps. They are few and small.
fn gap_rows(tx: &Connection) -> rusqlite::Result<Vec<Row>> {
    let mut query = tx.prepare(
        "SELECT first, last, stored_at, reason, data, crc FROM item INDEXED BY gap WHERE data IS NULL ORDER BY first",
    )?;
    query.query_map([], read_row)?.collect()
}

/// Gives up the oldest stored events that are not on their way until all bounds hold again.
fn make_room(
    tx: &Connection,
    limits: &Limits,
    usage: &mut Usage,
    in_flight: u64,
    now: i64,
) -> rusqlite::Result<Vec<Gap>> {
    let mut gaps: Vec<Gap> = Vec::new();
    let too_old = limits.age.map(|age| now - age.as_millis().min(i64::MAX as u128 / 2) as i64);
    loop {
        let over = if limits.drop_oldest { usage.events.saturating_sub(limits.events) } else { 0 };
        let heavy = limits.drop_oldest && usage.bytes > limits.bytes;
        if over == 0 && !heavy && too_old.is_none() {
            break;
        }
        let oldest = tx
            .prepare_cached(
                "SELECT first, last, stored_at, reason, data, crc FROM item
                 WHERE first > ?1 AND data IS NOT NULL ORDER BY first LIMIT 1",
            )?
            .query_row([in_flight], read_row)
            .optional()?;
        let Some(Row { item: Item::Events(block), stored_at }) = oldest else { break };
        let expired = too_old.is_some_and(|limit| stored_at < limit);
        if over == 0 && !heavy && !expired {
            break;
        }
        let whole = expired || heavy || over >= block.count();
        let upto = if whole { block.last() } else { block.first() + over - 1 };
        let reason = if expired { GapReason::Expired } else { GapReason::SpillFull };
        let gap = Gap { from: block.first(), to: upto, reason };
        tx.prepare_cached("DELETE FROM item WHERE first = ?1")?.execute([block.first()])?;
        usage.remove(block.count(), block.bytes().len() as u64);
        if let Some(rest) = block.after(upto).map(Item::Events) {
            usage.add(&rest);
            insert(tx, &rest, stored_at)?;
        }
        insert_gap(tx, gap, now)?;
        match gaps.last_mut() {
            Some(last) if last.to + 1 == gap.from && last.reason == gap.reason => last.to = gap.to,
            _ => gaps.push(gap),
        }
    }
    Ok(gaps)
}

fn trim(tx: &Connection, usage: &mut Usage, meta: &mut Meta, seq: u64) -> rusqlite::Result<()> {
    let (events, bytes): (u64, u64) = tx
        .prepare_cached(
            "SELECT coalesce(sum(last - first + 1), 0), coalesce(sum(length(data)), 0)
             FROM item WHERE first <= ?1 AND last <= ?1 AND data IS NOT NULL",
        )?
        .query_row([seq], |row| Ok((row.get(0)?, row.get(1)?)))?;
    tx.prepare_cached("DELETE FROM item WHERE first <= ?1 AND last <= ?1")?.execute([seq])?;
    usage.remove(events, bytes);
    meta.base = seq;
    meta.last = meta.last.max(seq);
    put(tx, "base", seq)
}

/// Reads `first, last, stored_at, reason, data, crc`.
pub(super) fn read_row(row: &rusqlite::Row<'_>) -> rusqlite::Result<Row> {
    let (first, last, stored_at): (u64, u64, i64) = (row.get(0)?, row.get(1)?, row.get(2)?);
    let (reason, data) = (row.get_ref(3)?.as_str_or_null()?, row.get_ref(4)?.as_blob_or_null()?);
    if row.get::<_, i64>(5)? != check_of(first, last, stored_at, reason, data) {
        return Err(damaged("a row is not as it was written"));
    }
    let item = match (reason, data) {
        (None, Some(data)) => {
            let block = Block::parse(Bytes::copy_from_slice(data)).map_err(|error| damaged(error.to_string()))?;
            if (block.first(), block.last()) != (first, last) {
                return Err(damaged("a block has other seqs than its row"));
            }
            Item::Events(block)
        }
        (Some(reason), None) if first <= last => {
            let reason = GapReason::parse(reason).unwrap_or(GapReason::SpillFull);
            Item::Gap(Gap { from: first, to: last, reason })
        }
        _ => return Err(damaged("a row is neither events nor a gap")),
    };
    Ok(Row { item, stored_at })
}

fn check_of(first: u64, last: u64, stored_at: i64, reason: Option<&str>, data: Option<&[u8]>) -> i64 {
    let (first, last, stored_at) = (first.to_le_bytes(), last.to_le_bytes(), stored_at.to_le_bytes());
    let reason = reason.unwrap_or_default().as_bytes();
    sqlite::crc(&[&first, &last, &stored_at, reason, data.unwrap_or_default()])
}

fn failed(path: &Path, verb: &str, error: rusqlite::Error) -> Error {
    if sqlite::is_full(&error) {
        return no_room(path, verb, error);
    }
    Error::new(ErrorKind::SpillIo, format!("cannot {verb} the spill {}", path.display())).with_source(error)
}

/// What is said of a disk without room: what is needed, and what to do.
fn no_room(path: &Path, verb: &str, error: impl std::error::Error + Send + Sync + 'static) -> Error {
    let text = format!(
        "cannot {verb} the spill {}: its disk is full, or a limit forbids to use it; free at least {} bytes there, or \
         choose another path",
        path.display(),
        needed(path)
    );
    Error::new(ErrorKind::SpillIo, text).with_source(error)
}

/// The reserve and an append; for a damaged file also a copy of it.
fn needed(path: &Path) -> u64 {
    let copy = if sqlite::beside(path, ".salvage").exists() {
        std::fs::metadata(path).map_or(0, |file| file.len())
    } else {
        0
    };
    RESERVE_BYTES + RESERVE_BYTES / 2 + copy
}

fn unopened(path: &Path, error: rusqlite::Error) -> Error {
    if sqlite::is_full(&error) { no_room(path, "open", error) } else { PURPOSE.unusable(path, error) }
}

pub(super) fn insert(tx: &Connection, item: &Item, stored_at: i64) -> rusqlite::Result<()> {
    match item {
        Item::Gap(gap) => insert_gap(tx, *gap, stored_at),
        Item::Events(block) => {
            let (first, last, data) = (block.first(), block.last(), &block.bytes()[..]);
            let crc = check_of(first, last, stored_at, None, Some(data));
            tx.prepare_cached("INSERT INTO item (first, last, stored_at, data, crc) VALUES (?1, ?2, ?3, ?4, ?5)")?
                .execute(params![first, last, stored_at, data, crc])
                .map(|_| ())
        }
    }
}

/// A gap grows the one before it where they touch, so that a long outage leaves one row and not thousands.
fn insert_gap(tx: &Connection, gap: Gap, stored_at: i64) -> rusqlite::Result<()> {
    let before = tx
        .prepare_cached(
            "SELECT first, stored_at FROM item WHERE first = (SELECT max(first) FROM item WHERE first < ?1)
             AND last = ?1 - 1 AND reason = ?2",
        )?
        .query_row(params![gap.from, gap.reason.as_str()], |row| Ok((row.get::<_, u64>(0)?, row.get::<_, i64>(1)?)))
        .optional()?;
    let reason = gap.reason.as_str();
    let (first, stored_at) = before.unwrap_or((gap.from, stored_at));
    let crc = check_of(first, gap.to, stored_at, Some(reason), None);
    let written = if before.is_some() {
        tx.prepare_cached("UPDATE item SET last = ?2, crc = ?3 WHERE first = ?1")?.execute(params![first, gap.to, crc])
    } else {
        tx.prepare_cached("INSERT INTO item (first, last, stored_at, reason, crc) VALUES (?1, ?2, ?3, ?4, ?5)")?
            .execute(params![first, gap.to, stored_at, reason, crc])
    };
    written.map(|_| ())
}

#[cfg(test)]
mod tests;
