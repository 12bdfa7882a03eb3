//! `pyro task network` and `pyro task logs --network`: what a guest may reach, and what it did.

use std::process::ExitCode;
use std::time::Duration;

use pyro_engine::network::{NetworkChange, NetworkLogEntry, NetworkPolicy, TaskNetwork};
use pyro_engine::{Engine, Error, ErrorKind, VmState};

use crate::cli::{LogsArgs, TaskNetworkArgs};
use crate::failure::Failure;
use crate::printer::Printer;

/// How often a log is looked at again: a file that grows has no event of its own.
const BEAT: Duration = Duration::from_millis(300);

pub(super) async fn run(
    engine: &Engine,
    args: TaskNetworkArgs,
    printer: &Printer,
) -> Result<ExitCode, Failure> {
    let TaskNetworkArgs { task_id, allow, deny, revoke, open, closed, output: _ } = args;
    let open = (open || closed).then_some(open);
    let network = engine.set_task_network(&task_id, &NetworkChange { allow, deny, revoke, open }).await?;
    if printer.json() {
        printer.object(&network);
    } else {
        show(&network, printer);
    }
    Ok(ExitCode::SUCCESS)
}

fn show(network: &TaskNetwork, printer: &Printer) {
    let policy = &network.network_policy;
    printer.data(&format!("Network: {}", policy.mode));
    for (name, rules) in [("Allow", &policy.allow), ("Deny", &policy.deny)] {
        for rule in rules {
            printer.data(&format!("{name}: {rule}"));
        }
    }
    for (host, address) in &policy.hosts {
        printer.data(&format!("Host: {host} = {address}"));
    }
    for (host, requests) in &policy.inspect {
        printer.data(&format!("Inspect: {host}: {}", inspected(requests)));
    }
    show_counts(network, printer);
    if let Some(closed) = network.closed_connections {
        printer.say(&format!("[task-network] closed_connections={closed}"));
    }
}

/// What the guest did since its start, if it runs.
pub(super) fn show_counts(network: &TaskNetwork, printer: &Printer) {
    if let Some(counts) = network.counts {
        printer.data(&format!(
            "Since its start: {} allowed, {} denied, {} bytes in, {} bytes out",
            counts.allowed, counts.denied, counts.bytes_in, counts.bytes_out
        ));
    }
}

/// A policy in one line.
pub(super) fn describe(policy: &NetworkPolicy) -> String {
    let mut text = policy.mode.clone();
    for (name, rules) in [("allow", &policy.allow), ("deny", &policy.deny)] {
        if !rules.is_empty() {
            text.push_str(&format!("; {name} {}", rules.join(", ")));
        }
    }
    for (host, address) in &policy.hosts {
        text.push_str(&format!("; {host} = {address}"));
    }
    for (host, requests) in &policy.inspect {
        text.push_str(&format!("; inspect {host} ({})", inspected(requests)));
    }
    text
}

fn inspected(requests: &[String]) -> String {
    if requests.is_empty() { "every request".to_owned() } else { requests.join(", ") }
}

/// Shows the log of a task's network, and what comes where that is asked for.
pub(super) async fn logs(engine: &Engine, args: &LogsArgs, printer: &Printer) -> Result<ExitCode, Failure> {
    let mut log = engine.network_log(&args.task_id, 0).await?;
    if printer.json() {
        // The log has more than one read of it holds.
        loop {
            let next = engine.network_log(&args.task_id, log.next_offset).await?;
            if next.next_offset == log.next_offset {
                break;
            }
            log.entries.extend(next.entries);
            log.next_offset = next.next_offset;
        }
        log.count = log.entries.len();
        printer.object(&log);
        return Ok(ExitCode::SUCCESS);
    }
    if log.entries.is_empty() && !args.follow {
        printer.data("No network logs found.");
    }
    loop {
        for entry in &log.entries {
            printer.data(&line(entry));
        }
        if log.entries.is_empty() {
            if !args.follow || !lives(engine, &args.task_id).await? {
                return Ok(ExitCode::SUCCESS);
            }
            tokio::time::sleep(BEAT).await;
        }
        let next = engine.network_log(&args.task_id, log.next_offset).await;
        log = match next {
            Ok(next) => next,
            Err(error) if is_over(&error) => return Ok(ExitCode::SUCCESS),
            Err(error) => return Err(error.into()),
        };
    }
}

async fn lives(engine: &Engine, task_id: &str) -> Result<bool, Failure> {
    match engine.status_task(task_id).await {
        Ok(task) => Ok(task.state == VmState::Started),
        Err(error) if is_over(&error) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn is_over(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Expired)
}

/// An entry in one line.
fn line(entry: &NetworkLogEntry) -> String {
    let mut words = vec![format!("{:.3}", entry.at), entry.kind.as_str().to_owned()];
    words.extend(entry.allowed.map(|allowed| if allowed { "allowed" } else { "denied" }.to_owned()));
    let place = match (&entry.name, entry.address) {
        (Some(name), _) => Some(name.clone()),
        (None, address) => address.map(|address| address.to_string()),
    };
    words.extend(match (place, entry.port) {
        (Some(place), Some(port)) => Some(format!("{place}:{port}")),
        (place, _) => place,
    });
    words.extend(entry.method.clone());
    words.extend(entry.path.clone());
    words.extend(entry.why.as_ref().map(|why| format!("({why})")));
    if let (Some(to_guest), Some(from_guest)) = (entry.bytes_in, entry.bytes_out) {
        words.push(format!("in={to_guest} out={from_guest}"));
    }
    words.extend(entry.count.filter(|count| *count > 1).map(|count| format!("x{count}")));
    words.join(" ").chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}
