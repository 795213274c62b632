//! Items over a WebSocket: whole blocks to our hub, one text frame for each event to any other server.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::{Sink, Stream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};

use super::{Io, LinkEvent, is_about_content, lost};
use crate::emitter::item::Identity;
use crate::emitter::item::{Gap, Item};
use crate::emitter::machine::{Confirm, Outgoing};
use crate::error::{Error, ErrorKind, Result};
use crate::wire::block::{Block, HEADER_BYTES};
use crate::wire::frame::{EmitterFrame, HubFrame};

/// Messages handed over per turn, so that acks are read and new events fetched in between.
const MESSAGES_PER_TURN: usize = 512;

/// A WebSocket that carries our items.
pub struct Socket {
    pub(super) stream: WebSocketStream<Box<dyn Io>>,
    confirm: Confirm,
    stamp: Option<Identity>,
    /// A block whose events go out one by one, and where the next one starts.
    partial: Option<(Block, usize, u64)>,
    dirty: bool,
}

impl Socket {
    pub(super) fn new(stream: WebSocketStream<Box<dyn Io>>, confirm: Confirm, stamp: Option<Identity>) -> Self {
        Self { stream, confirm, stamp, partial: None, dirty: false }
    }

    pub(super) fn poll(
        &mut self,
        cx: &mut Context<'_>,
        more: &mut dyn FnMut() -> Option<Outgoing>,
    ) -> Poll<Result<LinkEvent>> {
        if let Poll::Ready(message) = Pin::new(&mut self.stream).poll_next(cx) {
            let Some(message) = message else { return Poll::Ready(Err(lost("the peer closed the link"))) };
            return Poll::Ready(self.read(message.map_err(|error| lost("the link broke").with_source(error))?));
        }
        let (mut sent, mut blocked) = (0, false);
        while sent < MESSAGES_PER_TURN {
            let ready = Pin::new(&mut self.stream).poll_ready(cx);
            if ready.map_err(|error| lost("the link broke").with_source(error))?.is_pending() {
                blocked = true;
                break;
            }
            let Some(message) = self.next_message(more)? else { break };
            let started = Pin::new(&mut self.stream).start_send(message);
            started.map_err(|error| lost("the link broke").with_source(error))?;
            self.dirty = true;
            sent += 1;
        }
        if self.dirty && !blocked && sent < MESSAGES_PER_TURN {
            let flushed = Pin::new(&mut self.stream).poll_flush(cx);
            if flushed.map_err(|error| lost("the link broke").with_source(error))?.is_ready() {
                self.dirty = false;
            }
        }
        if sent > 0 { Poll::Ready(Ok(LinkEvent::Progress)) } else { Poll::Pending }
    }

    fn next_message(&mut self, more: &mut dyn FnMut() -> Option<Outgoing>) -> Result<Option<Message>> {
        loop {
            if let Some((block, at, seq)) = &mut self.partial {
                if let Some((event, next)) = block.event_at(*at) {
                    (*at, *seq) = (next, *seq + 1);
                    let text = self.stamp.as_ref().map_or(event.clone(), |who| stamped(&event, who, *seq - 1));
                    return Ok(Some(Message::Text(as_text(text)?)));
                }
                self.partial = None;
            }
            match more() {
                None => return Ok(None),
                Some(Outgoing::Ping(number)) => {
                    return Ok(Some(Message::Ping(Bytes::copy_from_slice(&number.to_be_bytes()))));
                }
                Some(Outgoing::AckNow) => return Ok(Some(Message::text(EmitterFrame::AckNow.encode()))),
                Some(Outgoing::Item(Item::Events(block))) if self.confirm == Confirm::Acks => {
                    return Ok(Some(Message::Binary(block.into_bytes())));
                }
                Some(Outgoing::Item(Item::Events(block))) => {
                    let first = block.first();
                    self.partial = Some((block, HEADER_BYTES, first));
                }
                Some(Outgoing::Item(Item::Gap(gap))) => {
                    if let Some(text) = self.gap_text(&gap) {
                        return Ok(Some(Message::text(text)));
                    }
                }
            }
        }
    }

