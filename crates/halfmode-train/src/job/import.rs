//! Models of neuraloperator.

use crate::job::model_file::{FORMAT_VERSION, Metadata, check_arrays};
use crate::job::{JobError, ModelConfig};
use crate::{Entry, load_parameters, read_named, write_named};
use halfmode_nn::{Module, Params};
use halfmode_operators::{Fno, FnoConfig};
use halfmode_precision::{Precision, PrecisionConfig, Preset};
use halfmode_tensor::Device;
use serde_json::{Map, Value, json};
use std::path::Path;

/// The configuration of a neuraloperator model from its constructor's arguments as JSON, under the
/// peer's names; `null` means what `None` means there. `"class"`, if present, must be `"FNO"`.
///
/// Arguments that have no meaning here are read and checked: precision is chosen when the model runs, dropout
/// must be off, the activation GELU.
///
/// # Errors
/// [`JobError::Config`] with the argument that cannot be used.
pub fn neuraloperator_config(arguments: &Value) -> Result<FnoConfig, JobError> {
    let bad = |key: &str, why: String| JobError::Config { key: key.to_owned(), why };
    let Value::Object(arguments) = arguments else {
        return Err(bad("CONFIG", "is not a JSON object of constructor arguments".to_owned()));
    };
    let mut model = Map::new();
    for (key, value) in arguments {
        // The peer's configurations write None as a word, too.
        let value = if matches!(value.as_str(), Some("None" | "none")) { &Value::Null } else { value };
        let absent = value.is_null();
        let required = |legal: bool, only: &str| {
            if legal { Ok(()) } else { Err(bad(key, format!("is {value}; only {only} can be imported"))) }
        };
        match key.as_str() {
            "class" => required(value == "FNO", "\"FNO\"")?,
            "channel_mlp_dropout" => required(absent || value.as_f64().is_some_and(|p| p.abs() <= 0.0), "0")?,
            "non_linearity" => required(absent || value == "gelu", "\"gelu\"")?,
            "conv_module" => required(absent || value == "SpectralConv", "\"SpectralConv\"")?,
            "norm" => required(
                absent || ["instance_norm", "group_norm", "batch_norm"].iter().any(|norm| value == norm),
                "null, \"instance_norm\", \"group_norm\" and \"batch_norm\"",
            )
            .map(|()| _ = model.insert(key.clone(), value.clone()))?,
            // Chosen when the model runs, or without effect on dense weights.
            "fno_block_precision" | "fixed_rank_modes" | "decomposition_kwargs" => {}
            "n_modes" | "max_n_modes" if value.is_u64() => _ = model.insert(key.clone(), json!([value])),
            // Here null means something else than a missing key.
            "fno_skip" | "channel_mlp_skip" | "positional_embedding" => _ = model.insert(key.clone(), value.clone()),
            _ if absent => {}
            _ => _ = model.insert(key.clone(), value.clone()),
        }
    }
    let config: FnoConfig =
        serde_json::from_value(Value::Object(model)).map_err(|err| bad("CONFIG", err.to_string()))?;
    config.validate()?;
    Ok(config)
}

