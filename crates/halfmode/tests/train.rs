//! `halfmode train`: the directory it writes, resuming, stopping.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod common;

use common::{Done, Folder, assert_same_run, has_keys, latest};
use halfmode::train::read_metrics;
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::process::Command;

#[test]
fn a_run_leaves_its_directory() {
    let folder = Folder::tiny("run");
    let done =
        folder.run("train tiny.toml").ok().says(&["epoch 1/2", "epoch 2/2", "test", "samples/s", "planned peak"]);
    assert!(done.stdout.contains("test L2") && done.stdout.contains("report"), "{}", done.stdout);
    let run = folder.join("runs/tiny");
    for file in [
        "config.toml",
        "summary.json",
        "metrics.jsonl",
        "environment.json",
        "report.html",
        "checkpoints/latest",
        "checkpoints/best",
        "plots/16-sample-0.png",
        "plots/20-sample-1.png",
        "plots/curves.svg",
    ] {
        assert!(run.join(file).is_file(), "{file}");
    }
    let read = |name: &str| std::fs::read_to_string(run.join(name)).unwrap();
    let summary: Value = serde_json::from_str(&read("summary.json")).unwrap();
    has_keys(&summary, &["seconds", "peak_bytes", "planned_peak_bytes", "skipped_steps", "final_loss_scale", "eval"]);
    has_keys(&summary["eval"]["16"], &["l2", "h1"]);
    let (peak, planned) = (summary["peak_bytes"].as_f64().unwrap(), summary["planned_peak_bytes"].as_f64().unwrap());
    assert!((peak / planned - 1.0).abs() < 0.01, "{peak} {planned}");
    assert_eq!(read_metrics(run.join("metrics.jsonl")).unwrap().len(), 2);
    let config: toml::Table = toml::from_str(&read("config.toml")).unwrap();
    assert_eq!(config["train"]["epochs"].as_integer(), Some(2));
    let environment: Value = serde_json::from_str(&read("environment.json")).unwrap();
    has_keys(&environment, &["halfmode", "cores", "threads", "command"]);

    // The replay of a batch: every block and its spectrum, in half, near its replay in f32.
    let precision: Value = serde_json::from_str(&read("precision.json")).unwrap();
    let rows = precision["rows"].as_array().unwrap();
    for (tensor, kind) in [("output", "output"), ("saved x_hat", "spectrum"), ("gradient", "gradient")] {
        let of_kind: Vec<&Value> =
            rows.iter().filter(|row| row["op"] == "fno_block 2" && row["tensor"] == tensor).collect();
        let [row] = of_kind[..] else { panic!("{kind}: {of_kind:?}") };
        assert_eq!(row["format"], "f16", "{row}");
        let error = row["error"].as_f64().unwrap();
        assert!(error > 1e-6 && error < 2e-2, "{row}");
        let headroom = (65504.0 / row["absmax"].as_f64().unwrap()).log2();
        assert!((row["headroom_bits"].as_f64().unwrap() - headroom).abs() < 1e-9, "{row}");
    }
    let (rounding, halving) = (&precision["rounding"], &precision["discretisation"]);
    assert!(rounding.as_f64().unwrap() > 0.0 && halving["error"].as_f64().unwrap() > rounding.as_f64().unwrap());
    assert_eq!((&halving["grid"][0], &halving["coarse"][0]), (&Value::from(16), &Value::from(8)));
    let report = read("report.html");
    assert!(report.contains("Precision, op by op") && report.contains("times below discretisation"));

    // What `plan` says before is what the run says after.
    let plan = folder.json("plan tiny.toml");
    let said = plan["configured"]["peak_bytes"].as_f64().unwrap();
    assert!((peak / said - 1.0).abs() < 0.01, "{peak} {said}");
    assert_eq!(plan["n_parameters"], summary["n_parameters"]);

    // The directory is not overwritten unasked; `--force` starts over.
    folder.run("train tiny.toml").exits(2).says(&[
        "is not empty",
        "help: halfmode train tiny.toml --resume",
        "--force",
    ]);
    std::fs::remove_file(run.join("report.html")).unwrap();
    folder.run("report runs/tiny").ok();
    assert!(run.join("report.html").is_file());
    let object = folder.json("train tiny.toml --force --plots 0 -q");
    has_keys(&object, &["command", "version", "run", "stopped", "summary", "best", "latest", "report"]);
    assert_eq!((&object["stopped"], &object["summary"]["finished"]), (&Value::Null, &Value::Bool(true)));
}

