//! The driver's side of transports.

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
