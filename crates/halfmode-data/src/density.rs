//! Toy densities in the plane.

use crate::random::{Purpose, fill_standard_normal, stream};
use rand_chacha::rand_core::Rng;
use serde::{Deserialize, Serialize};

/// A density in the plane that is easy to draw from and hard to fit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Density {
    /// Eight normal distributions of standard deviation `1/√8` on a circle of radius `√8`.
    #[default]
    #[serde(rename = "8gaussians")]
    EightGaussians,
    /// Two spirals of one and a half turns, points of one mirrored to the other.
    #[serde(rename = "2spirals")]
    TwoSpirals,
    /// The black squares, of side 2, of a board between -4 and 4.
    #[serde(rename = "checkerboard")]
    Checkerboard,
}

/// A uniform number in [0, 1).
fn uniform(rng: &mut impl Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

impl Density {
    /// The `index`-th point of the sequence that `seed` names; every point has a random stream of its own.
    ///
    /// ```
    /// use halfmode_data::Density;
    /// let point = Density::Checkerboard.point(0, 7);
    /// assert!(point.iter().all(|x| x.abs() <= 4.0));
    /// assert_eq!(point, Density::Checkerboard.point(0, 7));
    /// ```
    #[must_use]
    pub fn point(self, seed: u64, index: u64) -> [f64; 2] {
        let mut rng = stream(Purpose::Density, seed, index);
        let mut normal = [0.0; 2];
        match self {
            Density::EightGaussians => {
                let centre = (rng.next_u64() >> 61) as f64;
                fill_standard_normal(&mut rng, &mut normal);
                let (sin, cos) = libm::sincos(centre * std::f64::consts::FRAC_PI_4);
                let radius = 8f64.sqrt();
                [radius * cos + normal[0] / radius, radius * sin + normal[1] / radius]
            }
            Density::TwoSpirals => {
                let sign = if rng.next_u64() >> 63 == 0 { 1.0 } else { -1.0 };
                let angle = 3.0 * std::f64::consts::PI * uniform(&mut rng).sqrt();
                let (sin, cos) = libm::sincos(angle);
                let width = [0.5 * uniform(&mut rng), 0.5 * uniform(&mut rng)];
                fill_standard_normal(&mut rng, &mut normal);
                let arm = [-cos * angle + width[0], sin * angle + width[1]];
                std::array::from_fn(|axis| sign * arm[axis] / 3.0 + 0.1 * normal[axis])
            }
            Density::Checkerboard => {
                let square = rng.next_u64() >> 61;
                let (row, column) = (square / 2, 2 * (square % 2) + square / 2 % 2);
                let corner = [column as f64, row as f64];
                corner.map(|corner| 2.0 * (corner + uniform(&mut rng)) - 4.0)
            }
        }
    }

    /// The entropy in nats, where it has a closed form: the least mean negative log-likelihood. Of the eight normal
    /// distributions it is that of distributions that do not overlap, too large by less than 0.01.
    #[must_use]
    pub fn entropy(self) -> Option<f64> {
        match self {
            // ln 8 + ln(2 pi e / 8)
            Density::EightGaussians => Some(1.0 + std::f64::consts::TAU.ln()),
            Density::TwoSpirals => None,
            Density::Checkerboard => Some(32f64.ln()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(density: Density, n: u64) -> Vec<[f64; 2]> {
        (0..n).map(|index| density.point(3, index)).collect()
    }

    /// Every black square has an eighth of the points, no white one has any.
    #[test]
    fn the_board_is_black_and_white() {
        let mut counts = [[0u32; 4]; 4];
        for [x, y] in points(Density::Checkerboard, 8000) {
            counts[((y + 4.0) / 2.0) as usize][((x + 4.0) / 2.0) as usize] += 1;
        }
        for (row, counts) in counts.iter().enumerate() {
            for (column, &count) in counts.iter().enumerate() {
                let black = row % 2 == column % 2;
                // Five standard deviations of a binomial with n = 8000, p = 1/8: 148.
                assert!(if black { count.abs_diff(1000) < 148 } else { count == 0 }, "{counts:?}");
            }
        }
    }

    /// Eight clusters of the stated width; the mean log-density under the mixture is the stated entropy.
    #[test]
    fn eight_gaussians_have_their_entropy() {
        let points = points(Density::EightGaussians, 20_000);
        let centre = |k: usize| (k as f64 * std::f64::consts::FRAC_PI_4).sin_cos();
        let density = |[x, y]: [f64; 2]| {
            let terms = (0..8).map(|k| {
                let (sin, cos) = centre(k);
                let r2 = (x - 8f64.sqrt() * cos).powi(2) + (y - 8f64.sqrt() * sin).powi(2);
                // The variance is 1/8 in each axis.
                (-4.0 * r2).exp() * 4.0 / std::f64::consts::PI
            });
            terms.sum::<f64>() / 8.0
        };
        let mean = -points.iter().map(|&it| density(it).ln()).sum::<f64>() / 20_000.0;
        // The standard deviation of a log-density here is one.
        let want = Density::EightGaussians.entropy().unwrap();
        assert!((mean - want).abs() < 0.01 + 5.0 / 20_000f64.sqrt(), "{mean} {want}");
    }

    #[test]
    fn spirals_are_mirror_images_within_the_plane() {
        let points = points(Density::TwoSpirals, 20_000);
        let mean = |axis: usize| points.iter().map(|it| it[axis]).sum::<f64>() / 20_000.0;
        // Standard deviations of the coordinates are below 2.
        assert!(mean(0).abs() < 5.0 * 2.0 / 141.0 && mean(1).abs() < 5.0 * 2.0 / 141.0);
        assert!(points.iter().all(|[x, y]| x.hypot(*y) < 4.3));
        assert_eq!(Density::TwoSpirals.entropy(), None);
    }
}
