//! What waits for the way back, planned and counted.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::{ALL, LAST, double, linspace, mixed, on_one_thread, square, tanh_problem};
use halfmode_autograd::{Cx, Tape, Var};
use halfmode_ode::{Method, OdeOptions, OdePrecision, StateSum, StepControl, Steps, Storage, Times, odeint_last};
use halfmode_precision::Precision;
use halfmode_tensor::{Device, Purpose, Tensor};

fn budget(options: &OdeOptions, bytes: usize) -> OdeOptions {
    options.clone().storage(Storage::Budget { bytes })
}

/// whichever states were kept, the gradient has the same bits, for fixed and for chosen steps.
#[test]
fn checkpoints_leave_no_trace() {
    on_one_thread(|device| {
        let mut compensated = mixed(Precision::F16);
        compensated.precision.state = StateSum::Compensated(Precision::F16);
        let mut chosen = double().method(Method::DormandPrince54);
        chosen.steps = Steps::Adaptive(StepControl::new(1e-8, 1e-8));
        for options in [double(), mixed(Precision::F16), mixed(Precision::Bf16), compensated, chosen] {
            let mut problem = tanh_problem(37);
            if options.steps != Steps::Grid {
                problem.times = linspace(0.0, 4.0, 3);
            }
            let solve = |options: &OdeOptions| problem.solve(device, options, ALL, &square).unwrap();
            let want = solve(&options);
            for bytes in [16, 50, 100, 10_000] {
                let got = solve(&budget(&options, bytes));
                assert_eq!(got.outputs, want.outputs, "{bytes} bytes");
                assert!(got.grad_y0 == want.grad_y0 && got.grad_params == want.grad_params, "{bytes} bytes");
            }
        }
    });
}

/// Bytes saved at most, and live between the passes, by a solve of a large state; and velocities computed.
fn counted(options: &OdeOptions, n_steps: usize) -> (usize, usize, usize) {
    on_one_thread(|device: &Device| {
        let problem = tanh_problem(n_steps);
        let mut tape = Tape::new(Cx::new(device, &options.precision.velocity));
        let tensor = |values: &[f64], shape: Vec<usize>, precision| {
            Tensor::from_slice(device, values, shape, precision, Purpose::Param).unwrap()
        };
        let accumulate = options.precision.accumulate;
        let y0 = tape.leaf(tensor(&[0.5; 1000], vec![500, 2], accumulate));
        let weights = options.precision.velocity.weights;
        let leaves = problem.params.iter().map(|(shape, values)| tensor(values, shape.clone(), weights));
        let params: Vec<Var> = leaves.collect::<Vec<_>>().into_iter().map(|it| tape.leaf(it)).collect();
        let field = &problem.field;
        let y = odeint_last(&mut tape, field, &y0, Times::Fixed(&problem.times), &params, options).unwrap();
        let between = device.memory().of(Purpose::Saved).live;
        // The field's own tapes save activations, too: of them the plan of states says nothing.
        let report = tape.memory_report();
        assert_eq!(report.total_bytes(), between);
        let seed = y.value().copy(Purpose::Activation).unwrap();
        tape.backward_from(vec![(y, seed)], &mut |_, _| Ok(())).unwrap();
        let record = options.record.get();
        (between, record.n_velocities, record.n_steps)
    })
}

/// the stored trajectory is as many bytes as the plan states, in f16 half of f32; a budget is kept to, and the
/// steps that it repeats are as many as planned.
#[test]
fn the_plan_states_bytes_and_repeated_steps() {
    let n_steps = 100;
    for format in [Precision::F16, Precision::Bf16] {
        let options = mixed(format);
        let plan = Storage::Trajectory.plan(n_steps, 1000, &options.precision).unwrap();
        assert_eq!((plan.peak_bytes, plan.n_repeated), (n_steps * 1000 * 2, 0));
        let (between, n_velocities, _) = counted(&options, n_steps);
        assert_eq!((between, n_velocities), (plan.peak_bytes, 2 * 4 * n_steps));
    }
    for n_states in [1, 5, 12, 99] {
        let options = budget(&mixed(Precision::F16), n_states * 4000 + 3999);
        let plan = options.storage.plan(n_steps, 1000, &options.precision).unwrap();
        assert_eq!((plan.n_states, plan.peak_bytes), (n_states, n_states * 4000));
        let (between, n_velocities, taken) = counted(&options, n_steps);
        assert_eq!((between, taken), (plan.peak_bytes, n_steps), "{n_states} states");
        assert_eq!(n_velocities, 4 * (2 * n_steps + plan.n_repeated), "{n_states} states");
    }
}

#[test]
fn a_budget_without_room_for_a_state_is_refused() {
    let device = Device::cpu(1).unwrap();
    let options = budget(&OdeOptions::new(OdePrecision::full()), 7);
    let said = tanh_problem(3).solve(&device, &options, LAST, &square).unwrap_err().to_string();
    assert!(said.contains("a state takes 8 bytes and the budget is 7"), "{said}");
}

/// A solve with its gradient on the planning device prices the same memory as the run on the CPU: peak by peak.
#[test]
fn the_planning_device_prices_a_step() {
    let options = mixed(Precision::F16);
    let cpu = Device::cpu(1).unwrap();
    let peaks = [cpu.clone(), cpu.twin()].map(|device| {
        let solve = |device: &Device| {
            let problem = tanh_problem(9);
            let policy = &options.precision.velocity;
            let mut tape = Tape::new(Cx::new(device, policy));
            let tensor = |values: &[f64], shape: &[usize], precision| {
                Tensor::from_slice(device, values, shape, precision, Purpose::Param).unwrap()
            };
            let y0 = tape.leaf(tensor(&[1.0, -0.5], &[1, 2], Precision::F32));
            let params: Vec<Tensor> =
                problem.params.iter().map(|(shape, values)| tensor(values, shape, policy.weights)).collect();
            let params: Vec<Var> = params.into_iter().map(|it| tape.leaf(it)).collect();
            let y = odeint_last(&mut tape, &problem.field, &y0, Times::Fixed(&problem.times), &params, &options);
            let y = y.unwrap();
            let seed = tensor(&[1.0, 1.0], &[1, 2], Precision::F32);
            drop((y0, params));
            tape.backward_from(vec![(y, seed)], &mut |_, _| Ok(())).unwrap();
            device.memory()
        };
        solve(&device)
    });
    for ((purpose, run), (_, planned)) in peaks[0].iter().zip(peaks[1].iter()) {
        assert_eq!(run.peak, planned.peak, "{purpose}");
    }
}
