//! What a hub can say about itself.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use serde::Serialize;

use super::bridge::BridgeStats;
use super::history::Status;
use super::ops::Keeper;
use super::presence::Summary;
use super::registry::Laggard;
use super::shared::Shared;
use super::state::Counters;
use super::tls::Tls;

/// How many of the subscribers that are furthest behind are named: enough to see who holds a queue.
const LAGGARDS: usize = 10;

/// How many hearts are named, the longest silent first: those that somebody should look at.
const HEARTS: usize = 100;

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
    /// Plain publishers connected.
    pub publishers: usize,
    /// Emitters whose mark is remembered, connected or not.
    pub known_emitters: usize,
    /// Entries kept for replay.
    pub log_events: usize,
    /// What they cost, in bytes.
    pub log_bytes: usize,
    /// Whether the log is a file.
    pub durable: bool,
    /// Whether the disk refused the last events, or the bus is away: they were not acknowledged, and come again.
    pub degraded: bool,
    /// What the disk said.
    pub log_error: Option<String>,
    /// How often the disk refused events.
    pub log_failures: u64,
    /// Transactions of the log.
    pub log_commits: u64,
    /// Where a damaged log was moved to at the start.
    pub log_set_aside: Option<PathBuf>,
    /// Sessions closed because they read too slowly.
    pub slow: u64,
    /// Events left out because a session read too slowly that allows it.
    pub shed: u64,
    /// Events left out because a newer one with the same key came to a slow session.
    pub conflated: u64,
    /// The subscribers that are furthest behind.
    pub laggards: Vec<Laggard>,
    /// The bridge to other hubs, if there is one.
    pub bridge: Option<BridgeStats>,
    /// Frames put together to bring events to subscribers, replays too; each was sent to as many as could share it.
    pub encoded: u64,
    /// How often an event's data was compressed.
    pub compressed: u64,
    /// Sessions closed by the hub, by close code.
    pub closes: BTreeMap<u16, u64>,
    /// Bytes that wait for the sockets of all sessions.
    pub queued_bytes: usize,
    /// Whose hearts beat.
    pub presence: Summary,
    /// Why the files of the certificate as they are now are not used; an older one is.
    pub tls_error: Option<String>,
    /// What happened so far.
    #[serde(flatten)]
    pub counters: Counters,
    /// Seconds since the start.
    pub uptime: f64,
}

impl HubStats {
    pub(super) fn read(shared: &Shared) -> Self {
        let tls_error = shared.tls.as_ref().and_then(Tls::error); // it may look at the files, so not under the lock
        let keeper = shared.keeper.as_ref();
        let status = keeper.and_then(Keeper::log).map(|history| &*history.status);
        let bridge = keeper.and_then(Keeper::bus).map(|bridge| bridge.status.read());
        let count = |of: fn(&Status) -> u64| status.map_or(0, of);
        shared.with(|state, now| {
            let counts = state.registry.counts();
            Self {
                epoch: state.log.epoch().to_owned(),
                offset: state.log.head(),
                emitters: counts.emitters,
                subscribers: counts.subscribers,
                publishers: counts.publishers,
                known_emitters: status
                    .map_or(state.emitters.len(), |status| status.known_emitters.load(Ordering::Relaxed)),
                log_events: state.log.len(),
                log_bytes: state.log.bytes(),
                durable: status.is_some(),
                degraded: status.is_some_and(|status| status.degraded.load(Ordering::Relaxed))
                    || bridge.as_ref().is_some_and(|bridge| bridge.degraded),
                log_error: status.and_then(|status| status.error.lock().clone()),
                log_failures: count(|status| status.failures.load(Ordering::Relaxed)),
                log_commits: count(|status| status.commits.load(Ordering::Relaxed)),
                log_set_aside: status.and_then(|status| status.set_aside.lock().clone()),
                slow: counts.slow,
                shed: counts.left_out.shed,
                conflated: counts.left_out.conflated,
                laggards: state.registry.laggards(LAGGARDS),
                encoded: state.registry.work().0,
                compressed: state.registry.work().1,
                closes: shared.closes.lock().clone(),
                queued_bytes: state.registry.queued_bytes(),
                tls_error,
                presence: state.presence.summary(HEARTS, now),
                bridge,
                counters: state.counters,
                uptime: shared.uptime().as_secs_f64(),
            }
        })
    }

    /// The numbers as a JSON object.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default() // strings and numbers only: cannot fail
    }
}
