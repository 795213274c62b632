//! A look at a spill from outside: what is in it, whether it is sound, its events, and which parked ones are to be sent
//! again. For another process than the owner's, which may run meanwhile: the owner's lock is not taken, and SQLite keeps
//! the two apart.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use rusqlite::{Connection, ErrorCode, OpenFlags, Transaction, TransactionBehavior};
use serde::Serialize;
use serde::de::IgnoredAny;

use super::parked;
use super::rows::read_row;
use super::store::{APPLICATION_ID, FORMAT};
use crate::clock::{Clock, FileClock};
use crate::emitter::item::GapReason;
use crate::error::{Error, ErrorKind, Result};
use crate::owned;
use crate::sqlite::{self, get, pragma};
use crate::wire::block::Block;

/// The owner, or a second look, may hold the file for a moment.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes read in one part: a few milliseconds.
const PART: usize = 4 << 20;
/// A file of this size is checked by SQLite as a whole beside its owner: less than a second.
const AT_ONCE: u64 = 64 << 20;
/// Findings told at most: a badly damaged file has thousands.
const FINDINGS: usize = 100;

/// What a spill holds.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The emitter's name.
    pub emitter: String,
    /// Epoch of the seqs.
    pub epoch: String,
    /// Process that has it open.
    pub owner: Option<u32>,
    /// Confirmed up to here, as far as the file knows.
    pub acked_seq: u64,
    /// First seq stored behind that.
    pub first_seq: Option<u64>,
    /// Last seq stored.
    pub last_seq: Option<u64>,
    /// Seqs up to here may have been used.
    pub reserved_seq: u64,
    /// Events stored and not confirmed.
    pub events: u64,
    /// Bytes of stored events.
    pub bytes: u64,
    /// Size of the file.
    pub file_bytes: u64,
    /// Seconds since the oldest of them was stored.
    pub oldest_age: Option<f64>,
    /// Seqs that were given up, with the reason.
    pub gaps: Vec<Missing>,
    /// What the peer refused.
    pub parked: Vec<Parked>,
}

/// A gap.
#[derive(Clone, Debug, Serialize)]
pub struct Missing {
    /// First missing seq.
    pub from: u64,
    /// Last missing seq.
    pub to: u64,
    /// Why.
    pub reason: String,
}

/// A parked event, without its content.
#[derive(Clone, Debug, Serialize)]
pub struct Parked {
    /// The epoch in which it had its seq.
    pub epoch: String,
    /// Its place in the stream.
    pub seq: u64,
    /// The peer's words.
    pub reason: String,
    /// Seconds since it was parked.
    pub age: f64,
    /// Size of its JSON.
    pub bytes: u64,
    /// Whether it is to be sent again.
    pub wanted: bool,
}

/// Tells what the spill holds.
///
/// # Errors
/// [`ErrorKind::SpillCorrupt`]: there is no spill at `path`, or it cannot be read; [`ErrorKind::SpillLocked`]: this
/// process owns it.
pub fn show(path: &Path) -> Result<Summary> {
    let (owner, file_bytes) = (owner(path), std::fs::metadata(path).map_or(0, |file| file.len()));
    let mut db = open(path, false)?;
    read(&mut db, |tx| summary(tx, owner, file_bytes)).map_err(|error| unreadable(path, error))
}

