//! Calls of the engine that are given up at random moments: their futures are dropped after a number of polls or after a
//! time. Afterwards the VM or task can be used or is gone, no command has run on the host, and nothing is left.
//!
//! `PYRO_DROPS` says how often each call on a VM is given up; each on a task, a sixth of that. `PYRO_DROPS_SEED` repeats
//! what a seed has chosen.

use std::future::Future;
use std::pin::pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use pyro_engine::{
    Command, Engine, EngineConfig, Error, ErrorKind, ExecResult, ExecSpec, Observer, VmSpec, VmState,
};

use crate::support::{Dice, Pyro, environments};

const DROPS: u64 = 50;
const SEED: u64 = 20_261_127;
/// Workers, each with one machine at a time.
const WORKERS: u64 = 2;
/// Longer than the calls that boot take here, so that some of them end.
const LONGEST: u64 = 900;

#[test]
fn a_call_that_is_given_up_leaves_a_machine_that_works_or_is_gone() {
    let number =
        |name: &str, default| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let (drops, seed) = (number("PYRO_DROPS", DROPS), number("PYRO_DROPS_SEED", SEED));
    println!("drops: seed {seed}, {drops} of each call");
    let pyro = Pyro::new();
    // The environment is there before anything is given up.
    pyro.ok(&["run", "debian:12", "--mem-mib", "256", "--", "true"]);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let runtime = runtime.expect("a runtime");
    let engine = Engine::open(config(&pyro)).expect("opened");
    let began = Instant::now();
    let workers = (0..WORKERS).map(|worker| {
        let (engine, mut dice) = (engine.clone(), Dice::new(seed * 1000 + worker));
        runtime.spawn(async move {
            for round in (worker..drops).step_by(usize::try_from(WORKERS).expect("small")) {
                vms(&engine, &mut dice).await;
                if round % 6 < WORKERS {
                    task(&engine, &mut dice).await;
                }
            }
        })
    });
    for worker in workers.collect::<Vec<_>>() {
        if let Err(error) = runtime.block_on(worker) {
            panic!("PYRO_DROPS_SEED={seed}: {error}");
        }
    }
    runtime.block_on(async {
        // A task whose making was given up when it was made already is known to nobody.
        for task in engine.list_tasks().await.expect("listed").tasks {
            engine.delete_task(&task.task_id).await.expect("deleted");
        }
    });
    pyro.until("nothing is left", |_| engine.live_vms().expect("counted") == 0);
    pyro.until("no directory is left", |pyro| {
        ["vms", "tasks"]
            .iter()
            .all(|kind| fs_err::read_dir(pyro.state().join(kind)).expect("there").next().is_none())
    });
    pyro.assert_empty();
    println!("drops: {:.1} s", began.elapsed().as_secs_f64());
}

fn config(pyro: &Pyro) -> EngineConfig {
    EngineConfig {
        state_dir: pyro.state().to_owned(),
        cache_dir: environments(),
        apt_sources: None,
        tool_path: std::env::var_os("PATH").unwrap_or_default(),
        backend: None,
        firecracker: None,
        template_limit_mib: 4096,
        spare: false,
        // What was given up may hold its slot for a moment longer.
        max_active_vms: 16,
        max_ttl_seconds: 3600,
        supervisor: Some(assert_cmd::cargo::cargo_bin!("pyro").to_owned()),
    }
}

/// The host is allowed, so that a command which ran there by mistake shows.
fn spec() -> VmSpec {
    VmSpec { mem_mib: 256, allow_host_compat: true, ..VmSpec::new("debian:12") }
}

fn command() -> ExecSpec {
    ExecSpec::new(Command::argv(["echo", "alive"]))
}

