//! The peer's spectral convolution alone, with its options: outputs and gradients, in double precision and
//! in single precision within four times the peer's own errors.
#![allow(clippy::unwrap_used, reason = "a test")]

use halfmode_autograd::{Cx, Tape, Var};
use halfmode_fft::{Transform, TransformConfig};
use halfmode_nn::{ChannelBias, FftNorm, Init, ModeProduct, ParamSpec, SelectModes, SpectralConv};
use halfmode_precision::{Domain, Precision, PrecisionConfig, PrecisionPolicy, Preset};
use halfmode_tensor::{Device, Purpose, Tensor};
use halfmode_testkit::{Golden, assert_close};
use std::sync::Arc;

/// `[batch, channels, points]` to `[batch, points, channels]`; its own inverse with the two swapped.
fn channels_last(values: &[f64], batch: usize, channels: usize, points: usize) -> Vec<f64> {
    let at = |idx: usize| {
        let (b, p, c) = (idx / (points * channels), idx / channels % points, idx % channels);
        values[(b * channels + c) * points + p]
    };
    (0..batch * channels * points).map(at).collect()
}

fn sizes(value: &impl ToString) -> Vec<usize> {
    let text = value.to_string();
    text.trim_matches(['[', ']']).split(',').filter_map(|it| it.trim().parse().ok()).collect()
}

fn check(name: &str, precision: Precision) {
    let golden = Golden::load(name);
    let device = Device::cpu(2).unwrap();
    let policy = Arc::new(match precision {
        Precision::F64 => PrecisionPolicy::double(),
        _ => PrecisionConfig::new(Preset::Full, Precision::F16).resolve().unwrap(),
    });
    let (out_tolerance, grad_tolerance) = match precision {
        Precision::F64 => (1e-10, 1e-9),
        _ => (golden.f32_tolerance("out"), golden.f32_tolerance("grad_max")),
    };
    let config = golden.fact("config");
    let separable = config["separable"] == true;
    let norm = match config["fft_norm"].as_str() {
        Some("ortho") => FftNorm::Ortho,
        Some("backward") => FftNorm::Backward,
        _ => FftNorm::Forward,
    };
    let (x_shape, x) = golden.get("in/x");
    let (batch, c_in, from) = (x_shape[0], x_shape[1], x_shape[2..].to_vec());
    let factor = config["resolution_scaling_factor"].as_f64().unwrap_or(1.0);
    let mut to: Vec<usize> = from.iter().map(|&n| (n as f64 * factor).round_ties_even() as usize).collect();
    if golden.fact("output_shape").is_array() {
        to = sizes(golden.fact("output_shape"));
    }
    // Modes that the constructor or a later assignment chose, as far as the grid resolves them.
    let later = &config["set_n_modes_after_init"];
    let chosen = sizes(if later.is_array() { later } else { &config["n_modes"] });
    let (w_shape, w_file) = golden.get("param/weight.tensor");
    let n_channel_axes = if separable { 1 } else { 2 };
    let w_shape = &w_shape[..w_shape.len() - 1];
    let stored = w_shape[n_channel_axes..].to_vec();
    let d = from.len();
    let used: Vec<usize> = (0..d)
        .map(|axis| {
            let half = |n: usize| if axis + 1 == d { n / 2 + 1 } else { n };
            half(chosen[axis]).min(half(from[axis])).min(half(to[axis]))
        })
        .collect();
    let spec = if separable { ParamSpec::separable } else { ParamSpec::spectral }("weight.tensor", w_shape, Init::Ones);
    let transform = |grid: &[usize]| {
        let (grid, modes, accumulate) = (grid.to_vec(), used.clone(), policy.transform.accumulate);
        let config = TransformConfig { grid, modes, domain: Domain::Real, accumulate, algorithm: None };
        Arc::new(Transform::new(&device, config).unwrap())
    };
    let make = |shape: &[usize], values: &[f64]| {
        Tensor::from_slice(&device, values, shape, precision, Purpose::Activation).unwrap()
    };
    let field = |c: usize, grid: &[usize], values: &[f64]| {
        make(&[&[batch][..], grid, &[c]].concat(), &channels_last(values, batch, c, grid.iter().product()))
    };

    let mut tape = Tape::new(Cx::new(&device, &policy));
    let x = tape.leaf(field(c_in, &from, x));
    let weight = tape.leaf(make(&spec.stored_shape(), &spec.to_stored(w_file)));
    let mut kept: Var = weight.clone();
    if used != stored {
        kept = tape.apply(SelectModes::new(&stored, &used, Domain::Real), &[&weight]).unwrap();
    }
    let product = if separable { ModeProduct::Separable } else { ModeProduct::Dense };
    let conv = SpectralConv::resampling(transform(&from), transform(&to)).with_product(product).with_norm(norm);
    let mut y = tape.apply(conv, &[&x, &kept]).unwrap();
    let has_bias = golden.names("param/").any(|it| it == "bias");
    if has_bias {
        let (shape, bias) = golden.get("param/bias");
        let bias = tape.leaf(make(shape, bias));
        y = tape.apply(ChannelBias, &[&y, &bias]).unwrap();
    }
    let c_out = *y.value().shape().last().unwrap();
    let points: usize = to.iter().product();
    let out = channels_last(&y.value().to_vec::<f64>().unwrap(), batch, points, c_out);
    let case = format!("{name} in {precision}");
    assert_close!(format!("{case}: out"), out, *golden.get("f64/out").1, out_tolerance);
    let seed = field(c_out, &to, golden.get("in/cotangent").1);
    let mut grads = vec![Vec::new(); 3];
    tape.backward_from(vec![(y, seed)], &mut |id, grad| {
        grads[id.0] = grad.to_vec::<f64>()?;
        Ok(())
    })
    .unwrap();
    let grad_x = channels_last(&grads[0], batch, from.iter().product(), c_in);
    assert_close!(format!("{case}: grad x"), grad_x, *golden.get("f64/grad_in/x").1, grad_tolerance);
    let mut params = vec![("weight.tensor".to_owned(), spec.to_file(&grads[1]))];
    if has_bias {
        params.push(("bias".to_owned(), grads.pop().unwrap()));
    }
    golden.assert_gradients(&case, "f64/grad_param/", &params, grad_tolerance);
}

#[test]
fn golden_spectral_convolutions() {
    let mut names = Golden::list("spectral");
    assert!(names.len() > 15, "{names:?}");
    names.extend(["spectral2d", "spectral2d_oddmodes", "spectral2d_separable"].map(str::to_owned));
    for name in names {
        check(&name, Precision::F64);
        check(&name, Precision::F32);
    }
}
