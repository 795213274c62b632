use super::*;
use crate::emitter::item::GapReason;
use crate::emitter::outbox::Fresh;
use crate::emitter::spill::Done;
use crate::emitter::spill::parked::Parking;
use crate::emitter::tests::config;
use crate::error::ErrorKind;
use crate::wire::block::BlockBuilder;

const SECOND: Duration = Duration::from_secs(1);

fn at(seconds: f64) -> Time {
    Duration::from_secs_f64(seconds)
}

fn recovered(last: u64) -> Recovered {
    let (emitter, epoch) = ("ada".to_owned(), "e".to_owned());
    let next_seq = last + 1;
    Recovered {
        emitter,
        epoch,
        next_seq,
        reserved: last,
        base: 0,
        last,
        gaps: vec![],
        bytes: 0,
        oldest: None,
        parked: 0,
        held: vec![],
        ring: None,
        damage: None,
    }
}

fn events(first: u64, last: u64, size: usize) -> Item {
    let mut builder = BlockBuilder::new(first, bytes::BytesMut::new());
    (first..=last).for_each(|_| builder.push(&vec![b' '; size]));
    Item::Events(builder.seal().expect("not empty"))
}

fn error() -> Error {
    Error::new(ErrorKind::ConnectRefused, "gone")
}

/// A machine with a disk that does everything at once.
struct Bench {
    machine: Machine,
    stored: Vec<Item>,
    reports: Vec<Report>,
    flushed: Vec<FlushOutcome>,
    connects: u32,
    disconnects: u32,
    parked: Vec<u64>,
    /// Whether the disk refuses to park.
    refuses: bool,
}

impl Bench {
    fn new(config: EmitterConfig, stored: u64) -> Self {
        let machine = Machine::new(config, &recovered(stored), 7);
        let stored = if stored > 0 { vec![events(1, stored, 10)] } else { Vec::new() };
        Self {
            machine,
            stored,
            reports: Vec::new(),
            flushed: Vec::new(),
            connects: 0,
            disconnects: 0,
            parked: Vec::new(),
            refuses: false,
        }
    }

    fn live(config: EmitterConfig, stored: u64, confirm: Confirm) -> Self {
        let mut bench = Self::new(config, stored);
        bench.machine.start(Time::ZERO);
        bench.act(Time::ZERO);
        bench.up(Time::ZERO, confirm);
        bench
    }

    fn up(&mut self, now: Time, confirm: Confirm) {
        self.machine.on_link_up(now, Welcome { confirm, have: 0, credit: u64::MAX }).expect("welcome");
        self.act(now);
    }

    fn accept(&mut self, now: Time, item: Item) {
        let spilled = if self.machine.is_live() { 0 } else { item.events() };
        self.machine.on_accepted(now, Fresh { item, spilled, since: now }, now);
        self.act(now);
    }

    fn time(&mut self, now: Time) {
        self.machine.on_time(now, 0, 0, 0);
        self.act(now);
    }

    fn act(&mut self, now: Time) {
        while let Some(action) = self.machine.poll_action() {
            match action {
                Action::Connect => self.connects += 1,
                Action::Disconnect => self.disconnects += 1,
                Action::Report(report) => self.reports.push(report),
                Action::Flushed(outcome) => self.flushed.push(outcome),
                Action::Release(_) | Action::Refused { .. } | Action::Requeue(_) => {}
                Action::Spill(op) => {
                    let done = self.store(op);
                    self.machine.on_spill(now, done);
                }
            }
        }
    }

    fn store(&mut self, op: Op) -> Done {
        match op {
            Op::Append { items, .. } => {
                let upto = items.last().map_or(0, Item::last);
                self.stored.extend(items);
                Done::Appended { upto, dropped: Vec::new(), bytes: 0 }
            }
            Op::Read { after, .. } => Done::Read(Ok(self.stored.iter().filter_map(|item| item.after(after)).collect())),
            Op::Trim { .. } => Done::Trimmed { result: Ok(()), bytes: 0 },
            Op::Reserve { upto, .. } => Done::Reserved { upto, result: Ok(()) },
            Op::Close { .. } => Done::Closed(Ok(())),
            Op::Park { seq, .. } if self.refuses => {
                let error = Error::new(ErrorKind::SpillIo, "full");
                Done::Parked { seq, result: Err(error), bytes: 0 }
            }
            Op::Park { seq, .. } => {
                self.parked.push(seq);
                let gap = Item::Gap(Gap { from: seq, to: seq, reason: GapReason::Refused });
                let divide = |item: Item| match item {
                    item if item.first() > seq || item.last() < seq => vec![item],
                    item => {
                        let (first, after) = (item.first(), item.after(seq));
                        let before = (seq > first).then(|| item.head(seq - first));
                        before.into_iter().chain([gap.clone()]).chain(after).collect()
                    }
                };
                self.stored = self.stored.drain(..).flat_map(divide).collect();
                let parking = Parking { parked: self.parked.len() as u64, dropped: Vec::new() };
                Done::Parked { seq, result: Ok(parking), bytes: 0 }
            }
            Op::Unpark { ids } => Done::Unparked { ids, result: Ok(()), parked: 0 },
            Op::Probe => Done::Probed(Ok(())),
            Op::Peek { .. } => unreachable!("nobody peeks here"),
        }
    }

