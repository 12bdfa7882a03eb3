//! The guest's clock is set when its machine starts, and again whenever somebody sets the host's clock or the host
//! wakes from suspend: meanwhile the guest's clock stood still.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use tokio::io::unix::AsyncFd;

use super::Supervisor;
use super::serve::complain;
use crate::place::Place;

/// How long a guest may take to answer.
const ANSWER: Duration = Duration::from_secs(10);

/// Sets the guest's clock after each jump of the host's, until the task is gone.
pub(super) async fn follow(supervisor: Arc<Supervisor>) {
    let mut gone = supervisor.gone.subscribe();
    let jumps = async {
        let clock = HostClock::watch()?;
        loop {
            clock.jumped().await?;
            let Place::Guest(running) = supervisor.place.borrow().clone() else { continue };
            match tokio::time::timeout(ANSWER, running.guest.set_clock()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => complain(&format!("the guest did not take the host's new time: {error}")),
                Err(_elapsed) => {
                    complain(&format!(
                        "the guest did not take the host's new time within {} s",
                        ANSWER.as_secs()
                    ));
                }
            }
        }
    };
    let ended: io::Result<std::convert::Infallible> = tokio::select! {
        ended = jumps => ended,
        _ = gone.wait_for(|gone| *gone) => return,
    };
    let Err(error) = ended;
    complain(&format!("jumps of the host's clock are not noticed: {error}"));
}

/// A timer on the host's clock that never expires: the kernel cancels it when that clock is set, and when the host resumes
/// from suspend.
struct HostClock(AsyncFd<OwnedFd>);

impl HostClock {
    fn watch() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Realtime, flags)?;
        arm(&timer)?;
        #[expect(unsafe_code, reason = "tokio asks for a promise about the descriptor")]
        // SAFETY: the timer owns its descriptor, and lives in what is made here.
        unsafe { AsyncFd::register(timer) }.map(Self).map_err(io::Error::from)
    }

    async fn jumped(&self) -> io::Result<()> {
        loop {
            let mut ready = self.0.readable().await?;
            match rustix::io::read(self.0.get_ref(), &mut [0; 8]) {
                Err(Errno::AGAIN) => ready.clear_ready(),
                Err(Errno::INTR) => {}
                // The end of time has come, or the clock was set to it.
                Ok(_) | Err(Errno::CANCELED) => {
                    ready.clear_ready();
                    return arm(self.0.get_ref());
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn arm(timer: &OwnedFd) -> io::Result<()> {
    let never = Timespec { tv_sec: i64::MAX, tv_nsec: 0 };
    let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: never };
    let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
    match rustix::time::timerfd_settime(timer, flags, &once) {
        // It was set once more since it was read; the timer is armed all the same.
        Err(Errno::CANCELED) | Ok(_) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_clock_that_nobody_sets_does_not_jump() {
        let clock = HostClock::watch().expect("watched");
        // Somebody may do so just now, but not all the time.
        for _ in 0..20 {
            if tokio::time::timeout(Duration::from_millis(50), clock.jumped()).await.is_err() {
                return;
            }
        }
        panic!("a timer that was never set is over");
    }
}
