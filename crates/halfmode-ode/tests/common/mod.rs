//! A problem, solved and differentiated.
#![allow(dead_code, reason = "not every test uses all of it")]

use halfmode_autograd::{Cx, LeafId, Result, Tape, Var};
use halfmode_nn::{ChannelBias, Linear, Tanh};
use halfmode_ode::{MlpField, OdeOptions, OdePrecision, Points, SolveRecord, Storage, TimeInput, Times, VectorField};
use halfmode_ode::{TimeChannel, odeint, odeint_last};
use halfmode_precision::Precision;
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::Golden;
use std::sync::Arc;

/// A field, its parameters, where it starts and when.
#[derive(Clone)]
pub(crate) struct Problem<F> {
    pub(crate) field: Arc<F>,
    pub(crate) params: Vec<(Vec<usize>, Vec<f64>)>,
    pub(crate) y0: (Vec<usize>, Vec<f64>),
    pub(crate) times: Vec<f64>,
}

/// What a solve gave.
#[derive(Clone, Debug)]
pub(crate) struct Solution {
    /// At the points asked for.
    pub(crate) outputs: Vec<Vec<f64>>,
    /// By the state, the times (empty if not asked for) and the parameters; empty if there is none.
    pub(crate) grad_y0: Vec<f64>,
    pub(crate) grad_t: Vec<f64>,
    pub(crate) grad_params: Vec<Vec<f64>>,
    pub(crate) record: SolveRecord,
}

impl Solution {
    pub(crate) fn last(&self) -> &[f64] {
        &self.outputs[self.outputs.len() - 1]
    }

    /// All parameters' gradients in a row.
    pub(crate) fn theta(&self) -> Vec<f64> {
        self.grad_params.concat()
    }
}

/// The cotangent of each output, from its number and its value; `None` is zero.
pub(crate) type Seed<'a> = &'a dyn Fn(usize, &[f64]) -> Option<Vec<f64>>;

/// What is asked of a solve.
#[derive(Clone, Copy)]
pub(crate) struct Ask {
    pub(crate) points: Points,
    pub(crate) time_grad: bool,
}

pub(crate) const LAST: Ask = Ask { points: Points::Last, time_grad: false };
pub(crate) const ALL: Ask = Ask { points: Points::All, time_grad: false };
pub(crate) const ALL_AND_TIME: Ask = Ask { points: Points::All, time_grad: true };

impl<F: VectorField + 'static> Problem<F> {
    /// The last state, with nothing kept for a gradient.
    pub(crate) fn forward(&self, device: &Device, options: &OdeOptions) -> Vec<f64> {
        let policy = &options.precision.velocity;
        let mut tape = Tape::new(Cx::inference(device, policy));
        let tensor = |tape: &Tape, (shape, values): &(Vec<usize>, Vec<f64>), precision| {
            tape.constant(Tensor::from_slice(device, values, shape.clone(), precision, Purpose::Param).unwrap())
        };
        let y0 = tensor(&tape, &self.y0, options.precision.accumulate);
        let params: Vec<Var> = self.params.iter().map(|it| tensor(&tape, it, policy.weights)).collect();
        let last = odeint_last(&mut tape, &self.field, &y0, Times::Fixed(&self.times), &params, options).unwrap();
        last.value().to_vec().unwrap()
    }

    /// Solves, and differentiates with the cotangents that `seed` makes of each output: `None` is zero.
    pub(crate) fn solve(&self, device: &Device, options: &OdeOptions, ask: Ask, seed: Seed<'_>) -> Result<Solution> {
        let policy = &options.precision.velocity;
        let accumulate = options.precision.accumulate;
        let mut options = options.clone();
        options.record = Default::default();
        let mut tape = Tape::new(Cx::new(device, policy));
        let leaf = |tape: &mut Tape, (shape, values): &(Vec<usize>, Vec<f64>), precision| {
            tape.leaf(Tensor::from_slice(device, values, shape.clone(), precision, Purpose::Param).unwrap())
        };
        let y0 = leaf(&mut tape, &self.y0, accumulate);
        let t = (vec![self.times.len()], self.times.clone());
        let t = ask.time_grad.then(|| leaf(&mut tape, &t, Precision::F64));
        let params: Vec<Var> = self.params.iter().map(|it| leaf(&mut tape, it, policy.weights)).collect();
        let times = t.as_ref().map_or(Times::Fixed(&self.times), Times::Var);
        let outputs = match ask.points {
            Points::All => odeint(&mut tape, &self.field, &y0, times, &params, &options)?,
            Points::Last => vec![odeint_last(&mut tape, &self.field, &y0, times, &params, &options)?],
        };
        let values: Vec<Vec<f64>> = outputs.iter().map(|it| it.value().to_vec::<f64>().unwrap()).collect();
        let mut seeds = Vec::new();
        for (idx, (output, value)) in outputs.into_iter().zip(&values).enumerate() {
            let Some(cotangent) = seed(idx, value) else { continue };
            let shape = output.value().shape().clone();
            let it = Tensor::from_slice(device, &cotangent, shape, accumulate, Purpose::Activation).unwrap();
            seeds.push((output, it));
        }
        drop((y0, t, params));
        let mut grads = vec![Vec::new(); 1 + usize::from(ask.time_grad) + self.params.len()];
        tape.backward_from(seeds, &mut |LeafId(idx), grad| {
            grads[idx] = grad.to_vec::<f64>()?;
            Ok(())
        })?;
        let mut grads = grads.into_iter();
        let grad_y0 = grads.next().unwrap();
        let grad_t = if ask.time_grad { grads.next().unwrap() } else { Vec::new() };
        Ok(Solution { outputs: values, grad_y0, grad_t, grad_params: grads.collect(), record: options.record.get() })
    }
}

