//! Outputs and all gradients of the peer's FNO: in double precision, and in single precision within four times
//! the peer's own errors.
#![allow(clippy::unwrap_used, reason = "a test")]

use halfmode_autograd::{Cx, LeafId, Tape};
use halfmode_nn::{Module, ParamRole, Params};
use halfmode_operators::{Fno, FnoConfig};
use halfmode_precision::{DType, Precision, PrecisionConfig, PrecisionPolicy, Preset};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Golden, assert_close};
use std::sync::Arc;

/// The constructor's arguments of a case.
fn config(golden: &Golden) -> FnoConfig {
    let mut arguments = golden.fact("config").clone();
    let known = arguments.as_object_mut().unwrap();
    known.remove("forward_kwargs");
    known.remove("cls");
    serde_json::from_value(arguments).unwrap()
}

fn policy(precision: Precision) -> PrecisionPolicy {
    match precision {
        Precision::F64 => PrecisionPolicy::double(),
        Precision::F32 => PrecisionConfig::new(Preset::Full, Precision::F16).resolve().unwrap(),
        half => PrecisionPolicy::mixed(half),
    }
}

/// A recorded model on a device.
struct Model {
    fno: Fno,
    params: Params,
    policy: Arc<PrecisionPolicy>,
    x: Tensor,
    cotangent: Tensor,
    output_shape: Option<Vec<usize>>,
}

/// What a pass in training gives.
struct Trained {
    out: Tensor,
    grad_x: Tensor,
    /// Of the parameters, in their order.
    grads: Vec<Option<Tensor>>,
    /// How often each running statistic was observed.
    #[cfg(feature = "cuda")]
    n_observed: std::collections::BTreeMap<usize, i32>,
}

impl Model {
    fn new(golden: &Golden, device: &Device, precision: Precision) -> Self {
        let policy = Arc::new(policy(precision));
        let config = config(golden);
        let complex = config.complex_data;
        let fno = Fno::new(config).unwrap();
        let mut params = Params::new(device, fno.param_specs(), &policy, 0).unwrap();
        let mut names: Vec<&str> = golden.names("param/").collect();
        for param in &mut params.list {
            let (shape, values) = golden.get(&format!("param/{}", param.spec.name));
            let trailing: &[usize] = if param.spec.complex { &[2] } else { &[] };
            assert_eq!([&param.spec.file_shape[..], trailing].concat(), shape, "{}", param.spec.name);
            param.set_file_values(values).unwrap();
            names.retain(|it| *it != param.spec.name);
        }
        assert!(names.is_empty(), "parameters that the model lacks: {names:?}");
        let tensor = |name: &str| {
            let (shape, values) = golden.get(name);
            let (shape, dtype) = match complex {
                true => (&shape[..shape.len() - 1], DType::complex(policy.pointwise.storage)),
                false => (shape, DType::real(policy.pointwise.storage)),
            };
            Tensor::from_scalars(device, values, shape, dtype, Purpose::Activation).unwrap()
        };
        let (x, cotangent) = (tensor("in/x"), tensor("in/cotangent"));
        let output_shape = serde_json::from_value(golden.fact("output_shape").clone()).unwrap();
        Model { fno, params, policy, x, cotangent, output_shape }
    }

    fn evaluate(&self) -> Tensor {
        let mut tape = Tape::new(Cx::inference(self.x.device(), &self.policy));
        let weights = self.params.leaves(&mut tape);
        let x = tape.constant(self.x.clone());
        self.fno.forward(&mut tape, &weights, &[&x]).unwrap().into_value()
    }

    /// A pass in training, which moves running statistics.
    fn train(&mut self) -> Trained {
        let mut tape = Tape::new(Cx::new(self.x.device(), &self.policy));
        let weights = self.params.leaves(&mut tape);
        let x = tape.leaf(self.x.clone());
        let y = self.fno.forward_to(&mut tape, &weights, &x, self.output_shape.as_deref()).unwrap();
        let out = y.value().clone();
        let mut grads: Vec<Option<Tensor>> = vec![None; self.params.list.len() + 1];
        let seeds = vec![(y, self.cotangent.clone())];
        drop((weights, x));
        let observed = tape.take_observed();
        tape.backward_from(seeds, &mut |LeafId(id), grad| {
            grads[id] = Some(grad);
            Ok(())
        })
        .unwrap();
        let grad_x = grads.pop().unwrap().unwrap();
        self.params.observe(&observed).unwrap();
        Trained {
            out,
            grad_x,
            grads,
            #[cfg(feature = "cuda")]
            n_observed: observed.iter().fold(std::collections::BTreeMap::new(), |mut counts, (LeafId(id), _)| {
                *counts.entry(*id).or_default() += 1;
                counts
            }),
        }
    }
}

