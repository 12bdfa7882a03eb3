//! Tasks: a machine that stays, and a journal of all that was run in it.

use pyro_engine::{DeletedTask, ExecResult, LogEntry, LogQuery, Stream, TaskList, TaskRecord};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::params::{Exec, Machine, Part, TaskId, one, output_bytes, stream_bytes};
use super::{About, Effect, Entry, exec, tool};
use crate::call::Call;
use crate::failure::Failure;
use crate::server::{Profile, Server};
use crate::{progress, text};

/// Which commands of a task are asked for.
#[derive(Debug, Deserialize, JsonSchema)]
struct Query {
    /// Only commands with this number or a greater one
    #[serde(default = "one")]
    #[schemars(range(min = 1))]
    since_sequence: i64,
    /// Only the newest so many of these
    #[serde(default = "limit")]
    #[schemars(range(min = 1, max = 200))]
    limit: i64,
    /// Output of all commands together at the most, in bytes; the newest come first in getting it
    #[serde(default = "stream_bytes")]
    #[schemars(range(min = 1024, max = 262_144))]
    max_bytes: i64,
    /// Only the command with this number
    #[serde(default)]
    #[schemars(range(min = 1))]
    sequence: Option<i64>,
    /// With sequence: only this stream, as a range of bytes that begins at offset and is max_bytes long
    #[serde(default)]
    stream: Option<StreamName>,
    /// With stream: the first byte wanted
    #[serde(default)]
    #[schemars(range(min = 0))]
    offset: i64,
}

impl Part for Query {}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum StreamName {
    Stdout,
    Stderr,
}

fn limit() -> i64 {
    20
}

/// How a task is deleted.
#[derive(Debug, Deserialize, JsonSchema)]
struct Delete {
    /// Kill the task's supervisor if it does not obey within 3 seconds: only for a task that an error says does not answer
    #[serde(default)]
    force: bool,
}

impl Part for Delete {}

/// Commands of a task with their output.
#[derive(Debug, Serialize, JsonSchema)]
struct Logs {
    task_id: String,
    /// How many entries follow
    count: usize,
    /// In the order of their numbers
    entries: Vec<LogEntry>,
    /// Which part of a stream the entry shows, where a part was asked for
    range: Option<Range>,
}

#[derive(Debug, Serialize, JsonSchema)]
struct Range {
    stream: StreamName,
    /// The first byte shown
    offset: u64,
    /// Where to read on; null at the end of what there is now
    next_offset: Option<u64>,
    /// Length of the whole stream on record, in bytes
    file_bytes: u64,
}

pub(super) fn all() -> Vec<Entry> {
    let profile = Profile::TaskCore;
    vec![
        tool(
            About {
                name: "task_create",
                title: "Make a task: a microVM that stays",
                description: "Makes a Linux microVM that stays alive between calls, starts it, and returns its record \
                              with task_id. Use it for anything with more than one step: files in /workspace, \
                              installed packages and background processes stay until the task is deleted or its \
                              ttl_seconds are up. Next: task_exec; when done: task_delete.",
                profile,
                effect: Effect::Acts,
            },
            task_create,
        ),
        tool(
            About {
                name: "task_exec",
                title: "Run a command in a task",
                description: "Runs one command in a task, in /workspace, and returns stdout, stderr, exit_code and its \
                              sequence number in the task's journal. Commands of one task may run at the same time. \
                              Long output is cut in the middle; the mark says how to read the rest with task_logs. A \
                              command that takes longer than timeout_seconds (30) is ended with exit_code 124: give \
                              builds and test suites more. To write a file, pass its text as stdin to `cat > FILE`.",
                profile,
                effect: Effect::Acts,
            },
            task_exec,
        ),
        tool(
            About {
                name: "task_status",
                title: "Show a task",
                description: "Returns a task's record: its state, when it expires, how many commands it has run and \
                              the last of them. A task whose guest is gone is `stopped`, and last_error says why.",
                profile,
                effect: Effect::Reads,
            },
            task_status,
        ),
        tool(
            About {
                name: "task_logs",
                title: "Read the journal of a task",
                description: "Returns the commands of a task with their output, oldest first, also of those that ran \
                              before this conversation or are running now. With sequence, stream and offset it \
                              returns one range of one stream, to read on where other results were cut; \
                              range.next_offset says where the next part begins.",
                profile,
                effect: Effect::Reads,
            },
            task_logs,
        ),
        tool(
            About {
                name: "task_list",
                title: "List tasks",
                description: "Lists all tasks of this user, those of other conversations included, newest activity \
                              first. Use it to find a task again.",
                profile,
                effect: Effect::Reads,
            },
            task_list,
        ),
        tool(
            About {
                name: "task_start",
                title: "Start a stopped task",
                description: "Boots the guest of a stopped task from its disk: /workspace, installed packages and the \
                              journal are as they were, processes are not. Returns its record.",
                profile,
                effect: Effect::Acts,
            },
            task_start,
        ),
        tool(
            About {
                name: "task_delete",
                title: "Delete a task",
                description: "Ends a task and removes its machine, its files and its journal for good. Do this when \
                              its work is done and what is needed of it has been read.",
                profile,
                effect: Effect::Removes,
            },
            task_delete,
        ),
    ]
}

