//! A bus that is a Redis, 6.2 or newer: a stream and a few keys behind scripts that Redis runs as one step, and a
//! channel for live messages.
//!
//! Each link has two connections, one that asks and one that hears, so that a large answer delays no live message and the
//! bound that Redis sets on subscribers never meets an answer.
//!
//! | key, in one cluster slot | |
//! |---|---|
//! | `{sb1:<channel>}:meta` | hash: epoch, head, bytes of the stream, and in which life of Redis the head was where |
//! | `{sb1:<channel>}:stream` | one entry for each batch, its id the offset of its last record |
//! | `{sb1:<channel>}:sizes` | list: last offset, bytes and time of each entry of the stream, by which it is bounded |
//! | `{sb1:<channel>}:marks`, `:seen` | mark and session of each emitter; when it was heard of last |
//! | `{sb1:<channel>}:hub:<name>` | the last batch of a hub and what became of it, for two hours |
//! | `{sb1:<channel>}:intake` | the hub that takes in plain events |
//! | `{sb1:<channel>}:rehearsal:…` | all of them once more, for a moment: whether the user has all rights |

mod address;
mod rights;
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
use super::{Appended, Batch, Bus, Claim, Entry, Filled, Known, Link, Message, Place};
use crate::error::{Error, ErrorKind, Result};
use crate::hub::emitters::REMEMBERED;
use crate::secret::Secret;
use address::Address;
use rights::{failure, is_passing};

const APPEND: &str = include_str!("append.lua");
const JOIN: &str = include_str!("join.lua");
const PROBE: &str = include_str!("probe.lua");
const LEAVE: &str = include_str!("leave.lua");

/// Larger blocks are only announced, and read from the stream by every hub: Redis cuts off a subscriber for whom 32 MiB
/// wait, or 8 MiB for a minute.
const LARGEST_MESSAGE: usize = 256 << 10;
/// The stream keeps so many records at least, however few a hub replays: gaps are filled from it.
const KEPT_AT_LEAST: usize = 10_000;
/// And of so many bytes, if they are that many: some seconds of a busy stream, for a hub that has to connect anew.
const BYTES_AT_LEAST: usize = 64 << 20;

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
    /// How many records the stream keeps; 10 000 at least.
    pub keep: usize,
    /// How many bytes of them at most; 64 MiB at least.
    pub keep_bytes: usize,
    /// For how long at most; `None`: as long as the other bounds allow.
    pub keep_age: Option<Duration>,
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
    keep_bytes: usize,
    /// In seconds; 0 for ever.
    keep_age: u64,
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
            keep_bytes: config.keep_bytes.max(BYTES_AT_LEAST),
            keep_age: config.keep_age.map_or(0, |age| age.as_secs_f64().ceil() as u64),
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
        let failed = |error: RedisError| failure(&format!("cannot use the Redis at {}", self.address), &error, "");
        let client = self.address.client(&format!("{}:meta", self.names.prefix)).await?;
        let probes = format!("{}:probe:{hub}", self.names.live);
        let (mut sink, stream) = client.get_async_pubsub().await.map_err(failed)?.split();
        sink.subscribe(&[&self.names.live, &probes, &self.names.plain]).await.map_err(failed)?;
        // No time-outs of its own: a probe tells whether answers come, and whoever connects waits no longer than it wants.
        let config = AsyncConnectionConfig::new().set_response_timeout(None).set_connection_timeout(None);
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
        let info: String = cmd("INFO").arg("server").query_async(&mut connection).await.map_err(failed)?;
        // One that is no Redis may not tell: then a life that lost something is known by its head alone.
        let run = run_id(&info).unwrap_or_else(|| "unknown".to_owned());
        let scripts = Arc::new(Scripts { append, join, probe });
        let link =
            RedisLink { connection, scripts, names: self.names.clone(), hub: hub.into(), probes, run: run.into() };
        let rehearsed = link.rehearse().await.or_else(|error| if is_passing(&error) { Ok(()) } else { Err(error) });
        rehearsed.map_err(|error| failure(&format!("cannot use the Redis at {}", self.address), &error, APPEND))?;
        let (speaker, hearing) = hearing::channel();
        drop(tokio::spawn(listen(stream, sink, speaker, self.names.clone())));
        Ok((link, hearing))
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
        let mut connection = self.connection.clone();
        let answer = match call("EVALSHA", hash, keys, &args).query_async(&mut connection).await {
            Err(error) if error.kind() == redis::ErrorKind::Server(ServerErrorKind::NoScript) => {
                call("EVAL", source, keys, &args).query_async(&mut connection).await
            }
            answer => answer,
        };
        answer.map_err(|error| failure("Redis refused a step of the bridge", &error, source))
    }

    fn keys_of_a_batch(&self, place: &str) -> [String; 7] {
        let hub = format!("hub:{}", self.hub);
        ["meta", "stream", "marks", "seen", &hub, "intake", "sizes"].map(|name| self.key(&format!("{place}{name}")))
    }

    fn batch(&self, call: &mut Cmd, batch: &Batch, live: &str, remember: usize, keep_bytes: usize) {
        let names = &self.names;
        call.arg(&*self.hub).arg(batch.number).arg(&batch.known.epoch).arg(batch.known.head).arg(&batch.fresh);
        call.arg(names.keep).arg(LARGEST_MESSAGE).arg(live).arg(remember).arg(keep_bytes).arg(names.keep_age);
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
    }

    /// Appends a batch to a stream of its own, reads it, and leaves no trace: what the user may not do is told now, and not
    /// by the first event.
    async fn rehearse(&self) -> Result<(), RedisError> {
        let keys = self.keys_of_a_batch("rehearsal:");
        let claim = Claim::Hello { emitter: "e".into(), session: "s".to_owned(), epoch: "1".to_owned(), floor: 0 };
        let records = Bytes::from_static(&[0; 8]);
        let entries = vec![
            Entry { claim, count: 0, records: Bytes::new() },
            Entry { claim: Claim::Plain, count: 2, records },
            Entry { claim: Claim::Intake, count: 0, records: Bytes::new() },
        ];
        let batch = |number| Batch { number, known: Known::default(), fresh: "f".to_owned(), entries: entries.clone() };
        let live = format!("{}:rehearsal", self.names.live);
        let mut all = pipe();
        for (number, verb, script) in [(1, "EVALSHA", &*self.scripts.append), (2, "EVAL", APPEND)] {
            // Nothing is kept and nobody remembered, so that something is trimmed and somebody forgotten.
            let args = |call: &mut Cmd| self.batch(call, &batch(number), &live, 0, 0);
            all.add_command(call(verb, script, &keys, &args));
        }
        all.cmd("XRANGE").arg(&keys[1]).arg("-").arg("+").arg("COUNT").arg(1);
        all.cmd("HMGET").arg(&keys[0]).arg("epoch");
        all.cmd("DEL").arg(&keys);
        all.query_async::<Vec<Value>>(&mut self.connection.clone()).await.map(drop)
    }
}