/// What a case gives on a device.
struct Pass {
    /// With running statistics, where the case has them.
    evaluation: Option<Tensor>,
    trained: Trained,
    /// After the pass.
    params: Params,
}

/// An evaluation where one is recorded, then a pass in training.
fn pass(golden: &Golden, device: &Device, precision: Precision) -> Pass {
    let mut model = Model::new(golden, device, precision);
    let evaluation = golden.names("f64/").any(|it| it == "evaluation").then(|| model.evaluate());
    let trained = model.train();
    Pass { evaluation, trained, params: model.params }
}

/// The values of a pass.
struct Values {
    evaluation: Option<Vec<f64>>,
    out: Vec<f64>,
    grad_x: Vec<f64>,
    /// Of what gradients move, by name, in file order.
    grads: Vec<(String, Vec<f64>)>,
    /// All parameters after the pass.
    after: Vec<(String, Vec<f64>)>,
}

impl Pass {
    fn values(self) -> Values {
        let values = |it: &Tensor| it.to_vec::<f64>().unwrap();
        let list = &self.params.list;
        let moved = list.iter().zip(&self.trained.grads).filter(|(param, _)| param.spec.role != ParamRole::Statistic);
        let grads = moved.map(|(param, grad)| {
            let grad = grad.as_ref().map_or_else(|| vec![0.0; param.spec.n_scalars()], values);
            (param.spec.name.clone(), param.spec.to_file(&grad))
        });
        Values {
            evaluation: self.evaluation.as_ref().map(values),
            out: values(&self.trained.out),
            grad_x: values(&self.trained.grad_x),
            grads: grads.collect(),
            after: list.iter().map(|it| (it.spec.name.clone(), it.file_values().unwrap())).collect(),
        }
    }
}

/// Holds a pass against the record.
fn assert_recorded(golden: &Golden, case: &str, precision: Precision, got: &Values) {
    let [of_values, of_gradients] = match precision {
        Precision::F64 => [1e-10, 1e-9],
        _ => ["out", "grad_max"].map(|it| golden.f32_tolerance(it)),
    };
    if let Some(evaluation) = &got.evaluation {
        assert_close!(format!("{case}: evaluation"), *evaluation, *golden.get("f64/evaluation").1, of_values);
    }
    assert_close!(format!("{case}: out"), got.out, *golden.get("f64/out").1, of_values);
    assert_close!(format!("{case}: grad x"), got.grad_x, *golden.get("f64/grad_in/x").1, of_gradients);
    golden.assert_gradients(case, "f64/grad_param/", &got.grads, of_gradients);
    for name in golden.names("f64/after/") {
        let (_, after) = got.after.iter().find(|it| it.0 == name).unwrap();
        assert_close!(format!("{case}: {name}"), *after, *golden.get(&format!("f64/after/{name}")).1, of_values);
    }
}

fn check(name: &str, precision: Precision) {
    let golden = Golden::load(name);
    let device = Device::cpu(2).unwrap();
    let got = pass(&golden, &device, precision).values();
    assert_recorded(&golden, &format!("{name} in {precision}"), precision, &got);
}

/// Batch norm: a pass in training, what it leaves in the running statistics, and an evaluation with them.
#[test]
fn fno_batch_norm() {
    let names = Golden::list("batch_norm");
    assert!(names.len() >= 4, "{names:?}");
    for name in names {
        assert!(Golden::load(&name).names("f64/after/").count() >= 4);
        check(&name, Precision::F64);
        check(&name, Precision::F32);
    }
}

const ACCEPTANCE_SET: [&str; 3] = ["fno1d", "fno2d", "fno3d"];

