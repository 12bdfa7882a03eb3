//! The manifest of an installed environment.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    drop(pyro_image::fuzzing::parse_manifest(bytes));
});
