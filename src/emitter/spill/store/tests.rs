use std::path::Path;

use super::opening::HEAD;
use super::*;
use crate::clock::tests::{HOUR, Hands};
use crate::emitter::ring::{Ring, Writer, checksum};
use crate::emitter::spill::Done;
use crate::emitter::tests::config;
use crate::error::Error;
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

    let (mut store, again) = open(&path);
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
    let (_, again) = open(&path);
    assert_eq!((again.next_seq, again.base, again.last), (8, 7, 7));
    assert!(again.gaps.is_empty());
}

#[test]
fn a_crash_after_the_opening_is_told_even_if_nothing_else_was_written() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    let (store, fresh) = open(&path);
    assert_eq!((fresh.next_seq, fresh.reserved), (1, RESERVE_FIRST));
    drop(store);
    let (_, again) = open(&path);
    assert_eq!((again.next_seq, again.reserved), (RESERVE_FIRST + 1, 2 * RESERVE_FIRST));
    assert_eq!(again.gaps, [gap(1, RESERVE_FIRST, GapReason::Crash)]);
}

#[test]
fn after_a_crash_no_promised_seq_is_used_again_and_a_gap_tells() {
    const PROMISED: u64 = 3 * RESERVE_FIRST;
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    let (mut store, fresh) = open(&path);
    store.reserve(PROMISED, 0).expect("stored");
    store.append(&[block(1, 10, 20)], 0, 0).expect("stored");
    drop(store);
    let (mut store, again) = open(&path);
    assert_eq!(again.epoch, fresh.epoch);
    assert_eq!((again.next_seq, again.base, again.last), (PROMISED + 1, 0, PROMISED));
    assert_eq!(again.gaps, [gap(11, PROMISED, GapReason::Crash)]);
    store.reserve(2 * PROMISED, 50).expect("stored");
    drop(store);
    let (mut store, again) = open(&path);
    assert_eq!((again.next_seq, again.base), (2 * PROMISED + 1, 50));
    assert_eq!(again.gaps, [gap(11, 2 * PROMISED, GapReason::Crash)], "gaps that touch are one");
    assert_eq!(spans(&store.read(50, usize::MAX).expect("readable")), [(51, 2 * PROMISED, false)]);
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
    store.close(81, 0).expect("closed");
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
    let (limits, hands) = (Limits { age: Some(Duration::from_secs(60)), ..limits() }, Hands::new());
    let (mut store, _) = at(&home.path().join("spill.db"), &hands, &limits);
    store.append(&[block(1, 5, 20)], 0, 0).expect("stored");
    hands.pass(60_001);
    let dropped = store.append(&[block(6, 5, 20), block(11, 5, 20)], 0, 0).expect("stored");
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
    store.close(21, 15).expect("closed");
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
    let after_crash = (8, RESERVE_FIRST, false);
    assert_eq!(spans(&store.read(5, usize::MAX).expect("readable")), [(6, 6, false), (7, 7, true), after_crash]);
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

fn at(path: &Path, hands: &Hands, limits: &Limits) -> (SpillStore, Recovered) {
    SpillStore::open_at(path, limits.clone(), None, 7, None, &hands.clock()).expect("usable")
}

#[test]
fn a_wall_clock_that_is_set_expires_nothing_early_and_nothing_is_stuck() {
    let aged = Limits { age: Some(Duration::from_millis(HOUR as u64)), ..limits() };
    for by in [10 * HOUR, -10 * HOUR, -500_000 * HOUR] {
        let home = tempfile::tempdir().expect("writable");
        let (path, hands) = (home.path().join("spill.db"), Hands::new());
        let (mut store, _) = at(&path, &hands, &aged);
        store.append(&[block(1, 5, 20)], 0, 0).expect("stored");
        hands.pass(HOUR / 2);
        hands.set_wall(by);
        let dropped = store.append(&[block(6, 5, 20)], 0, 0).expect("stored");
        assert!(dropped.is_empty(), "half an hour old, the wall clock was set by {by}: {dropped:?}");
        store.close(11, 0).expect("closed");

        hands.set_wall(by / 2);
        let (mut store, again) = at(&path, &hands, &aged);
        assert_eq!(again.oldest, Some(Duration::from_millis(HOUR as u64 / 2)));
        hands.pass(HOUR / 2 + 1);
        let dropped = store.append(&[block(11, 5, 20)], 0, 0).expect("stored");
        assert_eq!(dropped, [gap(1, 5, GapReason::Expired)], "an hour has passed");
        store.close(16, 0).expect("closed");

        hands.reboot(HOUR / 2);
        let (mut store, again) = at(&path, &hands, &aged);
        assert_eq!(
            again.oldest,
            Some(Duration::from_millis(HOUR as u64 + 1)),
            "the wall clock went on while it was off"
        );
        let dropped = store.append(&[block(16, 5, 20)], 0, 0).expect("stored");
        assert_eq!(dropped, [gap(6, 10, GapReason::Expired)], "11 to 15 are half an hour old");
    }
}

#[test]
fn a_row_that_rots_while_the_file_is_open_is_a_gap_within_the_epoch() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    let (mut store, fresh) = open(&path);
    store.reserve(1000, 0).expect("stored");
    store.append(&[block(1, 5, 20), block(6, 5, 20), block(11, 5, 20)], 0, 0).expect("stored");
    store.db.execute("UPDATE item SET data = zeroblob(50) WHERE first = 6", []).expect("writable");
    let items = store.read(0, usize::MAX).expect("salvaged");
    assert_eq!(items, [block(1, 5, 20), Item::Gap(gap(6, 10, GapReason::Corrupt)), block(11, 5, 20)]);
    let damage = store.take_damage().expect("told");
    assert_eq!((damage.salvaged, damage.lost()), (10, 5));
    assert!(damage.set_aside.exists() && store.take_damage().is_none());
    store.append(&[block(16, 5, 20)], 0, 5).expect("it goes on");
    drop(store);
    let (_, again) = open(&path);
    assert_eq!((again.epoch, again.base, again.next_seq), (fresh.epoch, 5, 1001), "the promise is kept");
    assert!(again.damage.is_none());
}

