//! Base address registers: what a function asks for, and how its registers say so (PCI 3.0, 6.2.5.1).

use std::fmt;

use crate::bus::halves;
use crate::pci::PciError;

/// How many base address registers a function has; a 64-bit BAR takes two.
pub const BARS: usize = 6;

/// Which addresses a BAR is for, and how many bits it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BarKind {
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere. It takes the next BAR's register, too.
    Memory64,
    /// Ports.
    Io,
}

impl BarKind {
    /// Whether it is for ports.
    pub(super) fn is_io(self) -> bool {
        self == Self::Io
    }
}

impl fmt::Display for BarKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Memory32 => "32-bit memory",
            Self::Memory64 => "64-bit memory",
            Self::Io => "I/O",
        })
    }
}

// Bits of the register that say what it is.
const IO: u32 = 1;
const MEMORY_64: u32 = 0b100;
const PREFETCHABLE: u32 = 0b1000;
/// Bits below an address.
const IO_BITS: u32 = 0b11;
const MEMORY_BITS: u32 = 0b1111;

/// A range that a function wants to answer at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Bar {
    kind: BarKind,
    size: u64,
    prefetchable: bool,
}

impl Bar {
    /// `size` bytes of memory below 4 GiB: a power of two from 16 to 2 GiB.
    pub const fn memory32(size: u64) -> Self {
        Self { kind: BarKind::Memory32, size, prefetchable: false }
    }

    /// `size` bytes of memory: a power of two from 16 on.
    pub const fn memory64(size: u64) -> Self {
        Self { kind: BarKind::Memory64, size, prefetchable: false }
    }

    /// `size` ports: a power of two from 4 to 256.
    pub const fn io(size: u64) -> Self {
        Self { kind: BarKind::Io, size, prefetchable: false }
    }

    /// Reads have no side effects, and writes may be merged. Memory only.
    pub const fn prefetchable(self) -> Self {
        Self { prefetchable: true, ..self }
    }

    /// Which addresses it is for.
    pub const fn kind(self) -> BarKind {
        self.kind
    }

    /// In bytes.
    pub const fn size(self) -> u64 {
        self.size
    }

    /// As BAR number `index`.
    pub(super) fn check(self, index: usize) -> Result<(), PciError> {
        let (sizes, allowed) = match self.kind {
            BarKind::Memory32 => (16..=1 << 31, "0x10 to 0x8000_0000"),
            BarKind::Memory64 => (16..=1 << 63, "0x10 to 0x8000_0000_0000_0000"),
            BarKind::Io => (4..=256, "4 to 0x100, not prefetchable"),
        };
        let fits = self.size.is_power_of_two() && sizes.contains(&self.size);
        if fits && !(self.kind.is_io() && self.prefetchable) {
            Ok(())
        } else {
            Err(PciError::Bar { bar: index, size: self.size, allowed })
        }
    }

    /// The register where the BAR is nowhere: what kind it is, and nothing else.
    pub(super) fn flags(self) -> u32 {
        let prefetchable = if self.prefetchable { PREFETCHABLE } else { 0 };
        match self.kind {
            BarKind::Memory32 => prefetchable,
            BarKind::Memory64 => MEMORY_64 | prefetchable,
            BarKind::Io => IO,
        }
    }

    /// Bits of the low and of the high register that can be written. That the others stay zero is how software
    /// finds out the size.
    pub(super) fn writable(self) -> [u32; 2] {
        let [low, high] = halves(!self.size.wrapping_sub(1));
        match self.kind {
            BarKind::Memory32 => [low & !MEMORY_BITS, 0],
            BarKind::Memory64 => [low & !MEMORY_BITS, high],
            BarKind::Io => [low & !IO_BITS, 0],
        }
    }

    /// The address that the registers hold.
    pub(super) fn base(self, [low, high]: [u32; 2]) -> u64 {
        match self.kind {
            BarKind::Memory32 => u64::from(low & !MEMORY_BITS),
            BarKind::Memory64 => u64::from(high) << 32 | u64::from(low & !MEMORY_BITS),
            BarKind::Io => u64::from(low & !IO_BITS),
        }
    }

    /// The last byte of it at `base`, which its registers can hold: no multiple of a power of two is so large that
    /// this overflows.
    pub(super) fn last(self, base: u64) -> u64 {
        base.wrapping_add(self.size.wrapping_sub(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_checked() {
        for bar in [
            Bar::memory32(16),
            Bar::memory32(1 << 31),
            Bar::memory64(1 << 63).prefetchable(),
            Bar::io(4),
            Bar::io(256),
        ] {
            bar.check(0).unwrap();
        }
        for bar in [
            Bar::memory32(0),
            Bar::memory32(8),
            Bar::memory32(24),
            Bar::memory32(1 << 32),
            Bar::memory64(3 << 40),
            Bar::io(2),
            Bar::io(512),
            Bar::io(16).prefetchable(),
        ] {
            assert!(matches!(bar.check(3), Err(PciError::Bar { bar: 3, .. })), "{bar:?}");
        }
    }

    #[test]
    fn registers_hold_what_they_can() {
        assert_eq!(Bar::memory64(1 << 40).writable(), [0, 0xffff_ff00]);
        assert_eq!(Bar::memory64(0x4000).prefetchable().flags(), 0b1100);
        assert_eq!(Bar::io(16).base([0x1001, 7]), 0x1000);
        let largest = Bar::memory64(16);
        assert_eq!(largest.last(largest.base([u32::MAX, u32::MAX])), u64::MAX);
    }
}
