//! What callers ask for, checked before anything is made.

use std::os::unix::ffi::OsStrExt;

use pyro_net::Policy;
use pyro_net::secret::HeldSecret;
use pyro_proto::limits;
use pyro_vmm::Isolation;
use tokio::io::AsyncRead;

use crate::budget::Promise;
use crate::error::{Error, ErrorKind};
use crate::ports::Published;

/// The longest name of a user and a group together, in bytes.
const MOST_USER: usize = 128;

/// A machine that is asked for.
#[derive(Clone, Debug)]
pub struct VmSpec {
    /// Name of the environment, such as `debian:12`.
    pub environment: String,
    /// Virtual processors, 1 to 8.
    pub vcpu_count: u8,
    /// Memory in MiB, 256 to 32768.
    pub mem_mib: u32,
    /// The writable disk in MiB, 256 to 1048576; sparse, so only what is written takes room.
    pub disk_mib: u32,
    /// Life in seconds, 60 to the configured maximum (3600).
    pub ttl_seconds: u32,
    /// What the guest may reach; [`Policy::none`] gives it no network device.
    pub network: Policy,
    /// What the guest uses and does not see.
    pub secrets: Vec<HeldSecret>,
    /// Ports of the guest that this host's lead to.
    pub publish: Vec<Published>,
    /// Whether commands may run on the host where no guest can be had.
    pub allow_host_compat: bool,
    /// Refuse anything that isolates less.
    pub require_isolation: Option<Isolation>,
    /// Boot, also where there is a template to go on from.
    pub cold: bool,
}

impl VmSpec {
    /// A machine of the default size.
    pub fn new(environment: impl Into<String>) -> Self {
        Self {
            environment: environment.into(),
            vcpu_count: 1,
            mem_mib: 1024,
            disk_mib: 8192,
            ttl_seconds: 600,
            network: Policy::none(),
            secrets: Vec::new(),
            publish: Vec::new(),
            allow_host_compat: false,
            require_isolation: None,
            cold: false,
        }
    }

    /// A machine of this size and life, given as numbers of any value: one that no machine can have becomes one that is
    /// refused when the machine is asked for, in the words of its limits.
    #[must_use]
    pub fn sized(self, vcpu_count: i64, mem_mib: i64, disk_mib: i64, ttl_seconds: i64) -> Self {
        let narrow = |number: i64| u32::try_from(number).unwrap_or(0);
        Self {
            vcpu_count: u8::try_from(vcpu_count).unwrap_or(0),
            mem_mib: narrow(mem_mib),
            disk_mib: narrow(disk_mib),
            ttl_seconds: narrow(ttl_seconds),
            ..self
        }
    }

    /// What the host owes a guest of this size.
    pub(crate) fn promise(&self) -> Promise {
        Promise::of(self.mem_mib, self.disk_mib)
    }

    pub(crate) fn check(&self, max_ttl: u32) -> Result<(), Error> {
        let invalid = |message: String| Err(Error::new(ErrorKind::InvalidValue, message));
        if !(1..=8).contains(&self.vcpu_count) {
            return invalid("vcpu_count must be between 1 and 8".to_owned());
        }
        if !(256..=32_768).contains(&self.mem_mib) {
            return invalid("mem_mib must be between 256 and 32768".to_owned());
        }
        if !(256..=1 << 20).contains(&self.disk_mib) {
            return invalid("disk_mib must be between 256 and 1048576".to_owned());
        }
        if !(60..=max_ttl).contains(&self.ttl_seconds) {
            return invalid(format!("ttl_seconds must be between 60 and {max_ttl}"));
        }
        crate::ports::check(&self.publish)?;
        crate::network::check_secrets(&self.secrets, &self.network)
    }
}

/// A command: words run as they are, or a string for the guest's `/bin/sh -lc`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Program and arguments, as bytes.
    Argv(Vec<Vec<u8>>),
    /// A shell string.
    Shell(String),
}

impl Command {
    /// A command of words.
    pub fn argv<S: AsRef<std::ffi::OsStr>>(words: impl IntoIterator<Item = S>) -> Self {
        Self::Argv(words.into_iter().map(|word| word.as_ref().as_bytes().to_vec()).collect())
    }

