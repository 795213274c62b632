//! A spill in memory that keeps the contract of `SpillStore`, survives crashes, and fails when told to.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use safe_broadcaster::emitter::config::{EmitterConfig, WhenFull};
use safe_broadcaster::emitter::item::{Gap, GapReason, Item};
use safe_broadcaster::emitter::ring::Left;
use safe_broadcaster::emitter::spill::parked::{Parking, Wanted, gaps_in};
use safe_broadcaster::emitter::spill::reunion::{Reunion, Stored, reunite};
use safe_broadcaster::emitter::spill::salvage::Damage;
use safe_broadcaster::emitter::spill::store::{RESERVE_FIRST, Recovered};
use safe_broadcaster::emitter::spill::{Done, Op};
use safe_broadcaster::error::{Error, ErrorKind};

/// How often the disk's thread looks for parked events that somebody wants back.
const LOOK: Duration = Duration::from_secs(1);

struct Parked {
    id: i64,
    seq: u64,
    json: Vec<u8>,
    wanted: bool,
}

/// What the platters hold.
#[derive(Default)]
#[expect(clippy::struct_excessive_bools, reason = "what can be wrong with a disk does not exclude each other")]
pub(crate) struct Disk {
    rows: BTreeMap<u64, Item>,
    base: u64,
    pub(crate) reserved: u64,
    next_seq: Option<u64>,
    limit_events: u64,
    limit_bytes: u64,
    drop_oldest: bool,
    parked: Vec<Parked>,
    parked_limit: u64,
    /// Every place in the stream that was ever parked, and the event that it held.
    pub(crate) ever_parked: BTreeMap<u64, Vec<u8>>,
    looked: Duration,
    /// Operations on their way, each with the time at which it is done.
    pub(crate) queue: VecDeque<(Duration, Op)>,
    /// Confirmed when the last append was asked for.
    acked: u64,
    /// Share of operations that fail at present.
    pub(crate) failing: f64,
    /// No room: nothing can be added, but what makes the spill smaller succeeds.
    pub(crate) full: bool,
    /// Share of operations that find some rows unreadable; in calm moments they are found too.
    pub(crate) rotting: f64,
    /// The answer of the operation that found it.
    answer: Option<Done>,
    /// When an operation of each kind last failed: it must not be tried again at once.
    failed: BTreeMap<&'static str, Duration>,
    /// Something was given up although everything unconfirmed was within the bounds.
    pub(crate) needless: bool,
    /// A ring lies beside it.
    pub(crate) has_ring: bool,
}

pub(crate) fn kind(op: &Op) -> &'static str {
    match op {
        Op::Append { .. } => "append",
        Op::Read { .. } => "read",
        Op::Trim { .. } => "trim",
        Op::Reserve { .. } => "reserve",
        Op::Park { .. } => "park",
        Op::Unpark { .. } => "unpark",
        Op::Probe => "probe",
        Op::Peek { .. } => "peek",
        Op::Close { .. } => "close",
    }
}

impl Disk {
    pub(crate) fn new(config: &EmitterConfig) -> Self {
        Self {
            limit_events: config.spill_max_events,
            limit_bytes: config.spill_max_bytes,
            drop_oldest: config.when_full == WhenFull::DropOldest,
            parked_limit: config.parked_max_events,
            ..Self::default()
        }
    }

    /// Takes an operation; it will be done at `at`.
    pub(crate) fn submit(&mut self, now: Duration, at: Duration, op: Op, acked: u64) {
        if let Op::Append { .. } = op {
            self.acked = acked;
        }
        if let Op::Read { after, .. } = op {
            assert!(after < self.last(), "a read after {after}, where nothing is");
        }
        let kind = kind(&op);
        assert!(self.queue.iter().all(|(_, other)| self::kind(other) != kind), "a second {kind} is under way");
        assert!(self.queue.iter().all(|(_, other)| self::kind(other) != "close"), "{kind} after close");
        if let Some(at) = self.failed.get(kind) {
            assert!(
                kind == "close" || now >= *at + Duration::from_millis(500),
                "{kind} failed and is tried again at once"
            );
        }
        let at = self.queue.back().map_or(at, |(last, _)| at.max(*last));
        self.queue.push_back((at, op));
    }

    /// The disk is as it should be again.
    pub(crate) fn heal(&mut self) {
        (self.failing, self.full, self.rotting) = (0.0, false, 0.0);
    }

    /// Whether nothing is under way.
    pub(crate) fn is_idle(&self) -> bool {
        self.queue.is_empty() && self.answer.is_none()
    }

