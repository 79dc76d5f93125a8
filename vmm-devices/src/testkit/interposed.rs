//! A driver with a test between it and whoever uses it.

use std::fmt;

use super::driver::Driver;

/// A [`Driver`] whose doorbells and status a test looks after. All else goes to the driver below as it is.
pub struct Interposed<'a, D> {
    driver: D,
    around_doorbells: Box<dyn Fn() + 'a>,
    status: Box<dyn Fn(u8) -> u8 + 'a>,
}

impl<D: fmt::Debug> fmt::Debug for Interposed<'_, D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interposed").field("driver", &self.driver).finish_non_exhaustive()
    }
}

impl<'a, D: Driver> Interposed<'a, D> {
    /// `driver`, with nothing between.
    pub fn new(driver: D) -> Self {
        Self { driver, around_doorbells: Box::new(|| {}), status: Box::new(|status| status) }
    }

    /// Calls `what` before each doorbell and after it: for what a monitor does meanwhile.
    #[must_use]
    pub fn around_doorbells(mut self, what: impl Fn() + 'a) -> Self {
        self.around_doorbells = Box::new(what);
        self
    }

    /// Whoever reads the status reads what `told` makes of it.
    #[must_use]
    pub fn status_as(mut self, told: impl Fn(u8) -> u8 + 'a) -> Self {
        self.status = Box::new(told);
        self
    }
}

impl<D: Driver> Driver for Interposed<'_, D> {
    fn status(&self) -> u8 {
        (self.status)(self.driver.status())
    }

    fn set_status(&self, status: u8) {
        self.driver.set_status(status);
    }

    fn device_features(&self) -> u64 {
        self.driver.device_features()
    }

    fn set_driver_features(&self, features: u64) {
        self.driver.set_driver_features(features);
    }

    fn queue_max_size(&self, index: u16) -> u16 {
        self.driver.queue_max_size(index)
    }

    fn set_queue(&self, index: u16, size: u16, rings: [u64; 3]) {
        self.driver.set_queue(index, size, rings);
    }

    fn enable_queue(&self, index: u16) {
        self.driver.enable_queue(index);
    }

    fn notify(&self, index: u16) {
        (self.around_doorbells)();
        self.driver.notify(index);
        (self.around_doorbells)();
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.driver.read_config(offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        self.driver.write_config(offset, data);
    }

    fn config_generation(&self) -> u32 {
        self.driver.config_generation()
    }
}
