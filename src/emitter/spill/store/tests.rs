use std::path::Path;

use super::*;
use crate::emitter::tests::config;
use crate::wire::block::BlockBuilder;

fn limits() -> Limits {
    Limits::from(&config())
}

fn open(path: &Path) -> (SpillStore, Recovered) {
    open_with(path, limits())
}

fn open_with(path: &Path, limits: Limits) -> (SpillStore, Recovered) {
    SpillStore::open(path, limits, None, 7, None).expect("usable")
}

/// `count` events of about `size` bytes.
fn block(first: u64, count: u64, size: usize) -> Item {
    let mut builder = BlockBuilder::new(first, bytes::BytesMut::new());
    for seq in first..first + count {
        builder.push(format!("{{\"seq\":{seq},\"pad\":\"{}\"}}", "x".repeat(size)).as_bytes());
    }
    Item::Events(builder.seal().expect("not empty"))
}

fn gap(from: u64, to: u64, reason: GapReason) -> Gap {
    Gap { from, to, reason }
}

fn spans(items: &[Item]) -> Vec<(u64, u64, bool)> {
    items.iter().map(|item| (item.first(), item.last(), item.events() > 0)).collect()
}

fn rows(store: &SpillStore) -> i64 {
    store.db.query_row("SELECT count(*) FROM item", [], |row| row.get(0)).expect("readable")
}

fn refusal(path: &Path) -> Error {
    SpillStore::open(path, limits(), None, 7, None).expect_err("refused")
}

#[test]
fn a_clean_end_keeps_epoch_seq_and_what_is_not_confirmed() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    let (mut store, fresh) = open(&path);
    assert_eq!((fresh.next_seq, fresh.base, fresh.last), (1, 0, 0));
    store.reserve(10_000, 0).expect("stored");
    let items = [block(1, 10, 20), block(11, 5, 20)];
    assert!(store.append(&items, 0, 0).expect("stored").is_empty());
    assert_eq!(store.read(0, usize::MAX).expect("readable"), items);
    assert_eq!(spans(&store.read(12, usize::MAX).expect("readable")), [(13, 15, true)]);
    assert_eq!(spans(&store.read(0, 1).expect("readable")), [(1, 10, true)], "at least one item");
    store.trim(10).expect("stored");
    store.close(21, 12).expect("closed");

    let (store, again) = open(&path);
    assert_eq!((again.emitter, again.epoch), (fresh.emitter, fresh.epoch));
    assert_eq!((again.next_seq, again.base, again.last), (21, 12, 20), "16 to 20 could not be stored");
    assert_eq!(again.gaps, [gap(16, 20, GapReason::Crash)]);
    assert_eq!(spans(&store.read(12, usize::MAX).expect("readable")), [(13, 15, true), (16, 20, false)]);
    assert_eq!(again.bytes, store.bytes());
}

#[test]
fn after_a_clean_end_with_everything_confirmed_nothing_is_left() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    let (mut store, _) = open(&path);
    store.reserve(10_000, 0).expect("stored");
    store.append(&[block(1, 3, 20)], 0, 0).expect("stored");
    store.close(8, 7).expect("closed");
    for _ in 0..2 {
        // The second time after a crash in which no seq was used.
        let (_, again) = open(&path);
        assert_eq!((again.next_seq, again.base, again.last), (8, 7, 7));
        assert!(again.gaps.is_empty());
    }
}

#[test]
fn after_a_crash_no_promised_seq_is_used_again_and_a_gap_tells() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    let (mut store, fresh) = open(&path);
    store.reserve(100, 0).expect("stored");
    store.append(&[block(1, 10, 20)], 0, 0).expect("stored");
    drop(store);
    let (mut store, again) = open(&path);
    assert_eq!(again.epoch, fresh.epoch);
    assert_eq!((again.next_seq, again.base, again.last), (101, 0, 100));
    assert_eq!(again.gaps, [gap(11, 100, GapReason::Crash)]);
    store.reserve(200, 50).expect("stored");
    drop(store);
    let (store, again) = open(&path);
    assert_eq!((again.next_seq, again.base), (201, 50));
    assert_eq!(again.gaps, [gap(11, 200, GapReason::Crash)], "gaps that touch are one");
    assert_eq!(spans(&store.read(50, usize::MAX).expect("readable")), [(51, 200, false)]);
}

