//! A look at a spill from another process than its owner's, for `safe-broadcaster spill`.

#![expect(clippy::needless_pass_by_value, reason = "pyo3 hands over what it has extracted")]

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};

use crate::emitter::spill::inspect;
use crate::error::Result;

/// What a spill holds, as JSON.
#[pyfunction]
pub(super) fn spill_show(py: Python<'_>, path: PathBuf) -> Result<Bound<'_, PyBytes>> {
    let summary = py.detach(|| inspect::show(&path))?;
    Ok(PyBytes::new(py, &serde_json::to_vec(&summary).unwrap_or_default())) // strings and numbers only: cannot fail
}

/// What is wrong with a spill.
#[pyfunction]
pub(super) fn spill_verify(py: Python<'_>, path: PathBuf) -> Result<Vec<String>> {
    py.detach(|| inspect::verify(&path))
}

/// Events behind a key, each with its own.
#[pyfunction]
pub(super) fn spill_events(
    py: Python<'_>,
    path: PathBuf,
    parked: bool,
    after: u64,
    max_bytes: usize,
) -> PyResult<Bound<'_, PyList>> {
    let events = py.detach(|| inspect::events(&path, parked, after, max_bytes))?;
    PyList::new(py, events.into_iter().map(|(key, json)| (key, PyBytes::new(py, &json))).collect::<Vec<_>>())
}

/// Marks parked events to be sent again; returns how many.
#[pyfunction]
#[pyo3(signature = (path, seqs))]
pub(super) fn spill_requeue(py: Python<'_>, path: PathBuf, seqs: Option<Vec<u64>>) -> Result<u64> {
    py.detach(|| inspect::requeue(&path, seqs.as_deref()))
}
