//! The durable record of a task: a file in its directory, replaced whole whenever its state changes.

use std::collections::BTreeMap;
use std::io;
use std::sync::OnceLock;
use std::time::Duration;

use pyro_net::Policy;
use pyro_net::secret::Secret;
use serde::{Deserialize, Serialize};

use crate::budget::Promise;
use crate::error::{Error, ErrorKind};
use crate::files;
use crate::ports::Published;
use crate::record::VmState;
use crate::registry::now;
use crate::task::TaskDirectory;
use crate::task::ready::Kept;

/// The layout that this pyro writes and the newest that it reads.
pub(crate) const LAYOUT_VERSION: u32 = 1;
const MOST_BYTES: u64 = 256 << 10;

/// What is known about a task, as it is on disk.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct TaskFile {
    pub(crate) layout_version: u32,
    pub(crate) task_id: String,
    pub(crate) environment: String,
    pub(crate) environment_version: String,
    /// The root image that the disk was made upon; empty for a task on the host.
    pub(crate) environment_digest: String,
    pub(crate) vcpu_count: u8,
    pub(crate) mem_mib: u32,
    pub(crate) disk_mib: u32,
    pub(crate) ttl_seconds: u32,
    pub(crate) allow_host_compat: bool,
    pub(crate) created_at: f64,
    pub(crate) expires_at: f64,
    /// The boot of the host in which it was made, and when it expires on that boot's clock, in seconds: a clock
    /// that nobody can set.
    pub(crate) boot_id: String,
    pub(crate) expires_at_boottime: f64,
    pub(crate) machine_id: String,
    pub(crate) state: VmState,
    pub(crate) execution_mode: String,
    pub(crate) isolation: String,
    pub(crate) start_mode: String,
    /// What its guest may reach.
    #[serde(default = "Policy::none")]
    pub(crate) network: Policy,
    /// What its guest uses and does not see, by the variable that it has of it; never the values.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub(crate) secrets: BTreeMap<String, Secret>,
    /// Ports of its guest that this host's lead to.
    #[serde(default)]
    pub(crate) ports: Vec<Published>,
    /// The least tier that its guest may have.
    #[serde(default)]
    pub(crate) require_isolation: Option<String>,
    /// A machine that is kept ready for one command, and ends with its supervisor; none: a task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) kept: Option<Kept>,
    #[serde(default)]
    pub(crate) metadata: BTreeMap<String, String>,
    #[serde(default)]
    pub(crate) last_error: Option<String>,
}

/// Why a record cannot be read.
#[derive(Debug)]
pub(crate) enum TaskFileError {
    /// A newer pyro wrote it: it is left alone.
    Newer(Error),
    /// It is no record.
    Damaged(Error),
}

impl From<TaskFileError> for Error {
    fn from(error: TaskFileError) -> Self {
        match error {
            TaskFileError::Newer(error) | TaskFileError::Damaged(error) => error,
        }
    }
}

impl TaskFile {
    /// Reads the record of a task; none where there is none.
    pub(crate) fn read(directory: &TaskDirectory) -> Result<Option<Self>, TaskFileError> {
        #[derive(Deserialize)]
        struct Layout {
            layout_version: u32,
        }
        let path = directory.record();
        let damaged = |what: String| {
            let text = format!("'{}' is no record of a task: {what}", path.display());
            TaskFileError::Damaged(Error::new(ErrorKind::Damaged, text))
        };
        let bytes = match files::read_bounded(&path, MOST_BYTES) {
            Ok(Some(bytes)) => bytes,
            Ok(None) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
                return Err(damaged(error.to_string()));
            }
            // It may be readable another time: a full table of files is no damage.
            Err(error) => return Err(TaskFileError::Newer(Error::state(&path, &error))),
        };
        let layout: Layout = serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        if layout.layout_version > LAYOUT_VERSION {
            let text = format!(
                "'{}' has layout {}; this pyro knows {LAYOUT_VERSION}",
                path.display(),
                layout.layout_version
            );
            return Err(TaskFileError::Newer(
                Error::new(ErrorKind::Damaged, text).hint("use the newer pyro that wrote it"),
            ));
        }
        serde_json::from_slice(&bytes).map(Some).map_err(|error| damaged(error.to_string()))
    }

    /// Replaces the record, durably.
    pub(crate) fn write(&self, directory: &TaskDirectory) -> io::Result<()> {
        let bytes = serde_json::to_vec_pretty(self).map_err(io::Error::other)?;
        files::put(&directory.record(), &bytes)?;
        files::sync_directory(directory.path())
    }

    /// What the host owes it while it runs; nothing where its commands run on the host.
    pub(crate) fn promise(&self) -> Promise {
        let has_guest = !self.environment_digest.is_empty();
        if has_guest { Promise::of(self.mem_mib, self.disk_mib) } else { Promise::default() }
    }

    /// What is left of its life.
    pub(crate) fn life_left(&self) -> Duration {
        Duration::try_from_secs_f64(self.seconds_left()).unwrap_or(Duration::ZERO)
    }

    /// How long ago its life was over.
    pub(crate) fn overdue(&self) -> Duration {
        Duration::try_from_secs_f64(-self.seconds_left()).unwrap_or(Duration::ZERO)
    }

    /// By the clock of this boot, else by the wall's.
    fn seconds_left(&self) -> f64 {
        if self.has_rebooted() { self.expires_at - now() } else { self.expires_at_boottime - boottime() }
    }

    pub(crate) fn has_expired(&self) -> bool {
        self.life_left().is_zero()
    }

    /// Whether the host has booted since the task was made.
    pub(crate) fn has_rebooted(&self) -> bool {
        self.boot_id != boot_id()
    }

    /// Goes over to the clock of this boot of the host.
    pub(crate) fn note_reboot(&mut self) -> bool {
        let has_rebooted = self.has_rebooted();
        if has_rebooted {
            self.expires_at_boottime = boottime() + self.life_left().as_secs_f64();
            self.boot_id = boot_id().to_owned();
        }
        has_rebooted
    }

    /// Tells in the record that the supervisor is gone, where it says that the task runs.
    pub(crate) fn note_lost_supervisor(&mut self) -> bool {
        if self.state != VmState::Started {
            return false;
        }
        self.state = VmState::Stopped;
        self.last_error = Some(if self.has_rebooted() {
            "host_restarted: the host was restarted, and the guest with it".to_owned()
        } else {
            "supervisor_lost: the task's supervisor was killed, and its guest with it".to_owned()
        });
        true
    }
}

