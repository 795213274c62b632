//! Peers that mean harm, over real sockets: each is sent away, costs little, and holds up nobody.

mod support;

use std::time::{Duration, Instant};

use bytes::BytesMut;
use futures_util::{SinkExt as _, StreamExt as _};
use safe_broadcaster::hub::Hub;
use safe_broadcaster::wire::block::BlockBuilder;
use serde_json::json;
use support::{Client, PATIENCE, ask, hub};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;

const FIN_TEXT: u8 = 0x81;
const TEXT: u8 = 0x01;
const CONTINUE: u8 = 0x00;
const PING: u8 = 0x89;
const PONG: u8 = 0x8a;

/// A frame as a client sends it, masked with zeros.
fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![first];
    match payload.len() {
        short @ 0..=125 => frame.push(0x80 | short as u8),
        long => {
            frame.push(0x80 | 127);
            frame.extend((long as u64).to_be_bytes());
        }
    }
    frame.extend([0; 4]);
    frame.extend(payload);
    frame
}

/// A WebSocket whose bytes are ours.
async fn raw(hub: &Hub, path: &str) -> TcpStream {
    let mut socket = TcpStream::connect(("127.0.0.1", hub.port())).await.expect("connects");
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
         Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
        hub.port()
    );
    socket.write_all(request.as_bytes()).await.expect("sent");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(socket.read_u8().await.expect("an answer"));
    }
    assert!(head.starts_with(b"HTTP/1.1 101"), "{}", String::from_utf8_lossy(&head));
    socket
}

/// Reads frames of the hub up to its close, whose code it returns. All of them are short.
async fn closed(socket: &mut TcpStream) -> u16 {
    let read = async {
        loop {
            let first = socket.read_u8().await.expect("a frame");
            let length = match socket.read_u8().await.expect("a length") {
                126 => usize::from(socket.read_u16().await.expect("a length")),
                short => usize::from(short),
            };
            let mut payload = vec![0; length];
            socket.read_exact(&mut payload).await.expect("a payload");
            if first == 0x88 {
                return u16::from_be_bytes([payload[0], payload[1]]);
            }
        }
    };
    tokio::time::timeout(PATIENCE, read).await.expect("in time")
}

