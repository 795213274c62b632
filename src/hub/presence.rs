//! Which emitters' hearts beat: whoever has sent a heartbeat has promised more of them, and is told of when they stay
//! away. Pure: time is an argument.
//!
//! Only heartbeats count, not whether a connection is there: one that is open may have a hung engine behind it, and an
//! engine whose link is down for a moment is not dead. A broadcaster that several engines share sends a heartbeat of each,
//! so what is watched is an emitter's heartbeat on a topic.

use std::collections::btree_map::Entry::{Occupied, Vacant};
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;
use std::time::Duration;

use serde::{Serialize, Serializer};

use super::entry::{Filter, Record};
use crate::wire::subscriber::Carried;
use crate::wire::topic::Pattern;

/// Ends the type of the event with which an engine takes its leave: that of its heartbeats and this. It is not dead, it
/// has ended. In the family of the heartbeats, so that whoever may send those may say goodbye.
const GONE: &str = ".gone";

/// Most hearts watched: far more than people look at, and a bound for emitters that make topics up.
const MOST: usize = 10_000;
/// Longest topic of a heartbeat that is watched, in bytes: it is kept for long.
const MAX_TOPIC: usize = 256;
/// How long the dead are remembered: long enough to be seen, and engines with random names do not pile up.
const REMEMBERED: Duration = Duration::from_secs(3600);

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
}

/// When a heart is late, and when dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Silence after which it is late.
    pub late: Duration,
    /// Silence after which it is dead.
    pub dead: Duration,
}

/// A heart that is watched, at one moment.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Heart {
    /// The emitter's name.
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

/// How many hearts are in each state, and those that have been silent for longest.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Hearts that beat in time.
    pub active: usize,
    /// Late ones.
    pub late: usize,
    /// Dead ones.
    pub dead: usize,
    /// Heartbeats that were not watched, for want of room or because of their topic.
    pub unwatched: u64,
    /// The longest silent first.
    pub hearts: Vec<Heart>,
}

#[derive(Debug)]
struct Beat {
    /// When it came.
    last: Duration,
    /// It was the last one, on purpose.
    gone: bool,
    /// What was told of it last.
    told: Option<Freshness>,
}

impl Beat {
    fn hear(&mut self, gone: bool, now: Duration) {
        self.gone = gone;
        if !gone {
            self.last = now;
        }
    }

    fn state(&self, patience: Patience, now: Duration) -> Freshness {
        match now.saturating_sub(self.last) {
            _ if self.gone => Freshness::Gone,
            silence if silence > patience.dead => Freshness::Dead,
            silence if silence > patience.late => Freshness::Late,
            _ => Freshness::Active,
        }
    }
}

/// What is a heartbeat. Every event of an emitter is held against it, so plain types are told from patterns.
#[derive(Debug)]
struct Heartbeats {
    kinds: Vec<String>,
    patterns: Vec<Pattern>,
}

impl Heartbeats {
    fn new(of: &Filter) -> Self {
        let (kinds, patterns): (Vec<_>, Vec<_>) =
            of.patterns().iter().cloned().partition(|pattern| !pattern.as_str().contains(['*', '/']));
        let kinds = kinds.iter().map(|kind| kind.as_str().to_owned()).collect();
        Self { kinds, patterns }
    }

