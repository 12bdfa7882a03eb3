//! The file that keeps what was found out about the host.

use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use fs_err::os::unix::fs::OpenOptionsExt;
use serde::{Deserialize, Serialize};

use super::files::QemuFiles;
use super::kvm::{KvmProbe, probe_kvm};
use super::tsc::measure_tsc_khz;
use super::version::{BinaryKey, QemuFacts};

const FORMAT: u32 = 2;
const FILE_BYTES_MAX: u64 = 64 << 10;
/// How many programs of each kind are remembered.
const PROGRAMS_MAX: usize = 8;
const KVM_DEVICE: &str = "/dev/kvm";
/// How long an unusable KVM is believed: what made it so may have been a busy moment.
const UNUSABLE_SECONDS: u64 = 600;

/// What this host can do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HostFacts {
    /// The kernel's name for this boot of the host; empty where it does not tell.
    pub boot_id: String,
    /// Whether KVM works.
    pub kvm: KvmProbe,
    /// The rate of the TSC, where it is constant.
    pub tsc_khz: Option<u32>,
}

impl HostFacts {
    /// The facts that `cache_file` holds, if they were found in this boot, by this user, with the same KVM
    /// device; else they are found out, in about 20 ms, and written there.
    pub fn load(cache_file: &Path) -> Self {
        Self::load_for(cache_file, Path::new(KVM_DEVICE))
    }

    /// Notes that a guest did not boot on a KVM that was found usable: it is not believed for some minutes.
    pub fn distrust_kvm(cache_file: &Path, why: &str) {
        Self::distrust_kvm_at(cache_file, Path::new(KVM_DEVICE), why);
    }

    fn distrust_kvm_at(cache_file: &Path, kvm_device: &Path, why: &str) {
        let mut facts = Self::load_for(cache_file, kvm_device);
        facts.kvm.usable = false;
        facts.kvm.why = format!("a guest did not boot on it: {why}");
        let mut cache = Cache::read(cache_file);
        cache.host = Some(Host { facts, kvm_key: KvmKey::of(kvm_device), found_at: now() });
        cache.write(cache_file);
    }

    fn load_for(cache_file: &Path, kvm_device: &Path) -> Self {
        let boot_id = boot_id();
        let key = KvmKey::of(kvm_device);
        let mut cache = Cache::read(cache_file);
        if let Some(host) = cache.host.take()
            && !boot_id.is_empty()
            && host.facts.boot_id == boot_id
            && host.kvm_key == key
            && (host.facts.kvm.usable || now().saturating_sub(host.found_at) < UNUSABLE_SECONDS)
        {
            return host.facts;
        }
        let facts = Self { boot_id, kvm: probe_kvm(kvm_device), tsc_khz: measure_tsc_khz() };
        cache.host = Some(Host { facts: facts.clone(), kvm_key: key, found_at: now() });
        cache.write(cache_file);
        facts
    }
}

/// All that decides whether a probe of KVM would find the same again within one boot.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct KvmKey {
    user: u32,
    accessible: bool,
    device: Option<(u64, u32, u32, u32)>,
    changed: Option<(i64, i64)>,
}

impl KvmKey {
    fn of(path: &Path) -> Self {
        let metadata = fs_err::metadata(path).ok();
        let access = rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK;
        Self {
            user: rustix::process::geteuid().as_raw(),
            accessible: rustix::fs::access(path, access).is_ok(),
            device: metadata.as_ref().map(|m| (m.rdev(), m.mode(), m.uid(), m.gid())),
            changed: metadata.as_ref().map(|m| (m.ctime(), m.ctime_nsec())),
        }
    }
}

/// The whole file.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Cache {
    format: u32,
    host: Option<Host>,
    qemus: Vec<(BinaryKey, QemuFacts)>,
    firecrackers: Vec<(BinaryKey, String)>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Host {
    facts: HostFacts,
    kvm_key: KvmKey,
    /// Epoch seconds.
    #[serde(default)]
    found_at: u64,
}

impl Cache {
    /// What the file holds; nothing where it is missing, too long, of another format, or garbage.
    pub(super) fn read(path: &Path) -> Self {
        Self::try_read(path).unwrap_or(Self {
            format: FORMAT,
            host: None,
            qemus: Vec::new(),
            firecrackers: Vec::new(),
        })
    }

