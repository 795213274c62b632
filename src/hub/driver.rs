//! The task of a session: moves messages between its [`Wire`] and the session's machine and outbox.
//!
//! One task for both directions, so that a peer that does not read can still be heard and closed. An emitter's
//! input is read in batches; a batch takes the lock once, wakes each subscriber once, and its ack is sent after the
//! subscribers had their turn (the runtime serves tasks in the order in which they were woken). For the same reason
//! an emitter is not read on while subscribers that were woken have not had their turn since its last batch, or since
//! all emitters together have filled a quarter of a queue; and a batch is at most another quarter, however large the
//! frames and however small the events. So a subscriber whose socket takes what it is given is never closed as slow for
//! bytes that it had no chance to send.

mod asked;
mod library;
mod reading;

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use futures_util::SinkExt as _;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::oneshot;
use tokio::time::{Instant, MissedTickBehavior, Sleep};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::Error as WsError;
use tokio_tungstenite::tungstenite::protocol::Role as WsRole;

use super::auth::Grant;
use super::doors::Wire;
use super::entry::Encoding;
use super::machine::{
    Access, Beat, CentrifugoMachine, Checked, EmitterMachine, Intake, Liveness, PublisherMachine, SubscriberMachine,
};
use super::meter::{Metered, Pace};
use super::ops::Flow;
use super::outbox::Item;
use super::registry::{Interest, Registry, Role, SessionId};
use super::shared::{Admission, Seat, Shared};
use super::state::Published;
use crate::error::Result;
use crate::wire::close::CloseCode;
use library::{message, websocket_config};

/// How much is read from a peer before others have their turn: enough for thousands of small events.
pub(super) const READ_BATCH: usize = 128 << 10;
/// How often an emitter gives way in one turn. A session that this runtime polls is served within one round; another
/// one must not hold everybody up.
const ROUNDS: u8 = 16;
/// How much is moved from the outbox at once; what was moved is no longer counted in its bound.
pub(super) const WRITE_BATCH: usize = 64 << 10;
/// How long a peer may take to read the rest and to answer the close.
const CLOSE_DEADLINE: Duration = Duration::from_secs(5);
/// Longest that the timer of a session is set for: it looks again, and clocks have ends.
const LONGEST_SLEEP: Duration = Duration::from_secs(86_400);

type Checking = Pin<Box<dyn Future<Output = Checked> + Send>>;

enum Machine {
    Emitter(Box<EmitterMachine>),
    Subscriber(SubscriberMachine),
    Centrifugo(Box<CentrifugoMachine>),
    Publisher(PublisherMachine),
}

impl Machine {
    /// Whether it has enough for one turn.
    fn is_full(&self) -> bool {
        match self {
            Self::Emitter(machine) => machine.is_full(),
            Self::Publisher(machine) => machine.is_full(),
            Self::Subscriber(_) | Self::Centrifugo(_) => false,
        }
    }
}

/// Why the task stops polling its stream.
enum Event {
    /// The session is to end: its peer has until the deadline.
    Closing,
    /// The stream is at its end, or broken.
    Ended,
}

/// What became of the frames that were handed to the stream.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Output {
    /// All of them are with the operating system.
    Flushed,
    /// Some lie in the stream's buffer.
    Fed,
    /// Some do, and the last flush could not get rid of them.
    Waiting,
    /// So many do that no more are taken.
    Full,
}

/// How far the session's end is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    Open,
    /// The deadline runs.
    Ordered,
    /// The close frame was handed to the stream.
    Sent,
}

struct Session<W> {
    wire: W,
    machine: Machine,
    seat: Seat,
    /// What of this session is on its way to a keeper.
    flow: Arc<Flow>,
    /// Wakes the task for an ack that waits or a token that expires, and for when. Made for the first one and set
    /// anew for each.
    timer: Option<(Duration, Pin<Box<Sleep>>)>,
    access: Access,
    /// A token is being checked; nothing is read until it is.
    checking: Option<Checking>,
    /// A subscriber's event is on its way to the log; nothing is read until it is there.
    publishing: Option<oneshot::Receiver<Result<Published>>>,
    outgoing: VecDeque<Item>,
    output: Output,
    ending: Ending,
    /// The input broke the WebSocket protocol: nothing of it can be read any more.
    deaf: bool,
    /// The turn in which it last gave way to others, and how often.
    gave_way: (u64, u8),
    liveness: Liveness,
}

/// Runs a session on a stream whose handshake is done; `read_ahead` is what was read of it already.
pub(super) async fn run<S: AsyncRead + AsyncWrite + Unpin + Send>(seat: Seat, stream: S, read_ahead: Bytes) {
    let config = websocket_config(&seat.shared, seat.role);
    let stream = Metered::new(stream, pace(&seat.shared, seat.role));
    let ws = WebSocketStream::from_partially_read(stream, read_ahead.into(), WsRole::Server, Some(config)).await;
    run_on(seat, ws).await;
}

