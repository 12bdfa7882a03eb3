//! Prompts: how to begin, for people who start a conversation from a host's menu.

use rmcp::ErrorData;
use rmcp::model::{GetPromptRequestParams, GetPromptResult, Prompt, PromptArgument, PromptMessage, Role};

const NAME: &str = "work_in_a_sandbox";

pub(crate) fn all() -> Vec<Prompt> {
    let goal = PromptArgument::new("goal").with_description("What is to be done").with_required(true);
    let environment = PromptArgument::new("environment")
        .with_description("debian:12 (the default), debian:12-base or debian:12-build");
    let description = "Have a goal worked on in a microVM of its own, step by step, and the result shown";
    vec![Prompt::new(NAME, Some(description), Some(vec![goal, environment])).with_title("Work in a sandbox")]
}

pub(crate) fn get(request: &GetPromptRequestParams) -> Result<GetPromptResult, ErrorData> {
    if request.name != NAME {
        return Err(ErrorData::invalid_params(format!("unknown prompt; expected: {NAME}"), None));
    }
    let argument = |name: &str| {
        let given = request.arguments.as_ref().and_then(|arguments| arguments.get(name));
        given.and_then(|value| value.as_str()).map(str::trim).filter(|text| !text.is_empty())
    };
    let goal =
        argument("goal").ok_or_else(|| ErrorData::invalid_params("argument 'goal' is missing", None))?;
    let environment = argument("environment").unwrap_or("debian:12");
    let text = format!(
        "Do this in a sandbox, not on my machine: {goal}\n\nMake a task with task_create (environment {environment}), \
         work in /workspace with task_exec, check each step by its exit_code, and give long builds a larger \
         timeout_seconds. When it is done, show me what you did and the files that matter, then delete the task with \
         task_delete."
    );
    Ok(GetPromptResult::new(vec![PromptMessage::new_text(Role::User, text)]))
}
