//! A command on the host: by explicit opt-in only, where no guest can be had.
//!
//! There is no isolation. The command gets an empty directory as its home and working directory, a null stdin,
//! and nothing of the caller's environment; it dies with its owner.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use pyro_process::Spawn;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::mpsc;

use crate::error::{Error, ErrorKind};
use crate::guest::{Chunk, Stream};
use crate::spec::Command;

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Between TERM and KILL when a command's time is up.
const KILL_AFTER: Duration = Duration::from_secs(2);

/// How a host command ended.
#[derive(Debug)]
pub(crate) struct HostEnd {
    pub(crate) exit_code: i32,
    pub(crate) timed_out: bool,
}

/// Runs a command in `workspace` and sends its output on; a receiver that goes away ends it.
pub(crate) async fn run(
    workspace: &Path,
    command: &Command,
    limit: Duration,
    output: mpsc::Sender<Chunk>,
) -> Result<HostEnd, Error> {
    let failed = |error: io::Error| Error::new(ErrorKind::CommandRefused, format!("host command: {error}"));
    let mut spawn = describe(workspace, command);
    let (out, out_end) = io::pipe().map_err(failed)?;
    let (err, err_end) = io::pipe().map_err(failed)?;
    spawn.stdout(Stdio::from(out_end)).stderr(Stdio::from(err_end)).own_process_group();
    let mut child = spawn.spawn().map_err(failed)?;
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let end = |signal| {
        if let Some(group) = group {
            // A group that is gone already is what is wanted.
            _ = kill_process_group(group, signal);
        }
    };
    let guard = EndGroup(group);
    let pidfd = child.pidfd().try_clone_to_owned().map_err(failed)?;
    // It is told of, not reaped: until it is, its number names this group and no other.
    let mut ended = tokio::task::spawn_blocking(move || {
        rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)
    });
    let pumps = [
        tokio::spawn(pump(out.into(), Stream::Stdout, output.clone())),
        tokio::spawn(pump(err.into(), Stream::Stderr, output.clone())),
    ];
    let mut timed_out = false;
    let finished = tokio::select! {
        _ = &mut ended => true,
        () = output.closed() => false,
        () = tokio::time::sleep(limit) => {
            timed_out = true;
            end(Signal::TERM);
            tokio::time::timeout(KILL_AFTER, &mut ended).await.is_ok()
        }
    };
    if !finished {
        end(Signal::KILL);
        drop(ended.await);
    }
    // Nothing of the command stays on the host, not even what it left in the background.
    end(Signal::KILL);
    let status = child.wait().map_err(failed)?;
    // Once it is reaped, its number may name another group.
    std::mem::forget(guard);
    for pump in pumps {
        drop(pump.await);
    }
    let exit_code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ok(HostEnd { exit_code: if timed_out { 124 } else { exit_code }, timed_out })
}

fn describe(workspace: &Path, command: &Command) -> Spawn {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    let mut spawn = match command {
        Command::Argv(words) => {
            let mut words = words.iter().map(|word| OsStr::from_bytes(word));
            let mut spawn = Spawn::new(words.next().unwrap_or_default(), workspace);
            spawn.args(words);
            spawn
        }
        Command::Shell(text) => {
            let mut spawn = Spawn::new("/bin/sh", workspace);
            spawn.arg("-lc").arg(text);
            spawn
        }
    };
    spawn.env("PATH", PATH).env("HOME", workspace);
    spawn
}

/// Kills a process group when the one who waits for it goes away.
struct EndGroup(Option<Pid>);

impl Drop for EndGroup {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            _ = kill_process_group(group, Signal::KILL);
        }
    }
}

async fn pump(from: OwnedFd, stream: Stream, output: mpsc::Sender<Chunk>) -> io::Result<()> {
    let mut from = pipe::Receiver::from_file(File::from(from))?;
    loop {
        let mut bytes = Vec::with_capacity(pyro_proto::limits::CHUNK);
        if from.read_buf(&mut bytes).await? == 0 || output.send(Chunk { stream, bytes }).await.is_err() {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn collect(command: Command, limit: Duration) -> (HostEnd, String) {
        let workspace = tempfile::tempdir().expect("a directory");
        let (sender, mut receiver) = mpsc::channel::<Chunk>(8);
        let reader = tokio::spawn(async move {
            let mut all = Vec::new();
            while let Some(chunk) = receiver.recv().await {
                all.extend(chunk.bytes);
            }
            String::from_utf8_lossy(&all).into_owned()
        });
        let end = run(workspace.path(), &command, limit, sender).await.expect("it runs");
        (end, reader.await.expect("no panic"))
    }

    #[tokio::test]
    async fn it_sees_nothing_of_the_caller() {
        let command =
            Command::argv(["sh", "-c", "cat; env | grep -c CARGO; test \"$PWD\" = \"$HOME\"; echo $?"]);
        let (end, text) = collect(command, Duration::from_secs(30)).await;
        assert_eq!((end.exit_code, text.as_str()), (0, "0\n0\n"));
    }

    #[tokio::test]
    async fn its_time_limit_ends_the_whole_group() {
        let command = Command::argv(["sh", "-c", "echo part; sleep 99 & sleep 99"]);
        let (end, text) = collect(command, Duration::from_millis(300)).await;
        assert_eq!((end.exit_code, end.timed_out, text.as_str()), (124, true, "part\n"));
    }
}
