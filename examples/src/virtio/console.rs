//! The console that the user's terminal is joined to.

use std::fmt;
use std::sync::Arc;

use anyhow::Result;
use vmm_devices::virtio::Console;
use vmm_devices::virtio::console::{Port, PortConfig, PortEvent};

use crate::pc::{Drained, Output};

/// The keyboard of a console, and the size of its screen.
#[derive(Clone)]
pub struct VirtioConsole {
    port: Port,
    drained: Arc<Drained>,
}

impl fmt::Debug for VirtioConsole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioConsole").field("port", &self.port).finish_non_exhaustive()
    }
}

impl VirtioConsole {
    /// Without ports beside it, its size is in the configuration of the device: Linux has it from there in the right order,
    /// whatever its version.
    pub(super) fn new(output: Output, size: Option<(u16, u16)>) -> Result<(Console, Self)> {
        let drained = Arc::new(Drained::default());
        let room = Arc::clone(&drained);
        let mut config = PortConfig::console(output).events(move |event: PortEvent<'_>| {
            if matches!(event, PortEvent::InputRoom) {
                room.notify();
            }
        });
        if let Some((rows, columns)) = size {
            config = config.size(columns, rows);
        }
        let (device, port) = Console::new(config)?;
        Ok((device, Self { port, drained }))
    }

    /// Types `input`, and waits until all of it has found room.
    pub fn type_in(&self, input: &[u8]) {
        self.drained.give(input, |left| self.port.enqueue(left));
    }

    /// The terminal has so many lines and columns from now on.
    pub fn resize(&self, rows: u16, columns: u16) {
        self.port.resize(columns, rows);
    }
}
