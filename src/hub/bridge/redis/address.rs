//! Where a Redis is, from a URL; shown without the password.

use std::fmt;
use std::path::Path;

use redis::io::tcp::TcpSettings;
use redis::{Client, ConnectionInfo, IntoConnectionInfo as _, TlsCertificates};

use crate::error::{Error, ErrorKind, Result};

/// See the module.
#[derive(Clone)]
pub(super) struct Address {
    info: ConnectionInfo,
    ca: Option<Vec<u8>>,
    /// The URL without its password.
    shown: String,
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

impl Address {
    pub(super) fn parse(url: &str, ca: Option<&Path>) -> Result<Self> {
        let allowed = "give redis://[user:password@]host[:port][/db], rediss://… or unix:///path";
        let refused =
            |why: &str| Error::new(ErrorKind::Config, format!("redis_client is no URL of a Redis ({why}): {allowed}"));
        let mut shown = url::Url::parse(url).map_err(|error| refused(&error.to_string()))?;
        let info = url.into_connection_info().map_err(|error| refused(&error.to_string()))?;
        if shown.password().is_some() {
            // An error means that this kind of URL has no password.
            shown.set_password(Some("***")).unwrap_or_default();
        }
        shown.set_query(None);
        let ca = ca.map(std::fs::read).transpose().map_err(|error| {
            Error::new(
                ErrorKind::Config,
                format!("redis_ca={} cannot be read: give a PEM file", ca.unwrap_or(Path::new("")).display()),
            )
            .with_source(error)
        })?;
        // A live message is small and must not wait for more.
        let info = info.set_tcp_settings(TcpSettings::default().set_nodelay(true));
        Ok(Self { info, ca, shown: shown.into() })
    }

    /// The number of the database.
    pub(super) fn database(&self) -> i64 {
        self.info.redis_settings().db()
    }

    /// A client for the server that takes writes at the moment.
    #[expect(clippy::unused_async, reason = "other forms ask who that is")]
    pub(super) async fn client(&self) -> Result<Client> {
        let made = match &self.ca {
            None => Client::open(self.info.clone()),
            Some(ca) => {
                let certificates = TlsCertificates { client_tls: None, root_cert: Some(ca.clone()) };
                Client::build_with_tls(self.info.clone(), certificates)
            }
        };
        made.map_err(|error| Error::new(ErrorKind::BusDown, format!("cannot use the Redis at {self}: {error}")))
    }
}
