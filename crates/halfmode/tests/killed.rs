//! Runs that are killed without a chance to save go on as if nothing had been.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::{Folder, assert_same_run};
use halfmode::train::read_metrics;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Random numbers that are other ones in every run of the test; the seed is printed.
struct Moments(u64);

impl Moments {
    fn new() -> Self {
        let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64 | 1;
        eprintln!("seed of the moments: {seed}");
        Moments(seed)
    }

    /// A number in [0, 1).
    fn next(&mut self) -> f64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }
}

fn spawn(folder: &Folder, line: &str) -> Child {
    folder.command(line).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

/// Kills the process at the end of `delay`, or before that when `moment` has come. True if it still ran.
fn kill_after(mut child: Child, delay: Duration, moment: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    while start.elapsed() < delay && !moment() && child.try_wait().unwrap().is_none() {
        std::thread::yield_now();
    }
    let running = child.try_wait().unwrap().is_none();
    // SIGKILL: nothing is told to the program.
    child.kill().unwrap();
    child.wait().unwrap();
    running
}

/// Whether a file is being written in a folder.
fn writes(folder: &Path) -> bool {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| entry.file_name().to_string_lossy().ends_with(".tmp"))
}

fn metrics(run: &Path) -> Vec<String> {
    let records = read_metrics(run.join("metrics.jsonl")).unwrap();
    records.into_iter().map(|record| format!("{} {} {}", record["epoch"], record["loss"], record["eval"])).collect()
}

#[test]
fn twenty_kills_change_nothing() {
    let folder = Folder::tiny("killed");
    let job = "tiny.toml --plots 1 --set train.epochs=300";
    let start = Instant::now();
    folder.run("train tiny.toml --out short --plots 0 --set train.epochs=1").ok();
    let short = start.elapsed();
    let start = Instant::now();
    folder.run(&format!("train {job} --out whole")).ok();
    let whole = start.elapsed();
    eprintln!("an epoch takes {short:?}, the whole run {whole:?}");

    let run = folder.join("run");
    let checkpoints = run.join("checkpoints");
    let mut moments = Moments::new();
    let (mut n_running, mut n_saving) = (0, 0);
    for kill in 0..20 {
        let begun = run.join("config.toml").exists();
        let line = format!("train {job} --out run{}", if begun { " --resume" } else { " --force" });
        // At most a twentieth of the run per life, so that the kills are spread over all of it; every third
        // kill waits for a checkpoint that is being written.
        let delay = short.mul_f64(1.5 * moments.next()) + whole.mul_f64(moments.next() / 20.0);
        let saving = || kill % 3 == 2 && writes(&checkpoints);
        let delay = if kill % 3 == 2 { whole } else { delay };
        n_running += usize::from(kill_after(spawn(&folder, &line), delay, saving));
        n_saving += usize::from(writes(&checkpoints));
    }
    eprintln!("{n_running} of 20 kills met a running program, {n_saving} left a file that was being written");
    assert!(n_running >= 15 && n_saving >= 1, "{n_running} {n_saving}");
    folder.run(&format!("train {job} --out run --resume")).ok();
    let whole = folder.join("whole");
    assert_same_run(&whole, &run);
    assert_eq!(metrics(&whole), metrics(&run));
    let read = |path: &Path| common::tensors(&path.join("checkpoints/best"));
    assert!(read(&whole) == read(&run), "the best model differs");
    assert!(!writes(&checkpoints) && !writes(&run) && !writes(&run.join("plots")), "temporary files were left");
}

#[test]
fn a_kill_before_the_first_checkpoint() {
    let folder = Folder::tiny("early");
    let job = "tiny.toml --plots 0 --set data.n_train=64 --set train.epochs=1";
    folder.run(&format!("train {job} --out whole")).ok();
    let began = || folder.join("run/config.toml").exists();
    assert!(kill_after(spawn(&folder, &format!("train {job} --out run")), Duration::from_secs(60), began));
    assert!(began() && !folder.join("run/checkpoints/latest").exists());
    folder.run(&format!("train {job} --out run")).exits(2).says(&["--resume"]);
    folder.run(&format!("train {job} --out run --resume")).ok().says(&["the run begins again"]);
    assert_same_run(&folder.join("whole"), &folder.join("run"));
}

#[test]
fn a_kill_while_the_cache_is_written() {
    let folder = Folder::tiny("cache");
    let cache = folder.join("cache");
    let job = "tiny.toml --plots 0 --data-cache cache --set data.n_train=64 --set data.resolution=64 \
               --set data.test_resolutions=[16] --set train.epochs=1 --set train.batch_size=32";
    let mut n_saving = 0;
    for _ in 0..20 {
        let _ = std::fs::remove_dir_all(&cache);
        kill_after(spawn(&folder, &format!("train {job} --out killed --force")), Duration::from_secs(60), || {
            writes(&cache)
        });
        if writes(&cache) {
            n_saving += 1;
            break;
        }
    }
    assert_eq!(n_saving, 1, "no kill met the cache while it was written");
    folder.run(&format!("train {job} --out run")).ok();
    assert!(!writes(&cache));
    assert_eq!(std::fs::read_dir(&cache).unwrap().count(), 2);
}
