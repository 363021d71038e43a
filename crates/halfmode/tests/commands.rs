//! What the commands around `train` print and write.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod common;

use common::{Folder, has_keys};
use halfmode::data::numpy::{NpzArray, read_npy, write_npy, write_npz};
use halfmode::train::{Entry, Values, read_named, write_named};
use ndarray::{ArrayD, IxDyn};
use serde_json::{Value, json};

#[test]
fn doctor_says_what_there_is() {
    let folder = Folder::new("doctor");
    let object = folder.json("doctor");
    has_keys(&object, &["command", "version", "cpu", "memory", "threads", "gpu"]);
    assert_eq!(object["threads"], json!(1));
}

#[test]
fn plan_compares_with_full() {
    let folder = Folder::tiny("plan");
    let object = folder.json("plan tiny.toml --memory 1GiB");
    let keys = [
        "n_parameters",
        "step_flops",
        "configured",
        "full",
        "peak_activation_ratio",
        "saved",
        "memory_bytes",
        "largest_batch",
    ];
    has_keys(&object, &keys);
    has_keys(&object["configured"], &["peak_bytes", "peak_activation_bytes", "by_purpose", "saved_bytes"]);
    assert_eq!((&object["memory_bytes"], &object["largest_batch"]), (&json!(1 << 30), &json!(8)));
    assert!(object["peak_activation_ratio"].as_f64().unwrap() < 1.0);
    let text = folder.run("plan tiny.toml").ok().stdout;
    for word in ["parameters", "activation", "kept for backward", "accumulate", "largest batch"] {
        assert!(text.contains(word), "no `{word}` in {text}");
    }

    // Every preset, in both half formats: bytes by purpose and by op, and its own largest batch.
    let precisions = object["precisions"].as_array().unwrap();
    assert_eq!(precisions.len(), 7);
    for column in precisions {
        let keys = ["preset", "format", "legal", "peak_bytes", "by_purpose", "by_op", "largest_batch"];
        has_keys(column, &keys);
        let by_op: u64 = column["by_op"].as_object().unwrap().values().map(|bytes| bytes.as_u64().unwrap()).sum();
        assert_eq!(column["saved_bytes"], by_op);
    }
    let of = |preset: &str, format: &str, key: &str| {
        let found = precisions.iter().find(|it| it["preset"] == preset && it["format"] == format);
        found.unwrap()[key].as_u64().unwrap()
    };
    assert_eq!(of("full", "f16", "peak_bytes"), object["full"]["peak_bytes"].as_u64().unwrap());
    assert_eq!(of("mixed", "f16", "peak_bytes"), object["configured"]["peak_bytes"].as_u64().unwrap());
    assert_eq!(of("mixed", "bf16", "saved_bytes"), of("mixed", "f16", "saved_bytes"));
    assert!(of("mixed", "f16", "saved_bytes") < of("full", "f16", "saved_bytes"));
    let at = |memory: u64| folder.json(&format!("plan tiny.toml --set data.n_train=64 --memory {memory}"));
    let batches = |object: &Value| -> Vec<u64> {
        object["precisions"].as_array().unwrap().iter().map(|it| it["largest_batch"].as_u64().unwrap_or(0)).collect()
    };
    let wide = folder.json("plan tiny.toml --set data.n_train=64 --set train.batch_size=16");
    let batches = batches(&at(wide["precisions"][0]["peak_bytes"].as_u64().unwrap()));
    assert!(batches[0] == 16 && batches[0] < batches[2], "full {} mixed {}", batches[0], batches[2]);
    assert!(folder.run("plan tiny.toml").ok().stdout.contains("kept by fno_block"));

    // The largest batch fits, one more does not.
    let peak = |batch: u64| {
        let object = folder.json(&format!("plan tiny.toml --set data.n_train=64 --set train.batch_size={batch}"));
        object["configured"]["peak_bytes"].as_u64().unwrap()
    };
    let memory = peak(21);
    let object = folder.json(&format!("plan tiny.toml --set data.n_train=64 --memory {memory}"));
    let largest = object["largest_batch"].as_u64().unwrap();
    assert!(largest >= 21 && peak(largest) <= memory && (largest == 64 || peak(largest + 1) > memory), "{largest}");
    assert_eq!(folder.json("plan tiny.toml --memory 1KiB")["largest_batch"], Value::Null);
}

