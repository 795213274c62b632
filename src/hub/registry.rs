//! Who is connected and wants what, and the fan-out of an entry to them. What a session chooses and may have is in
//! [`choices`], and when those who bring events let others go first in [`turns`].
//!
//! Sessions with equal filters form a group, found by the index of [`Groups`]; the frame is encoded once for all of a
//! group that stand at the same `prev`, which after their first event is all of them.

mod choices;
mod forms;
mod numbers;
mod turns;

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::task::Waker;

use bytes::Bytes;
use serde::{Serialize, Serializer};

use super::compression::Compression;
use super::entry::{Encoding, Entry, Filter, Record};
use super::log::Log;
use super::matching::Groups;
use super::outbox::{FRAME_BYTES, Item, Outbox};
use super::replay::{Cursor, Replays};
use super::slow;
use crate::wire::centrifugo;
use crate::wire::close::CloseCode;
use crate::wire::frame::HubFrame;
use crate::wire::subscriber::{Slow, Wrapping};
use forms::Forms;
pub use numbers::{Counts, Laggard};
use turns::Turns;

/// A session; never reused for another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SessionId {
    slot: u32,
    generation: u32,
}

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.slot, self.generation)
    }
}

impl Serialize for SessionId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl SessionId {
    #[cfg(test)]
    pub(crate) const fn for_test(slot: u32) -> Self {
        Self { slot, generation: 0 }
    }
}

/// Which protocol a session speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// `sb.emit.v1`.
    Emitter,
    /// `sb.v1.json`.
    Subscriber,
    /// Centrifugo's, for subscribers that speak it.
    Centrifugo,
    /// One event in each frame.
    Publisher,
}

impl Role {
    /// Whether its sessions receive what others bring.
    #[must_use]
    pub fn subscribes(self) -> bool {
        matches!(self, Self::Subscriber | Self::Centrifugo)
    }
}

/// What the task of a session waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Anything to send.
    Items,
    /// Only the order to close: the socket takes no more at the moment.
    Close,
}

#[derive(Debug)]
struct Session {
    role: Role,
    outbox: Outbox,
    /// Takes large events compressed.
    deflates: bool,
    filter: Arc<Filter>,
    /// What was chosen on the subscriber's behalf. Its filter is as much of that as is granted, and gives way to its own
    /// choice.
    preset: Option<Arc<Filter>>,
    /// What it may receive; `None`: everything.
    grant: Option<Arc<Filter>>,
    /// The last seq that was queued for this session, or where its live events begin.
    prev: u64,
    /// The last seq that the subscriber said it has processed; `None` if it never said so.
    acked: Option<u64>,
    /// What an emitter may be told to be ours, once more has come or it is time.
    ack_withheld: Option<u64>,
    /// The task that empties the outbox; taken when it is woken, so it is woken once for many frames.
    waker: Option<(Interest, Waker)>,
    /// Woken, and has not taken anything yet.
    unserved: bool,
    /// The turn in which it was last read.
    read_in: Option<u64>,
}

#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    session: Option<Session>,
}

/// See the module.
#[derive(Debug)]
pub struct Registry {
    slots: Vec<Slot>,
    free: Vec<u32>,
    groups: Groups,
    replays: Replays,
    compression: Compression,
    queue_bytes: usize,
    slow: Slow,
    wrapping: Wrapping,
    /// Frames that were put together for live events.
    encoded: u64,
    woken: Vec<Waker>,
    turns: Turns,
    counts: Counts,
}

