//! Tasks: jobs that are no operators on fields.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod common;

use common::{Done, Folder, assert_same_run, has_keys, latest};
use halfmode::train::read_metrics;
use serde_json::Value;
use std::io::Write as _;
use std::process::Stdio;

/// A flow that takes a second in a debug build.
const TINY: &str = r#"seed = 3

[data]
kind = "density"
density = "8gaussians"
n_train = 192
n_test = 100

[model]
kind = "cnf"
hidden = 4
n_flows = 8

[solver]
steps = 4

[train]
epochs = 3
batch_size = 64

[optimizer]
learning_rate = 1e-2
weight_decay = 0.0
"#;

fn folder(name: &str) -> Folder {
    let folder = Folder::new(name);
    folder.write("tiny.toml", TINY);
    folder
}

#[test]
fn a_flow_leaves_its_directory() {
    let folder = folder("flow");
    let done = folder.run("train tiny.toml").ok().says(&["epoch 1/3", "test NLL", "planned peak", "entropy 2.8379"]);
    assert!(done.stdout.contains("NLL") && done.stdout.contains("integral of the density"), "{}", done.stdout);
    let run = folder.join("runs/tiny");
    for file in [
        "config.toml",
        "summary.json",
        "metrics.jsonl",
        "environment.json",
        "report.html",
        "checkpoints/latest",
        "checkpoints/best",
        "plots/1-samples-of-data-and-model.png",
        "plots/2-density.png",
        "plots/3-flow-over-time.png",
        "plots/curves.svg",
    ] {
        assert!(run.join(file).is_file(), "{file}");
    }
    let summary: Value = serde_json::from_str(&std::fs::read_to_string(run.join("summary.json")).unwrap()).unwrap();
    has_keys(&summary, &["seconds", "peak_bytes", "planned_peak_bytes", "skipped_steps", "final_loss_scale"]);
    assert!(summary.get("eval").is_none());
    let nll = summary["metrics"]["NLL"].as_f64().unwrap();
    assert!(nll > 2.8 && nll < 12.0, "{nll}");
    let mass = summary["metrics"]["integral of the density"].as_f64().unwrap();
    assert!((mass - 1.0).abs() < 0.02, "{mass}");
    let (peak, planned) = (summary["peak_bytes"].as_f64().unwrap(), summary["planned_peak_bytes"].as_f64().unwrap());
    assert!((peak / planned - 1.0).abs() < 0.01, "{peak} {planned}");
    let records = read_metrics(run.join("metrics.jsonl")).unwrap();
    assert_eq!(records.len(), 3);
    assert_eq!(records[2]["metrics"]["NLL"].as_f64().unwrap().to_bits(), nll.to_bits());
    let report = std::fs::read_to_string(run.join("report.html")).unwrap();
    for words in ["Finished after", "NLL", "samples of data and model", "flow over time", "data:image/png"] {
        assert!(report.contains(words), "{words}");
    }

    let plan = folder.json("plan tiny.toml");
    assert!((peak / plan["configured"]["peak_bytes"].as_f64().unwrap() - 1.0).abs() < 0.01, "{plan}");
    assert_eq!(plan["n_parameters"], summary["n_parameters"]);
    assert_eq!(plan["steps_per_epoch"], 3);
    let bench = folder.json("bench step tiny.toml --iterations 3 --warmup 1");
    has_keys(&bench, &["step_ms", "p10_ms", "p90_ms", "samples_per_s", "peak_bytes", "planned_peak_bytes"]);
    assert!(bench["peak_bytes"].as_f64() <= bench["planned_peak_bytes"].as_f64(), "{bench}");

    std::fs::remove_file(run.join("report.html")).unwrap();
    folder.run("report runs/tiny").ok();
    assert!(run.join("report.html").is_file());
    folder.run("train tiny.toml").exits(2).says(&["is not empty", "--resume"]);
    let object = folder.json("inspect runs/tiny");
    assert_eq!(object["model"]["config"]["kind"], "cnf");
    folder.run("eval runs/tiny").exits(7).says(&["no operator on fields", "help: halfmode report runs/tiny"]);
}

/// Two epochs and one more come to the bits of three at once.
#[test]
fn a_flow_goes_on_where_it_stopped() {
    let folder = folder("flow-resume");
    folder.run("train tiny.toml --out whole").ok();
    folder.run("train tiny.toml --out parts --set train.epochs=2 --plots 0").ok();
    assert!(!folder.join("parts/plots/2-density.png").exists());
    folder.run("train tiny.toml --out parts --resume").ok().says(&["changed since the run began: train.epochs"]);
    assert_same_run(&folder.join("whole"), &folder.join("parts"));
    let lines = |run: &str| read_metrics(folder.join(run).join("metrics.jsonl")).unwrap();
    for (a, b) in lines("whole").iter().zip(&lines("parts")) {
        for key in ["epoch", "loss", "metrics", "learning_rate"] {
            assert_eq!(a[key], b[key], "{key}");
        }
    }
    let other = folder.run("train tiny.toml --out parts --resume --set model.n_flows=9").exits(7);
    other.says(&["another model", "help: halfmode train parts --resume"]);
    let metrics = std::fs::read_to_string(folder.join("parts/metrics.jsonl")).unwrap();
    std::fs::write(folder.join("parts/metrics.jsonl"), metrics.replacen('\n', "\nrubbish\n", 1)).unwrap();
    let torn = folder.run("train tiny.toml --out parts --resume").exits(7);
    torn.says(&["metrics.jsonl", "help: mv parts/metrics.jsonl parts/metrics.jsonl.damaged"]);
    assert_eq!(latest(&folder.join("whole")).1["epoch"], 3);
}

