//! A continuous normalising flow of a toy density.

use crate::GaussianNll;
use crate::job::JobError;
use crate::pictures::{Cloud, Field, Panel, Scale, clouds_png, panel_png};
use crate::task::{CnfModel, DensityData, SolverConfig, Task, Trained};
use halfmode_autograd::{Tape, Var};
use halfmode_nn::ParamSpec;
use halfmode_ode::{
    AdjointScaling, OdeOptions, OdePrecision, PlanarField, ScaleConfig, Times, TupleField, odeint_tuple_last,
};
use halfmode_precision::{Precision, PrecisionPolicy};
use halfmode_tensor::{Device, Purpose, Tensor};
use std::sync::Arc;

/// A flow between a toy density at time 1 and the standard normal one at time 0, fitted by maximum likelihood. The
/// state is `(z, log p)`; the log-density is kept in the precision of sums.
#[derive(Debug)]
pub struct CnfTask {
    field: Arc<PlanarField>,
    data: DensityData,
    solver: SolverConfig,
    seed: u64,
}

/// Held-out points have numbers from here on: no training reaches them.
const FIRST_TEST: u64 = 1 << 62;
/// Points that are evaluated at a time.
const EVAL_BATCH: usize = 2048;
/// The square on which the density must integrate to one, and the points along its sides.
const MASS_SQUARE: (f64, usize) = (6.0, 121);
/// The square that pictures show, and the pixels along its sides.
const SHOWN: (f64, usize) = (4.5, 128);
/// Points in pictures, and paths.
const N_DRAWN: (usize, usize) = (4000, 60);
/// Pictures of the flow, evenly over time.
const MOMENTS: [&str; 5] = ["t = 0", "t = 1/4", "t = 1/2", "t = 3/4", "t = 1"];
/// The most pieces of a path in the picture.
const PATH_INTERVALS: usize = 256;

impl CnfTask {
    /// The task of a configuration.
    #[must_use]
    pub fn new(model: &CnfModel, data: &DensityData, solver: &SolverConfig, seed: u64) -> Self {
        let field = Arc::new(PlanarField { dim: 2, hidden: model.hidden, n_flows: model.n_flows });
        CnfTask { field, data: data.clone(), solver: solver.clone(), seed }
    }

    fn options(&self, policy: &PrecisionPolicy) -> OdeOptions {
        let options =
            OdeOptions::new(OdePrecision::new(policy.clone()).wide_leaf(1)).method(self.solver.method.method());
        match options.scaling {
            // Gradients of the coefficients are sums over a batch: the points' own adjoints leave them room.
            AdjointScaling::Dynamic(_) => {
                let target = Some(SCALED_ADJOINT);
                options.scaling(AdjointScaling::Dynamic(ScaleConfig { target, ..ScaleConfig::DEFAULT }))
            }
            _ => options,
        }
    }

    fn tensor(device: &Device, points: &[[f64; 2]]) -> Result<Tensor, JobError> {
        let values = points.as_flattened();
        Ok(Tensor::from_slice(device, values, [points.len(), 2], Precision::F32, Purpose::Data)?)
    }

    fn points(&self, numbers: impl Iterator<Item = u64>) -> Vec<[f64; 2]> {
        numbers.map(|number| self.data.density.point(self.seed, number)).collect()
    }

    /// The state at the beginning of a solve: points, and nothing gained.
    fn state(tape: &Tape, z: Tensor) -> halfmode_autograd::Result<[Var; 2]> {
        let (device, n) = (z.device().clone(), z.shape().first().copied().unwrap_or(0));
        let dtype = halfmode_precision::DType::real(Precision::F32);
        let gained = device.alloc([n, 1], dtype, Purpose::Data)?;
        Ok([tape.constant(z), tape.constant(gained)])
    }

