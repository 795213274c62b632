//! Opening the spill: what the file and the ring of an earlier process tell together, and what can be saved of a file
//! that is damaged.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension};

use super::room::no_room;
use super::{Limits, PURPOSE, SpillStore};
use crate::clock::{Clock, FileClock, unix_millis};
use crate::emitter::item::{Gap, Identity, Item};
use crate::emitter::ring::{self, Left, Ring};
use crate::emitter::spill::files::Files;
use crate::emitter::spill::parked;
use crate::emitter::spill::reserve::Reserve;
use crate::emitter::spill::reunion::{Reunion, Stored, reunite};
use crate::emitter::spill::rows::{Meta, Row, Usage, gap_rows, insert, read_row, trim};
use crate::emitter::spill::salvage::{self, Damage, Numbering};
use crate::emitter::spill::scrub::Scrub;
use crate::error::{Error, Result};
use crate::sqlite::{self, Lock, damaged, get, put};
use crate::wire::position::epoch_from;

/// Bytes of events that are read when the file is opened: those that go on the wire first, and no more than they take
/// (1 MiB costs a millisecond). The rest is left to [`scrub`](SpillStore::scrub), or is checked when it is read.
pub(super) const HEAD: usize = 256 << 10;
/// Seqs promised at each opening without a ring, in the transaction that says who is here: from then on none is used, or
/// lost with the process, without a trace. The machine promises more as they are used up.
pub const RESERVE_FIRST: u64 = 10_000;

/// What an earlier process left.
#[derive(Clone, Debug)]
pub struct Recovered {
    /// Name towards the hub.
    pub emitter: String,
    /// Epoch of all seqs.
    pub epoch: String,
    /// The next seq that may be assigned.
    pub next_seq: u64,
    /// Seqs up to here are promised; see [`SpillStore::reserve`].
    pub reserved: u64,
    /// Everything up to here is acknowledged or given up for good.
    pub base: u64,
    /// Last seq stored; `base` if nothing is.
    pub last: u64,
    /// Gaps among the stored items.
    pub gaps: Vec<Gap>,
    /// Bytes of stored events.
    pub bytes: u64,
    /// Age of the oldest stored item.
    pub oldest: Option<Duration>,
    /// Events parked beside the stream.
    pub parked: u64,
    /// What follows the stored items up to `next_seq` and lies in the ring, gaps between included.
    pub held: Vec<Item>,
    /// The ring for what comes; `None`: the outbox needs none.
    pub ring: Option<Ring>,
    /// The file was damaged: this is what could be saved, under a new epoch.
    pub damage: Option<Damage>,
}

impl SpillStore {
    /// Opens or creates the spill, alone: a second owner is refused. `emitter` is the name asked for; without one the
    /// stored name stays, or a random one is made from `seed`. `segments`: how large a ring is wanted beside it; one
    /// that an earlier process left is read in any case. Of a damaged file what can be read is saved.
    ///
    /// # Errors
    /// [`ErrorKind::SpillLocked`] names the owner's pid; [`ErrorKind::SpillCorrupt`] what else is wrong with the path;
    /// [`ErrorKind::SpillIo`]: there is no room, for the ring or even for this.
    pub fn open(
        path: &Path,
        limits: Limits,
        emitter: Option<&str>,
        seed: u64,
        segments: Option<usize>,
    ) -> Result<(Self, Recovered)> {
        Self::open_at(path, limits, emitter, seed, segments, &Clock::system())
    }

