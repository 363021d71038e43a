//! Execution against the definition: every precision, real and complex, any equation.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]

mod common;

use common::{Case, cases, check, expected, policies, run, split, to_split};
use halfmode_contract::{Conj, Objective, Operand, OutputSpec, Plan, Policy, execute};
use halfmode_precision::{DType, Domain, Precision};
use halfmode_tensor::{Device, Purpose, Tensor};
use proptest::prelude::*;

fn dtypes() -> impl Iterator<Item = DType> {
    [Domain::Real, Domain::Complex]
        .into_iter()
        .flat_map(|domain| Precision::ALL.into_iter().map(move |precision| DType { domain, precision }))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn any_equation_agrees_with_its_definition(case in cases(), conj in prop::collection::vec(any::<bool>(), 4)) {
        let device = Device::cpu(2).unwrap();
        let conj: Vec<Conj> = conj.iter().map(|it| if *it { Conj::Yes } else { Conj::No }).collect();
        for dtype in dtypes() {
            for policy in policies() {
                check(&device, &case, dtype, policy, &conj[..case.shapes.len()]);
            }
        }
    }
}

/// Sizes beyond every limit of a tile: several blocks of batch, rows, columns and sums.
fn large_cases() -> Vec<Case> {
    vec![
        Case::new("ab,bc->ac", &[('a', 131), ('b', 277), ('c', 149)]),
        Case::new("ba,bc->ca", &[('a', 67), ('b', 260), ('c', 139)]),
        Case::new("bxyi,xyio->bxyo", &[('b', 5), ('x', 13), ('y', 7), ('i', 17), ('o', 19)]),
        Case::new("bixy,ioxy->boxy", &[('b', 3), ('x', 23), ('y', 31), ('i', 5), ('o', 6)]),
        Case::new("axby,ybz->zxa", &[('a', 11), ('x', 47), ('b', 3), ('y', 5), ('z', 131)]),
        Case::new("abcd,cbe->eda", &[('a', 31), ('b', 9), ('c', 37), ('d', 5), ('e', 3)]),
        Case::new("ab,ab->ba", &[('a', 211), ('b', 101)]),
        Case::new("abc->ca", &[('a', 41), ('b', 607), ('c', 3)]),
        Case::new("ab->", &[('a', 101), ('b', 103)]),
        Case::new("abcd,e,be,fe,ce,de->afcd", &[('a', 2), ('b', 3), ('c', 5), ('d', 3), ('e', 7), ('f', 5)]),
        Case::new(
            "abcd,ijkl,bi,fj,ck,dl->afcd",
            &[('a', 2), ('b', 3), ('c', 3), ('d', 2), ('f', 3), ('i', 2), ('j', 3), ('k', 2), ('l', 2)],
        ),
    ]
}

#[test]
fn many_tiles_agree_with_the_definition_on_any_number_of_threads() {
    let devices = [Device::cpu(1).unwrap(), Device::cpu(3).unwrap()];
    for case in large_cases() {
        for dtype in [
            DType::real(Precision::F32),
            DType::real(Precision::Bf16),
            DType::complex(Precision::F64),
            DType::complex(Precision::F16),
        ] {
            let conj: Vec<Conj> = (0..case.shapes.len()).map(|i| if i == 1 { Conj::Yes } else { Conj::No }).collect();
            let one = check(&devices[0], &case, dtype, Policy::balanced(), &conj);
            let three = run(&devices[1], &case, dtype, Policy::balanced(), &conj).1;
            let same = one.iter().zip(&three).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{} {dtype}: threads change bits", case.equation);
        }
    }
}

#[test]
fn the_ledger_counts_what_the_plan_said_with_and_without_running() {
    for case in large_cases() {
        for dtype in [DType::real(Precision::F64), DType::complex(Precision::F16)] {
            for policy in [Policy::Memory, Policy::Exact(Objective::Peak)] {
                let plan = Plan::new(&case.equation, &case.shapes, policy).unwrap();
                let cpu = Device::cpu(2).unwrap();
                for device in [cpu.twin(), cpu] {
                    let tensors = case.tensors(&device, dtype);
                    let operands: Vec<Operand<'_>> = tensors.iter().map(Operand::new).collect();
                    let spec = OutputSpec::new(dtype.precision, Purpose::Activation);
                    let out = execute(&plan, &operands, &spec).unwrap();
                    let workspace = device.memory().of(Purpose::Workspace);
                    assert_eq!(workspace.peak, plan.scratch_bytes(dtype, 2), "{plan}");
                    assert_eq!(workspace.live, 0);
                    assert_eq!(device.memory().of(Purpose::Activation).peak, out.bytes());
                }
            }
        }
    }
}

#[test]
fn split_and_interleaved_complex_agree_bit_for_bit() {
    let device = Device::cpu(2).unwrap();
    let case = Case::new("bxi,xio->bxo", &[('b', 5), ('x', 37), ('i', 7), ('o', 11)]);
    let plan = Plan::new(&case.equation, &case.shapes, Policy::Memory).unwrap();
    for precision in Precision::ALL {
        let dtype = DType::complex(precision);
        let tensors = case.tensors(&device, dtype);
        let spec = OutputSpec::new(precision, Purpose::Activation);
        let plain = [Operand::new(&tensors[0]).conj(Conj::Yes), Operand::new(&tensors[1])];
        let want = execute(&plan, &plain, &spec).unwrap();
        for axis in 0..=3 {
            let apart: Vec<Tensor> = tensors.iter().map(|it| to_split(&device, it, axis)).collect();
            let [a, b] = [&apart[0], &apart[1]].map(|it| Operand::new(it).layout(split(axis)));
            let operands = [a.conj(Conj::Yes), b];
            let got = execute(&plan, &operands, &spec.layout(split(axis))).unwrap();
            let want = to_split(&device, &want, axis);
            assert_eq!((got.shape(), got.dtype()), (want.shape(), want.dtype()));
            assert_eq!(got.to_vec::<f64>().unwrap(), want.to_vec::<f64>().unwrap(), "{precision} axis {axis}");
            // One of each: nothing is converted on the way.
            let mixed = execute(&plan, &[plain[0], operands[1]], &spec.layout(split(axis))).unwrap();
            assert_eq!(mixed.to_vec::<f64>().unwrap(), want.to_vec::<f64>().unwrap());
        }
    }
}

