//! The load on a hub: many WebSocket subscribers and one publisher, in one thread over one poll, so that it costs less
//! than any hub it is held against. The same for all of them: an event is known by `"node-NNNNNN"` anywhere in what
//! comes, so envelopes, and several events in one frame, make no difference.
//!
//! `fan --port P --subscribers N [--subscribe /ws] [--publish /publish] [--hello TEXT] [--protocol plain|nats]
//! [--stalled K] --event JSON` connects (K of the subscribers never read), prints `{"connected":seconds}` and then
//! answers each line of its standard input with one:
//!
//! * `{"mode":"closed","window":W,"seconds":S}`: at most W events that not all have seen → frames per second;
//! * `{"mode":"paced","rate":R,"seconds":S}`: R events per second, whatever comes back → latencies in microseconds;
//! * `{"mode":"replay","hello":TEXT,"events":E}`: N more subscribers, all at once, each saying TEXT and wanting E events
//!   → frames per second;
//! * `{"mode":"receive","events":E}`: waits until each has E events, whoever publishes them → frames per second from the
//!   first to the last;
//! * `{"mode":"rest","seconds":S}`: reads what comes.
//!
//! With `--publish ""` it has no publisher, and the first two are not to be asked for.

use std::collections::HashMap;
use std::io::{self, BufRead, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use benchmark_tools::option;
use benchmark_tools::websocket::{answer, frame, header, request};
use memchr::memmem::Finder;
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};

const MARK: &[u8] = b"\"node-";
const DIGITS: usize = 6;

struct Peer {
    stream: TcpStream,
    left: Vec<u8>,
    out: Vec<u8>,
    publisher: bool,
}

/// What a run counts.
#[derive(Default)]
struct Run {
    sent: Vec<Instant>,
    seen: Vec<u32>,
    complete: u64,
    frames: u64,
    latencies: Option<Vec<u32>>,
    all: u32,
    first: Option<Instant>,
}

struct Fan {
    poll: Poll,
    address: SocketAddr,
    nats: bool,
    /// So many subscribers, the first ones, do not read.
    stalled: usize,
    peers: Vec<Peer>,
    buffer: Vec<u8>,
    run: Run,
}

impl Fan {
    fn connect(&mut self, path: &str, hello: Option<&str>, publisher: bool) -> io::Result<()> {
        let mut stream = std::net::TcpStream::connect(self.address)?;
        stream.set_nodelay(true)?;
        stream.write_all(request(self.address, path).as_bytes())?;
        let mut head = Vec::new();
        let (end, yes) = loop {
            let mut part = [0; 1024];
            match stream.read(&mut part)? {
                0 => return Err(io::Error::other(format!("closed: {}", String::from_utf8_lossy(&head)))),
                n => head.extend_from_slice(&part[..n]),
            }
            if let Some(answered) = answer(&head) {
                break answered;
            }
        };
        if !yes {
            return Err(io::Error::other(String::from_utf8_lossy(&head).into_owned()));
        }
        stream.set_nonblocking(true)?;
        let mut stream = TcpStream::from_std(stream);
        self.poll.registry().register(&mut stream, Token(self.peers.len()), Interest::READABLE | Interest::WRITABLE)?;
        self.peers.push(Peer { stream, left: head[end..].to_vec(), out: Vec::new(), publisher });
        let index = self.peers.len() - 1;
        if self.nats {
            self.say(index, 2, b"CONNECT {\"verbose\":false,\"pedantic\":false,\"version\":\"1\",\"protocol\":1}\r\n");
            if !publisher {
                self.say(index, 2, b"SUB graph.> 1\r\n");
            }
        }
        if let Some(hello) = hello {
            self.say(index, 1, hello.as_bytes());
        }
        Ok(())
    }

    fn say(&mut self, index: usize, opcode: u8, payload: &[u8]) {
        frame(&mut self.peers[index].out, opcode, payload);
        self.flush(index);
    }

