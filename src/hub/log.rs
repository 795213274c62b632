//! The log in memory: the newest entries, bounded by number, bytes and age, for subscribers that come back.
//!
//! Recovery is all or nothing: a position either has everything after it, or is told why not. Time is an argument
//! (since the hub's start), so that expiry can be tested without waiting.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::entities::Entities;
use super::entry::{Entry, Filter, Record};
use crate::wire::position::Position;
use crate::wire::subscriber::Carried;

/// How much the log keeps; whichever bound is met first evicts the oldest entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogLimits {
    /// Entries.
    pub events: usize,
    /// Bytes of JSON, with [`ENTRY_BYTES`] for each entry.
    pub bytes: usize,
    /// Age; `None` keeps an entry until the other bounds evict it.
    pub age: Option<Duration>,
}

/// What an entry costs beside its JSON, so that a million empty events are not counted as nothing.
pub const ENTRY_BYTES: usize = 128;

/// Why a position cannot be served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotRecovered {
    /// It belongs to another life of the log.
    Epoch,
    /// Entries after it were evicted.
    Truncated,
    /// It lies after the newest entry.
    Ahead,
    /// Too many replays are on their way to the session already.
    Limit,
    /// Another hub is ahead of this one and may have given it (the bus is asked), or gave it to a session that stands
    /// elsewhere. To be closed, not answered.
    Doubtful,
}

impl NotRecovered {
    /// The word on the wire; there is none for a doubt, which is no answer.
    #[must_use]
    pub fn word(self) -> Option<&'static str> {
        match self {
            Self::Epoch => Some("epoch"),
            Self::Truncated => Some("truncated"),
            Self::Ahead => Some("ahead"),
            Self::Limit => Some("limit"),
            Self::Doubtful => None,
        }
    }
}

/// Positions ahead of everything that is known, where other hubs write too. Each for itself: one that somebody made up must
/// not judge the others.
#[derive(Clone, Debug, Default)]
struct Doubts {
    /// They came since the bus was asked.
    open: BTreeSet<u64>,
    /// The bus is being asked.
    asked: BTreeSet<u64>,
    /// The bus was asked, and did not have them.
    judged: BTreeSet<u64>,
}

/// Most positions of each kind. Whoever is not noted comes back once more.
const DOUBTS: usize = 1000;

/// See the module.
#[derive(Debug)]
pub struct Log {
    epoch: String,
    /// Offset of the newest entry ever appended; 0 before the first.
    head: u64,
    /// Entries up to here exist, but may not have come to this log yet.
    known: u64,
    /// Of a log that many hubs share.
    doubts: Option<Doubts>,
    entries: VecDeque<(Duration, Entry)>,
    bytes: usize,
    limits: LogLimits,
    noting: Noting,
}

/// What the log notes of each event.
#[derive(Clone, Debug, Default)]
pub struct Noting {
    /// Those that match ask for an ack.
    pub requires_ack: Filter,
    /// Where it names topics beside its own.
    pub entities: Arc<Entities>,
}

impl Log {
    /// An empty log. The epoch must be new: offsets start from 1 again.
    #[must_use]
    pub fn new(epoch: String, limits: LogLimits) -> Self {
        Self {
            epoch,
            head: 0,
            known: 0,
            doubts: None,
            entries: VecDeque::new(),
            bytes: 0,
            limits,
            noting: Noting::default(),
        }
    }

    /// A log that goes on after the entry with the offset `head`.
    #[must_use]
    pub fn resume(epoch: String, head: u64, limits: LogLimits) -> Self {
        Self { head, ..Self::new(epoch, limits) }
    }

    /// The same log, which notes this of its events.
    #[must_use]
    pub fn noting(self, noting: Noting) -> Self {
        Self { noting, ..self }
    }

    /// Where events name topics beside their own.
    #[must_use]
    pub fn entities(&self) -> Arc<Entities> {
        self.noting.entities.clone()
    }

