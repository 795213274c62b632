//! The routes of the port. Every answer that is not a WebSocket is small and comes from memory.

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::body::Body;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use super::driver;
use super::registry::Role;
use super::shared::{Refused, Seat, Shared};
use super::stats::HubStats;
use crate::wire::{EMITTER_SUBPROTOCOL, SUBSCRIBER_SUBPROTOCOL};

type Answer = Response<Full<Bytes>>;

/// How long the body of a request may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

/// A request's body, read by us or by the server of another door.
pub(super) trait RequestBody:
    Body<Data: Send, Error: Into<Box<dyn Error + Send + Sync>>> + Send + 'static
{
}

impl<B: Body<Data: Send, Error: Into<Box<dyn Error + Send + Sync>>> + Send + 'static> RequestBody for B {}

/// Answers one request.
pub(super) async fn serve(shared: Arc<Shared>, request: Request<impl RequestBody>) -> Answer {
    if !origin_is_allowed(request.headers(), &shared.config.allowed_origins) {
        return text(StatusCode::FORBIDDEN, "this origin is not among allowed_origins");
    }
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/ws") => match negotiate(request.headers()) {
            Some((role, protocol)) => upgrade(&shared, role, protocol, request),
            None => text(
                StatusCode::BAD_REQUEST,
                "none of these subprotocols is spoken here; sb.v1.json and sb.emit.v1 are",
            ),
        },
        (&Method::GET, "/publish") => upgrade(&shared, Role::Publisher, None, request),
        (&Method::POST, "/publish") => publish(&shared, request).await,
        (&Method::GET | &Method::HEAD, "/") => {
            typed(StatusCode::OK, "text/html; charset=utf-8", shared.config.page.clone())
        }
        (&Method::GET | &Method::HEAD, "/healthz") => health(shared.listening.load(Ordering::Relaxed)),
        (&Method::GET | &Method::HEAD, "/readyz") => health(!shared.is_stopping()),
        (&Method::GET | &Method::HEAD, "/stats") => json(StatusCode::OK, &HubStats::read(&shared)),
        (_, "/ws" | "/healthz" | "/readyz" | "/stats" | "/") => not_allowed("GET"),
        (_, "/publish") => not_allowed("GET, POST"),
        _ => text(StatusCode::NOT_FOUND, "not found"),
    }
}

/// A browser names the page's origin; other clients name none. A page may connect if it was served from here, or is
/// allowed by name.
pub(super) fn origin_is_allowed(headers: &HeaderMap, allowed: &[String]) -> bool {
    let Some(origin) = headers.get(header::ORIGIN) else { return true };
    let Ok(origin) = origin.to_str() else { return false };
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    // The scheme is not compared: behind a proxy that ends TLS it differs.
    let authority = origin.split_once("://").map(|(_, authority)| authority);
    let same = matches!((authority, host), (Some(from), Some(here)) if from.eq_ignore_ascii_case(here));
    same || allowed.iter().any(|allowed| allowed == "*" || allowed.eq_ignore_ascii_case(origin))
}

/// Turns the connection into a WebSocket session (RFC 6455 §4.2).
fn upgrade(
    shared: &Arc<Shared>,
    role: Role,
    protocol: Option<&'static str>,
    request: Request<impl RequestBody>,
) -> Answer {
    let headers = request.headers();
    let is_upgrade =
        has_token(headers, header::CONNECTION, "upgrade") && has_token(headers, header::UPGRADE, "websocket");
    let version = headers.get(header::SEC_WEBSOCKET_VERSION);
    if !is_upgrade || version.is_none_or(|version| version != "13") {
        let mut answer = text(StatusCode::UPGRADE_REQUIRED, "this is a WebSocket endpoint, version 13");
        let named = [(header::UPGRADE, "websocket"), (header::SEC_WEBSOCKET_VERSION, "13")];
        answer.headers_mut().extend(named.map(|(name, value)| (name, HeaderValue::from_static(value))));
        return answer;
    }
    let Some(key) = headers.get(header::SEC_WEBSOCKET_KEY).filter(|key| key.len() == 24) else {
        return text(StatusCode::BAD_REQUEST, "Sec-WebSocket-Key is missing or not 16 bytes in base 64");
    };
    let accept = derive_accept_key(key.as_bytes());
    let seat = match shared.open(role) {
        Ok(seat) => seat,
        Err(Refused::Full) => return text(StatusCode::SERVICE_UNAVAILABLE, "max_sessions is reached"),
        Err(Refused::Stopping) => return text(StatusCode::SERVICE_UNAVAILABLE, "the hub stops"),
    };
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
    answer
}