/// Runs a session to its end.
pub(super) async fn run_on<W: Wire>(seat: Seat, wire: W) {
    let mut beat =
        tokio::time::interval_at(Instant::now() + seat.shared.config.ping_interval, seat.shared.config.ping_interval);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut session = Session::new(wire, seat);
    let mut deadline: Option<Pin<Box<Sleep>>> = None;
    loop {
        tokio::select! {
            biased;
            event = poll_fn(|cx| session.poll(cx)) => match event {
                Event::Closing => deadline = Some(Box::pin(tokio::time::sleep(CLOSE_DEADLINE))),
                Event::Ended => break,
            },
            _ = beat.tick() => session.beat(),
            () = poll_fn(|cx| deadline.as_mut().map_or(Poll::Pending, |sleep| sleep.as_mut().poll(cx))) => break,
        }
    }
    if session.deaf {
        // Boxed: its buffer would be a part of every session's memory.
        Box::pin(session.wire.linger()).await;
    }
}

/// How many frames may come, where that is bounded.
pub(super) fn pace(shared: &Shared, role: Role) -> Option<Pace> {
    role.subscribes().then(|| Pace::new(shared.config.frame_rate))
}

/// Most bytes of one message that is taken from a peer.
pub(super) fn largest_message(shared: &Shared, role: Role) -> usize {
    match role {
        Role::Emitter | Role::Publisher => shared.config.max_message_bytes,
        Role::Subscriber | Role::Centrifugo => shared.config.max_subscriber_message_bytes,
    }
}

impl<W: Wire> Session<W> {
    fn new(wire: W, mut seat: Seat) -> Self {
        let shared = &seat.shared;
        let (access, checking) = match std::mem::replace(&mut seat.admission, Admission::Awaited) {
            Admission::Granted(grant) => {
                let until = shared.until(&grant);
                (Access::granted(seat.id, grant, until), None)
            }
            admission => {
                let checking = match admission {
                    Admission::Token(token) => Some(Box::pin(shared.clone().check(token)) as Checking),
                    _ => None,
                };
                (Access::awaited(seat.id, shared.now() + shared.config.auth_timeout), checking)
            }
        };
        let publish = access.grant().and_then(|grant| grant.publish.clone());
        let mut intake = Intake::new(shared.config.session_queue_bytes / 4, shared.entities.clone());
        intake.limit_to(publish);
        let machine = match seat.role {
            Role::Emitter => Machine::Emitter(Box::new(EmitterMachine::new(seat.id).taking(intake))),
            Role::Subscriber => Machine::Subscriber(SubscriberMachine::new(seat.id)),
            Role::Centrifugo => {
                Machine::Centrifugo(Box::new(CentrifugoMachine::new(seat.id, shared.config.ping_interval)))
            }
            Role::Publisher => Machine::Publisher(PublisherMachine::new(seat.id).taking(intake)),
        };
        if shared.auth.is_on() && seat.role == Role::Subscriber {
            shared.with(|state, _| access.announce(state));
        }
        Self {
            wire,
            machine,
            seat,
            flow: Arc::default(),
            timer: None,
            access,
            checking,
            publishing: None,
            outgoing: VecDeque::new(),
            output: Output::Flushed,
            ending: Ending::Open,
            deaf: false,
            gave_way: (0, 0),
            liveness: Liveness::default(),
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        let ending = self.ending;
        if self.poll_write(cx).is_err() {
            return Poll::Ready(Event::Ended);
        }
        if ending == Ending::Open && self.is_ending() {
            return Poll::Ready(Event::Closing);
        }
        if self.deaf {
            let done = self.ending == Ending::Sent && self.output == Output::Flushed;
            return if done { Poll::Ready(Event::Ended) } else { Poll::Pending };
        }
        let polled = if self.poll_asked(cx).is_ready() { self.poll_read(cx) } else { Poll::Pending };
        self.poll_timer(cx);
        polled
    }

    /// Does what is due, and has the task woken for what will be.
    fn poll_timer(&mut self, cx: &mut Context<'_>) {
        let now = self.seat.shared.now();
        let is_due = |at: Option<Duration>| at.is_some_and(|at| at <= now);
        let ack = |machine: &Machine| if let Machine::Emitter(machine) = machine { machine.deadline() } else { None };
        // Who has shown a token is not late because it takes time to check it; that has a bound of its own.
        let access = if self.checking.is_none() { self.access.deadline() } else { None };
        if is_due(access) {
            let role = self.seat.role;
            self.seat.shared.with(|state, now| self.access.on_time(now, role, state));
            self.deaf = true;
        }
        if is_due(ack(&self.machine)) {
            self.commit();
        }
        let Some(due) = ack(&self.machine).into_iter().chain(access.filter(|at| *at > now)).min() else { return };
        let wake = Instant::now() + due.saturating_sub(now).min(LONGEST_SLEEP);
        let (set_for, timer) = self.timer.get_or_insert_with(|| (due, Box::pin(tokio::time::sleep_until(wake))));
        if std::mem::replace(set_for, due) != due {
            timer.as_mut().reset(wake);
        }
        if timer.as_mut().poll(cx).is_ready() {
            // A moment early, or after the longest sleep.
            timer.as_mut().reset(wake);
            cx.waker().wake_by_ref();
        }
    }

    fn is_ending(&mut self) -> bool {
        if self.ending == Ending::Open && self.with_registry(|registry, id| registry.is_closing(id)) {
            self.ending = Ending::Ordered;
        }
        self.ending != Ending::Open
    }

    /// Sends what waits, as far as the socket takes it.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> std::result::Result<(), WsError> {
        while self.ending != Ending::Sent && (!self.outgoing.is_empty() || self.refill(cx)) {
            if self.wire.poll_ready_unpin(cx)?.is_pending() {
                self.output = Output::Full;
                // The socket wakes this task when it takes more; only an order to close is of interest until then.
                self.with_registry(|registry, id| registry.park(id, Interest::Close, cx.waker().clone()));
                return Ok(());
            }
            self.sent_to(Output::Fed);
            if let Some(item) = self.outgoing.pop_front() {
                if let Item::Close(code) = item {
                    *self.seat.shared.closes.lock().entry(code.code()).or_default() += 1;
                    self.ending = Ending::Sent;
                }
                self.wire.start_send_unpin(message(item, self.seat.role))?;
            }
        }
        if self.output != Output::Flushed {
            let flushed = self.wire.poll_flush_unpin(cx)?.is_ready();
            self.sent_to(if flushed { Output::Flushed } else { Output::Waiting });
        }
        Ok(())
    }

