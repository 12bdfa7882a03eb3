//! The guest agent: PID 1 of every pyro microVM.
//!
//! It lives in the initramfs and stays there: the guest's own root is another mount namespace, into which
//! each command is placed and which never shows the agent. It speaks the protocol of `pyro-proto` over one
//! virtio-serial port, or a virtio socket. It resolves no names and loads nothing at run time, so it runs under any distribution.
//!
//! A failure to boot is told on the console, one line with the phase, and ends the guest: the host reads the
//! line from the console's log.

mod boot;
mod cgroup;
mod channel;
mod dial;
mod exec;
mod identity;
mod launch;
mod network;
mod port;
mod power;
mod reaper;
mod serve;
mod trust;
mod user;

use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    if rustix::process::getpid() != rustix::process::Pid::INIT {
        say("this program is the init of a pyro guest; it does nothing elsewhere");
        return ExitCode::FAILURE;
    }
    let guest = match boot::boot() {
        Ok(guest) => guest,
        Err(error) => {
            say(&format!("phase={} failed: {}", error.phase, error.cause));
            return ExitCode::FAILURE;
        }
    };
    launch::wait_for_turns();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let served = match runtime {
        // As a task of its own: whatever wakes the outermost future costs a call of the kernel.
        Ok(runtime) => runtime
            .block_on(async { tokio::spawn(serve::serve(guest)).await })
            .unwrap_or_else(|error| Err(std::io::Error::other(error))),
        Err(error) => Err(error),
    };
    if let Err(error) = served {
        say(&format!("phase=end failed: {error}"));
    }
    ExitCode::FAILURE
}

/// One line on the guest's console, for whoever reads the log of a guest that did not come up.
fn say(line: &str) {
    drop(writeln!(std::io::stderr(), "pyro-agent: {line}"));
}
