//! Contractions of truncated spectra with dense, CP and Tucker weights, in half and in f32, by the
//! orders that the planner finds.
#![allow(clippy::unwrap_used, missing_docs, reason = "a bench")]

use halfmode_benches::{Bench, noise};
use halfmode_contract::{Objective, Operand, OutputSpec, Planner, Policy, execute};
use halfmode_precision::{DType, Precision};
use halfmode_tensor::{Device, Purpose, Shape, Tensor};

fn main() {
    let mut bench = Bench::from_args("contraction, complex; reference: the fewest multiplies, f32");
    let device = Device::cpu(0).unwrap();
    let planner = Planner::new();
    let cases: [(&str, &str, &[&[usize]]); 3] = [
        ("dense", "bixy,ioxy->boxy", &[&[8, 32, 32, 17], &[32, 32, 32, 17]]),
        ("cp", "abcd,e,be,fe,ce,de->afcd", &[&[8, 32, 32, 17], &[64], &[32, 64], &[32, 64], &[32, 64], &[17, 64]]),
        (
            "tucker",
            "abcd,ijkl,bi,fj,ck,dl->afcd",
            &[&[8, 32, 32, 17], &[18, 18, 18, 9], &[32, 18], &[32, 18], &[32, 18], &[17, 9]],
        ),
    ];
    for (name, equation, shapes) in cases {
        let equation = equation.parse().unwrap();
        let shapes: Vec<Shape> = shapes.iter().map(|shape| Shape::new(shape)).collect();
        let operands = |precision| -> Vec<Tensor> {
            let operand = |shape: &Shape| {
                let values = noise(2 * shape.numel());
                Tensor::from_scalars(&device, &values, shape.clone(), DType::complex(precision), Purpose::Data).unwrap()
            };
            shapes.iter().map(operand).collect()
        };
        let run = |precision, policy, tensors: &[Tensor]| {
            let plan = planner.plan(&equation, &shapes, DType::complex(precision), policy).unwrap();
            let operands: Vec<Operand<'_>> = tensors.iter().map(Operand::new).collect();
            drop(execute(&plan, &operands, &OutputSpec::new(precision, Purpose::Activation)).unwrap());
        };
        let wide = operands(Precision::F32);
        for precision in [Precision::F32, Precision::F16, Precision::Bf16] {
            let tensors = operands(precision);
            for (label, policy) in [("memory", Policy::Memory), ("balanced", Policy::balanced())] {
                let name = format!("contraction/cpu/{precision}/{name}/{label}");
                let flops = Policy::Exact(Objective::Multiplies);
                let reference = &mut || run(Precision::F32, flops, &wide);
                bench.pair(&name, &device, &mut || run(precision, policy, &tensors), reference);
            }
        }
    }
    bench.finish();
}
