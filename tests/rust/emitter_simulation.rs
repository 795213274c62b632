//! Drives the emitter's machine and outbox through random schedules on simulated time, against a receiver that checks
//! everything it is given and a disk that survives crashes.
//!
//! `SIM_SCHEDULES=100000` is the nightly size; `SIM_SEED=<n>` replays one schedule and shows its last steps.

#![expect(clippy::print_stderr, reason = "a failure shows how to replay it")]

#[path = "emitter_simulation/contract.rs"]
mod contract;
#[path = "emitter_simulation/disk.rs"]
mod disk;
#[path = "emitter_simulation/peer.rs"]
mod peer;
#[path = "emitter_simulation/world.rs"]
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

use world::World;

const SCHEDULES: u64 = 2000;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

fn replay(seed: u64) {
    let mut world = World::new(seed, true);
    let outcome = catch_unwind(AssertUnwindSafe(|| world.run()));
    for line in world.trace.iter().flatten() {
        eprintln!("{line}");
    }
    if outcome.is_err() {
        eprintln!("replay with: SIM_SEED={seed} cargo test --test emitter_simulation");
        panic!("schedule {seed} breaks a promise");
    }
}

#[test]
fn random_schedules_keep_every_promise() {
    if let Some(seed) = number("SIM_SEED") {
        return replay(seed);
    }
    let schedules = number("SIM_SCHEDULES").unwrap_or(SCHEDULES);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicU64::new(0);
    let work = || loop {
        let seed = next.fetch_add(1, Ordering::Relaxed);
        if seed >= schedules {
            return None;
        }
        if catch_unwind(|| World::new(seed, false).run()).is_err() {
            next.store(schedules, Ordering::Relaxed);
            return Some(seed);
        }
    };
    let failed = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().filter_map(|worker| worker.join().expect("it catches")).min()
    });
    if let Some(seed) = failed {
        replay(seed);
    }
    let parked = (world::PARKED.load(Ordering::Relaxed), world::REQUEUED.load(Ordering::Relaxed));
    let enough = parked.0 > schedules && parked.1 > schedules / 50;
    assert!(enough || schedules < SCHEDULES, "hardly anything was parked and sent again: {parked:?}");
}
