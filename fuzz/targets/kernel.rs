//! A boot image and a module of a kernel package.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    drop(pyro_image::fuzzing::unpack_kernel(bytes));
    drop(pyro_image::fuzzing::parse_modinfo(bytes));
});
