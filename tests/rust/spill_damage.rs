//! A disk that gives back other bytes than it was given: the spill always opens, what it gives is what was stored, and
//! what is missing is told.
//!
//! `SPILL_DAMAGE=100000` is the nightly size; `SPILL_DAMAGE_SEED=<n>` replays one trial.

#![expect(clippy::print_stderr, reason = "a failure shows how to replay it")]

#[path = "support/spill.rs"]
mod spill;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fastrand::Rng;
use safe_broadcaster::emitter::item::{Gap, GapReason, Item};
use safe_broadcaster::error::ErrorKind;
use spill::{Files, PAGE, Written, beside, block, everything, ids, open, scrub};

const TRIALS: u64 = 240;

/// Writes a spill, and takes its files at a moment at which it has a WAL, or after a clean end.
fn write(path: &Path, rng: &mut Rng, written: &mut Written) -> Files {
    let (mut store, recovered) = open(path, rng.u64(..)).expect("usable");
    let (mut next, mut id, mut acked) = (recovered.next_seq, 1, recovered.base);
    store.reserve(next + 5000, acked).expect("stored");
    let most = [20, 400, 30_000][rng.usize(..3)];
    for _ in 0..rng.u32(1..40) {
        match rng.u8(..10) {
            0..7 => {
                let items: Vec<_> = (0..rng.u64(1..4))
                    .map(|_| {
                        let count = rng.u64(1..30);
                        let item = block(rng, next, count, most, &mut id, written);
                        next += count;
                        item
                    })
                    .collect();
                store.append(&items, acked, acked).expect("stored");
            }
            7 => {
                let gap = Gap { from: next, to: next + rng.u64(0..5), reason: GapReason::OutboxFull };
                next = gap.to + 1;
                store.append(&[Item::Gap(gap)], acked, acked).expect("stored");
            }
            8 => {
                acked = rng.u64(acked..next);
                store.trim(acked).expect("stored");
            }
            _ => store.reserve(next + rng.u64(1..10_000), acked).expect("stored"),
        }
    }
    if rng.bool() {
        store.close(next, acked).expect("closed");
        return Files::of(path);
    }
    let files = Files::of(path);
    drop(store);
    files
}

fn garble(rng: &mut Rng, bytes: &mut [u8]) {
    if rng.bool() { rng.fill(bytes) } else { bytes.fill(0) }
}

fn damage(rng: &mut Rng, files: &mut Files) -> &'static str {
    let part = |rng: &mut Rng, length: usize, size: usize| {
        let from = rng.usize(0..length.max(1));
        from..(from + size).min(length)
    };
    let flip = |rng: &mut Rng, bytes: &mut [u8]| {
        for _ in 0..[1, 1, 1, 20][rng.usize(..4)] {
            if let Some(at) = bytes.len().checked_sub(1) {
                bytes[rng.usize(0..=at)] ^= 1 << rng.u8(..8);
            }
        }
    };
    match rng.u8(..13) {
        0..3 => {
            flip(rng, &mut files.main);
            "bits of the file"
        }
        3 | 4 => {
            flip(rng, &mut files.wal);
            "bits of the WAL"
        }
        5 | 6 => {
            let page = rng.usize(0..files.main.len().div_ceil(PAGE).max(1)) * PAGE;
            let end = (page + PAGE).min(files.main.len());
            garble(rng, &mut files.main[page.min(end)..end]);
            "a page"
        }
        7 => {
            let range = part(rng, files.main.len(), 512);
            garble(rng, &mut files.main[range]);
            "a sector"
        }
        8 => {
            files.main.truncate(rng.usize(0..=files.main.len()));
            "the end"
        }
        9 => {
            let length = files.main.len().min([100, 512, PAGE][rng.usize(..3)]);
            garble(rng, &mut files.main[..length]);
            "the header"
        }
        10 => {
            let range = part(rng, files.wal.len(), rng.clone().usize(1..100_000));
            garble(rng, &mut files.wal[range]);
            "a stretch of the WAL"
        }
        11 => {
            garble(rng, &mut files.wal);
            "the WAL"
        }
        _ => {
            files.shm.resize(32 << 10, 0);
            rng.fill(&mut files.shm);
            "the index of the WAL"
        }
    }
}

