//! Workspace-wide tests of halfmode.
#![forbid(unsafe_code)]
