//! The solve of a planar field on a GPU: all steps in one launch.
//!
//! Coefficients of the flows depend on the time alone. They are computed for all times at which stages ask as one small
//! batch, on a tape of their own in single precision; kernels then carry points through the steps in registers.

use crate::solve::{OdeSolve, Points};
use crate::state_cuda::upload_f64s;
use crate::{AdjointScaling, Field, PlanarField, Result, StateSum, Steps, Storage, Tableau};
use halfmode_autograd::{Cx, LeafId, Outputs, Saved, Tape, Var};
use halfmode_precision::{DType, Precision, PrecisionPolicy};
use halfmode_tensor::cuda::{Arg, Grid, Source, count, define};
use halfmode_tensor::{Device, Purpose, Target, Tensor};
use std::sync::Arc;

const KERNELS: Source = Source { name: "planar_solve", text: include_str!("../kernels/planar_solve.cu") };

/// The kernels' numbers: threads of a block, points of it.
const THREADS: usize = 256;
const WARPS: usize = THREADS / 32;
const POINTS: usize = 2 * WARPS;
/// What registers and shared memory hold.
const MOST_STAGES: usize = 4;
const MOST_AXES: usize = 8;
const MOST_SHARED: usize = 160 << 10;
/// Steps whose sums wait for one reduction.
const CHUNK: usize = 16;

/// A solve that the kernels can do.
pub(crate) struct PlanarSolve<'a> {
    solve: &'a OdeSolve,
    device: &'a Device,
    params: &'a [Tensor],
    tableau: &'static Tableau,
    field: PlanarField,
    stored: Precision,
    rows: usize,
    /// Which of a step's different times each stage asks at.
    nodes: Vec<usize>,
}

/// Coefficients of the flows at all nodes, still on their tape, and what kernels read.
struct Prepared {
    tape: Tape,
    coefficients: Var,
    table: Tensor,
    grid: Tensor,
}

