//! What a bridge tells of itself.

use parking_lot::Mutex;
use serde::Serialize;

/// The numbers of a bridge.
#[expect(clippy::struct_excessive_bools, reason = "they are told one by one")]
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct BridgeStats {
    /// Name of this hub on the bus; another one after each start.
    pub hub: String,
    /// Whether the bus can be reached, and what is sent over it comes back.
    pub up: bool,
    /// Whether clients were told that it cannot.
    pub degraded: bool,
    /// Whether events are local: they go to the sessions of this hub only.
    pub local: bool,
    /// What is the matter with the bus, if something is; without passwords.
    pub error: Option<String>,
    /// State of the breaker: `closed`, `open` or `half_open`.
    pub circuit: &'static str,
    /// Whether this hub takes in what others publish on the channel.
    pub intake: bool,
    /// Connections lost that had worked: a probe had come round.
    pub losses: u64,
    /// Attempts to connect in vain, and connections lost before a probe had come round.
    pub failures: u64,
    /// Probes that came back.
    pub probes: u64,
    /// Connections given up because a probe did not come back.
    pub deaf: u64,
    /// Gaps in what was heard, filled from the stream.
    pub fills: u64,
    /// How often the log began anew: the stream had another epoch, or had lost what was missing here.
    pub restarts: u64,
    /// Batches appended by this hub.
    pub batches: u64,
    /// Events taken in from the channel.
    pub plain: u64,
    /// What came on the channel and is no event, or found no room.
    pub plain_refused: u64,
    /// Ops that wait for the bus.
    pub waiting: usize,
}

/// What happened so far. Each only grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Links lost that had worked for a while.
    pub losses: u64,
    /// Attempts to make one in vain, those among them that broke at once.
    pub failures: u64,
    /// Gaps for which the stream was read.
    pub fills: u64,
    /// Probes that came back.
    pub probes: u64,
    /// Links given up because one did not.
    pub deaf: u64,
    /// How often the log began anew, the start not counted.
    pub restarts: u64,
}

/// See [`BridgeStats`]. Written by the driver, read by anybody.
#[derive(Debug, Default)]
pub(in crate::hub) struct Status(Mutex<BridgeStats>);

impl Status {
    /// The numbers now.
    pub(in crate::hub) fn read(&self) -> BridgeStats {
        self.0.lock().clone()
    }

    pub(super) fn write(&self, change: impl FnOnce(&mut BridgeStats)) {
        change(&mut self.0.lock());
    }
}
