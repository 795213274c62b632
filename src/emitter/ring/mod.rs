//! The ring: preallocated memory in which accepted events lie until they are confirmed or in the spill, and from which
//! they are sent without being copied again. Mapped from a file, it outlives a killed process: a record that was
//! written is in the kernel's pages, whatever becomes of us.
//!
//! ```text
//! file     header page │ segment 0 │ segment 1 │ …            64 KiB each; a large event takes several in a row
//! header   magic │ geometry │ last seq given │ acknowledged │ boot │ id │ promised? │ identity
//! identity length │ CRC32C │ emitter, epoch
//! segment  first seq │ check │ blocks ▶ ………………………………………………………… ◀ slots
//! block    13 bytes of header, whose count is written when it is sealed │ length u32, JSON │ length u32, JSON │ …   (`wire::block`)
//! slot     CRC32C of the JSON and its seq │ first of a block? │ length      one word for each event, from the end down
//! ```
//!
//! The slot commits the event: one atomic word, stored after the bytes. The slot behind it is cleared before, so that
//! nothing of an earlier use is taken for an event. Segments are taken lowest first and used again as soon as the last
//! block in them is gone: a busy link touches few of them, which stay in the processor's cache.

mod memory;
mod recovery;
pub mod sync;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytes::Bytes;

use crate::clock::boot_id;
use crate::emitter::item::Identity;
use crate::error::{Error, ErrorKind, Result};
use crate::wire::block::{BLOCK_KIND, Block, EVENT_OVERHEAD, HEADER_BYTES};
use memory::Memory;
pub use recovery::{Left, recover, revive};

/// Size of a segment: costs per block vanish in it (some 150 events of 400 bytes), and filling, sending and
/// acknowledging overlap.
pub const SEGMENT_BYTES: usize = 64 << 10;
const PAGE: usize = 4096;
const WORD: usize = 8;
/// Bytes of a segment before its blocks.
const SEGMENT_HEADER: usize = 2 * WORD;
/// "SBring", version 1.
const MAGIC: u64 = u64::from_le_bytes(*b"SBring\x01\0");
/// Longest emitter and epoch as on the wire, with what lies between and before them.
const MAX_IDENTITY: usize = 2 * 256 + 1 + 4;

// Where the header's words lie.
const AT_MAGIC: usize = 0;
const AT_GEOMETRY: usize = 8;
const AT_LAST: usize = 16;
const AT_ACKED: usize = 24;
const AT_BOOT: usize = 32;
const AT_ID: usize = 48;
const AT_PROMISED: usize = 56;
const AT_IDENTITY: usize = 64;

/// In a slot: the event is the first of its block.
const FIRST_OF_BLOCK: u64 = 1 << 31;
const LENGTH: u64 = FIRST_OF_BLOCK - 1;

/// The memory and who uses which part of it. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Ring(Arc<Arena>);

#[derive(Debug)]
struct Arena {
    memory: Memory,
    /// The file and its path; `None`: anonymous.
    file: Option<(File, PathBuf)>,
    segments: usize,
    /// One bit for each segment. Set by whoever holds the [`Writer`], cleared by whoever drops the last block.
    used: Box<[AtomicU64]>,
    /// The file's name is on the disk.
    named: AtomicBool,
    /// Everything in it is elsewhere, as durable as it was promised to be.
    ended: AtomicBool,
}

/// Segments in a row, in use.
#[derive(Debug)]
struct Segment {
    arena: Arc<Arena>,
    index: usize,
    span: usize,
}

/// A block's bytes, which keep its segment in use.
struct Slice {
    segment: Arc<Segment>,
    range: Range<usize>,
}

impl AsRef<[u8]> for Slice {
    #[expect(unsafe_code, reason = "see ring::memory")]
    fn as_ref(&self) -> &[u8] {
        // SAFETY: a sealed block is not written again before its segment is free, which this very slice prevents.
        unsafe { self.segment.arena.memory.read(self.range.start, self.range.len()) }
    }
}

impl Ring {
    /// How many segments events of `capacity` bytes need, with room for two of the largest however the rest lies.
    #[must_use]
    pub fn segments(capacity: usize, largest_event: usize) -> usize {
        capacity.div_ceil(SEGMENT_BYTES) + 2 * span(largest_event)
    }

