//! The solve of a perceptron on a GPU: a launch per step forward, two per step back.
//!
//! Rows of the state know nothing of each other, so a block of threads keeps 32 of them through all stages of a step, and
//! each block has an adjoint scale of its own. Activations and gradients of one step wait in memory for the product that
//! makes gradients of weights of them.

use crate::solve::{OdeSolve, Points};
use crate::state_cuda::left_word;
use crate::{AdjointScaling, Error, Field, MlpField, Result, StateSum, Steps, Storage, Tableau, TimeInput};
use halfmode_autograd::{Cx, Outputs, Saved};
use halfmode_precision::{DType, Format, Precision};
use halfmode_tensor::cuda::{Arg, CudaDevice, Grid, Source, define};
use halfmode_tensor::{Device, Purpose, Target, Tensor};

const KERNELS: Source = Source { name: "mlp_step", text: include_str!("../kernels/mlp_step.cu") };

/// The kernels' numbers: rows of a block, threads of it, shared memory of the product for weights.
const ROWS: usize = 32;
const THREADS: usize = 256;
const PRODUCT_BYTES: usize = 2 * 4 * 32 * (128 + 8) * 2;
/// Blocks that share the product for weights, whatever the GPU, so that sums are formed in the same order on all.
const BLOCKS: usize = 132;
/// What registers and shared memory hold.
const MOST_STAGES: usize = 4;
const MOST_CHANNELS: usize = 128;
const MOST_HIDDEN: usize = 512;
/// Scalars of a double that hold what a block remembers of its scale.
const SCALE_WORDS: usize = 4;
/// What the kernel adds to an exponent to make it positive.
const EXPONENT_BIAS: i64 = 1024;

/// A solve that the kernels can do.
pub(crate) struct MlpSolve<'a> {
    solve: &'a OdeSolve,
    device: &'a Device,
    params: &'a [Tensor],
    tableau: &'static Tableau,
    storage: Precision,
    channels: usize,
    hidden: usize,
    /// Hidden layers.
    n_hidden: usize,
    has_time: bool,
    rows: usize,
}

/// Weights in the order of the kernels' products, and biases with zeros behind them.
struct Packed {
    weights: Tensor,
    biases: Tensor,
}

const fn padded(n: usize) -> usize {
    n.next_multiple_of(32)
}

