//! Field panels: scalar fields side by side as one PNG, each with its colour bar.
//!
//! Fields that share a scale group share their limits, so that a truth and its prediction can be
//! compared by eye. A field with one row or one column is drawn as a line. A three-dimensional
//! field is shown by the slice in its middle ([`Field::central`]).

use super::Error;
use super::canvas::{Canvas, Rgb, TEXT_HEIGHT, text_width};
use super::number::compact;

/// A scalar field on a grid, row-major: `data[i * shape[1] + j]`.
#[derive(Debug, Clone, Copy)]
pub struct Field<'a> {
    data: &'a [f32],
    shape: [usize; 2],
}

impl<'a> Field<'a> {
    /// A field of `shape[0]` rows and `shape[1]` columns; the first row is drawn at the top.
    ///
    /// # Errors
    /// [`Error::Length`] if `data` does not have that many values; [`Error::Shape`] if there are
    /// none.
    pub fn new(data: &'a [f32], shape: [usize; 2]) -> Result<Self, Error> {
        check(data, &shape)?;
        Ok(Self { data, shape })
    }

    /// The part of a field with one to three axes that a picture can show: all of it, and of
    /// three axes the slice in the middle of the first.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of axes or an empty one; [`Error::Length`] if `data`
    /// does not fit `shape`.
    pub fn central(data: &'a [f32], shape: &[usize]) -> Result<Self, Error> {
        check(data, shape)?;
        match *shape {
            [n] => Ok(Self { data, shape: [1, n] }),
            [rows, columns] => Ok(Self { data, shape: [rows, columns] }),
            [slices, rows, columns] => {
                let start = slices / 2 * rows * columns;
                Ok(Self { data: &data[start..start + rows * columns], shape: [rows, columns] })
            }
            _ => Err(Error::Shape { shape: shape.to_vec() }),
        }
    }

    /// Whether the field is drawn as a line: it has one row or one column.
    fn is_line(&self) -> bool {
        self.shape.contains(&1)
    }

    fn at(&self, row: usize, column: usize) -> f32 {
        self.data[row * self.shape[1] + column]
    }
}

/// Which colours a panel has and where they begin and end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scale {
    /// Viridis between the least and the greatest value of this panel.
    Own,
    /// Viridis between the least and the greatest value of all panels of this group.
    Shared(u8),
    /// Magma from zero to the greatest value: for absolute errors.
    Magnitude,
}

/// One field of a picture.
#[derive(Debug, Clone, Copy)]
pub struct Panel<'a> {
    /// What is written above the field; ASCII, what is too long is cut.
    pub label: &'a str,
    /// The values.
    pub field: Field<'a>,
    /// Its colours.
    pub scale: Scale,
}

/// Input, truth, prediction and `|prediction − truth|` side by side.
///
/// Truth and prediction share one scale, the error has its own.
///
/// ```
/// use halfmode_train::pictures::{Field, prediction_png};
/// let (truth, prediction) = ([0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 2.5]);
/// let field = |data| Field::new(data, [2, 2]);
/// let file = prediction_png(field(&truth)?, field(&truth)?, field(&prediction)?)?;
/// assert!(file.starts_with(b"\x89PNG"));
/// # Ok::<(), halfmode_train::pictures::Error>(())
/// ```
///
/// # Errors
/// [`Error::Mismatch`] if truth and prediction differ in shape; as [`panel_png`] otherwise.
pub fn prediction_png(input: Field<'_>, truth: Field<'_>, prediction: Field<'_>) -> Result<Vec<u8>, Error> {
    let error = abs_difference(truth, prediction)?;
    panel_png(&[
        Panel { label: "input", field: input, scale: Scale::Own },
        Panel { label: "truth", field: truth, scale: Scale::Shared(0) },
        Panel { label: "prediction", field: prediction, scale: Scale::Shared(0) },
        Panel { label: "|error|", field: Field { data: &error, shape: truth.shape }, scale: Scale::Magnitude },
    ])
}

