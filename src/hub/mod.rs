//! The receiving half: a port and a pipe on which emitters bring events and subscribers hear them.
//!
//! ```text
//!  listener ─▶ http ─▶ driver ─▶ machine ─▶ state { log · emitters · registry ─▶ outbox } ─▶ driver ─▶ subscribers
//!  dialer ─────────────▶ ┘  ◀── acks ──┘
//! ```
//!
//! `entry`, `log`, `emitters`, `matching`, `outbox`, `slow`, `replay`, `registry`, `state` and `machine` are pure; `driver`, `http` and `listener`
//! do what they decide. An event is acknowledged after it was appended to the log in memory; with a `log_path`,
//! [`history`] stores it before.

pub mod auth;
pub mod compression;
mod config;
pub mod doors;
mod driver;
pub mod emitters;
pub mod entry;
pub mod history;
mod http;
mod listener;
pub mod log;
pub mod machine;
pub mod matching;
pub mod outbox;
pub mod registry;
pub mod replay;
mod shared;
pub mod slow;
pub mod state;
mod stats;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::{HeaderMap, Request};

pub use config::HubConfig;
pub use state::Published;
pub use stats::HubStats;

use crate::error::{Error, ErrorKind, Result};
use crate::local::Dialer;
use crate::runtime::{self, Room};
use crate::wire::position::epoch_from;
use auth::{Grant, not_granted};
use doors::{Exchange, Guest, Refusal};
use entry::{Filter, Record};
use history::Reply;
use log::Log;
use shared::Shared;

/// How long sessions may take to hear the goodbye before the hub closes them.
const STOP_DEADLINE: Duration = Duration::from_secs(3);

/// A running hub. Dropping it stops it without waiting.
pub struct Hub {
    shared: Arc<Shared>,
    port: u16,
    generation: u64,
}

impl Hub {
    /// Starts a hub: the port accepts connections when this returns.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for a setting that is not allowed, [`ErrorKind::Bind`] for an address that cannot be
    /// used.
    pub fn start(config: HubConfig) -> Result<Self> {
        config.validate()?;
        let checker = auth::Checker::new(&config.auth, config.auth_timeout)?;
        let handle = runtime::handle(Room::Hub)?;
        let (inherited, listener) = listener::bind(&config)?;
        let unusable = |error| Error::new(ErrorKind::Bind, "cannot use the bound socket").with_source(error);
        let port = listener.local_addr().map_err(unusable)?.port();
        let inside = handle.enter();
        let listener = tokio::net::TcpListener::from_std(listener).map_err(unusable)?;
        drop(inside);
        let (limits, requires_ack) = (config.log_limits(), Filter::new(config.requires_ack.iter().cloned()));
        let shared = match &config.log_path {
            None => {
                let log = Log::new(fresh_epoch()?, limits).requiring_acks(requires_ack);
                Arc::new(Shared::new(config, checker, (log, Duration::ZERO), None, handle))
            }
            Some(path) => {
                let (history, outcomes, recovered) = history::open(path, limits, &fresh_epoch()?)?;
                let log = history::replay(recovered, limits, requires_ack);
                let shared = Arc::new(Shared::new(config, checker, log, Some(history), handle.clone()));
                // Not among the hub's tasks: it ends after them, with the log.
                drop(handle.spawn(history::settle(shared.clone(), outcomes)));
                shared
            }
        };
        shared.listening.store(true, Ordering::Relaxed);
        shared.spawn(listener::accept(shared.clone(), listener, inherited));
        Ok(Self { shared, port, generation: runtime::generation() })
    }

    /// The port it listens on.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Whether new connections are accepted.
    #[must_use]
    pub fn is_listening(&self) -> bool {
        self.shared.listening.load(Ordering::Relaxed)
    }

    /// Appends an event and brings it to the subscribers. From any thread but the hub's own (where
    /// [`Hub::publish_then`] calls its closure); never waits for the network. With a `log_path` it waits until the
    /// event is stored.
    ///
    /// # Errors
    /// [`ErrorKind::EventNotSerializable`] if it is no JSON object, [`ErrorKind::EventTooLarge`] above
    /// `max_message_bytes`, [`ErrorKind::Closed`] after a stop, [`ErrorKind::Forked`] in a forked child,
    /// [`ErrorKind::LogIo`] if the disk refuses it: then it is not published.
    pub fn publish(&self, json: Bytes) -> Result<Published> {
        let (reply, published) = std::sync::mpsc::sync_channel(1);
        // The receiver waits: sending cannot fail.
        self.publish_then(json, move |result| drop(reply.send(result)));
        published.recv().unwrap_or_else(|_| Err(stopped()))
    }

    /// Publishes as [`Hub::publish`] does and calls `then` with the result: before this returns, or with a `log_path`
    /// later, in a thread of the hub.
    pub fn publish_then(&self, json: Bytes, then: impl FnOnce(Result<Published>) + Send + 'static) {
        match self.check_process() {
            Ok(()) => publish(&self.shared, json, None, then),
            Err(error) => then(Err(error)),
        }
    }

