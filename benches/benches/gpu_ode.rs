//! Whole training steps of neural ordinary differential equations (forward, loss, backward, AdamW) on a GPU beside what
//! rampde 0.1.0 and torchdiffeq 0.2.5 take for the same step on one H200. Steps are recorded and replayed; `launched` is
//! the same step launch by launch. Prints the tables of `docs/benchmarks.md`.
//!
//! Arguments: a filter on `name/format`; `--kernels` prints every launch of each step, not of the first alone.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs, reason = "a bench")]

#[cfg(not(feature = "cuda"))]
fn main() {
    println!("built without the feature cuda: nothing to time");
}

#[cfg(feature = "cuda")]
fn main() {
    cuda::main();
}

#[cfg(feature = "cuda")]
mod cuda {
    use halfmode_autograd::{Tape, Var};
    use halfmode_benches::noise;
    use halfmode_nn::{Module, Params};
    use halfmode_ode::{ConvNode, MlpField, OdeOptions, OdePrecision, TimeInput, Times, VectorField, odeint_last};
    use halfmode_precision::{LossScale, Precision, PrecisionPolicy};
    use halfmode_tensor::cuda::{CudaDevice, CudaError, Timer};
    use halfmode_tensor::{Device, Purpose, Tensor};
    use halfmode_train::{AdamW, AdamWConfig, AdamWKind, CrossEntropy, LpLoss, RecordedStep, Reduction, Result};
    use std::sync::Arc;

    const WARM_UP: usize = 5;
    const STEPS: usize = 20;

    /// The best of the peers, in whatever precision: milliseconds, MB.
    struct Peer {
        ms: f64,
        mb: f64,
    }

    type Loss = Box<dyn Fn(&mut Tape, &[Var]) -> Result<Var>>;

    /// A step: what the peers take for it, velocities' formats, parameters, and its loss.
    struct Row {
        name: &'static str,
        peer: Peer,
        formats: &'static [Precision],
        make: fn(&Device, &OdeOptions) -> (Params, Loss),
    }

    const ROWS: [Row; 2] = [
        Row {
            name: "ode_mlp_b4096_d64_w256x3_rk4x32",
            peer: Peer { ms: 86.1818, mb: 337.2 },
            formats: &[Precision::F16, Precision::Bf16, Precision::F32],
            make: perceptron,
        },
        // The classifier's f16 has a scale that follows the adjoint's largest value, which the host reads: no step of it
        // is recorded.
        Row {
            name: "ode_conv_stl10_b16_w64_rk4x4",
            peer: Peer { ms: 63.928, mb: 1304.6 },
            formats: &[Precision::Bf16, Precision::F32],
            make: classifier,
        },
    ];

    /// `y' = f(t, y)` for a perceptron of 65, 256, 256, 256 and 64 channels, 4096 states, 32 steps; a relative error in
    /// the peers' mean square's place.
    fn perceptron(device: &Device, options: &OdeOptions) -> (Params, Loss) {
        let (rows, channels) = (4096, 64);
        let field = MlpField { channels, hidden: vec![256; 3], time: TimeInput::Concatenated };
        let params = Params::new(device, field.param_specs(), &options.precision.velocity, 0).unwrap();
        let random = |seed: usize| {
            let values: Vec<f32> = noise(rows * channels + seed).split_off(seed);
            Tensor::from_slice(device, &values, [1, rows, channels], Precision::F32, Purpose::Data).unwrap()
        };
        let (x, target) = (random(0), random(17));
        let (field, options) = (Arc::new(field), options.clone());
        let times: Vec<f64> = (0..=32).map(|i| f64::from(i) / 32.0).collect();
        let loss = move |tape: &mut Tape, weights: &[Var]| {
            let (x, target) = (tape.constant(x.clone()), tape.constant(target.clone()));
            let y = odeint_last(tape, &field, &x, Times::Fixed(&times), weights, &options)?;
            Ok(tape.apply(LpLoss::default(), &[&y, &target])?)
        };
        (params, Box::new(loss))
    }

    /// Images of 128 x 128 points, 64, 128 and 256 channels, three equations from 0 to 1 in four steps each.
    fn classifier(device: &Device, options: &OdeOptions) -> (Params, Loss) {
        let batch = 16;
        let node = ConvNode::new([128, 128], 64);
        let params = node.params(device, &options.precision.velocity, 0).unwrap();
        let values = noise(batch * 3 * 128 * 128);
        let x = Tensor::from_slice(device, &values, [batch, 3, 128, 128], Precision::F32, Purpose::Data).unwrap();
        let labels = noise(batch).iter().map(|it| (it.abs() * 1e4) as usize % 10).collect();
        let entropy = CrossEntropy { labels, reduction: Reduction::Mean };
        let loss = move |tape: &mut Tape, weights: &[Var]| {
            let x = tape.constant(x.clone());
            let logits = node.forward(tape, weights, &[&x])?;
            Ok(tape.apply(entropy.clone(), &[&logits])?)
        };
        (params, Box::new(loss))
    }

