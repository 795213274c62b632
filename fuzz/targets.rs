//! What is done with hostile bytes, once for both drivers: `tests/rust/fuzz.rs`, which runs the kept corpus and random
//! changes of it with every `cargo test`, and `fuzz_targets/`, which lets libFuzzer look for new paths.
//!
//! A target panics when a promise is broken.

use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::OnceLock;
use std::time::Duration;

use bytes::Bytes;
use safe_broadcaster::hub::auth::Grant;
use safe_broadcaster::hub::entry::Record;
use safe_broadcaster::hub::log::LogLimits;
use safe_broadcaster::hub::machine::{
    Access, Asked, CREDIT, CentrifugoMachine, EmitterMachine, Step, SubscriberMachine,
};
use safe_broadcaster::hub::outbox::Item;
use safe_broadcaster::hub::registry::{Role, SessionId};
use safe_broadcaster::hub::state::State;
use safe_broadcaster::hub::{Hub, HubConfig};
use safe_broadcaster::wire::block::Block;
use safe_broadcaster::wire::frame::HubFrame;
use safe_broadcaster::wire::topic::Pattern;

/// A name, which is also that of the folder of its corpus, and what is done.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 6] = [
    ("block", block),
    ("centrifugo", centrifugo),
    ("emitter", emitter),
    ("http", http),
    ("pattern", pattern),
    ("subscriber", subscriber),
];

const LIMITS: LogLimits = LogLimits { events: 50, bytes: 1 << 16, age: None };

fn state() -> State {
    State::new("k3f9".into(), LIMITS, 1 << 16)
}

fn heard(state: &mut State, id: SessionId) -> VecDeque<Item> {
    let mut items = VecDeque::new();
    state.take(id, usize::MAX, &mut items);
    items
}

/// A block that is read has exactly the events that it says, and what is left of it after a seq is the same block's end.
pub fn block(data: &[u8]) {
    let Ok(block) = Block::parse(Bytes::copy_from_slice(data)) else { return };
    assert_eq!(&block.bytes()[..], data);
    let events: Vec<_> = block.events().collect();
    assert_eq!(events.len() as u64, block.count());
    assert!(events.iter().map(|(seq, _)| *seq).eq(block.first()..=block.last()));
    let middle = block.first() + block.count() / 2;
    let later = events.iter().filter(|(seq, _)| *seq > middle);
    assert!(block.after(middle).iter().flat_map(Block::events).eq(later.cloned()));
}

/// Frames of an emitter, each `0 │ u16 LE length │ text` or `1 │ u16 LE length │ block`. Acks go up, never beyond what
/// may have come, and after a violation nothing is taken.
pub fn emitter(mut data: &[u8]) {
    let mut state = state();
    let id = state.registry.open(Role::Emitter);
    let mut machine = EmitterMachine::new(id);
    let (mut acked, mut closed) = (0, false);
    while let [kind, low, high, rest @ ..] = data {
        let (frame, after) = rest.split_at(usize::from(u16::from_le_bytes([*low, *high])).min(rest.len()));
        data = after;
        let before = state.log.head();
        let step = match (kind, std::str::from_utf8(frame)) {
            (0, Ok(text)) => machine.on_text(text),
            _ => machine.on_block(Bytes::copy_from_slice(frame)),
        };
        if step == Step::Commit || machine.wants_commit(Duration::ZERO) {
            machine.commit(&mut state, Duration::ZERO);
        }
        assert!(!closed || state.log.head() == before, "taken after a close");
        for item in heard(&mut state, id) {
            match item {
                Item::Text(frame) => match HubFrame::decode(std::str::from_utf8(&frame).expect("UTF-8")) {
                    Ok(HubFrame::Ack { upto }) => {
                        assert!(acked <= upto && (upto - acked <= CREDIT || before < state.log.head()));
                        acked = upto;
                    }
                    Ok(HubFrame::Welcome { have, .. }) => acked = have,
                    other => assert!(matches!(other, Ok(HubFrame::Nack { .. } | HubFrame::Error { .. })), "{other:?}"),
                },
                Item::Close(_) => closed = true,
                Item::Ping => {}
                Item::Binary(_) => panic!("an emitter is told in text"),
            }
        }
    }
    machine.end(&mut state);
}

/// Frames of a subscriber, one on each line; a line that begins with `!` is an event that is published. Whatever was
/// said, every answer is JSON, the session goes on, and what is published reaches it if it subscribed to everything.
pub fn subscriber(data: &[u8]) {
    let mut state = state();
    let id = state.registry.open(Role::Subscriber);
    let mut machine = SubscriberMachine::new(id);
    let mut access = Access::granted(id, Grant::everything(), None);
    for line in data.split(|byte| *byte == b'\n') {
        match (line, std::str::from_utf8(line)) {
            ([b'!', json @ ..], _) => {
                if let Ok(record) = Record::event(Bytes::copy_from_slice(json)) {
                    state.append(record, Duration::ZERO);
                }
            }
            (_, Ok(text)) => {
                // A token that is shown is the driver's to check; this hub wants none.
                drop(machine.on_text(text, &mut access, &mut state, Duration::ZERO));
            }
            _ => machine.on_binary(&mut access, &mut state),
        }
        for item in heard(&mut state, id) {
            if let Item::Text(frame) = item {
                serde_json::from_slice::<serde_json::Value>(&frame).expect("every answer is JSON");
            }
        }
    }
    if !state.registry.is_closing(id) && state.registry.filter(id).patterns().len() < 200 {
        let subscribe = r#"{"type":"subscribe","data":{"events":["*"]}}"#;
        drop(machine.on_text(subscribe, &mut access, &mut state, Duration::ZERO));
        let event = Record::event(Bytes::from_static(b"{\"type\":\"last\"}")).expect("valid");
        assert_eq!(state.append(event, Duration::ZERO).sessions, 1);
    }
}

