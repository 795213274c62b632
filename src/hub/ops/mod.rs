//! What sessions and publishers bring where it must be kept somewhere before it counts: a log on disk
//! ([`history`](super::history)) or a bus that many hubs share ([`bridge`](super::bridge)).
//!
//! ```text
//!  sessions ─▶ Op ─▶ keeper { judges, keeps } ─▶ Outcome ─▶ settle ─▶ state
//!  publishers ▶ ┘                                               └─▶ acks, subscribers
//! ```
//!
//! Everything takes the same way in the same order, `hello` too: its answer counts what was on its way. Outcomes are
//! settled in the hub's runtime, a slice at a time, so that subscribers keep up.

mod flow;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

pub(super) use flow::Flow;

use super::bridge::Bridge;
use super::entry::Record;
use super::history::History;
use super::history::ledger::Verdict;
use super::machine::Turn;
use super::registry::{SessionId, frame_cost};
use super::shared::Shared;
use super::state::{Published, State};
use crate::error::{Error, Result};
use crate::wire::close::CloseCode;

/// How much is brought to the subscribers before they have their turn: a quarter of a queue at most,
/// as an emitter that is read.
const SLICE_BYTES: usize = 128 << 10;
/// How often it lets others go first before it goes on.
const ROUNDS: u8 = 16;

/// Who keeps events before anybody hears of them.
pub(super) enum Keeper {
    /// A log on disk.
    Log(History),
    /// A bus.
    Bus(Bridge),
}

impl Keeper {
    /// Hands over what a session brought. False if the keeper is closed: the session is to end.
    pub(super) fn submit(&self, turn: Turn, flow: &Arc<Flow>) -> bool {
        let bytes = turn.bytes();
        flow.begin(bytes, turn.greeting.is_some());
        self.send(Op::Turn { turn, flow: flow.clone(), bytes }).is_ok()
    }

    /// Publishes events; `reply` is called in the hub's thread when all of them are kept and on their way to the
    /// subscribers.
    pub(super) fn publish(&self, records: Vec<Record>, reply: Reply) {
        if let Err(closed) = self.send(Op::Publish { records, reply })
            && let Op::Publish { reply, .. } = *closed
            && let Some(error) = self.log().and_then(History::death)
        {
            reply.give(Err(error));
        } // the reply of a keeper that was closed is dropped, which tells it
    }

    /// A session is gone.
    pub(super) fn release(&self, id: SessionId, name: &Arc<str>) {
        drop(self.send(Op::Release { id, name: name.clone() })); // a closed keeper has nothing to release
    }

    /// Keeps what waits, and ends.
    pub(super) async fn close(&self) {
        let (done, closed) = oneshot::channel();
        if self.send(Op::Close { done }).is_ok() {
            drop(closed.await); // an error means that it ended in another way
        }
    }

    fn send(&self, op: Op) -> std::result::Result<(), Box<Op>> {
        match self {
            Self::Log(history) => history.send(op),
            Self::Bus(bridge) => bridge.send(op),
        }
    }

    /// The log on disk, if it is one.
    pub(super) fn log(&self) -> Option<&History> {
        if let Self::Log(history) = self { Some(history) } else { None }
    }

    /// The bus, if it is one.
    pub(super) fn bus(&self) -> Option<&Bridge> {
        if let Self::Bus(bridge) = self { Some(bridge) } else { None }
    }
}

/// Who hears what became of a published event. If nothing will, because the hub stops, that is said.
pub(super) struct Reply(Option<Box<dyn FnOnce(Result<Published>) + Send>>);

impl Reply {
    pub(super) fn new(then: impl FnOnce(Result<Published>) + Send + 'static) -> Self {
        Self(Some(Box::new(then)))
    }

