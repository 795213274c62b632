//! The second door: two bounded queues of messages between a session's task and a server that is not ours, which has
//! shaken hands with the client and moves its messages (an ASGI server, from Python).
//!
//! ```text
//!  client ⇄ server ── feed ──▶ incoming ──▶ session ──▶ outgoing ── take ──▶ server ⇄ client
//! ```
//!
//! The server never waits in here: it is told by a bell when there is something to take, or room to feed again, and
//! only if it has found none before. Taking a batch says that the one before has been sent; so a client that does not
//! read holds the session up as a full socket does, and the session's own outbox decides what becomes of it.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use futures_util::{Sink, Stream};
use hyper::HeaderMap;
use parking_lot::Mutex;
use tokio_tungstenite::tungstenite::Utf8Bytes;
use tokio_tungstenite::tungstenite::error::{CapacityError, Error as WsError};
use tokio_tungstenite::tungstenite::protocol::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};

use super::Wire;
use crate::hub::auth::credential_in_query;
use crate::hub::driver::{self, READ_BATCH, WRITE_BATCH};
use crate::hub::http;
use crate::hub::meter::Pace;
use crate::hub::registry::{Role, SessionId};
use crate::hub::shared::{Admission, Refused, Shared};

/// What a frame costs beside its bytes, so that many empty ones are not counted as nothing.
const FRAME_BYTES: usize = 64;

/// One thing to hand to the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outgoing {
    /// A text message, in UTF-8.
    Text(Bytes),
    /// A binary message.
    Binary(Bytes),
    /// The last thing of a session: code and reason of the close.
    Close(u16, String),
}

/// Why a client is not let in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// Status of the HTTP answer.
    pub status: u16,
    /// What to tell.
    pub reason: &'static str,
}

/// The server's end of a session. Dropping it tells the session that the client is gone.
pub struct Guest {
    line: Arc<Line>,
    shared: Arc<Shared>,
    id: SessionId,
    largest: usize,
}

struct Line {
    queues: Mutex<Queues>,
    bell: Box<dyn Fn() + Send + Sync>,
}

#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own, and may meet any other")]
#[derive(Default)]
struct Queues {
    incoming: VecDeque<Result<Message, WsError>>,
    incoming_bytes: usize,
    /// The client is gone: nothing follows what came.
    hung_up: bool,
    reader: Option<Waker>,
    outgoing: VecDeque<Outgoing>,
    outgoing_bytes: usize,
    /// A batch was taken, and its end is not known yet.
    under_way: bool,
    writer: Option<Waker>,
    /// The session's task is over: nothing follows what it sent.
    over: bool,
    /// The server found nothing to take, and is to be told.
    wants_items: bool,
    /// The server found no room, and is to be told.
    wants_room: bool,
}

impl Queues {
    fn has_room(&self) -> bool {
        self.incoming_bytes < READ_BATCH
    }

    fn is_flushed(&self) -> bool {
        self.hung_up || (self.outgoing.is_empty() && !self.under_way)
    }
}

impl Line {
    /// Acts on the queues, then wakes and rings without their lock.
    fn with<R>(&self, act: impl FnOnce(&mut Queues) -> (R, Option<Waker>)) -> R {
        let mut queues = self.queues.lock();
        let (result, waker) = act(&mut queues);
        let items = queues.wants_items && !queues.outgoing.is_empty();
        let room = queues.wants_room && queues.has_room();
        queues.wants_items &= !items;
        queues.wants_room &= !room;
        drop(queues);
        if items || room {
            (self.bell)();
        }
        if let Some(waker) = waker {
            waker.wake();
        }
        result
    }
}

