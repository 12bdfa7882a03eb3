//! Calls of the engine that are given up at random moments: their futures are dropped after a number of polls or after a
//! time. Afterwards the VM or task can be used or is gone, no command has run on the host, and nothing is left.
//!
//! `PYRO_DROPS` says how often each call on a VM is given up; each on a task, a tenth of that. `PYRO_DROPS_SEED` repeats
//! what a seed has chosen.

use std::collections::BTreeMap;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
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
/// Microseconds: longer than a restored machine takes to start, so that some calls end.
const LONGEST: u64 = 500_000;

/// How often each call was given up, and how often it was faster.
type Tally = Mutex<BTreeMap<&'static str, [u64; 2]>>;

/// Gives calls up.
struct Dropper {
    engine: Engine,
    dice: Dice,
    tally: Arc<Tally>,
}

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
    let tally = Arc::<Tally>::default();
    let workers = (0..WORKERS).map(|worker| {
        let (engine, dice) = (engine.clone(), Dice::new(seed * 1000 + worker));
        let mut dropper = Dropper { engine, dice, tally: Arc::clone(&tally) };
        runtime.spawn(async move {
            for round in (worker..drops).step_by(usize::try_from(WORKERS).expect("small")) {
                dropper.vms().await;
                if round % 20 < WORKERS {
                    dropper.task().await;
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
    println!("drops: {:.1} s; given up and not: {:?}", began.elapsed().as_secs_f64(), tally);
}

fn config(pyro: &Pyro) -> EngineConfig {
    EngineConfig {
        policies_dir: None,
        outbound: pyro_engine::network::Outbound::default(),
        state_dir: pyro.state().to_owned(),
        cache_dir: environments(),
        apt_sources: None,
        tool_path: std::env::var_os("PATH").unwrap_or_default(),
        backend: None,
        firecracker: None,
        template_limit_mib: 4096,
        spare: false,
        keep_ready_seconds: 0,
        unconfined_vmm: false,
        runtime_dir: None,
        memory_overcommit: 1.0,
        disk_overcommit: 100.0,
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

impl Dropper {
    /// Drops a call after some polls or some time; what it returned, if it was faster.
    async fn give_up<T>(&mut self, name: &'static str, call: impl Future<Output = T>) -> Option<T> {
        let mut call = pin!(call);
        let done = if self.dice.chance(50) {
            // Short times too, for calls that are fast.
            let longest = LONGEST >> self.dice.below(8);
            tokio::time::timeout(Duration::from_micros(self.dice.below(longest)), call).await.ok()
        } else {
            let mut polls = 1 + self.dice.below(6);
            std::future::poll_fn(|context| {
                polls -= 1;
                match call.as_mut().poll(context) {
                    Poll::Ready(done) => Poll::Ready(Some(done)),
                    Poll::Pending if polls == 0 => Poll::Ready(None),
                    Poll::Pending => Poll::Pending,
                }
            })
            .await
        };
        let mut tally = self.tally.lock().unwrap_or_else(PoisonError::into_inner);
        tally.entry(name).or_default()[usize::from(done.is_some())] += 1;
        done
    }

    /// One round: each call on a VM is given up once.
    async fn vms(&mut self) {
        let engine = self.engine.clone();
        if let Some(run) = self.give_up("run", engine.run(spec(), command(), Observer::none())).await {
            alive(run.expect("it runs"));
        }
        if let Some(created) = self.give_up("create_vm", engine.create_vm(spec(), Observer::none())).await {
            engine.delete_vm(&created.expect("created").vm_id).await.expect("deleted");
        }
        self.stopped_and_deleted().await;
        self.used().await;
    }

    /// Start, stop and deletion are given up.
    async fn stopped_and_deleted(&mut self) {
        let engine = self.engine.clone();
        let vm = self.started().await;
        if let Some(stopped) = self.give_up("stop_vm", engine.stop_vm(&vm)).await {
            assert_eq!(stopped.expect("stopped").state, VmState::Stopped);
        }
        // To boot again takes long; the tests of the engine do it after each.
        if self.dice.chance(6) {
            let _may_run_already = engine.start_vm(&vm).await;
            assert_eq!(engine.status_vm(&vm).expect("there").state, VmState::Started);
        }
        match self.give_up("delete_vm", engine.delete_vm(&vm)).await {
            Some(deleted) => assert!(deleted.expect("deleted").deleted),
            None => gone_or(engine.delete_vm(&vm).await.map(drop)),
        }
        gone(&engine.status_vm(&vm).expect_err("deleted"));
    }

    /// Start and command are given up.
    async fn used(&mut self) {
        let engine = self.engine.clone();
        let vm = self.started().await;
        match self.give_up("exec_vm", engine.exec_vm(&vm, command(), Observer::none())).await {
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
    async fn started(&mut self) -> String {
        let engine = self.engine.clone();
        let vm = engine.create_vm(spec(), Observer::none()).await.expect("created").vm_id;
        let first = self.give_up("start_vm", engine.start_vm(&vm)).await;
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
    async fn task(&mut self) {
        let engine = self.engine.clone();
        if let Some(created) = self.give_up("create_task", engine.create_task(spec(), Observer::none())).await
        {
            let id = created.expect("created").task_id;
            engine.delete_task(&id).await.expect("deleted");
        }
        let id = engine.create_task(spec(), Observer::none()).await.expect("created").task_id;
        if let Some(result) =
            self.give_up("exec_task", engine.exec_task(&id, command(), Observer::none())).await
        {
            alive(result.expect("it runs"));
        }
        alive(engine.exec_task(&id, command(), Observer::none()).await.expect("the next one runs"));
        if let Some(stopped) = self.give_up("stop_task", engine.stop_task(&id)).await {
            assert_eq!(stopped.expect("stopped").state, VmState::Stopped);
        }
        if let Some(started) = self.give_up("start_task", engine.start_task(&id)).await {
            runs(started.map(|record| record.state));
        }
        runs(engine.start_task(&id).await.map(|record| record.state));
        alive(engine.exec_task(&id, command(), Observer::none()).await.expect("it runs"));
        match self.give_up("delete_task", engine.delete_task(&id)).await {
            Some(deleted) => assert!(deleted.expect("deleted").deleted),
            None => gone_or(engine.delete_task(&id).await.map(drop)),
        }
        gone(&engine.status_task(&id).await.expect_err("deleted"));
    }
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
