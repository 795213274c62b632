//! The simulated disk must do what the real one does, or the simulation proves nothing.

use fastrand::Rng;
use safe_broadcaster::emitter::config::EmitterConfig;
use safe_broadcaster::emitter::item::{Gap, GapReason, Item};
use safe_broadcaster::emitter::spill::store::{Limits, Recovered, SpillStore};
use safe_broadcaster::emitter::spill::{Done, Op};
use safe_broadcaster::wire::block::BlockBuilder;

use crate::disk::Disk;
use crate::world;

fn items(rng: &mut Rng, mut next: u64) -> Vec<Item> {
    let mut items = Vec::new();
    for _ in 0..rng.usize(1..4) {
        let count = rng.u64(1..12);
        items.push(if rng.u8(..5) == 0 {
            Item::Gap(Gap { from: next, to: next + count - 1, reason: GapReason::OutboxFull })
        } else {
            let mut builder = BlockBuilder::new(next, bytes::BytesMut::new());
            (0..count).for_each(|_| builder.push(&vec![b' '; rng.usize(0..200)]));
            Item::Events(builder.seal().expect("not empty"))
        });
        next += count;
    }
    items
}

fn what(recovered: &Recovered) -> (u64, u64, u64, u64, &[Gap], u64, u64) {
    let Recovered { next_seq, reserved, base, last, gaps, bytes, parked, .. } = recovered;
    (*next_seq, *reserved, *base, *last, gaps, *bytes, *parked)
}

struct Pair {
    path: std::path::PathBuf,
    config: EmitterConfig,
    disk: Disk,
    store: SpillStore,
    next: u64,
    acked: u64,
}

impl Pair {
    fn open(path: std::path::PathBuf, config: EmitterConfig) -> Self {
        let (store, _) = SpillStore::open(&path, Limits::from(&config), Some("simulated"), 1, None).expect("usable");
        let mut disk = Disk::new(&config);
        disk.recover(None, None);
        Self { path, config, disk, store, next: 1, acked: 0 }
    }

    fn reopen(mut self, clean: bool) -> Self {
        if clean {
            self.disk.apply(Op::Close { next_seq: self.next, acked: self.acked });
            self.store.close(self.next, self.acked).expect("closed");
        } else {
            drop(self.store);
        }
        let limits = Limits::from(&self.config);
        let (store, real) = SpillStore::open(&self.path, limits, Some("simulated"), 1, None).expect("usable");
        let simulated = self.disk.recover(None, None).0;
        assert_eq!(what(&simulated), what(&real), "after an end that was clean: {clean}");
        Self { store, next: real.next_seq, acked: real.base, ..self }
    }

    fn step(&mut self, rng: &mut Rng) {
        self.acked = rng.u64(self.acked..self.next);
        let (acked, in_flight) = (self.acked, rng.u64(self.acked..self.next));
        match rng.u8(..9) {
            8 if self.disk.has_event(acked + 1) => {
                let reason = "simulated".into();
                let real = self.store.park(acked + 1, None, "simulated").expect("stored");
                let done = self.disk.apply(Op::Park { seq: acked + 1, json: None, reason });
                let Done::Parked { result, bytes, .. } = done else { panic!("{done:?}") };
                assert_eq!((result.expect("stored"), bytes), (real, self.store.bytes()));
            }
            0..4 => {
                let items = items(rng, self.next);
                self.next = items.last().map_or(0, Item::last) + 1;
                let real = self.store.append(&items, in_flight, acked).expect("stored");
                let done = self.disk.apply(Op::Append { items, in_flight, acked });
                let Done::Appended { dropped, bytes, .. } = done else { panic!("{done:?}") };
                assert_eq!((dropped, bytes), (real, self.store.bytes()));
            }
            4..6 => {
                let (after, max_bytes) = (rng.u64(acked..self.next), rng.usize(0..4000));
                let real = self.store.read(after, max_bytes).expect("readable");
                let done = self.disk.apply(Op::Read { after, max_bytes });
                let Done::Read(Ok(simulated)) = done else { panic!("{done:?}") };
                assert_eq!(simulated, real, "{max_bytes} bytes after {after}");
            }
            6 => {
                self.store.trim(acked).expect("stored");
                self.disk.apply(Op::Trim { upto: acked });
            }
            7.. => {
                let upto = (self.next + rng.u64(0..100)).max(self.disk.reserved + 1);
                self.store.reserve(upto, acked).expect("stored");
                self.disk.apply(Op::Reserve { upto, acked });
            }
        }
    }
}

#[test]
fn the_simulated_disk_does_what_the_real_one_does() {
    let home = tempfile::tempdir().expect("writable");
    for seed in 0..40 {
        let mut rng = Rng::with_seed(seed);
        let config = world::config(&mut rng, false);
        let mut pair = Pair::open(home.path().join(format!("{seed}.db")), config);
        for _ in 0..30 {
            if rng.u8(..10) == 0 {
                pair = pair.reopen(rng.bool());
            } else {
                pair.step(&mut rng);
            }
        }
    }
}
