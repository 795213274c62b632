//! Clients of Centrifugo's protocol against a hub, in random schedules: they keep one position for each channel, as
//! centrifuge-js does, and come back with it after they were cut off anywhere.
//!
//! The oracle: what a channel got since its last fresh start is exactly what matches it in the log from there on, in order
//! and once, but for the stretches that were told as left out. A fresh start is given only where the log cannot tell any
//! more.
//!
//! `CENTRIFUGO_MODEL=100000` is the long form. A failure names its seed; `CENTRIFUGO_MODEL_SEED=n` runs that one alone.

#![expect(clippy::print_stderr, reason = "the seeds, and how much was tried")]

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use fastrand::Rng;
use safe_broadcaster::hub::auth::Grant;
use safe_broadcaster::hub::entry::Record;
use safe_broadcaster::hub::log::LogLimits;
use safe_broadcaster::hub::machine::{Access, CentrifugoMachine};
use safe_broadcaster::hub::outbox::Item;
use safe_broadcaster::hub::registry::{Role, SessionId};
use safe_broadcaster::hub::state::State;
use safe_broadcaster::wire::close::CloseCode;
use safe_broadcaster::wire::subscriber::Slow;
use safe_broadcaster::wire::topic::Pattern;
use serde_json::{Value, json};

const SCHEDULES: u64 = 1000;
const STEPS: usize = 150;
const NOW: Duration = Duration::ZERO;
const KINDS: [&str; 6] = ["alert", "alert.disk", "alert.disk.full", "graph.delta", "tick", "tock"];
const CHANNELS: [&str; 8] = ["*", "alert.*", "alert.disk", "alert.*.full", "graph.*", "tick", "tock", "never"];

/// What a client knows of a channel.
#[derive(Default)]
struct Channel {
    /// Where it stands; as long as it has one, it comes back with it.
    position: Option<(String, u64)>,
    /// Where it began, at first or anew.
    base: u64,
    got: Vec<u64>,
    /// Stretches that it was told that it does not get.
    left_out: Vec<(u64, u64)>,
    /// The answer to its `subscribe` came.
    subscribed: bool,
}

struct Link {
    id: SessionId,
    machine: CentrifugoMachine,
    access: Access,
    /// Channels whose `subscribe` or `unsubscribe` is not answered, by the number of the command.
    asked: BTreeMap<u64, &'static str>,
}

#[derive(Default)]
struct Client {
    link: Option<Link>,
    channels: BTreeMap<&'static str, Channel>,
    commands: u64,
}

struct World {
    rng: Rng,
    limits: LogLimits,
    queue_bytes: usize,
    slow: Slow,
    epochs: u64,
    state: State,
    /// All that was published in this epoch.
    log: Vec<&'static str>,
    clients: Vec<Client>,
    seen: Seen,
}

/// What the schedules brought about, so that a model that tries nothing is noticed.
#[derive(Debug, Default)]
struct Seen {
    publications: u64,
    recovered: u64,
    fresh: u64,
    slow: u64,
    left_out: u64,
    restarts: u64,
    waited: u64,
}

