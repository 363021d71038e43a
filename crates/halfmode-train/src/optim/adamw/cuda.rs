//! AdamW on a GPU: one launch for the parameters of a step, or one for each gradient as it comes.

use super::{AdamWConfig, AdamWKind, Moments, Rule, Update};
use crate::Result;
use halfmode_nn::Params;
use halfmode_precision::{DType, Precision, ScalerConfig};
use halfmode_tensor::cuda::{Arg, CudaDevice, Grid, Source, count, define};
use halfmode_tensor::{Device, Purpose, Tensor};

const ADAMW: Source = Source { name: "adamw", text: include_str!("../../../kernels/adamw.cu") };

/// Threads of a block.
const THREADS: usize = 256;
/// Second moments that a block works on at a time, as in the kernel.
const CHUNK: usize = 2048;
/// Words of a parameter in the table of a launch.
const WORDS: usize = 8;
/// Numbers of a rule.
const RULE: usize = 10;
/// All that a guarded step goes on from, in the order of the kernel.
const NUMBERS: usize = 24;
/// Blocks that sum squares. Fixed, so that the sum has one order.
const PARTS: usize = 512;
/// Of a guarded step, in the order of the kernel.
const REPORT: usize = 6;

impl Rule<f64> {
    /// In the order of the kernel.
    fn numbers(&self) -> [f64; RULE] {
        let Rule { unscale, beta_1, rest_1, beta_2, rest_2, before, after, step, root, eps } = *self;
        [unscale, beta_1, rest_1, beta_2, rest_2, before, after, step, root, eps]
    }
}

/// A storage format as the kernel numbers them.
pub(in crate::optim) fn format(precision: Precision) -> i32 {
    match precision {
        Precision::F64 => 0,
        Precision::F32 => 1,
        Precision::Bf16 => 2,
        Precision::F16 => 3,
    }
}

fn grid(cuda: &CudaDevice, n_chunks: usize) -> Grid {
    Grid::row(n_chunks.clamp(1, 16 * cuda.context().info().n_multiprocessors), THREADS)
}

impl Update<'_> {
    /// The stored formats: of gradient, moments, weight and copy.
    fn formats(&self) -> [Precision; 4] {
        let exact = self.exact.precision();
        let copy = self.copy.as_ref().map_or(exact, |copy| copy.precision());
        [self.grad.precision(), self.moments.m.precision(), exact, copy]
    }

    /// What the update is computed in.
    fn arithmetic(&self) -> Precision {
        self.formats()[..3].iter().fold(Precision::F32, |widest, &it| widest.min(it))
    }

    fn packed_formats(&self) -> i32 {
        self.formats().iter().rev().fold(0, |packed, &it| packed << 4 | format(it))
    }

    fn stride(&self) -> i32 {
        // Channels of a layer.
        self.stride.unwrap_or(0) as i32
    }
}

/// Launches the update of one parameter with `rule` after the other arguments.
fn launch_one(cuda: &CudaDevice, entry: &str, update: Update<'_>, rule: &[Arg<'_>]) -> Result<()> {
    let n_items = update.moments.v.numel();
    if n_items == 0 {
        return Ok(());
    }
    let defines = [define("A", update.arithmetic())];
    let (stride, formats) = (update.stride(), update.packed_formats());
    let Update { grad, moments: Moments { m, v }, exact, copy, .. } = update;
    let copy = copy.map_or(Ok(Arg::Null), Tensor::output)?;
    let tensors = [grad.input()?, m.output()?, v.output()?, exact.output()?, copy];
    let sizes = [count(n_items), Arg::I32(stride), Arg::I32(formats)];
    let args = [&tensors[..], &sizes, rule].concat();
    Ok(cuda.launch(ADAMW, &defines, entry, grid(cuda, n_items.div_ceil(CHUNK)), &args)?)
}

/// Updates one parameter.
pub(super) fn update(device: &Device, update: Update<'_>) -> Result<()> {
    let Some(cuda) = device.as_cuda() else { return Ok(()) };
    let rule = update.rule.numbers().map(Arg::F64);
    launch_one(cuda, "update_one", update, &rule)
}

