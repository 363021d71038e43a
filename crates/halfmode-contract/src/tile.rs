//! Copies between strided boxes of stored scalars and tiles of accumulators.

use halfmode_tensor::{Real, View};

/// Stored scalars that are widened at once.
const STAGE: usize = 512;

/// One axis of a box: how many entries, and how far apart they are on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Axis {
    pub(crate) len: usize,
    /// Distance in the stored tensor.
    pub(crate) src: usize,
    /// Distance in the tile; 0 for an axis that is summed.
    pub(crate) dst: usize,
}

/// Whether a box overwrites the tile or is added to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fill {
    Replace,
    Add,
}

/// Widens the box of `src` at `base` into `dst`. Axes with `dst == 0` need [`Fill::Add`].
pub(crate) fn gather<R: Real>(src: View<'_>, base: usize, axes: &[Axis], dst: &mut [R], fill: Fill) {
    if axes.iter().any(|axis| axis.len == 0) {
        return;
    }
    let mut axes: Vec<Axis> = axes.iter().copied().filter(|axis| axis.len > 1).collect();
    axes.sort_by_key(|axis| axis.src);
    fuse(&mut axes);
    let mut stage = [R::ZERO; STAGE];
    // A long run is cut, so that every run fits the stage.
    match axes.first().copied() {
        Some(Axis { len, src: 1, dst: step }) if len > STAGE => {
            for start in (0..len).step_by(STAGE) {
                axes[0].len = STAGE.min(len - start);
                Gather::new(src, &axes, fill).over(base + start, start * step, dst, &mut stage);
            }
        }
        _ => Gather::new(src, &axes, fill).over(base, 0, dst, &mut stage),
    }
}

/// Joins axes that are contiguous on both sides.
fn fuse(axes: &mut Vec<Axis>) {
    let mut fused: Vec<Axis> = Vec::with_capacity(axes.len());
    for &axis in axes.iter() {
        match fused.last_mut() {
            Some(inner) if axis.src == inner.src * inner.len && axis.dst == inner.dst * inner.len => {
                inner.len *= axis.len;
            }
            _ => fused.push(axis),
        }
    }
    *axes = fused;
}

struct Gather<'a> {
    src: View<'a>,
    /// Contiguous stored scalars that are widened at once.
    run: usize,
    /// Axes within a run, the longest first.
    staged: Vec<Axis>,
    /// Axes over runs, the closest first.
    outer: &'a [Axis],
    fill: Fill,
}

impl<'a> Gather<'a> {
    fn new(src: View<'a>, axes: &'a [Axis], fill: Fill) -> Self {
        let (mut run, mut n_staged) = (1, 0);
        while let Some(axis) = axes.get(n_staged).filter(|axis| axis.src == run && run * axis.len <= STAGE) {
            run *= axis.len;
            n_staged += 1;
        }
        let mut staged = axes[..n_staged].to_vec();
        staged.sort_by_key(|axis| std::cmp::Reverse(axis.len));
        Gather { src, run, staged, outer: &axes[n_staged..], fill }
    }

    fn over<R: Real>(&self, src: usize, at: usize, dst: &mut [R], stage: &mut [R; STAGE]) {
        self.within(self.outer, src, at, dst, &mut stage[..self.run]);
    }

    fn within<R: Real>(&self, outer: &[Axis], src: usize, at: usize, dst: &mut [R], stage: &mut [R]) {
        match outer.split_last() {
            Some((axis, rest)) => {
                for i in 0..axis.len {
                    self.within(rest, src + i * axis.src, at + i * axis.dst, dst, stage);
                }
            }
            None => self.one_run(src, at, dst, stage),
        }
    }

    fn one_run<R: Real>(&self, src: usize, at: usize, dst: &mut [R], stage: &mut [R]) {
        match (self.staged.as_slice(), self.fill) {
            ([], Fill::Replace) => dst[at] = R::from_f64(self.src.get(src)),
            ([], Fill::Add) => dst[at] += R::from_f64(self.src.get(src)),
            ([Axis { dst: 1, .. }], Fill::Replace) => {
                self.src.slice(src..src + self.run).widen(&mut dst[at..at + self.run]);
            }
            // Interleaved pairs into two rows.
            (&[Axis { len, src: 2, dst: 1 }, Axis { len: 2, src: 1, dst: apart }], Fill::Replace) if len <= apart => {
                self.src.slice(src..src + self.run).widen(stage);
                let (before, after) = dst.split_at_mut(at + apart);
                unzip(stage, &mut before[at..at + len], &mut after[..len]);
            }
            (staged, fill) => {
                self.src.slice(src..src + self.run).widen(stage);
                scatter(stage, 0, staged, dst, at, fill);
            }
        }
    }
}

