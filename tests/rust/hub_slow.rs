//! Subscribers that read too slowly, and those that do not and must not be taken for slow, over real sockets.

mod support;

use safe_broadcaster::hub::{Hub, HubStats};
use safe_broadcaster::wire::subscriber::Slow;
use serde_json::{Value, json};
use support::{Client, hub, publish, until};
use tokio_tungstenite::tungstenite::Message;

#[tokio::test]
async fn a_slow_subscriber_is_closed_and_the_others_go_on() {
    let hub = hub(|config| config.session_queue_bytes = 64 << 10);
    let (mut slow, _) = Client::subscriber(hub.port(), &["*"], None).await;
    let (mut quick, _) = Client::subscriber(hub.port(), &["*"], None).await;
    let event = json!({"type":"t","text":"x".repeat(10_000)});
    let mut sent = 0;
    while hub.stats().slow == 0 {
        sent += 1;
        publish(&hub, &event);
        assert_eq!(quick.json().await["seq"], sent);
        assert!(sent < 10_000, "the sockets took 100 MB");
    }
    let mut seen = 0;
    let code = loop {
        match slow.message().await {
            Message::Text(text) => {
                let frame: Value = serde_json::from_str(&text).expect("json");
                assert_eq!(frame["prev"], seen, "nothing is skipped before the close");
                seen = frame["seq"].as_u64().expect("seq");
            }
            Message::Close(frame) => break frame.expect("with a code").code,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(u16::from(code), 3008);
    assert!(seen < sent);
    publish(&hub, &event);
    assert_eq!(quick.json().await["seq"], sent + 1);
}

/// Publishes until something was left out for a session that does not read, and then one more; another session gets all
/// of it. Returns how many were published.
async fn dawdle(hub: &Hub, quick: &mut Client<tokio::net::TcpStream>, left_out: impl Fn(&HubStats) -> u64) -> u64 {
    let text = "x".repeat(10_000);
    let mut sent = 0;
    while left_out(&hub.stats()) < 100 {
        sent += 1;
        publish(hub, &json!({"type":"t","key":(sent % 7).to_string(),"text":text}));
        assert_eq!(quick.json().await["seq"], sent);
        assert!(sent < 10_000, "the sockets took 100 MB");
    }
    publish(hub, &json!({"type":"last"}));
    assert_eq!(quick.json().await["seq"], sent + 1);
    sent + 1
}

/// Reads to the event `last`; each event or gap begins where the one before it ended. Returns what was delivered, and the
/// reasons of the gaps.
async fn read_with_gaps(slow: &mut Client<tokio::net::TcpStream>, last: u64) -> (Vec<u64>, Vec<String>) {
    let (mut at, mut delivered, mut reasons) = (0, Vec::new(), Vec::new());
    while at < last {
        let frame = slow.json().await;
        if frame["type"] == "gap" {
            assert_eq!(frame["data"]["from"], at + 1, "{frame}");
            at = frame["data"]["to"].as_u64().expect("to");
            reasons.push(frame["data"]["reason"].as_str().expect("reason").to_owned());
        } else {
            assert_eq!((&frame["prev"], &frame["seq"]), (&json!(at), &json!(at + 1)));
            at += 1;
            delivered.push(at);
        }
    }
    (delivered, reasons)
}

#[tokio::test]
async fn a_slow_subscriber_that_allows_gaps_stays_and_is_told_what_it_does_not_get() {
    let hub = hub(|config| config.session_queue_bytes = 64 << 10);
    let (mut quick, _) = Client::subscriber(hub.port(), &["*"], None).await;
    let mut slow = Client::try_connect(hub.port(), &[]).await.expect("accepted");
    slow.say(r#"{"type":"subscribe","data":{"events":["*"],"slow":"drop_with_gap"}}"#).await;
    slow.json().await;
    let last = dawdle(&hub, &mut quick, |stats| stats.shed).await;
    let (delivered, reasons) = read_with_gaps(&mut slow, last).await;
    assert!(!reasons.is_empty() && reasons.iter().all(|reason| reason == "shed"), "{reasons:?}");
    let stats = hub.stats();
    assert_eq!((last - delivered.len() as u64, stats.slow), (stats.shed, 0));
}

#[tokio::test]
async fn a_slow_subscriber_that_wants_the_newest_gets_it_for_every_key() {
    let hub = hub(|config| {
        config.session_queue_bytes = 256 << 10;
        config.slow = Slow::Conflate;
    });
    let (mut quick, _) = Client::subscriber(hub.port(), &["*"], None).await;
    let (mut slow, _) = Client::subscriber(hub.port(), &["*"], None).await;
    let last = dawdle(&hub, &mut quick, |stats| stats.conflated).await;
    let (delivered, reasons) = read_with_gaps(&mut slow, last).await;
    assert!(!reasons.is_empty() && reasons.iter().all(|reason| reason == "conflated"), "{reasons:?}");
    assert!((last - 7..=last).all(|seq| delivered.contains(&seq)), "the newest of each of the seven keys");
    let stats = hub.stats();
    assert_eq!((last - delivered.len() as u64, stats.slow, stats.shed), (stats.conflated, 0, 0));
}

#[tokio::test]
async fn a_bulk_emitter_does_not_overrun_a_subscriber_that_reads() {
    const EVENTS: u64 = 200_000;
    let hub = hub(|_| {});
    let (mut subscriber, _) = Client::subscriber(hub.port(), &["*"], None).await;
    let reading = tokio::spawn(async move {
        for n in 1..=EVENTS {
            assert_eq!(subscriber.json().await["seq"], n);
        }
    });
    let mut emitter = Client::emitter(hub.port()).await;
    emitter.hello("engine", "1", 1).await;
    // In windows, so that the test's own JSON parser is not what is measured as slow.
    for first in (1..=EVENTS).step_by(2000) {
        emitter.emit(first..=first + 1999).await;
        emitter.acked(first + 1999).await;
        until("the subscriber keeps up", || hub.stats().slow == 0).await;
        tokio::task::yield_now().await;
    }
    reading.await.expect("all events in order");
}

#[tokio::test]
async fn many_emitters_of_small_events_do_not_overrun_a_subscriber_whose_socket_has_room() {
    const EMITTERS: u64 = 16;
    const ROUNDS: u64 = 30;
    // In one round all of them together send many times what the queue holds, and less than the sockets do.
    const EVENTS: u64 = 200;
    let hub = hub(|config| config.session_queue_bytes = 32 << 10);
    let (mut subscriber, _) = Client::subscriber(hub.port(), &["*"], None).await;
    let mut emitters = Vec::new();
    for n in 0..EMITTERS {
        let mut emitter = Client::emitter(hub.port()).await;
        emitter.hello(&format!("engine {n}"), "1", 1).await;
        emitters.push(emitter);
    }
    for round in 0..ROUNDS {
        let (first, last) = (round * EVENTS + 1, (round + 1) * EVENTS);
        futures_util::future::join_all(emitters.iter_mut().map(|emitter| emitter.emit(first..=last))).await;
        for emitter in &mut emitters {
            emitter.acked(last).await;
        }
        for n in 1..=EMITTERS * EVENTS {
            assert_eq!(subscriber.json().await["seq"], round * EMITTERS * EVENTS + n);
        }
    }
    assert_eq!(hub.stats().slow, 0);
}

#[tokio::test]
async fn one_frame_of_more_events_than_a_queue_holds_is_taken_in_turns() {
    let home = tempfile::tempdir().expect("writable");
    for log_path in [None, Some(home.path().join("log.db"))] {
        let hub = hub(|config| {
            config.session_queue_bytes = 16 << 10;
            config.log_path = log_path;
        });
        let (mut subscriber, _) = Client::subscriber(hub.port(), &["*"], None).await;
        let mut emitter = Client::emitter(hub.port()).await;
        emitter.hello("engine", "1", 1).await;
        emitter.emit(1..=5000).await;
        emitter.emit(4000..=6000).await; // overlaps
        emitter.acked(6000).await;
        for n in 1..=6000 {
            assert_eq!(subscriber.json().await["data"]["n"], n);
        }
        let stats = hub.stats();
        assert_eq!((stats.slow, stats.counters.events, stats.counters.duplicates), (0, 6000, 1001));
    }
}
