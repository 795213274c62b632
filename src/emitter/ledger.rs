//! The ledger: which part of the stream is where. Pure accounting, no decisions.
//!
//! ```text
//!  seq:   …acked │ spill (on disk) … spill_last │ memory (queue) … taken │ outbox …
//!                └────────── sent ──────────▶ (anywhere in between)
//! ```
//!
//! Everything in the spill is older than everything in memory; `sent` moves over both and falls back to `acked` when
//! the link is lost. A stretch may be in memory and in the spill at once; the spill's word counts.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::Bytes;

use crate::emitter::item::{Gap, GapReason, Item};
use crate::emitter::outbox::Fresh;
use crate::emitter::spill::store::Recovered;

/// Time since the driver started.
pub type Time = Duration;

/// Marks of age are at least this far apart, so that their number is bounded by time and not by events.
const MARK_EVERY: Duration = Duration::from_secs(1);

struct Entry {
    item: Item,
    since: Time,
}

struct Flight {
    last: u64,
    bytes: usize,
}

/// See the [module](self).
#[derive(Default)]
pub struct Ledger {
    /// Everything up to here is confirmed by the peer, or given up.
    acked: u64,
    /// Highest seq handed to the present link.
    sent: u64,
    /// Highest seq taken from the outbox.
    taken: u64,
    /// Highest seq in the spill; below `acked` when it holds nothing of use.
    spill_last: u64,
    /// Unacknowledged events up to here count as spilled.
    spilled_upto: u64,
    queue: VecDeque<Entry>,
    held: usize,
    flights: VecDeque<Flight>,
    in_flight: usize,
    ahead: VecDeque<Item>,
    ahead_bytes: usize,
    gaps: VecDeque<Gap>,
    /// (last seq stored, waiting since), one per [`MARK_EVERY`].
    marks: VecDeque<(u64, Time)>,
    /// Events accepted live that had to be spilled after all.
    pub demoted: u64,
    /// Spilled events that were confirmed.
    pub flushed: u64,
    /// Events given up by the spill.
    pub dropped: u64,
    /// Spilled events that the peer refused and that are parked.
    pub refused: u64,
    /// Events found in the spill at the start.
    pub recovered: u64,
}

impl Ledger {
    /// Starts where an earlier process ended. Whatever was stored before this process counts as stored since zero.
    #[must_use]
    pub fn new(from: &Recovered) -> Self {
        let mut ledger = Self {
            acked: from.base,
            sent: from.base,
            taken: from.next_seq - 1,
            spill_last: from.last,
            spilled_upto: from.next_seq - 1,
            gaps: from.gaps.iter().copied().filter(|gap| gap.to > from.base).collect(),
            ..Self::default()
        };
        for item in &from.held {
            item.gap().into_iter().for_each(|gap| ledger.add_gap(gap));
            ledger.held += item.bytes();
            ledger.queue.push_back(Entry { item: item.clone(), since: Time::ZERO });
        }
        ledger.recovered = ledger.events_between(from.base, from.next_seq - 1);
        if from.last > from.base {
            ledger.marks.push_back((from.last, Time::ZERO));
        }
        ledger
    }

    /// Everything up to here is confirmed or given up.
    #[must_use]
    pub fn acked(&self) -> u64 {
        self.acked
    }

    /// Highest seq handed to the present link.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// Highest seq taken from the outbox.
    #[must_use]
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// Unacknowledged events up to here count as spilled.
    #[must_use]
    pub fn spilled_upto(&self) -> u64 {
        self.spilled_upto
    }

    /// Bytes held in memory.
    #[must_use]
    pub fn held(&self) -> usize {
        self.held
    }

    /// Bytes handed to the link and not confirmed.
    #[must_use]
    pub fn in_flight_bytes(&self) -> usize {
        self.in_flight
    }

