//! Whether the peer is still there, judged by progress and not by one round trip: a peer whose application does not
//! read delays its pong for as long, and late is not dead.

/// What to do at a beat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beat {
    /// Send a ping.
    Ping,
    /// Nothing moved since the last ping, not even its pong: end the session.
    Dead,
}

/// Called once for every ping interval.
#[derive(Debug)]
pub struct Liveness {
    progress: bool,
}

impl Default for Liveness {
    fn default() -> Self {
        Self { progress: true }
    }
}

impl Liveness {
    /// Something was read from the peer, or taken by it.
    pub fn progress(&mut self) {
        self.progress = true;
    }

    /// A ping interval went by.
    pub fn beat(&mut self) -> Beat {
        if std::mem::replace(&mut self.progress, false) { Beat::Ping } else { Beat::Dead }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_after_a_ping_is_death() {
        let mut liveness = Liveness::default();
        assert_eq!(liveness.beat(), Beat::Ping);
        liveness.progress();
        assert_eq!(liveness.beat(), Beat::Ping);
        assert_eq!(liveness.beat(), Beat::Dead);
    }
}
