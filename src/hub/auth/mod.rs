//! Who may do what: a token becomes a [`Grant`], or a [`Denied`] that says why without naming the token.
//!
//! Everything here is pure but the question to a user's callback. Times are Unix seconds and come as arguments.

mod bearer;
mod grant;
mod jwt;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{Semaphore, oneshot};

pub(super) use bearer::{Offered, credential_in_query};
pub use grant::{Grant, Scope, not_granted};
pub use jwt::{JwtKey, JwtSettings};

use crate::error::{Error, ErrorKind, Result};
use crate::secret::Secret;
use crate::wire::close::CloseCode;

/// Longest token looked at, in bytes: a JWT with 256 patterns is about as long.
const MAX_TOKEN: usize = 16 << 10;
/// Most questions that a callback may have open: beyond that it does not keep up, and asking more would only queue.
const MAX_PENDING: usize = 1024;

/// A callback's answer: what the token grants, or nothing.
pub type Answer = oneshot::Sender<Option<Grant>>;

/// Asks someone else what a token grants. It must return at once; dropping the answer refuses.
pub trait Authenticator: Send + Sync {
    /// Begins to ask.
    fn ask(&self, token: Secret, answer: Answer);
}

/// How the hub knows its clients.
#[derive(Clone, Default)]
pub enum Auth {
    /// Everyone may do everything.
    #[default]
    None,
    /// Whoever knows one of these tokens may do everything. Several, so that one can be replaced without a gap.
    Tokens(Vec<Secret>),
    /// JSON Web Tokens.
    Jwt(JwtSettings),
    /// A function of the user.
    Callback(Arc<dyn Authenticator>),
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Tokens(_) => "Tokens(hidden)",
            Self::Jwt(_) => "Jwt(hidden)",
            Self::Callback(_) => "Callback",
        })
    }
}

/// Why a token is not taken. Never holds any of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Denied {
    /// It was good once: a fresh one is wanted.
    Expired,
    /// It grants nothing.
    Invalid(String),
    /// The callback did not answer; another try may succeed.
    Unavailable(&'static str),
}

impl Denied {
    /// How a session ends that has shown such a token.
    #[must_use]
    pub fn close_code(&self) -> CloseCode {
        match self {
            Self::Expired => CloseCode::TokenExpired,
            Self::Invalid(_) => CloseCode::Unauthorized,
            Self::Unavailable(_) => CloseCode::AuthUnavailable,
        }
    }
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Expired => f.write_str("the token has expired; get a fresh one"),
            Self::Invalid(why) => f.write_str(why),
            Self::Unavailable(why) => f.write_str(why),
        }
    }
}

enum Method {
    Open,
    Tokens(Vec<Secret>),
    Jwt(Box<jwt::Verifier>),
    Callback { ask: Arc<dyn Authenticator>, pending: Semaphore, patience: Duration },
}

/// Checks tokens by the settings.
pub(super) struct Checker(Method);

impl Checker {
    /// Reads the settings; `patience` is how long a callback may take.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] names what is wrong, and shows no secret.
    pub(super) fn new(auth: &Auth, patience: Duration) -> Result<Self> {
        Ok(Self(match auth {
            Auth::None => Method::Open,
            Auth::Tokens(tokens) => {
                if tokens.is_empty() || tokens.iter().any(|token| token.expose().is_empty()) {
                    return Err(refused("a token that is not empty, or several"));
                }
                Method::Tokens(tokens.clone())
            }
            Auth::Jwt(settings) => Method::Jwt(Box::new(jwt::Verifier::new(settings)?)),
            Auth::Callback(ask) => {
                Method::Callback { ask: ask.clone(), pending: Semaphore::new(MAX_PENDING), patience }
            }
        }))
    }

    /// Whether clients must show a token.
    pub(super) fn is_on(&self) -> bool {
        !matches!(self.0, Method::Open)
    }

