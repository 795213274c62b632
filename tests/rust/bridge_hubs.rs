//! Hubs that share a bus, over real sockets: what their clients see. Each promise on the bus within the process and on a
//! real Redis.

mod support;

#[path = "support/redis.rs"]
#[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
mod redis_server;

use std::time::Duration;

use bytes::Bytes;
use redis_server::RedisServer;
use safe_broadcaster::ErrorKind;
use safe_broadcaster::hub::bridge::memory::MemoryBus;
use safe_broadcaster::hub::bridge::redis::RedisConfig;
use safe_broadcaster::hub::bridge::{BridgeConfig, BusConfig, BusDown};
use safe_broadcaster::hub::{Hub, HubConfig, Published};
use safe_broadcaster::secret::Secret;
use serde_json::{Value, json};
use support::{Client, PATIENCE};
use tokio::net::TcpStream;

type Peer = Client<TcpStream>;

const INTERVAL: Duration = Duration::from_millis(300);
const TIMEOUT: Duration = Duration::from_millis(1500);

fn hub(bus: &BusConfig) -> Hub {
    support::hub(|config| config.bridge = Some(quick(bus)))
}

fn quick(bus: &BusConfig) -> BridgeConfig {
    BridgeConfig {
        probe_interval: INTERVAL,
        bus_timeout: TIMEOUT,
        breaker_cooldown: Duration::from_millis(300),
        ..BridgeConfig::new(bus.clone())
    }
}

fn redis(server: &RedisServer) -> BusConfig {
    BusConfig::Redis(RedisConfig {
        url: Secret::new(server.url()),
        channel: "hubs".to_owned(),
        ca: None,
        keep: 10_000,
        keep_bytes: 0,
        keep_age: None,
        probe_interval: INTERVAL,
    })
}

fn publish(hub: &Hub, event: &Value) -> Published {
    hub.publish(Bytes::from(event.to_string())).expect("published")
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.expect(what);
}

/// Reads the events of these `n`, which come once and in order; what is told of the bus in between is skipped.
async fn events(client: &mut Peer, seqs: std::ops::RangeInclusive<u64>) {
    for n in seqs {
        let mut frame = client.json().await;
        while frame["type"] == "service_status" {
            frame = client.json().await;
        }
        assert_eq!((&frame["type"], &frame["data"]["n"]), (&json!("event"), &json!(n)), "{frame}");
    }
}

async fn what_one_hub_is_given_all_bring_at_the_same_places(bus: BusConfig) {
    let (a, b) = (hub(&bus), hub(&bus));
    let (mut at_a, position) = Client::subscriber(a.port(), &["*"], None).await;
    let (mut at_b, _) = Client::subscriber(b.port(), &["*"], None).await;
    let mut emitter = Client::emitter(a.port()).await;
    assert_eq!(emitter.hello("engine", "1", 1).await, 0);
    emitter.emit(1..=300).await;
    emitter.acked(300).await;
    let published = publish(&b, &json!({"type": "t", "n": 301}));
    assert_eq!((published.offset, published.sessions), (301, 2), "two hubs hear it");
    for client in [&mut at_a, &mut at_b] {
        events(client, 1..=301).await;
    }
    // A subscriber comes back at another hub, and at one that was not there yet.
    let epoch = position["epoch"].as_str().expect("a text");
    let late = hub(&bus);
    for hub in [&b, &late] {
        let (mut back, answer) = Client::subscriber(hub.port(), &["*"], Some((epoch, 250))).await;
        assert_eq!((&answer["recovered"], &answer["replayed"]), (&json!(true), &json!(51)));
        events(&mut back, 251..=301).await;
    }
}

