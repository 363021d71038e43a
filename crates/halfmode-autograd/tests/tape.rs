//! The tape: who gets which gradient, when things die, and what is reported.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use halfmode_autograd::{Cx, Error, LeafId, Op, Outputs, Result, Saved, Tape, Var};
use halfmode_precision::{Precision, PrecisionPolicy};
use halfmode_tensor::{Device, Purpose, Target, Tensor};
use smallvec::smallvec;
use std::sync::{Arc, Mutex};

fn cx(device: &Device) -> Cx {
    Cx::new(device, &Arc::new(PrecisionPolicy::full()))
}

fn cpu() -> Device {
    Device::cpu(1).unwrap()
}

fn tensor(device: &Device, values: &[f64]) -> Tensor {
    Tensor::from_slice(device, values, [values.len()], Precision::F32, Purpose::Activation).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor.to_vec().unwrap()
}

/// `f(a, b)` elementwise; on the planning device nothing but its allocation.
fn map(a: &Tensor, b: &Tensor, f: impl Fn(f64, f64) -> f64) -> Result<Tensor> {
    if !a.device().launches() {
        return Ok(a.device().alloc(a.shape().clone(), a.dtype(), Purpose::Activation)?);
    }
    let out: Vec<f64> = values(a).iter().zip(values(b)).map(|(a, b)| f(*a, b)).collect();
    Ok(Tensor::from_slice(a.device(), &out, a.shape().clone(), a.precision(), Purpose::Activation)?)
}

type Events = Arc<Mutex<Vec<String>>>;

/// `y = a b`, both saved in the precision of the policy; logs its backward and what lives then.
#[derive(Clone, Debug, Default)]
struct Product {
    events: Events,
}

impl Op for Product {
    fn name(&self) -> &'static str {
        "product"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> Result<(Outputs, Saved)> {
        let [a, b] = self.expect_inputs(inputs)?;
        let y = map(a, b, |a, b| a * b)?;
        Ok((smallvec![y], Saved::new("product").keep(cx, "a", a)?.keep(cx, "b", b)?))
    }

    fn backward(
        &self,
        cx: &Cx,
        mut saved: Saved,
        grads: &mut [Option<Tensor>],
        needs: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        let live = cx.device.memory().of(Purpose::Saved).live;
        self.events.lock().unwrap().push(format!("needs {needs:?}, {live} bytes saved"));
        let (a, b) = (saved.take("a")?, saved.take("b")?);
        let Some(g) = grads[0].take() else { return Ok(vec![None, None]) };
        let grad = |x: &Tensor, need: bool| need.then(|| map(&g, x, |g, x| g * x)).transpose();
        Ok(vec![grad(&b, needs[0])?, grad(&a, needs[1])?])
    }
}

/// `y = a + b`; hands the very gradient it got to both.
#[derive(Debug)]
struct Sum;

impl Op for Sum {
    fn name(&self) -> &'static str {
        "sum"
    }

    fn forward(&self, _: &Cx, inputs: &[&Tensor]) -> Result<(Outputs, Saved)> {
        let [a, b] = self.expect_inputs(inputs)?;
        Ok((smallvec![map(a, b, |a, b| a + b)?], Saved::new("sum")))
    }

    fn backward(&self, _: &Cx, _: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        Ok(vec![grads[0].clone(), grads[0].take()])
    }
}

/// `(2 x, 3 x)`; logs which outputs got a gradient.
#[derive(Debug, Default)]
struct TwoOutputs {
    events: Events,
}

impl Op for TwoOutputs {
    fn name(&self) -> &'static str {
        "two_outputs"
    }

    fn forward(&self, _: &Cx, inputs: &[&Tensor]) -> Result<(Outputs, Saved)> {
        let [x] = self.expect_inputs(inputs)?;
        Ok((smallvec![map(x, x, |x, _| 2.0 * x)?, map(x, x, |x, _| 3.0 * x)?], Saved::new("two_outputs")))
    }

    fn backward(&self, _: &Cx, _: Saved, grads: &mut [Option<Tensor>], _: &[bool]) -> Result<Vec<Option<Tensor>>> {
        let got: Vec<bool> = grads.iter().map(Option::is_some).collect();
        self.events.lock().unwrap().push(format!("{got:?}"));
        let mut sum: Option<Tensor> = None;
        for (grad, factor) in grads.iter().zip([2.0, 3.0]) {
            let Some(grad) = grad else { continue };
            let zero = map(grad, grad, |_, _| 0.0)?;
            sum = Some(map(grad, sum.as_ref().unwrap_or(&zero), |g, sum| sum + factor * g)?);
        }
        Ok(vec![sum])
    }
}

