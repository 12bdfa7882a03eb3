//! Where commands run, and the one place where a machine is handed out.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use pyro_net::Network;
use pyro_vmm::Isolation;

use crate::engine::Engine;
use crate::error::{Error, ErrorKind};
use crate::live::{Boot, Running, StartTimes, unavailable};
use crate::ports::{Bound, Ports};
use crate::spec::VmSpec;

/// Where the commands of a VM or a task run now.
#[derive(Clone, Debug, Default)]
pub(crate) enum Place {
    /// Nowhere: it was not started, or it is stopped.
    #[default]
    None,
    /// In its guest. The guest ends when the last copy is dropped.
    Guest(Arc<Running>),
    /// On the host, because its caller has opted into that.
    Host(Arc<Host>),
}

/// The host as a place for commands.
#[derive(Debug)]
pub(crate) struct Host {
    /// Their working directory.
    pub(crate) workspace: PathBuf,
    /// Why there is no guest.
    reason: String,
}

/// How a command runs, as records and results name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Manner {
    pub(crate) execution_mode: &'static str,
    pub(crate) isolation: &'static str,
    pub(crate) start_mode: &'static str,
}

/// What a machine must satisfy before its caller gets it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    /// The least isolation.
    pub(crate) isolation: Option<Isolation>,
    /// Whether the host may take the place of a guest.
    pub(crate) allow_host: bool,
    /// Whether it must have a network under a policy. The host's own network is under none.
    pub(crate) network: bool,
    /// Whether ports of it are published. The host's own are the host's.
    pub(crate) ports: bool,
}

impl Place {
    pub(crate) fn is_none(&self) -> bool {
        matches!(self, Self::None)
    }

    /// Returns how commands run here, or `None` if no command can run.
    pub(crate) fn manner(&self) -> Option<Manner> {
        match self {
            Self::None => None,
            Self::Guest(running) => Some(Manner {
                execution_mode: running.execution_mode,
                isolation: running.isolation.as_str(),
                start_mode: running.start_mode(),
            }),
            Self::Host(_) => {
                Some(Manner { execution_mode: "host_compat", isolation: "none", start_mode: "cold" })
            }
        }
    }

    /// Puts what is to be known of it into a record's metadata, in place of what was there of an earlier one.
    pub(crate) fn describe(&self, metadata: &mut BTreeMap<String, String>) {
        for key in ["confinement", "unconfined_vmm", "cold_reason", "host_compat_reason"] {
            metadata.remove(key);
        }
        match self {
            Self::None => {}
            Self::Guest(running) => {
                metadata.insert("confinement".to_owned(), running.machine.confinement().to_string());
                if running.machine.confinement().is_unconfined() {
                    metadata.insert("unconfined_vmm".to_owned(), "true".to_owned());
                }
                metadata.extend(running.cold_reason.clone().map(|reason| ("cold_reason".to_owned(), reason)));
            }
            Self::Host(host) => {
                metadata.insert("host_compat_reason".to_owned(), host.reason.clone());
            }
        }
    }

    /// What the caller should know of the start.
    pub(crate) fn warning(&self) -> Option<&str> {
        match self {
            Self::Guest(running) => running.warning(),
            Self::None | Self::Host(_) => None,
        }
    }

    /// The guest's network, if it has one.
    pub(crate) fn network(&self) -> Option<&Network> {
        match self {
            Self::Guest(running) => running.network.as_ref(),
            Self::None | Self::Host(_) => None,
        }
    }

    /// The published ports of the guest, if there is one.
    pub(crate) fn ports(&self) -> Option<&Ports> {
        match self {
            Self::Guest(running) => Some(&running.ports),
            Self::None | Self::Host(_) => None,
        }
    }

    /// Has sockets lead to the guest.
    pub(crate) fn publish(&self, bound: Vec<Bound>) -> Result<(), Error> {
        match self.ports() {
            Some(ports) => ports.serve(bound),
            None if bound.is_empty() => Ok(()),
            None => Err(unavailable("there is no guest whose ports could be published")),
        }
    }

    /// Powers the guest off cleanly, if there is one; its disk is whole when this returns.
    pub(crate) async fn power_off(&self) {
        if let Self::Guest(running) = self {
            running.power_off().await;
        }
    }

