//! Centrifugo's client protocol (JSON, version 2), as far as its dashboards need it: commands and replies in lines of JSON,
//! several of which may share a frame. Source: <https://centrifugal.dev/docs/transports/client_protocol>.
//!
//! A channel is a [pattern](super::topic::Pattern), a publication an event, and its offset the event's in the hub's log
//! (`docs/decisions/0022-centrifugo.md`).

mod command;
mod reply;

use bytes::Bytes;

use super::close::CloseCode;
use super::event::EventHead;

pub use command::{Command, History, Request, StreamPosition, Subscribe};
pub use reply::{Failure, Subscribed, Welcome, done, history, message, publication, pushes, reply, taken_away};

/// Most commands of one frame: as many channels as a session may have.
pub const MAX_COMMANDS: usize = 256;

/// The server's ping; a client answers with the same.
pub const PING: &[u8] = b"{}";

/// The event that a publication to a channel is: the channel is its topic or its type, and the rest what it was given.
///
/// # Errors
/// It could not reach that channel, or is no event.
pub fn event(channel: &str, data: &str) -> Result<Bytes, String> {
    let (field, separator) = if channel.contains('/') { ("topic", '/') } else { ("type", '.') };
    if channel.is_empty() || channel.split(separator).any(|segment| segment == "*") {
        return Err("publish to one channel: a name, without '*'".into());
    }
    let head = EventHead::parse(data.as_bytes()).map_err(|error| format!("data is no event: {error}"))?;
    let named = if field == "topic" { head.topic } else { head.kind };
    if named == channel {
        return Ok(Bytes::copy_from_slice(data.as_bytes()));
    }
    if !named.is_empty() {
        return Err(format!("the {field} of data is '{named}', which is not the channel '{channel}'"));
    }
    let rest = data[1..].trim_start();
    let mut event = format!(r#"{{"{field}":"#).into_bytes();
    reply::string(&mut event, channel);
    event.extend_from_slice(if rest == "}" { b"" } else { b"," });
    event.extend_from_slice(rest.as_bytes());
    Ok(event.into())
}

/// The code by which a client of this protocol knows why it is closed, where that is another one: some of ours mean
/// something else there, and 3014 would make it forget where it stands.
#[must_use]
pub fn close_code(code: CloseCode) -> u16 {
    /// It comes back, and nothing is said about it.
    const SERVER_ERROR: u16 = 3004;
    /// It comes back, and is told whether it can recover.
    const INSUFFICIENT_STATE: u16 = 3010;
    /// RFC 6455 §7.4.1: a message that is too large. It does not come back.
    const TOO_LARGE: u16 = 1009;
    match code {
        CloseCode::AuthUnavailable | CloseCode::Degraded | CloseCode::Superseded => SERVER_ERROR,
        CloseCode::Restarted => INSUFFICIENT_STATE,
        CloseCode::TooLarge => TOO_LARGE,
        same => same.code(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_published_reaches_the_channel_that_it_was_published_to() {
        let made = |channel, data| event(channel, data).map(|event| String::from_utf8(event.to_vec()).expect("UTF-8"));
        assert_eq!(made("chat", r#"{ "n":1 }"#), Ok(r#"{"type":"chat","n":1 }"#.into()));
        assert_eq!(made("a/b", r#"{"type":"x"}"#), Ok(r#"{"topic":"a/b","type":"x"}"#.into()));
        assert_eq!(made("a\"b", "{ }"), Ok(r#"{"type":"a\"b"}"#.into()));
        assert_eq!(made("a", r#"{"type":"a"}"#), Ok(r#"{"type":"a"}"#.into()));
        for (channel, data) in
            [("", "{}"), ("*", "{}"), ("a.*", "{}"), ("a/*/b", "{}"), ("a", r#"{"type":"b"}"#), ("a", "[]"), ("a", "1")]
        {
            assert!(made(channel, data).is_err(), "{channel} {data}");
        }
    }

    #[test]
    fn every_close_says_what_ours_does_and_none_makes_a_client_forget_its_positions() {
        use crate::wire::close::comes_back;
        for code in [
            CloseCode::Shutdown,
            CloseCode::TokenExpired,
            CloseCode::AuthUnavailable,
            CloseCode::Slow,
            CloseCode::NoPong,
            CloseCode::Degraded,
            CloseCode::Restarted,
            CloseCode::BadFrame,
            CloseCode::Unauthorized,
            CloseCode::TooMany,
        ] {
            let there = close_code(code);
            assert_eq!(comes_back(there), comes_back(code.code()), "{code:?}");
            assert_ne!(there, 3014, "{code:?}");
        }
        assert_eq!(close_code(CloseCode::TooLarge), 1009);
    }
}