/// As [`prediction_png`], from the moduli of complex fields: of input, truth, prediction, and error.
///
/// # Errors
/// As [`panel_png`].
pub fn moduli_png([input, truth, prediction, error]: [Field<'_>; 4]) -> Result<Vec<u8>, Error> {
    panel_png(&[
        Panel { label: "|input|", field: input, scale: Scale::Own },
        Panel { label: "|truth|", field: truth, scale: Scale::Shared(0) },
        Panel { label: "|prediction|", field: prediction, scale: Scale::Shared(0) },
        Panel { label: "|error|", field: error, scale: Scale::Magnitude },
    ])
}

/// `|prediction − truth|`, value by value, in the order of the fields.
///
/// # Errors
/// [`Error::Mismatch`] if the shapes differ.
pub fn abs_difference(truth: Field<'_>, prediction: Field<'_>) -> Result<Vec<f32>, Error> {
    if truth.shape != prediction.shape {
        return Err(Error::Mismatch { truth: truth.shape, prediction: prediction.shape });
    }
    Ok(prediction.data.iter().zip(truth.data).map(|(p, t)| (p - t).abs()).collect())
}

/// Draws panels side by side and returns the bytes of a PNG file.
///
/// Each field is magnified by whole factors until its longer side has at least 256 pixels (fields
/// beyond 1024 are averaged over blocks instead); values that are not finite are drawn in
/// [`NOT_FINITE`] and counted beside the colour bar.
///
/// # Errors
/// [`Error::NoPanels`] if there is nothing to draw; [`Error::Png`] if the encoder refuses.
pub fn panel_png(panels: &[Panel<'_>]) -> Result<Vec<u8>, Error> {
    if panels.is_empty() {
        return Err(Error::NoPanels);
    }
    let sizes: Vec<[usize; 2]> = panels.iter().map(|it| drawn_size(&it.field)).collect();
    let row_height = sizes.iter().map(|it| it[1]).max().unwrap_or(0);
    let columns: Vec<usize> = sizes.iter().map(|it| it[0].max(MIN_COLUMN)).collect();
    let width = columns.iter().sum::<usize>() + GAP * (panels.len() - 1) + 2 * MARGIN;
    let top = MARGIN + TEXT_HEIGHT + PAD;
    let bar_top = top + row_height + PAD;
    let height = bar_top + BAR_HEIGHT + PAD + TEXT_HEIGHT + MARGIN;

    let mut canvas = Canvas::new(width, height, PAPER);
    let mut left = MARGIN;
    for ((panel, size), column) in panels.iter().zip(sizes).zip(columns) {
        let limits = limits(panel, panels);
        canvas.text([left, MARGIN], &cut(panel.label, column), INK);
        if panel.field.is_line() {
            draw_line(&mut canvas, panel, limits, [left, top], size);
        } else {
            draw_field(&mut canvas, panel, limits, [left, top], size);
        }
        draw_bar(&mut canvas, panel, limits, [left, bar_top], size[0].max(MIN_COLUMN));
        left += column + GAP;
    }
    canvas.png()
}

/// The colour of values that are not finite; neither viridis nor magma comes near it.
pub const NOT_FINITE: [u8; 3] = [255, 0, 0];

const PAPER: Rgb = [255, 255, 255];
const INK: Rgb = [40, 44, 52];
const FRAME: Rgb = [150, 155, 165];
const LINE: Rgb = [38, 98, 176];
const ERROR_LINE: Rgb = [183, 55, 121];

const MARGIN: usize = 16;
const GAP: usize = 20;
const PAD: usize = 8;
const BAR_HEIGHT: usize = 10;
/// The least distance between the numbers below the bar.
const WORD_GAP: usize = 6;
/// A column is at least this wide, so that its numbers have room.
const MIN_COLUMN: usize = 256;
const MIN_SIDE: usize = 256;
const MAX_SIDE: usize = 1024;
/// A thin field is stretched until its shorter side has this many pixels.
const MIN_SHORT_SIDE: usize = 64;
const LINE_SIZE: [usize; 2] = [320, 200];

fn check(data: &[f32], shape: &[usize]) -> Result<(), Error> {
    let expected = shape.iter().try_fold(1_usize, |product, &n| product.checked_mul(n));
    match expected {
        Some(0) => Err(Error::Shape { shape: shape.to_vec() }),
        Some(expected) if expected == data.len() => Ok(()),
        _ => Err(Error::Length { shape: shape.to_vec(), expected: expected.unwrap_or(usize::MAX), found: data.len() }),
    }
}

/// How one axis of a field becomes pixels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Zoom {
    /// Each value is this many pixels.
    In(usize),
    /// This many values are one pixel, their mean.
    Out(usize),
}

impl Zoom {
    fn pixels(self, n: usize) -> usize {
        match self {
            Self::In(factor) => n * factor,
            Self::Out(factor) => n.div_ceil(factor),
        }
    }

    /// The values behind a pixel.
    fn values(self, pixel: usize, n: usize) -> std::ops::Range<usize> {
        match self {
            Self::In(factor) => pixel / factor..pixel / factor + 1,
            Self::Out(factor) => pixel * factor..((pixel + 1) * factor).min(n),
        }
    }
}

/// The zoom along rows and along columns: square cells unless a side would be a mere thread.
fn zooms(shape: [usize; 2]) -> [Zoom; 2] {
    let longer = shape[0].max(shape[1]);
    shape.map(|n| {
        if longer > MAX_SIDE {
            let factor = longer.div_ceil(MAX_SIDE);
            if n / factor >= MIN_SHORT_SIDE { Zoom::Out(factor) } else { thread(n) }
        } else {
            let factor = MIN_SIDE.div_ceil(longer);
            if n * factor >= MIN_SHORT_SIDE { Zoom::In(factor) } else { thread(n) }
        }
    })
}

fn thread(n: usize) -> Zoom {
    Zoom::In(MIN_SHORT_SIDE.div_ceil(n))
}

/// Width and height of a field in pixels.
fn drawn_size(field: &Field<'_>) -> [usize; 2] {
    if field.is_line() {
        return LINE_SIZE;
    }
    let [rows, columns] = zooms(field.shape);
    [columns.pixels(field.shape[1]), rows.pixels(field.shape[0])]
}

/// The values at the two ends of a panel's scale; `None` if no value is finite.
fn limits(panel: &Panel<'_>, panels: &[Panel<'_>]) -> Option<(f32, f32)> {
    let range = panels
        .iter()
        .filter(|it| std::ptr::eq(*it, panel) || matches!(panel.scale, Scale::Shared(_)) && it.scale == panel.scale)
        .flat_map(|it| it.field.data)
        .filter(|it| it.is_finite())
        .fold(None, |range: Option<(f32, f32)>, &value| {
            Some(range.map_or((value, value), |(min, max)| (min.min(value), max.max(value))))
        });
    match panel.scale {
        Scale::Magnitude => range.map(|(_, max)| (0.0, max.max(0.0))),
        Scale::Own | Scale::Shared(_) => range,
    }
}

