//! Frames between subscriber and hub (`sb.v1.json`): JSON text `{"type": …, "data": {…}}`.
//!
//! A receiver ignores frames whose `type` it does not know, so that either side may be newer. The frames that carry
//! events are put together from bytes, because an event is passed on exactly as its emitter wrote it.

use std::borrow::Cow;
use std::io::Write;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::frame::Reconnect;
use super::position::Position;
use super::topic::Pattern;
use crate::secret::Secret;

/// Most patterns that one frame may name: far beyond real dashboards, small enough to be harmless.
pub const MAX_PATTERNS: usize = 256;

/// What a subscriber says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SubscriberFrame {
    /// Shows who it is.
    Auth {
        /// What proves it.
        token: Secret,
    },
    /// Adds patterns.
    Subscribe(Subscribe),
    /// Takes patterns away.
    Unsubscribe {
        /// Patterns to remove; not empty.
        events: Vec<Pattern>,
    },
    /// Everything up to `sequence` was processed. Cumulative.
    Ack {
        /// Highest seq covered.
        sequence: u64,
    },
    /// Asks for a pong.
    Ping,
    /// Answers a ping.
    Pong,
    /// A newer client's frame; to be ignored.
    Unknown,
}

/// What a subscriber asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Subscribe {
    /// Patterns to add; not empty.
    pub events: Vec<Pattern>,
    /// Where it stood when it was last connected: what came since is to be sent again.
    pub since: Option<Position>,
    /// What is to happen if it reads too slowly, from now on.
    pub slow: Option<Slow>,
    /// Whether it takes compressed events, from now on.
    pub deflate: Option<bool>,
}

/// The name of the one way to compress; whoever names another one gets text.
pub const DEFLATE: &str = "deflate";

/// What happens to a session that reads too slowly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Slow {
    /// It is closed, and comes back for what it missed.
    #[default]
    Disconnect,
    /// Of the events that wait, only the newest of each key is kept.
    Conflate,
    /// Events that find no room are left out.
    DropWithGap,
}

impl Slow {
    /// All, by name.
    pub const ALL: [(&'static str, Self); 3] =
        [("disconnect", Self::Disconnect), ("conflate", Self::Conflate), ("drop_with_gap", Self::DropWithGap)];
}

/// What brings an event to a subscriber.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Wrapping {
    /// A frame with its `seq` and `prev`, by which the client proves that it has everything.
    #[default]
    Event,
    /// The event alone, for clients that know nothing else.
    Raw,
}

impl Wrapping {
    /// All, by name.
    pub const ALL: [(&'static str, Self); 2] = [("event", Self::Event), ("raw", Self::Raw)];
}

/// Why a session does not get an event that its patterns match.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Missed {
    /// There was no room.
    Shed,
    /// A newer event with the same key came.
    Conflated,
}

#[derive(Deserialize)]
struct Said<'a> {
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Selection {
    events: Vec<String>,
    since: Option<Position>,
    slow: Option<Slow>,
    compression: Option<String>,
}

#[derive(Deserialize)]
struct Credentials {
    token: String,
}

#[derive(Deserialize)]
struct Acked {
    sequence: u64,
}

impl SubscriberFrame {
    /// Reads a text frame.
    ///
    /// # Errors
    /// A sentence for the client: what about the frame is wrong.
    pub fn decode(text: &str) -> Result<Self, String> {
        // serde would take an array for a struct too.
        if !text.trim_start().starts_with('{') {
            return Err("a frame is a JSON object".to_owned());
        }
        let said: Said<'_> = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let data = said.data.map_or("{}", RawValue::get);
        Ok(match said.kind.as_ref() {
            "subscribe" => Self::Subscribe(selection(data)?),
            "auth" => {
                // Not in serde's words: they quote what they do not understand.
                let shown: Credentials = serde_json::from_str(data).map_err(|_| "data.token is a text".to_owned())?;
                Self::Auth { token: Secret::new(shown.token) }
            }
            "unsubscribe" => Self::Unsubscribe { events: selection(data)?.events },
            "ack" => {
                let acked: Acked = serde_json::from_str(data).map_err(|error| format!("data: {error}"))?;
                Self::Ack { sequence: acked.sequence }
            }
            "ping" => Self::Ping,
            "pong" => Self::Pong,
            _ => Self::Unknown,
        })
    }
}

fn selection(data: &str) -> Result<Subscribe, String> {
    let selection: Selection = serde_json::from_str(data).map_err(|error| format!("data: {error}"))?;
    if selection.events.is_empty() || selection.events.len() > MAX_PATTERNS {
        return Err(format!("data.events names 1 to {MAX_PATTERNS} patterns, not {}", selection.events.len()));
    }
    let parse = |text: &String| Pattern::parse(text).map_err(|error| format!("data.events: {error}"));
    let events = selection.events.iter().map(parse).collect::<Result<_, _>>()?;
    let deflate = selection.compression.map(|name| name == DEFLATE);
    Ok(Subscribe { events, since: selection.since, slow: selection.slow, deflate })
}

/// Answer to `subscribe`: the patterns that hold now, and the first position.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Subscribed<'a> {
    /// All patterns of the session, in the order in which they came.
    pub events: Vec<&'a str>,
    /// Epoch of the hub's log.
    pub epoch: &'a str,
    /// Where live events begin: the `prev` of the first one.
    pub offset: u64,
    /// Whether everything since the given position follows; absent where none was given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recovered: Option<bool>,
    /// How many events follow as replay.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub replayed: Option<u64>,
    /// Why not recovered: `epoch`, `truncated`, `ahead`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<&'a str>,
    /// How large events are compressed; absent unless that was asked for and is done.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compression: Option<&'a str>,
}

impl Subscribed<'_> {
    /// The frame as JSON text.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        #[derive(Serialize)]
        struct Frame<'a> {
            action: &'static str,
            #[serde(flatten)]
            body: &'a Subscribed<'a>,
        }
        json(&Frame { action: "subscribed", body: self })
    }
}

