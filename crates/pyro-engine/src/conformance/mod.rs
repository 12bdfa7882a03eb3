//! One suite for every driver: what a machine must do, whichever VMM runs it.
//!
//! The cases have the same names on each. They run one after another on one driver, and those that only talk to a
//! guest share one. `PYRO_TEST_GUEST` names a directory with `vmlinux`, `initramfs`, `rootfs` and `overlay`; without
//! it, or without the VMM, a driver's run says that it is skipped. `PYRO_TEST_CASES` holds parts of the names
//! of the cases to run, with commas between them, or of those to leave out, each with a minus sign before it.

mod bench;
mod confinement;
mod drivers;
mod guest;
mod inject;
mod machine;
mod network;
mod owner;

use std::path::PathBuf;

use self::bench::Bench;
use self::drivers::Had;

/// Runs cases in turn, each whatever came of those before, and tells how many have passed.
struct Suite {
    name: &'static str,
    bench: Bench,
    /// Parts of the names of the cases that are run; none: all.
    only: Vec<String>,
    /// Parts of the names of those that are not.
    without: Vec<String>,
    passed: Vec<&'static str>,
    failed: Vec<&'static str>,
}

impl Suite {
    async fn case(&mut self, name: &'static str, case: impl AsyncFnOnce(&Bench)) {
        let in_name = |part: &String| name.contains(part.as_str());
        if !self.only.is_empty() && !self.only.iter().any(in_name) || self.without.iter().any(in_name) {
            return;
        }
        let began = std::time::Instant::now();
        let outcome = futures_util::FutureExt::catch_unwind(std::panic::AssertUnwindSafe(case(&self.bench)));
        let (word, list) = match outcome.await {
            Ok(()) => ("passed", &mut self.passed),
            Err(_panicked) => ("FAILED", &mut self.failed),
        };
        list.push(name);
        println!("conformance: {}: {name}: {word} ({:.1} s)", self.name, began.elapsed().as_secs_f64());
    }

    fn end(self) {
        println!("conformance: {}: {} cases passed", self.name, self.passed.len());
        assert!(self.failed.is_empty(), "{} failed: {}", self.name, self.failed.join(", "));
    }
}

/// All cases, on one driver.
async fn all(name: &'static str, (driver, _kept): Had, files: PathBuf) {
    let bench = Bench::new(driver, files);
    let chosen = std::env::var("PYRO_TEST_CASES").unwrap_or_default();
    let (mut only, mut without) = (Vec::new(), Vec::new());
    for part in chosen.split(',').filter(|part| !part.is_empty()) {
        match part.strip_prefix('-') {
            Some(part) => without.push(part.to_owned()),
            None => only.push(part.to_owned()),
        }
    }
    let mut suite = Suite { name, bench, only, without, passed: Vec::new(), failed: Vec::new() };
    let shared = suite.bench.boot().await;
    suite
        .case("a_command_has_its_output_and_its_exit_code", async |_| guest::exit_codes(&shared).await)
        .await;
    suite.case("a_command_that_dies_of_a_signal_says_so", async |_| guest::signals(&shared).await).await;
    suite.case("bytes_arrive_as_they_were_written", async |_| guest::bytes(&shared).await).await;
    suite.case("input_reaches_a_command", async |_| guest::stdin(&shared).await).await;
    suite.case("many_commands_run_at_once", async |_| guest::many(&shared).await).await;
    suite.case("a_command_ends_when_its_time_is_up", async |_| guest::timeout(&shared).await).await;
    suite.case("the_image_is_below_and_cannot_be_written", async |_| guest::disks(&shared).await).await;
    suite.case("a_flood_on_the_console_is_bounded", async |_| guest::console_flood(&shared).await).await;
    suite.case("a_guest_out_of_memory_lives_on", async |_| guest::out_of_memory(&shared).await).await;
    suite.case("a_group_that_was_changed_serves_no_other", async |_| guest::groups(&shared).await).await;
    suite.case("the_vmm_is_confined", async |_| confinement::is_there(&shared)).await;
    suite.case("a_vmm_cannot_reach_the_host", async |bench| confinement::booted_holds(bench).await).await;
    suite.case("a_paused_guest_waits", async |_| machine::pause(&shared).await).await;
    suite.case("a_power_off_ends_the_machine", async |bench| machine::power_off(bench, shared).await).await;
    suite.case("a_disk_outlives_its_machine", async |bench| machine::disk_stays(bench).await).await;
    suite.case("a_killed_vmm_is_noticed", async |bench| machine::killed(bench).await).await;
    suite.case("a_dropped_machine_leaves_nothing", async |bench| machine::dropped(bench).await).await;
    suite.case("a_machine_dies_with_its_owner", async |bench| owner::killed(bench).await).await;
    suite.case("a_panic_of_the_guest_is_told", async |bench| machine::panics(bench).await).await;
    suite.case("a_saved_machine_goes_on_in_others", async |bench| machine::restores(bench).await).await;
    suite.case("a_template_serves_24_times", async |bench| machine::template(bench).await).await;
    suite
        .case("a_guest_reaches_what_its_policy_allows", async |bench| {
            network::reaches_what_is_allowed(bench).await
        })
        .await;
    suite.case("a_kernel_that_is_none_is_refused", async |bench| machine::no_kernel(bench).await).await;
    suite.case("a_missing_element_is_noticed", async |bench| confinement::is_missed(bench).await).await;
    suite.end();
}

fn files(test: &str) -> Option<PathBuf> {
    let files = std::env::var_os("PYRO_TEST_GUEST").map(PathBuf::from);
    if files.is_none() {
        println!("skipped: {test}: PYRO_TEST_GUEST is not set");
    }
    files
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conformance_of_qemu() {
    const TEST: &str = "conformance_of_qemu";
    let Some(files) = files(TEST) else { return };
    match drivers::qemu() {
        Ok(had) => all("qemu", had, files).await,
        Err(why) => println!("skipped: {TEST}: {why}"),
    }
}

/// As root it has a user of its own, else a user namespace: the suite is run as root and as nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conformance_of_firecracker() {
    const TEST: &str = "conformance_of_firecracker";
    let Some(files) = files(TEST) else { return };
    match drivers::firecracker() {
        Ok((name, had)) => all(name, had, files).await,
        Err(why) => println!("skipped: {TEST}: {why}"),
    }
}
