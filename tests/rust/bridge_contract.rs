//! What every bus promises: the same suite for the one within the process and for a real Redis.

#[path = "support/redis.rs"]
#[expect(clippy::print_stderr, reason = "a test that is skipped says so")]
mod redis_server;

use std::future::Future;
use std::time::Duration;

use bytes::Bytes;
use redis_server::RedisServer;
use safe_broadcaster::hub::bridge::hearing::Hearing;
use safe_broadcaster::hub::bridge::memory::MemoryBus;
use safe_broadcaster::hub::bridge::redis::{RedisBus, RedisConfig};
use safe_broadcaster::hub::bridge::{Appended, Batch, Bus, Claim, Entry, Judged, Known, Link, Message, Stretch};
use safe_broadcaster::secret::Secret;

const PATIENCE: Duration = Duration::from_secs(30);

/// A hub on a bus, as far as the contract goes.
struct Member<L> {
    link: L,
    hearing: Hearing,
    name: String,
    batches: u64,
    known: Known,
}

impl<L: Link> Member<L> {
    async fn join<B: Bus<Link = L>>(bus: &B, name: &str) -> Self {
        let (link, hearing) = bus.connect(name).await.expect("connects");
        let mut member = Self { link, hearing, name: name.to_owned(), batches: 0, known: Known::default() };
        let place = member.link.join(&member.known, &format!("epoch-of-{name}")).await.expect("joins");
        member.known = Known { epoch: place.epoch, head: place.head, run: place.run };
        member
    }

    fn batch(&mut self, entries: Vec<Entry>) -> Batch {
        self.batches += 1;
        Batch { number: self.batches, known: Known::default(), fresh: format!("fresh-{}", self.name), entries }
    }

    async fn append(&mut self, entries: Vec<Entry>) -> Appended {
        let batch = self.batch(entries);
        self.link.append(&batch).await.expect("appends")
    }

    async fn hear(&mut self) -> Message {
        tokio::time::timeout(PATIENCE, self.hearing.next()).await.expect("in time").expect("the link lives")
    }

    async fn probe(&mut self, number: u64) -> Message {
        self.link.probe(number).await.expect("probes");
        self.hear().await
    }
}

/// Records are opaque to a bus, but there is room for so many.
fn records(count: u64, letter: u8) -> Bytes {
    vec![letter; 4 * count as usize].into()
}

fn plain(count: u64, letter: u8) -> Entry {
    Entry { claim: Claim::Plain, count, records: records(count, letter) }
}

fn hello(session: &str, epoch: &str, floor: u64) -> Entry {
    let (emitter, session, epoch) = ("engine one".into(), session.to_owned(), epoch.to_owned());
    Entry { claim: Claim::Hello { emitter, session, epoch, floor }, count: 0, records: Bytes::new() }
}

fn turn(session: &str, from: u64, upto: u64) -> Entry {
    let claim = Claim::Turn { emitter: "engine one".into(), session: session.to_owned(), from, upto };
    Entry { claim, count: 1, records: records(1, b'r') }
}

fn greeted(have: u64, before: &str) -> Judged {
    Judged::Greeted { have, before: before.to_owned() }
}

fn place_of(message: Message) -> (String, u64, bool) {
    let Message::Probe { place, .. } = message else { panic!("no probe: {message:?}") };
    (place.epoch, place.head, place.intake)
}

async fn hubs_share_one_numbering<B: Bus>(bus: B) {
    let (mut a, mut b) = (Member::join(&bus, "a").await, Member::join(&bus, "b").await);
    assert_eq!((&*a.known.epoch, a.known.head), ("epoch-of-a", 0));
    assert_eq!(a.known, b.known);
    let one = a.append(vec![plain(2, b'x'), plain(1, b'y')]).await;
    let two = b.append(vec![plain(1, b'z')]).await;
    assert_eq!((one.first, one.count, one.receivers), (1, 3, 2));
    assert_eq!((two.first, two.count, &two.epoch), (4, 1, &a.known.epoch));
    for member in [&mut a, &mut b] {
        for (first, count, records, by) in [(1, 3, "xxxxxxxxyyyy", "a"), (4, 1, "zzzz", "b")] {
            let block = Stretch { first, count, records: Bytes::from_static(records.as_bytes()) };
            let want = Message::Block { epoch: "epoch-of-a".to_owned(), by: (by.to_owned(), 1), block };
            assert_eq!(member.hear().await, want);
        }
    }
    let later = Member::join(&bus, "c").await;
    assert_eq!((&*later.known.epoch, later.known.head), ("epoch-of-a", 4));
}

