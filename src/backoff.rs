//! Pauses between attempts: exponential, capped first and jittered after (jitter added before the cap vanishes at
//! the cap, and a fleet comes back in step), seeded, and never giving up.

use std::time::Duration;

use fastrand::Rng;

/// The next pause, given how often it failed so far.
#[derive(Clone, Debug)]
pub struct Backoff {
    initial: Duration,
    max: Duration,
    multiplier: f64,
    jitter: f64,
    failures: u32,
}

impl Backoff {
    /// A backoff that has not failed yet. `jitter` is the random share of each pause, 0 to 1.
    #[must_use]
    pub fn new(initial: Duration, max: Duration, multiplier: f64, jitter: f64) -> Self {
        Self { initial, max, multiplier, jitter, failures: 0 }
    }

    /// The pause after one more failure: `min(initial × multiplierⁿ, max) × (1 − jitter × U(0, 1))`.
    pub fn next(&mut self, rng: &mut Rng) -> Duration {
        let grown = self.initial.as_secs_f64() * self.multiplier.powi(self.failures.min(1000) as i32);
        self.failures = self.failures.saturating_add(1);
        let capped = grown.min(self.max.as_secs_f64());
        Duration::from_secs_f64(capped * (1.0 - self.jitter * rng.f64()))
    }

    /// Failures since the last success.
    #[must_use]
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// To be called when the peer has proven to work, not merely to accept connections.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_the_cap_and_stay_jittered_there() {
        let mut rng = Rng::with_seed(7);
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30), 2.0, 0.5);
        let pauses: Vec<f64> = (0..200).map(|_| backoff.next(&mut rng).as_secs_f64()).collect();
        for (n, pause) in pauses.iter().enumerate() {
            let cap = 2f64.powi(n.min(10) as i32).min(30.0);
            assert!((cap * 0.5..=cap).contains(pause), "pause {n} is {pause}");
        }
        let late: std::collections::BTreeSet<_> = pauses[20..].iter().map(|p| (p * 1000.0) as u64).collect();
        assert!(late.len() > 100, "the jitter has gone at the cap");
        backoff.reset();
        assert!(backoff.next(&mut rng) <= Duration::from_secs(1));
    }
}
