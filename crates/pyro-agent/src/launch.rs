//! Starting a command: the child begins in its control group, shares the agent's memory until it is another program,
//! and tells an error through that memory.
//!
//! A fork would copy the agent's page tables, and both sides would pay for each page that they touch afterwards; joining
//! a control group would wait for the kernel. Together that is half of the time that a short command takes where
//! the processor is emulated. So `clone3` is called with `CLONE_VM | CLONE_VFORK | CLONE_INTO_CGROUP`: this thread sleeps
//! until the child has executed or ended, as with `vfork`.

#![expect(unsafe_code, reason = "a child that shares this process's memory")]

use std::cell::RefCell;
use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::io::Errno;
use rustix::process::{Pid, Resource, Rlimit};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::user::User;

const STACK_BYTES: usize = 64 << 10;
const SHELL: &CStr = c"/bin/sh";

thread_local! {
    /// Of one child after the other. Not filled: a child touches little of it.
    static STACK: RefCell<Vec<u128>> = RefCell::new(Vec::with_capacity(STACK_BYTES / size_of::<u128>()));
}

/// Everything that a child needs, made before it is there.
#[derive(Debug)]
pub(crate) struct Launch<'a> {
    /// Where the program may be, in the order in which a shell would look.
    pub(crate) candidates: &'a [CString],
    pub(crate) argv: &'a [CString],
    pub(crate) envp: &'a [CString],
    pub(crate) cwd: &'a CStr,
    /// Who runs it; none: root.
    pub(crate) user: Option<&'a User>,
    pub(crate) files: Rlimit,
    /// What becomes stdin, stdout and stderr.
    pub(crate) stdio: [BorrowedFd<'a>; 3],
    /// The directory of the control group.
    pub(crate) cgroup: BorrowedFd<'a>,
    pub(crate) cgroup_namespace: BorrowedFd<'a>,
    pub(crate) mount_namespace: BorrowedFd<'a>,
}

/// Why a command was not started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LaunchError {
    /// Something before the program: the kernel refuses a process, a namespace, a limit.
    Prepare(Errno),
    /// The working directory cannot be entered.
    Directory(Errno),
    /// The program cannot be executed.
    Execute(Errno),
}

/// What parent and child share.
struct Plan<'a> {
    launch: &'a Launch<'a>,
    argv: Vec<*const libc::c_char>,
    /// As `argv`, for a script that names no interpreter; the second word is filled in by the child.
    script_argv: Vec<*const libc::c_char>,
    envp: Vec<*const libc::c_char>,
    error: Option<LaunchError>,
}

/// `struct clone_args`, up to the control group.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Starts a command; it has become its program when this returns.
pub(crate) fn launch(launch: &Launch<'_>) -> Result<Pid, LaunchError> {
    let pointers = |words: &[CString]| -> Vec<*const libc::c_char> {
        words.iter().map(|word| word.as_ptr()).chain([std::ptr::null()]).collect()
    };
    let argv = pointers(launch.argv);
    let mut script_argv = vec![SHELL.as_ptr(), std::ptr::null()];
    script_argv.extend(argv.iter().skip(1));
    let mut plan = Plan { launch, script_argv, envp: pointers(launch.envp), argv, error: None };
    let number = |fd: BorrowedFd<'_>| u64::try_from(fd.as_raw_fd()).unwrap_or(u64::MAX);
    let result = STACK.with_borrow_mut(|stack| {
        let args = CloneArgs {
            flags: CLONE_INTO_CGROUP | u64::from((libc::CLONE_VM | libc::CLONE_VFORK).unsigned_abs()),
            exit_signal: u64::from(libc::SIGCHLD.unsigned_abs()),
            stack: stack.as_mut_ptr().addr() as u64,
            stack_size: STACK_BYTES as u64,
            cgroup: number(launch.cgroup),
            ..CloneArgs::default()
        };
        // A handler that ran in the child would run on this process's memory.
        let _signals = BlockedSignals::all();
        // SAFETY: the child runs on a stack of its own, which outlives it, as this thread sleeps until it has executed or
        // ended; until then it makes system calls, and writes to `plan` only, which nobody reads meanwhile.
        unsafe { clone3(&args, child, &raw mut plan) }
    });
    let number = i32::try_from(result).unwrap_or(-libc::EAGAIN);
    let pid = match number {
        1.. => Pid::from_raw(number).ok_or(LaunchError::Prepare(Errno::AGAIN))?,
        error => return Err(LaunchError::Prepare(Errno::from_raw_os_error(-error))),
    };
    match plan.error {
        None => Ok(pid),
        Some(error) => {
            // It has ended; no `await` came between, so nobody else has reaped it.
            _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
            Err(error)
        }
    }
}

