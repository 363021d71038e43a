//! Solves on a GPU against the same in double precision on the CPU, and against the CPU's own halves.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test")]

mod common;

use common::{ALL, Ask, LAST, Problem, Solution, double, linspace, mixed, square, tanh_problem};
use halfmode_autograd::{Cx, LeafId, Result, Tape, Var};
use halfmode_ode::{AdjointScaling, Method, MlpField, OdeOptions, OdePrecision, PlanarField, Points, Storage};
use halfmode_ode::{TimeInput, Times, TupleField, VectorField, odeint_tuple, odeint_tuple_last};
use halfmode_precision::{Format, Precision};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Rng, gpu, rel_l2};
use std::sync::Arc;

/// Channels, width of hidden layers, how many of them, rows.
type Sizes = (usize, usize, usize, usize);

fn perceptron(
    (channels, width, n_hidden, rows): Sizes,
    time: TimeInput,
    n_steps: usize,
    seed: u64,
) -> Problem<MlpField> {
    let mut rng = Rng::new(seed);
    let field = MlpField { channels, hidden: vec![width; n_hidden], time };
    let mut params = Vec::new();
    for spec in field.param_specs() {
        let shape = spec.file_shape.clone();
        let fan_in = shape.get(1).copied().unwrap_or(4) as f64;
        let n = shape.iter().product();
        params.push((shape, rng.normals(n).iter().map(|it| it / fan_in.sqrt()).collect()));
    }
    let y0 = (vec![rows, channels], rng.normals(rows * channels));
    Problem { field: Arc::new(field), params, y0, times: linspace(0.0, 1.0, n_steps) }
}

/// A field that is a perceptron, but does not say so: what a GPU does layer by layer.
struct Plain(MlpField);

impl VectorField for Plain {
    fn velocity(&self, tape: &mut Tape, t: &Var, y: &Var, params: &[Var]) -> Result<Var> {
        self.0.velocity(tape, t, y, params)
    }
}

fn plain(problem: &Problem<MlpField>) -> Problem<Plain> {
    let Problem { field, params, y0, times } = problem.clone();
    Problem { field: Arc::new(Plain((*field).clone())), params, y0, times }
}

/// Relative errors of the last state, of its gradient and of all parameters' together.
fn errors(got: &Solution, want: &Solution) -> [f64; 3] {
    let pairs = [(got.last().to_vec(), want.last().to_vec()), (got.grad_y0.clone(), want.grad_y0.clone())];
    let [state, y0] = pairs.map(|(got, want)| rel_l2(&got, &want));
    [state, y0, rel_l2(&got.theta(), &want.theta())]
}

fn show(errors: &[f64]) -> String {
    errors.iter().map(|it| format!("{it:.2e} ")).collect()
}

/// Errors of a whole step: a few roundings of the velocity, and no more than twice what the CPU is off by.
fn check(gpu: &Device, problem: &Problem<MlpField>, options: &OdeOptions, ask: Ask, name: &str) {
    let cpu = Device::cpu(2).unwrap();
    let seed: common::Seed<'_> = &|idx, y| Some(y.iter().map(|y| y * (1.0 + idx as f64)).collect());
    let want = problem.solve(&cpu, &double().method(options.method), ask, seed).unwrap();
    let on_cpu = errors(&problem.solve(&cpu, options, ask, seed).unwrap(), &want);
    let on_gpu = errors(&problem.solve(gpu, options, ask, seed).unwrap(), &want);
    let u = Format::from(options.precision.velocity_storage()).unit_roundoff();
    let text = format!("{name}: {}, on the CPU {}", show(&on_gpu), show(&on_cpu));
    println!("{text}");
    assert!(on_gpu.iter().zip(on_cpu).all(|(got, cpu)| *got <= 2.0 * cpu + u), "{text}");
}

const SIZES: [Sizes; 10] = [
    (2, 32, 1, 1),
    (64, 256, 3, 40),
    (1, 1, 1, 33),
    (3, 7, 2, 5),
    (31, 33, 2, 64),
    (65, 40, 2, 37),
    (128, 96, 1, 31),
    (16, 512, 2, 3),
    (5, 64, 4, 100),
    (97, 130, 3, 65),
];

#[test]
fn perceptrons_of_all_sizes_on_a_gpu() {
    let Some(gpu) = gpu() else { return };
    let times = [TimeInput::Concatenated, TimeInput::None];
    for (idx, sizes) in SIZES.into_iter().enumerate() {
        for (format, time) in [Precision::F16, Precision::Bf16].into_iter().zip(times.into_iter().cycle().skip(idx)) {
            let problem = perceptron(sizes, time, 3, 7 + idx as u64);
            check(&gpu, &problem, &mixed(format), LAST, &format!("{sizes:?} {time:?} in {format}"));
        }
    }
}

