//! The spill against a plain list, through appends, deletes, promises, clean ends, kills, power losses at any commit,
//! torn writes, flipped bits and a disk without room.
//!
//! `SPILL_MODEL=5000` is the nightly size. A failure shows the shortest list of steps that fails; each step carries its
//! own seed, so the list is the replay.

#[path = "support/spill.rs"]
mod spill;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fastrand::Rng;
use proptest::prelude::*;
use safe_broadcaster::emitter::item::{Gap, GapReason, Item};
use safe_broadcaster::emitter::spill::store::{RESERVE_FIRST, Recovered, SpillStore};
use safe_broadcaster::error::ErrorKind;
use spill::{Files, PAGE, Written, beside, block, everything, ids, open, scrub};

const CASES: u32 = 32;

#[derive(Clone, Copy, Debug)]
enum Step {
    Append(u64),
    Trim(u64),
    Reserve(u64),
    Read(u64),
    Shrink,
    /// Ends cleanly and begins again.
    Restart,
    /// The process is killed: the files stay as they are.
    Kill,
    /// The machine dies: of what was not synced any later part is gone, the last write torn.
    PowerLoss(u64),
    BitFlip(u64),
    /// The disk has no room from the next start on, until something is found wrong with that.
    Full(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => any::<u64>().prop_map(Step::Append),
        3 => any::<u64>().prop_map(Step::Trim),
        2 => any::<u64>().prop_map(Step::Reserve),
        3 => any::<u64>().prop_map(Step::Read),
        1 => Just(Step::Shrink),
        1 => Just(Step::Restart),
        1 => Just(Step::Kill),
        2 => any::<u64>().prop_map(Step::PowerLoss),
        1 => any::<u64>().prop_map(Step::BitFlip),
        1 => any::<u64>().prop_map(Step::Full),
    ];
    proptest::collection::vec(step, 1..30)
}

/// What must be in the file.
#[derive(Clone, Debug, Default)]
struct Model {
    items: BTreeMap<u64, Item>,
    base: u64,
    reserved: u64,
}

impl Model {
    fn last(&self) -> u64 {
        self.items.values().next_back().map_or(self.base, Item::last).max(self.base)
    }

    fn trim(&mut self, upto: u64) {
        self.items.retain(|_, item| item.last() > upto);
        self.base = upto;
    }

    /// What a process after this one finds.
    fn reopened(&mut self, clean: Option<u64>) {
        let next = clean.unwrap_or(self.reserved + 1).max(self.last() + 1);
        if next > self.last() + 1 {
            let gap = Gap { from: self.last() + 1, to: next - 1, reason: GapReason::Crash };
            self.items.insert(gap.from, Item::Gap(gap));
        }
        self.reserved = next - 1 + RESERVE_FIRST;
    }

    /// Each seq, with its event or the reason of its gap.
    fn stream(&self, after: u64) -> Vec<(u64, String)> {
        flatten(self.items.values().filter_map(|item| item.after(after)))
    }
}

fn flatten(items: impl Iterator<Item = Item>) -> Vec<(u64, String)> {
    let mut stream = Vec::new();
    for item in items {
        match item {
            Item::Gap(gap) => stream.extend((gap.from..=gap.to).map(|seq| (seq, gap.reason.as_str().to_owned()))),
            Item::Events(block) => {
                stream.extend(block.events().map(|(seq, json)| (seq, String::from_utf8_lossy(&json).into_owned())));
            }
        }
    }
    stream
}

/// Where in the WAL each commit of its present generation ends.
fn commits(wal: &[u8]) -> Vec<usize> {
    let Some(salts) = wal.get(16..24) else { return Vec::new() };
    let frames = wal[32..].chunks_exact(24 + PAGE).take_while(|frame| &frame[8..16] == salts);
    let ends = frames.enumerate().filter(|(_, frame)| frame[4..8] != [0; 4]);
    ends.map(|(n, _)| 32 + (n + 1) * (24 + PAGE)).collect()
}

struct World {
    path: PathBuf,
    store: Option<SpillStore>,
    model: Model,
    epoch: String,
    next: u64,
    id: u64,
    written: Written,
    /// The model knows only a part of the block that ends here.
    cut: u64,
    /// States since the last synced one, by the generation of the WAL and its length then.
    unsynced: Vec<(Vec<u8>, usize, Model)>,
}

