//! What a forked child must not keep: a descriptor that it inherits holds the lock on a file, or a port, for a parent
//! that may be killed, and whoever comes after the parent would be refused as long as the child lives. And a lock that a
//! thread had which does not exist in it.
//!
//! Only the child, in which none of our threads exists, may close a descriptor that it does not own.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};

use crate::owned;
use crate::runtime::{self, Runtimes};
use crate::sqlite::fork::Locked;

static OPEN: Mutex<Vec<RawFd>> = Mutex::new(Vec::new());

thread_local! {
    static FORKING: RefCell<Option<Forking>> = const { RefCell::new(None) };
}

/// The locks of the process, held over a fork, so that the child finds all descriptors noted, and each lock its own. They
/// are the standard library's: to unlock one in a child touches nothing else.
struct Forking {
    runtimes: MutexGuard<'static, Runtimes>,
    open: MutexGuard<'static, Vec<RawFd>>,
    _owned: MutexGuard<'static, BTreeSet<owned::Key>>,
    _sqlite: Locked,
}

fn open() -> MutexGuard<'static, Vec<RawFd>> {
    OPEN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Something with a descriptor that a forked child closes. Has to be dropped before that descriptor is closed.
#[derive(Debug)]
pub(crate) struct Inherited(RawFd);

impl Inherited {
    /// Notes what `make` opens; no fork comes in between.
    pub(crate) fn open<T: AsRawFd, E>(make: impl FnOnce() -> Result<T, E>) -> Result<(Self, T), E> {
        let mut open = open();
        let opened = make()?;
        let fd = opened.as_raw_fd();
        open.push(fd);
        Ok((Self(fd), opened))
    }
}

impl Drop for Inherited {
    fn drop(&mut self) {
        open().retain(|fd| *fd != self.0);
    }
}

/// Sees to each fork of the process from now on, whoever forks. The C library's handlers and not Python's: between those
/// other Python threads run, and would wait for a lock that is held here while they hold the interpreter's.
#[expect(unsafe_code, reason = "there is no other way to be told of a fork")]
pub fn watch_forks() {
    static WATCHED: Once = Once::new();
    // SAFETY: the handlers live as long as the process, and unwind nowhere: nothing in them panics.
    WATCHED.call_once(|| unsafe {
        libc::pthread_atfork(Some(before_fork), Some(forked_in_parent), Some(forked_in_child));
    });
}

extern "C" fn before_fork() {
    let held = Forking { runtimes: runtime::runtimes(), open: open(), _owned: owned::all(), _sqlite: Locked::new() };
    FORKING.with_borrow_mut(|forking| *forking = Some(held));
}

extern "C" fn forked_in_parent() {
    drop(FORKING.with_borrow_mut(Option::take));
}

extern "C" fn forked_in_child() {
    runtime::next_generation();
    let Some(Forking { runtimes, mut open, .. }) = FORKING.with_borrow_mut(Option::take) else { return };
    runtime::forget(runtimes);
    for descriptor in open.drain(..) {
        close(descriptor);
    }
}

/// Closes what the parent noted.
#[expect(unsafe_code, reason = "it is a number here")]
fn close(descriptor: RawFd) {
    // SAFETY: its owner is a thread of the parent, which does not exist in this process.
    unsafe { libc::close(descriptor) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_is_noted_until_it_is_dropped() {
        let (note, file) = Inherited::open(|| std::fs::File::open("/dev/null")).expect("there");
        assert!(open().contains(&file.as_raw_fd()));
        drop(note);
        assert!(!open().contains(&file.as_raw_fd()));
    }
}
