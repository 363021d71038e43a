//! Losses on a GPU against the CPU. Without a GPU nothing runs; with `HALFMODE_REQUIRE_CUDA=1` that is a failure.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a test")]

use halfmode_autograd::{Cx, Op, Tape};
use halfmode_precision::{DType, Domain, Format, Precision, PrecisionPolicy};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Rng, gpu};
use halfmode_train::{H1Loss, LpLoss, Reduction};
use std::sync::Arc;

/// Batch, channels and a grid of one to three axes, mostly odd; some fields have several tiles, some one point.
fn shapes(rng: &mut Rng) -> Vec<Vec<usize>> {
    let mut size = |most: usize| 1 + (rng.uniform() * most as f64) as usize;
    let mut shapes = vec![vec![1, 1, 1], vec![2, 3, 4], vec![1, 2, 5, 1], vec![2, 1, 61, 67], vec![1, 1, 600_011]];
    for idx in 0..10 {
        let mut shape = vec![size(3), size(3)];
        shape.extend((0..1 + idx % 3).map(|_| 3 + size([200, 40, 14][idx % 3])));
        shapes.push(shape);
    }
    shapes
}

fn losses(shape: &[usize], rng: &mut Rng) -> Vec<Box<dyn Op>> {
    let mut losses: Vec<Box<dyn Op>> = Vec::new();
    for (p, relative) in [(2.0, true), (2.0, false), (1.0, true), (1.0, false), (3.5, true), (3.5, false)] {
        let reduction = if relative { Reduction::Sum } else { Reduction::Mean };
        losses.push(Box::new(LpLoss { p, relative, reduction, measure: 0.7 }));
    }
    let grid = &shape[2..];
    let mixed = grid.iter().map(|&n| n < 4 || rng.uniform() < 0.5).collect();
    let open = grid.iter().map(|&n| n < 4).collect();
    for (relative, periodic) in [(true, vec![]), (false, vec![]), (true, open), (false, mixed)] {
        let reduction = if relative { Reduction::Mean } else { Reduction::Sum };
        losses.push(Box::new(H1Loss { relative, reduction, periodic, measure: 1.3 }));
    }
    losses
}

/// The loss and the gradient of the prediction, seeded with 3.
fn run(cx: &Cx, loss: Box<dyn Op>, [x, y]: [&Tensor; 2]) -> (f64, Vec<f64>) {
    let mut tape = Tape::new(cx.clone());
    let (x, y) = (tape.leaf(x.clone()), tape.constant(y.clone()));
    let loss = tape.apply_many(loss, &[&x, &y]).unwrap().remove(0);
    let value = loss.value().to_vec::<f64>().unwrap()[0];
    let mut gradient = Vec::new();
    let keep = &mut |_, grad: Tensor| {
        assert_eq!(grad.dtype(), x.value().dtype());
        gradient = grad.to_vec::<f64>().unwrap();
        Ok(())
    };
    tape.backward(loss, 3.0, keep).unwrap();
    (value, gradient)
}

fn assert_like_the_cpu(gpu: &Device, stored: [Precision; 2], domain: Domain, shape: &[usize], seed: u64) {
    let double = stored.contains(&Precision::F64);
    let policy = Arc::new(if double { PrecisionPolicy::double() } else { PrecisionPolicy::full() });
    let devices = [Device::cpu(2).unwrap(), gpu.clone()];
    let n = shape.iter().product::<usize>() * domain.scalars();
    let values = [0, 1].map(|which| Rng::new(2 * seed + which).normals(n));
    let n_losses = losses(shape, &mut Rng::new(seed)).len();
    for idx in 0..n_losses {
        let outcome = devices.each_ref().map(|device| {
            let loss = losses(shape, &mut Rng::new(seed)).swap_remove(idx);
            let field = |which: usize| {
                let dtype = DType { domain, precision: stored[which] };
                Tensor::from_scalars(device, &values[which], shape, dtype, Purpose::Data).unwrap()
            };
            run(&Cx::new(device, &policy), loss, [&field(0), &field(1)])
        });
        let name = format!("{:?} of {domain:?} {stored:?} {shape:?}", losses(shape, &mut Rng::new(seed))[idx]);
        let [(want, want_gradient), (got, got_gradient)] = outcome;
        let tolerance = if double { 1e-11 } else { 1e-5 };
        assert!((want - got).abs() <= tolerance * want.abs(), "{name}: {got} for {want}");
        assert_eq!(want_gradient.len(), got_gradient.len());
        // Second differences cancel: an error is measured by the largest slope. A gradient is rounded to its storage.
        let largest = want_gradient.iter().fold(0.0, |largest: f64, it| largest.max(it.abs()));
        let (unit, smallest) = match stored[0] {
            Precision::F16 => (Format::F16.unit_roundoff(), 2f64.powi(-24)),
            Precision::Bf16 => (Format::Bf16.unit_roundoff(), 0.0),
            _ => (0.0, 0.0),
        };
        for (at, (want, got)) in want_gradient.iter().zip(&got_gradient).enumerate() {
            let allowed = tolerance * largest + 4.0 * unit * want.abs() + smallest;
            assert!((want - got).abs() <= allowed, "{name} at {at}: {got} for {want}");
        }
    }
}

