use std::collections::VecDeque;

use super::*;
use crate::hub::log::LogLimits;
use crate::hub::outbox::Item;
use crate::hub::registry::{Role, frame_cost};
use crate::wire::block::BlockBuilder;
use crate::wire::close::CloseCode;
use crate::wire::frame::HubFrame;
use bytes::BytesMut;
use proptest::prelude::*;

struct Hub(State);

struct Link {
    id: SessionId,
    machine: EmitterMachine,
}

impl Hub {
    fn new() -> Self {
        Self(State::new("log".into(), LogLimits { events: 1000, bytes: 1 << 20, age: None }, 1 << 20))
    }

    fn connect(&mut self) -> Link {
        let id = self.0.registry.open(Role::Emitter);
        Link { id, machine: EmitterMachine::new(id) }
    }

    fn greet(&mut self, epoch: &str, next: u64) -> Link {
        let mut link = self.connect();
        link.hello(epoch, next);
        self.commit(&mut link);
        link
    }

    /// For an emitter that does not wait for its ack.
    fn commit(&mut self, link: &mut Link) -> Vec<String> {
        if matches!(link.machine.phase, Phase::Live { .. }) {
            link.ask();
        }
        self.commit_at(link, Duration::ZERO)
    }

    fn commit_at(&mut self, link: &mut Link, now: Duration) -> Vec<String> {
        link.machine.commit(&mut self.0, now);
        self.heard(link)
    }

    fn heard(&mut self, link: &Link) -> Vec<String> {
        let mut items = VecDeque::new();
        self.0.take(link.id, usize::MAX, &mut items);
        let read = |item| match item {
            Item::Text(frame) => String::from_utf8(frame.to_vec()).expect("utf-8"),
            other => format!("{other:?}"),
        };
        items.into_iter().map(read).collect()
    }

    fn log(&mut self) -> Vec<String> {
        let entries = self.0.log.range(1, u64::MAX);
        entries.map(|entry| String::from_utf8(entry.record.json().to_vec()).expect("utf-8")).collect()
    }
}

impl Link {
    fn hello(&mut self, epoch: &str, next: u64) -> Step {
        let hello = EmitterFrame::Hello { emitter: "engine".into(), epoch: epoch.into(), next };
        self.machine.on_text(&hello.encode())
    }

