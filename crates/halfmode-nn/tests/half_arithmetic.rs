//! What half precision costs the spectral convolution, on every kind of field and grid.
//!
//! Compared: outputs and gradients of the convolution with f16 storage and f32 sums (`mixed`)
//! against the same chain in double precision (bound to the definition in `spectral_conv.rs`), both
//! from the same field, weight and cotangent, which are rounded to f16 first. The error is relative
//! in the 2-norm. White and smooth fields are held to 1e-3 in every run: five (2-D) or seven (3-D)
//! roundings on the way, of which each contributes a root mean square of a third of the unit
//! roundoff, 4.9e-4.
//!
//! Around a mean of 100 the result is a handful of numbers, those of mode zero, and a single run may
//! err by the sum of all roundings; the root mean square over runs is held to 1e-3.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests fail by panicking")]

mod common;

use common::{policy, rounded, run, tensors, transform};
use halfmode_autograd::{Cx, Op};
use halfmode_fft::{HalfSafeScale, Weights, signed_frequency};
use halfmode_nn::SpectralConv;
use halfmode_precision::Precision;
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Rng, norm, rel_l2};

const BOUND: f64 = 1e-3;
const FIRST_SEED: u64 = 100;
/// Unit roundoff of f16.
const ROUNDOFF: f64 = 1.0 / 2048.0;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Field {
    White,
    /// Amplitudes fall as |k|^-2.5, the same function on every grid that resolves it.
    Smooth,
    /// Unit white noise around means of 90 to 110. With the same mean everywhere, how its one number
    /// happens to round would decide the error on a grid.
    Mean100,
}

const FIELDS: [Field; 3] = [Field::White, Field::Smooth, Field::Mean100];

struct Case {
    grid: Vec<usize>,
    modes: Vec<usize>,
    batch: usize,
    channels: usize,
}

fn case(grid: &[usize], modes: &[usize], batch: usize, channels: usize) -> Case {
    Case { grid: grid.to_vec(), modes: modes.to_vec(), batch, channels }
}

impl Case {
    fn points(&self) -> usize {
        self.grid.iter().product()
    }

    fn shape(&self) -> Vec<usize> {
        [vec![self.batch], self.grid.clone(), vec![self.channels]].concat()
    }

    fn field(&self, device: &Device, field: Field, seed: u64) -> Vec<f64> {
        let mut rng = Rng::new(seed);
        match field {
            Field::White => rng.normals(self.shape().iter().product()),
            Field::Mean100 => {
                let means: Vec<f64> = (0..self.batch * self.channels).map(|_| 90.0 + 20.0 * rng.uniform()).collect();
                let values = rng.normals(self.shape().iter().product()).into_iter().enumerate();
                let of = |i: usize| i / (self.points() * self.channels) * self.channels + i % self.channels;
                values.map(|(i, v)| v + means[of(i)]).collect()
            }
            Field::Smooth => {
                let last = self.grid.len() - 1;
                let most = |axis: usize| {
                    if axis == last { (self.grid[axis] / 2 + 1).min(17) } else { self.grid[axis].min(32) }
                };
                let modes: Vec<usize> = (0..=last).map(most).collect();
                let plan = transform(device, &self.grid, &modes, Precision::F64, None);
                let n_modes: usize = modes.iter().product();
                let amplitude = |mut m: usize| {
                    let mut square = 0.0;
                    for axis in (0..=last).rev() {
                        let idx = m % modes[axis];
                        m /= modes[axis];
                        let f = if axis == last { idx as f64 } else { signed_frequency(idx, modes[axis]) as f64 };
                        square += f * f;
                    }
                    if square > 0.0 { square.powf(-1.25) } else { 1.0 }
                };
                let amplitudes: Vec<f64> = (0..n_modes).map(amplitude).collect();
                let shape = plan.spectrum_shape(self.batch, self.channels);
                let values: Vec<f64> =
                    (0..shape.numel()).map(|i| rng.normal() * amplitudes[i / self.channels % n_modes]).collect();
                let x_hat = Tensor::from_slice(device, &values, shape, Precision::F64, Purpose::Activation).unwrap();
                let ones = vec![1.0; self.grid.len()];
                plan.to_grid(&x_hat, Weights::Doubled, &ones, Precision::F64, Purpose::Activation)
                    .unwrap()
                    .to_vec()
                    .unwrap()
            }
        }
    }