#[test]
fn every_method_and_all_points_on_a_gpu() {
    let Some(gpu) = gpu() else { return };
    for method in [Method::Euler, Method::Midpoint, Method::Heun, Method::Rk4, Method::Rk4ThreeEighths] {
        for (format, ask) in [(Precision::F16, ALL), (Precision::Bf16, LAST)] {
            let mut problem = perceptron((6, 24, 2, 50), TimeInput::Concatenated, 5, 3);
            check(&gpu, &problem, &mixed(format).method(method), ask, &format!("{method:?} in {format}"));
            problem.times.reverse();
            check(&gpu, &problem, &mixed(format).method(method), ask, &format!("{method:?} back in {format}"));
        }
    }
}

#[test]
fn layer_by_layer_on_a_gpu() {
    let Some(gpu) = gpu() else { return };
    let cpu = Device::cpu(2).unwrap();
    for (options, most) in [(double(), 1e-12), (OdeOptions::new(OdePrecision::full()), 1e-5)] {
        for method in [Method::Rk4, Method::Heun, Method::Tsitouras54] {
            let problem = plain(&perceptron((5, 24, 2, 17), TimeInput::Concatenated, 6, 11));
            let options = options.clone().method(method);
            let ask = Ask { points: Points::All, time_grad: true };
            let want = problem.solve(&cpu, &options, ask, &square).unwrap();
            let got = problem.solve(&gpu, &options, ask, &square).unwrap();
            let errors = [&errors(&got, &want)[..], &[rel_l2(&got.grad_t, &want.grad_t)]].concat();
            assert!(errors.iter().all(|it| *it <= most), "{method:?}: {}", show(&errors));
        }
    }
    // Halves, with the kernels of a perceptron and without, and with states that are found again.
    for format in [Precision::F16, Precision::Bf16] {
        let problem = perceptron((5, 24, 2, 17), TimeInput::Concatenated, 12, 11);
        let want = problem.solve(&cpu, &double(), LAST, &square).unwrap();
        let [fused, composed] = [
            errors(&problem.solve(&gpu, &mixed(format), LAST, &square).unwrap(), &want),
            errors(&plain(&problem).solve(&gpu, &mixed(format), LAST, &square).unwrap(), &want),
        ];
        let text = format!("{format}: fused {}, composed {}", show(&fused), show(&composed));
        println!("{text}");
        assert!(fused.iter().zip(composed).all(|(a, b)| *a <= 2.0 * b), "{text}");
        let budget = mixed(format).storage(Storage::Budget { bytes: 4 * 17 * 5 * 4 });
        let stored = plain(&problem).solve(&gpu, &mixed(format), LAST, &square).unwrap();
        let found = plain(&problem).solve(&gpu, &budget, LAST, &square).unwrap();
        assert_eq!((stored.grad_y0, stored.grad_params), (found.grad_y0, found.grad_params), "{format}");
    }
}

/// Steps are taken back on a GPU as on the CPU: the solve checks that it came back to where it began.
#[test]
fn steps_are_taken_back_on_a_gpu() {
    let Some(gpu) = gpu() else { return };
    let cpu = Device::cpu(2).unwrap();
    let problem = plain(&perceptron((5, 24, 2, 17), TimeInput::Concatenated, 200, 11));
    let want = problem.solve(&cpu, &double().reversible(), ALL, &square).unwrap();
    for (options, most) in [(double(), 1e-8), (mixed(Precision::F16), 1.5e-3), (mixed(Precision::Bf16), 1e-2)] {
        let found = errors(&problem.solve(&gpu, &options.reversible(), ALL, &square).unwrap(), &want);
        assert!(found.iter().all(|it| *it <= most), "{}", show(&found));
    }
}