async fn a_batch_sent_twice_counts_once_and_a_late_one_not_at_all<B: Bus>(bus: B) {
    let mut a = Member::join(&bus, "a").await;
    let (early, late) = (a.batch(vec![plain(1, b'1')]), a.batch(vec![plain(2, b'2')]));
    let appended = a.link.append(&late).await.expect("appends");
    assert_eq!(a.link.append(&late).await.expect("appends"), appended);
    let refused = a.link.append(&early).await.expect("answers");
    assert_eq!((refused.count, &refused.judged[..]), (0, &[Judged::Refused][..]));
    assert_eq!(a.append(vec![plain(1, b'3')]).await.first, 3);
}

async fn an_emitter_moves_between_hubs_and_nothing_is_doubled<B: Bus>(bus: B) {
    let (mut a, mut b) = (Member::join(&bus, "a").await, Member::join(&bus, "b").await);
    let first = a.append(vec![hello("a/1", "epoch 1", 0), turn("a/1", 0, 5), turn("a/1", 5, 5)]).await;
    assert_eq!(first.judged, [greeted(0, ""), Judged::Kept, Judged::Kept]);
    let moved = b.append(vec![hello("b/1", "epoch 1", 3)]).await;
    assert_eq!(moved.judged, [greeted(5, "a/1")]);
    let old = a.append(vec![turn("a/1", 5, 6)]).await;
    assert_eq!((old.judged, old.count), (vec![Judged::Refused], 0));
    let new = b.append(vec![turn("b/1", 4, 6), turn("b/1", 5, 7)]).await;
    assert_eq!((new.judged, new.count), (vec![Judged::Refused, Judged::Kept], 1));
    // What was acknowledged elsewhere is not waited for; another life of the emitter begins anew.
    assert_eq!(a.append(vec![hello("a/2", "epoch 1", 99)]).await.judged, [greeted(99, "b/1")]);
    assert_eq!(a.append(vec![hello("a/3", "epoch 2", 0)]).await.judged, [greeted(0, "a/2")]);
    let far = u64::MAX - 1;
    let most = a.append(vec![hello("a/4", "epoch 2", far), turn("a/4", far, u64::MAX)]).await;
    assert_eq!(most.judged, [greeted(far, "a/3"), Judged::Kept]);
    assert_eq!(b.append(vec![hello("b/2", "epoch 2", far)]).await.judged, [greeted(u64::MAX, "a/4")]);
}

async fn the_stream_is_read_from_the_block_that_has_an_offset<B: Bus>(bus: B) {
    let mut a = Member::join(&bus, "a").await;
    for count in [3, 1, 2] {
        a.append(vec![plain(count, b'r')]).await;
    }
    let read = |from, most| {
        let link = a.link.clone();
        async move {
            let filled = link.fill(from, most).await.expect("reads");
            assert_eq!((&*filled.place.epoch, filled.place.head), ("epoch-of-a", 6));
            filled.blocks.iter().map(|block| (block.first, block.count)).collect::<Vec<_>>()
        }
    };
    assert_eq!(read(1, 9).await, [(1, 3), (4, 1), (5, 2)]);
    assert_eq!(read(2, 2).await, [(1, 3), (4, 1)]);
    assert_eq!(read(6, 9).await, [(5, 2)]);
    assert_eq!(read(7, 9).await, []);
}

async fn a_large_block_is_only_announced<B: Bus>(bus: B) {
    let mut a = Member::join(&bus, "a").await;
    let large = Bytes::from(vec![b'x'; 33 << 20]);
    a.append(vec![Entry { claim: Claim::Plain, count: 1, records: large.clone() }]).await;
    let by = Some(("a".to_owned(), 1));
    assert_eq!(a.hear().await, Message::Head { epoch: a.known.epoch.clone(), head: 1, by });
    let filled = a.link.fill(1, 9).await.expect("reads");
    assert_eq!(filled.blocks, [Stretch { first: 1, count: 1, records: large }]);
}

async fn a_probe_comes_back_behind_what_was_sent_and_one_hub_takes_in<B: Bus>(bus: B) {
    let (mut a, mut b) = (Member::join(&bus, "a").await, Member::join(&bus, "b").await);
    assert_eq!(b.append(vec![Entry { claim: Claim::Intake, ..plain(1, b'p') }]).await.judged, [Judged::Refused]);
    assert_eq!(place_of(a.probe(7).await), ("epoch-of-a".to_owned(), 0, true));
    assert_eq!(place_of(b.probe(8).await), ("epoch-of-a".to_owned(), 0, false));
    let taken = a.append(vec![Entry { claim: Claim::Intake, ..plain(1, b'p') }]).await;
    assert_eq!(taken.judged, [Judged::Kept]);
    a.link.probe(9).await.expect("probes");
    assert!(matches!(a.hear().await, Message::Block { .. }));
    let Message::Probe { number, place } = a.hear().await else { panic!("no probe") };
    assert_eq!((number, place.head, place.intake), (9, 1, true));
}