/// `y` as the cotangent of `|y|^2 / 2`.
pub(crate) fn square(_: usize, y: &[f64]) -> Option<Vec<f64>> {
    Some(y.to_vec())
}

/// The same at the last of `n` points only.
pub(crate) fn square_at_last(n: usize) -> impl Fn(usize, &[f64]) -> Option<Vec<f64>> {
    move |idx, y| (idx + 1 == n).then(|| y.to_vec())
}

pub(crate) fn linspace(from: f64, to: f64, n_steps: usize) -> Vec<f64> {
    (0..=n_steps).map(|i| from + (to - from) * i as f64 / n_steps as f64).collect()
}

/// `W_2 tanh(W_1 (y, t) + b)`, two channels and 32 hidden ones, from t = 0 to 1 in `n_steps` steps.
pub(crate) fn tanh_problem(n_steps: usize) -> Problem<MlpField> {
    let weights = Golden::load("ode_tanh_field");
    let get = |name: &str| {
        let (shape, values) = weights.get(name);
        (shape.to_vec(), values.to_vec())
    };
    Problem {
        field: Arc::new(MlpField { channels: 2, hidden: vec![32], time: TimeInput::Concatenated }),
        params: vec![get("param/l1.weight"), get("param/l1.bias"), get("param/l2.weight"), (vec![2], vec![0.0, 0.0])],
        y0: (vec![1, 2], vec![1.0, -0.5]),
        times: linspace(0.0, 1.0, n_steps),
    }
}

/// A solve of `make()` on one thread, inside that thread: no step waits for a worker to wake.
pub(crate) fn on_one_thread<T: Send>(work: impl FnOnce(&Device) -> T + Send) -> T {
    let device = Device::cpu(1).unwrap();
    device.run(|| work(&device)).unwrap()
}

/// Slope of log2(error) against log2(n) by least squares.
pub(crate) fn slope(points: &[(usize, f64)]) -> f64 {
    let xy: Vec<(f64, f64)> = points.iter().map(|(n, error)| ((*n as f64).log2(), error.log2())).collect();
    let n = xy.len() as f64;
    let (mx, my) = (xy.iter().map(|it| it.0).sum::<f64>() / n, xy.iter().map(|it| it.1).sum::<f64>() / n);
    let (up, down) = xy.iter().fold((0.0, 0.0), |(u, d), (x, y)| (u + (x - mx) * (y - my), d + (x - mx).powi(2)));
    up / down
}

pub(crate) fn double() -> OdeOptions {
    OdeOptions::new(OdePrecision::double())
}

/// Steps that are taken back, on a lattice that finite differences do not see: states and velocities up to 32.
pub(crate) fn reversible(options: OdeOptions) -> OdeOptions {
    options.reversible().storage(Storage::Reversible { lattice_bits: 47 })
}

pub(crate) fn mixed(format: Precision) -> OdeOptions {
    OdeOptions::new(OdePrecision::mixed(format))
}

/// A perceptron of small operations, which stores whatever lies between its layers.
pub(crate) struct Layers(pub(crate) MlpField);

impl VectorField for Layers {
    fn velocity(&self, tape: &mut Tape, t: &Var, y: &Var, params: &[Var]) -> Result<Var> {
        let mut x = match self.0.time {
            TimeInput::None => y.clone(),
            TimeInput::Concatenated => tape.apply(TimeChannel, &[y, t])?,
        };
        for (idx, layer) in params.chunks_exact(2).enumerate() {
            if idx > 0 {
                x = tape.apply(Tanh, &[&x])?;
            }
            x = tape.apply(Linear, &[&x, &layer[0]])?;
            x = tape.apply(ChannelBias, &[&x, &layer[1]])?;
        }
        Ok(x)
    }
}

impl Problem<MlpField> {
    /// The same, layer by layer.
    pub(crate) fn layer_by_layer(&self) -> Problem<Layers> {
        let Problem { field, params, y0, times } = self.clone();
        Problem { field: Arc::new(Layers((*field).clone())), params, y0, times }
    }
}
