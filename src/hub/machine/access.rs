//! What a session may do, and until when: it shows a token in time, shows a fresh one before that expires, or ends.

use std::sync::Arc;
use std::time::Duration;

use crate::hub::auth::{Denied, Grant};
use crate::hub::registry::{Role, SessionId};
use crate::hub::state::State;
use crate::wire::close::CloseCode;
use crate::wire::subscriber;
use crate::wire::topic::Pattern;

/// What became of a token: what it grants, and until when by the hub's time.
pub type Checked = Result<(Grant, Option<Duration>), Denied>;

/// See the module. Times are the hub's.
#[derive(Debug)]
pub struct Access {
    id: SessionId,
    grant: Option<Grant>,
    until: Option<Duration>,
}

impl Access {
    /// A session that has to show a token until then.
    #[must_use]
    pub fn awaited(id: SessionId, until: Duration) -> Self {
        Self { id, grant: None, until: Some(until) }
    }

    /// A session that has one, good until then.
    #[must_use]
    pub fn granted(id: SessionId, grant: Grant, until: Option<Duration>) -> Self {
        Self { id, grant: Some(grant), until }
    }

    /// What it may do; `None` before it has shown a token.
    #[must_use]
    pub fn grant(&self) -> Option<&Grant> {
        self.grant.as_ref()
    }

    /// When [`Access::on_time`] has something to do.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        self.until
    }

    /// Says to a subscriber what was granted to it.
    pub fn announce(&self, state: &mut State) {
        if let Some(grant) = &self.grant {
            state.registry.push(self.id, subscriber::authenticated(grant.subject.as_deref(), grant.expires));
        }
    }

    /// A token was checked. What a subscriber is subscribed to beyond the new grant is taken away, and returned.
    pub fn on_checked(&mut self, checked: Checked, role: Role, state: &mut State) -> Vec<Pattern> {
        match checked {
            Ok((grant, until)) => {
                // Replays on their way are bound by it too.
                let filter = grant.subscribe.as_ref().map(|scope| Arc::new(scope.filter()));
                let lost = state.grant(self.id, filter);
                (self.grant, self.until) = (Some(grant), until);
                if role == Role::Subscriber {
                    self.announce(state);
                }
                if role == Role::Subscriber && !lost.is_empty() {
                    state.registry.push(self.id, subscriber::unsubscribed(&lost));
                }
                lost
            }
            Err(denied) => {
                let word = match denied {
                    Denied::Expired => "token_expired",
                    Denied::Invalid(_) => "unauthorized",
                    Denied::Unavailable(_) => "auth_unavailable",
                };
                self.refuse(word, &denied.to_string(), denied.close_code(), role, state);
                Vec::new()
            }
        }
    }

    /// A subscriber said something else before it showed a token.
    pub fn on_stranger(&mut self, state: &mut State) {
        let message = r#"show a token first: {"type":"auth","data":{"token":"…"}}"#;
        self.refuse("unauthorized", message, CloseCode::Unauthorized, Role::Subscriber, state);
    }

    /// Time went by: ends the session if its time is over.
    pub fn on_time(&mut self, now: Duration, role: Role, state: &mut State) {
        if self.until.is_none_or(|until| now < until) {
            return;
        }
        self.until = None;
        let (word, message, code) = match self.grant {
            Some(_) => ("token_expired", "the token has expired; come back with a fresh one", CloseCode::TokenExpired),
            None => ("unauthorized", "no token was shown within auth_timeout", CloseCode::Unauthorized),
        };
        self.tell(word, message, role, state);
        state.counters.auth_refused += u64::from(self.grant.is_none());
        state.registry.order_close(self.id, code);
    }

    /// An emitter is told by the close alone: an error frame would speak of what it sent. So is a client of Centrifugo's
    /// protocol, which has no such frames.
    fn tell(&self, word: &str, message: &str, role: Role, state: &mut State) {
        if !matches!(role, Role::Emitter | Role::Centrifugo) {
            state.registry.push(self.id, subscriber::error(word, message));
        }
    }

    fn refuse(&mut self, word: &str, message: &str, code: CloseCode, role: Role, state: &mut State) {
        (self.grant, self.until) = (None, None);
        state.counters.auth_refused += 1;
        self.tell(word, message, role, state);
        state.registry.order_close(self.id, code);
    }
}
