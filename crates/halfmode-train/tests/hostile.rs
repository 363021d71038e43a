//! Model files and foreign configurations with anything in them: a typed error or a usable value.

#![allow(clippy::unwrap_used, reason = "a test")]

use halfmode_data::UnitGaussian;
use halfmode_nn::{Module, Params};
use halfmode_operators::{Fno, FnoConfig};
use halfmode_precision::{Precision, PrecisionConfig, Preset};
use halfmode_tensor::Device;
use halfmode_train::job::{Model, ModelConfig, import_neuraloperator, neuraloperator_config};
use halfmode_train::{Entry, write_named};
use ndarray::{ArrayD, IxDyn};
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

/// A path of its own per call, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let name = format!("halfmode-hostile-{}-{}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed));
        Scratch(std::env::temp_dir().join(name))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn config() -> FnoConfig {
    FnoConfig { n_layers: 1, ..FnoConfig::new(&[3, 3], 2) }
}

fn metadata() -> Value {
    let ones = ArrayD::ones(IxDyn(&[1, 1, 1, 1]));
    let normaliser = UnitGaussian::from_parts(ones.clone(), ones, 1e-7, vec![0, 2, 3]).unwrap();
    json!({
        "format_version": 1,
        "config": ModelConfig::Fno(config()),
        "normalisers": { "input": normaliser, "output": normaliser },
        "precision": PrecisionConfig::new(Preset::Mixed, Precision::F16),
    })
}

/// A model file with this metadata.
fn model_file(metadata: &Value) -> Scratch {
    let fno = Fno::new(config()).unwrap();
    let policy = PrecisionConfig::new(Preset::Full, Precision::F16).resolve().unwrap();
    let params = Params::new(&Device::cpu(1).unwrap(), fno.param_specs(), &policy, 0).unwrap();
    let file = Scratch::new();
    write_named(&file.0, &Entry::parameters(&params).unwrap(), metadata).unwrap();
    file
}

/// Loads and uses it.
fn use_model(file: &Scratch) -> Result<(), String> {
    let device = Device::cpu(1).unwrap();
    let model = Model::load(&file.0, &device, None).map_err(|err| err.to_string())?;
    let x = ArrayD::<f32>::ones(IxDyn(&[2, 1, 6, 5]));
    let y = model.predict(&x.view(), 1).map_err(|err| err.to_string())?;
    assert_eq!(y.shape()[..2], [2, 1]);
    Ok(())
}

/// Every place in a value, as JSON pointers.
fn places(value: &Value, at: &str, into: &mut Vec<String>) {
    into.push(at.to_owned());
    match value {
        Value::Object(map) => map.iter().for_each(|(key, value)| places(value, &format!("{at}/{key}"), into)),
        Value::Array(list) => {
            list.iter().enumerate().for_each(|(idx, value)| places(value, &format!("{at}/{idx}"), into))
        }
        _ => {}
    }
}

/// The value with what stands in one place replaced.
fn replaced(value: &Value, place: &Index, by: Value) -> Value {
    let mut all = Vec::new();
    places(value, "", &mut all);
    let mut value = value.clone();
    *value.pointer_mut(place.get(all.as_slice()).as_str()).unwrap() = by;
    value
}

/// Anything that JSON can hold and that means something somewhere.
fn any_json() -> impl Strategy<Value = Value> {
    const WORDS: [&str; 12] =
        ["fno", "FNO", "none", "f16", "f32", "mixed", "grid", "linear", "soft-gating", "group_norm", "tanh", ""];
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (-3i64..70).prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop::sample::select(&WORDS[..]).prop_map(Value::from),
        prop::collection::vec(0i64..70_000, 0..5).prop_map(Value::from),
        prop::collection::vec(any::<f64>(), 0..3).prop_map(Value::from),
        Just(json!({})),
        Just(json!([[[1]]])),
    ]
}

#[test]
fn the_files_that_are_changed_can_be_used() {
    use_model(&model_file(&metadata())).unwrap();
    assert_eq!(neuraloperator_config(&peer()).unwrap().n_modes, [3, 3]);
}

/// A constructor's arguments under the peer's names.
fn peer() -> Value {
    json!({
        "class": "FNO", "n_modes": [3, 3], "in_channels": 1, "out_channels": 1, "hidden_channels": 2, "n_layers": 1,
        "lifting_channel_ratio": 2, "projection_channel_ratio": 2, "positional_embedding": "grid",
        "non_linearity": "gelu", "norm": null, "complex_data": false, "use_channel_mlp": true,
        "channel_mlp_dropout": 0, "channel_mlp_expansion": 0.5, "channel_mlp_skip": "soft-gating",
        "fno_skip": "linear", "resolution_scaling_factor": null, "domain_padding": null,
        "fno_block_precision": "full", "stabilizer": null, "max_n_modes": null, "factorization": null, "rank": 1.0,
        "fixed_rank_modes": false, "implementation": "factorized", "separable": false, "preactivation": false,
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn changed_metadata_is_refused_or_used(changes in prop::collection::vec((any::<Index>(), any_json()), 1..3)) {
        let mut changed = metadata();
        for (place, by) in changes {
            changed = replaced(&changed, &place, by);
        }
        let _ = use_model(&model_file(&changed));
    }

    #[test]
    fn changed_bytes_are_refused_or_used(
        changes in prop::collection::vec((any::<Index>(), any::<u8>()), 1..4),
        cut in prop::option::of(any::<Index>()),
    ) {
        let file = model_file(&metadata());
        let mut bytes = std::fs::read(&file.0).unwrap();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        std::fs::write(&file.0, &bytes).unwrap();
        let used = use_model(&file);
        prop_assert!(cut.is_none() || used.is_err());
    }

    #[test]
    fn changed_arguments_of_the_peer_are_refused_or_imported(
        changes in prop::collection::vec((any::<Index>(), any_json()), 1..3),
        key in "[a-z_]{0,12}",
        extra in prop::option::of(any_json()),
    ) {
        let mut arguments = peer();
        for (place, by) in changes {
            arguments = replaced(&arguments, &place, by);
        }
        if let (Some(extra), Value::Object(map)) = (extra, &mut arguments) {
            map.insert(key, extra);
        }
        if let Ok(config) = neuraloperator_config(&arguments) {
            // Weights of another model than most of these: told apart before anything is allocated.
            let (weights, out) = (model_file(&metadata()), Scratch::new());
            let _ = import_neuraloperator(&config, &weights.0, &out.0);
        }
    }
}
