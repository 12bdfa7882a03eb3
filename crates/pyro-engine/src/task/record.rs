//! What task operations return: plain objects with the keys of the public contract, section 4.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::network::{NetworkPolicy, SecretRecord, guest_ip, tap_name};
use crate::ports::Published;
use crate::record::VmState;
use crate::task::file::TaskFile;
use crate::task::journal::{EntryStatus, JournalEntry};

/// Where commands of a task start, in the guest.
pub(crate) const WORKSPACE: &str = "/workspace";

/// A task. Times are epoch seconds, sizes bytes.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[expect(missing_docs, reason = "the keys are those of the public contract, sections 3 and 4")]
pub struct TaskRecord {
    pub task_id: String,
    pub environment: String,
    pub environment_version: String,
    pub vcpu_count: u8,
    pub mem_mib: u32,
    pub disk_mib: u32,
    pub ttl_seconds: u32,
    pub created_at: f64,
    pub expires_at: f64,
    pub state: VmState,
    pub network_enabled: bool,
    pub network_policy: NetworkPolicy,
    pub ports: Vec<Published>,
    pub secrets: BTreeMap<String, SecretRecord>,
    pub allow_host_compat: bool,
    pub guest_ip: Option<String>,
    pub tap_name: Option<String>,
    pub execution_mode: String,
    pub isolation: String,
    pub start_mode: String,
    pub metadata: BTreeMap<String, String>,
    pub last_error: Option<String>,
    pub workspace_path: String,
    pub command_count: u64,
    pub last_command: Option<LastCommand>,
    /// What the task takes on the host's disk now.
    pub disk_bytes: u64,
}

/// The newest command of a task.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[expect(missing_docs, reason = "the keys are those of the public contract, section 4")]
pub struct LastCommand {
    pub sequence: u64,
    pub command: String,
    pub cwd: String,
    pub exit_code: Option<i32>,
    pub duration_ms: Option<f64>,
    pub execution_mode: String,
    pub status: EntryStatus,
}

/// All tasks, newest activity first.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct TaskList {
    /// How many.
    pub count: usize,
    /// What they take on the host's disk together, in bytes.
    pub disk_bytes: u64,
    /// Their records.
    pub tasks: Vec<TaskRecord>,
    /// Tasks that cannot be read, one sentence each.
    pub problems: Vec<String>,
}

/// Commands of a task with their output.
#[derive(Clone, Debug, Serialize)]
pub struct TaskLogs {
    /// The task.
    pub task_id: String,
    /// How many entries follow.
    pub count: usize,
    /// In the order of their numbers.
    pub entries: Vec<LogEntry>,
}

/// A journal entry with its output as text: invalid UTF-8 replaced, the middle of a long stream cut.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[expect(missing_docs, reason = "the keys are those of the public contract, section 4")]
pub struct LogEntry {
    #[serde(flatten)]
    pub entry: JournalEntry,
    pub stdout: String,
    pub stderr: String,
    /// Whether something of the stream is not in the text, or was dropped.
    pub stdout_truncated: bool,
    pub stderr_truncated: bool,
}

/// Which entries of a journal are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogQuery {
    /// The first number wanted.
    pub since_sequence: u64,
    /// The newest so many of them; none: all.
    pub limit: Option<usize>,
    /// Output of all entries together at the most, in bytes; at most 1 MiB of each stream in any case.
    pub max_bytes: Option<u64>,
}

/// A part of what a command wrote to one stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutputRange {
    /// The bytes as they came.
    pub bytes: Vec<u8>,
    /// Length of the whole stream on record.
    pub file_bytes: u64,
}

/// A deleted task.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct DeletedTask {
    /// The task.
    pub task_id: String,
    /// Always true: a delete that failed is an error.
    pub deleted: bool,
    /// `explicit_delete`.
    pub reason: &'static str,
}

impl DeletedTask {
    pub(super) fn explicitly(task_id: &str) -> Self {
        Self { task_id: task_id.to_owned(), deleted: true, reason: "explicit_delete" }
    }
}

/// A command of a task that was to be ended.
#[derive(Clone, Debug, Serialize)]
pub struct CancelledCommand {
    /// The task.
    pub task_id: String,
    /// The command's number.
    pub sequence: u64,
    /// Whether it was running; false when it had ended before.
    pub ended: bool,
}

/// A command of a task that nobody waits for.
#[derive(Clone, Debug, Serialize)]
pub struct Detached {
    /// The task.
    pub task_id: String,
    /// The number by which its output and its end can be asked for.
    pub sequence: u64,
    /// `running`.
    pub status: EntryStatus,
}

impl Default for LogQuery {
    fn default() -> Self {
        Self { since_sequence: 1, limit: None, max_bytes: None }
    }
}

impl TaskRecord {
    pub(crate) fn new(
        file: TaskFile,
        command_count: u64,
        last: Option<JournalEntry>,
        disk_bytes: u64,
    ) -> Self {
        let has_network = file.network.has_nic();
        Self {
            task_id: file.task_id,
            environment: file.environment,
            environment_version: file.environment_version,
            vcpu_count: file.vcpu_count,
            mem_mib: file.mem_mib,
            disk_mib: file.disk_mib,
            ttl_seconds: file.ttl_seconds,
            created_at: file.created_at,
            expires_at: file.expires_at,
            state: file.state,
            network_enabled: has_network,
            network_policy: NetworkPolicy::from(&file.network),
            ports: file.ports,
            secrets: file.secrets.into_iter().map(|(name, secret)| (name, (&secret).into())).collect(),
            allow_host_compat: file.allow_host_compat,
            guest_ip: guest_ip(has_network),
            tap_name: tap_name(has_network),
            execution_mode: file.execution_mode,
            isolation: file.isolation,
            start_mode: file.start_mode,
            metadata: file.metadata,
            last_error: file.last_error,
            workspace_path: WORKSPACE.to_owned(),
            command_count,
            last_command: last.map(LastCommand::from),
            disk_bytes,
        }
    }
}

impl From<JournalEntry> for LastCommand {
    fn from(entry: JournalEntry) -> Self {
        Self {
            sequence: entry.sequence,
            command: entry.command,
            cwd: entry.cwd,
            exit_code: entry.exit_code,
            duration_ms: entry.duration_ms,
            execution_mode: entry.execution_mode,
            status: entry.status,
        }
    }
}
