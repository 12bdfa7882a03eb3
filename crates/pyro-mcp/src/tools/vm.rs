//! Machines without a journal: one command in a fresh one, or step by step.

use pyro_engine::network::NetworkInfo;
use pyro_engine::{Deleted, ExecResult, Reaped, VmRecord};

use super::params::{Exec, Machine, VmId};
use super::{About, Effect, Entry, exec, tool};
use crate::call::Call;
use crate::failure::Failure;
use crate::progress;
use crate::server::{Profile, Server, blocking};

pub(super) fn one_shot() -> Vec<Entry> {
    vec![tool(
        About {
            name: "vm_run",
            title: "Run one command in a fresh microVM",
            description: "Runs one command in a new Linux microVM and removes every trace of the machine afterwards. \
                          Use it for a single self-contained command or script; for several steps that build on each \
                          other use task_create and task_exec, because nothing is kept here. Returns stdout, stderr, \
                          exit_code and, when something other than the command ended it, `fault` (such as timeout or \
                          out_of_memory). A non-zero exit_code is a normal result. The first call may take a minute \
                          while the environment is built; later ones start within a second.",
            profile: Profile::VmRun,
            effect: Effect::Acts,
        },
        vm_run,
    )]
}

pub(super) fn all() -> Vec<Entry> {
    let profile = Profile::Full;
    vec![
        tool(
            About {
                name: "vm_create",
                title: "Make a microVM, not started",
                description: "Makes a machine and returns its record with vm_id; it is not running yet. Most work \
                              needs task_create instead: a machine made here runs exactly one command (vm_exec) and \
                              ends with this server. Next: vm_start.",
                profile,
                effect: Effect::Acts,
            },
            vm_create,
        ),
        tool(
            About {
                name: "vm_start",
                title: "Start a microVM",
                description: "Starts a machine that is created or stopped, and returns its record. Next: vm_exec.",
                profile,
                effect: Effect::Acts,
            },
            vm_start,
        ),
        tool(
            About {
                name: "vm_exec",
                title: "Run the one command of a microVM",
                description: "Runs one command in a started machine, then deletes the machine, whatever came of the \
                              command. Returns what vm_run returns. To run several commands use task_exec.",
                profile,
                effect: Effect::Spends,
            },
            vm_exec,
        ),
        tool(
            About {
                name: "vm_stop",
                title: "Stop a microVM",
                description: "Powers a machine off and keeps its disk; vm_start boots it again. Returns its record.",
                profile,
                effect: Effect::Settles,
            },
            vm_stop,
        ),
        tool(
            About {
                name: "vm_delete",
                title: "Delete a microVM",
                description: "Ends a machine in any state and removes every trace of it.",
                profile,
                effect: Effect::Removes,
            },
            vm_delete,
        ),
        tool(
            About {
                name: "vm_status",
                title: "Show a microVM",
                description: "Returns a machine's record: its state, its isolation tier, when it expires.",
                profile,
                effect: Effect::Reads,
            },
            vm_status,
        ),
        tool(
            About {
                name: "vm_network_info",
                title: "Show the network of a microVM",
                description: "Returns the network of a machine, or why it has none.",
                profile,
                effect: Effect::Reads,
            },
            vm_network_info,
        ),
        tool(
            About {
                name: "vm_reap_expired",
                title: "Remove what dead owners have left",
                description: "Removes machines and tasks whose time was up or whose owner is dead, and returns their \
                              ids. That happens by itself too; call it when something should be gone and is not.",
                profile,
                effect: Effect::Removes,
            },
            vm_reap_expired,
        ),
    ]
}

async fn vm_run(server: Server, (machine, exec): (Machine, Exec), call: Call) -> Result<ExecResult, Failure> {
    let (exec, most) = exec.spec()?;
    let engine = server.engine().await?;
    let (observer, reporting) = progress::report(&call);
    let result = call.unless_given_up(engine.run(machine.spec(&server)?, exec, observer)).await;
    reporting.stop().await;
    Ok(exec::of_machine(result?, most))
}

async fn vm_create(server: Server, (machine,): (Machine,), call: Call) -> Result<VmRecord, Failure> {
    let engine = server.engine().await?;
    let (observer, reporting) = progress::report(&call);
    let record = call.unless_given_up(engine.create_vm(machine.spec(&server)?, observer)).await;
    reporting.stop().await;
    record
}

async fn vm_start(server: Server, (vm,): (VmId,), call: Call) -> Result<VmRecord, Failure> {
    let engine = server.engine().await?;
    call.unless_given_up(engine.start_vm(&vm.vm_id)).await
}

async fn vm_exec(server: Server, (vm, exec): (VmId, Exec), call: Call) -> Result<ExecResult, Failure> {
    let (exec, most) = exec.spec()?;
    let engine = server.engine().await?;
    let (observer, reporting) = progress::report(&call);
    let result = call.unless_given_up(engine.exec_vm(&vm.vm_id, exec, observer)).await;
    reporting.stop().await;
    Ok(exec::of_machine(result?, most))
}

async fn vm_stop(server: Server, (vm,): (VmId,), _call: Call) -> Result<VmRecord, Failure> {
    Ok(server.engine().await?.stop_vm(&vm.vm_id).await?)
}

async fn vm_delete(server: Server, (vm,): (VmId,), _call: Call) -> Result<Deleted, Failure> {
    Ok(server.engine().await?.delete_vm(&vm.vm_id).await?)
}

async fn vm_status(server: Server, (vm,): (VmId,), _call: Call) -> Result<VmRecord, Failure> {
    let engine = server.engine().await?;
    blocking(move || Ok(engine.status_vm(&vm.vm_id)?)).await
}

async fn vm_network_info(server: Server, (vm,): (VmId,), _call: Call) -> Result<NetworkInfo, Failure> {
    let engine = server.engine().await?;
    blocking(move || Ok(engine.network_info_vm(&vm.vm_id)?)).await
}

async fn vm_reap_expired(server: Server, (): (), _call: Call) -> Result<Reaped, Failure> {
    let engine = server.engine().await?;
    blocking(move || Ok(engine.reap_expired())).await
}
