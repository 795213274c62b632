//! Carries events from programs to live dashboards without losing one silently.
//!
//! Two halves that meet only in [`wire`]: the emitter (outbox, spill, delivery machine, link) and the hub (listener,
//! sessions, log, fan-out). `python` is the binding and the only room that names pyo3. `ARCHITECTURE.md` is the map.

// By the name that tests in `tests/` know, with whom those beside the code share their settings.
#[cfg(test)]
extern crate self as safe_broadcaster;

pub mod backoff;
pub mod breaker;
mod clock;
pub mod emitter;
pub mod error;
pub mod hub;
pub mod inherited;
pub mod local;
mod owned;
pub mod runtime;
pub mod secret;
mod sqlite;
pub mod wire;

#[cfg(feature = "python")]
mod python;

pub use error::{Error, ErrorKind, Result};
