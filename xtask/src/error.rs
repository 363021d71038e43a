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
    /// A file could not be written.
    Write { path: PathBuf, source: io::Error },
    /// A program could not be started.
    Start { program: String, source: io::Error },
    /// A program ended with a failure.
    Failed { what: String },
    /// The output of a program is not what it should be.
    Output { program: &'static str, problem: String },
    /// The block with the crate graph is missing or malformed.
    Graph { path: &'static str, problem: String },
    /// A file of kernels does not say what it is compiled for.
    Kernel { path: PathBuf, problem: String },
    /// There is no compiler for kernels, and none could be fetched.
    Compiler { problem: String },
    /// What was found differs from what is committed.
    Differences { count: usize, path: &'static str, bless: &'static str },
    /// Something is too large to be carried around.
    TooLarge { what: &'static str, mib: f64, most: f64 },
    /// The check found something.
    Findings { count: usize },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Usage { problem } => write!(f, "{problem}"),
            Self::Read { path, source } => write!(f, "cannot read {}: {source}", path.display()),
            Self::Write { path, source } => write!(f, "cannot write {}: {source}", path.display()),
            Self::Start { program, source } => write!(f, "cannot start {program}: {source}"),
            Self::Failed { what } => write!(f, "{what} failed"),
            Self::Output { program, problem } => write!(f, "output of {program}: {problem}"),
            Self::Graph { path, problem } => write!(f, "{path}: {problem}"),
            Self::Kernel { path, problem } => write!(f, "{}: {problem}", path.display()),
            Self::Compiler { problem } => write!(
                f,
                "no CUDA 13 run-time compiler is installed, and none could be fetched: {problem}\n\
                 help: install the CUDA 13 toolkit and set CUDA_HOME, or give python3 its pip and a way to pypi.org"
            ),
            Self::Differences { count, path, bless } => {
                write!(f, "{count} lines differ from {path}\nhelp: if that is what you want: {bless}")
            }
            Self::TooLarge { what, mib, most } => write!(f, "{what} has {mib:.1} MiB, more than {most:.0}"),
            Self::Findings { count: 1 } => write!(f, "tidy found 1 problem"),
            Self::Findings { count } => write!(f, "tidy found {count} problems"),
        }
    }
}

impl std::error::Error for Error {}