    /// Relative errors of y, grad x, grad w in `half`, and the largest stored spectrum value.
    fn errors(&self, device: &Device, field: Field, half: Precision, seed: u64) -> ([f64; 3], f64) {
        let mut rng = Rng::new(seed ^ 6);
        let n_modes: usize = self.modes.iter().product();
        // Of the size that keeps a white field's variance; its exact value changes nothing.
        let size = 1.0 / (2.0 * self.channels as f64).sqrt();
        let weight: Vec<f64> =
            rng.normals(n_modes * self.channels * self.channels * 2).iter().map(|v| v * size).collect();
        let inputs = [
            (self.shape(), rounded(&self.field(device, field, seed), half)),
            (vec![n_modes, self.channels, 2 * self.channels], rounded(&weight, half)),
        ];
        let cotangent = rounded(&rng.normals(self.batch * self.points() * self.channels), half);
        let result = |precision: Precision| {
            let op = SpectralConv::new(transform(device, &self.grid, &self.modes, precision, None));
            let inputs = tensors(device, &inputs, precision);
            let cx = Cx::new(device, &policy(precision));
            (run(&cx, Box::new(op), &inputs, &cotangent), inputs)
        };
        let (got, stored) = result(half);
        let (want, _) = result(Precision::F64);
        assert!(got.iter().flatten().all(|v| v.is_finite()), "{:?} {field:?}: not finite", self.grid);
        let errors = std::array::from_fn(|idx| rel_l2(&got[idx], &want[idx]));
        // Every run is checked to be finite; how far from overflow is measured once.
        let largest = if seed == FIRST_SEED { self.largest_spectrum(device, &stored, &cotangent, half) } else { 0.0 };
        (errors, largest)
    }

    /// Over all spectra of both passes: of the field, its product with the weight, the cotangent and
    /// its product. Half-transformed values are between fields and spectra in size.
    fn largest_spectrum(&self, device: &Device, inputs: &[Tensor], cotangent: &[f64], half: Precision) -> f64 {
        let cx = Cx::new(device, &policy(half));
        let plan = transform(device, &self.grid, &self.modes, half, None);
        let (_, mut saved) = SpectralConv::new(plan.clone()).forward(&cx, &[&inputs[0], &inputs[1]]).unwrap();
        let x_hat = saved.take("x_hat").unwrap();
        assert_eq!(x_hat.precision(), half);
        let g = Tensor::from_slice(device, cotangent, self.shape(), half, Purpose::Activation).unwrap();
        let scale = HalfSafeScale::new(&self.grid, &self.grid);
        let g_hat = plan.to_modes(&g, Weights::Doubled, &scale.to_modes, half, Purpose::Activation).unwrap();
        let w = inputs[1].to_vec::<f64>().unwrap();
        let (c, n_modes) = (self.channels, plan.n_modes());
        let mut largest = 0.0f64;
        for (spectrum, transposed) in [(&x_hat, false), (&g_hat, true)] {
            let v = spectrum.to_vec::<f64>().unwrap();
            largest = v.iter().fold(largest, |largest, v| largest.max(v.abs()));
            for b in 0..self.batch {
                for k in 0..n_modes {
                    for to in 0..c {
                        let (mut re, mut im) = (0.0, 0.0);
                        for from in 0..c {
                            let (i, o) = if transposed { (to, from) } else { (from, to) };
                            let at = (k * c + i) * 2 * c + o;
                            let (p, q) = (w[at], if transposed { -w[at + c] } else { w[at + c] });
                            let a = |part: usize| v[((b * 2 + part) * n_modes + k) * c + from];
                            re += a(0) * p - a(1) * q;
                            im += a(0) * q + a(1) * p;
                        }
                        largest = largest.max(re.abs()).max(im.abs());
                    }
                }
            }
        }
        largest
    }
}