    /// Whether everything taken is confirmed.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.acked >= self.taken
    }

    /// Whether the next thing to send lies in the spill.
    #[must_use]
    pub fn is_behind(&self) -> bool {
        self.sent < self.spill_last
    }

    /// Whether the spill holds anything that is not confirmed.
    #[must_use]
    pub fn is_stored(&self) -> bool {
        self.acked < self.spill_last
    }

    /// Highest seq that lies in the spill.
    #[must_use]
    pub fn spill_last(&self) -> u64 {
        self.spill_last
    }

    /// Events (without gaps) in `after + 1 ..= upto`.
    #[must_use]
    pub fn events_between(&self, after: u64, upto: u64) -> u64 {
        let missing: u64 =
            self.gaps.iter().map(|gap| (gap.to.min(upto) + 1).saturating_sub(gap.from.max(after + 1))).sum();
        upto.saturating_sub(after).saturating_sub(missing)
    }

    /// Seqs that need no room: confirmed, or given up.
    #[must_use]
    pub fn settled(&self) -> u64 {
        self.taken - self.events_between(self.acked, self.taken)
    }

    /// Spilled events found, demoted, minus those settled; with the outbox's own count of spilled events it gives the
    /// depth of the spill without waiting for the driver.
    #[must_use]
    pub fn balance(&self) -> i64 {
        (self.recovered + self.demoted) as i64 - (self.flushed + self.dropped + self.refused) as i64
    }

    /// Since when the oldest unconfirmed event waits.
    #[must_use]
    pub fn oldest(&self) -> Option<Time> {
        let stored = self.marks.front().filter(|_| self.is_stored()).map(|mark| mark.1);
        let held = self.queue.iter().find(|entry| entry.item.events() > 0).map(|entry| entry.since);
        match (stored, held) {
            (Some(stored), Some(held)) => Some(stored.min(held)),
            (one, other) => one.or(other),
        }
    }

    /// Takes what comes from the outbox. While the link is down all of it counts as spilled.
    pub fn take(&mut self, fresh: Fresh, since: Time, live: bool) {
        let Fresh { item, spilled, .. } = fresh;
        self.taken = item.last();
        if let Item::Gap(gap) = item {
            self.add_gap(gap);
        }
        if (!live || spilled > 0) && item.events() > 0 {
            let uncounted = self.events_between(self.spilled_upto.max(self.acked), item.last());
            self.demoted += uncounted.saturating_sub(spilled);
            self.spilled_upto = item.last();
        }
        self.held += item.bytes();
        self.queue.push_back(Entry { item, since });
    }

    /// The link is lost: nothing is under way, and what was is spilled.
    pub fn link_lost(&mut self) {
        self.sent = self.acked;
        self.flights.clear();
        self.in_flight = 0;
        self.forget_ahead();
        let from = self.spilled_upto.max(self.acked);
        self.demoted += self.events_between(from, self.taken);
        self.spilled_upto = self.spilled_upto.max(self.taken);
    }

    /// The peer has refused the event behind `acked`: nothing is under way, since it ignores what follows.
    pub fn rewind(&mut self) {
        self.sent = self.acked;
        self.flights.clear();
        self.in_flight = 0;
        self.forget_ahead();
    }

    fn refused_gaps(&self) -> impl Iterator<Item = &Gap> {
        self.gaps.iter().filter(|gap| gap.reason == GapReason::Refused)
    }

    /// The event `seq`, if it is in memory.
    #[must_use]
    pub fn event(&self, seq: u64) -> Option<Bytes> {
        let at = self.queue.partition_point(|entry| entry.item.last() < seq);
        let Item::Events(block) = &self.queue.get(at)?.item else { return None };
        block.events().find(|(found, _)| *found == seq).map(|(_, json)| json)
    }

    /// The event `seq`, which is not under way, is parked. A gap stands in its place in the spill if it was there; in
    /// memory the block stays whole, since its bytes may be all that survives this process, and the gap is cut out of it
    /// on its way out.
    pub fn note_parked(&mut self, seq: u64) {
        if seq <= self.acked {
            return;
        }
        if seq <= self.spilled_upto {
            self.refused += 1;
        }
        self.add_gap(Gap { from: seq, to: seq, reason: GapReason::Refused });
        self.forget_ahead();
    }

    /// The next item for the link, starting behind `sent`.
    ///
    /// # Errors
    /// [`NeedsRead`] while the spill has to be read first.
    pub fn next_item(&mut self) -> Result<Option<Item>, NeedsRead> {
        if self.is_behind() {
            while self.ahead.front().is_some_and(|item| item.last() <= self.sent) {
                self.ahead_bytes -= self.ahead.pop_front().map_or(0, |item| item.bytes());
            }
            return match self.ahead.front() {
                Some(item) => Ok(item.after(self.sent)),
                None => Err(NeedsRead),
            };
        }
        let at = self.queue.partition_point(|entry| entry.item.last() <= self.sent);
        let next = self.queue.get(at).and_then(|entry| entry.item.after(self.sent));
        Ok(next.and_then(|item| item.without(self.refused_gaps()).into_iter().next()))
    }

    /// Notes that an item is on its way.
    pub fn note_sent(&mut self, item: &Item) {
        self.sent = item.last();
        self.in_flight += item.bytes();
        self.flights.push_back(Flight { last: item.last(), bytes: item.bytes() });
    }

    /// Items read from the spill. Stale ones (of an earlier link) are harmless: they are cut at `sent`.
    pub fn note_read(&mut self, items: Vec<Item>) {
        let known = self.ahead.back().map_or(self.sent, Item::last);
        if items.first().is_some_and(|item| item.first() <= known + 1) {
            for item in items.into_iter().filter_map(|item| item.after(known)) {
                self.ahead_bytes += item.bytes();
                self.ahead.push_back(item);
            }
        }
    }

    fn forget_ahead(&mut self) {
        self.ahead.clear();
        self.ahead_bytes = 0;
    }

    /// Bytes read ahead and not yet sent.
    #[must_use]
    pub fn ahead_bytes(&self) -> usize {
        self.ahead_bytes
    }

    /// Last seq read ahead.
    #[must_use]
    pub fn read_upto(&self) -> u64 {
        self.ahead.back().map_or(self.sent, |item| item.last().max(self.sent))
    }

    /// The peer has everything up to `upto`. Returns the buffers that are free now and how many spilled events that were.
    pub fn ack(&mut self, upto: u64) -> (Vec<Item>, u64) {
        let upto = upto.min(self.taken);
        if upto <= self.acked {
            return (Vec::new(), 0);
        }
        let flushed = self.events_between(self.acked, upto.min(self.spilled_upto));
        self.flushed += flushed;
        self.acked = upto;
        self.sent = self.sent.max(upto);
        while self.flights.front().is_some_and(|flight| flight.last <= upto) {
            self.in_flight -= self.flights.pop_front().map_or(0, |flight| flight.bytes);
        }
        while self.gaps.front().is_some_and(|gap| gap.to <= upto) {
            self.gaps.pop_front();
        }
        while self.marks.front().is_some_and(|mark| mark.0 <= upto) {
            self.marks.pop_front();
        }
        (self.forget(upto), flushed)
    }

    /// Items at the front of memory for the spill, `bytes` of them at least if there are so many.
    #[must_use]
    pub fn oldest_held(&self, bytes: usize) -> Vec<Item> {
        let mut sum = 0;
        let wanted = self.queue.iter().take_while(|entry| {
            let more = sum < bytes;
            sum += entry.item.bytes();
            more
        });
        // The front may be confirmed in part.
        let wanted = wanted.filter_map(|entry| entry.item.after(self.acked.max(self.spill_last)));
        wanted.flat_map(|item| item.without(self.refused_gaps())).collect()
    }

    /// Everything in memory up to `upto` is in the spill now, except what it gave up. Returns the free buffers.
    pub fn note_stored(&mut self, upto: u64, dropped: &[Gap], now: Time) -> Vec<Item> {
        let from = self.spilled_upto.max(self.acked);
        self.demoted += self.events_between(from, upto);
        self.spilled_upto = self.spilled_upto.max(upto);
        self.spill_last = self.spill_last.max(upto);
        for gap in dropped {
            self.dropped += self.events_between(gap.from.max(self.acked + 1) - 1, gap.to);
            self.add_gap(*gap);
        }
        if !dropped.is_empty() {
            // What was read ahead may be among it; what has been given up must not be sent.
            self.forget_ahead();
        }
        let since = self.queue.front().map_or(now, |entry| entry.since);
        match self.marks.back_mut() {
            Some(mark) if since.saturating_sub(mark.1) < MARK_EVERY => mark.0 = mark.0.max(upto),
            _ => self.marks.push_back((upto, since)),
        }
        self.forget(upto)
    }

    /// The spill has lost these. What is confirmed or was a gap already is none of them; returns the rest.
    pub fn note_unreadable(&mut self, gaps: &[Gap]) -> Vec<Gap> {
        let mut lost = Vec::new();
        for gap in gaps {
            let mut from = gap.from.max(self.acked + 1);
            while from <= gap.to {
                let known = self.gaps.iter().find(|known| known.to >= from);
                let to = known.map_or(gap.to, |known| gap.to.min(known.from.max(from) - 1));
                let next = known.map_or(u64::MAX, |known| known.to + 1);
                if to >= from {
                    lost.push(Gap { from, to, ..*gap });
                }
                if known.is_none_or(|known| known.from > gap.to) {
                    break;
                }
                from = next;
            }
        }
        for gap in &lost {
            self.dropped += gap.count();
            self.add_gap(*gap);
        }
        self.forget_ahead(); // it may be among it, and what has been given up must not be sent
        lost
    }

    fn forget(&mut self, upto: u64) -> Vec<Item> {
        let mut free = Vec::new();
        while self.queue.front().is_some_and(|entry| entry.item.last() <= upto) {
            if let Some(entry) = self.queue.pop_front() {
                self.held -= entry.item.bytes();
                free.push(entry.item);
            }
        }
        free
    }

    fn add_gap(&mut self, gap: Gap) {
        let at = self.gaps.partition_point(|known| known.from < gap.from);
        if let Some(before) = at.checked_sub(1).and_then(|i| self.gaps.get_mut(i))
            && before.to + 1 == gap.from
            && before.reason == gap.reason
        {
            before.to = gap.to;
        } else {
            self.gaps.insert(at, gap);
        }
    }
}