async fn an_emitter_that_moves_doubles_nothing(bus: BusConfig) {
    let (a, b) = (hub(&bus), hub(&bus));
    let (mut subscriber, _) = Client::subscriber(b.port(), &["*"], None).await;
    let mut first = Client::emitter(a.port()).await;
    first.hello("engine", "1", 1).await;
    first.emit(1..=100).await;
    first.acked(100).await;
    let mut second = Client::emitter(b.port()).await;
    assert_eq!(second.hello("engine", "1", 51).await, 100);
    second.emit(51..=120).await;
    second.acked(120).await;
    // The connection that it left behind is not believed any more.
    first.emit(101..=110).await;
    assert_eq!(first.close_code().await, 3014);
    let mut third = Client::emitter(b.port()).await;
    assert_eq!(third.hello("engine", "1", 121).await, 120);
    assert_eq!(second.close_code().await, 3013);
    third.emit(121..=121).await;
    events(&mut subscriber, 1..=121).await;
}

async fn large_events_reach_all_hubs_and_small_ones_keep_their_place(bus: BusConfig) {
    let (a, b) = (hub(&bus), hub(&bus));
    let big = "x".repeat(700 << 10);
    for n in 1..=60 {
        let pad = if n % 2 == 0 { &big[..] } else { "" };
        publish(if n % 3 == 0 { &b } else { &a }, &json!({"type": "t", "n": n, "pad": pad}));
    }
    let epoch = a.stats().epoch;
    for hub in [&a, &b] {
        until("it has everything", || hub.stats().offset == 60).await;
        let newest = hub.frames_since(50, 100, false);
        let numbers: Vec<u64> = newest
            .iter()
            .map(|frame| serde_json::from_slice::<Value>(frame).expect("json")["data"]["n"].as_u64().expect("a number"))
            .collect();
        assert_eq!(numbers, (51..=60).collect::<Vec<_>>());
        assert_eq!(hub.stats().epoch, epoch);
    }
}

async fn many_publishers_at_all_hubs_make_one_order(bus: BusConfig) {
    let hubs = [hub(&bus), hub(&bus), hub(&bus)];
    let mut subscribers = Vec::new();
    for hub in &hubs {
        subscribers.push(Client::subscriber(hub.port(), &["*"], None).await.0);
    }
    std::thread::scope(|scope| {
        for (h, hub) in hubs.iter().enumerate() {
            scope.spawn(move || {
                for n in 0..200 {
                    publish(hub, &json!({"type": "t", "from": h, "n": n}));
                }
            });
        }
    });
    let mut orders: Vec<Vec<(u64, u64)>> = Vec::new();
    for subscriber in &mut subscribers {
        let mut order = Vec::new();
        for seq in 1..=600 {
            let frame = subscriber.json().await;
            assert_eq!((&frame["seq"], &frame["prev"]), (&json!(seq), &json!(seq - 1)));
            let number = |name: &str| frame["data"][name].as_u64().expect("a number");
            order.push((number("from"), number("n")));
        }
        orders.push(order);
    }
    assert!(orders.iter().all(|order| *order == orders[0]));
    for from in 0..3 {
        let own: Vec<u64> = orders[0].iter().filter(|(f, _)| *f == from).map(|(_, n)| *n).collect();
        assert_eq!(own, (0..200).collect::<Vec<_>>());
    }
}

macro_rules! on_both {
    ($($promise:ident),* $(,)?) => {
        mod memory { $(#[tokio::test] async fn $promise() {
            super::$promise(super::BusConfig::Memory(super::MemoryBus::new())).await;
        })* }
        mod redis { $(#[tokio::test] async fn $promise() {
            let Some(server) = super::RedisServer::start() else { return };
            super::$promise(super::redis(&server)).await;
        })* }
    };
}

on_both!(
    what_one_hub_is_given_all_bring_at_the_same_places,
    an_emitter_that_moves_doubles_nothing,
    large_events_reach_all_hubs_and_small_ones_keep_their_place,
    many_publishers_at_all_hubs_make_one_order,
);

