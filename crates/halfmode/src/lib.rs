//! The halfmode command line and the facade over its libraries
#![forbid(unsafe_code)]