    /// A ring that dies with the process.
    ///
    /// # Errors
    /// [`ErrorKind::SpillIo`]: no address space.
    pub fn anonymous(segments: usize) -> Result<Self> {
        let failed = |error| Error::new(ErrorKind::SpillIo, "cannot map memory for the outbox").with_source(error);
        let memory = Memory::anonymous(PAGE + segments * SEGMENT_BYTES).map_err(failed)?;
        Ok(Self::over(memory, None, segments))
    }

    /// As [`create`](Self::create), in memory: for tests that let it survive by [`snapshot`](Self::snapshot).
    ///
    /// # Errors
    /// As [`anonymous`](Self::anonymous).
    pub fn simulated(segments: usize, identity: &Identity, id: u64) -> Result<Self> {
        let ring = Self::anonymous(segments)?;
        ring.0.describe(identity, id);
        Ok(ring)
    }

    /// A new ring in a file, in place of whatever was there. The space is taken at once, so that a full disk is an
    /// error here and not a signal that kills the process later.
    ///
    /// # Errors
    /// [`ErrorKind::SpillIo`] names the path, what is needed, and the remedy.
    pub fn create(path: &Path, segments: usize, identity: &Identity, id: u64) -> Result<Self> {
        let ring = Self::blank(path, segments)?;
        ring.0.describe(identity, id);
        Ok(ring)
    }

    /// A new ring at the place of this one, whose file is gone. Whoever finds it takes all seqs up to `last` for given.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn again(&self, identity: &Identity, id: u64, last: u64) -> Result<Self> {
        let Some((_, path)) = &self.0.file else { return Self::anonymous(self.0.segments) };
        let ring = Self::blank(path, self.0.segments)?;
        ring.note_last(last);
        if self.has_promised() {
            ring.promise();
        }
        ring.0.describe(identity, id);
        Ok(ring)
    }

    fn blank(path: &Path, segments: usize) -> Result<Self> {
        let len = PAGE + segments * SEGMENT_BYTES;
        let made = || {
            let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, len as u64)?;
            let memory = Memory::of(&file, len)?;
            io::Result::Ok(Self::over(memory, Some((file, path.to_owned())), segments))
        };
        made().map_err(|error| {
            // What was taken of a full disk is given back; should that fail too, the next start takes it over.
            std::fs::remove_file(path).unwrap_or_default();
            refused(path, len, error)
        })
    }

    fn over(memory: Memory, file: Option<(File, PathBuf)>, segments: usize) -> Self {
        let used = (0..segments.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self(Arc::new(Arena {
            memory,
            file,
            segments,
            used,
            named: AtomicBool::default(),
            ended: AtomicBool::default(),
        }))
    }

    /// Whether it outlives the process.
    #[must_use]
    pub fn is_durable(&self) -> bool {
        self.0.file.is_some()
    }

    /// Notes the last seq that was given to an event or a gap: none may be given again, even if its event is long gone.
    pub fn note_last(&self, seq: u64) {
        self.0.memory.word(AT_LAST).store(seq, Ordering::Release);
    }

    /// The last seq noted.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.0.memory.word(AT_LAST).load(Ordering::Acquire)
    }

    /// Notes that the peer has everything up to `seq`. To be called before its events are dropped.
    pub fn note_acked(&self, seq: u64) {
        self.0.memory.word(AT_ACKED).store(seq, Ordering::Release);
    }

    /// Somebody is promised that an event survives power loss: from now on events leave the ring only for what does too,
    /// also those that the next process finds in it.
    pub fn promise(&self) {
        self.0.memory.word(AT_PROMISED).store(1, Ordering::Release);
    }

    /// Whether [`promise`](Self::promise) was called, by this process or one before it.
    #[must_use]
    pub fn has_promised(&self) -> bool {
        self.0.memory.word(AT_PROMISED).load(Ordering::Acquire) != 0
    }

    /// Brings everything written so far to the disk.
    ///
    /// # Errors
    /// The disk failed: the pages that were under way may be lost although the next call succeeds, so nothing in them
    /// may be called durable any more.
    pub fn sync(&self) -> io::Result<()> {
        let Some((file, path)) = &self.0.file else { return Ok(()) };
        if !self.0.named.load(Ordering::Acquire) {
            // Once: the file's name has to be on the disk too, or nobody finds what is in it.
            file.sync_all()?;
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            File::open(parent.unwrap_or(Path::new(".")))?.sync_all()?;
            self.0.named.store(true, Ordering::Release);
        }
        if file.metadata()?.nlink() == 0 {
            if self.0.ended.load(Ordering::Acquire) {
                return Ok(()); // by us: whoever still waits has what was promised
            }
            return Err(io::Error::other(format!("{} was removed", path.display())));
        }
        file.sync_data()
    }

    /// Marks the header as changed, after a failed [`sync`](Self::sync) that may have lost it.
    pub fn touch_header(&self) {
        for at in (0..AT_IDENTITY + WORD + MAX_IDENTITY).step_by(WORD) {
            let word = self.0.memory.word(at);
            word.store(word.load(Ordering::Acquire), Ordering::Release);
        }
    }

    /// Removes the file: everything that was in it is elsewhere, on the disk too if that was promised. One that took its
    /// place stays.
    ///
    /// # Errors
    /// The file system's. The next start finds events that the spill knows already, and drops them.
    pub fn remove(&self) -> io::Result<()> {
        self.0.ended.store(true, Ordering::Release); // before anybody can find it gone
        match &self.0.file {
            Some((_, path)) if self.key().is_some_and(|ours| key_of(&std::fs::metadata(path)) == Some(ours)) => {
                std::fs::remove_file(path)
            }
            _ => Ok(()),
        }
    }

    /// Device and inode of the file; `None`: anonymous.
    pub(crate) fn key(&self) -> Option<(u64, u64)> {
        self.0.file.as_ref().and_then(|(file, _)| key_of(&file.metadata()))
    }

    /// All bytes, free segments too.
    #[cfg(test)]
    fn pages(&self) -> Vec<u8> {
        let words = (0..self.0.memory.len()).step_by(WORD);
        words.flat_map(|at| self.0.memory.word(at).load(Ordering::Acquire).to_ne_bytes()).collect()
    }

    /// A ring of an earlier process goes on: `last` was given, and the peer has everything up to `acked`.
    pub fn resume(&self, last: u64, acked: u64) {
        self.note_last(last);
        self.note_acked(acked);
        self.0.note_boot();
    }

    /// How many segments are in use.
    #[must_use]
    pub fn used(&self) -> usize {
        self.0.used.iter().map(|word| word.load(Ordering::Relaxed).count_ones() as usize).sum()
    }

    /// The bytes, as a killed process would leave them; what is not in use is zero.
    #[must_use]
    pub fn snapshot(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.0.memory.len()];
        let used = (0..self.0.segments).filter(|index| self.0.is_used(*index));
        let stretches = used.map(|index| start_of(index)..start_of(index + 1));
        for at in std::iter::once(0..PAGE).chain(stretches).flat_map(|stretch| stretch.step_by(WORD)) {
            bytes[at..at + WORD].copy_from_slice(&self.0.memory.word(at).load(Ordering::Acquire).to_ne_bytes());
        }
        bytes
    }
}