/// Drops a call after some polls or some time; what it returned, if it was faster.
async fn given_up<T>(dice: &mut Dice, call: impl Future<Output = T>) -> Option<T> {
    if dice.chance(50) {
        return tokio::time::timeout(Duration::from_millis(dice.below(LONGEST)), call).await.ok();
    }
    let (mut call, mut polls) = (pin!(call), dice.below(10));
    std::future::poll_fn(|context| {
        if polls == 0 {
            return Poll::Ready(None);
        }
        polls -= 1;
        match call.as_mut().poll(context) {
            Poll::Ready(done) => Poll::Ready(Some(done)),
            Poll::Pending if polls == 0 => Poll::Ready(None),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

/// One round: each call on a VM is given up once.
async fn vms(engine: &Engine, dice: &mut Dice) {
    if let Some(run) = given_up(dice, engine.run(spec(), command(), Observer::none())).await {
        alive(run.expect("it runs"));
    }
    if let Some(created) = given_up(dice, engine.create_vm(spec(), Observer::none())).await {
        engine.delete_vm(&created.expect("created").vm_id).await.expect("deleted");
    }
    stopped_and_deleted(engine, dice).await;
    used(engine, dice).await;
}

/// Start, stop and deletion are given up.
async fn stopped_and_deleted(engine: &Engine, dice: &mut Dice) {
    let vm = started(engine, dice).await;
    if let Some(stopped) = given_up(dice, engine.stop_vm(&vm)).await {
        assert_eq!(stopped.expect("stopped").state, VmState::Stopped);
    }
    // To boot again takes long; the tests of the engine do it after each.
    if dice.chance(10) {
        let _may_run_already = engine.start_vm(&vm).await;
        assert_eq!(engine.status_vm(&vm).expect("there").state, VmState::Started);
    }
    match given_up(dice, engine.delete_vm(&vm)).await {
        Some(deleted) => assert!(deleted.expect("deleted").deleted),
        None => gone_or(engine.delete_vm(&vm).await.map(drop)),
    }
    gone(&engine.status_vm(&vm).expect_err("deleted"));
}

/// Start and command are given up.
async fn used(engine: &Engine, dice: &mut Dice) {
    let vm = started(engine, dice).await;
    match given_up(dice, engine.exec_vm(&vm, command(), Observer::none())).await {
        Some(result) => alive(result.expect("it runs")),
        // It was sent, and the machine has gone with it; or it was not.
        None => match engine.exec_vm(&vm, command(), Observer::none()).await {
            Ok(result) => alive(result),
            Err(error) => gone(&error),
        },
    }
    gone(&engine.stop_vm(&vm).await.expect_err("used up"));
}

/// A VM that runs, after a start of it was given up.
async fn started(engine: &Engine, dice: &mut Dice) -> String {
    let vm = engine.create_vm(spec(), Observer::none()).await.expect("created").vm_id;
    let first = given_up(dice, engine.start_vm(&vm)).await;
    let record = match first {
        Some(record) => record.expect("started"),
        None => match engine.start_vm(&vm).await {
            Ok(record) => record,
            Err(error) => {
                let text = format!("vm {vm} cannot be started from state 'started'");
                assert_eq!(error.to_string(), text, "the start that was given up has gone on");
                engine.status_vm(&vm).expect("there")
            }
        },
    };
    assert_eq!(record.state, VmState::Started);
    assert_ne!(record.execution_mode, "host_compat", "{record:?}");
    vm
}

/// Each call on a task is given up once.
async fn task(engine: &Engine, dice: &mut Dice) {
    if let Some(created) = given_up(dice, engine.create_task(spec(), Observer::none())).await {
        let id = created.expect("created").task_id;
        engine.delete_task(&id).await.expect("deleted");
    }
    let id = engine.create_task(spec(), Observer::none()).await.expect("created").task_id;
    if let Some(result) = given_up(dice, engine.exec_task(&id, command(), Observer::none())).await {
        alive(result.expect("it runs"));
    }
    alive(engine.exec_task(&id, command(), Observer::none()).await.expect("the next one runs"));
    if let Some(stopped) = given_up(dice, engine.stop_task(&id)).await {
        assert_eq!(stopped.expect("stopped").state, VmState::Stopped);
    }
    if let Some(started) = given_up(dice, engine.start_task(&id)).await {
        runs(started.map(|record| record.state));
    }
    runs(engine.start_task(&id).await.map(|record| record.state));
    alive(engine.exec_task(&id, command(), Observer::none()).await.expect("it runs"));
    match given_up(dice, engine.delete_task(&id)).await {
        Some(deleted) => assert!(deleted.expect("deleted").deleted),
        None => gone_or(engine.delete_task(&id).await.map(drop)),
    }
    gone(&engine.status_task(&id).await.expect_err("deleted"));
}

/// The command has run, in a guest.
fn alive(result: ExecResult) {
    assert_eq!((result.exit_code, result.stdout.as_str()), (0, "alive\n"), "{result:?}");
    assert!(result.execution_mode.starts_with("guest_") && result.isolation != "none", "{result:?}");
}

fn gone(error: &Error) {
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
}

fn gone_or(deleted: Result<(), Error>) {
    if let Err(error) = deleted {
        gone(&error);
    }
}

/// A start that was answered: it has started now, or had already.
fn runs(started: Result<VmState, Error>) {
    match started {
        Ok(state) => assert_eq!(state, VmState::Started),
        Err(error) => assert!(error.to_string().ends_with("from state 'started'"), "{error}"),
    }
}
