//! Recorded models of neuraloperator, through the command line: import, predict, compare.
#![allow(clippy::unwrap_used, reason = "a test")]

mod common;

use common::Folder;
use halfmode::data::numpy::{read_npy, write_npy};
use halfmode_testkit::Golden;
use ndarray::{ArrayD, IxDyn};
use serde_json::{Map, Value, json};

/// How complex weights stand in the file.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Complex {
    /// As F32 with a last dimension of 2.
    Pairs,
    /// As C64.
    C64,
}

const IMPORT: &str = "import neuraloperator --config config.json --weights weights.safetensors -o model.safetensors";

/// Writes a case's weights under the peer's names.
fn write_weights(folder: &Folder, golden: &Golden, complex: Complex) {
    let (mut header, mut data) = (Map::new(), Vec::new());
    for name in golden.names("param/") {
        let (shape, values) = golden.get(&format!("param/{name}"));
        let start = data.len();
        data.extend(values.iter().flat_map(|&value| (value as f32).to_le_bytes()));
        let (dtype, shape) = match shape {
            // Spectral weights are the only complex ones.
            [shape @ .., 2] if name.contains("convs") && name.contains("weight") && complex == Complex::C64 => {
                ("C64", shape)
            }
            _ => ("F32", shape),
        };
        header.insert(name.to_owned(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, data.len()] }));
        if let Some(norm) = name.strip_suffix("running_mean") {
            let (name, start) = (format!("{norm}num_batches_tracked"), data.len());
            data.extend(7i64.to_le_bytes());
            header.insert(name, json!({ "dtype": "I64", "shape": [], "data_offsets": [start, data.len()] }));
        }
    }
    let header = Value::Object(header).to_string();
    let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &data].concat();
    std::fs::write(folder.join("weights.safetensors"), bytes).unwrap();
}

/// Imports a recorded model and compares its predictions with the peer's double precision.
fn check(folder: &Folder, name: &str, complex: Complex) {
    let golden = Golden::load(name);
    let mut config = golden.fact("config").clone();
    let arguments = config.as_object_mut().unwrap();
    arguments.remove("forward_kwargs");
    arguments.remove("cls");
    arguments.insert("class".to_owned(), json!("FNO"));
    folder.write("config.json", &config.to_string());
    write_weights(folder, &golden, complex);
    folder.run(IMPORT).ok();
    let (shape, x) = golden.get("in/x");
    let x = ArrayD::from_shape_vec(IxDyn(shape), x.iter().map(|&value| value as f32).collect()).unwrap();
    write_npy(&folder.join("x.npy"), &x.view()).unwrap();
    let output_shape = match golden.fact("output_shape") {
        Value::Array(shape) => {
            let shape: Vec<String> = shape.iter().map(Value::to_string).collect();
            format!(" --output-shape {}", shape.join(","))
        }
        _ => String::new(),
    };
    folder.run(&format!("predict --model model.safetensors --input x.npy --output y.npy{output_shape}")).ok();
    let y = read_npy::<f32>(&folder.join("y.npy")).unwrap();
    let recorded = if golden.names("f64/").any(|it| it == "evaluation") { "f64/evaluation" } else { "f64/out" };
    let (shape, want) = golden.get(recorded);
    assert_eq!(y.shape(), shape, "{name}");
    let y: Vec<f64> = y.iter().map(|&value| f64::from(value)).collect();
    halfmode_testkit::assert_close!(format!("{name}, {complex:?}"), y, *want, golden.f32_tolerance("out"));
}

#[test]
fn models_of_the_acceptance_set() {
    let folder = Folder::new("import-golden");
    for name in ["fno1d", "fno2d", "fno3d"] {
        check(&folder, name, Complex::Pairs);
        check(&folder, name, Complex::C64);
    }
}

#[test]
fn models_with_every_option() {
    let folder = Folder::new("import-options");
    let names = Golden::list("fno_options");
    assert!(names.len() >= 47, "{names:?}");
    for (idx, name) in names.iter().enumerate() {
        check(&folder, name, if idx % 2 == 0 { Complex::Pairs } else { Complex::C64 });
    }
}

#[test]
fn models_with_batch_norm() {
    let folder = Folder::new("import-batch-norm");
    for name in Golden::list("batch_norm") {
        check(&folder, &name, Complex::C64);
    }
}

