//! How a pairwise product is cut into tiles. Depends on labels and sizes alone, so that the same
//! product gives the same bits on any number of threads, and its scratch is known in advance.

use crate::Step;
use crate::label::Sizes;

/// Scalars of all tiles of one task that are aimed at: what a second-level cache holds in f32.
const TASK_SCALARS: usize = 96 * 1024;
/// Tasks that are aimed at, so that threads share the work evenly.
const MIN_TASKS: usize = 32;
/// Scalars between the matrices of a tile, so that equal entries of neighbours, which are often a
/// power of two apart, do not compete for one set of the cache.
const PADDING: usize = 16;
/// Neighbours in memory that a tile should take together.
const NEIGHBOURS: usize = 16;

/// The most that a tile takes of each part of a product.
struct Limits {
    columns: usize,
    /// Terms of a sum; a complex tile holds half as many.
    terms: usize,
    rows: (usize, usize),
    /// Scalars for the tiles of a and c.
    row_scalars: usize,
    task_scalars: usize,
}

/// Matrices whose rows lie together in memory: large tiles, few of them at a time.
const MATRICES_APART: Limits =
    Limits { columns: 128, terms: 256, rows: (32, 4096), row_scalars: TASK_SCALARS / 2, task_scalars: TASK_SCALARS };
/// Matrices whose equal entries lie together in memory (channels first, modes last): small tiles,
/// so that many neighbours are read together.
const MATRICES_TOGETHER: Limits =
    Limits { columns: 32, terms: 128, rows: (16, 1024), row_scalars: 4096, task_scalars: 2 * TASK_SCALARS };

/// Labels that play the same part in a product, outermost first, without those of size 1.
#[derive(Clone, Debug, Default)]
pub(crate) struct Group {
    pub(crate) labels: Vec<char>,
    pub(crate) sizes: Vec<usize>,
    /// How much of each label a tile takes.
    pub(crate) chunks: Vec<usize>,
}

impl Group {
    fn new(labels: impl Iterator<Item = char>, sizes: &Sizes) -> Self {
        let labels: Vec<char> = labels.filter(|&label| sizes.get(label) != 1).collect();
        let sizes: Vec<usize> = labels.iter().map(|&label| sizes.get(label)).collect();
        Group { labels, chunks: sizes.clone(), sizes }
    }

    /// Takes whole inner labels and an even part of the first that does not fit. Labels of
    /// `neighbours`, which are innermost in some tensor, get their share first: a tile that took
    /// one entry of them would touch memory entry by entry.
    fn limit(mut self, limit: usize, neighbours: &[char]) -> Self {
        let mut room = limit.max(1);
        let mut shares = vec![1; self.sizes.len()];
        for ((share, &size), label) in shares.iter_mut().zip(&self.sizes).zip(&self.labels) {
            if neighbours.contains(label) {
                *share = size.min(NEIGHBOURS).min(room.isqrt()).max(1);
                room /= *share;
            }
        }
        for ((chunk, &size), share) in self.chunks.iter_mut().zip(&self.sizes).zip(shares).rev() {
            let fits = room * share;
            if size <= fits {
                room = fits / size.max(1);
            } else {
                *chunk = size.div_ceil(size.div_ceil(fits));
                room = 1;
            }
        }
        self
    }

    fn size(&self) -> usize {
        self.sizes.iter().product()
    }

    fn chunk(&self) -> usize {
        self.chunks.iter().product()
    }

    fn n_chunks(&self) -> usize {
        self.sizes.iter().zip(&self.chunks).map(|(size, chunk)| size.div_ceil((*chunk).max(1))).product()
    }
}

/// The parts of a product `c[batch, m, n] = sum_k a[batch, m, k] b[batch, k, n]`, where `a` and
/// `b` are first summed over the labels that nobody else has.
#[derive(Clone, Debug)]
pub(crate) struct Blocking {
    pub(crate) batch: Group,
    pub(crate) m: Group,
    pub(crate) n: Group,
    pub(crate) k: Group,
    pub(crate) sum_a: Group,
    pub(crate) sum_b: Group,
    /// Real scalars per element.
    pub(crate) lanes: usize,
}

