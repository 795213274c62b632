//! Room on the disk that is ours: a file beside the spill, given up when the disk is full, so that what makes the spill
//! smaller never fails for want of room (`docs/decisions/0012-a-bad-disk.md`).

use std::fs::File;
use std::io::{self, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use crate::sqlite::beside;

/// Enough to fold the longest WAL back into the file: what starts a checkpoint (2 MiB) and one append (2 MiB, and one
/// event more), each page once, with room to spare.
pub(super) const RESERVE_BYTES: u64 = 8 << 20;

#[derive(Debug)]
pub(super) struct Reserve {
    path: PathBuf,
    held: bool,
}

impl Reserve {
    /// The reserve of a spill; [`hold`](Self::hold) makes it.
    pub(super) fn of(spill: &Path) -> Self {
        Self { path: beside(spill, ".reserve"), held: false }
    }

    pub(super) fn is_held(&self) -> bool {
        self.held
    }

    /// Takes the room, if there is enough.
    pub(super) fn hold(&mut self) -> io::Result<()> {
        if self.held {
            return Ok(());
        }
        let mut file = File::options().write(true).create(true).truncate(false).open(&self.path)?;
        if !is_whole(&file)?
            && let Err(error) = allocate(&mut file)
        {
            // Half of it is of no use to us, but may be to others. If this fails too, the first error is the one to tell.
            drop(file.set_len(0));
            return Err(error);
        }
        self.held = true;
        Ok(())
    }

    /// Gives the room up, for ourselves. Where that fails there was none.
    pub(super) fn release(&mut self) {
        self.held = false;
        drop(File::options().write(true).open(&self.path).and_then(|file| file.set_len(0)));
    }
}

/// Whether every byte of it has its place on the disk.
fn is_whole(file: &File) -> io::Result<bool> {
    let metadata = file.metadata()?;
    #[cfg(unix)]
    let stored = std::os::unix::fs::MetadataExt::blocks(&metadata) * 512;
    #[cfg(not(unix))]
    let stored = metadata.len();
    Ok(metadata.len() >= RESERVE_BYTES && stored >= RESERVE_BYTES)
}

fn allocate(file: &mut File) -> io::Result<()> {
    #[cfg(target_os = "linux")]
    match rustix::fs::fallocate(&*file, rustix::fs::FallocateFlags::empty(), 0, RESERVE_BYTES) {
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS | rustix::io::Errno::INVAL) => {}
        done => return done.map_err(Into::into),
    }
    // Bytes that no file system can make smaller.
    let mut rng = fastrand::Rng::with_seed(RESERVE_BYTES);
    let mut chunk = vec![0; 64 << 10];
    file.rewind()?;
    for _ in 0..RESERVE_BYTES / chunk.len() as u64 {
        rng.fill(&mut chunk);
        file.write_all(&chunk)?;
    }
    Ok(())
}
