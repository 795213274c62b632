//! Settings cross once: the frozen dataclass `EmitterConfig` becomes the core's struct of the same fields.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use pyo3::conversion::FromPyObjectOwned;
use pyo3::prelude::*;

use crate::emitter::config::{Durability, EmitterConfig, WhenFull};
use crate::error::{Error, ErrorKind, Result};

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
        "delivered" => Ok(Durability::Delivered),
        "process" | "power" => {
            let text = format!("durability='{name}' is not available yet: give 'memory' or 'delivered'");
            Err(Error::new(ErrorKind::Config, text))
        }
        _ => Err(refused("durability", &format!("'{name}'"), "'memory' or 'delivered'")),
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

struct Settings<'a, 'py>(&'a Bound<'py, PyAny>);

impl Settings<'_, '_> {
    fn get<T: for<'p> FromPyObjectOwned<'p>>(&self, name: &str, allowed: &str) -> Result<T> {
        let missing = |_| refused(name, "missing", allowed);
        let value = self.0.getattr(name).map_err(missing)?;
        value.extract::<T>().map_err(|_| refused(name, &repr(name, &value), allowed))
    }

    fn seconds(&self, name: &str) -> Result<Duration> {
        let allowed = "a number of seconds";
        let seconds = self.get::<f64>(name, allowed)?;
        Duration::try_from_secs_f64(seconds)
            .ok()
            .filter(|time| time.as_secs() < 1 << 32)
            .ok_or_else(|| refused(name, &seconds.to_string(), "a number of seconds from 0 to 4 000 000 000"))
    }

    fn optional_seconds(&self, name: &str) -> Result<Option<Duration>> {
        match self.get::<Option<f64>>(name, "a number of seconds, or None")? {
            Some(_) => self.seconds(name).map(Some),
            None => Ok(None),
        }
    }
}

fn repr(name: &str, value: &Bound<'_, PyAny>) -> String {
    if name == "token" {
        return "(hidden)".to_owned();
    }
    value.repr().map_or_else(|_| "(unprintable)".to_owned(), |text| text.to_string())
}

fn refused(name: &str, value: &str, allowed: &str) -> Error {
    Error::new(ErrorKind::Config, format!("{name}={value} is not allowed: give {allowed}"))
}
