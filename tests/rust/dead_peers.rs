//! All emitters of a process share one thread. Peers of some that are dead, each in another way, do not touch the
//! delivery of the others.

mod support;

#[path = "support/spill.rs"]
mod spill;

use std::net::TcpListener;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use safe_broadcaster::emitter::Emitter;
use safe_broadcaster::emitter::config::{Durability, EmitterConfig};
use safe_broadcaster::emitter::link::{Endpoint, Target};
use safe_broadcaster::emitter::outbox::Pushed;
use socket2::{Domain, Socket, Type};
use support::{PATIENCE, hub};

fn emitter(home: &Path, name: &str, port: u16) -> Emitter {
    let config = EmitterConfig {
        spill_path: home.join(format!("{name}.db")),
        backoff_initial: Duration::from_millis(20),
        ack_timeout: Duration::from_millis(300),
        connect_timeout: Duration::from_millis(300),
        breaker_threshold: 1000,
        max_event_bytes: 64 << 10,
        ..spill::config(20_000)
    };
    let target = Target::Url(Endpoint::parse(&format!("ws://127.0.0.1:{port}/ws")).expect("a URL"));
    Emitter::new(config, target).expect("valid")
}

fn event(n: u64) -> Vec<u8> {
    format!(r#"{{"type":"t","topic":"x","n":{n},"pad":"{}"}}"#, "x".repeat(2000)).into_bytes()
}

/// Shakes hands, and never reads again.
fn deaf() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let port = listener.local_addr().expect("bound").port();
    std::thread::spawn(move || {
        let kept: Vec<_> = listener.incoming().flatten().map(tokio_tungstenite::tungstenite::accept).collect();
        drop(kept);
    });
    port
}

/// Takes connections, and says nothing; and one whose queue is full, where not even the connection is answered.
fn silent() -> (Socket, u16, Vec<Socket>) {
    let address = |port: u16| socket2::SockAddr::from(std::net::SocketAddr::from(([127, 0, 0, 1], port)));
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    socket.bind(&address(0)).expect("bound");
    socket.listen(0).expect("listens");
    let port = socket.local_addr().expect("bound").as_socket().expect("an address").port();
    let mut waiting = Vec::new();
    loop {
        let client = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        let done = client.connect_timeout(&address(port), Duration::from_millis(100));
        waiting.push(client);
        if done.is_err() {
            return (socket, port, waiting);
        }
    }
}

/// How long the slowest of some events took to be confirmed, one after the other.
fn slowest(emitter: &Emitter, first: u64) -> Duration {
    let mut slowest = Duration::ZERO;
    for n in first..first + 200 {
        let begun = Instant::now();
        let pushed = emitter.push(&event(n), Durability::Memory, None).expect("accepted");
        let Pushed::Accepted { seq, live: true, provisional, .. } = pushed else { panic!("not live: {pushed:?}") };
        let (sender, confirmed) = mpsc::channel();
        let reply = Box::new(move |outcome| drop(sender.send(outcome)));
        emitter.await_level(Durability::Delivered, seq, provisional, reply);
        confirmed.recv_timeout(PATIENCE).expect("in time").expect("confirmed");
        slowest = slowest.max(begun.elapsed());
    }
    slowest
}

#[test]
fn peers_that_are_dead_do_not_touch_what_others_in_the_process_deliver() {
    let home = tempfile::tempdir().expect("writable");
    let hub = hub(|_| {});
    let live = emitter(home.path(), "live", hub.port());
    let (sender, started) = mpsc::channel();
    live.start(Box::new(move |outcome| drop(sender.send(outcome))));
    started.recv_timeout(PATIENCE).expect("in time").expect("live");
    let alone = slowest(&live, 1);

    let taken = TcpListener::bind("127.0.0.1:0").expect("bound"); // nobody accepts
    let (_socket, unanswered, _waiting) = silent();
    let ports = [deaf(), taken.local_addr().expect("bound").port(), unanswered];
    let dead: Vec<_> = (0..9).map(|n| emitter(home.path(), &format!("dead{n}"), ports[n % 3])).collect();
    for each in &dead {
        each.start(Box::new(drop));
        for n in 0..3000 {
            each.push(&event(n), Durability::Memory, None).expect("accepted"); // more than memory may hold
        }
    }
    let deadline = Instant::now() + PATIENCE;
    while dead.iter().any(|each| each.stats().snapshot.spill_bytes == 0) {
        assert!(Instant::now() < deadline, "they are no trouble at all");
        std::thread::sleep(Duration::from_millis(5));
    }
    let beside = slowest(&live, 1000);
    assert!(beside < alone.max(Duration::from_millis(250)) * 4, "alone {alone:?}, beside dead peers {beside:?}");
    let stats = live.stats();
    assert_eq!((stats.spilled(), stats.snapshot.reconnects, stats.counts.live), (0, 0, 400));
    assert!(dead.iter().all(|each| each.stats().snapshot.acked_seq == 0), "they are dead");
    for each in dead.iter().chain([&live]) {
        let (sender, stopped) = mpsc::channel();
        each.stop(Duration::ZERO, Box::new(move |outcome| drop(sender.send(outcome))));
        stopped.recv_timeout(PATIENCE).expect("in time").expect("in order");
    }
}
