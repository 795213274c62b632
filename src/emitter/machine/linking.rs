//! The link: when to connect, when to give a connection up, and what proves that it works.

use std::time::Duration;

use serde_json::json;

use super::{Action, Confirm, Live, Machine, Phase, Time, Welcome};
use crate::emitter::report::Report;
use crate::error::{Error, ErrorKind};

/// A timer that fires so much later was not held up by the peer: this process, or the whole machine, did not run.
const LATE: Duration = Duration::from_secs(1);
/// Something unconfirmed for so many `ack_timeout`s ends the link even if bytes still move: a peer that swallows
/// everything and answers nothing.
const HOPELESS: u32 = 4;

impl Machine {
    /// Connect from now on, for ever.
    pub fn start(&mut self, now: Time) {
        if matches!(self.phase, Phase::Idle) {
            self.phase = Phase::Waiting { until: now };
            self.on_time(now, 0, 0, 0);
        }
    }

    /// The link is up.
    ///
    /// # Errors
    /// The peer claims to have events that were never sent: the spill was restored from a copy, or its emitter's name is
    /// used twice. Going on would make the peer drop new events as duplicates. The link must be dropped.
    pub fn on_link_up(&mut self, now: Time, welcome: Welcome) -> Result<(), Error> {
        if welcome.have > self.ledger.taken() {
            let text = format!(
                "the hub has events up to seq {} of this emitter, which never sent more than {}: is its emitter_id used twice, or its spill restored from a copy? give it another emitter_id",
                welcome.have,
                self.ledger.taken()
            );
            return Err(Error::new(ErrorKind::Protocol, text));
        }
        let failures = self.backoff.failures();
        self.links += 1;
        self.phase = Phase::Live(Live {
            welcome,
            proven: false,
            progress: now,
            confirmed: now,
            barrier: None,
            barred: self.ledger.acked(),
            unbarred_bytes: 0,
            idle_ping: false,
            excused: false,
            asked: 0,
        });
        self.spills.calm();
        let first = !std::mem::replace(&mut self.ready, true);
        let details = json!({"first": first, "attempts": failures + 1, "reconnects": self.links - 1});
        self.report(Report::good("broadcaster_ready", details));
        self.acknowledge(now, welcome.have);
        if self.ledger.spilled_upto() > self.ledger.acked() {
            self.begin_flush(now);
        }
        self.tokens = (1.0, now);
        self.settle_flush(now);
        self.after(now);
        Ok(())
    }

    /// An attempt failed.
    pub fn on_connect_failed(&mut self, now: Time, error: &Error) {
        let pause = self.backoff.next(&mut self.rng);
        let text = error.report();
        let details = json!({
            "error": text, "attempt": self.backoff.failures(), "retry_in": (pause.as_secs_f64() * 1000.0).round() / 1000.0
        });
        self.report(Report::bad("broadcaster_connection_failed", "ws_not_ready", 1, details));
        self.last_error = Some(text.into());
        if !matches!(self.phase, Phase::Stopped) {
            self.phase = Phase::Waiting { until: now + pause };
        }
        if self.flush_wanted {
            self.end_flush(1);
        }
        self.after(now);
    }

    /// The link broke.
    pub fn on_link_down(&mut self, now: Time, error: &Error) {
        let Phase::Live(live) = &self.phase else { return };
        if !live.proven {
            // Connecting succeeded but nothing was ever confirmed: to the breaker that is a failure, and the pause grows.
            self.breaker.lost(now);
        }
        if live.welcome.confirm == Confirm::Pings && self.ledger.in_flight_bytes() > 0 {
            self.window.lost();
        }
        self.last_error = Some(error.report().into());
        let failed = self.ledger.events_between(self.ledger.acked(), self.ledger.sent());
        if error.kind() == ErrorKind::FrameRefused {
            self.suspect(now, &error.report());
        }
        let before = self.ledger.demoted;
        self.ledger.link_lost();
        self.spills.add(self.ledger.demoted - before);
        let pause = self.backoff.next(&mut self.rng);
        if !matches!(self.phase, Phase::Stopped) {
            self.phase = Phase::Waiting { until: now + pause };
        }
        if let Some(flush) = &mut self.flush {
            flush.failed = failed;
        }
        if self.flush_wanted {
            self.end_flush(failed.max(1));
        }
        self.after(now);
    }

    /// Bytes moved in either direction.
    pub fn on_progress(&mut self, now: Time) {
        if let Phase::Live(live) = &mut self.phase {
            live.progress = now;
        }
    }

    pub(super) fn connect_if_due(&mut self, now: Time) {
        let Phase::Waiting { until } = self.phase else { return };
        if now < until || self.stopping.is_some_and(|deadline| now >= deadline) {
            return;
        }
        if now > until + LATE {
            self.backoff.reset(); // what failed before we slept says nothing of now
        }
        if let Some(until) = self.breaker.forbids(now) {
            self.phase = Phase::Waiting { until };
        } else {
            self.phase = Phase::Connecting;
            self.actions.push_back(Action::Connect);
        }
    }

    pub(super) fn check_silence(&mut self, now: Time, idle: bool) {
        // As long as a new connection may take, if that is less: a link rarely outlives a sleep.
        let patience = self.config.connect_timeout.min(self.config.ack_timeout);
        if let Phase::Live(live) = &self.phase
            && now > self.link_deadline(live) + LATE
            && !live.excused
        {
            let since = now.saturating_sub(self.config.ack_timeout.saturating_sub(patience));
            if let Phase::Live(live) = &mut self.phase {
                live.excused = true;
                live.idle_ping = live.welcome.confirm != Confirm::Sends;
                live.progress = since;
                live.confirmed = now;
            }
            return;
        }
        if idle {
            if let Phase::Live(live) = &mut self.phase {
                live.idle_ping = true;
                live.progress = now;
                live.confirmed = now;
            }
            return;
        }
        let text = format!("nothing was confirmed and no byte moved for {:?}", self.config.ack_timeout);
        self.actions.push_back(Action::Disconnect);
        self.on_link_down(now, &Error::new(ErrorKind::ConnectTimeout, text));
    }

    /// The peer has shown that it works, not merely that it accepts connections.
    pub(super) fn prove(&mut self) {
        if let Phase::Live(live) = &mut self.phase {
            live.proven = true;
            live.excused = false;
        }
        self.backoff.reset();
        self.breaker.confirmed();
    }

    pub(super) fn link_deadline(&self, live: &Live) -> Time {
        if self.awaits_confirmation(live) {
            let silent = live.progress + self.config.ack_timeout;
            return silent.min(live.confirmed + self.config.ack_timeout * HOPELESS);
        }
        match live.welcome.confirm {
            Confirm::Sends => Time::MAX,
            Confirm::Acks | Confirm::Pings => live.progress + self.config.ping_interval,
        }
    }

    pub(super) fn awaits_confirmation(&self, live: &Live) -> bool {
        self.ledger.sent() > self.ledger.acked() || live.barrier.is_some() || live.idle_ping
    }

    pub(super) fn nothing_was_due(&mut self, now: Time) {
        if let Phase::Live(live) = &mut self.phase {
            live.confirmed = live.confirmed.max(now);
            live.progress = live.progress.max(now);
        }
    }
}
