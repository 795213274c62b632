//! The outbox: where callers leave events and the driver fetches them.
//!
//! Callers pay for one short lock and one copy into the [ring](super::ring); no caller waits for I/O, and the lock is
//! never held over any. The driver is woken only when it has said that it sleeps (`armed`), so a burst costs one
//! wake-up, and none while the driver lingers for more.
//!
//! Events may come before the spill was opened, which finds the ring: they lie in anonymous memory until
//! [`attach`](Outbox::attach) gives them their final seqs and their place.

use std::collections::VecDeque;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::clock::since_boot;
use crate::emitter::config::{Durability, EmitterConfig, WhenFull};
use crate::emitter::item::{Gap, GapReason, Item};
use crate::emitter::ring::{Ring, Writer, checksum};
use crate::error::{Error, ErrorKind, Result};
use crate::wire::block::{EVENT_OVERHEAD, HEADER_BYTES};

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
    /// When the first was accepted, since the machine's boot.
    pub since: Duration,
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

/// What the driver has to know of the block under construction.
struct Building {
    spilled: u64,
    since: Duration,
}

struct State {
    writer: Writer,
    building: Option<Building>,
    sealed: VecDeque<Fresh>,
    bytes: usize,
    counts: Counts,
    armed: bool,
    closed: bool,
    /// Whether seqs are final, and events are where their durability wants them.
    attached: bool,
    driver: Beyond,
}

/// What lies beyond the outbox, as its driver last told.
#[derive(Clone, Copy, Debug, Default)]
pub struct Beyond {
    /// The link is up.
    pub live: bool,
    /// Bytes that the driver holds in memory.
    pub held: usize,
    /// Seqs that need no room any more (acknowledged, or given up).
    pub settled: u64,
    /// Bytes in the spill.
    pub spill_bytes: u64,
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
    limits: Limits,
    /// Whether events get a checksum, by which a ring on disk is read back.
    durable: bool,
}

#[derive(Clone, Copy)]
struct Limits {
    soft: usize,
    spill_events: u64,
    spill_bytes: u64,
    when_full: WhenFull,
}

impl Outbox {
    /// Segments of a ring that serves an outbox with these settings.
    #[must_use]
    pub fn segments(config: &EmitterConfig) -> usize {
        Ring::segments(HARD_LIMIT_FACTOR * config.outbox_bytes, config.max_event_bytes)
    }

    /// An empty outbox in anonymous memory that numbers from 1 until [`attach`](Self::attach).
    ///
    /// # Errors
    /// There is no address space.
    pub fn new(config: &EmitterConfig) -> Result<Self> {
        let state = State {
            writer: Writer::new(Ring::anonymous(Self::segments(config))?),
            building: None,
            sealed: VecDeque::new(),
            bytes: 0,
            counts: Counts::default(),
            armed: true,
            closed: false,
            attached: false,
            driver: Beyond::default(),
        };
        Ok(Self {
            state: Mutex::new(state),
            waiting: Mutex::default(),
            bell: Notify::new(),
            limits: Limits {
                soft: config.outbox_bytes,
                spill_events: config.spill_max_events,
                spill_bytes: config.spill_max_bytes,
                when_full: config.when_full,
            },
            durable: config.durability != Durability::Memory,
        })
    }

