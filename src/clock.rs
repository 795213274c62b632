//! Time that is stored. The wall clock may be set at any moment, so nothing is aged by it while a better clock is
//! there: within a boot of the system that is the time since the boot, over restarts of the process too. Only what
//! passed between two boots is taken from the wall clock, and never less than nothing.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// What the system's clocks show at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Reading {
    /// Which life of the system; `None` where it does not tell.
    pub(crate) boot: Option<Arc<str>>,
    /// Milliseconds on a clock that nobody can set: since the boot, or since any moment of this process where the
    /// boot is not known.
    pub(crate) uptime: i64,
    /// Unix time, milliseconds: may jump.
    pub(crate) unix: i64,
}

/// Where readings come from: the system, or a test.
#[derive(Clone)]
pub(crate) struct Clock(Arc<dyn Fn() -> Reading + Send + Sync>);

impl std::fmt::Debug for Clock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Clock")
    }
}

impl Clock {
    /// The clocks of the system.
    pub(crate) fn system() -> Self {
        let boot: Option<Arc<str>> = boot_id().map(Into::into);
        Self::new(move || Reading { boot: boot.clone(), uptime: since_boot().as_millis() as i64, unix: unix_millis() })
    }

    /// Other clocks.
    pub(crate) fn new(read: impl Fn() -> Reading + Send + Sync + 'static) -> Self {
        Self(Arc::new(read))
    }

    /// What they show now.
    pub(crate) fn read(&self) -> Reading {
        (self.0)()
    }
}

/// The clock of a file: milliseconds that only ever go up, over restarts too. It begins as Unix time, so that people
/// can read it, and differs from it once the wall clock is set.
#[derive(Debug)]
pub(crate) struct FileClock {
    clock: Clock,
    anchor: Anchor,
    stored: bool,
}

/// A moment of the file's clock, and what the system's clocks showed then.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Anchor {
    time: i64,
    reading: Reading,
}

/// A wall clock that is off by more than this was set, and its new relation to the file's clock is worth storing.
const SET: i64 = 1000;

impl FileClock {
    /// Goes on from what is stored: an [`anchor`](Self::anchor), and the newest time that was given to anything.
    pub(crate) fn resume(clock: Clock, anchor: Option<&str>, newest: Option<i64>) -> Self {
        let reading = clock.read();
        let time = match anchor.and_then(Anchor::parse) {
            Some(anchor) => anchor.resumed(&reading),
            None => newest.unwrap_or(reading.unix),
        };
        let time = newest.map_or(time, |newest| time.max(newest));
        Self { clock, anchor: Anchor { time, reading }, stored: false }
    }

    /// The present.
    pub(crate) fn now(&self) -> i64 {
        self.anchor.now(&self.clock.read())
    }

    /// What is to be stored for [`resume`](Self::resume), if that is not done: at first, and when the wall clock was
    /// set, or the next boot would take the jump for time that has passed.
    pub(crate) fn unstored(&mut self) -> Option<String> {
        let reading = self.clock.read();
        let time = self.anchor.now(&reading);
        let jump = (reading.unix - self.anchor.reading.unix) - (time - self.anchor.time);
        if jump.abs() > SET {
            self.anchor = Anchor { time, reading };
            self.stored = false;
        }
        (!self.stored).then(|| self.anchor.text())
    }

    /// It is stored.
    pub(crate) fn note_stored(&mut self) {
        self.stored = true;
    }
}

impl Anchor {
    fn text(&self) -> String {
        let Self { time, reading: Reading { boot, uptime, unix } } = self;
        format!("{time} {uptime} {unix} {}", boot.as_deref().unwrap_or(""))
    }

    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let mut number = || words.next()?.parse().ok();
        let (time, uptime, unix) = (number()?, number()?, number()?);
        let boot = words.next().filter(|boot| !boot.is_empty()).map(Into::into);
        Some(Self { time, reading: Reading { boot, uptime, unix } })
    }

    /// Within the process that set it.
    fn now(&self, reading: &Reading) -> i64 {
        self.time.saturating_add((reading.uptime - self.reading.uptime).max(0))
    }

    /// In a later process.
    fn resumed(&self, reading: &Reading) -> i64 {
        if self.reading.boot.is_some() && self.reading.boot == reading.boot {
            return self.now(reading);
        }
        self.time.saturating_add(reading.unix.saturating_sub(self.reading.unix).max(0))
    }
}