#[test]
fn another_emitter_begins_another_epoch() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    let name = |name| SpillStore::open(&path, limits(), Some(name), fastrand::u64(..), None).expect("usable").1;
    let (first, same, other) = (name("ada"), name("ada"), name("bob"));
    assert_eq!(first.epoch, same.epoch);
    assert_ne!(first.epoch, other.epoch);
}

#[test]
fn the_bound_on_events_leaves_one_gap_row_however_long_the_outage() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    let (mut store, _) = open_with(&path, Limits { events: 10, ..limits() });
    let mut dropped = Vec::new();
    for n in 0..20 {
        dropped.extend(store.append(&[block(n * 4 + 1, 4, 20)], 0, 0).expect("stored"));
    }
    assert_eq!(dropped.iter().map(Gap::count).sum::<u64>(), 70);
    assert!(dropped.windows(2).all(|pair| pair[0].to + 1 == pair[1].from));
    let items = store.read(0, usize::MAX).expect("readable");
    assert_eq!(items[0], Item::Gap(gap(1, 70, GapReason::SpillFull)));
    assert_eq!(items.iter().map(Item::events).sum::<u64>(), 10);
    assert_eq!(rows(&store), items.len() as i64);
    drop(store);
    assert_eq!(open(&path).1.gaps, [gap(1, 70, GapReason::SpillFull)]);
}

#[test]
fn the_bound_on_bytes_gives_up_whole_blocks() {
    let home = tempfile::tempdir().expect("writable");
    let (mut store, _) = open_with(&home.path().join("spill.db"), Limits { bytes: 3000, ..limits() });
    let dropped = store.append(&[block(1, 10, 100), block(11, 10, 100), block(21, 10, 100)], 0, 0).expect("stored");
    assert_eq!(dropped, [gap(1, 10, GapReason::SpillFull)]);
    assert!(store.bytes() <= 3000);
}

#[test]
fn events_past_their_age_are_given_up() {
    let home = tempfile::tempdir().expect("writable");
    let (mut store, _) =
        open_with(&home.path().join("spill.db"), Limits { age: Some(Duration::from_secs(60)), ..limits() });
    store.append(&[block(1, 5, 20), block(6, 5, 20)], 0, 0).expect("stored");
    store.db.execute("UPDATE item SET stored_at = stored_at - 61000 WHERE first = 1", []).expect("writable");
    let dropped = store.append(&[block(11, 5, 20)], 0, 0).expect("stored");
    assert_eq!(dropped, [gap(1, 5, GapReason::Expired)]);
    assert_eq!(spans(&store.read(0, usize::MAX).expect("readable"))[..2], [(1, 5, false), (6, 10, true)]);
}

#[test]
fn room_is_made_beside_what_is_in_flight_and_by_what_is_confirmed() {
    let home = tempfile::tempdir().expect("writable");
    let (mut store, _) = open_with(&home.path().join("spill.db"), Limits { events: 6, ..limits() });
    store.append(&[block(1, 3, 20), block(4, 3, 20)], 0, 0).expect("stored");
    let dropped = store.append(&[block(7, 3, 20)], 4, 0).expect("stored");
    assert_eq!(dropped, [gap(7, 9, GapReason::SpillFull)], "1 to 6 belong to blocks on their way");
    let dropped = store.append(&[block(10, 4, 20)], 6, 6).expect("stored");
    assert!(dropped.is_empty(), "1 to 6 are confirmed: {dropped:?}");
    assert_eq!(spans(&store.read(6, usize::MAX).expect("readable")), [(7, 9, false), (10, 13, true)]);
}

