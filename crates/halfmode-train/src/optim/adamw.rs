//! AdamW, one pass over memory per parameter.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;

#[cfg(feature = "cuda")]
use cuda::Guard;
#[cfg(feature = "cuda")]
pub(super) use cuda::format;

use crate::accumulator::Accumulator;
use crate::checkpoint::{Array, Entry, Values};
use crate::{Error, Result};
use halfmode_nn::{ParamSpec, Parameter, Params};
#[cfg(feature = "cuda")]
use halfmode_precision::ScalerConfig;
use halfmode_precision::{DType, PrecisionPolicy};
use halfmode_tensor::{Device, Purpose, Shape, Target, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Whose AdamW.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AdamWKind {
    /// `torch.optim.AdamW`: decay before the step, `eps` beside the bias-corrected root, real and
    /// imaginary parts independent.
    #[serde(rename = "adamw")]
    Torch,
    /// neuraloperator's: decay after the step, `eps` beside the root as it is, one second moment
    /// `|g|²` per complex element.
    #[serde(rename = "adamw-neuralop")]
    Neuralop,
}

/// The numbers of AdamW.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Whose convention.
    pub kind: AdamWKind,
    /// Of the first step; see [`AdamW::set_learning_rate`].
    pub learning_rate: f64,
    /// Decay of the first and the second moment per step.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Share of a weight that decays per step and unit of learning rate.
    pub weight_decay: f64,
}

impl AdamWConfig {
    /// The defaults of `kind`: learning rate 1e-3, betas 0.9 and 0.999, eps 1e-8 (torch) or 1e-6
    /// (neuraloperator), weight decay 1e-2 (torch) or none (neuraloperator).
    #[must_use]
    pub fn new(kind: AdamWKind) -> Self {
        let (eps, weight_decay) = match kind {
            AdamWKind::Torch => (1e-8, 1e-2),
            AdamWKind::Neuralop => (1e-6, 0.0),
        };
        AdamWConfig { kind, learning_rate: 1e-3, betas: [0.9, 0.999], eps, weight_decay }
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// [`Error::Setting`], naming the field.
    pub fn validate(&self) -> Result<()> {
        let check = |legal: bool, setting, value, expected| {
            if legal { Ok(()) } else { Err(Error::Setting { setting, value, expected }) }
        };
        let at_least_0 = |value: f64| value.is_finite() && value >= 0.0;
        check(at_least_0(self.learning_rate), "learning_rate", self.learning_rate, "a learning rate")?;
        for beta in self.betas {
            check((0.0..1.0).contains(&beta), "betas", beta, "in [0, 1)")?;
        }
        check(at_least_0(self.eps), "eps", self.eps, "a number of at least 0")?;
        check(at_least_0(self.weight_decay), "weight_decay", self.weight_decay, "a number of at least 0")
    }
}

/// The running moments of one parameter, in its stored order.
#[derive(Debug)]
pub struct Moments {
    /// Mean of the gradient, the parameter's stored shape.
    pub m: Tensor,
    /// Mean of its square. Half as long in the last axis where real and imaginary parts share it.
    pub v: Tensor,
}

/// AdamW on [`Parameter`]s: reads a gradient, updates both moments, the master weight and the copy
/// that the model reads, in one pass of all threads.
///
/// With `t` counting steps from 1, `g` the unscaled gradient, `c_i = 1 − β_i^t`:
///
/// ```text
/// m = β_1 m + (1 − β_1) g          v = β_2 v + (1 − β_2) |g|²
/// torch:     p = (1 − lr·wd) p;    p = p − lr/c_1 · m / (sqrt(v/c_2) + eps)
/// neuralop:  p = p − lr·sqrt(c_2)/c_1 · m / (sqrt(v) + eps);    p = (1 − lr·wd) p
/// ```
///
/// Moments are stored in the policy's `moments`, arithmetic is in f32, or f64 for f64 operands.
/// Traffic per weight with f32 masters and half copies: 4 (gradient) + 8 + 8 (moments) + 8 (master)
/// + 2 (copy) bytes.
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    n_steps: u64,
    moments: Vec<Moments>,
    #[cfg(feature = "cuda")]
    fused: Option<cuda::Fused>,
}

