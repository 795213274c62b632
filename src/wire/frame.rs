//! Control frames between emitter and hub (`sb.emit.v1`): JSON text `{"type": …, …}`. Events travel beside
//! them as binary [blocks](super::block).
//!
//! A receiver ignores frames whose `type` it does not know, so that either side may be newer.

use serde::{Deserialize, Serialize};

/// What an emitter says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum EmitterFrame {
    /// First frame of a connection.
    Hello {
        /// Stable name of the emitter.
        emitter: String,
        /// Changes whenever seqs could repeat. Never empty.
        epoch: String,
        /// The first seq that will come: everything before it was acknowledged earlier.
        next: u64,
    },
    /// The events `from..=to` will never come; the hub tells its subscribers and acknowledges them.
    Gap {
        /// First missing seq.
        from: u64,
        /// Last missing seq.
        to: u64,
        /// Why: `spill_full`, `expired`, `outbox_full`, `crash`, `refused`.
        reason: String,
    },
    /// Somebody waits for what came so far: its ack is wanted as soon as it is durable, without waiting for company.
    AckNow,
    /// Forward compatibility; never sent.
    #[serde(other, skip_serializing)]
    Unknown,
}

/// What a hub says to an emitter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum HubFrame {
    /// Answer to `hello`.
    Welcome {
        /// Highest seq of this emitter and epoch that the hub has; 0 for none.
        have: u64,
        /// How many events may be unacknowledged at once.
        credit: u64,
    },
    /// Everything up to `upto` is as durable as the hub is configured to be. Cumulative; sent again for duplicates.
    Ack {
        /// Highest seq covered.
        upto: u64,
    },
    /// The event `seq` can never be taken; everything before it is, and acknowledged by this. What follows it is not
    /// looked at until the emitter has gone back to `seq` or before.
    Nack {
        /// The event.
        seq: u64,
        /// For people: why.
        reason: String,
    },
    /// Replaces the number of events that may be unacknowledged at once.
    Credit {
        /// The new number.
        n: u64,
    },
    /// The frame before broke the protocol; the hub closes after it.
    Error {
        /// Short machine-readable cause.
        code: String,
        /// For people.
        message: String,
    },
    /// The hub is going away and says when to come back.
    Bye {
        /// Close code, see [`close`](super::close).
        code: u16,
        /// Seconds: reconnect after `after` plus a random part of `jitter`.
        reconnect: Reconnect,
    },
    /// Forward compatibility; never sent.
    #[serde(other, skip_serializing)]
    Unknown,
}

/// When to come back, in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reconnect {
    /// Not before this.
    pub after: f64,
    /// Spread over this much more, so that a fleet does not come back at once.
    pub jitter: f64,
}

impl Eq for Reconnect {}

impl EmitterFrame {
    /// The frame as JSON text.
    #[must_use]
    pub fn encode(&self) -> String {
        serde_json::to_string(self).unwrap_or_default() // strings and integers only: cannot fail
    }

    /// Reads a text frame.
    ///
    /// # Errors
    /// The text is not JSON of this shape.
    pub fn decode(text: &str) -> serde_json::Result<Self> {
        serde_json::from_str(text)
    }
}

impl HubFrame {
    /// The frame as JSON text.
    #[must_use]
    pub fn encode(&self) -> String {
        serde_json::to_string(self).unwrap_or_default() // strings and numbers only: cannot fail
    }

    /// Reads a text frame.
    ///
    /// # Errors
    /// The text is not JSON of this shape.
    pub fn decode(text: &str) -> serde_json::Result<Self> {
        serde_json::from_str(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_frames_are_read_as_unknown() {
        assert_eq!(HubFrame::decode(r#"{"type":"later","x":{"y":1}}"#).expect("json"), HubFrame::Unknown);
        assert_eq!(EmitterFrame::decode(r#"{"type":"later"}"#).expect("json"), EmitterFrame::Unknown);
    }

    #[test]
    fn a_frame_without_its_fields_is_an_error() {
        assert!(HubFrame::decode(r#"{"type":"ack"}"#).is_err());
        assert!(HubFrame::decode(r#"{"type":"ack","upto":-1}"#).is_err());
        assert!(EmitterFrame::decode("[]").is_err());
    }
}
