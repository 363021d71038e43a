//! Random contractions, their exact results, and tolerances derived from both.
#![allow(dead_code, reason = "every test file uses its own part")]

use halfmode_contract::{
    ComplexLayout, Conj, Equation, Operand, OutputSpec, Plan, Policy, ReferenceOperand, execute, reference_einsum,
};
use halfmode_precision::{DType, Domain, Format, Precision};
use halfmode_tensor::{Device, Purpose, Shape, Tensor};
use proptest::prelude::*;

/// A deterministic sequence of numbers with magnitudes in [0.5, 1): products of a few of them stay
/// in the normal range of every format.
pub(crate) struct Values(pub(crate) u64);

impl Values {
    pub(crate) fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let size = 0.5 + (self.0 >> 33) as f64 / (1u64 << 32) as f64;
        if self.0 >> 32 & 1 == 1 { -size } else { size }
    }
}

/// An equation and the sizes of its labels.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) equation: Equation,
    pub(crate) shapes: Vec<Shape>,
    pub(crate) seed: u64,
}

impl Case {
    pub(crate) fn new(text: &str, sizes: &[(char, usize)]) -> Self {
        let equation = Equation::parse(text).unwrap();
        let size = |label: &char| sizes.iter().find(|(it, _)| it == label).unwrap().1;
        let shapes = equation.operands().iter().map(|it| it.iter().map(size).collect::<Vec<_>>().into()).collect();
        Case { equation, shapes, seed: 1 }
    }

    /// Operands rounded to `precision`: the same values in storage and in double.
    pub(crate) fn tensors(&self, device: &Device, dtype: DType) -> Vec<Tensor> {
        let mut values = Values(self.seed);
        let mut tensor = |shape: &Shape| {
            let scalars: Vec<f64> = (0..shape.numel() * dtype.domain.scalars()).map(|_| values.next()).collect();
            Tensor::from_scalars(device, &scalars, shape.clone(), dtype, Purpose::Data).unwrap()
        };
        self.shapes.iter().map(&mut tensor).collect()
    }
}

/// One to four operands over five labels of odd, prime and unit sizes; any subset in any order in
/// each operand and in the output.
pub(crate) fn cases() -> impl Strategy<Value = Case> {
    let labels = ['a', 'b', 'C', 'd', 'E'];
    let sizes = prop::collection::vec(prop::sample::select(vec![1usize, 2, 3, 5, 7]), labels.len());
    let subset = prop::sample::subsequence(labels.to_vec(), 0..=4).prop_shuffle();
    let operands = prop::collection::vec(subset, 1..=4);
    (operands, sizes, any::<prop::sample::Index>(), Just(labels.to_vec()).prop_shuffle(), any::<u64>()).prop_map(
        move |(operands, sizes, n_kept, order, seed)| {
            let known: Vec<char> = order.into_iter().filter(|it| operands.iter().any(|o| o.contains(it))).collect();
            let output = known[..n_kept.index(known.len() + 1)].to_vec();
            let size = |label: &char| sizes[labels.iter().position(|it| it == label).unwrap()];
            let shapes = operands.iter().map(|it| it.iter().map(size).collect::<Vec<_>>().into()).collect();
            Case { equation: Equation::new(operands, output).unwrap(), shapes, seed }
        },
    )
}

pub(crate) fn format(precision: Precision) -> Format {
    match precision {
        Precision::F64 => Format::F64,
        Precision::F32 => Format::F32,
        Precision::Bf16 => Format::Bf16,
        Precision::F16 => Format::F16,
    }
}

/// The exact result, and how far each scalar of a computed one may be from it.
pub(crate) struct Expected {
    pub(crate) values: Vec<f64>,
    pub(crate) tolerance: Vec<f64>,
}