    pub(crate) fn open_at(
        path: &Path,
        limits: Limits,
        emitter: Option<&str>,
        seed: u64,
        segments: Option<usize>,
        clock: &Clock,
    ) -> Result<(Self, Recovered)> {
        let mut random = fastrand::Rng::with_seed(seed);
        let wish = Wish { emitter, random: [random.u64(..), random.u64(..)], segments };
        drop(sqlite::remove(&sqlite::beside(path, ".renewed"))); // unfinished; if it stays it is made anew when needed
        salvage::finish(path).map_err(|error| PURPOSE.unusable(path, error))?;
        let mut lock = PURPOSE.lock(path)?;
        let place = sqlite::beside(path, ".ring");
        let mut left = ring::recover(&place)?;
        let mut reserve = Reserve::of(path);
        let mut damage = None;
        let mut opened = begin(path, &mut lock, &mut reserve, clock, &wish, left.as_ref());
        if let Err(cause) = &opened
            && sqlite::is_damage(cause)
        {
            let (epoch, cause, unix) = (epoch_from(random.u64(..)), cause.to_string(), unix_millis());
            let numbering = Numbering::Lost { epoch: &epoch, ring: left.as_ref() };
            let mut salvaged = salvage::salvage(path, &numbering, cause.clone(), unix);
            if salvaged.as_ref().is_err_and(sqlite::is_full) {
                reserve.release();
                salvaged = salvage::salvage(path, &numbering, cause, unix);
            }
            let salvaged = salvaged.map_err(|error| unopened(path, error))?;
            if let (Some(left), Some(upto)) = (&mut left, salvaged.in_ring) {
                // Under the new seqs, what is in both could not be told any more.
                left.blocks = left.blocks.iter().filter_map(|block| block.after(upto)).collect();
            }
            damage = Some(salvaged.damage);
            drop(lock);
            lock = PURPOSE.lock(path)?;
            opened = begin(path, &mut lock, &mut reserve, clock, &wish, left.as_ref());
        }
        let (Loaded { db, usage, clock, meta, parked, oldest }, mut recovered, adopted) =
            opened.map_err(|error| unopened(path, error))?;
        let scrub = Scrub::Rows { at: meta.base, upto: meta.last };
        let mut store = Self {
            db,
            path: path.to_owned(),
            limits,
            usage,
            parked,
            meta,
            ring: None,
            clock,
            reserve,
            unfolded: 0,
            stuck: false,
            overlong: false,
            damage: None,
            scrub,
            unsalvaged: None,
            lock,
            files: Files::of(path),
            bereft: false,
        };
        recovered.oldest = oldest.map(|at| Duration::from_millis((store.clock.now() - at).max(0) as u64));
        recovered.damage = damage;
        store.ring = match (left, segments) {
            (Some(left), _) if adopted => {
                left.ring.resume(recovered.next_seq - 1, recovered.base);
                Some(left.ring)
            }
            (left, Some(segments)) => {
                drop(left); // the file is cut and made anew under it
                let identity = Identity { emitter: recovered.emitter.clone(), epoch: recovered.epoch.clone() };
                let ring = Ring::create(&place, segments, &identity, random.u64(..))?;
                ring.resume(recovered.next_seq - 1, recovered.base);
                Some(ring)
            }
            (Some(left), None) => {
                // Should it stay, the next start knows that everything in it was taken over.
                left.ring.remove().unwrap_or_default();
                None
            }
            (None, None) => None,
        };
        recovered.ring.clone_from(&store.ring);
        drop(store.reserve.hold()); // without it nothing is appended, which tells
        Ok((store, recovered))
    }
}

/// What is wanted of a start.
struct Wish<'a> {
    emitter: Option<&'a str>,
    /// For a name and an epoch, should they be needed.
    random: [u64; 2],
    segments: Option<usize>,
}

/// An open file, and what it tells.
struct Loaded {
    db: Connection,
    usage: Usage,
    oldest: Option<i64>,
    clock: FileClock,
    meta: Meta,
    parked: u64,
}

/// Opens the file and puts it together with what is left in the ring. If it is damaged, nothing has changed in it.
fn begin(
    path: &Path,
    lock: &mut Lock,
    reserve: &mut Reserve,
    clock: &Clock,
    wish: &Wish<'_>,
    left: Option<&Left>,
) -> rusqlite::Result<(Loaded, Recovered, bool)> {
    let mut loaded = Loaded::load(path, lock, clock);
    if loaded.as_ref().is_err_and(sqlite::is_full) {
        reserve.release();
        loaded = Loaded::load(path, lock, clock);
    }
    let mut loaded = loaded?;
    let mut recovered = loaded.recover(wish, left);
    if recovered.as_ref().is_err_and(sqlite::is_full) {
        reserve.release();
        sqlite::checkpoint(&loaded.db)?;
        recovered = loaded.recover(wish, left);
    }
    let (recovered, adopted) = recovered?;
    sqlite::trust(&loaded.db)?;
    Ok((loaded, recovered, adopted))
}

