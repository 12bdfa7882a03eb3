use std::collections::BTreeMap;
use std::io::Write;

use proptest::prelude::*;

use super::{BzImageError, KernelError, ModinfoError, modules, parse_modinfo, unpack_kernel, unpack_package};

/// A boot header with one setup sector, the payload right behind it.
pub(super) fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 1024];
    image[0x1f1] = 1;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
    image[0x248..0x24c].copy_from_slice(&0_u32.to_le_bytes());
    let length = u32::try_from(payload.len()).expect("small");
    image[0x24c..0x250].copy_from_slice(&length.to_le_bytes());
    image.extend_from_slice(payload);
    image
}

fn elf() -> Vec<u8> {
    let mut bytes = b"\x7fELF\x02\x01".to_vec();
    bytes.extend((0..100_000_u32).flat_map(|number| (number % 977).to_le_bytes()));
    bytes
}

fn lz4_legacy(kernel: &[u8], block: usize) -> Vec<u8> {
    let mut payload = vec![0x02, 0x21, 0x4c, 0x18];
    for chunk in kernel.chunks(block) {
        let packed = lz4_flex::block::compress(chunk);
        payload.extend(u32::try_from(packed.len()).expect("small").to_le_bytes());
        payload.extend(packed);
    }
    payload.extend(u32::try_from(kernel.len()).expect("small").to_le_bytes());
    payload
}

#[test]
fn every_compression_is_undone() {
    let kernel = elf();
    let size = u32::try_from(kernel.len()).expect("small").to_le_bytes();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&kernel).expect("in memory");
    let gzip = gzip.finish().expect("in memory");
    let mut zstd = zstd::stream::encode_all(kernel.as_slice(), 1).expect("in memory");
    zstd.extend(size);
    let mut xz = liblzma::encode_all(kernel.as_slice(), 1).expect("in memory");
    xz.extend(size);
    for payload in [lz4_legacy(&kernel, 8 << 20), lz4_legacy(&kernel, 65_536), gzip, zstd, xz] {
        assert!(unpack_kernel(&bzimage(&payload)).expect("unpacked") == kernel);
    }
    assert!(unpack_kernel(&kernel).expect("unpacked") == kernel);
}

#[test]
fn hostile_images_are_refused() {
    let kernel = elf();
    let good = bzimage(&lz4_legacy(&kernel, 65_536));
    assert!(matches!(unpack_kernel(&[]), Err(BzImageError::Header)));
    assert!(matches!(unpack_kernel(&good[..0x24a]), Err(BzImageError::Header)));
    assert!(matches!(unpack_kernel(&good[..good.len() - 1]), Err(BzImageError::Range)));
    let mut old = good.clone();
    old[0x206] = 7;
    assert!(matches!(unpack_kernel(&old), Err(BzImageError::Header)));
    let mut far = good.clone();
    far[0x248..0x250].fill(0xff);
    assert!(matches!(unpack_kernel(&far), Err(BzImageError::Range)));
    assert!(matches!(unpack_kernel(&bzimage(b"BZh9")), Err(BzImageError::Compression)));
    // A block that claims more than there is, and one that unpacks to more than 8 MiB.
    let mut long = vec![0x02, 0x21, 0x4c, 0x18];
    long.extend(u32::MAX.to_le_bytes());
    long.push(0);
    assert!(matches!(unpack_kernel(&bzimage(&long)), Err(BzImageError::Damaged(_))));
    let bomb = lz4_legacy(&vec![0; 9 << 20], 9 << 20);
    assert!(matches!(unpack_kernel(&bzimage(&bomb)), Err(BzImageError::Damaged(_))));
    let text = lz4_legacy(b"no kernel at all, only words", 100);
    assert!(matches!(unpack_kernel(&bzimage(&text)), Err(BzImageError::NotElf)));
}

/// An ELF file of two sections: `.modinfo` and the section names.
pub(super) fn module(modinfo: &[u8]) -> Vec<u8> {
    const NAMES: &[u8] = b"\0.modinfo\0.shstrtab\0";
    let mut file = vec![0; 64];
    file[..6].copy_from_slice(b"\x7fELF\x02\x01");
    let mut section = |name: u32, bytes: &[u8]| {
        let mut header = vec![0; 64];
        header[..4].copy_from_slice(&name.to_le_bytes());
        header[0x18..0x20].copy_from_slice(&(file.len() as u64).to_le_bytes());
        header[0x20..0x28].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
        file.extend_from_slice(bytes);
        header
    };
    let headers = [vec![0; 64], section(1, modinfo), section(10, NAMES)];
    let table = file.len() as u64;
    file[0x28..0x30].copy_from_slice(&table.to_le_bytes());
    file[0x3a..0x3c].copy_from_slice(&64_u16.to_le_bytes());
    file[0x3c..0x3e].copy_from_slice(&3_u16.to_le_bytes());
    file[0x3e..0x40].copy_from_slice(&2_u16.to_le_bytes());
    file.extend(headers.concat());
    file
}