/// Where a value stands between the limits, 0 to 1; a constant field stands in the middle.
fn position(value: f32, limits: Option<(f32, f32)>, scale: Scale) -> Option<f64> {
    if !value.is_finite() {
        return None;
    }
    let (min, max) = limits?;
    // In f64, because `max - min` of two finite f32 may not be finite in f32.
    let (value, min, max) = (f64::from(value), f64::from(min), f64::from(max));
    if max > min {
        return Some(((value - min) / (max - min)).clamp(0.0, 1.0));
    }
    Some(if scale == Scale::Magnitude { 0.0 } else { 0.5 })
}

fn colour(position: Option<f64>, scale: Scale) -> Rgb {
    let Some(position) = position else {
        return NOT_FINITE;
    };
    let gradient = if scale == Scale::Magnitude { colorous::MAGMA } else { colorous::VIRIDIS };
    gradient.eval_continuous(position).as_array()
}

fn draw_field(
    canvas: &mut Canvas,
    panel: &Panel<'_>,
    limits: Option<(f32, f32)>,
    corner: [usize; 2],
    size: [usize; 2],
) {
    let field = &panel.field;
    let [row_zoom, column_zoom] = zooms(field.shape);
    for y in 0..size[1] {
        let rows = row_zoom.values(y, field.shape[0]);
        for x in 0..size[0] {
            let columns = column_zoom.values(x, field.shape[1]);
            let count = rows.len() * columns.len();
            let cells = rows.clone().flat_map(|row| columns.clone().map(move |column| (row, column)));
            let sum: f64 = cells.map(|(row, column)| f64::from(field.at(row, column))).sum();
            let value = (sum / count as f64) as f32;
            canvas.set(corner[0] + x, corner[1] + y, colour(position(value, limits, panel.scale), panel.scale));
        }
    }
}

