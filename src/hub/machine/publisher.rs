//! The session of a plain publisher: any WebSocket client that sends one event in each text frame. It has no seqs, so
//! nothing tells an event that came twice and nothing is acknowledged: *at most once*, and the client's own Ping tells
//! it what was received.

use bytes::Bytes;

use super::Intake;
use super::emitter::Turn;
use crate::error::{Error, ErrorKind};
use crate::hub::auth::Scope;
use crate::hub::entry::Record;
use crate::hub::registry::SessionId;
use crate::wire::subscriber;

/// See the module.
#[derive(Debug)]
pub struct PublisherMachine {
    id: SessionId,
    batch: Vec<Record>,
    intake: Intake,
}

impl PublisherMachine {
    /// The machine of a session that was just opened.
    #[must_use]
    pub fn new(id: SessionId) -> Self {
        Self { id, batch: Vec::new(), intake: Intake::default() }
    }

    /// The same, taking events so.
    #[must_use]
    pub fn taking(self, intake: Intake) -> Self {
        Self { intake, ..self }
    }

    /// It may publish only this from now on; `None` is everything.
    pub fn limit_to(&mut self, publish: Option<Scope>) {
        self.intake.limit_to(publish);
    }

    /// Whether this turn has enough.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.intake.is_full()
    }

    /// A frame came, text or binary: an event. What is none is answered and forgotten, and the rest goes on: without
    /// seqs no later event depends on it.
    ///
    /// # Errors
    /// The frame that says so to the client.
    pub fn on_event(&mut self, json: Bytes) -> Result<(), Bytes> {
        let refused = |error: Error| {
            let code = if error.kind() == ErrorKind::NotAllowed { "not_allowed" } else { "bad_event" };
            subscriber::error(code, &error.report())
        };
        self.batch.push(self.intake.take(json).map_err(refused)?);
        Ok(())
    }

    /// Whether anything came since the last turn.
    #[must_use]
    pub fn wants_commit(&self) -> bool {
        !self.batch.is_empty()
    }

    /// Takes what came since the last turn.
    pub fn turn(&mut self) -> Turn {
        self.intake.turn();
        Turn::plain(self.id, std::mem::take(&mut self.batch))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_event_is_answered_and_the_rest_goes_on() {
        let mut machine = PublisherMachine::new(SessionId::for_test(1));
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
