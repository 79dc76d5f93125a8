//! The x87 unit in memory: FNSTENV, FNSAVE and FXSAVE images, and the way back.

use super::f80::F80;
use super::state::X87State;

/// Length of the x87 part of an FXSAVE image in bytes.
pub(crate) const FXSAVE_X87_BYTES: usize = 160;

/// How FXSAVE and XSAVE write the instruction and data pointers (Intel SDM 1 10.5.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PointerFormat {
    /// 32-bit offsets and selectors.
    Selectors,
    /// 64-bit offsets (with REX.W).
    Offsets,
}

/// The layout of FNSTENV and FNSAVE images (Intel SDM 1 8.1.10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Layout {
    Protected32,
    Real32,
    Protected16,
    Real16,
}

impl Layout {
    /// Length of the environment in bytes.
    pub(super) fn environment_bytes(self) -> usize {
        match self {
            Self::Protected32 | Self::Real32 => 28,
            Self::Protected16 | Self::Real16 => 14,
        }
    }
}

/// Bytes `at` and up of an image, which covers them.
fn read<const N: usize>(image: &[u8], at: usize) -> [u8; N] {
    image.get(at..).and_then(<[u8]>::first_chunk).copied().unwrap_or([0; N])
}

fn write<const N: usize>(image: &mut [u8], at: usize, bytes: [u8; N]) {
    if let Some(place) = image.get_mut(at..).and_then(<[u8]>::first_chunk_mut) {
        *place = bytes;
    }
}

/// Bits `from` and up, sixteen of them.
fn word(value: u64, from: u32) -> u16 {
    (value >> from & 0xffff) as u16
}

fn doubleword(value: u64) -> u32 {
    (value & 0xffff_ffff) as u32
}

impl X87State {
    /// Writes the x87 part of an FXSAVE image (Intel SDM 1 table 10-2). MXCSR and its mask, bytes 24 to
    /// 31, are left alone.
    #[allow(clippy::wrong_self_convention, reason = "too large to pass by value")]
    pub(crate) fn to_fxsave(&self, image: &mut [u8; FXSAVE_X87_BYTES], format: PointerFormat) {
        write(image, 0, self.control().to_le_bytes());
        write(image, 2, self.status().to_le_bytes());
        write(image, 4, [self.tags(), 0]);
        write(image, 6, self.opcode.to_le_bytes());
        let pointer = |offset: u64, selector: u16| match format {
            PointerFormat::Offsets => offset,
            PointerFormat::Selectors => u64::from(doubleword(offset)) | u64::from(selector) << 32,
        };
        write(image, 8, pointer(self.instruction_pointer, self.code_selector).to_le_bytes());
        write(image, 16, pointer(self.data_pointer, self.data_selector).to_le_bytes());
        for (st, at) in (0..8).zip((32..).step_by(16)) {
            write(image, at, self.st(st).to_bytes());
            write(image, at + 10, [0; 6]);
        }
    }

    /// Reads the x87 part of an FXSAVE image. Reserved bits are ignored.
    pub(crate) fn from_fxsave(image: &[u8; FXSAVE_X87_BYTES], format: PointerFormat) -> Self {
        let mut state = Self::default();
        state.set_control(u16::from_le_bytes(read(image, 0)));
        state.set_status(u16::from_le_bytes(read(image, 2)));
        let [tags] = read(image, 4);
        state.opcode = u16::from_le_bytes(read(image, 6)) & 0x7ff;
        let (instruction, data) = (u64::from_le_bytes(read(image, 8)), u64::from_le_bytes(read(image, 16)));
        match format {
            PointerFormat::Offsets => {
                state.instruction_pointer = instruction;
                state.data_pointer = data;
            }
            PointerFormat::Selectors => {
                state.instruction_pointer = u64::from(doubleword(instruction));
                state.code_selector = word(instruction, 32);
                state.data_pointer = u64::from(doubleword(data));
                state.data_selector = word(data, 32);
            }
        }
        for (st, at) in (0..8).zip((32..).step_by(16)) {
            state.set_st(st, F80::from_bytes(read(image, at)));
        }
        state.set_tags(tags);
        state
    }

    /// The tag word: two bits a register, R0 lowest, as its contents say (Intel SDM 1 8.1.7).
    fn full_tags(&self) -> u16 {
        self.registers.iter().enumerate().fold(0, |word, (number, value)| {
            let tag = if self.tags() >> number & 1 == 0 {
                3
            } else if value.is_zero() {
                1
            } else if value.exponent_field() == 0
                || value.exponent_field() == 0x7fff
                || value.is_unsupported()
            {
                2
            } else {
                0
            };
            word | tag << (2 * number)
        })
    }

