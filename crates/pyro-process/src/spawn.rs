//! The spawner thread and the description of a child.

#![expect(unsafe_code, reason = "code between fork and exec, and numbered descriptors for the child")]

use std::ffi::{CStr, OsStr};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError, mpsc};

use rustix::event::EventfdFlags;
use rustix::process::{Pid, Signal, WaitOptions};

use crate::child::Child;
use crate::jail::{self, Jail, Prepared};
use crate::program::Program;
use crate::report::{self, Message, Report, Teller};

/// A child process that is about to be started.
///
/// The environment of the child is empty but for what [`Spawn::env`] adds; its working directory is always
/// given.
#[derive(Debug)]
pub struct Spawn {
    command: Command,
    cwd: PathBuf,
    own_group: bool,
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

impl Spawn {
    /// Describes a child that runs `program` in the directory `cwd`.
    pub fn new(program: impl AsRef<OsStr>, cwd: &Path) -> Self {
        let mut command = Command::new(program);
        command.env_clear().stdin(Stdio::null());
        Self {
            command,
            cwd: cwd.to_owned(),
            own_group: false,
            fds: Vec::new(),
            jail: None,
            oom_score_adj: None,
        }
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
        self.own_group = true;
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
        self.start(Bond::Owned(rustix::process::getpid()))
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

    fn start(mut self, bond: Bond) -> io::Result<Child> {
        // The numbers that the child wants may be taken by other descriptors of this list, so all are first
        // moved out of the way of every wanted number.
        let floor = self.fds.iter().map(|(_, number)| number + 1).max().unwrap_or(3);
        let fds = self
            .fds
            .iter()
            .map(|(fd, number)| Ok((rustix::io::fcntl_dupfd_cloexec(fd, floor)?, *number)))
            .collect::<io::Result<Vec<_>>>()?;
        self.fds.clear();
        let (report, teller) = report::pair(floor)?;
        let jail = self.jail.take().map(Jail::prepare).transpose()?;
        let jailed = jail.is_some();
        let mut program = Program::new(&self.command, &self.cwd)?;
        let plan = Plan {
            bond,
            kept: owner_may_lose_status(),
            own_group: self.own_group,
            oom_score_adj: self.oom_score_adj.map(raised_oom_score).transpose()?.flatten(),
            jail,
            fds,
            teller,
        };
        let hook = move || -> io::Result<()> {
            let error = match plan.prepare(&program) {
                Ok(()) => program.execute(),
                Err(error) => error,
            };
            plan.teller.failed(&error);
            // SAFETY: ends this process without running anything of the program that it was forked from.
            unsafe { libc::_exit(NOT_EXECUTED) }
        };
        // SAFETY: the hook makes system calls only; it neither allocates nor takes a lock.
        unsafe { self.command.pre_exec(hook) };
        // The child has executed or ended by now, so everything that it had to say is there.
        let std_child = on_spawner(self.command, floor)?;
        started(std_child, report, jailed)
    }
}

/// The child as its own report describes it.
fn started(mut std_child: std::process::Child, report: Report, jailed: bool) -> io::Result<Child> {
    let (mut named, mut keeper, mut failed, mut ended) = (None, None, None, None);
    loop {
        let message = match report.next() {
            Ok(Some(message)) => message,
            Ok(None) => break,
            Err(error) => {
                // A child that cannot be named is nobody's: it goes, and whatever it stands before with it.
                drop(std_child.kill());
                drop(std_child.wait());
                return Err(error);
            }
        };
        match message {
            Message::Child(pid, pidfd) => named = Some((pid.unsigned_abs(), pidfd)),
            Message::Keeper(pidfd) => keeper = Some(pidfd),
            Message::Failed(error) => failed = Some(error),
            // A short program may have ended by now.
            Message::Ended(status) => ended = Some(status),
        }
    }
    let Some((id, pidfd)) = named else {
        drop(std_child.wait());
        return Err(
            failed.unwrap_or_else(|| io::Error::other("the child was killed before it ran its program"))
        );
    };
    let stdin = std_child.stdin.take();
    let (stdout, stderr) = (std_child.stdout.take(), std_child.stderr.take());
    let mut child = Child { id, pidfd, stdin, stdout, stderr, jailed, keeper, report, ended, exit: None };
    match failed {
        None => Ok(child),
        Some(error) => {
            drop(child.wait());
            Err(error)
        }
    }
}

/// Whether something in this process keeps it from learning how its children end.
fn owner_may_lose_status() -> bool {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    // SAFETY: asks for the disposition of a signal, which is read only when the call has filled it in.
    unsafe {
        libc::sigaction(libc::SIGCHLD, std::ptr::null(), action.as_mut_ptr()) != 0 || {
            let action = action.assume_init();
            action.sa_sigaction != libc::SIG_DFL || action.sa_flags & libc::SA_NOCLDWAIT != 0
        }
    }
}

const OOM_SCORE_ADJ: &CStr = c"/proc/self/oom_score_adj";

/// The text to write for this value. None where this process, and so its child, has as much already: to lower the value
/// needs a privilege, and would spare the child.
fn raised_oom_score(value: i32) -> io::Result<Option<Vec<u8>>> {
    let own = fs_err::read_to_string(OOM_SCORE_ADJ.to_string_lossy().as_ref())?;
    let own: i32 = own.trim().parse().map_err(io::Error::other)?;
    Ok((own < value).then(|| value.to_string().into_bytes()))
}

/// What the child does between fork and exec: system calls only.
struct Plan {
    bond: Bond,
    /// Whether a process in between learns how the program ends.
    kept: bool,
    own_group: bool,
    oom_score_adj: Option<Vec<u8>>,
    jail: Option<Prepared>,
    fds: Vec<(OwnedFd, RawFd)>,
    teller: Teller,
}

impl Plan {
    fn prepare(&self, program: &Program) -> io::Result<()> {
        // A program that starts others needs to learn how they end, whatever its owner ignores.
        // SAFETY: sets a disposition of this process.
        unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
        match self.bond {
            Bond::Owned(owner) => self.die_with(owner)?,
            Bond::Detached => {
                self.teller.child()?;
                detach()?;
            }
        }
        keep_open_files_back();
        program.enter()?;
        // Before the jail, which may hide this file; the program inherits the value.
        if let Some(text) = &self.oom_score_adj {
            let flags = rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::CLOEXEC;
            let file = rustix::fs::open(OOM_SCORE_ADJ, flags, rustix::fs::Mode::empty())?;
            rustix::io::write(file, text)?;
        }
        if let Some(jail) = &self.jail {
            jail.enter()?;
            jail.settle()?;
        }
        hand_over(&self.fds)
    }

