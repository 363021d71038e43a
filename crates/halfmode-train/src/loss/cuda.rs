//! The losses on a GPU. Norms and the loss stay there: nothing waits between forward and backward.

use super::field_loss::FieldLoss;
use super::fields::{self, Fields};
use crate::Result;
use halfmode_autograd::{Cx, Outputs, Saved};
use halfmode_precision::{DType, Domain, Precision};
use halfmode_tensor::cuda::{Arg, Grid, Source, count, define};
use halfmode_tensor::{Purpose, Tensor};

const FIELD_LOSS: Source = Source { name: "field_loss", text: include_str!("../../kernels/field_loss.cu") };

/// Threads of a block, as in the kernels.
const THREADS: usize = 256;
/// The fewest scalars of a tile, and the most tiles of a field.
const SPAN: usize = 1024;
const MAX_TILES: usize = 512;
/// Axes that the kernels know.
const MAX_AXES: usize = 3;

/// How fields are cut into tiles; depends on their shape alone, and so does the order of sums.
struct Tiles {
    n_points: usize,
    n_tiles: usize,
    span: usize,
    n_blocks: usize,
}

impl Tiles {
    fn new(fields: &Fields) -> Self {
        let n_points = fields.n_points;
        // Real and imaginary parts stay together.
        let span = n_points.div_ceil(MAX_TILES).max(SPAN).next_multiple_of(2);
        let n_tiles = n_points.div_ceil(span);
        Tiles { n_points, n_tiles, span, n_blocks: fields.n_fields * n_tiles }
    }

    fn grid(&self) -> Grid {
        Grid::row(self.n_blocks, THREADS)
    }

    fn args(&self) -> [Arg<'static>; 3] {
        [count(self.n_points), Arg::I32(self.n_tiles as i32), count(self.span)]
    }
}

/// Kernel definitions: storage of prediction and target, arithmetic, storage of the loss.
fn defines(x: &Tensor, y: &Tensor, accumulate: Precision, loss: Precision) -> [String; 4] {
    [define("P", x.precision()), define("Y", y.precision()), define("A", accumulate), define("L", loss)]
}

impl FieldLoss<'_> {
    fn relative(&self) -> bool {
        match self {
            FieldLoss::Lp(loss) => loss.relative,
            FieldLoss::H1(loss) => loss.relative,
        }
    }

    /// The exponent of the norm, and the kernels' name of it: 0 where `powf` is needed.
    fn exponent(&self, fields: &Fields) -> (i32, f64) {
        let FieldLoss::Lp(loss) = self else { return (2, 2.0) };
        let is = |p: f64| loss.p.to_bits() == p.to_bits();
        let code = match fields.domain {
            _ if is(2.0) => 2,
            Domain::Real if is(1.0) => 1,
            _ => 0,
        };
        (code, loss.p)
    }

    /// What the error of each field is multiplied with, but for the target's norm.
    fn share(&self, fields: &Fields) -> f64 {
        let (reduction, measure, root) = match self {
            FieldLoss::Lp(loss) => (loss.reduction, loss.measure, 1.0 / loss.p),
            FieldLoss::H1(loss) => (loss.reduction, loss.measure, 0.5),
        };
        let quadrature = if self.relative() { 1.0 } else { fields.spacing(measure).product::<f64>().powf(root) };
        fields::weight(reduction, fields.n_fields, quadrature, None)
    }

    /// What a kernel needs to know about the norm after everything else: grid and slopes, or the exponent.
    fn norm_args(&self, fields: &Fields) -> Result<Vec<Arg<'static>>> {
        let pairs = Arg::I32((fields.domain == Domain::Complex).into());
        let FieldLoss::H1(loss) = self else {
            let (code, p) = self.exponent(fields);
            return Ok(vec![Arg::I32(code), Arg::F64(p), pairs]);
        };
        let n_axes = fields.n_axes();
        if n_axes > MAX_AXES || i32::try_from(fields.n_points).is_err() {
            return Err(halfmode_tensor::Error::OnGpu.into());
        }
        let (mut extents, mut slopes, mut periodic) = ([1; MAX_AXES], [0.0; MAX_AXES], 0);
        for (axis, (&n, h)) in fields.grid.iter().zip(fields.spacing(loss.measure)).take(n_axes).enumerate() {
            let at = MAX_AXES - n_axes + axis;
            (extents[at], slopes[at]) = (n as i32, 0.5 / h);
            periodic |= i32::from(loss.periodic.get(axis).copied().unwrap_or(true)) << at;
        }
        let mut args = extents.map(Arg::I32).to_vec();
        args.extend(slopes.map(Arg::F64));
        args.extend([Arg::I32(periodic), pairs]);
        Ok(args)
    }

    fn entry(&self, lp: &'static str, h1: &'static str) -> &'static str {
        if matches!(self, FieldLoss::Lp(_)) { lp } else { h1 }
    }
}

