//! What the context does on a GPU. Without one the tests say so and pass; with `HALFMODE_REQUIRE_CUDA=1` they fail.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use half::{bf16, f16};
use halfmode_cuda::{
    Arg, Compute, Context, Error, FftKind, FftPlan, Grid, Matmul, Operand, Roots, Scalar, Source, Timer,
};
use halfmode_precision::Precision;

fn context() -> Option<Context> {
    match Context::new(0, Roots::from_environment(), None) {
        Ok(context) => Some(context),
        Err(err) => {
            assert!(std::env::var_os("HALFMODE_REQUIRE_CUDA").is_none(), "{err}");
            eprintln!("skipped: {err}");
            None
        }
    }
}

const SOURCE: Source = Source {
    name: "device_test",
    text: r#"
#include "halfmode.cuh"
extern "C" __global__ void scale(T* x, f32 factor, long long n) {
    for (long long i = grid_start(); i < n; i += grid_stride()) x[i] = narrow<T>(widen<acc_t<T>>(x[i]) * factor);
}
extern "C" __global__ void broken(T* x) { x[0] = undefined_name; }
"#,
};

const GOOD: Source = Source { name: "device_test_good", ..SOURCE };

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|it| it.to_le_bytes()).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|it| f32::from_le_bytes([it[0], it[1], it[2], it[3]])).collect()
}

#[test]
fn kernels_are_compiled_checked_and_launched() {
    let Some(context) = context() else { return };
    let err = context.kernel(SOURCE, &["T=f32".to_owned()], "broken").unwrap_err();
    assert!(matches!(&err, Error::Compile { log, .. } if log.contains("undefined_name")), "{err}");
    let text = SOURCE.text.replace("undefined_name", "narrow<T>(0.0f)");
    let good = Source { text: Box::leak(text.into_boxed_str()), ..GOOD };
    let kernel = context.kernel(good, &["T=f32".to_owned()], "scale").unwrap();
    let n = 100_003;
    let values: Vec<f32> = (0..n).map(|i| i as f32 * 0.37 - 11.0).collect();
    let mut x = context.alloc(4 * n).unwrap();
    x.upload(0, &bytes(&values)).unwrap();
    let args = |n: i64| [Arg::F32(-2.5), Arg::I64(n)];
    let grid = Grid::over(n, 256, 64);
    let [factor, len] = args(n as i64);
    context.launch(&kernel, grid, &[(&mut x).into(), factor, len]).unwrap();
    let mut out = vec![0; 4 * n];
    x.download(0, &mut out).unwrap();
    for (got, value) in floats(&out).iter().zip(&values) {
        assert_eq!(got.to_bits(), (value * -2.5).to_bits());
    }
    for wrong in [vec![(&mut x).into(), factor], vec![Arg::I32(1), factor, len]] {
        assert!(matches!(context.launch(&kernel, grid, &wrong), Err(Error::Launch { .. })));
    }
    let empty = Grid::row(0, 32);
    assert!(matches!(context.launch(&kernel, empty, &[(&mut x).into(), factor, len]), Err(Error::Launch { .. })));
}

#[test]
fn memory_is_bounded_reused_and_refused_with_numbers() {
    let Some(context) = context() else { return };
    let mut a = context.alloc(1000).unwrap();
    let address = a.address();
    assert!(matches!(a.upload(900, &[0; 101]), Err(Error::Range { offset: 900, end: 1001, len: 1000 })));
    a.fill(7).unwrap();
    let mut b = context.alloc(1000).unwrap();
    b.copy_from(10, &a, 20, 100).unwrap();
    let mut out = [0; 100];
    b.download(10, &mut out).unwrap();
    assert_eq!(out, [7; 100]);
    drop(a);
    assert_eq!(context.alloc(900).unwrap().address(), address, "freed memory is used again");
    let before = context.memory_info().unwrap();
    match context.alloc(before.total * 2) {
        Err(Error::OutOfMemory { bytes, total, free, .. }) => {
            assert_eq!((bytes, total), (before.total * 2, before.total));
            assert!(free > 0 && free <= total);
        }
        other => panic!("{other:?}"),
    }
    drop(b);
    context.trim().unwrap();
    assert!(matches!(Context::new(99, Roots::from_environment(), None), Err(Error::Ordinal { ordinal: 99, .. })));
}

