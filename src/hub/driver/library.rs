//! Between a session and the WebSocket library: its settings, and its words for ours.

use bytes::Bytes;
use tokio_tungstenite::tungstenite::error::{Error as WsError, ProtocolError};
use tokio_tungstenite::tungstenite::protocol::frame::coding::{Data, OpCode};
use tokio_tungstenite::tungstenite::protocol::frame::{CloseFrame, Frame};
use tokio_tungstenite::tungstenite::protocol::{Message, WebSocketConfig};

use super::{WRITE_BATCH, largest_message};
use crate::hub::outbox::Item;
use crate::hub::registry::Role;
use crate::hub::shared::Shared;
use crate::wire::centrifugo;
use crate::wire::close::CloseCode;

/// Buffer of a session that sends little: thousands of dashboards must not cost a buffer for bulk input each.
const SUBSCRIBER_READ_BUFFER: usize = 2 << 10;
/// Buffer of a session that sends blocks; also the most that one system call reads.
pub(super) const EMITTER_READ_BUFFER: usize = 64 << 10;

/// The settings for a session.
pub(super) fn websocket_config(shared: &Shared, role: Role) -> WebSocketConfig {
    let largest = shared.config.max_message_bytes;
    let incoming = largest_message(shared, role);
    let read_buffer = match role {
        Role::Emitter | Role::Publisher => EMITTER_READ_BUFFER,
        Role::Subscriber | Role::Centrifugo => SUBSCRIBER_READ_BUFFER,
    };
    WebSocketConfig::default()
        .read_buffer_size(read_buffer)
        .write_buffer_size(WRITE_BATCH)
        // Frames are fed only while the buffer is below its target, so it holds at most the target, one frame of
        // the largest event with its envelope, and a pong.
        .max_write_buffer_size(2 * WRITE_BATCH + largest)
        .max_message_size(Some(incoming))
        .max_frame_size(Some(incoming))
}

/// With which code to refuse input that broke the WebSocket protocol; `None` if the connection is simply gone.
pub(super) fn refusal(error: &WsError) -> Option<CloseCode> {
    match error {
        WsError::Capacity(_) => Some(CloseCode::TooLarge),
        WsError::Protocol(ProtocolError::ResetWithoutClosingHandshake) => None,
        WsError::Protocol(_) | WsError::Utf8(_) => Some(CloseCode::BadFrame),
        _ => None,
    }
}

/// An item as the WebSocket library has it; closes have the code that a client of this role knows.
pub(super) fn message(item: Item, role: Role) -> Message {
    match item {
        // Frames are JSON that was checked when it came, or made here: not checked for UTF-8 once more.
        Item::Text(frame) => Message::Frame(Frame::message(frame, OpCode::Data(Data::Text), true)),
        Item::Binary(frame) => Message::Frame(Frame::message(frame, OpCode::Data(Data::Binary), true)),
        Item::Ping => Message::Ping(Bytes::new()),
        Item::Close(code) => {
            let number = if role == Role::Centrifugo { centrifugo::close_code(code) } else { code.code() };
            Message::Close(Some(CloseFrame { code: number.into(), reason: reason(code).into() }))
        }
    }
}

/// The words that go with a close code, for people who read a browser's console.
fn reason(code: CloseCode) -> &'static str {
    match code {
        CloseCode::Normal => "",
        CloseCode::Shutdown => "the hub stops",
        CloseCode::Slow => "too slow: come back and recover",
        CloseCode::NoPong => "no sign of life",
        CloseCode::Superseded => "a newer connection of this emitter took over",
        CloseCode::Degraded => "the hub cannot keep events at the moment: come back",
        CloseCode::Restarted => "the log began anew: come back",
        CloseCode::BadFrame => "bad frame",
        CloseCode::Unauthorized => "unauthorized",
        CloseCode::TooLarge => "message too large",
        CloseCode::TokenExpired => "the token has expired: come back with a fresh one",
        CloseCode::AuthUnavailable => "the token could not be checked at the moment: come back",
        CloseCode::TooMany => "too many frames",
    }
}
