//! Commands in a task, seen from the caller: sent once, streamed, and found again in the journal when the connection
//! to the supervisor broke.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;

use super::client::supervisor_proto::{
    ExecInput, ExecStart, FollowRequest, StdinEnd, Variable, event, exec_input,
};
use super::client::{Events, VARIABLES_AND_USER};
use super::record::Detached;
use super::{EntryStatus, Found, JournalEntry, TaskFile, not_started};
use crate::engine::Engine;
use crate::error::{Error, ErrorKind};
use crate::execute::{Outcome, Output, Sink, Subject};
use crate::files;
use crate::guest::{Chunk, Stream};
use crate::observe::{Observer, Phase};
use crate::record::ExecResult;
use crate::registry::{TaskLock, is_id};
use crate::spec::{Command, ExecSpec};

/// Pieces of stdin that may wait for the supervisor.
const QUEUE: usize = 4;
/// Between two looks at a command whose supervisor has no more to tell and has not written its end.
const UNWRITTEN: Duration = Duration::from_millis(500);
/// How often that is looked at in a row.
const LOOKS: u32 = 20;

/// A command that has ended.
struct Ended {
    entry: JournalEntry,
    /// Whether its entry is in the journal; false while the host's disk is full.
    is_recorded: bool,
}

impl Engine {
    /// Runs one command in a task. A command that fails is a result. Dropping the future does not end the command:
    /// that takes [`Engine::cancel_task`].
    ///
    /// # Errors
    /// When the task is not started, or its supervisor is gone and nobody can know whether the command ran.
    pub async fn exec_task(
        &self,
        task_id: &str,
        exec: ExecSpec,
        observer: Observer,
    ) -> Result<ExecResult, Error> {
        let (file, sent) = tokio::join!(self.record_of(task_id), self.send(task_id, exec, true));
        let (events, request_id) = sent?;
        let mut output = Output::new(&observer);
        if let Some(mut events) = events {
            let taken = take(&mut events, &observer, &mut output).await;
            if let Some(ended) = self.unless_expired(task_id, taken).await? {
                let Ended { entry, .. } = &ended;
                if output.totals() != [entry.stdout_bytes, entry.stderr_bytes] {
                    // It was ended over a slow reader. The journal has the rest, unless it went with the task.
                    drop(self.replay(task_id, entry, &mut output).await);
                }
                return Ok(result(task_id, file, ended, output).await);
            }
        }
        // The connection broke, or this caller took its output too slowly when the command was ended: the journal has
        // the rest.
        let entry = self.find_request(task_id, &request_id).await?.ok_or_else(|| unknown(task_id))?;
        let ended = self.see_through(task_id, entry.sequence, &observer, &mut output).await?;
        Ok(result(task_id, file, ended.ok_or_else(|| unknown(task_id))?, output).await)
    }

    /// As [`Engine::exec_task`], but when `given_up` resolves, the command is cancelled, and its result says so. A
    /// command that has no number yet is cancelled as soon as it has one.
    ///
    /// # Errors
    /// As [`Engine::exec_task`].
    pub async fn exec_task_unless(
        &self,
        task_id: &str,
        exec: ExecSpec,
        observer: Observer,
        given_up: impl Future<Output = ()>,
    ) -> Result<ExecResult, Error> {
        let (noted, mut number) = watch::channel(None);
        let observer = observer.also(move |phase| {
            if let Phase::Sequence(sequence) = phase {
                noted.send_replace(Some(*sequence));
            }
        });
        let mut running = std::pin::pin!(self.exec_task(task_id, exec, observer));
        tokio::select! {
            result = &mut running => return result,
            () = given_up => {}
        }
        let sequence = tokio::select! {
            result = &mut running => return result,
            number = number.wait_for(Option::is_some) => number.ok().and_then(|number| *number),
        };
        if let Some(sequence) = sequence {
            let (_, result) = tokio::join!(self.cancel_task(task_id, sequence), &mut running);
            return result;
        }
        running.await
    }

    /// Starts one command in a task and does not wait for it.
    ///
    /// # Errors
    /// As [`Engine::exec_task`].
    pub async fn exec_task_detached(&self, task_id: &str, exec: ExecSpec) -> Result<Detached, Error> {
        let (events, request_id) = self.send(task_id, exec, false).await?;
        let started =
            |sequence| Detached { task_id: task_id.to_owned(), sequence, status: EntryStatus::Running };
        if let Some(mut events) = events {
            while let Some(event) = events.next().await? {
                if let event::Kind::Started(sequence) = event {
                    return Ok(started(sequence));
                }
            }
        }
        match self.find_request(task_id, &request_id).await? {
            Some(entry) => Ok(started(entry.sequence)),
            None => Err(unknown(task_id)),
        }
    }

