//! Files that somebody has removed under this process are put back, with all that is in them.

use std::path::{Path, PathBuf};

use rusqlite::Connection;

use super::room::failed;
use super::{PURPOSE, SpillStore};
use crate::emitter::item::Identity;
use crate::emitter::ring::Ring;
use crate::emitter::spill::Done;
use crate::emitter::spill::files::{Place, copy, place_of, put_in_place};
use crate::error::{Error, ErrorKind, Result};
use crate::sqlite::{self, beside};

/// More seqs than callers are given while the outbox moves into another file.
const MEANWHILE: u64 = 1 << 22;

impl SpillStore {
    /// Looks whether all files are where they were, and puts back what is not. Returns what is to be told of it.
    pub(in crate::emitter::spill) fn mend(&mut self) -> Vec<Done> {
        let Some(error) = self.missing() else {
            return if std::mem::take(&mut self.bereft) { vec![Done::FilesBack] } else { Vec::new() };
        };
        let mut told = Vec::new();
        if !std::mem::replace(&mut self.bereft, true) {
            told.push(Done::FilesGone(error));
        }
        match self.put_back() {
            Ok(ring) => {
                told.extend(ring.map(Done::NewRing));
                told.push(Done::FilesBack);
                self.bereft = false;
            }
            Err(error) => told.push(Done::FilesGone(error)),
        }
        told
    }

    /// At the end nobody looks any more: what is stored has to be where the next process finds it.
    pub(super) fn mend_at_last(&mut self, acked: u64) -> Result<()> {
        if self.missing().is_some() && self.meta.last > acked {
            self.put_back()?;
        }
        Ok(())
    }

    /// What is said of the first file that is not where it was.
    fn missing(&mut self) -> Option<Error> {
        if !self.lock.is_at(&self.path) {
            return Some(gone(&beside(&self.path, ".lock"), Place::Empty));
        }
        if let Some((path, place)) = self.files.look() {
            return Some(gone(&path, place));
        }
        let (_, path, place) = self.ring_place()?;
        (place != Place::Kept).then(|| gone(&path, place))
    }

    fn ring_place(&self) -> Option<(Ring, PathBuf, Place)> {
        let (ring, path) = (self.ring.clone()?, beside(&self.path, ".ring"));
        let place = place_of(&path, ring.key()?);
        Some((ring, path, place))
    }

    /// What another process has put there is not touched: the lock comes first, and a place that is taken stays so.
    fn put_back(&mut self) -> Result<Option<Ring>> {
        if !self.lock.is_at(&self.path) {
            PURPOSE.relock(&self.path, &mut self.lock)?;
        }
        match self.files.look() {
            None => {}
            Some((path, Place::Taken)) => return Err(gone(&path, Place::Taken)),
            Some(_) => self.renew().map_err(|error| failed(&self.path, "put back", error))?,
        }
        match self.ring_place() {
            Some((_, path, Place::Taken)) => Err(gone(&path, Place::Taken)),
            Some((ring, _, Place::Empty)) => self.renew_ring(&ring).map(Some),
            _ => Ok(None),
        }
    }

    fn renew(&mut self) -> rusqlite::Result<()> {
        copy(&self.db, &self.path)?;
        // What is at the path belongs to the new file, also when the old one is closed.
        sqlite::distrust(&self.db)?;
        drop(std::mem::replace(&mut self.db, Connection::open_in_memory()?));
        put_in_place(&self.path)?;
        self.reopen()
    }

    /// Whoever finds the new one takes all seqs for given that callers may be given until the outbox has moved.
    fn renew_ring(&mut self, old: &Ring) -> Result<Ring> {
        let identity = Identity { emitter: self.meta.emitter.clone(), epoch: self.meta.epoch.clone() };
        let ring = old.again(&identity, fastrand::u64(..), old.last() + MEANWHILE)?;
        self.ring = Some(ring.clone());
        Ok(ring)
    }
}

fn gone(path: &Path, place: Place) -> Error {
    let what = match place {
        Place::Taken => "was replaced by another file while this broadcaster has it open; move that one away",
        _ => "was removed while this broadcaster has it open, and is put back",
    };
    let text = format!(
        "{} {what}; leave the files at spill_path alone while it runs, and stop it first to begin anew",
        path.display()
    );
    Error::new(ErrorKind::SpillIo, text)
}
