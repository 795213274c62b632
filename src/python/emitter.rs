//! The emitter as Python sees it; `safe_broadcaster.SafeBroadcaster` inherits from it.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList, PyTuple};
use serde_json::{Map, Value, json};

use super::config;
use super::hub::HubClient;
use super::mailbox::{Body, Mailbox, Sender};
use super::ready::ready;
use super::serialize::serialize;
use crate::emitter::config::{Durability, WhenFull};
use crate::emitter::item::Item;
use crate::emitter::link::{Endpoint, Peer, PeerEvent, Target};
use crate::emitter::outbox::Pushed;
use crate::emitter::{Emitter as Core, Health, Reply};
use crate::error::{Error, ErrorKind, Result};
use crate::wire::block::Block;

/// How often a thread that waits in here looks whether Ctrl-C was pressed.
const SIGNAL_CHECK: Duration = Duration::from_millis(100);

/// Reports kept for a loop that does not read them.
const UNREAD_REPORTS: usize = 1000;

struct Inner {
    core: Core,
    durability: Durability,
    /// `is_available` of a duck-typed `ws_client`, asked before each event.
    probe: Option<Py<PyAny>>,
    peer: Option<Arc<MailboxPeer>>,
    rejected: AtomicU64,
}

/// See the stub `_core.pyi`.
#[pyclass(frozen, subclass, weakref, module = "safe_broadcaster._core")]
pub(super) struct Emitter {
    inner: OnceLock<Inner>,
}

impl Emitter {
    fn inner(&self) -> PyResult<&Inner> {
        let missing = || Error::new(ErrorKind::Closed, "SafeBroadcaster.__init__ was not called");
        let inner = self.inner.get().ok_or_else(missing)?;
        inner.core.check_process()?;
        Ok(inner)
    }

    fn core(&self) -> PyResult<&Core> {
        Ok(&self.inner()?.core)
    }
}

#[pymethods]
impl Emitter {
    #[new]
    #[pyo3(signature = (*_args, **_settings))]
    fn new(_args: &Bound<'_, PyTuple>, _settings: Option<&Bound<'_, PyDict>>) -> Self {
        Self { inner: OnceLock::new() }
    }

    /// Called once by `SafeBroadcaster.__init__`. `target`: a URL, a hub's client core, or `None` for a peer that is
    /// served through the mailbox, with `probe` telling whether it can send.
    #[pyo3(signature = (target, spill_path, settings, probe))]
    fn _open(
        &self,
        target: Option<&Bound<'_, PyAny>>,
        spill_path: PathBuf,
        settings: &Bound<'_, PyAny>,
        probe: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let config = config::emitter_config(settings, spill_path)?;
        let durability = config.durability;
        let mut peer = None;
        let target = match target {
            None => Target::Peer(Arc::clone(peer.insert(Arc::new(MailboxPeer::default()))) as Arc<dyn Peer>),
            Some(target) => match target.cast::<HubClient>() {
                Ok(hub) => Target::Local(hub.get().dialer.clone()),
                Err(_) => Target::Url(Endpoint::parse(&target.extract::<String>()?)?),
            },
        };
        let core = Core::new(config, target)?;
        if let Some(peer) = &peer {
            *peer.core.lock() = Some(core.downgrade());
        }
        let inner = Inner { core, durability, probe, peer, rejected: AtomicU64::new(0) };
        let again = |_| Error::new(ErrorKind::Config, "SafeBroadcaster.__init__ was called twice").into();
        self.inner.set(inner).map_err(again)
    }

