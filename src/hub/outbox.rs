//! What waits to be sent to one session: bounded in bytes. Whoever lets it overflow is closed with 3008 and comes back
//! for what it missed, or has chosen to be told of events that are left out, see [`slow`](super::slow).

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;

use super::compression::Compression;
use super::entry::{Encoding, Filter};
use super::log::Log;
use super::replay::{Cursor, Lost, Replays};
use super::slow::{Left, LeftOut, Mark, conflate, leave_out};
use crate::wire::centrifugo;
use crate::wire::close::CloseCode;
use crate::wire::subscriber::{Missed, Slow};

/// What a frame costs beside its bytes, so that many small frames are not counted as nothing.
pub const FRAME_BYTES: usize = 32;

/// One thing to hand to the socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// A text frame.
    Text(Bytes),
    /// A binary frame.
    Binary(Bytes),
    /// A WebSocket ping.
    Ping,
    /// The last thing of a session.
    Close(CloseCode),
}

impl Item {
    /// What it takes of the bound.
    #[must_use]
    pub fn cost(&self) -> usize {
        FRAME_BYTES
            + match self {
                Self::Text(frame) | Self::Binary(frame) => frame.len(),
                Self::Ping | Self::Close(_) => 0,
            }
    }
}

/// The queue is at its bound. The session must be closed: a frame left out would be a silent loss.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overflow;

/// What waits.
#[derive(Debug)]
pub(super) enum Queued {
    /// To be sent whatever happens.
    Item(Item),
    /// May be left out.
    Event(Item, Arc<Mark>),
    /// Was left out.
    Left(Left),
    /// Not counted in the bound: it is read from the log as the socket takes it.
    Replay(Box<Cursor>),
}

/// Most replays on their way to one session at a time: more panels than a dashboard opens at once.
pub const MAX_REPLAYS: usize = 16;

/// See the module.
#[derive(Debug)]
pub struct Outbox {
    queue: VecDeque<Queued>,
    bytes: usize,
    limit: usize,
    slow: Slow,
    replays: usize,
    closing: bool,
    encoding: Encoding,
}

impl Outbox {
    /// An empty queue of at most `limit` bytes. A frame that is larger is taken while nothing else waits.
    #[must_use]
    pub fn new(limit: usize, slow: Slow) -> Self {
        Self { queue: VecDeque::new(), bytes: 0, limit, slow, replays: 0, closing: false, encoding: Encoding::Event }
    }

    /// What happens at the bound.
    #[must_use]
    pub fn slow(&self) -> Slow {
        self.slow
    }

    /// Chooses what happens at the bound from now on.
    pub fn set_slow(&mut self, slow: Slow) {
        self.slow = slow;
    }

    /// What brings entries to its session.
    #[must_use]
    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// Chooses what does.
    pub fn set_encoding(&mut self, encoding: Encoding) {
        self.encoding = encoding;
    }

    /// Adds a text frame that is never left out. Ignored after a close.
    ///
    /// # Errors
    /// [`Overflow`]; the caller closes the session.
    pub fn push(&mut self, frame: Bytes) -> Result<(), Overflow> {
        self.push_item(Item::Text(frame))
    }

    /// Adds an item that is never left out, as [`Outbox::push`] does.
    ///
    /// # Errors
    /// [`Overflow`].
    pub fn push_item(&mut self, item: Item) -> Result<(), Overflow> {
        if self.closing {
            return Ok(());
        }
        let cost = item.cost();
        if !self.has_room(cost) {
            return Err(Overflow);
        }
        self.bytes += cost;
        self.queue.push_back(Queued::Item(item));
        Ok(())
    }

