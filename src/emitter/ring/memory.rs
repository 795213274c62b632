//! Mapped memory, raw: a file's pages, which the kernel keeps when the process dies, or anonymous ones.
//!
//! Here is all of the ring's unsafe code. Who may touch which bytes is the ring's business: a byte is written by one
//! thread at a time (callers hold the outbox's lock), and nobody reads it before it was published by a lock or by an
//! atomic word, or writes it again while somebody still can read it (a segment is reused when its last block is gone).

#![expect(unsafe_code, reason = "see above, and docs/decisions/0010-ring.md")]

use std::fs::File;
use std::io;
use std::sync::atomic::AtomicU64;

use memmap2::{MmapOptions, MmapRaw};

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Memory {
    map: MmapRaw,
    len: usize,
}

impl Memory {
    /// Pages that die with the process; they take room only where they are touched.
    pub(super) fn anonymous(len: usize) -> io::Result<Self> {
        Ok(Self { map: MmapOptions::new().len(len).no_reserve_swap().map_anon()?.into(), len })
    }

    /// The first `len` bytes of a file, which must have them: touching what is not there kills the process.
    pub(super) fn of(file: &File, len: usize) -> io::Result<Self> {
        Ok(Self { map: MmapOptions::new().len(len).map_raw(file)?, len })
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The eight bytes at `at`, as they are in memory: little-endian, as every machine that we build for.
    pub(super) fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at + 8 <= self.len, "no word at {at}");
        // SAFETY: within the mapping, which lives as long as `self`; aligned, since a mapping begins at a page; all
        // access to words is atomic.
        unsafe { AtomicU64::from_ptr(self.map.as_mut_ptr().add(at).cast()) }
    }

    /// Copies bytes to `at`.
    ///
    /// # Safety
    /// Nobody else reads or writes this range meanwhile.
    pub(super) unsafe fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.len, "{} bytes at {at} are outside", bytes.len());
        // SAFETY: within the mapping; exclusive by contract; `bytes` cannot overlap a range that nobody else reads.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.map.as_mut_ptr().add(at), bytes.len()) }
    }

    /// The bytes at `at`.
    ///
    /// # Safety
    /// Nobody writes this range as long as the slice is used.
    pub(super) unsafe fn read(&self, at: usize, len: usize) -> &[u8] {
        assert!(at + len <= self.len, "{len} bytes at {at} are outside");
        // SAFETY: within the mapping; not written by contract; every byte of a mapping is initialised.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().add(at), len) }
    }
}