impl Arena {
    fn describe(&self, identity: &Identity, id: u64) {
        let put = |at: usize, value: u64| self.memory.word(at).store(value, Ordering::Relaxed);
        put(AT_GEOMETRY, (SEGMENT_BYTES as u64) << 32 | self.segments as u64);
        self.note_boot();
        put(AT_ID, id);
        let names = format!("{}\0{}", identity.emitter, identity.epoch);
        let text = [&checksum(names.as_bytes()).to_le_bytes(), names.as_bytes()].concat();
        debug_assert!(text.len() <= MAX_IDENTITY, "as on the wire");
        put(AT_IDENTITY, text.len() as u64);
        for (at, part) in (AT_IDENTITY + WORD..).step_by(WORD).zip(text.chunks(WORD)) {
            let mut word = [0; WORD];
            word[..part.len()].copy_from_slice(part);
            put(at, u64::from_ne_bytes(word));
        }
        self.memory.word(AT_MAGIC).store(MAGIC, Ordering::Release);
    }

    fn note_boot(&self) {
        let (low, high) = boot();
        self.memory.word(AT_BOOT).store(low, Ordering::Release);
        self.memory.word(AT_BOOT + WORD).store(high, Ordering::Release);
    }

    fn is_used(&self, index: usize) -> bool {
        self.used[index / 64].load(Ordering::Acquire) & (1 << (index % 64)) != 0
    }

    fn mark(&self, index: usize, span: usize) {
        for index in index..index + span {
            self.used[index / 64].fetch_or(1 << (index % 64), Ordering::Relaxed);
        }
    }

