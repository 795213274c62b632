//! A real hub process, killed again and again while emitters flood and a subscriber reads: with a durable log nothing
//! is lost, nothing comes twice, nothing changes places.
//!
//! The hub is this test binary, started once more with `SB_TEST_LOG` set. The moments of the kills come from a seed,
//! which is printed and can be given as `SB_SEED`.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use futures_util::{SinkExt as _, StreamExt as _};
use safe_broadcaster::hub::{Hub, HubConfig};
use safe_broadcaster::wire::block::BlockBuilder;
use safe_broadcaster::wire::frame::{EmitterFrame, HubFrame};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};

/// Kills; the environment variable `SB_KILLS` asks for more.
const KILLS: usize = 25;
const EMITTERS: usize = 3;
const LOG: &str = "SB_TEST_LOG";
const PORT: &str = "SB_TEST_PORT";
/// Events that an emitter has unacknowledged at most.
const WINDOW: u64 = 4000;

/// The child: runs a hub until it is killed. Does nothing in the parent.
#[test]
fn child_runs_a_hub_until_it_is_killed() {
    let Some(log) = std::env::var_os(LOG) else { return };
    let port = std::env::var(PORT).expect("set").parse().expect("a port");
    let config = HubConfig {
        port,
        log_path: Some(log.into()),
        replay_events: 1_000_000,
        replay_bytes: 1 << 30,
        session_queue_bytes: 64 << 20,
        ..HubConfig::default()
    };
    let hub = Hub::start(config).expect("starts");
    std::fs::write(std::env::var_os("SB_TEST_READY").expect("set"), hub.port().to_string()).expect("told");
    // The parent's end of standard input closes if the parent dies before it kills.
    for line in BufReader::new(std::io::stdin()).lines() {
        drop(line);
    }
}

async fn spawn(log: &Path, port: u16) -> (Child, u16) {
    spawn_with(log, port, "exec \"$0\" \"$@\"").await
}