#[test]
fn a_file_that_has_lost_its_tables_goes_on_with_new_ones() {
    let home = tempfile::tempdir().expect("writable");
    let (mut store, _) = open(&home.path().join("spill.db"));
    store.append(&[block(1, 5, 20)], 0, 0).expect("stored");
    store.db.execute_batch("ALTER TABLE item RENAME TO gone").expect("writable");
    store.append(&[block(6, 5, 20)], 0, 0).expect("stored");
    let items = store.read(0, usize::MAX).expect("readable");
    assert_eq!(items, [Item::Gap(gap(1, 5, GapReason::Corrupt)), block(6, 5, 20)]);
    assert_eq!(store.take_damage().map(|damage| (damage.salvaged, damage.lost())), Some((0, 5)));
}

#[test]
fn after_damage_a_new_epoch_begins_and_tells_what_is_missing() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    let (mut store, fresh) = open(&path);
    store.reserve(1000, 0).expect("stored");
    store.append(&[block(1, 10, 20), block(11, 10, 20), block(21, 10, 20)], 0, 4).expect("stored");
    store.db.execute("UPDATE item SET crc = crc + 1 WHERE first = 11", []).expect("writable");
    drop(store);
    let (mut store, again) = open(&path);
    let damage = again.damage.expect("told");
    assert_eq!((again.emitter, again.base), (fresh.emitter, 0));
    assert_ne!(again.epoch, fresh.epoch);
    assert_eq!((damage.salvaged, &damage.unreadable[..]), (16, &[gap(7, 16, GapReason::Corrupt)][..]));
    assert_eq!(again.gaps, [gap(7, 16, GapReason::Corrupt), gap(27, 996, GapReason::Crash)]);
    let items = store.read(0, usize::MAX).expect("readable");
    assert_eq!(spans(&items), [(1, 6, true), (7, 16, false), (17, 26, true), (27, 996, false)]);
    let Item::Events(block) = &items[0] else { panic!("{items:?}") };
    let (_, first) = block.events().next().expect("not empty");
    assert!(first.starts_with(b"{\"seq\":5,"), "1 to 4 were confirmed");
    drop(store);
    assert!(open(&path).1.damage.is_none());
}

