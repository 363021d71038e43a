//! The `[precision]` table of a configuration file.

use crate::{Compute, Error, LossScale, OpPrecision, Precision, PrecisionPolicy, Preset};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The `[precision]` table: a preset, and what departs from it.
///
/// Keys that are absent take the preset's value. The default is `mixed` in f16 with f32 compute.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PrecisionConfig {
    /// Where the policy starts from.
    pub preset: Preset,
    /// The half format, f16 or bf16.
    pub format: Precision,
    /// What products of f32 values may use.
    pub compute: Compute,
    /// Replaces [`PrecisionPolicy::transform`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub transform: Option<OpPrecision>,
    /// Replaces [`PrecisionPolicy::contraction`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub contraction: Option<OpPrecision>,
    /// Replaces [`PrecisionPolicy::pointwise`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pointwise: Option<OpPrecision>,
    /// Replaces [`PrecisionPolicy::saved`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub saved: Option<Precision>,
    /// Replaces [`PrecisionPolicy::saved_spectrum`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub saved_spectrum: Option<Precision>,
    /// Replaces [`PrecisionPolicy::norm`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub norm: Option<OpPrecision>,
    /// Replaces [`PrecisionPolicy::loss`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss: Option<OpPrecision>,
    /// Replaces [`PrecisionPolicy::weights`]; half weights get f32 masters, except in `half`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights: Option<Precision>,
    /// Replaces [`PrecisionPolicy::moments`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moments: Option<Precision>,
    /// Replaces [`PrecisionPolicy::loss_scale`]. Absent: dynamic where f16 carries gradients,
    /// none otherwise and in `half`. Unscaled f16 must be asked for with `"none"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScale>,
    /// Precisions of single saved tensors, by `"op.role"`.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub saved_overrides: BTreeMap<String, Precision>,
}

impl PrecisionConfig {
    /// A preset with a half format and nothing that departs from it.
    #[must_use]
    pub const fn new(preset: Preset, format: Precision) -> Self {
        PrecisionConfig {
            preset,
            format,
            compute: Compute::F32,
            transform: None,
            contraction: None,
            pointwise: None,
            saved: None,
            saved_spectrum: None,
            norm: None,
            loss: None,
            weights: None,
            moments: None,
            loss_scale: None,
            saved_overrides: BTreeMap::new(),
        }
    }

    /// The policy that this table describes.
    ///
    /// # Errors
    /// As [`PrecisionPolicy::validate`].
    pub fn resolve(&self) -> Result<PrecisionPolicy, Error> {
        let mut policy = PrecisionPolicy::preset(self.preset, self.format);
        policy.compute = self.compute;
        policy.transform = self.transform.unwrap_or(policy.transform);
        policy.contraction = self.contraction.unwrap_or(policy.contraction);
        policy.pointwise = self.pointwise.unwrap_or(policy.pointwise);
        policy.saved = self.saved.unwrap_or(policy.saved);
        policy.saved_spectrum = self.saved_spectrum.unwrap_or(policy.saved_spectrum);
        policy.norm = self.norm.unwrap_or(OpPrecision::of(policy.pointwise.storage.accumulate()));
        policy.loss = self.loss.unwrap_or(policy.loss);
        policy.weights = self.weights.unwrap_or(policy.weights);
        policy.moments = self.moments.unwrap_or(policy.moments);
        policy.saved_overrides = self.saved_overrides.clone();
        policy.master = policy.natural_master();
        policy.loss_scale = self.loss_scale.unwrap_or_else(|| policy.natural_loss_scale());
        policy.validate()?;
        Ok(policy)
    }
}

