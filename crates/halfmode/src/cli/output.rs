//! Data goes to stdout, talk to stderr. Closed streams are no reason to panic.

use crate::cli::error::{CliError, Exit};
use clap::ColorChoice;
use serde_json::{Value, json};
use std::io::{IsTerminal, Write};

/// How much is said on stderr.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Verbosity {
    /// Errors.
    Quiet,
    /// And what happens.
    Normal,
    /// And details.
    Verbose,
}

/// Where a command writes.
#[derive(Clone, Debug)]
pub(crate) struct Output {
    command: &'static str,
    json: bool,
    verbosity: Verbosity,
    color: bool,
}

impl Output {
    pub(crate) fn new(command: &'static str, json: bool, verbosity: Verbosity, color: ColorChoice) -> Self {
        let color = match color {
            ColorChoice::Always => true,
            ColorChoice::Never => false,
            ColorChoice::Auto => {
                std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
            }
        };
        Output { command, json, verbosity, color }
    }

    /// Whether a line on stderr can be redrawn.
    pub(crate) fn is_live(&self) -> bool {
        self.verbosity > Verbosity::Quiet && std::io::stderr().is_terminal()
    }

    /// Whether details were asked for.
    pub(crate) fn is_verbose(&self) -> bool {
        self.verbosity == Verbosity::Verbose
    }

    /// Whether stderr is coloured.
    pub(crate) fn color(&self) -> bool {
        self.color
    }

    /// Talk.
    pub(crate) fn note(&self, text: &str) {
        if self.verbosity > Verbosity::Quiet {
            let _ = writeln!(std::io::stderr(), "{text}");
        }
    }

    /// Talk for those who asked for more.
    pub(crate) fn detail(&self, text: &str) {
        if self.is_verbose() {
            let _ = writeln!(std::io::stderr(), "{text}");
        }
    }

    /// Something to look at, although the command goes on.
    pub(crate) fn warn(&self, text: &str) {
        if self.verbosity > Verbosity::Quiet {
            let label = if self.color { "\x1b[1;33mwarning:\x1b[0m" } else { "warning:" };
            let _ = writeln!(std::io::stderr(), "{label} {text}");
        }
    }

    /// The result: `object`'s members, after the command's name, with `--json`; else `text`.
    pub(crate) fn result(&self, object: Value, text: impl FnOnce() -> String) -> Result<(), CliError> {
        let text = if self.json { self.object(object) } else { text() };
        print(&text)
    }

    /// An error, on stderr; with `--json` on stdout, too.
    pub(crate) fn error(&self, err: &CliError) {
        let _ = write!(std::io::stderr(), "{}", err.render(self.color));
        if self.json {
            self.print_error(err);
        }
    }

    /// An error as the one JSON object on stdout.
    pub(crate) fn print_error(&self, err: &CliError) {
        // Nothing can be said when the stream is closed.
        let _ = print(&self.object(json!({ "error": err.to_json() })));
    }

    fn object(&self, members: Value) -> String {
        let mut object = serde_json::Map::new();
        object.insert("command".to_owned(), self.command.into());
        object.insert("version".to_owned(), env!("CARGO_PKG_VERSION").into());
        if let Value::Object(members) = members {
            object.extend(members);
        }
        Value::Object(object).to_string()
    }
}

/// One write to stdout. A reader that went away is not an error.
fn print(text: &str) -> Result<(), CliError> {
    let mut stdout = std::io::stdout().lock();
    let text = format!("{}\n", text.trim_end_matches('\n'));
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(err) if err.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(CliError::new(Exit::Other, format!("cannot write to stdout: {err}")))
        }
        _ => Ok(()),
    }
}
