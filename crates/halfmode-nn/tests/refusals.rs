//! What layers refuse, with an error rather than with numbers that mean nothing; and what they make of an empty batch.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::policy;
use halfmode_autograd::{Cx, Op};
use halfmode_nn::jets::{
    JetBias, JetConstant, JetDivergence, JetProduct, JetSoftplus, JetStart, JetTanh, Tangents, random_signs,
};
use halfmode_nn::{
    AveragePool, BatchNorm, BatchStatistics, ChannelBias, ChannelGate, Conv2d, FieldNorm, Linear, NormKind, PlanarFlow,
    SymmetricConv, TanhMlp, TimeColumn,
};
use halfmode_precision::{DType, Precision};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Rng, devices, gpu, run_op};

/// An op and the shapes of its inputs.
type Call<'a> = (&'a dyn Op, &'a [&'a [usize]]);

const BATCH_NORM: BatchNorm = BatchNorm(BatchStatistics::Batch);
const PERCEPTRON: TanhMlp = TanhMlp(TimeColumn::None);
const END: JetDivergence = JetDivergence { tangents: Tangents::Given, channels: 2 };
const SYMMETRIC: SymmetricConv = SymmetricConv { padding: [1, 1] };

fn inputs(device: &Device, shapes: &[&[usize]]) -> Vec<Tensor> {
    shapes.iter().map(|shape| Rng::new(1).tensor(device, shape, Precision::F32)).collect()
}

fn said(op: &dyn Op, inputs: &[Tensor]) -> String {
    let cx = Cx::new(&Device::cpu(1).unwrap(), &policy(Precision::F32));
    let refs: Vec<&Tensor> = inputs.iter().collect();
    op.forward(&cx, &refs).map_or_else(|err| err.to_string(), |_| "nothing".into())
}

#[test]
fn complex_operands_are_refused() {
    let device = Device::cpu(1).unwrap();
    let calls: [Call<'_>; 19] = [
        (&Linear, &[&[4, 3], &[2, 3]]),
        (&ChannelBias, &[&[4, 3], &[3]]),
        (&ChannelGate, &[&[4, 3], &[3]]),
        (&Conv2d::new(0), &[&[1, 4, 4, 3], &[2, 2, 3, 2], &[2]]),
        (&Conv2d::transposed(0), &[&[1, 4, 4, 2], &[2, 2, 3, 2]]),
        (&SYMMETRIC, &[&[1, 4, 4, 3], &[3, 3, 3, 2], &[2]]),
        (&AveragePool::halving([4, 4]), &[&[1, 4, 4, 3]]),
        (&FieldNorm(NormKind::Instance), &[&[2, 5, 3]]),
        (&FieldNorm(NormKind::Group), &[&[2, 5, 3], &[3], &[3]]),
        (&BATCH_NORM, &[&[2, 5, 3], &[3], &[3]]),
        (&TanhMlp(TimeColumn::Last), &[&[2, 3], &[1], &[4, 4], &[4]]),
        (&PlanarFlow, &[&[4, 2], &[3, 7]]),
        (&JetTanh, &[&[3, 4, 2]]),
        (&JetSoftplus, &[&[3, 4, 2]]),
        (&JetProduct, &[&[3, 4, 2], &[3, 4, 2]]),
        (&JetStart(Tangents::Given), &[&[4, 2], &[4, 2]]),
        (&END, &[&[2, 4, 2], &[4, 2]]),
        (&JetBias, &[&[3, 4, 2], &[2]]),
        (&JetConstant, &[&[3, 4, 2], &[1]]),
    ];
    for (op, shapes) in calls {
        let real = inputs(&device, shapes);
        assert_eq!(said(op, &real), "nothing", "{}", op.name());
        for idx in 0..real.len() {
            let mut given = real.clone();
            given[idx] = device.alloc(shapes[idx], DType::complex(Precision::F32), Purpose::Activation).unwrap();
            let message = said(op, &given);
            assert!(message.contains("expected real"), "{}, input {idx}: {message}", op.name());
        }
    }
}

/// No channels, too few axes, and operands of other shapes than the first one's.
#[test]
fn shapes_without_a_meaning_are_refused() {
    let device = Device::cpu(1).unwrap();
    let calls: [Call<'_>; 18] = [
        (&Conv2d::new(0), &[&[1, 4, 4, 0], &[2, 2, 0, 2]]),
        (&Conv2d::new(0), &[&[1, 4, 4, 3], &[2, 2, 3, 0]]),
        (&Conv2d::transposed(0), &[&[1, 4, 4, 0], &[2, 2, 3, 0]]),
        (&SYMMETRIC, &[&[1, 4, 4, 3], &[3, 3, 3, 0], &[0]]),
        (&FieldNorm(NormKind::Instance), &[&[2, 5, 0]]),
        (&FieldNorm(NormKind::Instance), &[&[5]]),
        (&FieldNorm(NormKind::Group), &[&[5], &[5], &[5]]),
        (&BATCH_NORM, &[&[2, 5, 0], &[0], &[0]]),
        (&PERCEPTRON, &[&[4, 0], &[2, 0], &[2]]),
        (&PlanarFlow, &[&[4, 0], &[1]]),
        (&JetTanh, &[&[3]]),
        (&JetSoftplus, &[&[3, 4, 0]]),
        (&JetProduct, &[&[3, 4, 2], &[2, 4, 2]]),
        (&JetProduct, &[&[3, 4, 2], &[3, 2, 4]]),
        (&JetBias, &[&[3], &[3]]),
        (&JetConstant, &[&[3], &[1]]),
        (&END, &[&[2, 4, 2], &[3, 2]]),
        (&END, &[&[2, 4, 2], &[5, 2]]),
    ];
    for (op, shapes) in calls {
        let message = said(op, &inputs(&device, shapes));
        assert!(message.contains("expected shape"), "{} of {shapes:?}: {message}", op.name());
    }
    let message = random_signs(&device, &[1 << 33, 1 << 33], Precision::F32, 1).unwrap_err().to_string();
    assert!(message.contains("overflows the address space"), "{message}");
}

/// Of no samples gradients are zero, and so are the statistics that a batch norm gathers.
#[test]
fn an_empty_batch_has_gradients_and_statistics_of_zero() {
    for device in devices().into_iter().chain(gpu()) {
        for precision in Precision::ALL {
            let cx = Cx::new(&device, &policy(precision));
            let inputs = [[0, 5, 3].as_slice(), &[3], &[3]].map(|shape| Rng::new(1).tensor(&device, shape, precision));
            let ops: [fn() -> Box<dyn Op>; 3] = [
                || Box::new(FieldNorm(NormKind::AffineInstance)),
                || Box::new(FieldNorm(NormKind::Group)),
                || Box::new(BATCH_NORM),
            ];
            for op in ops {
                let (_, grads) = run_op(&cx, op(), &inputs, &[]);
                for grad in &grads[1..] {
                    assert_eq!(grad.as_ref().unwrap().to_vec::<f64>().unwrap(), [0.0; 3], "{precision}");
                }
            }
            let outputs = BATCH_NORM.forward(&cx, &inputs.each_ref()).unwrap().0;
            for statistic in &outputs[1..] {
                assert_eq!(statistic.to_vec::<f64>().unwrap(), [0.0; 3], "{precision}");
            }
        }
    }
}