    /// The lowest free segments in a row.
    fn find(&self, span: usize) -> Option<usize> {
        let mut free = 0;
        let mut index = 0;
        while index < self.segments {
            if index.is_multiple_of(64) && self.used[index / 64].load(Ordering::Acquire) == u64::MAX {
                free = 0;
                index += 64;
                continue;
            }
            free = if self.is_used(index) { 0 } else { free + 1 };
            index += 1;
            if free == span {
                return Some(index - span);
            }
        }
        None
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        self.arena.memory.word(self.start()).store(0, Ordering::Release);
        for index in self.index..self.index + self.span {
            self.arena.used[index / 64].fetch_and(!(1 << (index % 64)), Ordering::Release);
        }
    }
}

impl Segment {
    fn start(&self) -> usize {
        start_of(self.index)
    }

    /// Where slot `n` lies.
    fn slot(&self, n: usize) -> usize {
        start_of(self.index + self.span) - (n + 1) * WORD
    }

    /// Makes a block of events that lie in `range`, behind the place of its header.
    #[expect(unsafe_code, reason = "see ring::memory")]
    fn seal(self: &Arc<Self>, range: Range<usize>, first: u64, count: u32) -> Block {
        // SAFETY: the one writer of this segment seals each range once, and nobody has it before it is returned.
        unsafe { self.arena.memory.write(range.start, &header(first, count)) };
        let bytes = Bytes::from_owner(Slice { segment: Arc::clone(self), range });
        Block::assembled(bytes, first, count)
    }
}

/// Of a block, as in [`crate::wire::block`].
fn header(first: u64, count: u32) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[0] = BLOCK_KIND;
    header[1..9].copy_from_slice(&first.to_le_bytes());
    header[9..].copy_from_slice(&count.to_le_bytes());
    header
}

fn key_of(metadata: &io::Result<std::fs::Metadata>) -> Option<(u64, u64)> {
    metadata.as_ref().ok().map(|file| (file.dev(), file.ino()))
}

fn start_of(index: usize) -> usize {
    PAGE + index * SEGMENT_BYTES
}

/// What an event of `len` bytes takes at most.
fn need(len: usize) -> usize {
    HEADER_BYTES + EVENT_OVERHEAD + len + WORD
}

/// Segments in a row that an event of `len` bytes needs.
fn span(len: usize) -> usize {
    (SEGMENT_HEADER + need(len)).div_ceil(SEGMENT_BYTES)
}

/// The check of a segment's header.
fn segment_check(first: u64, span: usize) -> u64 {
    let mut bytes = [0; 12];
    bytes[..8].copy_from_slice(&first.to_le_bytes());
    bytes[8..].copy_from_slice(&(span as u32).to_le_bytes());
    u64::from(crc_fast::crc32_iscsi(&bytes)) << 32 | span as u64
}

/// The checksum of an event, without its seq; made before the outbox is locked.
#[must_use]
pub fn checksum(json: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(json)
}

/// A slot. The seq is mixed in, so that a slot of an earlier use is not taken for one of this.
fn slot(checksum: u32, seq: u64, first_of_block: bool, len: usize) -> u64 {
    let mixed = checksum ^ (seq ^ seq >> 32) as u32;
    let flag = if first_of_block { FIRST_OF_BLOCK } else { 0 };
    u64::from(mixed) << 32 | flag | len as u64
}

/// This boot of the machine: what a process wrote to a mapped file is all there as long as it lasts. Zeros if unknown.
fn boot() -> (u64, u64) {
    let id = boot_id().unwrap_or_default();
    let digits: String = id.chars().filter(char::is_ascii_hexdigit).collect();
    u128::from_str_radix(&digits, 16).map_or((0, 0), |id| (id as u64, (id >> 64) as u64))
}

fn refused(path: &Path, len: usize, error: io::Error) -> Error {
    let remedy = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "free that much, lower outbox_bytes",
        io::ErrorKind::Unsupported => {
            "put spill_path on a file system that can reserve space (ext4, xfs, btrfs, tmpfs)"
        }
        _ => "see the cause",
    };
    let text = format!(
        "cannot reserve {len} bytes for the outbox in {}: {remedy}, or choose durability='memory'",
        path.display()
    );
    Error::new(ErrorKind::SpillIo, text).with_source(error)
}

/// Writes events into a ring, one after the other; only one at a time.
#[derive(Debug)]
pub struct Writer {
    ring: Ring,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    segment: Arc<Segment>,
    /// Where the next byte goes.
    end: usize,
    slots: usize,
    block: Option<Building>,
}

