//! What the emitter tells the health bus, and how often: the first sign of trouble at once, then at most one report
//! per interval with what has gathered since.

use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::emitter::ledger::Time;

/// A report about to be made; the driver adds totals and the time of day.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// `event_type` as users see it.
    pub event_type: &'static str,
    /// Whether it is good news.
    pub success: bool,
    /// Reason and number of rejected events, for `top_rejects`.
    pub reject: Option<(&'static str, u64)>,
    /// Goes into `metrics` beside the totals.
    pub details: Map<String, Value>,
}

impl Report {
    /// Good news.
    #[must_use]
    pub fn good(event_type: &'static str, details: Value) -> Self {
        Self { event_type, success: true, reject: None, details: into_map(details) }
    }

    /// Bad news: `count` events met `reason`.
    #[must_use]
    pub fn bad(event_type: &'static str, reason: &'static str, count: u64, details: Value) -> Self {
        Self { event_type, success: false, reject: Some((reason, count)), details: into_map(details) }
    }
}

fn into_map(details: Value) -> Map<String, Value> {
    match details {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

/// Gathers one kind of trouble: reported at once when it begins, then at most once per interval.
#[derive(Debug)]
pub struct Coalesced {
    interval: Duration,
    pending: u64,
    not_before: Time,
}

impl Coalesced {
    /// Nothing gathered yet.
    #[must_use]
    pub fn new(interval: Duration) -> Self {
        Self { interval, pending: 0, not_before: Time::ZERO }
    }

    /// Adds `count` occurrences.
    pub fn add(&mut self, count: u64) {
        self.pending += count;
    }

    /// The number to report now, if it is time and there is any.
    pub fn due(&mut self, now: Time) -> Option<u64> {
        if self.pending == 0 || now < self.not_before {
            return None;
        }
        self.not_before = now + self.interval;
        Some(std::mem::take(&mut self.pending))
    }

    /// When the next report falls due; `None` if nothing is gathered.
    #[must_use]
    pub fn deadline(&self) -> Option<Time> {
        (self.pending > 0).then_some(self.not_before)
    }

    /// The trouble is over: the next one is reported at once.
    pub fn calm(&mut self) {
        self.not_before = Time::ZERO;
    }
}

/// Thresholds of seed 000's objectives.
#[derive(Clone, Copy, Debug)]
pub struct Objectives {
    /// Lowest share of events accepted live over a minute.
    pub success_rate: f64,
    /// Depth at which a breach ends.
    pub depth: u64,
    /// Depth at which it begins: apart from `depth`, so that it does not flutter.
    pub depth_alert: u64,
    /// Longest flush.
    pub flush: Duration,
}

/// The objectives: a breach and its end are reported once each.
#[derive(Debug)]
pub struct SloMonitor {
    objectives: Objectives,
    /// (accepted live, accepted) of each of the last 60 seconds.
    window: [(u64, u64); 60],
    second: u64,
    last: (u64, u64),
    rate_breached: bool,
    depth_breached: bool,
    flush_breached: bool,
}

impl SloMonitor {
    /// Nothing breached.
    #[must_use]
    pub fn new(objectives: Objectives) -> Self {
        Self {
            objectives,
            window: [(0, 0); 60],
            second: 0,
            last: (0, 0),
            rate_breached: false,
            depth_breached: false,
            flush_breached: false,
        }
    }

    /// Share of events accepted live over the last minute; 1 if there were none.
    #[must_use]
    pub fn success_rate(&self) -> f64 {
        let (live, all) = self.window.iter().fold((0, 0), |sum, second| (sum.0 + second.0, sum.1 + second.1));
        if all == 0 { 1.0 } else { live as f64 / all as f64 }
    }

    /// Whether there is anything to observe without new events: traffic in the last minute, or a breach whose end has
    /// to be seen.
    #[must_use]
    pub fn is_moving(&self) -> bool {
        self.depth_breached || self.window.iter().any(|second| second.1 > 0)
    }

    /// Takes the totals so far; returns what to report.
    pub fn observe(&mut self, now: Time, live: u64, all: u64, depth: u64) -> Vec<Report> {
        let second = now.as_secs();
        for passed in (self.second + 1..=second).rev().take(60) {
            self.window[passed as usize % 60] = (0, 0);
        }
        self.second = second;
        let slot = &mut self.window[second as usize % 60];
        slot.0 += live - self.last.0;
        slot.1 += all - self.last.1;
        self.last = (live, all);
        let mut reports = Vec::new();
        let rate = self.success_rate();
        let Objectives { success_rate, depth: calm, depth_alert, .. } = self.objectives;
        if self.rate_breached != (rate < success_rate) {
            self.rate_breached = !self.rate_breached;
            reports.push(slo("emit_success_rate", self.rate_breached, json!(rate), json!(success_rate)));
        }
        let breached = if self.depth_breached { depth > calm } else { depth > depth_alert };
        if self.depth_breached != breached {
            self.depth_breached = breached;
            let threshold = if breached { depth_alert } else { calm };
            reports.push(slo("spill_depth", breached, json!(depth), json!(threshold)));
        }
        reports
    }

    /// Takes the time that a flush has taken so far; returns what to report.
    pub fn flush_took(&mut self, took: Duration, complete: bool) -> Option<Report> {
        let over = took > self.objectives.flush;
        if over == self.flush_breached || (!over && !complete) {
            return None;
        }
        self.flush_breached = over;
        Some(slo("flush_latency", over, json!(took.as_secs_f64()), json!(self.objectives.flush.as_secs_f64())))
    }

    /// When a flush that began at `since` becomes a breach.
    #[must_use]
    pub fn flush_deadline(&self, since: Time) -> Option<Time> {
        (!self.flush_breached).then(|| since + self.objectives.flush + Duration::from_millis(1))
    }
}

fn slo(name: &'static str, breached: bool, value: Value, threshold: Value) -> Report {
    let mut details = Map::new();
    details.insert("slo".to_owned(), json!(name));
    details.insert("value".to_owned(), value);
    details.insert("threshold".to_owned(), threshold);
    let details = Value::Object(details);
    if breached {
        Report::bad("broadcaster_slo_breach", name, 1, details)
    } else {
        Report::good("broadcaster_slo_recovered", details)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn at(seconds: u64) -> Time {
        Duration::from_secs(seconds)
    }

    fn monitor() -> SloMonitor {
        SloMonitor::new(Objectives { success_rate: 0.99, depth: 100, depth_alert: 1000, flush: at(5) })
    }

    fn names(reports: &[Report]) -> Vec<(&str, &str)> {
        reports.iter().map(|report| (report.event_type, report.details["slo"].as_str().unwrap_or(""))).collect()
    }

    #[test]
    fn the_first_trouble_is_reported_at_once_and_the_rest_gathered() {
        let mut spills = Coalesced::new(at(1));
        spills.add(1);
        assert_eq!(spills.due(at(10)), Some(1));
        spills.add(2);
        spills.add(3);
        assert_eq!((spills.due(at(10)), spills.deadline()), (None, Some(at(11))));
        assert_eq!(spills.due(at(11)), Some(5));
        assert_eq!((spills.due(at(20)), spills.deadline()), (None, None));
    }

    #[test]
    fn a_breach_of_the_success_rate_and_its_end_are_reported_once_each() {
        let mut slo = monitor();
        assert!(slo.observe(at(0), 100, 100, 0).is_empty());
        assert_eq!(names(&slo.observe(at(1), 100, 110, 10)), [("broadcaster_slo_breach", "emit_success_rate")]);
        assert!(slo.observe(at(2), 100, 120, 20).is_empty());
        assert!(slo.observe(at(61), 100, 120, 0).is_empty());
        assert_eq!(names(&slo.observe(at(62), 100, 120, 0)), [("broadcaster_slo_recovered", "emit_success_rate")]);
        assert!((slo.success_rate() - 1.0).abs() < f64::EPSILON && !slo.is_moving());
    }

    #[test]
    fn the_depth_breaches_above_the_alert_and_recovers_below_the_calm_mark() {
        let mut slo = monitor();
        assert!(slo.observe(at(1), 0, 0, 1000).is_empty());
        assert_eq!(names(&slo.observe(at(2), 0, 0, 1001)), [("broadcaster_slo_breach", "spill_depth")]);
        assert!(slo.observe(at(3), 0, 0, 101).is_empty());
        assert_eq!(names(&slo.observe(at(4), 0, 0, 100)), [("broadcaster_slo_recovered", "spill_depth")]);
    }

    #[test]
    fn a_slow_flush_is_reported_while_it_lasts_and_a_quick_one_recovers() {
        let mut slo = monitor();
        assert!(slo.flush_took(at(5), false).is_none());
        assert!(!slo.flush_took(at(6), false).expect("breach").success);
        assert!(slo.flush_took(at(60), true).is_none());
        assert!(slo.flush_took(at(1), false).is_none());
        assert!(slo.flush_took(at(1), true).expect("recovered").success);
    }
}
