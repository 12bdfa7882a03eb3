//! Owners and VMMs of guests with a network, killed at random moments: the host is as it was before. A program of its own, as
//! machines of other tests would be found on the host, too.

#[path = "it/support.rs"]
#[expect(dead_code, reason = "this test needs a part of it")]
mod support;

use std::collections::BTreeSet;
use std::time::Duration;

use fs_err as fs;
use support::{Dice, Pyro, kill};

/// How many are killed, and the seed of their moments.
const KILLS: &str = "PYRO_TEST_KILLS";

/// What a guest's network could leave behind on this host.
#[derive(Debug, PartialEq, Eq)]
struct Host {
    links: BTreeSet<String>,
    routes: String,
    forwarding: String,
    rules: String,
    listening: BTreeSet<String>,
    namespaces: BTreeSet<String>,
}

impl Host {
    fn look() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let links = read("/proc/net/dev");
        let links =
            links.lines().filter_map(|line| Some(line.split_once(':')?.0.trim().to_owned())).collect();
        // In this table the state of a socket that listens is 0A.
        let sockets = read("/proc/net/tcp");
        let listening = sockets.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let listening =
            listening.filter(|words| words.get(3) == Some(&"0A")).map(|words| words[1].to_owned()).collect();
        let all = fs::read_dir("/proc").expect("proc").flatten();
        let namespaces = all
            .filter_map(|entry| fs::read_link(entry.path().join("ns/net")).ok())
            .map(|link| link.to_string_lossy().into_owned())
            .collect();
        Self {
            links,
            routes: read("/proc/net/route"),
            forwarding: read("/proc/sys/net/ipv4/ip_forward"),
            // The rules of this host by either of the kernel's two ways, as far as it shows them.
            rules: read("/proc/net/ip_tables_names") + &read("/proc/net/nf_conntrack"),
            listening,
            namespaces,
        }
    }

    /// Waits until it is as it was.
    fn await_like(before: &Self, pyro: &Pyro) {
        pyro.until("the host is as it was before", |_| {
            let now = Self::look();
            now.namespaces.is_subset(&before.namespaces)
                && now.listening.is_subset(&before.listening)
                && now.links == before.links
        });
        let now = Self::look();
        assert_eq!(
            (&now.routes, &now.forwarding, &now.rules),
            (&before.routes, &before.forwarding, &before.rules)
        );
    }
}

/// Namespaces that the kernel has, those that no process is in among them; none where it does not tell.
fn in_the_kernel() -> Option<u64> {
    drop(fs::write("/sys/kernel/slab/net_namespace/shrink", "1"));
    let slabs = fs::read_to_string("/proc/slabinfo").ok()?;
    let line = slabs.lines().find(|line| line.starts_with("net_namespace "))?.to_owned();
    line.split_whitespace().nth(1)?.parse().ok()
}

#[test]
fn nothing_of_a_network_is_left_when_its_owner_or_its_vmm_is_killed() {
    let kills = std::env::var(KILLS).ok().and_then(|text| text.parse().ok()).unwrap_or(12);
    let pyro = Pyro::new();
    let line =
        ["run", "debian:12", "--mem-mib", "256", "--network", "--publish", "0:80", "--", "sleep", "60"];
    // Once in peace: what stays loaded, such as a template, stays.
    assert!(pyro.run(&[&line[..7], &["--", "true"]].concat()).status.success());
    let (before, in_kernel) = (Host::look(), in_the_kernel());
    let mut dice = Dice::new(7);
    for at in 0..kills {
        let mut owner = pyro.spawn(&line);
        std::thread::sleep(Duration::from_millis(dice.below(700)));
        let pid = i32::try_from(owner.id()).expect("a number");
        let name = |pid: &i32| fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        let vmm = pyro.processes().into_iter().find(|pid| name(pid).starts_with("qemu"));
        if let Some(vmm) = vmm.filter(|_| at % 2 == 1) {
            kill(vmm, "KILL");
            // Its owner ends, or boots another one, for a moment.
            std::thread::sleep(Duration::from_millis(dice.below(300)));
        }
        kill(pid, "KILL");
        owner.wait().expect("it ends");
    }
    pyro.until("all of them are gone", |pyro| pyro.processes().is_empty());
    Host::await_like(&before, &pyro);
    if let (Some(before), Some(after)) = (in_kernel, in_the_kernel()) {
        assert!(after <= before + 2, "namespaces in the kernel: {before} before, {after} after");
    }
    // The next look removes what is in directories.
    pyro.ok(&["task", "list"]);
    pyro.assert_empty();
}
