//! The spill's file: items in seq order in a SQLite table, bounded by events, bytes and age.
//!
//! A row is a whole [block](crate::wire::block), not an event: SQLite's cost per row is then shared by some hundred
//! events (`docs/decisions/0003-spill-rows-are-blocks.md`). The on-disk format is guarded by `user_version`.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension, Transaction, TransactionBehavior, params};

use crate::emitter::config::{EmitterConfig, WhenFull};
use crate::emitter::item::{Gap, GapReason, Identity, Item};
use crate::emitter::ring::{self, Left, Ring};
use crate::emitter::spill::parked::{self, Bounds, Parking, Wanted};
use crate::emitter::spill::reunion::{Reunion, Stored, reunite};
use crate::error::{Error, ErrorKind, Result};
use crate::sqlite::{self, Lock, Purpose, get, put, unix_millis};
use crate::wire::block::Block;
use crate::wire::position::epoch_from;

/// Marks the file as ours in SQLite's header ("SBsp").
pub(super) const APPLICATION_ID: i64 = 0x5342_7370;
/// Version of the tables below. They are frozen: a change needs a new number and a migration.
pub(super) const FORMAT: i64 = 1;
const SCHEMA: &str = "
    CREATE TABLE meta (key TEXT PRIMARY KEY, value) WITHOUT ROWID;
    CREATE TABLE item (
        first INTEGER PRIMARY KEY, last INTEGER NOT NULL,   -- seqs covered
        stored_at INTEGER NOT NULL,                         -- Unix time, milliseconds
        reason TEXT,                                        -- of a gap; NULL for events
        data BLOB                                           -- a block; NULL for a gap
    );
    CREATE TABLE parked (
        id INTEGER PRIMARY KEY,                             -- in the order of parking
        epoch TEXT NOT NULL, seq INTEGER NOT NULL,          -- the place that the event had in the stream
        reason TEXT NOT NULL,                               -- the peer's words
        parked_at INTEGER NOT NULL,                         -- Unix time, milliseconds
        wanted INTEGER NOT NULL DEFAULT 0,                  -- 1: to be sent again, as a new event
        json BLOB NOT NULL,
        UNIQUE (epoch, seq)
    );";
const PURPOSE: Purpose = Purpose {
    setting: "spill_path",
    noun: "a spill",
    alone: "give each broadcaster its own spill_path, or stop the other",
    application_id: APPLICATION_ID,
    format: FORMAT,
    schema: SCHEMA,
    locked: ErrorKind::SpillLocked,
    unusable: ErrorKind::SpillCorrupt,
};

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
}

/// How much is stored, kept along with every change: counting rows would cost more than storing them.
#[derive(Clone, Copy, Debug, Default)]
struct Usage {
    events: u64,
    bytes: u64,
}

impl Usage {
    fn add(&mut self, item: &Item) {
        self.events += item.events();
        self.bytes += item.bytes() as u64;
    }

    fn remove(&mut self, events: u64, bytes: u64) {
        self.events = self.events.saturating_sub(events);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
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
    ring: Option<Ring>,
    _lock: Lock,
}

impl SpillStore {
    /// Opens or creates the spill, alone: a second owner is refused. `emitter` is the name asked for; without one the
    /// stored name stays, or a random one is made from `seed`. `segments`: how large a ring is wanted beside it; one
    /// that an earlier process left is read in any case.
    ///
    /// # Errors
    /// [`ErrorKind::SpillLocked`] names the owner's pid; [`ErrorKind::SpillCorrupt`] what else is wrong with the path;
    /// [`ErrorKind::SpillIo`]: there is no room for the ring.
    pub fn open(
        path: &Path,
        limits: Limits,
        emitter: Option<&str>,
        seed: u64,
        segments: Option<usize>,
    ) -> Result<(Self, Recovered)> {
        let (db, lock) = sqlite::open(path, &PURPOSE)?;
        let mut random = fastrand::Rng::with_seed(seed);
        let (path, usage) = (path.to_owned(), Usage::default());
        let mut store = Self { db, path, limits, usage, parked: 0, ring: None, _lock: lock };
        let place = ring_path(&store.path);
        let left = ring::recover(&place)?;
        let adopted = store.recover(emitter, &mut random, left.as_ref(), segments);
        let (mut recovered, adopted) = adopted.map_err(|error| PURPOSE.unusable(&store.path, error))?;
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
        Ok((store, recovered))
    }

