//! What the core needs to know of an event: its `type` and its `topic`. The rest is passed through byte for byte.

use std::borrow::Cow;

use serde::Deserialize;

/// The routing fields of an event, borrowed from its JSON where it holds no escapes.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
pub struct EventHead<'a> {
    /// Dot-separated name; empty where the event has none.
    #[serde(borrow, rename = "type", default)]
    pub kind: Cow<'a, str>,
    /// Slash path; empty where the event has none.
    #[serde(borrow, default)]
    pub topic: Cow<'a, str>,
}

impl<'a> EventHead<'a> {
    /// Reads the head of an event, and proves on the way that the whole is a JSON object.
    ///
    /// # Errors
    /// It is not valid JSON, not an object, or `type`/`topic` are not strings.
    pub fn parse(json: &'a [u8]) -> serde_json::Result<Self> {
        if json.first() != Some(&b'{') {
            return Err(serde::de::Error::custom("an event is a JSON object"));
        }
        serde_json::from_slice(json)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn type_and_topic_are_found_among_other_fields() {
        let head = EventHead::parse(br#"{"a":[1,{"type":"no"}],"type":"x.y","topic":"x/\u0079"}"#).expect("valid");
        assert_eq!((head.kind.as_ref(), head.topic.as_ref()), ("x.y", "x/y"));
    }

    #[test]
    fn what_is_no_json_object_is_refused() {
        for bad in [&b"[]"[..], b"", b"{", b"{\"type\":1}", b"{}x", b"{\"a\":\xff}"] {
            assert!(EventHead::parse(bad).is_err(), "{bad:?}");
        }
    }
}
