//! The hub's log, sessions and fan-out against a shadow that knows everything: random publishing, subscribing, reading,
//! dawdling, vanishing and coming back, acks, tokens that are fresh, narrower, wrong or over, restarts with and without a
//! durable log, trims by number, bytes and age, other hubs that are further.
//!
//! The oracle: what a subscriber got is exactly what its patterns matched in the log from its position on, in order and
//! once, with the right `prev`; or it was told that it cannot have that, with the right reason. `recovered: true` is
//! said exactly when the shadow says it can be. A session that may be left something out is told of each stretch in its
//! place, and of none as long as everything fits.
//!
//! `HUB_MODEL=100000` is the long form. A failure names its seed; `HUB_MODEL_SEED=n` runs that schedule alone.

#![expect(clippy::print_stderr, reason = "the seeds, and how much was tried")]

#[path = "hub_model/shadow.rs"]
mod shadow;

use std::collections::VecDeque;
use std::time::Duration;

use fastrand::Rng;
use safe_broadcaster::hub::auth::{Denied, Grant, Scope};
use safe_broadcaster::hub::entry::Record;
use safe_broadcaster::hub::log::{ENTRY_BYTES, Log, LogLimits};
use safe_broadcaster::hub::machine::{Access, SubscriberMachine};
use safe_broadcaster::hub::outbox::Item;
use safe_broadcaster::hub::registry::{Role, SessionId};
use safe_broadcaster::hub::state::State;
use safe_broadcaster::wire::close::CloseCode;
use safe_broadcaster::wire::topic::Pattern;
use serde_json::{Value, json};
use shadow::{Expected, Kept, Shadow};

const SCHEDULES: u64 = 1000;
const STEPS: usize = 120;
/// Times are whole ticks, so that ages are met exactly.
const TICK: Duration = Duration::from_millis(50);
const KINDS: [&str; 7] =
    ["alert", "alert.disk", "alert.disk.full", "alert.net", "graph.delta", "graph.delta.node", "tick"];
const TOPICS: [&str; 5] = ["graph", "graph/ada", "graph/ada/delta", "graph/bob", ""];
const PATTERNS: [&str; 10] = [
    "*",
    "alert.*",
    "alert.*.full",
    "graph.delta",
    "graph.*",
    "*.disk",
    "tick",
    "graph/*",
    "graph/ada",
    "graph/*/delta",
];

/// A dashboard and what it should see.
struct Client {
    link: Option<Link>,
    patterns: Vec<&'static str>,
    /// What it would give as `since`.
    position: Option<(String, u64)>,
}

struct Link {
    id: SessionId,
    machine: SubscriberMachine,
    access: Access,
    shadow: shadow::Session,
}

struct World {
    rng: Rng,
    now: Duration,
    limits: LogLimits,
    queue_bytes: usize,
    durable: bool,
    epochs: u64,
    state: State,
    shadow: Shadow,
    clients: Vec<Client>,
    seen: Seen,
}

