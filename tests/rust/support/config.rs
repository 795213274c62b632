//! Settings for tests of the emitter, beside the code and here; each test changes what it is about.

use std::time::Duration;

use safe_broadcaster::emitter::config::{Durability, EmitterConfig, WhenFull};

pub(crate) fn config() -> EmitterConfig {
    let second = Duration::from_secs(1);
    EmitterConfig {
        spill_path: "unused.db".into(),
        durability: Durability::Memory,
        emitter_id: None,
        outbox_bytes: 1 << 20,
        spill_max_events: 100_000,
        spill_max_bytes: 1 << 30,
        spill_max_age: None,
        when_full: WhenFull::DropOldest,
        poison_tries: 3,
        parked_max_events: 1000,
        parked_max_bytes: 64 << 20,
        backoff_initial: second,
        backoff_max: 30 * second,
        backoff_multiplier: 2.0,
        jitter: 0.5,
        connect_timeout: 10 * second,
        ack_timeout: 30 * second,
        ping_interval: 20 * second,
        breaker_threshold: 5,
        breaker_cooldown: 30 * second,
        report_interval: second,
        max_event_bytes: 1 << 20,
        headers: Vec::new(),
        token: None,
        ssl_ca: None,
        stamp: false,
        flush_rate: None,
        slo_emit_success_rate: 0.99,
        slo_spill_depth: 100,
        slo_spill_depth_alert: 1000,
        slo_flush_latency: 5 * second,
    }
}
