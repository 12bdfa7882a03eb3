//! The control of a running QEMU: one task owns the QMP connection and executes what it is asked to, in turn.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};

use qapi_qmp::{MigrationCapability, MigrationCapabilityStatus, MigrationStatus};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

use super::{MEMORY, STATE};
use crate::confine;
use crate::control::{Answer, Control};
use crate::error::ControlError;
use crate::qmp::Qmp;
use crate::spec::Snapshot;

/// A command on its way to the task that owns the connection.
type Job = Box<dyn for<'a> FnOnce(&'a mut Qmp) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> + Send>;

/// Commands that may wait for their turn.
const JOBS: usize = 4;

/// Control over one QEMU.
#[derive(Debug)]
pub(super) struct QemuControl {
    jobs: mpsc::Sender<Job>,
    stream: Mutex<Option<UnixStream>>,
    /// Where a savable machine is saved.
    dir: Option<PathBuf>,
}

impl QemuControl {
    pub(super) fn new(qmp: Qmp, stream: UnixStream, dir: Option<PathBuf>) -> Self {
        let (jobs, to_do) = mpsc::channel(JOBS);
        drop(tokio::spawn(attend(qmp, to_do)));
        Self { jobs, stream: Mutex::new(Some(stream)), dir }
    }

    /// Has something executed, and waits for its answer.
    async fn ask<T: Send + 'static>(
        &self,
        command: impl for<'a> FnOnce(&'a mut Qmp) -> Answer<'a, T> + Send + 'static,
    ) -> Result<T, ControlError> {
        let (answer, answered) = oneshot::channel();
        let job: Job = Box::new(move |qmp| {
            Box::pin(async move {
                // Whoever asked may not wait any more.
                answer.send(command(qmp).await).ok();
            })
        });
        self.jobs.send(job).await.map_err(|_gone| ControlError::Ended)?;
        answered.await.unwrap_or(Err(ControlError::Ended))
    }
}

impl Control for QemuControl {
    fn connect(&self) -> Answer<'_, UnixStream> {
        let stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner).take();
        Box::pin(std::future::ready(stream.ok_or(ControlError::Taken)))
    }

    fn pause(&self) -> Answer<'_, ()> {
        Box::pin(self.ask(|qmp| Box::pin(async { qmp.execute(&qapi_qmp::stop {}).await.map(drop) })))
    }

    fn resume(&self) -> Answer<'_, ()> {
        Box::pin(self.ask(|qmp| Box::pin(async { qmp.execute(&qapi_qmp::cont {}).await.map(drop) })))
    }

    fn quit(&self) -> Answer<'_, ()> {
        Box::pin(self.ask(|qmp| Box::pin(qmp.quit())))
    }

    fn save(&self) -> Answer<'_, Snapshot> {
        Box::pin(async {
            let Some(dir) = &self.dir else {
                return Err(ControlError::Protocol { what: "the machine was not launched as savable" });
            };
            let saved = Snapshot { state: dir.join(STATE), memory: dir.join(MEMORY) };
            let state = saved.state.clone();
            self.ask(|qmp| Box::pin(async move { save(qmp, &state).await })).await?;
            for file in [&saved.state, &saved.memory] {
                confine::take_back(file).map_err(ControlError::Io)?;
            }
            Ok(saved)
        })
    }
}

/// Executes commands one after another, and reads what QEMU tells in between: it keeps in memory whatever nobody
/// reads, and a guest can make it tell much.
async fn attend(mut qmp: Qmp, mut jobs: mpsc::Receiver<Job>) {
    loop {
        tokio::select! {
            job = jobs.recv() => match job {
                Some(job) => job(&mut qmp).await,
                None => return,
            },
            told = qmp.skip() => {
                if told.is_err() {
                    return;
                }
            }
        }
    }
}

/// Lets a migration leave the memory alone, which is a file of its own on both sides, and tell its progress.
async fn prepare_migration(qmp: &mut Qmp) -> Result<(), ControlError> {
    let on = |capability| MigrationCapabilityStatus { capability, state: true };
    let capabilities = vec![on(MigrationCapability::x_ignore_shared), on(MigrationCapability::events)];
    qmp.execute(&qapi_qmp::migrate_set_capabilities { capabilities }).await.map(drop)
}

/// The name that QEMU knows the file of the state by.
const STATE_FD: &str = "state";

/// Hands QEMU a file by its descriptor; returns how migrations name it.
async fn hand_over(qmp: &mut Qmp, file: &fs_err::File) -> Result<Option<String>, ControlError> {
    let name = qapi_qmp::getfd { fdname: STATE_FD.to_owned() };
    qmp.execute_with_fd(&name, file.file().as_fd()).await?;
    Ok(Some(format!("fd:{STATE_FD}")))
}

/// A migration into a file.
async fn save(qmp: &mut Qmp, state: &Path) -> Result<(), ControlError> {
    prepare_migration(qmp).await?;
    let file = fs_err::File::create(state).map_err(ControlError::Io)?;
    let uri = hand_over(qmp, &file).await?;
    qmp.execute(&qapi_qmp::migrate { uri, channels: None, detach: None, resume: None }).await?;
    migrated(qmp, "migrate").await
}

/// A migration out of a file; then the machine runs.
pub(super) async fn restore(qmp: &mut Qmp, state: &Path) -> Result<(), ControlError> {
    prepare_migration(qmp).await?;
    let file = fs_err::File::open(state).map_err(ControlError::Io)?;
    let uri = hand_over(qmp, &file).await?;
    qmp.execute(&qapi_qmp::migrate_incoming { uri, channels: None, exit_on_error: None }).await?;
    migrated(qmp, "migrate-incoming").await?;
    qmp.execute(&qapi_qmp::cont {}).await.map(drop)
}

async fn migrated(qmp: &mut Qmp, command: &'static str) -> Result<(), ControlError> {
    loop {
        let events = qmp.events();
        match qmp.execute(&qapi_qmp::query_migrate {}).await?.status {
            Some(MigrationStatus::completed) => return Ok(()),
            Some(MigrationStatus::failed | MigrationStatus::cancelled) => {
                let description = "the machine's state could not be moved".to_owned();
                return Err(ControlError::Refused { command, description });
            }
            // Each change of the status is told: look again after whatever comes next.
            _ if qmp.events() == events => qmp.skip().await?,
            _ => {}
        }
    }
}