    /// Does the next operation if its time has come.
    pub(crate) fn work(&mut self, now: Duration, rng: &mut fastrand::Rng) -> Option<Done> {
        if let Some(answer) = self.answer.take() {
            return Some(answer);
        }
        if self.queue.front().is_none_or(|(at, _)| *at > now) {
            // In a calm moment it looks by itself.
            let found = rng.f64() < self.rotting / 10.0;
            let damage = if found { self.rot(rng) } else { None };
            return damage.map(|damage| Done::Damaged { damage, bytes: self.bytes() });
        }
        let (_, op) = self.queue.pop_front()?;
        let full = self.full && matches!(op, Op::Append { .. } | Op::Probe);
        let fails = full || rng.f64() < self.failing;
        if fails {
            self.failed.insert(kind(&op), now);
            return Some(self.refuse(&op));
        }
        self.failed.remove(kind(&op));
        let damage = if rng.f64() < self.rotting { self.rot(rng) } else { None };
        let answer = self.apply(op);
        let Some(damage) = damage else { return Some(answer) };
        self.answer = Some(answer);
        Some(Done::Damaged { damage, bytes: self.bytes() })
    }

    /// Some rows cannot be read any more: gaps stand in their places.
    fn rot(&mut self, rng: &mut fastrand::Rng) -> Option<Damage> {
        // What is confirmed already is of no interest.
        let events = self.rows.values().filter(|item| item.events() > 0 && item.last() > self.base);
        let lost: Vec<u64> = events.map(Item::first).filter(|_| rng.u8(..4) == 0).collect();
        let mut unreadable = Vec::new();
        for first in lost {
            let item = self.rows.remove(&first)?;
            let gap = Gap { from: first.max(self.base + 1), to: item.last(), reason: GapReason::Corrupt };
            self.insert(Item::Gap(gap));
            unreadable.push(gap);
        }
        let (cause, set_aside) = ("simulated".to_owned(), "aside".into());
        let damage = Damage { cause, salvaged: self.events(), unreadable, set_aside, removed: Vec::new() };
        Some(damage).filter(|damage| damage.lost() > 0)
    }

    /// The process dies: a random part of what was under way is done, the rest never.
    pub(crate) fn crash(&mut self, rng: &mut fastrand::Rng) {
        let done = rng.usize(0..=self.queue.len());
        for (_, op) in std::mem::take(&mut self.queue).into_iter().take(done) {
            if rng.f64() >= self.failing {
                self.apply(op);
            }
        }
        self.failed.clear();
        self.answer = None;
    }

    pub(crate) fn apply(&mut self, op: Op) -> Done {
        match op {
            Op::Append { items, in_flight, acked } => {
                let upto = items.last().map_or(0, Item::last);
                let dropped = self.append(items, in_flight, acked);
                Done::Appended { upto, dropped, bytes: self.bytes() }
            }
            Op::Read { after, max_bytes } => Done::Read(Ok(self.read(after, max_bytes))),
            Op::Trim { upto } => {
                self.trim(upto);
                Done::Trimmed { result: Ok(()), bytes: self.bytes() }
            }
            Op::Reserve { upto, acked } => {
                assert!(upto > self.reserved, "a promise of {upto} after one of {}", self.reserved);
                self.reserved = upto;
                self.trim(acked);
                Done::Reserved { upto, result: Ok(()) }
            }
            Op::Park { seq, json, .. } => {
                let parking = self.park(seq, json.map(|json| json.to_vec()));
                Done::Parked { seq, result: Ok(parking), bytes: self.bytes() }
            }
            Op::Unpark { ids } => {
                self.parked.retain(|each| !ids.contains(&each.id));
                Done::Unparked { ids, result: Ok(()), parked: self.parked.len() as u64 }
            }
            Op::Probe => Done::Probed(Ok(())),
            Op::Close { next_seq, acked } => {
                self.trim(acked);
                self.next_seq = Some(next_seq);
                self.has_ring &= self.last().max(acked) + 1 < next_seq;
                Done::Closed(Ok(()))
            }
            Op::Peek { .. } => unreachable!("nobody peeks here"),
        }
    }

    fn bytes(&self) -> u64 {
        self.rows.values().map(|item| item.bytes() as u64).sum()
    }

    fn events(&self) -> u64 {
        self.rows.values().map(Item::events).sum()
    }

    fn last(&self) -> u64 {
        self.rows.values().next_back().map_or(self.base, Item::last).max(self.base)
    }

