//! Who may ask: the origin of a page, and the token of whoever asks.

use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Response, StatusCode};

use super::{Answer, text};
use crate::hub::auth::{Denied, Grant, Offered};
use crate::hub::shared::Shared;
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

pub(super) async fn check(shared: &Shared, token: Secret) -> Result<Grant, Answer> {
    shared.auth.check(token).await.map_err(|denied| match denied {
        Denied::Unavailable(why) => busy(StatusCode::SERVICE_UNAVAILABLE, why),
        Denied::Expired | Denied::Invalid(_) => unauthorized(shared, &denied.to_string()),
    })
}

pub(super) fn malformed(shared: &Shared) -> Answer {
    unauthorized(shared, "Authorization is not one bearer token")
}

fn unauthorized(shared: &Shared, why: &str) -> Answer {
    shared.with(|state, _| state.counters.auth_refused += 1);
    let mut answer = text(StatusCode::UNAUTHORIZED, why);
    answer.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
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
