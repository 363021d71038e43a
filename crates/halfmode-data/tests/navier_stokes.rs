//! Navier-Stokes data: exact flows, determinism, shapes.
#![allow(
    clippy::unwrap_used,
    clippy::float_cmp,
    reason = "a test may stop at an error; values that must be the same bits are compared as such"
)]

use std::f64::consts::TAU;
use std::num::NonZeroUsize;

use halfmode_data::{Error, FieldPairs, Generator, NavierStokesConfig, NavierStokesSolver};
use proptest::prelude::*;

fn generate(config: &NavierStokesConfig, threads: usize) -> FieldPairs {
    config.generate(NonZeroUsize::new(threads), &|_, _| {}).unwrap()
}

fn on_grid(n: usize, w: impl Fn(f64, f64) -> f64) -> Vec<f64> {
    (0..n * n).map(|place| w((place / n) as f64 / n as f64, (place % n) as f64 / n as f64)).collect()
}

fn assert_near(found: &[f64], want: &[f64], tolerance: f64) {
    let scale = want.iter().fold(0.0f64, |largest, w| w.abs().max(largest));
    let worst = found.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    assert!(found.len() == want.len() && worst < tolerance * scale, "{worst} of {scale}");
}

#[test]
fn vortices_of_taylor_and_green_decay() {
    for (viscosity, wave, n) in [(1e-2, 1.0, 24), (1e-3, 2.0, 33)] {
        let w = |t: f64| {
            let decay = (-2.0 * viscosity * (TAU * wave).powi(2) * t).exp();
            on_grid(n, |x, y| 3.0 * decay * (TAU * wave * x).sin() * (TAU * wave * y).cos())
        };
        let found = NavierStokesSolver::new(viscosity, 0.0).unwrap().evolve(n, &w(0.0), 2.0).unwrap();
        // Advection vanishes and diffusion is exact: what is left is rounding over many steps.
        assert_near(&found, &w(2.0), 1e-10);
    }
}

#[test]
fn a_force_drives_a_shear_to_its_balance() {
    // From rest: w = f (1 - e^{-λt}) / λ with λ = 8π²ν; a shear flow does not advect itself.
    let (viscosity, n, time) = (2e-3, 16, 3.0);
    let rate = 2.0 * viscosity * TAU * TAU;
    let want = on_grid(n, |x, y| {
        let angle = TAU * (x + y);
        0.3 * (angle.sin() + angle.cos()) * (1.0 - (-rate * time).exp()) / rate
    });
    let found = NavierStokesSolver::new(viscosity, 0.3).unwrap().evolve(n, &vec![0.0; n * n], time).unwrap();
    // The force passes through the Runge-Kutta method, whose tolerance is 1e-7.
    assert_near(&found, &want, 1e-7);
}

#[test]
fn the_bits_do_not_depend_on_the_threads() {
    let config = NavierStokesConfig { time: 1.0, ..NavierStokesConfig::new(5, 21, 2) };
    let one = generate(&config, 1);
    for threads in [2, 3, 5] {
        assert_eq!(one, generate(&config, threads));
    }
    let later = generate(&NavierStokesConfig { n: 1, first_index: 4, ..config.clone() }, 1);
    assert_eq!(one.x().slice(ndarray::s![4.., .., .., ..]), later.x().slice(ndarray::s![.., .., .., ..]));
    assert_ne!(one.x(), generate(&NavierStokesConfig { seed: 3, ..config.clone() }, 1).x());
    assert_ne!(one.x(), generate(&config.for_test(), 1).x());
}

#[test]
fn settings_out_of_range_are_refused() {
    let good = NavierStokesConfig::new(2, 8, 0);
    for (name, config) in [
        ("n", NavierStokesConfig { n: 0, ..good.clone() }),
        ("n", NavierStokesConfig { n: usize::MAX, ..good.clone() }),
        ("resolution", NavierStokesConfig { resolution: 0, ..good.clone() }),
        ("resolution", NavierStokesConfig { resolution: 4096, ..good.clone() }),
        ("first_index", NavierStokesConfig { first_index: u64::MAX, ..good.clone() }),
        ("viscosity", NavierStokesConfig { viscosity: -0.1, ..good.clone() }),
        ("viscosity", NavierStokesConfig { viscosity: f64::NAN, ..good.clone() }),
        ("forcing", NavierStokesConfig { forcing: -1.0, ..good.clone() }),
        ("time", NavierStokesConfig { time: 0.0, ..good.clone() }),
    ] {
        let err = config.generate(None, &|_, _| {}).unwrap_err();
        assert!(matches!(&err, Error::Config { field, .. } if *field == name), "{err}");
    }
    let mut solver = NavierStokesSolver::new(1e-3, 0.0).unwrap();
    for n in [0, 3, usize::MAX] {
        assert!(matches!(solver.evolve(n, &[0.0; 4], 1.0), Err(Error::Length { .. })));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_grid_samples_the_same_functions(resolution in 1usize..30, factor in 2usize..4, seed: u64) {
        let config = |resolution| NavierStokesConfig { time: 0.5, ..NavierStokesConfig::new(1, resolution, seed) };
        let (coarse, fine) = (generate(&config(resolution), 1), generate(&config(factor * resolution), 1));
        prop_assert_eq!(coarse.x().shape(), &[1, 1, resolution, resolution]);
        prop_assert_eq!(coarse.y().shape(), &[1, 1, resolution, resolution]);
        for (coarse, fine) in [(coarse.x(), fine.x()), (coarse.y(), fine.y())] {
            let shared = fine.slice(ndarray::s![0, 0, ..;factor, ..;factor]);
            // Values of size 1 in f32.
            prop_assert!(coarse.iter().zip(shared.iter()).all(|(a, b)| (a - b).abs() < 1e-6));
        }
    }
}
