//! The driver's side of MMIO.

use std::sync::{Arc, Mutex};

use super::driver::Driver;
use super::recorder::LineRecorder;
use crate::bus::BusDevice;
use crate::virtio::{DeviceMemory, VirtioDevice, VirtioMmio, VirtioMmioError};

/// A driver of a device on MMIO (4.2.2).
pub struct MmioDriver(Arc<dyn BusDevice>);

impl std::fmt::Debug for MmioDriver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MmioDriver").finish_non_exhaustive()
    }
}

impl MmioDriver {
    /// Puts `device` on MMIO, served inline, and drives it; and the line by which it interrupts.
    ///
    /// # Errors
    /// As [`VirtioMmio::new`].
    pub fn of<M: DeviceMemory>(
        device: impl VirtioDevice<M> + 'static,
        memory: &M,
    ) -> Result<(Self, LineRecorder), VirtioMmioError> {
        let line = LineRecorder::default();
        let transport = VirtioMmio::new(device, memory.clone(), line.clone())?;
        Ok((Self::new(Arc::new(Mutex::new(transport))), line))
    }

    /// Drives `device`, a [`VirtioMmio`] in a mutex as a rule.
    pub fn new(device: Arc<dyn BusDevice>) -> Self {
        Self(device)
    }

    /// Reads a register.
    pub fn read(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.0.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    /// Writes a register.
    pub fn write(&self, offset: u64, value: u32) {
        self.0.write(offset, &value.to_le_bytes());
    }

    /// The causes of the interrupt: 1 for used buffers, 2 for the configuration.
    pub fn interrupt_status(&self) -> u32 {
        self.read(0x60)
    }

    /// Says that those causes were seen to.
    pub fn acknowledge(&self, causes: u32) {
        self.write(0x64, causes);
    }
}

impl Driver for MmioDriver {
    fn status(&self) -> u8 {
        let [status, ..] = self.read(0x70).to_le_bytes();
        status
    }

    fn set_status(&self, status: u8) {
        self.write(0x70, status.into());
    }

    fn device_features(&self) -> u64 {
        let [low, high] = [0, 1].map(|half| {
            self.write(0x14, half);
            u64::from(self.read(0x10))
        });
        high << 32 | low
    }

    fn set_driver_features(&self, features: u64) {
        let [a, b, c, d, e, f, g, h] = features.to_le_bytes();
        for (half, word) in (0..).zip([[a, b, c, d], [e, f, g, h]]) {
            self.write(0x24, half);
            self.write(0x20, u32::from_le_bytes(word));
        }
    }

    fn queue_max_size(&self, index: u16) -> u16 {
        self.write(0x30, index.into());
        u16::try_from(self.read(0x34)).unwrap_or(u16::MAX)
    }

    fn set_queue(&self, index: u16, size: u16, rings: [u64; 3]) {
        self.write(0x30, index.into());
        self.write(0x38, size.into());
        for (register, address) in [0x80, 0x90, 0xa0].into_iter().zip(rings) {
            let [a, b, c, d, e, f, g, h] = address.to_le_bytes();
            self.write(register, u32::from_le_bytes([a, b, c, d]));
            self.write(register + 4, u32::from_le_bytes([e, f, g, h]));
        }
    }

    fn enable_queue(&self, index: u16) {
        self.write(0x30, index.into());
        self.write(0x44, 1);
    }

    fn notify(&self, index: u16) {
        self.write(0x50, index.into());
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.0.read(0x100 + offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        self.0.write(0x100 + offset, data);
    }

    fn config_generation(&self) -> u32 {
        self.read(0xfc)
    }
}
