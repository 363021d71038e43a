//! Samples that stay with the host and go to a GPU batch by batch.

use crate::job::{FieldShape, JobError};
use halfmode_precision::{DType, Precision};
use halfmode_tensor::{Device, Purpose, Tensor};
use ndarray::ArrayD;

/// The inputs or the outputs of a set of samples, in f32.
#[derive(Debug)]
pub(crate) struct HostFields {
    device: Device,
    n: usize,
    /// Of one sample.
    extents: Vec<usize>,
    dtype: DType,
    /// Empty on the planning device.
    values: Vec<f32>,
}

impl HostFields {
    pub(crate) fn new(device: &Device, shape: &FieldShape, channels: usize, array: Option<ArrayD<f32>>) -> Self {
        let values = array.map(|array| match array.is_standard_layout() {
            true => array.into_raw_vec_and_offset().0,
            false => array.iter().copied().collect(),
        });
        HostFields {
            device: device.clone(),
            n: shape.n,
            extents: [&[channels][..], &shape.grid].concat(),
            dtype: shape.dtype(Precision::F32),
            values: values.unwrap_or_default(),
        }
    }

    /// Scalars of one sample.
    pub(crate) fn len(&self) -> usize {
        self.extents.iter().product::<usize>() * self.dtype.domain.scalars()
    }

    /// A tensor for `n` samples, not written yet.
    pub(crate) fn unwritten(&self, n: usize) -> Result<Tensor, JobError> {
        Ok(self.device.alloc_unwritten([&[n][..], &self.extents].concat(), self.dtype, Purpose::Data)?)
    }

    /// The samples of these indices on the device.
    pub(crate) fn batch(&self, indices: &[usize]) -> Result<Tensor, JobError> {
        let mut batch = self.unwritten(indices.len())?;
        if self.device.launches() {
            batch.copy_from_slice(&self.values(indices)?)?;
        }
        Ok(batch)
    }

    /// The samples of these indices, one after another.
    pub(crate) fn values(&self, indices: &[usize]) -> Result<Vec<f32>, JobError> {
        self.check(indices)?;
        let mut values = vec![0.0; indices.len() * self.len()];
        self.write(indices, &mut values);
        Ok(values)
    }

    /// Refuses indices of samples that are not there.
    pub(crate) fn check(&self, indices: &[usize]) -> Result<(), JobError> {
        match indices.iter().find(|&&index| index >= self.n) {
            Some(&index) => Err(halfmode_tensor::Error::Index { op: "a batch", index, n: self.n }.into()),
            None => Ok(()),
        }
    }

    /// Writes samples that are there to `to`, one after another.
    pub(crate) fn write(&self, indices: &[usize], to: &mut [f32]) {
        let len = self.len();
        for (to, &index) in to.chunks_exact_mut(len.max(1)).zip(indices) {
            to.copy_from_slice(&self.values[index * len..(index + 1) * len]);
        }
    }
}
