//! How this project opens a SQLite file: alone (a lock file names the owner's pid), marked as its own kind, as a WAL
//! that stays short. The spill and the hub's log are both built on it; each has one thread and one connection.

use std::fs::{File, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, OptionalExtension, params};

use crate::error::{Error, ErrorKind, Result};
use crate::owned::{self, Owned};

/// The WAL is folded back into the file at this many pages of 16 KiB: 16 MiB.
const CHECKPOINT_PAGES: i64 = 1024;

/// What a file is for: how it is recognised, and the words and kinds of its errors.
#[derive(Debug)]
pub(crate) struct Purpose {
    /// The setting that names the path.
    pub(crate) setting: &'static str,
    /// "a spill".
    pub(crate) noun: &'static str,
    /// What to do if another owner has the file.
    pub(crate) alone: &'static str,
    /// Marks the file as ours in SQLite's header.
    pub(crate) application_id: i64,
    /// Version of the tables. They are frozen: a change needs a new number and a migration.
    pub(crate) format: i64,
    /// Makes the tables.
    pub(crate) schema: &'static str,
    /// Kind of the error when another owner has the file.
    pub(crate) locked: ErrorKind,
    /// Kind of the error when the path cannot be used.
    pub(crate) unusable: ErrorKind,
}

/// The right to use a file, held until it is dropped: another owner is refused as long as this one lives, and a dead
/// one frees it.
#[derive(Debug)]
pub(crate) struct Lock(File, Option<Owned>);

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing is not enough: a forked child has inherited the descriptor, and with it the lock. Should this fail,
        // closing does what it can.
        drop(self.0.unlock());
    }
}

/// Opens or creates a file, alone.
///
/// # Errors
/// Of the kinds of the purpose: another owner has it (the pid is named), or something is wrong with the path.
pub(crate) fn open(path: &Path, purpose: &Purpose) -> Result<(Connection, Lock)> {
    purpose.check_place(path)?;
    let mut lock = purpose.lock(path)?;
    let db = purpose.connect(path).map_err(|error| purpose.unusable(path, error))?;
    lock.1 = Owned::note(path);
    Ok((db, lock))
}

impl Purpose {
    /// The error for a path that cannot be used.
    pub(crate) fn unusable(&self, path: &Path, error: impl std::error::Error + Send + Sync + 'static) -> Error {
        let text = format!(
            "{} {} cannot be used as {}; if it is a file of something else choose another path, if it is damaged move it away",
            self.setting,
            path.display(),
            self.noun
        );
        Error::new(self.unusable, text).with_source(error)
    }

