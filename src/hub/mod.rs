//! The receiving half: a port and a pipe on which emitters bring events and subscribers hear them.
//!
//! ```text
//!  listener ─▶ http ─▶ driver ─▶ machine ─▶ state { log · emitters · registry ─▶ outbox } ─▶ driver ─▶ subscribers
//!  dialer ─────────────▶ ┘  ◀── acks ──┘
//! ```
//!
//! `entry`, `log`, `emitters`, `matching`, `outbox`, `slow`, `replay`, `registry`, `presence`, `state` and `machine` are
//! pure; `driver`, `http` and `listener` do what they decide. An event is acknowledged after it was appended to the log in
//! memory; before that a keeper ([`ops`]) has it where there is one: [`history`] with a `log_path`, a [`bridge`] where
//! many hubs share one stream.

mod abort;
pub mod auth;
pub mod bridge;
pub mod compression;
mod config;
pub mod doors;
mod driver;
pub mod emitters;
pub mod entities;
pub mod entry;
pub mod history;
mod http;
pub mod limits;
mod listener;
pub mod log;
pub mod machine;
pub mod matching;
mod meter;
mod ops;
pub mod outbox;
pub mod presence;
pub mod registry;
pub mod replay;
pub mod service;
mod shared;
pub mod slow;
pub mod state;
mod stats;
mod tls;

use std::convert::Infallible;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::{HeaderMap, Request};

use parking_lot::Mutex;
use tokio::task::AbortHandle;

pub use abort::Abort;
pub use config::HubConfig;
pub use state::Published;
pub use stats::HubStats;

use crate::error::{Error, ErrorKind, Result};
use crate::local::Dialer;
use crate::runtime::{self, Room};
use crate::wire::position::epoch_from;
use auth::Grant;
use doors::{Exchange, Guest, Refusal};
use entry::{Filter, Record};
use listener::Port;
use log::{Log, Noting};
use ops::{Keeper, Reply};
use shared::Shared;

/// How long sessions may take to hear the goodbye before the hub closes them.
const STOP_DEADLINE: Duration = Duration::from_secs(3);
/// How long a task that accepted may take to end.
const RELISTEN_DEADLINE: Duration = Duration::from_secs(1);

/// How often it is looked whose heartbeats stay away: a first one is told of within two seconds.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A running hub. Dropping it stops it without waiting.
pub struct Hub {
    shared: Arc<Shared>,
    number: u16,
    accepting: Mutex<Accepting>,
    /// Held while the port is taken anew, which takes time; `accepting` is not.
    listening_again: Mutex<()>,
    generation: u64,
}

impl Hub {
    /// Starts a hub: the port accepts connections when this returns.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] for a setting that is not allowed, [`ErrorKind::Bind`] for an address that cannot be
    /// used, [`ErrorKind::BusDown`] or [`ErrorKind::BusRefused`] for a bus that is away for `bus_timeout`, or lets nobody
    /// in.
    pub fn start(config: HubConfig) -> Result<Self> {
        Self::start_unless(config, &Abort::default())
    }