#[tokio::test]
async fn a_lost_answer_doubles_nothing() {
    let bus = MemoryBus::new();
    let config = BusConfig::Memory(bus.clone());
    let (a, b) = (hub(&config), hub(&config));
    let (mut subscriber, _) = Client::subscriber(b.port(), &["*"], None).await;
    let mut emitter = Client::emitter(a.port()).await;
    emitter.hello("engine", "1", 1).await;
    for round in 0..5 {
        bus.lose_answers(1);
        emitter.emit(round * 10 + 1..=round * 10 + 10).await;
        emitter.acked(round * 10 + 10).await;
        bus.lose_answers(1);
        assert_eq!(publish(&a, &json!({"type": "other", "n": 0})).offset, (round + 1) * 11);
    }
    for round in 0..5 {
        events(&mut subscriber, round * 10 + 1..=round * 10 + 10).await;
        events(&mut subscriber, 0..=0).await;
    }
    let bridge = a.stats().bridge.expect("a bridge");
    assert_eq!(bridge.losses + bridge.failures, 10);
}

#[tokio::test]
async fn a_deaf_hub_says_so_and_gets_what_it_missed() {
    let bus = MemoryBus::new();
    let config = BusConfig::Memory(bus.clone());
    let (a, b) = (hub(&config), hub(&config));
    let (mut subscriber, _) = Client::subscriber(b.port(), &["*"], None).await;
    bus.deafen();
    publish(&a, &json!({"type": "t", "n": 1}));
    let told = subscriber.json().await;
    assert_eq!((&told["type"], &told["data"]["status"]), (&json!("service_status"), &json!("degraded")), "{told}");
    assert_eq!(told["data"]["since"], 0);
    let mut rest = [subscriber.json().await, subscriber.json().await];
    rest.sort_by_key(|frame| frame["type"] == "service_status");
    assert_eq!((&rest[0]["data"]["n"], &rest[1]["data"]["status"]), (&json!(1), &json!("healthy")));
    assert!(!b.stats().degraded && b.stats().bridge.expect("a bridge").deaf == 1);
}

#[tokio::test]
async fn while_the_bus_is_away_emitters_keep_their_events_and_publishers_are_told() {
    let bus = MemoryBus::new();
    let config = BusConfig::Memory(bus.clone());
    let (a, b) = (hub(&config), hub(&config));
    let (mut subscriber, position) = Client::subscriber(b.port(), &["*"], None).await;
    let mut emitter = Client::emitter(a.port()).await;
    emitter.hello("engine", "1", 1).await;
    bus.stop();
    until("they notice", || [&a, &b].iter().all(|hub| !hub.stats().bridge.expect("a bridge").up)).await;
    emitter.emit(1..=5).await;
    let error = a.publish(Bytes::from_static(b"{}")).expect_err("nobody takes it");
    assert_eq!(error.kind(), ErrorKind::BusDown);
    assert!(error.to_string().contains("was not published"), "{error}");
    assert_eq!(emitter.close_code().await, 3014);
    assert!(a.stats().degraded && !a.stats().bridge.expect("a bridge").up);
    assert_eq!(subscriber.json().await["data"]["status"], "degraded");
    let (status, why) = support::ask(a.port(), "GET /readyz HTTP/1.1", "").await;
    assert_eq!((status, why.trim()), (503, "the bus between the hubs is away"));
    assert_eq!(support::ask(a.port(), "GET /healthz HTTP/1.1", "").await.0, 200, "a restart would not help");
    let (_, metrics) = support::ask(a.port(), "GET /metrics HTTP/1.1", "").await;
    assert!(metrics.contains("safe_broadcaster_hub_bridge_up 0\n"), "{metrics}");
    bus.start();
    until("it is back", || a.stats().bridge.expect("a bridge").up && b.stats().bridge.expect("a bridge").up).await;
    while subscriber.json().await["data"]["status"] != "healthy" {} // told again when the breaker opened
    assert_eq!(support::ask(a.port(), "GET /readyz HTTP/1.1", "").await.0, 200);
    let mut emitter = Client::emitter(a.port()).await;
    assert_eq!(emitter.hello("engine", "1", 1).await, 0, "nothing of it was taken");
    emitter.emit(1..=5).await;
    emitter.acked(5).await;
    events(&mut subscriber, 1..=5).await;
    assert_eq!(position["epoch"], b.stats().epoch, "the same stream");
}

