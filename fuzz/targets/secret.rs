//! A guest's headers, in which placeholders are replaced: the value goes nowhere but into a place of a placeholder.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| pyro_net::fuzzing::secret(bytes));