#[test]
fn n_and_n_more_epochs_are_2n_epochs() {
    let folder = Folder::tiny("resume");
    folder.run("train tiny.toml --out whole --plots 0").ok();
    folder.run("train tiny.toml --out parts --plots 0 --set train.epochs=1").ok();
    let done = folder.run("train parts --resume --plots 0 --set train.epochs=2").ok();
    done.says(&["changed since the run began: train.epochs: 1 -> 2", "epoch 2/2"]);
    assert_same_run(&folder.join("whole"), &folder.join("parts"));
    // The last epoch of a run also tests the other resolutions; the training's own is tested in all.
    let metrics = |run: &str| {
        let records = read_metrics(folder.join(run).join("metrics.jsonl")).unwrap();
        records.into_iter().map(|record| (record["loss"].clone(), record["eval"]["16"].clone())).collect::<Vec<_>>()
    };
    assert_eq!(metrics("whole"), metrics("parts"));
    let last = |run: &str| read_metrics(folder.join(run).join("metrics.jsonl")).unwrap().pop().unwrap()["eval"].clone();
    assert_eq!(last("whole"), last("parts"));
    assert_eq!(last("whole").as_object().unwrap().len(), 2);
}

/// Starts a long run, stops it in its second epoch, and goes on from there.
fn stopped_and_resumed(signal: &str, code: i32) {
    let folder = Folder::tiny(&format!("stop-{code}"));
    let line = "train tiny.toml --out stopped --plots 0 --set train.epochs=100000 --json";
    let mut child = folder.command(line).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut text = String::new();
    while !text.contains("epoch 1/") {
        assert_ne!(stderr.read_line(&mut text).unwrap(), 0, "{text}");
    }
    assert!(Command::new("kill").args([signal, &child.id().to_string()]).status().unwrap().success());
    std::io::copy(&mut stderr, &mut std::io::sink()).unwrap();
    let done = Done::of(line, child.wait_with_output().unwrap()).exits(code);
    assert!(done.object()["stopped"].is_string());

    let (_, state) = latest(&folder.join("stopped"));
    let epochs = state["epoch"].as_u64().unwrap() + 1;
    folder.run(&format!("train stopped --resume --plots 0 --set train.epochs={epochs}")).ok();
    folder.run(&format!("train tiny.toml --out whole --plots 0 --set train.epochs={epochs}")).ok();
    assert_same_run(&folder.join("whole"), &folder.join("stopped"));
}

#[test]
fn sigterm_saves_and_the_run_goes_on_as_if_nothing_had_been() {
    stopped_and_resumed("-TERM", 75);
}

#[test]
fn ctrl_c_saves_and_the_run_goes_on_as_if_nothing_had_been() {
    stopped_and_resumed("-INT", 130);
}

#[test]
fn seeds_matter_and_repeat() {
    let folder = Folder::tiny("seeds");
    for (out, seed) in [("a", 1), ("b", 1), ("c", 2)] {
        folder.run(&format!("train tiny.toml --out {out} --seed {seed} --set train.epochs=1 --plots 0")).ok();
    }
    assert_same_run(&folder.join("a"), &folder.join("b"));
    assert_ne!(latest(&folder.join("a")).0, latest(&folder.join("c")).0);
}

#[test]
fn a_run_that_diverges_names_its_checkpoint() {
    let folder = Folder::tiny("diverged");
    // The first epoch is an honest one, the second has steps of 10³².
    let wild =
        "--set scheduler={kind=\"step\",step_size=1,gamma=1e35} --set precision.preset=full --set train.epochs=40";
    let done = folder.run(&format!("train tiny.toml --out run --plots 0 {wild}")).exits(5);
    done.says(&["diverged", "run/checkpoints/latest", "help: halfmode train tiny.toml", "learning_rate"]);
    let summary: Value =
        serde_json::from_str(&std::fs::read_to_string(folder.join("run/summary.json")).unwrap()).unwrap();
    assert_eq!(summary["finished"], Value::Bool(false));
    // Errors that are not numbers can be reported, too.
    assert!(folder.join("run/report.html").is_file());
    folder.run("report run").ok();
}

