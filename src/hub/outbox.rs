//! What waits to be sent to one session: bounded in bytes, and never skipped. Whoever lets it overflow is told so
//! (close 3008) and comes back for what it missed.

use std::collections::VecDeque;

use bytes::Bytes;

use super::entry::Entry;
use crate::wire::close::CloseCode;

/// What a frame costs beside its bytes, so that many small frames are not counted as nothing.
pub const FRAME_BYTES: usize = 32;

/// One thing to hand to the socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// A text frame.
    Text(Bytes),
    /// A WebSocket ping.
    Ping,
    /// The last thing of a session.
    Close(CloseCode),
}

/// The queue is at its bound. The session must be closed: a frame left out would be a silent loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overflow;

#[derive(Debug)]
enum Queued {
    Item(Item),
    Replay(Replay),
}

/// Entries on their way to a session that came back. They share their bytes with the log and are turned into frames
/// only as the socket takes them, so a replay may be larger than the queue.
#[derive(Debug)]
struct Replay {
    entries: std::vec::IntoIter<Entry>,
    prev: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Outbox {
    queue: VecDeque<Queued>,
    bytes: usize,
    limit: usize,
    replaying: bool,
    closing: bool,
}

impl Outbox {
    /// An empty queue of at most `limit` bytes. A frame that is larger is taken while nothing else waits.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self { queue: VecDeque::new(), bytes: 0, limit, replaying: false, closing: false }
    }

    /// Adds a text frame. Ignored after a close.
    ///
    /// # Errors
    /// [`Overflow`]; the caller closes the session.
    pub fn push(&mut self, frame: Bytes) -> Result<(), Overflow> {
        if self.closing {
            return Ok(());
        }
        let cost = FRAME_BYTES + frame.len();
        if self.bytes > 0 && self.bytes + cost > self.limit {
            return Err(Overflow);
        }
        self.bytes += cost;
        self.queue.push_back(Queued::Item(Item::Text(frame)));
        Ok(())
    }

    /// Adds entries to be sent again; the first one's `prev` is the position they continue.
    pub fn push_replay(&mut self, prev: u64, entries: Vec<Entry>) {
        if !self.closing && !entries.is_empty() {
            self.replaying = true;
            self.queue.push_back(Queued::Replay(Replay { entries: entries.into_iter(), prev }));
        }
    }

    /// Whether a replay is on its way. One at a time, because replays are not counted in the bound.
    #[must_use]
    pub fn is_replaying(&self) -> bool {
        self.replaying
    }

    /// Adds a ping.
    pub fn push_ping(&mut self) {
        if !self.closing {
            self.queue.push_back(Queued::Item(Item::Ping));
        }
    }

    /// Ends the session after what waits already.
    pub fn close(&mut self, code: CloseCode) {
        if !self.closing {
            self.closing = true;
            self.queue.push_back(Queued::Item(Item::Close(code)));
        }
    }

    /// Ends the session and gives up what waits.
    pub fn abandon(&mut self, code: CloseCode) {
        self.queue.clear();
        self.bytes = 0;
        self.replaying = false;
        self.closing = false;
        self.close(code);
    }

    /// Whether the session is to end.
    #[must_use]
    pub fn is_closing(&self) -> bool {
        self.closing
    }

    /// Bytes that wait.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Moves items to `into` until they hold about `budget` bytes.
    pub fn take(&mut self, budget: usize, into: &mut VecDeque<Item>) {
        let mut taken = 0;
        while taken < budget {
            let Some(item) = self.next() else { return };
            taken += match &item {
                Item::Text(frame) => FRAME_BYTES + frame.len(),
                Item::Ping | Item::Close(_) => FRAME_BYTES,
            };
            into.push_back(item);
        }
    }

    fn next(&mut self) -> Option<Item> {
        loop {
            match self.queue.pop_front()? {
                Queued::Item(item) => {
                    if let Item::Text(frame) = &item {
                        self.bytes -= FRAME_BYTES + frame.len();
                    }
                    return Some(item);
                }
                Queued::Replay(mut replay) => match replay.next_frame() {
                    Some(frame) => {
                        self.queue.push_front(Queued::Replay(replay));
                        return Some(Item::Text(frame));
                    }
                    None => self.replaying = false,
                },
            }
        }
    }
}

impl Replay {
    fn next_frame(&mut self) -> Option<Bytes> {
        let entry = self.entries.next()?;
        let frame = entry.frame(self.prev, true);
        self.prev = entry.offset;
        Some(frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::entry::Record;

    fn take(outbox: &mut Outbox, budget: usize) -> Vec<Item> {
        let mut out = VecDeque::new();
        outbox.take(budget, &mut out);
        out.into()
    }

    fn text(text: &str) -> Item {
        Item::Text(Bytes::copy_from_slice(text.as_bytes()))
    }

    #[test]
    fn it_overflows_by_bytes_and_recovers_by_sending() {
        let mut outbox = Outbox::new(2 * (FRAME_BYTES + 1));
        assert_eq!(outbox.push("a".into()), Ok(()));
        assert_eq!(outbox.push("b".into()), Ok(()));
        assert_eq!(outbox.push("c".into()), Err(Overflow));
        assert_eq!(take(&mut outbox, 1), [text("a")]);
        assert_eq!(outbox.push("c".into()), Ok(()));
        assert_eq!(take(&mut outbox, 1000), [text("b"), text("c")]);
        assert_eq!(outbox.bytes(), 0);
    }

    #[test]
    fn a_frame_larger_than_the_bound_passes_alone() {
        let mut outbox = Outbox::new(10);
        assert_eq!(outbox.push(vec![b'x'; 1000].into()), Ok(()));
        assert_eq!(outbox.push("y".into()), Err(Overflow));
    }

    #[test]
    fn nothing_follows_a_close_and_an_abandoned_queue_holds_only_it() {
        let mut outbox = Outbox::new(1000);
        outbox.push("a".into()).expect("room");
        outbox.close(CloseCode::Shutdown);
        outbox.push("b".into()).expect("ignored");
        outbox.close(CloseCode::Slow);
        assert_eq!(take(&mut outbox, 1000), [text("a"), Item::Close(CloseCode::Shutdown)]);

        let mut outbox = Outbox::new(1000);
        outbox.push("a".into()).expect("room");
        outbox.abandon(CloseCode::Slow);
        assert_eq!(take(&mut outbox, 1000), [Item::Close(CloseCode::Slow)]);
    }

    #[test]
    fn a_replay_keeps_its_place_and_chains_its_entries() {
        let entry = |offset| Entry { offset, record: Record::event(Bytes::from_static(b"{}")).expect("valid") };
        let mut outbox = Outbox::new(1000);
        outbox.push("subscribed".into()).expect("room");
        outbox.push_replay(3, vec![entry(5), entry(9)]);
        outbox.push("live".into()).expect("room");
        assert!(outbox.is_replaying());
        let frames = take(&mut outbox, 10_000);
        let first = r#"{"type":"event","seq":5,"prev":3,"replay":true,"data":{}}"#;
        let second = r#"{"type":"event","seq":9,"prev":5,"replay":true,"data":{}}"#;
        assert_eq!(frames, [text("subscribed"), text(first), text(second), text("live")]);
        assert!(!outbox.is_replaying() && outbox.bytes() == 0);
    }
}
