//! Salvage: what can still be read of a damaged spill goes into a new file, and the old one is set aside.
//!
//! The new file is made beside the path and takes its place only when it is complete, so a process that dies here
//! begins again. The rows are found by walking the table from both ends towards each bad page, and past it by
//! halving what lies between; a row counts only if its check says that it is as it was written.

use std::collections::{BTreeSet, BinaryHeap};
use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags};

use super::parked;
use super::rows::{Meta, Row, Usage, insert, read_row};
use super::store::PURPOSE;
use crate::emitter::item::{Gap, GapReason, Identity, Item};
use crate::emitter::ring::Left;
use crate::sqlite::{self, PAGE, beside, get, put, remove};

/// Attempts to read past bad pages; the widest stretch first. Each costs some microseconds.
const PROBES: usize = 4096;
/// A statement that takes longer than this walks in circles.
const WALK: Duration = Duration::from_secs(20);
/// Bytes copied in one transaction.
const BATCH: usize = 4 << 20;

/// What became of a damaged spill.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// What was wrong.
    pub cause: String,
    /// Events saved.
    pub salvaged: u64,
    /// What could not be read, numbered as in the new file.
    pub unreadable: Vec<Gap>,
    /// Where the damaged file is now.
    pub set_aside: PathBuf,
    /// Older damaged files that had to go, because only a few are kept.
    pub removed: Vec<PathBuf>,
}

impl Damage {
    /// How many seqs could not be read, as far as the rest tells; what was lost behind the last row is not known.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.unreadable.iter().map(Gap::count).sum()
    }
}

/// How the saved rows are numbered.
pub(super) enum Numbering<'a> {
    /// As they were: the process that gave the numbers still knows which are used.
    Kept(&'a Meta),
    /// As they were if a ring of this boot tells which numbers were given. Otherwise from 1, in an epoch that has used
    /// none: what the file knew of its numbers cannot be trusted.
    Lost {
        /// The new epoch.
        epoch: &'a str,
        /// The ring beside the file.
        ring: Option<&'a Left>,
    },
}

/// What [`salvage`] has done.
pub(super) struct Salvaged {
    pub(super) damage: Damage,
    /// The rows have new numbers. Old ones up to this one are saved or told as gaps: of the ring, only what follows
    /// counts.
    pub(super) in_ring: Option<u64>,
}

/// Replaces the file at `path`, which nobody has open, by what can be read of it.
pub(super) fn salvage(path: &Path, numbering: &Numbering<'_>, cause: String, unix: i64) -> rusqlite::Result<Salvaged> {
    let fresh = fresh_path(path);
    let made = clear(&fresh).map_err(io).and_then(|()| {
        let mut source = Source::open(path, &fresh)?;
        let copied = copy(&mut source, &fresh, numbering);
        source.close(path).map_err(io)?;
        copied
    });
    let (salvaged, unreadable, in_ring) = match made {
        Ok(made) => made,
        Err(error) => {
            drop(clear(&fresh)); // the error is the one to tell
            return Err(error);
        }
    };
    let (set_aside, removed) = sqlite::set_aside(path, unix).map_err(io)?;
    std::fs::rename(&fresh, path).map_err(io)?;
    Ok(Salvaged { damage: Damage { cause, salvaged, unreadable, set_aside, removed }, in_ring })
}

/// Goes on where a process died between the last two steps of [`salvage`].
pub(super) fn finish(path: &Path) -> std::io::Result<()> {
    let fresh = fresh_path(path);
    if !path.exists() && fresh.exists() { std::fs::rename(fresh, path) } else { Ok(()) }
}

pub(super) fn fresh_path(path: &Path) -> PathBuf {
    beside(path, ".salvage")
}

fn clear(path: &Path) -> std::io::Result<()> {
    ["", "-wal", "-shm", "-journal"].iter().try_for_each(|suffix| remove(&beside(path, suffix)))
}

fn io(error: std::io::Error) -> rusqlite::Error {
    rusqlite::Error::ToSqlConversionFailure(error.into())
}

/// The damaged file, read only. If its first page is useless it gets that of a new file meanwhile: the tables of one
/// purpose always lie at the same places.
struct Source {
    db: Option<Connection>,
    first_page: Option<Vec<u8>>,
}

impl Source {
    fn open(path: &Path, fresh: &Path) -> rusqlite::Result<Self> {
        remove(&beside(path, "-shm")).map_err(io)?;
        if !sqlite::is_cut_to_nothing(path)
            && let Some(db) = connect(path)
        {
            return Ok(Self { db: Some(db), first_page: None });
        }
        let empty = PURPOSE.connect(fresh, true)?;
        sqlite::trust(&empty)?;
        empty.close().map_err(|(_, error)| error)?;
        let template = std::fs::read(fresh).map_err(io)?;
        clear(fresh).map_err(io)?;
        let original = replace_first_page(path, |pages| {
            let mut page = template.get(..PAGE).unwrap_or_default().to_vec();
            if let Some(size) = page.get_mut(28..32) {
                size.copy_from_slice(&pages.max(1).to_be_bytes());
            }
            page
        });
        Ok(Self { first_page: Some(original.map_err(io)?), db: connect(path) })
    }

