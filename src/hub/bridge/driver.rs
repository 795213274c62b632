//! The task of a bridge: does what its [`Machine`] decides.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

use super::batches::{Batches, Landed};
use super::hearing::Hearing;
use super::local::Local;
use super::machine::{Action, Body, Machine};
use super::{Appended, BridgeConfig, Bus, BusDown, Filled, Link, Message, Place, Status};
use crate::error::{Error, ErrorKind, Result};
use crate::hub::entry::Record;
use crate::hub::fresh_epoch;
use crate::hub::ops::{self, Op, Outcome};
use crate::hub::registry::frame_cost;
use crate::hub::service::Part;
use crate::hub::shared::Shared;

/// How long a hub that stops waits for the bus to take back what it held.
const LEAVE_WITHIN: Duration = Duration::from_secs(1);

/// A batch that was answered, until the log has its last record.
struct Answered {
    epoch: String,
    last: u64,
    since: Duration,
    outcomes: Vec<Outcome>,
}

/// What a question to the bus brought.
enum Event<L> {
    Linked(Result<(L, Hearing, Place)>),
    Joined(Result<Place>),
    /// The batch of this number.
    Appended(u64, Result<Appended>),
    /// From this offset on.
    Filled(u64, Result<Filled>),
    Probed(Result<Place>),
}

/// See the module.
pub(super) struct Driver<B: Bus> {
    bus: Arc<B>,
    config: BridgeConfig,
    hub: Arc<str>,
    machine: Machine,
    began: Instant,
    status: Arc<Status>,
    link: Option<B::Link>,
    hearing: Option<Hearing>,
    /// Questions under way over this link.
    asked: JoinSet<Event<B::Link>>,
    batches: Batches,
    answered: VecDeque<Answered>,
    /// The live message of the batch under way, which its answer makes superfluous.
    echo: Option<(u64, Message)>,
    /// What the log was told to expect.
    expected: u64,
    /// The bus is away, and events go on without it.
    local: Option<Local>,
    closing: Option<oneshot::Sender<()>>,
}

impl<B: Bus> Driver<B> {
    pub(super) fn new(bus: B, config: BridgeConfig, hub: String, machine: Machine, began: Instant) -> Self {
        let status = Arc::new(Status::default());
        status.write(|stats| (stats.hub, stats.circuit) = (hub.clone(), machine.circuit()));
        let hub: Arc<str> = hub.into();
        let batches = Batches::new(hub.clone());
        Self {
            bus: Arc::new(bus),
            config,
            hub,
            machine,
            began,
            status,
            link: None,
            hearing: None,
            asked: JoinSet::new(),
            batches,
            answered: VecDeque::new(),
            echo: None,
            expected: 0,
            local: None,
            closing: None,
        }
    }

    pub(super) fn linked(self, link: B::Link, hearing: Hearing) -> Self {
        Self { link: Some(link), hearing: Some(hearing), ..self }
    }

    /// Begins without the bus, and says so from the first moment on.
    pub(super) fn alone(self) -> Self {
        self.status.write(|stats| (stats.local, stats.degraded) = (true, true));
        Self { local: Some(Local::new()), ..self }
    }

    pub(super) fn status(&self) -> Arc<Status> {
        self.status.clone()
    }

