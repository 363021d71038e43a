//! What can go wrong in a chore.

use std::fmt;
use std::io;
use std::path::PathBuf;

/// Why a chore did not succeed.
#[derive(Debug)]
pub(crate) enum Error {
    /// The command line makes no sense.
    Usage { problem: String },
    /// A file could not be read.
    Read { path: PathBuf, source: io::Error },
    /// A program could not be started.
    Start { program: String, source: io::Error },
    /// A program ended with a failure.
    Failed { what: String },
    /// The output of a program is not what it should be.
    Output { program: &'static str, problem: String },
    /// The block with the crate graph is missing or malformed.
    Graph { path: &'static str, problem: String },
    /// The check found something.
    Findings { count: usize },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage { problem } => write!(f, "{problem}"),
            Self::Read { path, source } => write!(f, "cannot read {}: {source}", path.display()),
            Self::Start { program, source } => write!(f, "cannot start {program}: {source}"),
            Self::Failed { what } => write!(f, "{what} failed"),
            Self::Output { program, problem } => write!(f, "output of {program}: {problem}"),
            Self::Graph { path, problem } => write!(f, "{path}: {problem}"),
            Self::Findings { count: 1 } => write!(f, "tidy found 1 problem"),
            Self::Findings { count } => write!(f, "tidy found {count} problems"),
        }
    }
}

impl std::error::Error for Error {}
