//! A hub with a durable log over real sockets: what outlives it, and what a failing disk does.

mod support;

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use safe_broadcaster::ErrorKind;
use safe_broadcaster::hub::{Hub, HubConfig};
use safe_broadcaster::wire::block::BlockBuilder;
use safe_broadcaster::wire::frame::{EmitterFrame, HubFrame};
use serde_json::json;
use support::{Client, PATIENCE, block, publish};
use tokio_tungstenite::tungstenite::Message;

struct Place {
    _dir: tempfile::TempDir,
    log: PathBuf,
}

fn place() -> Place {
    let dir = tempfile::tempdir().expect("a directory");
    Place { log: dir.path().join("hub.db"), _dir: dir }
}

fn start(log: &Path, change: impl FnOnce(&mut HubConfig)) -> Hub {
    support::hub(|config| {
        config.log_path = Some(log.to_owned());
        change(config);
    })
}

/// Starts a hub on a log whose owner was just dropped, as soon as that one lets go of it.
async fn start_again(log: &Path) -> Hub {
    let trying = async {
        loop {
            let config = HubConfig { port: 0, log_path: Some(log.to_owned()), ..HubConfig::default() };
            match Hub::start(config) {
                Err(error) if error.kind() == ErrorKind::LogLocked => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                other => return other.expect("starts"),
            }
        }
    };
    tokio::time::timeout(PATIENCE, trying).await.expect("in time")
}

#[tokio::test]
async fn a_restart_keeps_epoch_offsets_and_marks() {
    let place = place();
    let hub = start(&place.log, |_| {});
    let (mut subscriber, position) = Client::subscriber(hub.port(), &["*"], None).await;
    let mut emitter = Client::emitter(hub.port()).await;
    assert_eq!(emitter.hello("engine", "1", 1).await, 0);
    emitter.emit(1..=3).await;
    emitter.emit(4..=5).await;
    emitter.acked(5).await;
    for n in 1..=2 {
        assert_eq!(subscriber.json().await["seq"], n);
    }
    let epoch = hub.stats().epoch;
    assert_eq!(position["epoch"], epoch);
    drop((subscriber, emitter, hub));

    let hub = start_again(&place.log).await;
    let stats = hub.stats();
    assert_eq!((stats.epoch.as_str(), stats.offset, stats.known_emitters), (epoch.as_str(), 5, 1));
    assert!(stats.durable && !stats.degraded);
    let (mut subscriber, position) = Client::subscriber(hub.port(), &["*"], Some((&epoch, 2))).await;
    assert_eq!((&position["recovered"], &position["replayed"]), (&json!(true), &json!(3)));
    // The emitter saw the ack of 3 only, and sends the rest again.
    let mut emitter = Client::emitter(hub.port()).await;
    assert_eq!(emitter.hello("engine", "1", 4).await, 5);
    emitter.emit(4..=5).await;
    emitter.acked(5).await;
    emitter.emit(5..=6).await;
    emitter.acked(6).await;
    for (prev, n) in [(2, 3), (3, 4), (4, 5)] {
        let want = json!({"type":"event","seq":n,"prev":prev,"replay":true,"data":{"type":"t","n":n}});
        assert_eq!(subscriber.json().await, want);
    }
    assert_eq!(subscriber.json().await, json!({"type":"event","seq":6,"prev":5,"data":{"type":"t","n":6}}));
    assert_eq!(hub.stats().counters.duplicates, 3);
}

#[tokio::test]
async fn lone_events_are_acknowledged_when_they_are_stored_asked_for_or_not() {
    let place = place();
    let hub = start(&place.log, |_| {});
    let mut emitter = Client::emitter(hub.port()).await;
    emitter.hello("engine", "1", 1).await;
    let greeted = hub.stats().log_commits;
    for seq in 1..=20 {
        emitter.emit(seq..=seq).await;
        if seq % 2 == 0 {
            emitter.say(&EmitterFrame::AckNow.encode()).await;
        }
        emitter.acked(seq).await;
        assert_eq!(
            hub.stats().log_commits,
            greeted + seq,
            "no ack before its event is stored, and none costs a transaction"
        );
    }
}

