//! Settings of an emitter: one struct, checked once, so that nothing behind it has to doubt a value.

use std::path::PathBuf;
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};

/// When `safe_emit`'s await ends, and so what an accepted event survives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// The event is in the outbox (in RAM; in the spill while the link is down): survives a lost link.
    Memory,
    /// The event is in the outbox, which is a mapped file: survives `kill -9` of the process.
    Process,
    /// An fsync that covered it has returned: survives power loss.
    Power,
    /// The hub has acknowledged it: survives the loss of this machine.
    Delivered,
}

/// What happens to an event when the spill is at its bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhenFull {
    /// The oldest stored event that is not on its way makes room; a gap record stays in its place. Costs history.
    DropOldest,
    /// The new event is not stored; a gap record stands for it. Costs the present.
    DropNewest,
    /// The caller waits until there is room; its event is accepted meanwhile. Costs the caller's time, without limit.
    Wait,
    /// The caller gets `SpillFull`, and keeps the event. Costs the caller code.
    Raise,
}

/// All settings of an emitter; times are durations, sizes are bytes. The defaults stand with their reasons in
/// `safe_broadcaster.EmitterConfig`, which is the only place that sets them.
#[derive(Clone, Debug)]
pub struct EmitterConfig {
    /// Where the spill lives.
    pub spill_path: PathBuf,
    /// Level for calls that name none.
    pub durability: Durability,
    /// Name towards the hub; `None`: a random one, kept in the spill.
    pub emitter_id: Option<String>,
    /// Bytes of events held in memory (accepted and not yet acknowledged) before callers are asked to wait.
    pub outbox_bytes: usize,
    /// Most events in the spill.
    pub spill_max_events: u64,
    /// Most bytes of events in the spill.
    pub spill_max_bytes: u64,
    /// Oldest age of a stored event; `None`: any.
    pub spill_max_age: Option<Duration>,
    /// Policy at those bounds.
    pub when_full: WhenFull,
    /// How often the peer may refuse an event before it is parked.
    pub poison_tries: u32,
    /// Most parked events.
    pub parked_max_events: u64,
    /// Most bytes of parked events.
    pub parked_max_bytes: u64,
    /// First pause before connecting again.
    pub backoff_initial: Duration,
    /// Longest pause.
    pub backoff_max: Duration,
    /// Growth of the pause with each failure.
    pub backoff_multiplier: f64,
    /// Random share of each pause, 0 to 1.
    pub jitter: f64,
    /// How long connecting, with TLS and handshake, may take.
    pub connect_timeout: Duration,
    /// How long a link with unconfirmed events may show no progress.
    pub ack_timeout: Duration,
    /// Idle time after which a Ping proves that the link lives.
    pub ping_interval: Duration,
    /// Links lost in a row without one confirmation before the breaker opens.
    pub breaker_threshold: u32,
    /// How long the open breaker forbids attempts.
    pub breaker_cooldown: Duration,
    /// Least time between two reports of the same ongoing trouble.
    pub report_interval: Duration,
    /// Largest event as JSON.
    pub max_event_bytes: usize,
    /// Extra HTTP headers of the WebSocket handshake.
    pub headers: Vec<(String, String)>,
    /// Sent as `Authorization: Bearer …`.
    pub token: Option<String>,
    /// PEM file of certificate authorities to trust instead of the system's.
    pub ssl_ca: Option<PathBuf>,
    /// Put `{"_sb": {"emitter", "epoch", "seq"}}` into events for a server that does not speak our protocol.
    pub stamp: bool,
    /// Most spilled events sent per second; `None`: as fast as they are confirmed.
    pub flush_rate: Option<f64>,
    /// Lowest share of events accepted live, over one minute.
    pub slo_emit_success_rate: f64,
    /// Spill depth at which an earlier breach counts as recovered.
    pub slo_spill_depth: u64,
    /// Spill depth that is a breach.
    pub slo_spill_depth_alert: u64,
    /// Longest time from a link that is back to an empty spill.
    pub slo_flush_latency: Duration,
}

