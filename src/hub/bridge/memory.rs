//! A bus within the process, for hubs that share it: the reference for what a bus promises, and what tests break on
//! purpose.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::hearing::{self, Hearing, Speaker};
use super::sequencer::Sequencer;
use super::{Appended, Batch, Bus, Filled, Known, Link, Message, Place};
use crate::error::{Error, ErrorKind, Result};

/// Blocks above this size are not sent around, as on a real bus.
const LARGEST_BLOCK: usize = 256 << 10;
/// How many records the stream keeps.
const KEEP: u64 = 10_000;
/// How long one hub takes in plain events after its last probe.
const LEASE: Duration = Duration::from_secs(6);

/// See the module. Cloning shares the bus.
#[derive(Clone)]
pub struct MemoryBus {
    inside: Arc<Mutex<Inside>>,
    started: Instant,
}

struct Inside {
    sequencer: Sequencer,
    hearers: Vec<Hearer>,
    /// Counts the lives of the bus; a link belongs to one.
    life: u64,
    up: bool,
    /// How many answers to batches will be lost on their way back.
    lose_answers: usize,
    /// It answers, and keeps nothing.
    full: bool,
    /// It holds back the answers to batches, and to reads of the stream.
    holds: [bool; 2],
    /// The next attempts to connect panic.
    explode: usize,
}

struct Hearer {
    hub: String,
    speaker: Speaker,
    deaf: bool,
}

impl fmt::Debug for MemoryBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MemoryBus")
    }
}

impl Default for MemoryBus {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryBus {
    /// An empty bus.
    #[must_use]
    pub fn new() -> Self {
        let inside = Inside {
            sequencer: Sequencer::new(KEEP),
            hearers: Vec::new(),
            life: 1,
            up: true,
            lose_answers: 0,
            full: false,
            holds: [false; 2],
            explode: 0,
        };
        Self { inside: Arc::new(Mutex::new(inside)), started: Instant::now() }
    }

    /// Nobody reaches it any more, until [`MemoryBus::start`].
    pub fn stop(&self) {
        let mut inside = self.inside.lock();
        inside.up = false;
        inside.life += 1;
        inside.hearers.clear();
    }

    /// It is there again, with all that it had.
    pub fn start(&self) {
        self.inside.lock().up = true;
    }

    /// Forgets everything; links stay.
    pub fn flush(&self) {
        self.inside.lock().sequencer.flush();
    }

    /// Cuts what the hubs hear; they notice.
    pub fn sever(&self) {
        self.inside.lock().hearers.clear();
    }

    /// Those who hear now hear nothing any more, and nothing tells them.
    pub fn deafen(&self) {
        self.inside.lock().hearers.iter_mut().for_each(|hearer| hearer.deaf = true);
    }

    /// Does the next batches and loses the answers.
    pub fn lose_answers(&self, next: usize) {
        self.inside.lock().lose_answers = next;
    }

    /// Takes nothing any more, and answers, until it has room again.
    pub fn fill_up(&self, full: bool) {
        self.inside.lock().full = full;
    }

    /// Does what it is told, and holds the answers to batches back until it lets them go.
    pub fn hold_answers(&self, holds: bool) {
        self.inside.lock().holds[0] = holds;
    }

    /// Holds what is read of the stream back until it lets it go.
    pub fn hold_reads(&self, holds: bool) {
        self.inside.lock().holds[1] = holds;
    }