/// What a guarded step goes on from. The host sets it once; after that the device moves it on by itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Guard {
    /// With the learning rate of the step.
    pub(crate) config: AdamWConfig,
    /// Steps taken before.
    pub(crate) n_steps: u64,
    /// In loss and gradients.
    pub(crate) scale: f64,
    /// How the scale moves, and finite steps in a row up to now.
    pub(crate) scaler: Option<(ScalerConfig, u32)>,
    /// The largest norm of all unscaled gradients together.
    pub(crate) max_norm: Option<f64>,
}

impl Guard {
    /// In the order of the kernel.
    fn numbers(&self) -> [f64; NUMBERS] {
        let Guard { config, n_steps, scale, scaler, max_norm } = *self;
        let skip = 0.0;
        let torch = f64::from(config.kind == AdamWKind::Torch);
        let step =
            [skip, scale, max_norm.unwrap_or(0.0), n_steps as f64, config.learning_rate, config.weight_decay, torch];
        let moves = scaler.map_or([0.0; 7], |(scaler, n_finite)| {
            let ScalerConfig { growth_interval, growth_factor, backoff_factor, min, max, .. } = scaler;
            [1.0, f64::from(n_finite), f64::from(growth_interval), growth_factor, backoff_factor, min, max]
        });
        let rule = Rule::new(&config, n_steps + 1, 1.0 / scale).numbers();
        let mut numbers = [0.0; NUMBERS];
        numbers.iter_mut().zip(rule.into_iter().chain(step).chain(moves)).for_each(|(to, it)| *to = it);
        numbers
    }
}

/// What became of a guarded step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Verdict {
    pub(crate) loss: f64,
    pub(crate) applied: bool,
    /// What the device goes on from.
    pub(crate) next: Guard,
}

/// What the launches for all parameters share: where they are, and the numbers of the step.
#[derive(Debug)]
pub(super) struct Fused {
    /// As uploaded. Addresses of gradients repeat from step to step, so that this happens rarely.
    words: Vec<u64>,
    table: Tensor,
    numbers: Tensor,
    /// What the numbers say, if they are those of guarded steps.
    guard: Option<Guard>,
    /// The loss scale as backward begins with it.
    seed: Tensor,
    parts: Tensor,
    report: Tensor,
}

/// What a filled table holds.
struct Extent {
    n_chunks: usize,
    arithmetic: Precision,
}

impl Fused {
    /// For the parameters of a model on a GPU, or on its plan; losses are stored in `loss`.
    pub(super) fn new(params: &Params, loss: Precision) -> Result<Option<Self>> {
        let Some(device) = params.list.first().map(|param| param.value.device()) else { return Ok(None) };
        if device.target() != halfmode_tensor::Target::Cuda {
            return Ok(None);
        }
        let make = |shape: [usize; 2]| device.alloc(shape, DType::real(Precision::F64), Purpose::OptimState);
        let (table, numbers) = (make([params.list.len(), WORDS])?, make([1, NUMBERS])?);
        let (parts, report) = (make([1, PARTS])?, make([1, REPORT])?);
        let seed = device.alloc([1], DType::real(loss), Purpose::OptimState)?;
        Ok(Some(Fused { words: Vec::new(), table, numbers, guard: None, seed, parts, report }))
    }

