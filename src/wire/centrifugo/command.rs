//! What a client wants.

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;

use crate::secret::Secret;

/// Bit of `subscribe.flag`: a position that cannot be served is an error, and not `recovered: false`.
const REJECT_UNRECOVERED: i64 = 2;
/// What a client wants, and the number that the reply is to carry.
#[derive(Debug, PartialEq, Eq)]
pub struct Command {
    /// Chosen by the client; 0 for what has no reply.
    pub id: u32,
    /// What it wants.
    pub request: Request,
}

/// See [`Command`].
#[derive(Debug, PartialEq, Eq)]
pub enum Request {
    /// Begins the session.
    Connect {
        /// Who it is.
        token: Option<Secret>,
    },
    /// Shows a fresh token.
    Refresh {
        /// See there.
        token: Secret,
    },
    /// Adds a channel.
    Subscribe(Subscribe),
    /// Takes a channel away.
    Unsubscribe {
        /// Which.
        channel: String,
    },
    /// Publishes an event.
    Publish {
        /// Where.
        channel: String,
        /// What, as JSON.
        data: Box<str>,
    },
    /// Asks for publications that the log still has.
    History(History),
    /// Asks for a reply.
    Ping,
    /// Answers a ping.
    Pong,
    /// Part of the protocol and not offered here: presence, calls, subscriptions with tokens of their own.
    NotOffered,
}

/// What a client subscribes to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Subscribe {
    /// The channel.
    pub channel: String,
    /// Whether it stood at a position before.
    pub recover: bool,
    /// Epoch of the position.
    pub epoch: String,
    /// Offset of the position.
    pub offset: u64,
    flag: i64,
    r#type: i32,
    #[serde(rename = "tf")]
    filters: Option<Present>,
}

impl Subscribe {
    /// Whether a position that cannot be served is to be an error.
    #[must_use]
    pub fn rejects_unrecovered(&self) -> bool {
        self.flag & REJECT_UNRECOVERED != 0
    }

    /// Whether it wants less than the channel, or another kind of channel: that is not done here, and more than was asked
    /// for must not be sent.
    #[must_use]
    pub fn is_special(&self) -> bool {
        self.r#type != 0 || self.filters.is_some()
    }
}

/// What a client asks of the log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct History {
    /// The channel.
    pub channel: String,
    /// Most publications; 0 asks for the position alone, less than that for all.
    pub limit: i32,
    /// Only what lies behind this, or before it in reverse.
    pub since: Option<StreamPosition>,
    /// The newest first.
    pub reverse: bool,
}

/// A position as clients write it: what is 0 or empty may be left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct StreamPosition {
    /// Offset in the log.
    pub offset: u64,
    /// Epoch of the log.
    pub epoch: String,
}

/// Something is there, whatever it is.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Present;

impl<'de> Deserialize<'de> for Present {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        IgnoredAny::deserialize(from).map(|_| Self)
    }
}

#[derive(Deserialize)]
struct Said<'a> {
    #[serde(default)]
    id: u32,
    connect: Option<Connect>,
    refresh: Option<Refresh>,
    subscribe: Option<Subscribe>,
    unsubscribe: Option<Unsubscribe>,
    #[serde(borrow)]
    publish: Option<Publish<'a>>,
    history: Option<History>,
    ping: Option<Present>,
    presence: Option<Present>,
    presence_stats: Option<Present>,
    rpc: Option<Present>,
    sub_refresh: Option<Present>,
    send: Option<Present>,
}

#[derive(Deserialize)]
struct Connect {
    token: Option<String>,
}

#[derive(Deserialize)]
struct Refresh {
    token: String,
}

#[derive(Deserialize)]
struct Unsubscribe {
    channel: String,
}

#[derive(Deserialize)]
struct Publish<'a> {
    channel: String,
    #[serde(borrow)]
    data: &'a RawValue,
}

