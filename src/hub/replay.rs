//! What a session missed, read from the log as its socket takes it. A session holds a cursor and no entries, so ten
//! thousand that come back at once cost as much memory as one.
//!
//! Sessions that read the same stretch through the same filter share its frames: they are kept in chunks of
//! [`CHUNK`] offsets, as many as fit into the bound. Only the first frame of a chunk depends on who reads it, by its
//! `prev`, and is made again for a reader that comes from elsewhere.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

use foldhash::fast::RandomState;

use super::compression::Compression;
use super::entry::{Encoding, Filter};
use super::log::Log;
use super::matching::Matcher;
use super::outbox::Item;

/// How many offsets share a chunk: enough that looking it up costs nothing, few enough that one of large events does
/// not fill the bound.
const CHUNK: u64 = 64;
/// Bound of all chunks: what 10 000 ordinary events need.
pub const CACHE_BYTES: usize = 8 << 20;
/// What a chunk costs beside its frames and its filter, and a frame beside its bytes.
const CHUNK_BYTES: usize = 192;
const FRAMED_BYTES: usize = 112;
/// A larger frame is made for each reader, so that one chunk never exceeds the bound.
const LARGEST: usize = CACHE_BYTES / CHUNK as usize;

/// The log gave up what a cursor had not read yet: its session is closed, comes back and is told `truncated`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lost;

/// A replay on its way to a session.
#[derive(Debug)]
pub struct Cursor {
    filter: Arc<Filter>,
    /// The first offset that was not looked at, and the last one to look at.
    next: u64,
    end: u64,
    /// The last offset that the session has, for the chain.
    prev: u64,
    /// At most so many entries are still to come.
    left: u64,
    encoding: Encoding,
}

impl Cursor {
    /// How many entries are still to come, at most.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.left
    }

    /// Whether nothing is to come.
    #[must_use]
    pub fn is_done(&self) -> bool {
        self.left == 0 || self.next > self.end
    }

    /// What it looks for.
    #[must_use]
    pub fn filter(&self) -> &Filter {
        &self.filter
    }

    /// Goes on with fewer patterns.
    pub(super) fn narrow(&mut self, grant: &Filter, replays: &mut Replays) {
        self.filter = replays.shared(self.filter.within(grant));
    }

    /// Moves frames of about `budget` bytes to `into`, large ones compressed if there is a `compression`; returns how
    /// many bytes.
    ///
    /// # Errors
    /// [`Lost`]; what was moved before is good.
    pub fn read(
        &mut self,
        budget: usize,
        into: &mut VecDeque<Item>,
        log: &Log,
        replays: &mut Replays,
        mut compression: Option<&mut Compression>,
    ) -> Result<usize, Lost> {
        let mut taken = 0;
        while taken < budget && !self.is_done() {
            let key = key(&self.filter, self.encoding, self.next);
            let Replays { chunks, encoded, bytes, .. } = replays.covering(&self.filter, key, self.next, log)?;
            let chunk = chunks.get_mut(&key).ok_or(Lost)?;
            let begin = chunk.frames.partition_point(|framed| framed.offset < self.next);
            let end = chunk.frames.partition_point(|framed| framed.offset <= self.end);
            let mut rest = chunk.frames[begin..end].iter_mut();
            loop {
                if taken >= budget {
                    return Ok(taken);
                }
                let Some(framed) = rest.next() else { break };
                let compression = compression.as_deref_mut().filter(|_| framed.is_large);
                let form = &mut framed.forms[usize::from(compression.is_some())];
                // A push does not say what came before it.
                let prev = if self.encoding == Encoding::Push { 0 } else { self.prev };
                let item = match form {
                    _ if self.encoding == Encoding::Raw => log.get(framed.offset).ok_or(Lost)?.bare(),
                    Some((of, item)) if *of == prev => Some(item.clone()),
                    _ => {
                        let entry = log.get(framed.offset).ok_or(Lost)?;
                        *encoded += 1;
                        let item = if self.encoding == Encoding::Push {
                            entry.pushes(&self.filter)
                        } else {
                            let zlib = compression.and_then(|compression| compression.of(entry));
                            entry.item(prev, true, zlib.as_ref())
                        };
                        keep(form, prev, &item, bytes);
                        Some(item)
                    }
                };
                taken += item.as_ref().map_or(0, Item::cost);
                into.extend(item);
                (self.prev, self.next) = (framed.offset, framed.offset + 1);
                self.left = self.left.saturating_sub(1);
            }
            self.next = chunk.to;
        }
        Ok(taken)
    }
}

/// The frames that readers share.
#[derive(Debug)]
pub struct Replays {
    /// One of each filter, so that readers with equal ones share by its address.
    filters: HashSet<Arc<Filter>>,
    /// When to look for filters that nobody reads through any more.
    prune_at: usize,
    chunks: HashMap<Key, Chunk, RandomState>,
    /// Of the filter that was read through last: one that is new reads all of the log, chunk by chunk.
    matcher: Matcher,
    /// In the order in which they were made.
    order: VecDeque<Key>,
    bytes: usize,
    /// Frames made so far.
    encoded: u64,
    /// From how many bytes on an event is large.
    large: usize,
}

/// Address of a filter, encoding and number of a chunk. A chunk holds its filter, so the address stays its own.
type Key = (usize, Encoding, u64);

fn key(filter: &Arc<Filter>, encoding: Encoding, offset: u64) -> Key {
    (Arc::as_ptr(filter).addr(), encoding, offset / CHUNK)
}

