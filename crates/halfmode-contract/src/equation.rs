//! The einsum equation: parsed, validated, and matched with shapes.

use crate::label::{LabelSet, Sizes};
use crate::{Error, Result};
use halfmode_tensor::Shape;
use std::fmt;
use std::str::FromStr;

/// An einsum equation such as `bxi,xio->bxo`.
///
/// Labels are the letters a-z and A-Z; spaces are ignored; an operand without labels is a scalar.
/// Without an arrow the output is implicit: the labels that occur exactly once, A-Z before a-z.
/// A label occurs at most once per operand (no diagonals) and at most once in the output; labels
/// that are not in the output are summed. There is no broadcasting: one label has one size.
///
/// ```
/// use halfmode_contract::Equation;
/// let equation: Equation = "ij, jk".parse()?;
/// assert_eq!(equation.to_string(), "ij,jk->ik");
/// # Ok::<(), halfmode_contract::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Equation {
    operands: Vec<Vec<char>>,
    output: Vec<char>,
}

impl Equation {
    /// Parses and validates.
    ///
    /// # Errors
    /// [`Error::Empty`], [`Error::Character`], [`Error::AfterArrow`] and those of
    /// [`Equation::new`].
    pub fn parse(text: &str) -> Result<Self> {
        let mut operands = vec![Vec::new()];
        let mut output: Option<Vec<char>> = None;
        let mut characters = text.chars().enumerate().filter(|(_, c)| !c.is_whitespace()).peekable();
        if characters.peek().is_none() {
            return Err(Error::Empty);
        }
        while let Some((position, character)) = characters.next() {
            match (character, &mut output) {
                (label, Some(output)) if label.is_ascii_alphabetic() => output.push(label),
                (label, None) if label.is_ascii_alphabetic() => {
                    if let Some(last) = operands.last_mut() {
                        last.push(label);
                    }
                }
                (',', None) => operands.push(Vec::new()),
                ('-', None) if characters.next_if(|&(_, c)| c == '>').is_some() => output = Some(Vec::new()),
                (',' | '-', Some(_)) => return Err(Error::AfterArrow { character, position }),
                _ => return Err(Error::Character { character, position }),
            }
        }
        let output = output.unwrap_or_else(|| implicit_output(&operands));
        Self::new(operands, output)
    }

    /// An equation from the labels of its operands and of its output.
    ///
    /// # Errors
    /// [`Error::Empty`] without operands, [`Error::Character`] for a label that is no letter,
    /// [`Error::RepeatedLabel`], [`Error::RepeatedOutput`], [`Error::UnknownOutput`].
    pub fn new(operands: Vec<Vec<char>>, output: Vec<char>) -> Result<Self> {
        if operands.is_empty() {
            return Err(Error::Empty);
        }
        for labels in operands.iter().chain([&output]) {
            if let Some((position, &character)) = labels.iter().enumerate().find(|(_, c)| !c.is_ascii_alphabetic()) {
                return Err(Error::Character { character, position });
            }
        }
        for (operand, labels) in operands.iter().enumerate() {
            if let Some(label) = repeated(labels) {
                return Err(Error::RepeatedLabel { label, operand });
            }
        }
        if let Some(label) = repeated(&output) {
            return Err(Error::RepeatedOutput { label });
        }
        let known = operands.iter().fold(LabelSet::default(), |set, labels| set.union(LabelSet::of(labels)));
        if let Some(&label) = output.iter().find(|&&label| !known.contains(label)) {
            return Err(Error::UnknownOutput { label });
        }
        Ok(Equation { operands, output })
    }

    /// The labels of each operand.
    #[must_use]
    pub fn operands(&self) -> &[Vec<char>] {
        &self.operands
    }

    /// The labels of the output.
    #[must_use]
    pub fn output(&self) -> &[char] {
        &self.output
    }

    /// Number of operands, at least 1.
    #[must_use]
    pub fn n_operands(&self) -> usize {
        self.operands.len()
    }

