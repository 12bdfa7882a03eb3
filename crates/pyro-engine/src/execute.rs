//! One command from its sending to its result: its output kept and passed on, its end judged.

use std::time::{Duration, Instant};

use crate::capture::Capture;
use crate::engine::Observer;
use crate::error::{Error, ErrorKind};
use crate::guest::{Chunk, Event, Stream};
use crate::live::Running;
use crate::record::{ExecResult, Fault, Timings, VmRecord};
use crate::registry::now;
use crate::spec::ExecSpec;

/// How much longer than a command's own time the host waits for the guest to tell its end.
const GUEST_MARGIN: Duration = Duration::from_secs(10);

/// Runs a command to its end, to its time limit, to the end of the machine's life, or to the guest's end.
pub(crate) async fn execute(
    running: &Running,
    record: &VmRecord,
    mut spec: ExecSpec,
    observer: &Observer,
) -> Result<ExecResult, Error> {
    let began = Instant::now();
    let asked = spec.timeout_seconds;
    let left = (record.expires_at - now()).max(0.001);
    spec.timeout_seconds = asked.min(left);
    let deadline = began + Duration::from_secs_f64(spec.timeout_seconds.min(1e9)) + GUEST_MARGIN;
    let command = spec.command.display();
    let mut output = Output::default();
    let mut exec = running.guest.exec(spec).await.map_err(|status| unknown(&status))?;
    let end = loop {
        let event = tokio::select! {
            event = exec.next() => event,
            () = tokio::time::sleep_until(deadline.into()) => break End::Lost,
        };
        match event {
            Ok(Event::Output(chunk)) => output.take(chunk, observer).await?,
            Ok(Event::Exited(exited)) => break End::Exited(exited),
            Ok(Event::Refused(refused)) => break End::Refused(refused),
            Err(status) => {
                // A guest that has ended took the command with it; a broken channel to a living one says nothing.
                let ended = tokio::time::timeout(Duration::from_secs(2), running.machine.wait()).await;
                if ended.is_err() {
                    return Err(unknown(&status));
                }
                break End::Lost;
            }
        }
    };
    let outcome = end.outcome(asked > left, asked);
    Ok(output.result(record, command, outcome, began.elapsed(), observer).await)
}

/// What a command writes: kept in part, passed on whole.
#[derive(Default)]
pub(crate) struct Output {
    stdout: Capture,
    stderr: Capture,
}

impl Output {
    pub(crate) async fn take(&mut self, chunk: Chunk, observer: &Observer) -> Result<(), Error> {
        match chunk.stream {
            Stream::Stdout => self.stdout.push(&chunk.bytes),
            Stream::Stderr => self.stderr.push(&chunk.bytes),
        }
        let Some(output) = &observer.output else { return Ok(()) };
        let gone = |_closed| Error::new(ErrorKind::Cancelled, "the reader of the output went away");
        output.send(chunk).await.map_err(gone)
    }

    pub(crate) async fn result(
        mut self,
        record: &VmRecord,
        command: String,
        outcome: Outcome,
        duration: Duration,
        observer: &Observer,
    ) -> ExecResult {
        if let Some(words) = &outcome.words {
            let chunk = Chunk { stream: Stream::Stderr, bytes: words.as_bytes().to_vec() };
            // The command has ended; a reader that went away misses only these words.
            self.take(chunk, observer).await.ok();
        }
        let duration_ms = millis(duration);
        let on_host = record.execution_mode == "host_compat";
        ExecResult {
            vm_id: record.vm_id.clone(),
            environment: record.environment.clone(),
            environment_version: record.environment_version.clone(),
            command,
            stdout: self.stdout.text(),
            stderr: self.stderr.text(),
            exit_code: outcome.exit_code,
            duration_ms,
            execution_mode: if on_host { "host_compat" } else { "guest_serial" }.to_owned(),
            timed_out: outcome.fault == Some(Fault::Timeout),
            stdout_bytes: self.stdout.total(),
            stderr_bytes: self.stderr.total(),
            stdout_truncated: self.stdout.truncated(),
            stderr_truncated: self.stderr.truncated(),
            isolation: record.isolation.clone(),
            start_mode: "cold".to_owned(),
            fault: outcome.fault,
            timings: Timings { execute: duration_ms, ..Timings::default() },
            cleanup: None,
        }
    }
}

enum End {
    Exited(pyro_proto::ExecExited),
    Refused(pyro_proto::ExecRefused),
    Lost,
}

/// An exit code as a shell would give it, what is to blame, and words for the end of stderr.
pub(crate) struct Outcome {
    pub(crate) exit_code: i32,
    pub(crate) fault: Option<Fault>,
    pub(crate) words: Option<String>,
}

impl End {
    fn outcome(self, life_was_shorter: bool, timeout_seconds: f64) -> Outcome {
        use pyro_proto::exec_exited::Status;
        use pyro_proto::exec_refused::Reason;

        match self {
            Self::Exited(exited) if exited.timed_out && life_was_shorter => Outcome {
                exit_code: 124,
                fault: Some(Fault::TtlExpired),
                words: Some("command ended: the machine's time is up\n".to_owned()),
            },
            Self::Exited(exited) if exited.timed_out => Outcome {
                exit_code: 124,
                fault: Some(Fault::Timeout),
                words: Some(format!("command timed out after {timeout_seconds}s\n")),
            },
            Self::Exited(exited) => {
                let exit_code = match exited.status {
                    Some(Status::Code(code)) => i32::try_from(code & 0xff).unwrap_or(255),
                    Some(Status::Signal(signal)) => 128 + i32::try_from(signal & 0x7f).unwrap_or(0),
                    None => 255,
                };
                let fault = match () {
                    () if exit_code == 0 => None,
                    () if exited.oom_kills > 0 => Some(Fault::OutOfMemory),
                    () if exited.disk_full => Some(Fault::DiskFull),
                    () => None,
                };
                Outcome { exit_code, fault, words: None }
            }
            Self::Refused(refused) => {
                let exit_code = match refused.reason() {
                    Reason::NotFound => 127,
                    Reason::NotExecutable | Reason::NoSuchDirectory | Reason::NoResources | Reason::Other => {
                        126
                    }
                };
                Outcome { exit_code, fault: None, words: Some(format!("{}\n", safe(&refused.message))) }
            }
            Self::Lost => Outcome {
                exit_code: 137,
                fault: Some(Fault::GuestLost),
                words: Some("command ended: the guest is gone\n".to_owned()),
            },
        }
    }
}

/// Words of the guest that go into a terminal: short, and without control characters.
fn safe(text: &str) -> String {
    text.chars().take(500).map(|c| if c.is_control() { ' ' } else { c }).collect()
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