#[test]
fn values_that_are_all_gone_are_damage_and_not_a_new_file() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    let (mut store, fresh) = open(&path);
    store.append(&[block(1, 5, 9)], 0, 0).expect("stored");
    store.trim(5).expect("confirmed");
    store.db.execute("DELETE FROM meta", []).expect("what a single bit in a page can do");
    drop(store);
    let again = SpillStore::open(&path, limits(), None, 8, None).expect("usable").1;
    assert!(again.damage.is_some());
    assert_ne!(again.epoch, fresh.epoch);
}

#[test]
fn only_a_few_damaged_files_are_kept_and_the_rest_is_named() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    let mut removed = Vec::new();
    for _ in 0..5 {
        let (mut store, recovered) = open(&path);
        removed.extend(recovered.damage.into_iter().flat_map(|damage| damage.removed));
        store.append(&[block(recovered.next_seq, 5, 20)], 0, recovered.next_seq - 1).expect("stored");
        store.db.execute("UPDATE item SET crc = 0", []).expect("writable");
    }
    removed.extend(open(&path).1.damage.expect("told").removed);
    let names = std::fs::read_dir(home.path()).expect("readable");
    let left =
        names.filter(|name| name.as_ref().is_ok_and(|name| name.file_name().to_string_lossy().contains(".damaged-")));
    assert_eq!((left.count(), removed.len()), (3, 2));
    assert!(removed.iter().all(|path| !path.exists()));
}

/// A process that is killed while 1 to 5 are in the file and 3 to 8 in the ring; then the file's header is destroyed.
fn damaged_beside_a_ring(path: &Path) -> Recovered {
    let (mut store, fresh) = SpillStore::open(path, limits(), None, 7, Some(8)).expect("usable");
    store.reserve(1000, 0).expect("stored");
    store.append(&[block(1, 5, 20)], 0, 2).expect("stored");
    let ring = fresh.ring.clone().expect("wanted");
    let mut writer = Writer::new(ring.clone());
    let mut blocks = Vec::new();
    for seq in 3..=8 {
        let json = format!("{{\"seq\":{seq},\"pad\":\"{}\"}}", "x".repeat(20));
        if !writer.fits(json.len()) {
            blocks.extend(writer.seal());
            assert!(writer.make_room(json.len(), seq), "there is room");
        }
        writer.push(json.as_bytes(), checksum(json.as_bytes()), seq);
        ring.note_last(seq);
    }
    blocks.extend(writer.seal());
    ring.note_acked(2);
    std::mem::forget(blocks); // a killed process gives nothing back
    drop(store);
    let mut file = std::fs::read(path).expect("there");
    file[..100].fill(0);
    std::fs::write(path, file).expect("in place");
    fresh
}

#[test]
fn a_ring_of_this_boot_keeps_epoch_and_seqs_of_a_damaged_file() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    let fresh = damaged_beside_a_ring(&path);
    let (mut store, again) = open(&path);
    let damage = again.damage.expect("told");
    assert_eq!((damage.salvaged, damage.lost()), (3, 0));
    assert_eq!((again.emitter, again.epoch), (fresh.emitter, fresh.epoch));
    assert_eq!((again.base, again.next_seq), (2, 9), "nothing is doubtful");
    let items = store.read(2, usize::MAX).expect("readable");
    assert_eq!(spans(&items).iter().map(|span| (span.0, span.2)).next(), Some((3, true)));
    let seqs: Vec<u64> = items.iter().flat_map(|item| item.first()..=item.last()).collect();
    assert_eq!(seqs, (3..=8).collect::<Vec<_>>(), "each once");
    assert_eq!(items.iter().map(Item::events).sum::<u64>(), 6);
}

#[test]
fn parked_events_are_salvaged_and_one_that_rots_is_not_sent() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    let (mut store, fresh) = open(&path);
    for seq in 1..=3 {
        store.park(seq, Some(format!("{{\"n\":{seq}}}").as_bytes()), "no").expect("stored");
    }
    store
        .db
        .execute_batch("UPDATE parked SET wanted = 1; UPDATE parked SET json = x'7b7d' WHERE seq = 2")
        .expect("ours");
    let wanted = store.wanted(1 << 20).expect("salvaged");
    assert_eq!(wanted.iter().map(|wanted| &wanted.json[..]).collect::<Vec<_>>(), [b"{\"n\":1}", b"{\"n\":3}"]);
    assert!(store.take_damage().is_some());
    assert_eq!(store.parked(), 2);
    drop(store);
    let (_, again) = open(&path);
    assert_eq!((again.parked, again.epoch, again.damage), (2, fresh.epoch, None));
}

