//! What makes this guest unlike every other: entropy, clock, hostname, machine-id.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use pyro_proto::{EnvVar, IdentifyRequest, limits};
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::time::{ClockId, Timespec, clock_settime};

use crate::boot::ROOT;
use crate::trust;

/// Why an identity was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum IdentityError {
    #[error("{field} is not as the protocol says")]
    Malformed { field: &'static str },
    #[error("the kernel refused the {what}: {source}")]
    Refused { what: &'static str, source: io::Error },
}

/// Takes the whole identity or says which part failed. Returns the variables that every command gets.
pub(crate) fn assume(request: &IdentifyRequest) -> Result<Vec<EnvVar>, IdentityError> {
    check(request)?;
    let refused = |what| move |source: io::Error| IdentityError::Refused { what, source };
    // The time is right at the moment at which it was sent.
    set_clock(request.realtime_nanos).map_err(refused("clock"))?;
    add_entropy(&request.entropy).map_err(refused("entropy"))?;
    let before = rustix::system::uname().nodename().to_string_lossy().into_owned();
    rustix::system::sethostname(request.hostname.as_bytes())
        .map_err(|error| refused("hostname")(error.into()))?;
    // A guest may have put anything in the place of these files; that must not make it unusable for good.
    for (path, text) in [("etc/hostname", &request.hostname), ("etc/machine-id", &request.machine_id)] {
        if let Err(error) = write_in_root(path, &format!("{text}\n")) {
            crate::say(&format!("phase=identity: {path}: {error}"));
        }
    }
    if let Err(error) = name_in_hosts(&before, &request.hostname) {
        crate::say(&format!("phase=identity: etc/hosts: {error}"));
    }
    let mut environment = trust::variables(&request.authority);
    environment.extend_from_slice(&request.environment);
    Ok(environment)
}

/// Lets the guest resolve its own name. The line of the name that it had before goes; lines that it has added itself stay.
fn name_in_hosts(before: &str, hostname: &str) -> io::Result<()> {
    const MOST_BYTES: u64 = 1 << 20;
    let path = "etc/hosts";
    let mut text = String::new();
    if let Ok(file) = open_in_root(path, OFlags::RDONLY) {
        file.take(MOST_BYTES).read_to_string(&mut text)?;
    }
    let line = |name: &str| format!("127.0.1.1 {name}");
    let old = line(before);
    if before != hostname && text.lines().any(|found| found == old) {
        let text: String = text
            .lines()
            .filter(|found| *found != old)
            .chain([line(hostname).as_str()])
            .map(|kept| format!("{kept}\n"))
            .collect();
        return write_in_root(path, &text);
    }
    if text.split_whitespace().any(|word| word == hostname) {
        return Ok(());
    }
    open_in_root(path, OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND)?
        .write_all(format!("{}\n", line(hostname)).as_bytes())
}

fn check(request: &IdentifyRequest) -> Result<(), IdentityError> {
    let hostname = request.hostname.as_bytes();
    let allowed = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || *byte == b'-';
    if !limits::ENTROPY.contains(&request.entropy.len()) {
        return Err(IdentityError::Malformed { field: "entropy" });
    }
    if !(1..=63).contains(&hostname.len()) || !hostname.iter().all(allowed) {
        return Err(IdentityError::Malformed { field: "hostname" });
    }
    let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if request.machine_id.len() != 32 || !request.machine_id.bytes().all(hex) {
        return Err(IdentityError::Malformed { field: "machine_id" });
    }
    let is_variable = |var: &EnvVar| {
        !var.name.is_empty()
            && !var.name.iter().any(|byte| matches!(byte, b'=' | 0))
            && !var.value.contains(&0)
    };
    if !request.environment.iter().all(is_variable) {
        return Err(IdentityError::Malformed { field: "environment" });
    }
    Ok(())
}

/// Credits the bytes and makes the kernel use them now: two guests restored from one snapshot would otherwise
/// draw the same random numbers.
#[expect(unsafe_code, reason = "the two ioctls of /dev/random")]
fn add_entropy(entropy: &[u8]) -> io::Result<()> {
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

    let random = File::options().write(true).open("/dev/random")?;
    // struct rand_pool_info: bits credited, bytes that follow, the bytes. A vector of i32 is aligned for it.
    let mut pool = vec![0_i32; 2 + entropy.len().div_ceil(4)];
    pool[0] = i32::try_from(entropy.len() * 8).unwrap_or(0);
    pool[1] = i32::try_from(entropy.len()).unwrap_or(0);
    for (word, bytes) in pool[2..].iter_mut().zip(entropy.chunks(4)) {
        let mut four = [0; 4];
        four[..bytes.len()].copy_from_slice(bytes);
        *word = i32::from_ne_bytes(four);
    }
    // SAFETY: the pool is as long as its second word says, and outlives the call.
    if unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, pool.as_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: this ioctl takes no argument.
    if unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

pub(crate) fn set_clock(nanos: u64) -> io::Result<()> {
    let seconds = i64::try_from(nanos / 1_000_000_000).unwrap_or(i64::MAX);
    let rest = i64::try_from(nanos % 1_000_000_000).unwrap_or(0);
    Ok(clock_settime(ClockId::Realtime, Timespec { tv_sec: seconds, tv_nsec: rest })?)
}

/// Writes a file of the guest's root. A disk that was used before may hold any symlink there, so the path is
/// resolved as if that root were the whole file system. Text of the length that the file has is written over the old: to
/// cut a file and let it grow again is several times the work.
pub(crate) fn write_in_root(path: &str, text: &str) -> io::Result<()> {
    let file = open_in_root(path, OFlags::WRONLY | OFlags::CREATE)?;
    file.write_all_at(text.as_bytes(), 0)?;
    let length = text.len() as u64;
    if file.metadata()?.len() == length { Ok(()) } else { file.set_len(length) }
}

pub(crate) fn open_in_root(path: &str, flags: OFlags) -> io::Result<File> {
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, ROOT, directory, Mode::empty())?;
    let mode = if flags.contains(OFlags::CREATE) { Mode::from_raw_mode(0o644) } else { Mode::empty() };
    let flags = flags | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(File::from(openat2(root, path, flags, mode, ResolveFlags::IN_ROOT)?))
}
