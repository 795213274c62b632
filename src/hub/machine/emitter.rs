//! An emitter's session, in two halves: frames are checked as they are read, without the shared state, and what they
//! brought is committed once for a whole batch of input, so a thousand events cost one lock and one ack.

use std::time::Duration;

use bytes::Bytes;

use crate::hub::entry::Record;
use crate::hub::registry::SessionId;
use crate::hub::state::State;
use crate::wire::block::Block;
use crate::wire::close::CloseCode;
use crate::wire::frame::{EmitterFrame, HubFrame};

/// How many events an emitter may have unacknowledged. The hub takes events as fast as it reads them and TCP holds
/// back the rest, so this only bounds what an emitter must be ready to send again.
pub const CREDIT: u64 = 1 << 17;

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
    /// Events flow. `mark` is the highest seq taken, committed or not.
    Live { mark: u64 },
    /// Closed or superseded; nothing counts any more.
    Over,
}

/// See the module.
#[derive(Debug)]
pub struct EmitterMachine {
    id: SessionId,
    phase: Phase,
    name: String,
    epoch: String,
    batch: Vec<Record>,
    duplicates: u64,
    /// Something came that wants an ack, be it only a duplicate.
    ack_due: bool,
    violation: Option<String>,
}

impl EmitterMachine {
    /// The machine of a session that was just opened.
    #[must_use]
    pub fn new(id: SessionId) -> Self {
        Self {
            id,
            phase: Phase::Silent,
            name: String::new(),
            epoch: String::new(),
            batch: Vec::new(),
            duplicates: 0,
            ack_due: false,
            violation: None,
        }
    }

