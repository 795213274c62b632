//! The other side: a link that delays and loses frames, and a receiver that checks what it is given.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use fastrand::Rng;
use safe_broadcaster::emitter::item::Item;
use safe_broadcaster::emitter::machine::{Confirm, Outgoing, Welcome};

// As in hub/machine/emitter.rs.
const ACK_DELAY: Duration = Duration::from_millis(20);
const ACK_EVENTS: u64 = 64;

/// What comes back over a link.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Answer {
    Ack(u64),
    Credit(u64),
    Pong(u64),
    Nack(u64),
    /// The peer closes over what it was sent.
    Refused,
    Down,
}

/// One connection: frames on their way in both directions, in order.
#[expect(clippy::struct_excessive_bools, reason = "each is a state of its own of one end or of the way between")]
pub(crate) struct Wire {
    to_peer: VecDeque<(Duration, Outgoing)>,
    to_emitter: VecDeque<(Duration, Answer)>,
    /// Dead: whatever is written is lost. `room` frames still go into the socket's buffer.
    dead: bool,
    room: usize,
    /// The emitter has left: what it wrote may still arrive, answers go nowhere.
    abandoned: bool,
    /// A `Confirm::Sends` peer takes one block at a time.
    pub(crate) busy: bool,
    /// The hub has refused an event and the emitter has not gone back to it yet.
    rewinding: bool,
    /// Last seq that came over this link.
    last: Option<u64>,
    /// Last seq that was written to it, and the last for which an ack was asked.
    pub(crate) written: u64,
    pub(crate) asked: u64,
    /// The furthest seq that the credit ever allowed.
    edge: u64,
    acked: u64,
    /// Events that came since the last answer; as many as can be if it must not wait.
    unacked: u64,
    answer_at: Option<Duration>,
    answers_due: Vec<Answer>,
    latency: u64,
}

impl Wire {
    /// `acked`: what the greeting told of.
    pub(crate) fn new(latency: u64, room: usize, acked: u64, credit: u64) -> Self {
        Self {
            to_peer: VecDeque::new(),
            to_emitter: VecDeque::new(),
            dead: false,
            room,
            abandoned: false,
            busy: false,
            rewinding: false,
            last: None,
            written: 0,
            asked: 0,
            edge: acked.saturating_add(credit),
            acked,
            unacked: 0,
            answer_at: None,
            answers_due: Vec::new(),
            latency,
        }
    }

    pub(crate) fn is_blocked(&self) -> bool {
        if self.dead { self.room == 0 } else { self.to_peer.len() >= self.room }
    }

    pub(crate) fn write(&mut self, now: Duration, frame: Outgoing, rng: &mut Rng) {
        match &frame {
            Outgoing::Item(item) => self.written = item.last(),
            Outgoing::AckNow => self.asked = self.written,
            Outgoing::Ping(_) => {}
        }
        if self.dead {
            self.room = self.room.saturating_sub(1);
            return;
        }
        let at = self.delayed(now, rng).max(self.to_peer.back().map_or(now, |(at, _)| *at));
        self.to_peer.push_back((at, frame));
    }

    fn delayed(&self, now: Duration, rng: &mut Rng) -> Duration {
        now + Duration::from_micros(rng.u64(0..=self.latency))
    }

    fn answer(&mut self, now: Duration, answer: Answer, rng: &mut Rng) {
        if let Answer::Ack(upto) = answer {
            self.acked = self.acked.max(upto);
        }
        if self.abandoned {
            return;
        }
        let at = self.delayed(now, rng).max(self.to_emitter.back().map_or(now, |(at, _)| *at));
        self.to_emitter.push_back((at, answer));
    }

    /// The emitter's next news, if it has arrived.
    pub(crate) fn news(&mut self, now: Duration) -> Option<Answer> {
        if self.to_emitter.front().is_none_or(|(at, _)| *at > now) {
            return None;
        }
        self.to_emitter.pop_front().map(|(_, answer)| answer)
    }

    pub(crate) fn abandon(mut self) -> Self {
        self.abandoned = true;
        self.to_emitter.clear();
        self
    }

    /// When something happens next on this link.
    pub(crate) fn next_time(&self) -> Option<Duration> {
        let arrival = self.to_peer.front().map(|(at, _)| *at);
        let news = self.to_emitter.front().map(|(at, _)| *at);
        [arrival, news, self.answer_at].into_iter().flatten().min()
    }

    /// The peer closes over what it was sent.
    fn refuse(&mut self) {
        let at = self.to_emitter.back().map_or(Duration::ZERO, |(at, _)| *at);
        let abandoned = self.abandoned;
        self.die(None);
        self.answers_due.clear();
        if !abandoned {
            self.to_emitter.push_back((at, Answer::Refused));
        }
    }

    /// The network loses the connection: what is on its way is lost. `notice`: when the emitter hears of it, if ever.
    pub(crate) fn die(&mut self, notice: Option<Duration>) {
        self.dead = true;
        self.to_peer.clear();
        self.to_emitter.clear();
        self.answer_at = None;
        if let Some(at) = notice {
            self.to_emitter.push_back((at, Answer::Down));
        }
    }
}

