//! The configuration that a driver reads (Virtio 1.3, 5.2.4), and its feature bits (5.2.3).

use super::backend::BlockSizes;

/// Bytes of a sector, whatever the blocks are.
pub(super) const SECTOR: u64 = 512;
/// Bytes of the device's name.
pub const ID_BYTES: usize = 20;
/// What one request discards at most: 1 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// What one request makes zeros at most: 16 MiB, as the disk may have to write them.
pub(super) const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 15;
/// Bytes of one segment at most (`size_max`).
const MAX_SEGMENT: u32 = 1 << 20;
/// No system asks for several ranges in one request.
const SEGMENTS: u32 = 1;

/// Feature bits of block devices (5.2.3).
pub mod feature {
    /// VIRTIO_BLK_F_SIZE_MAX.
    pub const SIZE_MAX: u64 = 1 << 1;
    /// VIRTIO_BLK_F_SEG_MAX.
    pub const SEG_MAX: u64 = 1 << 2;
    /// VIRTIO_BLK_F_RO.
    pub const RO: u64 = 1 << 5;
    /// VIRTIO_BLK_F_BLK_SIZE.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// VIRTIO_BLK_F_FLUSH.
    pub const FLUSH: u64 = 1 << 9;
    /// VIRTIO_BLK_F_TOPOLOGY.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// VIRTIO_BLK_F_CONFIG_WCE.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// VIRTIO_BLK_F_MQ.
    pub const MQ: u64 = 1 << 12;
    /// VIRTIO_BLK_F_DISCARD.
    pub const DISCARD: u64 = 1 << 13;
    /// VIRTIO_BLK_F_WRITE_ZEROES.
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Where the cache mode is.
pub(super) const WRITEBACK_AT: u64 = 32;

/// What the configuration says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Config {
    pub(super) sectors: u64,
    pub(super) blocks: BlockSizes,
    pub(super) queue_size: u16,
    pub(super) queues: u16,
    pub(super) writeback: bool,
    /// What is offered: fields of other features stay 0.
    pub(super) features: u64,
}

impl Config {
    /// The fields as bytes; beyond them are zeros.
    pub(super) fn bytes(&self) -> [u8; 60] {
        let mut bytes = [0; 60];
        let mut put = |at: usize, field: &[u8]| {
            if let Some(place) = bytes.get_mut(at..at + field.len()) {
                place.copy_from_slice(field);
            }
        };
        let BlockSizes { logical, physical, optimal } = self.blocks;
        put(0, &self.sectors.to_le_bytes());
        put(8, &MAX_SEGMENT.to_le_bytes());
        // The header and the status take a descriptor each.
        put(12, &u32::from(self.queue_size.saturating_sub(2).max(1)).to_le_bytes());
        put(20, &logical.to_le_bytes());
        let exponent = physical.trailing_zeros().saturating_sub(logical.trailing_zeros());
        put(24, &[u8::try_from(exponent).unwrap_or(0)]);
        put(26, &u16::try_from(physical / logical.max(1)).unwrap_or(1).max(1).to_le_bytes());
        put(28, &(optimal / logical.max(1)).to_le_bytes());
        put(32, &[self.writeback.into()]);
        put(34, &self.queues.to_le_bytes());
        if self.features & feature::DISCARD != 0 {
            put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
            put(40, &SEGMENTS.to_le_bytes());
            put(44, &(physical / 512).max(1).to_le_bytes());
        }
        if self.features & feature::WRITE_ZEROES != 0 {
            put(48, &MAX_WRITE_ZEROES_SECTORS.to_le_bytes());
            put(52, &SEGMENTS.to_le_bytes());
            put(56, &[1]);
        }
        bytes
    }
}
