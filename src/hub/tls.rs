//! TLS on the hub's own port, and a certificate that is replaced while it runs.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::{Mutex, MutexGuard};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::{ServerConfig, crypto};

use crate::error::{Error, ErrorKind, Result};

/// How often the files are looked at, when somebody connects or asks for the numbers.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// See the module.
pub(super) struct Tls {
    cert: PathBuf,
    key: PathBuf,
    current: Mutex<Current>,
}

struct Current {
    acceptor: TlsAcceptor,
    /// The files as they were when they were read last, good or not.
    seen: Seen,
    looked: Instant,
    error: Option<String>,
}

type Seen = [Option<(SystemTime, u64)>; 2];

impl Tls {
    /// Reads certificate and key.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] names the file and what is wrong with it.
    pub(super) fn load(cert: &Path, key: &Path) -> Result<Self> {
        let seen = look(cert, key);
        let current = Current { acceptor: read(cert, key)?, seen, looked: Instant::now(), error: None };
        Ok(Self { cert: cert.to_owned(), key: key.to_owned(), current: Mutex::new(current) })
    }

    /// For a connection that begins now: with new files if there are, unless they cannot be used.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        self.look_again().acceptor.clone()
    }

    /// Why the files as they are now are not used.
    pub(super) fn error(&self) -> Option<String> {
        self.look_again().error.clone()
    }

    fn look_again(&self) -> MutexGuard<'_, Current> {
        let mut current = self.current.lock();
        if current.looked.elapsed() >= LOOK_EVERY {
            current.looked = Instant::now();
            let seen = look(&self.cert, &self.key);
            if seen != current.seen {
                current.seen = seen;
                match read(&self.cert, &self.key) {
                    Ok(acceptor) => (current.acceptor, current.error) = (acceptor, None),
                    Err(error) => current.error = Some(error.report()),
                }
            }
        }
        current
    }
}

fn look(cert: &Path, key: &Path) -> Seen {
    [cert, key].map(|path| {
        let file = std::fs::metadata(path).ok()?;
        Some((file.modified().ok()?, file.len()))
    })
}

fn read(cert: &Path, key: &Path) -> Result<TlsAcceptor> {
    let unusable = |setting: &str, path: &Path, allowed: &str, cause: Box<dyn std::error::Error + Send + Sync>| {
        let text = format!("{setting}={} is not allowed: give {allowed}", path.display());
        Error::new(ErrorKind::Config, text).with_source(cause)
    };
    let bad_cert =
        |cause| unusable("tls_cert", cert, "a PEM file of the certificate and those that lead to its issuer", cause);
    let bad_key = |cause| unusable("tls_key", key, "a PEM file of the private key that belongs to tls_cert", cause);
    let chain: std::result::Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(cert).and_then(Iterator::collect::<std::result::Result<_, _>>);
    let chain = chain.map_err(|error| bad_cert(error.into()))?;
    if chain.is_empty() {
        return Err(bad_cert("there is no certificate in it".into()));
    }
    let private = PrivateKeyDer::from_pem_file(key).map_err(|error| bad_key(error.into()))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| bad_cert(error.into()))?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(|error| bad_key(error.into()))?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}
