//! The owner of a machine: a tokio task that alone changes where the commands of a VM or a task run.
//!
//! ```text
//!            start
//!   None ─────────────► Guest or Host      remove: from any state; the owner ends with it
//!     ▲                      │
//!     └─ stop, guest's end ──┘
//! ```
//!
//! Start, stop, command and removal are messages. The owner handles one after another and finishes each, also when the
//! future that sent it is dropped: no caller can leave a change half done. A stop or a removal cuts short what the owner
//! does for an earlier message: a boot, or a command that it runs.
//!
//! The owner belongs to the runtime on which it was spawned. When that runtime ends, or when the last [`Mailbox`] is
//! dropped, the machine ends too.

use std::collections::VecDeque;
use std::fmt;
use std::pin::Pin;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::boot_clock::Alarm;
use crate::ending::Ending;
use crate::error::{Error, ErrorKind};
use crate::place::Place;

/// Where the answer to a message goes. A sender that is gone misses it.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// What differs between a VM and a task.
pub(crate) trait Owned: Send + Sized + 'static {
    /// What a start needs to know.
    type Start: Send;
    /// What start and stop answer.
    type Record: Send;
    /// A command that the owner runs itself.
    type Exec: Send;
    /// What happens to the machine by itself.
    type Event: Send;

    /// Checks whether a start is possible, and takes a slot for it.
    fn admit(&mut self, start: Self::Start) -> impl Future<Output = Result<(), Error>> + Send;

    /// Boots. The future may be dropped, and nothing of the machine runs then.
    fn boot(&mut self) -> impl Future<Output = Result<Place, Error>> + Send;

    /// Records what came of a start: commands run there from now on, or the slot is free again.
    fn started(
        &mut self,
        booted: Result<Place, Error>,
    ) -> impl Future<Output = Result<Self::Record, Error>> + Send;

    /// Ends all commands and powers the guest off; `why` goes into the record.
    fn stop(&mut self, why: Option<&str>) -> impl Future<Output = Result<Self::Record, Error>> + Send;

    /// Runs a command; whatever ends it is in the inbox.
    fn exec(&mut self, exec: Self::Exec, inbox: &mut Inbox<Self>) -> impl Future<Output = ()> + Send;

    /// Ends the machine and removes every trace.
    fn remove(&mut self, ending: Ending) -> impl Future<Output = Result<(), Error>> + Send;

    /// Whether there is nothing left to own.
    fn is_gone(&self) -> bool;

    /// Waits for the next event. The future may be dropped, and another one finds the same event.
    fn event(&self) -> impl Future<Output = Self::Event> + Send;

    /// Reacts to an event.
    fn take_note(&mut self, event: Self::Event) -> impl Future<Output = ()> + Send;
}