impl Loaded {
    fn load(path: &Path, lock: &mut Lock, clock: &Clock) -> rusqlite::Result<Self> {
        let db = PURPOSE.open(path, lock)?;
        let Survey { usage, last, oldest, newest } = survey(&db)?;
        let clock = FileClock::resume(clock.clone(), get::<String>(&db, "clock")?.as_deref(), newest);
        let meta = Meta { last, ..Meta::default() };
        Ok(Self { db, usage, oldest, clock, meta, parked: 0 })
    }

    /// Puts together what the file and the ring tell. The ring either stays in use, which is told, or what is in it is
    /// taken over into the file.
    fn recover(
        &mut self,
        &Wish { emitter, random, segments }: &Wish<'_>,
        left: Option<&Left>,
    ) -> rusqlite::Result<(Recovered, bool)> {
        let mut usage = self.usage;
        let (now, anchor) = (self.clock.now(), self.clock.unstored());
        self.db.pragma_update(None, "synchronous", "FULL")?; // there is a promise in it
        let tx = self.db.unchecked_transaction()?;
        let taken_over: Option<i64> = get(&tx, "taken_over")?;
        let left = left.filter(|left| taken_over != Some(left.id as i64));
        let (stored_name, stored_epoch): (Option<String>, Option<String>) = (get(&tx, "emitter")?, get(&tx, "epoch")?);
        // A ring without its file goes on by itself if it tells everything: which seqs were given, and by whom.
        let ours = left.filter(|left| match (&left.identity, &stored_epoch) {
            (Some(identity), Some(epoch)) => identity.epoch == *epoch,
            (Some(_), None) => left.same_boot,
            (None, _) => false,
        });
        let known = left.and_then(|left| left.identity.clone());
        let former = stored_name.or_else(|| known.as_ref().map(|known| known.emitter.clone()));
        let name = emitter.map(str::to_owned).or_else(|| former.clone()).unwrap_or_else(|| epoch_from(random[0]));
        // Another name means other high-water marks at the hub: seqs under it start a history of their own.
        let kept = if former.as_deref() == Some(&name) {
            stored_epoch.clone().or_else(|| ours.and(known).map(|known| known.epoch))
        } else {
            None
        };
        let epoch = kept.clone().unwrap_or_else(|| epoch_from(random[1]));
        let base: u64 = get(&tx, "base")?.unwrap_or(0);
        let stored = Stored {
            base,
            last: self.meta.last.max(base),
            reserved: get(&tx, "reserved")?.unwrap_or(0),
            next_seq: get(&tx, "next_seq")?,
        };
        let Reunion { base, mut last, next_seq, mut held } = reunite(stored, left, ours.is_some());
        // What is in the ring stays there as it was, also an event that was parked since.
        let refused = match (&stored_epoch, &ours) {
            (Some(epoch), Some(_)) => parked::gaps_in(&held, parked::seqs_behind(&tx, epoch, last)?),
            _ => Vec::new(),
        };
        let adopts = left.is_some_and(|left| {
            let roomy = segments.is_some_and(|segments| left.is_usable(segments) && left.ring.used() * 2 <= segments);
            roomy && ours.is_some() && kept.is_some()
        });
        // What a cleanly ended process had left of its promise was never used; with a ring the exact seq is known.
        let reserved = next_seq - 1 + if segments.is_none() { RESERVE_FIRST } else { 0 };
        let mut meta = Meta { emitter: name, epoch, reserved, base, last };
        // Rows that the ring knows to be confirmed must not leave a hole before what comes.
        trim(&tx, &mut usage, &mut meta, base)?;
        if !adopts {
            let behind = held.drain(..).filter_map(|item| item.after(last));
            for item in behind.flat_map(|item| item.without(&refused)) {
                insert(&tx, &item, now)?;
                usage.add(&item);
            }
            last = next_seq - 1;
            if let Some(left) = left {
                put(&tx, "taken_over", left.id as i64)?;
            }
        }
        meta.last = last;
        meta.store(&tx)?;
        usage.store(&tx, last)?;
        if let Some(anchor) = anchor {
            put(&tx, "clock", anchor)?;
        }
        tx.execute("DELETE FROM meta WHERE key = 'next_seq'", [])?; // there again after the next clean stop
        let mut gaps: Vec<Gap> = gap_rows(&tx)?.iter().filter_map(|row| row.item.gap()).collect();
        gaps.extend(refused.into_iter().filter(|_| adopts));
        let (bytes, parked) = (usage.bytes, parked::usage(&tx)?.0);
        tx.commit()?; // at last, so that a file that is found damaged here is salvaged as it was
        self.db.pragma_update(None, "synchronous", "NORMAL")?;
        self.clock.note_stored();
        (self.usage, self.meta, self.parked) = (usage, meta.clone(), parked);
        let Meta { emitter, epoch, .. } = meta;
        let recovered = Recovered {
            emitter,
            epoch,
            next_seq,
            reserved,
            base,
            last,
            gaps,
            bytes,
            oldest: None,
            parked,
            held,
            ring: None,
            damage: None,
        };
        Ok((recovered, adopts))
    }
}

