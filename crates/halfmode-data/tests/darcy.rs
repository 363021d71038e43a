//! The Darcy solver and generator: order of convergence, a dense oracle, determinism.
#![allow(
    clippy::unwrap_used,
    clippy::float_cmp,
    reason = "a test may stop at an error; values that must be the same bits are compared as such"
)]

use std::f64::consts::PI;
use std::num::NonZeroUsize;
use std::sync::Mutex;

use halfmode_data::darcy::{FIELD_ALPHA, FIELD_MODES, FIELD_TAU2};
use sha2::{Digest, Sha256};

use halfmode_data::{CosineField, DarcyConfig, DarcySolver, Error, generate};

/// Values of a function at the cell centres.
fn at_centres(n: usize, f: impl Fn(f64, f64) -> f64) -> Vec<f64> {
    let centre = |i: usize| (i as f64 + 0.5) / n as f64;
    (0..n * n).map(|c| f(centre(c / n), centre(c % n))).collect()
}

fn norm(v: &[f64]) -> f64 {
    v.iter().map(|v| v * v).sum::<f64>().sqrt()
}

fn relative_error(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let difference: Vec<f64> = got.iter().zip(want).map(|(a, b)| a - b).collect();
    norm(&difference) / norm(want)
}

/// Observed orders between successive grids, each twice as fine.
fn orders(errors: &[f64]) -> Vec<f64> {
    errors.windows(2).map(|e| (e[0] / e[1]).log2()).collect()
}

/// Two-valued coefficients of one random sample.
fn random_coefficient(n: usize, sample: u64) -> Vec<f64> {
    let field = CosineField::new(FIELD_MODES, FIELD_TAU2, FIELD_ALPHA).unwrap();
    let g = field.sampler(n).unwrap().sample(0, sample);
    g.iter().map(|&g| if g >= 0.0 { 12.0 } else { 3.0 }).collect()
}

#[test]
fn smooth_problems_converge_with_second_order() {
    // u = sin(πx) sin(2πy), a = 2 + sin(2πx) cos(πy), f = -a Δu - ∇a · ∇u.
    let a = |x: f64, y: f64| 2.0 + (2.0 * PI * x).sin() * (PI * y).cos();
    let u = |x: f64, y: f64| (PI * x).sin() * (2.0 * PI * y).sin();
    let f = |x: f64, y: f64| {
        let a_x = 2.0 * PI * (2.0 * PI * x).cos() * (PI * y).cos();
        let a_y = -PI * (2.0 * PI * x).sin() * (PI * y).sin();
        let u_x = PI * (PI * x).cos() * (2.0 * PI * y).sin();
        let u_y = 2.0 * PI * (PI * x).sin() * (2.0 * PI * y).cos();
        5.0 * PI * PI * a(x, y) * u(x, y) - a_x * u_x - a_y * u_y
    };
    let errors: Vec<f64> = [12, 24, 48, 96]
        .iter()
        .map(|&n| {
            let got = DarcySolver::new(n).unwrap().solve(&at_centres(n, a), &at_centres(n, f)).unwrap();
            relative_error(&got, &at_centres(n, u))
        })
        .collect();
    for order in orders(&errors) {
        assert!((1.8..2.2).contains(&order), "{errors:?}");
    }
}

#[test]
fn a_jump_on_cell_faces_keeps_second_order() {
    // a jumps from 3 to 12 at x = 1/2. u = sin(2πx) sin(πy) / a is continuous there, because
    // sin(2πx) vanishes, and so is the flux a u_x = 2π cos(2πx) sin(πy).
    let a = |x: f64, _: f64| if x < 0.5 { 3.0 } else { 12.0 };
    let u = |x: f64, y: f64| (2.0 * PI * x).sin() * (PI * y).sin() / a(x, y);
    let f = |x: f64, y: f64| 5.0 * PI * PI * (2.0 * PI * x).sin() * (PI * y).sin();
    let errors: Vec<f64> = [12, 24, 48, 96]
        .iter()
        .map(|&n| {
            let got = DarcySolver::new(n).unwrap().solve(&at_centres(n, a), &at_centres(n, f)).unwrap();
            relative_error(&got, &at_centres(n, u))
        })
        .collect();
    for order in orders(&errors) {
        assert!((1.8..2.2).contains(&order), "{errors:?}");
    }
}