/// Lets a client in by what its handshake said, at an address of our own port; also says which subprotocol was chosen.
pub(in crate::hub) fn admit(
    shared: &Arc<Shared>,
    target: &str,
    headers: &HeaderMap,
    bell: impl Fn() + Send + Sync + 'static,
) -> Result<(Guest, Option<&'static str>), Refusal> {
    if !http::origin_is_allowed(headers, &shared.config.allowed_origins) {
        return Err(Refusal { status: 403, reason: "this origin is not among allowed_origins" });
    }
    let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
    if credential_in_query(query).is_some() {
        return Err(Refusal {
            status: 400,
            reason: "a token does not belong in an address, which is logged everywhere",
        });
    }
    let unspoken =
        Refusal { status: 400, reason: "none of these subprotocols is spoken here; sb.v1.json and sb.emit.v1 are" };
    let (role, protocol) = match path {
        "/ws" => http::negotiate(headers).ok_or(unspoken)?,
        "/publish" => (Role::Publisher, None),
        http::CENTRIFUGO => {
            let spoken = http::negotiate_centrifugo(headers, query);
            (Role::Centrifugo, spoken.map_err(|reason| Refusal { status: 400, reason })?)
        }
        _ => {
            let reason = "there is no WebSocket at this path; /ws, /publish and /connection/websocket are";
            return Err(Refusal { status: 404, reason });
        }
    };
    let admission = http::admission(shared, role, headers)
        .ok_or(Refusal { status: 401, reason: "show a token: Authorization: Bearer …" })?;
    Ok((open(shared, role, admission, bell)?, protocol))
}

/// Opens a session; `bell` is rung from the hub's thread, or from the one that feeds or takes, and must not wait.
fn open(
    shared: &Arc<Shared>,
    role: Role,
    admission: Admission,
    bell: impl Fn() + Send + Sync + 'static,
) -> Result<Guest, Refusal> {
    let seat = shared.open(role, admission, None).map_err(|refused| match refused {
        Refused::Full => Refusal { status: 503, reason: "max_sessions is reached" },
        Refused::Stopping => Refusal { status: 503, reason: "the hub stops" },
        Refused::TooMany(_) => Refusal { status: 503, reason: "too many sessions begin at once" },
    })?;
    let line = Arc::new(Line { queues: Mutex::default(), bell: Box::new(bell) });
    let guest = Guest {
        line: line.clone(),
        shared: shared.clone(),
        id: seat.id,
        largest: driver::largest_message(shared, role),
    };
    let pace = driver::pace(shared, role);
    shared.spawn(driver::run_on(seat, Messages::new(line, pace)));
    Ok(guest)
}

impl Guest {
    /// A text message came. False if no more should come before the bell rings.
    #[must_use]
    pub fn feed_text(&self, text: &str) -> bool {
        if text.len() > self.largest {
            return self.feed(Err(self.too_large(text.len())));
        }
        self.feed(Ok(Message::Text(Utf8Bytes::from(text))))
    }

    /// A binary message came. False if no more should come before the bell rings.
    #[must_use]
    pub fn feed_binary(&self, bytes: &[u8]) -> bool {
        if bytes.len() > self.largest {
            return self.feed(Err(self.too_large(bytes.len())));
        }
        self.feed(Ok(Message::Binary(Bytes::copy_from_slice(bytes))))
    }

    fn too_large(&self, size: usize) -> WsError {
        WsError::Capacity(CapacityError::MessageTooLong { size, max_size: self.largest })
    }

    fn feed(&self, message: Result<Message, WsError>) -> bool {
        self.line.with(|queues| {
            if !queues.hung_up && !queues.over {
                queues.incoming_bytes += FRAME_BYTES + message.as_ref().map_or(0, Message::len);
                queues.incoming.push_back(message);
            }
            let room = queues.has_room() || queues.over;
            queues.wants_room = !room;
            (room, queues.reader.take())
        })
    }

    /// Whether more may be fed; if not, the bell rings when it may.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.line.with(|queues| {
            let room = queues.has_room() || queues.over;
            queues.wants_room = !room;
            (room, None)
        })
    }

    /// Takes what is to be sent, about 64 KiB, and says that what was taken before has been. Empty if there is nothing:
    /// then the bell rings when there is. `None` if nothing will ever come again.
    #[must_use]
    pub fn take(&self) -> Option<Vec<Outgoing>> {
        self.line.with(|queues| {
            let batch: Vec<_> = queues.outgoing.drain(..).collect();
            queues.outgoing_bytes = 0;
            queues.under_way = !batch.is_empty();
            queues.wants_items = batch.is_empty();
            let over = queues.over && batch.is_empty();
            ((!over).then_some(batch), queues.writer.take())
        })
    }

    /// The client is gone. What it sent before is still read.
    pub fn hang_up(&self) {
        self.line.with(|queues| {
            queues.hung_up = true;
            queues.under_way = false;
            queues.outgoing.clear();
            let reader = queues.reader.take();
            if let Some(writer) = queues.writer.take() {
                writer.wake(); // it only schedules the task
            }
            ((), reader)
        });
    }

    /// Whether the session is over: what was taken before need not be sent any more.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.line.queues.lock().over
    }

    /// The session's name in the hub's numbers.
    #[must_use]
    pub fn session(&self) -> String {
        self.id.to_string()
    }

    /// Notes an ack that came in another way than by a message.
    pub fn record_ack(&self, seq: u64) {
        self.shared.with(|state, _| state.record_ack(self.id, seq));
    }

    /// Chooses events on the client's behalf, without a word to it, until it chooses by itself. Where clients show
    /// tokens it gets what of them its token grants, once it has shown it.
    pub fn preset(&self, patterns: &[crate::wire::topic::Pattern]) {
        self.shared.with(|state, _| state.preset(self.id, patterns));
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.hang_up();
    }
}