    /// What a token grants.
    pub(super) async fn check(&self, token: Secret) -> Result<Grant, Denied> {
        if token.expose().len() > MAX_TOKEN {
            return Err(Denied::Invalid(format!("the token is longer than {MAX_TOKEN} bytes")));
        }
        let grant = match &self.0 {
            Method::Open => Grant::everything(),
            Method::Tokens(tokens) => {
                // All of them are compared, so that the time does not tell which one it was.
                let known = tokens.iter().filter(|each| **each == token).count();
                (known > 0)
                    .then(Grant::everything)
                    .ok_or_else(|| Denied::Invalid("the token is not known here".into()))?
            }
            Method::Jwt(verifier) => return verifier.check(token.expose(), unix_now()),
            Method::Callback { ask, pending, patience } => {
                let Ok(_permit) = pending.try_acquire() else {
                    return Err(Denied::Unavailable("too many tokens are being checked; come back"));
                };
                let (answer, answered) = oneshot::channel();
                ask.ask(token, answer);
                match tokio::time::timeout(*patience, answered).await {
                    Ok(Ok(Some(grant))) => grant,
                    Ok(Ok(None)) => return Err(Denied::Invalid("the token is not taken".into())),
                    Ok(Err(_)) => return Err(Denied::Unavailable("the token could not be checked")),
                    Err(_) => return Err(Denied::Unavailable("the token could not be checked in time")),
                }
            }
        };
        if grant.expires.is_some_and(|at| at <= unix_now()) { Err(Denied::Expired) } else { Ok(grant) }
    }
}

/// Seconds since 1970 by the wall clock: what `exp` is about.
pub(super) fn unix_now() -> f64 {
    SystemTime::UNIX_EPOCH.elapsed().map_or(0.0, |since| since.as_secs_f64())
}

fn refused(allowed: &str) -> Error {
    Error::new(ErrorKind::Config, format!("auth=(hidden) is not allowed: give {allowed}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(text: &str) -> Secret {
        Secret::new(text.to_owned())
    }

    fn checker(auth: &Auth) -> Checker {
        Checker::new(auth, Duration::from_millis(20)).expect("valid")
    }

    #[test]
    fn settings_show_no_token() {
        let auth = Auth::Tokens(vec![secret("s3cret")]);
        assert!(!format!("{auth:?}").contains("s3cret"));
    }

    #[tokio::test]
    async fn each_of_the_static_tokens_grants_everything() {
        let checker = checker(&Auth::Tokens(vec![secret("new"), secret("old")]));
        for token in ["new", "old"] {
            assert_eq!(checker.check(secret(token)).await, Ok(Grant::everything()));
        }
        for token in ["", "ne", "newer", "NEW"] {
            let denied = checker.check(secret(token)).await.expect_err(token);
            assert!(token.is_empty() || !denied.to_string().contains(token));
        }
        assert!(checker.check(secret(&"x".repeat(MAX_TOKEN + 1))).await.is_err());
        assert!(Checker::new(&Auth::Tokens(Vec::new()), Duration::ZERO).is_err());
        assert!(Checker::new(&Auth::Tokens(vec![secret("")]), Duration::ZERO).is_err());
    }

    struct Asked(fn(Answer));

    impl Authenticator for Asked {
        fn ask(&self, _: Secret, answer: Answer) {
            (self.0)(answer);
        }
    }

    #[tokio::test]
    async fn a_callback_that_fails_or_is_late_or_grants_what_is_over_refuses() {
        let ask = async |how| checker(&Auth::Callback(Arc::new(Asked(how)))).check(secret("t")).await;
        assert_eq!(ask(|answer| drop(answer.send(Some(Grant::everything())))).await, Ok(Grant::everything()));
        assert!(matches!(ask(|answer| drop(answer.send(None))).await, Err(Denied::Invalid(_))));
        assert!(matches!(ask(drop).await, Err(Denied::Unavailable(_))));
        assert!(matches!(ask(std::mem::forget).await, Err(Denied::Unavailable(_))));
        let over = |answer: Answer| drop(answer.send(Some(Grant { expires: Some(1.0), ..Grant::everything() })));
        assert_eq!(ask(over).await, Err(Denied::Expired));
    }
}
