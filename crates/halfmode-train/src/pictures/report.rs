//! The report of a run: one HTML file that needs nothing else.
//!
//! Pictures are inside (SVG as text, PNG as base64), there is no script and no link out of the
//! file, and it follows the reader's light or dark theme. It can be mailed, archived and printed.

use super::base64;
use super::curves::{CHART_STYLE, Chart, Line, Marks, Series, YAxis, inline_svg};
use super::escape::escape;
use super::number::{bytes, compact, duration};
use super::table::Table;

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Outcome {
    /// All epochs were trained.
    #[default]
    Finished,
    /// Stopped before the last epoch, with everything saved.
    Stopped,
    /// The loss ceased to be finite.
    Diverged,
}

/// The error on one test set.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Evaluation {
    /// The grid, as a person writes it: `64 × 64`.
    pub resolution: String,
    /// Number of test samples.
    pub n_samples: usize,
    /// Relative L2 error.
    pub l2: f64,
    /// Relative H1 error, where it was computed.
    pub h1: Option<f64>,
    /// Whether the model never saw this resolution in training.
    pub zero_shot: bool,
}

/// Memory of one purpose, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MemoryRow {
    /// The purpose, as the ledger calls it.
    pub purpose: String,
    /// Held at the end of the run.
    pub live: u64,
    /// The most that this purpose held at any time; the peaks of several purposes do not add up.
    pub peak: u64,
    /// What the plan said before the run.
    pub planned: Option<u64>,
}

/// The loss scale over optimiser steps.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LossScale {
    /// `(step, scale)`; a scale holds until the next point.
    pub scale: Vec<(f64, f64)>,
    /// The steps that were skipped because a gradient was not finite.
    pub skipped: Vec<f64>,
}

/// What the formats do to a batch, op by op.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct OpPrecision {
    /// Rounding error beside discretisation error.
    pub sentence: String,
    /// One row per tensor.
    pub rows: Table,
    /// How to read the rows.
    pub note: String,
}

/// A PNG picture with its caption.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Image {
    /// What is shown.
    pub caption: String,
    /// The bytes of the PNG file.
    pub png: Vec<u8>,
}

/// All that a report says; empty parts are left out.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Report {
    /// The headline: the run's name.
    pub title: String,
    /// How the run ended.
    pub outcome: Outcome,
    /// One sentence on what was trained, such as `FNO-2d, 4.2 M parameters, mixed f16`.
    pub subtitle: String,
    /// Errors, one entry per test set, the training resolution first.
    pub evaluation: Vec<Evaluation>,
    /// What else was measured on held-out samples: names and values, the criterion first.
    pub metrics: Vec<(String, f64)>,
    /// Facts on the run: data, model, optimiser, seed.
    pub facts: Vec<(String, String)>,
    /// The precision policy: what is stored and summed in which format.
    pub precision: Table,
    /// What the formats did to one batch.
    pub op_precision: OpPrecision,
    /// Memory by purpose.
    pub memory: Vec<MemoryRow>,
    /// Memory of all purposes together: peaks at one moment, so less than the column's sum.
    pub memory_total: Option<MemoryRow>,
    /// Where the time went, in seconds.
    pub time: Vec<(String, f64)>,
    /// Time of the whole run, in seconds.
    pub seconds: Option<f64>,
    /// Loss and error curves.
    pub curves: Vec<Chart>,
    /// Field panels.
    pub panels: Vec<Image>,
    /// The loss scale, where there was one.
    pub loss_scale: Option<LossScale>,
    /// The resolved configuration, as text.
    pub config: String,
    /// Machine and versions.
    pub environment: Vec<(String, String)>,
}

/// The report as the text of an HTML file.
///
/// ```
/// use halfmode_train::pictures::{Report, report_html};
/// let report = Report { title: "darcy".to_owned(), seconds: Some(252.0), ..Report::default() };
/// assert!(report_html(&report).contains("Finished after 4 min 12 s"));
/// ```
pub fn report_html(report: &Report) -> String {
    let title = escape(&report.title);
    let body = [
        header(report),
        tiles(report),
        section("Curves", &charts(&report.curves)),
        section(
            if report.metrics.is_empty() { "Predictions" } else { "Pictures" },
            &report.panels.iter().map(figure).collect::<String>(),
        ),
        section("Errors by resolution", &evaluation(&report.evaluation)),
        section("Loss scale and skipped steps", &report.loss_scale.as_ref().map_or(String::new(), loss_scale)),
        section("Precision, op by op", &op_precision(&report.op_precision)),
        section("Memory by purpose", &memory(report)),
        section("Time", &time(report)),
        section("Run", &facts(&report.facts)),
        section("Precision", &table(&report.precision)),
        section("Configuration", &preformatted(&report.config)),
        section("Environment", &facts(&report.environment)),
    ]
    .concat();
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n\
         <title>{title}</title>\n<style>{STYLE}{CHART_STYLE}</style>\n</head>\n\
         <body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )
}

