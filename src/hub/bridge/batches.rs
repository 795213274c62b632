//! What this hub appends. One batch is under way at a time; what comes meanwhile goes into the next one, so that many
//! emitters share one step of the bus. Pure.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::{Appended, Batch, Claim, Entry, Judged, Known, block};
use crate::error::{Error, ErrorKind};
use crate::hub::entry::Record;
use crate::hub::fresh_epoch;
use crate::hub::history::ledger::Verdict;
use crate::hub::log::cost;
use crate::hub::machine::Turn;
use crate::hub::ops::{Op, Outcome, Reply};
use crate::hub::registry::SessionId;
use crate::hub::state::Published;

/// A batch is sent at this size even if more waits: some milliseconds of a bus.
const BATCH_BYTES: usize = 1 << 20;
/// What an entry costs of that beside its records: 16 000 of them are far from what Redis takes in one command.
const ENTRY_BYTES: usize = 64;
/// How many bytes from outside of all hubs may wait to be sent: whoever publishes there cannot be held up.
const INTAKE_BYTES: usize = 16 << 20;

/// An op that waits.
struct Waiting {
    op: Op,
    since: Duration,
    /// It came from outside of all hubs.
    intake: bool,
    /// Its session is gone.
    gone: bool,
}

/// The batch under way.
struct Flight {
    batch: Arc<Batch>,
    /// What it is made of, in the same order.
    ops: Vec<Waiting>,
    /// Sent over the link there is.
    sent: bool,
    /// Sent over one that was lost before it was answered.
    lost: bool,
}

/// What an answer brought.
pub(super) struct Landed {
    /// The records that were kept.
    pub(super) records: Vec<Record>,
    /// Offset of the last one; the one before the next if there is none.
    pub(super) last: u64,
    /// What became of the ops, to be settled when the log has that offset.
    pub(super) outcomes: Vec<Outcome>,
}

/// See the module.
pub(super) struct Batches {
    hub: Arc<str>,
    queue: VecDeque<Waiting>,
    flight: Option<Flight>,
    /// Bytes in the queue that came from outside of all hubs.
    taken_in: usize,
    sent: u64,
    /// The sessions of this hub that own emitters, by the names that other hubs know them by.
    owners: HashMap<String, SessionId>,
}

impl Batches {
    pub(super) fn new(hub: Arc<str>) -> Self {
        Self { hub, queue: VecDeque::new(), flight: None, taken_in: 0, sent: 0, owners: HashMap::new() }
    }

    pub(super) fn push(&mut self, op: Op, since: Duration) {
        self.queue.push_back(Waiting { op, since, intake: false, gone: false });
    }

    /// Takes in what came from outside of all hubs. False if there is no room for it.
    #[must_use]
    pub(super) fn take_in(&mut self, record: Record, since: Duration) -> bool {
        let bytes = cost(&record);
        if self.taken_in + bytes > INTAKE_BYTES {
            return false;
        }
        self.taken_in += bytes;
        let op = Op::Publish { records: vec![record], reply: Reply::new(drop) };
        self.queue.push_back(Waiting { op, since, intake: true, gone: false });
        true
    }

    /// A session is gone.
    pub(super) fn release(&mut self, id: SessionId) {
        if self.owners.remove(&self.session(id)).is_none() {
            let under_way = self.flight.iter_mut().flat_map(|flight| &mut flight.ops);
            let of_it = |waiting: &&mut Waiting| matches!(&waiting.op, Op::Turn { turn, .. } if turn.id == id);
            under_way.chain(&mut self.queue).filter(of_it).for_each(|waiting| waiting.gone = true);
        }
    }

    /// How many were made so far.
    pub(super) fn sent(&self) -> u64 {
        self.sent
    }

