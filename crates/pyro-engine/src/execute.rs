//! One command from its sending to its end: its output taken as it comes, its end judged.

use std::path::Path;
use std::time::Duration;

use pyro_vmm::Machine;
use rustix::process::Signal;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::capture::Capture;
use crate::ending::Ending;
use crate::error::{Error, ErrorKind};
use crate::guest::{Chunk, Event, Exec, Stream};
use crate::host::HostExec;
use crate::live::{Running, command_unavailable};
use crate::observe::Observer;
use crate::place::Place;
use crate::record::{ExecResult, Fault, Timings};
use crate::spec::ExecSpec;
use crate::spill::Spill;

/// How much longer than a command's own time the host waits for the guest to tell its end.
const GUEST_MARGIN: Duration = Duration::from_secs(10);
/// How long a cancelled command may take to end after TERM.
const CANCEL_GRACE: Duration = Duration::from_secs(2);
/// How long a reader may take for the last words about a command.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// How long the end of a VMM is waited for whose guest has stopped answering.
const EXIT_GRACE: Duration = Duration::from_secs(2);

/// A command that was sent.
enum Process {
    Guest(Box<Exec>),
    Host(HostExec),
    /// One that writes without an end and does not obey.
    #[cfg(test)]
    Endless,
}

/// Where output goes, piece by piece.
pub(crate) trait Sink: Send {
    /// Takes a piece; an error ends the command.
    fn take(&mut self, chunk: Chunk) -> impl Future<Output = Result<(), Error>> + Send;

    /// How long a reader has held the command up so far, by which its time is longer: that is not the guest's to answer for.
    /// A task's reader holds nothing up.
    fn held_up(&self) -> Duration {
        Duration::ZERO
    }
}

/// How long a command may run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limit {
    /// What was asked for, in seconds.
    pub(crate) asked: f64,
    /// What is left of the machine's life, in seconds.
    pub(crate) left: f64,
}

impl Limit {
    fn seconds(self) -> f64 {
        self.asked.min(self.left.max(0.001))
    }

    fn duration(self) -> Duration {
        Duration::from_secs_f64(self.seconds().min(1e9))
    }

    fn life_is_shorter(self) -> bool {
        self.asked > self.left
    }
}

/// Tells when a command shall end before its time, and why.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cancel(Option<watch::Receiver<Option<Ending>>>);

impl Cancel {
    pub(crate) fn new(receiver: watch::Receiver<Option<Ending>>) -> Self {
        Self(Some(receiver))
    }

    /// Resolves when the command shall end; never where nobody can ask for that.
    pub(crate) async fn asked(&mut self) -> Ending {
        if let Some(receiver) = &mut self.0
            && let Ok(asked) = receiver.wait_for(Option::is_some).await
            && let Some(ending) = *asked
        {
            return ending;
        }
        std::future::pending().await
    }
}

/// An exit code as a shell would give it, what is to blame, and words for the end of stderr.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) exit_code: i32,
    pub(crate) fault: Option<Fault>,
    pub(crate) words: Option<String>,
    /// Processes that it has left behind may write more.
    pub(crate) output_open: bool,
}

/// What a command's processes write after its end. Dropping it lets them write on, unheard.
pub(crate) struct LaterOutput(Box<Exec>);

impl LaterOutput {
    /// The next piece; none when nobody can write any more, or the guest is gone.
    pub(crate) async fn next(&mut self) -> Option<Chunk> {
        loop {
            match self.0.next().await {
                Ok(Event::Output(chunk)) => return Some(chunk),
                Ok(Event::StdinBroken) => {}
                Ok(Event::Exited(_) | Event::Refused(_)) | Err(_) => return None,
            }
        }
    }
}

