//! The outbox: where callers leave events and the driver fetches them.
//!
//! Callers pay for one short lock and one copy into the block under construction; no caller waits for I/O, and the
//! lock is never held over any. The driver is woken only when it has said that it sleeps (`armed`), so a burst costs
//! one wake-up, and none while the driver lingers for more.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::emitter::config::{EmitterConfig, WhenFull};
use crate::emitter::item::{Gap, GapReason, Item};
use crate::error::{Error, ErrorKind, Result};
use crate::wire::block::{BlockBuilder, EVENT_OVERHEAD, HEADER_BYTES};

/// Size of a block's buffer: large enough that costs per block vanish (some 150 events of 400 bytes), small enough
/// that filling, sending and acknowledging overlap and stay in the processor's cache.
pub const BLOCK_BYTES: usize = 64 << 10;
/// Buffers kept for reuse: fresh memory costs a page fault per 4 KiB, more than the copy into it.
const POOL_BUFFERS: usize = 64;
/// A block that fills less than this share of its buffer is copied out of it when it is taken.
const SMALL_SHARE: usize = 4;
/// Memory may hold this many times `outbox_bytes` before events of callers that ignore the request to wait are given up.
const HARD_LIMIT_FACTOR: usize = 4;

/// What became of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pushed {
    /// In the outbox.
    Accepted {
        /// Its place in the stream.
        seq: u64,
        /// Whether the link was live.
        live: bool,
        /// Memory, or the spill under [`WhenFull::Wait`], is at its bound: the caller should wait for room before the
        /// next event.
        pressed: bool,
        /// The spill has not been read yet: the final seq will be higher.
        provisional: bool,
    },
    /// Given up at once; a gap stands in its place.
    Dropped,
    /// Not taken, because memory is at its hard limit under [`WhenFull::Wait`]: try again when there is room.
    Full,
}

/// An item with what the driver has to know about its way in.
#[derive(Clone, Debug)]
pub struct Fresh {
    /// The events or the gap.
    pub item: Item,
    /// How many of the events were accepted while the link was down.
    pub spilled: u64,
    /// When the first was accepted.
    pub since: Instant,
}

/// Counters that callers and driver share; read by `get_stats`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Events accepted while the link was live.
    pub live: u64,
    /// Events accepted while it was not.
    pub spilled: u64,
    /// Events given up by the outbox.
    pub dropped: u64,
    /// Events refused with an error because the spill was full.
    pub refused: u64,
    /// Last seq assigned.
    pub last_seq: u64,
    /// Bytes that the driver has not fetched yet.
    pub waiting_bytes: usize,
}

struct Building {
    block: BlockBuilder,
    spilled: u64,
    since: Instant,
}

#[derive(Default)]
struct State {
    building: Option<Building>,
    sealed: VecDeque<Fresh>,
    pool: Vec<BytesMut>,
    bytes: usize,
    counts: Counts,
    armed: bool,
    closed: bool,
    /// Whether seqs are final.
    numbered: bool,
}

/// A callback that is run once, outside all locks.
pub type Waiter = Box<dyn FnOnce() + Send>;

/// See the [module](self).
pub struct Outbox {
    state: Mutex<State>,
    /// Callers to be told when there is room.
    waiting: Mutex<Vec<Waiter>>,
    /// Tells the driver that there is something to fetch.
    pub bell: Notify,
    /// Set by the driver: the link is up.
    pub live: AtomicBool,
    /// Set by the driver: bytes that it holds beside those still here.
    pub held: AtomicUsize,
    /// Set by the driver: seqs that need no room any more (acknowledged, or given up).
    pub settled: AtomicU64,
    /// Set by the driver: bytes in the spill.
    pub spill_bytes: AtomicU64,
    limits: Limits,
}

#[derive(Clone, Copy)]
struct Limits {
    soft: usize,
    spill_events: u64,
    spill_bytes: u64,
    when_full: WhenFull,
}

impl Outbox {
    /// An empty outbox that numbers from 1 until [`renumber`](Self::renumber).
    #[must_use]
    pub fn new(config: &EmitterConfig) -> Self {
        Self {
            state: Mutex::new(State { armed: true, ..State::default() }),
            waiting: Mutex::default(),
            bell: Notify::new(),
            live: AtomicBool::new(false),
            held: AtomicUsize::new(0),
            settled: AtomicU64::new(0),
            spill_bytes: AtomicU64::new(0),
            limits: Limits {
                soft: config.outbox_bytes,
                spill_events: config.spill_max_events,
                spill_bytes: config.spill_max_bytes,
                when_full: config.when_full,
            },
        }
    }

