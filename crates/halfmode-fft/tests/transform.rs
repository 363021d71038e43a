//! Transforms against the definition, in every precision, on any sizes.
#![allow(clippy::unwrap_used, reason = "a test")]

use halfmode_fft::{Algorithm, Transform, TransformConfig, Weights, reference};
use halfmode_precision::{DType, Domain, Precision};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Rng, assert_close, devices, rel_l2, tol};
use proptest::prelude::*;

#[derive(Clone, Debug)]
struct Case {
    grid: Vec<usize>,
    modes: Vec<usize>,
    domain: Domain,
    algorithm: Option<Algorithm>,
    batch: usize,
    channels: usize,
    seed: u64,
}

/// Odd, prime, size-1 and full-spectrum cases come up often: sizes are small and unconstrained.
fn case() -> impl Strategy<Value = Case> {
    let axis = (1usize..14).prop_flat_map(|n| (Just(n), 1..=n));
    let algorithm = prop_oneof![Just(None), Just(Some(Algorithm::Matrix)), Just(Some(Algorithm::Fft))];
    (proptest::collection::vec(axis, 1..=3), any::<bool>(), algorithm, 1usize..3, 1usize..5, any::<u64>()).prop_map(
        |(axes, complex, algorithm, batch, channels, seed)| {
            let grid: Vec<usize> = axes.iter().map(|axis| axis.0).collect();
            let mut modes: Vec<usize> = axes.iter().map(|axis| axis.1).collect();
            let domain = if complex { Domain::Complex } else { Domain::Real };
            let last = grid.len() - 1;
            if !complex {
                modes[last] = modes[last].min(grid[last] / 2 + 1);
            }
            Case { grid, modes, domain, algorithm, batch, channels, seed }
        },
    )
}

impl Case {
    fn transform(&self, device: &Device, precision: Precision) -> Transform {
        let config = TransformConfig {
            grid: self.grid.clone(),
            modes: self.modes.clone(),
            domain: self.domain,
            accumulate: precision.accumulate(),
            algorithm: self.algorithm,
        };
        Transform::new(device, config).unwrap()
    }

    fn field(&self, device: &Device, t: &Transform, precision: Precision, rng: &mut Rng) -> Tensor {
        let shape = t.field_shape(self.batch, self.channels);
        let dtype = DType { domain: self.domain, precision };
        let values = rng.normals(shape.numel() * self.domain.scalars());
        Tensor::from_scalars(device, &values, shape, dtype, Purpose::Activation).unwrap()
    }

    fn half(&self) -> bool {
        self.domain == Domain::Real
    }

    fn points(&self) -> usize {
        self.grid.iter().product()
    }

    fn n_modes(&self) -> usize {
        self.modes.iter().product()
    }

    /// Interleaved line (batch, channel) of a field `[batch, points, channels]`.
    fn line(&self, values: &[f64], b: usize, c: usize) -> Vec<f64> {
        let scalars = self.domain.scalars();
        (0..self.points())
            .flat_map(|p| {
                let at = ((b * self.points() + p) * self.channels + c) * scalars;
                [values[at], if self.half() { 0.0 } else { values[at + 1] }]
            })
            .collect()
    }

    /// Interleaved line of a spectrum `[batch, 2, modes, channels]`.
    fn spectrum_line(&self, values: &[f64], b: usize, c: usize) -> Vec<f64> {
        let at = |part: usize, k: usize| ((b * 2 + part) * self.n_modes() + k) * self.channels + c;
        (0..self.n_modes()).flat_map(|k| [values[at(0, k)], values[at(1, k)]]).collect()
    }

    /// Of an interleaved line: everything, or the real parts for real data.
    fn domain_part(&self, line: Vec<f64>) -> impl Iterator<Item = f64> {
        let step = if self.half() { 2 } else { 1 };
        line.into_iter().step_by(step)
    }

    fn n_terms(&self) -> usize {
        self.points().max(self.n_modes()) * 2
    }
}

