//! The spawner thread and the description of a child.

#![expect(unsafe_code, reason = "code between fork and exec, and numbered descriptors for the child")]

use std::ffi::{CStr, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};

use rustix::process::{Pid, PidfdFlags, Signal};

use crate::jail::{Jail, Prepared};

/// A child process that is about to be started.
///
/// The environment of the child is empty but for what [`Spawn::env`] adds; its working directory is always
/// given.
#[derive(Debug)]
pub struct Spawn {
    command: Command,
    fds: Vec<(OwnedFd, RawFd)>,
    jail: Option<Jail>,
    oom_score_adj: Option<i32>,
}

/// Whether the child belongs to the process that starts it.
#[derive(Clone, Copy, Debug)]
enum Bond {
    /// It is killed when its owner dies.
    Owned(Pid),
    /// It lives on, in a session of its own, as a child of nobody here.
    Detached,
}

/// A running child, its pidfd, and its standard streams where they are pipes.
///
/// Dropping it neither ends nor reaps the child: call [`Child::kill`] and [`Child::wait`].
#[derive(Debug)]
pub struct Child {
    inner: std::process::Child,
    pidfd: OwnedFd,
    /// Whether the process is the warden of a jail.
    jailed: bool,
}

impl Spawn {
    /// Describes a child that runs `program` in the directory `cwd`.
    pub fn new(program: impl AsRef<OsStr>, cwd: &Path) -> Self {
        let mut command = Command::new(program);
        command.current_dir(cwd).env_clear().stdin(Stdio::null());
        Self { command, fds: Vec::new(), jail: None, oom_score_adj: None }
    }

    /// Adds one argument.
    pub fn arg(&mut self, arg: impl AsRef<OsStr>) -> &mut Self {
        self.command.arg(arg);
        self
    }

    /// Adds several arguments.
    pub fn args<S: AsRef<OsStr>>(&mut self, args: impl IntoIterator<Item = S>) -> &mut Self {
        self.command.args(args);
        self
    }

    /// Sets one variable of the child's environment.
    pub fn env(&mut self, key: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> &mut Self {
        self.command.env(key, value);
        self
    }

    /// Sets the child's standard input (the null device unless called).
    pub fn stdin(&mut self, stdio: impl Into<Stdio>) -> &mut Self {
        self.command.stdin(stdio);
        self
    }

    /// Sets the child's standard output (the owner's own unless called).
    pub fn stdout(&mut self, stdio: impl Into<Stdio>) -> &mut Self {
        self.command.stdout(stdio);
        self
    }

    /// Sets the child's standard error (the owner's own unless called).
    pub fn stderr(&mut self, stdio: impl Into<Stdio>) -> &mut Self {
        self.command.stderr(stdio);
        self
    }

    /// Puts the child into a process group of its own, so that a Ctrl-C at the terminal does not reach it.
    pub fn own_process_group(&mut self) -> &mut Self {
        self.command.process_group(0);
        self
    }

    /// Hands `fd` to the child under the number `number`, which must be 3 or more and given once.
    pub fn fd(&mut self, fd: OwnedFd, number: RawFd) -> &mut Self {
        debug_assert!(number >= 3, "0 to 2 are the standard streams");
        self.fds.push((fd, number));
        self
    }

    /// Keeps the child apart from the host. What is waited for is then the child's warden, which ends as the child
    /// has ended.
    pub fn jail(&mut self, jail: Jail) -> &mut Self {
        self.jail = Some(jail);
        self
    }

    /// Makes the kernel prefer the child, and what it starts, when memory runs out: 1000 is the most. A child whose owner
    /// is preferred as much already keeps the owner's value.
    pub fn oom_score_adj(&mut self, value: i32) -> &mut Self {
        self.oom_score_adj = Some(value);
        self
    }

    /// Starts the child.
    ///
    /// # Errors
    /// As `std::process::Command::spawn`: the program is missing or not executable, or the host refuses
    /// another process.
    pub fn spawn(self) -> io::Result<Child> {
        let bond = Bond::Owned(rustix::process::getpid());
        let jailed = self.jail.is_some();
        let inner = self.start(bond)?;
        let pid = Pid::from_child(&inner);
        // The child cannot have been reaped yet, so the number still names it.
        match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Child { inner, pidfd, jailed }),
            Err(error) => {
                let mut unowned = inner;
                drop(unowned.kill());
                drop(unowned.wait());
                Err(error.into())
            }
        }
    }

    /// Starts a process that outlives this one: in a session of its own, without a terminal, and never this
    /// process's to reap. Who wants to know of its end shares a lock or a pipe with it.
    ///
    /// # Errors
    /// As [`Spawn::spawn`].
    pub fn spawn_detached(self) -> io::Result<()> {
        // What is waited for here is the process in between, which ends at once.
        self.start(Bond::Detached)?.wait().map(drop)
    }

    fn start(mut self, bond: Bond) -> io::Result<std::process::Child> {
        // The numbers that the child wants may be taken by other descriptors of this list, so all are first
        // moved out of the way of every wanted number.
        let floor = self.fds.iter().map(|(_, number)| number + 1).max().unwrap_or(3);
        let moved = self
            .fds
            .iter()
            .map(|(fd, number)| Ok((rustix::io::fcntl_dupfd_cloexec(fd, floor)?, *number)))
            .collect::<io::Result<Vec<_>>>()?;
        self.fds.clear();
        let jail = self.jail.take().map(Jail::prepare).transpose()?;
        let oom_score_adj = self.oom_score_adj.map(raised_oom_score).transpose()?.flatten();
        let hook = move || prepare_child(bond, oom_score_adj.as_deref(), jail.as_ref(), &moved);
        // SAFETY: the hook makes system calls only; it neither allocates nor takes a lock.
        unsafe { self.command.pre_exec(hook) };
        on_spawner(self.command)
    }
}

