//! What a hub can say about itself.

use serde::Serialize;

use super::shared::Shared;
use super::state::Counters;

/// A hub's numbers at one moment. Reading them costs a lock and no more.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct HubStats {
    /// Epoch of the log.
    pub epoch: String,
    /// Offset of the newest entry; 0 before the first.
    pub offset: u64,
    /// Emitter connections open now.
    pub emitters: usize,
    /// Subscriber sessions open now.
    pub subscribers: usize,
    /// Emitters whose mark is remembered, connected or not.
    pub known_emitters: usize,
    /// Entries kept for replay.
    pub log_events: usize,
    /// What they cost, in bytes.
    pub log_bytes: usize,
    /// Sessions closed because they read too slowly.
    pub slow: u64,
    /// What happened so far.
    #[serde(flatten)]
    pub counters: Counters,
    /// Seconds since the start.
    pub uptime: f64,
}

impl HubStats {
    pub(super) fn read(shared: &Shared) -> Self {
        shared.with(|state, now| {
            let counts = state.registry.counts();
            Self {
                epoch: state.log.epoch().to_owned(),
                offset: state.log.head(),
                emitters: counts.emitters,
                subscribers: counts.subscribers,
                known_emitters: state.emitters.len(),
                log_events: state.log.len(),
                log_bytes: state.log.bytes(),
                slow: counts.slow,
                counters: state.counters,
                uptime: now.as_secs_f64(),
            }
        })
    }

    /// The numbers as a JSON object.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default() // strings and numbers only: cannot fail
    }
}
