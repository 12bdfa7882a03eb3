//! A spare: one machine that runs already, for the next command of the kind that was run last.
//!
//! It is a machine of this engine like any other: it has a row and counts towards the cap, and it ends with the engine.
//! Nobody has used it, and it has an identity of its own. It takes the last free slot from nobody, and makes room for a
//! machine that is asked for.

use std::sync::{Arc, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use pyro_image::Environment;

use crate::engine::Engine;
use crate::error::{Error, ErrorKind};
use crate::execute::Cancel;
use crate::observe::Observer;
use crate::place::Terms;
use crate::registry::now;
use crate::spec::{Command, ExecSpec, VmSpec};
use crate::task::boottime;
use crate::vm::{Admitted, Machines, execute};

/// How long a spare waits for somebody to use it.
const IDLE: Duration = Duration::from_secs(600);

/// A machine in waiting.
#[derive(Debug)]
pub(crate) struct Spare {
    admitted: Admitted,
    spec: VmSpec,
}

/// The spare of an engine: there, or in the making.
#[derive(Debug, Default)]
pub(crate) struct Slot {
    spare: Option<Spare>,
    in_the_making: bool,
}

/// Says that none is in the making any more.
struct Making(Weak<Machines>);

impl Drop for Making {
    fn drop(&mut self) {
        if let Some(machines) = self.0.upgrade() {
            machines.slot().in_the_making = false;
        }
    }
}

impl Engine {
    /// Takes the spare for a machine of this description, if it fits.
    pub(crate) fn take_spare(&self, spec: &VmSpec, environment: &Environment) -> Option<Admitted> {
        let spare = self.slot().spare.take_if(|spare| {
            spare.admitted.live.lives()
                && spare.serves(spec)
                && spare.admitted.environment.as_ref().is_some_and(|its| {
                    its.digest == environment.digest && its.kernel_digest == environment.kernel_digest
                })
        })?;
        let mut admitted = spare.admitted;
        let record = &mut admitted.record;
        record.ttl_seconds = spec.ttl_seconds;
        record.allow_host_compat = spec.allow_host_compat;
        record.created_at = now();
        record.expires_at = record.created_at + f64::from(spec.ttl_seconds);
        record.expires_at_boottime = boottime() + f64::from(spec.ttl_seconds);
        // A row that says less than it could is no reason to do without the machine.
        drop(self.inner.registry.update(record));
        Some(admitted)
    }

    /// Ends the spare; whether there was one. Its slot is free when this returns.
    pub(crate) fn end_spare(&self) -> bool {
        self.machines.end_spare()
    }

    /// Admits a machine, if need be in the place of the spare: one that is asked for comes before one that waits for somebody
    /// to ask.
    pub(crate) fn before_spare<T>(&self, admit: impl Fn() -> Result<T, Error>) -> Result<T, Error> {
        match admit() {
            Err(error) if self.gives_way(&error) || self.ready_gives_way_here(&error) => admit(),
            admitted => admitted,
        }
    }

    /// As [`Engine::ready_gives_way`], on a thread that may wait.
    fn ready_gives_way_here(&self, refused: &Error) -> bool {
        tokio::runtime::Handle::try_current()
            .is_ok_and(|runtime| runtime.block_on(self.ready_gives_way(refused)))
    }

    /// Ends the spare where a machine was refused for want of what the spare holds; whether there was one.
    pub(crate) fn gives_way(&self, refused: &Error) -> bool {
        matches!(refused.kind(), ErrorKind::CapReached | ErrorKind::HostResources) && self.end_spare()
    }

    /// Makes a spare for the next machine of this description, in its own time.
    pub(crate) fn keep_spare(&self, spec: &VmSpec) {
        // Who has secrets gets a machine of its own.
        if !self.inner.config.spare || spec.cold || !spec.secrets.is_empty() {
            return;
        }
        let mut slot = self.slot();
        if slot.in_the_making || slot.spare.as_ref().is_some_and(|spare| spare.serves(spec)) {
            return;
        }
        slot.in_the_making = true;
        drop(slot);
        let (worker, machines, spec) = (self.worker(), Arc::downgrade(&self.machines), spec.clone());
        drop(tokio::spawn(async move {
            let making = Making(machines.clone());
            if let Some(machines) = machines.upgrade() {
                machines.end_spare();
            }
            let made = worker.make_spare(&spec).await;
            drop(making);
            let Some(admitted) = made else { return };
            let id = admitted.record.vm_id.clone();
            {
                // Without an engine the new spare ends here.
                let Some(machines) = machines.upgrade() else { return };
                machines.slot().spare = Some(Spare { admitted, spec });
            }
            tokio::time::sleep(IDLE).await;
            let Some(machines) = machines.upgrade() else { return };
            let idle = machines.slot().spare.take_if(|spare| spare.admitted.record.vm_id == id);
            if let Some(spare) = idle {
                drop(spare.admitted.live.remove().await);
            }
        }));
    }

    /// A machine that has run a command, so that what its processor had to learn for one it knows. None where anything is
    /// in the way: the next machine is then made when it is asked for.
    async fn make_spare(&self, spec: &VmSpec) -> Option<Admitted> {
        let cap = self.inner.config.max_active_vms;
        // One slot stays free for whoever asks next.
        if self.live_vms().ok()? + 1 >= cap {
            return None;
        }
        let spec = VmSpec { ttl_seconds: self.inner.config.max_ttl_seconds, ..spec.clone() };
        let mut admitted = self.admit(&spec, &Observer::none()).await.ok()?;
        let Admitted { record, environment, live } = &mut admitted;
        self.start_live(&spec, record, environment.as_ref(), live).await.ok()?;
        if !live.lives() {
            return None;
        }
        let warm = ExecSpec::new(Command::argv(["true"]));
        execute(&live.place, &live.dir(), record, warm, &Observer::none(), Cancel::default()).await.ok()?;
        Some(admitted)
    }

    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.machines.slot()
    }
}

