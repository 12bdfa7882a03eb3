//! Templates: a machine of each shape is booted once, brought to rest and saved; further ones go on from there.
//!
//! A template holds no process of a user's and no secret: what runs in it runs to its end before it is saved, and what
//! makes a guest unlike every other comes afterwards, to each by itself. It is a cache: whatever is wrong with one, the
//! machine boots.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use pyro_image::{Environment, Template, TemplateFiles, TemplateShape};
use pyro_vmm::{Capabilities, Channel, DiskCache, Driver, Machine, MachineSpec, Snapshot, Vmm};
use serde::Serialize;

use crate::engine::Engine;
use crate::error::{Error, ErrorKind};
use crate::guest::{Event, Guest, Identity, at_rest};
use crate::live::{Boot, OVERLAY, Running, StartTimes, boot_deadline, lay_disk, machine_spec, unavailable};
use crate::network::GuestLink;
use crate::observe::{Observer, Phase};
use crate::registry::{Lease, Owner, Registry, Resource};
use crate::spec::{Command, ExecSpec, VmSpec};

/// Why a machine has booted for which there was nothing to go on from.
pub(crate) const NO_TEMPLATE: &str = "there was no template";

/// What is run in a template, twice, so that its files are in the guest's page cache.
const WARM_UP: &[&[&str]] = &[
    &[
        "/bin/sh",
        "-lc",
        "ls -la / /usr/bin /workspace; cat /etc/passwd | head -n 1 | grep -q root; env; mktemp -u",
    ],
    &["bash", "-lc", "true"],
    &["true"],
    &["git", "--version"],
    &["python3", "-c", "import json, os, sys, subprocess"],
    &["sync"],
];
/// How long one of these may take.
const WARM_UP_SECONDS: f64 = 60.0;
/// How long all of them may take together, by the host's clock: the guest's own limits are the guest's to keep.
const WARM_UP_DEADLINE: Duration = Duration::from_secs(180);
/// How long a guest may take to come to rest.
const REST_DEADLINE: Duration = Duration::from_secs(30);
/// How long a restored guest may take to answer: a tenth of a second on an idle host.
const RESTORE_DEADLINE: Duration = Duration::from_secs(20);

/// What a template is asked for by: the digest of the environment, processors, memory, disk, and whether it has a network.
type AskedFor = (String, u8, u32, u32, bool);
/// Why templates could not be made when that was tried last; none where they could.
pub(crate) type TemplateFailures = HashMap<AskedFor, Option<String>>;

/// A template that was asked for.
#[derive(Clone, Debug, Serialize)]
pub struct PreparedTemplate {
    /// Its name in the cache.
    pub id: String,
    /// Whether it was made now.
    pub made: bool,
}

/// A machine's directory that has no row: it is not a machine of anybody's and takes nobody's slot.
struct Workshop {
    registry: Arc<Registry>,
    lease: Option<Lease>,
}

impl Drop for Workshop {
    fn drop(&mut self) {
        if let Some(lease) = self.lease.take() {
            // What cannot be removed now is found by the next sweep, once the lock is free.
            drop(self.registry.remove(lease));
        }
    }
}

impl Engine {
    /// Makes the templates from which machines of this description start, for commands of one run and for tasks, unless
    /// they are there.
    ///
    /// # Errors
    /// When the environment cannot be had, a machine does not boot, the VMM cannot save one, or there are to be none.
    pub async fn prepare_templates(
        &self,
        spec: &VmSpec,
        observer: &Observer,
    ) -> Result<Vec<PreparedTemplate>, Error> {
        self.check(spec)?;
        if self.inner.config.template_limit_mib == 0 {
            let text = "templates are switched off: their limit is 0 MiB";
            return Err(Error::new(ErrorKind::InvalidValue, text).hint("raise PYRO_TEMPLATE_LIMIT_MIB"));
        }
        let environment = self.prepare(&spec.environment, observer).await?;
        let mut prepared: Vec<PreparedTemplate> = Vec::new();
        for disk in [DiskCache::Unsafe, DiskCache::Writeback] {
            let Some((template, made)) = self.make_template(&environment, spec, disk, observer).await? else {
                let text = "another process is making a template";
                return Err(Error::new(ErrorKind::Environment, text).hint("run it again in some seconds"));
            };
            // Where the disk's cache makes no difference, both are the same.
            if prepared.iter().all(|known| known.id != template.id) {
                prepared.push(PreparedTemplate { id: template.id, made });
            }
        }
        Ok(prepared)
    }

