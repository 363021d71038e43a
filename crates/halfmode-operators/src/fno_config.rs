//! The constructor's arguments of the Fourier neural operator, under the peer's names.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};

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
    #[serde(default)]
    pub positional_embedding: PositionalEmbedding,
    /// What happens to a block's input before its transform.
    #[serde(default)]
    pub stabilizer: StabilizerKind,
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
        let ratios = [
            ("lifting_channel_ratio", self.lifting_channel_ratio),
            ("projection_channel_ratio", self.projection_channel_ratio),
            ("channel_mlp_expansion", self.channel_mlp_expansion),
        ];
        for (key, value) in ratios {
            if !(value.is_finite() && value > 0.0 && value <= 1024.0) {
                return bad(key, value.to_string(), "must be positive and at most 1024");
            }
        }
        Ok(())
    }

    /// Stored modes per axis: the last axis of real data keeps `n/2 + 1`.
    #[must_use]
    pub fn stored_modes(&self) -> Vec<usize> {
        let mut modes = self.n_modes.clone();
        if let Some(last) = modes.last_mut() {
            *last = *last / 2 + 1;
        }
        modes
    }

    /// Widths of the hidden layers of lifting, projection and channel MLP.
    pub(crate) fn widths(&self) -> [usize; 3] {
        let c = self.hidden_channels as f64;
        [
            (self.lifting_channel_ratio * c) as usize,
            (self.projection_channel_ratio * c) as usize,
            (c * self.channel_mlp_expansion).round() as usize,
        ]
        .map(|width| width.max(1))
    }
}
