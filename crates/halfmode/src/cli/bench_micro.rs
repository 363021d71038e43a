//! `halfmode bench transform|contract`: the two kernels of a spectral convolution, alone.

use crate::cli::bench::{quantile, random};
use crate::cli::error::{CliError, Exit, kernel_error};
use crate::cli::train::grid_text;
use crate::cli::{Context, device_name, gpu, memory, text};
use halfmode::contract::{Operand, OutputSpec, Planner, Policy, execute};
use halfmode::fft::{Transform, TransformConfig, Weights};
use halfmode::precision::{DType, Domain, Precision};
use halfmode::tensor::{Device, Purpose, Shape, Tensor};
use serde_json::{Value, json};
use std::time::Instant;

/// Sizes of the fields.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct MicroArgs {
    /// Points per axis.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_value = "64,64", value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    grid: Vec<u32>,
    /// Modes per axis, those of the last axis counted from zero.
    #[arg(long, value_name = "K,…", value_delimiter = ',', default_value = "32,17", value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    modes: Vec<u32>,
    /// Samples.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    batch: u32,
    /// Channels, in and out.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    channels: u32,
    /// Repetitions that are timed.
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    iterations: u32,
}

/// A kernel in one precision, ready to be repeated.
type Action<'a> = Box<dyn FnMut() -> Result<(), CliError> + 'a>;

/// A transform to the modes and back to the grid.
pub(crate) fn run_transform(args: &MicroArgs, context: &Context) -> Result<Exit, CliError> {
    let (grid, modes, batch, channels) = args.sizes();
    args.check_memory(&grid)?;
    let device = context.device()?;
    let config = TransformConfig { grid, modes, domain: Domain::Real, accumulate: Precision::F32, algorithm: None };
    let transform = Transform::new(&device, config).map_err(refused)?;
    args.measure(context, "transform", &device, |precision| {
        let shape = transform.field_shape(batch, channels);
        let x = Tensor::from_slice(&device, &noise(shape.numel()), shape, precision, Purpose::Data).map_err(refused)?;
        let (transform, scale) = (&transform, transform.scale());
        Ok(Box::new(move || {
            let to_modes = transform.to_modes(&x, Weights::Plain, &scale.to_modes, precision, Purpose::Activation);
            let x_hat = to_modes.map_err(refused)?;
            let back = transform.to_grid(&x_hat, Weights::Doubled, &scale.to_grid, precision, Purpose::Activation);
            back.map(drop).map_err(refused)
        }))
    })
}

/// The product of a spectrum with dense weights, mode by mode.
pub(crate) fn run_contract(args: &MicroArgs, context: &Context) -> Result<Exit, CliError> {
    let (_, modes, batch, channels) = args.sizes();
    let axes = &"xyzuvw"[..modes.len().min(6)];
    let equation = format!("bi{axes},io{axes}->bo{axes}").parse().map_err(refused)?;
    let shapes = [[batch, channels], [channels, channels]].map(|outer| Shape::new(&[&outer[..], &modes].concat()));
    args.check_memory(&modes)?;
    let (device, planner) = (context.device()?, Planner::new());
    args.measure(context, "contract", &device, |precision| {
        let dtype = DType::complex(precision);
        let plan = planner.plan(&equation, &shapes, dtype, Policy::balanced()).map_err(refused)?;
        let tensor = |shape: &Shape| {
            Tensor::from_scalars(&device, &noise(2 * shape.numel()), shape.clone(), dtype, Purpose::Data)
        };
        let tensors = shapes.iter().map(tensor).collect::<Result<Vec<Tensor>, _>>().map_err(refused)?;
        Ok(Box::new(move || {
            let operands: Vec<Operand<'_>> = tensors.iter().map(Operand::new).collect();
            execute(&plan, &operands, &OutputSpec::new(precision, Purpose::Activation)).map(drop).map_err(refused)
        }))
    })
}

/// Sizes that the kernels refuse.
fn refused(err: impl std::error::Error + 'static) -> CliError {
    kernel_error(&err, Exit::Config).or_help("halfmode bench transform --grid 64,64 --modes 32,17")
}

fn noise(n: usize) -> Vec<f32> {
    let mut state = 1;
    (0..n).map(|_| random(&mut state)).collect()
}

impl MicroArgs {
    /// Grid, modes, samples, channels.
    fn sizes(&self) -> (Vec<usize>, Vec<usize>, usize, usize) {
        let wide = |list: &[u32]| list.iter().map(|&n| n as usize).collect();
        (wide(&self.grid), wide(&self.modes), self.batch as usize, self.channels as usize)
    }

    /// Refuses fields of these points that are too large before they are made: the numbers, the tensors
    /// and what lies between them.
    fn check_memory(&self, points: &[usize]) -> Result<(), CliError> {
        let channels = self.channels as usize;
        let rows = channels.saturating_mul((self.batch as usize).max(channels));
        let bytes = points.iter().fold(rows.saturating_mul(32), |bytes, &n| bytes.saturating_mul(n));
        memory::check("the field", bytes).map_err(|err| err.at("--grid").help("halfmode bench transform --batch 1"))
    }

    /// Times a kernel in each storage precision.
    fn measure<'a>(
        &self,
        context: &Context,
        kernel: &str,
        device: &Device,
        make: impl Fn(Precision) -> Result<Action<'a>, CliError>,
    ) -> Result<Exit, CliError> {
        let mut rows: Vec<(Precision, [f64; 3], usize)> = Vec::new();
        for precision in [Precision::F32, Precision::F16, Precision::Bf16] {
            let mut action = make(precision)?;
            action()?;
            gpu::synchronize(device).map_err(refused)?;
            device.reset_peak();
            let mut times = Vec::with_capacity(self.iterations as usize);
            for _ in 0..self.iterations {
                let start = Instant::now();
                action()?;
                gpu::synchronize(device).map_err(refused)?;
                times.push(start.elapsed().as_secs_f64() * 1e3);
            }
            times.sort_by(f64::total_cmp);
            rows.push((precision, [0.5, 0.1, 0.9].map(|q| quantile(&times, q)), device.memory().total.peak));
        }
        let (grid, modes, batch, channels) = self.sizes();
        let json_row = |(precision, [ms, p10, p90], bytes): &(Precision, [f64; 3], usize)| -> Value {
            json!({ "precision": precision, "ms": ms, "p10_ms": p10, "p90_ms": p90, "peak_bytes": bytes })
        };
        let object = json!({
            "kernel": kernel, "device": device_name(device), "grid": grid, "modes": modes, "batch_size": batch, "channels": channels,
            "threads": context.n_threads(), "iterations": self.iterations,
            "rows": rows.iter().map(json_row).collect::<Vec<_>>(),
        });
        context.output.result(object, || {
            let cells = rows.iter().map(|(precision, times, bytes)| {
                let [ms, p10, p90] = times.map(|ms| format!("{ms:.3}"));
                vec![precision.to_string(), ms, p10, p90, text::bytes(*bytes)]
            });
            let table = text::table(&["precision", "ms", "10 %", "90 %", "peak"], &cells.collect::<Vec<_>>());
            let on = if kernel == "transform" { format!(" on {}", grid_text(&grid)) } else { String::new() };
            format!("{kernel}{on}, {} modes, batch {batch}, {channels} channels\n{table}", grid_text(&modes))
        })?;
        Ok(Exit::Done)
    }
}