    /// The log begins anew in an epoch, behind the offset `head`: nothing is kept.
    pub fn restart(&mut self, epoch: String, head: u64) {
        (self.epoch, self.head, self.known) = (epoch, head, 0);
        self.doubts = self.doubts.take().map(|_| Doubts::default());
        self.entries.clear();
        self.bytes = 0;
    }

    /// Entries up to this offset exist elsewhere, and will come: a position there is not ahead.
    pub fn expect(&mut self, known: u64) {
        self.known = self.known.max(known);
    }

    /// The same log, of which other hubs may know more: a position that is ahead is doubtful until the bus was asked.
    #[must_use]
    pub fn shared_with_others(self) -> Self {
        Self { doubts: Some(Doubts::default()), ..self }
    }

    /// The bus is asked now how far the stream is.
    pub fn ask(&mut self) {
        if let Some(doubts) = &mut self.doubts {
            doubts.asked.append(&mut doubts.open);
        }
    }

    /// It has answered what it was asked last: the stream has `known` entries.
    pub fn judge(&mut self, known: u64) {
        self.expect(known);
        if let Some(doubts) = &mut self.doubts {
            doubts.judged.append(&mut doubts.asked);
            doubts.judged.retain(|position| *position > known);
            while doubts.judged.len() > DOUBTS {
                doubts.judged.pop_last(); // the least believable
            }
        }
    }

    /// The epoch of all its offsets.
    #[must_use]
    pub fn epoch(&self) -> &str {
        &self.epoch
    }

    /// Offset of the newest entry; 0 before the first.
    #[must_use]
    pub fn head(&self) -> u64 {
        self.head
    }

    /// How many entries are kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is kept.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// What the kept entries cost, in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Gives the record its place.
    pub fn append(&mut self, mut record: Record, now: Duration) -> Entry {
        record.find_entities(&self.noting.entities);
        record.requires_ack = record.carried() == Carried::Event && self.noting.requires_ack.matches(&record);
        self.head += 1;
        let entry = Entry { offset: self.head, record };
        self.bytes += cost(&entry.record);
        self.entries.push_back((now, entry.clone()));
        self.evict(now);
        entry
    }

    /// Offset of the oldest entry that is kept; the next one's while none is.
    #[must_use]
    pub fn first(&self) -> u64 {
        self.head + 1 - self.entries.len() as u64
    }

    /// An entry, if it is kept.
    #[must_use]
    pub fn get(&self, offset: u64) -> Option<&Entry> {
        let index = offset.checked_sub(self.first())?;
        self.entries.get(index as usize).map(|(_, entry)| entry)
    }

    /// What is kept of the entries from an offset to before another.
    #[must_use]
    pub fn range(&self, from: u64, to: u64) -> impl DoubleEndedIterator<Item = &Entry> {
        let index = |offset: u64| (offset.saturating_sub(self.first()) as usize).min(self.entries.len());
        let (begin, end) = (index(from), index(to));
        self.entries.range(begin..end.max(begin)).map(|(_, entry)| entry)
    }

