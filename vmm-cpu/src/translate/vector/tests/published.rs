//! Published vectors, so that a host without these extensions tests something as well.

use iced_x86::Mnemonic;

use super::super::*;

fn aes(mnemonic: Mnemonic, state: u128, key: u128) -> u128 {
    portable_xmm_op(mnemonic).unwrap()(state, key, 0)
}

/// The key schedule of AES-128 as software writes it with AESKEYGENASSIST.
fn expand(key: [u8; 16]) -> Vec<u128> {
    let mut keys = vec![u128::from_le_bytes(key)];
    let mut constant = 1u8;
    for _ in 0..10 {
        let last = keys[keys.len() - 1];
        let assist = portable_xmm_op(Mnemonic::Aeskeygenassist).unwrap()(0, last, constant);
        let word = portable_xmm_op(Mnemonic::Pshufd).unwrap()(0, assist, 0xff);
        keys.push(last ^ last << 32 ^ last << 64 ^ last << 96 ^ word);
        constant = constant << 1 ^ (constant >> 7).wrapping_mul(0x1b);
    }
    keys
}

/// FIPS 197 appendix A.1 and appendix B.
#[test]
fn aes_128() {
    let key = 0x2b7e_1516_28ae_d2a6_abf7_1588_09cf_4f3c_u128.to_be_bytes();
    let keys = expand(key);
    assert_eq!(keys[1].to_le_bytes(), 0xa0fa_fe17_8854_2cb1_23a3_3939_2a6c_7605_u128.to_be_bytes());
    assert_eq!(keys[10].to_le_bytes(), 0xd014_f9a8_c9ee_2589_e13f_0cc8_b663_0ca6_u128.to_be_bytes());

    let plain = u128::from_le_bytes(0x3243_f6a8_885a_308d_3131_98a2_e037_0734_u128.to_be_bytes());
    let cipher = keys[1..10].iter().fold(plain ^ keys[0], |state, key| aes(Mnemonic::Aesenc, state, *key));
    let cipher = aes(Mnemonic::Aesenclast, cipher, keys[10]);
    assert_eq!(cipher.to_le_bytes(), 0x3925_841d_02dc_09fb_dc11_8597_196a_0b32_u128.to_be_bytes());

    // The equivalent inverse cipher, FIPS 197 5.3.5.
    let state = keys[1..10]
        .iter()
        .rev()
        .fold(cipher ^ keys[10], |state, key| aes(Mnemonic::Aesdec, state, aes(Mnemonic::Aesimc, 0, *key)));
    assert_eq!(aes(Mnemonic::Aesdeclast, state, keys[0]), plain);
}

/// The first `count` primes, and `root` of each: the first 32 bits after the point.
fn constants(count: usize, root: fn(f64) -> f64) -> Vec<u32> {
    let primes = (2u32..).filter(|n| (2..*n).all(|d| n % d != 0));
    primes.take(count).map(|prime| (root(f64::from(prime)).fract() * 4_294_967_296.0) as u32).collect()
}

fn register(words: &[u32]) -> u128 {
    words.iter().rev().fold(0, |register, word| register << 32 | u128::from(*word))
}

fn words(register: u128) -> [u32; 4] {
    [0, 32, 64, 96].map(|shift| (register >> shift) as u32)
}

/// FIPS 180-4 with the example message "abc": 6.2.2 by the instructions.
#[test]
fn sha_256() {
    let mut block = [0u8; 64];
    block[..4].copy_from_slice(b"abc\x80");
    block[63] = 24;
    let mut message: Vec<u128> = block
        .chunks(16)
        .map(|chunk| {
            register(&chunk.chunks(4).map(|b| u32::from_be_bytes(b.try_into().unwrap())).collect::<Vec<_>>())
        })
        .collect();
    while message.len() < 16 {
        let [.., a, b, c, d] = message[..] else { unreachable!("four at least") };
        let first = portable_xmm_op(Mnemonic::Sha256msg1).unwrap()(a, b, 0);
        let middle = portable_xmm_op(Mnemonic::Palignr).unwrap()(d, c, 4);
        let sum = portable_xmm_op(Mnemonic::Paddd).unwrap()(first, middle, 0);
        message.push(portable_xmm_op(Mnemonic::Sha256msg2).unwrap()(sum, d, 0));
    }

    let initial = constants(8, f64::sqrt);
    let k = constants(64, f64::cbrt);
    let [a, b, c, d, e, f, g, h] = initial[..] else { unreachable!("eight") };
    let (mut abef, mut cdgh) = (register(&[f, e, b, a]), register(&[h, g, d, c]));
    for (message, k) in message.iter().zip(k.chunks(4)) {
        let sum = portable_xmm_op(Mnemonic::Paddd).unwrap()(*message, register(k), 0);
        for sum in [sum, sum >> 64] {
            (abef, cdgh) = (masked_op(Mnemonic::Sha256rnds2).unwrap()(cdgh, abef, sum), abef);
        }
    }
    let ([f, e, b, a], [h, g, d, c]) = (words(abef), words(cdgh));
    let digest: Vec<u32> =
        initial.iter().zip([a, b, c, d, e, f, g, h]).map(|(old, new)| old.wrapping_add(new)).collect();
    assert_eq!(
        digest,
        [
            0xba78_16bf,
            0x8f01_cfea,
            0x4141_40de,
            0x5dae_2223,
            0xb003_61a3,
            0x9617_7a9c,
            0xb410_ff61,
            0xf200_15ad
        ]
    );
}

