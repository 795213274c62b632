//! Clients of Centrifugo's protocol over real sockets: `/connection/websocket`, on the hub's own port and behind another
//! server. What is said there is tested beside the machine; here it is what only a socket shows.

mod support;

use std::collections::VecDeque;
use std::time::Duration;

use futures_util::SinkExt as _;
use hyper::header::HeaderMap;
use safe_broadcaster::hub::Hub;
use safe_broadcaster::hub::auth::Auth;
use safe_broadcaster::hub::doors::{Guest, Outgoing};
use safe_broadcaster::secret::Secret;
use serde_json::{Value, json};
use support::{Client, PATIENCE, ask, hub};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};

const PATH: &str = "/connection/websocket";

struct Centrifugo {
    client: Client<TcpStream>,
    /// Lines of the last frame.
    lines: VecDeque<Value>,
}

impl Centrifugo {
    async fn open(hub: &Hub, headers: &[(&'static str, &str)]) -> Result<Self, WsError> {
        Ok(Self { client: Client::try_path(hub.port(), PATH, headers).await?, lines: VecDeque::new() })
    }

    async fn connected(hub: &Hub, connect: Value) -> (Self, Value) {
        let mut client = Self::open(hub, &[]).await.expect("accepted");
        let welcome = client.call(json!({"id": 1, "connect": connect})).await;
        (client, welcome)
    }

    async fn call(&mut self, command: Value) -> Value {
        self.client.say(&command.to_string()).await;
        self.next().await
    }

    async fn subscribe(&mut self, channel: &str, since: Option<(&str, u64)>) -> Value {
        let mut request = json!({"channel": channel});
        if let Some((epoch, offset)) = since {
            request = json!({"channel": channel, "recover": true, "epoch": epoch, "offset": offset});
        }
        self.call(json!({"id": 2, "subscribe": request})).await["subscribe"].clone()
    }

    /// The next line; pings are answered.
    async fn next(&mut self) -> Value {
        loop {
            match self.lines.pop_front() {
                Some(ping) if ping == json!({}) => self.client.say("{}").await,
                Some(line) => return line,
                None => {
                    let text = self.client.text().await;
                    self.lines.extend(text.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON")));
                }
            }
        }
    }

    async fn publication(&mut self) -> (u64, Value) {
        let push = self.next().await["push"].clone();
        (push["pub"]["offset"].as_u64().expect("an offset"), push["pub"]["data"].clone())
    }
}

fn publish(hub: &Hub, event: &Value) {
    hub.publish(event.to_string().into()).expect("published");
}

#[tokio::test]
async fn a_dashboard_subscribes_publishes_and_recovers_with_and_without_a_disk() {
    let home = tempfile::tempdir().expect("writable");
    for log_path in [None, Some(home.path().join("log.db"))] {
        let hub = hub(|config| config.log_path.clone_from(&log_path));
        let (mut client, welcome) = Centrifugo::connected(&hub, json!({})).await;
        assert_eq!((&welcome["connect"]["ping"], &welcome["connect"]["pong"]), (&json!(25), &json!(true)));
        let subscribed = client.subscribe("chat", None).await;
        let epoch = subscribed["epoch"].as_str().expect("an epoch").to_owned();
        client
            .client
            .say("{\"id\":3,\"publish\":{\"channel\":\"chat\",\"data\":{\"n\":1}}}\n{\"id\":4,\"ping\":{}}")
            .await;
        let mut heard = [client.next().await, client.next().await, client.next().await];
        heard.sort_by_key(|line| line["id"].as_u64());
        let data = json!({"type": "chat", "n": 1});
        assert_eq!(heard[0], json!({"push": {"channel": "chat", "pub": {"data": data, "offset": 1}}}));
        assert_eq!(heard[1..], [json!({"id": 3, "publish": {}}), json!({"id": 4, "ping": {}})]);
        drop(client);
        for n in 2..=500 {
            publish(&hub, &json!({"type": if n % 5 == 0 { "chat" } else { "other" }, "n": n}));
        }
        let (mut client, _) = Centrifugo::connected(&hub, json!({})).await;
        let subscribed = client.subscribe("chat", Some((&epoch, 1))).await;
        assert_eq!((&subscribed["recovered"], &subscribed["offset"]), (&json!(true), &json!(1)));
        for n in (5..=500).step_by(5) {
            assert_eq!(client.publication().await, (n, json!({"type": "chat", "n": n})));
        }
        assert_eq!(hub.stats().subscribers, 1);
        let (stopping, code) = tokio::join!(hub.stop(), async {
            assert_eq!(client.next().await["push"]["message"]["data"]["type"], "bye");
            client.client.close_code().await
        });
        assert_eq!((stopping, code), ((), 3001));
    }
}

#[tokio::test]
async fn pings_come_as_the_protocol_has_them_and_who_does_not_answer_is_closed() {
    let hub = hub(|config| config.ping_interval = Duration::from_millis(100));
    let (mut answers, welcome) = Centrifugo::connected(&hub, json!({})).await;
    let (mut silent, _) = Centrifugo::connected(&hub, json!({})).await;
    assert_eq!(welcome["connect"]["ping"], 1);
    let closed = async {
        assert_eq!(silent.client.text().await, "{}");
        silent.client.close_code().await
    };
    tokio::select! {
        code = closed => assert_eq!(code, 3012),
        line = answers.next() => panic!("unexpected {line}"),
    }
    assert!(answers.subscribe("a", None).await.is_object(), "who answers stays");
}

#[tokio::test]
async fn only_json_over_a_websocket_is_spoken_and_only_by_pages_that_may() {
    let hub = hub(|_| {});
    for headers in [&[("Sec-WebSocket-Protocol", "centrifuge-protobuf")], &[("Origin", "https://evil.example")]] {
        assert!(Centrifugo::open(&hub, headers).await.is_err(), "{headers:?}");
    }
    assert!(Client::try_path(hub.port(), "/connection/websocket?format=protobuf", &[]).await.is_err());
    assert!(Centrifugo::open(&hub, &[("Sec-WebSocket-Protocol", "centrifuge-json")]).await.is_ok());
    assert_eq!(ask(hub.port(), &format!("GET {PATH} HTTP/1.1"), "").await.0, 426);
    assert_eq!(ask(hub.port(), &format!("POST {PATH} HTTP/1.1"), "").await.0, 405);
}

#[tokio::test]
async fn what_breaks_the_protocol_is_closed_with_codes_that_its_clients_know() {
    let hub = hub(|config| config.max_subscriber_message_bytes = 4096);
    for (frame, code) in [("x".to_owned(), 3501), (format!("{{\"x\":\"{}\"}}", "x".repeat(5000)), 1009)] {
        let mut client = Centrifugo::open(&hub, &[]).await.expect("accepted");
        client.client.say(&frame).await;
        assert_eq!(client.client.close_code().await, code);
    }
}

#[tokio::test]
async fn a_token_comes_with_connect_or_the_handshake_and_nothing_is_done_without() {
    let hub = hub(|config| {
        config.auth = Auth::Tokens(vec![Secret::new("s3cret")]);
        config.auth_timeout = Duration::from_millis(300);
    });
    let (mut client, welcome) = Centrifugo::connected(&hub, json!({"token": "s3cret"})).await;
    assert!(welcome["connect"]["client"].is_string());
    assert!(client.subscribe("*", None).await.is_object());
    let mut client = Centrifugo::open(&hub, &[("Authorization", "Bearer s3cret")]).await.expect("accepted");
    assert!(client.call(json!({"id": 1, "connect": {}})).await["connect"].is_object());
    assert!(Centrifugo::open(&hub, &[("Authorization", "Bearer wrong")]).await.is_err());
    for (connect, code) in [(json!({"token": "wrong"}), 101), (json!({}), 101)] {
        let (mut client, refused) = Centrifugo::connected(&hub, connect).await;
        assert_eq!(refused["error"]["code"], code);
        assert_eq!(client.client.close_code().await, 3500);
    }
    let mut client = Centrifugo::open(&hub, &[]).await.expect("accepted");
    assert_eq!(client.client.close_code().await, 3500, "it has shown none in time");
}

#[tokio::test]
async fn a_flood_of_frames_is_ended() {
    let hub = hub(|config| config.frame_rate = 50.0);
    let (mut client, _) = Centrifugo::connected(&hub, json!({})).await;
    for _ in 0..500 {
        if client.client.0.send(Message::text("{}")).await.is_err() {
            break;
        }
    }
    assert_eq!(client.client.close_code().await, 3503);
}

async fn said(guest: &Guest) -> Vec<Outgoing> {
    let taking = async {
        loop {
            match guest.take() {
                Some(batch) if batch.is_empty() => tokio::time::sleep(Duration::from_millis(2)).await,
                other => return other.unwrap_or_default(),
            }
        }
    };
    tokio::time::timeout(PATIENCE, taking).await.expect("in time")
}

#[tokio::test]
async fn behind_another_server_it_is_the_same() {
    let hub = hub(|config| config.ping_interval = Duration::from_millis(100));
    let admitted = hub.admit(PATH, &HeaderMap::new(), || {}).expect("this process");
    let (guest, protocol) = admitted.expect("admitted");
    assert_eq!(protocol, None);
    assert!(guest.feed_text("{\"id\":1,\"connect\":{}}\n{\"id\":2,\"subscribe\":{\"channel\":\"a\"}}"));
    let mut heard = String::new();
    while !heard.contains("}{}") {
        for outgoing in said(&guest).await {
            let Outgoing::Text(text) = outgoing else { panic!("{outgoing:?}") };
            heard.push_str(std::str::from_utf8(&text).expect("UTF-8"));
        }
    }
    assert!(
        heard.contains(r#""connect":{"client":"#) && heard.contains(r#""subscribe":{"recoverable":true"#),
        "{heard}"
    );
    let unspoken = hub.admit(&format!("{PATH}?format=protobuf"), &HeaderMap::new(), || {}).expect("this process");
    assert_eq!(unspoken.err().map(|refusal| refusal.status), Some(400));
}
