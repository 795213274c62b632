//! Server-Sent Events: a subscriber's session over plain HTTP, with the same queue, bounds and recovery as over a
//! WebSocket, and the same frames as `data`.
//!
//! `id` is the position, so a browser's `EventSource` comes back with it by itself (`Last-Event-ID`).

use std::borrow::Cow;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::poll_fn;
use std::io::Write as _;
use std::net::IpAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Either;
use hyper::body::{Body, Frame};
use hyper::header::{self, HeaderValue};
use hyper::{Request, Response, StatusCode};
use serde::Deserialize;
use tokio::sync::{Notify, mpsc};
use tokio::time::{Instant, MissedTickBehavior};

use super::upgrade::full;
use super::{Answer, RequestBody, guard, text};
use crate::hub::auth::Grant;
use crate::hub::machine::Access;
use crate::hub::outbox::Item;
use crate::hub::registry::{Interest, Role};
use crate::hub::shared::{Admission, Seat, Shared};
use crate::wire::frame::Reconnect;
use crate::wire::position::Position;
use crate::wire::subscriber::{self, MAX_PATTERNS, Subscribe, Wrapping};
use crate::wire::topic::Pattern;

/// How much is moved from the outbox at once.
const BATCH: usize = 64 << 10;

/// The body of an answer without end; its task is told when nobody reads it any more.
pub(in crate::hub) struct Stream(mpsc::Receiver<Bytes>);

impl Body for Stream {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|chunk| chunk.map(|chunk| Ok(Frame::data(chunk))))
    }
}

/// Opens a stream. When it is over, `doomed` gives its connection some time to bring the rest to the client.
pub(super) async fn open(
    shared: &Arc<Shared>,
    request: &Request<impl RequestBody>,
    from: Option<IpAddr>,
    doomed: Arc<Notify>,
) -> Result<Answer, Answer> {
    let grant = guard::admit(shared, request.headers()).await?;
    let asked = read(request).map_err(|why| text(StatusCode::BAD_REQUEST, why))?;
    if let Some(pattern) = asked.events.iter().find(|pattern| !grant.may_subscribe(pattern)) {
        let why = format!("the token does not grant all of {}", pattern.as_str());
        return Err(text(StatusCode::FORBIDDEN, why));
    }
    let until = shared.until(&grant);
    let seat = shared.open(Role::Subscriber, Admission::Granted(grant.clone()), from).map_err(full)?;
    let access = Access::granted(seat.id, Grant { subscribe: None, publish: None, ..grant }, until);
    let epoch = shared.with(|state, now| {
        // Here the event stands in a field of its own, and the others are what a browser recovers by.
        state.registry.set_wrapping(seat.id, Wrapping::Event);
        state.subscribe(seat.id, &asked, now);
        state.log.epoch().to_owned()
    });
    let (chunks, stream) = mpsc::channel(1);
    let pump = Pump { seat, access, epoch, since: asked.since, said_bye: false };
    shared.spawn(pump.run(chunks, doomed));
    let mut answer = Response::new(Either::Right(Stream(stream)));
    let headers = [
        (header::CONTENT_TYPE, "text/event-stream"),
        (header::CACHE_CONTROL, "no-store"),
        (header::CONNECTION, "close"),
        (header::HeaderName::from_static("x-accel-buffering"), "no"), // proxies must not hold events back
    ];
    answer.headers_mut().extend(headers.map(|(name, value)| (name, HeaderValue::from_static(value))));
    Ok(answer)
}

fn read(request: &Request<impl RequestBody>) -> Result<Subscribe, String> {
    let query = request.uri().query().unwrap_or_default();
    let (mut patterns, mut since) = (Vec::new(), None);
    for (name, value) in url::form_urlencoded::parse(query.as_bytes()) {
        match name.as_ref() {
            "match" => patterns.push(Pattern::parse(&value).map_err(|error| format!("match={value}: {error}"))?),
            "since" => since = Some(value.into_owned()),
            _ => {}
        }
    }
    if patterns.is_empty() || patterns.len() > MAX_PATTERNS {
        return Err(format!("give 1 to {MAX_PATTERNS} patterns: /events?match=alert.*; match=* is everything"));
    }
    // What a browser remembers is newer than the address that the page was made with.
    let last = request.headers().get("last-event-id").and_then(|id| id.to_str().ok()).filter(|id| !id.is_empty());
    let since = last.map(str::to_owned).or(since).map(|text| position(&text)).transpose()?;
    Ok(Subscribe { events: patterns, since, slow: None, deflate: None })
}

fn position(text: &str) -> Result<Position, String> {
    let parts = text.rsplit_once(':').and_then(|(epoch, offset)| Some((epoch, offset.parse().ok()?)));
    match parts {
        Some((epoch, offset)) if !epoch.is_empty() => Ok(Position { epoch: epoch.to_owned(), offset }),
        _ => Err("a position is epoch:offset, as it stands in the id of an event".to_owned()),
    }
}

struct Pump {
    seat: Seat,
    access: Access,
    epoch: String,
    /// Where the client said that it stands.
    since: Option<Position>,
    said_bye: bool,
}

impl Pump {
    /// Moves the session's frames into the body, until either side ends.
    async fn run(mut self, chunks: mpsc::Sender<Bytes>, doomed: Arc<Notify>) {
        let every = self.seat.shared.config.ping_interval;
        let mut beat = tokio::time::interval_at(Instant::now() + every, every);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut items = VecDeque::new();
        loop {
            // Each time, because there is always something to send on a busy feed.
            self.expire();
            let expires = self.expires();
            let chunk = tokio::select! {
                biased;
                () = chunks.closed() => return,
                () = poll_fn(|cx| self.fetch(cx, &mut items)) => self.chunk(&items),
                () = tokio::time::sleep(expires.unwrap_or(every)), if expires.is_some() => continue,
                _ = beat.tick() => self.heartbeat(&mut items),
            };
            let last = items.drain(..).any(|item| matches!(item, Item::Close(_)));
            let mut sending = pin!(chunks.send(chunk));
            let sent = tokio::select! {
                sent = &mut sending => sent,
                () = self.ends() => {
                    doomed.notify_one();
                    sending.await
                }
            };
            if last || sent.is_err() {
                return doomed.notify_one();
            }
        }
    }