#[test]
fn random_discontinuous_coefficients_converge() {
    // The interface cuts cells, so the order is about one. Grids with a factor of three share
    // cell centres, so no interpolation is needed.
    let grids = [15, 45, 135];
    let mut changes = [0.0; 2];
    for sample in 0..4 {
        let solutions: Vec<Vec<f64>> = grids
            .iter()
            .map(|&n| {
                let a = random_coefficient(n, sample);
                DarcySolver::new(n).unwrap().solve(&a, &vec![1.0; n * n]).unwrap()
            })
            .collect();
        for (level, pair) in solutions.windows(2).enumerate() {
            let n = grids[level];
            let coarsened: Vec<f64> =
                (0..n * n).map(|c| pair[1][(3 * (c / n) + 1) * 3 * n + 3 * (c % n) + 1]).collect();
            changes[level] += relative_error(&pair[0], &coarsened) / 4.0;
        }
    }
    assert!(changes[0] < 0.1, "{changes:?}");
    assert!(changes[1] < 0.5 * changes[0], "{changes:?}");
}

#[test]
fn solutions_agree_with_a_dense_solve() {
    for n in [1, 2, 3, 5, 8] {
        let a = random_coefficient(n, 5);
        let f = at_centres(n, |x, y| 1.0 + x - 2.0 * y * y);
        let got = DarcySolver::new(n).unwrap().solve(&a, &f).unwrap();
        let want = dense_solve(dense_matrix(n, &a), f);
        // Condition number at most 1e3 here, times the rounding unit, times a margin.
        assert!(relative_error(&got, &want) < 1e-12, "n {n}");
    }
}

/// The matrix by its definition: a sum over faces, written out cell by cell.
fn dense_matrix(n: usize, a: &[f64]) -> Vec<Vec<f64>> {
    let h2 = 1.0 / (n * n) as f64;
    let mut matrix = vec![vec![0.0; n * n]; n * n];
    for i in 0..n as i64 {
        for j in 0..n as i64 {
            let here = (i * n as i64 + j) as usize;
            for (k, l) in [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)] {
                if k < 0 || l < 0 || k >= n as i64 || l >= n as i64 {
                    matrix[here][here] += 2.0 * a[here] / h2;
                } else {
                    let there = (k * n as i64 + l) as usize;
                    let t = 2.0 * a[here] * a[there] / (a[here] + a[there]);
                    matrix[here][here] += t / h2;
                    matrix[here][there] -= t / h2;
                }
            }
        }
    }
    matrix
}

/// Gaussian elimination without pivoting (the matrix is positive definite).
fn dense_solve(mut matrix: Vec<Vec<f64>>, mut rhs: Vec<f64>) -> Vec<f64> {
    let n = rhs.len();
    for k in 0..n {
        for i in k + 1..n {
            let factor = matrix[i][k] / matrix[k][k];
            let (above, below) = matrix.split_at_mut(i);
            for (value, pivot) in below[0].iter_mut().zip(&above[k]).skip(k) {
                *value -= factor * pivot;
            }
            rhs[i] -= factor * rhs[k];
        }
    }
    for k in (0..n).rev() {
        let known: f64 = (k + 1..n).map(|j| matrix[k][j] * rhs[j]).sum();
        rhs[k] = (rhs[k] - known) / matrix[k][k];
    }
    rhs
}

