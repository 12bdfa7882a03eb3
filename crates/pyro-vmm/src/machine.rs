//! A running machine: its byte stream, its end, and the means to bring the end about.
//!
//! ```text
//!   launch ──► running ◄──► paused
//!                 │            │
//!                 └──► ended ◄─┘     powered off | killed | panicked | crashed; for good
//! ```

use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use crate::error::ControlError;
use crate::process::VmmProcess;
use crate::qmp::Qmp;

/// A control command on its way to the task that owns the control channel.
type Job = Box<dyn for<'a> FnOnce(&'a mut Qmp) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> + Send>;

/// How long the VMM may take to answer a control command. It answers in milliseconds; a busy host may not.
const CONTROL_DEADLINE: Duration = Duration::from_secs(10);
/// How long the VMM may take to quit by itself before it is killed.
const QUIT_DEADLINE: Duration = Duration::from_secs(2);
/// Control commands that may wait for their turn.
const JOBS: usize = 4;

/// A running machine.
///
/// All methods take `&self` and may be called from any number of tasks. Dropping it kills the machine at once;
/// the process is reaped in the background.
#[derive(Debug)]
pub struct Machine {
    process: VmmProcess,
    stream: Mutex<Option<UnixStream>>,
    control: mpsc::Sender<Job>,
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
    pub(crate) fn new(process: VmmProcess, stream: UnixStream, control: Qmp) -> Self {
        let (jobs, to_do) = mpsc::channel(JOBS);
        drop(tokio::spawn(attend(control, to_do)));
        Self { process, stream: Mutex::new(Some(stream)), control: jobs }
    }

    /// The byte stream to the guest, once.
    ///
    /// It is this process's end of a socket pair and belongs to the runtime that launched the machine.
    pub fn take_stream(&self) -> Option<UnixStream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The number of the VMM process.
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

    /// Ends the machine kindly: waits up to `grace` for the guest to power itself off, which the caller has
    /// asked it to, then makes the VMM quit, then kills it. It has ended when this returns.
    pub async fn shutdown(&self, grace: Duration) {
        if tokio::time::timeout(grace, self.wait()).await.is_ok() {
            return;
        }
        self.process.note_quit();
        let quit = async {
            let asked = self.ask(|qmp| Box::pin(qmp.quit())).await;
            if matches!(asked, Ok(()) | Err(ControlError::Ended)) {
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
        self.ask(|qmp| Box::pin(async { qmp.execute(&qapi_qmp::stop {}).await.map(drop) })).await
    }

    /// Lets the virtual processors run on.
    ///
    /// # Errors
    /// When the machine has ended or its VMM does not obey.
    pub async fn resume(&self) -> Result<(), ControlError> {
        self.ask(|qmp| Box::pin(async { qmp.execute(&qapi_qmp::cont {}).await.map(drop) })).await
    }

    /// The last lines of the serial console, safe to show; the guest chose these words.
    pub fn console_tail(&self) -> String {
        self.process.console_text()
    }

    /// The host memory that the VMM process holds now, in bytes; none when it has ended.
    pub fn memory_usage(&self) -> Option<u64> {
        self.process.memory_usage()
    }

    /// Has a control command executed, and waits for its answer.
    async fn ask<T: Send + 'static>(
        &self,
        command: impl for<'a> FnOnce(
            &'a mut Qmp,
        )
            -> Pin<Box<dyn Future<Output = Result<T, ControlError>> + Send + 'a>>
        + Send
        + 'static,
    ) -> Result<T, ControlError> {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |qmp| {
            Box::pin(async move {
                // Whoever asked may not wait any more.
                answer.send(command(qmp).await).ok();
            })
        });
        let asked = async {
            self.control.send(job).await.map_err(|_gone| ControlError::Ended)?;
            answered.await.unwrap_or(Err(ControlError::Ended))
        };
        match tokio::time::timeout(CONTROL_DEADLINE, asked).await {
            Ok(result) => result,
            Err(_elapsed) => Err(ControlError::Timeout { after: CONTROL_DEADLINE }),
        }
    }
}

/// Executes commands one after another, and reads what the VMM tells in between: it keeps in memory whatever nobody
/// reads, and a guest can make it tell much.
async fn attend(mut control: Qmp, mut jobs: mpsc::Receiver<Job>) {
    loop {
        tokio::select! {
            job = jobs.recv() => match job {
                Some(job) => job(&mut control).await,
                None => return,
            },
            told = control.skip() => {
                if told.is_err() {
                    return;
                }
            }
        }
    }
}
