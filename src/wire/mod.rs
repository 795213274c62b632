//! What two machines may say to each other. Pure: bytes in, values out. `docs/protocol.md` is the same in prose,
//! `tests/vectors/` fixes the exact bytes.

pub mod block;
pub mod centrifugo;
pub mod close;
pub mod event;
pub mod frame;
pub mod position;
pub mod subscriber;
pub mod topic;

/// WebSocket subprotocol by which a connection says that it is an emitter.
pub const EMITTER_SUBPROTOCOL: &str = "sb.emit.v1";
/// WebSocket subprotocol of subscribers; a connection that names none is a subscriber too.
pub const SUBSCRIBER_SUBPROTOCOL: &str = "sb.v1.json";