#[tokio::test]
async fn a_short_absence_is_no_news() {
    let bus = MemoryBus::new();
    let config = BusConfig::Memory(bus.clone());
    let a = hub(&config);
    let (mut subscriber, _) = Client::subscriber(a.port(), &["*"], None).await;
    let mut emitter = Client::emitter(a.port()).await;
    emitter.hello("engine", "1", 1).await;
    let bridge = || a.stats().bridge.expect("a bridge");
    for n in 1..=3 {
        let probes = bridge().probes;
        until("the link has proven itself", || bridge().probes >= probes + 2).await;
        bus.sever();
        emitter.emit(n..=n).await;
        emitter.acked(n).await;
        assert_eq!(subscriber.json().await["data"]["n"], n, "and no word of trouble");
    }
    assert_eq!((bridge().losses, bridge().failures), (3, 0));
}

#[tokio::test]
async fn a_bus_that_forgot_everything_is_a_new_epoch_and_who_had_a_position_is_told() {
    let bus = MemoryBus::new();
    let config = BusConfig::Memory(bus.clone());
    let (a, b) = (hub(&config), hub(&config));
    let (mut subscriber, position) = Client::subscriber(b.port(), &["*"], None).await;
    let mut emitter = Client::emitter(a.port()).await;
    emitter.hello("engine", "1", 1).await;
    emitter.emit(1..=3).await;
    emitter.acked(3).await;
    events(&mut subscriber, 1..=3).await;
    bus.flush();
    assert_eq!(subscriber.close_code().await, 3015, "found out by a probe");
    let epoch = position["epoch"].as_str().expect("a text");
    let (mut back, answer) = Client::subscriber(b.port(), &["*"], Some((epoch, 3))).await;
    assert_eq!((&answer["recovered"], &answer["reason"]), (&json!(false), &json!("epoch")));
    // The emitter's mark is gone with the rest: it says hello again, and nothing is lost or doubled.
    emitter.emit(4..=4).await;
    assert_eq!(emitter.close_code().await, 3014);
    let mut emitter = Client::emitter(a.port()).await;
    assert_eq!(emitter.hello("engine", "1", 4).await, 3);
    emitter.emit(4..=6).await;
    emitter.acked(6).await;
    events(&mut back, 4..=6).await;
    until("both are in it", || a.stats().epoch == b.stats().epoch).await;
}

#[tokio::test]
async fn what_a_stream_lost_before_a_hub_had_it_is_told() {
    let bus = MemoryBus::new();
    let config = BusConfig::Memory(bus.clone());
    let (a, b) = (hub(&config), hub(&config));
    let (mut subscriber, position) = Client::subscriber(b.port(), &["*"], None).await;
    bus.deafen();
    for n in 1..=4 {
        publish(&a, &json!({"type": "t", "n": n}));
    }
    bus.trim(3);
    assert_eq!(subscriber.close_code().await, 3015);
    let epoch = position["epoch"].as_str().expect("a text");
    let (_, answer) = Client::subscriber(b.port(), &["*"], Some((epoch, 0))).await;
    assert_eq!((&answer["recovered"], &answer["reason"]), (&json!(false), &json!("truncated")));
    let (mut back, answer) = Client::subscriber(b.port(), &["*"], Some((epoch, 2))).await;
    assert_eq!(answer["recovered"], json!(true));
    events(&mut back, 3..=4).await;
}

