//! The receiving half.

pub mod emitters;
pub mod entry;
pub mod log;
pub mod machine;
pub mod outbox;
pub mod registry;
pub mod state;
