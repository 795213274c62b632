//! Whether the bus can be used, since when it cannot, and whether that was told. Pure.

use std::time::Duration;

/// Whether the bus, which answers, keeps what it is given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Refusal {
    #[default]
    None,
    /// It said no: nothing is sent.
    Standing,
    /// The last probe could write: a batch may try, and nobody is told yet that all is well. Without this a bus that takes
    /// probes and no batches would be told ill and well in turns for ever.
    Trial,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Trouble {
    since: Option<Duration>,
    why: String,
    told: bool,
    refusal: Refusal,
}

impl Trouble {
    /// The bus cannot be used, or still not.
    pub(super) fn begin(&mut self, now: Duration, why: &str) {
        self.since.get_or_insert(now);
        why.clone_into(&mut self.why);
    }

    /// What is the matter, if something is.
    pub(super) fn why(&self) -> Option<&str> {
        self.since.map(|_| &*self.why)
    }

    /// Whether it has lasted for so long.
    pub(super) fn lasts(&self, now: Duration, long: Duration) -> bool {
        self.since.is_some_and(|since| now >= since + long)
    }

    /// When it is to be told at the latest, if that is so long after its beginning.
    pub(super) fn due(&self, patience: Duration) -> Option<Duration> {
        self.since.filter(|_| !self.told).map(|since| since + patience)
    }

    /// It is told now; returns what.
    pub(super) fn tell(&mut self) -> String {
        self.told = true;
        self.why.clone()
    }

    /// The bus answers, and does not keep what it is given. Returns whether that is news.
    pub(super) fn refuse(&mut self, now: Duration, why: &str) -> bool {
        self.refusal = Refusal::Standing;
        self.begin(now, why);
        !self.told
    }

    /// Whether nothing may be sent.
    pub(super) fn refuses(&self) -> bool {
        self.refusal == Refusal::Standing
    }

    /// A probe came back that could write. Returns whether the bus can be used.
    pub(super) fn probed(&mut self) -> bool {
        self.refusal = if self.refusal == Refusal::Standing { Refusal::Trial } else { Refusal::None };
        self.refusal == Refusal::None
    }

    /// A batch was kept. Returns whether a refusal is over by that.
    pub(super) fn kept(&mut self) -> bool {
        self.refusal == Refusal::Trial && self.probed()
    }

    /// All is well. Returns whether that is to be told.
    pub(super) fn end(&mut self) -> bool {
        std::mem::take(self).told
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn it_is_told_once_and_lasts_from_its_beginning() {
        let mut trouble = Trouble::default();
        assert_eq!((trouble.why(), trouble.due(SECOND)), (None, None));
        trouble.begin(2 * SECOND, "gone");
        trouble.begin(3 * SECOND, "still gone");
        assert_eq!((trouble.why(), trouble.due(SECOND)), (Some("still gone"), Some(3 * SECOND)));
        assert!(trouble.lasts(4 * SECOND, 2 * SECOND) && !trouble.lasts(3 * SECOND, 2 * SECOND));
        assert_eq!((&*trouble.tell(), trouble.due(SECOND)), ("still gone", None));
        assert!(trouble.end() && !trouble.end());
    }

    #[test]
    fn a_refusal_ends_with_a_batch_that_was_kept_or_a_second_probe() {
        for by_a_batch in [true, false] {
            let mut trouble = Trouble::default();
            assert!(trouble.refuse(SECOND, "full") && trouble.refuses());
            trouble.tell();
            assert!(!trouble.kept(), "a batch that was on its way");
            assert!(!trouble.probed() && !trouble.refuses(), "on trial");
            assert!(!trouble.refuse(2 * SECOND, "full") && trouble.refuses(), "and again, which is no news");
            assert!(!trouble.probed());
            assert!(if by_a_batch { trouble.kept() } else { trouble.probed() });
        }
    }
}
