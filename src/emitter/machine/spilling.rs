//! The spill: what the disk is asked to do, one operation of each kind at a time.

use std::time::Duration;

use serde_json::json;

use super::{Action, Files, Machine, Phase, STALL, Time};
use crate::emitter::config::WhenFull;
use crate::emitter::item::Item;
use crate::emitter::report::Report;
use crate::emitter::spill::{Done, Op};
use crate::error::Error;

/// Bytes per append to the spill: one transaction of a few milliseconds.
const APPEND_BYTES: usize = 2 << 20;
/// More events than a block holds: of the first one in the spill a part may be confirmed.
const MOST_IN_BLOCK: u64 = 1 << 14;
/// Bytes read from the spill at a time, and the level below which more is read.
const READ_BYTES: usize = 1 << 20;
/// Bytes read while nothing is on its way: the first events do not wait for the rest of a large read.
const FIRST_READ_BYTES: usize = 256 << 10;
/// The spill rests for this after a failed operation.
const SPILL_RETRY: Duration = Duration::from_secs(1);
/// The largest reservation of seqs. They double with each one used up, so that their number stays small at any rate.
const RESERVE_MAX: u64 = 4_000_000;

impl Machine {
    /// The spill's thread has done something.
    pub fn on_spill(&mut self, now: Time, done: Done) {
        match done {
            Done::Appended { upto, dropped, bytes } => {
                (self.appending, self.giving_up) = (false, false);
                self.spill_bytes = bytes;
                self.spill_written();
                let free = self.ledger.note_stored(upto, &dropped, now);
                self.release(free);
                for gap in dropped {
                    self.lost(gap);
                }
            }
            Done::AppendFailed(error) => {
                (self.appending, self.giving_up) = (false, false);
                self.spill_refused(now, &error);
                if matches!(self.phase, Phase::Stopped) {
                    self.spill_failed = Some(error);
                }
            }
            Done::Read(Ok(items)) => {
                self.reading = false;
                self.ledger.note_read(items);
            }
            Done::Read(Err(error)) => {
                self.reading = false;
                self.pause_spill(now, &error);
            }
            Done::Trimmed { result, bytes } => {
                let upto = self.trimming.take();
                self.spill_bytes = bytes;
                match result {
                    Ok(()) => self.trimmed = upto.unwrap_or(self.trimmed),
                    Err(error) => self.pause_spill(now, &error),
                }
            }
            Done::Reserved { upto, result } => {
                self.reserving = false;
                match result {
                    Ok(()) => {
                        self.reserved = self.reserved.max(upto);
                        self.reserve_step = (self.reserve_step * 2).min(RESERVE_MAX);
                        self.spill_written();
                    }
                    Err(error) => self.spill_refused(now, &error),
                }
                self.reserve();
            }
            Done::Parked { seq, result, bytes } => {
                self.spill_bytes = bytes;
                self.on_parked(now, seq, result);
            }
            Done::Unparked { ids, result, parked } => self.on_unparked(now, &ids, result, parked),
            Done::Wanted(wanted) => self.refusing.on_wanted(wanted),
            Done::Probed(result) => {
                self.probing = false;
                match result {
                    Ok(()) => self.spill_written(),
                    Err(error) => self.spill_refused(now, &error),
                }
            }
            Done::Damaged { damage, bytes } => {
                self.spill_bytes = bytes;
                for gap in self.ledger.note_unreadable(&damage.unreadable) {
                    self.lost(gap);
                }
                self.report_damage(&damage);
            }
            Done::FilesGone(error) => {
                let text = error.report();
                if !self.is_bereft() {
                    let details = json!({"degraded": true, "error": text});
                    self.report(Report::bad("broadcaster_degraded", "spill_failed", 1, details));
                    self.files = Files::Gone;
                }
                self.last_error = Some(text.into());
            }
            Done::NewRing(_) => self.files = Files::Leaving { upto: self.ledger.taken(), back: false },
            Done::FilesBack => {
                let upto = match self.files {
                    Files::Leaving { upto, .. } => upto,
                    Files::Kept | Files::Gone => 0,
                };
                self.files = Files::Leaving { upto, back: true };
            }
            Done::Opened(_) => {} // it made this machine
            Done::Closed(result) => {
                if let Err(error) = result {
                    self.spill_failed.get_or_insert(error);
                }
                self.closed = true;
            }
        }
        self.after(now);
    }

    /// Every failure on the disk pauses all work there: a disk that fails at once would otherwise be asked again at once.
    pub(super) fn pause_spill(&mut self, now: Time, error: &Error) {
        self.last_error = Some(error.report().into());
        self.spill_pause = Some(now + SPILL_RETRY);
    }