    /// Waits for a command of a task that is running or has ended, and gives its output from the beginning.
    ///
    /// # Errors
    /// When there is no such task or command.
    pub async fn attach_task(
        &self,
        task_id: &str,
        sequence: u64,
        observer: Observer,
    ) -> Result<ExecResult, Error> {
        let file = self.file_of(task_id).await?;
        let mut output = Output::new(&observer);
        let ended = self.see_through(task_id, sequence, &observer, &mut output).await?;
        Ok(result(task_id, file, ended.ok_or_else(|| no_command(task_id, sequence))?, output).await)
    }

    /// Passes on what is still missing of a command's output, as it comes, until the command has ended, whatever
    /// becomes of its supervisor meanwhile; none where there is no such command.
    async fn see_through(
        &self,
        task_id: &str,
        sequence: u64,
        observer: &Observer,
        output: &mut Output<'_>,
    ) -> Result<Option<Ended>, Error> {
        let mut looks = 0;
        while looks < LOOKS {
            let Some(entry) = self.task_entry(task_id, sequence).await? else { return Ok(None) };
            if entry.status != EntryStatus::Running {
                self.replay(task_id, &entry, output).await?;
                return Ok(Some(Ended { entry, is_recorded: true }));
            }
            let before = output.totals();
            if let Some(ended) = self.follow(task_id, sequence, observer, output).await? {
                return Ok(Some(ended));
            }
            // Where its supervisor is gone, the next look finds the command ended. An old supervisor may know of an end that
            // it cannot write: there is no event for a disk that has room again.
            tokio::time::sleep(UNWRITTEN).await;
            looks = if output.totals() == before { looks + 1 } else { 0 };
        }
        let text = format!("the end of command {sequence} of task '{task_id}' is not on record");
        Err(Error::new(ErrorKind::HostResources, text)
            .hint("free some space in the state directory, then look again: pyro task logs"))
    }

    /// Passes on what comes of a command, from what was passed on so far; none where its supervisor is gone or has no more to
    /// tell.
    async fn follow(
        &self,
        task_id: &str,
        sequence: u64,
        observer: &Observer,
        output: &mut Output<'_>,
    ) -> Result<Option<Ended>, Error> {
        let Found::Supervised(client) = self.find_task(task_id).await? else { return Ok(None) };
        let [stdout_offset, stderr_offset] = output.totals();
        let request = FollowRequest { sequence, stdout_offset, stderr_offset };
        let followed = match client.follow(request).await {
            Ok(Some(mut events)) => take(&mut events, observer, output).await,
            Ok(None) => Ok(None),
            Err(error) => Err(error),
        };
        self.unless_expired(task_id, followed).await
    }

    /// Waits for the command with this number, which may not have begun, and passes its output on from the
    /// beginning; its finished entry, or none when the supervisor went away meanwhile.
    pub(super) async fn follow_task(
        &self,
        task_id: &str,
        sequence: u64,
        observer: &Observer,
    ) -> Result<Option<JournalEntry>, Error> {
        let mut output = Output::new(observer);
        let ended = match self.follow(task_id, sequence, observer, &mut output).await? {
            Some(ended) => Some(ended),
            None => self.see_through(task_id, sequence, observer, &mut output).await?,
        };
        Ok(ended.map(|ended| ended.entry))
    }

    /// Sends a command to the supervisor, once; no events where the connection broke over it.
    async fn send(
        &self,
        task_id: &str,
        exec: ExecSpec,
        attached: bool,
    ) -> Result<(Option<Events>, String), Error> {
        exec.check()?;
        let client = match self.find_task(task_id).await? {
            Found::Supervised(client) => client,
            Found::Alone(..) => return Err(not_started(task_id)),
        };
        let needs_new = !exec.env.is_empty() || exec.user.is_some() || exec.stdin.is_some() && !attached;
        if needs_new && client.generation().await? < VARIABLES_AND_USER {
            let text = "the task's supervisor is of an older pyro, whose commands have no variables, users or input of their own";
            return Err(Error::new(ErrorKind::WrongState, text).hint("stop the task and start it again"));
        }
        let request_id = files::random_hex(16).map_err(|error| Error::host("random numbers", &error))?;
        let (argv, shell) = match exec.command {
            Command::Argv(words) => (words.into_iter().map(Into::into).collect(), Default::default()),
            Command::Shell(text) => (Vec::new(), text.into()),
        };
        let start = ExecStart {
            request_id: request_id.clone(),
            argv,
            shell,
            cwd: exec.cwd.into(),
            env: exec.env.into_iter().map(variable).collect(),
            user: exec.user.unwrap_or_default().into(),
            stdin: exec.stdin.is_some(),
            timeout_seconds: exec.timeout_seconds,
            attached,
        };
        let (inputs, receiver) = mpsc::channel(QUEUE);
        drop(inputs.send(ExecInput { kind: Some(exec_input::Kind::Start(start)) }).await);
        drop(tokio::spawn(feed(exec.stdin, inputs)));
        // Without events it was sent, perhaps; the journal knows.
        let events = client.exec(ReceiverStream::new(receiver)).await;
        Ok((self.unless_expired(task_id, events).await?, request_id))
    }

