//! The log's file: a ring of the newest entries, and the mark of each emitter, changed together.
//!
//! A row is a run of consecutive entries, not one: SQLite's cost per row is then shared by some hundred events, as in
//! the spill. The on-disk format is guarded by `user_version`.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use bytes::{Buf as _, BufMut as _, Bytes};
use rusqlite::{Connection, OptionalExtension as _, params};

use crate::clock::{Clock, FileClock, boot_id, unix_millis};
use crate::error::{Error, ErrorKind, Result};
use crate::hub::entry::Record;
use crate::hub::log::{LogLimits, cost};
use crate::sqlite::{self, Lock, Purpose, damaged, get, put};
use crate::wire::subscriber::Carried;

/// Time that SQLite's own check of the pages may take at the start; what it does not reach is found when it is read.
const CHECK: Duration = Duration::from_millis(250);
const PURPOSE: Purpose = Purpose {
    setting: "log_path",
    noun: "a hub's log",
    alone: "give each hub its own log_path, or stop the other",
    application_id: APPLICATION_ID,
    format: 1,
    wal_pages: 1024, // 16 MiB
    schema: "
    CREATE TABLE entry (
        first INTEGER PRIMARY KEY,      -- offset of the first entry of the run
        stored_at INTEGER NOT NULL,     -- milliseconds on the file's clock
        data BLOB NOT NULL              -- for each entry: kind u8 (0 event, 1 gap), length u32 LE, JSON
    );
    CREATE TABLE emitter (
        name TEXT PRIMARY KEY, epoch TEXT NOT NULL,
        have BLOB NOT NULL,             -- u64 LE: SQLite's own integers end at 2^63
        seen_at INTEGER NOT NULL        -- milliseconds on the file's clock
    ) WITHOUT ROWID;",
    locked: ErrorKind::LogLocked,
    unusable: ErrorKind::LogCorrupt,
};
/// "SBlg".
const APPLICATION_ID: i64 = 0x5342_6c67;
/// A run is closed at this size; larger rows would only make the oldest entry wait longer for its deletion.
const ROW_BYTES: usize = 64 << 10;
/// The ring may be larger than its bounds by one part in so many, so that deletions come in batches.
const SLACK: u64 = 16;
/// Free pages beyond which the file is made smaller at start: the bounds were lowered.
const FREE_PAGES: i64 = 1024;

/// The mark of an emitter, to be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Its name.
    pub name: String,
    /// The epoch of its seqs.
    pub epoch: String,
    /// Everything up to this seq is in the log.
    pub have: u64,
}

/// What an earlier process left.
#[derive(Debug)]
pub struct Recovered {
    /// Epoch of all offsets: the one of before, or a new one if offsets could repeat.
    pub epoch: String,
    /// Offset of the newest entry.
    pub head: u64,
    /// The newest entries, oldest first, with their times; the last one has the offset `head`.
    pub entries: Vec<(i64, Record)>,
    /// The present on the same clock, in milliseconds.
    pub now: i64,
    /// The marks, least recently seen first.
    pub marks: Vec<Mark>,
    /// Where a damaged file was moved to.
    pub set_aside: Option<PathBuf>,
}

/// A row of `entry`, kept in memory so that trimming reads nothing.
#[derive(Clone, Copy, Debug)]
struct Row {
    first: u64,
    events: u64,
    bytes: u64,
    stored_at: i64,
}

/// The open file and its lock. One owner, one thread.
#[derive(Debug)]
pub struct LogStore {
    db: Connection,
    path: PathBuf,
    limits: LogLimits,
    rows: VecDeque<Row>,
    events: u64,
    bytes: u64,
    head: u64,
    run: Vec<u8>,
    clock: FileClock,
    lock: Lock,
}

impl LogStore {
    /// Opens or creates the log, alone. `fresh` is the epoch if offsets begin again. A file of ours that is damaged is
    /// moved aside: what subscribers hold of it is told apart by the epoch.
    ///
    /// # Errors
    /// [`ErrorKind::LogLocked`] names the owner's pid; [`ErrorKind::LogCorrupt`] what else is wrong with the path.
    pub fn open(path: &Path, limits: LogLimits, fresh: &str) -> Result<(Self, Recovered)> {
        Self::open_at(path, limits, fresh, &Clock::system())
    }