#[test]
fn losses_of_every_kind_in_every_storage() {
    use Precision::{Bf16, F16, F32, F64};
    let Some(device) = gpu() else { return };
    for (seed, shape) in shapes(&mut Rng::new(7)).into_iter().enumerate() {
        for stored in [[F64, F64], [F32, F32], [F16, F32], [Bf16, F32], [F16, F16], [Bf16, Bf16]] {
            for domain in [Domain::Real, Domain::Complex] {
                assert_like_the_cpu(&device, stored, domain, &shape, seed as u64);
            }
        }
    }
}

#[test]
fn a_field_without_an_error_has_no_gradient() {
    let Some(device) = gpu() else { return };
    let cx = Cx::new(&device, &Arc::new(PrecisionPolicy::full()));
    let values = Rng::new(1).normals(2 * 3 * 35);
    let x = Tensor::from_slice(&device, &values, [2, 3, 5, 7], Precision::F32, Purpose::Data).unwrap();
    for loss in losses(&[2, 3, 5, 7], &mut Rng::new(2)) {
        let (value, gradient) = run(&cx, loss, [&x, &x]);
        assert!(value.to_bits() == 0 && gradient.iter().all(|it| it.abs() <= 0.0), "{value}");
    }
}

/// Central differences along random directions, in double precision. The sum of moduli has corners: it is left out.
#[test]
fn gradients_match_differences_on_a_gpu() {
    let Some(device) = gpu() else { return };
    let cx = Cx::new(&device, &Arc::new(PrecisionPolicy::double()));
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for (seed, shape) in shapes(&mut Rng::new(9)).into_iter().enumerate() {
        for domain in [Domain::Real, Domain::Complex] {
            let n = shape.iter().product::<usize>() * domain.scalars();
            let mut rng = Rng::new(seed as u64);
            let [x, y, direction] = [(); 3].map(|()| rng.normals(n));
            let dtype = DType { domain, precision: Precision::F64 };
            let field =
                |values: &[f64]| Tensor::from_scalars(&device, values, &shape[..], dtype, Purpose::Data).unwrap();
            let make = || losses(&shape, &mut Rng::new(seed as u64));
            for idx in (0..make().len()).filter(|idx| ![2, 3].contains(idx)) {
                let value = |x: &[f64]| run(&cx, make().swap_remove(idx), [&field(x), &field(&y)]);
                let h = 1e-5 * (1.0 + dot(&x, &x).sqrt()) / dot(&direction, &direction).sqrt();
                let moved = |h: f64| x.iter().zip(&direction).map(|(x, d)| x + h * d).collect::<Vec<_>>();
                let (up, down) = (value(&moved(h)).0, value(&moved(-h)).0);
                // The gradient is seeded with 3.
                let (got, want) = (dot(&value(&x).1, &direction), 3.0 * (up - down) / (2.0 * h));
                let size = value(&x).1.iter().zip(&direction).map(|(g, d)| (g * d).abs()).sum::<f64>();
                // Truncation h^2 and cancellation eps |f| / h, both with room.
                let tolerance = 1e-6 * size + 1e-12 * (up.abs() + down.abs()) / h + 1e-12;
                let name = format!("{:?} of {domain:?} {shape:?}", make()[idx]);
                assert!((got - want).abs() <= tolerance, "{name}: {got} against {want}");
            }
        }
    }
}

/// What a plan counts is what a run takes.
#[test]
fn a_plan_counts_the_memory_of_a_run() {
    let Some(device) = gpu() else { return };
    let policy = Arc::new(PrecisionPolicy::full());
    let peaks = [device.twin(), device].map(|device| {
        for loss in losses(&[2, 3, 65, 33], &mut Rng::new(2)) {
            let x = device.alloc([2, 3, 65, 33], DType::real(Precision::F32), Purpose::Data).unwrap();
            let mut tape = Tape::new(Cx::new(&device, &policy));
            let (x, y) = (tape.leaf(x.clone()), tape.constant(x));
            let loss = tape.apply_many(loss, &[&x, &y]).unwrap().remove(0);
            tape.backward(loss, 1.0, &mut |_, _| Ok(())).unwrap();
        }
        device.memory().total.peak
    });
    assert_eq!(peaks[0], peaks[1]);
}
