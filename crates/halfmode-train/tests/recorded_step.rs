//! Steps of differential equations, recorded and launched: the same bits, but where the device
//! chooses an adjoint scale that the host would have tried. Without a GPU nothing runs; with
//! `HALFMODE_REQUIRE_CUDA=1` that is a failure.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a test")]

use halfmode_autograd::{Result as OpResult, Tape, Var};
use halfmode_nn::{ParamSpec, Params};
use halfmode_ode::{MlpField, OdeOptions, OdePrecision, PlanarField, TimeInput, Times, TupleField, VectorField};
use halfmode_ode::{odeint_last, odeint_tuple_last};
use halfmode_precision::{LossScale, Precision, PrecisionPolicy};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Rng, gpu};
use halfmode_train::{AdamW, AdamWConfig, AdamWKind, GaussianNll, LpLoss, RecordedStep, Result};
use std::sync::Arc;

type Loss = Box<dyn Fn(&mut Tape, &[Var]) -> Result<Var>>;

/// A perceptron that does not say that it is one.
struct Plain(MlpField);

impl VectorField for Plain {
    fn param_specs(&self) -> Vec<ParamSpec> {
        self.0.param_specs()
    }

    fn velocity(&self, tape: &mut Tape, t: &Var, y: &Var, params: &[Var]) -> OpResult<Var> {
        self.0.velocity(tape, t, y, params)
    }
}

fn data(device: &Device, shape: [usize; 3], seed: u64) -> Tensor {
    let values = Rng::new(seed).normals(shape.iter().product());
    Tensor::from_slice(device, &values, shape, Precision::F32, Purpose::Data).unwrap()
}

fn solved<F: VectorField + 'static>(device: &Device, field: F, options: &OdeOptions) -> Loss {
    let (field, options) = (Arc::new(field), options.clone());
    let (x, target) = (data(device, [1, 70, 6], 1), data(device, [1, 70, 6], 2));
    Box::new(move |tape, weights| {
        let (x, target) = (tape.constant(x.clone()), tape.constant(target.clone()));
        let y = odeint_last(tape, &field, &x, Times::Fixed(&[0.0, 0.2, 0.5, 1.0]), weights, &options)?;
        Ok(tape.apply(LpLoss::default(), &[&y, &target])?)
    })
}

fn flow(device: &Device, field: PlanarField, options: &OdeOptions) -> Loss {
    let (field, options) = (Arc::new(field), options.clone());
    let points = |shape: [usize; 2], seed| {
        let values = Rng::new(seed).normals(shape.iter().product());
        Tensor::from_slice(device, &values, shape, Precision::F32, Purpose::Data).unwrap()
    };
    let (z, l) = (points([50, 2], 3), points([50, 1], 4));
    Box::new(move |tape, weights| {
        let state = [tape.constant(z.clone()), tape.constant(l.clone())];
        let out = odeint_tuple_last(tape, &field, &state, Times::Fixed(&[1.0, 0.6, 0.3, 0.0]), weights, &options)?;
        Ok(tape.apply(GaussianNll, &[&out[0], &out[1]])?)
    })
}

/// Losses of six steps, and the weights after them.
fn train(
    device: &Device,
    specs: Vec<ParamSpec>,
    policy: &Arc<PrecisionPolicy>,
    loss: &Loss,
    records: bool,
) -> Vec<f64> {
    let params = Params::new(device, specs, policy, 3).unwrap();
    let optimizer = AdamW::new(AdamWConfig::new(AdamWKind::Torch), &params, policy).unwrap();
    let mut step = RecordedStep::new(params, optimizer, policy);
    step.record(records);
    let mut seen: Vec<f64> = (0..6)
        .map(|_| {
            let outcome = step.step(loss).unwrap();
            assert!(outcome.applied);
            outcome.loss
        })
        .collect();
    assert_eq!(step.is_recorded(), records);
    assert!(seen[5] < seen[0], "{seen:?}");
    seen.extend(step.params().list.iter().flat_map(|it| it.exact().to_vec::<f64>().unwrap()));
    seen
}

#[test]
fn recorded_steps_of_differential_equations_are_launched_ones() {
    let Some(gpu) = gpu() else { return };
    let mlp = || MlpField { channels: 6, hidden: vec![24; 2], time: TimeInput::Concatenated };
    let planar = PlanarField { dim: 2, hidden: 8, n_flows: 20 };
    for format in [Precision::F16, Precision::Bf16, Precision::F32] {
        let policy = match format {
            Precision::F32 => PrecisionPolicy::full(),
            half => PrecisionPolicy { loss_scale: LossScale::None, ..PrecisionPolicy::mixed(half) },
        };
        let options = OdeOptions::new(OdePrecision::new(policy));
        let policy = Arc::clone(&options.precision.velocity);
        let jobs: [(&str, Vec<ParamSpec>, Loss); 3] = [
            ("fused", mlp().param_specs(), solved(&gpu, mlp(), &options)),
            ("composed", mlp().param_specs(), solved(&gpu, Plain(mlp()), &options)),
            ("flow", planar.param_specs(), flow(&gpu, planar, &options)),
        ];
        for (name, specs, loss) in jobs {
            let [recorded, launched] = [true, false].map(|it| train(&gpu, specs.clone(), &policy, &loss, it));
            if name == "composed" && format == Precision::F16 {
                // A recorded step leaves more room above an adjoint, and so less below.
                let error = halfmode_testkit::rel_l2(&recorded, &launched);
                assert!(error <= 1e-4, "{name} in {format}: {error:e}");
            } else {
                assert_eq!(recorded, launched, "{name} in {format}");
            }
        }
    }
}

/// The likelihood and its gradients are the CPU's.
#[test]
fn the_likelihood_of_a_flow_is_the_cpu_s() {
    let Some(gpu) = gpu() else { return };
    let cpu = Device::cpu(1).unwrap();
    for (n, d, precision) in [(1, 1, Precision::F32), (1000, 2, Precision::F64), (77, 5, Precision::F32)] {
        let policy =
            Arc::new(if precision == Precision::F64 { PrecisionPolicy::double() } else { PrecisionPolicy::full() });
        let run = |device: &Device| {
            let mut tape = Tape::new(halfmode_autograd::Cx::new(device, &policy));
            let leaf = |tape: &mut Tape, shape: [usize; 2], seed| {
                let values = Rng::new(seed).normals(shape.iter().product());
                tape.leaf(Tensor::from_slice(device, &values, shape, precision, Purpose::Param).unwrap())
            };
            let (z, l) = (leaf(&mut tape, [n, d], 5), leaf(&mut tape, [n, 1], 6));
            let loss = tape.apply(GaussianNll, &[&z, &l]).unwrap();
            let mut seen = loss.value().to_vec::<f64>().unwrap();
            drop((z, l));
            tape.backward(loss, 8.0, &mut |_, grad| {
                seen.extend(grad.to_vec::<f64>()?);
                Ok(())
            })
            .unwrap();
            seen
        };
        let error = halfmode_testkit::rel_l2(&run(&gpu), &run(&cpu));
        assert!(error <= if precision == Precision::F64 { 1e-14 } else { 1e-6 }, "{n} {d} {precision}: {error:e}");
    }
}
