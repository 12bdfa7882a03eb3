//! Running the distribution's tools: found on a given path, confined, listened to, and ended when asked.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pyro_process::{Exit, Spawn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How many of the last lines of a tool's output an error keeps.
const TAIL_LINES: usize = 40;
/// How much of a line is kept, in bytes.
const LINE: usize = 400;
/// How often a running tool is checked against cancellation.
const BEAT: Duration = Duration::from_millis(100);
/// How long the processes of a tool that ended or was killed may take to vanish.
const GRACE: Duration = Duration::from_secs(10);

/// A tool that is missing, failed, or was stopped.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It is not on the path.
    #[error("'{tool}' is not installed")]
    Missing {
        /// The program's name.
        tool: &'static str,
    },
    /// It could not be started or listened to.
    #[error("'{tool}' cannot be run")]
    Run {
        /// The program's name.
        tool: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// It ended with a failure.
    #[error("'{tool}' failed ({status}):\n{tail}")]
    Failed {
        /// The program's name.
        tool: &'static str,
        /// How it ended.
        status: Exit,
        /// The last lines of its output, control characters escaped.
        tail: String,
    },
    /// It failed because the disk is full.
    #[error("the disk is full")]
    DiskFull,
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
}

impl ToolError {
    pub(crate) fn code(&self) -> &'static str {
        match self {
            Self::Missing { .. } => "tool_missing",
            Self::Run { .. } | Self::Failed { .. } => "tool_failed",
            Self::DiskFull => "disk_full",
            Self::Cancelled => "cancelled",
        }
    }

    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::Missing { tool } => Some(remedy(tool)),
            Self::Failed { tail, .. } if tail.contains("newuidmap") || tail.contains("newgidmap") => {
                Some(remedy("newuidmap"))
            }
            Self::Failed { status, .. } if status.status().is_none() => Some(
                "keep the program that uses pyro from reaping every child, or prepare with: pyro env pull"
                    .to_owned(),
            ),
            Self::Run { .. } | Self::Failed { .. } => {
                Some("see what is missing with: pyro doctor".to_owned())
            }
            Self::DiskFull | Self::Cancelled => None,
        }
    }
}

/// The command that installs `tool`.
pub(crate) fn remedy(tool: &str) -> String {
    let package = match tool {
        "mke2fs" => "e2fsprogs",
        "unshare" => "util-linux",
        "newuidmap" => "uidmap",
        "apt-get" | "apt-config" => "apt",
        other => other,
    };
    format!("apt-get install {package}")
}

/// Where tools are found.
#[derive(Clone, Debug)]
pub(crate) struct Tools {
    path: OsString,
}

impl Tools {
    /// Directories that hold system tools are searched after `path`, because users' paths often lack them.
    pub(crate) fn new(path: &OsStr) -> Self {
        let mut joined = path.to_owned();
        for directory in ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"] {
            if !std::env::split_paths(&joined).any(|known| known == Path::new(directory)) {
                if !joined.is_empty() {
                    joined.push(":");
                }
                joined.push(directory);
            }
        }
        Self { path: joined }
    }

    pub(crate) fn find(&self, tool: &'static str) -> Result<PathBuf, ToolError> {
        std::env::split_paths(&self.path)
            .filter(|directory| directory.is_absolute())
            .map(|directory| directory.join(tool))
            .find(|file| {
                fs_err::metadata(file)
                    .is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
            })
            .ok_or(ToolError::Missing { tool })
    }

    /// A child that runs `tool` directly, with a fixed environment.
    pub(crate) fn plain(&self, tool: &'static str, cwd: &Path) -> Result<Spawn, ToolError> {
        let mut spawn = Spawn::new(self.find(tool)?, cwd);
        spawn.env("PATH", &self.path).env("LC_ALL", "C.UTF-8").env("TZ", "UTC").own_process_group();
        Ok(spawn)
    }

    /// A child that runs `tool` as root of its own process, mount and (unless root) user namespace.
    ///
    /// When this process dies, the kernel kills `unshare`, hence the first process of the namespace, hence
    /// all others in it; its mounts go with it.
    pub(crate) fn confined(&self, tool: &'static str, cwd: &Path) -> Result<Spawn, ToolError> {
        let program = self.find(tool)?;
        let mut spawn = self.plain("unshare", cwd)?;
        if !rustix::process::geteuid().is_root() {
            self.find("newuidmap")?;
            spawn.args(["--map-auto", "--map-root-user"]);
        }
        spawn.args(["--fork", "--kill-child", "--pid", "--mount", "--mount-proc", "--"]).arg(program);
        Ok(spawn)
    }
}

