//! What keeps a policy file from being used.

use std::io;
use std::path::PathBuf;

use super::RuleError;
use super::file::{MAX_DEPTH, MAX_FILE, MAX_FILES, MAX_READ_RULES};

/// A policy file that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyFileError {
    /// The file cannot be read.
    #[error("network policy '{}' cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// There is no file of this name.
    #[error("there is no network policy '{name}': no file '{}'; write a path with a slash, such as ./{name}, for \
             another file", path.display())]
    NoSuchName {
        /// The name.
        name: String,
        /// Where it would be.
        path: PathBuf,
    },
    /// A value without a slash that is no name either.
    #[error(
        "'{0}' is no name of a network policy; use letters, digits, '.', '_' and '-', or write a path with a slash"
    )]
    BadName(String),
    /// A name where no directory of policies is known.
    #[error("network policy '{0}' has no directory to be found in; write a path with a slash, such as ./{0}")]
    NoDirectory(String),
    /// The file is longer than a policy is.
    #[error("network policy '{}' is larger than {} KiB; use wider rules, such as *.example.com", path.display(), MAX_FILE >> 10)]
    Long {
        /// The file.
        path: PathBuf,
    },
    /// The text is not TOML, or has a key that no policy has.
    #[error("network policy '{}', line {line}: {reason}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong there.
        reason: String,
    },
    /// A rule is wrong.
    #[error("network policy '{}', key '{key}': {fault}", path.display())]
    Rule {
        /// The file.
        path: PathBuf,
        /// The key whose list has the rule.
        key: &'static str,
        /// The rule and what is wrong with it.
        fault: RuleError,
    },
    /// A file includes itself, perhaps by way of others.
    #[error("network policies include each other: {}; remove one 'include'", chain(.0))]
    Cycle(Vec<PathBuf>),
    /// Files include each other too deep, or there are too many.
    #[error("network policy '{}' includes too much: at most {MAX_DEPTH} levels, {MAX_FILES} files and \
             {MAX_READ_RULES} rules; merge some files", path.display())]
    TooMuch {
        /// The file whose include went too far.
        path: PathBuf,
    },
}

fn chain(files: &[PathBuf]) -> String {
    files.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" -> ")
}
