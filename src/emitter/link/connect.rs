//! How a link is made: TCP, TLS, the WebSocket handshake, and the greeting of our own hub.

use std::io;
use std::path::Path;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Empty;
use hyper::header::{AUTHORIZATION, CONNECTION, HOST, HeaderName, HeaderValue, UPGRADE};
use hyper::{Request, StatusCode, Version};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::client::generate_key;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};
use url::Url;

use super::peer::{Peer, PeerEvent, PeerLink};
use super::socket::Socket;
use super::{Io, Link, Target};
use crate::emitter::config::EmitterConfig;
use crate::emitter::item::Identity;
use crate::emitter::machine::{Confirm, Welcome};
use crate::error::{Error, ErrorKind, Result};
use crate::local::Dialer;
use crate::wire::EMITTER_SUBPROTOCOL;
use crate::wire::frame::{EmitterFrame, HubFrame};

/// Peers send us acks and Pongs only: a small buffer saves 124 KiB per link.
const READ_BUFFER: usize = 4 << 10;
/// Frames gather up to this before they are written: one write per event makes this thread ten times dearer.
const WRITE_BUFFER: usize = 128 << 10;
/// Longest message taken from a peer.
const MAX_INCOMING: usize = 1 << 20;
/// Unconfirmed events that a peer without credits may have: bytes bound it first.
const NO_CREDIT: u64 = u64::MAX;

/// A parsed WebSocket URL.
#[derive(Clone, Debug)]
pub struct Endpoint {
    host: String,
    port: u16,
    tls: bool,
    resource: String,
}

impl Endpoint {
    /// Reads `ws://host[:port]/path` or `wss://…`.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self> {
        let refuse = |why: &str| {
            // The text may hold a password: it is not repeated.
            Error::new(ErrorKind::Config, format!("ws_client: {why}: give a URL such as ws://127.0.0.1:8000/ws"))
        };
        if text.trim_start().split_once("://").is_some_and(|(_, rest)| rest.starts_with(['/', '\\'])) {
            return Err(refuse("there is no host in it")); // the parser would take the path's first segment for one
        }
        let url = Url::parse(text).map_err(|error| refuse("this is no URL").with_source(error))?;
        let tls = match url.scheme() {
            "ws" => false,
            "wss" => true,
            other => return Err(refuse(&format!("the scheme {other:?} is not ws or wss"))),
        };
        if !url.username().is_empty() || url.password().is_some() {
            return Err(refuse("credentials do not belong in a URL (use token= or headers=)"));
        }
        if url.fragment().is_some() {
            return Err(refuse("a WebSocket URL has no fragment (RFC 6455 §3)"));
        }
        let host = url.host_str().filter(|host| !host.is_empty()).ok_or_else(|| refuse("there is no host in it"))?;
        let resource = url.query().map_or_else(|| url.path().to_owned(), |query| format!("{}?{query}", url.path()));
        Ok(Self { host: host.to_owned(), port: url.port().unwrap_or(if tls { 443 } else { 80 }), tls, resource })
    }

    fn name(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }
}

/// Opens a link and exchanges greetings, all within `connect_timeout`.
///
/// # Errors
/// [`ErrorKind::ConnectRefused`] or [`ErrorKind::ConnectTimeout`], naming the address and the step that failed.
pub async fn connect(
    target: Target,
    config: &EmitterConfig,
    identity: Identity,
    next: u64,
    events: mpsc::UnboundedReceiver<PeerEvent>,
) -> Result<(Link, Welcome)> {
    let (name, opening): (_, Pin<Box<dyn Future<Output = _> + Send>>) = match &target {
        Target::Url(endpoint) => (endpoint.name(), Box::pin(open_url(endpoint, config, identity, next))),
        Target::Local(dialer) => ("the hub".to_owned(), Box::pin(open_local(dialer, config, identity, next))),
        Target::Peer(peer) => ("ws_client".to_owned(), Box::pin(open_peer(Arc::clone(peer), events))),
    };
    tokio::time::timeout(config.connect_timeout, opening).await.unwrap_or_else(|_| {
        let text = format!("{name} did not answer within {:?}", config.connect_timeout);
        Err(Error::new(ErrorKind::ConnectTimeout, text))
    })
}