/// FIPS 180-4 with the example message "abc": 6.1.2 by the instructions.
#[test]
fn sha_1() {
    let mut block = [0u8; 64];
    block[..4].copy_from_slice(b"abc\x80");
    block[63] = 24;
    // The first word of the message is at the top of the register.
    let mut message: Vec<u128> =
        block.chunks(16).map(|chunk| u128::from_be_bytes(chunk.try_into().unwrap())).collect();
    while message.len() < 20 {
        let [.., a, b, c, d] = message[..] else { unreachable!("four at least") };
        let sum = portable_xmm_op(Mnemonic::Sha1msg1).unwrap()(a, b, 0) ^ c;
        message.push(portable_xmm_op(Mnemonic::Sha1msg2).unwrap()(sum, d, 0));
    }

    let initial = register(&[0x1032_5476, 0x98ba_dcfe, 0xefcd_ab89, 0x6745_2301]);
    let e = 0xc3d2_e1f0u32;
    let mut state = initial;
    let mut message_and_e = portable_xmm_op(Mnemonic::Paddd).unwrap()(message[0], u128::from(e) << 96, 0);
    for group in 0..20 {
        let before = state;
        state = portable_xmm_op(Mnemonic::Sha1rnds4).unwrap()(state, message_and_e, group / 5);
        let next = message.get(usize::from(group) + 1).copied().unwrap_or(u128::from(e) << 96);
        message_and_e = portable_xmm_op(Mnemonic::Sha1nexte).unwrap()(before, next, 0);
    }
    let digest = portable_xmm_op(Mnemonic::Paddd).unwrap()(state, initial, 0);
    let [d, c, b, a] = words(digest);
    let [.., e] = words(message_and_e);
    assert_eq!([a, b, c, d, e], [0xa999_3e36, 0x4706_816a, 0xba3e_2571, 0x7850_c26c, 0x9cd0_d89d]);
}

/// RFC 3720 B.4: 32 bytes of zeros, of ones, and ascending.
#[test]
fn crc_32c() {
    let digest = |bytes: &[u8], step: usize| {
        let crc = bytes.chunks(step).fold(!0, |crc, chunk| {
            let data = chunk.iter().rev().fold(0, |data, byte| data << 8 | u64::from(*byte));
            crc32(crc, data, step.try_into().unwrap())
        });
        !crc
    };
    let ascending: Vec<u8> = (0..32).collect();
    for step in [1, 2, 4, 8] {
        assert_eq!(digest(&[0; 32], step), 0x8a91_36aa);
        assert_eq!(digest(&[0xff; 32], step), 0x62a8_ab43);
        assert_eq!(digest(&ascending, step), 0x46dd_794e);
    }
}

/// Each way to compare, on text that a reader can follow.
#[test]
fn string_comparisons() {
    let text = u128::from_le_bytes(*b"virtual machine\0");
    let sought = u128::from_le_bytes(*b"mach\0rubbish....");
    assert_eq!(compare_implicit(sought, text, 0b000_1100).index(), 8, "equal ordered");
    assert_eq!(compare_implicit(u128::from(b'i'), text, 0).index(), 1, "equal any");
    assert_eq!(compare_implicit(u128::from(b'i'), text, 0x40).index(), 12, "equal any, the last");
    let digits = u128::from_le_bytes(*b"az\0.............");
    assert_eq!(compare_implicit(digits, text, 0b001_0100).index(), 7, "the first outside of a range");
    assert_eq!(compare_explicit(text, i64::MIN, text, 16, 0b000_1000).mask(), 0xffff, "equal each");
}
