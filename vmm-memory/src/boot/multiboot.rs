//! The multiboot 1 header that an image carries (Multiboot Specification 0.6.96, section 3.1).

use std::ops::Range;

use zerocopy::little_endian::U32;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use super::error::{BootError, slice};

/// The header lies, 4-byte aligned, wholly in this many first bytes of the image.
const SEARCH_SIZE: usize = 8192;
const MAGIC: u32 = 0x1bad_b002;

const FLAG_ADDRESSES: u32 = 1 << 16;
/// Bits that a loader must understand or refuse.
const REQUIRED: u32 = 0xffff;
/// Page-aligned modules, memory information, video mode.
const UNDERSTOOD: u32 = 0b111;

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: U32,
    flags: U32,
    checksum: U32,
}

#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawAddresses {
    header: U32,
    load: U32,
    load_end: U32,
    bss_end: U32,
    entry: U32,
}

/// A multiboot 1 header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MultibootHeader {
    flags: u32,
    offset: u32,
    addresses: Option<AddressFields>,
}

/// The address fields (flag bit 16), which replace the headers of the executable format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct AddressFields {
    header: u32,
    load: u32,
    load_end: u32,
    bss_end: u32,
    entry: u32,
}

/// What the address fields say, checked against the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FlatImage {
    /// Offset in the file of the first loaded byte.
    pub(super) offset: u64,
    /// Guest-physical range of the bytes from the file.
    pub(super) load: Range<u64>,
    /// Guest-physical end (exclusive) of the zeroed rest.
    pub(super) bss_end: u64,
    /// Guest-physical entry point.
    pub(super) entry: u64,
}

impl MultibootHeader {
    /// Finds the header in `file`. Magic and checksum are what tells one; nothing else is checked yet.
    pub(super) fn find(file: &[u8]) -> Option<Self> {
        let window = file.get(..SEARCH_SIZE).unwrap_or(file);
        (0..window.len()).step_by(4).find_map(|offset| {
            let bytes = window.get(offset..)?;
            let (header, rest) = RawHeader::read_from_prefix(bytes).ok()?;
            let flags = header.flags.get();
            let sum = header.magic.get().wrapping_add(flags).wrapping_add(header.checksum.get());
            if header.magic.get() != MAGIC || sum != 0 {
                return None;
            }
            let addresses = if flags & FLAG_ADDRESSES == 0 {
                None
            } else {
                let (raw, _) = RawAddresses::read_from_prefix(rest).ok()?;
                Some(AddressFields {
                    header: raw.header.get(),
                    load: raw.load.get(),
                    load_end: raw.load_end.get(),
                    bss_end: raw.bss_end.get(),
                    entry: raw.entry.get(),
                })
            };
            Some(Self { flags, offset: u32::try_from(offset).ok()?, addresses })
        })
    }

    /// The `flags` field.
    pub fn flags(&self) -> u32 {
        self.flags
    }

    /// Offset of the header in the file, in bytes.
    pub fn offset(&self) -> u32 {
        self.offset
    }

    /// Whether the header says by itself where to load the image (flag bit 16).
    pub fn has_addresses(&self) -> bool {
        self.addresses.is_some()
    }

    /// Whether the kernel would like a video mode (flag bit 2). It gets none, and the information structure
    /// says so: there is no firmware here to set one.
    pub fn wants_video_mode(&self) -> bool {
        self.flags & 0b100 != 0
    }

    /// Refuses a kernel that requires what this loader does not know.
    pub(super) fn check_flags(&self) -> Result<(), BootError> {
        if self.flags & REQUIRED & !UNDERSTOOD != 0 {
            let allowed = "bits 0, 1, 2 and 16 to 31: bits 3 to 15 are undefined requirements";
            return Err(BootError::field("multiboot header flags", self.flags.into(), allowed));
        }
        Ok(())
    }