/// Gradients by leaf; an `Err` names a leaf that was handed out twice.
fn gradients(tape: Tape, seeds: Vec<(Var, Tensor)>, n_leaves: usize) -> Vec<Option<Vec<f64>>> {
    let mut grads = vec![None; n_leaves];
    let keep = &mut |id: LeafId, grad: Tensor| {
        assert!(grads[id.0].is_none(), "leaf {} twice", id.0);
        grads[id.0] = Some(values(&grad));
        Ok(())
    };
    tape.backward_from(seeds, keep).unwrap();
    grads
}

#[test]
fn uses_of_one_value_add_up() {
    let device = cpu();
    let mut tape = Tape::new(cx(&device));
    let x = tape.leaf(tensor(&device, &[2.0, -3.0]));
    // y = x^2, z = y x + x = x^3 + x
    let y = tape.apply(Product::default(), &[&x, &x]).unwrap();
    let z = tape.apply(Product::default(), &[&y, &x]).unwrap();
    let z = tape.apply(Sum, &[&z, &x]).unwrap();
    assert_eq!(values(z.value()), [10.0, -30.0]);
    let seed = tensor(&device, &[1.0, 10.0]);
    assert_eq!(gradients(tape, vec![(z, seed)], 1), [Some(vec![13.0, 280.0])]);
}

/// `sum` hands one tensor to both inputs: adding to one of the two must not change the other, nor
/// the seed that the caller holds.
#[test]
fn a_gradient_handed_to_two_inputs_is_not_overwritten() {
    let device = cpu();
    let mut tape = Tape::new(cx(&device));
    let (a, b) = (tape.leaf(tensor(&device, &[1.0])), tape.leaf(tensor(&device, &[1.0])));
    let y = tape.apply(Sum, &[&a, &b]).unwrap();
    let y = tape.apply(Sum, &[&y, &a]).unwrap();
    let y = tape.apply(Sum, &[&y, &y]).unwrap();
    let seed = tensor(&device, &[1.0]);
    let grads = gradients(tape, vec![(y.clone(), seed.clone()), (y, seed.clone())], 2);
    assert_eq!(grads, [Some(vec![8.0]), Some(vec![4.0])]);
    assert_eq!(values(&seed), [1.0]);
}

#[test]
fn backward_scales_by_its_seed() {
    let device = cpu();
    let mut tape = Tape::new(cx(&device));
    let x = tape.leaf(tensor(&device, &[3.0]));
    let y = tape.apply(Product::default(), &[&x, &x]).unwrap();
    let mut grad = None;
    tape.backward(y, 1024.0, &mut |id, g| {
        assert_eq!(id, LeafId(0));
        grad = Some(values(&g));
        Ok(())
    })
    .unwrap();
    assert_eq!(grad, Some(vec![6144.0]));
}

#[test]
fn several_seeds_and_seeded_leaves() {
    let device = cpu();
    let mut tape = Tape::new(cx(&device));
    let (x, alone) = (tape.leaf(tensor(&device, &[3.0])), tape.leaf(tensor(&device, &[1.0])));
    let unused = tape.leaf(tensor(&device, &[1.0]));
    let y = tape.apply(Product::default(), &[&x, &x]).unwrap();
    let seed = |v: f64| tensor(&device, &[v]);
    let seeds = vec![(y.clone(), seed(1.0)), (x, seed(0.5)), (alone, seed(7.0)), (y, seed(2.0))];
    assert_eq!(gradients(tape, seeds, 3), [Some(vec![18.5]), Some(vec![7.0]), None]);
    drop(unused);
}

#[test]
fn constants_get_no_gradient_and_untracked_ops_keep_nothing() {
    let device = cpu();
    let mut tape = Tape::new(cx(&device));
    let product = Product::default();
    let constant = tape.constant(tensor(&device, &[5.0]));
    let x = tape.leaf(tensor(&device, &[3.0]));
    let of_constants = tape.apply(product.clone(), &[&constant, &constant]).unwrap();
    assert!(!of_constants.is_tracked() && tape.memory_report().rows.is_empty());
    let y = tape.apply(product.clone(), &[&of_constants, &x]).unwrap();
    assert!(y.is_tracked());
    let seed = tensor(&device, &[1.0]);
    assert_eq!(gradients(tape, vec![(y, seed)], 1), [Some(vec![25.0])]);
    assert_eq!(product.events.lock().unwrap()[0][..19], *"needs [false, true]");
}