/// Takes pairs apart.
fn unzip<R: Real>(pairs: &[R], first: &mut [R], second: &mut [R]) {
    R::vectorised(
        #[inline(always)]
        || {
            for ((pair, first), second) in pairs.as_chunks::<2>().0.iter().zip(first).zip(second) {
                *first = pair[0];
                *second = pair[1];
            }
        },
    );
}

/// Puts a widened run where it belongs; `axes` are innermost first.
fn scatter<R: Real>(stage: &[R], from: usize, axes: &[Axis], dst: &mut [R], at: usize, fill: Fill) {
    match axes.split_last() {
        None => {}
        Some((inner, [])) => {
            let values = stage[from..].iter().step_by(inner.src).take(inner.len);
            match (fill, inner.dst) {
                (_, 0) => values.for_each(|value| dst[at] += *value),
                (Fill::Replace, step) => {
                    dst[at..].iter_mut().step_by(step).zip(values).for_each(|(to, value)| *to = *value);
                }
                (Fill::Add, step) => {
                    dst[at..].iter_mut().step_by(step).zip(values).for_each(|(to, value)| *to += *value);
                }
            }
        }
        Some((outer, rest)) => {
            for i in 0..outer.len {
                scatter(stage, from + i * outer.src, rest, dst, at + i * outer.dst, fill);
            }
        }
    }
}

/// Reads a box of a tile in storage order: `axes` are (entries, distance), outermost first, and
/// `out` has as many values as the box.
pub(crate) fn pick<R: Real>(tile: &[R], base: usize, axes: &[(usize, usize)], out: &mut [R]) {
    match axes {
        [] => out[0] = tile[base],
        [(len, step)] => {
            let values = tile[base..].iter().step_by(*step).take(*len);
            out.iter_mut().zip(values).for_each(|(to, value)| *to = *value);
        }
        // Pairs of real and imaginary parts: a call per pair would cost more than the copy.
        [(len, step), (2, apart)] => {
            let parts = tile[base..].iter().step_by(*step).zip(tile[base + apart..].iter().step_by(*step)).take(*len);
            out.chunks_exact_mut(2).zip(parts).for_each(|(to, (re, im))| {
                to[0] = *re;
                to[1] = *im;
            });
        }
        [(len, step), rest @ ..] => {
            let piece = out.len() / (*len).max(1);
            for (i, out) in out.chunks_mut(piece.max(1)).enumerate() {
                pick(tile, base + i * step, rest, out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every copy agrees with plain nested loops.
    fn check(lens: [usize; 3], src: [usize; 3], dst: [usize; 3]) {
        let values: Vec<f32> = (0..20_000).map(|i| (i % 1009) as f32).collect();
        let axes: Vec<Axis> = (0..3).map(|i| Axis { len: lens[i], src: src[i], dst: dst[i] }).collect();
        for fill in [Fill::Replace, Fill::Add] {
            if fill == Fill::Replace && axes.iter().any(|axis| axis.dst == 0 && axis.len > 1) {
                continue;
            }
            let (mut got, mut want) = (vec![0.5f32; 20_000], vec![0.5f32; 20_000]);
            gather(View::F32(&values), 7, &axes, &mut got, fill);
            for i in 0..lens[0] {
                for j in 0..lens[1] {
                    for k in 0..lens[2] {
                        let to = &mut want[i * dst[0] + j * dst[1] + k * dst[2]];
                        let value = values[7 + i * src[0] + j * src[1] + k * src[2]];
                        *to = if fill == Fill::Replace { value } else { *to + value };
                    }
                }
            }
            assert_eq!(got, want, "{lens:?} {src:?} {dst:?} {fill:?}");
        }
    }

    #[test]
    fn boxes_arrive_where_they_belong() {
        check([3, 4, 5], [20, 5, 1], [20, 5, 1]);
        check([3, 4, 5], [20, 5, 1], [1, 3, 12]);
        check([3, 4, 2], [8, 2, 1], [8, 1, 4]);
        check([3, 4, 5], [400, 50, 7], [5, 15, 1]);
        check([2, 3, 1100], [3300, 1100, 1], [3300, 1, 3]);
        check([2, 3, 1100], [3300, 1100, 1], [1, 0, 2]);
        check([4, 3, 5], [15, 5, 1], [1, 0, 0]);
        check([4, 0, 5], [15, 5, 1], [1, 0, 0]);
    }

    #[test]
    fn tiles_are_read_in_any_order() {
        let tile: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let mut out = vec![0.0; 24];
        pick(&tile, 0, &[(4, 1), (3, 8), (2, 4)], &mut out);
        let want: Vec<f32> =
            (0..4).flat_map(|i| (0..3).flat_map(move |j| (0..2).map(move |k| (i + 8 * j + 4 * k) as f32))).collect();
        assert_eq!(out, want);
        let mut one = [0.0];
        pick(&tile, 5, &[], &mut one);
        assert!((one[0] - 5.0).abs() == 0.0);
    }
}
