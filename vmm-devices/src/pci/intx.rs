//! Interrupt pins: a level that a function drives, and that the guest can keep from leaving it (PCI 3.0, 2.2.6).

use std::fmt;
use std::sync::{Arc, Mutex};

use crate::interrupt::{InterruptLine, WiredOrInput, lock};

/// Which of the four pins a function's interrupt is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum InterruptPin {
    /// INTA#, which a device with one function uses.
    A,
    /// INTB#.
    B,
    /// INTC#.
    C,
    /// INTD#.
    D,
}

impl InterruptPin {
    /// 0 to 3.
    pub(super) const fn index(self) -> u8 {
        match self {
            Self::A => 0,
            Self::B => 1,
            Self::C => 2,
            Self::D => 3,
        }
    }
}

/// Which of a bus's four lines pin `pin` (0 to 3) of a device leads to: they are rotated by the device number, so that
/// functions on INTA# do not all share one (PCI 3.0, 2.2.6).
pub(crate) const fn line_of(device: u8, pin: u8) -> u8 {
    device.wrapping_add(pin) & 3
}

/// The pin of a function, as the function drives it. Clones are the same pin.
///
/// The function's level shows in bit 3 of the status register. While bit 10 of the command register is set, the
/// level goes no further. Any thread may drive it, with or without the function locked.
#[derive(Clone, Default)]
pub struct Intx(Arc<Mutex<Wire>>);

#[derive(Default)]
struct Wire {
    asserted: bool,
    disabled: bool,
    line: Option<WiredOrInput>,
}

impl Wire {
    fn drive(&self) {
        if let Some(line) = &self.line {
            line.set_level(self.asserted && !self.disabled);
        }
    }
}

impl Intx {
    /// The level that the function drives, whether or not it may leave it.
    pub fn is_asserted(&self) -> bool {
        lock(&self.0).asserted
    }

    pub(super) fn set_disabled(&self, disabled: bool) {
        let mut wire = lock(&self.0);
        wire.disabled = disabled;
        wire.drive();
    }

    /// Leads to `line` from now on, or nowhere. The line before lets go.
    pub(super) fn connect(&self, line: Option<WiredOrInput>) {
        let mut wire = lock(&self.0);
        wire.line = line;
        wire.drive();
    }
}

impl InterruptLine for Intx {
    fn set_level(&self, asserted: bool) {
        let mut wire = lock(&self.0);
        wire.asserted = asserted;
        wire.drive();
    }
}

impl fmt::Debug for Intx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wire = lock(&self.0);
        f.debug_struct("Intx")
            .field("asserted", &wire.asserted)
            .field("disabled", &wire.disabled)
            .field("connected", &wire.line.is_some())
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::WiredOr;
    use crate::interrupt::testing::Recorder;

    #[test]
    fn the_level_leaves_while_it_is_connected_and_enabled() {
        let line = Recorder::default();
        let shared = WiredOr::new(line.clone());
        let pin = Intx::default();
        pin.set_level(true);
        pin.connect(Some(shared.input()));
        assert_eq!(line.take(), [true], "what was asserted before is asserted there");
        pin.set_disabled(true);
        assert_eq!(line.take(), [false]);
        pin.set_level(false);
        pin.set_level(true);
        assert!(line.take().is_empty() && pin.is_asserted());
        pin.set_disabled(false);
        assert_eq!(line.take(), [true]);
        pin.connect(None);
        assert_eq!(line.take(), [false], "unplugged");
    }

    #[test]
    fn lines_are_rotated() {
        let lines: Vec<u8> = (0..5).map(|device| line_of(device, 0)).collect();
        assert_eq!(lines, [0, 1, 2, 3, 0]);
        assert_eq!(line_of(3, InterruptPin::D.index()), 2);
    }
}