    /// Puts together what the file and the ring tell. The ring either stays in use, which is told, or what is in it is
    /// taken over into the file.
    fn recover(
        &mut self,
        emitter: Option<&str>,
        rng: &mut fastrand::Rng,
        left: Option<&Left>,
        segments: Option<usize>,
    ) -> rusqlite::Result<(Recovered, bool)> {
        let now = unix_millis();
        let tx = self.db.transaction()?;
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
        let name = emitter.map(str::to_owned).or_else(|| former.clone()).unwrap_or_else(|| epoch_from(rng.u64(..)));
        // Another name means other high-water marks at the hub: seqs under it start a history of their own.
        let kept = if former.as_deref() == Some(&name) {
            stored_epoch.clone().or_else(|| ours.and(known).map(|known| known.epoch))
        } else {
            None
        };
        let epoch = kept.clone().unwrap_or_else(|| epoch_from(rng.u64(..)));
        let (first, last): (Option<u64>, Option<u64>) =
            tx.query_row("SELECT min(first), max(last) FROM item", [], |row| Ok((row.get(0)?, row.get(1)?)))?;
        let base: u64 = get(&tx, "base")?.unwrap_or(0).max(first.map_or(0, |first| first - 1));
        let stored = Stored {
            base,
            last: last.unwrap_or(base).max(base),
            reserved: get(&tx, "reserved")?.unwrap_or(0),
            next_seq: get(&tx, "next_seq")?,
        };
        let Reunion { base, mut last, next_seq, mut held } = reunite(stored, left, ours.is_some());
        // What is in the ring stays there as it was, also an event that was parked since.
        let refused = match (&stored_epoch, &ours) {
            (Some(epoch), Some(_)) => parked::gaps_behind(&tx, epoch, last)?,
            _ => Vec::new(),
        };
        let adopts = left.is_some_and(|left| {
            let roomy = segments.is_some_and(|segments| left.is_usable(segments) && left.ring.used() * 2 <= segments);
            roomy && ours.is_some() && kept.is_some()
        });
        if !adopts {
            for item in held.drain(..).flat_map(|item| item.without(&refused)) {
                insert(&tx, &item, now)?;
            }
            last = next_seq - 1;
            if let Some(left) = left {
                put(&tx, "taken_over", left.id as i64)?;
            }
        }
        put(&tx, "emitter", &name)?;
        put(&tx, "epoch", &epoch)?;
        put(&tx, "base", base)?;
        put(&tx, "reserved", next_seq - 1)?; // what a cleanly ended process had left of its promise was never used
        tx.execute("DELETE FROM meta WHERE key = 'next_seq'", [])?; // there again after the next clean stop
        tx.commit()?;
        let mut gaps = self.gaps()?;
        gaps.extend(refused.into_iter().filter(|_| adopts));
        let (events, bytes, oldest): (u64, u64, Option<i64>) = self.db.query_row(
            "SELECT coalesce(sum(last - first + 1), 0), coalesce(sum(length(data)), 0), min(stored_at)
             FROM item WHERE data IS NOT NULL",
            [],
            |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
        )?;
        self.usage = Usage { events, bytes };
        self.parked = parked::usage(&self.db)?.0;
        let oldest = oldest.map(|at| Duration::from_millis((now - at).max(0) as u64));
        let (emitter, parked) = (name, self.parked);
        Ok((Recovered { emitter, epoch, next_seq, base, last, gaps, bytes, oldest, parked, held, ring: None }, adopts))
    }

    fn gaps(&self) -> rusqlite::Result<Vec<Gap>> {
        let mut query = self.db.prepare("SELECT first, last, reason FROM item WHERE data IS NULL ORDER BY first")?;
        query.query_map([], gap_from)?.collect()
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
        let promised = self.ring.as_ref().is_some_and(Ring::has_promised);
        self.write_at(promised, |tx, limits, usage| {
            let now = unix_millis();
            // First: what is confirmed must not take the room of what is not, and a hole between the two would not be
            // told from a lost event after a crash.
            trim(tx, usage, acked)?;
            for item in items {
                insert(tx, item, now)?;
                usage.add(item);
            }
            make_room(tx, limits, usage, in_flight, now)
        })
    }

    /// Items after `seq`, oldest first, until `max_bytes` are together (at least one item if there is any).
    ///
    /// # Errors
    /// [`ErrorKind::SpillIo`].
    pub fn read(&self, seq: u64, max_bytes: usize) -> Result<Vec<Item>> {
        self.read_items(seq, max_bytes).map_err(|error| failed(&self.path, "read", error))
    }