fn check_against_definition(case: &Case, device: &Device, precision: Precision) {
    let t = case.transform(device, precision);
    let mut rng = Rng::new(case.seed);
    let scale = t.scale();
    let x = case.field(device, &t, precision, &mut rng);
    let x_hat = t.to_modes(&x, Weights::Plain, &scale.to_modes, precision, Purpose::Activation).unwrap();
    let back = t.to_grid(&x_hat, Weights::Doubled, &scale.to_grid, precision, Purpose::Activation).unwrap();
    let [x, x_hat, back] = [&x, &x_hat, &back].map(|it| it.to_vec::<f64>().unwrap());
    let (mut got_hat, mut want_hat, mut got_back, mut want_back) = (vec![], vec![], vec![], vec![]);
    for b in 0..case.batch {
        for c in 0..case.channels {
            let line = reference::to_modes(&case.line(&x, b, c), &case.grid, &case.modes, case.half());
            want_hat.extend(line.iter().map(|v| v * scale.to_modes_product()));
            let stored = case.spectrum_line(&x_hat, b, c);
            let grid = reference::to_grid(&stored, &case.grid, &case.modes, case.half());
            want_back.extend(case.domain_part(grid).map(|v| v * scale.to_grid_product()));
            got_hat.extend(stored);
            got_back.extend(case.domain_part(case.line(&back, b, c)));
        }
    }
    // Each axis stores once. A few bins can nearly vanish by chance, so errors are measured
    // against the larger of the result and what white noise of this size has on average.
    let tolerance = tol(precision, case.n_terms()) * case.grid.len() as f64;
    let norm = |v: &[f64]| v.iter().map(|v| v * v).sum::<f64>().sqrt();
    let white_hat = (case.points() as f64).sqrt() * scale.to_modes_product() * (want_hat.len() as f64 / 2.0).sqrt();
    let white_back = norm(&got_hat) * scale.to_grid_product() * (case.points() as f64).sqrt();
    assert_close!("to_modes", got_hat, want_hat, tolerance * (white_hat / norm(&want_hat)).max(1.0));
    assert_close!("to_grid", got_back, want_back, tolerance * (white_back / norm(&want_back)).max(1.0));
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Each direction is the other's adjoint, with either weighting.
fn check_adjoint(case: &Case, device: &Device, precision: Precision, weights: Weights) {
    let t = case.transform(device, precision);
    let mut rng = Rng::new(case.seed ^ 1);
    let scale = vec![1.0; case.grid.len()];
    let x = case.field(device, &t, precision, &mut rng);
    let y = rng.tensor(device, &t.spectrum_shape(case.batch, case.channels), precision);
    let ax = t.to_modes(&x, weights, &scale, precision, Purpose::Activation).unwrap();
    let aty = t.to_grid(&y, weights, &scale, precision, Purpose::Activation).unwrap();
    let [x, y, ax, aty] = [&x, &y, &ax, &aty].map(|it| it.to_vec::<f64>().unwrap());
    let size = (dot(&ax, &ax) * dot(&y, &y)).sqrt().max((dot(&x, &x) * dot(&aty, &aty)).sqrt());
    let tolerance = 2.0 * tol(precision, case.n_terms()) * case.grid.len() as f64 * size;
    let (left, right) = (dot(&ax, &y), dot(&x, &aty));
    assert!((left - right).abs() <= tolerance, "{case:?} {precision} {weights:?}: {left} against {right}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn agrees_with_the_definition(case in case()) {
        let device = Device::cpu(2).unwrap();
        for precision in Precision::ALL {
            check_against_definition(&case, &device, precision);
        }
    }

    #[test]
    fn directions_are_adjoint(case in case()) {
        let device = Device::cpu(2).unwrap();
        for precision in Precision::ALL {
            check_adjoint(&case, &device, precision, Weights::Plain);
            check_adjoint(&case, &device, precision, Weights::Doubled);
        }
    }

    #[test]
    fn both_algorithms_and_any_thread_count_agree(case in case()) {
        let mut results: Vec<Vec<f64>> = Vec::new();
        for device in devices() {
            for algorithm in [Algorithm::Matrix, Algorithm::Fft] {
                let case = Case { algorithm: Some(algorithm), ..case.clone() };
                let t = case.transform(&device, Precision::F64);
                let x = case.field(&device, &t, Precision::F64, &mut Rng::new(case.seed));
                let scale = t.scale();
                let x_hat = t.to_modes(&x, Weights::Plain, &scale.to_modes, Precision::F64, Purpose::Activation).unwrap();
                results.push(x_hat.to_vec().unwrap());
            }
        }
        prop_assert!(rel_l2(&results[0], &results[1]) < 1e-11 || dot(&results[0], &results[0]) < 1e-20);
        // Bit for bit: threads only decide who computes, not what.
        prop_assert_eq!(&results[0], &results[2]);
        prop_assert_eq!(&results[1], &results[3]);
    }
}

#[test]
fn awkward_sizes_work_in_half() {
    let sizes =
        [(vec![20, 20, 10], vec![8, 8, 5]), (vec![421, 421], vec![12, 7]), (vec![1], vec![1]), (vec![97], vec![49])];
    for (grid, modes) in sizes {
        for algorithm in [Some(Algorithm::Matrix), Some(Algorithm::Fft)] {
            let (grid, modes) = (grid.clone(), modes.clone());
            let case = Case { grid, modes, domain: Domain::Real, algorithm, batch: 1, channels: 1, seed: 5 };
            check_against_definition(&case, &Device::cpu(2).unwrap(), Precision::F16);
        }
    }
}

#[test]
fn another_output_grid_is_exact_for_band_limited_fields() {
    let device = Device::cpu(1).unwrap();
    let field = |x: f64, y: f64| {
        let tau = std::f64::consts::TAU;
        1.5 + (tau * (2.0 * x - 3.0 * y)).cos() - 0.5 * (tau * (x + y)).sin() + (tau * -3.0 * x).sin()
    };
    let sample = |nx: usize, ny: usize| -> Vec<f64> {
        (0..nx * ny).map(|i| field((i / ny) as f64 / nx as f64, (i % ny) as f64 / ny as f64)).collect()
    };
    let plan = |grid: [usize; 2]| {
        let (grid, modes) = (grid.to_vec(), vec![8, 5]);
        let config = TransformConfig { grid, modes, domain: Domain::Real, accumulate: Precision::F64, algorithm: None };
        Transform::new(&device, config).unwrap()
    };
    let coarse = plan([16, 14]);
    let x = Tensor::from_slice(&device, &sample(16, 14), [1, 16, 14, 1], Precision::F64, Purpose::Activation).unwrap();
    let scale = coarse.scale();
    let x_hat = coarse.to_modes(&x, Weights::Plain, &scale.to_modes, Precision::F64, Purpose::Activation).unwrap();
    for grid in [[32, 28], [9, 11], [16, 14], [33, 50]] {
        let fine = plan(grid);
        let y = fine.to_grid(&x_hat, Weights::Doubled, &scale.to_grid, Precision::F64, Purpose::Activation).unwrap();
        assert_close!(format!("{grid:?}"), y.to_vec::<f64>().unwrap(), sample(grid[0], grid[1]), 1e-13);
    }
}

#[test]
fn bad_plans_are_errors() {
    let device = Device::cpu(1).unwrap();
    let plan = |grid: &[usize], modes: &[usize]| {
        let (grid, modes) = (grid.to_vec(), modes.to_vec());
        let config = TransformConfig { grid, modes, domain: Domain::Real, accumulate: Precision::F32, algorithm: None };
        Transform::new(&device, config)
    };
    assert!(plan(&[8, 8], &[4]).unwrap_err().to_string().contains("1 to 3 axes"));
    assert!(plan(&[8, 0], &[4, 1]).unwrap_err().to_string().contains("axis 1 has 0 points"));
    assert!(plan(&[8, 8], &[4, 6]).unwrap_err().to_string().contains("resolve 5"));
    let t = plan(&[8, 8], &[4, 5]).unwrap();
    let x = device.alloc([1, 8, 9, 2], DType::real(Precision::F32), Purpose::Activation).unwrap();
    let err = t.to_modes(&x, Weights::Plain, &[1.0, 1.0], Precision::F32, Purpose::Activation).unwrap_err();
    assert!(err.to_string().contains("expected shape [1, 8, 8, 2]"), "{err}");
}
