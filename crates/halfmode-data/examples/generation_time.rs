//! Times the data of `halfmode train darcy`: 1000 + 100 samples at 64x64, 100 at 128x128.
//!
//! `cargo run --release -p halfmode-data --example generation_time [threads]`
#![allow(clippy::print_stdout, reason = "an example talks to its user")]

use std::num::NonZeroUsize;
use std::time::Instant;

use halfmode_data::{DarcyConfig, DarcySolver, generate};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let threads: Option<NonZeroUsize> = match std::env::args().nth(1) {
        Some(text) => Some(text.parse()?),
        None => None,
    };
    let jobs = [
        DarcyConfig::new(1000, 64, 0),
        DarcyConfig::new(100, 64, 0).for_test(),
        DarcyConfig::new(100, 128, 0).for_test(),
    ];
    let start = Instant::now();
    for config in &jobs {
        let start = Instant::now();
        let pairs = generate(config, threads, &|_, _| {})?;
        let mean = pairs.y().iter().map(|&v| f64::from(v)).sum::<f64>() / pairs.y().len() as f64;
        println!(
            "{:5} samples {r}x{r}: {:6.2} s, {} factor values, mean pressure {mean:.6}",
            config.n,
            start.elapsed().as_secs_f64(),
            DarcySolver::new(config.resolution)?.n_factor_values(),
            r = config.resolution,
        );
    }
    println!("total {:.2} s", start.elapsed().as_secs_f64());
    Ok(())
}
