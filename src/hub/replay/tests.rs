use std::time::{Duration, Instant};

use super::*;
use crate::hub::entry::Record;
use crate::hub::log::LogLimits;
use crate::wire::topic::Pattern;

const ALL: LogLimits = LogLimits { events: 100_000, bytes: 1 << 30, age: None };

fn filter(patterns: &[&str]) -> Filter {
    Filter::new(patterns.iter().map(|text| Pattern::parse(text).expect("valid")))
}

fn append(log: &mut Log, events: u64, padding: usize) {
    for _ in 0..events {
        let kind = if log.head().is_multiple_of(3) { "third" } else { "other" };
        let json = serde_json::json!({"type": kind, "padding": "x".repeat(padding)}).to_string();
        log.append(Record::event(json.into()).expect("valid"), Duration::ZERO);
    }
}

fn log(limits: LogLimits, events: u64) -> Log {
    let mut log = Log::new("e".into(), limits);
    append(&mut log, events, 0);
    log
}

/// The chain of what a cursor gives: (prev, seq) of each.
fn read(cursor: &mut Cursor, budget: usize, log: &Log, replays: &mut Replays) -> Result<Vec<(u64, u64)>, Lost> {
    let mut items = VecDeque::new();
    cursor.read(budget, &mut items, log, replays, None)?;
    let chain = |item| {
        let Item::Text(frame) = item else { panic!("{item:?}") };
        let frame: serde_json::Value = serde_json::from_slice(&frame).expect("json");
        assert_eq!(frame["replay"], true);
        (frame["prev"].as_u64().expect("prev"), frame["seq"].as_u64().expect("seq"))
    };
    Ok(items.into_iter().map(chain).collect())
}

/// The chain as it should be.
fn chain(log: &Log, filter: &Filter, since: u64, end: u64) -> Vec<(u64, u64)> {
    let mut prev = since;
    let wanted = log.range(since + 1, end + 1).filter(|entry| filter.matches(&entry.record));
    wanted.map(|entry| (std::mem::replace(&mut prev, entry.offset), entry.offset)).collect()
}

#[test]
fn every_stretch_is_read_in_whatever_portions_and_chained() {
    let mut log = log(ALL, 500);
    let mut replays = Replays::default();
    for filter in [filter(&["*"]), filter(&["third"]), filter(&["none"]), filter(&["third", "other"])] {
        for since in [0, 1, 2, 63, 64, 65, 127, 300, 499, 500] {
            for budget in [1, 100, 5000, usize::MAX] {
                let mut cursor = replays.cursor(filter.clone(), since, &log, Encoding::Event);
                let wanted = chain(&log, &filter, since, log.head());
                assert_eq!(cursor.left(), wanted.len() as u64);
                let mut all = Vec::new();
                while !cursor.is_done() {
                    all.extend(read(&mut cursor, budget, &log, &mut replays).expect("the log has it"));
                }
                assert_eq!(all, wanted, "{filter:?} since {since} by {budget}");
            }
        }
        append(&mut log, 50, 0);
    }
}

#[test]
fn what_comes_after_the_beginning_of_a_replay_is_not_part_of_it() {
    let mut log = log(ALL, 10);
    let mut replays = Replays::default();
    let mut cursor = replays.cursor(filter(&["*"]), 7, &log, Encoding::Event);
    append(&mut log, 100, 0);
    assert_eq!(read(&mut cursor, usize::MAX, &log, &mut replays), Ok(vec![(7, 8), (8, 9), (9, 10)]));
    // A later reader finds the chunk and goes on behind it.
    let mut later = replays.cursor(filter(&["*"]), 7, &log, Encoding::Event);
    assert_eq!(read(&mut later, usize::MAX, &log, &mut replays).map(|all| all.len()), Ok(103));
}

#[test]
fn frames_are_made_once_for_all_who_read_the_same() {
    let log = log(ALL, 1000);
    let mut replays = Replays::default();
    let mut cursors: Vec<_> = (0..100).map(|n| replays.cursor(filter(&["*"]), n % 10, &log, Encoding::Event)).collect();
    while cursors.iter().any(|cursor| !cursor.is_done()) {
        for cursor in &mut cursors {
            read(cursor, 4096, &log, &mut replays).expect("the log has it");
        }
    }
    // The first of each place where somebody began is made for it, and again for those who come from before.
    assert!((1000..=1000 + 2 * 100).contains(&replays.encoded()), "{}", replays.encoded());
}

#[test]
fn a_cursor_that_the_log_has_overtaken_is_lost_and_never_skips() {
    let mut log = log(LogLimits { events: 100, ..ALL }, 100);
    let mut replays = Replays::default();
    let mut cursor = replays.cursor(filter(&["third"]), 0, &log, Encoding::Event);
    let first = read(&mut cursor, 1, &log, &mut replays).expect("the log has it");
    assert_eq!(first, [(0, 1)]);
    append(&mut log, 10, 0);
    assert_eq!(read(&mut cursor, usize::MAX, &log, &mut replays), Err(Lost));
    // One that has read all that matches needs nothing more.
    let mut done = replays.cursor(filter(&["none"]), 50, &log, Encoding::Event);
    append(&mut log, 1000, 0);
    assert_eq!(read(&mut done, usize::MAX, &log, &mut replays), Ok(vec![]));
}