    /// Everything that may go out now: spans of events, and Pings.
    fn sent(&mut self, now: Time) -> Vec<String> {
        let mut sent = Vec::new();
        loop {
            match self.machine.poll_outgoing(now) {
                Some(Outgoing::Item(item)) => sent.push(format!("{}-{}", item.first(), item.last())),
                Some(Outgoing::Ping(number)) => sent.push(format!("ping {number}")),
                Some(Outgoing::AckNow) => sent.push("ack_now".to_owned()),
                None if self.machine.has_actions() => self.act(now),
                None => return sent,
            }
        }
    }

    fn names(&self) -> Vec<&str> {
        self.reports.iter().map(|report| report.event_type).collect()
    }
}

#[test]
fn ready_is_latched_and_live_is_not() {
    let mut bench = Bench::new(config(), 0);
    assert!(!bench.machine.is_ready());
    bench.machine.start(Time::ZERO);
    bench.act(Time::ZERO);
    assert_eq!((bench.connects, bench.machine.is_ready()), (1, false));
    bench.up(Time::ZERO, Confirm::Acks);
    assert!(bench.machine.is_ready() && bench.machine.is_live());
    bench.machine.on_link_down(SECOND, &error());
    assert!(bench.machine.is_ready() && !bench.machine.is_live());
}

#[test]
fn what_was_spilled_goes_out_before_what_is_live() {
    let mut bench = Bench::live(config(), 4, Confirm::Acks);
    bench.accept(at(0.1), events(5, 6, 10));
    assert_eq!(bench.sent(at(0.1)), ["1-4", "5-6"]);
    bench.machine.on_ack(at(0.2), 4).expect("sent");
    bench.act(at(0.2));
    assert_eq!(bench.names(), ["broadcaster_ready", "broadcaster_flush_complete"]);
}

#[test]
fn nothing_goes_out_before_its_seq_is_promised_on_disk() {
    let mut bench = Bench::live(config(), 0, Confirm::Acks);
    bench.machine.on_accepted(at(0.1), Fresh { item: events(1, 1, 10), spilled: 0, since: Time::ZERO }, at(0.1));
    assert!(bench.machine.poll_outgoing(at(0.1)).is_none(), "a crash could use seq 1 again");
    bench.act(at(0.1));
    assert_eq!(bench.sent(at(0.1)), ["1-1"]);
}

#[test]
fn a_stalled_link_moves_memory_to_disk() {
    let mut bench = Bench::live(EmitterConfig { outbox_bytes: 1000, ..config() }, 0, Confirm::Acks);
    bench.accept(Time::ZERO, events(1, 10, 200));
    assert_eq!(bench.sent(Time::ZERO), ["1-10"]);
    let stalls = bench.machine.deadline(Time::ZERO).expect("memory is full");
    assert_eq!(stalls, STALL);
    assert!(bench.stored.is_empty());
    bench.time(stalls);
    assert_eq!((bench.stored.len(), bench.machine.snapshot().held, bench.machine.snapshot().demoted), (1, 0, 10));
    bench.machine.on_ack(SECOND, 10).expect("sent");
    assert_eq!(bench.machine.snapshot().balance, 0);
}

#[test]
fn a_hub_that_has_more_of_us_than_we_sent_is_refused() {
    let mut bench = Bench::new(config(), 0);
    bench.accept(Time::ZERO, events(1, 3, 10));
    let welcome = |have| Welcome { confirm: Confirm::Acks, have, credit: 1 };
    let error = bench.machine.on_link_up(Time::ZERO, welcome(4)).expect_err("only 3 exist, though more are promised");
    assert_eq!(error.kind(), ErrorKind::Protocol);
    bench.machine.on_link_up(Time::ZERO, welcome(3)).expect("all of ours");
    assert_eq!(bench.machine.acked(), 3);
}

