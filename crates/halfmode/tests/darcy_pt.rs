//! `data.kind = "darcy-pt"`: neuraloperator's Darcy files, here small ones of the same form.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::Folder;
use std::path::{Path, PathBuf};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// `examples/darcy16.toml` on the small files, made smaller.
fn job() -> String {
    let root = repository();
    format!(
        "{} --set data.folder={} --set model.hidden_channels=4 --set model.n_layers=2 --set train.epochs=2",
        root.join("examples/darcy16.toml").display(),
        root.join("tests/golden/torch/darcy").display()
    )
}

#[test]
fn the_example_is_the_peers_configuration() {
    let text = std::fs::read_to_string(repository().join("examples/darcy16.toml")).unwrap();
    let job: halfmode::train::job::JobConfig = toml::from_str(&text).unwrap();
    let model = job.model.fno();
    assert_eq!((&model.n_modes[..], model.hidden_channels, model.n_layers), (&[16, 16][..], 24, 4));
    assert_eq!((job.train.epochs, job.train.batch_size), (300, 8));
    // As many real numbers as neuraloperator's model of this configuration has.
    let folder = Folder::new("darcy16");
    let data = repository().join("tests/golden/torch/darcy");
    let example = repository().join("examples/darcy16.toml");
    let plan = folder.json(&format!("plan {} --set data.folder={}", example.display(), data.display()));
    assert_eq!(plan["n_parameters"], 671_113);
}

#[test]
fn trains_resumes_and_evaluates() {
    let folder = Folder::new("darcy-pt");
    let job = job();
    let done = folder.run(&format!("train {job} --out a")).ok();
    done.says(&["darcy-pt: 6 at 16x16 to train on", "3 at 16x16, 3 at 32x32"]);
    folder.run(&format!("train {job} --set train.epochs=1 --out b")).ok();
    folder.run(&format!("train {job} --out b --resume")).ok();
    let read = |run: &str| std::fs::read_to_string(folder.join(run).join("summary.json")).unwrap();
    let eval = |run: &str| serde_json::from_str::<serde_json::Value>(&read(run)).unwrap()["eval"].clone();
    assert_eq!(eval("a"), eval("b"));
    let report = std::fs::read_to_string(folder.join("a/report.html")).unwrap();
    assert!(report.contains("darcy_train_16.pt"));
    let object = folder.json("eval a --resolution 32");
    assert_eq!(object["eval"]["32"]["n"], 3);
    assert!(object["eval"].get("16").is_none());
    folder.run("eval a --resolution 64").exits(4).says(&["darcy_test_64.pt", "help: halfmode"]);
    folder.run("eval a --resolution 8").exits(3).says(&["resolution 8"]);
}

#[test]
fn what_is_missing_is_named() {
    let folder = Folder::new("darcy-pt-missing");
    let job = job();
    let missing = folder.run(&format!("train {job} --set data.folder=nowhere")).exits(4);
    missing.says(&["nowhere/darcy_train_16.pt", "help: halfmode plan", "data.folder"]);
    folder.run(&format!("plan {job} --set data.resolution=32")).exits(4).says(&["darcy_train_32.pt"]);
    folder.run(&format!("plan {job} --set data.n_train=0")).exits(3).says(&["data.n_train"]);
    std::fs::create_dir(folder.join("wrong")).unwrap();
    let files = repository().join("tests/golden/torch/darcy");
    for name in ["darcy_train_16.pt", "darcy_test_16.pt", "darcy_test_32.pt"] {
        std::fs::copy(files.join("darcy_test_32.pt"), folder.join("wrong").join(name)).unwrap();
    }
    let wrong = folder.run(&format!("train {job} --set data.folder=wrong")).exits(4);
    wrong.says(&["wrong/darcy_train_16.pt", "[3, 32, 32]", "[samples, 16, 16]", "help: halfmode data inspect"]);
    let text = std::fs::read_to_string(repository().join("examples/darcy16.toml")).unwrap();
    folder.write("no-folder.toml", &text.replace("folder = ", "# folder = "));
    folder.run("plan no-folder.toml").exits(3).says(&["`folder` is missing", "no-folder.toml:7: data"]);
}