    /// Takes an event, given as JSON. `live` overrides the driver's opinion of the link.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`]; [`ErrorKind::SpillFull`] where the policy is to raise.
    pub fn push(&self, json: &[u8], live: Option<bool>) -> Result<Pushed> {
        let mut state = self.state.lock();
        if state.closed {
            return Err(closed());
        }
        let live = live.unwrap_or_else(|| self.live.load(Ordering::Relaxed));
        let memory = state.bytes + self.held.load(Ordering::Relaxed);
        let mut pressed = memory >= self.limits.soft;
        let brimful = memory >= self.limits.soft * HARD_LIMIT_FACTOR;
        if (!live || pressed) && (brimful || self.full(&state, memory, 1, json.len())) {
            match self.limits.when_full {
                WhenFull::DropOldest if !brimful => {} // the spill makes room
                WhenFull::DropOldest => return Ok(self.give_up(&mut state, GapReason::OutboxFull)),
                WhenFull::DropNewest => return Ok(self.give_up(&mut state, GapReason::SpillFull)),
                // Accepted first and waited for afterwards: callers who tried again would overtake each other.
                WhenFull::Wait if !brimful => pressed = true,
                WhenFull::Wait => return Ok(Pushed::Full),
                WhenFull::Raise => {
                    state.counts.refused += 1;
                    return Err(full(&self.limits));
                }
            }
        }
        state.append(json, live);
        let seq = state.counts.last_seq;
        let provisional = !state.numbered;
        let wake = std::mem::take(&mut state.armed);
        drop(state);
        if wake {
            self.bell.notify_one();
        }
        Ok(Pushed::Accepted { seq, live, pressed, provisional })
    }

    /// Whether the spill would be over its bound with so many more events and bytes.
    fn full(&self, state: &State, memory: usize, events: u64, bytes: usize) -> bool {
        let backlog = state.counts.last_seq.saturating_sub(self.settled.load(Ordering::Relaxed));
        let stored = self.spill_bytes.load(Ordering::Relaxed) + memory as u64;
        let more = if events > 0 { HEADER_BYTES + EVENT_OVERHEAD + bytes } else { 0 };
        backlog + events > self.limits.spill_events || stored + more as u64 > self.limits.spill_bytes
    }

    fn give_up(&self, state: &mut State, reason: GapReason) -> Pushed {
        state.counts.last_seq += 1;
        state.counts.dropped += 1;
        let seq = state.counts.last_seq;
        state.seal();
        match state.sealed.back_mut() {
            Some(Fresh { item: Item::Gap(gap), .. }) if gap.to + 1 == seq && gap.reason == reason => gap.to = seq,
            _ => {
                let item = Item::Gap(Gap { from: seq, to: seq, reason });
                state.sealed.push_back(Fresh { item, spilled: 0, since: Instant::now() });
            }
        }
        if std::mem::take(&mut state.armed) {
            self.bell.notify_one();
        }
        Pushed::Dropped
    }

    /// Everything accepted so far, in order. The driver's.
    pub fn take(&self) -> VecDeque<Fresh> {
        let mut state = self.state.lock();
        state.seal();
        state.bytes = 0;
        std::mem::take(&mut state.sealed)
    }

    /// Says that the driver sleeps until the bell; `false` if something is there already.
    pub fn arm(&self) -> bool {
        let mut state = self.state.lock();
        state.armed = state.building.is_none() && state.sealed.is_empty();
        state.armed
    }

    /// Gives a buffer back for reuse once nobody else holds it.
    pub fn recycle(&self, buffer: Bytes) {
        if buffer.len() * SMALL_SHARE < BLOCK_BYTES {
            return; // it was copied out of its buffer
        }
        if let Ok(buffer) = buffer.try_into_mut() {
            let mut state = self.state.lock();
            if state.pool.len() < POOL_BUFFERS && buffer.capacity() >= BLOCK_BYTES {
                state.pool.push(buffer);
            }
        }
    }