#[test]
fn inference_records_nothing() {
    let device = cpu();
    let mut tape = Tape::new(Cx::inference(&device, &Arc::new(PrecisionPolicy::full())));
    let x = tape.leaf(tensor(&device, &[3.0]));
    let y = tape.apply(Product::default(), &[&x, &x]).unwrap();
    assert!(!x.is_tracked() && !y.is_tracked());
    assert_eq!(tape.memory_report().to_string().lines().count(), 2);
    assert!(matches!(tape.backward(y, 1.0, &mut |_, _| Ok(())), Err(Error::Untracked)));
}

#[test]
fn a_variable_of_another_tape_is_refused() {
    let device = cpu();
    let (mut one, mut other) = (Tape::new(cx(&device)), Tape::new(cx(&device)));
    let (a, b) = (one.leaf(tensor(&device, &[1.0])), other.leaf(tensor(&device, &[1.0])));
    let err = one.apply(Sum, &[&a, &b]).unwrap_err();
    assert!(matches!(err, Error::ForeignVar { op: "sum", input: 1 }), "{err}");
    assert_eq!(err.to_string(), "sum: input 1 was recorded on another tape");
    // Its value is welcome as a constant.
    let b = one.constant(b.into_value());
    let y = one.apply(Sum, &[&a, &b]).unwrap();
    let err = other.backward(y, 1.0, &mut |_, _| Ok(())).unwrap_err();
    assert!(matches!(err, Error::ForeignVar { op: "backward", input: 0 }), "{err}");
}

#[test]
fn backward_starts_from_one_number() {
    let device = cpu();
    let mut tape = Tape::new(cx(&device));
    let x = tape.leaf(tensor(&device, &[1.0, 2.0]));
    let err = tape.backward(x, 1.0, &mut |_, _| Ok(())).unwrap_err();
    assert_eq!(err.to_string(), "backward starts from one number, found shape [2]");
    let tape = Tape::new(cx(&device));
    let x = tape.constant(tensor(&device, &[1.0]));
    assert!(matches!(tape.backward(x, 1.0, &mut |_, _| Ok(())), Err(Error::Untracked)));
}

#[test]
fn outputs_get_their_own_gradients() {
    let device = cpu();
    for used in [[true, false], [false, true], [true, true]] {
        let mut tape = Tape::new(cx(&device));
        let x = tape.leaf(tensor(&device, &[1.0]));
        let events = Events::default();
        let op = TwoOutputs { events: Arc::clone(&events) };
        let outputs = tape.apply_many(Box::new(op), &[&x]).unwrap();
        assert_eq!(outputs.iter().map(|it| values(it.value())[0]).collect::<Vec<_>>(), [2.0, 3.0]);
        let seeds: Vec<_> =
            outputs.into_iter().zip(used).filter(|it| it.1).map(|it| (it.0, tensor(&device, &[10.0]))).collect();
        let want = 10.0 * (2.0 * f64::from(used[0]) + 3.0 * f64::from(used[1]));
        assert_eq!(gradients(tape, seeds, 1), [Some(vec![want])]);
        assert_eq!(*events.lock().unwrap(), [format!("{used:?}")]);
    }
    let mut tape = Tape::new(cx(&device));
    let x = tape.leaf(tensor(&device, &[1.0]));
    let err = tape.apply(TwoOutputs::default(), &[&x]).unwrap_err();
    assert!(matches!(err, Error::Arity { op: "two_outputs", expected: 1, found: 2 }), "{err}");
}