    /// How long the token is still good, as far as a timer should look ahead.
    fn expires(&self) -> Option<Duration> {
        let shared = &self.seat.shared;
        let left = self.access.deadline()?.saturating_sub(shared.now());
        Some(left.min(shared.config.ping_interval))
    }

    fn expire(&mut self) {
        self.seat.shared.with(|state, now| self.access.on_time(now, Role::Subscriber, state));
    }

    /// Ends when the session is to end, though the client does not read.
    async fn ends(&mut self) {
        while let Some(expires) = self.expires() {
            tokio::select! {
                () = self.ordered_to_close() => return,
                () = tokio::time::sleep(expires) => self.expire(),
            }
        }
        self.ordered_to_close().await;
    }

    fn fetch(&self, cx: &mut Context<'_>, items: &mut VecDeque<Item>) -> Poll<()> {
        self.seat.shared.with(|state, _| {
            state.take(self.seat.id, BATCH, items);
            if items.is_empty() {
                state.registry.park(self.seat.id, Interest::Items, cx.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(())
        })
    }

    async fn ordered_to_close(&self) {
        poll_fn(|cx| {
            self.seat.shared.with(|state, _| {
                if state.registry.is_closing(self.seat.id) {
                    return Poll::Ready(());
                }
                state.registry.park(self.seat.id, Interest::Close, cx.waker().clone());
                Poll::Pending
            })
        })
        .await;
    }

    /// A sign of life, with the position to come back with; or what has come in this very moment, which that must not
    /// pass over.
    fn heartbeat(&mut self, items: &mut VecDeque<Item>) -> Bytes {
        let reached = self.seat.shared.with(|state, _| {
            state.take(self.seat.id, BATCH, items);
            state.reached(self.seat.id)
        });
        match reached {
            _ if !items.is_empty() => self.chunk(items),
            // A browser keeps an id that comes without data, and tells its page nothing.
            Some(offset) => format!("id: {}:{offset}\n: still here\n\n", self.epoch).into(),
            None => Bytes::from_static(b": still here\n\n"),
        }
    }

    fn chunk(&mut self, items: &VecDeque<Item>) -> Bytes {
        let mut out = Vec::new();
        for item in items {
            match item {
                Item::Text(frame) => self.event(frame, &mut out),
                // This stream is text, and asks for no compression.
                Item::Ping | Item::Binary(_) => {}
                Item::Close(code) => {
                    *self.seat.shared.closes.lock().entry(code.code()).or_default() += 1;
                    if !self.said_bye {
                        // A WebSocket closes with this code; here it has to be said.
                        let soon = Reconnect { after: 0.2, jitter: 1.0 };
                        self.event(&subscriber::bye(code.code(), soon), &mut out);
                    }
                }
            }
        }
        out.into()
    }

    fn event(&mut self, frame: &[u8], out: &mut Vec<u8>) {
        #[derive(Deserialize)]
        struct Head<'a> {
            #[serde(borrow, rename = "type")]
            kind: Option<Cow<'a, str>>,
            #[serde(borrow)]
            action: Option<Cow<'a, str>>,
            seq: Option<u64>,
            offset: Option<u64>,
            replayed: Option<u64>,
        }
        let Ok(head) = serde_json::from_slice::<Head<'_>>(frame) else { return };
        let name = head.kind.or(head.action).unwrap_or_default();
        let place = match (&self.since, head.replayed) {
            // Whoever is cut off before the replay is still where it was.
            (Some(since), Some(1..)) => Some(since.offset),
            _ => head.seq.or(head.offset),
        };
        if let Some(offset) = place {
            write(out, format_args!("id: {}:{offset}\n", self.epoch));
        }
        if name == "bye" {
            self.said_bye = true;
            write(out, format_args!("retry: {}\n", retry(frame)));
        }
        write(out, format_args!("event: {name}\n"));
        // A line break would end the field; between the tokens of JSON, where alone it may stand, a new field is one.
        for line in frame.split(|byte| matches!(byte, b'\n' | b'\r')) {
            out.extend_from_slice(b"data: ");
            out.extend_from_slice(line);
            out.push(b'\n');
        }
        out.push(b'\n');
    }
}

fn write(out: &mut Vec<u8>, text: std::fmt::Arguments<'_>) {
    drop(out.write_fmt(text)); // a vector takes everything
}

/// Milliseconds after which this client is to come back: each gets its own part of the jitter, because an
/// `EventSource` has none.
fn retry(bye: &[u8]) -> u64 {
    #[derive(Deserialize)]
    struct Bye {
        data: Data,
    }
    #[derive(Deserialize)]
    struct Data {
        reconnect: Reconnect,
    }
    let seconds = serde_json::from_slice(bye)
        .map_or(1.0, |Bye { data: Data { reconnect } }| reconnect.after + fastrand::f64() * reconnect.jitter);
    (seconds * 1000.0) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_read_as_they_are_written() {
        assert_eq!(position("k3f9:17"), Ok(Position { epoch: "k3f9".into(), offset: 17 }));
        for wrong in ["", "17", ":17", "k3f9:", "k3f9:-1", "k3f9:x"] {
            assert!(position(wrong).is_err(), "{wrong}");
        }
    }
}
