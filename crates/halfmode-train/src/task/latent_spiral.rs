//! A latent differential equation behind noisy curves.

use crate::SquaredError;
use crate::job::JobError;
use crate::pictures::{Cloud, clouds_png};
use crate::task::{LatentOdeModel, SolverConfig, SpiralData, Task, Trained};
use halfmode_autograd::{Result, Tape, Var};
use halfmode_data::{Spiral, Spirals};
use halfmode_nn::{ChannelBias, Init, Linear, ParamSpec, Tanh};
use halfmode_ode::{MlpField, OdeOptions, OdePrecision, TimeInput, Times, VectorField, odeint};
use halfmode_precision::{Precision, PrecisionPolicy};
use halfmode_tensor::{Device, Purpose, Tensor};
use std::sync::Arc;

/// A perceptron reads all observations of a curve into a latent state, a differential equation moves that state, and
/// another perceptron says where the curve is. It is fitted to noisy observations between times 0 and 1, and tested
/// against the curve itself there and beyond, between 1 and 2.
#[derive(Debug)]
pub struct LatentSpiralTask {
    field: Arc<MlpField>,
    hidden: usize,
    spirals: Spirals,
    data: SpiralData,
    solver: SolverConfig,
    seed: u64,
}

/// Held-out curves have numbers from here on.
const FIRST_TEST: u64 = 1 << 62;
/// Curves that are evaluated at a time.
const EVAL_BATCH: usize = 256;
/// Curves in the picture.
const N_DRAWN: usize = 4;
/// Parameters of a perceptron with one hidden layer.
const N_MLP: usize = 4;

/// The parameters of `l_2(tanh(l_1(x)))`, with torch's default of linear layers.
fn mlp_specs(name: &str, widths: [usize; 3]) -> Vec<ParamSpec> {
    let layers = widths.windows(2).enumerate().flat_map(|(idx, pair)| {
        let init = Init::Uniform { bound: 1.0 / (pair[0] as f64).sqrt() };
        let weight = ParamSpec::real(format!("{name}.{}.weight", 2 * idx), &[pair[1], pair[0]], init);
        [weight, ParamSpec::real(format!("{name}.{}.bias", 2 * idx), &[pair[1]], init)]
    });
    layers.collect()
}

fn mlp(tape: &mut Tape, x: &Var, params: &[Var]) -> Result<Var> {
    let [w1, b1, w2, b2] = params else {
        return Err(halfmode_autograd::Error::Arity { op: "latent_spiral", expected: N_MLP, found: params.len() });
    };
    let x = tape.apply(Linear, &[x, w1])?;
    let x = tape.apply(ChannelBias, &[&x, b1])?;
    let x = tape.apply(Tanh, &[&x])?;
    let x = tape.apply(Linear, &[&x, w2])?;
    tape.apply(ChannelBias, &[&x, b2])
}

impl LatentSpiralTask {
    /// The task of a configuration.
    #[must_use]
    pub fn new(model: &LatentOdeModel, data: &SpiralData, solver: &SolverConfig, seed: u64) -> Self {
        let field = MlpField { channels: model.latent, hidden: vec![model.hidden], time: TimeInput::None };
        let spirals = Spirals { n_points: data.n_points, noise: data.noise };
        let (field, hidden, data, solver) = (Arc::new(field), model.hidden, data.clone(), solver.clone());
        LatentSpiralTask { field, hidden, spirals, data, solver, seed }
    }

    /// Steps between two observations.
    fn substeps(&self) -> usize {
        self.solver.steps.div_ceil(self.data.n_points - 1).max(1)
    }

    fn curves(&self, numbers: impl Iterator<Item = u64>) -> Vec<Spiral> {
        numbers.map(|number| self.spirals.curve(self.seed, number)).collect()
    }

    /// Observations `[curves, 2 n_points]`, and where each curve is at the first `n` times, `[curves, 2]` each; either
    /// what was seen there or the curve itself.
    fn tensors(
        device: &Device,
        curves: &[Spiral],
        targets: &dyn Fn(&Spiral) -> Vec<[f64; 2]>,
    ) -> halfmode_tensor::Result<Vec<Tensor>> {
        let tensor = |values: Vec<f64>| {
            let width = values.len() / curves.len().max(1);
            Tensor::from_slice(device, &values, [curves.len(), width], Precision::F32, Purpose::Data)
        };
        let seen = curves.iter().flat_map(|curve| curve.observed.as_flattened().to_vec()).collect();
        let targets: Vec<Vec<[f64; 2]>> = curves.iter().map(targets).collect();
        let n = targets.first().map_or(0, Vec::len);
        let at = |i: usize| targets.iter().flat_map(|points| points[i]).collect();
        std::iter::once(tensor(seen)).chain((0..n).map(|i| tensor(at(i)))).collect()
    }

    fn options(&self, policy: &PrecisionPolicy) -> OdeOptions {
        OdeOptions::new(OdePrecision::new(policy.clone())).method(self.solver.method.method())
    }

    /// Where the model has the curves at the first `n_points` times.
    fn predict(&self, tape: &mut Tape, params: &[Var], seen: Tensor, n_points: usize) -> Result<Vec<Var>> {
        let n_field = params.len() - 2 * N_MLP;
        let (encoder, rest) = params.split_at(N_MLP);
        let (field, decoder) = rest.split_at(n_field);
        let seen = tape.constant(seen);
        let z0 = mlp(tape, &seen, encoder)?;
        let (substeps, unit) = (self.substeps(), 1.0 / (self.data.n_points - 1) as f64);
        let n_steps = substeps * (n_points - 1);
        let times: Vec<f64> = (0..=n_steps).map(|i| i as f64 * unit / substeps as f64).collect();
        let options = self.options(&tape.cx().policy);
        let states = odeint(tape, &self.field, &z0, Times::Fixed(&times), field, &options)?;
        states.iter().step_by(substeps).map(|z| mlp(tape, z, decoder)).collect()
    }

