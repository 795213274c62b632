//! The binding: the only room that names pyo3. Rust threads never attach to Python from here or anywhere; what they
//! have to say waits in a [`mailbox`](mailbox::Mailbox) until the event loop drains it.

mod config;
mod emitter;
mod errors;
mod hub;
mod mailbox;
mod ready;
mod serialize;
mod settings;
mod spill;

use pyo3::prelude::*;

/// Called in a forked child, before any Python code runs there.
#[pyfunction]
fn _after_fork_in_child() {
    crate::runtime::forked();
}

#[pymodule(gil_used = true)]
fn _core(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("_debug_build", cfg!(debug_assertions))?;
    module.add_class::<emitter::Emitter>()?;
    module.add_class::<mailbox::Mailbox>()?;
    module.add_class::<hub::Hub>()?;
    module.add_class::<hub::HubClient>()?;
    module.add_function(wrap_pyfunction!(serialize::serialize_event, module)?)?;
    module.add_function(wrap_pyfunction!(spill::spill_show, module)?)?;
    module.add_function(wrap_pyfunction!(spill::spill_verify, module)?)?;
    module.add_function(wrap_pyfunction!(spill::spill_events, module)?)?;
    module.add_function(wrap_pyfunction!(spill::spill_requeue, module)?)?;
    module.add_function(wrap_pyfunction!(_after_fork_in_child, module)?)?;
    Ok(())
}