    /// Leaves the file as it was found.
    fn close(self, path: &Path) -> std::io::Result<()> {
        drop(self.db);
        if let Some(page) = self.first_page {
            let length = page.len() as u64;
            replace_first_page(path, |_| page)?;
            if length < PAGE as u64 {
                File::options().write(true).open(path)?.set_len(length)?;
            }
        }
        remove(&beside(path, "-shm"))?;
        // SQLite makes one to look into it.
        let wal = beside(path, "-wal");
        if std::fs::metadata(&wal).is_ok_and(|wal| wal.len() == 0) { remove(&wal) } else { Ok(()) }
    }
}

/// Opens the file if its tables can be found at all.
fn connect(path: &Path) -> Option<Connection> {
    let db = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY).ok()?;
    db.query_row("SELECT (SELECT count(*) FROM item WHERE 0) + (SELECT count(*) FROM meta WHERE 0)", [], |_| Ok(()))
        .ok()?;
    Some(db)
}

/// Returns what was there.
fn replace_first_page(path: &Path, by: impl FnOnce(u32) -> Vec<u8>) -> std::io::Result<Vec<u8>> {
    let mut file = File::options().read(true).write(true).open(path)?;
    let pages = file.metadata()?.len() / PAGE as u64;
    let mut original = Vec::new();
    std::io::Read::by_ref(&mut file).take(PAGE as u64).read_to_end(&mut original)?;
    file.rewind()?;
    file.write_all(&by(pages as u32))?;
    file.sync_all()?;
    Ok(original)
}

fn copy(
    source: &mut Source,
    fresh: &Path,
    numbering: &Numbering<'_>,
) -> rusqlite::Result<(u64, Vec<Gap>, Option<u64>)> {
    let until = Instant::now() + WALK;
    if let Some(old) = &mut source.db {
        old.progress_handler(10_000, Some(move || Instant::now() >= until))?;
    }
    let old = source.db.as_ref();
    // Each value for itself: one may be readable where the next is not.
    let number = |key| old.and_then(|old| get::<u64>(old, key).ok().flatten());
    let word = |key| old.and_then(|old| get::<String>(old, key).ok().flatten());
    let spans = old.map(spans).unwrap_or_default();
    let taken_over = old.and_then(|old| get::<i64>(old, "taken_over").ok().flatten());
    let stored_epoch = word("epoch");
    let ring = match numbering {
        Numbering::Lost { ring, .. } => ring.and_then(|left| Some((left, left.identity.as_ref()?))),
        Numbering::Kept(_) => None,
    };
    let ring = ring.filter(|(left, identity)| {
        taken_over != Some(left.id as i64) && stored_epoch.as_ref().is_none_or(|epoch| *epoch == identity.epoch)
    });
    let told = ring.filter(|(left, _)| left.same_boot).map(|(left, identity)| {
        // Everything that was given is confirmed, or in the file, or in the ring.
        let last = left.blocks.first().map_or(left.last, |block| block.first() - 1);
        let base = number("base").unwrap_or(0).max(left.acked);
        let reserved = number("reserved").unwrap_or(0).max(left.last);
        let Identity { emitter, epoch } = identity.clone();
        let last = last.max(spans.last().map_or(0, |span| span.1)).max(base);
        Meta { emitter, epoch, reserved, base, last }
    });
    let kept = match numbering {
        Numbering::Kept(meta) => Some(*meta),
        Numbering::Lost { .. } => told.as_ref(),
    };
    let (shift, mut known, end) = if let Some(meta) = kept {
        (0, meta.base, meta.last)
    } else {
        let base = number("base").or_else(|| spans.first().map(|span| span.0 - 1)).unwrap_or(0);
        (base, base, spans.last().map_or(base, |span| span.1).max(base))
    };
    let promised = number("next_seq").map(|next| next.saturating_sub(1)).or_else(|| number("reserved"));
    let db = PURPOSE.connect(fresh, true)?;
    db.pragma_update(None, "synchronous", "OFF")?; // it counts only when it is complete
    let (mut usage, mut unreadable, mut bytes, mut newest) = (Usage::default(), Vec::new(), 0, 0);
    let mut tx = db.unchecked_transaction()?;
    let hole = |tx: &Connection, from: u64, to: u64, reason, at| {
        let gap = Gap { from: from - shift, to: to - shift, reason };
        insert(tx, &Item::Gap(gap), at).map(|()| gap)
    };
    for (first, last) in spans {
        let row = if last > known { old.and_then(|old| row_at(old, first)) } else { None };
        let Some((item, stored_at)) = row.and_then(|row| Some((row.item.after(known)?, row.stored_at))) else {
            continue;
        };
        if item.first() > known + 1 {
            unreadable.push(hole(&tx, known + 1, item.first() - 1, GapReason::Corrupt, stored_at)?);
        }
        known = item.last();
        bytes += item.bytes() + 64;
        newest = newest.max(stored_at);
        let item = renumbered(item, shift);
        usage.add(&item);
        insert(&tx, &item, stored_at)?;
        if bytes >= BATCH {
            tx.commit()?;
            tx = db.unchecked_transaction()?;
            bytes = 0;
        }
    }
    if known < end {
        unreadable.push(hole(&tx, known + 1, end, GapReason::Corrupt, newest)?);
        known = end;
    }
    let emitter = word("emitter");
    let clock = word("clock");
    let in_ring = (kept.is_none() && ring.is_some()).then_some(known);
    match (kept, numbering) {
        (Some(meta), _) => meta.store(&tx)?,
        (None, Numbering::Lost { epoch, .. }) => {
            // Which of the seqs behind the last row were used is as unknown as after a crash.
            if let Some(promised) = promised.filter(|promised| *promised > known) {
                hole(&tx, known + 1, promised, GapReason::Crash, newest)?;
                known = promised;
            }
            put(&tx, "epoch", epoch)?;
            put(&tx, "base", 0)?;
            put(&tx, "reserved", known - shift)?;
            put(&tx, "next_seq", known - shift + 1)?;
            if let Some(emitter) = emitter {
                put(&tx, "emitter", emitter)?;
            }
        }
        (None, Numbering::Kept(_)) => unreachable!("they are kept"),
    }
    usage.store(&tx, known - shift)?;
    taken_over.map_or(Ok(()), |id| put(&tx, "taken_over", id))?;
    clock.map_or(Ok(()), |clock| put(&tx, "clock", clock))?;
    old.map_or(Ok(()), |old| parked::rescue(old, &tx))?;
    tx.commit()?;
    db.pragma_update(None, "synchronous", "FULL")?;
    sqlite::checkpoint(&db)?;
    sqlite::trust(&db)?;
    db.close().map_err(|(_, error)| error)?;
    Ok((usage.events, unreadable, in_ring))
}