    /// The size of every label, from the shapes of the operands.
    ///
    /// # Errors
    /// [`Error::OperandCount`], [`Error::Rank`], or [`Error::Size`] if a label has two sizes.
    pub fn sizes(&self, shapes: &[Shape]) -> Result<Sizes> {
        if shapes.len() != self.operands.len() {
            let (expected, found) = (self.operands.len(), shapes.len());
            return Err(Error::OperandCount { equation: self.to_string(), expected, found });
        }
        let mut sizes = Sizes::unknown();
        for (operand, (labels, shape)) in self.operands.iter().zip(shapes).enumerate() {
            if labels.len() != shape.len() {
                return Err(Error::Rank { operand, labels: labels.iter().collect(), shape: shape.clone() });
            }
            for (&label, &size) in labels.iter().zip(shape.iter()) {
                match self.operands[..operand].iter().position(|earlier| earlier.contains(&label)) {
                    Some(first_operand) if sizes.get(label) != size => {
                        let expected = sizes.get(label);
                        return Err(Error::Size { label, operand, size, first_operand, expected });
                    }
                    Some(_) => {}
                    None => sizes.set(label, size),
                }
            }
        }
        Ok(sizes)
    }
}

/// Labels that occur exactly once, in the order of their character codes.
fn implicit_output(operands: &[Vec<char>]) -> Vec<char> {
    let mut all: Vec<char> = operands.iter().flatten().copied().collect();
    all.sort_unstable();
    all.chunk_by(|a, b| a == b).filter(|run| run.len() == 1).map(|run| run[0]).collect()
}

/// The first label that stands twice.
fn repeated(labels: &[char]) -> Option<char> {
    labels.iter().enumerate().find(|(idx, label)| labels[..*idx].contains(label)).map(|(_, &label)| label)
}

impl FromStr for Equation {
    type Err = Error;
    fn from_str(text: &str) -> Result<Self> {
        Self::parse(text)
    }
}

impl fmt::Display for Equation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let operands: Vec<String> = self.operands.iter().map(|labels| labels.iter().collect()).collect();
        let output: String = self.output.iter().collect();
        f.pad(&format!("{}->{output}", operands.join(",")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shapes(extents: &[&[usize]]) -> Vec<Shape> {
        extents.iter().map(|it| Shape::new(it)).collect()
    }

    #[test]
    fn spaces_scalars_and_the_implicit_output_are_understood() {
        for (text, canonical) in [
            (" b x i , xio -> b x o ", "bxi,xio->bxo"),
            ("ij,jk", "ij,jk->ik"),
            ("ba", "ba->ab"),
            ("aB,Bc,C", "aB,Bc,C->Cac"),
            (",a->a", ",a->a"),
            ("ab->", "ab->"),
            ("ab - > a", "ab->a"),
            ("->", "->"),
        ] {
            assert_eq!(Equation::parse(text).unwrap().to_string(), canonical, "{text}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        for (text, message) in [
            ("  ", "the einsum equation is empty"),
            ("a...,b", "einsum equation: character `.` at position 1 is not a label (a-z, A-Z), `,` or `->`"),
            ("a-b", "einsum equation: character `-` at position 1 is not a label (a-z, A-Z), `,` or `->`"),
            ("a->b,c", "einsum equation: `,` at position 4 comes after the arrow, where only output labels may stand"),
            ("aba,c->b", "einsum equation: label `a` is repeated in operand 0; diagonals are not supported"),
            ("ab->aa", "einsum equation: label `a` is repeated in the output"),
            ("ab,bc->ad", "einsum equation: output label `d` is in no operand"),
        ] {
            assert_eq!(Equation::parse(text).unwrap_err().to_string(), message);
        }
        let equation = Equation::parse("ab,bc->ac").unwrap();
        for (given, message) in [
            (shapes(&[&[2, 3]]), "`ab,bc->ac` has 2 operands, found 1"),
            (shapes(&[&[2, 3], &[3]]), "operand 1 is labelled `bc`, found shape [3]"),
            (shapes(&[&[2, 3], &[4, 5]]), "label `b` has size 4 in operand 1, but size 3 in operand 0"),
        ] {
            assert_eq!(equation.sizes(&given).unwrap_err().to_string(), message);
        }
    }

    #[test]
    fn sizes_are_found() {
        let sizes = Equation::parse("aB,Bc->ac").unwrap().sizes(&shapes(&[&[2, 3], &[3, 5]])).unwrap();
        assert_eq!((sizes.get('a'), sizes.get('B'), sizes.get('c')), (2, 3, 5));
    }
}
