//! Wakes vCPUs when a time has come: translated code does not look at the clock.
//!
//! One thread for each virtual machine sleeps until the earliest of the times that its vCPUs wait for.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use super::clock::Clock;
use super::signals::Signals;

/// How long the thread waits for the next time to be set after one has come. Timers that tick are set again at once, so
/// that setting them wakes nobody.
const GRACE: u64 = 1_000_000;

/// Longest sleep, in nanoseconds: the clock of a virtual machine can be set.
const LONGEST: u64 = 100_000_000;

/// See the module.
#[derive(Debug)]
pub(crate) struct Alarm {
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct State {
    clock: Arc<Clock>,
    wanted: Mutex<Wanted>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Wanted {
    times: Vec<Time>,
    /// When the thread looks again by itself.
    looks_at: u64,
    ends: bool,
}

#[derive(Debug)]
struct Time {
    vcpu: u32,
    /// Nanoseconds of the virtual machine's clock.
    at: u64,
    signals: Arc<Signals>,
}

impl Alarm {
    /// Starts the thread.
    ///
    /// # Errors
    /// If the host has no more threads.
    pub(crate) fn start(clock: Arc<Clock>) -> std::io::Result<Self> {
        let state = Arc::new(State { clock, wanted: Mutex::default(), changed: Condvar::new() });
        let of_thread = Arc::clone(&state);
        let thread = std::thread::Builder::new().name("alarm".to_owned()).spawn(move || of_thread.run())?;
        Ok(Self { state, thread: Some(thread) })
    }

    /// Gets the attention of vCPU `vcpu` at `at`, instead of the time that was set before.
    pub(crate) fn set(&self, vcpu: u32, at: Option<u64>, signals: &Arc<Signals>) {
        let mut wanted = self.state.lock();
        wanted.times.retain(|time| time.vcpu != vcpu);
        let Some(at) = at else { return };
        wanted.times.push(Time { vcpu, at, signals: Arc::clone(signals) });
        if at < wanted.looks_at {
            self.state.changed.notify_one();
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.state.lock().ends = true;
        self.state.changed.notify_one();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("translate: the alarm's thread has panicked");
        }
    }
}

impl State {
    fn lock(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut wanted = self.lock();
        while !wanted.ends {
            let now = self.clock.nanoseconds();
            let before = wanted.times.len();
            wanted.times.retain(|time| {
                let is_due = time.at <= now;
                if is_due {
                    time.signals.attract();
                }
                !is_due
            });
            let limit = if wanted.times.len() < before { GRACE } else { LONGEST };
            let next = wanted.times.iter().map(|time| time.at.saturating_sub(now)).min();
            let sleep = next.unwrap_or(u64::MAX).min(limit);
            wanted.looks_at = now.saturating_add(sleep);
            let slept = self.changed.wait_timeout(wanted, Duration::from_nanos(sleep));
            wanted = slept.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::hypervisor::ClockSource;

    #[test]
    fn each_vcpu_is_woken_at_its_last_time_alone() {
        let clock = Arc::new(Clock::new(None, ClockSource::Host));
        let alarm = Alarm::start(Arc::clone(&clock)).unwrap();
        let signals = [Arc::new(Signals::new()), Arc::new(Signals::new())];
        let [first, second] = &signals;
        let now = clock.nanoseconds();
        alarm.set(0, Some(now + 1_000_000), first);
        alarm.set(0, None, first);
        alarm.set(1, Some(now + 3_000_000_000), second);
        alarm.set(1, Some(now + 20_000_000), second);
        let start = Instant::now();
        while !second.wants_attention() {
            assert!(start.elapsed() < Duration::from_secs(2), "not woken");
            std::thread::yield_now();
        }
        assert!(clock.nanoseconds() >= now + 20_000_000);
        assert!(!first.wants_attention());
    }
}
