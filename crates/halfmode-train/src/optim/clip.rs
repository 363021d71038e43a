//! The norm of all gradients, and whether they are finite.

#[cfg(feature = "cuda")]
mod cuda;

use crate::Result;
use halfmode_tensor::Tensor;

/// What one pass over the gradients finds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GradStats {
    /// Norm of all gradients together, as they are stored: with the loss scale in them.
    pub norm: f64,
    /// Whether all are finite. The negation is what `DynamicScaler::update` asks for.
    pub finite: bool,
}

/// The norm of all gradients together and whether they are finite, in one pass. Sums are formed in
/// f64 and in one order at any number of threads. On the planning device: 0 and finite.
///
/// In f64 no square of an f32 or a half overflows, so the sum is finite exactly if they are. f64
/// gradients beyond 1e154 count as not finite.
///
/// # Errors
/// None today; those of reading tensors.
pub fn grad_stats<'a>(grads: impl IntoIterator<Item = &'a Tensor>) -> Result<GradStats> {
    let mut sum = 0.0;
    // Those of a GPU together, in one reduction.
    #[cfg(feature = "cuda")]
    let grads = {
        let on_gpu = |grad: &&Tensor| grad.device().target() == halfmode_tensor::Target::Cuda;
        let (mut on_gpu, elsewhere): (Vec<&Tensor>, Vec<&Tensor>) = grads.into_iter().partition(on_gpu);
        while let Some(device) = on_gpu.first().map(|grad| grad.device().clone()) {
            let (here, others) = on_gpu.into_iter().partition(|grad: &&Tensor| grad.device().same(&device));
            let here: Vec<&Tensor> = here;
            sum += cuda::sum_squares(&device, &here)?;
            on_gpu = others;
        }
        elsewhere
    };
    for grad in grads {
        if grad.device().launches() {
            sum += grad.sum_squares()?;
        }
    }
    Ok(GradStats { norm: sum.sqrt(), finite: sum.is_finite() })
}

/// The factor that brings gradients of norm `norm` down to `max_norm`, as
/// `torch.nn.utils.clip_grad_norm_` does: `min(1, max_norm / (norm + 1e-6))`.
#[must_use]
pub fn clip_factor(norm: f64, max_norm: f64) -> f64 {
    (max_norm / (norm + 1e-6)).min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use halfmode_precision::Precision;
    use halfmode_tensor::{Device, Purpose};

    fn tensor(device: &Device, values: &[f64], precision: Precision) -> Tensor {
        Tensor::from_slice(device, values, [values.len()], precision, Purpose::Grad).unwrap()
    }

    #[test]
    fn norms_of_all_precisions_and_lengths() {
        for threads in [1, 3] {
            let device = Device::cpu(threads).unwrap();
            for precision in Precision::ALL {
                // 3 = 1.1b is exact in every format, and so is the sum.
                let grads = [1, 15, 16, 17, 4096, 10_001].map(|n| tensor(&device, &vec![3.0; n], precision));
                let n: usize = grads.iter().map(Tensor::numel).sum();
                let stats = grad_stats(&grads).unwrap();
                assert!(stats.finite && (stats.norm - 3.0 * (n as f64).sqrt()).abs() < 1e-9, "{precision}");
            }
        }
    }

    #[test]
    fn one_bad_value_is_found_and_large_ones_are_not_bad() {
        let device = Device::cpu(2).unwrap();
        for bad in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            for precision in Precision::ALL {
                let mut values = vec![1.0; 9000];
                values[8500] = bad;
                assert!(!grad_stats([&tensor(&device, &values, precision)]).unwrap().finite, "{precision} {bad}");
            }
        }
        let huge = tensor(&device, &[f64::from(f32::MAX); 100], Precision::F32);
        assert!(grad_stats([&huge]).unwrap().finite);
        assert_eq!(grad_stats([]).unwrap(), GradStats { norm: 0.0, finite: true });
    }

    #[test]
    fn clipping_only_shrinks() {
        assert!((clip_factor(0.5, 1.0) - 1.0).abs() < 1e-15);
        assert!((clip_factor(4.0, 1.0) - 0.25).abs() < 1e-6);
    }
}
