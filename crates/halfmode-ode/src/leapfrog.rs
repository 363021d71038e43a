//! The asynchronous leapfrog, whose steps are taken back bit for bit.
//!
//! From a state `y` and its velocity `v` a step goes to `y_h = y + h/2 v`, `v' = 2 f(t + h/2, y_h) - v` and
//! `y' = y_h + h/2 v'`. The same step from its end to its beginning undoes it, if sums are exact: so `y` and `v` are
//! multiples of a power of two, and what is added to them is rounded to such a multiple first. Gradients pass through this
//! rounding as if it were none.

use crate::adjoint::{Adjoint, Incoming, Product};
use crate::kernels::{StepKernels, max_abs};
use crate::solve::{NAME, OdeSolve, Points, push_output};
use crate::step::{Leaf, Needs, RecentTimes, Slope, Span, State, Stepper, dots};
use crate::tableau::EULER;
use crate::{Error, Method, OdeOptions, Result, StateSum, Steps, Storage};
use halfmode_autograd::{Cx, Outputs, Saved};
use halfmode_precision::{DType, Precision};
use halfmode_tensor::{Elementwise, Purpose, Real, Shape, Tensor};

/// The f64 multiples of `2^-bits` of which any two have an exact sum.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lattice {
    bits: u32,
}

/// `sign base + round(factor term)` on a lattice, NaN beyond it; the term is the last input.
struct LatticeSum {
    lattice: Lattice,
    sign: f64,
    factor: f64,
}

impl Elementwise for LatticeSum {
    fn tile<R: Real>(&self, inputs: &[&[R]], out: &mut [R]) {
        let [base @ .., term] = inputs else { return };
        let (spacing, most) = (self.lattice.spacing(), self.lattice.most());
        for (idx, out) in out.iter_mut().enumerate() {
            let added = (self.factor * term[idx].to_f64() / spacing).round_ties_even() * spacing;
            let sum = base.first().map_or(added, |base| self.sign * base[idx].to_f64() + added);
            *out = R::from_f64(if sum.abs() <= most { sum } else { f64::NAN });
        }
    }
}

impl Lattice {
    /// That of a method that is taken back; `None` for others.
    pub(crate) fn of(options: &OdeOptions) -> Result<Option<Lattice>> {
        let method = options.method.tableau().name;
        let refused = |storage| Err(Error::Reversal { method, storage });
        let lattice_bits = match (options.method, options.storage) {
            (Method::AsynchronousLeapfrog, Storage::Reversible { lattice_bits }) => lattice_bits,
            (Method::AsynchronousLeapfrog, _) => return refused("a storage of states"),
            (_, Storage::Reversible { .. }) => return refused("Storage::Reversible"),
            _ => return Ok(None),
        };
        if options.steps != Steps::Grid {
            return Err(Error::NoEstimate { method });
        }
        let leaves = options.precision.leaves.values().map(|leaf| leaf.state);
        if leaves.chain([options.precision.state]).any(|it| matches!(it, StateSum::Compensated(_))) {
            return refused("a compensated state");
        }
        if (1..=51).contains(&lattice_bits) {
            Ok(Some(Lattice { bits: lattice_bits }))
        } else {
            Err(Error::Lattice { lattice_bits })
        }
    }

    fn spacing(self) -> f64 {
        (-f64::from(self.bits)).exp2()
    }

    /// The largest number; the sum of two such is still exact.
    fn most(self) -> f64 {
        (52.0 - f64::from(self.bits)).exp2()
    }

    /// `sign base + round(factor term)`, NaN where that is beyond the lattice.
    fn sum(self, base: Option<(f64, &Tensor)>, factor: f64, term: &Tensor) -> Result<Tensor> {
        let sign = base.map_or(0.0, |it| it.0);
        #[cfg(feature = "cuda")]
        if term.device().as_cuda().is_some() {
            let base = base.map(|it| it.1);
            return crate::state_cuda::lattice_sum(base, term, [sign, factor, self.spacing(), self.most()]);
        }
        let inputs: Vec<&Tensor> = base.map(|it| it.1).into_iter().chain([term]).collect();
        let function = LatticeSum { lattice: self, sign, factor };
        let dtype = DType::real(Precision::F64);
        Ok(Tensor::elementwise("lattice_sum", &function, &inputs, dtype, Purpose::Activation)?)
    }
}

/// A state and its velocity, on a lattice.
#[derive(Clone, Debug)]
struct Pair {
    y: Vec<Tensor>,
    v: Vec<Tensor>,
}

/// Where a velocity was asked for, on the lattice, and what it is.
struct Answer {
    at: Vec<Tensor>,
    slope: Slope,
}

/// What all steps of a solve share. The stepper is one of Euler's method: its only slope is that at the state.
#[derive(Clone, Copy)]
struct Leapfrog<'a> {
    stepper: &'a Stepper<'a>,
    lattice: Lattice,
}

