//! The one error type of the crate.

use halfmode_precision::Domain;
use std::path::PathBuf;

/// What can go wrong in this crate. Each message says what happened, where and why.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused a file operation.
    #[error("cannot {action} `{}`: {source}", path.display())]
    Io {
        /// What was tried: "open", "read", "write", …
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The bytes are not a readable `.npy` array.
    #[error("{origin}: not a readable .npy array: {reason}")]
    NpyHeader {
        /// The file, or `file[key]` inside an archive.
        origin: String,
        /// What is wrong with the header.
        reason: String,
    },
    /// The array has an element type that cannot be read as real numbers.
    #[error(
        "{origin}: arrays of dtype `{dtype}` are not supported (floats, integers, bool and complex numbers of numpy are)"
    )]
    UnsupportedType {
        /// The file, or `file[key]` inside an archive.
        origin: String,
        /// NumPy's name of the type, as it stands in the header.
        dtype: String,
    },
    /// The header promises more data than there is.
    #[error("{origin}: truncated: the header promises {expected} bytes of data, {found} are there")]
    Truncated {
        /// The file, or `file[key]` inside an archive.
        origin: String,
        /// Bytes that shape and dtype need.
        expected: u64,
        /// Bytes found.
        found: u64,
    },
    /// A file of labelled images is damaged or of another kind.
    #[error("`{}` holds no labelled images that can be read: {reason}", path.display())]
    Images {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The `.npz` archive itself is damaged or of a kind that is not supported.
    #[error("`{}` is not a readable .npz archive: {reason}", path.display())]
    Archive {
        /// The archive.
        path: PathBuf,
        /// What the zip layer says.
        reason: String,
    },
    /// The file is not one that `torch.save` wrote, or has something that cannot be read.
    #[error("`{}` is not a readable torch file: {reason}", path.display())]
    Torch {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The file is not HDF5 that can be read, or a data set in it cannot be.
    #[error("`{}` is not a readable HDF5 file: {reason}", path.display())]
    Hdf5 {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A tensor of a torch file does not have the shape that such files have.
    #[error("`{}`: tensor `{key}` has shape {found:?}, expected {expected}", path.display())]
    TorchShape {
        /// The file.
        path: PathBuf,
        /// The tensor.
        key: String,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that fits, in words.
        expected: String,
    },
    /// The archive has no array of that name.
    #[error("`{}` has no array `{key}`; it has: {}", path.display(), list(found))]
    MissingKey {
        /// The archive.
        path: PathBuf,
        /// The name that was asked for.
        key: String,
        /// The names that exist.
        found: Vec<String>,
    },
    /// An array has too few axes.
    #[error("`{array}`: expected at least {expected} axes ({layout}), found shape {shape:?}")]
    Rank {
        /// Which array.
        array: String,
        /// The smallest rank that fits.
        expected: usize,
        /// What the axes should mean.
        layout: &'static str,
        /// The shape found.
        shape: Vec<usize>,
    },
    /// An axis has no elements.
    #[error("`{array}` is empty: shape {shape:?}")]
    Empty {
        /// Which array.
        array: String,
        /// The shape found.
        shape: Vec<usize>,
    },
    /// Inputs and outputs do not have the same number of samples.
    #[error("input and output differ in the number of samples (axis 0): {x} and {y}")]
    SampleCount {
        /// Samples in the input.
        x: usize,
        /// Samples in the output.
        y: usize,
    },
    /// Inputs and outputs do not live on the same grid.
    #[error("input and output live on different grids: {x:?} and {y:?}")]
    Grid {
        /// Grid of the input.
        x: Vec<usize>,
        /// Grid of the output.
        y: Vec<usize>,
    },
    /// An array holds a NaN or an infinity.
    #[error("`{array}` holds {value} at index {index:?}; every value must be finite")]
    NonFinite {
        /// Which array.
        array: String,
        /// Index of the first such value.
        index: Vec<usize>,
        /// The value.
        value: f64,
    },
    /// A sample number is too large.
    #[error("sample {index} was asked for, but there are {len}")]
    SampleIndex {
        /// The number asked for.
        index: usize,
        /// The number of samples.
        len: usize,
    },
    /// A generator's setting is out of range.
    #[error("{generator}: `{field}` is {value}, but must be {expected}")]
    Config {
        /// Which generator.
        generator: &'static str,
        /// Which setting.
        field: &'static str,
        /// Its value.
        value: String,
        /// What would be accepted.
        expected: String,
    },
    /// A buffer does not have the length of the grid.
    #[error("{operand}: expected {expected} values, found {found}")]
    Length {
        /// Which buffer.
        operand: &'static str,
        /// Values needed.
        expected: usize,
        /// Values given.
        found: usize,
    },
    /// A coefficient is not a positive finite number.
    #[error("coefficient in cell [{row}, {column}] is {value}; it must be positive and finite")]
    Coefficient {
        /// First index of the cell.
        row: usize,
        /// Second index of the cell.
        column: usize,
        /// The value.
        value: f64,
    },
    /// The Cholesky factorisation met a pivot that is not positive.
    #[error(
        "the {n}x{n} Darcy matrix is not positive definite in f64 (pivot {pivot}); \
         the coefficients differ by too many orders of magnitude"
    )]
    NotPositiveDefinite {
        /// Cells per side.
        n: usize,
        /// Index of the pivot in elimination order.
        pivot: usize,
    },
    /// A flow needs more waves or steps than a solver has.
    #[error(
        "{problem}: the flow is not resolved by {n} points per axis and {steps} steps; \
         use a larger viscosity or a shorter time"
    )]
    Unresolved {
        /// Which problem.
        problem: &'static str,
        /// Points per axis of the finest grid.
        n: usize,
        /// Time steps of the last try.
        steps: usize,
    },
    /// Memory could not be reserved.
    #[error("not enough memory for {purpose}: {bytes} bytes")]
    OutOfMemory {
        /// What it was for.
        purpose: &'static str,
        /// Bytes asked for; 0 if the library does not say.
        bytes: usize,
    },
    /// The worker threads could not be started.
    #[error("cannot start {threads} worker threads: {reason}")]
    Threads {
        /// How many were asked for.
        threads: usize,
        /// The system's answer.
        reason: String,
    },
    /// Complex numbers where fields are real, or the reverse.
    #[error("`{array}` of shape {shape:?} {}", domain_fault(*domain))]
    Domain {
        /// Which array.
        array: String,
        /// Its shape; of complex numbers with their axis of 2.
        shape: Vec<usize>,
        /// What the fields are.
        domain: Domain,
    },
    /// A normaliser was given an array of another shape.
    #[error("the normaliser has statistics of shape {statistics:?}, which do not fit {found:?}")]
    NormaliserShape {
        /// Shape of mean and standard deviation (1 on reduced axes).
        statistics: Vec<usize>,
        /// Shape of the array.
        found: Vec<usize>,
    },
    /// Axes to reduce over are out of range or repeated.
    #[error("cannot reduce over axes {dims:?} of an array with {rank} axes")]
    NormaliserDims {
        /// The axes.
        dims: Vec<usize>,
        /// Number of axes of the array.
        rank: usize,
    },
    /// An unbiased standard deviation needs at least two values.
    #[error("a standard deviation needs at least 2 values per statistic, found {found}")]
    TooFewValues {
        /// Values per statistic.
        found: u64,
    },
    /// Stored statistics contradict themselves.
    #[error("stored normaliser: {reason}")]
    NormaliserState {
        /// What is wrong.
        reason: String,
    },
    /// A value could not be written as JSON.
    #[error("cannot write {purpose} as JSON: {source}")]
    Json {
        /// What was written.
        purpose: &'static str,
        /// The reason.
        source: serde_json::Error,
    },
}

/// The result type of the crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

fn domain_fault(domain: Domain) -> &'static str {
    match domain {
        Domain::Real => "holds complex numbers, but the model is of real fields: set model.complex_data = true",
        Domain::Complex => {
            "holds real numbers and has no last axis of 2 (real and imaginary part), but the model is of complex \
             fields: set model.complex_data = false"
        }
    }
}

fn list(names: &[String]) -> String {
    if names.is_empty() {
        return "no arrays at all".to_owned();
    }
    let mut text = names.iter().take(16).map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
    if names.len() > 16 {
        text.push_str(&format!(" and {} more", names.len() - 16));
    }
    text
}