    /// What is run, by name.
    pub(crate) fn program(&self) -> String {
        match self {
            Self::Argv(words) => {
                words.first().map_or_else(String::new, |word| String::from_utf8_lossy(word).into_owned())
            }
            Self::Shell(_) => "/bin/sh".to_owned(),
        }
    }

    /// The command as records show it: words quoted as a shell would need them.
    pub fn display(&self) -> String {
        match self {
            Self::Argv(words) => {
                // A word with a zero byte cannot be quoted; such a command is refused before it has a record.
                let quoted = shlex::bytes::try_join(words.iter().map(Vec::as_slice)).unwrap_or_default();
                String::from_utf8_lossy(&quoted).into_owned()
            }
            Self::Shell(text) => text.clone(),
        }
    }

    /// The words that are run as they are, as records show them; none for a shell string.
    pub fn words(&self) -> Option<Vec<String>> {
        match self {
            Self::Argv(words) => {
                Some(words.iter().map(|word| String::from_utf8_lossy(word).into_owned()).collect())
            }
            Self::Shell(_) => None,
        }
    }
}

/// A command with all that belongs to it.
pub struct ExecSpec {
    /// What to run.
    pub command: Command,
    /// Seconds until it is ended; more than 0.
    pub timeout_seconds: f64,
    /// What the command reads; none: the null device.
    pub stdin: Option<Box<dyn AsyncRead + Send + Unpin>>,
    /// Where it starts, absolute.
    pub cwd: String,
    /// Variables that it has besides those that every command has.
    pub env: Vec<(String, String)>,
    /// Who runs it, by name or number, as the guest knows them: `USER` or `USER:GROUP`; none: root.
    pub user: Option<String>,
}

impl ExecSpec {
    /// A command with the default time limit and no input.
    pub fn new(command: Command) -> Self {
        Self {
            command,
            timeout_seconds: 30.0,
            stdin: None,
            cwd: "/workspace".to_owned(),
            env: Vec::new(),
            user: None,
        }
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let invalid = |message: &str| Err(Error::new(ErrorKind::InvalidValue, message));
        if !(self.timeout_seconds > 0.0 && self.timeout_seconds.is_finite()) {
            return invalid("timeout_seconds must be positive");
        }
        if !self.cwd.starts_with('/') {
            return invalid("cwd must be an absolute path");
        }
        let words: Vec<&[u8]> = match &self.command {
            Command::Argv(words) => words.iter().map(Vec::as_slice).collect(),
            Command::Shell(text) => vec![text.trim().as_bytes()],
        };
        if words.first().is_none_or(|word| word.is_empty()) {
            return invalid("command must not be empty");
        }
        if words.iter().any(|word| word.contains(&0)) || self.cwd.contains('\0') {
            return invalid("command must not hold a zero byte");
        }
        if let Some((name, _)) =
            self.env.iter().find(|(name, _)| name.is_empty() || name.contains(['=', '\0']))
        {
            let text = format!("env: '{}' is no name of a variable", name.escape_debug());
            return Err(Error::new(ErrorKind::InvalidValue, text).hint("write NAME=VALUE"));
        }
        if let Some((name, _)) = self.env.iter().find(|(_, value)| value.contains('\0')) {
            return invalid(&format!("env: the value of {name} holds a zero byte"));
        }
        if let Some(user) = &self.user
            && (user.is_empty() || user.len() > MOST_USER || user.contains(['\0', '\n']))
        {
            let text = format!(
                "invalid user '{}'",
                user.chars().take(64).flat_map(char::escape_debug).collect::<String>()
            );
            return Err(Error::new(ErrorKind::InvalidValue, text)
                .hint("give a name or a number that the guest knows, such as nobody or 1000:1000"));
        }
        // The limits of Linux, within which the guest can start it at all.
        if words.iter().any(|word| word.len() >= limits::ARGUMENT) {
            return invalid("an argument of command must be shorter than 131072 bytes; give more on stdin");
        }
        let variable = |(name, value): &(String, String)| name.len() + value.len() + 2;
        if self.env.iter().any(|one| variable(one) > limits::ARGUMENT) {
            return invalid("env: a variable must be shorter than 131072 bytes; put more into a file");
        }
        let total = words.iter().map(|word| word.len() + 1).sum::<usize>()
            + self.env.iter().map(variable).sum::<usize>()
            + self.cwd.len();
        if total > limits::ARGUMENTS {
            return invalid("command and env must be shorter than 1048576 bytes; give more on stdin");
        }
        Ok(())
    }
}

