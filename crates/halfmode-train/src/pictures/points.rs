//! Points and paths in the plane, several panels side by side as one PNG.

use super::Error;
use super::canvas::{Canvas, Rgb, TEXT_HEIGHT};
use super::number::compact;

/// One panel: points, and lines through others.
#[derive(Debug, Clone, Default)]
pub struct Cloud<'a> {
    /// What is written above; ASCII.
    pub label: &'a str,
    /// Points of one sort: the data.
    pub points: &'a [[f64; 2]],
    /// Points of another sort, drawn over the first, larger.
    pub marks: &'a [[f64; 2]],
    /// Lines, each through its points in order.
    pub paths: &'a [Vec<[f64; 2]>],
}

const SIDE: usize = 320;
const MARGIN: usize = 12;
const INK: Rgb = [29, 39, 51];
const POINT: Rgb = [35, 104, 176];
const MARK: Rgb = [208, 106, 11];
const PATH: Rgb = [150, 163, 176];

/// Draws panels that all show the square with these corners along both axes; what lies outside is left out.
///
/// # Errors
/// [`Error::NoPanels`], and those of the encoder.
///
/// ```
/// use halfmode_train::pictures::{Cloud, clouds_png};
/// let points = [[0.0, 0.5], [1.0, -1.0], [f64::NAN, 0.0]];
/// let png = clouds_png(&[Cloud { label: "data", points: &points, ..Cloud::default() }], (-2.0, 2.0)).unwrap();
/// assert!(png.starts_with(b"\x89PNG"));
/// ```
pub fn clouds_png(panels: &[Cloud<'_>], (low, high): (f64, f64)) -> Result<Vec<u8>, Error> {
    if panels.is_empty() {
        return Err(Error::NoPanels);
    }
    let top = 2 * MARGIN + TEXT_HEIGHT;
    let (width, height) = (panels.len() * (SIDE + MARGIN) + MARGIN, top + SIDE + 2 * MARGIN + TEXT_HEIGHT);
    let mut canvas = Canvas::new(width, height, [255; 3]);
    for (idx, panel) in panels.iter().enumerate() {
        let left = MARGIN + idx * (SIDE + MARGIN);
        canvas.text([left, MARGIN], panel.label, INK);
        let inside = |at: &[f64; 2]| at.iter().all(|x| (low..high).contains(x));
        let place = |at: &[f64; 2]| {
            let share = at.map(|x| (x - low) / (high - low) * (SIDE - 3) as f64);
            [left as f64 + 1.0 + share[0], (top + SIDE - 3) as f64 - share[1]]
        };
        for path in panel.paths {
            for pair in path.windows(2).filter(|pair| pair.iter().all(inside)) {
                canvas.line(place(&pair[0]), place(&pair[1]), PATH);
            }
        }
        for (points, size, colour) in [(panel.points, 2, POINT), (panel.marks, 5, MARK)] {
            for point in points.iter().filter(|it| inside(it)) {
                let [x, y] = place(point).map(|it| (it.max(0.0) as usize).saturating_sub(size / 2));
                canvas.fill([x, y], [size, size], colour);
            }
        }
        canvas.outline([left, top], [SIDE, SIDE], INK);
    }
    let range = format!("{} to {} on both axes", compact(low, 3), compact(high, 3));
    canvas.text([MARGIN, top + SIDE + MARGIN], &range, INK);
    canvas.png()
}
