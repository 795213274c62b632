//! Sending: what goes over the link next, within its window, and what a confirmation sets free.

use super::reporting::topic_of;
use super::{Confirm, Machine, Outgoing, Phase, Time};
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

    /// The echo of a Ping.
    pub fn on_pong(&mut self, now: Time, number: u64) {
        let Phase::Live(live) = &mut self.phase else { return };
        live.progress = now;
        live.idle_ping = false;
        // A peer may answer only the newest of several Pings (RFC 6455 §5.5.3), so the number is cumulative.
        if live.barrier.is_some_and(|barrier| number >= barrier) {
            live.barrier = None;
        }
        if live.welcome.confirm == Confirm::Pings {
            let upto = number.min(live.barred);
            self.acknowledge(now, upto);
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
            return Some(self.ping(self.ledger.sent()));
        }
        let due = confirm == Confirm::Pings && live.barrier.is_none() && self.ledger.sent() > live.barred;
        if due && live.unbarred_bytes >= BARRIER_BYTES {
            return Some(self.ping(self.ledger.sent()));
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
        due.then(|| self.ping(self.ledger.sent()))
    }

    fn ping(&mut self, number: u64) -> Outgoing {
        if let Phase::Live(live) = &mut self.phase {
            live.barrier = Some(number);
            live.barred = number;
            live.unbarred_bytes = 0;
        }
        Outgoing::Ping(number)
    }

    fn next_item(&mut self, now: Time) -> Option<Item> {
        let Phase::Live(live) = &self.phase else { return None };
        let (sent, acked) = (self.ledger.sent(), self.ledger.acked());
        let window_full = self.ledger.in_flight_bytes() >= self.config.outbox_bytes;
        if window_full || sent - acked >= live.welcome.credit || self.refusing.holds(now) {
            return None;
        }
        let careful = self.refusing.is_careful();
        if careful && sent > acked {
            return None;
        }
        let item = self.ledger.next_item();
        self.plan_read();
        let Ok(Some(item)) = item else { return None };
        let item = if careful { item.head(1) } else { item };
        if item.last() > self.reserved {
            return None; // not promised on disk yet: a crash could use the seq again
        }
        self.pace(item, now)
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
        }
        self.settle_flush(now);
    }
}
