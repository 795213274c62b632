//! The settings of a hub.

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::auth::{Auth, Checker};
use super::bridge::BridgeConfig;
use super::entities::Entities;
use super::entry::Filter;
use super::log::LogLimits;
use super::presence::Patience;
use crate::error::{Error, ErrorKind, Result};
use crate::wire::subscriber::{Slow, Wrapping};
use crate::wire::topic::Pattern;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
const GIB: usize = 1 << 30;

/// What a hub is started with. Every field has a default that is safe for one machine.
#[derive(Clone, Debug)]
pub struct HubConfig {
    /// Address or host name to listen on. Default `127.0.0.1`: other machines must be let in on purpose.
    pub host: String,
    /// TCP port; 0 takes any free one, see [`Hub::port`](super::Hub::port). Default 8000.
    pub port: u16,
    /// Most entries kept for subscribers that come back. Default 10 000: minutes of a busy dashboard.
    pub replay_events: usize,
    /// Most bytes kept for them. Default 16 MiB: large events must not make 10 000 of them unaffordable.
    pub replay_bytes: usize,
    /// How long an entry is kept at most. Default: no limit of time.
    pub replay_age: Option<Duration>,
    /// File of the durable log. With it, events that were acknowledged, offsets and the marks of emitters outlive the
    /// hub, even a `kill -9`; a loss of power ends the epoch. Default none: the log lives in memory.
    pub log_path: Option<PathBuf>,
    /// The bus over which several hubs share one stream of events. Default none: this hub is alone.
    pub bridge: Option<BridgeConfig>,
    /// Most bytes that may wait for one session; what happens to one that lets more wait says `slow`. Default 1 MiB: seconds of a busy dashboard, and 10 000 stuck ones stay below 10 GiB.
    pub session_queue_bytes: usize,
    /// What happens to a session at that bound, unless it chooses for itself. Default [`Slow::Disconnect`]: nothing is
    /// left out, and who wants less must say so.
    pub slow: Slow,
    /// What brings an event to a subscriber over a WebSocket. Default [`Wrapping::Event`]: without `seq` and `prev` nobody
    /// can prove that nothing is missing.
    pub envelope: Wrapping,
    /// From how many bytes on the data of an event is compressed for sessions that ask for it; `None`: never. Default
    /// 1024: below that there is little to gain, and a browser's inflation costs more than the bytes.
    pub compression_threshold: Option<usize>,
    /// Largest message taken from an emitter or over `/publish`. Default 16 MiB.
    pub max_message_bytes: usize,
    /// Most sessions at once; more are refused with 503. Default 10 000.
    pub max_sessions: usize,
    /// Most sessions of one address; more are refused with 429. Default no limit: behind a proxy all clients have its
    /// address.
    pub max_sessions_per_address: Option<usize>,
    /// Most sessions that begin in a second, and as many at once; more are refused with 503 and come back. Default
    /// 5000: a fleet of 10 000 that comes back as told is half as fast. Connections of any kind are accepted at twice that
    /// pace; more wait in the system's backlog.
    pub connect_rate: f64,
    /// Most frames of a subscriber in a second, and twice as many at once, pings, pongs and fragments included; beyond
    /// that it is closed with 3503. Default 500: acks for busy dashboards, and 0.1 % of a core.
    pub frame_rate: f64,
    /// Largest message taken from a subscriber. Default 64 KiB: hundreds of patterns; a message that is never finished
    /// costs no more.
    pub max_subscriber_message_bytes: usize,
    /// Origins (`https://dash.example`) whose pages may connect although they were not served from here; `*` allows
    /// every page. Default none: a page of another site must not read the events through its visitor's browser.
    pub allowed_origins: Vec<String>,
    /// How clients are known: no one needs a token by default, which suits a hub that only this machine reaches.
    pub auth: Auth,
    /// How long a session may take to show its token, and a callback to check one. Default 10 s.
    pub auth_timeout: Duration,
    /// PEM file of a certificate and those that lead to its issuer: the port then speaks TLS. Read again when it
    /// changes. Default none: a hub on loopback, or behind a proxy that ends TLS.
    pub tls_cert: Option<PathBuf>,
    /// PEM file of the private key that belongs to it.
    pub tls_key: Option<PathBuf>,
    /// Events that match one of these patterns ask subscribers for an ack. Default none: acks cost a frame each, and
    /// only say how far a client is; nothing is held back for them.
    pub requires_ack: Vec<Pattern>,
    /// Fields of an event, or of its `data`, that hold ids, and the topics that the ids stand for:
    /// `("characteristic_ids", "characteristic/{id}")`. An event matches subscriptions to each of them as to its own
    /// topic. Default none: what is not set costs nothing.
    pub entity_keys: Vec<(String, String)>,
    /// Heartbeats of engines: events of emitters that match one of these patterns. Whoever has sent one is watched.
    /// Default `graph.delta.heartbeat` and `presence.beacon`; none watches nobody.
    pub presence_events: Vec<Pattern>,
    /// Silence after which an engine is late. Default 45 s: a heartbeat each 30 s, and half of that for the way.
    pub presence_late: Duration,
    /// Silence after which it is dead. Default 60 s: two heartbeats did not come.
    pub presence_dead: Duration,
    /// How often a session is pinged; one that shows no sign of life until the next is closed. Default 25 s: below
    /// the 30 to 60 s after which proxies drop silent connections.
    pub ping_interval: Duration,
    /// HTML of `/`. Default a line of text; the Python package brings the dashboard.
    pub page: String,
}

