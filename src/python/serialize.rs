//! Events to JSON. orjson does it (datetime, UUID, dataclass, enum and numpy come with it); what it would change
//! silently is refused: NaN and infinities, which it writes as `null`.

use std::sync::LazyLock;

use memchr::memmem::Finder;
use pyo3::exceptions::PyTypeError;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBool, PyBytes, PyDict, PyFloat, PyInt, PyList, PyString};

use crate::error::{Error, ErrorKind};

struct Orjson {
    dumps: Py<PyAny>,
    options: Py<PyAny>,
}

static ORJSON: PyOnceLock<Orjson> = PyOnceLock::new();
static NULL: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("null"));

/// The event as JSON, in a `bytes` object of Python's.
pub(super) fn serialize<'py>(py: Python<'py>, event: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
    if !event.is_instance_of::<PyDict>() {
        return serialize(py, as_dict(py, event)?.as_any());
    }
    let orjson = ORJSON.get_or_try_init(py, || -> PyResult<Orjson> {
        let module = py.import("orjson")?;
        let options = module.getattr("OPT_SERIALIZE_NUMPY")?.unbind();
        Ok(Orjson { dumps: module.getattr("dumps")?.unbind(), options })
    })?;
    let json = orjson.dumps.bind(py).call1((event, py.None(), &orjson.options));
    let json = json.map_err(|error| refused(py, &error))?.cast_into::<PyBytes>()?;
    if NULL.find(json.as_bytes()).is_some() && !is_plain_and_finite(event) {
        // Somewhere is `null`, and perhaps something that Python's side has to look into.
        py.import("safe_broadcaster.serialize")?.call_method1(intern!(py, "refuse_nonfinite"), (event,))?;
    }
    Ok(json)
}

/// The same for the hub's side of Python.
#[pyfunction]
#[pyo3(name = "serialize", signature = (event, /))]
pub(super) fn serialize_event<'py>(py: Python<'py>, event: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
    serialize(py, event)
}

fn as_dict<'py>(py: Python<'py>, event: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
    let mapping = py.import("collections.abc")?.getattr("Mapping")?;
    if event.is_instance(&mapping)? {
        return py.get_type::<PyDict>().call1((event,));
    }
    let text = format!("an event is a mapping, not {}", event.get_type().qualname()?);
    Err(Error::new(ErrorKind::EventNotSerializable, text).into())
}

/// Our exception, with orjson's as its cause.
fn refused(py: Python<'_>, cause: &PyErr) -> PyErr {
    if !cause.is_instance_of::<PyTypeError>(py) {
        return cause.clone_ref(py); // KeyboardInterrupt, MemoryError: not the event's fault
    }
    let error =
        Error::new(ErrorKind::EventNotSerializable, format!("the event cannot be sent as JSON: {}", cause.value(py)));
    let error = PyErr::from(error);
    error.set_cause(py, Some(cause.clone_ref(py)));
    error
}

/// Whether everything in here is of an exact basic type and every float is finite. The depth is bounded: orjson has
/// been through it.
fn is_plain_and_finite(value: &Bound<'_, PyAny>) -> bool {
    if let Ok(float) = value.cast_exact::<PyFloat>() {
        float.value().is_finite()
    } else if let Ok(dict) = value.cast_exact::<PyDict>() {
        dict.iter().all(|(_, value)| is_plain_and_finite(&value))
    } else if let Ok(list) = value.cast_exact::<PyList>() {
        list.iter().all(|value| is_plain_and_finite(&value))
    } else {
        value.is_none()
            || value.is_exact_instance_of::<PyString>()
            || value.is_exact_instance_of::<PyInt>()
            || value.is_exact_instance_of::<PyBool>()
    }
}
