//! One command of a task: its entry, its output into the journal and to whoever looks on, its end.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pyro_net::Network;
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use super::Supervisor;
use super::commands::{Handle, Progress};
use crate::ending::Ending;
use crate::error::{Error, ErrorKind};
use crate::execute::{Cancel, Limit, Outcome, Sink, carry_out, ended_by, millis};
use crate::files;
use crate::guest::{Chunk, Stream};
use crate::network;
use crate::place::Place;
use crate::record::Fault;
use crate::spec::ExecSpec;
use crate::task::journal::{EntryStatus, JournalEntry};
use crate::task::not_started;
use crate::task::supervisor_proto::{Event, event};
use crate::task::writer::{NewEntry, Writer};

/// The longest input of a command that nobody waits for, in bytes.
const MOST_INPUT: usize = 64 << 20;
/// Events that may wait for a caller.
const QUEUE: usize = 4;
/// How long a caller may take for a piece of output. A slower one reads the journal's files from there on, and the command
/// goes on without it.
const SLOW: Duration = Duration::from_millis(500);

/// What a caller is sent.
pub(super) type Events = Pin<Box<dyn tokio_stream::Stream<Item = Result<Event, tonic::Status>> + Send>>;
type Caller = mpsc::Sender<Result<Event, tonic::Status>>;

impl Supervisor {
    /// Begins a command; its events come on the channel. Its start is on disk when this returns.
    pub(super) async fn exec(
        self: &Arc<Self>,
        exec: ExecSpec,
        request_id: String,
        attached: bool,
    ) -> Result<Events, Error> {
        exec.check()?;
        let place = self.place.borrow().clone();
        let manner = place.manner().ok_or_else(|| not_started(&self.id))?;
        let (progress, watched) = watch::channel(Progress::default());
        let cancel = watch::Sender::new(None);
        let handle = Handle { progress: watched, cancel: cancel.clone() };
        let new = NewEntry {
            command: exec.command.display(),
            argv: exec.command.words(),
            cwd: exec.cwd.clone(),
            user: exec.user.clone(),
            manner,
            request_id,
        };
        let writer =
            self.commands.begin(handle, async |sequence| self.begin_entry(sequence, new).await).await?;
        let (sender, events) = mpsc::channel(QUEUE);
        let sequence = writer.entry.sequence;
        drop(sender.send(Ok(Event { kind: Some(event::Kind::Started(sequence)) })).await);
        // The last event has a place of its own, so that telling it waits for nobody.
        let (last, told_last) = mpsc::channel(1);
        let sink = Journaled {
            supervisor: Arc::clone(self),
            writer,
            caller: attached.then_some(sender),
            last: attached.then_some(last),
            progress,
            cancel: Cancel::new(cancel.subscribe()),
        };
        let cancel = Cancel::new(cancel.subscribe());
        drop(tokio::spawn(Arc::clone(self).carry_out(exec, place, sink, cancel)));
        // As a rule the guest is sent its command, by that and by its connection, before the caller is told of a number.
        for _ in 0..2 {
            tokio::task::yield_now().await;
        }
        Ok(Box::pin(ReceiverStream::new(events).chain(ReceiverStream::new(told_last))))
    }

    async fn begin_entry(self: &Arc<Self>, sequence: u64, new: NewEntry) -> Result<Writer, Error> {
        let supervisor = Arc::clone(self);
        self.engine
            .blocking(move || {
                supervisor.unsettled.begin(sequence, new).map_err(|error| {
                    let error = Error::state(supervisor.directory.path(), &error);
                    let hint = error.remedy().unwrap_or_default().to_owned();
                    let text =
                        format!("the command was not begun, because its entry could not be written: {error}");
                    Error::new(ErrorKind::HostResources, text).hint(hint)
                })
            })
            .await
    }

