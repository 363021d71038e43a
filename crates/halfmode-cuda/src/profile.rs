//! How long each launch takes.

use crate::{Context, Result, Timer};
use std::collections::BTreeMap;

/// Launches of one name.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spent {
    /// How many.
    pub launches: usize,
    /// Microseconds of all of them together, by the device's clock.
    pub us: f64,
}

/// Launches that are being timed.
#[derive(Debug, Default)]
pub(crate) struct Recorder(Vec<(String, Timer)>);

impl Recorder {
    pub(crate) fn add(&mut self, name: String, timer: Timer) {
        self.0.push((name, timer));
    }

    fn finish(self) -> Result<BTreeMap<String, Spent>> {
        let mut spent: BTreeMap<String, Spent> = BTreeMap::new();
        for (name, timer) in self.0 {
            let us = timer.read()?;
            let entry = spent.entry(name).or_default();
            entry.launches += 1;
            entry.us += us;
        }
        Ok(spent)
    }
}

impl Context {
    /// Runs `work` and times every launch in it, by name. The clocks cost time themselves, a few microseconds a launch:
    /// the sum is more than `work` takes without them.
    ///
    /// # Errors
    /// Those of `work`, and [`crate::Error::Driver`].
    pub fn profile<E: From<crate::Error>>(
        &self,
        work: impl FnOnce() -> std::result::Result<(), E>,
    ) -> std::result::Result<BTreeMap<String, Spent>, E> {
        *self.recorder() = Some(Recorder::default());
        let outcome = work();
        let recorder = self.recorder().take();
        outcome?;
        Ok(recorder.unwrap_or_default().finish()?)
    }

    /// Launches something by `call`, with clocks around it where launches are timed.
    pub(crate) fn timed(&self, name: impl FnOnce() -> String, call: impl FnOnce() -> Result<()>) -> Result<()> {
        if self.recorder().is_none() {
            return call();
        }
        let mut timer = Timer::start(self)?;
        call()?;
        timer.mark()?;
        if let Some(recorder) = self.recorder().as_mut() {
            recorder.add(name(), timer);
        }
        Ok(())
    }
}