impl Leapfrog<'_> {
    /// The middle of a step, which is the same seen from both ends, as a step of no length.
    fn midway(span: Span) -> Span {
        let middle = 0.5 * (span.from + span.to);
        Span { from: middle, to: middle }
    }

    /// Where the field is asked: in the velocity's formats.
    fn asked(&self, y: &[Tensor]) -> Result<State> {
        let leaf = |(idx, y): (usize, &Tensor)| {
            let high = y.cast(self.stepper.precision.leaf(idx).velocity, Purpose::Activation)?;
            Ok(Leaf { high, low: None })
        };
        y.iter().enumerate().map(leaf).collect()
    }

    fn begin(&self, t: f64, y0: &[&Tensor]) -> Result<(Pair, Answer)> {
        let on_lattice = |x: &Tensor| self.lattice.sum(None, 1.0, x);
        let y: Vec<Tensor> = y0.iter().map(|y| on_lattice(y)).collect::<Result<_>>()?;
        let slope = self.stepper.first_slope(Span { from: t, to: t }, &self.asked(&y)?)?;
        let v = slope.iter().map(on_lattice).collect::<Result<_>>()?;
        Ok((Pair { y: y.clone(), v }, Answer { at: y, slope }))
    }

    /// `y + round(h/2 v)`
    fn drift(&self, y: &[Tensor], v: &[Tensor], h: f64) -> Result<Vec<Tensor>> {
        y.iter().zip(v).map(|(y, v)| self.lattice.sum(Some((1.0, y)), 0.5 * h, v)).collect()
    }

    /// `round(2 f) - v`
    fn reflect(&self, slope: &[Tensor], v: &[Tensor]) -> Result<Vec<Tensor>> {
        slope.iter().zip(v).map(|(slope, v)| self.lattice.sum(Some((-1.0, v)), 2.0, slope)).collect()
    }

    /// The other end of a step whose middle and slope are known.
    fn end(&self, span: Span, middle: &Answer, v: &[Tensor]) -> Result<Pair> {
        let v = self.reflect(&middle.slope, v)?;
        Ok(Pair { y: self.drift(&middle.at, &v, span.length())?, v })
    }

    /// One step; with its ends exchanged, it takes itself back.
    fn step(&self, span: Span, pair: &Pair) -> Result<(Pair, Answer)> {
        let at = self.drift(&pair.y, &pair.v, span.length())?;
        let slope = self.stepper.first_slope(Self::midway(span), &self.asked(&at)?)?;
        let middle = Answer { at, slope };
        Ok((self.end(span, &middle, &pair.v)?, middle))
    }

    fn check(&self, (pair, from): (Pair, Answer), (step, n_steps): (usize, usize), time: f64) -> Result<Pair> {
        let finite = |them: &[Tensor]| them.iter().all(|it| self.stepper.is_finite(it));
        if finite(&pair.y) && finite(&pair.v) {
            Ok(pair)
        } else if !finite(&from.at) || finite(&from.slope) {
            Err(Error::BeyondLattice { step, n_steps, time, most: self.lattice.most() })
        } else {
            Err(Error::NonFiniteVelocity { step, n_steps, time })
        }
    }
}

/// The sweep back: the adjoint of the velocity beside that of the state.
struct Sweep<'a> {
    leapfrog: Leapfrog<'a>,
    adjoint: Adjoint<'a>,
    b: Vec<Option<Tensor>>,
}

