//! Whole training steps (forward, relative L2 loss, backward, AdamW) on a GPU beside what neuraloperator 2.0.0 takes
//! for the same step on one H200, beside the roofline, and what the time is spent on. Steps are recorded and replayed as
//! a training run does; `launched` is the same step launch by launch. Prints the tables of `docs/benchmarks.md`.
//!
//! Arguments: a filter on `name/preset`; `--kernels` prints every launch of each step, not of the first alone;
//! `--steps=N` takes N more steps and prints what became of the loss.
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
    use halfmode_benches::noise;
    use halfmode_benches::roofline::{H200_BANDWIDTH, Step};
    use halfmode_data::FieldPairs;
    use halfmode_operators::FnoConfig;
    use halfmode_precision::{Compute, Precision, PrecisionConfig, Preset};
    use halfmode_tensor::Device;
    use halfmode_tensor::cuda::{CudaDevice, CudaError, Timer};
    use halfmode_train::job::{DataConfig, FileData, FileLayout, JobConfig, JobData, LossKind, ModelConfig, Trainer};
    use ndarray::{ArrayD, IxDyn};

    /// A configuration of the peer and what it takes: milliseconds of its fp32 step and of its fastest captured graph,
    /// and MB that its allocator holds at most.
    struct Row {
        name: &'static str,
        grid: &'static [usize],
        batch: usize,
        hidden: usize,
        modes: &'static [usize],
        projection: f64,
        peer_ms: Option<f64>,
        graph_ms: Option<f64>,
        peer_mb: f64,
    }

    #[rustfmt::skip]
    const ROWS: [Row; 9] = [
        Row { name: "fno2d_ns128_b8_h64_m64", grid: &[128, 128], batch: 8, hidden: 64, modes: &[64, 64], projection: 4.0,
              peer_ms: Some(15.2868), graph_ms: Some(9.952), peer_mb: 2013.9 },
        Row { name: "fno2d_darcy128_b8_h32_m32", grid: &[128, 128], batch: 8, hidden: 32, modes: &[32, 32], projection: 2.0,
              peer_ms: Some(13.5064), graph_ms: Some(4.7637), peer_mb: 782.9 },
        Row { name: "fno2d_darcy128_b8_h24_m16", grid: &[128, 128], batch: 8, hidden: 24, modes: &[16, 16], projection: 2.0,
              peer_ms: None, graph_ms: Some(3.5152), peer_mb: 1392.7 },
        Row { name: "fno2d_256_b8_h64_m64", grid: &[256, 256], batch: 8, hidden: 64, modes: &[64, 64], projection: 4.0,
              peer_ms: Some(39.1765), graph_ms: Some(25.6834), peer_mb: 5576.4 },
        Row { name: "fno3d_64_b2_h32_m16", grid: &[64, 64, 64], batch: 2, hidden: 32, modes: &[16, 16, 16], projection: 4.0,
              peer_ms: Some(20.9226), graph_ms: Some(21.7722), peer_mb: 2739.2 },
        Row { name: "fno2d_512_b4_h64_m64", grid: &[512, 512], batch: 4, hidden: 64, modes: &[64, 64], projection: 4.0,
              peer_ms: Some(70.7681), graph_ms: None, peer_mb: 10056.2 },
        Row { name: "fno2d_1024_b2_h64_m64", grid: &[1024, 1024], batch: 2, hidden: 64, modes: &[64, 64], projection: 4.0,
              peer_ms: Some(134.3299), graph_ms: None, peer_mb: 19168.9 },
        Row { name: "fno2d_ns128_b8_h128_m64", grid: &[128, 128], batch: 8, hidden: 128, modes: &[64, 64], projection: 2.0,
              peer_ms: None, graph_ms: Some(28.5264), peer_mb: 5541.4 },
        Row { name: "fno2d_1024_b1_h128_m64", grid: &[1024, 1024], batch: 1, hidden: 128, modes: &[64, 64], projection: 2.0,
              peer_ms: Some(338.498), graph_ms: None, peer_mb: 19094.5 },
    ];

    /// A preset as the filter and as the table name it.
    #[rustfmt::skip]
    const PRESETS: [(&str, &str, Preset, Precision, Compute); 4] = [
        ("mixed", "mixed f16", Preset::Mixed, Precision::F16, Compute::F32),
        ("bf16", "mixed bf16", Preset::Mixed, Precision::Bf16, Compute::F32),
        ("full", "full", Preset::Full, Precision::F16, Compute::F32),
        ("tf32", "full, tf32", Preset::Full, Precision::F16, Compute::Tf32),
    ];

    const WARM_UP: usize = 5;
    const STEPS: usize = 20;

    /// What was asked for.
    struct Args {
        filter: String,
        kernels: bool,
        steps: usize,
    }

    pub(super) fn main() {
        let args: Vec<String> = std::env::args().skip(1).filter(|it| it != "--bench").collect();
        let args = Args {
            kernels: args.iter().any(|it| it == "--kernels"),
            filter: args.iter().find(|it| !it.starts_with('-')).cloned().unwrap_or_default(),
            steps: args.iter().find_map(|it| it.strip_prefix("--steps=")?.parse().ok()).unwrap_or(0),
        };
        match device() {
            Ok(device) => {
                let name = device.as_cuda().map(|it| it.context().info().name.clone());
                println!("\n{}, {STEPS} steps after {WARM_UP}\n", name.unwrap_or_default());
            }
            Err(err) => {
                println!("error: {err}");
                std::process::exit(1);
            }
        }
        println!(
            "| configuration | preset | us / launched us | peer fp32 / graph us | over fp32 | over graph | ledger / held MB | \
             peer MB | held over peer | roofline us | share |\n{}|",
            "| --- ".repeat(11)
        );
        let mut behind = String::new();
        for row in &ROWS {
            let mut name = row.name;
            for (label, title, preset, format, compute) in PRESETS {
                if format!("{}/{label}", row.name).contains(&args.filter) {
                    let precision = PrecisionConfig { compute, ..PrecisionConfig::new(preset, format) };
                    run(row, (name, title), precision, &args, &mut behind);
                    name = "";
                }
            }
        }
        println!("{behind}");
    }

    fn device() -> Result<Device, halfmode_tensor::Error> {
        Device::cuda(0, Some(std::env::temp_dir().join("halfmode-bench-kernels")))
    }

    fn trainer(row: &Row, device: &Device, precision: PrecisionConfig) -> Trainer {
        let mut config = JobConfig::darcy();
        let mut fno = FnoConfig::new(row.modes, row.hidden);
        fno.projection_channel_ratio = row.projection;
        config.model = ModelConfig::Fno(fno);
        config.data = DataConfig::File(FileData {
            train: "random".into(),
            test: vec!["random".into()],
            input: "x".into(),
            output: "y".into(),
            layout: FileLayout::ChannelsFirst,
        });
        config.train.loss = LossKind::L2;
        config.train.batch_size = row.batch;
        config.precision = precision;
        let shape = IxDyn(&[&[row.batch, 1][..], row.grid].concat());
        let n = row.batch * row.grid.iter().product::<usize>();
        let array = || ArrayD::from_shape_vec(shape.clone(), noise(n)).unwrap();
        let pairs = FieldPairs::new(array(), array()).unwrap();
        let data = JobData { train: pairs.clone(), tests: vec![("random".into(), pairs)], notes: vec![] };
        let shapes = data.shapes();
        Trainer::new(config, device, &shapes, Some(data)).unwrap()
    }

    /// Prints a row of the table; what comes behind the table is written to `behind`.
    fn run(row: &Row, (name, title): (&str, &str), precision: PrecisionConfig, args: &Args, behind: &mut String) {
        let stored = if precision.preset == Preset::Full { 4 } else { 2 };
        let device = device().unwrap();
        let mut trainer = trainer(row, &device, precision);
        let indices: Vec<usize> = (0..row.batch).collect();
        let Some(cuda) = device.as_cuda() else { return };
        device.reset_peak();
        let us = time(cuda, &mut trainer, &indices);
        let mb = |bytes: usize| bytes as f64 / 1e6;
        let (ledger, held) = (mb(device.memory().total.peak), mb(device.held_peak_bytes().unwrap_or(0)));
        trainer.record_steps(false);
        let launched = time(cuda, &mut trainer, &indices);
        let ratio = |ms: Option<f64>| ms.map_or_else(|| "-".to_owned(), |ms| format!("{:.2}", ms * 1e3 / us));
        let peer = |ms: Option<f64>| ms.map_or_else(|| "-".to_owned(), |ms| format!("{:.0}", ms * 1e3));
        let n_layers = trainer.config().model.fno().n_layers;
        let (batch, width, grid, modes) = (row.batch, row.hidden, row.grid, row.modes);
        let roofline = Step { batch, width, grid, modes, n_layers }.traffic(stored).fused_us(H200_BANDWIDTH);
        println!(
            "| {name} | {title} | {us:.0} / {launched:.0} | {} / {} | {} | {} | {ledger:.0} / {held:.0} | {:.0} | {:.2} | {roofline:.0} | {:.0} % |",
            peer(row.peer_ms),
            peer(row.graph_ms),
            ratio(row.peer_ms),
            ratio(row.graph_ms),
            row.peer_mb,
            held / row.peer_mb,
            100.0 * roofline / us,
        );
        if args.kernels || behind.is_empty() {
            *behind += &format!("\n{}, {title}: {}", row.name, kernels(cuda, &mut trainer, &indices));
        }
        if args.steps > 0 {
            trainer.record_steps(true);
            let losses: Vec<f64> = (0..args.steps).map(|_| trainer.step(&indices).unwrap().loss).collect();
            let finite = losses.iter().filter(|it| it.is_finite()).count();
            let (first, last) = (losses[0], losses[args.steps - 1]);
            let (n, skipped) = (args.steps, trainer.state().skipped_steps);
            *behind += &format!(
                "\n{}, {title}: {n} more steps, loss {first:.4} to {last:.4}, {finite} finite, {skipped} skipped in all\n",
                row.name
            );
        }
    }

    /// Median of some steps in microseconds, the host's part and its wait at the end included.
    fn time(cuda: &CudaDevice, trainer: &mut Trainer, indices: &[usize]) -> f64 {
        for _ in 0..WARM_UP {
            _ = trainer.step_before(indices, indices).unwrap();
        }
        let mut times: Vec<f64> = (0..STEPS)
            .map(|_| {
                let timer = Timer::start(cuda.context()).unwrap();
                _ = trainer.step_before(indices, indices).unwrap();
                timer.stop().unwrap()
            })
            .collect();
        times.sort_by(f64::total_cmp);
        times[STEPS / 2]
    }

    /// The table of what a step launches, by the time it takes.
    fn kernels(cuda: &CudaDevice, trainer: &mut Trainer, indices: &[usize]) -> String {
        let spent = cuda.context().profile(|| -> Result<(), CudaError> {
            _ = trainer.step(indices).unwrap();
            Ok(())
        });
        let mut spent: Vec<_> = spent.unwrap().into_iter().collect();
        spent.sort_by(|a, b| f64::total_cmp(&b.1.us, &a.1.us));
        let total: f64 = spent.iter().map(|it| it.1.us).sum();
        let launches: usize = spent.iter().map(|it| it.1.launches).sum();
        let mut text = format!("{total:.0} us in {launches} launches, each by the device's clocks\n\n");
        text += "| us | share | launches | what |\n| --- | --- | --- | --- |\n";
        for (name, spent) in spent.iter().take(40) {
            let share = 100.0 * spent.us / total;
            text += &format!("| {:.1} | {share:.1} % | {} | {name} |\n", spent.us, spent.launches);
        }
        text
    }
}
