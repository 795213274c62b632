//! The rows of the spill's file and its own numbers: written with their checks, read with doubt, given up at the bounds.

use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension, params};

use super::store::Limits;
use crate::emitter::item::{Gap, GapReason, Item};
use crate::sqlite::{self, damaged, get, put};
use crate::wire::block::Block;

/// What the file holds, kept along with every change, in memory and in the file: counting rows would cost more than
/// storing them, and keep a large spill from being sent after a start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage {
    pub(super) events: u64,
    pub(super) bytes: u64,
}

impl Usage {
    /// What is stored of it, and the last seq of all items then.
    pub(super) fn load(tx: &Connection) -> rusqlite::Result<Option<(Self, u64)>> {
        let Some(text) = get::<String>(tx, "totals")? else { return Ok(None) };
        let mut numbers = text.split(' ').map(str::parse);
        let mut number = || numbers.next().and_then(Result::ok).ok_or_else(|| damaged("its totals are no numbers"));
        Ok(Some((Self { events: number()?, bytes: number()? }, number()?)))
    }

    pub(super) fn store(&self, tx: &Connection, last: u64) -> rusqlite::Result<()> {
        put(tx, "totals", format!("{} {} {last}", self.events, self.bytes))
    }

    /// Counted anew. It takes long: each row is looked up.
    pub(super) fn count(tx: &Connection) -> rusqlite::Result<Self> {
        let sql = "SELECT coalesce(sum(last - first + 1), 0), coalesce(sum(length(data)), 0) FROM item
                   WHERE data IS NOT NULL";
        tx.query_row(sql, [], |row| Ok(Self { events: row.get(0)?, bytes: row.get(1)? }))
    }

    pub(super) fn add(&mut self, item: &Item) {
        self.events += item.events();
        self.bytes += item.bytes() as u64;
    }

