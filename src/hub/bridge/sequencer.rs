//! What a bus decides, as a value: the reference for the script that runs in Redis. Pure.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use bytes::BytesMut;

use super::{Appended, Batch, Claim, Filled, Judged, Known, Place, Stretch};

/// How long a hub takes in what others publish after its last probe, in probe intervals: when it is gone, another one
/// follows.
pub const LEASE_PROBES: u32 = 3;

/// How many lives of the bus are remembered.
const LIVES: usize = 32;

#[derive(Clone, Debug)]
struct Mark {
    session: String,
    epoch: String,
    have: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Sequencer {
    epoch: String,
    head: u64,
    /// Who leads the bus.
    run: String,
    /// The last lives of the bus, and where its stream stood when each began: a copy that takes over may lack what came
    /// last. They are numbered, because who led before may lead again.
    lives: VecDeque<(String, u64)>,
    life: u64,
    blocks: VecDeque<Stretch>,
    keep: u64,
    marks: HashMap<String, Mark>,
    /// Last batch of each hub, and what became of it.
    answers: HashMap<String, (u64, Appended)>,
    lease: Option<(String, Duration)>,
}

impl Sequencer {
    /// An empty stream, which will keep the last `keep` records at least.
    #[must_use]
    pub fn new(keep: u64) -> Self {
        Self { keep, ..Self::default() }
    }

    /// Where the stream is.
    #[must_use]
    pub fn place(&self) -> Place {
        Place { epoch: self.epoch.clone(), head: self.head, ..Place::default() }
    }

    /// A hub joins in this life of the bus.
    pub fn join(&mut self, run: &str, known: &Known, fresh: &str) -> Place {
        if self.epoch.is_empty() {
            self.found(fresh);
        }
        if self.run != run {
            run.clone_into(&mut self.run);
            self.life += 1;
            self.lives.push_back((format!("{run}/{}", self.life), self.head));
            if self.lives.len() > LIVES {
                self.lives.pop_front();
            }
        }
        if self.epoch == known.epoch && self.shared(&known.run) < known.head {
            self.found(fresh);
        }
        let here = self.lives.back().map(|(life, _)| life.clone()).unwrap_or_default();
        Place { run: here, ..self.place() }
    }

    /// How far this stream is the same as it was in a life: to the lowest head at which one began since. Of a life that it
    /// does not know nothing can be said.
    fn shared(&self, life: &str) -> u64 {
        let since = self.lives.iter().position(|(known, _)| known == life);
        since.map_or(0, |since| self.lives.iter().skip(since + 1).map(|(_, began)| *began).fold(self.head, u64::min))
    }

    /// Judges, numbers and keeps a batch; the block is to be sent to all hubs, which are so many.
    pub fn append(&mut self, hub: &str, batch: &Batch, hubs: u64) -> (Appended, Option<Stretch>) {
        match self.answers.get(hub) {
            Some((number, answer)) if *number == batch.number => return (answer.clone(), None),
            // It was given up, and is late.
            Some((number, _)) if *number > batch.number => {
                let judged = vec![Judged::Refused; batch.entries.len()];
                let (epoch, first) = (self.epoch.clone(), self.head + 1);
                return (Appended { epoch, first, count: 0, receivers: 0, judged }, None);
            }
            _ => {}
        }
        let lost = self.epoch == batch.known.epoch && self.head < batch.known.head;
        if self.epoch.is_empty() || lost {
            self.found(&batch.fresh);
        }
        let judged: Vec<_> = batch.entries.iter().map(|entry| self.judge(hub, &entry.claim)).collect();
        let kept = || batch.entries.iter().zip(&judged).filter(|(_, judged)| **judged != Judged::Refused);
        let count = kept().map(|(entry, _)| entry.count).sum();
        let first = self.head + 1;
        let block = (count > 0).then(|| {
            let mut records = BytesMut::new();
            kept().for_each(|(entry, _)| records.extend_from_slice(&entry.records));
            Stretch { first, count, records: records.freeze() }
        });
        if let Some(block) = &block {
            self.head += count;
            self.blocks.push_back(block.clone());
            let from = (self.head + 1).saturating_sub(self.keep);
            while self.blocks.front().is_some_and(|block| block.first + block.count <= from) {
                self.blocks.pop_front();
            }
        }
        let receivers = if count > 0 { hubs } else { 0 };
        let appended = Appended { epoch: self.epoch.clone(), first, count, receivers, judged };
        self.answers.insert(hub.to_owned(), (batch.number, appended.clone()));
        (appended, block)
    }

    /// Blocks from the one that has this offset, or else the next, on.
    #[must_use]
    pub fn fill(&self, from: u64, most: usize) -> Filled {
        let skip = self.blocks.partition_point(|block| block.first + block.count <= from);
        Filled { place: self.place(), blocks: self.blocks.iter().skip(skip).take(most).cloned().collect() }
    }

    /// A hub probes: tells where the stream is, and whether it takes in what others publish.
    pub fn probe(&mut self, hub: &str, now: Duration, lease: Duration) -> Place {
        let free = self.lease.as_ref().is_none_or(|(holder, until)| holder == hub || *until <= now);
        if free {
            self.lease = Some((hub.to_owned(), now + lease));
        }
        Place { intake: free, ..self.place() }
    }

    /// A hub leaves; returns whether it took in what others publish.
    pub fn leave(&mut self, hub: &str) -> bool {
        self.lease.take_if(|(holder, _)| holder == hub).is_some()
    }

    /// Forgets everything, as somebody does who empties a Redis.
    pub fn flush(&mut self) {
        *self = Self::new(self.keep);
    }

    /// Loses the blocks before this offset.
    pub fn trim(&mut self, first: u64) {
        self.blocks.retain(|block| block.first >= first);
    }

    /// Goes on as a copy that did not get the last blocks.
    pub fn fall_back(&mut self, lost: usize) {
        for _ in 0..lost {
            if let Some(block) = self.blocks.pop_back() {
                self.head = block.first - 1;
            }
        }
        self.answers.clear();
    }

    fn found(&mut self, fresh: &str) {
        fresh.clone_into(&mut self.epoch);
        self.head = 0;
        self.blocks.clear();
    }

    fn judge(&mut self, hub: &str, claim: &Claim) -> Judged {
        match claim {
            Claim::Plain => Judged::Kept,
            Claim::Intake if self.lease.as_ref().is_some_and(|(holder, _)| holder == hub) => Judged::Kept,
            Claim::Intake => Judged::Refused,
            Claim::Turn { emitter, session, from, upto } => {
                let holds = |mark: &&mut Mark| mark.session == *session && mark.have == *from;
                match self.marks.get_mut(&**emitter).filter(holds) {
                    Some(mark) => {
                        mark.have = *upto;
                        Judged::Kept
                    }
                    None => Judged::Refused,
                }
            }
            Claim::Hello { emitter, session, epoch, floor } => {
                let before = self.marks.remove(&**emitter);
                let have = before.as_ref().filter(|mark| mark.epoch == *epoch).map_or(0, |mark| mark.have).max(*floor);
                let mark = Mark { session: session.clone(), epoch: epoch.clone(), have };
                self.marks.insert(emitter.to_string(), mark);
                Judged::Greeted { have, before: before.map(|mark| mark.session).unwrap_or_default() }
            }
        }
    }
}
