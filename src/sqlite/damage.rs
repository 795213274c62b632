//! Damage: how a file of ours is told from somebody else's, how bad bytes are noticed, and where a bad file goes.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use rusqlite::ErrorCode;

use super::PAGE;

const MAGIC: &[u8] = b"SQLite format 3\0";
/// Where SQLite's header holds the application id (its file format, §1.3.13).
const APPLICATION_ID_AT: usize = 68;
/// Damaged files kept beside the path; the oldest beyond these make room, which is told.
const KEPT: usize = 3;

/// What lies at the path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// Nothing yet.
    New,
    /// The header says that it is ours.
    Ours,
    /// Its header is destroyed, but it is the very file that we made.
    Wrecked,
    /// Somebody else's, or so it seems: it is not touched.
    Foreign,
}

/// Looks at a file without opening it as a database, which could change it. `mark` is what the lock file remembers of
/// ours.
pub(super) fn judge(path: &Path, application_id: i64, mark: Option<&str>) -> std::io::Result<Found> {
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Found::New),
        Err(error) => return Err(error),
    };
    let mut header = Vec::new();
    file.by_ref().take(APPLICATION_ID_AT as u64 + 4).read_to_end(&mut header)?;
    let marked = mark.is_some() && mark == mark_of(path).as_deref();
    let id = header.get(APPLICATION_ID_AT..);
    Ok(match (header.starts_with(MAGIC), id) {
        (true, Some(id)) if id == (application_id as u32).to_be_bytes() => Found::Ours,
        // A database of something else that was copied over ours keeps our mark, and is not ours for that.
        (true, Some([_, _, _, _])) => Found::Foreign,
        _ if marked => Found::Wrecked,
        _ if header.is_empty() => Found::New,
        _ => Found::Foreign,
    })
}

/// Whether nothing is left of a file, or a byte: SQLite takes that for a new one, even if it only reads, and removes the
/// WAL beside it, in which everything may lie.
pub(crate) fn is_cut_to_nothing(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|file| file.len() <= 1)
}

/// Tells a file from every other that was or will be at its path; `None` where the file system does not say when it was
/// made, because the number alone is soon given again.
pub(super) fn mark_of(path: &Path) -> Option<String> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let metadata = std::fs::metadata(path).ok()?;
        let made = metadata.created().ok()?.duration_since(std::time::UNIX_EPOCH).ok()?;
        Some(format!("{}:{}:{}", metadata.dev(), metadata.ino(), made.as_nanos()))
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        None
    }
}

/// The bytes are not those that were written: the same as what SQLite says of its own pages.
pub(crate) fn damaged(what: impl Into<String>) -> rusqlite::Error {
    let code = rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CORRUPT);
    rusqlite::Error::SqliteFailure(code, Some(what.into()))
}

/// The file ends where a page should be, or the file system itself has noticed bad bytes.
const SHORT: [i32; 3] =
    [rusqlite::ffi::SQLITE_IOERR_SHORT_READ, rusqlite::ffi::SQLITE_IOERR_CORRUPTFS, rusqlite::ffi::SQLITE_IOERR_DATA];

/// Whether the bytes of the file are wrong, and not the disk full or the like. Our statements and our tables are right,
/// so a table that is missing or a value of another type is damage too.
pub(crate) fn is_damage(error: &rusqlite::Error) -> bool {
    use rusqlite::Error as E;
    match error {
        E::SqliteFailure(failure, _) => {
            SHORT.contains(&failure.extended_code)
                || matches!(
                    failure.code,
                    ErrorCode::DatabaseCorrupt
                        | ErrorCode::NotADatabase
                        | ErrorCode::Unknown
                        | ErrorCode::TypeMismatch
                        | ErrorCode::TooBig
                        | ErrorCode::SchemaChanged
                )
        }
        E::SqlInputError { .. }
        | E::FromSqlConversionFailure(..)
        | E::IntegralValueOutOfRange(..)
        | E::InvalidColumnType(..)
        | E::QueryReturnedNoRows
        | E::Utf8Error(..) => true,
        _ => false,
    }
}

/// Whether there was no room on the disk: SQLite says so of its writes, and names the call where it fails otherwise.
pub(crate) fn is_full(error: &rusqlite::Error) -> bool {
    let rusqlite::Error::SqliteFailure(failure, _) = error else { return false };
    failure.code == ErrorCode::DiskFull
        || [
            rusqlite::ffi::SQLITE_IOERR_WRITE,
            rusqlite::ffi::SQLITE_IOERR_TRUNCATE,
            rusqlite::ffi::SQLITE_IOERR_SHMSIZE,
            rusqlite::ffi::SQLITE_IOERR_SHMMAP,
        ]
        .contains(&failure.extended_code)
}

