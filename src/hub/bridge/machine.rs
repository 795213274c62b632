//! What a hub does about its bus: when it connects, what it appends to its log and in which order, when it asks for what
//! it missed, and when it believes that it is deaf. Pure: time is an argument, and what is to be done comes out as
//! [`Action`]s.
//!
//! Blocks come from everywhere: live messages, the stream, and the hub's own batches. The machine takes each offset once,
//! in order, from whoever has it first. So nothing depends on live messages but speed.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use fastrand::Rng;

pub use super::action::{Action, Body};
pub use super::status::Counts;
use super::trouble::Trouble;
use super::{Filled, Known, Message, Place};
use crate::backoff::Backoff;
use crate::breaker::Breaker;

/// How many bytes may wait behind a gap; what comes beyond is read from the stream when it is its turn.
const WAITING_BYTES: usize = 16 << 20;
/// What a block that waits costs beside its records.
const BLOCK_BYTES: usize = 128;
/// About how many bytes one read of the stream is to bring.
const FILL_BYTES: usize = 2 << 20;
/// Most blocks in one read, and how many in the first.
const FILL_MOST: usize = 4096;
const FILL_FIRST: usize = 64;
/// First pause between attempts to reach the bus.
const BACKOFF_INITIAL: Duration = Duration::from_millis(100);

/// How it is set.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// How often a probe is sent.
    pub probe_interval: Duration,
    /// How long the bus may be away before ops are refused.
    pub bus_timeout: Duration,
    /// Attempts in vain after which the breaker opens.
    pub attempts: u32,
    /// Pause of the attempts while it is open.
    pub cooldown: Duration,
    /// How many records are read back from a stream that is new to this hub.
    pub keep: u64,
}

#[derive(Debug)]
enum Phase {
    /// No link; the next attempt is at this time.
    Down { at: Duration },
    /// An attempt is under way.
    Connecting,
    /// There is a link, but no probe has come back over it yet.
    Proving,
    /// It works.
    Up,
}

/// See the module.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own, and any may meet any other")]
pub struct Machine {
    settings: Settings,
    rng: Rng,
    backoff: Backoff,
    breaker: Breaker,
    phase: Phase,
    trouble: Trouble,
    epoch: String,
    run: String,
    /// The offset that the log takes next.
    next: u64,
    /// The highest offset that is known to exist.
    heard: u64,
    waiting: BTreeMap<u64, (u64, Body)>,
    waiting_bytes: usize,
    /// The stream is being read from the first of these offsets on, and had the second at least when it was asked.
    filling: Option<(u64, u64)>,
    fill_most: usize,
    joining: bool,
    /// The log holds something else, until the bus can be used again.
    left: bool,
    probes: u64,
    /// How many came back over this link.
    proven: u32,
    /// The probe that has not come back, and what the stream had at least when it was sent.
    probe: Option<(u64, u64)>,
    next_probe: Duration,
    /// It was due when the next one was.
    overdue: bool,
    intake: bool,
    actions: VecDeque<Action>,
    counts: Counts,
}

impl Machine {
    /// A machine that has joined nothing yet and connects at once. The seed is for the jitter of its pauses.
    #[must_use]
    pub fn new(settings: Settings, seed: u64) -> Self {
        Self {
            settings,
            rng: Rng::with_seed(seed),
            backoff: Backoff::new(BACKOFF_INITIAL.min(settings.cooldown), settings.cooldown, 2.0, 0.5),
            breaker: Breaker::new(settings.attempts, settings.cooldown),
            phase: Phase::Down { at: Duration::ZERO },
            trouble: Trouble::default(),
            epoch: String::new(),
            run: String::new(),
            next: 1,
            heard: 0,
            waiting: BTreeMap::new(),
            waiting_bytes: 0,
            filling: None,
            fill_most: FILL_FIRST,
            joining: false,
            left: false,
            probes: 0,
            proven: 0,
            probe: None,
            next_probe: Duration::ZERO,
            overdue: false,
            intake: false,
            actions: VecDeque::new(),
            counts: Counts::default(),
        }
    }