    /// Looks a request up in the journal, after that was put in order where the supervisor is gone.
    async fn find_request(&self, task_id: &str, request_id: &str) -> Result<Option<JournalEntry>, Error> {
        let (engine, id, request_id) = (self.clone(), task_id.to_owned(), request_id.to_owned());
        self.blocking(move || {
            let registry = &engine.inner.registry;
            let lock = registry.lock_task(&id)?;
            let directory = registry.task_directory(&id)?;
            let found = directory.journal().entry_of_request(&request_id);
            let found = found.map_err(|error| Error::state(directory.path(), &error))?;
            match (&lock, &found) {
                // The entry precedes the command: without one, and without a supervisor, nothing ran.
                (TaskLock::Free(..), None) => {
                    let text = format!(
                        "the supervisor of task '{id}' ended before it took the command; nothing ran"
                    );
                    Err(Error::new(ErrorKind::WrongState, text)
                        .hint(format!("start it: pyro task start {id}")))
                }
                _ => Ok(found),
            }
        })
        .await
    }

    /// Reads one entry of a task's journal, if there is such a command.
    ///
    /// # Errors
    /// When there is no such task, or its journal cannot be read.
    pub async fn task_entry(&self, task_id: &str, sequence: u64) -> Result<Option<JournalEntry>, Error> {
        let (engine, id) = (self.clone(), task_id.to_owned());
        self.blocking(move || {
            let registry = &engine.inner.registry;
            drop(registry.lock_task(&id)?);
            let directory = registry.task_directory(&id)?;
            directory.journal().entry(sequence).map_err(|error| Error::state(directory.path(), &error))
        })
        .await
    }

    /// Passes on what the journal holds of a command beyond what has been passed on.
    async fn replay(
        &self,
        task_id: &str,
        entry: &JournalEntry,
        output: &mut Output<'_>,
    ) -> Result<(), Error> {
        let directory = self.inner.registry.task_directory(task_id)?;
        let failed = |error: std::io::Error| Error::state(directory.path(), &error);
        let kept = [
            entry.stdout_bytes.saturating_sub(entry.stdout_dropped_bytes),
            entry.stderr_bytes.saturating_sub(entry.stderr_dropped_bytes),
        ];
        let streams = [Stream::Stdout, Stream::Stderr].into_iter().zip(output.totals());
        for ((stream, offset), kept) in streams.zip(kept) {
            let reader = directory.journal().reader(entry.sequence, stream, offset).map_err(failed)?;
            let Some(mut reader) = reader.map(tokio::fs::File::from_std) else {
                if kept > offset {
                    return Err(failed(std::io::ErrorKind::NotFound.into()));
                }
                continue;
            };
            loop {
                let mut bytes = Vec::with_capacity(pyro_proto::limits::CHUNK);
                if reader.read_buf(&mut bytes).await.map_err(failed)? == 0 {
                    break;
                }
                output.take(Chunk { stream, bytes }).await?;
            }
        }
        Ok(())
    }

    /// The record of a task, read before its command has ended: it may be gone then. Whoever sends the command says what is
    /// wrong with the task.
    async fn record_of(&self, task_id: &str) -> Option<TaskFile> {
        let (engine, id) = (self.clone(), task_id.to_owned());
        let read = tokio::task::spawn_blocking(move || {
            is_id(&id).then(|| TaskFile::read(&engine.inner.registry.task_path(&id)).ok().flatten())?
        });
        read.await.ok().flatten()
    }

    /// The record of a task before what is asked of it.
    async fn file_of(&self, task_id: &str) -> Result<Option<TaskFile>, Error> {
        let (engine, id) = (self.clone(), task_id.to_owned());
        self.blocking(move || {
            let directory = engine.inner.registry.task_directory(&id)?;
            // Where it cannot be read, whoever puts the task in order says so.
            Ok(TaskFile::read(&directory).ok().flatten())
        })
        .await
    }
}

