//! Workspace-wide benches of halfmode.
#![forbid(unsafe_code)]
