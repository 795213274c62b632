//! The hub as Python sees it: a slot that a running hub is put into, so that a client handed out before the start, or
//! kept over a restart, finds whichever hub runs when it dials.

use std::io;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::auth::AuthDesk;
use super::doors::{self, Fields, HubExchange};
use super::mailbox::{Body, Mailbox};
use crate::error::{Error, ErrorKind, Result};
use crate::hub;
use crate::local::Dialer;

type Slot = Arc<Mutex<Option<Arc<hub::Hub>>>>;

/// A hub that can be started, stopped and started again. Python's side is `safe_broadcaster/hub.py`.
#[pyclass(frozen, module = "safe_broadcaster._core")]
#[derive(Default)]
pub(super) struct Hub {
    slot: Slot,
    /// The start that is under way.
    starting: Mutex<Option<hub::Abort>>,
}

/// The way to a hub of the same process, without a socket.
#[pyclass(frozen, module = "safe_broadcaster._core")]
pub(super) struct HubClient {
    pub(super) dialer: Dialer,
}

fn not_running() -> Error {
    Error::new(ErrorKind::Closed, "the hub is not running; start it first")
}

impl Hub {
    fn current(&self) -> Option<Arc<hub::Hub>> {
        self.slot.lock().clone()
    }

    /// Ends a start that is under way; whether there was one.
    fn end_start(&self) -> bool {
        let starting = self.starting.lock().take();
        if let Some(abort) = &starting {
            abort.order();
        }
        starting.is_some()
    }
}

#[pymethods]
impl Hub {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    /// Starts a hub with the attributes of a `HubConfig`, whose `auth` is reached through the desk if it is a function; its port accepts connections when this returns.
    #[pyo3(signature = (config, auth_desk=None))]
    fn start(&self, py: Python<'_>, config: &Bound<'_, PyAny>, auth_desk: Option<&AuthDesk>) -> Result<u16> {
        let config = super::config::hub_config(config, auth_desk)?;
        let abort = hub::Abort::default();
        if let Some(earlier) = self.starting.lock().replace(abort.clone()) {
            earlier.order(); // it has failed: Python has one start at a time
        }
        let hub = py.detach(|| hub::Hub::start_unless(config, &abort))?;
        let port = hub.port();
        let mut starting = self.starting.lock();
        if abort.is_ordered() {
            return Err(Error::new(ErrorKind::Closed, "the hub was stopped while it started")); // dropping it stops it
        }
        *starting = None;
        *self.slot.lock() = Some(Arc::new(hub));
        Ok(port)
    }

    /// Nobody waits for a start any more: one that is under way ends, a hub that has started meanwhile is stopped.
    fn abort_start(&self) {
        if !self.end_start()
            && let Some(hub) = self.current()
        {
            hub.stop_then(|| {});
        }
    }

    /// Begins to stop; a letter under `token` tells the end of it.
    fn stop(&self, mailbox: &Mailbox, token: u64) {
        self.end_start();
        let sender = mailbox.sender();
        let done = move || sender.push(token, Body::Unit);
        match self.current() {
            Some(hub) => hub.stop_then(done),
            None => done(),
        }
    }

    /// Publishes an event given as JSON; returns its offset and how many sessions it matched.
    fn publish(&self, py: Python<'_>, json: &[u8]) -> Result<(u64, usize)> {
        let Some(hub) = self.current() else { return Err(not_running()) };
        let json = Bytes::copy_from_slice(json);
        let published = py.detach(|| hub.publish(json))?;
        Ok((published.offset, published.sessions))
    }

