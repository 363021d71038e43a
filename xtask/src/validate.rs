//! All checks that CI runs, one after the other.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use crate::error::Error;
use crate::tidy;

/// Whether the tests are part of it: CI has run them before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tests {
    Run,
    Skip,
}

/// A named check.
struct Step {
    name: &'static str,
    action: Action,
}

/// What a check does.
enum Action {
    Tidy,
    Cargo { arguments: &'static [&'static str], environment: &'static [(&'static str, &'static str)] },
}

/// Runs the checks, stops at the first that fails, and prints how long each took.
pub(crate) fn run(root: &Path, tests: Tests) -> Result<(), Error> {
    let mut timings: Vec<(&str, f64, &str)> = Vec::new();
    let mut outcome = Ok(());
    for step in steps(tests) {
        println!("── {}", step.name);
        let start = Instant::now();
        outcome = perform(root, &step);
        let word = if outcome.is_ok() { "ok" } else { "FAILED" };
        timings.push((step.name, start.elapsed().as_secs_f64(), word));
        if outcome.is_err() {
            break;
        }
    }
    println!("\n{}", table(&timings));
    outcome
}

fn steps(tests: Tests) -> Vec<Step> {
    let cargo = |name, arguments| Step { name, action: Action::Cargo { arguments, environment: &[] } };
    // The cheap ones first: a missing reason should not wait for a build.
    let mut steps = vec![
        cargo("fmt", &["fmt", "--all", "--check"]),
        Step { name: "tidy", action: Action::Tidy },
        cargo("clippy", &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings", "-D", "missing_docs"]),
    ];
    if tests == Tests::Run {
        // Doc tests are part of it.
        steps.push(cargo("test", &["test", "--workspace"]));
    }
    let environment = &[("RUSTDOCFLAGS", "-D warnings")];
    let arguments = &["doc", "--workspace", "--no-deps"];
    steps.push(Step { name: "doc", action: Action::Cargo { arguments, environment } });
    steps
}

fn perform(root: &Path, step: &Step) -> Result<(), Error> {
    let (arguments, environment) = match step.action {
        Action::Tidy => return tidy::run(root),
        Action::Cargo { arguments, environment } => (arguments, environment),
    };
    let cargo = crate::cargo();
    let mut command = Command::new(&cargo);
    command.args(arguments).envs(environment.iter().copied()).current_dir(root);
    // Cargo sets these for us; build scripts that watch them would run anew in a build below us.
    for (name, _) in std::env::vars() {
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            command.env_remove(name);
        }
    }
    let status = command.status().map_err(|source| Error::Start { program: cargo, source })?;
    if status.success() { Ok(()) } else { Err(Error::Failed { what: format!("step `{}`", step.name) }) }
}

fn table(timings: &[(&str, f64, &str)]) -> String {
    let mut text = format!("{:<8} {:>8}  result\n", "step", "seconds");
    for (name, seconds, word) in timings {
        text.push_str(&format!("{name:<8} {seconds:>8.1}  {word}\n"));
    }
    let total: f64 = timings.iter().map(|it| it.1).sum();
    text.push_str(&format!("{:<8} {total:>8.1}", "total"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_can_be_left_out() {
        let names = |tests| steps(tests).iter().map(|it| it.name).collect::<Vec<_>>();
        assert_eq!(names(Tests::Run), ["fmt", "tidy", "clippy", "test", "doc"]);
        assert_eq!(names(Tests::Skip), ["fmt", "tidy", "clippy", "doc"]);
    }

    #[test]
    fn the_table_is_aligned() {
        let text = table(&[("fmt", 0.84, "ok"), ("clippy", 61.0, "FAILED")]);
        assert_eq!(
            text,
            "step      seconds  result\nfmt           0.8  ok\nclippy       61.0  FAILED\ntotal        61.8"
        );
    }
}
