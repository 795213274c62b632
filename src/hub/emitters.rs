//! One high-water mark for each emitter: the highest seq that is in the log. What lies at or below it is a
//! duplicate, to be acknowledged again and not delivered again.

use std::collections::{BTreeMap, HashMap};

use super::registry::SessionId;

/// How many emitters that are not connected are remembered by default; the least recently connected is forgotten
/// first. A forgotten emitter that comes back and sends events again whose acks it had not seen delivers those
/// twice, so the bound is generous: about 20 MB when it is met.
pub const REMEMBERED: usize = 100_000;

/// What the hub knows of an emitter.
#[derive(Debug)]
struct Mark {
    epoch: String,
    have: u64,
    owner: Option<SessionId>,
    /// Key in `idle` while nobody owns it; 0, which is no key, while somebody does.
    idle_since: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Emitters {
    marks: HashMap<String, Mark>,
    /// Emitters without a connection, least recently connected first.
    idle: BTreeMap<u64, String>,
    clock: u64,
    remembered: usize,
}

impl Emitters {
    /// Remembers at most this many emitters that are not connected.
    #[must_use]
    pub fn new(remembered: usize) -> Self {
        Self { marks: HashMap::new(), idle: BTreeMap::new(), clock: 0, remembered }
    }

    /// An emitter that an earlier life of the hub knew; to be called for the least recently seen first.
    pub fn recall(&mut self, name: &str, epoch: String, have: u64) {
        self.restore(name, Some((epoch, have)));
    }

    /// Epoch and mark of an emitter.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<(&str, u64)> {
        self.marks.get(name).map(|mark| (mark.epoch.as_str(), mark.have))
    }

    /// Whether the connection is the one that brings this emitter's events.
    #[must_use]
    pub fn owns(&self, owner: SessionId, name: &str) -> bool {
        self.marks.get(name).is_some_and(|mark| mark.owner == Some(owner))
    }

    /// Sets an emitter to what was known of it, and takes it from its connection.
    pub fn restore(&mut self, name: &str, known: Option<(String, u64)>) {
        if let Some(mark) = self.marks.remove(name) {
            self.idle.remove(&mark.idle_since);
        }
        if let Some((epoch, have)) = known {
            self.clock += 1;
            self.marks.insert(name.to_owned(), Mark { epoch, have, owner: None, idle_since: self.clock });
            self.idle.insert(self.clock, name.to_owned());
        }
    }

    /// A connection says which emitter it is and which seq comes next. Returns the mark, and the connection that it
    /// takes the place of.
    pub fn hello(&mut self, owner: SessionId, name: &str, epoch: &str, next: u64) -> (u64, Option<SessionId>) {
        let mark = self.marks.entry(name.to_owned()).or_insert_with(|| Mark {
            epoch: epoch.to_owned(),
            have: 0,
            owner: None,
            idle_since: 0,
        });
        if mark.epoch != epoch {
            epoch.clone_into(&mut mark.epoch);
            mark.have = 0;
        }
        // Everything before `next` was acknowledged in an earlier life of the hub and will not come again.
        mark.have = mark.have.max(next.saturating_sub(1));
        self.idle.remove(&std::mem::take(&mut mark.idle_since));
        let before = mark.owner.replace(owner);
        (mark.have, before.filter(|before| *before != owner))
    }

    /// The mark is now at `upto`. Ignored if the connection does not own the emitter any more.
    pub fn advance(&mut self, owner: SessionId, name: &str, upto: u64) {
        if let Some(mark) = self.marks.get_mut(name).filter(|mark| mark.owner == Some(owner)) {
            mark.have = mark.have.max(upto);
        }
    }

    /// The connection is gone. Returns who is forgotten for it.
    pub fn release(&mut self, owner: SessionId, name: &str) -> Vec<String> {
        let mut forgotten = Vec::new();
        let Some(mark) = self.marks.get_mut(name).filter(|mark| mark.owner == Some(owner)) else { return forgotten };
        self.clock += 1;
        mark.owner = None;
        mark.idle_since = self.clock;
        self.idle.insert(self.clock, name.to_owned());
        while self.idle.len() > self.remembered {
            if let Some((_, name)) = self.idle.pop_first() {
                self.marks.remove(&name);
                forgotten.push(name);
            }
        }
        forgotten
    }

    /// How many emitters are known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.marks.len()
    }

    /// Whether none is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.marks.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: SessionId = SessionId::for_test(1);
    const B: SessionId = SessionId::for_test(2);

    #[test]
    fn the_mark_outlives_the_connection_and_ends_with_the_epoch() {
        let mut emitters = Emitters::new(10);
        assert_eq!(emitters.hello(A, "x", "1", 1), (0, None));
        emitters.advance(A, "x", 7);
        emitters.release(A, "x");
        assert_eq!(emitters.hello(B, "x", "1", 5), (7, None));
        assert_eq!(emitters.hello(B, "x", "2", 1), (0, None));
    }

    #[test]
    fn what_was_acknowledged_in_an_earlier_life_is_not_waited_for() {
        let mut emitters = Emitters::new(10);
        assert_eq!(emitters.hello(A, "x", "1", 100), (99, None));
        assert_eq!(emitters.hello(A, "x", "1", 50), (99, None));
    }

    #[test]
    fn a_newer_connection_takes_over() {
        let mut emitters = Emitters::new(10);
        emitters.hello(A, "x", "1", 1);
        assert_eq!(emitters.hello(B, "x", "1", 1), (0, Some(A)));
        emitters.advance(A, "x", 5);
        emitters.release(A, "x");
        emitters.advance(B, "x", 3);
        assert_eq!(emitters.hello(B, "x", "1", 1), (3, None));
    }

    #[test]
    fn the_least_recent_idle_emitter_is_forgotten_and_a_connected_one_never() {
        let mut emitters = Emitters::new(1);
        emitters.hello(A, "connected", "1", 1);
        for name in ["old", "new"] {
            emitters.hello(B, name, "1", 1);
            emitters.advance(B, name, 9);
            emitters.release(B, name);
        }
        assert_eq!(emitters.len(), 2);
        assert_eq!(emitters.hello(B, "new", "1", 1), (9, None));
        assert_eq!(emitters.hello(B, "old", "1", 1), (0, None));
        emitters.advance(A, "connected", 1);
        assert_eq!(emitters.hello(A, "connected", "1", 1), (1, None));
    }
}
