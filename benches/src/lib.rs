//! Benches that report time and bytes together, as ratios within one run.
//!
//! A bench times a candidate and its reference in turns, so that both see the same machine, and
//! prints medians, the ratio, and the ledger's peaks. Run them by `cargo xtask bench [FILTER]
//! [--save FILE] [--against FILE]`.
#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, clippy::expect_used, reason = "a program for people; a bench that fails should stop")]

pub mod roofline;

use halfmode_tensor::Device;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Median time and peak bytes of one thing.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Median, microseconds.
    pub us: f64,
    /// The ledger's peak of saved values, activations and scratch.
    pub bytes: usize,
}

/// Runs benches and prints their table.
#[derive(Debug)]
pub struct Bench {
    filter: Option<String>,
    save: Option<PathBuf>,
    against: BTreeMap<String, Cost>,
    csv: String,
}

/// Each pair is timed for at least this long and this often.
const MIN_TIME: Duration = Duration::from_millis(800);
const MIN_ROUNDS: usize = 7;

impl Bench {
    /// Reads the command line and prints the head of the table.
    #[must_use]
    pub fn from_args(title: &str) -> Self {
        let (mut filter, mut save, mut against) = (None, None, BTreeMap::new());
        let mut args = std::env::args().skip(1);
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--save" => save = args.next().map(PathBuf::from),
                "--against" => against = args.next().map(read_csv).unwrap_or_default(),
                "--bench" => {}
                other if !other.starts_with('-') => filter = Some(other.to_owned()),
                _ => {}
            }
        }
        println!("\n{title}");
        println!(
            "{:<46} {:>11} {:>12} {:>11} {:>12} {:>7} {:>7} {:>8} {:>11} {:>11}",
            "op/device/precision/shape",
            "us",
            "peak bytes",
            "ref us",
            "ref bytes",
            "speed",
            "bytes",
            "against",
            "cpu us",
            "ref cpu us"
        );
        Bench { filter, save, against, csv: String::new() }
    }

    /// Times `candidate` and `reference` in turns on `device`, and prints a line.
    pub fn pair(&mut self, name: &str, device: &Device, candidate: &mut dyn FnMut(), reference: &mut dyn FnMut()) {
        if self.filter.as_ref().is_some_and(|filter| !name.contains(filter.as_str())) {
            return;
        }
        let bytes = [peak(device, candidate), peak(device, reference)];
        let (mut times, start) = ([Vec::new(), Vec::new()], Instant::now());
        let mut cpu = [0.0; 2];
        while start.elapsed() < MIN_TIME || times[0].len() < MIN_ROUNDS {
            let [mine, theirs] = &mut times;
            let begin = processor_us();
            mine.push(timed(candidate));
            let between = processor_us();
            theirs.push(timed(reference));
            cpu = [cpu[0] + between - begin, cpu[1] + processor_us() - between];
        }
        let cpu = cpu.map(|us| us / times[0].len() as f64);
        let [us, reference_us] = times.map(median);
        let against = self.against.get(name).map_or_else(|| "-".to_owned(), |old| format!("{:.2}x", old.us / us));
        println!(
            "{name:<46} {us:>11.1} {:>12} {reference_us:>11.1} {:>12} {:>6.2}x {:>6.2}x {against:>8} {:>11.1} {:>11.1}",
            bytes[0],
            bytes[1],
            reference_us / us,
            bytes[0] as f64 / bytes[1].max(1) as f64,
            cpu[0],
            cpu[1],
        );
        let _ = writeln!(self.csv, "{name},{us:.1},{},{reference_us:.1},{}", bytes[0], bytes[1]);
    }

    /// Appends the rows to the file of `--save`, if there is one.
    pub fn finish(self) {
        let Some(path) = self.save else { return };
        let before = std::fs::read_to_string(&path).unwrap_or_default();
        std::fs::write(&path, before + &self.csv).expect("the file of --save can be written");
    }
}

/// Microseconds of one run.
fn timed(work: &mut dyn FnMut()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64() * 1e6
}

/// Microseconds that the threads of this process have run so far, as Linux counts them; 0 elsewhere. On a machine that
/// others share, it says more than the clock.
fn processor_us() -> f64 {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let ns = tasks.filter_map(|task| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<f64>().ok()
    });
    ns.sum::<f64>() / 1e3
}

/// The ledger's activation peak of one run, above what was live before.
fn peak(device: &Device, work: &mut dyn FnMut()) -> usize {
    work();
    device.reset_peak();
    let before = device.memory().activations.live;
    work();
    device.memory().activations.peak - before
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn read_csv(path: String) -> BTreeMap<String, Cost> {
    let text = std::fs::read_to_string(path).expect("the file of --against can be read");
    let row = |line: &str| {
        let mut cells = line.split(',');
        let name = cells.next()?.to_owned();
        Some((name, Cost { us: cells.next()?.parse().ok()?, bytes: cells.next()?.parse().ok()? }))
    };
    text.lines().filter_map(row).collect()
}

/// Deterministic values in (-1, 1) that are neither smooth nor special.
#[must_use]
pub fn noise(n: usize) -> Vec<f32> {
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(n).collect()
}