    /// As [`Engine::prepare_templates`], for one use, and no reason to fail: a machine that has no template boots.
    pub(crate) async fn prepare_template(
        &self,
        environment: &Environment,
        spec: &VmSpec,
        disk: DiskCache,
        observer: &Observer,
    ) {
        if spec.cold || self.inner.config.template_limit_mib == 0 {
            return;
        }
        let made = self.make_template(environment, spec, disk, observer).await;
        let failure = made.err().map(|error| format!("no template could be made, so machines boot: {error}"));
        if let Some(failure) = &failure {
            observer.tell(Phase::Warning(failure.clone()));
        }
        self.template_failures().insert(asked_for(environment, spec), failure);
    }

    /// Writes down why there is no template for machines of this description, where making one has failed.
    pub(crate) fn describe_template(
        &self,
        environment: &Environment,
        spec: &VmSpec,
        metadata: &mut BTreeMap<String, String>,
    ) {
        let failure = self.template_failures().get(&asked_for(environment, spec)).cloned().flatten();
        metadata.extend(failure.map(|failure| ("template_error".to_owned(), failure)));
    }

    fn template_failures(&self) -> MutexGuard<'_, TemplateFailures> {
        self.inner.template_failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The template for a machine on this VMM; none where there is no sound one.
    fn find_template(&self, vmm: &Driver, boot: &Boot<'_>) -> Option<Template> {
        let fresh = boot.fresh.as_ref().filter(|fresh| !fresh.cold)?;
        let shape = shape(vmm, &boot.spec(), fresh.disk_mib, boot.network.policy.has_nic())?;
        // A cache that cannot be read is one that holds nothing.
        self.inner.store.template(boot.environment, &shape).ok().flatten()
    }

    /// Starts a machine: from a template where there is one and the machine is new, else by booting it.
    pub(crate) async fn start_on(
        &self,
        vmm: &Driver,
        boot: &Boot<'_>,
    ) -> Result<(Running, StartTimes), Error> {
        let id = boot.dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
        self.note_control_group(&id, &boot.dir).await?;
        let started = self.restore_or_boot(vmm, boot).await?;
        let (engine, pid) = (self.clone(), started.0.machine.pid());
        let note = move || match Owner::numbered(pid) {
            Some(process) => engine.inner.registry.note_resource(&id, &Resource::Process(process)),
            None => Ok(()),
        };
        // Where that cannot be written down, the kernel ends it with its owner all the same.
        drop(self.blocking(note).await);
        Ok(started)
    }

    /// Writes down the control group that a VMM is about to get, where it gets one.
    async fn note_control_group(&self, id: &str, dir: &Path) -> Result<(), Error> {
        let Some(group) = pyro_vmm::control_group_of(dir) else { return Ok(()) };
        let (engine, id) = (self.clone(), id.to_owned());
        self.blocking(move || engine.inner.registry.note_resource(&id, &Resource::ControlGroup(group))).await
    }

