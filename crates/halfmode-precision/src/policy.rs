//! Which precision every kind of tensor and sum has in a training step.

use crate::{Compute, Error, LossScale, OpPrecision, Precision, Preset};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The precision of every kind of tensor and sum in a training step.
///
/// Storage and accumulation are apart: `storage` is what tensors between ops hold, `accumulate`
/// is what sums inside an op are formed in. A policy is a value that is handed to ops; nothing
/// reads it from the surroundings.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrecisionPolicy {
    /// The preset that this policy started from.
    pub preset: Preset,
    /// The half format of the preset; `full` does not use it.
    pub format: Precision,
    /// What products of f32 values may use.
    pub compute: Compute,
    /// Spectral transforms: the fields and spectra they read and write.
    pub transform: OpPrecision,
    /// Contractions of spectra with weights.
    pub contraction: OpPrecision,
    /// Dense layers and activations.
    pub pointwise: OpPrecision,
    /// Tensors kept for backward, unless a role says otherwise; see [`PrecisionPolicy::saved`].
    pub saved: Precision,
    /// Spectra kept for backward.
    pub saved_spectrum: Precision,
    /// Norm layers: their statistics and the arithmetic on them, in what dense layers form sums in.
    pub norm: OpPrecision,
    /// The loss and its gradient.
    pub loss: OpPrecision,
    /// The compute copy of the weights, which forward and backward read.
    pub weights: Precision,
    /// The copy that the optimiser updates, if it exists apart from `weights`.
    pub master: Option<Precision>,
    /// The moments of the optimiser.
    pub moments: Precision,
    /// Sums and storage of weight gradients.
    pub weight_grad: Precision,
    /// The factor on the loss.
    pub loss_scale: LossScale,
    /// Precisions of single saved tensors, by `"op.role"`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub saved_overrides: BTreeMap<String, Precision>,
}

impl PrecisionPolicy {
    /// The policy of a preset with the half format `format`.
    ///
    /// | preset | transform, contraction, saved spectra | dense layers, saved | weights | masters | moments | loss scale |
    /// | --- | --- | --- | --- | --- | --- | --- |
    /// | `full` | f32 | f32 | f32 | – | f32 | none |
    /// | `amp` | f32 | half | half | f32 | f32 | dynamic for f16 |
    /// | `mixed` | half | half | half | f32 | f32 | dynamic for f16 |
    /// | `half` | half | half | half | – | half | none |
    ///
    /// Norms, the loss, weight gradients and all sums are f32. The result is legal if `format`
    /// is f16 or bf16; [`PrecisionPolicy::validate`] says so.
    #[must_use]
    pub fn preset(preset: Preset, format: Precision) -> Self {
        let (spectral, dense) = match preset {
            Preset::Full => (Precision::F32, Precision::F32),
            Preset::Amp => (Precision::F32, format),
            Preset::Mixed | Preset::Half => (format, format),
        };
        let mut policy = PrecisionPolicy::uniform(Precision::F32);
        policy.preset = preset;
        policy.format = format;
        policy.transform = OpPrecision::of(spectral);
        policy.contraction = OpPrecision::of(spectral);
        policy.saved_spectrum = spectral;
        policy.pointwise = OpPrecision::of(dense);
        policy.saved = dense;
        policy.weights = dense;
        if preset == Preset::Half {
            policy.moments = format;
        }
        policy.master = policy.natural_master();
        policy.loss_scale = policy.natural_loss_scale();
        policy
    }

    /// f32 everywhere.
    #[must_use]
    pub fn full() -> Self {
        PrecisionPolicy::uniform(Precision::F32)
    }

    /// f64 everywhere, for gradient checks.
    #[must_use]
    pub fn double() -> Self {
        PrecisionPolicy::uniform(Precision::F64)
    }

    /// The published method: [`Preset::Mixed`] with the half format `format`.
    #[must_use]
    pub fn mixed(format: Precision) -> Self {
        PrecisionPolicy::preset(Preset::Mixed, format)
    }

    /// The precision in which `op` keeps its tensor `role` for backward.
    ///
    /// An entry `"op.role"` of `saved_overrides` wins. Otherwise roles that end in `_hat` are
    /// spectra and take `saved_spectrum`, all others take `saved`. Statistics of norm layers are
    /// not asked for here: they have the precision of `norm`.
    #[must_use]
    pub fn saved(&self, op: &str, role: &str) -> Precision {
        let default = if role.ends_with("_hat") { self.saved_spectrum } else { self.saved };
        if self.saved_overrides.is_empty() {
            return default;
        }
        self.saved_overrides.get(&format!("{op}.{role}")).copied().unwrap_or(default)
    }

