//! Curves as SVG: losses and errors over epochs, the loss scale over steps.
//!
//! The SVG is written here and not by a plotting library, because its colours are CSS variables:
//! the same text follows the reader's light or dark theme in the report and as a file of its own.

use std::fmt::Write as _;

use super::axis::Axis;
pub use super::axis::YAxis;
use super::escape::escape;
use super::number::compact;

/// One curve.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Series {
    /// What the legend says.
    pub name: String,
    /// `(x, y)` in drawing order; points that are not finite are gaps in the curve.
    pub points: Vec<(f64, f64)>,
}

/// How points are joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Line {
    /// By straight lines.
    #[default]
    Straight,
    /// By steps: a value holds until the next point.
    Steps,
}

/// Events along the x axis, such as skipped steps.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Marks {
    /// What the legend says; the count is added.
    pub name: String,
    /// Their places.
    pub at: Vec<f64>,
}

/// A chart: titles, curves and marks.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Chart {
    /// What is written above the chart.
    pub title: String,
    /// What is written below the x axis.
    pub x_label: String,
    /// What is written above the y axis.
    pub y_label: String,
    /// The layout of the y axis.
    pub y_axis: YAxis,
    /// How points are joined.
    pub line: Line,
    /// The curves.
    pub series: Vec<Series>,
    /// Events along the x axis.
    pub marks: Marks,
}

/// The chart as the text of an SVG file.
///
/// Empty, single, constant and non-finite data are drawn as far as they go; a chart with nothing
/// to draw says so.
///
/// ```
/// use halfmode_train::pictures::{Chart, Series, curves_svg};
/// let series = vec![Series { name: "test".to_owned(), points: vec![(1.0, 0.3), (2.0, 0.02)] }];
/// let svg = curves_svg(&Chart { title: "Error".to_owned(), series, ..Chart::default() });
/// assert!(svg.starts_with("<svg") && svg.contains("test · 0.02"));
/// ```
pub fn curves_svg(chart: &Chart) -> String {
    draw(chart, Place::File)
}

/// The chart for use inside a page that has [`CHART_STYLE`].
pub(super) fn inline_svg(chart: &Chart) -> String {
    draw(chart, Place::Page)
}

/// The style of charts, for light and dark themes.
pub(super) const CHART_STYLE: &str = "\
.hm-chart{--paper:#fff;--ink:#1d2733;--soft:#66727f;--grid:#e4e8ec;--bad:#c4262e;\
--s0:#2368b0;--s1:#d06a0b;--s2:#2a8a57;--s3:#7a4fb5;--s4:#c2416b;--s5:#14808f;\
font:12px system-ui,-apple-system,'Segoe UI',sans-serif}\
@media(prefers-color-scheme:dark){.hm-chart{--paper:#161c23;--ink:#e3e9ef;--soft:#96a3b0;--grid:#2a333d;--bad:#ff7b72;\
--s0:#6cb0f0;--s1:#f2a34b;--s2:#63c58c;--s3:#b99bee;--s4:#f283a6;--s5:#52c3d4}}\
.hm-chart .bg{fill:var(--paper)}.hm-chart text{fill:var(--soft)}.hm-chart .title{fill:var(--ink);font-size:14px;font-weight:600}\
.hm-chart .key{fill:var(--ink)}.hm-chart .grid{stroke:var(--grid);fill:none}.hm-chart .axis{stroke:var(--soft);fill:none}\
.hm-chart .curve{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}\
.hm-chart .mark{stroke:var(--bad);stroke-width:1.4}\
.hm-chart .s0{stroke:var(--s0)}.hm-chart .s1{stroke:var(--s1)}.hm-chart .s2{stroke:var(--s2)}\
.hm-chart .s3{stroke:var(--s3)}.hm-chart .s4{stroke:var(--s4)}.hm-chart .s5{stroke:var(--s5)}\
.hm-chart .dot{fill:var(--paper);stroke-width:1.6}";

const N_COLOURS: usize = 6;
const WIDTH: f64 = 580.0;
const PLOT_HEIGHT: f64 = 230.0;
const LEFT: f64 = 62.0;
const RIGHT: f64 = WIDTH - 18.0;
const TITLE_ROW: f64 = 40.0;
const LEGEND_ROW: f64 = 18.0;
/// Curves with more points are drawn without dots.
const MAX_DOTS: usize = 60;
/// Mean width of a letter of the legend, a little generous.
const LETTER: f64 = 6.7;

/// The rectangle that curves live in, and the two axes.
struct Frame {
    top: f64,
    bottom: f64,
    x: Axis,
    y: Axis,
}

impl Frame {
    /// Pixel position of a point; `None` for what cannot be drawn.
    fn point(&self, (x, y): (f64, f64)) -> Option<(f64, f64)> {
        let (x, y) = (self.x.position(x)?, self.y.position(y)?);
        Some((self.x_at(x), self.y_at(y)))
    }

