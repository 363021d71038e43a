//! Burgers data: the exact solution of Cole and Hopf, conservation, determinism, shapes.
#![allow(
    clippy::unwrap_used,
    clippy::float_cmp,
    reason = "a test may stop at an error; values that must be the same bits are compared as such"
)]

use std::f64::consts::TAU;
use std::num::NonZeroUsize;

use halfmode_data::{BurgersConfig, BurgersSolver, Error, FieldPairs, Generator};
use proptest::prelude::*;

fn generate(config: &BurgersConfig, threads: usize) -> FieldPairs {
    config.generate(NonZeroUsize::new(threads), &|_, _| {}).unwrap()
}

/// `u = c - 2ν φ_x / φ` with the heat kernel's `φ = a + e^{-4π²νt} cos(2π(x - ct))`.
fn cole_hopf(viscosity: f64, drift: f64, x: f64, t: f64) -> f64 {
    let decay = (-TAU * TAU * viscosity * t).exp();
    let angle = TAU * (x - drift * t);
    drift + 2.0 * viscosity * TAU * decay * angle.sin() / (1.2 + decay * angle.cos())
}

#[test]
fn smooth_solutions_are_those_of_cole_and_hopf() {
    for (viscosity, drift, time, n) in [(0.1, 0.0, 1.0, 201), (0.02, 0.7, 0.5, 256), (0.005, -1.3, 2.0, 512)] {
        let at = |t: f64| (0..n).map(|i| cole_hopf(viscosity, drift, i as f64 / n as f64, t)).collect::<Vec<_>>();
        let found = BurgersSolver::new(viscosity).unwrap().evolve(&at(0.0), time).unwrap();
        let scale = at(time).iter().fold(0.0f64, |largest, u| u.abs().max(largest));
        for (found, want) in found.iter().zip(at(time)) {
            // The solver's tolerance of 1e-7 for the largest wave, a few waves of which add up.
            assert!((found - want).abs() < 1e-6 * scale, "viscosity {viscosity}: {found} {want}");
        }
    }
}

#[test]
fn the_mean_is_conserved() {
    let pairs = generate(&BurgersConfig { viscosity: 0.01, ..BurgersConfig::new(6, 512, 5) }, 2);
    for sample in 0..6 {
        let mean = |array: &ndarray::ArrayD<f32>| {
            let sample = array.index_axis(ndarray::Axis(0), sample);
            sample.iter().map(|&u| f64::from(u)).sum::<f64>() / 512.0
        };
        // 512 values of size 3, rounded to f32.
        assert!((mean(pairs.x()) - mean(pairs.y())).abs() < 1e-6);
    }
}

#[test]
fn the_bits_do_not_depend_on_the_threads() {
    let config = BurgersConfig::new(7, 33, 2);
    let one = generate(&config, 1);
    assert_eq!(one, generate(&config, 3));
    assert_eq!(one, config.generate(None, &|_, _| {}).unwrap());
    let later = generate(&BurgersConfig { n: 2, first_index: 5, ..config.clone() }, 1);
    assert_eq!(one.x().slice(ndarray::s![5.., .., ..]), later.x().slice(ndarray::s![.., .., ..]));
    assert_ne!(one.x(), generate(&BurgersConfig { seed: 3, ..config.clone() }, 1).x());
    assert_ne!(one.x(), generate(&config.for_test(), 1).x());
}

#[test]
fn settings_out_of_range_are_refused() {
    let good = BurgersConfig::new(2, 8, 0);
    for (name, config) in [
        ("n", BurgersConfig { n: 0, ..good.clone() }),
        ("n", BurgersConfig { n: usize::MAX, ..good.clone() }),
        ("resolution", BurgersConfig { resolution: 0, ..good.clone() }),
        ("resolution", BurgersConfig { resolution: 1 << 17, ..good.clone() }),
        ("first_index", BurgersConfig { first_index: u64::MAX, ..good.clone() }),
        ("viscosity", BurgersConfig { viscosity: -0.1, ..good.clone() }),
        ("viscosity", BurgersConfig { viscosity: f64::NAN, ..good.clone() }),
        ("time", BurgersConfig { time: 0.0, ..good.clone() }),
        ("time", BurgersConfig { time: f64::INFINITY, ..good.clone() }),
    ] {
        let err = config.generate(None, &|_, _| {}).unwrap_err();
        assert!(matches!(&err, Error::Config { field, .. } if *field == name), "{err}");
    }
    assert!(matches!(BurgersSolver::new(0.1).unwrap().evolve(&[], 1.0), Err(Error::Empty { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_grid_samples_the_same_functions(resolution in 1usize..80, factor in 2usize..4, seed: u64) {
        let coarse = generate(&BurgersConfig::new(1, resolution, seed), 1);
        let fine = generate(&BurgersConfig::new(1, factor * resolution, seed), 1);
        prop_assert_eq!(coarse.x().shape(), &[1, 1, resolution]);
        prop_assert_eq!(coarse.y().shape(), &[1, 1, resolution]);
        let pairs = [(coarse.x(), fine.x()), (coarse.y(), fine.y())];
        for (coarse, fine) in pairs {
            let shared = fine.iter().step_by(factor);
            // Values of size 3 in f32.
            prop_assert!(coarse.iter().zip(shared).all(|(a, b)| (a - b).abs() < 2e-6));
        }
    }
}