#[test]
fn an_ack_of_what_was_never_sent_is_refused() {
    let mut bench = Bench::live(config(), 0, Confirm::Acks);
    bench.accept(Time::ZERO, events(1, 3, 10));
    assert_eq!(bench.machine.on_ack(Time::ZERO, 1).expect_err("not sent yet").kind(), ErrorKind::Protocol);
    bench.sent(Time::ZERO);
    bench.machine.on_ack(Time::ZERO, 3).expect("sent");
}

#[test]
fn links_that_never_confirm_open_the_breaker() {
    let config = EmitterConfig { breaker_threshold: 2, jitter: 0.0, ..config() };
    let mut bench = Bench::live(config, 5, Confirm::Pings);
    bench.machine.on_link_down(SECOND, &error());
    bench.time(at(2.0));
    bench.up(at(2.0), Confirm::Pings);
    bench.machine.on_link_down(at(3.0), &error());
    bench.time(at(5.0));
    assert_eq!((bench.machine.snapshot().breaker, bench.connects), ("open", 2));
    bench.time(at(8.0)); // the flush is late by now, and that is reported
    assert_eq!(bench.machine.deadline(at(8.0)), Some(at(33.0)), "it waits for the breaker, not for the backoff");
    bench.machine.flush_now(at(9.0));
    bench.act(at(9.0));
    assert_eq!(bench.flushed, [FlushOutcome { flushed: 0, failed: 1, remaining: 5 }], "and so does flush_now");
    bench.time(at(33.0));
    assert_eq!((bench.machine.snapshot().breaker, bench.connects), ("half_open", 3));
}

#[test]
fn an_idle_link_is_pinged_and_an_answer_proves_it() {
    let mut bench = Bench::live(EmitterConfig { breaker_threshold: 1, ..config() }, 0, Confirm::Acks);
    let idle = bench.machine.deadline(Time::ZERO).expect("a ping is due");
    assert_eq!(idle, config().ping_interval);
    bench.time(idle);
    assert_eq!(bench.sent(idle), ["ping 0"]);
    bench.machine.on_pong(idle + SECOND, 0);
    bench.machine.on_link_down(idle + 2 * SECOND, &error());
    assert_eq!(bench.machine.snapshot().breaker, "closed");
}

#[test]
fn a_link_that_does_not_answer_is_given_up() {
    let mut bench = Bench::live(config(), 0, Confirm::Pings);
    bench.accept(Time::ZERO, events(1, 2, 10));
    assert_eq!(bench.sent(Time::ZERO), ["1-2", "ping 2"]);
    bench.time(config().ack_timeout);
    assert_eq!((bench.disconnects, bench.machine.is_live(), bench.machine.snapshot().demoted), (1, false, 2));
}

#[test]
fn a_long_pause_before_an_event_is_not_held_against_the_link() {
    // One event in 200 s, with four ack_timeouts being 120.
    let mut bench = Bench::live(EmitterConfig { flush_rate: Some(0.005), ..config() }, 3, Confirm::Acks);
    assert_eq!(bench.sent(Time::ZERO), ["1-1"]);
    bench.machine.on_ack(SECOND, 1).expect("sent");
    for second in 2..=205 {
        bench.machine.on_progress(at(f64::from(second)));
        bench.time(at(f64::from(second)));
    }
    assert_eq!(bench.sent(at(205.0)).last().map(String::as_str), Some("2-2"));
    bench.time(at(206.0));
    assert!(bench.machine.is_live());
}

#[test]
fn an_ack_is_asked_for_where_somebody_waits_and_only_there() {
    let mut bench = Bench::live(config(), 0, Confirm::Acks);
    bench.accept(SECOND, events(1, 2, 10));
    assert_eq!(bench.sent(SECOND), ["1-2"], "nobody waits");
    bench.machine.want(2);
    assert_eq!(bench.sent(SECOND), ["ack_now"], "it was sent before");
    assert!(bench.sent(SECOND).is_empty(), "once");
    bench.machine.want(5);
    assert!(bench.sent(SECOND).is_empty(), "there is nothing new to ask for");
    bench.accept(SECOND, events(3, 4, 10));
    bench.accept(SECOND, events(5, 6, 10));
    assert_eq!(bench.sent(SECOND), ["3-4", "5-6", "ack_now"], "behind all that goes out");
    bench.machine.on_ack(SECOND, 6).expect("sent");
    bench.accept(SECOND, events(7, 7, 10));
    assert_eq!(bench.sent(SECOND), ["7-7"]);
    bench.machine.want(3);
    assert!(bench.sent(SECOND).is_empty(), "that is confirmed");
    bench.machine.stop(SECOND, 60 * SECOND);
    assert_eq!(bench.sent(SECOND), ["ack_now"], "a stop waits for everything");
}

