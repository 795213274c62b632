//! What the log holds: records (events and gaps) with their place, and filters that choose among them.

use std::borrow::Cow;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::auth::{Scope, not_granted};
use super::entities::{Entities, MAX_IDS};
use super::outbox::Item;
use crate::error::{Error, ErrorKind, Result};
use crate::wire::centrifugo;
use crate::wire::event::EventHead;
use crate::wire::subscriber::{Carried, Envelope, Wrapping};
use crate::wire::topic::Pattern;

/// A valid event, or a gap, that has no place in the log yet. Cloning shares the bytes.
#[derive(Clone, Debug)]
pub struct Record {
    carried: Carried,
    /// Whether subscribers are asked for an ack; the log's setting decides.
    pub(super) requires_ack: bool,
    /// Topics beside its own.
    entities: Option<Arc<[Box<str>]>>,
    json: Bytes,
    kind: Name,
    topic: Name,
}

/// A routing field: where it stands in the JSON, or its own text where the JSON spells it with escapes.
#[derive(Clone, Debug)]
enum Name {
    Within { start: u32, end: u32 },
    Own(Arc<str>),
}

impl Name {
    fn of(field: Cow<'_, str>, json: &Bytes) -> Self {
        match field {
            Cow::Borrowed(text) if !text.is_empty() => {
                let start = (text.as_ptr().addr() - json.as_ptr().addr()) as u32;
                Self::Within { start, end: start + text.len() as u32 }
            }
            Cow::Borrowed(_) => Self::Within { start: 0, end: 0 },
            Cow::Owned(text) => Self::Own(text.into()),
        }
    }

    fn text<'a>(&'a self, json: &'a Bytes) -> &'a str {
        match self {
            // The whole JSON was checked to be UTF-8 and the field is a whole string of it: never the default.
            Self::Within { start, end } => {
                std::str::from_utf8(&json[*start as usize..*end as usize]).unwrap_or_default()
            }
            Self::Own(text) => text,
        }
    }
}

impl Record {
    /// Takes an event as its emitter wrote it.
    ///
    /// # Errors
    /// It is not a JSON object in UTF-8, or its `type` or `topic` is not a string.
    pub fn event(json: Bytes) -> serde_json::Result<Self> {
        // A subscriber's WebSocket stack refuses a text frame that is not UTF-8, and strings that are skipped over
        // by the JSON parser are not checked by it.
        std::str::from_utf8(&json).map_err(serde::de::Error::custom)?;
        let head = EventHead::parse(&json)?;
        let (kind, topic) = (Name::of(head.kind, &json), Name::of(head.topic, &json));
        Ok(Self { carried: Carried::Event, requires_ack: false, entities: None, json, kind, topic })
    }

    /// Takes an event of somebody who may publish this; `None` is everything.
    ///
    /// # Errors
    /// [`ErrorKind::EventNotSerializable`] if it is none, or names more than [`MAX_IDS`] entities,
    /// [`ErrorKind::NotAllowed`] if it may not be published.
    pub fn checked(json: Bytes, entities: &Entities, publish: Option<&Scope>) -> Result<Self> {
        let is_none = |error: serde_json::Error| {
            let text = "an event is a JSON object with text as its type and topic";
            Error::new(ErrorKind::EventNotSerializable, text).with_source(error)
        };
        let mut record = Self::event(json).map_err(is_none)?;
        record.find_entities(entities);
        if record.entities().len() > MAX_IDS {
            let text = format!("an event names at most {MAX_IDS} entities, not {}", record.entities().len());
            return Err(Error::new(ErrorKind::EventNotSerializable, text));
        }
        if publish.is_some_and(|scope| !scope.allows(&record)) {
            return Err(Error::new(ErrorKind::NotAllowed, not_granted(&record)));
        }
        Ok(record)
    }

    /// Looks for the entities that it names, unless that was done.
    pub fn find_entities(&mut self, entities: &Entities) {
        if self.entities.is_none() && self.carried == Carried::Event && !entities.is_empty() {
            self.entities = Some(entities.of(&self.json).into());
        }
    }

    /// The news that events of an emitter will never come.
    #[must_use]
    pub fn gap(emitter: &str, epoch: &str, from: u64, to: u64, reason: &str) -> Self {
        #[derive(Serialize)]
        struct Gap<'a> {
            emitter: &'a str,
            epoch: &'a str,
            from: u64,
            to: u64,
            reason: &'a str,
        }
        // Strings and integers only: cannot fail.
        Self::stored_gap(serde_json::to_vec(&Gap { emitter, epoch, from, to, reason }).unwrap_or_default().into())
    }

    /// A gap as [`Record::gap`] wrote it.
    #[must_use]
    pub fn stored_gap(json: Bytes) -> Self {
        let nothing = Name::Within { start: 0, end: 0 };
        let (carried, kind) = (Carried::Gap, nothing.clone());
        Self { carried, requires_ack: false, entities: None, json, kind, topic: nothing }
    }

    /// Event or gap.
    #[must_use]
    pub fn carried(&self) -> Carried {
        self.carried
    }

    /// The JSON, byte for byte.
    #[must_use]
    pub fn json(&self) -> &Bytes {
        &self.json
    }

    /// The event's type; empty where it has none.
    #[must_use]
    pub fn kind(&self) -> &str {
        self.kind.text(&self.json)
    }

    /// The event's topic; empty where it has none.
    #[must_use]
    pub fn topic(&self) -> &str {
        self.topic.text(&self.json)
    }

    /// Topics under which it is found beside its own.
    #[must_use]
    pub fn entities(&self) -> &[Box<str>] {
        self.entities.as_deref().unwrap_or_default()
    }
}

