//! How many sessions there are, and how far they are behind.

use serde::Serialize;

use super::{Registry, Role, Session, SessionId};
use crate::hub::slow::LeftOut;

/// How far a subscriber is behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Laggard {
    /// The session.
    pub session: SessionId,
    /// The last seq that it acknowledged, if it ever did.
    pub acked: Option<u64>,
    /// How many offsets of the log lie between that and the last one that was queued for it.
    pub lag: Option<u64>,
    /// Bytes that wait for its socket.
    pub queued_bytes: usize,
}

/// How many sessions there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Emitter sessions open now.
    pub emitters: usize,
    /// Subscriber sessions open now.
    pub subscribers: usize,
    /// Plain publishers open now.
    pub publishers: usize,
    /// Sessions closed so far because they read too slowly.
    pub slow: u64,
    /// Events left out so far because sessions that allow it read too slowly.
    pub left_out: LeftOut,
}

impl Registry {
    /// Frames put together for subscribers so far, and data compressed.
    #[must_use]
    pub fn work(&self) -> (u64, u64) {
        (self.encoded + self.replays.encoded(), self.compression.runs())
    }

    /// How many sessions there are.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// How many sessions are open.
    #[must_use]
    pub fn len(&self) -> usize {
        self.counts.emitters + self.counts.subscribers + self.counts.publishers
    }

    /// Whether none is open.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The subscribers that are furthest behind with their acks, or with reading where they do not acknowledge: at
    /// most `most` of them.
    #[must_use]
    pub fn laggards(&self, most: usize) -> Vec<Laggard> {
        let of = |(id, session): (SessionId, &Session)| Laggard {
            session: id,
            acked: session.acked,
            lag: session.acked.map(|acked| session.prev - acked),
            queued_bytes: session.outbox.bytes(),
        };
        let mut all: Vec<_> = self.each().filter(|(_, session)| session.role.subscribes()).map(of).collect();
        all.sort_unstable_by_key(|laggard| std::cmp::Reverse((laggard.lag, laggard.queued_bytes)));
        all.truncate(most);
        all
    }

    /// Bytes that wait for the sockets of all sessions.
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        self.each().map(|(_, session)| session.outbox.bytes()).sum()
    }

    /// Most bytes that may wait for one socket.
    #[must_use]
    pub fn queue_bytes(&self) -> usize {
        self.queue_bytes
    }

    /// Whether so much waits for a session's socket that its next questions had better wait too: a quarter of what may.
    #[must_use]
    pub fn is_filling(&self, id: SessionId) -> bool {
        self.get(id).is_some_and(|session| session.outbox.bytes() > self.queue_bytes / 4)
    }
}

impl Counts {
    pub(super) fn of(&mut self, role: Role) -> &mut usize {
        match role {
            Role::Emitter => &mut self.emitters,
            Role::Subscriber | Role::Centrifugo => &mut self.subscribers,
            Role::Publisher => &mut self.publishers,
        }
    }
}
