//! What a session speaks through: a socket of ours, or messages that somebody else's server has taken off a socket of
//! theirs. The session is the same behind both (`docs/decisions/0016-two-doors.md`).

mod exchange;
mod messages;

use std::time::Duration;

use futures_util::{Sink, Stream};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::Error as WsError;
use tokio_tungstenite::tungstenite::protocol::Message;

use super::meter::Metered;

pub(super) use exchange::answer;
pub use exchange::{Exchange, Part};
pub(super) use messages::admit;
pub use messages::{Guest, Outgoing, Refusal};

/// How long what a refused peer still sends is read and dropped, so that it sees the close and not a reset.
const LINGER: Duration = Duration::from_secs(1);

/// Messages both ways. A flush that was not complete at once and then is proves that the peer has taken what was sent; one
/// through another server proves it always.
pub(super) trait Wire:
    Stream<Item = Result<Message, WsError>> + Sink<Message, Error = WsError> + Unpin + Send
{
    /// Whether it carries WebSocket's own pings. Where it does not, a subscriber is pinged in its own words.
    const PINGS: bool;

    /// The session reads on: about this many bytes, before others have their turn.
    fn begin_turn(&mut self, _bytes: usize) {}

    /// Whether more frames came than are allowed.
    fn exceeded(&self) -> bool {
        false
    }

    /// Lets a peer whose input is not read any more see the close that tells it why.
    fn linger(&mut self) -> impl Future<Output = ()> + Send;
}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Wire for WebSocketStream<Metered<S>> {
    const PINGS: bool = true;

    fn begin_turn(&mut self, bytes: usize) {
        self.get_mut().begin_turn(bytes);
    }

    fn exceeded(&self) -> bool {
        self.get_ref().exceeded()
    }

    /// Reads and drops for a while: closing a socket with unread input resets the connection.
    async fn linger(&mut self) {
        let stream = self.get_mut().unmetered();
        let drain = async {
            stream.shutdown().await?;
            let mut dropped = [0; 4096];
            while stream.read(&mut dropped).await? > 0 {}
            std::io::Result::Ok(())
        };
        // Whether the peer was patient or not, the session is over.
        drop(tokio::time::timeout(LINGER, drain).await);
    }
}
