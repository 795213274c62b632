//! What the hub should do, in the plainest words: a list that is never thrown away, and patterns held against it one by
//! one.

use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;
use std::time::Duration;

use safe_broadcaster::hub::entry::Record;
use safe_broadcaster::hub::log::{LogLimits, cost};
use safe_broadcaster::hub::outbox::{FRAME_BYTES, MAX_REPLAYS};
use safe_broadcaster::wire::close::CloseCode;
use safe_broadcaster::wire::subscriber::Carried;
use serde_json::Value;

/// Why a wrong token is not taken.
pub(crate) const WRONG: &str = "the token is wrong";

/// An entry of the log.
#[derive(Clone, Debug)]
pub(crate) struct Kept {
    pub(crate) offset: u64,
    pub(crate) at: Duration,
    pub(crate) record: Record,
}

/// Everything that was ever published in this epoch.
pub(crate) struct Shadow {
    pub(crate) epoch: String,
    limits: LogLimits,
    entries: Vec<Kept>,
    /// How many of them are trimmed.
    trimmed: usize,
    /// Other hubs have given out offsets up to here.
    known: u64,
}

/// A frame that is to come.
#[derive(Clone, Debug)]
pub(crate) enum Expected {
    Subscribed {
        position: (String, u64),
        patterns: Vec<String>,
        recovered: Option<bool>,
        replayed: Option<u64>,
        reason: Option<&'static str>,
    },
    Unsubscribed(Vec<&'static str>),
    Authenticated,
    /// Everything that is for it, up to there, came before this.
    Pong {
        last: u64,
        reached: Option<(String, u64)>,
    },
    Error {
        code: &'static str,
        message: String,
    },
    Entry {
        position: (String, u64),
        kind: &'static str,
        prev: u64,
        replay: bool,
        data: Value,
    },
}

/// A connection, as it should be.
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(crate) struct Session {
    patterns: Vec<&'static str>,
    prev: u64,
    pub(crate) expected: VecDeque<Expected>,
    /// Bytes that should wait in the outbox.
    pub(crate) queued: usize,
    limit: usize,
    /// More should have waited than may: it is to be closed, and nothing more comes.
    pub(crate) overflowed: bool,
    epoch: String,
    /// Events may be left out, or have been: then what waits is less than is expected, and only the hub knows when it is
    /// too much.
    lossy: bool,
    /// Events may be left out now.
    leaves_out: bool,
    pub(crate) acked: Option<u64>,
    /// More was to wait than may, since all was read last.
    squeezed: bool,
    /// The events that came while it listened: seq, and whose newest state it is.
    came: Vec<(u64, Option<String>)>,
    /// What its token grants; `None` is everything.
    scope: Option<Vec<&'static str>>,
    /// When that is over.
    until: Option<Duration>,
    /// It is to be closed so, after what is expected.
    pub(crate) ended: Option<CloseCode>,
}

impl Shadow {
    pub(crate) fn new(epoch: String, limits: LogLimits) -> Self {
        Self { epoch, limits, entries: vec![], trimmed: 0, known: 0 }
    }

    pub(crate) fn head(&self) -> u64 {
        self.entries.len() as u64
    }

    /// Where the furthest hub is.
    pub(crate) fn known(&self) -> u64 {
        self.known.max(self.head())
    }

    pub(crate) fn expect(&mut self, known: u64) {
        self.known = known;
    }

    pub(crate) fn append(&mut self, record: &Record, now: Duration) -> Kept {
        let kept = Kept { offset: self.head() + 1, at: now, record: record.clone() };
        self.entries.push(kept.clone());
        self.trim(now);
        kept
    }

    /// What the log still has.
    pub(crate) fn kept(&mut self, now: Duration) -> impl Iterator<Item = &Kept> {
        self.trim(now);
        self.entries[self.trimmed..].iter()
    }

    /// How many of the oldest entries the log has given up.
    pub(crate) fn trimmed(&mut self, now: Duration) -> u64 {
        self.trim(now);
        self.trimmed as u64
    }

    fn trim(&mut self, now: Duration) {
        let LogLimits { events, bytes, age } = self.limits;
        while let Some(oldest) = self.entries.get(self.trimmed) {
            let left = &self.entries[self.trimmed..];
            let expired = age.is_some_and(|age| now > oldest.at + age);
            let large = left.iter().map(|entry| cost(&entry.record)).sum::<usize>() > bytes;
            if !expired && !large && left.len() <= events {
                return;
            }
            self.trimmed += 1;
        }
    }

    /// What came after a position, or why it cannot be given.
    fn since(&mut self, (epoch, offset): &(String, u64), now: Duration) -> Result<Vec<Kept>, &'static str> {
        self.trim(now);
        if *epoch != self.epoch {
            Err("epoch")
        } else if *offset > self.known() {
            Err("ahead")
        } else if (*offset as usize) < self.trimmed {
            Err("truncated")
        } else {
            Ok(self.entries.get(*offset as usize..).unwrap_or_default().to_vec())
        }
    }
}