    /// The duck-typed client refers back to us: without this such a pair would never be collected.
    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        match self.inner.get().and_then(|inner| inner.probe.as_ref()) {
            Some(probe) => visit.call(probe),
            None => Ok(()),
        }
    }

    #[pyo3(signature = (event, *, durability = None))]
    fn safe_emit<'py>(
        slf: &Bound<'py, Self>,
        event: &Bound<'py, PyAny>,
        durability: Option<&str>,
    ) -> PyResult<Bound<'py, PyAny>> {
        let py = slf.py();
        let inner = slf.get().inner()?;
        let level = durability.map_or(Ok(inner.durability), config::durability)?;
        let json = inner.serialize(py, event)?;
        let live = inner.live(py)?;
        match inner.push(&json, level, live)? {
            Pushed::Accepted { live, provisional, pressed: false, .. } if is_reached(level, provisional) => {
                ready(py, live)
            }
            Pushed::Accepted { seq, live, provisional: false, pressed: false } if level == Durability::Power => {
                slf.call_method1(intern!(py, "_keep"), (seq, live))
            }
            Pushed::Accepted { seq, provisional, live, pressed } => {
                let level = (!is_reached(level, provisional)).then(|| config::name_of(level));
                slf.call_method1(intern!(py, "_outcome"), (seq, provisional, live, pressed, level))
            }
            Pushed::Dropped => ready(py, false),
            Pushed::Full => slf.call_method1(intern!(py, "_retry"), (event, durability)),
        }
    }

    #[pyo3(signature = (event, *, durability = None))]
    fn emit_nowait(&self, py: Python<'_>, event: &Bound<'_, PyAny>, durability: Option<&str>) -> PyResult<bool> {
        let inner = self.inner()?;
        let level = durability.map_or(Ok(inner.durability), config::durability)?;
        if level == Durability::Delivered && inner.waits_for_itself(py)? {
            let text = "durability='delivered' is not allowed in emit_nowait on the thread of the event loop that serves the ws_client: await safe_emit";
            return Err(Error::new(ErrorKind::Config, text).into());
        }
        let json = inner.serialize(py, event)?;
        loop {
            let live = inner.live(py)?;
            let (seq, provisional, live) = match inner.push(&json, level, live)? {
                Pushed::Accepted { live, provisional, pressed: false, .. } if is_reached(level, provisional) => {
                    return Ok(live);
                }
                Pushed::Accepted { seq, provisional, live, pressed } => {
                    // Room under the policy to wait is made by the client, which this very thread would keep waiting.
                    let in_vain = inner.core.config().when_full == WhenFull::Wait && inner.waits_for_itself(py)?;
                    if pressed && !in_vain {
                        wait(py, |done| inner.core.when_room(Box::new(move || done(Ok(())))))?;
                    }
                    (seq, provisional, live)
                }
                Pushed::Dropped => return Ok(false),
                Pushed::Full if inner.waits_for_itself(py)? => {
                    let text = "memory is full, and emit_nowait cannot wait on the thread of the event loop that serves the ws_client: await safe_emit";
                    return Err(Error::new(ErrorKind::SpillFull, text).into());
                }
                Pushed::Full => {
                    wait(py, |done| inner.core.when_room(Box::new(move || done(Ok(())))))?;
                    continue;
                }
            };
            match level {
                _ if is_reached(level, provisional) => {}
                // This thread waits anyhow, so it syncs for itself, and for whoever came before.
                Durability::Power if !provisional => py.detach(|| inner.core.sync_upto(seq))?,
                _ => wait(py, |done| inner.core.await_level(level, seq, provisional, done))?,
            }
            return Ok(live || level == Durability::Delivered);
        }
    }

    fn _start(&self, mailbox: &Mailbox, token: u64) -> PyResult<()> {
        self.core()?.start(tell(mailbox, token));
        Ok(())
    }

    fn _await_live(&self, mailbox: &Mailbox, token: u64) -> PyResult<()> {
        self.core()?.await_live(tell(mailbox, token));
        Ok(())
    }

    fn _await_ready(&self, mailbox: &Mailbox, token: u64) -> PyResult<()> {
        self.core()?.await_ready(tell(mailbox, token));
        Ok(())
    }

    fn _await_level(&self, mailbox: &Mailbox, token: u64, level: &str, seq: u64, provisional: bool) -> PyResult<()> {
        self.core()?.await_level(config::durability(level)?, seq, provisional, tell(mailbox, token));
        Ok(())
    }

    fn _await_synced(&self, mailbox: &Mailbox, token: u64, first: u64, last: u64) -> PyResult<()> {
        self.core()?.await_synced(first..=last, tell(mailbox, token));
        Ok(())
    }

    fn _when_room(&self, mailbox: &Mailbox, token: u64) -> PyResult<()> {
        let sender = mailbox.sender();
        self.core()?.when_room(Box::new(move || sender.push(token, Body::Unit)));
        Ok(())
    }

    fn _drain(&self, mailbox: &Mailbox, token: u64) -> PyResult<()> {
        self.core()?.drain(tell(mailbox, token));
        Ok(())
    }

    fn _flush(&self, mailbox: &Mailbox, token: u64) -> PyResult<()> {
        let sender = mailbox.sender();
        self.core()?.flush(Box::new(move |outcome| {
            sender.push(
                token,
                match outcome {
                    Ok(flush) => Body::Make(Box::new(move |py| {
                        Ok((flush.flushed, flush.failed, flush.remaining).into_pyobject(py)?.into_any().unbind())
                    })),
                    Err(error) => Body::Failed(error),
                },
            );
        }));
        Ok(())
    }

    fn _stop(&self, mailbox: &Mailbox, token: u64, drain: f64) -> PyResult<()> {
        self.core()?.stop(seconds(drain)?, tell(mailbox, token));
        Ok(())
    }

    /// For the end of the interpreter, when no loop runs any more.
    fn _stop_blocking(&self, py: Python<'_>, drain: f64) -> PyResult<()> {
        let (core, drain) = (self.core()?, seconds(drain)?);
        wait(py, |done| core.stop(drain, done))
    }

    /// Reports for the health bus come as `(json, unix time)` under this token.
    fn _report_to(&self, mailbox: &Mailbox, token: u64) -> PyResult<()> {
        let sender = mailbox.sender();
        self.core()?.report_to(Arc::new(move |health| {
            let (json, unix) = (report(&health).to_string(), health.unix);
            let make = move |py: Python<'_>| {
                Ok((PyBytes::new(py, json.as_bytes()), unix).into_pyobject(py)?.into_any().unbind())
            };
            sender.push_within(UNREAD_REPORTS, token, Body::Make(Box::new(make)));
        }));
        Ok(())
    }

    /// Requests for a duck-typed `ws_client` come under this token.
    fn _serve_peer(&self, mailbox: &Mailbox, token: u64) -> PyResult<()> {
        if let Some(peer) = &self.inner()?.peer {
            *peer.mailbox.lock() = Some((mailbox.sender(), token));
        }
        Ok(())
    }

    fn _peer_up(&self) -> PyResult<()> {
        self.core()?.peer_says(PeerEvent::Up);
        Ok(())
    }

    fn _peer_sent(&self, upto: u64) -> PyResult<()> {
        self.core()?.peer_says(PeerEvent::Sent(upto));
        Ok(())
    }

    fn _peer_failed(&self, sent: u64, why: String) -> PyResult<()> {
        self.core()?.peer_says(PeerEvent::Failed { sent, why });
        Ok(())
    }

    fn _peer_down(&self, why: String) -> PyResult<()> {
        self.core()?.peer_says(PeerEvent::Down(why));
        Ok(())
    }

    /// Stored events after `after` as `(seq, json)`, about `max_bytes` of them.
    fn _peek<'py>(&self, py: Python<'py>, after: u64, max_bytes: usize) -> PyResult<Bound<'py, PyList>> {
        let core = self.core()?;
        let (out, mut after) = (PyList::empty(py), after);
        loop {
            let items = py.detach(|| core.peek(after, max_bytes))?;
            let Some(last) = items.last().map(Item::last) else { return Ok(out) };
            for item in items {
                if let Item::Events(block) = item {
                    for (seq, event) in block.events() {
                        out.append((seq, PyBytes::new(py, &event)))?;
                    }
                }
            }
            if !out.is_empty() {
                return Ok(out);
            }
            after = last; // nothing but gaps: an empty list would say that there is nothing more
        }
    }

    fn get_stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let inner = self.inner()?;
        let stats = inner.core.stats();
        let (counts, snapshot) = (stats.counts, &stats.snapshot);
        let out = PyDict::new(py);
        out.set_item("emit_count", counts.live)?;
        out.set_item("spill_count", stats.spilled())?;
        out.set_item("flush_count", snapshot.flushed)?;
        out.set_item("current_spill_depth", stats.depth())?;
        out.set_item("ready", snapshot.ready)?;
        out.set_item("ws_available", snapshot.live && inner.probe(py)?.unwrap_or(true))?;
        out.set_item("last_seq", counts.last_seq)?;
        out.set_item("acked_seq", snapshot.acked_seq)?;
        out.set_item("in_flight", snapshot.in_flight)?;
        out.set_item("in_flight_bytes", snapshot.in_flight_bytes)?;
        out.set_item("outbox_bytes", counts.waiting_bytes + snapshot.held)?;
        out.set_item("spill_bytes", snapshot.spill_bytes)?;
        out.set_item("oldest_unacked_age", stats.oldest_unacked_age)?;
        out.set_item("dropped", counts.dropped + snapshot.dropped + snapshot.parked_dropped)?;
        out.set_item("parked", snapshot.parked)?;
        out.set_item("refused", counts.refused)?;
        out.set_item("rejected", inner.rejected.load(Ordering::Relaxed))?;
        out.set_item("breaker", snapshot.breaker)?;
        out.set_item("degraded", snapshot.degraded)?;
        out.set_item("reconnects", snapshot.reconnects)?;
        out.set_item("last_error", snapshot.last_error.as_deref())?;
        out.set_item("fsync_p99", stats.fsync_p99.map(|took| took.as_secs_f64()))?;
        out.set_item("emit_success_rate_1m", snapshot.success_rate)?;
        out.set_item("flush_latency_last", snapshot.flush_latency)?;
        out.set_item("flush_remaining", snapshot.flush_remaining)?;
        out.set_item("flush_rate_current", snapshot.flush_rate)?;
        out.set_item("flush_window_bytes", snapshot.window)?;
        out.set_item("emitter", stats.identity.as_ref().map(|who| who.emitter.as_str()))?;
        out.set_item("epoch", stats.identity.as_ref().map(|who| who.epoch.as_str()))?;
        Ok(out)
    }

    #[getter]
    fn emit_count(&self) -> PyResult<u64> {
        Ok(self.core()?.stats().counts.live)
    }

    #[getter]
    fn spill_count(&self) -> PyResult<u64> {
        Ok(self.core()?.stats().spilled())
    }

    #[getter]
    fn flush_count(&self) -> PyResult<u64> {
        Ok(self.core()?.stats().snapshot.flushed)
    }

    #[getter]
    fn connected(&self, py: Python<'_>) -> PyResult<bool> {
        let inner = self.inner()?;
        Ok(inner.core.stats().snapshot.live && inner.probe(py)?.unwrap_or(true))
    }

    #[getter]
    fn _is_ready(&self) -> PyResult<bool> {
        Ok(self.core()?.stats().snapshot.ready)
    }

    #[getter]
    fn _depth(&self) -> PyResult<u64> {
        Ok(self.core()?.stats().depth())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        if self.core.check_process().is_err() {
            // The last handle would wake the driver, which does not exist in a forked child, through locks that it may
            // have held at the fork.
            std::mem::forget(self.core.clone());
        }
    }
}