    /// Brings the table up to date.
    fn fill<'a>(&mut self, updates: impl Iterator<Item = Update<'a>>) -> Result<Extent> {
        let mut words = Vec::with_capacity(self.words.len());
        let mut extent = Extent { n_chunks: 0, arithmetic: Precision::F32 };
        for update in updates.filter(|update| update.moments.v.numel() > 0) {
            extent.arithmetic = extent.arithmetic.min(update.arithmetic());
            let sizes =
                u64::from(update.stride().cast_unsigned()) | u64::from(update.packed_formats().cast_unsigned()) << 32;
            let Update { grad, moments: Moments { m, v }, exact, copy, .. } = update;
            let (n_items, first_chunk) = (v.numel(), extent.n_chunks);
            let copy = copy.map_or(Ok(0), Tensor::address_mut)?;
            let moments = [m.address_mut()?, v.address_mut()?];
            words.extend([first_chunk as u64, grad.address()?, moments[0], moments[1], exact.address_mut()?]);
            words.extend([copy, n_items as u64, sizes]);
            extent.n_chunks += n_items.div_ceil(CHUNK);
        }
        if words != self.words {
            self.table.upload_words(&words)?;
            self.words = words;
        }
        Ok(extent)
    }

    /// Sets the rule of the launches to come.
    pub(super) fn set_rule(&mut self, rule: Rule<f64>) -> Result<()> {
        self.guard = None;
        let device = self.numbers.device().clone();
        let Some(cuda) = device.as_cuda() else { return Ok(()) };
        let args = [&[self.numbers.output()?][..], &rule.numbers().map(Arg::F64)].concat();
        // These numbers are f64 whatever the update is computed in.
        let defines = [define("A", Precision::F32)];
        Ok(cuda.launch(ADAMW, &defines, "set_rule", Grid::row(1, 32), &args)?)
    }

    /// Sets what the guarded steps to come go on from, unless the device is there already.
    pub(super) fn set_guard(&mut self, guard: Guard) -> Result<()> {
        if self.guard != Some(guard) {
            self.numbers.copy_from_slice(&guard.numbers())?;
            self.seed.copy_from_slice(&[guard.scale])?;
            self.guard = Some(guard);
        }
        Ok(())
    }

    /// The loss scale on the device, as backward begins with it.
    pub(super) fn seed(&self) -> Tensor {
        self.seed.clone()
    }

    /// Updates every parameter that has a gradient in one launch, with the numbers that were set. With a loss two
    /// launches before it decide whether it does anything; the host does not wait for them.
    pub(super) fn launch<'a>(
        &mut self,
        updates: impl Iterator<Item = Update<'a>>,
        guard: Option<&Tensor>,
    ) -> Result<()> {
        let device = self.table.device().clone();
        let Some(cuda) = device.as_cuda() else { return Ok(()) };
        let Extent { n_chunks, arithmetic } = self.fill(updates)?;
        let defines = [define("A", arithmetic)];
        let sizes = [Arg::I32((self.words.len() / WORDS) as i32), count(n_chunks)];
        if let Some(loss) = guard {
            let args = [&[self.table.input()?][..], &sizes, &[self.parts.output()?]].concat();
            cuda.launch(ADAMW, &defines, "sum_squares", Grid::row(PARTS, THREADS), &args)?;
            self.judge(loss, PARTS)?;
        }
        if n_chunks > 0 {
            let args = [&[self.table.input()?][..], &sizes, &[self.numbers.input()?]].concat();
            cuda.launch(ADAMW, &defines, "update_all", grid(cuda, n_chunks), &args)?;
        }
        Ok(())
    }

    /// Decides over a step by its loss and the first `n_parts` sums of squares.
    pub(super) fn judge(&mut self, loss: &Tensor, n_parts: usize) -> Result<()> {
        let device = self.table.device().clone();
        let Some(cuda) = device.as_cuda() else { return Ok(()) };
        let defines = [define("A", loss.precision().min(Precision::F32))];
        let loss = [loss.input()?, Arg::I32(format(loss.precision()))];
        let seed_format = Arg::I32(format(self.seed.precision()));
        let out = [self.numbers.output()?, self.seed.output()?, seed_format, self.report.output()?];
        let args = [&[self.parts.input()?, Arg::I32(n_parts as i32)][..], &loss, &out].concat();
        Ok(cuda.launch(ADAMW, &defines, "judge", Grid::row(1, THREADS), &args)?)
    }

    /// Updates one parameter of a guarded step that was decided over.
    pub(super) fn update_next(&self, update: Update<'_>) -> Result<()> {
        let device = self.table.device().clone();
        let Some(cuda) = device.as_cuda() else { return Ok(()) };
        launch_one(cuda, "update_next", update, &[self.numbers.input()?])
    }

    /// What became of the last guarded step: waits for it. On the planning device it was taken.
    pub(super) fn verdict(&mut self) -> Result<Verdict> {
        let device = self.report.device();
        let Some(guard) = &mut self.guard else { return Err(halfmode_tensor::Error::NotOnGpu.into()) };
        if !device.launches() {
            guard.n_steps += 1;
            return Ok(Verdict { loss: 0.0, applied: true, next: *guard });
        }
        let report = self.report.to_vec::<f64>()?;
        let [loss, _, taken, scale, n_finite, n_steps] = report[..] else {
            return Err(halfmode_tensor::Error::NotOnGpu.into());
        };
        // Counts, exact in f64.
        (guard.n_steps, guard.scale) = (n_steps as u64, scale);
        if let Some((_, known)) = &mut guard.scaler {
            *known = n_finite as u32;
        }
        Ok(Verdict { loss, applied: taken > 0.0, next: *guard })
    }
}