    fn insert(&mut self, item: Item) {
        if let Item::Gap(gap) = item
            && let Some((_, Item::Gap(before))) = self.rows.range_mut(..gap.from).next_back()
            && before.to + 1 == gap.from
            && before.reason == gap.reason
        {
            before.to = gap.to;
            return;
        }
        let clash = self.rows.insert(item.first(), item);
        assert!(clash.is_none(), "seq {:?} is stored twice", clash.map(|item| item.first()));
    }

    fn append(&mut self, items: Vec<Item>, in_flight: u64, acked: u64) -> Vec<Gap> {
        self.trim(acked);
        for item in items {
            assert!(item.first() > self.last(), "{} is stored behind {}", item.first(), self.last());
            self.insert(item);
        }
        self.make_room(in_flight)
    }

    fn park(&mut self, seq: u64, held: Option<Vec<u8>>) -> Parking {
        let at = self.rows.range(..=seq).next_back().filter(|(_, item)| item.events() > 0 && item.last() >= seq);
        let row = at.map(|(first, _)| *first).and_then(|first| self.rows.remove(&first));
        let of_row = row.as_ref().and_then(|item| {
            let Item::Events(block) = item else { return None };
            block.events().find(|(at, _)| *at == seq).map(|(_, json)| json.to_vec())
        });
        assert!(held.is_none() || of_row.is_none() || held == of_row, "seq {seq} is another event in the spill");
        let Some(json) = held.or(of_row) else {
            assert!(self.has(seq), "seq {seq} is to be parked and is nowhere"); // it has rotted, and is a gap
            return Parking { parked: self.parked.len() as u64, dropped: vec![] };
        };
        if self.parked.iter().all(|each| each.seq != seq) {
            let id = self.parked.last().map_or(1, |each| each.id + 1);
            self.parked.push(Parked { id, seq, json: json.clone(), wanted: false });
        }
        self.ever_parked.insert(seq, json);
        if let Some(row) = row {
            let (first, after) = (row.first(), row.after(seq));
            if seq > first {
                self.insert(row.head(seq - first));
            }
            self.insert(Item::Gap(Gap { from: seq, to: seq, reason: GapReason::Refused }));
            if let Some(after) = after {
                self.insert(after);
            }
        }
        let over = (self.parked.len() as u64).saturating_sub(self.parked_limit) as usize;
        let dropped = self.parked.drain(..over).map(|each| each.seq).collect();
        Parking { parked: self.parked.len() as u64, dropped }
    }

    /// Somebody wants parked events to be sent again.
    pub(crate) fn want(&mut self, rng: &mut fastrand::Rng) {
        self.parked.iter_mut().for_each(|each| each.wanted |= rng.bool());
    }

    pub(crate) fn is_wanted(&self) -> bool {
        self.parked.iter().any(|each| each.wanted)
    }

    /// When the disk's thread looks again for what is wanted.
    pub(crate) fn next_look(&self) -> Option<Duration> {
        self.is_wanted().then(|| self.looked + LOOK)
    }

    /// What is wanted, now and then, again and again.
    pub(crate) fn look(&mut self, now: Duration) -> Option<Done> {
        if !self.is_wanted() || now < self.looked + LOOK {
            return None;
        }
        self.looked = now;
        let wanted = self.parked.iter().filter(|each| each.wanted).take(3);
        Some(Done::Wanted(wanted.map(|each| Wanted { id: each.id, json: each.json.clone().into() }).collect()))
    }

    fn make_room(&mut self, in_flight: u64) -> Vec<Gap> {
        let mut gaps: Vec<Gap> = Vec::new();
        while self.drop_oldest {
            let over = self.events().saturating_sub(self.limit_events);
            let heavy = self.bytes() > self.limit_bytes;
            if over == 0 && !heavy {
                break;
            }
            let useful = self.rows.values().filter(|item| item.last() > self.acked);
            let (events, bytes) = useful.fold((0, 0), |sum, item| (sum.0 + item.events(), sum.1 + item.bytes() as u64));
            if events <= self.limit_events && bytes <= self.limit_bytes {
                self.needless = true;
            }
            let oldest = self.rows.range(in_flight + 1..).find(|(_, item)| item.events() > 0).map(|(first, _)| *first);
            let Some(Item::Events(block)) = oldest.and_then(|first| self.rows.remove(&first)) else { break };
            let upto = if heavy || over >= block.count() { block.last() } else { block.first() + over - 1 };
            let gap = Gap { from: block.first(), to: upto, reason: GapReason::SpillFull };
            if let Some(rest) = block.after(upto) {
                self.insert(Item::Events(rest));
            }
            self.insert(Item::Gap(gap));
            match gaps.last_mut() {
                Some(last) if last.to + 1 == gap.from => last.to = gap.to,
                _ => gaps.push(gap),
            }
        }
        gaps
    }