impl Session {
    pub(crate) fn new(limit: usize) -> Self {
        let (patterns, expected) = (vec![], VecDeque::new());
        Self {
            patterns,
            prev: 0,
            expected,
            queued: 0,
            limit,
            overflowed: false,
            epoch: String::new(),
            lossy: false,
            leaves_out: false,
            acked: None,
            squeezed: false,
            came: vec![],
            scope: None,
            until: None,
            ended: None,
        }
    }

    /// Whether it is to be closed, and nothing more comes.
    pub(crate) fn is_over(&self) -> bool {
        self.overflowed || self.ended.is_some()
    }

    pub(crate) fn is_lossy(&self) -> bool {
        self.lossy
    }

    pub(crate) fn expires(&self) -> bool {
        self.until.is_some()
    }

    pub(crate) fn may_subscribe(&self, patterns: &[&str]) -> bool {
        patterns.iter().all(|pattern| self.is_granted(pattern))
    }

    fn is_granted(&self, pattern: &str) -> bool {
        self.scope.as_ref().is_none_or(|scope| scope.iter().any(|wide| contains(wide, pattern)))
    }

    /// A good token was shown.
    pub(crate) fn authenticate(&mut self, scope: Option<Vec<&'static str>>, until: Option<Duration>) {
        (self.scope, self.until) = (scope, until);
        self.expect(Expected::Authenticated);
        let patterns = std::mem::take(&mut self.patterns);
        let (stay, lost) = patterns.into_iter().partition::<Vec<_>, _>(|pattern| self.is_granted(pattern));
        self.patterns = stay;
        if !lost.is_empty() {
            self.expect(Expected::Unsubscribed(lost));
        }
    }

    /// A wrong token was shown.
    pub(crate) fn refuse(&mut self) {
        self.until = None;
        self.end("unauthorized", WRONG, CloseCode::Unauthorized);
    }

    /// Time went by.
    pub(crate) fn on_time(&mut self, now: Duration) {
        if self.until.is_some_and(|until| until <= now) {
            self.until = None;
            let message = "the token has expired; come back with a fresh one";
            self.end("token_expired", message, CloseCode::TokenExpired);
        }
    }

    fn end(&mut self, code: &'static str, message: &str, close: CloseCode) {
        self.expect(Expected::Error { code, message: message.to_owned() });
        if !self.is_over() {
            self.ended = Some(close);
        }
    }

    pub(crate) fn set_slow(&mut self, slow: &str) {
        if !self.is_over() {
            self.leaves_out = slow != "disconnect";
            self.lossy |= self.leaves_out;
        }
    }

    pub(crate) fn may_be_closed_by_an_event(&self) -> bool {
        !self.leaves_out || self.is_over()
    }

    /// Sees whether the hub ends a session of which that cannot be foreseen.
    pub(crate) fn look(&mut self, is_closing: bool) {
        if self.lossy && is_closing && self.ended.is_none() {
            assert!(self.squeezed, "closed with {} of {} bytes", self.queued, self.limit);
            self.overflowed = true;
        }
    }

    /// A stretch of live events is left out, in its place. Returns where the client stands then.
    pub(crate) fn leave_out(&mut self, stretch: &Value, conflated: bool) -> (String, u64) {
        assert!(self.lossy && self.squeezed, "everything fits: {stretch}");
        let (from, to) = (&stretch["from"], stretch["to"].as_u64().expect("an offset"));
        let mut begins = true;
        loop {
            let left = self.expected.pop_front().expect("nothing more was to come");
            let Expected::Entry { position, replay: false, .. } = &left else { panic!("{left:?} is left out") };
            assert!(!begins || *from == position.1, "{stretch} begins with {left:?}");
            begins = false;
            let (_, key) = self.came.iter().find(|(seq, _)| *seq == position.1).expect("it came");
            let newer = self.came.iter().any(|(seq, other)| *seq > position.1 && other == key);
            assert!(!conflated || key.is_some() && newer, "{left:?} has no newer one");
            let position = position.clone();
            self.queued -= left.cost(left.len());
            if position.1 >= to {
                assert_eq!(position.1, to, "{stretch} ends where nothing is");
                return position;
            }
        }
    }

