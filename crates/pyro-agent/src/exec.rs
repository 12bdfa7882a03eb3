//! One command: start it in the guest's root, move its bytes, tell its end.
//!
//! Output goes from the process's pipe into the reply stream one chunk at a time; a reader that stalls stops
//! the process, not the agent. The command's own end is that of its main process: what it left in the
//! background lives on; its output is waited for a moment, and sent after the end where the host wants it.

use std::cell::RefCell;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pyro_proto::{
    EnvVar, ExecEvent, ExecExited, ExecInput, ExecRefused, ExecStart, ExecStarted, exec_event, exec_exited,
    exec_input, exec_refused, limits,
};
use rustix::io::Errno;
use rustix::process::{Pid, Signal};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{sleep_until, timeout};
use tonic::{Status, Streaming};

use crate::boot::{COMMAND_FILES, DISK, Guest};
use crate::cgroup::ExecCgroup;
use crate::launch::{Launch, LaunchError, launch};
use crate::reaper::Reaper;
use crate::user::User;

/// How long processes that the main process has left behind are waited for, while they may still write. What is in the
/// pipes at its end is read whole, however long that takes.
const LINGER: Duration = Duration::from_secs(2);
/// The longest name of a program or a directory in a message, in characters.
const MOST_NAMED: usize = 1000;
/// How long a killed process may take to be gone.
const KILLED_WITHIN: Duration = Duration::from_secs(5);

/// A disk with less than this is full, in bytes: ext4 keeps a few blocks back.
const DISK_FULL: u64 = 64 << 10;

/// Makes an event of output.
type Wrap = fn(Bytes) -> exec_event::Kind;
type Events = mpsc::Sender<Result<ExecEvent, Status>>;

/// A start request that was found to be sound.
#[derive(Debug)]
pub(crate) struct Command {
    start: ExecStart,
    cwd: CString,
    /// Variables that every command gets, unless it has its own.
    environment: Arc<[EnvVar]>,
}

impl Command {
    pub(crate) fn check(start: ExecStart, environment: Arc<[EnvVar]>) -> Result<Self, String> {
        if start.argv.is_empty() == start.shell.is_empty() {
            return Err("give either argv or a shell string".to_owned());
        }
        let words = start.argv.iter().chain([&start.shell, &start.cwd, &start.user]);
        let vars = start.env.iter().flat_map(|var| [&var.name, &var.value]);
        let mut total = 0;
        for word in words.chain(vars) {
            total += word.len() + 1;
            if word.contains(&0) {
                return Err("an argument holds a zero byte".to_owned());
            }
            if word.len() >= limits::ARGUMENT {
                return Err(format!("an argument is longer than {} bytes", limits::ARGUMENT));
            }
        }
        if total > limits::ARGUMENTS {
            return Err(format!("the arguments are longer than {} bytes together", limits::ARGUMENTS));
        }
        if start.env.iter().any(|var| var.name.is_empty() || var.name.contains(&b'=')) {
            return Err("a variable's name is empty or holds '='".to_owned());
        }
        if !start.cwd.starts_with(b"/") {
            return Err("cwd must be an absolute path".to_owned());
        }
        let cwd = CString::new(start.cwd.to_vec()).map_err(|error| error.to_string())?;
        Ok(Self { start, cwd, environment })
    }
}