/// the scale keeps what would underflow, and changes no bit where nothing does.
#[test]
fn scales_keep_small_gradients_and_change_no_bit_on_a_gpu() {
    let Some(gpu) = gpu() else { return };
    let cpu = Device::cpu(1).unwrap();
    let problem = tanh_problem(64);
    for e in [0, 8, 16, 20, 24, 40] {
        let seed = |_: usize, y: &[f64]| Some(y.iter().map(|y| y * f64::from(-e).exp2()).collect());
        let want = problem.solve(&cpu, &double(), LAST, &seed).unwrap();
        let scaled = problem.solve(&gpu, &mixed(Precision::F16), LAST, &seed).unwrap();
        let error = errors(&scaled, &want);
        assert!(error.iter().all(|it| *it <= 2e-3), "2^-{e}: {}", show(&error));
        if e >= 24 {
            let unscaled = mixed(Precision::F16).scaling(AdjointScaling::UNSCALED);
            let error = rel_l2(&problem.solve(&gpu, &unscaled, LAST, &seed).unwrap().theta(), &want.theta());
            assert!(error >= 0.3, "2^-{e} unscaled: {error:.2e}");
        }
    }
    let at = |exponent: i32| {
        let options = mixed(Precision::F16).scaling(AdjointScaling::Fixed { exponent });
        let solution = problem.solve(&gpu, &options, LAST, &square).unwrap();
        [solution.grad_y0.clone(), solution.theta()].map(|it| it.iter().map(|x| x.to_bits()).collect::<Vec<u64>>())
    };
    let one = at(2);
    for exponent in [3, 5, 6, 7] {
        assert!(at(exponent) == one, "2^{exponent}");
    }
    let free = problem.solve(&gpu, &mixed(Precision::F16), LAST, &square).unwrap();
    assert!(free.record.n_vjps <= 70, "{} products for 64 steps", free.record.n_vjps);
}

/// Rows whose gradients are 2^40 apart: each block of rows has a scale of its own, and retries are its own.
#[test]
fn rows_of_very_different_gradients_keep_them_all_on_a_gpu() {
    let Some(gpu) = gpu() else { return };
    let cpu = Device::cpu(1).unwrap();
    let problem = perceptron((4, 32, 2, 96), TimeInput::Concatenated, 20, 5);
    let factor = |row: usize| [1.0, (-40f64).exp2(), 1e4][row / 32];
    let seed = |_: usize, y: &[f64]| Some(y.iter().enumerate().map(|(i, y)| y * factor(i / 4)).collect());
    let want = problem.solve(&cpu, &double(), LAST, &seed).unwrap();
    let got = problem.solve(&gpu, &mixed(Precision::F16), LAST, &seed).unwrap();
    for block in 0..3 {
        let rows = block * 128..(block + 1) * 128;
        let error = rel_l2(&got.grad_y0[rows.clone()], &want.grad_y0[rows]);
        assert!(error <= 3e-3, "block {block}: {error:.2e}");
    }
    let error = rel_l2(&got.theta(), &want.theta());
    assert!(error <= 3e-3, "{error:.2e}");
    // A first scale far too large is taken back, by retries of single products.
    let config = halfmode_ode::ScaleConfig { first_exponent: Some(20), ..Default::default() };
    let retried = mixed(Precision::F16).scaling(AdjointScaling::Dynamic(config));
    let got = problem.solve(&gpu, &retried, LAST, &seed).unwrap();
    assert!(got.record.n_retries > 0 && rel_l2(&got.theta(), &want.theta()) <= 3e-3, "{:?}", got.record);
}

#[test]
fn what_is_not_finite_is_a_typed_error_on_a_gpu() {
    let Some(gpu) = gpu() else { return };
    let mut problem = perceptron((4, 32, 1, 40), TimeInput::Concatenated, 10, 5);
    problem.params[3].1[2] = f64::NAN;
    let error = problem.solve(&gpu, &mixed(Precision::F16), LAST, &square).unwrap_err().to_string();
    assert!(error.contains("not finite in step 0 of 10"), "{error}");
    problem.params[3].1[2] = 0.0;
    let infinite = |_: usize, y: &[f64]| Some(vec![f64::INFINITY; y.len()]);
    let error = problem.solve(&gpu, &mixed(Precision::F16), LAST, &infinite).unwrap_err().to_string();
    assert!(error.contains("step 9 of 10"), "{error}");
    // A cotangent of zero has a gradient of zero.
    let zero = |_: usize, y: &[f64]| Some(vec![0.0; y.len()]);
    let got = problem.solve(&gpu, &mixed(Precision::F16), LAST, &zero).unwrap();
    assert!(got.theta().iter().chain(&got.grad_y0).all(|it| *it == 0.0));
    let again = problem.solve(&gpu, &mixed(Precision::F16), LAST, &square).unwrap();
    let twice = problem.solve(&gpu, &mixed(Precision::F16), LAST, &square).unwrap();
    assert_eq!((again.theta(), again.grad_y0), (twice.theta(), twice.grad_y0));
}

/// Points in the plane, their log-densities, and the parameters of a planar field.
struct Flow {
    field: PlanarField,
    params: Vec<(Vec<usize>, Vec<f64>)>,
    z: (Vec<usize>, Vec<f64>),
    times: Vec<f64>,
}

