//! A bus that is a Redis, 6.2 or newer: a stream and a few keys behind scripts that Redis runs as one step, and a
//! channel for live messages.
//!
//! Each link has two connections, one that asks and one that hears, so that a large answer delays no live message and the
//! bound that Redis sets on subscribers never meets an answer.
//!
//! | key, in one cluster slot | |
//! |---|---|
//! | `{sb1:<channel>}:meta` | hash: epoch, head, and in which life of Redis the head was where |
//! | `{sb1:<channel>}:stream` | one entry for each batch, its id the offset of its last record |
//! | `{sb1:<channel>}:marks`, `:seen` | mark and session of each emitter; when it was heard of last |
//! | `{sb1:<channel>}:hub:<name>` | the last batch of a hub and what became of it, for an hour |
//! | `{sb1:<channel>}:intake` | the hub that takes in plain events |

mod address;
mod wire;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use redis::aio::MultiplexedConnection;
use redis::{AsyncConnectionConfig, Cmd, RedisError, ServerErrorKind, Value, cmd, pipe};

use super::hearing::{self, Hearing, Speaker};
use super::sequencer::LEASE_PROBES;
use super::{Appended, Batch, Bus, Claim, Filled, Known, Link, Message, Place};
use crate::error::{Error, ErrorKind, Result};
use crate::hub::emitters::REMEMBERED;
use crate::secret::Secret;
use address::Address;

const APPEND: &str = include_str!("append.lua");
const JOIN: &str = include_str!("join.lua");
const PROBE: &str = include_str!("probe.lua");

/// Larger blocks are only announced, and read from the stream by every hub: Redis cuts off a subscriber for whom 32 MiB
/// wait, or 8 MiB for a minute.
const LARGEST_MESSAGE: usize = 256 << 10;
/// The stream keeps so many records at least, however few a hub replays: gaps are filled from it.
const KEPT_AT_LEAST: usize = 10_000;

/// Where a Redis is, and what on it is ours.
#[derive(Clone, Debug)]
pub struct RedisConfig {
    /// `redis://[user:password@]host[:port][/db]`, `rediss://…` with TLS, `redis+unix:///path`, `redis+sentinel://…`,
    /// `redis+cluster://…`.
    pub url: Secret,
    /// Name of the stream and its keys, and of the channel on which others may publish JSON.
    pub channel: String,
    /// PEM file of the certificates that the server's is checked against. Default the system's.
    pub ca: Option<PathBuf>,
    /// How many records the stream keeps at least.
    pub keep: usize,
    /// How often hubs probe: the lease of the one that takes in plain events is three of these.
    pub probe_interval: Duration,
}

/// See the module.
pub struct RedisBus {
    address: Address,
    names: Arc<Names>,
}

/// What things are called in Redis.
#[derive(Debug)]
struct Names {
    prefix: String,
    live: String,
    plain: String,
    keep: usize,
    lease: Duration,
}

impl RedisBus {
    /// Reads the settings; connects to nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Config`].
    pub fn new(config: &RedisConfig) -> Result<Self> {
        let address = Address::parse(config.url.expose(), config.ca.as_deref())?;
        let prefix = format!("{{sb1:{}}}", config.channel);
        // Channels, unlike keys, are the same in all databases.
        let live = format!("{prefix}:{}:live", address.database());
        let names = Names {
            prefix,
            live,
            plain: config.channel.clone(),
            keep: config.keep.max(KEPT_AT_LEAST),
            lease: config.probe_interval * LEASE_PROBES,
        };
        Ok(Self { address, names: Arc::new(names) })
    }
}

impl fmt::Debug for RedisBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RedisBus({})", self.address)
    }
}

impl Bus for RedisBus {
    type Link = RedisLink;