impl Machines {
    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end_spare(&self) -> bool {
        // It ends once the lock is free again.
        let spare = self.slot().spare.take();
        spare.is_some()
    }
}

impl Spare {
    /// Whether it serves a caller who asks for this.
    fn serves(&self, spec: &VmSpec) -> bool {
        self.admitted.live.lives()
            && like(&self.spec, spec)
            && Terms::of(spec).check(&self.admitted.live.place).is_ok()
    }
}

/// Whether a machine of one description serves for another.
fn like(one: &VmSpec, other: &VmSpec) -> bool {
    let shape = |spec: &VmSpec| {
        (spec.environment.clone(), spec.vcpu_count, spec.mem_mib, spec.disk_mib, spec.network.digest())
    };
    shape(one) == shape(other) && !other.cold && other.secrets.is_empty()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::PathBuf;
    use std::time::Instant;

    use pyro_vmm::Isolation;

    use super::*;
    use crate::engine::EngineConfig;

    pub(crate) fn config(state: &tempfile::TempDir, cache_dir: PathBuf, cap: u32) -> EngineConfig {
        EngineConfig {
            state_dir: state.path().to_owned(),
            cache_dir,
            policies_dir: None,
            outbound: pyro_net::Outbound::default(),
            apt_sources: None,
            tool_path: std::env::var_os("PATH").unwrap_or_default(),
            backend: None,
            firecracker: None,
            template_limit_mib: 4096,
            spare: false,
            keep_ready_seconds: 0,
            unconfined_vmm: false,
            max_active_vms: cap,
            max_ttl_seconds: 3600,
            runtime_dir: None,
            memory_overcommit: 1.0,
            disk_overcommit: 100.0,
            supervisor: None,
        }
    }

    /// An engine on the environments of the tests.
    pub(crate) fn engine(test: &str, cap: u32) -> Option<(tempfile::TempDir, Engine)> {
        engine_with(test, |state, cache_dir| config(state, cache_dir, cap))
    }

    /// The same, which keeps a spare.
    fn engine_with_spare(test: &str, cap: u32) -> Option<(tempfile::TempDir, Engine)> {
        engine_with(test, |state, cache_dir| EngineConfig { spare: true, ..config(state, cache_dir, cap) })
    }

    fn engine_with(
        test: &str,
        config: impl FnOnce(&tempfile::TempDir, PathBuf) -> EngineConfig,
    ) -> Option<(tempfile::TempDir, Engine)> {
        let Some(cache_dir) = std::env::var_os("PYRO_TEST_ENVIRONMENTS").map(PathBuf::from) else {
            println!("skipped: {test}: PYRO_TEST_ENVIRONMENTS is not set");
            return None;
        };
        let state = tempfile::tempdir().expect("a directory");
        let config = config(&state, cache_dir);
        Some((state, Engine::open(config).expect("opened")))
    }

    pub(crate) fn spec() -> VmSpec {
        VmSpec { mem_mib: 512, ..VmSpec::new("debian:12") }
    }

    async fn hostname(engine: &Engine, spec: VmSpec) -> (String, String) {
        let exec = ExecSpec::new(Command::argv(["cat", "/etc/hostname"]));
        let result = engine.run(spec, exec, Observer::none()).await.expect("it runs");
        (result.vm_id.unwrap_or_default(), result.stdout.trim().to_owned())
    }

    /// The id of the spare once it is there.
    async fn waiting(engine: &Engine) -> String {
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            if let Some(spare) = &engine.slot().spare {
                return spare.admitted.record.vm_id.clone();
            }
            assert!(Instant::now() < deadline, "no spare was made");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_next_command_gets_the_spare_and_another_kind_does_not() {
        let Some((_state, engine)) =
            engine_with_spare("the_next_command_gets_the_spare_and_another_kind_does_not", 4)
        else {
            return;
        };
        let (first, _) = hostname(&engine, spec()).await;
        let spare = waiting(&engine).await;
        assert_ne!(first, spare);
        assert_eq!(engine.live_vms().expect("counted"), 1, "it counts");
        // It has a name of its own, and a life as long as what was asked for.
        let (used, name) = hostname(&engine, spec()).await;
        assert_eq!((used.as_str(), name), (spare.as_str(), format!("pyro-{spare}")));
        let next = waiting(&engine).await;
        assert_ne!(next, spare);
        let (other, _) = hostname(&engine, VmSpec { cold: true, ..spec() }).await;
        assert_ne!(other, next);
        assert_eq!(waiting(&engine).await, next, "who wants to boot leaves it to others");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_spare_makes_room_and_ends_with_its_engine() {
        let Some((state, engine)) = engine_with_spare("a_spare_makes_room_and_ends_with_its_engine", 2)
        else {
            return;
        };
        hostname(&engine, spec()).await;
        waiting(&engine).await;
        let machines = [(); 2].map(|()| engine.create_vm(spec(), Observer::none()));
        for machine in machines {
            machine.await.expect("the spare goes when its slot is wanted");
        }
        let refused = engine.create_vm(spec(), Observer::none()).await.expect_err("full");
        assert_eq!(refused.to_string(), "max active VMs reached (2); delete old VMs first");
        drop(engine);
        assert_eq!(fs_err::read_dir(state.path().join("vms")).expect("there").count(), 0);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_spare_makes_room_for_a_stopped_machine_and_for_a_task() {
        const TEST: &str = "a_spare_makes_room_for_a_stopped_machine_and_for_a_task";
        let Some((_state, engine)) = engine_with_spare(TEST, 2) else { return };
        let stopped = engine.create_vm(spec(), Observer::none()).await.expect("created").vm_id;
        engine.start_vm(&stopped).await.expect("started");
        engine.stop_vm(&stopped).await.expect("stopped");
        hostname(&engine, spec()).await;
        waiting(&engine).await;
        let other = engine.create_vm(spec(), Observer::none()).await.expect("created").vm_id;
        engine.start_vm(&stopped).await.expect("the spare goes when its slot is wanted again");
        for vm in [stopped, other] {
            engine.delete_vm(&vm).await.expect("deleted");
        }
        hostname(&engine, spec()).await;
        waiting(&engine).await;
        engine.create_vm(spec(), Observer::none()).await.expect("created");
        // This engine has no program for supervisors, and says so once the task has a slot.
        let refused = engine.create_task(spec(), Observer::none()).await.expect_err("no supervisor");
        assert_ne!(refused.kind(), ErrorKind::CapReached, "{refused}");
        assert!(engine.slot().spare.is_none());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_spare_that_isolates_less_than_is_required_is_not_used() {
        const TEST: &str = "a_spare_that_isolates_less_than_is_required_is_not_used";
        let Some((_state, engine)) = engine_with_spare(TEST, 4) else { return };
        hostname(&engine, spec()).await;
        let spare = waiting(&engine).await;
        let environment = engine.prepare("debian:12", &Observer::none()).await.expect("installed");
        let isolation = engine.isolation().expect("a VMM");
        let require = |tier| VmSpec { require_isolation: Some(tier), ..spec() };
        for tier in [Isolation::QemuTcg, Isolation::QemuKvm, Isolation::FirecrackerKvm] {
            if tier > isolation {
                assert!(engine.take_spare(&require(tier), &environment).is_none(), "{tier}");
            }
        }
        let taken = engine.take_spare(&require(isolation), &environment).expect("it isolates enough");
        assert_eq!(taken.record.vm_id, spare);
    }
}
