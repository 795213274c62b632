//! Hubs whose bus is slow, full, away at the start, or worse: what is kept, what is told, and that it heals.

mod support;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use safe_broadcaster::ErrorKind;
use safe_broadcaster::hub::bridge::memory::MemoryBus;
use safe_broadcaster::hub::bridge::{BridgeConfig, BridgeStats, BusConfig, BusDown};
use safe_broadcaster::hub::{Abort, Hub, HubConfig, Published};
use serde_json::{Value, json};
use support::{Client, PATIENCE};

const INTERVAL: Duration = Duration::from_millis(300);
const TIMEOUT: Duration = Duration::from_secs(1);

fn quick(bus: &MemoryBus) -> BridgeConfig {
    BridgeConfig {
        probe_interval: INTERVAL,
        bus_timeout: TIMEOUT,
        breaker_cooldown: INTERVAL,
        ..BridgeConfig::new(BusConfig::Memory(bus.clone()))
    }
}

fn local(bus: &MemoryBus) -> BridgeConfig {
    BridgeConfig { bus_down: BusDown::Local, ..quick(bus) }
}

fn config(bridge: BridgeConfig) -> HubConfig {
    HubConfig { port: 0, bridge: Some(bridge), ..HubConfig::default() }
}

fn hub(bridge: BridgeConfig) -> Hub {
    Hub::start(config(bridge)).expect("starts")
}

fn bridge(hub: &Hub) -> BridgeStats {
    hub.stats().bridge.expect("a bridge")
}

fn event(n: u64) -> Bytes {
    json!({"type": "t", "n": n}).to_string().into()
}

/// Publishes in a thread of its own, as whoever waits for it does.
fn publish(hub: &Hub, n: u64) -> tokio::sync::oneshot::Receiver<safe_broadcaster::Result<Published>> {
    let (reply, published) = tokio::sync::oneshot::channel();
    hub.publish_then(event(n), move |result| drop(reply.send(result)));
    published
}

fn numbers(hub: &Hub) -> Vec<u64> {
    let n = |frame: &Bytes| serde_json::from_slice::<Value>(frame).expect("json")["data"]["n"].as_u64().expect("n");
    hub.frames_since(0, 1000, false).iter().map(n).collect()
}

async fn until(what: &str, condition: impl Fn() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.expect(what);
}

#[tokio::test]
async fn an_answer_that_comes_too_late_is_not_taken_for_another_batchs() {
    let bus = MemoryBus::new();
    let (a, b) = (hub(quick(&bus)), hub(quick(&bus)));
    bus.hold_answers(true);
    let error = publish(&a, 1).await.expect("answered").expect_err("nobody answers");
    assert!(error.to_string().contains("is not known"), "{error}");
    let second = publish(&a, 2);
    until("it is under way", || bridge(&b).up && numbers(&b).len() == 2).await;
    bus.hold_answers(false);
    assert_eq!(second.await.expect("answered").expect("published").offset, 2);
    assert_eq!(publish(&a, 3).await.expect("answered").expect("published").offset, 3);
    until("both have it", || numbers(&a).len() == 3 && numbers(&b).len() == 3).await;
    assert_eq!((numbers(&a), numbers(&b)), (vec![1, 2, 3], vec![1, 2, 3]));
    assert_eq!(bridge(&a).restarts, 0);
}

#[tokio::test]
async fn a_busy_hub_comes_back_from_being_alone() {
    let bus = MemoryBus::new();
    let (a, b) = (hub(local(&bus)), hub(quick(&bus)));
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    a.publish(event(0)).unwrap_or(Published { offset: 0, sessions: 0 });
                }
            });
        }
        let wait = |what: &str, condition: &dyn Fn() -> bool| {
            let began = Instant::now();
            while !condition() {
                assert!(began.elapsed() < PATIENCE, "{what}");
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        for _ in 0..5 {
            bus.stop();
            wait("it goes on alone", &|| bridge(&a).local);
            bus.start();
            wait("it is up again", &|| bridge(&a).up && bridge(&b).up);
            let probes = bridge(&a).probes;
            wait("it has proven itself", &|| bridge(&a).probes > probes + 2);
            let (alone, epochs) = (bridge(&a).local, (a.stats().epoch, b.stats().epoch));
            if alone || epochs.0 != epochs.1 {
                over.store(true, Ordering::Relaxed);
            }
            assert!(!alone, "with a link that works");
            assert_eq!(epochs.0, epochs.1);
        }
        over.store(true, Ordering::Relaxed);
    });
}

