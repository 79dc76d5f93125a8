//! What a device does to others, written down.

use std::error::Error;
use std::sync::{Arc, Mutex};

use crate::interrupt::{InterruptLine, MsiSink, lock};
use crate::virtio::DriverLink;

/// A line that remembers its levels. Clones are the same line.
#[derive(Clone, Debug, Default)]
pub struct LineRecorder(Arc<Mutex<(bool, Vec<bool>)>>);

impl LineRecorder {
    /// Whether it is asserted now.
    pub fn is_asserted(&self) -> bool {
        lock(&self.0).0
    }

    /// The levels that it was given since the last call.
    pub fn take(&self) -> Vec<bool> {
        std::mem::take(&mut lock(&self.0).1)
    }
}

impl InterruptLine for LineRecorder {
    fn set_level(&self, asserted: bool) {
        let mut state = lock(&self.0);
        state.0 = asserted;
        state.1.push(asserted);
    }
}

/// Where messages of MSI-X go, which it remembers. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct MsiRecorder(Arc<Mutex<Vec<(u64, u32)>>>);

impl MsiRecorder {
    /// Address and data of each message since the last call.
    pub fn take(&self) -> Vec<(u64, u32)> {
        std::mem::take(&mut lock(&self.0))
    }
}

impl MsiSink for MsiRecorder {
    fn send(&self, address: u64, data: u32) {
        lock(&self.0).push((address, data));
    }
}

/// Stands for a transport where a worker is tested alone. Clones are the same.
#[derive(Clone, Debug, Default)]
pub struct LinkRecorder(Arc<Mutex<Heard>>);

#[derive(Debug, Default)]
struct Heard {
    used: Vec<u16>,
    config: usize,
    failures: Vec<String>,
}

impl LinkRecorder {
    /// The queues whose driver was interrupted since the last call, once for each time.
    pub fn take_used(&self) -> Vec<u16> {
        std::mem::take(&mut lock(&self.0).used)
    }

    /// How often the configuration was said to be another one, since the last call.
    pub fn take_config_changes(&self) -> usize {
        std::mem::take(&mut lock(&self.0).config)
    }

    /// Why the device gave up, if it did.
    pub fn failures(&self) -> Vec<String> {
        lock(&self.0).failures.clone()
    }
}

impl DriverLink for LinkRecorder {
    fn used(&self, queue: u16) {
        lock(&self.0).used.push(queue);
    }

    fn config_changed(&self) {
        lock(&self.0).config += 1;
    }

    fn needs_reset(&self, why: &dyn Error) {
        lock(&self.0).failures.push(why.to_string());
    }
}