const STYLE: &str = "\
:root{color-scheme:light dark;--page:#f3f5f7;--paper:#fff;--ink:#1d2733;--soft:#5d6975;--grid:#e0e5ea;\
--accent:#2368b0;--good:#1f7a4a;--warn:#a86400;--bad:#c4262e}\
@media(prefers-color-scheme:dark){:root{--page:#0e1318;--paper:#161c23;--ink:#e3e9ef;--soft:#96a3b0;--grid:#2a333d;\
--accent:#6cb0f0;--good:#63c58c;--warn:#f2a34b;--bad:#ff7b72}}\
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);\
font:15px/1.5 system-ui,-apple-system,'Segoe UI',sans-serif}\
main{max-width:1160px;margin:0 auto;padding:32px 20px 64px}\
h1{margin:0;font-size:26px;line-height:1.25;overflow-wrap:anywhere}h2{margin:0 0 12px;font-size:16px}\
header{margin-bottom:20px}header p{margin:4px 0 0;color:var(--soft)}header .verdict{font-size:17px;color:var(--ink)}\
.badge{display:inline-block;vertical-align:middle;margin-left:10px;padding:1px 10px;border:1px solid;border-radius:99px;\
font-size:13px;font-weight:600}.finished{color:var(--good)}.stopped{color:var(--warn)}.diverged{color:var(--bad)}\
section,.tile{background:var(--paper);border:1px solid var(--grid);border-radius:10px}\
section{padding:18px 20px;margin-top:16px;overflow-x:auto}\
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px}\
.tile{padding:12px 16px}.tile b{display:block;font-size:24px;line-height:1.3;font-variant-numeric:tabular-nums}\
.tile span{color:var(--soft);font-size:13px}\
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(480px,100%),1fr));gap:12px}svg{display:block;width:100%;max-width:640px}\
table{border-collapse:collapse;min-width:50%;font-variant-numeric:tabular-nums}\
th,td{padding:5px 28px 5px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--grid)}\
th{color:var(--soft);font-weight:500;font-size:13px;white-space:nowrap}.n{text-align:right}tr:last-child>*{border-bottom:0}\
.total>*{font-weight:600}td.bar{width:30%;min-width:120px;padding-right:0;vertical-align:middle}\
.bar i{display:block;height:9px;border-radius:3px;background:var(--accent)}\
figure{margin:0}figure+figure{margin-top:18px}figcaption{margin-bottom:6px;color:var(--soft);font-size:13px}\
figure img{display:block;max-width:100%;height:auto;background:#fff;border-radius:6px}\
pre{margin:0;font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere}\
.note{margin:10px 0 0;color:var(--soft);font-size:13px}\
@media print{body{background:none}section,.tile{break-inside:avoid}}";

/// A titled block, or nothing if it would be empty.
fn section(title: &str, content: &str) -> String {
    if content.is_empty() {
        return String::new();
    }
    format!("<section>\n<h2>{title}</h2>\n{content}\n</section>\n")
}

fn header(report: &Report) -> String {
    let (class, word) = match report.outcome {
        Outcome::Finished => ("finished", "finished"),
        Outcome::Stopped => ("stopped", "stopped early, saved"),
        Outcome::Diverged => ("diverged", "diverged"),
    };
    let paragraph = |class: &str, text: &str| {
        let text = escape(text);
        if text.is_empty() { text } else { format!("<p class=\"{class}\">{text}</p>\n") }
    };
    format!(
        "<header>\n<h1>{}<span class=\"badge {class}\">{word}</span></h1>\n{}{}</header>\n",
        escape(&report.title),
        paragraph("verdict", &verdict(report)),
        paragraph("subtitle", &report.subtitle),
    )
}

