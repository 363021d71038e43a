//! Tensors: values, sharing, errors, the ledger, and the edges to `ndarray`.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]

use halfmode_precision::{DType, Format, Precision};
use halfmode_tensor::{Device, Elementwise, Error, Purpose, Real, Shape, Target, Tensor, View};
use ndarray::{Array2, ArrayD, IxDyn, s};
use num_complex::Complex;
use proptest::prelude::*;

/// Lengths around the tile of 4096 scalars, and around vector widths.
const LENGTHS: [usize; 11] = [0, 1, 2, 15, 16, 17, 4095, 4096, 4097, 8192, 12_289];

fn cpu() -> Device {
    Device::cpu(2).unwrap()
}

fn meta() -> Device {
    Device::meta(Target::Cpu { threads: 2 })
}

fn wave(n: usize) -> Vec<f64> {
    (0..n).map(|i| (1 + i % 7) as f64 * (i as f64 * 0.37).sin()).collect()
}

fn tensor(device: &Device, values: &[f64], precision: Precision) -> Tensor {
    Tensor::from_slice(device, values, [values.len()], precision, Purpose::Activation).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_vec().unwrap()
}

/// One rounding to nearest even, by the rounding model of the formats.
fn round(value: f64, precision: Precision) -> f64 {
    Format::from(precision).round(value)
}

/// Property tests that keep what failed beside this file.
fn cases(n: u32) -> ProptestConfig {
    let failures = proptest::test_runner::FileFailurePersistence::WithSource("regressions");
    ProptestConfig { cases: n, failure_persistence: Some(Box::new(failures)), ..ProptestConfig::default() }
}

fn same(a: f64, b: f64) -> bool {
    a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan()
}

proptest! {
    #![proptest_config(cases(64))]

    /// Any bit pattern, NaNs and infinities too, between any two precisions.
    #[test]
    fn casts_round_once(bits in proptest::collection::vec(any::<u64>(), 1..40)) {
        let device = cpu();
        // Also the same significands at exponents that halves have.
        let all = bits.iter().flat_map(|&bits| {
            let small = bits & !(0x7ff << 52) | (1023 - 26 + (bits >> 52) % 44) << 52;
            [f64::from_bits(bits), f64::from_bits(small)]
        });
        let all: Vec<f64> = all.collect();
        for from in Precision::ALL {
            let x = tensor(&device, &all, from);
            let stored = values(&x);
            for (value, stored) in all.iter().zip(&stored) {
                prop_assert!(same(round(*value, from), *stored), "{value:e} in {from}: {stored:e}");
            }
            for to in Precision::ALL {
                let y = x.cast(to, Purpose::Saved).unwrap();
                prop_assert_eq!(y.precision(), to);
                prop_assert_eq!(y.shares_buffer(&x), from == to);
                for (value, got) in stored.iter().zip(values(&y)) {
                    prop_assert!(same(round(*value, to), got), "{value:e} from {from} to {to}: {got:e}");
                }
            }
        }
    }

    #[test]
    fn elementwise_is_elementwise(len in prop_oneof![0usize..40, 4090usize..4100, 8190usize..8200], seed in 0usize..1000) {
        struct MulAdd;
        impl Elementwise for MulAdd {
            fn tile<R: Real>(&self, inputs: &[&[R]], out: &mut [R]) {
                for (idx, out) in out.iter_mut().enumerate() {
                    *out = *out * inputs[1][idx] + inputs[2][idx];
                }
            }
        }
        let device = cpu();
        let operands: Vec<Vec<f64>> = (0..3).map(|k| wave(len + seed + k)[seed + k..].to_vec()).collect();
        for input in Precision::ALL {
            for output in Precision::ALL {
                let inputs: Vec<Tensor> = operands.iter().map(|v| tensor(&device, v, input)).collect();
                let refs: Vec<&Tensor> = inputs.iter().collect();
                let y = Tensor::elementwise("mul_add", &MulAdd, &refs, DType::real(output), Purpose::Activation).unwrap();
                let wide: Vec<Vec<f64>> = inputs.iter().map(values).collect();
                for (idx, got) in values(&y).into_iter().enumerate() {
                    // In the accumulator of the output: f64 for f64, else f32.
                    let want = if output == Precision::F64 {
                        wide[0][idx] * wide[1][idx] + wide[2][idx]
                    } else {
                        f64::from(wide[0][idx] as f32 * wide[1][idx] as f32 + wide[2][idx] as f32)
                    };
                    prop_assert!(same(got, round(want, output)), "{idx} of {len}, {input} to {output}: {got} {want}");
                }
            }
        }
    }

    /// `c = keep c + scale a b` on strided views against three loops.
    #[test]
    fn products_of_strided_matrices((m, n, k) in (0usize..9, 0usize..9, 0usize..20), strides in (0usize..3, 0usize..3, any::<bool>()), keep in 0usize..3) {
        let (pad_a, pad_b, transposed) = strides;
        let keep = [0.0, 1.0, -0.5][keep];
        // Rows apart by more than their length; b also as a transpose.
        let (a_row, b_row) = (k + pad_a, if transposed { k + pad_b } else { n + pad_b });
        let a = wave(m * a_row + 1);
        let b = wave((if transposed { n } else { k }) * b_row + 2);
        let at_b = |p: usize, j: usize| if transposed { b[j * b_row + p] } else { b[p * b_row + j] };
        let start = wave(m * n);
        let mut c = if keep == 0.0 { vec![f64::NAN; m * n] } else { start.clone() };
        let mat_b = halfmode_tensor::Mat { data: &b, row: if transposed { 1 } else { b_row }, col: if transposed { b_row } else { 1 } };
        let mat_a = halfmode_tensor::Mat { data: &a, row: a_row, col: 1 };
        f64::gemm((m, n, k), mat_a, mat_b, halfmode_tensor::MatMut::rows(&mut c, n), keep, 0.25);
        for i in 0..m {
            for j in 0..n {
                let product: f64 = (0..k).map(|p| a[i * a_row + p] * at_b(p, j)).sum();
                let want = 0.25 * product + if keep == 0.0 { 0.0 } else { keep * start[i * n + j] };
                prop_assert!((c[i * n + j] - want).abs() < 1e-12, "({i}, {j}) of {m} x {n} x {k}: {} {want}", c[i * n + j]);
            }
        }
    }
}