impl Child {
    /// The process number, for reports only: signals go through the pidfd.
    pub fn id(&self) -> u32 {
        self.inner.id()
    }

    /// The pidfd; it becomes readable when the child ends.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// The read end of the child's standard output, once, where it was `Stdio::piped()`.
    pub fn take_stdout(&mut self) -> Option<std::process::ChildStdout> {
        self.inner.stdout.take()
    }

    /// The read end of the child's standard error, once, where it was `Stdio::piped()`.
    pub fn take_stderr(&mut self) -> Option<std::process::ChildStderr> {
        self.inner.stderr.take()
    }

    /// Sends a signal; a child that has ended already is no error.
    ///
    /// # Errors
    /// When the kernel refuses for another reason.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(&self.pidfd, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Ends the child at once; a child that has ended already is no error.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn kill(&self) -> io::Result<()> {
        self.signal(self.end_signal())
    }

    /// The signal that ends the child at once. A warden is told to end what it guards, so that its own end says that
    /// this is gone.
    pub fn end_signal(&self) -> Signal {
        if self.jailed { Signal::TERM } else { Signal::KILL }
    }

    /// The number of the process that runs the program, for reports: in a jail it is not the child itself. None where
    /// it has ended.
    pub fn program(&self) -> Option<u32> {
        if !self.jailed {
            return Some(self.id());
        }
        only_child(self.id()).and_then(only_child)
    }

    /// The exit status if the child has ended, without waiting.
    ///
    /// # Errors
    /// When the status cannot be had.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.inner.try_wait()
    }

    /// Waits for the end of the child and reaps it.
    ///
    /// # Errors
    /// When the status cannot be had.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        self.inner.wait()
    }
}

/// Runs a short helper to its end and returns its status and output, read whole.
///
/// # Errors
/// As [`Spawn::spawn`], or when its output cannot be read.
pub fn output(mut spawn: Spawn) -> io::Result<Output> {
    spawn.command.stdout(Stdio::piped()).stderr(Stdio::piped());
    spawn.spawn()?.inner.wait_with_output()
}

fn only_child(pid: u32) -> Option<u32> {
    let children = fs_err::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_ascii_whitespace().next()?.parse().ok()
}

const OOM_SCORE_ADJ: &CStr = c"/proc/self/oom_score_adj";

/// The text to write for this value. None where this process, and so its child, has as much already: to lower the value
/// needs a privilege, and would spare the child.
fn raised_oom_score(value: i32) -> io::Result<Option<Vec<u8>>> {
    let own = fs_err::read_to_string(OOM_SCORE_ADJ.to_string_lossy().as_ref())?;
    let own: i32 = own.trim().parse().map_err(io::Error::other)?;
    Ok((own < value).then(|| value.to_string().into_bytes()))
}