#[test]
fn residuals_are_at_rounding_level() {
    for n in [7, 64, 101] {
        let solver = DarcySolver::new(n).unwrap();
        let a = random_coefficient(n, 1);
        let f = vec![1.0; n * n];
        let u = solver.solve(&a, &f).unwrap();
        let image = solver.apply(&a, &u).unwrap();
        // Backward stable: the residual is a few units of 1e-16 times |A| |u|, which is at most
        // 8 · 12 n² · max u.
        let scale = 96.0 * (n * n) as f64 * u.iter().fold(0.0f64, |m, v| m.max(*v));
        let worst = image.iter().fold(0.0f64, |m, v| m.max((v - 1.0).abs()));
        assert!(worst < 20.0 * f64::EPSILON * scale, "n {n}: {worst}");
    }
}

#[test]
fn the_operator_is_symmetric_and_positive() {
    let n = 20;
    let solver = DarcySolver::new(n).unwrap();
    let a = random_coefficient(n, 2);
    let v = at_centres(n, |x, y| (7.0 * x).sin() + y);
    let w = at_centres(n, |x, y| x * y - (3.0 * y).cos());
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let left = dot(&solver.apply(&a, &v).unwrap(), &w);
    let right = dot(&v, &solver.apply(&a, &w).unwrap());
    assert!((left - right).abs() < 1e-12 * left.abs().max(dot(&v, &v)) * 1e4);
    assert!(dot(&solver.apply(&a, &v).unwrap(), &v) > 0.0);
}

#[test]
fn mirrored_coefficients_give_mirrored_solutions() {
    let n = 33;
    let solver = DarcySolver::new(n).unwrap();
    let one = vec![1.0; n * n];
    let a = random_coefficient(n, 3);
    let u = solver.solve(&a, &one).unwrap();
    assert!(u.iter().all(|&v| v > 0.0), "the maximum principle");
    type Mirror = fn(usize, usize, usize) -> (usize, usize);
    let mirrors: [Mirror; 3] = [|i, j, _| (j, i), |i, j, n| (n - 1 - i, j), |i, j, n| (i, n - 1 - j)];
    for mirror in mirrors {
        let map = |v: &[f64]| -> Vec<f64> {
            (0..n * n)
                .map(|c| {
                    let (i, j) = mirror(c / n, c % n, n);
                    v[i * n + j]
                })
                .collect()
        };
        let got = solver.solve(&map(&a), &one).unwrap();
        assert!(relative_error(&got, &map(&u)) < 1e-12);
    }
}

#[test]
fn data_does_not_depend_on_threads_or_neighbours() {
    let config = DarcyConfig::new(7, 24, 42);
    let data = |config: &DarcyConfig, threads| generate(config, NonZeroUsize::new(threads), &|_, _| {}).unwrap();
    let one = data(&config, 1);
    assert_eq!(one, data(&config, 2));
    assert_eq!(one, data(&config, 3));
    assert_eq!(one, data(&config, 0)); // 0 is `None`: the global pool
    let last = DarcyConfig { n: 1, first_index: 6, ..config.clone() };
    assert_eq!(one.select(&[6]).unwrap(), data(&last, 1));
    assert_ne!(one, data(&DarcyConfig { seed: 43, ..config.clone() }, 1));
    assert_ne!(one, data(&config.for_test(), 1));
}

