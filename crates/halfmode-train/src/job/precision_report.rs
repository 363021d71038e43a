//! What the formats of a job do to its numbers, op by op, and what that does to its predictions.

use crate::job::observer::nan_from_null;
use crate::job::{JobError, Trainer};
use halfmode_autograd::{Cx, Role, Tape};
use halfmode_nn::Module;
use halfmode_precision::{Domain, Format, Precision, PrecisionPolicy};
use halfmode_tensor::{Purpose, Tensor};
use ndarray::{ArrayD, Slice};
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

/// One tensor of a training step: what its format does to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrecisionRow {
    /// The op, and which of its kind: `fno_block 2`.
    pub op: String,
    /// What the tensor is to the op: `output`, `saved x_hat`, `gradient`.
    pub tensor: String,
    /// The format that it is stored in.
    pub format: String,
    /// Largest magnitude, in the replay.
    #[serde(deserialize_with = "nan_from_null")]
    pub absmax: f64,
    /// Factors of two between that and the largest finite number; `None` if all values are zero.
    pub headroom_bits: Option<f64>,
    /// Share of values that are not zero and become zero.
    pub flushed: f64,
    /// Share of values that keep fewer significand bits because they are subnormal.
    pub subnormal: f64,
    /// Share of values beyond the largest finite number.
    pub saturated: f64,
    /// Relative L2 distance from the replay: all roundings up to here. `None` where nothing is rounded.
    pub error: Option<f64>,
}

/// The effect of a grid of half the points on predictions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Discretisation {
    /// Points per axis.
    pub grid: Vec<usize>,
    /// Points per axis of the coarsened data.
    pub coarse: Vec<usize>,
    /// Mean relative L2 distance between both predictions, on the points that both have.
    #[serde(deserialize_with = "nan_from_null")]
    pub error: f64,
}

/// `precision.json`: one training batch in the job's formats beside its replay in f32.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrecisionReport {
    /// Samples of the batch.
    pub n_samples: usize,
    /// The loss scale that gradients carry.
    pub loss_scale: f64,
    /// One row per tensor, in the order of the step.
    pub rows: Vec<PrecisionRow>,
    /// Mean relative L2 distance of test predictions from their replay in f32; `None` where nothing is
    /// rounded.
    pub rounding: Option<f64>,
    /// The same for coarsened data; `None` where the grid cannot be halved, as for complex fields: which frequencies
    /// their models keep depends on the grid.
    pub discretisation: Option<Discretisation>,
}

impl PrecisionReport {
    /// Rounding error beside discretisation error, in one sentence.
    #[must_use]
    pub fn sentence(&self) -> Option<String> {
        let grid = |grid: &[usize]| grid.iter().map(usize::to_string).collect::<Vec<_>>().join("x");
        match (self.rounding, &self.discretisation) {
            (Some(rounding), Some(it)) => {
                let ratio = it.error / rounding.max(f64::MIN_POSITIVE);
                let verdict = if ratio >= 1.0 {
                    format!("rounding is {ratio:.0} times below discretisation")
                } else {
                    format!("rounding is {:.1} times above discretisation: `full` would tell more", 1.0 / ratio)
                };
                Some(format!(
                    "Rounding moves test predictions by {rounding:.1e} (relative L2, against f32), halving the grid \
                     from {} to {} by {:.1e}: {verdict}.",
                    grid(&it.grid),
                    grid(&it.coarse),
                    it.error
                ))
            }
            (None, Some(it)) => Some(format!(
                "All is stored in f32; halving the grid from {} to {} moves test predictions by {:.1e} (relative L2).",
                grid(&it.grid),
                grid(&it.coarse),
                it.error
            )),
            (Some(rounding), None) => Some(format!(
                "Rounding moves test predictions by {rounding:.1e} (relative L2, against f32); the grid cannot be \
                 halved to set discretisation beside it."
            )),
            (None, None) => None,
        }
    }
}