fn encode(values: &[f32], precision: Precision) -> Vec<u8> {
    match precision {
        Precision::F64 => values.iter().flat_map(|it| f64::from(*it).to_le_bytes()).collect(),
        Precision::F32 => bytes(values),
        Precision::F16 => values.iter().flat_map(|it| f16::from_f32(*it).to_le_bytes()).collect(),
        Precision::Bf16 => values.iter().flat_map(|it| bf16::from_f32(*it).to_le_bytes()).collect(),
    }
}

fn decode(bytes: &[u8], precision: Precision) -> Vec<f64> {
    let two = |it: &[u8]| [it[0], it[1]];
    match precision {
        Precision::F64 => bytes.chunks_exact(8).map(|it| f64::from_le_bytes(it.try_into().unwrap())).collect(),
        Precision::F32 => floats(bytes).into_iter().map(f64::from).collect(),
        Precision::F16 => bytes.chunks_exact(2).map(|it| f16::from_le_bytes(two(it)).to_f64()).collect(),
        Precision::Bf16 => bytes.chunks_exact(2).map(|it| bf16::from_le_bytes(two(it)).to_f64()).collect(),
    }
}

/// Every type pair that the transforms and contractions use, all orientations, odd sizes, shared operands.
#[test]
fn products_are_those_of_f64() {
    let Some(context) = context() else { return };
    use Precision::{Bf16, F16, F32, F64};
    let kinds = [
        (F64, F64, Compute::F64, 1e-14),
        (F32, F32, Compute::F32, 2e-6),
        (F32, F32, Compute::Tf32, 2e-3),
        (F16, F16, Compute::F32, 6e-4),
        (F16, F32, Compute::F32, 2e-6),
        (Bf16, Bf16, Compute::F32, 5e-3),
        (Bf16, F32, Compute::F32, 2e-6),
    ];
    for (from, to, compute, tolerance) in kinds {
        for (m, n, k, batch) in [(5, 7, 3, 4), (66, 64, 128, 3), (1, 33, 17, 2), (64, 24, 50, 1)] {
            for (flip_a, flip_b, share_a) in
                [(false, false, true), (true, false, false), (false, true, false), (true, true, true)]
            {
                let noise = |len: usize, seed: u32| -> Vec<f32> {
                    let mut state = seed;
                    let mut next = || {
                        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
                    };
                    (0..len).map(|_| next()).collect()
                };
                let pad = 8;
                let stored = |rows: usize, cols: usize, flip: bool| if flip { (cols, rows) } else { (rows, cols) };
                let ((ra, ca), (rb, cb)) = (stored(m, k, flip_a), stored(k, n, flip_b));
                let (row_a, row_b, row_c) = (ca + pad, cb + pad, n + pad);
                let n_a = if share_a { 1 } else { batch };
                let (a, b) = (noise(n_a * ra * row_a, 1), noise(batch * rb * row_b, 2));
                let upload = |bytes: &[u8]| {
                    let mut buffer = context.alloc(bytes.len()).unwrap();
                    buffer.upload(0, bytes).unwrap();
                    buffer
                };
                let (a, b) = (encode(&a, from), encode(&b, from));
                let (a_dev, b_dev) = (upload(&a), upload(&b));
                let (a, b) = (decode(&a, from), decode(&b, from));
                let mut c_dev = context.alloc(batch * m * row_c * to.bytes()).unwrap();
                c_dev.fill(0xff).unwrap();
                let operand = |buffer, precision, row, stride, transposed| Operand {
                    span: halfmode_cuda::Buffer::span(buffer),
                    precision,
                    row,
                    stride,
                    transposed,
                };
                let stride_a = if share_a { 0 } else { ra * row_a };
                let matmul = Matmul {
                    m,
                    n,
                    k,
                    batch,
                    a: operand(&a_dev, from, row_a, stride_a, flip_a),
                    b: operand(&b_dev, from, row_b, rb * row_b, flip_b),
                    c: operand(&c_dev, to, row_c, m * row_c, false),
                    factors: Scalar { scale: 0.5, keep: 0.0 },
                    compute,
                };
                context.matmul(&matmul).unwrap();
                let again = Matmul { factors: Scalar { scale: 0.25, keep: 2.0 }, ..matmul };
                context.matmul(&again).unwrap();
                let mut out = vec![0; c_dev.len()];
                c_dev.download(0, &mut out).unwrap();
                let got = decode(&out, to);
                let at = |flip: bool, row: usize, i: usize, j: usize| if flip { j * row + i } else { i * row + j };
                let (mut error, mut norm) = (0.0, 0.0);
                for (z, i, j) in (0..batch * m * n).map(|at| (at / (m * n), at / n % m, at % n)) {
                    let term =
                        |l| a[z * stride_a + at(flip_a, row_a, i, l)] * b[z * rb * row_b + at(flip_b, row_b, l, j)];
                    let want: f64 = 1.25 * (0..k).map(term).sum::<f64>();
                    error += (got[(z * m + i) * row_c + j] - want).powi(2);
                    norm += want * want;
                }
                let relative = (error / norm).sqrt();
                assert!(relative <= tolerance, "{from} {to} {compute:?} {m} {n} {k} {flip_a} {flip_b}: {relative:e}");
            }
        }
    }
    let buffer = context.alloc(64).unwrap();
    let small = Operand { span: buffer.span(), precision: F32, row: 4, stride: 0, transposed: false };
    let factors = Scalar { scale: 1.0, keep: 0.0 };
    let outside = Matmul { m: 5, n: 4, k: 4, batch: 1, a: small, b: small, c: small, factors, compute: Compute::F32 };
    assert!(matches!(context.matmul(&outside), Err(Error::Launch { .. })));
}

