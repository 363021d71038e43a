//! Tensors on a GPU against the CPU. Without a GPU nothing runs; with `HALFMODE_REQUIRE_CUDA=1` that is a failure.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, reason = "a test")]

use halfmode_precision::{DType, Precision};
use halfmode_tensor::{Device, Error, Purpose, Tensor};

fn gpu() -> Option<Device> {
    let required = std::env::var_os("HALFMODE_REQUIRE_CUDA").is_some_and(|it| it == "1");
    match Device::cuda(0, None) {
        Ok(device) => Some(device),
        Err(err) => {
            assert!(!required, "{err}");
            assert!(matches!(err, Error::Cuda(_)), "{err}");
            None
        }
    }
}

fn values(len: usize, seed: f64) -> Vec<f64> {
    (0..len).map(|i| 40.0 * (((i + 1) as f64 * 0.754_877_666 + seed).fract() - 0.5)).collect()
}

fn both(devices: [&Device; 2], len: usize, precision: Precision, seed: f64) -> [Tensor; 2] {
    let values = values(len, seed);
    devices.map(|device| Tensor::from_slice(device, &values, [len], precision, Purpose::Activation).unwrap())
}

fn assert_same(name: &str, [cpu, gpu]: [&Tensor; 2]) {
    let [cpu, gpu] = [cpu, gpu].map(|it| it.to_vec::<f64>().unwrap());
    let same = |(a, b): (&f64, &f64)| a.to_bits() == b.to_bits();
    assert!(cpu.len() == gpu.len() && cpu.iter().zip(&gpu).all(same), "{name}");
}

/// Every conversion, sum and product is the CPU's to the bit: one operation in the accumulator, one rounding.
#[test]
fn elementwise_operations_are_the_cpus() {
    let Some(device) = gpu() else { return };
    let cpu = Device::cpu(1).unwrap();
    let devices = [&cpu, &device];
    for len in [1, 3, 4, 257, 100_003] {
        for precision in Precision::ALL {
            let name = format!("{len} {precision}");
            let [mut cpu, mut gpu] = both(devices, len, precision, 0.1);
            for to in Precision::ALL {
                let [a, b] = [&cpu, &gpu].map(|it| it.cast(to, Purpose::Activation).unwrap());
                assert_same(&format!("{name} to {to}"), [&a, &b]);
            }
            let [cpu_term, gpu_term] = both(devices, len, precision, 0.7);
            cpu.add_assign(&cpu_term).unwrap();
            gpu.add_assign(&gpu_term).unwrap();
            assert_same(&format!("{name} sum"), [&cpu, &gpu]);
            cpu.scale_assign(0.3).unwrap();
            gpu.scale_assign(0.3).unwrap();
            assert_same(&format!("{name} product"), [&cpu, &gpu]);
            let [a, b] = [&cpu, &gpu].map(|it| it.sum_squares().unwrap());
            assert!((a - b).abs() <= 1e-12 * a, "{name}: {a} {b}");
            assert!(gpu.all_finite());
            assert_same(&format!("{name} copy"), [&cpu, &gpu.copy(Purpose::Saved).unwrap()]);
        }
    }
}

#[test]
fn values_that_are_not_finite_are_seen() {
    let Some(device) = gpu() else { return };
    for bad in [f64::NAN, f64::INFINITY] {
        for precision in Precision::ALL {
            let mut values = values(5000, 0.2);
            values[4321] = bad;
            let x = Tensor::from_slice(&device, &values, [5000], precision, Purpose::Grad).unwrap();
            assert!(!x.all_finite(), "{bad} in {precision}");
        }
    }
}

#[test]
fn rows_are_gathered_and_bytes_counted() {
    let Some(device) = gpu() else { return };
    let x = Tensor::from_slice(&device, &values(60, 0.3), [5, 3, 4], Precision::F16, Purpose::Data).unwrap();
    let picked = x.gather(&[4, 0, 4], Purpose::Data).unwrap();
    let (all, picked) = (x.to_vec::<f32>().unwrap(), picked.to_vec::<f32>().unwrap());
    assert_eq!(picked, [&all[48..60], &all[0..12], &all[48..60]].concat());
    let before = device.memory().total.live;
    let y = device.alloc([7, 9], DType::complex(Precision::F32), Purpose::Saved).unwrap();
    assert_eq!(device.memory().total.live - before, 7 * 9 * 8);
    assert_eq!(y.to_vec::<f32>().unwrap(), [0.0; 126]);
    assert_eq!(y.view().unwrap_err(), Error::OnGpu);
    drop(y);
    assert_eq!(device.memory().total.live, before);
    let huge = device.alloc([1 << 20, 1 << 20], DType::real(Precision::F64), Purpose::Data).unwrap_err();
    assert!(huge.to_string().contains("has no room for 8796093022208 bytes"), "{huge}");
}
