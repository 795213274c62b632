//! Events while the bus is away, where they may go on without it: numbered here, under an epoch of their own, for the
//! sessions of this hub. The marks are this spell's own too: whoever said hello over the bus says it once more.

use crate::hub::emitters::{Emitters, REMEMBERED};
use crate::hub::history::ledger::Ledger;
use crate::hub::ops::{Op, Outcome};
use crate::hub::registry::SessionId;

/// One spell. See the module.
#[derive(Debug)]
pub(super) struct Local(Ledger);

impl Local {
    /// The spell begins; nobody is known.
    pub(super) fn new() -> Self {
        Self(Ledger::new(Emitters::new(REMEMBERED)))
    }

    /// Judges an op; what it brings is appended when it is settled.
    pub(super) fn take(&mut self, op: Op) -> Option<Outcome> {
        let outcome = match op {
            Op::Turn { turn, flow, bytes } => {
                let verdict = self.0.judge(&turn);
                Outcome::Turn { turn, flow, bytes, verdict }
            }
            Op::Publish { records, reply } => Outcome::Publish { records, reply, error: None },
            Op::Release { .. } | Op::Close { .. } => return None,
        };
        self.0.keep();
        Some(outcome)
    }

    /// A session is gone.
    pub(super) fn release(&mut self, id: SessionId, name: &str) {
        self.0.release(id, name);
    }
}
