//! Dashboards that all lose their hub and all come back, as a browser would: after the time that the hub's `bye` said,
//! or with backoff and jitter of their own, each with its last position. Each checks by `prev` that it misses nothing.
//!
//! `storm --port P --sessions N` connects and prints `{"connected":seconds}`. Then each line of its standard input
//! starts a storm: it reads on, and when all N have lost their connection and are subscribed again, it prints
//! `{"recovered":…,"not recovered":…,"missed":…,"twice":…,"refused":…,"seconds":…,"seconds p50":…}`: seconds from the first
//! connection that was lost, of the last and of the median session.

use std::io::{self, BufRead, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use benchmark_tools::option;
use benchmark_tools::websocket::{answer, frame, header, request};
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};
use serde_json::Value;

/// Before the first attempt to come back where no `bye` said otherwise, and the most between two attempts.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// No connection; the next attempt is due then.
    Away(Instant),
    /// TCP is on its way.
    Connecting,
    /// The request is on its way.
    Knocking,
    /// The subscription is on its way.
    Subscribing,
    Live,
}

struct Session {
    phase: Phase,
    stream: Option<TcpStream>,
    left: Vec<u8>,
    epoch: String,
    /// Last seq, or where live events begin.
    offset: u64,
    attempts: u32,
    /// What the last `bye` said: seconds, and seconds of jitter.
    bye: Option<(f64, f64)>,
    lost: Option<Instant>,
    back: Option<Duration>,
}

#[derive(Default)]
struct Tally {
    recovered: u64,
    not_recovered: u64,
    missed: u64,
    twice: u64,
    refused: u64,
    first_lost: Option<Instant>,
}

struct Storm {
    poll: Poll,
    address: SocketAddr,
    sessions: Vec<Session>,
    tally: Tally,
    buffer: Vec<u8>,
    random: u64,
}

impl Storm {
    /// From 0 to 1; xorshift is random enough for jitter.
    fn random(&mut self) -> f64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn knock(&mut self, index: usize) {
        let session = &mut self.sessions[index];
        session.attempts += 1;
        session.left.clear();
        session.phase = Phase::Connecting;
        let connected = TcpStream::connect(self.address).and_then(|mut stream| {
            let both = Interest::READABLE | Interest::WRITABLE;
            self.poll.registry().register(&mut stream, Token(index), both)?;
            Ok(stream)
        });
        match connected {
            Ok(stream) => session.stream = Some(stream),
            Err(_) => self.lose(index),
        }
    }

    fn lose(&mut self, index: usize) {
        let now = Instant::now();
        let random = self.random();
        let session = &mut self.sessions[index];
        session.stream = None;
        if matches!(session.phase, Phase::Live) {
            session.attempts = 0;
            session.lost = Some(now);
            self.tally.first_lost.get_or_insert(now);
        } else {
            self.tally.refused += 1;
        }
        let wait = match session.bye.take() {
            Some((after, jitter)) => Duration::from_secs_f64(after + jitter * random),
            None => (BACKOFF.0 * 2_u32.pow(session.attempts.min(8))).min(BACKOFF.1).mul_f64(0.5 + random / 2.0),
        };
        session.phase = Phase::Away(now + wait);
    }

    fn ready(&mut self, index: usize, writable: bool) {
        if writable && self.sessions[index].phase == Phase::Connecting {
            let knock = request(self.address, "/ws");
            let Some(stream) = &mut self.sessions[index].stream else { return };
            match stream.write(knock.as_bytes()) {
                Ok(n) => assert_eq!(n, knock.len(), "a socket that is new takes a request"),
                Err(_) => return self.lose(index),
            }
            self.sessions[index].phase = Phase::Knocking;
        }
        self.read(index);
    }

