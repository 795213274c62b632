//! Who may append what: the marks of all emitters as they will be once everything that was judged is stored. Pure.
//!
//! A group of turns is judged in order, stored as a whole, and then kept or taken back as a whole. After it was taken
//! back, nobody of it owns an emitter any more: what a session sends behind something that was not stored would leave
//! a hole, so it is refused until the next `hello`.

use std::collections::HashMap;

use super::sqlite::Mark;
use crate::hub::emitters::Emitters;
use crate::hub::machine::Turn;
use crate::hub::registry::SessionId;

/// What is to become of a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Its records are to be stored.
    Stored,
    /// It greets, and knows its mark now; an older connection may have to go.
    Greeted {
        /// Everything up to here is in the log.
        have: u64,
        /// The connection that it takes the place of.
        superseded: Option<SessionId>,
    },
    /// Another connection has the emitter, or something before it was not stored: nothing of it counts.
    Refused,
}

/// See the module.
#[derive(Debug)]
pub struct Ledger {
    emitters: Emitters,
    /// What was known of the emitters of this group before it.
    before: HashMap<String, Option<(String, u64)>>,
    forgotten: Vec<String>,
}

impl Ledger {
    /// Begins with what is known.
    #[must_use]
    pub fn new(emitters: Emitters) -> Self {
        Self { emitters, before: HashMap::new(), forgotten: Vec::new() }
    }

    /// How many emitters are known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.emitters.len()
    }

    /// Whether none is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.emitters.is_empty()
    }

    /// Decides on a turn, as if everything judged before it were stored.
    pub fn judge(&mut self, turn: &Turn) -> Verdict {
        if let Some(greeting) = &turn.greeting {
            self.note(&turn.name);
            let (have, superseded) = self.emitters.hello(turn.id, &turn.name, &greeting.epoch, greeting.next);
            return Verdict::Greeted { have, superseded };
        }
        if turn.name.is_empty() {
            return Verdict::Stored; // no emitter: it has no mark, or broke the protocol before it said who it is
        }
        let (from, upto) = turn.marks;
        let continues = self.emitters.get(&turn.name).is_some_and(|(_, have)| have == from);
        if !continues || !self.emitters.owns(turn.id, &turn.name) {
            return Verdict::Refused;
        }
        if upto > from {
            self.note(&turn.name);
            self.emitters.advance(turn.id, &turn.name, upto);
        }
        Verdict::Stored
    }

    /// A connection is gone.
    pub fn release(&mut self, id: SessionId, name: &str) {
        self.forgotten.extend(self.emitters.release(id, name));
    }

    /// The marks that the group changed, as they are now.
    #[must_use]
    pub fn marks(&self) -> Vec<Mark> {
        let now = |name: &String| {
            let (epoch, have) = self.emitters.get(name)?;
            Some(Mark { name: name.clone(), epoch: epoch.to_owned(), have })
        };
        self.before.keys().filter_map(now).collect()
    }

    /// The emitters that were forgotten and have not come back.
    #[must_use]
    pub fn forgotten(&self) -> Vec<String> {
        self.forgotten.iter().filter(|name| self.emitters.get(name).is_none()).cloned().collect()
    }

    /// The group is stored.
    pub fn keep(&mut self) {
        self.before.clear();
        self.forgotten.clear();
    }

    /// The group is not stored.
    pub fn take_back(&mut self) {
        for (name, known) in self.before.drain() {
            self.emitters.restore(&name, known);
        }
    }

    fn note(&mut self, name: &str) {
        if !self.before.contains_key(name) {
            let known = self.emitters.get(name).map(|(epoch, have)| (epoch.to_owned(), have));
            self.before.insert(name.to_owned(), known);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::entry::Record;
    use crate::hub::machine::Greeting;

    const A: SessionId = SessionId::for_test(1);
    const B: SessionId = SessionId::for_test(2);

    fn ledger() -> Ledger {
        let mut emitters = Emitters::new(10);
        emitters.recall("x", "1".into(), 5);
        Ledger::new(emitters)
    }

    fn hello(id: SessionId, next: u64) -> Turn {
        let mut turn = data(id, 0, 0);
        turn.greeting = Some(Greeting { epoch: "1".into(), next });
        turn
    }

    fn data(id: SessionId, from: u64, upto: u64) -> Turn {
        let records = (from..upto).map(|_| Record::event(b"{}"[..].into()).expect("valid")).collect();
        Turn::for_test(id, "x", (from, upto), records)
    }

    fn have(ledger: &Ledger) -> Vec<u64> {
        ledger.marks().iter().map(|mark| mark.have).collect()
    }

    #[test]
    fn a_group_moves_the_mark_once() {
        let mut ledger = ledger();
        assert_eq!(ledger.judge(&hello(A, 3)), Verdict::Greeted { have: 5, superseded: None });
        assert_eq!(ledger.judge(&data(A, 5, 7)), Verdict::Stored);
        assert_eq!(ledger.judge(&data(A, 7, 9)), Verdict::Stored);
        assert_eq!(have(&ledger), [9]);
        ledger.keep();
        assert_eq!(ledger.judge(&data(A, 9, 9)), Verdict::Stored);
        assert!(ledger.marks().is_empty());
    }

    #[test]
    fn what_a_superseded_connection_had_on_its_way_does_not_count() {
        let mut ledger = ledger();
        ledger.judge(&hello(A, 6));
        ledger.judge(&data(A, 5, 7));
        assert_eq!(ledger.judge(&hello(B, 6)), Verdict::Greeted { have: 7, superseded: Some(A) });
        assert_eq!(ledger.judge(&data(A, 7, 9)), Verdict::Refused);
        assert_eq!(ledger.judge(&data(B, 7, 8)), Verdict::Stored);
    }

    #[test]
    fn what_follows_a_group_that_was_not_stored_is_refused() {
        let mut ledger = ledger();
        ledger.judge(&hello(A, 6));
        ledger.keep();
        assert_eq!(ledger.judge(&data(A, 5, 7)), Verdict::Stored);
        ledger.take_back();
        assert_eq!(ledger.judge(&data(A, 7, 9)), Verdict::Refused);
        assert_eq!(ledger.judge(&hello(B, 6)), Verdict::Greeted { have: 5, superseded: None });
        assert_eq!(ledger.judge(&data(B, 5, 7)), Verdict::Stored);
    }

    #[test]
    fn a_new_emitter_that_was_not_stored_is_not_known() {
        let mut ledger = Ledger::new(Emitters::new(10));
        ledger.judge(&hello(A, 1));
        ledger.judge(&data(A, 0, 2));
        ledger.take_back();
        assert!(ledger.is_empty());
        assert_eq!(ledger.judge(&data(A, 2, 3)), Verdict::Refused);
    }

    #[test]
    fn who_is_forgotten_and_comes_back_is_not_deleted() {
        let mut ledger = Ledger::new(Emitters::new(0));
        ledger.judge(&hello(A, 1));
        ledger.keep();
        ledger.release(A, "x");
        assert_eq!(ledger.forgotten(), ["x"]);
        ledger.judge(&hello(B, 1));
        assert!(ledger.forgotten().is_empty());
    }

    #[test]
    fn a_stranger_may_only_be_told_that_it_broke_the_protocol() {
        let mut ledger = ledger();
        assert_eq!(ledger.judge(&Turn::for_test(A, "", (0, 0), Vec::new())), Verdict::Stored);
        assert_eq!(ledger.judge(&data(A, 5, 6)), Verdict::Refused);
    }
}
