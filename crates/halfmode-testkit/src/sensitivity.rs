//! How much results move with their operands: what tolerances are multiples of.

use crate::Rng;

/// The 2-norm.
#[must_use]
pub fn norm(x: &[f64]) -> f64 {
    x.iter().map(|it| it * it).sum::<f64>().sqrt()
}

/// The 2-norm of a difference.
///
/// # Panics
/// If the lengths differ.
#[must_use]
pub fn distance(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum::<f64>().sqrt()
}

/// How far each result of `f` moves when every operand moves by one part in `1 / RELATIVE`, over
/// that part: the condition of each result times its size. Rounding errors inside a computation
/// are such moves of its operands, so tolerances are multiples of this. Of 16 choices of signs the worst
/// counts: four, as once here, miss it where a result has few operands.
pub fn sensitivity(f: impl Fn(&[Vec<f64>]) -> Vec<Vec<f64>>, operands: &[Vec<f64>], seed: u64) -> Vec<f64> {
    const RELATIVE: f64 = 1e-7;
    let want = f(operands);
    let mut rng = Rng::new(seed ^ 0x5e5e);
    let mut worst = vec![0.0f64; want.len()];
    for _ in 0..16 {
        let mut nudged = |v: &f64| v * (1.0 + if rng.bits() & 1 == 0 { RELATIVE } else { -RELATIVE });
        let moved: Vec<Vec<f64>> = operands.iter().map(|values| values.iter().map(&mut nudged).collect()).collect();
        for (worst, (got, want)) in worst.iter_mut().zip(f(&moved).iter().zip(&want)) {
            *worst = worst.max(distance(got, want) / RELATIVE);
        }
    }
    worst
}
