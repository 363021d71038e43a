//! A plan: the order of pairwise products and what it costs, known before anything runs.

use crate::blocking::Blocking;
use crate::label::{LabelSet, Sizes};
use crate::{Equation, Error, Policy, Result, exact, greedy};
use halfmode_precision::DType;
use halfmode_tensor::Shape;
use std::fmt;

/// The label sets of an equation, as the searches see it.
#[derive(Debug)]
pub(crate) struct Network {
    pub(crate) operands: Vec<LabelSet>,
    pub(crate) output: LabelSet,
}

impl Network {
    fn new(equation: &Equation) -> Self {
        Network {
            operands: equation.operands().iter().map(|labels| LabelSet::of(labels)).collect(),
            output: LabelSet::of(equation.output()),
        }
    }

    /// Multiplies of one product. Labels that only one side has and nobody needs afterwards are
    /// summed while that side is read, so they cost additions only.
    pub(crate) fn multiplies(&self, sizes: &Sizes, lhs: LabelSet, rhs: LabelSet, result: LabelSet) -> u64 {
        sizes.volume(lhs.common(rhs).union(result))
    }
}

/// One pairwise product. Values are numbered: the operands first, then the result of each step.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Step {
    /// Number of the left value.
    pub lhs: usize,
    /// Number of the right value.
    pub rhs: usize,
    /// Labels of the left value.
    pub lhs_labels: Vec<char>,
    /// Labels of the right value.
    pub rhs_labels: Vec<char>,
    /// Labels of the result; those of the output in the last step.
    pub labels: Vec<char>,
    /// Shape of the result.
    pub shape: Shape,
    /// Elements of the result.
    pub elements: u64,
    /// Multiplies (complex ones, if the operands are complex).
    pub multiplies: u64,
}

/// An order of pairwise products with its costs. Counts are elements (complex elements, if the
/// operands are complex) and saturate at `u64::MAX`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    equation: Equation,
    shapes: Vec<Shape>,
    sizes: Sizes,
    policy: Option<Policy>,
    steps: Vec<Step>,
}

impl Plan {
    /// Plans `equation` for operands of these shapes.
    ///
    /// # Errors
    /// Those of [`Equation::sizes`]; [`Error::Weight`] and [`Error::TooManyOperands`] for exact
    /// policies.
    pub fn new(equation: &Equation, shapes: &[Shape], policy: Policy) -> Result<Self> {
        policy.validate()?;
        let sizes = equation.sizes(shapes)?;
        let network = Network::new(equation);
        let pairs = match policy {
            Policy::Exact(objective) => exact::order(&network, &sizes, objective)?,
            Policy::Memory | Policy::Flops => greedy::order(&network, &sizes, policy),
        };
        let steps = steps(equation, &network, &sizes, &pairs)?;
        Ok(Plan { equation: equation.clone(), shapes: shapes.to_vec(), sizes, policy: Some(policy), steps })
    }

    /// A plan with an order of your own: pairs of value numbers (operands from 0, then the result
    /// of each pair).
    ///
    /// # Errors
    /// Those of [`Equation::sizes`]; [`Error::Order`] and [`Error::OrderLength`] if the pairs are
    /// no binary tree over the operands.
    pub fn with_order(equation: &Equation, shapes: &[Shape], pairs: &[(usize, usize)]) -> Result<Self> {
        let sizes = equation.sizes(shapes)?;
        let steps = steps(equation, &Network::new(equation), &sizes, pairs)?;
        Ok(Plan { equation: equation.clone(), shapes: shapes.to_vec(), sizes, policy: None, steps })
    }

    /// The equation.
    #[must_use]
    pub fn equation(&self) -> &Equation {
        &self.equation
    }

    /// The shapes of the operands.
    #[must_use]
    pub fn shapes(&self) -> &[Shape] {
        &self.shapes
    }

    /// The size of every label.
    #[must_use]
    pub fn sizes(&self) -> &Sizes {
        &self.sizes
    }

    /// The policy; `None` if the order was given.
    #[must_use]
    pub fn policy(&self) -> Option<Policy> {
        self.policy
    }

    /// The products in order. Empty for one operand, which is only summed and permuted.
    #[must_use]
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    /// The shape of the result.
    #[must_use]
    pub fn output_shape(&self) -> Shape {
        self.sizes.shape(self.equation.output())
    }

