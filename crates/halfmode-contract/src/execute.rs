//! Runs a plan on tensors: one pairwise product after the other.

use crate::blocking::Blocking;
use crate::pair::{self, Placement, Source};
use crate::{ComplexLayout, Conj, Error, Operand, OutputSpec, Plan, Result};
use halfmode_precision::{DType, Domain};
use halfmode_tensor::{Device, Purpose, Tensor, View, with_real};

/// The contraction that `plan` describes, e.g. `y[b,x,o] = sum_i x[b,x,i] w[x,i,o]`.
///
/// Operands may have different storage precisions. Sums are formed in f32 (f64 if the result is
/// stored in f64) and rounded once per step on the way to storage. On the planning device only
/// the allocations happen. The same plan gives the same bits on any number of threads.
///
/// # Shapes
/// - `operands`: those the plan was made for, plus the (re, im) axis of split complex ones; all
///   real or all complex
/// - returns [`Plan::output_shape`], plus the (re, im) axis if the result is split complex
///
/// # Memory
/// Intermediates and tiles count as [`Purpose::Workspace`], with a peak of
/// [`Plan::scratch_bytes`]; an intermediate is freed as soon as its product is formed.
///
/// # Errors
/// [`Error::OperandCount`], [`Error::Shape`], [`Error::Domain`], [`Error::SplitAxis`],
/// [`Error::Devices`] if the operands do not fit the plan or each other; [`Error::Tensor`] if
/// memory runs out.
pub fn execute(plan: &Plan, operands: &[Operand<'_>], output: &OutputSpec) -> Result<Tensor> {
    let (device, domain) = check(plan, operands)?;
    let run = Run { plan, device, domain, output };
    let equation = plan.equation();
    let values: Vec<Value> =
        operands.iter().zip(equation.operands()).map(|(operand, labels)| Value::of_operand(operand, labels)).collect();
    let Some((last, before)) = plan.steps().split_last() else {
        let blocking = Blocking::unary(&equation.operands()[0], equation.output(), plan.sizes(), domain.scalars());
        return run.last(&blocking, values.first(), None);
    };
    let mut values: Vec<Option<Value>> = values.into_iter().map(Some).collect();
    for step in before {
        // Taken, so that intermediates are freed at the end of this turn.
        let (lhs, rhs) = (values[step.lhs].take(), values[step.rhs].take());
        let blocking = Blocking::of_step(step, plan.sizes(), domain.scalars());
        let result = run.intermediate(&blocking, lhs.as_ref(), rhs.as_ref(), &step.labels)?;
        values.push(Some(result));
    }
    let blocking = Blocking::of_step(last, plan.sizes(), domain.scalars());
    run.last(&blocking, values[last.lhs].as_ref(), values[last.rhs].as_ref())
}

/// A tensor on its way through the plan.
struct Value {
    tensor: Tensor,
    placement: Placement,
    conj: Conj,
}

impl Value {
    fn of_operand(operand: &Operand<'_>, labels: &[char]) -> Self {
        let tensor = operand.tensor.clone();
        Value { placement: placement(&tensor, labels, operand.layout), tensor, conj: operand.conj }
    }
}

/// Where the scalars are; the layout was checked against the tensor.
fn placement(tensor: &Tensor, labels: &[char], layout: ComplexLayout) -> Placement {
    let unit = tensor.dtype().domain.scalars();
    let mut strides = vec![unit; tensor.shape().len()];
    for axis in (1..strides.len()).rev() {
        strides[axis - 1] = strides[axis] * tensor.shape()[axis];
    }
    let lane = match layout {
        ComplexLayout::Interleaved => 1,
        ComplexLayout::Split { axis } => strides.remove(axis),
    };
    Placement { labels: labels.to_vec(), strides, lane }
}

struct Run<'a> {
    plan: &'a Plan,
    device: &'a Device,
    domain: Domain,
    output: &'a OutputSpec,
}

impl Run<'_> {
    fn intermediate(
        &self,
        blocking: &Blocking,
        lhs: Option<&Value>,
        rhs: Option<&Value>,
        labels: &[char],
    ) -> Result<Value> {
        let dtype = DType { domain: self.domain, precision: self.output.intermediates };
        let shape = self.plan.sizes().shape(labels);
        let mut tensor = self.device.alloc(shape, dtype, Purpose::Workspace)?;
        let placement = placement(&tensor, labels, ComplexLayout::Interleaved);
        self.product(blocking, lhs, rhs, (&mut tensor, &placement), 1.0)?;
        Ok(Value { tensor, placement, conj: Conj::No })
    }

    fn last(&self, blocking: &Blocking, lhs: Option<&Value>, rhs: Option<&Value>) -> Result<Tensor> {
        let n_operands = self.plan.shapes().len();
        let (dtype, shape) = self.output.storage(self.domain, &self.plan.output_shape(), n_operands)?;
        let mut tensor = self.device.alloc(shape, dtype, self.output.purpose)?;
        let placement = placement(&tensor, self.plan.equation().output(), self.output.layout);
        self.product(blocking, lhs, rhs, (&mut tensor, &placement), self.output.scale)?;
        Ok(tensor)
    }

    fn product(
        &self,
        blocking: &Blocking,
        lhs: Option<&Value>,
        rhs: Option<&Value>,
        (result, placement): (&mut Tensor, &Placement),
        scale: f64,
    ) -> Result<()> {
        let accumulator = self.output.precision.accumulate();
        let scratch = self.device.scratch(blocking.scratch_len(), accumulator.bytes());
        if !self.device.launches() {
            return Ok(());
        }
        let one = Placement { labels: Vec::new(), strides: Vec::new(), lane: 1 };
        let (a, b) = (source(lhs, &one)?, source(rhs, &one)?);
        let target = (result.view_mut()?, placement);
        with_real!(accumulator, R => pair::product::<R>(self.device, blocking, (a, b), target, scale, &scratch));
        Ok(())
    }
}

/// A value as one side of a product. The number one stands for an absent side: a single operand is
/// summed and permuted as its product with it.
fn source<'v>(value: Option<&'v Value>, one: &'v Placement) -> Result<Source<'v>> {
    Ok(match value {
        Some(Value { tensor, placement, conj }) => Source { view: tensor.view()?, placement, conj: *conj },
        None => Source { view: View::F32(&[1.0, 0.0]), placement: one, conj: Conj::No },
    })
}

/// Whether the operands fit the plan and each other; gives their device and domain.
fn check<'a>(plan: &Plan, operands: &[Operand<'a>]) -> Result<(&'a Device, Domain)> {
    let mismatch = || Error::OperandCount {
        equation: plan.equation().to_string(),
        expected: plan.shapes().len(),
        found: operands.len(),
    };
    let first = operands.first().filter(|_| operands.len() == plan.shapes().len()).ok_or_else(mismatch)?;
    let (domain, _) = first.resolve(0)?;
    for (idx, (operand, expected)) in operands.iter().zip(plan.shapes()).enumerate() {
        let (found_domain, found) = operand.resolve(idx)?;
        if found != *expected {
            return Err(Error::Shape { operand: idx, expected: expected.clone(), found });
        }
        if found_domain != domain {
            let name = |domain| if domain == Domain::Real { "real" } else { "complex" };
            return Err(Error::Domain { operand: idx, expected: name(domain), found: name(found_domain) });
        }
        if !operand.tensor.device().same(first.tensor.device()) {
            return Err(Error::Devices { operand: idx });
        }
    }
    Ok((first.tensor.device(), domain))
}
