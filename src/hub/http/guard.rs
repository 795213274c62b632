//! Who may ask: the origin of a page, and the token of whoever asks.

use http_body_util::{Either, Full};
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Response, StatusCode};

use super::{Answer, text};
use crate::hub::auth::{Denied, Grant, Offered};
use crate::hub::registry::Role;
use crate::hub::shared::{Admission, Shared};
use crate::secret::Secret;

/// Seconds after which one who cannot be served now may try again.
const RETRY_AFTER: HeaderValue = HeaderValue::from_static("1");

/// A browser names the page's origin; other clients name none. A page may connect if it was served from here, or is
/// allowed by name.
pub(in crate::hub) fn origin_is_allowed(headers: &HeaderMap, allowed: &[String]) -> bool {
    let Some(origin) = headers.get(header::ORIGIN) else { return true };
    let Ok(origin) = origin.to_str() else { return false };
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    // The scheme is not compared: behind a proxy that ends TLS it differs.
    let authority = origin.split_once("://").map(|(_, authority)| authority);
    let same = matches!((authority, host), (Some(from), Some(here)) if from.eq_ignore_ascii_case(here));
    same || allowed.iter().any(|allowed| allowed == "*" || allowed.eq_ignore_ascii_case(origin))
}

/// What the token of a request grants; the answer to give instead if it is not good.
pub(super) async fn admit(shared: &Shared, headers: &HeaderMap) -> Result<Grant, Answer> {
    if !shared.auth.is_on() {
        return Ok(Grant::everything());
    }
    match Offered::read(headers) {
        Offered::Header(token) | Offered::Subprotocol(token) => check(shared, token).await,
        Offered::Nothing => Err(unauthorized(shared, "show a token: Authorization: Bearer …")),
        Offered::Malformed => Err(malformed(shared)),
    }
}

async fn check(shared: &Shared, token: Secret) -> Result<Grant, Answer> {
    shared.auth.check(token).await.map_err(|denied| match denied {
        Denied::Unavailable(why) => busy(StatusCode::SERVICE_UNAVAILABLE, why),
        Denied::Expired | Denied::Invalid(_) => unauthorized(shared, &denied.to_string()),
    })
}

fn malformed(shared: &Shared) -> Answer {
    unauthorized(shared, "Authorization is not one bearer token")
}

fn unauthorized(shared: &Shared, why: &str) -> Answer {
    shared.with(|state, _| state.counters.auth_refused += 1);
    let mut answer = text(StatusCode::UNAUTHORIZED, why);
    answer.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    answer
}

/// What is known of a client by its handshake; `None` if it may not come without a token. A token is checked as if the
/// first frame had brought it.
pub(in crate::hub) fn admission(shared: &Shared, role: Role, headers: &HeaderMap) -> Option<Admission> {
    if !shared.auth.is_on() {
        return Some(Admission::Granted(Grant::everything()));
    }
    match Offered::read(headers) {
        Offered::Nothing if role.subscribes() => Some(Admission::Awaited),
        Offered::Nothing | Offered::Malformed => None,
        Offered::Header(token) | Offered::Subprotocol(token) => Some(Admission::Token(token)),
    }
}

/// The same on a port of ours, where a token is checked before the answer. What a browser shows to subscribe is
/// refused in a frame all the same, because a page does not see the answer to a handshake.
pub(super) async fn shake_hands(shared: &Shared, role: Role, headers: &HeaderMap) -> Result<Admission, Answer> {
    match admission(shared, role, headers) {
        Some(Admission::Token(token)) if role.subscribes() && !headers.contains_key(header::AUTHORIZATION) => {
            Ok(Admission::Token(token))
        }
        Some(Admission::Token(token)) => check(shared, token).await.map(Admission::Granted),
        Some(admission) => Ok(admission),
        None => admit(shared, headers).await.map(Admission::Granted),
    }
}

/// Lets the page of an allowed origin read the answer.
pub(super) fn share(headers: &mut HeaderMap, origin: HeaderValue) {
    headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
    headers.append(header::VARY, HeaderValue::from_static("Origin"));
}

/// What a browser asks before a request that a plain form could not make. No cookies are used here, so no credentials
/// are allowed.
pub(super) fn preflight() -> Answer {
    let mut answer = text(StatusCode::NO_CONTENT, "");
    *answer.body_mut() = Either::Left(Full::default());
    let headers = [
        (header::ACCESS_CONTROL_ALLOW_METHODS, "GET, POST"),
        (header::ACCESS_CONTROL_ALLOW_HEADERS, "authorization, content-type, content-encoding, last-event-id"),
        (header::ACCESS_CONTROL_MAX_AGE, "600"),
    ];
    answer.headers_mut().extend(headers.map(|(name, value)| (name, HeaderValue::from_static(value))));
    answer
}

/// Not now, but soon.
pub(super) fn busy(status: StatusCode, why: &str) -> Answer {
    let mut answer: Response<_> = text(status, why);
    answer.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER);
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_other_sites_are_refused() {
        let allowed = ["https://dash.example".to_owned()];
        let check = |origin, allowed: &[String]| {
            let named = [(header::HOST, "here:8000"), (header::ORIGIN, origin)];
            let headers = named.map(|(name, value)| (name, HeaderValue::from_static(value)));
            origin_is_allowed(&headers.into_iter().collect(), allowed)
        };
        assert!(origin_is_allowed(&HeaderMap::new(), &[]));
        assert!(check("http://here:8000", &[]) && check("https://HERE:8000", &[]));
        assert!(check("https://dash.example", &allowed) && !check("http://dash.example", &allowed));
        assert!(!check("http://here:9000", &[]) && !check("null", &[]) && !check("http://here:8000.evil", &[]));
        assert!(check("null", &["*".to_owned()]));
    }
}
