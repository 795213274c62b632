//! All that the sessions of a hub share, in one pure value: log, marks, registry, counters. The machines act on it;
//! whoever drives them holds its lock, and never while waiting for anything.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use super::emitters::{Emitters, REMEMBERED};
use super::entry::{Filter, Record};
use super::log::{Log, LogLimits, NotRecovered};
use super::outbox::{Item, MAX_REPLAYS};
use super::presence::Presence;
use super::registry::{Registry, Role, SessionId};
use super::service::{Part, Service};
use crate::wire::close::CloseCode;
use crate::wire::frame::{HubFrame, Reconnect};
use crate::wire::position::Position;
use crate::wire::subscriber::{self, Carried, DEFLATE, Heartbeat, Reached, Slow, Subscribe, Subscribed, Wrapping};
use crate::wire::topic::Pattern;

/// Where a published event came to lie, and whom it reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Published {
    /// Its offset in the log.
    pub offset: u64,
    /// How many sessions of this hub it was queued for; with a bridge, how many hubs it was sent to.
    pub sessions: usize,
}

/// What happened so far. Each only grows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// Events appended.
    pub events: u64,
    /// Bytes of their JSON.
    pub event_bytes: u64,
    /// Gaps that emitters reported.
    pub gaps: u64,
    /// Events that came again and were acknowledged again.
    pub duplicates: u64,
    /// Events refused, each time they came: they are no JSON objects.
    pub refused: u64,
    /// Event frames queued for subscribers, replays not counted.
    pub delivered: u64,
    /// Entries queued as replay.
    pub replayed: u64,
    /// Positions that could not be served.
    pub not_recovered: u64,
    /// Acks of subscribers.
    pub acks: u64,
    /// Requests and sessions refused for want of a good token.
    pub auth_refused: u64,
    /// Emitter connections closed because a newer one took over.
    pub superseded: u64,
    /// Sessions closed, or frames refused, because they broke the protocol.
    pub bad_frames: u64,
}

/// See the module.
#[derive(Debug)]
pub struct State {
    /// The newest entries.
    pub log: Log,
    /// One mark for each emitter; unused where there is a keeper, which has them.
    pub emitters: Emitters,
    /// Who is connected.
    pub registry: Registry,
    /// How the hub itself is.
    pub service: Service,
    /// Whose hearts beat.
    pub presence: Presence,
    /// What happened so far.
    pub counters: Counters,
}

impl State {
    /// The state of a hub that begins. The epoch must be new.
    #[must_use]
    pub fn new(epoch: String, limits: LogLimits, queue_bytes: usize) -> Self {
        Self::resume(Log::new(epoch, limits), queue_bytes)
    }

    /// The state of a hub that goes on with a log.
    #[must_use]
    pub fn resume(log: Log, queue_bytes: usize) -> Self {
        Self {
            log,
            emitters: Emitters::new(REMEMBERED),
            registry: Registry::new(queue_bytes),
            service: Service::default(),
            presence: Presence::default(),
            counters: Counters::default(),
        }
    }

    /// The same state with settings for its sessions, see [`Registry::with`].
    #[must_use]
    pub fn with(self, slow: Slow, compression_threshold: Option<usize>) -> Self {
        Self { registry: self.registry.with(slow, compression_threshold), ..self }
    }

    /// The same state, bringing events to subscribers so.
    #[must_use]
    pub fn wrapping(self, wrapping: Wrapping) -> Self {
        Self { registry: self.registry.wrapping(wrapping), ..self }
    }

    /// The same state, watching heartbeats.
    #[must_use]
    pub fn watching(self, presence: Presence) -> Self {
        Self { presence, ..self }
    }

    /// Appends a record and brings it to the subscribers.
    pub fn append(&mut self, record: Record, now: Duration) -> Published {
        match record.carried() {
            Carried::Event => {
                self.counters.events += 1;
                self.counters.event_bytes += record.json().len() as u64;
            }
            Carried::Gap => self.counters.gaps += 1,
        }
        let entry = self.log.append(record, now);
        let sessions = self.registry.fan_out(&entry);
        self.counters.delivered += sessions as u64;
        Published { offset: entry.offset, sessions }
    }

    /// Appends records, one after another, and tells the place of the last.
    pub fn append_all(&mut self, records: Vec<Record>, now: Duration) -> Option<Published> {
        records.into_iter().map(|record| self.append(record, now)).last()
    }

