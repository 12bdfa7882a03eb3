//! A command on the host: by explicit opt-in only, where no guest can be had.
//!
//! There is no isolation. The command gets an empty directory as its home and working directory, a null stdin,
//! and nothing of the caller's environment. Where the host allows it, it runs in process and mount namespaces of its
//! own, so that everything it started dies with it and with its owner; elsewhere its process group is what is ended.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use pyro_process::{Child, Spawn};
use pyro_proto::exec_exited::Status as ExitStatus;
use pyro_proto::exec_refused::Reason;
use pyro_proto::{ExecExited, ExecRefused};
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, Interest};
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot};

use crate::guest::{Chunk, Event, Stream};
use crate::spec::Command;

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Between TERM and KILL when a command's time is up.
const KILL_AFTER: Duration = Duration::from_secs(2);
/// How long output of what a command left in the background is awaited after its end.
const LINGER: Duration = Duration::from_millis(500);
const QUEUE: usize = 4;

/// A running command. Dropping it ends the command.
pub(crate) struct HostExec {
    chunks: mpsc::Receiver<Chunk>,
    end: Option<tokio::task::JoinHandle<Event>>,
    signals: mpsc::Sender<Signal>,
}

impl HostExec {
    /// Starts a command in `workspace`.
    pub(crate) fn start(
        workspace: PathBuf,
        command: Command,
        env: Vec<(String, String)>,
        limit: Duration,
    ) -> Self {
        let (output, chunks) = mpsc::channel(QUEUE);
        let (signals, to_send) = mpsc::channel(QUEUE);
        let end = tokio::spawn(async move {
            run(&workspace, (&command, &env), limit, output, to_send).await.unwrap_or_else(|error| {
                let reason = match error.kind() {
                    io::ErrorKind::NotFound => Reason::NotFound,
                    _ => Reason::NotExecutable,
                };
                Event::Refused(ExecRefused { reason: reason.into(), message: error.to_string() })
            })
        });
        Self { chunks, end: Some(end), signals }
    }

    /// The next thing that happens.
    pub(crate) async fn next(&mut self) -> Event {
        if let Some(chunk) = self.chunks.recv().await {
            return Event::Output(chunk);
        }
        let lost =
            || Event::Exited(ExecExited { status: Some(ExitStatus::Signal(9)), ..ExecExited::default() });
        match self.end.take() {
            Some(end) => end.await.unwrap_or_else(|_panic| lost()),
            None => lost(),
        }
    }

    pub(crate) fn signal(&self, signal: Signal) {
        // A queue that is full holds an earlier one to the same end.
        _ = self.signals.try_send(signal);
    }
}

/// Runs a command and sends its output on; a receiver that goes away ends it.
async fn run(
    workspace: &Path,
    (command, env): (&Command, &[(String, String)]),
    limit: Duration,
    output: mpsc::Sender<Chunk>,
    mut signals: mpsc::Receiver<Signal>,
) -> io::Result<Event> {
    let program = command.program();
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{program}: {error}"));
    let mut spawn = describe(workspace, command, env)?;
    let (out, out_end) = io::pipe()?;
    let (err, err_end) = io::pipe()?;
    spawn.stdout(Stdio::from(out_end)).stderr(Stdio::from(err_end)).own_process_group();
    let group = Group::new(spawn.spawn().map_err(named)?);
    let pidfd = group.child.pidfd().try_clone_to_owned()?;
    #[expect(unsafe_code, reason = "tokio asks for a promise about the descriptor")]
    // SAFETY: the pidfd owns its descriptor, and lives in what is made here.
    let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) }?;
    // Not reaped yet: until it is, its number names this group and no other.
    let ended = async { pidfd.readable().await.map(|mut ready| ready.retain_ready()) };
    tokio::pin!(ended);
    let (end_out, out_ended) = oneshot::channel();
    let (end_err, err_ended) = oneshot::channel();
    let pumps = [
        tokio::spawn(pump(out.into(), Stream::Stdout, output.clone(), out_ended)),
        tokio::spawn(pump(err.into(), Stream::Stderr, output.clone(), err_ended)),
    ];
    let mut timed_out = false;
    let deadline = tokio::time::Instant::now() + limit;
    let finished = loop {
        tokio::select! {
            _ = &mut ended => break true,
            () = output.closed() => break false,
            Some(signal) = signals.recv() => group.signal(signal),
            () = tokio::time::sleep_until(deadline) => {
                timed_out = true;
                group.signal(Signal::TERM);
                break tokio::time::timeout(KILL_AFTER, pidfd.readable()).await.is_ok();
            }
        }
    };
    if !finished {
        group.signal(Signal::KILL);
        drop(pidfd.readable().await);
    }
    let exit = group.end()?;
    // What it left in another session may hold the pipes for ever.
    _ = (end_out.send(()), end_err.send(()));
    for pump in pumps {
        drop(pump.await);
    }
    let number = |value: i32| u32::try_from(value).unwrap_or_default();
    // Another part of this program has reaped it where there is none.
    let status = exit.status().map(|status| match (status.code(), status.signal()) {
        (Some(code), _) => ExitStatus::Code(number(code)),
        (None, signal) => ExitStatus::Signal(number(signal.unwrap_or(9))),
    });
    Ok(Event::Exited(ExecExited { status, timed_out, ..ExecExited::default() }))
}