/// Identity of the machine's present life; `None` where the system does not tell it.
pub(crate) fn boot_id() -> Option<String> {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    Some(id.trim().to_owned()).filter(|id| !id.is_empty() && !id.contains(' '))
}

/// Unix time in milliseconds: for people, and between two boots.
pub(crate) fn unix_millis() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as i64)
}

/// On a clock that nobody can set, and that counts while the machine is suspended too, which [`std::time::Instant`]
/// does not.
#[cfg(target_os = "linux")]
pub(crate) fn since_boot() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn since_boot() -> Duration {
    static ORIGIN: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    ORIGIN.get_or_init(std::time::Instant::now).elapsed()
}

#[cfg(test)]
pub(crate) mod tests {
    use parking_lot::Mutex;

    use super::*;

    pub(crate) const HOUR: i64 = 3_600_000;

    /// Clocks that a test sets.
    #[derive(Clone)]
    pub(crate) struct Hands(Arc<Mutex<Reading>>);

    impl Hands {
        pub(crate) fn new() -> Self {
            let reading = Reading { boot: Some("boot".into()), uptime: 5 * HOUR, unix: 480_000 * HOUR };
            Self(Arc::new(Mutex::new(reading)))
        }

        pub(crate) fn clock(&self) -> Clock {
            let hands = self.0.clone();
            Clock::new(move || hands.lock().clone())
        }

        /// Time passes on all clocks.
        pub(crate) fn pass(&self, millis: i64) {
            let mut reading = self.0.lock();
            reading.uptime += millis;
            reading.unix += millis;
        }

        /// Somebody sets the wall clock.
        pub(crate) fn set_wall(&self, by: i64) {
            self.0.lock().unix += by;
        }

        /// The machine is off for a while.
        pub(crate) fn reboot(&self, off: i64) {
            let mut reading = self.0.lock();
            reading.boot = Some(format!("{}x", reading.boot.as_deref().unwrap_or("")).into());
            reading.uptime = 1000;
            reading.unix += off;
        }

        pub(crate) fn forget_boot(&self) {
            self.0.lock().boot = None;
        }
    }

    #[test]
    fn a_wall_clock_that_is_set_moves_nothing_within_a_process_or_a_boot() {
        for by in [10 * HOUR, -10 * HOUR, -500_000 * HOUR] {
            let hands = Hands::new();
            let clock = FileClock::resume(hands.clock(), None, None);
            let begin = clock.now();
            hands.set_wall(by);
            hands.pass(5);
            assert_eq!(clock.now(), begin + 5);
            let later = FileClock::resume(hands.clock(), Some(&clock.anchor.text()), Some(begin));
            assert_eq!(later.now(), begin + 5, "the same boot");
        }
    }

    #[test]
    fn between_boots_the_wall_clock_counts_and_never_goes_back() {
        let hands = Hands::new();
        let mut clock = FileClock::resume(hands.clock(), None, None);
        let begin = clock.now();
        clock.note_stored();
        assert!(clock.unstored().is_none());
        hands.set_wall(-100 * HOUR);
        hands.pass(HOUR);
        assert!(clock.unstored().is_some() && clock.unstored().is_some(), "until it is stored");
        hands.reboot(2 * HOUR);
        let resumed = FileClock::resume(hands.clock(), Some(&clock.anchor.text()), None);
        assert_eq!(resumed.now(), begin + 3 * HOUR, "the jump before the boot is no time");
        hands.reboot(-1000 * HOUR);
        let resumed = FileClock::resume(hands.clock(), Some(&resumed.anchor.text()), Some(begin + 4 * HOUR));
        assert_eq!(resumed.now(), begin + 4 * HOUR, "a clock without a battery");
        hands.pass(HOUR);
        assert_eq!(resumed.now(), begin + 5 * HOUR, "but it goes on");
    }

    #[test]
    fn without_a_boot_id_or_an_anchor_it_goes_on_as_well_as_it_can() {
        let hands = Hands::new();
        hands.forget_boot();
        let clock = FileClock::resume(hands.clock(), None, None);
        let begin = clock.now();
        hands.pass(HOUR);
        assert_eq!(FileClock::resume(hands.clock(), Some(&clock.anchor.text()), None).now(), begin + HOUR);
        assert_eq!(FileClock::resume(hands.clock(), Some("gibberish"), Some(7)).now(), 7);
    }

    #[test]
    fn the_clocks_of_the_system_go_forward() {
        let clock = Clock::system();
        let (one, other) = (clock.read(), clock.read());
        assert!(other.uptime >= one.uptime && one.unix > 1_600_000_000_000);
    }
}
