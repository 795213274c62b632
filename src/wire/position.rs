//! Where a subscriber or an emitter stands: an offset is only meaningful within its epoch.

use serde::{Deserialize, Serialize};

/// A place in a hub's log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Changes whenever offsets could repeat. Never empty: an empty one would match by accident.
    pub epoch: String,
    /// Offset of the last event seen; 0 before the first.
    pub offset: u64,
}

/// A fresh epoch: 64 random bits as 13 characters of Crockford's base 32.
#[must_use]
pub fn epoch_from(random: u64) -> String {
    const DIGITS: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";
    (0..13).map(|i| char::from(DIGITS[(random >> (60 - 5 * i)) as usize & 31])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_are_never_empty_and_differ() {
        assert_eq!(epoch_from(0), "0000000000000");
        assert_eq!(epoch_from(u64::MAX), "fzzzzzzzzzzzz");
        assert_ne!(epoch_from(1), epoch_from(2));
    }
}