    /// Takes an event, given as JSON. `live` overrides the driver's opinion of the link.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`]; [`ErrorKind::SpillFull`] where the policy is to raise.
    pub fn push(&self, json: &[u8], live: Option<bool>) -> Result<Pushed> {
        let checksum = if self.durable { checksum(json) } else { 0 };
        let mut state = self.state.lock();
        if state.closed {
            return Err(closed());
        }
        let live = live.unwrap_or(state.driver.live);
        let memory = state.bytes + state.driver.held;
        let mut pressed = memory >= self.limits.soft;
        let brimful = memory >= self.limits.soft * HARD_LIMIT_FACTOR || !state.make_room(json.len());
        if brimful || ((!live || pressed) && self.full(&state, memory, 1, json.len())) {
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
        state.append(json, checksum, live);
        let seq = state.counts.last_seq;
        let provisional = !state.attached;
        let wake = std::mem::take(&mut state.armed);
        drop(state);
        if wake {
            self.bell.notify_one();
        }
        Ok(Pushed::Accepted { seq, live, pressed, provisional })
    }

    /// Whether the spill would be over its bound with so many more events and bytes.
    fn full(&self, state: &State, memory: usize, events: u64, bytes: usize) -> bool {
        let backlog = state.counts.last_seq.saturating_sub(state.driver.settled);
        let stored = state.driver.spill_bytes + memory as u64;
        let more = if events > 0 { HEADER_BYTES + EVENT_OVERHEAD + bytes } else { 0 };
        backlog + events > self.limits.spill_events || stored + more as u64 > self.limits.spill_bytes
    }

    fn give_up(&self, state: &mut State, reason: GapReason) -> Pushed {
        state.counts.last_seq += 1;
        state.counts.dropped += 1;
        let seq = state.counts.last_seq;
        state.writer.ring().note_last(seq);
        state.seal();
        match state.sealed.back_mut() {
            Some(Fresh { item: Item::Gap(gap), .. }) if gap.to + 1 == seq && gap.reason == reason => gap.to = seq,
            _ => {
                let item = Item::Gap(Gap { from: seq, to: seq, reason });
                state.sealed.push_back(Fresh { item, spilled: 0, since: since_boot() });
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
        // Counted until the driver counts them: the bounds must not miss what is between the two.
        state.driver.held += std::mem::take(&mut state.bytes);
        std::mem::take(&mut state.sealed)
    }

    /// What lies beyond the outbox now; lets callers go on who waited for room. The driver's, after each step.
    pub fn tell(&self, beyond: Beyond) {
        self.state.lock().driver = beyond;
        self.release();
    }

    /// Says that the driver sleeps until the bell; `false` if something is there already.
    pub fn arm(&self) -> bool {
        let mut state = self.state.lock();
        state.armed = state.building.is_none() && state.sealed.is_empty();
        state.armed
    }

    /// The spill is open: moves all seqs given so far up by `by`, and from now on, with all events so far, into `ring`
    /// if there is one. Returns the highest seq that is where its durability wants it: less than the last one if the
    /// ring was nearly full.
    pub fn attach(&self, by: u64, ring: Option<Ring>) -> u64 {
        let mut state = self.state.lock();
        state.seal();
        state.attached = true;
        state.counts.last_seq += by;
        let mut kept = state.counts.last_seq;
        // The seqs below need no room; until the driver speaks the bounds would take them for a backlog.
        state.driver.settled += by;
        let mut writer = ring.map(Writer::new);
        for fresh in &mut state.sealed {
            fresh.item = match &fresh.item {
                Item::Gap(gap) => Item::Gap(Gap { from: gap.from + by, to: gap.to + by, reason: gap.reason }),
                Item::Events(block) => {
                    let block = block.renumbered(block.first() + by);
                    let moved = writer.as_mut().map(|writer| writer.copy(&block));
                    if moved == Some(None) {
                        kept = kept.min(block.first() - 1);
                    }
                    Item::Events(moved.flatten().unwrap_or(block))
                }
            };
        }
        if let Some(writer) = writer {
            if state.writer.ring().has_promised() {
                writer.ring().promise();
            }
            writer.ring().note_last(state.counts.last_seq);
            state.writer = writer;
        }
        kept
    }

    /// Events go into another ring from now on; those so far stay where they are. The driver's, when the file is gone.
    /// Returns the last seq of those.
    pub fn move_to(&self, ring: Ring) -> u64 {
        let mut state = self.state.lock();
        state.seal();
        if state.writer.ring().has_promised() {
            ring.promise();
        }
        ring.note_last(state.counts.last_seq);
        state.writer = Writer::new(ring);
        state.counts.last_seq
    }

    /// The ring that events go into at present.
    pub(crate) fn ring(&self) -> Ring {
        self.state.lock().writer.ring().clone()
    }

    /// From now on events leave the ring only for what survives power loss. To be called before an event is pushed that
    /// is promised to.
    pub fn promise(&self) {
        self.state.lock().writer.ring().promise();
    }

    /// Sees to it that events from now on share no page with those so far, of which the last is returned.
    pub fn part(&self) -> u64 {
        let mut state = self.state.lock();
        state.seal();
        state.writer.turn_page();
        state.writer.ring().touch_header();
        state.counts.last_seq
    }

    /// Notes in the ring that the peer has everything up to `seq`; before those events are dropped.
    pub fn note_acked(&self, seq: u64) {
        self.state.lock().writer.ring().note_acked(seq);
    }

    /// The ring's bytes, as a killed process would leave them; for simulations.
    #[must_use]
    pub fn snapshot(&self) -> Vec<u8> {
        self.state.lock().writer.ring().snapshot()
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
        let memory = state.bytes + state.driver.held;
        let full = self.limits.when_full == WhenFull::Wait && !state.driver.live && self.full(&state, memory, 0, 0);
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

    fn release(&self) {
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
    /// Whether there is room for an event of `len` bytes, which is then the next in the ring.
    fn make_room(&mut self, len: usize) -> bool {
        if self.writer.fits(len) {
            return true;
        }
        self.seal();
        self.writer.make_room(len, self.counts.last_seq + 1)
    }

    fn append(&mut self, json: &[u8], checksum: u32, live: bool) {
        self.counts.last_seq += 1;
        let seq = self.counts.last_seq;
        if self.writer.push(json, checksum, seq) {
            self.bytes += HEADER_BYTES;
            self.building = Some(Building { spilled: 0, since: since_boot() });
        }
        self.writer.ring().note_last(seq);
        self.bytes += json.len() + EVENT_OVERHEAD;
        if live {
            self.counts.live += 1;
        } else {
            self.counts.spilled += 1;
            if let Some(building) = &mut self.building {
                building.spilled += 1;
            }
        }
    }

    fn seal(&mut self) {
        let sealed = self.building.take().zip(self.writer.seal());
        let fresh =
            sealed.map(|(Building { spilled, since }, block)| Fresh { item: Item::Events(block), spilled, since });
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
    use crate::emitter::item::Identity;
    use crate::emitter::ring::recover;
    use crate::emitter::tests::config;
    use crate::wire::block::Block;

    fn outbox(config: &EmitterConfig) -> Outbox {
        Outbox::new(config).expect("memory")
    }

    fn seqs(outbox: &Outbox) -> Vec<(u64, u64)> {
        outbox.take().iter().map(|fresh| (fresh.item.first(), fresh.item.last())).collect()
    }

    #[test]
    fn events_are_numbered_in_the_order_of_their_calls_without_holes() {
        let outbox = outbox(&config());
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
        let outbox = outbox(&config());
        outbox.push(b"{}", None).expect("open");
        assert!(!outbox.arm(), "there is something to fetch");
        outbox.take();
        assert!(outbox.arm());
        outbox.push(b"{}", None).expect("open");
        assert!(!outbox.state.lock().armed);
    }

    #[test]
    fn numbers_given_before_the_spill_was_read_move_up() {
        let outbox = outbox(&config());
        outbox.push(b"{}", None).expect("open");
        outbox.attach(41, None);
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
            let outbox = outbox(&EmitterConfig { spill_max_events: 2, when_full, ..config() });
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
        outbox.tell(Beyond { settled: 1, ..Beyond::default() });
        assert!(outbox.has_room());
        let (_, outcomes) = fill(WhenFull::DropOldest);
        assert!(matches!(outcomes[2].as_ref().expect("accepted"), Pushed::Accepted { seq: 3, .. }));
    }

    #[test]
    fn what_the_driver_has_fetched_counts_until_it_counts_it_itself() {
        let outbox = outbox(&EmitterConfig { spill_max_bytes: 4096, when_full: WhenFull::Raise, ..config() });
        outbox.push(&[b'x'; 4000], None).expect("room");
        let fetched = outbox.take();
        assert_eq!(outbox.push(&[b'x'; 4000], None).expect_err("full").kind(), ErrorKind::SpillFull);
        let held = fetched.iter().map(|fresh| fresh.item.bytes()).sum();
        outbox.tell(Beyond { held, ..Beyond::default() });
        assert_eq!(outbox.push(&[b'x'; 4000], None).expect_err("full").kind(), ErrorKind::SpillFull);
        outbox.tell(Beyond::default());
        outbox.push(&[b'x'; 4000], None).expect("room again");
    }

    #[test]
    fn seqs_of_earlier_processes_are_no_backlog() {
        let config = EmitterConfig { spill_max_events: 10, when_full: WhenFull::Raise, ..config() };
        let outbox = outbox(&config);
        outbox.push(b"{}", None).expect("room");
        outbox.attach(1_000_000, None);
        for _ in 0..9 {
            outbox.push(b"{}", None).expect("room");
        }
        assert_eq!(outbox.push(b"{}", None).expect_err("full").kind(), ErrorKind::SpillFull);
    }

    #[test]
    fn a_ring_takes_over_what_came_before_it_was_there() {
        let home = tempfile::tempdir().expect("writable");
        let path = home.path().join("spill.db.ring");
        let config = EmitterConfig { durability: Durability::Process, ..config() };
        let outbox = outbox(&config);
        for n in 0..500 {
            outbox.push(&vec![b'x'; 1 + n], None).expect("open");
        }
        let identity = Identity { emitter: "ada".into(), epoch: "e".into() };
        let ring = Ring::create(&path, Outbox::segments(&config), &identity, 1).expect("created");
        assert_eq!(outbox.attach(41, Some(ring)), 541);
        outbox.push(b"after", None).expect("open");
        let left = recover(&path).expect("readable").expect("there");
        let events: Vec<_> = left.blocks.iter().flat_map(Block::events).collect();
        assert_eq!((left.last, left.damaged, events.len()), (542, 0, 501));
        assert!(events.iter().zip(42..).all(|((seq, json), n)| *seq == n && (n == 542 || json.len() as u64 == n - 41)));
    }

    #[test]
    fn after_a_failed_sync_nothing_shares_a_page_with_what_came_before() {
        let outbox = outbox(&config());
        outbox.push(b"before", None).expect("open");
        assert_eq!(outbox.part(), 1);
        outbox.push(b"after", None).expect("open");
        let taken = outbox.take();
        assert_eq!(taken.len(), 2);
        assert_eq!(outbox.state.lock().writer.ring().used(), 2, "each lies in a segment of its own");
    }

    #[test]
    fn closing_refuses_events_and_frees_those_who_wait() {
        let outbox = outbox(&EmitterConfig { spill_max_events: 1, when_full: WhenFull::Wait, ..config() });
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