/// A value just above a tie of binary16: rounding through f32 first would fall on the tie, and down.
#[test]
fn double_precision_is_not_rounded_twice() {
    let value = 1.0 + 2f64.powi(-11) + 2f64.powi(-40);
    let x = tensor(&cpu(), &[value], Precision::F64);
    assert_eq!(values(&x.cast(Precision::F16, Purpose::Saved).unwrap()), [1.0 + 2f64.powi(-10)]);
    assert_eq!(values(&tensor(&cpu(), &[value], Precision::F16)), [1.0 + 2f64.powi(-10)]);
    // bfloat16 has seven bits behind the point: just above a tie, in bits that f32 has.
    assert_eq!(values(&tensor(&cpu(), &[4.265626907], Precision::Bf16)), [4.28125]);
    assert_eq!(values(&tensor(&cpu(), &[4.265625, 4.296875], Precision::Bf16)), [4.25, 4.3125]);
    assert_eq!(values(&tensor(&cpu(), &[65519.9, 65520.0, 1e-8], Precision::F16)), [65504.0, f64::INFINITY, 0.0]);
}

#[test]
fn long_casts_cover_every_scalar() {
    let device = cpu();
    for len in LENGTHS {
        let want = wave(len);
        for (from, to) in
            [(Precision::F64, Precision::F16), (Precision::F32, Precision::Bf16), (Precision::F16, Precision::F32)]
        {
            let x = tensor(&device, &want, from);
            let y = values(&x.cast(to, Purpose::Activation).unwrap());
            assert!(y.len() == len && want.iter().zip(&y).all(|(w, y)| same(round(round(*w, from), to), *y)), "{len}");
        }
    }
}

