//! The greedy searches: one pair at a time, the best of those that share a label.

use crate::Policy;
use crate::label::{LabelSet, Sizes};
use crate::plan::Network;

/// The order of products that the greedy policy gives. Values are numbered: operands first, then
/// the result of each product.
pub(crate) fn order(network: &Network, sizes: &Sizes, policy: Policy) -> Vec<(usize, usize)> {
    let mut values: Vec<(usize, LabelSet)> = network.operands.iter().copied().enumerate().collect();
    let mut pairs = Vec::with_capacity(values.len().saturating_sub(1));
    while values.len() > 1 {
        let Some((_, lhs_at, rhs_at, result)) = best(network, sizes, policy, &values) else { break };
        let (rhs, _) = values.remove(rhs_at);
        let (lhs, _) = values.remove(lhs_at);
        values.push((network.operands.len() + pairs.len(), result));
        pairs.push((lhs, rhs));
    }
    pairs
}

/// The sort key of a pair, its two positions, and the labels of its result.
type Candidate = ((bool, u64, u64, usize, usize), usize, usize, LabelSet);

fn best(network: &Network, sizes: &Sizes, policy: Policy, values: &[(usize, LabelSet)]) -> Option<Candidate> {
    let mut best: Option<Candidate> = None;
    for (rhs_at, &(rhs, rhs_set)) in values.iter().enumerate() {
        for (lhs_at, &(lhs, lhs_set)) in values[..rhs_at].iter().enumerate() {
            let others = values.iter().enumerate().filter(|(at, _)| *at != lhs_at && *at != rhs_at);
            let kept = others.fold(network.output, |set, (_, &(_, other))| set.union(other));
            let result = lhs_set.union(rhs_set).common(kept);
            let elements = sizes.volume(result);
            let multiplies = network.multiplies(sizes, lhs_set, rhs_set, result);
            let (first, second) = match policy {
                Policy::Flops => (multiplies, elements),
                _ => (elements, multiplies),
            };
            // False sorts first: outer products come last, so they are formed only when no pair
            // shares a label.
            let outer = lhs_set.common(rhs_set).is_empty();
            let key = (outer, first, second, lhs, rhs);
            if best.as_ref().is_none_or(|(least, ..)| key < *least) {
                best = Some((key, lhs_at, rhs_at, result));
            }
        }
    }
    best
}
