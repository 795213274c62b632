//! Ring and spill together, through promises, kills and losses of power: what was promised to survive power loss is
//! there afterwards, in the ring or in the file.
//!
//! What is on the disk is not guessed: this binary answers `fsync` and `fdatasync` itself and notes the file as it is at
//! that moment. A loss of power leaves each page of the ring as it was then or as it is now, any commit of the spill
//! after the last synced one, and perhaps not the name of a new file.
//!
//! `POWER_LOSS=5000` is the nightly size, `POWER_LOSS_SEED=n` replays one history; a failure prints its seed.

#[path = "support/spill.rs"]
mod spill;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::c_int;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use fastrand::Rng;
use safe_broadcaster::emitter::item::Item;
use safe_broadcaster::emitter::ring::{Ring, Writer, checksum};
use safe_broadcaster::emitter::spill::store::{Limits, Recovered, SpillStore};
use spill::{Files, PAGE, beside, everything};

const HISTORIES: u64 = 50;
const STEPS: usize = 40;
const SEGMENTS: usize = 12;
const RING_PAGE: usize = 4096;
/// Where the ring's header says in which boot it was written, and which ring it is.
const BOOT: std::ops::Range<usize> = 32..48;
const ID: std::ops::Range<usize> = 48..56;

/// What has reached the disk: files by their content, directories by their names.
#[derive(Clone, Default)]
struct Disk {
    files: BTreeMap<PathBuf, Vec<u8>>,
    names: BTreeMap<PathBuf, BTreeSet<PathBuf>>,
}

static DISK: Mutex<Disk> = Mutex::new(Disk { files: BTreeMap::new(), names: BTreeMap::new() });

fn disk() -> MutexGuard<'static, Disk> {
    DISK.lock().unwrap_or_else(PoisonError::into_inner)
}

fn note_synced(fd: c_int) -> c_int {
    let Ok(path) = std::fs::read_link(format!("/proc/self/fd/{fd}")) else { return -1 };
    if path.is_dir() {
        let names = names_in(&path);
        disk().names.insert(path, names);
    } else if let Ok(bytes) = std::fs::read(&path) {
        disk().files.insert(path, bytes);
    }
    0
}

fn names_in(directory: &Path) -> BTreeSet<PathBuf> {
    std::fs::read_dir(directory).expect("readable").map(|entry| entry.expect("readable").path()).collect()
}

#[expect(unsafe_code, reason = "takes the place of the C library's in this binary, for SQLite and the ring alike")]
#[unsafe(no_mangle)]
extern "C" fn fsync(fd: c_int) -> c_int {
    note_synced(fd)
}

#[expect(unsafe_code, reason = "as above")]
#[unsafe(no_mangle)]
extern "C" fn fdatasync(fd: c_int) -> c_int {
    note_synced(fd)
}

/// Where in the WAL each commit of its present generation ends.
fn commits(wal: &[u8]) -> Vec<usize> {
    let Some(salts) = wal.get(16..24) else { return Vec::new() };
    let frames = wal[32..].chunks_exact(24 + PAGE).take_while(|frame| &frame[8..16] == salts);
    let ends = frames.enumerate().filter(|(_, frame)| frame[4..8] != [0; 4]);
    ends.map(|(n, _)| 32 + (n + 1) * (24 + PAGE)).collect()
}

/// The running process.
struct Process {
    store: SpillStore,
    ring: Ring,
    writer: Writer,
    /// What is not in the file yet, oldest first; only this keeps its place in the ring.
    held: VecDeque<Item>,
    /// Last seq in the file, or acknowledged.
    stored: u64,
}