#[derive(Clone, Copy, Debug)]
struct Building {
    start: usize,
    first: u64,
    count: u32,
}

impl Open {
    fn fits(&self, len: usize) -> bool {
        self.end + need(len) <= self.segment.slot(self.slots) + WORD
    }
}

impl Writer {
    /// A writer into free segments of the ring.
    #[must_use]
    pub fn new(ring: Ring) -> Self {
        Self { ring, open: None }
    }

    /// The ring.
    #[must_use]
    pub fn ring(&self) -> &Ring {
        &self.ring
    }

    /// Whether an event of `len` bytes fits behind the last one, so that the block can go on.
    #[must_use]
    pub fn fits(&self, len: usize) -> bool {
        self.open.as_ref().is_some_and(|open| open.fits(len))
    }

    /// Makes room for an event of `len` bytes that will have this seq; the block must be sealed. `false`: there is none.
    pub fn make_room(&mut self, len: usize, seq: u64) -> bool {
        if self.fits(len) {
            return true;
        }
        let (arena, span) = (&self.ring.0, span(len));
        let Some(index) = arena.find(span) else { return false };
        self.open = None;
        arena.mark(index, span);
        let segment = Arc::new(Segment { arena: Arc::clone(arena), index, span });
        let put = |at: usize, value: u64| arena.memory.word(at).store(value, Ordering::Release);
        put(segment.slot(0), 0);
        put(segment.start() + WORD, segment_check(seq, span));
        put(segment.start(), seq);
        self.open = Some(Open { end: segment.start() + SEGMENT_HEADER, segment, slots: 0, block: None });
        true
    }

    /// Whether a block is under construction.
    #[must_use]
    pub fn is_building(&self) -> bool {
        self.open.as_ref().is_some_and(|open| open.block.is_some())
    }

    /// Writes an event, for which there must be room, and returns whether it began a block. Seqs follow each other.
    ///
    /// # Panics
    /// If there is no room.
    #[expect(unsafe_code, reason = "see ring::memory")]
    pub fn push(&mut self, json: &[u8], checksum: u32, seq: u64) -> bool {
        let open = self.open.as_mut().expect("room was made");
        assert!(open.fits(json.len()) && !json.is_empty(), "room was made for it");
        let memory = &self.ring.0.memory;
        let begins = open.block.is_none();
        let block = open.block.get_or_insert(Building { start: open.end, first: seq, count: 0 });
        debug_assert_eq!(block.first + u64::from(block.count), seq, "seqs follow each other");
        let at = if begins { open.end + HEADER_BYTES } else { open.end };
        // SAFETY: `&mut self` is the only writer, and no block that somebody reads reaches behind `end`.
        unsafe {
            if begins {
                memory.write(open.end, &header(seq, 0)); // between two blocks seqs may have been given up
            }
            memory.write(at, &(json.len() as u32).to_le_bytes());
            memory.write(at + EVENT_OVERHEAD, json);
        }
        block.count += 1;
        open.end = at + EVENT_OVERHEAD + json.len();
        let at = open.segment.slot(open.slots);
        if open.end + WORD <= at {
            memory.word(at - WORD).store(0, Ordering::Relaxed);
        }
        memory.word(at).store(slot(checksum, seq, begins, json.len()), Ordering::Release);
        open.slots += 1;
        begins
    }

    /// Ends the block under construction; the next event begins another, in the same segment if it fits.
    pub fn seal(&mut self) -> Option<Block> {
        let open = self.open.as_mut()?;
        let Building { start, first, count } = open.block.take()?;
        Some(open.segment.seal(start..open.end, first, count))
    }

    /// Writes all events of a block, as one block; `None` if there is no room. No block may be under construction.
    pub fn copy(&mut self, block: &Block) -> Option<Block> {
        // One event that needs as much as all of them.
        let together = block.bytes().len() + block.count() as usize * WORD - need(0);
        if !self.make_room(together, block.first()) {
            return None;
        }
        for (seq, json) in block.events() {
            self.push(&json, checksum(&json), seq);
        }
        self.seal()
    }

    /// Leaves the segment: what follows shares no page with what is written so far.
    pub fn turn_page(&mut self) {
        debug_assert!(!self.is_building(), "seal first");
        self.open = None;
    }
}

#[cfg(test)]
mod tests;
