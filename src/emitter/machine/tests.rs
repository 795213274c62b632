use std::time::Instant;

use super::*;
use crate::emitter::outbox::Fresh;
use crate::emitter::spill::Done;
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
        base: 0,
        last,
        gaps: vec![],
        bytes: 0,
        oldest: None,
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
}

impl Bench {
    fn new(config: EmitterConfig, stored: u64) -> Self {
        let machine = Machine::new(config, &recovered(stored), 7);
        let stored = if stored > 0 { vec![events(1, stored, 10)] } else { Vec::new() };
        Self { machine, stored, reports: Vec::new(), flushed: Vec::new(), connects: 0, disconnects: 0 }
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
        self.machine.on_accepted(now, Fresh { item, spilled, since: Instant::now() }, now);
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
                Action::Release(_) => {}
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
    bench.machine.on_accepted(at(0.1), Fresh { item: events(1, 1, 10), spilled: 0, since: Instant::now() }, at(0.1));
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
    machine.on_accepted(Time::ZERO, Fresh { item: events(1, 2, 10), spilled: 2, since: Instant::now() }, Time::ZERO);
    assert_eq!(refuse(&mut machine, Time::ZERO), 2, "a promise and an append");
    assert!(machine.snapshot().degraded);
    for second in 1..5 {
        let now = at(f64::from(second));
        assert_eq!(machine.deadline(at(f64::from(second) - 0.5)), Some(now));
        machine.on_time(now, 0, 0, 0);
        assert_eq!(refuse(&mut machine, now), 2);
    }
}
