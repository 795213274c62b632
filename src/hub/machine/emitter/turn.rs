//! What an emitter's frames brought since the last time, on its way to the log: a value of its own, settled on the spot or
//! once the log has it.

use std::sync::Arc;
use std::time::Duration;

use super::CREDIT;
use crate::hub::entry::Record;
use crate::hub::log::cost;
use crate::hub::registry::SessionId;
use crate::hub::state::State;
use crate::wire::close::CloseCode;
use crate::wire::frame::HubFrame;

/// When what a turn brought is acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ack {
    /// It brought nothing to acknowledge.
    Nothing,
    /// With a later turn.
    Later,
    /// With everything before it.
    Now,
}

/// What an emitter's frames since the last turn brought.
#[derive(Debug)]
pub struct Turn {
    /// The session.
    pub id: SessionId,
    /// The emitter's name; empty before its `hello`.
    pub name: Arc<str>,
    /// Its `hello`.
    pub greeting: Option<Greeting>,
    /// The mark before this turn and after it.
    pub marks: (u64, u64),
    /// What is to be appended.
    pub records: Vec<Record>,
    pub(super) duplicates: u64,
    pub(super) ack: Ack,
    pub(super) refusal: Option<Refusal>,
    pub(super) violation: Option<String>,
}

/// An event that can never be taken. Everything before it is; what follows it is not looked at until the emitter has
/// gone back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) seq: u64,
    pub(super) reason: String,
}

/// What a `hello` said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// The emitter's epoch.
    pub epoch: String,
    /// The seq that comes next.
    pub next: u64,
}

impl Turn {
    #[cfg(test)]
    pub(crate) fn for_test(id: SessionId, name: &str, marks: (u64, u64), records: Vec<Record>) -> Self {
        let name = name.into();
        Self { id, name, greeting: None, marks, records, duplicates: 0, ack: Ack::Now, refusal: None, violation: None }
    }

    /// What a session without a name brought: nothing to be numbered or acknowledged.
    pub(in crate::hub::machine) fn plain(id: SessionId, records: Vec<Record>) -> Self {
        let name = Arc::default();
        Self {
            id,
            name,
            greeting: None,
            marks: (0, 0),
            records,
            duplicates: 0,
            ack: Ack::Nothing,
            refusal: None,
            violation: None,
        }
    }

    /// Up to where it acknowledges, if it does.
    #[must_use]
    pub fn acknowledges(&self) -> Option<u64> {
        (self.ack == Ack::Now).then_some(self.marks.1)
    }

    /// What the records cost in memory.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.records.iter().map(cost).sum()
    }

    /// Appends the records and answers; `have` is the mark if there was a greeting. Gives the emptied batch back.
    pub fn settle(mut self, have: Option<u64>, state: &mut State, now: Duration) -> Vec<Record> {
        if let Some(have) = have {
            state.registry.push(self.id, HubFrame::Welcome { have, credit: CREDIT }.encode().into());
        }
        for record in self.records.drain(..) {
            state.append(record, now);
        }
        state.counters.duplicates += self.duplicates;
        if self.ack != Ack::Nothing {
            state.registry.withhold_ack(self.id, self.marks.1);
        }
        if self.ack == Ack::Now {
            state.registry.acknowledge(self.id);
        }
        if let Some(Refusal { seq, reason }) = self.refusal {
            state.counters.refused += 1;
            state.registry.push(self.id, HubFrame::Nack { seq, reason }.encode().into());
        }
        if let Some(message) = self.violation {
            state.counters.bad_frames += 1;
            let frame = HubFrame::Error { code: "bad_frame".to_owned(), message };
            state.registry.push(self.id, frame.encode().into());
            state.registry.order_close(self.id, CloseCode::BadFrame);
        }
        self.records
    }
}