fn summary(tx: &Connection, owner: Option<u32>, file_bytes: u64) -> rusqlite::Result<Summary> {
    // The times in the file are on its own clock.
    let now = FileClock::resume(Clock::system(), get::<String>(tx, "clock")?.as_deref(), None).now();
    let age = |at: i64| (now - at).max(0) as f64 / 1000.0;
    let base: u64 = get(tx, "base")?.unwrap_or(0);
    let (first, last, events, bytes, oldest) = tx.query_row(
        "SELECT max(min(first), ?1 + 1), max(last), coalesce(sum(last - max(first, ?1 + 1) + 1) FILTER (WHERE data IS NOT NULL), 0),
                coalesce(sum(length(data)), 0), min(stored_at) FILTER (WHERE data IS NOT NULL)
         FROM item WHERE last > ?1",
        [base],
        |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?, row.get::<_, Option<i64>>(4)?)),
    )?;
    let gaps = tx
        .prepare("SELECT max(first, ?1 + 1), last, reason FROM item WHERE data IS NULL AND last > ?1 ORDER BY first")?
        .query_map([base], |row| Ok(Missing { from: row.get(0)?, to: row.get(1)?, reason: row.get(2)? }))?
        .collect::<rusqlite::Result<_>>()?;
    let parked = tx
        .prepare("SELECT epoch, seq, reason, parked_at, length(json), wanted FROM parked ORDER BY id")?
        .query_map([], |row| {
            let (epoch, seq, reason) = (row.get(0)?, row.get(1)?, row.get(2)?);
            Ok(Parked { epoch, seq, reason, age: age(row.get(3)?), bytes: row.get(4)?, wanted: row.get(5)? })
        })?
        .collect::<rusqlite::Result<_>>()?;
    Ok(Summary {
        emitter: get(tx, "emitter")?.unwrap_or_default(),
        epoch: get(tx, "epoch")?.unwrap_or_default(),
        owner,
        acked_seq: base,
        first_seq: first,
        last_seq: last,
        reserved_seq: get(tx, "reserved")?.unwrap_or(0),
        events,
        bytes,
        file_bytes,
        oldest_age: oldest.map(age),
        gaps,
        parked,
    })
}

/// Checks everything; returns what is wrong. While a broadcaster has the file open it is read in parts, since whoever
/// reads for long keeps its WAL growing; the pages of a large one are then left to its own check after the start.
///
/// # Errors
/// As for [`show`].
pub fn verify(path: &Path) -> Result<Vec<String>> {
    let db = open(path, false)?;
    let alone = owner(path).is_none() || std::fs::metadata(path).is_ok_and(|file| file.len() <= AT_ONCE);
    let mut findings = Vec::new();
    let checked = if alone { check_pages(&db, &mut findings) } else { Ok(()) };
    let checked = checked.and_then(|()| {
        check_names(&db, &mut findings)?;
        let mut before = None;
        while let Some(upto) = check_stream(&db, before, PART, &mut findings)? {
            before = Some(upto);
        }
        let mut after = 0;
        while let Some(next) = check_parked(&db, after, PART, &mut findings)? {
            after = next;
        }
        Ok(())
    });
    if let Err(error) = checked {
        findings.push(format!("it cannot be read any further: {error}"));
    }
    findings.truncate(FINDINGS);
    Ok(findings)
}

fn check_pages(tx: &Connection, findings: &mut Vec<String>) -> rusqlite::Result<()> {
    let mut check = tx.prepare(&format!("PRAGMA integrity_check({FINDINGS})"))?;
    let mut rows = check.query([])?;
    while let Some(row) = rows.next()? {
        let text: String = row.get(0)?;
        if text != "ok" {
            findings.push(format!("SQLite says: {text}"));
        }
    }
    Ok(())
}

fn check_names(tx: &Connection, findings: &mut Vec<String>) -> rusqlite::Result<()> {
    for key in ["emitter", "epoch"] {
        if get::<String>(tx, key)?.is_none_or(|text| text.is_empty()) {
            findings.push(format!("the {key} is missing"));
        }
    }
    Ok(())
}

