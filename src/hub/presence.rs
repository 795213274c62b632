//! Which emitters' hearts beat: whoever has sent a heartbeat has promised more of them, and is told of when they stay
//! away. Pure: time is an argument.
//!
//! Only heartbeats count, not whether a connection is there: one that is open may have a hung engine behind it, and an
//! engine whose link is down for a moment is not dead. A broadcaster that several engines share sends a heartbeat of each,
//! so what is watched is an emitter's heartbeat on a topic.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde::{Serialize, Serializer};

use super::entry::{Filter, Record};
use crate::wire::subscriber::Carried;

/// The type with which an engine takes its leave: it is not dead, it has ended.
pub const GONE: &str = "presence.gone";

/// Most hearts watched: far more than people look at, and a bound for emitters that make topics up.
const MOST: usize = 10_000;
/// Longest topic of a heartbeat that is watched, in bytes: it is kept for long.
const MAX_TOPIC: usize = 256;
/// How long the dead are remembered: long enough to be seen, and engines with random names do not pile up.
const REMEMBERED: Duration = Duration::from_secs(3600);

/// How fresh a heartbeat is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Freshness {
    /// It came in time.
    Active,
    /// None came for longer than `presence_late`.
    Late,
    /// None came for longer than `presence_dead`: somebody should look.
    Dead,
}

impl Freshness {
    fn kind(self) -> &'static str {
        match self {
            Self::Active => "presence.active",
            Self::Late => "presence.late",
            Self::Dead => "presence.dead",
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
    last: Duration,
    state: Freshness,
}

/// What is a heartbeat. Every event of an emitter is held against it, so plain types are told from patterns.
#[derive(Debug)]
struct Heartbeats {
    kinds: Vec<String>,
    patterns: Filter,
}

impl Heartbeats {
    fn new(of: &Filter) -> Self {
        let (kinds, patterns): (Vec<_>, Vec<_>) =
            of.patterns().iter().cloned().partition(|pattern| !pattern.as_str().contains(['*', '/']));
        let kinds = kinds.iter().map(|kind| kind.as_str().to_owned()).collect();
        Self { kinds, patterns: Filter::new(patterns) }
    }

