//! What can go wrong with a contraction.

use halfmode_tensor::Shape;

/// What can go wrong with a contraction. Operands are numbered from 0.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The equation has no characters.
    #[error("the einsum equation is empty")]
    Empty,
    /// A character that is neither a label, a comma, a space nor part of the arrow.
    #[error("einsum equation: character `{character}` at position {position} is not a label (a-z, A-Z), `,` or `->`")]
    Character {
        /// The character.
        character: char,
        /// Where it stands, counted in characters from 0.
        position: usize,
    },
    /// A second arrow, or a comma after the arrow.
    #[error(
        "einsum equation: `{character}` at position {position} comes after the arrow, where only output labels may stand"
    )]
    AfterArrow {
        /// The character.
        character: char,
        /// Where it stands, counted in characters from 0.
        position: usize,
    },
    /// A label twice in one operand (a diagonal).
    #[error("einsum equation: label `{label}` is repeated in operand {operand}; diagonals are not supported")]
    RepeatedLabel {
        /// The label.
        label: char,
        /// The operand.
        operand: usize,
    },
    /// A label twice in the output.
    #[error("einsum equation: label `{label}` is repeated in the output")]
    RepeatedOutput {
        /// The label.
        label: char,
    },
    /// An output label that no operand has.
    #[error("einsum equation: output label `{label}` is in no operand")]
    UnknownOutput {
        /// The label.
        label: char,
    },
    /// Another number of operands than the equation names.
    #[error("`{equation}` has {expected} operands, found {found}")]
    OperandCount {
        /// The equation.
        equation: String,
        /// Operands in the equation.
        expected: usize,
        /// Operands given.
        found: usize,
    },
    /// An operand whose axes are not as many as its labels.
    #[error("operand {operand} is labelled `{labels}`, found shape {shape}")]
    Rank {
        /// The operand.
        operand: usize,
        /// Its labels.
        labels: String,
        /// Its shape.
        shape: Shape,
    },
    /// One label with two sizes.
    #[error("label `{label}` has size {size} in operand {operand}, but size {expected} in operand {first_operand}")]
    Size {
        /// The label.
        label: char,
        /// The operand that disagrees.
        operand: usize,
        /// The size there.
        size: usize,
        /// The first operand that has the label.
        first_operand: usize,
        /// The size there.
        expected: usize,
    },
    /// Too many operands for the exact search.
    #[error("exact planning takes at most {max} operands, found {n_operands}: use policy `memory` or `flops`")]
    TooManyOperands {
        /// Operands in the equation.
        n_operands: usize,
        /// The most that the search takes.
        max: usize,
    },
    /// A weight of multiplies that is negative or not finite.
    #[error("the weight of multiplies must be finite and at least 0, found {mu}")]
    Weight {
        /// The weight.
        mu: f64,
    },
    /// A policy that does not exist.
    #[error("no planning policy `{name}`: expected `memory`, `flops` or `balanced`")]
    UnknownPolicy {
        /// The name.
        name: String,
    },
    /// An order of pairs that is no binary tree over the operands.
    #[error("pair {pair} of the given order ({lhs}, {rhs}) names a value that does not exist or is already used")]
    Order {
        /// Which pair, from 0.
        pair: usize,
        /// Left value.
        lhs: usize,
        /// Right value.
        rhs: usize,
    },
    /// An order that leaves more or less than one value.
    #[error("{n_operands} operands need {expected} pairs, the given order has {found}")]
    OrderLength {
        /// Operands in the equation.
        n_operands: usize,
        /// Pairs needed.
        expected: usize,
        /// Pairs given.
        found: usize,
    },
    /// An operand index that the equation does not have.
    #[error("there is no operand {operand}: the equation has {n_operands}")]
    NoOperand {
        /// The operand asked for.
        operand: usize,
        /// Operands in the equation.
        n_operands: usize,
    },
    /// A tensor that has another shape than the plan was made for.
    #[error("operand {operand}: planned for shape {expected}, found {found}")]
    Shape {
        /// The operand.
        operand: usize,
        /// Shape in the plan.
        expected: Shape,
        /// Shape of the tensor, without its re/im axis.
        found: Shape,
    },
    /// Real and complex operands in one contraction.
    #[error("operand {operand} is {found}, but operand 0 is {expected}: cast one of them")]
    Domain {
        /// The operand.
        operand: usize,
        /// What operand 0 is.
        expected: &'static str,
        /// What this one is.
        found: &'static str,
    },
    /// A split complex operand without its re/im axis.
    #[error(
        "operand {operand}: axis {axis} of shape {shape} cannot be (re, im); it needs a real tensor with 2 entries there"
    )]
    SplitAxis {
        /// The operand; the number of operands stands for the result.
        operand: usize,
        /// The axis.
        axis: usize,
        /// The shape of the tensor.
        shape: Shape,
    },
    /// Operands on different devices.
    #[error("operand {operand} lives on another device than operand 0")]
    Devices {
        /// The operand.
        operand: usize,
    },
    /// From the tensors below.
    #[error(transparent)]
    Tensor(#[from] halfmode_tensor::Error),
}
