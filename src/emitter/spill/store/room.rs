//! Room: what makes the spill smaller succeeds on a full disk too, and nothing is added that could not be undone.

use std::path::Path;

use super::{PAGE, SpillStore};
use crate::emitter::spill::reserve::RESERVE_BYTES;
use crate::emitter::spill::rows::trim;
use crate::error::{Error, ErrorKind, Result};
use crate::sqlite;

/// Rows forgotten at a time while the disk is full.
const TRIM_ROWS: u32 = 256;

impl SpillStore {
    /// Does what makes the spill smaller, or safer: on a full disk too.
    pub(super) fn must<T>(&mut self, acked: u64, work: impl Fn(&mut Self) -> rusqlite::Result<T>) -> Result<T> {
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
    pub(super) fn require_room(&mut self, bytes: u64) -> Result<()> {
        if self.stuck {
            self.make_way();
        }
        if self.stuck {
            return Err(no_room(&self.path, "write", std::io::Error::other("its WAL cannot be folded back")));
        }
        if self.overlong && !sqlite::restart_wal(&self.db).unwrap_or(false) {
            return Err(read_for_long(&self.path));
        }
        self.overlong = false;
        let Err(error) = self.reserve.hold() else { return Ok(()) };
        let free = sqlite::pragma(&self.db, "freelist_count").unwrap_or(0) as u64 * PAGE as u64;
        if free > 2 * bytes + (1 << 20) { Ok(()) } else { Err(no_room(&self.path, "write", error)) }
    }

    /// The disk is full: the reserve lets the WAL be folded back, which makes its space free for what comes next.
    pub(super) fn make_way(&mut self) {
        self.reserve.release();
        self.fold();
        drop(self.reserve.hold()); // tried again before anything is added
    }

    pub(super) fn fold(&mut self) {
        match sqlite::checkpoint(&self.db) {
            Ok(pages) => {
                (self.unfolded, self.stuck) = (0, false);
                self.overlong = pages * PAGE as u64 > RESERVE_BYTES;
            }
            Err(error) if sqlite::is_full(&error) && self.reserve.is_held() => self.make_way(),
            Err(error) => self.stuck = sqlite::is_full(&error), // what is stored is safe in the WAL
        }
    }
}

pub(super) fn failed(path: &Path, verb: &str, error: rusqlite::Error) -> Error {
    if sqlite::is_full(&error) {
        return no_room(path, verb, error);
    }
    Error::new(ErrorKind::SpillIo, format!("cannot {verb} the spill {}", path.display())).with_source(error)
}

/// A process that reads keeps the WAL from being begun anew, and it must not grow beyond what the reserve can hold.
fn read_for_long(path: &Path) -> Error {
    let wal = sqlite::beside(path, "-wal");
    let text = format!(
        "cannot write the spill {}: another process reads from it for so long that {} has grown to {} bytes and cannot \
         be begun anew; end that process (`fuser` names it)",
        path.display(),
        wal.display(),
        std::fs::metadata(&wal).map_or(0, |wal| wal.len())
    );
    Error::new(ErrorKind::SpillIo, text)
}

/// What is said of a disk without room: what is needed, and what to do.
pub(super) fn no_room(path: &Path, verb: &str, error: impl std::error::Error + Send + Sync + 'static) -> Error {
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
