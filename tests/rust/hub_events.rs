//! Server-Sent Events, metrics, batches and pages of other origins, over real sockets.

mod support;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::time::Duration;

use flate2::Compression;
use flate2::write::{GzEncoder, ZlibEncoder};
use safe_broadcaster::hub::Hub;
use safe_broadcaster::hub::auth::Auth;
use safe_broadcaster::secret::Secret;
use serde_json::{Value, json};
use support::{Client, PATIENCE, ask, ask_with, hub};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpStream;

/// One event of a stream: its fields by name; those that stand there several times are joined by line breaks.
type Fields = BTreeMap<String, String>;

/// A stream of events as a browser reads it.
struct Events(BufReader<TcpStream>);

impl Events {
    async fn open(hub: &Hub, path: &str, headers: &str) -> Self {
        let mut socket = TcpStream::connect(("127.0.0.1", hub.port())).await.expect("connects");
        let head = format!("GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\n{headers}\r\n", hub.port());
        socket.write_all(head.as_bytes()).await.expect("sent");
        let mut events = Self(BufReader::new(socket));
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert!(events.0.read_line(&mut head).await.expect("a head") > 0, "{head}");
        }
        assert!(head.starts_with("HTTP/1.1 200") && head.contains("text/event-stream"), "{head}");
        events
    }

    /// The next event; comments and the lengths of HTTP's chunks are left out. Nothing at the end of the stream.
    async fn next(&mut self) -> Option<Fields> {
        let mut fields = Fields::new();
        loop {
            let mut line = String::new();
            let read = tokio::time::timeout(PATIENCE, self.0.read_line(&mut line)).await.expect("in time");
            if read.unwrap_or_default() == 0 {
                return None;
            }
            if line == "\n" && !fields.is_empty() {
                return Some(fields);
            }
            if let Some((name, value)) =
                line.trim_end_matches('\n').split_once(": ").filter(|(name, _)| !name.is_empty())
            {
                let field = fields.entry(name.to_owned()).or_default();
                if !field.is_empty() {
                    field.push('\n');
                }
                field.push_str(value);
            }
        }
    }

    async fn expect(&mut self, event: &str) -> (String, Value) {
        let fields = self.next().await.expect("an event");
        assert_eq!(fields["event"], event, "{fields:?}");
        let id = fields.get("id").cloned().unwrap_or_default();
        (id, serde_json::from_str(&fields["data"]).expect("json"))
    }
}

fn publish(hub: &Hub, kind: &str) {
    hub.publish(json!({"type": kind}).to_string().into()).expect("published");
}

#[tokio::test]
async fn a_stream_brings_the_same_frames_and_its_ids_are_positions() {
    let hub = hub(|_| {});
    let epoch = hub.stats().epoch;
    let mut events = Events::open(&hub, "/events?match=a.*&match=b", "").await;
    let (id, subscribed) = events.expect("subscribed").await;
    assert_eq!((id, &subscribed["events"]), (format!("{epoch}:0"), &json!(["a.*", "b"])));
    for kind in ["a.x", "other", "b"] {
        publish(&hub, kind);
    }
    let (id, first) = events.expect("event").await;
    assert_eq!((id, first), (format!("{epoch}:1"), json!({"type":"event","seq":1,"prev":0,"data":{"type":"a.x"}})));
    let (id, second) = events.expect("event").await;
    assert_eq!((id, &second["prev"]), (format!("{epoch}:3"), &json!(1)));
    assert_eq!(hub.stats().subscribers, 1);
    // Line breaks between the tokens of an event must not break the stream.
    hub.publish("{\"type\":\"b\",\r\n\"n\":\n1}".into()).expect("published");
    assert_eq!(events.expect("event").await.1["data"], json!({"type": "b", "n": 1}));
}

