//! Clients for the tests of the hub: they speak the protocol over real sockets and wait for what they expect.

#![allow(dead_code, reason = "each test file uses a part")]

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{SinkExt as _, StreamExt as _};
use safe_broadcaster::hub::{Hub, HubConfig};
use safe_broadcaster::wire::block::{Block, BlockBuilder};
use safe_broadcaster::wire::frame::{EmitterFrame, HubFrame};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};

/// Longer than anything here takes, shorter than anyone's patience.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn hub(change: impl FnOnce(&mut HubConfig)) -> Hub {
    let mut config = HubConfig { port: 0, ..HubConfig::default() };
    change(&mut config);
    Hub::start(config).expect("starts")
}

/// Returns the event's offset.
pub(crate) fn publish(hub: &Hub, event: &Value) -> u64 {
    hub.publish(Bytes::from(event.to_string())).expect("published").offset
}

/// Waits for a condition.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let waiting = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("not in time: {what}"));
}

/// Sends a request (its first line, and headers) and returns status and body.
pub(crate) async fn ask(port: u16, head: &str, body: &str) -> (u16, String) {
    let (status, _, body) = ask_with(port, head, body.as_bytes()).await;
    (status, String::from_utf8(body).expect("utf-8"))
}

/// The same with bytes; returns the headers too.
pub(crate) async fn ask_with(port: u16, head: &str, body: &[u8]) -> (u16, String, Vec<u8>) {
    let mut socket = TcpStream::connect(("127.0.0.1", port)).await.expect("connects");
    let length = body.len();
    let head = format!("{head}\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
    socket.write_all(head.as_bytes()).await.expect("sent");
    // A server that has seen enough may close before the end of the body.
    drop(socket.write_all(body).await);
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).await.expect("read");
    let end = answer.windows(4).position(|four| four == b"\r\n\r\n").expect("a head");
    let body = answer.split_off(end + 4);
    let head = String::from_utf8(answer).expect("utf-8");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    (status, head, body)
}

/// A WebSocket client of any role.
pub(crate) struct Client<S>(pub(crate) WebSocketStream<S>);

impl Client<TcpStream> {
    pub(crate) async fn try_connect(port: u16, headers: &[(&'static str, &str)]) -> Result<Self, WsError> {
        Self::try_path(port, "/ws", headers).await
    }

    /// Connects to a path of the port.
    pub(crate) async fn try_path(port: u16, path: &str, headers: &[(&'static str, &str)]) -> Result<Self, WsError> {
        let mut request = format!("ws://127.0.0.1:{port}{path}").into_client_request().expect("valid");
        for (name, value) in headers {
            request.headers_mut().insert(*name, value.parse().expect("valid"));
        }
        let socket = TcpStream::connect(("127.0.0.1", port)).await?;
        Ok(Self(tokio_tungstenite::client_async(request, socket).await?.0))
    }

    pub(crate) async fn emitter(port: u16) -> Self {
        Self::try_connect(port, &[("Sec-WebSocket-Protocol", "sb.emit.v1")]).await.expect("accepted")
    }

    /// Connects and subscribes; returns the answer too.
    pub(crate) async fn subscriber(port: u16, patterns: &[&str], since: Option<(&str, u64)>) -> (Self, Value) {
        let mut client = Self::try_connect(port, &[]).await.expect("accepted");
        let mut data = json!({"events": patterns});
        if let Some((epoch, offset)) = since {
            data["since"] = json!({"epoch": epoch, "offset": offset});
        }
        client.say(&json!({"type": "subscribe", "data": data}).to_string()).await;
        let answer = client.json().await;
        (client, answer)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    pub(crate) async fn say(&mut self, text: &str) {
        self.0.send(Message::text(text)).await.expect("sent");
    }

    /// Next message that is not a ping.
    pub(crate) async fn message(&mut self) -> Message {
        loop {
            let next = tokio::time::timeout(PATIENCE, self.0.next()).await.expect("in time");
            match next.expect("not ended").expect("no error") {
                Message::Ping(_) | Message::Pong(_) => {}
                message => return message,
            }
        }
    }

    pub(crate) async fn text(&mut self) -> String {
        match self.message().await {
            Message::Text(text) => text.to_string(),
            other => panic!("no text: {other:?}"),
        }
    }

    pub(crate) async fn json(&mut self) -> Value {
        serde_json::from_str(&self.text().await).expect("json")
    }

    /// Reads to the close; returns its code.
    pub(crate) async fn close_code(&mut self) -> u16 {
        loop {
            if let Message::Close(frame) = self.message().await {
                return frame.expect("with a code").code.into();
            }
        }
    }

    pub(crate) async fn hello(&mut self, emitter: &str, epoch: &str, next: u64) -> u64 {
        let hello = EmitterFrame::Hello { emitter: emitter.into(), epoch: epoch.into(), next };
        self.say(&hello.encode()).await;
        match self.hub_frame().await {
            HubFrame::Welcome { have, credit } => {
                assert!(credit > 0);
                have
            }
            other => panic!("no welcome: {other:?}"),
        }
    }

    pub(crate) async fn hub_frame(&mut self) -> HubFrame {
        HubFrame::decode(&self.text().await).expect("a hub frame")
    }

    /// Sends a block; its events have the type `t` and their seq as `n`.
    pub(crate) async fn emit(&mut self, seqs: std::ops::RangeInclusive<u64>) {
        self.block(&block(seqs)).await;
    }

    pub(crate) async fn block(&mut self, block: &Block) {
        self.0.send(Message::Binary(block.bytes().clone())).await.expect("sent");
    }

    pub(crate) async fn acked(&mut self, upto: u64) {
        loop {
            match self.hub_frame().await {
                HubFrame::Ack { upto: at } if at >= upto => return assert_eq!(at, upto),
                HubFrame::Ack { .. } => {}
                other => panic!("no ack: {other:?}"),
            }
        }
    }
}

pub(crate) fn block(seqs: std::ops::RangeInclusive<u64>) -> Block {
    let mut builder = BlockBuilder::new(*seqs.start(), BytesMut::new());
    for seq in seqs {
        builder.push(format!(r#"{{"type":"t","n":{seq}}}"#).as_bytes());
    }
    builder.seal().expect("not empty")
}