    /// Adds an event's frame; at the bound does what was chosen, and returns what was left out.
    ///
    /// # Errors
    /// [`Overflow`], unless events may be left out.
    pub fn push_event(&mut self, item: Item, mark: &Arc<Mark>) -> Result<LeftOut, Overflow> {
        let (cost, mut left) = (item.cost(), LeftOut::default());
        if self.slow == Slow::Disconnect || self.closing {
            return self.push_item(item).map(|()| left);
        }
        if !self.has_room(cost) && self.slow == Slow::Conflate {
            let room = (self.limit / 8 * 7).min(self.limit.saturating_sub(cost));
            self.bytes = conflate(&mut self.queue, self.bytes, mark, room, &mut left);
        }
        if self.has_room(cost) {
            self.bytes += cost;
            self.queue.push_back(Queued::Event(item, mark.clone()));
        } else {
            left.shed += 1;
            leave_out(&mut self.queue, Left::out(mark.offset, Missed::Shed));
        }
        Ok(left)
    }

    fn has_room(&self, cost: usize) -> bool {
        self.bytes == 0 || self.bytes + cost <= self.limit
    }

    /// Adds what is to be sent again, behind everything that waits.
    pub fn push_replay(&mut self, cursor: Cursor) {
        if !self.closing && !cursor.is_done() {
            self.replays += 1;
            self.queue.push_back(Queued::Replay(Box::new(cursor)));
        }
    }

    /// How many replays are on their way.
    #[must_use]
    pub fn replays(&self) -> usize {
        self.replays
    }

    /// Leaves out of the replays what lies beyond a grant.
    pub fn narrow(&mut self, grant: &Filter, replays: &mut Replays) {
        for queued in &mut self.queue {
            if let Queued::Replay(cursor) = queued {
                cursor.narrow(grant, replays);
            }
        }
    }

    /// Gives up the replays of a filter.
    pub fn forget(&mut self, filter: &Filter) {
        self.queue.retain(|queued| !matches!(queued, Queued::Replay(cursor) if *cursor.filter() == *filter));
        self.replays = self.queue.iter().filter(|queued| matches!(queued, Queued::Replay(_))).count();
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
        self.replays = 0;
        self.closing = false;
        self.close(code);
    }

    /// Whether the session is to end.
    #[must_use]
    pub fn is_closing(&self) -> bool {
        self.closing
    }

    /// How many frames wait, without those that tell what was left out.
    #[cfg(test)]
    pub(super) fn frames(&self) -> usize {
        self.queue.iter().filter(|queued| matches!(queued, Queued::Item(_) | Queued::Event(..))).count()
    }