    /// Starts a hub as [`Hub::start`] does, unless that is aborted while it waits for a bus.
    ///
    /// # Errors
    /// Those of [`Hub::start`], and [`ErrorKind::Closed`] if it was aborted.
    pub fn start_unless(config: HubConfig, abort: &Abort) -> Result<Self> {
        config.validate()?;
        let checker = auth::Checker::new(&config.auth, config.auth_timeout)?;
        let tls = config.tls_files().map(|(cert, key)| tls::Tls::load(cert, key)).transpose()?;
        let guards = (checker, tls);
        let handle = runtime::handle(Room::Hub)?;
        let (inherited, listener) = listener::bind(&config)?;
        let inside = handle.enter();
        let port = Port::new(listener, inherited).map_err(unusable)?;
        drop(inside);
        let limits = config.log_limits();
        let noting = Noting {
            requires_ack: Filter::new(config.requires_ack.iter().cloned()),
            entities: Arc::new(config.entities()?),
        };
        let shared = match (&config.log_path, &config.bridge) {
            (None, None) => {
                let log = Log::new(fresh_epoch()?, limits).noting(noting);
                Arc::new(Shared::new(config, guards, (log, Duration::ZERO), None, handle))
            }
            (_, Some(bridge)) => {
                let bridge = bridge.clone();
                bridge::start(&bridge, (limits, noting), (&handle, abort), |keeper, log| {
                    let (log, handle) = ((log, Duration::ZERO), handle.clone());
                    Arc::new(Shared::new(config, guards, log, Some(keeper), handle))
                })?
            }
            (Some(path), None) => {
                let (history, outcomes, recovered) = history::open(path, limits, &fresh_epoch()?)?;
                let status = history.status.clone();
                let log = history::replay(recovered, limits, noting);
                let keeper = Some(Keeper::Log(history));
                let shared = Arc::new(Shared::new(config, guards, log, keeper, handle.clone()));
                // Not among the hub's tasks: it ends after them, with the log.
                drop(handle.spawn(history::settle(shared.clone(), status, outcomes)));
                shared
            }
        };
        if shared.with(|state, _| state.presence.is_watching()) {
            drop(shared.spawn(watch(shared.clone())));
        }
        let number = port.number();
        let accepting = Mutex::new(accept(&shared, port));
        Ok(Self { shared, number, accepting, listening_again: Mutex::default(), generation: runtime::generation() })
    }

    /// The port it listens on.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.number
    }

    /// Whether new connections are accepted: the task lives, and its socket is what it was.
    #[must_use]
    pub fn is_listening(&self) -> bool {
        let sound = || self.accepting.lock().port.upgrade().is_some_and(|port| port.is_sound());
        self.shared.listening.load(Ordering::Relaxed) && sound()
    }

    /// Takes the port anew and accepts on it; whoever is connected stays. Waits up to a second for what was there.
    ///
    /// # Errors
    /// [`ErrorKind::Bind`] if the port cannot be had, [`ErrorKind::Closed`] after a stop, [`ErrorKind::Forked`].
    pub fn listen_again(&self) -> Result<()> {
        self.check_process()?;
        if self.shared.is_stopping() {
            return Err(stopped());
        }
        let one_at_a_time = self.listening_again.lock();
        let ended = self.accepting.lock().end();
        // Nothing is ever sent: the channel ends with the port.
        let _closed_or_late = ended.map(|ended| ended.recv_timeout(RELISTEN_DEADLINE));
        let config = HubConfig { port: self.number, ..self.shared.config.clone() };
        let (inherited, listener) = listener::bind(&config)?;
        let inside = self.shared.handle().enter();
        let port = Port::new(listener, inherited).map_err(unusable)?;
        drop(inside);
        *self.accepting.lock() = accept(&self.shared, port);
        drop(one_at_a_time);
        Ok(())
    }

    /// Tells subscribers what a supervisor has found, or with `None` that it is over, and the state of its breaker.
    pub fn tell(&self, trouble: Option<String>, circuit: &str) {
        self.shared.with(|state, _| {
            state.service.set_circuit(service::Part::Supervised, circuit);
            state.trouble(service::Part::Supervised, trouble);
        });
    }

    /// The frames of at most `most` entries after an offset that the log still has, oldest first.
    #[must_use]
    pub fn frames_since(&self, offset: u64, most: usize, replay: bool) -> Vec<Bytes> {
        self.shared.with(|state, now| state.frames_since(offset, most, replay, now))
    }

    /// At most `most` subscribers, those that are furthest behind first, as JSON.
    #[must_use]
    pub fn clients(&self, most: usize) -> Vec<u8> {
        let clients = self.shared.with(|state, _| state.registry.laggards(most));
        serde_json::to_vec(&clients).unwrap_or_default() // strings and numbers only: cannot fail
    }

    /// Appends an event and brings it to the subscribers. From any thread but the hub's own (where
    /// [`Hub::publish_then`] calls its closure); with a `log_path` it waits until the event is stored, with a
    /// bridge until the bus has it; otherwise it never waits.
    ///
    /// # Errors
    /// [`ErrorKind::EventNotSerializable`] if it is no JSON object, [`ErrorKind::EventTooLarge`] above
    /// `max_message_bytes`, [`ErrorKind::Closed`] after a stop, [`ErrorKind::Forked`] in a forked child,
    /// [`ErrorKind::LogIo`] if the disk refuses it: then it is not published. [`ErrorKind::BusDown`] if the bus does not
    /// take it in time.
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
            Ok(()) => publish(&self.shared, vec![json], None, then),
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

    /// Lets a client in that another server has shaken hands with, by its address (`/ws`, `/publish`) and header fields;
    /// gives its session and the subprotocol to answer with. `bell` is rung when there is something to take, or room
    /// to feed again; it must not wait.
    ///
    /// # Errors
    /// [`ErrorKind::Forked`].
    pub fn admit(
        &self,
        target: &str,
        headers: &HeaderMap,
        bell: impl Fn() + Send + Sync + 'static,
    ) -> Result<Result<(Guest, Option<&'static str>), Refusal>> {
        self.check_process()?;
        Ok(doors::admit(&self.shared, target, headers, bell))
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

/// The bound socket, while a task accepts on it, and the means to end that task.
struct Accepting {
    port: Weak<Port>,
    task: AbortHandle,
    ended: Option<Receiver<Infallible>>,
}

impl Accepting {
    /// Ends it; what is returned ends when the socket is closed.
    fn end(&mut self) -> Option<Receiver<Infallible>> {
        self.task.abort();
        self.ended.take()
    }
}

fn accept(shared: &Arc<Shared>, mut port: Port) -> Accepting {
    let ended = Some(port.open(shared));
    let port = Arc::new(port);
    Accepting { port: Arc::downgrade(&port), task: shared.spawn(listener::accept(shared.clone(), port)), ended }
}

/// Tells subscribers whose heartbeats begin, stay away and come back, until the hub stops.
async fn watch(shared: Arc<Shared>) {
    let mut clock = tokio::time::interval(LOOK_EVERY);
    clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            _ = clock.tick() => {}
            () = shared.stopping() => return,
        }
        for heart in shared.with(|state, now| state.presence.look(now)) {
            let again = shared.clone();
            publish(&shared, vec![heart.event().into()], None, move |published| {
                if published.is_err() {
                    again.with(|state, now| state.presence.untold(heart, now));
                }
            });
        }
    }
}