#[test]
fn clones_share_copies_do_not() {
    let device = cpu();
    let mut x = tensor(&device, &[1.0, 2.0], Precision::F16);
    let shared = x.clone();
    assert!(x.shares_buffer(&shared) && !x.is_unshared());
    assert_eq!(x.view_mut().unwrap_err(), Error::Shared { n_owners: 2 });
    assert_eq!(x.scale_assign(2.0), Err(Error::Shared { n_owners: 2 }));
    assert_eq!(x.add_assign(&shared), Err(Error::Shared { n_owners: 2 }));
    let mut copy = x.copy(Purpose::Param).unwrap();
    assert!(!copy.shares_buffer(&x) && copy.purpose() == Purpose::Param && copy.precision() == Precision::F16);
    copy.scale_assign(2.0).unwrap();
    assert_eq!((values(&copy), values(&x)), (vec![2.0, 4.0], vec![1.0, 2.0]));
    drop(shared);
    x.add_assign(&copy).unwrap();
    assert_eq!(values(&x), [3.0, 6.0]);
    let message = Error::Shared { n_owners: 2 }.to_string();
    assert_eq!(message, "the buffer is shared by 2 tensors and cannot be written in place: copy it first");
}

#[test]
fn sums_and_scales_in_place_in_every_precision() {
    let device = cpu();
    for len in LENGTHS {
        for precision in Precision::ALL {
            for other in Precision::ALL {
                let mut x = tensor(&device, &wave(len), precision);
                let y = tensor(&device, &wave(len + 3)[3..], other);
                let (a, b) = (values(&x), values(&y));
                x.add_assign(&y).unwrap();
                x.scale_assign(0.5).unwrap();
                for ((got, a), b) in values(&x).iter().zip(a).zip(b) {
                    let sum = if precision == Precision::F64 { a + b } else { f64::from(a as f32 + b as f32) };
                    let want = round(0.5 * round(sum, precision), precision);
                    assert!(same(*got, want), "{precision} += {other}: {got} {want}");
                }
            }
        }
    }
}

#[test]
fn reshape_shares_and_counts() {
    let device = cpu();
    let x = tensor(&device, &wave(12), Precision::F32);
    let y = x.reshape([3, 4]).unwrap();
    assert!(y.shares_buffer(&x) && y.shape() == &Shape::from([3, 4]) && y.bytes() == 48);
    assert_eq!(device.memory().total.live, 48);
    let err = x.reshape([5, 2]).unwrap_err().to_string();
    assert_eq!(err, "reshape: expected shape [12] for `x`, found [5, 2]");
    assert!(x.reshape([usize::MAX, 2, 6]).is_err());
    assert_eq!(tensor(&device, &[1.0], Precision::F32).reshape(Shape::default()).unwrap().numel(), 1);
    assert_eq!(device.alloc([3, 0, 2], DType::real(Precision::F16), Purpose::Data).unwrap().numel(), 0);
}

#[test]
fn impossible_sizes_are_errors() {
    for device in [cpu(), meta()] {
        let alloc = |shape: &[usize], dtype| device.alloc(shape, dtype, Purpose::Activation).unwrap_err();
        let f64s = DType::real(Precision::F64);
        assert!(matches!(alloc(&[usize::MAX, 2], f64s), Error::TooLarge { .. }));
        assert!(matches!(alloc(&[usize::MAX / 4], f64s), Error::TooLarge { .. }));
        assert!(matches!(alloc(&[1 << 61], DType::complex(Precision::F16)), Error::TooLarge { .. }));
        let err = Tensor::from_slice(&device, &[1.0], [usize::MAX, 2], Precision::F16, Purpose::Data).unwrap_err();
        assert_eq!(err.to_string(), "shape [18446744073709551615, 2] of f16 overflows the address space");
        let err = Tensor::from_slice(&device, &[1.0, 2.0], [3], Precision::F16, Purpose::Data).unwrap_err();
        assert_eq!(err, Error::Length { n_values: 2, shape: Shape::from([3]), expected: 3 });
        assert_eq!(err.to_string(), "2 values cannot fill shape [3], which holds 3 scalars");
        let complex = DType::complex(Precision::F32);
        assert!(Tensor::from_scalars(&device, &[1.0; 5], [3], complex, Purpose::Data).is_err());
        assert_eq!(device.memory().total.live, 0);
    }
    // More than the address space but not more than can be counted: refused by the system.
    let err = cpu().alloc([1 << 57], DType::real(Precision::F64), Purpose::Saved).unwrap_err();
    assert!(matches!(err, Error::OutOfMemory { bytes: 0x1000_0000_0000_0000, purpose: Purpose::Saved, .. }), "{err}");
}

