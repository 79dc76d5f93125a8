//! The driver's side of transports.

use std::sync::{Arc, Mutex};

use crate::bus::BusDevice;
use crate::interrupt::lock;
use crate::pci::PciFunction;
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

/// Drivers on any transport, chosen at run time, and drivers that are lent, are drivers too.
macro_rules! forward {
    ($($driver:ty),*) => {
        $(impl<D: Driver + ?Sized> Driver for $driver {
            fn status(&self) -> u8 {
                (**self).status()
            }

            fn set_status(&self, status: u8) {
                (**self).set_status(status);
            }

            fn device_features(&self) -> u64 {
                (**self).device_features()
            }

            fn set_driver_features(&self, features: u64) {
                (**self).set_driver_features(features);
            }

            fn queue_max_size(&self, index: u16) -> u16 {
                (**self).queue_max_size(index)
            }

            fn set_queue(&self, index: u16, size: u16, rings: [u64; 3]) {
                (**self).set_queue(index, size, rings);
            }

            fn enable_queue(&self, index: u16) {
                (**self).enable_queue(index);
            }

            fn notify(&self, index: u16) {
                (**self).notify(index);
            }

            fn read_config(&self, offset: u64, data: &mut [u8]) {
                (**self).read_config(offset, data);
            }

            fn write_config(&self, offset: u64, data: &[u8]) {
                (**self).write_config(offset, data);
            }

            fn config_generation(&self) -> u32 {
                (**self).config_generation()
            }
        })*
    };
}

forward!(Box<D>, &D);

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

/// A driver of a device on PCI (4.1), which finds its structures as the capabilities say.
pub struct PciDriver {
    function: Arc<Mutex<dyn PciFunction>>,
    /// BAR and offset of the common configuration, ISR status, device configuration and doorbells.
    structures: [(usize, u64); 4],
    /// Bytes from one doorbell to the next.
    multiplier: u64,
}

impl std::fmt::Debug for PciDriver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PciDriver").field("structures", &self.structures).finish_non_exhaustive()
    }
}

impl PciDriver {
    /// Drives `function`, a [`VirtioPci`](crate::virtio::VirtioPci) as a rule. It may access memory from now on. `None` if it lacks a
    /// structure that drivers need.
    pub fn new(function: Arc<Mutex<dyn PciFunction>>) -> Option<Self> {
        let mut driver = Self { function, structures: [(0, 0); 4], multiplier: 0 };
        let mut found = 0;
        let mut at = u16::from(driver.config_byte(0x34));
        // The list has no room for more.
        for _ in 0..48 {
            if at == 0 {
                break;
            }
            let body = |offset| driver.config_word(at + offset);
            let [id, next, _, kind] = body(0).to_le_bytes();
            let [bar, ..] = body(4).to_le_bytes();
            let place = (usize::from(bar), u64::from(body(8)));
            let multiplier = u64::from(body(16));
            let index = match (id, kind) {
                (9, 1) => Some(0),
                (9, 3) => Some(1),
                (9, 4) => Some(2),
                (9, 2) => Some(3),
                _ => None,
            };
            if let Some(structure) = index.and_then(|index| driver.structures.get_mut(index)) {
                *structure = place;
                found += 1;
            }
            if (id, kind) == (9, 2) {
                driver.multiplier = multiplier;
            }
            at = next.into();
        }
        // Memory and bus master.
        driver.write_config_space(4, &6_u16.to_le_bytes());
        (found == 4).then_some(driver)
    }

    /// Reads configuration space.
    pub fn read_config_space(&self, offset: u16, data: &mut [u8]) {
        lock(&self.function).read_config(offset, data);
    }

    /// Writes configuration space.
    pub fn write_config_space(&self, offset: u16, data: &[u8]) {
        lock(&self.function).write_config(offset, data);
    }

    fn config_byte(&self, offset: u16) -> u8 {
        let mut byte = [0];
        self.read_config_space(offset, &mut byte);
        byte[0]
    }

    fn config_word(&self, offset: u16) -> u32 {
        let mut word = [0; 4];
        self.read_config_space(offset, &mut word);
        u32::from_le_bytes(word)
    }

    /// Reads at `offset` of a structure: 0 for the common configuration, 1 for the ISR status, 2 for the device's
    /// configuration, 3 for the doorbells.
    pub fn read(&self, structure: usize, offset: u64, data: &mut [u8]) {
        if let Some((bar, base)) = self.structures.get(structure) {
            lock(&self.function).bar_read(*bar, base + offset, data);
        }
    }

    /// Writes there.
    pub fn write(&self, structure: usize, offset: u64, data: &[u8]) {
        if let Some((bar, base)) = self.structures.get(structure) {
            lock(&self.function).bar_write(*bar, base + offset, data);
        }
    }

    /// The causes of the interrupt by pin: 1 for used buffers, 2 for the configuration. Reading lets go of the pin.
    pub fn take_interrupt_status(&self) -> u8 {
        let mut status = [0];
        self.read(1, 0, &mut status);
        status[0]
    }

    fn common<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.read(0, offset, &mut data);
        data
    }
}

impl Driver for PciDriver {
    fn status(&self) -> u8 {
        let [status] = self.common(0x14);
        status
    }

    fn set_status(&self, status: u8) {
        self.write(0, 0x14, &[status]);
    }

    fn device_features(&self) -> u64 {
        let [low, high] = [0_u32, 1].map(|half| {
            self.write(0, 0, &half.to_le_bytes());
            u64::from(u32::from_le_bytes(self.common(4)))
        });
        high << 32 | low
    }

    fn set_driver_features(&self, features: u64) {
        let [a, b, c, d, e, f, g, h] = features.to_le_bytes();
        for (half, word) in (0_u32..).zip([[a, b, c, d], [e, f, g, h]]) {
            self.write(0, 8, &half.to_le_bytes());
            self.write(0, 0xc, &word);
        }
    }

    fn queue_max_size(&self, index: u16) -> u16 {
        self.write(0, 0x16, &index.to_le_bytes());
        u16::from_le_bytes(self.common(0x18))
    }

    fn set_queue(&self, index: u16, size: u16, rings: [u64; 3]) {
        self.write(0, 0x16, &index.to_le_bytes());
        self.write(0, 0x18, &size.to_le_bytes());
        for (register, address) in [0x20, 0x28, 0x30].into_iter().zip(rings) {
            let [a, b, c, d, e, f, g, h] = address.to_le_bytes();
            self.write(0, register, &[a, b, c, d]);
            self.write(0, register + 4, &[e, f, g, h]);
        }
    }

    fn enable_queue(&self, index: u16) {
        self.write(0, 0x16, &index.to_le_bytes());
        self.write(0, 0x1c, &1_u16.to_le_bytes());
    }

    fn notify(&self, index: u16) {
        self.write(0, 0x16, &index.to_le_bytes());
        let place = u64::from(u16::from_le_bytes(self.common(0x1e)));
        self.write(3, place * self.multiplier, &index.to_le_bytes());
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.read(2, offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        self.write(2, offset, data);
    }

    fn config_generation(&self) -> u32 {
        let [generation] = self.common(0x15);
        generation.into()
    }
}
