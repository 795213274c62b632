//! Sessions of a real hub over real sockets, and over the pipe within the process.

mod support;

use std::sync::{Arc, OnceLock, mpsc};
use std::time::Duration;

use bytes::Bytes;
use futures_util::SinkExt as _;
use hyper::header::{HeaderMap, HeaderValue, SEC_WEBSOCKET_PROTOCOL};
use safe_broadcaster::ErrorKind;
use safe_broadcaster::hub::doors::{Guest, Outgoing};
use safe_broadcaster::hub::{Hub, HubConfig};
use safe_broadcaster::wire::frame::{EmitterFrame, HubFrame};
use serde_json::{Value, json};
use support::{Client, PATIENCE, block, hub, publish, until};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::Role;

#[tokio::test]
async fn events_travel_from_emitter_to_subscriber_and_are_acknowledged() {
    let hub = hub(|_| {});
    let (mut subscriber, position) = Client::subscriber(hub.port(), &["t"], None).await;
    let mut emitter = Client::emitter(hub.port()).await;
    assert_eq!(emitter.hello("engine", "1", 1).await, 0);
    emitter.emit(1..=2).await;
    emitter.emit(3..=3).await;
    emitter.acked(3).await;
    assert_eq!(position["offset"], 0);
    for n in 1..=3 {
        let want = json!({"type":"event","seq":n,"prev":n - 1,"data":{"type":"t","n":n}});
        assert_eq!(subscriber.json().await, want);
    }
}

#[tokio::test]
async fn duplicates_after_a_reconnect_are_acknowledged_and_not_delivered() {
    let hub = hub(|_| {});
    let (mut subscriber, _) = Client::subscriber(hub.port(), &["*"], None).await;
    let mut emitter = Client::emitter(hub.port()).await;
    emitter.hello("engine", "1", 1).await;
    emitter.emit(1..=3).await;
    emitter.acked(3).await;
    drop(emitter);
    let mut emitter = Client::emitter(hub.port()).await;
    assert_eq!(emitter.hello("engine", "1", 2).await, 3);
    emitter.emit(2..=3).await;
    emitter.acked(3).await;
    emitter.emit(3..=4).await;
    emitter.acked(4).await;
    for n in 1..=4 {
        assert_eq!(subscriber.json().await["data"]["n"], n);
    }
    assert_eq!(hub.stats().counters.duplicates, 3);
}

#[tokio::test]
async fn an_emitter_that_asks_is_acknowledged_and_one_that_does_not_is_too() {
    let hub = hub(|_| {});
    let mut emitter = Client::emitter(hub.port()).await;
    emitter.hello("engine", "1", 1).await;
    // Lone events one after the other: each waits for its ack, which no other event hurries.
    for seq in 1..=20 {
        emitter.emit(seq..=seq).await;
        if seq % 2 == 0 {
            emitter.say(&EmitterFrame::AckNow.encode()).await;
        }
        emitter.acked(seq).await;
    }
}

#[tokio::test]
async fn an_ack_that_waits_is_given_before_the_goodbye() {
    let hub = hub(|_| {});
    let (mut subscriber, _) = Client::subscriber(hub.port(), &["*"], None).await;
    let mut emitter = Client::emitter(hub.port()).await;
    emitter.hello("engine", "1", 1).await;
    emitter.emit(1..=1).await;
    subscriber.json().await;
    let listen = async {
        emitter.acked(1).await;
        assert!(matches!(emitter.hub_frame().await, HubFrame::Bye { code: 3001, .. }));
        drop((emitter, subscriber));
    };
    tokio::join!(hub.stop(), listen);
}

