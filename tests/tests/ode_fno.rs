//! A neural operator as the right-hand side of an ordinary differential equation.
#![allow(clippy::unwrap_used, reason = "a test")]

use halfmode_autograd::{Cx, Tape};
use halfmode_nn::{Module, Params};
use halfmode_ode::{Autonomous, OdeOptions, OdePrecision, Times, VectorField, odeint_last};
use halfmode_operators::{Fno, FnoConfig};
use halfmode_precision::Precision;
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Rng, rel_l2};
use std::sync::Arc;

const SHAPE: [usize; 3] = [2, 2, 16];
const TIMES: [f64; 5] = [0.0, 0.125, 0.25, 0.375, 0.5];

fn fno() -> Fno {
    let mut config = FnoConfig::new(&[6], 4);
    (config.in_channels, config.out_channels, config.n_layers) = (2, 2, 2);
    Fno::new(config).unwrap()
}

/// What a solve gives: the last state, and the gradients of its sum of products with `cotangent`.
struct Solution {
    y: Vec<f64>,
    grads: Vec<Vec<f64>>,
}

/// A model with values for every parameter, and an initial state.
struct Problem {
    field: Arc<Autonomous<Fno>>,
    y0: Vec<f64>,
    params: Vec<Vec<f64>>,
}

impl Problem {
    fn new() -> Self {
        let (field, mut rng) = (Arc::new(Autonomous(fno())), Rng::new(1));
        let policy = OdePrecision::double().velocity;
        let device = Device::cpu(1).unwrap();
        let params = Params::new(&device, field.param_specs(), &policy, 3).unwrap();
        let params = params.list.iter().map(|it| it.value.to_vec().unwrap()).collect();
        Problem { field, y0: rng.normals(SHAPE.iter().product()), params }
    }

    fn params(&self, device: &Device, precision: &OdePrecision) -> Params {
        let mut params = Params::new(device, self.field.param_specs(), &precision.velocity, 0).unwrap();
        for (param, values) in params.list.iter_mut().zip(&self.params) {
            param.set_file_values(&param.spec.to_file(values)).unwrap();
        }
        params
    }

    fn solve(&self, precision: OdePrecision, cotangent: Option<&[f64]>) -> Solution {
        let device = Device::cpu(2).unwrap();
        let (options, params) = (OdeOptions::new(precision.clone()), self.params(&device, &precision));
        let mut tape = Tape::new(Cx::new(&device, &precision.velocity));
        let tensor =
            |values: &[f64]| Tensor::from_slice(&device, values, SHAPE, precision.accumulate, Purpose::Activation);
        let weights = params.leaves(&mut tape);
        let y0 = tape.leaf(tensor(&self.y0).unwrap());
        let y = odeint_last(&mut tape, &self.field, &y0, Times::Fixed(&TIMES), &weights, &options).unwrap();
        drop((weights, y0));
        let values = y.value().to_vec().unwrap();
        let mut grads = vec![Vec::new(); self.params.len() + 1];
        if let Some(cotangent) = cotangent {
            let seed = tensor(cotangent).unwrap();
            tape.backward_from(vec![(y, seed)], &mut |id, grad| {
                grads[id.0] = grad.to_vec()?;
                Ok(())
            })
            .unwrap();
        }
        Solution { y: values, grads }
    }

    /// The right-hand side at the initial state.
    fn velocity(&self, precision: &OdePrecision) -> Vec<f64> {
        let device = Device::cpu(2).unwrap();
        let params = self.params(&device, precision);
        let mut tape = Tape::new(Cx::inference(&device, &precision.velocity));
        let weights = params.leaves(&mut tape);
        let storage = precision.velocity_storage();
        let y0 = Tensor::from_slice(&device, &self.y0, SHAPE, storage, Purpose::Activation).unwrap();
        let y0 = tape.constant(y0);
        self.field.0.forward(&mut tape, &weights, &[&y0]).unwrap().value().to_vec().unwrap()
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Parameters and state moved together in a random direction, by central differences in double precision.
#[test]
fn gradients_are_those_of_differences() {
    let problem = Problem::new();
    let mut rng = Rng::new(2);
    let cotangent = rng.normals(problem.y0.len());
    let grads = problem.solve(OdePrecision::double(), Some(&cotangent)).grads;
    // Parameters are the first leaves, the state is the last.
    for (which, grad) in grads.iter().enumerate() {
        let is_state = which == problem.params.len();
        let len = if is_state { problem.y0.len() } else { problem.params[which].len() };
        let direction = rng.normals(len);
        let h = 1e-5;
        let moved = |by: f64| {
            let mut moved = Problem { params: problem.params.clone(), y0: problem.y0.clone(), ..Problem::new() };
            let values = if is_state { &mut moved.y0 } else { &mut moved.params[which] };
            values.iter_mut().zip(&direction).for_each(|(value, d)| *value += by * d);
            dot(&moved.solve(OdePrecision::double(), None).y, &cotangent)
        };
        let (got, want) = (dot(grad, &direction), (moved(h) - moved(-h)) / (2.0 * h));
        let size = grad.iter().map(|it| it * it).sum::<f64>().sqrt() * (len as f64).sqrt();
        assert!((got - want).abs() <= 1e-7 * size.max(1e-3), "input {which}: {got} for {want}");
    }
}

/// A solve in half errs as its field does: over half a unit of time by no more than three times what the field's own
/// evaluation is off, relative to what changes. The state is summed in f32 and adds nothing to that.
#[test]
fn a_solve_in_half_errs_as_its_field_does() {
    let problem = Problem::new();
    let change = |y: &[f64]| -> Vec<f64> { y.iter().zip(&problem.y0).map(|(y, y0)| y - y0).collect() };
    let exact = change(&problem.solve(OdePrecision::double(), None).y);
    let velocity = problem.velocity(&OdePrecision::double());
    for format in [Precision::F16, Precision::Bf16] {
        let mixed = OdePrecision::mixed(format);
        let of_field = rel_l2(&problem.velocity(&mixed), &velocity);
        let of_solve = rel_l2(&change(&problem.solve(mixed, None).y), &exact);
        assert!(of_field > 0.0 && of_solve <= 3.0 * of_field, "{format}: {of_solve:.2e}, the field {of_field:.2e}");
        println!("{format}: the field is off by {of_field:.1e}, the solve by {of_solve:.1e}");
    }
}