#[test]
fn bench_step_measures_what_plan_says() {
    let folder = Folder::tiny("bench");
    let object = folder.json("bench step tiny.toml --iterations 4 --warmup 1");
    let keys = [
        "step_ms",
        "p10_ms",
        "p90_ms",
        "samples_per_s",
        "peak_bytes",
        "planned_peak_bytes",
        "peak_activation_bytes",
        "peak_rss_bytes",
        "device_peak_bytes",
        "n_parameters",
    ];
    has_keys(&object, &keys);
    let number = |key: &str| object[key].as_f64().unwrap();
    assert!(number("p10_ms") <= number("step_ms") && number("step_ms") <= number("p90_ms"));
    assert!((number("peak_bytes") / number("planned_peak_bytes") - 1.0).abs() < 0.01, "{object}");
    assert!(number("peak_rss_bytes") > number("peak_bytes"));
    assert_eq!(object["device_peak_bytes"], Value::Null);
    assert_eq!(object["n_parameters"], folder.json("plan tiny.toml")["n_parameters"]);
    assert!(folder.run("bench step tiny.toml --iterations 1").ok().stdout.contains("samples/s"));
}

#[test]
fn kernels_are_timed_in_every_precision() {
    let folder = Folder::new("kernels");
    for kernel in ["transform", "contract"] {
        let sizes = "--grid 16,12 --modes 6,4 --batch 2 --channels 3 --iterations 3";
        let object = folder.json(&format!("bench {kernel} {sizes}"));
        assert_eq!((&object["command"], &object["kernel"]), (&json!(format!("bench {kernel}")), &json!(kernel)));
        let rows = object["rows"].as_array().unwrap();
        let precisions: Vec<&str> = rows.iter().map(|row| row["precision"].as_str().unwrap()).collect();
        assert_eq!(precisions, ["f32", "f16", "bf16"]);
        for row in rows {
            let number = |key: &str| row[key].as_f64().unwrap();
            assert!(number("p10_ms") <= number("ms") && number("ms") <= number("p90_ms") && number("ms") > 0.0);
        }
        assert!(rows[1]["peak_bytes"].as_u64() < rows[0]["peak_bytes"].as_u64(), "{object}");
        assert!(folder.run(&format!("bench {kernel} --iterations 1")).ok().stdout.contains("bf16"));
        let large = "--grid 65536,65536 --modes 65536,32769 --channels 1024";
        folder.run(&format!("bench {kernel} {large}")).exits(6).says(&["memory"]);
    }
    folder.run("bench transform --grid 8,8 --modes 9,2").exits(3).says(&["help: halfmode bench transform"]);
    folder.run("bench transform --grid 8,8 --modes 4").exits(3);
    folder.run("bench transform --grid 0,8").exits(2);
}

#[test]
fn generated_data_repeats_at_any_number_of_threads() {
    let folder = Folder::new("generate");
    let line = "data generate darcy --n 3 --resolution 12 --seed 7";
    folder.run(&format!("{line} -o a.npz")).ok();
    let mut command = folder.command("");
    command.args(line.split(' ')).args(["-o", "b.npz"]);
    assert_eq!(command.output().unwrap().status.code(), Some(0));
    folder.run(&format!("{line} --test -o sub/c.npz")).ok();
    let read = |name: &str| std::fs::read(folder.join(name)).unwrap();
    assert_eq!(read("a.npz"), read("b.npz"));
    assert_ne!(read("a.npz"), read("sub/c.npz"));

    let object = folder.json("data inspect a.npz");
    assert_eq!(object["kind"], "npz");
    let x = &object["arrays"][0];
    assert_eq!((&x["name"], &x["dtype"], &x["shape"]), (&json!("x"), &json!("f32"), &json!([3, 1, 12, 12])));
    assert_eq!((&x["min"], &x["max"], &x["f16"]["overflow_share"]), (&json!(3.0), &json!(12.0), &json!(0.0)));
}

