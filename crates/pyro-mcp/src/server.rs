//! The server: what it offers to each client, whichever way that is connected.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pyro_engine::network::{HeldSecret, NetworkPolicy, Policy};
use pyro_engine::{Engine, EngineConfig, VERSION};
use rmcp::model::{
    CallToolRequestParams, CallToolResponse, CallToolResult, CancelledNotificationParam, ContentBlock,
    GetPromptRequestParams, GetPromptResponse, Implementation, ListPromptsResult,
    ListResourceTemplatesResult, ListResourcesResult, ListToolsResult, PaginatedRequestParams,
    ReadResourceRequestParams, ReadResourceResponse, ServerCapabilities, ServerConfig, Tool,
};
use rmcp::service::{NotificationContext, RequestContext, serve_server_with_ct};
use rmcp::{ErrorData, RoleServer, ServerHandler};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::call::{Call, Cancelled};
use crate::failure::Failure;
use crate::tools::{self, Entry};
use crate::{prompts, resources};

/// How long calls that are being ended may take to clean up.
const WIND_UP: Duration = Duration::from_secs(5);

const INSTRUCTIONS: &str = "\
pyro gives you a computer of your own: a Linux microVM that cannot touch the host. Use vm_run for one command that \
needs nothing kept; commands start in /workspace. A non-zero exit_code is a normal result; `fault` says when something \
other than the command ended it.";
const TASK_INSTRUCTIONS: &str = "\
For anything with more than one step, call task_create once, task_exec as often as you like \
(files, packages and background processes stay), and task_delete when you are done. \
Every command of a task is on record: task_logs reads it again, also after you have lost the connection. Output is \
cut in the middle when it is long; the mark says how to read the rest.";

/// Which tools a server offers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Profile {
    /// `vm_run` alone.
    VmRun,
    /// `vm_run` and the tools of tasks: what a chat host needs.
    TaskCore,
    /// All of them.
    #[default]
    Full,
}

impl Profile {
    /// The name on the command line.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::VmRun => "vm-run",
            Self::TaskCore => "task-core",
            Self::Full => "full",
        }
    }
}

/// A server for any number of clients. Cheap to clone: the machines that were made through one clone are those of all.
#[derive(Clone, Debug)]
pub struct Server {
    shared: Arc<Shared>,
    /// What the client of this clone has cancelled.
    cancelled: Arc<Cancelled>,
}

#[derive(Debug)]
struct Shared {
    config: EngineConfig,
    /// Opened at the first call: a server that cannot work says so in the result of a call, where an agent reads it.
    engine: Mutex<Option<Engine>>,
    profile: Profile,
    /// What a machine may reach whose caller asks for a network.
    network: Policy,
    /// What such a machine uses and does not see.
    secrets: Vec<HeldSecret>,
    tools: Vec<Entry>,
    calls: TaskTracker,
    /// Cancelled when the server is on its way out: calls end then, and what they have made.
    ending: CancellationToken,
}

impl Server {
    /// A server on an engine of this configuration. `network` is what machines may reach whose caller asks for a network;
    /// [`Policy::none`] offers none.
    pub fn new(config: EngineConfig, profile: Profile, network: Policy, secrets: Vec<HeldSecret>) -> Self {
        let shared = Shared {
            config,
            engine: Mutex::default(),
            profile,
            network,
            secrets,
            tools: tools::all().into_iter().filter(|entry| entry.profile <= profile).collect(),
            calls: TaskTracker::new(),
            ending: CancellationToken::new(),
        };
        Self { shared: Arc::new(shared), cancelled: Arc::default() }
    }

    /// Serves one client on a pair of streams until it closes its end or `stop` is cancelled.
    ///
    /// # Errors
    /// When what comes first is no request to initialize.
    pub async fn serve(
        &self,
        reader: impl AsyncRead + Send + Unpin + 'static,
        writer: impl AsyncWrite + Send + Unpin + 'static,
        stop: CancellationToken,
    ) -> Result<(), ServeError> {
        use rmcp::service::ServerInitializeError;
        let _watch = self.end_with(&stop);
        match serve_server_with_ct(self.for_one_client(), (reader, writer), stop).await {
            Ok(running) => running.waiting().await.map(drop).map_err(|error| ServeError(error.to_string())),
            Err(ServerInitializeError::ConnectionClosed(_) | ServerInitializeError::Cancelled) => Ok(()),
            Err(error) => Err(ServeError(error.to_string())),
        }
    }

