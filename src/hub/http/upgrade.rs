//! The handshake of a WebSocket (RFC 6455 §4.2).

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::{Answer, RequestBody, guard, text};
use crate::hub::auth::{Grant, Offered};
use crate::hub::driver;
use crate::hub::registry::Role;
use crate::hub::shared::{Admission, Refused, Seat, Shared};
use crate::wire::{EMITTER_SUBPROTOCOL, SUBSCRIBER_SUBPROTOCOL};

/// Turns the connection into a WebSocket session (RFC 6455 §4.2).
pub(super) async fn upgrade(
    shared: &Arc<Shared>,
    role: Role,
    protocol: Option<&'static str>,
    request: Request<impl RequestBody>,
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
    let admission = admission(shared, role, headers).await?;
    let seat = shared.open(role, admission).map_err(full)?;
    shared.spawn(switch(seat, request));
    let mut answer = Response::new(Full::default());
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

/// What is known of a client at the handshake. A subscriber may show its token later; what a browser shows is
/// refused in a frame, because a page does not see the answer to a handshake.
async fn admission(shared: &Shared, role: Role, headers: &HeaderMap) -> Result<Admission, Answer> {
    if !shared.auth.is_on() {
        return Ok(Admission::Granted(Grant::everything()));
    }
    match Offered::read(headers) {
        Offered::Nothing if role == Role::Subscriber => Ok(Admission::Awaited),
        Offered::Subprotocol(token) if role == Role::Subscriber => Ok(Admission::Token(token)),
        _ => guard::admit(shared, headers).await.map(Admission::Granted),
    }
}

/// No session can be had.
pub(super) fn full(refused: Refused) -> Answer {
    let why = match refused {
        Refused::Full => "max_sessions is reached",
        Refused::Stopping => "the hub stops",
    };
    guard::busy(StatusCode::SERVICE_UNAVAILABLE, why)
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
    if let Ok(parts) = upgraded.downcast::<TokioIo<TcpStream>>() {
        // A copy: hyper's buffer would be kept for as long as the session.
        let read_ahead = Bytes::copy_from_slice(&parts.read_buf);
        drop(parts.read_buf);
        driver::run(seat, parts.io.into_inner(), read_ahead).await;
    }
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
}
