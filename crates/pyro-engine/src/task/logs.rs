//! Reading a task's journal: what was asked for and nothing else.

use super::record::{LogEntry, LogQuery, OutputRange, TaskLogs};
use super::{EntryStatus, JournalEntry};
use crate::capture;
use crate::engine::Engine;
use crate::error::Error;
use crate::guest::Stream;
use crate::observe::Observer;
use crate::task::journal::Journal;

impl Engine {
    /// Commands of a task with their output, in the order of their numbers; one that runs has what came so far.
    ///
    /// # Errors
    /// When there is no such task.
    pub async fn logs_task(&self, task_id: &str, query: LogQuery) -> Result<TaskLogs, Error> {
        let entries = self.in_journal(task_id, move |journal| read(journal, query)).await?;
        Ok(TaskLogs { task_id: task_id.to_owned(), count: entries.len(), entries })
    }

    /// One command of a task with its output, of which at most so many bytes; none where there is no such command.
    ///
    /// # Errors
    /// When there is no such task.
    pub async fn log_of_command(
        &self,
        task_id: &str,
        sequence: u64,
        max_bytes: Option<u64>,
    ) -> Result<Option<LogEntry>, Error> {
        self.in_journal(task_id, move |journal| {
            let mut budget = Budget { output: max_bytes.unwrap_or(MOST_BYTES), commands: MOST_COMMAND_BYTES };
            read_one(journal, sequence, &mut budget)
        })
        .await
    }

    /// Bytes of one stream of a command, as they are on record: from an offset on, at most so many and at most 1 MiB.
    ///
    /// # Errors
    /// When there is no such task.
    pub async fn read_task_output(
        &self,
        task_id: &str,
        sequence: u64,
        stream: Stream,
        offset: u64,
        most: u64,
    ) -> Result<OutputRange, Error> {
        self.in_journal(task_id, move |journal| {
            journal.range(sequence, stream, offset, most.min(capture::LIMIT as u64))
        })
        .await
    }

    /// Reads in a task's journal, after that was put in order where the task has no supervisor.
    async fn in_journal<T: Send + 'static>(
        &self,
        task_id: &str,
        read: impl FnOnce(&Journal) -> std::io::Result<T> + Send + 'static,
    ) -> Result<T, Error> {
        let (engine, id) = (self.clone(), task_id.to_owned());
        self.blocking(move || {
            let registry = &engine.inner.registry;
            drop(registry.lock_task(&id)?);
            let directory = registry.task_directory(&id)?;
            read(&directory.journal()).map_err(|error| Error::state(directory.path(), &error))
        })
        .await
    }

    /// Waits for the command with this number, which may not have begun yet, passes its output on from the beginning,
    /// and returns its entry when it has ended; none when the task is stopped and there is no such command.
    ///
    /// # Errors
    /// When there is no such task, or the observer's reader went away.
    pub async fn follow_command(
        &self,
        task_id: &str,
        sequence: u64,
        observer: &Observer,
    ) -> Result<Option<JournalEntry>, Error> {
        loop {
            if let Some(entry) = self.follow_task(task_id, sequence, observer).await? {
                return Ok(Some(entry));
            }
            // The supervisor went away: what it has left is in order now.
            match self.task_entry(task_id, sequence).await? {
                Some(entry) if entry.status == EntryStatus::Running => {}
                other => return Ok(other),
            }
        }
    }
}

/// Output of all entries together, where nothing else is asked for.
const MOST_BYTES: u64 = 16 << 20;
/// The words of all commands together: each may have 2 MiB, and a task ten thousand of them.
const MOST_COMMAND_BYTES: usize = 4 << 20;
/// What of a command's words is shown in any case.
const LEAST_COMMAND_BYTES: usize = 256;

/// What one answer may still hold, in bytes.
struct Budget {
    output: u64,
    commands: usize,
}

fn read(journal: &Journal, query: LogQuery) -> std::io::Result<Vec<LogEntry>> {
    let mut sequences = journal.sequences()?;
    sequences.retain(|sequence| *sequence >= query.since_sequence);
    if let Some(limit) = query.limit {
        sequences.drain(..sequences.len().saturating_sub(limit));
    }
    // The newest entries have the first claim on it.
    let mut budget = Budget { output: query.max_bytes.unwrap_or(MOST_BYTES), commands: MOST_COMMAND_BYTES };
    let mut entries = Vec::with_capacity(sequences.len());
    for sequence in sequences.into_iter().rev() {
        entries.extend(read_one(journal, sequence, &mut budget)?);
    }
    entries.reverse();
    Ok(entries)
}

/// One entry with its output, of which no more than what the budget has left.
fn read_one(journal: &Journal, sequence: u64, budget: &mut Budget) -> std::io::Result<Option<LogEntry>> {
    let Some(mut entry) = journal.entry(sequence)? else { return Ok(None) };
    entry.command = capture::cut(entry.command, budget.commands.max(LEAST_COMMAND_BYTES));
    budget.commands = budget.commands.saturating_sub(entry.command.len());
    let mut text = |stream| -> std::io::Result<(String, bool)> {
        let (text, cut) = journal.text(sequence, stream, budget.output.min(capture::LIMIT as u64))?;
        budget.output = budget.output.saturating_sub(text.len() as u64);
        Ok((text, cut))
    };
    let (stdout, stdout_cut) = text(Stream::Stdout)?;
    let (stderr, stderr_cut) = text(Stream::Stderr)?;
    Ok(Some(LogEntry {
        stdout_truncated: stdout_cut || entry.stdout_dropped_bytes > 0,
        stderr_truncated: stderr_cut || entry.stderr_dropped_bytes > 0,
        entry,
        stdout,
        stderr,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::writer::tests::{begin, journal};

    #[test]
    fn only_what_is_asked_for_is_read() {
        let (dir, journal) = journal();
        for sequence in 1..=20 {
            let mut writer = begin(&journal, sequence, &format!("command {sequence}")).expect("begun");
            writer.append(Stream::Stdout, &vec![b'x'; 1000]).expect("written");
        }
        // An entry that nobody asked for may be damaged: it is not even opened.
        fs_err::write(dir.path().join("000001.json"), "damaged").expect("written");
        let query = LogQuery { since_sequence: 5, limit: Some(4), max_bytes: Some(2500) };
        let entries = read(&journal, query).expect("read");
        let numbers: Vec<u64> = entries.iter().map(|entry| entry.entry.sequence).collect();
        assert_eq!(numbers, [17, 18, 19, 20]);
        assert!(entries.iter().map(|entry| entry.stdout.len()).sum::<usize>() < 3000);
        let cut: Vec<bool> = entries.iter().map(|entry| entry.stdout_truncated).collect();
        assert_eq!(cut, [true, true, false, false], "the newest are whole");
        assert!(dir.path().join("000001.json").exists());
        assert_eq!(read(&journal, LogQuery::default()).expect("read").len(), 20);
    }

    #[test]
    fn the_words_of_long_commands_are_cut_where_there_are_many() {
        let (_dir, journal) = journal();
        for sequence in 1..=10 {
            drop(begin(&journal, sequence, &"x".repeat(1 << 20)).expect("begun"));
        }
        let entries = read(&journal, LogQuery::default()).expect("read");
        let lengths: Vec<usize> = entries.iter().map(|entry| entry.entry.command.len()).collect();
        assert_eq!(lengths[6..], [1 << 20; 4], "the newest are whole");
        assert!(lengths[..6].iter().all(|length| *length < 300), "{lengths:?}");
        assert!(entries[0].entry.command.ends_with(" more bytes)"), "{}", entries[0].entry.command);
    }
}
