//! The named starting points of a precision policy.

use crate::Error;
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// A named precision policy; [`crate::PrecisionPolicy::preset`] spells each out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    /// f32 everywhere.
    Full,
    /// Half in dense layers, f32 in the spectral chain: what automatic mixed precision does.
    Amp,
    /// Half everywhere but in the loss, norm statistics and weight gradients, with f32 masters.
    #[default]
    Mixed,
    /// As `Mixed` without masters, with half moments and no loss scale: the baseline that fails.
    Half,
}

/// Which products of f32 values are allowed to round their operands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compute {
    /// Products read f32 operands as they are.
    #[default]
    F32,
    /// Products may round f32 operands to TF32 first; sums stay f32.
    Tf32,
}

impl Preset {
    /// All presets, widest first.
    pub const ALL: [Preset; 4] = [Preset::Full, Preset::Amp, Preset::Mixed, Preset::Half];

    /// The name used in configuration files, reports and errors.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Preset::Full => "full",
            Preset::Amp => "amp",
            Preset::Mixed => "mixed",
            Preset::Half => "half",
        }
    }
}

impl Compute {
    /// The name used in configuration files, reports and errors.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Compute::F32 => "f32",
            Compute::Tf32 => "tf32",
        }
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Display for Compute {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Preset {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        Preset::ALL.into_iter().find(|preset| preset.name() == name).ok_or_else(|| Error::UnknownName {
            kind: "preset",
            name: name.to_owned(),
            expected: "full, amp, mixed, half",
        })
    }
}

impl FromStr for Compute {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        [Compute::F32, Compute::Tf32]
            .into_iter()
            .find(|compute| compute.name() == name)
            .ok_or_else(|| Error::UnknownName { kind: "compute", name: name.to_owned(), expected: "f32, tf32" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for preset in Preset::ALL {
            assert_eq!(preset.to_string().parse::<Preset>(), Ok(preset));
            assert_eq!(serde_json::to_string(&preset).unwrap(), format!("\"{preset}\""));
        }
        for compute in [Compute::F32, Compute::Tf32] {
            assert_eq!(compute.to_string().parse::<Compute>(), Ok(compute));
            assert_eq!(serde_json::to_string(&compute).unwrap(), format!("\"{compute}\""));
        }
        let message = "O1".parse::<Preset>().unwrap_err().to_string();
        assert_eq!(message, "unknown preset `O1`; use one of full, amp, mixed, half");
        assert!("f16".parse::<Compute>().is_err());
    }
}
