//! Runs a plan on tensors: one pairwise product after the other.

use crate::blocking::Blocking;
use crate::pair::{self, Placement, Source};
use crate::{ComplexLayout, Conj, Error, Operand, OutputSpec, Plan, Result};
use halfmode_precision::{DType, Domain, Precision};
use halfmode_tensor::{Device, Purpose, Target, Tensor, View, with_real};

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
    Run { plan, device, kernels: device, domain, output }.contract(operands)
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
    kernels: &'a dyn ContractKernels,
    domain: Domain,
    output: &'a OutputSpec,
}

impl Run<'_> {
    fn contract(&self, operands: &[Operand<'_>]) -> Result<Tensor> {
        let equation = self.plan.equation();
        let values: Vec<Value> = operands
            .iter()
            .zip(equation.operands())
            .map(|(operand, labels)| Value::of_operand(operand, labels))
            .collect();
        let Some((last, before)) = self.plan.steps().split_last() else {
            let blocking =
                Blocking::unary(&equation.operands()[0], equation.output(), self.plan.sizes(), self.domain.scalars());
            return self.last(&blocking, values.first(), None);
        };
        let mut values: Vec<Option<Value>> = values.into_iter().map(Some).collect();
        for step in before {
            // Taken, so that intermediates are freed at the end of this turn.
            let (lhs, rhs) = (values[step.lhs].take(), values[step.rhs].take());
            let blocking = Blocking::of_step(step, self.plan.sizes(), self.domain.scalars());
            let result = self.intermediate(&blocking, lhs.as_ref(), rhs.as_ref(), &step.labels)?;
            values.push(Some(result));
        }
        let blocking = Blocking::of_step(last, self.plan.sizes(), self.domain.scalars());
        self.last(&blocking, values[last.lhs].as_ref(), values[last.rhs].as_ref())
    }

    fn intermediate(
        &self,
        blocking: &Blocking,
        lhs: Option<&Value>,
        rhs: Option<&Value>,
        labels: &[char],
    ) -> Result<Value> {
        let dtype = DType { domain: self.domain, precision: self.output.intermediates };
        let shape = self.plan.sizes().shape(labels);
        let mut tensor = self.device.alloc_unwritten(shape, dtype, Purpose::Workspace)?;
        let placement = placement(&tensor, labels, ComplexLayout::Interleaved);
        self.product(blocking, lhs, rhs, (&mut tensor, &placement), 1.0)?;
        Ok(Value { tensor, placement, conj: Conj::No })
    }

    fn last(&self, blocking: &Blocking, lhs: Option<&Value>, rhs: Option<&Value>) -> Result<Tensor> {
        let n_operands = self.plan.shapes().len();
        let (dtype, shape) = self.output.storage(self.domain, &self.plan.output_shape(), n_operands)?;
        let mut tensor = self.device.alloc_unwritten(shape, dtype, self.output.purpose)?;
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
        let accumulate = self.output.precision.accumulate();
        self.kernels.pair_product(&PairProduct { blocking, lhs, rhs, placement, scale, accumulate }, result)
    }
}

/// One pairwise product. The number one stands for an absent side: a single operand is summed and
/// permuted as its product with it.
pub(crate) struct PairProduct<'a> {
    blocking: &'a Blocking,
    lhs: Option<&'a Value>,
    rhs: Option<&'a Value>,
    /// Of the result.
    placement: &'a Placement,
    scale: f64,
    accumulate: Precision,
}

/// The kernel of contractions. The default body is the definition, in double precision; a device
/// overrides it. It is called on the planning device too, where it counts and computes nothing.
pub(crate) trait ContractKernels {
    /// Writes `result = scale · Σ lhs · rhs`.
    fn pair_product(&self, product: &PairProduct<'_>, result: &mut Tensor) -> Result<()> {
        product.by_definition(result)
    }
}

impl ContractKernels for Device {
    fn pair_product(&self, product: &PairProduct<'_>, result: &mut Tensor) -> Result<()> {
        match self.target() {
            Target::Cpu { .. } => product.on_cpu(self, result),
            #[cfg(feature = "cuda")]
            Target::Cuda => Err(halfmode_tensor::Error::OnGpu.into()),
        }
    }
}