#[test]
fn files_are_trained_on_and_channels_may_be_anywhere() {
    let folder = Folder::tiny("files");
    for line in [
        "data generate darcy --n 6 --resolution 16 -o train.npz",
        "data generate darcy --n 2 --resolution 16 --test -o test.npz",
    ] {
        folder.run(line).ok();
    }
    let text = common::TINY.split("[data]").next().unwrap().to_owned()
        + "[data]\nkind = \"file\"\ntrain = \"train.npz\"\ntest = [\"test.npz\"]\n\n[model]"
        + common::TINY.split("[model]").nth(1).unwrap();
    folder.write("files.toml", &text);
    folder.run("train files.toml --plots 1").ok();
    let object = folder.json("eval runs/files --data test.npz");
    let summary: Value =
        serde_json::from_str(&std::fs::read_to_string(folder.join("runs/files/summary.json")).unwrap()).unwrap();
    let (now, then) = (object["eval"]["test"]["l2"].as_f64().unwrap(), summary["eval"]["16"]["l2"].as_f64().unwrap());
    assert!(now > 0.0 && now <= then * 1.5, "{now} {then}");
    folder.run("bench step files.toml --iterations 2 --warmup 0").ok();
    std::fs::remove_file(folder.join("train.npz")).unwrap();
    folder.run("train files.toml --out other").exits(4).says(&["train.npz", "help: halfmode data generate"]);
}

/// The portable kernels train the same model, up to roundings.
#[test]
fn portable_kernels_train_the_same_model() {
    let folder = Folder::tiny("portable");
    folder.run("train tiny.toml --out fast --plots 0").ok();
    let mut command = folder.command("train tiny.toml --out portable --plots 0");
    Done::of("portable", command.env("HALFMODE_PORTABLE", "1").output().unwrap()).ok();
    let errors = |run: &str| {
        let summary = std::fs::read_to_string(folder.join(run).join("summary.json")).unwrap();
        let summary: Value = serde_json::from_str(&summary).unwrap();
        summary["eval"]["16"]["l2"].as_f64().unwrap()
    };
    let (fast, portable) = (errors("fast"), errors("portable"));
    assert!((fast / portable - 1.0).abs() < 1e-2, "{fast} {portable}");
    let mut command = folder.command("doctor --json");
    let done = Done::of("doctor", command.env("HALFMODE_PORTABLE", "1").output().unwrap()).ok();
    assert_eq!(done.object()["cpu"]["avx512_kernels"], Value::Bool(false));
}

/// Complex arrays of numpy through every command.
#[test]
fn complex_arrays_are_trained_on() {
    let folder = Folder::new("complex");
    let arrays =
        std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/complex_training/arrays.npz");
    std::fs::copy(arrays, folder.join("arrays.npz")).unwrap();
    folder.write(
        "job.toml",
        "[data]\nkind = \"file\"\ntrain = \"arrays.npz\"\ntest = [\"arrays.npz\"]\ninput = \"c8\"\noutput = \"c16\"\n\n\
         [model]\nkind = \"fno\"\nn_modes = [4]\nin_channels = 3\nout_channels = 3\nhidden_channels = 4\n\
         n_layers = 2\ncomplex_data = true\n\n[train]\nepochs = 2\nbatch_size = 1\nloss = \"h1\"\n",
    );
    let arrays = folder.json("inspect arrays.npz")["arrays"].clone();
    let of = |name: &str| arrays.as_array().unwrap().iter().find(|it| it["name"] == name).unwrap().clone();
    assert_eq!((&of("c16")["dtype"], &of("c16")["shape"]), (&"cf64".into(), &serde_json::json!([2, 3, 4, 2])));
    let plan = folder.json("plan job.toml");
    folder.run("train job.toml --plots 1").ok();
    let read = |name: &str| std::fs::read_to_string(folder.join("runs/job").join(name)).unwrap();
    let summary: Value = serde_json::from_str(&read("summary.json")).unwrap();
    assert_eq!(summary["peak_bytes"], summary["planned_peak_bytes"]);
    assert_eq!(plan["n_parameters"], summary["n_parameters"]);
    assert!(folder.join("runs/job/plots/4-sample-0.png").is_file());
    assert!(read("report.html").contains("4: test sample 0, moduli of complex fields"));
    let object = folder.json("eval runs/job --plots 1");
    let (now, then) = (&object["eval"]["arrays"]["l2"], &summary["eval"]["4"]["l2"]);
    assert!(now.as_f64().unwrap() <= then.as_f64().unwrap() * 1.01, "{now} {then}");
    // Complex numbers, or their parts: the same predictions.
    for key in ["c8", "c8_parts"] {
        let line = format!("predict --model runs/job --input arrays.npz --key {key} --output {key}.npy");
        let shape = folder.json(&line)["output"]["shape"].clone();
        assert_eq!(shape, serde_json::json!([2, 3, 4, 2]));
    }
    assert_eq!(std::fs::read(folder.join("c8.npy")).unwrap(), std::fs::read(folder.join("c8_parts.npy")).unwrap());
    let model = folder.json("inspect runs/job/checkpoints/best")["model"].clone();
    assert_eq!(model["config"]["complex_data"], Value::Bool(true));
    folder.run("bench step job.toml --iterations 1 --warmup 0").ok();
}