#[test]
fn what_belonged_to_a_file_that_is_gone_is_no_part_of_a_new_one() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    let (mut store, before) = open(&path);
    store.append(&[block(1, 300, 400)], 0, 0).expect("stored");
    let wal = std::fs::read(home.path().join("spill.db-wal")).expect("there");
    drop(store);
    // After a kill the WAL stays, and somebody who cleans up may forget it.
    std::fs::write(home.path().join("spill.db-wal"), wal).expect("writable");
    std::fs::remove_file(&path).expect("there");
    let (mut store, fresh) = SpillStore::open(&path, limits(), None, 8, None).expect("usable");
    assert_eq!((fresh.next_seq, fresh.damage.is_none(), fresh.bytes), (1, true, 0));
    assert_ne!(fresh.epoch, before.epoch);
    assert!(store.read(0, usize::MAX).expect("readable").is_empty());
}

/// Blocks of 64 KiB with one event each, ended cleanly.
fn full(path: &Path, rows: u64) {
    let (mut store, _) = open_with(path, Limits { bytes: u64::MAX, ..limits() });
    for first in 1..=rows {
        store.append(&[block(first, 1, 64 << 10)], 0, 0).expect("stored");
    }
    store.close(rows + 1, 0).expect("closed");
}

fn change(path: &Path, sql: &str) {
    Connection::open(path).and_then(|db| db.execute_batch(sql)).expect("writable");
}

fn scrubbed(store: &mut SpillStore) {
    while store.scrub_after().is_some() {
        store.scrub(|| false);
    }
}

#[cfg(target_os = "linux")]
#[test]
#[expect(clippy::print_stderr, reason = "a skipped test says why")]
fn opening_reads_as_little_of_a_large_spill_as_of_a_small_one() {
    // Of this thread alone.
    let read = || -> Option<u64> {
        let io = std::fs::read_to_string("/proc/thread-self/io").ok()?;
        io.lines().find_map(|line| line.strip_prefix("rchar: "))?.parse().ok()
    };
    if read().is_none() {
        eprintln!("skipped: this kernel does not count what a thread reads");
        return;
    }
    let home = tempfile::tempdir().expect("writable");
    let bytes: Vec<u64> = [40, 2000]
        .into_iter()
        .map(|rows| {
            let path = home.path().join(format!("{rows}.db"));
            full(&path, rows);
            let before = read().expect("counted");
            let (store, recovered) = open(&path);
            let after = read().expect("counted");
            assert_eq!((recovered.last, store.usage.events), (rows, rows));
            assert!(recovered.bytes > rows << 16 && recovered.oldest.is_some());
            after - before
        })
        .collect();
    assert!(bytes[0] > HEAD as u64, "the first rows are checked: {bytes:?}");
    assert!(bytes[1] < bytes[0] + 16 * PAGE as u64, "{bytes:?}");
}

#[test]
fn what_rots_far_behind_the_first_rows_is_found_in_calm_moments_and_keeps_the_epoch() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    full(&path, 60);
    let (store, Recovered { epoch, .. }) = open(&path);
    store.close(61, 0).expect("closed");
    for (wrong, gaps) in [
        ("UPDATE item SET crc = crc + 1 WHERE first = 50", vec![gap(50, 50, GapReason::Corrupt)]),
        ("DELETE FROM item WHERE first = 40", vec![gap(40, 40, GapReason::Corrupt)]),
    ] {
        change(&path, wrong);
        let (mut store, recovered) = open(&path);
        assert!(recovered.damage.is_none(), "it is not looked at yet");
        scrubbed(&mut store);
        let damage = store.take_damage().expect("told");
        assert_eq!((damage.unreadable, recovered.epoch), (gaps, epoch.clone()));
        assert_eq!(store.read(0, usize::MAX).expect("readable").len(), 60);
        store.close(61, 0).expect("closed");
    }
    let (mut store, again) = open(&path);
    assert_eq!((again.gaps.len(), again.epoch, again.bytes), (2, epoch, bytes_of(&path)));
    scrubbed(&mut store);
    assert!(store.take_damage().is_none(), "all is well again");
}

