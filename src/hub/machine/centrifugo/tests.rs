use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::hub::auth::{Grant, Scope};
use crate::hub::entry::Record;
use crate::hub::log::LogLimits;
use crate::hub::outbox::Item;
use crate::hub::service::Part;
use crate::wire::frame::Reconnect;
use crate::wire::subscriber::Slow;

const NOW: Duration = Duration::ZERO;

struct Session {
    state: State,
    id: SessionId,
    machine: CentrifugoMachine,
    access: Access,
    asked: Vec<Asked>,
}

fn scope(patterns: &[&str]) -> Scope {
    Scope::new(patterns.iter().map(|text| Pattern::parse(text).expect("valid")))
}

fn subscribe_only(patterns: &[&str]) -> Grant {
    Grant { subscribe: Some(scope(patterns)), ..Grant::everything() }
}

impl Session {
    /// Not connected yet; its log keeps so many events.
    fn opened(kept: usize) -> Self {
        let limits = LogLimits { events: kept, bytes: 1 << 20, age: None };
        Self::on(State::new("k3f9".into(), limits, 1 << 20))
    }

    fn on(mut state: State) -> Self {
        let id = state.registry.open(Role::Centrifugo);
        let access = Access::granted(id, Grant::everything(), None);
        let machine = CentrifugoMachine::new(id, Duration::from_millis(24_500));
        Self { state, id, machine, access, asked: Vec::new() }
    }

    fn connected(kept: usize) -> Self {
        let mut session = Self::opened(kept);
        assert!(session.say(&json!({"id": 1, "connect": {}}))[0].get("connect").is_some());
        session
    }

    /// Another connection of the client.
    fn again(self) -> Self {
        let Self { mut state, id, .. } = self;
        state.registry.close(id);
        let mut session = Self::on(state);
        session.say(&json!({"id": 1, "connect": {}}));
        session
    }

    fn emit(&mut self, event: &Value) {
        self.state.append(Record::event(event.to_string().into()).expect("valid"), NOW);
    }

    fn emit_kinds(&mut self, kinds: &[&str]) {
        for kind in kinds {
            self.emit(&json!({"type": kind}));
        }
    }

    fn hear(&mut self, text: &str) {
        self.machine.on_text(text, &mut self.state);
        self.go_on();
    }

    fn go_on(&mut self) {
        let asked = self.machine.next(&mut self.access, &mut self.state, NOW);
        self.asked.extend(asked);
    }

    fn say(&mut self, command: &Value) -> Vec<Value> {
        self.hear(&command.to_string());
        self.heard()
    }

    fn subscribe(&mut self, channel: &str, since: Option<u64>) -> Value {
        let answer = self.say(&subscribe(channel, since));
        answer[0]["subscribe"].clone()
    }

    /// What the socket takes, line by line.
    fn heard(&mut self) -> Vec<Value> {
        let mut items = VecDeque::new();
        self.state.take(self.id, usize::MAX, &mut items);
        let read = |item| match item {
            Item::Text(frame) => {
                let text = String::from_utf8(frame.to_vec()).expect("UTF-8");
                text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
            }
            other => vec![json!(format!("{other:?}"))],
        };
        items.into_iter().flat_map(read).collect()
    }

    fn check(&mut self, checked: Checked) -> Vec<Value> {
        self.machine.on_checked(checked, &mut self.access, &mut self.state, NOW);
        self.go_on();
        self.heard()
    }
}

fn subscribe(channel: &str, since: Option<u64>) -> Value {
    let mut request = json!({"id": 2, "subscribe": {"channel": channel}});
    if let Some(offset) = since {
        request["subscribe"]["recover"] = true.into();
        request["subscribe"]["epoch"] = "k3f9".into();
        request["subscribe"]["offset"] = offset.into();
    }
    request
}

fn push(channel: &str, offset: u64, data: &Value) -> Value {
    json!({"push": {"channel": channel, "pub": {"data": data, "offset": offset}}})
}

fn error(heard: &[Value]) -> Option<u64> {
    heard[0]["error"]["code"].as_u64()
}

