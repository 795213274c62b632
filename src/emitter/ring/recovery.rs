//! Reading the ring of an earlier process.
//!
//! The file is read, not touched through the mapping, so that a sector that cannot be read is an error here and not a
//! signal; what is intact is then used where it lies. Every length and checksum is doubted.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use bytes::BytesMut;

use super::memory::Memory;
use super::{
    AT_ACKED, AT_BOOT, AT_GEOMETRY, AT_ID, AT_IDENTITY, AT_LAST, AT_MAGIC, FIRST_OF_BLOCK, LENGTH, MAGIC, MAX_IDENTITY,
    PAGE, Ring, SEGMENT_BYTES, SEGMENT_HEADER, Segment, WORD, boot, checksum, segment_check, slot, start_of,
};
use crate::emitter::item::Identity;
use crate::error::{Error, ErrorKind, Result};
use crate::wire::block::{Block, BlockBuilder, EVENT_OVERHEAD, HEADER_BYTES};

/// What an earlier process left in its ring.
#[derive(Debug)]
pub struct Left {
    /// Whose seqs these are; `None` if that cannot be read.
    pub identity: Option<Identity>,
    /// Tells this file from every other ring.
    pub id: u64,
    /// The highest seq that was given, as far as the file tells.
    pub last: u64,
    /// The peer has everything up to here.
    pub acked: u64,
    /// The machine has not been started anew since: everything that was written is there.
    pub same_boot: bool,
    /// Events in order, without overlap; holes are what was freed already, or damaged.
    pub blocks: Vec<Block>,
    /// How many places were damaged.
    pub damaged: u64,
    /// The ring, with the blocks in use.
    pub ring: Ring,
}

impl Left {
    /// Whether the ring can go on being used as it is, with so many segments.
    #[must_use]
    pub fn is_usable(&self, segments: usize) -> bool {
        self.damaged == 0 && self.ring.0.segments == segments && self.identity.is_some()
    }
}

/// Reads the ring at `path`; `None` if there is none, or one that was never finished.
///
/// # Errors
/// [`ErrorKind::SpillIo`]: the file cannot be opened or mapped.
pub fn recover(path: &Path) -> Result<Option<Left>> {
    let file = match File::options().read(true).write(true).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(path, error)),
    };
    let length = file.metadata().map_err(|error| failed(path, error))?.len() as usize;
    let fetch = |bytes: &mut [u8], at: usize| file.read_exact_at(bytes, at as u64);
    let Some(found) = read(length, &fetch).map_err(|error| failed(path, error))? else { return Ok(None) };
    let memory = Memory::of(&file, PAGE + found.segments * SEGMENT_BYTES).map_err(|error| failed(path, error))?;
    let ring = Ring::over(memory, Some((file, path.to_owned())), found.segments);
    Ok(Some(found.into_left(ring)))
}

/// As [`recover`], of the bytes that [`Ring::snapshot`] gave; for simulations.
///
/// # Errors
/// [`ErrorKind::SpillIo`]: no address space.
#[expect(unsafe_code, reason = "see ring::memory")]
pub fn revive(bytes: &[u8]) -> Result<Option<Left>> {
    let fetch = |into: &mut [u8], at: usize| {
        into.copy_from_slice(bytes.get(at..at + into.len()).ok_or(io::ErrorKind::UnexpectedEof)?);
        io::Result::Ok(())
    };
    let place = Path::new("(memory)");
    let Some(found) = read(bytes.len(), &fetch).map_err(|error| failed(place, error))? else { return Ok(None) };
    let ring = Ring::anonymous(found.segments)?;
    // SAFETY: nobody else has it yet.
    unsafe { ring.0.memory.write(0, &bytes[..ring.0.memory.len()]) };
    Ok(Some(found.into_left(ring)))
}

fn failed(path: &Path, error: io::Error) -> Error {
    let text =
        format!("cannot read the outbox {}: mend the cause, or move the file away to go on without it", path.display());
    Error::new(ErrorKind::SpillIo, text).with_source(error)
}

type Fetch<'a> = dyn Fn(&mut [u8], usize) -> io::Result<()> + 'a;

/// What was found, without the memory in which it lies.
struct Found {
    identity: Option<Identity>,
    id: u64,
    last: u64,
    acked: u64,
    same_boot: bool,
    segments: usize,
    runs: Vec<(Place, Run)>,
    damaged: u64,
}

/// Segments in use.
#[derive(Clone, Copy, PartialEq)]
struct Place {
    index: usize,
    span: usize,
}

fn read(length: usize, fetch: &Fetch<'_>) -> io::Result<Option<Found>> {
    let mut header = [0; PAGE];
    if length < PAGE + SEGMENT_BYTES {
        return Ok(None);
    }
    fetch(&mut header, 0)?;
    let word = |at: usize| u64_at(&header, at);
    if word(AT_MAGIC) != MAGIC {
        return Ok(None);
    }
    let mut damaged = 0;
    let mut segments = (length - PAGE) / SEGMENT_BYTES;
    let told = word(AT_GEOMETRY) as u32 as usize;
    if word(AT_GEOMETRY) >> 32 == SEGMENT_BYTES as u64 && (1..=segments).contains(&told) {
        segments = told;
    } else {
        damaged += 1; // cut off, or a flipped bit: whole segments are found all the same
    }
    let (mut runs, mut index, mut scratch) = (Vec::new(), 0, Vec::new());
    while index < segments {
        match read_segment(index, segments, fetch, &mut scratch) {
            Ok(None) => index += 1,
            Ok(Some((first, span))) => {
                damaged += scan(&scratch, first, |run| runs.push((Place { index, span }, run)));
                index += span;
            }
            Err(_) => {
                damaged += 1;
                index += 1;
            }
        }
    }
    let now = boot();
    Ok(Some(Found {
        identity: identity(&header),
        id: word(AT_ID),
        last: word(AT_LAST),
        acked: word(AT_ACKED),
        same_boot: now != (0, 0) && now == (word(AT_BOOT), word(AT_BOOT + WORD)),
        segments,
        runs,
        damaged,
    }))
}

