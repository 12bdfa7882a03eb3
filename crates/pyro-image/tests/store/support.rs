//! A cache directory of its own and a `mmdebstrap` that copies what is prepared.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use pyro_image::{Progress, Store, StoreConfig};
use pyro_process::{Child, Spawn};
use sha2::{Digest, Sha256};
use tar::{Builder, Header};

pub(crate) const PULL_HELPER: &str = "PYRO_TEST_PULL";

pub(crate) struct Fixture {
    root: PathBuf,
    pub(crate) cache: PathBuf,
    _guard: Option<tempfile::TempDir>,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        let guard = tempfile::tempdir().expect("a directory");
        let mut fixture = Self::at(guard.path().to_owned());
        fixture._guard = Some(guard);
        fixture.prepare();
        fixture
    }

    /// A fixture that another process prepared.
    pub(crate) fn at(root: PathBuf) -> Self {
        Self { cache: root.join("cache"), root, _guard: None }
    }

    fn prepare(&self) {
        let package = kernel_package();
        let digest: String = Sha256::digest(&package).iter().map(|byte| format!("{byte:02x}")).collect();
        let root = self.root.display();
        let script = format!(
            r#"#!/bin/sh
set -e
echo run >> {root}/runs
echo "I: running apt-get update..." >&2
if [ -e {root}/fail ]; then cat {root}/fail >&2; exit 1; fi
: > {root}/started
if [ -e {root}/delay ]; then (sleep "$(cat {root}/delay)"); fi
while [ $# -gt 2 ]; do shift; done
cp {root}/rootfs.tar "$1"
case " $PYRO_KERNELS_STORED " in
*" {digest} "*) echo {digest} > "$PYRO_KERNEL_DIR/stored" ;;
*) echo fetch >> {root}/fetches; cp {root}/kernel.deb "$PYRO_KERNEL_DIR/" ;;
esac
"#
        );
        fs_err::create_dir(self.root.join("bin")).expect("made");
        let tool = self.root.join("bin/mmdebstrap");
        fs_err::write(&tool, script).expect("written");
        fs_err::set_permissions(&tool, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("set");
        fs_err::write(self.root.join("rootfs.tar"), rootfs()).expect("written");
        fs_err::write(self.root.join("kernel.deb"), package).expect("written");
        fs_err::write(self.sources(), "deb http://u:p@deb.example/debian bookworm main\n").expect("written");
    }

    pub(crate) fn sources(&self) -> PathBuf {
        self.root.join("sources.list")
    }

    pub(crate) fn store(&self) -> Store {
        self.store_with_agent(b"agent")
    }

    pub(crate) fn store_with_agent(&self, agent: &'static [u8]) -> Store {
        self.open(agent).expect("opened")
    }

    pub(crate) fn try_store(&self) -> Result<Store, pyro_image::ImageError> {
        self.open(b"agent")
    }

    fn open(&self, agent: &'static [u8]) -> Result<Store, pyro_image::ImageError> {
        Store::open(StoreConfig {
            cache_dir: self.cache.clone(),
            private_dir: self.root.join("private"),
            apt_sources: Some(self.sources()),
            tool_path: self.root.join("bin").into_os_string(),
            agent: Cow::Borrowed(agent),
            agent_digest: Sha256::digest(agent).iter().map(|byte| format!("{byte:02x}")).collect(),
            template_limit_mib: 1,
            catalog_version: "2.0.0".to_owned(),
        })
    }

    pub(crate) fn set(&self, name: &str, value: &str) {
        fs_err::write(self.root.join(name), value).expect("written");
    }

    pub(crate) fn unset(&self, name: &str) {
        fs_err::remove_file(self.root.join(name)).expect("removed");
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.root.join(name).exists()
    }

    pub(crate) fn wait_for(&self, name: &str) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.has(name) {
            assert!(Instant::now() < deadline, "'{name}' never came");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn lines(&self, name: &str) -> usize {
        fs_err::read_to_string(self.root.join(name)).map_or(0, |text| text.lines().count())
    }

    pub(crate) fn runs(&self) -> usize {
        self.lines("runs")
    }

    pub(crate) fn kernel_fetches(&self) -> usize {
        self.lines("fetches")
    }

    pub(crate) fn staging(&self) -> usize {
        fs_err::read_dir(self.cache.join("staging")).expect("there").count()
    }

    /// Processes that were started from this fixture's files.
    pub(crate) fn processes(&self) -> usize {
        let root = self.root.as_os_str().as_encoded_bytes();
        let names_root = |path: &Path| {
            let line = fs_err::read(path).unwrap_or_default();
            line.windows(root.len()).any(|window| window == root)
        };
        fs_err::read_dir("/proc")
            .expect("there")
            .filter_map(|entry| Some(entry.ok()?.path().join("cmdline")))
            .filter(|path| names_root(path))
            .count()
    }

    pub(crate) fn mounts(&self) -> usize {
        let root = self.root.to_string_lossy().into_owned();
        let mounts = fs_err::read_to_string("/proc/self/mountinfo").expect("there");
        mounts.lines().filter(|line| line.contains(&root)).count()
    }

    /// A process of its own that pulls into this cache.
    pub(crate) fn spawn_pull(&self) -> Child {
        let mut spawn = Spawn::new(std::env::current_exe().expect("known"), Path::new("/"));
        spawn.args(["--exact", "pull_helper", "--nocapture"]).env(PULL_HELPER, &self.root);
        spawn.spawn().expect("started")
    }
}

