//! Parked events: what the peer refused for good. Beside the stream and not in it, bounded, each with its reason, until
//! somebody exports it or asks for it to be sent again.

use std::collections::BTreeSet;

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension, params};

use super::rows::{Row, read_row};
use crate::emitter::item::{Gap, GapReason, Item};
use crate::sqlite::{self, damaged, get};
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
        "INSERT INTO parked (epoch, seq, reason, parked_at, json, crc) VALUES (?1, ?2, ?3, ?4, ?5, ?6)
         ON CONFLICT (epoch, seq) DO UPDATE SET reason = ?3, wanted = 0",
    )?
    .execute(params![epoch, seq, reason, now, json, check_of(&epoch, seq, json)])?;
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
    let mut query =
        db.prepare_cached("SELECT epoch, seq, json, crc, id FROM parked WHERE wanted = 1 ORDER BY id LIMIT ?1")?;
    let mut rows = query.query([MOST_WANTED])?;
    let (mut found, mut bytes) = (Vec::new(), 0);
    while bytes < max_bytes {
        let Some(row) = rows.next()? else { break };
        if !is_sound(row)? {
            return Err(damaged("a parked event is not as it was written"));
        }
        let json = Bytes::copy_from_slice(row.get_ref(2)?.as_blob()?);
        bytes += json.len();
        found.push(Wanted { id: row.get(4)?, json });
    }
    Ok(found)
}

/// Forgets events that are in the stream again.
pub(super) fn unpark(tx: &Connection, ids: &[i64]) -> rusqlite::Result<()> {
    let mut delete = tx.prepare_cached("DELETE FROM parked WHERE id = ?1")?;
    ids.iter().try_for_each(|id| delete.execute([id]).map(drop))
}

fn check_of(epoch: &str, seq: u64, json: &[u8]) -> i64 {
    sqlite::crc(&[epoch.as_bytes(), &seq.to_le_bytes(), json])
}

/// Whether a row (`epoch, seq, json, crc`) is as it was written.
pub(super) fn is_sound(row: &rusqlite::Row<'_>) -> rusqlite::Result<bool> {
    let check = check_of(row.get_ref(0)?.as_str()?, row.get(1)?, row.get_ref(2)?.as_blob()?);
    Ok(row.get::<_, i64>(3)? == check)
}

/// Checks the rows behind the key `after`, about `max_bytes` of them; returns the key to go on from, if there are more.
pub(super) fn check(db: &Connection, after: i64, max_bytes: usize) -> rusqlite::Result<Option<i64>> {
    let mut query = db.prepare_cached("SELECT epoch, seq, json, crc, id FROM parked WHERE id > ?1 ORDER BY id")?;
    let mut rows = query.query([after])?;
    let (mut after, mut bytes) = (after, 0);
    while let Some(row) = rows.next()? {
        if bytes >= max_bytes {
            return Ok(Some(after));
        }
        if !is_sound(row)? {
            return Err(damaged("a parked event is not as it was written"));
        }
        bytes += row.get_ref(2)?.as_blob()?.len() + 64;
        after = row.get(4)?;
    }
    Ok(None)
}

/// Copies what can be read of a damaged file's parked events; the table is short, so it is enough to look for each key.
pub(super) fn rescue(old: &Connection, new: &Connection) -> rusqlite::Result<()> {
    let ids = |back: bool| -> Vec<i64> {
        let sql = format!("SELECT id FROM parked ORDER BY id {}", if back { "DESC" } else { "ASC" });
        let Ok(mut query) = old.prepare(&sql) else { return Vec::new() };
        // Up to the first page that cannot be read.
        query.query_map([], |row| row.get(0)).map_or_else(|_| Vec::new(), |ids| ids.map_while(Result::ok).collect())
    };
    let ids: BTreeSet<i64> = ids(false).into_iter().chain(ids(true)).collect();
    let Ok(mut read) = old.prepare("SELECT epoch, seq, json, crc, reason, parked_at, wanted FROM parked WHERE id = ?1")
    else {
        return Ok(());
    };
    let mut write = new.prepare(
        "INSERT OR IGNORE INTO parked (id, epoch, seq, json, crc, reason, parked_at, wanted)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
    )?;
    for id in ids {
        let row = read.query_row([id], |row| {
            let (epoch, seq, json, crc): (String, u64, Vec<u8>, i64) =
                (row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?);
            let rest: (String, i64, bool) = (row.get(4)?, row.get(5)?, row.get(6)?);
            Ok(is_sound(row)?.then_some((epoch, seq, json, crc, rest)))
        });
        let Ok(Some((epoch, seq, json, crc, (reason, parked_at, wanted)))) = row else { continue };
        write.execute(params![id, epoch, seq, json, crc, reason, parked_at, wanted])?;
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
