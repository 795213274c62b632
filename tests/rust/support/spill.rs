//! Spills for tests of a bad disk: events that say which they are, and the file as bytes.

#![allow(dead_code, reason = "each test uses what it needs")]

#[path = "config.rs"]
mod config;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bytes::BytesMut;
use fastrand::Rng;
use safe_broadcaster::emitter::config::EmitterConfig;
use safe_broadcaster::emitter::item::Item;
use safe_broadcaster::emitter::spill::store::{Limits, Recovered, SpillStore};
use safe_broadcaster::error::Error;
use safe_broadcaster::wire::block::BlockBuilder;

/// Bytes of a page of the file.
pub(crate) const PAGE: usize = 16 << 10;

pub(crate) fn config(events: u64) -> EmitterConfig {
    EmitterConfig { spill_max_events: events, ..config::config() }
}

pub(crate) fn open(path: &Path, seed: u64) -> Result<(SpillStore, Recovered), Error> {
    SpillStore::open(path, Limits::from(&config(1_000_000)), Some("ada"), seed, None)
}

/// Events by their identity, which does not change when they are numbered anew.
pub(crate) type Written = BTreeMap<u64, Vec<u8>>;

/// A block of events of random sizes, noted in `written`; `id` goes on.
pub(crate) fn block(rng: &mut Rng, first: u64, count: u64, most: usize, id: &mut u64, written: &mut Written) -> Item {
    let mut builder = BlockBuilder::new(first, BytesMut::new());
    for _ in 0..count {
        let size = rng.usize(0..=most);
        let padding: String = std::iter::repeat_with(|| rng.alphanumeric()).take(size).collect();
        let json = format!("{{\"id\":{id},\"pad\":\"{padding}\"}}");
        builder.push(json.as_bytes());
        written.insert(*id, json.into_bytes());
        *id += 1;
    }
    Item::Events(builder.seal().expect("not empty"))
}

/// Identities of the events in items, in order; each must be as it was written.
pub(crate) fn ids(items: &[Item], written: &Written) -> Vec<u64> {
    let mut ids = Vec::new();
    for item in items {
        let Item::Events(block) = item else { continue };
        for (_, json) in block.events() {
            let text = std::str::from_utf8(&json).expect("text");
            let id =
                text.strip_prefix("{\"id\":").and_then(|rest| rest.split(',').next()).and_then(|id| id.parse().ok());
            let id = id.unwrap_or_else(|| panic!("an invented event: {text}"));
            assert_eq!(written.get(&id).map(Vec::as_slice), Some(&json[..]), "event {id} is not as it was written");
            ids.push(id);
        }
    }
    assert!(ids.is_sorted_by(|one, next| one < next), "out of order, or twice: {ids:?}");
    ids
}

/// Everything stored, in order and without holes.
pub(crate) fn everything(store: &mut SpillStore, after: u64) -> Vec<Item> {
    let mut items: Vec<Item> = Vec::new();
    loop {
        let upto = items.last().map_or(after, Item::last);
        let more = store.read(upto, 1 << 20).expect("readable");
        if more.is_empty() {
            break;
        }
        items.extend(more);
    }
    let mut next = after + 1;
    for item in &items {
        assert_eq!(item.first(), next, "a hole that nobody tells of");
        next = item.last() + 1;
    }
    items
}

/// Nobody wants anything for as long as it takes.
pub(crate) fn scrub(store: &mut SpillStore) {
    while store.scrub_after().is_some() {
        store.scrub(|| false);
    }
}

pub(crate) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// The files as they are at this moment; the store goes on.
#[derive(Clone)]
pub(crate) struct Files {
    pub(crate) main: Vec<u8>,
    pub(crate) wal: Vec<u8>,
    pub(crate) shm: Vec<u8>,
}

impl Files {
    pub(crate) fn of(path: &Path) -> Self {
        let read = |suffix| std::fs::read(beside(path, suffix)).unwrap_or_default();
        Self { main: read(""), wal: read("-wal"), shm: read("-shm") }
    }

    /// Puts them back, into the same file: it is the one that the lock file knows.
    pub(crate) fn restore(&self, path: &Path) {
        std::fs::write(path, &self.main).expect("writable");
        for (suffix, bytes) in [("-wal", &self.wal), ("-shm", &self.shm)] {
            if bytes.is_empty() {
                drop(std::fs::remove_file(beside(path, suffix)));
            } else {
                std::fs::write(beside(path, suffix), bytes).expect("writable");
            }
        }
    }
}

/// A number from the environment, by which a test is made larger or replayed.
pub(crate) fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}