    /// The next thing to do.
    pub fn next_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// What this hub knows of the stream.
    #[must_use]
    pub fn known(&self) -> Known {
        Known { epoch: self.epoch.clone(), head: self.heard, run: self.run.clone() }
    }

    /// The highest offset that is known to exist, in the epoch of the log; 0 while that is another one's.
    #[must_use]
    pub fn head(&self) -> u64 {
        if self.left { 0 } else { self.heard }
    }

    /// The epoch that the log is in.
    #[must_use]
    pub fn epoch(&self) -> &str {
        &self.epoch
    }

    /// Whether everything that is known to exist was handed out.
    #[must_use]
    pub fn is_current(&self) -> bool {
        self.next > self.heard
    }

    /// Whether an offset was handed out, or is of no interest any more because the epoch is another one.
    #[must_use]
    pub fn has(&self, epoch: &str, offset: u64) -> bool {
        epoch != self.epoch || offset < self.next
    }

    /// Whether the bus works.
    #[must_use]
    pub fn is_up(&self) -> bool {
        matches!(self.phase, Phase::Up)
    }

    /// Whether a batch may be sent.
    #[must_use]
    pub fn may_append(&self) -> bool {
        self.is_up() && !self.joining && !self.left && !self.trouble.refuses()
    }

    /// Whether the bus cannot be used, and for so long that nothing waits for it any more.
    #[must_use]
    pub fn has_given_up(&self, now: Duration) -> bool {
        self.trouble.lasts(now, self.settings.bus_timeout)
    }

    /// Whether the log may hold something else: not while a link is about to prove itself, or has.
    #[must_use]
    pub fn may_leave(&self) -> bool {
        self.left || !self.is_linked() || self.trouble.refuses()
    }

    /// What is the matter with the bus, if something is.
    #[must_use]
    pub fn trouble(&self) -> Option<&str> {
        self.trouble.why()
    }

