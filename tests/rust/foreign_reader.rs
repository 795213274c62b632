//! Another process reads from the spill's file for long: this binary again, as a child.

#[path = "support/spill.rs"]
mod spill;

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use fastrand::Rng;
use rusqlite::Connection;
use safe_broadcaster::emitter::item::Item;
use spill::{Written, beside, block, everything, ids, open};

const PATH: &str = "SB_FOREIGN_READER";
/// What the reserve can hold, what starts a checkpoint, and an append with its pages.
const MOST: u64 = (8 + 4 + 3) << 20;

/// A process with a read transaction that lasts until it is ended.
struct Reader(Child);

impl Reader {
    fn of(path: &Path) -> Self {
        let binary = std::env::current_exe().expect("known");
        let mut child = Command::new(binary)
            .args(["read_until_the_end", "--exact", "--nocapture"])
            .env(PATH, path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("started");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let reading = lines.map(|line| line.expect("text")).any(|line| line.contains("reading"));
        assert!(reading, "it has ended before it read");
        Self(child)
    }

    fn end(mut self) {
        self.0.kill().and_then(|()| self.0.wait()).expect("a child");
    }
}

/// The child; without its path there is nothing to do.
#[test]
#[expect(clippy::print_stdout, reason = "its parent waits for it")]
fn read_until_the_end() {
    let Some(path) = std::env::var_os(PATH) else { return };
    let db = Connection::open(path).expect("there");
    db.execute_batch("BEGIN").expect("begun");
    let rows: u64 = db.query_row("SELECT count(*) FROM item", [], |row| row.get(0)).expect("readable");
    println!("reading {rows}");
    std::io::stdin().lines().for_each(drop);
}

#[test]
fn another_process_that_reads_for_long_bounds_what_is_stored_and_its_end_lets_it_go_on() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    let wal = || std::fs::metadata(beside(&path, "-wal")).expect("there").len();
    let (mut store, _) = open(&path, 1).expect("usable");
    let (mut rng, mut written, mut id) = (Rng::with_seed(1), Written::new(), 1);
    let mut next = 1;
    let mut append = |store: &mut safe_broadcaster::emitter::spill::store::SpillStore| {
        let item = block(&mut rng, next, 64, 8192, &mut id, &mut written);
        let last = item.last();
        let stored = store.append(&[item], 0, 0);
        match &stored {
            Ok(_) => next = last + 1,
            Err(_) => id -= 64, // the caller keeps them
        }
        (stored, last, written.clone())
    };
    append(&mut store).0.expect("stored");
    for round in 0..2 {
        let reader = Reader::of(&path);
        let error = loop {
            let (stored, ..) = append(&mut store);
            assert!(wal() <= MOST, "the WAL has {} bytes", wal());
            if let Err(error) = stored {
                break error.to_string();
            }
        };
        let named =
            error.contains("another process reads") && error.contains("spill.db-wal") && error.contains("bytes");
        assert!(named, "{error}");
        for _ in 0..20 {
            assert!(append(&mut store).0.is_err() && store.probe().is_err(), "it reads still");
        }
        // What makes the spill smaller, or safer, goes on.
        store.reserve(1_000_000 * (round + 1), 0).expect("stored");
        store.trim(10 + round).expect("stored");
        assert!(wal() <= MOST, "the WAL has {} bytes", wal());
        reader.end();
        let until = Instant::now() + Duration::from_secs(10);
        while store.probe().is_err() {
            assert!(Instant::now() < until, "it does not recover by itself");
        }
        assert!(wal() < 1 << 20, "the WAL begins anew");
        append(&mut store).0.expect("stored");
    }
    let (stored, last, written) = append(&mut store);
    stored.expect("stored");
    let items = everything(&mut store, 11);
    assert_eq!(items.last().map(Item::last), Some(last));
    assert_eq!(ids(&items, &written).len() as u64, last - 11, "nothing that was accepted is lost");
}