    fn open_at(path: &Path, limits: LogLimits, fresh: &str, clock: &Clock) -> Result<(Self, Recovered)> {
        let unusable = |error: rusqlite::Error| PURPOSE.unusable(path, error);
        let lock = PURPOSE.lock(path)?;
        match Self::try_open(path, limits, fresh, clock, lock) {
            Ok(opened) => Ok(opened),
            Err((error, _)) if !sqlite::is_damage(&error) => Err(unusable(error)),
            Err((_, lock)) => {
                let aside = sqlite::set_aside(path, unix_millis());
                let (aside, _) = aside.map_err(|failed| PURPOSE.unusable(path, failed))?;
                drop(lock);
                let lock = PURPOSE.lock(path)?;
                let opened = Self::try_open(path, limits, fresh, clock, lock);
                let (store, mut recovered) = opened.map_err(|(error, _)| unusable(error))?;
                recovered.set_aside = Some(aside);
                Ok((store, recovered))
            }
        }
    }

    fn try_open(
        path: &Path,
        limits: LogLimits,
        fresh: &str,
        clock: &Clock,
        mut lock: Lock,
    ) -> std::result::Result<(Self, Recovered), (rusqlite::Error, Lock)> {
        let opened = PURPOSE.open(path, &mut lock).and_then(|mut db| {
            let until = Instant::now() + CHECK;
            sqlite::unless(&mut db, move || Instant::now() >= until, sqlite::check_pages)?;
            let newest = db.query_row("SELECT stored_at FROM entry ORDER BY first DESC LIMIT 1", [], |row| row.get(0));
            let newest = newest.optional()?;
            let clock = FileClock::resume(clock.clone(), get::<String>(&db, "clock")?.as_deref(), newest);
            Ok((db, clock))
        });
        let (db, clock) = match opened {
            Ok(opened) => opened,
            Err(error) => return Err((error, lock)),
        };
        let mut store = Self {
            db,
            path: path.to_owned(),
            limits,
            rows: VecDeque::new(),
            events: 0,
            bytes: 0,
            head: 0,
            run: Vec::new(),
            clock,
            lock,
        };
        match store.recover(fresh) {
            Ok(recovered) => Ok((store, recovered)),
            Err(error) => Err((error, store.lock)),
        }
    }

    fn recover(&mut self, fresh: &str) -> rusqlite::Result<Recovered> {
        let boot = boot_id();
        let stored: Option<String> = get(&self.db, "epoch")?;
        let running: Option<String> = get(&self.db, "boot")?;
        // A commit survives the death of the process but not of the machine: after that, offsets could repeat.
        let repeatable = boot.is_some() && running.is_some() && running != boot;
        let epoch = stored.filter(|_| !repeatable).unwrap_or_else(|| fresh.to_owned());
        self.db.pragma_update(None, "synchronous", "FULL")?;
        let tx = self.db.unchecked_transaction()?;
        put(&tx, "epoch", &epoch)?;
        if let Some(anchor) = self.clock.unstored() {
            put(&tx, "clock", anchor)?;
        }
        match &boot {
            Some(boot) => put(&tx, "boot", boot)?,
            None => forget_boot(&tx)?,
        }
        tx.commit()?;
        self.clock.note_stored();
        if boot.is_some() {
            self.db.pragma_update(None, "synchronous", "NORMAL")?;
        }
        let entries = self.load()?;
        let marks = self.marks()?;
        sqlite::trust(&self.db)?;
        let now = self.clock.now();
        self.trim(now, 0)?;
        while sqlite::pragma(&self.db, "freelist_count")? > FREE_PAGES {
            sqlite::shrink(&self.db, FREE_PAGES as u32)?;
        }
        Ok(Recovered { epoch, head: self.head, entries, now, marks, set_aside: None })
    }