    pub(super) fn spill_refused(&mut self, now: Time, error: &Error) {
        self.pause_spill(now, error);
        if !std::mem::replace(&mut self.degraded, true) && !self.is_bereft() {
            let details = json!({"degraded": true, "error": error.report()});
            self.report(Report::bad("broadcaster_degraded", "spill_failed", 1, details));
        }
    }

    pub(super) fn spill_written(&mut self) {
        if std::mem::take(&mut self.degraded) && !self.is_bereft() {
            self.report(Report::good("broadcaster_degraded", json!({"degraded": false})));
        }
    }

    /// Whether something in memory lies in a ring whose file is gone, and has to go into the spill.
    fn is_leaving(&self) -> bool {
        matches!(self.files, Files::Leaving { upto, .. } if upto > self.ledger.acked().max(self.ledger.spill_last()))
    }

    /// Everything is in files again that the next process finds.
    pub(super) fn settle_files(&mut self) {
        if matches!(self.files, Files::Leaving { back: true, .. }) && !self.is_leaving() {
            self.files = Files::Kept;
            if !self.degraded {
                self.report(Report::good("broadcaster_degraded", json!({"degraded": false})));
            }
        }
    }

    /// A disk that has refused says by nothing that it works again; without this, calm would look like trouble.
    pub(super) fn plan_probe(&mut self) {
        let busy = self.appending || self.reserving || self.probing || self.closing;
        if self.degraded && !busy && self.spill_pause.is_none() && !matches!(self.phase, Phase::Stopped) {
            self.probing = true;
            self.actions.push_back(Action::Spill(Op::Probe));
        }
    }

    pub(super) fn may_append(&self) -> bool {
        !self.appending && !self.closing && !self.refusing.is_parking() && self.spill_pause.is_none()
    }

    pub(super) fn plan_append(&mut self, now: Time) {
        if !self.may_append() {
            return;
        }
        let items = match &self.phase {
            Phase::Live(live) => {
                let (held, bound) = (self.ledger.held(), self.config.outbox_bytes);
                // While older events are still being flushed, newer ones cannot go out and need not fill memory; and a
                // link that confirms nothing must not make callers wait.
                let behind = self.ledger.is_behind() && held >= bound / 2;
                let stalled = held >= bound && now >= live.confirmed + STALL;
                if !behind && !stalled && !self.is_leaving() {
                    return;
                }
                self.ledger.oldest_held(APPEND_BYTES)
            }
            _ => self.ledger.oldest_held(APPEND_BYTES),
        };
        if !items.is_empty() {
            self.appending = true;
            self.giving_up = self.may_give_up(&items);
            let (in_flight, acked) = (self.ledger.sent(), self.ledger.acked());
            self.actions.push_back(Action::Spill(Op::Append { items, in_flight, acked }));
        }
    }

    /// Whether these may take the spill over a bound.
    fn may_give_up(&self, items: &[Item]) -> bool {
        let Self { config, ledger, .. } = self;
        let last = items.last().map_or(0, Item::last);
        let events = ledger.events_between(ledger.acked(), last) + MOST_IN_BLOCK;
        let bytes = self.spill_bytes + items.iter().map(|item| item.bytes() as u64).sum::<u64>();
        let over = events > config.spill_max_events || bytes > config.spill_max_bytes;
        (config.when_full == WhenFull::DropOldest && over) || config.spill_max_age.is_some()
    }

    pub(super) fn plan_read(&mut self) {
        let may = !self.reading && !self.closing && self.spill_pause.is_none();
        let unread = self.ledger.is_behind() && self.ledger.read_upto() < self.ledger.spill_last();
        if may && unread && self.ledger.ahead_bytes() < READ_BYTES / 2 {
            self.reading = true;
            let after = self.ledger.read_upto();
            let idle = self.ledger.ahead_bytes() == 0 && self.ledger.in_flight_bytes() == 0;
            let max_bytes = if idle { FIRST_READ_BYTES } else { READ_BYTES };
            self.actions.push_back(Action::Spill(Op::Read { after, max_bytes }));
        }
    }

    pub(super) fn plan_trim(&mut self) {
        let upto = self.ledger.acked(); // also noted as the base, which must not go back
        if self.trimming.is_none()
            && !self.closing
            && self.spill_pause.is_none()
            && upto.min(self.ledger.spill_last()) > self.trimmed
        {
            self.trimming = Some(upto);
            self.actions.push_back(Action::Spill(Op::Trim { upto }));
        }
    }

    /// Keeps a promise on disk ahead of the seqs in use.
    pub(super) fn reserve(&mut self) {
        let used = self.ledger.taken();
        let free = !self.reserving && !self.closing && self.spill_pause.is_none();
        // The step has doubled since the last promise, of which half is used up then.
        if free && used + self.reserve_step / 4 > self.reserved {
            self.reserving = true;
            let upto = used + self.reserve_step;
            self.actions.push_back(Action::Spill(Op::Reserve { upto, acked: self.ledger.acked() }));
        }
    }
}