/// The kernel's name for this boot, which no process outlives; empty where it does not tell.
pub(crate) fn boot_id() -> &'static str {
    static BOOT_ID: OnceLock<String> = OnceLock::new();
    if let Some(known) = BOOT_ID.get() {
        return known;
    }
    match fs_err::read_to_string("/proc/sys/kernel/random/boot_id") {
        Ok(text) => BOOT_ID.get_or_init(|| text.trim().to_owned()),
        // The next one who asks may fare better.
        Err(_) => "",
    }
}

/// Seconds since the host's boot, suspends included.
pub(crate) fn boottime() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let nanos = u32::try_from(time.tv_nsec).unwrap_or_default();
    (Duration::from_secs(time.tv_sec.unsigned_abs()) + Duration::from_nanos(u64::from(nanos))).as_secs_f64()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn file(id: &str) -> TaskFile {
        TaskFile {
            layout_version: LAYOUT_VERSION,
            task_id: id.to_owned(),
            environment: "debian:12".to_owned(),
            environment_version: "1.0.0".to_owned(),
            environment_digest: "0".repeat(64),
            vcpu_count: 1,
            mem_mib: 1024,
            disk_mib: 8192,
            ttl_seconds: 600,
            allow_host_compat: false,
            created_at: now(),
            expires_at: now() + 600.0,
            boot_id: boot_id().to_owned(),
            expires_at_boottime: boottime() + 600.0,
            machine_id: "0".repeat(32),
            state: VmState::Started,
            execution_mode: "guest_serial".to_owned(),
            isolation: "qemu-tcg".to_owned(),
            start_mode: "cold".to_owned(),
            network: Policy::none(),
            secrets: BTreeMap::new(),
            ports: Vec::new(),
            require_isolation: None,
            kept: None,
            metadata: BTreeMap::new(),
            last_error: None,
        }
    }

    #[test]
    fn a_record_comes_back_and_a_newer_one_is_left_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let directory = TaskDirectory::new(dir.path().to_owned());
        assert!(TaskFile::read(&directory).expect("none").is_none());
        let file = file("0123456789ab");
        file.write(&directory).expect("written");
        assert_eq!(TaskFile::read(&directory).expect("read"), Some(file));
        fs_err::write(directory.record(), r#"{"layout_version": 2}"#).expect("written");
        assert!(matches!(TaskFile::read(&directory), Err(TaskFileError::Newer(_))));
        for damage in ["", "{", "[]", r#"{"layout_version": 1}"#, "\0\0\0\0"] {
            fs_err::write(directory.record(), damage).expect("written");
            assert!(matches!(TaskFile::read(&directory), Err(TaskFileError::Damaged(_))), "{damage:?}");
        }
        fs_err::write(directory.record(), vec![b' '; 300 << 10]).expect("written");
        assert!(matches!(TaskFile::read(&directory), Err(TaskFileError::Damaged(_))), "a giant");
    }

    #[test]
    fn the_clock_of_the_wall_counts_only_after_a_restart_of_the_host() {
        let mut file = file("0123456789ab");
        file.expires_at = 0.0;
        assert!(!file.has_expired(), "the wall's clock has jumped");
        file.boot_id = "another boot".to_owned();
        assert!(file.has_expired());
        file.expires_at = now() + 60.0;
        assert!(!file.has_expired());
    }
}