impl Flow {
    fn new((dim, hidden, n_flows, batch): Sizes, n_steps: usize, seed: u64) -> Self {
        let (mut rng, field) = (Rng::new(seed), PlanarField { dim, hidden, n_flows });
        let params = field.param_specs().into_iter().map(|spec| {
            let (shape, n) = (spec.file_shape.clone(), spec.n_scalars());
            let fan_in = shape.get(1).copied().unwrap_or(4) as f64;
            (shape, rng.normals(n).iter().map(|it| 1.5 * it / fan_in.sqrt()).collect())
        });
        let params = params.collect();
        Flow { field, params, z: (vec![batch, dim], rng.normals(batch * dim)), times: linspace(1.0, 0.0, n_steps) }
    }

    /// Outputs, and gradients by points, log-densities and parameters in a row, of a mean over the batch.
    fn solve(&self, device: &Device, options: &OdeOptions, all: bool) -> (Vec<Vec<f64>>, [Vec<f64>; 3]) {
        let (policy, wide) = (&options.precision.velocity, options.precision.accumulate);
        let mut tape = Tape::new(Cx::new(device, policy));
        let leaf = |tape: &mut Tape, (shape, values): &(Vec<usize>, Vec<f64>), precision| {
            tape.leaf(Tensor::from_slice(device, values, shape.clone(), precision, Purpose::Param).unwrap())
        };
        let batch = self.z.0[0];
        let state = [leaf(&mut tape, &self.z, wide), leaf(&mut tape, &(vec![batch, 1], vec![0.25; batch]), wide)];
        let params: Vec<Var> = self.params.iter().map(|it| leaf(&mut tape, it, policy.weights)).collect();
        let (field, times) = (Arc::new(self.field), Times::Fixed(&self.times));
        let outputs = match all {
            true => odeint_tuple(&mut tape, &field, &state, times, &params, options).unwrap().concat(),
            false => odeint_tuple_last(&mut tape, &field, &state, times, &params, options).unwrap(),
        };
        let values: Vec<Vec<f64>> = outputs.iter().map(|it| it.value().to_vec().unwrap()).collect();
        let mut rng = Rng::new(77);
        let seeds = outputs.into_iter().map(|output| {
            let shape = output.value().shape().clone();
            let values: Vec<f64> = rng.normals(shape.numel()).iter().map(|it| it / batch as f64).collect();
            (output, Tensor::from_slice(device, &values, shape, wide, Purpose::Activation).unwrap())
        });
        let seeds = seeds.collect();
        drop((state, params));
        let mut grads = [Vec::new(), Vec::new(), Vec::new()];
        tape.backward_from(seeds, &mut |LeafId(idx), grad| {
            grads[idx.min(2)].extend(grad.to_vec::<f64>()?);
            Ok(())
        })
        .unwrap();
        (values, grads)
    }
}

#[test]
fn planar_flows_of_all_sizes_on_a_gpu() {
    let Some(gpu) = gpu() else { return };
    let cpu = Device::cpu(2).unwrap();
    let full = || OdeOptions::new(OdePrecision::full());
    let sizes = [(2, 32, 128, 100), (2, 5, 1, 1), (1, 8, 33, 17), (3, 16, 31, 64), (2, 7, 257, 15), (5, 4, 64, 33)];
    for (idx, sizes) in sizes.into_iter().enumerate() {
        for method in [Method::Euler, Method::Midpoint, Method::Rk4, Method::Rk4ThreeEighths] {
            let flow = Flow::new(sizes, 18, 31 + idx as u64);
            let (want, want_grads) = flow.solve(&cpu, &double().method(method), idx % 2 == 1);
            for options in [full(), mixed(Precision::F16), mixed(Precision::Bf16)] {
                let options = options.method(method);
                let u = Format::from(options.precision.velocity_storage()).unit_roundoff();
                let errors = [&gpu, &cpu].map(|device| {
                    let (got, grads) = flow.solve(device, &options, idx % 2 == 1);
                    let of_values = got.iter().zip(&want).map(|(a, b)| rel_l2(a, b));
                    let of_grads = grads.iter().zip(&want_grads).map(|(a, b)| rel_l2(a, b));
                    of_values.chain(of_grads).collect::<Vec<f64>>()
                });
                let [on_gpu, on_cpu] = &errors;
                let text = format!("{sizes:?} {method:?}: {}, on the CPU {}", show(on_gpu), show(on_cpu));
                // In f32 sums over hundreds of terms are rounded in another order.
                let beyond = if options.precision.velocity_storage().is_half() { u } else { 32.0 * u };
                assert!(on_gpu.iter().zip(on_cpu).all(|(got, cpu)| *got <= 2.0 * cpu + beyond), "{text}");
            }
        }
    }
}
