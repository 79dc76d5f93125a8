//! The assembler for what the translator adds by itself: a few instructions, in a few forms.
//!
//! Registers are numbers as in instructions: RAX is 0, RCX 1, and so on (Intel SDM 2A 2.2.1).

/// Registers that translated code has to itself.
pub(super) const RAX: u8 = 0;
pub(super) const RCX: u8 = 1;
pub(super) const RDX: u8 = 2;

/// What a ModRM byte names besides a register.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rm {
    Reg(u8),
    /// In the frame, which GS is the base of.
    Frame(i32),
    /// In the frame, at the offset in a register and a displacement.
    FrameAt(u8, i32),
    /// In the frame, at eight times the number in a register and a displacement.
    FrameIndexed(u8, i32),
    /// At the address in a register, with a displacement.
    At(u8, i32),
    /// Base, index, binary logarithm of the scale, displacement. RSP is no index.
    Indexed(u8, u8, u8, i32),
    /// Index alone.
    Scaled(u8, u8, i32),
}

impl Rm {
    fn is_in_frame(self) -> bool {
        matches!(self, Self::Frame(_) | Self::FrameAt(..) | Self::FrameIndexed(..))
    }

    /// The bits that extend base and index.
    fn rex(self) -> u8 {
        let (base, index) = match self {
            Self::Reg(base) | Self::FrameAt(base, _) | Self::At(base, _) => (base, 0),
            Self::Indexed(base, index, ..) => (base, index),
            Self::Scaled(index, ..) | Self::FrameIndexed(index, _) => (0, index),
            Self::Frame(_) => (0, 0),
        };
        base >> 3 | index >> 3 << 1
    }
}

/// Code under construction.
#[derive(Debug, Default)]
pub(super) struct Emitter {
    pub(super) bytes: Vec<u8>,
}

impl Emitter {
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub(super) fn imm32(&mut self, value: i32) {
        self.bytes(&value.to_le_bytes());
    }

    /// An instruction with a ModRM byte. `wide` is REX.W.
    pub(super) fn op(&mut self, wide: bool, opcode: &[u8], reg: u8, rm: Rm) {
        if rm.is_in_frame() {
            self.bytes.push(0x65);
        }
        let rex = u8::from(wide) << 3 | reg >> 3 << 2 | rm.rex();
        if rex != 0 {
            self.bytes.push(0x40 | rex);
        }
        self.bytes(opcode);
        self.modrm(reg & 7, rm);
    }

    fn modrm(&mut self, reg: u8, rm: Rm) {
        let reg = reg << 3;
        match rm {
            Rm::Reg(rm) => self.bytes.push(0xc0 | reg | rm & 7),
            Rm::Frame(disp) => {
                self.bytes(&[reg | 4, 0x25]);
                self.imm32(disp);
            }
            Rm::FrameAt(base, disp) => {
                if base & 7 == 4 {
                    self.bytes(&[0x80 | reg | 4, 0x24]);
                } else {
                    self.bytes.push(0x80 | reg | base & 7);
                }
                self.imm32(disp);
            }
            Rm::At(base, disp) => {
                let short = i8::try_from(disp).ok();
                let mode = match short {
                    Some(0) if base & 7 != 5 => 0,
                    Some(_) => 0x40,
                    None => 0x80,
                };
                self.bytes.push(mode | reg | base & 7);
                if base & 7 == 4 {
                    self.bytes.push(0x24);
                }
                self.displacement(mode, disp);
            }
            Rm::Indexed(base, index, scale, disp) => {
                let mode = match i8::try_from(disp) {
                    Ok(0) if base & 7 != 5 => 0,
                    Ok(_) => 0x40,
                    Err(_) => 0x80,
                };
                self.bytes(&[mode | reg | 4, scale << 6 | (index & 7) << 3 | base & 7]);
                self.displacement(mode, disp);
            }
            Rm::Scaled(index, scale, disp) => {
                self.bytes(&[reg | 4, scale << 6 | (index & 7) << 3 | 5]);
                self.imm32(disp);
            }
            Rm::FrameIndexed(index, disp) => {
                self.bytes(&[reg | 4, 0xc0 | (index & 7) << 3 | 5]);
                self.imm32(disp);
            }
        }
    }

