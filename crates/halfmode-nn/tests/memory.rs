//! What a training step of a small operator keeps, and that it is known before it runs.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod common;

use common::transform;
use expect_test::expect;
use halfmode_autograd::{Cx, MemoryReport, Tape, Var};
use halfmode_nn::{Activation, Channels, FnoBlock, GridEmbedding, Init, ParamSpec, Params, PointwiseMlp, Stabilizer};
use halfmode_precision::{Precision, PrecisionPolicy, Preset};
use halfmode_tensor::{Device, MemoryStats, Purpose, Target, Tensor};
use std::ops::Range;
use std::sync::Arc;

const BATCH: usize = 2;
const N: [usize; 2] = [16, 16];
const C: usize = 8;
const HIDDEN: usize = 4;
const MODES: [usize; 2] = [8, 5];
const WIDE: usize = 16;

fn specs() -> Vec<ParamSpec> {
    let uniform = Init::Uniform { bound: 0.3 };
    let real = |name: &str, shape: &[usize]| ParamSpec::real(name, shape, uniform);
    let mlp = |name: &str, [c_in, c_hidden, c_out]: [usize; 3]| {
        vec![
            real(&format!("{name}.0.weight"), &[c_hidden, c_in, 1]),
            real(&format!("{name}.0.bias"), &[c_hidden]),
            real(&format!("{name}.1.weight"), &[c_out, c_hidden, 1]),
            real(&format!("{name}.1.bias"), &[c_out]),
        ]
    };
    let block = |name: &str| {
        vec![
            ParamSpec::spectral(format!("{name}.weight"), &[C, C, MODES[0], MODES[1]], Init::Normal { std: 0.1 }),
            real(&format!("{name}.bias"), &[C, 1, 1]),
            real(&format!("{name}.skip"), &[C, C, 1]),
            real(&format!("{name}.w_1"), &[HIDDEN, C, 1]),
            real(&format!("{name}.b_1"), &[HIDDEN]),
            real(&format!("{name}.w_2"), &[C, HIDDEN, 1]),
            real(&format!("{name}.b_2"), &[C]),
            ParamSpec::real(format!("{name}.gate"), &[1, C, 1, 1], Init::Ones),
        ]
    };
    [mlp("lifting", [3, WIDE, C]), block("block_0"), block("block_1"), mlp("projection", [C, WIDE, 1])].concat()
}

fn with<'a>(leaves: &'a [Var], x: &'a Var, range: Range<usize>) -> Vec<&'a Var> {
    std::iter::once(x).chain(&leaves[range]).collect()
}

/// Forward and backward; the ledger before and after backward, and what the tape kept.
fn step(device: &Device, policy: &PrecisionPolicy) -> ([MemoryStats; 2], MemoryReport) {
    let params = Params::new(device, specs(), policy, 1).unwrap();
    let plan = transform(device, &N, &MODES, policy.transform.accumulate, None);
    let values: Vec<f64> = (0..BATCH * N[0] * N[1]).map(|i| (i as f64 * 0.7).sin()).collect();
    let data = Tensor::from_slice(device, &values, [BATCH, 1, N[0], N[1]], Precision::F32, Purpose::Data).unwrap();
    device.reset_peak();
    let mut tape = Tape::new(Cx::new(device, &Arc::new(policy.clone())));
    let leaves = params.leaves(&mut tape);
    let x = tape.constant(data);
    let lifting =
        PointwiseMlp { input: Channels::First, output: Channels::Last, embedding: GridEmbedding::Coordinates };
    let mut v = tape.apply(lifting, &with(&leaves, &x, 0..4)).unwrap();
    for (idx, activation) in [Activation::Gelu, Activation::None].into_iter().enumerate() {
        let block = FnoBlock { transform: Arc::clone(&plan), stabilizer: Stabilizer::Tanh, activation };
        v = tape.apply(block, &with(&leaves, &v, 4 + 8 * idx..12 + 8 * idx)).unwrap();
    }
    let projection = PointwiseMlp { input: Channels::Last, output: Channels::First, embedding: GridEmbedding::None };
    let y = tape.apply(projection, &with(&leaves, &v, 20..24)).unwrap();
    drop(v);
    let (forward, report) = (device.memory(), tape.memory_report());
    let seed =
        Tensor::from_slice(device, &values, y.value().shape().clone(), y.value().precision(), Purpose::Activation);
    let mut grads = Vec::new();
    tape.backward_from(vec![(y, seed.unwrap())], &mut |_, grad| {
        assert!(grad.all_finite());
        grads.push(grad);
        Ok(())
    })
    .unwrap();
    assert_eq!(grads.len(), params.list.len());
    ([forward, device.memory()], report)
}

