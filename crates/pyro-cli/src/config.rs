//! The engine's configuration for a command: what the environment says, and what the command line says instead.

use pyro_engine::EngineConfig;

use crate::cli::MachineArgs;
use crate::failure::Failure;

/// The configuration of a command that makes a machine.
pub(crate) fn engine_for(machine: &MachineArgs) -> Result<EngineConfig, Failure> {
    let config = engine(machine.backend.clone())?;
    Ok(EngineConfig { unconfined_vmm: config.unconfined_vmm || machine.unconfined_vmm, ..config })
}

/// The configuration, with another VMM where one is named.
pub(crate) fn engine(backend: Option<String>) -> Result<EngineConfig, Failure> {
    let config = EngineConfig::from_environment(std::env::current_exe().ok())?;
    Ok(EngineConfig { backend: backend.or_else(|| config.backend.clone()), ..config })
}
