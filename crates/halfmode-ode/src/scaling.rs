//! The adjoint's scale: powers of two that keep cotangents inside the range of a half format.

use crate::{Error, Result};
use halfmode_precision::{Format, Precision};

/// How the adjoint is scaled while it passes through the velocity's format.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum AdjointScaling {
    /// By `2^exponent` throughout, unchecked: what overflows arrives as infinities.
    Fixed {
        /// Logarithm of the scale; 0 for none.
        exponent: i32,
    },
    /// Not at all; if anything is not finite, every gradient is infinite, so that a loss scaler around the solve
    /// skips the optimiser's step and reduces its scale.
    Safe,
    /// By a scale that each step chooses; see [`AdjointScaler`].
    Dynamic(ScaleConfig),
    /// By rampde's rule; see [`PeerScaler`].
    Peer,
}

impl AdjointScaling {
    /// No scaling and no checks.
    pub const UNSCALED: AdjointScaling = AdjointScaling::Fixed { exponent: 0 };

    /// Dynamic for f16, whose smallest values adjoints fall below; none for the others.
    #[must_use]
    pub fn natural(velocity: Precision) -> Self {
        match velocity {
            Precision::F16 => AdjointScaling::Dynamic(ScaleConfig::DEFAULT),
            _ => AdjointScaling::UNSCALED,
        }
    }
}

/// The numbers of an [`AdjointScaler`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ScaleConfig {
    /// Where the largest scaled value should be; `None`: `1 / eps` of the velocity's format, 1024 for f16.
    pub target: Option<f64>,
    /// The first exponent; `None`: from the first cotangent that is not zero.
    pub first_exponent: Option<i32>,
    /// Steps without overflow after which the scale may grow.
    pub growth_interval: u32,
    /// What `growth_interval` doubles to, at most, when growth overflows at once.
    pub max_growth_interval: u32,
    /// Tries of one step.
    pub max_attempts: u32,
    /// Smallest exponent.
    pub min_exponent: i32,
    /// Largest exponent.
    pub max_exponent: i32,
}

impl ScaleConfig {
    /// Grows after 8 clean steps, 64 at most, tries 16 times, stays in `2^-24 ..= 2^60`.
    pub const DEFAULT: ScaleConfig = ScaleConfig {
        target: None,
        first_exponent: None,
        growth_interval: 8,
        max_growth_interval: 64,
        max_attempts: 16,
        min_exponent: -24,
        max_exponent: 60,
    };
}

impl ScaleConfig {
    /// Checks the numbers.
    ///
    /// # Errors
    /// [`Error::Scaling`](crate::Error::Scaling), naming the field.
    pub fn validate(&self) -> Result<()> {
        let refuse = |field, why| Err(Error::Scaling { field, why });
        if self.target.is_some_and(|it| !(it.is_finite() && it > 0.0)) {
            return refuse("target", "must be finite and above 0");
        }
        if self.min_exponent > self.max_exponent {
            return refuse("min_exponent", "must not be above max_exponent");
        }
        if self.min_exponent < MIN_EXPONENT || self.max_exponent > MAX_EXPONENT {
            return refuse("min_exponent and max_exponent", "must lie in -126 ..= 127, so that scales are f32 numbers");
        }
        if self.growth_interval > MAX_INTERVAL || self.max_growth_interval > MAX_INTERVAL {
            return refuse("growth_interval", "must be at most 2^30");
        }
        Ok(())
    }
}

impl Default for ScaleConfig {
    fn default() -> Self {
        ScaleConfig::DEFAULT
    }
}

/// Exponents of the normal numbers of f32.
const MIN_EXPONENT: i32 = -126;
const MAX_EXPONENT: i32 = 127;
/// Steps without overflow that may be waited for.
const MAX_INTERVAL: u32 = 1 << 30;
/// Tries that take one bit off the scale each; later ones take 2, 4, 8, …
const SINGLE_BITS: u32 = 8;
/// Bits above the smallest normal number below which the scale grows without waiting.
pub(crate) const MARGIN_BITS: i32 = 10;

/// Chooses the scale of each step of an adjoint sweep: a power of two, so that scaling is exact.
///
/// The first scale takes the largest cotangent to the target. A step that overflows is tried again with a smaller
/// scale. The scale grows by one bit when the scaled adjoint is below half of the target and enough steps have
/// passed without overflow; it grows at once when the scaled adjoint comes near the format's smallest normal number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdjointScaler {
    config: ScaleConfig,
    target: f64,
    low: f64,
    exponent: Option<i32>,
    n_clean: u32,
    patience: u32,
    grew: bool,
}

impl AdjointScaler {
    /// A scaler for a velocity of this format, before its first step.
    #[must_use]
    pub fn new(config: ScaleConfig, velocity: Precision) -> Self {
        let format = Format::from(velocity);
        let patience = config.growth_interval.max(1);
        AdjointScaler {
            config,
            target: config.target.unwrap_or(1.0 / format.eps()),
            low: format.min_normal() * f64::from(MARGIN_BITS).exp2(),
            exponent: config.first_exponent.map(|it| it.clamp(config.min_exponent, config.max_exponent)),
            n_clean: patience,
            patience,
            grew: false,
        }
    }