    async fn restore_or_boot(&self, vmm: &Driver, boot: &Boot<'_>) -> Result<(Running, StartTimes), Error> {
        let Some(fresh) = &boot.fresh else { return Running::boot(vmm, boot).await };
        let overlay = boot.dir.join(OVERLAY);
        let mut reason = (!fresh.cold).then(|| NO_TEMPLATE.to_owned());
        let mut useless = None;
        if let Some(template) = self.find_template(vmm, boot) {
            let restored = match lay_disk(&template.files.overlay, &overlay) {
                Ok(()) => {
                    let saved = Snapshot {
                        state: template.files.state.clone(),
                        memory: template.files.memory.clone(),
                    };
                    Running::restore(vmm, boot, &saved, RESTORE_DEADLINE).await
                }
                Err(error) => Err(error),
            };
            match restored {
                Ok(started) => return Ok(started),
                Err(error) => reason = Some(format!("the template could not be restored: {error}")),
            }
            useless = Some(template);
        }
        lay_disk(fresh.blank, &overlay)?;
        let (mut running, times) = Running::boot(vmm, boot).await?;
        running.cold_reason = reason;
        // The VMM and its host are sound, so it was the template's fault: it is made anew by the next who wants it.
        if let Some(template) = useless {
            drop(self.inner.store.discard_template(template));
        }
        Ok((running, times))
    }

    /// The template, and whether it was made now; none while another process makes one.
    async fn make_template(
        &self,
        environment: &Environment,
        spec: &VmSpec,
        disk: DiskCache,
        observer: &Observer,
    ) -> Result<Option<(Template, bool)>, Error> {
        let vmm = self.vmm()?;
        let inner = &self.inner;
        let spec_in = |dir| machine_spec(dir, environment, spec.vcpu_count, spec.mem_mib, disk);
        let shape = shape(&vmm, &spec_in(PathBuf::new()), spec.disk_mib, spec.network.has_nic())
            .ok_or_else(|| unavailable("this VMM cannot save a machine"))?;
        if let Some(template) = inner.store.template(environment, &shape)? {
            return Ok(Some((template, false)));
        }
        let Some(build) = inner.store.begin_template(environment, &shape)? else { return Ok(None) };
        // Whoever had the lock before may have made it.
        if let Some(template) = inner.store.template(environment, &shape)? {
            return Ok(Some((template, false)));
        }
        let tell = |step: &str| observer.tell(Phase::Environment("template".to_owned(), step.to_owned()));
        tell("booting");
        let blank = inner.store.overlay_template(spec.disk_mib)?;
        let workshop = Workshop {
            registry: Arc::clone(&inner.registry),
            lease: Some(inner.registry.lease_directory(spec.promise())?),
        };
        let dir = workshop.lease.as_ref().map(|lease| lease.dir.clone()).unwrap_or_default();
        lay_disk(&blank, &dir.join(OVERLAY))?;
        if let Some(lease) = &workshop.lease {
            self.note_control_group(&lease.id, &dir).await?;
        }
        // Nobody serves its network: what is restored from it has one of its own.
        let link = if spec.network.has_nic() { Some(GuestLink::make(&vmm).await?) } else { None };
        let nic = link.as_ref().map(|link| link.nic.clone());
        let saved = save_machine(&vmm, MachineSpec { nic, ..spec_in(dir.clone()) }, tell).await?;
        drop(link);
        let files = TemplateFiles { state: saved.state, memory: saved.memory, overlay: dir.join(OVERLAY) };
        let engine = self.clone();
        let template = self.blocking(move || Ok(engine.inner.store.finish_template(build, &files)?)).await?;
        drop(workshop);
        Ok(Some((template, true)))
    }
}

