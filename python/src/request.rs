//! What can be asked of an engine, as JSON, and how it is done.

use std::collections::BTreeMap;

use pyro_engine::network::{NetworkChange, NetworkRequest};
use pyro_engine::{
    Command, Engine, Error, ExecSpec, Isolation, LogQuery, Observer, PortChange, VERSION, VmSpec, published,
};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio_util::sync::CancellationToken;

/// One request: the names and arguments of the Python methods.
#[derive(Debug, Deserialize)]
#[serde(tag = "method", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Request {
    ListEnvironments,
    PullEnvironment {
        environment: String,
    },
    InspectEnvironment {
        environment: String,
    },
    PruneEnvironments,
    CreateVm {
        machine: Machine,
    },
    StartVm {
        vm_id: String,
    },
    StopVm {
        vm_id: String,
    },
    DeleteVm {
        vm_id: String,
    },
    StatusVm {
        vm_id: String,
    },
    NetworkInfoVm {
        vm_id: String,
    },
    ExecVm {
        vm_id: String,
        exec: Exec,
    },
    RunInVm {
        machine: Machine,
        exec: Exec,
    },
    ReapExpired,
    CreateTask {
        machine: Machine,
    },
    ExecTask {
        task_id: String,
        exec: Exec,
    },
    CancelTask {
        task_id: String,
        sequence: u64,
    },
    StatusTask {
        task_id: String,
    },
    LogsTask {
        task_id: String,
        since_sequence: u64,
        limit: Option<usize>,
        max_bytes: Option<u64>,
    },
    StartTask {
        task_id: String,
    },
    StopTask {
        task_id: String,
    },
    DeleteTask {
        task_id: String,
        #[serde(default)]
        force: bool,
    },
    TaskNetwork {
        task_id: String,
    },
    SetTaskNetwork {
        task_id: String,
        change: NetworkChange,
    },
    ChangeTaskPorts {
        task_id: String,
        change: PortChange,
    },
    NetworkLog {
        task_id: String,
        offset: u64,
    },
    ListTasks,
    Close,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Machine {
    environment: String,
    vcpu_count: i64,
    mem_mib: i64,
    disk_mib: i64,
    ttl_seconds: i64,
    network: NetworkRequest,
    publish: Vec<String>,
    allow_host_compat: bool,
    require_isolation: Option<String>,
    cold: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Exec {
    command: Words,
    timeout_seconds: f64,
    cwd: String,
    env: BTreeMap<String, String>,
    user: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "command must be a string, or a list of strings")]
enum Words {
    Shell(String),
    Argv(Vec<String>),
}

impl Machine {
    fn spec(self, engine: &Engine) -> Result<VmSpec, Refusal> {
        let named = |name: String| {
            Isolation::named(&name).ok_or_else(|| {
                let text = "require_isolation must be firecracker-kvm, qemu-kvm or qemu-tcg";
                Refusal::Invalid(format!("{text}, not '{name}'"))
            })
        };
        let spec = VmSpec {
            network: self.network.policy(engine.policies_dir())?,
            secrets: self.network.hold_secrets()?,
            publish: published(&self.publish)?,
            allow_host_compat: self.allow_host_compat,
            require_isolation: self.require_isolation.map(named).transpose()?,
            cold: self.cold,
            ..VmSpec::new(self.environment)
        };
        Ok(spec.sized(self.vcpu_count, self.mem_mib, self.disk_mib, self.ttl_seconds))
    }
}

impl Exec {
    fn spec(self, stdin: Option<Vec<u8>>) -> ExecSpec {
        let command = match self.command {
            Words::Shell(text) => Command::Shell(text),
            Words::Argv(words) => Command::argv(words),
        };
        let mut spec = ExecSpec::new(command);
        spec.timeout_seconds = self.timeout_seconds;
        spec.cwd = self.cwd;
        spec.env = self.env.into_iter().collect();
        spec.user = self.user;
        spec.stdin = stdin.map(|bytes| -> Box<dyn tokio::io::AsyncRead + Send + Unpin> {
            Box::new(std::io::Cursor::new(bytes))
        });
        spec
    }
}

/// Why a request was not carried out.
#[derive(Debug)]
pub(crate) enum Refusal {
    Engine(Error),
    Invalid(String),
    Host(String),
    /// Its caller gave it up.
    GivenUp,
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Engine(error)
    }
}

/// The result of a request.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) json: String,
    pub(crate) made: Option<Made>,
}

/// What a request has made that lives on after it: gone again where nobody came to know of it.
#[derive(Debug)]
pub(crate) enum Made {
    Vm(String),
    Task(String),
}

impl Made {
    pub(crate) async fn undo(self, engine: &Engine) {
        // Whatever keeps this from being deleted ends it at its time to live.
        match self {
            Self::Vm(id) => drop(engine.delete_vm(&id).await),
            Self::Task(id) => drop(engine.delete_task(&id).await),
        }
    }
}

