//! The constructor's arguments of the Fourier neural operator, under the peer's names.

use crate::{Error, Result};
use serde::{Deserialize, Deserializer, Serialize};

/// What is appended to the input channels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PositionalEmbedding {
    /// One coordinate per axis, `j / n`.
    #[default]
    Grid,
    /// Nothing.
    None,
}

/// What happens to a block's input before its transform.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StabilizerKind {
    /// Nothing.
    #[default]
    None,
    /// tanh.
    Tanh,
}

/// What is added around a spectral convolution or a channel MLP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Skip {
    /// A matrix, `W x`.
    Linear,
    /// The input itself.
    Identity,
    /// A number per channel.
    SoftGating,
    /// Nothing.
    #[default]
    None,
}

/// How fields are normalised inside a block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Norm {
    /// Not at all.
    #[default]
    None,
    /// Per sample and channel, without weights.
    InstanceNorm,
    /// Per sample over all channels, with a weight and a bias per channel.
    GroupNorm,
    /// Per channel over all samples, with a weight and a bias per channel; over those of the training when it is
    /// over.
    BatchNorm,
}

/// One number for all, or one each. Without numbers: not at all.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Numbers {
    /// For all.
    All(f64),
    /// One each.
    Each(Vec<f64>),
}

impl Default for Numbers {
    fn default() -> Self {
        Numbers::Each(Vec::new())
    }
}

impl Numbers {
    /// Whether there are none.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Numbers::default()
    }

    /// The number of `idx`, or `default` where there is none.
    pub(crate) fn get(&self, idx: usize, default: f64) -> f64 {
        match self {
            Numbers::All(value) => *value,
            Numbers::Each(values) => values.get(idx).copied().unwrap_or(default),
        }
    }

    fn fits(&self, n: usize, legal: impl Fn(f64) -> bool) -> bool {
        match self {
            Numbers::All(value) => legal(*value),
            Numbers::Each(values) => values.is_empty() || values.len() == n && values.iter().all(|&it| legal(it)),
        }
    }
}

/// A Fourier neural operator: lifting, blocks, projection.
///
/// Defaults are neuraloperator's: post-activation blocks with GELU, a linear skip, a channel MLP
/// with a soft-gated skip, grid embedding, no norm.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FnoConfig {
    /// Modes per axis, in total: an axis keeps frequencies `-n/2..n - n/2`, the last axis `0..=n/2`.
    pub n_modes: Vec<usize>,
    /// Channels of the input.
    #[serde(default = "one")]
    pub in_channels: usize,
    /// Channels of the output.
    #[serde(default = "one")]
    pub out_channels: usize,
    /// Width of the blocks.
    pub hidden_channels: usize,
    /// Number of blocks.
    #[serde(default = "four")]
    pub n_layers: usize,
    /// Width of the lifting's hidden layer over `hidden_channels`.
    #[serde(default = "two")]
    pub lifting_channel_ratio: f64,
    /// Width of the projection's hidden layer over `hidden_channels`.
    #[serde(default = "two")]
    pub projection_channel_ratio: f64,
    /// Width of the channel MLP's hidden layer over `hidden_channels`.
    #[serde(default = "half")]
    pub channel_mlp_expansion: f64,
    /// What is appended to the input channels.
    #[serde(default, deserialize_with = "null_is_no_embedding")]
    pub positional_embedding: PositionalEmbedding,
    /// What happens to a block's input before its transform.
    #[serde(default, deserialize_with = "null_is_absent")]
    pub stabilizer: StabilizerKind,
    /// Modes per axis that the weights hold, if more than `n_modes`; taken as they are, the last
    /// axis is not halved.
    #[serde(default, deserialize_with = "null_is_absent", skip_serializing_if = "Vec::is_empty")]
    pub max_n_modes: Vec<usize>,
    /// How fields are normalised inside a block.
    #[serde(default, deserialize_with = "null_is_absent")]
    pub norm: Norm,
    /// Activation and norm before the convolution instead of after it.
    #[serde(default)]
    pub preactivation: bool,
    /// Around the spectral convolution.
    #[serde(default = "linear", deserialize_with = "null_is_absent")]
    pub fno_skip: Skip,
    /// Whether blocks have a channel MLP.
    #[serde(default = "yes")]
    pub use_channel_mlp: bool,
    /// Around the channel MLP.
    #[serde(default = "soft_gating", deserialize_with = "null_is_absent")]
    pub channel_mlp_skip: Skip,
    /// Zeros around the lifted field, as a share of each axis on both sides; one number or one per axis.
    #[serde(default, deserialize_with = "null_is_absent", skip_serializing_if = "Numbers::is_none")]
    pub domain_padding: Numbers,
    /// Points of a block's output over those of its input; one number or one per block.
    #[serde(default, deserialize_with = "null_is_absent", skip_serializing_if = "Numbers::is_none")]
    pub resolution_scaling_factor: Numbers,
    /// Spectral weights that leave channels apart.
    #[serde(default)]
    pub separable: bool,
    /// Whether fields are complex. Every real layer becomes a pair of them, as a complex number multiplies.
    #[serde(default, skip_serializing_if = "is_false")]
    pub complex_data: bool,
    /// Whether the synthesis of a real field repairs spectra that belong to no real field. Both values mean
    /// the same here: what is imaginary at frequency zero has a sine of zero.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub enforce_hermitian_symmetry: bool,
    /// How spectral weights are factorised; dense ones, without a name or as `dense`, are the only kind yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub factorization: Option<String>,
    /// Rank of a factorisation; without meaning for dense weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank: Option<f64>,
    /// How factorised weights are contracted; without meaning for dense ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub implementation: Option<String>,
    /// Groups of channels of a group norm; one is the only number yet.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub norm_groups: usize,
}

