//! Block: a run of consecutive events of one emitter, in one contiguous buffer.
//!
//! The same bytes lie in the outbox, in a row of the spill, and in a binary frame on the wire, so an event is
//! encoded once in its life. On-disk and on-wire format; changing it breaks stored spills and peers:
//!
//! ```text
//! kind u8 = 1 │ first seq u64 LE │ count u32 LE │ count × ( length u32 LE │ UTF-8 JSON )
//! ```

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// First byte of every block; leaves room for other binary frames.
pub const BLOCK_KIND: u8 = 1;
/// Bytes before the first event.
pub const HEADER_BYTES: usize = 1 + 8 + 4;
/// Bytes that each event costs beside its JSON.
pub const EVENT_OVERHEAD: usize = 4;

/// Why bytes are not a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockError {
    /// Shorter than its header, or an event reaches past the end.
    Truncated,
    /// The first byte is not [`BLOCK_KIND`].
    Kind(u8),
    /// No events, or seq 0, or a seq past `u64::MAX`.
    Range,
    /// Bytes follow the last event.
    Trailing,
}

impl std::fmt::Display for BlockError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Truncated => f.write_str("block is truncated"),
            Self::Kind(kind) => write!(f, "binary frame of unknown kind {kind}"),
            Self::Range => f.write_str("block has no events or an impossible seq"),
            Self::Trailing => f.write_str("bytes follow the last event of a block"),
        }
    }
}

impl std::error::Error for BlockError {}

/// A sealed, valid, non-empty run of events. Cloning shares the buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    bytes: Bytes,
    first: u64,
    count: u32,
}

impl Block {
    /// Reads a block from a peer or a disk: every length is checked, the JSON is not.
    ///
    /// # Errors
    /// [`BlockError`] says what is wrong; nothing of such a block may be used.
    pub fn parse(bytes: Bytes) -> Result<Self, BlockError> {
        let mut rest = &bytes[..];
        if rest.len() < HEADER_BYTES {
            return Err(BlockError::Truncated);
        }
        let kind = rest.get_u8();
        if kind != BLOCK_KIND {
            return Err(BlockError::Kind(kind));
        }
        let (first, count) = (rest.get_u64_le(), rest.get_u32_le());
        if first == 0 || count == 0 || first.checked_add(u64::from(count) - 1).is_none() {
            return Err(BlockError::Range);
        }
        for _ in 0..count {
            if rest.len() < EVENT_OVERHEAD {
                return Err(BlockError::Truncated);
            }
            let length = rest.get_u32_le() as usize;
            if rest.len() < length {
                return Err(BlockError::Truncated);
            }
            rest.advance(length);
        }
        if !rest.is_empty() {
            return Err(BlockError::Trailing);
        }
        Ok(Self { bytes, first, count })
    }

    /// A block from bytes that were written as one, with its first seq and count: nothing is checked again.
    #[must_use]
    pub(crate) fn assembled(bytes: Bytes, first: u64, count: u32) -> Self {
        let block = Self { bytes, first, count };
        debug_assert_eq!(Self::parse(block.bytes.clone()).as_ref(), Ok(&block), "well-formed");
        block
    }

    /// Seq of the first event.
    #[must_use]
    pub fn first(&self) -> u64 {
        self.first
    }

    /// Seq of the last event.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.first + (u64::from(self.count) - 1) // in this order: the last seq may be u64::MAX
    }

    /// How many events; at least 1.
    #[must_use]
    pub fn count(&self) -> u64 {
        u64::from(self.count)
    }

    /// The encoded block, ready for a frame or a row.
    #[must_use]
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// Gives the buffer back, for reuse.
    #[must_use]
    pub fn into_bytes(self) -> Bytes {
        self.bytes
    }

    /// The events with their seqs, in order; each a slice that shares the block's buffer.
    pub fn events(&self) -> impl Iterator<Item = (u64, Bytes)> + '_ {
        let mut at = HEADER_BYTES;
        (self.first..=self.last()).map_while(move |seq| {
            let (event, next) = self.event_at(at)?;
            at = next;
            Some((seq, event))
        })
    }

    /// The event whose length field stands at `at` (start with [`HEADER_BYTES`]), and where the next one begins; for a
    /// sender that stops and goes on between two events.
    #[must_use]
    pub fn event_at(&self, at: usize) -> Option<(Bytes, usize)> {
        let start = at + EVENT_OVERHEAD;
        let length = self.bytes.get(at..start).map(|mut bytes| bytes.get_u32_le() as usize)?;
        Some((self.bytes.slice(start..start + length), start + length))
    }

    /// What of the block comes after `seq`: all of it shared, a part of it copied, or nothing.
    #[must_use]
    pub fn after(&self, seq: u64) -> Option<Self> {
        if seq < self.first {
            return Some(self.clone());
        }
        if seq >= self.last() {
            return None;
        }
        let mut builder = BlockBuilder::new(seq + 1, BytesMut::with_capacity(self.bytes.len()));
        for (_, event) in self.events().skip_while(|(at, _)| *at <= seq) {
            builder.push(&event);
        }
        builder.seal()
    }

    /// At most the first `n` events: all of it shared, a part of it copied, or nothing.
    #[must_use]
    pub fn head(&self, n: u64) -> Option<Self> {
        if n >= self.count() {
            return Some(self.clone());
        }
        let mut builder = BlockBuilder::new(self.first, BytesMut::with_capacity(self.bytes.len()));
        for (_, event) in self.events().take(n as usize) {
            builder.push(&event);
        }
        builder.seal()
    }

    /// The same events with the seqs from `first` on.
    #[must_use]
    pub fn renumbered(&self, first: u64) -> Self {
        let mut bytes = BytesMut::from(&self.bytes[..]);
        bytes[1..9].copy_from_slice(&first.to_le_bytes());
        Self { bytes: bytes.freeze(), first, count: self.count }
    }
}