/// A command's processes; dropping it ends and reaps them.
struct Group {
    child: Child,
    id: Option<Pid>,
    reaped: bool,
}

impl Group {
    fn new(child: Child) -> Self {
        let id = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        Self { child, id, reaped: false }
    }

    fn signal(&self, signal: Signal) {
        if let Some(id) = self.id.filter(|_| !self.reaped) {
            // A group that is gone already is what is wanted.
            _ = kill_process_group(id, signal);
        }
    }

    /// Nothing of the command stays on the host, not even what it left in the background.
    fn end(mut self) -> io::Result<pyro_process::Exit> {
        self.signal(Signal::KILL);
        // Once it is reaped, its number may name another group.
        self.reaped = true;
        self.child.wait()
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if !self.reaped {
            self.signal(Signal::KILL);
            drop(self.child.wait());
        }
    }
}

/// The command, looked up first: behind another program its absence would look like that program's failure.
fn describe(workspace: &Path, command: &Command, env: &[(String, String)]) -> io::Result<Spawn> {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    let shell = [b"/bin/sh".to_vec(), b"-lc".to_vec()];
    let words: Vec<Vec<u8>> = match command {
        Command::Argv(words) => words.clone(),
        Command::Shell(text) => shell.into_iter().chain([text.clone().into_bytes()]).collect(),
    };
    let mut words = words.iter().map(|word| OsStr::from_bytes(word));
    let program = find(workspace, words.next().unwrap_or_default())?;
    let mut spawn = match namespaces() {
        Some(unshare) => {
            let mut spawn = Spawn::new(unshare.program, workspace);
            spawn.args(unshare.arguments).args(["--", "/bin/sh", "-c", FIRST_PROCESS, "pyro"]).arg(program);
            spawn
        }
        None => Spawn::new(program, workspace),
    };
    spawn.args(words).env("PATH", PATH).env("HOME", workspace);
    for (name, value) in env {
        spawn.env(name, value);
    }
    Ok(spawn)
}

/// The first process of a process namespace ignores signals that it does not handle, which would make a command hard
/// to end; so this is the first, silent itself, and the command is its child.
const FIRST_PROCESS: &str = r#"exec 3>&2 2>/dev/null; (exec "$@" 2>&3 3>&-); exit $?"#;

/// Where a program is, as a shell would find it.
fn find(workspace: &Path, program: &std::ffi::OsStr) -> io::Result<PathBuf> {
    use rustix::fs::{Access, access};

    let name = program.to_string_lossy().into_owned();
    let candidates: Vec<PathBuf> = if name.contains('/') {
        vec![workspace.join(program)]
    } else {
        PATH.split(':').map(|dir| Path::new(dir).join(program)).collect()
    };
    let file = candidates.iter().find(|path| path.is_file());
    match candidates.iter().find(|path| path.is_file() && access(*path, Access::EXEC_OK).is_ok()) {
        Some(found) => Ok(found.clone()),
        None if file.is_some() => {
            Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("{name}: not executable")))
        }
        None => Err(io::Error::new(io::ErrorKind::NotFound, format!("{name}: not found"))),
    }
}