/// Writes a model file from weights of neuraloperator: tensors under the peer's `state_dict` names, complex
/// ones as C64 or as F32 with a trailing dimension of 2. Returns the number of parameters.
///
/// # Errors
/// [`JobError::ModelFile`] if the weights cannot be read, lack a tensor, have one of another shape, or
/// one that the configuration does not explain; those of writing.
pub fn import_neuraloperator(config: &FnoConfig, weights: &Path, out: &Path) -> Result<usize, JobError> {
    let bad = |why: String| JobError::ModelFile { path: weights.to_owned(), why };
    let (arrays, _) = read_named(weights).map_err(|err| bad(err.to_string()))?;
    let fno = Fno::new(config.clone())?;
    let specs = fno.param_specs();
    check_arrays(&specs, &arrays).map_err(bad)?;
    // The peer counts batches without using the number.
    let unused = |name: &str| name == "_metadata" || name.ends_with(".num_batches_tracked");
    let known = |name: &str| unused(name) || specs.iter().any(|spec| spec.name == name);
    if let Some(name) = arrays.keys().find(|name| !known(name)) {
        return Err(bad(format!("tensor `{name}` does not belong to this configuration")));
    }
    let device = Device::cpu(1)?;
    let precision = PrecisionConfig::new(Preset::Full, Precision::F16);
    let mut params = Params::new(&device, specs, &precision.resolve()?, 0)?;
    load_parameters(&mut params, &arrays).map_err(|err| bad(err.to_string()))?;
    let metadata = Metadata {
        format_version: FORMAT_VERSION,
        config: ModelConfig::Fno(config.clone()),
        normalisers: None,
        precision,
        job: None,
        state: None,
    };
    let metadata = serde_json::to_value(metadata).map_err(|err| bad(err.to_string()))?;
    let entries = params.list.iter().map(Entry::parameter).collect::<crate::Result<Vec<_>>>()?;
    write_named(out, &entries, &metadata)?;
    Ok(params.n_scalars())
}

#[cfg(test)]
mod tests {
    use super::*;
    use halfmode_operators::{Norm, Numbers, PositionalEmbedding, Skip};

    #[test]
    fn arguments_under_the_peers_names() {
        let config = neuraloperator_config(&json!({
            "class": "FNO", "n_modes": [8, 6], "in_channels": 3, "out_channels": 1, "hidden_channels": 16,
            "norm": "group_norm", "fno_skip": null, "channel_mlp_skip": "identity", "positional_embedding": null,
            "domain_padding": [0.25, 0], "resolution_scaling_factor": null, "factorization": null, "rank": 1.0,
            "implementation": "factorized", "stabilizer": "None", "max_n_modes": null, "lifting_channel_ratio": 2,
            "complex_data": true, "enforce_hermitian_symmetry": false, "decomposition_kwargs": {},
            "fno_block_precision": "full", "fixed_rank_modes": false, "channel_mlp_dropout": 0,
        }));
        let want = FnoConfig {
            in_channels: 3,
            norm: Norm::GroupNorm,
            fno_skip: Skip::None,
            channel_mlp_skip: Skip::Identity,
            positional_embedding: PositionalEmbedding::None,
            domain_padding: Numbers::Each(vec![0.25, 0.0]),
            complex_data: true,
            enforce_hermitian_symmetry: false,
            rank: Some(1.0),
            implementation: Some("factorized".to_owned()),
            ..FnoConfig::new(&[8, 6], 16)
        };
        assert_eq!(config.unwrap(), want);
        assert_eq!(
            neuraloperator_config(&json!({ "n_modes": 8, "hidden_channels": 4 })).unwrap(),
            FnoConfig::new(&[8], 4)
        );
    }

    #[test]
    fn what_cannot_be_imported_is_named() {
        let message = |key: &str, value: Value| {
            let mut arguments = json!({ "n_modes": [8], "hidden_channels": 4 });
            arguments[key] = value;
            neuraloperator_config(&arguments).unwrap_err().to_string()
        };
        assert!(message("class", json!("UNO")).contains("class: is \"UNO\""));
        for kind in ["Tucker", "cp", "TT"] {
            assert!(message("factorization", json!(kind)).contains("factorised weights are not supported yet"));
        }
        assert!(message("norm_groups", json!(2)).contains("not supported yet"));
        assert!(message("channel_mlp_dropout", json!(0.1)).contains("dropout"));
        assert!(message("norm", json!("ada_in")).contains("ada_in"));
        assert!(message("n_modse", json!(3)).contains("n_modse"));
        assert!(message("hidden_channels", json!(0)).contains("hidden_channels"));
        assert!(neuraloperator_config(&json!([1])).is_err());
    }
}