    fn read(&self, seq: u64, max_bytes: usize) -> Vec<Item> {
        let (mut items, mut bytes) = (Vec::new(), 0);
        let start = self.rows.range(..=seq + 1).next_back().map_or(0, |(first, _)| *first);
        for item in self.rows.range(start..).filter_map(|(_, item)| item.after(seq)) {
            if bytes >= max_bytes {
                break;
            }
            bytes += item.bytes().max(64);
            items.push(item);
        }
        items
    }

    fn trim(&mut self, seq: u64) {
        assert!(seq >= self.base, "the base goes back from {} to {seq}", self.base);
        self.rows.retain(|_, item| item.last() > seq);
        self.base = seq;
    }

    /// What `SpillStore::open` does, and whether the ring stays in use as it is.
    pub(crate) fn recover(&mut self, left: Option<&Left>, segments: Option<usize>) -> (Recovered, bool) {
        self.failed.clear(); // another process knows nothing of it
        let first = self.rows.keys().next().copied();
        let base = self.base.max(first.map_or(0, |first| first - 1));
        let stored = Stored { base, last: self.last(), reserved: self.reserved, next_seq: self.next_seq.take() };
        let Reunion { base, mut last, next_seq, mut held } = reunite(stored, left, true);
        let behind = self.parked.iter().map(|each| each.seq).filter(|seq| left.is_some() && *seq > last);
        let refused = gaps_in(&held, behind.collect::<BTreeSet<_>>());
        let roomy = |left: &Left| segments.is_some_and(|n| left.is_usable(n) && left.ring.used() * 2 <= n);
        let adopts = left.is_some_and(roomy);
        if !adopts {
            let behind = held.drain(..).filter_map(|item| item.after(last));
            behind.flat_map(|item| item.without(&refused)).for_each(|item| self.insert(item));
            last = next_seq - 1;
        }
        self.base = base;
        self.reserved = next_seq - 1 + if segments.is_none() { RESERVE_FIRST } else { 0 };
        self.has_ring = segments.is_some();
        let mut gaps: Vec<Gap> = self.rows.values().filter_map(Item::gap).collect();
        gaps.extend(refused.into_iter().filter(|_| adopts));
        let (emitter, epoch) = ("simulated".into(), "epoch".into());
        let reserved = self.reserved;
        let (bytes, parked, oldest) = (self.bytes(), self.parked.len() as u64, None);
        let (ring, damage) = (None, None);
        let recovered = Recovered {
            emitter,
            epoch,
            next_seq,
            reserved,
            base,
            last,
            gaps,
            bytes,
            oldest,
            parked,
            held,
            ring,
            damage,
        };
        (recovered, adopts)
    }

    /// Whether `seq` is stored as an event.
    pub(crate) fn has_event(&self, seq: u64) -> bool {
        let row = self.rows.range(..=seq).next_back();
        row.is_some_and(|(_, item)| item.events() > 0 && item.last() >= seq)
    }

    /// Whether `seq` is stored as an event or as a gap.
    pub(crate) fn has(&self, seq: u64) -> bool {
        self.rows.range(..=seq).next_back().is_some_and(|(_, item)| item.last() >= seq)
    }

    fn refuse(&self, op: &Op) -> Done {
        let error = || Error::new(ErrorKind::SpillIo, "the simulated disk refuses");
        match op {
            Op::Append { .. } => Done::AppendFailed(error()),
            Op::Read { .. } => Done::Read(Err(error())),
            Op::Trim { .. } => Done::Trimmed { result: Err(error()), bytes: self.bytes() },
            Op::Reserve { upto, .. } => Done::Reserved { upto: *upto, result: Err(error()) },
            Op::Park { seq, .. } => Done::Parked { seq: *seq, result: Err(error()), bytes: self.bytes() },
            Op::Unpark { ids } => {
                Done::Unparked { ids: ids.clone(), result: Err(error()), parked: self.parked.len() as u64 }
            }
            Op::Probe => Done::Probed(Err(error())),
            Op::Close { .. } => Done::Closed(Err(error())),
            Op::Peek { .. } => unreachable!("nobody peeks here"),
        }
    }
}