/// Checks rows behind the seq `before`, about `max_bytes` of them, in one snapshot; returns the seq to go on from.
/// Between two parts the owner may forget rows, divide them, or make a gap longer.
fn check_stream(
    db: &Connection,
    before: Option<u64>,
    max_bytes: usize,
    findings: &mut Vec<String>,
) -> rusqlite::Result<Option<u64>> {
    let tx = db.unchecked_transaction()?;
    let base: u64 = get(&tx, "base")?.unwrap_or(0);
    let start = before.unwrap_or(0).max(base);
    let mut known = start;
    let mut query = tx.prepare(
        "SELECT first, last, stored_at, reason, data, crc FROM item
         WHERE first >= coalesce((SELECT max(first) FROM item WHERE first <= ?1), 0) ORDER BY first",
    )?;
    let mut rows = query.query([start])?;
    let mut bytes = 0;
    while bytes < max_bytes && findings.len() < FINDINGS {
        let Some(row) = rows.next()? else { return Ok(None) };
        let (first, last): (u64, u64) = (row.get(0)?, row.get(1)?);
        if last <= start && before.is_some() {
            continue; // seen, or confirmed meanwhile
        }
        bytes += 64;
        if first > known + 1 {
            findings.push(format!("seqs {} to {} are missing", known + 1, first - 1));
        }
        // What is confirmed may be stored still, in whole or in part.
        if last < first || (first <= known && known > start) {
            findings.push(format!("the row of seqs {first} to {last} overlaps its neighbour, or is empty"));
        }
        known = known.max(last);
        let reason: Option<String> = row.get(3)?;
        if let Some(data) = row.get_ref(4)?.as_blob_or_null()? {
            bytes += data.len();
            findings.extend(check_block(first, last, data));
        } else if reason.as_deref().and_then(GapReason::parse).is_none() {
            findings.push(format!("the gap from {first} to {last} has no known reason: {reason:?}"));
        }
        if read_row(row).is_err() {
            findings.push(format!("the row of seqs {first} to {last} is not as it was written"));
        }
    }
    Ok((findings.len() < FINDINGS).then_some(known))
}

fn check_block(first: u64, last: u64, data: &[u8]) -> Option<String> {
    let block = match Block::parse(Bytes::copy_from_slice(data)) {
        Ok(block) => block,
        Err(error) => return Some(format!("the row of seqs {first} to {last} is no block: {error}")),
    };
    if (block.first(), block.last()) != (first, last) {
        return Some(format!("the row of seqs {first} to {last} holds {} to {}", block.first(), block.last()));
    }
    let bad = block.events().find(|(_, json)| serde_json::from_slice::<IgnoredAny>(json).is_err());
    bad.map(|(seq, _)| format!("the event with seq {seq} is no JSON"))
}

fn check_parked(
    db: &Connection,
    after: i64,
    max_bytes: usize,
    findings: &mut Vec<String>,
) -> rusqlite::Result<Option<i64>> {
    let mut query = db.prepare("SELECT epoch, seq, json, crc, id FROM parked WHERE id > ?1 ORDER BY id")?;
    let mut rows = query.query([after])?;
    let mut bytes = 0;
    while let Some(row) = rows.next()? {
        let seq: u64 = row.get(1)?;
        if !parked::is_sound(row)? {
            findings.push(format!("the parked event with seq {seq} is not as it was written"));
        }
        let json = row.get_ref(2)?.as_blob()?;
        if serde_json::from_slice::<IgnoredAny>(json).is_err() {
            findings.push(format!("the parked event with seq {seq} is no JSON"));
        }
        bytes += json.len();
        if bytes >= max_bytes {
            return row.get(4).map(Some);
        }
    }
    Ok(None)
}

/// Events behind `after`, oldest first, about `max_bytes` of them, each with the key to go on from: those of the stream
/// by their seqs, or the parked ones.
///
/// # Errors
/// As for [`show`].
pub fn events(path: &Path, parked: bool, after: u64, max_bytes: usize) -> Result<Vec<(u64, Bytes)>> {
    let mut db = open(path, false)?;
    let found =
        read(
            &mut db,
            |tx| if parked { parked_after(tx, after, max_bytes) } else { stored_after(tx, after, max_bytes) },
        );
    found.map_err(|error| unreadable(path, error))
}

fn stored_after(tx: &Connection, after: u64, max_bytes: usize) -> rusqlite::Result<Vec<(u64, Bytes)>> {
    let after = after.max(get(tx, "base")?.unwrap_or(0));
    let mut query = tx.prepare("SELECT data FROM item WHERE last > ?1 AND data IS NOT NULL ORDER BY first")?;
    let mut rows = query.query([after])?;
    let (mut found, mut bytes) = (Vec::new(), 0);
    while bytes < max_bytes {
        let Some(row) = rows.next()? else { break };
        let data = Bytes::copy_from_slice(row.get_ref(0)?.as_blob()?);
        bytes += data.len();
        let block = Block::parse(data).map_err(|error| {
            rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Blob, Box::new(error))
        })?;
        found.extend(block.events().filter(|(seq, _)| *seq > after));
    }
    Ok(found)
}