/// What the schedules brought about, so that a model that tries nothing is noticed.
#[derive(Debug, Default)]
struct Seen {
    live: u64,
    replayed: u64,
    recovered: u64,
    not_recovered: [u64; 4],
    slow: u64,
    /// Stretches left out, for want of room and for newer events.
    left_out: [u64; 2],
    /// Replays that the log overtook.
    overtaken: u64,
    restarts: u64,
    acks: u64,
    /// Positions moved by a pong.
    moved: u64,
    tokens: u64,
    /// Subscriptions that no token granted.
    not_granted: u64,
    /// Sessions that ended for a wrong token, for one that was over, and for want of a place.
    ended: [u64; 3],
    /// Subscriptions that begin where this hub is not yet.
    further: u64,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let limits = LogLimits {
            events: if rng.bool() { 1000 } else { rng.usize(0..60) },
            bytes: ENTRY_BYTES * if rng.bool() { 1000 } else { rng.usize(1..80) },
            age: (rng.u32(0..3) == 0).then(|| TICK * rng.u32(1..60)),
        };
        let queue_bytes = if rng.bool() { 1 << 20 } else { rng.usize(200..4000) };
        let durable = rng.bool();
        let clients = (0..rng.usize(1..6)).map(|_| Client { link: None, patterns: vec![], position: None }).collect();
        let epoch = "e1".to_owned();
        Self {
            rng,
            now: Duration::ZERO,
            limits,
            queue_bytes,
            durable,
            epochs: 1,
            state: State::new(epoch.clone(), limits, queue_bytes),
            shadow: Shadow::new(epoch, limits),
            clients,
            seen: Seen::default(),
        }
    }

    fn step(&mut self) {
        self.now += TICK * self.rng.u32(0..3);
        self.expire();
        let client = self.rng.usize(0..self.clients.len());
        match self.rng.u32(0..100) {
            0..45 => self.publish(),
            45..75 => {
                let budget = if self.rng.bool() { usize::MAX } else { self.rng.usize(1..2000) };
                self.read(client, budget);
            }
            75..83 => self.subscribe(client, None),
            83 => self.subscribe_again_and_again(client),
            84 => self.show_token(client),
            85..87 => self.unsubscribe(client),
            87 => self.ping(client),
            88..92 => self.acknowledge(client),
            92..98 => self.vanish(client),
            98 => self.restart(),
            _ => self.fall_behind(client),
        }
    }

    /// Other hubs have events that this one will get, and a client was there.
    fn fall_behind(&mut self, client: usize) {
        let known = self.shadow.known() + self.rng.u64(1..20);
        self.state.log.expect(known);
        self.shadow.expect(known);
        for _ in 0..self.rng.u32(1..4) {
            let whence = self.rng.bool().then(|| (self.shadow.epoch.clone(), known));
            self.subscribe(client, whence);
        }
    }

    fn publish(&mut self) {
        for _ in 0..self.rng.usize(1..8) {
            let (kind, topic) = (KINDS[self.rng.usize(..KINDS.len())], TOPICS[self.rng.usize(..TOPICS.len())]);
            let record = if self.rng.u32(0..20) == 0 {
                Record::gap("ada", "x", 1, self.rng.u64(1..9), "crash")
            } else {
                let padding = "x".repeat(self.rng.usize(0..200));
                let mut event = json!({"type": kind, "padding": padding});
                if !topic.is_empty() {
                    event["topic"] = topic.into();
                }
                if self.rng.u32(0..4) == 0 {
                    event["key"] = format!("key{}", self.rng.u32(0..3)).into();
                }
                Record::event(event.to_string().into()).expect("valid")
            };
            let kept = self.shadow.append(&record, self.now);
            let reached = self.state.append(record, self.now).sessions;
            assert_eq!(self.state.log.head(), kept.offset);
            let mut expected = 0;
            for link in self.clients.iter_mut().filter_map(|client| client.link.as_mut()) {
                expected += usize::from(link.shadow.live(&kept));
            }
            assert_eq!(reached, expected, "who was reached by {kept:?}");
            for link in self.clients.iter_mut().filter_map(|client| client.link.as_mut()) {
                let closing = self.state.registry.is_closing(link.id);
                assert!(!closing || link.shadow.may_be_closed_by_an_event(), "it allows gaps");
                link.shadow.look(closing);
            }
        }
    }

    /// Connects if need be, and adds patterns, asking for what was missed where there is a position.
    fn subscribe(&mut self, client: usize, whence: Option<(String, u64)>) {
        let now = self.now;
        let fresh = self.clients[client].link.is_none();
        let client = &mut self.clients[client];
        if fresh {
            let id = self.state.registry.open(Role::Subscriber);
            let (machine, shadow) = (SubscriberMachine::new(id), shadow::Session::new(self.queue_bytes));
            let access = Access::granted(id, Grant::everything(), None);
            client.link = Some(Link { id, machine, access, shadow });
        }
        let add = if fresh && !client.patterns.is_empty() {
            client.patterns.clone()
        } else {
            (0..self.rng.usize(1..4)).map(|_| PATTERNS[self.rng.usize(..PATTERNS.len())]).collect()
        };
        let since = match self.rng.u32(0..10) {
            _ if whence.is_some() => whence,
            0 => None,
            _ if !fresh && self.rng.bool() => None,
            1 => Some((self.shadow.epoch.clone(), self.rng.u64(..))),
            2 => Some((self.shadow.epoch.clone(), self.rng.u64(0..=self.shadow.known()))),
            3 => Some((String::new(), self.shadow.head())),
            4 => {
                let near = [self.shadow.head(), self.shadow.trimmed(now), self.shadow.known()][self.rng.usize(..3)];
                Some((self.shadow.epoch.clone(), (near + self.rng.u64(0..3)).saturating_sub(1)))
            }
            _ => client.position.clone(),
        };
        for pattern in &add {
            if !client.patterns.contains(pattern) {
                client.patterns.push(pattern);
            }
        }
        let link = client.link.as_mut().expect("connected");
        let mut data = json!({"events": add});
        let granted = link.shadow.may_subscribe(&add);
        // When a session is closed that may be left something out, only the hub knows: no such end is foretold for it.
        if self.rng.u32(0..6) == 0 && granted && !link.shadow.expires() {
            let slow = ["disconnect", "conflate", "drop_with_gap"][self.rng.usize(..3)];
            data["slow"] = slow.into();
            link.shadow.set_slow(slow);
        }
        if let Some((epoch, offset)) = &since {
            data["since"] = json!({"epoch": epoch, "offset": offset});
        }
        let frame = json!({"type": "subscribe", "data": data}).to_string();
        link.shadow.subscribe(&mut self.shadow, &add, since.as_ref(), now);
        drop(link.machine.on_text(&frame, &mut link.access, &mut self.state, now));
        link.shadow.look(self.state.registry.is_closing(link.id));
    }

    /// More replays than a session may have.
    fn subscribe_again_and_again(&mut self, client: usize) {
        for _ in 0..20 {
            let oldest = self.shadow.trimmed(self.now);
            self.subscribe(client, Some((self.shadow.epoch.clone(), oldest)));
        }
    }

    fn unsubscribe(&mut self, client: usize) {
        let client = &mut self.clients[client];
        let (Some(link), false) = (client.link.as_mut(), client.patterns.is_empty()) else { return };
        let gone = client.patterns.swap_remove(self.rng.usize(..client.patterns.len()));
        link.shadow.unsubscribe(gone);
        let frame = json!({"type": "unsubscribe", "data": {"events": [gone]}}).to_string();
        drop(link.machine.on_text(&frame, &mut link.access, &mut self.state, self.now));
        link.shadow.look(self.state.registry.is_closing(link.id));
    }

    /// A token that is good, for less or not for long; or one that is wrong.
    fn show_token(&mut self, client: usize) {
        let Some(link) = self.clients[client].link.as_mut() else { return };
        // What a narrower grant takes from a replay on its way is tested beside the machine.
        if link.shadow.is_lossy() || self.state.registry.replays(link.id) > 0 {
            return;
        }
        let checked = if self.rng.u32(0..6) == 0 {
            link.shadow.refuse();
            Err(Denied::Invalid(shadow::WRONG.into()))
        } else {
            let scope: Option<Vec<_>> =
                self.rng.bool().then(|| (0..3).map(|_| PATTERNS[self.rng.usize(..PATTERNS.len())]).collect());
            let until = self.rng.bool().then(|| self.now + TICK * self.rng.u32(1..20));
            link.shadow.authenticate(scope.clone(), until);
            let parse = |text: &str| Pattern::parse(text).expect("valid");
            let subscribe = scope.map(|scope| Scope::new(scope.into_iter().map(parse)));
            Ok((Grant { subscribe, ..Grant::everything() }, until))
        };
        link.access.on_checked(checked, Role::Subscriber, &mut self.state);
        link.shadow.look(self.state.registry.is_closing(link.id));
        self.seen.tokens += 1;
    }

    /// Tokens are over when their time is.
    fn expire(&mut self) {
        for link in self.clients.iter_mut().filter_map(|client| client.link.as_mut()) {
            link.shadow.on_time(self.now);
            link.access.on_time(self.now, Role::Subscriber, &mut self.state);
            assert_eq!(self.state.registry.is_closing(link.id), link.shadow.is_over(), "when its time is over");
        }
    }

    fn ping(&mut self, client: usize) {
        let Some(link) = self.clients[client].link.as_mut() else { return };
        link.shadow.ping(&self.shadow);
        drop(link.machine.on_text(r#"{"type":"ping"}"#, &mut link.access, &mut self.state, self.now));
        link.shadow.look(self.state.registry.is_closing(link.id));
    }

    fn acknowledge(&mut self, client: usize) {
        let client = &mut self.clients[client];
        let (Some(link), Some((_, offset))) = (client.link.as_mut(), &client.position) else { return };
        if link.shadow.is_over() {
            return; // it is to be closed, and nothing that it says counts
        }
        let sequence = match self.rng.u32(0..4) {
            0 => self.rng.u64(0..=*offset),
            1 => offset + self.rng.u64(0..50),
            _ => *offset,
        };
        let frame = json!({"type": "ack", "data": {"sequence": sequence}}).to_string();
        let (before, taken) = (self.state.counters.acks, link.shadow.acknowledge(sequence));
        drop(link.machine.on_text(&frame, &mut link.access, &mut self.state, self.now));
        link.shadow.look(self.state.registry.is_closing(link.id));
        assert_eq!(self.state.counters.acks, before + u64::from(taken));
        let known = self.state.registry.laggards(usize::MAX).into_iter().find(|other| other.session == link.id);
        assert_eq!(known.expect("it is there").acked, link.shadow.acked, "acks are cumulative");
        self.seen.acks += u64::from(taken);
    }

    fn vanish(&mut self, client: usize) {
        if let Some(link) = self.clients[client].link.take() {
            self.state.registry.close(link.id);
        }
    }

    /// The hub is gone, and another one comes: with the same log if it is durable, else with a new epoch.
    fn restart(&mut self) {
        self.seen.restarts += 1;
        for client in &mut self.clients {
            client.link = None;
        }
        if self.durable {
            let kept: Vec<Kept> = self.shadow.kept(self.now).cloned().collect();
            let mut log = Log::resume(self.shadow.epoch.clone(), self.shadow.head() - kept.len() as u64, self.limits);
            for entry in kept {
                log.append(entry.record, entry.at);
            }
            self.state = State::resume(log, self.queue_bytes);
            self.shadow.expect(0); // it has not asked yet
        } else {
            self.epochs += 1;
            let epoch = format!("e{}", self.epochs);
            self.state = State::new(epoch.clone(), self.limits, self.queue_bytes);
            self.shadow = Shadow::new(epoch, self.limits);
        }
    }

    /// The client's socket takes about `budget` bytes.
    fn read(&mut self, client: usize, budget: usize) {
        let client = &mut self.clients[client];
        let Some(link) = client.link.as_mut() else { return };
        let mut items = VecDeque::new();
        self.state.take(link.id, budget, &mut items);
        let mut closed = false;
        for item in items {
            match item {
                Item::Text(frame) => {
                    let heard: Value = serde_json::from_slice(&frame).expect("JSON");
                    if heard["type"] == "gap" && heard.get("seq").is_none() {
                        let conflated = heard["data"]["reason"] == "conflated";
                        client.position = Some(link.shadow.leave_out(&heard["data"], conflated));
                        self.seen.left_out[usize::from(conflated)] += 1;
                        continue;
                    }
                    let expected = link.shadow.expected.pop_front().expect("nothing more was to come");
                    expected.check(&heard);
                    link.shadow.queued -= expected.cost(frame.len());
                    self.seen.note(&expected);
                    self.seen.further += u64::from(expected.begins_behind(self.state.log.head()));
                    match expected {
                        Expected::Subscribed { position, recovered, .. } if !recovered.is_some_and(|yes| yes) => {
                            client.position = Some(position);
                        }
                        Expected::Entry { position, .. } | Expected::Pong { reached: Some(position), .. } => {
                            client.position = Some(position);
                        }
                        _ => {}
                    }
                }
                Item::Close(code) if link.shadow.ended == Some(code) => {
                    assert!(link.shadow.expected.is_empty(), "not told before: {:?}", link.shadow.expected.front());
                    let why = [CloseCode::Unauthorized, CloseCode::TokenExpired, CloseCode::Degraded];
                    self.seen.ended[why.iter().position(|known| *known == code).expect("a known end")] += 1;
                    closed = true;
                }
                Item::Close(CloseCode::Slow) => {
                    let most = self.queue_bytes;
                    let overtaken = link.shadow.is_overtaken(self.shadow.trimmed(self.now));
                    let allowed = link.shadow.overflowed || overtaken;
                    assert!(allowed, "closed as slow with {} of {most} bytes", link.shadow.queued);
                    self.seen.slow += u64::from(!overtaken);
                    self.seen.overtaken += u64::from(overtaken);
                    closed = true;
                }
                other => panic!("unexpected {other:?}"),
            }
        }
        if closed {
            self.state.registry.close(link.id);
            client.link = None;
        } else if budget == usize::MAX {
            assert!(!link.shadow.is_over(), "{} bytes wait and it is not closed", link.shadow.queued);
            assert!(link.shadow.expected.is_empty(), "not delivered: {:?}", link.shadow.expected.front());
            assert_eq!(link.shadow.queued, 0);
        }
    }
}

impl Seen {
    fn note(&mut self, expected: &Expected) {
        match expected {
            Expected::Subscribed { recovered: Some(true), .. } => self.recovered += 1,
            Expected::Subscribed { reason: Some(reason), .. } => {
                let index = ["epoch", "truncated", "ahead", "limit"].iter().position(|known| known == reason);
                self.not_recovered[index.expect("a known reason")] += 1;
            }
            Expected::Pong { reached: Some(_), .. } => self.moved += 1,
            Expected::Error { code: "not_allowed", .. } => self.not_granted += 1,
            Expected::Entry { replay: true, .. } => self.replayed += 1,
            Expected::Entry { .. } => self.live += 1,
            _ => {}
        }
    }

    fn add(&mut self, other: &Self) {
        self.live += other.live;
        self.replayed += other.replayed;
        self.recovered += other.recovered;
        for (sum, more) in self.not_recovered.iter_mut().zip(other.not_recovered) {
            *sum += more;
        }
        self.slow += other.slow;
        for (sum, more) in self.left_out.iter_mut().zip(other.left_out) {
            *sum += more;
        }
        self.overtaken += other.overtaken;
        self.restarts += other.restarts;
        self.acks += other.acks;
        self.moved += other.moved;
        self.tokens += other.tokens;
        self.not_granted += other.not_granted;
        self.further += other.further;
        for (sum, more) in self.ended.iter_mut().zip(other.ended) {
            *sum += more;
        }
    }
}

fn run(seed: u64) -> Seen {
    let mut world = World::new(seed);
    for _ in 0..STEPS {
        world.step();
    }
    for client in 0..world.clients.len() {
        world.read(client, usize::MAX);
    }
    world.seen
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

#[test]
fn every_subscriber_gets_exactly_what_it_asked_for_or_knows_why_not() {
    if let Some(seed) = setting("HUB_MODEL_SEED") {
        eprintln!("{:?}", run(seed));
        return;
    }
    let schedules = setting("HUB_MODEL").unwrap_or(SCHEDULES);
    let first = fastrand::u64(..) >> 16;
    eprintln!("seeds {first}..{}", first + schedules);
    let mut seen = Seen::default();
    for seed in first..first + schedules {
        let ran = std::panic::catch_unwind(|| run(seed));
        seen.add(&ran.unwrap_or_else(|_| panic!("HUB_MODEL_SEED={seed} shows it again")));
    }
    eprintln!("{seen:?}");
    let tried = [seen.live, seen.replayed, seen.recovered, seen.slow, seen.overtaken, seen.restarts, seen.acks];
    let tried = tried.iter().chain(&seen.not_recovered).chain(&seen.left_out).chain(&seen.ended);
    let tried = tried.chain([&seen.moved, &seen.tokens, &seen.not_granted, &seen.further]);
    assert!(tried.into_iter().all(|count| *count > 0), "not everything was tried: {seen:?}");
}