#[test]
fn other_policies_leave_the_bounds_to_the_outbox() {
    let home = tempfile::tempdir().expect("writable");
    let (mut store, _) = open_with(&home.path().join("spill.db"), Limits { events: 2, drop_oldest: false, ..limits() });
    assert!(store.append(&[block(1, 9, 20)], 0, 0).expect("stored").is_empty());
    assert_eq!(store.usage.events, 9);
}

#[test]
fn a_block_confirmed_in_part_stays_whole_and_is_read_from_its_middle() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    let (mut store, _) = open(&path);
    store.append(&[block(1, 10, 20), block(11, 10, 20)], 0, 0).expect("stored");
    store.trim(15).expect("stored");
    assert_eq!((rows(&store), store.usage.events), (1, 10));
    assert_eq!(spans(&store.read(15, usize::MAX).expect("readable")), [(16, 20, true)]);
    drop(store);
    let (mut store, again) = open(&path);
    assert_eq!((again.base, again.last), (15, 20));
    store.trim(20).expect("stored");
    assert_eq!((rows(&store), store.bytes()), (0, 0));
}

#[test]
fn a_write_that_fails_changes_nothing() {
    let home = tempfile::tempdir().expect("writable");
    let (mut store, _) = open(&home.path().join("spill.db"));
    store.append(&[block(1, 5, 20)], 0, 0).expect("stored");
    let before = store.bytes();
    let error = store.append(&[block(6, 5, 20), block(6, 5, 20)], 0, 0).expect_err("the same seq twice");
    assert_eq!((error.kind(), store.bytes(), rows(&store)), (ErrorKind::SpillIo, before, 1));
    store.append(&[block(6, 5, 20)], 0, 0).expect("may be tried again");
}

#[test]
fn a_second_owner_is_told_who_has_the_file() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    let (store, _) = open(&path);
    let error = refusal(&path);
    assert_eq!(error.kind(), ErrorKind::SpillLocked);
    assert!(error.to_string().contains(&format!("process {} (this process)", std::process::id())), "{error}");
    drop(store);
    open(&path);
}

#[test]
fn what_is_no_spill_is_refused_and_left_alone() {
    let home = tempfile::tempdir().expect("writable");
    let text = home.path().join("notes.txt");
    std::fs::write(&text, "not a database, but longer than a header of SQLite ".repeat(10)).expect("writable");
    let foreign = home.path().join("foreign.db");
    Connection::open(&foreign).and_then(|db| db.execute_batch("CREATE TABLE t (x)")).expect("a database");
    let missing = home.path().join("nowhere").join("spill.db");
    for path in [&text, &foreign, &missing, &home.path().to_owned()] {
        let before = std::fs::read(path).ok();
        let error = refusal(path);
        assert_eq!(error.kind(), ErrorKind::SpillCorrupt, "{error}");
        assert!(error.to_string().contains(&path.display().to_string()), "{error}");
        assert_eq!(std::fs::read(path).ok(), before);
    }
}

#[cfg(unix)]
#[test]
#[expect(clippy::print_stderr, reason = "a skipped test says why")]
fn a_read_only_directory_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let home = tempfile::tempdir().expect("writable");
    let allow = |mode| std::fs::set_permissions(home.path(), std::fs::Permissions::from_mode(mode)).expect("ours");
    allow(0o555);
    if std::fs::File::create(home.path().join("probe")).is_ok() {
        eprintln!("skipped: this user (root?) may write into a read-only directory");
    } else {
        let error = refusal(&home.path().join("spill.db"));
        assert_eq!(error.kind(), ErrorKind::SpillCorrupt);
        assert!(error.to_string().contains("make the directory writable"), "{error}");
    }
    allow(0o755);
}