    /// Whether the bus answers, and does not keep what it is given.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.trouble.refuses()
    }

    /// Whether this hub takes in what others publish without a sequencer.
    #[must_use]
    pub fn takes_in(&self) -> bool {
        self.intake && self.is_up()
    }

    /// State of the breaker.
    #[must_use]
    pub fn circuit(&self) -> &'static str {
        self.breaker.name()
    }

    /// What happened so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// When [`Machine::tick`] is to be called at the latest.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        let next = match self.phase {
            Phase::Down { at } => Some(at),
            Phase::Connecting => None,
            Phase::Proving | Phase::Up => Some(self.next_probe),
        };
        next.into_iter().chain(self.trouble.due(self.settings.probe_interval)).min()
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Duration) {
        if self.trouble.due(self.settings.probe_interval).is_some_and(|due| now >= due) {
            self.tell(); // an attempt to connect may hang for long
        }
        match self.phase {
            Phase::Down { at } if now >= at => {
                if let Some(until) = self.breaker.forbids(now) {
                    self.phase = Phase::Down { at: until };
                } else {
                    self.phase = Phase::Connecting;
                    self.actions.push_back(Action::Connect);
                }
            }
            Phase::Proving | Phase::Up if now >= self.next_probe => {
                if self.probe.is_some() && !self.overdue {
                    // Perhaps this hub was late, and it has come meanwhile.
                    self.overdue = true;
                    self.next_probe = now + self.settings.probe_interval / 4;
                } else if self.probe.is_some() {
                    self.counts.deaf += 1;
                    self.fail(now, "a probe sent to the bus did not come back: the connection is deaf", true);
                } else {
                    self.send_probe(now);
                }
            }
            _ => {}
        }
    }

    /// The log goes on without the bus: when that can be used again it begins anew, with what the stream has.
    pub fn leave(&mut self) {
        self.left = true;
        self.waiting.clear();
        self.waiting_bytes = 0;
    }

    /// A link was made, and has joined.
    pub fn connected(&mut self, now: Duration, place: &Place) {
        self.phase = Phase::Proving;
        self.proven = 0;
        if !self.left {
            self.joined(place); // otherwise when the link has proven itself: whoever is here comes back only once
        }
        self.send_probe(now);
    }

    /// The bus does not keep what it is given, and is there.
    pub fn refused(&mut self, now: Duration, why: &str) {
        if self.trouble.refuse(now, why) {
            self.tell();
        }
    }

    /// A batch was kept.
    pub fn kept(&mut self) {
        if self.trouble.kept() {
            self.recovered();
        }
    }

    /// The stream is here.
    pub fn joined(&mut self, place: &Place) {
        self.joining = false;
        self.run.clone_from(&place.run);
        if std::mem::take(&mut self.left) || place.epoch != self.epoch {
            self.counts.restarts += u64::from(!self.epoch.is_empty());
            self.epoch.clone_from(&place.epoch);
            self.waiting.clear();
            (self.waiting_bytes, self.heard, self.filling) = (0, 0, None);
            self.begin(place.head.saturating_sub(self.settings.keep));
        }
        self.hear(place.head);
    }

    /// An attempt failed, or a link or anything asked over it.
    pub fn lost(&mut self, now: Duration, why: &str) {
        if !matches!(self.phase, Phase::Down { .. }) {
            self.fail(now, why, false);
        }
    }

    /// Something was heard.
    pub fn heard(&mut self, now: Duration, message: Message) {
        if !self.is_linked() {
            return; // of a link that was given up: the bus may have gone on without it
        }
        match message {
            Message::Block { epoch, block, .. } => {
                self.offer(&epoch, block.first, block.count, Body::Encoded(block.records));
            }
            Message::Head { epoch, head, .. } => self.hear_of(&epoch, head),
            Message::Probe { number, place } => self.probed(now, number, &place),
            Message::Free => {
                if self.is_up() && self.probe.is_none() {
                    self.send_probe(now);
                }
            }
            Message::Plain(_) => {} // the driver's
        }
    }

    fn probed(&mut self, now: Duration, number: u64, place: &Place) {
        // One of an earlier link does not count.
        let Some((_, known)) = self.probe.take_if(|(sent, _)| *sent == number) else { return };
        self.intake = place.intake;
        self.proven = self.proven.saturating_add(1);
        self.counts.probes += 1;
        self.phase = Phase::Up;
        self.breaker.confirmed();
        if self.has_lasted() {
            self.backoff.reset();
        }
        match &place.refuses {
            Some(why) => self.refused(now, why),
            None if self.trouble.probed() => self.recovered(),
            None => {}
        }
        if place.epoch == self.epoch && place.head < known {
            return self.rejoin(); // it fell back
        }
        self.hear_of(&place.epoch, place.head);
    }

    /// The bus can be used.
    fn recovered(&mut self) {
        if self.trouble.end() {
            self.actions.push_back(Action::Tell(None));
        }
        if self.left {
            self.rejoin();
        }
    }

    /// The bus keeps records at these offsets.
    pub fn offer(&mut self, epoch: &str, first: u64, count: u64, body: Body) {
        if self.left {
            return;
        }
        if epoch != self.epoch {
            return self.rejoin();
        }
        self.insert(first, count, body);
        self.look_for_gap();
    }

    fn insert(&mut self, first: u64, count: u64, body: Body) {
        self.heard = self.heard.max((first + count).saturating_sub(1));
        if first <= self.next {
            self.take(first, count, body);
            while let Some(entry) = self.waiting.first_entry()
                && *entry.key() <= self.next
            {
                let (first, (count, body)) = entry.remove_entry();
                self.waiting_bytes -= BLOCK_BYTES + body.bytes();
                self.take(first, count, body);
            }
        } else if self.waiting_bytes + body.bytes() <= WAITING_BYTES && !self.waiting.contains_key(&first) {
            self.waiting_bytes += BLOCK_BYTES + body.bytes();
            self.waiting.insert(first, (count, body));
        }
    }

    /// The stream was read from this offset on.
    pub fn filled(&mut self, from: u64, filled: Filled) {
        // What was asked for in another epoch, from another place, says nothing about this one.
        let Some((_, asked)) = self.filling.take_if(|(asked_from, _)| *asked_from == from) else { return };
        if self.left {
            return;
        }
        if filled.place.epoch != self.epoch || filled.place.head < asked {
            return self.rejoin(); // another stream, or one that fell back
        }
        let bytes: usize = filled.blocks.iter().map(|block| block.records.len()).sum();
        if let Some(average) = bytes.checked_div(filled.blocks.len()) {
            self.fill_most = (FILL_BYTES / average.max(1)).clamp(1, FILL_MOST);
        }
        self.heard = self.heard.max(filled.place.head);
        let first = filled.blocks.first().map_or(filled.place.head + 1, |block| block.first);
        if first > self.next && self.next <= filled.place.head {
            // What is between is gone from the stream: nobody can have it any more.
            self.counts.restarts += 1;
            self.begin(first - 1);
        }
        for block in filled.blocks {
            self.insert(block.first, block.count, Body::Encoded(block.records));
        }
        self.look_for_gap();
    }

    fn take(&mut self, first: u64, count: u64, body: Body) {
        let skip = self.next - first;
        if skip < count {
            self.next = first + count;
            self.actions.push_back(Action::Append { count, skip, body });
        }
    }

    fn begin(&mut self, head: u64) {
        self.next = head + 1;
        self.actions.push_back(Action::Begin { epoch: self.epoch.clone(), head });
    }

    fn hear_of(&mut self, epoch: &str, head: u64) {
        if self.left {
            return;
        }
        if epoch == self.epoch { self.hear(head) } else { self.rejoin() }
    }

    fn hear(&mut self, head: u64) {
        self.heard = self.heard.max(head);
        self.look_for_gap();
    }

    /// Whether the link is worth another one at once. One that breaks whenever it is used is not, or it would be made
    /// anew a thousand times a second.
    fn has_lasted(&self) -> bool {
        self.proven >= 2
    }

    fn is_linked(&self) -> bool {
        matches!(self.phase, Phase::Proving | Phase::Up)
    }

    fn look_for_gap(&mut self) {
        if self.next <= self.heard && self.filling.is_none() && !self.joining && self.is_linked() {
            self.filling = Some((self.next, self.heard));
            self.counts.fills += 1;
            self.actions.push_back(Action::Fill { from: self.next, most: self.fill_most });
        }
    }

    /// Another epoch was heard of: the bus is asked, not the message.
    fn rejoin(&mut self) {
        if !self.joining && self.is_linked() {
            self.joining = true;
            self.actions.push_back(Action::Join);
        }
    }

    /// Sends a probe now.
    pub fn send_probe(&mut self, now: Duration) {
        self.probes += 1;
        self.overdue = false;
        self.probe = Some((self.probes, if self.left { 0 } else { self.heard }));
        self.next_probe = now + self.settings.probe_interval;
        self.actions.push_back(Action::Probe(self.probes));
    }

    fn fail(&mut self, now: Duration, why: &str, tell: bool) {
        let worked = self.is_up() && self.has_lasted();
        self.actions.push_back(Action::Disconnect);
        (self.filling, self.joining, self.intake, self.probe) = (None, false, false, None);
        self.trouble.begin(now, why);
        let pause = if worked {
            self.counts.losses += 1;
            Duration::ZERO
        } else {
            self.counts.failures += 1;
            self.breaker.lost(now);
            self.backoff.next(&mut self.rng)
        };
        self.phase = Phase::Down { at: now + pause };
        // A link that is lost and made again at once is no news.
        if tell || !worked {
            self.tell();
        }
    }

    fn tell(&mut self) {
        self.actions.push_back(Action::Tell(Some(self.trouble.tell())));
    }
}