impl AdamW {
    /// Moments of zero for each of `params`.
    ///
    /// # Errors
    /// [`Error::Setting`], and those of allocation.
    pub fn new(config: AdamWConfig, params: &Params, policy: &PrecisionPolicy) -> Result<Self> {
        config.validate()?;
        let moments = params.list.iter().map(|param| {
            let device = param.value.device();
            let make = |shape: Shape| device.alloc(shape, DType::real(policy.moments), Purpose::OptimState);
            let shape = param.spec.stored_shape();
            let mut halved = shape.to_vec();
            if let (Some(stride), Some(last)) = (shared_stride(config.kind, &param.spec), halved.last_mut()) {
                *last = stride;
            }
            Ok(Moments { m: make(shape)?, v: make(halved.into())? })
        });
        let moments = moments.collect::<Result<_>>()?;
        Ok(AdamW {
            config,
            n_steps: 0,
            moments,
            #[cfg(feature = "cuda")]
            fused: cuda::Fused::new(params, policy.loss.storage)?,
        })
    }

    /// The numbers, with the learning rate of the next step.
    #[must_use]
    pub fn config(&self) -> &AdamWConfig {
        &self.config
    }

    /// Steps taken.
    #[must_use]
    pub fn n_steps(&self) -> u64 {
        self.n_steps
    }

    /// The moments, in the order of the parameters.
    #[must_use]
    pub fn moments(&self) -> &[Moments] {
        &self.moments
    }

    /// Sets the learning rate of the steps to come.
    pub fn set_learning_rate(&mut self, learning_rate: f64) {
        self.config.learning_rate = learning_rate;
    }

    /// Takes one step. `grads[i]` belongs to parameter `i`; `None` leaves it and its moments alone,
    /// decay included. Gradients are multiplied by `unscale`: `1 / loss scale`, times the factor of
    /// [`clip_factor`](crate::clip_factor) if there is one.
    ///
    /// # Shapes
    /// - `grads[i]`: the stored shape of parameter `i`, real, any precision
    ///
    /// # Errors
    /// [`Error::Parameters`] and [`Error::Shape`] before anything is changed;
    /// [`halfmode_tensor::Error::Shared`] if somebody else still holds a weight.
    pub fn step(&mut self, params: &mut Params, grads: &[Option<Tensor>], unscale: f64) -> Result<()> {
        self.check_grads(params, grads)?;
        self.begin_step();
        #[cfg(feature = "cuda")]
        if let Some(fused) = &mut self.fused {
            let rule = Rule::new(&self.config, self.n_steps, unscale);
            let updates = updates(rule, self.config.kind, params, &mut self.moments, grads);
            fused.set_rule(rule)?;
            return fused.launch(updates, None);
        }
        for (idx, (param, grad)) in params.list.iter_mut().zip(grads).enumerate() {
            if let Some(grad) = grad {
                self.update(idx, param, grad, unscale)?;
            }
        }
        Ok(())
    }

    /// Makes the guarded steps to come go on from here: the optimiser's own numbers, the loss scale and how it moves,
    /// and the largest norm of all unscaled gradients together. Costs nothing if the device is there already.
    #[cfg(feature = "cuda")]
    pub(crate) fn set_guarded(
        &mut self,
        scale: f64,
        scaler: Option<(ScalerConfig, u32)>,
        max_norm: Option<f64>,
    ) -> Result<()> {
        let guard = Guard { config: self.config, n_steps: self.n_steps, scale, scaler, max_norm };
        self.fused.as_mut().map_or(Ok(()), |fused| fused.set_guard(guard))
    }

    /// The loss scale of guarded steps on the device, where backward begins.
    #[cfg(feature = "cuda")]
    pub(crate) fn seed(&self) -> Result<Tensor> {
        self.fused.as_ref().map(cuda::Fused::seed).ok_or_else(|| halfmode_tensor::Error::NotOnGpu.into())
    }