#[test]
fn an_ack_is_asked_for_again_on_the_next_link() {
    let mut bench = Bench::live(config(), 0, Confirm::Acks);
    bench.accept(SECOND, events(1, 2, 10));
    bench.machine.want(2);
    assert_eq!(bench.sent(SECOND), ["1-2", "ack_now"]);
    bench.machine.on_link_down(SECOND, &error());
    bench.act(SECOND);
    bench.up(2 * SECOND, Confirm::Acks);
    assert_eq!(bench.sent(2 * SECOND), ["1-2", "ack_now"]);
    bench.machine.flush_now(2 * SECOND);
    assert!(bench.sent(2 * SECOND).is_empty(), "it was asked for already");
    for confirm in [Confirm::Pings, Confirm::Sends] {
        let mut bench = Bench::live(config(), 0, confirm);
        bench.accept(SECOND, events(1, 2, 10));
        bench.machine.want(2);
        assert!(!bench.sent(SECOND).contains(&"ack_now".to_owned()), "only our hub knows that word");
    }
}

#[test]
fn no_more_goes_out_than_the_credit_allows() {
    let mut bench = Bench::new(config(), 0);
    bench.machine.start(Time::ZERO);
    bench.machine.on_link_up(Time::ZERO, Welcome { confirm: Confirm::Acks, have: 0, credit: 5 }).expect("welcome");
    bench.act(Time::ZERO);
    bench.accept(SECOND, events(1, 3, 10));
    bench.accept(SECOND, events(4, 20, 10));
    assert_eq!(bench.sent(SECOND), ["1-3", "4-5"]);
    bench.machine.on_ack(SECOND, 3).expect("sent");
    assert_eq!(bench.sent(SECOND), ["6-8"], "blocks are cut anywhere");
    bench.machine.on_credit(2);
    assert!(bench.sent(SECOND).is_empty());
    bench.machine.on_ack(SECOND, 6).expect("sent");
    assert!(bench.sent(SECOND).is_empty(), "7 and 8 use the smaller credit up");
    bench.machine.on_ack(SECOND, 8).expect("sent");
    assert_eq!(bench.sent(SECOND), ["9-10"]);
    bench.machine.on_credit(100);
    assert_eq!(bench.sent(SECOND), ["11-20"]);
    bench.machine.on_ack(SECOND, 20).expect("sent");
    bench.machine.on_credit(1);
    bench.accept(SECOND, Item::Gap(Gap { from: 21, to: 99, reason: crate::emitter::item::GapReason::OutboxFull }));
    bench.accept(SECOND, events(100, 100, 10));
    assert_eq!(bench.sent(SECOND), ["21-99"], "a gap is one frame, and what follows it waits");
    bench.machine.on_ack(SECOND, 99).expect("sent");
    assert_eq!(bench.sent(SECOND), ["100-100"]);
}

/// Bytes of events in one of these blocks.
const BLOCK: usize = 64 << 10;

/// Spilled blocks of 64 KiB, one event each, and a link that confirms by Pong.
fn flushing(blocks: u64) -> Bench {
    let config = EmitterConfig { outbox_bytes: 16 << 20, ..config() };
    let mut bench = Bench::new(config, blocks);
    bench.stored = (1..=blocks).map(|seq| events(seq, seq, BLOCK)).collect();
    bench.machine.start(Time::ZERO);
    bench.act(Time::ZERO);
    bench.up(Time::ZERO, Confirm::Pings);
    bench
}

/// The Ping under way is answered after `took`, and what may go out then does.
fn answer(bench: &mut Bench, at: &mut Time, took: Duration) {
    *at += took;
    bench.machine.on_pong(*at, bench.machine.ledger.sent());
    bench.act(*at);
    bench.sent(*at);
}

