//! A WebSocket server that counts, and does as little else as it can, so that it is never the bottleneck.
//!
//! `sink [--port 0]` prints `{"port":P}` and serves until its standard input closes. It accepts any path and offers neither
//! subprotocol nor extension: the plainest server there is. One thread per connection reads into one large buffer and steps
//! from header to header; payloads of data frames are neither unmasked nor copied.
//!
//! * a data frame of more than 16 bytes is counted, in totals over all connections;
//! * a smaller one is a question, answered with `{"count":N,"bytes":B,"seconds":S}`, S from the first counted frame to the
//!   last: at once, or for the text `>=N` as soon as N frames have been counted (the asker then learns the moment without
//!   polling, which would take CPU from those it measures);
//! * a ping is answered with its pong, a close with a close.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use base64::{Engine, engine::general_purpose::STANDARD};
use benchmark_tools::{end_with_parent, option};
use sha1::{Digest, Sha1};

const BUFFER: usize = 1 << 20;
const QUESTION: usize = 16;
const HEAD: usize = 14;

#[derive(Clone, Copy, Default)]
struct Totals {
    frames: u64,
    bytes: u64,
}

impl Totals {
    fn add(&mut self, more: Totals) {
        self.frames += more.frames;
        self.bytes += more.bytes;
    }
}

#[derive(Default)]
struct State {
    totals: Totals,
    /// When the first and the latest were counted.
    span: Option<(Instant, Instant)>,
    /// What the askers wait for. Kept so that they are woken once, not at each read.
    wanted: Vec<u64>,
}

#[derive(Default)]
struct Counter {
    state: Mutex<State>,
    reached: Condvar,
}

impl Counter {
    fn add(&self, more: Totals) {
        if more.frames > 0 {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.totals.add(more);
            let now = Instant::now();
            state.span = Some((state.span.map_or(now, |(first, _)| first), now));
            let frames = state.totals.frames;
            let waiting = state.wanted.len();
            state.wanted.retain(|wanted| *wanted > frames);
            if state.wanted.len() < waiting {
                self.reached.notify_all();
            }
        }
    }

    fn at_least(&self, frames: u64) -> (Totals, Duration) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.totals.frames < frames {
            state.wanted.push(frames);
        }
        let state =
            self.reached.wait_while(state, |s| s.totals.frames < frames).unwrap_or_else(PoisonError::into_inner);
        (state.totals, state.span.map_or(Duration::ZERO, |(first, latest)| latest - first))
    }
}

struct Header {
    opcode: u8,
    mask: [u8; 4],
    size: usize,
    payload: usize,
}

impl Header {
    /// Reads the frame header at the start of `bytes` (RFC 6455, section 5.2); `None` while it is incomplete.
    fn read(bytes: &[u8]) -> Option<Self> {
        let short = usize::from(bytes.get(1)? & 0x7f);
        let (payload, at) = match short {
            126 => (usize::from(u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?)), 4),
            127 => (usize::try_from(u64::from_be_bytes(bytes.get(2..10)?.try_into().ok()?)).ok()?, 10),
            _ => (short, 2),
        };
        let masked = bytes[1] & 0x80 != 0;
        let mask = if masked { bytes.get(at..at + 4)?.try_into().ok()? } else { [0; 4] };
        Some(Self { opcode: bytes[0] & 0x0f, mask, size: at + if masked { 4 } else { 0 }, payload })
    }

    fn unmask(&self, payload: &[u8]) -> Vec<u8> {
        payload.iter().zip(self.mask.iter().cycle()).map(|(byte, key)| byte ^ key).collect()
    }
}

struct Connection {
    stream: TcpStream,
    counter: Arc<Counter>,
    /// Counted since the last `Counter::add`; added once per read, not once per frame.
    fresh: Totals,
    /// A data frame that has begun: its payload in all, and how much of it is still to come and only needs to be skipped.
    begun: Option<(usize, usize)>,
}

