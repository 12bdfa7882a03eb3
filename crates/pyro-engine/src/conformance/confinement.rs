//! Cases about what keeps the VMM apart from the host, by the kernel's account of its process.

use pyro_vmm::{Confine, Confinement, Driver, Element, Firecracker, LaunchError, Vmm};

use super::bench::{Bench, Guest};

/// What a driver promises.
fn promised(driver: &Driver) -> Vec<Element> {
    let Driver::Firecracker(firecracker) = driver else {
        return vec![Element::NoNewPrivileges, Element::Seccomp];
    };
    let mut elements = vec![
        Element::IpcNamespace,
        Element::Limits,
        Element::MountNamespace,
        Element::NetworkNamespace,
        Element::NoCapabilities,
        Element::NoNewPrivileges,
        Element::PidNamespace,
        Element::Root,
        Element::Seccomp,
        Element::UtsNamespace,
    ];
    match firecracker.config().confine {
        Confine::Jailer(_) => elements.extend([Element::OwnUser, Element::Cgroup]),
        Confine::Namespaces => elements.push(Element::UserNamespace),
    }
    elements
}

pub(super) fn is_there(bench: &Bench, guest: &Guest) {
    let observed = Confinement::observed(guest.running.machine.pid());
    assert_eq!(observed.lacks(&promised(&bench.driver)), None, "{observed}");
    // The record of a machine says the same.
    let recorded = guest.running.machine.confinement();
    assert_eq!(recorded.lacks(&promised(&bench.driver)), None, "{recorded}");
    let (recorded, observed) = (recorded.to_string(), observed.to_string());
    assert!(recorded.starts_with(&observed), "{recorded} against {observed}");
}

/// A launch that leaves one element out is refused, and says which.
pub(super) async fn is_missed(bench: &Bench) {
    let Driver::Firecracker(firecracker) = &bench.driver else {
        // QEMU's own sandbox is one switch: without it both of its elements are missing.
        return qemu_without_sandbox(bench).await;
    };
    let mut omissible = vec![
        Element::IpcNamespace,
        Element::Limits,
        Element::NetworkNamespace,
        Element::Seccomp,
        Element::UtsNamespace,
    ];
    if let Confine::Jailer(_) = firecracker.config().confine {
        omissible.extend([Element::OwnUser, Element::Cgroup]);
    }
    for element in omissible {
        let mut config = firecracker.config().clone();
        config.omitted = Some(element);
        let spec = bench.spec();
        let launched = Firecracker::new(config).launch(&spec).await;
        match launched {
            Err(LaunchError::Unconfined { missing }) => {
                assert!(missing.contains(element.as_str()), "{missing} is missing instead of {element:?}");
            }
            other => panic!("without {element:?}: {other:?}"),
        }
        assert!(!spec.dir.join("jail").exists());
    }
}

async fn qemu_without_sandbox(bench: &Bench) {
    let Driver::Qemu(qemu) = &bench.driver else { return };
    let mut config = qemu.config().clone();
    config.sandbox = false;
    let machine = pyro_vmm::Qemu::new(config).launch(&bench.spec()).await.expect("launched");
    let lacks = machine.confinement().lacks(&promised(&bench.driver));
    assert_eq!(lacks.as_deref(), Some("no_new_privileges, seccomp"));
    machine.kill().await;
}