    fn load(&mut self) -> rusqlite::Result<Vec<(i64, Record)>> {
        let mut query = self.db.prepare("SELECT first, stored_at, data FROM entry ORDER BY first")?;
        let mut rows = query.query([])?;
        let mut entries = VecDeque::new();
        while let Some(row) = rows.next()? {
            let (first, stored_at): (u64, i64) = (row.get(0)?, row.get(1)?);
            if !self.rows.is_empty() && first != self.head + 1 {
                return Err(damaged("the offsets have a hole"));
            }
            let records = decode(Bytes::from(row.get::<_, Vec<u8>>(2)?))?;
            let bytes = records.iter().map(|record| cost(record) as u64).sum();
            let row = Row { first, events: records.len() as u64, bytes, stored_at };
            self.head = first + row.events - 1;
            self.events += row.events;
            self.bytes += row.bytes;
            self.rows.push_back(row);
            entries.extend(records.into_iter().map(|record| (stored_at, record)));
            // More than this is never kept: a file from times of larger bounds must not be in memory as a whole.
            while entries.len() > self.limits.events {
                entries.pop_front();
            }
        }
        Ok(entries.into())
    }

    fn marks(&self) -> rusqlite::Result<Vec<Mark>> {
        let mut query = self.db.prepare("SELECT name, epoch, have FROM emitter ORDER BY seen_at")?;
        let read = |row: &rusqlite::Row<'_>| {
            let have = row.get::<_, [u8; 8]>(2)?;
            Ok(Mark { name: row.get(0)?, epoch: row.get(1)?, have: u64::from_le_bytes(have) })
        };
        query.query_map([], read)?.collect()
    }

    /// Offset of the newest entry.
    #[must_use]
    pub fn head(&self) -> u64 {
        self.head
    }

    /// Stores records behind those already there and the marks that go with them, in one transaction, and forgets
    /// emitters. The first record gets the offset after [`head`](Self::head).
    ///
    /// # Errors
    /// [`ErrorKind::LogIo`]: nothing of this call is stored, and the same call may be tried again.
    pub fn commit<'a>(
        &mut self,
        records: impl Iterator<Item = &'a Record>,
        marks: &[Mark],
        forgotten: &[String],
    ) -> Result<()> {
        self.write(records, marks, forgotten).map_err(|error| {
            // Fold the WAL back, which may free what is wanted: on a full disk the ring goes on within its own file.
            // If that fails too, the first error is the one to tell.
            drop(self.db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())));
            self.failed("write", error)
        })
    }

    fn write<'a>(
        &mut self,
        records: impl Iterator<Item = &'a Record>,
        marks: &[Mark],
        forgotten: &[String],
    ) -> rusqlite::Result<()> {
        let now = self.clock.now();
        let anchor = self.clock.unstored();
        let tx = self.db.unchecked_transaction()?; // `&mut self` is the check
        if let Some(anchor) = anchor {
            put(&tx, "clock", anchor)?;
        }
        let mut added: Vec<Row> = Vec::new();
        let mut row = Row { first: self.head + 1, events: 0, bytes: 0, stored_at: now };
        self.run.clear();
        for record in records {
            encode(record, &mut self.run);
            row.events += 1;
            row.bytes += cost(record) as u64;
            if self.run.len() >= ROW_BYTES {
                insert(&tx, &row, &self.run)?;
                added.push(row);
                row = Row { first: row.first + row.events, events: 0, bytes: 0, stored_at: now };
                self.run.clear();
            }
        }
        if row.events > 0 {
            insert(&tx, &row, &self.run)?;
            added.push(row);
        }
        for mark in marks {
            tx.prepare_cached("INSERT OR REPLACE INTO emitter (name, epoch, have, seen_at) VALUES (?1, ?2, ?3, ?4)")?
                .execute(params![mark.name, mark.epoch, mark.have.to_le_bytes(), now])?;
        }
        for name in forgotten {
            tx.prepare_cached("DELETE FROM emitter WHERE name = ?1")?.execute([name])?;
        }
        tx.commit()?;
        self.clock.note_stored();
        if self.run.capacity() > 16 * ROW_BYTES {
            self.run = Vec::new(); // one huge event must not be remembered by its size
        }
        for row in added {
            self.head = row.first + row.events - 1;
            self.events += row.events;
            self.bytes += row.bytes;
            self.rows.push_back(row);
        }
        Ok(())
    }

    /// Deletes what the bounds do not keep, once it is worth a transaction.
    ///
    /// # Errors
    /// [`ErrorKind::LogIo`]: the ring stays larger than it should be; the next call tries again.
    pub fn make_room(&mut self) -> Result<()> {
        self.trim(self.clock.now(), SLACK).map_err(|error| self.failed("trim", error))
    }

    fn trim(&mut self, now: i64, slack: u64) -> rusqlite::Result<()> {
        let part = |limit: u64| limit.checked_div(slack).unwrap_or(0);
        let (most_events, most_bytes) = (self.limits.events as u64, self.limits.bytes as u64);
        let oldest = self.rows.front().map_or(now, |row| now - row.stored_at);
        let age = self.limits.age.map(millis);
        let due = self.events > most_events.saturating_add(part(most_events))
            || self.bytes > most_bytes.saturating_add(part(most_bytes))
            || age.is_some_and(|age| oldest > age.saturating_add(part(age as u64) as i64));
        if !due {
            return Ok(());
        }
        let (mut events, mut bytes, mut gone) = (self.events, self.bytes, 0);
        // The newest row stays whatever its size: the next offset is known by it.
        for row in self.rows.iter().take(self.rows.len().saturating_sub(1)) {
            let expired = age.is_some_and(|age| now - row.stored_at > age);
            if !expired && events - row.events < most_events && bytes - row.bytes < most_bytes {
                break;
            }
            events -= row.events;
            bytes -= row.bytes;
            gone += 1;
        }
        let Some(kept) = self.rows.get(gone).filter(|_| gone > 0) else { return Ok(()) };
        self.db.prepare_cached("DELETE FROM entry WHERE first < ?1")?.execute([kept.first])?;
        self.rows.drain(..gone);
        (self.events, self.bytes) = (events, bytes);
        Ok(())
    }

    /// Ends cleanly: after this, even the machine may die without offsets repeating.
    ///
    /// # Errors
    /// [`ErrorKind::LogIo`]: the next process starts as after a kill.
    pub fn close(self) -> Result<()> {
        let noted = self.db.pragma_update(None, "synchronous", "FULL").and_then(|()| forget_boot(&self.db));
        noted.map_err(|error| self.failed("close", error))?;
        let Self { db, path, lock, .. } = self;
        let closed = db.close().map_err(|(_, error)| failed(&path, "close", error));
        drop(lock); // not before the file is closed
        closed
    }

    fn failed(&self, verb: &str, error: rusqlite::Error) -> Error {
        failed(&self.path, verb, error)
    }
}

