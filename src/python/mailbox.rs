//! The only door between Rust threads and Python. Rust pushes letters; one byte makes a file descriptor readable;
//! the event loop drains the whole batch. So no Rust thread ever waits for the GIL, none can crash an interpreter
//! that is going away, and a thousand completions cost one wake-up (`docs/decisions/0001-mailbox.md`).

use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use parking_lot::Mutex;
use pyo3::prelude::*;
use pyo3::types::PyList;

use crate::error::ErrorKind;
use crate::error::{Error, Result};

/// What a letter holds; becomes a Python object when it is drained.
pub(super) enum Body {
    /// `None`.
    Unit,
    /// An exception object.
    Failed(Error),
    /// Anything else; the closure runs in the draining thread, which holds the GIL.
    Make(Maker),
}

/// Builds a Python object in the thread that drains.
pub(super) type Maker = Box<dyn FnOnce(Python<'_>) -> PyResult<Py<PyAny>> + Send>;

/// The Rust end of a mailbox; cloning shares it.
#[derive(Clone)]
pub(super) struct Sender(Arc<Slot>);

struct Slot {
    /// `None` when nobody will read them: the event loop is gone.
    letters: Mutex<Option<Vec<(u64, Body)>>>,
    bell: UnixStream,
}

impl Sender {
    /// Leaves a letter for the handler registered under `token`. Never blocks, never touches Python.
    pub(super) fn push(&self, token: u64, body: Body) {
        self.push_within(usize::MAX, token, body);
    }

    /// The same for letters that nobody waits for: given up if so many lie there, because the loop is closed or stuck.
    pub(super) fn push_within(&self, limit: usize, token: u64, body: Body) {
        let mut slot = self.0.letters.lock();
        let Some(letters) = &mut *slot else { return };
        if letters.len() >= limit {
            return;
        }
        let first = letters.is_empty();
        letters.push((token, body));
        drop(slot);
        if first {
            // An error means that the bell is full, so it rings already, or that nobody listens any more: both are fine.
            drop((&self.0.bell).write_all(&[1]));
        }
    }
}

/// A queue of letters with a file descriptor that is readable while there are any. Python's side is
/// `safe_broadcaster/mailbox.py`.
#[pyclass(frozen, module = "safe_broadcaster._core")]
pub(super) struct Mailbox {
    sender: Sender,
    reader: UnixStream,
}

impl Mailbox {
    pub(super) fn sender(&self) -> Sender {
        self.sender.clone()
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        // Whoever still holds a sender must not fill the memory of a process that has no reader.
        drop(self.sender.0.letters.lock().take());
    }
}

#[pymethods]
impl Mailbox {
    #[new]
    fn new() -> Result<Self> {
        let failed =
            |error| Error::new(ErrorKind::Bind, "cannot make a socket pair for the mailbox").with_source(error);
        let (reader, bell) = UnixStream::pair().map_err(failed)?;
        reader.set_nonblocking(true).map_err(failed)?;
        bell.set_nonblocking(true).map_err(failed)?;
        Ok(Self { sender: Sender(Arc::new(Slot { letters: Mutex::new(Some(Vec::new())), bell })), reader })
    }

    /// The descriptor to watch for readability.
    fn fileno(&self) -> i32 {
        self.reader.as_raw_fd()
    }

    /// All letters so far as `(token, value)`; errors come as exception objects.
    fn drain<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        // The bell first: a letter pushed after the swap rings again.
        let mut bell = [0; 64];
        while matches!((&self.reader).read(&mut bell), Ok(n) if n == bell.len()) {}
        let letters = self.sender.0.letters.lock().as_mut().map(std::mem::take).unwrap_or_default();
        let out = PyList::empty(py);
        for (token, body) in letters {
            let value = match body {
                Body::Unit => py.None(),
                Body::Failed(error) => super::errors::exception(py, error),
                Body::Make(make) => make(py)?,
            };
            out.append((token, value))?;
        }
        Ok(out)
    }
}