/// Starts the child by a line of shell that runs `"$0" "$@"`.
async fn spawn_with(log: &Path, port: u16, shell: &str) -> (Child, u16) {
    let ready = log.with_extension("ready");
    std::fs::remove_file(&ready).unwrap_or_default();
    let mut child = Command::new("sh")
        .args(["-c", shell])
        .arg(std::env::current_exe().expect("known"))
        .args(["--exact", "child_runs_a_hub_until_it_is_killed", "--test-threads=1"])
        .env(LOG, log)
        .env(PORT, port.to_string())
        .env("SB_TEST_READY", &ready)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("starts");
    for _ in 0..2000 {
        if let Ok(port) = std::fs::read_to_string(&ready).unwrap_or_default().parse() {
            return (child, port);
        }
        assert!(child.try_wait().expect("asked").is_none(), "the hub did not start");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("the hub did not start in time");
}

/// What all tasks of the test know.
#[derive(Default)]
struct World {
    port: AtomicU16,
    /// The subscriber has its first position.
    listens: AtomicBool,
    /// The emitters send nothing new any more.
    over: AtomicBool,
    /// How many events there are, once that is known.
    total: AtomicU64,
    /// How many frames the subscriber has got.
    frames: AtomicU64,
    /// The hub is not killed now.
    calm: AtomicBool,
    /// What the hub said of itself last.
    told: Mutex<Option<String>>,
}

type Socket = WebSocketStream<TcpStream>;

async fn connect(world: &World, protocol: &'static str) -> Option<Socket> {
    let port = world.port.load(Ordering::Relaxed);
    let mut request = format!("ws://127.0.0.1:{port}/ws").into_client_request().expect("valid");
    request.headers_mut().insert("Sec-WebSocket-Protocol", protocol.parse().expect("valid"));
    let socket = TcpStream::connect(("127.0.0.1", port)).await.ok()?;
    tokio_tungstenite::client_async(request, socket).await.ok().map(|(socket, _)| socket)
}

/// Next text; `None` if the connection is gone.
async fn text(socket: &mut Socket) -> Option<String> {
    loop {
        match socket.next().await? {
            Ok(Message::Text(text)) => return Some(text.to_string()),
            Ok(Message::Close(frame)) => {
                let code = frame.map_or(1005, |frame| frame.code.into());
                assert!(code < 3500, "refused with {code}");
                return None;
            }
            Ok(_) => {}
            Err(_) => return None,
        }
    }
}

/// An emitter with an outbox: what is not acknowledged is sent again on the next connection. Returns its last seq.
async fn emitter(world: Arc<World>, name: usize, seed: u64) -> u64 {
    let mut rng = fastrand::Rng::with_seed(seed);
    let (mut made, mut acked) = (0, 0);
    loop {
        if world.over.load(Ordering::Relaxed) && acked == made {
            return made;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
        let Some(mut socket) = connect(&world, "sb.emit.v1").await else { continue };
        let hello = EmitterFrame::Hello { emitter: format!("e{name}"), epoch: "1".into(), next: acked + 1 };
        if socket.send(Message::text(hello.encode())).await.is_err() {
            continue;
        }
        let Some(welcome) = text(&mut socket).await else { continue };
        let HubFrame::Welcome { have, .. } = HubFrame::decode(&welcome).expect("a frame") else {
            panic!("no welcome: {welcome}");
        };
        assert!((acked..=made).contains(&have), "e{name}: the hub has {have}, acknowledged are {acked} of {made}");
        acked = have;
        // Sometimes everything unacknowledged by an older count, so that duplicates are sent on purpose.
        let mut sent = if rng.bool() { have } else { have.saturating_sub(rng.u64(..50)) };
        let (mut out, mut input) = socket.split();
        'link: loop {
            if world.over.load(Ordering::Relaxed) && acked == made {
                return made;
            }
            while sent < acked + WINDOW {
                let over = world.over.load(Ordering::Relaxed);
                if over && sent == made {
                    break;
                }
                let most = if over { made } else { sent + rng.u64(1..300) };
                let upto = most.min(sent + 300);
                if out.send(Message::Binary(block(name, sent + 1, upto))).await.is_err() {
                    break 'link;
                }
                (sent, made) = (upto, made.max(upto));
            }
            match input.next().await {
                Some(Ok(Message::Text(frame))) => match HubFrame::decode(&frame).expect("a frame") {
                    HubFrame::Ack { upto } => acked = acked.max(upto),
                    other => panic!("{other:?}"),
                },
                Some(Ok(_)) => {}
                Some(Err(WsError::Protocol(_) | WsError::Io(_) | WsError::ConnectionClosed)) | None => break,
                Some(Err(other)) => panic!("{other}"),
            }
        }
    }
}

fn block(name: usize, first: u64, last: u64) -> bytes::Bytes {
    let mut builder = BlockBuilder::new(first, BytesMut::new());
    let filling = "x".repeat(100);
    for n in first..=last {
        builder.push(format!(r#"{{"type":"t","e":{name},"n":{n},"x":"{filling}"}}"#).as_bytes());
    }
    builder.seal().expect("not empty").into_bytes()
}

/// What a subscriber counted.
#[derive(Debug, Default, PartialEq, Eq)]
struct Count {
    events: u64,
    lost: u64,
    duplicated: u64,
    reordered: u64,
    not_recovered: u64,
    broken_chain: u64,
}

/// How long nothing may come from a hub that lives while events are missing. A busy machine is slow, but it goes on.
const SILENCE: Duration = Duration::from_secs(60);
/// After so many hubs that lived too short to say anything, as happens on a busy machine, the next one lives until it has.
const FRUITLESS: usize = 10;

/// Reads until every event is there, with resume.
async fn subscriber(world: Arc<World>) -> Count {
    let (mut count, mut seen) = (Count::default(), [0; EMITTERS]);
    let mut position: Option<(String, u64)> = None;
    let mut heard = Instant::now();
    loop {
        tokio::time::sleep(Duration::from_millis(2)).await;
        if !world.calm.load(Ordering::Relaxed) {
            heard = Instant::now();
        }
        let total = world.total.load(Ordering::Relaxed);
        assert!(heard.elapsed() < SILENCE, "nothing comes any more: {count:?} of {total}, {seen:?} at {position:?}");
        let Some(mut socket) = connect(&world, "sb.v1.json").await else { continue };
        let mut data = json!({"events": ["*"]});
        // Before the first position, everything from the start of the log.
        if let Some((epoch, offset)) = &position {
            data["since"] = json!({"epoch": epoch, "offset": offset});
        }
        let subscribe = json!({"type": "subscribe", "data": data}).to_string();
        if socket.send(Message::text(subscribe)).await.is_err() {
            continue;
        }
        loop {
            // More than there are is a failure that the count tells.
            if count.events >= world.total.load(Ordering::Relaxed) {
                return count;
            }
            // The total may become known when everything is here already.
            let Ok(frame) = tokio::time::timeout(Duration::from_millis(200), text(&mut socket)).await else {
                if heard.elapsed() < SILENCE {
                    continue;
                }
                break;
            };
            let Some(frame) = frame else { break };
            heard = Instant::now();
            world.frames.fetch_add(1, Ordering::Relaxed);
            let frame: Value = serde_json::from_str(&frame).expect("json");
            match frame["action"].as_str().or(frame["type"].as_str()) {
                Some("subscribed") => {
                    let epoch = frame["epoch"].as_str().expect("an epoch").to_owned();
                    if let Some((before, _)) = &position {
                        count.not_recovered += u64::from(*before != epoch || frame["recovered"] != true);
                    } else {
                        position = Some((epoch, frame["offset"].as_u64().expect("an offset")));
                        world.listens.store(true, Ordering::Relaxed);
                    }
                }
                Some("event") => {
                    let (seq, prev) = (frame["seq"].as_u64().expect("seq"), frame["prev"].as_u64().expect("prev"));
                    let at = &mut position.as_mut().expect("subscribed first").1;
                    count.broken_chain += u64::from(prev != *at);
                    *at = seq;
                    let (e, n) = (frame["data"]["e"].as_u64().expect("e"), frame["data"]["n"].as_u64().expect("n"));
                    let last = &mut seen[e as usize];
                    match n {
                        n if n == *last + 1 => {}
                        n if n > *last => count.lost += n - *last - 1,
                        n if n == *last => count.duplicated += 1,
                        _ => count.reordered += 1,
                    }
                    *last = n.max(*last);
                    count.events += 1;
                }
                // The disk refuses, or has room again.
                Some("service_status") => {
                    *world.told.lock().expect("unpoisoned") = frame["data"]["status"].as_str().map(str::to_owned);
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

#[tokio::test]
async fn kill_9_loses_repeats_and_reorders_nothing() {
    if std::env::var_os(LOG).is_some() {
        return;
    }
    let seed = std::env::var("SB_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| fastrand::u64(..));
    #[expect(clippy::print_stderr, reason = "a failure is repeated with it")]
    {
        eprintln!("SB_SEED={seed}");
    }
    let mut rng = fastrand::Rng::with_seed(seed);
    let dir = tempfile::tempdir().expect("a directory");
    let log = dir.path().join("hub.db");
    let world = Arc::new(World::default());
    world.total.store(u64::MAX, Ordering::Relaxed);
    let (mut hub, port) = spawn(&log, 0).await;
    world.port.store(port, Ordering::Relaxed);
    let mut reading = tokio::spawn(subscriber(world.clone()));
    while !world.listens.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(2)).await; // it hears everything from the start
    }
    let emitters: Vec<_> = (0..EMITTERS).map(|name| tokio::spawn(emitter(world.clone(), name, rng.u64(..)))).collect();
    let kills = std::env::var("SB_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(KILLS);
    let mut fruitless = 0;
    for _ in 0..kills {
        let before = world.frames.load(Ordering::Relaxed);
        let silent = || world.frames.load(Ordering::Relaxed) == before;
        tokio::time::sleep(Duration::from_millis(rng.u64(1..200))).await;
        world.calm.store(fruitless == FRUITLESS, Ordering::Relaxed);
        while fruitless == FRUITLESS && silent() && !reading.is_finished() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        world.calm.store(false, Ordering::Relaxed);
        fruitless = if silent() { fruitless + 1 } else { 0 };
        hub.kill().expect("killed"); // SIGKILL
        hub.wait().expect("gone");
        assert!(!reading.is_finished(), "the subscriber failed: {:?}", (&mut reading).await);
        hub = spawn(&log, port).await.0;
    }
    world.calm.store(true, Ordering::Relaxed);
    tokio::time::sleep(Duration::from_millis(100)).await;
    world.over.store(true, Ordering::Relaxed);
    let mut total = 0;
    for emitter in emitters {
        total += tokio::time::timeout(Duration::from_secs(60), emitter).await.expect("in time").expect("acknowledged");
    }
    world.total.store(total, Ordering::Relaxed);
    let count = reading.await.expect("counted");
    hub.kill().expect("killed");
    hub.wait().expect("gone");
    #[expect(clippy::print_stderr, reason = "how much was tried")]
    {
        eprintln!("{kills} kills, {total} events: {count:?}");
    }
    assert_eq!(count, Count { events: total, ..Count::default() }, "seed {seed}");
    assert!(total > 1000, "{total} events are no flood");
}

/// Raises what the child may write, as an administrator makes room on a disk.
fn give_room(child: &Child) {
    let pid = child.id().to_string();
    let raised = Command::new("prlimit").args(["--pid", &pid, "--fsize=unlimited"]).status().expect("runs");
    assert!(raised.success());
}

async fn stats(port: u16) -> Value {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let mut socket = TcpStream::connect(("127.0.0.1", port)).await.expect("connects");
    let request = "GET /stats HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n";
    socket.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    socket.read_to_string(&mut answer).await.expect("read");
    serde_json::from_str(answer.split_once("\r\n\r\n").expect("a body").1).expect("json")
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_full_disk_is_said_and_nothing_is_lost_when_it_has_room_again() {
    if std::env::var_os(LOG).is_some() {
        return;
    }
    if Command::new("prlimit").arg("--version").output().is_err() {
        #[expect(clippy::print_stderr, reason = "a test that is skipped says why")]
        return eprintln!("skipped: there is no prlimit, which raises the limit of the full disk");
    }
    let dir = tempfile::tempdir().expect("a directory");
    let world = Arc::new(World::default());
    world.total.store(u64::MAX, Ordering::Relaxed);
    // 4 MiB for the largest file; the signal that goes with it is ignored, so that a write fails as on a full disk.
    let (mut hub, port) =
        spawn_with(&dir.path().join("hub.db"), 0, "trap '' XFSZ; ulimit -S -f 8192; exec \"$0\" \"$@\"").await;
    world.port.store(port, Ordering::Relaxed);
    let reading = tokio::spawn(subscriber(world.clone()));
    while !world.listens.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let emitting = tokio::spawn(emitter(world.clone(), 0, 7));
    let degraded = loop {
        let stats = stats(port).await;
        if stats["degraded"] == true && stats["log_failures"].as_u64() > Some(3) {
            break stats;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert!(degraded["log_error"].as_str().is_some_and(|error| error.contains("hub.db")), "{degraded}");
    while world.told.lock().expect("unpoisoned").as_deref() != Some("degraded") {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let before = degraded["offset"].as_u64().expect("offset");
    give_room(&hub);
    world.calm.store(true, Ordering::Relaxed);
    while stats(port).await["offset"].as_u64() < Some(before + 10_000) {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    world.over.store(true, Ordering::Relaxed);
    let total = tokio::time::timeout(Duration::from_secs(30), emitting).await.expect("in time").expect("acknowledged");
    world.total.store(total, Ordering::Relaxed);
    let count = reading.await.expect("counted");
    assert_eq!(count, Count { events: total, ..Count::default() });
    let stats = stats(port).await;
    assert_eq!((&stats["degraded"], &stats["log_error"]), (&json!(false), &Value::Null));
    assert_eq!(world.told.lock().expect("unpoisoned").as_deref(), Some("healthy"));
    hub.kill().expect("killed");
    hub.wait().expect("gone");
}
