//! Where a request carries its token: `Authorization: Bearer …`, or for browsers, which cannot set headers of a
//! WebSocket, a subprotocol `bearer.…`. Never the address: it ends up in logs, histories and referrers.

use hyper::header::{AUTHORIZATION, HeaderMap, SEC_WEBSOCKET_PROTOCOL};

use crate::secret::Secret;

const SUBPROTOCOL: &str = "bearer.";

/// What a request shows.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Offered {
    /// No token.
    Nothing,
    /// By the header.
    Header(Secret),
    /// By a subprotocol.
    Subprotocol(Secret),
    /// An `Authorization` that is no single bearer token.
    Malformed,
}

impl Offered {
    pub(crate) fn read(headers: &HeaderMap) -> Self {
        let mut values = headers.get_all(AUTHORIZATION).iter();
        if let Some(value) = values.next() {
            let credentials = value.to_str().ok().and_then(|text| text.split_once(' '));
            return match credentials {
                Some((scheme, token))
                    if scheme.eq_ignore_ascii_case("bearer") && !token.trim().is_empty() && values.next().is_none() =>
                {
                    Self::Header(Secret::new(token.trim().to_owned()))
                }
                _ => Self::Malformed,
            };
        }
        let offered = headers.get_all(SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|value| value.to_str().ok());
        offered
            .flat_map(|value| value.split(','))
            .find_map(|name| name.trim().strip_prefix(SUBPROTOCOL))
            .map_or(Self::Nothing, |token| Self::Subprotocol(Secret::new(token.to_owned())))
    }
}

/// Name of a query parameter that looks like a token.
pub(crate) fn credential_in_query(query: Option<&str>) -> Option<&'static str> {
    let names = url::form_urlencoded::parse(query?.as_bytes());
    let known = ["token", "access_token", "auth", "authorization"];
    names.into_iter().find_map(|(name, _)| known.into_iter().find(|known| name.eq_ignore_ascii_case(known)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::{HeaderName, HeaderValue};

    fn read(pairs: &[(HeaderName, &'static str)]) -> Offered {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(name.clone(), HeaderValue::from_static(value));
        }
        Offered::read(&headers)
    }

    #[test]
    fn tokens_are_found_where_they_belong() {
        let token = || Secret::new("a.b");
        assert_eq!(read(&[]), Offered::Nothing);
        assert_eq!(read(&[(AUTHORIZATION, "Bearer a.b")]), Offered::Header(token()));
        assert_eq!(read(&[(AUTHORIZATION, "bearer  a.b")]), Offered::Header(token()));
        assert_eq!(read(&[(SEC_WEBSOCKET_PROTOCOL, "sb.v1.json, bearer.a.b")]), Offered::Subprotocol(token()));
        for wrong in ["Basic YTpi", "Bearer", "Bearer ", "a.b"] {
            assert_eq!(read(&[(AUTHORIZATION, wrong)]), Offered::Malformed, "{wrong}");
        }
        assert_eq!(read(&[(AUTHORIZATION, "Bearer a"), (AUTHORIZATION, "Bearer b")]), Offered::Malformed);
    }

    #[test]
    fn a_token_in_the_address_is_recognised() {
        assert_eq!(credential_in_query(Some("match=a&token=x")), Some("token"));
        assert_eq!(credential_in_query(Some("ACCESS%5Ftoken=x")), Some("access_token"));
        assert_eq!(credential_in_query(Some("match=token")), None);
        assert_eq!(credential_in_query(None), None);
    }
}
