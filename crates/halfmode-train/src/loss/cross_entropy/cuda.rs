//! Cross entropy on a GPU. Labels travel with the launches, so that nothing is copied and nothing waits.

use super::CrossEntropy;
use crate::Result;
use halfmode_precision::{DType, Precision};
use halfmode_tensor::cuda::{Arg, CudaDevice, Grid, Source, define};
use halfmode_tensor::{Purpose, Tensor};

const KERNELS: Source = Source { name: "cross_entropy", text: include_str!("../../../kernels/cross_entropy.cu") };

/// Rows of a launch, and labels in a number: the kernels' counts.
const ROWS: usize = 64;
const PER_WORD: usize = 4;

fn defines([logits, loss, grad]: [Precision; 3]) -> [String; 3] {
    [define("X", logits), define("L", loss), define("T", grad)]
}

/// Labels travel in 16 bits.
pub(super) fn check(n_classes: usize) -> Result<()> {
    if n_classes > 1 << 16 { Err(halfmode_tensor::Error::OnGpu.into()) } else { Ok(()) }
}

impl CrossEntropy {
    /// Calls with what a kernel is told of every 64 rows.
    fn each_run(&self, n_classes: usize, mut launch: impl FnMut(&[Arg<'_>]) -> Result<()>) -> Result<()> {
        for (idx, labels) in self.labels.chunks(ROWS).enumerate() {
            let word = |word: &[usize]| word.iter().rev().fold(0u64, |word, &label| word << 16 | label as u64);
            let mut words: Vec<u64> = labels.chunks(PER_WORD).map(word).collect();
            words.resize(ROWS / PER_WORD, 0);
            let mut args = [idx * ROWS, labels.len(), n_classes].map(|n| Arg::I32(n as i32)).to_vec();
            args.extend(words.into_iter().map(|word| Arg::I64(word.cast_signed())));
            launch(&args)?;
        }
        Ok(())
    }

    /// Writes the loss.
    pub(super) fn launch_loss(&self, logits: &Tensor, n_classes: usize, loss: &mut Tensor) -> Result<()> {
        let (n, dtype) = (self.labels.len(), DType::real(Precision::F64));
        let mut rows = logits.device().alloc_unwritten([n.max(1)], dtype, Purpose::Workspace)?;
        let Some(cuda) = logits.device().as_cuda().filter(|_| n > 0) else { return Ok(()) };
        let defines = defines([logits.precision(), loss.precision(), loss.precision()]);
        self.each_run(n_classes, |run| {
            let args = [&[logits.input()?, rows.output()?][..], run].concat();
            Ok(cuda.launch(KERNELS, &defines, "row_losses", Grid::row(1, ROWS), &args)?)
        })?;
        let args = [rows.input()?, loss.output()?, Arg::F64(self.share()), Arg::I32(n as i32)];
        Ok(cuda.launch(KERNELS, &defines, "sum_losses", Grid::row(1, 256), &args)?)
    }

    /// Writes the gradient of the logits.
    pub(super) fn launch_gradient(
        &self,
        cuda: &CudaDevice,
        [logits, g]: [&Tensor; 2],
        n_classes: usize,
        grad: &mut Tensor,
    ) -> Result<()> {
        let defines = defines([logits.precision(), g.precision(), grad.precision()]);
        self.each_run(n_classes, |run| {
            let tensors = [logits.input()?, g.input()?, grad.output()?, Arg::F64(self.share())];
            let args = [&tensors[..], run].concat();
            Ok(cuda.launch(KERNELS, &defines, "gradient", Grid::row(1, ROWS), &args)?)
        })
    }
}