impl Found {
    /// Brings the events back to life where they lie.
    fn into_left(self, ring: Ring) -> Left {
        let Self { identity, id, last, acked, same_boot, runs, mut damaged, .. } = self;
        let mut blocks = Vec::with_capacity(runs.len());
        let mut open: Option<(Place, Arc<Segment>)> = None;
        for (place, run) in runs {
            let segment = match &open {
                Some((known, segment)) if *known == place => Arc::clone(segment),
                _ => {
                    ring.0.mark(place.index, place.span);
                    let Place { index, span } = place;
                    let segment = Arc::new(Segment { arena: Arc::clone(&ring.0), index, span });
                    open = Some((place, Arc::clone(&segment)));
                    segment
                }
            };
            blocks.extend(segment.revive(&run));
        }
        drop(open);
        blocks.sort_unstable_by_key(Block::first);
        let (mut end, mut ordered) = (0, Vec::with_capacity(blocks.len()));
        for block in blocks {
            damaged += u64::from(block.first() <= end);
            if let Some(block) = block.after(end) {
                end = block.last();
                ordered.push(block);
            }
        }
        Left { identity, id, last: last.max(end), acked, same_boot, blocks: ordered, damaged, ring }
    }
}

impl Segment {
    /// The block of a run: in its place, or a copy if the place of its header is taken.
    #[expect(unsafe_code, reason = "see ring::memory")]
    fn revive(self: &Arc<Self>, run: &Run) -> Option<Block> {
        let base = self.start();
        if let Some(start) = run.header {
            return Some(self.seal(base + start..base + run.end, run.first, run.count));
        }
        // SAFETY: nobody writes to events that were written.
        let mut bytes = unsafe { self.arena.memory.read(base + run.begin, run.end - run.begin) };
        let mut builder = BlockBuilder::new(run.first, BytesMut::with_capacity(bytes.len() + HEADER_BYTES));
        while let Some((length, rest)) = bytes.split_first_chunk::<EVENT_OVERHEAD>() {
            let (json, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
            builder.push(json);
            bytes = rest;
        }
        builder.seal()
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + WORD).and_then(|word| word.try_into().ok()).map_or(0, u64::from_ne_bytes)
}

fn identity(header: &[u8]) -> Option<Identity> {
    let length = u64_at(header, AT_IDENTITY) as usize;
    let text = header.get(AT_IDENTITY + WORD..)?.get(..length.min(MAX_IDENTITY))?;
    let (check, text) = text.split_at_checked(4)?;
    if check != checksum(text).to_le_bytes() {
        return None;
    }
    let (emitter, epoch) = std::str::from_utf8(text).ok()?.split_once('\0')?;
    Some(Identity { emitter: emitter.to_owned(), epoch: epoch.to_owned() })
}

/// Reads a segment in use into `scratch`; its first seq and its span. An error: its header makes no sense, or it cannot
/// be read.
fn read_segment(
    index: usize,
    segments: usize,
    fetch: &Fetch<'_>,
    scratch: &mut Vec<u8>,
) -> io::Result<Option<(u64, usize)>> {
    let mut header = [0; SEGMENT_HEADER];
    fetch(&mut header, start_of(index))?;
    let (first, check) = (u64_at(&header, 0), u64_at(&header, WORD));
    if first == 0 {
        return Ok(None);
    }
    let span = check as u32 as usize;
    if span == 0 || index + span > segments || check != segment_check(first, span) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    scratch.resize(span * SEGMENT_BYTES, 0);
    fetch(scratch, start_of(index))?;
    Ok(Some((first, span)))
}

/// Consecutive intact events within a block.
struct Run {
    /// Where the block's header goes, if the run begins with the block.
    header: Option<usize>,
    begin: usize,
    end: usize,
    first: u64,
    count: u32,
}

/// Gives the intact events of a segment; returns how many places are damaged.
fn scan(bytes: &[u8], first: u64, mut give: impl FnMut(Run)) -> u64 {
    let (mut at, mut seq, mut damaged) = (SEGMENT_HEADER, first, 0);
    let mut run: Option<Run> = None;
    for n in 1..=bytes.len() / WORD {
        let slot_at = bytes.len() - n * WORD;
        let word = u64_at(bytes, slot_at);
        if word == 0 || slot_at < at + EVENT_OVERHEAD {
            break;
        }
        let (begins, length) = (word & FIRST_OF_BLOCK != 0, (word & LENGTH) as usize);
        let begin = if begins { at + HEADER_BYTES } else { at };
        let end = begin + EVENT_OVERHEAD + length;
        if length == 0 || end > slot_at {
            damaged += 1; // where the next event lies is unknown
            break;
        }
        let (prefix, json) = bytes[begin..end].split_at(EVENT_OVERHEAD);
        let check = checksum(json);
        let told = u64_at(bytes, at + 1);
        if begins && told > seq && word == slot(check, told, begins, length) {
            seq = told; // those between were given up
        }
        let intact = prefix == (length as u32).to_le_bytes() && word == slot(check, seq, begins, length);
        match &mut run {
            Some(run) if intact && !begins => {
                run.end = end;
                run.count += 1;
            }
            _ => {
                run.take().into_iter().for_each(&mut give);
                damaged += u64::from(!intact);
                run = intact.then_some(Run { header: begins.then_some(at), begin, end, first: seq, count: 1 });
            }
        }
        at = end;
        seq += 1;
    }
    run.into_iter().for_each(give);
    damaged
}