impl Process {
    /// Sends a command to the guest, once.
    async fn send(
        running: &Running,
        mut spec: ExecSpec,
        limit: Limit,
        later_output: bool,
    ) -> Result<Self, Error> {
        // Nothing was sent yet, so a guest that is gone now has run nothing.
        if let Ok(exit) = tokio::time::timeout(Duration::ZERO, running.machine.wait()).await {
            return Err(command_unavailable(&exit.status));
        }
        spec.timeout_seconds = limit.seconds();
        let sent =
            tokio::time::timeout(limit.duration() + GUEST_MARGIN, running.guest.exec(spec, later_output))
                .await;
        match sent {
            Ok(Ok(exec)) => Ok(Self::Guest(Box::new(exec))),
            Ok(Err(status)) if was_refused(&status) => {
                let text = format!("the guest refused the command: {}", safe(status.message()));
                Err(Error::new(ErrorKind::CommandRefused, text))
            }
            Ok(Err(status)) => {
                // It was sent: nobody can know whether a guest that has ended since began it.
                let ended = tokio::time::timeout(EXIT_GRACE, running.machine.wait()).await;
                Err(ended.map_or_else(|_| unknown(&status), |exit| lost(&exit.status)))
            }
            Err(_elapsed) => Err(unknown(&tonic::Status::deadline_exceeded("no answer in time"))),
        }
    }

    async fn next(&mut self) -> Result<Event, tonic::Status> {
        match self {
            Self::Guest(exec) => exec.next().await,
            Self::Host(exec) => Ok(exec.next().await),
            #[cfg(test)]
            Self::Endless => Ok(Event::Output(Chunk { stream: Stream::Stdout, bytes: b"y\n".to_vec() })),
        }
    }

    fn signal(&self, signal: Signal) {
        match self {
            Self::Guest(exec) => exec.signal(signal),
            Self::Host(exec) => exec.signal(signal),
            #[cfg(test)]
            Self::Endless => {}
        }
    }
}

/// Runs a command until its end, its time limit, its cancellation, or the guest's end. Gives what it writes later, too, where
/// that is wanted and its processes may write more.
///
/// # Errors
/// When the guest does not take it, the sink refuses, or the connection to a guest that lives broke; the command is
/// ended then.
pub(crate) async fn carry_out(
    place: &Place,
    exec: ExecSpec,
    limit: Limit,
    sink: &mut impl Sink,
    mut cancel: Cancel,
    later_output: bool,
) -> Result<(Outcome, Option<LaterOutput>), Error> {
    let (mut process, machine) = match place {
        Place::Guest(running) => {
            let sent = tokio::select! {
                biased;
                // A guest that does not answer holds neither a cancellation nor the end of its task up.
                ending = cancel.asked() => return Ok((ended_by(ending, 137), None)),
                sent = Process::send(running, exec, limit, later_output) => sent?,
            };
            (sent, Some(&running.machine))
        }
        Place::Host(host) => {
            if let Some(user) = &exec.user {
                let text = format!("a command on the host runs as its own user, not as '{user}'");
                return Err(Error::new(ErrorKind::CommandRefused, text));
            }
            (
                Process::Host(HostExec::start(
                    host.workspace.clone(),
                    exec.command,
                    exec.env,
                    limit.duration(),
                )),
                None,
            )
        }
        // Its callers have looked; an absent machine never means the host.
        Place::None => return Err(command_unavailable("the machine is gone")),
    };
    let outcome = conduct(&mut process, machine, (limit, GUEST_MARGIN), sink, cancel).await?;
    let later = match process {
        Process::Guest(exec) if later_output && outcome.output_open => Some(LaterOutput(exec)),
        _ => None,
    };
    Ok((outcome, later))
}

