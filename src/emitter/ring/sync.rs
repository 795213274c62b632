//! Group commit: one `fdatasync` at a time, and whatever was written before it began is covered by it.
//!
//! Threads that wait anyhow do the work themselves: the first one syncs for all who came before, the others sleep until
//! theirs is covered. Callers on an event loop must not wait, so a thread of ours stands in for them.
//!
//! After a failed `fdatasync` the kernel takes the pages for clean that it could not write, and the next call succeeds
//! although they are lost (known from PostgreSQL as fsyncgate). So everything that was written before the failure is
//! failed with it and never called durable later, and what follows shares no page with it.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::emitter::Reply;
use crate::error::{Error, ErrorKind, Result};

/// So many of the newest calls stand behind [`Syncer::p99`].
const REMEMBERED: usize = 512;
/// So many failed stretches are remembered one by one; older ones are merged, and what lies between counts as failed.
const FAILURES: usize = 64;
/// The thread ends when nobody has asked for so long.
const IDLE: Duration = Duration::from_secs(10);
/// How long our thread looks for the next to ask before it sleeps, about as long as a sync takes. Who awaits one event after
/// another asks again within it, and waking a thread costs half a sync.
const LOOK: Duration = Duration::from_micros(150);

/// What is to be synced.
pub trait Disk: Send + Sync {
    /// The last seq written.
    fn written(&self) -> u64;

    /// Brings everything written so far to the disk.
    ///
    /// # Errors
    /// The disk's.
    fn sync(&self) -> io::Result<()>;

    /// A sync failed: sees to it that what is written from now on shares nothing with what was. Returns the last seq
    /// written until then.
    fn part(&self) -> u64;

    /// What is written from now on is to be synced elsewhere.
    fn renew(&self) {}
}

/// See the [module](self). Shared by all who wait.
pub struct Syncer {
    disk: Box<dyn Disk>,
    state: Mutex<State>,
    /// A call has returned.
    returned: Condvar,
    /// Somebody asks our thread.
    asked: Condvar,
    /// The same for a thread that looks; written with the state locked.
    wanted: AtomicBool,
}

#[derive(Default)]
struct State {
    /// On disk up to here, but for what failed.
    synced: u64,
    failures: VecDeque<Failure>,
    /// A call is under way.
    busy: bool,
    /// By the last seq that is asked for, with the first.
    waiting: BTreeMap<u64, Vec<(u64, Reply<()>)>>,
    /// Our thread runs.
    served: bool,
    took: VecDeque<Duration>,
}

/// Events after `after` and up to `upto` were never on disk as far as anybody knows.
#[derive(Clone)]
struct Failure {
    after: u64,
    upto: u64,
    why: Arc<str>,
}

impl State {
    /// What became of these events, if that is decided; they share the fate of the worst.
    fn verdict(&self, seqs: &RangeInclusive<u64>) -> Option<Result<()>> {
        let failure = self.failures.iter().find(|failure| failure.after < *seqs.end() && *seqs.start() <= failure.upto);
        match failure {
            Some(Failure { why, .. }) => Some(Err(failed(why))),
            None => (*seqs.end() <= self.synced).then_some(Ok(())),
        }
    }

    fn note_failure(&mut self, upto: u64, why: &str) {
        let after = self.failures.back().map_or(self.synced, |last| last.upto.max(self.synced));
        match self.failures.back_mut() {
            Some(last) if last.upto >= after => last.upto = last.upto.max(upto),
            _ => self.failures.push_back(Failure { after, upto, why: why.into() }),
        }
        if self.failures.len() > FAILURES
            && let Some(oldest) = self.failures.pop_front()
            && let Some(next) = self.failures.front_mut()
        {
            next.after = oldest.after;
        }
    }

    /// Those whose verdict is known now.
    fn released(&mut self) -> Vec<(Reply<()>, Result<()>)> {
        let mut ready = Vec::new();
        let end = self.failures.back().map_or(self.synced, |failure| failure.upto.max(self.synced));
        while let Some(entry) = self.waiting.first_entry().filter(|entry| *entry.key() <= end) {
            let (last, replies) = entry.remove_entry();
            for (first, reply) in replies {
                ready.push((reply, self.verdict(&(first..=last)).unwrap_or(Ok(()))));
            }
        }
        ready
    }
}

