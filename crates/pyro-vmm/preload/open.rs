//! A library that is loaded into a QEMU before 8.2: it opens the memory of a template to be read.
//!
//! Such a QEMU opens the file of its guest's memory for writing, also where it maps it privately and never writes to the
//! file. In the jail that file cannot be opened for writing, and must not be.
//!
//! It uses no Rust library and one function of the C library that the QEMU is linked with, whichever that is.

#![no_std]
#![crate_type = "cdylib"]

use core::ffi::{CStr, c_char, c_int};

/// The path at which the jail shows the memory of a template.
const MEMORY: &CStr = c"/template-memory";
const AT_FDCWD: c_int = -100;
const O_ACCMODE: c_int = 3;

unsafe extern "C" {
    fn openat(directory: c_int, path: *const c_char, flags: c_int, mode: c_int) -> c_int;
}

/// The mode stands in its register whether or not it was given; without a file to make it is not looked at.
#[unsafe(no_mangle)]
extern "C" fn open64(path: *const c_char, flags: c_int, mode: c_int) -> c_int {
    // SAFETY: whoever calls `open` gives a string that ends.
    let is_memory = !path.is_null() && unsafe { CStr::from_ptr(path) } == MEMORY;
    // Reading is access mode 0.
    let flags = if is_memory { flags & !O_ACCMODE } else { flags };
    // SAFETY: the arguments of the caller's own call.
    unsafe { openat(AT_FDCWD, path, flags, mode) }
}

#[unsafe(no_mangle)]
extern "C" fn open(path: *const c_char, flags: c_int, mode: c_int) -> c_int {
    open64(path, flags, mode)
}

/// What a call of two arguments becomes where the C library checks its callers.
#[unsafe(no_mangle)]
extern "C" fn __open64_2(path: *const c_char, flags: c_int) -> c_int {
    open64(path, flags, 0)
}

#[unsafe(no_mangle)]
extern "C" fn __open_2(path: *const c_char, flags: c_int) -> c_int {
    open64(path, flags, 0)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}
