//! The normaliser against neuraloperator's numbers, and against itself in parts.
#![allow(
    clippy::unwrap_used,
    clippy::float_cmp,
    reason = "a test may stop at an error; values that must be the same bits are compared as such"
)]

use halfmode_data::{Error, UnitGaussian, UnitGaussianFit};
use ndarray::{ArrayD, Axis, IxDyn};
use proptest::prelude::*;

const GOLDEN: &[u8] =
    include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/unit_gaussian_normalizer.safetensors"));

fn golden(name: &str) -> ArrayD<f64> {
    let file = safetensors::SafeTensors::deserialize(GOLDEN).unwrap();
    let tensor = file.tensor(name).unwrap();
    assert_eq!(tensor.dtype(), safetensors::Dtype::F64);
    let values = tensor.data().as_chunks::<8>().0.iter().map(|&bytes| f64::from_le_bytes(bytes)).collect();
    ArrayD::from_shape_vec(IxDyn(tensor.shape()), values).unwrap()
}

fn assert_close(name: &str, got: &ArrayD<f64>, want: &ArrayD<f64>) {
    assert_eq!(got.shape(), want.shape(), "{name}");
    for (got, want) in got.iter().zip(want) {
        // The acceptance bound of the golden files.
        assert!((got - want).abs() <= 1e-10 * want.abs().max(1.0), "{name}: {got} {want}");
    }
}

// The file also holds `f64/*_partial`: the peer's `partial_fit`, which multiplies the deviation
// by n/(n-1) instead of its square root. We do not reproduce that; our fit in parts equals the
// whole fit.
#[test]
fn statistics_and_values_agree_with_the_peer() {
    let x = golden("in/x");
    for (case, dims) in [("dim023", vec![0, 2, 3]), ("dim0", vec![0])] {
        let normaliser = UnitGaussian::fit(&x.view(), &dims).unwrap();
        assert_close("mean", normaliser.mean(), &golden(&format!("f64/mean_{case}")));
        assert_close("std", normaliser.std(), &golden(&format!("f64/std_{case}")));
        let mut z = x.clone();
        normaliser.encode(&mut z.view_mut()).unwrap();
        assert_close("z", &z, &golden(&format!("f64/z_{case}")));
        normaliser.decode(&mut z.view_mut()).unwrap();
        assert_close("back", &z, &golden(&format!("f64/back_{case}")));
    }
    let by_channel = UnitGaussian::fit_per_channel(&x.view()).unwrap();
    assert_eq!(by_channel, UnitGaussian::fit(&x.view(), &[0, 2, 3]).unwrap());
    let pointwise = UnitGaussian::fit_pointwise(&x.view()).unwrap();
    assert_eq!(pointwise.mean().shape(), [1, 2, 5, 7]);
}

#[test]
fn single_precision_goes_through_f64() {
    let x = golden("in/x");
    let x32 = x.mapv(|v| v as f32);
    let normaliser = UnitGaussian::fit_per_channel(&x32.view()).unwrap();
    let mut z = x32.clone();
    normaliser.encode(&mut z.view_mut()).unwrap();
    let mut z64 = x32.mapv(f64::from);
    normaliser.encode(&mut z64.view_mut()).unwrap();
    assert_eq!(z, z64.mapv(|v| v as f32));
    normaliser.decode(&mut z.view_mut()).unwrap();
    for (got, want) in z.iter().zip(&x32) {
        // One rounding of z, scaled by std (below 10 here), and one of the result.
        assert!((got - want).abs() <= 1e-5 * want.abs().max(1.0));
    }
}

#[test]
fn statistics_per_channel_fit_other_grids() {
    let x = golden("in/x");
    let normaliser = UnitGaussian::fit_per_channel(&x.view()).unwrap();
    let mut other = ArrayD::<f32>::zeros(IxDyn(&[3, 2, 11, 13]));
    normaliser.encode(&mut other.view_mut()).unwrap();
    let mut wrong = ArrayD::<f32>::zeros(IxDyn(&[3, 1, 11, 13]));
    assert!(matches!(normaliser.encode(&mut wrong.view_mut()), Err(Error::NormaliserShape { .. })));
    let pointwise = UnitGaussian::fit_pointwise(&x.view()).unwrap();
    assert!(pointwise.encode(&mut other.view_mut()).is_err());
}

