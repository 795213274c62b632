//! How fast a plain Redis stream is read: the floor that the filling of a gap is compared with.
//!
//! `redis_floor --port P --event JSON [--entries 10000] [--page 500]` fills a stream with so many entries of one event
//! each, then reads them as pages of XRANGE, all in one pipeline, and prints how many a second; the stream is removed.

use std::time::Instant;

use benchmark_tools::option;
use redis::{RedisResult, pipe};

const STREAM: &str = "floor";

fn main() -> RedisResult<()> {
    let port: u16 = option("port", 0);
    let event: String = option("event", "{}".to_owned());
    let entries: usize = option("entries", 10_000);
    let page: usize = option("page", 500);
    let mut connection = redis::Client::open(("127.0.0.1", port))?.get_connection()?;

    let mut fill = pipe();
    fill.cmd("DEL").arg(STREAM).ignore();
    for number in 1..=entries {
        fill.cmd("XADD").arg(STREAM).arg(format!("{number}-0")).arg("e").arg(&event).ignore();
    }
    fill.exec(&mut connection)?;

    let began = Instant::now();
    let mut read = pipe();
    for first in (1..=entries).step_by(page) {
        read.cmd("XRANGE").arg(STREAM).arg(format!("{first}-0")).arg("+").arg("COUNT").arg(page);
    }
    let pages: Vec<Vec<(String, (String, Vec<u8>))>> = read.query(&mut connection)?;
    let took = began.elapsed().as_secs_f64();
    let got: Vec<_> = pages.iter().flatten().collect();
    assert!(got.iter().all(|(_, (_, body))| body == event.as_bytes()), "what was read is what was written");
    assert_eq!(got.len(), entries, "every entry was read once");

    redis::cmd("DEL").arg(STREAM).exec(&mut connection)?;
    println!(r#"{{"entries per second":{:.0}}}"#, entries as f64 / took);
    Ok(())
}