/// Runs a child to its end, gives each line of its output to `line`, and kills it when `cancelled`.
pub(crate) fn run(
    tool: &'static str,
    mut spawn: Spawn,
    line: &mut dyn FnMut(&str),
    cancelled: &dyn Fn() -> bool,
) -> Result<(), ToolError> {
    let failed = |source| ToolError::Run { tool, source };
    let (read, write) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC | rustix::pipe::PipeFlags::NONBLOCK)
            .map_err(|errno| failed(errno.into()))?;
    // The tools themselves expect a pipe that blocks.
    rustix::fs::fcntl_setfl(&write, rustix::fs::OFlags::empty()).map_err(|errno| failed(errno.into()))?;
    spawn.stdout(write.try_clone().map_err(failed)?).stderr(write);
    let mut child = spawn.spawn().map_err(failed)?;
    let mut output = Output { pipe: std::fs::File::from(read), partial: Vec::new(), tail: VecDeque::new() };
    let mut stopped = false;
    let mut deadline: Option<Instant> = None;
    loop {
        wait_for(child.pidfd(), output.pipe.as_fd(), deadline.is_some()).map_err(failed)?;
        let open = output.drain(line).map_err(failed)?;
        if !stopped && cancelled() {
            stopped = true;
            child.kill().map_err(failed)?;
        }
        let ended = child.try_wait().map_err(failed)?;
        if let Some(status) = ended {
            // The pipe closes when the last process of the namespace is gone.
            let until = *deadline.get_or_insert_with(|| Instant::now() + GRACE);
            if open && Instant::now() < until {
                continue;
            }
            return output.verdict(tool, status, stopped, line);
        }
    }
}

/// Waits until the child ends, it says something, or a beat has passed.
fn wait_for(pidfd: BorrowedFd<'_>, pipe: BorrowedFd<'_>, ended: bool) -> std::io::Result<()> {
    let mut fds =
        [PollFd::from_borrowed_fd(pipe, PollFlags::IN), PollFd::from_borrowed_fd(pidfd, PollFlags::IN)];
    // An ended child keeps its pidfd readable, which would make this a busy loop.
    let fds = if ended { &mut fds[..1] } else { &mut fds[..] };
    let beat = Timespec { tv_sec: 0, tv_nsec: i64::from(BEAT.subsec_nanos()) };
    match poll(fds, Some(&beat)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(errno) => return Err(errno.into()),
    }
    // A pipe that was closed early stays readable as well.
    let closed = fds.first().is_some_and(|fd| fd.revents() == PollFlags::HUP);
    if closed && !ended {
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

struct Output {
    pipe: std::fs::File,
    partial: Vec<u8>,
    tail: VecDeque<String>,
}

impl Output {
    /// Takes what is there; false when all writers are gone.
    fn drain(&mut self, line: &mut dyn FnMut(&str)) -> std::io::Result<bool> {
        let mut buffer = [0; 8192];
        // Bounded, so that a tool that never stops talking cannot keep us from noticing a cancellation.
        for _ in 0..64 {
            match self.pipe.read(&mut buffer) {
                Ok(0) => return Ok(false),
                Ok(read) => self.add(&buffer[..read], line),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn add(&mut self, bytes: &[u8], line: &mut dyn FnMut(&str)) {
        for byte in bytes {
            if matches!(byte, b'\n' | b'\r') {
                self.end_line(line);
            } else if self.partial.len() < LINE {
                self.partial.push(*byte);
            }
        }
    }

    fn end_line(&mut self, line: &mut dyn FnMut(&str)) {
        let bytes = std::mem::take(&mut self.partial);
        let mut text = String::new();
        for character in String::from_utf8_lossy(&bytes).trim().chars() {
            if character.is_control() {
                text.extend(character.escape_default());
            } else {
                text.push(character);
            }
        }
        if text.is_empty() {
            return;
        }
        line(&text);
        if self.tail.len() == TAIL_LINES {
            self.tail.pop_front();
        }
        self.tail.push_back(text);
    }

    fn verdict(
        mut self,
        tool: &'static str,
        status: Exit,
        stopped: bool,
        line: &mut dyn FnMut(&str),
    ) -> Result<(), ToolError> {
        self.end_line(line);
        if stopped {
            return Err(ToolError::Cancelled);
        }
        if status.success() {
            return Ok(());
        }
        if self.tail.iter().any(|text| text.contains("No space left on device")) {
            return Err(ToolError::DiskFull);
        }
        let tail = Vec::from(self.tail).join("\n");
        Err(ToolError::Failed { tool, status, tail })
    }
}