    /// Moves all seqs assigned so far up by `by`: they were given before the spill told which come next.
    pub fn renumber(&self, by: u64) {
        let mut state = self.state.lock();
        state.seal();
        state.numbered = true;
        state.counts.last_seq += by;
        // The seqs below need no room; until the driver speaks the bounds would take them for a backlog.
        self.settled.fetch_add(by, Ordering::Relaxed);
        for fresh in &mut state.sealed {
            fresh.item = match &fresh.item {
                Item::Gap(gap) => Item::Gap(Gap { from: gap.from + by, to: gap.to + by, reason: gap.reason }),
                Item::Events(block) => Item::Events(block.renumbered(block.first() + by)),
            };
        }
    }

    /// Refuses events from now on.
    pub fn close(&self) {
        self.state.lock().closed = true;
        self.release();
    }

    /// The counters.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let state = self.state.lock();
        Counts { waiting_bytes: state.bytes, ..state.counts }
    }

    /// Whether a caller that was told [`Pushed::Full`] or `pressed` may go on.
    #[must_use]
    pub fn has_room(&self) -> bool {
        let state = self.state.lock();
        let memory = state.bytes + self.held.load(Ordering::Relaxed);
        let full = self.limits.when_full == WhenFull::Wait
            && !self.live.load(Ordering::Relaxed)
            && self.full(&state, memory, 0, 0);
        // Half of it, so that a caller who waited can go on for a while.
        state.closed || (memory < self.limits.soft / 2 && !full)
    }

    /// Runs `waiter` when there is room, at once if there is.
    pub fn when_room(&self, waiter: Waiter) {
        let mut waiting = self.waiting.lock();
        if self.has_room() {
            drop(waiting);
            waiter();
        } else {
            waiting.push(waiter);
        }
    }

    /// Lets waiting callers go on if there is room. The driver's, after each step.
    pub fn release(&self) {
        let mut waiting = self.waiting.lock();
        if waiting.is_empty() || !self.has_room() {
            return;
        }
        let ready = std::mem::take(&mut *waiting);
        drop(waiting);
        for waiter in ready {
            waiter();
        }
    }
}

impl State {
    fn append(&mut self, json: &[u8], live: bool) {
        if self.building.as_ref().is_some_and(|building| !building.block.fits(json.len())) {
            self.seal();
        }
        self.counts.last_seq += 1;
        let building = self.building.get_or_insert_with(|| {
            self.bytes += HEADER_BYTES;
            let wanted = HEADER_BYTES + EVENT_OVERHEAD + json.len();
            let buffer = match self.pool.pop() {
                Some(buffer) if wanted <= buffer.capacity() => buffer,
                _ => BytesMut::with_capacity(wanted.max(BLOCK_BYTES)),
            };
            Building { block: BlockBuilder::new(self.counts.last_seq, buffer), spilled: 0, since: Instant::now() }
        });
        building.block.push(json);
        self.bytes += json.len() + EVENT_OVERHEAD;
        if live {
            self.counts.live += 1;
        } else {
            self.counts.spilled += 1;
            building.spilled += 1;
        }
    }

    fn seal(&mut self) {
        let Some(Building { block, spilled, since }) = self.building.take() else { return };
        let block = if block.len() * SMALL_SHARE < BLOCK_BYTES {
            let (block, buffer) = block.seal_small();
            self.pool.push(buffer);
            block
        } else {
            block.seal()
        };
        let fresh = block.map(|block| Fresh { item: Item::Events(block), spilled, since });
        self.sealed.extend(fresh);
    }
}

fn closed() -> Error {
    Error::new(ErrorKind::Closed, "the broadcaster is stopped; make a new one")
}