#[test]
fn fewer_patterns_leave_out_what_only_the_others_matched() {
    let log = log(ALL, 9);
    let mut replays = Replays::default();
    let mut cursor = replays.cursor(filter(&["third", "other"]), 0, &log, Encoding::Event);
    assert_eq!(read(&mut cursor, 1, &log, &mut replays), Ok(vec![(0, 1)]));
    cursor.narrow(&filter(&["th*", "third.*", "third"]), &mut replays);
    assert_eq!(read(&mut cursor, usize::MAX, &log, &mut replays), Ok(vec![(1, 4), (4, 7)]));
    cursor.narrow(&filter(&[]), &mut replays);
    assert_eq!(read(&mut cursor, usize::MAX, &log, &mut replays), Ok(vec![]));
}

#[test]
fn the_shared_frames_stay_within_their_bound() {
    let mut log = Log::new("e".into(), ALL);
    append(&mut log, 2000, 20_000);
    append(&mut log, 3, 1 << 20);
    let mut replays = Replays::default();
    for round in 0..3 {
        let mut cursors: Vec<_> =
            (0..5).map(|n| replays.cursor(filter(&["*"]), 300 * n + round, &log, Encoding::Event)).collect();
        while cursors.iter().any(|cursor| !cursor.is_done()) {
            for cursor in &mut cursors {
                let mut items = VecDeque::new();
                cursor.read(64 << 10, &mut items, &log, &mut replays, None).expect("the log has it");
                assert!(replays.bytes() <= 2 * CACHE_BYTES, "{}", replays.bytes());
            }
        }
    }
    let kept: usize = replays.chunks.values().map(Chunk::bytes).sum();
    assert_eq!(replays.bytes(), kept, "the count is right");
    assert_eq!(replays.order.len(), replays.chunks.len());
}

#[test]
fn filters_count_for_the_bound_too() {
    let log = log(ALL, 1);
    let mut replays = Replays::default();
    for n in 0..1000 {
        let patterns: Vec<_> = (0..64).map(|m| format!("{n}.{m}.{}", "x".repeat(1000))).collect();
        let filter = filter(&patterns.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(replays.cursor(filter, 0, &log, Encoding::Event).left(), 0);
    }
    let held: usize = replays.filters.iter().map(|filter| filter.bytes()).sum();
    assert!(held <= 2 * CACHE_BYTES, "{held}");
}

#[test]
fn a_replay_through_many_patterns_costs_little_more_than_through_one() {
    let log = log(ALL, 20_000);
    let time = |patterns: u32| {
        let once = |round: u32| {
            let names: Vec<_> = (0..patterns).map(|n| format!("other.{n}.{round}")).collect();
            let filter = filter(&names.iter().map(String::as_str).collect::<Vec<_>>());
            let begin = Instant::now();
            assert_eq!(Replays::default().cursor(filter, 0, &log, Encoding::Event).left(), 0);
            begin.elapsed()
        };
        (0..5).map(once).min().expect("five of them")
    };
    let (one, many) = (time(1), time(256));
    assert!(many < 20 * one, "one {one:?}, 256 {many:?}");
}

/// `cargo test --release --no-default-features --lib replay -- --ignored --nocapture`
#[test]
#[ignore = "a measurement, for docs/performance.md"]
#[expect(clippy::print_stdout, reason = "its output is its purpose")]
fn frames_per_second_beside_live_fan_out() {
    use crate::hub::registry::{Registry, Role};
    const EVENTS: u64 = 10_000;
    const SESSIONS: u64 = 100;
    let mut log = Log::new("e".into(), ALL);
    append(&mut log, EVENTS, 350);
    let frames = (EVENTS * SESSIONS) as f64;

    let mut registry = Registry::new(1 << 20);
    let ids: Vec<_> = (0..SESSIONS).map(|_| registry.open(Role::Subscriber)).collect();
    for id in &ids {
        registry.set_filter(*id, filter(&["*"]));
    }
    let mut items = VecDeque::new();
    let begin = Instant::now();
    for offset in 1..=EVENTS {
        registry.fan_out(log.get(offset).expect("kept"));
        if offset % 100 == 0 {
            for id in &ids {
                registry.take(*id, usize::MAX, &mut items, &log);
                items.clear();
            }
        }
    }
    let live = frames / begin.elapsed().as_secs_f64();

    let mut replays = Replays::default();
    let begin = Instant::now();
    let mut cursors: Vec<_> = (0..SESSIONS).map(|_| replays.cursor(filter(&["*"]), 0, &log, Encoding::Event)).collect();
    let counted = begin.elapsed() / SESSIONS as u32;
    while cursors.iter().any(|cursor| !cursor.is_done()) {
        for cursor in &mut cursors {
            cursor.read(64 << 10, &mut items, &log, &mut replays, None).expect("the log has it");
            items.clear();
        }
    }
    let replay = frames / begin.elapsed().as_secs_f64();
    println!(
        "{SESSIONS} sessions, {EVENTS} events: live {live:.2e} frames/s, replay {replay:.2e}, {counted:?} to begin one"
    );
}