/// A tensor that was seen, by call and role.
type Sights = Vec<((usize, Role), &'static str, Tensor)>;

/// A batch is replayed in part: the replay keeps all that it compares.
const SHARE_OF_BATCH: usize = 4;

impl Trainer {
    /// Replays a part of one batch in f32, from the same exact weights, and compares.
    ///
    /// # Errors
    /// Those of the model and of memory.
    pub fn precision_report(&self) -> Result<PrecisionReport, JobError> {
        let n_samples = self.config().train.batch_size.div_ceil(SHARE_OF_BATCH).min(self.n_train());
        let indices: Vec<usize> = (0..n_samples).collect();
        let own = Arc::new(self.policy().clone());
        let replay = Arc::new(PrecisionPolicy::full());
        let is_rounded = *own != *replay;
        let wide = self.sights(&replay, &indices)?;
        let stored = if is_rounded { Some(self.sights(&own, &indices)?) } else { None };
        let rows = compare(stored.as_ref().unwrap_or(&wide), &wide, is_rounded)?;

        let (mut rounding, mut discretisation) = (None, None);
        if self.test_labels().next().is_some() {
            let test = self.test(0);
            let n = n_samples.min(test.shape.n);
            let x = test.x().batch(&(0..n).collect::<Vec<_>>())?;
            let fine = self.prediction(&replay, &x)?;
            if is_rounded {
                rounding = Some(mean_distance(&self.prediction(&own, &x)?, &fine));
            }
            let grid = test.shape.grid.clone();
            if test.shape.domain == Domain::Real && grid.iter().all(|&n| n >= 4 && n % 2 == 0) {
                let every_other = |field: &ArrayD<f32>| {
                    field
                        .slice_each_axis(|axis| Slice::new(0, None, if axis.axis.index() < 2 { 1 } else { 2 }))
                        .to_owned()
                };
                let coarse_x = every_other(&x.to_ndarray::<f32>()?);
                let coarse_x = Tensor::from_ndarray(self.device(), coarse_x.view(), Precision::F32, Purpose::Data)?;
                let error = mean_distance(&self.prediction(&replay, &coarse_x)?, &every_other(&fine));
                let coarse = grid.iter().map(|n| n / 2).collect();
                discretisation = Some(Discretisation { grid, coarse, error });
            }
        }
        Ok(PrecisionReport { n_samples, loss_scale: self.loss_scale(), rows, rounding, discretisation })
    }

    /// Everything that passes by in a training step of these samples under `policy`; nothing moves.
    fn sights(&self, policy: &Arc<PrecisionPolicy>, indices: &[usize]) -> Result<Sights, JobError> {
        let seen: Rc<RefCell<Sights>> = Rc::default();
        let mut tape = Tape::new(Cx::new(self.device(), policy));
        let sink = Rc::clone(&seen);
        tape.watch(move |it| sink.borrow_mut().push(((it.call, it.role), it.op, it.tensor.clone())));
        let weights = self.weights(&mut tape, policy)?;
        let x = tape.constant(self.train_set().x().batch(indices)?);
        let prediction = self.model().forward(&mut tape, &weights, &[&x])?;
        let y = tape.constant(self.train_set().y().batch(indices)?);
        let loss = self.loss(&mut tape, &prediction, &y)?;
        drop((weights, x, y, prediction));
        tape.backward(loss, self.loss_scale(), &mut |_, _| Ok(()))?;
        Ok(seen.take())
    }

    /// Predictions for normalised inputs, `[n, channels, n_1, …]`, in the units of the data.
    fn prediction(&self, policy: &Arc<PrecisionPolicy>, x: &Tensor) -> Result<ArrayD<f32>, JobError> {
        let mut tape = Tape::new(Cx::inference(self.device(), policy));
        let weights = self.weights(&mut tape, policy)?;
        let x = tape.constant(x.clone());
        let y = self.model().forward(&mut tape, &weights, &[&x])?;
        let mut y = y.value().to_ndarray::<f32>()?;
        self.normalisers().output.decode(&mut y.view_mut())?;
        Ok(y)
    }

    /// The parameters as leaves: as they are stored under the job's policy, exact under another.
    fn weights(&self, tape: &mut Tape, policy: &PrecisionPolicy) -> Result<Vec<halfmode_autograd::Var>, JobError> {
        if policy == self.policy() {
            return Ok(self.params().leaves(tape));
        }
        let leaves = self.params().list.iter().map(|param| {
            let exact = param.exact().cast(policy.pointwise.storage, Purpose::Workspace)?;
            Ok(tape.leaf(exact))
        });
        leaves.collect()
    }
}

/// Rows of `stored` beside the same sights in f32.
fn compare(stored: &Sights, wide: &Sights, is_rounded: bool) -> Result<Vec<PrecisionRow>, JobError> {
    let replay: BTreeMap<(usize, Role), &Tensor> = wide.iter().map(|(key, _, tensor)| (*key, tensor)).collect();
    let names = numbered(stored);
    let mut rows = Vec::new();
    for ((call, role), _, tensor) in stored {
        let Some(exact) = replay.get(&(*call, *role)) else { continue };
        let values = exact.to_vec::<f32>()?;
        let format = Format::from(tensor.precision());
        let stats = format.range_stats(values.iter().map(|&value| f64::from(value)));
        let error = if is_rounded { Some(distance(&tensor.to_vec::<f32>()?, &values)) } else { None };
        rows.push(PrecisionRow {
            op: names.get(call).cloned().unwrap_or_default(),
            tensor: match role {
                Role::Output(0) => "output".to_owned(),
                Role::Output(idx) => format!("output {idx}"),
                Role::Saved(name) => format!("saved {name}"),
                Role::Gradient(0) => "gradient".to_owned(),
                Role::Gradient(idx) => format!("gradient of input {idx}"),
            },
            format: tensor.precision().name().to_owned(),
            absmax: stats.absmax,
            headroom_bits: (stats.absmax > 0.0).then(|| stats.headroom_bits()),
            flushed: stats.share(stats.n_flushed),
            subnormal: stats.share(stats.n_subnormal),
            saturated: stats.share(stats.n_overflow),
            error,
        });
    }
    Ok(rows)
}

/// The name of every call; ops that occur more than once are numbered.
fn numbered(sights: &Sights) -> BTreeMap<usize, String> {
    let calls: BTreeMap<usize, &str> = sights.iter().map(|((call, _), op, _)| (*call, *op)).collect();
    let mut count: BTreeMap<&str, usize> = BTreeMap::new();
    calls.values().for_each(|op| *count.entry(op).or_default() += 1);
    let mut next: BTreeMap<&str, usize> = BTreeMap::new();
    let name = |op: &'_ str, next: &mut usize| {
        *next += 1;
        format!("{op} {next}")
    };
    calls
        .iter()
        .map(|(call, op)| {
            let alone = count.get(op).is_none_or(|&n| n == 1);
            (*call, if alone { (*op).to_owned() } else { name(op, next.entry(op).or_default()) })
        })
        .collect()
}

