//! The house rules that no compiler checks.

mod files;
mod graph;
mod project;
mod sources;

use std::fmt;
use std::path::Path;

use crate::error::Error;
use crate::metadata;

/// The crates with `unsafe` code, each with the names of the files that may have it; an empty list means any file:
/// there the compiler asks each for a module-level `allow`.
const UNSAFE_CRATES: [(&str, &[&str]); 3] =
    [("halfmode-tensor", &["gemm.rs", "simd.rs"]), ("halfmode-cuda", &[]), ("cufft-sys", &[])];

/// A broken rule and where.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Finding {
    /// Relative to the root of the workspace.
    path: String,
    /// From 1; zero for the whole file.
    line: usize,
    problem: String,
}

impl Finding {
    fn new(path: &str, line: usize, problem: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line, problem: problem.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.path, self.problem),
            line => write!(f, "{}:{line}: {}", self.path, self.problem),
        }
    }
}

/// Checks the workspace at `root` and prints what is wrong.
pub(crate) fn run(root: &Path) -> Result<(), Error> {
    let packages = metadata::load(root)?;
    let files = files::list(root)?;
    let table = graph::load(root)?;

    let mut findings = graph::check(&packages, &table);
    findings.extend(project::check(root, &packages)?);
    for file in &files {
        findings.extend(sources::check(&file.path, &file.text));
    }
    findings.sort();
    findings.dedup();
    for finding in &findings {
        println!("{finding}");
    }
    if findings.is_empty() {
        println!("tidy: {} crates, {} files, nothing to complain about", packages.len(), files.len());
        return Ok(());
    }
    Err(Error::Findings { count: findings.len() })
}