#[tokio::test]
async fn a_full_bus_is_told_once_keeps_nothing_back_and_heals_by_itself() {
    let bus = MemoryBus::new();
    let (a, b) = (hub(quick(&bus)), hub(quick(&bus)));
    let (mut subscriber, _) = Client::subscriber(b.port(), &["*"], None).await;
    let mut emitter = Client::emitter(a.port()).await;
    emitter.hello("engine", "1", 1).await;
    emitter.emit(1..=3).await;
    emitter.acked(3).await;
    bus.fill_up(true);
    emitter.emit(4..=5).await;
    assert_eq!(emitter.close_code().await, 3014, "it keeps them");
    let error = publish(&a, 9).await.expect("answered").expect_err("there is no room");
    assert_eq!(error.kind(), ErrorKind::BusDown);
    assert!(error.to_string().contains("was not published: ") && error.to_string().contains("full"), "{error}");
    until("both know", || bridge(&a).degraded && bridge(&b).degraded).await;
    assert!(bridge(&a).up && bridge(&a).losses + bridge(&a).failures == 0, "it can be heard all the time");
    bus.fill_up(false);
    until("it heals", || !bridge(&a).degraded && !bridge(&b).degraded).await;
    let mut emitter = Client::emitter(a.port()).await;
    assert_eq!(emitter.hello("engine", "1", 4).await, 3);
    emitter.emit(4..=5).await;
    emitter.acked(5).await;
    let mut heard = Vec::new();
    for _ in 0..7 {
        let frame = subscriber.json().await;
        heard.push(if frame["type"] == "event" { frame["data"]["n"].clone() } else { frame["data"]["status"].clone() });
    }
    assert_eq!(json!(heard), json!([1, 2, 3, "degraded", "healthy", 4, 5]));
    assert_eq!(bridge(&a).error, None);
}

#[tokio::test]
async fn a_panic_while_it_connects_is_an_attempt_in_vain() {
    let bus = MemoryBus::new();
    let a = hub(quick(&bus));
    bus.explode(2);
    bus.sever();
    until("it is back", || bridge(&a).failures >= 2 && bridge(&a).up).await;
    assert_eq!(publish(&a, 1).await.expect("answered").expect("published").offset, 1);
}

#[tokio::test]
async fn what_is_in_the_stream_is_told_although_what_lies_before_it_has_not_come() {
    let bus = MemoryBus::new();
    let (a, b) = (hub(quick(&bus)), hub(quick(&bus)));
    bus.hold_reads(true);
    bus.deafen();
    publish(&b, 1).await.expect("answered").expect("published");
    assert_eq!(publish(&a, 2).await.expect("answered").expect("it is there").offset, 2);
    // And at a stop, without waiting for it.
    let third = publish(&a, 3);
    until("it is there", || bridge(&a).batches == 2).await;
    a.stop().await;
    assert_eq!(third.await.expect("answered").expect("it is there").offset, 3);
    bus.hold_reads(false);
    until("b has all", || numbers(&b) == [1, 2, 3]).await;
}

#[tokio::test]
async fn a_start_waits_for_a_bus_that_comes_back_in_time() {
    let bus = MemoryBus::new();
    bus.stop();
    let starting = config(BridgeConfig { bus_timeout: PATIENCE, ..quick(&bus) });
    let starting = tokio::task::spawn_blocking(move || Hub::start(starting));
    tokio::time::sleep(INTERVAL).await; // whenever it comes back is right
    bus.start();
    let hub = starting.await.expect("no panic").expect("starts");
    assert_eq!(publish(&hub, 1).await.expect("answered").expect("published").offset, 1);
}

#[tokio::test]
async fn a_start_that_is_aborted_ends_at_once() {
    let bus = MemoryBus::new();
    bus.stop();
    let (abort, config) = (Abort::default(), config(BridgeConfig { bus_timeout: 10 * PATIENCE, ..quick(&bus) }));
    let ordered = abort.clone();
    let starting = tokio::task::spawn_blocking(move || Hub::start_unless(config, &ordered).err().map(|e| e.kind()));
    abort.order();
    assert_eq!(starting.await.expect("no panic"), Some(ErrorKind::Closed));
}

#[tokio::test]
async fn a_hub_that_may_be_alone_starts_without_its_bus_and_says_so() {
    let bus = MemoryBus::new();
    bus.stop();
    let a = hub(local(&bus));
    let (mut subscriber, answer) = Client::subscriber(a.port(), &["*"], None).await;
    assert_eq!(subscriber.json().await["data"]["status"], "degraded");
    assert_eq!(publish(&a, 1).await.expect("answered").expect("published").offset, 1);
    assert_eq!(subscriber.json().await["data"]["n"], 1);
    assert!(a.stats().degraded && bridge(&a).local && !bridge(&a).up);
    bus.start();
    assert_eq!(subscriber.close_code().await, 3015, "its epoch is over");
    until("it is one of many", || bridge(&a).up && !bridge(&a).local).await;
    let b = hub(quick(&bus));
    assert_eq!(a.stats().epoch, b.stats().epoch);
    assert_ne!(answer["epoch"], a.stats().epoch);
    assert_eq!(publish(&b, 2).await.expect("answered").expect("published").offset, 1);
}

#[tokio::test]
async fn a_hub_that_stops_leaves_the_intake_to_another_at_once() {
    let bus = MemoryBus::new();
    let rare = || BridgeConfig { probe_interval: 10 * PATIENCE, ..quick(&bus) };
    let mut hubs = [hub(rare()), hub(rare())];
    until("one has it", || hubs.iter().any(|hub| bridge(hub).intake)).await;
    until("both have looked", || hubs.iter().all(|hub| bridge(hub).probes == 1)).await;
    hubs.sort_by_key(|hub| bridge(hub).intake);
    assert!(!bridge(&hubs[0]).intake);
    hubs[1].stop().await;
    until("the other has it", || bridge(&hubs[0]).intake).await;
    bus.publish_plain(r#"{"type":"t","n":1}"#);
    until("it takes in", || numbers(&hubs[0]) == [1]).await;
}
