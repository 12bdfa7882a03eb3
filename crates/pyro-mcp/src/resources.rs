//! Resources: what can be read by address, without a call of a tool.

use pyro_engine::{ErrorKind, LogEntry, VERSION};
use rmcp::ErrorData;
use rmcp::model::{ReadResourceResult, Resource, ResourceContents, ResourceTemplate};

use crate::failure::Failure;
use crate::server::{Server, blocking};
use crate::text;

/// Commands of a task that are listed, newest first.
const LISTED_COMMANDS: u64 = 10;
/// Tasks whose commands are listed, newest activity first.
const LISTED_TASKS: usize = 20;

pub(crate) fn templates(with_tasks: bool) -> Vec<ResourceTemplate> {
    let mut templates = vec![
        ResourceTemplate::new("task://{task_id}/logs/{sequence}", "task log")
            .with_title("One command of a task")
            .with_description("A command of a task with its output and its end, as text")
            .with_mime_type("text/plain"),
        ResourceTemplate::new("environment://{name}", "environment")
            .with_title("An environment")
            .with_description("What is in an environment and whether it is installed, as JSON")
            .with_mime_type("application/json"),
    ];
    if !with_tasks {
        templates.remove(0);
    }
    templates
}

pub(crate) async fn list(server: &Server) -> Result<Vec<Resource>, ErrorData> {
    let engine = server.engine().await.map_err(internal)?;
    let listed = engine.list_tasks().await.map_err(|error| internal(error.into()))?;
    let environments = {
        let engine = engine.clone();
        let found = blocking(move || {
            engine.environments().list().map_err(|error| pyro_engine::Error::from(error).into())
        });
        found.await.map_err(internal)?
    };
    let mut resources: Vec<Resource> = environments
        .into_iter()
        .map(|entry| {
            Resource::new(environment_uri(&entry.name), entry.name)
                .with_description(entry.description)
                .with_mime_type("application/json")
        })
        .collect();
    let tasks = if server.has_tasks() { listed.tasks } else { Vec::new() };
    for task in tasks.iter().take(LISTED_TASKS) {
        for sequence in (1..=task.command_count).rev().take(usize::try_from(LISTED_COMMANDS).unwrap_or(0)) {
            let name = format!("{} #{sequence}", task.task_id);
            resources.push(
                Resource::new(format!("task://{}/logs/{sequence}", task.task_id), name)
                    .with_description(format!("Command {sequence} of task {}", task.task_id))
                    .with_mime_type("text/plain"),
            );
        }
    }
    Ok(resources)
}

pub(crate) async fn read(server: &Server, uri: &str) -> Result<ReadResourceResult, ErrorData> {
    let engine = server.engine().await.map_err(internal)?;
    if let Some(name) = uri.strip_prefix("environment://") {
        let name = name.replace("%3A", ":").replace("%3a", ":");
        let listed = blocking(move || {
            engine.environments().list().map_err(|error| pyro_engine::Error::from(error).into())
        });
        let found = listed.await.map_err(internal)?.into_iter().find(|entry| entry.name == name);
        let entry = found.ok_or_else(|| missing(uri, "it names no environment"))?;
        let json = serde_json::json!({ "catalog_version": VERSION, "environment": entry }).to_string();
        let contents = ResourceContents::text(json, uri).with_mime_type("application/json");
        return Ok(ReadResourceResult::new(vec![contents]));
    }
    let (id, sequence) = command_of(uri)
        .filter(|_| server.has_tasks())
        .ok_or_else(|| missing(uri, "expected task://TASK_ID/logs/SEQUENCE or environment://NAME"))?;
    let most = 2 * text::MOST_STREAM_BYTES as u64;
    match engine.log_of_command(id, sequence, Some(most)).await {
        Ok(Some(entry)) => Ok(ReadResourceResult::new(vec![ResourceContents::text(transcript(&entry), uri)])),
        Ok(None) => Err(missing(uri, "the task has no such command")),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Expired) => {
            Err(missing(uri, &error.to_string()))
        }
        Err(error) => Err(internal(error.into())),
    }
}

/// The address of an environment: as it stands, the colon of its name would begin the number of a port.
fn environment_uri(name: &str) -> String {
    format!("environment://{}", name.replace(':', "%3A"))
}

/// The task and the number in `task://ID/logs/SEQ`.
fn command_of(uri: &str) -> Option<(&str, u64)> {
    let (id, rest) = uri.strip_prefix("task://")?.split_once('/')?;
    Some((id, rest.strip_prefix("logs/")?.parse().ok()?))
}

fn transcript(entry: &LogEntry) -> String {
    let mut command = entry.entry.command.clone();
    text::shorten(&mut command);
    let end = match (entry.entry.exit_code, &entry.entry.reason) {
        (Some(code), _) => format!("exit_code={code}"),
        (None, Some(reason)) => reason.clone(),
        (None, None) => "running".to_owned(),
    };
    let mut text = format!("#{} {end} cwd={}\n$ {command}\n", entry.entry.sequence, entry.entry.cwd);
    for (name, output) in [("stdout", &entry.stdout), ("stderr", &entry.stderr)] {
        if !output.is_empty() {
            text.push_str(&format!("--- {name}\n{}", text::plain(output)));
            if !text.ends_with('\n') {
                text.push('\n');
            }
        }
    }
    text
}

fn missing(uri: &str, why: &str) -> ErrorData {
    let shown: String = uri.chars().filter(|c| !c.is_control()).take(128).collect();
    ErrorData::resource_not_found(format!("no resource '{shown}': {why}"), None)
}

fn internal(failure: Failure) -> ErrorData {
    ErrorData::internal_error(failure.error.clone(), serde_json::to_value(failure).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_names_a_task_and_a_command_and_nothing_else() {
        assert_eq!(command_of("task://0123456789ab/logs/12"), Some(("0123456789ab", 12)));
        for bad in
            ["task://x/logs/", "task://x/logs/-1", "task://x/logs/1/2", "task://x", "file:///etc/passwd"]
        {
            assert_eq!(command_of(bad), None, "{bad}");
        }
    }
}
