//! One stream for many hubs: what a hub's emitters and publishers bring is numbered by one sequencer on a bus, and every
//! hub appends the same records at the same offsets. So a subscriber may come back at any of them.
//!
//! ```text
//!  ops ─▶ driver ─▶ Link::append ─▶ sequencer ─▶ live messages ─▶ machine ─▶ log, subscribers   (of every hub)
//!           ▲                            └─ verdicts ─▶ acks, replies                           (of this one)
//!           └───────── machine: what comes next, gaps, probes, reconnects
//! ```
//!
//! [`Bus`] and [`Link`] are the contract; [`memory`] keeps it within a process and is the reference, [`redis`] keeps it
//! over the network, and one suite tests both. [`machine`] and [`sequencer`] are pure.
//!
//! Live messages are for speed only: they may be lost, late, doubled or out of order. What is missing is read from the
//! stream, and a probe that goes round through the live messages finds out that they have stopped.

mod action;
mod batches;
pub mod block;
mod driver;
pub mod hearing;
mod local;
pub mod machine;
pub mod memory;
mod open;
pub mod redis;
pub mod sequencer;
mod status;
mod trouble;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;

pub(super) use open::start;
pub use status::BridgeStats;
pub(super) use status::Status;

use super::ops::Op;
use crate::error::Result;
use hearing::Hearing;
use memory::MemoryBus;
use redis::RedisConfig;

/// Which bus a hub joins, and what it does without it.
#[derive(Clone, Debug)]
pub struct BridgeConfig {
    /// Where the bus is.
    pub bus: BusConfig,
    /// What happens while it cannot be reached. Default [`BusDown::Wait`]: nothing is lost.
    pub bus_down: BusDown,
    /// How long an event may wait for the bus before its publisher is told, and how long the bus may be away before
    /// `bus_down` applies; at a start, how long it is tried. Default 5 s: a restart of Redis is no news, and a caller is
    /// not held up for long.
    pub bus_timeout: Duration,
    /// How often a probe is sent through the live messages; one that has not come back when the next is due means that
    /// the connection is deaf, and it is made anew. Default 2 s.
    pub probe_interval: Duration,
    /// Attempts in vain after which the breaker opens. Default 5.
    pub max_recovery_attempts: u32,
    /// Pause of the attempts while it is open. Default 5 s.
    pub breaker_cooldown: Duration,
}

impl BridgeConfig {
    /// The defaults for a bus.
    #[must_use]
    pub fn new(bus: BusConfig) -> Self {
        Self {
            bus,
            bus_down: BusDown::default(),
            bus_timeout: Duration::from_secs(5),
            probe_interval: Duration::from_secs(2),
            max_recovery_attempts: 5,
            breaker_cooldown: Duration::from_secs(5),
        }
    }
}

/// The kinds of bus.
#[derive(Clone, Debug)]
pub enum BusConfig {
    /// Within this process: for tests.
    Memory(MemoryBus),
    /// A Redis.
    Redis(RedisConfig),
}

/// What a hub does while it cannot reach the bus.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BusDown {
    /// Nothing is taken: emitters keep their events, publishers are told.
    #[default]
    Wait,
    /// Events go to those who are connected to this hub, under an epoch of their own; the other hubs never get them.
    Local,
}

/// What a hub knows of the stream when it asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    /// The epoch that it is in; empty before the first.
    pub epoch: String,
    /// The highest offset that it has heard of there.
    pub head: u64,
    /// The life of the bus in which it joined last; empty before the first.
    pub run: String,
}

/// What the bus answers to a hub that joins or probes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// The epoch of the stream; empty if there is none: join to found one.
    pub epoch: String,
    /// Its highest offset.
    pub head: u64,
    /// The life of the bus; told to a hub that joins.
    pub run: String,
    /// Whether this hub takes in what others publish without a sequencer, at the moment.
    pub intake: bool,
    /// Why nothing can be appended, where a probe found that out.
    pub refuses: Option<String>,
}

/// Why an op may append, checked by the sequencer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Claim {
    /// The emitter's mark is at `from` and its owner is this session: the mark goes to `upto`.
    Turn {
        /// Its name.
        emitter: Arc<str>,
        /// The session, unique among all hubs.
        session: String,
        /// The mark before.
        from: u64,
        /// The mark after.
        upto: u64,
    },
    /// The session owns the emitter from now on, and asks for its mark.
    Hello {
        /// Its name.
        emitter: Arc<str>,
        /// The session, unique among all hubs.
        session: String,
        /// The emitter's epoch; another one than before sets its mark to 0.
        epoch: String,
        /// The mark is at least here.
        floor: u64,
    },
    /// No claim is needed.
    Plain,
    /// This hub is the one that takes in what others publish.
    Intake,
}