    /// The precision in which an op reads its weights: the compute copy if the op stores halves,
    /// else the master copy where there is one, so that f32 ops of `amp` see f32 weights.
    #[must_use]
    pub fn weights_for(&self, op: OpPrecision) -> Precision {
        if op.storage.is_half() { self.weights } else { self.master.unwrap_or(self.weights) }
    }

    /// Checks that the policy can be executed.
    ///
    /// # Errors
    /// - [`Error::FormatNotHalf`] if `format` is not f16 or bf16.
    /// - [`Error::AccumulateTooNarrow`] if a sum is formed in halves or below its terms.
    /// - [`Error::NotServed`] if norms are asked for in what no kernel of them computes in.
    /// - [`Error::DoubleWithHalf`] if f64 and halves meet.
    /// - [`Error::MasterNotWider`] if the master copy has no more bits than the weights.
    /// - [`Error::SavedKey`] if a key of `saved_overrides` is not `"op.role"`.
    /// - [`Error::NotPowerOfTwo`] or [`Error::ScalerRange`] for the loss scale.
    pub fn validate(&self) -> Result<(), Error> {
        if !self.format.is_half() {
            return Err(Error::FormatNotHalf { format: self.format });
        }
        for (op, OpPrecision { storage, accumulate }) in self.ops() {
            if accumulate.is_half() || accumulate.bytes() < storage.bytes() {
                return Err(Error::AccumulateTooNarrow { op, storage, accumulate });
            }
        }
        if self.weight_grad.is_half() {
            let (storage, accumulate) = (self.weights, self.weight_grad);
            return Err(Error::AccumulateTooNarrow { op: "weight_grad", storage, accumulate });
        }
        if let Some(master) = self.master
            && master.bytes() <= self.weights.bytes()
        {
            return Err(Error::MasterNotWider { master, weights: self.weights });
        }
        for key in self.saved_overrides.keys() {
            if !matches!(key.split_once('.'), Some((op, role)) if !op.is_empty() && !role.is_empty()) {
                return Err(Error::SavedKey { key: key.clone() });
            }
        }
        self.validate_double()?;
        let served = OpPrecision::of(self.pointwise.storage.accumulate());
        if self.norm != served {
            return Err(Error::NotServed { op: "norm", found: self.norm, served });
        }
        self.loss_scale.validate()
    }

    /// A table of every op kind with its storage and accumulation, one per line.
    #[must_use]
    pub fn table(&self) -> String {
        let mut rows = vec![["", "storage", "accumulate"].map(str::to_owned)];
        rows.extend(self.ops().map(|(op, p)| [op.to_owned(), p.storage.to_string(), p.accumulate.to_string()]));
        let mut storage = |name: &str, value: String| rows.push([name.to_owned(), value, "-".to_owned()]);
        storage("saved", self.saved.to_string());
        storage("saved_spectrum", self.saved_spectrum.to_string());
        for (key, precision) in &self.saved_overrides {
            storage(&format!("saved {key}"), precision.to_string());
        }
        storage("weights", self.weights.to_string());
        storage("master", self.master.map_or_else(|| "-".to_owned(), |p| p.to_string()));
        storage("moments", self.moments.to_string());
        let weight_grad = self.weight_grad.to_string();
        rows.push(["weight_grad".to_owned(), weight_grad.clone(), weight_grad]);
        let width = |column: usize| rows.iter().map(|row| row[column].len()).max().unwrap_or(0);
        let (first, second) = (width(0), width(1));
        let mut text = format!("preset {}, compute {}, loss scale {}\n", self.preset, self.compute, self.loss_scale);
        for [name, storage, accumulate] in &rows {
            text.push_str(&format!("{name:first$}  {storage:second$}  {accumulate}\n"));
        }
        text
    }

    /// The master copy that goes with `weights` and the preset.
    pub(crate) fn natural_master(&self) -> Option<Precision> {
        (self.weights.is_half() && self.preset != Preset::Half).then_some(Precision::F32)
    }

    /// The loss scale that goes with the tensors that carry gradients: dynamic where one of them
    /// is f16, whose smallest values gradients fall below.
    pub(crate) fn natural_loss_scale(&self) -> LossScale {
        let carriers = [self.transform.storage, self.contraction.storage, self.pointwise.storage];
        if self.preset != Preset::Half && carriers.contains(&Precision::F16) {
            LossScale::DYNAMIC
        } else {
            LossScale::None
        }
    }

