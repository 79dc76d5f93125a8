//! Devices for which something becomes due as time passes, and what an event loop does with them.

use std::fmt;
use std::sync::{Mutex, MutexGuard};

use crate::bus::{BusDevice, BusDeviceMut};
use crate::interrupt::lock;

/// A device that signals interrupts at times of its own.
pub trait TimedDevice: Send {
    /// When [`service`](Self::service) has something to do next, as a time of the device's clock in nanoseconds; `None`
    /// if never, unless the guest changes something. An access may change it: [`Timed`] tells.
    fn next_deadline(&self) -> Option<u64>;

    /// Signals what became due until now. Nothing happens if it is called too early or too often.
    fn service(&mut self);
}

/// A [`TimedDevice`] on a bus, which tells the event loop when a guest's access has changed the deadline.
///
/// ```
/// use std::sync::{Arc, mpsc};
/// use vmm_devices::interrupt::Unconnected;
/// use vmm_devices::platform::{Pit, ports};
/// use vmm_devices::{Clock, ManualClock, PioBus, Timed};
///
/// let (clock, (wake, woken)) = (Arc::new(ManualClock::new(0)), mpsc::channel());
/// let pit = Arc::new(Timed::new(Pit::new(clock.clone(), Unconnected), move |_| wake.send(()).unwrap_or(())));
/// let bus = PioBus::new();
/// bus.insert("PIT", ports::PIT[0], pit.clone())?;
///
/// bus.write(0x43, 1, &[0x34]); // the guest starts a periodic timer of 1000 ticks
/// bus.write(0x40, 1, &[0xe8, 0x03]);
/// assert!(woken.try_recv().is_ok()); // so the event loop asks for the deadline, and sleeps until then
/// let deadline = pit.service().expect("it runs");
/// assert_eq!(deadline, 838_096);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Timed<D> {
    device: Mutex<D>,
    wake: Box<dyn Fn(Option<u64>) + Send + Sync>,
}

impl<D: TimedDevice> Timed<D> {
    /// Calls `wake` with the new deadline after each access that changes it, on the thread of that access, with nothing locked.
    pub fn new(device: D, wake: impl Fn(Option<u64>) + Send + Sync + 'static) -> Self {
        Self { device: Mutex::new(device), wake: Box::new(wake) }
    }

    /// Services the device and returns its next deadline: one turn of the event loop.
    pub fn service(&self) -> Option<u64> {
        let mut device = self.lock();
        device.service();
        device.next_deadline()
    }

    /// The device itself, kept from everybody else while the guard lives. Changes of the deadline are not told.
    pub fn lock(&self) -> MutexGuard<'_, D> {
        lock(&self.device)
    }

    fn access(&self, access: impl FnOnce(&mut D)) {
        let mut device = self.lock();
        let before = device.next_deadline();
        access(&mut *device);
        let after = device.next_deadline();
        drop(device);
        if after != before {
            (self.wake)(after);
        }
    }
}

impl<D: TimedDevice + BusDeviceMut> BusDevice for Timed<D> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.access(|device| device.read(offset, data));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.access(|device| device.write(offset, data));
    }
}

impl<D: TimedDevice + fmt::Debug> fmt::Debug for Timed<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Timed").field("device", &*self.lock()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::testing::Recorder;

    /// Its deadline is what was written last, zero for none; servicing it ends that.
    struct Alarm(Option<u64>);

    impl TimedDevice for Alarm {
        fn next_deadline(&self) -> Option<u64> {
            self.0
        }

        fn service(&mut self) {
            self.0 = None;
        }
    }

    impl BusDeviceMut for Alarm {
        fn read(&mut self, _: u64, _: &mut [u8]) {
            self.0 = None;
        }

        fn write(&mut self, _: u64, data: &[u8]) {
            self.0 = data.first().map(|&byte| byte.into()).filter(|&due| due != 0);
        }
    }

    #[test]
    fn only_changes_wake() {
        let woken = Recorder::default();
        let seen = woken.clone();
        let timed = Timed::new(Alarm(None), move |deadline| seen.record(deadline));
        timed.write(0, &[5]);
        timed.write(0, &[5]);
        timed.write(0, &[6]);
        assert_eq!(woken.take(), [Some(5), Some(6)]);
        timed.read(0, &mut []);
        timed.read(0, &mut []);
        assert_eq!(woken.take(), [None]);
        timed.write(0, &[7]);
        woken.take();
        assert_eq!(timed.service(), None);
        assert!(woken.take().is_empty(), "who services knows");
    }
}
