//! Checks of one file at a time.

use super::{Finding, UNSAFE_CRATES};
use crate::kernels;
use crate::rust_text::{attributes, code_only, count_lines, lines_with_word, without_tests};

/// A file with more lines of code needs a reason.
const MAX_LINES: usize = 600;
/// The reason stands within this many lines.
const REASON_WITHIN: usize = 10;
const REASON: &str = "// long file: ";
/// Folders of machines, which no tracked file should name. Split, so that this file does not.
const MACHINE_FOLDERS: [&str; 3] = [concat!("/", "work"), concat!("/", "root"), concat!("/", "home")];

/// Checks the text of the file at `path`, relative to the root of the workspace.
pub(super) fn check(path: &str, text: &str) -> Vec<Finding> {
    let mut findings = machine_paths(path, text);
    if path.ends_with(".rs") {
        let code = code_only(text);
        findings.extend(length(path, text, &code));
        findings.extend(unsafe_code(path, &code));
        findings.extend(unfinished(path, &code));
        findings.extend(reasons(path, &code));
        findings.extend(testkit(path, &code));
    }
    if path.ends_with(".cu") {
        findings.extend(kernels::Header::parse(text).err().map(|it| Finding::new(path, it.line, it.problem)));
    }
    findings
}

fn length(path: &str, text: &str, code: &str) -> Option<Finding> {
    let n_lines = count_lines(&without_tests(code));
    let has_reason = text
        .lines()
        .take(REASON_WITHIN)
        .any(|it| it.trim().strip_prefix(REASON).is_some_and(|reason| !reason.trim().is_empty()));
    let problem = || {
        format!(
            "{n_lines} lines of code, more than {MAX_LINES}: split it, or say why in a comment `{REASON}…` at its top"
        )
    };
    (n_lines > MAX_LINES && !has_reason).then(|| Finding::new(path, 0, problem()))
}

fn unsafe_code(path: &str, code: &str) -> Vec<Finding> {
    let file = path.rsplit('/').next().unwrap_or(path);
    let in_crate = path.strip_prefix("crates/").and_then(|it| it.split_once("/src/")).map(|(name, _)| name);
    let files = UNSAFE_CRATES.iter().find(|(name, _)| Some(*name) == in_crate).map(|(_, files)| *files);
    if files.is_some_and(|it| it.is_empty() || it.contains(&file)) {
        return Vec::new();
    }
    let problem = "`unsafe` outside of halfmode-cuda, cufft-sys, and gemm.rs and simd.rs of halfmode-tensor";
    lines_with_word(code, "unsafe").into_iter().map(|it| Finding::new(path, it, problem)).collect()
}

fn unfinished(path: &str, code: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    for name in ["todo", "unimplemented"] {
        let called = format!("{name}!");
        let lines = code.lines().zip(1..).filter(|(line, _)| line.contains(&called));
        findings.extend(lines.map(|(_, number)| Finding::new(path, number, format!("`{called}` is left"))));
    }
    let ignored = attributes(code).into_iter().filter(|(_, it)| it.starts_with("#[ignore"));
    findings.extend(ignored.map(|(line, _)| Finding::new(path, line, "an ignored test proves nothing")));
    findings
}

/// Each lint that is silenced says why.
fn reasons(path: &str, code: &str) -> Vec<Finding> {
    let silences = |it: &str| ["allow", "expect"].iter().any(|lint| !lines_with_word(it, lint).is_empty());
    let has_reason = |it: &str| !lines_with_word(it, "reason").is_empty();
    let bare = attributes(code).into_iter().filter(|(_, it)| silences(it) && !has_reason(it));
    bare.map(|(line, _)| Finding::new(path, line, "a lint is silenced without `reason = \"…\"`")).collect()
}

/// In a crate's own sources the testkit would see a second copy of that crate.
fn testkit(path: &str, code: &str) -> Vec<Finding> {
    let is_library = path.starts_with("crates/") && path.contains("/src/") && !path.contains("halfmode-testkit/");
    let lines = if is_library { lines_with_word(code, "halfmode_testkit") } else { Vec::new() };
    let problem = "the testkit is for crates/*/tests/ and tests/ only";
    lines.into_iter().map(|it| Finding::new(path, it, problem)).collect()
}

fn machine_paths(path: &str, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (line, number) in text.lines().zip(1..) {
        for folder in MACHINE_FOLDERS {
            if names_folder(line, folder) {
                findings.push(Finding::new(path, number, format!("a path on one machine: {folder}")));
            }
        }
    }
    findings
}