impl World {
    fn new(home: &Path) -> Self {
        let path = home.join("spill.db");
        let (store, recovered) = open(&path, 1).expect("usable");
        let Recovered { epoch, next_seq: next, reserved, .. } = recovered;
        let (model, written) = (Model { reserved, ..Model::default() }, Written::new());
        let mut world =
            Self { path, store: Some(store), model, epoch, next, id: 1, written, cut: 0, unsynced: Vec::new() };
        world.synced();
        world
    }

    fn store(&mut self) -> &mut SpillStore {
        self.store.as_mut().expect("open")
    }

    /// A commit that may be lost with the machine.
    fn committed(&mut self) {
        let wal = Files::of(&self.path).wal;
        let generation = wal.get(16..24).unwrap_or_default().to_vec();
        if self.unsynced.last().is_some_and(|last| last.0 != generation) {
            self.unsynced.clear(); // folded back, which is synced
        }
        let end = commits(&wal).last().copied().unwrap_or(0);
        self.unsynced.push((generation, end, self.model.clone()));
    }

    /// From here on nothing before can be lost.
    fn synced(&mut self) {
        self.unsynced.clear();
        self.committed();
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Append(seed) => self.append(&mut Rng::with_seed(seed)),
            Step::Trim(seed) => {
                let upto = Rng::with_seed(seed).u64(self.model.base..self.next);
                self.store().trim(upto).expect("also without room");
                self.model.trim(upto);
                self.committed();
            }
            Step::Reserve(seed) => {
                let mut rng = Rng::with_seed(seed);
                let upto = (self.next + rng.u64(0..200)).max(self.model.reserved);
                let acked = rng.u64(self.model.base..self.next);
                self.store().reserve(upto, acked).expect("also without room");
                self.model.trim(acked);
                self.model.reserved = upto;
                self.synced();
            }
            Step::Read(seed) => {
                let mut rng = Rng::with_seed(seed);
                let (after, most) = (rng.u64(self.model.base..self.next), rng.usize(1..50_000));
                let items = self.store().read(after, most).expect("readable");
                let (found, all) = (flatten(items.into_iter()), self.model.stream(after));
                assert_eq!(found, all[..found.len()], "after {after}");
                assert!(!found.is_empty() || all.is_empty());
            }
            Step::Shrink => {
                self.store().shrink(64).expect("alone");
                self.committed();
            }
            Step::Restart => {
                let (next, acked) = (self.next, self.model.base);
                self.store.take().expect("open").close(next, acked).expect("closed");
                self.reopen(Some(next));
            }
            Step::Kill => {
                let files = Files::of(&self.path);
                self.store = None;
                files.restore(&self.path);
                self.reopen(None);
            }
            Step::PowerLoss(seed) => self.lose_power(&mut Rng::with_seed(seed)),
            Step::BitFlip(seed) => self.flip(&mut Rng::with_seed(seed)),
            Step::Full(seed) => self.fill(&mut Rng::with_seed(seed)),
        }
    }

    fn append(&mut self, rng: &mut Rng) {
        let acked = rng.u64(self.model.base..self.next);
        let mut items = Vec::new();
        for _ in 0..rng.u64(1..4) {
            let count = rng.u64(1..20);
            items.push(if rng.u8(..6) == 0 {
                Item::Gap(Gap { from: self.next, to: self.next + count - 1, reason: GapReason::OutboxFull })
            } else {
                block(rng, self.next, count, 3000, &mut self.id, &mut self.written)
            });
            self.next += count;
        }
        self.store().append(&items, acked, acked).expect("stored");
        self.model.trim(acked);
        self.model.items.extend(items.into_iter().map(|item| (item.first(), item)));
        self.committed();
    }

    fn lose_power(&mut self, rng: &mut Rng) {
        let mut files = Files::of(&self.path);
        self.store = None;
        let at = rng.usize(..self.unsynced.len());
        let (_, end, model) = self.unsynced.swap_remove(at);
        let torn = rng.usize(..24 + PAGE);
        let left =
            commits(&files.wal).into_iter().find(|commit| *commit > end).map_or(files.wal.len(), |next| next - 1);
        files.wal.truncate((end + torn).min(left).max(32));
        files.shm.clear();
        files.restore(&self.path);
        self.model = model;
        self.reopen(None);
    }

    fn flip(&mut self, rng: &mut Rng) {
        let (next, acked) = (self.next, self.model.base);
        self.store.take().expect("open").close(next, acked).expect("closed");
        let mut files = Files::of(&self.path);
        // Not in the header, which says whose file it is.
        let at = rng.usize(100..files.main.len());
        files.main[at] ^= 1 << rng.u8(..8);
        files.restore(&self.path);
        let (mut store, recovered) = open(&self.path, rng.u64(..)).expect("whatever was hit");
        scrub(&mut store);
        let items = everything(&mut store, recovered.base);
        let found = ids(&items, &self.written);
        let before: Vec<Item> = self.model.items.values().filter_map(|item| item.after(acked)).collect();
        let before = ids(&before, &self.written);
        assert!(found.iter().all(|id| before.binary_search(id).is_ok()), "what was confirmed comes again");
        if recovered.damage.is_some() {
            assert_ne!(recovered.epoch, self.epoch);
        } else {
            assert_eq!(recovered.epoch, self.epoch);
            assert!(found == before || store.take_damage().is_some(), "a loss without a word");
        }
        let (base, reserved) = (recovered.base, recovered.reserved);
        self.model = Model { items: items.into_iter().map(|item| (item.first(), item)).collect(), base, reserved };
        self.cut = self.model.items.values().next().map_or(0, Item::last);
        (self.store, self.epoch, self.next) = (Some(store), recovered.epoch, recovered.next_seq);
        self.synced();
    }

    /// The reserve cannot be had: that is what a full disk is to the spill.
    fn fill(&mut self, rng: &mut Rng) {
        let (next, acked) = (self.next, self.model.base);
        self.store.take().expect("open").close(next, acked).expect("closed");
        let reserve = beside(&self.path, ".reserve");
        std::fs::remove_file(&reserve).expect("ours");
        std::fs::create_dir(&reserve).expect("writable");
        self.reopen(Some(next));
        let item = block(rng, self.next, 9, 300_000, &mut self.id, &mut self.written);
        match self.store().append(std::slice::from_ref(&item), acked, acked) {
            // There was room within the file.
            Ok(_) => {
                self.next = item.last() + 1;
                self.model.items.insert(item.first(), item);
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::SpillIo, "{}", error.report()),
        }
        let upto = rng.u64(acked..self.next);
        self.store().trim(upto).expect("without room");
        self.model.trim(upto);
        std::fs::remove_dir(&reserve).expect("empty");
        self.store().probe().expect("there is room again");
        self.synced();
    }

    fn reopen(&mut self, clean: Option<u64>) {
        let (store, recovered) = open(&self.path, 1).expect("usable");
        assert!(recovered.damage.is_none(), "{:?}", recovered.damage);
        self.model.reopened(clean);
        assert_eq!(recovered.epoch, self.epoch);
        assert_eq!((recovered.base, recovered.last), (self.model.base, self.model.last()));
        assert_eq!((recovered.next_seq, recovered.reserved), (self.model.last() + 1, self.model.reserved));
        (self.store, self.next) = (Some(store), recovered.next_seq);
        self.check();
        self.synced();
    }

    fn check(&mut self) {
        let base = self.model.base;
        let found = flatten(everything(self.store(), base).into_iter());
        assert_eq!(found, self.model.stream(base));
        let bytes: u64 = self.model.items.values().map(|item| item.bytes() as u64).sum();
        // Of a block that was confirmed in part, the model may know only the rest.
        let (stored, cut) = (self.store().bytes(), self.cut > base);
        assert!(if cut { stored >= bytes } else { stored == bytes }, "{stored} bytes are stored, {bytes} expected");
    }
}

#[test]
fn the_spill_does_what_a_plain_list_does() {
    let cases = spill::number("SPILL_MODEL").map_or(CASES, |cases| cases as u32);
    let config =
        ProptestConfig { cases, failure_persistence: None, max_shrink_iters: 400, ..ProptestConfig::default() };
    proptest!(config, |(steps in steps())| {
        let home = tempfile::tempdir().expect("writable");
        let mut world = World::new(home.path());
        for step in steps {
            world.step(step);
        }
        world.check();
    });
}