    /// Elements of the biggest result of a step, the final one included.
    #[must_use]
    pub fn peak_elements(&self) -> u64 {
        self.results().max().unwrap_or(0)
    }

    /// Elements of the results of all steps together, the final one included.
    #[must_use]
    pub fn total_elements(&self) -> u64 {
        self.results().fold(0, u64::saturating_add)
    }

    /// Multiplies of all steps together.
    #[must_use]
    pub fn multiplies(&self) -> u64 {
        self.steps.iter().fold(0, |sum, step| sum.saturating_add(step.multiplies))
    }

    fn results(&self) -> impl Iterator<Item = u64> + '_ {
        self.steps.iter().map(|step| step.elements)
    }

    /// Bytes that a backward pass keeps if it keeps every intermediate: all results but the
    /// final one, which is the caller's. Operands are shared and not counted.
    #[must_use]
    pub fn saved_bytes(&self, dtype: DType) -> u64 {
        let kept = self.steps.iter().rev().skip(1).fold(0u64, |sum, step| sum.saturating_add(step.elements));
        kept.saturating_mul(dtype.bytes() as u64)
    }

    /// Peak bytes of [`halfmode_tensor::Purpose::Workspace`] while [`crate::execute`] runs on
    /// `n_threads` threads with result and intermediates in `dtype`: intermediates that live at
    /// once, plus the tiles of all threads. The result itself is the caller's.
    #[must_use]
    pub fn scratch_bytes(&self, dtype: DType, n_threads: usize) -> usize {
        let lanes = dtype.domain.scalars();
        let tiles = |blocking: Blocking| {
            let accumulator = dtype.precision.accumulate().bytes();
            blocking.scratch_len().saturating_mul(accumulator).saturating_mul(n_threads)
        };
        let Some(last) = self.steps.len().checked_sub(1) else {
            return tiles(Blocking::unary(&self.equation.operands()[0], self.equation.output(), &self.sizes, lanes));
        };
        let bytes = |value: usize| match value.checked_sub(self.shapes.len()).map(|idx| &self.steps[idx]) {
            Some(step) => usize::try_from(step.elements).unwrap_or(usize::MAX).saturating_mul(dtype.bytes()),
            None => 0,
        };
        let (mut live, mut peak) = (0usize, 0usize);
        for (idx, step) in self.steps.iter().enumerate() {
            if idx < last {
                live = live.saturating_add(bytes(self.shapes.len() + idx));
            }
            peak = peak.max(live.saturating_add(tiles(Blocking::of_step(step, &self.sizes, lanes))));
            live = live.saturating_sub(bytes(step.lhs)).saturating_sub(bytes(step.rhs));
        }
        peak
    }
}

/// Follows an order of pairs and writes down what each product is.
fn steps(equation: &Equation, network: &Network, sizes: &Sizes, pairs: &[(usize, usize)]) -> Result<Vec<Step>> {
    let n_operands = equation.n_operands();
    if pairs.len() != n_operands - 1 {
        return Err(Error::OrderLength { n_operands, expected: n_operands - 1, found: pairs.len() });
    }
    let mut live: Vec<Option<Vec<char>>> = equation.operands().iter().cloned().map(Some).collect();
    let mut steps = Vec::with_capacity(pairs.len());
    for (pair, &(lhs, rhs)) in pairs.iter().enumerate() {
        let mut take = |value: usize| live.get_mut(value).and_then(Option::take).ok_or(Error::Order { pair, lhs, rhs });
        let (lhs_labels, rhs_labels) = (take(lhs)?, take(rhs)?);
        let (lhs_set, rhs_set) = (LabelSet::of(&lhs_labels), LabelSet::of(&rhs_labels));
        let kept = live.iter().flatten().fold(network.output, |set, labels| set.union(LabelSet::of(labels)));
        let result = lhs_set.union(rhs_set).common(kept);
        let labels = if pair + 1 == pairs.len() {
            equation.output().to_vec()
        } else {
            result_order(&lhs_labels, &rhs_labels, result)
        };
        let multiplies = network.multiplies(sizes, lhs_set, rhs_set, result);
        let shape = sizes.shape(&labels);
        live.push(Some(labels.clone()));
        steps.push(Step {
            lhs,
            rhs,
            lhs_labels,
            rhs_labels,
            labels,
            shape,
            elements: sizes.volume(result),
            multiplies,
        });
    }
    Ok(steps)
}