/// Who receives the events.
pub(crate) struct Receiver {
    pub(crate) confirm: Confirm,
    /// The hub's high-water mark; for other peers the highest seq seen.
    mark: u64,
    /// Which event came under each seq.
    events: BTreeMap<u64, u64>,
    /// Gaps told, by their first seq.
    gaps: BTreeMap<u64, u64>,
    /// The seq under which each event came; 0 if it has not.
    pub(crate) received: Vec<u64>,
    /// How often each event is refused before it is taken, and how often it was.
    poison: Vec<(u32, u32)>,
    /// Refusals so far.
    pub(crate) refusals: u64,
    /// Events that were sent again as new ones: after a crash in between, perhaps twice.
    pub(crate) requeued: BTreeSet<u64>,
    /// Reads but confirms nothing until then.
    pub(crate) mute_until: Duration,
    /// Longest time before it confirms, in microseconds.
    pub(crate) patience: u64,
    pub(crate) credit: u64,
}

impl Receiver {
    pub(crate) fn new(confirm: Confirm) -> Self {
        Self {
            confirm,
            mark: 0,
            events: BTreeMap::new(),
            gaps: BTreeMap::new(),
            received: Vec::new(),
            poison: Vec::new(),
            refusals: 0,
            requeued: BTreeSet::new(),
            mute_until: Duration::ZERO,
            patience: 1000,
            credit: u64::MAX,
        }
    }

    /// A new event, which is refused so often before it is taken.
    pub(crate) fn expect(&mut self, refusals: u32) {
        self.received.push(0);
        self.poison.push((refusals, 0));
    }

    /// Events that are refused for some time or for ever.
    pub(crate) fn poisoned(&self) -> usize {
        self.poison.iter().filter(|poison| poison.0 > 0).count()
    }

    /// Whether the event is refused this time.
    fn refuses(&mut self, id: u64) -> bool {
        let (times, so_far) = &mut self.poison[id as usize];
        let refuses = self.confirm != Confirm::Sends && *so_far < *times;
        if refuses {
            *so_far += 1;
            self.refusals += 1;
        }
        refuses
    }

    /// Highest seq under which an event came.
    pub(crate) fn highest(&self) -> u64 {
        self.events.keys().next_back().copied().unwrap_or(0)
    }

    pub(crate) fn was_told_of(&self, seq: u64) -> bool {
        self.gaps.range(..=seq).any(|(_, to)| *to >= seq)
    }

    /// A hub that keeps nothing on disk starts again.
    pub(crate) fn forget(&mut self) {
        if self.confirm == Confirm::Acks {
            self.mark = 0;
        }
    }

    pub(crate) fn hello(&mut self, next: u64) -> Welcome {
        let have = if self.confirm == Confirm::Acks { self.mark } else { 0 };
        if self.confirm == Confirm::Acks {
            self.mark = self.mark.max(next - 1);
        }
        Welcome { confirm: self.confirm, have, credit: self.credit }
    }

    /// Does what is due on a link; returns whether anything was.
    pub(crate) fn work(&mut self, wire: &mut Wire, now: Duration, rng: &mut Rng) -> bool {
        let mut worked = false;
        while wire.to_peer.front().is_some_and(|(at, _)| *at <= now) {
            let Some((_, frame)) = wire.to_peer.pop_front() else { break };
            worked = true;
            self.take(wire, frame);
            if wire.answer_at.is_none() && !wire.answers_due.is_empty() {
                let patience = Duration::from_micros(rng.u64(0..=self.patience));
                let lone = self.confirm == Confirm::Acks && wire.unacked < ACK_EVENTS;
                let delay = if lone { ACK_DELAY } else { Duration::ZERO };
                wire.answer_at = Some((now + patience + delay).max(self.mute_until));
            } else if let (Some(at), true) = (&mut wire.answer_at, wire.unacked >= ACK_EVENTS) {
                let patience = Duration::from_micros(rng.u64(0..=self.patience));
                *at = (*at).min((now + patience).max(self.mute_until));
            }
        }
        if wire.answer_at.is_some_and(|at| at <= now) {
            wire.answer_at = None;
            wire.unacked = 0;
            worked = true;
            let mut answers = std::mem::take(&mut wire.answers_due);
            if rng.bool() {
                // Acks are cumulative, and RFC 6455 §5.5.3 lets a peer answer the newest Ping only.
                let newest = answers.iter().rposition(|answer| matches!(answer, Answer::Pong(_)));
                let mut at = 0;
                answers.retain(|answer| {
                    at += 1;
                    !matches!(answer, Answer::Pong(_)) || Some(at - 1) == newest
                });
            }
            answers.dedup_by(|a, b| matches!((a, b), (Answer::Ack(_), Answer::Ack(_))));
            for answer in answers {
                let answer = if let (Answer::Ack(_), Confirm::Acks) = (answer, self.confirm) {
                    Answer::Ack(self.mark)
                } else {
                    answer
                };
                wire.answer(now, answer, rng);
            }
            wire.edge = wire.edge.max(wire.acked.saturating_add(self.credit));
        }
        worked
    }

