//! The handshake of a WebSocket (RFC 6455 §4.2).

use std::net::IpAddr;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{Either, Full};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_rustls::server::TlsStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::{Answer, RequestBody, guard, text};
use crate::hub::driver;
use crate::hub::limits::TooMany;
use crate::hub::registry::Role;
use crate::hub::shared::{Refused, Seat, Shared};
use crate::wire::{EMITTER_SUBPROTOCOL, SUBSCRIBER_SUBPROTOCOL};

/// Turns the connection into a WebSocket session (RFC 6455 §4.2).
pub(super) async fn upgrade(
    shared: &Arc<Shared>,
    role: Role,
    protocol: Option<&'static str>,
    request: Request<impl RequestBody>,
    from: Option<IpAddr>,
) -> Result<Answer, Answer> {
    let headers = request.headers();
    let is_upgrade =
        has_token(headers, header::CONNECTION, "upgrade") && has_token(headers, header::UPGRADE, "websocket");
    let version = headers.get(header::SEC_WEBSOCKET_VERSION);
    if !is_upgrade || version.is_none_or(|version| version != "13") {
        let mut answer = text(StatusCode::UPGRADE_REQUIRED, "this is a WebSocket endpoint, version 13");
        let named = [(header::UPGRADE, "websocket"), (header::SEC_WEBSOCKET_VERSION, "13")];
        answer.headers_mut().extend(named.map(|(name, value)| (name, HeaderValue::from_static(value))));
        return Ok(answer);
    }
    let Some(key) = headers.get(header::SEC_WEBSOCKET_KEY).filter(|key| key.len() == 24) else {
        return Ok(text(StatusCode::BAD_REQUEST, "Sec-WebSocket-Key is missing or not 16 bytes in base 64"));
    };
    let accept = derive_accept_key(key.as_bytes());
    let admission = guard::shake_hands(shared, role, headers).await?;
    let seat = shared.open(role, admission, from).map_err(full)?;
    shared.spawn(switch(seat, request));
    let mut answer = Response::new(Either::Left(Full::default()));
    *answer.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let headers = answer.headers_mut();
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    if let Ok(accept) = HeaderValue::from_str(&accept) {
        headers.insert(header::SEC_WEBSOCKET_ACCEPT, accept);
    }
    if let Some(protocol) = protocol {
        headers.insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
    }
    Ok(answer)
}

/// No session can be had.
pub(super) fn full(refused: Refused) -> Answer {
    let (status, why) = match refused {
        Refused::Full => (StatusCode::SERVICE_UNAVAILABLE, "max_sessions is reached"),
        Refused::Stopping => (StatusCode::SERVICE_UNAVAILABLE, "the hub stops"),
        Refused::TooMany(TooMany::Rate) => (StatusCode::SERVICE_UNAVAILABLE, "connect_rate is reached"),
        Refused::TooMany(TooMany::FromAddress) => {
            (StatusCode::TOO_MANY_REQUESTS, "max_sessions_per_address is reached")
        }
    };
    guard::busy(status, why)
}

/// Which of the offered subprotocols is spoken; none offered, beside a token, is a subscriber.
pub(in crate::hub) fn negotiate(headers: &HeaderMap) -> Option<(Role, Option<&'static str>)> {
    if !offered(headers, header::SEC_WEBSOCKET_PROTOCOL).any(|name| !name.starts_with("bearer.")) {
        return Some((Role::Subscriber, None));
    }
    let known = [(Role::Emitter, EMITTER_SUBPROTOCOL), (Role::Subscriber, SUBSCRIBER_SUBPROTOCOL)];
    known
        .into_iter()
        .find(|(_, name)| has_token(headers, header::SEC_WEBSOCKET_PROTOCOL, name))
        .map(|(role, name)| (role, Some(name)))
}

/// The same for clients of Centrifugo's protocol.
///
/// # Errors
/// Why none can be spoken.
pub(in crate::hub) fn negotiate_centrifugo(
    headers: &HeaderMap,
    query: Option<&str>,
) -> Result<Option<&'static str>, &'static str> {
    const JSON: &str = "centrifuge-json";
    let mut asked = url::form_urlencoded::parse(query.unwrap_or_default().as_bytes());
    let binary = asked.any(|(name, value)| matches!(&*name, "format" | "cf_protocol") && value == "protobuf");
    if binary || has_token(headers, header::SEC_WEBSOCKET_PROTOCOL, "centrifuge-protobuf") {
        return Err("Protobuf is not spoken here; use the client's JSON");
    }
    Ok(has_token(headers, header::SEC_WEBSOCKET_PROTOCOL, JSON).then_some(JSON))
}

fn has_token(headers: &HeaderMap, name: HeaderName, token: &str) -> bool {
    offered(headers, name).any(|part| part.eq_ignore_ascii_case(token))
}

/// The parts of a header that is a list.
fn offered(headers: &HeaderMap, name: HeaderName) -> impl Iterator<Item = &str> {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).map(str::trim)
}

/// Runs the session once the answer is sent and the socket is free.
async fn switch(seat: Seat, request: Request<impl RequestBody>) {
    // An error means that the client was gone before the answer.
    let Ok(upgraded) = hyper::upgrade::on(request).await else { return };
    // The socket itself, without the box around it: every read and write of the session goes through here.
    match upgraded.downcast::<TokioIo<TcpStream>>() {
        Ok(parts) => {
            let read_ahead = owned(parts.read_buf);
            driver::run(seat, parts.io.into_inner(), read_ahead).await;
        }
        Err(upgraded) => {
            if let Ok(parts) = upgraded.downcast::<TokioIo<TlsStream<TcpStream>>>() {
                let read_ahead = owned(parts.read_buf);
                // Boxed: it would be a part of every plain session's memory too.
                Box::pin(driver::run(seat, parts.io.into_inner(), read_ahead)).await;
            }
        }
    }
}

/// A copy: hyper's buffer would be kept for as long as the session.
#[expect(clippy::needless_pass_by_value, reason = "it is dropped here")]
fn owned(buffer: Bytes) -> Bytes {
    Bytes::copy_from_slice(&buffer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_subprotocol_says_who_comes() {
        let headers = |value| HeaderMap::from_iter([(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(value))]);
        let offered = |value| negotiate(&headers(value));
        assert_eq!(negotiate(&HeaderMap::new()), Some((Role::Subscriber, None)));
        assert_eq!(offered("sb.v1.json"), Some((Role::Subscriber, Some("sb.v1.json"))));
        assert_eq!(offered("bearer.x, sb.v1.json"), Some((Role::Subscriber, Some("sb.v1.json"))));
        assert_eq!(offered("bearer.x"), Some((Role::Subscriber, None)));
        assert_eq!(offered("x, sb.emit.v1"), Some((Role::Emitter, Some("sb.emit.v1"))));
        assert_eq!(offered("chat"), None);
    }

    #[test]
    fn of_centrifugos_protocols_only_json_is_spoken() {
        let headers = |value| HeaderMap::from_iter([(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(value))]);
        assert_eq!(negotiate_centrifugo(&HeaderMap::new(), Some("a=b")), Ok(None));
        assert_eq!(negotiate_centrifugo(&headers("centrifuge-json"), None), Ok(Some("centrifuge-json")));
        assert!(negotiate_centrifugo(&headers("centrifuge-protobuf"), None).is_err());
        for query in ["format=protobuf", "x=1&cf_protocol=protobuf"] {
            assert!(negotiate_centrifugo(&HeaderMap::new(), Some(query)).is_err(), "{query}");
        }
    }
}
