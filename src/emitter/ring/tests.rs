use proptest::prelude::*;

use super::*;

/// Random histories of each kind; the environment variable `RING_CASES` asks for more.
fn cases() -> u32 {
    std::env::var("RING_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(200)
}

fn identity() -> Identity {
    Identity { emitter: "ada".into(), epoch: "e1".into() }
}

fn simulated(segments: usize) -> Ring {
    Ring::simulated(segments, &identity(), 7).expect("memory")
}

/// Writes one event, sealing and moving on as the outbox does.
fn write(writer: &mut Writer, blocks: &mut Vec<Block>, seq: u64, json: &[u8]) -> bool {
    if !writer.fits(json.len()) {
        blocks.extend(writer.seal());
        if !writer.make_room(json.len(), seq) {
            return false;
        }
    }
    writer.push(json, checksum(json), seq);
    writer.ring().note_last(seq);
    true
}

fn events(blocks: &[Block]) -> Vec<(u64, Vec<u8>)> {
    blocks.iter().flat_map(Block::events).map(|(seq, json)| (seq, json.to_vec())).collect()
}

fn after_a_kill(ring: &Ring) -> Left {
    revive(&ring.snapshot()).expect("memory").expect("a ring")
}

#[test]
fn what_was_written_outlives_a_kill_at_any_moment() {
    let mut writer = Writer::new(simulated(8));
    let (mut blocks, mut written) = (Vec::new(), Vec::new());
    for seq in 1..=700 {
        let json = vec![b'a' + (seq % 26) as u8; 1 + (seq * 37 % 900) as usize];
        assert!(write(&mut writer, &mut blocks, seq, &json));
        written.push((seq, json));
        if seq % 10 == 0 {
            blocks.extend(writer.seal()); // the driver has taken it
        }
        if seq % 97 == 0 {
            let left = after_a_kill(writer.ring());
            assert_eq!((events(&left.blocks), left.last, left.damaged), (written.clone(), seq, 0));
            assert_eq!((left.identity, left.id, left.same_boot), (Some(identity()), 7, true));
        }
    }
}

#[test]
fn what_comes_after_seqs_that_were_given_up_is_read_back_with_its_own() {
    let mut writer = Writer::new(simulated(4));
    let (mut blocks, mut written) = (Vec::new(), Vec::new());
    for seq in (1..=9).chain(30..=33).chain(35..=35).chain(90..=95) {
        if [30, 35, 90].contains(&seq) {
            blocks.extend(writer.seal()); // as the outbox does when it has no room
        }
        assert!(write(&mut writer, &mut blocks, seq, b"{\"n\":1}"));
        written.push((seq, b"{\"n\":1}".to_vec()));
        let left = after_a_kill(writer.ring());
        assert_eq!((events(&left.blocks), left.last, left.damaged), (written.clone(), seq, 0));
    }
}

#[test]
fn a_record_without_its_slot_was_never_accepted() {
    let mut writer = Writer::new(simulated(4));
    let mut blocks = Vec::new();
    for seq in 1..=3 {
        write(&mut writer, &mut blocks, seq, b"{\"n\":1}");
    }
    // Killed before the slot of the third was stored.
    let open = writer.open.as_ref().expect("open");
    writer.ring.0.memory.word(open.segment.slot(2)).store(0, Ordering::SeqCst);
    let left = after_a_kill(writer.ring());
    assert_eq!((events(&left.blocks).len(), left.damaged), (2, 0));
}

#[test]
fn a_segment_used_again_shows_nothing_of_its_earlier_use() {
    let mut writer = Writer::new(simulated(1));
    let mut blocks = Vec::new();
    let mut seq = 0;
    while write(&mut writer, &mut blocks, seq + 1, b"{}") {
        seq += 1;
    }
    assert!(seq > 4000, "{seq} small events in one segment");
    blocks.clear();
    writer.turn_page();
    assert_eq!(writer.ring().used(), 0);
    // Few and large: below their slots lie the bytes of the small ones, slots too.
    for n in 1..=5 {
        assert!(write(&mut writer, &mut blocks, seq + n, &[b'y'; 3000]));
    }
    let left = after_a_kill(writer.ring());
    assert_eq!((left.blocks.iter().map(Block::count).sum::<u64>(), left.damaged, left.last), (5, 0, seq + 5));
}

#[test]
fn a_large_event_takes_segments_in_a_row_and_small_ones_the_lowest() {
    let mut writer = Writer::new(simulated(8));
    let mut blocks = Vec::new();
    assert!(write(&mut writer, &mut blocks, 1, &[b'x'; 100]));
    assert!(write(&mut writer, &mut blocks, 2, &vec![b'x'; 200_000]));
    assert_eq!(writer.ring().used(), 5);
    assert!(write(&mut writer, &mut blocks, 3, &vec![b'x'; 60_000]));
    assert_eq!(writer.ring().used(), 5, "there is room behind the large one");
    assert!(!write(&mut writer, &mut blocks, 4, &vec![b'x'; 250_000]), "three in a row are free, four are needed");
    blocks.remove(0);
    assert!(write(&mut writer, &mut blocks, 4, &vec![b'x'; 60_000]));
    let open = writer.open.as_ref().expect("open");
    assert_eq!(open.segment.index, 0, "the lowest is used first");
    let left = after_a_kill(writer.ring());
    assert_eq!(left.blocks.iter().map(Block::first).collect::<Vec<_>>(), [2, 4]);
}

#[test]
fn a_block_keeps_its_segment_as_long_as_anybody_has_it() {
    let mut writer = Writer::new(simulated(2));
    let mut blocks = Vec::new();
    write(&mut writer, &mut blocks, 1, b"kept");
    let block = writer.seal().expect("a block");
    let copy = block.clone();
    writer.turn_page();
    drop(block);
    assert_eq!(writer.ring().used(), 1);
    assert_eq!(events(&[copy]), [(1, b"kept".to_vec())]);
    assert_eq!(writer.ring().used(), 0);
}

#[test]
fn a_file_gives_back_what_a_dropped_writer_left() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("x.ring");
    assert!(recover(&path).expect("readable").is_none());
    let ring = Ring::create(&path, 4, &identity(), 3).expect("created");
    assert_eq!(std::fs::metadata(&path).expect("there").len() as usize, PAGE + 4 * SEGMENT_BYTES);
    let (mut writer, mut blocks) = (Writer::new(ring.clone()), Vec::new());
    for seq in 10..=400 {
        assert!(write(&mut writer, &mut blocks, seq, &[b'z'; 400]));
    }
    ring.note_acked(9);
    ring.sync().expect("synced");
    std::fs::write(home.path().join("copy"), std::fs::read(&path).expect("readable")).expect("writable");
    let left = recover(&home.path().join("copy")).expect("readable").expect("there");
    assert_eq!((events(&left.blocks).len(), left.acked, left.is_usable(4), left.is_usable(5)), (391, 9, true, false));
    ring.remove().expect("removed");
    assert!(!path.exists());
}

