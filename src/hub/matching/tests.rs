use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use bytes::Bytes;
use proptest::prelude::*;

use super::*;

fn filter(patterns: &[impl AsRef<str>]) -> Arc<Filter> {
    Arc::new(Filter::new(patterns.iter().map(|text| Pattern::parse(text.as_ref()).expect("valid"))))
}

fn event(kind: &str, topic: &str) -> Record {
    let json = serde_json::json!({"type": kind, "topic": topic}).to_string();
    Record::event(Bytes::from(json)).expect("valid")
}

fn member(slot: usize) -> SessionId {
    SessionId::for_test(slot as u32)
}

fn reached(groups: &mut Groups, record: &Record) -> Vec<SessionId> {
    let mut reached = Vec::new();
    groups.for_each(record, |members| reached.extend_from_slice(members));
    reached
}

#[test]
fn a_group_whose_several_patterns_match_is_met_once() {
    let mut groups = Groups::default();
    groups.join(&filter(&["*", "a.*", "a.b", "*.b", "x/*", "x/y"]), member(1));
    assert_eq!(reached(&mut groups, &event("a.b", "x/y")), [member(1)]);
    assert_eq!(reached(&mut groups, &event("a.b", "x/y")), [member(1)]);
}

#[test]
fn a_filter_is_matched_the_same_with_an_index_and_without() {
    let few = filter(&["a.*", "x/y"]);
    let many = filter(&["a.*", "x/y", "1", "2", "3", "4", "5", "6", "7", "8", "a.b"]);
    for filter in [few, many, filter(&[""; 0])] {
        let mut matcher = Matcher::new(filter.clone());
        for record in [event("a.b", ""), event("a", "x/y"), event("a", "x"), Record::gap("e", "1", 1, 2, "crash")] {
            assert_eq!(matcher.matches(&record), filter.matches(&record), "{filter:?} {record:?}");
        }
    }
}

#[test]
fn a_gap_reaches_every_group() {
    let mut groups = Groups::default();
    groups.join(&filter(&["a", "b.*"]), member(1));
    groups.join(&filter(&["x/y"]), member(2));
    assert_eq!(reached(&mut groups, &Record::gap("e", "1", 1, 2, "crash")), [member(1), member(2)]);
}

#[test]
fn nothing_is_left_behind_by_those_who_left() {
    let mut groups = Groups::default();
    for round in 0..3 {
        let filters: Vec<_> =
            (0..100).map(|n| filter(&[format!("a.{n}.*.b{round}"), format!("t/*/{n}"), "*".into()])).collect();
        for (n, filter) in filters.iter().enumerate() {
            groups.join(filter, member(n));
        }
        for (n, filter) in filters.iter().enumerate() {
            groups.leave(filter, member(n));
            groups.leave(filter, member(n));
        }
        assert!(groups.is_empty() && groups.index.all.is_empty());
        for trie in [&groups.index.kinds, &groups.index.topics] {
            assert!(trie.symbols.is_empty() && trie.edges.is_empty() && trie.nodes[ROOT as usize].is_unused());
            assert_eq!(trie.nodes.len(), trie.free_nodes.len() + 1, "every node but the root is free");
        }
        assert!(reached(&mut groups, &event("a.1.x.b0", "t/x/1")).is_empty());
    }
    // Each round found the room of the one before.
    assert!(groups.slots.len() <= 100 && groups.index.kinds.nodes.len() <= 400);
}

/// Names of few segments over few texts, so that patterns and events meet often.
fn name(separator: &'static str, stars: bool) -> impl Strategy<Value = String> {
    let segment = if stars {
        prop_oneof![2 => Just("*"), 2 => Just("a"), 1 => Just("b"), 1 => Just("")].boxed()
    } else {
        prop_oneof![4 => Just("a"), 2 => Just("b"), 1 => Just("*"), 1 => Just("")].boxed()
    };
    prop::collection::vec(segment, 1..6).prop_map(move |segments| segments.join(separator))
}

fn pattern() -> impl Strategy<Value = Pattern> {
    prop_oneof![name(".", true), name("/", true)]
        .prop_filter_map("an empty text is no pattern", |text| Pattern::parse(&text).ok())
}

proptest! {
    #[test]
    fn the_index_finds_what_the_patterns_match_one_by_one(
        filters in prop::collection::vec(prop::collection::vec(pattern(), 1..5), 1..40),
        gone in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
        events in prop::collection::vec((name(".", false), name("/", false)), 1..20),
    ) {
        let mut filters: Vec<_> = filters.into_iter().map(|patterns| Some(Arc::new(Filter::new(patterns)))).collect();
        let mut groups = Groups::default();
        for (n, filter) in filters.iter().enumerate() {
            groups.join(filter.as_ref().expect("all are there"), member(n));
        }
        for index in gone {
            let n = index.index(filters.len());
            if let Some(filter) = filters[n].take() {
                groups.leave(&filter, member(n));
            }
        }
        for (kind, topic) in events {
            let record = event(&kind, &topic);
            let found = reached(&mut groups, &record);
            let wanted: BTreeSet<usize> = filters.iter().enumerate()
                .filter(|(_, filter)| filter.as_ref().is_some_and(|filter| filter.matches(&record)))
                .map(|(n, _)| n).collect();
            let wanted: Vec<_> = wanted.into_iter().map(member).collect();
            prop_assert_eq!(found.len(), wanted.len(), "each once: {} {}", kind, topic);
            prop_assert!(wanted.iter().all(|id| found.contains(id)), "{} {}", kind, topic);
        }
    }
}

