//! What comes from the peer: read in batches, and handed to the hub.

use std::task::{Context, Poll};

use futures_util::StreamExt as _;
use tokio_tungstenite::tungstenite::protocol::Message;

use super::library::{EMITTER_READ_BUFFER, refusal};
use super::{Checking, Event, Machine, READ_BATCH, ROUNDS, Session};
use crate::hub::doors::Wire;
use crate::hub::machine::Step;
use crate::hub::registry::Role;
use crate::wire::close::CloseCode;
use crate::wire::subscriber;

impl<W: Wire> Session<W> {
    /// Reads a batch, and hands what it brought to the hub.
    pub(super) fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        if self.poll_flow(cx).is_pending() {
            return Poll::Pending;
        }
        if self.gives_way() {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let mut budget = READ_BATCH;
        self.wire.begin_turn(READ_BATCH + EMITTER_READ_BUFFER);
        let ended = loop {
            if budget == 0 || self.machine.is_full() {
                cx.waker().wake_by_ref();
                break false;
            }
            if let Machine::Emitter(machine) = &mut self.machine
                && machine.has_rest()
            {
                if machine.resume() == Step::Commit {
                    self.commit();
                }
                continue;
            }
            match self.wire.poll_next_unpin(cx) {
                Poll::Pending => {
                    if self.wire.exceeded() && !self.deaf {
                        self.deaf = true;
                        let has_words = self.seat.role == Role::Subscriber;
                        self.with_registry(|registry, id| {
                            let message = "too many frames in a second, pings, pongs and fragments included";
                            if has_words {
                                registry.push(id, subscriber::error("too_many_frames", message));
                            }
                            registry.order_close(id, CloseCode::TooMany);
                        });
                    }
                    break false;
                }
                Poll::Ready(None) => break true,
                Poll::Ready(Some(Ok(message))) => {
                    // A frame without content costs a turn too.
                    budget = budget.saturating_sub(64 + message.len());
                    self.liveness.progress();
                    self.on_message(message);
                    if self.is_held_up() {
                        // Not read on before the keeper has caught up, or the token is checked: the next poll asks to
                        // be woken then.
                        cx.waker().wake_by_ref();
                        break false;
                    }
                }
                Poll::Ready(Some(Err(error))) => match refusal(&error) {
                    None => break true,
                    Some(code) => {
                        self.deaf = true;
                        self.with_registry(|registry, id| registry.order_close(id, code));
                        break false;
                    }
                },
            }
        };
        self.commit();
        if ended { Poll::Ready(Event::Ended) } else { Poll::Pending }
    }

    /// Whether it is not read on for the moment, for a reason that is not its peer's.
    fn is_held_up(&self) -> bool {
        let rest = || matches!(&self.machine, Machine::Centrifugo(machine) if machine.has_rest());
        self.flow.is_shut() || self.checking.is_some() || rest()
    }

    /// Ready when nothing on its way to a keeper forbids reading.
    fn poll_flow(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while let Some(greeted) = std::task::ready!(self.flow.poll_open(cx)) {
            if let Machine::Emitter(machine) = &mut self.machine {
                machine.greeted(greeted);
            }
        }
        if let Machine::Emitter(machine) = &mut self.machine {
            machine.acknowledged(self.flow.acknowledged());
        }
        Poll::Ready(())
    }

    /// Whether others must have their turn before this session is read.
    fn gives_way(&mut self) -> bool {
        if self.seat.role.subscribes() {
            return false;
        }
        let (last, times) = self.gave_way;
        let turn = self.with_registry(|registry, id| {
            let turn = registry.must_give_way(id).filter(|turn| *turn != last || times < ROUNDS);
            if turn.is_none() {
                registry.reads(id);
            }
            turn
        });
        if let Some(turn) = turn {
            self.gave_way = (turn, if turn == last { times + 1 } else { 1 });
        }
        turn.is_some()
    }

    fn on_message(&mut self, message: Message) {
        let step = match (&mut self.machine, &message) {
            (Machine::Emitter(machine), Message::Text(text)) => machine.on_text(text),
            (Machine::Emitter(machine), Message::Binary(block)) => machine.on_block(block.clone()),
            (Machine::Subscriber(machine), Message::Text(text)) => {
                let access = &mut self.access;
                let shown = self.seat.shared.with(|state, now| machine.on_text(text, access, state, now));
                self.checking = shown.map(|token| Box::pin(self.seat.shared.clone().check(token)) as Checking);
                Step::More
            }
            (Machine::Subscriber(machine), Message::Binary(_)) => {
                self.seat.shared.with(|state, _| machine.on_binary(&mut self.access, state));
                Step::More
            }
            (Machine::Centrifugo(machine), Message::Text(text)) => {
                self.seat.shared.with(|state, _| machine.on_text(text, state));
                Step::More
            }
            (Machine::Centrifugo(machine), Message::Binary(_)) => {
                self.seat.shared.with(|state, _| machine.on_binary(state));
                Step::More
            }
            (Machine::Publisher(machine), Message::Text(_) | Message::Binary(_)) => {
                if let Err(answer) = machine.on_event(message.into_data()) {
                    self.seat.shared.with(|state, _| state.refuse(self.seat.id, answer));
                }
                Step::More
            }
            // Pings and closes are answered by the WebSocket layer.
            _ => Step::More,
        };
        if step == Step::Commit {
            self.commit();
        }
    }

    pub(super) fn commit(&mut self) {
        let shared = &self.seat.shared;
        let turn = match (&mut self.machine, &shared.keeper) {
            (Machine::Emitter(machine), _) if !machine.wants_commit(shared.now()) => return,
            (Machine::Publisher(machine), _) if !machine.wants_commit() => return,
            (Machine::Subscriber(_) | Machine::Centrifugo(_), _) => return,
            (Machine::Emitter(machine), None) => return shared.with(|state, now| machine.commit(state, now)),
            (Machine::Publisher(machine), None) => {
                return shared.with(|state, now| drop(machine.turn().settle(None, state, now)));
            }
            (Machine::Emitter(machine), Some(_)) => machine.turn(shared.now()),
            (Machine::Publisher(machine), Some(_)) => machine.turn(),
        };
        if !turn.records.is_empty() {
            // Here, because some keepers bring the records to the log by another way.
            shared.with(|state, now| state.presence.hear(&turn.name, &turn.records, now));
        }
        if shared.keeper.as_ref().is_some_and(|keeper| !keeper.submit(turn, &self.flow)) {
            self.with_registry(|registry, id| registry.order_close(id, CloseCode::Degraded));
        }
    }
}
