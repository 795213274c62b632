//! Settings cross once: the frozen dataclasses `EmitterConfig` and `HubConfig` become the core's structs of the same
//! fields.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use pyo3::prelude::*;

use super::auth::{AuthDesk, auth};
use super::settings::{Settings, refused};
use crate::emitter::config::{Durability, EmitterConfig, WhenFull};
use crate::error::Result;
use crate::hub::HubConfig;
use crate::hub::bridge::redis::RedisConfig;
use crate::hub::bridge::{BridgeConfig, BusConfig, BusDown};
use crate::secret::Secret;
use crate::wire::subscriber::{Slow, Wrapping};
use crate::wire::topic::Pattern;

/// Reads the attributes of the dataclass.
pub(super) fn emitter_config(source: &Bound<'_, PyAny>, spill_path: PathBuf) -> Result<EmitterConfig> {
    let settings = Settings(source);
    Ok(EmitterConfig {
        spill_path,
        durability: durability(&settings.get::<String>("durability", "a text")?)?,
        emitter_id: settings.get("emitter_id", "a text, or None")?,
        outbox_bytes: settings.get("outbox_bytes", "a whole number of bytes")?,
        spill_max_events: settings.get("spill_max_events", "a whole number of events")?,
        spill_max_bytes: settings.get("spill_max_bytes", "a whole number of bytes")?,
        spill_max_age: settings.optional_seconds("spill_max_age")?,
        when_full: when_full(&settings.get::<String>("when_full", "a text")?)?,
        poison_tries: settings.get("poison_tries", "a whole number, at least 1")?,
        parked_max_events: settings.get("parked_max_events", "a whole number of events")?,
        parked_max_bytes: settings.get("parked_max_bytes", "a whole number of bytes")?,
        backoff_initial: settings.seconds("backoff_initial")?,
        backoff_max: settings.seconds("backoff_max")?,
        backoff_multiplier: settings.get("backoff_multiplier", "a number")?,
        jitter: settings.get("jitter", "a number from 0 to 1")?,
        connect_timeout: settings.seconds("connect_timeout")?,
        ack_timeout: settings.seconds("ack_timeout")?,
        ping_interval: settings.seconds("ping_interval")?,
        breaker_threshold: settings.get("breaker_threshold", "a whole number, at least 1")?,
        breaker_cooldown: settings.seconds("breaker_cooldown")?,
        report_interval: settings.seconds("report_interval")?,
        max_event_bytes: settings.get("max_event_bytes", "a whole number of bytes")?,
        headers: settings.get::<HashMap<String, String>>("headers", "a mapping of texts")?.into_iter().collect(),
        token: settings.get("token", "a text, or None")?,
        ssl_ca: settings.get("ssl_ca", "the path of a PEM file, or None")?,
        stamp: settings.get("stamp", "True or False")?,
        flush_rate: settings.get("flush_rate", "events per second, or None")?,
        slo_emit_success_rate: settings.get("slo_emit_success_rate", "a number from 0 to 1")?,
        slo_spill_depth: settings.get("slo_spill_depth", "a whole number of events")?,
        slo_spill_depth_alert: settings.get("slo_spill_depth_alert", "a whole number of events")?,
        slo_flush_latency: settings.seconds("slo_flush_latency")?,
    })
}

/// A level by its name.
pub(super) fn durability(name: &str) -> Result<Durability> {
    match name {
        "memory" => Ok(Durability::Memory),
        "process" => Ok(Durability::Process),
        "power" => Ok(Durability::Power),
        "delivered" => Ok(Durability::Delivered),
        _ => Err(refused("durability", &format!("'{name}'"), "'memory', 'process', 'power' or 'delivered'")),
    }
}

/// Its name.
pub(super) fn name_of(level: Durability) -> &'static str {
    match level {
        Durability::Memory => "memory",
        Durability::Process => "process",
        Durability::Power => "power",
        Durability::Delivered => "delivered",
    }
}

fn when_full(name: &str) -> Result<WhenFull> {
    match name {
        "drop_oldest" => Ok(WhenFull::DropOldest),
        "drop_newest" => Ok(WhenFull::DropNewest),
        "wait" => Ok(WhenFull::Wait),
        "raise" => Ok(WhenFull::Raise),
        _ => Err(refused("when_full", &format!("'{name}'"), "'drop_oldest', 'drop_newest', 'wait' or 'raise'")),
    }
}

fn slow(name: &str) -> Result<Slow> {
    let known = Slow::ALL.into_iter().find(|(known, _)| *known == name);
    known
        .map(|(_, slow)| slow)
        .ok_or_else(|| refused("slow", &format!("'{name}'"), "'disconnect', 'conflate' or 'drop_with_gap'"))
}

