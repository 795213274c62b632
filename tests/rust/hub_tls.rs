//! TLS on the hub's own port, with certificates made for the test.

mod support;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rcgen::{CertifiedKey, generate_simple_self_signed};
use safe_broadcaster::ErrorKind;
use safe_broadcaster::hub::{Hub, HubConfig};
use support::{Client, PATIENCE, hub};
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto};
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

/// Writes a new pair to `cert.pem` and `key.pem`.
fn make(home: &Path) -> CertificateDer<'static> {
    let CertifiedKey { cert, signing_key } = generate_simple_self_signed(["localhost".to_owned()]).expect("made");
    std::fs::write(home.join("key.pem"), signing_key.serialize_pem()).expect("writable");
    std::fs::write(home.join("cert.pem"), cert.pem()).expect("writable");
    cert.der().clone()
}

fn secured(home: &Path) -> Hub {
    hub(|config| {
        config.tls_cert = Some(home.join("cert.pem"));
        config.tls_key = Some(home.join("key.pem"));
    })
}

async fn connect(port: u16, trusted: &CertificateDer<'static>) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone()).expect("a certificate");
    let config = ClientConfig::builder_with_provider(Arc::new(crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let socket = TcpStream::connect(("127.0.0.1", port)).await?;
    let name = ServerName::try_from("localhost").expect("a name");
    TlsConnector::from(Arc::new(config)).connect(name, socket).await
}

#[tokio::test]
async fn sessions_run_over_tls() {
    let home = tempfile::tempdir().expect("writable");
    let trusted = make(home.path());
    let hub = secured(home.path());
    let stream = connect(hub.port(), &trusted).await.expect("secured");
    let request = format!("wss://localhost:{}/ws", hub.port()).into_client_request().expect("valid");
    let mut client = Client(tokio_tungstenite::client_async(request, stream).await.expect("accepted").0);
    client.say(r#"{"type":"subscribe","data":{"events":["*"]}}"#).await;
    assert_eq!(client.json().await["action"], "subscribed");
    hub.publish(r#"{"type":"x"}"#.into()).expect("published");
    assert_eq!(client.json().await["data"]["type"], "x");
    assert!(Client::try_connect(hub.port(), &[]).await.is_err(), "nothing is spoken in the clear");
}

/// Connects until the stats say so.
async fn until_told(hub: &Hub, trusted: &CertificateDer<'static>, failed: bool) {
    let deadline = Instant::now() + PATIENCE;
    while hub.stats().tls_error.is_some() != failed {
        assert!(Instant::now() < deadline, "{:?}", hub.stats().tls_error);
        drop(connect(hub.port(), trusted).await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_new_certificate_is_taken_while_the_hub_runs_and_a_broken_one_is_not() {
    let home = tempfile::tempdir().expect("writable");
    let first = make(home.path());
    let hub = secured(home.path());
    connect(hub.port(), &first).await.expect("secured");
    std::fs::write(home.path().join("cert.pem"), "nonsense").expect("writable");
    // The files are looked at when somebody connects.
    until_told(&hub, &first, true).await;
    connect(hub.port(), &first).await.expect("the old one is kept");
    let second = make(home.path());
    until_told(&hub, &second, false).await;
    connect(hub.port(), &second).await.expect("the new one is used");
    assert!(connect(hub.port(), &first).await.is_err());
}

#[tokio::test]
async fn who_does_not_finish_the_handshake_is_closed() {
    let home = tempfile::tempdir().expect("writable");
    make(home.path());
    let hub = secured(home.path());
    let mut silent = TcpStream::connect(("127.0.0.1", hub.port())).await.expect("connects");
    let mut heard = Vec::new();
    let read = tokio::time::timeout(PATIENCE, silent.read_to_end(&mut heard)).await.expect("closed in time");
    drop(read);
    assert!(heard.is_empty());
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let home = tempfile::tempdir().expect("writable");
    make(home.path());
    let [cert, key] = ["cert.pem", "key.pem"].map(|name| home.path().join(name));
    let other = tempfile::tempdir().expect("writable");
    make(other.path());
    for (cert, key, named) in [
        (other.path().join("none.pem"), key.clone(), "tls_cert="),
        (key.clone(), key.clone(), "tls_cert="),
        (cert.clone(), cert.clone(), "tls_key="),
        (cert.clone(), other.path().join("key.pem"), "tls_key="),
    ] {
        let config = HubConfig { port: 0, tls_cert: Some(cert), tls_key: Some(key), ..HubConfig::default() };
        let error = Hub::start(config).err().expect("refused");
        assert!(error.kind() == ErrorKind::Config && error.to_string().contains(named), "{error}");
    }
}
