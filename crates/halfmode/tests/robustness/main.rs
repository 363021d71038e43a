//! What users and machines get wrong. `CASES` is `docs/robustness.md`: each row of its table is one case,
//! and the test compares exit code and message with the page, word for word. `HALFMODE_BLESS=1` writes
//! the page, which is that of a build without a GPU backend.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod cases;
#[path = "../common/mod.rs"]
mod common;

use cases::{CASES, Case, FAULTS, FIXTURES};
use common::{Done, Folder};
use std::path::Path;
use std::process::{Command, Stdio};

const HEAD: &str = include_str!("head.md");

/// Runs a line in a shell, with `halfmode` on its path.
fn shell(folder: &Folder, line: &str) -> Done {
    let program = Path::new(env!("CARGO_BIN_EXE_halfmode")).parent().unwrap();
    let path = format!("{}:{}", program.display(), std::env::var("PATH").unwrap());
    let mut command = Command::new("bash");
    command.args(["-c", line]).current_dir(&folder.path).env("PATH", path).env("LC_ALL", "C");
    command.env("HALFMODE_CACHE", Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = command.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
    assert!(!stderr.contains("panicked"), "{line}: {stderr}");
    Done { line: line.to_owned(), code: output.status.code(), stdout, stderr }
}

/// The error, or the warnings and notes that matter, in one line.
fn message(stderr: &str) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut inside = false;
    for line in stderr.lines() {
        let begins = ["error:", "warning:", "changed since", "stopped"].iter().any(|start| line.starts_with(start));
        let noted = line.contains("begins again");
        inside = begins || noted || (inside && line.starts_with("  "));
        if inside {
            parts.push(line.trim().to_owned());
        }
    }
    without_sizes(&parts.join("; "))
}

/// Sizes of memory differ between machines: `N` stands for them.
fn without_sizes(text: &str) -> String {
    if !text.contains("are available") {
        return text.to_owned();
    }
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let is_unit = |word: &str| units.contains(&word.trim_end_matches([',', ';']));
    let words: Vec<&str> = text.split(' ').collect();
    let shown = words.iter().enumerate().map(|(idx, word)| {
        let sized = words.get(idx + 1).is_some_and(|next| is_unit(next));
        let follows = idx > 0 && is_unit(word);
        if sized {
            "N".to_owned()
        } else if follows {
            format!("bytes{}", word.trim_start_matches(char::is_alphabetic))
        } else {
            (*word).to_owned()
        }
    });
    shown.collect::<Vec<_>>().join(" ")
}

fn cell(text: &str) -> String {
    format!("`` {} ``", text.replace('|', "\\|"))
}

fn page(rows: &[(&Case, String)]) -> String {
    let mut text = HEAD.replace("{n}", &(rows.len() + FAULTS.len()).to_string());
    let mut section = "";
    for (case, message) in rows {
        if case.section != section {
            section = case.section;
            text.push_str(&format!("\n## {section}\n\n| what is wrong | command | exit | message |\n"));
            text.push_str("| --- | --- | --- | --- |\n");
        }
        let message = if message.is_empty() { "–".to_owned() } else { cell(message) };
        text.push_str(&format!("| {} | {} | {} | {message} |\n", case.what, cell(case.line), case.code));
    }
    text.push_str("\n## Faults that take time\n\n| what happens | what must hold | test |\n| --- | --- | --- |\n");
    for (what, holds, test) in FAULTS {
        text.push_str(&format!("| {what} | {holds} | `{test}` |\n"));
    }
    text
}

#[test]
fn every_row_of_the_page_is_what_happens() {
    let folder = Folder::tiny("robustness");
    FIXTURES.iter().for_each(|make| make(&folder));
    let done = shell(&folder, "halfmode train tiny.toml --out run --plots 0").ok();
    assert!(done.stdout.contains("test L2"));
    let mut failures = Vec::new();
    let mut rows = Vec::new();
    for case in CASES {
        (case.prepare)(&folder);
        let done = shell(&folder, case.line);
        let message = message(&done.stderr);
        let right = done.code == Some(case.code) && case.says.iter().all(|word| message.contains(word));
        if !right {
            failures.push(format!("{}\n  exits {:?}, not {}\n{}", case.line, done.code, case.code, done.stderr));
        }
        let refused = case.code != 0 && done.stderr.contains("error:");
        // A usage error is clap's: it names the argument and shows the usage instead of a command.
        if refused && case.code != 2 && !(message.contains("help: halfmode") || message.contains("help: mv ")) {
            failures.push(format!("{}\n  gives no help\n{}", case.line, done.stderr));
        }
        rows.push((case, message.replace(&folder.path.display().to_string(), "…")));
    }
    let leftovers = shell(&folder, "find . -name '.*.tmp'").ok();
    assert_eq!(leftovers.stdout, "", "temporary files were left");
    let text = page(&rows);
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/robustness.md");
    let is_the_pages_build = !cfg!(feature = "cuda");
    if is_the_pages_build && std::env::var_os("HALFMODE_BLESS").is_some() {
        std::fs::write(&file, &text).unwrap();
    }
    assert!(failures.is_empty(), "{} rows fail\n{}", failures.len(), failures.join("\n"));
    let written = std::fs::read_to_string(&file).unwrap();
    if !is_the_pages_build {
        return;
    }
    for (line, (now, then)) in text.lines().zip(written.lines()).enumerate() {
        assert_eq!(now, then, "docs/robustness.md:{}: run with HALFMODE_BLESS=1 if this is meant", line + 1);
    }
    assert_eq!(text.len(), written.len(), "docs/robustness.md: run with HALFMODE_BLESS=1 if this is meant");
}

#[test]
fn every_fault_of_the_page_has_its_test() {
    let sources = [include_str!("../faults.rs"), include_str!("../killed.rs"), include_str!("../train.rs")];
    for (what, _, test) in FAULTS {
        let (file, name) = test.split_once("::").unwrap();
        assert!(["faults", "killed", "train"].contains(&file), "{what}");
        let found = sources.iter().filter(|source| source.contains(&format!("#[test]\nfn {name}()")));
        assert_eq!(found.count(), 1, "{what}: {test}");
    }
}