/// `null` is what the type's default says: nothing.
fn null_is_absent<'de, T, D>(value: D) -> std::result::Result<T, D::Error>
where
    T: Deserialize<'de> + Default,
    D: Deserializer<'de>,
{
    Option::<T>::deserialize(value).map(Option::unwrap_or_default)
}

fn null_is_no_embedding<'de, D>(value: D) -> std::result::Result<PositionalEmbedding, D::Error>
where
    D: Deserializer<'de>,
{
    Option::deserialize(value).map(|it| it.unwrap_or(PositionalEmbedding::None))
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_false(value: &bool) -> bool {
    !value
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_true(value: &bool) -> bool {
    *value
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_one(value: &usize) -> bool {
    *value == 1
}

fn linear() -> Skip {
    Skip::Linear
}

fn soft_gating() -> Skip {
    Skip::SoftGating
}

fn yes() -> bool {
    true
}

fn one() -> usize {
    1
}

fn four() -> usize {
    4
}

fn two() -> f64 {
    2.0
}

fn half() -> f64 {
    0.5
}

/// The largest of any single size in a configuration: larger ones are typing errors.
const MAX_SIZE: usize = 1 << 16;

impl FnoConfig {
    /// The peer's defaults for these modes and this width.
    #[must_use]
    pub fn new(n_modes: &[usize], hidden_channels: usize) -> Self {
        FnoConfig {
            n_modes: n_modes.to_vec(),
            in_channels: 1,
            out_channels: 1,
            hidden_channels,
            n_layers: 4,
            lifting_channel_ratio: 2.0,
            projection_channel_ratio: 2.0,
            channel_mlp_expansion: 0.5,
            positional_embedding: PositionalEmbedding::Grid,
            stabilizer: StabilizerKind::None,
            max_n_modes: Vec::new(),
            norm: Norm::None,
            preactivation: false,
            fno_skip: Skip::Linear,
            use_channel_mlp: true,
            channel_mlp_skip: Skip::SoftGating,
            domain_padding: Numbers::default(),
            resolution_scaling_factor: Numbers::default(),
            separable: false,
            complex_data: false,
            enforce_hermitian_symmetry: true,
            factorization: None,
            rank: None,
            implementation: None,
            norm_groups: 1,
        }
    }

    /// Checks every value.
    ///
    /// # Errors
    /// [`Error::Config`] with the key that is out of range.
    pub fn validate(&self) -> Result<()> {
        let bad = |key, value: String, why| Err(Error::Config { key, value, why });
        if !(1..=3).contains(&self.n_modes.len()) {
            return bad("n_modes", format!("{:?}", self.n_modes), "one number per spatial axis, 1 to 3 axes");
        }
        let sizes = [
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("hidden_channels", self.hidden_channels),
            ("n_layers", self.n_layers),
        ];
        for (key, value) in self.n_modes.iter().map(|&n| ("n_modes", n)).chain(sizes) {
            if !(1..=MAX_SIZE).contains(&value) {
                return bad(key, value.to_string(), "must be between 1 and 65536");
            }
        }
        let lifting = self.lifting_channel_ratio;
        if !(0.0..=1024.0).contains(&lifting) {
            return bad("lifting_channel_ratio", lifting.to_string(), "must be between 0 and 1024");
        }
        let ratios = [
            ("projection_channel_ratio", self.projection_channel_ratio),
            ("channel_mlp_expansion", self.channel_mlp_expansion),
        ];
        for (key, value) in ratios {
            if !(value.is_finite() && value > 0.0 && value <= 1024.0) {
                return bad(key, value.to_string(), "must be positive and at most 1024");
            }
        }
        let d = self.n_modes.len();
        let held = self.max_n_modes.iter().zip(self.active_modes()).all(|(&max, n)| (n..=MAX_SIZE).contains(&max));
        if !self.max_n_modes.is_empty() && (self.max_n_modes.len() != d || !held) {
            return bad("max_n_modes", format!("{:?}", self.max_n_modes), "one number per axis, none below n_modes");
        }
        if !self.domain_padding.fits(d, |share| (0.0..=4.0).contains(&share)) {
            let value = format!("{:?}", self.domain_padding);
            return bad("domain_padding", value, "one number or one per axis, each between 0 and 4");
        }
        if !self.resolution_scaling_factor.fits(self.n_layers, |factor| (0.01..=100.0).contains(&factor)) {
            let value = format!("{:?}", self.resolution_scaling_factor);
            return bad("resolution_scaling_factor", value, "one number or one per layer, each between 0.01 and 100");
        }
        if let Some(kind) = self.factorization.as_ref().filter(|kind| !kind.eq_ignore_ascii_case("dense")) {
            let why = "factorised weights are not supported yet: leave the key out for dense ones";
            return bad("factorization", kind.clone(), why);
        }
        if let Some(rank) = self.rank.filter(|rank| !(rank.is_finite() && *rank > 0.0)) {
            return bad("rank", rank.to_string(), "must be positive");
        }
        if let Some(kind) = self.implementation.as_ref().filter(|it| !["factorized", "reconstructed"].contains(&&***it))
        {
            return bad("implementation", kind.clone(), "must be `factorized` or `reconstructed`");
        }
        if self.norm_groups != 1 {
            let why = "group norms of several groups are not supported yet: only 1 is";
            return bad("norm_groups", self.norm_groups.to_string(), why);
        }
        Ok(())
    }

    /// Modes that `n` points on an axis resolve: half of them on the last axis of real data.
    #[must_use]
    pub fn resolved_modes(&self, axis: usize, n: usize) -> usize {
        if !self.complex_data && axis + 1 == self.n_modes.len() { n / 2 + 1 } else { n }
    }

    /// Modes per axis that a spectral weight holds.
    #[must_use]
    pub fn stored_modes(&self) -> Vec<usize> {
        if self.max_n_modes.is_empty() { self.active_modes() } else { self.max_n_modes.clone() }
    }

    /// Modes per axis that are used: of `n` the last axis of real data keeps `n/2 + 1`.
    #[must_use]
    pub fn active_modes(&self) -> Vec<usize> {
        self.n_modes.iter().enumerate().map(|(axis, &n)| self.resolved_modes(axis, n)).collect()
    }

    /// Widths of the hidden layers of lifting (0: there is none), projection and channel MLP.
    pub(crate) fn widths(&self) -> [usize; 3] {
        let c = self.hidden_channels as f64;
        [
            (self.lifting_channel_ratio * c) as usize,
            ((self.projection_channel_ratio * c) as usize).max(1),
            ((c * self.channel_mlp_expansion).round_ties_even() as usize).max(1),
        ]
    }
}
