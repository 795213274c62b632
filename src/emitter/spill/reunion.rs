//! After a restart: what the file and the ring tell together. Pure, and so the same for the simulated disk.

use crate::emitter::item::{Gap, GapReason, Item};
use crate::emitter::ring::Left;
use crate::wire::block::Block;

/// What the file tells.
#[derive(Clone, Copy, Debug)]
pub struct Stored {
    /// The peer has everything up to here, or it was given up for good.
    pub base: u64,
    /// Last seq stored; at least `base`.
    pub last: u64,
    /// Seqs up to here may have been used.
    pub reserved: u64,
    /// The next seq, if the last process ended cleanly.
    pub next_seq: Option<u64>,
}

/// What they tell together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reunion {
    /// As in [`Stored`], by the newer of both.
    pub base: u64,
    /// As in [`Stored`].
    pub last: u64,
    /// The next seq that may be given.
    pub next_seq: u64,
    /// What follows `last`, without holes up to `next_seq`. The first may begin before: a block stays whole, or its place
    /// in the ring would be given up while its rest is still needed.
    pub held: Vec<Item>,
}

/// Everything in the file is older than everything in the ring; what is in both counts once. `ours`: the ring carries
/// the same seqs as the file. One of another epoch has nothing to do with them, and its events follow under new seqs.
#[must_use]
pub fn reunite(stored: Stored, left: Option<&Left>, ours: bool) -> Reunion {
    let ring = left.filter(|_| ours);
    let base = stored.base.max(ring.map_or(0, |left| left.acked));
    let last = stored.last.max(base);
    let mut held = left.map_or_else(Vec::new, |left| follow(last, left, ours));
    let end = held.last().map_or(last, Item::last);
    let next_seq = match (stored.next_seq, ring) {
        (Some(clean), _) => clean.max(end + 1),
        // As long as the machine runs, the ring tells every seq that was given.
        (None, Some(left)) if left.same_boot => left.last.max(end) + 1,
        (None, _) => stored.reserved.max(end) + 1,
    };
    if next_seq > end + 1 {
        // The process died with seqs in memory: which of them were used is unknown, and that is said. A clean end
        // leaves such seqs only if the disk refused to store the last events.
        held.push(Item::Gap(Gap { from: end + 1, to: next_seq - 1, reason: GapReason::Crash }));
    }
    Reunion { base, last, next_seq, held }
}

fn follow(last: u64, left: &Left, ours: bool) -> Vec<Item> {
    let blocks = &left.blocks;
    let reason = if left.damaged > 0 { GapReason::Corrupt } else { GapReason::Crash };
    let shift = if ours { 0 } else { (last + 1).wrapping_sub(blocks.first().map_or(0, Block::first)) };
    let (mut held, mut end) = (Vec::new(), last);
    for block in blocks {
        let block = if shift == 0 { block.clone() } else { block.renumbered(block.first().wrapping_add(shift)) };
        if block.last() <= end {
            continue;
        }
        if block.first() > end + 1 {
            held.push(Item::Gap(Gap { from: end + 1, to: block.first() - 1, reason }));
        }
        end = block.last();
        held.push(Item::Events(block));
    }
    held
}