impl Registry {
    /// Nobody is connected. Each outbox will hold `queue_bytes`.
    #[must_use]
    pub fn new(queue_bytes: usize) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            groups: Groups::default(),
            replays: Replays::default(),
            compression: Compression::new(None),
            queue_bytes,
            slow: Slow::default(),
            wrapping: Wrapping::default(),
            encoded: 0,
            woken: Vec::new(),
            turns: Turns::default(),
            counts: Counts::default(),
        }
    }

    /// The same; what happens to slow sessions that do not choose, and from how many bytes on data is compressed for
    /// those who ask for it (`None`: never).
    #[must_use]
    pub fn with(mut self, slow: Slow, compression_threshold: Option<usize>) -> Self {
        self.slow = slow;
        self.compression = Compression::new(compression_threshold);
        self.replays = Replays::new(compression_threshold.unwrap_or(usize::MAX));
        self
    }

    /// The same, bringing events to sessions so unless they choose.
    #[must_use]
    pub fn wrapping(self, wrapping: Wrapping) -> Self {
        Self { wrapping, ..self }
    }

    /// A connection begins.
    pub fn open(&mut self, role: Role) -> SessionId {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() as u32 - 1
        });
        let mut outbox = Outbox::new(self.queue_bytes, self.slow);
        outbox.set_encoding(match role {
            Role::Subscriber => self.wrapping.into(),
            Role::Centrifugo => Encoding::Push,
            Role::Emitter | Role::Publisher => Encoding::Event,
        });
        let entry = &mut self.slots[slot as usize];
        entry.session = Some(Session {
            role,
            outbox,
            deflates: false,
            filter: Arc::default(),
            preset: None,
            grant: None,
            prev: 0,
            acked: None,
            ack_withheld: None,
            waker: None,
            unserved: false,
            read_in: None,
        });
        *self.counts.of(role) += 1;
        SessionId { slot, generation: entry.generation }
    }

    /// A connection is gone.
    pub fn close(&mut self, id: SessionId) {
        self.leave(id);
        let Some(slot) = self.slots.get_mut(id.slot as usize).filter(|slot| slot.generation == id.generation) else {
            return;
        };
        if let Some(session) = slot.session.take() {
            slot.generation = slot.generation.wrapping_add(1);
            self.free.push(id.slot);
            *self.counts.of(session.role) -= 1;
            self.turns.served(session.unserved);
        }
    }

    /// All open sessions.
    #[must_use]
    pub fn sessions(&self) -> Vec<(SessionId, Role)> {
        self.each().map(|(id, session)| (id, session.role)).collect()
    }

    fn each(&self) -> impl Iterator<Item = (SessionId, &Session)> {
        self.slots.iter().enumerate().filter_map(|(index, slot)| {
            let id = SessionId { slot: index as u32, generation: slot.generation };
            slot.session.as_ref().map(|session| (id, session))
        })
    }

    /// Queues a frame for one session; closes it as slow if its outbox is full.
    pub fn push(&mut self, id: SessionId, frame: Bytes) {
        let Some(session) = self.get_mut(id) else { return };
        if session.outbox.push(frame).is_err() {
            return self.close_slow(id);
        }
        self.wake(id);
    }

    /// Queues a frame that one session has not asked for, as its protocol says such things; where it has no words for
    /// them, the session is not told.
    pub fn tell(&mut self, id: SessionId, frame: Bytes) {
        match self.encoding(id) {
            Encoding::Event => self.push(id, frame),
            Encoding::Push => self.push(id, centrifugo::message(&frame)),
            Encoding::Raw => {}
        }
    }

    /// Queues a ping.
    pub fn push_ping(&mut self, id: SessionId) {
        self.with_outbox(id, Outbox::push_ping);
    }

    /// A replay, for a session, of what matches after an offset; the log has all of that.
    pub fn cursor(&mut self, id: SessionId, filter: Filter, since: u64, log: &Log) -> Cursor {
        self.replays.cursor(filter, since, log, self.encoding(id))
    }

    /// Queues what is to be sent again, see [`Outbox::push_replay`].
    pub fn push_replay(&mut self, id: SessionId, cursor: Cursor) {
        self.with_outbox(id, |outbox| outbox.push_replay(cursor));
    }

    /// Gives up a session's replays of a filter.
    pub fn forget_replays(&mut self, id: SessionId, filter: &Filter) {
        if let Some(session) = self.get_mut(id) {
            session.outbox.forget(filter);
        }
    }

    /// How many replays are on their way to the session.
    #[must_use]
    pub fn replays(&self, id: SessionId) -> usize {
        self.get(id).map_or(0, |session| session.outbox.replays())
    }

    /// Notes that everything up to `upto` may be acknowledged.
    pub fn withhold_ack(&mut self, id: SessionId, upto: u64) {
        if let Some(session) = self.get_mut(id) {
            session.ack_withheld = Some(upto);
        }
    }

    /// Acknowledges what may be.
    pub fn acknowledge(&mut self, id: SessionId) {
        if let Some(upto) = self.get_mut(id).and_then(|session| session.ack_withheld.take()) {
            self.push(id, HubFrame::Ack { upto }.encode().into());
        }
    }

    /// Ends a session after what is queued for it and the ack that it has earned.
    pub fn order_close(&mut self, id: SessionId, code: CloseCode) {
        self.leave(id);
        self.acknowledge(id);
        self.with_outbox(id, |outbox| outbox.close(code));
    }

    /// Whether a session is to end.
    #[must_use]
    pub fn is_closing(&self, id: SessionId) -> bool {
        self.get(id).is_some_and(|session| session.outbox.is_closing())
    }

    /// Brings an entry to every session that wants it and has not had it from another hub; returns to how many.
    pub fn fan_out(&mut self, entry: &Entry) -> usize {
        let mut reached = 0;
        let mut overflown = Vec::new();
        let mut mark = None; // made for the first session that may be left out
        self.turns.bring(frame_cost(&entry.record));
        let mut zlib = None; // made for the first session that takes it
        let Self { groups, slots, compression, encoded, woken, turns, counts, .. } = self;
        groups.for_each(&entry.record, |members| {
            let mut forms = Forms::of(entry);
            for id in members {
                let Some(session) = slots[id.slot as usize].session.as_mut() else { continue };
                if session.prev >= entry.offset {
                    continue; // it had this from another hub
                }
                let item = match session.outbox.encoding() {
                    Encoding::Event if session.deflates => {
                        forms.framed(session.prev, zlib.get_or_insert_with(|| compression.of(entry)).as_ref())
                    }
                    Encoding::Event => forms.framed(session.prev, None),
                    Encoding::Push => forms.pushed(&session.filter),
                    Encoding::Raw => match entry.bare() {
                        Some(item) => item,
                        None => continue,
                    },
                };
                session.prev = entry.offset;
                reached += 1;
                let pushed = if session.outbox.slow() == Slow::Disconnect {
                    session.outbox.push_item(item)
                } else {
                    let mark = mark.get_or_insert_with(|| slow::mark(entry));
                    session.outbox.push_event(item, mark).map(|left| counts.left_out += left)
                };
                match pushed {
                    Ok(()) => turns.woken(session.wake(woken)),
                    Err(_) => overflown.push(*id),
                }
            }
            *encoded += forms.made();
        });
        for id in overflown {
            self.close_slow(id);
        }
        reached
    }

    /// Moves what is queued for a session to `into`, about `budget` bytes. One whose replay the log has overtaken is
    /// closed: it comes back and is told so.
    pub fn take(&mut self, id: SessionId, budget: usize, into: &mut VecDeque<Item>, log: &Log) {
        let Self { slots, replays, compression, .. } = self;
        let slot = slots.get_mut(id.slot as usize).filter(|slot| slot.generation == id.generation);
        let Some(session) = slot.and_then(|slot| slot.session.as_mut()) else { return };
        let compression = session.deflates.then_some(compression);
        let taken = session.outbox.take(budget, into, log, replays, compression);
        let served = std::mem::take(&mut session.unserved);
        self.turns.served(served);
        if taken.is_err() {
            self.close_slow(id);
            self.take(id, budget, into, log);
        }
    }

    /// Whether sessions were woken and have not had their turn.
    #[must_use]
    pub fn has_unserved(&self) -> bool {
        self.turns.has_unserved()
    }

    /// Which turn a session that brings events must let end before it is read: the present one, if it was read in it
    /// already, or if those who were have filled a quarter of a queue.
    #[must_use]
    pub fn must_give_way(&self, id: SessionId) -> Option<u64> {
        let session = self.get(id)?;
        self.turns.must_give_way(session.unserved, session.read_in, self.queue_bytes / 4)
    }

    /// Notes that a session is read in this turn.
    pub fn reads(&mut self, id: SessionId) {
        let turn = self.turns.present();
        if let Some(session) = self.get_mut(id) {
            session.read_in = Some(turn);
        }
    }

    /// Registers the task of a session to be woken once.
    pub fn park(&mut self, id: SessionId, interest: Interest, waker: Waker) {
        if let Some(session) = self.get_mut(id) {
            session.waker = Some((interest, waker));
        }
    }

    /// The tasks to wake, in the order in which their frames were queued; to be called without the lock held.
    pub fn take_woken(&mut self) -> Vec<Waker> {
        std::mem::take(&mut self.woken)
    }

    /// The log began anew: whoever has a position in the old one comes back for one in the new, and what was queued for it
    /// is given up. Emitters and publishers go on.
    pub fn restart(&mut self) {
        self.replays.clear();
        self.compression.clear();
        let positioned = |(id, session): (SessionId, &Session)| {
            (session.role.subscribes() && !session.filter.patterns().is_empty()).then_some(id)
        };
        for id in self.each().filter_map(positioned).collect::<Vec<_>>() {
            self.leave(id);
            self.with_outbox(id, |outbox| outbox.abandon(CloseCode::Restarted));
        }
    }

    fn close_slow(&mut self, id: SessionId) {
        self.leave(id);
        self.counts.slow += 1;
        self.with_outbox(id, |outbox| outbox.abandon(CloseCode::Slow));
    }

    fn with_outbox(&mut self, id: SessionId, act: impl FnOnce(&mut Outbox)) {
        if let Some(session) = self.get_mut(id) {
            act(&mut session.outbox);
            self.wake(id);
        }
    }

    fn wake(&mut self, id: SessionId) {
        if let Some(session) = self.slots.get_mut(id.slot as usize).and_then(|slot| slot.session.as_mut()) {
            self.turns.woken(session.wake(&mut self.woken));
        }
    }

    /// Takes a session out of its group.
    fn leave(&mut self, id: SessionId) {
        let Some(session) = self.get_mut(id) else { return };
        let filter = std::mem::take(&mut session.filter);
        self.groups.leave(&filter, id);
    }

    fn get(&self, id: SessionId) -> Option<&Session> {
        self.slots.get(id.slot as usize).filter(|slot| slot.generation == id.generation)?.session.as_ref()
    }

    fn get_mut(&mut self, id: SessionId) -> Option<&mut Session> {
        self.slots.get_mut(id.slot as usize).filter(|slot| slot.generation == id.generation)?.session.as_mut()
    }
}

impl Session {
    /// Wakes the task if it waits for this; whether the session became unserved by it.
    fn wake(&mut self, woken: &mut Vec<Waker>) -> bool {
        let closing = self.outbox.is_closing();
        let wanted = |(interest, _): &mut (Interest, Waker)| closing || *interest == Interest::Items;
        let Some((interest, waker)) = self.waker.take_if(wanted) else { return false };
        woken.push(waker);
        // One whose socket is full will not take anything at its turn, and is not waited for.
        interest == Interest::Items && !std::mem::replace(&mut self.unserved, true)
    }
}

/// What a record takes of a session's queue, about.
#[must_use]
pub fn frame_cost(record: &Record) -> usize {
    /// `{"type":"event","seq":1234567,"prev":1234566,"data":}`
    const HEAD: usize = 56;
    FRAME_BYTES + HEAD + record.json().len()
}

#[cfg(test)]
mod tests;