/// The session's end.
struct Messages {
    line: Arc<Line>,
    /// How many messages a second may come.
    pace: Option<Pace>,
    exceeded: bool,
}

impl Messages {
    fn new(line: Arc<Line>, pace: Option<Pace>) -> Self {
        Self { line, pace, exceeded: false }
    }
}

impl Drop for Messages {
    fn drop(&mut self) {
        self.line.with(|queues| {
            queues.over = true;
            queues.incoming.clear();
            ((), None)
        });
        (self.line.bell)(); // also for a server that is busy with a client that reads nothing
    }
}

impl Wire for Messages {
    const PINGS: bool = false;

    fn exceeded(&self) -> bool {
        self.exceeded
    }

    /// The server behind this door reads what its client still sends.
    async fn linger(&mut self) {}
}

impl Stream for Messages {
    type Item = Result<Message, WsError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.exceeded {
            return Poll::Pending; // the session ends: nobody waits for this
        }
        let polled = self.line.with(|queues| {
            let polled = match queues.incoming.pop_front() {
                Some(message) => {
                    queues.incoming_bytes -= FRAME_BYTES + message.as_ref().map_or(0, Message::len);
                    Poll::Ready(Some(message))
                }
                None if queues.hung_up => Poll::Ready(None),
                None => {
                    queues.reader = Some(cx.waker().clone());
                    Poll::Pending
                }
            };
            (polled, None)
        });
        if polled.is_ready() && self.pace.as_mut().is_some_and(|pace| !pace.allows(1)) {
            self.exceeded = true;
            return Poll::Pending;
        }
        polled
    }
}

impl Sink<Message> for Messages {
    type Error = WsError;

    fn poll_ready(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), WsError>> {
        self.line.with(|queues| {
            if queues.hung_up || queues.outgoing_bytes < WRITE_BATCH {
                return (Poll::Ready(Ok(())), None);
            }
            queues.writer = Some(cx.waker().clone());
            (Poll::Pending, None)
        })
    }

    fn start_send(self: Pin<&mut Self>, message: Message) -> Result<(), WsError> {
        let Some(outgoing) = outgoing(message) else { return Ok(()) };
        self.line.with(|queues| {
            if !queues.hung_up {
                queues.outgoing_bytes += FRAME_BYTES + outgoing.len();
                queues.outgoing.push_back(outgoing);
            }
            ((), None)
        });
        Ok(())
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), WsError>> {
        self.line.with(|queues| {
            if queues.is_flushed() {
                return (Poll::Ready(Ok(())), None);
            }
            queues.writer = Some(cx.waker().clone());
            (Poll::Pending, None)
        })
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), WsError>> {
        Poll::Ready(Ok(()))
    }
}

impl Outgoing {
    fn len(&self) -> usize {
        match self {
            Self::Text(bytes) | Self::Binary(bytes) => bytes.len(),
            Self::Close(..) => 0,
        }
    }
}