    fn displacement(&mut self, mode: u8, disp: i32) {
        match mode {
            0 => {}
            0x40 => self.bytes.extend(disp.to_le_bytes().first()),
            _ => self.imm32(disp),
        }
    }

    pub(super) fn mov(&mut self, to: u8, from: u8) {
        self.op(true, &[0x8b], to, Rm::Reg(from));
    }

    pub(super) fn load(&mut self, to: u8, from: Rm) {
        self.op(true, &[0x8b], to, from);
    }

    pub(super) fn store(&mut self, to: Rm, from: u8) {
        self.op(true, &[0x89], from, to);
    }

    pub(super) fn lea(&mut self, to: u8, address: Rm) {
        self.op(true, &[0x8d], to, address);
    }

    /// `to = value`. No flag changes.
    pub(super) fn constant(&mut self, to: u8, value: u64) {
        if let Ok(short) = u32::try_from(value) {
            if to >= 8 {
                self.bytes.push(0x41);
            }
            self.bytes.push(0xb8 | to & 7);
            self.bytes(&short.to_le_bytes());
        } else if let Ok(signed) = i32::try_from(value.cast_signed()) {
            self.op(true, &[0xc7], 0, Rm::Reg(to));
            self.imm32(signed);
        } else {
            self.bytes(&[0x48 | to >> 3, 0xb8 | to & 7]);
            self.bytes(&value.to_le_bytes());
        }
    }

    /// An instruction of the first group with an immediate: `extension` is 0 for ADD, 4 for AND, 5 for SUB, 7 for CMP.
    pub(super) fn group1(&mut self, wide: bool, extension: u8, rm: Rm, value: i32) {
        if let Ok(short) = i8::try_from(value) {
            self.op(wide, &[0x83], extension, rm);
            self.bytes(&short.to_le_bytes());
        } else {
            self.op(wide, &[0x81], extension, rm);
            self.imm32(value);
        }
    }

    /// A near jump whose distance is filled in later; where that is.
    pub(super) fn jump(&mut self) -> usize {
        self.bytes(&[0xe9, 0, 0, 0, 0]);
        self.len() - 4
    }

    /// A conditional near jump, likewise. `condition` is that of the opcode.
    pub(super) fn jump_if(&mut self, condition: u8) -> usize {
        self.bytes(&[0x0f, 0x80 | condition & 15, 0, 0, 0, 0]);
        self.len() - 4
    }

    /// A conditional short jump, likewise.
    pub(super) fn jump_short(&mut self, opcode: u8) -> usize {
        self.bytes(&[opcode, 0]);
        self.len() - 1
    }

    /// Lets the near jump with its distance at `at` go to `target`, both offsets in this code.
    pub(super) fn land(&mut self, at: usize, target: usize) {
        let distance = distance(at, target);
        if let Some(place) = self.bytes.get_mut(at..at + 4) {
            place.copy_from_slice(&distance.to_le_bytes());
        }
    }

    /// Lets the near jump at `at` come here.
    pub(super) fn land_here(&mut self, at: usize) {
        self.land(at, self.len());
    }

    /// Lets the short jump at `at` come here.
    pub(super) fn land_short(&mut self, at: usize) {
        let distance = self.len().wrapping_sub(at + 1);
        debug_assert!(distance < 128, "a short jump over {distance} bytes");
        if let (Some(place), Ok(distance)) = (self.bytes.get_mut(at), u8::try_from(distance)) {
            *place = distance;
        }
    }
}