    /// Ends the calls that are at work, and all machines that were made through this server. Tasks live on.
    pub async fn close(&self) {
        self.shared.ending.cancel();
        self.shared.calls.close();
        drop(tokio::time::timeout(WIND_UP, self.shared.calls.wait()).await);
        let engine = self.shared.engine.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(engine) = engine {
            engine.end_vms().await;
        }
    }

    /// The same server, for another client.
    pub(crate) fn for_one_client(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), cancelled: Arc::default() }
    }

    /// The longest that a machine, and so a command, may live.
    pub(crate) fn longest_life(&self) -> Duration {
        Duration::from_secs(self.shared.config.max_ttl_seconds.into())
    }

    /// Whether clients may know of tasks.
    pub(crate) fn has_tasks(&self) -> bool {
        self.shared.profile >= Profile::TaskCore
    }

    /// Has calls end when `stop` is cancelled, as long as what this returns is held.
    pub(crate) fn end_with(&self, stop: &CancellationToken) -> AbortOnDrop {
        let (stop, ending) = (stop.clone(), self.shared.ending.clone());
        AbortOnDrop(tokio::spawn(async move {
            stop.cancelled().await;
            ending.cancel();
        }))
    }

    /// The engine; whatever keeps it from being opened may be mended before the next call.
    pub(crate) async fn engine(&self) -> Result<Engine, Failure> {
        let shared = Arc::clone(&self.shared);
        blocking(move || {
            let mut engine = shared.engine.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(engine) = &*engine {
                return Ok(engine.clone());
            }
            Ok(engine.insert(Engine::open(shared.config.clone())?).clone())
        })
        .await
    }

    /// The network of a machine whose caller asks for one, or for none, and its secrets.
    pub(crate) fn network(&self, wanted: bool) -> Result<(Policy, Vec<HeldSecret>), Failure> {
        if !wanted {
            return Ok((Policy::none(), Vec::new()));
        }
        if !self.shared.network.has_nic() {
            let text = "network=true is not available: this server offers no network";
            return Err(Failure::new("invalid_value", text).hint(
                "work without a network, or ask the user to start the server with --network or --allow HOST",
            ));
        }
        Ok((self.shared.network.clone(), self.shared.secrets.clone()))
    }

    /// Describes the offered network to agents.
    fn network_words(&self) -> String {
        if !self.shared.network.has_nic() {
            return "Machines have no network.".to_owned();
        }
        let offered = NetworkPolicy::from(&self.shared.network);
        let mut words = format!(
            "With network=true a machine may reach {}",
            match offered.mode.as_str() {
                "open" => "the public internet".to_owned(),
                _ if offered.allow.is_empty() => "nothing".to_owned(),
                _ => offered.allow.join(", "),
            }
        );
        if !offered.deny.is_empty() {
            words.push_str(&format!(", but not {}", offered.deny.join(", ")));
        }
        words.push_str("; anything else is refused, and a result's notes say so.");
        for HeldSecret { name, secret, .. } in &self.shared.secrets {
            let hosts: Vec<String> = secret.hosts.iter().map(ToString::to_string).collect();
            words.push_str(&format!(
                " ${name} holds a placeholder: send it in a header over https to {}, and the host puts the secret in its place.",
                hosts.join(", ")
            ));
        }
        words
    }

    fn find(&self, name: &str) -> Option<&Entry> {
        self.shared.tools.iter().find(|entry| entry.tool.name == name)
    }

    async fn call(
        &self,
        request: CallToolRequestParams,
        context: RequestContext<RoleServer>,
    ) -> CallToolResult {
        let began = Instant::now();
        let name = request.name;
        let done = match self.find(&name) {
            Some(entry) => {
                let arguments = request.arguments.unwrap_or_default();
                (entry.run)(
                    self.clone(),
                    arguments,
                    Call::new(context, Arc::clone(&self.cancelled), self.shared.ending.clone()),
                )
                .await
            }
            None => Err(self.unknown(&name)),
        };
        let took = began.elapsed().as_secs_f64() * 1e3;
        match done {
            Ok(value) => {
                tracing::info!(tool = &*name, ms = took, "done");
                CallToolResult::structured(value)
            }
            Err(failure) => {
                tracing::info!(tool = &*name, ms = took, code = failure.code, "failed: {}", failure.error);
                // As text alone: clients hold what is structured against the schema of the tool's result, also in an
                // error.
                CallToolResult::error(vec![ContentBlock::text(serde_json::json!(failure).to_string())])
            }
        }
    }

    fn unknown(&self, name: &str) -> Failure {
        let names: Vec<&str> = self.shared.tools.iter().map(|entry| &*entry.tool.name).collect();
        let shown: String = name.chars().filter(|c| !c.is_control()).take(64).collect();
        let expected = names.join(", ");
        let failure =
            Failure::new("unknown_tool", format!("unknown tool '{shown}'; expected one of: {expected}"));
        if self.shared.profile == Profile::Full {
            return failure;
        }
        failure.hint(format!("the server offers its profile '{}'", self.shared.profile.as_str()))
    }
}

