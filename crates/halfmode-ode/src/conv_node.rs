//! A classifier of images that is three differential equations one after another.

use crate::{ConvField, Method, OdeOptions, OdePrecision, Record, Storage, Times, VectorField, odeint_last};
use halfmode_autograd::{Result, Tape, Var};
use halfmode_nn::{
    AveragePool, ChannelBias, Conv2d, Embed, ExtraChannels, FieldNorm, Init, Linear, Module, NormKind, ParamRole,
    ParamSpec, Params, Relu,
};
use halfmode_precision::PrecisionPolicy;
use halfmode_tensor::{Device, Tensor};
use std::sync::Arc;

/// Stem, three blocks that each solve an equation with a [`ConvField`] from 0 to 1, and a head:
///
/// ```text
/// x = solve f1 from relu(norm(conv 3x3 of the image))
/// x = solve f2 from pool 2x2 of relu(norm(conv 1x1 of x))
/// x = solve f3 from pool 2x2 of relu(norm(conv 1x1 of x))
/// logits = linear map of the mean over points
/// ```
///
/// Channels double between blocks. Norms have a mean and a variance per channel and sample, and weights.
///
/// # Shapes
/// - input: images `[batch, c_in, n_1, n_2]`
/// - output: logits `[batch, 1, 1, n_classes]`
///
/// Source: the shape of rampde's STL-10 classifier. Its weights `w` `[n_steps, …]` are here one parameter per step.
#[derive(Clone, Debug, PartialEq)]
pub struct ConvNode {
    /// Channels of the images.
    pub c_in: usize,
    /// Points of the images along each axis, at least 4.
    pub image: [usize; 2],
    /// Channels of the first block.
    pub channels: usize,
    /// Classes.
    pub n_classes: usize,
    /// Steps of every block, and intervals of its weights.
    pub n_steps: usize,
    /// The method of every block.
    pub method: Method,
    /// Which states of a block wait for the way back.
    pub storage: Storage,
}

/// The parameters, in order.
struct Cursor<'a>(&'a [Var]);

impl<'a> Cursor<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [Var]> {
        let found = self.0.len();
        let (head, tail) = self.0.split_at_checked(n).ok_or(halfmode_autograd::Error::Arity {
            op: "conv_node",
            expected: n,
            found,
        })?;
        self.0 = tail;
        Ok(head)
    }
}

impl ConvNode {
    /// A classifier of colour images with ten classes and four steps of the classical Runge-Kutta method per block.
    #[must_use]
    pub fn new(image: [usize; 2], channels: usize) -> Self {
        let (method, storage) = (Method::Rk4, Storage::Trajectory);
        ConvNode { c_in: 3, image, channels, n_classes: 10, n_steps: 4, method, storage }
    }

    fn blocks(&self) -> [ConvField; 3] {
        [1, 2, 4].map(|factor| ConvField { channels: factor * self.channels, n_intervals: self.n_steps })
    }

    /// Parameters in the precisions of `policy`; all steps of a block start with the weights of its first.
    ///
    /// # Errors
    /// Those of [`Params::new`].
    pub fn params(&self, device: &Device, policy: &PrecisionPolicy, seed: u64) -> halfmode_nn::Result<Params> {
        let mut params = Params::new(device, self.param_specs(), policy, seed)?;
        if !device.launches() {
            return Ok(params);
        }
        for block in 1..=3 {
            let Some(first) = params.get(&format!("f{block}.w.0")) else { continue };
            let values = first.file_values()?;
            let prefix = format!("f{block}.w.");
            for param in params.list.iter_mut().filter(|param| param.spec.name.starts_with(&prefix)) {
                param.set_file_values(&values)?;
            }
        }
        Ok(params)
    }

    /// Real scalars of all parameters.
    #[must_use]
    pub fn n_parameters(&self) -> usize {
        let specs = self.param_specs();
        specs.iter().filter(|it| it.role != ParamRole::Statistic).map(ParamSpec::n_scalars).sum()
    }

    fn solve(&self, tape: &mut Tape, field: ConvField, x: &Var, cursor: &mut Cursor<'_>) -> Result<Var> {
        let params = cursor.take(2 * self.n_steps)?;
        let precision = OdePrecision::new((*tape.cx().policy).clone());
        let options = OdeOptions { record: Record::default(), ..OdeOptions::new(precision) };
        let options = options.method(self.method).storage(self.storage);
        let times: Vec<f64> = (0..=self.n_steps).map(|step| step as f64 / self.n_steps as f64).collect();
        odeint_last(tape, &Arc::new(field), x, Times::Fixed(&times), params, &options)
    }

