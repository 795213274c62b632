//! How this project opens a SQLite file: alone (a lock file names the owner's pid), marked as its own kind, as a WAL
//! that stays short, with a check on every value of ours. The spill and the hub's log are both built on it; each has
//! one thread and one connection. [`damage`] tells bad bytes from somebody else's.

mod damage;
pub(crate) mod fork;

use std::fs::{File, TryLockError};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use crc_fast::{CrcAlgorithm, Digest};
use rusqlite::config::DbConfig;
use rusqlite::types::ValueRef;
use rusqlite::{Connection, OptionalExtension, params};

use crate::error::{Error, ErrorKind, Result};
use crate::inherited::Inherited;
use crate::owned::{self, Owned};
use damage::Found;
pub(crate) use damage::{beside, damaged, is_cut_to_nothing, is_damage, is_full, remove, set_aside};

/// Bytes of a page. Rows are up to 64 KiB: larger pages mean fewer overflow pages.
pub(crate) const PAGE: usize = 16 << 10;
/// Another process may write for a moment: it marks parked events.
const BUSY: Duration = Duration::from_secs(5);
/// Steps of SQLite, or pages that it checks (with up to 64 KiB of overflow each), after which somebody who works
/// [`unless`] is asked: a millisecond.
const ASK: i32 = 5;
/// Makes the table of [`get`] and [`put`].
pub(crate) const META: &str = "CREATE TABLE meta (key TEXT PRIMARY KEY, value, crc INTEGER NOT NULL) WITHOUT ROWID;";

/// A value that every file has from its beginning: without it, its values are not unwritten but lost.
const MADE: &str = "made";

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
    /// Makes the tables, beside [`META`].
    pub(crate) schema: &'static str,
    /// The WAL is folded back into the file when it has so many pages, and keeps the space.
    pub(crate) wal_pages: i64,
    /// Kind of the error when another owner has the file.
    pub(crate) locked: ErrorKind,
    /// Kind of the error when the path cannot be used.
    pub(crate) unusable: ErrorKind,
}

/// The right to use a file, held until it is dropped: another owner is refused as long as this one lives, and a dead
/// one frees it.
#[derive(Debug)]
pub(crate) struct Lock {
    _inherited: Inherited, // dropped first
    file: File,
    found: Found,
    owned: Option<Owned>,
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing is not enough: a child that was forked without Python's knowledge has inherited the descriptor, and
        // with it the lock. Should this fail, closing does what it can.
        drop(self.file.unlock());
    }
}

impl Lock {
    /// Whether the lock file is still at its place: whoever comes there finds the file free otherwise.
    pub(crate) fn is_at(&self, path: &Path) -> bool {
        let key = |file: std::fs::Metadata| (file.dev(), file.ino());
        let (ours, found) = (self.file.metadata().map(key), std::fs::metadata(beside(path, ".lock")).map(key));
        ours.is_ok_and(|ours| found.is_ok_and(|found| found == ours))
    }

    /// Remembers the file that is at the path now as ours, even if its header should be destroyed.
    fn mark(&mut self, path: &Path) {
        self.found = Found::Ours;
        self.owned = None; // first, or the note of before would take this one with it
        self.owned = Owned::note(path);
        // Without it a file whose header is destroyed is refused instead of salvaged.
        let mark = damage::mark_of(path).unwrap_or_default();
        drop(note(&mut self.file, &mark));
    }
}

