//! Refusals: an event that the peer does not take is tried again, then parked in the spill with a gap in its place, and
//! the rest goes on.
//!
//! A hub says which event it refuses. Any other peer only closes the link over something among what it was sent; after
//! some such losses at the same place events go out one at a time, so that the next loss tells which it was.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use fastrand::Rng;
use serde_json::json;

use super::{Action, Machine, Phase, Time};
use crate::backoff::Backoff;
use crate::emitter::config::EmitterConfig;
use crate::emitter::report::Report;
use crate::emitter::spill::Op;
use crate::emitter::spill::parked::{Parking, Wanted};
use crate::error::{Error, ErrorKind, Result};

/// Refused events remembered for callers who ask only now whether theirs was delivered.
const REMEMBERED: usize = 1000;
/// Longest reason kept, in characters: it is the peer's.
const MAX_REASON: usize = 500;

/// The event behind everything confirmed, which the peer refuses.
#[derive(Debug)]
struct Refusal {
    seq: u64,
    reason: Arc<str>,
    tries: u32,
    /// Not tried again, nor what is behind it sent, before this.
    until: Time,
    /// It was tried often enough.
    hopeless: bool,
}

/// One of these events makes the peer close the link.
#[derive(Debug)]
struct Suspicion {
    after: u64,
    upto: u64,
    losses: u32,
}

/// What the machine knows of refused events.
#[derive(Debug)]
pub(super) struct Refusing {
    tries: u32,
    refusal: Option<Refusal>,
    suspicion: Option<Suspicion>,
    /// Grows over refusals with no event taken in between, so that a peer that refuses everything, the fault being its
    /// own, does not have the whole spill parked.
    backoff: Backoff,
    parking: bool,
    parked: u64,
    dropped: u64,
    /// The latest refused events and why.
    known: VecDeque<(u64, Arc<str>)>,
    /// Parked events to be sent again: not in the outbox yet, and with the seq that they got there.
    wanted: VecDeque<Wanted>,
    requeued: BTreeMap<i64, u64>,
    unparking: bool,
}

impl Refusing {
    pub(super) fn new(config: &EmitterConfig, parked: u64) -> Self {
        Self {
            tries: config.poison_tries,
            refusal: None,
            suspicion: None,
            backoff: Backoff::new(config.backoff_initial, config.backoff_max, config.backoff_multiplier, config.jitter),
            parking: false,
            parked,
            dropped: 0,
            known: VecDeque::new(),
            wanted: VecDeque::new(),
            requeued: BTreeMap::new(),
            unparking: false,
        }
    }

    /// Events parked now.
    pub(super) fn parked(&self) -> u64 {
        self.parked
    }

    /// Parked events that made room for newer ones.
    pub(super) fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Whether nothing may be sent now.
    pub(super) fn holds(&self, now: Time) -> bool {
        self.refusal.as_ref().is_some_and(|refusal| refusal.hopeless || now < refusal.until)
    }

    /// When sending may go on, if only time holds it up.
    pub(super) fn pause(&self, now: Time) -> Option<Time> {
        self.refusal.as_ref().filter(|refusal| !refusal.hopeless && refusal.until > now).map(|refusal| refusal.until)
    }

    /// Whether events go out one at a time.
    pub(super) fn is_careful(&self) -> bool {
        self.suspicion.as_ref().is_some_and(|suspicion| suspicion.losses >= self.tries)
    }

    /// Whether an event is being parked: nothing may be appended to the spill, whose row is being divided.
    pub(super) fn is_parking(&self) -> bool {
        self.parking
    }

    /// Whether the spill has nothing to do for this.
    pub(super) fn is_quiet(&self) -> bool {
        !self.parking && !self.unparking
    }

    /// The peer has everything up to `upto`, an event among it or only gaps.
    pub(super) fn confirmed(&mut self, upto: u64, event: bool) {
        self.refusal.take_if(|refusal| refusal.seq <= upto);
        self.suspicion.take_if(|suspicion| suspicion.upto <= upto);
        if event {
            self.backoff.reset();
        }
    }

    /// The spill offers parked events that somebody wants to be sent again. It repeats itself.
    pub(super) fn on_wanted(&mut self, wanted: Vec<Wanted>) {
        let news = wanted.into_iter().filter(|each| !self.requeued.contains_key(&each.id)).collect();
        self.wanted = news; // what waits still is offered again
    }

    fn refuse(&mut self, now: Time, seq: u64, reason: &str, certain: bool, rng: &mut Rng) {
        let before = self.refusal.take().filter(|refusal| refusal.seq == seq);
        let tries = before.map_or(0, |refusal| refusal.tries) + 1;
        let hopeless = certain || tries >= self.tries;
        // The first event of a row that is given up holds up nothing any more.
        let alone = self.backoff.failures() < self.tries;
        let pause = self.backoff.next(rng);
        let until = if hopeless && alone { now } else { now + pause };
        let reason = reason.chars().take(MAX_REASON).collect::<String>().into();
        self.refusal = Some(Refusal { seq, reason, tries, until, hopeless });
    }
}

impl Machine {
    /// The hub refuses the event `seq`; it has everything before it, and ignores what was sent behind it.
    ///
    /// # Errors
    /// No such event is under way: the link must be dropped.
    pub fn on_nack(&mut self, now: Time, seq: u64, reason: &str) -> Result<()> {
        // It may have become a gap meanwhile, by a bound of the spill; that is sent then.
        if seq <= self.ledger.acked() || seq > self.ledger.sent() {
            let text = format!("the peer refused seq {seq}, which is no event under way");
            return Err(Error::new(ErrorKind::Protocol, text));
        }
        self.acknowledge(now, seq - 1);
        self.prove(); // it works: it has read the event and answered
        self.nothing_was_due(now);
        self.ledger.rewind();
        if let Phase::Live(live) = &mut self.phase {
            live.asked = live.asked.min(self.ledger.sent()); // what comes again is asked for again
        }
        self.refused(now, seq, reason, false);
        self.after(now);
        Ok(())
    }

