//! What an outbox leaves out when it is at its bound. Nothing is left out silently: each offset that a session does not
//! get lies in exactly one gap, which stands in the queue where the event would have stood.
//!
//! A pass over the queue leaves an eighth of the bound free, so a frame pays for eight passes at most, however slow its
//! session is.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use super::outbox::Queued;
use crate::wire::subscriber::{self, Missed};

/// What is known of an event beside its frame; shared by all outboxes in which it waits.
#[derive(Debug, PartialEq, Eq)]
pub struct Mark {
    /// Its offset.
    pub offset: u64,
    /// Whose newest state it is, see [`Record::key`](super::entry::Record::key).
    pub key: Option<Box<str>>,
}

/// A stretch that a session does not get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Left {
    from: u64,
    to: u64,
    why: Missed,
}

impl Left {
    /// A stretch of one.
    #[must_use]
    pub fn out(offset: u64, why: Missed) -> Self {
        Self { from: offset, to: offset, why }
    }

    /// Both stretches; nothing that is delivered lies between them.
    #[must_use]
    pub fn and(self, later: Self) -> Self {
        // A gap that hides the last state of something must not look harmless.
        let why = if self.why == later.why { self.why } else { Missed::Shed };
        Self { from: self.from, to: later.to, why }
    }

    /// The frame that tells of it.
    #[must_use]
    pub fn frame(self) -> bytes::Bytes {
        subscriber::missed(self.from, self.to, self.why)
    }
}

/// How many events were left out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeftOut {
    /// Because there was no room.
    pub shed: u64,
    /// Because a newer event with the same key came.
    pub conflated: u64,
}

impl std::ops::AddAssign for LeftOut {
    fn add_assign(&mut self, more: Self) {
        self.shed += more.shed;
        self.conflated += more.conflated;
    }
}

/// Leaves out of the queue the events that have a newer one with the same key, `coming` among those, and then the
/// oldest until at most `room` bytes wait. Returns how many bytes wait.
pub(super) fn conflate(
    queue: &mut VecDeque<Queued>,
    mut bytes: usize,
    coming: &Mark,
    room: usize,
    count: &mut LeftOut,
) -> usize {
    let mut newest: HashSet<&str> = coming.key.as_deref().into_iter().collect();
    let mut old = HashSet::new();
    for queued in queue.iter().rev() {
        if let Queued::Event(item, mark) = queued
            && let Some(key) = &mark.key
            && !newest.insert(key)
        {
            bytes -= item.cost();
            old.insert(mark.offset);
        }
    }
    for queued in std::mem::take(queue) {
        match queued {
            Queued::Event(_, mark) if old.contains(&mark.offset) => {
                count.conflated += 1;
                leave_out(queue, Left::out(mark.offset, Missed::Conflated));
            }
            Queued::Event(item, mark) if bytes > room => {
                bytes -= item.cost();
                count.shed += 1;
                leave_out(queue, Left::out(mark.offset, Missed::Shed));
            }
            Queued::Left(left) => leave_out(queue, left),
            kept => queue.push_back(kept),
        }
    }
    bytes
}

/// Adds a stretch to the end of a queue.
pub(super) fn leave_out(queue: &mut VecDeque<Queued>, left: Left) {
    if let Some(Queued::Left(before)) = queue.back_mut() {
        *before = before.and(left);
    } else {
        queue.push_back(Queued::Left(left));
    }
}

/// An event's mark.
#[must_use]
pub fn mark(entry: &super::entry::Entry) -> Arc<Mark> {
    Arc::new(Mark { offset: entry.offset, key: entry.record.key().map(Into::into) })
}

#[cfg(test)]
mod tests;
