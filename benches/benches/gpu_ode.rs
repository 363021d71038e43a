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
    use halfmode_ode::{ConvNode, MlpField, OdeOptions, OdePrecision, PlanarField, TimeInput, Times, TupleField};
    use halfmode_ode::{VectorField, odeint_last, odeint_tuple_last};
    use halfmode_precision::{Compute, LossScale, Precision, PrecisionPolicy};
    use halfmode_tensor::cuda::{CudaDevice, CudaError, Timer};
    use halfmode_tensor::{Device, Purpose, Tensor};
    use halfmode_train::{AdamW, AdamWConfig, AdamWKind, CrossEntropy, GaussianNll, LpLoss, RecordedStep};
    use halfmode_train::{Reduction, Result};
    use std::sync::Arc;

    const WARM_UP: usize = 5;
    const STEPS: usize = 20;

    /// The best of the peers, in whatever precision: milliseconds, MB.
    struct Peer {
        ms: f64,
        mb: f64,
    }

    /// A velocity's format as the table names it, and what products of single precision may use.
    const FORMATS: [(&str, Precision, Compute); 4] = [
        ("f16", Precision::F16, Compute::F32),
        ("bf16", Precision::Bf16, Compute::F32),
        ("f32", Precision::F32, Compute::F32),
        ("tf32", Precision::F32, Compute::Tf32),
    ];

    type Loss = Box<dyn Fn(&mut Tape, &[Var]) -> Result<Var>>;

    /// A step: what the peers take for it, parameters, and its loss.
    struct Row {
        name: &'static str,
        peer: Option<Peer>,
        make: fn(&Device, &OdeOptions) -> (Params, Loss),
    }

    #[rustfmt::skip]
    const ROWS: [Row; 6] = [
        Row { name: "ode_mlp_b4096_d64_w256x3_rk4x32", peer: Some(Peer { ms: 86.1818, mb: 337.2 }),
              make: |device, options| perceptron(device, options, (4096, 64, &[256; 3])) },
        Row { name: "ode_cnf_b1024_w128_rk4x16", peer: Some(Peer { ms: 80.7051, mb: 69.7 }),
              make: |device, options| flow(device, options, 16) },
        Row { name: "ode_cnf_b1024_w128_rk4x127", peer: Some(Peer { ms: 601.4042, mb: 71.0 }),
              make: |device, options| flow(device, options, 127) },
        Row { name: "ode_conv_stl10_b16_w64_rk4x4", peer: Some(Peer { ms: 63.928, mb: 1304.6 }), make: classifier },
        // A large and a small one that no peer was timed on: what a half velocity is worth.
        Row { name: "ode_mlp_b4096_d1024_w1024x2_rk4x32", peer: None,
              make: |device, options| perceptron(device, options, (4096, 1024, &[1024; 2])) },
        Row { name: "ode_mlp_b128_d64_w64x2_rk4x32", peer: None,
              make: |device, options| perceptron(device, options, (128, 64, &[64; 2])) },
    ];

    /// `y' = f(t, y)` for a perceptron that sees the time: so many states, their channels, its hidden layers; 32 steps. A
    /// relative error is in the place of the peers' mean square.
    fn perceptron(
        device: &Device,
        options: &OdeOptions,
        (rows, channels, hidden): (usize, usize, &[usize]),
    ) -> (Params, Loss) {
        let field = MlpField { channels, hidden: hidden.to_vec(), time: TimeInput::Concatenated };
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

    /// A flow of 128 planar ones in the plane with a network of 32 channels of the time, 1024 points, from 1 to 0.
    fn flow(device: &Device, options: &OdeOptions, n_steps: u32) -> (Params, Loss) {
        let (rows, field) = (1024, PlanarField { dim: 2, hidden: 32, n_flows: 128 });
        let params = Params::new(device, field.param_specs(), &options.precision.velocity, 0).unwrap();
        let tensor = |values: &[f32], channels: usize| {
            Tensor::from_slice(device, values, [rows, channels], Precision::F32, Purpose::Data).unwrap()
        };
        let (z, l) = (tensor(&noise(2 * rows), 2), tensor(&vec![0.0; rows], 1));
        let (field, options) = (Arc::new(field), options.clone());
        let times: Vec<f64> = (0..=n_steps).map(|i| f64::from(n_steps - i) / f64::from(n_steps)).collect();
        let loss = move |tape: &mut Tape, weights: &[Var]| {
            let state = [tape.constant(z.clone()), tape.constant(l.clone())];
            let out = odeint_tuple_last(tape, &field, &state, Times::Fixed(&times), weights, &options)?;
            Ok(tape.apply(GaussianNll, &[&out[0], &out[1]])?)
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
             ledger over it |\n{}|",
            "| --- ".repeat(8)
        );
        let mut behind = String::new();
        for row in &ROWS {
            let mut name = row.name;
            for (title, format, compute) in FORMATS {
                if format!("{}/{title}", row.name).contains(&filter) {
                    run(row, (name, title), (format, compute), all_kernels, &mut behind);
                    name = "";
                }
            }
        }
        println!("{behind}");
    }

    fn run(
        row: &Row,
        (name, title): (&str, &str),
        (format, compute): (Precision, Compute),
        all_kernels: bool,
        behind: &mut String,
    ) {
        let device = Device::cuda(0, Some(std::env::temp_dir().join("halfmode-bench-kernels"))).unwrap();
        let Some(cuda) = device.as_cuda() else { return };
        // The adjoint has scales of its own, as with the peers.
        let policy = match format {
            Precision::F32 => PrecisionPolicy { compute, ..PrecisionPolicy::full() },
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
        let beside = |text: &dyn Fn(&Peer) -> String| row.peer.as_ref().map_or_else(|| "-".to_owned(), text);
        println!(
            "| {name} | {title} | {us:.0} / {launched:.0} | {} | {} | {ledger:.1} / {held:.1} | {} | {} |",
            beside(&|peer| format!("{:.0}", peer.ms * 1e3)),
            beside(&|peer| format!("{:.2}", peer.ms * 1e3 / us)),
            beside(&|peer| format!("{:.1}", peer.mb)),
            beside(&|peer| format!("{:.2}", ledger / peer.mb)),
        );
        if all_kernels || behind.is_empty() {
            *behind += &format!("\n{}, {title}: {}", row.name, kernels(cuda, &mut step, &loss));
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
