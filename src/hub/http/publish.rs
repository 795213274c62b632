//! Events by HTTP: one, or a batch that is taken as a whole or not at all.

use std::io::Read as _;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use flate2::bufread::{MultiGzDecoder, ZlibDecoder};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap};
use hyper::{Request, StatusCode};
use serde::Serialize;
use serde_json::value::RawValue;

use super::{Answer, RequestBody, guard, json, text};
use crate::ErrorKind;
use crate::hub;
use crate::hub::shared::Shared;

/// How long the body of a request may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// Most events of a batch: each costs more than its bytes.
const MAX_BATCH: usize = 10_000;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Coding {
    Identity,
    Gzip,
    Deflate,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Accepted {
    One { offset: u64 },
    Batch { offsets: Vec<u64> },
}

pub(super) async fn publish(shared: &Arc<Shared>, request: Request<impl RequestBody>) -> Result<Answer, Answer> {
    let grant = guard::admit(shared, request.headers()).await?;
    let coding = coding(request.headers())
        .ok_or_else(|| text(StatusCode::UNSUPPORTED_MEDIA_TYPE, "Content-Encoding is gzip, deflate or identity"))?;
    let lines = is_lines(request.headers());
    let most = shared.config.max_message_bytes;
    let too_large = || text(StatusCode::PAYLOAD_TOO_LARGE, "the body is larger than max_message_bytes");
    let body = Limited::new(request.into_body(), most).collect();
    let body = match tokio::time::timeout(BODY_TIMEOUT, body).await {
        // A copy: the log must not keep the whole input buffer of the connection for one small event.
        Ok(Ok(body)) => Bytes::copy_from_slice(&body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => return Err(too_large()),
        Ok(Err(_)) => return Err(text(StatusCode::BAD_REQUEST, "the body broke off")),
        Err(_) => return Err(text(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time")),
    };
    let body = if coding == Coding::Identity {
        body
    } else {
        // In another thread: a small body can be a lot of work.
        let inflated = tokio::task::spawn_blocking(move || inflate(coding, &body, most)).await;
        let unreadable = |_| text(StatusCode::BAD_REQUEST, "the body is not compressed as Content-Encoding says");
        let inflated = inflated.map_err(|_| text(StatusCode::SERVICE_UNAVAILABLE, "the hub stops"))?;
        inflated.map_err(unreadable)?.ok_or_else(too_large)?
    };
    let (events, batch) = split(&body, lines).map_err(|why| text(StatusCode::BAD_REQUEST, why))?;
    if events.len() > MAX_BATCH {
        return Err(text(StatusCode::PAYLOAD_TOO_LARGE, format!("a batch has at most {MAX_BATCH} events")));
    }
    let count = events.len() as u64;
    let (reply, published) = tokio::sync::oneshot::channel();
    // An error means that nobody waits for the answer any more.
    hub::publish(shared, events, Some(&grant), move |result| drop(reply.send(result)));
    Ok(match published.await.unwrap_or_else(|_| Err(hub::stopped())) {
        Ok(last) if batch => {
            json(StatusCode::OK, &Accepted::Batch { offsets: (last.offset + 1 - count..=last.offset).collect() })
        }
        Ok(last) => json(StatusCode::OK, &Accepted::One { offset: last.offset }),
        Err(error) if error.kind() == ErrorKind::NotAllowed => text(StatusCode::FORBIDDEN, error.report()),
        Err(error) if error.is_poison() => text(StatusCode::BAD_REQUEST, error.report()),
        Err(error) => text(StatusCode::SERVICE_UNAVAILABLE, error.report()),
    })
}

fn coding(headers: &HeaderMap) -> Option<Coding> {
    let mut named = headers.get_all(CONTENT_ENCODING).iter();
    let Some(name) = named.next() else { return Some(Coding::Identity) };
    if named.next().is_some() {
        return None;
    }
    match name.to_str().ok()?.to_ascii_lowercase().as_str() {
        "identity" => Some(Coding::Identity),
        "gzip" | "x-gzip" => Some(Coding::Gzip),
        "deflate" => Some(Coding::Deflate),
        _ => None,
    }
}

/// Whether each line is an event.
fn is_lines(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let name = kind.split(';').next().unwrap_or_default().trim();
    ["application/x-ndjson", "application/jsonl"].into_iter().any(|lines| name.eq_ignore_ascii_case(lines))
}

/// At most `most` bytes: nothing if there are more, and no more work than that is done.
fn inflate(coding: Coding, body: &[u8], most: usize) -> std::io::Result<Option<Bytes>> {
    let mut inflated = Vec::new();
    let limit = most as u64 + 1;
    match coding {
        Coding::Identity => inflated.extend_from_slice(body),
        Coding::Gzip => drop(MultiGzDecoder::new(body).take(limit).read_to_end(&mut inflated)?),
        Coding::Deflate => drop(ZlibDecoder::new(body).take(limit).read_to_end(&mut inflated)?),
    }
    Ok((inflated.len() <= most).then(|| inflated.into()))
}

/// The events of a body, and whether it is a batch.
fn split(body: &Bytes, lines: bool) -> Result<(Vec<Bytes>, bool), String> {
    let none = || "a batch has at least one event, which is a JSON object".to_owned();
    // Each its own: the log must not keep a whole batch for the last event of it.
    let own = Bytes::copy_from_slice;
    let events: Vec<Bytes> = if lines {
        let lines = body.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
        lines.filter(|line| !line.is_empty()).map(own).collect()
    } else if body.trim_ascii_start().first() == Some(&b'[') {
        let events: Vec<&RawValue> = serde_json::from_slice(body).map_err(|error| error.to_string())?;
        events.into_iter().map(|event| own(event.get().as_bytes())).collect()
    } else {
        return Ok((vec![body.clone()], false));
    };
    if events.is_empty() { Err(none()) } else { Ok((events, true)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn a_bomb_is_given_up_at_the_limit() {
        let mut bomb = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
        bomb.write_all(&vec![b' '; 16 << 20]).expect("written");
        let bomb = bomb.finish().expect("finished");
        assert!(bomb.len() < 20_000);
        assert_eq!(inflate(Coding::Deflate, &bomb, 1000).expect("valid so far"), None);
        assert_eq!(inflate(Coding::Deflate, &bomb, 16 << 20).expect("valid").map(|all| all.len()), Some(16 << 20));
        assert!(inflate(Coding::Gzip, &bomb, 1000).is_err());
    }

    #[test]
    fn bodies_are_split_into_their_events() {
        let split = |body: &'static str, lines| split(&Bytes::from_static(body.as_bytes()), lines);
        let bytes = |texts: &[&'static str]| texts.iter().map(|text| Bytes::from_static(text.as_bytes())).collect();
        assert_eq!(split("{\n}", false), Ok((bytes(&["{\n}"]), false)));
        assert_eq!(split(" [{} , {\"a\":1.0}]", false), Ok((bytes(&["{}", "{\"a\":1.0}"]), true)));
        assert_eq!(split("{}\r\n\n{}\n", true), Ok((bytes(&["{}", "{}"]), true)));
        for wrong in ["[]", "[{}", "[{}] x"] {
            assert!(split(wrong, false).is_err(), "{wrong}");
        }
        assert!(split(" \n", true).is_err());
    }
}
