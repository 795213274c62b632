use std::fs::File;

use super::*;
use crate::clock::tests::{HOUR, Hands};
use crate::hub::log::ENTRY_BYTES;

const ALL: LogLimits = LogLimits { events: 1000, bytes: 1 << 20, age: None };

fn open(path: &Path, limits: LogLimits) -> (LogStore, Recovered) {
    LogStore::open(path, limits, "fresh").expect("opens")
}

fn events(numbers: std::ops::Range<u64>) -> Vec<Record> {
    let event = |n| Record::event(format!(r#"{{"type":"t","n":{n}}}"#).into()).expect("valid");
    numbers.map(event).collect()
}

fn mark(have: u64) -> Mark {
    Mark { name: "engine".into(), epoch: "1".into(), have }
}

fn append(store: &mut LogStore, numbers: std::ops::Range<u64>) {
    let marks = [mark(numbers.end - 1)];
    store.commit(events(numbers).iter(), &marks, &[]).expect("stored");
    store.make_room().expect("trimmed");
}

fn numbers(recovered: &Recovered) -> Vec<u64> {
    let number = |(_, record): &(i64, Record)| {
        let json: serde_json::Value = serde_json::from_slice(record.json()).expect("json");
        json["n"].as_u64().expect("a number")
    };
    recovered.entries.iter().map(number).collect()
}

#[test]
fn a_crash_keeps_epoch_offsets_marks_and_entries() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("hub.db");
    let (mut store, recovered) = LogStore::open(&path, ALL, "first").expect("opens");
    assert_eq!((recovered.epoch.as_str(), recovered.head, recovered.entries.len()), ("first", 0, 0));
    append(&mut store, 1..4);
    append(&mut store, 4..6);
    let gap = Record::gap("engine", "1", 6, 9, "expired");
    store.commit([&gap].into_iter(), &[mark(u64::MAX)], &[]).expect("stored");
    drop(store); // neither closed nor synced

    let (store, recovered) = open(&path, ALL);
    assert_eq!((recovered.epoch.as_str(), recovered.head, store.head()), ("first", 6, 6));
    assert_eq!(recovered.marks, [mark(u64::MAX)]);
    let (_, last) = recovered.entries.last().expect("entries");
    assert_eq!((last.carried(), last.json()), (Carried::Gap, gap.json()));
    assert_eq!((recovered.entries.len(), recovered.entries[0].1.kind()), (6, "t"));
    store.close().expect("closes");
    let (_, recovered) = open(&path, ALL);
    assert_eq!((recovered.epoch.as_str(), recovered.head), ("first", 6));
}

#[test]
fn the_ring_is_bounded_and_the_offsets_go_on() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("hub.db");
    let one = cost(&events(1..2)[0]) as u64;
    for limits in [
        LogLimits { events: 20, ..ALL },
        LogLimits { bytes: 20 * one as usize, ..ALL },
        LogLimits { age: Some(Duration::ZERO), ..ALL },
        LogLimits { events: 0, ..ALL },
    ] {
        let (mut store, before) = open(&path, limits);
        for n in before.head + 1..before.head + 100 {
            append(&mut store, n..n + 1);
            assert!(store.events <= 22 && store.bytes <= 22 * (one + 4), "{limits:?}: {} events", store.events);
            if limits.age.is_some() {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
        let head = store.head();
        drop(store);
        let (_, after) = open(&path, limits);
        assert_eq!((after.head, after.head - before.head), (head, 99), "{limits:?}");
        assert_eq!(*numbers(&after).last().unwrap_or(&head), head);
    }
}

#[test]
fn long_runs_are_split_and_the_file_stays_small() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("hub.db");
    let limits = LogLimits { events: 1_000_000, bytes: 2 << 20, age: None };
    let (mut store, _) = open(&path, limits);
    let big: Vec<Record> =
        (0..500).map(|n| Record::event(format!(r#"{{"n":{n},"x":"{:01000}"}}"#, 0).into()).expect("valid")).collect();
    for _ in 0..60 {
        store.commit(big.iter(), &[], &[]).expect("stored");
        store.make_room().expect("trimmed");
    }
    assert!(store.rows.len() > 10, "{} rows", store.rows.len());
    drop(store);
    let size = std::fs::metadata(&path).expect("there").len();
    assert!(size < 8 << 20, "{size} bytes after 30 MB went through a ring of 2 MiB");
    let (store, recovered) = open(&path, LogLimits { bytes: 100 * (ENTRY_BYTES + 1000), ..limits });
    assert_eq!(recovered.head, 30_000);
    assert!(store.events >= 100 && store.events < 200, "{} events", store.events);
}

#[test]
fn the_death_of_the_machine_ends_the_epoch_unless_the_log_was_closed() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("hub.db");
    let (mut store, _) = LogStore::open(&path, ALL, "first").expect("opens");
    append(&mut store, 1..4);
    put(&store.db, "boot", "another life").expect("put");
    drop(store);
    let (store, recovered) = LogStore::open(&path, ALL, "second").expect("opens");
    assert_eq!((recovered.epoch.as_str(), recovered.head), ("second", 3));
    assert_eq!(numbers(&recovered), [1, 2, 3]);
    store.close().expect("closes");
    let (store, recovered) = LogStore::open(&path, ALL, "third").expect("opens");
    assert_eq!(recovered.epoch, "second");
    assert_eq!(get::<String>(&store.db, "boot").expect("read"), boot_id());
}

#[test]
fn emitters_are_forgotten_on_demand() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("hub.db");
    let (mut store, _) = open(&path, ALL);
    append(&mut store, 1..2);
    store.commit([].into_iter(), &[], &["engine".to_owned()]).expect("stored");
    drop(store);
    assert!(open(&path, ALL).1.marks.is_empty());
}

#[test]
fn a_damaged_log_is_moved_aside_and_a_new_epoch_begins() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("hub.db");
    let (mut store, _) = LogStore::open(&path, ALL, "first").expect("opens");
    for n in 1..50 {
        append(&mut store, n..n + 1);
    }
    store.close().expect("closes");
    let file = File::options().write(true).open(&path).expect("there");
    file.set_len(20_000).expect("torn");
    let (mut store, recovered) = LogStore::open(&path, ALL, "second").expect("opens");
    assert_eq!((recovered.epoch.as_str(), recovered.head, recovered.entries.len()), ("second", 0, 0));
    assert!(recovered.set_aside.is_some_and(|aside| aside.exists()));
    append(&mut store, 1..2);

    store.db.execute("UPDATE entry SET data = x'0001'", []).expect("torn");
    drop(store);
    let (_, recovered) = LogStore::open(&path, ALL, "third").expect("opens");
    assert_eq!((recovered.epoch.as_str(), recovered.head), ("third", 0));
}

#[test]
fn an_empty_file_becomes_a_log() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("hub.db");
    File::create(&path).expect("made");
    assert_eq!(LogStore::open(&path, ALL, "first").expect("opens").1.epoch, "first");
}

