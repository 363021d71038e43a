//! Whole training steps (forward, relative L2 loss, backward, AdamW) in half against `full`.
#![allow(clippy::unwrap_used, missing_docs, reason = "a bench")]

use halfmode_benches::{Bench, noise};
use halfmode_data::FieldPairs;
use halfmode_operators::FnoConfig;
use halfmode_precision::{Precision, PrecisionConfig, Preset};
use halfmode_tensor::Device;
use halfmode_train::job::{JobConfig, JobData, LossKind, ModelConfig, Trainer};
use ndarray::{ArrayD, IxDyn};

fn main() {
    let mut bench = Bench::from_args("training step; reference: the same step in `full`");
    /// Name, grid, batch, width, modes.
    type Config = (&'static str, &'static [usize], usize, usize, &'static [usize]);
    let configs: [Config; 5] = [
        ("fno2d_64_b8_h32_m16", &[64, 64], 8, 32, &[16, 16]),
        ("fno2d_64_b8_h32_m32", &[64, 64], 8, 32, &[32, 32]),
        ("fno2d_128_b4_h64_m16", &[128, 128], 4, 64, &[16, 16]),
        ("fno1d_1024_b16_h64_m64", &[1024], 16, 64, &[64]),
        ("fno3d_32_b2_h32_m16", &[32, 32, 32], 2, 32, &[16, 16, 16]),
    ];
    for (name, grid, batch, hidden, modes) in configs {
        for (label, preset, format) in [
            ("f16", Preset::Mixed, Precision::F16),
            ("bf16", Preset::Mixed, Precision::Bf16),
            ("amp", Preset::Amp, Precision::F16),
        ] {
            // One device for both, so that they share threads; one trainer each.
            let device = Device::cpu(0).unwrap();
            let trainer = |preset| {
                let mut config = JobConfig::darcy();
                config.model = ModelConfig::Fno(FnoConfig::new(modes, hidden));
                config.data = halfmode_train::job::DataConfig::File(halfmode_train::job::FileData {
                    train: "random".into(),
                    test: vec!["random".into()],
                    input: "x".into(),
                    output: "y".into(),
                    layout: halfmode_train::job::FileLayout::ChannelsFirst,
                });
                config.train.loss = LossKind::L2;
                config.train.batch_size = batch;
                config.precision = PrecisionConfig::new(preset, format);
                let shape = IxDyn(&[&[batch, 1][..], grid].concat());
                let array =
                    || ArrayD::from_shape_vec(shape.clone(), noise(batch * grid.iter().product::<usize>())).unwrap();
                let pairs = FieldPairs::new(array(), array()).unwrap();
                let data = JobData { train: pairs.clone(), tests: vec![("random".into(), pairs)], notes: vec![] };
                Trainer::new(config, &device, &data.shapes(), Some(data)).unwrap()
            };
            let (mut half, mut full) = (trainer(preset), trainer(Preset::Full));
            let indices: Vec<usize> = (0..batch).collect();
            let name = format!("step/cpu/{label}/{name}");
            let candidate = &mut || _ = half.step(&indices).unwrap();
            bench.pair(&name, &device, candidate, &mut || _ = full.step(&indices).unwrap());
        }
    }
    bench.finish();
}
