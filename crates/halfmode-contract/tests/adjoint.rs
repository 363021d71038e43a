//! `<A x, y> = <x, A^H y>` for the contraction as a linear map of each operand.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]

mod common;

use common::{Case, Values, cases, expected, policies};
use halfmode_contract::{Adjoint, Conj, Factor, Operand, OutputSpec, Plan, Policy, adjoint_equation_conj, execute};
use halfmode_precision::{DType, Domain, Precision};
use halfmode_tensor::{Device, Purpose, Tensor};
use proptest::prelude::*;

/// `Re sum conj(a) b`, which is the sum of products of the scalars.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn check_adjoint(device: &Device, case: &Case, dtype: DType, policy: Policy, forward: &[Conj], operand: usize) {
    let spec = OutputSpec::new(dtype.precision, Purpose::Activation);
    let plan = Plan::new(&case.equation, &case.shapes, policy).unwrap();
    let tensors = case.tensors(device, dtype);
    let operands: Vec<Operand<'_>> =
        tensors.iter().zip(forward).map(|(it, &conj)| Operand::new(it).conj(conj)).collect();
    let y = execute(&plan, &operands, &spec).unwrap().to_vec::<f64>().unwrap();

    let mut values = Values(case.seed ^ 0xabcd);
    let cotangent: Vec<f64> = y.iter().map(|_| values.next()).collect();
    let cotangent = Tensor::from_scalars(device, &cotangent, plan.output_shape(), dtype, Purpose::Data).unwrap();
    let adjoint: Adjoint = adjoint_equation_conj(&case.equation, &case.shapes, operand, forward).unwrap();
    let shapes = adjoint.shapes(cotangent.shape(), &case.shapes);
    let back = Plan::new(adjoint.equation(), &shapes, policy).unwrap();
    let grad = adjoint.execute(&back, (&cotangent).into(), &operands, &spec).unwrap();
    assert_eq!(grad.shape(), &case.shapes[operand]);

    let (grad, cotangent_values) = (grad.to_vec::<f64>().unwrap(), cotangent.to_vec::<f64>().unwrap());
    let x = tensors[operand].to_vec::<f64>().unwrap();
    let (left, right) = (dot(&y, &cotangent_values), dot(&x, &grad));
    // What the forward result may be off, weighted by the cotangent; what the gradient may be
    // off, weighted by the operand. The exact inner products agree.
    let want_y = expected(case, &tensors, forward, dtype.precision, dtype.domain);
    let weighted = |tolerance: &[f64], by: &[f64]| tolerance.iter().zip(by).map(|(t, b)| t * b.abs()).sum::<f64>();
    let mut tolerance = weighted(&want_y.tolerance, &cotangent_values);
    let factors: Vec<Tensor> = adjoint
        .factors()
        .iter()
        .zip(&shapes)
        .map(|(factor, shape)| match factor {
            Factor::Gradient(_) => cotangent.clone(),
            Factor::Operand { idx, .. } => tensors[*idx].clone(),
            _ => {
                let one: &[f64] = if dtype.domain == Domain::Complex { &[1.0, 0.0] } else { &[1.0] };
                let values = one.repeat(shape.numel());
                Tensor::from_scalars(device, &values, shape.clone(), dtype, Purpose::Data).unwrap()
            }
        })
        .collect();
    let conj: Vec<Conj> = adjoint
        .factors()
        .iter()
        .map(|factor| match factor {
            Factor::Gradient(conj) => *conj,
            Factor::Operand { conj, .. } => *conj,
            _ => Conj::No,
        })
        .collect();
    let back_case = Case { equation: adjoint.equation().clone(), shapes, seed: 0 };
    let want_grad = expected(&back_case, &factors, &conj, dtype.precision, dtype.domain);
    tolerance += weighted(&want_grad.tolerance, &x);
    let name = format!("{} {dtype} operand {operand} {forward:?}", case.equation);
    assert!((left - right).abs() <= tolerance, "{name}: {left:e} {right:e}, tolerance {tolerance:e}");
    if dtype.precision == Precision::F64 {
        // Relative to the sizes of the terms, as the sum itself may cancel.
        let size: f64 = y.iter().zip(&cotangent_values).map(|(a, b)| (a * b).abs()).sum::<f64>().max(1.0);
        assert!((left - right).abs() <= 1e-12 * size, "{name}: {left:e} {right:e}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn every_operand_of_any_equation_passes_the_dot_product_test(
        case in cases(),
        conj in prop::collection::vec(any::<bool>(), 4),
    ) {
        let device = Device::cpu(2).unwrap();
        let conj: Vec<Conj> = conj[..case.shapes.len()].iter().map(|it| if *it { Conj::Yes } else { Conj::No }).collect();
        for domain in [Domain::Real, Domain::Complex] {
            for precision in Precision::ALL {
                for operand in 0..case.shapes.len() {
                    let policy = policies()[operand % 3];
                    check_adjoint(&device, &case, DType { domain, precision }, policy, &conj, operand);
                }
            }
        }
    }
}

#[test]
fn the_gradients_of_factorised_layers_pass_the_dot_product_test() {
    let device = Device::cpu(2).unwrap();
    let sizes = [('a', 3), ('b', 5), ('c', 7), ('d', 2), ('e', 11), ('f', 5), ('i', 2), ('j', 3), ('k', 2), ('l', 2)];
    for text in ["abcd,bfcd->afcd", "abcd,e,be,fe,ce,de->afcd"] {
        let case = Case::new(text, &sizes);
        for precision in Precision::ALL {
            for operand in 0..case.shapes.len() {
                let none = vec![Conj::No; case.shapes.len()];
                check_adjoint(&device, &case, DType::complex(precision), Policy::Memory, &none, operand);
            }
        }
    }
}