impl std::fmt::Debug for ExecSpec {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("ExecSpec")
            .field("command", &self.command)
            .field("timeout_seconds", &self.timeout_seconds)
            .field("stdin", &self.stdin.is_some())
            .field("cwd", &self.cwd)
            // Values may be secret.
            .field("env", &self.env.iter().map(|(name, _)| name).collect::<Vec<_>>())
            .field("user", &self.user)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_told_in_the_words_of_the_contract() {
        let text = |spec: VmSpec| spec.check(3600).expect_err("outside").to_string();
        let good = VmSpec::new("debian:12");
        good.check(3600).expect("the defaults are inside");
        assert_eq!(text(VmSpec { vcpu_count: 9, ..good.clone() }), "vcpu_count must be between 1 and 8");
        assert_eq!(text(VmSpec { mem_mib: 255, ..good.clone() }), "mem_mib must be between 256 and 32768");
        assert_eq!(text(VmSpec { ttl_seconds: 59, ..good }), "ttl_seconds must be between 60 and 3600");
    }

    #[test]
    fn words_are_shown_as_a_shell_would_need_them() {
        let shown = |words: &[&str]| Command::argv(words).display();
        assert_eq!(shown(&["git", "--version"]), "git --version");
        assert_ne!(shown(&["rm", "-rf", "a b"]), shown(&["rm", "-rf", "a", "b"]));
        for words in [&["printf", "a b", "", "$HOME", "it's", "\n"][..], &["sh", "-c", "echo 'x' > y; z"]] {
            assert_eq!(shlex::split(&shown(words)).expect("words"), words);
        }
        assert_eq!(Command::Argv(vec![b"caf\xe9".to_vec()]).words().expect("words"), ["caf\u{fffd}"]);
    }

    #[test]
    fn a_time_limit_must_be_positive_and_a_command_not_empty() {
        let mut spec = ExecSpec::new(Command::argv(["true"]));
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            spec.timeout_seconds = bad;
            assert_eq!(spec.check().expect_err("refused").to_string(), "timeout_seconds must be positive");
        }
        let refused = |command: Command| {
            let error = ExecSpec::new(command).check().expect_err("refused");
            assert_eq!(error.kind(), ErrorKind::InvalidValue, "{error}");
        };
        refused(Command::Shell("  ".to_owned()));
        refused(Command::Argv(Vec::new()));
        refused(Command::argv(["echo", "a\0b"]));
        refused(Command::argv(["echo", &"x".repeat(200_000)]));
        refused(Command::Argv(vec![vec![b'x'; 100_000]; 11]));
        for (name, value) in [("", "x"), ("A=B", "x"), ("A\0", "x"), ("A", "\0"), ("A", &"x".repeat(200_000))]
        {
            let mut spec = ExecSpec::new(Command::argv(["true"]));
            spec.env = vec![(name.to_owned(), value.to_owned())];
            assert!(spec.check().expect_err("refused").to_string().starts_with("env: "), "{name:?}");
        }
        for user in ["", "a\nb", "a\0", &"x".repeat(200)] {
            let mut spec = ExecSpec::new(Command::argv(["true"]));
            spec.user = Some(user.to_owned());
            assert!(spec.check().expect_err("refused").to_string().starts_with("invalid user '"), "{user:?}");
        }
        spec.timeout_seconds = 1.0;
        spec.cwd = "workspace".to_owned();
        assert_eq!(spec.check().expect_err("refused").to_string(), "cwd must be an absolute path");
    }
}
