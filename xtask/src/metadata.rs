//! The workspace as `cargo metadata` describes it.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::error::Error;

/// A member of the workspace.
#[derive(Debug, Clone, Default)]
pub(crate) struct Package {
    pub(crate) name: String,
    /// The folder of its `Cargo.toml`.
    pub(crate) folder: PathBuf,
    pub(crate) rust_version: Option<String>,
    /// The root files of its library and its programs.
    pub(crate) roots: Vec<PathBuf>,
    pub(crate) dependencies: Vec<Dependency>,
}

/// An edge from a package to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Dependency {
    pub(crate) name: String,
    pub(crate) kind: Kind,
}

/// When a dependency is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Normal,
    Dev,
    Build,
}

/// Asks cargo for the members of the workspace at `root`.
pub(crate) fn load(root: &Path) -> Result<Vec<Package>, Error> {
    let cargo = crate::cargo();
    let output = Command::new(&cargo)
        .args(["metadata", "--format-version", "1", "--no-deps"])
        .current_dir(root)
        .output()
        .map_err(|source| Error::Start { program: cargo, source })?;
    if !output.status.success() {
        eprint!("{}", String::from_utf8_lossy(&output.stderr));
        return Err(Error::Failed { what: "cargo metadata".to_owned() });
    }
    parse(&output.stdout)
}

fn parse(json: &[u8]) -> Result<Vec<Package>, Error> {
    let problem = |problem: String| Error::Output { program: "cargo metadata", problem };
    let value: Value = serde_json::from_slice(json).map_err(|it| problem(it.to_string()))?;
    let packages = value["packages"].as_array().ok_or_else(|| problem("no packages".to_owned()))?;
    packages.iter().map(|it| package(it).ok_or_else(|| problem("a package lacks a field".to_owned()))).collect()
}

fn package(value: &Value) -> Option<Package> {
    let manifest = PathBuf::from(value["manifest_path"].as_str()?);
    let is_root = |target: &&Value| {
        let kinds = target["kind"].as_array();
        kinds.is_some_and(|it| it.iter().any(|kind| matches!(kind.as_str(), Some("lib" | "bin" | "proc-macro"))))
    };
    let roots = value["targets"].as_array()?.iter().filter(is_root);
    let dependency = |it: &Value| {
        let kind = match it["kind"].as_str() {
            Some("dev") => Kind::Dev,
            Some("build") => Kind::Build,
            _ => Kind::Normal,
        };
        Some(Dependency { name: it["name"].as_str()?.to_owned(), kind })
    };
    Some(Package {
        name: value["name"].as_str()?.to_owned(),
        folder: manifest.parent()?.to_path_buf(),
        rust_version: value["rust_version"].as_str().map(str::to_owned),
        roots: roots.filter_map(|it| it["src_path"].as_str().map(PathBuf::from)).collect(),
        dependencies: value["dependencies"].as_array()?.iter().filter_map(dependency).collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_cargo_says() {
        let json = br#"{"packages": [{
            "name": "a", "manifest_path": "/x/a/Cargo.toml", "rust_version": "1.95",
            "targets": [
                {"kind": ["lib"], "src_path": "/x/a/src/lib.rs"},
                {"kind": ["test"], "src_path": "/x/a/tests/t.rs"}],
            "dependencies": [{"name": "b", "kind": null}, {"name": "c", "kind": "dev"}]}]}"#;
        let packages = parse(json).unwrap();
        assert_eq!(packages[0].name, "a");
        assert_eq!(packages[0].folder, Path::new("/x/a"));
        assert_eq!(packages[0].roots, [Path::new("/x/a/src/lib.rs")]);
        assert_eq!(packages[0].dependencies[0].kind, Kind::Normal);
        assert_eq!(packages[0].dependencies[1], Dependency { name: "c".to_owned(), kind: Kind::Dev });
        assert!(parse(b"{}").is_err());
        assert!(parse(b"oops").is_err());
    }
}