    fn matches(&self, kind: &str, record: &Record) -> bool {
        self.kinds.iter().any(|known| known == kind)
            || (!self.patterns.patterns().is_empty() && self.patterns.matches(record))
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Presence {
    watched: Option<(Heartbeats, Patience)>,
    hearts: HashMap<(Arc<str>, Arc<str>), Beat>,
    news: Vec<Heart>,
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

    /// An emitter has brought an event.
    pub fn hear(&mut self, emitter: &Arc<str>, record: &Record, now: Duration) {
        let Some((heartbeats, _)) = &self.watched else { return };
        if emitter.is_empty() || record.carried() != Carried::Event {
            return;
        }
        let kind = record.kind();
        let gone = kind == GONE;
        if !gone && !heartbeats.matches(kind, record) {
            return;
        }
        if record.topic().len() > MAX_TOPIC {
            self.unwatched += 1;
            return;
        }
        let key = (emitter.clone(), Arc::from(record.topic()));
        if gone {
            self.hearts.remove(&key);
        } else if let Some(beat) = self.hearts.get_mut(&key) {
            beat.last = now;
            if beat.state != Freshness::Active {
                beat.state = Freshness::Active;
                self.news.push(heart(&key, beat, now));
            }
        } else if self.hearts.len() < MOST {
            let beat = Beat { last: now, state: Freshness::Active };
            self.news.push(heart(&key, &beat, now));
            self.hearts.insert(key, beat);
        } else {
            self.unwatched += 1;
        }
    }

    /// Looks who is late, and takes what has changed since the last time, in that order.
    pub fn look(&mut self, now: Duration) -> Vec<Heart> {
        let Some((_, patience)) = &self.watched else { return Vec::new() };
        let mut silent = Vec::new();
        self.hearts.retain(|key, beat| {
            let silence = now.saturating_sub(beat.last);
            let state = match silence {
                _ if silence > patience.dead => Freshness::Dead,
                _ if silence > patience.late => Freshness::Late,
                _ => Freshness::Active,
            };
            if state > beat.state {
                beat.state = state;
                silent.push(heart(key, beat, now));
            }
            silence <= patience.dead.max(REMEMBERED)
        });
        silent.sort_by(|a, b| b.silent.total_cmp(&a.silent));
        self.news.append(&mut silent);
        std::mem::take(&mut self.news)
    }

    /// A change that could not be told is told the next time, unless it is old by then.
    pub fn untold(&mut self, heart: Heart) {
        let key = (heart.emitter.clone(), heart.topic.clone());
        if self.hearts.get(&key).is_some_and(|beat| beat.state == heart.state) && !self.news.contains(&heart) {
            self.news.push(heart);
        }
    }

    /// How they all are, naming at most so many.
    #[must_use]
    pub fn summary(&self, most: usize, now: Duration) -> Summary {
        let mut summary = Summary { unwatched: self.unwatched, ..Summary::default() };
        for (key, beat) in &self.hearts {
            match beat.state {
                Freshness::Active => summary.active += 1,
                Freshness::Late => summary.late += 1,
                Freshness::Dead => summary.dead += 1,
            }
            summary.hearts.push(heart(key, beat, now));
        }
        summary.hearts.sort_by(|a, b| b.silent.total_cmp(&a.silent).then_with(|| a.topic.cmp(&b.topic)));
        summary.hearts.truncate(most);
        summary
    }
}

impl Heart {
    /// The event that tells of its change: `presence.active`, `.late` or `.dead`, on the topic of its heartbeats.
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

fn heart((emitter, topic): &(Arc<str>, Arc<str>), beat: &Beat, now: Duration) -> Heart {
    let silent = now.saturating_sub(beat.last).as_secs_f64();
    Heart { emitter: emitter.clone(), topic: topic.clone(), state: beat.state, silent: (silent * 1e3).round() / 1e3 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::topic::Pattern;

    const BEAT: &str = "graph.delta.heartbeat";

    fn presence() -> Presence {
        let heartbeats = Filter::new([Pattern::parse(BEAT).expect("valid")]);
        Presence::new(&heartbeats, Patience { late: Duration::from_secs(45), dead: Duration::from_secs(60) })
    }

    fn hear(presence: &mut Presence, emitter: &str, kind: &str, topic: &str, now: u64) {
        let json = format!(r#"{{"type":"{kind}","topic":"{topic}"}}"#);
        let record = Record::event(json.into()).expect("valid");
        presence.hear(&emitter.into(), &record, Duration::from_secs(now));
    }

    fn look(presence: &mut Presence, now: u64) -> Vec<(String, Freshness)> {
        let news = presence.look(Duration::from_secs(now));
        news.iter().map(|heart| (format!("{}:{}", heart.emitter, heart.topic), heart.state)).collect()
    }

    fn counts(presence: &Presence) -> (usize, usize, usize) {
        let summary = presence.summary(0, Duration::ZERO);
        (summary.active, summary.late, summary.dead)
    }

    #[test]
    fn a_heart_is_active_then_late_then_dead_and_each_is_told_once() {
        let mut presence = presence();
        hear(&mut presence, "x", BEAT, "ada", 0);
        assert_eq!(look(&mut presence, 1), [("x:ada".into(), Freshness::Active)]);
        assert_eq!(look(&mut presence, 45), []);
        assert_eq!(look(&mut presence, 46), [("x:ada".into(), Freshness::Late)]);
        assert_eq!(look(&mut presence, 60), []);
        assert_eq!(look(&mut presence, 61), [("x:ada".into(), Freshness::Dead)]);
        assert_eq!(look(&mut presence, 500), []);
        assert_eq!(counts(&presence), (0, 0, 1));
        hear(&mut presence, "x", BEAT, "ada", 501);
        hear(&mut presence, "x", BEAT, "ada", 502);
        assert_eq!(look(&mut presence, 502), [("x:ada".into(), Freshness::Active)]);
        assert_eq!(counts(&presence), (1, 0, 0));
    }

    #[test]
    fn beats_in_time_are_no_news_and_a_long_pause_of_the_watcher_tells_the_last_state_only() {
        let mut presence = presence();
        for now in [0, 30, 60, 90] {
            hear(&mut presence, "x", BEAT, "ada", now);
        }
        assert_eq!(look(&mut presence, 95).len(), 1);
        assert_eq!(look(&mut presence, 1000), [("x:ada".into(), Freshness::Dead)]);
    }

    #[test]
    fn only_heartbeats_count_and_each_engine_of_an_emitter_for_itself() {
        let mut presence = presence();
        hear(&mut presence, "x", BEAT, "ada", 0);
        hear(&mut presence, "x", BEAT, "atlas", 0);
        hear(&mut presence, "y", BEAT, "ada", 0);
        hear(&mut presence, "z", "graph.delta.node.upsert", "ada", 0);
        hear(&mut presence, "", BEAT, "nobody", 0);
        assert_eq!(counts(&presence), (3, 0, 0));
        look(&mut presence, 1);
        hear(&mut presence, "x", BEAT, "ada", 40);
        hear(&mut presence, "x", "graph.delta.node.upsert", "atlas", 50);
        let late = look(&mut presence, 50);
        assert_eq!(late.len(), 2);
        assert!(
            late.contains(&("x:atlas".into(), Freshness::Late)) && late.contains(&("y:ada".into(), Freshness::Late))
        );
    }

    #[test]
    fn heartbeats_may_be_chosen_by_patterns_of_types_and_topics_and_a_gap_is_none() {
        let patience = presence().watched.expect("watching").1;
        let patterns = ["*.beacon", "graph/*/delta/heartbeat"].map(|text| Pattern::parse(text).expect("valid"));
        let mut presence = Presence::new(&Filter::new(patterns), patience);
        hear(&mut presence, "x", "presence.beacon", "a", 0);
        hear(&mut presence, "x", "any", "graph/ada/delta/heartbeat", 0);
        hear(&mut presence, "x", "any", "graph/ada/delta/node", 0);
        presence.hear(&"x".into(), &Record::gap("x", "e", 1, 2, "crash"), Duration::ZERO);
        assert_eq!(counts(&presence), (2, 0, 0));
    }

    #[test]
    fn what_could_not_be_told_is_told_later_unless_it_is_old() {
        let mut presence = presence();
        hear(&mut presence, "x", BEAT, "ada", 0);
        let [active] = &presence.look(Duration::ZERO)[..] else { panic!("one") };
        presence.untold(active.clone());
        assert_eq!(look(&mut presence, 1), [("x:ada".into(), Freshness::Active)]);
        presence.look(Duration::from_secs(50));
        presence.untold(active.clone());
        assert_eq!(look(&mut presence, 51), []);
    }

    #[test]
    fn who_takes_leave_is_not_dead() {
        let mut presence = presence();
        hear(&mut presence, "x", BEAT, "ada", 0);
        hear(&mut presence, "x", GONE, "atlas", 0);
        look(&mut presence, 1);
        hear(&mut presence, "x", GONE, "ada", 2);
        assert_eq!(look(&mut presence, 100), []);
        assert_eq!(counts(&presence), (0, 0, 0));
    }

    #[test]
    fn the_dead_are_forgotten_after_an_hour() {
        let mut presence = presence();
        hear(&mut presence, "x", BEAT, "ada", 0);
        look(&mut presence, 3600);
        assert_eq!(counts(&presence), (0, 0, 1));
        look(&mut presence, 3601);
        assert_eq!(counts(&presence), (0, 0, 0));
    }

    #[test]
    fn topics_that_somebody_makes_up_fill_a_bound_and_no_more() {
        let mut presence = presence();
        for n in 0..MOST + 5 {
            hear(&mut presence, "x", BEAT, &n.to_string(), 0);
        }
        hear(&mut presence, "x", BEAT, &"t".repeat(MAX_TOPIC + 1), 0);
        let summary = presence.summary(3, Duration::from_secs(2));
        assert_eq!((summary.active, summary.unwatched, summary.hearts.len()), (MOST, 6, 3));
    }

    #[test]
    fn nothing_is_watched_without_patterns() {
        let mut presence = Presence::new(&Filter::default(), presence().watched.expect("watching").1);
        hear(&mut presence, "x", BEAT, "ada", 0);
        assert!(!presence.is_watching() && look(&mut presence, 100).is_empty());
        assert_eq!(counts(&presence), (0, 0, 0));
    }

    #[test]
    fn a_change_is_told_on_the_topic_of_the_heartbeats() {
        let mut presence = presence();
        hear(&mut presence, "x", BEAT, "graph/ada", 0);
        let [active] = &presence.look(Duration::ZERO)[..] else { panic!("one") };
        let told = String::from_utf8(active.event()).expect("text");
        let want = r#"{"type":"presence.active","topic":"graph/ada","data":{"emitter":"x","topic":"graph/ada","state":"active","silent":0.0,"alert":false}}"#;
        assert_eq!(told, want);
        let [dead] = &presence.look(Duration::from_millis(61_500))[..] else { panic!("one") };
        let told = String::from_utf8(dead.event()).expect("text");
        assert!(told.contains(r#""presence.dead""#) && told.contains(r#""silent":61.5,"alert":true"#), "{told}");
        hear(&mut presence, "y", BEAT, "", 0);
        let [bare] = &presence.look(Duration::ZERO)[..] else { panic!("one") };
        assert!(String::from_utf8(bare.event()).expect("text").starts_with(r#"{"type":"presence.active","data""#));
    }
}