#[test]
fn flows_are_generated_planned_trained_and_evaluated() {
    let folder = Folder::tiny("flows");
    for (kind, modes, grid) in [("burgers", "[4]", json!([15])), ("navier-stokes", "[4,4]", json!([15, 15]))] {
        let line = format!("data generate {kind} --n 2 --resolution 15 --seed 7 --time 0.5");
        folder.run(&format!("{line} -o {kind}-1.npz")).ok();
        let mut threads = std::process::Command::new(env!("CARGO_BIN_EXE_halfmode"));
        threads.current_dir(&folder.path).args(line.split(' ')).args([
            "--threads",
            "3",
            "-o",
            &format!("{kind}-3.npz"),
        ]);
        assert!(threads.output().unwrap().status.success());
        let read = |n: usize| std::fs::read(folder.join(&format!("{kind}-{n}.npz"))).unwrap();
        assert_eq!(read(1), read(3));
        let shape = folder.json(&format!("data inspect {kind}-1.npz"))["arrays"][1]["shape"].clone();
        assert_eq!(shape.as_array().unwrap()[2..], grid.as_array().unwrap()[..]);

        let data = "n_train=4,n_test=2,resolution=16,test_resolutions=[16,21],time=0.5";
        let sets = [format!("data={{kind=\"{kind}\",{data}}}"), format!("model.n_modes={modes}")];
        let with_sets = |line: &str| {
            let mut command = folder.command(line);
            sets.iter().for_each(|set| _ = command.args(["--set", set]));
            assert_eq!(command.output().unwrap().status.code(), Some(0), "{line}");
        };
        with_sets("plan tiny.toml");
        with_sets(&format!("train tiny.toml --out {kind} --plots 1"));
        let rows = folder.json(&format!("eval {kind} --resolution 16,24"));
        assert_eq!(rows["eval"].as_object().map_or(0, serde_json::Map::len), 2, "{rows}");
    }
}

#[test]
fn inspect_counts_what_f16_would_lose() {
    let folder = Folder::new("inspect");
    let values = vec![0.0, 1e-9, 6e-6, 1.0, 7e4, f32::NAN, f32::INFINITY, -2.0];
    let array = ArrayD::from_shape_vec(IxDyn(&[2, 4]), values).unwrap();
    write_npy(&folder.join("a.npy"), &array.view()).unwrap();
    let object = folder.json("data inspect a.npy");
    let row = &object["arrays"][0];
    let half = json!({ "flushed_share": 0.125, "subnormal_share": 0.125, "overflow_share": 0.25 });
    assert_eq!((&row["name"], &row["n_nan"], &row["f16"], &row["min"]), (&json!("a"), &json!(1), &half, &json!(-2.0)));
    let entry = Entry::values("w", &[1, 2], Values::F32(vec![1.0, 2.0]));
    write_named(folder.join("b.safetensors"), &[entry], &Value::Null).unwrap();
    assert_eq!(folder.json("data inspect b.safetensors")["arrays"][0]["shape"], json!([1, 2]));
    assert!(folder.run("data inspect a.npy").ok().stdout.contains("f16 flushed"));
}

#[test]
fn a_checkpoint_can_be_looked_into() {
    let folder = Folder::tiny("look");
    folder.run("train tiny.toml --plots 0").ok();
    let object = folder.json("inspect runs/tiny/checkpoints/latest");
    assert_eq!((&object["command"], &object["kind"]), (&json!("inspect"), &json!("safetensors")));
    assert_eq!(folder.json("inspect runs/tiny"), object);
    let model = &object["model"];
    assert_eq!((&model["epoch"], &model["step"], &model["config"]["n_layers"]), (&json!(2), &json!(8), &json!(2)));
    assert_eq!(model["precision"]["preset"], "mixed");
    let rows = object["arrays"].as_array().unwrap();
    let weight = rows.iter().find(|row| row["name"] == "lifting.fcs.0.weight").unwrap();
    assert_eq!((&weight["shape"], &weight["dtype"]), (&json!([8, 3, 1]), &json!("f32")));
    assert!(weight["absmax"].as_f64().unwrap() > 0.0);
    has_keys(&weight["f16"], &["flushed_share", "subnormal_share", "overflow_share"]);
    let text = folder.run("inspect runs/tiny/checkpoints/best").ok().stdout;
    assert!(text.starts_with("model fno, trained in mixed f16\n") && text.contains("f16 subnormal"), "{text}");
    // Data have no model.
    folder.run("data generate darcy --n 2 --resolution 8 -o data.npz").ok();
    let (top, data) = (folder.json("inspect data.npz"), folder.json("data inspect data.npz"));
    assert_eq!((&top["arrays"], &top["model"]), (&data["arrays"], &Value::Null));
}

