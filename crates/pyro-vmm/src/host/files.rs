//! The files that a QEMU needs to run: its libraries, by its loader's own word, its firmware and its modules.

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::version::run;

/// The firmware that starts a kernel without option ROMs. QEMU's own choice for this machine is SeaBIOS, which does
/// not; only Debian 12 has the other one under that name.
const FIRMWARE: &str = "qboot.rom";
/// The module that holds the emulator, where a distribution builds QEMU in modules.
const MODULE: &str = "accel-tcg-x86_64.so";
/// Where the loader looks for libraries, beside the usual directories.
pub(super) const LOADER_CACHE: &str = "/etc/ld.so.cache";

/// What a jail must hold for a QEMU to run in it: each file at its own path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QemuFiles {
    /// The program, its libraries, its loader and that one's cache, and the module of the emulator.
    pub programs: Vec<PathBuf>,
    /// The firmware.
    pub firmware: PathBuf,
    /// The directory of modules, where there is one.
    pub modules: Option<PathBuf>,
}

/// Why the files are not known.
#[derive(Debug, thiserror::Error)]
pub(super) enum FilesError {
    /// It runs programs that cannot be known.
    #[error(
        "{} is a script that runs the real program: put that one's directory first in PATH",
        binary.display()
    )]
    Script { binary: PathBuf },
    #[error("{}: the library {name} is missing", binary.display())]
    NoLibrary { binary: PathBuf, name: String },
    #[error("{}: the firmware {FIRMWARE} is in none of its directories: {places}", binary.display())]
    NoFirmware { binary: PathBuf, places: String },
    #[error("{}: {source}", binary.display())]
    Io {
        binary: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl QemuFiles {
    /// Asks a QEMU and its loader.
    pub(super) fn of(binary: &Path) -> Result<Self, FilesError> {
        let failed = |source| FilesError::Io { binary: binary.to_owned(), source };
        // The jail shows the program itself, and its modules and firmware lie beside that.
        let binary = &fs_err::canonicalize(binary).map_err(failed)?;
        if is_script(binary).map_err(failed)? {
            return Err(FilesError::Script { binary: binary.clone() });
        }
        let mut programs = BTreeSet::from([binary.clone()]);
        programs.extend(libraries(binary)?);
        let modules = module_directories(binary).into_iter().find(|dir| dir.join(MODULE).is_file());
        if let Some(dir) = &modules {
            programs.insert(dir.join(MODULE));
            programs.extend(libraries_of_module(&programs, &dir.join(MODULE))?);
        }
        let cache = PathBuf::from(LOADER_CACHE);
        programs.extend(cache.is_file().then_some(cache));
        let firmware = firmware(binary)?;
        Ok(Self { programs: programs.into_iter().collect(), firmware, modules })
    }

    /// Whether all of them are still there.
    pub(super) fn are_there(&self) -> bool {
        self.programs.iter().chain([&self.firmware]).all(|file| file.is_file())
    }
}

fn is_script(binary: &Path) -> io::Result<bool> {
    let mut start = [0; 2];
    fs_err::File::open(binary)?.read_exact(&mut start)?;
    Ok(&start == b"#!")
}

/// The libraries that a program is run with, and its loader, which is asked to list and not to run it. A program without
/// a loader runs, and tells its version.
fn libraries(binary: &Path) -> Result<Vec<PathBuf>, FilesError> {
    let failed = |source| FilesError::Io { binary: binary.to_owned(), source };
    let (_, listed) = run(binary, &["-version"], &[("LD_TRACE_LOADED_OBJECTS", "1")]).map_err(failed)?;
    parse_list(binary, &listed)
}

/// The same for a module, by the loader of its program.
fn libraries_of_module(programs: &BTreeSet<PathBuf>, module: &Path) -> Result<Vec<PathBuf>, FilesError> {
    let is_loader = |path: &&PathBuf| {
        path.file_name().is_some_and(|name| {
            let name = name.to_string_lossy();
            name.starts_with("ld-linux") || name.starts_with("ld-musl")
        })
    };
    let Some(loader) = programs.iter().find(is_loader) else { return Ok(Vec::new()) };
    let failed = |source| FilesError::Io { binary: module.to_owned(), source };
    let (_, listed) = run(loader, &["--list", &module.to_string_lossy()], &[]).map_err(failed)?;
    parse_list(module, &listed)
}

/// Reads lines such as `libc.so.6 => /lib/libc.so.6 (0x7f…)` and `/lib64/ld-linux-x86-64.so.2 (0x7f…)`.
fn parse_list(binary: &Path, listed: &str) -> Result<Vec<PathBuf>, FilesError> {
    let mut found = Vec::new();
    for line in listed.lines().filter_map(|line| line.strip_prefix('\t')) {
        let (name, place) = line.split_once(" => ").unwrap_or((line, line));
        if place.trim() == "not found" {
            return Err(FilesError::NoLibrary { binary: binary.to_owned(), name: name.to_owned() });
        }
        let path = place.rsplit_once(" (").map_or(place, |(path, _)| path);
        // What the kernel maps by itself has no path.
        found.extend(path.starts_with('/').then(|| PathBuf::from(path)));
    }
    Ok(found)
}

fn firmware(binary: &Path) -> Result<PathBuf, FilesError> {
    let failed = |source| FilesError::Io { binary: binary.to_owned(), source };
    let (_, places) = run(binary, &["-L", "help"], &[]).map_err(failed)?;
    let found = places.lines().map(|dir| Path::new(dir).join(FIRMWARE)).find(|path| path.is_file());
    found.ok_or_else(|| FilesError::NoFirmware {
        binary: binary.to_owned(),
        places: places.lines().collect::<Vec<_>>().join(", "),
    })
}

/// Where distributions keep QEMU's modules: beside the program.
fn module_directories(binary: &Path) -> Vec<PathBuf> {
    let Some(prefix) = binary.parent().and_then(Path::parent) else { return Vec::new() };
    ["lib/x86_64-linux-gnu/qemu", "lib64/qemu", "lib/qemu", "libexec/qemu"]
        .into_iter()
        .map(|dir| prefix.join(dir))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loaders_list_is_read_as_it_prints_it() {
        let listed = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibz.so.1 => /lib/libz.so.1 (0x00007f91)\n\
                      \t/lib64/ld-linux-x86-64.so.2 (0x00007f92)\n";
        let found = parse_list(Path::new("/bin/q"), listed).expect("read");
        assert_eq!(found, [Path::new("/lib/libz.so.1"), Path::new("/lib64/ld-linux-x86-64.so.2")]);
        let error = parse_list(Path::new("/bin/q"), "\tlibvde.so.0 => not found\n").expect_err("missing");
        assert_eq!(error.to_string(), "/bin/q: the library libvde.so.0 is missing");
        assert!(parse_list(Path::new("/bin/q"), "QEMU emulator version 7.2\n").expect("static").is_empty());
    }

    #[test]
    fn the_installed_qemu_has_its_files() {
        let Some(binary) = super::super::find_qemu(&std::env::var_os("PATH").unwrap_or_default()) else {
            return;
        };
        let files = QemuFiles::of(&binary).expect("known");
        assert!(files.are_there() && files.programs.len() > 3, "{files:?}");
    }
}
