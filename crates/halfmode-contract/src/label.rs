//! Sets of labels and the size of each.

use halfmode_tensor::Shape;

const N_LABELS: usize = 52;

/// A set of labels, one bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct LabelSet(u64);

/// The bit of a label; `Equation` admits a-z and A-Z only.
fn position(label: char) -> usize {
    match label {
        'a'..='z' => label as usize - 'a' as usize,
        _ => (26 + (label as usize).saturating_sub('A' as usize)).min(N_LABELS - 1),
    }
}

impl LabelSet {
    pub(crate) fn of(labels: &[char]) -> Self {
        LabelSet(labels.iter().fold(0, |set, &label| set | 1 << position(label)))
    }

    pub(crate) fn contains(self, label: char) -> bool {
        self.0 >> position(label) & 1 == 1
    }

    pub(crate) fn union(self, other: Self) -> Self {
        LabelSet(self.0 | other.0)
    }

    pub(crate) fn common(self, other: Self) -> Self {
        LabelSet(self.0 & other.0)
    }

    pub(crate) fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// The size of every label of an equation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sizes([usize; N_LABELS]);

impl Sizes {
    pub(crate) fn unknown() -> Self {
        Sizes([1; N_LABELS])
    }

    pub(crate) fn set(&mut self, label: char, size: usize) {
        self.0[position(label)] = size;
    }

    /// The size of a label; 1 for labels that the equation does not have.
    #[must_use]
    pub fn get(&self, label: char) -> usize {
        self.0[position(label)]
    }

    /// The shape of a tensor with these labels.
    #[must_use]
    pub fn shape(&self, labels: &[char]) -> Shape {
        Shape::from(labels.iter().map(|&label| self.get(label)).collect::<Vec<_>>())
    }

    /// Elements of a tensor with these labels; the largest number if there are more.
    pub(crate) fn volume(&self, set: LabelSet) -> u64 {
        (0..N_LABELS)
            .filter(|bit| set.0 >> bit & 1 == 1)
            .fold(1u64, |volume, bit| volume.saturating_mul(self.0[bit] as u64))
    }
}
