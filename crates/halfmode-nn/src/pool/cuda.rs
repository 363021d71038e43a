//! Means over windows on a GPU.

use super::AveragePool;
use crate::Result;
use crate::pointwise::storage;
use halfmode_autograd::Cx;
use halfmode_tensor::cuda::{Arg, Grid, Source, count, define};
use halfmode_tensor::{Purpose, Tensor};

const KERNELS: Source = Source { name: "pool", text: include_str!("../../kernels/pool.cu") };

/// Points of a window that one thread sums at most.
const SMALL: usize = 64;

impl AveragePool {
    /// Kernels count windows, points of a window and extents in 32 bits.
    fn check(&self, [batch, c]: [usize; 2]) -> Result<()> {
        let ([n1, n2], [m1, m2], [w1, w2]) = (self.field, self.n_windows(), self.window);
        let sizes = [n1, n2, c, w1.saturating_mul(w2), batch.saturating_mul(m1).saturating_mul(m2)];
        match sizes.iter().all(|&n| n < 1 << 30) {
            true => Ok(()),
            false => Err(halfmode_tensor::Error::OnGpu.into()),
        }
    }

    fn numbers(&self, c: usize) -> [Arg<'static>; 7] {
        let ([n1, n2], [m1, m2], [w1, w2]) = (self.field, self.n_windows(), self.window);
        [n1, n2, m1, m2, w1, w2, c].map(|n| Arg::I32(n as i32))
    }
}

/// `[batch, m_1, m_2, c]` from `[batch, n_1, n_2, c]`.
pub(super) fn run(pool: &AveragePool, cx: &Cx, x: &Tensor, [batch, c]: [usize; 2]) -> Result<Tensor> {
    pool.check([batch, c])?;
    let [m1, m2] = pool.n_windows();
    let mut y = cx.device.alloc_unwritten([batch, m1, m2, c], storage(cx), Purpose::Activation)?;
    let n = y.numel();
    let Some(cuda) = cx.device.as_cuda().filter(|_| n > 0) else { return Ok(y) };
    let defines = [define("S", x.precision()), define("T", y.precision())];
    let mut args = [&[x.input()?, y.output()?][..], &pool.numbers(c)].concat();
    if pool.window[0] * pool.window[1] > SMALL {
        let grid = Grid { blocks: [batch * m1 * m2, c.div_ceil(32), 1], threads: 256, shared: 0 };
        cuda.launch(KERNELS, &defines, "pool_large", grid, &args)?;
    } else {
        args.push(count(n));
        cuda.launch(KERNELS, &defines, "pool", cuda.grid(n), &args)?;
    }
    Ok(y)
}

/// `[batch, n_1, n_2, c]` from `[batch, m_1, m_2, c]`.
pub(super) fn adjoint(pool: &AveragePool, cx: &Cx, g: &Tensor, [batch, c]: [usize; 2]) -> Result<Tensor> {
    pool.check([batch, c])?;
    let [n1, n2] = pool.field;
    let mut gx = cx.device.alloc_unwritten([batch, n1, n2, c], storage(cx), Purpose::Activation)?;
    let n = gx.numel();
    let Some(cuda) = cx.device.as_cuda().filter(|_| n > 0) else { return Ok(gx) };
    let defines = [define("S", g.precision()), define("T", gx.precision())];
    let args = [&[g.input()?, gx.output()?][..], &pool.numbers(c), &[count(n)]].concat();
    cuda.launch(KERNELS, &defines, "pool_backward", cuda.grid(n), &args)?;
    Ok(gx)
}
