//! The crate graph: the edges that exist against the edges that `docs/architecture.md` allows.
//!
//! The page holds a fenced block `crate-graph` with lines `crate -> crate, crate`; `#` begins a
//! comment. An edge in the block may exist and need not.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::Finding;
use crate::error::Error;
use crate::metadata::{Kind, Package};

const PAGE: &str = "docs/architecture.md";
const TESTKIT: &str = "halfmode-testkit";
/// The members that exist for tests and benches only.
const TEST_MEMBERS: [&str; 2] = ["halfmode-tests", "halfmode-benches"];

/// Packages that call foreign functions, or load them, and who may name them.
const FOREIGN: [(&str, &[&str]); 3] = [
    ("cudarc", &["halfmode-cuda"]),
    ("cufft-sys", &["halfmode-cuda"]),
    ("libloading", &["halfmode-cuda", "cufft-sys"]),
];

/// The crates below each crate.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Table(BTreeMap<String, BTreeSet<String>>);

/// Reads the table from the architecture page.
pub(super) fn load(root: &Path) -> Result<Table, Error> {
    let path = root.join(PAGE);
    let page = std::fs::read_to_string(&path).map_err(|source| Error::Read { path, source })?;
    parse(&page).map_err(|problem| Error::Graph { path: PAGE, problem })
}

fn parse(page: &str) -> Result<Table, String> {
    let mut table = Table::default();
    let mut lines = page.lines().zip(1..).skip_while(|(line, _)| line.trim() != "```crate-graph");
    if lines.next().is_none() {
        return Err("no fenced block ```crate-graph".to_owned());
    }
    for (line, number) in lines {
        if line.trim() == "```" {
            return match table.cycle() {
                Some(name) => Err(format!("the crate graph has a cycle through {name}")),
                None => Ok(table),
            };
        }
        let edge = line.split('#').next().unwrap_or_default().trim();
        if edge.is_empty() {
            continue;
        }
        let malformed = || format!("line {number}: expected `crate -> crate, crate`, found `{}`", line.trim());
        let (from, to) = match edge.split_once("->") {
            Some((from, to)) => (from.trim(), to.split(',').map(str::trim).collect()),
            // A crate on its own stands on nothing.
            None => (edge, Vec::new()),
        };
        let is_name =
            |it: &str| !it.is_empty() && it.chars().all(|it| it.is_ascii_alphanumeric() || it == '-' || it == '_');
        if !is_name(from) || !to.iter().all(|it| is_name(it)) {
            return Err(malformed());
        }
        let below = table.0.entry(from.to_owned()).or_default();
        for name in to {
            if !below.insert(name.to_owned()) {
                return Err(format!("line {number}: {from} -> {name} is listed twice"));
            }
        }
    }
    Err("the block ```crate-graph has no end".to_owned())
}

impl Table {
    fn allows(&self, from: &str, to: &str) -> bool {
        self.0.get(from).is_some_and(|it| it.contains(to))
    }

    /// A crate on a cycle: what is left when crates that stand on nothing are taken away.
    fn cycle(&self) -> Option<&str> {
        let mut left = self.0.clone();
        loop {
            let (higher, lowest): (BTreeMap<_, _>, BTreeMap<_, _>) =
                left.iter().partition(|(_, below)| below.iter().any(|it| left.contains_key(it)));
            if lowest.is_empty() {
                let name = left.keys().next()?;
                return self.0.get_key_value(name).map(|(name, _)| name.as_str());
            }
            left = higher.into_iter().map(|(name, below)| (name.clone(), below.clone())).collect();
        }
    }
}