/// All signals of this thread, until dropped.
struct BlockedSignals(libc::sigset_t);

impl BlockedSignals {
    fn all() -> Self {
        let mut before = std::mem::MaybeUninit::uninit();
        let mut all = std::mem::MaybeUninit::uninit();
        // SAFETY: both sets are initialised by the calls before they are read.
        unsafe {
            libc::sigfillset(all.as_mut_ptr());
            libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
            Self(before.assume_init())
        }
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // SAFETY: the set is the one that this thread had.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}

/// The system call. The child calls `entry` with `plan` on its own stack and never comes back.
///
/// # Safety
/// `args` must name a stack for the child, and `entry` must keep to what a child that shares memory may do.
unsafe fn clone3<'a>(args: &CloneArgs, entry: extern "C" fn(*mut Plan<'a>) -> !, plan: *mut Plan<'a>) -> i64 {
    let result;
    // SAFETY: the kernel reads `args`; the registers that a system call changes are named; the parent goes on behind
    // the block with its stack untouched, the child leaves it by a call that does not return.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, {plan}",
            "call {entry}",
            "ud2",
            "2:",
            plan = in(reg) plan,
            entry = in(reg) entry,
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") args,
            in("rsi") size_of::<CloneArgs>(),
            out("rcx") _,
            out("r11") _,
        );
    }
    result
}

/// What the child does. It allocates nothing, takes no lock, and ends in another program or not at all.
extern "C" fn child(plan: *mut Plan<'_>) -> ! {
    // SAFETY: the parent sleeps and lets the plan live until this process has executed or ended.
    let plan = unsafe { &mut *plan };
    let Err(error) = become_command(plan);
    plan.error = Some(error);
    // SAFETY: ends this process without running anything that belongs to the parent.
    unsafe { libc::_exit(127) }
}

fn become_command(plan: &mut Plan<'_>) -> Result<std::convert::Infallible, LaunchError> {
    let launch = plan.launch;
    prepare(launch).map_err(LaunchError::Prepare)?;
    enter(launch.cwd).map_err(LaunchError::Directory)?;
    for (number, fd) in (0..).zip(launch.stdio) {
        // SAFETY: the numbers of the standard streams, which the agent itself keeps open.
        if unsafe { libc::dup2(fd.as_raw_fd(), number) } < 0 {
            return Err(LaunchError::Prepare(last_error()));
        }
    }
    default_signals();
    if let Some(user) = launch.user {
        become_user(user, launch.stdio).map_err(LaunchError::Prepare)?;
    }
    Err(LaunchError::Execute(execute(plan)))
}

fn prepare(launch: &Launch<'_>) -> Result<(), Errno> {
    move_into_link_name_space(launch.cgroup_namespace, Some(LinkNameSpaceType::ControlGroup))?;
    rustix::process::setrlimit(Resource::Nofile, launch.files)?;
    ordinary_priority();
    move_into_link_name_space(launch.mount_namespace, Some(LinkNameSpaceType::Mount))?;
    rustix::process::setsid().map(drop)
}

