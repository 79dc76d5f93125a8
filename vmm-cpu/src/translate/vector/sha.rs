//! SHA-1 and SHA-256 rounds and message schedules (FIPS 180-4; Intel SDM 2B, SHA1MSG1 to SHA256RNDS2).
//!
//! The instructions number words of the hash state from the top of the register down, the words of the
//! SHA-256 message from the bottom up.

use iced_x86::Mnemonic;

use super::lanes::{join, split};
use super::{MaskedOp, VectorOp};

/// The SHA operations, but SHA256RNDS2.
pub(super) fn xmm_op(mnemonic: Mnemonic) -> Option<VectorOp> {
    let op: VectorOp = match mnemonic {
        Mnemonic::Sha1rnds4 => sha1_rounds,
        Mnemonic::Sha1nexte => |a, b, _| {
            let [.., e]: [u32; 4] = split(a);
            let [w0, w1, w2, w3]: [u32; 4] = split(b);
            join([w0, w1, w2, w3.wrapping_add(e.rotate_left(30))])
        },
        Mnemonic::Sha1msg1 => |a, b, _| {
            let [w3, w2, w1, w0]: [u32; 4] = split(a);
            let [_, _, w5, w4]: [u32; 4] = split(b);
            join([w5 ^ w3, w4 ^ w2, w3 ^ w1, w2 ^ w0])
        },
        Mnemonic::Sha1msg2 => |a, b, _| {
            let [x3, x2, x1, x0]: [u32; 4] = split(a);
            let [w15, w14, w13, _]: [u32; 4] = split(b);
            let w16 = (x0 ^ w13).rotate_left(1);
            let w17 = (x1 ^ w14).rotate_left(1);
            let w18 = (x2 ^ w15).rotate_left(1);
            let w19 = (x3 ^ w16).rotate_left(1);
            join([w19, w18, w17, w16])
        },
        Mnemonic::Sha256msg1 => |a, b, _| {
            let [w0, w1, w2, w3]: [u32; 4] = split(a);
            let [w4, ..]: [u32; 4] = split(b);
            let next = |w: u32, following: u32| w.wrapping_add(small_sigma0(following));
            join([next(w0, w1), next(w1, w2), next(w2, w3), next(w3, w4)])
        },
        Mnemonic::Sha256msg2 => |a, b, _| {
            let [x0, x1, x2, x3]: [u32; 4] = split(a);
            let [_, _, w14, w15]: [u32; 4] = split(b);
            let w16 = x0.wrapping_add(small_sigma1(w14));
            let w17 = x1.wrapping_add(small_sigma1(w15));
            let w18 = x2.wrapping_add(small_sigma1(w16));
            let w19 = x3.wrapping_add(small_sigma1(w17));
            join([w16, w17, w18, w19])
        },
        _ => return None,
    };
    Some(op)
}

/// SHA256RNDS2, whose round constants and message words are in XMM0.
pub(super) fn masked_op(mnemonic: Mnemonic) -> Option<MaskedOp> {
    match mnemonic {
        Mnemonic::Sha256rnds2 => Some(sha256_rounds),
        _ => None,
    }
}

const fn small_sigma0(x: u32) -> u32 {
    x.rotate_right(7) ^ x.rotate_right(18) ^ x >> 3
}

const fn small_sigma1(x: u32) -> u32 {
    x.rotate_right(17) ^ x.rotate_right(19) ^ x >> 10
}

const fn choose(x: u32, y: u32, z: u32) -> u32 {
    x & y ^ !x & z
}

const fn majority(x: u32, y: u32, z: u32) -> u32 {
    x & y ^ x & z ^ y & z
}

const fn parity(x: u32, y: u32, z: u32) -> u32 {
    x ^ y ^ z
}

/// SHA1RNDS4: four rounds of the stage imm\[1:0\]. The top word of `message` already has E in it.
fn sha1_rounds(state: u128, message: u128, imm: u8) -> u128 {
    // FIPS 180-4 4.1.1 and 4.2.1.
    let (f, k): (fn(u32, u32, u32) -> u32, u32) = match imm & 3 {
        0 => (choose, 0x5a82_7999),
        1 => (parity, 0x6ed9_eba1),
        2 => (majority, 0x8f1b_bcdc),
        _ => (parity, 0xca62_c1d6),
    };
    let [mut d, mut c, mut b, mut a]: [u32; 4] = split(state);
    let words: [u32; 4] = split(message);
    let mut e = 0u32;
    for w in words.into_iter().rev() {
        let next = f(b, c, d).wrapping_add(a.rotate_left(5)).wrapping_add(w).wrapping_add(e).wrapping_add(k);
        (a, b, c, d, e) = (next, a, b.rotate_left(30), c, d);
    }
    join([d, c, b, a])
}

/// Two rounds; `cdgh` and `abef` name the words from the top down.
fn sha256_rounds(cdgh: u128, abef: u128, message: u128) -> u128 {
    let [mut h, mut g, mut d, mut c]: [u32; 4] = split(cdgh);
    let [mut f, mut e, mut b, mut a]: [u32; 4] = split(abef);
    let [w0, w1, ..]: [u32; 4] = split(message);
    for w in [w0, w1] {
        let t1 = h
            .wrapping_add(e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25))
            .wrapping_add(choose(e, f, g))
            .wrapping_add(w);
        let t2 =
            (a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22)).wrapping_add(majority(a, b, c));
        (a, b, c, d, e, f, g, h) = (t1.wrapping_add(t2), a, b, c, d.wrapping_add(t1), e, f, g);
    }
    join([f, e, b, a])
}
