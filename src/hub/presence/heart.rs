//! A heart at one moment, and the events by which hubs tell of it.

use std::borrow::Cow;
use std::sync::Arc;

use serde::{Deserialize, Serialize, Serializer};

use crate::hub::entry::Record;

/// How fresh a heartbeat is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Freshness {
    /// It came in time.
    Active,
    /// None came for longer than `presence_late`.
    Late,
    /// None came for longer than `presence_dead`: somebody should look.
    Dead,
    /// It took its leave, and is not watched any more.
    Gone,
}

impl Freshness {
    fn kind(self) -> &'static str {
        match self {
            Self::Active => "presence.active",
            Self::Late => "presence.late",
            Self::Dead => "presence.dead",
            Self::Gone => "presence.gone",
        }
    }

    fn of(kind: &str) -> Option<Self> {
        [Self::Active, Self::Late, Self::Dead, Self::Gone].into_iter().find(|state| state.kind() == kind)
    }
}

/// A heart that is watched, at one moment.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Heart {
    /// The emitter's name; empty where only another hub knows it.
    #[serde(serialize_with = "as_text")]
    pub emitter: Arc<str>,
    /// The topic of its heartbeats; empty where they have none.
    #[serde(serialize_with = "as_text")]
    pub topic: Arc<str>,
    /// How fresh the last one is.
    pub state: Freshness,
    /// Seconds since then.
    pub silent: f64,
}

impl Heart {
    /// The event that tells of its change: `presence.active`, `.late`, `.dead` or `.gone`, on the topic of its heartbeats.
    #[must_use]
    pub fn event(&self) -> Vec<u8> {
        #[derive(Serialize)]
        struct Event<'a> {
            r#type: &'static str,
            #[serde(skip_serializing_if = "str::is_empty")]
            topic: &'a str,
            data: Data<'a>,
        }
        #[derive(Serialize)]
        struct Data<'a> {
            #[serde(flatten)]
            heart: &'a Heart,
            alert: bool,
        }
        let data = Data { heart: self, alert: self.state == Freshness::Dead };
        // Strings and numbers only: cannot fail.
        serde_json::to_vec(&Event { r#type: self.state.kind(), topic: &self.topic, data }).unwrap_or_default()
    }

    /// What a hub has told by such an event; `None` for any other.
    pub(super) fn told(record: &Record) -> Option<Self> {
        #[derive(Deserialize)]
        struct Event<'a> {
            #[serde(borrow)]
            data: Data<'a>,
        }
        #[derive(Deserialize)]
        struct Data<'a> {
            #[serde(borrow)]
            emitter: Cow<'a, str>,
            silent: f64,
        }
        let state = Freshness::of(record.kind())?;
        let Event { data } = serde_json::from_slice(record.json()).ok()?;
        let (emitter, topic) = (Arc::from(&*data.emitter), Arc::from(record.topic()));
        Some(Self { emitter, topic, state, silent: data.silent })
    }
}

fn as_text<S: Serializer>(text: &Arc<str>, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(text)
}