/// Pings and pongs belong to the server that speaks WebSocket; a subscriber hears the hub's own ping as text.
fn outgoing(message: Message) -> Option<Outgoing> {
    match message {
        Message::Text(text) => Some(Outgoing::Text(text.into())),
        Message::Binary(bytes) => Some(Outgoing::Binary(bytes)),
        Message::Frame(frame) => match frame.header().opcode {
            OpCode::Data(Data::Text) => Some(Outgoing::Text(frame.into_payload())),
            OpCode::Data(_) => Some(Outgoing::Binary(frame.into_payload())),
            OpCode::Control(_) => None,
        },
        Message::Close(close) => Some(close.map_or(Outgoing::Close(1000, String::new()), |close| {
            Outgoing::Close(close.code.into(), close.reason.as_str().to_owned())
        })),
        Message::Ping(_) | Message::Pong(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Waker;

    use super::*;

    fn line() -> (Arc<Line>, Arc<AtomicUsize>) {
        let rung = Arc::new(AtomicUsize::new(0));
        let counter = rung.clone();
        let bell = move || {
            counter.fetch_add(1, Ordering::Relaxed);
        };
        (Arc::new(Line { queues: Mutex::default(), bell: Box::new(bell) }), rung)
    }

    fn guest(line: &Arc<Line>) -> Guest {
        let handle = crate::runtime::handle(crate::runtime::Room::Hub).expect("a thread");
        let log = crate::hub::log::Log::new("e".into(), crate::hub::HubConfig::default().log_limits());
        let log = (log, std::time::Duration::ZERO);
        let open = crate::hub::auth::Checker::new(&crate::hub::auth::Auth::None, std::time::Duration::ZERO);
        let guards = (open.expect("valid"), None);
        let shared = Arc::new(Shared::new(crate::hub::HubConfig::default(), guards, log, None, handle));
        Guest { line: line.clone(), shared, id: SessionId::for_test(0), largest: 10 }
    }

    #[test]
    fn what_is_taken_counts_as_sent_with_the_next_taking_and_the_bell_rings_for_those_who_found_nothing() {
        let (line, rung) = line();
        let (guest, mut session) = (guest(&line), Messages::new(line, None));
        let mut cx = Context::from_waker(Waker::noop());
        let text = |text: &'static str| Message::Text(Utf8Bytes::from_static(text));
        Pin::new(&mut session).start_send(text("a")).expect("open");
        assert_eq!(rung.load(Ordering::Relaxed), 0, "nobody has looked yet");
        assert_eq!(guest.take(), Some(vec![Outgoing::Text("a".into())]));
        assert!(Pin::new(&mut session).poll_flush(&mut cx).is_pending(), "under way");
        assert_eq!(guest.take(), Some(vec![]));
        assert!(Pin::new(&mut session).poll_flush(&mut cx).is_ready());
        Pin::new(&mut session).start_send(text("b")).expect("open");
        Pin::new(&mut session).start_send(text("c")).expect("open");
        assert_eq!(rung.load(Ordering::Relaxed), 1, "once for both");
        assert_eq!(guest.take().map(|batch| batch.len()), Some(2));
        drop(session);
        assert_eq!(guest.take(), None);
    }

    #[test]
    fn both_queues_are_bounded_and_hold_up_their_own_side() {
        let (line, rung) = line();
        let (guest, mut session) = (guest(&line), Messages::new(line, None));
        let mut cx = Context::from_waker(Waker::noop());
        while Pin::new(&mut session).poll_ready(&mut cx).is_ready() {
            Pin::new(&mut session).start_send(Message::Binary(Bytes::from_static(&[0; 1000]))).expect("open");
        }
        let taken = guest.take().expect("open");
        assert!((60..70).contains(&taken.len()), "{}", taken.len());
        assert!(Pin::new(&mut session).poll_ready(&mut cx).is_ready());

        let mut fed = 1;
        while guest.feed_text("0123456789") {
            fed += 1;
        }
        assert!((1700..1800).contains(&fed), "{fed}");
        assert_eq!(rung.load(Ordering::Relaxed), 0);
        assert!(Pin::new(&mut session).poll_next(&mut cx).is_ready());
        assert_eq!(rung.load(Ordering::Relaxed), 1, "there is room");
        assert!(guest.has_room());
    }

    #[test]
    fn what_came_before_the_end_is_read_and_what_is_too_large_is_told() {
        let (line, _) = line();
        let (guest, mut session) = (guest(&line), Messages::new(line, None));
        let mut cx = Context::from_waker(Waker::noop());
        let mut next = || Pin::new(&mut session).poll_next(&mut cx);
        assert!(guest.feed_text("a") && guest.feed_binary(&[0; 11]));
        guest.hang_up();
        assert!(guest.feed_text("late"));
        assert!(matches!(next(), Poll::Ready(Some(Ok(Message::Text(text)))) if text == "a"));
        assert!(matches!(next(), Poll::Ready(Some(Err(WsError::Capacity(_))))));
        assert!(matches!(next(), Poll::Ready(None)));
    }
}