/// The next item lies in the spill and has not been read yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeedsRead;

#[cfg(test)]
mod tests {

    use super::*;
    use crate::wire::block::BlockBuilder;

    const NOW: Time = Time::from_secs(1);

    fn recovered(base: u64, last: u64, gaps: Vec<Gap>) -> Recovered {
        let (emitter, epoch) = ("ada".to_owned(), "e".to_owned());
        Recovered {
            emitter,
            epoch,
            next_seq: last + 1,
            reserved: last,
            base,
            last,
            gaps,
            bytes: 0,
            oldest: None,
            parked: 0,
            held: vec![],
            ring: None,
            damage: None,
        }
    }

    fn events(first: u64, last: u64) -> Item {
        let mut builder = BlockBuilder::new(first, bytes::BytesMut::new());
        (first..=last).for_each(|_| builder.push(b"{}"));
        Item::Events(builder.seal().expect("not empty"))
    }

    fn gap(from: u64, to: u64) -> Gap {
        Gap { from, to, reason: GapReason::SpillFull }
    }

    /// `spilled` of the events were counted as spilled by the outbox.
    fn take(ledger: &mut Ledger, item: Item, spilled: u64, live: bool) {
        ledger.take(Fresh { item, spilled, since: Time::ZERO }, NOW, live);
    }

