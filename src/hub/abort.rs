//! Ends a start that waits for something: a program that is told to end must not wait for a bus that is away.

use std::sync::Arc;

use tokio::sync::watch;

/// See the module. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct Abort(Arc<watch::Sender<bool>>);

impl Abort {
    /// Whoever starts is to give up. One that has started already goes on.
    pub fn order(&self) {
        self.0.send_replace(true);
    }

    /// Whether that was ordered.
    #[must_use]
    pub fn is_ordered(&self) -> bool {
        *self.0.borrow()
    }

    /// Ends when that is ordered.
    pub(super) async fn ordered(&self) {
        // An error means that nobody is left to order it, which the sender held here rules out.
        drop(self.0.subscribe().wait_for(|ordered| *ordered).await);
    }
}