impl Inner {
    fn serialize<'py>(&self, py: Python<'py>, event: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyBytes>> {
        let json = serialize(py, event);
        if json.is_err() {
            self.rejected.fetch_add(1, Ordering::Relaxed);
        }
        json
    }

    fn push(&self, json: &Bound<'_, PyBytes>, level: Durability, live: Option<bool>) -> Result<Pushed> {
        self.core.push(json.as_bytes(), level, live).inspect_err(|error| {
            if error.is_poison() {
                self.rejected.fetch_add(1, Ordering::Relaxed);
            }
        })
    }

    /// What the link is called for the next event: `Some(false)` if a duck-typed client says that it cannot send,
    /// otherwise what the core knows, since a client may be up whose link was not started.
    fn live(&self, py: Python<'_>) -> PyResult<Option<bool>> {
        Ok(self.probe(py)?.filter(|up| !up))
    }

    /// Whether waiting in this thread would wait for this thread: its event loop has to serve the `ws_client`.
    fn waits_for_itself(&self, py: Python<'_>) -> PyResult<bool> {
        Ok(self.peer.is_some() && !py.import("asyncio")?.call_method0("_get_running_loop")?.is_none())
    }

    fn probe(&self, py: Python<'_>) -> PyResult<Option<bool>> {
        self.probe.as_ref().map(|probe| probe.bind(py).call0()?.is_truthy()).transpose()
    }
}