async fn open_url(
    endpoint: &Endpoint,
    config: &EmitterConfig,
    identity: Identity,
    next: u64,
) -> Result<(Link, Welcome)> {
    let name = endpoint.name();
    let refused = |step: &str| format!("{name}: {step}");
    let host = endpoint.host.trim_matches(['[', ']']);
    let tcp = TcpStream::connect((host, endpoint.port))
        .await
        .map_err(|error| Error::new(ErrorKind::ConnectRefused, refused("cannot connect")).with_source(error))?;
    tune(&tcp, config.ack_timeout).map_err(|error| {
        Error::new(ErrorKind::ConnectRefused, refused("cannot set up the socket")).with_source(error)
    })?;
    let stream: Box<dyn Io> = if endpoint.tls {
        let tls = tokio_rustls::TlsConnector::from(Arc::new(tls_config(config.ssl_ca.as_deref())?));
        let server = ServerName::try_from(host.to_owned())
            .map_err(|error| Error::new(ErrorKind::Config, refused("no name for TLS")).with_source(error))?;
        let stream = tls.connect(server, tcp).await;
        Box::new(
            stream.map_err(|error| Error::new(ErrorKind::ConnectRefused, refused("TLS failed")).with_source(error))?,
        )
    } else {
        Box::new(tcp)
    };
    let (stream, read, subprotocol) = upgrade(stream, endpoint, config).await?;
    let socket = WebSocketStream::from_partially_read(stream, read.to_vec(), Role::Client, Some(limits(config))).await;
    if subprotocol {
        return greet(socket, &name, identity, next).await;
    }
    let stamp = config.stamp.then_some(identity);
    let welcome = Welcome { confirm: Confirm::Pings, have: 0, credit: NO_CREDIT };
    Ok((Link::Socket(Box::new(Socket::new(socket, Confirm::Pings, stamp))), welcome))
}

async fn open_local(dialer: &Dialer, config: &EmitterConfig, identity: Identity, next: u64) -> Result<(Link, Welcome)> {
    let pipe = dialer.dial();
    let pipe =
        pipe.map_err(|error| Error::new(ErrorKind::ConnectRefused, "the hub is not running").with_source(error))?;
    let stream: Box<dyn Io> = Box::new(pipe);
    let socket = WebSocketStream::from_raw_socket(stream, Role::Client, Some(limits(config))).await;
    greet(socket, "the hub", identity, next).await
}

async fn open_peer(peer: Arc<dyn Peer>, mut events: mpsc::UnboundedReceiver<PeerEvent>) -> Result<(Link, Welcome)> {
    peer.connect();
    loop {
        match events.recv().await {
            Some(PeerEvent::Up) => break,
            Some(PeerEvent::Sent(_) | PeerEvent::Failed { .. }) => {} // of an earlier link
            Some(PeerEvent::Down(why)) => return Err(Error::new(ErrorKind::ConnectRefused, why)),
            None => return Err(Error::new(ErrorKind::ConnectRefused, "the ws_client is gone")),
        }
    }
    let welcome = Welcome { confirm: Confirm::Sends, have: 0, credit: NO_CREDIT };
    Ok((Link::Peer(PeerLink::new(peer, events)), welcome))
}

fn limits(config: &EmitterConfig) -> WebSocketConfig {
    WebSocketConfig::default()
        .read_buffer_size(READ_BUFFER)
        .write_buffer_size(WRITE_BUFFER)
        // Never reached: the sink asks before each frame. Without it tungstenite would grow for ever.
        .max_write_buffer_size(2 * WRITE_BUFFER + config.max_event_bytes + (1 << 20))
        .max_message_size(Some(MAX_INCOMING))
        .max_frame_size(Some(MAX_INCOMING))
}

fn tune(tcp: &TcpStream, ack_timeout: Duration) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    #[cfg(target_os = "linux")]
    // A network that swallows packets: without this, writes seem to succeed for a quarter of an hour.
    socket2::SockRef::from(tcp).set_tcp_user_timeout(Some(ack_timeout))?;
    #[cfg(not(target_os = "linux"))]
    let _unused = ack_timeout;
    Ok(())
}

/// Reads `ssl_ca` if there is one, so that a wrong path is told at once and not by every attempt.
///
/// # Errors
/// [`ErrorKind::Config`].
pub fn check_tls(config: &EmitterConfig) -> Result<()> {
    config.ssl_ca.as_deref().map_or(Ok(()), |path| tls_config(Some(path)).map(drop))
}