    fn x_at(&self, fraction: f64) -> f64 {
        LEFT + fraction * (RIGHT - LEFT)
    }

    fn y_at(&self, fraction: f64) -> f64 {
        self.bottom - fraction * (self.bottom - self.top)
    }
}

/// Where a chart will be shown.
enum Place {
    /// In a file of its own, which brings its name space, size and style.
    File,
    /// In a page that has the style.
    Page,
}

fn draw(chart: &Chart, place: Place) -> String {
    let (legend, n_rows) = legend(chart);
    let top = TITLE_ROW + LEGEND_ROW * n_rows as f64;
    let frame = frame(chart, top);
    let height = frame.bottom + 46.0;
    let (attributes, style) = match place {
        Place::File => (
            format!(" xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\""),
            format!("<style>{CHART_STYLE}</style>"),
        ),
        Place::Page => (String::new(), String::new()),
    };
    let mut svg = format!(
        "<svg{attributes} class=\"hm-chart\" role=\"img\" aria-label=\"{title}\" viewBox=\"0 0 {WIDTH} {height}\">{style}\
         <rect class=\"bg\" width=\"{WIDTH}\" height=\"{height}\"/>\
         <text class=\"title\" x=\"16\" y=\"24\">{title}</text>{legend}",
        title = escape(&chart.title),
    );
    axes(&mut svg, chart, &frame);
    let mut is_empty = true;
    for (idx, series) in chart.series.iter().enumerate() {
        is_empty &= !curve(&mut svg, series, idx, chart.line, &frame);
    }
    marks(&mut svg, &chart.marks, &frame);
    if is_empty {
        let (x, y) = (frame.x_at(0.5), frame.y_at(0.5));
        add(
            &mut svg,
            format_args!("<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">no finite values to draw</text>"),
        );
    }
    svg.push_str("</svg>");
    svg
}

fn frame(chart: &Chart, top: f64) -> Frame {
    let points = || chart.series.iter().flat_map(|it| it.points.iter().copied());
    let y = Axis::new(chart.y_axis, points().map(|(_, y)| y), 0.06);
    let shown = points().filter(|&(_, y)| y_is_drawable(&y_axis_of(chart), y)).map(|(x, _)| x);
    let x = Axis::new(YAxis::Linear, shown.chain(chart.marks.at.iter().copied()), 0.01);
    Frame { top, bottom: top + PLOT_HEIGHT, x, y }
}

/// An axis that only tells which values it can show.
fn y_axis_of(chart: &Chart) -> Axis {
    Axis::new(chart.y_axis, std::iter::empty(), 0.0)
}

fn y_is_drawable(axis: &Axis, y: f64) -> bool {
    axis.position(y).is_some()
}

/// The legend, and how many rows it takes: each curve with its last drawable value.
fn legend(chart: &Chart) -> (String, usize) {
    let y_axis = y_axis_of(chart);
    let entries = chart.series.iter().enumerate().map(|(idx, series)| {
        let last = series.points.iter().rev().find(|it| y_is_drawable(&y_axis, it.1));
        let value = last.map_or(String::new(), |it| format!(" · {}", compact(it.1, 4)));
        (format!("curve s{}", idx % N_COLOURS), format!("{}{value}", series.name))
    });
    let n_marks = chart.marks.at.len();
    let marks = (n_marks > 0).then(|| ("mark".to_owned(), format!("{} ({n_marks})", chart.marks.name)));
    let (mut svg, mut x, mut row) = (String::new(), 16.0, 0);
    for (class, text) in entries.chain(marks) {
        let width = 24.0 + LETTER * text.chars().count() as f64 + 20.0;
        if x > 16.0 && x + width > WIDTH {
            (x, row) = (16.0, row + 1);
        }
        let y = 44.0 + LEGEND_ROW * f64::from(row);
        let line = format!("M{x:.1} {:.1}h16", y - 4.0);
        let (text, text_x) = (escape(&text), x + 22.0);
        add(
            &mut svg,
            format_args!(
                "<path class=\"{class}\" d=\"{line}\"/><text class=\"key\" x=\"{text_x:.1}\" y=\"{y:.1}\">{text}</text>"
            ),
        );
        x += width;
    }
    let n_rows = if svg.is_empty() { 0 } else { row as usize + 1 };
    (svg, n_rows)
}

fn axes(svg: &mut String, chart: &Chart, frame: &Frame) {
    for tick in frame.y.ticks(6) {
        let y = frame.y_at(tick.at);
        let (label, text_y) = (escape(&tick.label), y + 4.0);
        add(svg, format_args!("<path class=\"grid\" d=\"M{LEFT} {y:.1}H{RIGHT}\"/>"));
        add(svg, format_args!("<text x=\"{:.1}\" y=\"{text_y:.1}\" text-anchor=\"end\">{label}</text>", LEFT - 7.0));
    }
    for tick in frame.x.ticks(8) {
        let x = frame.x_at(tick.at);
        let (bottom, label, text_y) = (frame.bottom, escape(&tick.label), frame.bottom + 18.0);
        add(svg, format_args!("<path class=\"axis\" d=\"M{x:.1} {bottom:.1}v4\"/>"));
        add(svg, format_args!("<text x=\"{x:.1}\" y=\"{text_y:.1}\" text-anchor=\"middle\">{label}</text>"));
    }
    let (bottom, label_y) = (frame.bottom, frame.bottom + 38.0);
    add(svg, format_args!("<path class=\"axis\" d=\"M{LEFT} {bottom:.1}H{RIGHT}\"/>"));
    add(
        svg,
        format_args!("<text x=\"{RIGHT}\" y=\"{label_y:.1}\" text-anchor=\"end\">{}</text>", escape(&chart.x_label)),
    );
    add(svg, format_args!("<text x=\"{RIGHT}\" y=\"24\" text-anchor=\"end\">{}</text>", escape(&chart.y_label)));
}

/// Draws a curve; `false` if it has no drawable point.
fn curve(svg: &mut String, series: &Series, idx: usize, line: Line, frame: &Frame) -> bool {
    let class = idx % N_COLOURS;
    // Colours return after six curves; their dashes differ.
    let dashes = ["", " stroke-dasharray=\"6 4\"", " stroke-dasharray=\"2 4\""][idx / N_COLOURS % 3];
    let points: Vec<_> = series.points.iter().map(|it| frame.point(*it)).collect();
    let mut path = String::new();
    for run in points.split(Option::is_none) {
        let run: Vec<(f64, f64)> = run.iter().copied().flatten().collect();
        for (point_idx, (x, y)) in thin(&run).into_iter().enumerate() {
            let _ = match (point_idx, line) {
                (0, _) => write!(path, "M{x:.1} {y:.1}"),
                (_, Line::Straight) => write!(path, "L{x:.1} {y:.1}"),
                (_, Line::Steps) => write!(path, "H{x:.1}V{y:.1}"),
            };
        }
        if let ([(x, y)], true) = (run.as_slice(), points.len() > MAX_DOTS) {
            // A lone point between two gaps would be invisible.
            add(&mut path, format_args!("M{x:.1} {y:.1}h0.1"));
        }
    }
    add(svg, format_args!("<path class=\"curve s{class}\"{dashes} d=\"{path}\"/>"));
    let n_drawable = points.iter().flatten().count();
    if n_drawable <= MAX_DOTS && line == Line::Straight || n_drawable == 1 {
        for (point, pixel) in series.points.iter().zip(&points) {
            let Some((x, y)) = pixel else { continue };
            let tip = escape(&format!("{} at {}: {}", series.name, compact(point.0, 6), compact(point.1, 5)));
            add(
                svg,
                format_args!(
                    "<circle class=\"dot s{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.6\"><title>{tip}</title></circle>"
                ),
            );
        }
    }
    n_drawable > 0
}

fn marks(svg: &mut String, marks: &Marks, frame: &Frame) {
    let mut drawn_at = None;
    for at in &marks.at {
        let Some(x) = frame.x.position(*at).map(|it| frame.x_at(it)) else {
            continue;
        };
        let pixel = x.round() as i64;
        if drawn_at != Some(pixel) {
            add(svg, format_args!("<path class=\"mark\" d=\"M{x:.1} {:.1}v-12\"/>", frame.bottom));
            drawn_at = Some(pixel);
        }
    }
}

/// Of consecutive points in one pixel column: the first, the extremes and the last.
///
/// A step-by-step loss has far more points than the picture has pixels; its spikes must stay.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut kept = Vec::new();
    for column in points.chunk_by(|a, b| a.0.round() as i64 == b.0.round() as i64) {
        if column.len() <= 4 {
            kept.extend_from_slice(column);
            continue;
        }
        let by_y = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
        kept.extend(column.first());
        kept.extend(column.iter().min_by(by_y));
        kept.extend(column.iter().max_by(by_y));
        kept.extend(column.last());
    }
    kept
}