    /// The log-density of points under the model.
    ///
    /// # Errors
    /// Those of the solve and of memory. On the planning device there are no numbers.
    pub fn log_density(&self, model: &Trained<'_>, points: &[[f64; 2]]) -> Result<Vec<f64>, JobError> {
        let (times, options) = (self.solver.times(1.0, 0.0), self.options(model.policy));
        let mut out = Vec::with_capacity(points.len());
        for points in points.chunks(EVAL_BATCH) {
            let (mut tape, params) = model.tape();
            let state = Self::state(&tape, Self::tensor(model.device, points)?)?;
            let last = odeint_tuple_last(&mut tape, &self.field, &state, Times::Fixed(&times), &params, &options)?;
            if !model.device.launches() {
                break;
            }
            let (z, gained) = (last[0].value().to_vec::<f64>()?, last[1].value().to_vec::<f64>()?);
            let log_p = z
                .chunks_exact(2)
                .zip(gained)
                .map(|(z, gained)| -0.5 * (z[0] * z[0] + z[1] * z[1]) - std::f64::consts::TAU.ln() - gained);
            out.extend(log_p);
        }
        Ok(out)
    }

    /// Where the flow brings points of the standard normal density: at the time points of these numbers, which rise,
    /// from time 0 on.
    ///
    /// # Errors
    /// Those of the solve and of memory.
    pub fn flow(&self, model: &Trained<'_>, start: &[[f64; 2]], at: &[usize]) -> Result<Vec<Vec<[f64; 2]>>, JobError> {
        let (times, options) = (self.solver.times(0.0, 1.0), self.options(model.policy));
        let (mut tape, params) = model.tape();
        let mut state = Vec::from(Self::state(&tape, Self::tensor(model.device, start)?)?);
        let (mut from, mut moments) = (0, Vec::with_capacity(at.len()));
        for &to in at {
            // States between two moments are not kept.
            if let Some(span @ [_, _, ..]) = times.get(from..=to) {
                state = odeint_tuple_last(&mut tape, &self.field, &state, Times::Fixed(span), &params, &options)?;
                from = to;
            }
            let z = state[0].value().to_vec::<f64>()?;
            moments.push(z.chunks_exact(2).map(|z| [z[0], z[1]]).collect());
        }
        Ok(moments)
    }

    /// Points of the standard normal density.
    fn normals(&self, n: usize) -> Vec<[f64; 2]> {
        let values = halfmode_data::standard_normals(self.seed, 2 * n);
        values.chunks_exact(2).map(|z| [z[0], z[1]]).collect()
    }

    /// The centres of `n × n` cells of the square of half side `half`, row by row from the top.
    fn grid((half, n): (f64, usize)) -> Vec<[f64; 2]> {
        let at = |i: usize| half * ((2 * i + 1) as f64 / n as f64 - 1.0);
        (0..n).flat_map(|row| (0..n).map(move |column| [at(column), -at(row)])).collect()
    }
}

/// The largest scaled adjoint of a point in f16.
const SCALED_ADJOINT: f64 = 8.0;

impl Task for CnfTask {
    fn describe(&self) -> String {
        let PlanarField { hidden, n_flows, .. } = *self.field;
        let SolverConfig { method, steps } = &self.solver;
        let method = method.method().tableau().name;
        format!("continuous normalising flow, {n_flows} planar flows, time network {hidden}, {steps} steps of {method}")
    }

    fn describe_data(&self) -> String {
        let name = serde_json::to_value(self.data.density).unwrap_or_default();
        let name = name.as_str().unwrap_or_default().to_owned();
        let entropy = self.data.density.entropy().map_or_else(String::new, |it| format!(" (entropy {it:.4} nats)"));
        format!("{name}{entropy}, {} fresh points per epoch, {} held out", self.data.n_train, self.data.n_test)
    }

    fn param_specs(&self) -> Vec<ParamSpec> {
        self.field.param_specs()
    }

    fn n_train(&self) -> usize {
        self.data.n_train
    }

    fn batch(&self, device: &Device, epoch: u64, indices: &[usize]) -> Result<Vec<Tensor>, JobError> {
        let first = epoch * self.data.n_train as u64;
        Ok(vec![Self::tensor(device, &self.points(indices.iter().map(|&idx| first + idx as u64)))?])
    }

    fn loss(&self, tape: &mut Tape, params: &[Var], batch: Vec<Tensor>) -> halfmode_autograd::Result<Var> {
        let missing = halfmode_autograd::Error::Arity { op: "cnf", expected: 1, found: batch.len() };
        let state = Self::state(tape, batch.into_iter().next().ok_or(missing)?)?;
        let times = self.solver.times(1.0, 0.0);
        let options = self.options(&tape.cx().policy);
        let last = odeint_tuple_last(tape, &self.field, &state, Times::Fixed(&times), params, &options)?;
        tape.apply(GaussianNll, &last.iter().collect::<Vec<_>>())
    }