/// Takes a command's output until its end.
///
/// Its time limit is looked at before anything of the guest's is: one that talks without an end does not move it.
async fn conduct(
    process: &mut Process,
    machine: Option<&Machine>,
    (limit, margin): (Limit, Duration),
    sink: &mut impl Sink,
    mut cancel: Cancel,
) -> Result<Outcome, Error> {
    let began = Instant::now();
    let life_end = began + Duration::from_secs_f64(limit.left.clamp(0.0, 1e9)) + margin;
    let mut cancelled: Option<(Ending, Instant)> = None;
    loop {
        let own_end = began + limit.duration() + margin + sink.held_up();
        let deadline = cancelled.map_or(own_end, |(_, until)| until).min(life_end);
        if Instant::now() >= deadline {
            return Ok(match cancelled {
                Some((ending, _)) => ended_by(ending, 137),
                None if deadline == life_end => ended_by(Ending::TtlExpired, 124),
                None => timed_out(limit),
            });
        }
        let event = tokio::select! {
            biased;
            ending = cancel.asked(), if cancelled.is_none() => {
                if ending == Ending::HostDiskFull {
                    // Its guest does not answer until there is room.
                    process.signal(Signal::KILL);
                    return Ok(ended_by(ending, 137));
                }
                cancelled = Some((ending, Instant::now() + CANCEL_GRACE));
                process.signal(Signal::TERM);
                continue;
            }
            event = process.next() => event,
            () = tokio::time::sleep_until(deadline) => continue,
        };
        match event {
            Ok(Event::Output(chunk)) => tokio::select! {
                biased;
                taken = sink.take(chunk) => taken?,
                // A reader that does not read delays neither a cancellation nor the end of the machine's life.
                ending = cancel.asked(), if cancelled.is_none() => return Ok(ended_by(ending, 137)),
                () = tokio::time::sleep_until(life_end) => return Ok(ended_by(Ending::TtlExpired, 124)),
            },
            Ok(Event::Exited(exited)) => {
                return Ok(match cancelled {
                    Some((ending, _)) => ended_by(ending, exit_code(&exited)),
                    None => exited_outcome(&exited, limit),
                });
            }
            Ok(Event::Refused(refused)) => return Ok(refused_outcome(&refused)),
            Ok(Event::StdinBroken) if cancelled.is_none() => {
                cancelled = Some((Ending::StdinBroken, Instant::now() + CANCEL_GRACE));
                process.signal(Signal::TERM);
            }
            Ok(Event::StdinBroken) => {}
            Err(status) => {
                // A guest that has ended took the command with it; a broken channel to a living one says nothing.
                let Some(machine) = machine else { return Err(unknown(&status)) };
                if tokio::time::timeout(EXIT_GRACE, machine.wait()).await.is_err() {
                    return Err(unknown(&status));
                }
                return Ok(ended_by(cancelled.map_or(Ending::GuestLost, |(ending, _)| ending), 137));
            }
        }
    }
}

fn exited_outcome(exited: &pyro_proto::ExecExited, limit: Limit) -> Outcome {
    if exited.timed_out {
        return timed_out(limit);
    }
    let exit_code = exit_code(exited);
    let fault = match () {
        () if exit_code == 0 => None,
        () if exited.oom_kills > 0 => Some(Fault::OutOfMemory),
        () if exited.disk_full => Some(Fault::DiskFull),
        () => None,
    };
    Outcome { exit_code, fault, words: None, output_open: exited.output_open }
}

fn exit_code(exited: &pyro_proto::ExecExited) -> i32 {
    use pyro_proto::exec_exited::Status;

    match exited.status {
        Some(Status::Code(code)) => i32::try_from(code & 0xff).unwrap_or(255),
        Some(Status::Signal(signal)) => 128 + i32::try_from(signal & 0x7f).unwrap_or(0),
        None => 255,
    }
}

fn timed_out(limit: Limit) -> Outcome {
    if limit.life_is_shorter() {
        return ended_by(Ending::TtlExpired, 124);
    }
    let words = Some(format!("command timed out after {}s\n", limit.asked));
    Outcome { exit_code: 124, fault: Some(Fault::Timeout), words, output_open: false }
}

