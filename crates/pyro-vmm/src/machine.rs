//! A running machine: its byte stream, its end, and the means to bring the end about.
//!
//! ```text
//!   launch ──► running ◄──► paused
//!                 │            │
//!                 └──► ended ◄─┘     powered off | killed | panicked | crashed; for good
//! ```

use std::time::Duration;

use tokio::net::UnixStream;

use crate::confine::Confinement;
use crate::control::Control;
use crate::error::ControlError;
use crate::process::VmmProcess;
use crate::spec::Snapshot;

/// How long the VMM may take to answer a control command. It answers in milliseconds; a busy host may not.
const CONTROL_DEADLINE: Duration = Duration::from_secs(10);
/// How long it may take to save a machine: all of the guest's memory may have to be written.
const SAVE_DEADLINE: Duration = Duration::from_secs(120);
/// How long the VMM may take to quit by itself before it is killed.
const QUIT_DEADLINE: Duration = Duration::from_secs(2);

/// A running machine.
///
/// All methods take `&self` and may be called from any number of tasks. Dropping it kills the machine at once;
/// the process is reaped in the background.
#[derive(Debug)]
pub struct Machine {
    process: VmmProcess,
    confinement: Confinement,
    control: Box<dyn Control>,
}

/// Why a machine has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MachineEnd {
    /// The guest powered itself off, or rebooted, which ends a machine too.
    PoweredOff,
    /// It was ended from here: killed, told to quit, or dropped.
    Killed,
    /// The guest's kernel gave up, by its own words on the console.
    Panicked,
    /// The VMM failed, or someone else killed it.
    Crashed,
}

impl MachineEnd {
    /// The name that records use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PoweredOff => "powered-off",
            Self::Killed => "killed",
            Self::Panicked => "panicked",
            Self::Crashed => "crashed",
        }
    }
}

/// How a machine has ended, with its last words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineExit {
    /// Why.
    pub reason: MachineEnd,
    /// The same in words, for people.
    pub status: String,
    /// The last of what the VMM wrote to its standard error, safe to show.
    pub stderr_tail: String,
    /// The last of what the guest wrote to its serial console, safe to show; the guest chose these words.
    pub console_tail: String,
}

impl Machine {
    pub(crate) fn new(process: VmmProcess, confinement: Confinement, control: Box<dyn Control>) -> Self {
        Self { process, confinement, control }
    }

    /// A byte stream to the guest. On a [`Channel::Serial`](crate::Channel::Serial) there is one, which belongs to the
    /// runtime that launched the machine; on a [`Channel::Vsock`](crate::Channel::Vsock) each is new, and it is waited
    /// for until the guest listens.
    ///
    /// # Errors
    /// When the machine has ended, or the one stream is taken.
    pub async fn connect(&self) -> Result<UnixStream, ControlError> {
        tokio::select! {
            connected = self.control.connect() => connected,
            _ = self.process.wait() => Err(ControlError::Ended),
        }
    }

    /// What the VMM process was found to be kept apart by.
    pub fn confinement(&self) -> &Confinement {
        &self.confinement
    }

    /// The number of the VMM process itself.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    /// When the VMM process started, in clock ticks since the host's boot: with the number, it names the
    /// process for ever. 0 where the host did not tell.
    pub fn start_time(&self) -> u64 {
        self.process.start_time()
    }

    /// Waits for the end of the machine. Any number of tasks may wait, also after the end.
    pub async fn wait(&self) -> MachineExit {
        self.process.wait().await
    }

    /// Kills the machine; its process is gone and reaped when this returns. Again is harmless.
    pub async fn kill(&self) {
        self.process.kill();
        self.process.wait().await;
    }

    /// Kills the machine and does not wait for its end; its process is reaped in the background.
    pub fn kill_at_once(&self) {
        self.process.kill();
    }

    /// Ends the machine kindly: waits up to `grace` for the guest to power itself off, which the caller has
    /// asked it to, then makes the VMM quit, then kills it. It has ended when this returns.
    pub async fn shutdown(&self, grace: Duration) {
        if tokio::time::timeout(grace, self.wait()).await.is_ok() {
            return;
        }
        self.process.note_quit();
        let quit = async {
            if matches!(self.control.quit().await, Ok(()) | Err(ControlError::Ended)) {
                self.wait().await;
            }
        };
        // Whether it obeyed or not, the kill below is what counts.
        tokio::time::timeout(QUIT_DEADLINE, quit).await.ok();
        self.kill().await;
    }

    /// Stops the virtual processors.
    ///
    /// # Errors
    /// When the machine has ended or its VMM does not obey.
    pub async fn pause(&self) -> Result<(), ControlError> {
        within(CONTROL_DEADLINE, self.control.pause()).await
    }

    /// Lets the virtual processors run on.
    ///
    /// # Errors
    /// When the machine has ended or its VMM does not obey.
    pub async fn resume(&self) -> Result<(), ControlError> {
        within(CONTROL_DEADLINE, self.control.resume()).await
    }

    /// Saves a machine that was launched as savable, into files of its own directory. It stays paused. Who resumes it
    /// gives up the files: they are its memory, or will be overwritten.
    ///
    /// # Errors
    /// When the machine has ended or its VMM does not obey, as for want of room.
    pub async fn save(&self) -> Result<Snapshot, ControlError> {
        self.pause().await?;
        within(SAVE_DEADLINE, self.control.save()).await
    }

    /// The last lines of the serial console, safe to show; the guest chose these words.
    pub fn console_tail(&self) -> String {
        self.process.console_text()
    }

    /// The host memory that the VMM process holds now, in bytes; none when it has ended.
    pub fn memory_usage(&self) -> Option<u64> {
        self.process.memory_usage()
    }
}

async fn within<T>(
    deadline: Duration,
    answer: impl Future<Output = Result<T, ControlError>>,
) -> Result<T, ControlError> {
    match tokio::time::timeout(deadline, answer).await {
        Ok(result) => result,
        Err(_elapsed) => Err(ControlError::Timeout { after: deadline }),
    }
}
