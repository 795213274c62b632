//! What a link hears, on its way to the driver: bounded, because whoever reads slowly would be cut off by the bus. Beyond
//! the bound only the news that there is more is kept; the stream has the rest.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::mpsc;

use super::Message;

/// How many bytes of records may wait: more than comes while a hub brings one batch to ten thousand subscribers.
pub const WAITING_BYTES: usize = 8 << 20;
/// How many plain events may wait; they are in no stream, so more are lost, and counted.
const PLAIN_WAITING: usize = 10_000;

/// Makes both ends.
#[must_use]
pub fn channel() -> (Speaker, Hearing) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let load = Arc::new(Load::default());
    (Speaker { sender, load: load.clone() }, Hearing { receiver, load })
}

#[derive(Debug, Default)]
struct Load {
    bytes: AtomicUsize,
    plain: AtomicUsize,
    /// Plain events that found no room.
    lost: AtomicUsize,
}

/// The link's end.
#[derive(Clone, Debug)]
pub struct Speaker {
    sender: mpsc::UnboundedSender<Message>,
    load: Arc<Load>,
}

impl Speaker {
    /// Passes a message on. False if nobody listens any more.
    #[must_use]
    pub fn say(&self, message: Message) -> bool {
        let message = match message {
            Message::Block { epoch, block, .. }
                if self.load.bytes.load(Ordering::Relaxed) + block.records.len() > WAITING_BYTES =>
            {
                Message::Head { epoch, head: block.first + block.count - 1 }
            }
            Message::Plain(_) if self.load.plain.load(Ordering::Relaxed) >= PLAIN_WAITING => {
                self.load.lost.fetch_add(1, Ordering::Relaxed);
                return !self.sender.is_closed();
            }
            message => message,
        };
        match &message {
            Message::Block { block, .. } => drop(self.load.bytes.fetch_add(block.records.len(), Ordering::Relaxed)),
            Message::Plain(_) => drop(self.load.plain.fetch_add(1, Ordering::Relaxed)),
            Message::Head { .. } | Message::Probe { .. } => {}
        }
        self.sender.send(message).is_ok()
    }

    /// Ends when nobody listens any more.
    pub async fn unheard(&self) {
        self.sender.closed().await;
    }
}

/// The driver's end. Dropping it ends the link's hearing.
#[derive(Debug)]
pub struct Hearing {
    receiver: mpsc::UnboundedReceiver<Message>,
    load: Arc<Load>,
}

impl Hearing {
    /// The next message; `None` when the link is deaf. May be cancelled.
    pub async fn next(&mut self) -> Option<Message> {
        let message = self.receiver.recv().await;
        self.unload(message.as_ref());
        message
    }

    /// A message that is there already.
    pub fn at_hand(&mut self) -> Option<Message> {
        let message = self.receiver.try_recv().ok();
        self.unload(message.as_ref());
        message
    }

    /// Plain events lost since the last call.
    pub fn take_lost(&mut self) -> usize {
        self.load.lost.swap(0, Ordering::Relaxed)
    }

    fn unload(&self, message: Option<&Message>) {
        match message {
            Some(Message::Block { block, .. }) => {
                self.load.bytes.fetch_sub(block.records.len(), Ordering::Relaxed);
            }
            Some(Message::Plain(_)) => drop(self.load.plain.fetch_sub(1, Ordering::Relaxed)),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hub::bridge::Stretch;
    use bytes::Bytes;

    fn block(first: u64, bytes: usize) -> Message {
        let block = Stretch { first, count: 2, records: Bytes::from(vec![0; bytes]) };
        Message::Block { epoch: "e".into(), by: (String::new(), 0), block }
    }

    #[test]
    fn beyond_the_bound_only_the_news_is_kept() {
        let (speaker, mut hearing) = channel();
        assert!(speaker.say(block(1, WAITING_BYTES)) && speaker.say(block(3, 1)));
        assert_eq!(hearing.at_hand(), Some(block(1, WAITING_BYTES)));
        assert_eq!(hearing.at_hand(), Some(Message::Head { epoch: "e".into(), head: 4 }));
        assert!(speaker.say(block(5, 1)));
        assert_eq!(hearing.at_hand(), Some(block(5, 1)));
        drop(hearing);
        assert!(!speaker.say(block(7, 1)));
    }

    #[test]
    fn plain_events_beyond_the_bound_are_counted() {
        let (speaker, mut hearing) = channel();
        for _ in 0..PLAIN_WAITING + 3 {
            assert!(speaker.say(Message::Plain(Bytes::new())));
        }
        assert_eq!((hearing.take_lost(), hearing.take_lost()), (3, 0));
    }
}
