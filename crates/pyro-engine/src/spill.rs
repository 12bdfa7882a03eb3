//! Output on its way to a reader that may be slower than the command that writes it: what the reader has not taken yet is in a
//! file without a name, so that the command goes on.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, mpsc};
use tokio::task::AbortHandle;

use crate::files;
use crate::guest::{Chunk, Stream};

/// The most that waits in the file, in bytes. Then the command waits, too.
const MOST: u64 = 256 << 20;
/// Of each piece in the file: its stream and its length.
const HEADER: usize = 5;

/// Passes output on, through a file where the reader is behind. Dropping it ends that.
#[derive(Debug)]
pub(crate) struct Spill {
    dir: PathBuf,
    reader: mpsc::Sender<Chunk>,
    /// Made when the reader falls behind for the first time.
    file: Option<Arc<Waiting>>,
    drain: Option<AbortHandle>,
}

/// The reader has gone away.
#[derive(Debug)]
pub(crate) struct Gone;

#[derive(Debug)]
struct Waiting {
    file: File,
    state: Mutex<State>,
    /// Told when there is more, or no more will come.
    more: Notify,
    /// Told when some was taken, or the reader is gone.
    taken: Notify,
}

#[derive(Debug, Default)]
struct State {
    written: u64,
    read: u64,
    is_gone: bool,
}

impl Spill {
    /// Output for this reader; the file will be in `dir`.
    pub(crate) fn new(dir: PathBuf, reader: mpsc::Sender<Chunk>) -> Self {
        Self { dir, reader, file: None, drain: None }
    }

    /// Passes a piece on. Waits only where more waits already than may.
    pub(crate) async fn pass(&mut self, chunk: Chunk) -> Result<(), Gone> {
        let chunk = match &self.file {
            Some(file) if !file.is_empty() => chunk,
            _ => match self.reader.try_send(chunk) {
                Ok(()) => return Ok(()),
                Err(mpsc::error::TrySendError::Closed(_)) => return Err(Gone),
                Err(mpsc::error::TrySendError::Full(chunk)) => chunk,
            },
        };
        let Some(file) = self.file() else {
            // Without room for a file, the command waits.
            return self.reader.send(chunk).await.map_err(|_closed| Gone);
        };
        loop {
            let taken = file.taken.notified();
            {
                let state = file.state();
                if state.is_gone {
                    return Err(Gone);
                }
                if state.written - state.read < MOST {
                    break;
                }
            }
            taken.await;
        }
        match file.put(&chunk) {
            Ok(()) => Ok(()),
            Err(_full) => {
                // In its turn, after what is in the file.
                self.drain().await;
                self.reader.send(chunk).await.map_err(|_closed| Gone)
            }
        }
    }

    /// Waits until the reader has taken all, or is gone.
    pub(crate) async fn drain(&self) {
        let Some(file) = &self.file else { return };
        loop {
            let taken = file.taken.notified();
            if file.is_empty() || file.state().is_gone {
                return;
            }
            taken.await;
        }
    }

    fn file(&mut self) -> Option<Arc<Waiting>> {
        if self.file.is_none() {
            let file = files::unnamed(&self.dir).ok()?;
            let waiting = Arc::new(Waiting {
                file,
                state: Mutex::default(),
                more: Notify::new(),
                taken: Notify::new(),
            });
            self.file = Some(Arc::clone(&waiting));
            self.drain = Some(tokio::spawn(carry(waiting, self.reader.clone())).abort_handle());
        }
        self.file.clone()
    }
}

impl Drop for Spill {
    fn drop(&mut self) {
        if let Some(drain) = &self.drain {
            drain.abort();
        }
    }
}

impl Waiting {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_empty(&self) -> bool {
        let state = self.state();
        state.read == state.written
    }