    /// An emitter introduces itself; returns its mark. An older connection of the same emitter is closed.
    pub fn hello(&mut self, id: SessionId, emitter: &str, epoch: &str, next: u64) -> u64 {
        let (have, superseded) = self.emitters.hello(id, emitter, epoch, next);
        self.supersede(superseded);
        have
    }

    /// Closes a connection whose emitter has a newer one.
    pub fn supersede(&mut self, older: Option<SessionId>) {
        if let Some(older) = older {
            self.counters.superseded += 1;
            self.registry.order_close(older, CloseCode::Superseded);
        }
    }

    /// Adds patterns to a session, answers, and queues what it missed.
    #[expect(clippy::redundant_closure_for_method_calls, reason = "the method is for one lifetime of its answer")]
    pub fn subscribe(&mut self, id: SessionId, wanted: &Subscribe, now: Duration) {
        self.subscribe_with(id, wanted, now, |answer| answer.encode());
    }

    /// The same, answering in the words of the session's own protocol.
    pub fn subscribe_with(
        &mut self,
        id: SessionId,
        wanted: &Subscribe,
        now: Duration,
        words: impl FnOnce(&Subscribed<'_>) -> bytes::Bytes,
    ) {
        if let Some(slow) = wanted.slow {
            self.registry.set_slow(id, slow);
        }
        let compression =
            wanted.deflate.is_some_and(|deflate| self.registry.set_deflates(id, deflate)).then_some(DEFLATE);
        let events = self.registry.granted(id, Filter::new(wanted.events.iter().cloned()));
        let filter_before = self.registry.own_filter(id);
        let filter = filter_before.with(events.patterns());
        let recovery = wanted.since.as_ref().map(|position| {
            self.can_recover(id, position, now)?;
            Ok(self.registry.cursor(id, events, position.offset, &self.log))
        });
        if matches!(recovery, Some(Err(NotRecovered::Doubtful))) {
            // An answer now could be wrong, and whoever waited would keep events from the session: it comes back, to a hub
            // that knows, or when this one does.
            return self.registry.order_close(id, CloseCode::Degraded);
        }
        let epoch = self.log.epoch();
        let offset = match (&wanted.since, &recovery) {
            (Some(since), Some(Ok(_))) => self.log.head().max(since.offset),
            _ => self.place(id),
        };
        let mut answer = Subscribed {
            events: filter.patterns().iter().map(Pattern::as_str).collect(),
            epoch,
            offset,
            recovered: recovery.as_ref().map(Result::is_ok),
            replayed: None,
            reason: None,
            compression,
        };
        match &recovery {
            None => {}
            Some(Ok(cursor)) => {
                answer.replayed = Some(cursor.left());
                self.counters.replayed += cursor.left();
            }
            Some(Err(reason)) => {
                answer.reason = reason.word();
                self.counters.not_recovered += 1;
            }
        }
        self.registry.push(id, words(&answer));
        if let Some(Ok(cursor)) = recovery {
            self.registry.push_replay(id, cursor);
        }
        if let Some(notice) = self.service.notice() {
            self.registry.tell(id, notice);
        }
        self.registry.set_filter(id, filter);
        self.registry.set_prev(id, offset);
    }

    /// Whether a session can be given everything since a position.
    ///
    /// # Errors
    /// Why not.
    pub fn can_recover(&mut self, id: SessionId, position: &Position, now: Duration) -> Result<(), NotRecovered> {
        drop(self.log.since(position, now)?);
        // It has one place for all that it listens to. Where other hubs are and this one is not yet, that could not be
        // right both for what it has and for what is added.
        let listens = !self.registry.own_filter(id).patterns().is_empty();
        if listens && self.place(id) != position.offset.max(self.log.head()) {
            return Err(NotRecovered::Doubtful);
        }
        if self.registry.replays(id) >= MAX_REPLAYS {
            return Err(NotRecovered::Limit);
        }
        Ok(())
    }

    /// What is new to a session comes after this: the newest event, or where it stood when it came from a hub that knows
    /// newer ones.
    fn place(&self, id: SessionId) -> u64 {
        self.reached(id).unwrap_or(self.log.head())
    }

    /// How far a session is once it has read what waits for it: all that it wants up to there was queued, or told to be
    /// left out. `None` if it listens to nothing.
    #[must_use]
    pub fn reached(&self, id: SessionId) -> Option<u64> {
        let listens = !self.registry.filter(id).patterns().is_empty();
        // It may have come from a hub that is ahead of this one.
        listens.then(|| self.log.head().max(self.registry.prev(id)))
    }

    /// What a sign of life tells a session that is queued for it now.
    #[must_use]
    pub fn heartbeat(&self, id: SessionId) -> Heartbeat<'_> {
        let reached = self.reached(id).map(|offset| Reached { epoch: self.log.epoch(), offset });
        Heartbeat { last_seq: self.registry.prev(id), reached }
    }