fn parked_after(tx: &Connection, after: u64, max_bytes: usize) -> rusqlite::Result<Vec<(u64, Bytes)>> {
    let mut query = tx.prepare("SELECT id, json FROM parked WHERE id > ?1 ORDER BY id")?;
    let mut rows = query.query([after])?;
    let (mut found, mut bytes) = (Vec::new(), 0);
    while bytes < max_bytes {
        let Some(row) = rows.next()? else { break };
        let json = Bytes::copy_from_slice(row.get_ref(1)?.as_blob()?);
        bytes += json.len();
        found.push((row.get(0)?, json));
    }
    Ok(found)
}

/// Marks parked events to be sent again: all of them, or those with these seqs. The owner takes them within seconds
/// while its link is up, or after its next start. Returns how many.
///
/// # Errors
/// As for [`show`]; also a seq under which nothing is parked, and then nothing is marked.
pub fn requeue(path: &Path, seqs: Option<&[u64]>) -> Result<u64> {
    let db = open(path, true)?;
    let mark = || -> rusqlite::Result<std::result::Result<u64, u64>> {
        let tx = Transaction::new_unchecked(&db, TransactionBehavior::Immediate)?;
        let marked = match seqs {
            None => tx.execute("UPDATE parked SET wanted = 1", [])?,
            Some(seqs) => {
                let mut marked = 0;
                for seq in seqs {
                    match tx.execute("UPDATE parked SET wanted = 1 WHERE seq = ?1", [seq])? {
                        0 => return Ok(Err(*seq)),
                        rows => marked += rows,
                    }
                }
                marked
            }
        };
        tx.commit()?;
        Ok(Ok(marked as u64))
    };
    mark().map_err(|error| unreadable(path, error))?.map_err(|seq| {
        let text =
            format!("spill {}: no event with seq {seq} is parked; `spill show` lists those that are", path.display());
        Error::new(ErrorKind::Config, text)
    })
}

/// One snapshot for all that is read.
fn read<T>(db: &mut Connection, work: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> rusqlite::Result<T> {
    let tx = db.transaction()?;
    work(&tx)
}

fn open(path: &Path, write: bool) -> Result<Connection> {
    let refused = |kind, what: &str| Err(Error::new(kind, format!("spill {}: {what}", path.display())));
    match std::fs::metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return refused(ErrorKind::SpillCorrupt, "there is no such file; give the spill_path of the broadcaster");
        }
        Ok(file) if file.is_dir() => {
            return refused(ErrorKind::SpillCorrupt, "is a directory; give the path of the file in it");
        }
        Ok(_) if sqlite::is_cut_to_nothing(path) => {
            return refused(
                ErrorKind::SpillCorrupt,
                "is empty; if it was a spill, a start of its broadcaster saves what its WAL holds",
            );
        }
        _ => {}
    }
    if owned::is_owned(path) {
        return refused(
            ErrorKind::SpillLocked,
            "is owned by this very process; ask its broadcaster, or another process",
        );
    }
    let access = if write { OpenFlags::SQLITE_OPEN_READ_WRITE } else { OpenFlags::SQLITE_OPEN_READ_ONLY };
    let opened = || -> rusqlite::Result<Option<Connection>> {
        let db = Connection::open_with_flags(path, access | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
        db.busy_timeout(PATIENCE)?;
        let ours = (pragma(&db, "application_id")?, pragma(&db, "user_version")?) == (APPLICATION_ID, FORMAT);
        Ok(ours.then_some(db))
    };
    match opened() {
        Ok(Some(db)) => Ok(db),
        Ok(None) => {
            refused(ErrorKind::SpillCorrupt, "is a file of something else, or of another version; check the path")
        }
        Err(error) => Err(unreadable(path, error)),
    }
}