    fn try_read(path: &Path) -> Option<Self> {
        // A pipe in its place would make the open wait for ever.
        let file = fs_err::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).ok()?;
        let mut bytes = Vec::new();
        let length = file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).ok()?;
        if length as u64 > FILE_BYTES_MAX {
            return None;
        }
        serde_json::from_slice(&bytes).ok().filter(|cache: &Self| cache.format == FORMAT)
    }

    /// Replaces the file. Without it everything works, only slower, so an error is no reason to fail.
    pub(super) fn write(&self, path: &Path) {
        static COUNTER: AtomicU64 = AtomicU64::new(0);

        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return };
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let temporary = path.with_file_name(format!(".{name}.{}.{number}", std::process::id()));
        if self.write_new(&temporary).and_then(|()| fs_err::rename(&temporary, path)).is_err() {
            fs_err::remove_file(&temporary).ok();
        }
    }

    fn write_new(&self, path: &Path) -> std::io::Result<()> {
        let mut file = fs_err::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        // Not synced: it is worth 30 ms, and a torn file is read as none.
        file.write_all(&serde_json::to_vec(self)?)
    }

    /// What is known of a QEMU. One whose files have changed is asked again, and so is one that cannot be jailed: what it
    /// lacked may be there by now.
    pub(super) fn qemu(&self, key: &BinaryKey) -> Option<QemuFacts> {
        let (_, facts) = self.qemus.iter().find(|(known, _)| known == key)?;
        facts.files.as_ref().is_ok_and(QemuFiles::are_there).then(|| facts.clone())
    }

    pub(super) fn set_qemu(&mut self, key: BinaryKey, facts: QemuFacts) {
        remember(&mut self.qemus, key, facts);
    }

    pub(super) fn firecracker(&self, key: &BinaryKey) -> Option<String> {
        self.firecrackers.iter().find(|(known, _)| known == key).map(|(_, version)| version.clone())
    }

    pub(super) fn set_firecracker(&mut self, key: BinaryKey, version: String) {
        remember(&mut self.firecrackers, key, version);
    }
}

fn remember<T>(programs: &mut Vec<(BinaryKey, T)>, key: BinaryKey, facts: T) {
    programs.retain(|(known, _)| *known != key);
    programs.insert(0, (key, facts));
    programs.truncate(PROGRAMS_MAX);
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn boot_id() -> String {
    let id = fs_err::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cache whose fact no probe would find, to see whether it is used.
    fn planted(dir: &Path) -> std::path::PathBuf {
        let path = dir.join("host.json");
        let mut facts = HostFacts::load_for(&path, &dir.join("kvm"));
        facts.kvm.why = "planted".to_owned();
        let host = Host { facts, kvm_key: KvmKey::of(&dir.join("kvm")), found_at: now() };
        Cache { format: FORMAT, host: Some(host), qemus: Vec::new(), firecrackers: Vec::new() }.write(&path);
        path
    }

    #[test]
    fn facts_are_found_once_a_boot() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = planted(dir.path());
        assert_eq!(HostFacts::load_for(&path, &dir.path().join("kvm")).kvm.why, "planted");
        let text = fs_err::read_to_string(&path).expect("a cache");
        let other_boot = text.replace(&boot_id(), "00000000-0000-0000-0000-000000000000");
        fs_err::write(&path, other_boot).expect("written");
        assert_ne!(HostFacts::load_for(&path, &dir.path().join("kvm")).kvm.why, "planted");
    }

    #[test]
    fn an_unusable_kvm_is_tried_again_after_a_while() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = planted(dir.path());
        let mut cache = Cache::read(&path);
        cache.host.as_mut().expect("planted").found_at -= UNUSABLE_SECONDS + 1;
        cache.write(&path);
        assert_ne!(HostFacts::load_for(&path, &dir.path().join("kvm")).kvm.why, "planted");
    }

    #[test]
    fn a_kvm_that_boots_no_guest_is_not_believed_for_a_while() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = planted(dir.path());
        let device = dir.path().join("kvm");
        let mut cache = Cache::read(&path);
        cache.host.as_mut().expect("planted").facts.kvm.usable = true;
        cache.write(&path);
        assert!(HostFacts::load_for(&path, &device).kvm.usable);
        HostFacts::distrust_kvm_at(&path, &device, "no answer");
        let kvm = HostFacts::load_for(&path, &device).kvm;
        assert_eq!((kvm.usable, kvm.why.as_str()), (false, "a guest did not boot on it: no answer"));
    }

    #[test]
    fn another_device_is_probed_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = planted(dir.path());
        fs_err::write(dir.path().join("kvm"), "").expect("written");
        let facts = HostFacts::load_for(&path, &dir.path().join("kvm"));
        assert_ne!(facts.kvm.why, "planted");
        assert!(facts.kvm.exists);
    }

    #[test]
    fn garbage_costs_a_probe_and_nothing_else() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("host.json");
        let huge = vec![b'['; 200 << 10];
        let samples: [&[u8]; 5] =
            [b"", b"\xff\xfe", b"{\"format\":1}", &huge, b"{\"format\":9,\"host\":null,\"qemus\":[]}"];
        for sample in samples {
            fs_err::write(&path, sample).expect("written");
            let facts = HostFacts::load_for(&path, &dir.path().join("kvm"));
            assert!(!facts.kvm.usable);
            assert!(Cache::try_read(&path).is_some(), "replaced by a good one");
        }
        let names: Vec<_> = fs_err::read_dir(dir.path()).expect("listed").collect();
        assert_eq!(names.len(), 1, "no temporary file stays");
    }

    #[test]
    fn a_directory_that_cannot_be_written_is_no_failure() {
        let facts = HostFacts::load_for(Path::new("/nonexistent/host.json"), Path::new("/nonexistent/kvm"));
        assert!(!facts.kvm.exists);
    }
}