/// What an owner can be asked for.
pub(crate) enum Message<M: Owned> {
    Start(M::Start, Reply<M::Record>),
    Stop(Option<&'static str>, Reply<M::Record>),
    Exec(M::Exec),
    /// None: nobody waits for the answer.
    Remove(Ending, Option<Reply<()>>),
}

/// The senders' end.
pub(crate) struct Mailbox<M: Owned>(mpsc::UnboundedSender<Message<M>>);

/// Resolves when a machine's time is up.
type Life = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The owner's end.
pub(crate) struct Inbox<M: Owned> {
    messages: mpsc::UnboundedReceiver<Message<M>>,
    /// Came while the owner was busy.
    waiting: VecDeque<Message<M>>,
    /// Removes the machine when its time is up.
    life: Option<Life>,
    /// How a stop ends commands.
    stopped: Ending,
}

/// Makes both ends. `stopped` is the ending of a command whose machine is stopped; after `life` the machine is removed.
pub(crate) fn mailbox<M: Owned>(stopped: Ending, life: Option<Duration>) -> (Mailbox<M>, Inbox<M>) {
    let (sender, messages) = mpsc::unbounded_channel();
    let life = life.map(|life| -> Life {
        Box::pin(async move {
            match Alarm::after(life) {
                Ok(alarm) => drop(alarm.wait().await),
                // Without a descriptor for the clock that runs on while the host sleeps, this one does.
                Err(_) => tokio::time::sleep(life).await,
            }
        })
    });
    (Mailbox(sender), Inbox { messages, waiting: VecDeque::new(), life, stopped })
}

/// Owns a machine until it is gone, or nobody is left who could send a message.
pub(crate) async fn own<M: Owned>(mut machine: M, mut inbox: Inbox<M>) {
    while !machine.is_gone() {
        let message = tokio::select! {
            biased;
            message = inbox.next() => message,
            event = machine.event() => {
                machine.take_note(event).await;
                continue;
            }
        };
        match message {
            Some(Message::Start(start, reply)) => answer(reply, begin(&mut machine, &mut inbox, start).await),
            Some(Message::Stop(why, reply)) => answer(reply, machine.stop(why).await),
            Some(Message::Exec(exec)) => machine.exec(exec, &mut inbox).await,
            Some(Message::Remove(ending, reply)) => {
                let removed = machine.remove(ending).await;
                if let Some(reply) = reply {
                    answer(reply, removed);
                }
            }
            None => return,
        }
    }
}

async fn begin<M: Owned>(machine: &mut M, inbox: &mut Inbox<M>, start: M::Start) -> Result<M::Record, Error> {
    machine.admit(start).await?;
    let booted = tokio::select! {
        biased;
        ending = inbox.ending() => {
            Err(Error::new(ErrorKind::Cancelled, format!("the start was cut short: {ending}")))
        }
        booted = machine.boot() => booted,
    };
    machine.started(booted).await
}

/// The sender of a message may be gone; the change is made all the same.
pub(crate) fn answer<T>(reply: Reply<T>, answer: Result<T, Error>) {
    drop(reply.send(answer));
}

impl<M: Owned> Mailbox<M> {
    /// Whether the owner is gone.
    pub(crate) fn is_closed(&self) -> bool {
        self.0.is_closed()
    }

    /// Starts the machine. Returns `None` if the machine is gone.
    pub(crate) async fn start(&self, start: M::Start) -> Option<Result<M::Record, Error>> {
        self.ask(|reply| Message::Start(start, reply)).await
    }

    /// Stops the machine. Returns `None` if the machine is gone.
    pub(crate) async fn stop(&self, why: Option<&'static str>) -> Option<Result<M::Record, Error>> {
        self.ask(|reply| Message::Stop(why, reply)).await
    }

    /// Removes the machine. One that is gone already is what was asked for.
    pub(crate) async fn remove(&self, ending: Ending) -> Result<(), Error> {
        self.ask(|reply| Message::Remove(ending, Some(reply))).await.unwrap_or(Ok(()))
    }

    /// Sends a message and waits for its answer; none where the owner is gone, or goes before it has come to this.
    pub(crate) async fn ask<T>(
        &self,
        message: impl FnOnce(Reply<T>) -> Message<M>,
    ) -> Option<Result<T, Error>> {
        let (reply, answer) = oneshot::channel();
        self.0.send(message(reply)).ok()?;
        answer.await.ok()
    }
}

impl<M: Owned> fmt::Debug for Mailbox<M> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Mailbox").field("is_closed", &self.is_closed()).finish()
    }
}

impl<M: Owned> Inbox<M> {
    /// The next message; none once nobody is left who could send one.
    async fn next(&mut self) -> Option<Message<M>> {
        match self.waiting.pop_front() {
            Some(message) => Some(message),
            None => self.receive().await,
        }
    }

    /// Waits until something ends what the owner does now, and keeps every message for later.
    pub(crate) async fn ending(&mut self) -> Ending {
        let mut seen = 0;
        loop {
            while let Some(message) = self.waiting.get(seen) {
                match message {
                    Message::Stop(..) => return self.stopped,
                    Message::Remove(ending, _) => return *ending,
                    Message::Start(..) | Message::Exec(_) => seen += 1,
                }
            }
            match self.receive().await {
                Some(message) => self.waiting.push_back(message),
                // The engine was dropped.
                None => return Ending::Cancelled,
            }
        }
    }

    async fn receive(&mut self) -> Option<Message<M>> {
        tokio::select! {
            biased;
            message = self.messages.recv() => message,
            () = due(&mut self.life) => {
                self.life = None;
                Some(Message::Remove(Ending::TtlExpired, None))
            }
        }
    }
}

