//! Images against other readers of the format: `fsck.erofs`, and the kernel where we may mount.

use std::collections::{BTreeMap, HashMap};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use pyro_image::erofs::write_image;
use pyro_image::tree::{Layer, Limits, flatten};
use pyro_process::Spawn;
use sha2::{Digest, Sha256};
use tar::{Builder, EntryType, Header};

/// What is expected of one path.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Expected {
    kind: char,
    mode: u32,
    owner: (u32, u32),
    mtime: (i64, i64),
    links: u64,
    /// Contents of a file, target of a link, numbers of a device.
    value: Vec<u8>,
}

struct Sample {
    builder: Builder<Vec<u8>>,
    expected: BTreeMap<Vec<u8>, Expected>,
}

impl Sample {
    fn new() -> Self {
        let mut sample = Self { builder: Builder::new(Vec::new()), expected: BTreeMap::new() };
        sample.add("./", EntryType::Directory, 0o755, b"");
        sample
    }

    fn add(&mut self, path: &str, kind: EntryType, mode: u32, value: &[u8]) {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(1000);
        header.set_gid(70_000);
        header.set_mtime(1_234_567_890);
        header.set_size(0);
        let letter = match kind {
            EntryType::Directory => 'd',
            EntryType::Symlink => 'l',
            EntryType::Char => 'c',
            EntryType::Fifo => 'p',
            _ => 'f',
        };
        if kind == EntryType::Symlink {
            let target = std::ffi::OsStr::from_bytes(value);
            self.builder.append_link(&mut header, path, target).expect("in memory");
        } else if kind == EntryType::Char {
            header.set_device_major(5).expect("gnu");
            header.set_device_minor(70_000).expect("gnu");
            self.builder.append_data(&mut header, path, [].as_slice()).expect("in memory");
        } else {
            header.set_size(value.len() as u64);
            self.builder.append_data(&mut header, path, value).expect("in memory");
        }
        let expected = Expected {
            kind: letter,
            mode,
            owner: (1000, 70_000),
            mtime: (1_234_567_890, 0),
            links: if letter == 'd' { 2 } else { 1 },
            value: value.to_vec(),
        };
        let path = path.trim_start_matches("./").trim_end_matches('/').as_bytes().to_vec();
        if let Some(slash) = path.iter().rposition(|byte| *byte == b'/') {
            self.link_directory(letter, &path[..slash]);
        } else if !path.is_empty() {
            self.link_directory(letter, b"");
        }
        self.expected.insert(path, expected);
    }

    fn link_directory(&mut self, letter: char, parent: &[u8]) {
        if letter == 'd' {
            self.expected.get_mut(parent).expect("parents come first").links += 1;
        }
    }

    fn layer(self) -> (Layer, BTreeMap<Vec<u8>, Expected>) {
        (Layer::Bytes(self.builder.into_inner().expect("in memory").into()), self.expected)
    }
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| u8::try_from((at * 7 + at / 251) % 255 + 1).expect("below 256")).collect()
}