    fn measures(&self) -> &'static [&'static str] {
        &["NLL"]
    }

    fn evaluate(&self, model: &Trained<'_>) -> Result<Vec<f64>, JobError> {
        let (n, mut sum) = (self.data.n_test, 0.0);
        for first in (0..n).step_by(EVAL_BATCH) {
            let numbers = first as u64..n.min(first + EVAL_BATCH) as u64;
            let log_p = self.log_density(model, &self.points(numbers.map(|idx| FIRST_TEST + idx)))?;
            sum = log_p.iter().fold(sum, |sum, log_p| sum + log_p);
            if !model.device.launches() {
                break;
            }
        }
        Ok(vec![-sum / n.max(1) as f64])
    }

    fn evaluate_at_end(&self, model: &Trained<'_>) -> Result<Vec<(&'static str, f64)>, JobError> {
        let (half, n) = MASS_SQUARE;
        let log_p = self.log_density(model, &Self::grid(MASS_SQUARE))?;
        let cell = (2.0 * half / n as f64).powi(2);
        Ok(vec![("integral of the density", log_p.iter().map(|it| it.exp()).sum::<f64>() * cell)])
    }

    fn pictures(&self, model: &Trained<'_>) -> Result<Vec<(String, Vec<u8>)>, JobError> {
        let (half, n) = SHOWN;
        let drawn = |err: crate::pictures::Error| JobError::Config { key: "plots".to_owned(), why: err.to_string() };
        let data = self.points((0..N_DRAWN.0 as u64).map(|idx| FIRST_TEST + idx));
        let normals = self.normals(N_DRAWN.0);
        // Numbers of time points, `n` intervals apart.
        let spread = |n: usize| -> Vec<usize> {
            (0..=n).map(|i| (self.solver.steps as f64 * i as f64 / n as f64).round() as usize).collect()
        };
        let moments = self.flow(model, &normals, &spread(MOMENTS.len() - 1))?;
        let cloud = |label, points| Cloud { label, points, ..Cloud::default() };
        let end = moments.last().map_or(&[][..], Vec::as_slice);
        let samples = clouds_png(&[cloud("data", &data), cloud("model", end)], (-half, half)).map_err(drawn)?;
        let density: Vec<f32> = self.log_density(model, &Self::grid(SHOWN))?.iter().map(|it| it.exp() as f32).collect();
        let field = Field::new(&density, [n, n]).map_err(drawn)?;
        let panel = Panel { label: "density of the model", field, scale: Scale::Magnitude };
        let density = panel_png(&[panel]).map_err(drawn)?;
        let on_paths = spread(self.solver.steps.min(PATH_INTERVALS));
        let on_paths = self.flow(model, &normals[..N_DRAWN.1.min(normals.len())], &on_paths)?;
        let starts = on_paths.first().cloned().unwrap_or_default();
        let ends = on_paths.last().cloned().unwrap_or_default();
        let paths: Vec<Vec<[f64; 2]>> =
            (0..starts.len()).map(|i| on_paths.iter().map(|points| points[i]).collect()).collect();
        let mut panels: Vec<Cloud<'_>> =
            MOMENTS.iter().zip(&moments).map(|(label, points)| cloud(label, points)).collect();
        panels.push(Cloud { label: "paths from 0 to 1", points: &starts, marks: &ends, paths: &paths });
        let flows = clouds_png(&panels, (-half, half)).map_err(drawn)?;
        let named = |name: &str, png| (name.to_owned(), png);
        Ok(vec![
            named("1-samples-of-data-and-model", samples),
            named("2-density", density),
            named("3-flow-over-time", flows),
        ])
    }

    fn step_flops(&self, batch: usize) -> f64 {
        let PlanarField { dim, hidden, n_flows } = *self.field;
        let d = dim as f64;
        // A flow at a point: its argument, tanh (20), velocity and divergence; the way back recomputes and adds.
        let (forward, backward) = (4.0 * d + 24.0, 14.0 * d + 12.0);
        let time = 2.0 * (hidden * (1 + hidden + n_flows * (3 * dim + 1))) as f64;
        let stages = (self.solver.steps * self.solver.method.method().tableau().b.len()) as f64;
        stages * ((batch * n_flows) as f64 * (2.0 * forward + backward) + 4.0 * time)
    }
}
