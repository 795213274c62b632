//! Who may do what, over real sockets: tokens at the handshake, in the first frame, and by HTTP.

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use hyper::header::{HeaderMap, HeaderName};
use ring::hmac;
use safe_broadcaster::hub::auth::{Answer, Auth, Authenticator, Grant, JwtKey, JwtSettings};
use safe_broadcaster::hub::doors::{Guest, Outgoing};
use safe_broadcaster::hub::{Hub, HubConfig};
use safe_broadcaster::secret::Secret;
use safe_broadcaster::wire::frame::HubFrame;
use safe_broadcaster::wire::topic::Pattern;
use serde_json::{Value, json};
use support::{Client, PATIENCE, ask, ask_with, hub};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const KEY: &str = "0123456789abcdef0123456789abcdef";
const PROTOCOL: &str = "Sec-WebSocket-Protocol";

fn jwt_hub(change: impl FnOnce(&mut HubConfig)) -> Hub {
    hub(|config| {
        let key = JwtKey::Secret(Secret::new(KEY));
        config.auth = Auth::Jwt(JwtSettings { key, issuer: None, audience: None, leeway: Duration::ZERO });
        change(config);
    })
}

fn token_hub() -> Hub {
    hub(|config| config.auth = Auth::Tokens(vec![Secret::new("s3cret-new"), Secret::new("s3cret-old")]))
}

/// Seconds since 1970, `left` from now.
fn from_now(left: f64) -> f64 {
    SystemTime::UNIX_EPOCH.elapsed().expect("after 1970").as_secs_f64() + left
}

fn jwt(subscribe: &[&str], publish: &[&str], exp: f64) -> String {
    let part = |json: Value| BASE64_URL_SAFE_NO_PAD.encode(json.to_string());
    let claims = json!({"sub": "ada", "exp": exp, "subscribe": subscribe, "publish": publish});
    let body = format!("{}.{}", part(json!({"alg": "HS256"})), part(claims));
    let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, KEY.as_bytes()), body.as_bytes());
    format!("{body}.{}", BASE64_URL_SAFE_NO_PAD.encode(tag))
}

fn auth(token: &str) -> String {
    json!({"type": "auth", "data": {"token": token}}).to_string()
}

fn subscribe(patterns: &[&str]) -> String {
    json!({"type": "subscribe", "data": {"events": patterns}}).to_string()
}

fn bearer(token: &str) -> String {
    format!("Bearer {token}")
}

#[tokio::test]
async fn a_token_is_taken_from_the_first_frame_the_subprotocol_or_the_header() {
    let hub = token_hub();
    let ways: [&[(&str, &str)]; 3] =
        [&[], &[(PROTOCOL, "sb.v1.json, bearer.s3cret-old")], &[("Authorization", "Bearer s3cret-new")]];
    for headers in ways {
        let mut client = Client::try_connect(hub.port(), headers).await.expect("accepted");
        if headers.is_empty() {
            client.say(&auth("s3cret-old")).await;
        }
        let answer = client.json().await;
        assert_eq!(answer, json!({"action": "authenticated", "subject": null, "expires": null}), "{headers:?}");
        client.say(&subscribe(&["*"])).await;
        assert_eq!(client.json().await["action"], "subscribed");
    }
}

#[tokio::test]
async fn where_no_token_is_needed_one_is_welcome() {
    let hub = hub(|_| {});
    let mut client = Client::try_connect(hub.port(), &[("Authorization", "Bearer any")]).await.expect("accepted");
    client.say(&auth("any")).await;
    assert_eq!(client.json().await["action"], "authenticated");
}