#[test]
fn the_last_rows_cannot_get_lost_unnoticed() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    full(&path, 60);
    change(&path, "DELETE FROM item WHERE first >= 50");
    let damage = open(&path).1.damage.expect("at once");
    assert_eq!(damage.salvaged, 49);
}

#[test]
fn totals_that_are_not_those_of_the_rows_are_corrected() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    full(&path, 3);
    let db = Connection::open(&path).expect("a file");
    Usage { events: 77, bytes: 5 }.store(&db, 3).expect("writable");
    drop(db);
    let (mut store, recovered) = open(&path);
    assert_eq!(recovered.bytes, 5);
    scrubbed(&mut store);
    assert_eq!((store.usage.events, store.bytes()), (3, bytes_of(&path)));
    drop(store);
    let (_, again) = open(&path);
    assert_eq!((again.bytes, again.damage), (bytes_of(&path), None));
}

#[test]
fn an_index_without_one_of_the_gaps_is_damage() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    let (mut store, _) = open(&path);
    store.append(&[block(1, 3, 20)], 0, 0).expect("stored");
    store.close(4, 0).expect("closed");
    let db = Connection::open(&path).expect("a file");
    db.execute_batch(
        "PRAGMA writable_schema = ON;
         CREATE TEMP TABLE hidden AS SELECT * FROM sqlite_schema WHERE name = 'gap';
         DELETE FROM sqlite_schema WHERE name = 'gap';
         PRAGMA writable_schema = RESET;",
    )
    .expect("writable");
    insert(&db, &Item::Gap(gap(4, 4, GapReason::OutboxFull)), 0).expect("writable");
    Usage { events: 3, bytes: 0 }.store(&db, 4).expect("writable");
    db.execute_batch("PRAGMA writable_schema = ON; INSERT INTO sqlite_schema SELECT * FROM hidden").expect("writable");
    drop(db);
    let (mut store, recovered) = open(&path);
    assert!(recovered.damage.is_none() && recovered.gaps.is_empty());
    scrubbed(&mut store);
    assert_eq!(store.take_damage().expect("told").lost(), 0);
    store.close(5, 0).expect("closed");
    assert_eq!(open(&path).1.gaps, [gap(4, 4, GapReason::OutboxFull)]);
}

#[test]
fn the_check_of_all_pages_gives_way_and_is_tried_again_ever_later() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    full(&path, 60);
    let (mut store, _) = open(&path);
    while !matches!(store.scrub, Scrub::Whole { .. }) {
        store.scrub(|| false);
    }
    let mut before = Duration::ZERO;
    for _ in 0..4 {
        let wait = store.scrub_after().expect("not done");
        assert!(wait >= before * 2, "{wait:?} after {before:?}");
        before = wait;
        store.scrub(|| true);
    }
    scrubbed(&mut store);
    assert!(store.take_damage().is_none());
    assert_eq!(store.read(0, usize::MAX).expect("readable").len(), 60);
}

/// What is told of files that were removed: that, what is wrong if they cannot be put back, and that they are back.
fn mended(store: &mut SpillStore) -> (Vec<String>, Option<Ring>, bool) {
    let (mut errors, mut ring, mut back) = (Vec::new(), None, false);
    for done in store.mend() {
        match done {
            Done::FilesGone(error) => errors.push(error.to_string()),
            Done::NewRing(new) => ring = Some(new),
            Done::FilesBack => back = true,
            other => panic!("{other:?}"),
        }
    }
    (errors, ring, back)
}

