//! The fuzz targets, with every test run: the kept corpus, and seeded changes of it.
//!
//! `FUZZ=100000` is the long form; `FUZZ_SEED=n FUZZ_TARGET=name` repeats a run. A failing input is kept in
//! `target/fuzz-<target>`; move it to `fuzz/corpus/<target>/` with the mend.

#![expect(clippy::print_stderr, reason = "the seed, and where the input lies")]

#[path = "../../fuzz/targets.rs"]
#[expect(unreachable_pub, reason = "to the other driver it is a library")]
mod targets;

use std::panic::catch_unwind;
use std::path::Path;

use fastrand::Rng;
use targets::{TARGETS, Target};

/// Inputs for each target.
const INPUTS: u64 = 20_000;
/// What a random byte hardly ever becomes.
const WORDS: [&[u8]; 16] = [
    b"\"type\":",
    b"\"data\":",
    b"subscribe",
    b"\"since\":{\"epoch\":\"k3f9\",\"offset\":0}",
    b"18446744073709551615",
    b"-1",
    b"*",
    b".*",
    b"/",
    b"\\u0000",
    b"\xff",
    b"[[[[[[[[",
    b"\r\n\r\n",
    b"Sec-WebSocket-Key: ",
    b"null",
    b"1e999",
];

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
    let mut files: Vec<_> = folder.read_dir().expect("a corpus").map(|entry| entry.expect("readable").path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", folder.display());
    files.iter().map(|path| std::fs::read(path).expect("readable")).collect()
}

fn changed(rng: &mut Rng, corpus: &[Vec<u8>]) -> Vec<u8> {
    let any = |rng: &mut Rng| corpus[rng.usize(..corpus.len())].clone();
    let mut input = any(rng);
    for _ in 0..rng.usize(1..8) {
        let at = rng.usize(..=input.len());
        let most = rng.usize(1..40);
        let end = rng.usize(at..=input.len().min(at + most));
        match rng.u32(0..7) {
            0 if at < input.len() => input[at] ^= 1 << rng.u32(0..8),
            1 if at < input.len() => input[at] = rng.u8(..),
            2 => drop(input.drain(at..end)),
            3 => {
                let copy = input[at..end].to_vec();
                input.splice(at..at, copy);
            }
            4 => drop(input.splice(at..end, WORDS[rng.usize(..WORDS.len())].iter().copied())),
            5 => {
                let other = any(rng);
                input.splice(at..end, other[rng.usize(..=other.len())..].iter().copied());
            }
            _ => input.truncate(end),
        }
    }
    input
}

fn run((name, target): Target, seed: u64, inputs: u64) {
    let corpus = corpus(name);
    let mut rng = Rng::with_seed(seed);
    let changes = (0..inputs).map(|_| changed(&mut rng, &corpus));
    for input in corpus.clone().into_iter().chain(changes) {
        if catch_unwind(|| target(&input)).is_err() {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("target/fuzz-{name}"));
            std::fs::write(&path, &input).expect("written");
            panic!("{} breaks {name} (FUZZ_SEED={seed} FUZZ_TARGET={name})", path.display());
        }
    }
}

#[test]
fn hostile_bytes_break_no_promise() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let only = std::env::var("FUZZ_TARGET").ok();
    let seed = number("FUZZ_SEED").unwrap_or_else(|| fastrand::u64(..) >> 16);
    let inputs = number("FUZZ").unwrap_or(INPUTS);
    eprintln!("FUZZ_SEED={seed}");
    for target in TARGETS.into_iter().filter(|(name, _)| only.as_deref().is_none_or(|only| only == *name)) {
        // Each of these takes a connection.
        let inputs = if target.0 == "http" { inputs / 100 } else { inputs };
        run(target, seed, inputs);
    }
}