fn unusable(error: io::Error) -> Error {
    Error::new(ErrorKind::Bind, "cannot use the bound socket").with_source(error)
}

/// Publishes all of it, or nothing; `reply` is called when that is done, with the place of the last: at once, or by
/// the log's way back in the hub's thread.
fn publish(
    shared: &Shared,
    events: Vec<Bytes>,
    grant: Option<&Grant>,
    reply: impl FnOnce(Result<Published>) + Send + 'static,
) {
    let records = events.into_iter().map(|json| record(shared, json, grant)).collect::<Result<Vec<_>>>();
    let records = match records {
        Ok(records) => records,
        Err(error) => return reply(Err(error)),
    };
    match &shared.keeper {
        Some(_) if shared.is_stopping() => reply(Err(stopped())),
        Some(keeper) => keeper.publish(records, Reply::new(reply)),
        None => reply(shared.with(|state, now| {
            // With the lock held: whoever was told goodbye misses nothing.
            if shared.is_stopping() { Err(stopped()) } else { state.append_all(records, now).ok_or_else(stopped) }
        })),
    }
}

fn record(shared: &Shared, json: Bytes, grant: Option<&Grant>) -> Result<Record> {
    let limit = shared.config.max_message_bytes;
    if json.len() > limit {
        let message = format!("the event has {} bytes; max_message_bytes is {limit}", json.len());
        return Err(Error::new(ErrorKind::EventTooLarge, message));
    }
    Record::checked(json, &shared.entities, grant.and_then(|grant| grant.publish.as_ref()))
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