impl Connection {
    fn serve(mut self) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        let mut filled = self.handshake(&mut buffer)?;
        loop {
            let Some(used) = self.frames(&buffer[..filled])? else { return Ok(()) };
            self.publish();
            buffer.copy_within(used..filled, 0);
            filled -= used;
            match self.stream.read(&mut buffer[filled..])? {
                0 => return Ok(()),
                n => filled += n,
            }
        }
    }

    /// Answers the upgrade; returns how many bytes after it are already in the buffer.
    fn handshake(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        loop {
            match self.stream.read(&mut buffer[filled..])? {
                0 => return Err(ErrorKind::UnexpectedEof.into()),
                n => filled += n,
            }
            let Some(end) = buffer[..filled].windows(4).position(|w| w == b"\r\n\r\n") else { continue };
            let head = String::from_utf8_lossy(&buffer[..end]);
            let key = head
                .lines()
                .filter_map(|line| line.split_once(':'))
                .find(|(name, _)| name.eq_ignore_ascii_case("sec-websocket-key"))
                .map(|(_, value)| value.trim().to_owned())
                .ok_or(ErrorKind::InvalidData)?;
            let accept = STANDARD.encode(Sha1::digest(format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11")));
            write!(
                self.stream,
                "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
                 Sec-WebSocket-Accept: {accept}\r\n\r\n"
            )?;
            buffer.copy_within(end + 4..filled, 0);
            return Ok(filled - end - 4);
        }
    }

    /// Takes all whole frames; returns the bytes used, or `None` when the connection has ended.
    fn frames(&mut self, bytes: &[u8]) -> io::Result<Option<usize>> {
        let mut at = self.skip(bytes.len());
        while let Some(header) = Header::read(&bytes[at..]) {
            let start = at + header.size;
            let present = bytes.len() - start;
            if matches!(header.opcode, 0..=2) && header.payload > QUESTION {
                self.begun = Some((header.payload, header.payload));
                at = start + self.skip(present);
                continue;
            }
            if present < header.payload {
                break;
            }
            at = start + header.payload;
            let payload = header.unmask(&bytes[start..at]);
            match header.opcode {
                8 => {
                    self.send(8, &payload)?;
                    return Ok(None);
                }
                9 => self.send(10, &payload)?,
                0..=2 => self.answer(&payload)?,
                _ => {}
            }
        }
        Ok(Some(at))
    }

    /// Steps over what is present of the frame that has begun, and counts it once it is whole; returns the bytes used.
    fn skip(&mut self, present: usize) -> usize {
        let Some((payload, left)) = self.begun.take() else { return 0 };
        if left > present {
            self.begun = Some((payload, left - present));
            return present;
        }
        self.fresh.add(Totals { frames: 1, bytes: payload as u64 });
        left
    }

    fn answer(&mut self, question: &[u8]) -> io::Result<()> {
        self.publish();
        let wanted = question.strip_prefix(b">=").and_then(|n| std::str::from_utf8(n).ok()?.parse().ok());
        let (Totals { frames, bytes }, span) = self.counter.at_least(wanted.unwrap_or(0));
        self.send(1, format!(r#"{{"count":{frames},"bytes":{bytes},"seconds":{}}}"#, span.as_secs_f64()).as_bytes())
    }

    fn publish(&mut self) {
        self.counter.add(std::mem::take(&mut self.fresh));
    }

    fn send(&mut self, opcode: u8, payload: &[u8]) -> io::Result<()> {
        let length = u8::try_from(payload.len()).map_err(|_| ErrorKind::InvalidData)?;
        let mut frame = Vec::with_capacity(HEAD + payload.len());
        frame.extend([0x80 | opcode, length]);
        frame.extend(payload);
        self.stream.write_all(&frame)
    }
}

fn main() -> io::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", option("port", 0)))?;
    println!(r#"{{"port":{}}}"#, listener.local_addr()?.port());
    end_with_parent();
    let counter = Arc::new(Counter::default());
    for stream in listener.incoming() {
        let stream = stream?;
        stream.set_nodelay(true)?;
        let connection = Connection { stream, counter: counter.clone(), fresh: Totals::default(), begun: None };
        std::thread::spawn(move || {
            if let Err(error) = connection.serve() {
                eprintln!("sink: {error}");
            }
        });
    }
    Ok(())
}
