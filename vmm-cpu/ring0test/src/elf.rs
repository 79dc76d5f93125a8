//! The harness as an image that both engines boot: an ELF with the PVH note (Xen docs/misc/pvh.pandoc).

/// A 32-bit ELF image with one segment, `code` at `address`, that is entered there.
pub fn image(address: u32, code: &[u8]) -> Vec<u8> {
    const HEADER: u32 = 52;
    const PROGRAM_HEADER: u32 = 32;
    const NOTE: u32 = HEADER + 2 * PROGRAM_HEADER;
    const NOTE_BYTES: u32 = 20;
    const CODE: u32 = 0x1000;
    let length = u32::try_from(code.len()).unwrap_or(u32::MAX);
    let mut file = Vec::new();
    // 32 bits, little-endian, version 1; executable, x86.
    file.extend(*b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0");
    file.extend([2_u16, 3].map(u16::to_le_bytes).concat());
    file.extend([1, address, HEADER, 0, 0].map(u32::to_le_bytes).concat());
    file.extend([52_u16, 32, 2, 0, 0, 0].map(u16::to_le_bytes).concat());
    // PT_LOAD: offset, virtual and physical address, sizes, RWX, alignment. Then PT_NOTE.
    file.extend([1, CODE, address, address, length, length, 7, 0x1000].map(u32::to_le_bytes).concat());
    file.extend([4, NOTE, 0, 0, NOTE_BYTES, NOTE_BYTES, 4, 4].map(u32::to_le_bytes).concat());
    // XEN_ELFNOTE_PHYS32_ENTRY.
    file.extend([4, 4, 18].map(u32::to_le_bytes).concat());
    file.extend(*b"Xen\0");
    file.extend(address.to_le_bytes());
    file.resize(0x1000, 0);
    file.extend(code);
    file
}