async fn due(life: &mut Option<Life>) {
    match life {
        Some(sleep) => sleep.await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::ending::Noun;

    /// A machine that notes what is done with it; it boots when it is allowed to.
    struct Noting {
        notes: Arc<Mutex<Vec<String>>>,
        boots: bool,
        is_gone: bool,
    }

    impl Noting {
        fn note(&self, note: impl Into<String>) {
            self.notes.lock().expect("no panic").push(note.into());
        }
    }

    impl Owned for Noting {
        type Start = ();
        type Record = ();
        type Exec = ();
        type Event = ();

        async fn admit(&mut self, (): ()) -> Result<(), Error> {
            Ok(())
        }

        async fn boot(&mut self) -> Result<Place, Error> {
            tokio::task::yield_now().await;
            if self.boots { Ok(Place::None) } else { std::future::pending().await }
        }

        async fn started(&mut self, booted: Result<Place, Error>) -> Result<(), Error> {
            self.note(booted.as_ref().map_or_else(ToString::to_string, |_| "started".to_owned()));
            booted.map(drop)
        }

        async fn stop(&mut self, _: Option<&str>) -> Result<(), Error> {
            tokio::task::yield_now().await;
            self.note("stopped");
            Ok(())
        }

        async fn exec(&mut self, (): (), inbox: &mut Inbox<Self>) {
            self.note(format!("ended: {}", inbox.ending().await));
        }

        async fn remove(&mut self, ending: Ending) -> Result<(), Error> {
            self.note(format!("removed: {ending}"));
            self.is_gone = true;
            Ok(())
        }

        fn is_gone(&self) -> bool {
            self.is_gone
        }

        async fn event(&self) {
            std::future::pending().await
        }

        async fn take_note(&mut self, (): ()) {}
    }

    /// Runs an owner until it ends, beside its callers; what was done.
    async fn owned(
        boots: bool,
        life: Option<Duration>,
        callers: impl AsyncFnOnce(Mailbox<Noting>),
    ) -> Vec<String> {
        let notes = Arc::new(Mutex::new(Vec::new()));
        let (mailbox, inbox) = mailbox(Ending::Stopped(Noun::Vm), life);
        let machine = Noting { notes: Arc::clone(&notes), boots, is_gone: false };
        tokio::join!(own(machine, inbox), callers(mailbox));
        notes.lock().expect("no panic").clone()
    }

    /// Sends a message and does not wait for its answer.
    async fn give_up<T>(call: impl Future<Output = T>) {
        drop(futures_util::FutureExt::now_or_never(call));
    }

    #[tokio::test]
    async fn a_message_is_brought_to_its_end_when_its_sender_is_gone() {
        let notes = owned(true, None, async |mailbox| {
            give_up(mailbox.start(())).await;
            give_up(mailbox.stop(None)).await;
            // The stop cut the start short, and is followed by this one.
            give_up(mailbox.start(())).await;
            give_up(mailbox.remove(Ending::Deleted(Noun::Vm))).await;
        })
        .await;
        let short = |why| format!("the start was cut short: {why}");
        let expected = [
            short("the VM was stopped"),
            "stopped".to_owned(),
            short("the VM was deleted"),
            "removed: the VM was deleted".to_owned(),
        ];
        assert_eq!(notes, expected);
    }

    #[tokio::test]
    async fn a_boot_that_never_ends_holds_up_neither_a_deletion_nor_the_end_of_the_engine() {
        let notes = owned(false, None, async |mailbox| {
            let (started, removed) =
                tokio::join!(mailbox.start(()), mailbox.remove(Ending::Deleted(Noun::Vm)));
            assert_eq!(started.expect("answered").expect_err("cut short").kind(), ErrorKind::Cancelled);
            removed.expect("removed");
            assert!(mailbox.stop(None).await.is_none(), "nobody is there any more");
            mailbox.remove(Ending::Deleted(Noun::Vm)).await.expect("gone is what was asked for");
        })
        .await;
        assert_eq!(notes.last().map(String::as_str), Some("removed: the VM was deleted"));
        let notes = owned(false, None, async |mailbox| give_up(mailbox.start(())).await).await;
        assert_eq!(notes, ["the start was cut short: it was cancelled"]);
    }

    #[tokio::test]
    async fn the_end_of_its_life_ends_a_command_and_removes_the_machine() {
        let notes = owned(true, Some(Duration::from_millis(1)), async |mailbox| {
            drop(mailbox.0.send(Message::Exec(())));
            mailbox.0.closed().await;
        })
        .await;
        assert_eq!(notes, ["ended: the machine's time is up", "removed: the machine's time is up"]);
    }
}