/// Which of the offered subprotocols is spoken; none offered is a subscriber.
pub(super) fn negotiate(headers: &HeaderMap) -> Option<(Role, Option<&'static str>)> {
    if !headers.contains_key(header::SEC_WEBSOCKET_PROTOCOL) {
        return Some((Role::Subscriber, None));
    }
    let known = [(Role::Emitter, EMITTER_SUBPROTOCOL), (Role::Subscriber, SUBSCRIBER_SUBPROTOCOL)];
    known
        .into_iter()
        .find(|(_, name)| has_token(headers, header::SEC_WEBSOCKET_PROTOCOL, name))
        .map(|(role, name)| (role, Some(name)))
}

fn has_token(headers: &HeaderMap, name: HeaderName, token: &str) -> bool {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|part| part.trim().eq_ignore_ascii_case(token))
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

async fn publish(shared: &Arc<Shared>, request: Request<impl RequestBody>) -> Answer {
    #[derive(serde::Serialize)]
    struct Accepted {
        offset: u64,
    }
    let body = Limited::new(request.into_body(), shared.config.max_message_bytes).collect();
    let body = match tokio::time::timeout(BODY_TIMEOUT, body).await {
        // A copy: the log must not keep the whole input buffer of the connection for one small event.
        Ok(Ok(body)) => Bytes::copy_from_slice(&body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            return text(StatusCode::PAYLOAD_TOO_LARGE, "the event is larger than max_message_bytes");
        }
        Ok(Err(_)) => return text(StatusCode::BAD_REQUEST, "the body broke off"),
        Err(_) => return text(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time"),
    };
    let (reply, published) = tokio::sync::oneshot::channel();
    // An error means that nobody waits for the answer any more.
    super::publish(shared, body, move |result| drop(reply.send(result)));
    match published.await.unwrap_or_else(|_| Err(super::stopped())) {
        Ok(published) => json(StatusCode::OK, &Accepted { offset: published.offset }),
        Err(error) if error.is_poison() => text(StatusCode::BAD_REQUEST, error.report()),
        Err(error) => text(StatusCode::SERVICE_UNAVAILABLE, error.report()),
    }
}

fn health(good: bool) -> Answer {
    if good { text(StatusCode::OK, "ok") } else { text(StatusCode::SERVICE_UNAVAILABLE, "stopping") }
}

fn not_allowed(method: &'static str) -> Answer {
    let mut answer = text(StatusCode::METHOD_NOT_ALLOWED, format!("use {method}"));
    answer.headers_mut().insert(header::ALLOW, HeaderValue::from_static(method));
    answer
}

fn json(status: StatusCode, value: &impl serde::Serialize) -> Answer {
    // Strings and numbers only: cannot fail.
    typed(status, "application/json", serde_json::to_vec(value).unwrap_or_default())
}

fn text(status: StatusCode, text: impl Into<String>) -> Answer {
    let mut text = text.into();
    text.push('\n');
    typed(status, "text/plain; charset=utf-8", text)
}

fn typed(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Answer {
    let mut answer = Response::new(Full::new(body.into()));
    *answer.status_mut() = status;
    let headers = [
        (header::CONTENT_TYPE, content_type),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    answer.headers_mut().extend(headers.map(|(name, value)| (name, HeaderValue::from_static(value))));
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(HeaderName, &'static str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn pages_of_other_sites_are_refused() {
        let allowed = ["https://dash.example".to_owned()];
        let check = |origin, allowed: &[String]| {
            let headers = headers(&[(header::HOST, "here:8000"), (header::ORIGIN, origin)]);
            origin_is_allowed(&headers, allowed)
        };
        assert!(origin_is_allowed(&HeaderMap::new(), &[]));
        assert!(check("http://here:8000", &[]) && check("https://HERE:8000", &[]));
        assert!(check("https://dash.example", &allowed) && !check("http://dash.example", &allowed));
        assert!(!check("http://here:9000", &[]) && !check("null", &[]) && !check("http://here:8000.evil", &[]));
        assert!(check("null", &["*".to_owned()]));
    }

    #[test]
    fn the_subprotocol_says_who_comes() {
        let offered = |value| negotiate(&headers(&[(header::SEC_WEBSOCKET_PROTOCOL, value)]));
        assert_eq!(negotiate(&HeaderMap::new()), Some((Role::Subscriber, None)));
        assert_eq!(offered("sb.v1.json"), Some((Role::Subscriber, Some("sb.v1.json"))));
        assert_eq!(offered("x, sb.emit.v1"), Some((Role::Emitter, Some("sb.emit.v1"))));
        assert_eq!(offered("chat"), None);
    }
}
