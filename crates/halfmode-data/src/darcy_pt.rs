//! The Darcy data that neuraloperator ships, in its own files.

use std::path::{Path, PathBuf};

use ndarray::{Axis, Slice};

use crate::dataset::FieldPairs;
use crate::error::{Error, Result};
use crate::torch_file::TorchFile;

/// Which of the files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// `darcy_train_N.pt`.
    Train,
    /// `darcy_test_N.pt`.
    Test,
}

/// One file of neuraloperator's Darcy data: `folder/darcy_train_16.pt` and the like, with tensors `x`, the
/// coefficient, and `y`, the pressure, both `[samples, resolution, resolution]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DarcyPt {
    path: PathBuf,
    resolution: usize,
}

impl DarcyPt {
    /// The file of a split and a resolution (points per axis), which need not exist.
    #[must_use]
    pub fn new(folder: &Path, split: Split, resolution: usize) -> Self {
        let split = match split {
            Split::Train => "train",
            Split::Test => "test",
        };
        DarcyPt { path: folder.join(format!("darcy_{split}_{resolution}.pt")), resolution }
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How many samples there are, from the file's description alone.
    ///
    /// # Errors
    /// [`Error::Io`] with the file that is missing, [`Error::Torch`], [`Error::MissingKey`],
    /// [`Error::UnsupportedType`], [`Error::TorchShape`], [`Error::SampleCount`].
    pub fn n_samples(&self) -> Result<usize> {
        self.count(&self.open()?)
    }

    /// The first `n` samples, or all if there are fewer: as neuraloperator's loader takes them.
    ///
    /// # Shapes
    /// - returns `x` and `y`, `[n, 1, resolution, resolution]`
    ///
    /// # Errors
    /// As [`Self::n_samples`], [`Error::Truncated`], and those of [`FieldPairs::new`].
    pub fn read(&self, n: usize) -> Result<FieldPairs> {
        let mut file = self.open()?;
        let n = self.count(&file)?.min(n);
        let mut first = |key: &str| -> Result<_> {
            let mut array = file.read::<f32>(key)?;
            array.slice_axis_inplace(Axis(0), Slice::from(..n));
            Ok(array.insert_axis(Axis(1)))
        };
        FieldPairs::new(first("x")?, first("y")?)
    }

    fn open(&self) -> Result<TorchFile> {
        let other = || Error::Torch { path: self.path.clone(), reason: "it is an archive of another kind".to_owned() };
        TorchFile::open(&self.path)?.ok_or_else(other)
    }

    fn count(&self, file: &TorchFile) -> Result<usize> {
        let n = self.resolution;
        let samples = |key: &str| {
            let found = file.info(key)?.shape;
            match found[..] {
                [samples, rows, columns] if samples > 0 && rows == n && columns == n => Ok(samples),
                _ => Err(Error::TorchShape {
                    path: self.path.clone(),
                    key: key.to_owned(),
                    found,
                    expected: format!("[samples, {n}, {n}]"),
                }),
            }
        };
        let (x, y) = (samples("x")?, samples("y")?);
        if x == y { Ok(x) } else { Err(Error::SampleCount { x, y }) }
    }
}
