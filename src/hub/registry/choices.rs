//! What a session has chosen, or was chosen for it, and how much of that it may have.

use std::sync::Arc;

use super::{Registry, SessionId};
use crate::hub::entry::{Encoding, Filter};
use crate::wire::subscriber::{Slow, Wrapping};
use crate::wire::topic::Pattern;

impl Registry {
    /// The filter of a session; empty before it subscribes.
    #[must_use]
    pub fn filter(&self, id: SessionId) -> Arc<Filter> {
        self.get(id).map(|session| session.filter.clone()).unwrap_or_default()
    }

    /// Replaces the filter of a session, whose patterns all lie within its grant. An empty one receives nothing, and so
    /// does a session that is to end.
    pub fn set_filter(&mut self, id: SessionId, filter: Filter) {
        self.leave(id);
        let filter = Arc::new(filter);
        let Some(session) = self.get_mut(id).filter(|session| !session.outbox.is_closing()) else { return };
        session.filter = filter.clone();
        session.preset = None;
        if !filter.patterns().is_empty() {
            self.groups.join(&filter, id);
        }
    }

    /// Gives a session that has not chosen by itself what was chosen for it, as far as that is granted.
    pub fn set_preset(&mut self, id: SessionId, chosen: Arc<Filter>) {
        let Some(session) = self.get(id) else { return };
        let granted = match &session.grant {
            Some(grant) => chosen.common(grant),
            None => Filter::clone(&chosen),
        };
        self.set_filter(id, granted);
        if let Some(session) = self.get_mut(id) {
            session.preset = Some(chosen);
        }
    }

    /// What was chosen for a session, unless it has chosen by itself since.
    #[must_use]
    pub fn preset(&self, id: SessionId) -> Option<Arc<Filter>> {
        self.get(id)?.preset.clone()
    }

    /// What a subscriber has chosen by itself: its filter, unless that was chosen for it.
    #[must_use]
    pub fn own_filter(&self, id: SessionId) -> Arc<Filter> {
        self.get(id)
            .filter(|session| session.preset.is_none())
            .map(|session| session.filter.clone())
            .unwrap_or_default()
    }

    /// Those of the patterns that the session's grant allows.
    #[must_use]
    pub fn granted(&self, id: SessionId, patterns: Filter) -> Filter {
        match self.get(id).and_then(|session| session.grant.as_ref()) {
            Some(grant) => patterns.within(grant),
            None => patterns,
        }
    }

    /// Says what a session may receive from now on; `None`: everything. Patterns that reach beyond it are taken from
    /// the session and from the replays on their way to it, and returned.
    pub fn set_grant(&mut self, id: SessionId, grant: Option<Arc<Filter>>) -> Vec<Pattern> {
        let Self { slots, replays, .. } = self;
        let slot = slots.get_mut(id.slot as usize).filter(|slot| slot.generation == id.generation);
        let Some(session) = slot.and_then(|slot| slot.session.as_mut()) else { return Vec::new() };
        session.grant.clone_from(&grant);
        let Some(grant) = grant else { return Vec::new() };
        session.outbox.narrow(&grant, replays);
        let before = session.filter.clone();
        let after = before.within(&grant);
        let taken = before.without(after.patterns());
        if !taken.patterns().is_empty() {
            self.set_filter(id, after);
        }
        taken.patterns().to_vec()
    }

    /// Chooses whether the session takes large events compressed; returns whether it gets them so.
    pub fn set_deflates(&mut self, id: SessionId, deflates: bool) -> bool {
        let deflates = deflates && self.compression.is_on() && self.encoding(id) == Encoding::Event;
        if let Some(session) = self.get_mut(id) {
            session.deflates = deflates;
        }
        deflates
    }

    /// What brings entries to the session.
    #[must_use]
    pub fn encoding(&self, id: SessionId) -> Encoding {
        self.get(id).map_or_else(Encoding::default, |session| session.outbox.encoding())
    }

    /// Chooses how events come.
    pub fn set_wrapping(&mut self, id: SessionId, wrapping: Wrapping) {
        if let Some(session) = self.get_mut(id) {
            session.outbox.set_encoding(wrapping.into());
        }
    }

    /// Chooses what happens if the session reads too slowly.
    pub fn set_slow(&mut self, id: SessionId, slow: Slow) {
        if let Some(session) = self.get_mut(id) {
            session.outbox.set_slow(slow);
        }
    }

    /// Where the session's next entry continues.
    #[must_use]
    pub fn prev(&self, id: SessionId) -> u64 {
        self.get(id).map_or(0, |session| session.prev)
    }

    /// Sets where the session's next entry continues.
    pub fn set_prev(&mut self, id: SessionId, prev: u64) {
        if let Some(session) = self.get_mut(id) {
            session.prev = prev;
        }
    }

    /// Notes that a subscriber has processed everything up to `seq`. Acks are cumulative: an older one changes nothing.
    ///
    /// # Errors
    /// The last seq that was queued for it, if `seq` lies beyond.
    pub fn record_ack(&mut self, id: SessionId, seq: u64) -> Result<(), u64> {
        let Some(session) = self.get_mut(id) else { return Ok(()) };
        if seq > session.prev {
            return Err(session.prev);
        }
        session.acked = session.acked.max(Some(seq));
        Ok(())
    }
}
