//! What comes from whoever brings events: each is checked, and counted for the turn in which it came.

use std::sync::Arc;

use bytes::Bytes;

use crate::error::Result;
use crate::hub::auth::Scope;
use crate::hub::entities::Entities;
use crate::hub::entry::Record;
use crate::hub::registry::frame_cost;

/// See the module.
#[derive(Debug)]
pub struct Intake {
    /// What may be published; `None` is everything.
    publish: Option<Scope>,
    entities: Arc<Entities>,
    /// What came in this turn takes so much of a subscriber's queue, and one turn may take so much of it.
    cost: usize,
    slice: usize,
}

impl Default for Intake {
    fn default() -> Self {
        Self::new(usize::MAX, Arc::default())
    }
}

impl Intake {
    /// Takes events that need `slice` bytes of a subscriber's queue in one turn, and one more.
    #[must_use]
    pub fn new(slice: usize, entities: Arc<Entities>) -> Self {
        Self { publish: None, entities, cost: 0, slice }
    }

    /// Only this may be published from now on; `None` is everything.
    pub fn limit_to(&mut self, publish: Option<Scope>) {
        self.publish = publish;
    }

    /// An event came.
    ///
    /// # Errors
    /// See [`Record::checked`].
    pub fn take(&mut self, json: Bytes) -> Result<Record> {
        let record = Record::checked(json, &self.entities, self.publish.as_ref())?;
        self.cost += frame_cost(&record);
        Ok(record)
    }

    /// Whether this turn has enough.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.cost >= self.slice
    }

    /// The turn is over.
    pub fn turn(&mut self) {
        self.cost = 0;
    }
}
