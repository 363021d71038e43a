//! Random numbers that depend on (purpose, seed, stream) alone.
//!
//! Every sample has a ChaCha stream of its own, so neither the number of threads nor the number
//! of samples before it can change it. The transforms use `libm`, not the platform's library:
//! the numbers are the same on every machine.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// What random numbers are for. Two purposes never share a stream, even with the same seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Coefficients of a random field.
    Field,
    /// Coefficients of a periodic random field.
    PeriodicField,
    /// The order of samples in an epoch.
    Shuffle,
    /// Points of a density.
    Density,
    /// A drawn shape.
    Shape,
    /// Numbers of their own.
    Normal,
    /// Spirals and their noise.
    Spiral,
}

impl Purpose {
    fn tag(self) -> [u8; 16] {
        match self {
            Self::Field => *b"halfmode field  ",
            Self::PeriodicField => *b"halfmode periods",
            Self::Shuffle => *b"halfmode shuffle",
            Self::Density => *b"halfmode density",
            Self::Shape => *b"halfmode shapes ",
            Self::Normal => *b"halfmode normals",
            Self::Spiral => *b"halfmode spirals",
        }
    }
}

/// The generator of one stream.
pub(crate) fn stream(purpose: Purpose, seed: u64, index: u64) -> ChaCha8Rng {
    let mut key = [0u8; 32];
    key[..16].copy_from_slice(&purpose.tag());
    key[16..24].copy_from_slice(&seed.to_le_bytes());
    let mut rng = ChaCha8Rng::from_seed(key);
    rng.set_stream(index);
    rng
}

/// Fills `out` with independent standard normal numbers (Box-Muller, both outputs used).
pub(crate) fn fill_standard_normal(rng: &mut ChaCha8Rng, out: &mut [f64]) {
    const SCALE: f64 = 1.0 / (1u64 << 53) as f64;
    for pair in out.chunks_mut(2) {
        // The first uniform is in (0, 1], so that its logarithm is finite.
        let u = ((rng.next_u64() >> 11) + 1) as f64 * SCALE;
        let v = (rng.next_u64() >> 11) as f64 * SCALE;
        let radius = libm::sqrt(-2.0 * libm::log(u));
        let (sin, cos) = libm::sincos(std::f64::consts::TAU * v);
        for (value, trig) in pair.iter_mut().zip([cos, sin]) {
            *value = radius * trig;
        }
    }
}

/// `n` independent standard normal numbers, the same for the same seed on every machine.
#[must_use]
pub fn standard_normals(seed: u64, n: usize) -> Vec<f64> {
    let mut out = vec![0.0; n];
    fill_standard_normal(&mut stream(Purpose::Normal, seed, 0), &mut out);
    out
}

/// A uniform integer in `0..bound` without bias (multiplication with rejection).
fn below(rng: &mut ChaCha8Rng, bound: u64) -> u64 {
    let threshold = bound.wrapping_neg() % bound.max(1);
    loop {
        let product = u128::from(rng.next_u64()) * u128::from(bound);
        if product as u64 >= threshold {
            return (product >> 64) as u64;
        }
    }
}

/// The numbers `0..n` in the random order of one epoch (Fisher-Yates).
///
/// The order depends on `n`, `seed` and `epoch` alone, so a resumed run sees the same batches.
///
/// ```
/// let order = halfmode_data::shuffled(5, 7, 0);
/// assert_eq!(order, halfmode_data::shuffled(5, 7, 0));
/// assert_eq!(order.len(), 5);
/// ```
#[must_use]
pub fn shuffled(n: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut rng = stream(Purpose::Shuffle, seed, epoch);
    let mut order: Vec<usize> = (0..n).collect();
    for last in (1..n).rev() {
        let other = below(&mut rng, last as u64 + 1) as usize;
        order.swap(last, other);
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normals_have_the_moments_of_a_standard_normal() {
        let mut z = vec![0.0; 200_001];
        fill_standard_normal(&mut stream(Purpose::Field, 3, 5), &mut z);
        let n = z.len() as f64;
        let moment = |p: i32| z.iter().map(|v| v.powi(p)).sum::<f64>() / n;
        // Five standard errors: sqrt(1/n), sqrt(2/n), sqrt(15/n), sqrt(96/n).
        assert!(moment(1).abs() < 5.0 * (1.0 / n).sqrt());
        assert!((moment(2) - 1.0).abs() < 5.0 * (2.0 / n).sqrt());
        assert!(moment(3).abs() < 5.0 * (15.0 / n).sqrt());
        assert!((moment(4) - 3.0).abs() < 5.0 * (96.0 / n).sqrt());
    }

    #[test]
    fn streams_and_purposes_differ() {
        let first = |p, s, i| stream(p, s, i).next_u64();
        let base = first(Purpose::Field, 1, 1);
        assert_eq!(base, first(Purpose::Field, 1, 1));
        assert_ne!(base, first(Purpose::Field, 1, 2));
        assert_ne!(base, first(Purpose::Field, 2, 1));
        assert_ne!(base, first(Purpose::Shuffle, 1, 1));
    }

    #[test]
    fn shuffles_are_permutations_that_change_with_seed_and_epoch() {
        for n in [0, 1, 2, 3, 17, 1000] {
            let mut order = shuffled(n, 4, 2);
            order.sort_unstable();
            assert_eq!(order, (0..n).collect::<Vec<_>>());
        }
        assert_ne!(shuffled(100, 0, 0), shuffled(100, 0, 1));
        assert_ne!(shuffled(100, 0, 0), shuffled(100, 1, 0));
    }

    #[test]
    fn every_order_of_three_is_equally_likely() {
        let mut counts = std::collections::BTreeMap::new();
        for epoch in 0..6000 {
            *counts.entry(shuffled(3, 9, epoch)).or_insert(0usize) += 1;
        }
        assert_eq!(counts.len(), 6);
        // Five standard deviations of a binomial with n = 6000, p = 1/6: about 145.
        assert!(counts.values().all(|&c| c.abs_diff(1000) < 145), "{counts:?}");
    }
}