    pub(crate) fn subscribe(
        &mut self,
        log: &mut Shadow,
        add: &[&'static str],
        since: Option<&(String, u64)>,
        now: Duration,
    ) {
        if self.is_over() {
            return;
        }
        if let Some(pattern) = add.iter().find(|pattern| !self.is_granted(pattern)) {
            let message = format!("the token does not grant all of {pattern}");
            return self.expect(Expected::Error { code: "not_allowed", message });
        }
        let place = if self.patterns.is_empty() { log.head() } else { self.prev.max(log.head()) };
        let asked = since.filter(|position| log.since(position, now).is_ok()).map(|(_, offset)| *offset);
        if !self.patterns.is_empty() && asked.is_some_and(|offset| offset.max(log.head()) != place) {
            // What it has was told to go on at one place, and what is added would have to at another.
            self.ended = Some(CloseCode::Degraded);
            return;
        }
        for pattern in add {
            if !self.patterns.contains(pattern) {
                self.patterns.push(pattern);
            }
        }
        self.epoch.clone_from(&log.epoch);
        let busy = self.replays() >= MAX_REPLAYS;
        let found = since.map(|position| match log.since(position, now) {
            Ok(_) if busy => Err("limit"),
            found => found,
        });
        let replay = found.clone().and_then(Result::ok).unwrap_or_default();
        let replay: Vec<_> = replay.into_iter().filter(|entry| matches(add, entry)).collect();
        let recovered = asked.filter(|_| matches!(found, Some(Ok(_))));
        let place = recovered.map_or(place, |offset| offset.max(log.head()));
        let subscribed = Expected::Subscribed {
            position: (log.epoch.clone(), place),
            patterns: self.patterns.iter().map(|&pattern| pattern.to_owned()).collect(),
            recovered: found.as_ref().map(Result::is_ok),
            replayed: found.as_ref().filter(|found| found.is_ok()).map(|_| replay.len() as u64),
            reason: found.and_then(Result::err),
        };
        self.expect(subscribed);
        if let Some((_, offset)) = since {
            let mut prev = *offset;
            for entry in replay {
                let seq = entry.offset;
                let frame = self.entry(&entry, prev, true);
                self.expect(frame);
                prev = seq;
            }
        }
        self.prev = place;
    }

    /// How many replays are not delivered yet.
    fn replays(&self) -> usize {
        let begun = matches!(self.expected.front(), Some(Expected::Entry { replay: true, .. }));
        let waits = |frame: &&Expected| matches!(frame, Expected::Subscribed { replayed: Some(1..), .. });
        usize::from(begun) + self.expected.iter().filter(waits).count()
    }

    /// Whether the log, without so many of its oldest entries, can no longer tell what comes next.
    pub(crate) fn is_overtaken(&self, trimmed: u64) -> bool {
        matches!(self.expected.front(), Some(Expected::Entry { replay: true, prev, .. }) if *prev < trimmed)
    }

    pub(crate) fn unsubscribe(&mut self, pattern: &'static str) {
        if !self.is_over() {
            self.patterns.retain(|held| *held != pattern);
            self.expect(Expected::Unsubscribed(vec![pattern]));
        }
    }

    pub(crate) fn ping(&mut self, log: &Shadow) {
        let reached = (!self.patterns.is_empty()).then(|| (log.epoch.clone(), log.head().max(self.prev)));
        self.expect(Expected::Pong { last: self.prev, reached });
    }

    /// An event was published; whether it is for this session, which may have had it from another hub.
    pub(crate) fn live(&mut self, entry: &Kept) -> bool {
        if self.is_over() || entry.offset <= self.prev || !matches(&self.patterns, entry) {
            return false;
        }
        let frame = self.entry(entry, self.prev, false);
        self.prev = entry.offset;
        self.came.push((entry.offset, key(&entry.record)));
        self.expect(frame);
        true
    }

    /// Everything up to there is processed, says the client; whether that counts.
    pub(crate) fn acknowledge(&mut self, sequence: u64) -> bool {
        if sequence > self.prev {
            let message = format!("data.sequence is {sequence}, the last one sent was {}", self.prev);
            self.expect(Expected::Error { code: "bad_frame", message });
            return false;
        }
        self.acked = self.acked.max(Some(sequence));
        true
    }

    fn entry(&self, entry: &Kept, prev: u64, replay: bool) -> Expected {
        Expected::Entry {
            position: (self.epoch.clone(), entry.offset),
            kind: match entry.record.carried() {
                Carried::Event => "event",
                Carried::Gap => "gap",
            },
            prev,
            replay,
            data: serde_json::from_slice(entry.record.json()).expect("JSON"),
        }
    }

    fn expect(&mut self, frame: Expected) {
        if self.is_over() {
            return;
        }
        if self.expected.is_empty() {
            self.squeezed = false;
        }
        let cost = frame.cost(frame.len());
        if cost > 0 && self.queued > 0 && self.queued + cost > self.limit {
            self.squeezed = true;
            self.overflowed = !self.lossy;
            if self.overflowed {
                return;
            }
        }
        self.queued += cost;
        self.expected.push_back(frame);
    }
}

impl Expected {
    /// What it takes of the outbox's bound; replays are read from the log and take nothing.
    pub(crate) fn cost(&self, len: usize) -> usize {
        if matches!(self, Self::Entry { replay: true, .. }) { 0 } else { FRAME_BYTES + len }
    }