/// Half copies are saved beside f32 values, so what is saved has bytes of its own: 100 values of
/// two operands in two bytes each, for each of three ops. Each op frees its own before the next.
#[test]
fn saved_tensors_die_with_their_op() {
    let device = cpu();
    let cx = Cx::new(&device, &Arc::new(PrecisionPolicy { saved: Precision::F16, ..PrecisionPolicy::full() }));
    let mut tape = Tape::new(cx);
    let product = Product::default();
    let factors: Vec<Var> = (0..3).map(|_| tape.leaf(tensor(&device, &[1.5; 100]))).collect();
    let mut y = tape.leaf(tensor(&device, &[1.0; 100]));
    for factor in &factors {
        y = tape.apply(product.clone(), &[&y, factor]).unwrap();
    }
    // A branch that no gradient reaches is dropped on the way, too.
    let aside = tape.apply(product.clone(), &[&factors[0], &factors[0]]).unwrap();
    drop((aside, factors));
    let memory = device.memory();
    assert_eq!(memory.of(Purpose::Saved).live, 8 * 200);
    // Dropped variables leave only the result, as nothing saved shares the f32 values.
    assert_eq!(memory.of(Purpose::Activation).live, 400);
    let seed = tensor(&device, &[1.0; 100]);
    let mut n_leaves = 0;
    tape.backward_from(vec![(y, seed)], &mut |_, _| {
        n_leaves += 1;
        Ok(())
    })
    .unwrap();
    let live: Vec<String> = product.events.lock().unwrap().clone();
    let want = [1200, 800, 400].map(|bytes| format!("needs [true, true], {bytes} bytes saved"));
    assert_eq!(live, want);
    assert_eq!((n_leaves, device.memory().total.live), (4, 0));
}

/// An optimiser that consumes gradients as they come never holds them all: a weight's gradient is
/// handed out before the ops in front of its only use run backward.
#[test]
fn leaves_are_handed_out_as_early_as_possible() {
    let device = cpu();
    let mut tape = Tape::new(cx(&device));
    let product = Product::default();
    let leaves: Vec<Var> = (0..4).map(|_| tape.leaf(tensor(&device, &[2.0]))).collect();
    let mut y = tape.constant(tensor(&device, &[1.0]));
    for leaf in &leaves[..3] {
        y = tape.apply(product.clone(), &[&y, leaf]).unwrap();
    }
    // Leaf 2 is used again, in front: it has to wait.
    let early = tape.apply(product.clone(), &[&leaves[3], &leaves[3]]).unwrap();
    drop(early);
    let events = Arc::clone(&product.events);
    tape.backward(y, 1.0, &mut |id, _| {
        events.lock().unwrap().push(format!("leaf {}", id.0));
        Ok(())
    })
    .unwrap();
    let order: Vec<String> = events.lock().unwrap().iter().map(|event| event[..6].to_owned()).collect();
    assert_eq!(order, ["needs ", "leaf 2", "needs ", "leaf 1", "needs ", "leaf 0"]);

    let mut tape = Tape::new(cx(&device));
    let (a, b) = (tape.leaf(tensor(&device, &[2.0])), tape.leaf(tensor(&device, &[2.0])));
    let y = tape.apply(product.clone(), &[&a, &b]).unwrap();
    let y = tape.apply(product.clone(), &[&y, &b]).unwrap();
    events.lock().unwrap().clear();
    tape.backward(y, 1.0, &mut |id, grad| {
        events.lock().unwrap().push(format!("leaf {} {:?}", id.0, values(&grad)));
        Ok(())
    })
    .unwrap();
    let order = events.lock().unwrap();
    assert!(order[..2].iter().all(|event| event.starts_with("needs")), "{order:?}");
    assert_eq!(order[2..], ["leaf 0 [4.0]", "leaf 1 [8.0]"]);
}

/// Refers to a parameter, keeps its input twice, and a cast of it.
#[derive(Debug)]
struct Keeper;

impl Op for Keeper {
    fn name(&self) -> &'static str {
        "keeper"
    }

    fn forward(&self, cx: &Cx, inputs: &[&Tensor]) -> Result<(Outputs, Saved)> {
        let [x, w] = self.expect_inputs(inputs)?;
        let saved =
            Saved::new("keeper").keep(cx, "x", x)?.share(cx, "again", x).share(cx, "w", w).keep(cx, "x_hat", x)?;
        Ok((smallvec![map(x, x, |x, _| x)?], saved))
    }

    fn backward(
        &self,
        _: &Cx,
        mut saved: Saved,
        grads: &mut [Option<Tensor>],
        _: &[bool],
    ) -> Result<Vec<Option<Tensor>>> {
        assert_eq!(saved.take("x_hat")?.precision(), Precision::F16);
        saved.take("nonsense")?;
        Ok(vec![grads[0].take(), None])
    }
}