#[test]
fn storage_of_operands_intermediates_and_result_are_apart() {
    let device = Device::cpu(1).unwrap();
    let case = Case::new("ab,bc,cd->ad", &[('a', 7), ('b', 31), ('c', 29), ('d', 5)]);
    let plan = Plan::new(&case.equation, &case.shapes, Policy::Memory).unwrap();
    let tensors = case.tensors(&device, DType::real(Precision::F16));
    // An operand in f32 among halves; the values are the same.
    let wide = tensors[1].cast(Precision::F32, Purpose::Param).unwrap();
    let operands = [Operand::new(&tensors[0]), Operand::new(&wide), Operand::new(&tensors[2])];
    let want = expected(&case, &tensors, &[Conj::No; 3], Precision::F64, Domain::Real).values;
    let error = |spec: OutputSpec| {
        let got = execute(&plan, &operands, &spec).unwrap().to_vec::<f64>().unwrap();
        got.iter().zip(&want).map(|(got, want)| (got - want).powi(2)).sum::<f64>().sqrt()
    };
    let spec = |precision| OutputSpec::new(precision, Purpose::Activation);
    let (half, wide_inside) =
        (error(spec(Precision::Bf16)), error(spec(Precision::Bf16).intermediates(Precision::F32)));
    let single = error(spec(Precision::F32));
    assert!(wide_inside < half && single < 1e-3 * wide_inside, "{half:e} {wide_inside:e} {single:e}");
    assert!(error(spec(Precision::F64)) < 1e-7 * single, "sums of an f64 result are formed in f64");

    // A factor that would overflow f16 in storage is harmless in the accumulator.
    let tiny = execute(&plan, &operands, &spec(Precision::F16).scale(1e-3)).unwrap().to_vec::<f64>().unwrap();
    for (got, want) in tiny.iter().zip(&want) {
        // One rounding of the result and one of each of the 7 x 29 intermediates (tolerance of common).
        assert!((got - want * 1e-3).abs() <= 1e-3 * 5e-4 * 40.0, "{got} {want}");
    }
}

#[test]
fn operands_that_do_not_fit_are_refused() {
    let device = Device::cpu(1).unwrap();
    let case = Case::new("ab,bc->ac", &[('a', 2), ('b', 3), ('c', 4)]);
    let plan = Plan::new(&case.equation, &case.shapes, Policy::Memory).unwrap();
    let spec = OutputSpec::new(Precision::F32, Purpose::Activation);
    let real = case.tensors(&device, DType::real(Precision::F32));
    let complex = case.tensors(&device, DType::complex(Precision::F32));
    let elsewhere = case.tensors(&Device::cpu(1).unwrap(), DType::real(Precision::F32));
    let fails = |operands: &[Operand<'_>], spec: OutputSpec| execute(&plan, operands, &spec).unwrap_err().to_string();
    let [a, b] = [Operand::new(&real[0]), Operand::new(&real[1])];
    assert_eq!(fails(&[a], spec), "`ab,bc->ac` has 2 operands, found 1");
    assert_eq!(fails(&[a, a], spec), "operand 1: planned for shape [3, 4], found [2, 3]");
    assert_eq!(
        fails(&[a, (&complex[1]).into()], spec),
        "operand 1 is complex, but operand 0 is real: cast one of them"
    );
    assert_eq!(fails(&[a, (&elsewhere[1]).into()], spec), "operand 1 lives on another device than operand 0");
    assert_eq!(
        fails(&[a, b.layout(split(1))], spec),
        "operand 1: axis 1 of shape [3, 4] cannot be (re, im); it needs a real tensor with 2 entries there"
    );
    assert!(fails(&[a, b], spec.layout(split(0))).contains("operand 2: axis 0 of shape [2, 4]"));
    assert!(execute(&plan, &[a, b], &spec).is_ok());
}

#[test]
fn empty_sums_are_zero_and_empty_results_are_empty() {
    let device = Device::cpu(1).unwrap();
    for (text, sizes) in [("ab,bc->ac", [2, 0, 3]), ("ab,bc->ac", [0, 2, 3]), ("ab,bc->a", [2, 3, 0])] {
        let case = Case::new(text, &[('a', sizes[0]), ('b', sizes[1]), ('c', sizes[2])]);
        for dtype in dtypes() {
            let plan = Plan::new(&case.equation, &case.shapes, Policy::Memory).unwrap();
            let tensors = case.tensors(&device, dtype);
            let operands: Vec<Operand<'_>> = tensors.iter().map(Operand::new).collect();
            let spec = OutputSpec::new(dtype.precision, Purpose::Activation);
            let out = execute(&plan, &operands, &spec).unwrap().to_vec::<f64>().unwrap();
            assert!(out.iter().all(|it| it.abs() == 0.0), "{text} {sizes:?}");
        }
    }
}