/// Compares the workspace with the table.
pub(super) fn check(packages: &[Package], table: &Table) -> Vec<Finding> {
    let members: BTreeSet<&str> = packages.iter().map(|it| it.name.as_str()).collect();
    let mut findings = Vec::new();
    let mut complain = |problem: String| findings.push(Finding::new(PAGE, 0, problem));
    for package in packages {
        let from = package.name.as_str();
        if !table.0.contains_key(from) {
            complain(format!("{from} is a member of the workspace and not in the crate graph"));
        }
        for dependency in &package.dependencies {
            let to = dependency.name.as_str();
            if let Some((_, users)) = FOREIGN.iter().find(|(name, users)| *name == to && !users.contains(&from)) {
                complain(format!("{from} -> {to}: foreign functions are called by {} alone", users.join(" and ")));
            }
        }
        for dependency in package.dependencies.iter().filter(|it| members.contains(it.name.as_str())) {
            let to = dependency.name.as_str();
            if to == TESTKIT {
                if dependency.kind != Kind::Dev && !TEST_MEMBERS.contains(&from) {
                    complain(format!("{from} -> {to} is allowed in [dev-dependencies] only"));
                }
            } else if !table.allows(from, to) {
                complain(format!(
                    "the edge {from} -> {to} is not in the crate graph; add it there with its reason, or drop it"
                ));
            }
        }
    }
    let named = table.0.iter().flat_map(|(from, to)| std::iter::once(from).chain(to));
    let strangers: BTreeSet<&String> = named.filter(|it| !members.contains(it.as_str())).collect();
    for name in strangers {
        complain(format!("{name} is in the crate graph and not a member of the workspace"));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metadata::Dependency;

    fn package(name: &str, dependencies: &[(&str, Kind)]) -> Package {
        let edge = |&(name, kind): &(&str, Kind)| Dependency { name: name.to_owned(), kind };
        let dependencies = dependencies.iter().map(edge).collect();
        Package { name: name.to_owned(), dependencies, ..Package::default() }
    }

    fn block(lines: &str) -> Result<Table, String> {
        parse(&format!("# Page\n\n```crate-graph\n{lines}\n```\n\nText.\n"))
    }

    fn problems(packages: &[Package], lines: &str) -> Vec<String> {
        check(packages, &block(lines).unwrap()).into_iter().map(|it| it.problem).collect()
    }

    #[test]
    fn the_block_is_read() {
        let table = block("a\nb -> a   # why\n\nc -> a, b\nc -> d").unwrap();
        assert!(table.allows("b", "a") && table.allows("c", "b") && table.allows("c", "d"));
        assert!(!table.allows("a", "b") && !table.allows("x", "a"));
    }

    #[test]
    fn a_malformed_block_is_refused() {
        assert!(parse("no block").unwrap_err().contains("no fenced block"));
        assert!(parse("```crate-graph\na -> b\n").unwrap_err().contains("no end"));
        assert!(block("a => b").unwrap_err().contains("line 4: expected"));
        assert!(block("a -> b,").unwrap_err().contains("line 4: expected"));
        assert!(block("a -> b\na -> b").unwrap_err().contains("listed twice"));
        assert!(block("a -> b\nb -> c\nc -> a\nd -> a").unwrap_err().contains("cycle"));
        assert!(block("a -> a").unwrap_err().contains("cycle through a"));
    }

    #[test]
    fn edges_outside_the_table_are_found() {
        let packages = [
            package("a", &[("serde", Kind::Normal)]),
            package("b", &[("a", Kind::Normal)]),
            package("c", &[("a", Kind::Dev), ("b", Kind::Build)]),
        ];
        assert_eq!(problems(&packages, "a\nb -> a\nc -> a, b"), Vec::<String>::new());
        let found = problems(&packages, "a\nb -> a\nc -> a\nold -> a");
        assert_eq!(found.len(), 2);
        assert!(found[0].contains("c -> b") && found[1].starts_with("old is in the crate graph"));
        assert!(problems(&packages, "a\nb -> a")[0].starts_with("c is a member"));
    }

    #[test]
    fn foreign_functions_have_their_place() {
        let packages = [
            package("cufft-sys", &[("libloading", Kind::Normal)]),
            package("halfmode-cuda", &[("cudarc", Kind::Normal), ("cufft-sys", Kind::Normal)]),
            package("a", &[("cudarc", Kind::Normal), ("libloading", Kind::Dev)]),
        ];
        let found = problems(&packages, "cufft-sys\nhalfmode-cuda -> cufft-sys\na");
        assert_eq!(found.len(), 2);
        assert!(found.iter().all(|it| it.starts_with("a -> ")));
    }

    #[test]
    fn the_testkit_is_for_tests() {
        let packages = [
            package(TESTKIT, &[]),
            package("a", &[(TESTKIT, Kind::Dev)]),
            package("halfmode-tests", &[(TESTKIT, Kind::Normal)]),
            package("b", &[(TESTKIT, Kind::Normal)]),
        ];
        let found = problems(&packages, "a\nb\nhalfmode-tests\nhalfmode-testkit");
        assert_eq!(found, ["b -> halfmode-testkit is allowed in [dev-dependencies] only"]);
    }
}