    async fn connect(&self, hub: &str) -> Result<(RedisLink, Hearing)> {
        let failed = |error: RedisError| failure(&format!("cannot use the Redis at {}", self.address), &error);
        let client = self.address.client(&format!("{}:meta", self.names.prefix)).await?;
        let probes = format!("{}:probe:{hub}", self.names.live);
        let (mut sink, stream) = client.get_async_pubsub().await.map_err(failed)?.split();
        sink.subscribe(&[&self.names.live, &probes, &self.names.plain]).await.map_err(failed)?;
        // No time-outs of single answers: a probe tells whether answers come.
        let config = AsyncConnectionConfig::new().set_response_timeout(None);
        let mut connection = client.get_multiplexed_async_connection_with_config(&config).await.map_err(failed)?;
        let mut loading = pipe();
        for script in [APPEND, JOIN, PROBE] {
            loading.cmd("SCRIPT").arg("LOAD").arg(script);
        }
        let hashes: [String; 3] = loading
            .query_async::<Vec<String>>(&mut connection)
            .await
            .map_err(failed)?
            .try_into()
            .map_err(|_| misunderstood("SCRIPT LOAD"))?;
        let [append, join, probe] = hashes;
        // A user without INFO never learns of a new life; then only the head tells.
        let info: Result<String, RedisError> = cmd("INFO").arg("server").query_async(&mut connection).await;
        let run = info.ok().and_then(|info| run_id(&info)).unwrap_or_else(|| "unknown".to_owned());
        let (speaker, hearing) = hearing::channel();
        drop(tokio::spawn(listen(stream, sink, speaker, self.names.clone())));
        let scripts = Arc::new(Scripts { append, join, probe });
        Ok((
            RedisLink { connection, scripts, names: self.names.clone(), hub: hub.into(), probes, run: run.into() },
            hearing,
        ))
    }
}

fn run_id(info: &str) -> Option<String> {
    info.lines().find_map(|line| line.strip_prefix("run_id:")).map(|id| id.trim().to_owned())
}

/// Passes on what is heard, until the connection ends or nobody listens. The sink is held because the connection ends
/// without it.
async fn listen(
    mut stream: redis::aio::PubSubStream,
    _sink: redis::aio::PubSubSink,
    speaker: Speaker,
    names: Arc<Names>,
) {
    loop {
        let heard = tokio::select! {
            heard = stream.next() => heard,
            () = speaker.unheard() => None,
        };
        let Some(heard) = heard else { return };
        let payload = Bytes::copy_from_slice(heard.get_payload_bytes());
        let message = if heard.get_channel_name() == names.plain {
            Some(Message::Plain(payload))
        } else {
            wire::message(&payload)
        };
        // What is none of ours on our channels is left alone.
        if message.is_some_and(|message| !speaker.say(message)) {
            return;
        }
    }
}

/// Hashes of the scripts.
#[derive(Debug)]
struct Scripts {
    append: String,
    join: String,
    probe: String,
}

/// A link to a [`RedisBus`].
#[derive(Clone, Debug)]
pub struct RedisLink {
    connection: MultiplexedConnection,
    scripts: Arc<Scripts>,
    names: Arc<Names>,
    hub: Arc<str>,
    /// The hub's own channel for probes.
    probes: String,
    run: Arc<str>,
}

impl RedisLink {
    fn key(&self, name: &str) -> String {
        format!("{}:{name}", self.names.prefix)
    }

    /// Runs a script, and brings it back if Redis has lost it.
    async fn run(&self, hash: &str, source: &str, keys: &[String], args: impl Fn(&mut Cmd)) -> Result<String> {
        let call = |verb: &str, script: &str| {
            let mut call = cmd(verb);
            call.arg(script).arg(keys.len()).arg(keys);
            args(&mut call);
            call
        };
        let mut connection = self.connection.clone();
        let answer = match call("EVALSHA", hash).query_async(&mut connection).await {
            Err(error) if error.kind() == redis::ErrorKind::Server(ServerErrorKind::NoScript) => {
                call("EVAL", source).query_async(&mut connection).await
            }
            answer => answer,
        };
        answer.map_err(|error| failure("Redis refused a step of the bridge", &error))
    }
}

impl Link for RedisLink {
    async fn join(&self, known: &Known, fresh: &str) -> Result<Place> {
        let keys = [self.key("meta"), self.key("stream")];
        let args = |call: &mut Cmd| {
            call.arg(&known.epoch).arg(known.head).arg(&known.run).arg(&*self.run).arg(fresh);
        };
        let answer = self.run(&self.scripts.join, JOIN, &keys, args).await?;
        wire::as_place(&answer, &self.run).ok_or_else(|| misunderstood("the join"))
    }