    /// Runs a command to its end and writes that down.
    async fn carry_out(self: Arc<Self>, exec: ExecSpec, place: Place, mut sink: Journaled, cancel: Cancel) {
        let began = Instant::now();
        let (journal, sequence) = (self.journal.clone(), sink.writer.entry.sequence);
        let unsettled = Arc::clone(&self.unsettled);
        let prepared = tokio::spawn(async move {
            // First the command goes on its way. What the disk refuses now is tried again at the end.
            tokio::task::yield_now().await;
            drop(tokio::task::spawn_blocking(move || journal.prepare_end(sequence)).await);
            drop(tokio::task::spawn_blocking(move || unsettled.prepare()));
        });
        let limit = Limit { asked: exec.timeout_seconds, left: self.file().life_left().as_secs_f64() };
        let mark = place.network().map_or(0, Network::mark);
        let (outcome, later, reason) = match carry_out(&place, exec, limit, &mut sink, cancel, true).await {
            Ok((outcome, later)) => (outcome, later, None),
            Err(error) => {
                if error.kind() == ErrorKind::OutcomeUnknown {
                    // A guest that lives and cannot be spoken to is of no use, and may do anything.
                    place.kill().await;
                }
                (failed(&error), None, Some(error.to_string()))
            }
        };
        if let Some(words) = &outcome.words {
            let chunk = Chunk { stream: Stream::Stderr, bytes: words.as_bytes().to_vec() };
            // The command has ended; a disk that is full keeps only these words out.
            drop(sink.take(chunk).await);
        }
        let entry = &mut sink.writer.entry;
        entry.notes = network::notes(place.network(), mark);
        entry.status = match outcome.fault {
            None | Some(Fault::OutOfMemory | Fault::OutputLimit) => EntryStatus::Finished,
            // The guest's disk was full, or the host's: only the latter has ended the command.
            Some(Fault::DiskFull) if outcome.words.is_none() => EntryStatus::Finished,
            Some(Fault::Timeout) => EntryStatus::TimedOut,
            Some(_) => EntryStatus::Interrupted,
        };
        entry.exit_code = Some(outcome.exit_code);
        entry.duration_ms = Some(millis(began.elapsed()));
        entry.fault = outcome.fault;
        entry.output_open = outcome.output_open;
        entry.reason =
            reason.or_else(|| outcome.fault.map(|_| outcome.words.unwrap_or_default().trim().to_owned()));
        drop(prepared.await);
        let later = later.and_then(|later| {
            let room = Arc::clone(&self.later_outputs).try_acquire_owned().ok()?;
            Some((later, sink.writer.later(), room))
        });
        self.finish(sink);
        // Its files were made by now, and its entry has been written.
        if let Some((mut later, mut writer, _room)) = later {
            while let Some(chunk) = later.next().await {
                // Without a listener the guest's processes write on, unheard.
                if writer.append(&chunk).is_err() {
                    return;
                }
            }
        }
    }

    /// Takes all of a command's input before the command is begun, so that its caller may go.
    pub(super) async fn take_input(
        &self,
        mut input: impl tokio::io::AsyncRead + Unpin,
    ) -> Result<tokio::fs::File, Error> {
        let failed = |error: io::Error| Error::state(self.directory.path(), &error);
        let file = files::unnamed(self.directory.path()).map_err(failed)?;
        let mut file = tokio::fs::File::from_std(file);
        let mut length = 0;
        let mut buffer = vec![0; pyro_proto::limits::CHUNK];
        loop {
            let read = input.read(&mut buffer).await.map_err(|_broken| {
                let text = "the command was not begun, because its input broke off";
                Error::new(ErrorKind::Cancelled, text)
            })?;
            if read == 0 {
                break;
            }
            length += read;
            if length > MOST_INPUT {
                let text = format!(
                    "the input of a command that is not waited for is longer than {} MiB",
                    MOST_INPUT >> 20
                );
                return Err(Error::new(ErrorKind::InvalidValue, text)
                    .hint("wait for the command, or put the input into a file of the guest's first"));
            }
            file.write_all(&buffer[..read]).await.map_err(failed)?;
        }
        file.flush().await.map_err(failed)?;
        file.rewind().await.map_err(failed)?;
        Ok(file)
    }