    /// Publishes an event given as JSON without waiting for the disk; a letter under `token` brings what
    /// [`Hub::publish`] returns.
    fn publish_later(&self, mailbox: &Mailbox, token: u64, json: &[u8]) -> Result<()> {
        let Some(hub) = self.current() else { return Err(not_running()) };
        let sender = mailbox.sender();
        hub.publish_then(Bytes::copy_from_slice(json), move |published| {
            sender.push(
                token,
                match published {
                    Ok(published) => Body::Make(Box::new(move |py| {
                        Ok((published.offset, published.sessions).into_pyobject(py)?.into_any().unbind())
                    })),
                    Err(error) => Body::Failed(error),
                },
            );
        });
        Ok(())
    }

    /// The numbers of the hub as JSON; `None` before the first start.
    fn stats<'py>(&self, py: Python<'py>) -> Result<Option<Bound<'py, PyBytes>>> {
        let Some(hub) = self.current() else { return Ok(None) };
        hub.check_process()?;
        let json = py.detach(|| hub.stats().to_json());
        Ok(Some(PyBytes::new(py, &json)))
    }

    /// Whether new connections are accepted.
    fn is_listening(&self) -> bool {
        self.current().is_some_and(|hub| hub.is_listening())
    }

    /// Lets a client in whose socket another server holds, by its path and header fields: its session, or status and
    /// reason of the refusal.
    fn admit<'py>(
        &self,
        py: Python<'py>,
        mailbox: &Mailbox,
        token: u64,
        path: &str,
        headers: Fields,
    ) -> PyResult<Bound<'py, PyAny>> {
        let Some(hub) = self.current() else { return Err(not_running().into()) };
        doors::admit(py, &hub, (mailbox, token), path, headers)
    }

    /// Begins to answer an HTTP request that another server has read.
    fn answer(
        &self,
        mailbox: &Mailbox,
        token: u64,
        method: &str,
        target: &str,
        headers: Fields,
        body: &[u8],
    ) -> Result<HubExchange> {
        let Some(hub) = self.current() else { return Err(not_running()) };
        doors::answer(&hub, (mailbox, token), (method, target), headers, body)
    }

    /// Takes the port anew after something happened to it; blocks for up to a second.
    fn listen_again(&self, py: Python<'_>) -> Result<()> {
        let Some(hub) = self.current() else { return Err(not_running()) };
        py.detach(|| hub.listen_again())
    }

    /// Tells subscribers what is the matter, or with `None` that nothing is any more.
    #[pyo3(signature = (trouble, circuit, /))]
    fn tell(&self, py: Python<'_>, trouble: Option<String>, circuit: &str) -> Result<()> {
        let Some(hub) = self.current() else { return Err(not_running()) };
        hub.check_process()?;
        py.detach(|| hub.tell(trouble, circuit));
        Ok(())
    }

    /// Frames of entries after an offset, as bytes of JSON.
    fn frames_since<'py>(
        &self,
        py: Python<'py>,
        offset: u64,
        most: usize,
        replay: bool,
    ) -> Result<Vec<Bound<'py, PyBytes>>> {
        let Some(hub) = self.current() else { return Ok(Vec::new()) };
        hub.check_process()?;
        let frames = py.detach(|| hub.frames_since(offset, most, replay));
        Ok(frames.iter().map(|frame| PyBytes::new(py, frame)).collect())
    }

    /// Subscribers as a JSON array, those that are furthest behind first.
    fn clients<'py>(&self, py: Python<'py>, most: usize) -> Result<Bound<'py, PyBytes>> {
        let Some(hub) = self.current() else { return Ok(PyBytes::new(py, b"[]")) };
        hub.check_process()?;
        let json = py.detach(|| hub.clients(most));
        Ok(PyBytes::new(py, &json))
    }

    /// A client for emitters of this process; it stays valid over restarts.
    fn client(&self) -> HubClient {
        let slot = self.slot.clone();
        let dialer = Dialer::new(move || {
            let hub = slot.lock().clone();
            let hub = hub.ok_or_else(|| io::Error::new(io::ErrorKind::ConnectionRefused, "the hub is not running"))?;
            hub.dialer().dial()
        });
        HubClient { dialer }
    }
}
