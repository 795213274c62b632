//! The files under their names: whether what lies at a path is still what this process has open there. Whoever removes
//! or replaces a file under its owner takes it from the next process, not from this one, which would go on in a file
//! that nobody finds again (`docs/decisions/0013-files-removed.md`).

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rusqlite::Connection;

use super::salvage::fresh_path;
use super::store::PURPOSE;
use crate::sqlite::{self, beside, remove};

/// What lies at a path where a file of ours was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Our file.
    Kept,
    /// Nothing.
    Empty,
    /// Another file, which is not touched.
    Taken,
}

/// A file by what it is, not by its name: as long as it is open its inode is not given again.
type Key = (u64, u64);

/// Compares what lies at the path with the open file.
pub(super) fn place_of(path: &Path, ours: Key) -> Place {
    match std::fs::metadata(path) {
        Ok(found) if (found.dev(), found.ino()) == ours => Place::Kept,
        Ok(_) => Place::Taken,
        // Whatever else it is says nothing of the file, and is told by the operations.
        Err(error) if error.kind() != io::ErrorKind::NotFound => Place::Kept,
        Err(_) => Place::Empty,
    }
}

/// The database with what belongs to it, as SQLite has it open.
#[derive(Debug)]
pub(super) struct Files(Vec<(PathBuf, Option<Key>)>);

impl Files {
    /// To be called when the file has just been opened.
    pub(super) fn of(path: &Path) -> Self {
        let mut files = Self(["", "-wal", "-shm"].map(|suffix| (beside(path, suffix), None)).into());
        files.look();
        files
    }

    /// The first file that is not where it was, and what lies there.
    pub(super) fn look(&mut self) -> Option<(PathBuf, Place)> {
        for (path, known) in &mut self.0 {
            match known {
                Some(key) => match place_of(path, *key) {
                    Place::Kept => {}
                    place => return Some((path.clone(), place)),
                },
                // SQLite makes some of them at the first use.
                None => *known = std::fs::metadata(&*path).ok().map(|found| (found.dev(), found.ino())),
            }
        }
        None
    }
}

/// Writes everything that the open database holds into a new file beside its path, where it waits for
/// [`put_in_place`]. A process that dies in between leaves that to the next one, as after a salvage.
pub(super) fn copy(db: &Connection, path: &Path) -> rusqlite::Result<()> {
    // Should the file itself still be there: nothing is then only in the WAL, which goes.
    sqlite::checkpoint(db)?;
    let fresh = beside(path, ".renewed");
    let written = remove(&fresh).map_err(failed).and_then(|()| write(db, &fresh));
    if written.is_err() {
        remove(&fresh).unwrap_or_default(); // the error is the one to tell
    }
    written?;
    std::fs::rename(&fresh, fresh_path(path)).map_err(failed)
}

fn write(db: &Connection, fresh: &Path) -> rusqlite::Result<()> {
    PURPOSE.make(fresh)?;
    db.execute("ATTACH ?1 AS fresh", [fresh.as_os_str().as_encoded_bytes()])?;
    let copied = db.execute_batch(
        "PRAGMA fresh.journal_mode = OFF; PRAGMA fresh.synchronous = OFF; PRAGMA fresh.cache_size = -2048;
         BEGIN;
         INSERT OR REPLACE INTO fresh.meta SELECT * FROM main.meta;
         INSERT INTO fresh.item SELECT * FROM main.item ORDER BY first;
         INSERT INTO fresh.parked SELECT * FROM main.parked ORDER BY id;
         COMMIT",
    );
    if copied.is_err() {
        db.execute_batch("ROLLBACK").unwrap_or_default(); // SQLite may have done so
    }
    db.execute_batch("DETACH fresh")?;
    copied?;
    std::fs::File::open(fresh).and_then(|file| file.sync_all()).map_err(failed)
}

/// Gives the copy its name. The database that it was made of is closed.
pub(super) fn put_in_place(path: &Path) -> rusqlite::Result<()> {
    ["-wal", "-shm"].iter().try_for_each(|suffix| remove(&beside(path, suffix))).map_err(failed)?;
    std::fs::rename(fresh_path(path), path).map_err(failed)?;
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::File::open(parent).and_then(|directory| directory.sync_all()).map_err(failed)
}

fn failed(error: io::Error) -> rusqlite::Error {
    rusqlite::Error::ToSqlConversionFailure(error.into())
}
