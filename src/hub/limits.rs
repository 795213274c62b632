//! How much a client may ask of the hub: frames of a session, and connections. Pure: time is an argument.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

/// So much at once, and so much in a second from then on.
#[derive(Clone, Debug)]
pub struct Bucket {
    rate: f64,
    burst: f64,
    tokens: f64,
    at: Duration,
}

impl Bucket {
    /// A full one.
    #[must_use]
    pub fn new(rate: f64, burst: f64, now: Duration) -> Self {
        Self { rate, burst, tokens: burst, at: now }
    }

    /// Takes one that may not be there yet; how long it takes until it is.
    pub fn owe(&mut self, now: Duration) -> Duration {
        self.refill(now);
        self.tokens -= 1.0;
        Duration::from_secs_f64((-self.tokens / self.rate).max(0.0))
    }

    fn refill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.at).as_secs_f64();
        self.at = self.at.max(now);
        self.tokens = (self.tokens + passed * self.rate).min(self.burst);
    }

    /// Takes `n`, if they are there.
    pub fn take(&mut self, n: usize, now: Duration) -> bool {
        self.refill(now);
        let enough = self.tokens >= n as f64;
        if enough {
            self.tokens -= n as f64;
        }
        enough
    }
}

/// Counts the frames in what a client sends, by their headers alone (RFC 6455 §5.2): pings, pongs and fragments cost
/// work too, and the WebSocket layer tells of a message only when it is whole.
#[derive(Clone, Debug, Default)]
pub struct FrameCount {
    /// Bytes of a header that is not whole yet.
    header: [u8; 14],
    /// How many of them.
    have: usize,
    /// Bytes of the payload that are still to come.
    payload: u64,
}

impl FrameCount {
    /// How many frames begin in these bytes.
    pub fn count(&mut self, mut bytes: &[u8]) -> usize {
        let mut begun = 0;
        while !bytes.is_empty() {
            if self.payload > 0 {
                let skip = self.payload.min(bytes.len() as u64);
                self.payload -= skip;
                bytes = &bytes[skip as usize..];
                continue;
            }
            begun += usize::from(self.have == 0);
            self.header[self.have] = bytes[0];
            self.have += 1;
            bytes = &bytes[1..];
            if let Some(payload) = payload(&self.header[..self.have]) {
                self.payload = payload;
                self.have = 0;
            }
        }
        begun
    }
}

/// Length of the payload, once the header is whole.
fn payload(header: &[u8]) -> Option<u64> {
    let second = *header.get(1)?;
    let (short, mask) = (second & 0x7f, usize::from(second & 0x80 != 0) * 4);
    let more = match short {
        126 => 2,
        127 => 8,
        _ => 0,
    };
    if header.len() < 2 + more + mask {
        return None;
    }
    let length = header[2..2 + more].iter().fold(0, |length, byte| length << 8 | u64::from(*byte));
    Some(if more == 0 { u64::from(short) } else { length })
}

/// Why a connection is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TooMany {
    /// More than `connect_rate` in a second, of all clients together.
    Rate,
    /// This address has as many sessions as it may have.
    FromAddress,
}

/// Who connects, how often, and from where.
#[derive(Debug)]
pub struct Connections {
    rate: Bucket,
    /// Connections of every kind. Each session has one, and others ask for a page or a number.
    accepting: Bucket,
    most: Option<usize>,
    /// Sessions of each address; kept only if they are bounded.
    from: HashMap<IpAddr, usize>,
}

impl Connections {
    /// At most `rate` sessions begin in a second, as many at once, and `most` are open from one address. Connections are
    /// accepted twice as fast.
    #[must_use]
    pub fn new(rate: f64, most: Option<usize>) -> Self {
        let bucket = |rate: f64| Bucket::new(rate, rate.max(1.0), Duration::ZERO);
        Self { rate: bucket(rate), accepting: bucket(2.0 * rate), most, from: HashMap::new() }
    }

    /// A connection was accepted; how long the next one is to wait.
    pub fn accepted(&mut self, now: Duration) -> Duration {
        self.accepting.owe(now)
    }

    /// A session begins.
    ///
    /// # Errors
    /// [`TooMany`]; then nothing was counted.
    pub fn begin(&mut self, address: IpAddr, now: Duration) -> Result<(), TooMany> {
        let address = client(address);
        if self.most.is_some_and(|most| self.from.get(&address).is_some_and(|open| *open >= most)) {
            return Err(TooMany::FromAddress);
        }
        if !self.rate.take(1, now) {
            return Err(TooMany::Rate);
        }
        if self.most.is_some() {
            *self.from.entry(address).or_default() += 1;
        }
        Ok(())
    }

