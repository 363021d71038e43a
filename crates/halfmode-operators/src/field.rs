//! Real and complex fields on the tape.

use halfmode_autograd::{Result, Tape, Var};
use halfmode_nn::{Add, ParamSpec, Subtract};

/// A field inside a model, channels last.
#[derive(Clone)]
pub(crate) enum Field {
    /// A real one.
    Real(Var),
    /// Real and imaginary part of a complex one.
    Complex([Var; 2]),
}

/// The parameters of one layer: of the only one for real data; of `fr` and `fi` for complex data.
#[derive(Clone, Copy)]
pub(crate) struct LayerWeights<'a>(pub(crate) [&'a [Var]; 2]);

impl Field {
    /// Any part: its shape is that of the field.
    pub(crate) fn part(&self) -> &Var {
        match self {
            Field::Real(x) | Field::Complex([x, _]) => x,
        }
    }

    /// `each` of every part by itself: activations, padding, interpolation.
    pub(crate) fn map(&self, mut each: impl FnMut(&Var) -> Result<Var>) -> Result<Field> {
        Ok(match self {
            Field::Real(x) => Field::Real(each(x)?),
            Field::Complex([re, im]) => Field::Complex([each(re)?, each(im)?]),
        })
    }

    /// A layer of real weights. Of a complex field, two make one, as the peer's `ComplexValued` has it:
    /// `fr(re) - fi(im)` and `fr(im) + fi(re)`, biases included.
    pub(crate) fn through(
        &self,
        tape: &mut Tape,
        weights: LayerWeights<'_>,
        layer: impl Fn(&mut Tape, &[Var], &Var) -> Result<Var>,
    ) -> Result<Field> {
        let LayerWeights([fr, fi]) = weights;
        match self {
            Field::Real(x) => layer(tape, fr, x).map(Field::Real),
            Field::Complex([re, im]) => {
                let [a, b] = [layer(tape, fr, re)?, layer(tape, fi, im)?];
                let re_out = tape.apply(Subtract, &[&a, &b])?;
                let [a, b] = [layer(tape, fr, im)?, layer(tape, fi, re)?];
                Ok(Field::Complex([re_out, tape.apply(Add, &[&a, &b])?]))
            }
        }
    }

    /// The sum of two fields of one kind.
    pub(crate) fn add(&self, tape: &mut Tape, other: &Field) -> Result<Field> {
        match (self, other) {
            (Field::Complex([a, b]), Field::Complex([c, d])) => {
                Ok(Field::Complex([tape.apply(Add, &[a, c])?, tape.apply(Add, &[b, d])?]))
            }
            _ => tape.apply(Add, &[self.part(), other.part()]).map(Field::Real),
        }
    }
}

/// The specs of a layer; for complex data those of its two halves, under the peer's names. `make` gets
/// what stands behind the layer's name.
pub(crate) fn layer_specs(complex: bool, make: impl Fn(&str) -> Vec<ParamSpec>) -> Vec<ParamSpec> {
    if complex { [make(".fr"), make(".fi")].concat() } else { make("") }
}

/// The parameters of a model, handed out in the order of its specs.
pub(crate) struct Weights<'a> {
    pub(crate) rest: &'a [Var],
    pub(crate) complex: bool,
}

impl<'a> Weights<'a> {
    /// The next `n`.
    pub(crate) fn take(&mut self, n: usize) -> Result<&'a [Var]> {
        let (taken, rest) = self.rest.split_at_checked(n).ok_or(halfmode_autograd::Error::Arity {
            op: "fno",
            expected: n,
            found: self.rest.len(),
        })?;
        self.rest = rest;
        Ok(taken)
    }

    /// Those of the next layer, which has `n`, or twice `n` for complex data.
    pub(crate) fn layer(&mut self, n: usize) -> Result<LayerWeights<'a>> {
        let fr = self.take(n)?;
        Ok(LayerWeights([fr, if self.complex { self.take(n)? } else { fr }]))
    }
}
