//! A program, its arguments, variables and directory, as the kernel takes them: made before the fork, because the child
//! must not allocate.

#![expect(unsafe_code, reason = "the call that becomes another program")]

use std::ffi::{CStr, CString, OsStr};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::process::Command;

/// Where a program without a slash is looked for when the child's variables have no `PATH`, as `execvp` does.
const PATH: &str = "/bin:/usr/bin";
const SHELL: &CStr = c"/bin/sh";

#[derive(Debug)]
pub(crate) struct Program {
    cwd: CString,
    /// Where it may be, in the order in which it is looked for.
    places: Vec<CString>,
    argv: Pointers,
    /// As `argv`, for a script that names no interpreter; the child fills in the second word.
    script_argv: Pointers,
    envp: Pointers,
    /// What the pointers point to.
    _strings: [Vec<CString>; 2],
}

#[derive(Debug)]
struct Pointers(Vec<*const libc::c_char>);

// SAFETY: they point to strings on the heap that the same `Program` owns and nobody changes.
unsafe impl Send for Pointers {}
// SAFETY: as above.
unsafe impl Sync for Pointers {}

impl Program {
    /// The program that a command describes.
    pub(crate) fn new(command: &Command, cwd: &Path) -> io::Result<Self> {
        let name = command.get_program();
        let words = std::iter::once(name).chain(command.get_args()).map(c_string);
        let words = words.collect::<io::Result<Vec<_>>>()?;
        let given = || command.get_envs().filter_map(|(name, value)| Some((name, value?)));
        let variables = given().map(|(name, value)| {
            let mut variable = name.to_owned();
            variable.push("=");
            variable.push(value);
            c_string(&variable)
        });
        let variables = variables.collect::<io::Result<Vec<_>>>()?;
        let places = if name.as_bytes().contains(&b'/') {
            vec![c_string(name)?]
        } else {
            let path = given().find(|(name, _)| *name == "PATH").map(|(_, path)| path);
            let path = path.unwrap_or_else(|| PATH.as_ref());
            let places = std::env::split_paths(path).map(|dir| c_string(dir.join(name).as_os_str()));
            places.collect::<io::Result<_>>()?
        };
        let argv = pointers(words.iter());
        let mut script_argv = pointers(words.iter().skip(1));
        script_argv.0.splice(0..0, [SHELL.as_ptr(), std::ptr::null()]);
        let envp = pointers(variables.iter());
        let cwd = c_string(cwd.as_os_str())?;
        Ok(Self { cwd, places, argv, script_argv, envp, _strings: [words, variables] })
    }

    /// Enters the directory.
    pub(crate) fn enter(&self) -> io::Result<()> {
        rustix::process::chdir(&self.cwd).map_err(io::Error::from)
    }

    /// Becomes the program; returns only with the error that tells most.
    pub(crate) fn execute(&mut self) -> io::Error {
        let mut error = libc::ENOENT;
        for place in &self.places {
            // SAFETY: all are arrays of strings that end with a null.
            unsafe { libc::execve(place.as_ptr(), self.argv.0.as_ptr(), self.envp.0.as_ptr()) };
            let failed = io::Error::last_os_error();
            match failed.raw_os_error() {
                Some(libc::ENOENT | libc::ENOTDIR) => {}
                Some(libc::EACCES) => error = libc::EACCES,
                Some(libc::ENOEXEC) => {
                    self.script_argv.0[1] = place.as_ptr();
                    // SAFETY: as above.
                    unsafe {
                        libc::execve(SHELL.as_ptr(), self.script_argv.0.as_ptr(), self.envp.0.as_ptr())
                    };
                    return failed;
                }
                _ => return failed,
            }
        }
        io::Error::from_raw_os_error(error)
    }
}

fn pointers<'a>(strings: impl Iterator<Item = &'a CString>) -> Pointers {
    Pointers(strings.map(|string| string.as_ptr()).chain([std::ptr::null()]).collect())
}

fn c_string(text: &OsStr) -> io::Result<CString> {
    CString::new(text.to_owned().into_vec()).map_err(io::Error::from)
}