#[test]
fn a_file_that_others_removed_cannot_be_synced_and_one_that_is_no_longer_needed_can() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("x.ring");
    let ring = Ring::create(&path, 4, &identity(), 3).expect("created");
    ring.sync().expect("synced");
    std::fs::remove_file(&path).expect("there");
    let error = ring.sync().expect_err("nobody would find it");
    assert!(error.to_string().contains("was removed"), "{error}");

    let ring = Ring::create(&path, 4, &identity(), 3).expect("created");
    ring.remove().expect("removed");
    ring.sync().expect("everything in it is elsewhere");
}

#[test]
fn a_cut_or_foreign_file_is_read_as_far_as_it_goes() {
    let home = tempfile::tempdir().expect("writable");
    let path = home.path().join("x.ring");
    for garbage in [vec![], vec![0; 10], vec![0xff; 200_000], b"SQLite format 3\0".repeat(10_000)] {
        std::fs::write(&path, garbage).expect("writable");
        assert!(recover(&path).expect("readable").is_none(), "it never was a ring");
    }
    let mut writer = Writer::new(simulated(3));
    let mut blocks = Vec::new();
    for seq in 1..=400 {
        write(&mut writer, &mut blocks, seq, &[b'z'; 400]);
    }
    let bytes = writer.ring().snapshot();
    std::fs::write(&path, &bytes[..PAGE + 2 * SEGMENT_BYTES]).expect("writable");
    let left = recover(&path).expect("readable").expect("there");
    assert!(left.damaged > 0 && !left.is_usable(3));
    assert!(events(&left.blocks).len() > 300);
}