    pub(super) fn main() {
        let args: Vec<String> = std::env::args().skip(1).filter(|it| it != "--bench").collect();
        let filter = args.iter().find(|it| !it.starts_with('-')).cloned().unwrap_or_default();
        let all_kernels = args.iter().any(|it| it == "--kernels");
        let device = match Device::cuda(0, Some(std::env::temp_dir().join("halfmode-bench-kernels"))) {
            Ok(device) => device,
            Err(err) => {
                println!("error: {err}");
                std::process::exit(1);
            }
        };
        let name = device.as_cuda().map(|it| it.context().info().name.clone());
        println!("\n{}, {STEPS} steps after {WARM_UP}\n", name.unwrap_or_default());
        drop(device);
        println!(
            "| configuration | velocity | us / launched us | best peer us | over it | ledger / held MB | least peer MB | \
             held over it |\n{}|",
            "| --- ".repeat(8)
        );
        let mut behind = String::new();
        for row in &ROWS {
            let mut name = row.name;
            for &format in row.formats {
                if format!("{}/{format}", row.name).contains(&filter) {
                    run(row, name, format, all_kernels, &mut behind);
                    name = "";
                }
            }
        }
        println!("{behind}");
    }

    fn run(row: &Row, name: &str, format: Precision, all_kernels: bool, behind: &mut String) {
        let device = Device::cuda(0, Some(std::env::temp_dir().join("halfmode-bench-kernels"))).unwrap();
        let Some(cuda) = device.as_cuda() else { return };
        // The adjoint has scales of its own, as with the peers.
        let policy = match format {
            Precision::F32 => PrecisionPolicy::full(),
            half => PrecisionPolicy { loss_scale: LossScale::None, ..PrecisionPolicy::mixed(half) },
        };
        let options = OdeOptions::new(OdePrecision::new(policy));
        let policy = Arc::clone(&options.precision.velocity);
        let (params, loss) = (row.make)(&device, &options);
        let optimizer = AdamW::new(AdamWConfig::new(AdamWKind::Torch), &params, &policy).unwrap();
        let mut step = RecordedStep::new(params, optimizer, &policy);
        device.reset_peak();
        let us = time(cuda, &mut step, &loss);
        let mb = |bytes: usize| bytes as f64 / 1e6;
        let (ledger, held) = (mb(device.memory().total.peak), mb(device.held_peak_bytes().unwrap_or(0)));
        step.record(false);
        let launched = time(cuda, &mut step, &loss);
        let Peer { ms, mb } = row.peer;
        println!(
            "| {name} | {format} | {us:.0} / {launched:.0} | {:.0} | {:.2} | {ledger:.1} / {held:.1} | {mb:.1} | {:.2} |",
            ms * 1e3,
            ms * 1e3 / us,
            held / mb,
        );
        if all_kernels || behind.is_empty() {
            *behind += &format!("\n{}, {format}: {}", row.name, kernels(cuda, &mut step, &loss));
        }
    }

    /// Median of some steps in microseconds, the host's part and its wait at the end included.
    fn time(cuda: &CudaDevice, step: &mut RecordedStep, loss: &Loss) -> f64 {
        for _ in 0..WARM_UP {
            _ = step.step(loss).unwrap();
        }
        let mut times: Vec<f64> = (0..STEPS)
            .map(|_| {
                let timer = Timer::start(cuda.context()).unwrap();
                let outcome = step.step(loss).unwrap();
                assert!(outcome.applied && outcome.loss.is_finite(), "{outcome:?}");
                timer.stop().unwrap()
            })
            .collect();
        times.sort_by(f64::total_cmp);
        times[STEPS / 2]
    }

    /// The table of what a step launches, by the time it takes.
    fn kernels(cuda: &CudaDevice, step: &mut RecordedStep, loss: &Loss) -> String {
        let spent = cuda.context().profile(|| -> std::result::Result<(), CudaError> {
            _ = step.step(loss).unwrap();
            Ok(())
        });
        let mut spent: Vec<_> = spent.unwrap().into_iter().collect();
        spent.sort_by(|a, b| f64::total_cmp(&b.1.us, &a.1.us));
        let total: f64 = spent.iter().map(|it| it.1.us).sum();
        let launches: usize = spent.iter().map(|it| it.1.launches).sum();
        let mut text = format!("{total:.0} us in {launches} launches, each by the device's clocks\n\n");
        text += "| us | share | launches | what |\n| --- | --- | --- | --- |\n";
        for (name, spent) in spent.iter().take(30) {
            let share = 100.0 * spent.us / total;
            text += &format!("| {:.1} | {share:.1} % | {} | {name} |\n", spent.us, spent.launches);
        }
        text
    }
}