/// Prints and checks a series of grids. The table and the comparison of grids show root mean squares
/// over runs.
fn check(name: &str, series: &[Case], independent: bool) {
    let device = Device::cpu(2).unwrap();
    let mut worst = 0.0f64;
    println!("{name} field grid: forward, grad x, grad w (rms over runs); largest error, largest spectrum value");
    for field in FIELDS {
        let mut rows: Vec<[f64; 3]> = Vec::new();
        for case in series {
            let large = case.points() * case.channels > 100_000;
            let n_runs: u64 = if !large {
                8
            } else if field == Field::Mean100 {
                4
            } else {
                1
            };
            // Each axis is stored twice on the way, and the product once.
            let single = if field == Field::Mean100 { (2 * case.grid.len() + 1) as f64 * ROUNDOFF } else { BOUND };
            let (mut squares, mut most, mut largest) = ([0.0; 3], 0.0f64, 0.0f64);
            for seed in 0..n_runs {
                let (errors, spectrum) = case.errors(&device, field, Precision::F16, FIRST_SEED + seed);
                assert!(errors.iter().all(|error| *error <= single), "{name} {field:?} {:?}: {errors:?}", case.grid);
                largest = largest.max(spectrum);
                most = errors.iter().fold(most, |most, error| most.max(*error));
                squares.iter_mut().zip(errors).for_each(|(sum, error)| *sum += error * error / n_runs as f64);
            }
            let rms = squares.map(f64::sqrt);
            println!(
                "{name} {field:?} {:?}: {:.2e}, {:.2e}, {:.2e}; {most:.2e}, {largest:.1}",
                case.grid, rms[0], rms[1], rms[2]
            );
            assert!(rms.iter().all(|error| *error <= BOUND), "{name} {field:?} {:?}: {rms:?}", case.grid);
            assert!(largest < 65504.0 / 8.0, "{name} {field:?} {:?}: {largest}", case.grid);
            worst = worst.max(most);
            rows.push(rms);
        }
        for (idx, what) in ["forward", "grad x", "grad w"].into_iter().enumerate() {
            let of = |pick: fn(f64, f64) -> f64, from| rows.iter().map(|row| row[idx]).fold(from, pick);
            let ratio = of(f64::max, 0.0) / of(f64::min, f64::INFINITY);
            println!("{name} {field:?} {what}: max / min over grids {ratio:.2}");
            assert!(!independent || ratio < 3.0, "{name} {field:?} {what}: errors vary by {ratio:.2} with the grid");
        }
    }
    println!("{name}: largest error {worst:.2e}");
}

#[test]
fn errors_do_not_depend_on_the_grid_in_two_dimensions() {
    let small = [32, 48, 64, 100, 128].map(|n| case(&[n, n], &[32, 17], 1, 4));
    let large = [case(&[421, 421], &[32, 17], 1, 2), case(&[1024, 1024], &[32, 17], 1, 2)];
    let all: Vec<Case> = small.into_iter().chain(large).collect();
    check("2-D", &all, true);
}

#[test]
fn errors_do_not_depend_on_the_grid_in_one_dimension() {
    check("1-D", &[32, 100, 421, 1024, 4096, 8191].map(|n| case(&[n], &[16], 4, 8)), true);
}

#[test]
fn errors_do_not_depend_on_the_grid_in_three_dimensions() {
    let grids = [[20, 20, 10], [11, 13, 17], [16, 16, 16], [32, 32, 32]];
    check("3-D", &grids.map(|grid| case(&grid, &[8, 8, 5], 1, 4)), true);
}

#[test]
fn few_modes_full_spectra_and_long_grids_are_within_the_bound() {
    let grids = [
        case(&[64, 64], &[12, 7], 2, 4),
        case(&[421, 64], &[9, 5], 1, 4),
        case(&[64, 421], &[16, 9], 1, 4),
        case(&[97, 31], &[97, 16], 1, 3),
        case(&[7, 13, 17], &[7, 13, 9], 1, 4),
    ];
    check("other", &grids, false);
}

/// bfloat16 has three bits less: its errors are eight times those of f16, as documented.
#[test]
fn bfloat16_errors_are_eight_times_larger() {
    let device = Device::cpu(2).unwrap();
    for n in [32, 100, 128] {
        for field in FIELDS {
            let (errors, _) = case(&[n, n], &[32, 17], 1, 4).errors(&device, field, Precision::Bf16, 5);
            println!("bf16 {n} {field:?}: {errors:?}");
            assert!(errors.iter().all(|error| *error <= 8.0 * BOUND), "{n} {field:?}: {errors:?}");
        }
    }
}

/// Gradients that a loss scale of 2^16 has made large, and a mean as large, pass too.
#[test]
fn large_cotangents_do_not_overflow() {
    let device = Device::cpu(2).unwrap();
    let case = case(&[128, 128], &[32, 17], 1, 4);
    let plan = transform(&device, &case.grid, &case.modes, Precision::F16, None);
    let mut rng = Rng::new(1);
    let x = rng.tensor(&device, &case.shape(), Precision::F16);
    let w = rng.tensor(&device, &[32 * 17, 4, 8], Precision::F16);
    let cotangent: Vec<f64> = rng.normals(x.numel()).iter().map(|v| 256.0 * v + 256.0).collect();
    let cx = Cx::new(&device, &policy(Precision::F16));
    let results = run(&cx, Box::new(SpectralConv::new(plan)), &[x, w], &cotangent);
    assert!(results.iter().all(|v| norm(v).is_finite()));
}
