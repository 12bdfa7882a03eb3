//! What becomes of a VM whose callers go away, and where its commands may run.

use std::path::{Path, PathBuf};

use super::*;
use crate::engine::EngineConfig;
use crate::record::VmState;
use crate::spare::tests::{config, engine, spec};
use crate::spec::Command;

/// Polls a future once, so that what it begins is under way, and drops it.
async fn give_up<T>(call: impl Future<Output = T>) {
    let mut call = std::pin::pin!(call);
    std::future::poll_fn(|context| {
        assert!(call.as_mut().poll(context).is_pending(), "it has ended already");
        std::task::Poll::Ready(())
    })
    .await;
}

fn sh(script: &str) -> ExecSpec {
    ExecSpec::new(Command::Shell(script.to_owned()))
}

fn lenient() -> VmSpec {
    VmSpec { allow_host_compat: true, ..spec() }
}

async fn started(engine: &Engine) -> String {
    let vm = engine.create_vm(lenient(), Observer::none()).await.expect("created").vm_id;
    engine.start_vm(&vm).await.expect("started");
    vm
}

fn directories(state: &Path) -> usize {
    fs_err::read_dir(state.join("vms")).expect("there").count()
}

/// An engine that finds no VMM, and its state directory.
fn without_vmm(root: &tempfile::TempDir) -> (PathBuf, Engine) {
    let [state_dir, cache_dir] = ["state", "cache"].map(|name| root.path().join(name));
    let config = EngineConfig {
        state_dir: state_dir.clone(),
        tool_path: "/nowhere".into(),
        ..config(root, cache_dir, 4)
    };
    (state_dir, Engine::open(config).expect("opened"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_after_a_stop_that_was_given_up_does_not_run_on_the_host() {
    let Some((_state, engine)) =
        engine("a_command_after_a_stop_that_was_given_up_does_not_run_on_the_host", 4)
    else {
        return;
    };
    let vm = started(&engine).await;
    give_up(engine.stop_vm(&vm)).await;
    let refused = engine.exec_vm(&vm, sh("id"), Observer::none()).await.expect_err("it is stopped");
    assert_eq!(refused.to_string(), format!("vm {vm} must be in 'started' state before execution"));
    assert_eq!(engine.status_vm(&vm).expect("there").state, VmState::Stopped);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_that_was_given_up_does_not_keep_the_vm_from_starting() {
    let Some((_state, engine)) = engine("a_stop_that_was_given_up_does_not_keep_the_vm_from_starting", 4)
    else {
        return;
    };
    let vm = started(&engine).await;
    give_up(engine.stop_vm(&vm)).await;
    let record = engine.start_vm(&vm).await.expect("started again");
    let result = engine.exec_vm(&vm, sh("true"), Observer::none()).await.expect("it runs");
    assert_eq!((result.exit_code, &result.execution_mode), (0, &record.execution_mode));
    assert_eq!((&result.isolation, result.start_mode.as_str()), (&record.isolation, "cold"));
    assert_ne!(result.isolation, "none");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_was_given_up_goes_on_and_a_stop_cuts_it_short() {
    let Some((_state, engine)) = engine("a_start_that_was_given_up_goes_on_and_a_stop_cuts_it_short", 4)
    else {
        return;
    };
    let vm = engine.create_vm(spec(), Observer::none()).await.expect("created").vm_id;
    give_up(engine.start_vm(&vm)).await;
    let again = engine.start_vm(&vm).await.expect_err("it has started");
    assert_eq!(again.to_string(), format!("vm {vm} cannot be started from state 'started'"));
    let other = engine.create_vm(spec(), Observer::none()).await.expect("created").vm_id;
    let (start, stop) = tokio::join!(engine.start_vm(&other), engine.stop_vm(&other));
    assert_eq!(
        start.expect_err("cut short").to_string(),
        "the start was cut short: the VM was stopped",
        "{stop:?}"
    );
    assert_eq!(stop.expect("stopped").state, VmState::Stopped);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_that_is_given_up_takes_its_vm_with_it() {
    let Some((state, engine)) = engine("a_command_that_is_given_up_takes_its_vm_with_it", 4) else { return };
    let vm = started(&engine).await;
    let (sender, mut output) = tokio::sync::mpsc::channel(4);
    let observer = Observer::none().output(sender);
    tokio::select! {
        result = engine.exec_vm(&vm, sh("echo begun; sleep 1000"), observer) => panic!("{result:?}"),
        begun = output.recv() => drop(begun.expect("it has begun")),
    }
    assert_eq!(directories(state.path()), 0, "nothing is left when the call is gone");
    let gone = engine.stop_vm(&vm).await.expect_err("gone");
    assert_eq!(gone.to_string(), format!("vm '{vm}' does not exist"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_command_whose_vm_is_stopped_or_deleted_says_so() {
    let Some((_state, engine)) = engine("a_command_whose_vm_is_stopped_or_deleted_says_so", 4) else {
        return;
    };
    for (deletes, why) in [(false, "the VM was stopped"), (true, "the VM was deleted")] {
        let vm = started(&engine).await;
        let (sender, mut output) = tokio::sync::mpsc::channel(4);
        let observer = Observer::none().output(sender);
        let end = async {
            output.recv().await.expect("it has begun");
            if deletes {
                engine.delete_vm(&vm).await.expect("deleted");
            } else {
                engine.stop_vm(&vm).await.expect_err("its command has taken it with it");
            }
            // The reader stays for the last words.
            while output.recv().await.is_some() {}
        };
        let (result, ()) = tokio::join!(engine.exec_vm(&vm, sh("echo begun; sleep 1000"), observer), end);
        let result = result.expect("it ran");
        assert_eq!((result.fault, result.stdout.as_str()), (Some(Fault::Cancelled), "begun\n"));
        assert_eq!(result.stderr, format!("command ended: {why}\n"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_engine_that_is_dropped_leaves_no_vm() {
    let Some((state, engine)) = engine("an_engine_that_is_dropped_leaves_no_vm", 4) else { return };
    engine.create_vm(spec(), Observer::none()).await.expect("created");
    started(&engine).await;
    let stopping = started(&engine).await;
    give_up(engine.stop_vm(&stopping)).await;
    assert_eq!(directories(state.path()), 3);
    drop(engine);
    assert_eq!(directories(state.path()), 0);
}

#[test]
fn a_vm_ends_with_the_runtime_on_which_it_was_made() {
    let root = tempfile::tempdir().expect("a directory");
    let (state, engine) = without_vmm(&root);
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let first = runtime();
    let vm = first.block_on(engine.create_vm(lenient(), Observer::none())).expect("created").vm_id;
    drop(first);
    assert_eq!(directories(&state), 0);
    let gone = runtime().block_on(engine.start_vm(&vm)).expect_err("gone");
    assert_eq!(gone.to_string(), format!("vm '{vm}' does not exist"));
}

#[tokio::test]
async fn a_vm_runs_on_the_host_only_while_it_is_started_there() {
    let root = tempfile::tempdir().expect("a directory");
    let (_state, engine) = without_vmm(&root);
    let vm = engine.create_vm(lenient(), Observer::none()).await.expect("created").vm_id;
    let text = format!("vm {vm} must be in 'started' state before execution");
    let exec = || engine.exec_vm(&vm, sh("true"), Observer::none());
    assert_eq!(exec().await.expect_err("created").to_string(), text);
    assert_eq!(engine.start_vm(&vm).await.expect("started").execution_mode, "host_compat");
    engine.stop_vm(&vm).await.expect("stopped");
    assert_eq!(exec().await.expect_err("stopped").to_string(), text);
    let record = engine.start_vm(&vm).await.expect("started again");
    assert!(record.metadata["host_compat_reason"].contains("no VMM is installed"), "{record:?}");
    let result = exec().await.expect("it runs");
    assert_eq!(
        (result.exit_code, result.execution_mode.as_str(), result.isolation.as_str()),
        (0, "host_compat", "none")
    );
}
