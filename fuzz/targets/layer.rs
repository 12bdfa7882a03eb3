//! One layer of an image, of any compression, read into a tree: refused or taken, in bounded memory.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|layer: &[u8]| {
    drop(pyro_image::fuzzing::flatten_bytes(layer));
});
