#![allow(clippy::all, clippy::unwrap_used, clippy::print_stdout)]
use halfmode_autograd::*;
use halfmode_nn::*;
use halfmode_precision::*;
use halfmode_tensor::*;
use halfmode_train::*;
use std::sync::Arc;
use std::time::Instant;
fn median(mut f: impl FnMut(), n: usize) -> f64 {
    for _ in 0..3 { f(); }
    let mut t: Vec<f64> = (0..n).map(|_| { let s = Instant::now(); f(); s.elapsed().as_secs_f64() }).collect();
    t.sort_by(f64::total_cmp);
    t[n / 2]
}
fn main() {
  for threads in [1usize, 2] {
    let device = Device::cpu(threads).unwrap();
    println!("threads {threads}");
    // copy bandwidth for comparison
    for (label, policy, bytes) in [("full", PrecisionPolicy::full(), 28.0), ("mixed f16", PrecisionPolicy::mixed(Precision::F16), 30.0), ("mixed bf16", PrecisionPolicy::mixed(Precision::Bf16), 30.0), ("half f16", PrecisionPolicy::preset(Preset::Half, Precision::F16), 16.0)] {
        for kind in [AdamWKind::Torch, AdamWKind::Neuralop] {
            let specs: Vec<_> = (0..4).map(|i| ParamSpec::spectral(format!("w{i}"), &[32, 32, 32, 17], Init::Normal { std: 0.1 })).collect();
            let mut params = Params::new(&device, specs, &policy, 0).unwrap();
            let n = params.n_scalars() as f64;
            let mut opt = AdamW::new(AdamWConfig::new(kind), &params, &policy).unwrap();
            let grads: Vec<_> = params.list.iter().map(|p| {
                let v: Vec<f32> = (0..p.spec.n_scalars()).map(|i| ((i % 977) as f32 - 488.0) * 1e-3).collect();
                Some(Tensor::from_slice(&device, &v, p.value.shape().clone(), Precision::F32, Purpose::Grad).unwrap())
            }).collect();
            let b = if kind == AdamWKind::Neuralop { bytes - if label.starts_with("half") { 2.0 } else { 4.0 } } else { bytes };
            let t = median(|| opt.step(&mut params, &grads, 1.0 / 1024.0).unwrap(), 15);
            println!("adamw {label:11} {kind:?}: {:.2} ms for {:.2} M, {:.1} GB/s", 1e3 * t, n / 1e6, n * b / t / 1e9);
            if kind == AdamWKind::Torch && label == "full" {
                let g: Vec<&Tensor> = grads.iter().flatten().collect();
                let t = median(|| { std::hint::black_box(grad_stats(g.iter().copied()).unwrap()); }, 15);
                println!("grad_stats: {:.2} ms, {:.1} GB/s", 1e3 * t, n * 4.0 / t / 1e9);
                let path = std::env::temp_dir().join("zz.safetensors");
                let t = median(|| {
                    let mut e = Entry::parameters(&params).unwrap();
                    e.extend(opt.entries(&params).unwrap());
                    write_named(&path, &e, &serde_json::Value::Null).unwrap();
                }, 3);
                println!("checkpoint write {:.0} MB: {:.0} ms", n * 12.0 / 1e6, t * 1e3);
                let t = median(|| { std::hint::black_box(read_named(&path).unwrap()); }, 3);
                println!("checkpoint read: {:.0} ms", t * 1e3);
                std::fs::remove_file(path).unwrap();
            }
        }
    }
    for shape in [[8usize, 1, 64, 64], [8, 1, 128, 128], [1, 1, 421, 421]] {
        for (label, policy, precision) in [("f32", PrecisionPolicy::full(), Precision::F32), ("f16", PrecisionPolicy::mixed(Precision::F16), Precision::F16)] {
            for h1 in [false, true] {
                let n: usize = shape.iter().product();
                let v: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
                let w: Vec<f32> = (0..n).map(|i| (i as f32 * 0.371).sin()).collect();
                let x = Tensor::from_slice(&device, &v, shape, precision, Purpose::Activation).unwrap();
                let y = Tensor::from_slice(&device, &w, shape, Precision::F32, Purpose::Data).unwrap();
                let policy = Arc::new(policy.clone());
                let t = median(|| {
                    let mut tape = Tape::new(Cx::new(&device, &policy));
                    let (a, b) = (tape.leaf(x.clone()), tape.constant(y.clone()));
                    let op: Box<dyn Op> = if h1 { Box::new(H1Loss::default()) } else { Box::new(LpLoss::default()) };
                    let l = tape.apply_many(op, &[&a, &b]).unwrap().remove(0);
                    tape.backward(l, 1024.0, &mut |_, _| Ok(())).unwrap();
                }, 31);
                println!("{} {label} {shape:?}: {:.0} us fwd+bwd, {:.2} ns/point", if h1 { "h1" } else { "l2" }, 1e6 * t, 1e9 * t / n as f64);
            }
        }
    }
  }
}