#[tokio::test]
async fn what_others_publish_comes_in_once_whoever_hears_it() {
    let bus = MemoryBus::new();
    let config = BusConfig::Memory(bus.clone());
    let hubs = [hub(&config), hub(&config), hub(&config)];
    let intake = || hubs.iter().filter(|hub| hub.stats().bridge.expect("a bridge").intake).count();
    until("one takes in", || intake() == 1).await;
    let (mut subscriber, _) = Client::subscriber(hubs[2].port(), &["*"], None).await;
    bus.publish_plain(r#"{"type":"t","n":1}"#);
    bus.publish_plain("no event");
    bus.publish_plain(r#"{"type":"t","n":2}"#);
    events(&mut subscriber, 1..=2).await;
    let sum = |of: fn(&safe_broadcaster::hub::bridge::BridgeStats) -> u64| {
        hubs.iter().map(|hub| of(&hub.stats().bridge.expect("a bridge"))).sum::<u64>()
    };
    assert_eq!((sum(|bridge| bridge.plain), sum(|bridge| bridge.plain_refused)), (2, 1));
}

#[tokio::test]
async fn a_hub_whose_bus_is_away_does_not_start_and_says_why() {
    let bus = MemoryBus::new();
    bus.stop();
    let config = HubConfig { port: 0, bridge: Some(quick(&BusConfig::Memory(bus.clone()))), ..HubConfig::default() };
    assert_eq!(Hub::start(config.clone()).err().expect("no bus").kind(), ErrorKind::BusDown);
    bus.start();
    let hub = Hub::start(config).expect("starts");
    hub.stop().await;
    until("it has left", || bus.hearers() == 0 || bus.hearers() == 1).await;
    assert_eq!(hub.publish(Bytes::from_static(b"{}")).expect_err("stopped").kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn events_may_go_on_without_the_bus_under_an_epoch_of_their_own() {
    let bus = MemoryBus::new();
    let config = BusConfig::Memory(bus.clone());
    let b = hub(&config);
    let a = support::hub(|hub| {
        hub.bridge = Some(BridgeConfig { bus_down: BusDown::Local, ..quick(&config) });
    });
    let epoch = a.stats().epoch;
    assert_eq!(publish(&a, &json!({"type": "t", "n": 1})).offset, 1);
    let (mut stays, _) = Client::subscriber(a.port(), &["*"], Some((&epoch, 0))).await;
    events(&mut stays, 1..=1).await;
    let mut emitter = Client::emitter(a.port()).await;
    emitter.hello("engine", "1", 1).await;
    bus.stop();
    assert_eq!(stays.json().await["data"]["status"], "degraded");
    assert_eq!(publish(&a, &json!({"type": "t", "n": 2})).offset, 1, "after a while, and in another epoch");
    assert_eq!(stays.close_code().await, 3015);
    let local = a.stats().epoch;
    assert!(local != epoch && a.stats().bridge.expect("a bridge").local);
    let (mut stays, answer) = Client::subscriber(a.port(), &["*"], Some((&epoch, 1))).await;
    assert_eq!(
        (&answer["recovered"], &answer["reason"], &answer["epoch"]),
        (&json!(false), &json!("epoch"), &json!(local))
    );
    assert_eq!(stays.json().await["data"]["status"], "degraded");
    emitter.emit(1..=1).await;
    assert_eq!(emitter.close_code().await, 3014, "it says hello once more");
    let mut emitter = Client::emitter(a.port()).await;
    assert_eq!(emitter.hello("engine", "1", 1).await, 0);
    emitter.emit(1..=3).await;
    emitter.acked(3).await;
    events(&mut stays, 1..=3).await;

    bus.start();
    // The stream is as it was: whoever stands in it recovers, whoever stands in the local epoch is told.
    let frame = stays.close_code().await;
    assert_eq!(frame, 3015);
    until("they share it again", || a.stats().epoch == epoch && a.stats().offset == 1).await;
    let (_, answer) = Client::subscriber(a.port(), &["*"], Some((&local, 4))).await;
    assert_eq!((&answer["recovered"], &answer["reason"]), (&json!(false), &json!("epoch")));
    let (_, answer) = Client::subscriber(a.port(), &["*"], Some((&epoch, 1))).await;
    assert_eq!(answer["recovered"], json!(true));
    until("both work", || [&a, &b].iter().all(|hub| hub.stats().bridge.expect("a bridge").up)).await;
    let (mut at_b, _) = Client::subscriber(b.port(), &["*"], None).await;
    emitter.emit(4..=4).await;
    assert_eq!(emitter.close_code().await, 3014);
    let mut emitter = Client::emitter(a.port()).await;
    assert_eq!(emitter.hello("engine", "1", 4).await, 3, "what was acknowledged locally does not come again");
    emitter.emit(4..=4).await;
    emitter.acked(4).await;
    events(&mut at_b, 4..=4).await;
}