/// The axes of an intermediate as the matrix products make them: shared labels, rows, columns.
fn result_order(lhs: &[char], rhs: &[char], result: LabelSet) -> Vec<char> {
    let kept = |labels: &[char], shared: bool, other: &[char]| {
        let chosen = labels.iter().copied().filter(|label| other.contains(label) == shared);
        chosen.filter(|&label| result.contains(label)).collect::<Vec<char>>()
    };
    [kept(lhs, true, rhs), kept(lhs, false, rhs), kept(rhs, false, lhs)].concat()
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = |labels: &[char]| labels.iter().collect::<String>();
        let policy = self.policy.map_or_else(|| "given order".to_owned(), |policy| policy.to_string());
        writeln!(f, "{}, policy: {policy}", self.equation)?;
        let header = ["step", "values", "product", "shape", "elements", "multiplies"].map(str::to_owned);
        let rows = self.steps.iter().enumerate().map(|(idx, step)| {
            [
                (self.shapes.len() + idx).to_string(),
                format!("{} {}", step.lhs, step.rhs),
                format!("{},{}->{}", text(&step.lhs_labels), text(&step.rhs_labels), text(&step.labels)),
                step.shape.to_string(),
                step.elements.to_string(),
                step.multiplies.to_string(),
            ]
        });
        let table: Vec<[String; 6]> = std::iter::once(header).chain(rows).collect();
        let width = |column: usize| table.iter().map(|row| row[column].len()).max().unwrap_or(0);
        for row in &table {
            let [step, values, product, shape, elements, multiplies] = row;
            writeln!(
                f,
                "{step:>w0$}  {values:<w1$}  {product:<w2$}  {shape:<w3$}  {elements:>w4$}  {multiplies:>w5$}",
                w0 = width(0),
                w1 = width(1),
                w2 = width(2),
                w3 = width(3),
                w4 = width(4),
                w5 = width(5),
            )?;
        }
        let (peak, total) = (self.peak_elements(), self.total_elements());
        write!(f, "peak {peak} elements, total {total} elements, {} multiplies", self.multiplies())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Objective;
    use expect_test::expect;
    use halfmode_precision::Precision;

    fn plan(text: &str, shapes: &[&[usize]], policy: Policy) -> Result<Plan> {
        let shapes: Vec<Shape> = shapes.iter().map(|it| Shape::new(it)).collect();
        Plan::new(&Equation::parse(text)?, &shapes, policy)
    }

    const CP: (&str, &[&[usize]]) =
        ("abcd,e,be,fe,ce,de->afcd", &[&[8, 32, 16, 9], &[100], &[32, 100], &[24, 100], &[16, 100], &[9, 100]]);

    #[test]
    fn a_plan_prints_as_a_table() {
        expect![[r#"
            abcd,e,be,fe,ce,de->afcd, policy: memory
            step  values  product          shape            elements  multiplies
               6  1 5     e,de->ed         [100, 9]              900         900
               7  4 6     ce,ed->ecd       [100, 16, 9]        14400       14400
               8  2 3     be,fe->ebf       [100, 32, 24]       76800       76800
               9  7 8     ecd,ebf->cdbf    [16, 9, 32, 24]    110592    11059200
              10  0 9     abcd,cdbf->afcd  [8, 24, 16, 9]      27648      884736
            peak 110592 elements, total 230340 elements, 12036036 multiplies"#]]
        .assert_eq(&plan(CP.0, CP.1, Policy::Memory).unwrap().to_string());
    }

    #[test]
    fn greedy_forms_outer_products_only_when_nothing_else_is_left() {
        // The outer product of the two vectors is by far the smallest result.
        let shapes: &[&[usize]] = &[&[2], &[2], &[2, 50], &[2, 50]];
        let first = |text: &str| {
            let plan = plan(text, shapes, Policy::Memory).unwrap();
            (plan.steps()[0].lhs, plan.steps()[0].rhs)
        };
        assert_eq!(first("a,b,ac,bd->cd"), (0, 2));
        assert_eq!(first("a,b,ec,fd->abecfd"), (0, 1));
    }

    #[test]
    fn exact_beats_or_equals_greedy_in_its_own_objective() {
        let exact = |objective| plan(CP.0, CP.1, Policy::Exact(objective)).unwrap();
        for policy in [Policy::Memory, Policy::Flops] {
            let greedy = plan(CP.0, CP.1, policy).unwrap();
            assert!(exact(Objective::TOTAL).total_elements() <= greedy.total_elements());
            assert!(exact(Objective::Multiplies).multiplies() <= greedy.multiplies());
            assert!(exact(Objective::Peak).peak_elements() <= greedy.peak_elements());
        }
    }

    #[test]
    fn the_exact_search_visits_every_tree() {
        // Against brute force over all sequences of pairs.
        type Visit<'a> = &'a mut dyn FnMut(&[(usize, usize)]);
        fn all(values: &[usize], next: usize, pairs: &mut Vec<(usize, usize)>, visit: Visit<'_>) {
            if values.len() == 1 {
                visit(pairs);
            }
            for i in 0..values.len() {
                for j in i + 1..values.len() {
                    let mut rest = values.to_vec();
                    let rhs = rest.remove(j);
                    let lhs = rest.remove(i);
                    rest.push(next);
                    pairs.push((lhs, rhs));
                    all(&rest, next + 1, pairs, visit);
                    pairs.pop();
                }
            }
        }
        let (text, shapes): (&str, &[&[usize]]) =
            ("abx,bcy,cdz,dae,exq->yzq", &[&[3, 5, 2], &[5, 4, 3], &[4, 6, 2], &[6, 3, 7], &[7, 2, 5]]);
        let equation = Equation::parse(text).unwrap();
        let shape_list: Vec<Shape> = shapes.iter().map(|it| Shape::new(it)).collect();
        let (mut total, mut multiplies, mut peak) = (u64::MAX, u64::MAX, (u64::MAX, u64::MAX));
        all(&[0, 1, 2, 3, 4], 5, &mut Vec::new(), &mut |pairs| {
            let plan = Plan::with_order(&equation, &shape_list, pairs).unwrap();
            total = total.min(plan.total_elements());
            multiplies = multiplies.min(plan.multiplies());
            peak = peak.min((plan.peak_elements(), plan.total_elements()));
        });
        let exact = |objective| plan(text, shapes, Policy::Exact(objective)).unwrap();
        assert_eq!(exact(Objective::TOTAL).total_elements(), total);
        assert_eq!(exact(Objective::Multiplies).multiplies(), multiplies);
        let best = exact(Objective::Peak);
        assert_eq!((best.peak_elements(), best.total_elements()), peak);
    }

    #[test]
    fn saved_bytes_are_those_of_the_intermediates() {
        let plan = plan("ab,bc,cd->ad", &[&[2, 3], &[3, 4], &[4, 5]], Policy::Memory).unwrap();
        assert_eq!(plan.steps()[0].elements, 8);
        assert_eq!((plan.saved_bytes(DType::complex(Precision::F16)), plan.total_elements()), (8 * 4, 8 + 10));
        assert_eq!((plan.multiplies(), plan.peak_elements()), (24 + 40, 10));
    }

    #[test]
    fn orders_weights_and_operand_counts_are_checked() {
        let equation = Equation::parse("ab,bc,cd->ad").unwrap();
        let shapes: Vec<Shape> = vec![[2, 3].into(), [3, 4].into(), [4, 5].into()];
        let order = |pairs: &[(usize, usize)]| Plan::with_order(&equation, &shapes, pairs).map(|_| ());
        assert_eq!(order(&[(0, 1)]), Err(Error::OrderLength { n_operands: 3, expected: 2, found: 1 }));
        assert_eq!(order(&[(0, 1), (2, 1)]), Err(Error::Order { pair: 1, lhs: 2, rhs: 1 }));
        assert_eq!(order(&[(0, 1), (4, 2)]), Err(Error::Order { pair: 1, lhs: 4, rhs: 2 }));
        assert_eq!(order(&[(0, 1), (3, 2)]), Ok(()));
        let weighted = |mu| Plan::new(&equation, &shapes, Policy::Exact(Objective::Weighted { mu })).map(|_| ());
        assert_eq!(weighted(-1.0), Err(Error::Weight { mu: -1.0 }));
        assert!(weighted(f64::NAN).is_err() && weighted(1e-3).is_ok());
        let many = ["a"; 11].join(",");
        let shapes = vec![&[2usize][..]; 11];
        assert_eq!(plan(&many, &shapes, Policy::balanced()), Err(Error::TooManyOperands { n_operands: 11, max: 10 }));
        assert_eq!(plan(&many, &shapes, Policy::Memory).unwrap().steps().len(), 10);
    }
}