/// Everything that the format treats differently.
fn sample() -> Sample {
    let mut sample = Sample::new();
    for directory in ["dir", "dir/sub", "many", "tails", "empty"] {
        sample.add(directory, EntryType::Directory, 0o1777, b"");
    }
    // Around the room behind an inode, and around whole blocks.
    for length in [0, 1, 31, 4031, 4032, 4033, 4095, 4096, 4097, 8128, 8129, 300_000] {
        sample.add(&format!("tails/{length}"), EntryType::Regular, 0o4755, &pattern(length));
    }
    let mut holes = vec![0; 3 << 20];
    holes[1 << 20] = 1;
    holes.extend_from_slice(b"end");
    sample.add("holes", EntryType::Regular, 0o600, &holes);
    sample.add("zeros", EntryType::Regular, 0o600, &vec![0; 1 << 20]);
    for number in 0..700 {
        sample.add(&format!("many/{number}-{}", "n".repeat(number % 240)), EntryType::Regular, 0o644, b"x");
    }
    // Names that sort before, between and behind "." and "..".
    for name in ["dir/!", "dir/-", "dir/.a", "dir/...", "dir/~", "dir/é"] {
        sample.add(name, EntryType::Regular, 0o644, name.as_bytes());
    }
    sample.add("short-link", EntryType::Symlink, 0o777, b"dir/sub");
    sample.add("long-link", EntryType::Symlink, 0o777, "t/".repeat(2040).as_bytes());
    sample.add("device", EntryType::Char, 0o620, b"");
    sample.add("fifo", EntryType::Fifo, 0o600, b"");

    // Names by hard link, attributes and fractional times.
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::Link);
    header.set_size(0);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    sample.builder.append_link(&mut header, "dir/hard", "tails/4033").expect("in memory");
    let mut linked = sample.expected[b"tails/4033".as_slice()].clone();
    linked.links = 2;
    sample.expected.insert(b"tails/4033".to_vec(), linked.clone());
    sample.expected.insert(b"dir/hard".to_vec(), linked);

    let big = pattern(50_000);
    let records: [(&str, &[u8]); 4] = [
        ("mtime", b"-2.5"),
        ("SCHILY.xattr.user.small", b"value"),
        ("SCHILY.xattr.security.capability", &[1, 0, 0, 2, 0, 4, 10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ("SCHILY.xattr.trusted.large", &big),
    ];
    sample.builder.append_pax_extensions(records).expect("in memory");
    sample.add("attributes", EntryType::Regular, 0o644, &pattern(5000));
    sample.expected.get_mut(b"attributes".as_slice()).expect("added").mtime = (-3, 500_000_000);
    sample
}

fn write(layers: &[Layer], path: &Path) {
    let limits = Limits::default();
    let tree = flatten(layers, &limits, &|| false).expect("acceptable");
    let mut file = std::fs::File::create(path).expect("made");
    let summary = write_image(&tree, layers, &limits, &mut file, &|| false).expect("written");
    assert_eq!(summary.bytes, file.metadata().expect("there").len());
    assert_eq!(summary.inodes, tree.extent().0);
}

fn run(program: &str, arguments: &[&std::ffi::OsStr]) -> pyro_process::Output {
    let mut spawn = Spawn::new(program, Path::new("/"));
    spawn.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").args(arguments);
    pyro_process::output(spawn).expect("the program is installed")
}

fn fsck(image: &Path) {
    let output = run("fsck.erofs", &["-d3".as_ref(), image.as_os_str()]);
    assert!(output.status.success(), "{output:?}");
}

fn read_back(root: &Path) -> BTreeMap<Vec<u8>, Expected> {
    let mut found = BTreeMap::new();
    let mut pending = vec![root.to_owned()];
    let mut first_names: HashMap<u64, PathBuf> = HashMap::new();
    while let Some(path) = pending.pop() {
        let metadata = fs_err::symlink_metadata(&path).expect("there");
        let kind = metadata.file_type();
        let (letter, value) = if kind.is_dir() {
            pending.extend(
                fs_err::read_dir(&path).expect("readable").map(|entry| entry.expect("readable").path()),
            );
            ('d', Vec::new())
        } else if kind.is_symlink() {
            ('l', fs_err::read_link(&path).expect("readable").as_os_str().as_bytes().to_vec())
        } else if kind.is_char_device() {
            assert_eq!(metadata.rdev(), rustix::fs::makedev(5, 70_000));
            ('c', Vec::new())
        } else if kind.is_fifo() {
            ('p', Vec::new())
        } else {
            ('f', fs_err::read(&path).expect("readable"))
        };
        if metadata.nlink() > 1 && letter == 'f' {
            let first = first_names.entry(metadata.ino()).or_insert_with(|| path.clone());
            assert_eq!(fs_err::read(first.as_path()).expect("readable"), value);
        }
        let expected = Expected {
            kind: letter,
            mode: metadata.permissions().mode() & 0o7777,
            owner: (metadata.uid(), metadata.gid()),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            links: metadata.nlink(),
            value,
        };
        let name = path.strip_prefix(root).expect("below").as_os_str().as_bytes().to_vec();
        found.insert(name, expected);
    }
    found
}

#[test]
fn the_kernel_reads_back_what_went_in() {
    let directory = tempfile::tempdir().expect("a directory");
    let image = directory.path().join("image.erofs");
    let (layer, expected) = sample().layer();
    write(&[layer], &image);
    fsck(&image);
    // Holes are holes: the two files of zeros alone are 4 MiB.
    let metadata = fs_err::metadata(&image).expect("there");
    assert!(metadata.blocks() * 512 + (3 << 20) < metadata.len());
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let mount = directory.path().join("mount");
    fs_err::create_dir(&mount).expect("made");
    let mounted = run(
        "mount",
        &[
            "-t".as_ref(),
            "erofs".as_ref(),
            "-o".as_ref(),
            "loop,ro".as_ref(),
            image.as_os_str(),
            mount.as_os_str(),
        ],
    );
    assert!(mounted.status.success(), "{mounted:?}");
    let found = std::panic::catch_unwind(|| {
        let mut value = vec![0; 65_536];
        let path = mount.join("attributes");
        let length = rustix::fs::getxattr(&path, "trusted.large", &mut value).expect("there");
        assert!(value[..length] == pattern(50_000));
        let length = rustix::fs::getxattr(&path, "user.small", &mut value).expect("there");
        assert_eq!(&value[..length], b"value");
        let length = rustix::fs::getxattr(&path, "security.capability", &mut value).expect("there");
        assert_eq!(length, 20);
        read_back(&mount)
    });
    let unmounted = run("umount", &[mount.as_os_str()]);
    assert!(unmounted.status.success(), "{unmounted:?}");
    let found = found.expect("readable");
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (path, expected) in &expected {
        assert!(found[path] == *expected, "{}", String::from_utf8_lossy(path));
    }
}

#[test]
fn the_same_layers_give_the_same_bytes_however_packed() {
    let directory = tempfile::tempdir().expect("a directory");
    let (layer, _) = sample().layer();
    let Layer::Bytes(plain) = &layer else { unreachable!("made from bytes") };
    let packed = zstd::stream::encode_all(&plain[..], 1).expect("packed");
    let digest = |name: &str, layer: Layer| {
        let path = directory.path().join(name);
        write(&[layer], &path);
        Sha256::digest(fs_err::read(path).expect("readable"))
    };
    let first = digest("a", layer.clone());
    assert_eq!(first, digest("b", layer.clone()));
    assert_eq!(first, digest("c", Layer::Bytes(packed.into())));
}

#[test]
fn the_format_is_frozen() {
    let mut sample = Sample::new();
    sample.add("bin", EntryType::Directory, 0o755, b"");
    sample.add("bin/sh", EntryType::Regular, 0o755, &pattern(10_000));
    sample.add("link", EntryType::Symlink, 0o777, b"bin/sh");
    let (layer, _) = sample.layer();
    let layers = [layer];
    let limits = Limits::default();
    let tree = flatten(&layers, &limits, &|| false).expect("acceptable");
    let mut image = Vec::new();
    write_image(&tree, &layers, &limits, &mut image, &|| false).expect("written");
    let digest: String = Sha256::digest(&image).iter().map(|byte| format!("{byte:02x}")).collect();
    // Environments are named by such digests: a change here makes every user rebuild.
    assert_eq!(digest, "a1d749e09142a923535e93e761228394722d186bdf483d5095e336c9889ce2b4");
}

#[test]
fn tails_beyond_the_budget_become_blocks() {
    let directory = tempfile::tempdir().expect("a directory");
    let (layer, _) = sample().layer();
    let layers = [layer];
    let limits = Limits { tails: 5000, ..Limits::default() };
    let tree = flatten(&layers, &limits, &|| false).expect("acceptable");
    let path = directory.path().join("image");
    let mut file = std::fs::File::create(&path).expect("made");
    write_image(&tree, &layers, &limits, &mut file, &|| false).expect("written");
    fsck(&path);
}