    fn flush(&mut self, index: usize) {
        let Peer { stream, out, .. } = &mut self.peers[index];
        let mut written = 0;
        while written < out.len() {
            match stream.write(&out[written..]) {
                Ok(n) => written += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("peer {index}: {error}"),
            }
        }
        out.drain(..written);
    }

    /// Waits for something, at most `patience`, and reads everything that is there.
    fn turn(&mut self, events: &mut Events, patience: Duration) {
        match self.poll.poll(events, Some(patience)) {
            Err(error) if error.kind() != ErrorKind::Interrupted => panic!("poll: {error}"),
            _ => {}
        }
        for event in events.iter() {
            let index = event.token().0;
            if event.is_writable() {
                self.flush(index);
            }
            if event.is_readable() && !(1..=self.stalled).contains(&index) {
                self.read(index);
            }
        }
    }

    fn read(&mut self, index: usize) {
        let mut buffer = std::mem::take(&mut self.buffer);
        loop {
            let peer = &mut self.peers[index];
            let kept = peer.left.len();
            buffer[..kept].copy_from_slice(&peer.left);
            peer.left.clear();
            match peer.stream.read(&mut buffer[kept..]) {
                Ok(0) => panic!("peer {index}: closed by the hub"),
                Ok(n) => {
                    let used = self.frames(index, &buffer[..kept + n]);
                    self.peers[index].left.extend_from_slice(&buffer[used..kept + n]);
                }
                Err(error) => {
                    self.peers[index].left.extend_from_slice(&buffer[..kept]);
                    assert!(error.kind() == ErrorKind::WouldBlock, "peer {index}: {error}");
                    break;
                }
            }
        }
        self.buffer = buffer;
    }

    /// Takes whole frames; returns how many bytes they are.
    fn frames(&mut self, index: usize, bytes: &[u8]) -> usize {
        let mut at = 0;
        while let Some((opcode, start, len)) = header(&bytes[at..]) {
            let (from, to) = (at + start, at + start + len);
            if to > bytes.len() {
                break;
            }
            match opcode {
                8 => panic!("peer {index}: closed by the hub: {:?}", &bytes[from..to]),
                9 => self.say(index, 10, &bytes[from..to]),
                _ if self.nats && bytes[from..to].starts_with(b"PING") => self.say(index, 2, b"PONG\r\n"),
                _ if !self.peers[index].publisher => self.run.note(&bytes[from..to]),
                _ => {}
            }
            at = to;
        }
        at
    }

    fn publisher(&self) -> usize {
        self.peers.iter().position(|peer| peer.publisher).expect("there is one")
    }
}

impl Run {
    fn note(&mut self, payload: &[u8]) {
        thread_local!(static FINDER: Finder<'static> = Finder::new(MARK));
        FINDER.with(|finder| {
            let mut at = 0;
            while let Some(found) = finder.find(&payload[at..]) {
                at += found + MARK.len();
                let Some(digits) = payload.get(at..at + DIGITS) else { return };
                let number = digits.iter().fold(0, |sum, digit| sum * 10 + usize::from(digit.wrapping_sub(b'0')));
                self.frames += 1;
                self.first.get_or_insert_with(Instant::now);
                if let Some(seen) = self.seen.get_mut(number) {
                    *seen += 1;
                    self.complete += u64::from(*seen == self.all);
                    if let Some(latencies) = &mut self.latencies {
                        latencies.push(self.sent[number].elapsed().as_micros() as u32);
                    }
                }
            }
        });
    }
}

/// The event with its six digits to be filled in, as this protocol sends it.
struct Template {
    frame: Vec<u8>,
    digits: usize,
}

impl Template {
    fn new(event: &str, nats: bool) -> Self {
        let payload =
            if nats { format!("PUB graph.ada.delta.node {}\r\n{event}\r\n", event.len()) } else { event.into() };
        let mut bytes = Vec::new();
        frame(&mut bytes, if nats { 2 } else { 1 }, payload.as_bytes());
        let digits = memchr::memmem::find(&bytes, MARK).expect("the event has its mark") + MARK.len();
        Self { frame: bytes, digits }
    }

