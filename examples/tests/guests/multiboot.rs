//! Small kernels for the multiboot protocol.

#![allow(clippy::unwrap_used, reason = "of tests, which may panic")]

use iced_x86::code_asm::CodeAssembler;

const BASE: u32 = 0x10_0000;
const HEADERS: u32 = 52 + 32;
const MULTIBOOT: u32 = 12;

/// A multiboot 1 kernel that begins where `code` does.
pub(crate) fn kernel(mut code: CodeAssembler) -> Vec<u8> {
    let code = code.assemble(u64::from(BASE + HEADERS + MULTIBOOT)).unwrap();

    let length = HEADERS + MULTIBOOT + u32::try_from(code.len()).unwrap();
    let mut image = b"\x7fELF\x01\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend([2, 0, 3, 0, 1, 0, 0, 0]);
    for value in [BASE + HEADERS + MULTIBOOT, 52, 0, 0, 32 << 16 | 52, 1, 0] {
        image.extend(value.to_le_bytes());
    }
    for value in [1, 0, BASE, BASE, length, length, 5, 0x1000] {
        image.extend(value.to_le_bytes());
    }
    const MAGIC: u32 = 0x1bad_b002;
    for value in [MAGIC, 0, MAGIC.wrapping_neg()] {
        image.extend(value.to_le_bytes());
    }
    image.extend(code);
    image
}