    fn check_place(&self, path: &Path) -> Result<()> {
        let refuse = |why: &str, remedy: &str| {
            Err(Error::new(self.unusable, format!("{} {}: {why}; {remedy}", self.setting, path.display())))
        };
        if path.is_dir() {
            return refuse("is a directory", "give the path of a file in it");
        }
        match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() && !parent.is_dir() => {
                refuse("its directory does not exist", "create it, or choose another path")
            }
            _ => Ok(()),
        }
    }

    fn lock(&self, path: &Path) -> Result<Lock> {
        let mut name = path.as_os_str().to_owned();
        name.push(".lock");
        let open = File::options().read(true).write(true).create(true).truncate(false).open(&name);
        let mut file = open.map_err(|error| {
            let text = format!(
                "{} {}: cannot write beside it; make the directory writable, or choose another path",
                self.setting,
                path.display()
            );
            Error::new(self.unusable, text).with_source(error)
        })?;
        match patiently(&file) {
            Ok(()) => {
                // The pid is for people and for the error below; the lock itself is the kernel's.
                let noted =
                    file.set_len(0).and_then(|()| file.rewind()).and_then(|()| write!(file, "{}", std::process::id()));
                noted.map_err(|error| self.unusable(path, error))?;
                Ok(Lock(file, None))
            }
            Err(TryLockError::WouldBlock) => {
                let mut owner = String::new();
                if file.read_to_string(&mut owner).is_err() || owner.is_empty() {
                    "unknown".clone_into(&mut owner);
                }
                let here = if owned::is_owned(path) { " (this process)" } else { "" };
                let text =
                    format!("{} {} is owned by process {owner}{here}; {}", self.setting, path.display(), self.alone);
                Err(Error::new(self.locked, text))
            }
            Err(TryLockError::Error(error)) => Err(self.unusable(path, error)),
        }
    }

    fn connect(&self, path: &Path) -> rusqlite::Result<Connection> {
        let db = Connection::open(path)?;
        db.busy_timeout(Duration::from_secs(5))?; // a tripwire: the lock file keeps other owners out
        let tables: i64 = db.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
        if tables == 0 {
            db.pragma_update(None, "page_size", 16384)?; // rows are up to 64 KiB: fewer overflow pages
            db.pragma_update(None, "auto_vacuum", "INCREMENTAL")?; // takes effect only before the first table
            // Together: a process that is killed here leaves an empty file, not half of the tables.
            let tx = db.unchecked_transaction()?;
            tx.pragma_update(None, "application_id", self.application_id)?;
            tx.pragma_update(None, "user_version", self.format)?;
            tx.execute_batch(self.schema)?;
            tx.commit()?;
        }
        let (id, version) = (pragma(&db, "application_id")?, pragma(&db, "user_version")?);
        if (id, version) != (self.application_id, self.format) {
            return Err(rusqlite::Error::InvalidPath(path.to_owned()));
        }
        db.query_row("PRAGMA journal_mode = WAL", [], |_| Ok(()))?;
        db.pragma_update(None, "synchronous", "NORMAL")?;
        db.pragma_update(None, "journal_size_limit", 16 << 20)?;
        db.pragma_update(None, "wal_autocheckpoint", CHECKPOINT_PAGES)?;
        db.pragma_update(None, "cache_size", -2048)?; // KiB: rows are read and written once, a cache would only weigh
        db.set_prepared_statement_cache_capacity(32);
        Ok(db)
    }
}

/// Whoever asks for the owner holds the lock for an instant, which must not look like an owner.
fn patiently(file: &File) -> Result<(), TryLockError> {
    for _ in 0..5 {
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(5)),
            other => return other,
        }
    }
    file.try_lock()
}

/// A number that SQLite tells of the file.
pub(crate) fn pragma(db: &Connection, name: &str) -> rusqlite::Result<i64> {
    db.pragma_query_value(None, name, |row| row.get(0))
}

/// Gives free pages back to the file system, at most `pages`; returns whether more are left.
pub(crate) fn shrink(db: &Connection, pages: u32) -> rusqlite::Result<bool> {
    // Stepped row by row: executed as a batch the pragma frees next to nothing.
    let mut statement = db.prepare(&format!("PRAGMA incremental_vacuum({pages})"))?;
    let mut rows = statement.query([])?;
    while rows.next()?.is_some() {}
    drop(rows);
    pragma(db, "freelist_count").map(|left| left > 0)
}

/// A value of the table `meta`.
pub(crate) fn get<T: rusqlite::types::FromSql>(tx: &Connection, key: &str) -> rusqlite::Result<Option<T>> {
    tx.query_row("SELECT value FROM meta WHERE key = ?1", [key], |row| row.get(0)).optional()
}

/// Sets a value of the table `meta`.
pub(crate) fn put(tx: &Connection, key: &str, value: impl rusqlite::ToSql) -> rusqlite::Result<()> {
    tx.prepare_cached("INSERT OR REPLACE INTO meta (key, value) VALUES (?1, ?2)")?
        .execute(params![key, value])
        .map(|_| ())
}

/// Unix time in milliseconds: the only clock that goes on over restarts.
pub(crate) fn unix_millis() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}