    /// Everything that came after a position.
    ///
    /// # Errors
    /// Why that cannot be given: [`NotRecovered`].
    pub fn since<'a>(
        &'a mut self,
        position: &Position,
        now: Duration,
    ) -> Result<impl Iterator<Item = &'a Entry> + use<'a>, NotRecovered> {
        self.evict(now);
        if position.epoch != self.epoch {
            return Err(NotRecovered::Epoch);
        }
        if position.offset > self.head.max(self.known) {
            return Err(match &mut self.doubts {
                Some(doubts) if !doubts.judged.contains(&position.offset) => {
                    if doubts.open.len() < DOUBTS && doubts.asked.len() < DOUBTS {
                        doubts.open.insert(position.offset);
                    }
                    NotRecovered::Doubtful
                }
                _ => NotRecovered::Ahead,
            });
        }
        if position.offset + 1 < self.first() {
            return Err(NotRecovered::Truncated);
        }
        Ok(self.range(position.offset + 1, self.head + 1))
    }

    /// The entries after an offset that are still there, oldest first.
    pub fn after(&mut self, offset: u64, now: Duration) -> impl Iterator<Item = &Entry> {
        self.evict(now);
        let gone = self.head - self.entries.len() as u64;
        let skip = offset.saturating_sub(gone).min(self.entries.len() as u64);
        self.entries.range(skip as usize..).map(|(_, entry)| entry)
    }

    /// Gives up what is too old, or too much.
    pub fn evict(&mut self, now: Duration) {
        while let Some((at, entry)) = self.entries.front() {
            let expired = self.limits.age.is_some_and(|age| now.saturating_sub(*at) > age);
            if !expired && self.entries.len() <= self.limits.events && self.bytes <= self.limits.bytes {
                break;
            }
            self.bytes -= cost(&entry.record);
            self.entries.pop_front();
        }
    }
}

