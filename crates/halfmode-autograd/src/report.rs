//! What the tape keeps alive, as a table.

use halfmode_precision::DType;
use halfmode_tensor::{Purpose, Shape};
use std::fmt;

/// One saved tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryRow {
    /// The op that saved it.
    pub op: &'static str,
    /// The name it was saved under.
    pub role: &'static str,
    /// Its extents.
    pub shape: Shape,
    /// Its type.
    pub dtype: DType,
    /// The bytes that live because of it: 0 when it is shared.
    pub bytes: usize,
    /// Whether its buffer lives anyway: a parameter, data, or saved by an earlier row.
    pub shared: bool,
}

/// Everything that the ops of a tape keep for backward, in order of creation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryReport {
    /// One row per saved tensor.
    pub rows: Vec<MemoryRow>,
}

impl MemoryReport {
    /// All bytes that live because they were saved.
    #[must_use]
    pub fn total_bytes(&self) -> usize {
        self.rows.iter().map(|row| row.bytes).sum()
    }
}

/// Whether a buffer of this purpose outlives the step whether or not an op refers to it.
pub(crate) fn lives_anyway(purpose: Purpose) -> bool {
    matches!(purpose, Purpose::Param | Purpose::Master | Purpose::Table | Purpose::Data | Purpose::State)
}

impl fmt::Display for MemoryReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let header = ["op", "role", "shape", "dtype", "bytes", "own"].map(str::to_owned);
        let rows: Vec<[String; 6]> = std::iter::once(header)
            .chain(self.rows.iter().map(|row| {
                let own = if row.shared { "shared" } else { "yes" };
                [
                    row.op.into(),
                    row.role.into(),
                    row.shape.to_string(),
                    row.dtype.to_string(),
                    row.bytes.to_string(),
                    own.into(),
                ]
            }))
            .collect();
        let width = |col: usize| rows.iter().map(|row| row[col].len()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..6).map(width).collect();
        for [op, role, shape, dtype, bytes, own] in &rows {
            writeln!(
                f,
                "{op:<w0$}  {role:<w1$}  {shape:<w2$}  {dtype:<w3$}  {bytes:>w4$}  {own}",
                w0 = widths[0],
                w1 = widths[1],
                w2 = widths[2],
                w3 = widths[3],
                w4 = widths[4],
            )?;
        }
        write!(f, "total {} bytes", self.total_bytes())
    }
}
