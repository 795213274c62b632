//! The session of a plain publisher: any WebSocket client that sends one event in each text frame. It has no seqs, so
//! nothing tells an event that came twice and nothing is acknowledged: *at most once*, and the client's own Ping tells
//! it what was received.

use bytes::Bytes;

use super::emitter::Turn;
use crate::hub::auth::{Scope, not_granted};
use crate::hub::entry::Record;
use crate::hub::registry::{SessionId, frame_cost};
use crate::wire::subscriber;

/// See the module.
#[derive(Debug)]
pub struct PublisherMachine {
    id: SessionId,
    batch: Vec<Record>,
    /// What the batch takes of a subscriber's queue, and how much of that one turn may.
    cost: usize,
    slice: usize,
    /// What it may publish; `None` is everything.
    publish: Option<Scope>,
}

impl PublisherMachine {
    /// The machine of a session that was just opened.
    #[must_use]
    pub fn new(id: SessionId, publish: Option<Scope>) -> Self {
        Self { id, batch: Vec::new(), cost: 0, slice: usize::MAX, publish }
    }

    /// The same, taking events that need so many bytes of a subscriber's queue in one turn, and one more.
    #[must_use]
    pub fn slicing(self, bytes: usize) -> Self {
        Self { slice: bytes, ..self }
    }

    /// Whether this turn has enough.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.cost >= self.slice
    }

    /// A frame came, text or binary: an event. What is none is answered and forgotten, and the rest goes on: without
    /// seqs no later event depends on it.
    ///
    /// # Errors
    /// The frame that says so to the client.
    pub fn on_event(&mut self, json: Bytes) -> Result<(), Bytes> {
        let refused = |error| {
            let message = format!("an event is a JSON object with text as its type and topic: {error}");
            subscriber::error("bad_event", &message)
        };
        let record = Record::event(json).map_err(refused)?;
        if self.publish.as_ref().is_some_and(|scope| !scope.allows(&record)) {
            return Err(subscriber::error("not_allowed", &not_granted(&record)));
        }
        self.cost += frame_cost(&record);
        self.batch.push(record);
        Ok(())
    }

    /// Whether anything came since the last turn.
    #[must_use]
    pub fn wants_commit(&self) -> bool {
        !self.batch.is_empty()
    }

    /// Takes what came since the last turn.
    pub fn turn(&mut self) -> Turn {
        self.cost = 0;
        Turn::plain(self.id, std::mem::take(&mut self.batch))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_event_is_answered_and_the_rest_goes_on() {
        let mut machine = PublisherMachine::new(SessionId::for_test(1), None);
        assert!(!machine.wants_commit());
        assert_eq!(machine.on_event(Bytes::from_static(br#"{"type":"a"}"#)), Ok(()));
        let answer = machine.on_event(Bytes::from_static(b"[]")).expect_err("no event");
        assert!(answer.starts_with(br#"{"type":"error","data":{"code":"bad_event""#), "{answer:?}");
        assert_eq!(machine.on_event(Bytes::from_static(b"{}")), Ok(()));
        assert!(machine.wants_commit());
        assert_eq!(machine.turn().records.len(), 2);
        assert!(!machine.wants_commit());
    }
}