fn envelope(name: &str) -> Result<Wrapping> {
    let known = Wrapping::ALL.into_iter().find(|(known, _)| *known == name);
    known.map(|(_, wrapping)| wrapping).ok_or_else(|| refused("envelope", &format!("'{name}'"), "'event' or 'raw'"))
}

fn entity_keys(settings: &Settings<'_, '_>) -> Result<Vec<(String, String)>> {
    let keys: HashMap<String, String> = settings.get("entity_keys", "a mapping of texts")?;
    Ok(keys.into_iter().collect())
}

/// Reads the attributes of the dataclass.
pub(super) fn hub_config(source: &Bound<'_, PyAny>, desk: Option<&AuthDesk>) -> Result<HubConfig> {
    let settings = Settings(source);
    let bytes = "a whole number of bytes";
    Ok(HubConfig {
        host: settings.get("host", "a text")?,
        port: settings.get("port", "a whole number from 0 to 65535")?,
        replay_events: settings.get("replay_events", "a whole number of events")?,
        replay_bytes: settings.get("replay_bytes", bytes)?,
        replay_age: settings.optional_seconds("replay_age")?,
        log_path: settings.get("log_path", "a path, or None")?,
        bridge: bridge(&settings)?,
        session_queue_bytes: settings.get("session_queue_bytes", bytes)?,
        slow: slow(&settings.get::<String>("slow", "a text")?)?,
        envelope: envelope(&settings.get::<String>("envelope", "a text")?)?,
        compression_threshold: settings.get("compression_threshold", "a whole number of bytes, or None")?,
        max_message_bytes: settings.get("max_message_bytes", bytes)?,
        max_sessions: settings.get("max_sessions", "a whole number of sessions")?,
        max_sessions_per_address: settings.get("max_sessions_per_address", "a whole number of sessions, or None")?,
        connect_rate: settings.get("connect_rate", "sessions per second")?,
        frame_rate: settings.get("frame_rate", "frames per second")?,
        max_subscriber_message_bytes: settings.get("max_subscriber_message_bytes", bytes)?,
        auth: auth(source, desk)?,
        tls_cert: settings.get("tls_cert", "a path, or None")?,
        tls_key: settings.get("tls_key", "a path, or None")?,
        auth_timeout: settings.seconds("auth_timeout")?,
        allowed_origins: settings.get("allowed_origins", "a sequence of texts")?,
        requires_ack: patterns("requires_ack", &settings.get::<Vec<String>>("requires_ack", "a sequence of texts")?)?,
        entity_keys: entity_keys(&settings)?,
        presence_events: patterns(
            "presence_events",
            &settings.get::<Vec<String>>("presence_events", "a sequence of texts")?,
        )?,
        presence_late: settings.seconds("presence_late")?,
        presence_dead: settings.seconds("presence_dead")?,
        ping_interval: settings.seconds("ping_interval")?,
        page: settings.get("page", "a text")?,
    })
}

/// Most that Redis is left alone while the breaker is open: it may be back any moment.
const BRIDGE_COOLDOWN: Duration = Duration::from_secs(5);

fn bridge(settings: &Settings<'_, '_>) -> Result<Option<BridgeConfig>> {
    let Some(url) = settings.get::<Option<String>>("redis_url", "a redis:// URL, or None")? else { return Ok(None) };
    let channel = settings.get::<String>("channel_name", "a text")?;
    let probe_interval = settings.seconds("probe_interval")?;
    let redis = RedisConfig {
        url: Secret::new(url),
        channel,
        ca: settings.get("redis_ca", "a path, or None")?,
        keep: settings.get("replay_events", "a whole number of events")?,
        keep_bytes: settings.get("replay_bytes", "a whole number of bytes")?,
        keep_age: settings.optional_seconds("replay_age")?,
        probe_interval,
    };
    Ok(Some(BridgeConfig {
        bus_down: bus_down(&settings.get::<String>("bus_down", "a text")?)?,
        bus_timeout: settings.seconds("bus_timeout")?,
        probe_interval,
        max_recovery_attempts: settings.get("max_recovery_attempts", "a whole number, at least 1")?,
        breaker_cooldown: settings.seconds("breaker_cooldown")?.min(BRIDGE_COOLDOWN),
        bus: BusConfig::Redis(redis),
    }))
}

fn bus_down(name: &str) -> Result<BusDown> {
    match name {
        "wait" => Ok(BusDown::Wait),
        "local" => Ok(BusDown::Local),
        _ => Err(refused("bus_down", &format!("'{name}'"), "'wait' or 'local'")),
    }
}

/// Patterns of a setting.
pub(super) fn patterns(setting: &str, texts: &[String]) -> Result<Vec<Pattern>> {
    let parse = |text: &String| {
        Pattern::parse(text).map_err(|error| refused(setting, &format!("'{text}'"), &error.to_string()))
    };
    texts.iter().map(parse).collect()
}
