//! Checks of the project as a whole: read-me files, crate roots, toolchain, change log.

use std::path::Path;
use std::process::Command;

use super::{Finding, UNSAFE_CRATES};
use crate::error::Error;
use crate::metadata::Package;
use crate::rust_text;

const CI: &str = ".ci/run";
const CHANGELOG: &str = "CHANGELOG.md";
/// Members that nobody uses alone, and so need no page of their own.
const NO_README: [&str; 4] = ["halfmode-testkit", "halfmode-tests", "halfmode-benches", "xtask"];

/// Checks the project at `root`.
pub(super) fn check(root: &Path, packages: &[Package]) -> Result<Vec<Finding>, Error> {
    let mut findings = Vec::new();
    for package in packages {
        let folder = relative(root, &package.folder);
        if !NO_README.contains(&package.name.as_str()) && !package.folder.join("README.md").is_file() {
            findings.push(Finding::new(&folder, 0, "the crate has no README.md"));
        }
        for file in &package.roots {
            let text = read(file)?;
            let path = relative(root, file);
            findings.extend(root_attribute(&path, &text, &package.name));
        }
    }
    findings.extend(toolchain(packages, &read(&root.join(CI))?, running_rustc()?));
    findings.extend(changelog(&read(&root.join(CHANGELOG))?));
    Ok(findings)
}

/// Every crate forbids `unsafe`; those that have some deny it where it is not allowed by name.
fn root_attribute(path: &str, text: &str, package: &str) -> Option<Finding> {
    let has_some = UNSAFE_CRATES.iter().any(|(name, _)| *name == package);
    let lint = if has_some { "#![deny(unsafe_code)]" } else { "#![forbid(unsafe_code)]" };
    let code = rust_text::code_only(text);
    let is_there = rust_text::attributes(&code).iter().any(|(_, it)| *it == lint);
    (!is_there).then(|| Finding::new(path, 1, format!("the crate's root lacks {lint}")))
}

/// One `rust-version` everywhere: the one CI says it uses, and none newer than the compiler here.
fn toolchain(packages: &[Package], ci: &str, running: Version) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut complain = |path: &str, problem: String| findings.push(Finding::new(path, 0, problem));
    let stated = ci.lines().find_map(|it| it.trim().strip_prefix("# toolchain:"));
    let stated = stated.and_then(Version::parse);
    if stated.is_none() {
        complain(CI, "no comment `# toolchain: X.Y`".to_owned());
    }
    for package in packages {
        let Some(version) = package.rust_version.as_deref().and_then(Version::parse) else {
            complain("Cargo.toml", format!("{} has no rust-version", package.name));
            continue;
        };
        if stated.is_some_and(|it| it != version) {
            complain(CI, format!("the toolchain comment disagrees with the rust-version of {}", package.name));
        }
        if version > running {
            complain("Cargo.toml", format!("the rust-version of {} is newer than the compiler here", package.name));
        }
    }
    findings
}

/// Major and minor version; the patch level does not matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Version(u32, u32);

impl Version {
    fn parse(text: &str) -> Option<Self> {
        let mut parts = text.trim().split('.');
        Some(Self(parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
    }
}

fn running_rustc() -> Result<Version, Error> {
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
    let output = Command::new(&rustc).arg("--version").output();
    let output = output.map_err(|source| Error::Start { program: rustc, source })?;
    let text = String::from_utf8_lossy(&output.stdout);
    let version = text.split_whitespace().nth(1).and_then(Version::parse);
    version.ok_or_else(|| Error::Output { program: "rustc --version", problem: text.trim().to_owned() })
}

/// The change log has a section for what is not yet released, at its top.
fn changelog(text: &str) -> Option<Finding> {
    let first = text.lines().zip(1..).find(|(line, _)| line.starts_with("## "));
    let is_unreleased = first.is_some_and(|(line, _)| line.to_lowercase().contains("unreleased"));
    let line = first.map_or(0, |(_, number)| number);
    (!is_unreleased).then(|| Finding::new(CHANGELOG, line, "the first section is not `## Unreleased`"))
}

fn relative(root: &Path, path: &Path) -> String {
    path.strip_prefix(root).unwrap_or(path).to_string_lossy().replace('\\', "/")
}

fn read(path: &Path) -> Result<String, Error> {
    std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.to_path_buf(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crate_roots_forbid_unsafe() {
        assert_eq!(root_attribute("p", "//! Doc.\n#![forbid(unsafe_code)]\n", "a"), None);
        assert!(root_attribute("p", "// #![forbid(unsafe_code)]\n", "a").is_some());
        assert!(root_attribute("p", "#![deny(unsafe_code)]\n", "a").is_some());
        assert_eq!(root_attribute("p", "#![deny(unsafe_code)]\n", "halfmode-cuda"), None);
    }

    #[test]
    fn versions_agree() {
        let package = |version: &str| Package { rust_version: Some(version.to_owned()), ..Package::default() };
        let ci = "#!/usr/bin/env bash\n# toolchain: 1.95\n";
        assert_eq!(toolchain(&[package("1.95"), package("1.95.0")], ci, Version(1, 95)), []);
        assert_eq!(toolchain(&[package("1.95")], ci, Version(1, 94)).len(), 1);
        assert_eq!(toolchain(&[package("1.94")], ci, Version(1, 95)).len(), 1);
        assert_eq!(toolchain(&[package("1.95")], "", Version(1, 95)).len(), 1);
        assert_eq!(toolchain(&[Package::default()], ci, Version(1, 95)).len(), 1);
        assert!(Version(1, 100) > Version(1, 95) && Version::parse("nightly").is_none());
    }

    #[test]
    fn the_change_log_begins_with_what_is_unreleased() {
        assert_eq!(changelog("# Changelog\n\n## Unreleased\n\n- a\n\n## 0.1.0\n"), None);
        assert_eq!(changelog("# Changelog\n\n## [Unreleased]\n"), None);
        assert_eq!(changelog("# Changelog\n\n## 0.1.0\n\n## Unreleased\n").unwrap().line, 3);
        assert!(changelog("").is_some());
    }
}
