//! The contraction straight from its definition: the readable reference of [`crate::execute`].

use crate::{Conj, Equation, Error, Result};
use halfmode_precision::Domain;
use halfmode_tensor::Shape;

/// An operand of [`reference_einsum`].
#[derive(Clone, Copy, Debug)]
pub struct ReferenceOperand<'a> {
    /// Row-major values; complex ones are interleaved (re, im) pairs.
    pub values: &'a [f64],
    /// Extents of the labelled axes.
    pub shape: &'a Shape,
    /// Whether the conjugate is taken.
    pub conj: Conj,
}

/// `out[output labels] = sum over all other labels of the product of all operands`, in double
/// precision, one term after the other. Slow on purpose: it visits every combination of all
/// labels.
///
/// # Shapes
/// - operands as the equation says; complex values are interleaved pairs
/// - returns the output, row-major, interleaved if complex
///
/// # Errors
/// Those of [`Equation::sizes`]; [`halfmode_tensor::Error::Length`] if values do not fill a shape.
pub fn reference_einsum(equation: &Equation, operands: &[ReferenceOperand<'_>], domain: Domain) -> Result<Vec<f64>> {
    let shapes: Vec<Shape> = operands.iter().map(|operand| operand.shape.clone()).collect();
    let sizes = equation.sizes(&shapes)?;
    let lanes = domain.scalars();
    for operand in operands {
        let (n_values, expected) = (operand.values.len(), operand.shape.numel() * lanes);
        if n_values != expected {
            let shape = operand.shape.clone();
            return Err(Error::Tensor(halfmode_tensor::Error::Length { n_values, shape, expected }));
        }
    }
    // Output labels first, so that the loop counter finds the output element.
    let mut labels = equation.output().to_vec();
    for &label in equation.operands().iter().flatten() {
        if !labels.contains(&label) {
            labels.push(label);
        }
    }
    let axes: Vec<Vec<usize>> = equation
        .operands()
        .iter()
        .map(|own| own.iter().filter_map(|label| labels.iter().position(|it| it == label)).collect())
        .collect();
    let extents = sizes.shape(&labels);
    let (n_output, n_all) = (sizes.shape(equation.output()).numel(), extents.numel());
    let mut out = vec![0.0; n_output * lanes];
    let mut index = vec![0; labels.len()];
    for term_idx in 0..n_all {
        let mut rest = term_idx;
        for (at, extent) in index.iter_mut().zip(extents.iter()).rev() {
            *at = rest % extent;
            rest /= extent;
        }
        let (mut re, mut im) = (1.0, 0.0);
        for (operand, axes) in operands.iter().zip(&axes) {
            let flat = axes.iter().fold(0, |flat, &axis| flat * extents[axis] + index[axis]);
            let (x_re, x_im) = match (domain, operand.conj) {
                (Domain::Real, _) => (operand.values[flat], 0.0),
                (Domain::Complex, Conj::No) => (operand.values[2 * flat], operand.values[2 * flat + 1]),
                (Domain::Complex, Conj::Yes) => (operand.values[2 * flat], -operand.values[2 * flat + 1]),
            };
            (re, im) = (re * x_re - im * x_im, re * x_im + im * x_re);
        }
        let element = term_idx / (n_all / n_output);
        out[element * lanes] += re;
        if domain == Domain::Complex {
            out[element * lanes + 1] += im;
        }
    }
    Ok(out)
}