    fn give(mut self, published: Result<Published>) {
        if let Some(then) = self.0.take() {
            then(published);
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(then) = self.0.take() {
            then(Err(super::stopped()));
        }
    }
}

/// Work for a keeper.
pub(super) enum Op {
    Turn { turn: Turn, flow: Arc<Flow>, bytes: usize },
    Publish { records: Vec<Record>, reply: Reply },
    Release { id: SessionId, name: Arc<str> },
    Close { done: oneshot::Sender<()> },
}

/// What became of an op, for the hub to act on.
pub(super) enum Outcome {
    /// A turn was judged; its records are appended when it is settled.
    Turn { turn: Turn, flow: Arc<Flow>, bytes: usize, verdict: Verdict },
    /// Records were kept, to be appended when they are settled; or were not.
    Publish { records: Vec<Record>, reply: Reply, error: Option<Error> },
    /// Records were published that have come into the log already.
    Published { reply: Reply, published: Published },
    /// Records came from elsewhere.
    Heard { records: Vec<Record> },
}

impl Outcome {
    /// What of it is to be kept, and appended.
    pub(super) fn records(&self) -> &[Record] {
        match self {
            Self::Turn { verdict: Verdict::Refused, .. } | Self::Published { .. } => &[],
            Self::Turn { turn, .. } => &turn.records,
            Self::Publish { records, .. } | Self::Heard { records } => records,
        }
    }

    /// It was not kept.
    pub(super) fn fail(&mut self, cause: &Error) {
        match self {
            Self::Turn { verdict, .. } => *verdict = Verdict::Refused,
            Self::Publish { error, .. } => *error = Some(Error::new(cause.kind(), cause.report())),
            Self::Published { .. } | Self::Heard { .. } => {}
        }
    }

    fn settle(self, state: &mut State, now: Duration) -> Tell {
        match self {
            Self::Turn { turn, flow, bytes, verdict } => {
                let greets = turn.greeting.is_some();
                let have = match verdict {
                    Verdict::Refused => {
                        // It was superseded, and is closed for that already, or something was not kept.
                        state.registry.order_close(turn.id, CloseCode::Degraded);
                        return Tell::Flow { flow, bytes, greeted: greets.then_some(None) };
                    }
                    Verdict::Greeted { have, superseded } => {
                        state.supersede(superseded);
                        Some(have)
                    }
                    Verdict::Stored => None,
                };
                if let Some(upto) = turn.acknowledges() {
                    flow.acknowledge(upto);
                }
                turn.settle(have, state, now);
                Tell::Flow { flow, bytes, greeted: greets.then_some(have) }
            }
            Self::Publish { records, reply, error } => {
                let published = match error {
                    None => state.append_all(records, now).ok_or_else(super::stopped),
                    Some(error) => Err(error),
                };
                Tell::Publisher { reply, published }
            }
            Self::Published { reply, published } => Tell::Publisher { reply, published: Ok(published) },
            Self::Heard { records } => {
                state.presence.overhear(&records, now);
                state.append_all(records, now);
                Tell::Nobody
            }
        }
    }
}

/// What is said once the state is no longer locked: it wakes others, or is their code.
enum Tell {
    Flow { flow: Arc<Flow>, bytes: usize, greeted: Option<flow::Greeted> },
    Publisher { reply: Reply, published: Result<Published> },
    Nobody,
}

impl Tell {
    fn now(self) {
        match self {
            Self::Flow { flow, bytes, greeted } => flow.end(bytes, greeted),
            Self::Publisher { reply, published } => reply.give(published),
            Self::Nobody => {}
        }
    }
}

/// Most bytes of a session's queue that are brought to the subscribers before they have their turn.
pub(super) fn slice(shared: &Shared) -> usize {
    SLICE_BYTES.min(shared.config.session_queue_bytes / 4)
}

/// Acts on outcomes in their order, a slice at a time; whoever they woke goes first.
pub(super) async fn settle(shared: &Shared, outcomes: Vec<Outcome>) {
    let slice = slice(shared);
    let mut outcomes = outcomes.into_iter().peekable();
    while outcomes.peek().is_some() {
        let after = shared.with(|state, now| {
            let (mut after, mut bytes) = (Vec::new(), 0);
            while bytes < slice
                && let Some(outcome) = outcomes.next()
            {
                bytes += outcome.records().iter().map(frame_cost).sum::<usize>();
                after.push(outcome.settle(state, now));
            }
            after
        });
        for tell in after {
            tell.now();
        }
        // The subscribers that were woken go first; one that this runtime does not poll is not waited for.
        for _ in 0..ROUNDS {
            tokio::task::yield_now().await;
            if !shared.with(|state, _| state.registry.has_unserved()) {
                break;
            }
        }
    }
}
