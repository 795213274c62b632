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
        let inside =
            Inside { sequencer: Sequencer::new(KEEP), hearers: Vec::new(), life: 1, up: true, lose_answers: 0 };
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
        self.with(|inside, _| {
            let (appended, block) = inside.sequencer.append(&self.hub, batch, inside.hearers.len() as u64);
            if let Some(block) = block {
                let epoch = appended.epoch.clone();
                inside.tell(&if block.records.len() > LARGEST_BLOCK {
                    Message::Head { epoch, head: block.last() }
                } else {
                    Message::Block { epoch, by: (self.hub.to_string(), batch.number), block }
                });
            }
            if inside.lose_answers == 0 {
                return Ok(appended);
            }
            inside.lose_answers -= 1;
            Err(away())
        })?
    }

    async fn fill(&self, from: u64, most: usize) -> Result<Filled> {
        self.with(|inside, _| inside.sequencer.fill(from, most))
    }

    async fn probe(&self, number: u64) -> Result<Place> {
        self.with(|inside, now| {
            let place = inside.sequencer.probe(&self.hub, now, LEASE);
            let message = Message::Probe { number, place: place.clone() };
            inside
                .hearers
                .retain(|hearer| hearer.hub != *self.hub || hearer.deaf || hearer.speaker.say(message.clone()));
            place
        })
    }
}

fn away() -> Error {
    Error::new(ErrorKind::BusDown, "the bus within the process is stopped")
}
