//! SQLite's locks over a fork. They are the whole process's: a child would find one locked for ever that another thread
//! had at that moment, and its first use of SQLite would hang. SQLite has them for instants, but a fork stops whoever
//! touches fresh memory, and that is often who allocates, with the allocator's lock.

#![expect(unsafe_code, reason = "the locks are reached only through SQLite's C interface")]

use std::ffi::c_int;
use std::marker::PhantomData;

use rusqlite::ffi;

/// In the order in which SQLite takes one while it has another: a temporary name (VFS1) needs a random number, whose
/// generator (PRNG) at first looks for the system (MAIN); and all of them allocate.
const LOCKS: [c_int; 8] = [
    ffi::SQLITE_MUTEX_STATIC_OPEN,
    ffi::SQLITE_MUTEX_STATIC_VFS1,
    ffi::SQLITE_MUTEX_STATIC_VFS2,
    ffi::SQLITE_MUTEX_STATIC_PRNG,
    ffi::SQLITE_MUTEX_STATIC_MAIN,
    ffi::SQLITE_MUTEX_STATIC_LRU,
    ffi::SQLITE_MUTEX_STATIC_PMEM,
    ffi::SQLITE_MUTEX_STATIC_MEM,
];

/// All of SQLite's locks of the process, until it is dropped: no thread is in between anything that they guard.
#[derive(Debug)]
pub(crate) struct Locked(PhantomData<*mut ()>); // not Send: who locks has to unlock

impl Locked {
    pub(crate) fn new() -> Self {
        // SAFETY: these identifiers name locks that live as long as the process. Only this thread unlocks them again.
        unsafe {
            ffi::sqlite3_initialize(); // has a lock of its own, which is free when this returns, and is not used again
            for lock in LOCKS {
                ffi::sqlite3_mutex_enter(ffi::sqlite3_mutex_alloc(lock));
            }
        }
        Self(PhantomData)
    }
}

impl Drop for Locked {
    fn drop(&mut self) {
        for lock in LOCKS.into_iter().rev() {
            // SAFETY: locked in `new`, by this thread, or by the one that forked this process from its own.
            unsafe { ffi::sqlite3_mutex_leave(ffi::sqlite3_mutex_alloc(lock)) };
        }
    }
}