async fn a_hub_that_knows_more_than_the_bus_begins_a_new_epoch<B: Bus>(bus: B) {
    let mut a = Member::join(&bus, "a").await;
    a.append(vec![plain(3, b'a')]).await;
    a.known.head = 3;
    assert_eq!(a.link.join(&a.known, "e2").await.expect("joins").epoch, "epoch-of-a");
    a.known.head = 4;
    let place = a.link.join(&a.known, "e2").await.expect("joins");
    assert_eq!((&*place.epoch, place.head), ("e2", 0));
    assert_eq!(a.link.fill(1, 9).await.expect("reads").blocks, [], "the old stream is gone");
    let mut batch = a.batch(vec![plain(1, b'd')]);
    batch.known = Known { epoch: "e2".to_owned(), head: 1, run: String::new() };
    let appended = a.link.append(&batch).await.expect("appends");
    assert_eq!((&*appended.epoch, appended.first), ("fresh-a", 1));
}

async fn a_hub_that_leaves_frees_the_intake_and_says_so<B: Bus>(bus: B) {
    let (mut a, mut b) = (Member::join(&bus, "a").await, Member::join(&bus, "b").await);
    assert!(place_of(a.probe(1).await).2);
    assert!(!place_of(b.probe(1).await).2);
    b.link.leave().await.expect("leaves what it does not have");
    a.link.leave().await.expect("leaves");
    assert_eq!(b.hear().await, Message::Free);
    assert!(place_of(b.probe(2).await).2);
}

fn run<F: Future<Output = ()>>(test: F) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async { tokio::time::timeout(2 * PATIENCE, test).await.expect("in time") });
}

fn config(server: &RedisServer, channel: &str) -> RedisConfig {
    RedisConfig {
        url: Secret::new(server.url()),
        channel: channel.to_owned(),
        ca: None,
        keep: 100,
        keep_bytes: 0,
        keep_age: None,
        probe_interval: Duration::from_secs(2),
    }
}

fn redis(server: &RedisServer, channel: &str) -> RedisBus {
    RedisBus::new(&config(server, channel)).expect("valid")
}

