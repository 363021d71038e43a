//! The gradient of a contraction with respect to one operand, which is a contraction again.

use crate::{Conj, Equation, Error, Operand, OutputSpec, Plan, Result, execute};
use halfmode_precision::{DType, Domain};
use halfmode_tensor::{Purpose, Shape, Tensor};

/// What stands at one place of an adjoint equation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Factor {
    /// The gradient of the output.
    Gradient(Conj),
    /// An operand of the forward equation.
    Operand {
        /// Its number there.
        idx: usize,
        /// Whether it is conjugated here.
        conj: Conj,
    },
    /// Ones along a label that the forward equation sums in this operand alone: its gradient is
    /// the same along it.
    Ones(char),
}

/// The contraction that gives the gradient of one operand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adjoint {
    equation: Equation,
    factors: Vec<Factor>,
    ones: Vec<(char, usize)>,
}

/// The adjoint of `equation` as a linear map of `operand`: with `y = A x`, the gradient
/// `grad_x = A^H grad_y` under `Re sum conj(a) b`, i.e. the gradient contracted with the conjugates
/// of the other operands.
///
/// ```
/// use halfmode_contract::{Equation, adjoint_equation};
/// let forward = Equation::parse("bxi,xio->bxo")?;
/// let shapes = [[8, 12, 4].into(), [12, 4, 5].into()];
/// assert_eq!(adjoint_equation(&forward, &shapes, 1)?.equation().to_string(), "bxo,bxi->xio");
/// # Ok::<(), halfmode_contract::Error>(())
/// ```
///
/// # Errors
/// [`Error::NoOperand`], and those of [`Equation::sizes`].
pub fn adjoint_equation(equation: &Equation, shapes: &[Shape], operand: usize) -> Result<Adjoint> {
    adjoint_equation_conj(equation, shapes, operand, &vec![Conj::No; equation.n_operands()])
}

/// As [`adjoint_equation`], where the forward contraction conjugates the operands marked in
/// `forward`. If `operand` itself is conjugated, the map is antilinear and its gradient is
/// `conj(A^H grad_y)`.
///
/// # Errors
/// [`Error::NoOperand`], [`Error::OperandCount`] if the marks are not as many as the operands,
/// and those of [`Equation::sizes`].
pub fn adjoint_equation_conj(
    equation: &Equation,
    shapes: &[Shape],
    operand: usize,
    forward: &[Conj],
) -> Result<Adjoint> {
    let sizes = equation.sizes(shapes)?;
    let n_operands = equation.n_operands();
    let wanted = equation.operands().get(operand).ok_or(Error::NoOperand { operand, n_operands })?;
    if forward.len() != n_operands {
        return Err(Error::OperandCount { equation: equation.to_string(), expected: n_operands, found: forward.len() });
    }
    let antilinear = forward[operand] == Conj::Yes;
    let mut factors = vec![Factor::Gradient(forward[operand])];
    let mut operands = vec![equation.output().to_vec()];
    for (idx, labels) in equation.operands().iter().enumerate().filter(|(idx, _)| *idx != operand) {
        let conj = if antilinear { forward[idx] } else { forward[idx].flipped() };
        factors.push(Factor::Operand { idx, conj });
        operands.push(labels.clone());
    }
    let mut ones = Vec::new();
    for &label in wanted {
        if !operands.iter().any(|labels| labels.contains(&label)) {
            factors.push(Factor::Ones(label));
            operands.push(vec![label]);
            ones.push((label, sizes.get(label)));
        }
    }
    Ok(Adjoint { equation: Equation::new(operands, wanted.clone())?, factors, ones })
}

impl Adjoint {
    /// The equation: the gradient first, then the other operands in order, then ones.
    #[must_use]
    pub fn equation(&self) -> &Equation {
        &self.equation
    }

    /// What stands at each place of the equation.
    #[must_use]
    pub fn factors(&self) -> &[Factor] {
        &self.factors
    }

