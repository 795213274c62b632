//! The flush: what was spilled when the link came up, its pace and its end.

use std::time::Duration;

use serde_json::json;

use super::{Action, Flush, FlushOutcome, Machine, Phase, Time};
use crate::emitter::item::Item;
use crate::emitter::report::Report;

/// The rate of a flush is measured over at least this long: some confirmations even on a slow link.
const MEASURED_OVER: Duration = Duration::from_millis(500);

impl Flush {
    /// Takes the rate anew if it is time.
    pub(super) fn measure(&mut self, now: Time) {
        let (since, before) = self.measured;
        let over = now.saturating_sub(since);
        if over >= MEASURED_OVER {
            self.rate = (self.flushed - before) as f64 / over.as_secs_f64();
            self.measured = (now, self.flushed);
        }
    }
}

impl Machine {
    /// Flush now: do not wait for the backoff. The end is told by [`Action::Flushed`].
    pub fn flush_now(&mut self, now: Time) {
        self.flush_wanted = true;
        self.want(self.ledger.taken());
        if let Phase::Waiting { until } = &mut self.phase {
            *until = now;
            self.connect_if_due(now);
        }
        self.settle_flush(now);
        if self.flush_wanted && matches!(self.phase, Phase::Idle | Phase::Waiting { .. } | Phase::Stopped) {
            self.end_flush(1); // not started, or the breaker forbids it: as in seed 000, the oldest counts as failed
        }
    }

    /// Ends the flush under way if everything that was spilled when it began is confirmed.
    pub(super) fn settle_flush(&mut self, now: Time) {
        if let Some(flush) = &self.flush
            && (self.ledger.acked() >= flush.target || self.ledger.acked() >= self.ledger.spilled_upto())
            && self.is_live()
        {
            let took = now.saturating_sub(flush.since);
            self.flush_latency = Some(took);
            let report = self.slo.flush_took(took, true);
            self.actions.extend(report.map(Action::Report));
            self.end_flush(0);
        } else if self.flush.is_none() && self.flush_wanted && self.is_live() {
            if self.ledger.spilled_upto() > self.ledger.acked() {
                self.begin_flush(now);
            } else {
                self.end_flush(0);
            }
        }
    }

    pub(super) fn begin_flush(&mut self, now: Time) {
        self.flush = Some(Flush {
            target: self.ledger.taken(),
            since: now,
            flushed: 0,
            failed: 0,
            rate: 0.0,
            measured: (now, 0),
            next_report: now + self.config.report_interval,
        });
    }

    /// What was taken last belongs to the flush, too.
    pub(super) fn extend_flush(&mut self, now: Time) {
        match &mut self.flush {
            Some(flush) => flush.target = self.ledger.taken(),
            None => self.begin_flush(now),
        }
    }

    /// Events that the flush has yet to bring.
    pub(super) fn flush_remaining(&self, flush: &Flush) -> u64 {
        self.ledger.events_between(self.ledger.acked(), flush.target.min(self.ledger.spilled_upto()))
    }

    /// Tells of a flush that takes long.
    pub(super) fn report_flush(&mut self, now: Time) {
        let live = self.is_live();
        let Some(flush) = self.flush.as_mut().filter(|flush| live && now >= flush.next_report) else { return };
        flush.next_report = now + self.config.report_interval;
        flush.measure(now);
        let flush = flush.clone();
        let details = json!({
            "flushed": flush.flushed,
            "remaining": self.flush_remaining(&flush),
            "rate": flush.rate.round(),
            "seconds": now.saturating_sub(flush.since).as_secs_f64(),
        });
        self.report(Report::good("broadcaster_flush_progress", details));
    }

    pub(super) fn end_flush(&mut self, failed: u64) {
        let left = self.ledger.events_between(self.ledger.acked(), self.ledger.spilled_upto());
        let (flushed, tried) = self.flush.take().map_or((0, 0), |flush| (flush.flushed, flush.failed));
        let failed = failed.max(tried).min(left);
        let outcome = FlushOutcome { flushed, failed, remaining: left };
        if flushed > 0 || failed > 0 {
            let latency = self.flush_latency.map(|took| took.as_secs_f64());
            let details = json!({"flushed": flushed, "failed": failed, "remaining": left, "seconds": latency});
            self.report(Report::good("broadcaster_flush_complete", details));
        }
        if std::mem::take(&mut self.flush_wanted) {
            self.actions.push_back(Action::Flushed(outcome));
        }
    }

    /// Holds spilled events to `flush_rate`.
    pub(super) fn pace(&mut self, item: Item, now: Time) -> Option<Item> {
        let (Some(rate), true) = (self.config.flush_rate, item.first() <= self.ledger.spilled_upto()) else {
            return Some(item);
        };
        let Item::Events(block) = &item else { return Some(item) };
        let (tokens, at) = self.tokens;
        // A tenth of a second may be saved up, so that coarse timers do not lower the rate.
        let tokens = (tokens + (now.saturating_sub(at)).as_secs_f64() * rate).min((rate / 10.0).max(1.0));
        self.tokens = (tokens, now);
        let part = block.head(tokens as u64)?;
        self.tokens.0 -= part.count() as f64;
        Some(Item::Events(part))
    }

    /// How long `flush_rate` forbids the next event; `None` if something else holds it up, which will tell.
    pub(super) fn flush_pause(&self, now: Time) -> Option<Duration> {
        let rate = self.config.flush_rate?;
        let (tokens, at) = self.tokens;
        let missing = 1.0 - tokens - now.saturating_sub(at).as_secs_f64() * rate;
        let paced = missing > 0.0 && self.ledger.sent() < self.ledger.spilled_upto();
        paced.then(|| Duration::from_secs_f64((missing / rate).max(0.001)))
    }
}