#[tokio::test]
async fn who_comes_back_with_its_last_id_gets_what_it_missed_or_is_told() {
    let hub = hub(|_| {});
    let epoch = hub.stats().epoch;
    for kind in ["a", "a", "b"] {
        publish(&hub, kind);
    }
    for (path, headers) in [
        ("/events?match=*".to_owned(), format!("Last-Event-ID: {epoch}:1\r\n")),
        (format!("/events?match=*&since={epoch}:1"), String::new()),
        (format!("/events?match=*&since={epoch}:3"), format!("Last-Event-ID: {epoch}:1\r\n")),
    ] {
        let mut events = Events::open(&hub, &path, &headers).await;
        let (id, subscribed) = events.expect("subscribed").await;
        assert_eq!((&subscribed["recovered"], &subscribed["replayed"]), (&json!(true), &json!(2)), "{path}");
        // Whoever is cut off here has none of it.
        assert_eq!(id, format!("{epoch}:1"));
        for seq in [2, 3] {
            let (id, event) = events.expect("event").await;
            assert_eq!((&event["seq"], &event["replay"]), (&json!(seq), &json!(true)));
            assert_eq!(id, format!("{epoch}:{seq}"));
        }
    }
    let mut events = Events::open(&hub, "/events?match=none", &format!("Last-Event-ID: {epoch}:1\r\n")).await;
    assert_eq!(events.expect("subscribed").await.0, format!("{epoch}:3"), "there is nothing between");
    let mut events = Events::open(&hub, "/events?match=*", "Last-Event-ID: other:1\r\n").await;
    let (_, subscribed) = events.expect("subscribed").await;
    assert_eq!((&subscribed["recovered"], &subscribed["reason"]), (&json!(false), &json!("epoch")));
    for wrong in ["/events", "/events?match=", "/events?match=a&since=x"] {
        assert_eq!(ask(hub.port(), &format!("GET {wrong} HTTP/1.1"), "").await.0, 400, "{wrong}");
    }
}

#[tokio::test]
async fn a_hub_that_stops_says_goodbye_and_when_to_come_back() {
    let hub = hub(|_| {});
    let mut events = Events::open(&hub, "/events?match=*", "").await;
    events.expect("subscribed").await;
    let (next, ()) = tokio::join!(events.next(), hub.stop());
    let bye = next.expect("bye");
    assert_eq!(bye["event"], "bye");
    assert!(bye["retry"].parse::<u64>().is_ok_and(|retry| (200..5000).contains(&retry)), "{bye:?}");
    assert_eq!(events.next().await, None);
}

