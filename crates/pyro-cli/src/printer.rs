//! Data to stdout, words to stderr, and nothing anywhere else.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::failure::Failure;

/// Steps that take longer than this are told with the time that has passed.
const WORTH_TELLING: Duration = Duration::from_secs(1);
const TICK: Duration = Duration::from_millis(120);

/// How the words of one command reach a person. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Printer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    json: bool,
    terminal: bool,
    began: Instant,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// The step that was told last, and when.
    step: Option<(String, Instant)>,
    /// What turns on a terminal while something takes long.
    bar: Option<ProgressBar>,
    /// Whether data could not be written.
    lost: Option<io::Error>,
}

impl Printer {
    pub(crate) fn new(json: bool) -> Self {
        let terminal = !json && io::stderr().is_terminal();
        let inner = Inner { json, terminal, began: Instant::now(), state: Mutex::default() };
        Self { inner: Arc::new(inner) }
    }

    pub(crate) fn json(&self) -> bool {
        self.inner.json
    }

    /// A line of data. A reader that went away is not an error; any other failure makes the command fail.
    pub(crate) fn data(&self, line: &str) {
        self.bytes(format!("{line}\n").as_bytes());
    }

    /// Data as it is.
    pub(crate) fn bytes(&self, bytes: &[u8]) {
        let mut stdout = io::stdout().lock();
        if let Err(error) = stdout.write_all(bytes).and_then(|()| stdout.flush())
            && error.kind() != io::ErrorKind::BrokenPipe
        {
            self.state().lost = Some(error);
        }
    }

    /// A line of words; none with `--json`.
    pub(crate) fn say(&self, line: &str) {
        if !self.json() {
            self.warn(line);
        }
    }

    /// A line of words that `--json` does not silence either.
    pub(crate) fn warn(&self, line: &str) {
        let write = || drop(writeln!(io::stderr(), "{line}"));
        match &self.state().bar {
            Some(bar) => bar.suspend(write),
            None => write(),
        }
    }

    /// A step of long work, with the time that passed: on a terminal a line that turns, elsewhere a line for each
    /// step and for each second of it that is worth telling.
    pub(crate) fn step(&self, step: &str, detail: &str) {
        if self.json() {
            return;
        }
        let space = if detail.is_empty() { "" } else { " " };
        let words = format!("{step}{space}{detail}");
        if self.inner.terminal {
            return self.turn(words);
        }
        let now = Instant::now();
        let tell = match &self.state().step {
            Some((old, at)) => old != step || now - *at > WORTH_TELLING,
            None => true,
        };
        if tell {
            self.say(&format!("[env] {words} ({:.0} s)", self.inner.began.elapsed().as_secs_f64()));
            self.state().step = Some((step.to_owned(), now));
        }
    }

    /// A phase of a command: a line, with the time since it began once that is worth telling.
    pub(crate) fn phase(&self, prefix: &str, words: &str) {
        self.settle();
        let elapsed = self.inner.began.elapsed();
        let time = if elapsed > WORTH_TELLING {
            format!(" elapsed_ms={}", elapsed.as_millis())
        } else {
            String::new()
        };
        self.say(&format!("[{prefix}] {words}{time}"));
    }

    /// Something begins that may take long: on a terminal, that is seen.
    pub(crate) fn turn(&self, words: String) {
        if !self.inner.terminal {
            return;
        }
        let mut state = self.state();
        let bar = state.bar.get_or_insert_with(|| {
            let style = ProgressStyle::with_template("{spinner} {msg} ({elapsed})");
            let bar = ProgressBar::new_spinner();
            bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
            bar.enable_steady_tick(TICK);
            bar
        });
        bar.set_message(words);
    }

    /// What took long is over.
    pub(crate) fn settle(&self) {
        if let Some(bar) = self.state().bar.take() {
            bar.finish_and_clear();
        }
    }

    /// One object on stdout, keys sorted.
    pub(crate) fn object(&self, object: &impl Serialize) {
        let text = serde_json::to_value(object).and_then(|value| serde_json::to_string_pretty(&value));
        match text {
            Ok(text) => self.data(&text),
            Err(error) => self.warn(&format!("error: {error}")),
        }
    }

    /// Tells a failure and gives its exit code back.
    pub(crate) fn failure(&self, failure: &Failure, code: u8) -> ExitCode {
        self.settle();
        if self.json() {
            self.object(failure);
        } else {
            self.say(&format!("error: {}", failure.error));
            if let Some(hint) = &failure.hint {
                self.say(&format!("hint: {hint}"));
            }
        }
        ExitCode::from(code)
    }

    /// The failure of data that could not be written, if there was one.
    pub(crate) fn lost(&self) -> Option<Failure> {
        self.settle();
        self.state().lost.take().map(|error| {
            Failure::host("the output could not be written", &error)
                .hint("make room where stdout goes, then try again")
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.inner.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
