//! How much of a session is on its way to a disk or a bus, so that it stops reading before that is too much; and what has
//! come back from there.

use std::task::{Context, Poll, Waker};

use parking_lot::Mutex;

/// How many bytes of one session may wait to be kept: enough for a disk to be busy all the time, and little enough for
/// hundreds of emitters.
const WAITING_BYTES: usize = 4 << 20;

/// The answer to a `hello`: the mark, or nothing if it could not be kept.
pub(in crate::hub) type Greeted = Option<u64>;

/// See the module. Shared by a session and its turns under way.
#[derive(Debug, Default)]
pub(in crate::hub) struct Flow(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    bytes: usize,
    acknowledged: u64,
    greeting: Option<Greeting>,
    reader: Option<Waker>,
}

#[derive(Debug)]
enum Greeting {
    Asked,
    Answered(Greeted),
}

impl Flow {
    /// A turn sets out.
    pub(in crate::hub) fn begin(&self, bytes: usize, greets: bool) {
        let mut waiting = self.0.lock();
        waiting.bytes += bytes;
        if greets {
            waiting.greeting = Some(Greeting::Asked);
        }
    }

    /// A turn is settled; `greeted` answers it if it was a greeting.
    pub(in crate::hub) fn end(&self, bytes: usize, greeted: Option<Greeted>) {
        let mut waiting = self.0.lock();
        waiting.bytes -= bytes;
        if let Some(greeted) = greeted {
            waiting.greeting = Some(Greeting::Answered(greeted));
        }
        let reader = waiting.reader.take();
        drop(waiting);
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    /// An ack is queued. To be called before the peer can hear of it.
    pub(in crate::hub) fn acknowledge(&self, upto: u64) {
        self.0.lock().acknowledged = upto;
    }

    /// The last ack; 0 before the first.
    pub(in crate::hub) fn acknowledged(&self) -> u64 {
        self.0.lock().acknowledged
    }

    /// Ready when the session may read on; brings the answer to its greeting once.
    pub(in crate::hub) fn poll_open(&self, cx: &mut Context<'_>) -> Poll<Option<Greeted>> {
        let mut waiting = self.0.lock();
        if let Some(Greeting::Answered(greeted)) = waiting.greeting {
            waiting.greeting = None;
            return Poll::Ready(Some(greeted));
        }
        if waiting.greeting.is_none() && waiting.bytes < WAITING_BYTES {
            return Poll::Ready(None);
        }
        waiting.reader = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Whether the session does not read because its events are not kept yet.
    pub(in crate::hub) fn is_shut(&self) -> bool {
        let waiting = self.0.lock();
        waiting.greeting.is_some() || waiting.bytes >= WAITING_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_shuts_at_its_bound_and_while_a_greeting_is_unanswered() {
        let flow = Flow::default();
        let mut cx = Context::from_waker(Waker::noop());
        flow.begin(0, true);
        assert_eq!(flow.poll_open(&mut cx), Poll::Pending);
        flow.end(0, Some(Some(7)));
        assert_eq!(flow.poll_open(&mut cx), Poll::Ready(Some(Some(7))));
        flow.begin(WAITING_BYTES, false);
        flow.begin(1, false);
        assert!(flow.is_shut() && flow.poll_open(&mut cx).is_pending());
        flow.end(WAITING_BYTES, None);
        assert_eq!(flow.poll_open(&mut cx), Poll::Ready(None));
    }
}