    /// Kills the guest, if there is one; it has ended when this returns.
    pub(crate) async fn kill(&self) {
        if let Self::Guest(running) = self {
            running.machine.kill().await;
        }
    }
}

impl Terms {
    pub(crate) fn of(spec: &VmSpec) -> Self {
        Self {
            isolation: spec.require_isolation,
            allow_host: spec.allow_host_compat,
            network: spec.network.has_nic(),
            ports: !spec.publish.is_empty(),
        }
    }

    /// Checks a place that is about to be handed out, whether it was booted, restored, kept as a spare, or is the host.
    pub(crate) fn check(&self, place: &Place) -> Result<(), Error> {
        match place {
            Place::Guest(running) if running.network.is_some() != self.network => {
                Err(unavailable("the machine has another network than was asked for"))
            }
            Place::Guest(running) => self.check_isolation(running.isolation),
            Place::Host(_) if self.may_use_host() => Ok(()),
            Place::Host(host) => Err(Error::new(ErrorKind::GuestUnavailable, host.reason.clone())),
            Place::None => Err(unavailable("the machine is gone")),
        }
    }

    /// Checks the isolation that a guest has, or would have.
    pub(crate) fn check_isolation(&self, given: Isolation) -> Result<(), Error> {
        match self.isolation {
            Some(required) if given < required => {
                let text = format!("isolation '{required}' was required; this host gives '{given}'");
                Err(Error::new(ErrorKind::IsolationUnavailable, text)
                    .hint("run `pyro doctor` to see why, or require less"))
            }
            _ => Ok(()),
        }
    }

    /// Whether the host may run the commands: it isolates nothing and keeps no network policy, so whoever requires one of
    /// these excludes it.
    pub(crate) fn may_use_host(&self) -> bool {
        self.allow_host && self.isolation.is_none() && !self.network && !self.ports
    }
}

impl Engine {
    /// Starts a machine, by its template or by booting it; where no guest can be had and the terms allow it, the host
    /// takes its place. `boot` is none where no VMM is installed.
    pub(crate) async fn hand_out(
        &self,
        boot: Option<Boot<'_>>,
        workspace: PathBuf,
        terms: Terms,
    ) -> Result<(Place, StartTimes), Error> {
        let booted = match boot {
            Some(boot) => self.boot(&boot, terms).await,
            None => Err(unavailable("no VMM is installed")),
        };
        let (place, times) = match booted {
            Ok((running, times)) => (Place::Guest(Arc::new(running)), times),
            Err(error) if error.kind() == ErrorKind::GuestUnavailable && terms.may_use_host() => {
                match fs_err::create_dir(&workspace) {
                    Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                        return Err(Error::host("the workspace", &error));
                    }
                    _ => {}
                }
                let host = Host { workspace, reason: error.to_string() };
                (Place::Host(Arc::new(host)), StartTimes::default())
            }
            Err(error) => return Err(error),
        };
        terms.check(&place)?;
        Ok((place, times))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Place {
        Place::Host(Arc::new(Host { workspace: PathBuf::new(), reason: "no VMM is installed".to_owned() }))
    }

    #[test]
    fn the_host_is_handed_out_only_to_a_caller_who_opted_in_and_requires_nothing() {
        let opted_in = Terms { isolation: None, allow_host: true, network: false, ports: false };
        opted_in.check(&host()).expect("allowed");
        for terms in [
            Terms { allow_host: false, ..opted_in },
            Terms { isolation: Some(Isolation::QemuTcg), ..opted_in },
            Terms { network: true, ..opted_in },
            Terms { ports: true, ..opted_in },
        ] {
            let refused = terms.check(&host()).expect_err("not allowed");
            assert_eq!(refused.kind(), ErrorKind::GuestUnavailable);
        }
    }

    #[test]
    fn an_absent_machine_is_not_the_host() {
        assert_eq!(Place::None.manner(), None);
        Terms { isolation: None, allow_host: true, network: false, ports: false }
            .check(&Place::None)
            .expect_err("there is no machine");
        assert_eq!(host().manner().map(|manner| manner.isolation), Some("none"));
    }
}
