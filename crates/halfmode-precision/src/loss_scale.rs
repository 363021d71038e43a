//! How the loss is scaled before the backward pass, as a choice.

use crate::{Error, ScalerConfig};
use serde::de::{self, MapAccess, Visitor, value::MapAccessDeserializer};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;

/// The factor on the loss that keeps f16 gradients away from zero.
///
/// In configuration files this is `"none"`, a number for a static scale, `"dynamic"` for the
/// default scaler, or a table of [`ScalerConfig`]'s keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LossScale {
    /// No scaling.
    None,
    /// One fixed power of two.
    Static(f64),
    /// A power of two that follows the gradients, see [`crate::DynamicScaler`].
    Dynamic(ScalerConfig),
}

impl LossScale {
    /// The dynamic scale with its default numbers.
    pub const DYNAMIC: LossScale = LossScale::Dynamic(ScalerConfig::DEFAULT);

    /// The scale of the first step.
    #[must_use]
    pub const fn initial(&self) -> f64 {
        match self {
            LossScale::None => 1.0,
            LossScale::Static(scale) => *scale,
            LossScale::Dynamic(config) => config.init,
        }
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// [`Error::NotPowerOfTwo`] or [`Error::ScalerRange`].
    pub fn validate(&self) -> Result<(), Error> {
        match self {
            LossScale::None => Ok(()),
            LossScale::Static(scale) => crate::scaler::power_of_two("static scale", *scale),
            LossScale::Dynamic(config) => config.validate(),
        }
    }
}

impl fmt::Display for LossScale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LossScale::None => f.pad("none"),
            LossScale::Static(scale) => f.pad(&format!("{scale}")),
            LossScale::Dynamic(config) => f.pad(&format!("dynamic from {}", config.init)),
        }
    }
}

impl Serialize for LossScale {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            LossScale::None => serializer.serialize_str("none"),
            LossScale::Static(scale) => serializer.serialize_f64(*scale),
            LossScale::Dynamic(config) => config.serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for LossScale {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(LossScaleVisitor)
    }
}

struct LossScaleVisitor;

impl<'de> Visitor<'de> for LossScaleVisitor {
    type Value = LossScale;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"none\", \"dynamic\", a power of two, or a table of the dynamic scaler's keys")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<LossScale, E> {
        match name {
            "none" => Ok(LossScale::None),
            "dynamic" => Ok(LossScale::DYNAMIC),
            _ => Err(E::invalid_value(de::Unexpected::Str(name), &self)),
        }
    }

    fn visit_f64<E: de::Error>(self, scale: f64) -> Result<LossScale, E> {
        Ok(LossScale::Static(scale))
    }

    fn visit_i64<E: de::Error>(self, scale: i64) -> Result<LossScale, E> {
        Ok(LossScale::Static(scale as f64))
    }

    fn visit_u64<E: de::Error>(self, scale: u64) -> Result<LossScale, E> {
        Ok(LossScale::Static(scale as f64))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<LossScale, A::Error> {
        ScalerConfig::deserialize(MapAccessDeserializer::new(map)).map(LossScale::Dynamic)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Holder {
        loss_scale: LossScale,
    }

    fn read(text: &str) -> Result<LossScale, toml::de::Error> {
        toml::from_str::<Holder>(text).map(|holder| holder.loss_scale)
    }

    #[test]
    fn all_forms_are_read() {
        assert_eq!(read("loss_scale = 'none'").unwrap(), LossScale::None);
        assert_eq!(read("loss_scale = 'dynamic'").unwrap(), LossScale::DYNAMIC);
        assert_eq!(read("loss_scale = 1024").unwrap(), LossScale::Static(1024.0));
        assert_eq!(read("loss_scale = 0.5").unwrap(), LossScale::Static(0.5));
        let config = ScalerConfig { init: 8.0, ..ScalerConfig::DEFAULT };
        assert_eq!(read("loss_scale = { init = 8 }").unwrap(), LossScale::Dynamic(config));
    }

    #[test]
    fn other_forms_are_refused_with_the_legal_ones() {
        let message = read("loss_scale = 'static'").unwrap_err().to_string();
        assert!(message.contains("\"none\", \"dynamic\", a power of two, or a table"), "{message}");
        let message = read("loss_scale = { start = 8 }").unwrap_err().to_string();
        assert!(message.contains("unknown field `start`"), "{message}");
        assert!(read("loss_scale = true").is_err());
    }

    #[test]
    fn written_forms_are_read_back() {
        for loss_scale in [LossScale::None, LossScale::Static(256.0), LossScale::DYNAMIC] {
            let text = toml::to_string(&Holder { loss_scale }).unwrap();
            assert_eq!(read(&text).unwrap(), loss_scale, "{text}");
            let json = serde_json::to_string(&loss_scale).unwrap();
            assert_eq!(serde_json::from_str::<LossScale>(&json).unwrap(), loss_scale, "{json}");
        }
    }

    #[test]
    fn numbers_are_checked() {
        assert_eq!(LossScale::Static(0.25).validate(), Ok(()));
        let error = LossScale::Static(1000.0).validate().unwrap_err();
        assert_eq!(error.to_string(), "loss scale: static scale = 1000 is not a power of two; use for example 1024");
        assert!(LossScale::Dynamic(ScalerConfig { init: 3.0, ..ScalerConfig::DEFAULT }).validate().is_err());
        assert_eq!(LossScale::None.initial().to_bits(), 1f64.to_bits());
        assert_eq!(LossScale::DYNAMIC.initial().to_bits(), 65536f64.to_bits());
    }
}
