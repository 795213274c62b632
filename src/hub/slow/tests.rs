use bytes::Bytes;
use proptest::prelude::*;
use serde_json::Value;

use super::*;
use crate::hub::entry::{Entry, Record};
use crate::hub::log::{Log, LogLimits};
use crate::hub::outbox::Item;
use crate::hub::outbox::{FRAME_BYTES, Outbox};
use crate::hub::replay::Replays;
use crate::wire::close::CloseCode;
use crate::wire::subscriber::Slow;

fn log() -> Log {
    Log::new("e".into(), LogLimits { events: 0, bytes: 0, age: None })
}

fn entry(offset: u64, key: Option<u8>, padding: usize) -> Entry {
    let mut event = serde_json::json!({"padding": "x".repeat(padding)});
    if let Some(key) = key {
        event["key"] = format!("k{key}").into();
    }
    Entry { offset, record: Record::event(event.to_string().into()).expect("valid") }
}

/// What came out: an event, a gap, something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Out {
    Event { seq: u64, prev: u64 },
    Gap { from: u64, to: u64, shed: bool },
    Other,
}

fn take(outbox: &mut Outbox, budget: usize) -> Vec<Out> {
    let mut items = VecDeque::new();
    outbox.take(budget, &mut items, &log(), &mut Replays::default()).expect("no replay");
    let read = |item| {
        let Item::Text(frame) = item else { return Out::Other };
        let frame: Value = serde_json::from_slice(&frame).expect("json");
        let (number, data) = (|value: &Value| value.as_u64().expect("a number"), &frame["data"]);
        match frame["type"].as_str() {
            Some("event") => Out::Event { seq: number(&frame["seq"]), prev: number(&frame["prev"]) },
            Some("gap") => {
                let shed = match data["reason"].as_str() {
                    Some("shed") => true,
                    Some("conflated") => false,
                    other => panic!("{other:?}"),
                };
                Out::Gap { from: number(&data["from"]), to: number(&data["to"]), shed }
            }
            _ => Out::Other,
        }
    };
    items.into_iter().map(read).collect()
}

fn push(outbox: &mut Outbox, entry: &Entry) {
    let item = Item::Text(entry.frame(entry.offset - 1, false));
    outbox.push_event(item, &mark(entry)).expect("never too much");
}

#[test]
fn what_did_not_fit_is_told_in_its_place_before_the_next_event() {
    let one = FRAME_BYTES + entry(1, None, 10).frame(0, false).len();
    let mut outbox = Outbox::new(2 * one, Slow::DropWithGap);
    for offset in 1..=5 {
        push(&mut outbox, &entry(offset, None, 10));
    }
    assert_eq!(take(&mut outbox, 1), [Out::Event { seq: 1, prev: 0 }]);
    push(&mut outbox, &entry(6, None, 10));
    push(&mut outbox, &entry(7, None, 10));
    let (second, gap) = (Out::Event { seq: 2, prev: 1 }, Out::Gap { from: 3, to: 5, shed: true });
    // And the one that came too late for the next event: the gap does not wait for another.
    let rest = [second, gap, Out::Event { seq: 6, prev: 5 }, Out::Gap { from: 7, to: 7, shed: true }];
    assert_eq!(take(&mut outbox, usize::MAX), rest);
    assert_eq!((outbox.bytes(), take(&mut outbox, usize::MAX)), (0, vec![]));
}

#[test]
fn of_each_key_the_newest_is_kept_in_order() {
    let one = FRAME_BYTES + entry(1, Some(1), 10).frame(0, false).len();
    let mut outbox = Outbox::new(6 * one, Slow::Conflate);
    for (offset, key) in [(1, 1), (2, 2), (3, 1), (4, 3), (5, 1), (6, 2), (7, 3)] {
        push(&mut outbox, &entry(offset, Some(key), 10));
    }
    let kept = [
        Out::Gap { from: 1, to: 4, shed: false },
        Out::Event { seq: 5, prev: 4 },
        Out::Event { seq: 6, prev: 5 },
        Out::Event { seq: 7, prev: 6 },
    ];
    assert_eq!(take(&mut outbox, usize::MAX), kept);
}