#[test]
fn a_session_begins_with_connect_and_has_one() {
    let mut session = Session::opened(9);
    let client = format!("k3f9-{}", session.id);
    let version = concat!("safe-broadcaster ", env!("CARGO_PKG_VERSION"));
    let welcome = json!({"id": 1, "connect": {"client": client, "version": version, "ping": 25, "pong": true}});
    assert_eq!(session.say(&json!({"id": 1, "connect": {"name": "js"}})), [welcome]);
    assert_eq!(session.say(&json!({"id": 2, "connect": {}})), [json!("Close(BadFrame)")]);
    for first in [&json!({"id": 1, "subscribe": {"channel": "a"}}), &json!({}), &json!({"id": 1, "ping": {}})] {
        let mut session = Session::opened(9);
        assert_eq!(session.say(first), [json!("Close(BadFrame)")], "{first}");
    }
}

#[test]
fn what_is_no_command_ends_the_session_and_nothing_of_its_frame_is_done() {
    let many = (0..=MAX_COMMANDS).map(|_| r#"{"id":3,"ping":{}}"#).collect::<Vec<_>>().join("\n");
    for wrong in ["", "\n", "x", "[]", r#"{"id":3}"#, "{\"id\":3,\"ping\":{}}\nx", &many] {
        let mut session = Session::connected(9);
        session.hear(wrong);
        assert_eq!(session.heard(), [json!("Close(BadFrame)")], "{wrong:?}");
        assert!(!session.machine.has_rest());
    }
    let mut session = Session::connected(9);
    session.machine.on_binary(&mut session.state);
    assert_eq!(session.heard(), [json!("Close(BadFrame)")]);
}

#[test]
fn publications_carry_the_offsets_of_the_log_and_come_once_for_each_channel() {
    let mut session = Session::connected(9);
    session.emit_kinds(&["a", "a"]);
    session.hear(&format!("{}\n\n{}\n", subscribe("a.*", None), subscribe("graph/*", None)));
    let answer = json!({"id": 2, "subscribe": {"recoverable": true, "positioned": true, "epoch": "k3f9", "offset": 2}});
    assert_eq!(session.heard(), [answer.clone(), answer]);
    let both = json!({"type": "a.b", "topic": "graph/ada"});
    session.emit_kinds(&["a", "a.b"]);
    session.emit(&both);
    let want = [push("a.*", 4, &json!({"type": "a.b"})), push("a.*", 5, &both), push("graph/*", 5, &both)];
    assert_eq!(session.heard(), want);
    assert_eq!(
        session.say(&json!({"id": 9, "unsubscribe": {"channel": "a.*"}})),
        [json!({"id": 9, "unsubscribe": {}})]
    );
    session.emit(&both);
    assert_eq!(session.heard(), [push("graph/*", 6, &both)]);
    assert_eq!(session.say(&json!({"id": 9, "ping": {}})), [json!({"id": 9, "ping": {}})]);
    assert!(session.say(&json!({})).is_empty(), "an answer to a ping");
}

#[test]
fn who_comes_back_gets_exactly_what_each_of_its_channels_missed() {
    let mut session = Session::connected(99);
    session.emit_kinds(&["a", "b", "a", "b"]);
    let mut session = session.again();
    session.hear(&format!("{}\n{}", subscribe("a", Some(1)), subscribe("b", Some(0))));
    session.emit_kinds(&["a", "b"]);
    let answer = |offset: u64| {
        json!({"id": 2, "subscribe": {"recoverable": true, "positioned": true, "epoch": "k3f9", "offset": offset,
                                      "was_recovering": true, "recovered": true}})
    };
    let (a, b) = (json!({"type": "a"}), json!({"type": "b"}));
    // Until it has what it missed it stands where it stood: whoever is cut off here comes back with that.
    let want = [
        answer(1),
        push("a", 3, &a),
        answer(0),
        push("b", 2, &b),
        push("b", 4, &b),
        push("a", 5, &a),
        push("b", 6, &b),
    ];
    assert_eq!(session.heard(), want);
}

#[test]
fn more_channels_than_replays_may_be_under_way_all_recover() {
    const CHANNELS: usize = 3 * MAX_REPLAYS;
    let mut session = Session::connected(999);
    let channels: Vec<_> = (0..CHANNELS).map(|n| format!("c{n}")).collect();
    for channel in &channels {
        session.emit_kinds(&[channel]);
    }
    let mut session = session.again();
    session.hear(&channels.iter().map(|name| subscribe(name, Some(0)).to_string()).collect::<Vec<_>>().join("\n"));
    let mut heard = Vec::new();
    for _ in 0..CHANNELS {
        assert!(session.state.registry.replays(session.id) <= MAX_REPLAYS);
        heard.extend(session.heard());
        session.go_on();
    }
    assert!(!session.machine.has_rest());
    let recovered = heard.iter().filter(|line| line["subscribe"]["recovered"] == true).count();
    let mut offsets: Vec<_> = heard.iter().filter_map(|line| line["push"]["pub"]["offset"].as_u64()).collect();
    offsets.sort_unstable();
    assert_eq!((recovered, offsets), (CHANNELS, (1..=CHANNELS as u64).collect()));
}

#[test]
fn who_cannot_recover_is_told_so_or_refused_if_it_prefers_that() {
    let mut session = Session::connected(1);
    session.emit_kinds(&["a", "a"]);
    let mut stale = subscribe("a", Some(2));
    stale["subscribe"]["epoch"] = "old".into();
    let mut nameless = subscribe("a", Some(0));
    nameless["subscribe"].as_object_mut().expect("an object").remove("epoch");
    for mut wanted in [stale, nameless, subscribe("a", Some(0)), subscribe("a", Some(9))] {
        let mut session = Session::connected(1);
        session.emit_kinds(&["a", "a"]);
        wanted["subscribe"]["flag"] = 3.into();
        assert_eq!(error(&session.say(&wanted)), Some(112), "{wanted}");
        session.emit_kinds(&["a"]);
        assert!(session.heard().is_empty(), "it is not subscribed");
        wanted["subscribe"]["flag"] = 1.into();
        let fresh =
            json!({"recoverable": true, "positioned": true, "epoch": "k3f9", "offset": 3, "was_recovering": true});
        assert_eq!(session.say(&wanted)[0]["subscribe"], fresh, "{wanted}");
        session.emit_kinds(&["a"]);
        assert_eq!(session.heard(), [push("a", 4, &json!({"type": "a"}))]);
    }
}

#[test]
fn a_hub_that_is_not_as_far_yet_sends_away_instead_of_promising_for_two_channels() {
    let mut session = Session::connected(9);
    session.emit_kinds(&["a"]);
    session.state.log.expect(5);
    // One place is enough for one channel.
    assert_eq!(session.subscribe("a", Some(4))["recovered"], true);
    assert_eq!(session.say(&subscribe("b", Some(1))), [json!("Close(Degraded)")]);
    let mut session = session.again();
    assert_eq!(session.subscribe("b", Some(1))["recovered"], true);
    assert_eq!(session.say(&subscribe("a", Some(4))), [json!("Close(Degraded)")]);
    let mut session = session.again();
    session.emit_kinds(&["x", "x", "x"]);
    assert_eq!(session.subscribe("b", Some(1))["recovered"], true);
    assert_eq!(session.subscribe("a", Some(4))["recovered"], true, "now it is as far");
}

#[test]
fn a_channel_that_is_given_up_takes_its_replay_with_it() {
    let mut session = Session::connected(99);
    session.emit_kinds(&["a", "b", "a"]);
    let mut session = session.again();
    session.hear(&subscribe("a", Some(0)).to_string());
    session.hear(&subscribe("b", Some(0)).to_string());
    session.hear(r#"{"id":7,"unsubscribe":{"channel":"a"}}"#);
    let heard = session.heard();
    let pushed: Vec<_> = heard.iter().filter_map(|line| line["push"]["pub"]["offset"].as_u64()).collect();
    assert_eq!(pushed, [2]);
    assert_eq!(heard.last(), Some(&json!({"id": 7, "unsubscribe": {}})));
    assert_eq!(session.state.registry.replays(session.id), 0);
}

#[test]
fn what_cannot_be_done_is_answered_with_its_code_and_the_session_stays() {
    let mut session = Session::connected(9);
    session.access = Access::granted(session.id, subscribe_only(&["a.*", "c*"]), None);
    assert!(session.subscribe("a.*", None).is_object());
    for (wanted, code) in [
        (json!({"subscribe": {"channel": "b"}}), 103),
        (json!({"subscribe": {"channel": "*"}}), 103),
        (json!({"history": {"channel": "b"}}), 103),
        (json!({"subscribe": {"channel": "a.*"}}), 105),
        (json!({"subscribe": {"channel": ""}}), 107),
        (json!({"history": {"channel": ""}}), 107),
        (json!({"publish": {"channel": "a.*", "data": {}}}), 107),
        (json!({"publish": {"channel": "a.b", "data": 7}}), 107),
        (json!({"subscribe": {"channel": "a.b", "tf": {"op": "eq"}}}), 108),
        (json!({"presence": {"channel": "a.b"}}), 108),
        (json!({"presence_stats": {"channel": "a.b"}}), 108),
        (json!({"rpc": {"method": "m", "data": {}}}), 108),
        (json!({"sub_refresh": {"channel": "a.b", "token": "t"}}), 108),
    ] {
        let mut command = wanted.clone();
        command["id"] = 5.into();
        assert_eq!(error(&session.say(&command)), Some(code), "{wanted}");
    }
    session.access = Access::granted(session.id, Grant::everything(), None);
    for n in 1..MAX_PATTERNS {
        assert!(session.subscribe(&format!("c{n}"), None).is_object());
    }
    assert_eq!(error(&session.say(&subscribe("one.more", None))), Some(106));
}

#[test]
fn an_event_is_published_to_its_channel_and_nothing_else_is_done_before_it_is_there() {
    let mut session = Session::connected(9);
    session.hear("{\"id\":3,\"publish\":{\"channel\":\"chat\",\"data\":{\"n\":1}}}\n{\"id\":4,\"ping\":{}}");
    assert_eq!(session.asked, [Asked::Publish(Bytes::from_static(br#"{"type":"chat","n":1}"#))]);
    assert!(session.heard().is_empty() && session.machine.has_rest());
    session.machine.on_published(Ok(Published { offset: 1, sessions: 0 }), &mut session.state);
    session.go_on();
    assert_eq!(session.heard(), [json!({"id": 3, "publish": {}}), json!({"id": 4, "ping": {}})]);
    for (kind, code) in [
        (ErrorKind::NotAllowed, 103),
        (ErrorKind::EventTooLarge, 107),
        (ErrorKind::EventNotSerializable, 107),
        (ErrorKind::LogIo, 100),
        (ErrorKind::BusDown, 100),
        (ErrorKind::Closed, 100),
    ] {
        session.hear(r#"{"id":3,"publish":{"channel":"chat","data":{}}}"#);
        session.machine.on_published(Err(Error::new(kind, "why")), &mut session.state);
        let heard = session.heard();
        assert_eq!(error(&heard), Some(code), "{kind:?}");
        assert_eq!(heard[0]["error"].get("temporary").is_some(), code == 100);
    }
}

#[test]
fn history_gives_what_the_log_still_has() {
    let mut session = Session::connected(5);
    session.emit_kinds(&["x", "a", "b", "a", "b", "a"]);
    session.state.append(Record::gap("e", "x", 1, 2, "crash"), NOW);
    let offsets = |heard: &[Value]| {
        let publications = heard[0]["history"]["publications"].as_array().expect("a list");
        publications.iter().map(|publication| publication["offset"].as_u64().expect("a number")).collect::<Vec<_>>()
    };
    let mut history = |more: Value| {
        let mut wanted = json!({"id": 3, "history": {"channel": "a"}});
        wanted["history"].as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        session.say(&wanted)
    };
    let at = |offset: u64| json!({"epoch": "k3f9", "offset": offset});
    let top = history(json!({}));
    assert_eq!(top, [json!({"id": 3, "history": {"publications": [], "epoch": "k3f9", "offset": 7}})]);
    assert_eq!(offsets(&history(json!({"limit": -1}))), [4, 6]);
    assert_eq!(offsets(&history(json!({"limit": 1}))), [4]);
    assert_eq!(offsets(&history(json!({"limit": 1, "reverse": true}))), [6]);
    assert_eq!(offsets(&history(json!({"limit": 9, "since": at(4)}))), [6]);
    assert_eq!(offsets(&history(json!({"limit": 9, "since": at(6), "reverse": true}))), [4]);
    for lost in [at(0), at(8), json!({"epoch": "old", "offset": 4}), json!({})] {
        assert_eq!(error(&history(json!({"limit": 9, "since": lost}))), Some(112));
    }
}

#[test]
fn a_large_history_is_given_in_parts_and_waits_for_the_socket() {
    let mut session =
        Session::on(State::new("k3f9".into(), LogLimits { events: 999, bytes: 1 << 20, age: None }, 8 << 10));
    session.say(&json!({"id": 1, "connect": {}}));
    for _ in 0..50 {
        session.emit(&json!({"type": "a", "padding": "x".repeat(400)}));
    }
    let wanted = json!({"id": 3, "history": {"channel": "a", "limit": -1}}).to_string();
    session.hear(&[wanted.as_str(); 8].join("\n"));
    assert!(session.machine.has_rest(), "it does not fill the queue");
    let mut answers = 0;
    while session.machine.has_rest() || answers == 0 {
        for answer in session.heard() {
            let given = answer["history"]["publications"].as_array().expect("a list").len();
            assert!((1..10).contains(&given), "{given}");
            answers += 1;
        }
        session.go_on();
    }
    answers += session.heard().len();
    assert_eq!((answers, session.state.registry.counts().slow), (8, 0));
}

#[test]
fn a_token_is_shown_with_connect_and_again_before_it_ends() {
    let second = Duration::from_secs(1);
    let mut session = Session::opened(9);
    session.access = Access::awaited(session.id, 10 * second);
    session.state.grant(session.id, Some(Arc::default()));
    session.hear(&format!("{}\n{}", json!({"id": 1, "connect": {"token": "t"}}), subscribe("a", None)));
    assert_eq!(session.asked, [Asked::Check(Secret::new("t"))]);
    assert!(session.heard().is_empty(), "nothing is done before it is checked");
    let heard = session.check(Ok((subscribe_only(&["a", "b"]), Some(100 * second))));
    assert_eq!((&heard[0]["connect"]["expires"], &heard[0]["connect"]["ttl"]), (&json!(true), &json!(90)));
    assert!(heard[1]["subscribe"].is_object());
    session.subscribe("b", None);
    session.say(&json!({"id": 7, "refresh": {"token": "u"}}));
    let heard = session.check(Ok((subscribe_only(&["b"]), Some(20 * second))));
    let refreshed = &heard[0]["refresh"];
    assert_eq!((&refreshed["ttl"], refreshed.get("ping"), refreshed.get("pong")), (&json!(15), None, None));
    let reason = "the token does not grant it any more";
    assert_eq!(heard[1], json!({"push": {"channel": "a", "unsubscribe": {"code": 2000, "reason": reason}}}));
    session.emit_kinds(&["a", "b"]);
    assert_eq!(session.heard(), [push("b", 2, &json!({"type": "b"}))]);
    session.access.on_time(20 * second, Role::Centrifugo, &mut session.state);
    assert_eq!(session.heard(), [json!("Close(TokenExpired)")]);
}

#[test]
fn a_token_that_is_not_good_is_answered_and_ends_the_session() {
    for (denied, code, close) in [
        (Denied::Expired, 109, "Close(TokenExpired)"),
        (Denied::Invalid("no".into()), 101, "Close(Unauthorized)"),
        (Denied::Unavailable("later"), 100, "Close(AuthUnavailable)"),
    ] {
        let mut session = Session::opened(9);
        session.access = Access::awaited(session.id, NOW);
        session.hear(&format!("{}\n{}", json!({"id": 1, "connect": {"token": "t"}}), subscribe("a", None)));
        let heard = session.check(Err(denied));
        assert_eq!((error(&heard), &heard[1..]), (Some(code), &[json!(close)][..]));
        assert!(!session.machine.has_rest());
    }
    let mut session = Session::opened(9);
    session.access = Access::awaited(session.id, NOW);
    let heard = session.say(&json!({"id": 1, "connect": {}}));
    assert_eq!((error(&heard), &heard[1]), (Some(101), &json!("Close(Unauthorized)")));
    assert_eq!(session.state.counters.auth_refused, 1);
}

#[test]
fn a_token_of_the_handshake_needs_no_second_one() {
    let mut session = Session::opened(9);
    session.access = Access::awaited(session.id, NOW);
    assert!(session.check(Ok((Grant::everything(), None))).is_empty(), "nobody has asked");
    assert!(session.say(&json!({"id": 1, "connect": {}}))[0]["connect"].is_object());
}

#[test]
fn what_belongs_to_no_channel_is_a_message() {
    let mut session = Session::connected(99);
    session.subscribe("a", None);
    session.subscribe("b", None);
    session.state.append(Record::gap("ada", "x", 3, 4, "crash"), NOW);
    let data = json!({"emitter": "ada", "epoch": "x", "from": 3, "to": 4, "reason": "crash"});
    let gap = json!({"push": {"message": {"data": {"type": "gap", "seq": 1, "data": data}}}});
    assert_eq!(session.heard(), std::slice::from_ref(&gap), "once, however many channels it has");
    session.state.trouble(Part::Log, Some("Disk.".into()));
    let heard = session.heard();
    assert_eq!(heard[0]["push"]["message"]["data"]["type"], "service_status");
    let mut session = session.again();
    let heard = session.say(&subscribe("a", Some(0)));
    assert_eq!(heard[1], gap, "it is among what was missed");
    assert_eq!(heard[2]["push"]["message"]["data"]["type"], "service_status");
    session.state.shutdown(Reconnect { after: 0.2, jitter: 1.0 });
    let heard = session.heard();
    assert_eq!(heard[0]["push"]["message"]["data"]["type"], "bye");
    assert_eq!(heard[1], "Close(Shutdown)");
}

#[test]
fn what_a_slow_session_does_not_get_is_told_in_its_place() {
    let limits = LogLimits { events: 99, bytes: 1 << 20, age: None };
    let mut session = Session::on(State::new("k3f9".into(), limits, 400).with(Slow::DropWithGap, None));
    session.say(&json!({"id": 1, "connect": {}}));
    session.subscribe("a", None);
    session.emit_kinds(&["a"; 20]);
    let heard = session.heard();
    let told = &heard.last().expect("something")["push"]["message"]["data"];
    assert_eq!(
        (&told["type"], &told["data"]["to"], &told["data"]["reason"]),
        (&json!("gap"), &json!(20), &json!("shed"))
    );
    assert_eq!(told["data"]["from"], heard.len(), "behind the last one that came");
}

#[test]
fn pings_are_sent_to_those_who_know_them() {
    let mut session = Session::opened(9);
    assert!(!session.machine.ping(&mut session.state));
    session.say(&json!({"id": 1, "connect": {}}));
    assert!(session.machine.ping(&mut session.state));
    assert_eq!(session.heard(), [json!({})]);
}

#[test]
fn a_frame_is_made_once_for_all_who_have_the_same_channels() {
    let mut session = Session::connected(99);
    let mut others = Vec::new();
    for _ in 0..10 {
        let id = session.state.registry.open(Role::Centrifugo);
        others.push(id);
        let mut machine = CentrifugoMachine::new(id, NOW);
        let mut access = Access::granted(id, Grant::everything(), None);
        let frame = format!("{}\n{}", json!({"id": 1, "connect": {}}), subscribe("a", None));
        machine.on_text(&frame, &mut session.state);
        machine.next(&mut access, &mut session.state, NOW);
    }
    session.emit_kinds(&["a", "a"]);
    assert_eq!(session.state.registry.work().0, 2);
    let replay = |state: &mut State, id: SessionId| {
        let filter = Filter::new([Pattern::parse("a").expect("valid")]);
        let cursor = state.registry.cursor(id, filter, 0, &state.log);
        state.registry.push_replay(id, cursor);
        state.take(id, usize::MAX, &mut VecDeque::new());
    };
    for id in others {
        replay(&mut session.state, id);
    }
    assert_eq!(session.state.registry.work().0, 4, "and once for all who come back");
}