/// A claim, and the records that it is for.
#[derive(Clone, Debug)]
pub struct Entry {
    /// The claim.
    pub claim: Claim,
    /// How many records.
    pub count: u64,
    /// The records, see [`block`].
    pub records: Bytes,
}

/// What a hub appends at once. Appending the same number again gives the same answer and appends nothing.
#[derive(Clone, Debug)]
pub struct Batch {
    /// Counts the batches of a hub, from 1.
    pub number: u64,
    /// If the stream lies behind this, or is gone, it begins anew.
    pub known: Known,
    /// The epoch that it gets then.
    pub fresh: String,
    /// In order.
    pub entries: Vec<Entry>,
}

/// What became of an [`Entry`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judged {
    /// Its records are in the stream.
    Kept,
    /// Its claim does not hold: nothing of it is.
    Refused,
    /// The mark of the emitter that said hello, and the session that had it before.
    Greeted {
        /// Everything up to here is in the stream.
        have: u64,
        /// The session that owned it; empty if none did.
        before: String,
    },
}

/// What became of a [`Batch`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Appended {
    /// The epoch of the stream.
    pub epoch: String,
    /// Offset of the first record kept; if none was, of the next one.
    pub first: u64,
    /// How many records were kept.
    pub count: u64,
    /// How many hubs the live message was sent to.
    pub receivers: u64,
    /// One for each entry.
    pub judged: Vec<Judged>,
}

/// A stretch of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Offset of its first record.
    pub first: u64,
    /// How many records.
    pub count: u64,
    /// The records, see [`block`].
    pub records: Bytes,
}

impl Stretch {
    /// Offset of its last record.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.first + self.count - 1
    }

    /// Whether there can be such a block: what claims more records than it has room for must not be believed.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        let room = (self.records.len() / block::HEAD) as u64;
        self.first > 0 && (1..=room).contains(&self.count) && self.first.checked_add(self.count).is_some()
    }
}

/// Blocks of the stream, oldest first; the first one may begin before what was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filled {
    /// Where the stream stood when they were read.
    pub place: Place,
    /// The blocks.
    pub blocks: Vec<Stretch>,
}

/// What a hub hears without asking.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Records were appended.
    Block {
        /// In this epoch.
        epoch: String,
        /// By the hub of this name, in its batch of this number.
        by: (String, u64),
        /// The records.
        block: Stretch,
    },
    /// More was appended than is sent around: it is in the stream.
    Head {
        /// In this epoch.
        epoch: String,
        /// Up to this offset.
        head: u64,
        /// By the hub of this name, in its batch of this number, if that is known.
        by: Option<(String, u64)>,
    },
    /// The hub's own probe.
    Probe {
        /// Its number.
        number: u64,
        /// Where the stream stood.
        place: Place,
    },
    /// Somebody published an event without a sequencer.
    Plain(Bytes),
    /// Nobody takes those in any more: the next hub that probes does.
    Free,
}

/// A bus to which links can be made.
pub trait Bus: Send + Sync + 'static {
    /// Its links.
    type Link: Link;

    /// Makes a link for the hub of this name, which hears from now on.
    fn connect(&self, hub: &str) -> impl Future<Output = Result<(Self::Link, Hearing)>> + Send;
}

/// A link to a bus. What fails is tried again over another one, with the same batch.
pub trait Link: Clone + Send + Sync + 'static {
    /// Tells where the stream is, and founds one where there is none, or where it lost what this hub knows; `fresh` is
    /// its epoch then.
    fn join(&self, known: &Known, fresh: &str) -> impl Future<Output = Result<Place>> + Send;

    /// Judges, numbers and keeps a batch, and sends it to all hubs, as one step. [`ErrorKind::BusRefused`] if the bus is
    /// there and does not keep it: the link is good, and the batch may be tried again over it.
    ///
    /// [`ErrorKind::BusRefused`]: crate::error::ErrorKind::BusRefused
    fn append(&self, batch: &Batch) -> impl Future<Output = Result<Appended>> + Send;

    /// Reads at most so many blocks, from the one that has this offset, or else the next, on.
    fn fill(&self, from: u64, most: usize) -> impl Future<Output = Result<Filled>> + Send;

    /// Sends a probe through the live messages. It tries to write, too.
    fn probe(&self, number: u64) -> impl Future<Output = Result<Place>> + Send;

    /// Gives back what only one hub can have, and tells the others.
    fn leave(&self) -> impl Future<Output = Result<()>> + Send;
}

/// A hub's end of its bridge.
pub(super) struct Bridge {
    ops: mpsc::UnboundedSender<Op>,
    pub(super) status: Arc<Status>,
}

impl Bridge {
    /// Gives the op back if the bridge is closed.
    pub(super) fn send(&self, op: Op) -> std::result::Result<(), Box<Op>> {
        self.ops.send(op).map_err(|closed| Box::new(closed.0))
    }
}