/// Carries a request out. When `given_up` is cancelled the work is dropped, which ends what it has
/// made; a command in a task is cancelled.
pub(crate) async fn perform(
    engine: Engine,
    request: Request,
    stdin: Option<Vec<u8>>,
    observer: Observer,
    given_up: CancellationToken,
) -> Result<Answer, Refusal> {
    if let Request::ExecTask { task_id, exec } = request {
        let exec = exec.spec(stdin);
        let result = engine.exec_task_unless(&task_id, exec, observer, given_up.cancelled()).await?;
        return Ok(Answer { json: told(&result)?, made: None });
    }
    let mut made = None;
    let json = tokio::select! {
        result = done(engine, request, stdin, observer, &mut made) => result,
        () = given_up.cancelled() => Err(Refusal::GivenUp),
    }?;
    Ok(Answer { json, made })
}

async fn done(
    engine: Engine,
    request: Request,
    stdin: Option<Vec<u8>>,
    observer: Observer,
    made: &mut Option<Made>,
) -> Result<String, Refusal> {
    match request {
        Request::ListEnvironments => {
            blocking(move || Ok(engine.environments().list().map_err(Error::from)?)).await
        }
        Request::PullEnvironment { environment } => told(&engine.pull(&environment, &observer).await?),
        Request::InspectEnvironment { environment } => {
            blocking(move || Ok(engine.environments().inspect(&environment).map_err(Error::from)?)).await
        }
        Request::PruneEnvironments => blocking(move || Ok(engine.prune()?)).await,
        Request::CreateVm { machine } => {
            let vm = engine.create_vm(machine.spec(&engine)?, observer).await?;
            *made = Some(Made::Vm(vm.vm_id.clone()));
            told(&vm)
        }
        Request::StartVm { vm_id } => told(&engine.start_vm(&vm_id).await?),
        Request::StopVm { vm_id } => told(&engine.stop_vm(&vm_id).await?),
        Request::DeleteVm { vm_id } => told(&engine.delete_vm(&vm_id).await?),
        Request::StatusVm { vm_id } => blocking(move || Ok(engine.status_vm(&vm_id)?)).await,
        Request::NetworkInfoVm { vm_id } => blocking(move || Ok(engine.network_info_vm(&vm_id)?)).await,
        Request::ExecVm { vm_id, exec } => told(&engine.exec_vm(&vm_id, exec.spec(stdin), observer).await?),
        Request::RunInVm { machine, exec } => {
            let machine = machine.spec(&engine)?;
            told(&engine.run(machine, exec.spec(stdin), observer).await?)
        }
        Request::ReapExpired => blocking(move || Ok(engine.reap_expired())).await,
        Request::CreateTask { machine } => {
            let task = engine.create_task(machine.spec(&engine)?, observer).await?;
            *made = Some(Made::Task(task.task_id.clone()));
            told(&task)
        }
        Request::ExecTask { task_id, exec } => {
            told(&engine.exec_task(&task_id, exec.spec(stdin), observer).await?)
        }
        Request::CancelTask { task_id, sequence } => told(&engine.cancel_task(&task_id, sequence).await?),
        Request::StatusTask { task_id } => told(&engine.status_task(&task_id).await?),
        Request::LogsTask { task_id, since_sequence, limit, max_bytes } => {
            told(&engine.logs_task(&task_id, LogQuery { since_sequence, limit, max_bytes }).await?)
        }
        Request::StartTask { task_id } => told(&engine.start_task(&task_id).await?),
        Request::StopTask { task_id } => told(&engine.stop_task(&task_id).await?),
        Request::DeleteTask { task_id, force: false } => told(&engine.delete_task(&task_id).await?),
        Request::DeleteTask { task_id, force: true } => told(&engine.delete_task_by_force(&task_id).await?),
        Request::TaskNetwork { task_id } => told(&engine.task_network(&task_id).await?),
        Request::SetTaskNetwork { task_id, change } => {
            told(&engine.set_task_network(&task_id, &change).await?)
        }
        Request::ChangeTaskPorts { task_id, change } => {
            told(&engine.change_task_ports(&task_id, &change).await?)
        }
        Request::NetworkLog { task_id, offset } => told(&engine.network_log(&task_id, offset).await?),
        Request::ListTasks => told(&engine.list_tasks().await?),
        Request::Close => {
            engine.end_vms().await;
            told(&json!({ "version": VERSION }))
        }
    }
}

async fn blocking<T: Serialize + Send + 'static>(
    work: impl FnOnce() -> Result<T, Refusal> + Send + 'static,
) -> Result<String, Refusal> {
    let done = tokio::task::spawn_blocking(work).await;
    told(&done.map_err(|error| Refusal::Host(format!("a thread: {error}")))??)
}

fn told(value: &impl Serialize) -> Result<String, Refusal> {
    serde_json::to_string(value).map_err(|error| Refusal::Host(format!("the result: {error}")))
}
