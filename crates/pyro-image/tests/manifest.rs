//! Manifests are decoded as if a stranger had written them.

use proptest::prelude::*;
use pyro_image::ManifestError;
use pyro_image::fuzzing::parse_manifest;
use serde_json::json;

fn good() -> serde_json::Value {
    let digest = "ab".repeat(32);
    json!({
        "format_version": 1, "name": "debian:12", "version": "1.0.0", "catalog_version": "2.0.0",
        "digest": digest, "kernel_digest": digest, "source": "debian-packages",
        "packages": [{"name": "bash", "version": "5"}],
        "files": {"rootfs.erofs": {"sha256": digest, "size": 1, "mtime_ns": -1, "inode": 2}},
    })
}

fn parse(value: &serde_json::Value) -> Result<pyro_image::Manifest, ManifestError> {
    parse_manifest(value.to_string().as_bytes())
}

#[test]
fn what_was_written_is_read() {
    let manifest = parse(&good()).expect("good");
    assert_eq!(manifest.packages[0].name, "bash");
    assert_eq!(manifest.files["rootfs.erofs"].mtime_ns, -1);
}

#[test]
fn other_versions_are_refused_whatever_their_shape() {
    let error = parse(&json!({"format_version": 2, "entirely": "different"})).expect_err("refused");
    assert_eq!(error.to_string(), "its format version is 2, this pyro knows 1");
}

#[test]
fn digests_must_be_digests() {
    let upper = "AB".repeat(32);
    for bad in [
        "",
        "..",
        "/etc/passwd",
        "ab",
        upper.as_str(),
        "../../../../../../../../../../../../../../etc/passwd/aaaaaaaaaaaaaa",
    ] {
        for field in ["digest", "kernel_digest"] {
            let mut value = good();
            value[field] = json!(bad);
            assert!(matches!(parse(&value), Err(ManifestError::Field(_))), "{field} {bad}");
        }
    }
}

#[test]
fn file_names_must_stay_inside() {
    for bad in ["", "/etc/passwd", "../x", "a/../b", "a/b/c", ".hidden", "a//b", "new\nline"] {
        let mut value = good();
        let record = value["files"]["rootfs.erofs"].clone();
        value["files"][bad] = record;
        assert!(matches!(parse(&value), Err(ManifestError::Field("files"))), "{bad}");
    }
}

#[test]
fn length_is_bounded() {
    let mut value = good();
    value["source"] = json!("x".repeat(2 << 20));
    assert!(matches!(parse(&value), Err(ManifestError::Read(_))));
    assert!(matches!(parse_manifest(&b"[".repeat(100_000)), Err(ManifestError::Malformed(_))));
}

proptest! {
    #[test]
    fn mutated_manifests_are_decided(at in 0_usize..500, byte in any::<u8>()) {
        let mut bytes = good().to_string().into_bytes();
        let at = at % bytes.len();
        bytes[at] = byte;
        drop(parse_manifest(&bytes));
    }
}