/// Whether an event is at its level as soon as it is in the outbox.
fn is_reached(level: Durability, provisional: bool) -> bool {
    level == Durability::Memory || (level == Durability::Process && !provisional)
}

/// Waits for an answer from Rust with the GIL released, looking for Ctrl-C now and then.
fn wait(py: Python<'_>, ask: impl FnOnce(Reply<()>)) -> PyResult<()> {
    let (sender, answer) = mpsc::sync_channel(1);
    let answer = Mutex::new(answer);
    // The asker may have been interrupted meanwhile.
    ask(Box::new(move |outcome| drop(sender.send(outcome))));
    loop {
        match py.detach(|| answer.lock().recv_timeout(SIGNAL_CHECK)) {
            Ok(outcome) => return Ok(outcome?),
            Err(mpsc::RecvTimeoutError::Timeout) => py.check_signals()?,
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                return Err(Error::new(ErrorKind::Closed, "the broadcaster was stopped").into());
            }
        }
    }
}

fn tell(mailbox: &Mailbox, token: u64) -> Reply<()> {
    let sender = mailbox.sender();
    Box::new(move |outcome| {
        sender.push(
            token,
            match outcome {
                Ok(()) => Body::Unit,
                Err(error) => Body::Failed(error),
            },
        );
    })
}

