//! How devices signal interrupts: traits that this crate owns and that a monitor's own types satisfy.
//!
//! A device drives an [`InterruptLine`]; an interrupt controller sends through an [`MsiSink`]. Closures are
//! both, so a handle of any hypervisor crate fits through one line of the monitor's program:
//!
//! ```
//! use vmm_devices::interrupt::InterruptLine;
//!
//! fn needs_a_line(line: impl InterruptLine) {
//!     line.set_level(true);
//! }
//! # struct Handle;
//! # impl Handle { fn set_irq(&self, gsi: u32, level: bool) { assert!(gsi == 4 && level); } }
//! # let vm = Handle;
//! needs_a_line(move |level: bool| vm.set_irq(4, level));
//! ```
//!
//! Lines carry a level, as wires do: a controller sees edges in it. Devices call with their own lock held, so
//! an implementation must not call back into the device.

use std::convert::Infallible;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::Trigger;

/// A wire from a device to an interrupt controller.
pub trait InterruptLine: Send + Sync {
    /// Asserts the line or lets go of it. Asserted means that an interrupt is wanted, whatever
    /// voltage that is. Saying the same level twice means nothing.
    fn set_level(&self, asserted: bool);
}

impl<F: Fn(bool) + Send + Sync> InterruptLine for F {
    fn set_level(&self, asserted: bool) {
        self(asserted);
    }
}

impl<T: InterruptLine + ?Sized> InterruptLine for Arc<T> {
    fn set_level(&self, asserted: bool) {
        (**self).set_level(asserted);
    }
}

/// One line that drives two inputs, as ISA interrupts do on a machine with both a PIC and an I/O APIC.
impl<A: InterruptLine, B: InterruptLine> InterruptLine for (A, B) {
    fn set_level(&self, asserted: bool) {
        self.0.set_level(asserted);
        self.1.set_level(asserted);
    }
}

/// Takes message-signalled interrupts to local APICs (Intel SDM 3A 12.11).
pub trait MsiSink: Send + Sync {
    /// Delivers one message. `address` is 0xfee0_0000 plus destination, redirection hint and destination
    /// mode; `data` is vector, delivery mode, level and trigger mode.
    fn send(&self, address: u64, data: u32);
}

impl<F: Fn(u64, u32) + Send + Sync> MsiSink for F {
    fn send(&self, address: u64, data: u32) {
        self(address, data);
    }
}

impl<T: MsiSink + ?Sized> MsiSink for Arc<T> {
    fn send(&self, address: u64, data: u32) {
        (**self).send(address, data);
    }
}

/// A line that leads nowhere, for a device whose interrupt is not used.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unconnected;

impl InterruptLine for Unconnected {
    fn set_level(&self, _asserted: bool) {}
}

/// A [`vm_superio::Trigger`] on an [`InterruptLine`]: each trigger is a pulse, so the input must be edge-triggered.
#[derive(Clone)]
pub struct EdgeTrigger(Arc<dyn InterruptLine>);

impl EdgeTrigger {
    /// Pulses `line`.
    pub fn new(line: impl InterruptLine + 'static) -> Self {
        Self(Arc::new(line))
    }
}

impl fmt::Debug for EdgeTrigger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EdgeTrigger").finish_non_exhaustive()
    }
}

impl Trigger for EdgeTrigger {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.set_level(true);
        self.0.set_level(false);
        Ok(())
    }
}

/// Several level-triggered devices on one line: it is asserted while any of them asserts its input.
///
/// ```
/// use std::sync::{Arc, Mutex};
/// use vmm_devices::interrupt::{InterruptLine, WiredOr};
///
/// let level = Arc::new(Mutex::new(false));
/// let seen = Arc::clone(&level);
/// let shared = WiredOr::new(move |asserted: bool| *seen.lock().unwrap() = asserted);
/// let (a, b) = (shared.input(), shared.input());
/// a.set_level(true);
/// b.set_level(true);
/// a.set_level(false);
/// assert!(*level.lock().unwrap());
/// drop(b); // a device that is unplugged lets go
/// assert!(!*level.lock().unwrap());
/// ```
#[derive(Clone)]
pub struct WiredOr(Arc<Shared>);

