//! The second door as Python sees it: a session, or an HTTP request, of a client whose socket is in the hands of an ASGI
//! server. Python's side is `safe_broadcaster/hub/sessions.py` and `asgi.py`.

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyString};

use super::mailbox::{Body, Mailbox};
use crate::error::{Error, ErrorKind, Result};
use crate::hub::Hub;
use crate::hub::doors::{Exchange, Guest, Outgoing, Part};
use crate::wire::topic::Pattern;

/// Header fields as ASGI gives them.
pub(super) type Fields = Vec<(Vec<u8>, Vec<u8>)>;

/// A client's session. Letters under its token say that there is something to take, or room to feed again.
#[pyclass(frozen, module = "safe_broadcaster._core")]
pub(super) struct HubSession {
    guest: Guest,
    #[pyo3(get)]
    subprotocol: Option<&'static str>,
}

/// An HTTP request and its answer. A letter under its token says that there is something to take.
#[pyclass(frozen, module = "safe_broadcaster._core")]
pub(super) struct HubExchange {
    exchange: Exchange,
}

/// Lets a client in, or gives status and reason of the refusal.
pub(super) fn admit<'py>(
    py: Python<'py>,
    hub: &Hub,
    (mailbox, token): (&Mailbox, u64),
    path: &str,
    fields: Fields,
) -> PyResult<Bound<'py, PyAny>> {
    let sender = mailbox.sender();
    let bell = move || sender.push(token, Body::Unit);
    match hub.admit(path, &headers(fields), bell)? {
        Ok((guest, subprotocol)) => Ok(Bound::new(py, HubSession { guest, subprotocol })?.into_any()),
        Err(refusal) => Ok((refusal.status, refusal.reason).into_pyobject(py)?.into_any()),
    }
}

/// Begins to answer a request.
pub(super) fn answer(
    hub: &Hub,
    (mailbox, token): (&Mailbox, u64),
    (method, target): (&str, &str),
    fields: Fields,
    body: &[u8],
) -> Result<HubExchange> {
    let bad = |error| Error::new(ErrorKind::Protocol, format!("{method} {target} is no request")).with_source(error);
    let method_name = Method::from_bytes(method.as_bytes()).map_err(hyper::http::Error::from).map_err(bad)?;
    let body = Full::new(Bytes::copy_from_slice(body));
    let mut request = Request::builder().method(method_name).uri(target).body(body).map_err(bad)?;
    *request.headers_mut() = headers(fields);
    // What belongs to the connection is the server's own affair.
    request.headers_mut().remove(hyper::header::UPGRADE);
    let sender = mailbox.sender();
    Ok(HubExchange { exchange: hub.answer(request, move || sender.push(token, Body::Unit))? })
}

/// The server has checked them; what is no field all the same is left out.
fn headers(fields: Fields) -> HeaderMap {
    let field = |(name, value): (Vec<u8>, Vec<u8>)| {
        Some((HeaderName::from_bytes(&name).ok()?, HeaderValue::from_bytes(&value).ok()?))
    };
    let mut map = HeaderMap::new();
    for (name, value) in fields.into_iter().filter_map(field) {
        map.append(name, value);
    }
    map
}

#[pymethods]
impl HubSession {
    /// Name in the hub's numbers.
    #[getter]
    fn id(&self) -> String {
        self.guest.session()
    }

    fn feed_text(&self, text: &str) -> bool {
        self.guest.feed_text(text)
    }

    fn feed_binary(&self, data: &[u8]) -> bool {
        self.guest.feed_binary(data)
    }

    fn has_room(&self) -> bool {
        self.guest.has_room()
    }

    fn take<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyList>>> {
        let Some(batch) = self.guest.take() else { return Ok(None) };
        let list = PyList::empty(py);
        for outgoing in batch {
            match outgoing {
                Outgoing::Text(text) => list.append(PyString::from_bytes(py, &text)?)?,
                Outgoing::Binary(data) => list.append(PyBytes::new(py, &data))?,
                Outgoing::Close(code, reason) => list.append((code, reason))?,
            }
        }
        Ok(Some(list))
    }

    fn hang_up(&self) {
        self.guest.hang_up();
    }

    fn record_ack(&self, sequence: u64) {
        self.guest.record_ack(sequence);
    }

    fn preset(&self, patterns: Vec<String>) -> Result<()> {
        self.guest.preset(&super::config::patterns("events", &patterns)?);
        Ok(())
    }
}

#[pymethods]
impl HubExchange {
    fn take<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyList>>> {
        let Some(parts) = self.exchange.take() else { return Ok(None) };
        let list = PyList::empty(py);
        for part in parts {
            match part {
                Part::Body(data) => list.append(PyBytes::new(py, &data))?,
                Part::Head(status, fields) => {
                    let field = |(name, value): &(Bytes, Bytes)| (PyBytes::new(py, name), PyBytes::new(py, value));
                    list.append((status, PyList::new(py, fields.iter().map(field))?))?;
                }
            }
        }
        Ok(Some(list))
    }
}

/// Whether an event with this type and topic matches a pattern; refuses what is no pattern.
#[pyfunction]
#[pyo3(signature = (pattern, kind, topic = "", /))]
pub(super) fn matches(pattern: &str, kind: &str, topic: &str) -> Result<bool> {
    let refused = |error| {
        let text = format!("pattern={pattern:?} is not allowed: give a type like 'alert.disk' or 'alert.*'");
        Error::new(ErrorKind::Config, text).with_source(error)
    };
    Ok(Pattern::parse(pattern).map_err(refused)?.matches(kind, topic))
}