macro_rules! on_both {
    ($($promise:ident),* $(,)?) => {
        mod memory { $(#[test] fn $promise() { super::run(super::$promise(super::MemoryBus::new())); })* }
        mod redis { $(#[test] fn $promise() {
            let Some(server) = super::RedisServer::start() else { return };
            super::run(super::$promise(super::redis(&server, "contract")));
        })* }
    };
}

on_both!(
    hubs_share_one_numbering,
    a_batch_sent_twice_counts_once_and_a_late_one_not_at_all,
    an_emitter_moves_between_hubs_and_nothing_is_doubled,
    the_stream_is_read_from_the_block_that_has_an_offset,
    a_large_block_is_only_announced,
    a_probe_comes_back_behind_what_was_sent_and_one_hub_takes_in,
    a_hub_that_knows_more_than_the_bus_begins_a_new_epoch,
    a_hub_that_leaves_frees_the_intake_and_says_so,
);

#[test]
fn redis_that_forgot_its_scripts_or_everything_goes_on() {
    let Some(server) = RedisServer::start() else { return };
    run(async {
        let mut a = Member::join(&redis(&server, "one"), "a").await;
        assert_eq!(server.command(&["SCRIPT", "FLUSH"]), "OK");
        assert_eq!(a.append(vec![plain(1, b'x')]).await.first, 1);
        assert!(matches!(a.hear().await, Message::Block { .. }));
        assert_eq!(server.command(&["FLUSHALL"]), "OK");
        assert_eq!(place_of(a.probe(1).await).0, "", "there is no stream, and nobody founds one by looking");
        let appended = a.append(vec![plain(1, b'y')]).await;
        assert_eq!((&*appended.epoch, appended.first), ("fresh-a", 1));
    });
}

#[test]
fn two_channels_and_two_databases_do_not_hear_each_other() {
    let Some(server) = RedisServer::start() else { return };
    run(async {
        let (mut one, mut two) =
            (Member::join(&redis(&server, "one"), "a").await, Member::join(&redis(&server, "two"), "b").await);
        one.append(vec![plain(1, b'x')]).await;
        assert_eq!(place_of(two.probe(1).await), ("epoch-of-b".to_owned(), 0, true));
        server.command(&["PUBLISH", "two", "{}"]);
        assert!(matches!(one.hear().await, Message::Block { .. }));
        assert_eq!(two.hear().await, Message::Plain(Bytes::from_static(b"{}")));
        assert_eq!(place_of(one.probe(2).await).1, 1);
    });
}

#[test]
fn a_long_stream_is_trimmed_but_keeps_what_was_promised() {
    let Some(server) = RedisServer::start() else { return };
    run(async {
        let mut a = Member::join(&redis(&server, "one"), "a").await;
        for _ in 0..30 {
            a.append((0..10).map(|_| plain(1000, b'x')).collect()).await;
        }
        let blocks = a.link.fill(1, 1000).await.expect("reads").blocks;
        let first = blocks.first().expect("some").first;
        assert!((1..=290_001).contains(&first), "the last 10 000 are kept: {first}");
        assert!(server.command(&["XLEN", "{sb1:one}:stream"]).parse::<u64>().expect("a number") <= 30);
    });
}

#[test]
fn a_password_is_shown_nowhere() {
    let config = |url: &str| RedisConfig {
        url: Secret::new(url),
        channel: "c".to_owned(),
        ca: None,
        keep: 1,
        keep_bytes: 0,
        keep_age: None,
        probe_interval: Duration::from_secs(1),
    };
    let config_with = config("redis://user:s3cret@127.0.0.1:1/0");
    let bus = RedisBus::new(&config_with).expect("valid");
    assert!(!format!("{config_with:?}{bus:?}").contains("s3cret"));
    run(async {
        let error = bus.connect("a").await.expect_err("nobody is there");
        assert!(error.report().contains("127.0.0.1:1") && !error.report().contains("s3cret"), "{}", error.report());
    });
    for wrong in ["", "s3cret", "http://user:s3cret@host", "redis://:s3cret@host/notanumber"] {
        let error = RedisBus::new(&config(wrong)).expect_err(wrong);
        assert!(error.to_string().contains("redis_client") && !error.report().contains("s3cret"), "{}", error.report());
    }
}

#[test]
fn a_hub_that_was_away_for_two_lives_of_redis_is_not_believed_to_have_the_same() {
    let Some(server) = RedisServer::start() else { return };
    run(async {
        let bus = redis(&server, "one");
        let mut a = Member::join(&bus, "a").await;
        a.append(vec![plain(3, b'a')]).await;
        a.known.head = 3;
        // A replica without the last record took over, went on, and gave way to the one that led before, which followed it.
        let meta = "{sb1:one}:meta";
        let lives = format!("{} other/2:2", server.command(&["HGET", meta, "lives"]));
        server.command(&["HSET", meta, "run", "other", "lives", &lives, "head", "5"]);
        let b = Member::join(&bus, "b").await;
        assert_eq!((&b.known.epoch, b.known.head), (&a.known.epoch, 5));
        assert_ne!(b.known.run, a.known.run);
        let place = a.link.join(&a.known, "e2").await.expect("joins");
        assert_eq!((&*place.epoch, place.head), ("e2", 0), "its third record is another one");
        // Who knew no more than what all lives have in common goes on.
        let c = Member::join(&bus, "c").await;
        server.command(&["HSET", meta, "run", "third"]);
        assert_eq!(c.link.join(&c.known, "e3").await.expect("joins").epoch, "e2");
    });
}

#[test]
fn the_stream_is_bounded_by_bytes_and_by_age() {
    let Some(server) = RedisServer::start() else { return };
    run(async {
        let old = RedisConfig { keep_age: Some(Duration::from_secs(1)), ..config(&server, "aged") };
        let (large, aged) = (redis(&server, "large"), RedisBus::new(&old).expect("valid"));
        let mut a = Member::join(&large, "a").await;
        for _ in 0..30 {
            let records = vec![b'x'; 4 << 20].into();
            a.append(vec![Entry { claim: Claim::Plain, count: 1, records }]).await;
        }
        let blocks = a.link.fill(1, 1000).await.expect("reads").blocks;
        let bytes: usize = blocks.iter().map(|block| block.records.len()).sum();
        assert!((56 << 20..=68 << 20).contains(&bytes), "{bytes}");
        assert_eq!(blocks.last().map(Stretch::last), Some(30));
        assert_eq!(server.command(&["HGET", "{sb1:large}:meta", "bytes"]), (16 * (4 << 20)).to_string());
        let used: usize = server.command(&["MEMORY", "USAGE", "{sb1:large}:stream"]).parse().expect("a number");
        assert!(used < 100 << 20, "{used}");

        let mut b = Member::join(&aged, "b").await;
        loop {
            let appended = b.append(vec![plain(100, b'y')]).await;
            let first = b.link.fill(1, 1).await.expect("reads").blocks[0].first;
            assert!(first == 1 || appended.first > 100);
            if first > 1 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
}

#[test]
fn a_rehearsal_leaves_no_trace() {
    let Some(server) = RedisServer::start() else { return };
    run(async {
        let a = Member::join(&redis(&server, "one"), "a").await;
        assert_eq!(server.command(&["KEYS", "*"]), "{sb1:one}:meta");
        a.link.probe(1).await.expect("probes");
        a.link.leave().await.expect("leaves");
        assert_eq!(server.command(&["KEYS", "*"]), "{sb1:one}:meta");
    });
}