    fn append(&self, number: usize, out: &mut Vec<u8>) {
        let at = out.len() + self.digits;
        out.extend_from_slice(&self.frame);
        for (place, digit) in out[at..at + DIGITS].iter_mut().rev().enumerate() {
            *digit = b'0' + (number / 10_usize.pow(place as u32) % 10) as u8;
        }
    }
}

fn closed(fan: &mut Fan, template: &Template, window: u64, seconds: f64, all: usize) -> String {
    const MOST: usize = 1_000_000;
    let mut events = Events::with_capacity(1024);
    let publisher = fan.publisher();
    fan.run = Run { seen: vec![0; MOST], all: all as u32, ..Run::default() };
    let start = Instant::now();
    let mut sent = 0;
    while start.elapsed().as_secs_f64() < seconds && sent < MOST {
        while ((sent as u64) < fan.run.complete + window) && sent < MOST {
            template.append(sent, &mut fan.peers[publisher].out);
            sent += 1;
        }
        fan.flush(publisher);
        fan.turn(&mut events, Duration::from_millis(100));
    }
    let (took, frames) = (start.elapsed().as_secs_f64(), fan.run.frames);
    let patience = Instant::now();
    while fan.run.complete < sent as u64 && patience.elapsed() < Duration::from_secs(10) {
        fan.turn(&mut events, Duration::from_millis(100));
    }
    let lost = sent as u64 * all as u64 - fan.run.frames;
    format!("{{\"frames per second\":{:.0},\"frames\":{},\"lost\":{lost}}}", frames as f64 / took, fan.run.frames)
}

fn paced(fan: &mut Fan, template: &Template, rate: f64, seconds: f64, all: usize) -> String {
    let mut events = Events::with_capacity(1024);
    let publisher = fan.publisher();
    let count = (rate * seconds) as usize;
    fan.run = Run { seen: vec![0; count], all: all as u32, latencies: Some(Vec::new()), ..Run::default() };
    let start = Instant::now();
    let due = |number: usize| start + Duration::from_secs_f64(number as f64 / rate);
    while fan.run.sent.len() < count {
        while fan.run.sent.len() < count && due(fan.run.sent.len()) <= Instant::now() {
            template.append(fan.run.sent.len(), &mut fan.peers[publisher].out);
            fan.run.sent.push(Instant::now());
        }
        fan.flush(publisher);
        let next = due(fan.run.sent.len()).saturating_duration_since(Instant::now());
        fan.turn(&mut events, next.min(Duration::from_millis(100)));
    }
    let patience = Instant::now();
    while fan.run.complete < count as u64 && patience.elapsed() < Duration::from_secs(10) {
        fan.turn(&mut events, Duration::from_millis(100));
    }
    let lost = count as u64 * all as u64 - fan.run.frames;
    let mut all = fan.run.latencies.take().unwrap_or_default();
    all.sort_unstable();
    let part = |part: f64| all.get(((all.len().max(1) - 1) as f64 * part).round() as usize).copied().unwrap_or(0);
    format!(
        "{{\"p50 µs\":{},\"p99 µs\":{},\"max µs\":{},\"frames\":{},\"lost\":{lost}}}",
        part(0.5),
        part(0.99),
        part(1.0),
        fan.run.frames
    )
}

fn replay(fan: &mut Fan, path: &str, hello: &str, wanted: u64, all: usize) -> io::Result<String> {
    let mut events = Events::with_capacity(1024);
    let first = fan.peers.len();
    for _ in 0..all {
        fan.connect(path, None, false)?;
    }
    fan.run = Run::default();
    let start = Instant::now();
    for index in first..first + all {
        fan.say(index, 1, hello.as_bytes());
    }
    let total = wanted * all as u64;
    while fan.run.frames < total && start.elapsed() < Duration::from_mins(1) {
        fan.turn(&mut events, Duration::from_millis(100));
    }
    let (took, frames) = (start.elapsed().as_secs_f64(), fan.run.frames);
    fan.peers.truncate(first);
    Ok(format!(
        "{{\"frames per second\":{:.0},\"frames\":{frames},\"lost\":{}}}",
        frames as f64 / took,
        total.saturating_sub(frames)
    ))
}

fn receive(fan: &mut Fan, wanted: u64, all: usize) -> String {
    let mut events = Events::with_capacity(1024);
    fan.run = Run::default();
    let (start, total) = (Instant::now(), wanted * all as u64);
    while fan.run.frames < total && start.elapsed() < Duration::from_mins(1) {
        fan.turn(&mut events, Duration::from_millis(100));
    }
    let took = fan.run.first.map_or(0.0, |first| first.elapsed().as_secs_f64());
    format!(
        "{{\"frames per second\":{:.0},\"frames\":{},\"lost\":{}}}",
        fan.run.frames as f64 / took,
        fan.run.frames,
        total.saturating_sub(fan.run.frames)
    )
}

fn main() -> io::Result<()> {
    let port: u16 = option("port", 0);
    let subscribers: usize = option("subscribers", 100);
    let subscribe: String = option("subscribe", "/ws".to_owned());
    let publish: String = option("publish", "/publish".to_owned());
    let hello: String = option("hello", String::new());
    let nats = option("protocol", "plain".to_owned()) == "nats";
    let stalled: usize = option("stalled", 0);
    let readers = subscribers - stalled;
    let template = Template::new(&option("event", r#"{"id":"node-000000"}"#.to_owned()), nats);
    let mut fan = Fan {
        poll: Poll::new()?,
        address: SocketAddr::from(([127, 0, 0, 1], port)),
        nats,
        stalled,
        peers: Vec::new(),
        buffer: vec![0; 1 << 20],
        run: Run::default(),
    };
    let start = Instant::now();
    if !publish.is_empty() {
        fan.connect(&publish, None, true)?;
    }
    for _ in 0..subscribers {
        fan.connect(&subscribe, Some(&hello).filter(|text| !text.is_empty()).map(String::as_str), false)?;
    }
    let mut events = Events::with_capacity(1024);
    let settled = Instant::now();
    while settled.elapsed() < Duration::from_millis(500) {
        fan.turn(&mut events, Duration::from_millis(50));
    }
    println!("{{\"connected\":{:.3}}}", start.elapsed().as_secs_f64());
    for line in io::stdin().lock().lines() {
        let wanted: HashMap<String, serde_json::Value> = serde_json::from_str(&line?)?;
        let number = |name: &str| wanted.get(name).and_then(serde_json::Value::as_f64).unwrap_or(0.0);
        let text = |name: &str| wanted.get(name).and_then(serde_json::Value::as_str).unwrap_or("");
        let said = match text("mode") {
            "closed" => closed(&mut fan, &template, number("window") as u64, number("seconds"), readers),
            "paced" => paced(&mut fan, &template, number("rate"), number("seconds"), readers),
            "replay" => replay(&mut fan, &subscribe, text("hello"), number("events") as u64, subscribers)?,
            "receive" => receive(&mut fan, number("events") as u64, readers),
            "rest" => {
                let start = Instant::now();
                while start.elapsed().as_secs_f64() < number("seconds") {
                    fan.turn(&mut events, Duration::from_millis(100));
                }
                "{}".to_owned()
            }
            other => panic!("there is no mode {other:?}"),
        };
        println!("{said}");
    }
    // A proper end, so that no hub has an error to report.
    for index in 0..fan.peers.len() {
        fan.say(index, 8, &1000_u16.to_be_bytes());
    }
    Ok(())
}
