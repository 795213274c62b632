//! What all tasks of a hub hold: the settings, the state under its lock, and the tasks themselves.
//!
//! The state is a plain value under one mutex that is held for microseconds and never across an await. An actor would
//! cost every event a hop; and because the hub's tasks share one thread, only a publisher in another thread ever
//! finds the lock taken.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

use super::auth::{self, Checker, Denied, Grant, Scope};
use super::config::HubConfig;
use super::entities::Entities;
use super::entry::Filter;
use super::limits::{Connections, TooMany};
use super::log::Log;
use super::ops::Keeper;
use super::presence::Presence;
use super::registry::{Role, SessionId};
use super::state::State;
use super::tls::Tls;
use crate::secret::Secret;
use crate::wire::frame::Reconnect;

/// How long a keeper may take to keep what waits, and the log to close its file.
const CLOSE_DEADLINE: Duration = Duration::from_secs(10);

/// See the module.
pub(super) struct Shared {
    pub(super) config: HubConfig,
    pub(super) auth: Checker,
    /// As the log notes them.
    pub(super) entities: Arc<Entities>,
    state: Mutex<State>,
    connections: Mutex<Connections>,
    /// Who keeps events before anybody hears of them, if somebody does.
    pub(super) keeper: Option<Keeper>,
    started: Instant,
    /// Age of the oldest entry at the start, from where the state counts its time.
    origin: Duration,
    handle: Handle,
    tasks: Mutex<JoinSet<()>>,
    stopping: watch::Sender<bool>,
    stopped: watch::Sender<bool>,
    /// Sessions closed by the hub, by close code.
    pub(super) closes: Mutex<BTreeMap<u16, u64>>,
    pub(super) tls: Option<Tls>,
    /// Whether the accept loop runs.
    pub(super) listening: AtomicBool,
}

/// Why a session is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    Full,
    Stopping,
    TooMany(TooMany),
}

/// What is known of a client when its session begins.
pub(super) enum Admission {
    /// It may do this.
    Granted(Grant),
    /// It brought a token that is to be checked as if its first frame had brought it.
    Token(Secret),
    /// It is expected to show one.
    Awaited,
}

/// A session's place in the registry, given up when its task ends in whatever way.
pub(super) struct Seat {
    pub(super) shared: Arc<Shared>,
    pub(super) id: SessionId,
    pub(super) role: Role,
    pub(super) admission: Admission,
    /// The address that it counts for.
    from: Option<IpAddr>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.shared.with(|state, _| state.registry.close(self.id));
        if let Some(from) = self.from {
            self.shared.connections.lock().end(from);
        }
    }
}

impl Shared {
    pub(super) fn new(
        config: HubConfig,
        (auth, tls): (Checker, Option<Tls>),
        log: (Log, Duration),
        keeper: Option<Keeper>,
        handle: Handle,
    ) -> Self {
        let (log, origin) = log;
        let entities = log.entities();
        let state = State::resume(log, config.session_queue_bytes)
            .with(config.slow, config.compression_threshold)
            .wrapping(config.envelope)
            .watching(Presence::new(&config.heartbeats(), config.patience()));
        let connections = Connections::new(config.connect_rate, config.max_sessions_per_address);
        Self {
            config,
            auth,
            entities,
            state: Mutex::new(state),
            connections: Mutex::new(connections),
            keeper,
            started: Instant::now(),
            origin,
            handle,
            tasks: Mutex::default(),
            stopping: watch::Sender::new(false),
            stopped: watch::Sender::new(false),
            closes: Mutex::default(),
            tls,
            listening: AtomicBool::new(false),
        }
    }

    /// Acts on the state, then wakes the sessions that have something to send. The second argument is the time since
    /// the oldest entry that was there at the start, or since the start.
    pub(super) fn with<R>(&self, act: impl FnOnce(&mut State, Duration) -> R) -> R {
        let mut state = self.state.lock();
        let result = act(&mut state, self.now());
        let woken = state.registry.take_woken();
        drop(state);
        for waker in woken {
            waker.wake();
        }
        result
    }

    /// Time as the state counts it.
    pub(super) fn now(&self) -> Duration {
        self.origin + self.started.elapsed()
    }