#[tokio::test]
async fn more_than_the_credit_is_a_violation() {
    let hub = hub(|_| {});
    let mut emitter = Client::emitter(hub.port()).await;
    emitter.hello("engine", "1", 1).await;
    emitter.emit(1..=131_073).await;
    match emitter.hub_frame().await {
        HubFrame::Error { code, message } => {
            assert!(code == "bad_frame" && message.contains("beyond the credit"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(emitter.close_code().await, 3501);
}

#[tokio::test]
async fn patterns_choose_and_prev_chains_what_was_chosen() {
    let hub = hub(|_| {});
    let (mut alerts, _) = Client::subscriber(hub.port(), &["alert.*"], None).await;
    let (mut topics, _) = Client::subscriber(hub.port(), &["graph/*/delta"], None).await;
    publish(&hub, &json!({"type":"alert.disk"}));
    publish(&hub, &json!({"type":"other","topic":"graph/ada/delta"}));
    publish(&hub, &json!({"type":"alert.disk.full"}));
    let chain = |frame: Value| (frame["prev"].as_u64(), frame["seq"].as_u64());
    assert_eq!(chain(alerts.json().await), (Some(0), Some(1)));
    assert_eq!(chain(alerts.json().await), (Some(1), Some(3)));
    assert_eq!(chain(topics.json().await), (Some(0), Some(2)));
}

#[tokio::test]
async fn who_comes_back_recovers_or_is_told_why_not() {
    let hub = hub(|config| config.replay_events = 4);
    for n in 1..=6 {
        publish(&hub, &json!({"type": if n % 2 == 0 { "even" } else { "odd" }, "n": n}));
    }
    let epoch = hub.stats().epoch;
    let (mut back, position) = Client::subscriber(hub.port(), &["even"], Some((&epoch, 2))).await;
    assert_eq!((&position["recovered"], &position["replayed"]), (&json!(true), &json!(2)));
    let four = json!({"type":"event","seq":4,"prev":2,"replay":true,"data":{"type":"even","n":4}});
    assert_eq!(back.json().await, four);
    assert_eq!(back.json().await["seq"], 6);
    publish(&hub, &json!({"type":"even","n":7}));
    assert_eq!(back.json().await, json!({"type":"event","seq":7,"prev":6,"data":{"type":"even","n":7}}));

    for (epoch, offset, reason) in [(epoch.as_str(), 1, "truncated"), ("another", 6, "epoch"), (&epoch, 99, "ahead")] {
        let (_, position) = Client::subscriber(hub.port(), &["even"], Some((epoch, offset))).await;
        assert_eq!((&position["recovered"], &position["reason"]), (&json!(false), &json!(reason)));
    }
}

#[tokio::test]
async fn gaps_reach_every_subscriber() {
    let hub = hub(|_| {});
    let (mut subscriber, _) = Client::subscriber(hub.port(), &["unrelated"], None).await;
    let mut emitter = Client::emitter(hub.port()).await;
    emitter.hello("engine", "k", 1).await;
    let gap = EmitterFrame::Gap { from: 1, to: 7, reason: "spill_full".into() };
    emitter.say(&gap.encode()).await;
    emitter.acked(7).await;
    let data = json!({"emitter":"engine","epoch":"k","from":1,"to":7,"reason":"spill_full"});
    assert_eq!(subscriber.json().await, json!({"type":"gap","seq":1,"prev":0,"data":data}));
}

#[tokio::test]
async fn a_hub_that_starts_again_has_a_new_epoch_and_takes_up_the_emitter() {
    let first = hub(|_| {});
    let port = first.port();
    let mut emitter = Client::emitter(port).await;
    emitter.hello("engine", "1", 1).await;
    emitter.emit(1..=5).await;
    emitter.acked(5).await;
    let (mut subscriber, _) = Client::subscriber(port, &["*"], None).await;
    let epoch = first.stats().epoch;
    first.stop().await;
    assert_eq!(subscriber.close_code().await, 3001);

    let second = hub(|config| config.port = port);
    assert_ne!(second.stats().epoch, epoch);
    let (mut subscriber, position) = Client::subscriber(port, &["*"], Some((&epoch, 5))).await;
    assert_eq!((&position["recovered"], &position["reason"]), (&json!(false), &json!("epoch")));
    let mut emitter = Client::emitter(port).await;
    assert_eq!(emitter.hello("engine", "1", 6).await, 5);
    emitter.emit(6..=6).await;
    emitter.acked(6).await;
    assert_eq!(subscriber.json().await["data"]["n"], 6);
}

/// The data of a binary frame, inflated, and its head.
fn inflate(message: &Message) -> (Value, Vec<u8>) {
    use std::io::Read as _;
    let Message::Binary(frame) = message else { panic!("not binary: {message:?}") };
    assert_eq!(frame[0], 1);
    let begin = 3 + usize::from(u16::from_be_bytes([frame[1], frame[2]]));
    let mut data = Vec::new();
    flate2::read::ZlibDecoder::new(&frame[begin..]).read_to_end(&mut data).expect("a zlib stream");
    (serde_json::from_slice(&frame[3..begin]).expect("json"), data)
}

async fn deflating(hub: &Hub, patterns: &[&str], since: Option<u64>) -> Client<tokio::net::TcpStream> {
    let mut client = Client::try_connect(hub.port(), &[]).await.expect("accepted");
    let mut data = json!({"events": patterns, "compression": "deflate"});
    if let Some(offset) = since {
        data["since"] = json!({"epoch": hub.stats().epoch, "offset": offset});
    }
    client.say(&json!({"type": "subscribe", "data": data}).to_string()).await;
    assert_eq!(client.json().await["compression"], "deflate");
    client
}

#[tokio::test]
async fn an_event_is_encoded_once_and_compressed_at_most_once_for_a_hundred_sessions() {
    let hub = hub(|_| {});
    let mut same = Vec::new();
    for _ in 0..100 {
        same.push(deflating(&hub, &["*"], None).await);
    }
    let event = json!({"type":"snapshot","nodes":vec![json!({"state":"healthy","load":0.5}); 100]});
    publish(&hub, &event);
    publish(&hub, &json!({"type":"small"}));
    for client in &mut same {
        let (head, data) = inflate(&client.message().await);
        assert_eq!(head, json!({"type":"event","seq":1,"prev":0}));
        assert_eq!(data, event.to_string().into_bytes(), "byte for byte");
        assert_eq!(client.json().await, json!({"type":"event","seq":2,"prev":1,"data":{"type":"small"}}));
    }
    let stats = hub.stats();
    assert_eq!((stats.encoded, stats.compressed), (2, 1));

    // Other filters, other heads, the same stream; and text for who did not ask.
    let mut other = deflating(&hub, &["snapshot"], None).await;
    let (mut plain, position) = Client::subscriber(hub.port(), &["*"], None).await;
    assert_eq!(position["compression"], json!(null));
    publish(&hub, &event);
    assert_eq!(inflate(&other.message().await).0["prev"], 2);
    assert_eq!(inflate(&same[0].message().await).1, event.to_string().into_bytes());
    assert_eq!(plain.json().await["data"], event);
    let stats = hub.stats();
    assert_eq!((stats.encoded, stats.compressed), (2 + 3, 2));

    // A replay finds what was compressed live, and makes its own frames, once.
    for _ in 0..10 {
        let mut back = deflating(&hub, &["snapshot"], Some(0)).await;
        let (head, data) = inflate(&back.message().await);
        assert_eq!(head, json!({"type":"event","seq":1,"prev":0,"replay":true}));
        assert_eq!(data, event.to_string().into_bytes());
        assert_eq!(inflate(&back.message().await).0["seq"], 3);
    }
    let stats = hub.stats();
    assert_eq!((stats.encoded, stats.compressed), (5 + 2, 2));
}

#[tokio::test]
async fn nothing_is_compressed_where_that_is_turned_off() {
    let hub = hub(|config| config.compression_threshold = None);
    let mut client = Client::try_connect(hub.port(), &[]).await.expect("accepted");
    client.say(r#"{"type":"subscribe","data":{"events":["*"],"compression":"deflate"}}"#).await;
    assert_eq!(client.json().await["compression"], json!(null), "the answer says so");
    let event = json!({"type":"snapshot","text":"x".repeat(5000)});
    publish(&hub, &event);
    assert_eq!(client.json().await["data"], event);
}

#[tokio::test]
async fn garbage_from_an_emitter_is_answered_and_closed() {
    let hub = hub(|_| {});
    for (greet, garbage, word) in [
        (false, Message::text("{"), "sb.emit.v1"),
        (false, Message::binary(block(1..=1).into_bytes()), "hello comes first"),
        (true, Message::binary(&b"\x09garbage"[..]), "truncated"),
        (true, Message::binary(block(3..=3).into_bytes()), "1 to 2 are missing"),
    ] {
        let mut emitter = Client::emitter(hub.port()).await;
        if greet {
            emitter.hello("engine", "1", 1).await;
        }
        emitter.0.send(garbage).await.expect("sent");
        loop {
            match emitter.hub_frame().await {
                HubFrame::Ack { upto: 0 } => {}
                HubFrame::Error { code, message } => {
                    assert!(code == "bad_frame" && message.contains(word), "{word}: {message}");
                    break;
                }
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(emitter.close_code().await, 3501);
    }
    until("all are gone", || hub.stats().emitters == 0).await;
}

#[tokio::test]
async fn a_refused_event_is_told_behind_the_ack_of_what_came_before_and_the_connection_stays() {
    let home = tempfile::tempdir().expect("writable");
    for log_path in [None, Some(home.path().join("log.db"))] {
        let hub = hub(|config| config.log_path = log_path);
        let mut emitter = Client::emitter(hub.port()).await;
        emitter.hello("engine", "1", 1).await;
        let mut builder = safe_broadcaster::wire::block::BlockBuilder::new(1, bytes::BytesMut::new());
        for event in [&b"{}"[..], b"{}", b"[3]", b"{}"] {
            builder.push(event);
        }
        emitter.block(&builder.seal().expect("not empty")).await;
        emitter.emit(5..=9).await; // pipelined behind it: neither taken nor a violation
        emitter.acked(2).await;
        let nack = emitter.hub_frame().await;
        assert!(matches!(&nack, HubFrame::Nack { seq: 3, reason } if reason.contains("JSON object")), "{nack:?}");
        emitter.say(r#"{"type":"gap","from":3,"to":3,"reason":"refused"}"#).await;
        emitter.emit(4..=9).await;
        emitter.acked(9).await;
        let stats = hub.stats();
        assert_eq!((stats.counters.events, stats.counters.gaps, stats.counters.refused), (8, 1, 1));
    }
}

#[tokio::test]
async fn garbage_from_a_subscriber_is_answered_and_it_stays() {
    let hub = hub(|_| {});
    let (mut subscriber, _) = Client::subscriber(hub.port(), &["*"], None).await;
    for garbage in [Message::text("{"), Message::text("[]"), Message::binary(&b"\x01"[..])] {
        subscriber.0.send(garbage).await.expect("sent");
        assert_eq!(subscriber.json().await["data"]["code"], "bad_frame");
    }
    subscriber.say(r#"{"type":"ping"}"#).await;
    assert_eq!(subscriber.json().await, json!({"type":"pong","lastSeq":0,"epoch":hub.stats().epoch,"offset":0}));
}

#[tokio::test]
async fn broken_websocket_frames_are_refused_with_a_code() {
    use tokio::io::AsyncWriteExt as _;
    let hub = hub(|config| config.max_message_bytes = 2000);
    let mut emitter = Client::emitter(hub.port()).await;
    emitter.0.send(Message::binary(vec![1; 100_000])).await.expect("sent");
    assert_eq!(emitter.close_code().await, 3502);
    let mut client = Client::try_connect(hub.port(), &[]).await.expect("accepted");
    client.0.get_mut().write_all(&[0xff; 100]).await.expect("sent");
    assert_eq!(client.close_code().await, 3501);
}

#[tokio::test]
async fn a_newer_connection_of_an_emitter_takes_over() {
    let hub = hub(|_| {});
    let mut old = Client::emitter(hub.port()).await;
    old.hello("engine", "1", 1).await;
    old.emit(1..=1).await;
    old.acked(1).await;
    let mut new = Client::emitter(hub.port()).await;
    assert_eq!(new.hello("engine", "1", 1).await, 1);
    assert_eq!(old.close_code().await, 3013);
    new.emit(1..=2).await;
    new.acked(2).await;
    let mut other = Client::emitter(hub.port()).await;
    assert_eq!(other.hello("another", "1", 1).await, 0);
    assert_eq!(hub.stats().counters.superseded, 1);
}

#[tokio::test]
async fn goodbye_is_said_to_both_kinds_and_the_port_is_free() {
    let hub = hub(|_| {});
    let port = hub.port();
    let mut emitter = Client::emitter(port).await;
    emitter.hello("engine", "1", 1).await;
    let (mut subscriber, _) = Client::subscriber(port, &["*"], None).await;
    let (first, second) = (hub.stop(), hub.stop());
    let listen = async {
        match emitter.hub_frame().await {
            HubFrame::Bye { code: 3001, reconnect } => assert!(reconnect.after > 0.0),
            other => panic!("no bye: {other:?}"),
        }
        assert_eq!(emitter.close_code().await, 3001);
        let bye = subscriber.json().await;
        assert_eq!((&bye["type"], &bye["data"]["code"]), (&json!("bye"), &json!(3001)));
        assert_eq!(subscriber.close_code().await, 3001);
        drop((emitter, subscriber));
    };
    tokio::join!(first, second, listen);
    assert!(!hub.is_listening());
    let refused = hub.publish(Bytes::from_static(b"{}")).expect_err("stopped");
    assert_eq!(refused.kind(), ErrorKind::Closed);
    assert!(hub.dialer().dial().is_err());
    Hub::start(HubConfig { port, ..HubConfig::default() }).expect("the port is free");
}

#[tokio::test]
async fn a_peer_that_never_answers_does_not_hold_up_the_stop() {
    let hub = hub(|_| {});
    let silent = Client::emitter(hub.port()).await;
    tokio::time::timeout(PATIENCE, hub.stop()).await.expect("bounded");
    drop(silent);
}

#[tokio::test]
async fn a_dead_peer_is_noticed_by_its_silence() {
    let hub = hub(|config| config.ping_interval = Duration::from_millis(100));
    // Nothing reads this socket, so its pings are not answered.
    let silent = Client::emitter(hub.port()).await;
    let mut alive = Client::try_connect(hub.port(), &[]).await.expect("accepted");
    let reading = tokio::spawn(async move { alive.message().await });
    until("the silent one is gone", || hub.stats().emitters == 0).await;
    assert_eq!(hub.stats().subscribers, 1);
    reading.abort();
    drop(silent);
}

#[tokio::test]
async fn a_server_that_takes_everything_at_once_is_not_dead() {
    let hub = hub(|config| config.ping_interval = Duration::from_millis(100));
    let guest = Arc::new(OnceLock::<Guest>::new());
    let (seen, heard) = mpsc::channel();
    let taking = Arc::downgrade(&guest);
    // Sent before the hub's own thread comes to look whether it is.
    let bell = move || {
        while let Some(taken) = taking.upgrade().and_then(|guest| guest.get()?.take()).filter(|batch| !batch.is_empty())
        {
            for outgoing in taken {
                drop(seen.send(outgoing)); // the test may have seen enough
            }
        }
    };
    let headers = HeaderMap::from_iter([(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static("sb.v1.json"))]);
    let (admitted, _) = hub.admit("/ws", &headers, bell).expect("this process").expect("admitted");
    assert!(guest.set(admitted).is_ok());
    assert_eq!(guest.get().expect("set").take(), Some(vec![]), "from now on the bell rings");
    for _ in 0..5 {
        let outgoing = heard.recv_timeout(PATIENCE).expect("in time");
        assert_eq!(outgoing, Outgoing::Text(r#"{"type":"ping","lastSeq":0}"#.into()));
    }
}

#[tokio::test]
async fn the_pipe_speaks_the_same_protocol() {
    let hub = hub(|_| {});
    let (mut subscriber, _) = Client::subscriber(hub.port(), &["*"], None).await;
    let pipe = hub.dialer().dial().expect("running");
    let mut emitter = Client(WebSocketStream::from_raw_socket(pipe, Role::Client, None).await);
    emitter.hello("engine", "1", 1).await;
    emitter.emit(1..=1000).await;
    emitter.acked(1000).await;
    for n in 1..=1000 {
        assert_eq!(subscriber.json().await["data"]["n"], n);
    }
    let dialer = hub.dialer();
    drop(hub);
    let gone = async { while dialer.dial().is_ok() {} };
    tokio::time::timeout(PATIENCE, gone).await.expect("a dropped hub takes nobody");
}

#[tokio::test]
async fn sessions_are_bounded() {
    let hub = hub(|config| config.max_sessions = 1);
    let first = Client::emitter(hub.port()).await;
    assert!(Client::try_connect(hub.port(), &[]).await.is_err());
    drop(first);
    until("the first is gone", || hub.stats().emitters == 0).await;
    Client::try_connect(hub.port(), &[]).await.expect("there is room again");
}

#[tokio::test]
async fn events_of_a_program_are_checked() {
    let hub = hub(|config| config.max_message_bytes = 1024);
    for bad in ["", "[]", "{", "{} {}", r#"{"type":1}"#] {
        let refused = hub.publish(Bytes::from(bad)).expect_err(bad);
        assert_eq!(refused.kind(), ErrorKind::EventNotSerializable, "{bad}");
    }
    let large = json!({"text": "x".repeat(1024)}).to_string();
    assert_eq!(hub.publish(large.into()).expect_err("large").kind(), ErrorKind::EventTooLarge);
    assert_eq!(hub.stats().offset, 0);
}
