//! What a bus decides, as a value: the reference for the script that runs in Redis. Pure.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use bytes::BytesMut;

use super::{Appended, Batch, Claim, Filled, Judged, Known, Place, Stretch};

/// How long a hub takes in what others publish after its last probe, in probe intervals: when it is gone, another one
/// follows.
pub const LEASE_PROBES: u32 = 3;

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
    /// Which life of the bus this is, and where its stream stood when it began: a bus that fell back to a copy of itself
    /// may have lost what came last.
    run: String,
    base: u64,
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
        Place { epoch: self.epoch.clone(), head: self.head, run: self.run.clone(), intake: false }
    }

    /// A hub joins in this life of the bus.
    pub fn join(&mut self, run: &str, known: &Known, fresh: &str) -> Place {
        if self.epoch.is_empty() {
            self.found(fresh);
        }
        if self.run != run {
            run.clone_into(&mut self.run);
            self.base = self.head;
        }
        let sound = if known.run == run { self.head } else { self.base };
        if self.epoch == known.epoch && sound < known.head {
            self.found(fresh);
        }
        self.place()
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
        (self.head, self.base) = (0, 0);
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
