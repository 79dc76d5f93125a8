//! AES rounds (FIPS 197; Intel SDM 2A, AESDEC to AESKEYGENASSIST).
//!
//! The state is a register, its bytes in the order of FIPS 197: byte 0 is row 0 of column 0, byte 1 is row 1 of
//! column 0.
//!
//! Threat model: substitution is a table look-up, so the time of a round depends on the guest's key and data by way
//! of the host's caches, and a neighbour on the same core may learn of them. On a host with AES-NI `host` takes the
//! place of all of this but the key schedule.

#![allow(clippy::cast_possible_truncation, reason = "bytes of the state are taken out one by one")]

use iced_x86::Mnemonic;

use super::VectorOp;
use super::lanes::{join, map, pick, split};

/// The AES operations.
pub(super) fn xmm_op(mnemonic: Mnemonic) -> Option<VectorOp> {
    let op: VectorOp = match mnemonic {
        Mnemonic::Aesenc => |state, key, _| mix_columns(substitute(shift_rows(state))) ^ key,
        Mnemonic::Aesenclast => |state, key, _| substitute(shift_rows(state)) ^ key,
        Mnemonic::Aesdec => {
            |state, key, _| inverse_mix_columns(inverse_substitute(inverse_shift_rows(state))) ^ key
        }
        Mnemonic::Aesdeclast => |state, key, _| inverse_substitute(inverse_shift_rows(state)) ^ key,
        Mnemonic::Aesimc => |_, key, _| inverse_mix_columns(key),
        Mnemonic::Aeskeygenassist => |_, key, constant| keygen_assist(key, constant),
        _ => return None,
    };
    Some(op)
}

/// FIPS 197 5.1.1.
static S_BOX: [u8; 256] = tables().0;

/// FIPS 197 5.3.2.
static INVERSE_S_BOX: [u8; 256] = tables().1;

/// The S-box is the inverse in GF(2^8), then an affine map.
#[allow(
    clippy::indexing_slicing,
    reason = "evaluated at compile time, an index beyond the table does not build"
)]
const fn tables() -> ([u8; 256], [u8; 256]) {
    let mut forward = [0; 256];
    let mut inverse = [0; 256];
    // `power` runs through all powers of 3, `reciprocal` through those of its inverse, 0xf6.
    let mut power = 1u8;
    let mut reciprocal = 1u8;
    let mut step = 0;
    while step < 256 {
        // Zero has no inverse and takes the place of one: it is the last step.
        let (x, y) = if step == 255 { (0, 0) } else { (power, reciprocal) };
        let s = y ^ y.rotate_left(1) ^ y.rotate_left(2) ^ y.rotate_left(3) ^ y.rotate_left(4) ^ 0x63;
        forward[x as usize] = s;
        inverse[s as usize] = x;
        power ^= double(power);
        reciprocal = divide_by_three(reciprocal);
        step += 1;
    }
    (forward, inverse)
}

/// Multiplication by 2 in GF(2^8) modulo x^8 + x^4 + x^3 + x + 1.
const fn double(x: u8) -> u8 {
    (x << 1) ^ ((x >> 7) * 0x1b)
}

/// Division by 3: 0xf6 is 2^7 + 2^6 + 2^5 + 2^4 + 2^2 + 2.
const fn divide_by_three(x: u8) -> u8 {
    let x2 = double(x);
    let x4 = double(x2);
    let x16 = double(double(x4));
    let x32 = double(x16);
    let x64 = double(x32);
    let x128 = double(x64);
    x128 ^ x64 ^ x32 ^ x16 ^ x4 ^ x2
}

fn substitute(state: u128) -> u128 {
    map(state, |x| pick(&S_BOX, x))
}

fn inverse_substitute(state: u128) -> u128 {
    map(state, |x| pick(&INVERSE_S_BOX, x))
}

/// Row `r` moves `r` columns to the left: the byte that lands at place `i` comes from `5 i` modulo 16.
fn shift_rows(state: u128) -> u128 {
    gather(state, [0, 5, 10, 15, 4, 9, 14, 3, 8, 13, 2, 7, 12, 1, 6, 11])
}

fn inverse_shift_rows(state: u128) -> u128 {
    gather(state, [0, 13, 10, 7, 4, 1, 14, 11, 8, 5, 2, 15, 12, 9, 6, 3])
}

#[inline(always)]
fn gather(state: u128, places: [u8; 16]) -> u128 {
    u128::from_le_bytes(places.map(|place| (state >> (place * 8)) as u8))
}

/// Each byte of a column becomes 2 times itself, 3 times the next and 1 times the other two.
fn mix_columns(state: u128) -> u128 {
    let next = rotate_columns(state, 1);
    double_all(state ^ next) ^ next ^ rotate_columns(state, 2) ^ rotate_columns(state, 3)
}

/// The coefficients 14, 11, 13, 9 are the product of MixColumns' 2, 3, 1, 1 with 5, 0, 4, 0.
fn inverse_mix_columns(state: u128) -> u128 {
    mix_columns(state ^ double_all(double_all(state ^ rotate_columns(state, 2))))
}

fn double_all(state: u128) -> u128 {
    map(state, double)
}

fn rotate_columns(state: u128, rows: u32) -> u128 {
    map(state, |column: u32| column.rotate_right(rows * 8))
}

/// The nonlinear part of the key schedule: SubWord and RotWord of the odd words.
fn keygen_assist(key: u128, constant: u8) -> u128 {
    let [_, x1, _, x3]: [u32; 4] = split(substitute(key));
    let constant = u32::from(constant);
    join([x1, x1.rotate_right(8) ^ constant, x3, x3.rotate_right(8) ^ constant])
}
