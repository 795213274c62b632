//! Parked events: what the peer refused for good. Beside the stream and not in it, bounded, each with its reason, until
//! somebody exports it or asks for it to be sent again.

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension, params};

use super::store::{Row, read_row};
use crate::emitter::item::{Gap, GapReason, Item};
use crate::sqlite::get;
use crate::wire::block::Block;

/// Events handed out to be sent again at a time.
const MOST_WANTED: u32 = 100;

/// Bounds of the table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) events: u64,
    pub(super) bytes: u64,
}

/// What parking an event did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parking {
    /// Events parked now.
    pub parked: u64,
    /// Seqs of parked events that had to make room, oldest first. They are lost.
    pub dropped: Vec<u64>,
}

/// A parked event that is to be sent again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Its key among the parked.
    pub id: i64,
    /// The event.
    pub json: Bytes,
}

/// Parks an event; one that is parked already (after a crash, it was tried once more) only gets the newer reason. The
/// oldest make room; the newest stays even if it is larger than the bound.
pub(super) fn park(
    tx: &Connection,
    bounds: Bounds,
    (seq, json): (u64, &[u8]),
    reason: &str,
    now: i64,
) -> rusqlite::Result<Vec<u64>> {
    let epoch: String = get(tx, "epoch")?.unwrap_or_default();
    tx.prepare_cached(
        "INSERT INTO parked (epoch, seq, reason, parked_at, json) VALUES (?1, ?2, ?3, ?4, ?5)
         ON CONFLICT (epoch, seq) DO UPDATE SET reason = ?3, wanted = 0",
    )?
    .execute(params![epoch, seq, reason, now, json])?;
    let mut dropped = Vec::new();
    loop {
        let (events, bytes) = usage(tx)?;
        if events <= 1 || (events <= bounds.events && bytes <= bounds.bytes) {
            return Ok(dropped);
        }
        let gone = "DELETE FROM parked WHERE id = (SELECT min(id) FROM parked) RETURNING seq";
        dropped.push(tx.prepare_cached(gone)?.query_row([], |row| row.get(0))?);
    }
}

/// Seqs of parked events behind `last`, in order.
pub(super) fn seqs_behind(tx: &Connection, epoch: &str, last: u64) -> rusqlite::Result<Vec<u64>> {
    tx.prepare("SELECT seq FROM parked WHERE epoch = ?1 AND seq > ?2 ORDER BY seq")?
        .query_map(params![epoch, last], |row| row.get(0))?
        .collect()
}

/// The gaps that parked events leave in what a ring holds still, which does not know of their parking. What is a gap there
/// already stays the one it is. Pure, and so the same for the simulated disk.
#[must_use]
pub fn gaps_in(held: &[Item], parked: impl IntoIterator<Item = u64>) -> Vec<Gap> {
    let holds = |seq| held.iter().any(|item| item.events() > 0 && item.first() <= seq && seq <= item.last());
    let gap = |seq| Gap { from: seq, to: seq, reason: GapReason::Refused };
    parked.into_iter().filter(|seq| holds(*seq)).map(gap).collect()
}

/// Events and bytes parked. The table is short: counting is cheap.
pub(super) fn usage(tx: &Connection) -> rusqlite::Result<(u64, u64)> {
    tx.prepare_cached("SELECT count(*), coalesce(sum(length(json)), 0) FROM parked")?
        .query_row([], |row| Ok((row.get(0)?, row.get(1)?)))
}

/// Events that somebody wants to be sent again, oldest first: a few, and about `max_bytes` of them.
pub(super) fn wanted(db: &Connection, max_bytes: usize) -> rusqlite::Result<Vec<Wanted>> {
    let mut query = db.prepare_cached("SELECT id, json FROM parked WHERE wanted = 1 ORDER BY id LIMIT ?1")?;
    let mut rows = query.query([MOST_WANTED])?;
    let (mut found, mut bytes) = (Vec::new(), 0);
    while bytes < max_bytes {
        let Some(row) = rows.next()? else { break };
        let json = Bytes::copy_from_slice(row.get_ref(1)?.as_blob()?);
        bytes += json.len();
        found.push(Wanted { id: row.get(0)?, json });
    }
    Ok(found)
}

/// Forgets events that are in the stream again.
pub(super) fn unpark(tx: &Connection, ids: &[i64]) -> rusqlite::Result<()> {
    let mut delete = tx.prepare_cached("DELETE FROM parked WHERE id = ?1")?;
    ids.iter().try_for_each(|id| delete.execute([id]).map(drop))
}

/// Copies what can be read of the table into another file's.
pub(super) fn rescue(from: &Connection, into: &Connection) -> rusqlite::Result<()> {
    // Beside a table that is gone, or behind a row that cannot be read, there is nothing to be had.
    let Ok(mut query) = from.prepare("SELECT epoch, seq, reason, parked_at, wanted, json FROM parked ORDER BY id")
    else {
        return Ok(());
    };
    let Ok(mut rows) = query.query([]) else { return Ok(()) };
    let mut insert = into.prepare(
        "INSERT OR IGNORE INTO parked (epoch, seq, reason, parked_at, wanted, json) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
    )?;
    while let Ok(Some(row)) = rows.next() {
        let value = |at| row.get::<_, rusqlite::types::Value>(at);
        let values = (0..6).map(value).collect::<rusqlite::Result<Vec<_>>>();
        if let Ok(values) = values {
            insert.execute(rusqlite::params_from_iter(values))?;
        }
    }
    Ok(())
}

/// The block of the row that holds `seq`, and when it was stored; nothing if `seq` is not stored as an event.
pub(super) fn row_of(tx: &Connection, seq: u64) -> rusqlite::Result<Option<(i64, Block)>> {
    let row = tx
        .prepare_cached(
            "SELECT first, last, stored_at, reason, data, crc FROM item
             WHERE first = (SELECT max(first) FROM item WHERE first <= ?1) AND last >= ?1",
        )?
        .query_row([seq], read_row)
        .optional()?;
    Ok(row.and_then(|Row { item, stored_at }| match item {
        Item::Events(block) => Some((stored_at, block)),
        Item::Gap(_) => None,
    }))
}