impl<'a> MlpSolve<'a> {
    /// `None` where the kernels do not apply: on another device, for other fields, formats or larger layers, with
    /// steps that are chosen, states that are recomputed, or times that want gradients.
    pub(crate) fn of(
        solve: &'a OdeSolve,
        device: &'a Device,
        params: &'a [Tensor],
        state: &[&Tensor],
    ) -> Option<MlpSolve<'a>> {
        let (Field::Single(field), [state]) = (&solve.field, state) else { return None };
        let MlpField { channels, hidden, time } = field.as_mlp()?;
        let (options, precision, tableau) = (&solve.options, &solve.options.precision, solve.options.method.tableau());
        let storage = precision.velocity_storage();
        let (&width, weights) = (hidden.first()?, params.first()?.precision());
        let formats = storage.is_half()
            && precision.velocity.contraction.storage == storage
            && precision.accumulate == Precision::F32
            && precision.state == StateSum::Plain(Precision::F32)
            && precision.stored == storage
            && params.iter().all(|it| it.precision() == weights && it.precision() != Precision::F64);
        let sizes = tableau.n_stages() <= MOST_STAGES
            && (1..=MOST_CHANNELS).contains(channels)
            && (1..=MOST_HIDDEN).contains(&width)
            && hidden.iter().all(|it| *it == width)
            && params.len() == 2 * (hidden.len() + 1)
            && state.shape().last() == Some(channels)
            && state.numel() > 0;
        let plain = solve.times.is_some()
            && options.steps == Steps::Grid
            && options.storage == Storage::Trajectory
            && matches!(options.scaling, AdjointScaling::Dynamic(_) | AdjointScaling::Fixed { .. });
        (matches!(device.target(), Target::Cuda) && formats && sizes && plain).then(|| MlpSolve {
            solve,
            device,
            params,
            tableau,
            storage,
            channels: *channels,
            hidden: width,
            n_hidden: hidden.len(),
            has_time: *time == TimeInput::Concatenated,
            rows: state.numel() / channels,
        })
    }

    fn blocks(&self) -> usize {
        self.rows.div_ceil(ROWS)
    }

    fn defines(&self) -> Vec<String> {
        let mut defines = vec![
            define("T", self.storage),
            define("W", self.params[0].precision()),
            define("D", self.channels),
            define("H", self.hidden),
            define("HIDDEN", self.n_hidden),
        ];
        defines.extend(self.tableau.defines());
        defines
    }

    /// Shared memory of a step: activations twice, and slopes.
    fn grid(&self) -> Grid {
        let line = padded(self.channels).max(padded(self.hidden)) + 8;
        let tiles = (padded(self.channels) / 8).div_ceil(THREADS / 32);
        let shared = 2 * ROWS * line * 2 + self.tableau.n_stages() * tiles * 8 * THREADS * 4 + THREADS / 32 * 4;
        Grid { shared, ..Grid::row(self.blocks(), THREADS) }
    }

    /// Outputs and inputs of a layer.
    fn layer(&self, idx: usize) -> [usize; 2] {
        let c_out = if idx == self.n_hidden { self.channels } else { self.hidden };
        let c_in = if idx == 0 { self.channels + usize::from(self.has_time) } else { self.hidden };
        [c_out, c_in]
    }

    fn alloc(&self, len: usize, precision: Precision, purpose: Purpose) -> Result<Tensor> {
        Ok(self.device.alloc_unwritten([len], DType::real(precision), purpose)?)
    }

    fn pack(&self) -> Result<Packed> {
        let (d, h, n) = (padded(self.channels), padded(self.hidden), self.n_hidden);
        let mut weights = self.alloc(2 * (2 * d * h + (n - 1) * h * h), self.storage, Purpose::Workspace)?;
        let mut biases = self.alloc((n + 1) * h + d, Precision::F32, Purpose::Workspace)?;
        let Some(cuda) = self.device.as_cuda() else { return Ok(Packed { weights, biases }) };
        for (idx, layer) in self.params.chunks_exact(2).enumerate() {
            let [c_out, c_in] = self.layer(idx);
            let sizes = [idx, c_out, c_in].map(|it| Arg::I32(it as i32));
            let tensors = [layer[0].input()?, layer[1].input()?, weights.output()?, biases.output()?];
            let grid = cuda.grid(padded(c_out) * padded(c_in));
            cuda.launch(KERNELS, &self.defines(), "pack_weights", grid, &[&tensors[..], &sizes].concat())?;
        }
        Ok(Packed { weights, biases })
    }

    /// The state at the points asked for. What is not finite is an error, or while a step is recorded in the outputs.
    pub(crate) fn run(&self, cx: &Cx, y0: &Tensor, times: &[f64]) -> Result<(Outputs, Saved)> {
        let shape = y0.shape().clone();
        let (mut outputs, mut saved) = (Outputs::new(), Saved::new("odeint"));
        let packed = self.pack()?;
        let mut status = self.device.alloc([1], DType::real(Precision::F64), Purpose::Workspace)?;
        let mut y = y0.cast(Precision::F32, Purpose::Activation)?;
        let all = self.solve.points == Points::All;
        for (step, pair) in times.windows(2).enumerate() {
            let mut next = self.device.alloc_unwritten(shape.clone(), y.dtype(), Purpose::Activation)?;
            let kept = DType::real(self.storage);
            let mut kept = match cx.save {
                true => Some(self.device.alloc_unwritten(shape.clone(), kept, Purpose::Saved)?),
                false => None,
            };
            if let Some(cuda) = self.device.as_cuda() {
                let args = [
                    y.input()?,
                    next.output()?,
                    kept.as_mut().map_or(Ok(Arg::Null), Tensor::output)?,
                    packed.weights.input()?,
                    packed.biases.input()?,
                    status.output()?,
                    Arg::I32(self.rows as i32),
                    Arg::I32(step as i32),
                    Arg::F64(pair[0]),
                    Arg::F64(pair[1] - pair[0]),
                ];
                cuda.launch(KERNELS, &self.defines(), "step_forward", self.grid(), &args)?;
            }
            if let Some(kept) = &kept {
                saved = saved.share(cx, "row_states", kept);
            }
            let before = std::mem::replace(&mut y, next);
            if all {
                outputs.push(before);
            }
        }
        outputs.push(y);
        self.solve.settle(self.device, &status, times)?;
        for param in self.params {
            saved = saved.share(cx, "param", param);
        }
        Ok((outputs, saved))
    }

    /// Gradients by the first state and by the parameters.
    pub(crate) fn pull_back(
        &self,
        states: Vec<Tensor>,
        times: &[f64],
        grads: &mut [Option<Tensor>],
        needs_params: bool,
    ) -> Result<(Option<Tensor>, Vec<Option<Tensor>>)> {
        let all = self.solve.points == Points::All;
        let mut incoming = |point: usize| match all {
            true => grads.get_mut(point).and_then(Option::take),
            false if point + 1 == times.len() => grads.first_mut().and_then(Option::take),
            false => None,
        };
        let mut sweep = Sweep::new(self, needs_params)?;
        for (step, kept) in states.into_iter().enumerate().rev() {
            sweep.add(incoming(step + 1))?;
            sweep.step(&kept, step, times)?;
        }
        sweep.add(incoming(0))?;
        sweep.finish(times)
    }
}

