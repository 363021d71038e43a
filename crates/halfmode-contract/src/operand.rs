//! What goes into a contraction and what comes out: layout, conjugation, storage.

use crate::{Error, Result};
use halfmode_precision::{DType, Domain, Precision};
use halfmode_tensor::{Purpose, Shape, Tensor};

/// Where the real and imaginary parts are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum ComplexLayout {
    /// Pairs of scalars in a tensor of a complex type; also the layout of real tensors.
    #[default]
    Interleaved,
    /// An axis of length 2 of a real tensor; it has no label.
    Split {
        /// Its position among the axes of the tensor.
        axis: usize,
    },
}

/// Whether the conjugate of an operand is taken. Without effect on real operands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Conj {
    /// As stored.
    #[default]
    No,
    /// Conjugated while it is read.
    Yes,
}

impl Conj {
    /// The other one.
    #[must_use]
    pub const fn flipped(self) -> Self {
        match self {
            Conj::No => Conj::Yes,
            Conj::Yes => Conj::No,
        }
    }
}

/// A tensor as an operand of a contraction, in any storage precision.
#[derive(Clone, Copy, Debug)]
pub struct Operand<'a> {
    pub(crate) tensor: &'a Tensor,
    pub(crate) conj: Conj,
    pub(crate) layout: ComplexLayout,
}

impl<'a> Operand<'a> {
    /// The tensor as it is: real, or interleaved complex.
    #[must_use]
    pub fn new(tensor: &'a Tensor) -> Self {
        Operand { tensor, conj: Conj::No, layout: ComplexLayout::Interleaved }
    }

    /// Conjugated or not.
    #[must_use]
    pub fn conj(self, conj: Conj) -> Self {
        Operand { conj, ..self }
    }

    /// With its real and imaginary parts laid out so.
    #[must_use]
    pub fn layout(self, layout: ComplexLayout) -> Self {
        Operand { layout, ..self }
    }

    /// Checks the layout; gives the domain and the shape of the labelled axes.
    pub(crate) fn resolve(&self, operand: usize) -> Result<(Domain, Shape)> {
        let shape = self.tensor.shape();
        match self.layout {
            ComplexLayout::Interleaved => Ok((self.tensor.dtype().domain, shape.clone())),
            ComplexLayout::Split { axis } => {
                if self.tensor.dtype().domain != Domain::Real || shape.get(axis) != Some(&2) {
                    return Err(Error::SplitAxis { operand, axis, shape: shape.clone() });
                }
                let mut extents = shape.to_vec();
                extents.remove(axis);
                Ok((Domain::Complex, extents.into()))
            }
        }
    }
}

impl<'a> From<&'a Tensor> for Operand<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Operand::new(tensor)
    }
}

/// How the result is stored. Sums are formed in f32, in f64 if the result is stored in f64.
#[derive(Clone, Copy, Debug)]
pub struct OutputSpec {
    pub(crate) precision: Precision,
    pub(crate) intermediates: Precision,
    pub(crate) purpose: Purpose,
    pub(crate) layout: ComplexLayout,
    pub(crate) scale: f64,
}

impl OutputSpec {
    /// Result and intermediates in `precision`; complex results interleaved.
    #[must_use]
    pub fn new(precision: Precision, purpose: Purpose) -> Self {
        OutputSpec { precision, intermediates: precision, purpose, layout: ComplexLayout::Interleaved, scale: 1.0 }
    }

    /// Stores intermediates in another precision than the result.
    #[must_use]
    pub fn intermediates(self, precision: Precision) -> Self {
        OutputSpec { intermediates: precision, ..self }
    }

    /// Lays out a complex result so.
    #[must_use]
    pub fn layout(self, layout: ComplexLayout) -> Self {
        OutputSpec { layout, ..self }
    }

    /// Multiplies the result by a number in the accumulator, before the one rounding.
    #[must_use]
    pub fn scale(self, scale: f64) -> Self {
        OutputSpec { scale, ..self }
    }

    /// The type and the stored shape of a result with this labelled shape.
    pub(crate) fn storage(&self, domain: Domain, shape: &Shape, n_operands: usize) -> Result<(DType, Shape)> {
        match (domain, self.layout) {
            (_, ComplexLayout::Interleaved) => Ok((DType { domain, precision: self.precision }, shape.clone())),
            (Domain::Complex, ComplexLayout::Split { axis }) if axis <= shape.len() => {
                let mut extents = shape.to_vec();
                extents.insert(axis, 2);
                Ok((DType::real(self.precision), extents.into()))
            }
            (_, ComplexLayout::Split { axis }) => {
                Err(Error::SplitAxis { operand: n_operands, axis, shape: shape.clone() })
            }
        }
    }
}