struct World {
    path: PathBuf,
    process: Option<Process>,
    epoch: String,
    rng: Rng,
    /// All seqs that this process knows: the event, or that it is a gap.
    stream: BTreeMap<u64, Option<Vec<u8>>>,
    /// All that was ever written under a seq: one that nobody ever saw is given again after a loss of power.
    written: BTreeMap<u64, Vec<Vec<u8>>>,
    promised: BTreeSet<u64>,
    /// What left the ring before the first promise; no promise is about it.
    unpromised: u64,
    next: u64,
    reserved: u64,
    /// Acknowledged as this process knows, and as the peer does.
    acked: u64,
    peer: u64,
    /// Events so far, of which each is another.
    id: u64,
    /// What was in the place of the ring before it was made, until it is synced.
    before: Option<Vec<u8>>,
}

impl World {
    fn new(home: &Path, seed: u64) -> Self {
        let mut world = Self {
            path: home.join("spill.db"),
            process: None,
            epoch: String::new(),
            rng: Rng::with_seed(seed),
            stream: BTreeMap::new(),
            written: BTreeMap::new(),
            promised: BTreeSet::new(),
            unpromised: 0,
            next: 1,
            reserved: 0,
            acked: 0,
            peer: 0,
            id: 0,
            before: None,
        };
        let recovered = world.open();
        world.epoch = recovered.epoch;
        world
    }

    fn ring_path(&self) -> PathBuf {
        beside(&self.path, ".ring")
    }

    fn process(&mut self) -> &mut Process {
        self.process.as_mut().expect("running")
    }

    /// Starts a process; of what it finds only its own part is noted.
    fn open(&mut self) -> Recovered {
        let before = std::fs::read(self.ring_path()).unwrap_or_default();
        let limits = Limits::from(&spill::config(1_000_000));
        let (store, mut recovered) =
            SpillStore::open(&self.path, limits, Some("ada"), self.rng.u64(..), Some(SEGMENTS)).expect("usable");
        let after = std::fs::read(self.ring_path()).expect("there");
        if before.get(ID) != after.get(ID) {
            disk().files.remove(&self.ring_path());
            self.before = Some(before);
        }
        let ring = recovered.ring.take().expect("asked for");
        let held = recovered.held.iter().cloned().collect();
        self.process = Some(Process { store, writer: Writer::new(ring.clone()), ring, held, stored: recovered.last });
        recovered.held = recovered.held.iter().filter_map(|item| item.after(recovered.last)).collect();
        recovered
    }

    fn step(&mut self) {
        match self.rng.u8(..32) {
            0..12 => self.write(),
            12..16 => self.promise(),
            16..22 => self.append(),
            22..25 => self.acknowledge(),
            25..27 => self.reserve(),
            27..29 => self.kill(),
            _ => self.lose_power(),
        }
    }

    fn write(&mut self) {
        let most = [40, 3000, 20_000, 90_000][self.rng.usize(..4)];
        for _ in 0..self.rng.u32(1..20) {
            let size = self.rng.usize(0..most);
            let padding: String = std::iter::repeat_with(|| self.rng.alphanumeric()).take(size).collect();
            let (json, seq) = (format!("{{\"id\":{},\"pad\":\"{padding}\"}}", self.id).into_bytes(), self.next);
            let process = self.process();
            if !process.writer.fits(json.len()) {
                process.seal();
                if !process.writer.make_room(json.len(), seq) {
                    return;
                }
            }
            process.writer.push(&json, checksum(&json), seq);
            process.ring.note_last(seq);
            self.id += 1;
            self.next += 1;
            self.written.entry(seq).or_default().push(json.clone());
            self.stream.insert(seq, Some(json));
        }
        if self.rng.bool() {
            self.process().seal();
        }
    }

    /// As at the level `power`: promised first, then written, then synced.
    fn promise(&mut self) {
        self.process().ring.promise();
        self.write();
        self.process().ring.sync().expect("synced");
        assert!(disk().files.contains_key(&self.ring_path()), "a sync that was not seen");
        self.before = None;
        let events = self.stream.iter().filter(|(seq, event)| **seq > self.unpromised && event.is_some());
        self.promised.extend(events.map(|(seq, _)| *seq));
    }