fn failed(why: &str) -> Error {
    let text = "the disk could not be made to keep the event: it may survive a killed process, but not power loss";
    Error::new(ErrorKind::SpillIo, format!("{text}: {why}"))
}

impl Syncer {
    /// Nothing is synced yet.
    #[must_use]
    pub fn new(disk: Box<dyn Disk>) -> Self {
        Self {
            disk,
            state: Mutex::default(),
            returned: Condvar::new(),
            asked: Condvar::new(),
            wanted: AtomicBool::new(false),
        }
    }

    /// The file with everything up to `upto` is gone: what is not synced of it never will be, and what follows lies in
    /// another.
    pub fn give_up(&self, upto: u64, why: &str) {
        let mut state = self.state.lock();
        if upto > state.synced {
            state.note_failure(upto, why);
        }
        let ready = state.released();
        drop(state);
        // Not before: a call that has begun must not take the new file for the old one.
        self.disk.renew();
        self.returned.notify_all();
        for (reply, verdict) in ready {
            reply(verdict);
        }
    }

    /// Blocks until the event is on disk.
    ///
    /// # Errors
    /// [`ErrorKind::SpillIo`]: the sync that covered it failed.
    pub fn wait(&self, seq: u64) -> Result<()> {
        let mut state = self.state.lock();
        loop {
            if let Some(verdict) = state.verdict(&(seq..=seq)) {
                return verdict;
            }
            if state.busy {
                self.returned.wait(&mut state);
            } else {
                drop(state);
                self.lead();
                state = self.state.lock();
            }
        }
    }

    /// Answers when all these events are on disk, or a sync that covered one of them has failed.
    pub fn request(self: &Arc<Self>, seqs: RangeInclusive<u64>, reply: Reply<()>) {
        let mut state = self.state.lock();
        if let Some(verdict) = state.verdict(&seqs) {
            drop(state);
            return reply(verdict);
        }
        let (first, last) = seqs.into_inner();
        state.waiting.entry(last).or_default().push((first, reply));
        self.wanted.store(true, Ordering::Relaxed);
        if state.served {
            drop(state);
            self.asked.notify_one();
            return;
        }
        state.served = true;
        drop(state);
        let syncer = Arc::clone(self);
        let spawned = thread::Builder::new().name("sb-sync".to_owned()).spawn(move || syncer.serve());
        if let Err(error) = spawned {
            let mut state = self.state.lock();
            state.served = false;
            let waiting = std::mem::take(&mut state.waiting);
            drop(state);
            for (_, reply) in waiting.into_values().flatten() {
                reply(Err(failed(&format!("no thread: {error}"))));
            }
        }
    }

    /// Our thread.
    fn serve(&self) {
        let mut soon = false;
        let mut state = self.state.lock();
        loop {
            if state.waiting.is_empty() {
                let idle = Instant::now();
                if soon {
                    state = self.look(state);
                }
                if state.waiting.is_empty()
                    && self.asked.wait_for(&mut state, IDLE).timed_out()
                    && state.waiting.is_empty()
                {
                    state.served = false;
                    return;
                }
                // Looking costs a CPU, so only where it would have been worth it the last time.
                soon = idle.elapsed() < 2 * LOOK;
            } else if state.busy {
                self.returned.wait(&mut state);
            } else {
                drop(state);
                self.lead();
                state = self.state.lock();
            }
        }
    }

