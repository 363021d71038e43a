//! AdamW on a GPU: one launch for the parameters of a step, or one for each gradient as it comes.

use super::{Moments, Rule, Update};
use crate::Result;
use halfmode_nn::Params;
use halfmode_precision::{DType, Precision};
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
/// With whether the step is skipped, the loss scale and the largest norm.
const NUMBERS: usize = RULE + 3;
/// Blocks that sum squares. Fixed, so that the sum has one order.
const PARTS: usize = 512;
/// Loss, sum of squares, and whether the step was taken.
const REPORT: usize = 3;

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

/// Updates one parameter.
pub(super) fn update(device: &Device, update: Update<'_>) -> Result<()> {
    let Some(cuda) = device.as_cuda() else { return Ok(()) };
    let n_items = update.moments.v.numel();
    if n_items == 0 {
        return Ok(());
    }
    let defines = [define("A", update.arithmetic())];
    let (stride, formats) = (update.stride(), update.packed_formats());
    let Update { rule, grad, moments: Moments { m, v }, exact, copy, .. } = update;
    let copy = copy.map_or(Ok(Arg::Null), Tensor::output)?;
    let tensors = [grad.input()?, m.output()?, v.output()?, exact.output()?, copy];
    let sizes = [count(n_items), Arg::I32(stride), Arg::I32(formats)];
    let args = [&tensors[..], &sizes, &rule.numbers().map(Arg::F64)].concat();
    Ok(cuda.launch(ADAMW, &defines, "update_one", grid(cuda, n_items.div_ceil(CHUNK)), &args)?)
}

/// What became of a guarded step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Verdict {
    pub(crate) loss: f64,
    pub(crate) applied: bool,
}

/// What the launches for all parameters share: where they are, and the numbers of the step.
#[derive(Debug)]
pub(super) struct Fused {
    /// As uploaded. Addresses of gradients repeat from step to step, so that this happens rarely.
    words: Vec<u64>,
    table: Tensor,
    numbers: Tensor,
    parts: Tensor,
    report: Tensor,
}

/// What a filled table holds.
struct Extent {
    n_chunks: usize,
    arithmetic: Precision,
}

impl Fused {
    /// For the parameters of a model on a GPU, or on its plan.
    pub(super) fn new(params: &Params) -> Result<Option<Self>> {
        let Some(device) = params.list.first().map(|param| param.value.device()) else { return Ok(None) };
        if device.target() != halfmode_tensor::Target::Cuda {
            return Ok(None);
        }
        let make = |shape: [usize; 2]| device.alloc(shape, DType::real(Precision::F64), Purpose::OptimState);
        let (table, numbers) = (make([params.list.len(), WORDS])?, make([1, NUMBERS])?);
        Ok(Some(Fused { words: Vec::new(), table, numbers, parts: make([1, PARTS])?, report: make([1, REPORT])? }))
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

    /// Sets the numbers of the launches to come: the rule, the loss scale in loss and gradients, and the largest norm
    /// of all unscaled gradients together. A recorded launch is replayed with what was set last.
    pub(super) fn set(&mut self, rule: Rule<f64>, scale: f64, max_norm: Option<f64>) -> Result<()> {
        let device = self.numbers.device().clone();
        let Some(cuda) = device.as_cuda() else { return Ok(()) };
        let limits = [Arg::F64(scale), Arg::F64(max_norm.unwrap_or(0.0))];
        let args = [&[self.numbers.output()?][..], &rule.numbers().map(Arg::F64), &limits].concat();
        // These numbers are f64 whatever the update is computed in.
        let defines = [define("A", Precision::F32)];
        Ok(cuda.launch(ADAMW, &defines, "set_rule", Grid::row(1, 32), &args)?)
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
        let launch = |entry, grid, args: &[Arg<'_>]| cuda.launch(ADAMW, &defines, entry, grid, args);
        let table = [self.table.input()?, Arg::I32((self.words.len() / WORDS) as i32), count(n_chunks)];
        if let Some(loss) = guard {
            launch("sum_squares", Grid::row(PARTS, THREADS), &[&table[..], &[self.parts.output()?]].concat())?;
            let loss = [loss.input()?, Arg::I32(format(loss.precision()))];
            let out = [self.numbers.output()?, self.report.output()?];
            let args = [&[self.parts.input()?, Arg::I32(PARTS as i32)][..], &loss, &out].concat();
            launch("judge", Grid::row(1, THREADS), &args)?;
        }
        if n_chunks > 0 {
            launch("update_all", grid(cuda, n_chunks), &[&table[..], &[self.numbers.input()?]].concat())?;
        }
        Ok(())
    }

    /// What became of the last guarded step: waits for it. On the planning device it was taken.
    pub(super) fn verdict(&self) -> Result<Verdict> {
        if !self.report.device().launches() {
            return Ok(Verdict { loss: 0.0, applied: true });
        }
        let report = self.report.to_vec::<f64>()?;
        Ok(Verdict { loss: report[0], applied: report[2] > 0.0 })
    }
}