    /// The oldest go into the file, and their places in the ring are free.
    fn append(&mut self) {
        let most = self.rng.usize(1..6);
        let acked = self.acked;
        let process = self.process();
        process.seal();
        let most = most.min(process.held.len());
        let stored = process.stored;
        let items: Vec<Item> = process.held.range(..most).filter_map(|item| item.after(stored)).collect();
        assert!(process.store.append(&items, acked, acked).expect("stored").is_empty(), "no bound is near");
        process.stored = items.last().map_or(stored, Item::last).max(acked);
        process.held.drain(..most);
        let (stored, promised) = (process.stored, process.ring.has_promised());
        if !promised {
            self.unpromised = self.unpromised.max(stored);
        }
    }

    fn acknowledge(&mut self) {
        // Nothing is sent that is not reserved.
        let sent = self.reserved.min(self.next - 1);
        if sent <= self.acked {
            return;
        }
        let acked = self.rng.u64(self.acked + 1..=sent);
        let trims = self.rng.bool();
        let process = self.process();
        process.seal();
        process.ring.note_acked(acked);
        if trims && acked.min(process.stored) > 0 {
            process.store.trim(acked).expect("trimmed");
        }
        process.stored = process.stored.max(acked);
        process.held.retain(|item| item.last() > acked);
        self.acked = acked;
        self.peer = self.peer.max(acked);
        self.stream = self.stream.split_off(&(acked + 1));
    }

    fn reserve(&mut self) {
        let (upto, acked) = ((self.next + self.rng.u64(0..30)).max(self.reserved), self.acked);
        self.process().store.reserve(upto, acked).expect("reserved");
        self.reserved = upto;
    }

    /// Ends the process and leaves the files as they are, for the disk to be made of.
    fn die(&mut self) -> (Files, Vec<u8>, Disk) {
        let files = Files::of(&self.path);
        let ring = std::fs::read(self.ring_path()).expect("there");
        let disk = disk().clone();
        self.process = None; // which frees places in the ring, and folds the WAL
        (files, ring, disk)
    }

    fn kill(&mut self) {
        let (files, ring, before) = self.die();
        files.restore(&self.path);
        std::fs::write(self.ring_path(), ring).expect("writable");
        *disk() = before;
        let (given, acked) = (self.next, self.acked);
        let found = self.reopen();
        assert_eq!(self.next, given, "the ring tells every seq that was given");
        assert_eq!(self.acked, acked, "the ring tells what is acknowledged");
        assert_eq!(found, self.stream, "after a kill everything is there that is not acknowledged");
    }

    fn lose_power(&mut self) {
        let (mut files, ring, before) = self.die();
        let (wal_path, ring_path) = (beside(&self.path, "-wal"), self.ring_path());
        // Of the commits that were not synced any later part is gone, the last write torn.
        let synced = before.files.get(&wal_path).map_or(&[][..], |wal| &wal[..]);
        let end = if synced.get(16..24) == files.wal.get(16..24) { commits(synced).last().copied() } else { None };
        let end = end.unwrap_or(32);
        let all = commits(&files.wal);
        let ends: Vec<usize> = std::iter::once(end).chain(all.iter().copied().filter(|at| *at > end)).collect();
        let end = ends[self.rng.usize(..ends.len())];
        let next = all.iter().find(|at| **at > end).map_or(files.wal.len(), |next| next - 1);
        files.wal.truncate((end + self.rng.usize(..24 + PAGE)).min(next).max(32));
        files.shm.clear();
        files.restore(&self.path);
        let named = before.names.values().any(|names| names.contains(&ring_path));
        let left = match before.files.get(&ring_path) {
            _ if !named && self.rng.bool() => None,
            Some(synced) => Some(mixed(&mut self.rng, synced, &ring)),
            // Nobody knows how much of a new file there is, or whether the old one was ever cut.
            None if self.rng.bool() => self.before.clone().filter(|before| !before.is_empty()),
            None => Some(mixed(&mut self.rng, &vec![0; ring.len()], &ring)),
        };
        *disk() = Disk::default();
        disk().files.insert(wal_path, files.wal);
        match left {
            Some(mut left) => {
                self.rng.fill(&mut left[BOOT]);
                std::fs::write(&ring_path, &left).expect("writable");
                disk().files.insert(ring_path, left);
            }
            None => std::fs::remove_file(&ring_path).expect("there"),
        }
        let home = self.path.parent().expect("a directory").to_owned();
        disk().names.insert(home.clone(), names_in(&home));
        self.before = None;
        let reserved = self.reserved;
        let found = self.reopen();
        assert!(self.next > reserved, "{} may have been given before: {reserved} was reserved", self.next);
        for seq in self.promised.iter().filter(|seq| **seq > self.peer) {
            let kept = found.get(seq).is_some_and(|event| event == &self.stream[seq]);
            assert!(kept, "event {seq} was promised to survive power loss");
        }
        self.stream = found;
    }