    /// Writes the end of a command down, then tells it.
    fn finish(self: &Arc<Self>, sink: Journaled) {
        let Journaled { mut writer, caller, last, progress, supervisor: _, cancel: _ } = sink;
        // What is in its queue comes before the last event.
        drop(caller);
        let sequence = writer.entry.sequence;
        // As output, it goes to the kernel and no further for now; to have another thread do it takes longer.
        let end = match writer.finish() {
            Ok(()) => {
                self.unsettled.ended(sequence);
                ended_event(&writer.entry)
            }
            Err(error) => {
                super::serve::complain(&format!(
                    "the end of command {sequence} could not be recorded: {error}"
                ));
                if is_full(&error) {
                    let entry = &mut writer.entry;
                    entry.fault.get_or_insert(Fault::DiskFull);
                    entry
                        .reason
                        .get_or_insert_with(|| "the disk of the host was full when it ended".to_owned());
                }
                let end = unrecorded_event(&writer.entry);
                self.unsettled.cannot_write(writer.entry.clone());
                self.finish_later(writer);
                end
            }
        };
        if let Some(last) = last {
            // A caller that is gone does not hear it.
            last.try_send(Ok(Event { kind: Some(end) })).ok();
        }
        progress.send_modify(|progress| progress.ended = true);
        self.commands.ended(sequence);
    }

    /// Tries to write an end that could not be written, again and again until the disk has room for it or the task is
    /// gone. Callers are told of the end meanwhile.
    fn finish_later(self: &Arc<Self>, mut writer: Writer) {
        let supervisor = Arc::clone(self);
        drop(tokio::spawn(async move {
            while supervisor.may_have_room().await {
                let again = supervisor.engine.blocking(move || {
                    let done = writer.finish();
                    Ok((writer, done))
                });
                match again.await {
                    Ok((written, Ok(()))) => return supervisor.unsettled.ended(written.entry.sequence),
                    Err(_) => return,
                    Ok((unfinished, Err(_full))) => writer = unfinished,
                }
            }
        }));
    }

    /// Tells what a command wrote from these offsets on, as far as its files hold it, until it has ended.
    pub(super) fn follow(self: &Arc<Self>, sequence: u64, offsets: [u64; 2]) -> Events {
        let (sender, events) = mpsc::channel(QUEUE);
        let supervisor = Arc::clone(self);
        drop(tokio::spawn(async move {
            let mut gone = supervisor.gone.subscribe();
            let followed = tokio::select! {
                // Once there is none to wait for, the caller is let go.
                _ = gone.wait_for(|gone| *gone) => return,
                () = sender.closed() => return,
                followed = supervisor.pass_on(sequence, offsets, &sender) => followed,
            };
            if let Err(error) = followed {
                let error = Error::state(supervisor.directory.path(), &error);
                drop(sender.send(Err(crate::task::to_status(&error))).await);
            }
        }));
        Box::pin(ReceiverStream::new(events))
    }

    async fn pass_on(&self, sequence: u64, mut offsets: [u64; 2], caller: &Caller) -> io::Result<()> {
        let mut place = self.place.subscribe();
        tokio::select! {
            biased;
            () = self.commands.begun(sequence) => {}
            // A task that is stopped has no next command.
            _ = place.wait_for(Place::is_none) => return Ok(()),
        }
        drop(caller.send(Ok(Event { kind: Some(event::Kind::Started(sequence)) })).await);
        if self.pass_output_on(sequence, &mut offsets, caller).await? {
            let kind = match self.unsettled.unwritten_end(sequence) {
                Some(entry) => Some(unrecorded_event(&entry)),
                None => {
                    let entry = self.journal.entry(sequence)?;
                    entry
                        .filter(|entry| entry.status != EntryStatus::Running)
                        .map(|entry| ended_event(&entry))
                }
            };
            if let Some(kind) = kind {
                drop(caller.send(Ok(Event { kind: Some(kind) })).await);
            }
        }
        Ok(())
    }

    /// Passes what a command writes on from these offsets, until it has ended; false when the caller is gone.
    async fn pass_output_on(
        &self,
        sequence: u64,
        offsets: &mut [u64; 2],
        caller: &Caller,
    ) -> io::Result<bool> {
        let mut progress = self.commands.get(sequence).map(|handle| handle.progress);
        loop {
            // What is seen here is in the files; more may be.
            let ended = match &mut progress {
                Some(progress) => progress.borrow_and_update().ended,
                None => true,
            };
            for (stream, offset) in [Stream::Stdout, Stream::Stderr].into_iter().zip(offsets.iter_mut()) {
                let reader = self.journal.reader(sequence, stream, *offset)?;
                let Some(mut reader) = reader.map(tokio::fs::File::from_std) else { continue };
                loop {
                    let mut bytes = Vec::with_capacity(pyro_proto::limits::CHUNK);
                    let length = reader.read_buf(&mut bytes).await?;
                    if length == 0 {
                        break;
                    }
                    *offset += length as u64;
                    if caller.send(Ok(output_event(Chunk { stream, bytes }))).await.is_err() {
                        return Ok(false);
                    }
                }
            }
            if ended {
                return Ok(true);
            }
            if let Some(watched) = &mut progress
                && watched.changed().await.is_err()
            {
                progress = None;
            }
        }
    }

