//! The routes of the port. Every answer that is not a WebSocket is small and comes from memory.

mod events;
mod guard;
mod metrics;
mod publish;
mod upgrade;

use std::error::Error;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use http_body_util::{Either, Full};
use hyper::body::Body;
use hyper::header::{self, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};

use tokio::sync::Notify;

pub(super) use guard::{admission, origin_is_allowed};
pub(super) use upgrade::{negotiate, negotiate_centrifugo};

use super::auth::credential_in_query;
use super::bridge::BusDown;
use super::ops::Keeper;
use super::registry::Role;
use super::shared::Shared;
use super::stats::HubStats;

/// Where clients of Centrifugo's protocol connect, as they do there.
pub(super) const CENTRIFUGO: &str = "/connection/websocket";

pub(super) type Answer = Response<Either<Full<Bytes>, events::Stream>>;

/// A request's body, read by us or by the server of another door.
pub(super) trait RequestBody:
    Body<Data: Send, Error: Into<Box<dyn Error + Send + Sync>>> + Send + 'static
{
}

impl<B: Body<Data: Send, Error: Into<Box<dyn Error + Send + Sync>>> + Send + 'static> RequestBody for B {}

/// Answers one request. `from` is known of a socket of ours, whose connection is given up some time after `doomed`.
pub(super) async fn serve(
    shared: Arc<Shared>,
    request: Request<impl RequestBody>,
    from: Option<IpAddr>,
    doomed: Arc<Notify>,
) -> Answer {
    if !guard::origin_is_allowed(request.headers(), &shared.config.allowed_origins) {
        return text(StatusCode::FORBIDDEN, "this origin is not among allowed_origins");
    }
    if let Some(name) = credential_in_query(request.uri().query()) {
        let remedy = "addresses are logged everywhere; use Authorization: Bearer, the subprotocol bearer.<token>, or \
                      the first frame, and replace this token";
        return text(StatusCode::BAD_REQUEST, format!("'{name}' does not belong in an address: {remedy}"));
    }
    let origin = request.headers().get(header::ORIGIN).cloned();
    let shareable = matches!(request.uri().path(), "/events" | "/publish");
    let mut answer = route(&shared, request, from, doomed).await.unwrap_or_else(|refusal| refusal);
    if let Some(origin) = origin.filter(|_| shareable) {
        guard::share(answer.headers_mut(), origin);
    }
    answer
}

async fn route(
    shared: &Arc<Shared>,
    request: Request<impl RequestBody>,
    from: Option<IpAddr>,
    doomed: Arc<Notify>,
) -> Result<Answer, Answer> {
    Ok(match (request.method(), request.uri().path()) {
        (&Method::GET, "/ws") => match upgrade::negotiate(request.headers()) {
            Some((role, protocol)) => upgrade::upgrade(shared, role, protocol, request, from).await?,
            None => text(
                StatusCode::BAD_REQUEST,
                "none of these subprotocols is spoken here; sb.v1.json and sb.emit.v1 are",
            ),
        },
        (&Method::GET, CENTRIFUGO) => match upgrade::negotiate_centrifugo(request.headers(), request.uri().query()) {
            Ok(protocol) => upgrade::upgrade(shared, Role::Centrifugo, protocol, request, from).await?,
            Err(why) => text(StatusCode::BAD_REQUEST, why),
        },
        (&Method::GET, "/publish") => upgrade::upgrade(shared, Role::Publisher, None, request, from).await?,
        (&Method::GET, "/events") => events::open(shared, &request, from, doomed).await?,
        (&Method::OPTIONS, "/events" | "/publish") => guard::preflight(),
        (&Method::POST, "/publish") => publish::publish(shared, request).await?,
        (&Method::GET | &Method::HEAD, "/") => {
            typed(StatusCode::OK, "text/html; charset=utf-8", shared.config.page.clone())
        }
        (&Method::GET | &Method::HEAD, "/healthz") => {
            health((!shared.listening.load(Ordering::Relaxed)).then_some("stopping"))
        }
        (&Method::GET | &Method::HEAD, "/readyz") => health(unready(shared)),
        (&Method::GET | &Method::HEAD, "/stats") => {
            guard::admit(shared, request.headers()).await?;
            json(StatusCode::OK, &HubStats::read(shared))
        }
        (&Method::GET | &Method::HEAD, "/metrics") => {
            guard::admit(shared, request.headers()).await?;
            typed(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", metrics::page(shared))
        }
        (_, "/events" | "/metrics" | "/ws" | CENTRIFUGO | "/healthz" | "/readyz" | "/stats" | "/") => {
            not_allowed("GET")
        }
        (_, "/publish") => not_allowed("GET, POST"),
        _ => text(StatusCode::NOT_FOUND, "not found"),
    })
}

/// Why clients had better go to another hub, if they had.
fn unready(shared: &Shared) -> Option<&'static str> {
    let waits = || shared.config.bridge.as_ref().is_some_and(|bridge| bridge.bus_down == BusDown::Wait);
    let away = || shared.keeper.as_ref().and_then(Keeper::bus).is_some_and(|bridge| bridge.status.read().degraded);
    let cut_off = || waits() && away();
    if shared.is_stopping() { Some("stopping") } else { cut_off().then_some("the bus between the hubs is away") }
}

fn health(trouble: Option<&'static str>) -> Answer {
    match trouble {
        None => text(StatusCode::OK, "ok"),
        Some(trouble) => text(StatusCode::SERVICE_UNAVAILABLE, trouble),
    }
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
    let mut answer = Response::new(Either::Left(Full::new(body.into())));
    *answer.status_mut() = status;
    let headers = [
        (header::CONTENT_TYPE, content_type),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    answer.headers_mut().extend(headers.map(|(name, value)| (name, HeaderValue::from_static(value))));
    answer
}
