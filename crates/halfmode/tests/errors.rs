//! What users do wrong: the exit code, the place, and a command that helps.

mod common;

use common::Folder;
use std::process::Command;

#[test]
fn unknown_keys_name_the_nearest_and_their_line() {
    let folder = Folder::tiny("keys");
    let wrong = |from: &str, to: &str| folder.write("wrong.toml", &common::TINY.replace(from, to));
    wrong("n_modes", "n_mode");
    let done = folder.run("train wrong.toml").exits(3);
    done.says(&[
        "unknown key `n_mode`",
        "wrong.toml:12: model.n_mode",
        "nearest known key is `n_modes`",
        "help: halfmode plan",
    ]);
    wrong("n_train", "n_trian");
    folder.run("plan wrong.toml").exits(3).says(&["wrong.toml:5: data.n_trian", "`n_train`"]);
    wrong("kind = \"fno\"", "kind = \"fnoo\"");
    folder.run("plan wrong.toml").exits(3).says(&["wrong.toml:11: model.kind", "unknown value `fnoo`"]);
    wrong("epochs = 2", "epochs = \"two\"");
    folder.run("bench step wrong.toml").exits(3).says(&["wrong.toml:18: train.epochs", "two"]);
    wrong("hidden_channels = 4\n", "");
    folder.run("plan wrong.toml").exits(3).says(&["`hidden_channels` is missing", "wrong.toml:10: model"]);
    wrong("[train]", "[train");
    folder.run("plan wrong.toml").exits(3).says(&["not TOML", "wrong.toml:17"]);
    wrong("batch_size = 2", "batch_size = 0");
    folder.run("plan wrong.toml").exits(3).says(&["wrong.toml:19: train.batch_size", "between 1 and"]);
    wrong("learning_rate = 5e-3", "learning_rate = -1.0");
    folder.run("plan wrong.toml").exits(3).says(&["wrong.toml:23: optimizer.learning_rate"]);
    wrong("n_modes = [4, 4]", "n_modes = [4, 40]");
    folder.run("plan wrong.toml").exits(3).says(&["wrong.toml:12: model.n_modes", "16 points", "fewer n_modes"]);
}

#[test]
fn bad_set_is_a_configuration_error() {
    let folder = Folder::tiny("set");
    for set in
        ["train.epochs", "train.epochs=x", "train.epochs=0", "model.n_modes=[0,4]", "train.epoch=3", "=", "seed.x=1"]
    {
        let done = folder.run(&format!("plan tiny.toml --set {set}")).exits(3);
        done.says(&[&format!("--set {set}"), "help: halfmode"]);
    }
    folder
        .run("plan tiny.toml --device cpu --set precision.compute=tf32")
        .exits(3)
        .says(&["NVIDIA GPUs", "precision.compute"]);
    folder.run("plan tiny.toml --set precision.format=f32").exits(3).says(&["not a half format"]);
}

#[test]
fn sizes_beyond_memory_are_not_tried() {
    let folder = Folder::tiny("memory");
    let big = "--set model.hidden_channels=65536 --set model.n_layers=64";
    folder.run(&format!("train tiny.toml {big}")).exits(6).says(&["help: halfmode"]);
    folder.run(&format!("bench step tiny.toml {big}")).exits(6);
    folder.run("train tiny.toml --set model.hidden_channels=70000").exits(3);
    let modes = "--set model.n_modes=[65536,65536] --set data.resolution=1024";
    folder.run(&format!("plan tiny.toml {big} {modes}")).exits(6);
    assert!(!folder.join("runs").exists());
}

#[test]
fn missing_and_strange_files() {
    let folder = Folder::tiny("missing");
    folder.write("noise", "this is not an array");
    folder.write("empty.npz", "");
    folder.write("noise.safetensors", "\u{1}\u{0}\u{0}\u{0}\u{0}\u{0}\u{0}\u{0}x");
    folder.run("train nothing.toml").exits(3).says(&["nothing.toml", "neither a file nor a preset"]);
    folder.run("train darcyy").exits(3).says(&["nearest preset is `darcy`", "help: halfmode train darcy"]);
    folder.run("train .").exits(3).says(&["config.toml"]);
    folder.run("train /dev/zero").exits(3);
    folder.run("train noise").exits(3).says(&["not TOML"]);
    folder.run("train tiny.toml --resume").exits(7).says(&["no checkpoint", "runs/tiny"]);
    folder.run("train tiny.toml --out noise").exits(2).says(&["is a file"]);
    folder.run("data inspect nothing.npz").exits(4).says(&["nothing.npz", "help:"]);
    folder.run("data inspect noise").exits(4).says(&["no .npz, .npy, .safetensors, .pt or HDF5"]);
    folder.run("data inspect empty.npz").exits(4);
    folder.run("data inspect noise.safetensors").exits(7);
    folder.run("eval nothing").exits(7);
    folder.run("eval .").exits(7).says(&["not a run directory"]);
    folder.run("report .").exits(7);
    folder.run("report nothing").exits(7);
    // The model is read before the input.
    folder.run("predict --model noise --input nothing.npy --output y.npy").exits(7);
    folder.run("data generate darcy --n 0 -o x.npz").exits(3).says(&["`n`"]);
    folder.run("data generate darcy --resolution 5000 -o x.npz").exits(3).says(&["`resolution`"]);
    folder.run("data generate darcy --n 2 --resolution 8 -o noise/x.npz").exits(1);
}

#[test]
fn usage() {
    let folder = Folder::new("usage");
    for line in
        ["", "trian", "train", "train darcy --threads -1", "train darcy --seed x", "plan darcy --memory big", "bench"]
    {
        folder.run(line).exits(2);
    }
    folder.run("train darcy --resume --force").exits(2);
    folder.run("eval x --precision double").exits(2).says(&["full, amp, mixed, half"]);
    folder.run("doctor --device tpu").exits(2);
    for line in ["--help", "--version", "train --help", "bench step --help", "data generate --help"] {
        assert!(!folder.run(line).ok().stdout.is_empty());
    }
}

#[test]
fn a_reader_that_goes_away_is_no_panic() {
    let folder = Folder::new("pipe");
    let line = format!("{} plan darcy | head -c 1; {0} doctor >&- 2>&-; true", env!("CARGO_BIN_EXE_halfmode"));
    let output = Command::new("sh").args(["-c", &line]).current_dir(&folder.path).output().unwrap();
    assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"));
}
