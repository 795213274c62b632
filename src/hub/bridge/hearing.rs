//! What a link hears, on its way to the driver: bounded, because whoever reads slowly would be cut off by the bus. Beyond
//! the bound only the latest news that there is more is kept; the stream has the rest.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::Message;

/// How many bytes of records may wait: more than comes while a hub brings one batch to ten thousand subscribers.
pub const WAITING_BYTES: usize = 8 << 20;
/// How many bytes of plain events may wait; they are in no stream, so more are lost, and counted.
const PLAIN_BYTES: usize = 8 << 20;
/// What a message costs beside its bytes.
const MESSAGE_BYTES: usize = 128;

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
    /// The latest news; where they wait stands an older one.
    news: Mutex<Option<Message>>,
}

impl Load {
    /// What counts the message, and what it costs.
    fn of(&self, message: &Message) -> Option<(&AtomicUsize, usize, usize)> {
        match message {
            Message::Block { block, .. } => Some((&self.bytes, MESSAGE_BYTES + block.records.len(), WAITING_BYTES)),
            Message::Plain(json) => Some((&self.plain, MESSAGE_BYTES + json.len(), PLAIN_BYTES)),
            Message::Head { .. } | Message::Probe { .. } | Message::Free => None,
        }
    }
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
        if let Some((load, cost, most)) = self.load.of(&message) {
            if load.load(Ordering::Relaxed) + cost <= most {
                load.fetch_add(cost, Ordering::Relaxed);
                return self.sender.send(message).is_ok();
            }
            if let Message::Block { epoch, by, block } = message {
                return self.tell(Message::Head { epoch, head: block.last(), by: Some(by) });
            }
            self.load.lost.fetch_add(1, Ordering::Relaxed);
            return !self.sender.is_closed();
        }
        match message {
            Message::Head { .. } => self.tell(message),
            message => self.sender.send(message).is_ok(),
        }
    }

    /// News take the place of older ones that nobody has heard.
    fn tell(&self, head: Message) -> bool {
        match self.load.news.lock().replace(head.clone()) {
            Some(_) => !self.sender.is_closed(),
            None => self.sender.send(head).is_ok(),
        }
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
        let message = self.receiver.recv().await?;
        Some(self.unload(message))
    }

    /// A message that is there already.
    pub fn at_hand(&mut self) -> Option<Message> {
        let message = self.receiver.try_recv().ok()?;
        Some(self.unload(message))
    }

    /// Plain events lost since the last call.
    pub fn take_lost(&mut self) -> usize {
        self.load.lost.swap(0, Ordering::Relaxed)
    }

    fn unload(&self, message: Message) -> Message {
        if let Some((load, cost, _)) = self.load.of(&message) {
            load.fetch_sub(cost, Ordering::Relaxed);
        }
        match message {
            Message::Head { .. } => self.load.news.lock().take().unwrap_or(message),
            message => message,
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

    fn head(head: u64) -> Message {
        Message::Head { epoch: "e".into(), head, by: Some((String::new(), 0)) }
    }

    #[test]
    fn beyond_the_bound_only_the_latest_news_is_kept() {
        let (speaker, mut hearing) = channel();
        let large = || block(1, WAITING_BYTES - MESSAGE_BYTES);
        assert!(speaker.say(large()));
        for first in [3, 5, 7] {
            assert!(speaker.say(block(first, 1)));
        }
        assert!(speaker.say(head(99)));
        assert_eq!([hearing.at_hand(), hearing.at_hand(), hearing.at_hand()], [Some(large()), Some(head(99)), None]);
        assert!(speaker.say(block(100, 1)) && speaker.say(head(102)));
        assert_eq!([hearing.at_hand(), hearing.at_hand()], [Some(block(100, 1)), Some(head(102))]);
        drop(hearing);
        assert!(!speaker.say(block(7, 1)));
    }

    #[test]
    fn many_small_blocks_count_for_what_they_cost() {
        let (speaker, mut hearing) = channel();
        for n in 0..200_000 {
            assert!(speaker.say(block(1 + 2 * n, 8)));
        }
        let mut kept = 0;
        while hearing.at_hand().is_some() {
            kept += 1;
        }
        assert!((10_000..70_000).contains(&kept), "{kept}");
    }

    #[test]
    fn plain_events_beyond_the_bound_are_counted() {
        let (speaker, mut hearing) = channel();
        let large = Bytes::from(vec![0; PLAIN_BYTES / 4]);
        for _ in 0..6 {
            assert!(speaker.say(Message::Plain(large.clone())));
        }
        assert_eq!((hearing.take_lost(), hearing.take_lost()), (3, 0));
        assert!(hearing.at_hand().is_some());
        assert!(speaker.say(Message::Plain(large)));
        assert_eq!(hearing.take_lost(), 0);
    }
}