#[test]
fn a_trained_model_evaluates_and_predicts() {
    let folder = Folder::tiny("use");
    folder.run("train tiny.toml --plots 0").ok();
    let summary: Value =
        serde_json::from_str(&std::fs::read_to_string(folder.join("runs/tiny/summary.json")).unwrap()).unwrap();

    let object = folder.json("eval runs/tiny --resolution 16,20,24 --plots 1");
    has_keys(&object, &["model", "precision", "eval", "plots", "n_parameters"]);
    has_keys(&object["eval"]["24"], &["n", "l2", "h1"]);
    // The best model is that of the last epoch or an earlier one that was better at 16.
    let l2 = |it: &Value| it["eval"]["16"]["l2"].as_f64().unwrap();
    assert!(l2(&object) <= l2(&summary) * (1.0 + 1e-3), "{} {}", l2(&object), l2(&summary));
    assert!(folder.join("runs/tiny/plots/eval-24-sample-0.png").is_file());
    let full = folder.json("eval runs/tiny --precision full");
    assert_eq!(full["precision"], "full");
    assert!((l2(&full) / l2(&object) - 1.0).abs() < 0.02);
    assert!(
        folder.run("eval runs/tiny/checkpoints/best --resolution 16 --precision mixed:bf16").ok().stdout.contains("L2")
    );
    folder.run("eval runs/tiny --resolution 2").exits(3).says(&["resolution 2", "the model keeps"]);
    folder.run("eval runs/tiny --resolution 99999").exits(3);

    folder.run("data generate darcy --n 3 --resolution 16 --test -o test.npz").ok();
    let model = "predict --model runs/tiny/checkpoints/best";
    let object = folder.json(&format!("{model} --input test.npz --output y.npy --batch 2"));
    assert_eq!(object["output"]["shape"], json!([3, 1, 16, 16]));
    let y = read_npy::<f32>(&folder.join("y.npy")).unwrap();
    assert!(y.shape() == [3, 1, 16, 16] && y.iter().all(|value| value.is_finite()));
    folder.run("predict --model runs/tiny --input test.npz --key x --output z.npy --precision full").ok();
    // Some tenths of a percent of half precision, against a scale of about 0.01.
    let z = read_npy::<f32>(&folder.join("z.npy")).unwrap();
    let scale = z.iter().fold(0f32, |most, value| most.max(value.abs()));
    assert!(y.iter().zip(&z).all(|(y, z)| (y - z).abs() <= 0.02 * scale));

    folder.run(&format!("{model} --input test.npz --key q --output w.npy")).exits(4).says(&["no array `q`", "`x`"]);
    folder.run(&format!("{model} --input nothing.npy --output w.npy")).exits(4);
    write_npy(&folder.join("flat.npy"), &ArrayD::<f32>::zeros(IxDyn(&[3, 1, 16])).view()).unwrap();
    folder.run(&format!("{model} --input flat.npy --output w.npy")).exits(4).says(&["flat.npy", "2 spatial axes"]);
    write_npy(&folder.join("none.npy"), &ArrayD::<f32>::zeros(IxDyn(&[0, 1, 16, 16])).view()).unwrap();
    folder.run(&format!("{model} --input none.npy --output w.npy")).exits(4);
    write_npy(&folder.join("coarse.npy"), &ArrayD::<f32>::zeros(IxDyn(&[1, 1, 2, 2])).view()).unwrap();
    folder.run(&format!("{model} --input coarse.npy --output w.npy")).exits(0).says(&["resolve", "left out"]);
    let coarse = ArrayD::<f32>::ones(IxDyn(&[1, 1, 2, 2]));
    let pair = ["x", "y"].map(|name| (name, NpzArray::F32(coarse.view())));
    write_npz(&folder.join("coarse.npz"), &pair).unwrap();
    folder.run("eval runs/tiny --data coarse.npz").exits(4).says(&["too coarse", "the model keeps"]);
    let object = folder.json(&format!("{model} --input test.npz --output fine.npy --output-shape 24,20"));
    assert_eq!(object["output"]["shape"], json!([3, 1, 24, 20]));
    folder
        .run(&format!("{model} --input test.npz --output w.npy --output-shape 24"))
        .exits(2)
        .says(&["2 spatial axes"]);
    folder.run(&format!("{model} --input test.npz --output w.npy --output-shape 0,8")).exits(2);

    broken_models(&folder);
}