    /// Lets a slow caller read the journal's files from these offsets on. Its end comes on a channel of its own.
    fn let_read_on(self: &Arc<Self>, sequence: u64, mut offsets: [u64; 2], caller: Caller) {
        let supervisor = Arc::clone(self);
        drop(tokio::spawn(async move {
            let mut gone = supervisor.gone.subscribe();
            tokio::select! {
                _ = gone.wait_for(|gone| *gone) => {}
                () = caller.closed() => {}
                // What cannot be read here, the caller looks for in the journal itself.
                _ = supervisor.pass_output_on(sequence, &mut offsets, &caller) => {}
            }
        }));
    }

    /// Ends one command; it has ended when this returns.
    pub(super) async fn cancel(&self, sequence: u64) {
        if let Some(mut handle) = self.commands.get(sequence) {
            handle.cancel.send_replace(Some(Ending::Cancelled));
            // The sender goes away with the command.
            drop(handle.progress.wait_for(|progress| progress.ended).await);
        }
    }
}

/// Puts output into the journal, then before the caller and whoever follows.
struct Journaled {
    supervisor: Arc<Supervisor>,
    writer: Writer,
    /// None: nobody waits for this command, or not any more.
    caller: Option<Caller>,
    /// Where its end is told.
    last: Option<Caller>,
    progress: watch::Sender<Progress>,
    cancel: Cancel,
}

impl Sink for Journaled {
    async fn take(&mut self, chunk: Chunk) -> Result<(), Error> {
        let before = self.writer.kept();
        self.writer.append(chunk.stream, &chunk.bytes).map_err(|error| {
            let text = format!("the command was ended, because its output could not be written: {error}");
            Error::new(ErrorKind::HostResources, text)
        })?;
        let entry = &self.writer.entry;
        self.progress.send_modify(|progress| {
            progress.stdout = entry.stdout_bytes;
            progress.stderr = entry.stderr_bytes;
        });
        if let Some(caller) = &self.caller {
            let sent = tokio::select! {
                biased;
                sent = tokio::time::timeout(SLOW, caller.send(Ok(output_event(chunk)))) => sent,
                // A caller that takes nothing does not delay the end of a command; it finds the rest in the journal.
                _ = self.cancel.asked() => {
                    self.caller = None;
                    return Ok(());
                }
            };
            match sent {
                Ok(Ok(())) => {}
                Ok(Err(_gone)) => self.caller = None,
                Err(_slow) => {
                    if let Some(caller) = self.caller.take() {
                        self.supervisor.let_read_on(self.writer.entry.sequence, before, caller);
                    }
                }
            }
        }
        Ok(())
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn output_event(chunk: Chunk) -> Event {
    let kind = match chunk.stream {
        Stream::Stdout => event::Kind::Stdout(chunk.bytes.into()),
        Stream::Stderr => event::Kind::Stderr(chunk.bytes.into()),
    };
    Event { kind: Some(kind) }
}

fn ended_event(entry: &JournalEntry) -> event::Kind {
    event::Kind::Ended(serde_json::to_vec(entry).unwrap_or_default().into())
}

fn unrecorded_event(entry: &JournalEntry) -> event::Kind {
    event::Kind::EndedUnrecorded(serde_json::to_vec(entry).unwrap_or_default().into())
}

/// How a command is told to have ended that could not be sent, or not be brought to its end.
fn failed(error: &Error) -> Outcome {
    match error.kind() {
        ErrorKind::CommandRefused => {
            Outcome { exit_code: 126, words: Some(format!("{error}\n")), ..Outcome::default() }
        }
        ErrorKind::HostResources => ended_by(Ending::HostDiskFull, 137),
        _ => ended_by(Ending::GuestLost, 137),
    }
}
