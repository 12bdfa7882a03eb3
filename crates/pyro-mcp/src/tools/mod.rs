//! The tools: each a typed request, a function of the engine, a typed result.

mod environment;
mod exec;
mod params;
mod task;
mod vm;

use std::sync::Arc;

use rmcp::model::{JsonObject, Tool, ToolAnnotations};
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;

use self::params::Params;
use crate::call::Call;
use crate::failure::Failure;
use crate::server::{Profile, Server};

type Outcome = std::pin::Pin<Box<dyn Future<Output = Result<Value, Failure>> + Send>>;

/// A tool and what it does.
pub(crate) struct Entry {
    pub(crate) tool: Tool,
    /// The smallest profile that has it.
    pub(crate) profile: Profile,
    pub(crate) run: Box<dyn Fn(Server, JsonObject, Call) -> Outcome + Send + Sync>,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("Entry").field(&self.tool.name).finish()
    }
}

/// What a tool may do to the world, as annotations tell it.
#[derive(Clone, Copy)]
enum Effect {
    /// It only looks.
    Reads,
    /// It makes something, or runs what the caller wrote, inside a guest.
    Acts,
    /// As `Acts`, but a second call changes nothing more.
    Settles,
    /// It runs what the caller wrote, and removes something for good.
    Spends,
    /// It removes something for good; a second call changes nothing more.
    Removes,
}

impl Effect {
    fn annotations(self, title: &str) -> ToolAnnotations {
        let (reads, destroys, idempotent) = match self {
            Self::Reads => (true, false, true),
            Self::Acts => (false, false, false),
            Self::Settles => (false, false, true),
            Self::Spends => (false, true, false),
            Self::Removes => (false, true, true),
        };
        ToolAnnotations::with_title(title)
            .read_only(reads)
            .destructive(destroys)
            .idempotent(idempotent)
            .open_world(false)
    }
}

/// How a tool is presented.
struct About {
    name: &'static str,
    title: &'static str,
    description: &'static str,
    profile: Profile,
    effect: Effect,
}

/// All tools, in the order in which they are listed.
pub(crate) fn all() -> Vec<Entry> {
    let mut tools = vm::one_shot();
    tools.extend(task::all());
    tools.extend(environment::all());
    tools.extend(vm::all());
    tools
}

/// A tool from a function of the server.
fn tool<P, R, F, Work>(about: About, run: F) -> Entry
where
    P: Params + 'static,
    R: Serialize + JsonSchema + 'static,
    F: Fn(Server, P, Call) -> Work + Send + Sync + 'static,
    Work: Future<Output = Result<R, Failure>> + Send + 'static,
{
    let input = Arc::new(P::schema());
    let tool = Tool::new(about.name, about.description, Arc::clone(&input))
        .with_title(about.title)
        .with_raw_output_schema(Arc::new(params::schema_of::<R>()))
        .with_annotations(about.effect.annotations(about.title));
    let run = move |server: Server, arguments: JsonObject, call: Call| -> Outcome {
        let params = params::take::<P>(&input, &arguments);
        match params {
            Ok(params) => {
                let work = run(server, params, call);
                Box::pin(async move {
                    let failed = |error: serde_json::Error| {
                        Failure::new("host_failed", format!("the result: {error}"))
                    };
                    serde_json::to_value(work.await?).map_err(failed)
                })
            }
            Err(failure) => Box::pin(async move { Err(failure) }),
        }
    };
    Entry { tool, profile: about.profile, run: Box::new(run) }
}