/// Starts a command; its events come on the channel, `exited` or `refused` as the last. Dropping the receiver
/// kills the command. `told` resolves when they are on their way to the host: what nobody waits for is done then.
pub(crate) fn run(
    guest: Arc<Guest>,
    reaper: Reaper,
    command: Command,
    inputs: Streaming<ExecInput>,
    told: oneshot::Receiver<()>,
) -> mpsc::Receiver<Result<ExecEvent, Status>> {
    let (events, receiver) = mpsc::channel(4);
    drop(tokio::spawn(async move {
        let (last, later) = match Running::start(&guest, &reaper, &command) {
            Ok(running) => {
                let (exited, later) = running.finish(&command, inputs, &events).await;
                (exec_event::Kind::Exited(exited), later)
            }
            Err(refused) => (exec_event::Kind::Refused(refused), Vec::new()),
        };
        drop(events.send(Ok(ExecEvent { kind: Some(last) })).await);
        for (from, wrap) in later {
            let events = command.start.later_output.then(|| events.clone());
            drop(tokio::spawn(pass_later_output(from, events, wrap)));
        }
        // That there are no more events must not wait for what follows; nor must whoever sends them.
        drop(events);
        drop(told.await);
        tokio::task::yield_now().await;
        guest.cgroup.forget_left();
    }));
    receiver
}

struct Running {
    process: Process,
    began: Instant,
    stdin: Option<pipe::Sender>,
    stdout: pipe::Receiver,
    stderr: pipe::Receiver,
}

/// The command's main process, and the group of all its processes.
struct Process {
    pid: Pid,
    cgroup: ExecCgroup,
    ended: oneshot::Receiver<std::process::ExitStatus>,
    status: Option<std::process::ExitStatus>,
}

impl Running {
    /// There is no `await` between making the group, the start and the registration with the reaper.
    fn start(guest: &Guest, reaper: &Reaper, command: &Command) -> Result<Self, ExecRefused> {
        let other = |error: io::Error| refused(&error, "the agent could not prepare the command");
        let user = match &command.start.user[..] {
            [] => None,
            user => Some(User::find(&String::from_utf8_lossy(user)).map_err(|error| ExecRefused {
                reason: exec_refused::Reason::NoSuchUser.into(),
                message: error.to_string(),
            })?),
        };
        let words = Words::of(command, user.as_ref()).map_err(other)?;
        let stdin = command.start.stdin.then(pipe_pair).transpose().map_err(other)?;
        let (stdin_end, stdin) = stdin.unzip();
        let (stdout, stdout_end) = pipe_pair().map_err(other)?;
        let (stderr, stderr_end) = pipe_pair().map_err(other)?;
        let stdin = stdin
            .map(|end| own_end(end, pipe::Sender::from_owned_fd_unchecked))
            .transpose()
            .map_err(other)?;
        let stdout = own_end(stdout, pipe::Receiver::from_owned_fd_unchecked).map_err(other)?;
        let stderr = own_end(stderr, pipe::Receiver::from_owned_fd_unchecked).map_err(other)?;
        let began = Instant::now();
        let cgroup = guest.cgroup.exec().map_err(other)?;
        let launched = launch(&Launch {
            candidates: &words.candidates,
            argv: &words.argv,
            envp: &words.envp,
            cwd: &command.cwd,
            user: user.as_ref(),
            files: COMMAND_FILES,
            stdio: [
                stdin_end.as_ref().map_or_else(|| guest.null.as_fd(), OwnedFd::as_fd),
                stdout_end.as_fd(),
                stderr_end.as_fd(),
            ],
            cgroup: cgroup.directory(),
            cgroup_namespace: guest.cgroup_namespace.as_fd(),
            mount_namespace: guest.namespace.as_fd(),
        });
        let pid = launched.map_err(|error| words.refused(error, &command.cwd))?;
        let ended = reaper.watch(pid);
        Ok(Self { process: Process { pid, cgroup, ended, status: None }, began, stdin, stdout, stderr })
    }