    /// The topics of those among the records, and whether they say goodbye.
    fn among<'a>(&self, records: &'a [Record]) -> impl Iterator<Item = (&'a str, bool)> {
        let events = records.iter().filter(|record| record.carried() == Carried::Event);
        events.filter_map(|record| {
            let kind = record.kind();
            let gone = kind.strip_suffix(GONE).is_some_and(|of| self.matches(of, record));
            (gone || self.matches(kind, record)).then(|| (record.topic(), gone))
        })
    }

    fn matches(&self, kind: &str, record: &Record) -> bool {
        self.kinds.iter().any(|known| known == kind)
            || self.patterns.iter().any(|pattern| pattern.matches(kind, record.topic()))
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Presence {
    watched: Option<(Heartbeats, Patience)>,
    /// By topic, and emitter.
    hearts: BTreeMap<(Arc<str>, Arc<str>), Beat>,
    unwatched: u64,
}

impl Presence {
    /// Watches events of these types or topics; none of them, and it watches nothing.
    #[must_use]
    pub fn new(heartbeats: &Filter, patience: Patience) -> Self {
        let watched = (!heartbeats.patterns().is_empty()).then(|| (Heartbeats::new(heartbeats), patience));
        Self { watched, ..Self::default() }
    }

    /// Whether it watches anything.
    #[must_use]
    pub fn is_watching(&self) -> bool {
        self.watched.is_some()
    }

    /// An emitter has brought events.
    pub fn hear(&mut self, emitter: &Arc<str>, records: &[Record], now: Duration) {
        let Some((heartbeats, _)) = &self.watched else { return };
        if emitter.is_empty() {
            return;
        }
        for (topic, gone) in heartbeats.among(records) {
            if topic.len() > MAX_TOPIC {
                self.unwatched += 1;
                continue;
            }
            let known = self.hearts.len();
            match self.hearts.entry((Arc::from(topic), emitter.clone())) {
                Occupied(mut heart) => heart.get_mut().hear(gone, now),
                Vacant(_) if gone => {}
                Vacant(_) if known >= MOST => self.unwatched += 1,
                Vacant(place) => drop(place.insert(Beat { last: now, gone, told: None })),
            }
        }
    }

    /// Events came from the stream that several hubs share: an engine whose link has moved to another hub lives, and
    /// is not to be called dead by the one that it left. Who brought them is not known there, so the topic counts.
    pub fn overhear(&mut self, records: &[Record], now: Duration) {
        let Some((heartbeats, _)) = &self.watched else { return };
        if self.hearts.is_empty() {
            return;
        }
        for (topic, gone) in heartbeats.among(records).filter(|(topic, _)| (1..=MAX_TOPIC).contains(&topic.len())) {
            let hearts = self.hearts.range_mut((Arc::from(topic), Arc::default())..);
            for (_, beat) in hearts.take_while(|((of, _), _)| **of == *topic) {
                beat.hear(gone, now);
            }
        }
    }

    /// Looks who is late; returns whose state is another than the one told last, the longest silent first. What came and
    /// went in between is not told, however often it did.
    pub fn look(&mut self, now: Duration) -> Vec<Heart> {
        let Some((_, patience)) = self.watched.as_ref() else { return Vec::new() };
        let mut news = Vec::new();
        self.hearts.retain(|key, beat| {
            let state = beat.state(*patience, now);
            let is_known = beat.told.is_some() || state != Freshness::Gone;
            if is_known && beat.told != Some(state) {
                beat.told = Some(state);
                news.push(heart(key, beat, state, now));
            }
            !beat.gone && now.saturating_sub(beat.last) <= patience.dead.max(REMEMBERED)
        });
        news.sort_by(|a, b| b.silent.total_cmp(&a.silent));
        news
    }

    /// A change could not be told: it is looked at again.
    pub fn untold(&mut self, heart: Heart, now: Duration) {
        let key = (heart.topic, heart.emitter);
        if heart.state == Freshness::Gone {
            let beat = Beat { last: now, gone: true, told: Some(Freshness::Active) };
            self.hearts.entry(key).or_insert(beat);
        } else if let Some(beat) = self.hearts.get_mut(&key) {
            beat.told = None;
        }
    }

    /// How they all are, naming at most so many.
    #[must_use]
    pub fn summary(&self, most: usize, now: Duration) -> Summary {
        let mut summary = Summary { unwatched: self.unwatched, ..Summary::default() };
        let Some((_, patience)) = &self.watched else { return summary };
        // Only those that are named are put in order and copied: the hub waits meanwhile.
        let mut longest = BinaryHeap::new();
        for (key, beat) in &self.hearts {
            match beat.state(*patience, now) {
                Freshness::Active => summary.active += 1,
                Freshness::Late => summary.late += 1,
                Freshness::Dead => summary.dead += 1,
                Freshness::Gone => continue,
            }
            let named = (beat.last, key);
            if longest.len() < most {
                longest.push(named);
            } else if let Some(mut newest) = longest.peek_mut()
                && named < *newest
            {
                *newest = named;
            }
        }
        let beat = |key| self.hearts.get(key).map(|beat| heart(key, beat, beat.state(*patience, now), now));
        summary.hearts = longest.into_sorted_vec().into_iter().filter_map(|(_, key)| beat(key)).collect();
        summary
    }
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
}

fn as_text<S: Serializer>(text: &Arc<str>, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(text)
}

fn heart((topic, emitter): &(Arc<str>, Arc<str>), beat: &Beat, state: Freshness, now: Duration) -> Heart {
    let silent = now.saturating_sub(beat.last).as_secs_f64();
    Heart { emitter: emitter.clone(), topic: topic.clone(), state, silent: (silent * 1e3).round() / 1e3 }
}

#[cfg(test)]
mod tests;