#[test]
fn keys_of_a_task_are_refused_with_the_nearest() {
    let folder = folder("flow-keys");
    for (set, words) in [
        ("model.n_flow=3", ["unknown key `n_flow`", "`n_flows`"]),
        ("data.density=8gausians", ["unknown value `8gausians`", "`8gaussians`"]),
        ("solver.step=3", ["unknown key `step`", "`steps`"]),
        ("train.loss=h1", ["unknown key `loss`", "train.loss"]),
        ("train.batch_size=0", ["train.batch_size", "between 1 and"]),
        ("solver.steps=0", ["solver.steps", "between 1 and"]),
        ("optimizer.learning_rate=-1", ["learning_rate", "halfmode plan"]),
        ("model.kind=cnff", ["unknown value `cnff`", "halfmode plan"]),
    ] {
        folder.run(&format!("plan tiny.toml --set {set}")).exits(3).says(&words);
    }
    folder.run("plan cnff").exits(3).says(&["no such configuration", "`cnf`"]);
    assert_eq!(folder.json("plan cnf")["config"]["model"]["kind"], "cnf");
}

#[test]
fn a_latent_equation_leaves_its_directory() {
    let folder = Folder::new("spirals");
    let sets = [
        "data.n_train=64",
        "data.n_test=16",
        "data.n_points=6",
        "model.hidden=8",
        "model.latent=3",
        "solver.steps=5",
        "train.epochs=2",
        "train.batch_size=16",
    ];
    let sets: String = sets.iter().map(|set| format!(" --set {set}")).collect();
    let done = folder.run(&format!("train latent-spiral{sets}")).ok().says(&["test distance", "epoch 2/2"]);
    assert!(done.stdout.contains("distance beyond the observations"), "{}", done.stdout);
    let run = folder.join("runs/latent-spiral");
    let report = std::fs::read_to_string(run.join("report.html")).unwrap();
    assert!(report.contains("fitted curves") && report.contains("data:image/png"));
    let plan = folder.json(&format!("plan latent-spiral{sets}"));
    let summary: Value = serde_json::from_str(&std::fs::read_to_string(run.join("summary.json")).unwrap()).unwrap();
    let (peak, planned) = (summary["peak_bytes"].as_f64(), plan["configured"]["peak_bytes"].as_f64());
    assert!((peak.unwrap() / planned.unwrap() - 1.0).abs() < 0.01, "{peak:?} {planned:?}");
    folder.run(&format!("train latent-spiral --resume{sets} --set data.n_points=7")).exits(7);
    folder.run("plan latent-spiral --set data.noise=-1").exits(3).says(&["data.noise", "not negative"]);
    folder.run("plan latent-spiral --set data.kind=density").exits(3).says(&["unknown key"]);
}

/// The examples are the presets, spelled out.
#[test]
fn examples_are_the_presets() {
    let folder = Folder::new("task-examples");
    let examples = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    for name in ["cnf", "latent-spiral"] {
        let file = folder.json(&format!("plan {}", examples.join(name).with_extension("toml").display()));
        assert_eq!(file["config"], folder.json(&format!("plan {name}"))["config"], "{name}");
    }
}

/// A configuration from a pipe is read once: what kind of job it is and the job itself come from the same bytes.
#[cfg(unix)]
#[test]
fn a_configuration_comes_through_a_pipe() {
    let folder = folder("piped");
    for (text, kind) in [(TINY, "cnf"), (common::TINY, "fno")] {
        let mut command = folder.command("plan /dev/stdin --json");
        let mut program = command.stdin(Stdio::piped()).spawn().unwrap();
        program.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let done = Done::of("plan /dev/stdin", program.wait_with_output().unwrap()).ok();
        assert_eq!(done.object()["config"]["model"]["kind"], kind);
    }
}

/// A flow whose weights leave the range of numbers: the exit code and the help of divergence.
#[test]
fn a_flow_that_diverges_says_so() {
    let folder = folder("flow-diverged");
    let wild = "--set optimizer.learning_rate=1e30 --set precision.preset=full --set train.epochs=40";
    let done = folder.run(&format!("train tiny.toml --out run {wild}")).exits(5);
    done.says(&["diverged", "no checkpoint was written yet", "--set optimizer.learning_rate=2.5e29"]);
    assert!(folder.join("run/summary.json").is_file() && folder.join("run/report.html").is_file());
}