    /// Follows the command to its end; gives back the streams that others may still write to.
    async fn finish(
        self,
        command: &Command,
        inputs: Streaming<ExecInput>,
        events: &Events,
    ) -> (ExecExited, Vec<(pipe::Receiver, Wrap)>) {
        let mut process = self.process;
        let pid = u32::try_from(process.pid.as_raw_nonzero().get()).unwrap_or(0);
        let started = exec_event::Kind::Started(ExecStarted { pid });
        drop(events.send(Ok(ExecEvent { kind: Some(started) })).await);
        let (tell_end, end) = watch::channel(false);
        let out = pump(self.stdout, events, end.clone(), exec_event::Kind::Stdout);
        let err = pump(self.stderr, events, end.clone(), exec_event::Kind::Stderr);
        let feed = feed(inputs, self.stdin);
        let input = async move {
            let mut end = end;
            tokio::select! {
                () = feed => {}
                _ = end.changed() => {}
            }
        };
        let began = self.began;
        let main = async {
            let ended = process.end(began, command, events).await;
            _ = tell_end.send(true);
            ended
        };
        // In one task: each further one would cost a short command as much as its output does. A reader that has gone away
        // ends the pumps as well, so neither can wait for ever.
        let (mut exited, out, err, ()) = tokio::join!(main, out, err, input);
        let later: Vec<_> = [(out, exec_event::Kind::Stdout as Wrap), (err, exec_event::Kind::Stderr)]
            .into_iter()
            .filter_map(|(stream, wrap)| Some((stream?, wrap)))
            .collect();
        exited.output_open = !later.is_empty();
        (exited, later)
    }
}

impl Process {
    /// Waits for the end of the main process, or brings it about.
    async fn end(&mut self, began: Instant, command: &Command, events: &Events) -> ExecExited {
        let deadline = deadline(began, command.start.timeout_millis);
        let mut timed_out = false;
        let status = tokio::select! {
            status = &mut self.ended => status.ok(),
            () = events.closed() => self.kill().await,
            () = sleep_until(deadline.into()) => {
                timed_out = true;
                _ = rustix::process::kill_process_group(self.pid, Signal::TERM);
                let grace = Duration::from_millis(command.start.kill_after_millis);
                // All of it has this long, not only the shell that started it.
                let ended = timeout(grace, async {
                    self.status = (&mut self.ended).await.ok();
                    self.cgroup.emptied().await.ok();
                });
                match ended.await {
                    Ok(()) => self.status,
                    Err(_elapsed) => self.kill().await,
                }
            }
        };
        let duration_micros = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        // Who has succeeded has lacked nothing.
        let succeeded = status.is_some_and(|status| status.success());
        ExecExited {
            status: Some(exit_status(status)),
            timed_out,
            oom_kills: if succeeded { 0 } else { self.cgroup.oom_kills() },
            disk_full: !succeeded && disk_is_full(),
            duration_micros,
            // Found out when its output has ended, or has not.
            output_open: false,
        }
    }

    /// Kills the whole command: its group, and its main process also where that has moved to another group.
    async fn kill(&mut self) -> Option<std::process::ExitStatus> {
        self.cgroup.kill();
        // Once it is reaped, its number may be another's.
        if self.status.is_none() {
            _ = rustix::process::kill_process(self.pid, Signal::KILL);
            self.status = timeout(KILLED_WITHIN, &mut self.ended).await.ok().and_then(Result::ok);
        }
        self.status
    }
}

const PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The program, its arguments and its environment, as the kernel takes them.
struct Words {
    candidates: Vec<CString>,
    argv: Vec<CString>,
    envp: Vec<CString>,
}

impl Words {
    fn of(Command { start, environment, .. }: &Command, user: Option<&User>) -> io::Result<Self> {
        let argv: Vec<CString> = if start.argv.is_empty() {
            [b"/bin/sh", &b"-lc"[..], &start.shell].into_iter().map(CString::new).collect::<Result<_, _>>()?
        } else {
            start.argv.iter().map(|word| CString::new(word.to_vec())).collect::<Result<_, _>>()?
        };
        let (home, name): (&[u8], _) = match user {
            None => (b"/root", Some(&b"root"[..])),
            Some(user) => (user.home.to_bytes(), user.name.as_ref().map(|name| name.to_bytes())),
        };
        let mut variables: Vec<(&[u8], &[u8])> =
            vec![(b"PATH", PATH), (b"HOME", home), (b"LANG", b"C.UTF-8")];
        if let Some(name) = name {
            variables.extend([(&b"USER"[..], name), (b"LOGNAME", name)]);
        }
        for variable in environment.iter().chain(&start.env) {
            variables.retain(|(name, _)| *name != &variable.name[..]);
            variables.push((&variable.name, &variable.value));
        }
        let path = variables.iter().find(|(name, _)| *name == b"PATH").map_or(PATH, |(_, path)| *path);
        let candidates = candidates(&argv[0], path)?;
        let envp = variables.iter().map(|(name, value)| CString::new([name, &b"="[..], value].concat()));
        Ok(Self { candidates, argv, envp: envp.collect::<Result<_, _>>()? })
    }

