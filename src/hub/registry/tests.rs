use super::*;
use crate::hub::entry::Record;
use crate::wire::topic::Pattern;

fn entry(offset: u64, kind: &str) -> Entry {
    let json = format!(r#"{{"type":"{kind}"}}"#);
    Entry { offset, record: Record::event(json.into()).expect("valid") }
}

fn log() -> Log {
    Log::new("e".into(), crate::hub::log::LogLimits { events: 0, bytes: 0, age: None })
}

fn subscriber(registry: &mut Registry, pattern: &str) -> SessionId {
    let id = registry.open(Role::Subscriber);
    registry.set_filter(id, Filter::new([Pattern::parse(pattern).expect("valid")]));
    id
}

fn frames(registry: &mut Registry, id: SessionId) -> Vec<Item> {
    let mut out = VecDeque::new();
    registry.take(id, usize::MAX, &mut out, &log());
    out.into()
}

#[test]
fn each_session_has_its_own_chain() {
    let mut registry = Registry::new(1 << 20);
    let (all, a) = (subscriber(&mut registry, "*"), subscriber(&mut registry, "a"));
    assert_eq!(registry.fan_out(&entry(1, "a")), 2);
    assert_eq!(registry.fan_out(&entry(2, "b")), 1);
    assert_eq!(registry.fan_out(&entry(3, "a")), 2);
    let chain = |items: Vec<Item>| -> Vec<(u64, u64)> {
        let read = |item: &Item| {
            let Item::Text(frame) = item else { panic!("{item:?}") };
            let frame: serde_json::Value = serde_json::from_slice(frame).expect("json");
            (frame["prev"].as_u64().expect("prev"), frame["seq"].as_u64().expect("seq"))
        };
        items.iter().map(read).collect()
    };
    assert_eq!(chain(frames(&mut registry, all)), [(0, 1), (1, 2), (2, 3)]);
    assert_eq!(chain(frames(&mut registry, a)), [(0, 1), (1, 3)]);
}

#[test]
fn a_session_is_woken_once_for_many_frames() {
    let mut registry = Registry::new(1 << 20);
    let id = subscriber(&mut registry, "*");
    registry.park(id, Interest::Items, Waker::noop().clone());
    registry.fan_out(&entry(1, "a"));
    registry.fan_out(&entry(2, "a"));
    assert_eq!(registry.take_woken().len(), 1);
    registry.park(id, Interest::Close, Waker::noop().clone());
    registry.fan_out(&entry(3, "a"));
    assert_eq!(registry.take_woken().len(), 0);
    registry.order_close(id, CloseCode::Shutdown);
    assert_eq!(registry.take_woken().len(), 1);
}

#[test]
fn a_slow_session_is_closed_and_the_others_go_on() {
    let mut registry = Registry::new(200);
    let (slow, quick) = (subscriber(&mut registry, "*"), subscriber(&mut registry, "*"));
    for offset in 1..10 {
        registry.fan_out(&entry(offset, "a"));
        assert_eq!(frames(&mut registry, quick).len(), 1);
    }
    assert_eq!(frames(&mut registry, slow), [Item::Close(CloseCode::Slow)]);
    assert_eq!(registry.counts().slow, 1);
    assert_eq!(registry.fan_out(&entry(10, "a")), 1);
}

#[test]
fn who_was_read_in_this_turn_waits_until_all_who_were_woken_had_theirs() {
    let mut registry = Registry::new(4000);
    let subscribers = [subscriber(&mut registry, "*"), subscriber(&mut registry, "*")];
    let emitters = [registry.open(Role::Emitter), registry.open(Role::Emitter)];
    let park = |registry: &mut Registry| {
        for id in subscribers {
            registry.park(id, Interest::Items, Waker::noop().clone());
        }
    };
    park(&mut registry);
    assert!(emitters.iter().all(|id| registry.must_give_way(*id).is_none()));
    registry.reads(emitters[0]);
    registry.fan_out(&entry(1, "a"));
    assert!(registry.must_give_way(emitters[0]).is_some() && registry.must_give_way(emitters[1]).is_none());
    registry.reads(emitters[1]);
    // Both were read, one subscriber was not served yet.
    frames(&mut registry, subscribers[0]);
    assert!(emitters.iter().all(|id| registry.must_give_way(*id).is_some()));
    frames(&mut registry, subscribers[1]);
    assert!(emitters.iter().all(|id| registry.must_give_way(*id).is_none()));

    // However many emitters there are, a quarter of a queue is enough for one turn.
    park(&mut registry);
    registry.reads(emitters[0]);
    for offset in 2..12 {
        registry.fan_out(&entry(offset, "a"));
    }
    assert!(registry.must_give_way(emitters[1]).is_some());
    registry.close(subscribers[0]);
    frames(&mut registry, subscribers[1]);
    assert!(registry.must_give_way(emitters[1]).is_none() && !registry.has_unserved());
}

#[test]
fn an_old_id_does_not_reach_a_new_session() {
    let mut registry = Registry::new(200);
    let old = subscriber(&mut registry, "*");
    registry.close(old);
    registry.close(old);
    let new = registry.open(Role::Emitter);
    registry.push(old, "x".into());
    registry.close(old);
    assert!(frames(&mut registry, new).is_empty());
    assert_eq!(registry.sessions(), [(new, Role::Emitter)]);
    assert_eq!(registry.fan_out(&entry(1, "a")), 0);
    assert_eq!((registry.len(), registry.groups.len()), (1, 0));
}

#[test]
fn acks_are_cumulative_and_who_is_furthest_behind_is_named_first() {
    let mut registry = Registry::new(1 << 20);
    let [quick, silent, late] = [(); 3].map(|()| subscriber(&mut registry, "*"));
    for offset in 1..=9 {
        registry.fan_out(&entry(offset, "a"));
    }
    for (id, seq) in [(quick, 9), (quick, 3), (late, 4)] {
        assert_eq!(registry.record_ack(id, seq), Ok(()));
    }
    assert_eq!(registry.record_ack(late, 10), Err(9));
    let laggards = registry.laggards(2);
    let named: Vec<_> = laggards.iter().map(|of| (of.session, of.acked, of.lag)).collect();
    assert_eq!(named, [(late, Some(4), Some(5)), (quick, Some(9), Some(0))]);
    assert!(laggards[0].queued_bytes > 0);
    assert_eq!(registry.laggards(10)[2].session, silent);
}

#[test]
fn a_narrower_grant_takes_patterns_away_and_a_wider_one_gives_none_back() {
    let mut registry = Registry::new(1 << 20);
    let id = registry.open(Role::Subscriber);
    let filter = |patterns: &[&str]| Filter::new(patterns.iter().map(|text| Pattern::parse(text).expect("valid")));
    let grant = |patterns: &[&str]| Some(Arc::new(filter(patterns)));
    registry.set_filter(id, filter(&["a.b", "a.*", "x/y"]));
    assert!(registry.set_grant(id, grant(&["*"])).is_empty());
    let taken = registry.set_grant(id, grant(&["a.b.*", "a.b", "x/*"]));
    assert_eq!(taken, filter(&["a.*"]).patterns());
    assert_eq!(registry.fan_out(&entry(1, "a.c")), 0);
    assert_eq!(registry.fan_out(&entry(2, "a.b")), 1);
    assert_eq!(registry.granted(id, filter(&["a.b.c", "b"])), filter(&["a.b.c"]));
    assert!(registry.set_grant(id, None).is_empty());
    assert_eq!(*registry.filter(id), filter(&["a.b", "x/y"]));
    assert_eq!(registry.granted(id, filter(&["b"])), filter(&["b"]));
}