/// A block under construction.
#[derive(Debug)]
pub struct BlockBuilder {
    bytes: BytesMut,
    first: u64,
    count: u32,
}

impl BlockBuilder {
    /// Starts a block whose first event has the seq `first`, in a buffer (its content is discarded).
    #[must_use]
    pub fn new(first: u64, mut buffer: BytesMut) -> Self {
        buffer.clear();
        buffer.put_u8(BLOCK_KIND);
        buffer.put_u64_le(first);
        buffer.put_u32_le(0);
        Self { bytes: buffer, first, count: 0 }
    }

    /// Appends an event; it gets the next seq.
    pub fn push(&mut self, json: &[u8]) {
        self.bytes.put_u32_le(json.len() as u32);
        self.bytes.extend_from_slice(json);
        self.count += 1;
    }

    /// Whether an event of `json` bytes fits without growing the buffer.
    #[must_use]
    pub fn fits(&self, json: usize) -> bool {
        self.bytes.len() + EVENT_OVERHEAD + json <= self.bytes.capacity()
    }

    /// Events so far.
    #[must_use]
    pub fn count(&self) -> u64 {
        u64::from(self.count)
    }

    /// Encoded size so far, header included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether there is no event yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Ends the block; `None` if it has no events.
    #[must_use]
    pub fn seal(mut self) -> Option<Block> {
        if self.count == 0 {
            return None;
        }
        self.bytes[9..HEADER_BYTES].copy_from_slice(&self.count.to_le_bytes());
        Some(Block { bytes: self.bytes.freeze(), first: self.first, count: self.count })
    }

    /// Ends the block in a buffer of its own size, and gives the large buffer back for the next one. For a block
    /// that waits for its ack while most of its buffer is unused.
    #[must_use]
    pub fn seal_small(mut self) -> (Option<Block>, BytesMut) {
        if self.count == 0 {
            return (None, self.bytes);
        }
        self.bytes[9..HEADER_BYTES].copy_from_slice(&self.count.to_le_bytes());
        let block = Block { bytes: Bytes::copy_from_slice(&self.bytes), first: self.first, count: self.count };
        (Some(block), self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn block(first: u64, events: &[&str]) -> Block {
        let mut builder = BlockBuilder::new(first, BytesMut::new());
        for event in events {
            builder.push(event.as_bytes());
        }
        builder.seal().expect("not empty")
    }

    #[test]
    fn bytes_are_those_of_the_documented_format() {
        let block = block(258, &["{}", "[1]"]);
        assert_eq!(&block.bytes()[..], b"\x01\x02\x01\0\0\0\0\0\0\x02\0\0\0\x02\0\0\0{}\x03\0\0\0[1]");
        assert_eq!((block.first(), block.last(), block.count()), (258, 259, 2));
    }

    #[test]
    fn after_keeps_exactly_the_later_events() {
        let whole = block(5, &["a", "bb", "ccc"]);
        assert_eq!(whole.after(4), Some(whole.clone()));
        assert_eq!(whole.after(5), Some(block(6, &["bb", "ccc"])));
        assert_eq!(whole.after(7), None);
        assert_eq!(whole.head(2), Some(block(5, &["a", "bb"])));
        assert_eq!(whole.head(0), None);
        assert_eq!(whole.renumbered(9), block(9, &["a", "bb", "ccc"]));
    }

    proptest! {
        #[test]
        fn what_is_built_is_read_back(first in 1..u64::MAX / 2, events in prop::collection::vec("[ -~]{0,40}", 1..20)) {
            let texts: Vec<&str> = events.iter().map(String::as_str).collect();
            let built = block(first, &texts);
            let read = Block::parse(built.bytes().clone()).expect("valid");
            prop_assert_eq!(&read, &built);
            let out: Vec<_> = read.events().map(|(seq, event)| (seq, String::from_utf8(event.to_vec()).expect("utf-8"))).collect();
            let want: Vec<_> = (first..).zip(events).collect();
            prop_assert_eq!(out, want);
        }

        #[test]
        fn no_bytes_panic_the_parser(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut framed = vec![BLOCK_KIND];
            framed.extend(&bytes);
            for candidate in [bytes, framed] {
                if let Ok(block) = Block::parse(candidate.into()) {
                    prop_assert_eq!(block.events().count() as u64, block.count());
                }
            }
        }

        #[test]
        fn a_truncated_block_is_refused(cut in 0usize..30) {
            let whole = block(1, &["abcdef", "ghijkl"]);
            let cut = cut.min(whole.bytes().len() - 1);
            prop_assert!(Block::parse(whole.bytes().slice(..cut)).is_err());
        }
    }
}