    /// A full socket that takes bytes again is a sign of life; one that was never full proves nothing, because the
    /// operating system takes bytes for a dead peer too. A server that is not ours says itself what it has taken.
    fn sent_to(&mut self, output: Output) {
        match (self.output, output) {
            (Output::Waiting, Output::Fed) => return, // more lies on top, and nothing has moved
            (Output::Full, Output::Fed) | (Output::Full | Output::Waiting, Output::Flushed) => self.liveness.progress(),
            (Output::Fed, Output::Flushed) if !W::PINGS => self.liveness.progress(),
            _ => {}
        }
        self.output = output;
    }

    /// Takes from the outbox; false, and registered to be woken, if there is nothing.
    fn refill(&mut self, cx: &mut Context<'_>) -> bool {
        self.seat.shared.with(|state, _| {
            state.take(self.seat.id, WRITE_BATCH, &mut self.outgoing);
            if self.outgoing.is_empty() {
                state.registry.park(self.seat.id, Interest::Items, cx.waker().clone());
            }
        });
        !self.outgoing.is_empty()
    }

    fn beat(&mut self) {
        let told = |registry: &mut Registry, id| registry.encoding(id) != Encoding::Raw;
        let pings = W::PINGS || (self.seat.role.subscribes() && self.with_registry(told));
        if !pings {
            return; // whether it is there is for the server to find out that holds its socket
        }
        if self.flow.is_shut() || self.checking.is_some() || self.publishing.is_some() {
            self.liveness.progress(); // a peer that is not read cannot be heard
        }
        let beat = self.liveness.beat();
        let id = self.seat.id;
        self.seat.shared.with(|state, _| match beat {
            Beat::Ping => match &self.machine {
                Machine::Centrifugo(machine) if machine.ping(state) || !W::PINGS => {}
                _ if W::PINGS => state.registry.push_ping(id),
                _ => {
                    let ping = state.heartbeat(id).ping();
                    state.registry.push(id, ping);
                }
            },
            Beat::Dead => state.registry.order_close(id, CloseCode::NoPong),
        });
    }

    fn with_registry<R>(&self, act: impl FnOnce(&mut Registry, SessionId) -> R) -> R {
        self.seat.shared.with(|state, _| act(&mut state.registry, self.seat.id))
    }
}

impl<W> Drop for Session<W> {
    fn drop(&mut self) {
        if let Machine::Emitter(machine) = &mut self.machine {
            match &self.seat.shared.keeper {
                Some(keeper) => keeper.release(self.seat.id, machine.name()),
                None => self.seat.shared.with(|state, _| machine.end(state)),
            }
        }
    }
}

/// Opens an emitter session on a pipe within this process.
pub(super) fn dial(shared: &Arc<Shared>) -> std::io::Result<tokio::io::DuplexStream> {
    /// What fits into the pipe before the emitter has to wait.
    const PIPE: usize = 256 << 10;
    let seat = shared.open(Role::Emitter, Admission::Granted(Grant::everything()), None).map_err(|refused| {
        std::io::Error::new(std::io::ErrorKind::ConnectionRefused, format!("the hub takes no session: {refused:?}"))
    })?;
    let (near, far) = tokio::io::duplex(PIPE);
    shared.spawn(run(seat, far, Bytes::new()));
    Ok(near)
}
