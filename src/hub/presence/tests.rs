use super::*;

const BEAT: &str = "graph.delta.heartbeat";

fn presence() -> Presence {
    let heartbeats = Filter::new([Pattern::parse(BEAT).expect("valid")]);
    Presence::new(&heartbeats, Patience { late: Duration::from_secs(45), dead: Duration::from_secs(60) })
}

fn hear(presence: &mut Presence, emitter: &str, kind: &str, topic: &str, now: u64) {
    let json = format!(r#"{{"type":"{kind}","topic":"{topic}"}}"#);
    let record = Record::event(json.into()).expect("valid");
    presence.hear(&emitter.into(), &[record], Duration::from_secs(now));
}

fn look(presence: &mut Presence, now: u64) -> Vec<(String, Freshness)> {
    let news = presence.look(Duration::from_secs(now));
    news.iter().map(|heart| (format!("{}:{}", heart.emitter, heart.topic), heart.state)).collect()
}

fn counts(presence: &Presence, now: u64) -> (usize, usize, usize) {
    let summary = presence.summary(0, Duration::from_secs(now));
    (summary.active, summary.late, summary.dead)
}

#[test]
fn a_heart_is_active_then_late_then_dead_and_each_is_told_once() {
    let mut presence = presence();
    hear(&mut presence, "x", BEAT, "ada", 0);
    assert_eq!(look(&mut presence, 1), [("x:ada".into(), Freshness::Active)]);
    assert_eq!(look(&mut presence, 45), []);
    assert_eq!(look(&mut presence, 46), [("x:ada".into(), Freshness::Late)]);
    assert_eq!(look(&mut presence, 60), []);
    assert_eq!(look(&mut presence, 61), [("x:ada".into(), Freshness::Dead)]);
    assert_eq!(look(&mut presence, 500), []);
    assert_eq!(
        (counts(&presence, 45), counts(&presence, 46), counts(&presence, 61)),
        ((1, 0, 0), (0, 1, 0), (0, 0, 1))
    );
    hear(&mut presence, "x", BEAT, "ada", 501);
    hear(&mut presence, "x", BEAT, "ada", 502);
    assert_eq!(look(&mut presence, 502), [("x:ada".into(), Freshness::Active)]);
    assert_eq!(counts(&presence, 502), (1, 0, 0));
}

#[test]
fn beats_in_time_are_no_news_and_a_long_pause_of_the_watcher_tells_the_last_state_only() {
    let mut presence = presence();
    for now in [0, 30, 60, 90] {
        hear(&mut presence, "x", BEAT, "ada", now);
    }
    assert_eq!(look(&mut presence, 95).len(), 1);
    assert_eq!(look(&mut presence, 1000), [("x:ada".into(), Freshness::Dead)]);
}

#[test]
fn only_heartbeats_count_and_each_engine_of_an_emitter_for_itself() {
    let mut presence = presence();
    hear(&mut presence, "x", BEAT, "ada", 0);
    hear(&mut presence, "x", BEAT, "atlas", 0);
    hear(&mut presence, "y", BEAT, "ada", 0);
    hear(&mut presence, "z", "graph.delta.node.upsert", "ada", 0);
    hear(&mut presence, "", BEAT, "nobody", 0);
    assert_eq!(counts(&presence, 0), (3, 0, 0));
    look(&mut presence, 1);
    hear(&mut presence, "x", BEAT, "ada", 40);
    hear(&mut presence, "x", "graph.delta.node.upsert", "atlas", 50);
    let late = look(&mut presence, 50);
    assert_eq!(late.len(), 2);
    assert!(late.contains(&("x:atlas".into(), Freshness::Late)) && late.contains(&("y:ada".into(), Freshness::Late)));
}

#[test]
fn heartbeats_may_be_chosen_by_patterns_of_types_and_topics_and_a_gap_is_none() {
    let patience = presence().watched.expect("watching").1;
    let patterns = ["*.beacon", "graph/*/delta/heartbeat"].map(|text| Pattern::parse(text).expect("valid"));
    let mut presence = Presence::new(&Filter::new(patterns), patience);
    hear(&mut presence, "x", "presence.beacon", "a", 0);
    hear(&mut presence, "x", "any", "graph/ada/delta/heartbeat", 0);
    hear(&mut presence, "x", "any", "graph/ada/delta/node", 0);
    hear(&mut presence, "x", "any", "graph/atlas/delta/heartbeat", 0);
    hear(&mut presence, "x", "any.gone", "graph/atlas/delta/heartbeat", 0);
    presence.hear(&"x".into(), &[Record::gap("x", "e", 1, 2, "crash")], Duration::ZERO);
    assert_eq!(counts(&presence, 0), (2, 0, 0));
}

#[test]
fn what_could_not_be_told_is_told_later_as_it_is_then() {
    let mut presence = presence();
    hear(&mut presence, "x", BEAT, "ada", 0);
    let [active] = &presence.look(Duration::ZERO)[..] else { panic!("one") };
    presence.untold(active.clone(), Duration::ZERO);
    assert_eq!(look(&mut presence, 1), [("x:ada".into(), Freshness::Active)]);
    presence.untold(active.clone(), Duration::ZERO);
    assert_eq!(look(&mut presence, 50), [("x:ada".into(), Freshness::Late)], "as it is by then");
}

#[test]
fn who_takes_leave_is_not_dead() {
    let mut presence = presence();
    hear(&mut presence, "x", BEAT, "ada", 0);
    hear(&mut presence, "x", "graph.delta.heartbeat.gone", "atlas", 0);
    hear(&mut presence, "x", "graph.delta.node.gone", "ada", 0);
    assert_eq!(look(&mut presence, 1), [("x:ada".into(), Freshness::Active)]);
    hear(&mut presence, "x", "graph.delta.heartbeat.gone", "ada", 2);
    hear(&mut presence, "x", "graph.delta.heartbeat.gone", "ada", 2);
    let gone = presence.look(Duration::from_secs(2));
    assert_eq!((gone.len(), gone[0].state), (1, Freshness::Gone));
    presence.untold(gone[0].clone(), Duration::from_secs(2));
    assert_eq!(counts(&presence, 2), (0, 0, 0));
    assert_eq!(look(&mut presence, 100), [("x:ada".into(), Freshness::Gone)]);
    assert_eq!(look(&mut presence, 200), []);
}

#[test]
fn whoever_comes_and_goes_all_the_time_is_told_of_once_in_a_look() {
    let mut presence = presence();
    for _ in 0..1000 {
        hear(&mut presence, "x", "graph.delta.heartbeat.gone", "ada", 0);
        hear(&mut presence, "x", BEAT, "ada", 0);
        hear(&mut presence, "x", BEAT, "atlas", 0);
        hear(&mut presence, "x", "graph.delta.heartbeat.gone", "atlas", 0);
    }
    assert_eq!(look(&mut presence, 0), [("x:ada".into(), Freshness::Active)], "atlas came and went");
    assert_eq!(look(&mut presence, 0), []);
}

#[test]
fn an_engine_that_has_moved_to_another_hub_is_not_called_dead_by_the_one_it_left() {
    let mut presence = presence();
    let other = |kind: &str, topic: &str| {
        Record::event(format!(r#"{{"type":"{kind}","topic":"{topic}"}}"#).into()).expect("valid")
    };
    hear(&mut presence, "x", BEAT, "ada", 0);
    hear(&mut presence, "x", BEAT, "atlas", 0);
    hear(&mut presence, "x", BEAT, "", 0);
    assert_eq!(look(&mut presence, 1).len(), 3);
    let heard = [other(BEAT, "ada"), other(BEAT, "stranger"), other(BEAT, ""), other("graph.delta.node", "atlas")];
    presence.overhear(&heard, Duration::from_secs(40));
    let dead = look(&mut presence, 61);
    assert_eq!(dead, [("x:".into(), Freshness::Dead), ("x:atlas".into(), Freshness::Dead)]);
    assert_eq!(counts(&presence, 61), (1, 0, 2));
    presence.overhear(&[other("graph.delta.heartbeat.gone", "ada")], Duration::from_secs(62));
    assert_eq!(look(&mut presence, 62), [("x:ada".into(), Freshness::Gone)]);
}

#[test]
fn the_dead_are_forgotten_after_an_hour() {
    let mut presence = presence();
    hear(&mut presence, "x", BEAT, "ada", 0);
    look(&mut presence, 3600);
    assert_eq!(counts(&presence, 3600), (0, 0, 1));
    look(&mut presence, 3601);
    assert_eq!(counts(&presence, 3601), (0, 0, 0));
}

#[test]
fn topics_that_somebody_makes_up_fill_a_bound_and_no_more() {
    let mut presence = presence();
    for n in 0..MOST + 5 {
        hear(&mut presence, "x", BEAT, &n.to_string(), 0);
    }
    hear(&mut presence, "x", BEAT, &"t".repeat(MAX_TOPIC + 1), 0);
    let summary = presence.summary(3, Duration::from_secs(2));
    assert_eq!((summary.active, summary.unwatched, summary.hearts.len()), (MOST, 6, 3));
}

#[test]
fn those_that_are_silent_for_longest_are_named_first() {
    let mut presence = presence();
    for (topic, at) in [("e", 5), ("b", 1), ("c", 1), ("a", 3), ("d", 9), ("gone", 0)] {
        hear(&mut presence, "x", BEAT, topic, at);
    }
    hear(&mut presence, "x", "graph.delta.heartbeat.gone", "gone", 9);
    let named = |most| {
        let summary = presence.summary(most, Duration::from_secs(61));
        summary.hearts.iter().map(|heart| (heart.topic.to_string(), heart.silent)).collect::<Vec<_>>()
    };
    let order = [("b", 60.0), ("c", 60.0), ("a", 58.0), ("e", 56.0), ("d", 52.0)].map(|(topic, s)| (topic.into(), s));
    for most in [0, 1, 3, 5, 9] {
        assert_eq!(named(most), order[..most.min(5)]);
    }
}

#[test]
fn nothing_is_watched_without_patterns() {
    let mut presence = Presence::new(&Filter::default(), presence().watched.expect("watching").1);
    hear(&mut presence, "x", BEAT, "ada", 0);
    assert!(!presence.is_watching() && look(&mut presence, 100).is_empty());
    assert_eq!(counts(&presence, 0), (0, 0, 0));
}

#[test]
fn a_change_is_told_on_the_topic_of_the_heartbeats() {
    let mut presence = presence();
    hear(&mut presence, "x", BEAT, "graph/ada", 0);
    let [active] = &presence.look(Duration::ZERO)[..] else { panic!("one") };
    let told = String::from_utf8(active.event()).expect("text");
    let want = r#"{"type":"presence.active","topic":"graph/ada","data":{"emitter":"x","topic":"graph/ada","state":"active","silent":0.0,"alert":false}}"#;
    assert_eq!(told, want);
    let [dead] = &presence.look(Duration::from_millis(61_500))[..] else { panic!("one") };
    let told = String::from_utf8(dead.event()).expect("text");
    assert!(told.contains(r#""presence.dead""#) && told.contains(r#""silent":61.5,"alert":true"#), "{told}");
    hear(&mut presence, "y", BEAT, "", 61);
    let [bare] = &presence.look(Duration::from_secs(62))[..] else { panic!("one") };
    assert!(String::from_utf8(bare.event()).expect("text").starts_with(r#"{"type":"presence.active","data""#));
}
