//! Parts of a field on a GPU: cropping and picking, and their adjoints.

use crate::Result;
use halfmode_tensor::cuda::{Arg, Source, count, define};
use halfmode_tensor::{Device, Tensor};

/// Kernels that copy to other places and grids.
pub(crate) const RESIZE: Source = Source { name: "resize", text: include_str!("../kernels/resize.cu") };

/// Extents of up to three axes; absent ones come first.
///
/// # Errors
/// [`halfmode_tensor::Error::OnGpu`] for more axes.
pub(crate) fn three_axes(extents: &[usize], absent: usize) -> Result<[usize; 3]> {
    let mut all = [absent; 3];
    let first = all.len().checked_sub(extents.len()).ok_or(halfmode_tensor::Error::OnGpu)?;
    all[first..].copy_from_slice(extents);
    Ok(all)
}

/// A box of `extents` from point `first` on inside a whole, both `[outer, extents…, inner]`.
pub(crate) struct Inside<'a> {
    pub(crate) whole: &'a [usize],
    pub(crate) extents: &'a [usize],
    pub(crate) first: &'a [usize],
    pub(crate) inner: usize,
}

impl Inside<'_> {
    /// The box of a whole.
    pub(crate) fn take(&self, device: &Device, whole: &Tensor, part: &mut Tensor) -> Result<()> {
        self.run(device, "take_box", whole, part)
    }

    /// A whole that is the box, and zero around it.
    pub(crate) fn put(&self, device: &Device, part: &Tensor, whole: &mut Tensor) -> Result<()> {
        self.run(device, "put_box", part, whole)
    }

    fn run(&self, device: &Device, entry: &str, x: &Tensor, y: &mut Tensor) -> Result<()> {
        let axes = [three_axes(self.whole, 1)?, three_axes(self.extents, 1)?, three_axes(self.first, 0)?];
        let n = y.numel();
        let Some(cuda) = device.as_cuda().filter(|_| n > 0) else { return Ok(()) };
        let defines = [define("S", x.precision()), define("T", y.precision())];
        let mut args = vec![x.input()?, y.output()?, count(n)];
        args.extend(axes.as_flattened().iter().map(|&n| Arg::I32(n as i32)));
        args.push(count(self.inner));
        Ok(cuda.launch(RESIZE, &defines, entry, cuda.grid(n), &args)?)
    }
}