/// The result in one sentence; the tiles below it carry the other numbers.
fn verdict(report: &Report) -> String {
    let errors = report.evaluation.iter().map(|it| {
        let how = if it.zero_shot { "zero-shot " } else { "" };
        format!("{} {how}at {}", compact(it.l2, 4), it.resolution)
    });
    let errors: Vec<String> = errors.collect();
    let time = report.seconds.map_or(String::new(), |it| format!(" after {}", duration(it)));
    if let Some((name, value)) = report.metrics.first() {
        let how = match report.outcome {
            Outcome::Finished => "Finished",
            Outcome::Stopped => "Stopped",
            Outcome::Diverged => "Diverged",
        };
        return format!("{how}{time}: {name} {} on held-out samples.", compact(*value, 4));
    }
    let Some((last, others)) = errors.split_last() else {
        return match report.outcome {
            Outcome::Finished => format!("Finished{time}, not evaluated."),
            Outcome::Stopped => format!("Stopped{time}, before an evaluation."),
            Outcome::Diverged => format!("Diverged{time}, before an evaluation."),
        };
    };
    let list = if others.is_empty() { last.clone() } else { format!("{} and {last}", others.join(", ")) };
    format!("Relative L2 test error {list}{time}.")
}

fn tiles(report: &Report) -> String {
    let mut tiles: Vec<(String, String)> = Vec::new();
    for it in &report.evaluation {
        let how = if it.zero_shot { ", zero-shot" } else { "" };
        tiles.push((compact(it.l2, 4), format!("relative L2 at {}{how}", it.resolution)));
    }
    tiles.extend(report.metrics.iter().map(|(name, value)| (compact(*value, 4), name.clone())));
    if let Some(seconds) = report.seconds {
        tiles.push((duration(seconds), "wall time".to_owned()));
    }
    if let Some(total) = &report.memory_total {
        tiles.push((bytes(total.peak), "peak memory in tensors".to_owned()));
    }
    if let Some(scale) = &report.loss_scale {
        let end = scale.scale.last().map_or(String::new(), |it| format!("; final loss scale {}", compact(it.1, 6)));
        tiles.push((scale.skipped.len().to_string(), format!("skipped steps{end}")));
    }
    if tiles.is_empty() {
        return String::new();
    }
    let tile = |(value, text): &(String, String)| {
        format!("<div class=\"tile\"><b>{}</b><span>{}</span></div>\n", escape(value), escape(text))
    };
    format!("<div class=\"tiles\">\n{}</div>\n", tiles.iter().map(tile).collect::<String>())
}

fn charts(charts: &[Chart]) -> String {
    if charts.is_empty() {
        return String::new();
    }
    let drawn: Vec<String> = charts.iter().map(|it| format!("<div>{}</div>", inline_svg(it))).collect();
    format!("<div class=\"charts\">\n{}\n</div>", drawn.join("\n"))
}

fn figure(image: &Image) -> String {
    let caption = escape(&image.caption);
    let data = base64::encode(&image.png);
    format!(
        "<figure><figcaption>{caption}</figcaption><img alt=\"{caption}\" src=\"data:image/png;base64,{data}\"></figure>\n"
    )
}

fn evaluation(rows: &[Evaluation]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let row = |it: &Evaluation| {
        let h1 = it.h1.map_or("–".to_owned(), |it| compact(it, 4));
        let how = if it.zero_shot { "zero-shot" } else { "as trained" };
        let numbers = numbers(&[compact(it.l2, 4), h1, it.n_samples.to_string()]);
        format!("<tr><td>{}</td>{numbers}<td>{how}</td></tr>\n", escape(&it.resolution))
    };
    format!(
        "<table>\n<tr><th>grid</th><th class=\"n\">relative L2</th><th class=\"n\">relative H1</th>\
         <th class=\"n\">samples</th><th></th></tr>\n{}</table>",
        rows.iter().map(row).collect::<String>()
    )
}