/// `|a - b| / |b|`; 0 if both are zero.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    let (mut difference, mut size) = (0.0, 0.0);
    for (a, b) in a.iter().zip(b) {
        difference += (f64::from(*a) - f64::from(*b)).powi(2);
        size += f64::from(*b).powi(2);
    }
    if difference <= 0.0 { 0.0 } else { (difference / size).sqrt() }
}

/// [`distance`] sample by sample, averaged.
fn mean_distance(a: &ArrayD<f32>, b: &ArrayD<f32>) -> f64 {
    let n = a.shape().first().copied().unwrap_or(1).max(1);
    let samples = a.outer_iter().zip(b.outer_iter());
    let sum: f64 = samples
        .map(|(a, b)| distance(&a.iter().copied().collect::<Vec<_>>(), &b.iter().copied().collect::<Vec<_>>()))
        .sum();
    sum / n as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_sentence_says_which_is_larger() {
        let grid = |error| Some(Discretisation { grid: vec![64, 64], coarse: vec![32, 32], error });
        let report = |rounding, discretisation| {
            let it = PrecisionReport { n_samples: 1, loss_scale: 1.0, rows: vec![], rounding, discretisation };
            it.sentence().unwrap_or_default()
        };
        let below = report(Some(2e-4), grid(1e-2));
        assert!(below.contains("2.0e-4") && below.contains("64x64 to 32x32"), "{below}");
        assert!(below.contains("rounding is 50 times below discretisation"), "{below}");
        assert!(report(Some(2e-2), grid(1e-2)).contains("2.0 times above"));
        assert!(report(None, grid(1e-2)).contains("stored in f32"));
        assert!(report(Some(1e-3), None).contains("cannot be halved"));
        assert_eq!(report(None, None), "");
    }
}
