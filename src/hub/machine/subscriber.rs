//! A subscriber's session. A frame that is wrong is answered and forgotten: a dashboard with one bad button keeps
//! its other panels.

use std::time::Duration;

use super::Access;
use crate::hub::auth::Grant;
use crate::hub::registry::SessionId;
use crate::hub::state::State;
use crate::secret::Secret;
use crate::wire::subscriber::{self, MAX_PATTERNS, SubscriberFrame};

/// See the module.
#[derive(Debug)]
pub struct SubscriberMachine {
    id: SessionId,
}

impl SubscriberMachine {
    /// The machine of a session that was just opened.
    #[must_use]
    pub fn new(id: SessionId) -> Self {
        Self { id }
    }

    /// A text frame came. A token that it brings is to be checked before the next frame.
    pub fn on_text(&mut self, text: &str, access: &mut Access, state: &mut State, now: Duration) -> Option<Secret> {
        if access.grant().is_none() && state.registry.is_closing(self.id) {
            return None;
        }
        match (SubscriberFrame::decode(text), access.grant()) {
            (Ok(SubscriberFrame::Auth { token }), _) => return Some(token),
            (Ok(SubscriberFrame::Ping), _) => self.pong(state),
            (_, None) => access.on_stranger(state),
            (Ok(frame), Some(grant)) => self.on_frame(frame, grant, state, now),
            (Err(message), _) => self.refuse(state, &message),
        }
        None
    }

    /// A binary frame came; subscribers speak text.
    pub fn on_binary(&mut self, access: &mut Access, state: &mut State) {
        match access.grant() {
            Some(_) => self.refuse(state, "subscribers send JSON in text frames, not binary ones"),
            None => access.on_stranger(state),
        }
    }

    fn on_frame(&mut self, frame: SubscriberFrame, grant: &Grant, state: &mut State, now: Duration) {
        match frame {
            SubscriberFrame::Subscribe(wanted) => {
                if let Some(pattern) = wanted.events.iter().find(|pattern| !grant.may_subscribe(pattern)) {
                    let message = format!("the token does not grant all of {}", pattern.as_str());
                    state.registry.push(self.id, subscriber::error("not_allowed", &message));
                } else if state.registry.own_filter(self.id).with(&wanted.events).patterns().len() > MAX_PATTERNS {
                    self.refuse(state, &format!("a session has at most {MAX_PATTERNS} patterns"));
                } else {
                    state.subscribe(self.id, &wanted, now);
                }
            }
            SubscriberFrame::Unsubscribe { events } => {
                state.unsubscribe(self.id, &events, subscriber::unsubscribed(&events));
            }
            SubscriberFrame::Ack { sequence } => state.record_ack(self.id, sequence),
            SubscriberFrame::Auth { .. } | SubscriberFrame::Ping | SubscriberFrame::Pong | SubscriberFrame::Unknown => {
            }
        }
    }

    fn pong(&self, state: &mut State) {
        let pong = state.heartbeat(self.id).pong();
        state.registry.push(self.id, pong);
    }

