//! One HTTP request that somebody else's server has read, and its answer in parts. The routes are those of our own
//! port.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::Request;
use tokio::sync::mpsc;
use tokio::sync::mpsc::error::TryRecvError;

use crate::hub::http;
use crate::hub::shared::Shared;

/// How many parts of an answer may wait for the server: a slow client holds its stream up, not the hub's memory.
const PARTS: usize = 16;

/// A part of an answer; the head comes first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    /// Status and header fields.
    Head(u16, Vec<(Bytes, Bytes)>),
    /// Some of the body.
    Body(Bytes),
}

/// The server's end of a request. Dropping it gives the answer up.
pub struct Exchange {
    parts: parking_lot::Mutex<mpsc::Receiver<Part>>,
    /// The server found nothing, and is to be told.
    wanted: Arc<AtomicBool>,
}

/// Answers a request; `bell` is rung from the hub's thread when there is something to take.
pub(in crate::hub) fn answer(
    shared: &Arc<Shared>,
    request: Request<Full<Bytes>>,
    bell: impl Fn() + Send + Sync + 'static,
) -> Exchange {
    let (sender, parts) = mpsc::channel(PARTS);
    let wanted = Arc::new(AtomicBool::new(false));
    let tell = Teller { wanted: wanted.clone(), bell };
    let task = give(shared.clone(), request, sender, tell);
    shared.spawn(task);
    Exchange { parts: parking_lot::Mutex::new(parts), wanted }
}

struct Teller<F: Fn()> {
    wanted: Arc<AtomicBool>,
    bell: F,
}

impl<F: Fn()> Teller<F> {
    fn tell(&self) {
        if self.wanted.swap(false, Ordering::AcqRel) {
            (self.bell)();
        }
    }
}

async fn give(
    shared: Arc<Shared>,
    request: Request<Full<Bytes>>,
    parts: mpsc::Sender<Part>,
    teller: Teller<impl Fn() + Send + Sync>,
) {
    let giving = async {
        let (head, body) = http::serve(shared, request).await.into_parts();
        let field = |(name, value): (&hyper::header::HeaderName, &hyper::header::HeaderValue)| {
            (Bytes::copy_from_slice(name.as_ref()), Bytes::copy_from_slice(value.as_bytes()))
        };
        let mut part = Part::Head(head.status.as_u16(), head.headers.iter().map(field).collect());
        let mut body = pin!(body);
        while parts.send(part).await.is_ok() {
            teller.tell();
            // An error breaks the body off, as it would on a socket.
            part = match body.frame().await.and_then(Result::ok).map(hyper::body::Frame::into_data) {
                Some(Ok(data)) => Part::Body(data),
                _ => return,
            };
        }
    };
    tokio::select! {
        () = giving => {}
        () = parts.closed() => {}
    }
    drop(parts); // the end, for whoever is told
    teller.tell();
}

impl Exchange {
    /// What there is of the answer. Empty if there is nothing yet: then the bell rings when there is. `None` at the end.
    #[must_use]
    pub fn take(&self) -> Option<Vec<Part>> {
        let mut receiver = self.parts.lock();
        let mut parts = Vec::new();
        loop {
            match receiver.try_recv() {
                Ok(part) => parts.push(part),
                Err(TryRecvError::Disconnected) => return (!parts.is_empty()).then_some(parts),
                // Looked again after it was said: what comes in between is found here or rung for.
                Err(TryRecvError::Empty) if parts.is_empty() && !self.wanted.swap(true, Ordering::AcqRel) => {}
                Err(TryRecvError::Empty) => return Some(parts),
            }
        }
    }
}