    /// Runs until it is closed.
    pub(super) async fn run(mut self, shared: Arc<Shared>, mut ops: mpsc::UnboundedReceiver<Op>) {
        loop {
            self.act(&shared).await;
            self.tell_status();
            if self.closing.is_some() && self.is_done() {
                break;
            }
            let deadline = self.deadline();
            tokio::select! {
                op = ops.recv() => self.on_op(op.unwrap_or_else(|| Op::Close { done: oneshot::channel().0 })),
                Some(event) = self.asked.join_next() => match event {
                    Ok(event) => self.on_event(&shared, event),
                    // Nothing else would tell: an attempt to connect has no deadline of the machine's.
                    Err(error) => self.on_lost(&format!("a question to the bus ended without an answer: {error}")),
                },
                message = hear(&mut self.hearing) => self.on_message(&shared, message),
                () = sleep_until(deadline) => {}
            }
            while let Ok(op) = ops.try_recv() {
                self.on_op(op);
            }
            while let Some(message) = self.hearing.as_mut().and_then(Hearing::at_hand) {
                self.on_message(&shared, Some(message));
            }
            if let Some(lost) = self.hearing.as_mut().map(Hearing::take_lost).filter(|lost| *lost > 0) {
                self.status.write(|stats| stats.plain_refused += lost as u64);
            }
            self.machine.tick(self.now());
        }
        if let Some(link) = self.link.filter(|_| self.machine.is_up()) {
            // The others need not wait until what this hub held runs out; if it fails they do.
            drop(tokio::time::timeout(LEAVE_WITHIN, link.leave()).await);
        }
        if let Some(done) = self.closing {
            done.send(()).unwrap_or_default(); // nobody may wait for it
        }
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn deadline(&self) -> Option<Instant> {
        let answered = self.answered.front().map(|answered| answered.since);
        let oldest = self.batches.oldest().into_iter().chain(answered).min();
        let late = oldest.map(|since| since + self.config.bus_timeout);
        let due = self.machine.deadline().into_iter().chain(late).min()?;
        Some(self.began + due)
    }

    fn is_done(&self) -> bool {
        let idle = self.batches.is_empty() && self.answered.is_empty();
        idle || !self.machine.is_up()
    }

    fn on_op(&mut self, op: Op) {
        match op {
            Op::Release { id, name } => {
                self.batches.release(id);
                if let Some(local) = &mut self.local {
                    local.release(id, &name);
                }
            }
            Op::Close { done } => self.closing = Some(done),
            op => self.batches.push(op, self.now()),
        }
    }

    fn on_event(&mut self, shared: &Shared, event: Event<B::Link>) {
        let now = self.now();
        let lost = match event {
            Event::Linked(Ok((link, hearing, place))) => {
                (self.link, self.hearing) = (Some(link), Some(hearing));
                self.machine.connected(now, &place);
                return;
            }
            Event::Joined(Ok(place)) => return self.machine.joined(&place),
            Event::Appended(number, Ok(appended)) => return self.on_appended(number, appended),
            Event::Appended(number, Err(error)) if error.kind() == ErrorKind::BusRefused => {
                // The link is good; the batch is tried again when a probe finds that there is room.
                self.batches.refused(number);
                return self.machine.refused(now, &error.report());
            }
            Event::Filled(from, Ok(filled)) => return self.machine.filled(from, filled),
            Event::Probed(Ok(place)) => {
                // As a sign of life it counts when it comes round.
                return shared.with(|state, _| {
                    if state.log.epoch() == place.epoch {
                        state.log.judge(place.head);
                    }
                });
            }
            Event::Linked(Err(error))
            | Event::Joined(Err(error))
            | Event::Appended(_, Err(error))
            | Event::Filled(_, Err(error))
            | Event::Probed(Err(error)) => error,
        };
        self.on_lost(&lost.report());
    }

    fn on_lost(&mut self, why: &str) {
        self.machine.lost(self.now(), why);
    }

    fn on_message(&mut self, shared: &Shared, message: Option<Message>) {
        let Some(message) = message else {
            self.hearing = None;
            return self.on_lost("the connection for live messages was closed");
        };
        match &message {
            Message::Plain(json) => return self.on_plain(shared, json.clone()),
            Message::Block { by: (hub, number), .. } | Message::Head { by: Some((hub, number)), .. }
                if **hub == *self.hub && self.batches.under_way() == Some(*number) =>
            {
                self.echo = Some((*number, message));
                return;
            }
            _ => {}
        }
        // What comes next is in order only behind the own batch, whose answer may be late.
        self.hear_echo();
        self.machine.heard(self.now(), message);
    }

    fn hear_echo(&mut self) {
        if let Some((_, echo)) = self.echo.take() {
            self.machine.heard(self.now(), echo);
        }
    }

    fn on_plain(&mut self, shared: &Shared, json: bytes::Bytes) {
        if !self.machine.takes_in() {
            return; // another hub does
        }
        let record = crate::hub::record(shared, json, None);
        let taken = record.is_ok_and(|record| self.batches.take_in(record, self.began.elapsed()));
        self.status.write(|stats| *(if taken { &mut stats.plain } else { &mut stats.plain_refused }) += 1);
    }

    /// Does what the machine wants, until it wants nothing more.
    async fn act(&mut self, shared: &Arc<Shared>) {
        loop {
            let mut outcomes = Vec::new();
            while let Some(action) = self.machine.next_action() {
                match action {
                    Action::Append { count, skip, body } => {
                        heard(shared, body.into_records(count, skip), &mut outcomes);
                    }
                    Action::Begin { epoch, head } => {
                        self.settle(shared, std::mem::take(&mut outcomes)).await;
                        self.restart(shared, epoch, head, None);
                    }
                    Action::Tell(trouble) => self.tell(shared, trouble.as_deref()),
                    action => {
                        if matches!(action, Action::Probe(_)) {
                            shared.with(|state, _| state.log.ask());
                        }
                        self.ask(&action);
                    }
                }
            }
            while let Some(next) = self.answered.front()
                && (self.machine.has(&next.epoch, next.last) || self.is_late(next.since) || self.closing.is_some())
            {
                // It is in the stream, whether or not what lies before it has come here.
                outcomes.extend(self.answered.pop_front().into_iter().flat_map(|answered| answered.outcomes));
            }
            self.give_up(shared, &mut outcomes);
            self.send();
            let head = self.machine.head();
            if head != self.expected {
                self.expected = head;
                shared.with(|state, _| state.log.expect(head));
            }
            if outcomes.is_empty() {
                return;
            }
            self.settle(shared, outcomes).await;
        }
    }

    /// Whoever hears what became of an event finds the numbers that go with it.
    async fn settle(&mut self, shared: &Shared, outcomes: Vec<Outcome>) {
        self.tell_status();
        ops::settle(shared, outcomes).await;
    }

    /// The log begins anew, for all hubs or for this one alone.
    fn restart(&mut self, shared: &Shared, epoch: String, head: u64, local: Option<Local>) {
        (self.local, self.expected) = (local, 0);
        self.tell_status();
        shared.with(|state, _| state.restart(epoch, head));
    }

    fn ask(&mut self, action: &Action) {
        match *action {
            Action::Connect => {
                let (bus, hub, known) = (self.bus.clone(), self.hub.clone(), self.machine.known());
                let limit = self.config.bus_timeout;
                self.asked.spawn(async move {
                    let connecting = async {
                        let (link, hearing) = bus.connect(&hub).await?;
                        let place = link.join(&known, &fresh_epoch()?).await?;
                        Ok((link, hearing, place))
                    };
                    Event::Linked(within(limit, connecting).await)
                });
            }
            Action::Disconnect => {
                (self.link, self.hearing, self.echo, self.asked) = (None, None, None, JoinSet::new());
                self.batches.unsent();
            }
            Action::Join => {
                let known = self.machine.known();
                self.over_link(|link| async move {
                    Event::Joined(async { link.join(&known, &fresh_epoch()?).await }.await)
                });
            }
            Action::Probe(number) => self.over_link(move |link| async move { Event::Probed(link.probe(number).await) }),
            Action::Fill { from, most } => {
                self.over_link(move |link| async move { Event::Filled(from, link.fill(from, most).await) });
            }
            Action::Begin { .. } | Action::Append { .. } | Action::Tell(_) => {} // the caller's
        }
    }

    fn over_link<F: Future<Output = Event<B::Link>> + Send + 'static>(&mut self, ask: impl FnOnce(B::Link) -> F) {
        if let Some(link) = self.link.clone() {
            self.asked.spawn(ask(link));
        }
    }