#[test]
fn a_recorded_sequence_runs_again() {
    let Some(context) = context() else { return };
    let text = SOURCE.text.replace("undefined_name", "narrow<T>(0.0f)");
    let good = Source { text: Box::leak(text.into_boxed_str()), ..GOOD };
    let kernel = context.kernel(good, &["T=f32".to_owned()], "scale").unwrap();
    let mut x = context.alloc(4 * 64).unwrap();
    x.upload(0, &bytes(&[1.0; 64])).unwrap();
    let graph = context
        .capture(|| -> Result<(), Error> {
            for _ in 0..3 {
                let args = [Arg::from(&mut x), Arg::F32(2.0), Arg::I64(64)];
                context.launch(&kernel, Grid::row(1, 64), &args)?;
            }
            Ok(())
        })
        .unwrap();
    assert_eq!(graph.n_nodes().unwrap(), 3);
    let timer = Timer::start(&context).unwrap();
    graph.launch().unwrap();
    graph.launch().unwrap();
    assert!(timer.stop().unwrap() > 0.0);
    let mut out = [0; 256];
    x.download(0, &mut out).unwrap();
    assert_eq!(floats(&out), [64.0; 64]);
    // What a recording allocates is the graph's: a replay does not write into what is allocated later.
    let mut y = None;
    let graph = context
        .capture(|| -> Result<(), Error> {
            let mut scratch = context.alloc(256)?;
            context.launch(&kernel, Grid::row(1, 64), &[(&mut scratch).into(), Arg::F32(2.0), Arg::I64(64)])?;
            y = Some(scratch.address());
            Ok(())
        })
        .unwrap();
    let mut later = context.alloc(256).unwrap();
    assert_ne!(Some(later.address()), y);
    later.upload(0, &bytes(&[3.0; 64])).unwrap();
    graph.launch().unwrap();
    later.download(0, &mut out).unwrap();
    assert_eq!(floats(&out), [3.0; 64]);
    drop(graph);
    let waits = context.capture(|| context.synchronize());
    assert!(matches!(waits, Err(Error::Driver { .. })), "waiting cannot be recorded");
    x.fill(0).unwrap();
    context.synchronize().unwrap();
}