    fn gap_text(&self, gap: &Gap) -> Option<String> {
        let Gap { from, to, reason } = *gap;
        match (&self.stamp, self.confirm) {
            (_, Confirm::Acks) => Some(EmitterFrame::Gap { from, to, reason: reason.as_str().to_owned() }.encode()),
            (Some(Identity { emitter, epoch }), _) => Some(
                serde_json::json!({
                    "type": "broadcaster.gap",
                    "content": {"from": from, "to": to, "reason": reason.as_str()},
                    "_sb": {"emitter": emitter, "epoch": epoch, "seq": to},
                })
                .to_string(),
            ),
            // Without stamps a plain server's events carry no numbers that a gap could refer to.
            (None, _) => None,
        }
    }

    fn read(&self, message: Message) -> Result<LinkEvent> {
        match message {
            Message::Pong(payload) => Ok(match <[u8; 8]>::try_from(&payload[..]) {
                Ok(number) => LinkEvent::Pong(u64::from_be_bytes(number)),
                Err(_) => LinkEvent::Progress, // unsolicited: allowed, and means nothing
            }),
            Message::Close(frame) => {
                let Some(frame) = frame else { return Err(lost("the peer closed the link")) };
                let about_content = is_about_content(frame.code.into());
                let kind = if about_content { ErrorKind::FrameRefused } else { ErrorKind::ConnectRefused };
                Err(Error::new(kind, format!("the peer closed the link with {}: {}", frame.code, frame.reason)))
            }
            Message::Text(text) if self.confirm == Confirm::Acks => match HubFrame::decode(&text) {
                Ok(HubFrame::Ack { upto }) => Ok(LinkEvent::Ack(upto)),
                Ok(HubFrame::Nack { seq, reason }) => Ok(LinkEvent::Nack { seq, reason }),
                Ok(HubFrame::Credit { n }) => Ok(LinkEvent::Credit(n.max(1))),
                Ok(HubFrame::Error { code, message }) => {
                    Err(Error::new(ErrorKind::FrameRefused, format!("the hub refused a frame: {code}: {message}")))
                }
                Ok(_) => Ok(LinkEvent::Progress),
                Err(error) => {
                    Err(Error::new(ErrorKind::Protocol, "the hub sent a frame that is none").with_source(error))
                }
            },
            // What a plain server has to say to a client is not for us.
            _ => Ok(LinkEvent::Progress),
        }
    }
}

fn as_text(bytes: Bytes) -> Result<Utf8Bytes> {
    Utf8Bytes::try_from(bytes)
        .map_err(|error| Error::new(ErrorKind::Protocol, "an event is not UTF-8").with_source(error))
}

/// The event with its identity as last field.
fn stamped(event: &[u8], who: &Identity, seq: u64) -> Bytes {
    let id = serde_json::json!({"emitter": who.emitter, "epoch": who.epoch, "seq": seq});
    let body = event.strip_suffix(b"}").unwrap_or(event);
    let comma = if body.trim_ascii_end().ends_with(b"{") { "" } else { "," };
    let mut text = Vec::with_capacity(event.len() + 96);
    text.extend_from_slice(body);
    text.extend_from_slice(format!("{comma}\"_sb\":{id}}}").as_bytes());
    text.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_is_one_more_field() {
        let who = Identity { emitter: "ada".into(), epoch: "e".into() };
        assert_eq!(stamped(b"{}", &who, 7), r#"{"_sb":{"emitter":"ada","epoch":"e","seq":7}}"#);
        let vectors: serde_json::Value =
            serde_json::from_str(include_str!("../../../tests/vectors/frames.json")).expect("JSON");
        for case in vectors["stamped"].as_array().expect("a list") {
            let text = |key: &str| case[key].as_str().expect("text").to_owned();
            let who = Identity { emitter: text("emitter"), epoch: text("epoch") };
            assert_eq!(stamped(text("event").as_bytes(), &who, case["seq"].as_u64().expect("seq")), text("text"));
        }
    }
}
