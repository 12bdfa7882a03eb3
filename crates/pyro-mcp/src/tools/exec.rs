//! Results of commands, as a context window can take them.

use pyro_engine::{Engine, ExecResult, Stream};

use crate::text;

/// The result of a command in a machine that is gone: what is cut cannot be read again.
pub(super) fn of_machine(mut result: ExecResult, most: usize) -> ExecResult {
    let remedy = |_| "; run it in a task (task_create, task_exec) to have all of it on record".to_owned();
    for (text, total, truncated) in [
        (&mut result.stdout, result.stdout_bytes, &mut result.stdout_truncated),
        (&mut result.stderr, result.stderr_bytes, &mut result.stderr_truncated),
    ] {
        *truncated |= text.len() > most;
        *text = if text.len() > most && total > text.len() as u64 {
            // Head and tail of what was more already: its own mark goes with the middle.
            let (bytes, half) = (text.as_bytes(), most / 2);
            text::head_and_tail(&bytes[..half], &bytes[bytes.len() - half..], total, remedy)
        } else {
            text::fit(text, most, remedy)
        };
    }
    shorten(&mut result);
    result
}

/// The result of a command in a task: what is cut is in the journal, and the mark says where.
pub(super) async fn of_task(engine: &Engine, mut result: ExecResult, most: usize) -> ExecResult {
    let (id, sequence) = (result.task_id.clone().unwrap_or_default(), result.sequence.unwrap_or_default());
    for (stream, text, total, truncated) in [
        (Stream::Stdout, &mut result.stdout, result.stdout_bytes, &mut result.stdout_truncated),
        (Stream::Stderr, &mut result.stderr, result.stderr_bytes, &mut result.stderr_truncated),
    ] {
        *truncated |= text.len() > most;
        *text = shown(engine, (&id, sequence, stream), text, total, most).await;
    }
    shorten(&mut result);
    result
}

/// Its command in a length that can be shown. Of long words the list goes, as the text holds their beginning.
fn shorten(result: &mut ExecResult) {
    if result.command.len() > text::COMMAND_BYTES {
        result.argv = None;
    }
    text::shorten(&mut result.command);
}

/// One stream of a command as it is shown: its ends from the journal, where places in the text are places in the file.
async fn shown(
    engine: &Engine,
    (id, sequence, stream): (&str, u64, Stream),
    text: &str,
    total: u64,
    most: usize,
) -> String {
    if text.len() <= most {
        return text::plain(text);
    }
    let name = stream_name(stream);
    let remedy = |at: usize| {
        format!("; to read on: task_logs with task_id={id}, sequence={sequence}, stream={name}, offset={at}")
    };
    let half = most as u64 / 2;
    let head = engine.read_task_output(id, sequence, stream, 0, half).await;
    let file_bytes = head.as_ref().map_or(0, |head| head.file_bytes);
    let tail = engine.read_task_output(id, sequence, stream, file_bytes.saturating_sub(half), half).await;
    match (head, tail) {
        // The journal has dropped what came last, which the result still has.
        (Ok(head), _) if total > file_bytes && file_bytes > half => {
            let (bytes, half) = (text.as_bytes(), most / 2);
            text::head_and_tail(&head.bytes, &bytes[bytes.len() - half..], total, remedy)
        }
        (Ok(head), Ok(tail)) if file_bytes > 2 * half => {
            text::head_and_tail(&head.bytes, &tail.bytes, file_bytes, remedy)
        }
        // The task is gone, and its journal with it.
        _ => text::fit(text, most, |_| String::new()),
    }
}

pub(super) fn stream_name(stream: Stream) -> &'static str {
    match stream {
        Stream::Stdout => "stdout",
        Stream::Stderr => "stderr",
    }
}