fn seconds(value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value)
        .map_err(|_| Error::new(ErrorKind::Config, format!("drain_timeout={value} is not a number of seconds")).into())
}

/// A report in the shape of seed 000, without its timestamp.
fn report(health: &Health) -> Value {
    let report = &health.report;
    let (accepted, rejected) = if report.success { (1.0, 0.0) } else { (0.0, 1.0) };
    let mut metrics = Map::new();
    metrics.insert("total_emits".to_owned(), health.emits.into());
    metrics.insert("total_spills".to_owned(), health.spills.into());
    metrics.insert("total_flushes".to_owned(), health.flushes.into());
    metrics.insert("current_spill_depth".to_owned(), health.depth.into());
    metrics.insert("spill_depth".to_owned(), health.depth.into());
    metrics.extend(report.details.clone());
    json!({
        "type": "health.compliance.snapshot",
        "content": {
            "emitter": "broadcaster",
            "event_type": report.event_type,
            "success": report.success,
            "accept_rate": accepted,
            "reject_rate": rejected,
            "top_rejects": report.reject.iter().collect::<Vec<_>>(),
            "metrics": metrics,
        },
    })
}

/// A duck-typed `ws_client`, reached through the mailbox of the loop that started the broadcaster.
#[derive(Default)]
struct MailboxPeer {
    mailbox: Mutex<Option<(Sender, u64)>>,
    core: Mutex<Option<crate::emitter::PeerVoice>>,
}

impl MailboxPeer {
    fn request(&self, body: Body) -> bool {
        let mailbox = self.mailbox.lock();
        mailbox.as_ref().map(|(sender, token)| sender.push(*token, body)).is_some()
    }
}

impl Peer for MailboxPeer {
    fn connect(&self) {
        let body = Body::Make(Box::new(|py| Ok(("connect",).into_pyobject(py)?.into_any().unbind())));
        if !self.request(body)
            && let Some(core) = &*self.core.lock()
        {
            core.say(PeerEvent::Down("no event loop serves the ws_client: start() was not called".to_owned()));
        }
    }

    fn send(&self, block: Block) {
        let make = move |py: Python<'_>| {
            let events = PyList::new(
                py,
                block.events().map(|(_, event): (u64, Bytes)| PyBytes::new(py, &event)).collect::<Vec<_>>(),
            )?;
            Ok(("send", block.first(), events).into_pyobject(py)?.into_any().unbind())
        };
        self.request(Body::Make(Box::new(make)));
    }

    fn close(&self) {
        self.request(Body::Make(Box::new(|py| Ok(("close",).into_pyobject(py)?.into_any().unbind()))));
    }
}
