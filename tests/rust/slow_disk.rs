//! A disk that is slow, or stands still: this binary answers `write` and `fdatasync` itself, and takes its time for the
//! files of the test. What is promised: no caller is held up by it below the level `power`, memory stays within its
//! bound, the policy at the bound applies, and nothing is lost or overtaken.

mod support;

#[path = "support/spill.rs"]
mod spill;

use std::ffi::{c_int, c_void};
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use safe_broadcaster::emitter::Emitter;
use safe_broadcaster::emitter::config::{Durability, EmitterConfig, WhenFull};
use safe_broadcaster::emitter::link::{Endpoint, Target};
use safe_broadcaster::emitter::outbox::Pushed;
use safe_broadcaster::error::ErrorKind;
use support::{Client, PATIENCE, hub};

/// Files with this in their path are on the slow disk.
const SLOW: &str = "slow-disk";
/// Nothing is written at all.
static STILL: AtomicBool = AtomicBool::new(false);
/// Milliseconds that each call takes at most, and a quarter of that at least; 0: none.
static MOST: AtomicU64 = AtomicU64::new(0);
/// Calls that were held up.
static HELD: AtomicU64 = AtomicU64::new(0);
/// One disk for all tests.
static TURN: Mutex<()> = Mutex::new(());

fn take_time(fd: c_int) {
    let most = MOST.load(Ordering::SeqCst);
    if most == 0 && !STILL.load(Ordering::SeqCst) {
        return;
    }
    if std::fs::read_link(format!("/proc/self/fd/{fd}")).is_ok_and(|path| path.to_string_lossy().contains(SLOW)) {
        HELD.fetch_add(1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(fastrand::u64(most / 4..=most)));
        while STILL.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn answer(done: rustix::io::Result<usize>) -> isize {
    done.map_or(-1, |written| written as isize)
}

#[expect(unsafe_code, reason = "takes the place of the C library's in this binary, for SQLite and the ring alike")]
mod calls {
    use super::*;

    fn open<'a>(fd: c_int) -> BorrowedFd<'a> {
        // SAFETY: the caller has it open during the call.
        unsafe { BorrowedFd::borrow_raw(fd) }
    }

    fn bytes<'a>(from: *const c_void, count: usize) -> &'a [u8] {
        // SAFETY: as the caller of the C library's function promises.
        unsafe { std::slice::from_raw_parts(from.cast(), count) }
    }

    #[unsafe(no_mangle)]
    extern "C" fn write(fd: c_int, from: *const c_void, count: usize) -> isize {
        take_time(fd);
        answer(rustix::io::write(open(fd), bytes(from, count)))
    }

    #[unsafe(no_mangle)]
    extern "C" fn pwrite64(fd: c_int, from: *const c_void, count: usize, at: i64) -> isize {
        take_time(fd);
        answer(rustix::io::pwrite(open(fd), bytes(from, count), at as u64))
    }

    #[unsafe(no_mangle)]
    extern "C" fn fdatasync(fd: c_int) -> c_int {
        take_time(fd);
        rustix::fs::fdatasync(open(fd)).map_or(-1, |()| 0)
    }

    #[unsafe(no_mangle)]
    extern "C" fn fsync(fd: c_int) -> c_int {
        take_time(fd);
        rustix::fs::fsync(open(fd)).map_or(-1, |()| 0)
    }
}

/// The disk is quick again when the test ends, however it does.
struct Disk(#[expect(dead_code, reason = "held")] MutexGuard<'static, ()>);

impl Disk {
    fn alone() -> Self {
        Self(TURN.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn stand_still() {
        STILL.store(true, Ordering::SeqCst);
    }

    fn go_on(most: u64) {
        MOST.store(most, Ordering::SeqCst);
        STILL.store(false, Ordering::SeqCst);
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        Self::go_on(0);
    }
}

fn emitter(home: &Path, port: u16, when_full: WhenFull) -> Emitter {
    let config = EmitterConfig {
        spill_path: home.join("spill.db"),
        durability: Durability::Process,
        when_full,
        max_event_bytes: 64 << 10,
        ack_timeout: PATIENCE,
        ..spill::config(1_000_000)
    };
    let target = Target::Url(Endpoint::parse(&format!("ws://127.0.0.1:{port}/ws")).expect("a URL"));
    Emitter::new(config, target).expect("valid")
}

fn home() -> tempfile::TempDir {
    tempfile::Builder::new().prefix(SLOW).tempdir().expect("writable")
}

fn event(n: u64, size: usize) -> Vec<u8> {
    format!(r#"{{"type":"t","topic":"x","n":{n},"pad":"{}"}}"#, "x".repeat(size)).into_bytes()
}

fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn answered<T: Send + 'static>(
    ask: impl FnOnce(safe_broadcaster::emitter::Reply<T>),
) -> std::sync::mpsc::Receiver<Result<T, safe_broadcaster::error::Error>> {
    let (sender, answer) = std::sync::mpsc::channel();
    ask(Box::new(move |outcome| drop(sender.send(outcome))));
    answer
}

#[tokio::test]
async fn a_disk_that_stands_still_holds_up_no_caller_and_memory_keeps_its_bound() {
    let _alone = Disk::alone();
    for when_full in [WhenFull::DropOldest, WhenFull::DropNewest, WhenFull::Wait, WhenFull::Raise] {
        let (home, hub) = (home(), hub(|_| {}));
        let emitter = emitter(home.path(), hub.port(), when_full);
        emitter.push(&event(1, 0), Durability::Process, None).expect("accepted");
        until("the spill is open", || emitter.stats().identity.is_some());
        let before = HELD.load(Ordering::SeqCst);
        Disk::stand_still();
        let (mut accepted, mut last, mut refusal) = (vec![1], 1, None);
        // As long as the disk stands still, each of these returns. No clock is asked: a caller that waits for the disk
        // waits for ever.
        while refusal.is_none() || last < 3000 {
            last += 1;
            match emitter.push(&event(last, 2000), Durability::Process, None) {
                Ok(Pushed::Accepted { .. }) => accepted.push(last),
                Ok(other) => refusal = Some(format!("{other:?}")),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::SpillFull);
                    refusal = Some("error".to_owned());
                }
            }
            assert!(last < 20_000, "there is no bound");
        }
        until("somebody waits for the disk", || HELD.load(Ordering::SeqCst) > before);
        let expected = match when_full {
            WhenFull::DropOldest | WhenFull::DropNewest => "Dropped",
            WhenFull::Wait => "Full",
            WhenFull::Raise => "error",
        };
        assert_eq!(refusal.as_deref(), Some(expected), "{when_full:?}");
        let stats = emitter.stats();
        let bytes = stats.snapshot.held + stats.counts.waiting_bytes;
        assert!(bytes <= (4 << 20) + (128 << 10), "{bytes} bytes in memory, 4 MiB allowed");
        let (mut subscriber, _) = Client::subscriber(hub.port(), &["*"], None).await;
        let live = answered(|reply| emitter.start(reply));
        Disk::go_on(0);
        live.recv_timeout(PATIENCE).expect("in time").expect("live");
        let mut arrived = Vec::new();
        while arrived.last() != accepted.last() {
            let frame = subscriber.json().await;
            arrived.extend(frame["data"]["n"].as_u64());
        }
        assert_eq!(arrived, accepted, "{when_full:?}: in order, each once");
        let stopped = answered(|reply| emitter.stop(Duration::from_secs(1), reply));
        stopped.recv_timeout(PATIENCE).expect("in time").expect("in order");
    }
}

#[tokio::test]
async fn on_a_disk_that_takes_its_time_for_each_write_all_arrive_in_order_over_an_outage_and_a_restart() {
    let _alone = Disk::alone();
    let (home, hub) = (home(), hub(|_| {}));
    let (mut subscriber, _) = Client::subscriber(hub.port(), &["*"], None).await;
    let mut last = 0;
    for life in 0..2 {
        let emitter = emitter(home.path(), hub.port(), WhenFull::DropOldest);
        emitter.push(&event(last + 1, 10), Durability::Process, None).expect("accepted");
        last += 1;
        until("the spill is open", || emitter.stats().identity.is_some());
        Disk::go_on(500);
        let before = HELD.load(Ordering::SeqCst);
        for _ in 0..100 {
            last += 1;
            emitter.push(&event(last, 500), Durability::Process, None).expect("accepted");
        }
        until("something is being written", || HELD.load(Ordering::SeqCst) > before);
        if life == 1 {
            let live = answered(|reply| emitter.start(reply));
            live.recv_timeout(PATIENCE).expect("in time").expect("live");
            for _ in 0..100 {
                last += 1;
                emitter.push(&event(last, 500), Durability::Process, None).expect("accepted");
            }
            let mut arrived = Vec::new();
            while arrived.last() != Some(&last) {
                arrived.extend(subscriber.json().await["data"]["n"].as_u64());
            }
            assert_eq!(arrived, (1..=last).collect::<Vec<_>>());
        }
        Disk::go_on(20);
        let stopped = answered(|reply| emitter.stop(Duration::from_millis(100), reply));
        stopped.recv_timeout(PATIENCE).expect("in time").expect("in order");
        Disk::go_on(0);
    }
}
