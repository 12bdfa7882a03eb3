//! Arguments of tools: parts that several tools share, their schemas, and how bad values are told.

use std::collections::BTreeMap;

use pyro_engine::{Command, ExecSpec, Isolation, VmSpec};
use rmcp::model::JsonObject;
use schemars::generate::SchemaSettings;
use schemars::transform::RecursiveTransform;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::failure::Failure;
use crate::server::Server;
use crate::text;

/// A set of parts that together are a tool's arguments.
pub(super) trait Params: Sized + Send {
    /// The schema of all of them.
    fn schema() -> JsonObject;
    /// The parts, from arguments that hold nothing else.
    fn take(arguments: &JsonObject) -> Result<Self, Failure>;
}

impl Params for () {
    fn schema() -> JsonObject {
        closed(JsonObject::new(), Vec::new())
    }

    fn take(_arguments: &JsonObject) -> Result<Self, Failure> {
        Ok(())
    }
}

impl<A: Part> Params for (A,) {
    fn schema() -> JsonObject {
        merged(&[schema_of::<A>()])
    }

    fn take(arguments: &JsonObject) -> Result<Self, Failure> {
        Ok((part(arguments)?,))
    }
}

impl<A: Part, B: Part> Params for (A, B) {
    fn schema() -> JsonObject {
        merged(&[schema_of::<A>(), schema_of::<B>()])
    }

    fn take(arguments: &JsonObject) -> Result<Self, Failure> {
        Ok((part(arguments)?, part(arguments)?))
    }
}

/// One part of arguments.
pub(super) trait Part: DeserializeOwned + JsonSchema + Send {}

/// The machine of `vm_run`, `vm_create` and `task_create`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct Machine {
    /// Name of the environment: debian:12 (git, the default for agents), debian:12-base (minimal) or debian:12-build
    /// (gcc, make, cmake, python3)
    environment: String,
    /// Virtual processors
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 8))]
    vcpu_count: i64,
    /// Memory in MiB
    #[serde(default = "mem_mib")]
    #[schemars(range(min = 256, max = 32768))]
    mem_mib: i64,
    /// Life of the machine in seconds; it ends then, whatever runs in it
    #[serde(default = "ttl_seconds")]
    #[schemars(range(min = 60))]
    ttl_seconds: i64,
    /// Give the guest the network that this server offers, if it offers one
    #[serde(default)]
    network: bool,
    /// Where no guest can be had, run commands on the user's own machine, without isolation; only when the user asked
    /// for that
    #[serde(default)]
    allow_host_compat: bool,
    /// Refuse anything that isolates less than this tier
    #[serde(default)]
    require_isolation: Option<Tier>,
}

impl Part for Machine {}

/// Isolation tiers, strongest first.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
enum Tier {
    #[serde(rename = "firecracker-kvm")]
    FirecrackerKvm,
    #[serde(rename = "qemu-kvm")]
    QemuKvm,
    #[serde(rename = "qemu-tcg")]
    QemuTcg,
}

impl Machine {
    /// As the engine wants it.
    pub(super) fn spec(self, server: &Server) -> Result<VmSpec, Failure> {
        let (network, secrets) = server.network(self.network)?;
        let spec = VmSpec {
            network,
            secrets,
            allow_host_compat: self.allow_host_compat,
            require_isolation: self.require_isolation.map(|tier| match tier {
                Tier::FirecrackerKvm => Isolation::FirecrackerKvm,
                Tier::QemuKvm => Isolation::QemuKvm,
                Tier::QemuTcg => Isolation::QemuTcg,
            }),
            ..VmSpec::new(self.environment)
        };
        let disk_mib = spec.disk_mib.into();
        Ok(spec.sized(self.vcpu_count, self.mem_mib, disk_mib, self.ttl_seconds))
    }
}

/// The command of `vm_run`, `vm_exec` and `task_exec`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct Exec {
    /// A string for the guest's /bin/sh -lc, or a list of words that is run as it is
    command: CommandWords,
    /// Seconds until the command and all that it has started are ended
    #[serde(default = "timeout_seconds")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    timeout_seconds: f64,
    /// What the command reads on its stdin; `cat > FILE` with this writes a file
    #[serde(default)]
    stdin: Option<String>,
    /// Where it starts, absolute
    #[serde(default = "workspace")]
    cwd: String,
    /// Variables of the command, by name
    #[serde(default)]
    env: BTreeMap<String, String>,
    /// Who runs it, by name or number; root unless given
    #[serde(default)]
    user: Option<String>,
    /// How much of stdout, and of stderr, is returned at the most; of more, the head and the tail
    #[serde(default = "stream_bytes")]
    #[schemars(range(min = 1024, max = 262_144))]
    max_output_bytes: i64,
}

impl Part for Exec {}

#[derive(Debug, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "expected a string, or a list of strings")]
enum CommandWords {
    Shell(String),
    Argv(Vec<String>),
}

