//! The two element types that data can have in memory.

use ndarray_npy::WritableElement;

/// `f32` or `f64`. Closed: other types do not implement it.
pub trait Real: sealed::Sealed + WritableElement + Copy + Send + Sync + 'static {
    /// From an f32; exact.
    fn from_f32(value: f32) -> Self;
    /// From an f64, rounded to nearest; what f32 cannot hold becomes infinite.
    fn from_f64(value: f64) -> Self;
    /// From an integer, rounded to nearest.
    fn from_i64(value: i64) -> Self;
    /// From an integer, rounded to nearest.
    fn from_u64(value: u64) -> Self;
    /// To an f64; exact.
    fn to_f64(self) -> f64;
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for f64 {}
}

impl Real for f32 {
    fn from_f32(value: f32) -> Self {
        value
    }
    fn from_f64(value: f64) -> Self {
        value as f32
    }
    fn from_i64(value: i64) -> Self {
        value as f32
    }
    fn from_u64(value: u64) -> Self {
        value as f32
    }
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
}

impl Real for f64 {
    fn from_f32(value: f32) -> Self {
        f64::from(value)
    }
    fn from_f64(value: f64) -> Self {
        value
    }
    fn from_i64(value: i64) -> Self {
        value as f64
    }
    fn from_u64(value: u64) -> Self {
        value as f64
    }
    fn to_f64(self) -> f64 {
        self
    }
}
