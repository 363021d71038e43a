//! All checks that CI runs, one after the other.

use std::path::Path;
use std::time::Instant;

use crate::error::Error;
use crate::{kernels, tidy};

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
    Kernels,
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

/// With the features that are off by default.
const CLIPPY_ALL: [&str; 9] =
    ["clippy", "--workspace", "--all-targets", "--all-features", "--", "-D", "warnings", "-D", "missing_docs"];

/// What the feature `cuda` adds and a machine without a GPU can test. `.ci/run` has the same line, and says why it is so.
#[rustfmt::skip]
const TEST_CUDA: [&str; 16] = [
    "test", "--workspace", "--exclude", "halfmode-data", "--features", "halfmode/cuda",
    "--config", "profile.dev.opt-level=0", "--lib", "--bin", "halfmode",
    "--test=gpu", "--test=cuda", "--test=cuda_job", "--test=tensor", "--test=tf32",
];

fn steps(tests: Tests) -> Vec<Step> {
    let cargo = |name, arguments| Step { name, action: Action::Cargo { arguments, environment: &[] } };
    // The cheap ones first: a missing reason should not wait for a build.
    let mut steps = vec![
        cargo("fmt", &["fmt", "--all", "--check"]),
        Step { name: "tidy", action: Action::Tidy },
        Step { name: "kernels", action: Action::Kernels },
        cargo("clippy", &["clippy", "--workspace", "--all-targets", "--", "-D", "warnings", "-D", "missing_docs"]),
        cargo("clippy, cuda", &CLIPPY_ALL),
    ];
    if tests == Tests::Run {
        // Doc tests are part of it.
        steps.push(cargo("test", &["test", "--workspace"]));
        steps.push(cargo("test, cuda", &TEST_CUDA));
    }
    let environment = &[("RUSTDOCFLAGS", "-D warnings")];
    let arguments = &["doc", "--workspace", "--all-features", "--no-deps"];
    steps.push(Step { name: "doc", action: Action::Cargo { arguments, environment } });
    steps
}

fn perform(root: &Path, step: &Step) -> Result<(), Error> {
    let (arguments, environment) = match step.action {
        Action::Tidy => return tidy::run(root),
        Action::Kernels => return kernels::run(root, kernels::Snapshot::Check),
        Action::Cargo { arguments, environment } => (arguments, environment),
    };
    let mut command = crate::cargo_command(root);
    let status = command.args(arguments).envs(environment.iter().copied()).status();
    let status = status.map_err(|source| Error::Start { program: crate::cargo(), source })?;
    if status.success() { Ok(()) } else { Err(Error::Failed { what: format!("step `{}`", step.name) }) }
}

fn table(timings: &[(&str, f64, &str)]) -> String {
    let mut text = format!("{:<13} {:>8}  result\n", "step", "seconds");
    for (name, seconds, word) in timings {
        text.push_str(&format!("{name:<13} {seconds:>8.1}  {word}\n"));
    }
    let total: f64 = timings.iter().map(|it| it.1).sum();
    text.push_str(&format!("{:<13} {total:>8.1}", "total"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_can_be_left_out() {
        let names = |tests| steps(tests).iter().map(|it| it.name).collect::<Vec<_>>();
        assert_eq!(
            names(Tests::Run),
            ["fmt", "tidy", "kernels", "clippy", "clippy, cuda", "test", "test, cuda", "doc"]
        );
        assert_eq!(names(Tests::Skip), ["fmt", "tidy", "kernels", "clippy", "clippy, cuda", "doc"]);
    }

    #[test]
    fn the_table_is_aligned() {
        let text = table(&[("fmt", 0.84, "ok"), ("clippy", 61.0, "FAILED")]);
        assert_eq!(
            text,
            "step           seconds  result\nfmt                0.8  ok\nclippy            61.0  FAILED\ntotal             61.8"
        );
    }
}