impl Exec {
    /// As the engine wants it, and how many bytes of each stream are wanted.
    pub(super) fn spec(self) -> Result<(ExecSpec, usize), Failure> {
        let most = output_bytes("max_output_bytes", self.max_output_bytes)?;
        let command = match self.command {
            CommandWords::Shell(text) => Command::Shell(text),
            CommandWords::Argv(words) => Command::argv(words),
        };
        let mut spec = ExecSpec::new(command);
        spec.timeout_seconds = self.timeout_seconds;
        spec.cwd = self.cwd;
        spec.env = self.env.into_iter().collect();
        spec.user = self.user;
        spec.stdin = self.stdin.map(|text| -> Box<dyn tokio::io::AsyncRead + Send + Unpin> {
            Box::new(std::io::Cursor::new(text.into_bytes()))
        });
        Ok((spec, most))
    }
}

/// A number of bytes of output, within the limits.
pub(super) fn output_bytes(name: &str, bytes: i64) -> Result<usize, Failure> {
    let (least, most) = (text::LEAST_STREAM_BYTES, text::MOST_STREAM_BYTES);
    let within = usize::try_from(bytes).ok().filter(|bytes| (least..=most).contains(bytes));
    within.ok_or_else(|| invalid(format!("{name} must be between {least} and {most}, not {bytes}")))
}

/// A machine's id.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct VmId {
    /// As vm_create returned it
    pub(super) vm_id: String,
}

impl Part for VmId {}

/// A task's id.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct TaskId {
    /// As task_create or task_list returned it
    pub(super) task_id: String,
}

impl Part for TaskId {}

pub(super) fn one() -> i64 {
    1
}

fn mem_mib() -> i64 {
    1024
}

fn ttl_seconds() -> i64 {
    600
}

fn timeout_seconds() -> f64 {
    30.0
}

fn workspace() -> String {
    "/workspace".to_owned()
}

pub(super) fn stream_bytes() -> i64 {
    text::STREAM_BYTES as i64
}

/// The schema of a type, without references, as the simplest of hosts reads it.
pub(super) fn schema_of<T: JsonSchema>() -> JsonObject {
    let settings = SchemaSettings::draft2020_12()
        .with(|settings| settings.inline_subschemas = true)
        .with_transform(RecursiveTransform(|schema: &mut Schema| {
            // Names of Rust's number types, which validators do not know and warn of.
            schema.remove("format");
            if let Some(Value::String(words)) = schema.get_mut("description") {
                *words = words.split_whitespace().collect::<Vec<_>>().join(" ");
            }
        }));
    let mut schema = SchemaGenerator::new(settings).into_root_schema_for::<T>();
    // A name of a Rust type says nothing to a reader.
    schema.remove("title");
    match schema.to_value() {
        Value::Object(object) => object,
        _ => JsonObject::new(),
    }
}

/// The arguments of a call, or what is wrong with them.
pub(super) fn take<P: Params>(schema: &JsonObject, arguments: &JsonObject) -> Result<P, Failure> {
    let names: Vec<&String> = schema
        .get("properties")
        .and_then(Value::as_object)
        .map(|known| known.keys().collect())
        .unwrap_or_default();
    if let Some(unknown) = arguments.keys().find(|name| !names.contains(name)) {
        let shown: String = unknown.chars().filter(|c| !c.is_control()).take(64).collect();
        let names: Vec<&str> = names.iter().map(|name| name.as_str()).collect();
        let expected = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
        return Err(invalid(format!("unknown argument '{shown}'; expected: {expected}")));
    }
    P::take(arguments)
}

fn part<T: Part>(arguments: &JsonObject) -> Result<T, Failure> {
    serde_path_to_error::deserialize(Value::Object(arguments.clone())).map_err(|error| {
        let path = error.path().to_string();
        let at = if path == "." { String::new() } else { format!("argument {path}: ") };
        let mut words = format!("{at}{}", error.inner());
        // What is wrong may be the whole of a long text.
        text::shorten(&mut words);
        invalid(words)
    })
}

fn invalid(error: String) -> Failure {
    Failure::new("invalid_value", error).hint("correct the argument and call again")
}

fn merged(parts: &[JsonObject]) -> JsonObject {
    let mut properties = JsonObject::new();
    let mut required = Vec::new();
    for part in parts {
        properties.extend(part.get("properties").and_then(Value::as_object).cloned().unwrap_or_default());
        required.extend(part.get("required").and_then(Value::as_array).cloned().unwrap_or_default());
    }
    closed(properties, required)
}

fn closed(properties: JsonObject, required: Vec<Value>) -> JsonObject {
    let mut schema = JsonObject::new();
    schema.insert("type".to_owned(), "object".into());
    schema.insert("properties".to_owned(), Value::Object(properties));
    if !required.is_empty() {
        schema.insert("required".to_owned(), Value::Array(required));
    }
    schema.insert("additionalProperties".to_owned(), false.into());
    schema
}