impl Blocking {
    pub(crate) fn new(a: &[char], b: &[char], c: &[char], sizes: &Sizes, lanes: usize) -> Self {
        let group = |of: &[char], in_other: bool, other: &[char], in_c: bool| {
            let chosen = of.iter().copied().filter(|it| other.contains(it) == in_other && c.contains(it) == in_c);
            Group::new(chosen, sizes)
        };
        let innermost = |of: &[char]| of.iter().copied().rfind(|&label| sizes.get(label) != 1);
        let neighbours: Vec<char> = [a, b, c].into_iter().filter_map(innermost).collect();
        let (m, batch) = (group(a, false, b, true), group(a, true, b, true));
        let together = neighbours.iter().filter(|label| batch.labels.contains(label)).count() >= 2;
        let limits = if together { MATRICES_TOGETHER } else { MATRICES_APART };

        let k = group(a, true, b, false).limit(limits.terms / lanes, &neighbours);
        let n = group(b, false, a, true).limit(limits.columns, &neighbours);
        let (terms, columns) = (k.chunk() * lanes, n.chunk() * lanes);
        let others = n.n_chunks().saturating_mul(batch.size());
        let spread = m.size().saturating_mul(others).div_ceil(MIN_TASKS);
        let fitting = limits.row_scalars / (terms + columns).max(1);
        let m = m.limit(fitting.min(spread).clamp(limits.rows.0, limits.rows.1), &neighbours);

        let each = tile_scalars(m.chunk(), n.chunk(), k.chunk(), lanes);
        let spread = batch.size().saturating_mul(m.n_chunks()).saturating_mul(n.n_chunks()).div_ceil(MIN_TASKS);
        let batch = batch.limit((limits.task_scalars / each.max(1)).min(spread), &neighbours);
        Blocking { batch, m, n, k, sum_a: group(a, false, b, false), sum_b: group(b, false, a, false), lanes }
    }

    pub(crate) fn of_step(step: &Step, sizes: &Sizes, lanes: usize) -> Self {
        Self::new(&step.lhs_labels, &step.rhs_labels, &step.labels, sizes, lanes)
    }

    /// One operand that is summed and permuted: its product with the number 1.
    pub(crate) fn unary(a: &[char], c: &[char], sizes: &Sizes, lanes: usize) -> Self {
        Self::new(a, &[], c, sizes, lanes)
    }

    /// Distances between the matrices of a, b and c in their tiles.
    pub(crate) fn matrix_strides(&self) -> [usize; 3] {
        let (m, n, k) = (self.m.chunk(), self.n.chunk(), self.k.chunk());
        let padded = |len: usize| if len > PADDING { len + PADDING } else { len };
        [m * k * self.lanes, k * n * self.lanes * self.lanes, m * n * self.lanes].map(padded)
    }

    /// Scalars of the tiles of a, b and c.
    pub(crate) fn tile_lens(&self) -> [usize; 3] {
        self.matrix_strides().map(|stride| stride * self.batch.chunk())
    }

    /// Accumulators that one thread needs: the three tiles, and one result tile in storage order.
    pub(crate) fn scratch_len(&self) -> usize {
        let [a, b, c] = self.tile_lens();
        a + b + 2 * c
    }
}

/// Scalars per batch entry: a, b (complex: a 2 x 2 block of real matrices) and c twice.
fn tile_scalars(m: usize, n: usize, k: usize, lanes: usize) -> usize {
    m * k * lanes + k * n * lanes * lanes + 2 * m * n * lanes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Equation;
    use halfmode_tensor::Shape;

    fn blocking(text: &str, shapes: &[&[usize]], lanes: usize) -> Blocking {
        let equation = Equation::parse(text).unwrap();
        let shapes: Vec<Shape> = shapes.iter().map(|it| Shape::new(it)).collect();
        let sizes = equation.sizes(&shapes).unwrap();
        Blocking::new(&equation.operands()[0], &equation.operands()[1], equation.output(), &sizes, lanes)
    }

    #[test]
    fn labels_find_their_parts() {
        let it = blocking("zbisq,ziop->zbo", &[&[3, 2, 5, 4, 1], &[3, 5, 7, 2]], 1);
        let parts = [&it.batch, &it.m, &it.n, &it.k, &it.sum_a, &it.sum_b].map(|g| g.labels.iter().collect::<String>());
        assert_eq!(parts, ["z", "b", "o", "i", "s", "p"]);
    }

    #[test]
    fn tiles_are_even_and_stay_within_their_budget() {
        let group = |sizes: &[usize]| Group { labels: vec![], sizes: sizes.to_vec(), chunks: sizes.to_vec() };
        assert_eq!(group(&[9, 129]).limit(128, &[]).chunks, [1, 65]);
        assert_eq!(group(&[1000, 3]).limit(128, &[]).chunks, [42, 3]);
        assert_eq!(group(&[7, 5]).limit(128, &[]).chunks, [7, 5]);
        let outer_is_innermost_elsewhere = Group { labels: vec!['x', 'y'], ..group(&[300, 300]) };
        assert_eq!(outer_is_innermost_elsewhere.limit(128, &['x']).chunks, [11, 11]);
        for (text, shapes) in [
            ("bxi,xio->bxo", [&[64usize, 1056, 64][..], &[1056, 64, 64]]),
            ("ab,bc->ac", [&[5000, 3000], &[3000, 4000]]),
            ("ab,ab->ab", [&[5000, 3000], &[5000, 3000]]),
            ("bix,iox->box", [&[64, 64, 1056], &[64, 64, 1056]]),
        ] {
            for lanes in [1, 2] {
                let it = blocking(text, &shapes, lanes);
                assert!(it.scratch_len() <= 3 * TASK_SCALARS, "{text} {lanes}: {}", it.scratch_len());
                let n_tasks = it.batch.n_chunks() * it.m.n_chunks() * it.n.n_chunks();
                assert!(n_tasks >= MIN_TASKS, "{text} {lanes}: {n_tasks} tasks");
            }
        }
    }
}