/// The way back.
struct Sweep<'a> {
    solve: &'a MlpSolve<'a>,
    packed: Packed,
    adjoint: Option<Tensor>,
    /// Inputs of all layers and gradients of their sums, of one step.
    xs: Tensor,
    deltas: Tensor,
    scales: Tensor,
    inverse: Tensor,
    failure: Tensor,
    /// Gradients of all weights, summed in parts.
    sums: Option<Tensor>,
    is_first: bool,
}

impl<'a> Sweep<'a> {
    fn new(solve: &'a MlpSolve<'a>, needs_params: bool) -> Result<Self> {
        let (d, h, n) = (padded(solve.channels), padded(solve.hidden), solve.n_hidden);
        let (device, rows) = (solve.device, solve.tableau.n_stages() * solve.blocks() * ROWS);
        let f64s = |len: usize| device.alloc([len], DType::real(Precision::F64), Purpose::Workspace);
        let per_split = h * (d + 8) + (n - 1) * h * (h + 8) + d * (h + 8);
        let [_, splits] = solve.product_grid();
        Ok(Sweep {
            solve,
            packed: solve.pack()?,
            adjoint: None,
            xs: solve.alloc(rows * (d + n * h), solve.storage, Purpose::Workspace)?,
            deltas: solve.alloc(rows * (d + n * h), solve.storage, Purpose::Workspace)?,
            scales: f64s(solve.blocks() * SCALE_WORDS)?,
            inverse: solve.alloc(solve.blocks(), Precision::F32, Purpose::Workspace)?,
            failure: f64s(1)?,
            sums: match needs_params {
                true => Some(solve.alloc(splits * per_split, Precision::F32, Purpose::Workspace)?),
                false => None,
            },
            is_first: true,
        })
    }

    fn add(&mut self, cotangent: Option<Tensor>) -> Result<()> {
        let Some(cotangent) = cotangent else { return Ok(()) };
        match &mut self.adjoint {
            Some(sum) => sum.add_assign(&cotangent)?,
            None => {
                // A buffer of its own: steps write to it.
                self.adjoint = Some(match cotangent.precision() {
                    Precision::F32 => cotangent.copy(Purpose::Activation)?,
                    _ => cotangent.cast(Precision::F32, Purpose::Activation)?,
                });
            }
        }
        Ok(())
    }

    fn step(&mut self, kept: &Tensor, step: usize, times: &[f64]) -> Result<()> {
        let (Some(adjoint), Some(cuda)) = (&mut self.adjoint, self.solve.device.as_cuda()) else { return Ok(()) };
        let (time, h) = (Arg::F64(times[step]), Arg::F64(times[step + 1] - times[step]));
        let (defines, blocks) = (self.solve.defines(), self.solve.blocks());
        let tensors = [
            kept.input()?,
            adjoint.output()?,
            self.xs.output()?,
            self.deltas.output()?,
            self.packed.weights.input()?,
            self.packed.biases.input()?,
            self.scales.output()?,
            self.inverse.output()?,
            self.failure.output()?,
            Arg::I32(self.solve.rows as i32),
            Arg::I32(step as i32),
            time,
            h,
        ];
        let args = [&tensors[..], &self.solve.scaling()].concat();
        cuda.launch(KERNELS, &defines, "step_backward", self.solve.grid(), &args)?;
        if let Some(sums) = &mut self.sums {
            let [tiles, splits] = self.solve.product_grid();
            let grid = Grid { blocks: [tiles, splits, 1], threads: THREADS, shared: PRODUCT_BYTES };
            let args = [
                self.xs.input()?,
                self.deltas.input()?,
                self.inverse.input()?,
                sums.output()?,
                Arg::I32(blocks as i32),
                Arg::I32(i32::from(self.is_first)),
                time,
                h,
            ];
            cuda.launch(KERNELS, &defines, "weight_gradients", grid, &args)?;
            self.is_first = false;
        }
        Ok(())
    }

