//! Which emitters' hearts beat: whoever has sent a heartbeat has promised more of them, and is told of when they stay
//! away. Pure: time is an argument.
//!
//! Only heartbeats count, not whether a connection is there: one that is open may have a hung engine behind it, and an
//! engine whose link is down for a moment is not dead. A broadcaster that several engines share sends a heartbeat of each,
//! so what is watched is an emitter's heartbeat on a topic.
//!
//! Hubs that share a stream hear all heartbeats of it, so each knows all hearts. News are told by the hub to which a heart
//! beats; the others know from the stream that it was told, and tell it themselves only if that stays out.

mod heart;

use std::collections::btree_map::Entry::{Occupied, Vacant};
use std::collections::{BTreeMap, BinaryHeap};
use std::sync::Arc;
use std::time::Duration;

pub use heart::{Freshness, Heart};
use serde::Serialize;

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
/// How long after a beat of its own a hub may hear it in the stream: what comes later came by another hub.
const ECHO: i64 = 5000;
/// How long others have to tell that a heart is late or dead whose last beat came by them: then they are gone too.
const GRACE: Duration = Duration::from_secs(5);
/// How long the dead are remembered: long enough to be seen, and engines with random names do not pile up.
const REMEMBERED: Duration = Duration::from_secs(3600);

/// When a heart is late, and when dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Silence after which it is late.
    pub late: Duration,
    /// Silence after which it is dead.
    pub dead: Duration,
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

/// Milliseconds of a hub's time; below 0 is before its start.
type Moment = i64;

fn moment(time: Duration) -> Moment {
    Moment::try_from(time.as_millis()).unwrap_or(Moment::MAX)
}

#[derive(Debug)]
struct Beat {
    /// When it came.
    last: Moment,
    /// When one came last from an emitter of this hub.
    own: Option<Moment>,
    /// It was the last one, on purpose.
    gone: bool,
    /// What was told of it last.
    told: Option<Freshness>,
    /// News of this hub that have not come back by the stream; where there is none, they never do.
    under_way: u32,
}

impl Beat {
    fn ours(now: Moment, gone: bool, told: Option<Freshness>) -> Self {
        Self { last: now, own: Some(now), gone, told, under_way: 0 }
    }

    /// One that came by another hub, which tells of it.
    fn elsewhere(now: Moment) -> Self {
        Self { last: now, own: None, gone: false, told: Some(Freshness::Active), under_way: 0 }
    }

    fn hear(&mut self, gone: bool, now: Moment) {
        self.gone = gone;
        if !gone {
            self.last = now;
        }
    }

    /// Whether it beats to this hub, which is to tell of it.
    fn is_ours(&self) -> bool {
        self.own.is_some_and(|own| self.last - own <= ECHO)
    }

    fn silence(&self, now: Moment) -> Duration {
        Duration::from_millis(u64::try_from(now - self.last).unwrap_or(0))
    }

    fn state(&self, patience: Patience, now: Moment) -> Freshness {
        match self.silence(now) {
            _ if self.gone => Freshness::Gone,
            silence if silence > patience.dead => Freshness::Dead,
            silence if silence > patience.late => Freshness::Late,
            _ => Freshness::Active,
        }
    }