    fn refused(&self, error: LaunchError, cwd: &CString) -> ExecRefused {
        // The host takes no long message.
        let named = |name: &CString| -> String { name.to_string_lossy().chars().take(MOST_NAMED).collect() };
        match error {
            LaunchError::Prepare(error) => refused(&error.into(), "the agent could not prepare the command"),
            LaunchError::Directory(Errno::NOENT | Errno::NOTDIR) => ExecRefused {
                reason: exec_refused::Reason::NoSuchDirectory.into(),
                message: format!("no such directory: {}", named(cwd)),
            },
            LaunchError::Directory(error) => refused(&error.into(), &named(cwd)),
            LaunchError::Execute(error) => refused(&error.into(), &named(&self.argv[0])),
        }
    }
}

/// Where a program may be, as a shell would look for it.
fn candidates(program: &CString, path: &[u8]) -> io::Result<Vec<CString>> {
    let name = program.as_bytes();
    if name.contains(&b'/') {
        return Ok(vec![program.clone()]);
    }
    let in_directory = |directory: &[u8]| {
        // An empty entry is the working directory.
        let directory = if directory.is_empty() { b"." } else { directory };
        Ok(CString::new([directory, b"/", name].concat())?)
    };
    path.split(|byte| *byte == b':').map(in_directory).collect()
}

/// The end to read from, then the end to write to.
fn pipe_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?)
}

/// The agent's end of a pipe, which never blocks it.
fn own_end<T>(end: OwnedFd, wrap: fn(OwnedFd) -> io::Result<T>) -> io::Result<T> {
    rustix::io::ioctl_fionbio(&end, true)?;
    wrap(end)
}

/// Moves one stream until its end. After the end of the main process, all that is in the pipe then is moved, and what else
/// comes in a short time; gives the stream back where somebody may write to it even then.
async fn pump(
    from: pipe::Receiver,
    events: &Events,
    mut end: watch::Receiver<bool>,
    wrap: Wrap,
) -> Option<pipe::Receiver> {
    let send = async |chunk| events.send(Ok(ExecEvent { kind: Some(wrap(chunk)) })).await.is_ok();
    while !*end.borrow() {
        let chunk = tokio::select! {
            chunk = read(&from) => chunk,
            _ = end.changed() => break,
        };
        if chunk.is_empty() || !send(chunk).await {
            return None;
        }
    }
    let mut left = rustix::io::ioctl_fionread(&from).unwrap_or(0);
    let until = tokio::time::Instant::now() + LINGER;
    loop {
        let chunk = match left {
            0 => match tokio::time::timeout_at(until, read(&from)).await {
                Ok(chunk) => chunk,
                Err(_elapsed) => return Some(from),
            },
            _ => read(&from).await,
        };
        left = left.saturating_sub(chunk.len() as u64);
        if chunk.is_empty() || !send(chunk).await {
            return None;
        }
        // One that never stops writing does not hold the end up.
        if left == 0 && tokio::time::Instant::now() >= until {
            return Some(from);
        }
    }
}