impl EmitterConfig {
    /// Checks every setting.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] naming the setting, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        if self.spill_path.as_os_str().is_empty() {
            return Err(refused("spill_path", "''", "the path of a file"));
        }
        if let Some(id) = &self.emitter_id {
            let fine = !id.is_empty() && id.len() <= 256 && !id.chars().any(char::is_control);
            require(fine, "emitter_id", format!("{id:?}"), "1 to 256 printable characters")?;
        }
        require(self.outbox_bytes >= 64 << 10, "outbox_bytes", self.outbox_bytes, "at least 65536")?;
        require(self.spill_max_events >= 1, "spill_max_events", self.spill_max_events, "at least 1")?;
        require(self.spill_max_bytes >= 4096, "spill_max_bytes", self.spill_max_bytes, "at least 4096")?;
        require(self.poison_tries >= 1, "poison_tries", self.poison_tries, "at least 1")?;
        require(self.parked_max_events >= 1, "parked_max_events", self.parked_max_events, "at least 1")?;
        require(self.parked_max_bytes >= 4096, "parked_max_bytes", self.parked_max_bytes, "at least 4096")?;
        let growth = self.backoff_multiplier;
        require((1.0..=100.0).contains(&growth), "backoff_multiplier", growth, "1 to 100")?;
        require((0.0..=1.0).contains(&self.jitter), "jitter", self.jitter, "0 to 1")?;
        let (first, most) = (self.backoff_initial, self.backoff_max);
        require(!first.is_zero(), "backoff_initial", first.as_secs_f64(), "more than 0 seconds")?;
        require(most >= first, "backoff_max", most.as_secs_f64(), "at least backoff_initial")?;
        for (name, time) in [
            ("connect_timeout", self.connect_timeout),
            ("ack_timeout", self.ack_timeout),
            ("ping_interval", self.ping_interval),
            ("breaker_cooldown", self.breaker_cooldown),
            ("report_interval", self.report_interval),
            ("slo_flush_latency", self.slo_flush_latency),
        ] {
            require(!time.is_zero(), name, time.as_secs_f64(), "more than 0 seconds")?;
        }
        if let Some(age) = self.spill_max_age {
            require(!age.is_zero(), "spill_max_age", age.as_secs_f64(), "more than 0 seconds, or None")?;
        }
        require(self.breaker_threshold >= 1, "breaker_threshold", self.breaker_threshold, "at least 1")?;
        let (event, outbox) = (self.max_event_bytes, self.outbox_bytes);
        require((2..=outbox).contains(&event), "max_event_bytes", event, "2 to outbox_bytes")?;
        if let Some(rate) = self.flush_rate {
            require(rate.is_finite() && rate > 0.0, "flush_rate", rate, "more than 0 events per second, or None")?;
        }
        let share = self.slo_emit_success_rate;
        require((0.0..=1.0).contains(&share), "slo_emit_success_rate", share, "0 to 1")?;
        let (calm, alert) = (self.slo_spill_depth, self.slo_spill_depth_alert);
        require(alert >= calm, "slo_spill_depth_alert", alert, "at least slo_spill_depth")?;
        for (name, value) in &self.headers {
            let fine = http_name(name) && !value.contains(['\r', '\n', '\0']);
            require(fine, "headers", format!("{name:?}"), "HTTP header names, and values without line breaks")?;
        }
        let fine = self.token.as_ref().is_none_or(|t| !t.is_empty() && !t.contains(['\r', '\n', '\0']));
        require(fine, "token", "(hidden)", "a text without line breaks, or None")
    }
}

fn http_name(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b))
}

fn refused(setting: &str, value: impl std::fmt::Display, allowed: &str) -> Error {
    Error::new(ErrorKind::Config, format!("{setting}={value} is not allowed: give {allowed}"))
}

fn require(fine: bool, setting: &str, value: impl std::fmt::Display, allowed: &str) -> Result<()> {
    if fine { Ok(()) } else { Err(refused(setting, value, allowed)) }
}
