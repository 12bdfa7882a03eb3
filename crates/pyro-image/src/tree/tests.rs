use std::io::Write;

use proptest::prelude::*;
use tar::{Builder, EntryType, Header};

use super::{Kind, Layer, Limits, NodeId, Reason, Tree, TreeError, flatten};

/// A member: its raw name, type, link target and contents.
struct Item<'a>(&'a [u8], EntryType, &'a [u8], &'a [u8]);

fn raw_header(item: &Item<'_>) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(item.1);
    header.set_mode(0o644);
    header.set_size(item.3.len() as u64);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    let old = header.as_old_mut();
    // Written past the crate's own checks, which refuse most of what is tested here.
    old.name[..item.0.len()].copy_from_slice(item.0);
    old.linkname[..item.2.len()].copy_from_slice(item.2);
    header.set_cksum();
    header
}

fn tar_of(items: &[Item<'_>]) -> Vec<u8> {
    let mut out = Vec::new();
    for item in items {
        out.extend_from_slice(raw_header(item).as_bytes());
        out.extend_from_slice(item.3);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

fn file<'a>(name: &'a str, contents: &'a str) -> Item<'a> {
    Item(name.as_bytes(), EntryType::Regular, b"", contents.as_bytes())
}

fn directory(name: &str) -> Item<'_> {
    Item(name.as_bytes(), EntryType::Directory, b"", b"")
}

fn symlink<'a>(name: &'a str, target: &'a str) -> Item<'a> {
    Item(name.as_bytes(), EntryType::Symlink, target.as_bytes(), b"")
}

fn hard_link<'a>(name: &'a str, target: &'a str) -> Item<'a> {
    Item(name.as_bytes(), EntryType::Link, target.as_bytes(), b"")
}

fn merge(layers: &[Vec<u8>]) -> Result<Tree, TreeError> {
    merge_with(layers, &Limits::default())
}

fn merge_with(layers: &[Vec<u8>], limits: &Limits) -> Result<Tree, TreeError> {
    let layers: Vec<Layer> = layers.iter().map(|bytes| Layer::Bytes(bytes.as_slice().into())).collect();
    flatten(&layers, limits, &|| false)
}

fn reason(items: &[Item<'_>]) -> Reason {
    match merge(&[tar_of(items)]) {
        Err(TreeError::Member { reason, .. }) => reason,
        other => panic!("expected a rejected member, got {other:?}"),
    }
}

/// All paths with a letter for their kind, sorted.
fn listing(tree: &Tree) -> Vec<String> {
    fn walk(tree: &Tree, node: NodeId, path: &str, out: &mut Vec<String>) {
        for (name, child) in tree.children(node).into_iter().flatten() {
            let path = format!("{path}/{}", String::from_utf8_lossy(name));
            let letter = match &tree.node(*child).kind {
                Kind::Directory(_) => 'd',
                Kind::File { .. } => 'f',
                Kind::Symlink(_) => 'l',
                Kind::Character(..) => 'c',
                Kind::Block(..) => 'b',
                Kind::Fifo => 'p',
            };
            out.push(format!("{letter}{path}"));
            walk(tree, *child, &path, out);
        }
    }
    let mut out = Vec::new();
    walk(tree, NodeId::ROOT, "", &mut out);
    out
}

fn merged(layers: &[&[Item<'_>]]) -> Vec<String> {
    let layers: Vec<Vec<u8>> = layers.iter().map(|items| tar_of(items)).collect();
    listing(&merge(&layers).expect("acceptable layers"))
}

#[test]
fn whiteouts_hide_only_lower_layers_wherever_they_stand() {
    let lower = [directory("d"), file("d/old", "1"), file("d/kept", "2"), file("x", "3")];
    let upper = [file("d/old", "new"), file("d/.wh.old", ""), file(".wh.x", ""), file(".wh.never-there", "")];
    assert_eq!(merged(&[&lower, &upper]), ["d/d", "f/d/kept", "f/d/old"]);
}

#[test]
fn opaque_directories_hide_all_that_was_below() {
    let lower = [directory("d"), file("d/a", "1"), directory("d/b"), file("d/b/c", "2")];
    let upper = [directory("d"), file("d/new", "3"), file("d/.wh..wh..opq", ""), file("d/.wh..wh.plnk", "")];
    assert_eq!(merged(&[&lower, &upper]), ["d/d", "f/d/new"]);
}

#[test]
fn later_members_replace_earlier_ones_of_any_kind() {
    assert_eq!(merged(&[&[file("a", "1"), directory("a"), file("a/b", "2")]]), ["d/a", "f/a/b"]);
    assert_eq!(merged(&[&[directory("a"), file("a/b", "2"), file("a", "1")]]), ["f/a"]);
    let merged_directories = merged(&[&[directory("a"), file("a/b", "2")], &[directory("a")]]);
    assert_eq!(merged_directories, ["d/a", "f/a/b"]);
}

#[test]
fn parents_are_resolved_through_links_inside_of_the_tree() {
    let lower =
        [directory("usr"), directory("usr/lib"), symlink("lib", "usr/lib"), symlink("up", "/../../usr")];
    let upper = [file("lib/one", "1"), file("up/two", "2"), hard_link("up/three", "lib/one")];
    assert_eq!(
        merged(&[&lower, &upper]),
        ["l/lib", "l/up", "d/usr", "d/usr/lib", "f/usr/lib/one", "f/usr/three", "f/usr/two"]
    );
    // A host path as a link target leads to a directory of the image.
    assert_eq!(merged(&[&[symlink("a", "/tmp"), file("a/PWNED", "x")]]), ["l/a", "d/tmp", "f/tmp/PWNED"]);
}

#[test]
fn hard_links_share_one_inode_and_survive_their_first_name() {
    let lower = tar_of(&[file("a", "contents"), hard_link("b", "a"), hard_link("c", "./b")]);
    let upper = tar_of(&[file(".wh.a", "")]);
    let tree = merge(&[lower, upper]).expect("acceptable layers");
    assert_eq!(listing(&tree), ["f/b", "f/c"]);
    let links: Vec<u32> = tree.inodes().iter().map(|reached| reached.links).collect();
    assert_eq!(links, [2, 2]);
}

#[test]
fn harmless_oddities_are_accepted() {
    assert_eq!(
        merged(&[&[file("/abs", "1"), file("./././x", "2"), file("y//z", "3")]]),
        ["f/abs", "f/x", "d/y", "f/y/z"]
    );
    assert_eq!(merged(&[&[Item(b"old-style/", EntryType::Regular, b"", b"")]]), ["d/old-style"]);
    assert_eq!(
        merge(&[tar_of(&[Item(b"\xff\xfe", EntryType::Regular, b"", b"")])])
            .map(|tree| tree.inodes().len())
            .ok(),
        Some(2)
    );
    assert_eq!(merged(&[&[]]), Vec::<String>::new());
    assert_eq!(merge(&[Vec::new()]).map(|tree| tree.inodes().len()).ok(), Some(1));
}

#[test]
fn nonsense_is_rejected_by_name() {
    assert_eq!(reason(&[file("../x", "")]), Reason::DotDot);
    assert_eq!(reason(&[file("a/../../x", "")]), Reason::DotDot);
    assert_eq!(reason(&[file("a", ""), hard_link("b", "../a")]), Reason::DotDot);
    assert_eq!(reason(&[file("a/../.wh.x", "")]), Reason::DotDot);
    for name in [".wh.", ".wh..", ".wh...", "a/.wh.", ".wh.a/b"] {
        assert_eq!(reason(&[file(name, "")]), Reason::Whiteout, "{name}");
    }
    assert_eq!(reason(&[directory("d"), hard_link("l", "d")]), Reason::LinkDirectory);
    assert_eq!(reason(&[directory("d"), hard_link("l", "/")]), Reason::LinkDirectory);
    assert_eq!(reason(&[file("a", ""), hard_link("a", "a")]), Reason::LinkItself);
    assert_eq!(reason(&[hard_link("a", "missing")]), Reason::LinkMissing);
    assert_eq!(reason(&[hard_link("a", "/etc/passwd")]), Reason::LinkMissing);
    assert_eq!(reason(&[file("./", "x")]), Reason::Root);
    assert_eq!(reason(&[symlink(".", "x")]), Reason::Root);
    assert_eq!(reason(&[symlink("a", "b"), symlink("b", "a"), file("a/x", "")]), Reason::Loop);
    assert_eq!(reason(&[file("a", ""), file("a/b", "")]), Reason::Parent);
    assert_eq!(reason(&[symlink("a", "")]), Reason::Malformed("symbolic link"));
    assert_eq!(reason(&[Item(b"a", EntryType::new(b'Q'), b"", b"")]), Reason::Type);
    assert_eq!(reason(&[Item(b"a", EntryType::GNUSparse, b"", b"")]), Reason::Sparse);
    assert_eq!(reason(&[Item(b"a", EntryType::Directory, b"", b"data")]), Reason::Malformed("size"));
}

#[test]
fn devices_need_numbers_that_mean_a_device() {
    let device = |major, minor| {
        let mut header = raw_header(&Item(b"dev", EntryType::Char, b"", b""));
        header.set_device_major(major).expect("gnu");
        header.set_device_minor(minor).expect("gnu");
        header.set_cksum();
        let mut archive = header.as_bytes().to_vec();
        archive.resize(2048, 0);
        merge(&[archive])
    };
    assert_eq!(device(1, 3).map(|tree| listing(&tree)).ok(), Some(vec!["c/dev".to_owned()]));
    for (major, minor) in [(0, 0), (1 << 12, 0), (1, 1 << 20)] {
        let found = device(major, minor);
        assert!(matches!(found, Err(TreeError::Member { reason: Reason::Device, .. })), "{major} {minor}");
    }
}

/// A member behind pax records.
fn with_pax(records: &[(&str, &[u8])], item: &Item<'_>) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    builder.append_pax_extensions(records.iter().copied()).expect("in memory");
    let mut out = builder.get_ref().clone();
    drop(builder);
    out.extend_from_slice(&tar_of(std::slice::from_ref(item)));
    out
}

fn pax_result(records: &[(&str, &[u8])]) -> Result<Tree, TreeError> {
    merge(&[with_pax(records, &file("f", ""))])
}

fn pax_reason(records: &[(&str, &[u8])]) -> Reason {
    match pax_result(records) {
        Err(TreeError::Member { reason, .. }) => reason,
        other => panic!("expected a rejected member, got {other:?}"),
    }
}

#[test]
fn pax_records_are_honoured_or_rejected() {
    let long = vec![b'x'; 256];
    assert_eq!(pax_reason(&[("path", &long)]), Reason::TooLong("name"));
    assert_eq!(pax_reason(&[("path", b"a\0b")]), Reason::Nul);
    assert_eq!(pax_reason(&[("path", &b"d/".repeat(129))]), Reason::TooLong("path"));
    assert_eq!(pax_reason(&[("path", &b"dddd/".repeat(1000))]), Reason::TooLong("path"));
    assert_eq!(pax_reason(&[("uid", b"4294967295")]), Reason::Owner);
    assert_eq!(pax_reason(&[("gid", b"99999999999999")]), Reason::Owner);
    assert_eq!(pax_reason(&[("uid", b"-1")]), Reason::Malformed("pax uid"));
    assert_eq!(pax_reason(&[("mtime", b"99999999999999999")]), Reason::Time);
    assert_eq!(pax_reason(&[("mtime", b"now")]), Reason::Malformed("pax mtime"));
    assert_eq!(pax_reason(&[("GNU.sparse.major", b"1")]), Reason::Sparse);
    assert_eq!(pax_reason(&[("GNU.sparse.map", b"0,1")]), Reason::Sparse);
    assert_eq!(pax_reason(&[("size", b"9000000000000000000")]), Reason::Malformed("size"));
    assert_eq!(pax_reason(&[("SCHILY.xattr.btrfs.x", b"1")]), Reason::XattrNamespace);
    assert_eq!(pax_reason(&[("SCHILY.xattr.user.x", &vec![0; 70_000])]), Reason::Xattrs);
    let half = vec![0; 40_000];
    let two: [(&str, &[u8]); 2] = [("SCHILY.xattr.user.x", &half), ("SCHILY.xattr.user.y", &half)];
    assert_eq!(pax_reason(&two), Reason::Xattrs);
    assert_eq!(
        pax_result(&[("size", b"1099511627776")]).err().map(|error| error.to_string()),
        Some("the layers exceed the limit of 17179869184 bytes".to_owned())
    );

    let value: &[u8] = b"binary\nwith\0newline=";
    let tree = pax_result(&[
        ("SCHILY.xattr.security.capability", value),
        ("SCHILY.xattr.trusted.overlay.opaque", b"y"),
        ("mtime", b"-12.25"),
        ("uid", b"70000"),
        ("comment", b"ignored"),
    ])
    .expect("acceptable");
    let node = tree.children(NodeId::ROOT).and_then(|children| children.get(b"f".as_slice())).copied();
    let meta = &tree.node(node.expect("there")).meta;
    assert_eq!((meta.mtime, meta.mtime_nsec, meta.uid), (-13, 750_000_000, 70_000));
    assert_eq!(meta.xattrs.len(), 1);
    assert_eq!(meta.xattrs[b"security.capability".as_slice()], value);
}

#[test]
fn a_negative_time_in_base_256_is_kept() {
    let mut header = raw_header(&file("f", ""));
    header.as_old_mut().mtime = [0xff; 12];
    header.set_cksum();
    let tree = merge(&[header.as_bytes().to_vec()]).expect("acceptable");
    let inodes = tree.inodes();
    assert_eq!(tree.node(inodes[1].node).meta.mtime, -1);
}

#[test]
fn damage_is_noticed() {
    let good = tar_of(&[file("a", &"x".repeat(5000))]);
    assert!(merge(&[good[..3000].to_vec()]).is_err(), "cut in the data");
    assert!(merge(&[good[..300].to_vec()]).is_err(), "cut in the header");
    let mut flipped = good.clone();
    flipped[0] ^= 1;
    assert!(matches!(merge(&[flipped]), Err(TreeError::Member { reason: Reason::Checksum, .. })));
    assert!(merge(&[vec![0x55; 4096]]).is_err(), "garbage");
    let packed = gzip(&good);
    assert!(merge(std::slice::from_ref(&packed)).is_ok());
    assert!(merge(&[packed[..packed.len() - 4].to_vec()]).is_err(), "cut in the checksum of gzip");
    let packed = zstd::stream::encode_all(good.as_slice(), 3).expect("packed");
    assert!(merge(std::slice::from_ref(&packed)).is_ok());
    assert!(merge(&[packed[..packed.len() - 4].to_vec()]).is_err(), "cut in zstd");
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).expect("in memory");
    encoder.finish().expect("in memory")
}

#[test]
fn extension_headers_are_bounded_before_they_are_read() {
    // 1 GiB of long name in 1 MiB of gzip would be 1 GiB in memory.
    for kind in [EntryType::GNULongName, EntryType::GNULongLink, EntryType::XHeader, EntryType::XGlobalHeader]
    {
        let mut header = raw_header(&Item(b"x", kind, b"", b""));
        header.set_size(1 << 30);
        header.set_cksum();
        let found = merge(&[header.as_bytes().to_vec()]);
        let too_long = Reason::TooLong("extension header");
        assert!(matches!(found, Err(TreeError::Member { reason, .. }) if reason == too_long), "{kind:?}");
    }
    // Many small ones in a row count together.
    let mut global = Vec::new();
    for _ in 0..5000 {
        global.extend_from_slice(raw_header(&Item(b"g", EntryType::XGlobalHeader, b"", b"")).as_bytes());
    }
    assert!(merge(&[global]).is_err());
}

#[test]
fn bombs_end_early() {
    // 1 GiB of zeros behind the end, and a file of 1 TiB that is not there: both a few bytes on disk.
    let mut encoder = zstd::stream::Encoder::new(Vec::new(), 1).expect("in memory");
    encoder.write_all(&tar_of(&[])).expect("in memory");
    std::io::copy(&mut std::io::Read::take(std::io::repeat(0), 1 << 30), &mut encoder).expect("in memory");
    let packed = encoder.finish().expect("in memory");
    assert!(packed.len() < 1 << 20);
    let behind = merge(&[packed]).expect_err("refused").to_string();
    assert_eq!(behind, "the layers exceed the limit of 67108864 bytes behind the end of an archive");
    let mut header = raw_header(&file("large", ""));
    header.set_size(1 << 40);
    header.set_cksum();
    assert!(matches!(merge(&[header.as_bytes().to_vec()]), Err(TreeError::Limit { what: "bytes", .. })));
}

#[test]
fn followed_links_are_bounded_in_number() {
    // 100 bytes of target hold 16 pairs of steps; 40 links of it are more than 1,024 steps.
    let winding = "d/../".repeat(16) + "n";
    let links: Vec<String> = (0..40).map(|number| format!("l{number}")).collect();
    let targets: Vec<String> =
        (0..40).map(|number| winding.replace('n', &format!("l{}", number + 1))).collect();
    let mut items = vec![directory("d")];
    for (link, target) in links.iter().zip(&targets) {
        items.push(symlink(link, target));
    }
    items.push(directory("l40"));
    items.push(file("l0/x", ""));
    assert_eq!(reason(&items), Reason::Loop);
}

#[test]
fn limits_hold_over_all_layers() {
    let limits = Limits { total_bytes: 10, inodes: 4, layers: 2, metadata: 64, ..Limits::default() };
    let exceeded = |layers: &[Vec<u8>]| match merge_with(layers, &limits) {
        Err(TreeError::Limit { what, .. }) => what,
        other => panic!("expected a limit, got {other:?}"),
    };
    assert_eq!(exceeded(&[tar_of(&[file("a", "123456")]), tar_of(&[file("a", "123456")])]), "bytes");
    assert_eq!(exceeded(&[tar_of(&[]), tar_of(&[]), tar_of(&[])]), "layers");
    let five: Vec<Item<'_>> = ["a", "b", "c", "d", "e"].into_iter().map(|name| file(name, "")).collect();
    assert_eq!(exceeded(&[tar_of(&five)]), "inodes");
    assert_eq!(exceeded(&[tar_of(&[file("a/b/c/d/e", "")])]), "inodes");
    assert_eq!(exceeded(&[tar_of(&[symlink("a", &"x".repeat(64))])]), "bytes of metadata");
}

#[test]
fn depth_behind_links_is_bounded_as_well() {
    let mut items = Vec::new();
    let deep = "d/".repeat(40);
    let names: Vec<(String, String, String)> = (0..5)
        .map(|level| {
            let base = if level == 0 { String::new() } else { format!("l{}/", level - 1) };
            (format!("{base}{deep}end"), format!("l{level}"), format!("{base}{deep}"))
        })
        .collect();
    for (file_name, link, target) in &names {
        items.push(file(file_name, ""));
        items.push(symlink(link, target));
    }
    assert_eq!(reason(&items), Reason::TooLong("path"));
}

#[test]
fn the_offending_path_is_shown_harmlessly() {
    let name = format!("\u{1b}[31m{}/../x", "y".repeat(60));
    let error = merge(&[tar_of(&[file(&name, "")])]).expect_err("rejected").to_string();
    assert!(error.starts_with("layer 0: '\\u{1b}[31myyy"), "{error}");
    assert!(!error.contains('\u{1b}'));
    assert_eq!(super::show(&[b'a'; 1000]).chars().count(), 201);
}

#[test]
fn cancelling_stops_between_members() {
    let layer = Layer::Bytes(tar_of(&[file("a", "")]).into());
    assert!(matches!(flatten(&[layer], &Limits::default(), &|| true), Err(TreeError::Cancelled)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Headers with any bytes changed and their checksums repaired: accepted or rejected, never a panic, and
    /// what is accepted can be written.
    #[test]
    fn mutated_headers_are_decided(changes in prop::collection::vec((0_usize..2048, any::<u8>()), 1..12)) {
        let mut archive = with_pax(
            &[("SCHILY.xattr.user.a", b"v"), ("mtime", b"1.5")],
            &Item(b"dir/name", EntryType::Regular, b"target", b"contents"),
        );
        for (at, value) in changes {
            let at = at % archive.len();
            archive[at] = value;
        }
        for start in [0, 1024] {
            if let Some(block) = archive.get_mut(start..start + 512) {
                let mut header = Header::from_byte_slice(block).clone();
                header.set_cksum();
                block.copy_from_slice(header.as_bytes());
            }
        }
        let limits = Limits { total_bytes: 1 << 20, ..Limits::default() };
        let layers = [Layer::Bytes(archive.into())];
        if let Ok(tree) = flatten(&layers, &limits, &|| false) {
            let mut image = Vec::new();
            crate::erofs::write_image(&tree, &layers, &limits, &mut image, &|| false).expect("writable");
            prop_assert_eq!(image.len() % 4096, 0);
        }
    }

    #[test]
    fn any_bytes_are_decided(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        drop(crate::fuzzing::flatten_bytes(&bytes));
    }
}