/// The result of a command that has ended.
async fn result(task_id: &str, file: Option<TaskFile>, ended: Ended, output: Output<'_>) -> ExecResult {
    let Ended { entry, is_recorded } = ended;
    let of =
        |field: fn(&TaskFile) -> &String| file.as_ref().map_or_else(String::new, |file| field(file).clone());
    // The entry tells where the command ran; the task may have started anew since. Only an older pyro left it empty.
    let ran = |told: String, field| if told.is_empty() { of(field) } else { told };
    let subject = Subject {
        vm_id: None,
        task_id: Some(task_id.to_owned()),
        environment: of(|file| &file.environment),
        environment_version: of(|file| &file.environment_version),
        execution_mode: entry.execution_mode.clone(),
        isolation: ran(entry.isolation, |file| &file.isolation),
        start_mode: ran(entry.start_mode, |file| &file.start_mode),
    };
    let exit_code = entry.exit_code.unwrap_or(137);
    // What is on record has its words at the end of stderr already.
    let words = (!is_recorded).then(|| {
        let reason = entry.reason.as_deref().unwrap_or("the command has ended");
        format!("{reason}; its end is not on record yet\n")
    });
    let outcome = Outcome { exit_code, fault: entry.fault, words, output_open: entry.output_open };
    let command = (entry.command, entry.argv);
    let mut result = output.result(subject, command, outcome, entry.duration_ms.unwrap_or_default()).await;
    result.notes = entry.notes;
    result.stdout_truncated |= result.stdout_bytes < entry.stdout_bytes;
    result.stderr_truncated |= result.stderr_bytes < entry.stderr_bytes;
    result.stdout_bytes = entry.stdout_bytes;
    result.stderr_bytes = entry.stderr_bytes;
    result.sequence = Some(entry.sequence);
    result.cwd = Some(entry.cwd);
    result
}

/// Takes events until the command's end; none when the connection broke first.
async fn take(
    events: &mut Events,
    observer: &Observer,
    output: &mut Output<'_>,
) -> Result<Option<Ended>, Error> {
    let end = |entry: &[u8], is_recorded| {
        let entry = serde_json::from_slice(entry);
        let entry = entry.map_err(|error| Error::host("the supervisor's answer", &error))?;
        Ok(Some(Ended { entry, is_recorded }))
    };
    loop {
        match events.next().await? {
            None => return Ok(None),
            Some(event::Kind::Started(sequence)) => observer.tell(Phase::Sequence(sequence)),
            Some(event::Kind::Stdout(bytes)) => {
                output.take(Chunk { stream: Stream::Stdout, bytes: bytes.into() }).await?;
            }
            Some(event::Kind::Stderr(bytes)) => {
                output.take(Chunk { stream: Stream::Stderr, bytes: bytes.into() }).await?;
            }
            Some(event::Kind::Ended(entry)) => return end(&entry, true),
            Some(event::Kind::EndedUnrecorded(entry)) => return end(&entry, false),
        }
    }
}

/// Gives the caller's input to the supervisor as fast as the command takes it.
async fn feed(stdin: Option<Box<dyn AsyncRead + Send + Unpin>>, inputs: mpsc::Sender<ExecInput>) {
    if let Some(mut stdin) = stdin {
        let mut buffer = vec![0; pyro_proto::limits::CHUNK];
        loop {
            let length = tokio::select! {
                read = stdin.read(&mut buffer) => match read {
                    Ok(length) => length,
                    // The call's request side ends without a word, which is no end of the input.
                    Err(_broken) => return,
                },
                () = inputs.closed() => return,
            };
            let kind = match length {
                0 => exec_input::Kind::StdinEnd(StdinEnd {}),
                length => exec_input::Kind::Stdin(buffer[..length].to_vec().into()),
            };
            if inputs.send(ExecInput { kind: Some(kind) }).await.is_err() || length == 0 {
                break;
            }
        }
    }
    // The call's request side stays open, so that its end never looks like the caller's going away.
    inputs.closed().await;
}

fn variable((name, value): (String, String)) -> Variable {
    Variable { name: name.into_bytes().into(), value: value.into_bytes().into() }
}

fn unknown(task_id: &str) -> Error {
    let text = format!(
        "the connection to the supervisor of task '{task_id}' broke after the command was sent; it may have run"
    );
    Error::new(ErrorKind::OutcomeUnknown, text)
        .hint(format!("see what became of it: pyro task logs {task_id}"))
}

pub(super) fn no_command(task_id: &str, sequence: u64) -> Error {
    let text = format!("task '{task_id}' has no command {sequence}");
    Error::new(ErrorKind::NotFound, text).hint(format!("list its commands: pyro task logs {task_id}"))
}