    fn send_all(ledger: &mut Ledger) -> Vec<(u64, u64)> {
        let mut sent = Vec::new();
        while let Ok(Some(item)) = ledger.next_item() {
            ledger.note_sent(&item);
            sent.push((item.first(), item.last()));
        }
        sent
    }

    #[test]
    fn live_events_that_are_confirmed_never_count_as_spilled() {
        let mut ledger = Ledger::default();
        take(&mut ledger, events(1, 5), 0, true);
        assert_eq!(send_all(&mut ledger), [(1, 5)]);
        assert_eq!(ledger.ack(3).1, 0);
        assert_eq!((ledger.balance(), ledger.held() > 0, ledger.is_drained()), (0, true, false));
        ledger.ack(5);
        assert_eq!((ledger.balance(), ledger.held(), ledger.in_flight_bytes(), ledger.is_drained()), (0, 0, 0, true));
    }

    #[test]
    fn a_lost_link_demotes_each_unconfirmed_event_once() {
        let mut ledger = Ledger::default();
        take(&mut ledger, events(1, 5), 0, true);
        send_all(&mut ledger);
        ledger.ack(2);
        ledger.link_lost();
        ledger.link_lost();
        assert_eq!((ledger.demoted, ledger.balance(), ledger.sent()), (3, 3, 2));
        assert_eq!(ledger.ack(5).1, 3, "the hub had them after all");
        assert_eq!(ledger.balance(), 0);
    }

    #[test]
    fn events_that_the_outbox_counted_as_spilled_are_not_counted_again() {
        let mut ledger = Ledger::default();
        take(&mut ledger, events(1, 4), 4, false);
        take(&mut ledger, events(5, 6), 0, false); // accepted live, taken after the link was lost
        take(&mut ledger, events(7, 9), 1, true); // accepted while the link came up
        assert_eq!(ledger.demoted, 4, "5, 6 and two of 7 to 9");
        ledger.ack(9);
        assert_eq!(5 + ledger.balance(), 0);
    }