fn failed(path: &Path, verb: &str, error: rusqlite::Error) -> Error {
    Error::new(ErrorKind::LogIo, format!("cannot {verb} the hub's log {}", path.display())).with_source(error)
}

fn insert(tx: &Connection, row: &Row, data: &[u8]) -> rusqlite::Result<()> {
    tx.prepare_cached("INSERT INTO entry (first, stored_at, data) VALUES (?1, ?2, ?3)")?
        .execute(params![row.first, row.stored_at, data])
        .map(|_| ())
}

fn encode(record: &Record, into: &mut Vec<u8>) {
    into.put_u8(match record.carried() {
        Carried::Event => 0,
        Carried::Gap => 1,
    });
    into.put_u32_le(record.json().len() as u32);
    into.extend_from_slice(record.json());
}

fn decode(mut data: Bytes) -> rusqlite::Result<Vec<Record>> {
    const HEADER: usize = 1 + 4;
    let mut records = Vec::new();
    while !data.is_empty() {
        if data.len() < HEADER {
            return Err(damaged("a run is truncated"));
        }
        let (kind, length) = (data.get_u8(), data.get_u32_le() as usize);
        if data.len() < length {
            return Err(damaged("a run is truncated"));
        }
        let json = data.split_to(length);
        records.push(match kind {
            0 => Record::event(json).map_err(|_| damaged("an event is no JSON object"))?,
            1 => Record::stored_gap(json),
            _ => return Err(damaged("an entry is of an unknown kind")),
        });
    }
    if records.is_empty() { Err(damaged("a run is empty")) } else { Ok(records) }
}

fn forget_boot(db: &Connection) -> rusqlite::Result<()> {
    db.execute("DELETE FROM meta WHERE key = 'boot'", []).map(|_| ())
}

fn millis(duration: Duration) -> i64 {
    duration.as_millis().min(i64::MAX as u128 / 4) as i64
}

#[cfg(test)]
mod tests;