impl Record {
    /// Whose newest state the event is: its `key` if that is a text, else its topic, else its type. `None` for a gap and
    /// for an event that has none of these: no newer one takes its place.
    #[must_use]
    pub fn key(&self) -> Option<String> {
        #[derive(Deserialize)]
        struct Keyed<'a> {
            #[serde(borrow)]
            key: Option<&'a RawValue>,
        }
        if self.carried == Carried::Gap {
            return None;
        }
        let own = serde_json::from_slice::<Keyed<'_>>(&self.json).ok().and_then(|keyed| keyed.key);
        let text = own.and_then(|key| serde_json::from_str::<String>(key.get()).ok());
        // The first letter keeps a topic from being taken for a key of the same text.
        let named = |letter, name: &str| (!name.is_empty()).then(|| format!("{letter}{name}"));
        text.map(|text| format!("k{text}")).or_else(|| named('t', self.topic())).or_else(|| named('y', self.kind()))
    }
}

/// What brings entries to a session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// Frames with `seq` and `prev`, see [`Entry::frame`].
    #[default]
    Event,
    /// Events alone, see [`Entry::bare`].
    Raw,
    /// Pushes of Centrifugo's protocol, see [`Entry::pushes`].
    Push,
}

impl From<Wrapping> for Encoding {
    fn from(wrapping: Wrapping) -> Self {
        match wrapping {
            Wrapping::Event => Self::Event,
            Wrapping::Raw => Self::Raw,
        }
    }
}

/// A record with its place in the log.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Place in the log, counted from 1 in every epoch.
    pub offset: u64,
    /// The event or gap.
    pub record: Record,
}

impl Entry {
    /// The frame that brings this entry to a subscriber whose previous entry was `prev`.
    #[must_use]
    pub fn frame(&self, prev: u64, replay: bool) -> Bytes {
        self.envelope(prev, replay).around(&self.record.json)
    }

    /// The same with its data compressed.
    #[must_use]
    pub fn compressed_frame(&self, prev: u64, replay: bool, zlib: &[u8]) -> Bytes {
        self.envelope(prev, replay).around_compressed(zlib)
    }

    /// Either of them.
    #[must_use]
    pub fn item(&self, prev: u64, replay: bool, zlib: Option<&Bytes>) -> Item {
        match zlib {
            Some(zlib) => Item::Binary(self.compressed_frame(prev, replay, zlib)),
            None => Item::Text(self.frame(prev, replay)),
        }
    }

    /// The event alone; nothing for a gap, which is none.
    #[must_use]
    pub fn bare(&self) -> Option<Item> {
        (self.record.carried == Carried::Event).then(|| Item::Text(self.record.json.clone()))
    }

    /// The same for a client of Centrifugo's protocol: a push for each channel, which is a pattern of the filter, that
    /// the event matches. A gap belongs to no channel.
    #[must_use]
    pub fn pushes(&self, filter: &Filter) -> Item {
        let Record { carried, json, .. } = &self.record;
        Item::Text(match carried {
            Carried::Event => {
                let (kind, topic, entities) = (self.record.kind(), self.record.topic(), self.record.entities());
                let wants = |pattern: &&Pattern| {
                    pattern.matches(kind, topic) || entities.iter().any(|topic| pattern.matches("", topic))
                };
                let channels = filter.patterns.iter().filter(wants).map(Pattern::as_str);
                centrifugo::pushes(channels, self.offset, json)
            }
            Carried::Gap => {
                let mut gap = format!(r#"{{"type":"gap","seq":{},"data":"#, self.offset).into_bytes();
                gap.extend_from_slice(json);
                gap.push(b'}');
                centrifugo::message(&gap)
            }
        })
    }

    fn envelope(&self, prev: u64, replay: bool) -> Envelope {
        let Record { carried, requires_ack, .. } = self.record;
        Envelope { carried, seq: self.offset, prev, replay, requires_ack }
    }
}

/// The patterns of a session: an entry matches if any of them does. A gap matches every filter, because what is
/// missing could have matched.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Filter {
    patterns: Vec<Pattern>,
}