impl Default for HubConfig {
    fn default() -> Self {
        Self {
            host: "127.0.0.1".to_owned(),
            port: 8000,
            replay_events: 10_000,
            replay_bytes: 16 * MIB,
            replay_age: None,
            log_path: None,
            bridge: None,
            session_queue_bytes: MIB,
            slow: Slow::Disconnect,
            envelope: Wrapping::Event,
            compression_threshold: Some(KIB),
            max_message_bytes: 16 * MIB,
            max_sessions: 10_000,
            max_sessions_per_address: None,
            connect_rate: 5000.0,
            frame_rate: 500.0,
            max_subscriber_message_bytes: 64 * KIB,
            allowed_origins: Vec::new(),
            auth: Auth::None,
            auth_timeout: Duration::from_secs(10),
            tls_cert: None,
            tls_key: None,
            requires_ack: Vec::new(),
            entity_keys: Vec::new(),
            presence_events: ["graph.delta.heartbeat", "presence.beacon"]
                .into_iter()
                .filter_map(|text| Pattern::parse(text).ok())
                .collect(),
            presence_late: Duration::from_secs(45),
            presence_dead: Duration::from_secs(60),
            ping_interval: Duration::from_secs(25),
            page: "<!doctype html><title>safe-broadcaster</title>The hub is running.".to_owned(),
        }
    }
}

impl HubConfig {
    /// Checks every setting.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] names the setting, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        if self.host.is_empty() {
            return Err(refused("host", "''", "a host name or an IP address"));
        }
        within("replay_events", self.replay_events, 0, 10_000_000)?;
        within("replay_bytes", self.replay_bytes, 0, 64 * GIB)?;
        within("session_queue_bytes", self.session_queue_bytes, 4 * KIB, GIB)?;
        within("max_message_bytes", self.max_message_bytes, KIB, GIB)?;
        if let Some(threshold) = self.compression_threshold {
            within("compression_threshold", threshold, 64, GIB)?;
        }
        within("max_sessions", self.max_sessions, 1, 1_000_000)?;
        if let Some(most) = self.max_sessions_per_address {
            within("max_sessions_per_address", most, 1, 1_000_000)?;
        }
        within("connect_rate", self.connect_rate, 0.1, 1e6)?;
        within("frame_rate", self.frame_rate, 1.0, 1e6)?;
        within("max_subscriber_message_bytes", self.max_subscriber_message_bytes, 4 * KIB, 16 * MIB)?;
        within("auth_timeout", self.auth_timeout.as_secs_f64(), 0.1, 3600.0)?;
        Checker::new(&self.auth, self.auth_timeout)?;
        self.entities()?;
        within("ping_interval", self.ping_interval.as_secs_f64(), 0.1, 3600.0)?;
        within("presence_late", self.presence_late.as_secs_f64(), 0.1, 1e6)?;
        within("presence_dead", self.presence_dead.as_secs_f64(), 0.1, 1e6)?;
        if self.presence_dead <= self.presence_late {
            let dead = self.presence_dead.as_secs_f64().to_string();
            return Err(refused("presence_dead", &dead, "more seconds than presence_late"));
        }
        if self.replay_age.is_some_and(|age| age.is_zero()) {
            return Err(refused("replay_age", "0", "more than 0 seconds, or none"));
        }
        match (&self.tls_cert, &self.tls_key) {
            (Some(_), None) => return Err(refused("tls_key", "none", "the key that belongs to tls_cert")),
            (None, Some(_)) => return Err(refused("tls_cert", "none", "the certificate that belongs to tls_key")),
            _ => {}
        }
        if self.log_path.is_some() {
            // A row of SQLite ends at 1 GB.
            within("max_message_bytes", self.max_message_bytes, KIB, GIB / 2)?;
        }
        if let Some(bridge) = &self.bridge {
            self.validate_bridge(bridge)?;
        }
        for origin in &self.allowed_origins {
            let host = origin.strip_prefix("https://").or_else(|| origin.strip_prefix("http://"));
            if origin != "*" && host.is_none_or(|host| host.is_empty() || host.contains('/')) {
                return Err(refused(
                    "allowed_origins",
                    &format!("'{origin}'"),
                    "https://host[:port] without a path, or *",
                ));
            }
        }
        Ok(())
    }

    fn validate_bridge(&self, bridge: &BridgeConfig) -> Result<()> {
        if let Some(path) = &self.log_path {
            let message = "none beside redis_client, because the stream in Redis is the log: leave one of the two out";
            return Err(refused("log_path", &path.display().to_string(), message));
        }
        // An argument of a script ends at 512 MB.
        within("max_message_bytes", self.max_message_bytes, KIB, 256 * MIB)?;
        within("bus_timeout", bridge.bus_timeout.as_secs_f64(), 0.1, 3600.0)?;
        within("probe_interval", bridge.probe_interval.as_secs_f64(), 0.05, 3600.0)?;
        within("max_recovery_attempts", bridge.max_recovery_attempts, 1, 1_000_000)?;
        within("breaker_cooldown", bridge.breaker_cooldown.as_secs_f64(), 0.0, 3600.0)
    }

    /// Certificate and key, if the port is to speak TLS.
    pub(super) fn tls_files(&self) -> Option<(&Path, &Path)> {
        self.tls_cert.as_deref().zip(self.tls_key.as_deref())
    }

    /// What `entity_keys` say.
    ///
    /// # Errors
    /// [`ErrorKind::Config`].
    pub(super) fn entities(&self) -> Result<Entities> {
        let keys = self.entity_keys.iter().map(|(name, topic)| (name.as_str(), topic.as_str()));
        Entities::new(keys).map_err(|(value, allowed)| refused("entity_keys", &value, &allowed))
    }

    /// What counts as a heartbeat.
    pub(super) fn heartbeats(&self) -> Filter {
        Filter::new(self.presence_events.iter().cloned())
    }

    /// How long a heartbeat may stay away.
    pub(super) fn patience(&self) -> Patience {
        Patience { late: self.presence_late, dead: self.presence_dead }
    }

    /// The bounds of the log.
    pub(super) fn log_limits(&self) -> LogLimits {
        LogLimits { events: self.replay_events, bytes: self.replay_bytes, age: self.replay_age }
    }
}

