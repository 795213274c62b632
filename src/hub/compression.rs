//! The compressed form of an event's data, for sessions that take it: made when the first of them needs it, at most
//! once for each event, and shared by all, live and replayed, whatever their filters.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;
use flate2::{Compress, FlushCompress, Status};
use foldhash::fast::RandomState;

use super::entry::Entry;

/// Bound of the forms that are kept: a replay's worth of ordinary events.
pub const KEPT_BYTES: usize = 8 << 20;
/// What a form costs beside its bytes.
const FORM_BYTES: usize = 96;
/// The quickest that finds repetitions at all. JSON repeats its names; what the levels above find beyond that is not
/// worth several times the time, which is the time of the hub's one thread.
const LEVEL: u32 = 1;

/// See the module.
#[derive(Debug)]
pub struct Compression {
    /// Data of fewer bytes stays text; `None`: all of it.
    threshold: Option<usize>,
    /// Some 300 KiB, made for the first event.
    zlib: Option<Box<Compress>>,
    scratch: Vec<u8>,
    /// By offset; `None` for data that does not become smaller.
    kept: HashMap<u64, Option<Bytes>, RandomState>,
    /// In the order in which they were made.
    order: VecDeque<u64>,
    bytes: usize,
    runs: u64,
}

impl Compression {
    /// Nothing is compressed yet.
    #[must_use]
    pub fn new(threshold: Option<usize>) -> Self {
        Self {
            threshold,
            zlib: None,
            scratch: Vec::new(),
            kept: HashMap::default(),
            order: VecDeque::new(),
            bytes: 0,
            runs: 0,
        }
    }

    /// Whether anything is ever compressed.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.threshold.is_some()
    }

    /// How often something was compressed.
    #[must_use]
    pub fn runs(&self) -> u64 {
        self.runs
    }

    /// Forgets the forms: the log has other entries at these offsets now.
    pub fn clear(&mut self) {
        self.kept.clear();
        self.order.clear();
        self.bytes = 0;
    }

    /// Whether an entry's data is large enough to be compressed.
    #[must_use]
    pub fn is_worth(&self, entry: &Entry) -> bool {
        self.threshold.is_some_and(|threshold| entry.record.json().len() >= threshold)
    }

    /// The data as a zlib stream; `None` if it is better sent as text.
    pub fn of(&mut self, entry: &Entry) -> Option<Bytes> {
        if !self.is_worth(entry) {
            return None;
        }
        if let Some(known) = self.kept.get(&entry.offset) {
            return known.clone();
        }
        self.runs += 1;
        let form = self.compress(entry.record.json());
        self.bytes += cost(form.as_ref());
        self.kept.insert(entry.offset, form.clone());
        self.order.push_back(entry.offset);
        while self.bytes > KEPT_BYTES
            && let Some(oldest) = self.order.pop_front()
        {
            self.bytes -= self.kept.remove(&oldest).map_or(0, |form| cost(form.as_ref()));
        }
        form
    }

    fn compress(&mut self, data: &[u8]) -> Option<Bytes> {
        /// A larger buffer than this is not kept for the next event.
        const SCRATCH_BYTES: usize = 256 << 10;
        let level = flate2::Compression::new(LEVEL);
        let zlib = self.zlib.get_or_insert_with(|| Box::new(Compress::new(level, true)));
        zlib.reset();
        self.scratch.clear();
        // No room for a form that is not smaller.
        self.scratch.reserve_exact(data.len());
        let done = zlib.compress_vec(data, &mut self.scratch, FlushCompress::Finish);
        let smaller = matches!(done, Ok(Status::StreamEnd)) && self.scratch.len() < data.len();
        let form = smaller.then(|| Bytes::copy_from_slice(&self.scratch));
        if self.scratch.capacity() > SCRATCH_BYTES {
            self.scratch = Vec::new();
        }
        form
    }
}

fn cost(form: Option<&Bytes>) -> usize {
    FORM_BYTES + form.map_or(0, Bytes::len)
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;
    use crate::hub::entry::Record;

    fn entry(offset: u64, json: String) -> Entry {
        Entry { offset, record: Record::event(json.into()).expect("valid") }
    }

    fn repetitive(offset: u64, bytes: usize) -> Entry {
        entry(offset, format!(r#"{{"n":{offset},"text":"{}"}}"#, "abc ".repeat(bytes / 4)))
    }

    #[test]
    fn it_is_a_zlib_stream_made_once() {
        let mut compression = Compression::new(Some(100));
        for offset in 1..=3 {
            let entry = repetitive(offset, 10_000);
            let form = compression.of(&entry).expect("smaller");
            let mut data = Vec::new();
            flate2::read::ZlibDecoder::new(&form[..]).read_to_end(&mut data).expect("a zlib stream");
            assert_eq!(data, entry.record.json()[..]);
            assert_eq!(compression.of(&entry), Some(form));
            assert_eq!(compression.runs(), offset);
        }
    }

    #[test]
    fn what_is_small_or_does_not_become_smaller_stays_text_and_is_not_tried_again() {
        let mut compression = Compression::new(Some(100));
        assert_eq!(compression.of(&repetitive(1, 50)), None);
        assert_eq!(compression.runs(), 0);
        let mut rng = fastrand::Rng::with_seed(7);
        let noise: String = (0..10_000).map(|_| char::from_u32(rng.u32(0x4e00..0x9000)).expect("CJK")).collect();
        let noise = entry(2, format!(r#"{{"":"{noise}"}}"#));
        assert_eq!((compression.of(&noise), compression.of(&noise)), (None, None));
        assert_eq!(compression.runs(), 1);
        assert_eq!(Compression::new(None).of(&repetitive(1, 10_000)), None);
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let mut compression = Compression::new(Some(100));
        let mut rng = fastrand::Rng::with_seed(7);
        for offset in 1..=400 {
            let letters: String = (0..50_000).map(|_| rng.alphanumeric()).collect();
            compression.of(&entry(offset, format!(r#"{{"":"{letters}"}}"#))).expect("smaller");
            let kept: usize = compression.kept.values().map(|form| cost(form.as_ref())).sum();
            assert!(compression.bytes == kept && kept <= KEPT_BYTES, "{kept}");
        }
        assert!(compression.kept.len() < 400 && compression.kept.len() == compression.order.len());
    }

    /// `cargo test --no-default-features --lib compression -- --ignored --nocapture`
    #[test]
    #[ignore = "a measurement, for docs/decisions/0014-replay-and-slow-sessions.md"]
    #[expect(clippy::print_stdout, reason = "its output is its purpose")]
    fn microseconds_for_each_level() {
        let node = |n: u64| {
            format!(
                r#"{{"id":"n{n}","label":"service {n}","x":{}.25,"y":{}.5,"state":"healthy","load":0.{n}}}"#,
                n * 7,
                n * 13
            )
        };
        for nodes in [10, 100, 1000] {
            let data = format!(
                r#"{{"type":"graph.snapshot","nodes":[{}]}}"#,
                (0..nodes).map(node).collect::<Vec<_>>().join(",")
            );
            for level in [1, 3, 6] {
                let mut zlib = Compress::new(flate2::Compression::new(level), true);
                let begin = std::time::Instant::now();
                let mut out = Vec::with_capacity(data.len());
                for _ in 0..200 {
                    zlib.reset();
                    out.clear();
                    zlib.compress_vec(data.as_bytes(), &mut out, FlushCompress::Finish).expect("compressed");
                }
                println!("{} bytes, level {level}: {} bytes, {:?}", data.len(), out.len(), begin.elapsed() / 200);
            }
        }
    }
}
