//! What operations return: plain objects with the keys of the public contract.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::network::{NetworkPolicy, SecretRecord, guest_ip, tap_name};
use crate::ports::Published;
use crate::spec::VmSpec;
use crate::task::boottime;

/// Where a machine is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Made, not running yet.
    Created,
    /// Running.
    Started,
    /// Ended; its disk is kept.
    Stopped,
}

impl VmState {
    /// The name in records and errors.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Started => "started",
            Self::Stopped => "stopped",
        }
    }

    pub(crate) fn can_start(self) -> bool {
        matches!(self, Self::Created | Self::Stopped)
    }
}

/// A machine. Times are epoch seconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[expect(missing_docs, reason = "the keys are those of the public contract, section 3")]
pub struct VmRecord {
    pub vm_id: String,
    pub environment: String,
    pub environment_version: String,
    pub vcpu_count: u8,
    pub mem_mib: u32,
    pub ttl_seconds: u32,
    pub created_at: f64,
    pub expires_at: f64,
    pub state: VmState,
    pub network_enabled: bool,
    #[serde(default)]
    pub network_policy: NetworkPolicy,
    #[serde(default)]
    pub ports: Vec<Published>,
    #[serde(default)]
    pub secrets: BTreeMap<String, SecretRecord>,
    pub allow_host_compat: bool,
    pub guest_ip: Option<String>,
    pub tap_name: Option<String>,
    pub execution_mode: String,
    pub isolation: String,
    /// `cold` or `restored`; none before its first start.
    #[serde(default)]
    pub start_mode: Option<String>,
    pub metadata: BTreeMap<String, String>,
    pub last_error: Option<String>,
    /// When it expires on the clock of the host's boot, in seconds: a clock that nobody can set. It is kept by the process
    /// that the machine belongs to.
    #[serde(skip)]
    pub(crate) expires_at_boottime: f64,
}

impl VmRecord {
    /// A machine that has just been asked for.
    pub(crate) fn new(id: &str, spec: &VmSpec, version: &str, isolation: &str, created_at: f64) -> Self {
        Self {
            vm_id: id.to_owned(),
            environment: spec.environment.clone(),
            environment_version: version.to_owned(),
            vcpu_count: spec.vcpu_count,
            mem_mib: spec.mem_mib,
            ttl_seconds: spec.ttl_seconds,
            created_at,
            expires_at: created_at + f64::from(spec.ttl_seconds),
            state: VmState::Created,
            network_enabled: spec.network.has_nic(),
            network_policy: NetworkPolicy::from(&spec.network),
            ports: spec.publish.clone(),
            secrets: spec.secrets.iter().map(|held| (held.name.clone(), (&held.secret).into())).collect(),
            allow_host_compat: spec.allow_host_compat,
            guest_ip: guest_ip(spec.network.has_nic()),
            tap_name: tap_name(spec.network.has_nic()),
            execution_mode: "pending".to_owned(),
            isolation: isolation.to_owned(),
            start_mode: None,
            metadata: BTreeMap::new(),
            last_error: None,
            expires_at_boottime: boottime() + f64::from(spec.ttl_seconds),
        }
    }

    /// What is left of its life, in seconds; less than nothing when that is over.
    pub(crate) fn seconds_left(&self) -> f64 {
        self.expires_at_boottime - boottime()
    }
}

/// What ended a command other than itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "snake_case")]
#[expect(missing_docs, reason = "the names say it, and are those of the public contract")]
pub enum Fault {
    Timeout,
    OutOfMemory,
    DiskFull,
    OutputLimit,
    GuestLost,
    Cancelled,
    TtlExpired,
}

/// Milliseconds by phase.
#[derive(Clone, Copy, Debug, Default, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Timings {
    /// The environment, the registry row, the directory and the disk.
    pub prepare: f64,
    /// From starting the VMM to its running.
    pub start: f64,
    /// From there to a guest that has its identity.
    pub handshake: f64,
    /// The command.
    pub execute: f64,
    /// The end of the machine and of its files.
    pub cleanup: f64,
}

impl Fault {
    /// The reason of a clean-up that follows a command's end.
    pub(crate) fn cleanup_reason(fault: Option<Self>) -> &'static str {
        if fault == Some(Self::TtlExpired) { "expired" } else { "post_exec_cleanup" }
    }
}

/// What became of a machine after its command.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Cleanup {
    /// The machine.
    pub vm_id: String,
    /// Whether nothing of it is left.
    pub deleted: bool,
    /// `post_exec_cleanup`, `run_vm_error_cleanup` or `expired`.
    pub reason: &'static str,
}

/// The end of a command. Durations are milliseconds, sizes bytes.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[expect(missing_docs, reason = "the keys are those of the public contract, section 3")]
pub struct ExecResult {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub task_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    pub environment: String,
    pub environment_version: String,
    pub command: String,
    /// The words that were run as they are; none for a shell string.
    pub argv: Option<Vec<String>>,
    pub stdout: String,
    pub stderr: String,
    pub exit_code: i32,
    pub duration_ms: f64,
    pub execution_mode: String,
    pub timed_out: bool,
    pub stdout_bytes: u64,
    pub stderr_bytes: u64,
    pub stdout_truncated: bool,
    pub stderr_truncated: bool,
    pub isolation: String,
    pub start_mode: String,
    pub fault: Option<Fault>,
    /// Processes that the command has left behind may write more, which the result does not hold.
    pub output_open: bool,
    pub timings: Timings,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cleanup: Option<Cleanup>,
    /// What the caller should know of.
    pub notes: Vec<String>,
}

/// A deleted machine.
#[derive(Clone, Debug, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Deleted {
    /// The machine.
    pub vm_id: String,
    /// Always true: a delete that failed is an error.
    pub deleted: bool,
    /// `explicit_delete`.
    pub reason: &'static str,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_clock_of_the_wall_does_not_limit_the_commands_of_a_vm() {
        let spec = VmSpec { ttl_seconds: 60, ..VmSpec::new("debian:12") };
        // As if the wall's clock had jumped by half a century since.
        let record = VmRecord::new("0123456789ab", &spec, "1.0.0", "qemu-tcg", 0.0);
        let left = record.seconds_left();
        assert!(left > 0.0 && left <= 60.0, "{left}");
    }
}