fn within<T: PartialOrd + Display + Copy>(setting: &str, value: T, least: T, most: T) -> Result<()> {
    // Written so that a NaN is outside.
    if value >= least && value <= most {
        return Ok(());
    }
    Err(refused(setting, &value.to_string(), &format!("{least} to {most}")))
}

fn refused(setting: &str, value: &str, allowed: &str) -> Error {
    Error::new(ErrorKind::Config, format!("{setting}={value} is not allowed: give {allowed}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_allowed() {
        HubConfig::default().validate().expect("valid");
    }

    #[test]
    fn a_refusal_names_setting_value_and_range() {
        let check = |change: fn(&mut HubConfig), words: [&str; 2]| {
            let mut config = HubConfig::default();
            change(&mut config);
            let error = config.validate().expect_err(words[0]);
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(words.iter().all(|word| error.to_string().contains(word)), "{error}");
        };
        check(|config| config.host.clear(), ["host=''", "IP address"]);
        check(|config| config.session_queue_bytes = 1, ["session_queue_bytes=1", "4096 to 1073741824"]);
        check(|config| config.compression_threshold = Some(1), ["compression_threshold=1", "64 to 1073741824"]);
        check(|config| config.max_sessions = 0, ["max_sessions=0", "1 to 1000000"]);
        check(|config| config.connect_rate = f64::NAN, ["connect_rate=NaN", "0.1 to"]);
        check(|config| config.frame_rate = 0.0, ["frame_rate=0", "1 to"]);
        check(|config| config.max_sessions_per_address = Some(0), ["max_sessions_per_address=0", "1 to"]);
        check(|config| config.max_subscriber_message_bytes = 1, ["max_subscriber_message_bytes=1", "4096 to"]);
        check(|config| config.tls_cert = Some("a.pem".into()), ["tls_key=none", "tls_cert"]);
        check(|config| config.tls_key = Some("a.pem".into()), ["tls_cert=none", "tls_key"]);
        check(|config| config.replay_age = Some(Duration::ZERO), ["replay_age=0", "more than 0"]);
        check(|config| config.auth_timeout = Duration::ZERO, ["auth_timeout=0", "0.1 to 3600"]);
        check(|config| config.auth = Auth::Tokens(Vec::new()), ["auth=(hidden)", "a token"]);
        check(|config| config.entity_keys = vec![("a".into(), "b".into())], ["entity_keys={'a': 'b'}", "{id}"]);
        check(|config| config.presence_late = Duration::ZERO, ["presence_late=0", "0.1 to"]);
        check(|config| config.presence_dead = config.presence_late, ["presence_dead=45", "presence_late"]);
        check(|config| config.ping_interval = Duration::ZERO, ["ping_interval=0", "0.1 to 3600"]);
        check(|config| config.allowed_origins.push("dash.example".into()), ["'dash.example'", "https://"]);
        check(|config| config.allowed_origins.push("https://a/b".into()), ["'https://a/b'", "without a path"]);
    }
}