/// Remembers which phases there were.
#[derive(Default)]
pub(crate) struct Recorder(Mutex<Vec<String>>);

impl Recorder {
    pub(crate) fn heard(&self, phase: &str) -> bool {
        self.0.lock().expect("no panic").iter().any(|heard| heard == phase)
    }
}

impl Progress for Recorder {
    fn phase(&self, phase: &str, _detail: &str) {
        self.0.lock().expect("no panic").push(phase.to_owned());
    }

    fn cancelled(&self) -> bool {
        false
    }
}

fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for (path, bytes) in files {
        let mut header = Header::new_gnu();
        header.set_mode(0o755);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1);
        header.set_size(bytes.len() as u64);
        builder.append_data(&mut header, path, *bytes).expect("in memory");
    }
    builder.into_inner().expect("in memory")
}

fn rootfs() -> Vec<u8> {
    let large: Vec<u8> = (0..40_000_u32).flat_map(u32::to_le_bytes).collect();
    archive(&[
        ("./bin/sh", large.as_slice()),
        ("./etc/hostname", b"build-host\n"),
        ("./var/lib/dpkg/status", b"Package: bash\nVersion: 5.2\n\nPackage: coreutils\nVersion: 9\n"),
    ])
}

fn kernel_package() -> Vec<u8> {
    let mut files: Vec<(String, Vec<u8>)> = ["mmio", "blk", "console", "net"]
        .into_iter()
        .map(|name| format!("virtio_{name}"))
        .chain(["overlay", "erofs", "vsock", "vmw_vsock_virtio_transport"].map(str::to_owned))
        .map(|name| (format!("./lib/modules/6.1/kernel/{name}.ko"), module()))
        .collect();
    files.push(("./lib/modules/6.1/modules.builtin".to_owned(), b"kernel/fs/ext4.ko\n".to_vec()));
    // An ELF file is taken as it is, so no boot header is needed here.
    files.push(("./boot/vmlinuz-6.1".to_owned(), b"\x7fELF kernel".to_vec()));
    let borrowed: Vec<(&str, &[u8])> =
        files.iter().map(|(path, bytes)| (path.as_str(), bytes.as_slice())).collect();
    let data = zstd::stream::encode_all(archive(&borrowed).as_slice(), 1).expect("packed");
    let mut package = Vec::new();
    let mut builder = ar::Builder::new(&mut package);
    let header = ar::Header::new(b"data.tar.zst".to_vec(), data.len() as u64);
    builder.append(&header, data.as_slice()).expect("in memory");
    package
}

/// An ELF file whose only section besides the names is an empty `.modinfo`.
fn module() -> Vec<u8> {
    const NAMES: &[u8] = b"\0.modinfo\0";
    let mut file = vec![0; 64];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    file.extend_from_slice(NAMES);
    let table = file.len();
    for (name, size) in [(1_u32, 0_u64), (0, NAMES.len() as u64)] {
        let mut header = [0; 64];
        header[..4].copy_from_slice(&name.to_le_bytes());
        header[0x18..0x20].copy_from_slice(&64_u64.to_le_bytes());
        header[0x20..0x28].copy_from_slice(&size.to_le_bytes());
        file.extend_from_slice(&header);
    }
    file[0x28..0x30].copy_from_slice(&(table as u64).to_le_bytes());
    file[0x3a..0x3c].copy_from_slice(&64_u16.to_le_bytes());
    file[0x3c..0x3e].copy_from_slice(&2_u16.to_le_bytes());
    file[0x3e..0x40].copy_from_slice(&1_u16.to_le_bytes());
    file
}