type Complex = [f64; 2];

/// The sum over n of `x[n] exp(sign 2πi Σ k_j n_j / N_j)` for every k, by its definition.
fn dft(x: &[Complex], sizes: &[usize], sign: f64) -> Vec<Complex> {
    let index = |mut at: usize| -> Vec<usize> {
        let mut index: Vec<usize> = sizes.iter().rev().map(|n| (at % n, at /= n).0).collect();
        index.reverse();
        index
    };
    let points: Vec<Vec<usize>> = (0..x.len()).map(index).collect();
    let turns = |k: &[usize], n: &[usize]| -> f64 {
        k.iter().zip(n).zip(sizes).map(|((k, n), size)| (k * n % size) as f64 / *size as f64).sum()
    };
    let sum = |k: &Vec<usize>| {
        points.iter().zip(x).fold([0.0, 0.0], |[re, im], (n, [a, b])| {
            let (sin, cos) = (sign * std::f64::consts::TAU * turns(k, n)).sin_cos();
            [re + a * cos - b * sin, im + a * sin + b * cos]
        })
    };
    points.iter().map(sum).collect()
}

/// The columns of a spectrum that a real signal's transform keeps.
fn kept(spectrum: &[Complex], last: usize) -> Vec<Complex> {
    spectrum.chunks(last).flat_map(|row| row[..last / 2 + 1].to_vec()).collect()
}

/// The real signal whose spectrum has these columns, times the number of points.
fn from_kept(columns: &[Complex], sizes: &[usize]) -> Vec<f64> {
    let last = sizes[sizes.len() - 1];
    let mut spectrum = Vec::new();
    for row in columns.chunks(last / 2 + 1) {
        // A column that has a twin stands for both: the real part of twice its term is the sum of the two terms.
        let factor = |k: usize| match (k, 2 * k) {
            (0, _) => 1.0,
            (_, twice) if twice == last => 1.0,
            _ => 2.0,
        };
        spectrum.extend(row.iter().enumerate().map(|(k, [re, im])| [factor(k) * re, factor(k) * im]));
        spectrum.extend(vec![[0.0, 0.0]; last - row.len()]);
    }
    dft(&spectrum, sizes, 1.0).into_iter().map(|[re, _]| re).collect()
}

fn pairs(values: &[f64]) -> Vec<Complex> {
    values.chunks_exact(2).map(|it| [it[0], it[1]]).collect()
}

