//! Cases about what keeps the VMM apart from the host, by the kernel's account of its process.

use std::path::PathBuf;

use pyro_vmm::{Confine, Confinement, Driver, Element, Firecracker, LaunchError, MachineSpec, Qemu, Vmm};

use super::bench::{Bench, Guest};
use super::inject::{Arg, Stopped, text};

pub(super) fn is_there(guest: &Guest) {
    let observed = Confinement::observed(guest.running.machine.pid());
    assert_eq!(observed.lacks(&Confine::JAIL.required()), None, "{observed}");
    // The record of a machine says the same.
    let recorded = guest.running.machine.confinement();
    assert_eq!(recorded.lacks(&Confine::JAIL.required()), None, "{recorded}");
    let (recorded, observed) = (recorded.to_string(), observed.to_string());
    assert!(recorded.starts_with(&observed), "{recorded} against {observed}");
}

/// The same of a machine that has booted; one that was restored is asked in `machine::restores`.
pub(super) async fn booted_holds(bench: &Bench) {
    let spec = bench.spec();
    let guest = bench.boot_from(spec.clone()).await;
    holds(&guest, &spec).await;
    mounts_nothing(&guest).await;
    guest.running.machine.kill().await;
}

/// What a guest that has taken its VMM over can do to the host: nothing. The VMM itself is made to try.
pub(super) async fn holds(guest: &Guest, spec: &MachineSpec) {
    let pid = guest.running.machine.pid();
    let files =
        [spec.rootfs.clone(), std::env::current_exe().expect("this program"), spec.dir.join("canary")];
    fs_err::write(spec.dir.join("canary"), "untouched").expect("written");
    let tried = tokio::task::spawn_blocking(move || try_all(pid, &files)).await;
    if let Err(panic) = tried {
        std::panic::resume_unwind(panic.into_panic());
    }
    assert_eq!(fs_err::read_to_string(spec.dir.join("canary")).expect("read"), "untouched");
    assert_eq!(guest.text("echo alive").await, "alive");
}

fn try_all(pid: u32, files: &[PathBuf]) {
    const CREATE: i32 = libc::O_WRONLY | libc::O_CREAT | libc::O_CLOEXEC;
    const WRITE: i32 = libc::O_RDWR | libc::O_CLOEXEC;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("bound");
    let port = listener.local_addr().expect("an address").port().to_be_bytes();
    let vmm = Stopped::seize(pid).expect("stopped");
    let number = |value: i32| Arg::Number(i64::from(value).cast_unsigned());
    let call = |what: i64, args: &[Arg<'_>]| vmm.call(what, args).expect("the VMM goes on");
    let open =
        |path: &str, flags| call(libc::SYS_open, &[Arg::Bytes(&text(path)), number(flags), number(0o600)]);
    let refused = |what: &str, result: i64| assert!(result < 0, "{what} is possible: {result}");
    // That it can make calls at all.
    let image = open("/rootfs", libc::O_RDONLY | libc::O_CLOEXEC);
    assert!(image >= 0, "the image cannot be read: {image}");
    for name in ["/rootfs", "/vmlinux", "/initramfs", "/memory", "/template-memory", "/state"] {
        // A machine that is saved writes to files of its own; this one is not.
        refused(&format!("writing to {name}"), open(name, WRITE));
    }
    refused("making the image writable", {
        let path = format!("/proc/self/fd/{image}");
        open(&path, WRITE)
    });
    for file in files {
        refused(&format!("opening {}", file.display()), open(&file.to_string_lossy(), WRITE));
    }
    refused("making a file", open("/etc/pyro-probe", CREATE));
    refused("making a file in the root", open("/pyro-probe", CREATE));
    refused("seeing the processes of the host", open("/proc", libc::O_RDONLY));
    let socket = call(libc::SYS_socket, &[number(libc::AF_INET), number(libc::SOCK_STREAM), number(0)]);
    if socket >= 0 {
        let address = [&[2, 0][..], &port, &[127, 0, 0, 1], &[0; 8]].concat();
        let args = [Arg::Number(socket.cast_unsigned()), Arg::Bytes(&address), Arg::Number(16)];
        refused("reaching the host's loopback", call(libc::SYS_connect, &args));
    }
    let owner = i32::try_from(std::process::id()).expect("a number");
    refused("signalling the owner", call(libc::SYS_kill, &[number(owner), number(0)]));
    let device = [Arg::Bytes(&text("/null")), number(0o020_666), Arg::Number(0x103)];
    refused("making a device", call(libc::SYS_mknod, &device));
    let unlimited = [u64::MAX.to_ne_bytes(), u64::MAX.to_ne_bytes()].concat();
    let core = [number(4), Arg::Bytes(&unlimited)];
    refused("a core dump", call(libc::SYS_setrlimit, &core));
    drop(vmm);
    listener.set_nonblocking(true).expect("set");
    assert!(listener.accept().is_err(), "the VMM has reached the host");
}

/// The last of what a VMM is made to try: one that has a filter of system calls ends by it.
pub(super) async fn mounts_nothing(guest: &Guest) {
    let pid = guest.running.machine.pid();
    let tried = tokio::task::spawn_blocking(move || {
        let vmm = Stopped::seize(pid).expect("stopped");
        let words = ["none", "/", "tmpfs"].map(text);
        let [source, target, kind] = words.each_ref().map(|word| Arg::Bytes(word));
        vmm.call(libc::SYS_mount, &[source, target, kind, Arg::Number(0), Arg::Number(0)])
    });
    match tried.await.expect("no panic") {
        Ok(result) => assert!(result < 0, "mounting is possible: {result}"),
        Err(ended) => assert!(ended.to_string().contains("has ended"), "{ended}"),
    }
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
