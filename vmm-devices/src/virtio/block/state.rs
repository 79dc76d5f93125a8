//! What a block device is beside its queues (see [`crate::virtio::VirtioState`]).

use std::sync::atomic::Ordering;

use super::config::{ID_BYTES, feature};
use super::{Block, CacheMode};
use crate::error::StateError;
use crate::virtio::state::DeviceState;

const DEVICE: &str = "block device";

/// The disk that a driver knows, and what it has chosen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BlockState {
    /// How large the disk is, in sectors of 512 bytes.
    pub sectors: u64,
    /// Bytes of a logical block.
    pub block_size: u32,
    /// It cannot be written.
    pub read_only: bool,
    /// Its name (VIRTIO_BLK_T_GET_ID), with zeros behind.
    pub serial: [u8; ID_BYTES],
    /// Whether the driver wants writes to be cached (5.2.5.1), if it has said so.
    pub writeback: Option<bool>,
}

impl Block {
    pub(super) fn saved(&self) -> BlockState {
        BlockState {
            sectors: self.shared.sectors.load(Ordering::SeqCst),
            block_size: self.blocks.logical,
            read_only: self.shared.read_only,
            serial: self.shared.serial,
            writeback: self.chosen.map(|mode| mode == CacheMode::WriteBack),
        }
    }

    /// A driver remembers a disk: it goes on with the same one, or one that looks the same.
    pub(super) fn take_over(&mut self, state: &DeviceState, features: u64) -> Result<(), StateError> {
        let DeviceState::Block(state) = state else { return Err(state.of_another(DEVICE)) };
        let own = self.saved();
        let same = |same: bool, field, value| {
            StateError::check(same, DEVICE, field, value, "that of the disk which is there")
        };
        same(state.sectors == own.sectors, "sectors", state.sectors)?;
        same(state.block_size == own.block_size, "block_size", state.block_size.into())?;
        same(state.read_only == own.read_only, "read_only", state.read_only.into())?;
        let [first, second, third, fourth, ..] = state.serial;
        let begin = u32::from_be_bytes([first, second, third, fourth]);
        same(state.serial == own.serial, "serial (its first four bytes)", begin.into())?;
        self.chosen = state
            .writeback
            .map(|writeback| if writeback { CacheMode::WriteBack } else { CacheMode::WriteThrough });
        // Until it is activated, which looks at what was agreed upon.
        if let Some(mode) = self.chosen.filter(|_| features & feature::CONFIG_WCE != 0) {
            self.set_cache(mode);
        }
        Ok(())
    }
}
