//! The driver's side of transports.

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::virtio::{DeviceMemory, feature};

use super::queue::DriverQueue;

/// Device status bits (Virtio 1.3, 2.1).
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;

/// Why a device did not start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// It does not offer what was asked for, or took FEATURES_OK back.
    #[error("features {wanted:#x} were refused, offered are {offered:#x}")]
    Features {
        /// What was asked for.
        wanted: u64,
        /// What the device offers.
        offered: u64,
    },
    /// The status after DRIVER_OK is not that of a device that works.
    #[error("the device says status {status:#x} after DRIVER_OK")]
    Status {
        /// What it says.
        status: u8,
    },
}

/// A driver, whatever the transport. Every step can be made alone; [`Driver::start`] makes them in the order of the
/// specification (3.1.1).
pub trait Driver {
    /// The device status.
    fn status(&self) -> u8;

    /// Writes the device status; 0 resets.
    fn set_status(&self, status: u8);

    /// What the device offers.
    fn device_features(&self) -> u64;

    /// What the driver wants.
    fn set_driver_features(&self, features: u64);

    /// How many descriptors a queue may have; 0 where there is no such queue.
    fn queue_max_size(&self, index: u16) -> u16;

    /// Configures queue `index`: size and addresses of descriptor table, available ring and used ring. It is not ready yet.
    fn set_queue(&self, index: u16, size: u16, rings: [u64; 3]);

    /// Makes a queue ready.
    fn enable_queue(&self, index: u16);

    /// Rings for a queue.
    fn notify(&self, index: u16);

    /// Reads the configuration.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration.
    fn write_config(&self, offset: u64, data: &[u8]);

    /// A number that changes with the configuration.
    fn config_generation(&self) -> u32;

    /// Resets the device, accepts `features` (VIRTIO_F_VERSION_1 comes by itself), and starts it with `queues`.
    ///
    /// # Errors
    /// If the device refuses, or gives up at once.
    fn start<M: DeviceMemory>(
        &self,
        features: u64,
        queues: &[(u16, &DriverQueue<M>)],
    ) -> Result<(), StartError>
    where
        Self: Sized,
    {
        let wanted = features | feature::VERSION_1;
        self.set_status(0);
        self.set_status(ACKNOWLEDGE);
        self.set_status(ACKNOWLEDGE | DRIVER);
        let offered = self.device_features();
        self.set_driver_features(wanted);
        let so_far = ACKNOWLEDGE | DRIVER | FEATURES_OK;
        self.set_status(so_far);
        if self.status() != so_far {
            return Err(StartError::Features { wanted, offered });
        }
        for (index, queue) in queues {
            self.set_queue(*index, queue.size(), queue.rings());
            self.enable_queue(*index);
        }
        self.set_status(so_far | DRIVER_OK);
        match self.status() {
            status if status == so_far | DRIVER_OK => Ok(()),
            status => Err(StartError::Status { status }),
        }
    }
}

/// A driver of a device on MMIO (4.2.2).
pub struct MmioDriver(Arc<dyn BusDevice>);

impl std::fmt::Debug for MmioDriver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MmioDriver").finish_non_exhaustive()
    }
}

impl MmioDriver {
    /// Drives `device`, a [`VirtioMmio`](crate::virtio::VirtioMmio) in a mutex as a rule.
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