/// A path with something behind its name.
pub(crate) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// Moves a damaged file and what belongs to it away, under a name that says when. Returns the new name, and which older
/// ones had to be removed for it.
pub(crate) fn set_aside(path: &Path, unix_millis: i64) -> std::io::Result<(PathBuf, Vec<PathBuf>)> {
    let mut aside = beside(path, &format!(".damaged-{unix_millis}"));
    let mut later = unix_millis;
    while aside.exists() {
        later += 1;
        aside = beside(path, &format!(".damaged-{later}"));
    }
    remove(&beside(path, "-shm"))?; // only an index of the WAL, made anew by whoever opens it
    match std::fs::rename(beside(path, "-wal"), beside(&aside, "-wal")) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    std::fs::rename(path, &aside)?;
    let removed = thin_out(path);
    Ok((aside, removed))
}

/// Removes the oldest damaged files beyond those that are kept.
fn thin_out(path: &Path) -> Vec<PathBuf> {
    let (Some(name), Some(parent)) = (path.file_name().and_then(|name| name.to_str()), path.parent()) else {
        return Vec::new();
    };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let prefix = format!("{name}.damaged-");
    let mut times: Vec<u64> = std::fs::read_dir(parent)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_prefix(&prefix)?.parse().ok())
        .collect();
    times.sort_unstable();
    let most = times.len().saturating_sub(KEPT);
    let old = times.into_iter().take(most).map(|time| parent.join(format!("{prefix}{time}")));
    old.filter(|old| remove(&beside(old, "-wal")).and_then(|()| std::fs::remove_file(old)).is_ok()).collect()
}

/// Removes a file that may not be there.
pub(crate) fn remove(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Why a WAL cannot be trusted: SQLite takes what comes before the first bad frame, silently. That is right for what a
/// dying process or machine left unfinished, but behind such a frame nothing follows of the same generation. If
/// something does, or the header itself is bad, commits are lost that were on the disk.
///
/// # Errors
/// It cannot be read.
pub(super) fn broken_wal(path: &Path) -> std::io::Result<Option<&'static str>> {
    const HEADER: usize = 32;
    const FRAME: usize = 24;
    let mut file = match File::open(beside(path, "-wal")) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let length = file.seek(SeekFrom::End(0))?;
    file.rewind()?;
    let mut header = [0; HEADER];
    if length < HEADER as u64 {
        return Ok(None); // SQLite has not got further than this
    }
    let mut file = std::io::BufReader::with_capacity(1 << 20, file);
    file.read_exact(&mut header)?;
    if header == [0; HEADER] {
        return Ok(None); // space without content: a power loss before the first commit
    }
    let word = |bytes: &[u8], at: usize| u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let big = match word(&header, 0) {
        0x377f_0682 => false,
        0x377f_0683 => true,
        _ => return Ok(Some("the header of its WAL is not one")),
    };
    let mut sum = [0, 0];
    checksum(&mut sum, &header[..24], big);
    if sum != [word(&header, 24), word(&header, 28)] || word(&header, 8) as usize != PAGE {
        return Ok(Some("the header of its WAL is damaged"));
    }
    let mut frame = vec![0; FRAME + PAGE];
    let mut bad = false;
    for _ in 0..(length - HEADER as u64) / frame.len() as u64 {
        file.read_exact(&mut frame)?;
        if frame[8..16] != header[16..24] {
            break; // of an earlier generation, or never written
        }
        if bad {
            return Ok(Some("frames of its WAL are damaged"));
        }
        checksum(&mut sum, &frame[..8], big);
        checksum(&mut sum, &frame[FRAME..], big);
        bad = sum != [word(&frame, 16), word(&frame, 20)];
    }
    Ok(None)
}

/// SQLite's checksum of a WAL (its file format, §4.2).
fn checksum(sum: &mut [u32; 2], bytes: &[u8], big: bool) {
    let [mut one, mut two] = *sum;
    for pair in bytes.chunks_exact(8) {
        let word = |at: usize| {
            let word = [pair[at], pair[at + 1], pair[at + 2], pair[at + 3]];
            if big { u32::from_be_bytes(word) } else { u32::from_le_bytes(word) }
        };
        one = one.wrapping_add(word(0)).wrapping_add(two);
        two = two.wrapping_add(word(4)).wrapping_add(one);
    }
    *sum = [one, two];
}
