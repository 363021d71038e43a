//! The exact search: dynamic programming over all subsets of operands.

use crate::label::{LabelSet, Sizes};
use crate::plan::Network;
use crate::{Error, Objective, Result};

/// The most operands that exact planning takes: 3^10 / 2 splits, about a millisecond.
pub const MAX_EXACT_OPERANDS: usize = 10;

/// Costs compare in order; every entry but a peak adds up over a tree.
type Cost = (f64, f64);

/// The best tree over a subset: its cost and the split at its root (0: a single operand).
#[derive(Clone, Copy)]
struct Best {
    cost: Cost,
    split: usize,
}

/// The order of products that minimises `objective`.
///
/// # Errors
/// [`Error::TooManyOperands`].
pub(crate) fn order(network: &Network, sizes: &Sizes, objective: Objective) -> Result<Vec<(usize, usize)>> {
    let n_operands = network.operands.len();
    if n_operands > MAX_EXACT_OPERANDS {
        return Err(Error::TooManyOperands { n_operands, max: MAX_EXACT_OPERANDS });
    }
    let labels = subset_labels(network);
    let table = match objective {
        Objective::Weighted { mu } => {
            let cost = |elements: f64, multiplies: f64| (elements + mu * multiplies, multiplies);
            search(network, sizes, &labels, cost, f64::INFINITY)
        }
        Objective::Multiplies => {
            search(network, sizes, &labels, |elements, multiplies| (multiplies, elements), f64::INFINITY)
        }
        Objective::Peak => {
            // A maximum does not add up, so ties cannot be broken in the same pass: first the
            // least peak, then the least total among the trees that keep it.
            let peak = least_peak(sizes, &labels);
            search(network, sizes, &labels, |elements, multiplies| (elements, multiplies), peak)
        }
    };
    let mut pairs = Vec::with_capacity(n_operands.saturating_sub(1));
    unfold(&table, labels.len() - 1, n_operands, &mut pairs);
    Ok(pairs)
}

/// The labels of the product of each subset of operands (a bit per operand).
fn subset_labels(network: &Network) -> Vec<LabelSet> {
    let n_operands = network.operands.len();
    let joined = |subset: usize| {
        (0..n_operands)
            .filter(|operand| subset >> operand & 1 == 1)
            .fold(LabelSet::default(), |set, operand| set.union(network.operands[operand]))
    };
    let full = (1usize << n_operands) - 1;
    (0..=full)
        .map(|subset| match subset.count_ones() {
            0 | 1 => joined(subset),
            _ => joined(subset).common(joined(full ^ subset).union(network.output)),
        })
        .collect()
}

/// The ways to cut a subset in two, each once: the lowest operand stays on the left.
fn splits(subset: usize) -> impl Iterator<Item = (usize, usize)> {
    let low = subset & subset.wrapping_neg();
    let rest = subset ^ low;
    let mut part = rest;
    std::iter::from_fn(move || {
        if part == 0 {
            return None;
        }
        // Counts down through the subsets of `rest`, without `rest` itself.
        part = (part - 1) & rest;
        Some((low | part, rest ^ part))
    })
}

fn search(
    network: &Network,
    sizes: &Sizes,
    labels: &[LabelSet],
    cost: impl Fn(f64, f64) -> Cost,
    peak: f64,
) -> Vec<Best> {
    let mut table: Vec<Best> = Vec::with_capacity(labels.len());
    for subset in 0..labels.len() {
        if subset.count_ones() < 2 {
            table.push(Best { cost: (0.0, 0.0), split: 0 });
            continue;
        }
        let mut best = Best { cost: (f64::INFINITY, f64::INFINITY), split: subset & subset.wrapping_neg() };
        let elements = sizes.volume(labels[subset]) as f64;
        for (lhs, rhs) in splits(subset).filter(|_| elements <= peak) {
            let multiplies = network.multiplies(sizes, labels[lhs], labels[rhs], labels[subset]) as f64;
            let here = cost(elements, multiplies);
            let total =
                (here.0 + table[lhs].cost.0 + table[rhs].cost.0, here.1 + table[lhs].cost.1 + table[rhs].cost.1);
            if total < best.cost {
                best = Best { cost: total, split: lhs };
            }
        }
        table.push(best);
    }
    table
}

/// The least possible size of the biggest result.
fn least_peak(sizes: &Sizes, labels: &[LabelSet]) -> f64 {
    let mut table = vec![0.0f64; labels.len()];
    for subset in (0..labels.len()).filter(|subset| subset.count_ones() >= 2) {
        let below = splits(subset).map(|(lhs, rhs)| table[lhs].max(table[rhs])).fold(f64::INFINITY, f64::min);
        table[subset] = below.max(sizes.volume(labels[subset]) as f64);
    }
    table.last().copied().unwrap_or(0.0)
}

/// Writes the products of a subtree in post-order; returns the number of its value.
fn unfold(table: &[Best], subset: usize, n_operands: usize, pairs: &mut Vec<(usize, usize)>) -> usize {
    if subset.count_ones() < 2 {
        return subset.trailing_zeros() as usize;
    }
    let lhs = unfold(table, table[subset].split, n_operands, pairs);
    let rhs = unfold(table, subset ^ table[subset].split, n_operands, pairs);
    pairs.push((lhs, rhs));
    n_operands + pairs.len() - 1
}