    /// The next process; returns each seq that it found with its event, and checks that none was made up.
    fn reopen(&mut self) -> BTreeMap<u64, Option<Vec<u8>>> {
        let recovered = self.open();
        assert!(recovered.damage.is_none(), "{:?}", recovered.damage);
        assert_eq!(recovered.epoch, self.epoch);
        assert!(recovered.base <= self.peer, "{} is not acknowledged", recovered.base);
        let mut items = everything(&mut self.process().store, recovered.base);
        assert_eq!(items.last().map_or(recovered.base, Item::last), recovered.last);
        items.extend(recovered.held);
        let mut found = BTreeMap::new();
        let mut end = recovered.base;
        for item in &items {
            assert_eq!(item.first(), end + 1, "a hole that nobody tells of, or a seq twice");
            end = item.last();
            match item {
                Item::Gap(gap) => found.extend((gap.from..=gap.to).map(|seq| (seq, None))),
                Item::Events(block) => found.extend(block.events().map(|(seq, json)| (seq, Some(json.to_vec())))),
            }
        }
        assert_eq!(end + 1, recovered.next_seq);
        for (seq, json) in found.iter().filter_map(|(seq, event)| Some((seq, event.as_ref()?))) {
            let known = self.written.get(seq).is_some_and(|all| all.contains(json));
            assert!(known, "event {seq} was never written: {}", String::from_utf8_lossy(json));
        }
        (self.next, self.reserved, self.acked) = (recovered.next_seq, recovered.reserved, recovered.base);
        found
    }
}

impl Process {
    fn seal(&mut self) {
        self.held.extend(self.writer.seal().map(Item::Events));
    }
}

/// Each page as it was or as it is; how many of them reached the disk differs from one loss to the next.
fn mixed(rng: &mut Rng, was: &[u8], is: &[u8]) -> Vec<u8> {
    let written = rng.u8(0..=8);
    let pages = was.chunks(RING_PAGE).zip(is.chunks(RING_PAGE));
    pages.flat_map(|(was, is)| if rng.u8(..8) < written { is } else { was }).copied().collect()
}

struct Replay(u64);

impl Drop for Replay {
    #[expect(clippy::print_stderr, reason = "how to see it again")]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("replay: POWER_LOSS_SEED={} cargo test --no-default-features --test power_loss", self.0);
        }
    }
}

#[test]
fn what_was_promised_survives_power_loss_wherever_it_lies() {
    let seeds = match spill::number("POWER_LOSS_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..spill::number("POWER_LOSS").unwrap_or(HISTORIES),
    };
    for seed in seeds {
        let _replay = Replay(seed);
        let home = tempfile::tempdir().expect("writable");
        let mut world = World::new(home.path(), seed);
        for _ in 0..STEPS {
            world.step();
        }
        world.lose_power();
    }
}