    /// Moves what is queued for a session to `into`, about `budget` bytes, see [`Registry::take`].
    pub fn take(&mut self, id: SessionId, budget: usize, into: &mut VecDeque<Item>) {
        self.registry.take(id, budget, into, &self.log);
    }

    /// Chooses for a session that has chosen nothing yet; its own first `subscribe` replaces this. What it may not have
    /// is left out, until it may.
    pub fn preset(&mut self, id: SessionId, events: &[Pattern]) {
        self.choose(id, Arc::new(Filter::new(events.iter().cloned())));
    }

    fn choose(&mut self, id: SessionId, chosen: Arc<Filter>) {
        let begins = self.registry.filter(id).patterns().is_empty();
        self.registry.set_preset(id, chosen);
        if begins {
            self.registry.set_prev(id, self.log.head());
        }
    }

    /// Says what a session may receive from now on, see [`Registry::set_grant`]; returns the patterns that it chose and
    /// loses.
    pub fn grant(&mut self, id: SessionId, grant: Option<Arc<Filter>>) -> Vec<Pattern> {
        let chosen = self.registry.preset(id);
        let taken = self.registry.set_grant(id, grant);
        match chosen {
            Some(chosen) => {
                self.choose(id, chosen);
                Vec::new()
            }
            None => taken,
        }
    }

    /// Notes how far a subscriber is; what it cannot have seen is answered as the bad frame that it is.
    pub fn record_ack(&mut self, id: SessionId, seq: u64) {
        match self.registry.record_ack(id, seq) {
            Ok(()) => self.counters.acks += 1,
            Err(last) => self.bad_frame(id, &format!("data.sequence is {seq}, the last one sent was {last}")),
        }
    }

    /// Answers a subscriber's frame that is wrong.
    pub fn bad_frame(&mut self, id: SessionId, message: &str) {
        self.counters.bad_frames += 1;
        self.registry.push(id, subscriber::error("bad_frame", message));
    }

    /// A part of the hub fails, or with `None` works again: whoever listens is told.
    pub fn trouble(&mut self, part: Part, trouble: Option<String>) {
        let Some(news) = self.service.set(part, trouble, self.log.head()) else { return };
        for (id, _) in self.registry.sessions() {
            if !self.registry.filter(id).patterns().is_empty() {
                self.registry.tell(id, news.clone());
            }
        }
    }

    /// The log begins anew in an epoch, behind the offset `head`, see [`Registry::restart`].
    pub fn restart(&mut self, epoch: String, head: u64) {
        self.log.restart(epoch, head);
        self.registry.restart();
    }

    /// The frames of at most `most` entries after an offset, oldest first, as a subscriber to everything gets them.
    pub fn frames_since(&mut self, offset: u64, most: usize, replay: bool, now: Duration) -> Vec<bytes::Bytes> {
        let entries = self.log.after(offset, now).take(most);
        entries.map(|entry| entry.frame(entry.offset - 1, replay)).collect()
    }

    /// Takes patterns from a session, and answers.
    pub fn unsubscribe(&mut self, id: SessionId, events: &[Pattern], answer: bytes::Bytes) {
        let filter = self.registry.filter(id).without(events);
        self.registry.set_filter(id, filter);
        self.registry.push(id, answer);
    }

    /// Answers a publisher whose event is none.
    pub fn refuse(&mut self, id: SessionId, answer: bytes::Bytes) {
        self.counters.refused += 1;
        self.registry.push(id, answer);
    }

