//! Which SQLite files this process owns, by what they are and not by what they are called: a file has many names.
//!
//! A file is opened once in a process. A second opening here would be a second opinion of its content, so whoever wants
//! to look at it has to ask its owner.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::runtime;

/// Generation of the process (a forked child owns nothing of its parent's), device, inode.
pub(crate) type Key = (u64, u64, u64);

static OWNED: Mutex<BTreeSet<Key>> = Mutex::new(BTreeSet::new());

/// All that is noted; a fork holds it too.
pub(crate) fn all() -> MutexGuard<'static, BTreeSet<Key>> {
    OWNED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The note that this process owns a file, until it is dropped.
#[derive(Debug)]
pub(crate) struct Owned(Key);

impl Owned {
    /// Notes it; nothing if the file is gone already.
    pub(crate) fn note(path: &Path) -> Option<Self> {
        let key = key(path)?;
        all().insert(key);
        Some(Self(key))
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        all().remove(&self.0);
    }
}

/// Whether this process owns the file.
pub(crate) fn is_owned(path: &Path) -> bool {
    key(path).is_some_and(|key| all().contains(&key))
}

fn key(path: &Path) -> Option<Key> {
    let file = std::fs::metadata(path).ok()?;
    Some((runtime::generation(), file.dev(), file.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_known_by_all_its_names_until_it_is_given_up() {
        let home = tempfile::tempdir().expect("writable");
        let (one, two) = (home.path().join("one"), home.path().join("two"));
        std::fs::write(&one, "x").expect("writable");
        std::fs::hard_link(&one, &two).expect("linked");
        let owned = Owned::note(&one);
        assert!(is_owned(&one) && is_owned(&two) && !is_owned(&home.path().join("three")));
        drop(owned);
        assert!(!is_owned(&one) && !is_owned(&two));
    }
}