    fn finish(self, times: &[f64]) -> Result<(Option<Tensor>, Vec<Option<Tensor>>)> {
        let (solve, n_steps) = (self.solve, times.len() - 1);
        if let Some(word) = left_word(solve.device, &self.failure)?.filter(|it| *it > 0) {
            let (step, attempts) = ((word >> 32) as usize - 1, (word >> 16 & 0xffff) as u32);
            let scale = ((word & 0xffff) as f64 - EXPONENT_BIAS as f64).exp2();
            return Err(Error::NonFiniteAdjoint { step, n_steps, scale, attempts });
        }
        self.note(n_steps)?;
        let mut params = vec![None; solve.params.len()];
        let Some(sums) = &self.sums else { return Ok((self.adjoint, params)) };
        let reached = self.adjoint.is_some();
        let [_, splits] = solve.product_grid();
        for (idx, (grads, layer)) in params.chunks_exact_mut(2).zip(solve.params.chunks_exact(2)).enumerate() {
            let alloc = |like: &Tensor| {
                let (shape, dtype) = (like.shape().clone(), DType::real(Precision::F32));
                // Without an adjoint nothing is summed: gradients are zero.
                match reached {
                    true => solve.device.alloc_unwritten(shape, dtype, Purpose::Grad),
                    false => solve.device.alloc(shape, dtype, Purpose::Grad),
                }
            };
            let [mut weight, mut bias] = [alloc(&layer[0])?, alloc(&layer[1])?];
            if let (Some(cuda), true) = (solve.device.as_cuda(), reached) {
                let [c_out, c_in] = solve.layer(idx);
                let sizes = [splits, idx, c_out, c_in].map(|it| Arg::I32(it as i32));
                let args = [&[sums.input()?, weight.output()?, bias.output()?][..], &sizes].concat();
                let grid = cuda.grid(c_out * (c_in + 1));
                cuda.launch(KERNELS, &solve.defines(), "sum_gradients", grid, &args)?;
            }
            grads[0] = Some(weight);
            grads[1] = Some(bias);
        }
        Ok((self.adjoint, params))
    }

    /// Writes down what the scales did: of the block that retried most.
    fn note(&self, n_steps: usize) -> Result<()> {
        let is_recording = |it: &CudaDevice| it.context().is_recording();
        let solve = &self.solve.solve.options;
        if !matches!(solve.scaling, AdjointScaling::Dynamic(_)) || self.solve.device.as_cuda().is_none_or(is_recording)
        {
            return Ok(());
        }
        let words = self.scales.to_vec::<f64>()?;
        // The sixth of eight numbers of four bytes.
        let retries = words.chunks_exact(SCALE_WORDS).map(|it| (it[2].to_bits() >> 32) as usize).max().unwrap_or(0);
        let n_stages = self.solve.tableau.n_stages();
        solve.record.note(|record| {
            record.n_velocities += n_steps * n_stages;
            record.n_vjps += n_steps + retries;
            record.n_retries += retries;
        });
        Ok(())
    }
}

impl MlpSolve<'_> {
    /// Tiles of the product for weights, and splits of its rows.
    fn product_grid(&self) -> [usize; 2] {
        let tiles = (0..=self.n_hidden).map(|idx| {
            let [c_out, _] = self.layer(idx);
            let c_in = if idx == 0 { self.channels } else { self.hidden };
            padded(c_out).div_ceil(128) * padded(c_in).div_ceil(128)
        });
        let tiles: usize = tiles.sum();
        [tiles, (BLOCKS / tiles).clamp(1, self.tableau.n_stages() * self.blocks())]
    }

    fn scaling(&self) -> [Arg<'static>; 9] {
        let format = Format::from(self.storage);
        let (config, dynamic, exponent) = match self.solve.options.scaling {
            AdjointScaling::Dynamic(config) => (config, 1, config.first_exponent.unwrap_or(0)),
            AdjointScaling::Fixed { exponent } => (crate::ScaleConfig::DEFAULT, 0, exponent),
            _ => (crate::ScaleConfig::DEFAULT, 0, 0),
        };
        let is_set = config.first_exponent.is_some();
        let target = config.target.unwrap_or(1.0 / format.eps()) as f32;
        let low = (format.min_normal() * f64::from(crate::scaling::MARGIN_BITS).exp2()) as f32;
        let count = |n: u32| Arg::I32(n.max(1) as i32);
        [
            Arg::I32(dynamic + i32::from(dynamic == 1 && is_set)),
            Arg::I32(exponent),
            Arg::F32(target),
            Arg::F32(low),
            Arg::I32(config.min_exponent),
            Arg::I32(config.max_exponent),
            count(config.growth_interval),
            count(config.max_growth_interval),
            count(config.max_attempts),
        ]
    }
}
