//! What is said to a client: replies to its commands, and pushes.

use std::io::Write as _;

use bytes::Bytes;
use serde::Serialize;

/// Says to a client that a channel was taken away and is not to be subscribed to again.
const UNSUBSCRIBED_BY_SERVER: u32 = 2000;

/// Why a command is not done. The numbers are Centrifugo's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Failure {
    /// Not at the moment.
    Internal = 100,
    /// No token, or none that is known.
    Unauthorized = 101,
    /// The token does not grant it.
    PermissionDenied = 103,
    /// The channel is subscribed to.
    AlreadySubscribed = 105,
    /// More channels than a session may have.
    LimitExceeded = 106,
    /// It makes no sense.
    BadRequest = 107,
    /// Not done here.
    NotAvailable = 108,
    /// The token was good once.
    TokenExpired = 109,
    /// The log does not have all that lies behind the position.
    Unrecoverable = 112,
}

impl Failure {
    /// The reply to a command that fails.
    #[must_use]
    pub fn reply(self, id: u32, message: &str) -> Bytes {
        #[derive(Serialize)]
        struct Reply<'a> {
            id: u32,
            error: Error<'a>,
        }
        #[derive(Serialize)]
        struct Error<'a> {
            code: u16,
            message: &'a str,
            #[serde(skip_serializing_if = "std::ops::Not::not")]
            temporary: bool,
        }
        json(&Reply { id, error: Error { code: self as u16, message, temporary: self == Self::Internal } })
    }
}

/// Who a session is, and for how long; the reply to `connect` and to `refresh`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Welcome<'a> {
    /// Name of the session.
    pub client: &'a str,
    /// What serves it.
    pub version: &'a str,
    /// Whether its token ends some time.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub expires: bool,
    /// Seconds after which it should show a fresh one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttl: Option<u64>,
    /// Seconds between two pings; absent in the reply to `refresh`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ping: Option<u64>,
    /// Whether pings are to be answered.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub pong: bool,
}

/// Where a subscription begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "the protocol has them")]
pub struct Subscribed<'a> {
    /// The client may come back for what it missed; always here.
    pub recoverable: bool,
    /// Publications carry offsets; always here.
    pub positioned: bool,
    /// Epoch of the log.
    pub epoch: &'a str,
    /// Where the client stands: what lies behind comes as publications.
    pub offset: u64,
    /// Whether it asked for what it missed.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub was_recovering: bool,
    /// Whether it gets exactly that.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub recovered: bool,
}