struct Trial {
    path: PathBuf,
    rng: Rng,
    written: Written,
}

impl Trial {
    fn run(&mut self) -> &'static str {
        let Self { path, rng, written } = self;
        let mut files = write(path, rng, written);
        let what = damage(rng, &mut files);
        files.restore(path);
        let begin = Instant::now();
        let opened = open(path, rng.u64(..));
        assert!(begin.elapsed() < Duration::from_secs(30), "it takes for ever");
        let (mut store, recovered) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                // The header says that the file is another's: then it is as it was.
                assert_eq!(error.kind(), ErrorKind::SpillCorrupt, "{}", error.report());
                assert!(what == "bits of the file" || what == "a sector", "{what}: {}", error.report());
                assert_eq!(std::fs::read(&*path).expect("there"), files.main);
                return what;
            }
        };
        // What is not seen at once is found in calm moments, or when it is read.
        let calm = rng.u8(..4) > 0;
        if calm {
            scrub(&mut store);
        }
        let items = everything(&mut store, recovered.base);
        assert_eq!(items.last().map_or(recovered.base, Item::last), recovered.last);
        let found = ids(&items, written);
        if let Some(damage) = store.take_damage() {
            assert_eq!(damage.salvaged, found.len() as u64);
            assert!(damage.set_aside.exists());
        } else if let Some(damage) = recovered.damage {
            assert_eq!(damage.salvaged, found.len() as u64);
            let aside = Files::of(&damage.set_aside);
            assert!(aside.main == files.main, "the damaged file is kept as it was: {what}");
            let sizes = [files.main.len(), files.wal.len(), aside.wal.len()];
            assert!(aside.wal == files.wal, "with its WAL: {what}, {sizes:?}");
        }
        // It goes on as if nothing had been.
        let mut id = written.keys().next_back().map_or(1, |last| last + 1);
        let more = block(rng, recovered.next_seq, 5, 100, &mut id, written);
        store.append(&[more], 0, recovered.base).expect("stored");
        store.close(recovered.next_seq + 5, recovered.base).expect("closed");
        let (mut store, again) = open(path, rng.u64(..)).expect("usable");
        let left = ids(&everything(&mut store, again.base), written).len();
        if calm {
            assert!(again.damage.is_none(), "{:?}", again.damage);
            assert_eq!(left, found.len() + 5);
        } else {
            assert!(left <= found.len() + 5, "nothing is invented");
        }
        what
    }
}

fn trial(seed: u64) {
    let home = tempfile::tempdir().expect("writable");
    let (path, rng) = (home.path().join("spill.db"), Rng::with_seed(seed));
    let mut trial = Trial { path, rng, written: Written::new() };
    if let Err(cause) = catch_unwind(AssertUnwindSafe(|| trial.run())) {
        eprintln!("replay with: SPILL_DAMAGE_SEED={seed} cargo test --test spill_damage");
        std::panic::resume_unwind(cause);
    }
}

#[test]
fn whatever_the_disk_gives_back_the_spill_opens_and_invents_nothing() {
    if let Some(seed) = spill::number("SPILL_DAMAGE_SEED") {
        return trial(seed);
    }
    let trials = spill::number("SPILL_DAMAGE").unwrap_or(TRIALS);
    std::thread::scope(|scope| {
        for part in 0..4 {
            scope.spawn(move || (part..trials).step_by(4).for_each(trial));
        }
    });
}

/// A spill of 20 blocks of 10 events, ended cleanly.
fn clean(path: &Path, written: &mut Written) {
    let mut rng = Rng::with_seed(1);
    let (mut store, _) = open(path, 1).expect("usable");
    store.reserve(1000, 0).expect("stored");
    let mut id = 1;
    for n in 0..20 {
        let item = block(&mut rng, n * 10 + 1, 10, 4000, &mut id, written);
        store.append(&[item], 0, 0).expect("stored");
    }
    store.close(201, 0).expect("closed");
}

