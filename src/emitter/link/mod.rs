//! The link: one connection to whoever receives the events. It moves frames and decides nothing.
//!
//! [`connect`](mod@connect) makes it, [`socket`] carries our items over a WebSocket, [`peer`] through an object of the
//! host language.

pub mod connect;
pub mod peer;
pub mod socket;

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::emitter::machine::Outgoing;
use crate::error::{Error, ErrorKind};
use crate::local::Dialer;
use crate::wire::close::CloseCode;

pub use connect::{Endpoint, check_tls, connect};
pub use peer::{Peer, PeerEvent, PeerLink};
pub use socket::Socket;

/// Longest time for the closing handshake.
const CLOSING: Duration = Duration::from_secs(1);

/// Where events go.
#[derive(Clone)]
pub enum Target {
    /// A WebSocket server.
    Url(Endpoint),
    /// A hub in this process.
    Local(Dialer),
    /// An object of the host language.
    Peer(Arc<dyn Peer>),
}

trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// An open connection.
pub enum Link {
    /// A WebSocket, over TCP, TLS or a pipe.
    Socket(Box<Socket>),
    /// An object of the host language.
    Peer(PeerLink),
}

/// What a link has to say.
#[derive(Debug)]
pub enum LinkEvent {
    /// Everything up to this seq is confirmed.
    Ack(u64),
    /// The hub refuses this event, has everything before it, and ignores what follows until we go back.
    Nack {
        /// The event.
        seq: u64,
        /// Why.
        reason: String,
    },
    /// The hub's grant changed.
    Credit(u64),
    /// A Ping came back with its number.
    Pong(u64),
    /// Bytes moved.
    Progress,
    /// The link is gone.
    Down(Error),
}

impl Link {
    /// Moves what can be moved: reads first, then asks `more` for frames until there are none or the peer is slow.
    pub fn poll(&mut self, cx: &mut Context<'_>, more: &mut dyn FnMut() -> Option<Outgoing>) -> Poll<LinkEvent> {
        match self {
            Self::Socket(socket) => match socket.poll(cx, more) {
                Poll::Ready(Ok(event)) => Poll::Ready(event),
                Poll::Ready(Err(error)) => Poll::Ready(LinkEvent::Down(error)),
                Poll::Pending => Poll::Pending,
            },
            Self::Peer(peer) => peer.poll(cx, more),
        }
    }

    /// Says good-bye as RFC 6455 §7.1 wants it, for at most `CLOSING`; a peer that is gone does not hold us up.
    pub async fn close(self) {
        if let Self::Socket(mut socket) = self {
            let closing = async {
                use futures_util::StreamExt;
                // Whatever fails here, the connection is over anyway.
                if socket.stream.close(None).await.is_ok() {
                    while let Some(Ok(_)) = socket.stream.next().await {}
                }
            };
            drop(tokio::time::timeout(CLOSING, closing).await);
        }
    }
}

/// Whether a peer that closes with this code speaks of what it was sent: RFC 6455's codes for data of a kind, an
/// encoding or a size that it does not take, and our hub's. Not 1008, which servers use for a token that has expired.
fn is_about_content(code: u16) -> bool {
    matches!(code, 1003 | 1007 | 1009) || code == CloseCode::BadFrame.code() || code == CloseCode::TooLarge.code()
}

fn lost(why: &str) -> Error {
    Error::new(ErrorKind::ConnectRefused, why)
}
