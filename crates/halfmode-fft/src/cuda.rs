//! One axis over a whole tensor on a GPU: a batch of matrix products with the whole matrix of the axis.
//!
//! The folds that halve the multiplies on a CPU would cost a pass over memory here, where multiplies are free.

use crate::axis::{Axis, Weights};
use crate::planner::{Algorithm, AxisKind};
use crate::stage::{Direction, Stage};
use crate::table::{complex_matrix, real_matrix};
use crate::{Error, Result};
use halfmode_precision::{DType, Precision};
use halfmode_tensor::cuda::{Compute, Matmul, Scalar, Source, count, define};
use halfmode_tensor::{Device, Purpose, Tensor};
use std::sync::{Arc, Mutex, PoisonError};

const PLANES: Source = Source { name: "planes", text: include_str!("../kernels/planes.cu") };

/// The matrices of one axis, `[mode rows, grid rows]`, made when a storage first asks for them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Dense(Arc<Mutex<Vec<(Precision, Weights, Tensor)>>>);

impl Dense {
    pub(crate) fn new(algorithm: Option<Algorithm>) -> Result<Self> {
        match algorithm {
            None | Some(Algorithm::Matrix) => Ok(Dense::default()),
            Some(Algorithm::Fft) => Err(Error::Tensor(halfmode_tensor::Error::OnGpu)),
        }
    }

    fn matrix(&self, device: &Device, axis: &Axis, weights: Weights, precision: Precision) -> Result<Tensor> {
        let weights = if axis.kind() == AxisKind::Complex { Weights::Plain } else { weights };
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((.., matrix)) = known.iter().find(|it| (it.0, it.1) == (precision, weights)) {
            return Ok(matrix.clone());
        }
        let (n, k, shape) = (axis.n(), axis.k(), [axis.mode_rows(), axis.grid_rows()]);
        let matrix = if device.launches() {
            let values = match axis.kind() {
                AxisKind::Real => real_matrix(n, k, weights == Weights::Doubled),
                AxisKind::Complex => complex_matrix(n, k),
            };
            Tensor::from_slice(device, &values, shape, precision, Purpose::Table)?
        } else {
            device.alloc(shape, DType::real(precision), Purpose::Table)?
        };
        known.push((precision, weights, matrix.clone()));
        Ok(matrix)
    }
}

/// What holds both types exactly.
fn wider(a: Precision, b: Precision) -> Precision {
    match (a, b) {
        _ if a == b => a,
        (Precision::F64, _) | (_, Precision::F64) => Precision::F64,
        _ => Precision::F32,
    }
}

pub(crate) fn run(
    device: &Device,
    stage: &Stage<'_>,
    direction: Direction,
    input: &Tensor,
    output: &mut Tensor,
) -> Result<()> {
    let Some(dense) = stage.axis.dense() else { return Err(Error::Tensor(halfmode_tensor::Error::NotOnGpu)) };
    // Both operands of a product are of one type; a half product may be written as f32, nothing else mixes.
    let common = wider(input.precision(), output.precision());
    if stage.interleaved {
        return by_planes(device, stage, direction, common, input, output);
    }
    let input = input.cast(common, Purpose::Workspace)?;
    let matrix = dense.matrix(device, stage.axis, stage.weights, common)?;
    if output.precision() == common {
        return multiply(device, stage, direction, &matrix, &input, output);
    }
    let mut wide = device.alloc_unwritten(output.shape().clone(), DType::real(common), Purpose::Workspace)?;
    multiply(device, stage, direction, &matrix, &input, &mut wide)?;
    if let Some(cuda) = device.as_cuda() {
        cuda.convert(&wide, output)?;
    }
    Ok(())
}

/// A stage whose grid side is complex numbers: products are of planes, `[outer, n, (re, im), inner]`.
fn by_planes(
    device: &Device,
    stage: &Stage<'_>,
    direction: Direction,
    common: Precision,
    input: &Tensor,
    output: &mut Tensor,
) -> Result<()> {
    let stage = &Stage { interleaved: false, ..*stage };
    let shape = [stage.outer, stage.axis.grid_rows(), stage.inner];
    let mut planes = device.alloc_unwritten(shape, DType::real(common), Purpose::Workspace)?;
    if direction == Direction::ToModes {
        reorder(device, "to_planes", stage.inner, input, &mut planes)?;
        run(device, stage, direction, &planes, output)
    } else {
        run(device, stage, direction, input, &mut planes)?;
        reorder(device, "to_pairs", stage.inner, &planes, output)
    }
}

/// Between interleaved pairs and planes.
fn reorder(device: &Device, entry: &str, inner: usize, x: &Tensor, y: &mut Tensor) -> Result<()> {
    let n = y.numel() * y.dtype().domain.scalars() / 2;
    let Some(cuda) = device.as_cuda().filter(|_| n > 0) else { return Ok(()) };
    let defines = [define("S", x.precision()), define("T", y.precision())];
    let args = [x.input()?, y.output()?, count(n), count(inner)];
    Ok(cuda.launch(PLANES, &defines, entry, cuda.grid(n), &args)?)
}

fn multiply(
    device: &Device,
    stage: &Stage<'_>,
    direction: Direction,
    matrix: &Tensor,
    input: &Tensor,
    output: &mut Tensor,
) -> Result<()> {
    let Some(cuda) = device.as_cuda() else { return Ok(()) };
    let (modes, grid) = (stage.axis.mode_rows(), stage.axis.grid_rows());
    let (m, k) = if direction == Direction::ToModes { (modes, grid) } else { (grid, modes) };
    let n = stage.inner;
    let compute = Compute::of(input.precision(), stage.compute);
    cuda.matmul(&Matmul {
        m,
        n,
        k,
        batch: stage.outer,
        a: matrix.operand(0, grid, 0, direction == Direction::ToGrid)?,
        b: input.operand(0, n, k * n, false)?,
        c: output.result(0, n, m * n)?,
        factors: Scalar { scale: stage.scale, keep: 0.0 },
        compute,
    })?;
    Ok(())
}