/// What puts a command into namespaces of its own.
struct Unshare {
    program: &'static str,
    arguments: &'static [&'static str],
}

/// Found out once: a host may forbid them.
fn namespaces() -> Option<Unshare> {
    static ALLOWED: std::sync::OnceLock<Option<&'static [&'static str]>> = std::sync::OnceLock::new();
    const PROGRAM: &str = "/usr/bin/unshare";
    const ROOT: &[&str] = &["--pid", "--fork", "--kill-child", "--mount-proc"];
    const USER: &[&str] = &["--map-current-user", "--pid", "--fork", "--kill-child", "--mount-proc"];

    let arguments = *ALLOWED.get_or_init(|| {
        let wanted = if rustix::process::geteuid().is_root() { ROOT } else { USER };
        let mut spawn = Spawn::new(PROGRAM, Path::new("/"));
        spawn.args(wanted).arg("--").arg("/bin/true");
        pyro_process::output(spawn).is_ok_and(|output| output.status.success()).then_some(wanted)
    });
    arguments.map(|arguments| Unshare { program: PROGRAM, arguments })
}

async fn pump(
    from: OwnedFd,
    stream: Stream,
    output: mpsc::Sender<Chunk>,
    mut ended: oneshot::Receiver<()>,
) -> io::Result<()> {
    let mut from = pipe::Receiver::from_file(File::from(from))?;
    let mut last = None;
    loop {
        let mut bytes = Vec::with_capacity(pyro_proto::limits::CHUNK);
        let read = tokio::select! {
            read = from.read_buf(&mut bytes) => read?,
            _ = &mut ended, if last.is_none() => {
                last = Some(tokio::time::Instant::now() + LINGER);
                continue;
            }
            () = at(last) => 0,
        };
        if read == 0 || output.send(Chunk { stream, bytes }).await.is_err() {
            return Ok(());
        }
    }
}

async fn at(moment: Option<tokio::time::Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn collect(command: Command, limit: Duration) -> (Event, String) {
        let workspace = tempfile::tempdir().expect("a directory");
        let mut exec = HostExec::start(workspace.path().to_owned(), command, Vec::new(), limit);
        let mut all = Vec::new();
        loop {
            match exec.next().await {
                Event::Output(chunk) => all.extend(chunk.bytes),
                end => return (end, String::from_utf8_lossy(&all).into_owned()),
            }
        }
    }

    fn sh(script: &str) -> Command {
        Command::argv(["sh", "-c", script])
    }

    fn code(end: &Event) -> Option<u32> {
        match end {
            Event::Exited(ExecExited { status: Some(ExitStatus::Code(code)), .. }) => Some(*code),
            _ => None,
        }
    }

    #[tokio::test]
    async fn it_sees_nothing_of_the_caller() {
        let command = sh("cat; env | grep -c CARGO; test \"$PWD\" = \"$HOME\"; echo $?");
        let (end, text) = collect(command, Duration::from_secs(30)).await;
        assert_eq!((code(&end), text.as_str()), (Some(0), "0\n0\n"));
    }

    #[tokio::test]
    async fn its_time_limit_ends_the_whole_group() {
        let command = sh("echo part; sleep 99 & sleep 99");
        let (end, text) = collect(command, Duration::from_secs(2)).await;
        assert!(matches!(end, Event::Exited(ExecExited { timed_out: true, .. })));
        assert_eq!(text, "part\n");
    }

    #[tokio::test]
    async fn what_it_leaves_in_another_session_holds_nobody_up() {
        let began = std::time::Instant::now();
        let (end, text) = collect(sh("setsid sleep 999 & sleep 0.1; echo hi"), Duration::from_secs(30)).await;
        assert_eq!((code(&end), text.as_str()), (Some(0), "hi\n"));
        assert!(began.elapsed() < Duration::from_secs(200), "{:?}", began.elapsed());
    }

    #[tokio::test]
    async fn what_is_not_there_or_no_program_is_refused_as_in_a_guest() {
        for (name, expected) in
            [("no-such-program", Reason::NotFound), ("/etc/passwd", Reason::NotExecutable)]
        {
            let (end, _) = collect(Command::argv([name]), Duration::from_secs(30)).await;
            let Event::Refused(refused) = end else { panic!("{name} was run") };
            assert_eq!(refused.reason(), expected);
        }
    }
}