#[test]
fn report_in_single_precision() {
    let (_, report) = step(&Device::cpu(2).unwrap(), &PrecisionPolicy::full());
    expect![[r#"
        op             role      shape            dtype  bytes  own
        pointwise_mlp  x         [2, 1, 16, 16]   f32        0  shared
        pointwise_mlp  w_1       [16, 3, 1]       f32        0  shared
        pointwise_mlp  b_1       [16]             f32        0  shared
        pointwise_mlp  w_2       [8, 16, 1]       f32        0  shared
        pointwise_mlp  b_2       [8]              f32        0  shared
        fno_block      x         [2, 16, 16, 8]   f32    16384  yes
        fno_block      x_hat     [2, 2, 8, 5, 8]  f32     5120  yes
        fno_block      spectral  [40, 8, 16]      f32        0  shared
        fno_block      bias      [8, 1, 1]        f32        0  shared
        fno_block      skip      [8, 8, 1]        f32        0  shared
        fno_block      w_1       [4, 8, 1]        f32        0  shared
        fno_block      b_1       [4]              f32        0  shared
        fno_block      w_2       [8, 4, 1]        f32        0  shared
        fno_block      b_2       [8]              f32        0  shared
        fno_block      gate      [1, 8, 1, 1]     f32        0  shared
        fno_block      x         [2, 16, 16, 8]   f32    16384  yes
        fno_block      x_hat     [2, 2, 8, 5, 8]  f32     5120  yes
        fno_block      spectral  [40, 8, 16]      f32        0  shared
        fno_block      bias      [8, 1, 1]        f32        0  shared
        fno_block      skip      [8, 8, 1]        f32        0  shared
        fno_block      w_1       [4, 8, 1]        f32        0  shared
        fno_block      b_1       [4]              f32        0  shared
        fno_block      w_2       [8, 4, 1]        f32        0  shared
        fno_block      b_2       [8]              f32        0  shared
        fno_block      gate      [1, 8, 1, 1]     f32        0  shared
        pointwise_mlp  x         [2, 16, 16, 8]   f32    16384  yes
        pointwise_mlp  w_1       [16, 8, 1]       f32        0  shared
        pointwise_mlp  b_1       [16]             f32        0  shared
        pointwise_mlp  w_2       [1, 16, 1]       f32        0  shared
        pointwise_mlp  b_2       [1]              f32        0  shared
        total 59392 bytes"#]]
    .assert_eq(&report.to_string());
}

#[test]
fn report_in_mixed_precision() {
    let (_, report) = step(&Device::cpu(2).unwrap(), &PrecisionPolicy::mixed(Precision::F16));
    expect![[r#"
        op             role      shape            dtype  bytes  own
        pointwise_mlp  x         [2, 1, 16, 16]   f32        0  shared
        pointwise_mlp  w_1       [16, 3, 1]       f16        0  shared
        pointwise_mlp  b_1       [16]             f16        0  shared
        pointwise_mlp  w_2       [8, 16, 1]       f16        0  shared
        pointwise_mlp  b_2       [8]              f16        0  shared
        fno_block      x         [2, 16, 16, 8]   f16     8192  yes
        fno_block      x_hat     [2, 2, 8, 5, 8]  f16     2560  yes
        fno_block      spectral  [40, 8, 16]      f16        0  shared
        fno_block      bias      [8, 1, 1]        f16        0  shared
        fno_block      skip      [8, 8, 1]        f16        0  shared
        fno_block      w_1       [4, 8, 1]        f16        0  shared
        fno_block      b_1       [4]              f16        0  shared
        fno_block      w_2       [8, 4, 1]        f16        0  shared
        fno_block      b_2       [8]              f16        0  shared
        fno_block      gate      [1, 8, 1, 1]     f16        0  shared
        fno_block      x         [2, 16, 16, 8]   f16     8192  yes
        fno_block      x_hat     [2, 2, 8, 5, 8]  f16     2560  yes
        fno_block      spectral  [40, 8, 16]      f16        0  shared
        fno_block      bias      [8, 1, 1]        f16        0  shared
        fno_block      skip      [8, 8, 1]        f16        0  shared
        fno_block      w_1       [4, 8, 1]        f16        0  shared
        fno_block      b_1       [4]              f16        0  shared
        fno_block      w_2       [8, 4, 1]        f16        0  shared
        fno_block      b_2       [8]              f16        0  shared
        fno_block      gate      [1, 8, 1, 1]     f16        0  shared
        pointwise_mlp  x         [2, 16, 16, 8]   f16     8192  yes
        pointwise_mlp  w_1       [16, 8, 1]       f16        0  shared
        pointwise_mlp  b_1       [16]             f16        0  shared
        pointwise_mlp  w_2       [1, 16, 1]       f16        0  shared
        pointwise_mlp  b_2       [1]              f16        0  shared
        total 29696 bytes"#]]
    .assert_eq(&report.to_string());
}

#[test]
fn ledger_in_mixed_precision() {
    let (stats, _) = step(&Device::cpu(2).unwrap(), &PrecisionPolicy::mixed(Precision::F16));
    expect![[r#"
        purpose          live bytes     peak bytes
        param                 21826          21826
        master                43652          43652
        grad                  43652          43652
        saved                     0           5120
        activation                0          33792
        workspace                 0          70356
        table                   876            876
        data                   2048           2048
        activations               0         109268
        total                112054         187638"#]]
    .assert_eq(&stats[1].to_string());
}

/// What the tape says it keeps is what the ledger counts as saved or in flight after forward.
#[test]
fn the_report_is_what_the_ledger_counts() {
    for policy in [PrecisionPolicy::full(), PrecisionPolicy::mixed(Precision::F16)] {
        let ([forward, _], report) = step(&Device::cpu(2).unwrap(), &policy);
        let out = BATCH * N[0] * N[1] * policy.pointwise.storage.bytes();
        assert_eq!(forward.activations.live, report.total_bytes() + out, "{}", policy.preset);
    }
}

#[test]
fn the_planning_device_counts_exactly_what_the_step_takes() {
    let mut policies = vec![PrecisionPolicy::full(), PrecisionPolicy::double()];
    for half in [Precision::F16, Precision::Bf16] {
        policies.extend([Preset::Amp, Preset::Mixed, Preset::Half].map(|preset| PrecisionPolicy::preset(preset, half)));
    }
    for policy in policies {
        for threads in 1..=3 {
            let ran = step(&Device::cpu(threads).unwrap(), &policy);
            let planned = step(&Device::meta(Target::Cpu { threads }), &policy);
            assert_eq!(ran, planned, "{} {} with {threads} threads", policy.preset, policy.format);
        }
    }
}