    /// How many ops wait.
    pub(super) fn len(&self) -> usize {
        self.queue.len() + self.flight.as_ref().map_or(0, |flight| flight.ops.len())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether ops wait that were never sent.
    pub(super) fn has_waiting(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Since when the oldest op waits.
    pub(super) fn oldest(&self) -> Option<Duration> {
        let under_way = self.flight.iter().flat_map(|flight| &flight.ops);
        under_way.chain(&self.queue).map(|waiting| waiting.since).next()
    }

    /// Number of the batch under way.
    pub(super) fn under_way(&self) -> Option<u64> {
        self.flight.as_ref().map(|flight| flight.batch.number)
    }

    /// The link is gone: the batch under way is to be sent again.
    pub(super) fn unsent(&mut self) {
        if let Some(flight) = &mut self.flight {
            flight.lost |= std::mem::take(&mut flight.sent);
        }
    }

    /// The batch of this number was refused for now: it is to be sent again.
    pub(super) fn refused(&mut self, number: u64) {
        if let Some(flight) = self.flight.as_mut().filter(|flight| flight.batch.number == number) {
            flight.sent = false;
        }
    }

    /// The batch that is to be sent now, if one is.
    pub(super) fn next_to_send(&mut self, known: Known) -> Option<Arc<Batch>> {
        if self.flight.is_none() && !self.queue.is_empty() {
            self.flight = self.next(known);
        }
        let flight = self.flight.as_mut().filter(|flight| !flight.sent)?;
        flight.sent = true;
        Some(flight.batch.clone())
    }

    /// The batch of this number was answered. Nothing comes of it if it was given up.
    pub(super) fn land(&mut self, number: u64, appended: Appended) -> Option<Landed> {
        let flight = self.flight.take_if(|flight| flight.batch.number == number)?;
        let (mut records, mut outcomes, mut last) = (Vec::new(), Vec::new(), appended.first - 1);
        for (waiting, judged) in flight.ops.into_iter().zip(appended.judged) {
            match waiting.op {
                Op::Turn { mut turn, flow, bytes } => {
                    let verdict = self.verdict(&turn, judged, waiting.gone);
                    if verdict != Verdict::Refused {
                        last += turn.records.len() as u64;
                        records.append(&mut turn.records);
                    }
                    outcomes.push(Outcome::Turn { turn, flow, bytes, verdict });
                }
                Op::Publish { records: own, reply } if judged == Judged::Refused => {
                    let error = Some(Error::new(
                        ErrorKind::BusDown,
                        "the event came too late to the bus; it was not published",
                    ));
                    outcomes.push(Outcome::Publish { records: own, reply, error });
                }
                Op::Publish { records: mut own, reply } => {
                    last += own.len() as u64;
                    records.append(&mut own);
                    let published = Published { offset: last, sessions: appended.receivers as usize };
                    outcomes.push(Outcome::Published { reply, published });
                }
                Op::Release { .. } | Op::Close { .. } => {} // are not pushed
            }
        }
        Some(Landed { records, last, outcomes })
    }

    /// Gives the batch under way up: nobody knows what became of it, unless it was refused.
    pub(super) fn give_up_flight(&mut self, cause: &str) -> impl Iterator<Item = Outcome> + use<> {
        let flight = self.flight.take();
        let why = if flight.as_ref().is_some_and(|flight| flight.sent || flight.lost) {
            format!(
                "the bus between the hubs did not answer in time; whether the event was published is not known{cause}"
            )
        } else {
            format!("the bus between the hubs did not take the event; it was not published{cause}")
        };
        let ops = flight.map(|flight| flight.ops).unwrap_or_default();
        ops.into_iter().filter_map(move |waiting| refused(waiting.op, &why))
    }

    /// Gives up what was never sent, as far as it waits since this time or longer.
    pub(super) fn give_up_waiting(&mut self, since: Duration, cause: &str) -> impl Iterator<Item = Outcome> + use<> {
        let why = format!("the bus between the hubs did not answer; the event was not published{cause}");
        let late = self.queue.partition_point(|waiting| waiting.since <= since);
        let late: Vec<_> = self.queue.drain(..late).collect();
        self.taken_in -= late.iter().map(Waiting::taken_in).sum::<usize>();
        late.into_iter().filter_map(move |waiting| refused(waiting.op, &why))
    }

    /// Takes out what was never sent, without what came from outside of all hubs: that is another one's while this one
    /// is alone.
    pub(super) fn take_waiting(&mut self) -> impl Iterator<Item = Op> + use<> {
        self.taken_in = 0;
        std::mem::take(&mut self.queue).into_iter().filter(|waiting| !waiting.intake).map(|waiting| waiting.op)
    }

    fn next(&mut self, known: Known) -> Option<Flight> {
        let fresh = fresh_epoch().ok()?;
        let (mut ops, mut entries, mut bytes) = (Vec::new(), Vec::new(), 0);
        while bytes < BATCH_BYTES
            && let Some(waiting) = self.queue.pop_front()
        {
            let entry = self.entry(&waiting);
            self.taken_in -= waiting.taken_in();
            bytes += ENTRY_BYTES + entry.records.len();
            entries.push(entry);
            ops.push(waiting);
        }
        self.sent += 1;
        Some(Flight {
            batch: Arc::new(Batch { number: self.sent, known, fresh, entries }),
            ops,
            sent: false,
            lost: false,
        })
    }

    fn entry(&self, waiting: &Waiting) -> Entry {
        let (claim, records): (_, &[Record]) = match &waiting.op {
            Op::Turn { turn, .. } => (self.claim(turn), &turn.records),
            Op::Publish { records, .. } if waiting.intake => (Claim::Intake, records),
            Op::Publish { records, .. } => (Claim::Plain, records),
            Op::Release { .. } | Op::Close { .. } => (Claim::Plain, &[]), // are not pushed
        };
        Entry { claim, count: records.len() as u64, records: block::encode(records) }
    }

    fn claim(&self, turn: &Turn) -> Claim {
        if turn.name.is_empty() {
            return Claim::Plain; // no emitter: it has no mark, or broke the protocol before it said who it is
        }
        let (emitter, session) = (turn.name.clone(), self.session(turn.id));
        match &turn.greeting {
            Some(greeting) => {
                let (epoch, floor) = (greeting.epoch.clone(), greeting.next.saturating_sub(1));
                Claim::Hello { emitter, session, epoch, floor }
            }
            None => Claim::Turn { emitter, session, from: turn.marks.0, upto: turn.marks.1 },
        }
    }

    fn session(&self, id: SessionId) -> String {
        format!("{}/{id}", self.hub)
    }

    fn verdict(&mut self, turn: &Turn, judged: Judged, gone: bool) -> Verdict {
        match judged {
            Judged::Refused => Verdict::Refused,
            Judged::Kept => Verdict::Stored,
            Judged::Greeted { have, before } => {
                let superseded = self.owners.remove(&before).filter(|older| *older != turn.id);
                if !gone {
                    self.owners.insert(self.session(turn.id), turn.id);
                }
                Verdict::Greeted { have, superseded }
            }
        }
    }
}

impl Waiting {
    fn taken_in(&self) -> usize {
        match &self.op {
            Op::Publish { records, .. } if self.intake => records.iter().map(cost).sum(),
            _ => 0,
        }
    }
}

fn refused(op: Op, why: &str) -> Option<Outcome> {
    let mut outcome = match op {
        Op::Turn { turn, flow, bytes } => Outcome::Turn { turn, flow, bytes, verdict: Verdict::Refused },
        Op::Publish { records, reply } => Outcome::Publish { records, reply, error: None },
        Op::Release { .. } | Op::Close { .. } => return None,
    };
    outcome.fail(&Error::new(ErrorKind::BusDown, why));
    Some(outcome)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::machine::Greeting;
    use crate::hub::ops::Flow;
    use bytes::Bytes;

    const A: SessionId = SessionId::for_test(1);

    fn batches() -> Batches {
        Batches::new("hub".into())
    }

    fn record(json: &'static str) -> Record {
        Record::event(Bytes::from_static(json.as_bytes())).expect("valid")
    }

    fn publish(batches: &mut Batches, json: &'static str, since: u64) {
        batches.push(Op::Publish { records: vec![record(json)], reply: Reply::new(drop) }, Duration::from_secs(since));
    }

    fn greet(batches: &mut Batches) {
        let mut turn = Turn::for_test(A, "x", (0, 0), Vec::new());
        turn.greeting = Some(Greeting { epoch: "1".into(), next: 1 });
        let flow = Arc::new(Flow::default());
        flow.begin(0, true);
        batches.push(Op::Turn { turn, flow, bytes: 0 }, Duration::ZERO);
    }

    fn send(batches: &mut Batches) -> Option<u64> {
        batches.next_to_send(Known::default()).map(|batch| batch.number)
    }

    fn answer(first: u64, judged: Judged) -> Appended {
        let count = u64::from(judged == Judged::Kept);
        Appended { epoch: "e".into(), first, count, receivers: 1, judged: vec![judged] }
    }

    #[test]
    fn an_answer_to_a_batch_that_was_given_up_is_not_taken_for_the_next_ones() {
        let mut batches = batches();
        publish(&mut batches, r#"{"n":1}"#, 0);
        assert_eq!(send(&mut batches), Some(1));
        assert_eq!(batches.give_up_flight("").count(), 1);
        publish(&mut batches, r#"{"n":2}"#, 1);
        assert_eq!(send(&mut batches), Some(2));
        assert!(batches.land(1, answer(1, Judged::Kept)).is_none());
        let landed = batches.land(2, answer(2, Judged::Kept)).expect("it is under way");
        assert_eq!((landed.last, landed.records[0].json().as_ref()), (2, &br#"{"n":2}"#[..]));
    }

    #[test]
    fn only_what_waits_for_too_long_is_given_up() {
        let mut batches = batches();
        for since in [0, 1, 2] {
            publish(&mut batches, "{}", since);
        }
        assert_eq!(batches.give_up_waiting(Duration::from_secs(1), "").count(), 2);
        assert_eq!((batches.len(), batches.oldest()), (1, Some(Duration::from_secs(2))));
    }

    #[test]
    fn many_tiny_events_are_several_batches() {
        let mut batches = batches();
        for _ in 0..40_000 {
            publish(&mut batches, "{}", 0);
        }
        let most = 1_048_576 / 7; // what Redis 6.2 takes in one command
        let batch = batches.next_to_send(Known::default()).expect("one");
        assert!(batch.entries.len() < most / 4, "{}", batch.entries.len());
    }

    #[test]
    fn what_comes_from_outside_is_bounded_and_leaves_room_when_it_is_sent() {
        let mut batches = batches();
        let large: &'static str = Box::leak(format!(r#"{{"pad":"{}"}}"#, "x".repeat(1 << 20)).into_boxed_str());
        let taken = (0..100).filter(|_| batches.take_in(record(large), Duration::ZERO)).count();
        assert_eq!(taken, 15);
        assert_eq!(send(&mut batches), Some(1));
        assert!(batches.take_in(record(large), Duration::ZERO) && !batches.take_in(record(large), Duration::ZERO));
        assert_eq!(batches.give_up_waiting(Duration::ZERO, "").count(), 15);
        assert_eq!(batches.taken_in, 0);
    }

    #[test]
    fn a_session_that_ends_while_it_says_hello_is_not_kept_for_ever() {
        let mut batches = batches();
        for early in [true, false] {
            greet(&mut batches);
            if early {
                batches.release(A);
            }
            let number = send(&mut batches).expect("one");
            let greeted = Judged::Greeted { have: 0, before: String::new() };
            assert!(batches.land(number, answer(1, greeted)).is_some());
            assert_eq!(batches.owners.len(), usize::from(!early));
            batches.release(A);
            assert!(batches.owners.is_empty());
        }
    }
}