#[test]
fn mismatched_operands_are_errors() {
    struct Nothing;
    impl Elementwise for Nothing {
        fn tile<R: Real>(&self, _: &[&[R]], _: &mut [R]) {}
    }
    let (device, elsewhere) = (cpu(), cpu());
    let dtype = DType::real(Precision::F32);
    let run =
        |inputs: &[&Tensor]| Tensor::elementwise("nothing", &Nothing, inputs, dtype, Purpose::Activation).unwrap_err();
    let x = tensor(&device, &[1.0, 2.0], Precision::F32);
    let longer = tensor(&device, &[1.0, 2.0, 3.0], Precision::F32);
    let foreign = tensor(&elsewhere, &[1.0, 2.0], Precision::F32);
    let complex = device.alloc([2], DType::complex(Precision::F32), Purpose::Activation).unwrap();
    assert_eq!(run(&[&x, &longer]).to_string(), "nothing: expected shape [2] for `inputs`, found [3]");
    assert_eq!(run(&[&x, &foreign]), Error::Devices { op: "nothing" });
    assert_eq!(run(&[&x, &complex]).to_string(), "nothing: `inputs` is cf32, expected real");
    assert!(matches!(run(&[]), Error::Rank { .. }));
    let mut y = x.copy(Purpose::Activation).unwrap();
    assert_eq!(y.add_assign(&longer).unwrap_err().to_string(), "add_assign: expected shape [2] for `other`, found [3]");
    assert_eq!(y.add_assign(&foreign), Err(Error::Devices { op: "add_assign" }));
    assert_eq!(y.add_assign(&complex).unwrap_err().to_string(), "add_assign: `other` is cf32, expected real");
}

#[test]
fn the_planning_device_counts_and_has_no_values() {
    let device = meta();
    assert!(!device.launches() && device.n_threads() == 2);
    let x = Tensor::from_slice(&device, &[1.0, 2.0], [2], Precision::F16, Purpose::Data).unwrap();
    assert_eq!(x.view().unwrap_err(), Error::NoValues);
    assert_eq!(x.to_vec::<f32>().unwrap_err(), Error::NoValues);
    assert_eq!(x.sum_squares(), Err(Error::NoValues));
    assert!(x.to_ndarray::<f64>().is_err() && x.as_ndarray().is_none() && x.all_finite());
    let mut y = x.cast(Precision::F32, Purpose::Saved).unwrap();
    assert!(y.add_assign(&x).is_ok() && y.scale_assign(2.0).is_ok());
    // Terabytes cost nothing here.
    let big = device.alloc([1 << 20, 1 << 20], DType::real(Precision::F32), Purpose::Activation).unwrap();
    let memory = device.memory();
    assert_eq!((memory.of(Purpose::Data).live, memory.of(Purpose::Saved).live), (4, 8));
    assert_eq!(memory.activations.live, (1 << 42) + 8);
    drop((big, x, y));
    assert_eq!((device.memory().total.live, device.memory().total.peak), (0, (1 << 42) + 12));
    assert!(device.run(|| unreachable!("nothing runs on the planning device")).is_none() as usize == 1);
    let twin = cpu().twin();
    assert_eq!(twin.target(), Target::Cpu { threads: 2 });
    assert!(!twin.same(&device) && twin.same(&twin.clone()));
}

#[test]
fn the_ledger_follows_every_buffer() {
    let device = cpu();
    let x = tensor(&device, &wave(100), Precision::F32);
    let clone = x.clone();
    let view = x.reshape([10, 10]).unwrap();
    let half = x.cast(Precision::F16, Purpose::Saved).unwrap();
    let same = x.cast(Precision::F32, Purpose::Saved).unwrap();
    let memory = device.memory();
    assert_eq!((memory.of(Purpose::Activation).live, memory.of(Purpose::Saved).live), (400, 200));
    drop((x, clone, view));
    assert_eq!(device.memory().of(Purpose::Activation).live, 400);
    drop(same);
    assert_eq!(device.memory().of(Purpose::Activation).live, 0);
    assert_eq!((device.memory().total.live, device.memory().total.peak), (200, 600));
    device.reset_peak();
    assert_eq!(device.memory().total.peak, 200);
    drop(half);
    assert_eq!(device.memory().total.live, 0);
    let text = device.memory().to_string();
    assert!(
        text.starts_with("purpose          live bytes     peak bytes\nsaved                     0            200"),
        "{text}"
    );
}