#[derive(Debug)]
struct Chunk {
    /// Keeps the address of the key from being used again.
    filter: Arc<Filter>,
    /// What of its offsets it covers.
    from: u64,
    to: u64,
    /// Those that match.
    frames: Vec<Framed>,
}

#[derive(Debug)]
struct Framed {
    offset: u64,
    /// Large enough to be compressed.
    is_large: bool,
    /// Its frames with their `prev`: for everyone, and for those who take a large one compressed.
    forms: [Form; 2],
}

type Form = Option<(u64, Item)>;

impl Chunk {
    /// The filter counts in each of its chunks: the last of them may be all that keeps it.
    fn bytes(&self) -> usize {
        CHUNK_BYTES + self.filter.bytes() + self.frames.iter().map(Framed::bytes).sum::<usize>()
    }
}

impl Framed {
    fn bytes(&self) -> usize {
        FRAMED_BYTES + self.forms.iter().map(size).sum::<usize>()
    }
}

fn size(form: &Form) -> usize {
    form.as_ref().map_or(0, |(_, item)| item.cost())
}

fn keep(form: &mut Form, prev: u64, item: &Item, bytes: &mut usize) {
    if item.cost() <= LARGEST {
        *bytes -= size(form);
        *form = Some((prev, item.clone()));
        *bytes += size(form);
    }
}

impl Default for Replays {
    fn default() -> Self {
        Self::new(usize::MAX)
    }
}

impl Replays {
    /// Nobody replays anything yet. Events of at least `large` bytes are sent compressed to who wants that.
    #[must_use]
    pub fn new(large: usize) -> Self {
        Self {
            filters: HashSet::new(),
            prune_at: 64,
            chunks: HashMap::default(),
            matcher: Matcher::new(Arc::default()),
            order: VecDeque::new(),
            bytes: 0,
            encoded: 0,
            large,
        }
    }

    /// A cursor over what matches after `since`, up to the log's head. The log has all of that.
    pub fn cursor(&mut self, filter: Filter, since: u64, log: &Log, encoding: Encoding) -> Cursor {
        let filter = self.shared(filter);
        let (next, end) = (since + 1, log.head());
        let left = self.count(&filter, encoding, next, end, log);
        Cursor { filter, next, end, prev: since, left, encoding }
    }

    /// Frames made so far.
    #[must_use]
    pub fn encoded(&self) -> u64 {
        self.encoded
    }

    /// Bytes kept for readers to share.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Forgets the frames: the log has others at these offsets now.
    pub fn clear(&mut self) {
        self.chunks.clear();
        self.order.clear();
        self.bytes = 0;
    }

    fn count(&mut self, filter: &Arc<Filter>, encoding: Encoding, mut next: u64, end: u64, log: &Log) -> u64 {
        let mut count = 0;
        while next <= end && !filter.patterns().is_empty() {
            let key = key(filter, encoding, next);
            let Ok(Self { chunks, .. }) = self.covering(filter, key, next, log) else { break };
            let Some(chunk) = chunks.get(&key) else { break };
            count += chunk.frames.iter().filter(|framed| (next..=end).contains(&framed.offset)).count() as u64;
            next = chunk.to;
        }
        count
    }

    fn shared(&mut self, filter: Filter) -> Arc<Filter> {
        if let Some(known) = self.filters.get(&filter) {
            return known.clone();
        }
        if self.filters.len() >= self.prune_at {
            self.filters.retain(|filter| Arc::strong_count(filter) > 1);
            self.prune_at = 64 + 2 * self.filters.len();
        }
        let filter = Arc::new(filter);
        self.filters.insert(filter.clone());
        filter
    }

    /// Sees to it that there is a chunk with `offset`, which lies at or before the log's head.
    fn covering(&mut self, filter: &Arc<Filter>, key: Key, offset: u64, log: &Log) -> Result<&mut Self, Lost> {
        while self.bytes > CACHE_BYTES {
            let Some(oldest) = self.order.pop_front() else { break };
            self.forget(oldest);
        }
        match self.chunks.get(&key) {
            Some(chunk) if (chunk.from..chunk.to).contains(&offset) => return Ok(self),
            _ if offset < log.first() => return Err(Lost),
            Some(chunk) if (chunk.from..=chunk.to).contains(&offset) => {}
            Some(_) => {
                self.order.retain(|other| *other != key);
                self.forget(key);
            }
            None => {}
        }
        if !Arc::ptr_eq(self.matcher.filter(), filter) {
            self.matcher = Matcher::new(filter.clone());
        }
        let chunk = self.chunks.entry(key).or_insert_with(|| {
            self.order.push_back(key);
            self.bytes += CHUNK_BYTES + filter.bytes();
            let from = log.first().max(key.2 * CHUNK);
            Chunk { filter: filter.clone(), from, to: from, frames: Vec::new() }
        });
        let to = ((key.2 + 1) * CHUNK).min(log.head() + 1);
        let before = chunk.frames.len();
        for entry in log.range(chunk.to, to) {
            if self.matcher.matches(&entry.record) {
                let is_large = entry.record.json().len() >= self.large;
                chunk.frames.push(Framed { offset: entry.offset, is_large, forms: [None, None] });
            }
        }
        chunk.to = to;
        self.bytes += FRAMED_BYTES * (chunk.frames.len() - before);
        Ok(self)
    }

    fn forget(&mut self, key: Key) {
        if let Some(chunk) = self.chunks.remove(&key) {
            self.bytes -= chunk.bytes();
        }
    }
}

#[cfg(test)]
mod tests;
