//! Whether KVM works, as opposed to whether `/dev/kvm` exists.
//!
//! Inside some virtual machines the device exists and guests run a thousand times too slowly to boot. So a
//! guest is run: one million turns of a loop of two instructions, for 5 ms at most, longer where it has not
//! begun by then. A processor does that in half a millisecond.
//!
//! The virtual processor runs on a thread of its own, and no signal handler is installed: the thread blocks
//! one real-time signal, KVM unblocks it while the guest runs (`KVM_SET_SIGNAL_MASK`), and a signal to that
//! thread makes `KVM_RUN` return and stays pending, undelivered, until the thread ends. Should even that not
//! bring it back, the thread is left behind, and the answer is "unusable".

use std::fs::File;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use fs_err::os::unix::fs::OpenOptionsExt;
use serde::{Deserialize, Serialize};

#[cfg(target_arch = "x86_64")]
use super::vcpu::{Stop, Vcpu};

const ITERATIONS: u64 = 1_000_000;
const DEADLINE: Duration = Duration::from_millis(5);
/// A processor needs 0.3 to 0.5 ns for one turn, the slow hosts that were seen more than 1000 ns.
const NANOS_PER_ITERATION_MAX: f64 = 50.0;
/// How long making the guest may take: half a millisecond where it was seen.
const SETUP_DEADLINE: Duration = Duration::from_millis(250);
/// How long the guest may take to stop after the signal.
const STOP_DEADLINE: Duration = Duration::from_millis(100);

/// What a probe of KVM has found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KvmProbe {
    /// The device exists.
    pub exists: bool,
    /// This process may read it.
    pub readable: bool,
    /// This process may write it.
    pub writable: bool,
    /// A guest ran on it at the speed of a processor.
    pub usable: bool,
    /// The finding in words, for people.
    pub why: String,
    /// How many turns of the loop the guest made, of 1,000,000.
    pub iterations: u64,
    /// How long one took; 0 when there was none.
    pub ns_per_iteration: f64,
}

/// How often a guest may fail before it counts: on a crowded host a thread may not be scheduled in time.
const ATTEMPTS: u32 = 3;
/// How much longer the next guest may take when one has not made a single turn: that tells nothing of the pace of KVM, but
/// that the host was busy, or that it emulates the processor and had all of KVM to translate first.
const PATIENCE: u32 = 3;

/// Probes the KVM device at `path`: in some 18 ms at most where it is too slow, in 70 ms where no guest gets anywhere.
///
/// It changes nothing in this process that others could see: no signal handler, no lasting thread.
pub fn probe_kvm(path: &Path) -> KvmProbe {
    let mut deadline = DEADLINE;
    let mut probe = probe_once(path, deadline);
    for _ in 1..ATTEMPTS {
        if probe.usable || !probe.writable {
            break;
        }
        if probe.iterations == 0 {
            deadline *= PATIENCE;
        }
        probe = probe_once(path, deadline);
    }
    probe
}

fn probe_once(path: &Path, deadline: Duration) -> KvmProbe {
    use rustix::fs::Access;

    let may = |access| rustix::fs::access(path, access).is_ok();
    let mut probe = KvmProbe {
        exists: may(Access::EXISTS),
        readable: may(Access::READ_OK),
        writable: may(Access::WRITE_OK),
        usable: false,
        why: String::new(),
        iterations: 0,
        ns_per_iteration: 0.0,
    };
    if !probe.exists {
        probe.why = format!("{} does not exist", path.display());
        return probe;
    }
    // Opening it for reading and writing is what every VMM does; a pipe in its place must not hang.
    let device = fs_err::OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path);
    match device {
        Ok(device) => judge(&mut probe, run_guest(device.into(), deadline)),
        Err(error) => probe.why = error.to_string(),
    }
    probe
}

/// How a run of the guest went.
struct Run {
    iterations: u64,
    took: Duration,
    finished: bool,
}

fn judge(probe: &mut KvmProbe, run: Result<Run, String>) {
    let run = match run {
        Ok(run) => run,
        Err(why) => {
            probe.why = why;
            return;
        }
    };
    probe.iterations = run.iterations;
    if run.iterations > 0 {
        #[expect(clippy::cast_precision_loss, reason = "a million has room in a double")]
        let iterations = run.iterations as f64;
        probe.ns_per_iteration = run.took.as_secs_f64() * 1e9 / iterations;
    }
    // A run that was stopped has told its pace as well: a helper machine's KVM, itself emulated, takes longer than the
    // deadline, and boots guests all the same.
    probe.usable = run.iterations > 0 && probe.ns_per_iteration < NANOS_PER_ITERATION_MAX;
    let pace = format!("{:.1} ns for each turn of a guest's loop", probe.ns_per_iteration);
    probe.why = match (probe.usable, run.finished) {
        (true, _) => format!("works: {pace}"),
        (false, true) => format!("too slow to boot a guest: {pace}"),
        (false, false) if run.iterations == 0 => {
            format!("too slow to boot a guest: one had not begun its work after {} ms", run.took.as_millis())
        }
        (false, false) => format!("too slow to boot a guest: {pace}, stopped after {} turns", run.iterations),
    };
}

