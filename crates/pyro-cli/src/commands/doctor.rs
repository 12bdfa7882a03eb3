//! `pyro doctor`: what this machine can do, and what to mend. It needs nothing to work.

use std::process::ExitCode;

use pyro_engine::Diagnosis;

use crate::config;
use crate::failure::Failure;
use crate::printer::Printer;

pub(crate) fn run(printer: &Printer) -> Result<ExitCode, Failure> {
    let found = Diagnosis::make(&config::engine(None)?);
    if printer.json() {
        printer.object(&found);
    } else {
        for line in lines(&found) {
            printer.data(&line);
        }
        printer.say(&format!("examined in {:.0} ms", found.duration_ms));
    }
    Ok(ExitCode::from(u8::from(!found.runtime_ok)))
}

fn lines(found: &Diagnosis) -> Vec<String> {
    let word = |yes: bool| if yes { "yes" } else { "no" };
    let mib = |free: Option<u64>| free.map_or_else(|| "unknown".to_owned(), |free| format!("{free} MiB"));
    let list = |names: &[String]| if names.is_empty() { "none".to_owned() } else { names.join(", ") };
    let (kvm, cache, state) = (&found.kvm, &found.environment_cache, &found.state);
    let mut lines = vec![
        format!("Platform: {}", found.platform),
        format!("Runtime: {}", if found.runtime_ok { "PASS" } else { "FAIL" }),
        format!(
            "KVM: exists={} readable={} writable={} usable={} ({})",
            word(kvm.exists),
            word(kvm.readable),
            word(kvm.writable),
            word(kvm.usable),
            kvm.why
        ),
        format!("Isolation: {}{}", found.isolation, caveat(&found.isolation)),
        found.vmm.as_ref().map_or_else(
            || "VMM: none".to_owned(),
            |vmm| {
                let (name, version, binary) = (&vmm.name, &vmm.version, &vmm.binary);
                format!("VMM: {name} {version} ({binary}) confinement={}", list(&vmm.confinement))
            },
        ),
        found.firecracker.as_ref().map_or_else(
            || "Firecracker: not installed (pyro env firecracker --from ARCHIVE installs it)".to_owned(),
            |found| format!("Firecracker: {} ({}, {})", found.version, found.binary, found.origin),
        ),
        format!(
            "Environment cache: {} installed={} free={}",
            cache.dir,
            list(&cache.installed),
            mib(cache.free_mib)
        ),
        format!(
            "State: {} free={} live={} of {} tasks={} task_disk={} MiB",
            state.dir,
            mib(state.free_mib),
            state.live_vms.map_or_else(|| "unknown".to_owned(), |live| live.to_string()),
            state.max_active_vms,
            state.tasks,
            state.task_disk_bytes >> 20
        ),
        format!(
            "Capabilities: guests={} tasks={} guest_network={} snapshots={} host_compat={}",
            word(found.capabilities.guests),
            word(found.capabilities.tasks),
            word(found.capabilities.guest_network),
            word(found.capabilities.snapshots),
            word(found.capabilities.host_compat)
        ),
        format!(
            "Networking: tun={} ip_forward={}",
            word(found.networking.tun_available),
            word(found.networking.ip_forward_enabled)
        ),
        format!(
            "Orphans: {}",
            if found.orphans.is_empty() {
                "none".to_owned()
            } else {
                format!("{} (removed now)", list(&found.orphans))
            }
        ),
    ];
    for check in &found.checks {
        lines.push(format!("{} {}: {}", if check.ok { "PASS" } else { "FAIL" }, check.name, check.detail));
    }
    lines
        .push(format!("Issues: {}", if found.issues.is_empty() { "none" } else { "" }).trim_end().to_owned());
    for issue in &found.issues {
        lines.push(format!("- {}", issue.issue));
        lines.push(format!("  remedy: {}", issue.remedy));
    }
    lines
}

fn caveat(isolation: &str) -> &'static str {
    match isolation {
        "qemu-tcg" => " (software emulation, which QEMU's own policy does not count as a hardened boundary)",
        _ => "",
    }
}