    pub(crate) fn grant(&mut self, credit: u64, wire: &mut Wire, now: Duration, rng: &mut Rng) {
        self.credit = credit;
        if self.confirm == Confirm::Acks && !wire.dead {
            wire.edge = wire.edge.max(wire.acked.saturating_add(credit));
            wire.answer(now, Answer::Credit(credit), rng);
        }
    }

    fn take(&mut self, wire: &mut Wire, frame: Outgoing) {
        match frame {
            Outgoing::Ping(number) => {
                assert_ne!(self.confirm, Confirm::Sends, "an object of the host language is pinged");
                wire.answers_due.push(Answer::Pong(number));
                wire.unacked = u64::MAX; // pongs do not wait for company
            }
            Outgoing::AckNow => {
                assert_eq!(self.confirm, Confirm::Acks, "only our hub knows that word");
                if !wire.answers_due.is_empty() {
                    wire.unacked = u64::MAX;
                }
            }
            Outgoing::Item(item) => {
                let refused = self.item(wire, &item, u64::MAX);
                match (refused, self.confirm) {
                    (Some(seq), Confirm::Acks) => {
                        wire.answers_due.extend([Answer::Ack(seq - 1), Answer::Nack(seq)]);
                        wire.unacked = u64::MAX; // a refusal does not wait for company
                        return;
                    }
                    (Some(_), _) => return wire.refuse(),
                    (None, _) => {}
                }
                if self.confirm != Confirm::Pings {
                    wire.answers_due.push(Answer::Ack(item.last()));
                }
            }
        }
    }

    /// Part of a block arrives event by event before the link dies.
    pub(crate) fn take_part(&mut self, wire: &mut Wire, rng: &mut Rng) {
        let whole = rng.usize(0..=wire.to_peer.len());
        for _ in 0..whole {
            if let Some((_, frame)) = wire.to_peer.pop_front() {
                self.take(wire, frame);
            }
        }
        if self.confirm != Confirm::Acks
            && let Some((_, Outgoing::Item(item))) = wire.to_peer.pop_front()
        {
            self.item(wire, &item, item.first() + rng.u64(0..=item.last() - item.first()));
        }
    }

    /// Takes what has arrived of an item; returns the event that it refuses, if there is one.
    fn item(&mut self, wire: &mut Wire, item: &Item, upto: u64) -> Option<u64> {
        let (first, mut last) = (item.first(), item.last().min(upto));
        if wire.rewinding && first > self.mark + 1 {
            return None; // sent before the emitter heard of the refusal
        }
        wire.rewinding = false;
        match wire.last {
            Some(before) => assert_eq!(first, before + 1, "seq {first} follows {before} on one link"),
            None => assert!(first <= self.mark + 1, "a link begins with seq {first} behind {}", self.mark),
        }
        wire.unacked = wire.unacked.saturating_add(last - first + 1);
        if self.confirm == Confirm::Acks {
            let end = if item.events() > 0 { last } else { first };
            assert!(end <= wire.edge, "seq {end} comes, {} are allowed", wire.edge);
        }
        let mut refused = None;
        match item {
            Item::Gap(gap) if self.confirm == Confirm::Acks && gap.to <= self.mark => {}
            Item::Gap(gap) => {
                let from = if self.confirm == Confirm::Acks { gap.from.max(self.mark + 1) } else { gap.from };
                let to = self.gaps.entry(from).or_insert(gap.to);
                *to = gap.to.max(*to);
            }
            Item::Events(block) => {
                for (seq, json) in block.events().take_while(|(seq, _)| *seq <= upto) {
                    let id = id_of(&json);
                    let known = self.confirm == Confirm::Acks && seq <= self.mark;
                    if !known && self.refuses(id) {
                        (last, refused) = (seq - 1, Some(seq));
                        wire.rewinding = self.confirm == Confirm::Acks;
                        break;
                    }
                    self.event(seq, id);
                }
            }
        }
        wire.last = Some(last);
        self.mark = self.mark.max(last);
        refused
    }

    fn event(&mut self, seq: u64, id: u64) {
        let known = *self.events.entry(seq).or_insert(id);
        assert_eq!(known, id, "seq {seq} carries another event than before");
        assert!(!self.was_told_of(seq), "seq {seq} comes after it was declared lost");
        let before = std::mem::replace(&mut self.received[id as usize], seq);
        assert!(
            before == 0 || before == seq || self.requeued.contains(&id),
            "event {id} comes with seq {seq} and came with {before}"
        );
        let dropped = self.confirm == Confirm::Acks && before == 0 && seq <= self.mark;
        assert!(!dropped, "the new event {id} is dropped as a duplicate: its seq is {seq}, the mark {}", self.mark);
    }
}

pub(crate) fn id_of(json: &[u8]) -> u64 {
    let digits = json.iter().skip(6).take_while(|byte| byte.is_ascii_digit());
    digits.fold(0, |id, digit| id * 10 + u64::from(digit - b'0'))
}
