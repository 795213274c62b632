//! How long a process that died leaves the next one waiting: recovery of a full ring, beside reading the same file.
//!
//! `ring_recovery --events FILE --ring FILE [--mib 64] [--rounds 15]` fills a ring of that size with the lines of
//! `--events` in turn, drops nothing of it, and then in turns, with the file in the page cache: recovers it, and reads the
//! file in pieces of a segment with CRC32C over everything. Prints the seconds of each round. The ring must not exist;
//! it is removed.

use std::fs::File;
use std::hint::black_box;
use std::io::Read as _;
use std::path::Path;
use std::time::Instant;

use benchmark_tools::option;
use safe_broadcaster::Result;
use safe_broadcaster::emitter::item::Identity;
use safe_broadcaster::emitter::ring::{Ring, SEGMENT_BYTES, Writer, checksum, recover};
use safe_broadcaster::wire::block::Block;

fn main() -> Result<()> {
    let events_path = option("events", String::new());
    let place = option("ring", String::new());
    let (mib, rounds): (usize, usize) = (option("mib", 64), option("rounds", 15));
    let text = std::fs::read_to_string(&events_path).expect("--events: a file of JSON lines");
    let events: Vec<&str> = text.lines().collect();
    let place = Path::new(&place);
    assert!(!place.exists(), "--ring: {} exists", place.display());

    let count = fill(place, (mib << 20) / SEGMENT_BYTES, &events)?;
    let (mut recovered, mut plain) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let began = Instant::now();
        let left = recover(place)?.expect("there is one");
        recovered.push(began.elapsed().as_secs_f64());
        assert_eq!((left.blocks.iter().map(Block::count).sum::<u64>(), left.last, left.damaged), (count, count, 0));
        std::mem::forget(left); // as if killed: dropped blocks are gone from the file too

        let began = Instant::now();
        black_box(read(place));
        plain.push(began.elapsed().as_secs_f64());
    }
    std::fs::remove_file(place).expect("it is ours");
    println!(r#"{{"events":{count},"recover":{recovered:?},"plain":{plain:?}}}"#);
    Ok(())
}

/// Writes events, in blocks of a segment, until there is no room; returns how many.
fn fill(place: &Path, segments: usize, events: &[&str]) -> Result<u64> {
    let identity = Identity { emitter: "benchmark".to_owned(), epoch: "benchmark".to_owned() };
    let mut writer = Writer::new(Ring::create(place, segments, &identity, 1)?);
    let (mut blocks, mut count) = (Vec::new(), 0);
    for (seq, json) in (1..).zip(events.iter().cycle().map(|line| line.as_bytes())) {
        if !writer.fits(json.len()) {
            blocks.extend(writer.seal());
            if !writer.make_room(json.len(), seq) {
                break;
            }
        }
        writer.push(json, checksum(json), seq);
        count = seq;
    }
    writer.ring().note_last(count);
    std::mem::forget((writer, blocks)); // as if killed
    Ok(count)
}

/// The CRC32C of the file.
fn read(place: &Path) -> u64 {
    let mut file = File::open(place).expect("it is ours");
    let mut piece = vec![0; SEGMENT_BYTES];
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    loop {
        match file.read(&mut piece).expect("it can be read") {
            0 => return digest.finalize(),
            n => digest.update(&piece[..n]),
        }
    }
}