    /// Waits awake for somebody to ask, as long as that may be worth it.
    fn look<'a>(&'a self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.wanted.store(false, Ordering::Relaxed);
        drop(state);
        let until = Instant::now() + LOOK;
        while !self.wanted.load(Ordering::Relaxed) && Instant::now() < until {
            thread::yield_now();
        }
        self.state.lock()
    }

    /// One call for all, if none is under way.
    fn lead(&self) {
        let mut state = self.state.lock();
        if std::mem::replace(&mut state.busy, true) {
            return;
        }
        drop(state);
        let (begun, covers) = (Instant::now(), self.disk.written());
        let outcome = self.disk.sync();
        let took = begun.elapsed();
        // Before anybody hears of it, or the next events would share pages with the lost ones.
        let parted = outcome.as_ref().err().map(|_| self.disk.part());
        let mut state = self.state.lock();
        match (&outcome, parted) {
            (Err(error), Some(upto)) => state.note_failure(upto, &error.to_string()),
            _ => state.synced = state.synced.max(covers),
        }
        state.took.push_back(took);
        if state.took.len() > REMEMBERED {
            state.took.pop_front();
        }
        state.busy = false;
        let ready = state.released();
        drop(state);
        self.returned.notify_all();
        for (reply, verdict) in ready {
            reply(verdict);
        }
    }

    /// How long 99 of 100 of the newest syncs took at most; `None` before the first.
    #[must_use]
    pub fn p99(&self) -> Option<Duration> {
        let mut took: Vec<Duration> = self.state.lock().took.iter().copied().collect();
        took.sort_unstable();
        let at = (took.len() * 99).div_ceil(100).checked_sub(1)?;
        took.get(at).copied()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::sync::mpsc;

    use super::*;

    /// A disk that is synced when the test says so.
    #[derive(Default)]
    struct Fake {
        written: AtomicU64,
        broken: AtomicBool,
        syncs: AtomicU64,
        gate: Mutex<Option<mpsc::Receiver<()>>>,
    }

    struct Shared(Arc<Fake>);

    impl Disk for Shared {
        fn written(&self) -> u64 {
            self.0.written.load(Ordering::SeqCst)
        }

        fn sync(&self) -> io::Result<()> {
            self.0.syncs.fetch_add(1, Ordering::SeqCst);
            if let Some(gate) = &*self.0.gate.lock() {
                gate.recv().expect("the test holds the other end");
            }
            if self.0.broken.load(Ordering::SeqCst) { Err(io::Error::other("bad sector")) } else { Ok(()) }
        }

        fn part(&self) -> u64 {
            self.written()
        }
    }

    fn syncer() -> (Arc<Fake>, Arc<Syncer>) {
        let fake = Arc::new(Fake::default());
        (fake.clone(), Arc::new(Syncer::new(Box::new(Shared(fake)))))
    }

    fn ask(syncer: &Arc<Syncer>, seq: u64) -> mpsc::Receiver<Result<()>> {
        ask_all(syncer, seq..=seq)
    }

    fn ask_all(syncer: &Arc<Syncer>, seqs: RangeInclusive<u64>) -> mpsc::Receiver<Result<()>> {
        let (sender, answer) = mpsc::channel();
        syncer.request(seqs, Box::new(move |verdict| drop(sender.send(verdict))));
        answer
    }

    #[test]
    fn what_queued_during_a_sync_goes_into_the_next() {
        let (fake, syncer) = syncer();
        let (open, gate) = mpsc::channel();
        *fake.gate.lock() = Some(gate);
        fake.written.store(1, Ordering::SeqCst);
        let first = ask(&syncer, 1);
        while fake.syncs.load(Ordering::SeqCst) == 0 {
            thread::yield_now();
        }
        fake.written.store(1000, Ordering::SeqCst);
        let rest: Vec<_> = (2..=1000).map(|seq| ask(&syncer, seq)).collect();
        open.send(()).expect("waited for");
        first.recv().expect("answered").expect("synced");
        assert!(rest[0].try_recv().is_err(), "the first call began before the second event was written");
        open.send(()).expect("waited for");
        for answer in rest {
            answer.recv().expect("answered").expect("synced");
        }
        assert_eq!(fake.syncs.load(Ordering::SeqCst), 2);
        assert!(syncer.p99().is_some());
    }

    #[test]
    fn whoever_asks_is_heard_whether_the_thread_sleeps_looks_or_is_about_to_sleep() {
        let (fake, syncer) = syncer();
        for seq in 1..=2000 {
            fake.written.store(seq, Ordering::SeqCst);
            ask(&syncer, seq).recv_timeout(Duration::from_secs(20)).expect("heard").expect("synced");
            // Some before it looks, some after, and most around the moment in which it lies down.
            let pause = LOOK.as_micros() as u64 * (seq % 8) / 5;
            let next = Instant::now() + Duration::from_micros(pause);
            while Instant::now() < next {}
        }
    }

    #[test]
    fn a_failed_sync_fails_all_that_was_written_and_a_later_success_changes_nothing() {
        let (fake, syncer) = syncer();
        fake.written.store(3, Ordering::SeqCst);
        syncer.wait(3).expect("synced");
        fake.written.store(5, Ordering::SeqCst);
        fake.broken.store(true, Ordering::SeqCst);
        let error = syncer.wait(4).expect_err("failed");
        assert!(error.to_string().contains("bad sector"), "{error}");
        fake.broken.store(false, Ordering::SeqCst);
        fake.written.store(7, Ordering::SeqCst);
        syncer.wait(7).expect("synced");
        assert!(syncer.wait(5).is_err() && syncer.wait(4).is_err(), "their pages may be lost");
        assert!(ask(&syncer, 5).recv().expect("answered").is_err());
        syncer.wait(3).expect("was on disk before");
        syncer.wait(6).expect("came after");
    }

    #[test]
    fn what_lay_in_a_file_that_is_gone_fails_and_what_follows_is_synced() {
        let (fake, syncer) = syncer();
        fake.written.store(3, Ordering::SeqCst);
        syncer.wait(3).expect("synced");
        syncer.give_up(3, "removed");
        fake.written.store(6, Ordering::SeqCst);
        assert!(ask_all(&syncer, 1..=6).recv().expect("answered").is_ok(), "all of it was on disk before");
        fake.written.store(8, Ordering::SeqCst);
        syncer.give_up(8, "removed");
        fake.written.store(9, Ordering::SeqCst);
        syncer.wait(9).expect("lies in the new file");
        let error = syncer.wait(8).expect_err("lay in the old one");
        assert!(error.to_string().contains("removed"), "{error}");
    }

    #[test]
    fn events_asked_for_together_fail_if_one_of_them_did() {
        let (fake, syncer) = syncer();
        for (written, broken) in [(3, false), (5, true), (7, false)] {
            fake.broken.store(broken, Ordering::SeqCst);
            fake.written.store(written, Ordering::SeqCst);
            assert_eq!(syncer.wait(written).is_err(), broken);
        }
        for (seqs, lost) in [(1..=3, false), (3..=4, true), (5..=6, true), (1..=7, true), (6..=7, false)] {
            let verdict = ask_all(&syncer, seqs.clone()).recv().expect("answered");
            assert_eq!(verdict.is_err(), lost, "{seqs:?}");
        }
    }

    #[test]
    fn events_asked_for_together_are_told_of_a_failure_before_the_last_is_written() {
        let (fake, syncer) = syncer();
        let (open, gate) = mpsc::channel();
        *fake.gate.lock() = Some(gate);
        fake.broken.store(true, Ordering::SeqCst);
        fake.written.store(1, Ordering::SeqCst);
        let answer = ask_all(&syncer, 1..=2);
        open.send(()).expect("waited for");
        while syncer.p99().is_none() {
            thread::yield_now();
        }
        fake.broken.store(false, Ordering::SeqCst);
        fake.written.store(2, Ordering::SeqCst);
        for _ in 0..2 {
            open.send(()).expect("waited for"); // the next call may have begun before
        }
        assert!(answer.recv().expect("answered").is_err(), "the first of them may be lost");
    }

    #[test]
    fn many_alternating_failures_are_never_forgotten() {
        let (fake, syncer) = syncer();
        for n in 0..400 {
            fake.broken.store(n % 2 == 1, Ordering::SeqCst);
            fake.written.store(n + 1, Ordering::SeqCst);
            assert_eq!(syncer.wait(n + 1).is_err(), n % 2 == 1);
        }
        assert!((1..400).step_by(2).all(|n| syncer.wait(n + 1).is_err()));
        assert!(syncer.state.lock().failures.len() <= FAILURES);
    }

    #[test]
    fn threads_that_wait_share_their_syncs() {
        let (fake, syncer) = syncer();
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let seq = fake.written.fetch_add(1, Ordering::SeqCst) + 1;
                        syncer.wait(seq).expect("synced");
                    }
                });
            }
        });
        assert!(fake.syncs.load(Ordering::SeqCst) <= 1600);
    }
}