/// The loss, and what backward needs.
pub(super) fn forward(
    op: &'static str,
    loss: FieldLoss<'_>,
    cx: &Cx,
    fields: &Fields,
    [x, y]: [&Tensor; 2],
) -> Result<(Outputs, Saved)> {
    let (tiles, accumulate) = (Tiles::new(fields), fields::accumulate(cx, x, y));
    let sums = DType::real(Precision::F64);
    let mut parts = cx.device.alloc_unwritten([tiles.n_blocks, 2], sums, Purpose::Workspace)?;
    let shape = [x.shape()[0], x.shape()[1], 2];
    let kept = || cx.device.alloc_unwritten(shape, DType::real(accumulate), Purpose::Saved);
    let mut norms = cx.save.then(kept).transpose()?;
    let storage = cx.policy.loss.storage;
    let mut value = cx.device.alloc_unwritten([1], DType::real(storage), Purpose::Activation)?;
    if let Some(cuda) = cx.device.as_cuda() {
        let defines = defines(x, y, accumulate, storage);
        let launch = |entry, grid, args: &[Arg<'_>]| cuda.launch(FIELD_LOSS, &defines, entry, grid, args);
        let relative = Arg::I32(loss.relative().into());
        let fields_args = [x.input()?, y.input()?, parts.output()?];
        let args = [&fields_args[..], &tiles.args(), &[relative], &loss.norm_args(fields)?].concat();
        launch(loss.entry("lp_sums", "h1_sums"), tiles.grid(), &args)?;
        let norms = norms.as_mut().map_or(Ok(Arg::Null), Tensor::output)?;
        let (code, p) = loss.exponent(fields);
        let sizes = [count(fields.n_fields), Arg::I32(tiles.n_tiles as i32), relative];
        let rest = [Arg::I32(code), Arg::F64(p), Arg::F64(loss.share(fields))];
        let args = [&[parts.input()?, norms, value.output()?][..], &sizes, &rest].concat();
        launch("finish", Grid::row(1, THREADS), &args)?;
    }
    let mut saved = Saved::new(op);
    if let Some(norms) = &norms {
        saved = saved.share(cx, "prediction", x).share(cx, "target", y).share(cx, "norms", norms);
    }
    Ok(([value].into_iter().collect(), saved))
}

/// The gradient of the prediction.
pub(super) fn backward(
    op: &'static str,
    loss: FieldLoss<'_>,
    cx: &Cx,
    mut saved: Saved,
    seed: &Tensor,
) -> Result<Tensor> {
    let (x, y, norms) = (saved.take("prediction")?, saved.take("target")?, saved.take("norms")?);
    let fields = Fields::of(op, &x)?;
    let tiles = Tiles::new(&fields);
    let mut grad = cx.device.alloc_unwritten(x.shape().clone(), x.dtype(), Purpose::Activation)?;
    if let Some(cuda) = cx.device.as_cuda() {
        let defines = defines(&x, &y, norms.precision(), seed.precision());
        let tensors = [x.input()?, y.input()?, norms.input()?, seed.input()?, grad.output()?];
        let args = [&tensors[..], &tiles.args(), &loss.norm_args(&fields)?].concat();
        cuda.launch(FIELD_LOSS, &defines, loss.entry("lp_gradient", "h1_gradient"), tiles.grid(), &args)?;
    }
    Ok(grad)
}