fn refused_outcome(refused: &pyro_proto::ExecRefused) -> Outcome {
    use pyro_proto::exec_refused::Reason;

    let exit_code = match refused.reason() {
        Reason::NotFound => 127,
        Reason::NotExecutable
        | Reason::NoSuchDirectory
        | Reason::NoSuchUser
        | Reason::NoResources
        | Reason::Other => 126,
    };
    let words = Some(format!("{}\n", safe(&refused.message)));
    Outcome { exit_code, words, ..Outcome::default() }
}

/// The end of a command that something else has ended.
pub(crate) fn ended_by(ending: Ending, exit_code: i32) -> Outcome {
    let words = format!("command ended: {ending}\n");
    Outcome { exit_code, fault: Some(ending.fault()), words: Some(words), output_open: false }
}

/// What the agent or the protocol refused before anything ran.
fn was_refused(status: &tonic::Status) -> bool {
    use tonic::Code;

    matches!(
        status.code(),
        Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange | Code::ResourceExhausted
    )
}

/// Words of the guest that go into a terminal: short, and without control characters.
fn safe(text: &str) -> String {
    text.chars().take(500).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn lost(exit: &str) -> Error {
    let text = format!("the guest ended after the command was sent ({exit}); the command may have run");
    Error::new(ErrorKind::OutcomeUnknown, text).hint("check what the command does before running it again")
}

fn unknown(status: &tonic::Status) -> Error {
    let text =
        format!("the connection to the guest broke ({}); the command may have run", safe(status.message()));
    Error::new(ErrorKind::OutcomeUnknown, text).hint("check what the command does before running it again")
}

/// Milliseconds, to the microsecond.
pub(crate) fn millis(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// What a command writes: kept in part, passed on whole.
pub(crate) struct Output<'a> {
    pub(crate) stdout: Capture,
    pub(crate) stderr: Capture,
    observer: &'a Observer,
    /// For a reader that must not hold the command up.
    spill: Option<Spill>,
    held_up: Duration,
}

/// Whose command a result is of, and how it ran.
#[derive(Clone, Debug, Default)]
pub(crate) struct Subject {
    pub(crate) vm_id: Option<String>,
    pub(crate) task_id: Option<String>,
    pub(crate) environment: String,
    pub(crate) environment_version: String,
    pub(crate) execution_mode: String,
    pub(crate) isolation: String,
    pub(crate) start_mode: String,
}

impl<'a> Output<'a> {
    pub(crate) fn new(observer: &'a Observer) -> Self {
        let (stdout, stderr) = (Capture::default(), Capture::default());
        Self { stdout, stderr, observer, spill: None, held_up: Duration::ZERO }
    }

    /// As [`Output::new`], for a command that nothing else records: what its reader has not taken waits in `dir`.
    pub(crate) fn spilling(observer: &'a Observer, dir: &Path) -> Self {
        let spill = observer.output.as_ref().map(|reader| Spill::new(dir.to_owned(), reader.clone()));
        Self { spill, ..Self::new(observer) }
    }

    /// Waits until the reader has taken what waits for it, or is gone.
    pub(crate) async fn drain(&self) {
        if let Some(spill) = &self.spill {
            spill.drain().await;
        }
    }

    /// How much of each stream has come.
    pub(crate) fn totals(&self) -> [u64; 2] {
        [self.stdout.total(), self.stderr.total()]
    }

    /// The result of a command that has ended.
    pub(crate) async fn result(
        mut self,
        subject: Subject,
        (command, argv): (String, Option<Vec<String>>),
        outcome: Outcome,
        duration_ms: f64,
    ) -> ExecResult {
        if let Some(words) = &outcome.words {
            let chunk = Chunk { stream: Stream::Stderr, bytes: words.as_bytes().to_vec() };
            // The command has ended; a reader that went away, or does not read, misses only these words.
            tokio::time::timeout(LAST_WORDS, self.take(chunk)).await.ok();
        }
        ExecResult {
            vm_id: subject.vm_id,
            task_id: subject.task_id,
            sequence: None,
            cwd: None,
            environment: subject.environment,
            environment_version: subject.environment_version,
            command,
            argv,
            stdout: self.stdout.text(),
            stderr: self.stderr.text(),
            exit_code: outcome.exit_code,
            duration_ms,
            execution_mode: subject.execution_mode,
            timed_out: outcome.fault == Some(Fault::Timeout),
            stdout_bytes: self.stdout.total(),
            stderr_bytes: self.stderr.total(),
            stdout_truncated: self.stdout.truncated(),
            stderr_truncated: self.stderr.truncated(),
            isolation: subject.isolation,
            start_mode: subject.start_mode,
            fault: outcome.fault,
            output_open: outcome.output_open,
            timings: Timings { execute: duration_ms, ..Timings::default() },
            cleanup: None,
            notes: Vec::new(),
        }
    }
}

impl Sink for Output<'_> {
    async fn take(&mut self, chunk: Chunk) -> Result<(), Error> {
        match chunk.stream {
            Stream::Stdout => self.stdout.push(&chunk.bytes),
            Stream::Stderr => self.stderr.push(&chunk.bytes),
        }
        let Some(output) = &self.observer.output else { return Ok(()) };
        let began = Instant::now();
        let sent = match &mut self.spill {
            Some(spill) => spill.pass(chunk).await.is_ok(),
            None => output.send(chunk).await.is_ok(),
        };
        self.held_up += began.elapsed();
        if sent {
            Ok(())
        } else {
            Err(Error::new(ErrorKind::Cancelled, "the reader of the output went away"))
        }
    }

    fn held_up(&self) -> Duration {
        self.held_up
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARGIN: Duration = Duration::from_millis(100);

    /// Takes output and needs a moment for each piece, which may be the reader's.
    struct Slow {
        is_the_readers: bool,
        held_up: Duration,
    }

    impl Sink for Slow {
        async fn take(&mut self, _chunk: Chunk) -> Result<(), Error> {
            let began = Instant::now();
            tokio::time::sleep(Duration::from_millis(5)).await;
            if self.is_the_readers {
                self.held_up += began.elapsed();
            }
            Ok(())
        }

        fn held_up(&self) -> Duration {
            self.held_up
        }
    }

    /// How a command ends that writes without an end, and after how long.
    async fn end(limit: Limit, is_the_readers: bool, cancel: Cancel) -> (Option<Fault>, Duration) {
        let mut sink = Slow { is_the_readers, held_up: Duration::ZERO };
        let mut process = Process::Endless;
        let began = Instant::now();
        let ended = conduct(&mut process, None, (limit, MARGIN), &mut sink, cancel);
        // Where it moves its own limit, it never ends.
        let ended = tokio::time::timeout(Duration::from_secs(20), ended).await.expect("it ends");
        (ended.expect("an outcome").fault, began.elapsed())
    }

    #[tokio::test]
    async fn a_guest_that_goes_on_talking_does_not_move_its_own_time_limit() {
        let limit = Limit { asked: 0.1, left: 600.0 };
        let (fault, took) = end(limit, false, Cancel::default()).await;
        assert_eq!(fault, Some(Fault::Timeout));
        assert!(took >= MARGIN, "{took:?}");
    }

    #[tokio::test]
    async fn a_reader_lengthens_a_command_by_what_it_took_and_not_beyond_the_life_of_the_machine() {
        let limit = Limit { asked: 0.1, left: 0.5 };
        let (fault, took) = end(limit, true, Cancel::default()).await;
        assert_eq!(fault, Some(Fault::TtlExpired));
        assert!(took >= Duration::from_millis(500), "{took:?}");
    }

    #[tokio::test]
    async fn a_cancelled_command_that_goes_on_talking_ends_after_its_grace() {
        let cancel = watch::Sender::new(Some(Ending::Cancelled));
        let limit = Limit { asked: 600.0, left: 600.0 };
        let (fault, took) = end(limit, true, Cancel::new(cancel.subscribe())).await;
        assert_eq!(fault, Some(Fault::Cancelled));
        assert!(took >= CANCEL_GRACE, "{took:?}");
    }
}
