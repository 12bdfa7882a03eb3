//! Data to stdout, words to stderr, and nothing anywhere else.

use std::io::Write;
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::failure::Failure;

/// Steps that take longer than this are told with the time that has passed.
const WORTH_TELLING: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(crate) struct Printer {
    json: bool,
    began: Instant,
    last: Mutex<Option<(String, Instant)>>,
}

impl Printer {
    pub(crate) fn new(json: bool) -> Self {
        Self { json, began: Instant::now(), last: Mutex::new(None) }
    }

    pub(crate) fn json(&self) -> bool {
        self.json
    }

    /// A line of data. A reader that went away is not an error.
    pub(crate) fn data(&self, line: &str) {
        drop(writeln!(std::io::stdout(), "{line}"));
    }

    /// A line of words; none with `--json`.
    pub(crate) fn say(&self, line: &str) {
        if !self.json {
            drop(writeln!(std::io::stderr(), "{line}"));
        }
    }

    /// A step of long work: told at once when it is another than the last one, with the time that passed.
    pub(crate) fn step(&self, step: &str, detail: &str) {
        let Ok(mut last) = self.last.lock() else { return };
        let now = Instant::now();
        let tell = last.as_ref().is_none_or(|(old, at)| old != step || now - *at > WORTH_TELLING);
        if tell {
            let space = if detail.is_empty() { "" } else { " " };
            self.say(&format!("[env] {step}{space}{detail} ({:.0} s)", self.began.elapsed().as_secs_f64()));
            *last = Some((step.to_owned(), now));
        }
    }

    /// One object on stdout, keys sorted.
    pub(crate) fn object(&self, object: &impl Serialize) {
        let text = serde_json::to_value(object).and_then(|value| serde_json::to_string_pretty(&value));
        match text {
            Ok(text) => self.data(&text),
            Err(error) => self.say(&format!("error: {error}")),
        }
    }

    /// Tells a failure and gives its exit code back.
    pub(crate) fn failure(&self, failure: &Failure, code: u8) -> ExitCode {
        if self.json {
            self.object(failure);
        } else {
            self.say(&format!("error: {}", failure.error));
            if let Some(hint) = &failure.hint {
                self.say(&format!("hint: {hint}"));
            }
        }
        ExitCode::from(code)
    }
}