    /// A text frame came.
    pub fn on_text(&mut self, text: &str) -> Step {
        if matches!(self.phase, Phase::Over) {
            return Step::More;
        }
        let taken = match EmitterFrame::decode(text) {
            Ok(EmitterFrame::Hello { emitter, epoch, next }) => self.on_hello(emitter, epoch, next),
            Ok(EmitterFrame::Gap { from, to, reason }) => self.on_gap(from, to, &reason),
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

    /// Whether anything came since the last commit.
    #[must_use]
    pub fn wants_commit(&self) -> bool {
        self.ack_due || self.violation.is_some() || matches!(self.phase, Phase::Greeting { .. })
    }

    /// Appends what the frames since the last commit brought, and answers.
    pub fn commit(&mut self, state: &mut State, now: Duration) {
        if state.registry.is_closing(self.id) {
            // It could not be acknowledged any more, so it will come again on another connection.
            self.phase = Phase::Over;
            self.batch = Vec::new();
            self.violation = None;
            return;
        }
        if let Phase::Greeting { next } = self.phase {
            let have = state.hello(self.id, &self.name, &self.epoch, next);
            self.phase = Phase::Live { mark: have };
            state.registry.push(self.id, HubFrame::Welcome { have, credit: CREDIT }.encode().into());
        }
        if let Phase::Live { mark } = self.phase {
            state.emitters.advance(self.id, &self.name, mark);
            self.append(mark, state, now);
        }
        if let Some(message) = self.violation.take() {
            self.phase = Phase::Over;
            state.counters.bad_frames += 1;
            let frame = HubFrame::Error { code: "bad_frame".to_owned(), message };
            state.registry.push(self.id, frame.encode().into());
            state.registry.order_close(self.id, CloseCode::BadFrame);
        }
    }

    /// The connection is gone.
    pub fn end(&mut self, state: &mut State) {
        state.emitters.release(self.id, &self.name);
    }

    fn append(&mut self, mark: u64, state: &mut State, now: Duration) {
        for record in self.batch.drain(..) {
            state.append(record, now);
        }
        state.counters.duplicates += std::mem::take(&mut self.duplicates);
        if std::mem::take(&mut self.ack_due) {
            state.registry.push(self.id, HubFrame::Ack { upto: mark }.encode().into());
        }
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
        (self.name, self.epoch) = (emitter, epoch);
        self.phase = Phase::Greeting { next };
        Ok(Step::Commit)
    }

    fn on_gap(&mut self, from: u64, to: u64, reason: &str) -> Result<Step, String> {
        let mark = self.mark()?;
        if from == 0 || from > to {
            return Err(format!("gap from {from} to {to} is empty"));
        }
        if reason.len() > MAX_NAME {
            return Err(format!("gap.reason is at most {MAX_NAME} bytes long, not {}", reason.len()));
        }
        if from > mark + 1 {
            return Err(format!("gap from {from} follows {mark}: {} to {} are missing", mark + 1, from - 1));
        }
        self.ack_due = true;
        if to > mark {
            self.batch.push(Record::gap(&self.name, &self.epoch, from.max(mark + 1), to, reason));
            self.phase = Phase::Live { mark: to };
        }
        Ok(Step::More)
    }

    fn take(&mut self, block: &Block) -> Result<Step, String> {
        let mut mark = self.mark()?;
        if block.first() > mark.saturating_add(1) {
            let (from, to) = (mark + 1, block.first() - 1);
            return Err(format!("block begins with seq {}: {from} to {to} are missing", block.first()));
        }
        self.ack_due = true;
        for (seq, json) in block.events() {
            if seq <= mark {
                self.duplicates += 1;
                continue;
            }
            let record = Record::event(json).map_err(|error| format!("event with seq {seq}: {error}"))?;
            self.batch.push(record);
            mark = seq;
            self.phase = Phase::Live { mark };
        }
        Ok(Step::More)
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
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::hub::log::LogLimits;
    use crate::hub::outbox::Item;
    use crate::hub::registry::Role;
    use crate::wire::block::BlockBuilder;
    use bytes::BytesMut;

    struct Hub(State);

    struct Link {
        id: SessionId,
        machine: EmitterMachine,
    }

    impl Hub {
        fn new() -> Self {
            Self(State::new("log".into(), LogLimits { events: 1000, bytes: 1 << 20, age: None }, 1 << 20))
        }

        fn connect(&mut self) -> Link {
            let id = self.0.registry.open(Role::Emitter);
            Link { id, machine: EmitterMachine::new(id) }
        }

        fn greet(&mut self, epoch: &str, next: u64) -> Link {
            let mut link = self.connect();
            link.hello(epoch, next);
            self.commit(&mut link);
            link
        }

        fn commit(&mut self, link: &mut Link) -> Vec<String> {
            link.machine.commit(&mut self.0, Duration::ZERO);
            let mut items = VecDeque::new();
            self.0.registry.take(link.id, usize::MAX, &mut items);
            let read = |item| match item {
                Item::Text(frame) => String::from_utf8(frame.to_vec()).expect("utf-8"),
                other => format!("{other:?}"),
            };
            items.into_iter().map(read).collect()
        }

        fn log(&mut self) -> Vec<String> {
            let all = crate::hub::entry::Filter::new([crate::wire::topic::Pattern::parse("*").expect("valid")]);
            let start = crate::wire::position::Position { epoch: "log".into(), offset: 0 };
            let crate::hub::log::Recovery::Recovered(entries) = self.0.log.since(&start, &all, Duration::ZERO) else {
                panic!("not recovered")
            };
            entries.iter().map(|entry| String::from_utf8(entry.record.json().to_vec()).expect("utf-8")).collect()
        }
    }

    impl Link {
        fn hello(&mut self, epoch: &str, next: u64) -> Step {
            let hello = EmitterFrame::Hello { emitter: "engine".into(), epoch: epoch.into(), next };
            self.machine.on_text(&hello.encode())
        }

        fn events(&mut self, seqs: std::ops::RangeInclusive<u64>) -> Step {
            let mut block = BlockBuilder::new(*seqs.start(), BytesMut::new());
            for seq in seqs {
                block.push(format!(r#"{{"n":{seq}}}"#).as_bytes());
            }
            self.machine.on_block(block.seal().expect("not empty").into_bytes())
        }

        fn gap(&mut self, from: u64, to: u64) -> Step {
            let gap = EmitterFrame::Gap { from, to, reason: "expired".into() };
            self.machine.on_text(&gap.encode())
        }
    }

    fn numbers(seqs: impl IntoIterator<Item = u64>) -> Vec<String> {
        seqs.into_iter().map(|seq| format!(r#"{{"n":{seq}}}"#)).collect()
    }

    fn ack(upto: u64) -> String {
        HubFrame::Ack { upto }.encode()
    }

    #[test]
    fn many_blocks_are_acknowledged_once() {
        let mut hub = Hub::new();
        let mut link = hub.connect();
        assert_eq!(link.hello("1", 1), Step::Commit);
        assert_eq!(hub.commit(&mut link), [HubFrame::Welcome { have: 0, credit: CREDIT }.encode()]);
        assert_eq!(link.events(1..=3), Step::More);
        assert_eq!(link.events(4..=4), Step::More);
        assert_eq!(hub.commit(&mut link), [ack(4)]);
        assert!(hub.commit(&mut link).is_empty());
        assert_eq!(hub.log(), numbers(1..=4));
    }

    #[test]
    fn duplicates_are_acknowledged_again_and_not_appended_again() {
        let mut hub = Hub::new();
        let mut link = hub.greet("1", 1);
        link.events(1..=3);
        hub.commit(&mut link);
        let mut link = hub.connect();
        link.hello("1", 2);
        assert_eq!(hub.commit(&mut link), [HubFrame::Welcome { have: 3, credit: CREDIT }.encode()]);
        link.events(2..=3);
        assert_eq!(hub.commit(&mut link), [ack(3)]);
        link.events(3..=5);
        assert_eq!(hub.commit(&mut link), [ack(5)]);
        assert_eq!(hub.log(), numbers(1..=5));
        assert_eq!(hub.0.counters.duplicates, 3);
    }

    #[test]
    fn a_new_epoch_begins_again_and_an_old_life_is_not_waited_for() {
        let mut hub = Hub::new();
        let mut link = hub.greet("1", 1);
        link.events(1..=2);
        hub.commit(&mut link);
        let mut link = hub.greet("2", 1);
        link.events(1..=1);
        assert_eq!(hub.commit(&mut link), [ack(1)]);
        let mut link = hub.greet("3", 50);
        link.events(50..=50);
        assert_eq!(hub.commit(&mut link), [ack(50)]);
        assert_eq!(hub.log(), numbers([1, 2, 1, 50]));
    }

    #[test]
    fn gaps_enter_the_log_and_overlap_the_mark() {
        let mut hub = Hub::new();
        let mut link = hub.greet("1", 1);
        link.events(1..=2);
        link.gap(2, 5);
        link.events(6..=6);
        assert_eq!(hub.commit(&mut link), [ack(6)]);
        link.gap(3, 5);
        assert_eq!(hub.commit(&mut link), [ack(6)]);
        let gap = r#"{"emitter":"engine","epoch":"1","from":3,"to":5,"reason":"expired"}"#.to_owned();
        assert_eq!(hub.log(), [numbers(1..=2), vec![gap], numbers(6..=6)].concat());
        assert_eq!(hub.0.counters.gaps, 1);
    }

    #[test]
    fn the_older_connection_is_closed_and_appends_nothing_more() {
        let mut hub = Hub::new();
        let mut old = hub.greet("1", 1);
        old.events(1..=1);
        hub.commit(&mut old);
        old.events(2..=2);
        let mut new = hub.greet("1", 2);
        assert_eq!(hub.commit(&mut old), ["Close(Superseded)"]);
        old.events(2..=2);
        old.machine.commit(&mut hub.0, Duration::ZERO);
        new.events(2..=2);
        assert_eq!(hub.commit(&mut new), [ack(2)]);
        assert_eq!(hub.log(), numbers(1..=2));
    }

    #[test]
    fn what_came_before_a_violation_counts() {
        let mut hub = Hub::new();
        let mut link = hub.greet("1", 1);
        let mut block = BlockBuilder::new(1, BytesMut::new());
        block.push(br#"{"n":1}"#);
        block.push(b"[2]");
        block.push(br#"{"n":3}"#);
        assert_eq!(link.machine.on_block(block.seal().expect("not empty").into_bytes()), Step::Commit);
        let heard = hub.commit(&mut link);
        assert_eq!((&heard[0], heard[2].as_str()), (&ack(1), "Close(BadFrame)"));
        assert!(heard[1].contains("seq 2"), "{}", heard[1]);
        assert_eq!(link.events(2..=2), Step::More);
        assert!(hub.commit(&mut link).is_empty());
        assert_eq!(hub.log(), numbers([1]));
    }

    #[test]
    fn bad_input_is_named_and_ends_the_session() {
        type Say = fn(&mut Link) -> Step;
        let cases: [(bool, Say, &str); 11] = [
            (false, |link| link.events(1..=1), "hello comes first"),
            (false, |link| link.gap(1, 1), "hello comes first"),
            (false, |link| link.hello("", 1), "hello.epoch"),
            (false, |link| link.hello("1", 0), "hello.next"),
            (false, |link| link.machine.on_text("{"), "sb.emit.v1"),
            (true, |link| link.hello("1", 1), "twice"),
            (true, |link| link.events(2..=2), "1 to 1 are missing"),
            (true, |link| link.gap(2, 2), "1 to 1 are missing"),
            (true, |link| link.gap(1, 0), "empty"),
            (true, |link| link.machine.on_block(Bytes::from_static(b"\x01")), "truncated"),
            (true, |link| link.machine.on_block(Bytes::from_static(&[7; 40])), "unknown kind 7"),
        ];
        for (greeted, say, word) in cases {
            let mut hub = Hub::new();
            let mut link = if greeted { hub.greet("1", 1) } else { hub.connect() };
            assert_eq!(say(&mut link), Step::Commit, "{word}");
            let heard = hub.commit(&mut link);
            assert_eq!(heard.len(), 2, "{heard:?}");
            assert!(heard[0].contains("bad_frame") && heard[0].contains(word), "{word}: {heard:?}");
            assert_eq!(heard[1], "Close(BadFrame)");
        }
    }

    #[test]
    fn the_last_seq_of_all_is_taken_and_nothing_after_it() {
        let mut hub = Hub::new();
        let mut link = hub.greet("1", u64::MAX);
        link.events(u64::MAX..=u64::MAX);
        assert_eq!(hub.commit(&mut link), [ack(u64::MAX)]);
        assert_eq!(link.events(1..=1), Step::Commit);
        assert!(hub.commit(&mut link)[0].contains("no seq is left"));
    }

    #[test]
    fn unknown_frames_are_ignored() {
        let mut hub = Hub::new();
        let mut link = hub.greet("1", 1);
        assert_eq!(link.machine.on_text(r#"{"type":"later"}"#), Step::More);
        assert!(hub.commit(&mut link).is_empty());
    }
}