/// Frames of a client of Centrifugo's protocol, an empty line between them; one that begins with `!` is an event that is
/// published. Whatever was said, every line of every answer is JSON, offsets of a channel go up between its answers, and
/// as long as the session lives it does what it is asked.
pub fn centrifugo(data: &[u8]) {
    let mut state = state();
    let id = state.registry.open(Role::Centrifugo);
    let mut machine = CentrifugoMachine::new(id, Duration::from_secs(25));
    let mut access = Access::granted(id, Grant::everything(), None);
    let mut last = 0;
    let mut check = |state: &mut State| {
        let (mut pushes, mut answers) = (0, 0);
        for item in heard(state, id) {
            let Item::Text(frame) = item else { continue };
            for line in std::str::from_utf8(&frame).expect("UTF-8").split('\n') {
                let line: serde_json::Value = serde_json::from_str(line).expect("JSON");
                answers += usize::from(line.get("id").is_some());
                if line.get("subscribe").is_some() {
                    last = 0; // what it missed may follow
                }
                if let Some(offset) = line["push"]["pub"]["offset"].as_u64() {
                    assert!(offset >= last, "{offset} after {last}");
                    (last, pushes) = (offset, pushes + 1);
                }
            }
        }
        (pushes, answers)
    };
    // Says something, or lets it go on; whether commands wait for room.
    let mut say = |text: Option<&str>, state: &mut State| {
        if let Some(text) = text {
            machine.on_text(text, state);
        }
        while let Some(asked) = machine.next(&mut access, state, Duration::ZERO) {
            match asked {
                Asked::Check(_) => {
                    machine.on_checked(Ok((Grant::everything(), None)), &mut access, state, Duration::ZERO);
                }
                Asked::Publish(event) => {
                    let published = Record::event(event).map(|record| state.append(record, Duration::ZERO));
                    let refused =
                        |_| safe_broadcaster::error::Error::new(safe_broadcaster::ErrorKind::NotAllowed, "none");
                    machine.on_published(published.map_err(refused), state);
                }
            }
        }
        machine.has_rest()
    };
    let text = String::from_utf8_lossy(data);
    for frame in text.split("\n\n") {
        if let Some(event) = frame.strip_prefix('!') {
            if let Ok(record) = Record::event(Bytes::copy_from_slice(event.as_bytes())) {
                state.append(record, Duration::ZERO);
            }
        } else {
            let mut rest = say(Some(frame), &mut state);
            while rest {
                check(&mut state);
                rest = say(None, &mut state);
            }
        }
        check(&mut state);
    }
    let patterns = state.registry.filter(id);
    if !state.registry.is_closing(id) && !patterns.patterns().is_empty() && patterns.patterns().len() < 200 {
        assert!(!say(Some(r#"{"id":1,"subscribe":{"channel":"the.last"}}"#), &mut state));
        assert_eq!(check(&mut state).1, 1);
        let event = Record::event(Bytes::from_static(b"{\"type\":\"the.last\"}")).expect("valid");
        assert_eq!(state.append(event, Duration::ZERO).sessions, 1);
        assert!(check(&mut state).0 >= 1);
    }
}

/// A pattern on the first line, a type or topic on the second: matched as the plainest matcher would, in any time but
/// the exponential.
pub fn pattern(data: &[u8]) {
    let Some((text, name)) = std::str::from_utf8(data).ok().and_then(|text| text.split_once('\n')) else { return };
    let Ok(pattern) = Pattern::parse(text) else { return };
    let separator = if text.contains('/') { '/' } else { '.' };
    let (wanted, segments): (Vec<_>, Vec<_>) = (text.split(separator).collect(), name.split(separator).collect());
    let open = wanted.last() == Some(&"*") && segments.len() > wanted.len();
    let plain = !name.is_empty()
        && (open || segments.len() == wanted.len())
        && wanted.iter().zip(&segments).all(|(wanted, segment)| *wanted == "*" || wanted == segment);
    let matched = if separator == '/' { pattern.matches("", name) } else { pattern.matches(name, "") };
    assert_eq!(matched, text == "*" || plain, "{text:?} against {name:?}");
}

/// Anything at all, sent to the hub's port: it answers or hangs up, and serves the next one.
pub fn http(data: &[u8]) {
    static HUB: OnceLock<Hub> = OnceLock::new();
    let port = HUB.get_or_init(|| Hub::start(HubConfig { port: 0, ..HubConfig::default() }).expect("started")).port();
    // The first bytes of the answer; a stream of events has no end to wait for.
    let ask = |bytes: &[u8], hang_up: bool| {
        let mut socket = TcpStream::connect(("127.0.0.1", port)).expect("accepted");
        socket.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        let mut answer = vec![0; 4096];
        // A hub that has hung up is an answer too; one that is silent is not.
        let sent = socket.write_all(bytes);
        let sent = sent.and_then(|()| if hang_up { socket.shutdown(std::net::Shutdown::Write) } else { Ok(()) });
        match sent.and_then(|()| socket.read(&mut answer)) {
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                panic!("no answer and no end: {:?}", String::from_utf8_lossy(bytes))
            }
            read => answer.truncate(read.unwrap_or(0)),
        }
        answer
    };
    ask(data, true);
    let healthy = ask(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", false);
    assert!(healthy.starts_with(b"HTTP/1.1 200"), "{:?}", String::from_utf8_lossy(&healthy));
}
