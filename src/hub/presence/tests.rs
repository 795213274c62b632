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

fn event(kind: &str, topic: &str) -> Record {
    Record::event(format!(r#"{{"type":"{kind}","topic":"{topic}"}}"#).into()).expect("valid")
}

#[test]
fn an_engine_that_has_moved_to_another_hub_is_not_called_dead_by_the_one_it_left() {
    let mut presence = presence();
    hear(&mut presence, "x", BEAT, "ada", 0);
    hear(&mut presence, "x", BEAT, "atlas", 0);
    hear(&mut presence, "x", BEAT, "", 0);
    assert_eq!(look(&mut presence, 1).len(), 3);
    let heard = [event(BEAT, "ada"), event(BEAT, "stranger"), event(BEAT, ""), event("graph.delta.node", "atlas")];
    presence.overhear(&heard, Duration::from_secs(40));
    let dead = look(&mut presence, 61);
    assert_eq!(dead, [("x:".into(), Freshness::Dead), ("x:atlas".into(), Freshness::Dead)]);
    assert_eq!(counts(&presence, 61), (2, 0, 2));
    presence.overhear(&[event("graph.delta.heartbeat.gone", "ada")], Duration::from_secs(62));
    assert_eq!(look(&mut presence, 62), [], "the other hub tells that");
    assert_eq!(counts(&presence, 62), (1, 0, 2));
}

/// Hubs that share a stream, each of which looks at another moment, and hears what the others do some time later.
struct Hubs {
    members: Vec<Option<Presence>>,
    lag: u64,
    now: u64,
    /// What is under way, and when it comes.
    stream: Vec<(u64, Record)>,
    told: Vec<(usize, u64, String, Freshness)>,
}

impl Hubs {
    fn new(count: usize, lag: u64) -> Self {
        let members = (0..count).map(|_| Some(presence())).collect();
        Self { members, lag, now: 0, stream: Vec::new(), told: Vec::new() }
    }

    fn send(&mut self, record: Record) {
        self.stream.push((self.now + self.lag, record));
    }

    /// An engine says something to a hub.
    fn say(&mut self, hub: usize, kind: &str, topic: &str) {
        if let Some(presence) = &mut self.members[hub] {
            presence.hear(&"x".into(), &[event(kind, topic)], Duration::from_millis(self.now));
            self.send(event(kind, topic));
        }
    }

    /// Lets milliseconds pass.
    fn pass(&mut self, time: u64) {
        for _ in 0..time / 10 {
            self.now += 10;
            let now = Duration::from_millis(self.now);
            let (came, later) = std::mem::take(&mut self.stream).into_iter().partition(|(at, _)| *at <= self.now);
            self.stream = later;
            let came: Vec<Record> = came.into_iter().map(|(_, record)| record).collect();
            for n in 0..self.members.len() {
                let Some(presence) = &mut self.members[n] else { continue };
                presence.overhear(&came, now);
                // Each second, at another moment of it.
                if self.now % 1000 == 310 * n as u64 {
                    for heart in presence.look(now) {
                        self.told.push((n, self.now / 1000, heart.topic.to_string(), heart.state));
                        let told = Record::event(heart.event().into()).expect("valid");
                        self.stream.push((self.now + self.lag, told));
                    }
                }
            }
        }
    }

    fn states(&self) -> Vec<Freshness> {
        self.told.iter().map(|(.., state)| *state).collect()
    }

    fn counts(&self, hub: usize) -> (usize, usize, usize) {
        let summary = self.members[hub].as_ref().expect("alive").summary(9, Duration::from_millis(self.now));
        (summary.active, summary.late, summary.dead)
    }
}

#[test]
fn hubs_that_share_a_stream_all_know_an_engine_and_tell_of_it_once() {
    for lag in [0, 50, 400, 3000] {
        let mut hubs = Hubs::new(3, lag);
        for _ in 0..4 {
            hubs.say(1, BEAT, "ada");
            hubs.pass(30_000);
            assert_eq!([0, 1, 2].map(|hub| hubs.counts(hub)), [(1, 0, 0); 3], "lag {lag}");
        }
        let heart = &hubs.members[0].as_ref().expect("alive").summary(9, Duration::from_millis(hubs.now)).hearts[0];
        assert_eq!((&*heart.emitter, &*heart.topic), ("x", "ada"), "the news have brought its name");
        hubs.pass(20_000);
        assert_eq!(hubs.counts(2), (0, 1, 0));
        hubs.pass(60_000);
        assert_eq!([0, 1, 2].map(|hub| hubs.counts(hub)), [(0, 0, 1); 3]);
        hubs.say(1, BEAT, "ada");
        hubs.pass(10_000);
        hubs.say(1, "graph.delta.heartbeat.gone", "ada");
        hubs.pass(200_000);
        assert_eq!([0, 1, 2].map(|hub| hubs.counts(hub)), [(0, 0, 0); 3]);
        let want = [Freshness::Active, Freshness::Late, Freshness::Dead, Freshness::Active, Freshness::Gone];
        assert_eq!(hubs.states(), want, "lag {lag}: {:?}", hubs.told);
        assert!(hubs.told.iter().all(|(hub, ..)| *hub == 1));
    }
}

#[test]
fn an_engine_that_moves_between_hubs_is_never_late_and_its_end_is_told_once() {
    let mut hubs = Hubs::new(3, 50);
    for n in 0..10 {
        hubs.say(n % 3, BEAT, "ada");
        hubs.pass(30_000);
    }
    assert_eq!(hubs.states(), [Freshness::Active]);
    hubs.pass(100_000);
    assert_eq!(hubs.states(), [Freshness::Active, Freshness::Late, Freshness::Dead]);
    assert!(hubs.told[1..].iter().all(|(hub, ..)| *hub == 0), "by the one that it was at: {:?}", hubs.told);
    hubs.say(2, BEAT, "ada");
    hubs.pass(10_000);
    assert_eq!(hubs.told[3..], [(2, hubs.told[3].1, "ada".into(), Freshness::Active)]);
}

#[test]
fn an_engine_that_dies_with_its_hub_is_told_of_by_another_once() {
    let mut hubs = Hubs::new(3, 50);
    hubs.say(0, BEAT, "ada");
    hubs.pass(20_000);
    hubs.members[0] = None;
    hubs.pass(100_000);
    let told: Vec<_> = hubs.told.iter().map(|(_, second, _, state)| (*second, *state)).collect();
    assert_eq!(told, [(1, Freshness::Active), (50, Freshness::Late), (65, Freshness::Dead)]);
}

#[test]
fn a_hub_that_comes_later_repeats_nothing_that_was_told() {
    let mut hubs = Hubs::new(2, 0);
    let late = hubs.members[1].take();
    for topic in ["ada", "dead", "gone"] {
        hubs.say(0, BEAT, topic);
    }
    hubs.say(0, "graph.delta.heartbeat.gone", "gone");
    hubs.pass(30_000);
    hubs.say(0, BEAT, "ada");
    hubs.pass(35_000);
    hubs.say(0, BEAT, "ada");
    hubs.pass(1000);
    assert_eq!(hubs.states().len(), 4, "two are active, one is late and dead, ada is not: {:?}", hubs.told);
    // Its first look at the world is what the stream still has, in one go.
    hubs.members[1] = late;
    let mut history = Vec::new();
    for (kind, topic) in [(BEAT, "ada"), (BEAT, "dead"), (BEAT, "gone"), ("graph.delta.heartbeat.gone", "gone")] {
        history.push(event(kind, topic));
    }
    for (kind, silent) in [("active", 0), ("late", 46), ("dead", 61)] {
        let json = format!(r#"{{"type":"presence.{kind}","topic":"dead","data":{{"emitter":"x","silent":{silent}}}}}"#);
        history.push(Record::event(json.into()).expect("valid"));
    }
    hubs.members[1].as_mut().expect("alive").overhear(&history, Duration::from_secs(1));
    let before = hubs.told.len();
    let summary = hubs.members[1].as_ref().expect("alive").summary(9, Duration::from_secs(1));
    assert_eq!((summary.active, summary.late, summary.dead), (1, 0, 1));
    let news = hubs.members[1].as_mut().expect("alive").look(Duration::from_secs(2));
    assert_eq!((news.len(), hubs.told.len()), (0, before));
}

#[test]
fn a_hub_that_was_wrong_is_corrected_by_the_one_that_knows_better() {
    let mut presence = presence();
    hear(&mut presence, "x", BEAT, "ada", 0);
    let [active] = &presence.look(Duration::ZERO)[..] else { panic!("one") };
    let echo = Record::event(active.event().into()).expect("valid");
    presence.overhear(&[echo], Duration::ZERO);
    let dead = Heart { state: Freshness::Dead, silent: 61.0, ..active.clone() };
    presence.overhear(&[Record::event(dead.event().into()).expect("valid")], Duration::from_secs(1));
    assert_eq!(look(&mut presence, 1), [("x:ada".into(), Freshness::Active)]);
    assert_eq!(look(&mut presence, 2), []);
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
