//! Texts that are shown nowhere: not in logs, errors or debug output.

use std::fmt;

use ring::hmac;

/// See the module.
#[derive(Clone)]
pub struct Secret(Box<str>);

impl Secret {
    /// Hides a text.
    #[must_use]
    pub fn new(text: impl Into<Box<str>>) -> Self {
        Self(text.into())
    }

    /// The text itself, for whoever checks it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

/// Compared by their hashes, so that the time tells nothing of where they differ.
impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &[]);
        hmac::verify(&key, other.0.as_bytes(), hmac::sign(&key, self.0.as_bytes()).as_ref()).is_ok()
    }
}

impl Eq for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(hidden)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_compared_whole_and_shown_nowhere() {
        let secret = Secret::new("s3cret");
        assert!(secret == Secret::new("s3cret"));
        for other in ["", "s3cre", "s3creT", "s3crets"] {
            assert!(secret != Secret::new(other), "{other}");
        }
        assert_eq!(format!("{secret:?}"), "(hidden)");
    }
}
