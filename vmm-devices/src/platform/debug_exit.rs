//! A port by which a guest ends with a status, for test programs. Not for a guest that must not end
//! its machine.

use std::fmt;

use crate::bus::BusDevice;
use crate::platform::{PlatformEvent, PlatformEvents};

/// Writing `v` at offset 0 asks for an end with status `v << 1 | 1`: odd, so that it is never taken for a
/// success that the guest did not state, and cut to 32 bits. Reads give zero. It has no state to save.
pub struct DebugExit(Box<dyn PlatformEvents>);

impl DebugExit {
    /// Tells `events` of every [`PlatformEvent::DebugExit`].
    pub fn new(events: impl PlatformEvents + 'static) -> Self {
        Self(Box::new(events))
    }
}

impl fmt::Debug for DebugExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DebugExit").finish_non_exhaustive()
    }
}

impl BusDevice for DebugExit {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset != 0 {
            return;
        }
        let value = data.iter().take(4).rev().fold(0, |value: u32, &byte| value << 8 | u32::from(byte));
        self.0.event(PlatformEvent::DebugExit { status: value << 1 | 1 });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::testing::Recorder;

    #[test]
    fn the_status_is_doubled_and_odd() {
        let events = Recorder::default();
        let seen = events.clone();
        let device = DebugExit::new(move |event: PlatformEvent| seen.record(event));
        for data in [&[0u8][..], &[0x10], &[1, 1], &[0xff; 4], &[0; 8], &[]] {
            device.write(0, data);
        }
        device.write(1, &[5]);
        let status = |status| PlatformEvent::DebugExit { status };
        let expected = [1, 0x21, 0x203, 0xffff_ffff, 1, 1].map(status);
        assert_eq!(events.take(), expected);
    }
}
