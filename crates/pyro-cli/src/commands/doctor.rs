//! `pyro doctor`: what this machine can do, and what to mend. It needs nothing to work.

use std::process::ExitCode;
use std::time::Instant;

use pyro_engine::Engine;
use serde_json::json;

use crate::config;
use crate::failure::Failure;
use crate::printer::Printer;

pub(crate) fn run(printer: &Printer) -> Result<ExitCode, Failure> {
    let began = Instant::now();
    let engine = Engine::open(config::engine(None)?)?;
    let facts = engine.host_facts();
    let isolation = engine.isolation();
    let checks = engine.environments().doctor();
    let mut issues = Vec::new();
    if let Err(error) = &isolation {
        issues.push((error.to_string(), error.remedy().map(str::to_owned)));
    }
    for check in checks.iter().filter(|check| !check.ok) {
        issues.push((format!("{}: {}", check.name, check.detail), check.remedy.clone()));
    }
    let runs = isolation.is_ok();
    let tier = isolation.as_ref().map_or("none", |isolation| isolation.as_str());
    let milliseconds = began.elapsed().as_secs_f64() * 1e3;
    let platform = format!("{}-{}", std::env::consts::OS, std::env::consts::ARCH);
    if printer.json() {
        let issues: Vec<_> =
            issues.iter().map(|(issue, remedy)| json!({ "issue": issue, "remedy": remedy })).collect();
        let checks: Vec<_> = checks
            .iter()
            .map(|check| json!({ "name": check.name, "ok": check.ok, "detail": check.detail }))
            .collect();
        printer.object(&json!({
            "platform": platform,
            "runtime_ok": runs,
            "isolation": tier,
            "kvm": {
                "exists": facts.kvm.exists, "readable": facts.kvm.readable, "writable": facts.kvm.writable,
                "usable": facts.kvm.usable, "why": facts.kvm.why,
            },
            "live_vms": engine.live_vms()?,
            "checks": checks,
            "issues": issues,
            "duration_ms": milliseconds,
        }));
    } else {
        let word = |yes| if yes { "yes" } else { "no" };
        let kvm = &facts.kvm;
        printer.data(&format!("Platform: {platform}"));
        printer.data(&format!("Runtime: {}", if runs { "PASS" } else { "FAIL" }));
        printer.data(&format!(
            "KVM: exists={} readable={} writable={} usable={} ({})",
            word(kvm.exists),
            word(kvm.readable),
            word(kvm.writable),
            word(kvm.usable),
            kvm.why
        ));
        printer.data(&format!("Isolation: {tier}"));
        printer.data(&format!("Live machines: {}", engine.live_vms()?));
        for check in &checks {
            printer.data(&format!(
                "{} {}: {}",
                if check.ok { "PASS" } else { "FAIL" },
                check.name,
                check.detail
            ));
        }
        printer.data(&format!("Issues: {}", if issues.is_empty() { "none" } else { "" }));
        for (issue, remedy) in &issues {
            printer.data(&format!("- {issue}"));
            if let Some(remedy) = remedy {
                printer.data(&format!("  remedy: {remedy}"));
            }
        }
        printer.say(&format!("examined in {milliseconds:.0} ms"));
    }
    Ok(ExitCode::from(u8::from(!runs)))
}
