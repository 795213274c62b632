//! The spill's file: items in seq order in a SQLite table, bounded by events, bytes and age, on a disk that may be full
//! or give back other bytes than it was given (`docs/decisions/0012-a-bad-disk.md`).
//!
//! A row is a whole [block](crate::wire::block), not an event: SQLite's cost per row is then shared by some hundred
//! events (`docs/decisions/0003-spill-rows-are-blocks.md`). The on-disk format is guarded by `user_version`.

mod mending;
mod opening;
mod room;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rusqlite::{Connection, Transaction, TransactionBehavior};

use crate::clock::{FileClock, unix_millis};
use crate::emitter::config::{EmitterConfig, WhenFull};
use crate::emitter::item::{Gap, GapReason, Item};
use crate::emitter::ring::Ring;
use crate::emitter::spill::files::{Files, Place};
use crate::emitter::spill::parked::{self, Bounds, Parking, Wanted};
use crate::emitter::spill::reserve::Reserve;
use crate::emitter::spill::rows::{Meta, Usage, check_index, insert, make_room, read_row, trim};
use crate::emitter::spill::salvage::{self, Damage, Numbering};
use crate::emitter::spill::scrub::{self, Scrub};
use crate::error::{ErrorKind, Result};
use crate::sqlite::{self, Lock, PAGE, Purpose, damaged, put};
use opening::survey;
pub use opening::{RESERVE_FIRST, Recovered};
use room::failed;

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
/// A file that could not be salvaged is not tried again before this.
const SALVAGE_RETRY: Duration = Duration::from_secs(60);
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

/// Bounds of the spill and the policy at them.
#[derive(Clone, Debug)]
pub struct Limits {
    pub(super) events: u64,
    pub(super) bytes: u64,
    pub(super) age: Option<Duration>,
    pub(super) drop_oldest: bool,
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
    /// It has more pages than the reserve can hold, because another process reads from it.
    overlong: bool,
    damage: Option<Damage>,
    scrub: Scrub,
    /// A damaged file could not be salvaged.
    unsalvaged: Option<Instant>,
    lock: Lock,
    files: Files,
    /// Not all of them are where they were.
    bereft: bool,
}

impl SpillStore {
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
        self.mend_at_last(acked)?;
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

    /// Replaces the damaged file by what can be read of it, within the same epoch: this process knows its numbers.
    fn salvage(&mut self, cause: &rusqlite::Error) -> bool {
        if self.unsalvaged.is_some_and(|at| at.elapsed() < SALVAGE_RETRY) {
            return false;
        }
        self.unsalvaged = Some(Instant::now());
        // What was put back and has not got its name yet is complete.
        if salvage::finish(&self.path).is_err() || self.files.look().is_some_and(|(_, place)| place == Place::Empty) {
            return false; // there is nothing at the path to salvage, and the open file is all that there is
        }
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
        if self.reopen().is_err() {
            return false; // the next operation finds no tables, and comes back here
        }
        self.unsalvaged = None;
        self.scrub = Scrub::default(); // every row was just read
        self.damage = Some(salvaged.damage);
        self.parked = parked::usage(&self.db).map_or(0, |usage| usage.0);
        true
    }

    /// Opens the file that has taken the place of the old one.
    fn reopen(&mut self) -> rusqlite::Result<()> {
        let db = PURPOSE.open(&self.path, &mut self.lock)?;
        let survey = survey(&db)?;
        sqlite::trust(&db)?;
        (self.db, self.usage, self.unfolded) = (db, survey.usage, 0);
        (self.stuck, self.overlong) = (false, false);
        self.meta.last = survey.last;
        self.files = Files::of(&self.path);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