fn unreadable(path: &Path, error: rusqlite::Error) -> Error {
    let remedy = match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => {
            "is no spill: a file of something else, or damaged from its first page on; check the path"
        }
        Some(ErrorCode::DatabaseCorrupt) => {
            "is damaged; copy it away before a broadcaster opens it, and `spill verify` the copy"
        }
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => "is busy; try again",
        _ => "cannot be read; check its permissions and those of its directory, and `spill verify` it",
    };
    Error::new(ErrorKind::SpillCorrupt, format!("spill {} {remedy}", path.display())).with_source(error)
}

/// The process that has the spill open. The lock is the kernel's and the pid in the file is for people, so it counts only
/// while the lock is held; asking holds it, shared, for an instant, for which an owner that starts has patience.
fn owner(path: &Path) -> Option<u32> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let file = File::open(&name).ok()?;
    match file.try_lock_shared() {
        Err(std::fs::TryLockError::WouldBlock) => std::fs::read_to_string(&name).ok()?.lines().next()?.parse().ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::emitter::item::{Gap, Item};
    use crate::emitter::spill::store::{Limits, SpillStore};
    use crate::emitter::tests::config;
    use crate::wire::block::BlockBuilder;

    fn block(first: u64, last: u64) -> Item {
        let mut builder = BlockBuilder::new(first, bytes::BytesMut::new());
        (first..=last).for_each(|seq| builder.push(format!("{{\"n\":{seq}}}").as_bytes()));
        Item::Events(builder.seal().expect("not empty"))
    }

    /// Seqs 4 to 9 unconfirmed: 6 a gap, 8 parked.
    fn spill(path: &Path) {
        let (mut store, _) = SpillStore::open(path, Limits::from(&config()), Some("ada"), 1, None).expect("usable");
        let gap = Item::Gap(Gap { from: 6, to: 6, reason: GapReason::OutboxFull });
        store.append(&[block(1, 5), gap, block(7, 9)], 0, 3).expect("stored");
        store.park(8, None, "no").expect("stored");
        store.close(10, 3).expect("closed");
    }

    fn numbers(found: &[(u64, Bytes)]) -> Vec<(u64, String)> {
        found.iter().map(|(key, json)| (*key, String::from_utf8_lossy(json).into_owned())).collect()
    }

    #[test]
    fn a_spill_is_shown_verified_and_read_without_being_changed() {
        let home = tempfile::tempdir().expect("writable");
        let path = home.path().join("spill.db");
        spill(&path);
        let before = std::fs::read(&path).expect("readable");
        let summary = show(&path).expect("readable");
        assert_eq!((summary.emitter.as_str(), summary.owner, summary.events), ("ada", None, 4));
        assert_eq!((summary.acked_seq, summary.first_seq, summary.last_seq), (3, Some(4), Some(9)));
        assert_eq!(summary.gaps.iter().map(|gap| (gap.from, gap.to)).collect::<Vec<_>>(), [(6, 6), (8, 8)]);
        assert_eq!((summary.parked.len(), summary.parked[0].seq, summary.parked[0].wanted), (1, 8, false));
        assert_eq!(verify(&path).expect("readable"), [""; 0]);
        let expected = [4, 5, 7, 9].map(|seq| (seq, format!("{{\"n\":{seq}}}")));
        assert_eq!(numbers(&events(&path, false, 0, usize::MAX).expect("readable")), expected);
        assert_eq!(numbers(&events(&path, false, 4, 1).expect("readable")), expected[1..2]);
        assert_eq!(numbers(&events(&path, true, 0, usize::MAX).expect("readable")), [(1, "{\"n\":8}".to_owned())]);
        assert_eq!(std::fs::read(&path).expect("readable"), before);
    }

    #[test]
    fn what_the_owner_does_between_two_parts_of_a_check_is_no_finding() {
        let home = tempfile::tempdir().expect("writable");
        let path = home.path().join("spill.db");
        let (mut store, _) = SpillStore::open(&path, Limits::from(&config()), Some("ada"), 1, None).expect("usable");
        let gap = Item::Gap(Gap { from: 6, to: 6, reason: GapReason::Refused });
        store.append(&[block(1, 5), gap, block(7, 9), block(10, 12), block(13, 20)], 0, 0).expect("stored");
        let db = Connection::open(&path).expect("there");
        let mut findings = Vec::new();
        let mut part = |before| check_stream(&db, before, 1, &mut findings).expect("readable");
        assert_eq!((part(None), part(Some(5))), (Some(5), Some(6)));
        store.park(7, None, "no").expect("the gap before it grows, and the block is divided");
        assert_eq!(part(Some(6)), Some(7), "the longer gap");
        assert_eq!(part(Some(7)), Some(9), "the rest of the block");
        store.trim(15).expect("within a block");
        assert_eq!(part(Some(9)), Some(20));
        assert_eq!((part(Some(20)), &findings[..]), (None, &[][..]));
        db.execute("DELETE FROM item WHERE first = 13", []).expect("changed");
        store.append(&[block(21, 22)], 0, 15).expect("stored");
        assert_eq!(check_stream(&db, Some(15), 1, &mut findings).expect("readable"), Some(22));
        assert_eq!(findings, ["seqs 16 to 20 are missing"]);
    }

    #[test]
    fn requeue_marks_what_is_parked_and_nothing_if_a_seq_is_not() {
        let home = tempfile::tempdir().expect("writable");
        let path = home.path().join("spill.db");
        spill(&path);
        let error = requeue(&path, Some(&[8, 5])).expect_err("5 is not parked");
        assert!(error.to_string().contains("seq 5"), "{error}");
        assert!(!show(&path).expect("readable").parked[0].wanted);
        assert_eq!((requeue(&path, Some(&[8])).expect("marked"), requeue(&path, None).expect("marked")), (1, 1));
        assert!(show(&path).expect("readable").parked[0].wanted);
    }

    #[test]
    fn what_is_wrong_with_a_spill_is_found() {
        let wrongs = [
            ("DELETE FROM item WHERE first = 6", "seqs 6 to 6 are missing"),
            ("UPDATE item SET data = x'0102' WHERE first = 7", "no block"),
            ("UPDATE item SET last = 5 WHERE first = 7", "overlaps"),
            ("UPDATE item SET reason = 'x' WHERE first = 6", "no known reason"),
            ("DELETE FROM meta WHERE key = 'epoch'", "epoch is missing"),
            ("UPDATE parked SET json = x'00'", "parked event with seq 8 is no JSON"),
        ];
        for (wrong, word) in wrongs {
            let home = tempfile::tempdir().expect("writable");
            let path = home.path().join("spill.db");
            spill(&path);
            Connection::open(&path).and_then(|db| db.execute(wrong, [])).expect("changed");
            let findings = verify(&path).expect("readable").join("; ");
            assert!(findings.contains(word), "{wrong}: {findings}");
        }
    }

    #[test]
    fn what_is_no_spill_is_one_clear_line_that_names_the_path() {
        let home = tempfile::tempdir().expect("writable");
        let path = home.path().join("x.db");
        let told = |word: &str| {
            let text = show(&path).expect_err("no spill").report();
            assert!(text.contains(word) && text.contains("x.db") && !text.contains('\n'), "{text}");
        };
        told("no such file");
        std::fs::write(&path, "some notes of mine, long enough to be taken for a header of a database file")
            .expect("x");
        told("something else");
        std::fs::remove_file(&path).expect("there");
        Connection::open(&path).and_then(|db| db.execute_batch("CREATE TABLE x (y)")).expect("made");
        told("something else");
        std::fs::remove_file(&path).expect("there");
        std::fs::create_dir(&path).expect("made");
        told("directory");
    }

    #[test]
    fn a_spill_that_this_process_owns_is_left_to_its_owner() {
        let home = tempfile::tempdir().expect("writable");
        let path = home.path().join("spill.db");
        let (store, _) = SpillStore::open(&path, Limits::from(&config()), None, 1, None).expect("usable");
        assert_eq!(show(&path).expect_err("owned").kind(), ErrorKind::SpillLocked);
        assert_eq!(owner(&path), Some(std::process::id()));
        drop(store);
        assert_eq!(show(&path).expect("free").owner, None);
    }
}
