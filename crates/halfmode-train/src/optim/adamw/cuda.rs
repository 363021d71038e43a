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
/// Numbers of a rule, and whether the step is skipped.
const NUMBERS: usize = 11;

impl Rule<f64> {
    /// In the order of the kernel.
    fn numbers(&self) -> [f64; NUMBERS - 1] {
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

/// What one launch for all parameters reads: where they are, and the numbers of the step.
#[derive(Debug)]
pub(super) struct Fused {
    /// As uploaded. Addresses of gradients repeat from step to step, so that this happens rarely.
    words: Vec<u64>,
    table: Tensor,
    numbers: Tensor,
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
        Ok(Some(Fused { words: Vec::new(), table, numbers }))
    }

    /// Updates every parameter that has a gradient: two launches, one of them of a single block.
    pub(super) fn step<'a>(&mut self, rule: Rule<f64>, updates: impl Iterator<Item = Update<'a>>) -> Result<()> {
        let device = self.table.device().clone();
        let Some(cuda) = device.as_cuda() else { return Ok(()) };
        let (mut words, mut n_chunks, mut arithmetic) = (Vec::with_capacity(self.words.len()), 0, Precision::F32);
        for update in updates.filter(|update| update.moments.v.numel() > 0) {
            arithmetic = arithmetic.min(update.arithmetic());
            let sizes =
                u64::from(update.stride().cast_unsigned()) | u64::from(update.packed_formats().cast_unsigned()) << 32;
            let Update { grad, moments: Moments { m, v }, exact, copy, .. } = update;
            let n_items = v.numel();
            let copy = copy.map_or(Ok(0), Tensor::address_mut)?;
            words.extend([n_chunks as u64, grad.address()?, m.address_mut()?, v.address_mut()?, exact.address_mut()?]);
            words.extend([copy, n_items as u64, sizes]);
            n_chunks += n_items.div_ceil(CHUNK);
        }
        if n_chunks == 0 {
            return Ok(());
        }
        if words != self.words {
            self.table.upload_words(&words)?;
            self.words = words;
        }
        let defines = [define("A", arithmetic)];
        let args = [&[self.numbers.output()?][..], &rule.numbers().map(Arg::F64)].concat();
        cuda.launch(ADAMW, &defines, "set_rule", Grid::row(1, 32), &args)?;
        let n_parameters = Arg::I32((self.words.len() / WORDS) as i32);
        let args = [self.table.input()?, n_parameters, count(n_chunks), self.numbers.input()?];
        Ok(cuda.launch(ADAMW, &defines, "update_all", grid(cuda, n_chunks), &args)?)
    }
}
