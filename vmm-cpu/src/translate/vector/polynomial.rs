//! Polynomials over GF(2): PCLMULQDQ and CRC32.

use iced_x86::Mnemonic;

use super::VectorOp;
use super::lanes::{pick, split};

/// The carry-less multiplication.
pub(super) fn xmm_op(mnemonic: Mnemonic) -> Option<VectorOp> {
    match mnemonic {
        Mnemonic::Pclmulqdq => Some(multiply),
        _ => None,
    }
}

/// PCLMULQDQ: the half imm\[0\] of `a` times the half imm\[4\] of `b`.
fn multiply(a: u128, b: u128, imm: u8) -> u128 {
    let (x, y): ([u64; 2], [u64; 2]) = (split(a), split(b));
    let x = u128::from(pick(&x, imm));
    let y = pick(&y, imm >> 4);
    (0..64).fold(0, |product, bit| product ^ ((x << bit) * u128::from(y >> bit & 1)))
}

/// CRC-32C's polynomial 0x1edc6f41 (RFC 3720 12.1), its bits reversed.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// In `TABLES[n][x]` the remainder of the byte `x` followed by `n` zero bytes.
static TABLES: [[u32; 256]; 8] = tables();

#[allow(
    clippy::indexing_slicing,
    reason = "evaluated at compile time, an index beyond the table does not build"
)]
const fn tables() -> [[u32; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut x = 0;
    while x < 256u32 {
        let mut remainder = x;
        let mut n = 0;
        while n < 8 {
            let mut bit = 0;
            while bit < 8 {
                remainder = (remainder >> 1) ^ ((remainder & 1) * POLYNOMIAL);
                bit += 1;
            }
            tables[n][x as usize] = remainder;
            n += 1;
        }
        x += 1;
    }
    tables
}

/// CRC32: the accumulated `crc` after the low `bytes` bytes of `data`, 1, 2, 4 or 8 (Intel SDM 2A, CRC32).
///
/// A larger number of bytes counts as 8.
pub(crate) fn crc32(crc: u32, data: u64, bytes: u8) -> u32 {
    let bytes = bytes.min(8);
    let mixed = (data ^ u64::from(crc)).to_le_bytes();
    let tables = TABLES.iter().take(usize::from(bytes)).rev();
    let rest = crc.checked_shr(u32::from(bytes) * 8).unwrap_or(0);
    tables.zip(mixed).fold(rest, |crc, (table, byte)| crc ^ pick(table, byte))
}