    /// A session of this address has ended.
    pub fn end(&mut self, address: IpAddr) {
        let address = client(address);
        if let Some(open) = self.from.get_mut(&address) {
            *open -= 1;
            if *open == 0 {
                self.from.remove(&address);
            }
        }
    }
}

/// Whose address it is: with IPv6 whoever has one has the 64 bits of addresses beside it.
fn client(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        address @ IpAddr::V4(_) => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_bucket_gives_its_burst_and_then_its_rate() {
        let mut bucket = Bucket::new(10.0, 20.0, SECOND);
        assert!(bucket.take(20, SECOND) && !bucket.take(1, SECOND));
        assert!(bucket.take(10, 2 * SECOND) && !bucket.take(1, 2 * SECOND));
        // Time that goes back gives nothing, and takes nothing away.
        assert!(!bucket.take(1, SECOND) && !bucket.take(1, 2 * SECOND));
        assert!(bucket.take(20, 100 * SECOND) && !bucket.take(1, 100 * SECOND));
    }

    fn frame(payload: usize, masked: bool) -> Vec<u8> {
        let mask = if masked { 0x80 } else { 0 };
        let mut frame = vec![0x82];
        match payload {
            0..=125 => frame.push(mask | payload as u8),
            126..=0xffff => {
                frame.push(mask | 0x7e);
                frame.extend((payload as u16).to_be_bytes());
            }
            _ => {
                frame.push(mask | 0x7f);
                frame.extend((payload as u64).to_be_bytes());
            }
        }
        frame.extend(vec![0xff; payload + if masked { 4 } else { 0 }]);
        frame
    }

    proptest! {
        #[test]
        fn frames_are_counted_wherever_the_bytes_are_cut(
            frames in prop::collection::vec((prop_oneof![0..130_usize, 65_530..65_540_usize], any::<bool>()), 0..8),
            cut in 1..1000_usize,
        ) {
            let bytes: Vec<u8> = frames.iter().flat_map(|(payload, masked)| frame(*payload, *masked)).collect();
            let mut count = FrameCount::default();
            let counted: usize = bytes.chunks(cut).map(|chunk| count.count(chunk)).sum();
            prop_assert_eq!(counted, frames.len());
        }
    }

    #[test]
    fn a_fleet_comes_back_and_a_flood_does_not_get_in() {
        let mut connections = Connections::new(5000.0, None);
        let address = IpAddr::from([127, 0, 0, 1]);
        let spread = |n: u32| SECOND * n / 2500;
        assert!((0..10_000).all(|n| connections.begin(address, spread(n)).is_ok()), "10 000 within 4 s");
        let flood = (0..20_000).filter(|_| connections.begin(address, 10 * SECOND).is_ok()).count();
        assert_eq!(flood, 5000);
    }

    #[test]
    fn connections_are_paced_and_never_for_longer_than_their_number_takes() {
        let mut connections = Connections::new(50.0, None);
        assert!((0..100).all(|_| connections.accepted(SECOND).is_zero()));
        let mut now = SECOND;
        for _ in 0..300 {
            now += connections.accepted(now);
        }
        assert!((3.9..4.1).contains(&now.as_secs_f64()), "{now:?}");
        assert!((0..100).all(|_| connections.accepted(100 * SECOND).is_zero()), "and a pause is forgiven");
    }

    #[test]
    fn sessions_of_an_address_are_bounded_and_forgotten_when_they_end() {
        let mut connections = Connections::new(5000.0, Some(2));
        let [one, other] = [IpAddr::from([127, 0, 0, 1]), IpAddr::from([127, 0, 0, 2])];
        let mapped: IpAddr = "::ffff:127.0.0.1".parse().expect("valid");
        assert!(connections.begin(one, SECOND).is_ok() && connections.begin(mapped, SECOND).is_ok());
        assert_eq!(connections.begin(one, SECOND), Err(TooMany::FromAddress));
        assert!(connections.begin(other, SECOND).is_ok());
        connections.end(mapped);
        assert!(connections.begin(one, SECOND).is_ok());
        for address in [one, one, other] {
            connections.end(address);
        }
        assert!(connections.from.is_empty());
        let [mine, too, hers]: [IpAddr; 3] =
            ["2001:db8::1", "2001:db8::ffff:1", "2001:db8:0:1::1"].map(|text| text.parse().expect("valid"));
        assert!(connections.begin(mine, SECOND).is_ok() && connections.begin(too, SECOND).is_ok());
        assert_eq!(connections.begin(mine, SECOND), Err(TooMany::FromAddress), "a network is one client");
        assert!(connections.begin(hers, SECOND).is_ok());
        for address in [too, mine, hers] {
            connections.end(address);
        }
        assert!(connections.from.is_empty());
    }
}