/// Every format and kind against the definition in f64; inputs are rounded to the format first.
#[test]
fn transforms_are_those_of_f64() {
    let Some(context) = context() else { return };
    use Precision::{Bf16, F16, F32, F64};
    let shapes: [&[usize]; 9] = [&[1], &[8], &[128], &[4, 16], &[2, 4, 8], &[12], &[97], &[7, 10], &[3, 5, 9]];
    for (precision, unit) in
        [(F64, 2f64.powi(-53)), (F32, 2f64.powi(-24)), (F16, 2f64.powi(-11)), (Bf16, 2f64.powi(-8))]
    {
        for sizes in shapes {
            let numel: usize = sizes.iter().product();
            let last = sizes[sizes.len() - 1];
            let batch = 3;
            for kind in [FftKind::RealToComplex, FftKind::ComplexToReal, FftKind::Forward, FftKind::Inverse] {
                let plan = FftPlan { kind, precision, sizes: sizes.to_vec(), batch };
                let mut state = 7u32;
                let mut noise = |len: usize| -> Vec<f32> {
                    let mut next = || {
                        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
                    };
                    (0..len).map(|_| next()).collect()
                };
                let (mut stored, mut want) = (Vec::new(), Vec::new());
                for _ in 0..batch {
                    let complex = kind != FftKind::RealToComplex;
                    let mut values = noise(if complex { 2 * numel } else { numel });
                    if kind == FftKind::ComplexToReal {
                        // A spectrum that belongs to a real signal.
                        let signal: Vec<Complex> = values[..numel].iter().map(|it| [f64::from(*it), 0.0]).collect();
                        values =
                            kept(&dft(&signal, sizes, -1.0), last).into_iter().flatten().map(|it| it as f32).collect();
                    }
                    let bytes = encode(&values, precision);
                    let values = decode(&bytes, precision);
                    stored.extend(bytes);
                    match kind {
                        FftKind::RealToComplex => {
                            let signal: Vec<Complex> = values.iter().map(|it| [*it, 0.0]).collect();
                            want.extend(kept(&dft(&signal, sizes, -1.0), last).into_iter().flatten());
                        }
                        FftKind::ComplexToReal => want.extend(from_kept(&pairs(&values), sizes)),
                        FftKind::Forward => want.extend(dft(&pairs(&values), sizes, -1.0).into_iter().flatten()),
                        FftKind::Inverse => want.extend(dft(&pairs(&values), sizes, 1.0).into_iter().flatten()),
                    }
                }
                let mut input = context.alloc(stored.len()).unwrap();
                input.upload(0, &stored).unwrap();
                let mut output = context.alloc(want.len() * precision.bytes()).unwrap();
                output.fill(0xff).unwrap();
                let outcome = context.fft(&plan, input.span(), output.span());
                if precision.is_half() && sizes.iter().any(|it| !it.is_power_of_two()) {
                    assert!(matches!(outcome, Err(Error::FftShape { .. })), "{plan:?}: {outcome:?}");
                    continue;
                }
                outcome.unwrap();
                let mut out = vec![0; output.len()];
                output.download(0, &mut out).unwrap();
                let got = decode(&out, precision);
                let square = |it: f64| it * it;
                let error: f64 = got.iter().zip(&want).map(|(got, want)| square(got - want)).sum();
                let norm: f64 = want.iter().map(|it| square(*it)).sum();
                let relative = (error / norm).sqrt();
                // To first order each of log2 N passes rounds a factor, a product and a sum, each by at most a unit
                // of the norm; the result is rounded once more. A pass of a prime size p adds up p terms in a
                // tree of as many sums.
                let passes: f64 = 1.0 + (numel as f64).log2();
                let tolerance = 3.0 * unit * passes;
                assert!(relative <= tolerance, "{plan:?}: {relative:e} > {tolerance:e}");
                assert!(context.fft_scratch_bytes(&plan).is_ok());
            }
        }
    }
    let plan = FftPlan { kind: FftKind::Forward, precision: F32, sizes: vec![64], batch: 2 };
    let (small, other) = (context.alloc(1000).unwrap(), context.alloc(2048).unwrap());
    for (input, output) in [(&small, &other), (&other, &small), (&other, &other)] {
        assert!(matches!(context.fft(&plan, input.span(), output.span()), Err(Error::Launch { .. })));
    }
}

#[test]
fn recorded_transforms_run_again() {
    let Some(context) = context() else { return };
    let plan = |batch: usize| FftPlan { kind: FftKind::Forward, precision: Precision::F32, sizes: vec![60, 45], batch };
    let values: Vec<f32> = (0..2 * 60 * 45).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect();
    let mut input = context.alloc(4 * values.len()).unwrap();
    input.upload(0, &bytes(&values)).unwrap();
    let mut output = context.alloc(input.len()).unwrap();
    context.fft(&plan(1), input.span(), output.span()).unwrap();
    let mut want = vec![0; output.len()];
    output.download(0, &mut want).unwrap();
    let graph = context.capture(|| context.fft(&plan(1), input.span(), output.span())).unwrap();
    // Larger plans take a larger work area; the recorded one stays where it was.
    let many = 200;
    let (from, to) = (context.alloc(many * input.len()).unwrap(), context.alloc(many * input.len()).unwrap());
    context.fft(&plan(many), from.span(), to.span()).unwrap();
    output.fill(0xff).unwrap();
    graph.launch().unwrap();
    let mut got = vec![0; output.len()];
    output.download(0, &mut got).unwrap();
    assert_eq!(got, want);
}
