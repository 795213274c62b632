//! The session machines: what a hub answers to what it hears. Pure, so that every schedule can be tried: frames and
//! time come as arguments, answers go to the session's outbox in the shared [`State`](super::state::State).

mod access;
mod centrifugo;
mod emitter;
mod intake;
mod liveness;
mod publisher;
mod subscriber;

pub use access::{Access, Checked};
pub use centrifugo::{Asked, CentrifugoMachine};
pub use emitter::{CREDIT, EmitterMachine, Greeting, Step, Turn};
pub use intake::Intake;
pub use liveness::{Beat, Liveness};
pub use publisher::PublisherMachine;
pub use subscriber::SubscriberMachine;
