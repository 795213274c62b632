//! An emitter's session, in two halves: frames are checked as they are read, without the shared state, and what they
//! brought is committed once for a whole batch of input, so a thousand events cost one lock and one ack.
//!
//! Such a [`Turn`] is a value of its own: without a durable log it is settled on the spot, with one it goes through the
//! log's thread first.
//!
//! The ack of a few events waits a little for more: on a small machine one frame, one write and one wake-up of the
//! emitter for each lone event would compete with bringing that event to its subscribers. An ack that waited too long
//! is a turn without records, so that it cannot overtake what is still on its way to the disk.

mod turn;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::Intake;
use crate::hub::auth::Scope;
use crate::hub::entry::Record;
use crate::hub::registry::SessionId;
use crate::hub::state::State;
use crate::wire::block::{Block, EVENT_OVERHEAD, HEADER_BYTES};
use crate::wire::frame::EmitterFrame;
use turn::{Ack, Refusal};
pub use turn::{Greeting, Turn};

/// How many events an emitter may have unacknowledged. The hub takes events as fast as it reads them and TCP holds
/// back the rest, so this only bounds what an emitter must be ready to send again.
pub const CREDIT: u64 = 1 << 17;

/// How long an ack may wait for company: half of what TCP's own acks usually wait. At 1000 lone events a second twenty
/// share one, which leaves the processor to those who carry events. What it costs is that a lost link brings a few more events twice, which are
/// dropped here. Who waits for a delivery does not pay for it, see [`EmitterFrame::AckNow`].
const ACK_DELAY: Duration = Duration::from_millis(20);
/// So many events are acknowledged at once: one ack for these costs nothing that counts.
const ACK_EVENTS: u64 = 64;
/// So many bytes are acknowledged at once: half of the smallest `outbox_bytes`, so that no window ever starves.
const ACK_BYTES: usize = 32 << 10;

const _: () = assert!(ACK_EVENTS <= CREDIT / 2, "an ack that waits must not starve the window");

/// Longest name or epoch of an emitter and longest reason of a gap, in bytes: they are kept for long.
const MAX_NAME: usize = 256;

/// What the driver does after a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Go on with the next frame of the batch, if there is one.
    More,
    /// Call [`EmitterMachine::commit`] before the next frame.
    Commit,
}

#[derive(Debug)]
enum Phase {
    /// Connected; `hello` is expected.
    Silent,
    /// `hello` came; its commit fetches the mark.
    Greeting { next: u64 },
    /// The commit of `hello` is on its way; nothing is read until it is there.
    Waiting,
    /// Events flow. `mark` is the highest seq taken, committed or not.
    Live { mark: u64 },
    /// Closed or superseded; nothing counts any more.
    Over,
}

/// What came and is not acknowledged, because more may come.
#[derive(Debug)]
struct Withheld {
    /// Events, those of gaps and duplicates among them.
    events: u64,
    bytes: usize,
    due: Duration,
}

/// The events of a block that were not taken yet.
#[derive(Debug)]
struct Rest {
    block: Block,
    seq: u64,
    /// Where it stands in the block.
    at: usize,
}

/// See the module.
#[derive(Debug)]
pub struct EmitterMachine {
    id: SessionId,
    phase: Phase,
    name: Arc<str>,
    epoch: String,
    /// Where the next turn begins.
    from: u64,
    batch: Vec<Record>,
    intake: Intake,
    /// What did not fit into the turn.
    rest: Option<Rest>,
    duplicates: u64,
    /// Events and bytes that came since the last turn and want an ack, be they only duplicates.
    came: Option<(u64, usize)>,
    withheld: Option<Withheld>,
    /// The emitter asked for its ack.
    hurried: bool,
    /// The furthest seq that this connection was ever allowed: the last ack plus the credit. It never goes back, so a
    /// frame that was sent under an older, larger credit is no violation.
    edge: u64,
    refusal: Option<Refusal>,
    /// An event was refused, and the emitter has not gone back to it yet: what it had sent behind it still comes.
    rewinding: bool,
    violation: Option<String>,
}

impl EmitterMachine {
    /// The machine of a session that was just opened.
    #[must_use]
    pub fn new(id: SessionId) -> Self {
        Self {
            id,
            phase: Phase::Silent,
            name: Arc::default(),
            epoch: String::new(),
            from: 0,
            batch: Vec::new(),
            intake: Intake::default(),
            rest: None,
            duplicates: 0,
            came: None,
            withheld: None,
            hurried: false,
            edge: 0,
            refusal: None,
            rewinding: false,
            violation: None,
        }
    }

    /// The same, taking events so.
    #[must_use]
    pub fn taking(self, intake: Intake) -> Self {
        Self { intake, ..self }
    }

    /// It may publish only this from now on; `None` is everything.
    pub fn limit_to(&mut self, publish: Option<Scope>) {
        self.intake.limit_to(publish);
    }