fn state(epoch: u64, limits: LogLimits, queue_bytes: usize, slow: Slow) -> State {
    State::new(format!("e{epoch}"), limits, queue_bytes).with(slow, None)
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = Rng::with_seed(seed);
        let limits = LogLimits { events: if rng.bool() { 1000 } else { rng.usize(1..80) }, bytes: 1 << 20, age: None };
        let queue_bytes = if rng.bool() { 1 << 20 } else { rng.usize(800..6000) };
        let slow = [Slow::Disconnect, Slow::Conflate, Slow::DropWithGap][rng.usize(..3)];
        let clients = (0..rng.usize(1..5)).map(|_| Client::default()).collect();
        let state = state(1, limits, queue_bytes, slow);
        Self { rng, limits, queue_bytes, slow, epochs: 1, state, log: vec![], clients, seen: Seen::default() }
    }

    fn step(&mut self) {
        let client = self.rng.usize(..self.clients.len());
        match self.rng.u32(0..100) {
            0..45 => self.publish(),
            45..75 => {
                let budget = if self.rng.bool() { usize::MAX } else { self.rng.usize(1..1500) };
                self.read(client, budget);
            }
            75..85 => self.subscribe(client),
            85..88 => self.unsubscribe(client),
            88..98 => self.cut(client),
            _ => self.restart(),
        }
    }

    fn publish(&mut self) {
        for _ in 0..self.rng.usize(1..8) {
            let kind = KINDS[self.rng.usize(..KINDS.len())];
            self.log.push(kind);
            let padding = "x".repeat(self.rng.usize(0..100));
            let event = json!({"type": kind, "padding": padding}).to_string();
            self.state.append(Record::event(event.into()).expect("valid"), NOW);
        }
    }

    /// Connects if need be, with all channels that it had; and adds one.
    fn subscribe(&mut self, client: usize) {
        let Self { state, rng, clients, .. } = self;
        let client = &mut clients[client];
        let new = CHANNELS[rng.usize(..CHANNELS.len())];
        let mut frame = String::new();
        let mut wanted = vec![];
        if client.link.is_none() {
            let id = state.registry.open(Role::Centrifugo);
            let (machine, access) = (CentrifugoMachine::new(id, NOW), Access::granted(id, Grant::everything(), None));
            client.link = Some(Link { id, machine, access, asked: BTreeMap::new() });
            frame = json!({"id": 1_000_000, "connect": {}}).to_string();
            wanted.extend(client.channels.keys().copied());
        }
        if !client.channels.contains_key(new) {
            client.channels.insert(new, Channel::default());
            wanted.push(new);
        }
        let Some(link) = &mut client.link else { return };
        if link.machine.has_rest() || wanted.is_empty() && frame.is_empty() {
            client.channels.retain(|name, _| *name != new || !wanted.contains(name));
            return; // a driver reads nothing more now
        }
        rng.shuffle(&mut wanted);
        for name in wanted {
            client.commands += 1;
            let mut request = json!({"channel": name, "flag": 1});
            if let Some((epoch, offset)) = &client.channels[name].position {
                request = json!({"channel": name, "recover": true, "epoch": epoch, "offset": offset});
            }
            link.asked.insert(client.commands, name);
            frame.push('\n');
            frame.push_str(&json!({"id": client.commands, "subscribe": request}).to_string());
        }
        link.machine.on_text(&frame, state);
        assert_eq!(link.machine.next(&mut link.access, state, NOW), None, "nothing that takes time");
    }

    fn unsubscribe(&mut self, client: usize) {
        let Self { state, rng, clients, .. } = self;
        let client = &mut clients[client];
        let Some(link) = client.link.as_mut().filter(|link| !link.machine.has_rest()) else { return };
        let subscribed = client.channels.iter().filter(|(_, channel)| channel.subscribed).map(|(name, _)| *name);
        let Some(name) = rng.choice(subscribed.collect::<Vec<_>>()) else { return };
        client.channels.remove(name);
        client.commands += 1;
        let command = json!({"id": client.commands, "unsubscribe": {"channel": name}});
        link.machine.on_text(&command.to_string(), state);
        assert_eq!(link.machine.next(&mut link.access, state, NOW), None, "nothing that takes time");
    }

    /// The network is gone, and with it what was on its way.
    fn cut(&mut self, client: usize) {
        let client = &mut self.clients[client];
        if let Some(link) = client.link.take() {
            self.state.registry.close(link.id);
            client.channels.values_mut().for_each(|channel| channel.subscribed = false);
        }
    }

    fn restart(&mut self) {
        self.seen.restarts += 1;
        (0..self.clients.len()).for_each(|client| self.cut(client));
        self.epochs += 1;
        self.state = state(self.epochs, self.limits, self.queue_bytes, self.slow);
        self.log.clear();
    }

    /// The client's socket takes about `budget` bytes, and its machine goes on.
    fn read(&mut self, client: usize, budget: usize) {
        let Some(link) = &mut self.clients[client].link else { return };
        let mut items = VecDeque::new();
        self.state.take(link.id, budget, &mut items);
        self.seen.waited += u64::from(link.machine.has_rest());
        assert_eq!(link.machine.next(&mut link.access, &mut self.state, NOW), None, "nothing that takes time");
        for item in items {
            match item {
                Item::Text(frame) => {
                    for line in std::str::from_utf8(&frame).expect("UTF-8").lines() {
                        self.hear(client, &serde_json::from_str(line).expect("JSON"));
                    }
                }
                Item::Close(CloseCode::Slow) => {
                    self.seen.slow += 1;
                    return self.cut(client);
                }
                other => panic!("unexpected {other:?}"),
            }
        }
    }

    fn hear(&mut self, client: usize, said: &Value) {
        let client = &mut self.clients[client];
        let link = client.link.as_mut().expect("connected");
        let number = |value: &Value| value.as_u64().expect("a number");
        if let Some(answer) = said.get("subscribe") {
            let name = link.asked.remove(&number(&said["id"])).expect("asked for");
            // A channel that was given up meanwhile is nobody's.
            let Some(channel) = client.channels.get_mut(name) else { return };
            channel.subscribed = true;
            let (epoch, offset) = (answer["epoch"].as_str().expect("an epoch"), number(&answer["offset"]));
            assert_eq!(answer.get("was_recovering").is_some(), channel.position.is_some());
            if answer.get("recovered").is_some() {
                assert_eq!(channel.position, Some((epoch.to_owned(), offset)), "it stands where it stood");
                self.seen.recovered += 1;
                return;
            }
            if let Some((known, at)) = channel.position.replace((epoch.to_owned(), offset)) {
                let trimmed = self.state.log.first() > at + 1;
                assert!(known != epoch || trimmed, "{name} could be recovered from {at}");
                self.seen.fresh += 1;
            }
            (channel.base, channel.got, channel.left_out) = (offset, vec![], vec![]);
        } else if let Some(publication) = said["push"].get("pub") {
            let name = said["push"]["channel"].as_str().expect("a channel");
            let Some(channel) = client.channels.get_mut(name).filter(|channel| channel.subscribed) else { return };
            let offset = number(&publication["offset"]);
            let (_, at) = channel.position.as_mut().expect("it was answered");
            assert!(offset > *at, "{name}: {offset} after {at}");
            *at = offset;
            channel.got.push(offset);
            self.seen.publications += 1;
        } else if let Some(message) = said["push"].get("message") {
            let gap = &message["data"]["data"];
            let stretch = (number(&gap["from"]), number(&gap["to"]));
            for channel in client.channels.values_mut().filter(|channel| channel.subscribed) {
                channel.left_out.push(stretch);
            }
            self.seen.left_out += 1;
        } else {
            assert!(said.get("connect").is_some() || said.get("unsubscribe").is_some(), "unexpected {said}");
        }
    }

    /// Everyone reads all there is, and has what it should.
    fn check(&mut self) {
        for client in 0..self.clients.len() {
            while self.clients[client].link.as_ref().is_some_and(|link| link.machine.has_rest()) {
                self.read(client, usize::MAX);
            }
            self.read(client, usize::MAX);
            let client = &self.clients[client];
            for (name, channel) in client.channels.iter().filter(|(_, channel)| channel.subscribed) {
                let pattern = Pattern::parse(name).expect("valid");
                let wanted = (channel.base..self.log.len() as u64).filter(|at| {
                    let told = channel.left_out.iter().any(|(from, to)| (from..=to).contains(&&(at + 1)));
                    pattern.matches(self.log[*at as usize], "") && (!told || channel.got.contains(&(at + 1)))
                });
                assert_eq!(channel.got, wanted.map(|at| at + 1).collect::<Vec<_>>(), "{name}");
            }
        }
    }
}

