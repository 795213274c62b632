//! Reads single settings from a dataclass; what is wrong is told by name, value and what is allowed.

use std::time::Duration;

use pyo3::conversion::FromPyObjectOwned;
use pyo3::prelude::*;

use crate::error::{Error, ErrorKind, Result};

/// Settings that must not appear in an error.
const HIDDEN: &[&str] = &["token", "auth", "secret", "redis_url"];
/// Longest time taken: beyond any use, and far from the limits of clocks.
const MAX_SECONDS: f64 = 4e9;

/// A dataclass with one attribute for each setting.
pub(super) struct Settings<'a, 'py>(pub(super) &'a Bound<'py, PyAny>);

impl Settings<'_, '_> {
    pub(super) fn get<T: for<'p> FromPyObjectOwned<'p>>(&self, name: &str, allowed: &str) -> Result<T> {
        let value = self.0.getattr(name).map_err(|_| refused(name, "missing", allowed))?;
        value.extract::<T>().map_err(|_| refused(name, &repr(name, &value), allowed))
    }

    pub(super) fn seconds(&self, name: &str) -> Result<Duration> {
        let seconds = self.get::<f64>(name, "a number of seconds")?;
        if (0.0..=MAX_SECONDS).contains(&seconds) {
            return Ok(Duration::from_secs_f64(seconds));
        }
        Err(refused(name, &seconds.to_string(), "a number of seconds from 0 to 4 000 000 000"))
    }

    pub(super) fn optional_seconds(&self, name: &str) -> Result<Option<Duration>> {
        match self.get::<Option<f64>>(name, "a number of seconds, or None")? {
            Some(_) => self.seconds(name).map(Some),
            None => Ok(None),
        }
    }
}

fn repr(name: &str, value: &Bound<'_, PyAny>) -> String {
    if HIDDEN.contains(&name) {
        return "(hidden)".to_owned();
    }
    value.repr().map_or_else(|_| "(unprintable)".to_owned(), |text| text.to_string())
}

pub(super) fn refused(name: &str, value: &str, allowed: &str) -> Error {
    Error::new(ErrorKind::Config, format!("{name}={value} is not allowed: give {allowed}"))
}
