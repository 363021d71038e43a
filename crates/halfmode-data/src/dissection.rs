//! Nested dissection of a square grid: the elimination order of the sparse Cholesky factorisation.

/// Elimination order of the cells of an `n × n` grid with nearest neighbours.
///
/// A rectangle is cut by a line of cells. The two parts come first, each in its own order, the
/// line comes last. The factor then has O(n² log n) entries and costs O(n³) operations, the best
/// orders there are for this graph (natural order: n³ and n⁴).
///
/// Returns, for every position in the order, the cell `row · n + column`.
pub(crate) fn nested_dissection(n: usize, leaf: usize) -> Vec<usize> {
    let mut order = Vec::with_capacity(n * n);
    let whole = Rectangle { rows: (0, n), columns: (0, n) };
    whole.dissect(n, leaf, &mut order);
    order
}

/// Half-open ranges of rows and columns.
#[derive(Clone, Copy)]
struct Rectangle {
    rows: (usize, usize),
    columns: (usize, usize),
}

impl Rectangle {
    /// The depth of the recursion is the logarithm of the number of cells.
    fn dissect(self, n: usize, leaf: usize, order: &mut Vec<usize>) {
        let height = self.rows.1 - self.rows.0;
        let width = self.columns.1 - self.columns.0;
        if height * width <= leaf || height.max(width) < 3 {
            self.push(n, order);
        } else if height >= width {
            let cut = self.rows.0 + height / 2;
            let rows = |from, to| Self { rows: (from, to), ..self };
            rows(self.rows.0, cut).dissect(n, leaf, order);
            rows(cut + 1, self.rows.1).dissect(n, leaf, order);
            rows(cut, cut + 1).push(n, order);
        } else {
            let cut = self.columns.0 + width / 2;
            let columns = |from, to| Self { columns: (from, to), ..self };
            columns(self.columns.0, cut).dissect(n, leaf, order);
            columns(cut + 1, self.columns.1).dissect(n, leaf, order);
            columns(cut, cut + 1).push(n, order);
        }
    }

    fn push(self, n: usize, order: &mut Vec<usize>) {
        for row in self.rows.0..self.rows.1 {
            order.extend((self.columns.0..self.columns.1).map(|column| row * n + column));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cell_comes_once() {
        for n in 0..20 {
            for leaf in [1, 4, 16] {
                let mut order = nested_dissection(n, leaf);
                order.sort_unstable();
                assert_eq!(order, (0..n * n).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn the_middle_line_comes_last() {
        let order = nested_dissection(7, 1);
        let mut last: Vec<_> = order[42..].to_vec();
        last.sort_unstable();
        assert_eq!(last, (21..28).collect::<Vec<_>>());
    }
}
