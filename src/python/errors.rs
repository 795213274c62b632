//! One way from the core's error to Python's exceptions. The classes live in `safe_broadcaster/exceptions.py`; a name
//! missing there would abort the process at first use, so a test imports every one.

use pyo3::prelude::*;

use crate::error::{Error, ErrorKind};

mod exceptions {
    use pyo3::import_exception;
    import_exception!(safe_broadcaster.exceptions, BroadcastError);
    import_exception!(safe_broadcaster.exceptions, BroadcasterClosed);
    import_exception!(safe_broadcaster.exceptions, BusUnavailable);
    import_exception!(safe_broadcaster.exceptions, ConfigError);
    import_exception!(safe_broadcaster.exceptions, ConnectRefused);
    import_exception!(safe_broadcaster.exceptions, ConnectTimeout);
    import_exception!(safe_broadcaster.exceptions, EventNotSerializable);
    import_exception!(safe_broadcaster.exceptions, EventRefused);
    import_exception!(safe_broadcaster.exceptions, EventTooLarge);
    import_exception!(safe_broadcaster.exceptions, ForkedProcess);
    import_exception!(safe_broadcaster.exceptions, SpillCorrupt);
    import_exception!(safe_broadcaster.exceptions, SpillFull);
    import_exception!(safe_broadcaster.exceptions, SpillLocked);
}
use exceptions as py;

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        let text = error.report();
        match error.kind() {
            ErrorKind::Config => py::ConfigError::new_err(text),
            ErrorKind::EventNotSerializable => py::EventNotSerializable::new_err(text),
            ErrorKind::EventTooLarge => py::EventTooLarge::new_err(text),
            ErrorKind::EventRefused => py::EventRefused::new_err(text),
            ErrorKind::SpillFull => py::SpillFull::new_err(text),
            ErrorKind::SpillLocked | ErrorKind::LogLocked => py::SpillLocked::new_err(text),
            ErrorKind::SpillCorrupt | ErrorKind::SpillIo | ErrorKind::LogCorrupt | ErrorKind::LogIo => {
                py::SpillCorrupt::new_err(text)
            }
            ErrorKind::BusDown | ErrorKind::BusRefused => py::BusUnavailable::new_err(text),
            ErrorKind::ConnectTimeout => py::ConnectTimeout::new_err(text),
            ErrorKind::ConnectRefused | ErrorKind::FrameRefused | ErrorKind::Bind => py::ConnectRefused::new_err(text),
            ErrorKind::Protocol | ErrorKind::NotAllowed => py::BroadcastError::new_err(text),
            ErrorKind::Closed => py::BroadcasterClosed::new_err(text),
            ErrorKind::Forked => py::ForkedProcess::new_err(text),
        }
    }
}

/// The exception object itself, for a completion that is an error.
pub(super) fn exception(py: Python<'_>, error: Error) -> Py<PyAny> {
    PyErr::from(error).into_value(py).into_any()
}
