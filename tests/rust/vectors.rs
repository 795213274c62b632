//! The wire format is what `tests/vectors/frames.json` says, byte for byte.

use bytes::{Bytes, BytesMut};
use safe_broadcaster::wire::block::{Block, BlockBuilder};
use safe_broadcaster::wire::frame::{EmitterFrame, HubFrame};
use serde_json::Value;

fn vectors() -> Value {
    serde_json::from_str(include_str!("../vectors/frames.json")).expect("JSON")
}

fn list(section: &str) -> Vec<Value> {
    vectors()[section].as_array().expect("a list").clone()
}

fn bytes(case: &Value) -> Bytes {
    let hex = case["hex"].as_str().expect("hex");
    (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).expect("hex")).collect()
}

#[test]
fn control_frames_have_exactly_these_texts() {
    for case in list("emitter") {
        let text = case["text"].as_str().expect("text");
        assert_eq!(EmitterFrame::decode(text).expect("valid").encode(), text);
        assert_eq!(serde_json::from_str::<Value>(text).expect("JSON"), case["frame"]);
    }
    for case in list("hub") {
        let text = case["text"].as_str().expect("text");
        assert_eq!(HubFrame::decode(text).expect("valid").encode(), text);
        assert_eq!(serde_json::from_str::<Value>(text).expect("JSON"), case["frame"]);
    }
}

#[test]
fn blocks_have_exactly_these_bytes() {
    for case in list("blocks") {
        let first = case["first"].as_u64().expect("seq");
        let mut builder = BlockBuilder::new(first, BytesMut::new());
        for event in case["events"].as_array().expect("events") {
            builder.push(event.as_str().expect("JSON").as_bytes());
        }
        let block = builder.seal().expect("events");
        assert_eq!(block.bytes(), &bytes(&case));
        assert_eq!(Block::parse(bytes(&case)).expect("valid"), block);
    }
}

#[test]
fn what_is_no_block_is_refused() {
    for case in list("no_blocks") {
        assert!(Block::parse(bytes(&case)).is_err(), "{}", case["why"]);
    }
}