    /// Whether this turn has enough: commit before the next frame.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.intake.is_full()
    }

    /// Whether there is more of the last frame: call [`EmitterMachine::resume`] before the next one.
    #[must_use]
    pub fn has_rest(&self) -> bool {
        self.rest.is_some()
    }

    /// A text frame came.
    pub fn on_text(&mut self, text: &str) -> Step {
        if matches!(self.phase, Phase::Over) {
            return Step::More;
        }
        let taken = match EmitterFrame::decode(text) {
            Ok(EmitterFrame::Hello { emitter, epoch, next }) => self.on_hello(emitter, epoch, next),
            Ok(EmitterFrame::Gap { from, to, reason }) => self.on_gap(from, to, &reason),
            Ok(EmitterFrame::AckNow) => self.on_ack_now(),
            Ok(EmitterFrame::Unknown) => Ok(Step::More),
            Err(error) => Err(format!("no frame of sb.emit.v1: {error}")),
        };
        self.or_violation(taken)
    }

    /// A binary frame came.
    pub fn on_block(&mut self, bytes: Bytes) -> Step {
        if matches!(self.phase, Phase::Over) {
            return Step::More;
        }
        let taken = Block::parse(bytes).map_err(|error| error.to_string()).and_then(|block| self.take(&block));
        self.or_violation(taken)
    }

    /// Whether anything came since the last commit, or an ack has waited long enough.
    #[must_use]
    pub fn wants_commit(&self, now: Duration) -> bool {
        let due = self.withheld.as_ref().is_some_and(|withheld| self.hurried || now >= withheld.due);
        due || self.came.is_some()
            || self.refusal.is_some()
            || self.violation.is_some()
            || matches!(self.phase, Phase::Greeting { .. })
    }

    /// When an ack that waits must be given at the latest; `None` while none does.
    #[must_use]
    pub fn deadline(&self) -> Option<Duration> {
        self.withheld.as_ref().map(|withheld| withheld.due)
    }

    /// Appends what the frames since the last commit brought, and answers.
    pub fn commit(&mut self, state: &mut State, now: Duration) {
        if state.registry.is_closing(self.id) {
            // It could not be acknowledged any more, so it will come again on another connection.
            self.phase = Phase::Over;
            self.batch = Vec::new();
            self.rest = None;
            self.intake.turn();
            (self.came, self.withheld, self.refusal, self.violation) = (None, None, None, None);
            return;
        }
        let turn = self.turn(now);
        state.presence.hear(&turn.name, &turn.records, now);
        let acknowledged = turn.acknowledges();
        let greeting = turn.greeting.as_ref();
        let have = greeting.map(|hello| state.hello(self.id, &self.name, &hello.epoch, hello.next));
        if have.is_some() {
            self.greeted(have);
        } else {
            state.emitters.advance(self.id, &self.name, turn.marks.1);
        }
        self.batch = turn.settle(have, state, now);
        if let Some(upto) = acknowledged {
            self.acknowledged(upto);
        }
    }

    /// An ack was given: so much more may come.
    pub fn acknowledged(&mut self, upto: u64) {
        self.edge = self.edge.max(upto.saturating_add(CREDIT));
    }

    /// Takes what the frames since the last turn brought. If that is a greeting, no frame may be given to the machine
    /// until [`EmitterMachine::greeted`].
    pub fn turn(&mut self, now: Duration) -> Turn {
        let (greeting, upto) = match self.phase {
            Phase::Greeting { next } => (Some(Greeting { epoch: self.epoch.clone(), next }), 0),
            Phase::Live { mark } => (None, mark),
            Phase::Silent | Phase::Waiting | Phase::Over => (None, self.from),
        };
        if greeting.is_some() {
            self.phase = Phase::Waiting;
        }
        let violation = self.violation.take();
        if violation.is_some() {
            self.phase = Phase::Over;
        }
        Turn {
            id: self.id,
            name: self.name.clone(),
            greeting,
            marks: (std::mem::replace(&mut self.from, upto), upto),
            records: {
                self.intake.turn();
                std::mem::take(&mut self.batch)
            },
            duplicates: std::mem::take(&mut self.duplicates),
            ack: self.take_ack(now, violation.is_some() || self.refusal.is_some()),
            refusal: self.refusal.take(),
            violation,
        }
    }

    /// Decides whether what came so far is acknowledged with this turn.
    fn take_ack(&mut self, now: Duration, last: bool) -> Ack {
        let came = self.came.take();
        if let Some((events, bytes)) = came {
            let withheld = self.withheld.get_or_insert(Withheld { events: 0, bytes: 0, due: now + ACK_DELAY });
            withheld.events = withheld.events.saturating_add(events);
            withheld.bytes += bytes;
        }
        let hurried = std::mem::take(&mut self.hurried) || last;
        let many = |w: &mut Withheld| w.events >= ACK_EVENTS || w.bytes >= ACK_BYTES;
        match self.withheld.take_if(|withheld| hurried || many(withheld) || now >= withheld.due) {
            Some(_) => Ack::Now,
            None if came.is_some() => Ack::Later,
            None => Ack::Nothing,
        }
    }

    /// The answer to the greeting is there: the mark, or nothing if it could not be given.
    pub fn greeted(&mut self, have: Option<u64>) {
        if let Some(mark) = have {
            self.from = mark;
            self.phase = Phase::Live { mark };
            self.acknowledged(mark);
        } else {
            self.phase = Phase::Over;
            self.rest = None;
        }
    }

    /// Name of the emitter; empty before its `hello`.
    #[must_use]
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// The connection is gone.
    pub fn end(&mut self, state: &mut State) {
        state.emitters.release(self.id, &self.name);
    }

    fn on_hello(&mut self, emitter: String, epoch: String, next: u64) -> Result<Step, String> {
        if !matches!(self.phase, Phase::Silent) {
            return Err("hello came twice".to_owned());
        }
        for (what, text) in [("emitter", &emitter), ("epoch", &epoch)] {
            if text.is_empty() || text.len() > MAX_NAME {
                return Err(format!("hello.{what} is 1 to {MAX_NAME} bytes long, not {}", text.len()));
            }
        }
        if next == 0 {
            return Err("hello.next is at least 1".to_owned());
        }
        (self.name, self.epoch) = (emitter.into(), epoch);
        self.phase = Phase::Greeting { next };
        Ok(Step::Commit)
    }

    fn on_ack_now(&mut self) -> Result<Step, String> {
        if !matches!(self.phase, Phase::Live { .. }) {
            return Err("hello comes first".to_owned());
        }
        self.hurried = self.came.is_some() || self.withheld.is_some();
        Ok(Step::More)
    }

    fn on_gap(&mut self, from: u64, to: u64, reason: &str) -> Result<Step, String> {
        if from == 0 || from > to {
            return Err(format!("gap from {from} to {to} is empty"));
        }
        if reason.len() > MAX_NAME {
            return Err(format!("gap.reason is at most {MAX_NAME} bytes long, not {}", reason.len()));
        }
        let Some(mark) = self.reach("gap", from)? else { return Ok(Step::More) };
        self.check_edge(from)?;
        self.note((to - from).saturating_add(1), 0);
        if to > mark {
            self.batch.push(Record::gap(&self.name, &self.epoch, from.max(mark + 1), to, reason));
            self.phase = Phase::Live { mark: to };
        }
        Ok(Step::More)
    }

    fn take(&mut self, block: &Block) -> Result<Step, String> {
        let Some(mark) = self.reach("block", block.first())? else { return Ok(Step::More) };
        self.check_edge(block.last())?;
        // What remains of an overlapping block is a copy: a few new events must not keep the memory of many old ones.
        let news = block.after(mark);
        let known = block.count() - news.as_ref().map_or(0, Block::count);
        self.duplicates += known;
        self.note(known, 0);
        self.rest = news.map(|block| Rest { seq: block.first(), at: HEADER_BYTES, block });
        Ok(self.resume())
    }

    /// Takes more of the last frame, as much as the turn may have.
    pub fn resume(&mut self) -> Step {
        while !self.intake.is_full()
            && let Some(rest) = &mut self.rest
        {
            let Some((json, next)) = rest.block.event_at(rest.at) else {
                self.rest = None;
                break;
            };
            let seq = rest.seq;
            (rest.seq, rest.at) = (seq.saturating_add(1), next);
            if seq == rest.block.last() {
                self.rest = None;
            }
            self.note(1, EVENT_OVERHEAD + json.len());
            match self.intake.take(json) {
                Ok(record) => self.batch.push(record),
                Err(error) => {
                    self.refusal = Some(Refusal { seq, reason: error.report() });
                    self.rewinding = true;
                    self.rest = None;
                    return Step::Commit;
                }
            }
            self.phase = Phase::Live { mark: seq };
        }
        Step::More
    }

    fn note(&mut self, events: u64, bytes: usize) {
        let came = self.came.get_or_insert_default();
        *came = (came.0.saturating_add(events), came.1 + bytes);
    }

    fn check_edge(&self, seq: u64) -> Result<(), String> {
        if seq <= self.edge {
            return Ok(());
        }
        Err(format!(
            "seq {seq} is beyond the credit: at most {CREDIT} events may be unacknowledged, up to {}",
            self.edge
        ))
    }

    /// The mark that a frame starting at `first` builds on; nothing if the frame is not to be looked at.
    fn reach(&mut self, what: &str, first: u64) -> Result<Option<u64>, String> {
        let mark = self.mark()?;
        if first <= mark + 1 {
            self.rewinding = false;
            return Ok(Some(mark));
        }
        if self.rewinding {
            return Ok(None);
        }
        Err(format!("{what} begins with seq {first}: {} to {} are missing", mark + 1, first - 1))
    }

    fn mark(&self) -> Result<u64, String> {
        match self.phase {
            Phase::Live { mark } if mark < u64::MAX => Ok(mark),
            Phase::Live { .. } => Err("no seq is left in this epoch".to_owned()),
            _ => Err("hello comes first".to_owned()),
        }
    }

    fn or_violation(&mut self, taken: Result<Step, String>) -> Step {
        taken.unwrap_or_else(|message| {
            self.violation = Some(message);
            Step::Commit
        })
    }
}

#[cfg(test)]
mod tests;