/// Boots a machine, brings it to rest and saves it; it has ended when this returns.
pub(crate) async fn save_machine(
    vmm: &Driver,
    spec: MachineSpec,
    tell: impl Fn(&str),
) -> Result<Snapshot, Error> {
    let spec = MachineSpec { savable: true, ..spec };
    // As long as any other, so that its files need only be written over.
    let identity = Identity::new(format!("pyro-{}", "0".repeat(12)), "0".repeat(32));
    let machine = vmm.launch(&spec).await.map_err(|error| unavailable(&format!("phase=start: {error}")))?;
    let work = async {
        let failed = |what: &str, error: &dyn std::fmt::Display| unavailable(&format!("{what}: {error}"));
        let meeting = async {
            let stream = machine.connect().await.map_err(|error| failed("the channel", &error))?;
            // On a serial port there is one stream, which must not close between a template and its copies.
            let kept = stream.as_fd().try_clone_to_owned().map_err(|error| failed("the channel", &error))?;
            let guest = Guest::meet(stream, &identity).await;
            Ok((kept, guest.map_err(|error| failed("the guest did not answer", &error))?))
        };
        let (kept, guest) = in_time("the guest did not answer", boot_deadline(vmm), meeting).await?;
        tell("warming up");
        in_time("the guest did not end its commands", WARM_UP_DEADLINE, async {
            warm_up(&guest).await;
            Ok(())
        })
        .await?;
        tell("saving");
        let rest = async {
            guest.rest().await.map_err(|status| failed("the guest did not come to rest", &status))?;
            if vmm.capabilities().channel == Channel::Serial {
                at_rest(kept)
                    .await
                    .map(Some)
                    .map_err(|error| failed("the guest did not come to rest", &error))
            } else {
                drop(kept);
                Ok(None)
            }
        };
        let kept = in_time("the guest did not come to rest", REST_DEADLINE, rest).await?;
        let saved = machine.save().await.map_err(|error| failed("it could not be saved", &error))?;
        drop(kept);
        Ok(saved)
    };
    let saved = tokio::select! {
        saved = work => saved,
        exit = machine.wait() => Err(ended(&machine, &exit.status)),
    };
    machine.kill().await;
    saved
}

/// Gives a step of the making of a template no more time than this.
async fn in_time<T>(
    what: &str,
    deadline: Duration,
    step: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let done = tokio::time::timeout(deadline, step).await;
    done.unwrap_or_else(|_elapsed| Err(unavailable(&format!("{what} within {} s", deadline.as_secs()))))
}

fn ended(machine: &Machine, status: &str) -> Error {
    let console = machine.console_tail();
    let console = console.trim_end();
    let words = if console.is_empty() { String::new() } else { format!("; console:\n{console}") };
    unavailable(&format!("phase=boot: {status}{words}"))
}

/// Runs everything twice. What an environment does not have, it does not miss.
async fn warm_up(guest: &Guest) {
    for words in WARM_UP.iter().chain(WARM_UP) {
        let mut command = ExecSpec::new(Command::argv(*words));
        command.timeout_seconds = WARM_UP_SECONDS;
        let Ok(mut exec) = guest.exec(command, false).await else { continue };
        while let Ok(Event::Output(_)) = exec.next().await {}
    }
}

fn asked_for(environment: &Environment, spec: &VmSpec) -> AskedFor {
    (environment.digest.clone(), spec.vcpu_count, spec.mem_mib, spec.disk_mib, spec.network.has_nic())
}

/// What a template of this machine is named by; none where its VMM cannot save one.
fn shape(vmm: &Driver, spec: &MachineSpec, disk_mib: u32, has_nic: bool) -> Option<TemplateShape> {
    let Capabilities { snapshot: true, .. } = vmm.capabilities() else { return None };
    // A machine that was saved with a network device goes on only with one, and the other way round.
    let fingerprint = vmm.fingerprint(spec, has_nic);
    Some(TemplateShape {
        vcpus: spec.vcpus,
        memory_mib: spec.memory_mib,
        disk_mib,
        machine: fingerprint.machine,
        tsc_khz: fingerprint.tsc_khz,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_step_of_a_template_that_never_ends_is_given_up() {
        let never = std::future::pending::<Result<(), Error>>();
        let what = "the guest did not end its commands";
        let error = in_time(what, Duration::from_millis(20), never).await.expect_err("given up");
        assert!(error.to_string().contains(what), "{error}");
        let done = in_time(what, Duration::from_secs(60), std::future::ready(Ok(7))).await;
        assert_eq!(done.expect("in time"), 7);
    }
}