    #[test]
    fn what_the_spill_gave_up_is_dropped_and_not_flushed() {
        let mut ledger = Ledger::default();
        take(&mut ledger, events(1, 10), 10, false);
        let free = ledger.note_stored(10, &[gap(1, 4)], NOW);
        assert_eq!((free.len(), ledger.held(), ledger.dropped), (1, 0, 4));
        assert_eq!((ledger.events_between(0, 10), ledger.settled()), (6, 4));
        assert_eq!(ledger.ack(10).1, 6);
        assert_eq!((10 + ledger.balance(), ledger.settled()), (0, 10));
    }

    #[test]
    fn a_parked_event_is_cut_out_of_its_block_which_stays_whole_in_memory() {
        let mut ledger = Ledger::default();
        take(&mut ledger, events(1, 5), 5, false);
        assert!(ledger.ack(2).0.is_empty());
        ledger.note_parked(3);
        assert_eq!((ledger.events_between(0, 5), ledger.balance() + 5), (4, 2));
        let refused = Gap { from: 3, to: 3, reason: GapReason::Refused };
        assert_eq!(ledger.oldest_held(usize::MAX), [Item::Gap(refused), events(4, 5)]);
        assert_eq!(send_all(&mut ledger), [(3, 3), (4, 5)]);
        let (free, _) = ledger.ack(5);
        assert_eq!(free, [events(1, 5)], "released at once, and not before");
        assert_eq!((ledger.held(), ledger.balance() + 5), (0, 0));
    }

    #[test]
    fn gaps_that_touch_are_one_and_confirmed_ones_are_forgotten() {
        let mut ledger = Ledger::new(&recovered(0, 30, vec![gap(5, 9), gap(20, 24)]));
        ledger.note_stored(30, &[gap(10, 12)], NOW);
        assert_eq!((ledger.gaps.len(), ledger.events_between(4, 12), ledger.recovered), (2, 0, 20));
        ledger.ack(12);
        assert_eq!(ledger.gaps.len(), 1);
        ledger.ack(30);
        assert!(ledger.gaps.is_empty());
        assert_eq!(ledger.balance(), 0);
    }

    #[test]
    fn the_spill_is_sent_before_memory_and_stale_reads_are_ignored() {
        let mut ledger = Ledger::new(&recovered(0, 6, vec![]));
        take(&mut ledger, events(7, 8), 0, true);
        assert_eq!(ledger.next_item(), Err(NeedsRead));
        ledger.note_read(vec![events(5, 6)]); // of an earlier link that had come further
        assert_eq!((ledger.next_item(), ledger.ahead_bytes()), (Err(NeedsRead), 0));
        ledger.note_read(vec![events(1, 3), events(4, 6)]);
        ledger.note_read(vec![events(1, 3)]);
        assert_eq!(send_all(&mut ledger), [(1, 3), (4, 6), (7, 8)]);
        ledger.link_lost();
        assert_eq!((ledger.next_item(), ledger.ahead_bytes()), (Err(NeedsRead), 0));
    }

    #[test]
    fn a_block_confirmed_in_part_is_stored_and_sent_from_its_middle() {
        let mut ledger = Ledger::default();
        take(&mut ledger, events(1, 9), 0, true);
        send_all(&mut ledger);
        ledger.ack(4);
        ledger.link_lost();
        assert_eq!(ledger.oldest_held(1), [events(5, 9)]);
        assert_eq!(send_all(&mut ledger), [(5, 9)]);
    }

    #[test]
    fn the_oldest_unconfirmed_event_is_the_spills_as_long_as_it_holds_one() {
        let mut ledger = Ledger::default();
        take(&mut ledger, events(1, 2), 2, false);
        ledger.note_stored(2, &[], Time::from_secs(5));
        assert_eq!(ledger.oldest(), Some(NOW), "it waits since it was accepted, not since it was stored");
        ledger.take(Fresh { item: events(3, 4), spilled: 2, since: Time::ZERO }, Time::from_secs(7), false);
        assert_eq!(ledger.oldest(), Some(NOW));
        ledger.ack(2);
        assert_eq!(ledger.oldest(), Some(Time::from_secs(7)));
        ledger.ack(4);
        assert_eq!(ledger.oldest(), None);
    }
}