    fn read(&mut self, index: usize) {
        let mut buffer = std::mem::take(&mut self.buffer);
        while let Some(stream) = &mut self.sessions[index].stream {
            match stream.read(&mut buffer) {
                Ok(0) => self.lose(index),
                Ok(n) => {
                    self.sessions[index].left.extend_from_slice(&buffer[..n]);
                    self.understand(index);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock || error.kind() == ErrorKind::NotConnected => break,
                Err(_) => self.lose(index),
            }
        }
        self.buffer = buffer;
    }

    fn understand(&mut self, index: usize) {
        let mut left = std::mem::take(&mut self.sessions[index].left);
        let mut at = 0;
        if self.sessions[index].phase == Phase::Knocking {
            match answer(&left) {
                None => return self.sessions[index].left = left,
                Some((_, false)) => return self.lose(index),
                Some((end, true)) => {
                    at = end;
                    self.subscribe(index);
                }
            }
        }
        while let Some((opcode, start, len)) = header(&left[at..]) {
            if left.len() < at + start + len {
                break;
            }
            let payload = &left[at + start..at + start + len];
            match opcode {
                1 => self.heard(index, payload),
                9 => self.say(index, 10, payload),
                8 => return self.lose(index),
                _ => {}
            }
            at += start + len;
        }
        left.drain(..at);
        self.sessions[index].left = left;
    }

    fn subscribe(&mut self, index: usize) {
        let session = &mut self.sessions[index];
        session.phase = Phase::Subscribing;
        let mut data = serde_json::json!({"events": ["*"]});
        if !session.epoch.is_empty() {
            data["since"] = serde_json::json!({"epoch": session.epoch, "offset": session.offset});
        }
        let text = serde_json::json!({"type": "subscribe", "data": data}).to_string();
        self.say(index, 1, text.as_bytes());
    }

    fn say(&mut self, index: usize, opcode: u8, payload: &[u8]) {
        let mut bytes = Vec::new();
        frame(&mut bytes, opcode, payload);
        if let Some(stream) = &mut self.sessions[index].stream
            && stream.write_all(&bytes).is_err()
        {
            self.lose(index);
        }
    }

    fn heard(&mut self, index: usize, payload: &[u8]) {
        let heard: Value = serde_json::from_slice(payload).expect("the hub says JSON");
        let number = |name: &str| heard[name].as_u64().unwrap_or(0);
        let session = &mut self.sessions[index];
        if heard["action"] == "subscribed" {
            session.phase = Phase::Live;
            if let Some(lost) = session.lost.take() {
                session.back = Some(lost.elapsed() + lost.duration_since(self.tally.first_lost.unwrap_or(lost)));
            }
            match heard["recovered"].as_bool() {
                Some(true) => self.tally.recovered += 1,
                Some(false) => self.tally.not_recovered += 1,
                None => {}
            }
            if heard["recovered"] != true {
                session.offset = number("offset");
            }
            heard["epoch"].as_str().unwrap_or_default().clone_into(&mut session.epoch);
        } else if heard["seq"].is_u64() {
            // One filter for everything: between two entries that follow each other nothing is missing.
            match number("seq") {
                seq if seq <= session.offset => self.tally.twice += 1,
                seq => {
                    self.tally.missed += u64::from(seq != session.offset + 1);
                    session.offset = seq;
                }
            }
        } else if heard["type"] == "bye" {
            let plan = &heard["data"]["reconnect"];
            session.bye = plan["after"].as_f64().zip(plan["jitter"].as_f64());
        }
    }

    fn turn(&mut self, events: &mut Events) {
        match self.poll.poll(events, Some(Duration::from_millis(5))) {
            Err(error) if error.kind() != ErrorKind::Interrupted => panic!("poll: {error}"),
            _ => {}
        }
        for event in events.iter() {
            self.ready(event.token().0, event.is_writable());
        }
        let now = Instant::now();
        for index in 0..self.sessions.len() {
            if matches!(self.sessions[index].phase, Phase::Away(due) if due <= now) {
                self.knock(index);
            }
        }
    }

    fn all_live(&self) -> bool {
        self.sessions.iter().all(|session| session.phase == Phase::Live)
    }
}

fn main() -> io::Result<()> {
    let port: u16 = option("port", 0);
    let count: usize = option("sessions", 1000);
    let start = Instant::now();
    let new = |_| Session {
        phase: Phase::Away(start),
        stream: None,
        left: Vec::new(),
        epoch: String::new(),
        offset: 0,
        attempts: 0,
        bye: None,
        lost: None,
        back: None,
    };
    let mut storm = Storm {
        poll: Poll::new()?,
        address: SocketAddr::from(([127, 0, 0, 1], port)),
        sessions: (0..count).map(new).collect(),
        tally: Tally::default(),
        buffer: vec![0; 64 << 10],
        random: 0x9e37_79b9_7f4a_7c15,
    };
    let mut events = Events::with_capacity(4096);
    while !storm.all_live() {
        storm.turn(&mut events);
    }
    println!("{{\"connected\":{:.3}}}", start.elapsed().as_secs_f64());
    let (sender, lines) = std::sync::mpsc::channel();
    std::thread::spawn(move || io::stdin().lock().lines().map_while(Result::ok).all(|line| sender.send(line).is_ok()));
    loop {
        match lines.try_recv() {
            Err(std::sync::mpsc::TryRecvError::Disconnected) => return Ok(()),
            Err(std::sync::mpsc::TryRecvError::Empty) => storm.turn(&mut events),
            Ok(_) => {
                storm.tally = Tally::default();
                storm.sessions.iter_mut().for_each(|session| session.back = None);
                while storm.sessions.iter().any(|session| session.back.is_none()) {
                    storm.turn(&mut events);
                }
                let mut back: Vec<_> = storm.sessions.iter().filter_map(|session| session.back).collect();
                back.sort_unstable();
                let Tally { recovered, not_recovered, missed, twice, refused, .. } = storm.tally;
                let (last, median) = (back[back.len() - 1].as_secs_f64(), back[back.len() / 2].as_secs_f64());
                println!(
                    "{{\"recovered\":{recovered},\"not recovered\":{not_recovered},\"missed\":{missed},\
                     \"twice\":{twice},\"refused\":{refused},\"seconds\":{last:.3},\"seconds p50\":{median:.3}}}"
                );
            }
        }
    }
}
