//! Faults that come while a command runs: signals, a full disk, a second run.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::{Done, Folder, assert_same_run, latest};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command};

/// Starts a command and waits until it says `word` on stderr.
fn start(folder: &Folder, line: &str, word: &str) -> (Child, impl Read) {
    let mut child = folder.command(line).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut text = String::new();
    while !text.contains(word) {
        assert_ne!(stderr.read_line(&mut text).unwrap(), 0, "{text}");
    }
    (child, stderr)
}

fn send(child: &Child, signal: &str) {
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
}

#[test]
fn signals_while_data_are_made() {
    let folder = Folder::tiny("making");
    let generate = "data generate darcy --n 100000 --resolution 64 -o big.npz";
    let train = "train tiny.toml --out run --data-cache cache --set data.n_train=100000 --set data.resolution=64";
    for line in [generate, train] {
        for (signal, code) in [("-INT", 130), ("-TERM", 75)] {
            let (child, _stderr) = start(&folder, line, "making");
            send(&child, signal);
            assert_eq!(child.wait_with_output().unwrap().status.code(), Some(code), "{line}");
        }
    }
    assert!(!folder.join("big.npz").exists() && !folder.join("run").exists());
    assert!(std::fs::read_dir(folder.join("cache")).map_or(0, Iterator::count) == 0);
}

#[test]
fn a_second_ctrl_c_ends_at_once() {
    let folder = Folder::tiny("twice");
    // The first checkpoint is written behind the line of the first epoch.
    let (child, _stderr) = start(&folder, "train tiny.toml --out run --plots 0 --set train.epochs=100000", "epoch 2/");
    send(&child, "-INT");
    // It may be gone already.
    let _ = Command::new("kill").args(["-INT", &child.id().to_string()]).output().unwrap();
    let status = child.wait_with_output().unwrap().status;
    assert!(status.code() == Some(130) || status.signal() == Some(2), "{status}");
    let epochs = latest(&folder.join("run")).1["epoch"].as_u64().unwrap() + 1;
    folder.run(&format!("train run --resume --plots 0 --set train.epochs={epochs}")).ok();
    folder.run(&format!("train tiny.toml --out whole --plots 0 --set train.epochs={epochs}")).ok();
    assert_same_run(&folder.join("whole"), &folder.join("run"));
}

#[test]
fn a_full_disk_keeps_the_last_checkpoint() {
    let folder = Folder::tiny("full");
    folder.run("train tiny.toml --out run --plots 0 --set train.epochs=1").ok();
    let before = std::fs::read(folder.join("run/checkpoints/latest")).unwrap();
    let blocks = before.len() / 1024 / 2;
    let resume = "train run --resume --plots 0 --set train.epochs=2";
    let line = format!("ulimit -f {blocks}; exec {} {resume} --threads 1", env!("CARGO_BIN_EXE_halfmode"));
    let mut command = Command::new("bash");
    command.args(["-c", &line]).current_dir(&folder.path);
    command.env("HALFMODE_CACHE", std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("cache"));
    let done = Done::of(&line, command.output().unwrap()).exits(1);
    done.says(&["no space left", "checkpoints", "help: halfmode train run --resume"]);
    assert_eq!(std::fs::read(folder.join("run/checkpoints/latest")).unwrap(), before);
    let entries = std::fs::read_dir(folder.join("run/checkpoints")).unwrap();
    assert!(entries.flatten().all(|entry| !entry.file_name().to_string_lossy().ends_with(".tmp")));

    folder.run(resume).ok();
    folder.run("train tiny.toml --out whole --plots 0").ok();
    assert_same_run(&folder.join("whole"), &folder.join("run"));
}

#[test]
fn two_runs_in_one_directory() {
    let folder = Folder::tiny("two");
    let line = "train tiny.toml --out run --plots 0 --set train.epochs=100000";
    let (child, mut stderr) = start(&folder, line, "epoch 1/");
    for second in ["--resume", "--force"] {
        let done = folder.run(&format!("{line} {second}")).exits(2);
        done.says(&["another process trains in run", "help: halfmode train tiny.toml --out run-2"]);
    }
    send(&child, "-TERM");
    std::io::copy(&mut stderr, &mut std::io::sink()).unwrap();
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(75));
    let epochs = latest(&folder.join("run")).1["epoch"].as_u64().unwrap() + 1;
    folder.run(&format!("train run --resume --plots 0 --set train.epochs={epochs}")).ok();
    folder.run(&format!("train tiny.toml --out whole --plots 0 --set train.epochs={epochs}")).ok();
    assert_same_run(&folder.join("whole"), &folder.join("run"));
}
