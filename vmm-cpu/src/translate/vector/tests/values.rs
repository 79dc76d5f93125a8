//! Operands for tests.

/// Values at which lanes of some width overflow, saturate, change sign or shift out.
pub(super) fn special() -> Vec<u128> {
    let repeat = |lane: u64| u128::from(lane) << 64 | u128::from(lane);
    let mut values: Vec<u128> = [
        0,
        0x0101_0101_0101_0101,
        0x7f7f_7f7f_7f7f_7f7f,
        0x8080_8080_8080_8080,
        0x0001_0001_0001_0001,
        0x7fff_7fff_7fff_7fff,
        0x8000_8000_8000_8000,
        0x0000_0001_0000_0001,
        0x7fff_ffff_7fff_ffff,
        0x8000_0000_8000_0000,
        1,
        i64::MAX as u64,
        1 << 63,
        0x00ff_00ff_00ff_00ff,
        0xff00_ff00_ff00_ff00,
        0xff80_007f_8000_7fff,
        u64::MAX,
    ]
    .map(repeat)
    .into();
    values.extend([3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 255, 1 << 32 | 3, 1 << 64 | 5]);
    values.extend([0x0f0e_0d0c_0b0a_0908_0706_0504_0302_0100, 0x8081_ff7f_0f10_1211_0102_0305_0a0b_f0f1]);
    values
}

/// A reproducible sequence (splitmix64).
pub(super) struct Sequence(pub(super) u64);

impl Sequence {
    pub(super) fn word(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn register(&mut self) -> u128 {
        u128::from(self.word()) << 64 | u128::from(self.word())
    }

    /// Bytes of a small alphabet, so that lanes of two registers are often equal, zero or extreme.
    pub(super) fn text(&mut self) -> u128 {
        const ALPHABET: [u8; 8] = [0, 1, 2, 0x7f, 0x80, 0xff, 2, 1];
        let choices = self.register().to_le_bytes();
        u128::from_le_bytes(choices.map(|choice| ALPHABET[usize::from(choice) % ALPHABET.len()]))
    }
}
