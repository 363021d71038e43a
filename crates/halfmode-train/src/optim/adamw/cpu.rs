//! AdamW on the CPU: one pass of all threads over memory.

use super::{Rule, Update};
use crate::Result;
use crate::accumulator::{Accumulator, TILE};
use halfmode_precision::Precision;
use halfmode_tensor::{Device, Scratch, View, ViewMut, with_real};
use rayon::prelude::*;

pub(super) fn update(device: &Device, update: Update<'_>) -> Result<()> {
    let Update { rule, stride, grad, moments, exact, copy } = update;
    let pass = Pass { rule, stride, device: device.clone() };
    let formats = [grad.precision(), moments.m.precision(), moments.v.precision(), exact.precision()];
    let precision = formats.into_iter().fold(Precision::F32, Ord::min);
    let in_place = formats.iter().all(|&format| format == precision);
    let scratch = (!in_place).then(|| device.scratch(4 * pass.tile(), precision.bytes()));
    if !device.launches() {
        return Ok(());
    }
    let (grad, m, v) = (grad.view()?, moments.m.view_mut()?, moments.v.view_mut()?);
    let exact = exact.view_mut()?;
    let copy = copy.map(|copy| copy.view_mut()).transpose()?;
    with_real!(precision, R => pass.run::<R>(grad, m, v, exact, copy, scratch.as_ref()));
    Ok(())
}

/// How one parameter is gone through.
struct Pass {
    rule: Rule<f64>,
    stride: Option<usize>,
    device: Device,
}

/// What one task works on.
struct Tile<'a> {
    grad: View<'a>,
    m: ViewMut<'a>,
    v: ViewMut<'a>,
    exact: ViewMut<'a>,
    copy: Option<ViewMut<'a>>,
}

impl Pass {
    /// Scalars of one task: whole rows where real and imaginary parts share a second moment.
    fn tile(&self) -> usize {
        let row = self.stride.map_or(1, |stride| 2 * stride).max(1);
        (TILE / row).max(1) * row
    }

    fn run<R: Accumulator>(
        &self,
        grad: View<'_>,
        m: ViewMut<'_>,
        v: ViewMut<'_>,
        exact: ViewMut<'_>,
        copy: Option<ViewMut<'_>>,
        scratch: Option<&Scratch>,
    ) {
        let (len, n) = (self.tile(), grad.len());
        let v_len = if self.stride.is_some() { len / 2 } else { len };
        let mut copies = copy.map(|copy| copy.chunks(len).into_iter());
        let parts = m.chunks(len).into_iter().zip(v.chunks(v_len)).zip(exact.chunks(len));
        let tiles = parts.enumerate().map(|(idx, ((m, v), exact))| {
            let grad = grad.slice(idx * len..((idx + 1) * len).min(n));
            Tile { grad, m, v, exact, copy: copies.as_mut().and_then(Iterator::next) }
        });
        let mut tiles: Vec<Tile<'_>> = tiles.collect();
        let rule = self.rule.rounded::<R>();
        let work = |tile: &mut Tile<'_>| self.tile_pass(&rule, tile, scratch);
        // A bias is not worth waking a pool for.
        if let [tile] = &mut tiles[..] {
            work(tile);
        } else {
            self.device.run(|| tiles.par_iter_mut().for_each(work));
        }
    }

    fn tile_pass<R: Accumulator>(&self, rule: &Rule<R>, tile: &mut Tile<'_>, scratch: Option<&Scratch>) {
        let update = |g: &[R], m: &mut [R], v: &mut [R], p: &mut [R]| match self.stride {
            Some(stride) => rule.complex(stride, g, m, v, p),
            None => rule.real(g, m, v, p),
        };
        let Tile { grad, m, v, exact, copy } = tile;
        let views = (R::stored(*grad), R::stored_mut(m), R::stored_mut(v), R::stored_mut(exact));
        if let (Some(g), Some(m), Some(v), Some(p)) = views {
            update(g, m, v, p);
            if let Some(copy) = copy {
                copy.narrow(p);
            }
        } else if let Some(scratch) = scratch {
            scratch.with(|buffer: &mut [R]| {
                let (n, n_v) = (grad.len(), v.len());
                let (wide_g, rest) = buffer.split_at_mut(n);
                let (wide_m, rest) = rest.split_at_mut(n);
                let (wide_v, rest) = rest.split_at_mut(n_v);
                let wide_p = &mut rest[..n];
                grad.widen(wide_g);
                m.as_view().widen(wide_m);
                v.as_view().widen(wide_v);
                exact.as_view().widen(wide_p);
                update(wide_g, wide_m, wide_v, wide_p);
                m.narrow(wide_m);
                v.narrow(wide_v);
                exact.narrow(wide_p);
                if let Some(copy) = copy {
                    // Of the weight as it was rounded, as a resumed run would make it.
                    exact.as_view().widen(wide_p);
                    copy.narrow(wide_p);
                }
            });
        }
    }
}
