//! The sending half.
