//! What the bridge's machine wants done.

use bytes::Bytes;

use super::block;
use crate::hub::entry::Record;

/// What is to be done, in this order.
#[derive(Debug)]
pub enum Action {
    /// Make a link and join: [`connected`](super::machine::Machine::connected) or [`lost`](super::machine::Machine::lost).
    Connect,
    /// Join once more over the link there is: [`joined`](super::machine::Machine::joined).
    Join,
    /// Drop the link.
    Disconnect,
    /// Send a probe of this number.
    Probe(u64),
    /// Read the stream: [`filled`](super::machine::Machine::filled).
    Fill {
        /// From the block that has this offset.
        from: u64,
        /// At most so many blocks.
        most: usize,
    },
    /// The log begins anew behind this place, and who had a position is told.
    Begin {
        /// The epoch.
        epoch: String,
        /// The offset before the first one that will come.
        head: u64,
    },
    /// These records are next in the log.
    Append {
        /// How many records the body has.
        count: u64,
        /// How many of them are in the log already.
        skip: u64,
        /// The records.
        body: Body,
    },
    /// The bus fails, or with `None` works again.
    Tell(Option<String>),
}

/// Records, as they came.
#[derive(Clone, Debug)]
pub enum Body {
    /// As bytes, see [`block`].
    Encoded(Bytes),
    /// As this hub brought them itself.
    Own(Vec<Record>),
}

impl Body {
    /// The records, without those that are in the log already.
    #[must_use]
    pub fn into_records(self, count: u64, skip: u64) -> Vec<Record> {
        match self {
            Self::Encoded(bytes) => block::decode(bytes, count, skip),
            Self::Own(mut records) => records.split_off((skip as usize).min(records.len())),
        }
    }

    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Encoded(bytes) => bytes.len(),
            Self::Own(_) => 0, // held in bounds by those who brought them
        }
    }
}