    async fn held(&self, which: usize) {
        while self.inside.lock().holds[which] {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The next attempts to connect panic.
    pub fn explode(&self, attempts: usize) {
        self.inside.lock().explode = attempts;
    }

    /// Goes on as a copy of itself without the last blocks.
    pub fn fall_back(&self, lost: usize) {
        self.stop();
        self.inside.lock().sequencer.fall_back(lost);
        self.start();
    }

    /// Loses what the stream has before this offset.
    pub fn trim(&self, first: u64) {
        self.inside.lock().sequencer.trim(first);
    }

    /// Publishes without a sequencer.
    pub fn publish_plain(&self, json: &'static str) {
        self.inside.lock().tell(&Message::Plain(json.as_bytes().into()));
    }

    /// How many hubs hear.
    #[must_use]
    pub fn hearers(&self) -> usize {
        self.inside.lock().hearers.len()
    }
}

impl Inside {
    fn tell(&mut self, message: &Message) {
        self.hearers.retain(|hearer| hearer.deaf || hearer.speaker.say(message.clone()));
    }
}

impl Bus for MemoryBus {
    type Link = MemoryLink;

    async fn connect(&self, hub: &str) -> Result<(MemoryLink, Hearing)> {
        let mut inside = self.inside.lock();
        if inside.explode > 0 {
            inside.explode -= 1;
            drop(inside);
            panic!("as a test has ordered");
        }
        if !inside.up {
            return Err(away());
        }
        let (speaker, hearing) = hearing::channel();
        inside.hearers.push(Hearer { hub: hub.to_owned(), speaker, deaf: false });
        Ok((MemoryLink { bus: self.clone(), hub: hub.into(), life: inside.life }, hearing))
    }
}

/// A link to a [`MemoryBus`].
#[derive(Clone, Debug)]
pub struct MemoryLink {
    bus: MemoryBus,
    hub: Arc<str>,
    life: u64,
}

impl MemoryLink {
    fn with<R>(&self, act: impl FnOnce(&mut Inside, Duration) -> R) -> Result<R> {
        let mut inside = self.bus.inside.lock();
        if inside.up && inside.life == self.life {
            return Ok(act(&mut inside, self.bus.started.elapsed()));
        }
        Err(away())
    }
}

impl Link for MemoryLink {
    async fn join(&self, known: &Known, fresh: &str) -> Result<Place> {
        let run = self.life.to_string();
        self.with(|inside, _| inside.sequencer.join(&run, known, fresh))
    }

    async fn append(&self, batch: &Batch) -> Result<Appended> {
        let appended = self.with(|inside, _| {
            if inside.full {
                return Err(Error::new(ErrorKind::BusRefused, FULL));
            }
            let (appended, block) = inside.sequencer.append(&self.hub, batch, inside.hearers.len() as u64);
            if let Some(block) = block {
                let epoch = appended.epoch.clone();
                inside.tell(&if block.records.len() > LARGEST_BLOCK {
                    Message::Head { epoch, head: block.last(), by: Some((self.hub.to_string(), batch.number)) }
                } else {
                    Message::Block { epoch, by: (self.hub.to_string(), batch.number), block }
                });
            }
            if inside.lose_answers == 0 {
                return Ok(appended);
            }
            inside.lose_answers -= 1;
            Err(away())
        })??;
        self.bus.held(0).await;
        Ok(appended)
    }

    async fn fill(&self, from: u64, most: usize) -> Result<Filled> {
        let filled = self.with(|inside, _| inside.sequencer.fill(from, most));
        self.bus.held(1).await;
        filled
    }

    async fn probe(&self, number: u64) -> Result<Place> {
        self.with(|inside, now| {
            let refuses = inside.full.then(|| FULL.to_owned());
            let place = Place { refuses, ..inside.sequencer.probe(&self.hub, now, LEASE) };
            let message = Message::Probe { number, place: place.clone() };
            inside
                .hearers
                .retain(|hearer| hearer.hub != *self.hub || hearer.deaf || hearer.speaker.say(message.clone()));
            place
        })
    }

    async fn leave(&self) -> Result<()> {
        self.with(|inside, _| {
            if inside.sequencer.leave(&self.hub) {
                inside.tell(&Message::Free);
            }
        })
    }
}

const FULL: &str = "the bus within the process is full";

fn away() -> Error {
    Error::new(ErrorKind::BusDown, "the bus within the process is stopped")
}
