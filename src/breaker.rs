//! Circuit breaker over links that connect but never confirm anything (a server that closes at once, a proxy without
//! a server behind it). Failing to connect is the backoff's business, not the breaker's.

use std::time::Duration;

/// What the breaker allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BreakerState {
    /// Attempts are allowed.
    Closed,
    /// No attempts until the given time.
    Open {
        /// End of the cooldown.
        until: Duration,
    },
    /// One attempt is on trial: a confirmation closes the breaker, a loss opens it again.
    HalfOpen,
}

/// Counts links lost in a row without a confirmation.
#[derive(Clone, Debug)]
pub struct Breaker {
    threshold: u32,
    cooldown: Duration,
    losses: u32,
    state: BreakerState,
}

impl Breaker {
    /// A closed breaker that opens after `threshold` losses in a row, for `cooldown`.
    #[must_use]
    pub fn new(threshold: u32, cooldown: Duration) -> Self {
        Self { threshold, cooldown, losses: 0, state: BreakerState::Closed }
    }

    /// The state as of the last call.
    #[must_use]
    pub fn state(&self) -> BreakerState {
        self.state
    }

    /// `closed`, `open` or `half_open`, as users see it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self.state {
            BreakerState::Closed => "closed",
            BreakerState::Open { .. } => "open",
            BreakerState::HalfOpen => "half_open",
        }
    }

    /// Before an attempt: `Some(time)` while attempts are forbidden until then.
    pub fn forbids(&mut self, now: Duration) -> Option<Duration> {
        match self.state {
            BreakerState::Open { until } if now < until => Some(until),
            BreakerState::Open { .. } => {
                self.state = BreakerState::HalfOpen;
                None
            }
            BreakerState::Closed | BreakerState::HalfOpen => None,
        }
    }

    /// The peer confirmed something.
    pub fn confirmed(&mut self) {
        self.losses = 0;
        self.state = BreakerState::Closed;
    }

    /// A link was lost that had confirmed nothing.
    pub fn lost(&mut self, now: Duration) {
        self.losses = self.losses.saturating_add(1);
        if self.losses >= self.threshold || self.state == BreakerState::HalfOpen {
            self.state = BreakerState::Open { until: now + self.cooldown };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn opens_at_the_threshold_and_closes_only_after_a_confirmation() {
        let mut breaker = Breaker::new(2, 10 * SECOND);
        breaker.lost(SECOND);
        assert_eq!(breaker.forbids(SECOND), None);
        breaker.lost(2 * SECOND);
        assert_eq!(breaker.forbids(3 * SECOND), Some(12 * SECOND));
        assert_eq!(breaker.forbids(12 * SECOND), None);
        assert_eq!(breaker.name(), "half_open");
        breaker.lost(13 * SECOND);
        assert_eq!(breaker.forbids(14 * SECOND), Some(23 * SECOND));
        assert_eq!(breaker.forbids(23 * SECOND), None);
        breaker.confirmed();
        assert_eq!((breaker.name(), breaker.forbids(24 * SECOND)), ("closed", None));
    }

    #[test]
    fn a_confirmation_forgets_earlier_losses() {
        let mut breaker = Breaker::new(2, SECOND);
        for _ in 0..10 {
            breaker.lost(SECOND);
            breaker.confirmed();
        }
        assert_eq!(breaker.state(), BreakerState::Closed);
    }
}