#[test]
fn files_that_are_removed_under_their_owner_are_put_back_with_all_that_is_in_them() {
    let all = ["", "-wal", "-shm", ".lock", ".ring"];
    for gone in all.iter().map(std::slice::from_ref).chain([&all[..], &all[..3], &all[..1]]) {
        let home = tempfile::tempdir().expect("writable");
        let path = home.path().join("spill.db");
        let (mut store, first) = SpillStore::open(&path, limits(), None, 7, Some(4)).expect("usable");
        let ring = first.ring.expect("asked for");
        let items = [block(1, 10, 20), Item::Gap(gap(11, 12, GapReason::OutboxFull)), block(13, 5, 20)];
        store.append(&items, 0, 0).expect("stored");
        store.park(14, None, "no").expect("parked");
        store.reserve(500, 3).expect("stored");
        ring.promise();
        ring.note_last(40);
        assert!(mended(&mut store).0.is_empty(), "nothing was removed");
        for suffix in gone {
            std::fs::remove_file(sqlite::beside(&path, suffix)).expect("there");
        }
        let (errors, new, back) = mended(&mut store);
        assert!(back && errors.len() == 1 && errors[0].contains("was removed"), "{gone:?}: {errors:?}");
        assert_eq!(new.is_some(), gone.contains(&".ring"), "{gone:?}");
        if let Some(new) = new {
            assert!(
                new.has_promised() && new.last() >= 40 && ring.sync().is_err(),
                "no sync counts that keeps nothing"
            );
            new.note_last(40);
        }
        assert!(mended(&mut store).0.is_empty(), "once");
        store.append(&[block(18, 2, 20)], 0, 4).expect("it goes on");
        assert_eq!(refusal(&path).kind(), ErrorKind::SpillLocked, "{gone:?}: nobody else may have it");
        drop((store, ring)); // as a kill leaves them: nothing was closed in order
        let (mut store, found) = SpillStore::open(&path, limits(), None, 8, Some(4)).expect("usable");
        assert_eq!((&found.emitter, &found.epoch, found.damage.is_some()), (&first.emitter, &first.epoch, false));
        assert_eq!((found.base, found.last, found.parked, found.next_seq), (4, 19, 1, 41), "{gone:?}");
        let read = store.read(4, usize::MAX).expect("readable");
        assert_eq!(
            spans(&read),
            [(5, 10, true), (11, 12, false), (13, 13, true), (14, 14, false), (15, 17, true), (18, 19, true)]
        );
        scrubbed(&mut store);
        assert!(store.take_damage().is_none(), "{gone:?}");
    }
}

#[test]
fn a_file_that_was_put_in_the_place_of_ours_is_not_touched() {
    for suffix in ["", "-wal", ".ring"] {
        let home = tempfile::tempdir().expect("writable");
        let path = home.path().join("spill.db");
        let (mut store, _) = SpillStore::open(&path, limits(), None, 7, Some(4)).expect("usable");
        store.append(&[block(1, 10, 20)], 0, 0).expect("stored");
        let place = sqlite::beside(&path, suffix);
        std::fs::remove_file(&place).expect("there");
        std::fs::write(&place, "somebody's").expect("writable");
        for _ in 0..2 {
            let (errors, new, back) = mended(&mut store);
            let told = errors.iter().all(|text| text.contains("move that one away") && text.contains("spill.db"));
            assert!(told && !errors.is_empty() && new.is_none() && !back, "{errors:?}");
            store.append(&[], 0, 0).expect("it goes on");
        }
        assert_eq!(std::fs::read(&place).expect("there"), b"somebody's");
        std::fs::remove_file(&place).expect("moved away");
        assert!(mended(&mut store).2);
        drop(store);
        let (mut store, found) = SpillStore::open(&path, limits(), None, 8, Some(4)).expect("usable");
        assert_eq!((found.last, spans(&store.read(0, usize::MAX).expect("readable"))), (10, vec![(1, 10, true)]));
    }
}

#[test]
fn who_lost_its_files_to_another_owner_leaves_them_to_it_and_cannot_end_in_order() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    let (mut store, _) = SpillStore::open(&path, limits(), None, 7, Some(4)).expect("usable");
    store.append(&[block(1, 10, 20)], 0, 0).expect("stored");
    for suffix in ["", "-wal", "-shm", ".lock", ".ring"] {
        std::fs::remove_file(sqlite::beside(&path, suffix)).expect("there");
    }
    let (mut other, _) = SpillStore::open(&path, limits(), None, 8, Some(4)).expect("the place is free");
    other.append(&[block(1, 3, 20)], 0, 0).expect("stored");
    let (errors, new, back) = mended(&mut store);
    assert!(errors.iter().any(|text| text.contains("is owned by process")) && new.is_none() && !back, "{errors:?}");
    assert_eq!(store.close(11, 0).expect_err("it would be lost").kind(), ErrorKind::SpillLocked);
    assert!(mended(&mut other).0.is_empty(), "nothing was taken from it");
    assert_eq!(spans(&other.read(0, usize::MAX).expect("readable")), [(1, 3, true)]);
}
