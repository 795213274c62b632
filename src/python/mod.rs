//! The binding: the only room that names pyo3. Rust threads never attach to Python from here or anywhere; what they
//! have to say waits in a [`mailbox`](mailbox::Mailbox) until the event loop drains it.

mod auth;
mod config;
mod doors;
mod emitter;
mod errors;
mod hub;
mod mailbox;
mod ready;
mod serialize;
mod settings;
mod spill;

use std::sync::atomic::{AtomicUsize, Ordering};

use pyo3::exceptions::PyImportError;
use pyo3::prelude::*;

/// Exception classes and runtimes are shared by the whole process: an interpreter beside the first would raise classes
/// that its own `except` does not know.
fn refuse_second_interpreter(py: Python<'_>) -> PyResult<()> {
    static FIRST: AtomicUsize = AtomicUsize::new(0);
    let this = py.import("sys")?.getattr("modules")?.as_ptr() as usize; // each interpreter has its own
    match FIRST.compare_exchange(0, this, Ordering::Relaxed, Ordering::Relaxed) {
        Err(first) if first != this => Err(PyImportError::new_err(
            "safe_broadcaster works in one interpreter of a process; use it there, or in a process of its own",
        )),
        _ => Ok(()),
    }
}

#[pymodule(gil_used = true)]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    refuse_second_interpreter(module.py())?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("_debug_build", cfg!(debug_assertions))?;
    module.add_class::<emitter::Emitter>()?;
    module.add_class::<mailbox::Mailbox>()?;
    module.add_class::<hub::Hub>()?;
    module.add_class::<hub::HubClient>()?;
    module.add_class::<doors::HubSession>()?;
    module.add_class::<doors::HubExchange>()?;
    module.add_function(wrap_pyfunction!(doors::matches, module)?)?;
    module.add_class::<auth::AuthDesk>()?;
    module.add_function(wrap_pyfunction!(serialize::serialize_event, module)?)?;
    module.add_function(wrap_pyfunction!(spill::spill_show, module)?)?;
    module.add_function(wrap_pyfunction!(spill::spill_verify, module)?)?;
    module.add_function(wrap_pyfunction!(spill::spill_events, module)?)?;
    module.add_function(wrap_pyfunction!(spill::spill_requeue, module)?)?;
    crate::inherited::watch_forks();
    Ok(())
}