struct Shared {
    line: Box<dyn InterruptLine>,
    /// How many inputs are asserted.
    asserted: Mutex<usize>,
}

impl Shared {
    fn change(&self, by_one_up: bool) {
        let mut asserted = lock(&self.asserted);
        // An input counts itself once, so there is nothing to overflow.
        let (before, after) =
            if by_one_up { (*asserted, *asserted + 1) } else { (*asserted, asserted.saturating_sub(1)) };
        *asserted = after;
        if (before == 0) != (after == 0) {
            self.line.set_level(after != 0);
        }
    }
}

impl WiredOr {
    /// Inputs that share `line`.
    pub fn new(line: impl InterruptLine + 'static) -> Self {
        Self(Arc::new(Shared { line: Box::new(line), asserted: Mutex::new(0) }))
    }

    /// One more input, not asserted. Dropping it lets go of the line.
    pub fn input(&self) -> WiredOrInput {
        WiredOrInput { shared: Arc::clone(&self.0), asserted: Mutex::new(false) }
    }
}

impl fmt::Debug for WiredOr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WiredOr").field("asserted", &*lock(&self.0.asserted)).finish_non_exhaustive()
    }
}

/// One input of a [`WiredOr`].
pub struct WiredOrInput {
    shared: Arc<Shared>,
    asserted: Mutex<bool>,
}

impl InterruptLine for WiredOrInput {
    fn set_level(&self, asserted: bool) {
        let mut present = lock(&self.asserted);
        if std::mem::replace(&mut *present, asserted) != asserted {
            self.shared.change(asserted);
        }
    }
}

impl Drop for WiredOrInput {
    fn drop(&mut self) {
        self.set_level(false);
    }
}

impl fmt::Debug for WiredOrInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WiredOrInput").field("asserted", &*lock(&self.asserted)).finish_non_exhaustive()
    }
}

/// A device whose user panicked is still a device: its state is whole between any two statements.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Lines and messages that tests look at.
#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// Keeps every level and message it was given.
    #[derive(Clone, Debug)]
    pub(crate) struct Recorder<T>(Arc<Mutex<Vec<T>>>);

    impl<T> Default for Recorder<T> {
        fn default() -> Self {
            Self(Arc::default())
        }
    }

    impl<T: Clone> Recorder<T> {
        pub(crate) fn record(&self, what: T) {
            lock(&self.0).push(what);
        }

        /// What came since the last call.
        pub(crate) fn take(&self) -> Vec<T> {
            std::mem::take(&mut *lock(&self.0))
        }
    }

    impl InterruptLine for Recorder<bool> {
        fn set_level(&self, asserted: bool) {
            self.record(asserted);
        }
    }

    impl MsiSink for Recorder<(u64, u32)> {
        fn send(&self, address: u64, data: u32) {
            self.record((address, data));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::Recorder;
    use super::*;

    #[test]
    fn a_trigger_is_a_pulse() {
        let line = Recorder::default();
        EdgeTrigger::new(line.clone()).trigger().unwrap();
        assert_eq!(line.take(), [true, false]);
    }

    #[test]
    fn a_pair_drives_both() {
        let (a, b) = (Recorder::default(), Recorder::default());
        (a.clone(), b.clone()).set_level(true);
        assert_eq!((a.take(), b.take()), (vec![true], vec![true]));
    }

    #[test]
    fn a_repeated_level_counts_once() {
        let line = Recorder::default();
        let or = WiredOr::new(line.clone());
        let (a, b) = (or.input(), or.input());
        a.set_level(true);
        a.set_level(true);
        b.set_level(false);
        a.set_level(false);
        assert_eq!(line.take(), [true, false]);
        a.set_level(true);
        b.set_level(true);
        a.set_level(false);
        assert_eq!(line.take(), [true], "the second one is nothing new, and still there");
        b.set_level(false);
        assert_eq!(line.take(), [false]);
        drop((a, b));
        assert!(line.take().is_empty());
    }
}
