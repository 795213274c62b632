//! How much may be unconfirmed on a link whose peer grants no credit. A server that has just come back and meets all
//! that gathered meanwhile is not flattened by it: what is under way begins small, doubles while all is well, and after
//! the first trouble grows by steps and halves with each further one (AIMD, as TCP does against a congested network:
//! RFC 5681; here it is the application behind the socket that is spared).
//!
//! Trouble is a link that is lost with something unconfirmed, or a confirmation that takes far longer than usual. What
//! was learnt outlives the link: the next one begins with half.

use std::time::Duration;

/// Where it begins: what one Ping confirms. A local server confirms that in a millisecond, so doubling reaches the
/// whole `outbox_bytes` in less than a tenth of a second.
const FIRST: usize = 256 << 10;
/// Where it stays: one block, and the smallest `outbox_bytes`. Less would only cost round trips.
const FLOOR: usize = 64 << 10;
/// Growth for each window confirmed once there was trouble: what one Ping confirms.
const STEP: usize = 256 << 10;
/// A confirmation that takes so many times the usual is trouble …
const SLOW_FACTOR: u32 = 4;
/// … if it also takes this long: what a server digests within it does not flatten it, and jitter below it means nothing.
const SLOW_LEAST: Duration = Duration::from_millis(250);

/// See the [module](self).
#[derive(Clone, Debug)]
pub struct Window {
    bytes: usize,
    most: usize,
    /// No trouble yet.
    doubling: bool,
    /// It held something back since it grew last: one that is not used up proves nothing by its confirmations.
    used_up: bool,
    /// Usual time of a confirmation.
    usual: Option<Duration>,
    /// What was sent before the last trouble: its confirmations are late for the same reason.
    troubled: u64,
}

impl Window {
    /// The window of an emitter that begins; it never exceeds `most` bytes.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self { bytes: FIRST.min(most), most, doubling: true, used_up: false, usual: None, troubled: 0 }
    }

    /// How many bytes may be unconfirmed; the last item may reach beyond.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether something more may be sent.
    pub fn has_room(&mut self, in_flight: usize) -> bool {
        self.used_up |= in_flight >= self.bytes;
        in_flight < self.bytes
    }

    /// Everything up to the seq `upto` is confirmed, `bytes` more than before, `took` after it was asked for; the last
    /// one sent is `sent`.
    pub fn confirmed(&mut self, bytes: usize, took: Duration, upto: u64, sent: u64) {
        let usual = self.usual.unwrap_or(took);
        self.usual = Some((usual * 7 + took) / 8); // as RFC 6298 smooths round trips
        if upto <= self.troubled {
            return;
        }
        if took > SLOW_LEAST.max(usual * SLOW_FACTOR) {
            self.troubled = sent;
            self.halve();
        } else if std::mem::take(&mut self.used_up) {
            let step = if self.doubling { bytes } else { (STEP as u128 * bytes as u128 / self.bytes as u128) as usize };
            self.bytes = self.bytes.saturating_add(step).min(self.most);
        }
    }

    /// The link is gone, with something unconfirmed on it. The next one may be another: what is usual is learnt anew.
    pub fn lost(&mut self) {
        self.halve();
        self.usual = None;
        self.troubled = 0;
    }

    fn halve(&mut self) {
        self.bytes = (self.bytes / 2).max(FLOOR).min(self.most);
        self.doubling = false;
        self.used_up = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: usize = 16 << 20;
    const QUICK: Duration = Duration::from_millis(10);

    /// Sends a whole window, which is confirmed after `took`.
    fn round(window: &mut Window, took: Duration) -> usize {
        let bytes = window.bytes();
        assert!(!window.has_room(bytes) && window.has_room(bytes - 1));
        window.confirmed(bytes, took, 1, 0);
        window.bytes()
    }

    #[test]
    fn it_doubles_up_to_its_bound_until_there_is_trouble() {
        let mut window = Window::new(MOST);
        assert_eq!(window.bytes(), FIRST);
        let rounds = (0..100).take_while(|_| round(&mut window, QUICK) < MOST).count();
        assert_eq!(rounds, 5, "a few round trips to the full window");
        assert_eq!(round(&mut window, QUICK), MOST);
    }

    #[test]
    fn after_trouble_it_grows_by_steps() {
        let mut window = Window::new(MOST);
        round(&mut window, QUICK);
        window.lost();
        assert_eq!(window.bytes(), FIRST);
        assert_eq!(round(&mut window, QUICK), FIRST + STEP);
        assert_eq!(round(&mut window, QUICK), FIRST + 2 * STEP);
        assert!(!window.has_room(window.bytes()));
        window.confirmed(window.bytes() / 3, QUICK, 1, 1);
        assert_eq!(window.bytes(), FIRST + 2 * STEP + STEP / 3, "a part of a window is a part of a step");
    }

    #[test]
    fn it_halves_with_each_lost_link_but_not_below_its_floor() {
        let mut window = Window::new(MOST);
        while round(&mut window, QUICK) < MOST {}
        let halves: Vec<usize> = (0..10).map(|_| (window.lost(), window.bytes()).1).collect();
        assert_eq!(halves[..2], [MOST / 2, MOST / 4]);
        assert_eq!(halves[8..], [FLOOR, FLOOR]);
        let mut small = Window::new(100);
        small.lost();
        assert_eq!(small.bytes(), 100, "nor above its bound");
    }

    #[test]
    fn a_confirmation_far_slower_than_usual_halves_it_once() {
        let mut window = Window::new(MOST);
        for _ in 0..3 {
            round(&mut window, QUICK);
        }
        let before = window.bytes();
        window.confirmed(before, SLOW_LEAST + QUICK, 10, 20);
        assert_eq!(window.bytes(), before / 2);
        window.confirmed(before, 2 * SLOW_LEAST, 20, 30);
        assert_eq!(window.bytes(), before / 2, "that was sent before, and is late for the same reason");
        window.confirmed(before, 4 * SLOW_LEAST, 21, 30);
        assert_eq!(window.bytes(), before / 4);
    }

    #[test]
    fn a_slow_peer_that_is_always_so_is_in_no_trouble() {
        let mut window = Window::new(MOST);
        let slow = Duration::from_secs(2);
        assert!(round(&mut window, slow) > FIRST && round(&mut window, slow * 3) > 2 * FIRST);
        // One whose confirmations take the longer the more is under way is not pushed ever further.
        let mut window = Window::new(MOST);
        let reached = (0..20).map(|_| {
            let took = slow * (window.bytes() / FIRST) as u32;
            round(&mut window, took)
        });
        assert!(reached.max() < Some(MOST));
    }

    #[test]
    fn a_window_that_is_not_used_up_does_not_grow() {
        let mut window = Window::new(MOST);
        for _ in 0..100 {
            assert!(window.has_room(1000));
            window.confirmed(1000, QUICK, 1, 1);
        }
        assert_eq!(window.bytes(), FIRST);
    }
}