    fn refuse(&self, state: &mut State, message: &str) {
        state.bad_frame(self.id, message);
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;
    use crate::hub::entry::Record;
    use crate::hub::log::LogLimits;
    use crate::hub::outbox::Item;
    use crate::hub::registry::Role;
    use serde_json::{Value, json};

    const NOW: Duration = Duration::ZERO;

    struct Session {
        state: State,
        id: SessionId,
        machine: SubscriberMachine,
        access: Access,
        shown: Vec<String>,
    }

    impl Session {
        fn new(kept: usize) -> Self {
            let limits = LogLimits { events: kept, bytes: 1 << 20, age: None };
            let mut state = State::new("k3f9".into(), limits, 1 << 20);
            let id = state.registry.open(Role::Subscriber);
            let access = Access::granted(id, Grant::everything(), None);
            Self { state, id, machine: SubscriberMachine::new(id), access, shown: Vec::new() }
        }

        fn emit(&mut self, kind: &str) {
            let record = Record::event(json!({"type": kind}).to_string().into()).expect("valid");
            self.state.append(record, NOW);
        }

        fn say(&mut self, frame: &str) -> Vec<Value> {
            self.hear(frame);
            self.heard()
        }

        fn hear(&mut self, frame: &str) {
            if let Some(token) = self.machine.on_text(frame, &mut self.access, &mut self.state, NOW) {
                self.shown.push(token.expose().to_owned());
            }
        }

        fn heard(&mut self) -> Vec<Value> {
            let mut items = VecDeque::new();
            self.state.take(self.id, usize::MAX, &mut items);
            let read = |item| match item {
                Item::Text(frame) => serde_json::from_slice(&frame).expect("json"),
                other => json!(format!("{other:?}")),
            };
            items.into_iter().map(read).collect()
        }
    }

    #[test]
    fn the_first_live_event_continues_the_position_given() {
        let mut session = Session::new(100);
        session.emit("a");
        session.emit("a");
        let heard = session.say(r#"{"type":"subscribe","data":{"events":["b","c.*"]}}"#);
        assert_eq!(heard, [json!({"action":"subscribed","events":["b","c.*"],"epoch":"k3f9","offset":2})]);
        session.emit("a");
        session.emit("b");
        session.emit("c.d");
        let b = json!({"type":"event","seq":4,"prev":2,"data":{"type":"b"}});
        let c = json!({"type":"event","seq":5,"prev":4,"data":{"type":"c.d"}});
        assert_eq!(session.heard(), [b, c]);
    }

    #[test]
    fn who_comes_back_gets_what_was_missed_in_place() {
        let mut session = Session::new(100);
        for kind in ["a", "b", "a", "b"] {
            session.emit(kind);
        }
        let subscribe = r#"{"type":"subscribe","data":{"events":["a"],"since":{"epoch":"k3f9","offset":1}}}"#;
        session.hear(subscribe);
        session.emit("a");
        let position = json!({"action":"subscribed","events":["a"],"epoch":"k3f9","offset":4,
                              "recovered":true,"replayed":1});
        let replay = json!({"type":"event","seq":3,"prev":1,"replay":true,"data":{"type":"a"}});
        let live = json!({"type":"event","seq":5,"prev":4,"data":{"type":"a"}});
        assert_eq!(session.heard(), [position, replay, live]);
    }

    #[test]
    fn who_cannot_recover_is_told_why_and_gets_a_fresh_position() {
        let mut session = Session::new(1);
        session.emit("a");
        session.emit("a");
        for (epoch, offset, reason) in [("old", 2, "epoch"), ("k3f9", 0, "truncated"), ("k3f9", 9, "ahead")] {
            let since = json!({"type":"subscribe","data":{"events":["a"],"since":{"epoch":epoch,"offset":offset}}});
            let heard = session.say(&since.to_string());
            assert_eq!(
                heard,
                [json!({"action":"subscribed","events":["a"],"epoch":"k3f9","offset":2,
                        "recovered":false,"reason":reason})]
            );
        }
    }

    #[test]
    fn replays_follow_each_other_in_order_up_to_a_limit() {
        let mut session = Session::new(100);
        session.emit("a");
        session.emit("b");
        let subscribe =
            |kind: &str| json!({"type":"subscribe","data":{"events":[kind],"since":{"epoch":"k3f9","offset":0}}});
        for n in 0..20 {
            let frame = subscribe(if n % 2 == 0 { "a" } else { "b" }).to_string();
            session.hear(&frame);
        }
        session.emit("a");
        let heard = session.heard();
        assert_eq!(heard.len(), 2 * 16 + 4 + 1);
        for (n, pair) in heard[..32].chunks(2).enumerate() {
            assert_eq!((&pair[0]["recovered"], &pair[0]["replayed"]), (&json!(true), &json!(1)));
            assert_eq!((&pair[1]["seq"], &pair[1]["prev"]), (&json!(1 + n % 2), &json!(0)));
        }
        for refused in &heard[32..36] {
            assert_eq!((&refused["recovered"], &refused["reason"]), (&json!(false), &json!("limit")));
            assert_eq!(refused["offset"], 2, "a fresh position is there all the same");
        }
        assert_eq!(heard[36], json!({"type":"event","seq":3,"prev":2,"data":{"type":"a"}}));
        assert_eq!(session.say(&subscribe("a").to_string())[0]["recovered"], true, "there is room again");
    }

    #[test]
    fn a_replay_that_the_log_overtakes_closes_the_session_and_it_is_told_truncated() {
        let mut session = Session::new(4);
        for _ in 0..4 {
            session.emit("a");
        }
        let since = |offset: u64| {
            json!({"type":"subscribe","data":{"events":["a"],"since":{"epoch":"k3f9","offset":offset}}}).to_string()
        };
        session.hear(&since(0));
        session.emit("a");
        let heard = session.heard();
        assert_eq!((&heard[0]["replayed"], &heard[1]), (&json!(4), &json!("Close(Slow)")));
        assert_eq!((heard.len(), session.state.registry.counts().slow), (2, 1));
        session.id = session.state.registry.open(Role::Subscriber);
        session.machine = SubscriberMachine::new(session.id);
        session.access = Access::granted(session.id, Grant::everything(), None);
        assert_eq!(session.say(&since(0))[0]["reason"], "truncated");
    }

    #[test]
    fn a_grant_that_becomes_narrower_reaches_replays_on_their_way() {
        let mut session = Session::new(100);
        for kind in ["a", "b", "a"] {
            session.emit(kind);
        }
        let subscribe = r#"{"type":"subscribe","data":{"events":["a","b","c"],"since":{"epoch":"k3f9","offset":0}}}"#;
        let only = |kind| {
            Some(std::sync::Arc::new(crate::hub::entry::Filter::new([
                crate::wire::topic::Pattern::parse(kind).expect("valid")
            ])))
        };
        session.hear(subscribe);
        session.state.registry.set_grant(session.id, only("b"));
        session.emit("a");
        session.emit("b");
        let seqs = |heard: &[Value]| heard.iter().map(|frame| frame["seq"].clone()).collect::<Vec<_>>();
        let heard = session.heard();
        assert_eq!(seqs(&heard), [json!(null), json!(2), json!(5)]);
        // And what is asked for under it gets no more.
        let heard = session.say(subscribe);
        assert_eq!((&heard[0]["events"], &heard[0]["replayed"]), (&json!(["b"]), &json!(2)));
        assert_eq!(seqs(&heard[1..]), [json!(2), json!(5)]);
    }

    #[test]
    fn a_fresh_token_with_a_narrower_grant_reaches_replays_on_their_way() {
        use crate::hub::auth::{Grant, Scope};
        use crate::hub::machine::Access;
        let mut session = Session::new(100);
        for kind in ["a", "b", "a"] {
            session.emit(kind);
        }
        let subscribe = r#"{"type":"subscribe","data":{"events":["a","b"],"since":{"epoch":"k3f9","offset":0}}}"#;
        let mut access = Access::granted(session.id, Grant::everything(), None);
        session.machine.on_text(subscribe, &mut access, &mut session.state, NOW);
        let only_b = Scope::new([crate::wire::topic::Pattern::parse("b").expect("valid")]);
        let grant = Grant { subscribe: Some(only_b), ..Grant::everything() };
        access.on_checked(Ok((grant, None)), Role::Subscriber, &mut session.state);
        let heard = session.heard();
        let seqs: Vec<_> = heard.iter().filter_map(|frame| frame["seq"].as_u64()).collect();
        assert_eq!(seqs, [2]);
        assert!(heard.contains(&json!({"action":"unsubscribed","events":["a"]})));
    }

    #[test]
    fn impossible_positions_are_answered() {
        let mut session = Session::new(100);
        session.emit("a");
        for bad in ["-1", "1.5", "18446744073709551616", "\"1\"", "null"] {
            let subscribe = format!(
                r#"{{"type":"subscribe","data":{{"events":["a"],"since":{{"epoch":"k3f9","offset":{bad}}}}}}}"#
            );
            assert_eq!(session.say(&subscribe)[0]["data"]["code"], "bad_frame", "{bad}");
        }
        for (epoch, offset, reason) in
            [("", 1, "epoch"), ("", 0, "epoch"), ("k3f9", u64::MAX, "ahead"), ("k3f9", 2, "ahead")]
        {
            let since = json!({"type":"subscribe","data":{"events":["a"],"since":{"epoch":epoch,"offset":offset}}});
            let heard = session.say(&since.to_string());
            assert_eq!(
                (&heard[0]["recovered"], &heard[0]["reason"]),
                (&json!(false), &json!(reason)),
                "{epoch} {offset}"
            );
        }
    }

    #[test]
    fn patterns_come_and_go() {
        let mut session = Session::new(100);
        session.say(r#"{"type":"subscribe","data":{"events":["a"]}}"#);
        let heard = session.say(r#"{"type":"subscribe","data":{"events":["b"]}}"#);
        assert_eq!(heard[0]["events"], json!(["a", "b"]));
        let heard = session.say(r#"{"type":"unsubscribe","data":{"events":["a"]}}"#);
        assert_eq!(heard, [json!({"action":"unsubscribed","events":["a"]})]);
        session.emit("a");
        session.emit("b");
        assert_eq!(session.heard(), [json!({"type":"event","seq":2,"prev":0,"data":{"type":"b"}})]);
    }

    #[test]
    fn pings_are_answered_and_the_rest_is_taken() {
        let mut session = Session::new(100);
        session.say(r#"{"type":"subscribe","data":{"events":["*"]}}"#);
        session.emit("a");
        session.heard();
        assert_eq!(session.say(r#"{"type":"ping"}"#)[0]["lastSeq"], 1);
        for quiet in [r#"{"type":"ack","data":{"sequence":1}}"#, r#"{"type":"pong"}"#, r#"{"type":"later"}"#] {
            assert!(session.say(quiet).is_empty(), "{quiet}");
        }
    }

    #[test]
    fn a_pong_tells_how_far_the_session_is_behind_all_that_waits_for_it() {
        let mut session = Session::new(100);
        let ping = r#"{"type":"ping"}"#;
        session.emit("a");
        assert_eq!(session.say(ping), [json!({"type":"pong","lastSeq":0})], "it wants nothing yet");
        session.hear(r#"{"type":"subscribe","data":{"events":["rare"],"since":{"epoch":"k3f9","offset":0}}}"#);
        session.emit("rare");
        session.emit("a");
        session.hear(ping);
        session.emit("rare");
        let heard = session.heard();
        assert_eq!(heard[1]["seq"], 2);
        assert_eq!(heard[2], json!({"type":"pong","lastSeq":2,"epoch":"k3f9","offset":3}));
        assert_eq!((&heard[3]["seq"], &heard[3]["prev"]), (&json!(4), &json!(2)), "the chain is of events");
        session.say(r#"{"type":"unsubscribe","data":{"events":["rare"]}}"#);
        assert_eq!(session.say(ping), [json!({"type":"pong","lastSeq":4})]);
    }

    #[test]
    fn events_that_want_an_ack_say_so_live_and_replayed() {
        let mut session = Session::new(100);
        let limits = LogLimits { events: 9, bytes: 1 << 20, age: None };
        let wanted = crate::hub::entry::Filter::new([crate::wire::topic::Pattern::parse("alert.*").expect("valid")]);
        let noting = crate::hub::log::Noting { requires_ack: wanted, ..Default::default() };
        session.state.log = crate::hub::log::Log::new("k3f9".into(), limits).noting(noting);
        session.say(r#"{"type":"subscribe","data":{"events":["*"]}}"#);
        session.emit("alert.disk");
        session.emit("other");
        let flags = |heard: Vec<Value>| heard.iter().map(|frame| frame["requires_ack"].clone()).collect::<Vec<_>>();
        assert_eq!(flags(session.heard()), [json!(true), json!(null)]);
        let again = r#"{"type":"subscribe","data":{"events":["*"],"since":{"epoch":"k3f9","offset":0}}}"#;
        assert_eq!(flags(session.say(again)), [json!(null), json!(true), json!(null)]);
        assert!(session.say(r#"{"type":"ack","data":{"sequence":2}}"#).is_empty());
        assert_eq!(session.say(r#"{"type":"ack","data":{"sequence":3}}"#)[0]["type"], "error");
        assert_eq!(session.state.counters.acks, 1);
    }

    #[test]
    fn a_bad_frame_is_answered_and_the_session_stays() {
        let mut session = Session::new(100);
        for bad in ["", "{", "[]", "null", r#"{"type":"subscribe"}"#, r#"{"type":"ack","data":{}}"#] {
            let heard = session.say(bad);
            assert_eq!((heard.len(), &heard[0]["data"]["code"]), (1, &json!("bad_frame")), "{bad}");
        }
        session.machine.on_binary(&mut session.access, &mut session.state);
        assert_eq!(session.heard()[0]["type"], "error");
        assert_eq!(session.state.counters.bad_frames, 7);
        assert_eq!(session.say(r#"{"type":"subscribe","data":{"events":["a"]}}"#)[0]["action"], "subscribed");
    }

    #[test]
    fn the_number_of_patterns_is_bounded() {
        let mut session = Session::new(100);
        let many: Vec<String> = (0..200).map(|n| format!("a{n}")).collect();
        session.say(&json!({"type":"subscribe","data":{"events":many}}).to_string());
        let more: Vec<String> = (0..200).map(|n| format!("b{n}")).collect();
        let heard = session.say(&json!({"type":"subscribe","data":{"events":more}}).to_string());
        assert_eq!(heard[0]["data"]["code"], "bad_frame");
    }

    const AUTH: &str = r#"{"type":"auth","data":{"token":"s3cret"}}"#;

    fn grant(subscribe: &[&str], expires: f64) -> Grant {
        let patterns = subscribe.iter().map(|text| crate::wire::topic::Pattern::parse(text).expect("valid"));
        let subscribe = Some(crate::hub::auth::Scope::new(patterns));
        Grant { subject: Some("ada".into()), subscribe, expires: Some(expires), ..Grant::everything() }
    }

    fn stranger() -> Session {
        let mut session = Session::new(100);
        session.access = Access::awaited(session.id, Duration::from_secs(10));
        session
    }

    #[test]
    fn before_its_token_a_session_hears_nothing_but_pongs() {
        let all = [
            r#"{"type":"subscribe","data":{"events":["*"]}}"#,
            r#"{"type":"unsubscribe","data":{"events":["*"]}}"#,
            r#"{"type":"ack","data":{"sequence":0}}"#,
            r#"{"type":"pong"}"#,
            r#"{"type":"later"}"#,
            r#"{"type":"auth"}"#,
            "{",
        ];
        for frame in all {
            let mut session = stranger();
            session.emit("a");
            assert_eq!(session.say(r#"{"type":"ping"}"#), [json!({"type":"pong","lastSeq":0})]);
            let heard = session.say(frame);
            assert_eq!((heard.len(), &heard[0]["data"]["code"]), (2, &json!("unauthorized")), "{frame}");
            assert_eq!(heard[1], "Close(Unauthorized)");
            assert!(session.say(AUTH).is_empty() && session.shown.is_empty(), "after the close nothing counts");
        }
        let mut session = stranger();
        session.machine.on_binary(&mut session.access, &mut session.state);
        assert_eq!(session.heard()[1], "Close(Unauthorized)");
    }

    #[test]
    fn a_token_opens_what_it_grants_and_nothing_beside() {
        let mut session = stranger();
        assert!(session.say(AUTH).is_empty());
        assert_eq!(session.shown, ["s3cret"]);
        session.access.on_checked(Ok((grant(&["a.*"], 90.0), None)), Role::Subscriber, &mut session.state);
        assert_eq!(session.heard(), [json!({"action":"authenticated","subject":"ada","expires":90.0})]);
        let heard = session.say(r#"{"type":"subscribe","data":{"events":["a.b","b"]}}"#);
        assert_eq!((heard.len(), &heard[0]["data"]["code"]), (1, &json!("not_allowed")));
        assert!(heard[0]["data"]["message"].as_str().is_some_and(|text| text.ends_with(" b")));
        assert_eq!(session.say(r#"{"type":"subscribe","data":{"events":["a.b"]}}"#)[0]["events"], json!(["a.b"]));
    }

    #[test]
    fn a_narrower_token_takes_patterns_away_and_says_so() {
        let mut session = stranger();
        session.access.on_checked(Ok((grant(&["a", "b"], 90.0), None)), Role::Subscriber, &mut session.state);
        session.say(r#"{"type":"subscribe","data":{"events":["a","b"]}}"#);
        session.access.on_checked(Ok((grant(&["b"], 99.0), None)), Role::Subscriber, &mut session.state);
        let heard = session.heard();
        assert_eq!(heard[1], json!({"action":"unsubscribed","events":["a"]}));
        session.emit("a");
        session.emit("b");
        assert_eq!(session.heard().len(), 1);
    }

    #[test]
    fn time_without_a_token_or_beyond_it_ends_the_session() {
        let second = Duration::from_secs(1);
        let mut session = stranger();
        session.access.on_time(9 * second, Role::Subscriber, &mut session.state);
        assert!(session.heard().is_empty());
        session.access.on_time(10 * second, Role::Subscriber, &mut session.state);
        assert_eq!(session.heard()[1], "Close(Unauthorized)");

        let mut session = stranger();
        session.access.on_checked(Ok((grant(&["a"], 90.0), Some(20 * second))), Role::Subscriber, &mut session.state);
        session.access.on_checked(Ok((grant(&["a"], 100.0), Some(30 * second))), Role::Subscriber, &mut session.state);
        session.heard();
        session.access.on_time(20 * second, Role::Subscriber, &mut session.state);
        assert!(session.heard().is_empty(), "it was refreshed");
        session.access.on_time(30 * second, Role::Subscriber, &mut session.state);
        let heard = session.heard();
        assert_eq!((&heard[0]["data"]["code"], &heard[1]), (&json!("token_expired"), &json!("Close(TokenExpired)")));
    }

    #[test]
    fn each_refusal_says_whether_to_come_back() {
        use crate::hub::auth::Denied;
        for (denied, close) in [
            (Denied::Expired, "Close(TokenExpired)"),
            (Denied::Invalid("no".into()), "Close(Unauthorized)"),
            (Denied::Unavailable("no"), "Close(AuthUnavailable)"),
        ] {
            let mut session = stranger();
            session.access.on_checked(Err(denied), Role::Subscriber, &mut session.state);
            assert_eq!(session.heard()[1], close);
            assert_eq!(session.state.counters.auth_refused, 1);
        }
    }

    #[test]
    fn goodbye_comes_in_the_subscribers_own_words() {
        let mut session = Session::new(100);
        session.state.shutdown(crate::wire::frame::Reconnect { after: 0.5, jitter: 8.0 });
        let bye = json!({"type":"bye","data":{"code":3001,"reconnect":{"after":0.5,"jitter":8.0}}});
        assert_eq!(session.heard(), [bye, json!("Close(Shutdown)")]);
    }
}