#[test]
fn resolutions_share_their_functions() {
    let at = |n| generate(&DarcyConfig::new(3, n, 9), None, &|_, _| {}).unwrap();
    // Equal at shared centres for a factor of three.
    let (coarse, fine) = (at(43), at(129));
    for sample in 0..3 {
        for i in 0..43 {
            for j in 0..43 {
                let c = coarse.x()[[sample, 0, i, j]];
                assert_eq!(c, fine.x()[[sample, 0, 3 * i + 1, 3 * j + 1]]);
            }
        }
    }
    // 64 and 128 share no centre. Where the four fine cells agree, so does the coarse one, but
    // for features smaller than a cell; the pressures differ by the discretisation only.
    let (coarse, fine) = (at(64), at(128));
    let (mut agree, mut uniform) = (0, 0);
    let (mut difference, mut total) = (0.0, 0.0);
    for sample in 0..3 {
        for i in 0..64 {
            for j in 0..64 {
                let block = |d: &halfmode_data::FieldPairs, input: bool| {
                    let array = if input { d.x() } else { d.y() };
                    [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(k, l)| array[[sample, 0, 2 * i + k, 2 * j + l]])
                };
                let a = block(&fine, true);
                if a.iter().all(|&v| v == a[0]) {
                    uniform += 1;
                    agree += usize::from(a[0] == coarse.x()[[sample, 0, i, j]]);
                }
                let mean = block(&fine, false).iter().sum::<f32>() / 4.0;
                difference += f64::from(mean - coarse.y()[[sample, 0, i, j]]).powi(2);
                total += f64::from(mean).powi(2);
            }
        }
    }
    assert!(uniform > 9 * 3 * 64 * 64 / 10);
    assert!(uniform - agree <= uniform / 500, "{agree} of {uniform}");
    assert!((difference / total).sqrt() < 0.02, "{}", (difference / total).sqrt());
}

/// If this fails, the data of a seed has changed: raise `DarcyConfig::VERSION`, or every cache
/// and every published number is silently wrong.
#[test]
fn the_coefficients_of_a_seed_are_fixed() {
    let pairs = generate(&DarcyConfig::new(2, 64, 0), None, &|_, _| {}).unwrap();
    let high: Vec<u8> = pairs.x().iter().map(|&v| u8::from(v == 12.0)).collect();
    let hash = Sha256::digest(&high);
    let text: String = hash[..8].iter().map(|b| format!("{b:02x}")).collect();
    assert_eq!(text, "c20364ae3f52d4bf");
}

#[test]
fn progress_counts_every_sample() {
    let seen = Mutex::new(Vec::new());
    let config = DarcyConfig::new(5, 8, 0);
    generate(&config, NonZeroUsize::new(2), &|done, total| {
        seen.lock().unwrap().push((done, total));
    })
    .unwrap();
    let mut seen = seen.into_inner().unwrap();
    seen.sort_unstable();
    assert_eq!(seen, (1..=5).map(|done| (done, 5)).collect::<Vec<_>>());
}

#[test]
fn bad_settings_and_inputs_are_typed() {
    let base = DarcyConfig::new(2, 8, 0);
    for (bad, name) in [
        (DarcyConfig { n: 0, ..base.clone() }, "n"),
        (DarcyConfig { n: usize::MAX, ..base.clone() }, "n"),
        (DarcyConfig { resolution: 0, ..base.clone() }, "resolution"),
        (DarcyConfig { resolution: usize::MAX, ..base.clone() }, "resolution"),
        (DarcyConfig { low: 0.0, ..base.clone() }, "low"),
        (DarcyConfig { high: f64::NAN, ..base.clone() }, "high"),
        (DarcyConfig { first_index: u64::MAX, ..base.clone() }, "first_index"),
    ] {
        let error = generate(&bad, None, &|_, _| {}).unwrap_err();
        assert!(matches!(error, Error::Config { field, .. } if field == name), "{error}");
    }
    let solver = DarcySolver::new(2).unwrap();
    assert!(matches!(solver.solve(&[1.0; 3], &[1.0; 4]), Err(Error::Length { .. })));
    assert!(matches!(
        solver.solve(&[1.0, 1.0, -1.0, 1.0], &[1.0; 4]),
        Err(Error::Coefficient { row: 1, column: 0, .. })
    ));
    assert!(matches!(solver.solve(&[1.0; 4], &[f64::NAN; 4]), Err(Error::NonFinite { .. })));
    assert!(DarcySolver::new(0).is_err());
    let mut workspace = DarcySolver::new(3).unwrap().workspace().unwrap();
    let mut u = [0.0; 4];
    assert!(matches!(solver.solve_into(&mut workspace, &[1.0; 4], &[1.0; 4], &mut u), Err(Error::Length { .. })));
}
