//! Where a function is on the bus, and how an access is cut to registers.

use std::fmt;

use crate::pci::PciError;

/// Device and function number on bus 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FunctionAddress(u8);

impl FunctionAddress {
    /// The host bridge's own function.
    pub const HOST_BRIDGE: Self = Self(0);

    /// Function `function` (0 to 7) of device `device` (0 to 31).
    ///
    /// # Errors
    /// [`PciError::Address`] beyond those.
    pub fn new(device: u8, function: u8) -> Result<Self, PciError> {
        if device < 32 && function < 8 {
            Ok(Self(device << 3 | function))
        } else {
            Err(PciError::Address { device, function })
        }
    }

    /// Device in bits 7:3, function in bits 2:0, as in a requester ID.
    pub(super) const fn from_devfn(devfn: u8) -> Self {
        Self(devfn)
    }

    /// 0 to 31.
    pub const fn device(self) -> u8 {
        self.0 >> 3
    }

    /// 0 to 7.
    pub const fn function(self) -> u8 {
        self.0 & 7
    }
}

/// As `lspci` writes it: bus, device and function.
impl fmt::Display for FunctionAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00:{:02x}.{}", self.device(), self.function())
    }
}

/// How many bytes of an access at `offset` belong to the first register that it touches.
fn in_register(offset: u64, length: usize) -> usize {
    usize::try_from(4 - (offset & 3)).map_or(length, |room| room.min(length))
}

/// A read, register by register, ascending.
pub(super) fn read_registers(mut offset: u64, mut data: &mut [u8], mut read: impl FnMut(u64, &mut [u8])) {
    while !data.is_empty() {
        let length = in_register(offset, data.len());
        let (piece, rest) = data.split_at_mut(length);
        read(offset, piece);
        (data, offset) = (rest, (offset | 3).wrapping_add(1));
    }
}

/// A write, register by register, ascending.
pub(super) fn write_registers(mut offset: u64, mut data: &[u8], mut write: impl FnMut(u64, &[u8])) {
    while !data.is_empty() {
        let (piece, rest) = data.split_at(in_register(offset, data.len()));
        write(offset, piece);
        (data, offset) = (rest, (offset | 3).wrapping_add(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accesses_end_at_registers() {
        for (offset, length, expected) in [
            (0, 4, vec![(0, 4)]),
            (1, 2, vec![(1, 2)]),
            (3, 8, vec![(3, 1), (4, 4), (8, 3)]),
            (u64::MAX, 2, vec![(u64::MAX, 1), (0, 1)]),
            (6, 0, vec![]),
        ] {
            let (mut reads, mut writes) = (Vec::new(), Vec::new());
            let mut data: Vec<u8> = (0..length).collect();
            read_registers(offset, &mut data, |offset, piece| reads.push((offset, piece.len())));
            write_registers(offset, &data, |offset, piece| writes.push((offset, piece.len())));
            assert_eq!((reads, writes), (expected.clone(), expected));
        }
    }

    #[test]
    fn addresses_are_checked() {
        let last = FunctionAddress::new(31, 7).unwrap();
        assert_eq!((last.device(), last.function(), last.to_string().as_str()), (31, 7, "00:1f.7"));
        assert!(matches!(FunctionAddress::new(32, 0), Err(PciError::Address { device: 32, function: 0 })));
        assert!(FunctionAddress::new(0, 8).is_err());
    }
}