/// What the child does between fork and exec.
fn prepare_child(
    bond: Bond,
    oom_score_adj: Option<&[u8]>,
    jail: Option<&Prepared>,
    fds: &[(OwnedFd, RawFd)],
) -> io::Result<()> {
    match bond {
        Bond::Owned(owner) => {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            if rustix::process::getppid() != Some(owner) {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
        }
        Bond::Detached => detach()?,
    }
    // Before the jail, which may hide this file; the program inherits the value.
    if let Some(text) = oom_score_adj {
        let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC;
        let file = rustix::fs::open(OOM_SCORE_ADJ, flags, rustix::fs::Mode::empty())?;
        rustix::io::write(file, text)?;
    }
    if let Some(jail) = jail {
        jail.enter()?;
        jail.settle()?;
    }
    // Rust marks every descriptor close-on-exec, but a host program (an embedding Python, a shell) may not.
    // SAFETY: a system call on numbers; it closes nothing now, so the runtime's own pipe stays usable.
    let marked = unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if marked != 0 {
        // A kernel before 5.11 does not know the call, or not this use of it.
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let limit = limit.and_then(|limit| i32::try_from(limit).ok()).unwrap_or(MOST_FILES).min(MOST_FILES);
        for number in 3..limit {
            // SAFETY: a system call on a number; one that is not open is refused.
            unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) };
        }
    }
    for (fd, number) in fds {
        // SAFETY: both are valid numbers in this process, which is about to execute another program.
        if unsafe { libc::dup2(fd.as_raw_fd(), *number) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Goes on in a grandchild, so that init reaps it and no terminal can reach it. The pipe by which the runtime
/// learns of a failed exec stays open in the grandchild.
fn detach() -> io::Result<()> {
    rustix::process::setsid()?;
    // SAFETY: this process has one thread, that of the fork.
    match unsafe { libc::fork() } {
        0 => Ok(()),
        // SAFETY: ends the process in between without running anything of the program it was forked from.
        1.. => unsafe { libc::_exit(0) },
        _ => Err(io::Error::last_os_error()),
    }
}

/// Descriptors that are looked at one by one where the kernel cannot do it at once.
const MOST_FILES: i32 = 65_536;

type Request = (Command, mpsc::SyncSender<io::Result<std::process::Child>>);

/// Forks on the thread that lives as long as this process.
fn on_spawner(command: Command) -> io::Result<std::process::Child> {
    static SPAWNER: OnceLock<Mutex<(u32, mpsc::Sender<Request>)>> = OnceLock::new();

    let cell = SPAWNER.get_or_init(|| Mutex::new((std::process::id(), start_spawner())));
    let (answer, result) = mpsc::sync_channel(1);
    {
        let mut spawner = cell.lock().unwrap_or_else(PoisonError::into_inner);
        // A forked copy of this process (Python's multiprocessing) has no spawner thread: make one.
        if spawner.0 != std::process::id() {
            *spawner = (std::process::id(), start_spawner());
        }
        if let Err(mpsc::SendError(request)) = spawner.1.send((command, answer)) {
            // The thread could not be had when it was asked for; perhaps it can be now.
            *spawner = (std::process::id(), start_spawner());
            spawner.1.send(request).map_err(|_closed| spawner_is_gone())?;
        }
    }
    result.recv().map_err(|_closed| spawner_is_gone())?
}

fn start_spawner() -> mpsc::Sender<Request> {
    let (sender, requests) = mpsc::channel::<Request>();
    let spawner = std::thread::Builder::new().name("pyro-spawner".to_owned()).spawn(move || {
        // The sender is in a static, so this loop ends with the process.
        while let Ok((mut command, answer)) = requests.recv() {
            #[expect(clippy::disallowed_methods, reason = "this is the one place that forks")]
            let child = command.spawn();
            if let Err(unclaimed) = answer.send(child)
                && let Ok(mut child) = unclaimed.0
            {
                drop(child.kill());
                drop(child.wait());
            }
        }
    });
    drop(spawner);
    sender
}

fn spawner_is_gone() -> io::Error {
    io::Error::other("the spawner thread could not be started")
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_child_gets_a_descriptor_under_the_number_that_was_asked_for() {
        let (read, write) = rustix::pipe::pipe().expect("a pipe");
        let mut spawn = Spawn::new("sh", Path::new("/"));
        spawn.args(["-c", "cat <&7"]).fd(read, 7);
        std::fs::File::from(write).write_all(b"through seven").expect("written");
        let output = output(spawn).expect("sh runs");
        assert_eq!(output.stdout, b"through seven");
    }

    #[test]
    fn a_child_inherits_nothing_that_was_not_given() {
        let (read, _write) = rustix::pipe::pipe().expect("a pipe");
        rustix::io::fcntl_setfd(&read, rustix::io::FdFlags::empty()).expect("inheritable");
        let mut spawn = Spawn::new("/bin/sh", Path::new("/"));
        spawn.args(["-c", "ls /proc/self/fd | wc -l; env | grep -c SECRET"]);
        let output = output(spawn).expect("sh runs");
        // 0, 1, 2 and the directory that ls itself reads.
        assert_eq!(String::from_utf8_lossy(&output.stdout), "4\n0\n");
    }

    #[test]
    fn the_kernel_takes_a_child_before_its_owner_when_memory_runs_out() {
        let own = fs_err::read_to_string("/proc/self/oom_score_adj").expect("read");
        let own: i32 = own.trim().parse().expect("a number");
        for (asked, expected) in [(700, 700.max(own)), (-1000, own)] {
            let mut spawn = Spawn::new("cat", Path::new("/"));
            spawn.arg("/proc/self/oom_score_adj").oom_score_adj(asked);
            let output = output(spawn).expect("cat runs");
            assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{expected}\n"));
        }
    }

    #[test]
    fn the_pidfd_tells_the_end() {
        let mut spawn = Spawn::new("sh", Path::new("/"));
        spawn.args(["-c", "echo $$; exec cat"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = spawn.spawn().expect("sh runs");
        child.kill().expect("killed");
        let mut text = String::new();
        child.take_stdout().expect("piped").read_to_string(&mut text).expect("read");
        let status = child.wait().expect("reaped");
        assert!(!status.success());
        child.kill().expect("a dead child is no error");
    }

    #[test]
    fn a_missing_program_is_an_error_of_spawn() {
        let error = Spawn::new("/nonexistent/program", Path::new("/")).spawn().expect_err("no such program");
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }
}