#[test]
fn scratch_is_counted_per_thread_while_reserved() {
    let device = Device::cpu(3).unwrap();
    let scratch = device.scratch(1000, 4);
    assert_eq!((scratch.bytes(), device.memory().of(Purpose::Workspace).live), (12_000, 12_000));
    let lens = device.run(|| {
        scratch.with::<f32, _>(|buffer| {
            buffer.fill(1.0);
            buffer.len()
        })
    });
    assert_eq!(lens, Some(1000));
    let small = device.scratch(10, 8);
    assert_eq!(device.run(|| small.with::<f64, _>(|buffer| buffer.len())), Some(10));
    assert_eq!(device.memory().activations.live, 12_240);
    drop((scratch, small));
    assert_eq!(device.memory().total.live, 0);
    let planned = device.twin();
    assert_eq!(planned.scratch(1000, 4).bytes(), 12_000);
}

#[test]
fn finite_means_every_scalar() {
    let device = cpu();
    for precision in Precision::ALL {
        for len in LENGTHS {
            assert!(tensor(&device, &wave(len), precision).all_finite());
            for at in [0, len / 2, len.saturating_sub(1)].into_iter().filter(|at| *at < len) {
                for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                    let mut values = wave(len);
                    values[at] = bad;
                    assert!(!tensor(&device, &values, precision).all_finite(), "{precision} {at} of {len}");
                }
            }
        }
    }
    let overflow = tensor(&device, &[1e5], Precision::F32).cast(Precision::F16, Purpose::Grad).unwrap();
    assert!(!overflow.all_finite());
}

#[test]
fn sums_do_not_depend_on_threads() {
    for precision in Precision::ALL {
        for len in LENGTHS {
            let sums: Vec<u64> = [1, 2, 3, 8]
                .into_iter()
                .map(|threads| {
                    let x = tensor(&Device::cpu(threads).unwrap(), &wave(len), precision);
                    let sum = x.sum_squares().unwrap();
                    let want: f64 = values(&x).iter().map(|v| v * v).sum();
                    assert!((sum - want).abs() <= 1e-13 * want, "{sum} {want}");
                    sum.to_bits()
                })
                .collect();
            assert!(sums.windows(2).all(|pair| pair[0] == pair[1]), "{precision} {len}");
        }
    }
}

#[test]
fn gathered_entries_and_overwritten_values() {
    for device in [cpu(), meta()] {
        for precision in Precision::ALL {
            let dtype = DType::complex(precision);
            let counted: Vec<f64> = (0..12).map(f64::from).collect();
            let x = Tensor::from_scalars(&device, &counted, [3, 2], dtype, Purpose::Data).unwrap();
            let mut y = x.gather(&[2, 0, 2, 1], Purpose::Activation).unwrap();
            assert_eq!((&y.shape()[..], y.dtype(), y.purpose()), (&[4, 2][..], dtype, Purpose::Activation));
            assert_eq!(x.gather(&[], Purpose::Data).unwrap().bytes(), 0);
            let err = x.gather(&[1, 3], Purpose::Data).unwrap_err();
            assert_eq!(err.to_string(), "gather: index 3 is out of range for an axis of 3");
            let scalar = device.alloc([0; 0], dtype, Purpose::Data).unwrap();
            assert!(matches!(scalar.gather(&[0], Purpose::Data), Err(Error::Rank { .. })));
            assert!(matches!(y.copy_from_slice(&[0.0; 8]), Err(Error::Length { expected: 16, .. })));
            if device.launches() {
                assert_eq!(
                    values(&y),
                    [[8.0, 9.0, 10.0, 11.0], [0.0, 1.0, 2.0, 3.0], [8.0, 9.0, 10.0, 11.0], [4.0, 5.0, 6.0, 7.0]]
                        .concat()
                );
                let shared = y.clone();
                assert_eq!(y.copy_from_slice(&[0.5; 16]), Err(Error::Shared { n_owners: 2 }));
                drop(shared);
            }
            y.copy_from_slice(&[0.5; 16]).unwrap();
            assert!(!device.launches() || values(&y) == [0.5; 16]);
        }
    }
}

