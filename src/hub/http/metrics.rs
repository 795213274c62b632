//! The numbers of `/stats` in the text format of Prometheus.

use std::fmt::Display;

use crate::hub::bridge::BridgeStats;
use crate::hub::shared::Shared;
use crate::hub::stats::HubStats;

const PREFIX: &str = "safe_broadcaster_hub_";

/// A page of all numbers.
pub(super) fn page(shared: &Shared) -> String {
    let stats = HubStats::read(shared);
    let mut page = Page(String::new());
    let of = &stats.counters;
    for (name, help, value) in [
        ("events", "Events appended to the log.", of.events),
        ("event_bytes", "Bytes of their JSON.", of.event_bytes),
        ("gaps", "Gaps that emitters reported.", of.gaps),
        ("duplicates", "Events that came again and were acknowledged again.", of.duplicates),
        ("refused", "Events refused, each time they came.", of.refused),
        ("delivered", "Event frames queued for subscribers, replays not counted.", of.delivered),
        ("replayed", "Entries queued as replay.", of.replayed),
        ("not_recovered", "Positions that could not be served.", of.not_recovered),
        ("acks", "Acks of subscribers.", of.acks),
        ("auth_refused", "Requests and sessions refused for want of a good token.", of.auth_refused),
        ("superseded", "Emitter connections closed because a newer one took over.", of.superseded),
        ("bad_frames", "Sessions closed, or frames refused, because they broke the protocol.", of.bad_frames),
        ("slow", "Sessions closed because they read too slowly.", stats.slow),
        ("shed", "Events left out because a session read too slowly that allows it.", stats.shed),
        ("conflated", "Events left out because a newer one with the same key came.", stats.conflated),
        ("encoded", "Frames put together for subscribers, each for as many as could share it.", stats.encoded),
        ("compressed", "How often the data of an event was compressed.", stats.compressed),
        ("log_failures", "How often the disk refused events.", stats.log_failures),
        ("log_commits", "Transactions of the log.", stats.log_commits),
    ] {
        page.one("counter", &format!("{name}_total"), help, value);
    }
    for (name, help, value) in [
        ("log_events", "Entries kept for replay.", stats.log_events),
        ("log_bytes", "What they cost, in bytes.", stats.log_bytes),
        ("queued_bytes", "Bytes that wait for the sockets of all sessions.", stats.queued_bytes),
        ("known_emitters", "Emitters whose mark is remembered.", stats.known_emitters),
        ("durable", "1 if the log is a file.", usize::from(stats.durable)),
        ("degraded", "1 if the disk refused the last events, or the bus is away.", usize::from(stats.degraded)),
        ("tls_failed", "1 if the files of the certificate cannot be used and an older one is.", {
            usize::from(stats.tls_error.is_some())
        }),
    ] {
        page.one("gauge", name, help, value);
    }
    if let Some(bridge) = &stats.bridge {
        page.bridge(bridge);
    }
    page.one("gauge", "offset", "Offset of the newest entry.", stats.offset);
    page.one("gauge", "uptime_seconds", "Seconds since the start.", stats.uptime);
    page.head("gauge", "sessions", "Sessions open now.");
    for (role, open) in
        [("emitter", stats.emitters), ("subscriber", stats.subscribers), ("publisher", stats.publishers)]
    {
        page.line("sessions", &format!("{{role=\"{role}\"}}"), open);
    }
    page.head("gauge", "presence", "Engines whose heartbeats are watched.");
    let presence = &stats.presence;
    for (state, count) in [("active", presence.active), ("late", presence.late), ("dead", presence.dead)] {
        page.line("presence", &format!("{{state=\"{state}\"}}"), count);
    }
    page.head("counter", "closes_total", "Sessions closed by the hub, by close code.");
    for (code, count) in &stats.closes {
        page.line("closes_total", &format!("{{code=\"{code}\"}}"), count);
    }
    page.head("gauge", "info", "The epoch of the log, which changes when offsets could repeat.");
    page.line("info", &format!("{{epoch=\"{}\"}}", stats.epoch), 1);
    page.0
}

struct Page(String);

impl Page {
    fn one(&mut self, kind: &str, name: &str, help: &str, value: impl Display) {
        self.head(kind, name, help);
        self.line(name, "", value);
    }

    fn bridge(&mut self, bridge: &BridgeStats) {
        for (name, help, value) in [
            ("losses", "Connections to the bus lost that had worked.", bridge.losses),
            ("failures", "Attempts to reach the bus in vain.", bridge.failures),
            ("probes", "Probes that came back.", bridge.probes),
            ("deaf", "Connections given up because a probe did not come back.", bridge.deaf),
            ("fills", "Gaps filled from the stream.", bridge.fills),
            ("restarts", "How often the log began anew.", bridge.restarts),
            ("batches", "Batches appended by this hub.", bridge.batches),
            ("plain", "Events taken in from the channel.", bridge.plain),
            ("plain_refused", "What came on the channel and is no event.", bridge.plain_refused),
        ] {
            self.one("counter", &format!("bridge_{name}_total"), help, value);
        }
        for (name, help, value) in [
            ("up", "1 if what is sent over the bus comes back.", usize::from(bridge.up)),
            ("local", "1 if events go to the sessions of this hub only.", usize::from(bridge.local)),
            ("waiting", "Ops that wait for the bus.", bridge.waiting),
        ] {
            self.one("gauge", &format!("bridge_{name}"), help, value);
        }
    }

    fn head(&mut self, kind: &str, name: &str, help: &str) {
        self.0.extend(["# HELP ", PREFIX, name, " ", help, "\n# TYPE ", PREFIX, name, " ", kind, "\n"]);
    }

    fn line(&mut self, name: &str, labels: &str, value: impl Display) {
        self.0.extend([PREFIX, name, labels, " ", &value.to_string(), "\n"]);
    }
}