/// Which kind of log entry a frame carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Carried {
    /// An emitter's event.
    Event,
    /// Events of an emitter that will never come.
    Gap,
}

/// What stands around a log entry on its way to a subscriber.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// Event or gap.
    pub carried: Carried,
    /// Its offset in the log.
    pub seq: u64,
    /// The offset before it that the same filter matched.
    pub prev: u64,
    /// Whether it is sent again.
    pub replay: bool,
    /// Whether the hub asks for an ack.
    pub requires_ack: bool,
}

impl Envelope {
    /// Room for the names and two numbers of 20 digits.
    const BYTES: usize = 128;

    /// The frame; `data` is inserted as it is.
    #[must_use]
    pub fn around(self, data: &[u8]) -> Bytes {
        let mut frame = Vec::with_capacity(Self::BYTES + data.len());
        self.write_head(&mut frame);
        frame.extend_from_slice(br#","data":"#);
        frame.extend_from_slice(data);
        frame.push(b'}');
        frame.into()
    }

    /// The binary frame whose data is compressed:
    ///
    /// ```text
    /// kind u8 = 1 │ length of the head u16 BE │ head: the JSON frame without `data` │ zlib stream of the data
    /// ```
    #[must_use]
    pub fn around_compressed(self, zlib: &[u8]) -> Bytes {
        const KIND: u8 = 1;
        let mut frame = Vec::with_capacity(Self::BYTES + zlib.len());
        frame.extend_from_slice(&[KIND, 0, 0]);
        self.write_head(&mut frame);
        frame.push(b'}');
        let head = (frame.len() - 3) as u16; // far below 64 KiB
        frame[1..3].copy_from_slice(&head.to_be_bytes());
        frame.extend_from_slice(zlib);
        frame.into()
    }

    /// All but `data` and the last brace.
    fn write_head(self, frame: &mut Vec<u8>) {
        let Self { carried, seq, prev, replay, requires_ack } = self;
        let kind = match carried {
            Carried::Event => "event",
            Carried::Gap => "gap",
        };
        let replay = if replay { r#","replay":true"# } else { "" };
        let requires_ack = if requires_ack { r#","requires_ack":true"# } else { "" };
        // Writing to a vector cannot fail.
        drop(write!(frame, r#"{{"type":"{kind}","seq":{seq},"prev":{prev}{replay}{requires_ack}"#));
    }
}

/// Tells a session of entries that its patterns match and that it does not get.
#[must_use]
pub fn missed(from: u64, to: u64, reason: Missed) -> Bytes {
    #[derive(Serialize)]
    struct Data {
        from: u64,
        to: u64,
        reason: Missed,
    }
    typed("gap", &Data { from, to, reason })
}

/// Answer to `auth`: who it is, and until when (Unix seconds), where there is such a thing.
#[must_use]
pub fn authenticated(subject: Option<&str>, expires: Option<f64>) -> Bytes {
    #[derive(Serialize)]
    struct Frame<'a> {
        action: &'static str,
        subject: Option<&'a str>,
        expires: Option<f64>,
    }
    json(&Frame { action: "authenticated", subject, expires })
}

/// Answer to `unsubscribe`.
#[must_use]
pub fn unsubscribed(events: &[Pattern]) -> Bytes {
    #[derive(Serialize)]
    struct Frame<'a> {
        action: &'static str,
        events: Vec<&'a str>,
    }
    json(&Frame { action: "unsubscribed", events: events.iter().map(Pattern::as_str).collect() })
}

/// What a sign of life says beside that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Heartbeat<'a> {
    /// The last seq sent to this session, so that a client sees whether it missed the end.
    #[serde(rename = "lastSeq")]
    pub last_seq: u64,
    /// Epoch and offset up to which all that the session wants was sent: its client goes on from there, though nothing
    /// may have been for it for long. Absent while it wants nothing.
    #[serde(flatten)]
    pub reached: Option<Reached<'a>>,
}

/// See [`Heartbeat::reached`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Reached<'a> {
    /// Epoch of the hub's log.
    pub epoch: &'a str,
    /// Offset in it.
    pub offset: u64,
}

impl Heartbeat<'_> {
    /// Answer to `ping`.
    #[must_use]
    pub fn pong(&self) -> Bytes {
        self.encode("pong")
    }

