//! Waiting by the boot clock, which nobody can set and which runs on while the host sleeps.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use tokio::io::unix::AsyncFd;

/// Resolves once, when its time has passed.
#[derive(Debug)]
pub(crate) struct Alarm(AsyncFd<OwnedFd>);

impl Alarm {
    /// An alarm that goes off after so long.
    ///
    /// # Errors
    /// When the process has no descriptor left.
    pub(crate) fn after(time: Duration) -> io::Result<Self> {
        // A timer of no time at all would be none.
        let time = time.max(Duration::from_millis(1));
        let timer = rustix::time::timerfd_create(
            TimerfdClockId::Boottime,
            TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC,
        )?;
        let value = Timespec {
            tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(time.subsec_nanos()),
        };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        rustix::time::timerfd_settime(&timer, TimerfdTimerFlags::empty(), &once)?;
        #[expect(unsafe_code, reason = "tokio asks for a promise about the descriptor")]
        // SAFETY: the timer owns its descriptor, and lives in what is made here.
        unsafe { AsyncFd::register(timer) }.map(Self).map_err(io::Error::from)
    }

    /// Waits until it goes off; again, it returns at once.
    pub(crate) async fn wait(&self) -> io::Result<()> {
        // Nothing reads the timer, so it stays readable.
        self.0.readable().await.map(|mut ready| ready.retain_ready())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_alarm_goes_off_once_its_time_has_passed_and_stays_so() {
        let began = std::time::Instant::now();
        let alarm = Alarm::after(Duration::from_millis(30)).expect("made");
        alarm.wait().await.expect("it goes off");
        assert!(began.elapsed() >= Duration::from_millis(30));
        alarm.wait().await.expect("it has gone off");
        Alarm::after(Duration::ZERO).expect("made").wait().await.expect("at once");
    }
}
