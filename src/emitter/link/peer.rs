//! Items through an object of the host language.

use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::sync::mpsc;

use super::{LinkEvent, lost};
use crate::emitter::item::Item;
use crate::emitter::machine::Outgoing;
use crate::wire::block::Block;

/// An object of the host language that sends events. Calls return at once; answers come as [`PeerEvent`]s.
pub trait Peer: Send + Sync {
    /// Connect, and answer `Up` or `Down`.
    fn connect(&self);
    /// Send the events of a block one after the other, and answer `Sent` or `Down`.
    fn send(&self, block: Block);
    /// The link is given up.
    fn close(&self);
}

/// Answers of a [`Peer`].
#[derive(Debug)]
pub enum PeerEvent {
    /// It can send.
    Up,
    /// Everything up to this seq was sent.
    Sent(u64),
    /// It cannot send, and why.
    Down(String),
    /// Sending failed after everything up to `sent`. One word, since between two the next block would go out.
    Failed {
        /// The last seq that was sent.
        sent: u64,
        /// Why the next was not.
        why: String,
    },
}

/// A link through an object of the host language: one block at a time, so that what failed is known.
pub struct PeerLink {
    peer: Arc<dyn Peer>,
    events: mpsc::UnboundedReceiver<PeerEvent>,
    busy: bool,
    failed: Option<String>,
}

impl PeerLink {
    pub(super) fn new(peer: Arc<dyn Peer>, events: mpsc::UnboundedReceiver<PeerEvent>) -> Self {
        Self { peer, events, busy: false, failed: None }
    }

    pub(super) fn poll(&mut self, cx: &mut Context<'_>, more: &mut dyn FnMut() -> Option<Outgoing>) -> Poll<LinkEvent> {
        if let Some(why) = self.failed.take() {
            return Poll::Ready(LinkEvent::Down(lost(&why)));
        }
        // Its word first: after a failure nothing more must be given to it.
        let Poll::Ready(event) = self.events.poll_recv(cx) else {
            if self.busy {
                return Poll::Pending;
            }
            return match more() {
                // Such an object knows events only; a gap is over as soon as its turn has come.
                Some(Outgoing::Item(Item::Gap(gap))) => Poll::Ready(LinkEvent::Ack(gap.to)),
                Some(Outgoing::Item(Item::Events(block))) => {
                    self.busy = true;
                    self.peer.send(block);
                    // So that the driver looks at its deadlines again: there is something to be confirmed now.
                    Poll::Ready(LinkEvent::Progress)
                }
                Some(Outgoing::Ping(_) | Outgoing::AckNow) | None => Poll::Pending,
            };
        };
        Poll::Ready(match event {
            Some(PeerEvent::Sent(upto)) => {
                self.busy = false;
                LinkEvent::Ack(upto)
            }
            Some(PeerEvent::Up) => LinkEvent::Progress,
            Some(PeerEvent::Down(why)) => LinkEvent::Down(lost(&why)),
            Some(PeerEvent::Failed { sent, why }) => {
                self.failed = Some(why);
                LinkEvent::Ack(sent)
            }
            None => LinkEvent::Down(lost("the ws_client is gone")),
        })
    }
}

impl Drop for PeerLink {
    fn drop(&mut self) {
        self.peer.close();
    }
}