#[test]
fn more_keys_than_fit_leave_the_newest_ones() {
    let one = FRAME_BYTES + entry(100, Some(100), 10).frame(99, false).len();
    let mut outbox = Outbox::new(16 * one, Slow::Conflate);
    for offset in 100..=199 {
        push(&mut outbox, &entry(offset, Some(offset as u8), 10));
        assert!(outbox.bytes() <= 16 * one);
    }
    let out = take(&mut outbox, usize::MAX);
    assert!(matches!(out[0], Out::Gap { from: 100, shed: true, .. }), "{:?}", out[0]);
    assert!(out.len() >= 14 && matches!(out[out.len() - 1], Out::Event { seq: 199, .. }));
}

#[test]
fn answers_are_never_left_out() {
    for slow in [Slow::Conflate, Slow::DropWithGap] {
        let mut outbox = Outbox::new(1000, slow);
        outbox.push(vec![b'x'; 900].into()).expect("room");
        for offset in 1..=100 {
            push(&mut outbox, &entry(offset, Some(1), 10));
        }
        assert!(outbox.push(vec![b'x'; 900].into()).is_err(), "who asks and does not read is closed");
        outbox.abandon(CloseCode::Slow);
        assert_eq!(take(&mut outbox, usize::MAX), [Out::Other]);
    }
}

#[derive(Clone, Debug)]
enum Step {
    Event { key: Option<u8>, padding: usize },
    Answer(usize),
    Take(usize),
    Policy(Slow),
}

fn step() -> impl Strategy<Value = Step> {
    let lossy = prop_oneof![Just(Slow::Conflate), Just(Slow::DropWithGap)];
    prop_oneof![
        20 => (prop::option::of(0..6u8), 0..300usize).prop_map(|(key, padding)| Step::Event { key, padding }),
        1 => (1..200usize).prop_map(Step::Answer),
        3 => (1..2000usize).prop_map(Step::Take),
        1 => Just(Step::Take(usize::MAX)),
        1 => lossy.prop_map(Step::Policy),
    ]
}

proptest! {
    #[test]
    fn every_event_is_delivered_or_lies_in_exactly_one_gap(
        limit in 200..4000usize,
        steps in prop::collection::vec(step(), 1..400),
    ) {
        let mut outbox = Outbox::new(limit, Slow::Conflate);
        let mut keys = vec![None]; // by offset
        let mut out = Vec::new();
        let mut answers = 0;
        for step in steps {
            match step {
                Step::Event { key, padding } => {
                    keys.push(key);
                    push(&mut outbox, &entry(keys.len() as u64 - 1, key, padding));
                }
                Step::Answer(len) => {
                    if outbox.push(Bytes::from(vec![b' '; len].into_iter().chain(*b"{}").collect::<Vec<_>>())).is_ok() {
                        answers += 1;
                    }
                }
                Step::Take(budget) => out.extend(take(&mut outbox, budget)),
                Step::Policy(slow) => outbox.set_slow(slow),
            }
            prop_assert!(outbox.bytes() <= limit || outbox.frames() == 1, "{} of {limit} bytes", outbox.bytes());
        }
        out.extend(take(&mut outbox, usize::MAX));
        prop_assert_eq!(outbox.bytes(), 0);
        // In order and without holes: each event or gap begins where the one before it ended.
        let mut at = 0;
        let mut delivered = Vec::new();
        let mut conflated = Vec::new();
        for each in &out {
            match *each {
                Out::Event { seq, prev } => {
                    prop_assert_eq!((seq, prev), (at + 1, at));
                    delivered.push(seq);
                    at = seq;
                }
                Out::Gap { from, to, shed } => {
                    prop_assert!(from == at + 1 && to >= from, "{from} to {to} after {at}");
                    if !shed {
                        conflated.extend(from..=to);
                    }
                    at = to;
                }
                Out::Other => {}
            }
        }
        prop_assert_eq!(at, keys.len() as u64 - 1, "to the end");
        prop_assert_eq!(out.iter().filter(|each| **each == Out::Other).count(), answers);
        // What was left out for a newer event had one.
        for offset in conflated {
            let key = keys[offset as usize];
            prop_assert!(key.is_some() && keys[offset as usize + 1..].contains(&key), "{offset}");
        }
    }
}