    /// What the address fields say to load from `file`; `None` if there are none.
    pub(super) fn flat_image(&self, file: &[u8]) -> Result<Option<FlatImage>, BootError> {
        let Some(fields) = self.addresses else { return Ok(None) };
        let AddressFields { header, load, load_end, bss_end, entry } = fields;
        let Some(before_header) = header.checked_sub(load) else {
            let allowed = format!("load_addr {load:#x} and above");
            return Err(BootError::field("multiboot header_addr", header.into(), allowed));
        };
        let Some(offset) = self.offset.checked_sub(before_header) else {
            let allowed = format!("at most the header's file offset {:#x}", self.offset);
            return Err(BootError::field("multiboot header_addr - load_addr", before_header.into(), allowed));
        };
        let offset = u64::from(offset);
        // An end of 0 means the end of the file.
        let length = match load_end {
            0 => (file.len() as u64).saturating_sub(offset),
            end => end.checked_sub(load).map(u64::from).ok_or_else(|| {
                BootError::field(
                    "multiboot load_end_addr",
                    end.into(),
                    format!("0, or load_addr {load:#x} and above"),
                )
            })?,
        };
        slice(file, "multiboot image (load_addr to load_end_addr)", offset, length)?;
        let load = u64::from(load)..u64::from(load) + length;
        let bss_end = match u64::from(bss_end) {
            0 => load.end,
            end if end >= load.end => end,
            end => {
                let allowed = format!("0, or the end of the loaded bytes {:#x} and above", load.end);
                return Err(BootError::field("multiboot bss_end_addr", end, allowed));
            }
        };
        let entry = u64::from(entry);
        if !load.contains(&entry) {
            return Err(BootError::EntryOutsideImage { field: "multiboot entry_addr", entry });
        }
        Ok(Some(FlatImage { offset, load, bss_end, entry }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file of 0x100 bytes with a header at 0x20 whose address fields are `addresses`.
    fn file(flags: u32, addresses: [u32; 5]) -> Vec<u8> {
        let mut bytes = vec![0xcc; 0x100];
        let checksum = 0_u32.wrapping_sub(MAGIC).wrapping_sub(flags);
        let words = [MAGIC, flags, checksum].into_iter().chain(addresses);
        for (index, word) in words.enumerate() {
            bytes[0x20 + index * 4..][..4].copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn flat(addresses: [u32; 5]) -> Result<FlatImage, String> {
        let file = file(FLAG_ADDRESSES, addresses);
        let header = MultibootHeader::find(&file).unwrap();
        header.flat_image(&file).map(Option::unwrap).map_err(|error| error.to_string())
    }

    #[test]
    fn the_header_is_found_by_magic_and_checksum() {
        let mut bytes = file(0b11, [0; 5]);
        let header = MultibootHeader::find(&bytes).unwrap();
        assert_eq!((header.offset(), header.flags(), header.has_addresses()), (0x20, 0b11, false));
        bytes[0x28] ^= 1;
        assert_eq!(MultibootHeader::find(&bytes), None);
    }

    #[test]
    fn a_header_that_is_not_aligned_or_too_far_in_does_not_count() {
        let bytes = file(0, [0; 5]);
        assert!(MultibootHeader::find(&bytes[0x1e..]).is_none());
        for (start, found) in [(SEARCH_SIZE - 12, true), (SEARCH_SIZE - 8, false)] {
            let mut far = vec![0; start];
            far.extend_from_slice(&bytes[0x20..0x2c]);
            assert_eq!(MultibootHeader::find(&far).is_some(), found, "{start:#x}");
        }
    }

    #[test]
    fn unknown_requirements_are_refused_and_unknown_wishes_are_not() {
        for (flags, accepted) in [(0b111, true), (0xfffe_0000, true), (0b1000, false), (0x8000, false)] {
            let header = MultibootHeader::find(&file(flags, [0; 5])).unwrap();
            assert_eq!(header.check_flags().is_ok(), accepted, "{flags:#x}");
        }
    }

    #[test]
    fn address_fields_locate_the_image() {
        let image = flat([0x10_0010, 0x10_0000, 0x10_0080, 0x10_0200, 0x10_0040]).unwrap();
        let expected =
            FlatImage { offset: 0x10, load: 0x10_0000..0x10_0080, bss_end: 0x10_0200, entry: 0x10_0040 };
        assert_eq!(image, expected);
        let to_the_end = flat([0x10_0020, 0x10_0000, 0, 0, 0x10_0000]).unwrap();
        assert_eq!((to_the_end.load.end, to_the_end.bss_end), (0x10_0100, 0x10_0100));
    }

    #[test]
    fn each_wrong_address_field_is_named() {
        for (addresses, name) in [
            ([0xf_0000, 0x10_0000, 0, 0, 0x10_0000], "header_addr is 0xf0000"),
            ([0x10_0024, 0x10_0000, 0, 0, 0x10_0000], "header_addr - load_addr is 0x24"),
            ([0x10_0020, 0x10_0000, 0xf_ffff, 0, 0x10_0000], "load_end_addr is 0xfffff"),
            ([0x10_0020, 0x10_0000, 0x10_0101, 0, 0x10_0000], "load_addr to load_end_addr"),
            ([0x10_0020, 0x10_0000, 0, 0x10_00ff, 0x10_0000], "bss_end_addr is 0x1000ff"),
            ([0x10_0020, 0x10_0000, 0, 0, 0x10_0100], "entry_addr 0x100100"),
        ] {
            let error = flat(addresses).unwrap_err();
            assert!(error.contains(name), "{error}");
        }
    }
}