    fn die_with(&self, mut owner: Pid) -> io::Result<()> {
        killed_with(owner)?;
        if self.kept {
            self.teller.keeper()?;
            owner = rustix::process::getpid();
            if let Some(child) = jail::fork()? {
                be_keeper(child, &self.teller);
            }
            killed_with(owner)?;
        }
        if self.own_group {
            rustix::process::setpgid(None, None)?;
        }
        self.teller.child()
    }
}

/// Has the kernel kill this process when its parent dies, which is `owner`, or was.
fn killed_with(owner: Pid) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    if rustix::process::getppid() == Some(owner) {
        Ok(())
    } else {
        Err(io::Error::from_raw_os_error(libc::ESRCH))
    }
}

/// Waits for the child, and tells the owner how it has ended. It dies with the owner, and the child dies with it.
fn be_keeper(child: Pid, teller: &Teller) -> ! {
    // SAFETY: the set is initialised before it is read; only the mask of this process changes.
    unsafe {
        let mut all = std::mem::MaybeUninit::uninit();
        libc::sigfillset(all.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, all.as_ptr(), std::ptr::null_mut());
    }
    // What the owner has open must not stay open here: it waits for the ends of its pipes.
    jail::keep_only([teller.number(); 2]);
    loop {
        match rustix::process::waitpid(Some(child), WaitOptions::empty()) {
            Ok(Some((_, status))) => break teller.ended(status.as_raw()),
            Ok(None) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => break,
        }
    }
    // SAFETY: ends this process without running anything of the program that it was forked from.
    unsafe { libc::_exit(0) }
}

/// Keeps what is open from the program. Rust marks every descriptor close-on-exec, but a host program (an embedding Python,
/// a shell) may not. Before a limit is lowered, which would hide the numbers above it.
fn keep_open_files_back() {
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
}

/// Gives the program the descriptors that it is to have.
fn hand_over(fds: &[(OwnedFd, RawFd)]) -> io::Result<()> {
    for (fd, number) in fds {
        // SAFETY: both are valid numbers in this process, which is about to execute another program.
        if unsafe { libc::dup2(fd.as_raw_fd(), *number) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Goes on in a grandchild, so that init reaps it and no terminal can reach it. The socket by which the owner
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

/// The exit code of a child that could not run its program; the owner is told why.
const NOT_EXECUTED: i32 = 127;

/// Descriptors that are looked at one by one where the kernel cannot do it at once.
const MOST_FILES: i32 = 65_536;

struct Request {
    command: Command,
    /// Numbers below this one are those that the child wants.
    floor: RawFd,
    answer: mpsc::SyncSender<io::Result<std::process::Child>>,
}

/// Forks on the thread that lives as long as this process.
fn on_spawner(command: Command, floor: RawFd) -> io::Result<std::process::Child> {
    static SPAWNER: OnceLock<Mutex<(u32, mpsc::Sender<Request>)>> = OnceLock::new();

    let cell = SPAWNER.get_or_init(|| Mutex::new((std::process::id(), start_spawner())));
    let (answer, result) = mpsc::sync_channel(1);
    {
        let mut spawner = cell.lock().unwrap_or_else(PoisonError::into_inner);
        // A forked copy of this process (Python's multiprocessing) has no spawner thread: make one.
        if spawner.0 != std::process::id() {
            *spawner = (std::process::id(), start_spawner());
        }
        if let Err(mpsc::SendError(request)) = spawner.1.send(Request { command, floor, answer }) {
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
        while let Ok(Request { mut command, floor, answer }) = requests.recv() {
            #[expect(clippy::disallowed_methods, reason = "this is the one place that forks")]
            let child = taken(floor).and_then(|_placeholders| command.spawn());
            // Whoever asked waits for the answer.
            drop(answer.send(child));
        }
    });
    drop(spawner);
    sender
}

/// Takes all numbers from 3 up to `floor`. The standard library makes a pipe for the fork, whose end the child would
/// otherwise overwrite with a descriptor of the same number; then nobody would wait for the exec.
fn taken(floor: RawFd) -> io::Result<Vec<OwnedFd>> {
    let mut placeholders = vec![rustix::event::eventfd(0, EventfdFlags::CLOEXEC)?];
    loop {
        let copy = rustix::io::fcntl_dupfd_cloexec(&placeholders[0], 3)?;
        if copy.as_raw_fd() >= floor {
            return Ok(placeholders);
        }
        placeholders.push(copy);
    }
}

fn spawner_is_gone() -> io::Error {
    io::Error::other("the spawner thread could not be started")
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;
    use crate::output;

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
