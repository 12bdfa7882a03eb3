//! `pyro task`: a microVM that stays, and the record of what was done in it.

use std::path::Path;
use std::process::ExitCode;

use pyro_engine::{
    Engine, EntryStatus, ErrorKind, ExecResult, JournalEntry, LogEntry, LogQuery, Observer, Phase,
    PortChange, TaskRecord,
};
use tokio::sync::watch;

use super::follow::follow;
use super::network;
use super::run::{exec_spec, exit, machine, note, telling, written};
use crate::cli::{AttachArgs, CommandArgs, CreateArgs, ExecArgs, LogsArgs, PortVerb, TaskVerb};
use crate::config;
use crate::failure::Failure;
use crate::printer::Printer;
use crate::streams::Forwarder;

/// After how long a person is told that pyro waits for the end of stdin.
const SLOW_INPUT: std::time::Duration = std::time::Duration::from_secs(3);

/// Resolves to an exit code at a signal.
pub(crate) type Interrupt = watch::Receiver<Option<u8>>;

pub(crate) async fn run(
    verb: TaskVerb,
    printer: &Printer,
    interrupt: Interrupt,
) -> Result<ExitCode, Failure> {
    let config = match &verb {
        TaskVerb::Create(args) => config::engine_for(&args.machine)?,
        _ => config::engine(None)?,
    };
    let policies = config.policies_dir.clone();
    let engine = Engine::open(config)?;
    match verb {
        TaskVerb::Create(args) => create(&engine, args, policies.as_deref(), printer).await,
        TaskVerb::Network(args) => network::run(&engine, args, printer).await,
        TaskVerb::Port(verb) => ports(&engine, verb, printer).await,
        TaskVerb::Logs(args) if args.network => network::logs(&engine, &args, printer).await,
        TaskVerb::Exec(args) => exec(&engine, args, printer, interrupt).await,
        TaskVerb::Attach(args) => attach(&engine, args, printer).await,
        TaskVerb::Cancel(args) => cancel(&engine, args, printer).await,
        TaskVerb::Status(args) => {
            let record = engine.status_task(&args.task_id).await?;
            show(&record, printer);
            if record.network_enabled && !printer.json() {
                network::show_counts(&engine.task_network(&args.task_id).await?, printer);
            }
            Ok(ExitCode::SUCCESS)
        }
        TaskVerb::Logs(args) => logs(&engine, args, printer).await,
        TaskVerb::List(_) => list(&engine, printer).await,
        TaskVerb::Start(args) => {
            printer.turn("booting".to_owned());
            show(&engine.start_task(&args.task_id).await?, printer);
            Ok(ExitCode::SUCCESS)
        }
        TaskVerb::Stop(args) => {
            printer.turn("stopping".to_owned());
            show(&engine.stop_task(&args.task_id).await?, printer);
            Ok(ExitCode::SUCCESS)
        }
        TaskVerb::Delete(args) => {
            let deleted = if args.force {
                engine.delete_task_by_force(&args.task_id).await?
            } else {
                engine.delete_task(&args.task_id).await?
            };
            if printer.json() {
                printer.object(&deleted);
            } else {
                printer.data(&format!("Deleted task: {}", deleted.task_id));
            }
            Ok(ExitCode::SUCCESS)
        }
    }
}

async fn create(
    engine: &Engine,
    args: CreateArgs,
    policies: Option<&Path>,
    printer: &Printer,
) -> Result<ExitCode, Failure> {
    let observer = Observer::none().on_phase(telling(printer, engine, "task-create"));
    let record = engine.create_task(machine(args.machine, policies)?, observer).await?;
    if args.id_only {
        printer.settle();
        printer.data(&record.task_id);
    } else {
        show(&record, printer);
    }
    Ok(ExitCode::SUCCESS)
}

