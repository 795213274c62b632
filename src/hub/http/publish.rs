//! Events by HTTP.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::{Request, StatusCode};

use super::{Answer, RequestBody, guard, json, text};
use crate::ErrorKind;
use crate::hub;
use crate::hub::shared::Shared;

/// How long the body of a request may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(10);

pub(super) async fn publish(shared: &Arc<Shared>, request: Request<impl RequestBody>) -> Result<Answer, Answer> {
    #[derive(serde::Serialize)]
    struct Accepted {
        offset: u64,
    }
    let grant = guard::admit(shared, request.headers()).await?;
    let body = Limited::new(request.into_body(), shared.config.max_message_bytes).collect();
    let body = match tokio::time::timeout(BODY_TIMEOUT, body).await {
        // A copy: the log must not keep the whole input buffer of the connection for one small event.
        Ok(Ok(body)) => Bytes::copy_from_slice(&body.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            return Err(text(StatusCode::PAYLOAD_TOO_LARGE, "the event is larger than max_message_bytes"));
        }
        Ok(Err(_)) => return Err(text(StatusCode::BAD_REQUEST, "the body broke off")),
        Err(_) => return Err(text(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time")),
    };
    let (reply, published) = tokio::sync::oneshot::channel();
    // An error means that nobody waits for the answer any more.
    hub::publish(shared, body, Some(&grant), move |result| drop(reply.send(result)));
    Ok(match published.await.unwrap_or_else(|_| Err(hub::stopped())) {
        Ok(published) => json(StatusCode::OK, &Accepted { offset: published.offset }),
        Err(error) if error.kind() == ErrorKind::NotAllowed => text(StatusCode::FORBIDDEN, error.report()),
        Err(error) if error.is_poison() => text(StatusCode::BAD_REQUEST, error.report()),
        Err(error) => text(StatusCode::SERVICE_UNAVAILABLE, error.report()),
    })
}