    /// Predictions of curves from time 0 to 2, points of each curve in a row.
    fn fitted(&self, model: &Trained<'_>, curves: &[Spiral]) -> std::result::Result<Vec<Vec<[f64; 2]>>, JobError> {
        let (mut tape, params) = model.tape();
        let seen = Self::tensors(model.device, curves, &|_| Vec::new())?.remove(0);
        let points = self.predict(&mut tape, &params, seen, 2 * self.data.n_points - 1)?;
        if !model.device.launches() {
            return Ok(vec![Vec::new(); curves.len()]);
        }
        let mut out = vec![Vec::with_capacity(points.len()); curves.len()];
        for point in points {
            let values = point.value().to_vec::<f64>()?;
            out.iter_mut().zip(values.chunks_exact(2)).for_each(|(curve, at)| curve.push([at[0], at[1]]));
        }
        Ok(out)
    }
}

impl Task for LatentSpiralTask {
    fn describe(&self) -> String {
        let (latent, hidden, substeps) = (self.field.channels, self.hidden, self.substeps());
        let method = self.solver.method.method().tableau().name;
        format!(
            "latent differential equation, {latent} channels, width {hidden}, {substeps} x {method} per observation"
        )
    }

    fn describe_data(&self) -> String {
        let SpiralData { n_train, n_test, n_points, noise } = self.data;
        format!("spirals, {n_points} points each with noise {noise}, {n_train} to train on, {n_test} held out")
    }

    fn param_specs(&self) -> Vec<ParamSpec> {
        let (latent, hidden) = (self.field.channels, self.hidden);
        let mut specs = mlp_specs("encoder", [2 * self.data.n_points, hidden, latent]);
        let of_field = self.field.param_specs().into_iter();
        specs.extend(of_field.map(|spec| ParamSpec { name: format!("field.{}", spec.name), ..spec }));
        specs.extend(mlp_specs("decoder", [latent, hidden, 2]));
        specs
    }

    fn n_train(&self) -> usize {
        self.data.n_train
    }

    fn batch(&self, device: &Device, _: u64, indices: &[usize]) -> std::result::Result<Vec<Tensor>, JobError> {
        let curves = self.curves(indices.iter().map(|&idx| idx as u64));
        Ok(Self::tensors(device, &curves, &|curve| curve.observed.clone())?)
    }

    fn loss(&self, tape: &mut Tape, params: &[Var], mut batch: Vec<Tensor>) -> Result<Var> {
        let targets: Vec<Var> = batch.split_off(1).into_iter().map(|it| tape.constant(it)).collect();
        let seen = batch.pop().ok_or(halfmode_autograd::Error::Arity { op: "latent_spiral", expected: 2, found: 0 })?;
        let points = self.predict(tape, params, seen, targets.len())?;
        tape.apply(SquaredError, &points.iter().chain(&targets).collect::<Vec<_>>())
    }

    fn measures(&self) -> &'static [&'static str] {
        &["distance", "distance beyond the observations"]
    }

    fn evaluate(&self, model: &Trained<'_>) -> std::result::Result<Vec<f64>, JobError> {
        let (n, n_test, mut squares) = (self.data.n_points, self.data.n_test, [0.0; 2]);
        for first in (0..n_test).step_by(EVAL_BATCH) {
            let numbers = first as u64..n_test.min(first + EVAL_BATCH) as u64;
            let curves = self.curves(numbers.map(|idx| FIRST_TEST + idx));
            for (fitted, curve) in self.fitted(model, &curves)?.iter().zip(&curves) {
                for (i, (fitted, exact)) in fitted.iter().zip(&curve.exact).enumerate() {
                    squares[usize::from(i >= n)] += (fitted[0] - exact[0]).powi(2) + (fitted[1] - exact[1]).powi(2);
                }
            }
            if !model.device.launches() {
                break;
            }
        }
        let points = [n, n - 1].map(|it| (it * n_test.max(1)) as f64);
        Ok([0, 1].map(|part| (squares[part] / points[part]).sqrt()).to_vec())
    }

    fn pictures(&self, model: &Trained<'_>) -> std::result::Result<Vec<(String, Vec<u8>)>, JobError> {
        let curves = self.curves((0..N_DRAWN as u64).map(|idx| FIRST_TEST + idx));
        let fitted: Vec<Vec<Vec<[f64; 2]>>> = self.fitted(model, &curves)?.into_iter().map(|it| vec![it]).collect();
        let panels: Vec<Cloud<'_>> = curves
            .iter()
            .zip(&fitted)
            .map(|(curve, paths)| Cloud {
                label: "line: fitted, to time 2",
                points: &curve.exact[self.data.n_points..],
                marks: &curve.observed,
                paths,
            })
            .collect();
        let png = clouds_png(&panels, (-4.5, 4.5))
            .map_err(|err| JobError::Config { key: "plots".to_owned(), why: err.to_string() })?;
        Ok(vec![("1-observed-points-and-fitted-curves".to_owned(), png)])
    }

    fn step_flops(&self, batch: usize) -> f64 {
        let (latent, hidden, n) = (self.field.channels, self.hidden, self.data.n_points);
        let stages = ((n - 1) * self.substeps() * self.solver.method.method().tableau().b.len()) as f64;
        // Forward, again, and twice for the way back; perceptrons outside of the solve are not recomputed.
        let field = stages * 4.0 * 4.0 * (latent * hidden) as f64;
        let outside = 3.0 * 2.0 * (hidden * (2 * n + latent) + n * hidden * (latent + 2)) as f64;
        batch as f64 * (field + outside)
    }
}