async fn task_create(server: Server, (machine,): (Machine,), call: Call) -> Result<TaskRecord, Failure> {
    let engine = server.engine().await?;
    let (observer, reporting) = progress::report(&call);
    let record = call.unless_given_up(engine.create_task(machine.spec(&server)?, observer)).await;
    reporting.stop().await;
    record.map(brief)
}

async fn task_exec(server: Server, (task, exec): (TaskId, Exec), call: Call) -> Result<ExecResult, Failure> {
    let (exec, most) = exec.spec()?;
    let engine = server.engine().await?;
    let (observer, reporting) = progress::report(&call);
    let result = tokio::select! {
        result = engine.exec_task_unless(&task.task_id, exec, observer, call.cancelled()) => result,
        // The task and its journal outlive client and server: so does the command.
        () = call.unheard() => return Err(Failure::ending()),
    };
    reporting.stop().await;
    Ok(exec::of_task(&engine, result?, most).await)
}

async fn task_status(server: Server, (task,): (TaskId,), _call: Call) -> Result<TaskRecord, Failure> {
    Ok(brief(server.engine().await?.status_task(&task.task_id).await?))
}

async fn task_list(server: Server, (): (), _call: Call) -> Result<TaskList, Failure> {
    let mut list = server.engine().await?.list_tasks().await?;
    list.tasks = list.tasks.into_iter().map(brief).collect();
    Ok(list)
}

async fn task_start(server: Server, (task,): (TaskId,), call: Call) -> Result<TaskRecord, Failure> {
    let engine = server.engine().await?;
    call.unless_given_up(engine.start_task(&task.task_id)).await.map(brief)
}

async fn task_delete(
    server: Server,
    (task, delete): (TaskId, Delete),
    _call: Call,
) -> Result<DeletedTask, Failure> {
    let engine = server.engine().await?;
    if delete.force {
        return Ok(engine.delete_task_by_force(&task.task_id).await?);
    }
    Ok(engine.delete_task(&task.task_id).await?)
}

async fn task_logs(server: Server, (task, query): (TaskId, Query), _call: Call) -> Result<Logs, Failure> {
    let bytes = output_bytes("max_bytes", query.max_bytes)?;
    let number = |name: &str, value: i64, least: i64| {
        let bad = || Failure::new("invalid_value", format!("{name} must be {least} or more, not {value}"));
        u64::try_from(value).ok().filter(|_| value >= least).ok_or_else(bad)
    };
    let since = number("since_sequence", query.since_sequence, 1)?;
    let offset = number("offset", query.offset, 0)?;
    let limit = usize::try_from(query.limit).ok().filter(|limit| (1..=200).contains(limit));
    let limit = limit.ok_or_else(|| {
        Failure::new("invalid_value", format!("limit must be between 1 and 200, not {}", query.limit))
    })?;
    let only = query.sequence.map(|sequence| number("sequence", sequence, 1)).transpose()?;
    if query.stream.is_some() && only.is_none() {
        return Err(Failure::new("invalid_value", "stream is a part of one command: give its sequence too"));
    }
    if offset > 0 && query.stream.is_none() {
        return Err(Failure::new(
            "invalid_value",
            "offset is a place in one stream: give stream (stdout or stderr) too",
        ));
    }
    let engine = server.engine().await?;
    let max_bytes = Some(if query.stream.is_some() { 0 } else { bytes as u64 });
    let mut entries = match only {
        Some(sequence) => {
            engine.log_of_command(&task.task_id, sequence, max_bytes).await?.into_iter().collect()
        }
        None => {
            let asked = LogQuery { since_sequence: since, limit: Some(limit), max_bytes };
            engine.logs_task(&task.task_id, asked).await?.entries
        }
    };
    for entry in &mut entries {
        entry.stdout = text::plain(&entry.stdout);
        entry.stderr = text::plain(&entry.stderr);
        text::shorten(&mut entry.entry.command);
    }
    let mut range = None;
    if let (Some(sequence), Some(name), Some(entry)) = (only, query.stream, entries.first_mut()) {
        let (stream, place) = match name {
            StreamName::Stdout => (Stream::Stdout, &mut entry.stdout),
            StreamName::Stderr => (Stream::Stderr, &mut entry.stderr),
        };
        let part = engine.read_task_output(&task.task_id, sequence, stream, offset, bytes as u64).await?;
        *place = text::lossy(&part.bytes);
        let next = offset + part.bytes.len() as u64;
        let next_offset = (next < part.file_bytes).then_some(next);
        range = Some(Range { stream: name, offset, next_offset, file_bytes: part.file_bytes });
    }
    Ok(Logs { task_id: task.task_id, count: entries.len(), entries, range })
}

/// A record without what only fills a context.
fn brief(mut record: TaskRecord) -> TaskRecord {
    if let Some(last) = &mut record.last_command {
        text::shorten(&mut last.command);
    }
    record
}
