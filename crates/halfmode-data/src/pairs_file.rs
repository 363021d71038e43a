//! Data sets as `.npz` files.

use std::path::Path;

use ndarray::{ArrayD, Axis};

use crate::dataset::FieldPairs;
use crate::error::{Error, Result};
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

    /// Moves an array to channels first.
    fn to_channels_first(self, key: &str, array: ArrayD<f32>) -> Result<ArrayD<f32>> {
        let (expected, layout) = self.describe();
        if array.ndim() < expected {
            return Err(Error::Rank { array: key.to_owned(), expected, layout, shape: array.shape().to_vec() });
        }
        Ok(match self {
            Self::ChannelsFirst => array,
            Self::ChannelsLast => {
                let last = array.ndim() - 1;
                let axes: Vec<usize> = [0, last].into_iter().chain(1..last).collect();
                array.permuted_axes(axes)
            }
            Self::NoChannels => array.insert_axis(Axis(1)),
        })
    }
}

/// Reads inputs and outputs from one `.npz` file.
///
/// # Shapes
/// - the arrays `input_key` and `output_key` as `layout` says
/// - returns channels first, f32
///
/// # Errors
/// [`Error::Io`], [`Error::Archive`], [`Error::MissingKey`], [`Error::UnsupportedType`],
/// [`Error::Truncated`], [`Error::NpyHeader`], and all errors of [`FieldPairs::new`].
pub fn read_pairs(path: &Path, input_key: &str, output_key: &str, layout: ChannelLayout) -> Result<FieldPairs> {
    let mut file = NpzFile::open(path)?;
    let x = layout.to_channels_first(input_key, file.read::<f32>(input_key)?)?;
    let y = layout.to_channels_first(output_key, file.read::<f32>(output_key)?)?;
    FieldPairs::new(x, y)
}

/// Writes a data set to an `.npz` file as arrays `x` and `y`, channels first, atomically.
///
/// # Errors
/// [`Error::Io`]; an existing file is then unchanged.
pub fn write_pairs(path: &Path, pairs: &FieldPairs) -> Result<()> {
    write_npz(path, &[("x", NpzArray::F32(pairs.x().view())), ("y", NpzArray::F32(pairs.y().view()))])
}