    fn put(&self, chunk: &Chunk) -> io::Result<()> {
        let length = u32::try_from(chunk.bytes.len()).map_err(io::Error::other)?;
        let mut header = [u8::from(chunk.stream == Stream::Stderr); HEADER];
        header[1..].copy_from_slice(&length.to_le_bytes());
        let mut state = self.state();
        self.file.write_all_at(&[&header[..], &chunk.bytes].concat(), state.written)?;
        state.written += HEADER as u64 + u64::from(length);
        drop(state);
        self.more.notify_one();
        Ok(())
    }

    /// Reads the next piece, if there is one; tells where it ends.
    fn next(&self) -> io::Result<Option<(Chunk, u64)>> {
        let at = {
            let state = self.state();
            if state.read == state.written {
                return Ok(None);
            }
            state.read
        };
        let mut header = [0; HEADER];
        self.file.read_exact_at(&mut header, at)?;
        let [stream, length @ ..] = header;
        let mut bytes = vec![0; u32::from_le_bytes(length) as usize];
        self.file.read_exact_at(&mut bytes, at + HEADER as u64)?;
        let end = at + (HEADER + bytes.len()) as u64;
        Ok(Some((Chunk { stream: if stream == 0 { Stream::Stdout } else { Stream::Stderr }, bytes }, end)))
    }

    /// Everything up to here was taken; a file of which all was taken begins anew.
    fn took(&self, end: u64) {
        let mut state = self.state();
        state.read = end;
        if state.read == state.written && self.file.set_len(0).is_ok() {
            (state.read, state.written) = (0, 0);
        }
        drop(state);
        self.taken.notify_waiters();
    }
}

/// Gives the reader what waits, in order.
async fn carry(waiting: Arc<Waiting>, reader: mpsc::Sender<Chunk>) {
    loop {
        match waiting.next() {
            Ok(Some((chunk, end))) => {
                if reader.send(chunk).await.is_err() {
                    break;
                }
                waiting.took(end);
            }
            Ok(None) => waiting.more.notified().await,
            // What cannot be read back is lost, which the reader must not take for the end.
            Err(_unreadable) => break,
        }
    }
    waiting.state().is_gone = true;
    waiting.taken.notify_waiters();
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn chunk(number: u32) -> Chunk {
        let stream = if number.is_multiple_of(3) { Stream::Stderr } else { Stream::Stdout };
        Chunk { stream, bytes: number.to_le_bytes().repeat(1 + number as usize % 5000) }
    }

    #[tokio::test]
    async fn a_reader_that_is_behind_gets_all_in_order() {
        let dir = tempfile::tempdir().expect("a directory");
        let (sender, mut reader) = mpsc::channel(4);
        let mut spill = Spill::new(dir.path().to_owned(), sender);
        // Twice behind, and in step between.
        for _ in 0..2 {
            for number in 0..2000 {
                spill.pass(chunk(number)).await.expect("kept");
            }
            let read = async {
                for number in 0..2000 {
                    let (wanted, got) = (chunk(number), reader.recv().await.expect("passed on"));
                    assert_eq!((got.stream, got.bytes), (wanted.stream, wanted.bytes), "{number}");
                }
            };
            tokio::join!(read, spill.drain());
            assert_eq!(spill.file.as_ref().expect("made").file.metadata().expect("there").len(), 0);
        }
        assert_eq!(std::fs::read_dir(dir.path()).expect("there").count(), 0, "the file has no name");
    }

    #[tokio::test]
    async fn a_reader_that_goes_away_is_noticed() {
        let dir = tempfile::tempdir().expect("a directory");
        let (sender, reader) = mpsc::channel(1);
        let mut spill = Spill::new(dir.path().to_owned(), sender);
        for number in 0..10 {
            spill.pass(chunk(number)).await.expect("kept");
        }
        drop(reader);
        let gone = async {
            spill.drain().await;
            while spill.pass(chunk(1)).await.is_ok() {}
        };
        tokio::time::timeout(Duration::from_secs(10), gone).await.expect("noticed");
    }
}
