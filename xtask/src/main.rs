//! Workspace chores: `cargo xtask tidy`, `validate`, `kernels`, `gpu-bundle` and `bench`.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, reason = "a command line tool talks on stdout")]

mod bench;
mod error;
mod gpu_bundle;
mod kernels;
mod metadata;
mod rust_text;
mod tidy;
mod validate;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use error::Error;

const USAGE: &str = "\
usage: cargo xtask COMMAND

  tidy                              check the house rules that no compiler checks
  validate [--no-test]              run what CI runs: fmt, tidy, clippy, tests, docs
  kernels [--bless]                 compile all GPU kernels, no GPU needed, and compare what they take with
                                    docs/kernels.txt; --bless writes that file
  gpu-bundle [--only tests|cli|benches]
                                    build programs for a machine with a GPU and without cargo into gpu-bundle/
  bench [FILTER] [--save FILE] [--against FILE]
                                    time the workspace's benches; print ratios to a saved run
  bench --device cuda [FILTER] [--kernels] [--steps=N]
                                    time training steps on a GPU; print the tables of docs/benchmarks.md";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            if matches!(error, Error::Usage { .. }) {
                eprintln!("\n{USAGE}");
                return ExitCode::from(2);
            }
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &[String]) -> Result<(), Error> {
    let root = root();
    let Some((command, rest)) = arguments.split_first() else {
        return Err(Error::Usage { problem: "no command given".to_owned() });
    };
    match (command.as_str(), rest) {
        ("help" | "--help" | "-h", _) => {
            println!("{USAGE}");
            Ok(())
        }
        ("tidy", []) => tidy::run(&root),
        ("validate", []) => validate::run(&root, validate::Tests::Run),
        ("validate", [flag]) if flag == "--no-test" => validate::run(&root, validate::Tests::Skip),
        ("kernels", []) => kernels::run(&root, kernels::Snapshot::Check),
        ("kernels", [flag]) if flag == "--bless" => kernels::run(&root, kernels::Snapshot::Bless),
        ("gpu-bundle", rest) => gpu_bundle::run(&root, rest),
        ("bench", rest) => bench::run(&root, rest),
        ("tidy" | "validate" | "kernels", [first, ..]) => {
            Err(Error::Usage { problem: format!("`{command}` does not take `{first}`") })
        }
        _ => Err(Error::Usage { problem: format!("no command `{command}`") }),
    }
}

/// The root of the workspace: the folder above this crate's.
fn root() -> PathBuf {
    // Cargo sets the variable when it runs us; the compiled-in value serves a direct call.
    let manifest_dir = std::env::var("CARGO_MANIFEST_DIR");
    let xtask = PathBuf::from(manifest_dir.unwrap_or_else(|_| env!("CARGO_MANIFEST_DIR").to_owned()));
    xtask.parent().map_or_else(|| xtask.clone(), Path::to_path_buf)
}

/// A call of cargo in `root`.
fn cargo_command(root: &Path) -> Command {
    let mut command = Command::new(cargo());
    command.current_dir(root);
    // Cargo sets these for us; build scripts that watch them would run anew in a build below us.
    for (name, _) in std::env::vars() {
        if name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_") {
            command.env_remove(name);
        }
    }
    command
}

/// The cargo that runs us.
fn cargo() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned())
}