/// A reply that names what it replies to and holds `result` there.
#[must_use]
pub fn reply(id: u32, name: &str, result: &impl Serialize) -> Bytes {
    let mut reply = format!(r#"{{"id":{id},"{name}":"#).into_bytes();
    // Strings and numbers only: cannot fail.
    drop(serde_json::to_writer(&mut reply, result));
    reply.push(b'}');
    reply.into()
}

/// The reply to a command that needs no words.
#[must_use]
pub fn done(id: u32, name: &str) -> Bytes {
    format!(r#"{{"id":{id},"{name}":{{}}}}"#).into()
}

/// The reply to `history`; publications are put together with [`publication`].
#[must_use]
pub fn history(id: u32, publications: &[Vec<u8>], epoch: &str, offset: u64) -> Bytes {
    let mut reply = format!(r#"{{"id":{id},"history":{{"publications":["#).into_bytes();
    reply.extend_from_slice(&publications.join(&b','));
    reply.extend_from_slice(br#"],"epoch":"#);
    string(&mut reply, epoch);
    drop(write!(reply, r#","offset":{offset}}}}}"#)); // a vector takes everything
    reply.into()
}

/// Adds an event to `out`, as a channel's publication.
pub fn publication(out: &mut Vec<u8>, offset: u64, event: &[u8]) {
    out.extend_from_slice(br#"{"data":"#);
    one_line(out, event);
    drop(write!(out, r#","offset":{offset}}}"#)); // a vector takes everything
}

/// Brings an event to a session that has these channels of it: one push in each line.
#[must_use]
pub fn pushes<'a>(channels: impl IntoIterator<Item = &'a str>, offset: u64, event: &[u8]) -> Bytes {
    const AROUND: usize = 96;
    let mut out = Vec::with_capacity(AROUND + event.len());
    for channel in channels {
        if !out.is_empty() {
            out.push(b'\n');
        }
        out.extend_from_slice(br#"{"push":{"channel":"#);
        string(&mut out, channel);
        out.extend_from_slice(br#","pub":"#);
        publication(&mut out, offset, event);
        out.extend_from_slice(b"}}");
    }
    out.into()
}

/// Tells a client something that belongs to no channel: a frame of the hub's own protocol, or what one is like.
#[must_use]
pub fn message(frame: &[u8]) -> Bytes {
    let mut out = br#"{"push":{"message":{"data":"#.to_vec();
    one_line(&mut out, frame);
    out.extend_from_slice(b"}}}");
    out.into()
}

/// Takes a channel away.
#[must_use]
pub fn taken_away(channel: &str) -> Bytes {
    let mut out = br#"{"push":{"channel":"#.to_vec();
    string(&mut out, channel);
    let reason = "the token does not grant it any more";
    // A vector takes everything.
    drop(write!(out, r#","unsubscribe":{{"code":{UNSUBSCRIBED_BY_SERVER},"reason":"{reason}"}}}}}}"#));
    out.into()
}

/// JSON without line breaks, which would end the line: they may only stand between its tokens.
fn one_line(out: &mut Vec<u8>, json: &[u8]) {
    let start = out.len();
    out.extend_from_slice(json);
    let mut rest = &mut out[start..];
    while let Some(at) = memchr::memchr(b'\n', rest) {
        rest[at] = b' ';
        rest = &mut rest[at + 1..];
    }
}

pub(super) fn string(out: &mut Vec<u8>, text: &str) {
    drop(serde_json::to_writer(out, text)); // a vector takes everything
}

fn json(value: &impl Serialize) -> Bytes {
    serde_json::to_vec(value).unwrap_or_default().into() // strings and numbers only: cannot fail
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line_for_each_channel() {
        let text = |bytes: Bytes| String::from_utf8(bytes.to_vec()).expect("UTF-8");
        let event = b"{\n\"type\":\"a\\n\",\r\n\"n\":\n1}";
        let want = concat!(
            r#"{"push":{"channel":"a.*","pub":{"data":{ "type":"a\n",@ "n": 1},"offset":7}}}"#,
            "\n",
            r#"{"push":{"channel":"\"","pub":{"data":{ "type":"a\n",@ "n": 1},"offset":7}}}"#
        );
        assert_eq!(text(pushes(["a.*", "\""], 7, event)), want.replace('@', "\r"));
        assert_eq!(text(message(b"{\n}")), r#"{"push":{"message":{"data":{ }}}}"#);
    }

    #[test]
    fn replies_name_their_command() {
        let text = |bytes: Bytes| String::from_utf8(bytes.to_vec()).expect("UTF-8");
        assert_eq!(text(done(3, "unsubscribe")), r#"{"id":3,"unsubscribe":{}}"#);
        assert_eq!(text(Failure::Unrecoverable.reply(3, "no")), r#"{"id":3,"error":{"code":112,"message":"no"}}"#);
        let temporary = r#"{"id":3,"error":{"code":100,"message":"no","temporary":true}}"#;
        assert_eq!(text(Failure::Internal.reply(3, "no")), temporary);
        let subscribed = Subscribed {
            recoverable: true,
            positioned: true,
            epoch: "e",
            offset: 0,
            was_recovering: false,
            recovered: false,
        };
        let want = r#"{"id":3,"subscribe":{"recoverable":true,"positioned":true,"epoch":"e","offset":0}}"#;
        assert_eq!(text(reply(3, "subscribe", &subscribed)), want);
        assert_eq!(
            text(history(4, &[b"1".to_vec(), b"2".to_vec()], "e", 9)),
            r#"{"id":4,"history":{"publications":[1,2],"epoch":"e","offset":9}}"#
        );
        let unsubscribe: serde_json::Value = serde_json::from_slice(&taken_away("a")).expect("JSON");
        assert_eq!(unsubscribe["push"]["unsubscribe"]["code"], 2000);
    }
}