#[test]
fn dependencies_are_read_in_order() {
    let info = parse_modinfo(&module(
        b"license=GPL\0depends=libcrc32c,snd-pcm,\0softdep=pre: crc32c blake2b-256 post: late\0name=x\0",
    ))
    .expect("a module");
    assert_eq!(info.depends, ["libcrc32c", "snd_pcm"]);
    assert_eq!(info.softdeps, ["crc32c", "blake2b_256"]);
    assert_eq!(parse_modinfo(&module(b"depends=\0")).expect("a module").depends, Vec::<String>::new());
}

#[test]
fn hostile_modules_are_refused() {
    assert_eq!(parse_modinfo(b""), Err(ModinfoError::NotElf));
    assert_eq!(parse_modinfo(b"\x7fELF\x02\x01"), Err(ModinfoError::Range));
    assert_eq!(parse_modinfo(&module(b"depends=../../etc/passwd\0")), Err(ModinfoError::Dependency));
    let many = format!("depends={}\0", "a,".repeat(300));
    assert_eq!(parse_modinfo(&module(many.as_bytes())), Err(ModinfoError::Dependency));
    let mut far = module(b"depends=\0");
    far[0x28..0x30].fill(0xff);
    assert_eq!(parse_modinfo(&far), Err(ModinfoError::Range));
    let mut unnamed = module(b"depends=\0");
    let at = unnamed.windows(8).position(|window| window == b".modinfo").expect("there");
    unnamed[at + 1] = b'X';
    assert_eq!(parse_modinfo(&unnamed), Err(ModinfoError::Missing));
}

fn set(modules: &[(&str, &str)], builtin: &str) -> modules::Set {
    let files: BTreeMap<String, Vec<u8>> = modules
        .iter()
        .map(|(name, modinfo)| ((*name).to_owned(), module(format!("{modinfo}\0").as_bytes())))
        .collect();
    modules::Set::new(files, builtin)
}

#[test]
fn modules_come_after_what_they_need_and_only_once() {
    let set = set(
        &[
            ("net", "depends=failover,core"),
            ("failover", "depends=core"),
            ("core", "softdep=pre: helper gone"),
            ("helper", ""),
            ("extra", "depends=core,built-in"),
        ],
        "kernel/lib/built-in.ko\n",
    );
    let lists: [&[&str]; 2] = [&["net", "built_in"], &["extra", "core"]];
    let lists = set.select(lists).expect("an order");
    let (first, second) = (&lists[0], &lists[1]);
    let names = |list: &[super::Module]| list.iter().map(|module| module.name.clone()).collect::<Vec<_>>();
    assert_eq!(names(first), ["helper", "core", "failover", "net"]);
    assert_eq!(names(second), ["extra"]);
}

#[test]
fn missing_and_circular_modules_are_named() {
    let set = set(&[("a", "depends=b"), ("b", "depends=a"), ("c", "depends=gone")], "");
    assert!(matches!(set.select([&["a"][..]]), Err(KernelError::Cycle(name)) if name == "a"));
    assert!(matches!(set.select([&["c"][..]]), Err(KernelError::MissingModule(name)) if name == "gone"));
}

#[test]
fn module_names_come_from_paths() {
    assert_eq!(modules::name_of("lib/modules/6.1/kernel/a/virtio-net.ko").as_deref(), Some("virtio_net"));
    assert_eq!(modules::name_of("x/zstd.ko.xz").as_deref(), Some("zstd"));
    assert_eq!(modules::name_of("x/readme.txt"), None);
    assert_eq!(modules::name_of("x/we ird.ko"), None);
}

#[test]
fn packages_without_a_kernel_are_refused() {
    assert!(matches!(
        unpack_package([].as_slice(), &|| false),
        Err(KernelError::Missing(_) | KernelError::Package(_))
    ));
    let mut package = Vec::new();
    let mut builder = ar::Builder::new(&mut package);
    let empty = vec![0; 1024];
    builder.append(&ar::Header::new(b"data.tar".to_vec(), 1024), empty.as_slice()).expect("in memory");
    assert!(matches!(
        unpack_package(package.as_slice(), &|| false),
        Err(KernelError::Missing("kernel image"))
    ));
}

proptest! {
    #[test]
    fn mutated_modules_are_decided(changes in prop::collection::vec((0_usize..400, any::<u8>()), 1..16)) {
        let mut file = module(b"depends=a,b\0softdep=pre: c\0");
        for (at, value) in changes {
            let at = at % file.len();
            file[at] = value;
        }
        drop(parse_modinfo(&file));
    }

    #[test]
    fn mutated_kernels_are_decided(changes in prop::collection::vec((0_usize..2000, any::<u8>()), 1..16)) {
        let mut image = bzimage(&lz4_legacy(b"\x7fELF small and repeated repeated repeated", 16));
        for (at, value) in changes {
            let at = at % image.len();
            image[at] = value;
        }
        drop(unpack_kernel(&image));
    }
}