    /// As [`AdamW::step`] on a GPU, which decides itself: gradients, with the loss scale in them, are clipped, and
    /// nothing moves if one of them or the loss is not finite. The loss scale of the next step is set. Waits for
    /// nothing, so that it can be recorded.
    #[cfg(feature = "cuda")]
    pub(crate) fn launch_guarded(
        &mut self,
        params: &mut Params,
        grads: &[Option<Tensor>],
        loss: &Tensor,
    ) -> Result<()> {
        self.check_grads(params, grads)?;
        let Some(fused) = &mut self.fused else { return Err(halfmode_tensor::Error::NotOnGpu.into()) };
        // The numbers of the rule are those that were set.
        let rule = Rule::new(&self.config, self.n_steps + 1, 1.0);
        fused.launch(updates(rule, self.config.kind, params, &mut self.moments, grads), Some(loss))
    }

    /// Begins a guarded step that only its loss can reject: gradients are used as they come, by
    /// [`AdamW::update_guarded`], and the rest by [`AdamW::update_rest`].
    #[cfg(feature = "cuda")]
    pub(crate) fn begin_guarded(&mut self, loss: &Tensor) -> Result<()> {
        self.fused.as_mut().map_or(Ok(()), |fused| fused.judge(loss, 0))
    }

    /// Updates parameter `idx` in the guarded step that was begun.
    #[cfg(feature = "cuda")]
    pub(crate) fn update_guarded(&mut self, idx: usize, param: &mut Parameter, grad: &Tensor) -> Result<()> {
        check_shape(param, grad)?;
        let (Some(fused), Some(moments)) = (&self.fused, self.moments.get_mut(idx)) else {
            return Err(halfmode_tensor::Error::NotOnGpu.into());
        };
        // The numbers of the rule are those that were set.
        let rule = Rule::new(&self.config, self.n_steps + 1, 1.0);
        fused.update_next(Update::new(rule, self.config.kind, param, moments, grad))
    }

    /// Updates the parameters that have a gradient here in the guarded step that was begun.
    #[cfg(feature = "cuda")]
    pub(crate) fn update_rest(&mut self, params: &mut Params, grads: &[Option<Tensor>]) -> Result<()> {
        self.check_grads(params, grads)?;
        let Some(fused) = &mut self.fused else { return Err(halfmode_tensor::Error::NotOnGpu.into()) };
        let rule = Rule::new(&self.config, self.n_steps + 1, 1.0);
        fused.launch(updates(rule, self.config.kind, params, &mut self.moments, grads), None)
    }

    /// Waits for a guarded step and counts it if it was taken.
    #[cfg(feature = "cuda")]
    pub(crate) fn finish_guarded(&mut self) -> Result<cuda::Verdict> {
        let Some(fused) = &mut self.fused else { return Err(halfmode_tensor::Error::NotOnGpu.into()) };
        let verdict = fused.verdict()?;
        self.n_steps = verdict.next.n_steps;
        Ok(verdict)
    }

    /// Counts a step. Followed by one [`AdamW::update`] per parameter, this is [`AdamW::step`] for
    /// gradients that come one by one.
    pub fn begin_step(&mut self) {
        self.n_steps += 1;
    }

    /// Updates parameter `idx` in the current step.
    ///
    /// # Errors
    /// Those of [`AdamW::step`].
    pub fn update(&mut self, idx: usize, param: &mut Parameter, grad: &Tensor, unscale: f64) -> Result<()> {
        check_shape(param, grad)?;
        // An update before any step belongs to the first.
        let rule = Rule::new(&self.config, self.n_steps.max(1), unscale);
        let expected = self.moments.len();
        let Some(moments) = self.moments.get_mut(idx) else {
            return Err(Error::Parameters { what: "parameters", expected, found: idx + 1 });
        };
        grad.device().adamw(Update::new(rule, self.config.kind, param, moments, grad))
    }

    /// The state as tensors of a checkpoint: `adamw.t`, and `adamw.m.NAME` and `adamw.v.NAME` for
    /// each parameter, in stored order and in the precision of the moments.
    ///
    /// # Errors
    /// [`Error::Parameters`], and [`halfmode_tensor::Error::NoValues`] on the planning device.
    pub fn entries<'a>(&'a self, params: &'a Params) -> Result<Vec<Entry<'a>>> {
        self.check_len(params)?;
        let mut entries = vec![Entry::values("adamw.t", &[1], Values::F64(vec![self.n_steps as f64]))];
        for (param, Moments { m, v }) in params.list.iter().zip(&self.moments) {
            entries.push(Entry::tensor(format!("adamw.m.{}", param.spec.name), m)?);
            entries.push(Entry::tensor(format!("adamw.v.{}", param.spec.name), v)?);
        }
        Ok(entries)
    }

