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
use crate::hub::machine::Turn;
use crate::hub::ops::{Op, Outcome};
use crate::hub::registry::SessionId;
use crate::hub::state::Published;

/// A batch is sent at this size even if more waits: some milliseconds of a bus.
const BATCH_BYTES: usize = 1 << 20;

/// An op that waits, since when, and whether it came from outside of all hubs.
struct Waiting {
    op: Op,
    since: Duration,
    intake: bool,
}

/// The batch under way.
struct Flight {
    batch: Arc<Batch>,
    /// What it is made of, in the same order.
    ops: Vec<Waiting>,
    /// Sent over the link there is.
    sent: bool,
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
    sent: u64,
    /// The sessions of this hub that own emitters, by the names that other hubs know them by.
    owners: HashMap<String, SessionId>,
}

impl Batches {
    pub(super) fn new(hub: Arc<str>) -> Self {
        Self { hub, queue: VecDeque::new(), flight: None, sent: 0, owners: HashMap::new() }
    }

    pub(super) fn push(&mut self, op: Op, since: Duration, intake: bool) {
        self.queue.push_back(Waiting { op, since, intake });
    }

    /// A session is gone.
    pub(super) fn release(&mut self, id: SessionId) {
        self.owners.remove(&self.session(id));
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

    /// The batch under way was answered.
    pub(super) fn land(&mut self, appended: Appended) -> Option<Landed> {
        let flight = self.flight.take()?;
        let (mut records, mut outcomes, mut last) = (Vec::new(), Vec::new(), appended.first - 1);
        for (waiting, judged) in flight.ops.into_iter().zip(appended.judged) {
            match waiting.op {
                Op::Turn { mut turn, flow, bytes } => {
                    let verdict = self.verdict(&turn, judged);
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

    /// Gives the batch under way up: nobody knows what became of it.
    pub(super) fn give_up_flight(&mut self, cause: &str) -> impl Iterator<Item = Outcome> + use<> {
        let ops = self.flight.take().map(|flight| flight.ops).unwrap_or_default();
        let why = format!(
            "the bus between the hubs did not answer in time; whether the event was published is not known{cause}"
        );
        ops.into_iter().filter_map(move |waiting| refused(waiting.op, &why))
    }

    /// Gives up what was never sent.
    pub(super) fn give_up_waiting(&mut self, cause: &str) -> impl Iterator<Item = Outcome> + use<> {
        let why = format!("the bus between the hubs did not answer; the event was not published{cause}");
        std::mem::take(&mut self.queue).into_iter().filter_map(move |waiting| refused(waiting.op, &why))
    }

    /// Takes out what was never sent, without what came from outside of all hubs: that is another one's while this one
    /// is alone.
    pub(super) fn take_waiting(&mut self) -> impl Iterator<Item = Op> + use<> {
        std::mem::take(&mut self.queue).into_iter().filter(|waiting| !waiting.intake).map(|waiting| waiting.op)
    }

    fn next(&mut self, known: Known) -> Option<Flight> {
        let fresh = fresh_epoch().ok()?;
        let (mut ops, mut entries, mut bytes) = (Vec::new(), Vec::new(), 0);
        while bytes < BATCH_BYTES
            && let Some(waiting) = self.queue.pop_front()
        {
            let entry = self.entry(&waiting);
            bytes += entry.records.len();
            entries.push(entry);
            ops.push(waiting);
        }
        self.sent += 1;
        Some(Flight { batch: Arc::new(Batch { number: self.sent, known, fresh, entries }), ops, sent: false })
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

    fn verdict(&mut self, turn: &Turn, judged: Judged) -> Verdict {
        match judged {
            Judged::Refused => Verdict::Refused,
            Judged::Kept => Verdict::Stored,
            Judged::Greeted { have, before } => {
                let superseded = self.owners.remove(&before).filter(|older| *older != turn.id);
                self.owners.insert(self.session(turn.id), turn.id);
                Verdict::Greeted { have, superseded }
            }
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
