//! A client of QMP, QEMU's control protocol: JSON lines, answers matched by id, events in between.
//!
//! The types of commands come from `qapi-qmp`; its transport cannot send a descriptor with a command, which
//! restoring a machine needs. The peer is not trusted: whatever it sends costs at most one line of memory, and
//! what is no answer is an error.

mod line;
#[cfg(test)]
mod tests;

use std::os::fd::BorrowedFd;

use qapi_qmp::QmpCommand;
use qapi_spec::Command;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::net::UnixStream;

use crate::error::ControlError;
use line::Lines;

/// The longest refusal that is passed on.
const DESCRIPTION_CHARS_MAX: usize = 500;

/// One connection to a QMP monitor, past its greeting.
///
/// A command whose future was dropped leaves the connection usable: its late answer is skipped by its id.
#[derive(Debug)]
pub struct Qmp {
    lines: Lines,
    last_id: u64,
    events: u64,
}

#[derive(Serialize)]
struct Request<'a, C> {
    execute: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    arguments: Option<&'a C>,
    id: u64,
}

/// Every kind of message that a monitor sends, told apart by which member is there.
#[derive(Deserialize)]
struct Message {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    event: Option<String>,
    id: Option<Value>,
    #[serde(rename = "return")]
    answer: Option<Value>,
    error: Option<Refusal>,
}

#[derive(Deserialize)]
struct Refusal {
    desc: String,
}

impl Qmp {
    /// Waits for the greeting of the monitor and enters command mode.
    ///
    /// The monitor answers the latter when its machine is complete, so this is also how to learn that QEMU has
    /// accepted its command line.
    ///
    /// # Errors
    /// When the peer closes the connection or speaks another protocol.
    pub async fn connect(stream: UnixStream) -> Result<Self, ControlError> {
        let mut qmp = Self { lines: Lines::new(stream), last_id: 0, events: 0 };
        if qmp.next_message().await?.greeting.is_none() {
            return Err(ControlError::Protocol { what: "no greeting" });
        }
        qmp.execute(&qapi_qmp::qmp_capabilities { enable: None }).await?;
        Ok(qmp)
    }

    /// Executes one command and returns its answer.
    ///
    /// # Errors
    /// When the monitor refuses, closes the connection, or breaks the protocol.
    pub async fn execute<C: QmpCommand>(&mut self, command: &C) -> Result<C::Ok, ControlError> {
        self.exchange(command, None).await
    }

    /// Executes one command with a descriptor, as `getfd` and `add-fd` need it.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn execute_with_fd<C: QmpCommand>(
        &mut self,
        command: &C,
        fd: BorrowedFd<'_>,
    ) -> Result<C::Ok, ControlError> {
        self.exchange(command, Some(fd)).await
    }

    /// Makes QEMU end. Its socket may close before the answer is out, which is no error.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn quit(&mut self) -> Result<(), ControlError> {
        match self.execute(&qapi_qmp::quit {}).await {
            Ok(_) | Err(ControlError::Ended) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Reads one message that nobody has asked for; an event, most likely. Cancelling it loses nothing.
    ///
    /// # Errors
    /// When the monitor closes the connection or breaks the protocol.
    pub async fn skip(&mut self) -> Result<(), ControlError> {
        self.next_message().await.map(drop)
    }

    /// How many events have come so far. QEMU may send an event before an answer that was found before it: who waits
    /// for a change has to ask again when events have come while it asked.
    pub fn events(&self) -> u64 {
        self.events
    }

    async fn exchange<C: QmpCommand>(
        &mut self,
        command: &C,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<C::Ok, ControlError> {
        self.last_id += 1;
        let id = self.last_id;
        let line = encode(command, id)?;
        self.lines.send(&line, fd).await?;
        loop {
            let message = self.next_message().await?;
            // Answers to commands that nobody waits for any more have smaller ids. An error without an id is
            // the monitor's answer to what it could not parse, and only this command is under way.
            let ours = match &message.id {
                Some(given) => given.as_u64() == Some(id),
                None => message.error.is_some(),
            };
            if message.event.is_some() || !ours {
                continue;
            }
            if let Some(refusal) = message.error {
                let description = refusal.desc.chars().take(DESCRIPTION_CHARS_MAX).collect();
                return Err(ControlError::Refused { command: <C as Command>::NAME, description });
            }
            let answer = message.answer.ok_or(ControlError::Protocol { what: "an empty answer" })?;
            return serde_json::from_value(answer)
                .map_err(|_| ControlError::Protocol { what: "an answer of another shape" });
        }
    }

    async fn next_message(&mut self) -> Result<Message, ControlError> {
        let line = self.lines.next().await?;
        let message: Message = serde_json::from_slice(&line)
            .map_err(|_| ControlError::Protocol { what: "a line that is no message" })?;
        self.events += u64::from(message.event.is_some());
        Ok(message)
    }
}

fn encode<C: QmpCommand>(command: &C, id: u64) -> Result<Vec<u8>, ControlError> {
    let request = Request { execute: <C as Command>::NAME, arguments: Some(command), id };
    let mut line = serde_json::to_vec(&request)
        .map_err(|_| ControlError::Protocol { what: "a command that is no JSON" })?;
    line.push(b'\n');
    Ok(line)
}
