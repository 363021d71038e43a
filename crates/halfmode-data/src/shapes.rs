//! Images that are drawn: shapes of any place, size and turn, under noise.

use crate::LabelledImages;
use crate::random::{Purpose, fill_standard_normal, stream};
use rand_chacha::rand_core::Rng;

/// What is drawn.
const NAMES: [&str; 8] = ["disc", "ring", "square", "frame", "triangle", "plus", "cross", "bar"];

/// Standard deviation of the noise, where a shape differs from its ground by 0.4 to 1.
const NOISE: f64 = 0.25;

/// How far a point is inside a shape of size 1 about the origin: positive inside.
fn inside(shape: usize, [x, y]: [f64; 2]) -> f64 {
    let (r, side) = (libm::hypot(x, y), x.abs().max(y.abs()));
    let arms = |x: f64, y: f64| (0.28 - x.abs()).min(1.0 - y.abs());
    let half = std::f64::consts::FRAC_1_SQRT_2;
    match shape {
        0 => 0.9 - r,
        1 => (0.95 - r).min(r - 0.5),
        2 => 0.8 - side,
        3 => (0.85 - side).min(side - 0.45),
        4 => (0.6 - y).min(0.6 + 0.5 * y - 0.87 * x.abs()),
        5 => arms(x, y).max(arms(y, x)),
        6 => {
            let (u, v) = (half * (x + y), half * (x - y));
            arms(u, v).max(arms(v, u))
        }
        _ => (0.3 - x.abs()).min(1.0 - y.abs()),
    }
}

/// Draws `n` grey images of `size` x `size` points, numbered from `first` on: every image has a random stream of its
/// own, and classes take turns. Shapes are brighter or darker than their ground, turned by up to a fifth of a quarter
/// turn, and of a third to half of the image.
///
/// ```
/// use halfmode_data::drawn_shapes;
/// let images = drawn_shapes(0, 16, 100, 9);
/// assert_eq!((images.len(), images.labels[1], images.names[5].as_str()), (9, 5, "plus"));
/// assert_eq!(images.image(3), drawn_shapes(0, 16, 103, 1).image(0));
/// ```
#[must_use]
pub fn drawn_shapes(seed: u64, size: usize, first: u64, n: usize) -> LabelledImages {
    let (mut pixels, mut labels) = (Vec::with_capacity(n * size * size), Vec::with_capacity(n));
    for index in first..first + n as u64 {
        let mut rng = stream(Purpose::Shape, seed, index);
        let mut between = |low: f64, high: f64| {
            let share = (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
            low + share * (high - low)
        };
        let shape = (index % NAMES.len() as u64) as usize;
        let (ground, contrast) = (between(-0.2, 0.2), between(0.4, 1.0));
        let contrast = if between(0.0, 1.0) < 0.5 { contrast } else { -contrast };
        let radius = size as f64 * between(0.3, 0.45);
        let room = (size as f64 / 2.0 - radius).max(0.0);
        let centre = [between(-room, room), between(-room, room)].map(|it| it + size as f64 / 2.0);
        let (sin, cos) = libm::sincos(between(-0.3, 0.3));
        let mut noise = vec![0.0; size * size];
        fill_standard_normal(&mut rng, &mut noise);
        for (at, noise) in noise.into_iter().enumerate() {
            let [x, y] = [(at % size) as f64 + 0.5 - centre[0], (at / size) as f64 + 0.5 - centre[1]];
            let turned = [(cos * x + sin * y) / radius, (cos * y - sin * x) / radius];
            // An edge is as wide as a point.
            let cover = (inside(shape, turned) * radius + 0.5).clamp(0.0, 1.0);
            let value = ground + contrast * cover + NOISE * noise;
            pixels.push((127.5 + 80.0 * value).round().clamp(0.0, 255.0) as u8);
        }
        labels.push(shape);
    }
    let names = NAMES.map(str::to_owned).to_vec();
    LabelledImages { channels: 1, extents: [size; 2], pixels, labels, names }
}