    /// What is to be told of it by this hub, if anything.
    fn news(&self, patience: Patience, now: Moment) -> Option<Freshness> {
        let state = if self.is_ours() {
            self.state(patience, now)
        } else {
            let patient = Patience { late: patience.late + GRACE, dead: patience.dead + GRACE };
            Some(self.state(patient, now)).filter(|state| matches!(state, Freshness::Late | Freshness::Dead))?
        };
        let is_known = self.told.is_some() || state != Freshness::Gone;
        // The others are not contradicted: they may be ahead.
        let is_behind = !self.is_ours() && self.told == Some(Freshness::Dead);
        (is_known && !is_behind && self.told != Some(state)).then_some(state)
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

    /// Whether it says goodbye, if it is one.
    fn goodbye(&self, record: &Record) -> Option<bool> {
        if record.carried() != Carried::Event {
            return None;
        }
        let kind = record.kind();
        let gone = kind.strip_suffix(GONE).is_some_and(|of| self.matches(of, record));
        (gone || self.matches(kind, record)).then_some(gone)
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
    hearts: BTreeMap<Key, Beat>,
    unwatched: u64,
}

/// A topic, and an emitter.
type Key = (Arc<str>, Arc<str>);

/// The heart whose emitter only other hubs know.
fn nameless(topic: &Arc<str>) -> Key {
    (Arc::clone(topic), Arc::default())
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

    /// An emitter of this hub has brought events.
    pub fn hear(&mut self, emitter: &Arc<str>, records: &[Record], now: Duration) {
        let Some((heartbeats, _)) = &self.watched else { return };
        if emitter.is_empty() {
            return;
        }
        let now = moment(now);
        for record in records {
            let Some(gone) = heartbeats.goodbye(record) else { continue };
            if record.topic().len() > MAX_TOPIC {
                self.unwatched += 1;
                continue;
            }
            let topic: Arc<str> = Arc::from(record.topic());
            let nameless = self.hearts.remove(&nameless(&topic));
            let known = self.hearts.len();
            match self.hearts.entry((topic, emitter.clone())) {
                Occupied(mut heart) => {
                    heart.get_mut().hear(gone, now);
                    heart.get_mut().own = Some(now);
                }
                Vacant(_) if gone && nameless.is_none() => {}
                Vacant(_) if known >= MOST => self.unwatched += 1,
                Vacant(place) => {
                    let told = nameless.and_then(|heart| heart.told);
                    place.insert(Beat::ours(now, gone, told));
                }
            }
        }
    }

    /// Events came from the stream that several hubs share, this one's among them. Who brought a heartbeat is not known
    /// there, so its topic counts: an engine whose link has moved to another hub lives.
    pub fn overhear(&mut self, records: &[Record], now: Duration) {
        if !self.is_watching() {
            return;
        }
        let now = moment(now);
        for record in records.iter().filter(|record| (1..=MAX_TOPIC).contains(&record.topic().len())) {
            let goodbye = self.watched.as_ref().and_then(|(heartbeats, _)| heartbeats.goodbye(record));
            if let Some(gone) = goodbye {
                self.was_heard(&Arc::from(record.topic()), gone, now);
            } else if let Some(heart) = Heart::told(record) {
                self.was_told(heart, now);
            }
        }
    }

    /// A heartbeat came to a hub, perhaps to this one.
    fn was_heard(&mut self, topic: &Arc<str>, gone: bool, now: Moment) {
        let mut known = false;
        for (_, beat) in self.hearts.range_mut(nameless(topic)..).take_while(|((of, _), _)| of == topic) {
            beat.hear(gone, now);
            known = true;
        }
        if !known && !gone {
            if self.hearts.len() < MOST {
                self.hearts.insert(nameless(topic), Beat::elsewhere(now));
            } else {
                self.unwatched += 1;
            }
        }
    }

    /// A hub has told of a heart: nobody else is to.
    fn was_told(&mut self, heart: Heart, now: Moment) {
        let Heart { emitter, topic, state, silent } = heart;
        let nameless = self.hearts.remove(&nameless(&topic));
        let has_room = self.hearts.len() < MOST;
        let beat = match self.hearts.entry((topic, emitter)) {
            Occupied(known) => known.into_mut(),
            Vacant(place) => match nameless {
                Some(heart) => place.insert(heart),
                None if has_room && state != Freshness::Gone => place.insert(Beat::elsewhere(now)),
                None => return,
            },
        };
        if beat.under_way > 0 {
            beat.under_way -= 1; // most likely our own, and there may be newer
            return;
        }
        beat.told = Some(state);
        if !beat.is_ours() {
            beat.gone |= state == Freshness::Gone;
            let silent = Duration::try_from_secs_f64(silent).map_or(0, moment);
            beat.last = beat.last.min(now.saturating_sub(silent));
        }
    }

    /// Looks who is late; returns whose state is another than the one told last, the longest silent first. What came and
    /// went in between is not told, however often it did.
    pub fn look(&mut self, now: Duration) -> Vec<Heart> {
        let Some((_, patience)) = self.watched.as_ref() else { return Vec::new() };
        let now = moment(now);
        let mut news = Vec::new();
        self.hearts.retain(|key, beat| {
            if let Some(state) = beat.news(*patience, now) {
                beat.told = Some(state);
                beat.under_way = beat.under_way.saturating_add(1);
                news.push(heart(key, beat, state, now));
            }
            !beat.gone && beat.silence(now) <= patience.dead.max(REMEMBERED)
        });
        news.sort_by(|a, b| b.silent.total_cmp(&a.silent));
        news
    }

    /// A change could not be told: it is looked at again.
    pub fn untold(&mut self, heart: Heart, now: Duration) {
        let key = (heart.topic, heart.emitter);
        if heart.state == Freshness::Gone {
            let now = moment(now);
            self.hearts.entry(key).or_insert(Beat::ours(now, true, Some(Freshness::Active)));
        } else if let Some(beat) = self.hearts.get_mut(&key) {
            beat.told = None;
            beat.under_way = beat.under_way.saturating_sub(1);
        }
    }

    /// How they all are, naming at most so many.
    #[must_use]
    pub fn summary(&self, most: usize, now: Duration) -> Summary {
        let mut summary = Summary { unwatched: self.unwatched, ..Summary::default() };
        let Some((_, patience)) = &self.watched else { return summary };
        let now = moment(now);
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

fn heart((topic, emitter): &Key, beat: &Beat, state: Freshness, now: Moment) -> Heart {
    Heart { emitter: emitter.clone(), topic: topic.clone(), state, silent: beat.silence(now).as_secs_f64() }
}

#[cfg(test)]
mod tests;
