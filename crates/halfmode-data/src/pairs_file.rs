//! Data sets as `.npz` files.

use std::path::Path;

use halfmode_precision::Domain;
use ndarray::{ArrayD, Axis};

use crate::dataset::{FieldPairs, field_extents};
use crate::error::{Error, Result};
use crate::npy_header::ArrayInfo;
use crate::npz::NpzFile;
use crate::numpy::{NpzArray, write_npz};

/// Where a file keeps its channels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum ChannelLayout {
    /// `[n, channels, n_1, …, n_d]`.
    #[default]
    ChannelsFirst,
    /// `[n, n_1, …, n_d, channels]`.
    ChannelsLast,
    /// `[n, n_1, …, n_d]`; one channel.
    NoChannels,
}

impl ChannelLayout {
    fn describe(self) -> (usize, &'static str) {
        match self {
            Self::ChannelsFirst => (3, "samples, channels, grid"),
            Self::ChannelsLast => (3, "samples, grid, channels"),
            Self::NoChannels => (2, "samples, grid"),
        }
    }

    /// Samples, channels and grid of a stored array that is read as `domain` fields.
    ///
    /// # Errors
    /// [`Error::Domain`] for a complex array of real fields, and for an array of complex ones that is neither
    /// complex nor has a last axis of 2; [`Error::Rank`].
    pub fn extents(self, key: &str, info: &ArrayInfo, domain: Domain) -> Result<(usize, usize, Vec<usize>)> {
        let extents = field_extents(key, &info.shape, info.domain, domain)?;
        let (expected, layout) = self.describe();
        match (self, extents) {
            (Self::ChannelsFirst, [n, channels, grid @ .., last]) => Ok((*n, *channels, [grid, &[*last]].concat())),
            (Self::ChannelsLast, [n, first, grid @ .., channels]) => Ok((*n, *channels, [&[*first], grid].concat())),
            (Self::NoChannels, [n, first, grid @ ..]) => Ok((*n, 1, [&[*first], grid].concat())),
            _ => Err(Error::Rank { array: key.to_owned(), expected, layout, shape: info.shape.clone() }),
        }
    }

    /// Moves an array of the right rank to channels first.
    fn to_channels_first(self, array: ArrayD<f32>, domain: Domain) -> ArrayD<f32> {
        match self {
            Self::ChannelsFirst => array,
            Self::ChannelsLast => {
                let last = array.ndim() - domain.scalars();
                let axes: Vec<usize> = [0, last].into_iter().chain(1..last).chain(last + 1..array.ndim()).collect();
                array.permuted_axes(axes)
            }
            Self::NoChannels => array.insert_axis(Axis(1)),
        }
    }
}

/// Reads inputs and outputs from one `.npz` file.
///
/// # Shapes
/// - the arrays `input_key` and `output_key` as `layout` says; of complex fields, they are complex or have a last
///   axis of 2, real and imaginary part
/// - returns channels first, f32
///
/// # Errors
/// [`Error::Io`], [`Error::Archive`], [`Error::MissingKey`], [`Error::UnsupportedType`],
/// [`Error::Truncated`], [`Error::NpyHeader`], those of [`ChannelLayout::extents`] and of [`FieldPairs::new`].
pub fn read_pairs(
    path: &Path,
    input_key: &str,
    output_key: &str,
    layout: ChannelLayout,
    domain: Domain,
) -> Result<FieldPairs> {
    let mut file = NpzFile::open(path)?;
    let mut read = |key: &str| {
        layout.extents(key, &file.info(key)?, domain)?;
        Ok(layout.to_channels_first(file.read::<f32>(key)?, domain))
    };
    FieldPairs::of(domain, read(input_key)?, read(output_key)?)
}

/// Writes a data set to an `.npz` file as arrays `x` and `y`, channels first, atomically.
///
/// # Errors
/// [`Error::Io`]; an existing file is then unchanged.
pub fn write_pairs(path: &Path, pairs: &FieldPairs) -> Result<()> {
    write_npz(path, &[("x", NpzArray::F32(pairs.x().view())), ("y", NpzArray::F32(pairs.y().view()))])
}
