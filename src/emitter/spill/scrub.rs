//! Scrubbing: what opening the spill leaves unchecked, because its time must not grow with what is stored, is checked
//! once while nobody wants anything from it. Here is how far that is; the checks are those of the
//! [`store`](super::store).

use std::time::Duration;

/// Bytes checked in one step: a millisecond or two.
pub(super) const STEP: usize = 1 << 20;
/// Calm enough for a step: after a start, what is stored goes on the wire first.
const CALM: Duration = Duration::from_millis(50);
/// Calm enough for the check of all pages, which begins anew if it is interrupted. Doubled each time, so that it does not
/// run again and again.
const LONG_CALM: Duration = Duration::from_secs(1);

/// What is checked next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Scrub {
    /// Rows behind `at`, up to what was stored when the file was opened.
    Rows { at: u64, upto: u64 },
    /// Parked events behind this key.
    Parked { after: i64 },
    /// All pages, the index, and the totals; so many times it was interrupted.
    Whole { tries: u32 },
    /// Nothing until the next start.
    #[default]
    Done,
}

impl Scrub {
    /// Nobody should have wanted anything for so long; `None`: there is nothing to do.
    pub(super) fn after(self) -> Option<Duration> {
        match self {
            Self::Rows { .. } | Self::Parked { .. } => Some(CALM),
            Self::Whole { tries } => Some(LONG_CALM.saturating_mul(1 << tries.min(16))),
            Self::Done => None,
        }
    }
}