#[tokio::test]
async fn published_events_and_gaps_outlive_a_stop() {
    let place = place();
    let hub = start(&place.log, |_| {});
    assert_eq!(publish(&hub, &json!({"type":"a"})), 1);
    let mut emitter = Client::emitter(hub.port()).await;
    emitter.hello("engine", "1", 1).await;
    emitter.say(r#"{"type":"gap","from":1,"to":4,"reason":"expired"}"#).await;
    emitter.acked(4).await;
    let epoch = hub.stats().epoch;
    hub.stop().await;
    assert_eq!(hub.publish(Bytes::from_static(b"{}")).expect_err("stopped").kind(), ErrorKind::Closed);

    // A stop that is complete has freed the file.
    let hub = start(&place.log, |_| {});
    assert_eq!(publish(&hub, &json!({"type":"b"})), 3);
    let (mut subscriber, _) = Client::subscriber(hub.port(), &["*"], Some((&epoch, 0))).await;
    assert_eq!(subscriber.json().await["data"], json!({"type":"a"}));
    let gap = subscriber.json().await;
    assert_eq!((&gap["type"], &gap["data"]["to"]), (&json!("gap"), &json!(4)));
    assert_eq!(subscriber.json().await["data"], json!({"type":"b"}));
}

#[tokio::test]
async fn another_file_or_none_is_another_epoch() {
    let place = place();
    let hub = start(&place.log, |_| {});
    publish(&hub, &json!({"type":"a"}));
    let epoch = hub.stats().epoch;
    hub.stop().await;
    for suffix in ["", "-wal", "-shm"] {
        let mut name = place.log.clone().into_os_string();
        name.push(suffix);
        let removed = std::fs::remove_file(&name);
        assert!(removed.is_ok() || !suffix.is_empty());
    }
    let hub = start(&place.log, |_| {});
    let (_, position) = Client::subscriber(hub.port(), &["*"], Some((&epoch, 1))).await;
    assert_eq!((&position["recovered"], &position["reason"]), (&json!(false), &json!("epoch")));
}

#[tokio::test]
async fn entries_expire_by_their_own_age_also_after_a_restart() {
    let place = place();
    let age = |config: &mut HubConfig| config.replay_age = Some(Duration::from_millis(300));
    let hub = start(&place.log, age);
    publish(&hub, &json!({"type":"old"}));
    let epoch = hub.stats().epoch;
    hub.stop().await;
    tokio::time::sleep(Duration::from_millis(350)).await;
    let hub = start(&place.log, age);
    publish(&hub, &json!({"type":"new"}));
    let (_, position) = Client::subscriber(hub.port(), &["*"], Some((&epoch, 0))).await;
    assert_eq!(position["reason"], "truncated");
    let (_, position) = Client::subscriber(hub.port(), &["*"], Some((&epoch, 1))).await;
    assert_eq!(position["replayed"], 1);
}

#[tokio::test]
async fn a_newer_connection_gets_a_mark_that_counts_what_was_on_its_way() {
    let place = place();
    let hub = start(&place.log, |_| {});
    let mut old = Client::emitter(hub.port()).await;
    old.hello("engine", "1", 1).await;
    let mut sent = 0;
    for round in 0..20 {
        old.emit(sent + 1..=sent + 500).await; // no ack is waited for
        let mut new = Client::emitter(hub.port()).await;
        let have = new.hello("engine", "1", 1).await;
        assert!(have == sent || have == sent + 500, "round {round}: {have} after {sent}");
        assert_eq!(old.close_code().await, 3013);
        new.emit(1..=sent + 500).await;
        new.acked(sent + 500).await;
        (old, sent) = (new, sent + 500);
    }
    assert_eq!((hub.stats().offset, hub.stats().counters.events), (sent, sent));
}

#[tokio::test]
async fn a_flood_of_many_emitters_stays_in_order_and_within_its_bounds() {
    const EACH: u64 = 20_000;
    let place = place();
    let hub = start(&place.log, |config| config.replay_events = 5000);
    let (mut subscriber, _) = Client::subscriber(hub.port(), &["*"], None).await;
    let reading = tokio::spawn(async move {
        for n in 1..=4 * EACH {
            let frame = subscriber.json().await;
            assert_eq!((&frame["seq"], &frame["prev"]), (&json!(n), &json!(n - 1)));
        }
    });
    let port = hub.port();
    let emitters = (0..4).map(|name| {
        tokio::spawn(async move {
            let mut emitter = Client::emitter(port).await;
            emitter.hello(&format!("engine-{name}"), "1", 1).await;
            for first in (1..=EACH).step_by(500) {
                emitter.emit(first..=first + 499).await;
                emitter.acked(first + 499).await;
            }
        })
    });
    for emitter in emitters.collect::<Vec<_>>() {
        emitter.await.expect("all acknowledged");
    }
    reading.await.expect("all in order");
    let stats = hub.stats();
    assert_eq!((stats.offset, stats.log_events, stats.slow), (4 * EACH, 5000, 0));
    hub.stop().await;
    let size = std::fs::metadata(&place.log).expect("there").len();
    assert!(size < 4 << 20, "{size} bytes");
}

#[tokio::test]
async fn garbage_is_answered_after_what_came_before_it() {
    let place = place();
    let hub = start(&place.log, |_| {});
    let mut emitter = Client::emitter(hub.port()).await;
    emitter.hello("engine", "1", 1).await;
    emitter.emit(1..=2).await;
    emitter.emit(9..=9).await;
    let mut heard = Vec::new();
    let code = loop {
        match emitter.message().await {
            Message::Text(text) => heard.push(text.to_string()),
            Message::Close(frame) => break u16::from(frame.expect("with a code").code),
            other => panic!("{other:?}"),
        }
    };
    assert_eq!((code, hub.stats().offset), (3501, 2));
    assert!(heard.last().is_some_and(|error| error.contains("3 to 8 are missing")), "{heard:?}");
    assert!(heard[0].contains(r#""upto":2"#), "{heard:?}");
    let mut stranger = Client::emitter(hub.port()).await;
    stranger.block(&block(1..=1)).await;
    assert_eq!(stranger.close_code().await, 3501);
}

#[tokio::test]
async fn a_log_that_cannot_be_used_says_why() {
    let place = place();
    let _owner = start(&place.log, |_| {});
    let refused = |log: &Path| {
        let config = HubConfig { port: 0, log_path: Some(log.to_owned()), ..HubConfig::default() };
        Hub::start(config).err().expect("refused")
    };
    let error = refused(&place.log);
    assert_eq!(error.kind(), ErrorKind::LogLocked);
    assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
    assert_eq!(refused(&place.log.join("below")).kind(), ErrorKind::LogCorrupt);
}

/// Events per second that one emitter brings into a hub; blocks of 150 events of 400 bytes.
/// `cargo test --release --test hub_history -- --ignored --nocapture`
#[tokio::test]
#[ignore = "a measurement"]
async fn rate_with_and_without_a_log() {
    const BLOCK: u64 = 150;
    const BLOCKS: u64 = 10_000;
    const WINDOW: u64 = 30_000;
    let event = format!(r#"{{"type":"t","x":"{}"}}"#, "x".repeat(381));
    assert_eq!(event.len(), 400);
    for (what, durable, listens) in [
        ("memory", false, false),
        ("log_path", true, false),
        ("memory, one subscriber", false, true),
        ("log_path, one subscriber", true, true),
    ] {
        let place = place();
        let hub = support::hub(|config| {
            config.log_path = durable.then(|| place.log.clone());
            config.session_queue_bytes = 64 << 20;
        });
        let reading = listens.then(|| {
            let port = hub.port();
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("built");
                runtime.block_on(async {
                    let (mut subscriber, _) = Client::subscriber(port, &["*"], None).await;
                    for _ in 0..BLOCKS * BLOCK {
                        subscriber.message().await;
                    }
                });
            })
        });
        while listens && hub.stats().subscribers == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let mut emitter = Client::emitter(hub.port()).await;
        emitter.hello("engine", "1", 1).await;
        let begin = std::time::Instant::now();
        let mut acked = 0;
        for first in (0..BLOCKS).map(|n| n * BLOCK + 1) {
            let mut builder = BlockBuilder::new(first, bytes::BytesMut::with_capacity(64 << 10));
            for _ in 0..BLOCK {
                builder.push(event.as_bytes());
            }
            emitter.block(&builder.seal().expect("not empty")).await;
            while first + BLOCK - acked > WINDOW {
                let HubFrame::Ack { upto } = emitter.hub_frame().await else { panic!("no ack") };
                acked = upto;
            }
        }
        emitter.acked(BLOCKS * BLOCK).await;
        let rate = (BLOCKS * BLOCK) as f64 / begin.elapsed().as_secs_f64();
        if let Some(reading) = reading {
            reading.join().expect("everything read");
        }
        let commits = hub.stats().log_commits;
        #[expect(clippy::print_stderr, reason = "the measurement")]
        {
            eprintln!("{what}: {rate:.0} events/s, {commits} transactions");
        }
        hub.stop().await;
    }
}