fn loss_scale(history: &LossScale) -> String {
    let chart = Chart {
        title: "Every step".to_owned(),
        x_label: "optimiser step".to_owned(),
        y_label: "loss scale".to_owned(),
        y_axis: YAxis::Log2,
        line: Line::Steps,
        series: vec![Series { name: "loss scale".to_owned(), points: history.scale.clone() }],
        marks: Marks { name: "skipped steps".to_owned(), at: history.skipped.clone() },
    };
    let note = match history.skipped.as_slice() {
        [] => "No step was skipped.".to_owned(),
        steps if steps.len() <= 20 => {
            let list: Vec<String> = steps.iter().map(|it| compact(*it, 9)).collect();
            format!("Skipped because a gradient was not finite: {}.", list.join(", "))
        }
        steps => format!("{} steps were skipped because a gradient was not finite.", steps.len()),
    };
    format!("{}<p class=\"note\">{}</p>", charts(&[chart]), escape(&note))
}

fn op_precision(it: &OpPrecision) -> String {
    let paragraph = |class: &str, text: &str| {
        if text.is_empty() { String::new() } else { format!("<p class=\"{class}\">{}</p>", escape(text)) }
    };
    [paragraph("verdict", &it.sentence), table(&it.rows), paragraph("note", &it.note)].concat()
}

fn memory(report: &Report) -> String {
    if report.memory.is_empty() && report.memory_total.is_none() {
        return String::new();
    }
    let largest = report.memory.iter().map(|it| it.peak).max().unwrap_or(0).max(1);
    let cells = |it: &MemoryRow| {
        let planned = it.planned.map_or("–".to_owned(), bytes);
        format!("<td>{}</td>{}", escape(&it.purpose), numbers(&[bytes(it.live), bytes(it.peak), planned]))
    };
    let row = |it: &MemoryRow| {
        let share = 100.0 * it.peak as f64 / largest as f64;
        format!("<tr>{}<td class=\"bar\"><i style=\"width:{share:.1}%\"></i></td></tr>\n", cells(it))
    };
    let total = |it: &MemoryRow| format!("<tr class=\"total\">{}<td></td></tr>\n", cells(it));
    format!(
        "<table>\n<tr><th>purpose</th><th class=\"n\">at the end</th><th class=\"n\">peak</th>\
         <th class=\"n\">planned peak</th><th>peak</th></tr>\n{}{}</table>\n\
         <p class=\"note\">Peaks of different purposes fall at different moments: they add up to more than the total.</p>",
        report.memory.iter().map(row).collect::<String>(),
        report.memory_total.iter().map(total).collect::<String>(),
    )
}

fn time(report: &Report) -> String {
    if report.time.is_empty() {
        return String::new();
    }
    let sum: f64 = report.time.iter().map(|it| it.1).filter(|it| it.is_finite()).sum();
    let whole = report.seconds.unwrap_or(sum).max(f64::MIN_POSITIVE);
    let row = |(name, seconds): &(String, f64)| {
        let share = if seconds.is_finite() { (100.0 * seconds / whole).clamp(0.0, 100.0) } else { 0.0 };
        let numbers = numbers(&[duration(*seconds), format!("{share:.0} %")]);
        let bar = format!("<td class=\"bar\"><i style=\"width:{share:.1}%\"></i></td>");
        format!("<tr><td>{}</td>{numbers}{bar}</tr>\n", escape(name))
    };
    format!("<table>\n{}</table>", report.time.iter().map(row).collect::<String>())
}

fn facts(facts: &[(String, String)]) -> String {
    if facts.is_empty() {
        return String::new();
    }
    let row =
        |(name, value): &(String, String)| format!("<tr><th>{}</th><td>{}</td></tr>\n", escape(name), escape(value));
    format!("<table>\n{}</table>", facts.iter().map(row).collect::<String>())
}

fn table(table: &Table) -> String {
    if table.rows.is_empty() {
        return String::new();
    }
    let n_columns = table.rows.iter().map(Vec::len).max().unwrap_or(0).max(table.header.len());
    let cells = |tag: &str, row: &[String]| -> String {
        let text = |idx: usize| row.get(idx).map_or(String::new(), |it| escape(it));
        (0..n_columns).map(|idx| format!("<{tag}>{}</{tag}>", text(idx))).collect()
    };
    let body: String = table.rows.iter().map(|it| format!("<tr>{}</tr>\n", cells("td", it))).collect();
    format!("<table>\n<tr>{}</tr>\n{body}</table>", cells("th", &table.header))
}

fn numbers(values: &[String]) -> String {
    values.iter().map(|it| format!("<td class=\"n\">{}</td>", escape(it))).collect()
}