impl Default for PrecisionConfig {
    fn default() -> Self {
        PrecisionConfig::new(Preset::Mixed, Precision::F16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Precision::{Bf16, F16, F32};

    fn policy(text: &str) -> Result<PrecisionPolicy, Error> {
        toml::from_str::<PrecisionConfig>(text).unwrap().resolve()
    }

    #[test]
    fn an_empty_table_is_mixed_f16() {
        assert_eq!(policy(""), Ok(PrecisionPolicy::mixed(F16)));
        assert_eq!(PrecisionConfig::default().resolve(), Ok(PrecisionPolicy::mixed(F16)));
    }

    #[test]
    fn every_preset_resolves_to_itself() {
        for preset in Preset::ALL {
            for format in [F16, Bf16] {
                let text = format!("preset = \"{preset}\"\nformat = \"{format}\"");
                assert_eq!(policy(&text), Ok(PrecisionPolicy::preset(preset, format)));
            }
        }
    }

    #[test]
    fn each_override_changes_its_field() {
        let text = r#"
            preset = "mixed"
            compute = "tf32"
            transform = "bf16"
            contraction = { storage = "f32", accumulate = "f32" }
            pointwise = "f32"
            saved = "bf16"
            saved_spectrum = "f32"
            norm = "f32"
            loss = "bf16"
            weights = "bf16"
            moments = "bf16"
            loss_scale = 256
            [saved_overrides]
            "linear.x" = "f16"
        "#;
        let mut want = PrecisionPolicy::mixed(F16);
        want.compute = Compute::Tf32;
        want.transform = OpPrecision::of(Bf16);
        want.contraction = OpPrecision::of(F32);
        want.pointwise = OpPrecision::of(F32);
        want.saved = Bf16;
        want.saved_spectrum = F32;
        want.norm = OpPrecision::of(F32);
        want.loss = OpPrecision::of(Bf16);
        want.weights = Bf16;
        want.moments = Bf16;
        want.loss_scale = LossScale::Static(256.0);
        want.saved_overrides.insert("linear.x".to_owned(), F16);
        assert_eq!(policy(text), Ok(want));
    }

    #[test]
    fn masters_follow_the_weights() {
        let master = |text: &str| policy(text).unwrap().master;
        assert_eq!(master("weights = 'f32'"), None);
        assert_eq!(master("preset = 'full'\nweights = 'bf16'"), Some(F32));
        assert_eq!(master("preset = 'half'\nweights = 'bf16'"), None);
    }

    #[test]
    fn the_loss_scale_follows_f16_gradients_unless_given() {
        let scale = |text: &str| policy(text).unwrap().loss_scale;
        assert_eq!(scale("preset = 'full'\ntransform = 'f16'"), LossScale::DYNAMIC);
        assert_eq!(scale("preset = 'full'\nsaved = 'f16'"), LossScale::None);
        assert_eq!(scale("loss_scale = 'none'"), LossScale::None);
        assert_eq!(scale("format = 'bf16'\nloss_scale = 'dynamic'"), LossScale::DYNAMIC);
        assert_eq!(scale("preset = 'half'\nloss_scale = 'dynamic'"), LossScale::DYNAMIC);
    }

    #[test]
    fn illegal_tables_are_refused() {
        assert_eq!(policy("format = 'f32'"), Err(Error::FormatNotHalf { format: F32 }));
        let error = policy("transform = { storage = 'f16', accumulate = 'f16' }");
        assert_eq!(error, Err(Error::AccumulateTooNarrow { op: "transform", storage: F16, accumulate: F16 }));
        let (found, served) = (OpPrecision::of(Bf16), OpPrecision::of(F32));
        assert_eq!(policy("norm = 'bf16'"), Err(Error::NotServed { op: "norm", found, served }));
        let message = policy("norm = 'bf16'").unwrap_err().to_string();
        assert!(message.starts_with("norm = ") && message.contains("use norm = \"f32\""), "{message}");
        assert!(matches!(policy("loss = 'f64'"), Err(Error::DoubleWithHalf { .. })));
        assert!(matches!(policy("loss_scale = 100"), Err(Error::NotPowerOfTwo { .. })));
        let message = toml::from_str::<PrecisionConfig>("acumulate = 'f32'").unwrap_err().to_string();
        assert!(message.contains("unknown field `acumulate`"), "{message}");
    }

    #[test]
    fn tables_are_written_and_read_back() {
        let mut config = PrecisionConfig { loss_scale: Some(LossScale::DYNAMIC), ..Default::default() };
        config.norm = Some(OpPrecision::of(F32));
        config.saved_overrides.insert("linear.x".to_owned(), Bf16);
        for config in [config, PrecisionConfig::default()] {
            let text = toml::to_string(&config).unwrap();
            assert_eq!(toml::from_str::<PrecisionConfig>(&text).unwrap(), config, "{text}");
        }
        let plain = toml::to_string(&PrecisionConfig::default()).unwrap();
        assert_eq!(plain, "preset = \"mixed\"\nformat = \"f16\"\ncompute = \"f32\"\n");
    }
}
