//! What can go wrong in training.

use halfmode_tensor::Shape;
use std::io;
use std::path::{Path, PathBuf};

/// What can go wrong in training.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor operation failed.
    #[error(transparent)]
    Tensor(#[from] halfmode_tensor::Error),
    /// The tape or an op on it failed.
    #[error(transparent)]
    Autograd(#[from] halfmode_autograd::Error),
    /// Two shapes that should agree do not.
    #[error("{op}: expected shape {expected} for `{operand}`, found {found}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// The operand that does not fit.
        operand: &'static str,
        /// What it needs.
        expected: Shape,
        /// What it got.
        found: Shape,
    },
    /// Fields that are not `[batch, channels, n_1, …, n_d]` with at least one point each.
    #[error("{op}: needs shape [batch, channels, n_1, …, n_d] without empty axes, found {found}")]
    Fields {
        /// The operation.
        op: &'static str,
        /// What it got.
        found: Shape,
    },
    /// Per-axis settings that do not match the number of grid axes.
    #[error("{op}: {found} axes are said to be periodic or not, but the grid has {expected}")]
    Axes {
        /// The operation.
        op: &'static str,
        /// Axes of the grid.
        expected: usize,
        /// Axes of the setting.
        found: usize,
    },
    /// An axis that is not periodic and too short for a one-sided difference.
    #[error("{op}: axis {axis} of the grid has {n} points, but an axis that is not periodic needs 4")]
    ShortAxis {
        /// The operation.
        op: &'static str,
        /// The grid axis, from 0.
        axis: usize,
        /// Its points.
        n: usize,
    },
    /// Flat data whose length does not fit its shape.
    #[error("{op}: expected {expected} values in `{operand}`, found {found}")]
    Length {
        /// The operation.
        op: &'static str,
        /// The operand that does not fit.
        operand: &'static str,
        /// Values it needs.
        expected: usize,
        /// Values it got.
        found: usize,
    },
    /// A label that names no class.
    #[error("{op}: label {label} of sample {sample} is no class: there are {n_classes}, counted from 0")]
    Label {
        /// The operation.
        op: &'static str,
        /// The sample, from 0.
        sample: usize,
        /// What it is said to be.
        label: usize,
        /// Classes that there are.
        n_classes: usize,
    },
    /// A setting outside its range.
    #[error("{setting} = {value} is not {expected}")]
    Setting {
        /// Its name.
        setting: &'static str,
        /// What was given.
        value: f64,
        /// What is legal, in words.
        expected: &'static str,
    },
    /// An optimiser that was made for other parameters.
    #[error("the optimiser holds the state of {expected} parameters, but {found} {what} were given")]
    Parameters {
        /// What was counted: parameters or gradients.
        what: &'static str,
        /// Parameters it was made for.
        expected: usize,
        /// What was given.
        found: usize,
    },
    /// A schedule that follows a metric was stepped without one.
    #[error("the plateau schedule follows a metric, but the epoch ended without one")]
    NoMetric,
    /// The file system refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The disk, or the share of it that the user may fill, is full, or a limit on the size of files is reached.
    #[error("cannot write {}: no space left ({source}); what was there before is untouched", path.display())]
    DiskFull {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The user may not write there.
    #[error("cannot write {}: {source}; choose another folder or change its permissions", path.display())]
    NotWritable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file that is not what its format says.
    #[error("{} is not a readable safetensors file: {reason}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: Corruption,
    },
    /// A tensor whose numbers cannot be read as real or complex floats.
    #[error("{}: tensor `{name}` is of type {dtype}; readable are F64, F32, BF16, F16 and C64", path.display())]
    DType {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// Its type in the file.
        dtype: safetensors::Dtype,
    },
    /// A tensor that must be there is not.
    #[error("the checkpoint has no tensor `{name}`")]
    MissingTensor {
        /// Its name.
        name: String,
    },
    /// A tensor that no parameter has: the file is another model's.
    #[error("the checkpoint has a tensor `{name}` that the model does not have")]
    UnknownTensor {
        /// Its name.
        name: String,
    },
    /// A tensor of another shape than what it is for.
    #[error("tensor `{name}` has shape {found}, expected {expected}")]
    TensorShape {
        /// Its name.
        name: String,
        /// What is needed.
        expected: Shape,
        /// What the file has.
        found: Shape,
    },
    /// A name that a file cannot hold: used twice, or reserved.
    #[error("tensor name `{name}` is used twice or reserved")]
    TensorName {
        /// The name.
        name: String,
    },
    /// Something could not be written as JSON.
    #[error("cannot write {what} as JSON: {source}")]
    ToJson {
        /// What was to be written.
        what: &'static str,
        /// Why not.
        source: serde_json::Error,
    },
    /// A record of metrics that is not a JSON object.
    #[error("a record of metrics must be an object, found {found}")]
    NotAnObject {
        /// What it is instead.
        found: &'static str,
    },
    /// A line of a metrics file that is not a JSON object.
    #[error("{}:{line}: {source}", path.display())]
    MetricsLine {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

/// What is wrong with a safetensors file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Corruption {
    /// Not even the header's length is there.
    #[error("it has {bytes} bytes, fewer than any header")]
    TooShort {
        /// Bytes of the file.
        bytes: u64,
    },
    /// The header does not fit the file, or is longer than any honest one.
    #[error("its header claims {header_bytes} bytes, but the file has {file_bytes} and a header at most {limit}")]
    HeaderLength {
        /// Length that the file claims.
        header_bytes: u64,
        /// Bytes of the whole file.
        file_bytes: u64,
        /// Bytes that a header may have.
        limit: u64,
    },
    /// The header does not describe tensors.
    #[error("its header cannot be read: {0}")]
    Header(serde_json::Error),
    /// The file is shorter or longer than its header says.
    #[error("its tensors fill {expected} bytes, but {found} are there")]
    DataLength {
        /// Bytes that the header describes.
        expected: u64,
        /// Bytes after the header.
        found: u64,
    },
    /// Metadata or scalars are not those that were written.
    #[error("its contents do not match their checksum")]
    Checksum,
    /// The metadata of this library is not JSON.
    #[error("its `halfmode` metadata cannot be read: {0}")]
    Metadata(serde_json::Error),
    /// A tensor is larger than the memory.
    #[error("tensor `{name}` has {bytes} bytes, more than there is memory for")]
    TooLarge {
        /// The tensor.
        name: String,
        /// Its bytes.
        bytes: usize,
    },
}

impl Error {
    /// The error as an op reports it to the tape.
    #[must_use]
    pub(crate) fn in_op(self, op: &'static str) -> halfmode_autograd::Error {
        match self {
            Error::Tensor(err) => err.into(),
            Error::Autograd(err) => err,
            other => halfmode_autograd::Error::Op { op, source: Box::new(other) },
        }
    }

    /// A failure of the file system while writing, by its kind.
    pub(crate) fn write(path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
                Error::DiskFull { path, source }
            }
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => Error::NotWritable { path, source },
            _ => Error::Io { action: "write", path, source },
        }
    }

    pub(crate) fn read(path: &Path, source: io::Error) -> Self {
        Error::Io { action: "read", path: path.to_owned(), source }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_of_writing_are_told_apart() {
        let of = |kind: io::ErrorKind| Error::write(Path::new("run/latest"), kind.into());
        assert!(matches!(of(io::ErrorKind::StorageFull), Error::DiskFull { .. }));
        assert!(matches!(of(io::ErrorKind::QuotaExceeded), Error::DiskFull { .. }));
        assert!(matches!(of(io::ErrorKind::FileTooLarge), Error::DiskFull { .. }));
        assert!(matches!(of(io::ErrorKind::PermissionDenied), Error::NotWritable { .. }));
        assert!(matches!(of(io::ErrorKind::ReadOnlyFilesystem), Error::NotWritable { .. }));
        assert!(matches!(of(io::ErrorKind::NotFound), Error::Io { .. }));
        assert!(of(io::ErrorKind::StorageFull).to_string().contains("run/latest: no space left"));
    }
}