    /// Norm with weights, then the rectifier.
    fn normed(&self, tape: &mut Tape, x: &Var, cursor: &mut Cursor<'_>) -> Result<Var> {
        let norm = cursor.take(2)?;
        let x = tape.apply(FieldNorm(NormKind::AffineInstance), &[x, &norm[0], &norm[1]])?;
        tape.apply(Relu, &[&x])
    }

    fn pointwise(&self, tape: &mut Tape, x: &Var, cursor: &mut Cursor<'_>) -> Result<Var> {
        let map = cursor.take(2)?;
        let x = tape.apply(Linear, &[x, &map[0]])?;
        tape.apply(ChannelBias, &[&x, &map[1]])
    }
}

/// torch's default of a layer that sums `fan_in` terms.
fn uniform(fan_in: usize) -> Init {
    Init::Uniform { bound: 1.0 / (fan_in.max(1) as f64).sqrt() }
}

impl Module for ConvNode {
    fn param_specs(&self) -> Vec<ParamSpec> {
        let mut specs = Vec::new();
        let mut c = self.c_in;
        let kernels = [("stem", "n1", 3), ("c1", "n3", 1), ("c2", "n4", 1)];
        for (idx, (field, (map, norm, k))) in self.blocks().into_iter().zip(kernels).enumerate() {
            let (width, fan_in) = (field.channels, c * k * k);
            let weight = format!("{map}.weight");
            specs.push(match k {
                1 => ParamSpec::real(weight, &[width, c, 1, 1], uniform(fan_in)),
                _ => ParamSpec::convolution(weight, [width, c, k, k], uniform(fan_in)),
            });
            specs.push(ParamSpec::real(format!("{map}.bias"), &[width], uniform(fan_in)));
            specs.push(ParamSpec::real(format!("{norm}.weight"), &[width], Init::Ones));
            specs.push(ParamSpec::real(format!("{norm}.bias"), &[width], Init::Zeros));
            specs.extend(field.param_specs().into_iter().map(|spec| {
                let name = format!("f{}.{}", idx + 1, spec.name);
                ParamSpec { name, ..spec }
            }));
            c = width;
        }
        specs.push(ParamSpec::real("head.weight", &[self.n_classes, c], uniform(c)));
        specs.push(ParamSpec::real("head.bias", &[self.n_classes], uniform(c)));
        specs
    }

    fn forward(&self, tape: &mut Tape, params: &[Var], inputs: &[&Var]) -> Result<Var> {
        let &[image] = inputs else {
            return Err(halfmode_autograd::Error::Arity { op: "conv_node", expected: 1, found: inputs.len() });
        };
        let mut cursor = Cursor(params);
        let [f1, f2, f3] = self.blocks();
        let x = tape.apply(Embed(ExtraChannels::None), &[image])?;
        let stem = cursor.take(2)?;
        let x = tape.apply(Conv2d::new(1), &[&x, &stem[0], &stem[1]])?;
        let x = self.normed(tape, &x, &mut cursor)?;
        let mut x = self.solve(tape, f1, &x, &mut cursor)?;
        let mut extents = self.image;
        for field in [f2, f3] {
            x = self.pointwise(tape, &x, &mut cursor)?;
            x = self.normed(tape, &x, &mut cursor)?;
            x = tape.apply(AveragePool::halving(extents), &[&x])?;
            extents = extents.map(|n| n / 2);
            x = self.solve(tape, field, &x, &mut cursor)?;
        }
        let x = tape.apply(AveragePool::global(extents), &[&x])?;
        self.pointwise(tape, &x, &mut cursor)
    }
}

/// The class of the largest logit of each row, the first of those; none where a logit is not a number.
///
/// # Errors
/// Those of reading the tensor.
pub fn classes(logits: &Tensor) -> halfmode_tensor::Result<Vec<Option<usize>>> {
    let n = logits.shape().last().copied().unwrap_or(1).max(1);
    let first = |row: &[f64]| (1..row.len()).fold(0, |best, idx| if row[idx] > row[best] { idx } else { best });
    let best = |row: &[f64]| (!row.iter().any(|it| it.is_nan())).then(|| first(row));
    Ok(logits.to_vec::<f64>()?.chunks(n).map(best).collect())
}