    /// The shapes of the factors, for the planner: `gradient` is that of the forward output,
    /// `forward` those of the forward operands. Shapes of operands that are not there are left
    /// out; the planner then reports their number.
    #[must_use]
    pub fn shapes(&self, gradient: &Shape, forward: &[Shape]) -> Vec<Shape> {
        let shape = |factor: &Factor| match factor {
            Factor::Gradient(_) => Some(gradient.clone()),
            Factor::Operand { idx, .. } => forward.get(*idx).cloned(),
            Factor::Ones(label) => self.ones.iter().find(|(it, _)| it == label).map(|(_, size)| [*size].into()),
        };
        self.factors.iter().filter_map(shape).collect()
    }

    /// Runs the plan of [`Adjoint::equation`]. The conjugations come from the factors; those of
    /// `gradient` and `forward` are ignored, their layouts are kept.
    ///
    /// # Shapes
    /// - `gradient`: the forward output
    /// - `forward`: all forward operands; the one whose gradient this is is not read
    /// - returns the shape of that operand
    ///
    /// # Errors
    /// [`Error::NoOperand`] if `forward` is too short, and those of [`execute`].
    pub fn execute(
        &self,
        plan: &Plan,
        gradient: Operand<'_>,
        forward: &[Operand<'_>],
        output: &OutputSpec,
    ) -> Result<Tensor> {
        let (domain, _) = gradient.resolve(0)?;
        let dtype = DType { domain, precision: gradient.tensor.precision() };
        let ones = self
            .ones
            .iter()
            .map(|&(_, size)| {
                let one: &[f32] = if domain == Domain::Complex { &[1.0, 0.0] } else { &[1.0] };
                let device = gradient.tensor.device();
                Ok(Tensor::from_scalars(device, &one.repeat(size), [size], dtype, Purpose::Workspace)?)
            })
            .collect::<Result<Vec<Tensor>>>()?;
        let mut ones_left = ones.iter();
        let operands = self
            .factors
            .iter()
            .map(|factor| match factor {
                Factor::Gradient(conj) => Ok(Some(gradient.conj(*conj))),
                Factor::Operand { idx, conj } => {
                    let missing = Error::NoOperand { operand: *idx, n_operands: forward.len() };
                    Ok(Some(forward.get(*idx).ok_or(missing)?.conj(*conj)))
                }
                Factor::Ones(_) => Ok(ones_left.next().map(Operand::new)),
            })
            .collect::<Result<Vec<_>>>()?;
        let operands: Vec<Operand<'_>> = operands.into_iter().flatten().collect();
        execute(plan, &operands, output)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_others_are_conjugated_and_lonely_labels_broadcast() {
        let equation = Equation::parse("abq,bc,cd->ad").unwrap();
        let shapes: Vec<Shape> = vec![[2, 3, 7].into(), [3, 4].into(), [4, 5].into()];
        let adjoint = adjoint_equation(&equation, &shapes, 0).unwrap();
        assert_eq!(adjoint.equation().to_string(), "ad,bc,cd,q->abq");
        assert_eq!(
            adjoint.factors(),
            [
                Factor::Gradient(Conj::No),
                Factor::Operand { idx: 1, conj: Conj::Yes },
                Factor::Operand { idx: 2, conj: Conj::Yes },
                Factor::Ones('q'),
            ]
        );
        assert_eq!(adjoint.shapes(&[2, 5].into(), &shapes)[3], Shape::from([7]));
        assert_eq!(adjoint_equation(&equation, &shapes, 3), Err(Error::NoOperand { operand: 3, n_operands: 3 }));
        let forward = [Conj::Yes, Conj::No, Conj::Yes];
        let adjoint = adjoint_equation_conj(&equation, &shapes, 0, &forward).unwrap();
        assert_eq!(
            adjoint.factors()[..3],
            [
                Factor::Gradient(Conj::Yes),
                Factor::Operand { idx: 1, conj: Conj::No },
                Factor::Operand { idx: 2, conj: Conj::Yes },
            ]
        );
    }
}