    /// The way in for emitters of this process.
    #[must_use]
    pub fn dialer(&self) -> Dialer {
        let shared = Arc::downgrade(&self.shared);
        let generation = self.generation;
        Dialer::new(move || {
            runtime::check_generation(generation, "hub").map_err(io::Error::other)?;
            let gone = || io::Error::new(io::ErrorKind::ConnectionRefused, "the hub was stopped");
            driver::dial(&shared.upgrade().ok_or_else(gone)?)
        })
    }

    /// Lets a client in that another server has shaken hands with, by its path (`/ws`, `/publish`) and header fields;
    /// gives its session and the subprotocol to answer with. `bell` is rung when there is something to take, or room
    /// to feed again; it must not wait.
    ///
    /// # Errors
    /// [`ErrorKind::Forked`].
    pub fn admit(
        &self,
        path: &str,
        headers: &HeaderMap,
        bell: impl Fn() + Send + Sync + 'static,
    ) -> Result<Result<(Guest, Option<&'static str>), Refusal>> {
        self.check_process()?;
        Ok(doors::admit(&self.shared, path, headers, bell))
    }

    /// Answers an HTTP request that another server has read; `bell` is rung when there is something to take.
    ///
    /// # Errors
    /// [`ErrorKind::Forked`].
    pub fn answer(&self, request: Request<Full<Bytes>>, bell: impl Fn() + Send + Sync + 'static) -> Result<Exchange> {
        self.check_process()?;
        Ok(doors::answer(&self.shared, request, bell))
    }

    /// Fails in a child that inherited the hub over `fork`; to be asked before [`Hub::stats`], because the child may
    /// have inherited the lock in its locked state.
    ///
    /// # Errors
    /// [`ErrorKind::Forked`].
    pub fn check_process(&self) -> Result<()> {
        runtime::check_generation(self.generation, "hub")
    }

    /// The hub's numbers now.
    #[must_use]
    pub fn stats(&self) -> HubStats {
        HubStats::read(&self.shared)
    }

    /// Says goodbye to every session (`bye`, close 3001), waits until they have heard it, at most 3 s, and frees the
    /// port. May be awaited on any runtime; stopping twice is fine.
    pub async fn stop(&self) {
        let (done, stopped) = tokio::sync::oneshot::channel::<()>();
        self.stop_then(move || drop(done));
        // The sender is dropped without a word: that is the news.
        drop(stopped.await);
    }

    /// Stops as [`Hub::stop`] does and calls `done` afterwards, in the hub's thread. In a forked child it is called
    /// at once, because nothing runs there.
    pub fn stop_then(&self, done: impl FnOnce() + Send + 'static) {
        if self.check_process().is_err() {
            return done();
        }
        let first = self.shared.begin_stop();
        let shared = self.shared.clone();
        self.shared.handle().spawn(async move {
            if first {
                shared.join(STOP_DEADLINE).await;
            } else {
                shared.stopped().await;
            }
            done();
        });
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.stop_then(|| {});
    }
}

/// Publishes; `reply` is called when that is done: at once, or by the log's way back in the hub's thread.
fn publish(
    shared: &Shared,
    json: Bytes,
    grant: Option<&Grant>,
    reply: impl FnOnce(Result<Published>) + Send + 'static,
) {
    let record = match record(shared, json, grant) {
        Ok(record) => record,
        Err(error) => return reply(Err(error)),
    };
    match &shared.history {
        Some(_) if shared.is_stopping() => reply(Err(stopped())),
        Some(history) => history.publish(record, Reply::new(reply)),
        None => reply(shared.with(|state, now| {
            // With the lock held: whoever was told goodbye misses nothing.
            if shared.is_stopping() { Err(stopped()) } else { Ok(state.append(record, now)) }
        })),
    }
}

fn record(shared: &Shared, json: Bytes, grant: Option<&Grant>) -> Result<Record> {
    let limit = shared.config.max_message_bytes;
    if json.len() > limit {
        let message = format!("the event has {} bytes; max_message_bytes is {limit}", json.len());
        return Err(Error::new(ErrorKind::EventTooLarge, message));
    }
    let record = Record::event(json).map_err(|error| {
        Error::new(ErrorKind::EventNotSerializable, "an event is a JSON object with text as its type and topic")
            .with_source(error)
    })?;
    if grant.is_some_and(|grant| !grant.may_publish(&record)) {
        return Err(Error::new(ErrorKind::NotAllowed, not_granted(&record)));
    }
    Ok(record)
}

fn stopped() -> Error {
    Error::new(ErrorKind::Closed, "the hub was stopped")
}

/// An epoch that no earlier hub had: offsets begin again at 1.
fn fresh_epoch() -> Result<String> {
    let random = getrandom::u64().map_err(|error| {
        Error::new(ErrorKind::Bind, "the system gives no random number for an epoch").with_source(error)
    })?;
    Ok(epoch_from(random))
}