fn preformatted(text: &str) -> String {
    if text.trim().is_empty() { String::new() } else { format!("<pre>{}</pre>", escape(text)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn strings(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
    }

    fn sample(text: &str) -> Report {
        let mut precision = Table::new(["operation", "stored", "summed"]);
        precision.push([text.to_owned(), "f16".to_owned(), "f32".to_owned()]);
        precision.rows.push(vec!["short row".to_owned()]);
        let points = vec![(1.0, 0.31), (2.0, 0.016)];
        Report {
            title: text.to_owned(),
            subtitle: text.to_owned(),
            outcome: Outcome::Finished,
            evaluation: vec![
                Evaluation {
                    resolution: "64 × 64".to_owned(),
                    n_samples: 100,
                    l2: 0.0161,
                    h1: Some(0.081),
                    zero_shot: false,
                },
                Evaluation {
                    resolution: "128 × 128".to_owned(),
                    n_samples: 100,
                    l2: 0.0164,
                    h1: None,
                    zero_shot: true,
                },
            ],
            metrics: vec![],
            facts: strings(&[(text, text)]),
            op_precision: OpPrecision {
                sentence: "Rounding is below discretisation.".to_owned(),
                rows: precision.clone(),
                note: text.to_owned(),
            },
            precision,
            memory: vec![MemoryRow { purpose: text.to_owned(), live: 0, peak: 86_016, planned: Some(86_016) }],
            memory_total: Some(MemoryRow { purpose: "total".to_owned(), live: 10, peak: 1 << 20, planned: None }),
            time: vec![(text.to_owned(), 12.0), ("never".to_owned(), f64::NAN)],
            seconds: Some(252.0),
            curves: vec![Chart {
                title: text.to_owned(),
                series: vec![Series { name: text.to_owned(), points }],
                ..Chart::default()
            }],
            panels: vec![Image { caption: text.to_owned(), png: vec![1, 2, 3] }],
            loss_scale: Some(LossScale { scale: vec![(0.0, 65536.0), (9.0, 32768.0)], skipped: vec![9.0] }),
            config: text.to_owned(),
            environment: strings(&[("rustc", text)]),
        }
    }

    /// Every opened tag is closed in order, but for those that HTML never closes.
    fn assert_closed(html: &str) {
        let mut open = Vec::new();
        for tag in html.split('<').skip(1) {
            let (tag, _) = tag.split_once('>').unwrap();
            let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap();
            if tag.starts_with('/') {
                assert_eq!(open.pop(), Some(name));
            } else if !tag.ends_with('/') && !["!doctype", "meta", "img"].contains(&name) {
                open.push(name);
            }
        }
        assert_eq!(open, Vec::<&str>::new());
    }

    #[test]
    fn says_what_the_run_reached() {
        let html = report_html(&sample("darcy"));
        assert_closed(&html);
        assert!(
            html.contains(
                "Relative L2 test error 0.0161 at 64 × 64 and 0.0164 zero-shot at 128 × 128 after 4 min 12 s."
            )
        );
        for part in [
            "84.0 KiB",
            "1.0 MiB",
            "final loss scale 32768",
            "skipped steps (1)",
            "data:image/png;base64,AQID",
            "never",
            "Rounding is below discretisation.",
        ] {
            assert!(html.contains(part), "{part} is missing");
        }
    }

    #[test]
    fn needs_nothing_outside_itself() {
        let html = report_html(&sample("darcy"));
        for outside in ["http:", "https:", "//", "<script", "<link", "<iframe", "@import", "url("] {
            assert!(!html.contains(outside), "{outside} in the report");
        }
        assert_eq!(html.matches("src=").count(), html.matches("src=\"data:").count());
    }

    #[test]
    fn escapes_every_text() {
        let hostile = "</pre><script>alert('\"&')</script>";
        let html = report_html(&sample(hostile));
        assert_closed(&html);
        assert!(!html.contains("<script") && !html.contains("alert('"));
    }

    #[test]
    fn an_empty_report_is_a_page_without_sections() {
        let html = report_html(&Report::default());
        assert_closed(&html);
        assert!(!html.contains("<section") && html.contains("not evaluated"));
        let diverged = Report { outcome: Outcome::Diverged, ..Report::default() };
        assert!(report_html(&diverged).contains("Diverged, before an evaluation."));
    }
}
