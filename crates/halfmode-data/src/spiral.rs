//! Spirals in the plane, observed with noise at equal times.

use crate::random::{Purpose, fill_standard_normal, stream};
use rand_chacha::rand_core::Rng;

/// A family of spirals: radius `a + b t` and angle `θ ± 2π t`, with `a` between 0.5 and 1, `b` between 0.5 and 1.5, any
/// `θ` and either direction, observed at equal times from 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Spirals {
    /// Observations of a curve, at least 2.
    pub n_points: usize,
    /// Standard deviation of the noise in each coordinate.
    pub noise: f64,
}

/// One curve.
#[derive(Clone, Debug, PartialEq)]
pub struct Spiral {
    /// What is seen, from time 0 to 1.
    pub observed: Vec<[f64; 2]>,
    /// Where the curve is at these times, and as many intervals further on: `2 n_points - 1` points from time 0 to 2.
    pub exact: Vec<[f64; 2]>,
}

impl Spirals {
    /// The `index`-th curve of the sequence that `seed` names; every curve has a random stream of its own.
    #[must_use]
    pub fn curve(&self, seed: u64, index: u64) -> Spiral {
        let mut rng = stream(Purpose::Spiral, seed, index);
        let mut uniform = || (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let (radius, growth) = (0.5 + 0.5 * uniform(), 0.5 + uniform());
        let (start, turn) = (std::f64::consts::TAU * uniform(), if uniform() < 0.5 { 1.0 } else { -1.0 });
        let n = self.n_points.max(2);
        let at = |i: usize| {
            let t = i as f64 / (n - 1) as f64;
            let (sin, cos) = libm::sincos(start + turn * std::f64::consts::TAU * t);
            [(radius + growth * t) * cos, (radius + growth * t) * sin]
        };
        let exact: Vec<[f64; 2]> = (0..2 * n - 1).map(at).collect();
        let mut noise = vec![0.0; 2 * n];
        fill_standard_normal(&mut rng, &mut noise);
        let seen =
            |(point, noise): (&[f64; 2], &[f64])| std::array::from_fn(|axis| point[axis] + self.noise * noise[axis]);
        Spiral { observed: exact.iter().zip(noise.chunks_exact(2)).map(seen).collect(), exact }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_are_observed_with_their_noise() {
        let spirals = Spirals { n_points: 50, noise: 0.1 };
        let mut squares = 0.0;
        let mut turns = [0; 2];
        for index in 0..200 {
            let curve = spirals.curve(1, index);
            assert_eq!((curve.observed.len(), curve.exact.len()), (50, 99));
            assert_eq!(curve, spirals.curve(1, index));
            let radius = |[x, y]: [f64; 2]| x.hypot(y);
            assert!(radius(curve.exact[0]) >= 0.5 && radius(curve.exact[98]) <= 4.0);
            // A whole turn later the curve points the same way, further out.
            let [start, end] = [curve.exact[0], curve.exact[49]];
            assert!((start[0] * end[1] - start[1] * end[0]).abs() < 1e-12 && radius(end) > radius(start));
            let next = curve.exact[1];
            turns[usize::from(start[0] * next[1] > start[1] * next[0])] += 1;
            for (seen, exact) in curve.observed.iter().zip(&curve.exact) {
                squares += (seen[0] - exact[0]).powi(2) + (seen[1] - exact[1]).powi(2);
            }
        }
        // 20000 numbers of variance 0.01: five standard errors are 5 % of it.
        assert!((squares / 20_000.0 - 0.01).abs() < 5e-4, "{squares}");
        assert!(turns.iter().all(|&count| count > 60), "{turns:?}");
    }
}
