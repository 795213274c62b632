//! The threads that carry tokio: one for all emitters of the process, one for all hubs, each started at first use.
//!
//! They are ours, not the host's: named, never attached to Python, and refused in a forked child, where the threads
//! of the parent do not exist (an emit there would say "accepted" and deliver nothing).

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::runtime::Handle;

use crate::error::{Error, ErrorKind, Result};

/// Which thread a task runs on. Emitters and hubs are kept apart so that a busy hub delays no emitter.
#[derive(Clone, Copy, Debug)]
pub enum Room {
    /// All emitters of the process.
    Emitter = 0,
    /// All hubs of the process.
    Hub = 1,
}

pub(crate) type Runtimes = [Option<Handle>; 2];

static RUNTIMES: Mutex<Runtimes> = Mutex::new([None, None]);
/// Counts the forks between this process and the one that loaded the library.
static GENERATION: AtomicU64 = AtomicU64::new(0);

/// What was started so far; a fork holds it too.
pub(crate) fn runtimes() -> MutexGuard<'static, Runtimes> {
    RUNTIMES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The runtime of a room, started if it is not there yet.
///
/// # Errors
/// The operating system grants no thread or no event queue.
pub fn handle(room: Room) -> Result<Handle> {
    let mut runtimes = runtimes();
    let slot = &mut runtimes[room as usize];
    if let Some(handle) = slot {
        return Ok(handle.clone());
    }
    let name = match room {
        Room::Emitter => "sb-emitter",
        Room::Hub => "sb-hub",
    };
    let failed = |error| Error::new(ErrorKind::Bind, format!("cannot start the thread {name}")).with_source(error);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let handle = runtime.handle().clone();
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || runtime.block_on(std::future::pending::<()>()))
        .map_err(failed)?;
    *slot = Some(handle.clone());
    Ok(handle)
}

/// Generation of the process, to be kept by every handle and compared at use: it differs in a forked child.
#[must_use]
pub fn generation() -> u64 {
    GENERATION.load(Ordering::Relaxed)
}

/// To be called in a forked child: handles of the parent become invalid.
pub(crate) fn next_generation() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
}

/// To be called in a forked child with what the fork held: it starts runtimes of its own.
pub(crate) fn forget(mut runtimes: MutexGuard<'_, Runtimes>) {
    // Dropping a handle would wake threads that do not exist here.
    for slot in runtimes.iter_mut() {
        std::mem::forget(slot.take());
    }
}

/// Fails in a child that inherited a handle over `fork`.
///
/// # Errors
/// [`ErrorKind::Forked`], with the remedy.
pub fn check_generation(made_in: u64, what: &str) -> Result<()> {
    if made_in == generation() {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Forked,
        format!("this {what} belongs to the parent process; make a new one after fork, or start children with 'spawn'"),
    ))
}