    fn tell(&self, shared: &Shared, trouble: Option<&str>) {
        let circuit = self.machine.circuit();
        self.status.write(|stats| stats.degraded = trouble.is_some());
        shared.with(|state, _| {
            state.service.set_circuit(Part::Bridge, circuit);
            state.trouble(Part::Bridge, trouble.map(|_| self.notice().to_owned()));
        });
    }

    fn notice(&self) -> &'static str {
        match (self.config.bus_down, self.machine.is_refused()) {
            (BusDown::Wait, false) => "The bus between the hubs cannot be reached; events wait with their emitters.",
            (BusDown::Wait, true) => "The bus between the hubs takes no events; they wait with their emitters.",
            (BusDown::Local, false) => "The bus between the hubs cannot be reached; events come from this hub only.",
            (BusDown::Local, true) => "The bus between the hubs takes no events; they come from this hub only.",
        }
    }

    fn tell_status(&self) {
        let (counts, machine) = (self.machine.counts(), &self.machine);
        self.status.write(|stats| {
            stats.local = self.local.is_some();
            stats.error = machine.trouble().map(str::to_owned);
            (stats.up, stats.circuit, stats.intake) = (machine.is_up(), machine.circuit(), machine.takes_in());
            (stats.losses, stats.failures, stats.deaf) = (counts.losses, counts.failures, counts.deaf);
            stats.probes = counts.probes;
            (stats.fills, stats.restarts) = (counts.fills, counts.restarts);
            (stats.batches, stats.waiting) = (self.batches.sent(), self.batches.len());
        });
    }

    /// Sends the batch under way if it is not, or the next one.
    fn send(&mut self) {
        if !self.machine.may_append() {
            return;
        }
        let known = self.machine.known();
        if let Some(batch) = self.batches.next_to_send(known) {
            self.over_link(|link| async move { Event::Appended(batch.number, link.append(&batch).await) });
        }
    }

    fn on_appended(&mut self, number: u64, appended: Appended) {
        self.machine.kept();
        let (epoch, first, count) = (appended.epoch.clone(), appended.first, appended.count);
        // Of a batch that was given up the stream tells.
        let Some(Landed { records, last, outcomes }) = self.batches.land(number, appended) else { return };
        if self.echo.as_ref().is_some_and(|(of, _)| *of == number) {
            self.echo = None;
        }
        if count > 0 {
            self.machine.offer(&epoch, first, count, Body::Own(records));
        }
        self.answered.push_back(Answered { epoch, last, since: self.now(), outcomes });
    }

    fn is_late(&self, since: Duration) -> bool {
        self.now() >= since + self.config.bus_timeout
    }

    /// Takes what waits without the bus. Whoever had a position comes back for one in the hub's own epoch.
    fn go_on_alone(&mut self, shared: &Shared, outcomes: &mut Vec<Outcome>) {
        if self.local.is_none() && self.batches.has_waiting() {
            let Ok(epoch) = fresh_epoch() else { return };
            self.machine.leave();
            self.restart(shared, epoch, 0, Some(Local::new()));
        }
        if let Some(local) = &mut self.local {
            outcomes.extend(self.batches.take_waiting().filter_map(|op| local.take(op)));
        }
    }

    /// Answers what has waited for too long, or would.
    fn give_up(&mut self, shared: &Shared, outcomes: &mut Vec<Outcome>) {
        let now = self.now();
        let late = self.batches.oldest().is_some_and(|since| self.is_late(since));
        let away = self.machine.has_given_up(now);
        let ends = self.closing.is_some() && (!self.machine.is_up() || self.machine.is_refused());
        if !late && !away && !ends {
            return;
        }
        let cause = self.machine.trouble().map_or_else(String::new, |why| format!(": {why}"));
        outcomes.extend(self.batches.give_up_flight(&cause));
        let local = self.config.bus_down == BusDown::Local && self.closing.is_none();
        if local && away && self.machine.may_leave() {
            self.go_on_alone(shared, outcomes);
        }
        // Without the bus nothing that waits has a chance; with it, what came just now has.
        let all = ends || (away && !local);
        let Some(since) = (if all { Some(now) } else { now.checked_sub(self.config.bus_timeout) }) else { return };
        outcomes.extend(self.batches.give_up_waiting(since, &cause));
    }
}

/// Others' records as outcomes, in slices that let subscribers keep up.
fn heard(shared: &Shared, records: Vec<Record>, outcomes: &mut Vec<Outcome>) {
    let most = ops::slice(shared);
    let (mut slice, mut bytes) = (Vec::new(), 0);
    for record in records {
        bytes += frame_cost(&record);
        slice.push(record);
        if bytes >= most {
            outcomes.push(Outcome::Heard { records: std::mem::take(&mut slice) });
            bytes = 0;
        }
    }
    if !slice.is_empty() {
        outcomes.push(Outcome::Heard { records: slice });
    }
}

/// Waits so long, and no longer.
pub(super) async fn within<T>(limit: Duration, asked: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(limit, asked).await.unwrap_or_else(|_| {
        let message = format!("the bus did not answer within {} s", limit.as_secs_f64());
        Err(Error::new(ErrorKind::BusDown, message))
    })
}

async fn hear(hearing: &mut Option<Hearing>) -> Option<Message> {
    match hearing {
        Some(hearing) => hearing.next().await,
        None => std::future::pending().await,
    }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
