//! Sending: what goes over the link next, within its window, and what a confirmation sets free.

use super::reporting::topic_of;
use super::{Barrier, Confirm, Machine, Outgoing, Phase, Time};
use crate::emitter::item::Item;
use crate::emitter::outbox::Fresh;
use crate::error::{Error, ErrorKind};

/// On a link that confirms by Pong, a Ping follows at least every so many bytes.
const BARRIER_BYTES: usize = 256 << 10;

impl Machine {
    /// Fetched from the outbox. `since`: when its first event was accepted.
    pub fn on_accepted(&mut self, now: Time, fresh: Fresh, since: Time) {
        let live = self.is_live();
        let events = fresh.item.events();
        let spilled = if live { fresh.spilled } else { events };
        if spilled > 0 {
            self.spills.add(spilled);
            if self.last_topic.is_none() {
                self.last_topic = topic_of(&fresh.item);
            }
        }
        if let Item::Gap(gap) = fresh.item {
            self.lost(gap);
        }
        if live && self.ledger.is_drained() {
            self.nothing_was_due(now);
        }
        self.ledger.take(fresh, since, live);
        if live && spilled > 0 {
            self.extend_flush(now); // accepted while the link came up
        }
        self.reserve();
        self.after(now);
    }

    /// The peer has everything up to `upto`.
    ///
    /// # Errors
    /// It was not sent that much: the link must be dropped.
    pub fn on_ack(&mut self, now: Time, upto: u64) -> Result<(), Error> {
        if upto > self.ledger.sent() {
            let text = format!("the peer acknowledged seq {upto}, but only {} were sent", self.ledger.sent());
            return Err(Error::new(ErrorKind::Protocol, text));
        }
        self.acknowledge(now, upto);
        self.after(now);
        Ok(())
    }

    /// Somebody waits for the confirmation of everything up to `seq`: it is asked for as soon as that is sent.
    pub fn want(&mut self, seq: u64) {
        self.wanted = self.wanted.max(seq);
    }

    /// The echo of a Ping.
    pub fn on_pong(&mut self, now: Time, number: u64) {
        let Phase::Live(live) = &mut self.phase else { return };
        live.progress = now;
        live.idle_ping = false;
        // A peer may answer only the newest of several Pings (RFC 6455 §5.5.3), so the number is cumulative.
        let answered = live.barrier.take_if(|barrier| number >= barrier.number);
        if live.welcome.confirm == Confirm::Pings {
            let (upto, before) = (number.min(live.barred), self.ledger.in_flight_bytes());
            self.acknowledge(now, upto);
            let confirmed = before - self.ledger.in_flight_bytes();
            if let Some(barrier) = answered.filter(|_| confirmed > 0) {
                self.window.confirmed(confirmed, now.saturating_sub(barrier.since), upto, self.ledger.sent());
            }
        }
        if self.ledger.sent() == self.ledger.acked() {
            self.prove(); // nothing to confirm, and the peer lives
        }
        self.after(now);
    }

    /// Replaces the hub's grant.
    pub fn on_credit(&mut self, credit: u64) {
        if let Phase::Live(live) = &mut self.phase {
            live.welcome.credit = credit;
        }
    }

    /// The next thing for the link, if it may send now. Ask until `None`, then flush.
    pub fn poll_outgoing(&mut self, now: Time) -> Option<Outgoing> {
        let Phase::Live(live) = &self.phase else { return None };
        let confirm = live.welcome.confirm;
        if live.idle_ping && live.barrier.is_none() {
            return Some(self.ping(now));
        }
        let due = confirm == Confirm::Pings && live.barrier.is_none() && self.ledger.sent() > live.barred;
        if due && live.unbarred_bytes >= BARRIER_BYTES {
            return Some(self.ping(now));
        }
        if let Some(item) = self.next_item(now) {
            if self.ledger.sent() == self.ledger.acked() {
                self.nothing_was_due(now);
            }
            self.ledger.note_sent(&item);
            if let Phase::Live(live) = &mut self.phase {
                live.unbarred_bytes += item.bytes();
            }
            return Some(Outgoing::Item(item));
        }
        if due {
            return Some(self.ping(now));
        }
        self.ask()
    }

    /// The wish for an ack, behind all that may be sent now; once for that.
    fn ask(&mut self) -> Option<Outgoing> {
        let Phase::Live(live) = &mut self.phase else { return None };
        let (sent, known) = (self.ledger.sent(), live.asked.max(self.ledger.acked()));
        let ask = live.welcome.confirm == Confirm::Acks && self.wanted > known && sent > known;
        ask.then(|| {
            live.asked = sent;
            Outgoing::AckNow
        })
    }

    fn ping(&mut self, now: Time) -> Outgoing {
        let number = self.ledger.sent();
        if let Phase::Live(live) = &mut self.phase {
            live.barrier = Some(Barrier { number, since: now });
            live.barred = number;
            live.unbarred_bytes = 0;
        }
        Outgoing::Ping(number)
    }

    fn next_item(&mut self, now: Time) -> Option<Item> {
        let Phase::Live(live) = &self.phase else { return None };
        let (sent, acked) = (self.ledger.sent(), self.ledger.acked());
        let credit = live.welcome.credit.saturating_sub(sent - acked);
        let in_flight = self.ledger.in_flight_bytes();
        let has_room = match live.welcome.confirm {
            Confirm::Pings => self.window.has_room(in_flight),
            Confirm::Acks | Confirm::Sends => in_flight < self.config.outbox_bytes,
        };
        let careful = self.refusing.is_careful();
        if !has_room || credit == 0 || self.giving_up || self.refusing.holds(now) || (careful && sent > acked) {
            return None;
        }
        let item = self.ledger.next_item();
        self.plan_read();
        let most = if careful { 1 } else { credit };
        let item = match item {
            Ok(Some(Item::Events(block))) => Item::Events(block.head(most)?),
            Ok(Some(gap)) => gap,
            _ => return None,
        };
        if item.last() > self.reserved {
            return None; // not promised on disk yet: a crash could use the seq again
        }
        self.pace(item, now)
    }

    pub(super) fn window_bytes(&self) -> usize {
        match &self.phase {
            Phase::Live(live) if live.welcome.confirm != Confirm::Pings => self.config.outbox_bytes,
            _ => self.window.bytes(),
        }
    }

    pub(super) fn acknowledge(&mut self, now: Time, upto: u64) {
        let before = self.ledger.acked();
        let events = self.ledger.events_between(before, upto.max(before));
        let (free, flushed) = self.ledger.ack(upto);
        if self.ledger.acked() == before {
            return;
        }
        if let Phase::Live(live) = &mut self.phase {
            live.progress = now;
            live.confirmed = now;
        }
        self.prove();
        self.refusing.confirmed(upto, events > 0);
        self.release(free);
        if let Some(flush) = &mut self.flush {
            flush.flushed += flushed;
            flush.measure(now);
        }
        self.settle_flush(now);
    }
}