    /// Length of the frame.
    fn len(&self) -> usize {
        self.frame().to_string().len()
    }

    pub(crate) fn check(&self, heard: &Value) {
        assert_eq!(*heard, self.frame());
    }

    /// Whether it is an answer that begins behind an offset.
    pub(crate) fn begins_behind(&self, offset: u64) -> bool {
        matches!(self, Self::Subscribed { position, .. } if position.1 > offset)
    }

    fn frame(&self) -> Value {
        let mut frame = serde_json::Map::new();
        let mut put = |name: &str, value: Value| drop(frame.insert(name.to_owned(), value));
        match self {
            Self::Subscribed { position: (epoch, offset), patterns, recovered, replayed, reason } => {
                put("action", "subscribed".into());
                put("events", patterns.clone().into());
                put("epoch", epoch.clone().into());
                put("offset", (*offset).into());
                let answers = [
                    ("recovered", recovered.map(Value::from)),
                    ("replayed", replayed.map(Value::from)),
                    ("reason", reason.map(Value::from)),
                ];
                for (name, value) in answers {
                    if let Some(value) = value {
                        put(name, value);
                    }
                }
            }
            Self::Unsubscribed(patterns) => {
                put("action", "unsubscribed".into());
                put("events", patterns.clone().into());
            }
            Self::Authenticated => {
                put("action", "authenticated".into());
                put("subject", Value::Null);
                put("expires", Value::Null);
            }
            Self::Pong { last, reached } => {
                put("type", "pong".into());
                put("lastSeq", (*last).into());
                if let Some((epoch, offset)) = reached {
                    put("epoch", epoch.clone().into());
                    put("offset", (*offset).into());
                }
            }
            Self::Error { code, message } => {
                put("type", "error".into());
                put("data", serde_json::json!({"code": code, "message": message}));
            }
            Self::Entry { position: (_, seq), kind, prev, replay, data } => {
                put("type", (*kind).into());
                put("seq", (*seq).into());
                put("prev", (*prev).into());
                if *replay {
                    put("replay", true.into());
                }
                put("data", data.clone());
            }
        }
        frame.into()
    }
}

/// Whose newest state an event is.
fn key(record: &Record) -> Option<String> {
    if record.carried() == Carried::Gap {
        return None;
    }
    let event: Value = serde_json::from_slice(record.json()).expect("JSON");
    let own = ["key", "topic", "type"].into_iter().find_map(|field| Some((field, event.get(field)?.as_str()?)));
    own.map(|(field, text)| format!("{field} {text}"))
}

fn matches(patterns: &[&str], entry: &Kept) -> bool {
    let record = &entry.record;
    match record.carried() {
        Carried::Gap => !patterns.is_empty(),
        Carried::Event => patterns.iter().any(|pattern| match_one(pattern, record.kind(), record.topic())),
    }
}

fn match_one(pattern: &str, kind: &str, topic: &str) -> bool {
    let (name, separator) = if pattern.contains('/') { (topic, '/') } else { (kind, '.') };
    if pattern == "*" {
        return true;
    }
    let (wanted, segments): (Vec<_>, Vec<_>) = (pattern.split(separator).collect(), name.split(separator).collect());
    let long = wanted.last() == Some(&"*") && segments.len() > wanted.len();
    !name.is_empty()
        && (long || segments.len() == wanted.len())
        && wanted.iter().zip(&segments).all(|(wanted, segment)| wanted == &"*" || wanted == segment)
}

/// Whether each name that the one pattern matches is matched by the other: tried with every name of up to four of the
/// words that patterns are made of here, and a word that is in none.
fn contains(wide: &'static str, narrow: &str) -> bool {
    const WORDS: [&str; 9] = ["alert", "disk", "full", "graph", "delta", "ada", "tick", "net", "other"];
    static KNOWN: Mutex<Option<HashMap<(String, String), bool>>> = Mutex::new(None);
    let mut known = KNOWN.lock().expect("not poisoned");
    let answer = known.get_or_insert_default().entry((wide.to_owned(), narrow.to_owned()));
    *answer.or_insert_with(|| {
        let names = (1..=4_u32).flat_map(|depth| {
            (0..WORDS.len().pow(depth))
                .map(move |n| (0..depth).map(|at| WORDS[n / WORDS.len().pow(at) % WORDS.len()]).collect::<Vec<_>>())
        });
        let implies = |kind: &str, topic: &str| !match_one(narrow, kind, topic) || match_one(wide, kind, topic);
        names.into_iter().all(|name| implies(&name.join("."), "") && implies("", &name.join("/")))
    })
}
