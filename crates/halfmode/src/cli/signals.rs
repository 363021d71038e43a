//! Ctrl-C and SIGTERM: the first asks for a checkpoint and a clean end, a second one ends at once.

use crate::cli::error::{CliError, Exit};
use halfmode::train::job::StopReason;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What was asked so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Signals {
    interrupt: Arc<AtomicBool>,
    terminate: Arc<AtomicBool>,
}

impl Signals {
    /// Listens from now on.
    pub(crate) fn listen() -> Result<Self, CliError> {
        let signals = Signals::default();
        for (signal, asked) in [(SIGINT, &signals.interrupt), (SIGTERM, &signals.terminate)] {
            // Order matters: the first signal finds the flag down, the second one up.
            flag::register_conditional_default(signal, Arc::clone(asked))
                .and_then(|_| flag::register(signal, Arc::clone(asked)))
                .map_err(|err| CliError::new(Exit::Other, format!("cannot listen to signals: {err}")))?;
        }
        Ok(signals)
    }

    /// Whether to stop, and why.
    pub(crate) fn stop(&self) -> Option<StopReason> {
        if self.interrupt.load(Ordering::Relaxed) {
            Some(StopReason::Interrupt)
        } else if self.terminate.load(Ordering::Relaxed) {
            Some(StopReason::Terminate)
        } else {
            None
        }
    }
}

/// The exit code of a run that was stopped and saved.
pub(crate) fn stop_exit(reason: StopReason) -> Exit {
    match reason {
        StopReason::Interrupt => Exit::Interrupted,
        StopReason::Terminate => Exit::Terminated,
    }
}
