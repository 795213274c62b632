//! The door between an emitter and a hub in the same process: a pipe instead of a socket. What flows through it is
//! the same WebSocket stream as over TCP, without the HTTP handshake, so that neither half has a second protocol.

use std::io;
use std::sync::Arc;

use tokio::io::DuplexStream;

/// Opens a pipe to a hub. The emitter speaks as a WebSocket client on it, the hub as a server, and the subprotocol
/// `sb.emit.v1` is understood.
#[derive(Clone)]
pub struct Dialer(Arc<dyn Fn() -> io::Result<DuplexStream> + Send + Sync>);

impl Dialer {
    /// Wraps the hub's way of accepting a pipe. It fails while the hub is not running.
    pub fn new(open: impl Fn() -> io::Result<DuplexStream> + Send + Sync + 'static) -> Self {
        Self(Arc::new(open))
    }

    /// A new pipe.
    ///
    /// # Errors
    /// The hub is not running.
    pub fn dial(&self) -> io::Result<DuplexStream> {
        (self.0)()
    }
}
