//! The API of pyro: virtual machines, commands in them, their registry and their life.
//!
//! A front (CLI, MCP server, Python) opens an [`Engine`] with an [`EngineConfig`] and calls it in its own
//! process; there is no daemon. The engine prints nothing and reads neither `$HOME` nor the environment: a front that wants
//! these says so ([`EngineConfig::from_environment`]).
//!
//! ```no_run
//! # async fn example(config: pyro_engine::EngineConfig) -> Result<(), pyro_engine::Error> {
//! use pyro_engine::{Command, Engine, ExecSpec, VmSpec, Observer};
//!
//! let engine = Engine::open(config)?;
//! let command = Command::argv(["git", "--version"]);
//! let result = engine.run(VmSpec::new("debian:12"), ExecSpec::new(command), Observer::none()).await?;
//! assert_eq!(result.exit_code, 0);
//! # Ok(())
//! # }
//! ```

mod backend;
mod boot_clock;
mod budget;
mod capture;
#[cfg(test)]
mod conformance;
mod diagnosis;
mod ending;
mod engine;
mod environment;
mod error;
mod execute;
mod files;
mod guest;
mod guest_stream;
mod host;
mod live;
mod lock;
pub mod network;
mod observe;
mod owner;
mod place;
mod ports;
mod record;
mod registry;
mod room;
mod spare;
mod spec;
mod spill;
mod supervisor;
mod task;
mod template;
mod vm;

pub use diagnosis::{
    Capabilities, Diagnosis, EnvironmentCache, FirecrackerFacts, Issue, Kvm, Networking, State, VmmFacts,
};
pub use engine::{Engine, EngineConfig, Reaped};
pub use environment::absolute_path;
pub use error::{Error, ErrorKind};
pub use guest::{Chunk, Stream};
pub use observe::{Observer, Phase};
pub use ports::{PortChange, Published, TaskPorts, published};
pub use record::{Cleanup, Deleted, ExecResult, Fault, Timings, VmRecord, VmState};
pub use spec::{Command, ExecSpec, VmSpec};
pub use supervisor::supervise;
pub use task::{
    CancelledCommand, DeletedTask, Detached, EntryStatus, JournalEntry, LastCommand, LogEntry, LogQuery,
    OutputRange, TaskList, TaskLogs, TaskRecord,
};
pub use template::PreparedTemplate;

pub use pyro_process::{make_file_limits_errors, raise_file_limit};

pub use pyro_image::{Check, Entry, Inspection, Pruned, Pulled, TemplateEntry};
pub use pyro_vmm::Isolation;
pub use pyro_vmm::host::HostFacts;
pub use pyro_vmm::source::{Found as FirecrackerFound, VERSION as FIRECRACKER_VERSION};

/// The version of pyro and of its catalog of environments.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// The static guest agent that this engine carries.
static AGENT: &[u8] = include_bytes!(env!("PYRO_AGENT"));

/// Its SHA-256, as hexadecimal digits.
const AGENT_DIGEST: &str = env!("PYRO_AGENT_DIGEST");
