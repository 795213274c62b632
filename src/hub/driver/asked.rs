//! What a machine has asked for that takes time: a token that is checked, an event that is on its way to the log. Until it
//! is there, its session is not read on.

use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::sync::oneshot;

use super::{Machine, Session};
use crate::hub::doors::Wire;
use crate::hub::machine::Asked;
use crate::hub::{publish, stopped};

impl<W: Wire> Session<W> {
    /// Ready when nothing that was asked for forbids to read on.
    pub(super) fn poll_asked(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            std::task::ready!(self.poll_checked(cx));
            if let Some(publishing) = &mut self.publishing {
                let published = std::task::ready!(Pin::new(publishing).poll(cx)).unwrap_or_else(|_| Err(stopped()));
                self.publishing = None;
                if let Machine::Centrifugo(machine) = &mut self.machine {
                    self.seat.shared.with(|state, _| machine.on_published(published, state));
                }
            }
            match &self.machine {
                Machine::Centrifugo(machine) if machine.has_rest() => {}
                _ => return Poll::Ready(()),
            }
            if !self.advance() {
                return Poll::Pending; // until the socket has taken some of what waits
            }
        }
    }

    /// Lets a machine go on that does one thing after the other; whether it asked for something, or is through.
    fn advance(&mut self) -> bool {
        let Machine::Centrifugo(machine) = &mut self.machine else { return true };
        let shared = &self.seat.shared;
        match shared.with(|state, now| machine.next(&mut self.access, state, now)) {
            Some(Asked::Check(token)) => self.checking = Some(Box::pin(shared.clone().check(token))),
            Some(Asked::Publish(event)) => {
                let (reply, published) = oneshot::channel();
                self.publishing = Some(published);
                // An error means that the session is gone.
                publish(shared, vec![event], self.access.grant(), move |result| drop(reply.send(result)));
            }
            None => return !machine.has_rest(),
        }
        true
    }

    /// Ready when no token is being checked.
    fn poll_checked(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(checking) = &mut self.checking {
            let checked = std::task::ready!(checking.as_mut().poll(cx));
            self.checking = None;
            // Whoever is refused is not listened to while it is told so.
            self.deaf = checked.is_err();
            let (role, access) = (self.seat.role, &mut self.access);
            self.seat.shared.with(|state, now| match &mut self.machine {
                Machine::Centrifugo(machine) => machine.on_checked(checked, access, state, now),
                _ => drop(access.on_checked(checked, role, state)),
            });
            let publish = self.access.grant().and_then(|grant| grant.publish.clone());
            match &mut self.machine {
                Machine::Emitter(machine) => machine.limit_to(publish),
                Machine::Publisher(machine) => machine.limit_to(publish),
                Machine::Subscriber(_) | Machine::Centrifugo(_) => {}
            }
            if self.deaf {
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
        Poll::Ready(())
    }
}
