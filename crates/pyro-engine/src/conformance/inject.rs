//! System calls that a test has a running VMM make, as a guest that broke out of its machine could: the VMM is stopped in a
//! call of its own by ptrace, makes another, and goes on.

#![expect(unsafe_code, reason = "ptrace has no safe wrapper")]

use std::io;
use std::os::unix::fs::FileExt;

/// A stopped process. Dropping it lets the process go on where it was.
pub(super) struct Stopped {
    pid: i32,
    saved: libc::user_regs_struct,
    memory: fs_err::File,
    /// Where arguments are written to: below the stack of the stopped thread.
    scratch: u64,
}

/// An argument of a system call.
pub(super) enum Arg<'a> {
    Number(u64),
    /// Bytes in memory; a text ends with a zero of its own.
    Bytes(&'a [u8]),
}

/// A text as a system call takes it.
pub(super) fn text(text: &str) -> Vec<u8> {
    [text.as_bytes(), b"\0"].concat()
}

impl Stopped {
    /// Stops the main thread of a process, which waits in a system call. All that follows must be on this thread.
    pub(super) fn seize(pid: u32) -> io::Result<Self> {
        let pid = i32::try_from(pid).map_err(io::Error::other)?;
        ptrace(libc::PTRACE_SEIZE, pid, 0, 0)?;
        let saved = loop {
            ptrace(libc::PTRACE_INTERRUPT, pid, 0, 0)?;
            wait(pid)?;
            let saved = registers(pid)?;
            // Between two calls it is not where a call can be made: it is let go on for a moment.
            let mut code = [0; 2];
            let memory = fs_err::File::open(format!("/proc/{pid}/mem"))?;
            memory.file().read_exact_at(&mut code, saved.rip - 2)?;
            if code == [0x0f, 0x05] {
                break saved;
            }
            ptrace(libc::PTRACE_CONT, pid, 0, 0)?;
            std::thread::yield_now();
        };
        let memory = fs_err::OpenOptions::new().read(true).write(true).open(format!("/proc/{pid}/mem"))?;
        Ok(Self { pid, saved, memory, scratch: saved.rsp - (64 << 10) })
    }

    /// What a system call returns: a value, or the negative number of an error. One that a filter turns away by a signal
    /// returns an error as well.
    pub(super) fn call(&self, number: i64, args: &[Arg<'_>]) -> io::Result<i64> {
        let mut values = [0; 6];
        let mut free = self.scratch;
        for (value, arg) in values.iter_mut().zip(args) {
            *value = match arg {
                Arg::Number(number) => *number,
                Arg::Bytes(bytes) => {
                    self.memory.file().write_all_at(bytes, free)?;
                    let at = free;
                    free += bytes.len().next_multiple_of(64) as u64;
                    at
                }
            };
        }
        let [rdi, rsi, rdx, r10, r8, r9] = values;
        let registers = libc::user_regs_struct {
            rip: self.saved.rip - 2,
            rax: number.cast_unsigned(),
            orig_rax: u64::MAX,
            rdi,
            rsi,
            rdx,
            r10,
            r8,
            r9,
            ..self.saved
        };
        set_registers(self.pid, &registers)?;
        ptrace(libc::PTRACE_SINGLESTEP, self.pid, 0, 0)?;
        if wait(self.pid)? == libc::SIGSYS {
            // The signal stays here: it is not handed on. The step's own signal may wait behind it, and would end the next
            // step before its call.
            if self.is_pending(libc::SIGTRAP)? {
                ptrace(libc::PTRACE_CONT, self.pid, 0, 0)?;
                wait(self.pid)?;
            }
            return Ok(i64::from(-libc::EPERM));
        }
        Ok(self::registers(self.pid)?.rax.cast_signed())
    }
}

impl Stopped {
    fn is_pending(&self, signal: i32) -> io::Result<bool> {
        let status = fs_err::read_to_string(format!("/proc/{}/status", self.pid))?;
        let pending = status.lines().find_map(|line| line.strip_prefix("SigPnd:")).unwrap_or_default();
        let pending = u64::from_str_radix(pending.trim(), 16).map_err(io::Error::other)?;
        Ok(pending & (1 << (signal - 1)) != 0)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // A process that has ended is in nobody's way.
        drop(set_registers(self.pid, &self.saved));
        drop(ptrace(libc::PTRACE_DETACH, self.pid, 0, 0));
    }
}

fn ptrace(request: libc::c_uint, pid: i32, address: usize, data: usize) -> io::Result<()> {
    // SAFETY: whatever the request reads or writes here lives until it returns.
    match unsafe { libc::ptrace(request, pid, address, data) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Waits until the process stops, and returns by which signal.
fn wait(pid: i32) -> io::Result<i32> {
    let mut status = 0;
    // SAFETY: the status is written to.
    if unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL) } != pid {
        return Err(io::Error::last_os_error());
    }
    if libc::WIFSTOPPED(status) {
        return Ok(libc::WSTOPSIG(status));
    }
    Err(io::Error::other(format!("the process has ended: {status:#x}")))
}

fn registers(pid: i32) -> io::Result<libc::user_regs_struct> {
    // SAFETY: plain numbers, all of which may be zero.
    let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    ptrace(libc::PTRACE_GETREGS, pid, 0, (&raw mut registers).addr())?;
    Ok(registers)
}

fn set_registers(pid: i32, registers: &libc::user_regs_struct) -> io::Result<()> {
    ptrace(libc::PTRACE_SETREGS, pid, 0, std::ptr::from_ref(registers).addr())
}