fn draw_line(canvas: &mut Canvas, panel: &Panel<'_>, limits: Option<(f32, f32)>, corner: [usize; 2], size: [usize; 2]) {
    let inner = [size[0] - 12, size[1] - 12];
    let values = panel.field.data;
    let ink = if panel.scale == Scale::Magnitude { ERROR_LINE } else { LINE };
    let x_of = |idx: usize| {
        let t = if values.len() > 1 { idx as f64 / (values.len() - 1) as f64 } else { 0.5 };
        (corner[0] + 6) as f64 + t * (inner[0] - 1) as f64
    };
    let mut previous = None;
    for (idx, &value) in values.iter().enumerate() {
        let x = x_of(idx);
        let Some(t) = position(value, limits, panel.scale) else {
            // A gap in the line, and a mark at the foot of the panel.
            canvas.fill([x as usize, corner[1] + size[1] - 6], [2, 5], NOT_FINITE);
            previous = None;
            continue;
        };
        let point = [x, (corner[1] + 6) as f64 + (1.0 - t) * (inner[1] - 1) as f64];
        canvas.line(previous.unwrap_or(point), point, ink);
        previous = Some(point);
    }
    canvas.outline(corner, size, FRAME);
}

/// The colour bar with the numbers at its ends and, between them, how many values have no colour.
/// A line has no colours: it gets its range in words.
fn draw_bar(canvas: &mut Canvas, panel: &Panel<'_>, limits: Option<(f32, f32)>, corner: [usize; 2], width: usize) {
    let number = |value: f32| compact(f64::from(value), 4);
    let n_bad = panel.field.data.iter().filter(|it| !it.is_finite()).count();
    let bad = if n_bad > 0 { format!("{n_bad} nan") } else { String::new() };
    let (low, high, below) = if panel.field.is_line() {
        let range = limits.map_or(String::new(), |(min, max)| format!("{} to {}", number(min), number(max)));
        (range, String::new(), corner[1])
    } else {
        for x in 0..width {
            let along = x as f64 / (width - 1) as f64;
            let t = limits.map(|(min, max)| match position(min, limits, panel.scale) {
                Some(constant) if max <= min => constant,
                _ => along,
            });
            canvas.fill([corner[0] + x, corner[1]], [1, BAR_HEIGHT], colour(t, panel.scale));
        }
        let (low, high) = limits.map_or_else(Default::default, |(min, max)| (number(min), number(max)));
        (low, high, corner[1] + BAR_HEIGHT + PAD)
    };
    canvas.text([corner[0], below], &low, INK);
    canvas.text([corner[0] + width.saturating_sub(text_width(&high)), below], &high, INK);
    let free = width.saturating_sub(text_width(&low) + text_width(&high) + 2 * WORD_GAP);
    if text_width(&bad) <= free {
        let left = corner[0] + text_width(&low) + WORD_GAP + (free - text_width(&bad)) / 2;
        canvas.text([left, below], &bad, NOT_FINITE);
    }
}