fn full(limits: &Limits) -> Error {
    let text = format!(
        "the spill is full ({} events or {} bytes): restore the link, or raise spill_max_events or spill_max_bytes",
        limits.spill_events, limits.spill_bytes
    );
    Error::new(ErrorKind::SpillFull, text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::emitter::tests::config;

    fn seqs(outbox: &Outbox) -> Vec<(u64, u64)> {
        outbox.take().iter().map(|fresh| (fresh.item.first(), fresh.item.last())).collect()
    }

    #[test]
    fn events_are_numbered_in_the_order_of_their_calls_without_holes() {
        let outbox = Outbox::new(&config());
        for _ in 0..1000 {
            outbox.push(&[b'x'; 300], None).expect("open");
        }
        let taken = seqs(&outbox);
        assert!(taken.len() > 1, "1000 events of 300 bytes do not fit one block");
        assert_eq!((taken[0].0, taken[taken.len() - 1].1), (1, 1000));
        assert!(taken.windows(2).all(|pair| pair[0].1 + 1 == pair[1].0));
    }

    #[test]
    fn the_driver_is_woken_once_per_sleep() {
        let outbox = Outbox::new(&config());
        outbox.push(b"{}", None).expect("open");
        assert!(!outbox.arm(), "there is something to fetch");
        outbox.take();
        assert!(outbox.arm());
        outbox.push(b"{}", None).expect("open");
        assert!(!outbox.state.lock().armed);
    }

    #[test]
    fn numbers_given_before_the_spill_was_read_move_up() {
        let outbox = Outbox::new(&config());
        outbox.push(b"{}", None).expect("open");
        outbox.renumber(41);
        outbox.push(b"{}", None).expect("open");
        let taken = outbox.take();
        let events: Vec<_> = taken
            .iter()
            .flat_map(|fresh| match &fresh.item {
                Item::Events(block) => block.events().map(|(seq, _)| seq).collect::<Vec<_>>(),
                Item::Gap(_) => vec![],
            })
            .collect();
        assert_eq!(events, [42, 43]);
    }

    #[test]
    fn at_the_bound_each_policy_does_what_its_name_says() {
        let fill = |when_full| {
            let outbox = Outbox::new(&EmitterConfig { spill_max_events: 2, when_full, ..config() });
            let outcomes: Vec<_> = (0..3).map(|_| outbox.push(b"{}", None)).collect();
            (outbox, outcomes)
        };
        let (outbox, outcomes) = fill(WhenFull::Raise);
        assert_eq!(outcomes[2].as_ref().expect_err("full").kind(), ErrorKind::SpillFull);
        assert_eq!(outbox.counts().refused, 1);
        let (outbox, outcomes) = fill(WhenFull::DropNewest);
        assert_eq!(*outcomes[2].as_ref().expect("dropped"), Pushed::Dropped);
        let last = outbox.take().pop_back().expect("gap").item;
        assert_eq!(last, Item::Gap(Gap { from: 3, to: 3, reason: GapReason::SpillFull }));
        let (outbox, outcomes) = fill(WhenFull::Wait);
        assert!(matches!(outcomes[1].as_ref().expect("accepted"), Pushed::Accepted { pressed: false, .. }));
        assert!(matches!(outcomes[2].as_ref().expect("accepted"), Pushed::Accepted { seq: 3, pressed: true, .. }));
        assert!(!outbox.has_room());
        outbox.settled.store(1, Ordering::Relaxed);
        assert!(outbox.has_room());
        let (_, outcomes) = fill(WhenFull::DropOldest);
        assert!(matches!(outcomes[2].as_ref().expect("accepted"), Pushed::Accepted { seq: 3, .. }));
    }

    #[test]
    fn seqs_of_earlier_processes_are_no_backlog() {
        let config = EmitterConfig { spill_max_events: 10, when_full: WhenFull::Raise, ..config() };
        let outbox = Outbox::new(&config);
        outbox.push(b"{}", None).expect("room");
        outbox.renumber(1_000_000);
        for _ in 0..9 {
            outbox.push(b"{}", None).expect("room");
        }
        assert_eq!(outbox.push(b"{}", None).expect_err("full").kind(), ErrorKind::SpillFull);
    }

    #[test]
    fn full_blocks_return_their_buffers() {
        let outbox = Outbox::new(&config());
        for _ in 0..500 {
            outbox.push(&[b'x'; 300], None).expect("open");
        }
        for fresh in outbox.take() {
            if let Item::Events(block) = fresh.item {
                outbox.recycle(block.into_bytes());
            }
        }
        assert!(!outbox.state.lock().pool.is_empty());
    }

    #[test]
    fn closing_refuses_events_and_frees_those_who_wait() {
        let outbox = Outbox::new(&EmitterConfig { spill_max_events: 1, when_full: WhenFull::Wait, ..config() });
        outbox.push(b"{}", None).expect("open");
        outbox.push(b"{}", None).expect("open");
        let (sender, told) = std::sync::mpsc::channel();
        outbox.when_room(Box::new(move || sender.send(()).expect("listening")));
        assert!(told.try_recv().is_err());
        outbox.close();
        told.recv().expect("freed");
        assert_eq!(outbox.push(b"{}", None).expect_err("closed").kind(), ErrorKind::Closed);
    }
}