impl<'a> PlanarSolve<'a> {
    /// `None` where the kernels do not apply: on another device, for other fields and formats, with steps that are
    /// chosen, states that are found again, or times that want gradients.
    pub(crate) fn of(
        solve: &'a OdeSolve,
        device: &'a Device,
        params: &'a [Tensor],
        state: [&Tensor; 2],
    ) -> Option<PlanarSolve<'a>> {
        let Field::Tuple(field) = &solve.field else { return None };
        let field = *field.as_planar()?;
        let (options, precision, tableau) = (&solve.options, &solve.options.precision, solve.options.method.tableau());
        let narrow = |it: Precision| it != Precision::F64;
        let plain = |idx: usize| precision.leaf(idx).state == StateSum::Plain(Precision::F32);
        let formats = precision.accumulate == Precision::F32
            && plain(0)
            && plain(1)
            && narrow(precision.leaf(0).stored)
            && params.iter().all(|it| narrow(it.precision()));
        let [z, l] = state;
        let rows = z.numel() / field.dim.max(1);
        let sizes = tableau.n_stages() <= MOST_STAGES
            && (1..=MOST_AXES).contains(&field.dim)
            && field.n_flows > 0
            && WARPS * field.n_flows * (2 * field.dim + 2) * 4 <= MOST_SHARED
            && params.len() == 6
            && z.shape().last() == Some(&field.dim)
            && l.numel() == rows
            && rows > 0;
        let on_grid = solve.times.is_some()
            && options.steps == Steps::Grid
            && options.storage == Storage::Trajectory
            && matches!(options.scaling, AdjointScaling::Dynamic(_) | AdjointScaling::Fixed { .. });
        if !(matches!(device.target(), Target::Cuda) && formats && sizes && on_grid) {
            return None;
        }
        let (stored, mut different, mut nodes) = (precision.leaf(0).stored, Vec::new(), Vec::new());
        for c in tableau.c {
            let known = different.iter().position(|it: &f64| it.to_bits() == c.to_bits());
            nodes.push(known.unwrap_or(different.len()));
            if known.is_none() {
                different.push(*c);
            }
        }
        Some(PlanarSolve { solve, device, params, tableau, field, stored, rows, nodes })
    }

    fn n_nodes(&self) -> usize {
        self.nodes.iter().max().map_or(1, |it| it + 1)
    }

    /// Entries of the table at one node.
    fn entries(&self) -> usize {
        self.field.n_flows * (2 * self.field.dim + 2)
    }

    fn defines(&self) -> Vec<String> {
        let mut defines = vec![
            define("T", self.stored),
            define("DIM", self.field.dim),
            define("FLOWS", self.field.n_flows),
            define("NODES", self.n_nodes()),
        ];
        defines.extend(self.tableau.defines());
        defines.extend(self.nodes.iter().enumerate().skip(1).map(|(j, node)| define(&format!("N{j}"), node)));
        defines
    }

    fn f32s(&self, len: usize, purpose: Purpose) -> Result<Tensor> {
        Ok(self.device.alloc_unwritten([len], DType::real(Precision::F32), purpose)?)
    }

    fn prepare(&self, times: &[f64], needs_gradient: bool) -> Result<Prepared> {
        let (n_steps, n_nodes) = (times.len() - 1, self.n_nodes());
        let n = n_steps * n_nodes;
        let policy = Arc::new(PrecisionPolicy::full());
        let mut tape = match needs_gradient {
            true => Tape::new(Cx::new(self.device, &policy)),
            false => Tape::new(Cx::inference(self.device, &policy)),
        };
        let grid = upload_f64s(self.device, times)?;
        let f32 = DType::real(Precision::F32);
        let mut t = self.device.alloc_unwritten([n, 1], f32, Purpose::Workspace)?;
        let mut table = self.f32s(n * self.entries(), Purpose::Workspace)?;
        if let Some(cuda) = self.device.as_cuda() {
            let args = [grid.input()?, t.output()?, Arg::I32(n_steps as i32)];
            cuda.launch(KERNELS, &self.defines(), "node_times", cuda.grid(n), &args)?;
        }
        let params = self.params.iter().map(|it| match it.precision() {
            Precision::F32 => Ok(it.clone()),
            _ => it.cast(Precision::F32, Purpose::Workspace),
        });
        let params = params.collect::<std::result::Result<Vec<_>, _>>()?;
        let params: Vec<Var> = params.into_iter().map(|it| tape.leaf(it)).collect();
        let t = tape.constant(t);
        let coefficients = self.field.coefficients(&mut tape, &t, &params)?;
        if let Some(cuda) = self.device.as_cuda() {
            let rows = n * self.field.n_flows;
            let args = [coefficients.value().input()?, table.output()?, count(rows)];
            cuda.launch(KERNELS, &self.defines(), "prepare", cuda.grid(rows), &args)?;
        }
        Ok(Prepared { tape, coefficients, table, grid })
    }

    fn launch_grid(&self) -> Grid {
        Grid::row(self.rows.div_ceil(POINTS), THREADS)
    }

    /// Points and log-densities at the times asked for. What is not finite is an error, or while a step is recorded in
    /// the outputs.
    pub(crate) fn run(&self, cx: &Cx, [z0, l0]: [&Tensor; 2], times: &[f64]) -> Result<(Outputs, Saved)> {
        let (n_steps, f32) = (times.len() - 1, DType::real(Precision::F32));
        let (mut outputs, mut saved) = (Outputs::new(), Saved::new("odeint"));
        let Prepared { table, grid, .. } = self.prepare(times, false)?;
        let mut status = self.device.alloc([1], DType::real(Precision::F64), Purpose::Workspace)?;
        let mut kept = match cx.save {
            true => {
                let len = [n_steps * self.rows * self.field.dim];
                Some(self.device.alloc_unwritten(len, DType::real(self.stored), Purpose::Saved)?)
            }
            false => None,
        };
        let mut state = [z0.cast(Precision::F32, Purpose::Activation)?, l0.cast(Precision::F32, Purpose::Activation)?];
        // One launch for all steps, or up to the next point that is asked for.
        let all = self.solve.points == Points::All;
        let length = if all { 1 } else { n_steps };
        for first in (0..n_steps).step_by(length) {
            let mut z = self.device.alloc_unwritten(z0.shape().clone(), f32, Purpose::Activation)?;
            let mut l = self.device.alloc_unwritten(l0.shape().clone(), f32, Purpose::Activation)?;
            if let Some(cuda) = self.device.as_cuda() {
                let args = [
                    state[0].input()?,
                    state[1].input()?,
                    z.output()?,
                    l.output()?,
                    kept.as_mut().map_or(Ok(Arg::Null), Tensor::output)?,
                    table.input()?,
                    grid.input()?,
                    status.output()?,
                    Arg::I32(self.rows as i32),
                    Arg::I32(first as i32),
                    Arg::I32((first + length) as i32),
                ];
                cuda.launch(KERNELS, &self.defines(), "planar_forward", self.launch_grid(), &args)?;
            }
            let before = std::mem::replace(&mut state, [z, l]);
            if all {
                outputs.extend(before);
            }
        }
        outputs.extend(state);
        self.solve.settle(self.device, &status, times)?;
        if let Some(kept) = &kept {
            saved = saved.share(cx, "points", kept).share(cx, "z", z0).share(cx, "l", l0);
        }
        for param in self.params {
            saved = saved.share(cx, "param", param);
        }
        Ok((outputs, saved))
    }

    /// Gradients by points, log-densities and parameters.
    pub(crate) fn pull_back(
        &self,
        kept: &Tensor,
        shapes: [&Tensor; 2],
        times: &[f64],
        grads: &mut [Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>> {
        let (n_steps, n_nodes, all) = (times.len() - 1, self.n_nodes(), self.solve.points == Points::All);
        let Prepared { tape, coefficients, table, grid } = self.prepare(times, true)?;
        let shape = coefficients.value().shape().clone();
        let f32 = DType::real(Precision::F32);
        let mut of_coefficients = self.device.alloc_unwritten(shape, f32, Purpose::Workspace)?;
        let mut adjoint = Vec::new();
        for like in shapes {
            adjoint.push(self.device.alloc(like.shape().clone(), f32, Purpose::Activation)?);
        }
        let [mut gz, mut gl]: [Tensor; 2] = match <[Tensor; 2]>::try_from(adjoint) {
            Ok(both) => both,
            Err(_) => return Err(halfmode_tensor::Error::NotOnGpu.into()),
        };
        let blocks = self.launch_grid().blocks[0];
        let chunk = if all { 1 } else { CHUNK.min(n_steps) };
        let mut partial = self.f32s(blocks * chunk * n_nodes * self.entries(), Purpose::Workspace)?;
        let mut add = |point: usize, gz: &mut Tensor, gl: &mut Tensor| -> Result<()> {
            let first = if all { Some(2 * point) } else { (point == n_steps).then_some(0) };
            let Some(first) = first else { return Ok(()) };
            for (idx, sum) in [gz, gl].into_iter().enumerate() {
                if let Some(cotangent) = grads.get_mut(first + idx).and_then(Option::take) {
                    sum.add_assign(&cotangent)?;
                }
            }
            Ok(())
        };
        let mut end = n_steps;
        while end > 0 {
            add(end, &mut gz, &mut gl)?;
            let first = end.saturating_sub(chunk);
            if let Some(cuda) = self.device.as_cuda() {
                let args = [
                    kept.input()?,
                    gz.output()?,
                    gl.input()?,
                    table.input()?,
                    partial.output()?,
                    grid.input()?,
                    Arg::I32(self.rows as i32),
                    Arg::I32(first as i32),
                    Arg::I32(end as i32),
                ];
                let shared = WARPS * self.entries() * 4;
                let launch = Grid { shared, ..self.launch_grid() };
                cuda.launch(KERNELS, &self.defines(), "planar_backward", launch, &args)?;
                let nodes = (end - first) * n_nodes;
                let offset = Arg::I32((first * n_nodes) as i32);
                let args = [
                    partial.input()?,
                    coefficients.value().input()?,
                    of_coefficients.output()?,
                    Arg::I32(blocks as i32),
                    Arg::I32(nodes as i32),
                    offset,
                ];
                let items = nodes * self.field.n_flows;
                cuda.launch(KERNELS, &self.defines(), "coefficient_gradients", cuda.grid(items), &args)?;
            }
            end = first;
        }
        add(0, &mut gz, &mut gl)?;
        let mut out = vec![Some(gz), Some(gl)];
        out.extend(std::iter::repeat_n(None, self.params.len()));
        tape.backward_from(vec![(coefficients, of_coefficients)], &mut |LeafId(idx), grad| {
            if let Some(slot) = out.get_mut(2 + idx) {
                *slot = Some(grad);
            }
            Ok(())
        })?;
        self.solve.options.record.note(|record| {
            record.n_velocities += n_steps * self.tableau.n_stages();
            record.n_vjps += n_steps;
        });
        Ok(out)
    }
}
