//! `pyro task logs --follow`: all commands of a task as they run, the output of those that run at the same time included.

use std::io::{self, Write};

use pyro_engine::{Chunk, Engine, Error, ErrorKind, JournalEntry, Observer, Phase};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::task::headline;
use crate::failure::Failure;
use crate::printer::Printer;

/// Pieces that may wait for a slow reader.
const QUEUE: usize = 16;

/// Why a command is not followed to its end.
enum Stopped {
    /// Nobody reads any more.
    Unread,
    Failed(Error),
}

impl From<Error> for Stopped {
    fn from(error: Error) -> Self {
        match error.kind() {
            // The task is gone as well where it is not known any more.
            ErrorKind::NotFound | ErrorKind::Expired | ErrorKind::Cancelled => Self::Unread,
            _ => Self::Failed(error),
        }
    }
}

/// What comes of a command that is followed.
enum Piece {
    Begun(Box<JournalEntry>),
    Output(Chunk),
    Ended(Box<JournalEntry>),
}

/// Shows what the commands from `first` on write, and how they end, until the task has stopped or is gone; with `only`, until
/// that one has ended.
pub(super) async fn follow(
    engine: &Engine,
    task_id: &str,
    first: u64,
    only: Option<u64>,
    printer: &Printer,
) -> Result<(), Failure> {
    let (pieces, shown) = mpsc::channel(QUEUE);
    let (begun, mut beginning) = mpsc::unbounded_channel();
    // On a thread of its own: a reader that stalls must not keep signals from being heard.
    let show = tokio::task::spawn_blocking({
        let printer = printer.clone();
        move || show_all(shown, &printer)
    });
    let mut following = JoinSet::new();
    let mut next = only.unwrap_or(first);
    let start = |following: &mut JoinSet<_>, sequence| {
        let (engine, task_id) = (engine.clone(), task_id.to_owned());
        let (pieces, begun) = (pieces.clone(), begun.clone());
        following.spawn(async move { one(&engine, &task_id, sequence, pieces, begun).await });
    };
    start(&mut following, next);
    let result = loop {
        tokio::select! {
            Some(sequence) = beginning.recv() => {
                if only.is_none() && sequence == next {
                    next += 1;
                    start(&mut following, next);
                }
            }
            ended = following.join_next() => match ended {
                None => break Ok(()),
                Some(Ok(Ok(()))) => {}
                Some(Ok(Err(Stopped::Unread))) => break Ok(()),
                Some(Ok(Err(Stopped::Failed(error)))) => break Err(error.into()),
                Some(Err(panic)) => break Err(Failure::host("a thread", &io::Error::other(panic))),
            },
        }
    };
    following.shutdown().await;
    drop((pieces, begun));
    drop(show.await);
    result
}

/// Follows one command, which may not have begun.
async fn one(
    engine: &Engine,
    task_id: &str,
    sequence: u64,
    pieces: mpsc::Sender<(u64, Piece)>,
    begun: mpsc::UnboundedSender<u64>,
) -> Result<(), Stopped> {
    let (sender, mut output) = mpsc::channel(QUEUE);
    let (told, mut is_begun) = mpsc::unbounded_channel();
    let observer = Observer::none().output(sender).on_phase({
        let begun = begun.clone();
        move |phase| {
            if let Phase::Sequence(sequence) = phase {
                // The next one is waited for from here on.
                _ = (told.send(()), begun.send(sequence));
            }
        }
    });
    let show = async |piece| pieces.send((sequence, piece)).await.map_err(|_closed| Stopped::Unread);
    let pass_on = async {
        if is_begun.recv().await.is_some()
            && let Some(entry) = engine.task_entry(task_id, sequence).await?
        {
            show(Piece::Begun(Box::new(entry))).await?;
        }
        while let Some(chunk) = output.recv().await {
            show(Piece::Output(chunk)).await?;
        }
        Ok(())
    };
    let followed = async {
        let followed = engine.follow_command(task_id, sequence, &observer).await;
        drop(observer);
        followed.map_err(Stopped::from)
    };
    let (entry, ()) = tokio::try_join!(followed, pass_on)?;
    if let Some(entry) = entry {
        // Of one that was found ended nobody has told a beginning.
        _ = begun.send(sequence);
        show(Piece::Ended(Box::new(entry))).await?;
    }
    Ok(())
}

/// Prints pieces until there are no more, or nobody reads them.
fn show_all(mut pieces: mpsc::Receiver<(u64, Piece)>, printer: &Printer) {
    let mut last = None;
    while let Some((sequence, piece)) = pieces.blocking_recv() {
        let shown = match piece {
            Piece::Begun(entry) => line(&format!("#{sequence} running cwd={}", entry.cwd))
                .and_then(|()| line(&format!("$ {}", entry.command))),
            Piece::Output(chunk) => {
                let heading =
                    if last == Some(sequence) { Ok(()) } else { line(&format!("#{sequence} goes on")) };
                heading.and_then(|()| write(&chunk.bytes))
            }
            Piece::Ended(entry) => line(&headline(&entry)),
        };
        last = Some(sequence);
        if let Err(error) = shown {
            if error.kind() != io::ErrorKind::BrokenPipe {
                printer.warn(&format!("error: the output could not be written: {error}"));
            }
            return;
        }
    }
}

fn line(text: &str) -> io::Result<()> {
    write(format!("{text}\n").as_bytes())
}

fn write(bytes: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(bytes).and_then(|()| stdout.flush())
}