#[test]
fn constant_channels_become_zero() {
    let x = ArrayD::from_elem(IxDyn(&[4, 1, 3]), 0.1f32);
    let normaliser = UnitGaussian::fit_per_channel(&x.view()).unwrap();
    let mut z = x.clone();
    normaliser.encode(&mut z.view_mut()).unwrap();
    // The mean of twelve equal numbers is off by some units of 1e-17 at most; eps is 1e-7.
    assert!(z.iter().all(|v| v.abs() < 1e-8));
    normaliser.decode(&mut z.view_mut()).unwrap();
    assert_eq!(z, x);
}

#[test]
fn serialisation_keeps_every_bit_and_checks_what_it_reads() {
    let normaliser = UnitGaussian::fit_pointwise(&golden("in/x").view()).unwrap();
    let text = serde_json::to_string(&normaliser).unwrap();
    assert_eq!(normaliser, serde_json::from_str(&text).unwrap());
    for bad in [
        r#"{"shape":[1,2],"mean":[0],"std":[1,1],"eps":1e-7,"dims":[0]}"#,
        r#"{"shape":[1,2],"mean":[0,0],"std":[1,-1],"eps":1e-7,"dims":[0]}"#,
        r#"{"shape":[2],"mean":[0,0],"std":[1,1],"eps":1e-7,"dims":[0]}"#,
        r#"{"shape":[1],"mean":[0],"std":[1],"eps":1e-7,"dims":[3]}"#,
        r#"{"shape":[9223372036854775807,9],"mean":[0],"std":[1],"eps":1e-7,"dims":[]}"#,
    ] {
        assert!(serde_json::from_str::<UnitGaussian>(bad).is_err(), "{bad}");
    }
}

#[test]
fn misuse_is_typed() {
    let x = ArrayD::<f64>::zeros(IxDyn(&[1, 2, 1]));
    assert!(matches!(UnitGaussian::fit_per_channel(&x.view()), Err(Error::TooFewValues { found: 1 })));
    assert!(matches!(UnitGaussian::fit(&x.view(), &[3]), Err(Error::NormaliserDims { .. })));
    assert!(UnitGaussian::fit(&x.view(), &[0, 0]).is_err());
    let mut y = ArrayD::<f32>::zeros(IxDyn(&[2, 2, 3]));
    y[[1, 0, 2]] = f32::NAN;
    let error = UnitGaussian::fit_per_channel(&y.view()).unwrap_err();
    assert!(matches!(error, Error::NonFinite { index, .. } if index == [1, 0, 2]));
    let empty = UnitGaussianFit::new(&[0]).finish();
    assert!(matches!(empty, Err(Error::TooFewValues { found: 0 })));
    let mut fit = UnitGaussianFit::new(&[0, 2]);
    fit.update(&x.view()).unwrap();
    let other = ArrayD::<f64>::zeros(IxDyn(&[1, 3, 1]));
    assert!(fit.update(&other.view()).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Parts of any size, far from zero mean, give what the whole gives.
    #[test]
    fn parts_equal_the_whole(
        n in 2usize..20,
        cuts in prop::collection::vec(1usize..7, 1..20),
        offset in -1e4f64..1e4,
        seed in any::<u64>(),
    ) {
        let order = halfmode_data::shuffled(n * 6, seed, 0);
        let values = order.iter().map(|&v| offset + (v as f64).sqrt()).collect();
        let x = ArrayD::from_shape_vec(IxDyn(&[n, 2, 3]), values).unwrap();
        let whole = UnitGaussian::fit_per_channel(&x.view()).unwrap();
        let mut left = UnitGaussianFit::new(&[0, 2]);
        let mut right = UnitGaussianFit::new(&[0, 2]);
        let mut rest = x.view();
        for (i, &cut) in cuts.iter().cycle().enumerate() {
            let n_rest = rest.shape()[0];
            if n_rest == 0 {
                break;
            }
            let (part, after) = rest.split_at(Axis(0), cut.min(n_rest));
            let fit = if i % 2 == 0 { &mut left } else { &mut right };
            fit.update(&part).unwrap();
            rest = after;
        }
        left.merge(right).unwrap();
        let parts = left.finish().unwrap();
        // Squared deviations are at least 1e-2 and means at most 1e4, so both formulas keep
        // about 16 - 4 digits.
        for (a, b) in parts.mean().iter().zip(whole.mean()) {
            prop_assert!((a - b).abs() < 1e-11 * b.abs().max(1.0));
        }
        for (a, b) in parts.std().iter().zip(whole.std()) {
            prop_assert!((a - b).abs() < 1e-9 * b.max(1e-2));
        }
    }
}