#[test]
fn a_million_events_leave_a_small_file_behind() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    let (mut store, _) = open_with(&path, Limits { events: 2_000_000, ..limits() });
    let mut first = 1;
    while first < 1_000_000 {
        let items: Vec<_> = (0..20).map(|n| block(first + n * 500, 500, 40)).collect();
        store.append(&items, 0, 0).expect("stored");
        first += 10_000;
    }
    store.db.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").expect("alone");
    let full = std::fs::metadata(&path).expect("there").len();
    assert!(full > 50 << 20, "{full}");
    store.trim(1_000_000).expect("stored");
    while store.shrink(1024).expect("alone") {}
    assert_eq!(store.bytes(), 0);
    store.close(1_000_001, 1_000_000).expect("closed");
    let left = std::fs::metadata(&path).expect("there").len();
    assert!(left < 1 << 20, "{left} of {full} bytes are left");
}

fn refused(seq: u64) -> Gap {
    gap(seq, seq, GapReason::Refused)
}

#[test]
fn a_parked_event_leaves_a_gap_in_its_row_and_is_parked_once() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    let (mut store, _) = open(&path);
    store.append(&[block(1, 5, 20), block(6, 2, 20)], 0, 0).expect("stored");
    let bytes = store.bytes();
    assert_eq!(store.park(3, None, "no").expect("stored"), Parking { parked: 1, dropped: vec![] });
    assert_eq!(
        spans(&store.read(0, usize::MAX).expect("readable")),
        [(1, 2, true), (3, 3, false), (4, 5, true), (6, 7, true)]
    );
    assert!(store.bytes() < bytes);
    // After a crash the owner may not know, and try once more.
    drop(store);
    let (mut store, again) = open(&path);
    assert_eq!((again.parked, again.gaps.first()), (1, Some(&refused(3))));
    assert_eq!(store.park(3, Some(b"{}"), "no, again").expect("stored").parked, 1);
    assert_eq!(store.park(6, None, "no").expect("stored").parked, 2);
    assert_eq!(spans(&store.read(5, usize::MAX).expect("readable")), [(6, 6, false), (7, 7, true)]);
    let (_, again) = {
        drop(store);
        open(&path)
    };
    assert_eq!((again.bytes, again.parked), (bytes_of(&path), 2));
}

fn bytes_of(path: &Path) -> u64 {
    let db = Connection::open(path).expect("a file");
    db.query_row("SELECT sum(length(data)) FROM item", [], |row| row.get(0)).expect("readable")
}

#[test]
fn an_event_in_memory_is_parked_without_being_stored() {
    let home = tempfile::tempdir().expect("writable");
    let (mut store, _) = open(&home.path().join("spill.db"));
    assert_eq!(store.park(9, Some(b"{\"a\":1}"), "no").expect("stored").parked, 1);
    assert_eq!((rows(&store), store.bytes()), (0, 0));
}

#[test]
fn the_oldest_parked_events_make_room_and_are_told() {
    let home = tempfile::tempdir().expect("writable");
    let few = EmitterConfig { parked_max_events: 3, parked_max_bytes: 4096, ..config() };
    let (mut store, _) = open_with(&home.path().join("spill.db"), Limits::from(&few));
    for seq in 1..=3 {
        assert!(store.park(seq, Some(b"{}"), "no").expect("stored").dropped.is_empty());
    }
    assert_eq!(store.park(4, Some(b"{}"), "no").expect("stored"), Parking { parked: 3, dropped: vec![1] });
    let large = vec![b' '; 5000];
    assert_eq!(store.park(5, Some(&large), "no").expect("stored"), Parking { parked: 1, dropped: vec![2, 3, 4] });
}

#[test]
fn what_is_wanted_is_offered_until_it_is_forgotten() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    let (mut store, _) = open(&path);
    store.park(1, Some(b"{}"), "no").expect("stored");
    store.park(2, Some(b"{ }"), "no").expect("stored");
    assert!(store.wanted(1 << 20).expect("readable").is_empty());
    store.db.execute("UPDATE parked SET wanted = 1 WHERE seq = 2", []).expect("stored");
    for _ in 0..2 {
        let wanted = store.wanted(1 << 20).expect("readable");
        assert_eq!(wanted, [Wanted { id: 2, json: "{ }".into() }]);
    }
    store.unpark(&[2]).expect("stored");
    assert_eq!((store.wanted(1 << 20).expect("readable").len(), store.parked()), (0, 1));
}