/// Models that are cut short, have a tensor of another shape, or one too few.
fn broken_models(folder: &Folder) {
    let best = folder.join("runs/tiny/checkpoints/best");
    let bytes = std::fs::read(&best).unwrap();
    std::fs::write(folder.join("cut.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    folder.run("predict --model cut.safetensors --input test.npz --output w.npy").exits(7);
    let (arrays, metadata) = read_named(&best).unwrap();
    let entries = |skip: &str| -> Vec<Entry<'static>> {
        let kept = arrays.iter().filter(|(name, _)| *name != skip);
        kept.map(|(name, array)| Entry::values(name.clone(), &array.shape, array.values.clone())).collect()
    };
    write_named(folder.join("less.safetensors"), &entries("lifting.fcs.0.bias"), &metadata).unwrap();
    folder.run("eval less.safetensors").exits(7).says(&["lifting.fcs.0.bias"]);
    write_named(folder.join("bare.safetensors"), &entries(""), &Value::Null).unwrap();
    folder.run("eval bare.safetensors").exits(7).says(&["metadata"]);
    let mut wide = metadata.clone();
    wide["config"]["hidden_channels"] = json!(5);
    write_named(folder.join("wide.safetensors"), &entries(""), &wide).unwrap();
    folder.run("eval wide.safetensors").exits(7).says(&["shape"]);
    std::fs::write(folder.join("runs/tiny/checkpoints/best"), b"").unwrap();
    folder.run("eval runs/tiny").exits(7);
}

#[test]
fn files_of_torch_are_data_too() {
    let folder = Folder::new("torch");
    let recorded = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/torch/small.pt");
    std::fs::copy(recorded, folder.join("small.pt")).unwrap();
    let object = folder.json("data import small.pt -o all.npz --add-channels");
    assert_eq!(object["arrays"]["y"], json!([2, 1, 3, 4]));
    let arrays = folder.json("data inspect all.npz");
    assert_eq!(arrays["arrays"].as_array().unwrap().len(), 12);
    folder.run("data inspect small.pt").ok();
    folder.run("data import small.pt all.npz -o two.npz").exits(4).says(&["two files hold an array"]);
    folder.run("data import nothing.pt -o none.npz").exits(4).says(&["nothing.pt"]);
    let bytes = std::fs::read(folder.join("small.pt")).unwrap();
    std::fs::write(folder.join("cut.pt"), &bytes[..bytes.len() / 2]).unwrap();
    folder.run("data import cut.pt -o none.npz").exits(4).says(&["cut.pt"]);
    assert!(!folder.join("none.npz").exists() && !folder.join("two.npz").exists());
}

#[test]
fn files_of_hdf5_are_data_too() {
    let folder = Folder::new("hdf5");
    let recorded = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/hdf5");
    for name in ["small.h5", "v73.mat", "four.nc"] {
        std::fs::copy(recorded.join(name), folder.join(name)).unwrap();
    }
    let object = folder.json("data import small.h5 -o all.npz");
    assert_eq!(object["arrays"]["group/inner/f32"], json!([3, 4]));
    assert_eq!(object["arrays"]["c64"], json!([2, 3, 4, 2]));
    assert_eq!(object["left_out"].as_array().unwrap().len(), 6);
    let (before, after) = (folder.json("data inspect small.h5"), folder.json("data inspect all.npz"));
    assert_eq!((&before["kind"], &before["unreadable"][1]["name"]), (&json!("hdf5"), &json!("bytes")));
    assert_eq!(before["arrays"][4]["dtype"], "cf32");
    for (before, after) in before["arrays"].as_array().unwrap().iter().zip(after["arrays"].as_array().unwrap()) {
        assert_eq!((&before["name"], &before["shape"]), (&after["name"], &after["shape"]));
        let [before, after] = [before, after].map(|row| row["absmax"].as_f64().map(|value| value as f32));
        assert_eq!(before, after);
    }
    let matlab = folder.json("data import v73.mat -o matlab.npz --add-channels");
    assert_eq!((&matlab["arrays"]["a"], &matlab["left_out"][0]["name"]), (&json!([2, 1, 3, 4]), &json!("name")));
    assert_eq!(folder.json("data import four.nc -o four.npz")["arrays"], json!({ "u": [3, 4], "x": [4] }));
}

#[test]
fn the_examples_are_legal() {
    let examples = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples");
    let folder = Folder::new("examples");
    for name in ["darcy", "darcy-small"] {
        folder.run(&format!("plan {}", examples.join(name).with_extension("toml").display())).ok();
    }
    // Its configuration is in order; its data is not there yet.
    folder.run(&format!("plan {}", examples.join("from-files.toml").display())).exits(4).says(&["data/train.npz"]);
    let preset = folder.json("plan darcy");
    let file = folder.json(&format!("plan {}", examples.join("darcy.toml").display()));
    assert_eq!(preset["config"], file["config"]);
}
