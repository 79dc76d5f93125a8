//! What a balloon is beside its queues (see [`crate::virtio::VirtioState`]).

use std::sync::atomic::Ordering;

use super::Balloon;
use super::handle::Shared;
use crate::error::StateError;
use crate::interrupt::lock;
use crate::virtio::state::DeviceState;

/// The configuration of a balloon (5.5.4). The pages that it holds are the driver's to know, and holes in the RAM that is saved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BalloonState {
    /// Pages that the driver was asked to give up (`num_pages`).
    pub target: u32,
    /// Pages that it says it has (`actual`).
    pub actual: u32,
    /// What it wants to find in pages that it reported (`poison_val`).
    pub poison: u32,
    /// Statistics are wanted, for which the driver was not asked yet.
    pub requested: bool,
}

impl Balloon {
    pub(super) fn saved(&self) -> BalloonState {
        let requested = self.shared.requested.load(Ordering::SeqCst);
        let config = lock(&self.shared.config);
        BalloonState { target: config.target, actual: config.actual, poison: config.poison, requested }
    }

    /// Any configuration is one that a driver can have written.
    pub(super) fn take_over(&mut self, state: &DeviceState) -> Result<(), StateError> {
        let DeviceState::Balloon(state) = state else { return Err(state.of_another("balloon")) };
        let mut config = lock(&self.shared.config);
        self.target_before = Some(config.target);
        (config.target, config.actual, config.poison) = (state.target, state.actual, state.poison);
        drop(config);
        self.shared.requested.store(state.requested, Ordering::SeqCst);
        Ok(())
    }
}

impl Shared {
    /// The device cannot start from a state that was restored: what the monitor asked for before it counts again.
    pub(super) fn set_target_back(&self, before: Option<u32>) {
        if let Some(target) = before {
            lock(&self.config).target = target;
        }
    }
}
