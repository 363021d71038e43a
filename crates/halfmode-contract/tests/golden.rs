//! Against the peer's half-precision complex contraction: ours must be at least as close to the
//! exact result.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]

use halfmode_contract::{
    Conj, Equation, Operand, OutputSpec, Plan, Policy, ReferenceOperand, execute, reference_einsum,
};
use halfmode_precision::{DType, Domain, Precision};
use halfmode_tensor::{Device, Purpose, Shape, Tensor};
use safetensors::{Dtype, SafeTensors};

/// A stored complex array (trailing axis re, im): its labelled shape and its scalars.
fn read(file: &SafeTensors<'_>, name: &str) -> (Shape, Vec<f64>) {
    let view = file.tensor(name).unwrap();
    let shape = view.shape();
    assert_eq!(shape.last(), Some(&2), "{name}");
    let bytes = view.data();
    let values = match view.dtype() {
        Dtype::F64 => bytes.as_chunks().0.iter().map(|it| f64::from_le_bytes(*it)).collect(),
        Dtype::F32 => bytes.as_chunks().0.iter().map(|it| f64::from(f32::from_le_bytes(*it))).collect(),
        Dtype::F16 => bytes.as_chunks().0.iter().map(|it| half_to_f64(u16::from_le_bytes(*it))).collect(),
        other => panic!("{name}: {other:?}"),
    };
    (Shape::new(&shape[..shape.len() - 1]), values)
}

fn half_to_f64(bits: u16) -> f64 {
    let (sign, exponent, fraction) = (bits >> 15, i32::from(bits >> 10 & 31), f64::from(bits & 1023) / 1024.0);
    let size = if exponent == 0 { fraction * 2f64.powi(-14) } else { (1.0 + fraction) * 2f64.powi(exponent - 15) };
    if sign == 1 { -size } else { size }
}

fn relative_error(got: &[f64], want: &[f64]) -> f64 {
    let norm = |it: &mut dyn Iterator<Item = f64>| it.map(|x| x * x).sum::<f64>().sqrt();
    norm(&mut got.iter().zip(want).map(|(g, w)| g - w)) / norm(&mut want.iter().copied())
}

#[test]
fn complex_half_is_at_least_as_accurate_as_the_peer() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/golden/complexhalf_einsum.safetensors");
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let device = Device::cpu(2).unwrap();
    for (case, text) in [("dense", "abcd,becd->aecd"), ("cp", "abcd,e,be,fe,ce,de->afcd")] {
        let equation = Equation::parse(text).unwrap();
        let inputs: Vec<(Shape, Vec<f64>)> =
            (0..equation.n_operands()).map(|idx| read(&file, &format!("in/{case}_{idx}"))).collect();
        let shapes: Vec<Shape> = inputs.iter().map(|(shape, _)| shape.clone()).collect();
        let (_, exact) = read(&file, &format!("f64/{case}"));
        let (_, peer) = read(&file, &format!("f16/{case}"));

        let reference: Vec<ReferenceOperand<'_>> =
            inputs.iter().map(|(shape, values)| ReferenceOperand { values, shape, conj: Conj::No }).collect();
        let by_definition = reference_einsum(&equation, &reference, Domain::Complex).unwrap();
        assert!(relative_error(&by_definition, &exact) < 1e-14, "{case}");

        let run = |precision: Precision, policy: Policy| {
            let plan = Plan::new(&equation, &shapes, policy).unwrap();
            let tensors: Vec<Tensor> = inputs
                .iter()
                .map(|(shape, values)| {
                    let dtype = DType::complex(precision);
                    Tensor::from_scalars(&device, values, shape.clone(), dtype, Purpose::Data).unwrap()
                })
                .collect();
            let operands: Vec<Operand<'_>> = tensors.iter().map(Operand::new).collect();
            let out = execute(&plan, &operands, &OutputSpec::new(precision, Purpose::Activation)).unwrap();
            relative_error(&out.to_vec::<f64>().unwrap(), &exact)
        };
        for policy in [Policy::Memory, Policy::Flops, Policy::balanced()] {
            assert!(run(Precision::F64, policy) < 1e-14, "{case} {policy}");
            let (ours, theirs) = (run(Precision::F16, policy), relative_error(&peer, &exact));
            println!("{case} {policy}: relative error {ours:.2e}, peer {theirs:.2e}");
            assert!(ours <= theirs, "{case} {policy}: ours {ours:e}, peer {theirs:e}");
        }
    }
}
