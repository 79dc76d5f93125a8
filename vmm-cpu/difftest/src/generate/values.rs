//! Values at which instructions change what they do, among random ones.

use iced_x86::MemorySize;

use super::Random;

/// What an integer may be, of `bits` bits (8, 16, 32 or 64) and with anything above them.
pub(super) fn integer(random: &mut Random, bits: u32) -> u64 {
    let mask = u64::MAX >> (64 - bits);
    let low = match random.u8(..16) {
        0 => 0,
        1 => u64::MAX,
        2 | 3 => (1 << (bits - 1)) + random.u64(..3) - 1,
        4 => random.u64(..3).wrapping_sub(1),
        5 => (1_u64 << random.u32(..bits)).wrapping_add(random.u64(..3)).wrapping_sub(1),
        6 | 7 => random.u64(..72),
        8 => random.u64(..72).wrapping_neg(),
        9 => u64::from(random.u8(..)) * 0x0101_0101_0101_0101,
        10 => random.u64(..) & random.u64(..) & random.u64(..),
        11 => random.u64(..) >> random.u32(..64),
        _ => random.u64(..),
    };
    let high = match random.u8(..4) {
        0 => 0,
        1 => u64::MAX,
        _ => random.u64(..),
    };
    low & mask | high & !mask
}

/// A width for [`integer`].
pub(super) fn width(random: &mut Random) -> u32 {
    8 << random.u32(..4)
}

/// A binary floating-point number of `fraction` fraction bits and `exponent` exponent bits.
fn float(random: &mut Random, fraction: u32, exponent: u32) -> u64 {
    let sign = u64::from(random.bool()) << (fraction + exponent);
    let all = (1 << exponent) - 1;
    let some = random.u64(..) & ((1 << fraction) - 1);
    let quiet = 1 << (fraction - 1);
    let bias = all >> 1;
    let magnitude = match random.u8(..24) {
        0 | 1 => 0,
        2 => all << fraction,
        3 => all << fraction | quiet | some,
        4 => all << fraction | some & !quiet | 1,
        // Denormals, and the smallest normal.
        5 => some.max(1),
        6 => 1 << random.u32(..fraction),
        7 => (1 << fraction) | random.u64(..2),
        8 => all << fraction | quiet,
        // The largest.
        9 => (all << fraction) - 1 - random.u64(..2),
        10..=12 => bias << fraction,
        // Integers and halves.
        13..=16 => {
            let shift = random.u32(..fraction.min(40));
            (bias + u64::from(shift)) << fraction
                | some & !(((1 << fraction) - 1) >> (shift + 1).min(fraction))
        }
        // Near what integers of 32 and 64 bits hold.
        17 => (bias + 29 + random.u64(..4)) << fraction | some,
        18 => (bias + 61 + random.u64(..4)).min(all) << fraction | some,
        19 | 20 => (bias - 3 + random.u64(..6)) << fraction | some,
        _ => random.u64(..) & ((1 << (fraction + exponent)) - 1),
    };
    sign | magnitude
}

/// A single.
pub(super) fn float32(random: &mut Random) -> u32 {
    // 32 bits by construction.
    u32::try_from(float(random, 23, 8)).unwrap_or_default()
}

/// A double.
pub(super) fn float64(random: &mut Random) -> u64 {
    float(random, 52, 11)
}

/// An x87 register, or 80 bits that none can hold.
pub(super) fn float80(random: &mut Random) -> [u8; 10] {
    const INTEGER: u64 = 1 << 63;
    let sign = u16::from(random.bool()) << 15;
    let some = random.u64(..) >> 1;
    let (exponent, significand) = match random.u8(..24) {
        0 | 1 => (0, 0),
        2 => (0x7fff, INTEGER),
        3 => (0x7fff, INTEGER | 1 << 62 | some),
        4 => (0x7fff, INTEGER | some >> 1 | 1),
        5 => (0, some.max(1)),
        // A pseudo-denormal, and what the 387 and later call invalid: unnormals, pseudo-NaNs and pseudo-infinities.
        6 => (0, INTEGER | some),
        7 => (random.u16(1..0x7fff), some),
        8 => (0x7fff, some),
        9 => (0x7fff, 0),
        10..=12 => (0x3fff, INTEGER),
        13..=15 => (0x3fff + random.u16(..66), INTEGER | (some & random.u64(..) << random.u32(..63))),
        16 => (0x7ffe, u64::MAX - random.u64(..2)),
        17 => (1, INTEGER | random.u64(..2)),
        18 => (0x3ffc + random.u16(..6), INTEGER | some),
        // What denormalises or overflows as a single or double.
        19 => (0x3fff - 1022 - random.u16(..60), INTEGER | some),
        20 => (0x3fff - 126 - random.u16(..30), INTEGER | some),
        21 => (0x3fff + if random.bool() { 1023 } else { 127 }, INTEGER | some),
        _ => (random.u16(..0x7fff).max(1), INTEGER | some),
    };
    let mut bytes = [0; 10];
    let value = u128::from(sign | exponent) << 64 | u128::from(significand);
    for (byte, from) in bytes.iter_mut().zip(value.to_le_bytes()) {
        *byte = from;
    }
    bytes
}

/// 18 decimal digits and a sign, or nonsense.
pub(super) fn bcd(random: &mut Random) -> [u8; 10] {
    let mut bytes = [0; 10];
    let nonsense = random.u8(..10) == 0;
    let digits = random.usize(..10);
    for byte in bytes.iter_mut().take(digits) {
        *byte = if nonsense { random.u8(..) } else { random.u8(..10) << 4 | random.u8(..10) };
    }
    let [.., last] = &mut bytes;
    *last = random.u8(..) & if nonsense { 0xff } else { 0x80 };
    bytes
}

