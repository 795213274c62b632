//! What an emitter's stream consists of: events, and gaps where events had to be given up. Outbox, spill and link all
//! carry items, in seq order, and every seq of an epoch is covered by exactly one.

use crate::wire::block::Block;

/// Whose stream it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Name towards the hub.
    pub emitter: String,
    /// Epoch of all seqs.
    pub epoch: String,
}

/// Why events were given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GapReason {
    /// The spill was at its bound.
    SpillFull,
    /// The events were older than `spill_max_age`.
    Expired,
    /// Memory was at its bound because the disk was slower than the callers.
    OutboxFull,
    /// The process ended without `stop()`; these seqs may or may not have been used.
    Crash,
    /// The peer refused the event, again and again; it is parked.
    Refused,
    /// The disk did not give back what was stored.
    Corrupt,
}

impl GapReason {
    /// The word on the wire and on disk.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::SpillFull => "spill_full",
            Self::Expired => "expired",
            Self::OutboxFull => "outbox_full",
            Self::Crash => "crash",
            Self::Refused => "refused",
            Self::Corrupt => "corrupt",
        }
    }

    /// Reads the word back; `None` for one of a newer version.
    #[must_use]
    pub fn parse(word: &str) -> Option<Self> {
        let all = [Self::SpillFull, Self::Expired, Self::OutboxFull, Self::Crash, Self::Refused, Self::Corrupt];
        all.into_iter().find(|reason| reason.as_str() == word)
    }
}

/// Seqs that will never be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gap {
    /// First missing seq.
    pub from: u64,
    /// Last missing seq.
    pub to: u64,
    /// Why.
    pub reason: GapReason,
}

impl Gap {
    /// How many seqs.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.to - self.from + 1
    }
}

/// A piece of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// Consecutive events.
    Events(Block),
    /// Consecutive missing events.
    Gap(Gap),
}

impl Item {
    /// First seq covered.
    #[must_use]
    pub fn first(&self) -> u64 {
        match self {
            Self::Events(block) => block.first(),
            Self::Gap(gap) => gap.from,
        }
    }

    /// Last seq covered.
    #[must_use]
    pub fn last(&self) -> u64 {
        match self {
            Self::Events(block) => block.last(),
            Self::Gap(gap) => gap.to,
        }
    }

    /// Encoded size, as it counts against every bound in bytes.
    #[must_use]
    pub fn bytes(&self) -> usize {
        match self {
            Self::Events(block) => block.bytes().len(),
            Self::Gap(_) => 0,
        }
    }

    /// How many events; none in a gap.
    #[must_use]
    pub fn events(&self) -> u64 {
        match self {
            Self::Events(block) => block.count(),
            Self::Gap(_) => 0,
        }
    }

    /// The gap, if it is one.
    #[must_use]
    pub fn gap(&self) -> Option<Gap> {
        match self {
            Self::Events(_) => None,
            Self::Gap(gap) => Some(*gap),
        }
    }

    /// At most the first `n` seqs; a gap stays whole.
    #[must_use]
    pub fn head(self, n: u64) -> Self {
        match &self {
            Self::Events(block) => block.head(n).map_or(self, Self::Events),
            Self::Gap(_) => self,
        }
    }

    /// What it is if some of its events have become gaps, which are in order.
    #[must_use]
    pub fn without<'a>(self, gaps: impl IntoIterator<Item = &'a Gap>) -> Vec<Self> {
        let (mut pieces, mut rest) = (Vec::new(), Some(self));
        for gap in gaps {
            let within = |item: &Self| item.events() > 0 && item.first() <= gap.to && gap.from <= item.last();
            let Some(item) = rest.take_if(|item| within(item)) else { continue };
            let (first, from, to) = (item.first(), gap.from.max(item.first()), gap.to.min(item.last()));
            rest = item.after(to);
            if from > first {
                pieces.push(item.head(from - first));
            }
            pieces.push(Self::Gap(Gap { from, to, ..*gap }));
        }
        pieces.extend(rest);
        pieces
    }

    /// What comes after `seq`, if anything.
    #[must_use]
    pub fn after(&self, seq: u64) -> Option<Self> {
        match self {
            Self::Events(block) => block.after(seq).map(Self::Events),
            Self::Gap(gap) if seq >= gap.to => None,
            Self::Gap(gap) => Some(Self::Gap(Gap { from: gap.from.max(seq + 1), ..*gap })),
        }
    }
}