#[tokio::test]
async fn nothing_is_heard_before_the_token_and_a_wrong_one_ends_the_session() {
    let hub = token_hub();
    for first in [subscribe(&["*"]), auth("s3cret-wrong"), "{".into(), r#"{"type":"auth","data":"s3cret-old"}"#.into()]
    {
        let mut client = Client::try_connect(hub.port(), &[]).await.expect("accepted");
        client.say(r#"{"type":"ping"}"#).await;
        assert_eq!(client.json().await["type"], "pong");
        client.say(&first).await;
        client.say(&subscribe(&["*"])).await;
        let refused = client.text().await;
        assert!(refused.contains(r#""code":"unauthorized""#) && !refused.contains("s3cret"), "{refused}");
        assert_eq!(client.close_code().await, 3500, "{first}");
    }
    let wrong = [(PROTOCOL, "sb.v1.json, bearer.s3cret-wrong")];
    let mut client = Client::try_connect(hub.port(), &wrong).await.expect("a browser is told on the wire");
    assert_eq!(client.json().await["data"]["code"], "unauthorized");
    assert_eq!(client.close_code().await, 3500);
    assert!(Client::try_connect(hub.port(), &[("Authorization", "Bearer s3cret-wrong")]).await.is_err());
    let stats = serde_json::to_string(&hub.stats()).expect("json");
    assert!(stats.contains(r#""auth_refused":6"#) && !stats.contains("s3cret"), "{stats}");
}

#[tokio::test]
async fn who_shows_no_token_in_time_is_closed() {
    let hub = hub(|config| {
        config.auth = Auth::Tokens(vec![Secret::new("t")]);
        config.auth_timeout = Duration::from_millis(200);
    });
    let mut client = Client::try_connect(hub.port(), &[]).await.expect("accepted");
    assert_eq!(client.json().await["data"]["code"], "unauthorized");
    assert_eq!(client.close_code().await, 3500);
}

#[tokio::test]
async fn a_subscription_beyond_the_grant_is_refused_and_the_session_stays() {
    let hub = jwt_hub(|_| {});
    let mut client = Client::try_connect(hub.port(), &[]).await.expect("accepted");
    let exp = 4_102_444_800.007_812_5; // in 2100; a reader that rounds loses its last digit
    client.say(&auth(&jwt(&["alert.*"], &[], exp))).await;
    assert_eq!(client.json().await, json!({"action": "authenticated", "subject": "ada", "expires": exp}));
    for beyond in ["*", "*.disk", "other", "alert/x"] {
        client.say(&subscribe(&["alert.disk", beyond])).await;
        let refused = client.json().await;
        assert_eq!(refused["data"]["code"], "not_allowed");
        assert!(refused["data"]["message"].as_str().is_some_and(|text| text.contains(beyond)), "{refused}");
    }
    client.say(&subscribe(&["alert.disk"])).await;
    assert_eq!(client.json().await["events"], json!(["alert.disk"]));
    for kind in ["other", "alert.disk"] {
        hub.publish(json!({"type": kind}).to_string().into()).expect("published");
    }
    assert_eq!(client.json().await["data"]["type"], "alert.disk");
}

#[tokio::test]
async fn a_token_that_expires_ends_the_session_unless_a_fresh_one_comes() {
    let hub = jwt_hub(|_| {});
    let [mut stays, mut goes] = [
        Client::try_connect(hub.port(), &[]).await.expect("accepted"),
        Client::try_connect(hub.port(), &[]).await.expect("accepted"),
    ];
    for client in [&mut stays, &mut goes] {
        client.say(&auth(&jwt(&["a", "b"], &[], from_now(1.0)))).await;
        assert_eq!(client.json().await["action"], "authenticated");
        client.say(&subscribe(&["a", "b"])).await;
        assert_eq!(client.json().await["action"], "subscribed");
    }
    stays.say(&auth(&jwt(&["a"], &[], from_now(60.0)))).await;
    assert_eq!(stays.json().await["action"], "authenticated");
    assert_eq!(stays.json().await, json!({"action": "unsubscribed", "events": ["b"]}));
    assert_eq!(goes.json().await["data"]["code"], "token_expired");
    assert_eq!(goes.close_code().await, 3005);
    for kind in ["b", "a"] {
        hub.publish(json!({"type": kind}).to_string().into()).expect("published");
    }
    assert_eq!(stays.json().await["data"]["type"], "a");
    // Whoever comes with one that is over is told to get a fresh one, not to stay away.
    let mut late = Client::try_connect(hub.port(), &[]).await.expect("accepted");
    late.say(&auth(&jwt(&["a"], &[], from_now(-1.0)))).await;
    assert_eq!(late.json().await["data"]["code"], "token_expired");
    assert_eq!(late.close_code().await, 3005);
}

#[tokio::test]
async fn emitters_show_their_token_at_the_handshake_and_publish_what_it_grants() {
    let hub = jwt_hub(|_| {});
    let emitter = [(PROTOCOL, "sb.emit.v1")];
    assert!(Client::try_connect(hub.port(), &emitter).await.is_err());
    let token = bearer(&jwt(&[], &["t"], from_now(60.0)));
    let headers = [(PROTOCOL, "sb.emit.v1"), ("Authorization", token.as_str())];
    let mut client = Client::try_connect(hub.port(), &headers).await.expect("accepted");
    assert_eq!(client.hello("ada", "e", 1).await, 0);
    client.emit(1..=2).await;
    client.acked(2).await;
    let token = bearer(&jwt(&[], &["other"], from_now(1.0)));
    let headers = [(PROTOCOL, "sb.emit.v1"), ("Authorization", token.as_str())];
    let mut client = Client::try_connect(hub.port(), &headers).await.expect("accepted");
    client.hello("ada", "e", 3).await;
    client.emit(3..=3).await;
    let (seq, reason) = loop {
        match client.hub_frame().await {
            HubFrame::Nack { seq, reason } => break (seq, reason),
            HubFrame::Ack { upto } => assert_eq!(upto, 2),
            other => panic!("no nack: {other:?}"),
        }
    };
    assert!(seq == 3 && reason.contains("does not grant publishing") && reason.contains("'t'"), "{reason}");
    assert_eq!(client.close_code().await, 3005);
    assert_eq!(hub.stats().counters.events, 2);
}

#[tokio::test]
async fn publishers_are_held_to_their_grant() {
    let hub = jwt_hub(|_| {});
    let token = bearer(&jwt(&[], &["a.*"], from_now(60.0)));
    assert!(Client::try_path(hub.port(), "/publish", &[]).await.is_err());
    let mut client = Client::try_path(hub.port(), "/publish", &[("Authorization", &token)]).await.expect("accepted");
    client.say(r#"{"type":"b"}"#).await;
    assert_eq!(client.json().await["data"]["code"], "not_allowed");
    client.say(r#"{"type":"a.x","topic":"hidden/way"}"#).await;
    assert_eq!(client.json().await["data"]["code"], "not_allowed");

    let head = format!("POST /publish HTTP/1.1\r\nAuthorization: {token}");
    assert_eq!(ask(hub.port(), &head, r#"{"type":"a.x"}"#).await.0, 200);
    let (status, body) = ask(hub.port(), &head, r#"{"type":"b"}"#).await;
    assert!(status == 403 && body.contains("'b'"), "{status} {body}");
    assert_eq!(hub.stats().counters.events, 1);
}

#[tokio::test]
async fn http_wants_a_token_too_except_for_health_and_the_page() {
    let hub = token_hub();
    let port = hub.port();
    for path in ["POST /publish", "GET /stats"] {
        let (status, headers, body) = ask_with(port, &format!("{path} HTTP/1.1"), b"{}").await;
        assert_eq!(status, 401, "{path}");
        assert!(headers.to_lowercase().contains("www-authenticate: bearer"), "{headers}");
        assert!(!body.is_empty());
        for wrong in ["Bearer s3cret", "Basic czNjcmV0", "Bearer"] {
            let (status, _, body) = ask_with(port, &format!("{path} HTTP/1.1\r\nAuthorization: {wrong}"), b"{}").await;
            assert!(status == 401 && !String::from_utf8_lossy(&body).contains("s3cret"), "{path} {wrong}");
        }
        let good = format!("{path} HTTP/1.1\r\nAuthorization: Bearer s3cret-new");
        assert_eq!(ask(port, &good, "{}").await.0, 200, "{path}");
    }
    for path in ["/", "/healthz", "/readyz"] {
        assert_eq!(ask(port, &format!("GET {path} HTTP/1.1"), "").await.0, 200, "{path}");
    }
}

#[tokio::test]
async fn a_token_in_the_address_is_refused_with_the_reason() {
    for hub in [token_hub(), hub(|_| {})] {
        for path in ["/ws?token=s3cret-new", "/stats?access_token=s3cret-new", "/publish?Token=s3cret-new"] {
            let (status, body) = ask(hub.port(), &format!("GET {path} HTTP/1.1"), "").await;
            assert!(status == 400 && body.contains("Authorization") && !body.contains("s3cret"), "{status} {body}");
        }
    }
}

struct Desk;

impl Authenticator for Desk {
    fn ask(&self, token: Secret, answer: Answer) {
        let granted = match token.expose() {
            "silent" => return std::mem::forget(answer),
            "gone" => return,
            "good" => Some(Grant { subject: Some("ada".into()), ..Grant::everything() }),
            _ => None,
        };
        std::thread::spawn(move || drop(answer.send(granted)));
    }
}

#[tokio::test]
async fn a_callback_decides_and_its_failure_refuses() {
    let hub = hub(|config| {
        config.auth = Auth::Callback(Arc::new(Desk));
        config.auth_timeout = Duration::from_millis(300);
    });
    for (token, code) in [("bad", 3500), ("silent", 3006), ("gone", 3006)] {
        let mut client = Client::try_connect(hub.port(), &[]).await.expect("accepted");
        client.say(&auth(token)).await;
        assert_eq!(client.json().await["type"], "error");
        assert_eq!(client.close_code().await, code, "{token}");
        let status = if code == 3500 { 401 } else { 503 };
        let head = format!("GET /stats HTTP/1.1\r\nAuthorization: Bearer {token}");
        assert_eq!(ask(hub.port(), &head, "").await.0, status);
    }
    let mut client = Client::try_connect(hub.port(), &[]).await.expect("accepted");
    client.say(&auth("good")).await;
    client.say(&subscribe(&["*"])).await;
    assert_eq!(client.json().await["subject"], "ada");
    assert_eq!(client.json().await["action"], "subscribed");
}

#[tokio::test]
async fn a_stream_of_events_ends_with_its_token_though_nobody_reads_it() {
    let hub = jwt_hub(|config| config.session_queue_bytes = 64 << 20);
    let mut socket = TcpStream::connect(("127.0.0.1", hub.port())).await.expect("connects");
    let token = jwt(&["*"], &[], from_now(1.5));
    let head = format!("GET /events?match=* HTTP/1.1\r\nHost: x\r\nAuthorization: {}\r\n\r\n", bearer(&token));
    socket.write_all(head.as_bytes()).await.expect("sent");
    until("it is there", || hub.stats().subscribers == 1).await;
    let large = json!({"type": "x", "pad": "x".repeat(1 << 20)}).to_string();
    for _ in 0..40 {
        hub.publish(large.clone().into()).expect("published");
    }
    until("its token is over", || hub.stats().subscribers == 0).await;
    assert_eq!(hub.stats().slow, 0);
}

#[tokio::test]
async fn a_stream_that_is_never_silent_ends_with_its_token_and_says_why() {
    let hub = jwt_hub(|_| {});
    let mut socket = TcpStream::connect(("127.0.0.1", hub.port())).await.expect("connects");
    let expires = from_now(1.5);
    let token = jwt(&["*"], &[], expires);
    let head = format!("GET /events?match=* HTTP/1.1\r\nHost: x\r\nAuthorization: {}\r\n\r\n", bearer(&token));
    socket.write_all(head.as_bytes()).await.expect("sent");
    until("it is there", || hub.stats().subscribers == 1).await;
    let mut told = Vec::new();
    let reading = async { tokio::time::timeout(PATIENCE, socket.read_to_end(&mut told)).await };
    let publishing = async {
        // There is always something to send, and never too much.
        while hub.stats().subscribers > 0 && from_now(0.0) < expires + 10.0 {
            while hub.stats().queued_bytes < 64 << 10 && hub.stats().subscribers > 0 {
                for _ in 0..500 {
                    hub.publish(r#"{"type":"busy"}"#.into()).expect("published");
                }
            }
            tokio::task::yield_now().await;
        }
    };
    let (read, ()) = tokio::join!(reading, publishing);
    read.expect("the stream ends").expect("it is read to its end");
    let late = from_now(0.0) - expires;
    assert!((0.0..5.0).contains(&late), "{late} s late");
    let told = String::from_utf8(told).expect("UTF-8");
    let (_, end) = told.rsplit_once("busy").expect("it was busy");
    let (error, bye) = (end.find("token_expired"), end.find("event: bye"));
    assert!(error.is_some() && error < bye && end.contains(r#""code":3005"#), "{end}");
    assert_eq!(hub.stats().slow, 0);
}

async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Lets a client in that another server has shaken hands with, by its address and header fields.
fn admit(hub: &Hub, target: &str, headers: &[(&str, &str)]) -> Result<Guest, u16> {
    let named = headers.iter().map(|(name, value)| {
        (HeaderName::from_bytes(name.as_bytes()).expect("a name"), value.parse().expect("a value"))
    });
    let admitted = hub.admit(target, &named.collect::<HeaderMap>(), || {}).expect("this process");
    admitted.map(|(guest, _)| guest).map_err(|refusal| refusal.status)
}

/// Waits for what the hub says to a client behind another server.
async fn said(guest: &Guest) -> Vec<Value> {
    let mut said = Vec::new();
    until("something is said", || {
        said = guest.take().expect("open");
        !said.is_empty()
    })
    .await;
    let json = |said| match said {
        Outgoing::Text(text) => serde_json::from_slice(&text).expect("json"),
        other => json!(format!("{other:?}")),
    };
    said.into_iter().map(json).collect()
}

#[tokio::test]
async fn what_is_chosen_for_a_client_waits_for_its_token_and_stays_within_its_grant() {
    let hub = jwt_hub(|_| {});
    let event = |kind: &str| {
        hub.publish(json!({"type": kind}).to_string().into()).expect("published");
    };
    let guest = admit(&hub, "/ws", &[]).expect("may show it later");
    guest.preset(&[Pattern::parse("*").expect("valid")]);
    event("a.x");
    assert!(guest.feed_text(&auth(&jwt(&["a.*"], &[], from_now(60.0)))));
    assert_eq!(said(&guest).await[0]["action"], "authenticated");
    event("b");
    event("a.y");
    assert_eq!(said(&guest).await, [json!({"type":"event","seq":3,"prev":1,"data":{"type":"a.y"}})]);
    assert!(guest.feed_text(&auth(&jwt(&["b"], &[], from_now(60.0)))));
    assert_eq!(said(&guest).await.len(), 1, "it is not told of patterns that it never chose");
    event("a.z");
    event("b");
    assert_eq!(said(&guest).await, [json!({"type":"event","seq":5,"prev":3,"data":{"type":"b"}})]);
}

#[tokio::test]
async fn a_flood_of_frames_is_ended_behind_another_server_too() {
    let hub = hub(|config| config.frame_rate = 10.0);
    let guest = admit(&hub, "/ws", &[]).expect("let in");
    for _ in 0..100 {
        let _closed_before_long = guest.feed_text(r#"{"type":"ping"}"#);
    }
    assert_eq!(closed(&guest).await, 3503);
    let publisher = admit(&hub, "/publish", &[]).expect("let in");
    for _ in 0..100 {
        assert!(publisher.feed_text("{}"));
    }
    until("all are published", || hub.stats().counters.events == 100).await;
}

/// Reads what the hub says to a client behind another server, up to its close.
async fn closed(guest: &Guest) -> u16 {
    let deadline = Instant::now() + PATIENCE;
    loop {
        for said in guest.take().unwrap_or_default() {
            if let Outgoing::Close(code, _) = said {
                return code;
            }
        }
        assert!(Instant::now() < deadline, "not closed");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn who_comes_through_another_server_needs_a_token_too() {
    let hub = token_hub();
    let admit = |target, headers: &[_]| admit(&hub, target, headers);
    assert_eq!(admit("/ws?token=s3cret-new", &[]).err(), Some(400));
    assert_eq!(admit("/publish", &[]).err(), Some(401));
    assert_eq!(admit("/ws", &[(PROTOCOL, "sb.emit.v1")]).err(), Some(401));
    for (path, protocol) in [("/publish", "x"), ("/ws", "sb.emit.v1"), ("/ws", "sb.v1.json")] {
        let guest = admit(path, &[(PROTOCOL, protocol), ("authorization", "Bearer wrong")]).expect("told on the wire");
        assert!(guest.feed_text(r#"{"type":"x"}"#));
        assert_eq!(closed(&guest).await, 3500, "{path} {protocol}");
    }
    let stranger = admit("/ws", &[]).expect("may show it later");
    stranger.preset(&[Pattern::parse("*").expect("valid")]);
    hub.publish(r#"{"type":"x"}"#.into()).expect("published");
    assert_eq!(stranger.take(), Some(Vec::new()), "nothing was chosen for it");
    assert!(stranger.feed_text(&subscribe(&["*"])));
    assert_eq!(closed(&stranger).await, 3500);
    let publisher = admit("/publish", &[("authorization", "Bearer s3cret-new")]).expect("let in");
    assert!(publisher.feed_text(r#"{"type":"x"}"#));
    until("it is published", || hub.stats().counters.events == 2).await;
}