    /// Asks whether the subscriber is there, where nobody else does.
    #[must_use]
    pub fn ping(&self) -> Bytes {
        self.encode("ping")
    }

    fn encode(&self, kind: &'static str) -> Bytes {
        #[derive(Serialize)]
        struct Frame<'a> {
            r#type: &'static str,
            #[serde(flatten)]
            beat: &'a Heartbeat<'a>,
        }
        json(&Frame { r#type: kind, beat: self })
    }
}

/// Tells of the hub's own health; `since` is the offset from which it is so.
#[must_use]
pub fn service_status(status: &str, message: &str, circuit_state: &str, since: u64) -> Bytes {
    #[derive(Serialize)]
    struct Data<'a> {
        service: &'static str,
        status: &'a str,
        message: &'a str,
        circuit_state: &'a str,
        since: u64,
    }
    typed("service_status", &Data { service: "event_broadcaster", status, message, circuit_state, since })
}

/// Says what was wrong with a frame.
#[must_use]
pub fn error(code: &str, message: &str) -> Bytes {
    #[derive(Serialize)]
    struct Data<'a> {
        code: &'a str,
        message: &'a str,
    }
    typed("error", &Data { code, message })
}

/// The hub is going away and says when to come back.
#[must_use]
pub fn bye(code: u16, reconnect: Reconnect) -> Bytes {
    #[derive(Serialize)]
    struct Data {
        code: u16,
        reconnect: Reconnect,
    }
    typed("bye", &Data { code, reconnect })
}

fn typed(kind: &'static str, data: &impl Serialize) -> Bytes {
    #[derive(Serialize)]
    struct Frame<'a, T> {
        #[serde(rename = "type")]
        kind: &'static str,
        data: &'a T,
    }
    json(&Frame { kind, data })
}