/// As much of a label as fits, with two dots where it was cut.
fn cut(label: &str, width: usize) -> String {
    if text_width(label) <= width {
        return label.to_owned();
    }
    let n_fitting = (0..label.chars().count()).rev().find(|&n| text_width(&"m".repeat(n + 2)) <= width);
    label.chars().take(n_fitting.unwrap_or(0)).chain("..".chars()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Decoded {
        width: usize,
        height: usize,
        pixels: Vec<u8>,
    }

    impl Decoded {
        fn at(&self, x: usize, y: usize) -> Rgb {
            let start = 3 * (y * self.width + x);
            [self.pixels[start], self.pixels[start + 1], self.pixels[start + 2]]
        }

        fn count(&self, colour: Rgb) -> usize {
            self.pixels.chunks(3).filter(|it| *it == colour).count()
        }
    }

    fn decode(file: &[u8]) -> Decoded {
        let mut reader = png::Decoder::new(std::io::Cursor::new(file)).read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        let info = reader.next_frame(&mut pixels).unwrap();
        assert_eq!(info.color_type, png::ColorType::Rgb);
        Decoded { width: info.width as usize, height: info.height as usize, pixels }
    }

    const TOP: usize = MARGIN + TEXT_HEIGHT + PAD;

    fn one(field: Field<'_>, scale: Scale) -> Decoded {
        decode(&panel_png(&[Panel { label: "x", field, scale }]).unwrap())
    }

    #[test]
    fn four_panels_have_the_stated_size_and_colours() {
        let n = 64;
        let truth: Vec<f32> = (0..n * n).map(|it| it as f32).collect();
        let prediction: Vec<f32> = truth.iter().map(|it| it * 0.5).collect();
        let field = |data| Field::new(data, [n, n]).unwrap();
        let file = prediction_png(field(&truth), field(&truth), field(&prediction)).unwrap();
        let image = decode(&file);
        assert_eq!(image.width, 2 * MARGIN + 4 * 256 + 3 * GAP);
        assert_eq!(image.height, TOP + 256 + PAD + BAR_HEIGHT + PAD + TEXT_HEIGHT + MARGIN);
        let left = |panel: usize| MARGIN + panel * (256 + GAP);
        let viridis = |t| colorous::VIRIDIS.eval_continuous(t).as_array();
        let magma = |t| colorous::MAGMA.eval_continuous(t).as_array();
        // First value: the least of truth and prediction alike, and no error.
        for panel in 0..3 {
            assert_eq!(image.at(left(panel), TOP), viridis(0.0));
        }
        assert_eq!(image.at(left(3), TOP), magma(0.0));
        // Last value: the truth is at the top of the shared scale, the prediction half way.
        assert_eq!(image.at(left(1) + 255, TOP + 255), viridis(1.0));
        assert_eq!(image.at(left(2) + 255, TOP + 255), viridis(0.5));
        assert_eq!(image.at(left(3) + 255, TOP + 255), magma(1.0));
        assert_eq!(image.at(2, 2), PAPER);
    }

    #[test]
    fn not_finite_values_stand_out_and_do_not_spoil_the_scale() {
        let data = [f32::NAN, 1.0, f32::INFINITY, 2.0];
        let image = one(Field::new(&data, [2, 2]).unwrap(), Scale::Own);
        assert_eq!(image.at(MARGIN, TOP), NOT_FINITE);
        assert_eq!(image.at(MARGIN, TOP + 255), NOT_FINITE);
        assert_eq!(image.at(MARGIN + 255, TOP), colorous::VIRIDIS.eval_continuous(0.0).as_array());
        assert_eq!(image.at(MARGIN + 255, TOP + 255), colorous::VIRIDIS.eval_continuous(1.0).as_array());
    }

    #[test]
    fn a_field_of_nan_and_a_constant_field_are_drawn() {
        let bad = one(Field::new(&[f32::NAN; 9], [3, 3]).unwrap(), Scale::Own);
        assert!(bad.count(NOT_FINITE) > 256 * 256);
        let middle = colorous::VIRIDIS.eval_continuous(0.5).as_array();
        let constant = one(Field::new(&[7.5; 9], [3, 3]).unwrap(), Scale::Own);
        assert!(constant.count(middle) >= 258 * 258);
        let zero = one(Field::new(&[0.0; 9], [3, 3]).unwrap(), Scale::Magnitude);
        assert_eq!(zero.at(MARGIN, TOP), colorous::MAGMA.eval_continuous(0.0).as_array());
        let huge = [f32::MIN, f32::MAX, 0.0, 0.0];
        let huge = one(Field::new(&huge, [2, 2]).unwrap(), Scale::Own);
        assert_eq!(huge.at(MARGIN, TOP + 255), middle);
    }

    #[test]
    fn zoom_keeps_cells_square_until_a_side_is_a_thread() {
        assert_eq!(zooms([64, 64]), [Zoom::In(4), Zoom::In(4)]);
        assert_eq!(zooms([421, 421]), [Zoom::In(1), Zoom::In(1)]);
        assert_eq!(zooms([100, 20]), [Zoom::In(3), Zoom::In(4)]);
        assert_eq!(zooms([2, 3]), [Zoom::In(86), Zoom::In(86)]);
        assert_eq!(zooms([1500, 3000]), [Zoom::Out(3), Zoom::Out(3)]);
        assert_eq!(zooms([3, 3000]), [Zoom::In(22), Zoom::Out(3)]);
        for n in 2..2500 {
            let side = zooms([n, n])[0].pixels(n);
            assert!((MIN_SIDE..=MAX_SIDE).contains(&side), "{n} became {side}");
        }
    }

    #[test]
    fn large_fields_are_averaged() {
        let data: Vec<f32> = (0..1026 * 1026).map(|it| (it % 2) as f32).collect();
        let image = one(Field::new(&data, [1026, 1026]).unwrap(), Scale::Own);
        assert_eq!(image.width, 2 * MARGIN + 513);
        assert_eq!(image.at(MARGIN, TOP), colorous::VIRIDIS.eval_continuous(0.5).as_array());
    }

    #[test]
    fn lines_are_drawn_for_one_axis() {
        for data in [vec![1.0], vec![f32::NAN; 5], vec![3.0; 7], (0..4000).map(|it| it as f32).collect()] {
            let field = Field::central(&data, &[data.len()]).unwrap();
            let image = one(field, Scale::Own);
            assert_eq!(image.width, 2 * MARGIN + LINE_SIZE[0]);
            let drawn = image.count(LINE) > 0;
            assert_eq!(drawn, data[0].is_finite());
        }
    }

    #[test]
    fn three_axes_show_their_middle() {
        let data: Vec<f32> = (0..5 * 2 * 3).map(|it| it as f32).collect();
        let field = Field::central(&data, &[5, 2, 3]).unwrap();
        assert_eq!((field.shape, field.data), ([2, 3], &data[12..18]));
    }

    #[test]
    fn what_cannot_be_drawn_is_an_error() {
        assert!(matches!(panel_png(&[]), Err(Error::NoPanels)));
        assert!(matches!(Field::new(&[1.0], [1, 2]), Err(Error::Length { expected: 2, found: 1, .. })));
        assert!(matches!(Field::new(&[], [0, 2]), Err(Error::Shape { .. })));
        assert!(matches!(Field::central(&[1.0], &[1, 1, 1, 1]), Err(Error::Shape { .. })));
        assert!(matches!(Field::new(&[1.0], [usize::MAX, 2]), Err(Error::Length { .. })));
        let (a, b) = (Field::new(&[1.0, 2.0], [1, 2]).unwrap(), Field::new(&[1.0, 2.0], [2, 1]).unwrap());
        assert!(matches!(abs_difference(a, b), Err(Error::Mismatch { .. })));
    }

    #[test]
    fn labels_are_cut_to_their_column() {
        assert_eq!(cut("truth", 256), "truth");
        let long = cut("a label that is far too long for one panel", 256);
        assert!(long.ends_with("..") && text_width(&long) <= 256);
        assert_eq!(cut("ab", 0), "..");
    }
}