#[test]
fn arrays_of_any_layout_come_in_and_go_out() {
    let device = cpu();
    let array = Array2::from_shape_fn((3, 5), |(i, j)| (10 * i + j) as f64);
    let bring = |view: ndarray::ArrayViewD<'_, f64>| {
        Tensor::from_ndarray(&device, view, Precision::F16, Purpose::Data).unwrap()
    };
    let straight = bring(array.view().into_dyn());
    assert_eq!(straight.shape(), &Shape::from([3, 5]));
    assert_eq!(straight.to_ndarray::<f64>().unwrap(), array.clone().into_dyn());
    let turned = bring(array.t().into_dyn());
    assert_eq!(turned.shape(), &Shape::from([5, 3]));
    assert_eq!(turned.to_ndarray::<f64>().unwrap(), array.t().to_owned().into_dyn());
    let stepped = array.slice(s![..;2, ..;-2]);
    assert_eq!(values(&bring(stepped.into_dyn())), [4.0, 2.0, 0.0, 24.0, 22.0, 20.0]);
    let scalar = bring(ArrayD::from_elem(IxDyn(&[]), 7.0).view());
    assert_eq!((scalar.numel(), scalar.to_ndarray::<f32>().unwrap().into_raw_vec_and_offset().0), (1, vec![7.0]));

    let complex = Array2::from_shape_fn((2, 3), |(i, j)| Complex::new(i as f32, -(j as f32)));
    let x = Tensor::from_complex_ndarray(&device, complex.t().into_dyn(), Precision::F32, Purpose::Data).unwrap();
    assert_eq!((x.dtype(), x.shape()), (DType::complex(Precision::F32), &Shape::from([3, 2])));
    let out = x.to_ndarray::<f32>().unwrap();
    assert_eq!(out.shape(), [3, 2, 2]);
    for ((i, j), z) in complex.indexed_iter() {
        assert_eq!((out[[j, i, 0]], out[[j, i, 1]]), (z.re, z.im));
    }
    assert!(x.as_ndarray().is_none());
    let single = tensor(&device, &[1.5, 2.5], Precision::F32);
    assert_eq!(single.as_ndarray().unwrap().as_slice().unwrap(), [1.5f32, 2.5]);
    assert!(straight.as_ndarray().is_none());
}

#[test]
fn views_cut_and_widen() {
    let device = cpu();
    let mut x = tensor(&device, &wave(10), Precision::Bf16);
    let want = values(&x);
    let view = x.view().unwrap();
    assert_eq!((view.len(), view.precision(), view.get(3)), (10, Precision::Bf16, want[3]));
    let mut buffer = [0.0f32; 16];
    let wide = view.slice(2..5).widened(&mut buffer);
    assert_eq!(wide.iter().map(|v| f64::from(*v)).collect::<Vec<_>>(), want[2..5]);
    let lens: Vec<usize> = x.view_mut().unwrap().chunks(4).iter().map(|piece| piece.len()).collect();
    assert_eq!(lens, [4, 4, 2]);
    let mut all = x.view_mut().unwrap();
    all.slice_mut(1..3).narrow(&[1.0f64, 2.0]);
    all.slice_mut(9..10).fill_zero();
    let got = values(&x);
    assert_eq!((&got[1..3], got[9], got[8]), (&[1.0, 2.0][..], 0.0, want[8]));
    // No copy where storage is the accumulator already.
    let y = tensor(&device, &wave(3), Precision::F32);
    let Ok(View::F32(stored)) = y.view() else { panic!("f32 storage") };
    assert_eq!(y.view().unwrap().widened::<f32>(&mut []).as_ptr(), stored.as_ptr());
}
