//! What can go wrong in a job.

use std::path::PathBuf;

/// What can go wrong in a job, grouped by what the user can do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JobError {
    /// A value of the configuration cannot be used.
    #[error("{key}: {why}")]
    Config {
        /// The key, such as `train.batch_size`.
        key: String,
        /// What is wrong with it.
        why: String,
    },
    /// The model's configuration cannot be used.
    #[error(transparent)]
    Model(#[from] halfmode_operators::Error),
    /// The precision table cannot be used.
    #[error("precision: {0}")]
    Precision(#[from] halfmode_precision::Error),
    /// The data cannot be used.
    #[error(transparent)]
    Data(#[from] halfmode_data::Error),
    /// The data do not fit the model.
    #[error("{what} has shape {found:?}, the model needs {expected}")]
    DataShape {
        /// Which array.
        what: String,
        /// Its extents.
        found: Vec<usize>,
        /// What the model needs, in words.
        expected: String,
    },
    /// Training went out of the range of numbers.
    #[error("training diverged in epoch {epoch} after {step} steps: {why}")]
    Diverged {
        /// The epoch, from 1.
        epoch: u64,
        /// Optimiser steps done.
        step: u64,
        /// What was seen.
        why: String,
        /// The newest checkpoint, if there is one.
        checkpoint: Option<PathBuf>,
    },
    /// A run directory is in the way.
    #[error("{} is not empty", path.display())]
    OutNotEmpty {
        /// The directory.
        path: PathBuf,
    },
    /// Another process writes to the run directory.
    #[error("another process trains in {}", path.display())]
    OutInUse {
        /// The directory.
        path: PathBuf,
    },
    /// The checkpoint to go on from cannot be used.
    #[error("cannot go on from {}: {why}", path.display())]
    Resume {
        /// The checkpoint.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
        /// The newest other checkpoint of the run that can be used.
        older: Option<PathBuf>,
    },
    /// A model or checkpoint cannot be read or does not fit.
    #[error("{}: {why}", path.display())]
    ModelFile {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// Something in the training crate failed.
    #[error(transparent)]
    Train(#[from] crate::Error),
}

impl From<halfmode_tensor::Error> for JobError {
    fn from(err: halfmode_tensor::Error) -> Self {
        JobError::Train(err.into())
    }
}

impl From<halfmode_autograd::Error> for JobError {
    fn from(err: halfmode_autograd::Error) -> Self {
        JobError::Train(err.into())
    }
}

impl From<halfmode_nn::Error> for JobError {
    fn from(err: halfmode_nn::Error) -> Self {
        JobError::Train(err.in_op("model").into())
    }
}

#[cfg(feature = "cuda")]
impl From<halfmode_tensor::cuda::CudaError> for JobError {
    fn from(err: halfmode_tensor::cuda::CudaError) -> Self {
        halfmode_tensor::Error::from(err).into()
    }
}