    fn events(&mut self, seqs: std::ops::RangeInclusive<u64>) -> Step {
        let mut block = BlockBuilder::new(*seqs.start(), BytesMut::new());
        for seq in seqs {
            block.push(format!(r#"{{"n":{seq}}}"#).as_bytes());
        }
        self.machine.on_block(block.seal().expect("not empty").into_bytes())
    }

    fn ask(&mut self) -> Step {
        self.machine.on_text(&EmitterFrame::AckNow.encode())
    }

    fn gap(&mut self, from: u64, to: u64) -> Step {
        let gap = EmitterFrame::Gap { from, to, reason: "expired".into() };
        self.machine.on_text(&gap.encode())
    }
}

fn numbers(seqs: impl IntoIterator<Item = u64>) -> Vec<String> {
    seqs.into_iter().map(|seq| format!(r#"{{"n":{seq}}}"#)).collect()
}

fn ack(upto: u64) -> String {
    HubFrame::Ack { upto }.encode()
}

#[test]
fn many_blocks_are_acknowledged_once() {
    let mut hub = Hub::new();
    let mut link = hub.connect();
    assert_eq!(link.hello("1", 1), Step::Commit);
    assert_eq!(hub.commit(&mut link), [HubFrame::Welcome { have: 0, credit: CREDIT }.encode()]);
    assert_eq!(link.events(1..=3), Step::More);
    assert_eq!(link.events(4..=4), Step::More);
    assert_eq!(hub.commit(&mut link), [ack(4)]);
    assert!(hub.commit(&mut link).is_empty());
    assert_eq!(hub.log(), numbers(1..=4));
}

#[test]
fn a_session_that_is_to_end_is_read_to_its_end() {
    let mut hub = Hub::new();
    let mut link = hub.greet("1", 1);
    link.machine.intake = Intake::new(1, Arc::default());
    hub.0.registry.order_close(link.id, CloseCode::Superseded);
    link.events(1..=7);
    assert!(link.machine.is_full());
    hub.commit_at(&mut link, Duration::ZERO);
    // Else its task would wake itself again and again and never see the peer's close.
    assert!(!link.machine.is_full() && !link.machine.has_rest() && hub.log().is_empty());
}

#[test]
fn a_large_frame_is_taken_in_slices_each_with_its_own_ack() {
    let mut hub = Hub::new();
    let mut link = hub.greet("1", 1);
    let one = frame_cost(&Record::event(Bytes::from_static(br#"{"n":1}"#)).expect("valid"));
    link.machine.intake = Intake::new(3 * one, Arc::default());
    link.events(1..=7);
    for (upto, rest) in [(3, true), (6, true), (7, false)] {
        assert_eq!((link.machine.has_rest(), link.machine.is_full()), (rest, rest));
        assert_eq!(hub.commit(&mut link), [ack(upto)]);
        assert_eq!(hub.log(), numbers(1..=upto));
        assert_eq!(link.machine.resume(), Step::More);
    }
    // Who goes away in the middle is told how far it came, and sends the rest again.
    link.events(8..=15);
    hub.commit(&mut link);
    let mut link = hub.connect();
    link.hello("1", 8);
    assert_eq!(hub.commit(&mut link), [HubFrame::Welcome { have: 10, credit: CREDIT }.encode()]);
    link.events(8..=15);
    hub.commit(&mut link);
    assert_eq!(hub.log(), numbers(1..=15));
}

#[test]
fn duplicates_are_acknowledged_again_and_not_appended_again() {
    let mut hub = Hub::new();
    let mut link = hub.greet("1", 1);
    link.events(1..=3);
    hub.commit(&mut link);
    let mut link = hub.connect();
    link.hello("1", 2);
    assert_eq!(hub.commit(&mut link), [HubFrame::Welcome { have: 3, credit: CREDIT }.encode()]);
    link.events(2..=3);
    assert_eq!(hub.commit(&mut link), [ack(3)]);
    link.events(3..=5);
    assert_eq!(hub.commit(&mut link), [ack(5)]);
    assert_eq!(hub.log(), numbers(1..=5));
    assert_eq!(hub.0.counters.duplicates, 3);
}

#[test]
fn a_new_epoch_begins_again_and_an_old_life_is_not_waited_for() {
    let mut hub = Hub::new();
    let mut link = hub.greet("1", 1);
    link.events(1..=2);
    hub.commit(&mut link);
    let mut link = hub.greet("2", 1);
    link.events(1..=1);
    assert_eq!(hub.commit(&mut link), [ack(1)]);
    let mut link = hub.greet("3", 50);
    link.events(50..=50);
    assert_eq!(hub.commit(&mut link), [ack(50)]);
    assert_eq!(hub.log(), numbers([1, 2, 1, 50]));
}

#[test]
fn gaps_enter_the_log_and_overlap_the_mark() {
    let mut hub = Hub::new();
    let mut link = hub.greet("1", 1);
    link.events(1..=2);
    link.gap(2, 5);
    link.events(6..=6);
    assert_eq!(hub.commit(&mut link), [ack(6)]);
    link.gap(3, 5);
    assert_eq!(hub.commit(&mut link), [ack(6)]);
    let gap = r#"{"emitter":"engine","epoch":"1","from":3,"to":5,"reason":"expired"}"#.to_owned();
    assert_eq!(hub.log(), [numbers(1..=2), vec![gap], numbers(6..=6)].concat());
    assert_eq!(hub.0.counters.gaps, 1);
}

#[test]
fn the_older_connection_is_closed_and_appends_nothing_more() {
    let mut hub = Hub::new();
    let mut old = hub.greet("1", 1);
    old.events(1..=1);
    hub.commit(&mut old);
    old.events(2..=2);
    let mut new = hub.greet("1", 2);
    assert_eq!(hub.commit(&mut old), ["Close(Superseded)"]);
    old.events(2..=2);
    old.machine.commit(&mut hub.0, Duration::ZERO);
    new.events(2..=2);
    assert_eq!(hub.commit(&mut new), [ack(2)]);
    assert_eq!(hub.log(), numbers(1..=2));
}

/// A block of which one event is none.
fn poisoned(first: u64, poison: u64, last: u64) -> Bytes {
    let mut block = BlockBuilder::new(first, BytesMut::new());
    for seq in first..=last {
        block.push(if seq == poison { "[2]".to_owned() } else { format!(r#"{{"n":{seq}}}"#) }.as_bytes());
    }
    block.seal().expect("not empty").into_bytes()
}

#[test]
fn an_event_that_is_none_is_refused_and_what_came_before_it_counts() {
    let mut hub = Hub::new();
    let mut link = hub.greet("1", 1);
    assert_eq!(link.machine.on_block(poisoned(1, 3, 4)), Step::Commit);
    let heard = hub.commit(&mut link);
    let nack = HubFrame::Nack { seq: 3, reason: "an event is a JSON object with text as its type and topic".into() };
    assert_eq!(heard, [ack(2), nack.encode()]);
    assert_eq!(hub.log(), numbers(1..=2));
    assert_eq!((hub.0.counters.refused, hub.0.counters.bad_frames), (1, 0));
}

#[test]
fn what_was_sent_behind_a_refused_event_is_ignored_until_the_emitter_goes_back() {
    let mut hub = Hub::new();
    let mut link = hub.greet("1", 1);
    link.machine.on_block(poisoned(1, 2, 2));
    hub.commit(&mut link);
    link.events(3..=5);
    link.gap(6, 7);
    assert!(hub.commit(&mut link).is_empty(), "neither taken nor a violation");
    link.machine.on_block(poisoned(2, 2, 5));
    assert!(hub.commit(&mut link)[1].contains("nack"), "it may be tried again");
    let gap = EmitterFrame::Gap { from: 2, to: 2, reason: "refused".into() };
    link.machine.on_text(&gap.encode());
    link.events(3..=5);
    assert_eq!(hub.commit(&mut link), [ack(5)]);
    link.events(7..=7);
    assert!(hub.commit(&mut link)[0].contains("6 to 6 are missing"), "a hole is a violation again");
    let gap = r#"{"emitter":"engine","epoch":"1","from":2,"to":2,"reason":"refused"}"#.to_owned();
    assert_eq!(hub.log(), [numbers(1..=1), vec![gap], numbers(3..=5)].concat());
}

#[test]
fn a_refused_event_may_be_the_first_of_a_connection() {
    let mut hub = Hub::new();
    let mut link = hub.greet("1", 1);
    link.machine.on_block(poisoned(1, 1, 1));
    assert!(hub.commit(&mut link)[1].contains(r#""seq":1"#));
    let mut link = hub.connect();
    link.hello("1", 1);
    assert_eq!(hub.commit(&mut link), [HubFrame::Welcome { have: 0, credit: CREDIT }.encode()]);
}

#[test]
fn bad_input_is_named_and_ends_the_session() {
    type Say = fn(&mut Link) -> Step;
    let cases: [(bool, Say, &str); 13] = [
        (false, |link| link.events(1..=1), "hello comes first"),
        (false, |link| link.gap(1, 1), "hello comes first"),
        (false, Link::ask, "hello comes first"),
        (false, |link| link.hello("", 1), "hello.epoch"),
        (false, |link| link.hello("1", 0), "hello.next"),
        (false, |link| link.machine.on_text("{"), "sb.emit.v1"),
        (true, |link| link.hello("1", 1), "twice"),
        (true, |link| link.events(2..=2), "1 to 1 are missing"),
        (true, |link| link.gap(2, 2), "1 to 1 are missing"),
        (true, |link| link.gap(1, 0), "empty"),
        (true, |link| link.events(1..=CREDIT + 1), "beyond the credit"),
        (true, |link| link.machine.on_block(Bytes::from_static(b"\x01")), "truncated"),
        (true, |link| link.machine.on_block(Bytes::from_static(&[7; 40])), "unknown kind 7"),
    ];
    for (greeted, say, word) in cases {
        let mut hub = Hub::new();
        let mut link = if greeted { hub.greet("1", 1) } else { hub.connect() };
        assert_eq!(say(&mut link), Step::Commit, "{word}");
        let heard = hub.commit(&mut link);
        assert_eq!(heard.len(), 2, "{heard:?}");
        assert!(heard[0].contains("bad_frame") && heard[0].contains(word), "{word}: {heard:?}");
        assert_eq!(heard[1], "Close(BadFrame)");
    }
}

#[test]
fn the_last_seq_of_all_is_taken_and_nothing_after_it() {
    let mut hub = Hub::new();
    let mut link = hub.greet("1", u64::MAX);
    link.events(u64::MAX..=u64::MAX);
    assert_eq!(hub.commit(&mut link), [ack(u64::MAX)]);
    assert_eq!(link.events(1..=1), Step::Commit);
    assert!(hub.commit(&mut link)[0].contains("no seq is left"));
}

#[test]
fn lone_events_share_an_ack_that_comes_in_time() {
    let mut hub = Hub::new();
    let mut link = hub.greet("1", 1);
    assert_eq!(link.machine.deadline(), None, "an idle session has no timer");
    let millis = Duration::from_millis;
    for seq in 1..=4 {
        link.events(seq..=seq);
        assert!(hub.commit_at(&mut link, millis(seq)).is_empty());
        assert_eq!(link.machine.deadline(), Some(millis(1) + ACK_DELAY), "it counts from the first");
    }
    let due = millis(1) + ACK_DELAY;
    assert!(!link.machine.wants_commit(ACK_DELAY) && link.machine.wants_commit(due));
    assert_eq!(hub.commit_at(&mut link, due), [ack(4)]);
    assert_eq!(link.machine.deadline(), None);
    assert_eq!(hub.log(), numbers(1..=4), "only the ack waits");
}

#[test]
fn an_ack_waits_for_a_bounded_number_of_events_and_bytes() {
    let mut hub = Hub::new();
    let mut link = hub.greet("1", 1);
    link.events(1..=ACK_EVENTS);
    assert_eq!(hub.commit_at(&mut link, Duration::ZERO), [ack(ACK_EVENTS)], "a large turn");
    let (mut seq, mut heard) = (ACK_EVENTS, Vec::new());
    while heard.is_empty() {
        seq += 1;
        link.events(seq..=seq);
        heard = hub.commit_at(&mut link, Duration::ZERO);
    }
    assert_eq!((heard, seq), (vec![ack(seq)], 2 * ACK_EVENTS), "many small ones");
    link.gap(seq + 1, seq + ACK_EVENTS);
    assert_eq!(hub.commit_at(&mut link, Duration::ZERO), [ack(seq + ACK_EVENTS)], "the seqs of a gap count");

    let mut block = BlockBuilder::new(seq + ACK_EVENTS + 1, BytesMut::new());
    block.push(format!(r#"{{"text":"{}"}}"#, "x".repeat(ACK_BYTES)).as_bytes());
    link.machine.on_block(block.seal().expect("not empty").into_bytes());
    assert_eq!(hub.commit_at(&mut link, Duration::ZERO), [ack(seq + ACK_EVENTS + 1)], "a large event");
}

#[test]
fn who_asks_for_an_ack_gets_it_at_once() {
    let mut hub = Hub::new();
    let mut link = hub.greet("1", 1);
    link.events(1..=1);
    link.ask();
    assert_eq!(hub.commit_at(&mut link, Duration::ZERO), [ack(1)], "with the event");
    link.events(2..=2);
    assert!(hub.commit_at(&mut link, Duration::ZERO).is_empty());
    link.ask();
    assert_eq!(hub.commit_at(&mut link, Duration::ZERO), [ack(2)], "after it");
    link.ask();
    assert!(!link.machine.wants_commit(Duration::ZERO), "there is nothing to acknowledge");
    link.events(3..=3);
    assert!(hub.commit_at(&mut link, Duration::ZERO).is_empty(), "and nothing was asked for what comes later");
}

#[test]
fn a_duplicate_is_acknowledged_in_time_too() {
    let mut hub = Hub::new();
    let mut link = hub.greet("1", 1);
    link.events(1..=1);
    hub.commit(&mut link);
    link.events(1..=1);
    assert!(hub.commit_at(&mut link, Duration::ZERO).is_empty());
    assert_eq!(hub.commit_at(&mut link, ACK_DELAY), [ack(1)]);
}

#[test]
fn an_ack_that_waits_comes_before_an_orderly_close() {
    let mut hub = Hub::new();
    let mut links: Vec<Link> = Vec::new();
    for _ in 0..2 {
        let mut link = hub.greet("1", links.len() as u64 + 1);
        link.events(links.len() as u64 + 1..=links.len() as u64 + 1);
        assert!(hub.commit_at(&mut link, Duration::ZERO).is_empty());
        links.push(link);
    }
    assert_eq!(hub.heard(&links[0]), [ack(1), "Close(Superseded)".to_owned()]);
    hub.0.shutdown(crate::wire::frame::Reconnect { after: 0.2, jitter: 8.0 });
    let heard = hub.heard(&links[1]);
    assert_eq!((heard.len(), &heard[0]), (3, &ack(2)));
    assert!(heard[1].contains("bye") && heard[2] == "Close(Shutdown)", "{heard:?}");
    assert!(hub.commit_at(&mut links[1], ACK_DELAY).is_empty());
    assert_eq!(links[1].machine.deadline(), None, "a session that ends has no timer");
}

#[test]
fn the_credit_moves_with_each_ack_and_never_back() {
    let mut hub = Hub::new();
    let mut link = hub.greet("1", 1);
    assert_eq!(link.events(1..=CREDIT), Step::More);
    assert_eq!(hub.commit(&mut link), [ack(CREDIT)]);
    assert_eq!(link.events(CREDIT + 1..=2 * CREDIT), Step::More, "all of it again");
    assert_eq!(link.events(2 * CREDIT + 1..=2 * CREDIT + 1), Step::Commit);
    let heard = hub.commit(&mut link);
    assert_eq!((heard.len(), &heard[0]), (3, &ack(2 * CREDIT)), "what came before the violation counts");
    assert!(heard[1].contains("beyond the credit"), "{heard:?}");
}

#[test]
fn a_gap_may_reach_beyond_the_credit_and_what_follows_waits_for_its_ack() {
    let mut hub = Hub::new();
    let mut link = hub.greet("1", 1);
    assert_eq!(link.gap(1, 2 * CREDIT), Step::More);
    assert_eq!(hub.commit_at(&mut link, Duration::ZERO), [ack(2 * CREDIT)]);
    assert_eq!(link.gap(2 * CREDIT + 1, 9 * CREDIT), Step::More);
    assert_eq!(link.events(9 * CREDIT + 1..=9 * CREDIT + 1), Step::Commit);
    assert!(hub.commit(&mut link)[1].contains("beyond the credit"));
}

/// How a block fares.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fate {
    Acknowledged,
    /// Committed, but the link ended before the ack came back.
    AckLost,
    /// The link ended before the hub committed it.
    Lost,
}

proptest! {
    #[test]
    fn every_seq_is_appended_once_and_in_order(
        lives in prop::collection::vec((any::<u64>(), prop::collection::vec((1u64..6, 0..3usize), 0..5)), 1..12)
    ) {
        let mut hub = Hub::new();
        let (mut have, mut acked) = (0, 0);
        for (pick, blocks) in lives {
            let mut link = hub.greet("1", acked + 1);
            // From its first unacknowledged event, or from what welcome named, or from between.
            let mut next = acked + 1 + pick % (have - acked + 1);
            for (count, fate) in blocks {
                let fate = [Fate::Acknowledged, Fate::AckLost, Fate::Lost][fate];
                link.events(next..=next + count - 1);
                next += count;
                if fate == Fate::Lost {
                    break;
                }
                have = have.max(next - 1);
                prop_assert_eq!(hub.commit(&mut link), [ack(have)]);
                if fate == Fate::AckLost {
                    break;
                }
                acked = have;
            }
            link.machine.end(&mut hub.0);
        }
        prop_assert_eq!(hub.log(), numbers(1..=have));
    }
}

#[test]
fn unknown_frames_are_ignored() {
    let mut hub = Hub::new();
    let mut link = hub.greet("1", 1);
    assert_eq!(link.machine.on_text(r#"{"type":"later"}"#), Step::More);
    assert!(hub.commit(&mut link).is_empty());
}