    fn read_items(&self, seq: u64, max_bytes: usize) -> rusqlite::Result<Vec<Item>> {
        let mut query = self.db.prepare_cached(
            "SELECT first, last, reason, data FROM item
             WHERE first >= coalesce((SELECT max(first) FROM item WHERE first <= ?1), 0) ORDER BY first",
        )?;
        let mut rows = query.query([seq + 1])?;
        let (mut items, mut bytes) = (Vec::new(), 0);
        while bytes < max_bytes {
            let Some(row) = rows.next()? else { break };
            let item = match row.get_ref(3)?.as_blob_or_null()? {
                Some(data) => Item::Events(parse(Bytes::copy_from_slice(data))?),
                None => Item::Gap(gap_from(row)?),
            };
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
        let parking = self.write_at(true, |tx, limits, usage| {
            let now = unix_millis();
            let stored = parked::row_of(tx, seq)?.map(|(at, data)| parse(data.into()).map(|block| (at, block)));
            let stored = stored.transpose()?;
            let of_row = stored.as_ref().and_then(|(_, block)| block.events().find(|(at, _)| *at == seq));
            let json = held.map(Bytes::copy_from_slice).or(of_row.map(|(_, json)| json));
            let dropped = match json {
                Some(json) => parked::park(tx, limits.parked, (seq, &json), reason, now)?,
                None => Vec::new(), // given up meanwhile by a bound
            };
            if let Some((at, block)) = stored {
                tx.prepare_cached("DELETE FROM item WHERE first = ?1")?.execute([block.first()])?;
                usage.remove(block.count(), block.bytes().len() as u64);
                let before = if seq > block.first() { block.head(seq - block.first()) } else { None };
                let gap = Item::Gap(Gap { from: seq, to: seq, reason: GapReason::Refused });
                for item in before.map(Item::Events).into_iter().chain([gap]).chain(block.after(seq).map(Item::Events))
                {
                    usage.add(&item);
                    insert(tx, &item, at)?;
                }
            }
            Ok(Parking { parked: parked::usage(tx)?.0, dropped })
        })?;
        self.parked = parking.parked;
        Ok(parking)
    }

    /// Forgets parked events that are in the stream again.
    ///
    /// # Errors
    /// [`ErrorKind::SpillIo`]: they are still parked.
    pub fn unpark(&mut self, ids: &[i64]) -> Result<()> {
        self.parked = self.write_at(false, |tx, _, _| {
            parked::unpark(tx, ids)?;
            Ok(parked::usage(tx)?.0)
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
    pub fn wanted(&self, max_bytes: usize) -> Result<Vec<Wanted>> {
        parked::wanted(&self.db, max_bytes).map_err(|error| failed(&self.path, "read", error))
    }

    /// Forgets everything up to and including `seq`: the peer has it.
    ///
    /// # Errors
    /// [`ErrorKind::SpillIo`]: still stored, and sent again at worst.
    pub fn trim(&mut self, seq: u64) -> Result<()> {
        self.write_at(false, |tx, _, usage| trim(tx, usage, seq))
    }

    /// Promises that seqs up to `seq` may have been used, so that a process after a crash uses none of them again,
    /// and notes that the peer has everything up to `acked`. Survives power loss: a repeated seq would be dropped by
    /// the hub as a duplicate.
    ///
    /// # Errors
    /// [`ErrorKind::SpillIo`].
    pub fn reserve(&mut self, seq: u64, acked: u64) -> Result<()> {
        self.write_at(true, |tx, _, usage| {
            put(tx, "reserved", seq)?;
            trim(tx, usage, acked)
        })
    }

    /// Ends cleanly: the peer has everything up to `acked`, and the next process goes on with exactly `next_seq`. If not
    /// everything before it is stored, because the disk refused it, the ring stays for the next process.
    ///
    /// # Errors
    /// [`ErrorKind::SpillIo`]: the next process skips to the reserved seq instead.
    pub fn close(mut self, next_seq: u64, acked: u64) -> Result<()> {
        let all = self.write_at(true, |tx, _, usage| {
            trim(tx, usage, acked)?;
            let last: Option<u64> = tx.query_row("SELECT max(last) FROM item", [], |row| row.get(0))?;
            put(tx, "next_seq", next_seq)?;
            Ok(last.unwrap_or(0).max(acked) + 1 >= next_seq)
        })?;
        let Self { db, path, ring, .. } = self;
        db.close().map_err(|(_, error)| failed(&path, "close", error))?;
        match ring.filter(|_| all) {
            // Should it stay, the next start finds nothing in it that is not known.
            Some(ring) => ring.remove().or(Ok(())),
            None => Ok(()),
        }
    }

    /// Gives free pages back to the file system, at most `pages`; returns whether more are left.
    ///
    /// # Errors
    /// [`ErrorKind::SpillIo`].
    pub fn shrink(&mut self, pages: u32) -> Result<bool> {
        sqlite::shrink(&self.db, pages).map_err(|error| failed(&self.path, "shrink", error))
    }

    /// One transaction, which survives power loss if it is `durable`; the counters change only if it commits.
    fn write_at<T>(
        &mut self,
        durable: bool,
        work: impl FnOnce(&Connection, &Limits, &mut Usage) -> rusqlite::Result<T>,
    ) -> Result<T> {
        let level = |level: &str| self.db.pragma_update(None, "synchronous", level);
        let mut usage = self.usage;
        let run = || -> rusqlite::Result<T> {
            // `&mut self` is the check. Immediate: whoever marks parked events from another process is waited for, while
            // a transaction that has begun to read would fail.
            let tx = Transaction::new_unchecked(&self.db, TransactionBehavior::Immediate)?;
            let value = work(&tx, &self.limits, &mut usage)?;
            tx.commit()?;
            Ok(value)
        };
        let done = if durable {
            level("FULL").map_err(|error| failed(&self.path, "sync", error))?;
            let done = run();
            level("NORMAL").map_err(|error| failed(&self.path, "sync", error))?;
            done
        } else {
            run()
        };
        let value = done.map_err(|error| failed(&self.path, "write", error))?;
        self.usage = usage;
        Ok(value)
    }
}

/// Where the ring lies.
fn ring_path(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".ring");
    name.into()
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
                "SELECT stored_at, data FROM item WHERE first > ?1 AND data IS NOT NULL ORDER BY first LIMIT 1",
            )?
            .query_row([in_flight], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, Vec<u8>>(1)?)))
            .optional()?;
        let Some((stored_at, data)) = oldest else { break };
        let expired = too_old.is_some_and(|limit| stored_at < limit);
        if over == 0 && !heavy && !expired {
            break;
        }
        let block = parse(data.into())?;
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

fn trim(tx: &Connection, usage: &mut Usage, seq: u64) -> rusqlite::Result<()> {
    let (events, bytes): (u64, u64) = tx
        .prepare_cached(
            "SELECT coalesce(sum(last - first + 1), 0), coalesce(sum(length(data)), 0)
             FROM item WHERE first <= ?1 AND last <= ?1 AND data IS NOT NULL",
        )?
        .query_row([seq], |row| Ok((row.get(0)?, row.get(1)?)))?;
    tx.prepare_cached("DELETE FROM item WHERE first <= ?1 AND last <= ?1")?.execute([seq])?;
    usage.remove(events, bytes);
    put(tx, "base", seq)
}

fn gap_from(row: &rusqlite::Row<'_>) -> rusqlite::Result<Gap> {
    let reason = GapReason::parse(row.get_ref(2)?.as_str()?).unwrap_or(GapReason::SpillFull);
    Ok(Gap { from: row.get(0)?, to: row.get(1)?, reason })
}

fn failed(path: &Path, verb: &str, error: rusqlite::Error) -> Error {
    Error::new(ErrorKind::SpillIo, format!("cannot {verb} the spill {}", path.display())).with_source(error)
}

fn insert(tx: &Connection, item: &Item, stored_at: i64) -> rusqlite::Result<()> {
    match item {
        Item::Gap(gap) => insert_gap(tx, *gap, stored_at),
        Item::Events(block) => tx
            .prepare_cached("INSERT INTO item (first, last, stored_at, data) VALUES (?1, ?2, ?3, ?4)")?
            .execute(params![block.first(), block.last(), stored_at, &block.bytes()[..]])
            .map(|_| ()),
    }
}

/// A gap grows the one before it where they touch, so that a long outage leaves one row and not thousands.
fn insert_gap(tx: &Connection, gap: Gap, stored_at: i64) -> rusqlite::Result<()> {
    let grown = tx
        .prepare_cached("UPDATE item SET last = ?2 WHERE first = (SELECT max(first) FROM item WHERE first < ?1) AND last = ?1 - 1 AND reason = ?3")?
        .execute(params![gap.from, gap.to, gap.reason.as_str()])?;
    if grown == 0 {
        tx.prepare_cached("INSERT INTO item (first, last, stored_at, reason) VALUES (?1, ?2, ?3, ?4)")?
            .execute(params![gap.from, gap.to, stored_at, gap.reason.as_str()])?;
    }
    Ok(())
}

fn parse(data: Bytes) -> rusqlite::Result<Block> {
    Block::parse(data)
        .map_err(|error| rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Blob, Box::new(error)))
}

#[cfg(test)]
mod tests;