/// Runs the guest on a thread of its own, and stops it at the deadline.
#[cfg(target_arch = "x86_64")]
fn run_guest(device: File, deadline: Duration) -> Result<Run, String> {
    let (ready_sender, ready) = channel();
    let (done_sender, done) = channel();
    let thread = std::thread::Builder::new().name("pyro-kvm-probe".to_owned()).stack_size(64 << 10);
    let guest = move || {
        let run = Stop::prepare_thread()
            .and_then(|stop| Ok((stop, Vcpu::new(&device, ITERATIONS, stop)?)))
            .map_err(|error| format!("KVM refuses a guest: {error}"));
        let mut vcpu = match run {
            Ok((stop, vcpu)) => {
                // Nobody may be waiting any more: it took too long, and the guest is then not started.
                if ready_sender.send(stop).is_err() {
                    return;
                }
                vcpu
            }
            Err(why) => {
                done_sender.send(Err(why)).ok();
                return;
            }
        };
        let start = Instant::now();
        let result = vcpu.run();
        let took = start.elapsed();
        let run = result.map(|(iterations, finished)| Run { iterations, took, finished });
        done_sender.send(run.map_err(|error| format!("KVM does not run a guest: {error}"))).ok();
        // Taking the machine down can take milliseconds; nobody waits for it.
    };
    let thread = thread.spawn(guest).map_err(|error| format!("no thread for the probe: {error}"))?;
    let Ok(stop) = ready.recv_timeout(SETUP_DEADLINE) else {
        // Either it said why, or it is still at it.
        return done.try_recv().unwrap_or_else(|_| Err("KVM does not make a guest in time".to_owned()));
    };
    match done.recv_timeout(deadline) {
        Ok(run) => return run,
        Err(RecvTimeoutError::Disconnected) => return Err("the probe failed".to_owned()),
        Err(RecvTimeoutError::Timeout) => {}
    }
    // The thread has not been joined, so its handle still names it.
    stop.kick(&thread);
    wait_for_stop(&done)
}

#[cfg(target_arch = "x86_64")]
fn wait_for_stop(done: &Receiver<Result<Run, String>>) -> Result<Run, String> {
    done.recv_timeout(STOP_DEADLINE).unwrap_or_else(|_| Err("a guest on KVM cannot be stopped".to_owned()))
}

#[cfg(not(target_arch = "x86_64"))]
fn run_guest(_device: File, _deadline: Duration) -> Result<Run, String> {
    Err("the probe knows only x86-64".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_kvm_is_found_unusable_and_does_no_harm() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("file");
        fs_err::write(&file, "").expect("written");
        let pipe = dir.path().join("pipe");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0)
            .expect("made");
        for path in [dir.path().join("missing"), dir.path().to_owned(), file, pipe, "/dev/null".into()] {
            let probe = probe_kvm(&path);
            assert!(!probe.usable, "{path:?}: {probe:?}");
            assert!(!probe.why.is_empty(), "{path:?}");
            assert_eq!(probe.iterations, 0);
        }
    }

    #[test]
    fn probes_are_quick_and_agree() {
        let timed = |_| {
            let start = Instant::now();
            (probe_kvm(Path::new("/dev/kvm")), start.elapsed())
        };
        let (probes, times): (Vec<KvmProbe>, Vec<Duration>) = (0..20).map(timed).unzip();
        let (quickest, slowest) = (times.iter().min().expect("twenty"), times.iter().max().expect("twenty"));
        println!("20 probes took {quickest:?} to {slowest:?}; the last: {:?}", probes[19]);
        assert!(probes.iter().all(|probe| probe.usable == probes[0].usable), "{probes:?}");
        // Other tests run beside this one, so this is no measurement, only a guard against hanging.
        assert!(*slowest < Duration::from_secs(20), "{times:?}");
    }

    #[test]
    fn several_threads_may_probe_at_once() {
        let probes: Vec<_> =
            (0..4).map(|_| std::thread::spawn(|| probe_kvm(Path::new("/dev/kvm")).why)).collect();
        for probe in probes {
            assert!(!probe.join().expect("no panic").is_empty());
        }
    }

    #[test]
    fn the_verdict_follows_the_pace() {
        let mut probe = probe_kvm(Path::new("/nonexistent"));
        judge(
            &mut probe,
            Ok(Run { iterations: ITERATIONS, took: Duration::from_micros(400), finished: true }),
        );
        assert!(probe.usable, "{probe:?}");
        judge(
            &mut probe,
            Ok(Run { iterations: ITERATIONS, took: Duration::from_millis(51), finished: true }),
        );
        assert!(!probe.usable, "{probe:?}");
        judge(&mut probe, Ok(Run { iterations: 4500, took: Duration::from_millis(5), finished: false }));
        assert!(!probe.usable && probe.why.contains("1111.1 ns"), "{probe:?}");
        judge(&mut probe, Ok(Run { iterations: 0, took: Duration::from_millis(5), finished: false }));
        assert!(!probe.usable && probe.why.contains("had not begun its work after 5 ms"), "{probe:?}");
    }
}
