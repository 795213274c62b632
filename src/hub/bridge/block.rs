//! Records as bytes, the same on the bus and in its stream: each as its length in 32 bits, little-endian, the highest bit
//! set for a gap, and its JSON.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::hub::entry::Record;
use crate::wire::subscriber::Carried;

const GAP: u32 = 1 << 31;

/// What one record takes beside its JSON.
pub const HEAD: usize = 4;

/// The records, one after another.
#[must_use]
pub fn encode(records: &[Record]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(records.iter().map(|record| HEAD + record.json().len()).sum());
    for record in records {
        let gap = if record.carried() == Carried::Gap { GAP } else { 0 };
        bytes.put_u32_le(record.json().len() as u32 | gap);
        bytes.extend_from_slice(record.json());
    }
    bytes.freeze()
}

/// `count` records without the first `skip`, sharing the bytes. What cannot be read becomes a gap in its place, so that
/// offsets stay what they are.
#[must_use]
pub fn decode(mut bytes: Bytes, count: u64, skip: u64) -> Vec<Record> {
    (0..count)
        .map(|_| next(&mut bytes))
        .skip(skip as usize)
        .map(|record| record.and_then(as_record).unwrap_or_else(unreadable))
        .collect()
}

fn next(bytes: &mut Bytes) -> Option<(bool, Bytes)> {
    let head = bytes.try_get_u32_le().ok()?;
    let length = (head & !GAP) as usize;
    (length <= bytes.len()).then(|| (head & GAP != 0, bytes.split_to(length)))
}

fn as_record((gap, json): (bool, Bytes)) -> Option<Record> {
    if gap { Some(Record::stored_gap(json)) } else { Record::event(json).ok() }
}

fn unreadable() -> Record {
    Record::stored_gap(Bytes::from_static(br#"{"reason":"unreadable"}"#))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(json: &'static str) -> Record {
        Record::event(Bytes::from_static(json.as_bytes())).expect("valid")
    }

    fn texts(records: &[Record]) -> Vec<(Carried, String)> {
        records.iter().map(|r| (r.carried(), String::from_utf8_lossy(r.json()).into_owned())).collect()
    }

    #[test]
    fn records_come_back_as_they_were() {
        let records = [event(r#"{"type":"a"}"#), Record::gap("e", "1", 2, 3, "crash"), event("{}")];
        let bytes = encode(&records);
        assert_eq!(texts(&decode(bytes.clone(), 3, 0)), texts(&records));
        assert_eq!(texts(&decode(bytes, 3, 1)), texts(&records[1..]));
    }

    #[test]
    fn what_cannot_be_read_is_a_gap_in_its_place() {
        let mut bytes = encode(&[event("{}"), event("{}")]).to_vec();
        bytes[4] = b'['; // no object
        let records = decode(bytes.clone().into(), 3, 0);
        let kinds: Vec<_> = records.iter().map(Record::carried).collect();
        assert_eq!(kinds, [Carried::Gap, Carried::Event, Carried::Gap]);
        bytes[0] = 200; // longer than there is
        assert!(decode(bytes.into(), 3, 0).iter().all(|record| record.carried() == Carried::Gap));
    }
}