#[test]
fn what_cannot_be_a_log_is_refused_with_a_remedy() {
    let dir = tempfile::tempdir().expect("a directory");
    let refused = |path: &Path| LogStore::open(path, ALL, "fresh").expect_err("refused");
    let path = dir.path().join("hub.db");
    let (_owner, _) = open(&path, ALL);
    let error = refused(&path);
    assert_eq!(error.kind(), ErrorKind::LogLocked);
    let pid = std::process::id().to_string();
    assert!(error.to_string().contains(&pid) && error.to_string().contains("own log_path"), "{error}");

    let foreign = dir.path().join("foreign.db");
    Connection::open(&foreign).and_then(|db| db.execute_batch("CREATE TABLE t (x)")).expect("made");
    let text = dir.path().join("notes.txt");
    std::fs::write(&text, "x".repeat(5000)).expect("written");
    for (path, word) in [
        (dir.path().to_owned(), "is a directory"),
        (dir.path().join("missing/hub.db"), "directory does not exist"),
        (foreign.clone(), "choose another path"),
        (text.clone(), "choose another path"),
    ] {
        let error = refused(&path);
        assert_eq!(error.kind(), ErrorKind::LogCorrupt);
        let told = error.to_string();
        assert!(
            told.contains("log_path") && told.contains(&path.display().to_string()) && told.contains(word),
            "{told}"
        );
    }
    assert!(foreign.exists() && text.exists(), "a file of somebody else stays where it is");
}

#[test]
fn a_full_disk_stores_nothing_and_the_next_try_goes_on() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("hub.db");
    let (mut store, _) = open(&path, ALL);
    append(&mut store, 1..4);
    let pages = sqlite::pragma(&store.db, "page_count").expect("read");
    store.db.query_row(&format!("PRAGMA max_page_count = {pages}"), [], |_| Ok(())).expect("set");
    let big = Record::event(format!(r#"{{"x":"{}"}}"#, "x".repeat(100_000)).into()).expect("valid");
    let error = store.commit([&big].into_iter(), &[mark(4)], &[]).expect_err("full");
    assert_eq!(error.kind(), ErrorKind::LogIo);
    assert!(error.report().contains("hub.db") && error.report().contains("full"), "{}", error.report());
    assert_eq!(store.head(), 3);
    store.db.query_row("PRAGMA max_page_count = 100000", [], |_| Ok(())).expect("set");
    append(&mut store, 4..5);
    drop(store);
    let (_, recovered) = open(&path, ALL);
    assert_eq!((numbers(&recovered), recovered.marks), (vec![1, 2, 3, 4], vec![mark(4)]));
}

#[test]
fn a_wall_clock_that_is_set_expires_nothing() {
    for by in [10 * HOUR, -10 * HOUR] {
        let dir = tempfile::tempdir().expect("a directory");
        let (path, hands) = (dir.path().join("hub.db"), Hands::new());
        let limits = LogLimits { age: Some(Duration::from_millis(HOUR as u64)), ..ALL };
        let open = || LogStore::open_at(&path, limits, "fresh", &hands.clock()).expect("opens");
        let (mut store, _) = open();
        append(&mut store, 1..2);
        hands.set_wall(by);
        append(&mut store, 2..3);
        drop(store);
        hands.set_wall(by);
        let (mut store, recovered) = open();
        assert_eq!(numbers(&recovered), [1, 2]);
        assert_eq!(recovered.now, recovered.entries[1].0, "no time has passed");
        hands.pass(2 * HOUR);
        append(&mut store, 3..4);
        drop(store);
        assert_eq!(numbers(&open().1), [3], "two hours have");
    }
}
