//! Ctrl-C and SIGTERM: the first asks for a checkpoint and a clean end, a second one ends at once.

use crate::cli::error::{CliError, Exit};
use crate::cli::output::Output;
use halfmode::train::job::StopReason;
use signal_hook::consts::{SIGINT, SIGTERM, SIGXFSZ};
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

    /// Ends the program where there is nothing to save: samples are made in parallel, with nobody to tell
    /// it to. Files are written whole or not at all, so none is harmed.
    pub(crate) fn exit_if_asked(&self, output: &Output, why: &str) {
        if let Some(reason) = self.stop() {
            output.note(why);
            std::process::exit(stop_exit(reason) as i32);
        }
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

/// Makes a file that outgrows its limit an error of writing; unheard, the signal would end the program.
pub(crate) fn survive_file_limits() -> Result<(), CliError> {
    let heard = flag::register(SIGXFSZ, Arc::default());
    heard.map(|_| ()).map_err(|err| CliError::new(Exit::Other, format!("cannot listen to signals: {err}")))
}

/// The exit code of a run that was stopped and saved.
pub(crate) fn stop_exit(reason: StopReason) -> Exit {
    match reason {
        StopReason::Interrupt => Exit::Interrupted,
        StopReason::Terminate => Exit::Terminated,
    }
}