#[test]
fn a_flush_to_a_server_without_credit_begins_small_and_doubles() {
    let mut bench = flushing(2000);
    assert_eq!(bench.sent(Time::ZERO).len(), 4 + 1, "256 KiB and their Ping");
    let (mut at, mut rounds) = (Time::ZERO, 0);
    while bench.machine.snapshot().window < 16 << 20 {
        let window = bench.machine.snapshot().window;
        answer(&mut bench, &mut at, Duration::from_millis(1));
        let Snapshot { acked_seq, in_flight_bytes, window: grown, .. } = bench.machine.snapshot();
        let confirmed = bench.stored[..acked_seq as usize].iter().map(Item::bytes).sum::<usize>();
        assert_eq!(grown, ((256 << 10) + confirmed).min(16 << 20), "it grows by what is confirmed");
        let in_flight = in_flight_bytes as usize;
        assert!(grown > window && (grown..grown + 2 * BLOCK).contains(&in_flight), "{in_flight} of {grown} bytes");
        rounds += 1;
    }
    assert!(rounds <= 15, "the full window after {rounds} round trips");
}

#[test]
fn a_link_lost_in_a_flush_halves_what_the_next_one_begins_with() {
    let mut bench = flushing(2000);
    bench.sent(Time::ZERO);
    let mut at = Time::ZERO;
    for _ in 0..5 {
        answer(&mut bench, &mut at, Duration::from_millis(1));
    }
    let before = bench.machine.snapshot().window;
    assert!(before > 1 << 20);
    bench.machine.on_link_down(SECOND, &error());
    bench.act(SECOND);
    bench.up(2 * SECOND, Confirm::Pings);
    bench.sent(2 * SECOND);
    let Snapshot { in_flight_bytes, window, .. } = bench.machine.snapshot();
    assert_eq!(window, before / 2);
    assert!((window..window + 2 * BLOCK).contains(&(in_flight_bytes as usize)), "{in_flight_bytes} bytes");
}

#[test]
fn a_link_lost_with_nothing_under_way_says_nothing_of_the_server() {
    let mut bench = Bench::live(config(), 0, Confirm::Pings);
    bench.machine.on_link_down(SECOND, &error());
    bench.act(SECOND);
    bench.up(2 * SECOND, Confirm::Pings);
    assert_eq!(bench.machine.snapshot().window, 256 << 10);
}

#[test]
fn a_server_that_suddenly_confirms_slowly_is_given_half() {
    let mut bench = flushing(2000);
    let mut at = Time::ZERO;
    bench.sent(at);
    for _ in 0..5 {
        answer(&mut bench, &mut at, Duration::from_millis(5));
    }
    let before = bench.machine.snapshot().window;
    answer(&mut bench, &mut at, SECOND);
    assert_eq!(bench.machine.snapshot().window, before / 2);
}

#[test]
fn a_long_flush_is_told_of_now_and_then() {
    let mut bench = Bench::live(EmitterConfig { flush_rate: Some(100.0), ..config() }, 300, Confirm::Acks);
    let mut at = Time::ZERO;
    loop {
        bench.sent(at);
        let sent = bench.machine.ledger.sent();
        bench.machine.on_ack(at, sent).expect("sent");
        bench.act(at);
        if bench.machine.snapshot().flush_remaining == 0 {
            break;
        }
        at = bench.machine.deadline(at).expect("it is paced");
        bench.time(at);
        assert!(at < 10 * SECOND, "it never ends");
    }
    let progress: Vec<_> = bench.reports.iter().filter(|r| r.event_type == "broadcaster_flush_progress").collect();
    assert_eq!(progress.len(), 2, "once a second: {:?}", bench.names());
    let number = |key: &str| progress[0].details[key].as_f64().expect("a number");
    assert!(progress[0].success && number("seconds") >= 1.0, "{:?}", progress[0]);
    assert!((number("flushed") + number("remaining") - 300.0).abs() < 0.5, "{:?}", progress[0]);
    assert!((90.0..=110.0).contains(&number("rate")), "{:?}", progress[0]);
    assert_eq!(bench.names().last(), Some(&"broadcaster_flush_complete"));
    let snapshot = bench.machine.snapshot();
    assert!(snapshot.flush_remaining == 0 && snapshot.flush_rate == 0.0, "{snapshot:?}");
}

#[test]
fn what_was_accepted_while_the_link_came_up_belongs_to_the_flush() {
    let now = at(0.1);
    for stored in [0, 4] {
        let mut bench = Bench::live(config(), stored, Confirm::Acks);
        let item = events(stored + 1, stored + 3, 10);
        bench.machine.on_accepted(now, Fresh { item, spilled: 3, since: now }, now);
        bench.act(now);
        assert_eq!(bench.machine.snapshot().flush_remaining, stored + 3);
        bench.sent(now);
        bench.machine.on_ack(now, stored + 3).expect("sent");
        bench.act(now);
        assert_eq!(bench.names(), ["broadcaster_ready", "broadcaster_spill", "broadcaster_flush_complete"]);
    }
}

