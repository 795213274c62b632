//! A session's stream as it is read: in turns of a bounded size, and for subscribers by the number of frames.
//!
//! The WebSocket layer reads on for as long as a message is not whole, so a peer that sends empty fragments without
//! end would have the hub's thread for itself; and it tells of no fragment. So the stream under it is what stops.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::limits::{Bucket, FrameCount};

pub(super) struct Metered<S> {
    stream: S,
    /// Bytes that may be read in this turn.
    turn: usize,
    frames: Option<Box<Frames>>,
    exceeded: bool,
}

struct Frames {
    count: FrameCount,
    pace: Pace,
}

/// How many frames may come.
pub(super) struct Pace {
    bucket: Bucket,
    since: Instant,
}

impl Pace {
    /// So many in a second, and twice as many at once.
    pub(super) fn new(rate: f64) -> Self {
        Self { bucket: Bucket::new(rate, 2.0 * rate, Duration::ZERO), since: Instant::now() }
    }

    /// Whether `n` more may come now.
    pub(super) fn allows(&mut self, n: usize) -> bool {
        self.bucket.take(n, self.since.elapsed())
    }
}

impl<S> Metered<S> {
    /// Without a pace frames are not counted.
    pub(super) fn new(stream: S, pace: Option<Pace>) -> Self {
        let frames = pace.map(|pace| Box::new(Frames { count: FrameCount::default(), pace }));
        Self { stream, turn: 0, frames, exceeded: false }
    }

    /// A turn begins.
    pub(super) fn begin_turn(&mut self, bytes: usize) {
        self.turn = bytes;
    }

    /// Whether too many frames came. Nothing is read any more.
    pub(super) fn exceeded(&self) -> bool {
        self.exceeded
    }

    /// The stream itself, to read what is left.
    pub(super) fn unmetered(&mut self) -> &mut S {
        &mut self.stream
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Metered<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.exceeded {
            return Poll::Pending; // the session ends: nobody waits for this
        }
        if self.turn == 0 {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = into.filled().len();
        std::task::ready!(Pin::new(&mut self.stream).poll_read(cx, into))?;
        let read = &into.filled()[before..];
        self.turn = self.turn.saturating_sub(read.len());
        if let Some(frames) = &mut self.frames {
            let begun = frames.count.count(read);
            if !frames.pace.allows(begun) {
                self.exceeded = true;
                into.set_filled(before);
                return Poll::Pending;
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Metered<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