impl PairProduct<'_> {
    fn on_cpu(&self, device: &Device, result: &mut Tensor) -> Result<()> {
        let scratch = device.scratch(self.blocking.scratch_len(), self.accumulate.bytes());
        if !device.launches() {
            return Ok(());
        }
        let one = Placement { labels: Vec::new(), strides: Vec::new(), lane: 1 };
        let (a, b) = (source(self.lhs, &one)?, source(self.rhs, &one)?);
        let target = (result.view_mut()?, self.placement);
        with_real!(self.accumulate, R => pair::product::<R>(device, self.blocking, (a, b), target, self.scale, &scratch));
        Ok(())
    }

    /// One term after the other, over every combination of all labels.
    fn by_definition(&self, result: &mut Tensor) -> Result<()> {
        let Blocking { batch, m, n, k, sum_a, sum_b, lanes } = self.blocking;
        let groups = [batch, m, n, k, sum_a, sum_b];
        let labels: Vec<char> = groups.iter().flat_map(|group| group.labels.iter().copied()).collect();
        let sizes: Vec<usize> = groups.iter().flat_map(|group| group.sizes.iter().copied()).collect();
        let read = |value: Option<&Value>| value.map(|value| value.tensor.to_vec::<f64>()).transpose();
        let (lhs, rhs) = (read(self.lhs)?, read(self.rhs)?);
        let mut out = vec![0.0; result.numel() * result.dtype().domain.scalars()];
        for term in 0..sizes.iter().product() {
            let offset = |placement: &Placement| {
                let mut rest = term;
                labels.iter().zip(&sizes).fold(0, |offset, (&label, size)| {
                    let idx = rest % size;
                    rest /= size;
                    offset + idx * placement.stride(label)
                })
            };
            let element = |values: &Option<Vec<f64>>, value: Option<&Value>| match (values, value) {
                (Some(values), Some(Value { placement, conj, .. })) => {
                    let at = offset(placement);
                    let im = if *lanes == 2 { values[at + placement.lane] } else { 0.0 };
                    (values[at], if *conj == Conj::Yes { -im } else { im })
                }
                _ => (1.0, 0.0),
            };
            let ((a, b), (c, d)) = (element(&lhs, self.lhs), element(&rhs, self.rhs));
            let at = offset(self.placement);
            out[at] += self.scale * (a * c - b * d);
            if *lanes == 2 {
                out[at + self.placement.lane] += self.scale * (a * d + b * c);
            }
        }
        Ok(result.copy_from_slice(&out)?)
    }
}

/// A value as one side of a product.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Equation, Policy};
    use halfmode_tensor::Shape;

    /// Runs the default body.
    struct Definition;
    impl ContractKernels for Definition {}

    #[test]
    fn the_override_computes_what_the_default_body_says() {
        let device = Device::cpu(2).unwrap();
        let cases: [(&str, &[&[usize]]); 5] = [
            ("bxi,xio->bxo", &[&[2, 37, 5], &[37, 5, 3]]),
            ("ab,bc,cd->da", &[&[3, 4], &[4, 130], &[130, 2]]),
            ("bi,b,oi->bo", &[&[1, 7], &[1], &[5, 7]]),
            ("abc->ca", &[&[3, 4, 5]]),
            ("ab,cd->ac", &[&[6, 2], &[3, 9]]),
        ];
        for (text, shapes) in cases {
            let equation: Equation = text.parse().unwrap();
            let shapes: Vec<Shape> = shapes.iter().map(|shape| Shape::new(shape)).collect();
            let plan = Plan::new(&equation, &shapes, Policy::Memory).unwrap();
            for domain in [Domain::Real, Domain::Complex] {
                let dtype = DType { domain, precision: Precision::F64 };
                let tensors: Vec<Tensor> = shapes
                    .iter()
                    .enumerate()
                    .map(|(seed, shape)| {
                        let n = shape.numel() * domain.scalars();
                        let value = |i: usize| ((i + 1) as f64 * 0.754_877_666 + 0.1 * seed as f64).fract() - 0.5;
                        let values: Vec<f64> = (0..n).map(value).collect();
                        Tensor::from_scalars(&device, &values, shape.clone(), dtype, Purpose::Workspace).unwrap()
                    })
                    .collect();
                let mut operands: Vec<Operand<'_>> = tensors.iter().map(Operand::new).collect();
                operands[0].conj = if domain == Domain::Complex { Conj::Yes } else { Conj::No };
                let output = OutputSpec::new(Precision::F64, Purpose::Workspace);
                let run = |kernels: &dyn ContractKernels| {
                    let run = Run { plan: &plan, device: &device, kernels, domain, output: &output };
                    run.contract(&operands).unwrap().to_vec::<f64>().unwrap()
                };
                let (got, want) = (run(&device), run(&Definition));
                // Sums of at most 520 products below 1.
                let close = |(got, want): (&f64, &f64)| (got - want).abs() <= 1e-12;
                assert!(got.len() == want.len() && got.iter().zip(&want).all(close), "{text} {domain:?}");
            }
        }
    }
}