#[test]
fn a_header_that_is_destroyed_costs_nothing_of_a_file_that_we_made() {
    for length in [16, 100, PAGE] {
        let home = tempfile::tempdir().expect("writable");
        let (path, mut written) = (home.path().join("spill.db"), Written::new());
        clean(&path, &mut written);
        let mut files = Files::of(&path);
        files.main[..length].fill(0);
        files.restore(&path);
        let (mut store, recovered) = open(&path, 2).expect("salvaged");
        let damage = recovered.damage.expect("told");
        assert_eq!((damage.salvaged, damage.lost()), (200, 0), "{length} bytes");
        assert_eq!(ids(&everything(&mut store, 0), &written).len(), 200);
        assert_eq!(Files::of(&damage.set_aside).main, files.main);
    }
}

#[test]
fn the_same_bytes_in_a_file_that_we_did_not_make_are_refused_and_left_alone() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    clean(&path, &mut Written::new());
    let mut files = Files::of(&path);
    files.main[..100].fill(0);
    let other = home.path().join("other.db");
    std::fs::write(&other, &files.main).expect("writable");
    std::fs::rename(&other, &path).expect("the same place, another file");
    let error = open(&path, 2).expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::SpillCorrupt);
    assert!(error.to_string().contains("move it away"), "{error}");
    assert_eq!(Files::of(&path).main, files.main);
}

#[test]
fn a_file_that_lost_everything_is_told_and_begins_anew() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("spill.db");
    clean(&path, &mut Written::new());
    std::fs::write(&path, b"").expect("writable");
    let (_, recovered) = open(&path, 2).expect("salvaged");
    let damage = recovered.damage.expect("told");
    assert_eq!((damage.salvaged, recovered.last), (0, 0));
    let fresh = home.path().join("fresh.db");
    std::fs::write(&fresh, b"").expect("writable");
    assert!(open(&fresh, 2).expect("usable").1.damage.is_none(), "an empty file of nobody is a new one");
}

#[test]
fn a_file_that_is_cut_to_nothing_is_saved_from_its_wal() {
    for left in [0, 1, 2, 100] {
        let home = tempfile::tempdir().expect("writable");
        let (path, mut written) = (home.path().join("spill.db"), Written::new());
        let (mut store, _) = open(&path, 1).expect("usable");
        let mut id = 1;
        for n in 0..20 {
            let item = block(&mut Rng::with_seed(1), n * 10 + 1, 10, 400, &mut id, &mut written);
            store.append(&[item], 0, 0).expect("stored");
        }
        let mut files = Files::of(&path);
        drop(store);
        files.main.truncate(left);
        files.restore(&path);
        let told = safe_broadcaster::emitter::spill::inspect::show(&path)
            .expect_err("there is nothing to look at")
            .to_string();
        assert!(left > 1 || told.contains("is empty"), "{told}");
        assert!(Files::of(&path).wal == files.wal, "looking changes nothing, {left} bytes");
        let (mut store, recovered) = open(&path, 2).expect("salvaged");
        let damage = recovered.damage.expect("told");
        assert_eq!((damage.salvaged, damage.lost()), (200, 0), "{left} bytes");
        assert_eq!(ids(&everything(&mut store, 0), &written).len(), 200);
        let aside = Files::of(&damage.set_aside);
        assert!(aside.main == files.main && aside.wal == files.wal, "kept as it was, {left} bytes");
    }
}

#[test]
fn a_salvage_that_was_killed_is_done_again_or_finished() {
    let home = tempfile::tempdir().expect("writable");
    let (path, mut written) = (home.path().join("spill.db"), Written::new());
    clean(&path, &mut written);
    std::fs::write(beside(&path, ".salvage"), b"half of it").expect("writable");
    let mut files = Files::of(&path);
    files.main[..100].fill(0);
    files.restore(&path);
    let (mut store, recovered) = open(&path, 2).expect("salvaged");
    assert!(recovered.damage.is_some());
    assert_eq!(ids(&everything(&mut store, 0), &written).len(), 200);
    store.close(recovered.next_seq, 0).expect("closed");
    std::fs::rename(&path, beside(&path, ".salvage")).expect("ours");
    let (mut store, _) = open(&path, 2).expect("finished");
    assert_eq!(ids(&everything(&mut store, 0), &written).len(), 200);
}
