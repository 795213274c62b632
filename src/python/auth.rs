//! The setting `auth`, and the way to a user's function: a question in the mailbox, answered by the event loop.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pyo3::prelude::*;
use pyo3::types::PyString;

use super::mailbox::{Body, Mailbox, Sender};
use super::settings::{Settings, refused};
use crate::error::Result;
use crate::hub::auth::{Answer, Auth, Authenticator, Grant, JwtKey, JwtSettings, Scope};
use crate::secret::Secret;
use crate::wire::topic::Pattern;

const ALLOWED: &str = "a token, a sequence of tokens, a JwtAuth, an async function, or None";

/// Reads the setting. A function is reached through the desk.
pub(super) fn auth(config: &Bound<'_, PyAny>, desk: Option<&AuthDesk>) -> Result<Auth> {
    let settings = Settings(config);
    let value: Py<PyAny> = settings.get("auth", ALLOWED)?;
    let value = value.bind(config.py());
    if value.is_none() {
        return Ok(Auth::None);
    }
    if let Some(desk) = desk {
        return Ok(Auth::Callback(desk.0.clone()));
    }
    if let Ok(token) = value.cast::<PyString>() {
        return Ok(Auth::Tokens(vec![Secret::new(token.to_string())]));
    }
    if value.hasattr("public_key").unwrap_or(false) {
        return jwt(&Settings(value)).map(Auth::Jwt);
    }
    let tokens: Vec<String> = value.extract().map_err(|_| refused("auth", "(hidden)", ALLOWED))?;
    Ok(Auth::Tokens(tokens.into_iter().map(Secret::new).collect()))
}

fn jwt(settings: &Settings<'_, '_>) -> Result<JwtSettings> {
    let text = "a text, or None";
    let key = match (settings.get::<Option<String>>("secret", text)?, settings.get("public_key", text)?) {
        (Some(secret), None) => JwtKey::Secret(Secret::new(secret)),
        (None, Some(pem)) => JwtKey::PublicKey(pem),
        _ => return Err(refused("auth", "(hidden)", "either secret or public_key")),
    };
    let leeway = settings.seconds("leeway")?;
    if leeway > Duration::from_secs(3600) {
        return Err(refused("leeway", &leeway.as_secs().to_string(), "0 to 3600 seconds"));
    }
    Ok(JwtSettings { key, issuer: settings.get("issuer", text)?, audience: settings.get("audience", text)?, leeway })
}

/// Where questions about tokens wait for the event loop. Python's side is `safe_broadcaster/auth.py`.
#[pyclass(frozen, module = "safe_broadcaster._core")]
pub(super) struct AuthDesk(Arc<Desk>);

#[derive(Default)]
struct Desk(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    mailbox: Option<(Sender, u64)>,
    answers: HashMap<u64, Answer>,
    last: u64,
}

impl Authenticator for Desk {
    fn ask(&self, token: Secret, answer: Answer) {
        let mut waiting = self.0.lock();
        // Whoever asked has given up on these.
        waiting.answers.retain(|_, answer| !answer.is_closed());
        let Some((sender, letters)) = waiting.mailbox.clone() else { return };
        waiting.last += 1;
        let number = waiting.last;
        waiting.answers.insert(number, answer);
        drop(waiting);
        let question = move |py: Python<'_>| Ok((number, token.expose()).into_pyobject(py)?.into_any().unbind());
        sender.push(letters, Body::Make(Box::new(question)));
    }
}

#[pymethods]
impl AuthDesk {
    #[new]
    fn new() -> Self {
        Self(Arc::default())
    }

    /// Questions come to this mailbox under `token` from now on.
    fn serve(&self, mailbox: &Mailbox, token: u64) {
        self.0.0.lock().mailbox = Some((mailbox.sender(), token));
    }

    /// Answers a question: a `Grant`, or `None` for a token that is not taken.
    fn answer(&self, number: u64, grant: &Bound<'_, PyAny>) -> Result<()> {
        let granted = if grant.is_none() { None } else { Some(read_grant(&Settings(grant))?) };
        if let Some(answer) = self.0.0.lock().answers.remove(&number) {
            drop(answer.send(granted)); // an error means that nobody waits any more
        }
        Ok(())
    }

    /// The question cannot be answered.
    fn fail(&self, number: u64) {
        self.0.0.lock().answers.remove(&number);
    }
}

fn read_grant(settings: &Settings<'_, '_>) -> Result<Grant> {
    let scope = |name: &str| {
        let texts: Vec<String> = settings.get(name, "a sequence of patterns")?;
        let parsed: std::result::Result<Vec<_>, _> = texts.iter().map(|text| Pattern::parse(text)).collect();
        parsed.map(|patterns| Some(Scope::new(patterns))).map_err(|error| refused(name, &error.to_string(), "patterns"))
    };
    Ok(Grant {
        subject: settings.get("subject", "a text, or None")?,
        subscribe: scope("subscribe")?,
        publish: scope("publish")?,
        expires: settings.get("expires", "Unix seconds, or None")?,
    })
}