/// Running statistics move in training, are used in evaluation, and survive a resume bit for bit.
#[test]
fn batch_norm_in_a_job() {
    let folder = Folder::tiny("batch-norm");
    folder.run("train tiny.toml --set model.norm=batch_norm --out a").ok();
    folder.run("train tiny.toml --set model.norm=batch_norm --set train.epochs=1 --out b").ok();
    folder.run("train tiny.toml --set model.norm=batch_norm --out b --resume").ok();
    let tensors = |run: &str| halfmode::train::read_named(folder.join(run).join("checkpoints/latest")).unwrap().0;
    let (a, b) = (tensors("a"), tensors("b"));
    assert!(a.len() > 40 && a.len() == b.len());
    for (name, array) in &a {
        let bits = |values: Vec<f64>| values.into_iter().map(f64::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(array.to_f64()), bits(b[name].to_f64()), "{name}");
    }
    let var = a["fno_blocks.norm.1.norm.running_var"].to_f64();
    assert!(var.iter().all(|&var| var > 0.0 && (var - 1.0).abs() > 1e-6), "{var:?}");
    folder.run("eval a").ok();
}

#[test]
fn what_does_not_fit_is_refused() {
    let folder = Folder::new("import-refused");
    write_weights(&folder, &Golden::load("fno2d"), Complex::Pairs);
    let config = |text: &str| folder.write("config.json", text);
    config("{ \"n_modes\": [8, 8], \"hidden_channels\": 7 }");
    folder.run(IMPORT).exits(7).says(&["weights.safetensors", "should have shape"]);
    config("{ \"n_modes\": [8, 8], \"hidden_channels\": 6, \"class\": \"UNO\" }");
    folder.run(IMPORT).exits(3).says(&["config.json", "UNO"]);
    for (key, value) in [("factorization", "\"Tucker\""), ("norm", "\"ada_in\""), ("norm_groups", "2")] {
        config(&format!("{{ \"n_modes\": [8, 8], \"hidden_channels\": 6, \"{key}\": {value} }}"));
        folder.run(IMPORT).exits(3).says(&["config.json", key, value.trim_matches('"')]);
    }
    config("{ \"n_modes\": [8, 8]");
    folder.run(IMPORT).exits(3).says(&["config.json", "not JSON"]);
    folder.run(&IMPORT.replace("config.json", "none.json")).exits(3).says(&["none.json"]);
    config("{ \"n_modes\": [8, 8], \"hidden_channels\": 6 }");
    folder.run(&IMPORT.replace("weights.", "nothing.")).exits(7).says(&["nothing.safetensors"]);
}

/// Complex fields have a last axis of 2; nothing else is taken for one.
#[test]
fn complex_fields_need_both_parts() {
    let folder = Folder::new("import-complex");
    check(&folder, "fno_options/fno2d_complex", Complex::C64);
    write_npy(&folder.join("x.npy"), &ArrayD::<f32>::zeros(IxDyn(&[1, 2, 10, 12])).view()).unwrap();
    let predict = "predict --model model.safetensors --input x.npy --output y.npy";
    folder.run(predict).exits(4).says(&["[1, 2, 10, 12]", "real and imaginary part"]);
    write_npy(&folder.join("x.npy"), &ArrayD::<f32>::zeros(IxDyn(&[1, 2, 10, 12, 3])).view()).unwrap();
    folder.run(predict).exits(4);
}

/// A job takes the peer's keys as they are, and says which of their values it does not know yet.
#[test]
fn the_peers_keys_in_a_job() {
    let folder = Folder::tiny("import-keys");
    let keys = "positional_embedding = \"grid\"\nnorm_groups = 1\nimplementation = \"factorized\"\nrank = 1.0\n\
        factorization = \"dense\"\nenforce_hermitian_symmetry = false\ncomplex_data = false\nseparable = false\n";
    folder.write("keys.toml", &common::TINY.replace("n_layers = 2\n", &format!("n_layers = 2\n{keys}")));
    folder.run("plan keys.toml").ok();
    for (set, words) in [
        ("model.factorization=tucker", ["model.factorization", "not supported yet"]),
        ("model.norm_groups=2", ["model.norm_groups", "not supported yet"]),
        ("model.complex_data=true", ["model.complex_data", "these data are real"]),
        ("model.norm=ada_in", ["model.norm", "ada_in"]),
    ] {
        folder.run(&format!("plan keys.toml --set {set}")).exits(3).says(&words);
    }
}
