//! Why a connection was closed, as data. The range is the behaviour: 1000–2999 are RFC 6455's and 3000–3499 say
//! *come back*, 3500–3999 *do not*, 4000–4499 and 4500–4999 the same for applications (Centrifugo's convention).

/// Close codes that the hub sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum CloseCode {
    /// Ordinary end (RFC 6455 §7.4.1).
    Normal = 1000,
    /// The hub stops; come back later.
    Shutdown = 3001,
    /// The token has expired; come back with a fresh one.
    TokenExpired = 3005,
    /// The token could not be checked at the moment; come back.
    AuthUnavailable = 3006,
    /// The session reads too slowly; come back and recover.
    Slow = 3008,
    /// No answer to pings; come back.
    NoPong = 3012,
    /// Another connection took over this emitter; come back only if it is gone.
    Superseded = 3013,
    /// The hub cannot keep events at the moment; come back.
    Degraded = 3014,
    /// The hub's log began anew, or lost a stretch: come back, and be told so.
    Restarted = 3015,
    /// A frame broke the protocol; coming back would repeat it.
    BadFrame = 3501,
    /// Not allowed; coming back with the same credentials would be refused again.
    Unauthorized = 3500,
    /// A frame or event over the size limit.
    TooLarge = 3502,
    /// More frames or connections than are allowed.
    TooMany = 3503,
}

impl CloseCode {
    /// The number on the wire.
    #[must_use]
    pub fn code(self) -> u16 {
        self as u16
    }
}

/// Whether a client that was closed with `code` should connect again.
#[must_use]
pub fn comes_back(code: u16) -> bool {
    !matches!(code, 3500..=3999 | 4500..=4999)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_range_is_the_behaviour() {
        assert!(comes_back(CloseCode::Slow.code()) && comes_back(1006) && comes_back(4100));
        assert!(!comes_back(CloseCode::BadFrame.code()) && !comes_back(4999));
    }
}
