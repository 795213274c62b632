//! A disk that is really full: a small file system of its own, filled with other files and with events.

#![expect(clippy::print_stderr, reason = "a skipped test says why")]

#[path = "support/spill.rs"]
mod spill;

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use fastrand::Rng;
use safe_broadcaster::emitter::item::Item;
use safe_broadcaster::emitter::spill::store::SpillStore;
use safe_broadcaster::error::ErrorKind;
use spill::{Written, block, everything, ids, open};

/// A file system of 48 MiB, gone when it is dropped.
struct SmallDisk {
    home: tempfile::TempDir,
}

impl SmallDisk {
    /// `None`, with the reason in the output, where nothing may be mounted.
    fn mount() -> Option<Self> {
        let home = tempfile::tempdir().expect("writable");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", "size=48m", "tmpfs"]).arg(home.path()).output();
        match mount {
            Ok(done) if done.status.success() => Some(Self { home }),
            refused => {
                eprintln!("skipped: no file system can be mounted here: {refused:?}");
                None
            }
        }
    }

    fn spill(&self) -> PathBuf {
        self.home.path().join("spill.db")
    }

    fn filler(&self) -> PathBuf {
        self.home.path().join("filler")
    }

    /// Others take everything that is left.
    fn fill(&self) {
        let mut file = File::options().append(true).create(true).open(self.filler()).expect("there");
        for size in [1 << 20, 4096] {
            while file.write_all(&vec![7; size]).is_ok() {}
        }
    }

    fn free(&self) {
        std::fs::remove_file(self.filler()).expect("there");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let done = Command::new("umount").arg("--lazy").arg(self.home.path()).status();
        assert!(done.is_ok_and(|done| done.success()) || std::thread::panicking(), "it stays mounted");
    }
}

struct Writer {
    rng: Rng,
    written: Written,
    id: u64,
    next: u64,
}

impl Writer {
    fn new() -> Self {
        Self { rng: Rng::with_seed(1), written: Written::new(), id: 1, next: 1 }
    }

    /// Appends 64 events of 4 KiB on average; whether they were taken.
    fn append(&mut self, store: &mut SpillStore, acked: u64) -> bool {
        let Self { rng, written, id, next } = self;
        let item = block(rng, *next, 64, 8192, id, written);
        let last = item.last();
        match store.append(&[item], 0, acked) {
            Ok(dropped) => {
                assert!(dropped.is_empty(), "{dropped:?}");
                *next = last + 1;
                true
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::SpillIo, "{}", error.report());
                assert!(error.to_string().contains("disk is full") && error.to_string().contains("bytes"), "{error}");
                *id -= 64; // the caller keeps them
                written.retain(|known, _| known < id);
                false
            }
        }
    }

    fn append_until_full(&mut self, store: &mut SpillStore) -> u64 {
        let mut taken = 0;
        while self.append(store, 0) {
            taken += 1;
            assert!(taken < 10_000, "the disk is never full");
        }
        taken
    }

    fn check(&self, store: &mut SpillStore, after: u64) {
        let items = everything(store, after);
        let found = ids(&items, &self.written);
        let expected = self.next - 1 - after;
        assert_eq!(found.len() as u64, expected, "nothing that was accepted is lost");
        assert_eq!(items.last().map_or(after, Item::last), self.next - 1);
    }
}

fn free_space(path: &Path) -> u64 {
    let stat = Command::new("stat").args(["-f", "-c", "%a %S"]).arg(path).output().expect("coreutils");
    let text = String::from_utf8(stat.stdout).expect("numbers");
    text.split_whitespace().map(|number| number.parse::<u64>().expect("a number")).product()
}

#[test]
fn what_is_accepted_stays_and_deletes_succeed_however_full_the_disk_is() {
    let Some(disk) = SmallDisk::mount() else { return };
    for rival in [false, true] {
        let (mut store, _) = open(&disk.spill(), 1).expect("usable");
        store.reserve(1_000_000, 0).expect("stored");
        let mut writer = Writer::new();
        for _ in 0..20 {
            assert!(writer.append(&mut store, 0));
        }
        if rival {
            disk.fill();
        }
        writer.append_until_full(&mut store);
        writer.check(&mut store, 0);
        assert!(!writer.append(&mut store, 0) && store.probe().is_err(), "still full");
        // Others may take what the reserve has given up meanwhile.
        disk.fill();
        assert_eq!(free_space(disk.home.path()), 0);
        let before = store.bytes();
        store.trim(64).expect("on a full disk");
        store.reserve(2_000_000, 128).expect("on a full disk");
        store.trim(1280).expect("on a full disk");
        assert!(store.bytes() < before);
        writer.check(&mut store, 1280);
        disk.free();
        store.probe().expect("there is room again, and nobody had to do anything");
        assert!(writer.append(&mut store, 1280));
        writer.check(&mut store, 1280);
        let last = writer.next - 1;
        disk.fill();
        store.trim(last).expect("everything");
        assert_eq!(store.bytes(), 0);
        store.close(last + 1, last).expect("on a full disk");
        disk.free();
        for name in ["spill.db", "spill.db.lock", "spill.db.reserve"] {
            std::fs::remove_file(disk.home.path().join(name)).expect("there");
        }
    }
}

