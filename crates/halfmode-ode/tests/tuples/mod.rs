//! A problem whose state is several tensors, solved and differentiated.
#![allow(dead_code, reason = "not every test uses all of it")]

use halfmode_autograd::{Cx, LeafId, Result, Tape, Var};
use halfmode_ode::{OdeOptions, Times, TupleField, odeint_tuple};
use halfmode_precision::Precision;
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::rel_l2;
use std::sync::Arc;

/// Shape and values.
pub(crate) type Array = (Vec<usize>, Vec<f64>);

/// What a solve of a tuple gave: outputs by point and leaf, then gradients by leaf, time and parameter.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Solution {
    pub(crate) outputs: Vec<Vec<Vec<f64>>>,
    pub(crate) grads: Vec<Vec<f64>>,
}

pub(crate) fn tensor(device: &Device, (shape, values): &Array, precision: Precision) -> Tensor {
    Tensor::from_slice(device, values, shape.clone(), precision, Purpose::Param).unwrap()
}

/// Leaves, times and parameters of a problem, in the order of its gradients.
#[derive(Clone)]
pub(crate) struct Problem {
    pub(crate) leaves: Vec<Array>,
    pub(crate) times: Vec<f64>,
    pub(crate) params: Vec<Array>,
}

impl Problem {
    /// All inputs of the solve in a row.
    pub(crate) fn input(&mut self, idx: usize) -> &mut Vec<f64> {
        let n = self.leaves.len();
        match idx {
            _ if idx < n => &mut self.leaves[idx].1,
            _ if idx == n => &mut self.times,
            _ => &mut self.params[idx - n - 1].1,
        }
    }

    pub(crate) fn solve<F: TupleField + 'static>(
        &self,
        device: &Device,
        field: &Arc<F>,
        options: &OdeOptions,
        cotangents: &[f64],
    ) -> Result<Solution> {
        let policy = &options.precision.velocity;
        let accumulate = options.precision.accumulate;
        let mut tape = Tape::new(Cx::new(device, policy));
        let y0: Vec<Var> = self.leaves.iter().map(|it| tape.leaf(tensor(device, it, accumulate))).collect();
        let t = tape.leaf(tensor(device, &(vec![self.times.len()], self.times.clone()), Precision::F64));
        let params: Vec<Var> = self.params.iter().map(|it| tape.leaf(tensor(device, it, policy.weights))).collect();
        let states = odeint_tuple(&mut tape, field, &y0, Times::Var(&t), &params, options)?;
        let n_inputs = y0.len() + 1 + params.len();
        drop((y0, t, params));
        let outputs: Vec<Vec<Vec<f64>>> =
            states.iter().map(|state| state.iter().map(|it| it.value().to_vec().unwrap()).collect()).collect();
        let mut rest = cotangents;
        let mut seeds = Vec::new();
        for output in states.into_iter().flatten() {
            let (own, left) = rest.split_at(output.value().numel());
            rest = left;
            if own.iter().any(|it| *it != 0.0) {
                let seed = tensor(device, &(output.value().shape().to_vec(), own.to_vec()), accumulate);
                seeds.push((output, seed));
            }
        }
        let mut grads = vec![Vec::new(); n_inputs];
        tape.backward_from(seeds, &mut |LeafId(idx), grad| {
            grads[idx] = grad.to_vec::<f64>()?;
            Ok(())
        })?;
        Ok(Solution { outputs, grads })
    }

    pub(crate) fn n_outputs(&self) -> usize {
        self.times.len() * self.leaves.iter().map(|it| it.1.len()).sum::<usize>()
    }

    /// Every entry of every gradient against a central difference of step `1e-6 max(1, |x|)`: the relative error of
    /// each gradient is at most `allowed`. Returns the gradients.
    pub(crate) fn check_differences<F: TupleField + 'static>(
        &self,
        device: &Device,
        field: &Arc<F>,
        (options, allowed): (&OdeOptions, f64),
        cotangents: &[f64],
    ) -> Vec<Vec<f64>> {
        let at = self.solve(device, field, options, cotangents).unwrap();
        let loss = |problem: &Problem| -> f64 {
            let outputs = problem.solve(device, field, options, cotangents).unwrap().outputs;
            outputs.iter().flatten().flatten().zip(cotangents).map(|(y, c)| y * c).sum()
        };
        for (input, got) in at.grads.iter().enumerate() {
            let difference = |idx: usize| {
                let shifted = |sign: f64| {
                    let mut moved = self.clone();
                    let x = &mut moved.input(input)[idx];
                    let h = 1e-6 * x.abs().max(1.0);
                    *x += sign * h;
                    (loss(&moved), h)
                };
                let ((up, h), (down, _)) = (shifted(1.0), shifted(-1.0));
                (up - down) / (2.0 * h)
            };
            let want: Vec<f64> = (0..got.len()).map(difference).collect();
            let error = rel_l2(got, &want);
            assert!(error <= allowed, "input {input}: {error:.2e}");
        }
        at.grads
    }
}