#[derive(Default)]
pub(super) struct Survey {
    pub(super) usage: Usage,
    pub(super) last: u64,
    oldest: Option<i64>,
    newest: Option<i64>,
}

/// Looks at the file's own values, its first rows, its last one and its gaps, which is the same work however much is
/// stored.
pub(super) fn survey(db: &Connection) -> rusqlite::Result<Survey> {
    let base: Option<u64> = get(db, "base")?;
    let totals = Usage::load(db)?;
    let numbers = [base.is_some(), get::<u64>(db, "reserved")?.is_some(), totals.is_some()];
    if numbers != [get::<String>(db, "epoch")?.is_some(); 3] || !sqlite::is_made(db)? {
        return Err(damaged("some of its own values are missing"));
    }
    for key in ["emitter", "next_seq", "clock", "taken_over"] {
        get::<rusqlite::types::Value>(db, key)?;
    }
    let base = base.unwrap_or(0);
    let (usage, last) = totals.unwrap_or_default();
    let gaps = gap_rows(db)?;
    let sql = "SELECT first, last, stored_at, reason, data, crc FROM item ORDER BY first DESC LIMIT 1";
    let end = db.query_row(sql, [], read_row).optional()?;
    if end.as_ref().map_or(base, |row| row.item.last()).max(base) != last {
        return Err(damaged("its last rows are missing"));
    }
    let (mut oldest, mut known, mut bytes) = (None, base, 0);
    let mut query = db.prepare("SELECT first, last, stored_at, reason, data, crc FROM item ORDER BY first")?;
    let mut rows = query.query([])?;
    while bytes < HEAD
        && let Some(row) = rows.next()?
    {
        let Row { item, stored_at } = read_row(row)?;
        let follows = if bytes == 0 { item.first() <= known + 1 } else { item.first() == known + 1 };
        if !follows || item.first() == 0 {
            return Err(damaged("rows are missing"));
        }
        known = item.last();
        bytes += item.bytes() + 64;
        oldest = oldest.or((item.events() > 0).then_some(stored_at));
    }
    // In the order of the rows, only gaps are newer than what follows them.
    let newest = gaps.iter().chain(&end).map(|row| row.stored_at).max();
    Ok(Survey { usage, last, oldest, newest })
}

fn unopened(path: &Path, error: rusqlite::Error) -> Error {
    if sqlite::is_full(&error) { no_room(path, "open", error) } else { PURPOSE.unusable(path, error) }
}
