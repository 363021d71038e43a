//! The classifier whose layers are differential equations.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod common;

use common::{Folder, assert_same_run};
use halfmode::train::read_metrics;
use serde_json::Value;

/// A second in a debug build.
const TINY: &str = r#"seed = 3

[data]
kind = "shapes"
size = 8
n_train = 48
n_test = 24

[model]
kind = "ode-classifier"
channels = 2

[solver]
steps = 1

[train]
epochs = 2
batch_size = 16
"#;

/// The same with files of images, of the shape of MNIST's.
const FILES: &str = r#"[data]
kind = "images"
format = "mnist"
train = ["images", "labels"]
test = ["images", "labels"]
n_test = 5

[model]
kind = "ode-classifier"
channels = 2

[solver]
steps = 1

[train]
epochs = 1
batch_size = 4
"#;

#[test]
fn a_classifier_leaves_its_directory_and_goes_on_where_it_stopped() {
    let folder = Folder::new("classifier");
    folder.write("tiny.toml", TINY);
    folder.run("train tiny.toml --out whole").ok().says(&["epoch 1/2", "accuracy", "planned peak", "drawn shapes"]);
    let run = folder.join("whole");
    for file in [
        "summary.json",
        "report.html",
        "checkpoints/best",
        "plots/1-held-out-samples-and-predictions.png",
        "plots/2-confusion-matrix.png",
        "plots/curves.svg",
    ] {
        assert!(run.join(file).is_file(), "{file}");
    }
    let summary: Value = serde_json::from_str(&std::fs::read_to_string(run.join("summary.json")).unwrap()).unwrap();
    let accuracy = summary["metrics"]["accuracy"].as_f64().unwrap();
    // A share of 24 images.
    assert!((0.0..=1.0).contains(&accuracy) && (accuracy * 24.0).fract().min(1.0 - (accuracy * 24.0).fract()) < 1e-9);
    let (peak, planned) = (summary["peak_bytes"].as_f64().unwrap(), summary["planned_peak_bytes"].as_f64().unwrap());
    assert!((peak / planned - 1.0).abs() < 0.01, "{peak} {planned}");
    assert_eq!(read_metrics(run.join("metrics.jsonl")).unwrap().len(), 2);
    let report = std::fs::read_to_string(run.join("report.html")).unwrap();
    for words in
        ["Finished after", "accuracy", "confusion matrix", "held out samples and predictions", "data:image/png"]
    {
        assert!(report.contains(words), "{words}");
    }
    folder.run("train tiny.toml --out parts --set train.epochs=1 --plots 0").ok();
    folder.run("train tiny.toml --out parts --resume").ok();
    assert_same_run(&run, &folder.join("parts"));
    let fewer = folder.run("train tiny.toml --out parts --resume --set train.epochs=3 --set solver.steps=2").exits(7);
    fewer.says(&["no tensor", "help: halfmode train parts --resume"]);
}

#[test]
fn files_of_images_are_read_and_damaged_ones_refused() {
    let folder = Folder::new("classifier-files");
    folder.write("files.toml", FILES);
    let idx = |axes: &[u8], data: &[u8]| {
        let sizes: Vec<u8> = axes.iter().flat_map(|n| [0, 0, 0, *n]).collect();
        [&[0, 0, 8, axes.len() as u8][..], &sizes, data].concat()
    };
    let pixels: Vec<u8> = (0..8 * 8 * 8).map(|i| (i * 37 % 251) as u8).collect();
    std::fs::write(folder.join("labels"), idx(&[8], &[0, 1, 2, 3, 4, 5, 6, 9])).unwrap();
    std::fs::write(folder.join("images"), idx(&[8, 8, 8], &pixels)).unwrap();
    folder.run("train files.toml").ok().says(&["mnist files, 8x8 points, 10 classes, 8 to train on, 5 held out"]);
    std::fs::write(folder.join("images"), idx(&[8, 8, 8], &pixels[..500])).unwrap();
    let help = "help: halfmode plan files.toml --set 'data.train=[\"IMAGES\",\"LABELS\"]'";
    let cut = folder.run("train files.toml --out cut").exits(4);
    cut.says(&["`images` holds no labelled images", "truncated", help]);
    // What a run left tells of it without the images.
    std::fs::remove_file(folder.join("images")).unwrap();
    folder.run("report runs/files").ok();
    let report = std::fs::read_to_string(folder.join("runs/files/report.html")).unwrap();
    assert!(report.contains("mnist files, 8x8 points, 10 classes") && report.contains("three neural ODEs"));
    folder.run("plan files.toml").exits(4).says(&["images", help]);
    std::fs::write(folder.join("images"), idx(&[8, 8, 8], &pixels[..500])).unwrap();
    folder.run("plan files.toml --set model={kind=\"cnf\"}").exits(3).says(&["data.kind", "density"]);
    folder.run("plan files.toml --set data.format=gif").exits(3).says(&["unknown value `gif`"]);
}
