//! One error for the whole core: what happened (`kind`), to what (`message`), and because of what (`source`).

use std::fmt;

/// Result of everything in the core that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What happened. Each kind says when it occurs and what the reader can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// A setting has a value that is not allowed. Correct the setting named in the message.
    Config,
    /// The event can never be sent as JSON. Correct the event.
    EventNotSerializable,
    /// The event is larger than `max_event_bytes`. Split it, or raise the limit.
    EventTooLarge,
    /// The peer refused the event `poison_tries` times, and it is parked in the spill. Correct what makes such events;
    /// look at it with `safe-broadcaster spill export --parked`.
    EventRefused,
    /// The spill is at its bound and the policy refuses or dropped the event. Restore the link, or raise the bound.
    SpillFull,
    /// Another owner has the spill file. Give each broadcaster its own `spill_path`.
    SpillLocked,
    /// The file at `spill_path` cannot be used as a spill. Move it away, or choose another path.
    SpillCorrupt,
    /// The disk refused a read or write of the spill. See the source.
    SpillIo,
    /// Another hub has the log file. Give each hub its own `log_path`.
    LogLocked,
    /// The file at `log_path` cannot be used as a hub's log. Move it away, or choose another path.
    LogCorrupt,
    /// The disk refused the log: the event was not published, and can be tried again. See the source.
    LogIo,
    /// The bus between the hubs cannot be reached, or does not take events. Restore it, and publish again.
    BusDown,
    /// The bus is there and refuses: its memory is full, or its user may not do this. Correct what the message names.
    BusRefused,
    /// No link within the time allowed; attempts go on in the background.
    ConnectTimeout,
    /// The peer could not be reached, or answered something that is not our protocol.
    ConnectRefused,
    /// The peer sent a frame that breaks the protocol. The link is closed and tried again.
    Protocol,
    /// The peer closed the link over what it was sent: an event is too large for it, or none that it takes. Tried again.
    FrameRefused,
    /// The token of whoever asked does not grant it.
    NotAllowed,
    /// The address to listen on cannot be used.
    Bind,
    /// The broadcaster or hub is stopped. Make a new one.
    Closed,
    /// Used in a child process after `fork`. Make a new one there, or start children with `spawn`.
    Forked,
}

/// An error with its kind, a message that names what it happened to, and the cause where there is one.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error without a deeper cause.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// Adds the cause. `Display` does not repeat it; [`Error::report`] does.
    #[must_use]
    pub fn with_source(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// What happened.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Whether trying the same again later can succeed.
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        matches!(
            self.kind,
            ErrorKind::ConnectTimeout
                | ErrorKind::ConnectRefused
                | ErrorKind::FrameRefused
                | ErrorKind::Protocol
                | ErrorKind::SpillFull
                | ErrorKind::SpillIo
                | ErrorKind::LogIo
                | ErrorKind::BusDown
                | ErrorKind::BusRefused
        )
    }

    /// Whether the event itself is the cause, so that it can never be sent.
    #[must_use]
    pub fn is_poison(&self) -> bool {
        matches!(self.kind, ErrorKind::EventNotSerializable | ErrorKind::EventTooLarge | ErrorKind::EventRefused)
    }

    /// The message with all its causes, for logs and for people.
    #[must_use]
    pub fn report(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            let next = error.to_string();
            if !text.contains(&next) {
                text.push_str(": ");
                text.push_str(&next);
            }
            cause = error.source();
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as &(dyn std::error::Error + 'static))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_names_every_cause_once() {
        let io = std::io::Error::new(std::io::ErrorKind::PermissionDenied, "permission denied");
        let error = Error::new(ErrorKind::SpillIo, "cannot write /x/spill.db").with_source(io);
        assert_eq!(error.to_string(), "cannot write /x/spill.db");
        assert_eq!(error.report(), "cannot write /x/spill.db: permission denied");
        assert!(error.is_retryable() && !error.is_poison());
    }
}