    fn uniform(precision: Precision) -> Self {
        let op = OpPrecision::of(precision);
        PrecisionPolicy {
            preset: Preset::Full,
            format: Precision::F16,
            compute: Compute::F32,
            transform: op,
            contraction: op,
            pointwise: op,
            saved: precision,
            saved_spectrum: precision,
            norm: op,
            loss: op,
            weights: precision,
            master: None,
            moments: precision,
            weight_grad: precision,
            loss_scale: LossScale::None,
            saved_overrides: BTreeMap::new(),
        }
    }

    fn ops(&self) -> impl Iterator<Item = (&'static str, OpPrecision)> {
        [
            ("transform", self.transform),
            ("contraction", self.contraction),
            ("pointwise", self.pointwise),
            ("norm", self.norm),
            ("loss", self.loss),
        ]
        .into_iter()
    }

    /// Refuses f64 beside halves, naming one field of each.
    fn validate_double(&self) -> Result<(), Error> {
        let storages = self.ops().map(|(op, p)| (op.to_owned(), p.storage));
        let sums = self.ops().map(|(op, p)| (format!("{op}.accumulate"), p.accumulate));
        let single = [
            ("saved", Some(self.saved)),
            ("saved_spectrum", Some(self.saved_spectrum)),
            ("weights", Some(self.weights)),
            ("master", self.master),
            ("moments", Some(self.moments)),
            ("weight_grad", Some(self.weight_grad)),
        ];
        let single = single.into_iter().filter_map(|(name, p)| p.map(|p| (name.to_owned(), p)));
        let overrides = self.saved_overrides.iter().map(|(key, p)| (format!("saved_overrides.\"{key}\""), *p));
        let fields: Vec<(String, Precision)> = storages.chain(sums).chain(single).chain(overrides).collect();
        let double = fields.iter().find(|(_, p)| *p == Precision::F64);
        let half = fields.iter().find(|(_, p)| p.is_half());
        match (double, half) {
            (Some((double, _)), Some((half, format))) => {
                Err(Error::DoubleWithHalf { double: double.clone(), half: half.clone(), format: *format })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Precision::{Bf16, F16, F32, F64};

    #[test]
    fn presets_are_legal_and_match_the_table() {
        for format in [F16, Bf16] {
            let dynamic = if format == F16 { LossScale::DYNAMIC } else { LossScale::None };
            // spectral, dense, master, moments, loss scale
            for (preset, spectral, dense, master, moments, loss_scale) in [
                (Preset::Full, F32, F32, None, F32, LossScale::None),
                (Preset::Amp, F32, format, Some(F32), F32, dynamic),
                (Preset::Mixed, format, format, Some(F32), F32, dynamic),
                (Preset::Half, format, format, None, format, LossScale::None),
            ] {
                let policy = PrecisionPolicy::preset(preset, format);
                assert_eq!(policy.validate(), Ok(()), "{preset}");
                let storages = [policy.transform.storage, policy.contraction.storage, policy.saved_spectrum];
                assert_eq!(storages, [spectral; 3], "{preset}");
                assert_eq!([policy.pointwise.storage, policy.saved, policy.weights], [dense; 3], "{preset}");
                assert_eq!((policy.master, policy.moments), (master, moments), "{preset}");
                assert_eq!(policy.loss_scale, loss_scale, "{preset}");
                assert_eq!((policy.norm, policy.loss), (OpPrecision::of(F32), OpPrecision::of(F32)));
                assert!(policy.ops().all(|(_, op)| op.accumulate == F32), "{preset}");
                assert_eq!(policy.weight_grad, F32);
                assert_eq!((policy.preset, policy.format, policy.compute), (preset, format, Compute::F32));
            }
        }
        assert_eq!(PrecisionPolicy::mixed(F16), PrecisionPolicy::preset(Preset::Mixed, F16));
        assert_eq!(PrecisionPolicy::full(), PrecisionPolicy::preset(Preset::Full, F16));
    }

    #[test]
    fn double_is_legal_and_f64_throughout() {
        let policy = PrecisionPolicy::double();
        assert_eq!(policy.validate(), Ok(()));
        assert!(policy.ops().all(|(_, op)| op == OpPrecision { storage: F64, accumulate: F64 }));
        assert_eq!([policy.saved, policy.saved_spectrum, policy.weights, policy.moments, policy.weight_grad], [F64; 5]);
    }

    #[test]
    fn saved_tensors_follow_role_and_overrides() {
        let mut policy = PrecisionPolicy::preset(Preset::Amp, F16);
        assert_eq!(policy.saved("spectral_conv", "x_hat"), F32);
        assert_eq!(policy.saved("linear", "x"), F16);
        policy.saved_overrides.insert("spectral_conv.x_hat".to_owned(), Bf16);
        assert_eq!(policy.saved("spectral_conv", "x_hat"), Bf16);
        assert_eq!(policy.saved("other", "x_hat"), F32);
    }

    #[test]
    fn f32_ops_read_master_weights() {
        let amp = PrecisionPolicy::preset(Preset::Amp, F16);
        assert_eq!((amp.weights_for(amp.contraction), amp.weights_for(amp.pointwise)), (F32, F16));
        let full = PrecisionPolicy::full();
        assert_eq!(full.weights_for(full.contraction), F32);
        let half = PrecisionPolicy::preset(Preset::Half, F16);
        assert_eq!(half.weights_for(half.norm), F16);
    }

    #[test]
    fn illegal_policies_are_refused_with_a_way_out() {
        let error = |change: fn(&mut PrecisionPolicy)| {
            let mut policy = PrecisionPolicy::mixed(F16);
            change(&mut policy);
            policy.validate().unwrap_err().to_string()
        };
        assert_eq!(
            error(|p| p.format = F32),
            "format `f32` is not a half format; use f16 or bf16, or preset = \"full\" to train in f32"
        );
        assert_eq!(
            error(|p| p.transform.accumulate = F16),
            "transform: sums of f16 in f16 lose bits; use accumulate = \"f32\""
        );
        assert_eq!(
            error(|p| p.loss = OpPrecision { storage: F64, accumulate: F32 }),
            "loss: sums of f64 in f32 lose bits; use accumulate = \"f64\""
        );
        assert!(error(|p| p.weight_grad = Bf16).starts_with("weight_grad: sums of f16 in bf16"));
        assert_eq!(
            error(|p| p.norm.accumulate = F64),
            "norm.accumulate is f64 and transform is f16; no kernel joins the two: use f32 instead of f64, or f64 everywhere"
        );
        assert!(error(|p| p.moments = F64).starts_with("moments is f64 and transform is f16"));
        assert_eq!(
            error(|p| p.weights = F32),
            "a f32 master copy of f32 weights adds nothing; drop the master copy or use f16 or bf16 weights"
        );
        for (key, message) in [
            (|p| p.saved_overrides = [("x_hat".to_owned(), F16)].into(), "`x_hat` is not of the form"),
            (|p| p.saved_overrides = [(".x".to_owned(), F16)].into(), "`.x` is not of the form"),
        ] as [(fn(&mut PrecisionPolicy), &str); 2]
        {
            assert!(error(key).contains(message), "{message}");
        }
        assert!(error(|p| p.loss_scale = LossScale::Static(3.0)).contains("is not a power of two"));
        let mut double = PrecisionPolicy::double();
        double.saved_overrides.insert("linear.x".to_owned(), Bf16);
        assert!(double.validate().unwrap_err().to_string().contains("saved_overrides.\"linear.x\" is bf16"));
    }

    #[test]
    fn unscaled_f16_may_be_asked_for() {
        let mut policy = PrecisionPolicy::mixed(F16);
        policy.loss_scale = LossScale::None;
        assert_eq!(policy.validate(), Ok(()));
    }

    #[test]
    fn the_table_is_aligned() {
        let mut policy = PrecisionPolicy::mixed(Bf16);
        policy.saved_overrides.insert("spectral_conv.x_hat".to_owned(), F32);
        let want = "\
preset mixed, compute f32, loss scale none
                           storage  accumulate
transform                  bf16     f32
contraction                bf16     f32
pointwise                  bf16     f32
norm                       f32      f32
loss                       f32      f32
saved                      bf16     -
saved_spectrum             bf16     -
saved spectral_conv.x_hat  f32      -
weights                    bf16     -
master                     f32      -
moments                    f32      -
weight_grad                f32      f32
";
        assert_eq!(policy.table(), want);
    }

    #[test]
    fn policies_are_written_and_read_back() {
        for policy in [PrecisionPolicy::mixed(F16), PrecisionPolicy::full(), PrecisionPolicy::double()] {
            let json = serde_json::to_string(&policy).unwrap();
            assert_eq!(serde_json::from_str::<PrecisionPolicy>(&json).unwrap(), policy);
            let text = toml::to_string(&policy).unwrap();
            assert_eq!(toml::from_str::<PrecisionPolicy>(&text).unwrap(), policy);
        }
    }
}
