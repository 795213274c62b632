//! What the scripts answer and send, as values. A header is one line of words; `-` stands for no epoch.

use std::str::SplitAsciiWhitespace;

use bytes::Bytes;

use crate::hub::bridge::{Appended, Judged, Message, Place, Stretch};

/// A live message, a probe, or nothing that these scripts send.
pub(super) fn message(bytes: &Bytes) -> Option<Message> {
    let end = memchr::memchr(b'\n', bytes)?;
    let mut words = std::str::from_utf8(&bytes[..end]).ok()?.split_ascii_whitespace();
    Some(match words.next()? {
        "B" => {
            let epoch = words.next()?.to_owned();
            let (first, count) = (number(&mut words)?, number(&mut words)?);
            let by = (words.next()?.to_owned(), number(&mut words)?);
            let block = Stretch { first, count, records: bytes.slice(end + 1..) };
            return block.is_sound().then_some(Message::Block { epoch, by, block });
        }
        "H" => {
            let (epoch, head) = (words.next()?.to_owned(), number(&mut words)?);
            Message::Head { epoch, head, by: Some((words.next()?.to_owned(), number(&mut words)?)) }
        }
        "P" => Message::Probe { number: number(&mut words)?, place: probed(&mut words)? },
        "F" => Message::Free,
        _ => return None,
    })
}

/// What a join answers.
pub(super) fn as_joined(text: &str) -> Option<Place> {
    let mut words = text.split_ascii_whitespace();
    Some(Place {
        epoch: epoch(words.next()?),
        head: number(&mut words)?,
        run: words.next()?.to_owned(),
        ..Place::default()
    })
}

/// What a probe answers.
pub(super) fn as_probed(text: &str) -> Option<Place> {
    probed(&mut text.split_ascii_whitespace())
}

/// What an append answers, for so many entries.
pub(super) fn as_appended(text: &str, entries: usize) -> Option<Appended> {
    let mut words = text.split_ascii_whitespace();
    let epoch = epoch(words.next()?);
    let [first, count, receivers] = [number(&mut words)?, number(&mut words)?, number(&mut words)?];
    let judged = words.map(as_judged).collect::<Option<Vec<_>>>()?;
    (judged.len() == entries && first > 0).then_some(Appended { epoch, first, count, receivers, judged })
}

/// A block of the stream, by its id and its fields.
pub(super) fn as_block(id: &str, count: &str, records: Bytes) -> Option<Stretch> {
    let last: u64 = id.strip_suffix("-0")?.parse().ok()?;
    let count: u64 = count.parse().ok()?;
    let first = (last + 1).checked_sub(count)?;
    Some(Stretch { first, count, records }).filter(Stretch::is_sound)
}

fn probed(words: &mut SplitAsciiWhitespace<'_>) -> Option<Place> {
    let (epoch, head) = (epoch(words.next()?), number(words)?);
    let intake = words.next() == Some("1");
    let why = words.collect::<Vec<_>>().join(" ");
    Some(Place { epoch, head, intake, refuses: (!why.is_empty()).then_some(why), ..Place::default() })
}

fn epoch(word: &str) -> String {
    if word == "-" { String::new() } else { word.to_owned() }
}

fn number(words: &mut SplitAsciiWhitespace<'_>) -> Option<u64> {
    words.next()?.parse().ok()
}

fn as_judged(word: &str) -> Option<Judged> {
    match word {
        "0" => Some(Judged::Refused),
        "1" => Some(Judged::Kept),
        greeted => {
            let (have, before) = greeted.split_once(',')?;
            Some(Judged::Greeted { have: have.parse().ok()?, before: before.to_owned() })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(text: &'static str) -> Option<Message> {
        message(&Bytes::from_static(text.as_bytes()))
    }

    #[test]
    fn messages_are_read_and_anything_else_is_none() {
        let block = Stretch { first: 3, count: 2, records: Bytes::from_static(b"abc\ndefg") };
        let want = Message::Block { epoch: "e".into(), by: ("h".into(), 7), block };
        assert_eq!(heard("B e 3 2 h 7\nabc\ndefg"), Some(want));
        let want = Message::Head { epoch: "e".into(), head: 9, by: Some(("h".into(), 7)) };
        assert_eq!(heard("H e 9 h 7\n"), Some(want));
        let place = Place { intake: true, ..Place::default() };
        assert_eq!(heard("P 4 - 0 1\n"), Some(Message::Probe { number: 4, place }));
        let place = Place { epoch: "e".into(), head: 3, refuses: Some("OOM no room".into()), ..Place::default() };
        assert_eq!(heard("P 4 e 3 0 OOM no room\n"), Some(Message::Probe { number: 4, place }));
        assert_eq!(heard("F\n"), Some(Message::Free));
        for wrong in ["", "B e 3 1 h 7", "B e 0 1 h 7\nabcd", "B e 3 0 h 7\nabcd", "{}\n", "H e 3\n", "\n"] {
            assert_eq!(heard(wrong), None, "{wrong:?}");
        }
        assert_eq!(heard("B e 3 2 h 7\nabcdefg"), None, "there is no room for two");
        assert_eq!(heard("B e 18446744073709551615 1 h 7\nabcd"), None);
    }

    #[test]
    fn answers_are_read_whole_or_not_at_all() {
        let place = Place { epoch: "e".into(), head: 7, run: "r/2".into(), ..Place::default() };
        assert_eq!((as_joined("e 7 r/2"), as_joined("e 7"), as_joined("")), (Some(place), None, None));
        assert_eq!(as_probed("- 0 1"), Some(Place { intake: true, ..Place::default() }));
        let greeted = Judged::Greeted { have: 7, before: "h/1-0".into() };
        let judged = vec![Judged::Kept, Judged::Refused, greeted, Judged::Greeted { have: 0, before: String::new() }];
        let want = Appended { epoch: "e".into(), first: 5, count: 2, receivers: 3, judged };
        assert_eq!(as_appended("e 5 2 3 1 0 7,h/1-0 0,", 4), Some(want));
        assert_eq!(as_appended("e 5 2 3 1 0", 3), None);
        let twelve = Bytes::from_static(&[0; 12]);
        assert_eq!(as_block("9-0", "3", twelve.clone()).map(|block| block.first), Some(7));
        assert_eq!((as_block("2-0", "3", twelve.clone()), as_block("9-0", "4", twelve)), (None, None));
    }
}