    /// What a token grants, and until when as the state counts time.
    pub(super) async fn check(self: Arc<Self>, token: Secret) -> Result<(Grant, Option<Duration>), Denied> {
        let grant = self.auth.check(token).await?;
        let until = self.until(&grant);
        Ok((grant, until))
    }

    /// When a grant ends, as the state counts time.
    pub(super) fn until(&self, grant: &Grant) -> Option<Duration> {
        let left = grant.expires? - auth::unix_now();
        // What is too far away for a clock is for ever.
        Duration::try_from_secs_f64(left.max(0.0)).ok()?.checked_add(self.now())
    }

    /// Time since the start.
    pub(super) fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// Lets a session in. One within this process comes from no address.
    pub(super) fn open(
        self: &Arc<Self>,
        role: Role,
        admission: Admission,
        from: Option<IpAddr>,
    ) -> Result<Seat, Refused> {
        let id = self.with(|state, _| {
            if self.is_stopping() {
                return Err(Refused::Stopping);
            }
            if state.registry.len() >= self.config.max_sessions {
                return Err(Refused::Full);
            }
            if let Some(from) = from {
                self.connections.lock().begin(from, self.started.elapsed()).map_err(Refused::TooMany)?;
            }
            let id = state.registry.open(role);
            // Nothing, before it is known who it is.
            let granted = match &admission {
                Admission::Granted(grant) => grant.subscribe.as_ref().map(Scope::filter),
                Admission::Token(_) | Admission::Awaited => Some(Filter::default()),
            };
            state.grant(id, granted.map(Arc::new));
            Ok(id)
        })?;
        Ok(Seat { shared: self.clone(), id, role, admission, from })
    }

    /// A connection was accepted; how long the next one is to wait.
    pub(super) fn connection_accepted(&self) -> Duration {
        self.connections.lock().accepted(self.started.elapsed())
    }

    /// Starts a task that ends with the hub.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
        let mut tasks = self.tasks.lock();
        while tasks.try_join_next().is_some() {} // what has ended is forgotten
        tasks.spawn_on(task, &self.handle)
    }

    pub(super) fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    /// Ends when the hub begins to stop.
    pub(super) async fn stopping(&self) {
        reached(&self.stopping).await;
    }

    /// No new sessions from now on; those that are there are sent away. False if that happened before.
    pub(super) fn begin_stop(&self) -> bool {
        self.with(|state, _| {
            let first = !self.stopping.send_replace(true);
            if first {
                let sessions = state.registry.len();
                state.shutdown(comeback(sessions));
            }
            first
        })
    }

    /// Waits for all tasks to end, at most until the deadline; then ends them. For whoever began the stop.
    pub(super) async fn join(&self, deadline: Duration) {
        let mut tasks = std::mem::take(&mut *self.tasks.lock());
        let all = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(deadline, all).await.is_err() {
            tasks.shutdown().await;
        }
        if let Some(keeper) = &self.keeper {
            // A disk that hangs must not hold the stop for ever; whoever opens the file then finds it locked.
            drop(tokio::time::timeout(CLOSE_DEADLINE, keeper.close()).await);
        }
        self.listening.store(false, Ordering::Relaxed);
        self.stopped.send_replace(true);
    }

    /// Ends when the stop is complete.
    pub(super) async fn stopped(&self) {
        reached(&self.stopped).await;
    }

    pub(super) fn handle(&self) -> &Handle {
        &self.handle
    }
}

async fn reached(flag: &watch::Sender<bool>) {
    // An error means that the sender is gone, and the hub with it.
    drop(flag.subscribe().wait_for(|reached| *reached).await);
}

/// When to come back: soon, and spread so that about 100 clients a second return to the next hub, but all within 4.2 s:
/// 10 000 are then 2500 handshakes in a second, half of the default `connect_rate`.
fn comeback(sessions: usize) -> Reconnect {
    Reconnect { after: 0.2, jitter: (sessions as f64 / 100.0).min(4.0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fleet_is_told_to_come_back_within_five_seconds_and_slower_than_it_may() {
        let Reconnect { after, jitter } = comeback(10_000);
        assert!(after + jitter < 5.0);
        assert!(10_000.0 / jitter < HubConfig::default().connect_rate);
        assert!(comeback(3).jitter < 0.1);
    }
}