    async fn append(&self, batch: &Batch) -> Result<Appended> {
        let hub = format!("hub:{}", self.hub);
        let keys = ["meta", "stream", "marks", "seen", &hub, "intake"].map(|name| self.key(name));
        let args = |call: &mut Cmd| {
            call.arg(&*self.hub).arg(batch.number).arg(&batch.known.epoch).arg(batch.known.head).arg(&batch.fresh);
            call.arg(self.names.keep).arg(LARGEST_MESSAGE).arg(&self.names.live).arg(REMEMBERED);
            for entry in &batch.entries {
                match &entry.claim {
                    Claim::Turn { emitter, session, from, upto } => {
                        call.arg("turn").arg(&**emitter).arg(session).arg(*from).arg(*upto);
                    }
                    Claim::Hello { emitter, session, epoch, floor } => {
                        call.arg("hello").arg(&**emitter).arg(session).arg(epoch).arg(*floor);
                    }
                    Claim::Plain => drop(call.arg("plain").arg("").arg("").arg("").arg("")),
                    Claim::Intake => drop(call.arg("intake").arg("").arg("").arg("").arg("")),
                }
                call.arg(entry.count).arg(&entry.records[..]);
            }
        };
        let answer = self.run(&self.scripts.append, APPEND, &keys, args).await?;
        wire::as_appended(&answer, batch.entries.len()).ok_or_else(|| misunderstood("a batch"))
    }

    async fn fill(&self, from: u64, most: usize) -> Result<Filled> {
        let mut reading = pipe();
        // Of one moment: between two commands another epoch could begin.
        reading.atomic();
        reading.cmd("HMGET").arg(self.key("meta")).arg("epoch").arg("head");
        reading.cmd("XRANGE").arg(self.key("stream")).arg(format!("{from}-0")).arg("+").arg("COUNT").arg(most);
        let answer: ((Option<String>, Option<u64>), Vec<Value>) = reading
            .query_async(&mut self.connection.clone())
            .await
            .map_err(|error| failure("Redis refused to give a stretch of the stream", &error))?;
        let ((epoch, head), entries) = answer;
        let place = Place {
            epoch: epoch.unwrap_or_default(),
            head: head.unwrap_or_default(),
            run: self.run.to_string(),
            intake: false,
        };
        let blocks = entries.into_iter().map(block).collect::<Option<Vec<_>>>();
        Ok(Filled { place, blocks: blocks.ok_or_else(|| misunderstood("the stream"))? })
    }

    async fn probe(&self, number: u64) -> Result<Place> {
        let keys = [self.key("meta"), self.key("intake")];
        let args = |call: &mut Cmd| {
            call.arg(&*self.hub).arg(&self.probes).arg(number).arg(self.names.lease.as_millis() as u64);
        };
        let answer = self.run(&self.scripts.probe, PROBE, &keys, args).await?;
        wire::as_place(&answer, &self.run).ok_or_else(|| misunderstood("a probe"))
    }
}

/// An entry of the stream; its records are taken, not copied.
fn block(entry: Value) -> Option<super::Stretch> {
    let Value::Array(entry) = entry else { return None };
    let [Value::BulkString(id), Value::Array(fields)] = <[Value; 2]>::try_from(entry).ok()? else { return None };
    let [_, Value::BulkString(count), _, Value::BulkString(records)] = <[Value; 4]>::try_from(fields).ok()? else {
        return None;
    };
    wire::as_block(std::str::from_utf8(&id).ok()?, std::str::from_utf8(&count).ok()?, records.into())
}

fn failure(what: &str, error: &RedisError) -> Error {
    Error::new(ErrorKind::BusDown, format!("{what}: {error}"))
}

fn misunderstood(what: &str) -> Error {
    let message = format!(
        "Redis answered {what} in a way that is not understood: keys of the same names belong to something else"
    );
    Error::new(ErrorKind::BusDown, message)
}
