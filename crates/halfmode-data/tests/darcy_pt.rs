//! Files in the form of neuraloperator's Darcy data, written by `tests/golden/torch/make.py`.
#![allow(clippy::unwrap_used, reason = "a test")]

use halfmode_data::{DarcyPt, Error, Split, UnitGaussian};
use std::path::{Path, PathBuf};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/torch/darcy")
}

#[test]
fn the_first_samples_of_a_split() {
    let file = DarcyPt::new(&folder(), Split::Train, 16);
    assert_eq!(file.n_samples().unwrap(), 6);
    let pairs = file.read(4).unwrap();
    assert_eq!((pairs.x().shape(), pairs.y().shape()), (&[4, 1, 16, 16][..], &[4, 1, 16, 16][..]));
    let all = file.read(1000).unwrap();
    assert_eq!(all.len(), 6);
    assert!(pairs.y().iter().zip(all.y()).all(|(a, b)| a.to_bits() == b.to_bits()));
    // The coefficient is a truth value, the sign of the field that the output is made of.
    assert!(all.x().iter().zip(all.y()).all(|(&x, &y)| (x > 0.5) == (y > 0.02) && (x - x.round()).abs() <= 0.0));
    let at = |i: f32| (i + 0.5) / 16.0;
    let expected = 0.01 * (6.0 * at(3.0) + 2.0).sin() * (5.0 * at(7.0) - 2.0).cos() + 0.02;
    assert!((all.y()[[2, 0, 3, 7]] - expected).abs() < 1e-6);
}

/// The peer's default encoding: one mean and unbiased deviation per channel, over samples and points.
#[test]
fn statistics_are_per_channel() {
    let pairs = DarcyPt::new(&folder(), Split::Train, 16).read(6).unwrap();
    let fit = UnitGaussian::fit_per_channel(&pairs.y().view()).unwrap();
    assert_eq!((fit.mean().shape(), fit.dims()), (&[1, 1, 1, 1][..], &[0, 2, 3][..]));
    let n = 6.0 * 256.0;
    let mean = pairs.y().iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    let variance = pairs.y().iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / (n - 1.0);
    assert!((fit.mean()[[0, 0, 0, 0]] - mean).abs() < 1e-15);
    assert!((fit.std()[[0, 0, 0, 0]] - variance.sqrt()).abs() < 1e-15);
}

#[test]
fn what_is_missing_or_wrong_is_named() {
    let missing = DarcyPt::new(&folder(), Split::Test, 64).n_samples().unwrap_err();
    assert!(matches!(missing, Error::Io { action: "open", .. }) && missing.to_string().contains("darcy_test_64.pt"));
    let wrong = std::env::temp_dir().join(format!("halfmode-darcy-pt-{}", std::process::id()));
    std::fs::create_dir_all(&wrong).unwrap();
    std::fs::copy(folder().join("darcy_test_32.pt"), wrong.join("darcy_test_16.pt")).unwrap();
    std::fs::copy(folder().join("../small.pt"), wrong.join("darcy_train_3.pt")).unwrap();
    halfmode_data::numpy::write_npz(&wrong.join("darcy_train_16.pt"), &[]).unwrap();
    let shape = DarcyPt::new(&wrong, Split::Test, 16).read(1).unwrap_err();
    assert!(matches!(&shape, Error::TorchShape { key, found, .. } if key == "x" && found == &[3, 32, 32]), "{shape}");
    assert!(matches!(DarcyPt::new(&wrong, Split::Train, 3).read(1), Err(Error::TorchShape { .. })));
    assert!(matches!(DarcyPt::new(&wrong, Split::Train, 16).read(1), Err(Error::Torch { .. })));
    std::fs::remove_dir_all(wrong).unwrap();
}