impl Sweep<'_> {
    /// `b := keep b + h/2 a`
    fn kick(&mut self, keep: f64, h: f64) -> Result<()> {
        let (device, formats) = (self.adjoint.stepper.device, self.adjoint.sums(Purpose::Activation));
        for (b, a) in self.b.iter_mut().zip(&self.adjoint.a) {
            let terms: Vec<(f64, &Tensor)> =
                b.iter().map(|b| (keep, b)).chain(a.iter().map(|a| (0.5 * h, a))).collect();
            if !terms.is_empty() {
                *b = Some(device.combine(None, &terms, formats)?);
            }
        }
        Ok(())
    }

    /// The product with `2/h b`, which is as large as the adjoint of the state.
    fn product(&mut self, step: usize, span: Span, at: &State, h: f64) -> Result<Option<Product>> {
        let (device, formats) = (self.adjoint.stepper.device, self.adjoint.sums(Purpose::Activation));
        let whole = |b: &Option<Tensor>| -> Result<Option<Tensor>> {
            b.as_ref().map(|b| device.combine(None, &[(2.0 / h, b)], formats)).transpose()
        };
        let cotangent: Vec<Option<Tensor>> = self.b.iter().map(whole).collect::<Result<_>>()?;
        self.adjoint.product(step, span, (at, None), (&cotangent, None))
    }

    /// Takes a step back, from the pair at its end.
    fn step(&mut self, step: usize, span: Span, end: &Pair) -> Result<Pair> {
        let (h, back) = (span.length(), Span { from: span.to, to: span.from });
        let middle = self.leapfrog.drift(&end.y, &end.v, -h)?;
        let at = self.leapfrog.asked(&middle)?;
        let wants_time = self.adjoint.needs.time;
        let mut by_length = if wants_time { 0.5 * dots(&self.adjoint.a, &end.v)? } else { 0.0 };
        self.kick(1.0, h)?;
        let mut product = self.product(step, Leapfrog::midway(span), &at, h)?;
        let slope = match product.as_mut().and_then(|it| it.slopes.pop()) {
            Some(slope) => slope,
            None => self.adjoint.stepper.first_slope(Leapfrog::midway(span), &at)?,
        };
        let begin = self.leapfrog.end(back, &Answer { at: middle, slope }, &end.v)?;
        if let Some(Product { scale, pullback, retries, .. }) = product {
            let by_middle = h * pullback.time / scale;
            self.adjoint.times[step] += 0.5 * by_middle;
            self.adjoint.times[step + 1] += 0.5 * by_middle;
            self.adjoint.add_product(h / scale, pullback)?;
            self.adjoint.grow(retries)?;
        }
        self.kick(-1.0, h)?;
        by_length += if wants_time { 0.5 * dots(&self.adjoint.a, &begin.v)? } else { 0.0 };
        self.adjoint.times[step] -= by_length;
        self.adjoint.times[step + 1] += by_length;
        Ok(begin)
    }

    /// Passes through the first velocity, `f(t, y)` for the pair that the steps began with.
    fn first_velocity(&mut self, span: Span, pair: &Pair) -> Result<()> {
        let (h, at) = (span.length(), self.leapfrog.asked(&pair.y)?);
        let here = Span { from: span.from, to: span.from };
        let Some(Product { scale, pullback, slopes, .. }) = self.product(0, here, &at, h)? else { return Ok(()) };
        for (slope, v) in slopes.iter().flatten().zip(&pair.v) {
            let gone = self.leapfrog.lattice.sum(Some((-1.0, v)), 1.0, slope)?;
            if v.device().launches() && self.adjoint.stepper.may_wait() && max_abs(&gone)? > 0.0 {
                return Err(Error::Irreversible);
            }
        }
        self.adjoint.times[0] += 0.5 * h * pullback.time / scale;
        self.adjoint.add_product(0.5 * h / scale, pullback)
    }
}

