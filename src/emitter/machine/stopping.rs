//! The end: send until the deadline, store the rest, close the file.

use super::{Action, Machine, Phase, Time};
use crate::emitter::spill::Op;

impl Machine {
    /// Accept nothing new; send until `deadline`, then store the rest and close.
    pub fn stop(&mut self, now: Time, deadline: Time) {
        self.stopping = Some(self.stopping.map_or(deadline, |earlier| earlier.min(deadline)));
        self.want(u64::MAX);
        self.after(now);
    }

    pub(super) fn check_stop(&mut self, now: Time) {
        let Some(deadline) = self.stopping else { return };
        let hopeless = matches!(self.phase, Phase::Idle);
        if matches!(self.phase, Phase::Stopped) || !(self.ledger.is_drained() || now >= deadline || hopeless) {
            return;
        }
        if self.is_live() {
            self.ledger.link_lost();
        }
        self.phase = Phase::Stopped;
        self.actions.push_back(Action::Disconnect);
        if self.flush_wanted {
            self.end_flush(1);
        }
    }

    pub(super) fn plan_close(&mut self) {
        let reading = self.reading || self.trimming.is_some() || self.probing;
        let quiet = !self.appending && !reading && !self.reserving && self.refusing.is_quiet();
        let stored = self.ledger.oldest_held(1).is_empty() || self.spill_failed.is_some();
        if matches!(self.phase, Phase::Stopped) && quiet && stored && !self.closing {
            self.closing = true;
            let (next_seq, acked) = (self.ledger.taken() + 1, self.ledger.acked());
            self.actions.push_back(Action::Spill(Op::Close { next_seq, acked }));
        }
    }
}
