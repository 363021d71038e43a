//! Kernel files: what they say about themselves.

mod header;

pub(crate) use header::Header;