impl OdeSolve {
    fn leapfrog_stepper<'a>(&'a self, cx: &'a Cx, params: &'a [Tensor]) -> Stepper<'a> {
        let OdeOptions { precision, record, .. } = &self.options;
        Stepper {
            field: &self.field,
            tableau: &EULER,
            precision,
            device: &cx.device,
            params,
            record,
            recent: RecentTimes::default(),
        }
    }

    pub(crate) fn run_reversible(
        &self,
        cx: &Cx,
        (y0, t, params): (&[&Tensor], Option<&Tensor>, &[Tensor]),
        times: &[f64],
        lattice: Lattice,
    ) -> Result<(Outputs, Saved)> {
        let stepper = self.leapfrog_stepper(cx, params);
        let leapfrog = Leapfrog { stepper: &stepper, lattice };
        let (n_steps, mut outputs) = (times.len() - 1, Outputs::new());
        let mut pair = leapfrog.check(leapfrog.begin(times[0], y0)?, (0, n_steps), times[0])?;
        let mut push = |pair: &Pair| -> Result<()> {
            let state: State = pair.y.iter().map(|y| Leaf { high: y.clone(), low: None }).collect();
            push_output(&stepper, &state, &mut outputs)
        };
        if self.points == Points::All {
            push(&pair)?;
        }
        for (step, ends) in times.windows(2).enumerate() {
            let span = Span { from: ends[0], to: ends[1] };
            pair = leapfrog.check(leapfrog.step(span, &pair)?, (step, n_steps), span.from)?;
            if self.points == Points::All || step + 1 == n_steps {
                push(&pair)?;
            }
        }
        self.options.record.note(|record| {
            record.n_steps = n_steps;
            record.grid = times.to_vec();
        });
        let mut saved = Saved::new(NAME);
        if cx.save {
            for (role, half) in [("y", &pair.y), ("v", &pair.v)] {
                for it in half {
                    saved = saved.share(cx, role, &it.copy(Purpose::Saved)?);
                }
            }
        }
        saved = params.iter().fold(saved, |saved, param| saved.share(cx, "param", param));
        saved = t.iter().fold(saved, |saved, t| saved.share(cx, "t", t));
        Ok((outputs, saved))
    }

    pub(crate) fn pull_back_reversible(
        &self,
        cx: &Cx,
        mut saved: Saved,
        (t, params): (Option<Tensor>, &[Tensor]),
        times: &[f64],
        (grads, needs): (&mut [Option<Tensor>], &[bool]),
        lattice: Lattice,
    ) -> Result<Vec<Option<Tensor>>> {
        let stepper = self.leapfrog_stepper(cx, params);
        let mut pair = Pair { y: saved.take_all("y"), v: saved.take_all("v") };
        let shapes: Vec<Shape> = pair.y.iter().map(|it| it.shape().clone()).collect();
        let first_param = needs.len() - params.len();
        let needs = Needs { params: needs[first_param..].contains(&true), time: t.is_some() && needs[self.n_leaves] };
        let n_steps = times.len() - 1;
        let mut sweep = Sweep {
            leapfrog: Leapfrog { stepper: &stepper, lattice },
            b: vec![None; shapes.len()],
            adjoint: Adjoint::new(&stepper, &self.options.scaling, needs, (times.len(), shapes)),
        };
        let mut incoming = |point: usize| {
            let output = match self.points {
                Points::All => Some(point),
                Points::Last => (point == n_steps).then_some(0),
            };
            Incoming { point, cotangent: self.take_cotangent(grads, output) }
        };
        let span = |step: usize| Span { from: times[step], to: times[step + 1] };
        for step in (0..n_steps).rev() {
            sweep.adjoint.add(incoming(step + 1))?;
            pair = sweep.step(step, span(step), &pair)?;
        }
        sweep.adjoint.add(incoming(0))?;
        sweep.first_velocity(span(0), &pair)?;
        let marks: Vec<usize> = (0..times.len()).collect();
        let (y0, t_grad, params) = sweep.adjoint.finish(&marks)?;
        Ok(y0.into_iter().chain(t.is_some().then_some(t_grad)).chain(params).collect())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test")]
mod tests {
    use super::*;
    use crate::{Field, MlpField, OdePrecision, Record, TimeInput};
    use halfmode_tensor::Device;
    use std::sync::Arc;

    /// 10 000 steps of a perceptron forward and back again: every bit of state and velocity is as it was, whatever the
    /// velocity's format.
    #[test]
    fn steps_taken_back_leave_no_trace() {
        let device = Device::cpu(1).unwrap();
        device.run(|| Precision::ALL.into_iter().for_each(|format| taken_back(&device, format))).unwrap();
    }

    fn taken_back(device: &Device, format: Precision) {
        let n_steps = if format == Precision::F16 { 10_000 } else { 500 };
        let precision = match format {
            Precision::F64 => OdePrecision::double(),
            Precision::F32 => OdePrecision::full(),
            half => OdePrecision::mixed(half),
        };
        let tensor = |shape: &[usize], precision| {
            let values: Vec<f64> = (0..shape.iter().product()).map(|i: usize| (i as f64 * 1.7 + 0.4).sin()).collect();
            Tensor::from_slice(device, &values, shape.to_vec(), precision, Purpose::Param).unwrap()
        };
        let shapes: [&[usize]; 4] = [&[8, 3], &[8], &[2, 8], &[2]];
        let params = shapes.map(|shape| tensor(shape, precision.velocity.weights));
        let y0 = tensor(&[5, 2], precision.accumulate);
        let field = MlpField { channels: 2, hidden: vec![8], time: TimeInput::Concatenated };
        let (field, record) = (Field::Single(Arc::new(field)), Record::default());
        let (tableau, precision, params) = (&EULER, &precision, &params[..]);
        let stepper = Stepper {
            field: &field,
            tableau,
            precision,
            device,
            params,
            record: &record,
            recent: RecentTimes::default(),
        };
        let leapfrog = Leapfrog { stepper: &stepper, lattice: Lattice { bits: 32 } };
        let times: Vec<f64> = (0..=n_steps).map(|i| (0.1 * f64::from(i)).sin() / 300.0 + f64::from(i) / 1e3).collect();
        let bits = |pair: &Pair| -> Vec<u64> {
            let values = pair.y.iter().chain(&pair.v).map(|it| it.to_vec::<f64>().unwrap());
            values.flatten().map(f64::to_bits).collect()
        };
        let (first, _) = leapfrog.begin(times[0], &[&y0]).unwrap();
        let mut pair = first.clone();
        for ends in times.windows(2) {
            pair = leapfrog.step(Span { from: ends[0], to: ends[1] }, &pair).unwrap().0;
        }
        assert!(pair.y[0].all_finite() && bits(&pair) != bits(&first), "{format}");
        for ends in times.windows(2).rev() {
            pair = leapfrog.step(Span { from: ends[1], to: ends[0] }, &pair).unwrap().0;
        }
        assert_eq!(bits(&pair), bits(&first), "{format}");
    }
}