impl Command {
    /// Reads one line.
    ///
    /// # Errors
    /// It is no command; its session is to be closed. Nothing of what it said is repeated, for it may hold a token.
    pub fn decode(line: &str) -> Result<Self, &'static str> {
        if !line.starts_with('{') {
            return Err("a command is a JSON object");
        }
        let said: Said<'_> = serde_json::from_str(line).map_err(|_| "no command of this protocol")?;
        let id = said.id;
        let other = [&said.presence, &said.presence_stats, &said.rpc, &said.sub_refresh];
        let request = if let Some(connect) = said.connect {
            Request::Connect { token: connect.token.filter(|token| !token.is_empty()).map(Secret::new) }
        } else if let Some(refresh) = said.refresh {
            Request::Refresh { token: Secret::new(refresh.token) }
        } else if let Some(subscribe) = said.subscribe {
            Request::Subscribe(subscribe)
        } else if let Some(Unsubscribe { channel }) = said.unsubscribe {
            Request::Unsubscribe { channel }
        } else if let Some(Publish { channel, data }) = said.publish {
            Request::Publish { channel, data: data.get().into() }
        } else if let Some(history) = said.history {
            Request::History(history)
        } else if said.ping.is_some() {
            Request::Ping
        } else if other.into_iter().any(Option::is_some) {
            Request::NotOffered
        } else if said.send.is_some() {
            return Err("messages to the server are not offered here");
        } else if id == 0 {
            return Ok(Self { id, request: Request::Pong });
        } else {
            return Err("a command names what it wants");
        };
        if id == 0 { Err("a command has an id above 0") } else { Ok(Self { id, request }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(line: &str) -> Request {
        Command::decode(line).expect(line).request
    }

    #[test]
    fn commands_are_read_as_the_clients_write_them() {
        let token = || Some(Secret::new("t"));
        assert_eq!(
            Command::decode(r#"{"id":1,"connect":{"token":"t","name":"js"}}"#),
            Ok(Command { id: 1, request: Request::Connect { token: token() } })
        );
        assert_eq!(request(r#"{"connect":{"name":"python"},"id":1}"#), Request::Connect { token: None });
        assert_eq!(request(r#"{"id":9,"refresh":{"token":"t"}}"#), Request::Refresh { token: Secret::new("t") });
        let Request::Subscribe(subscribe) = request(r#"{"subscribe":{"channel":"a.*","flag":1},"id":2}"#) else {
            panic!("no subscribe")
        };
        assert_eq!(
            (subscribe.channel.as_str(), subscribe.recover, subscribe.rejects_unrecovered()),
            ("a.*", false, false)
        );
        // A client leaves out an offset of 0 and an empty epoch.
        let Request::Subscribe(subscribe) = request(r#"{"id":2,"subscribe":{"channel":"a","recover":true,"flag":3}}"#)
        else {
            panic!("no subscribe")
        };
        assert!(subscribe.recover && subscribe.rejects_unrecovered() && !subscribe.is_special());
        assert_eq!((subscribe.offset, subscribe.epoch.as_str()), (0, ""));
        for special in [r#""tf":{"op":"eq"}"#, r#""type":1"#] {
            let line = format!(r#"{{"id":2,"subscribe":{{"channel":"a",{special}}}}}"#);
            assert!(matches!(request(&line), Request::Subscribe(subscribe) if subscribe.is_special()), "{special}");
        }
        let publish = Request::Publish { channel: "a".into(), data: r#"{"n": 1.0}"#.into() };
        assert_eq!(request(r#"{"id":3,"publish":{"channel":"a","data":{"n": 1.0}}}"#), publish);
        let since = Some(StreamPosition { offset: 7, epoch: "e".into() });
        let history = Request::History(History { channel: "a".into(), limit: 5, since, reverse: true });
        let line = r#"{"id":4,"history":{"channel":"a","limit":5,"reverse":true,"since":{"offset":7,"epoch":"e"}}}"#;
        assert_eq!(request(line), history);
        assert_eq!(request("{}"), Request::Pong);
        assert_eq!(request(r#"{"id":5,"ping":{}}"#), Request::Ping);
        for not_offered in ["presence", "presence_stats", "rpc", "sub_refresh"] {
            assert_eq!(request(&format!(r#"{{"id":5,"{not_offered}":{{"channel":"a"}}}}"#)), Request::NotOffered);
        }
    }

    #[test]
    fn what_is_no_command_is_refused_without_its_secrets() {
        for wrong in [
            "",
            "[]",
            "{",
            r#"{"id":1}"#,
            r#"{"connect":{}}"#,
            r#"{"id":-1,"ping":{}}"#,
            r#"{"id":1,"connect":{"token":["s3cret"]}}"#,
            r#"{"id":1,"subscribe":{"offset":"7"}}"#,
            r#"{"id":1,"publish":{"channel":"a"}}"#,
            r#"{"send":{"data":1}}"#,
        ] {
            assert!(!Command::decode(wrong).expect_err(wrong).contains("s3cret"), "{wrong}");
        }
    }
}