/// The pid is for people and for the error of another owner; the lock itself is the kernel's.
fn note(file: &mut File, mark: &str) -> std::io::Result<()> {
    let text = format!("{}\n{mark}", std::process::id());
    file.rewind()?;
    file.write_all(text.as_bytes())?; // in the space that it has, should the disk be full
    file.set_len(text.len() as u64)
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

    /// Takes the file for ourselves. Nobody else's is touched.
    ///
    /// # Errors
    /// Of the kinds of the purpose: another owner has it (the pid is named), or something is wrong with the path.
    pub(crate) fn lock(&self, path: &Path) -> Result<Lock> {
        self.check_place(path)?;
        let ((inherited, file), mark) = self.lock_beside(path)?;
        let found =
            damage::judge(path, self.application_id, mark.as_deref()).map_err(|error| self.unusable(path, error))?;
        if found == Found::Foreign {
            let why = format!("its header is not that of {}", self.noun);
            return Err(self.unusable(path, std::io::Error::other(why)));
        }
        Ok(Lock { _inherited: inherited, file, found, owned: None })
    }

    /// Opens or creates the file that is locked. Only what can be seen of damage without reading its pages is found.
    ///
    /// # Errors
    /// [`is_damage`], [`is_full`], or a format of another version.
    pub(crate) fn open(&self, path: &Path, lock: &mut Lock) -> rusqlite::Result<Connection> {
        if lock.found == Found::Wrecked {
            return Err(damaged("its header is destroyed"));
        }
        let broken = damage::broken_wal(path).map_err(|error| rusqlite::Error::ToSqlConversionFailure(error.into()))?;
        if let Some(what) = broken {
            return Err(damaged(what));
        }
        let db = self.connect(path, lock.found == Found::New)?;
        lock.mark(path);
        Ok(db)
    }

    /// Another lock file lies at its place, or none, while the file is open: takes what is there for the same file.
    ///
    /// # Errors
    /// Of the kinds of the purpose: another owner has come (the pid is named), or something is wrong with the path.
    pub(crate) fn relock(&self, path: &Path, lock: &mut Lock) -> Result<()> {
        self.check_place(path)?;
        let ((inherited, file), _) = self.lock_beside(path)?;
        *lock = Lock { _inherited: inherited, file, found: Found::Ours, owned: None };
        lock.mark(path);
        Ok(())
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

    fn lock_beside(&self, path: &Path) -> Result<((Inherited, File), Option<String>)> {
        let open = || File::options().read(true).write(true).create(true).truncate(false).open(beside(path, ".lock"));
        let (inherited, mut file) = Inherited::open(open).map_err(|error| {
            let text = format!(
                "{} {}: cannot write beside it; make the directory writable, or choose another path",
                self.setting,
                path.display()
            );
            Error::new(self.unusable, text).with_source(error)
        })?;
        match patiently(&file) {
            Ok(()) => {
                let mut text = String::new();
                // What cannot be read is no mark.
                let mark =
                    file.read_to_string(&mut text).ok().and_then(|_| text.split_once('\n')).map(|(_, mark)| mark);
                let mark = mark.filter(|mark| !mark.is_empty()).map(str::to_owned);
                // On a full disk it may fail, and only names an owner of before.
                drop(note(&mut file, mark.as_deref().unwrap_or_default()));
                Ok(((inherited, file), mark))
            }
            Err(TryLockError::WouldBlock) => {
                let mut text = String::new();
                // What cannot be read names nobody.
                let owner = file.read_to_string(&mut text).ok().and_then(|_| text.lines().next()).unwrap_or("unknown");
                let here = if owned::is_owned(path) { " (this process)" } else { "" };
                let text =
                    format!("{} {} is owned by process {owner}{here}; {}", self.setting, path.display(), self.alone);
                Err(Error::new(self.locked, text))
            }
            Err(TryLockError::Error(error)) => Err(self.unusable(path, error)),
        }
    }

    /// Opens a file, or makes it, without looking for damage first. Closing it changes nothing before
    /// [`trust`].
    pub(crate) fn connect(&self, path: &Path, new: bool) -> rusqlite::Result<Connection> {
        if new {
            self.make(path)?;
        }
        let db = Connection::open(path)?;
        distrust(&db)?;
        db.busy_timeout(BUSY)?; // a tripwire: the lock file keeps other owners out
        let (id, version) = (pragma(&db, "application_id")?, pragma(&db, "user_version")?);
        if (id, version) != (self.application_id, self.format) {
            return Err(rusqlite::Error::InvalidPath(path.to_owned()));
        }
        db.query_row("PRAGMA journal_mode = WAL", [], |_| Ok(()))?;
        db.pragma_update(None, "synchronous", "NORMAL")?;
        db.pragma_update(None, "journal_size_limit", self.wal_pages * PAGE as i64)?;
        db.pragma_update(None, "wal_autocheckpoint", self.wal_pages)?;
        db.pragma_update(None, "cache_size", -2048)?; // KiB: rows are read and written once, a cache would only weigh
        db.set_prepared_statement_cache_capacity(32);
        Ok(db)
    }

    /// Makes an empty file beside the path, which takes its place when it is complete: whoever is killed here leaves
    /// nothing at the path that could be taken for somebody else's.
    pub(crate) fn make(&self, path: &Path) -> rusqlite::Result<()> {
        let io = |error: std::io::Error| rusqlite::Error::ToSqlConversionFailure(error.into());
        let fresh = beside(path, ".new");
        for left in ["", "-journal"] {
            remove(&beside(&fresh, left)).map_err(io)?;
        }
        let db = Connection::open(&fresh)?;
        db.pragma_update(None, "page_size", PAGE as i64)?;
        db.pragma_update(None, "auto_vacuum", "INCREMENTAL")?; // takes effect only before the first table
        let tx = db.unchecked_transaction()?;
        tx.pragma_update(None, "application_id", self.application_id)?;
        tx.pragma_update(None, "user_version", self.format)?;
        tx.execute_batch(META)?;
        tx.execute_batch(self.schema)?;
        put(&tx, MADE, 1)?;
        tx.commit()?;
        db.close().map_err(|(_, error)| error)?;
        // SQLite would read what is left of a file that is gone into this one.
        for left in ["-journal", "-wal", "-shm"] {
            remove(&beside(path, left)).map_err(io)?;
        }
        std::fs::rename(&fresh, path).map_err(io)
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

/// The file is as it should be: closing it folds its WAL back.
pub(crate) fn trust(db: &Connection) -> rusqlite::Result<()> {
    db.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, false).map(|_| ())
}

/// It is not: whoever salvages it finds it as it is.
pub(crate) fn distrust(db: &Connection) -> rusqlite::Result<()> {
    db.set_db_config(DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true).map(|_| ())
}

/// Does what takes long, and gives it up as soon as `stop` says so; then there is no result.
pub(crate) fn unless<T>(
    db: &mut Connection,
    stop: impl FnMut() -> bool + Send + 'static,
    work: impl FnOnce(&Connection) -> rusqlite::Result<T>,
) -> rusqlite::Result<Option<T>> {
    db.progress_handler(ASK, Some(stop))?;
    let done = work(db);
    db.progress_handler(0, None::<fn() -> bool>)?;
    match done {
        Err(rusqlite::Error::SqliteFailure(failure, _))
            if failure.code == rusqlite::ErrorCode::OperationInterrupted =>
        {
            Ok(None)
        }
        done => done.map(Some),
    }
}

/// SQLite's check of its own pages. It reads all of them.
pub(crate) fn check_pages(db: &Connection) -> rusqlite::Result<()> {
    let found: String = db.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    if found == "ok" { Ok(()) } else { Err(damaged(found)) }
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
///
/// # Errors
/// [`is_damage`] if it is not what was stored.
pub(crate) fn get<T: rusqlite::types::FromSql>(tx: &Connection, key: &str) -> rusqlite::Result<Option<T>> {
    tx.prepare_cached("SELECT value, crc FROM meta WHERE key = ?1")?
        .query_row([key], |row| {
            let value = row.get_ref(0)?;
            if row.get::<_, i64>(1)? != check_of(key, value) {
                return Err(damaged(format!("the value of {key} is not what was stored")));
            }
            T::column_result(value).map_err(|_| damaged(format!("the value of {key} is of another type")))
        })
        .optional()
}

/// Whether the values are there that a file begins with.
pub(crate) fn is_made(db: &Connection) -> rusqlite::Result<bool> {
    Ok(get::<i64>(db, MADE)?.is_some())
}

/// Sets a value of the table `meta`.
pub(crate) fn put(tx: &Connection, key: &str, value: impl rusqlite::ToSql) -> rusqlite::Result<()> {
    let output = value.to_sql()?;
    let stored = match &output {
        rusqlite::types::ToSqlOutput::Borrowed(value) => *value,
        rusqlite::types::ToSqlOutput::Owned(value) => value.into(),
        _ => ValueRef::Null, // no other kinds are stored here
    };
    tx.prepare_cached("INSERT OR REPLACE INTO meta (key, value, crc) VALUES (?1, ?2, ?3)")?
        .execute(params![key, output, check_of(key, stored)])
        .map(|_| ())
}

fn check_of(key: &str, value: ValueRef<'_>) -> i64 {
    match value {
        ValueRef::Null => crc(&[key.as_bytes()]),
        ValueRef::Integer(number) => crc(&[key.as_bytes(), &[1], &number.to_le_bytes()]),
        ValueRef::Real(number) => crc(&[key.as_bytes(), &[2], &number.to_le_bytes()]),
        ValueRef::Text(text) => crc(&[key.as_bytes(), &[3], text]),
        ValueRef::Blob(bytes) => crc(&[key.as_bytes(), &[4], bytes]),
    }
}

/// CRC32C of the parts in a row.
pub(crate) fn crc(parts: &[&[u8]]) -> i64 {
    let mut digest = Digest::new(CrcAlgorithm::Crc32Iscsi);
    for part in parts {
        digest.update(part);
    }
    digest.finalize() as i64
}

/// Folds the WAL back into the file; what is written next begins it anew, in the space that it has, unless another
/// process reads at that moment. Returns how many pages lie in it: while somebody reads, they become ever more.
pub(crate) fn checkpoint(db: &Connection) -> rusqlite::Result<u64> {
    db.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |row| row.get::<_, i64>(1)).map(|pages| pages.max(0) as u64)
}

/// Folds the WAL back and begins it anew at once; `false` if another process reads.
pub(crate) fn restart_wal(db: &Connection) -> rusqlite::Result<bool> {
    db.busy_timeout(Duration::ZERO)?; // readers are not waited for
    let busy = db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, bool>(0));
    db.busy_timeout(BUSY)?;
    busy.map(|busy| !busy)
}