#[test]
fn the_report_tells_what_is_shared() {
    let device = cpu();
    let policy = PrecisionPolicy { saved_spectrum: Precision::F16, ..PrecisionPolicy::full() };
    let mut tape = Tape::new(Cx::new(&device, &Arc::new(policy)));
    let x = tape.leaf(tensor(&device, &[1.0; 12]));
    let w = Tensor::from_slice(&device, &[1.0f32; 6], [2, 3], Precision::F32, Purpose::Param).unwrap();
    let w = tape.leaf(w);
    let y = tape.apply(Keeper, &[&x, &w]).unwrap();
    let y = tape.apply(Product::default(), &[&y, &x]).unwrap();
    let report = tape.memory_report();
    let want = "\
op       role   shape   dtype  bytes  own
keeper   x      [12]    f32       48  yes
keeper   again  [12]    f32        0  shared
keeper   w      [2, 3]  f32        0  shared
keeper   x_hat  [12]    f16       24  yes
product  a      [12]    f32       48  yes
product  b      [12]    f32        0  shared
total 120 bytes";
    assert_eq!(report.to_string(), want);
    assert_eq!(report.total_bytes(), 120);
    let err = tape.backward_from(vec![(y, tensor(&device, &[1.0; 12]))], &mut |_, _| Ok(())).unwrap_err();
    assert_eq!(err.to_string(), "keeper: forward saved no `nonsense`");
}

#[test]
fn errors_travel() {
    let device = cpu();
    let mut tape = Tape::new(cx(&device));
    let x = tape.leaf(tensor(&device, &[2.0]));
    let err = tape.apply(Sum, &[&x]).unwrap_err();
    assert_eq!(err.to_string(), "sum: takes 2 inputs, found 1");
    // What an op refuses is not recorded.
    assert!(tape.memory_report().rows.is_empty());
    let y = tape.apply(Product::default(), &[&x, &x]).unwrap();
    let refuse = &mut |_, _| Err(Error::Op { op: "optimiser", source: "full".into() });
    assert_eq!(tape.backward(y, 1.0, refuse).unwrap_err().to_string(), "optimiser: full");
}

#[test]
fn the_planning_device_counts_the_same() {
    let step = |device: &Device| {
        let cx = Cx::new(device, &Arc::new(PrecisionPolicy::mixed(Precision::Bf16)));
        let mut tape = Tape::new(cx);
        let x = tape.leaf(tensor(device, &[1.0; 31]));
        let y = tape.apply(Product::default(), &[&x, &x]).unwrap();
        let z = tape.apply(Sum, &[&y, &x]).unwrap();
        let outputs = tape.apply_many(Box::new(TwoOutputs::default()), &[&z]).unwrap();
        let report = tape.memory_report();
        let seeds = outputs.into_iter().map(|var| (var, tensor(device, &[1.0; 31]))).collect();
        drop((x, y, z));
        let mut n_leaves = 0;
        tape.backward_from(seeds, &mut |_, _| {
            n_leaves += 1;
            Ok(())
        })
        .unwrap();
        (report, n_leaves, device.memory())
    };
    let ran = step(&cpu());
    let planned = step(&Device::meta(Target::Cpu { threads: 1 }));
    assert_eq!(ran, planned);
}

/// Every output and saved tensor, and the gradients that flow on to other ops: not those of leaves.
#[test]
fn a_watcher_sees_what_passes_by() {
    let device = cpu();
    let mut tape = Tape::new(cx(&device));
    let seen: Events = Arc::default();
    let sink = Arc::clone(&seen);
    tape.watch(move |it| {
        let line = format!("{} {} {:?} {:?}", it.call, it.op, it.role, values(it.tensor));
        sink.lock().unwrap().push(line);
    });
    let (a, b) = (tape.leaf(tensor(&device, &[2.0])), tape.leaf(tensor(&device, &[3.0])));
    let y = tape.apply(Product::default(), &[&a, &b]).unwrap();
    let z = tape.apply(Product::default(), &[&y, &a]).unwrap();
    tape.backward(z, 1.0, &mut |_, _| Ok(())).unwrap();
    let want = [
        "0 product Output(0) [6.0]",
        "0 product Saved(\"a\") [2.0]",
        "0 product Saved(\"b\") [3.0]",
        "1 product Output(0) [12.0]",
        "1 product Saved(\"a\") [6.0]",
        "1 product Saved(\"b\") [2.0]",
        "1 product Gradient(0) [2.0]",
    ];
    assert_eq!(*seen.lock().unwrap(), want);
}
