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
use crate::hub::ops::{self, Op, Outcome, Reply};
use crate::hub::registry::frame_cost;
use crate::hub::service::Part;
use crate::hub::shared::Shared;

/// A batch that was answered, until the log has its last record.
struct Answered {
    epoch: String,
    last: u64,
    outcomes: Vec<Outcome>,
}

/// What a question to the bus brought.
enum Event<L> {
    Linked(Result<(L, Hearing, Place)>),
    Joined(Result<Place>),
    Appended(Result<Appended>),
    Filled(Result<Filled>),
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
    echo: Option<Message>,
    /// What the log was told to expect.
    expected: u64,
    /// What the log doubted when the last probe was sent.
    doubtful: u64,
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
            doubtful: 0,
            local: None,
            closing: None,
        }
    }

    pub(super) fn linked(self, link: B::Link, hearing: Hearing) -> Self {
        Self { link: Some(link), hearing: Some(hearing), ..self }
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
                Some(event) = self.asked.join_next() => {
                    // An error means that the task was aborted, or has panicked: the next probe finds out.
                    if let Ok(event) = event {
                        self.on_event(&shared, event);
                    }
                }
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
        if let Some(done) = self.closing {
            done.send(()).unwrap_or_default(); // nobody may wait for it
        }
    }

    fn now(&self) -> Duration {
        self.began.elapsed()
    }

    fn deadline(&self) -> Option<Instant> {
        let oldest = self.batches.oldest().map(|since| since + self.config.bus_timeout);
        let due = self.machine.deadline().into_iter().chain(oldest).min()?;
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
            op => self.batches.push(op, self.now(), false),
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
            Event::Appended(Ok(appended)) => return self.on_appended(appended),
            Event::Filled(Ok(filled)) => return self.machine.filled(filled),
            Event::Probed(Ok(place)) => {
                // As a sign of life it counts when it comes round.
                let doubtful = self.doubtful;
                return shared.with(|state, _| {
                    if state.log.epoch() == place.epoch {
                        state.log.judge(doubtful, place.head);
                    }
                });
            }
            Event::Linked(Err(error))
            | Event::Joined(Err(error))
            | Event::Appended(Err(error))
            | Event::Filled(Err(error))
            | Event::Probed(Err(error)) => error,
        };
        self.on_lost(&lost.report());
    }

    fn on_lost(&mut self, why: &str) {
        self.status.write(|stats| stats.error = Some(why.to_owned()));
        self.machine.lost(self.now(), why);
    }

    fn on_message(&mut self, shared: &Shared, message: Option<Message>) {
        let Some(message) = message else {
            self.hearing = None;
            return self.on_lost("the connection for live messages was closed");
        };
        match &message {
            Message::Plain(json) => return self.on_plain(shared, json.clone()),
            Message::Block { by: (hub, number), .. }
                if **hub == *self.hub && self.batches.under_way() == Some(*number) =>
            {
                self.echo = Some(message);
                return;
            }
            _ => {}
        }
        // What comes next is in order only behind the own batch, whose answer may be late.
        if let Some(echo) = self.echo.take() {
            self.machine.heard(echo);
        }
        self.machine.heard(message);
    }

    fn on_plain(&mut self, shared: &Shared, json: bytes::Bytes) {
        if !self.machine.takes_in() {
            return; // another hub does
        }
        match crate::hub::record(shared, json, None) {
            Ok(record) => {
                let op = Op::Publish { records: vec![record], reply: Reply::new(drop) };
                self.batches.push(op, self.now(), true);
                self.status.write(|stats| stats.plain += 1);
            }
            Err(_) => self.status.write(|stats| stats.plain_refused += 1),
        }
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
                        ops::settle(shared, std::mem::take(&mut outcomes)).await;
                        (self.local, self.expected) = (None, 0);
                        shared.with(|state, _| state.restart(epoch, head));
                    }
                    Action::Tell(trouble) => self.tell(shared, trouble.as_deref()),
                    action => {
                        if matches!(action, Action::Probe(_)) {
                            self.doubtful = shared.with(|state, _| state.log.doubtful());
                        }
                        self.ask(&action);
                    }
                }
            }
            while let Some(next) = self.answered.front()
                && self.machine.has(&next.epoch, next.last)
            {
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
            ops::settle(shared, outcomes).await;
        }
    }

    fn ask(&mut self, action: &Action) {
        let within = self.config.bus_timeout;
        match *action {
            Action::Connect => {
                let (bus, hub, known) = (self.bus.clone(), self.hub.clone(), self.machine.known());
                self.asked.spawn(async move {
                    let connecting = async {
                        let (link, hearing) = bus.connect(&hub).await?;
                        let place = link.join(&known, &fresh_epoch()?).await?;
                        Ok((link, hearing, place))
                    };
                    Event::Linked(
                        tokio::time::timeout(within, connecting).await.unwrap_or_else(|_| Err(silent(within))),
                    )
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
                self.over_link(move |link| async move { Event::Filled(link.fill(from, most).await) });
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
        self.status.write(|stats| {
            stats.degraded = trouble.is_some();
            stats.error = trouble.map(str::to_owned);
        });
        shared.with(|state, _| {
            state.service.set_circuit(Part::Bridge, circuit);
            state.trouble(Part::Bridge, trouble.map(|_| self.notice().to_owned()));
        });
    }

    fn notice(&self) -> &'static str {
        match self.config.bus_down {
            BusDown::Wait => "The bus between the hubs cannot be reached; events wait with their emitters.",
            BusDown::Local => "The bus between the hubs cannot be reached; events come from this hub only.",
        }
    }

    fn tell_status(&self) {
        let (counts, machine) = (self.machine.counts(), &self.machine);
        self.status.write(|stats| {
            stats.local = self.local.is_some();
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
            self.over_link(|link| async move { Event::Appended(link.append(&batch).await) });
        }
    }

    fn on_appended(&mut self, appended: Appended) {
        self.echo = None;
        let (epoch, first, count) = (appended.epoch.clone(), appended.first, appended.count);
        let Some(Landed { records, last, outcomes }) = self.batches.land(appended) else { return };
        if count > 0 {
            self.machine.offer(&epoch, first, count, Body::Own(records));
        }
        self.answered.push_back(Answered { epoch, last, outcomes });
    }

    /// Takes what waits without the bus. Whoever had a position comes back for one in the hub's own epoch.
    fn go_on_alone(&mut self, shared: &Shared, outcomes: &mut Vec<Outcome>) {
        if self.local.is_none() && self.batches.has_waiting() {
            let Ok(epoch) = fresh_epoch() else { return };
            self.machine.leave();
            shared.with(|state, _| state.restart(epoch, 0));
            (self.local, self.expected) = (Some(Local::new()), 0);
        }
        if let Some(local) = &mut self.local {
            outcomes.extend(self.batches.take_waiting().filter_map(|op| local.take(op)));
        }
    }

    /// Answers what has waited for too long, or would.
    fn give_up(&mut self, shared: &Shared, outcomes: &mut Vec<Outcome>) {
        let now = self.now();
        let late = self.batches.oldest().is_some_and(|since| now >= since + self.config.bus_timeout);
        let away = self.machine.has_given_up(now);
        if !late && !away && (self.closing.is_none() || self.machine.is_up()) {
            return;
        }
        let cause = self.status.read().error.map_or_else(String::new, |error| format!(": {error}"));
        outcomes.extend(self.batches.give_up_flight(&cause));
        if away && self.config.bus_down == BusDown::Local && self.closing.is_none() {
            self.go_on_alone(shared, outcomes);
        }
        outcomes.extend(self.batches.give_up_waiting(&cause));
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

fn silent(within: Duration) -> Error {
    Error::new(ErrorKind::BusDown, format!("the bus did not answer within {} s", within.as_secs_f64()))
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
