//! The frames that bring one entry to the sessions of one group: each is made once, however many of them share it.

use bytes::Bytes;

use crate::hub::entry::{Entry, Filter};
use crate::hub::outbox::Item;

/// See the module.
pub(super) struct Forms<'a> {
    entry: &'a Entry,
    /// Text, and compressed, with the `prev` that they name.
    framed: [Option<(u64, Item)>; 2],
    pushed: Option<Item>,
    made: u64,
}

impl<'a> Forms<'a> {
    pub(super) fn of(entry: &'a Entry) -> Self {
        Self { entry, framed: [None, None], pushed: None, made: 0 }
    }

    /// For a session whose entry before was `prev`; compressed, if it takes that and it is done.
    pub(super) fn framed(&mut self, prev: u64, zlib: Option<&Bytes>) -> Item {
        let form = &mut self.framed[usize::from(zlib.is_some())];
        match form {
            Some((of, item)) if *of == prev => item.clone(),
            _ => {
                self.made += 1;
                form.insert((prev, self.entry.item(prev, false, zlib))).1.clone()
            }
        }
    }

    /// For a client of Centrifugo's protocol, with the filter of the group.
    pub(super) fn pushed(&mut self, filter: &Filter) -> Item {
        if self.pushed.is_none() {
            self.made += 1;
        }
        self.pushed.get_or_insert_with(|| self.entry.pushes(filter)).clone()
    }

    /// How many were made.
    pub(super) fn made(&self) -> u64 {
        self.made
    }
}
