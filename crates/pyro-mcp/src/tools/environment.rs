//! Environments: what a machine can be made from.

use pyro_engine::{Entry as Environment, VERSION};
use schemars::JsonSchema;
use serde::Serialize;

use super::{About, Effect, Entry, tool};
use crate::call::Call;
use crate::failure::Failure;
use crate::server::{Profile, Server, blocking};

/// All environments of the catalog.
#[derive(Debug, Serialize, JsonSchema)]
struct Environments {
    /// The version of the catalog
    catalog_version: String,
    /// Each with whether it is installed; one that is not is built on its first use
    environments: Vec<Environment>,
}

pub(super) fn all() -> Vec<Entry> {
    vec![tool(
        About {
            name: "vm_list_environments",
            title: "List environments",
            description: "Lists the environments that machines and tasks can be made from: name, what is in each, \
                          and whether it is installed already (one that is not is built on its first use, which \
                          takes a minute).",
            profile: Profile::Full,
            effect: Effect::Reads,
        },
        list,
    )]
}

async fn list(server: Server, (): (), _call: Call) -> Result<Environments, Failure> {
    let engine = server.engine().await?;
    blocking(move || {
        let environments = engine.environments().list().map_err(pyro_engine::Error::from)?;
        Ok(Environments { catalog_version: VERSION.to_owned(), environments })
    })
    .await
}
