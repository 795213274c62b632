//! Shared by the tools: options of the form `--name value`, and an end that follows the parent's.

use std::io::Read;
use std::str::FromStr;

/// The value after `--name`, or `default` where the option is absent.
///
/// # Panics
/// When the value is absent or cannot be read as a `T`: these are tools, a message and an exit are enough.
pub fn option<T: FromStr>(name: &str, default: T) -> T {
    let flag = format!("--{name}");
    let mut arguments = std::env::args().skip_while(|argument| *argument != flag);
    match (arguments.next(), arguments.next()) {
        (None, _) => default,
        (Some(_), Some(value)) => value.parse().unwrap_or_else(|_| panic!("{flag}: cannot read {value:?}")),
        (Some(_), None) => panic!("{flag} needs a value"),
    }
}

/// Ends this process when its standard input closes, so that no tool outlives the script that started it.
pub fn end_with_parent() {
    std::thread::spawn(|| {
        let mut byte = [0];
        while std::io::stdin().read(&mut byte).is_ok_and(|n| n > 0) {}
        std::process::exit(0);
    });
}

/// WebSocket frames of a client, just enough of RFC 6455 for a load generator.
pub mod websocket {
    use std::net::SocketAddr;

    /// Masks of zeros are valid (section 5.3) and cost nothing; loopback needs no protection from proxies.
    const MASK: [u8; 4] = [0; 4];

    /// The request that opens a session at `path`.
    #[must_use]
    pub fn request(address: SocketAddr, path: &str) -> String {
        format!(
            "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
             Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
    }

    /// Where the answer to it ends in `bytes`, and whether it is a yes; `None` while it is incomplete.
    #[must_use]
    pub fn answer(bytes: &[u8]) -> Option<(usize, bool)> {
        let end = memchr::memmem::find(bytes, b"\r\n\r\n")? + 4;
        Some((end, bytes.starts_with(b"HTTP/1.1 101")))
    }

    /// Appends a masked frame.
    pub fn frame(out: &mut Vec<u8>, opcode: u8, payload: &[u8]) {
        out.push(0x80 | opcode);
        match payload.len() {
            len @ 0..126 => out.push(0x80 | len as u8),
            len @ 126..65_536 => {
                out.push(0x80 | 0x7e);
                out.extend_from_slice(&(len as u16).to_be_bytes());
            }
            len => {
                out.push(0x80 | 0x7f);
                out.extend_from_slice(&(len as u64).to_be_bytes());
            }
        }
        out.extend_from_slice(&MASK);
        out.extend_from_slice(payload);
    }

    /// Opcode, size of the header and of the payload of a server's frame; `None` while the header is incomplete.
    #[must_use]
    pub fn header(bytes: &[u8]) -> Option<(u8, usize, usize)> {
        let opcode = bytes.first()? & 15;
        Some(match bytes.get(1)? & 127 {
            126 => (opcode, 4, usize::from(u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?))),
            127 => (opcode, 10, u64::from_be_bytes(bytes.get(2..10)?.try_into().ok()?) as usize),
            short => (opcode, 2, usize::from(short)),
        })
    }
}