#[test]
fn a_flush_that_stands_still_is_told_to() {
    let mut bench = flushing(10);
    bench.sent(Time::ZERO);
    bench.time(SECOND);
    bench.time(2 * SECOND);
    let rates: Vec<_> = bench.reports.iter().filter_map(|report| report.details.get("rate")).collect();
    assert_eq!(rates, [&json!(0.0), &json!(0.0)]);
    bench.machine.on_link_down(3 * SECOND, &error());
    bench.act(3 * SECOND);
    bench.time(4 * SECOND);
    let told = bench.names().iter().filter(|name| **name == "broadcaster_flush_progress").count();
    assert_eq!(told, 2, "without a link there is no progress to tell of");
}

#[test]
fn a_stop_sends_until_its_deadline_and_stores_the_rest() {
    let mut bench = Bench::live(config(), 0, Confirm::Acks);
    bench.accept(Time::ZERO, events(1, 5, 10));
    bench.sent(Time::ZERO);
    bench.machine.stop(SECOND, at(3.0));
    bench.machine.on_ack(at(2.0), 2).expect("sent");
    bench.act(at(2.0));
    assert!(!bench.machine.is_closed() && bench.stored.is_empty());
    assert_eq!(bench.machine.deadline(at(2.0)), Some(at(3.0)));
    bench.time(at(3.0));
    assert!(bench.machine.is_closed() && bench.machine.take_failure().is_none());
    assert_eq!(bench.stored, [events(3, 5, 10)]);
}

#[test]
fn a_stop_with_nothing_left_to_send_ends_at_once() {
    let mut bench = Bench::live(config(), 0, Confirm::Acks);
    bench.accept(Time::ZERO, events(1, 5, 10));
    bench.sent(Time::ZERO);
    bench.machine.stop(SECOND, at(60.0));
    bench.machine.on_ack(at(2.0), 5).expect("sent");
    bench.act(at(2.0));
    assert!(bench.machine.is_closed());
}

#[test]
fn a_disk_that_refuses_is_asked_once_a_second() {
    let mut machine = Machine::new(config(), &recovered(0), 7);
    let refuse = |machine: &mut Machine, now| {
        let mut asked = 0;
        while let Some(action) = machine.poll_action() {
            if let Action::Spill(op) = action {
                asked += 1;
                let error = Error::new(ErrorKind::SpillIo, "full");
                machine.on_spill(
                    now,
                    match op {
                        Op::Reserve { upto, .. } => Done::Reserved { upto, result: Err(error) },
                        _ => Done::AppendFailed(error),
                    },
                );
            }
        }
        asked
    };
    machine.on_accepted(Time::ZERO, Fresh { item: events(1, 2, 10), spilled: 2, since: Time::ZERO }, Time::ZERO);
    assert_eq!(refuse(&mut machine, Time::ZERO), 2, "a promise and an append");
    assert!(machine.snapshot().degraded);
    for second in 1..5 {
        let now = at(f64::from(second));
        assert_eq!(machine.deadline(at(f64::from(second) - 0.5)), Some(now));
        machine.on_time(now, 0, 0, 0);
        assert_eq!(refuse(&mut machine, now), 2);
    }
}

fn refusing(tries: u32) -> EmitterConfig {
    EmitterConfig { poison_tries: tries, jitter: 0.0, breaker_threshold: 100, ..config() }
}

impl Bench {
    fn nack(&mut self, now: Time, seq: u64) {
        self.machine.on_nack(now, seq, "no object").expect("under way");
        self.act(now);
    }
}

#[test]
fn an_event_that_the_hub_refuses_is_tried_again_after_a_pause_and_then_parked_and_the_rest_goes_on() {
    let mut bench = Bench::live(refusing(3), 0, Confirm::Acks);
    bench.accept(Time::ZERO, events(1, 5, 10));
    assert_eq!(bench.sent(Time::ZERO), ["1-5"]);
    bench.nack(Time::ZERO, 3);
    assert_eq!(bench.machine.acked(), 2, "everything before it is taken");
    assert!(bench.sent(at(0.9)).is_empty());
    assert_eq!(bench.machine.deadline(Time::ZERO), Some(SECOND), "the backoff's first pause");
    assert_eq!(bench.sent(SECOND), ["3-5"]);
    bench.nack(SECOND, 3);
    assert!(bench.sent(at(2.9)).is_empty());
    assert_eq!(bench.sent(at(3.0)), ["3-5"]);
    bench.nack(at(3.0), 3);
    assert_eq!(bench.parked, [3]);
    assert_eq!(bench.sent(at(3.0)), ["3-3", "4-5"]);
    assert_eq!(bench.names().last(), Some(&"broadcaster_event_parked"));
    assert_eq!(bench.machine.refusal_of(3).as_deref(), Some("no object"));
    bench.machine.on_ack(at(3.1), 5).expect("sent");
    assert_eq!((bench.machine.snapshot().balance, bench.machine.snapshot().parked), (0, 1));
}