fn tls_config(ca: Option<&Path>) -> Result<ClientConfig> {
    let mut roots = RootCertStore::empty();
    if let Some(path) = ca {
        let unusable = |error: Box<dyn std::error::Error + Send + Sync>| {
            let text = format!("ssl_ca={} is not allowed: give a PEM file of certificates, or None", path.display());
            Error::new(ErrorKind::Config, text).with_source(error)
        };
        for certificate in CertificateDer::pem_file_iter(path).map_err(|error| unusable(error.into()))? {
            roots.add(certificate.map_err(|error| unusable(error.into()))?).map_err(|error| unusable(error.into()))?;
        }
        if roots.is_empty() {
            return Err(unusable("there is no certificate in it".into()));
        }
    } else {
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let versions =
        versions.map_err(|error| Error::new(ErrorKind::Config, "TLS is not available").with_source(error))?;
    Ok(versions.with_root_certificates(roots).with_no_client_auth())
}

/// RFC 6455 §4. Ours, over hyper, because tungstenite refuses servers that do not choose a subprotocol, and those are
/// served too.
async fn upgrade(
    stream: Box<dyn Io>,
    endpoint: &Endpoint,
    config: &EmitterConfig,
) -> Result<(Box<dyn Io>, Bytes, bool)> {
    let name = endpoint.name();
    let refused = |why: String| Error::new(ErrorKind::ConnectRefused, format!("{name}: {why}"));
    let key = generate_key();
    let request = upgrade_request(endpoint, config, &key)
        .map_err(|error| Error::new(ErrorKind::Config, "headers or token cannot be sent").with_source(error))?;
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|error| refused("HTTP failed".to_owned()).with_source(error))?;
    let mut connection = pin!(connection.without_shutdown());
    let mut response = pin!(sender.send_request(request));
    let mut parts = None;
    let response = loop {
        tokio::select! {
            response = &mut response => break response,
            ended = &mut connection, if parts.is_none() => parts = Some(ended),
        }
    };
    let response =
        response.map_err(|error| refused("does not answer as a WebSocket server".to_owned()).with_source(error))?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Err(refused(format!("answers HTTP {} instead of a WebSocket", response.status())));
    }
    let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok());
    if header("sec-websocket-accept") != Some(&derive_accept_key(key.as_bytes())) {
        return Err(refused(
            "answers with a wrong Sec-WebSocket-Accept: no WebSocket server, or a broken proxy".into(),
        ));
    }
    if let Some(extensions) = header("sec-websocket-extensions") {
        return Err(refused(format!("insists on the extension {extensions:?}, which was not offered")));
    }
    let subprotocol = match header("sec-websocket-protocol") {
        None => false,
        Some(EMITTER_SUBPROTOCOL) => true,
        Some(other) => return Err(refused(format!("chose the subprotocol {other:?}, which was not offered"))),
    };
    let parts = match parts {
        Some(parts) => parts,
        None => connection.await,
    };
    let parts = parts.map_err(|error| refused("HTTP failed".to_owned()).with_source(error))?;
    Ok((parts.io.into_inner(), parts.read_buf, subprotocol))
}

fn upgrade_request(
    endpoint: &Endpoint,
    config: &EmitterConfig,
    key: &str,
) -> std::result::Result<Request<Empty<Bytes>>, hyper::http::Error> {
    let mut request = Request::get(endpoint.resource.as_str())
        .version(Version::HTTP_11)
        .header(HOST, endpoint.name())
        .header(CONNECTION, "Upgrade")
        .header(UPGRADE, "websocket")
        .header("sec-websocket-version", "13")
        .header("sec-websocket-key", key)
        .header("sec-websocket-protocol", EMITTER_SUBPROTOCOL);
    if let Some(token) = &config.token {
        let mut value = HeaderValue::try_from(format!("Bearer {token}"))?;
        value.set_sensitive(true);
        request = request.header(AUTHORIZATION, value);
    }
    for (name, value) in &config.headers {
        request = request.header(HeaderName::try_from(name)?, HeaderValue::try_from(value)?);
    }
    request.body(Empty::new())
}

/// `hello` and `welcome`.
async fn greet(
    mut socket: WebSocketStream<Box<dyn Io>>,
    name: &str,
    identity: Identity,
    next: u64,
) -> Result<(Link, Welcome)> {
    use futures_util::{SinkExt, StreamExt};
    let broken = |error| Error::new(ErrorKind::ConnectRefused, format!("{name}: closed at once")).with_source(error);
    let hello = EmitterFrame::Hello { emitter: identity.emitter, epoch: identity.epoch, next };
    socket.send(Message::text(hello.encode())).await.map_err(broken)?;
    while let Some(message) = socket.next().await {
        let Message::Text(text) = message.map_err(broken)? else { continue };
        match HubFrame::decode(&text) {
            Ok(HubFrame::Welcome { have, credit }) => {
                let welcome = Welcome { confirm: Confirm::Acks, have, credit: credit.max(1) };
                return Ok((Link::Socket(Box::new(Socket::new(socket, Confirm::Acks, None))), welcome));
            }
            Ok(HubFrame::Error { code, message }) => {
                return Err(Error::new(ErrorKind::ConnectRefused, format!("{name}: refused with {code}: {message}")));
            }
            Ok(_) => {}
            Err(error) => {
                let text = format!("{name}: answers hello with something else than {EMITTER_SUBPROTOCOL}");
                return Err(Error::new(ErrorKind::Protocol, text).with_source(error));
            }
        }
    }
    Err(Error::new(ErrorKind::ConnectRefused, format!("{name}: closed before its welcome")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read_and_bad_ones_named() {
        let endpoint = Endpoint::parse("wss://example.org/ws?x=1").expect("valid");
        assert_eq!(
            (endpoint.name().as_str(), endpoint.tls, endpoint.resource.as_str()),
            ("example.org:443", true, "/ws?x=1")
        );
        for bad in
            ["", "localhost:8000", "http://x/", "ws://", "ws:///path", "ws://u:p@x/", "ws://x/#a", "ws://x:99999/"]
        {
            let error = Endpoint::parse(bad).expect_err(bad);
            assert_eq!(error.kind(), ErrorKind::Config, "{bad}");
            assert!(!error.report().contains("u:p"), "{bad}");
        }
    }
}