#[test]
fn a_spill_is_opened_again_on_a_full_disk() {
    let Some(disk) = SmallDisk::mount() else { return };
    let (mut store, _) = open(&disk.spill(), 1).expect("usable");
    store.reserve(1_000_000, 0).expect("stored");
    let mut writer = Writer::new();
    for _ in 0..40 {
        assert!(writer.append(&mut store, 0));
    }
    disk.fill();
    for clean in [true, false] {
        if clean {
            store.close(writer.next, 0).expect("on a full disk");
        } else {
            drop(store);
        }
        disk.fill(); // what closing has freed is gone
        let (again, recovered) = open(&disk.spill(), 2).expect("with the reserve");
        assert!(recovered.damage.is_none());
        assert_eq!(recovered.next_seq, writer.next);
        store = again;
        writer.check(&mut store, 0);
        store.trim(0).expect("on a full disk");
        disk.free();
        store.probe().expect("there is room again");
        assert!(writer.append(&mut store, 0));
        store.reserve(writer.next - 1, 0).expect("stored");
        disk.fill();
    }
    store.trim(640).expect("on a full disk");
    writer.check(&mut store, 640);
}

#[test]
fn a_spill_that_has_filled_its_disk_by_itself_keeps_everything_until_there_is_room_to_open_it() {
    let Some(disk) = SmallDisk::mount() else { return };
    let (mut store, _) = open(&disk.spill(), 1).expect("usable");
    store.reserve(1_000_000, 0).expect("stored");
    let mut writer = Writer::new();
    writer.append_until_full(&mut store);
    disk.fill();
    store.close(writer.next, 0).expect("on a full disk");
    disk.fill();
    let error = open(&disk.spill(), 2).expect_err("no room, and no reserve is left");
    assert!(error.to_string().contains("free at least"), "{error}");
    disk.free();
    let (mut store, recovered) = open(&disk.spill(), 2).expect("there is room");
    assert!(recovered.damage.is_none());
    writer.check(&mut store, 0);
}

#[test]
fn without_any_room_the_error_names_the_path_the_need_and_the_remedy() {
    let Some(disk) = SmallDisk::mount() else { return };
    disk.fill();
    let error = open(&disk.spill(), 1).expect_err("no room");
    assert_eq!(error.kind(), ErrorKind::SpillIo, "{}", error.report());
    assert!(error.is_retryable());
    let text = error.to_string();
    let named = text.contains(&disk.spill().display().to_string());
    assert!(named && text.contains("free at least 12582912 bytes") && text.contains("choose another path"), "{text}");
    disk.free();
    open(&disk.spill(), 1).expect("later");
}

#[test]
fn a_damaged_spill_on_a_full_disk_stays_as_it_is_until_there_is_room() {
    let Some(disk) = SmallDisk::mount() else { return };
    let (mut store, _) = open(&disk.spill(), 1).expect("usable");
    store.reserve(1_000_000, 0).expect("stored");
    let mut writer = Writer::new();
    for _ in 0..40 {
        assert!(writer.append(&mut store, 0));
    }
    store.close(writer.next, 0).expect("closed");
    let mut bytes = std::fs::read(disk.spill()).expect("there");
    bytes[..100].fill(0);
    std::fs::write(disk.spill(), &bytes).expect("in place");
    disk.fill();
    let error = open(&disk.spill(), 2).expect_err("no room for a copy");
    assert_eq!(error.kind(), ErrorKind::SpillIo, "{}", error.report());
    assert!(std::fs::read(disk.spill()).expect("there") == bytes, "untouched");
    disk.free();
    let (mut store, recovered) = open(&disk.spill(), 2).expect("salvaged");
    assert_eq!(recovered.damage.expect("told").salvaged, writer.written.len() as u64);
    writer.check(&mut store, 0);
}