    /// The scale of a step whose adjoint is at most `largest`, which is finite and not zero.
    pub fn scale(&mut self, largest: f64) -> f64 {
        let ScaleConfig { min_exponent, max_exponent, .. } = self.config;
        let first = || ((self.target / largest).log2().floor() as i32).clamp(min_exponent, max_exponent);
        let exponent = *self.exponent.get_or_insert_with(first);
        f64::from(exponent).exp2()
    }

    /// Notes that a try overflowed, the `attempt`-th of its step, from 1. False if there is nothing left to try.
    #[must_use]
    pub fn shrink(&mut self, attempt: u32) -> bool {
        if attempt == 1 && self.grew {
            self.patience = (2 * self.patience).min(self.config.max_growth_interval.max(1));
        }
        self.grew = false;
        self.n_clean = 0;
        let bits = 1 << attempt.saturating_sub(SINGLE_BITS).min(20);
        let Some(exponent) = self.exponent.as_mut() else { return false };
        let left = *exponent > self.config.min_exponent && attempt < self.config.max_attempts;
        *exponent = (*exponent - bits).max(self.config.min_exponent);
        left
    }

    /// Notes that a step succeeded after `retries` others; the adjoint after it is at most `largest`.
    pub fn accept(&mut self, retries: u32, largest: f64) {
        let Some(exponent) = self.exponent.as_mut() else { return };
        if retries == 0 {
            self.n_clean = self.n_clean.saturating_add(1);
            if self.grew {
                self.patience = self.config.growth_interval.max(1);
            }
        }
        self.grew = false;
        if largest == 0.0 || !largest.is_finite() {
            return;
        }
        let scaled = largest * f64::from(*exponent).exp2();
        let before = *exponent;
        if scaled < self.low {
            *exponent += (self.low / scaled).log2().ceil() as i32;
        } else if retries == 0 && scaled < 0.5 * self.target && self.n_clean >= self.patience {
            *exponent += 1;
        }
        *exponent = (*exponent).min(self.config.max_exponent).max(before);
        self.grew = *exponent > before;
    }

    /// Where the largest scaled value should be.
    #[cfg(feature = "cuda")]
    pub(crate) const fn target(&self) -> f64 {
        self.target
    }

    /// Smallest and largest exponent.
    #[cfg(feature = "cuda")]
    pub(crate) const fn bounds(&self) -> [i32; 2] {
        [self.config.min_exponent, self.config.max_exponent]
    }

    /// Logarithm of the scale; `None` before the first step.
    #[must_use]
    pub const fn exponent(&self) -> Option<i32> {
        self.exponent
    }
}

/// rampde's rule, for comparison: the scale doubles after every step without overflow whose *unscaled* adjoint is
/// below half of the target, halves on overflow, and has no bounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PeerScaler {
    target: f64,
    scale: Option<f64>,
    max: f64,
}

impl PeerScaler {
    /// Tries of one step.
    pub const MAX_ATTEMPTS: u32 = 50;
    /// Halvings of the first scale.
    const MAX_HALVINGS: u32 = 20;

    /// A scaler for a velocity of this format, before its first step.
    #[must_use]
    pub fn new(velocity: Precision) -> Self {
        let format = Format::from(velocity);
        PeerScaler { target: 1.0 / format.eps(), scale: None, max: format.max() }
    }

    /// The first scale, from the cotangent at the last time: its largest value and its shape. `None` if the peer
    /// gives up.
    pub fn start(&mut self, largest: f64, shape: &[usize]) -> Option<f64> {
        let samples = shape.first().copied().unwrap_or(1).max(1);
        let features = shape.iter().product::<usize>() as f64 / samples as f64;
        // The peer computes this in single precision.
        let ratio = (self.target / features.sqrt()) as f32 / largest as f32;
        let mut scale = f64::from(ratio.log2().round_ties_even()).exp2();
        let mut halvings = 0;
        // Infinity from a cotangent of zero times zero is NaN, which no halving mends: the peer gives up, too.
        while (scale * largest).is_nan() || scale * largest > self.max {
            scale *= 0.5;
            halvings += 1;
            if halvings > Self::MAX_HALVINGS {
                return None;
            }
        }
        self.scale = Some(scale);
        self.scale
    }

    /// The scale; `None` before [`PeerScaler::start`].
    #[must_use]
    pub const fn scale(&self) -> Option<f64> {
        self.scale
    }

    /// Halves the scale.
    pub fn shrink(&mut self) {
        self.scale = self.scale.map(|it| 0.5 * it);
    }

    /// Whether an adjoint of at most `largest` asks for a larger scale.
    #[must_use]
    pub fn wants_growth(&self, largest: f64) -> bool {
        largest / self.target < 0.5
    }

    /// Doubles the scale.
    pub fn grow(&mut self) {
        self.scale = self.scale.map(|it| 2.0 * it);
    }
}
