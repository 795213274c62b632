//! What the health bus is told, and buffers that go home.

use serde_json::json;

use super::{Action, Machine};
use crate::emitter::item::{Gap, Item};
use crate::emitter::report::Report;
use crate::emitter::spill::salvage::Damage;

impl Machine {
    pub(super) fn report(&mut self, report: Report) {
        self.actions.push_back(Action::Report(report));
    }

    pub(super) fn report_spills(&mut self, count: u64) {
        let reason = if self.breaker.name() == "open" {
            "breaker_open"
        } else if self.ledger.oldest().is_some() && self.links > 0 && self.backoff.failures() <= 1 {
            "send_failed"
        } else {
            "ws_not_ready"
        };
        let details = json!({
            "spilled": count,
            "error": self.last_error.as_deref().unwrap_or(reason),
            "topic": self.last_topic.take().unwrap_or_else(|| "unknown".to_owned()),
        });
        self.report(Report::bad("broadcaster_spill", reason, count, details));
    }

    pub(super) fn report_damage(&mut self, damage: &Damage) {
        let (lost, aside) = (damage.lost(), damage.set_aside.display().to_string());
        let removed: Vec<_> = damage.removed.iter().map(|path| path.display().to_string()).collect();
        let text = format!(
            "the spill was damaged ({}): {} events were saved, {lost} could not be read; the damaged file is {aside}",
            damage.cause, damage.salvaged
        );
        let details = json!({
            "salvaged": damage.salvaged, "unreadable": lost, "set_aside": aside, "removed": removed, "error": text,
        });
        self.last_error = Some(text.into());
        self.report(Report::bad("broadcaster_spill_damaged", "spill_damaged", lost, details));
    }

    pub(super) fn lost(&mut self, gap: Gap) {
        self.losses.add(gap.count());
        self.loss = Some(match self.loss {
            Some(known) => Gap { from: known.from.min(gap.from), to: known.to.max(gap.to), reason: gap.reason },
            None => gap,
        });
    }

    pub(super) fn release(&mut self, items: Vec<Item>) {
        if !items.is_empty() {
            self.actions.push_back(Action::Release(items));
        }
    }
}

pub(super) fn topic_of(item: &Item) -> Option<String> {
    let Item::Events(block) = item else { return None };
    let (_, json) = block.events().next()?;
    let head = crate::wire::event::EventHead::parse(&json).ok()?;
    Some(head.topic.into_owned()).filter(|topic| !topic.is_empty())
}