/// Passes on what others write after a command's end, while the host wants it. Without a reader, their next line would kill
/// them, so what nobody wants is thrown away.
async fn pass_later_output(from: pipe::Receiver, events: Option<Events>, wrap: Wrap) {
    if let Some(events) = events {
        loop {
            let chunk = tokio::select! {
                chunk = read(&from) => chunk,
                () = events.closed() => break,
            };
            if chunk.is_empty() {
                return;
            }
            if events.send(Ok(ExecEvent { kind: Some(wrap(chunk)) })).await.is_err() {
                break;
            }
        }
    }
    discard(from).await;
}

/// The next bytes of a stream; none at its end.
async fn read(from: &pipe::Receiver) -> Bytes {
    loop {
        if from.readable().await.is_err() {
            return Bytes::new();
        }
        // One buffer serves all: a command that says little, or nothing, makes none of its own.
        let read = BUFFER.with_borrow_mut(|buffer| {
            let length = from.try_read(buffer)?;
            Ok::<_, io::Error>(Bytes::copy_from_slice(&buffer[..length]))
        });
        match read {
            Ok(bytes) => return bytes,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_broken) => return Bytes::new(),
        }
    }
}

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; limits::CHUNK]);
}

/// Reads and throws away until the last writer is gone.
async fn discard(mut from: pipe::Receiver) {
    let mut buffer = vec![0; 4096];
    while matches!(from.read(&mut buffer).await, Ok(1..)) {}
}

/// Gives the host's bytes to the command.
async fn feed(mut inputs: Streaming<ExecInput>, mut stdin: Option<pipe::Sender>) {
    loop {
        let input = match inputs.message().await {
            Ok(Some(input)) => input,
            Ok(None) => return,
            // The host is gone, and the command is about to be killed: it must not take this for the end of its input.
            Err(_broken) => return std::future::pending().await,
        };
        match input.kind {
            Some(exec_input::Kind::Stdin(bytes)) => {
                if let Some(pipe) = &mut stdin
                    && pipe.write_all(&bytes).await.is_err()
                {
                    // The command closed its stdin; the rest is thrown away.
                    stdin = None;
                }
            }
            Some(exec_input::Kind::StdinEnd(_)) => stdin = None,
            Some(exec_input::Kind::Start(_)) | None => {}
        }
    }
}

fn deadline(began: Instant, timeout_millis: u64) -> Instant {
    const NEVER: Duration = Duration::from_secs(365 * 86_400);
    let limit = if timeout_millis == 0 { NEVER } else { Duration::from_millis(timeout_millis).min(NEVER) };
    began + limit
}

fn exit_status(status: Option<std::process::ExitStatus>) -> exec_exited::Status {
    let number = |value: i32| u32::try_from(value).unwrap_or(0);
    match status.map(|status| (status.code(), status.signal())) {
        Some((Some(code), _)) => exec_exited::Status::Code(number(code)),
        Some((None, Some(signal))) => exec_exited::Status::Signal(number(signal)),
        _ => exec_exited::Status::Signal(number(libc::SIGKILL)),
    }
}

fn disk_is_full() -> bool {
    rustix::fs::statvfs(DISK)
        .is_ok_and(|disk| disk.f_bavail.saturating_mul(disk.f_frsize) < DISK_FULL || disk.f_favail == 0)
}

fn refused(error: &io::Error, what: &str) -> ExecRefused {
    let reason = match error.kind() {
        io::ErrorKind::NotFound => exec_refused::Reason::NotFound,
        io::ErrorKind::PermissionDenied | io::ErrorKind::IsADirectory => exec_refused::Reason::NotExecutable,
        io::ErrorKind::WouldBlock | io::ErrorKind::OutOfMemory => exec_refused::Reason::NoResources,
        _ if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
            exec_refused::Reason::NoResources
        }
        _ if error.raw_os_error() == Some(libc::ENOEXEC) => exec_refused::Reason::NotExecutable,
        _ => exec_refused::Reason::Other,
    };
    ExecRefused { reason: reason.into(), message: format!("{what}: {error}") }
}