/// What the elements of a vector are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    /// Integers of these many bits.
    Integer(u32),
    /// Singles.
    Float32,
    /// Doubles.
    Float64,
    /// Bytes of which some are equal and some zero.
    Text,
}

impl Element {
    /// Any.
    pub(super) fn any(random: &mut Random) -> Self {
        match random.u8(..4) {
            0 => Self::Float32,
            1 => Self::Float64,
            2 => Self::Text,
            _ => Self::Integer(width(random)),
        }
    }

    /// What an operand of this size is made of.
    pub(super) fn of(size: MemorySize) -> Option<Self> {
        match size.element_type() {
            MemorySize::Float32 => Some(Self::Float32),
            MemorySize::Float64 => Some(Self::Float64),
            element => match (element.size(), size.is_packed()) {
                (bytes @ (1 | 2 | 4 | 8), true) => u32::try_from(bytes * 8).ok().map(Self::Integer),
                _ => None,
            },
        }
    }

    /// A vector of them.
    pub(super) fn vector(self, random: &mut Random) -> [u8; 16] {
        let mut bytes = [0; 16];
        match self {
            Self::Float32 => {
                for chunk in bytes.as_chunks_mut::<4>().0 {
                    *chunk = float32(random).to_le_bytes();
                }
            }
            Self::Float64 => {
                for chunk in bytes.as_chunks_mut::<8>().0 {
                    *chunk = float64(random).to_le_bytes();
                }
            }
            Self::Text => {
                let letters = random.u64(..) | 0x0080_0000_0100_ff00 >> random.u32(..56);
                for byte in &mut bytes {
                    let [first, ..] = (letters >> (8 * random.u32(..8))).to_le_bytes();
                    *byte = first;
                }
            }
            Self::Integer(64) => {
                for chunk in bytes.as_chunks_mut::<8>().0 {
                    *chunk = integer(random, 64).to_le_bytes();
                }
            }
            Self::Integer(32) => {
                for chunk in bytes.as_chunks_mut::<4>().0 {
                    let [a, b, c, d, ..] = integer(random, 32).to_le_bytes();
                    *chunk = [a, b, c, d];
                }
            }
            Self::Integer(16) => {
                for chunk in bytes.as_chunks_mut::<2>().0 {
                    let [a, b, ..] = integer(random, 16).to_le_bytes();
                    *chunk = [a, b];
                }
            }
            Self::Integer(_) => {
                for byte in &mut bytes {
                    let [a, ..] = integer(random, 8).to_le_bytes();
                    *byte = a;
                }
            }
        }
        bytes
    }
}

/// MXCSR: mostly with all exceptions masked.
pub(super) fn mxcsr(random: &mut Random) -> u32 {
    const MASKS: u32 = 0x1f80;
    let mut value = random.u32(..) & 0x603f;
    if random.u8(..8) < 5 {
        value &= !0x3f;
    }
    value |= match random.u8(..6) {
        0 => random.u32(..) & MASKS,
        1 => MASKS & !(0x80 << random.u32(..6)),
        _ => MASKS,
    };
    // Denormals are zero, and flush to zero.
    value |= u32::from(random.u8(..5) == 0) << 6;
    value |= u32::from(random.u8(..5) == 0) << 15;
    value
}

/// The x87's control word: mostly with all exceptions masked and full precision.
pub(super) fn control_word(random: &mut Random) -> u16 {
    let masks = match random.u8(..6) {
        0 => random.u16(..0x40),
        1 => 0x3f & !(1 << random.u16(..6)),
        _ => 0x3f,
    };
    let precision = if random.bool() { 3 } else { random.u16(..4) };
    let rounding = if random.bool() { 0 } else { random.u16(..4) };
    let infinity = random.u16(..2);
    0x40 | masks | precision << 8 | rounding << 10 | infinity << 12
}

/// The x87's status word that goes with a control word: mostly with no exception pending.
pub(super) fn status_word(random: &mut Random, control: u16) -> u16 {
    let mut exceptions = match random.u8(..4) {
        0 => random.u16(..0x80),
        _ => 0,
    };
    if random.u8(..8) != 0 {
        exceptions &= !(!control & 0x3f);
    }
    let pending = exceptions & !control & 0x3f != 0;
    let condition = random.u16(..) & 0x4700;
    let top = random.u16(..8) << 11;
    exceptions | condition | top | if pending { 0x8080 } else { 0 }
}

/// What bytes an operand of this size in memory may have.
pub(super) fn operand(random: &mut Random, size: MemorySize) -> Vec<u8> {
    match size {
        MemorySize::Float80 => float80(random).to_vec(),
        MemorySize::Bcd => bcd(random).to_vec(),
        MemorySize::Float32 => float32(random).to_le_bytes().to_vec(),
        MemorySize::Float64 => float64(random).to_le_bytes().to_vec(),
        _ => match (Element::of(size), size.size()) {
            (Some(element), bytes @ ..=16) => element.vector(random).into_iter().take(bytes).collect(),
            (_, bytes @ (1 | 2 | 4 | 8)) => {
                let bits = u32::try_from(8 * bytes).unwrap_or(64);
                integer(random, bits).to_le_bytes().into_iter().take(bytes).collect()
            }
            (_, bytes) => {
                let element = Element::any(random);
                let mut all = Vec::new();
                while all.len() < bytes {
                    all.extend(element.vector(random));
                }
                all.truncate(bytes);
                all
            }
        },
    }
}