/// What a record costs in the log.
#[must_use]
pub fn cost(record: &Record) -> usize {
    ENTRY_BYTES + record.json().len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::topic::Pattern;
    use bytes::Bytes;

    const ALL: LogLimits = LogLimits { events: 100, bytes: 1 << 20, age: None };

    fn log(limits: LogLimits, events: usize) -> Log {
        let mut log = Log::new("e".into(), limits);
        for n in 0..events {
            let kind = if n % 2 == 0 { "even" } else { "odd" };
            let json = format!(r#"{{"type":"{kind}"}}"#);
            log.append(Record::event(Bytes::from(json)).expect("valid"), Duration::from_secs(n as u64));
        }
        log
    }

    fn since(log: &mut Log, epoch: &str, offset: u64, pattern: &str, now: u64) -> Result<Vec<u64>, NotRecovered> {
        let filter = Filter::new([Pattern::parse(pattern).expect("valid")]);
        let position = Position { epoch: epoch.into(), offset };
        let entries = log.since(&position, Duration::from_secs(now))?;
        Ok(entries.filter(|entry| filter.matches(&entry.record)).map(|entry| entry.offset).collect())
    }

    #[test]
    fn a_position_gets_exactly_what_came_after_it() {
        let mut log = log(ALL, 5);
        assert_eq!(since(&mut log, "e", 0, "*", 9), Ok(vec![1, 2, 3, 4, 5]));
        assert_eq!(since(&mut log, "e", 3, "*", 9), Ok(vec![4, 5]));
        assert_eq!(since(&mut log, "e", 5, "*", 9), Ok(vec![]));
        assert_eq!(since(&mut log, "e", 1, "odd", 9), Ok(vec![2, 4]));
    }

    #[test]
    fn a_position_that_cannot_be_served_says_why() {
        let mut log = log(LogLimits { events: 2, ..ALL }, 5);
        assert_eq!(since(&mut log, "f", 5, "*", 9), Err(NotRecovered::Epoch));
        assert_eq!(since(&mut log, "", 5, "*", 9), Err(NotRecovered::Epoch));
        assert_eq!(since(&mut log, "e", 6, "*", 9), Err(NotRecovered::Ahead));
        assert_eq!(since(&mut log, "e", u64::MAX, "*", 9), Err(NotRecovered::Ahead));
        assert_eq!(since(&mut log, "e", 2, "*", 9), Err(NotRecovered::Truncated));
        assert_eq!(since(&mut log, "e", 3, "*", 9), Ok(vec![4, 5]));
    }

    #[test]
    fn a_position_that_is_known_to_exist_is_not_ahead() {
        let mut log = log(ALL, 5);
        log.expect(7);
        assert_eq!(since(&mut log, "e", 7, "*", 9), Ok(vec![]));
        assert_eq!(since(&mut log, "e", 8, "*", 9), Err(NotRecovered::Ahead));
        log.restart("f".into(), 2);
        assert_eq!(since(&mut log, "f", 3, "*", 9), Err(NotRecovered::Ahead));
    }

    #[test]
    fn a_position_that_another_hub_may_have_given_is_doubtful_until_the_bus_was_asked() {
        let mut log = log(ALL, 5).shared_with_others();
        for position in [7, 9, u64::MAX] {
            assert_eq!(since(&mut log, "e", position, "*", 9), Err(NotRecovered::Doubtful));
        }
        log.ask();
        assert_eq!(since(&mut log, "e", 11, "*", 9), Err(NotRecovered::Doubtful));
        log.judge(7);
        assert_eq!(since(&mut log, "e", 7, "*", 9), Ok(vec![]));
        for position in [9, u64::MAX] {
            assert_eq!(since(&mut log, "e", position, "*", 9), Err(NotRecovered::Ahead), "the bus has no such entry");
        }
        assert_eq!(since(&mut log, "e", 11, "*", 9), Err(NotRecovered::Doubtful), "it came after the question");
        assert_eq!(since(&mut log, "e", 8, "*", 9), Err(NotRecovered::Doubtful), "and this one nobody has asked for");
        log.restart("f".into(), 2);
        assert_eq!(since(&mut log, "f", 9, "*", 9), Err(NotRecovered::Doubtful), "another stream");
    }

    #[test]
    fn positions_that_are_made_up_take_no_room_for_ever() {
        let mut log = log(ALL, 5).shared_with_others();
        for round in 0..5 {
            for position in 0..3000 {
                let position = u64::MAX - round * 10_000 - position;
                assert_eq!(since(&mut log, "e", position, "*", 9), Err(NotRecovered::Doubtful));
            }
            log.ask();
            log.judge(5);
        }
        let doubts = log.doubts.as_ref().expect("it is shared");
        assert!(doubts.open.len() + doubts.asked.len() + doubts.judged.len() <= 3 * DOUBTS);
    }

    #[test]
    fn an_evicted_event_that_did_not_match_is_a_truncation_too() {
        // It cannot be known any more whether it matched.
        let mut log = log(LogLimits { events: 1, ..ALL }, 2);
        assert_eq!(since(&mut log, "e", 0, "odd", 9), Err(NotRecovered::Truncated));
    }

    #[test]
    fn what_is_left_after_an_offset_can_be_read_without_a_promise() {
        let mut log = log(LogLimits { events: 3, ..ALL }, 5);
        let mut after = |offset| log.after(offset, Duration::ZERO).map(|entry| entry.offset).collect::<Vec<_>>();
        assert_eq!((after(0), after(3), after(4)), (vec![3, 4, 5], vec![4, 5], vec![5]));
        assert_eq!((after(5), after(u64::MAX)), (vec![], vec![]));
    }

    #[test]
    fn a_log_that_keeps_nothing_serves_only_its_head() {
        let mut log = log(LogLimits { events: 0, ..ALL }, 3);
        assert_eq!((log.len(), log.bytes()), (0, 0));
        assert_eq!(since(&mut log, "e", 3, "*", 9), Ok(vec![]));
        assert_eq!(since(&mut log, "e", 2, "*", 9), Err(NotRecovered::Truncated));
    }

    #[test]
    fn bytes_and_age_evict_too() {
        let one = log(ALL, 1).bytes();
        let mut log = log(LogLimits { bytes: 2 * one, age: Some(Duration::from_secs(10)), ..ALL }, 5);
        assert_eq!(log.len(), 2);
        assert_eq!(since(&mut log, "e", 3, "*", 13), Ok(vec![4, 5]));
        assert_eq!(since(&mut log, "e", 3, "*", 14), Err(NotRecovered::Truncated));
        assert_eq!(since(&mut log, "e", 5, "*", 99), Ok(vec![]));
        assert!(log.is_empty() && log.bytes() == 0);
    }
}