#[test]
fn fno_of_the_acceptance_set() {
    for name in ACCEPTANCE_SET {
        check(name, Precision::F64);
        check(name, Precision::F32);
    }
}

/// Every option of the peer that the model has, as recorded by `tests/golden/fno_options/make.py`.
#[test]
fn fno_options() {
    let names = Golden::list("fno_options");
    assert!(names.len() >= 39, "{names:?}");
    for name in names {
        println!("{name}");
        check(&name, Precision::F64);
        check(&name, Precision::F32);
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use super::{ACCEPTANCE_SET, Model, Trained, Values, assert_recorded, pass};
    use halfmode_nn::ParamRole;
    use halfmode_precision::{Format, Precision};
    use halfmode_tensor::cuda::CudaError;
    use halfmode_tensor::{Device, Target};
    use halfmode_testkit::{Golden, gpu, rel_l2};
    use std::panic::AssertUnwindSafe;

    fn all_cases() -> Vec<String> {
        let mut names = ACCEPTANCE_SET.map(str::to_owned).to_vec();
        names.extend(["batch_norm", "fno_options"].into_iter().flat_map(Golden::list));
        names
    }

    /// A missing kernel is an error on the planning device too.
    #[test]
    fn every_case_plans_for_a_gpu() {
        let names = all_cases();
        assert!(names.len() >= 47, "{names:?}");
        for name in names {
            println!("{name}");
            let golden = Golden::load(&name);
            for precision in Precision::ALL {
                let device = Device::meta(Target::Cuda);
                let planned = pass(&golden, &device, precision);
                let shape = planned.trained.out.shape();
                assert_eq!(shape[..], golden.get("f64/out").0[..shape.len()], "{name}");
                assert!(device.memory().total.peak > 0);
            }
        }
    }

    /// Asserts that values in single precision differ by at most 1e-5 of the largest of them, or of `floor`, beside what
    /// `want` itself is off from `exact`: sums that nearly cancel are not known better in single precision, whoever
    /// forms them.
    fn assert_near(what: &str, got: &[f64], [want, exact]: [&[f64]; 2], floor: f64) {
        let largest = want.iter().fold(floor, |most, it| most.max(it.abs()));
        let (error, idx) = halfmode_testkit::max_error(got, want);
        let own = halfmode_testkit::max_error(want, exact).0;
        assert!(
            got.len() == want.len() && error <= 1e-5 * largest + own,
            "{what}: off by {error:.2e} of {largest:.2e} at {idx}, and the other by {own:.2e}"
        );
    }

    fn assert_same(case: &str, got: &Values, want: &Values, exact: &Values) {
        let evaluations = got.evaluation.iter().zip(&want.evaluation).zip(&exact.evaluation);
        evaluations.for_each(|((got, want), exact)| {
            assert_near(&format!("{case}: evaluation"), got, [want, exact], 0.0);
        });
        assert_near(&format!("{case}: out"), &got.out, [&want.out, &exact.out], 0.0);
        assert_near(&format!("{case}: grad x"), &got.grad_x, [&want.grad_x, &exact.grad_x], 0.0);
        // All gradients are held to the size of the largest: some are zero up to rounding, as those of biases before a norm.
        let largest = |it: &[f64]| it.iter().fold(0.0, |most: f64, it| most.max(it.abs()));
        let floor = want.grads.iter().map(|it| largest(&it.1)).fold(0.0, f64::max);
        for (((name, got), (_, want)), (_, exact)) in got.grads.iter().zip(&want.grads).zip(&exact.grads) {
            assert_near(&format!("{case}: grad {name}"), got, [want, exact], floor);
        }
        for (((name, got), (_, want)), (_, exact)) in got.after.iter().zip(&want.after).zip(&exact.after) {
            assert_near(&format!("{case}: {name} after"), got, [want, exact], 0.0);
        }
    }

    /// Every case against the record, in single precision against the CPU as well; and what was planned is what it
    /// takes.
    #[test]
    fn every_case_on_a_gpu() {
        let Some(device) = gpu() else { return };
        let checks = all_cases().into_iter().flat_map(|name| [(name.clone(), Precision::F64), (name, Precision::F32)]);
        // All of them, whatever the first one says.
        let failed: Vec<_> = checks
            .filter(|(name, precision)| {
                println!("{name} in {precision}");
                let check = AssertUnwindSafe(|| check_on_a_gpu(name, *precision, &device));
                std::panic::catch_unwind(check).is_err()
            })
            .collect();
        assert!(failed.is_empty(), "{failed:?}");
    }

    fn check_on_a_gpu(name: &str, precision: Precision, device: &Device) {
        let golden = Golden::load(name);
        let case = format!("{name} in {precision} on a GPU");
        let twin = device.twin();
        pass(&golden, &twin, precision);
        device.reset_peak();
        let before = device.memory().total.live;
        let computed = pass(&golden, device, precision);
        assert_eq!(device.memory().total.peak - before, twin.memory().total.peak, "{case}: planned bytes");
        let got = computed.values();
        if precision == Precision::F32 {
            let cpu = Device::cpu(2).unwrap();
            let [want, exact] = [precision, Precision::F64].map(|it| pass(&golden, &cpu, it).values());
            assert_same(&case, &got, &want, &exact);
        }
        assert_recorded(&golden, &case, precision, &got);
    }

    /// A pass can be recorded: nothing in it waits for the device or uploads values. Replayed, it gives the same bits,
    /// and running statistics move on from where they are.
    #[test]
    fn every_case_is_recorded_and_replayed_on_a_gpu() {
        let Some(device) = gpu() else { return };
        let context = device.as_cuda().unwrap().context();
        let values = |it: &Trained| -> Vec<Vec<f64>> {
            let tensors = [&it.out, &it.grad_x].into_iter().chain(it.grads.iter().flatten());
            tensors.map(|it| it.to_vec().unwrap()).collect()
        };
        for name in all_cases() {
            println!("{name}");
            let mut model = Model::new(&Golden::load(&name), &device, Precision::F32);
            let statistics = |model: &Model| -> Vec<(usize, Vec<f64>)> {
                let all = model.params.list.iter().enumerate();
                let statistics = all.filter(|(_, it)| it.spec.role == ParamRole::Statistic);
                statistics.map(|(id, it)| (id, it.value.to_vec().unwrap())).collect()
            };
            let start = statistics(&model);
            let launched = model.train();
            let want = values(&launched);
            let once = statistics(&model);
            let mut recorded = None;
            let record = || {
                recorded = Some(model.train());
                Ok::<(), CudaError>(())
            };
            let graph = context.capture(record).unwrap();
            graph.launch().unwrap();
            assert_eq!(values(&recorded.unwrap()), want, "{name}");
            // s becomes 0.9 s + 0.1 v with each observation, so what is left to go shrinks by 0.9 to the power of their number.
            for (((id, twice), (_, once)), (_, start)) in statistics(&model).iter().zip(&once).zip(&start) {
                let left = 0.9f64.powi(launched.n_observed[id]);
                let moved: Vec<f64> =
                    once.iter().zip(start).map(|(once, start)| once + left * (once - start)).collect();
                assert_near(&format!("{name}: a running statistic"), twice, [&moved, &moved], 0.0);
            }
        }
    }

    /// In halves the output is off the record by at most four times what the CPU's is: layer by layer a GPU stores
    /// several times as many intermediates, whose roundings add as squares.
    #[test]
    fn halves_of_every_case_on_a_gpu() {
        let Some(device) = gpu() else { return };
        let cpu = Device::cpu(2).unwrap();
        for name in all_cases() {
            let golden = Golden::load(&name);
            let want = golden.get("f64/out").1;
            for precision in [Precision::F16, Precision::Bf16] {
                let out = |device: &Device| pass(&golden, device, precision).values().out;
                let [on_gpu, on_cpu] = [&device, &cpu].map(|device| rel_l2(&out(device), want));
                println!("{name} in {precision}: {on_gpu:.2e}, on the CPU {on_cpu:.2e}");
                let least = Format::from(precision).unit_roundoff();
                assert!(on_gpu <= 4.0 * on_cpu.max(least), "{name} in {precision}: {on_gpu:.2e} against {on_cpu:.2e}");
            }
        }
    }
}