/// The distance of a near jump whose four bytes lie at `at`.
#[allow(clippy::cast_possible_truncation, reason = "code memory is much smaller than 2 GiB")]
pub(super) fn distance(at: usize, target: usize) -> i32 {
    target.wrapping_sub(at + 4).cast_signed() as i32
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

    use super::*;

    fn text(emit: impl FnOnce(&mut Emitter)) -> String {
        let mut emitter = Emitter::default();
        emit(&mut emitter);
        let mut decoder = Decoder::with_ip(64, &emitter.bytes, 0, DecoderOptions::NONE);
        let mut formatter = IntelFormatter::new();
        let mut lines = Vec::new();
        while decoder.can_decode() {
            let mut line = String::new();
            formatter.format(&decoder.decode(), &mut line);
            lines.push(line);
        }
        lines.join("; ")
    }

    #[test]
    fn every_base_and_index_is_what_it_says() {
        const NAMES: [&str; 16] = [
            "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
            "r14", "r15",
        ];
        for (base, name) in (0..).zip(NAMES) {
            assert_eq!(text(|e| e.load(9, Rm::At(base, 0))), format!("mov r9,[{name}]"));
            assert_eq!(text(|e| e.store(Rm::At(base, -8), 1)), format!("mov [{name}-8],rcx"));
            assert_eq!(text(|e| e.lea(0, Rm::At(base, 0x1000))), format!("lea rax,[{name}+1000h]"));
            assert_eq!(text(|e| e.load(0, Rm::FrameAt(base, 0x40))), format!("mov rax,gs:[{name}+40h]"));
            assert_eq!(text(|e| e.mov(base, 3)), format!("mov {name},rbx"));
            for (index, other) in (0..).zip(NAMES).filter(|(index, _)| *index != 4) {
                let indexed = text(|e| e.lea(2, Rm::Indexed(base, index, 3, 0)));
                assert_eq!(indexed, format!("lea rdx,[{name}+{other}*8]"));
                let scaled = text(|e| e.lea(2, Rm::Scaled(index, 2, 16)));
                assert_eq!(scaled, format!("lea rdx,[{other}*4+10h]"));
            }
            for value in [0, 0x7fff_ffff, 0xffff_ffff, 0xffff_ffff_8000_0000, 0x8000_0000_0000_0000] {
                let line = text(|e| e.constant(base, value));
                let mut emitter = Emitter::default();
                emitter.constant(base, value);
                let instruction = Decoder::with_ip(64, &emitter.bytes, 0, DecoderOptions::NONE).decode();
                assert!(line.starts_with("mov "), "{line}");
                assert_eq!(instruction.op0_register().full_register().number(), usize::from(base));
                assert_eq!(instruction.immediate(1), value, "{line}");
            }
        }
        assert_eq!(text(|e| e.store(Rm::Frame(0x88), 10)), "mov gs:[88h],r10");
        assert_eq!(text(|e| e.load(1, Rm::FrameIndexed(1, 0x88))), "mov rcx,gs:[rcx*8+88h]");
        assert_eq!(text(|e| e.load(1, Rm::FrameIndexed(9, 0x88))), "mov rcx,gs:[r9*8+88h]");
        assert_eq!(text(|e| e.group1(true, 7, Rm::Reg(0), 4088)), "cmp rax,0FF8h");
        assert_eq!(text(|e| e.group1(false, 4, Rm::Reg(1), 0xffe0)), "and ecx,0FFE0h");
    }

    #[test]
    fn jumps_go_where_they_land() {
        let code = text(|e| {
            let near = e.jump();
            let conditional = e.jump_if(7);
            let short = e.jump_short(0xe3);
            e.mov(0, 0);
            e.land_here(near);
            e.land_here(conditional);
            e.land_short(short);
        });
        assert_eq!(code, "jmp 0000000000000010h; ja 0000000000000010h; jrcxz 0000000000000010h; mov rax,rax");
    }
}