/// The exact result from the stored operands.
///
/// With the unit roundoff u of storage, v of the accumulator, n terms per sum and s steps:
/// `tol = 2 u |want| + 6 u (s - 1) rss + 4 v (sqrt(n) + s) abs`, where `rss` is the root of the sum of
/// squared terms and `abs` the sum of their sizes. The final rounding gives the first part (twice,
/// for a value that rounding moved to the next binade); each intermediate rounding perturbs its
/// terms by up to u with random signs, whose sum has a standard deviation below u rss / sqrt(3); the
/// accumulator errs by about v sqrt(n) abs.
pub(crate) fn expected(
    case: &Case,
    tensors: &[Tensor],
    conj: &[Conj],
    precision: Precision,
    domain: Domain,
) -> Expected {
    let values: Vec<Vec<f64>> = tensors.iter().map(|it| it.to_vec::<f64>().unwrap()).collect();
    let exact = |values: &[Vec<f64>], domain: Domain| {
        let operands: Vec<ReferenceOperand<'_>> = values
            .iter()
            .zip(&case.shapes)
            .zip(conj)
            .map(|((values, shape), &conj)| ReferenceOperand { values, shape, conj })
            .collect();
        reference_einsum(&case.equation, &operands, domain).unwrap()
    };
    let want = exact(&values, domain);
    let sizes = |power: i32| -> Vec<Vec<f64>> {
        let one = |it: &Vec<f64>| {
            it.chunks(domain.scalars()).map(|z| z.iter().map(|x| x * x).sum::<f64>().sqrt().powi(power)).collect()
        };
        values.iter().map(one).collect()
    };
    let abs = exact(&sizes(1), Domain::Real);
    let rss: Vec<f64> = exact(&sizes(2), Domain::Real).into_iter().map(f64::sqrt).collect();
    let all: std::collections::BTreeMap<char, usize> = case
        .equation
        .operands()
        .iter()
        .zip(&case.shapes)
        .flat_map(|(labels, shape)| labels.iter().copied().zip(shape.iter().copied()))
        .collect();
    let n_all: usize = all.values().product();
    let n_terms = (n_all / abs.len().max(1) * domain.scalars()) as f64;
    let n_steps = case.shapes.len() as f64;
    let (u, v) = (format(precision).unit_roundoff(), format(precision.accumulate()).unit_roundoff());
    let tolerance = want
        .iter()
        .enumerate()
        .map(|(i, want)| {
            let element = i / domain.scalars();
            2.0 * u * want.abs()
                + 6.0 * u * (n_steps - 2.0).max(0.0) * rss[element]
                + 4.0 * v * (n_terms.sqrt() + n_steps) * abs[element]
        })
        .collect();
    Expected { values: want, tolerance }
}

pub(crate) fn assert_close(name: &str, got: &[f64], want: &Expected) {
    assert_eq!(got.len(), want.values.len(), "{name}: length");
    for (i, ((got, want), tol)) in got.iter().zip(&want.values).zip(&want.tolerance).enumerate() {
        assert!((got - want).abs() <= *tol, "{name}: at {i}: got {got:e}, want {want:e}, tolerance {tol:e}");
    }
}

pub(crate) fn policies() -> [Policy; 3] {
    [Policy::Memory, Policy::Flops, Policy::balanced()]
}

/// Plans and runs one case; returns the operands and the computed scalars.
pub(crate) fn run(
    device: &Device,
    case: &Case,
    dtype: DType,
    policy: Policy,
    conj: &[Conj],
) -> (Vec<Tensor>, Vec<f64>) {
    let plan = Plan::new(&case.equation, &case.shapes, policy).unwrap();
    let tensors = case.tensors(device, dtype);
    let operands: Vec<Operand<'_>> = tensors.iter().zip(conj).map(|(it, &conj)| Operand::new(it).conj(conj)).collect();
    let out = execute(&plan, &operands, &OutputSpec::new(dtype.precision, Purpose::Activation)).unwrap();
    assert_eq!((out.dtype(), out.shape()), (dtype, &plan.output_shape()));
    let got = out.to_vec::<f64>().unwrap();
    (tensors, got)
}

/// Plans, runs and checks one case; returns the computed scalars.
pub(crate) fn check(device: &Device, case: &Case, dtype: DType, policy: Policy, conj: &[Conj]) -> Vec<f64> {
    let (tensors, got) = run(device, case, dtype, policy, conj);
    let want = expected(case, &tensors, conj, dtype.precision, dtype.domain);
    assert_close(&format!("{} {dtype} {policy}", case.equation), &got, &want);
    got
}

/// The same values with the real and imaginary parts along an axis of their own.
pub(crate) fn to_split(device: &Device, tensor: &Tensor, axis: usize) -> Tensor {
    let values = tensor.to_vec::<f64>().unwrap();
    let inner: usize = tensor.shape()[axis..].iter().product();
    let outer = tensor.numel() / inner.max(1);
    let mut split = Vec::with_capacity(values.len());
    for o in 0..outer {
        for part in 0..2 {
            split.extend((0..inner).map(|i| values[2 * (o * inner + i) + part]));
        }
    }
    let mut extents = tensor.shape().to_vec();
    extents.insert(axis, 2);
    Tensor::from_slice(device, &split, extents, tensor.precision(), Purpose::Data).unwrap()
}

pub(crate) fn split(axis: usize) -> ComplexLayout {
    ComplexLayout::Split { axis }
}