fn json(value: &impl Serialize) -> Bytes {
    serde_json::to_vec(value).unwrap_or_default().into() // strings and numbers only: cannot fail
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str) -> Pattern {
        Pattern::parse(text).expect("valid")
    }

    #[test]
    fn frames_of_the_protocol_are_read() {
        let since = Position { epoch: "k3f9".into(), offset: 7 };
        let text = r#"{"type":"subscribe","data":{"events":["alert.*"],"since":{"epoch":"k3f9","offset":7}}}"#;
        let mut wanted = Subscribe { events: vec![pattern("alert.*")], since: Some(since), ..Subscribe::default() };
        assert_eq!(SubscriberFrame::decode(text), Ok(SubscriberFrame::Subscribe(wanted.clone())));
        (wanted.since, wanted.slow, wanted.deflate) = (None, Some(Slow::DropWithGap), Some(true));
        let text =
            r#"{"type":"subscribe","data":{"events":["alert.*"],"slow":"drop_with_gap","compression":"deflate"}}"#;
        assert_eq!(SubscriberFrame::decode(text), Ok(SubscriberFrame::Subscribe(wanted.clone())));
        (wanted.slow, wanted.deflate) = (None, Some(false));
        let text = r#"{"type":"subscribe","data":{"events":["alert.*"],"compression":"newer"}}"#;
        assert_eq!(SubscriberFrame::decode(text), Ok(SubscriberFrame::Subscribe(wanted)));
        let text = r#"{"type":"unsubscribe","data":{"events":["a"]}}"#;
        assert_eq!(SubscriberFrame::decode(text), Ok(SubscriberFrame::Unsubscribe { events: vec![pattern("a")] }));
        let frame = SubscriberFrame::Auth { token: Secret::new("t") };
        assert_eq!(SubscriberFrame::decode(r#"{"type":"auth","data":{"token":"t"}}"#), Ok(frame));
        let text = r#"{"type":"ack","data":{"sequence":9}}"#;
        assert_eq!(SubscriberFrame::decode(text), Ok(SubscriberFrame::Ack { sequence: 9 }));
        assert_eq!(SubscriberFrame::decode(r#"{"type":"ping"}"#), Ok(SubscriberFrame::Ping));
        assert_eq!(SubscriberFrame::decode(r#"{"type":"pong","lastSeq":3}"#), Ok(SubscriberFrame::Pong));
        assert_eq!(SubscriberFrame::decode(r#"{"type":"later","data":[1]}"#), Ok(SubscriberFrame::Unknown));
    }

    #[test]
    fn malformed_frames_say_what_is_wrong() {
        for (text, word) in [
            ("{", "EOF"),
            ("[\"ping\",null]", "object"),
            ("", "object"),
            (r#"{"data":{}}"#, "type"),
            (r#"{"type":"subscribe"}"#, "events"),
            (r#"{"type":"subscribe","data":{"events":[]}}"#, "1 to 256"),
            (r#"{"type":"subscribe","data":{"events":[""]}}"#, "empty"),
            (r#"{"type":"subscribe","data":{"events":["a"],"since":{"offset":1}}}"#, "epoch"),
            (r#"{"type":"subscribe","data":{"events":["a"],"slow":"never"}}"#, "drop_with_gap"),
            (r#"{"type":"ack","data":{"sequence":-1}}"#, "data"),
            (r#"{"type":"auth","data":"s3cret"}"#, "data.token is a text"),
        ] {
            let said = SubscriberFrame::decode(text).expect_err(text);
            assert!(said.contains(word), "{text}: {said}");
        }
    }

    #[test]
    fn an_event_is_passed_on_byte_for_byte() {
        let data = br#"{ "type" : "x", "n":1.0 }"#;
        let want = br#"{"type":"event","seq":12,"prev":3,"data":{ "type" : "x", "n":1.0 }}"#;
        let envelope = Envelope { carried: Carried::Event, seq: 12, prev: 3, replay: false, requires_ack: false };
        assert_eq!(&envelope.around(data)[..], &want[..]);
        let want = br#"{"type":"gap","seq":12,"prev":3,"replay":true,"data":{}}"#;
        assert_eq!(&Envelope { carried: Carried::Gap, replay: true, ..envelope }.around(b"{}")[..], &want[..]);
        let want = br#"{"type":"event","seq":12,"prev":3,"requires_ack":true,"data":{}}"#;
        assert_eq!(&Envelope { requires_ack: true, ..envelope }.around(b"{}")[..], &want[..]);
    }

    #[test]
    fn a_compressed_frame_is_kind_length_head_and_stream() {
        let envelope = Envelope { carried: Carried::Event, seq: 12, prev: 3, replay: true, requires_ack: true };
        let head = br#"{"type":"event","seq":12,"prev":3,"replay":true,"requires_ack":true}"#;
        let mut want = vec![1, 0, head.len() as u8];
        want.extend_from_slice(head);
        want.extend_from_slice(b"zlib");
        assert_eq!(envelope.around_compressed(b"zlib"), want);
        let largest = Envelope { seq: u64::MAX, prev: u64::MAX, ..envelope };
        assert!(largest.around_compressed(b"").len() <= Envelope::BYTES);
    }

    #[test]
    fn what_a_session_does_not_get_is_told_without_a_seq() {
        let want = br#"{"type":"gap","data":{"from":3,"to":9,"reason":"shed"}}"#;
        assert_eq!(&missed(3, 9, Missed::Shed)[..], want);
        assert!(missed(3, 9, Missed::Conflated).ends_with(br#""conflated"}}"#));
    }

    #[test]
    fn every_way_to_be_slow_is_read_by_its_name() {
        for (name, slow) in Slow::ALL {
            assert_eq!(serde_json::to_value(slow).expect("a text"), name);
        }
    }

    #[test]
    fn a_sign_of_life_tells_how_far_the_session_is() {
        let mut beat = Heartbeat { last_seq: 3, reached: None };
        assert_eq!(&beat.pong()[..], br#"{"type":"pong","lastSeq":3}"#);
        beat.reached = Some(Reached { epoch: "k3f9", offset: 9 });
        assert_eq!(&beat.ping()[..], br#"{"type":"ping","lastSeq":3,"epoch":"k3f9","offset":9}"#);
    }

    #[test]
    fn absent_fields_are_left_out() {
        let mut subscribed = Subscribed {
            events: vec!["a"],
            epoch: "e",
            offset: 3,
            recovered: None,
            replayed: None,
            reason: None,
            compression: None,
        };
        assert_eq!(&subscribed.encode()[..], br#"{"action":"subscribed","events":["a"],"epoch":"e","offset":3}"#);
        subscribed.recovered = Some(false);
        subscribed.reason = Some("epoch");
        assert!(subscribed.encode().ends_with(br#""recovered":false,"reason":"epoch"}"#));
    }
}