    /// The peer closed the link over what is under way.
    pub(super) fn suspect(&mut self, now: Time, reason: &str) {
        let (acked, sent) = (self.ledger.acked(), self.ledger.sent());
        if self.ledger.events_between(acked, sent) == 0 {
            return;
        }
        if self.refusing.is_careful() {
            return self.refused(now, acked + 1, reason, true);
        }
        let known = self.refusing.suspicion.take().filter(|suspicion| suspicion.after == acked);
        let (losses, upto) = known.map_or((0, sent), |known| (known.losses, known.upto.max(sent)));
        self.refusing.suspicion = Some(Suspicion { after: acked, upto, losses: losses + 1 });
    }

    fn refused(&mut self, now: Time, seq: u64, reason: &str, certain: bool) {
        self.last_error = Some(format!("the peer refused the event with seq {seq}: {reason}").into());
        self.refusing.refuse(now, seq, reason, certain, &mut self.rng);
    }

    /// Why the peer refused an event that is parked; nothing if it did not, or if that was long ago.
    #[must_use]
    pub fn refusal_of(&self, seq: u64) -> Option<Arc<str>> {
        self.refusing.known.iter().rev().find(|known| known.0 == seq).map(|known| Arc::clone(&known.1))
    }

    pub(super) fn plan_park(&mut self) {
        // Not while an append is under way, which may be storing the very event.
        let may = self.may_append() && !matches!(self.phase, Phase::Stopped);
        let Some(refusal) = self.refusing.refusal.as_mut().filter(|refusal| may && refusal.hopeless) else { return };
        let seq = refusal.seq;
        if self.ledger.events_between(seq - 1, seq) == 0 {
            refusal.hopeless = false; // given up meanwhile by a bound of the spill
            return;
        }
        self.refusing.parking = true;
        let reason = Arc::clone(&refusal.reason);
        self.actions.push_back(Action::Spill(Op::Park { seq, json: self.ledger.event(seq), reason }));
    }

    pub(super) fn on_parked(&mut self, now: Time, seq: u64, result: Result<Parking>) {
        self.refusing.parking = false;
        let Parking { parked, dropped } = match result {
            Ok(parking) => parking,
            Err(error) => return self.spill_refused(now, &error), // and tried again, since it is hopeless still
        };
        self.spill_written();
        self.refusing.parked = parked;
        self.refusing.suspicion = None;
        if self.ledger.events_between(seq - 1, seq) == 0 {
            // The disk did not give it back any more: nothing was parked, and the gap is told already.
            self.refusing.refusal.take_if(|refusal| refusal.seq == seq);
            return;
        }
        self.ledger.note_parked(seq);
        let Some(refusal) = self.refusing.refusal.as_mut().filter(|refusal| refusal.seq == seq) else { return };
        refusal.hopeless = false;
        let (reason, tries) = (Arc::clone(&refusal.reason), refusal.tries);
        self.refusing.known.push_back((seq, Arc::clone(&reason)));
        if self.refusing.known.len() > REMEMBERED {
            self.refusing.known.pop_front();
        }
        let details = json!({"seq": seq, "reason": &*reason, "tries": tries, "parked": parked});
        self.report(Report::bad("broadcaster_event_parked", "refused", 1, details));
        if let (Some(from), Some(to)) = (dropped.first(), dropped.last()) {
            let count = dropped.len() as u64;
            self.refusing.dropped += count;
            let details = json!({"count": count, "from": from, "to": to, "reason": "parked_full"});
            self.report(Report::bad("broadcaster_loss", "parked_full", count, details));
        }
        self.actions.push_back(Action::Refused { seq, reason });
    }

    /// What became of a parked event that was to be accepted once more: its new seq, or nothing if there was no room.
    pub fn on_requeued(&mut self, id: i64, seq: Option<u64>) {
        if let Some(seq) = seq {
            self.refusing.requeued.insert(id, seq);
        }
    }

    /// While the link is live and memory has room: a parked event is safe where it is.
    pub(super) fn plan_requeue(&mut self) {
        let room = self.ledger.held() < self.config.outbox_bytes / 2;
        if room && self.is_live() && self.stopping.is_none() && !self.refusing.wanted.is_empty() {
            let wanted = std::mem::take(&mut self.refusing.wanted).into();
            self.actions.push_back(Action::Requeue(wanted));
        }
    }

    /// A requeued event is forgotten among the parked once it is confirmed or stored in the stream.
    pub(super) fn plan_unpark(&mut self) {
        if self.refusing.unparking || self.closing || self.spill_pause.is_some() {
            return;
        }
        let safe = self.ledger.acked().max(self.ledger.spill_last());
        let ids: Vec<i64> = self.refusing.requeued.iter().filter(|each| *each.1 <= safe).map(|each| *each.0).collect();
        if !ids.is_empty() {
            self.refusing.unparking = true;
            self.actions.push_back(Action::Spill(Op::Unpark { ids }));
        }
    }

    pub(super) fn on_unparked(&mut self, now: Time, ids: &[i64], result: Result<()>, parked: u64) {
        self.refusing.unparking = false;
        self.refusing.parked = parked;
        match result {
            Ok(()) => self.refusing.requeued.retain(|id, _| !ids.contains(id)),
            Err(error) => self.pause_spill(now, &error),
        }
    }
}