    /// Says goodbye to everyone, each in its own protocol, and closes after what is queued.
    pub fn shutdown(&mut self, reconnect: Reconnect) {
        let code = CloseCode::Shutdown.code();
        let to_emitters: bytes::Bytes = HubFrame::Bye { code, reconnect }.encode().into();
        let to_subscribers = subscriber::bye(code, reconnect);
        for (id, role) in self.registry.sessions() {
            let bye = match role {
                Role::Emitter => to_emitters.clone(),
                Role::Subscriber | Role::Centrifugo | Role::Publisher => to_subscribers.clone(),
            };
            self.registry.acknowledge(id);
            self.registry.tell(id, bye);
            self.registry.order_close(id, CloseCode::Shutdown);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::subscriber::SubscriberFrame;

    fn state() -> State {
        State::new("k3f9".into(), LogLimits { events: 9, bytes: 1 << 20, age: None }, 1 << 20)
    }

    fn emit(state: &mut State, kind: &str) -> usize {
        let json = format!(r#"{{"type":"{kind}"}}"#);
        state.append(Record::event(json.into()).expect("valid"), Duration::ZERO).sessions
    }

    fn subscribe(state: &mut State, id: SessionId, pattern: &str) {
        subscribe_since(state, id, pattern, None);
    }

    fn subscribe_since(state: &mut State, id: SessionId, pattern: &str, since: Option<u64>) {
        let since = since.map(|offset| format!(r#","since":{{"epoch":"k3f9","offset":{offset}}}"#)).unwrap_or_default();
        let text = format!(r#"{{"type":"subscribe","data":{{"events":["{pattern}"]{since}}}}}"#);
        let Ok(SubscriberFrame::Subscribe(wanted)) = SubscriberFrame::decode(&text) else { panic!("{text}") };
        state.subscribe(id, &wanted, Duration::ZERO);
    }

    fn heard(state: &mut State, id: SessionId) -> Vec<String> {
        let mut items = VecDeque::new();
        state.take(id, usize::MAX, &mut items);
        let text = |item| match item {
            Item::Text(frame) => String::from_utf8_lossy(&frame).into_owned(),
            other => format!("{other:?}"),
        };
        items.into_iter().map(text).collect()
    }

    #[test]
    fn what_was_chosen_for_a_session_gives_way_to_its_own_choice() {
        let mut state = state();
        emit(&mut state, "a");
        let id = state.registry.open(Role::Subscriber);
        state.preset(id, &[Pattern::parse("*").expect("valid")]);
        assert_eq!(emit(&mut state, "b"), 1);
        assert_eq!(heard(&mut state, id), [r#"{"type":"event","seq":2,"prev":1,"data":{"type":"b"}}"#]);
        subscribe(&mut state, id, "c");
        assert_eq!((emit(&mut state, "b"), emit(&mut state, "c")), (0, 1));
        subscribe(&mut state, id, "b");
        assert_eq!((emit(&mut state, "b"), emit(&mut state, "c"), emit(&mut state, "a")), (1, 1, 0));
    }

    #[test]
    fn who_knows_events_alone_is_told_nothing_else_unasked() {
        let mut state = state().wrapping(Wrapping::Raw);
        let [id, framed] = [(); 2].map(|()| state.registry.open(Role::Subscriber));
        state.registry.set_wrapping(framed, Wrapping::Event);
        for id in [id, framed] {
            state.preset(id, &[Pattern::parse("*").expect("valid")]);
        }
        assert_eq!(emit(&mut state, "a"), 2);
        state.append(Record::gap("e", "x", 1, 2, "crash"), Duration::ZERO);
        state.trouble(Part::Log, Some("Disk.".into()));
        assert_eq!(heard(&mut state, id), [r#"{"type":"a"}"#]);
        assert_eq!(heard(&mut state, framed).len(), 3);
        let text = r#"{"type":"subscribe","data":{"events":["*"],"since":{"epoch":"k3f9","offset":0},"compression":"deflate"}}"#;
        let Ok(SubscriberFrame::Subscribe(wanted)) = SubscriberFrame::decode(text) else { panic!("{text}") };
        state.subscribe(id, &wanted, Duration::ZERO);
        let answers = heard(&mut state, id);
        assert!(answers[0].contains(r#""recovered":true"#) && !answers[0].contains("compression"), "{answers:?}");
        assert_eq!(answers[1..], [r#"{"type":"a"}"#]);
        state.shutdown(Reconnect { after: 0.1, jitter: 0.1 });
        assert_eq!(heard(&mut state, id), ["Close(Shutdown)"]);
    }

    #[test]
    fn what_was_chosen_for_a_session_is_given_as_far_as_it_is_granted() {
        let filter =
            |texts: &[&str]| Some(Arc::new(Filter::new(texts.iter().map(|text| Pattern::parse(text).expect("valid")))));
        let mut state = state();
        let id = state.registry.open(Role::Subscriber);
        state.grant(id, filter(&[]));
        state.preset(id, &[Pattern::parse("*").expect("valid")]);
        assert_eq!(emit(&mut state, "a"), 0, "nothing is known of it yet");
        assert!(state.grant(id, filter(&["a", "b"])).is_empty());
        assert_eq!((emit(&mut state, "a"), emit(&mut state, "c")), (1, 0));
        assert_eq!(heard(&mut state, id), [r#"{"type":"event","seq":2,"prev":1,"data":{"type":"a"}}"#]);
        assert!(state.grant(id, filter(&["b", "c"])).is_empty(), "it never chose what it loses");
        assert_eq!((emit(&mut state, "a"), emit(&mut state, "c")), (0, 1));
        assert_eq!(heard(&mut state, id), [r#"{"type":"event","seq":5,"prev":2,"data":{"type":"c"}}"#]);
        assert!(state.grant(id, None).is_empty());
        assert_eq!(emit(&mut state, "x"), 1);
        subscribe(&mut state, id, "c");
        assert_eq!((emit(&mut state, "x"), emit(&mut state, "c")), (0, 1));
    }

    #[test]
    fn trouble_is_told_to_those_who_listen_and_to_those_who_come_while_it_lasts() {
        let mut state = state();
        let [listens, silent] = [(); 2].map(|()| state.registry.open(Role::Subscriber));
        subscribe(&mut state, listens, "a");
        heard(&mut state, listens);
        state.trouble(Part::Log, Some("Disk.".into()));
        assert!(heard(&mut state, listens)[0].contains("degraded"));
        assert!(heard(&mut state, silent).is_empty());
        subscribe(&mut state, silent, "a");
        assert!(heard(&mut state, silent)[1].contains("degraded"));
        state.trouble(Part::Log, None);
        for id in [listens, silent] {
            assert!(heard(&mut state, id)[0].contains("healthy"));
        }
        subscribe(&mut state, listens, "b");
        assert_eq!(heard(&mut state, listens).len(), 1, "all is well");
    }

    #[test]
    fn who_was_further_elsewhere_gets_only_what_comes_after_that() {
        let mut state = state();
        emit(&mut state, "a");
        state.log.expect(3);
        let id = state.registry.open(Role::Subscriber);
        subscribe_since(&mut state, id, "*", Some(3));
        assert!(heard(&mut state, id)[0].contains(r#""offset":3,"recovered":true,"replayed":0"#));
        for kind in ["b", "c", "d"] {
            emit(&mut state, kind);
        }
        assert_eq!(heard(&mut state, id), [r#"{"type":"event","seq":4,"prev":3,"data":{"type":"d"}}"#]);
    }

    #[test]
    fn who_was_further_elsewhere_and_asks_for_more_keeps_one_place_or_comes_back() {
        let mut state = state();
        emit(&mut state, "a");
        state.log.expect(3);
        let id = state.registry.open(Role::Subscriber);
        for (pattern, since) in [("a", Some(3)), ("b", None), ("c", Some(3))] {
            subscribe_since(&mut state, id, pattern, since);
            let told = heard(&mut state, id);
            assert!(told.len() == 1 && told[0].contains(r#""offset":3"#), "{told:?}");
        }
        for kind in ["b", "a"] {
            emit(&mut state, kind);
            assert!(heard(&mut state, id).is_empty(), "it stands behind them");
        }
        emit(&mut state, "b");
        assert_eq!(heard(&mut state, id), [r#"{"type":"event","seq":4,"prev":3,"data":{"type":"b"}}"#]);
        state.log.expect(6);
        for (stands, wants) in [(6, 2), (6, 5), (4, 6)] {
            let id = state.registry.open(Role::Subscriber);
            subscribe_since(&mut state, id, "a", Some(stands));
            assert!(heard(&mut state, id)[0].contains(r#""recovered":true"#));
            subscribe_since(&mut state, id, "b", Some(wants));
            assert_eq!(heard(&mut state, id), ["Close(Degraded)"], "no place is right for both");
        }
    }

    #[test]
    fn the_log_is_read_as_a_subscriber_to_everything_would() {
        let mut state = state();
        for kind in ["a", "b", "c"] {
            emit(&mut state, kind);
        }
        let frames = state.frames_since(1, 1, true, Duration::ZERO);
        assert_eq!(frames, [&br#"{"type":"event","seq":2,"prev":1,"replay":true,"data":{"type":"b"}}"#[..]]);
    }
}