async fn exec(
    engine: &Engine,
    args: ExecArgs,
    printer: &Printer,
    mut interrupt: Interrupt,
) -> Result<ExitCode, Failure> {
    let exec = exec_spec(args.exec)?;
    if args.detach {
        let taken = engine.exec_task_detached(&args.task_id, exec);
        tokio::pin!(taken);
        let detached = tokio::select! {
            detached = &mut taken => detached?,
            () = tokio::time::sleep(SLOW_INPUT) => {
                printer.say("[task-exec] waiting for the end of stdin, which the command gets whole; -n leaves it alone");
                taken.await?
            }
        };
        if printer.json() {
            printer.object(&detached);
        } else {
            printer.data(&detached.sequence.to_string());
            printer.say(&format!(
                "[task-exec] task_id={} sequence={} status=running; wait for it: pyro task attach {} {}",
                detached.task_id, detached.sequence, detached.task_id, detached.sequence
            ));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let (noted, mut sequence) = watch::channel(None);
    let mut observer = Observer::none().on_phase(move |phase| {
        if let Phase::Sequence(number) = phase {
            noted.send_replace(Some(number));
        }
    });
    let mut forwarder = None;
    if !printer.json() {
        let (sender, started) = Forwarder::start();
        observer = observer.output(sender);
        forwarder = Some(started);
    }
    let running = engine.exec_task(&args.task_id, exec, observer);
    tokio::pin!(running);
    let result = tokio::select! {
        result = &mut running => result,
        Some(code) = told(&mut interrupt) => {
            // A terminal that goes away leaves the command running; a person who presses Ctrl-C does not.
            if code != super::HANGUP {
                // It may have been sent and not have got its number yet: then that is waited for.
                let number = tokio::select! {
                    _ = &mut running => None,
                    number = sequence.wait_for(Option::is_some) => number.ok().and_then(|number| *number),
                };
                if let Some(number) = number {
                    drop(engine.cancel_task(&args.task_id, number).await);
                    drop(running.await);
                }
            }
            return Ok(ExitCode::from(code));
        }
    };
    let unread = result.as_ref().is_err_and(|error| error.kind() == ErrorKind::Cancelled);
    let number = *sequence.borrow();
    if unread && let Some(number) = number {
        // As with any program whose output nobody reads any more.
        drop(engine.cancel_task(&args.task_id, number).await);
    }
    if let Some(code) = written(forwarder).await? {
        return Ok(code);
    }
    finish(&result?, printer)
}

async fn told(interrupt: &mut Interrupt) -> Option<u8> {
    interrupt.wait_for(Option::is_some).await.ok().and_then(|code| *code)
}

async fn attach(engine: &Engine, args: AttachArgs, printer: &Printer) -> Result<ExitCode, Failure> {
    let CommandArgs { task_id, sequence, .. } = args.command;
    let mut observer = Observer::none();
    let mut forwarder = None;
    if !printer.json() {
        let (sender, started) = Forwarder::start();
        observer = observer.output(sender);
        forwarder = Some(started);
    }
    let result = engine.attach_task(&task_id, sequence, observer).await;
    if let Some(code) = written(forwarder).await? {
        return Ok(code);
    }
    finish(&result?, printer)
}

fn finish(result: &ExecResult, printer: &Printer) -> Result<ExitCode, Failure> {
    if printer.json() {
        printer.object(result);
    }
    if result.execution_mode == "host_compat" {
        printer.warn("warning: this task runs on this host, without isolation");
    }
    note(result, printer);
    printer.say(&format!(
        "[task-exec] task_id={} sequence={} cwd={} execution_mode={} exit_code={} duration_ms={:.0}",
        result.task_id.as_deref().unwrap_or_default(),
        result.sequence.unwrap_or_default(),
        result.cwd.as_deref().unwrap_or_default(),
        result.execution_mode,
        result.exit_code,
        result.duration_ms
    ));
    Ok(exit(result.exit_code))
}

async fn cancel(engine: &Engine, args: CommandArgs, printer: &Printer) -> Result<ExitCode, Failure> {
    let cancelled = engine.cancel_task(&args.task_id, args.sequence).await?;
    if printer.json() {
        printer.object(&cancelled);
    } else if cancelled.ended {
        printer.data(&format!("Ended command {} of task {}", args.sequence, args.task_id));
    } else {
        printer.data(&format!("Command {} of task {} had ended before", args.sequence, args.task_id));
    }
    Ok(ExitCode::SUCCESS)
}

async fn list(engine: &Engine, printer: &Printer) -> Result<ExitCode, Failure> {
    let list = engine.list_tasks().await?;
    if printer.json() {
        printer.object(&list);
        return Ok(ExitCode::SUCCESS);
    }
    if list.tasks.is_empty() {
        printer.data("No tasks found.");
    }
    for task in &list.tasks {
        printer.data(&format!(
            "{} {} {} commands={} expires_in={}s disk={}MiB",
            task.task_id,
            task.state.as_str(),
            task.environment,
            task.command_count,
            left(task),
            task.disk_bytes >> 20
        ));
    }
    for problem in &list.problems {
        printer.say(&format!("warning: {problem}"));
    }
    Ok(ExitCode::SUCCESS)
}

fn show(record: &TaskRecord, printer: &Printer) {
    printer.settle();
    if printer.json() {
        return printer.object(record);
    }
    let last = record.last_command.as_ref().map_or_else(
        || "none".to_owned(),
        |last| {
            let code = last.exit_code.map_or_else(|| "running".to_owned(), |code| format!("exit {code}"));
            format!("#{} {} ({code})", last.sequence, one_line(&last.command))
        },
    );
    let mut lines = vec![
        ("Task ID", record.task_id.clone()),
        ("Environment", record.environment.clone()),
        ("State", record.state.as_str().to_owned()),
        ("Isolation", record.isolation.clone()),
        ("Execution mode", record.execution_mode.clone()),
        ("Workspace", record.workspace_path.clone()),
        ("Resources", format!("{} vCPU / {} MiB", record.vcpu_count, record.mem_mib)),
        ("Disk", format!("{} MiB of {} MiB", record.disk_bytes >> 20, record.disk_mib)),
        ("Expires in", format!("{} s", left(record))),
        ("Command count", record.command_count.to_string()),
        ("Last command", last),
    ];
    if record.network_enabled {
        lines.push(("Network", network::describe(&record.network_policy)));
    }
    if !record.ports.is_empty() {
        let ports: Vec<String> = record.ports.iter().map(ToString::to_string).collect();
        lines.push(("Ports", ports.join(", ")));
    }
    for (name, secret) in &record.secrets {
        lines.push(("Secret", format!("{name} from {} for {}", secret.value_from, secret.hosts.join(", "))));
    }
    lines.extend(record.last_error.as_ref().map(|error| ("Last error", one_line(error))));
    for (name, value) in lines {
        printer.data(&format!("{name}: {value}"));
    }
}

/// Shows or changes the published ports of a task.
async fn ports(engine: &Engine, verb: PortVerb, printer: &Printer) -> Result<ExitCode, Failure> {
    let (task_id, change) = match verb {
        PortVerb::Add(args) => (args.task_id, PortChange { add: args.ports, remove: Vec::new() }),
        PortVerb::Remove(args) => (args.task_id, PortChange { add: Vec::new(), remove: args.ports }),
        PortVerb::List(args) => (args.task_id, PortChange::default()),
    };
    let found = engine.change_task_ports(&task_id, &change).await?;
    if printer.json() {
        printer.object(&found);
        return Ok(ExitCode::SUCCESS);
    }
    for port in &found.ports {
        printer.data(&port.to_string());
    }
    if found.ports.is_empty() {
        printer.data("No published ports.");
    }
    Ok(ExitCode::SUCCESS)
}

/// Seconds until it expires, by the wall's clock.
fn left(record: &TaskRecord) -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    std::time::Duration::try_from_secs_f64(record.expires_at - now.as_secs_f64())
        .map_or(0, |left| left.as_secs())
}

fn one_line(text: &str) -> String {
    const MOST: usize = 200;
    text.chars().take(MOST).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

async fn logs(engine: &Engine, args: LogsArgs, printer: &Printer) -> Result<ExitCode, Failure> {
    let query = LogQuery {
        since_sequence: args.sequence.unwrap_or(args.since),
        limit: args.limit,
        max_bytes: args.max_bytes,
    };
    let mut logs = engine.logs_task(&args.task_id, query).await?;
    if let Some(sequence) = args.sequence {
        logs.entries.retain(|entry| entry.entry.sequence == sequence);
        logs.count = logs.entries.len();
        if logs.entries.is_empty() && !args.follow {
            return Err(Failure::new(
                "not_found",
                format!("task '{}' has no command {sequence}", args.task_id),
            ));
        }
    }
    if printer.json() {
        printer.object(&logs);
        return Ok(ExitCode::SUCCESS);
    }
    if logs.entries.is_empty() && !args.follow {
        printer.data("No task logs found.");
    }
    let mut next = query.since_sequence.max(1);
    for entry in &logs.entries {
        if args.follow && entry.entry.status == EntryStatus::Running {
            break;
        }
        print(entry, printer);
        next = entry.entry.sequence + 1;
    }
    if args.follow && args.sequence.is_none_or(|only| next <= only) {
        follow(engine, &args.task_id, next, args.sequence, printer).await?;
    }
    Ok(ExitCode::SUCCESS)
}

fn print(entry: &LogEntry, printer: &Printer) {
    printer.data(&headline(&entry.entry));
    printer.data(&format!("$ {}", entry.entry.command));
    for text in [&entry.stdout, &entry.stderr] {
        if !text.is_empty() {
            printer.bytes(text.as_bytes());
            if !text.ends_with('\n') {
                printer.bytes(b"\n");
            }
        }
    }
}

pub(super) fn headline(entry: &JournalEntry) -> String {
    let code = entry.exit_code.map_or_else(|| "none".to_owned(), |code| code.to_string());
    let duration = entry.duration_ms.map_or_else(|| "none".to_owned(), |duration| format!("{duration:.0}"));
    let status = match entry.status {
        EntryStatus::Finished => "",
        EntryStatus::Running => " status=running",
        EntryStatus::TimedOut => " status=timed_out",
        EntryStatus::Interrupted => " status=interrupted",
    };
    format!("#{} exit_code={code} duration_ms={duration} cwd={}{status}", entry.sequence, entry.cwd)
}