fn call(verb: &str, script: &str, keys: &[String], args: &impl Fn(&mut Cmd)) -> Cmd {
    let mut call = cmd(verb);
    call.arg(script).arg(keys.len()).arg(keys);
    args(&mut call);
    call
}

impl Link for RedisLink {
    async fn join(&self, known: &Known, fresh: &str) -> Result<Place> {
        let keys = ["meta", "stream", "sizes"].map(|name| self.key(name));
        let args = |call: &mut Cmd| {
            call.arg(&known.epoch).arg(known.head).arg(&known.run).arg(&*self.run).arg(fresh);
        };
        let answer = self.run(&self.scripts.join, JOIN, &keys, args).await?;
        wire::as_joined(&answer).ok_or_else(|| misunderstood("the join"))
    }

    async fn append(&self, batch: &Batch) -> Result<Appended> {
        let keys = self.keys_of_a_batch("");
        let names = &self.names;
        let args = |call: &mut Cmd| self.batch(call, batch, &names.live, REMEMBERED, names.keep_bytes);
        let answer = self.run(&self.scripts.append, APPEND, &keys, args).await?;
        wire::as_appended(&answer, batch.entries.len()).ok_or_else(|| misunderstood("a batch"))
    }

    async fn fill(&self, from: u64, most: usize) -> Result<Filled> {
        // No transaction: a Redis without memory refuses those, and what it has must still be read. Whatever is read
        // between two looks at the same epoch belongs to it, for none comes twice.
        let mut reading = pipe();
        let (meta, stream) = (self.key("meta"), self.key("stream"));
        reading.cmd("HMGET").arg(&meta).arg("epoch").arg("head");
        reading.cmd("XRANGE").arg(stream).arg(format!("{from}-0")).arg("+").arg("COUNT").arg(most);
        reading.cmd("HMGET").arg(&meta).arg("epoch").arg("head");
        let (before, entries, after): (Look, Vec<Value>, Look) = reading
            .query_async(&mut self.connection.clone())
            .await
            .map_err(|error| failure("Redis refused to give a stretch of the stream", &error, ""))?;
        let as_place = |(epoch, head): Look| Place {
            epoch: epoch.unwrap_or_default(),
            head: head.unwrap_or_default(),
            ..Place::default()
        };
        if before.0 != after.0 {
            return Ok(Filled { place: as_place(after), blocks: Vec::new() });
        }
        let place = as_place(before);
        let blocks = entries.into_iter().map(block).collect::<Option<Vec<_>>>();
        Ok(Filled { place, blocks: blocks.ok_or_else(|| misunderstood("the stream"))? })
    }

    async fn probe(&self, number: u64) -> Result<Place> {
        let keys = [self.key("meta"), self.key("intake")];
        let args = |call: &mut Cmd| {
            call.arg(&*self.hub).arg(&self.probes).arg(number).arg(self.names.lease.as_millis() as u64);
        };
        let answer = self.run(&self.scripts.probe, PROBE, &keys, args).await?;
        wire::as_probed(&answer).ok_or_else(|| misunderstood("a probe"))
    }

    async fn leave(&self) -> Result<()> {
        let call = call("EVAL", LEAVE, &[self.key("intake")], &|call: &mut Cmd| {
            call.arg(&*self.hub).arg(&self.names.live);
        });
        let left: Result<(), RedisError> = call.query_async(&mut self.connection.clone()).await;
        left.map_err(|error| failure("Redis refused a goodbye", &error, LEAVE))
    }
}

/// The head of the stream in an epoch, where there is one.
type Look = (Option<String>, Option<u64>);

/// An entry of the stream; its records are taken, not copied.
fn block(entry: Value) -> Option<super::Stretch> {
    let Value::Array(entry) = entry else { return None };
    let [Value::BulkString(id), Value::Array(fields)] = <[Value; 2]>::try_from(entry).ok()? else { return None };
    let [_, Value::BulkString(count), _, Value::BulkString(records)] = <[Value; 4]>::try_from(fields).ok()? else {
        return None;
    };
    wire::as_block(std::str::from_utf8(&id).ok()?, std::str::from_utf8(&count).ok()?, records.into())
}

fn misunderstood(what: &str) -> Error {
    let message = format!(
        "Redis answered {what} in a way that is not understood: keys of the same names belong to something else"
    );
    Error::new(ErrorKind::BusDown, message)
}