/// How many nodes a walk looks at, the measure of its time.
fn steps(groups: &mut Groups, kind: &str) -> usize {
    let trie = &groups.index.kinds;
    let mut here = vec![ROOT];
    let mut steps = 0;
    for segment in kind.split('.') {
        steps += here.len();
        let node = |at: &NodeId| &trie.nodes[*at as usize];
        let stars = here.iter().map(|at| node(at).star).filter(|to| *to != ROOT);
        let texts = here.iter().filter_map(|at| trie.edges.get(&(*at, trie.symbol(segment)?)).copied());
        here = stars.chain(texts).collect();
    }
    steps + here.len()
}

#[test]
fn the_worst_patterns_cost_no_more_than_their_number() {
    // Every mixture of `a` and `*`: each beginning of the event leads to all nodes of its depth.
    let mut groups = Groups::default();
    let mut segments = 0;
    for mixture in 0..1 << 12 {
        let text: Vec<_> = (0..12).map(|bit| if mixture >> bit & 1 == 1 { "*" } else { "a" }).collect();
        groups.join(&filter(&[text.join(".")]), member(mixture));
        segments += 12;
    }
    let kind = ["a"; 12].join(".");
    assert_eq!(reached(&mut groups, &event(&kind, "")).len(), 1 << 12);
    assert!(steps(&mut groups, &kind) <= segments);

    // The longest pattern of stars, events of thousands of segments.
    let mut groups = Groups::default();
    groups.join(&filter(&[["*"; Pattern::MAX_SEGMENTS].join(".")]), member(0));
    groups.join(&filter(&[["a"; Pattern::MAX_SEGMENTS].join(".")]), member(1));
    let kind = vec!["a"; 100_000].join(".");
    assert_eq!(reached(&mut groups, &event(&kind, "")), [member(0)]);
    assert!(steps(&mut groups, &kind) <= 2 * Pattern::MAX_SEGMENTS);
    let dots = ".".repeat(100_000);
    assert_eq!(reached(&mut groups, &event(&dots, "")), [member(0)]);
}

/// Nanoseconds for each event, held against so many distinct patterns; the one-by-one way beside it.
fn cost(patterns: usize) -> (f64, f64) {
    const EVENTS: usize = 1000;
    let filters: Vec<_> = (0..patterns)
        .map(|n| match n % 4 {
            0 => filter(&[format!("graph.delta.node{n}")]),
            1 => filter(&[format!("alert.{n}.*")]),
            2 => filter(&[format!("camera.*.room{n}")]),
            _ => filter(&[format!("graph/{n}/delta/*")]),
        })
        .collect();
    let mut groups = Groups::default();
    for (n, filter) in filters.iter().enumerate() {
        groups.join(filter, member(n));
    }
    let events: Vec<_> = (0..EVENTS)
        .map(|n| {
            let n = n * 7 % patterns;
            match n % 4 {
                0 => event(&format!("graph.delta.node{n}"), "graph/x/delta/node"),
                1 => event(&format!("alert.{n}.disk"), "alert/x"),
                2 => event(&format!("camera.front.room{n}"), ""),
                _ => event("graph.delta.other", &format!("graph/{n}/delta/node")),
            }
        })
        .collect();
    let measure = |rounds: usize, mut one: Box<dyn FnMut(&Record) -> usize + '_>| {
        let begin = Instant::now();
        let mut met = 0;
        for _ in 0..rounds {
            met += events.iter().map(&mut one).sum::<usize>();
        }
        assert_eq!(met, rounds * EVENTS, "each event has its one pattern");
        begin.elapsed().div_f64((rounds * EVENTS) as f64)
    };
    let indexed = measure(200, Box::new(|record| reached(&mut groups, record).len()));
    let rounds = (20_000 / patterns).clamp(1, 200);
    let naive = measure(rounds, Box::new(|record| filters.iter().filter(|filter| filter.matches(record)).count()));
    let nanos = |each: Duration| each.as_secs_f64() * 1e9;
    (nanos(indexed), nanos(naive))
}

/// `cargo test --release --no-default-features --lib matching -- --ignored --nocapture`
#[test]
#[ignore = "a measurement, for docs/performance.md"]
#[expect(clippy::print_stdout, reason = "its output is its purpose")]
fn nanoseconds_for_each_event() {
    for patterns in [1, 4, 10, 100, 1000, 10_000] {
        let (indexed, naive) = cost(patterns);
        println!("{patterns:>6} patterns: {indexed:>7.0} ns indexed, {naive:>9.0} ns one by one");
    }
}