    /// Takes the state from a checkpoint's tensors, see [`AdamW::entries`]. Exact if the moments
    /// have the precision that they had.
    ///
    /// # Errors
    /// [`Error::MissingTensor`] and [`Error::TensorShape`]; the state is then part old, part new.
    pub fn load(&mut self, params: &Params, arrays: &BTreeMap<String, Array>) -> Result<()> {
        self.check_len(params)?;
        let get = |name: String| arrays.get(&name).ok_or(Error::MissingTensor { name });
        let steps = get("adamw.t".to_owned())?.to_f64();
        let &[n_steps] = steps.as_slice() else {
            let (expected, found) = ([1].into(), [steps.len()].into());
            return Err(Error::TensorShape { name: "adamw.t".to_owned(), expected, found });
        };
        for (param, Moments { m, v }) in params.list.iter().zip(&mut self.moments) {
            for (kind, tensor) in [("m", m), ("v", v)] {
                let name = format!("adamw.{kind}.{}", param.spec.name);
                get(name.clone())?.write_to(&name, tensor)?;
            }
        }
        self.n_steps = n_steps as u64;
        Ok(())
    }

    fn check_grads(&self, params: &Params, grads: &[Option<Tensor>]) -> Result<()> {
        let expected = self.moments.len();
        for (what, found) in [("parameters", params.list.len()), ("gradients", grads.len())] {
            if found != expected {
                return Err(Error::Parameters { what, expected, found });
            }
        }
        for (param, grad) in params.list.iter().zip(grads) {
            if let Some(grad) = grad {
                check_shape(param, grad)?;
            }
        }
        Ok(())
    }

    fn check_len(&self, params: &Params) -> Result<()> {
        let (expected, found) = (self.moments.len(), params.list.len());
        if expected == found { Ok(()) } else { Err(Error::Parameters { what: "parameters", expected, found }) }
    }
}

/// The update of one parameter.
pub(crate) struct Update<'a> {
    rule: Rule<f64>,
    /// Distance from real to imaginary part where they share a second moment.
    stride: Option<usize>,
    grad: &'a Tensor,
    moments: &'a mut Moments,
    /// The weight that is updated, and the rounded copy that the model reads, if it is another.
    exact: &'a mut Tensor,
    copy: Option<&'a mut Tensor>,
}

/// The kernel of AdamW. The default body is the rule in double precision; a device overrides it.
pub(crate) trait AdamWKernels {
    /// Updates moments, weight and copy.
    fn adamw(&self, update: Update<'_>) -> Result<()> {
        update.by_definition()
    }
}

impl AdamWKernels for Device {
    fn adamw(&self, update: Update<'_>) -> Result<()> {
        match self.target() {
            Target::Cpu { .. } => cpu::update(self, update),
            #[cfg(feature = "cuda")]
            Target::Cuda => cuda::update(self, update),
        }
    }
}

impl<'a> Update<'a> {
    fn new(
        rule: Rule<f64>,
        kind: AdamWKind,
        param: &'a mut Parameter,
        moments: &'a mut Moments,
        grad: &'a Tensor,
    ) -> Self {
        let stride = shared_stride(kind, &param.spec);
        let (exact, copy) = match &mut param.master {
            Some(master) => (master, Some(&mut param.value)),
            None => (&mut param.value, None),
        };
        Update { rule, stride, grad, moments, exact, copy }
    }