impl Filter {
    /// A filter of these patterns, each once.
    #[must_use]
    pub fn new(patterns: impl IntoIterator<Item = Pattern>) -> Self {
        let mut filter = Self::default();
        for pattern in patterns {
            if !filter.patterns.contains(&pattern) {
                filter.patterns.push(pattern);
            }
        }
        filter
    }

    /// This filter and more patterns.
    #[must_use]
    pub fn with(&self, more: &[Pattern]) -> Self {
        Self::new(self.patterns.iter().chain(more).cloned())
    }

    /// This filter and fewer patterns.
    #[must_use]
    pub fn without(&self, fewer: &[Pattern]) -> Self {
        Self::new(self.patterns.iter().filter(|pattern| !fewer.contains(pattern)).cloned())
    }

    /// This filter without the patterns that reach beyond a grant.
    #[must_use]
    pub fn within(&self, grant: &Self) -> Self {
        let granted = |pattern: &&Pattern| grant.patterns.iter().any(|wide| wide.contains(pattern));
        Self::new(self.patterns.iter().filter(granted).cloned())
    }

    /// What both filters match, as far as one's patterns lie within the other's.
    #[must_use]
    pub fn common(&self, other: &Self) -> Self {
        self.within(other).with(other.within(self).patterns())
    }

    /// The patterns in the order in which they came.
    #[must_use]
    pub fn patterns(&self) -> &[Pattern] {
        &self.patterns
    }

    /// What it takes of memory, about.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.patterns.iter().map(|pattern| size_of::<Pattern>() + pattern.as_str().len()).sum()
    }

    /// Whether a session with this filter wants the record.
    #[must_use]
    pub fn matches(&self, record: &Record) -> bool {
        match record.carried {
            Carried::Gap => !self.patterns.is_empty(),
            Carried::Event => {
                let (kind, topic) = (record.kind(), record.topic());
                let any = |kind: &str, topic: &str| self.patterns.iter().any(|pattern| pattern.matches(kind, topic));
                any(kind, topic) || record.entities().iter().any(|topic| any("", topic))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(json: &'static str) -> Record {
        Record::event(Bytes::from_static(json.as_bytes())).expect("valid")
    }

    fn filter(patterns: &[&str]) -> Filter {
        Filter::new(patterns.iter().map(|text| Pattern::parse(text).expect("valid")))
    }

    #[test]
    fn routing_fields_are_read_with_and_without_escapes() {
        let record = event(r#"{"n":1,"topic":"graph/ada","type":"a\u002eb"}"#);
        assert_eq!((record.kind(), record.topic()), ("a.b", "graph/ada"));
        let record = event("{}");
        assert_eq!((record.kind(), record.topic()), ("", ""));
    }

    #[test]
    fn what_a_subscriber_could_not_read_is_refused() {
        for bad in [&b"[]"[..], b"", b"{\"type\":3}", b"{\"a\":\"\xff\"}", b"{} {}"] {
            assert!(Record::event(Bytes::from_static(bad)).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_gap_concerns_everyone_who_listens() {
        let gap = Record::gap("e\"1", "x", 1, 2, "crash");
        assert_eq!(&gap.json()[..], br#"{"emitter":"e\"1","epoch":"x","from":1,"to":2,"reason":"crash"}"#);
        assert!(filter(&["a.*"]).matches(&gap));
        assert!(!filter(&[]).matches(&gap));
    }

    #[test]
    fn an_event_is_known_by_its_key_or_its_topic_or_its_type() {
        let key = |json| event(json).key();
        assert_eq!(key(r#"{"type":"a","topic":"b/c","key":"d\u0065"}"#).as_deref(), Some("kde"));
        assert_eq!(key(r#"{"type":"a","topic":"b/c","key":""}"#).as_deref(), Some("k"));
        assert_eq!(key(r#"{"type":"a","topic":"b/c","key":7}"#).as_deref(), Some("tb/c"));
        assert_eq!(key(r#"{"type":"a","topic":"","key":null}"#).as_deref(), Some("ya"));
        assert_eq!(key("{}"), None);
        assert_eq!(Record::gap("e", "x", 1, 2, "crash").key(), None);
    }

    #[test]
    fn filters_grow_and_shrink_in_order() {
        let both = filter(&["a"]).with(filter(&["b", "a"]).patterns());
        assert_eq!(both, filter(&["a", "b"]));
        assert_eq!(both.without(filter(&["a"]).patterns()), filter(&["b"]));
        assert_eq!(filter(&["a.*", "b"]).common(&filter(&["a.x.*", "*"])), filter(&["a.*", "b", "a.x.*"]));
        assert_eq!(filter(&["*"]).common(&filter(&["a", "b/c"])), filter(&["a", "b/c"]));
        assert_eq!(filter(&["a.*"]).common(&filter(&["*.b"])), filter(&[]));
        assert!(both.matches(&event(r#"{"type":"b"}"#)) && !both.matches(&event(r#"{"type":"c"}"#)));
    }
}