/// Sends without end, while the hub is asked how it is; returns the code with which the flood was closed.
async fn flood(hub: &Hub, path: &str, begin: &[u8], again: &[u8]) -> u16 {
    let mut socket = raw(hub, path).await;
    socket.write_all(begin).await.expect("sent");
    let (mut reader, mut writer) = socket.split();
    let many = again.repeat(64 * 1024 / again.len());
    let sending = async {
        while writer.write_all(&many).await.is_ok() {}
        std::future::pending::<()>().await;
    };
    let asking = async {
        loop {
            let asked = Instant::now();
            assert_eq!(ask(hub.port(), "GET /healthz HTTP/1.1", "").await.0, 200);
            assert!(asked.elapsed() < Duration::from_secs(5), "the hub's thread was held");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    let reading = async {
        let mut all = Vec::new();
        let mut some = [0; 4096];
        loop {
            match reader.read(&mut some).await {
                Ok(0) | Err(_) => return all,
                Ok(read) => all.extend_from_slice(&some[..read]),
            }
        }
    };
    let all = tokio::select! {
        all = tokio::time::timeout(PATIENCE, reading) => all.expect("closed in time"),
        () = sending => unreachable!(),
        () = asking => unreachable!(),
    };
    // Pongs are empty here, so the close is found by its first byte.
    let at = all.iter().rposition(|byte| *byte == 0x88).expect("a close");
    u16::from_be_bytes([all[at + 2], all[at + 3]])
}

#[tokio::test]
async fn floods_of_pings_pongs_frames_and_fragments_are_ended() {
    let hub = hub(|_| {});
    let floods: [(&[u8], Vec<u8>); 5] = [
        (b"", frame(PING, b"")),
        (b"", frame(PONG, b"")),
        (b"", frame(FIN_TEXT, br#"{"type":"ping"}"#)),
        (&frame(TEXT, b""), frame(CONTINUE, b"")),
        (&frame(TEXT, b""), frame(CONTINUE, b" ")),
    ];
    for (begin, again) in floods {
        assert_eq!(flood(&hub, "/ws", begin, &again).await, 3503, "{again:?}");
    }
    assert_eq!(hub.stats().closes[&3503], 5);
}

#[tokio::test]
async fn fragments_without_end_do_not_hold_the_hub_from_a_publisher_either() {
    let hub = hub(|_| {});
    let mut socket = raw(&hub, "/publish").await;
    socket.write_all(&frame(TEXT, b"")).await.expect("sent");
    let many = frame(CONTINUE, b"").repeat(10_000);
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(2) {
        socket.write_all(&many).await.expect("taken");
        let asked = Instant::now();
        assert_eq!(ask(hub.port(), "GET /healthz HTTP/1.1", "").await.0, 200);
        assert!(asked.elapsed() < Duration::from_secs(1), "the hub's thread was held");
    }
}

#[tokio::test]
async fn an_ordinary_pace_is_no_flood() {
    let hub = hub(|config| config.frame_rate = 50.0);
    let (mut client, _) = Client::subscriber(hub.port(), &["*"], None).await;
    for _ in 0..100 {
        client.say(r#"{"type":"ping"}"#).await;
        assert_eq!(client.json().await["type"], "pong");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_message_that_is_never_finished_is_bounded() {
    let hub = hub(|config| {
        config.max_subscriber_message_bytes = 4096;
        config.frame_rate = 1e6;
    });
    let mut socket = raw(&hub, "/ws").await;
    socket.write_all(&frame(TEXT, &[b' '; 4000])).await.expect("sent");
    socket.write_all(&frame(CONTINUE, &[b' '; 4000])).await.expect("sent");
    assert_eq!(closed(&mut socket).await, 3502);
    let mut socket = raw(&hub, "/ws").await;
    // A header that promises more than is taken is enough.
    socket.write_all(&frame(FIN_TEXT, &[b' '; 5000])[..20]).await.expect("sent");
    assert_eq!(closed(&mut socket).await, 3502);
}

#[tokio::test]
async fn frames_that_break_the_websocket_protocol_are_refused() {
    let hub = hub(|_| {});
    let unmasked = [FIN_TEXT, 2, b'{', b'}'];
    for bytes in [
        &unmasked[..],
        &frame(0xc1, b"{}"), // a reserved bit
        &frame(0x83, b"{}"), // a reserved opcode
        &frame(0x8b, b""),   // a reserved control opcode
        &frame(0x09, b""),   // a ping in parts
        &frame(CONTINUE, b""),
        &frame(FIN_TEXT, b"\"\xff\""),
        &[frame(TEXT, b"a"), frame(TEXT, b"b")].concat(),
        &frame(PING, &[0; 126]),
    ] {
        let mut socket = raw(&hub, "/ws").await;
        socket.write_all(bytes).await.expect("sent");
        assert_eq!(closed(&mut socket).await, 3501, "{bytes:?}");
    }
}

#[tokio::test]
async fn json_nested_without_end_overflows_nothing() {
    const LEVELS: usize = 100_000;
    let hub = hub(|config| config.max_subscriber_message_bytes = 1 << 20);
    let deep = format!("{}{}", "[".repeat(LEVELS), "]".repeat(LEVELS));
    let (mut client, _) = Client::subscriber(hub.port(), &["none"], None).await;
    for frame in [
        format!(r#"{{"type":"subscribe","data":{deep}}}"#),
        format!(r#"{{"type":"subscribe","data":{{"events":{deep}}}}}"#),
        format!(r#"{{"type":"auth","data":{deep}}}"#),
        deep.clone(),
    ] {
        client.say(&frame).await;
        assert_eq!(client.json().await["data"]["code"], "bad_frame");
    }
    // Whatever an event holds is passed on unseen.
    let event = format!(r#"{{"type":"x","deep":{deep}}}"#);
    assert_eq!(ask(hub.port(), "POST /publish HTTP/1.1", &event).await.0, 200);
    assert_eq!(ask(hub.port(), "POST /publish HTTP/1.1", &deep).await.0, 400);
    assert_eq!(ask(hub.port(), "POST /publish HTTP/1.1", &format!(r#"{{"type":{deep}}}"#)).await.0, 400);
    let mut emitter = Client::emitter(hub.port()).await;
    emitter.hello("ada", "e", 1).await;
    let mut block = BlockBuilder::new(1, BytesMut::new());
    block.push(event.as_bytes());
    emitter.block(&block.seal().expect("not empty")).await;
    emitter.acked(1).await;
}

#[tokio::test]
async fn every_frame_cut_short_or_of_another_type_is_answered() {
    let hub = hub(|config| config.frame_rate = 1e5);
    let (mut client, _) = Client::subscriber(hub.port(), &["none"], None).await;
    let frames = [
        json!({"type": "auth", "data": {"token": "t"}}),
        json!({"type": "subscribe", "data": {"events": ["a"], "since": {"epoch": "e", "offset": 1}}}),
        json!({"type": "unsubscribe", "data": {"events": ["a"]}}),
        json!({"type": "ack", "data": {"sequence": 1}}),
        json!({"type": "ping"}),
        json!({"type": "pong"}),
    ];
    for frame in &frames {
        let text = frame.to_string();
        for cut in 0..text.len() {
            client.say(&text[..cut]).await;
            assert_eq!(client.json().await["data"]["code"], "bad_frame", "{}", &text[..cut]);
        }
    }
    for (frame, field) in [(0, "token"), (1, "events"), (1, "since"), (2, "events"), (3, "sequence")] {
        for wrong in [json!(-1), json!(true), json!({}), json!([[]]), json!(1e300)] {
            let mut mistyped = frames[frame].clone();
            mistyped["data"][field] = wrong;
            client.say(&mistyped.to_string()).await;
            assert_eq!(client.json().await["data"]["code"], "bad_frame", "{mistyped}");
        }
    }
}

#[tokio::test]
async fn nothing_is_heard_after_a_close() {
    let hub = hub(|_| {});
    let (mut client, _) = Client::subscriber(hub.port(), &["*"], None).await;
    client.0.send(Message::Close(None)).await.expect("sent");
    let last = tokio::time::timeout(PATIENCE, client.0.next()).await.expect("in time");
    assert!(matches!(last, Some(Ok(Message::Close(_)))), "{last:?}");
    let mut socket = raw(&hub, "/ws").await;
    socket.write_all(&[frame(0x88, &[3, 0xe8]), frame(FIN_TEXT, br#"{"type":"ping"}"#)].concat()).await.expect("sent");
    assert_eq!(closed(&mut socket).await, 1000);
}

#[tokio::test]
async fn slow_heads_and_slow_bodies_have_a_deadline() {
    let hub = hub(|_| {});
    let slow = async |head: &[u8]| {
        let mut socket = TcpStream::connect(("127.0.0.1", hub.port())).await.expect("connects");
        socket.write_all(head).await.expect("sent");
        let begun = Instant::now();
        let (mut reader, mut writer) = socket.split();
        let dripping = async {
            while writer.write_all(b"x").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            std::future::pending::<()>().await;
        };
        let mut answer = Vec::new();
        tokio::select! {
            () = dripping => unreachable!(),
            read = tokio::time::timeout(PATIENCE, reader.read_to_end(&mut answer)) => drop(read.expect("ended")),
        }
        assert!(begun.elapsed() >= Duration::from_secs(5), "it had its chance");
        answer
    };
    let body = b"POST /publish HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n";
    let (head, body) = tokio::join!(slow(b"GET /stats HTTP/1.1\r\nX-Slow: "), slow(body));
    assert!(head.is_empty() || head.starts_with(b"HTTP/1.1 408"), "{}", String::from_utf8_lossy(&head));
    assert!(body.starts_with(b"HTTP/1.1 408"), "{}", String::from_utf8_lossy(&body));
}

#[tokio::test]
async fn more_sessions_than_allowed_are_told_to_come_back() {
    let of = hub(|config| config.max_sessions_per_address = Some(2));
    let [one, _two] = [raw(&of, "/ws").await, raw(&of, "/ws").await];
    let refused = async |hub: &Hub| match Client::try_connect(hub.port(), &[]).await {
        Err(tokio_tungstenite::tungstenite::Error::Http(answer)) => {
            assert_eq!(answer.headers()["retry-after"], "1");
            answer.status().as_u16()
        }
        other => panic!("not refused: {:?}", other.is_ok()),
    };
    assert_eq!(refused(&of).await, 429);
    drop(one);
    let deadline = Instant::now() + PATIENCE;
    while Client::try_connect(of.port(), &[]).await.is_err() {
        assert!(Instant::now() < deadline, "the place was not given back");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let of = hub(|config| config.connect_rate = 1.0);
    let _first = raw(&of, "/ws").await;
    assert_eq!(refused(&of).await, 503);
}