#[test]
fn an_event_that_is_taken_when_it_comes_again_is_not_parked() {
    let mut bench = Bench::live(refusing(2), 0, Confirm::Acks);
    bench.accept(Time::ZERO, events(1, 2, 10));
    for second in 0..5 {
        let now = at(f64::from(second));
        bench.sent(now);
        if second == 0 {
            bench.nack(now, 1);
        }
    }
    bench.machine.on_ack(at(5.0), 1).expect("sent");
    bench.nack(at(5.0), 2);
    assert!(bench.parked.is_empty(), "the tries of one event are not those of another");
}

#[test]
fn a_hub_that_refuses_everything_is_asked_ever_less_often() {
    let mut bench = Bench::live(refusing(1), 0, Confirm::Acks);
    bench.accept(Time::ZERO, events(1, 9, 10));
    let mut now = Time::ZERO;
    let mut pauses = Vec::new();
    for seq in 1..=6 {
        bench.sent(now);
        bench.nack(now, seq);
        let before = now;
        while bench.sent(now).is_empty() {
            now += SECOND;
        }
        pauses.push(now.saturating_sub(before).as_secs());
    }
    assert_eq!(pauses, [0, 2, 4, 8, 16, 30]);
}

#[test]
fn a_refusal_of_what_is_not_under_way_breaks_the_protocol() {
    let mut bench = Bench::live(refusing(3), 0, Confirm::Acks);
    bench.accept(Time::ZERO, events(1, 2, 10));
    assert_eq!(bench.machine.on_nack(Time::ZERO, 1, "").expect_err("not sent yet").kind(), ErrorKind::Protocol);
    bench.sent(Time::ZERO);
    bench.machine.on_ack(Time::ZERO, 1).expect("sent");
    assert_eq!(bench.machine.on_nack(Time::ZERO, 1, "").expect_err("taken").kind(), ErrorKind::Protocol);
}

#[test]
fn an_event_over_which_the_peer_closes_each_link_is_found_one_by_one_and_parked() {
    let mut bench = Bench::live(refusing(2), 0, Confirm::Pings);
    bench.accept(Time::ZERO, events(1, 5, 10));
    let refusal = Error::new(ErrorKind::FrameRefused, "1009");
    for now in [Time::ZERO, 10 * SECOND] {
        assert_eq!(bench.sent(now), ["1-5", "ping 5"]);
        bench.machine.on_link_down(now, &refusal);
        bench.act(now);
        bench.up(now + SECOND, Confirm::Pings);
    }
    let now = 20 * SECOND;
    assert_eq!(bench.sent(now), ["1-1", "ping 1"]);
    bench.machine.on_pong(now, 1);
    assert_eq!(bench.sent(now), ["2-2", "ping 2"]);
    bench.machine.on_link_down(now, &refusal);
    bench.act(now);
    assert_eq!(bench.parked, [2]);
    bench.up(now + SECOND, Confirm::Pings);
    assert_eq!(bench.sent(now + SECOND), ["2-2", "3-5", "ping 5"], "a gap, and no more care");
}

#[test]
fn links_lost_for_other_reasons_are_not_held_against_an_event() {
    let mut bench = Bench::live(refusing(1), 0, Confirm::Pings);
    bench.accept(Time::ZERO, events(1, 5, 10));
    for second in 0..5 {
        assert_eq!(bench.sent(at(f64::from(second))), ["1-5", "ping 5"]);
        bench.machine.on_link_down(at(f64::from(second)), &error());
        bench.act(at(f64::from(second)));
        bench.up(at(f64::from(second)), Confirm::Pings);
    }
    assert!(bench.parked.is_empty());
}