    fn by_definition(self) -> Result<()> {
        let Update { rule, stride, grad, moments: Moments { m, v }, exact, copy } = self;
        let g = grad.to_vec::<f64>()?;
        let (mut wide_m, mut wide_v, mut p) = (m.to_vec::<f64>()?, v.to_vec::<f64>()?, exact.to_vec::<f64>()?);
        match stride {
            Some(stride) => rule.complex(stride, &g, &mut wide_m, &mut wide_v, &mut p),
            None => rule.real(&g, &mut wide_m, &mut wide_v, &mut p),
        }
        m.copy_from_slice(&wide_m)?;
        v.copy_from_slice(&wide_v)?;
        exact.copy_from_slice(&p)?;
        if let Some(copy) = copy {
            // Of the weight as it was rounded, as a resumed run would make it.
            copy.copy_from_slice(&exact.to_vec::<f64>()?)?;
        }
        Ok(())
    }
}

/// The updates of all parameters that have a gradient.
#[cfg(feature = "cuda")]
fn updates<'a>(
    rule: Rule<f64>,
    kind: AdamWKind,
    params: &'a mut Params,
    moments: &'a mut [Moments],
    grads: &'a [Option<Tensor>],
) -> impl Iterator<Item = Update<'a>> {
    let all = params.list.iter_mut().zip(moments).zip(grads);
    all.filter_map(move |((param, moments), grad)| Some(Update::new(rule, kind, param, moments, grad.as_ref()?)))
}

/// Distance between real and imaginary part where they share a second moment.
fn shared_stride(kind: AdamWKind, spec: &ParamSpec) -> Option<usize> {
    if kind == AdamWKind::Neuralop { spec.complex_stride() } else { None }
}

fn check_shape(param: &Parameter, grad: &Tensor) -> Result<()> {
    let (expected, found) = (param.value.shape(), grad.shape());
    if expected != found || param.value.dtype().domain != grad.dtype().domain {
        return Err(Error::Shape {
            op: "adamw",
            operand: "gradient",
            expected: expected.clone(),
            found: found.clone(),
        });
    }
    if !param.value.device().same(grad.device()) {
        return Err(halfmode_tensor::Error::Devices { op: "adamw" }.into());
    }
    Ok(())
}

/// One step's arithmetic: `p = (p · before − step · m / (sqrt(v) · root + eps)) · after`.
#[derive(Clone, Copy)]
struct Rule<R> {
    unscale: R,
    beta_1: R,
    rest_1: R,
    beta_2: R,
    rest_2: R,
    before: R,
    after: R,
    step: R,
    root: R,
    eps: R,
}

impl Rule<f64> {
    fn new(config: &AdamWConfig, t: u64, unscale: f64) -> Self {
        let [beta_1, beta_2] = config.betas;
        let correction = |beta: f64| 1.0 - beta.powf(t as f64);
        let (c_1, root_c_2) = (correction(beta_1), correction(beta_2).sqrt());
        let decay = 1.0 - config.learning_rate * config.weight_decay;
        let (before, after, step, root) = match config.kind {
            AdamWKind::Torch => (decay, 1.0, config.learning_rate / c_1, 1.0 / root_c_2),
            AdamWKind::Neuralop => (1.0, decay, config.learning_rate * root_c_2 / c_1, 1.0),
        };
        let (rest_1, rest_2) = (1.0 - beta_1, 1.0 - beta_2);
        Rule { unscale, beta_1, rest_1, beta_2, rest_2, before, after, step, root, eps: config.eps }
    }

    fn rounded<R: Accumulator>(&self) -> Rule<R> {
        Rule {
            unscale: R::from_f64(self.unscale),
            beta_1: R::from_f64(self.beta_1),
            rest_1: R::from_f64(self.rest_1),
            beta_2: R::from_f64(self.beta_2),
            rest_2: R::from_f64(self.rest_2),
            before: R::from_f64(self.before),
            after: R::from_f64(self.after),
            step: R::from_f64(self.step),
            root: R::from_f64(self.root),
            eps: R::from_f64(self.eps),
        }
    }
}

impl<R: Accumulator> Rule<R> {
    #[inline(always)]
    fn first(&self, m: &mut R, g: R) {
        *m = self.beta_1 * *m + self.rest_1 * g;
    }

    #[inline(always)]
    fn second(&self, v: &mut R, square: R) -> R {
        *v = self.beta_2 * *v + self.rest_2 * square;
        v.sqrt() * self.root + self.eps
    }

    #[inline(always)]
    fn weight(&self, p: &mut R, m: R, denominator: R) {
        *p = (*p * self.before - self.step * m / denominator) * self.after;
    }

