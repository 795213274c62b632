//! The routes of the hub's port, spoken to byte by byte.

mod support;

use safe_broadcaster::ErrorKind;
use safe_broadcaster::hub::{Hub, HubConfig};
use serde_json::{Value, json};
use support::{Client, ask, hub};

#[tokio::test]
async fn a_published_event_reaches_subscribers() {
    let hub = hub(|config| config.max_message_bytes = 1024);
    let (mut subscriber, _) = Client::subscriber(hub.port(), &["*"], None).await;
    let (status, body) = ask(hub.port(), "POST /publish HTTP/1.1", r#"{"type":"x"}"#).await;
    assert_eq!((status, body.as_str()), (200, r#"{"offset":1}"#));
    assert_eq!(subscriber.json().await["data"], json!({"type":"x"}));
    assert_eq!(ask(hub.port(), "POST /publish HTTP/1.1", "[]").await.0, 400);
    assert_eq!(ask(hub.port(), "POST /publish HTTP/1.1", &"x".repeat(2000)).await.0, 413);
}

#[tokio::test]
async fn any_websocket_client_publishes_an_event_with_each_frame() {
    let home = tempfile::tempdir().expect("writable");
    for log_path in [None, Some(home.path().join("log.db"))] {
        let hub = hub(|config| config.log_path.clone_from(&log_path));
        let (mut subscriber, _) = Client::subscriber(hub.port(), &["*"], None).await;
        let mut publisher = Client::try_path(hub.port(), "/publish", &[]).await.expect("accepted");
        publisher.say(r#"{"type":"x","n":1}"#).await;
        publisher.say("[]").await;
        publisher.say(r#"{"type":"x","n":2}"#).await;
        assert_eq!(publisher.json().await["data"]["code"], "bad_event");
        for n in [1, 2] {
            assert_eq!(subscriber.json().await["data"], json!({"type": "x", "n": n}), "{log_path:?}");
        }
        let stats = hub.stats();
        assert_eq!((stats.publishers, stats.subscribers, stats.counters.refused), (1, 1, 1));
        hub.stop().await;
        assert_eq!(publisher.json().await["type"], "bye");
        assert_eq!(publisher.close_code().await, 3001);
    }
}

#[tokio::test]
async fn the_port_tells_how_it_is() {
    let hub = hub(|config| config.page = "<p>page</p>".into());
    assert_eq!(ask(hub.port(), "GET / HTTP/1.1", "").await, (200, "<p>page</p>".into()));
    for path in ["healthz", "readyz"] {
        assert_eq!(ask(hub.port(), &format!("GET /{path} HTTP/1.1"), "").await, (200, "ok\n".into()));
    }
    let (code, body) = ask(hub.port(), "GET /stats HTTP/1.1", "").await;
    let stats: Value = serde_json::from_str(&body).expect("json");
    assert_eq!((code, &stats["offset"], &stats["subscribers"]), (200, &json!(0), &json!(0)));
    assert_eq!(stats["epoch"], hub.stats().epoch);
    assert_eq!(ask(hub.port(), "GET /elsewhere HTTP/1.1", "").await.0, 404);
    assert_eq!(ask(hub.port(), "PUT /publish HTTP/1.1", "").await.0, 405);
    assert_eq!(ask(hub.port(), "POST /ws HTTP/1.1", "").await.0, 405);
    assert_eq!(ask(hub.port(), "GET /ws HTTP/1.1", "").await.0, 426);
}

#[tokio::test]
async fn pages_of_other_sites_are_refused() {
    let hub = hub(|config| config.allowed_origins = vec!["https://dash.example".into()]);
    let port = hub.port();
    let foreign = "POST /publish HTTP/1.1\r\nOrigin: https://evil.example";
    assert_eq!(ask(port, foreign, "{}").await.0, 403);
    assert!(Client::try_connect(port, &[("Origin", "https://evil.example")]).await.is_err());
    for origin in ["https://dash.example".to_owned(), format!("http://127.0.0.1:{port}")] {
        Client::try_connect(port, &[("Origin", &origin)]).await.expect("allowed");
    }
}

#[tokio::test]
async fn subprotocols_are_negotiated() {
    let hub = hub(|_| {});
    for spoken in ["sb.v1.json", "sb.emit.v1"] {
        Client::try_connect(hub.port(), &[("Sec-WebSocket-Protocol", spoken)]).await.expect("accepted");
    }
    assert!(Client::try_connect(hub.port(), &[("Sec-WebSocket-Protocol", "chat")]).await.is_err());
}

#[tokio::test]
async fn requests_beyond_the_limits_are_refused() {
    let hub = hub(|_| {});
    let long = format!("GET / HTTP/1.1\r\nX-Long: {}", "x".repeat(40_000));
    let refused = ask(hub.port(), &long, "");
    let (status, _) = refused.await;
    assert!((400..500).contains(&status), "{status}");
}

#[tokio::test]
async fn an_address_that_cannot_be_used_is_named_with_the_remedy() {
    let hub = hub(|_| {});
    let failed = |config| Hub::start(config).err().expect("fails");
    let taken = failed(HubConfig { port: hub.port(), ..HubConfig::default() });
    assert_eq!(taken.kind(), ErrorKind::Bind);
    let text = taken.report();
    assert!(text.contains(&format!("127.0.0.1:{}", hub.port())) && text.contains("another port"), "{text}");
    let elsewhere = failed(HubConfig { host: "203.0.113.1".into(), ..HubConfig::default() });
    assert!(elsewhere.kind() == ErrorKind::Bind && elsewhere.report().contains("203.0.113.1"));
    let config = failed(HubConfig { max_sessions: 0, ..HubConfig::default() });
    assert_eq!(config.kind(), ErrorKind::Config);
}
