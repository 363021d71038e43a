//! The truncated transform by its definition, in double precision: the oracle of the tests.

use crate::table::{half_weight, signed_frequency};
use std::f64::consts::TAU;

/// Modes of a complex field, unnormalised: `sum_j x_j e^(-2 pi i sum_a f_a j_a / n_a)`.
///
/// # Shapes
/// - `x`: `[n_1, …, n_d]` interleaved (re, im); `grid` its extents
/// - `modes`: kept per axis; `half` says whether the last axis keeps `0..k` (real data)
/// - returns `[k_1, …, k_d]` interleaved (re, im)
#[must_use]
pub fn to_modes(x: &[f64], grid: &[usize], modes: &[usize], half: bool) -> Vec<f64> {
    let mut x_hat = Vec::with_capacity(2 * modes.iter().product::<usize>());
    for_each_index(modes, |mode| {
        let (mut re, mut im, mut point) = (0.0, 0.0, 0);
        for_each_index(grid, |j| {
            let (s, c) = (-phase(mode, j, grid, modes, half)).sin_cos();
            let (a, b) = (x[2 * point], x[2 * point + 1]);
            (re, im, point) = (re + a * c - b * s, im + a * s + b * c, point + 1);
        });
        x_hat.extend([re, im]);
    });
    x_hat
}

/// The field of kept modes, unnormalised: `sum_k w_k x_hat_k e^(2 pi i …)`, with the half-spectrum
/// weights (and, by the caller, the real part) for real data.
///
/// # Shapes
/// As [`to_modes`], with the roles of `x` and the result exchanged.
#[must_use]
pub fn to_grid(x_hat: &[f64], grid: &[usize], modes: &[usize], half: bool) -> Vec<f64> {
    let last = grid.len() - 1;
    let mut x = Vec::with_capacity(2 * grid.iter().product::<usize>());
    for_each_index(grid, |j| {
        let (mut re, mut im, mut idx) = (0.0, 0.0, 0);
        for_each_index(modes, |mode| {
            let w = if half { half_weight(mode[last], grid[last]) } else { 1.0 };
            let (s, c) = phase(mode, j, grid, modes, half).sin_cos();
            let (a, b) = (w * x_hat[2 * idx], w * x_hat[2 * idx + 1]);
            (re, im, idx) = (re + a * c - b * s, im + a * s + b * c, idx + 1);
        });
        x.extend([re, im]);
    });
    x
}

fn phase(mode: &[usize], j: &[usize], grid: &[usize], modes: &[usize], half: bool) -> f64 {
    let last = grid.len() - 1;
    (0..grid.len())
        .map(|a| {
            let f = if half && a == last { mode[a] as i64 } else { signed_frequency(mode[a], modes[a]) };
            let turn = (i128::from(f) * j[a] as i128).rem_euclid(grid[a] as i128);
            TAU * turn as f64 / grid[a] as f64
        })
        .sum()
}

fn for_each_index(extents: &[usize], mut visit: impl FnMut(&[usize])) {
    let mut index = vec![0; extents.len()];
    loop {
        visit(&index);
        let Some(axis) = (0..extents.len()).rev().find(|&a| index[a] + 1 < extents[a]) else { return };
        index[axis] += 1;
        index[axis + 1..].fill(0);
    }
}
