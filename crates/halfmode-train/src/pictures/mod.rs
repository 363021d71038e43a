//! Pictures of a run: field panels as PNG, curves as SVG, one HTML report.
//!
//! Everything here is a pure function from plain numbers to the bytes or the text of a file; no
//! tensor, no device and no file system. What is drawn badly (an empty series, a constant field,
//! a field full of NaN) is still drawn: a picture of a failed run is when a picture helps most.

mod axis;
mod base64;
mod canvas;
pub mod curves;
mod escape;
pub mod field;
mod font;
mod grid;
mod number;
mod points;
pub mod report;
mod table;

pub use curves::{Chart, Line, Marks, Series, YAxis, curves_svg};
pub use field::{Field, Panel, Scale, abs_difference, moduli_png, panel_png, prediction_png};
pub use grid::{Tile, confusion_png, tiles_png};
pub use points::{Cloud, clouds_png};
pub use report::{Evaluation, Image, LossScale, MemoryRow, OpPrecision, Outcome, Report, report_html};
pub use table::Table;

/// Why a picture could not be drawn.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The data are not as long as their shape says.
    #[error("field of shape {shape:?} needs {expected} values, found {found}")]
    Length {
        /// The stated shape.
        shape: Vec<usize>,
        /// The product of the shape.
        expected: usize,
        /// The number of values given.
        found: usize,
    },
    /// A field with an axis of size zero, with no axis, or with more than three.
    #[error("a field of shape {shape:?} cannot be drawn: it needs 1 to 3 axes, none of them empty")]
    Shape {
        /// The stated shape.
        shape: Vec<usize>,
    },
    /// Two fields that should be compared differ in shape.
    #[error("truth has shape {truth:?}, prediction has shape {prediction:?}")]
    Mismatch {
        /// Rows and columns of the truth.
        truth: [usize; 2],
        /// Rows and columns of the prediction.
        prediction: [usize; 2],
    },
    /// A picture without panels was asked for.
    #[error("a picture needs at least one panel")]
    NoPanels,
    /// The PNG encoder refused.
    #[error(transparent)]
    Png(#[from] png::EncodingError),
}
