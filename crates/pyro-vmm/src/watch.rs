//! The thread behind each machine: it reads what the VMM writes, for as long as the VMM lives, and reaps it.
//!
//! It is a thread and not a task, because a machine must be drained and reaped whatever becomes of the runtime
//! that launched it. It ends with the VMM process and with nothing else, so dropping a machine needs only the
//! kill.

use std::any::Any;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyro_process::{Child, Exit};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use tokio::sync::watch;

use crate::machine::{MachineEnd, MachineExit};
use crate::tail::Tail;

const CONSOLE_BYTES: usize = 64 << 10;
const CONSOLE_LINES: usize = 40;
const STDERR_BYTES: usize = 8 << 10;
const STDERR_LINES: usize = 40;
/// What is still read of each stream after the end of the VMM; a descendant of it could write on for ever.
const LAST_BYTES: usize = 256 << 10;
/// What the kernel prints when it gives up. The guest may forge it: it is the guest's own claim.
const PANIC: &str = "Kernel panic - not syncing";
const PANIC_CHARS_MAX: usize = 200;

/// What is known about a running VMM, shared by its machine and its thread.
#[derive(Debug)]
pub(crate) struct Watched {
    console: Mutex<Tail>,
    stderr: Mutex<Tail>,
    /// What was last done from here to end it: one of `ENDING_*`.
    ending: AtomicU8,
}

const ENDING_NOT: u8 = 0;
const ENDING_QUIT: u8 = 1;
const ENDING_KILL: u8 = 2;

/// What the thread reads from.
#[derive(Debug)]
pub(crate) struct Streams {
    pub(crate) console: OwnedFd,
    pub(crate) stderr: OwnedFd,
    /// Where else the VMM writes its own words.
    pub(crate) log: Option<OwnedFd>,
}

pub(crate) type ExitReceiver = watch::Receiver<Option<Arc<MachineExit>>>;

impl Watched {
    pub(crate) fn console_text(&self) -> String {
        lock(&self.console).text(CONSOLE_LINES)
    }

    pub(crate) fn stderr_text(&self) -> String {
        lock(&self.stderr).text(STDERR_LINES)
    }

    /// The VMM is about to be asked to quit.
    pub(crate) fn note_quit(&self) {
        self.ending.fetch_max(ENDING_QUIT, Ordering::Relaxed);
    }

    /// The VMM is about to be killed.
    pub(crate) fn note_kill(&self) {
        self.ending.fetch_max(ENDING_KILL, Ordering::Relaxed);
    }

    fn exit(&self, exit: io::Result<Exit>) -> MachineExit {
        let (reason, status) = match exit.map(|exit| (exit.status(), exit)) {
            Ok((Some(status), _)) => self.reason(status),
            Ok((None, _)) if self.ending.load(Ordering::Relaxed) != ENDING_NOT => {
                (MachineEnd::Killed, "the VMM was ended".to_owned())
            }
            Ok((None, exit)) => (MachineEnd::Crashed, format!("the VMM ended with {exit}")),
            Err(error) => (MachineEnd::Crashed, format!("its status could not be had: {error}")),
        };
        let (stderr_tail, console_tail) = (self.stderr_text(), self.console_text());
        MachineExit { reason, status, stderr_tail, console_tail }
    }

    fn reason(&self, status: ExitStatus) -> (MachineEnd, String) {
        match (status.code(), self.ending.load(Ordering::Relaxed)) {
            (Some(0), ENDING_QUIT) => (MachineEnd::Killed, "the VMM was told to quit".to_owned()),
            (Some(0), _) => match self.panic_words() {
                Some(words) => (MachineEnd::Panicked, format!("the guest kernel panicked: {words}")),
                None => (MachineEnd::PoweredOff, "the guest powered off".to_owned()),
            },
            (None, ENDING_KILL) if status.signal() == Some(libc::SIGKILL) => {
                (MachineEnd::Killed, "the VMM was killed".to_owned())
            }
            _ => (MachineEnd::Crashed, format!("the VMM ended with {status}")),
        }
    }
}