#[tokio::test]
async fn a_stream_that_is_not_read_is_slow_like_any_session_and_does_not_stay() {
    let hub = hub(|config| config.session_queue_bytes = 64 << 10);
    let mut events = Events::open(&hub, "/events?match=*", "").await;
    events.expect("subscribed").await;
    let large = json!({"type": "x", "pad": "x".repeat(100_000)}).to_string();
    for _ in 0..400 {
        hub.publish(large.clone().into()).expect("published");
        tokio::task::yield_now().await;
    }
    assert_eq!(hub.stats().slow, 1);
    // It is not read, and its session ends all the same.
    let deadline = std::time::Instant::now() + PATIENCE;
    while hub.stats().subscribers > 0 {
        assert!(std::time::Instant::now() < deadline, "the session stays");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    drop(events);
}

#[tokio::test]
async fn a_silent_stream_is_kept_alive_and_one_that_is_gone_is_noticed() {
    let hub = hub(|config| config.ping_interval = Duration::from_millis(100));
    let mut events = Events::open(&hub, "/events?match=*", "").await;
    events.expect("subscribed").await;
    let mut seen = String::new();
    while !seen.contains(": still here") {
        tokio::time::timeout(PATIENCE, events.0.read_line(&mut seen)).await.expect("in time").expect("read");
    }
    drop(events);
    let deadline = std::time::Instant::now() + PATIENCE;
    while hub.stats().subscribers > 0 {
        assert!(std::time::Instant::now() < deadline, "the session stays");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_heartbeat_brings_the_position_of_a_stream_that_gets_nothing() {
    let hub = hub(|config| {
        config.ping_interval = Duration::from_millis(100);
        config.replay_events = 2;
    });
    let epoch = hub.stats().epoch;
    let mut events = Events::open(&hub, "/events?match=rare", "").await;
    let (first, _) = events.expect("subscribed").await;
    for _ in 0..9 {
        publish(&hub, "common");
    }
    let beat = loop {
        let fields = events.next().await.expect("a heartbeat");
        assert!(!fields.contains_key("data"), "{fields:?}");
        if fields["id"] != first {
            break fields["id"].clone();
        }
    };
    assert_eq!(beat, format!("{epoch}:9"));
    publish(&hub, "rare");
    let mut behind = Events::open(&hub, "/events?match=rare", &format!("Last-Event-ID: {first}\r\n")).await;
    assert_eq!(behind.expect("subscribed").await.1["reason"], "truncated");
    let mut events = Events::open(&hub, "/events?match=rare", &format!("Last-Event-ID: {beat}\r\n")).await;
    assert_eq!(events.expect("subscribed").await.1["recovered"], true);
    assert_eq!(events.expect("event").await.0, format!("{epoch}:10"));
}

#[tokio::test]
async fn streams_and_metrics_want_the_token_too() {
    let hub = hub(|config| config.auth = Auth::Tokens(vec![Secret::new("t")]));
    for path in ["/events?match=*", "/metrics"] {
        assert_eq!(ask(hub.port(), &format!("GET {path} HTTP/1.1"), "").await.0, 401, "{path}");
    }
    let mut events = Events::open(&hub, "/events?match=*", "Authorization: Bearer t\r\n").await;
    events.expect("subscribed").await;
    assert_eq!(ask(hub.port(), "GET /metrics HTTP/1.1\r\nAuthorization: Bearer t", "").await.0, 200);
}

#[tokio::test]
async fn pages_of_allowed_origins_may_read_and_publish() {
    let hub = hub(|config| config.allowed_origins = vec!["https://dash.example".into()]);
    let allowed = "Origin: https://dash.example\r\nAccess-Control-Request-Method: POST";
    for path in ["/events", "/publish"] {
        let (status, head, _) = ask_with(hub.port(), &format!("OPTIONS {path} HTTP/1.1\r\n{allowed}"), b"").await;
        let head = head.to_lowercase();
        assert_eq!(status, 204);
        assert!(head.contains("access-control-allow-origin: https://dash.example\r\n"), "{head}");
        assert!(head.contains("access-control-allow-headers: authorization") && head.contains("vary: origin"));
        let foreign = format!("OPTIONS {path} HTTP/1.1\r\nOrigin: https://evil.example");
        let (status, head, _) = ask_with(hub.port(), &foreign, b"").await;
        assert!(status == 403 && !head.to_lowercase().contains("access-control-allow-origin"), "{head}");
    }
    let post = "POST /publish HTTP/1.1\r\nOrigin: https://dash.example";
    let (status, head, _) = ask_with(hub.port(), post, b"{}").await;
    assert!(status == 200 && head.to_lowercase().contains("access-control-allow-origin: https://dash.example"));
}

#[tokio::test]
async fn metrics_are_well_formed_and_agree_with_the_stats() {
    let hub = hub(|_| {});
    let (mut client, _) = Client::subscriber(hub.port(), &["*"], None).await;
    publish(&hub, "a");
    client.json().await;
    let (status, page) = ask(hub.port(), "GET /metrics HTTP/1.1", "").await;
    assert_eq!(status, 200);
    let (mut helped, mut typed, mut values) = (Vec::new(), BTreeMap::new(), BTreeMap::new());
    for line in page.trim_end().lines() {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("HELP"), Some(name), Some(help)) if help.ends_with('.') => helped.push(name),
            (Some("#"), Some("TYPE"), Some(name), Some(kind @ ("counter" | "gauge"))) => {
                assert!(typed.insert(name, kind).is_none(), "{name} twice");
                assert_eq!((helped.last(), kind == "counter"), (Some(&name), name.ends_with("_total")), "{line}");
            }
            (Some(name), Some(value), None, None) => {
                let bare = name.split('{').next().expect("a name");
                assert!(typed.contains_key(bare) && bare.starts_with("safe_broadcaster_hub_"), "{line}");
                assert!(value.parse::<f64>().is_ok() && values.insert(name, value).is_none(), "{line}");
            }
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(values["safe_broadcaster_hub_events_total"], "1");
    assert_eq!(values["safe_broadcaster_hub_delivered_total"], "1");
    assert_eq!(values["safe_broadcaster_hub_sessions{role=\"subscriber\"}"], "1");
    // Every number of the stats is there, under its name.
    for (name, value) in serde_json::to_value(hub.stats()).expect("json").as_object().expect("an object") {
        let told = page.contains(&format!("safe_broadcaster_hub_{name}"))
            || ["emitters", "subscribers", "publishers"].contains(&name.as_str());
        assert!(!value.is_number() || told, "{name} is missing");
    }
}

#[tokio::test]
async fn a_batch_is_taken_as_a_whole_or_not_at_all() {
    let home = tempfile::tempdir().expect("writable");
    for log_path in [None, Some(home.path().join("log.db"))] {
        let hub = hub(|config| config.log_path.clone_from(&log_path));
        let post = "POST /publish HTTP/1.1";
        let lines = "POST /publish HTTP/1.1\r\nContent-Type: application/x-ndjson";
        assert_eq!(ask(hub.port(), post, r#"[{"type":"a"},7]"#).await.0, 400);
        assert_eq!(ask(hub.port(), lines, "{}\n[]\n").await.0, 400);
        assert_eq!(ask(hub.port(), post, &json!(vec![json!({}); 10_001]).to_string()).await.0, 413);
        assert_eq!(hub.stats().offset, 0);
        let answer = ask(hub.port(), post, r#"[{"type":"a"},{"type":"b"}]"#).await;
        assert_eq!(answer, (200, r#"{"offsets":[1,2]}"#.into()));
        assert_eq!(ask(hub.port(), lines, "{}\n{}\n{}").await, (200, r#"{"offsets":[3,4,5]}"#.into()));
        assert_eq!(ask(hub.port(), post, "{}").await, (200, r#"{"offset":6}"#.into()));
        hub.stop().await;
    }
}

#[tokio::test]
async fn compressed_bodies_are_inflated_up_to_the_limit() {
    let hub = hub(|config| config.max_message_bytes = 64 << 10);
    let event = json!({"type": "x", "pad": "x".repeat(10_000)}).to_string();
    let zlib = |bytes: &[u8]| {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::best());
        encoder.write_all(bytes).expect("written");
        encoder.finish().expect("finished")
    };
    let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
    gzip.write_all(event.as_bytes()).expect("written");
    let gzip = gzip.finish().expect("finished");
    let post = |coding: &str| format!("POST /publish HTTP/1.1\r\nContent-Encoding: {coding}");
    assert_eq!(ask_with(hub.port(), &post("deflate"), &zlib(event.as_bytes())).await.0, 200);
    assert_eq!(ask_with(hub.port(), &post("gzip"), &gzip).await.0, 200);
    assert_eq!(ask_with(hub.port(), &post("identity"), event.as_bytes()).await.0, 200);
    let bomb = zlib(&vec![b' '; 32 << 20]);
    assert!(bomb.len() < 64 << 10);
    assert_eq!(ask_with(hub.port(), &post("deflate"), &bomb).await.0, 413);
    assert_eq!(ask_with(hub.port(), &post("deflate"), b"nonsense").await.0, 400);
    assert_eq!(ask_with(hub.port(), &post("br"), b"{}").await.0, 415);
    assert_eq!(hub.stats().counters.events, 3);
}