    pub(super) fn remove(&mut self, events: u64, bytes: u64) {
        self.events = self.events.saturating_sub(events);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

/// What the running process knows of its numbers, should the file lose it.
#[derive(Clone, Debug, Default)]
pub(super) struct Meta {
    pub(super) emitter: String,
    pub(super) epoch: String,
    /// Seqs up to here may have been used.
    pub(super) reserved: u64,
    /// Everything up to here is acknowledged.
    pub(super) base: u64,
    /// Last seq stored.
    pub(super) last: u64,
}

impl Meta {
    pub(super) fn store(&self, tx: &Connection) -> rusqlite::Result<()> {
        put(tx, "emitter", &self.emitter)?;
        put(tx, "epoch", &self.epoch)?;
        put(tx, "base", self.base)?;
        put(tx, "reserved", self.reserved)
    }
}

/// A row that is as it was written.
pub(super) struct Row {
    pub(super) item: Item,
    pub(super) stored_at: i64,
}

/// Reads `first, last, stored_at, reason, data, crc`.
pub(super) fn read_row(row: &rusqlite::Row<'_>) -> rusqlite::Result<Row> {
    let (first, last, stored_at): (u64, u64, i64) = (row.get(0)?, row.get(1)?, row.get(2)?);
    let (reason, data) = (row.get_ref(3)?.as_str_or_null()?, row.get_ref(4)?.as_blob_or_null()?);
    if row.get::<_, i64>(5)? != check_of(first, last, stored_at, reason, data) {
        return Err(damaged("a row is not as it was written"));
    }
    let item = match (reason, data) {
        (None, Some(data)) => {
            let block = Block::parse(Bytes::copy_from_slice(data)).map_err(|error| damaged(error.to_string()))?;
            if (block.first(), block.last()) != (first, last) {
                return Err(damaged("a block has other seqs than its row"));
            }
            Item::Events(block)
        }
        (Some(reason), None) if first <= last => {
            let reason = GapReason::parse(reason).unwrap_or(GapReason::SpillFull);
            Item::Gap(Gap { from: first, to: last, reason })
        }
        _ => return Err(damaged("a row is neither events nor a gap")),
    };
    Ok(Row { item, stored_at })
}

fn check_of(first: u64, last: u64, stored_at: i64, reason: Option<&str>, data: Option<&[u8]>) -> i64 {
    let (first, last, stored_at) = (first.to_le_bytes(), last.to_le_bytes(), stored_at.to_le_bytes());
    let reason = reason.unwrap_or_default().as_bytes();
    sqlite::crc(&[&first, &last, &stored_at, reason, data.unwrap_or_default()])
}

pub(super) fn insert(tx: &Connection, item: &Item, stored_at: i64) -> rusqlite::Result<()> {
    match item {
        Item::Gap(gap) => insert_gap(tx, *gap, stored_at),
        Item::Events(block) => {
            let (first, last, data) = (block.first(), block.last(), &block.bytes()[..]);
            let crc = check_of(first, last, stored_at, None, Some(data));
            tx.prepare_cached("INSERT INTO item (first, last, stored_at, data, crc) VALUES (?1, ?2, ?3, ?4, ?5)")?
                .execute(params![first, last, stored_at, data, crc])
                .map(|_| ())
        }
    }
}

/// A gap grows the one before it where they touch, so that a long outage leaves one row and not thousands.
fn insert_gap(tx: &Connection, gap: Gap, stored_at: i64) -> rusqlite::Result<()> {
    let before = tx
        .prepare_cached(
            "SELECT first, stored_at FROM item WHERE first = (SELECT max(first) FROM item WHERE first < ?1)
             AND last = ?1 - 1 AND reason = ?2",
        )?
        .query_row(params![gap.from, gap.reason.as_str()], |row| Ok((row.get::<_, u64>(0)?, row.get::<_, i64>(1)?)))
        .optional()?;
    let reason = gap.reason.as_str();
    let (first, stored_at) = before.unwrap_or((gap.from, stored_at));
    let crc = check_of(first, gap.to, stored_at, Some(reason), None);
    let written = if before.is_some() {
        tx.prepare_cached("UPDATE item SET last = ?2, crc = ?3 WHERE first = ?1")?.execute(params![first, gap.to, crc])
    } else {
        tx.prepare_cached("INSERT INTO item (first, last, stored_at, reason, crc) VALUES (?1, ?2, ?3, ?4, ?5)")?
            .execute(params![first, gap.to, stored_at, reason, crc])
    };
    written.map(|_| ())
}

pub(super) fn trim(tx: &Connection, usage: &mut Usage, meta: &mut Meta, seq: u64) -> rusqlite::Result<()> {
    let (events, bytes): (u64, u64) = tx
        .prepare_cached(
            "SELECT coalesce(sum(last - first + 1), 0), coalesce(sum(length(data)), 0)
             FROM item WHERE first <= ?1 AND last <= ?1 AND data IS NOT NULL",
        )?
        .query_row([seq], |row| Ok((row.get(0)?, row.get(1)?)))?;
    tx.prepare_cached("DELETE FROM item WHERE first <= ?1 AND last <= ?1")?.execute([seq])?;
    usage.remove(events, bytes);
    meta.base = seq;
    meta.last = meta.last.max(seq);
    put(tx, "base", seq)
}

/// Gives up the oldest stored events that are not on their way until all bounds hold again.
pub(super) fn make_room(
    tx: &Connection,
    limits: &Limits,
    usage: &mut Usage,
    in_flight: u64,
    now: i64,
) -> rusqlite::Result<Vec<Gap>> {
    let mut gaps: Vec<Gap> = Vec::new();
    let too_old = limits.age.map(|age| now - age.as_millis().min(i64::MAX as u128 / 2) as i64);
    loop {
        let over = if limits.drop_oldest { usage.events.saturating_sub(limits.events) } else { 0 };
        let heavy = limits.drop_oldest && usage.bytes > limits.bytes;
        if over == 0 && !heavy && too_old.is_none() {
            break;
        }
        let oldest = tx
            .prepare_cached(
                "SELECT first, last, stored_at, reason, data, crc FROM item
                 WHERE first > ?1 AND data IS NOT NULL ORDER BY first LIMIT 1",
            )?
            .query_row([in_flight], read_row)
            .optional()?;
        let Some(Row { item: Item::Events(block), stored_at }) = oldest else { break };
        let expired = too_old.is_some_and(|limit| stored_at < limit);
        if over == 0 && !heavy && !expired {
            break;
        }
        let whole = expired || heavy || over >= block.count();
        let upto = if whole { block.last() } else { block.first() + over - 1 };
        let reason = if expired { GapReason::Expired } else { GapReason::SpillFull };
        let gap = Gap { from: block.first(), to: upto, reason };
        tx.prepare_cached("DELETE FROM item WHERE first = ?1")?.execute([block.first()])?;
        usage.remove(block.count(), block.bytes().len() as u64);
        if let Some(rest) = block.after(upto).map(Item::Events) {
            usage.add(&rest);
            insert(tx, &rest, stored_at)?;
        }
        insert_gap(tx, gap, now)?;
        match gaps.last_mut() {
            Some(last) if last.to + 1 == gap.from && last.reason == gap.reason => last.to = gap.to,
            _ => gaps.push(gap),
        }
    }
    Ok(gaps)
}

/// All gaps. They are few and small.
pub(super) fn gap_rows(tx: &Connection) -> rusqlite::Result<Vec<Row>> {
    let mut query = tx.prepare(
        "SELECT first, last, stored_at, reason, data, crc FROM item INDEXED BY gap WHERE data IS NULL ORDER BY first",
    )?;
    query.query_map([], read_row)?.collect()
}

/// The index of the gaps must have just those in the table, which SQLite's quick check does not look at.
pub(super) fn check_index(db: &Connection) -> rusqlite::Result<()> {
    let gaps = |source: &str| {
        let sql = format!("SELECT count(*), total(first) FROM item {source} WHERE data IS NULL");
        db.query_row(&sql, [], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, f64>(1)?)))
    };
    if gaps("INDEXED BY gap")? == gaps("NOT INDEXED")? {
        Ok(())
    } else {
        Err(damaged("the index of the gaps has others than the table"))
    }
}