fn run(seed: u64) -> Seen {
    let mut world = World::new(seed);
    for _ in 0..STEPS {
        world.step();
    }
    world.check();
    world.seen
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

#[test]
fn every_channel_gets_exactly_what_it_missed_or_begins_anew_for_a_reason() {
    if let Some(seed) = setting("CENTRIFUGO_MODEL_SEED") {
        eprintln!("{:?}", run(seed));
        return;
    }
    let schedules = setting("CENTRIFUGO_MODEL").unwrap_or(SCHEDULES);
    let first = fastrand::u64(..) >> 16;
    eprintln!("seeds {first}..{}", first + schedules);
    let mut all = Seen::default();
    for seed in first..first + schedules {
        let seen = std::panic::catch_unwind(|| run(seed));
        let seen = seen.unwrap_or_else(|_| panic!("CENTRIFUGO_MODEL_SEED={seed} shows it again"));
        all.publications += seen.publications;
        all.recovered += seen.recovered;
        all.fresh += seen.fresh;
        all.slow += seen.slow;
        all.left_out += seen.left_out;
        all.restarts += seen.restarts;
        all.waited += seen.waited;
    }
    eprintln!("{all:?}");
    let Seen { publications, recovered, fresh, slow, left_out, restarts, waited } = all;
    let tried = [publications, recovered, fresh, slow, left_out, restarts, waited];
    assert!(tried.iter().all(|count| *count > 0), "not everything was tried: {all:?}");
}
