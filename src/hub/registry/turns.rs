//! Turns: whoever brings events is not read on before the sessions that were woken by the last ones have had a chance to
//! send what they have, so that a flood does not make a quick session look slow.

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Turns {
    /// How many sessions were woken and have not taken anything yet.
    unserved: usize,
    /// Counts how often all of them had.
    turn: u64,
    /// What was fanned out in this turn, in bytes of a session's queue.
    brought: usize,
}

impl Turns {
    /// An entry is fanned out that takes so much of a queue.
    pub(super) fn bring(&mut self, bytes: usize) {
        if self.unserved == 0 {
            self.brought = 0;
        }
        self.brought += bytes;
    }

    /// A session was woken; whether it is to have its turn now.
    pub(super) fn woken(&mut self, one: bool) {
        self.unserved += usize::from(one);
    }

    /// A session has had its turn, if it was to have one.
    pub(super) fn served(&mut self, one: bool) {
        self.unserved -= usize::from(one);
        self.turn += u64::from(one && self.unserved == 0);
    }

    /// Whether sessions were woken and have not had their turn.
    pub(super) fn has_unserved(&self) -> bool {
        self.unserved > 0
    }

    /// The turn that it is.
    pub(super) fn present(&self) -> u64 {
        self.turn
    }

    /// Which turn a session must let end before it is read: the present one, if it was read in it already, or if those
    /// who were have brought `most`. Itself it need not wait for.
    pub(super) fn must_give_way(&self, is_unserved: bool, read_in: Option<u64>, most: usize) -> Option<u64> {
        let others = self.unserved > usize::from(is_unserved);
        (others && (read_in == Some(self.turn) || self.brought >= most)).then_some(self.turn)
    }
}
