//! How much memory a hub takes when its clients mean harm: a bound, whatever they send or do not read.
//!
//! The hub is this test binary, started once more, so that only its own memory is measured: the most that was ever
//! resident (`VmHWM`). The bounds are generous, and far below what each attack would take of a hub without its limit.
#![cfg(target_os = "linux")]
#![expect(clippy::print_stderr, reason = "how much it was")]

mod support;

use std::io::{BufRead as _, BufReader, Read as _};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use safe_broadcaster::hub::{Hub, HubConfig};
use serde_json::{Value, json};
use support::{Client, PATIENCE, ask};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio_tungstenite::tungstenite::Message;

const CHILD: &str = "SB_TEST_HUB";
const MIB: u64 = 1 << 20;

/// The child: runs a hub until its standard input ends. Does nothing in the parent.
#[test]
fn child_runs_a_hub() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let hub = Hub::start(HubConfig { port: 0, frame_rate: 1e5, ..HubConfig::default() }).expect("starts");
    eprintln!("port {}", hub.port());
    drop(std::io::stdin().read_to_end(&mut Vec::new()));
}

struct Victim {
    child: Child,
    port: u16,
    before: u64,
}

impl Victim {
    fn start() -> Self {
        let mut child = Command::new(std::env::current_exe().expect("known"))
            .args(["--exact", "child_runs_a_hub", "--test-threads=1", "--nocapture"])
            .env(CHILD, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("starts");
        let mut lines = BufReader::new(child.stderr.take().expect("piped")).lines().map_while(Result::ok);
        let port = lines.find_map(|line| line.strip_prefix("port ")?.parse().ok()).expect("a port");
        let mut victim = Self { child, port, before: 0 };
        victim.before = victim.peak();
        victim
    }

    /// The most memory that it ever had.
    fn peak(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).expect("it lives");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("known");
        line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") << 10
    }

    fn took(&self, what: &str, most: u64) {
        let took = self.peak() - self.before;
        eprintln!("{what}: {} MiB", took / MIB);
        assert!(took < most, "{what} took {} MiB of the hub's memory", took / MIB);
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        drop(self.child.wait());
    }
}

/// Sends frames without reading for a while, or until the hub has had enough.
async fn flood(port: u16, begin: &[u8], again: &[u8]) {
    let mut socket = TcpStream::connect(("127.0.0.1", port)).await.expect("connects");
    let request = "GET /ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                   Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    socket.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = [0; 12];
    socket.read_exact(&mut answer).await.expect("answered");
    assert_eq!(&answer, b"HTTP/1.1 101");
    let many = again.repeat((64 << 10) / again.len());
    let sending = async {
        socket.write_all(begin).await?;
        loop {
            socket.write_all(&many).await?;
        }
    };
    let ended: Result<std::io::Result<()>, _> = tokio::time::timeout(Duration::from_secs(3), sending).await;
    drop(ended); // that it was sent away, or still waits, is told by other tests
}

#[tokio::test]
async fn floods_of_frames_take_no_memory() {
    let victim = Victim::start();
    let masked = |first: u8, payload: &[u8]| [&[first, 0x80 | payload.len() as u8, 0, 0, 0, 0], payload].concat();
    let subscribe = br#"{"type":"subscribe","data":{"events":["*"]}}"#;
    let floods = [
        (Vec::new(), masked(0x89, &[b'p'; 125])),
        (Vec::new(), masked(0x8a, b"")),
        (Vec::new(), masked(0x81, br#"{"type":"ping"}"#)),
        (Vec::new(), masked(0x81, subscribe)),
        (masked(0x01, b""), masked(0x00, b"")),
        (masked(0x01, b" "), masked(0x00, &[b' '; 125])),
    ];
    let attackers = floods.iter().flat_map(|(begin, again)| (0..5).map(|_| flood(victim.port, begin, again)));
    futures_util::future::join_all(attackers).await;
    victim.took("floods", 64 * MIB);
}

#[tokio::test]
async fn sessions_that_read_nothing_take_their_queues_and_no_more() {
    let victim = Victim::start();
    let mut deaf = Vec::new();
    for n in 0..60 {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_recv_buffer_size(4096).expect("set");
        let socket = socket.connect(([127, 0, 0, 1], victim.port).into()).await.expect("connects");
        let (mut client, _) = tokio_tungstenite::client_async("ws://x/ws", socket).await.expect("accepted");
        let slow = ["disconnect", "conflate", "drop_with_gap"][n % 3];
        let subscribe = json!({"type": "subscribe", "data": {"events": ["*"], "slow": slow}}).to_string();
        client.send(Message::text(subscribe)).await.expect("sent");
        client.next().await.expect("an answer").expect("subscribed");
        deaf.push(client);
    }
    // Each event is kept once, however many wait for it.
    for n in 0..2000 {
        let event = json!({"type": "x", "key": n.to_string(), "pad": "x".repeat(100_000)}).to_string();
        let (status, _) = ask(victim.port, "POST /publish HTTP/1.1", &event).await;
        assert_eq!(status, 200);
    }
    victim.took("deaf sessions", 96 * MIB);
}

#[tokio::test]
async fn subscriptions_take_what_they_say_and_no_more() {
    let victim = Victim::start();
    assert_eq!(ask(victim.port, "POST /publish HTTP/1.1", "{}").await.0, 200);
    let (mut client, first) = Client::subscriber(victim.port, &["none"], None).await;
    let since = json!({"epoch": first["epoch"], "offset": 0});
    // Another filter each time, to be recovered through: nothing of it may stay.
    for n in 0..3000 {
        let patterns: Vec<_> = (0..60).map(|m| format!("{n}.{m}.{}", "x".repeat(1000))).collect();
        let say = |kind: &str, data: Value| json!({"type": kind, "data": data}).to_string();
        client.say(&say("subscribe", json!({"events": patterns, "since": since}))).await;
        assert_eq!(client.json().await["recovered"], true);
        client.say(&say("unsubscribe", json!({"events": patterns}))).await;
        assert_eq!(client.json().await["action"], "unsubscribed");
    }
    victim.took("recoveries", 80 * MIB);
    // As many patterns as a session may have, as long and as deep as they may be, in 40 sessions.
    let mut deep = Vec::new();
    for n in 0..40 {
        let (mut client, _) = Client::subscriber(victim.port, &["none"], None).await;
        for part in 0..5 {
            let pattern = |m: usize| format!("{n}-{part}-{m}{}.{}", ".a".repeat(30), "x".repeat(900));
            let patterns: Vec<_> = (0..50).map(pattern).collect();
            client.say(&json!({"type": "subscribe", "data": {"events": patterns}}).to_string()).await;
            assert_eq!(client.json().await["action"], "subscribed");
        }
        deep.push(client);
    }
    victim.took("patterns", 160 * MIB);
    let hub = tokio::time::timeout(PATIENCE, ask(victim.port, "GET /healthz HTTP/1.1", "")).await.expect("in time");
    assert_eq!(hub.0, 200);
}
