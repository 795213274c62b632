//! The port: binds it, accepts connections and hands them to HTTP.

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs as _};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::config::HubConfig;
use super::http;
use super::shared::Shared;
use super::tls::Tls;
use crate::error::{Error, ErrorKind, Result};
use crate::inherited::Inherited;

/// How long a client may take for the head of a request, also for the next one on a connection that is kept.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Most bytes of a request's head.
const HEADER_BYTES: usize = 16 << 10;
/// Most header fields of a request: browsers send about 20.
const HEADERS: usize = 64;
/// Connections beyond `max_sessions`, so that health can be asked for when the hub is full.
const SPARE_CONNECTIONS: usize = 64;
/// Connections that the operating system may hold for us: a fleet comes back at once.
const BACKLOG: i32 = 1024;
/// How long a client may take to read the rest of a stream of events that is over.
const CLOSE_DEADLINE: Duration = Duration::from_secs(5);
/// Pause after an accept that failed, most likely for want of file descriptors: trying at once would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Takes the address of the settings; connections wait in the backlog from here on.
pub(super) fn bind(config: &HubConfig) -> Result<(Inherited, std::net::TcpListener)> {
    let name = format!("{}:{}", config.host, config.port);
    let failed = |error: std::io::Error| {
        let remedy = match error.kind() {
            std::io::ErrorKind::AddrInUse => {
                "stop the program that has it, or choose another port (0 takes any free one)"
            }
            std::io::ErrorKind::PermissionDenied => "choose a port above 1023",
            _ => "host must be a name or an address of this machine",
        };
        Error::new(ErrorKind::Bind, format!("cannot listen on {name}; {remedy}")).with_source(error)
    };
    let mut last = std::io::Error::new(std::io::ErrorKind::NotFound, "the host name has no address");
    for address in (config.host.as_str(), config.port).to_socket_addrs().map_err(failed)? {
        match bind_one(address) {
            Ok(bound) => return Ok(bound),
            Err(error) => last = error,
        }
    }
    Err(failed(last))
}

fn bind_one(address: SocketAddr) -> std::io::Result<(Inherited, std::net::TcpListener)> {
    let make = || Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP));
    let (inherited, socket) = Inherited::open(make)?;
    // A hub that was killed leaves connections in TIME_WAIT; its successor must not wait for them.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok((inherited, socket.into()))
}

/// The bound socket of a hub, shared by the task that accepts and by whoever looks after it.
pub(super) struct Port {
    address: SocketAddr,
    // Dropped in this order.
    _inherited: Inherited,
    listener: Option<TcpListener>,
    accepts: Option<Accepts>,
}

/// Connections are accepted for as long as this is there.
struct Accepts {
    shared: Arc<Shared>,
    _end: Sender<Infallible>,
}

impl Drop for Accepts {
    fn drop(&mut self) {
        self.shared.listening.store(false, Ordering::Relaxed);
    }
}

impl Port {
    /// Takes over what [`bind`] gave. On the hub's runtime.
    pub(super) fn new(listener: std::net::TcpListener, inherited: Inherited) -> std::io::Result<Self> {
        let address = listener.local_addr()?;
        Ok(Self { address, _inherited: inherited, listener: Some(TcpListener::from_std(listener)?), accepts: None })
    }

    /// Connections are accepted from now on; the channel ends when the socket is closed.
    pub(super) fn open(&mut self, shared: &Arc<Shared>) -> Receiver<Infallible> {
        let (end, ended) = channel();
        shared.listening.store(true, Ordering::Relaxed);
        self.accepts = Some(Accepts { shared: shared.clone(), _end: end });
        ended
    }

    pub(super) fn number(&self) -> u16 {
        self.address.port()
    }

    /// Whether the descriptor is still a socket that listens at the address: code that closes numbers which are not
    /// its own is a classic of large processes, and the accept loop would wait for ever without a word.
    pub(super) fn is_sound(&self) -> bool {
        let Some(listener) = &self.listener else { return false };
        let listens = SockRef::from(listener).is_listener().unwrap_or(false);
        listens && listener.local_addr().is_ok_and(|here| here == self.address)
    }
}

impl Drop for Port {
    fn drop(&mut self) {
        if !self.is_sound() {
            std::mem::forget(self.listener.take()); // the number may be somebody else's by now
        }
    }
}

/// Accepts until the hub stops, or the task is ended.
pub(super) async fn accept(shared: Arc<Shared>, port: Arc<Port>) {
    let Some(listener) = &port.listener else { return };
    let room = Arc::new(Semaphore::new(shared.config.max_sessions + SPARE_CONNECTIONS));
    let accepting = async {
        loop {
            let Ok(permit) = room.clone().acquire_owned().await else { return };
            match listener.accept().await {
                Ok((socket, from)) => {
                    drop(shared.spawn(serve(shared.clone(), socket, from.ip(), permit)));
                    // The others wait in the backlog: a flood of handshakes or requests is no more than so many.
                    let pause = shared.connection_accepted();
                    if !pause.is_zero() {
                        tokio::time::sleep(pause).await;
                    }
                }
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            }
        }
    };
    tokio::select! {
        () = shared.stopping() => {}
        () = accepting => {}
    }
}

/// Serves a connection, over TLS if the hub has a certificate.
async fn serve(shared: Arc<Shared>, socket: TcpStream, from: IpAddr, permit: OwnedSemaphorePermit) {
    // A frame is sent when it is flushed, not when the peer has acknowledged the one before. Where the option cannot
    // be set the connection still works.
    drop(socket.set_nodelay(true));
    match shared.tls.as_ref().map(Tls::acceptor) {
        None => speak(shared, socket, from).await,
        Some(acceptor) => {
            // Boxed: its state would be a part of every connection's memory, and of plain ones too.
            let secured = Box::pin(tokio::time::timeout(HEADER_TIMEOUT, acceptor.accept(socket))).await;
            // Errors of a handshake are the client's.
            if let Ok(Ok(stream)) = secured {
                Box::pin(speak(shared, stream, from)).await;
            }
        }
    }
    drop(permit);
}

/// Speaks HTTP on a connection. One that becomes a WebSocket lives on in a task of its own.
async fn speak<S>(shared: Arc<Shared>, stream: S, from: IpAddr)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let doomed = Arc::new(Notify::new());
    let answering = (shared.clone(), doomed.clone());
    let service = service_fn(move |request| {
        let (shared, doomed) = answering.clone();
        async move { Ok::<_, Infallible>(http::serve(shared, request, Some(from), doomed).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_headers(HEADERS)
        .max_buf_size(HEADER_BYTES)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    let mut connection = pin!(connection);
    let out_of_patience = async {
        doomed.notified().await;
        tokio::time::sleep(CLOSE_DEADLINE).await;
    };
    let serving = async {
        // Errors of a connection are its client's: nobody here waits for them.
        tokio::select! {
            ended = connection.as_mut() => drop(ended),
            () = shared.stopping() => {
                connection.as_mut().graceful_shutdown();
                drop(connection.await);
            }
        }
    };
    tokio::select! {
        () = serving => {}
        () = out_of_patience => {}
    }
}