/// Whether `line` names `folder` as the start of an absolute path.
fn names_folder(line: &str, folder: &str) -> bool {
    let is_path = |it: char| it.is_alphanumeric() || matches!(it, '_' | '-' | '.' | '/' | '}' | ')' | '~');
    let goes_on = |it: char| it.is_alphanumeric() || matches!(it, '_' | '-');
    line.match_indices(folder)
        .any(|(at, _)| !line[..at].ends_with(is_path) && !line[at + folder.len()..].starts_with(goes_on))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIB: &str = "crates/halfmode-fft/src/lib.rs";

    const NONE: [usize; 0] = [];

    fn lines(path: &str, text: &str) -> Vec<usize> {
        check(path, text).into_iter().map(|it| it.line).collect()
    }

    #[test]
    fn sound_files_pass() {
        let text =
            "//! Nothing unsafe here, no todo!().\n#[expect(dead_code, reason = \"later\")]\nfn f() { \"unsafe\"; }\n";
        assert_eq!(check(LIB, text), []);
    }

    #[test]
    fn long_files_need_a_reason() {
        let code = "fn f() {}\n".repeat(MAX_LINES + 1);
        assert_eq!(lines(LIB, &code), [0]);
        assert_eq!(lines(LIB, &format!("//! Doc.\n// long file: one table\n{code}")), NONE);
        assert_eq!(lines(LIB, &format!("// long file: \n{code}")), [0]);
        let late = format!("{}// long file: too late\n{code}", "\n".repeat(REASON_WITHIN));
        assert_eq!(lines(LIB, &late), [0]);
        let tests = format!("fn f() {{}}\n#[cfg(test)]\nmod tests {{\n{code}}}\n");
        assert_eq!(lines(LIB, &tests), NONE);
    }

    #[test]
    fn unsafe_has_its_places() {
        let code = "fn f() {\n    unsafe { g() }\n}\n";
        assert_eq!(lines(LIB, code), [2]);
        assert_eq!(lines("crates/halfmode-tensor/src/gemm.rs", code), NONE);
        assert_eq!(lines("crates/halfmode-tensor/src/cpu/simd.rs", code), NONE);
        assert_eq!(lines("crates/halfmode-tensor/src/tensor.rs", code), [2]);
        assert_eq!(lines("crates/halfmode-fft/src/gemm.rs", code), [2]);
        assert_eq!(lines("crates/halfmode-cuda/src/graph.rs", code), NONE);
        assert_eq!(lines("crates/cufft-sys/src/lib.rs", code), NONE);
        assert_eq!(lines("crates/halfmode-cuda/tests/device.rs", code), [2]);
    }

    #[test]
    fn kernel_files_say_what_they_are_compiled_for() {
        assert_eq!(lines("crates/a/kernels/k.cu", "// archs: sm_80\n// variants: -\n"), NONE);
        assert_eq!(lines("crates/a/kernels/k.cu", "// archs: sm_80\n\n#include <x>\n"), [2]);
        assert_eq!(lines("crates/a/kernels/k.cuh", "#pragma once\n"), NONE);
    }

    #[test]
    fn unfinished_work_is_found() {
        let code = "fn f() { todo!(\"x\") }\n#[test]\n#[ignore = \"slow\"]\nfn g() {\n    unimplemented!()\n}\n";
        assert_eq!(lines(LIB, code), [1, 5, 3]);
    }

    #[test]
    fn silenced_lints_have_reasons() {
        assert_eq!(lines(LIB, "#![allow(dead_code)]\n"), [1]);
        assert_eq!(lines(LIB, "\n#[cfg_attr(test, allow(\n    dead_code\n))]\n"), [2]);
        assert_eq!(lines(LIB, "#[allow(dead_code, reason = \"why\")]\n#[should_panic(expected = \"x\")]\n"), NONE);
    }

    #[test]
    fn the_testkit_stays_out_of_libraries() {
        let code = "use halfmode_testkit::tol;\n";
        assert_eq!(lines(LIB, code), [1]);
        assert_eq!(lines("crates/halfmode-fft/tests/adjoint.rs", code), NONE);
        assert_eq!(lines("tests/src/lib.rs", code), NONE);
    }

    #[test]
    fn paths_of_one_machine_are_found() {
        let [work, root, home] = MACHINE_FOLDERS;
        for line in [format!("see {work}/x"), format!("\"{root}\""), format!("file://{home}/me"), home.to_owned()] {
            let is_url = line.contains("//");
            assert_eq!(lines("README.md", &line).is_empty(), is_url, "{line}");
        }
        for line in [format!("a{work}/x"), format!("{work}space"), format!("~{home}"), format!("..{root}/x")] {
            assert_eq!(lines("README.md", &line), NONE, "{line}");
        }
    }
}