    /// Bytes that wait.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Moves items to `into` until they hold about `budget` bytes.
    ///
    /// Replayed events are compressed if there is a `compression`.
    ///
    /// # Errors
    /// [`Lost`]; the caller closes the session. What was moved before is good.
    pub fn take(
        &mut self,
        budget: usize,
        into: &mut VecDeque<Item>,
        log: &Log,
        replays: &mut Replays,
        compression: Option<&mut Compression>,
    ) -> Result<(), Lost> {
        let mut compression = compression;
        let mut taken = 0;
        while taken < budget {
            match self.queue.pop_front() {
                None => break,
                Some(Queued::Item(item) | Queued::Event(item, _)) => {
                    taken += item.cost();
                    if !matches!(item, Item::Ping | Item::Close(_)) {
                        self.bytes -= item.cost();
                    }
                    into.push_back(item);
                }
                // Its client knows events and nothing else.
                Some(Queued::Left(_)) if self.encoding == Encoding::Raw => {}
                Some(Queued::Left(left)) => {
                    let gap = left.frame();
                    let item =
                        Item::Text(if self.encoding == Encoding::Push { centrifugo::message(&gap) } else { gap });
                    taken += item.cost();
                    into.push_back(item);
                }
                Some(Queued::Replay(mut cursor)) => {
                    taken += cursor.read(budget - taken, into, log, replays, compression.as_deref_mut())?;
                    if cursor.is_done() {
                        self.replays -= 1;
                    } else {
                        self.queue.push_front(Queued::Replay(cursor));
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use crate::hub::entry::Record;
    use crate::hub::log::LogLimits;
    use crate::wire::topic::Pattern;

    /// A log with events of the types `a` and `b` in turns.
    fn log(events: usize) -> Log {
        let mut log = Log::new("e".into(), LogLimits { events: 100, bytes: 1 << 20, age: None });
        for n in 0..events {
            let json = if n % 2 == 0 { r#"{"type":"a"}"# } else { r#"{"type":"b"}"# };
            log.append(Record::event(Bytes::from_static(json.as_bytes())).expect("valid"), Duration::ZERO);
        }
        log
    }

    fn filter(pattern: &str) -> Filter {
        Filter::new([Pattern::parse(pattern).expect("valid")])
    }

    fn take(outbox: &mut Outbox, budget: usize) -> Vec<Item> {
        let mut out = VecDeque::new();
        outbox.take(budget, &mut out, &log(0), &mut Replays::default(), None).expect("no replay");
        out.into()
    }

    fn text(text: &str) -> Item {
        Item::Text(Bytes::copy_from_slice(text.as_bytes()))
    }

    #[test]
    fn it_overflows_by_bytes_and_recovers_by_sending() {
        let mut outbox = Outbox::new(2 * (FRAME_BYTES + 1), Slow::Disconnect);
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
        let mut outbox = Outbox::new(10, Slow::Disconnect);
        assert_eq!(outbox.push(vec![b'x'; 1000].into()), Ok(()));
        assert_eq!(outbox.push("y".into()), Err(Overflow));
    }

    #[test]
    fn nothing_follows_a_close_and_an_abandoned_queue_holds_only_it() {
        let mut outbox = Outbox::new(1000, Slow::Disconnect);
        outbox.push("a".into()).expect("room");
        outbox.close(CloseCode::Shutdown);
        outbox.push("b".into()).expect("ignored");
        outbox.close(CloseCode::Slow);
        assert_eq!(take(&mut outbox, 1000), [text("a"), Item::Close(CloseCode::Shutdown)]);

        let mut outbox = Outbox::new(1000, Slow::Disconnect);
        outbox.push("a".into()).expect("room");
        outbox.abandon(CloseCode::Slow);
        assert_eq!(take(&mut outbox, 1000), [Item::Close(CloseCode::Slow)]);
    }

    #[test]
    fn replays_keep_their_places_and_chain_their_entries() {
        let (mut log, mut replays) = (log(4), Replays::default());
        let mut outbox = Outbox::new(1000, Slow::Disconnect);
        outbox.push("subscribed".into()).expect("room");
        let mut cursor = |pattern, since| replays.cursor(filter(pattern), since, &log, Encoding::Event);
        let [first, second, third] = [cursor("a", 0), cursor("b", 1), cursor("none", 1)];
        outbox.push_replay(first);
        outbox.push("live".into()).expect("room");
        outbox.push("subscribed again".into()).expect("room");
        outbox.push_replay(second);
        outbox.push_replay(third);
        outbox.push("more".into()).expect("room");
        assert_eq!(outbox.replays(), 2);
        log.append(Record::event(Bytes::from_static(b"{\"type\":\"b\"}")).expect("valid"), Duration::ZERO);
        let frame = |kind, seq, prev| {
            text(&format!(r#"{{"type":"event","seq":{seq},"prev":{prev},"replay":true,"data":{{"type":"{kind}"}}}}"#))
        };
        let wanted = [
            text("subscribed"),
            frame("a", 1, 0),
            frame("a", 3, 1),
            text("live"),
            text("subscribed again"),
            frame("b", 2, 1),
            frame("b", 4, 2),
            text("more"),
        ];
        let mut taken = VecDeque::new();
        for n in 1..=wanted.len() {
            outbox.take(1, &mut taken, &log, &mut replays, None).expect("the log has it");
            assert_eq!(taken, &wanted[..n]);
        }
        assert!(outbox.replays() == 0 && outbox.bytes() == 0);
    }
}