    /// Slices of one length; a second moment for each scalar.
    fn real(&self, g: &[R], m: &mut [R], v: &mut [R], p: &mut [R]) {
        R::vectorised(
            #[inline(always)]
            || {
                for (((g, m), v), p) in g.iter().zip(m).zip(v).zip(p) {
                    let g = *g * self.unscale;
                    self.first(m, g);
                    let denominator = self.second(v, g * g);
                    self.weight(p, *m, denominator);
                }
            },
        );
    }

    /// Rows of `stride` real parts and then their imaginary parts; a second moment for each pair.
    fn complex(&self, stride: usize, g: &[R], m: &mut [R], v: &mut [R], p: &mut [R]) {
        R::vectorised(
            #[inline(always)]
            || {
                let rows = g.chunks_exact(2 * stride).zip(m.chunks_exact_mut(2 * stride));
                let rows = rows.zip(v.chunks_exact_mut(stride)).zip(p.chunks_exact_mut(2 * stride));
                for (((g, m), v), p) in rows {
                    let ((g_re, g_im), (m_re, m_im)) = (g.split_at(stride), m.split_at_mut(stride));
                    let (p_re, p_im) = p.split_at_mut(stride);
                    let re = g_re.iter().zip(m_re).zip(p_re);
                    let im = g_im.iter().zip(m_im).zip(p_im);
                    for ((((g_re, m_re), p_re), ((g_im, m_im), p_im)), v) in re.zip(im).zip(v) {
                        let (g_re, g_im) = (*g_re * self.unscale, *g_im * self.unscale);
                        self.first(m_re, g_re);
                        self.first(m_im, g_im);
                        let denominator = self.second(v, g_re * g_re + g_im * g_im);
                        self.weight(p_re, *m_re, denominator);
                        self.weight(p_im, *m_im, denominator);
                    }
                }
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use halfmode_nn::Init;
    use halfmode_precision::Precision;

    /// Runs the default body.
    struct Definition;
    impl AdamWKernels for Definition {}

    #[test]
    fn the_override_computes_what_the_default_body_says() {
        let device = Device::cpu(2).unwrap();
        let specs = vec![
            ParamSpec::real("dense", &[5, 1777], Init::Uniform { bound: 1.0 }),
            ParamSpec::spectral("spectral", &[3, 5, 21, 11], Init::Uniform { bound: 1.0 }),
        ];
        for kind in [AdamWKind::Torch, AdamWKind::Neuralop] {
            for (policy, tolerance) in [
                (PrecisionPolicy::double(), 1e-14),
                // A weight of at most 1 rounded to f32 in each of a few operations.
                (PrecisionPolicy::mixed(Precision::F16), 8.0 * 2f64.powi(-24)),
            ] {
                let config = AdamWConfig { weight_decay: 0.1, ..AdamWConfig::new(kind) };
                let run = |kernels: &dyn AdamWKernels| {
                    let mut params = Params::new(&device, specs.clone(), &policy, 3).unwrap();
                    let mut optimiser = AdamW::new(config, &params, &policy).unwrap();
                    for step in 1..=3 {
                        for (param, moments) in params.list.iter_mut().zip(&mut optimiser.moments) {
                            let values: Vec<f64> = (0..param.value.numel())
                                .map(|i| ((i + step) as f64 * 0.754_877_666).fract() - 0.5)
                                .collect();
                            let (shape, precision) = (param.value.shape().clone(), param.exact().precision());
                            let grad = Tensor::from_slice(&device, &values, shape, precision, Purpose::Grad).unwrap();
                            let rule = Rule::new(&config, step as u64, 0.25);
                            kernels.adamw(Update::new(rule, kind, param, moments, &grad)).unwrap();
                        }
                    }
                    params.list.iter().flat_map(|param| param.exact().to_vec::<f64>().unwrap()).collect::<Vec<_>>()
                };
                for (got, want) in run(&device).into_iter().zip(run(&Definition)) {
                    assert!((got - want).abs() <= tolerance, "{kind:?} {}: {got} {want}", policy.preset);
                }
            }
        }
    }
}
