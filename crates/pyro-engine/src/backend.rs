//! Which VMM runs the guests: the strongest that works here, or the one that was asked for.

use std::path::PathBuf;

use pyro_vmm::host::{HostFacts, find_qemu, firecracker_version};
use pyro_vmm::source::{self, Found, NAMED, SourceError};
use pyro_vmm::{Accel, BackendKind, Confine, Driver, Firecracker, FirecrackerConfig, Qemu, QemuConfig, Vmm};

use crate::engine::{Engine, EngineConfig};
use crate::error::{Error, ErrorKind};
use crate::live::{Boot, Running, StartTimes, not_launched, unavailable};
use crate::place::Terms;

const KVM_HINT: &str =
    "run `pyro doctor` to see why; without --backend, guests run in software where there is no KVM";

impl Engine {
    /// Boots a machine on the VMM that is chosen, and where that fails and nobody insists on it, on the next weaker one:
    /// a Firecracker may not be confinable here, and a KVM that passes its probe may still boot no guest.
    ///
    /// # Errors
    /// When none boots it; the first one's words.
    pub(crate) async fn boot(&self, boot: &Boot<'_>, terms: Terms) -> Result<(Running, StartTimes), Error> {
        let mut vmm = self.vmm()?;
        let mut weaker: Option<std::vec::IntoIter<Driver>> = None;
        let mut failed: Option<Error> = None;
        loop {
            // Before a weaker VMM is launched at all; what it gives may have changed since the caller asked.
            if let Err(refused) = terms.check_isolation(vmm.capabilities().isolation) {
                return Err(failed.unwrap_or(refused));
            }
            match self.start_on(&vmm, boot).await {
                Ok(booted) => {
                    // What has failed in software too was not KVM's fault.
                    if let Some(error) = failed.filter(|_| vmm.emulates()) {
                        HostFacts::distrust_kvm(&self.host_cache(), &error.to_string());
                    }
                    return Ok(booted);
                }
                Err(error) if error.kind() == ErrorKind::GuestUnavailable => {
                    let first = failed.take().unwrap_or(error);
                    match weaker.get_or_insert_with(|| self.weaker_than(&vmm).into_iter()).next() {
                        Some(next) => (vmm, failed) = (next, Some(first)),
                        None => return Err(first),
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The VMMs that take the place of one that boots no guest, the stronger first; none where it was asked for by name.
    fn weaker_than(&self, vmm: &Driver) -> Vec<Driver> {
        let mut weaker = Vec::new();
        if self.inner.config.backend.is_none() {
            let mut facts = HostFacts::load(&self.host_cache());
            if matches!(vmm, Driver::Firecracker(_)) {
                weaker.extend(self.qemu(&facts));
            }
            if facts.kvm.usable {
                facts.kvm.usable = false;
                weaker.extend(self.qemu(&facts));
            }
        }
        weaker
    }

    /// The VMM that a machine would have now.
    ///
    /// # Errors
    /// When the one that was asked for, or every one, cannot be used; the text says why.
    pub(crate) fn vmm(&self) -> Result<Driver, Error> {
        let facts = HostFacts::load(&self.host_cache());
        let asked = self.inner.config.backend.as_deref().and_then(BackendKind::named);
        match asked {
            Some(BackendKind::Firecracker) => {
                if !facts.kvm.usable {
                    let text = format!("backend 'firecracker' needs a KVM that works: {}", facts.kvm.why);
                    return Err(unavailable(&text).hint(KVM_HINT));
                }
                let found = self.find_firecracker().map_err(|error| broken(&error))?.ok_or_else(|| {
                    unavailable("firecracker is not installed")
                        .hint("install it: pyro env firecracker --from ARCHIVE, or set PYRO_FIRECRACKER")
                })?;
                self.firecracker(found)
            }
            None if facts.kvm.usable => match self.find_firecracker().map_err(|error| broken(&error))? {
                Some(found) if found.origin == NAMED => self.firecracker(found),
                // One that merely lies about and cannot be used is no reason to have none.
                Some(found) => self.firecracker(found).or_else(|_unusable| self.qemu(&facts)),
                None => self.qemu(&facts),
            },
            _ => self.qemu(&facts),
        }
    }

    /// The Firecracker that would be used if KVM works, and what it says of its version.
    ///
    /// # Errors
    /// When one was named that is not there, is too old, or does not run.
    pub(crate) fn known_firecracker(&self) -> Result<Option<(Found, String)>, Error> {
        let Some(found) = self.find_firecracker().map_err(|error| broken(&error))? else { return Ok(None) };
        let version = self.firecracker_version(&found)?;
        Ok(Some((found, version)))
    }

    /// Puts the tested Firecracker into the cache, out of an archive; see [`pyro_vmm::source::install`].
    ///
    /// # Errors
    /// When no archive is named, or it holds other bytes.
    pub async fn install_firecracker(&self, from: Option<PathBuf>) -> Result<Found, Error> {
        let from = from.or_else(|| self.inner.config.firecracker.clone()).ok_or_else(|| {
            Error::new(ErrorKind::InvalidValue, "no source of Firecracker was given")
                .hint("give --from ARCHIVE: a release's .tgz or a wheel, as a file or an https address")
        })?;
        let store = firecracker_store(&self.inner.config);
        let install = move || {
            source::install(&from, &store)
                .map_err(|error| Error::new(ErrorKind::Environment, error.to_string()).hint(error.hint()))
        };
        self.blocking(install).await
    }

    fn find_firecracker(&self) -> Result<Option<Found>, SourceError> {
        let config = &self.inner.config;
        source::find(config.firecracker.as_deref(), &firecracker_store(config), &config.tool_path)
    }

    fn firecracker_version(&self, found: &Found) -> Result<String, Error> {
        let version = firecracker_version(&found.firecracker, &self.host_cache()).map_err(|error| {
            unavailable(&error.to_string()).hint("install it again: pyro env firecracker --from ARCHIVE")
        })?;
        source::check_version(&found.firecracker, &version).map_err(|error| broken(&error))?;
        Ok(version)
    }

    fn firecracker(&self, found: Found) -> Result<Driver, Error> {
        let version = self.firecracker_version(&found)?;
        let binary = found.firecracker;
        let config = FirecrackerConfig { binary, version, confine: self.confine() };
        Ok(Driver::Firecracker(Firecracker::new(config)))
    }

    fn qemu(&self, facts: &HostFacts) -> Result<Driver, Error> {
        let binary = find_qemu(&self.inner.config.tool_path).ok_or_else(|| {
            unavailable("qemu-system-x86_64 is not installed").hint("apt-get install qemu-system-x86")
        })?;
        let accel = if facts.kvm.usable { Accel::Kvm } else { Accel::Tcg { tsc_khz: facts.tsc_khz } };
        let config = QemuConfig::ask(binary, &self.host_cache(), accel, self.confine()).map_err(|error| {
            let hint = "reinstall it: apt-get install --reinstall qemu-system-x86";
            unavailable(&error.to_string()).hint(hint)
        })?;
        Ok(Driver::Qemu(Qemu::new(config)))
    }

    /// Whether this host lets a VMM be kept apart from it, found out by making a jail with nothing in it.
    ///
    /// # Errors
    /// When the host refuses, or the VMM cannot be shown in a jail.
    pub(crate) fn probe_confinement(&self, vmm: &Driver) -> Result<(), Error> {
        let name = crate::files::random_hex(6).map_err(|error| Error::host("random numbers", &error))?;
        // What a killed process leaves there is swept.
        let dir = self.inner.registry.state_dir().join("trash").join(name);
        fs_err::create_dir(&dir).map_err(|error| Error::state(&dir, &error))?;
        let probed = vmm.probe_confinement(&dir);
        drop(fs_err::remove_dir_all(&dir));
        probed.map_err(|error| not_launched(&error))
    }

    fn confine(&self) -> Confine {
        if self.inner.config.unconfined_vmm { Confine::Nothing } else { Confine::JAIL }
    }
}

/// Checks the name of a backend.
pub(crate) fn check_name(name: Option<&str>) -> Result<(), Error> {
    match name {
        Some(name) if BackendKind::named(name).is_none() => {
            let names = BackendKind::ALL.map(BackendKind::as_str).join(", ");
            let text = format!("invalid backend; expected one of: {names}");
            Err(Error::new(ErrorKind::InvalidValue, text))
        }
        _ => Ok(()),
    }
}

/// Beside the environments, whose cache it is.
fn firecracker_store(config: &EngineConfig) -> PathBuf {
    config.cache_dir.join("firecracker")
}

fn broken(error: &SourceError) -> Error {
    unavailable(&error.to_string()).hint(error.hint())
}