#[test]
fn nothing_is_told_of_a_refused_event_before_it_is_parked() {
    let mut bench = Bench::live(refusing(1), 0, Confirm::Acks);
    bench.accept(Time::ZERO, events(1, 2, 10));
    bench.sent(Time::ZERO);
    bench.refuses = true;
    bench.nack(Time::ZERO, 1);
    assert!(bench.sent(at(0.5)).is_empty() && bench.machine.snapshot().degraded);
    bench.refuses = false;
    bench.time(SECOND);
    assert_eq!(bench.parked, [1]);
    assert_eq!(bench.sent(SECOND), ["1-1", "2-2"]);
}

#[test]
fn after_a_sleep_of_the_machine_it_connects_at_once_and_with_short_pauses_again() {
    let mut bench = Bench::new(EmitterConfig { jitter: 0.0, ..config() }, 3);
    bench.machine.start(Time::ZERO);
    let mut now = Time::ZERO;
    for _ in 0..10 {
        bench.machine.on_connect_failed(now, &error());
        now = bench.machine.deadline(now).expect("another attempt").max(now);
        bench.time(now);
    }
    let before = bench.connects;
    bench.machine.on_connect_failed(now, &error());
    now += 3600 * SECOND;
    bench.time(now);
    assert_eq!(bench.connects, before + 1, "at once");
    bench.machine.on_connect_failed(now, &error());
    bench.time(now + config().backoff_initial);
    assert_eq!(bench.connects, before + 2, "the network takes a moment, and is not waited for as long as before");
}

#[test]
fn after_a_sleep_of_the_machine_a_link_is_asked_at_once_and_its_silence_before_proves_nothing() {
    for (under_way, answers) in [(false, false), (true, false), (false, true), (true, true)] {
        let mut bench = Bench::live(config(), 0, Confirm::Acks);
        if under_way {
            bench.accept(Time::ZERO, events(1, 2, 10));
            assert_eq!(bench.sent(Time::ZERO), ["1-2"]);
        }
        let woken = 3600 * SECOND;
        bench.time(woken);
        assert!(bench.machine.is_live(), "nobody could have answered");
        let number = if under_way { 2 } else { 0 };
        assert_eq!(bench.sent(woken), [format!("ping {number}")]);
        if answers {
            bench.machine.on_pong(woken + SECOND, number);
            if under_way {
                bench.machine.on_ack(woken + SECOND, 2).expect("sent");
            }
        }
        bench.time(woken + config().connect_timeout);
        assert_eq!(bench.machine.is_live(), answers, "under way: {under_way}");
        // The next time the silence is the peer's.
        if answers {
            bench.accept(woken + 2 * SECOND, events(if under_way { 3 } else { 1 }, 9, 10));
            bench.sent(woken + 2 * SECOND);
            bench.time(woken + 2 * SECOND + config().ack_timeout);
            assert!(!bench.machine.is_live());
        }
    }
}

#[test]
fn a_machine_that_is_always_late_gives_a_dead_link_up_all_the_same() {
    let mut bench = Bench::live(config(), 0, Confirm::Pings);
    bench.accept(Time::ZERO, events(1, 2, 10));
    bench.sent(Time::ZERO);
    for hour in 1..=2 {
        assert!(bench.machine.is_live());
        bench.time(hour * 3600 * SECOND);
    }
    assert!(!bench.machine.is_live());
}

#[test]
fn nothing_is_sent_that_an_append_under_way_may_give_up() {
    for (limit, held) in [(100_000, false), (5, true)] {
        let mut bench = Bench::new(EmitterConfig { spill_max_events: limit, ..config() }, 0);
        bench.machine.start(Time::ZERO);
        let fresh = |item: Item| Fresh { spilled: item.events(), item, since: Time::ZERO };
        bench.machine.on_accepted(Time::ZERO, fresh(events(1, 9, 10)), Time::ZERO);
        let mut appended = None;
        while let Some(action) = bench.machine.poll_action() {
            match action {
                Action::Spill(op @ Op::Append { .. }) => appended = Some(op),
                Action::Spill(op) => {
                    let done = bench.store(op);
                    bench.machine.on_spill(Time::ZERO, done);
                }
                _ => {}
            }
        }
        let appended = appended.expect("the link is down");
        bench.up(Time::ZERO, Confirm::Acks);
        assert_eq!(bench.sent(Time::ZERO).is_empty(), held, "limit {limit}");
        let done = bench.store(appended);
        bench.machine.on_spill(SECOND, done);
        bench.act(SECOND);
        bench.sent(SECOND);
        assert_eq!(bench.machine.snapshot().in_flight, 9);
    }
}