#[test]
fn a_full_disk_is_an_error_that_says_what_is_needed() {
    let home = tempfile::tempdir().expect("writable");
    let error = Ring::create(&home.path().join("x.ring"), 1 << 30, &identity(), 1).expect_err("64 TiB");
    assert_eq!(error.kind(), ErrorKind::SpillIo);
    assert!(error.to_string().contains("cannot reserve 70368744181760 bytes"), "{error}");
    assert!(!home.path().join("x.ring").exists(), "nothing is left of the attempt");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(cases()))]

    /// Append, take, acknowledge and die, at random, against a plain list.
    #[test]
    fn a_ring_keeps_what_a_list_keeps(steps in prop::collection::vec((0u8..10, 1usize..70_000), 1..120)) {
        let mut writer = Writer::new(simulated(6));
        let (mut list, mut seq, mut acked): (Vec<(u64, Vec<u8>)>, u64, u64) = (Vec::new(), 0, 0);
        let mut held: Vec<Block> = Vec::new();
        for (what, size) in steps {
            match what {
                0..=5 => {
                    let json = vec![(size % 251) as u8; if what < 4 { 1 + size % 700 } else { size }];
                    if write(&mut writer, &mut held, seq + 1, &json) {
                        seq += 1;
                        list.push((seq, json));
                    }
                }
                6 => held.extend(writer.seal()),
                7 | 8 => {
                    held.extend(writer.seal());
                    let take = size % (held.len() + 1);
                    acked = held[..take].last().map_or(acked, |block| acked.max(block.last()));
                    writer.ring().note_acked(acked);
                    held.drain(..take);
                    list.retain(|(seq, _)| *seq > acked);
                }
                _ => {
                    let left = after_a_kill(writer.ring());
                    prop_assert_eq!((left.damaged, left.last, left.acked), (0, seq, acked));
                    held = left.blocks.iter().filter_map(|block| block.after(acked)).collect();
                    prop_assert_eq!(&events(&held), &list);
                    writer = Writer::new(left.ring);
                    held = left.blocks;
                }
            }
            let found: Vec<_> = events(&held).into_iter().filter(|(seq, _)| *seq > acked).collect();
            prop_assert!(list.starts_with(&found));
        }
    }

    /// Bits flip and pages are lost: what comes back was written, in order, and what is missing is told as damage.
    #[test]
    fn damage_never_invents_an_event(
        sizes in prop::collection::vec(1usize..3000, 1..150),
        flips in prop::collection::vec((any::<prop::sample::Index>(), 0u8..8), 0..6),
        lost in prop::collection::vec(any::<prop::sample::Index>(), 0..3),
    ) {
        let mut writer = Writer::new(simulated(6));
        let (mut held, mut list) = (Vec::new(), Vec::new());
        for (seq, size) in (1..).zip(sizes) {
            let json = vec![(seq % 251) as u8; size];
            if write(&mut writer, &mut held, seq, &json) {
                list.push((seq, json));
            }
            if seq % 7 == 0 {
                held.extend(writer.seal());
            }
        }
        let mut bytes = writer.ring().snapshot();
        for (at, bit) in &flips {
            let at = PAGE + at.index(bytes.len() - PAGE);
            bytes[at] ^= 1 << bit;
        }
        for page in &lost {
            let at = PAGE + page.index(bytes.len() / PAGE - 1) * PAGE;
            bytes[at..at + PAGE].fill(0);
        }
        let left = revive(&bytes).expect("memory").expect("its header is whole");
        let found = events(&left.blocks);
        let mut rest = list.iter();
        for event in &found {
            prop_assert!(rest.any(|known| known == event), "seq {} was never written so, or not there", event.0);
        }
        if flips.is_empty() && lost.is_empty() {
            prop_assert_eq!(found, list);
        }
    }

    /// After a power loss each page is as it was synced last, or as it was written since. What a sync covered is there.
    #[test]
    fn what_was_synced_outlives_a_power_loss(
        steps in prop::collection::vec((0u8..12, 1usize..3000), 1..200),
        seed in any::<u64>(),
    ) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut writer = Writer::new(simulated(4));
        let mut synced = writer.ring().snapshot();
        let (mut covered, mut seq, mut acked) = (0, 0, 0);
        let (mut held, mut list): (Vec<Block>, Vec<(u64, Vec<u8>)>) = (Vec::new(), Vec::new());
        for (what, size) in steps {
            match what {
                0..=6 => {
                    let json = vec![(size % 251) as u8; size];
                    if write(&mut writer, &mut held, seq + 1, &json) {
                        seq += 1;
                        list.push((seq, json));
                    }
                }
                7 | 8 => {
                    held.extend(writer.seal());
                    let take = size % (held.len() + 1);
                    acked = held[..take].last().map_or(acked, |block| acked.max(block.last()));
                    writer.ring().note_acked(acked);
                    held.drain(..take);
                }
                _ => (synced, covered) = (writer.ring().pages(), seq),
            }
            if size % 4 > 0 {
                continue;
            }
            let mut after = writer.ring().pages();
            for (page, old) in after.chunks_mut(PAGE).zip(synced.chunks(PAGE)) {
                if rng.bool() {
                    page.copy_from_slice(old);
                }
            }
            let Some(left) = revive(&after).expect("memory") else {
                prop_assert_eq!(covered, 0, "the header was synced");
                continue;
            };
            let found = events(&left.blocks);
            for event in list.iter().filter(|(seq, _)| *seq > acked && *seq <= covered) {
                prop_assert!(found.contains(event), "seq {} was synced and is gone", event.0);
            }
            let mut rest = list.iter();
            for event in &found {
                prop_assert!(rest.any(|known| known == event), "seq {} was never written so, or not there", event.0);
            }
        }
    }

    #[test]
    fn no_header_makes_recovery_panic(words in prop::collection::vec(any::<u64>(), 1..80), segment in prop::collection::vec(any::<u64>(), 0..64)) {
        let mut bytes = simulated(2).snapshot();
        for (at, word) in (WORD..).step_by(WORD).zip(&words) {
            bytes[at..at + WORD].copy_from_slice(&word.to_ne_bytes());
        }
        for (at, word) in (PAGE..).step_by(WORD).zip(&segment) {
            bytes[at..at + WORD].copy_from_slice(&word.to_ne_bytes());
        }
        let left = revive(&bytes).expect("memory").expect("the magic is there");
        prop_assert!(left.blocks.len() <= 2 * SEGMENT_BYTES);
    }
}