    /// Writes the environment into the first [`Layout::environment_bytes`] of `image`.
    pub(super) fn write_environment(&self, image: &mut [u8], layout: Layout) {
        let (ip, dp) = (self.instruction_pointer, self.data_pointer);
        let (control, status, tags) = (self.control(), self.status(), self.full_tags());
        let linear = |selector: u16, offset: u64| offset.wrapping_add(u64::from(selector) << 4);
        match layout {
            Layout::Protected32 | Layout::Real32 => {
                for (value, at) in [control, status, tags].into_iter().zip((0..).step_by(4)) {
                    write(image, at, (u32::from(value) | 0xffff_0000).to_le_bytes());
                }
            }
            Layout::Protected16 | Layout::Real16 => {
                for (value, at) in [control, status, tags].into_iter().zip((0..).step_by(2)) {
                    write(image, at, value.to_le_bytes());
                }
            }
        }
        match layout {
            Layout::Protected32 => {
                write(image, 12, doubleword(ip).to_le_bytes());
                write(
                    image,
                    16,
                    (u32::from(self.code_selector) | u32::from(self.opcode) << 16).to_le_bytes(),
                );
                write(image, 20, doubleword(dp).to_le_bytes());
                write(image, 24, (u32::from(self.data_selector) | 0xffff_0000).to_le_bytes());
            }
            Layout::Real32 => {
                let (ip, dp) = (linear(self.code_selector, ip), linear(self.data_selector, dp));
                let high = |linear: u64| u32::from(word(linear, 16)) << 12;
                write(image, 12, (u32::from(word(ip, 0)) | 0xffff_0000).to_le_bytes());
                write(image, 16, (high(ip) | u32::from(self.opcode)).to_le_bytes());
                write(image, 20, (u32::from(word(dp, 0)) | 0xffff_0000).to_le_bytes());
                write(image, 24, high(dp).to_le_bytes());
            }
            Layout::Protected16 => {
                write(image, 6, word(ip, 0).to_le_bytes());
                write(image, 8, self.code_selector.to_le_bytes());
                write(image, 10, word(dp, 0).to_le_bytes());
                write(image, 12, self.data_selector.to_le_bytes());
            }
            Layout::Real16 => {
                let (ip, dp) = (linear(self.code_selector, ip), linear(self.data_selector, dp));
                let high = |linear: u64| (word(linear, 16) & 0xf) << 12;
                write(image, 6, word(ip, 0).to_le_bytes());
                write(image, 8, (high(ip) | self.opcode).to_le_bytes());
                write(image, 10, word(dp, 0).to_le_bytes());
                write(image, 12, high(dp).to_le_bytes());
            }
        }
    }

    /// Reads the environment from the first [`Layout::environment_bytes`] of `image`.
    pub(super) fn read_environment(&mut self, image: &[u8], layout: Layout) {
        let step = if layout.environment_bytes() == 28 { 4 } else { 2 };
        let [control, status, tags, ip, cs, dp, ds] =
            std::array::from_fn(|i| u64::from(u16::from_le_bytes(read(image, i * step))));
        self.set_control(word(control, 0));
        self.set_status(word(status, 0));
        self.set_tags((0..8).fold(0, |abridged, i| abridged | u8::from(tags >> (2 * i) & 3 != 3) << i));
        match layout {
            Layout::Protected32 => {
                self.instruction_pointer = u64::from(u32::from_le_bytes(read(image, 12)));
                self.code_selector = word(cs, 0);
                self.opcode = u16::from_le_bytes(read(image, 18)) & 0x7ff;
                self.data_pointer = u64::from(u32::from_le_bytes(read(image, 20)));
                self.data_selector = word(ds, 0);
            }
            Layout::Protected16 => {
                self.instruction_pointer = ip;
                self.code_selector = word(cs, 0);
                self.data_pointer = dp;
                self.data_selector = word(ds, 0);
                // There is none in it.
                self.opcode = 0;
            }
            Layout::Real32 | Layout::Real16 => {
                // Linear addresses: no selector.
                let high = |at: usize| match layout {
                    Layout::Real32 => u64::from(u32::from_le_bytes(read(image, at))) >> 12 & 0xffff,
                    _ => u64::from(u16::from_le_bytes(read(image, at))) >> 12,
                };
                self.instruction_pointer = ip | high(4 * step) << 16;
                self.data_pointer = dp | high(6 * step) << 16;
                (self.code_selector, self.data_selector) = (0, 0);
                self.opcode = word(cs, 0) & 0x7ff;
            }
        }
    }

    /// Writes ST(0) to ST(7), ten bytes each.
    pub(super) fn write_stack(&self, image: &mut [u8]) {
        for (st, at) in (0..8).zip((0..).step_by(10)) {
            write(image, at, self.st(st).to_bytes());
        }
    }

    /// Reads ST(0) to ST(7), ten bytes each; the tags are the environment's.
    pub(super) fn read_stack(&mut self, image: &[u8]) {
        for (st, at) in (0..8).zip((0..).step_by(10)) {
            self.set_st_untagged(st, F80::from_bytes(read(image, at)));
        }
    }
}
