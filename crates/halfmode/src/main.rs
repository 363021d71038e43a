//! The `halfmode` program.
fn main() {}