fn renumbered(item: Item, shift: u64) -> Item {
    match item {
        Item::Gap(gap) => Item::Gap(Gap { from: gap.from - shift, to: gap.to - shift, ..gap }),
        Item::Events(block) if shift == 0 => Item::Events(block),
        Item::Events(block) => Item::Events(block.renumbered(block.first() - shift)),
    }
}

/// Seqs of the rows that are whole, in order.
fn spans(db: &Connection) -> Vec<(u64, u64)> {
    let whole = keys(db).into_iter().filter_map(|first| row_at(db, first).map(|row| (first, row.item.last())));
    let mut spans: Vec<(u64, u64)> = Vec::new();
    for span in whole {
        if spans.last().is_none_or(|last| last.1 < span.0) {
            spans.push(span);
        }
    }
    spans
}

fn row_at(db: &Connection, first: u64) -> Option<Row> {
    let mut query =
        db.prepare_cached("SELECT first, last, stored_at, reason, data, crc FROM item WHERE first = ?1").ok()?;
    query.query_row([first], read_row).ok()
}

/// The keys of all rows that can be found; some may not be readable themselves.
fn keys(db: &Connection) -> BTreeSet<u64> {
    let mut found = BTreeSet::new();
    let mut unread = BinaryHeap::from([(u64::MAX, 1, i64::MAX as u64)]);
    for _ in 0..PROBES {
        let Some((_, low, high)) = unread.pop() else { break };
        let Some(low) = walk(db, low, high, false, &mut found) else { continue };
        let Some(high) = walk(db, low, high, true, &mut found) else { continue };
        let middle = low + (high - low) / 2;
        let halves = [(low, middle), (middle + 1, high)];
        unread.extend(
            halves.into_iter().filter(|(from, to)| from <= to && high > low).map(|(from, to)| (to - from, from, to)),
        );
    }
    found
}

/// Collects keys from one end until a page cannot be read; returns the end of what is left, or nothing if all was read.
fn walk(db: &Connection, low: u64, high: u64, back: bool, found: &mut BTreeSet<u64>) -> Option<u64> {
    let order = if back { "DESC" } else { "ASC" };
    let sql = format!("SELECT first FROM item WHERE first BETWEEN ?1 AND ?2 ORDER BY first {order}");
    let mut left = if back { high } else { low };
    let mut step = || -> rusqlite::Result<()> {
        let mut query = db.prepare_cached(&sql)?;
        let mut rows = query.query([low, high])?;
        while let Some(row) = rows.next()? {
            let first: u64 = row.get(0)?;
            if (back && first > left) || (!back && first < left) {
                return Err(sqlite::damaged("the rows are not in order"));
            }
            found.insert(first);
            left = if back { first - 1 } else { first + 1 };
            if left < low || left > high {
                return Ok(());
            }
        }
        Ok(())
    };
    step().err().map(|_| left)
}
