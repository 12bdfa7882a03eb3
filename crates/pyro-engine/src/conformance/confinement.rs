//! Cases about what keeps the VMM apart from the host, by the kernel's account of its process.

use pyro_vmm::{Confine, Confinement, Driver, Element, Firecracker, LaunchError, Qemu, Vmm};

use super::bench::{Bench, Guest};

pub(super) fn is_there(guest: &Guest) {
    let observed = Confinement::observed(guest.running.machine.pid());
    assert_eq!(observed.lacks(&Confine::JAIL.required()), None, "{observed}");
    // The record of a machine says the same.
    let recorded = guest.running.machine.confinement();
    assert_eq!(recorded.lacks(&Confine::JAIL.required()), None, "{recorded}");
    let (recorded, observed) = (recorded.to_string(), observed.to_string());
    assert!(recorded.starts_with(&observed), "{recorded} against {observed}");
}

/// A launch that leaves one element out is refused, and says which. The others cannot be left out: without mounts and
/// processes of its own there is no jail, and who is not root needs a user namespace for the rest.
pub(super) async fn is_missed(bench: &Bench) {
    const OMISSIBLE: [Element; 7] = [
        Element::Cgroup,
        Element::IpcNamespace,
        Element::Limits,
        Element::NetworkNamespace,
        Element::OwnUser,
        Element::Seccomp,
        Element::UtsNamespace,
    ];
    let required = Confine::JAIL.required();
    for element in OMISSIBLE.into_iter().filter(|element| required.contains(element)) {
        let confine = Confine::Jail { omitted: Some(element) };
        let driver = match &bench.driver {
            Driver::Firecracker(driver) => {
                let mut config = driver.config().clone();
                config.confine = confine;
                Driver::Firecracker(Firecracker::new(config))
            }
            Driver::Qemu(driver) => {
                let mut config = driver.config().clone();
                config.confine = confine;
                Driver::Qemu(Qemu::new(config))
            }
        };
        let spec = bench.spec();
        match driver.launch(&spec).await {
            Err(LaunchError::Unconfined { missing }) => {
                assert!(missing.contains(element.as_str()), "{missing} is missing instead of {element:?}");
            }
            other => panic!("without {element:?}: {other:?}"),
        }
        assert!(!spec.dir.join("jail").exists());
    }
}