impl ServerHandler for Server {
    fn get_info(&self) -> ServerConfig {
        let capabilities =
            ServerCapabilities::builder().enable_tools().enable_resources().enable_prompts().build();
        ServerConfig::new(capabilities)
            .with_server_info(Implementation::new("pyro_mcp", VERSION).with_title("pyro"))
            .with_instructions({
                let tasks = if self.has_tasks() { format!(" {TASK_INSTRUCTIONS}") } else { String::new() };
                format!("{INSTRUCTIONS}{tasks} {}", self.network_words())
            })
    }

    async fn on_cancelled(
        &self,
        notification: CancelledNotificationParam,
        _context: NotificationContext<RoleServer>,
    ) {
        if let Some(call) = notification.request_id {
            self.cancelled.tell(call);
        }
    }

    async fn list_tools(
        &self,
        _request: Option<PaginatedRequestParams>,
        _context: RequestContext<RoleServer>,
    ) -> Result<ListToolsResult, ErrorData> {
        let tools = self.shared.tools.iter().map(|entry| entry.tool.clone()).collect();
        Ok(ListToolsResult::with_all_items(tools))
    }

    fn get_tool(&self, name: &str) -> Option<Tool> {
        self.find(name).map(|entry| entry.tool.clone())
    }

    async fn call_tool(
        &self,
        request: CallToolRequestParams,
        context: RequestContext<RoleServer>,
    ) -> Result<CallToolResponse, ErrorData> {
        Ok(self.shared.calls.track_future(self.call(request, context)).await.into())
    }

    async fn list_resources(
        &self,
        _request: Option<PaginatedRequestParams>,
        _context: RequestContext<RoleServer>,
    ) -> Result<ListResourcesResult, ErrorData> {
        resources::list(self).await.map(ListResourcesResult::with_all_items)
    }

    async fn list_resource_templates(
        &self,
        _request: Option<PaginatedRequestParams>,
        _context: RequestContext<RoleServer>,
    ) -> Result<ListResourceTemplatesResult, ErrorData> {
        Ok(ListResourceTemplatesResult::with_all_items(resources::templates(self.has_tasks())))
    }

    async fn read_resource(
        &self,
        request: ReadResourceRequestParams,
        _context: RequestContext<RoleServer>,
    ) -> Result<ReadResourceResponse, ErrorData> {
        resources::read(self, &request.uri).await.map(Into::into)
    }

    async fn list_prompts(
        &self,
        _request: Option<PaginatedRequestParams>,
        _context: RequestContext<RoleServer>,
    ) -> Result<ListPromptsResult, ErrorData> {
        Ok(ListPromptsResult::with_all_items(if self.has_tasks() { prompts::all() } else { Vec::new() }))
    }

    async fn get_prompt(
        &self,
        request: GetPromptRequestParams,
        _context: RequestContext<RoleServer>,
    ) -> Result<GetPromptResponse, ErrorData> {
        prompts::get(&request).map(Into::into)
    }
}

/// A task of no use to anybody but its owner.
pub(crate) struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A client that cannot be served.
#[derive(Debug, thiserror::Error)]
#[error("the MCP connection: {0}")]
pub struct ServeError(String);

/// Runs what may wait for a disk on a thread of its own.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let failed = |error: tokio::task::JoinError| Failure::new("host_failed", format!("a thread: {error}"));
    tokio::task::spawn_blocking(work).await.map_err(failed)?
}