/// A command takes its turns as others do: see `wait_for_turns`.
fn ordinary_priority() {
    schedule(libc::SCHED_OTHER);
}

/// Makes the agent a process that waits for its turn when it is woken, instead of taking the processor at once from the
/// command that has woken it: a command that starts, writes or ends would be left for the agent and come back again, and
/// each change of the address space empties the caches of an emulated processor.
pub(crate) fn wait_for_turns() {
    schedule(libc::SCHED_BATCH);
}

fn schedule(policy: libc::c_int) {
    // SAFETY: all-zero is the only valid priority of these policies; the call reads it.
    unsafe {
        let parameters: libc::sched_param = std::mem::zeroed();
        // What refuses this leaves the policy as it was, which is slower and no worse.
        libc::syscall(libc::SYS_sched_setscheduler, 0, policy, &raw const parameters);
    }
}

fn enter(cwd: &CStr) -> Result<(), Errno> {
    match rustix::process::chdir(cwd) {
        // A guest that has removed it gets it back.
        Err(Errno::NOENT) if cwd == c"/workspace" => {
            rustix::fs::mkdir(cwd, rustix::fs::Mode::from_raw_mode(0o755))?;
            rustix::process::chdir(cwd)
        }
        entered => entered,
    }
}

/// Gives up root. By bare system calls: those of the C library would change all threads of the agent, whose memory this
/// process shares.
fn become_user(user: &User, stdio: [BorrowedFd<'_>; 3]) -> Result<(), Errno> {
    for fd in stdio {
        // So that /dev/stdout can be opened by its name; the null device stays root's.
        let is_pipe = rustix::fs::fstat(fd).is_ok_and(|found| {
            rustix::fs::FileType::from_raw_mode(found.st_mode) == rustix::fs::FileType::Fifo
        });
        if is_pipe {
            // SAFETY: a call about a descriptor that is open; the numbers are values.
            _ = unsafe { libc::fchown(fd.as_raw_fd(), user.uid, user.gid) };
        }
    }
    let done = |result: libc::c_long| if result < 0 { Err(last_error()) } else { Ok(()) };
    // SAFETY: the kernel reads as many groups as there are; the other calls take numbers.
    unsafe {
        done(libc::syscall(libc::SYS_setgroups, user.groups.len(), user.groups.as_ptr()))?;
        done(libc::syscall(libc::SYS_setresgid, user.gid, user.gid, user.gid))?;
        done(libc::syscall(libc::SYS_setresuid, user.uid, user.uid, user.uid))
    }
}

/// Commands begin with no signal blocked or ignored.
fn default_signals() {
    // SAFETY: this process has its own table of handlers and its own mask; the set is initialised before it is read.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut none = std::mem::MaybeUninit::uninit();
        libc::sigemptyset(none.as_mut_ptr());
        libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut());
    }
}

/// Tries one place after another, as `execvp` does; returns only with the error that tells most.
fn execute(plan: &mut Plan<'_>) -> Errno {
    let mut error = Errno::NOENT;
    for candidate in plan.launch.candidates {
        // SAFETY: all are arrays of strings that end with a null.
        unsafe { libc::execve(candidate.as_ptr(), plan.argv.as_ptr(), plan.envp.as_ptr()) };
        match last_error() {
            Errno::NOENT | Errno::NOTDIR => {}
            Errno::ACCESS => error = Errno::ACCESS,
            Errno::NOEXEC => {
                plan.script_argv[1] = candidate.as_ptr();
                // SAFETY: as above.
                unsafe { libc::execve(SHELL.as_ptr(), plan.script_argv.as_ptr(), plan.envp.as_ptr()) };
                return Errno::NOEXEC;
            }
            other => return other,
        }
    }
    error
}

fn last_error() -> Errno {
    // SAFETY: the address of this thread's own number.
    Errno::from_raw_os_error(unsafe { *libc::__errno_location() })
}