impl Watched {
    /// What the guest's kernel said when it gave up. It is searched for in all that is kept of the console:
    /// the trace that follows it can be longer than what is shown.
    fn panic_words(&self) -> Option<String> {
        let console = lock(&self.console).text(usize::MAX);
        let (_, words) = console.rsplit_once(PANIC)?;
        let words = words.lines().next()?.trim_start_matches(':').trim();
        Some(words.chars().take(PANIC_CHARS_MAX).collect())
    }
}

/// Starts the thread.
///
/// `kept` is what must stay for as long as the VMM lives; it is dropped when the VMM is reaped, before anybody is told.
pub(crate) fn start(
    child: Reaper,
    streams: Streams,
    kept: Box<dyn Any + Send>,
) -> io::Result<(Arc<Watched>, ExitReceiver)> {
    let watched = Arc::new(Watched {
        console: Mutex::new(Tail::new(CONSOLE_BYTES)),
        stderr: Mutex::new(Tail::new(STDERR_BYTES)),
        ending: AtomicU8::new(ENDING_NOT),
    });
    let (sender, receiver) = watch::channel(None);
    let shared = Arc::clone(&watched);
    let thread = move || {
        drain_until_end(&child, &streams, &shared);
        let exit = child.reap();
        drop(kept);
        sender.send_replace(Some(Arc::new(shared.exit(exit))));
    };
    // A refused thread drops the closure, and with it the child.
    std::thread::Builder::new().name("pyro-machine".to_owned()).stack_size(256 << 10).spawn(thread)?;
    Ok((watched, receiver))
}

/// A child that is ended and reaped whatever happens.
#[derive(Debug)]
pub(crate) struct Reaper(Option<Child>);

impl Reaper {
    pub(crate) fn new(child: Child) -> Self {
        Self(Some(child))
    }

    /// Waits for the end of the child.
    fn reap(mut self) -> io::Result<Exit> {
        self.0.take().expect("only reaping takes it").wait()
    }
}

impl Deref for Reaper {
    type Target = Child;

    fn deref(&self) -> &Child {
        self.0.as_ref().expect("only reaping takes it")
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        if let Some(mut child) = self.0.take() {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// Reads both streams until the VMM has ended and what it left in them is read.
fn drain_until_end(child: &Child, streams: &Streams, watched: &Watched) {
    let mut sources = [
        (Some(streams.console.as_fd()), &watched.console),
        (Some(streams.stderr.as_fd()), &watched.stderr),
        (streams.log.as_ref().map(AsFd::as_fd), &watched.stderr),
    ];
    for (fd, _) in &sources {
        // A stream that cannot be made non-blocking would hang this thread: it is better not read at all.
        if fd.is_some_and(|fd| rustix::io::ioctl_fionbio(fd, true).is_err()) {
            return;
        }
    }
    let mut buffer = vec![0; 16 << 10];
    loop {
        let mut fds = vec![PollFd::from_borrowed_fd(child.pidfd(), PollFlags::IN)];
        fds.extend(
            sources.iter().filter_map(|(fd, _)| *fd).map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)),
        );
        match rustix::event::poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            // Poll fails for want of memory at worst; the wait that follows still works.
            Err(_) => return,
        }
        let ended = !fds[0].revents().is_empty();
        let budget = if ended { LAST_BYTES } else { buffer.len() };
        for (fd, tail) in &mut sources {
            if let Some(open) = *fd
                && !read_some(open, tail, &mut buffer, budget)
            {
                *fd = None;
            }
        }
        if ended {
            return;
        }
    }
}

/// Reads at most `budget` bytes without waiting; tells whether the stream is still open.
fn read_some(fd: BorrowedFd<'_>, tail: &Mutex<Tail>, buffer: &mut [u8], budget: usize) -> bool {
    let mut total = 0;
    while total < budget {
        match rustix::io::read(fd, &mut *buffer) {
            Ok(0) => return false,
            Ok(count) => {
                lock(tail).push(&buffer[..count]);
                total += count;
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return true,
            Err(_) => return false,
        }
    }
    true
}

fn lock(tail: &Mutex<Tail>) -> MutexGuard<'_, Tail> {
    tail.lock().unwrap_or_else(PoisonError::into_inner)
}