/// Appends formatted text.
fn add(text: &mut String, arguments: std::fmt::Arguments<'_>) {
    // Writing to a string cannot fail.
    let _ = text.write_fmt(arguments);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(series: Vec<Series>) -> Chart {
        Chart {
            title: "Loss".to_owned(),
            x_label: "epoch".to_owned(),
            y_label: "relative L2".to_owned(),
            series,
            ..Chart::default()
        }
    }

    fn series(points: &[(f64, f64)]) -> Series {
        Series { name: "train".to_owned(), points: points.to_vec() }
    }

    /// Every tag closed in order, every number finite.
    fn assert_sound(svg: &str) {
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        let mut open = Vec::new();
        for tag in svg.split('<').skip(1) {
            let (tag, _) = tag.split_once('>').unwrap();
            let name = tag.split([' ', '/']).find(|it| !it.is_empty()).unwrap();
            if tag.starts_with('/') {
                assert_eq!(open.pop(), Some(name), "{svg}");
            } else if !tag.ends_with('/') {
                open.push(name);
            }
        }
        assert!(open.is_empty(), "{open:?}");
    }

    #[test]
    fn a_curve_has_path_dots_legend_and_ticks() {
        let svg = curves_svg(&chart(vec![series(&[(1.0, 0.5), (2.0, 0.05), (3.0, 0.0163)])]));
        assert_sound(&svg);
        assert!(svg.contains("train · 0.0163"));
        assert_eq!(svg.matches("<circle").count(), 3);
        assert!(svg.contains("<title>train at 2: 0.05</title>"));
        for tick in [">0.02<", ">0.05<", ">0.1<", ">0.2<", ">0.5<", ">1<", ">3<"] {
            assert!(svg.contains(tick), "{tick} is missing in {svg}");
        }
    }

    #[test]
    fn odd_data_are_drawn_without_panic() {
        let nan = f64::NAN;
        let sets: [&[(f64, f64)]; 8] = [
            &[],
            &[(1.0, 0.5)],
            &[(1.0, nan), (2.0, f64::INFINITY)],
            &[(1.0, 0.5), (2.0, nan), (3.0, 0.25)],
            &[(1.0, 0.5), (1.0, 0.5)],
            &[(0.0, -1.0), (1.0, 0.0)],
            &[(nan, 1.0), (f64::INFINITY, 2.0)],
            &[(0.0, f64::MAX), (1.0, f64::MIN_POSITIVE)],
        ];
        for y_axis in [YAxis::Linear, YAxis::Log10, YAxis::Log2] {
            for line in [Line::Straight, Line::Steps] {
                for set in sets {
                    let marks = Marks { name: "skipped".to_owned(), at: vec![0.5, nan] };
                    assert_sound(&curves_svg(&Chart { y_axis, line, marks, ..chart(vec![series(set)]) }));
                }
            }
        }
        assert!(curves_svg(&chart(Vec::new())).contains("no finite values"));
        assert!(curves_svg(&chart(vec![series(sets[2])])).contains("no finite values"));
    }

    #[test]
    fn gaps_split_the_path() {
        let svg = curves_svg(&chart(vec![series(&[(1.0, 0.5), (2.0, 0.4), (3.0, f64::NAN), (4.0, 0.3), (5.0, 0.2)])]));
        let path = svg.split("<path class=\"curve s0\" d=\"").nth(2).unwrap().split('"').next().unwrap();
        assert_eq!((path.matches('M').count(), path.matches('L').count()), (2, 2));
    }

    #[test]
    fn long_curves_are_thinned_but_keep_their_spikes() {
        let mut points: Vec<(f64, f64)> = (0..200_000).map(|it| (f64::from(it), 1.0)).collect();
        points[123_456].1 = 1000.0;
        let svg = curves_svg(&chart(vec![series(&points)]));
        assert!(svg.len() < 100_000, "{} bytes", svg.len());
        let top = frame(&chart(vec![series(&points)]), TITLE_ROW + LEGEND_ROW);
        let (_, peak) = top.point(points[123_456]).unwrap();
        assert!(svg.contains(&format!(" {peak:.1}L")));
    }

    #[test]
    fn steps_and_marks() {
        let mut steps = chart(vec![series(&[(0.0, 65536.0), (10.0, 32768.0)])]);
        steps.y_axis = YAxis::Log2;
        steps.line = Line::Steps;
        steps.marks = Marks { name: "skipped steps".to_owned(), at: vec![10.0, 10.0, 4.0] };
        let svg = curves_svg(&steps);
        assert_sound(&svg);
        assert!(svg.contains("skipped steps (3)") && svg.contains("2¹⁵") && svg.contains("2¹⁶"));
        assert_eq!(svg.matches("v-12").count(), 2);
    }

    #[test]
    fn names_are_escaped() {
        let hostile = "</svg><script>\"&'";
        let mut hostile_chart = chart(vec![Series { name: hostile.to_owned(), points: vec![(1.0, 1.0)] }]);
        hostile_chart.title = hostile.to_owned();
        hostile_chart.x_label = hostile.to_owned();
        hostile_chart.y_label = hostile.to_owned();
        let svg = curves_svg(&hostile_chart);
        assert_sound(&svg);
        assert!(!svg.contains("<script"));
    }
}
