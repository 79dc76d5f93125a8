//! Instructions from templates, in the code width that the guest starts with.

use arbitrary::Arbitrary;

use super::guest::{MsrIndex, Value};
use super::layout::{self, SELECTORS};

/// Everything about an encoding but the opcode.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub struct Form {
    prefixes: u8,
    rex: u8,
    modrm: u8,
    sib: u8,
    displacement: u16,
    immediate: u32,
}

/// One instruction or a few that belong together.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub enum Instruction {
    Raw([u8; 3]),
    /// Any opcode of a map.
    Any(u8, u8, Form),
    Integer(u8, Form),
    Integer2(u8, Form),
    Integer3(u8, Form),
    Integer4(u8, Form),
    Lock(u8, Form),
    System(u8, Form),
    System2(u8, Form),
    Far(u8, Form),
    String(u8, Form),
    X87(u8, Form),
    Simd(u8, Form),
    Simd2(u8, Form),
    /// Loads a register.
    Load(u8, Value),
    Load2(u8, Value),
    Msr {
        index: MsrIndex,
        value: Value,
        read: bool,
    },
    Control {
        register: u8,
        flip: u32,
        value: Option<Value>,
    },
    Debug {
        register: u8,
        value: Value,
    },
    /// Stores a word, for instance to the code or to a page table.
    Store {
        address: Value,
        value: u32,
    },
    Patch {
        offset: u16,
        value: u32,
    },
    /// To somewhere in the code.
    Jump(u16),
    /// LOOP or JNE to one of the instructions before.
    Again(u8),
    Iret {
        cs: u8,
        ss: u8,
        flags: u32,
        offset: u16,
    },
    FarJump {
        selector: u8,
        offset: u16,
    },
    Selector {
        register: u8,
        selector: u8,
    },
    Interrupt(u8),
    Repeat {
        operation: u8,
        count: Value,
        source: Value,
        destination: Value,
        backward: bool,
    },
    Port {
        port: u16,
        form: u8,
    },
    Apic {
        register: u8,
        value: u32,
        read: bool,
    },
    Invalidate(Value),
    Hypercall(u8),
    Enable,
    Halt,
    /// Padding up to the last bytes of a page.
    EndOfPage(u8),
}

const INTEGER: &[u16] = &[
    0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x08, 0x11, 0x1b, 0x21, 0x29, 0x33, 0x39, 0x3b, 0x3c, 0x06, 0x07,
    0x0e, 0x16, 0x17, 0x1e, 0x1f, 0x27, 0x2f, 0x37, 0x3f, 0x40, 0x48, 0x4c, 0x50, 0x54, 0x58, 0x5c, 0x60,
    0x61, 0x62, 0x63, 0x68, 0x69, 0x6a, 0x6b, 0x74, 0x75, 0x80, 0x81, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88,
    0x89, 0x8a, 0x8b, 0x8c, 0x8d, 0x8e, 0x8f, 0x90, 0x91, 0x98, 0x99, 0x9b, 0x9c, 0x9d, 0x9e, 0x9f, 0xa0,
    0xa1, 0xa2, 0xa3, 0xa8, 0xb0, 0xb8, 0xc0, 0xc1, 0xc2, 0xc3, 0xc4, 0xc5, 0xc6, 0xc7, 0xc8, 0xc9, 0xd0,
    0xd1, 0xd2, 0xd3, 0xd4, 0xd5, 0xd7, 0xe0, 0xe1, 0xe2, 0xe3, 0xe8, 0xe9, 0xeb, 0xf5, 0xf6, 0xf7, 0xf8,
    0xf9, 0xfc, 0xfd, 0xfe, 0xff, 0x140, 0x14f, 0x180, 0x185, 0x190, 0x1a3, 0x1a4, 0x1a5, 0x1ab, 0x1ac,
    0x1ad, 0x1af, 0x1b0, 0x1b1, 0x1b3, 0x1b6, 0x1b7, 0x1b8, 0x1ba, 0x1bb, 0x1bc, 0x1bd, 0x1be, 0x1bf, 0x14c,
    0x195, 0x1c0, 0x1c1, 0x1c3, 0x1c7, 0x1c8, 0x1cf, 0x10d, 0x118, 0x11f, 0x1ae, 0x2f0, 0x2f1, 0x2f2, 0x2f3,
    0x2f5, 0x2f6, 0x2f7, 0x1b2, 0x1b4, 0x1b5,
];
/// Those that may have a LOCK prefix.
const LOCKED: &[u16] = &[
    0x00, 0x01, 0x09, 0x11, 0x19, 0x21, 0x29, 0x31, 0x80, 0x81, 0x83, 0x86, 0x87, 0xf6, 0xf7, 0xfe, 0xff,
    0x1ab, 0x1b0, 0x1b1, 0x1b3, 0x1ba, 0x1bb, 0x1c0, 0x1c1, 0x1c7, 0x1c7,
];
const SYSTEM: &[u16] = &[
    0x100, 0x100, 0x101, 0x101, 0x101, 0x102, 0x103, 0x105, 0x106, 0x107, 0x108, 0x109, 0x10b, 0x120, 0x121,
    0x122, 0x123, 0x130, 0x131, 0x132, 0x133, 0x134, 0x135, 0x137, 0x1a0, 0x1a1, 0x1a2, 0x1a8, 0x1a9, 0x1aa,
    0x1ae, 0x1ae, 0x1b2, 0x1c7, 0x8e, 0x8c, 0xf4, 0xfa, 0xfb, 0xcc, 0xcd, 0xce, 0xcf, 0xcf, 0xf1, 0xe4, 0xe5,
    0xe6, 0xe7, 0xec, 0xed, 0xee, 0xef, 0x9c, 0x9d, 0x17, 0x07, 0x1f, 0x10d, 0x282, 0x101,
];
const FAR: &[u16] =
    &[0x9a, 0xea, 0xca, 0xcb, 0xcf, 0xff, 0xcd, 0xce, 0x105, 0x107, 0x134, 0x135, 0xc4, 0xc5, 0x1b2];
const STRING: &[u16] = &[
    0x6c, 0x6d, 0x6e, 0x6f, 0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf, 0xa4, 0xa5, 0xaa,
    0xab,
];
const STRING_OPCODES: [u8; 14] =
    [0xa4, 0xa5, 0xaa, 0xab, 0xac, 0xad, 0xa6, 0xa7, 0xae, 0xaf, 0x6c, 0x6d, 0x6e, 0x6f];

impl Form {
    fn emit(&self, out: &mut Vec<u8>, bits: u32, opcode: u16, lock: bool) {
        let Self { prefixes, rex, modrm, sib, displacement, immediate } = *self;
        let (mut operand, mut address) = (if bits == 16 { 16 } else { 32 }, bits);
        match prefixes & 0xf {
            0 | 1 => {
                out.push(0x66);
                operand = if bits == 16 { 32 } else { 16 };
            }
            2 => out.push(0xf2),
            3 | 4 => out.push(0xf3),
            5 => {
                out.push(0x67);
                address = if bits == 32 { 16 } else { 32 };
            }
            6 => {
                out.extend([0x66, 0xf2]);
                operand = if bits == 16 { 32 } else { 16 };
            }
            _ => {}
        }
        match prefixes >> 4 {
            0 => out.push(0x64),
            1 => out.push(0x65),
            2 => out.push(0x2e),
            3 => out.push(0x36),
            4 => out.push(0x26),
            _ => {}
        }
        if lock || prefixes >> 4 == 5 {
            out.push(0xf0);
        }
        let mut wide = false;
        if bits == 64 && rex & 0xc0 != 0 {
            // Three of four are 64 bits wide.
            let rex = 0x40 | rex & 0xf | if rex & 0x80 != 0 { 8 } else { 0 };
            out.push(rex);
            wide = rex & 8 != 0;
        }
        let [code, map] = opcode.to_le_bytes();
        match map {
            0 => {}
            1 => out.push(0x0f),
            2 => out.extend([0x0f, 0x38]),
            _ => out.extend([0x0f, 0x3a]),
        }
        out.push(code);
        let (has_modrm, immediate_bytes) = shape(map, code, modrm, operand, address, wide);
        if has_modrm {
            out.push(modrm);
            memory_operand(out, modrm, sib, displacement, address);
        }
        // Small ones keep branches near.
        let immediate = match immediate >> 24 {
            0..0x20 => u64::from(immediate) * 0x0001_0001_0001,
            _ => i64::from(immediate as i8).cast_unsigned(),
        };
        let mut bytes = immediate.to_le_bytes();
        if matches!((map, code), (0, 0x9a | 0xea)) {
            let selector = SELECTORS[usize::from(sib) % SELECTORS.len()];
            let target = layout::CODE + u64::from(displacement % layout::CODE_SIZE);
            bytes = (target | u64::from(selector) << operand).to_le_bytes();
        }
        out.extend(&bytes[..immediate_bytes]);
    }
}

fn memory_operand(out: &mut Vec<u8>, modrm: u8, sib: u8, displacement: u16, address: u32) {
    let (mode, rm) = (modrm >> 6, modrm & 7);
    let near = i32::from(displacement.cast_signed() >> 4).to_le_bytes();
    if mode == 3 {
        return;
    }
    if address == 16 {
        match (mode, rm) {
            (1, _) => out.push(near[0]),
            (2, _) | (0, 6) => out.extend(&near[..2]),
            _ => {}
        }
        return;
    }
    if rm == 4 {
        out.push(sib);
    }
    match (mode, rm) {
        (1, _) => out.push(near[0]),
        (2, _) | (0, 5) => out.extend(near),
        (0, 4) if sib & 7 == 5 => out.extend(near),
        _ => {}
    }
}

/// Whether an opcode has a ModRM byte, and how many immediate bytes.
fn shape(map: u8, code: u8, modrm: u8, operand: u32, address: u32, wide: bool) -> (bool, usize) {
    let z = if operand == 16 { 2 } else { 4 };
    match map {
        0 => {
            let has_modrm = code < 0x40 && code & 7 < 4
                || matches!(code, 0x62 | 0x63 | 0x69 | 0x6b | 0x80..=0x8f | 0xc0 | 0xc1 | 0xc4..=0xc7)
                || matches!(code, 0xd0..=0xd3 | 0xd8..=0xdf | 0xf6 | 0xf7 | 0xfe | 0xff);
            let immediate = match code {
                0..0x40 if code & 7 == 4 => 1,
                0..0x40 if code & 7 == 5 => z,
                0x68 | 0x69 | 0x81 | 0xa9 | 0xc7 | 0xe8 | 0xe9 => z,
                0x6a | 0x6b | 0x70..=0x7f | 0x80 | 0x82 | 0x83 | 0xa8 | 0xb0..=0xb7 | 0xc0 | 0xc1 => 1,
                0xc6 | 0xcd | 0xd4 | 0xd5 | 0xe0..=0xe7 | 0xeb => 1,
                0x9a | 0xea => z + 2,
                0xa0..=0xa3 => address as usize / 8,
                0xb8..=0xbf => {
                    if wide {
                        8
                    } else {
                        z
                    }
                }
                0xc2 | 0xca => 2,
                0xc8 => 3,
                0xf6 if modrm >> 3 & 6 == 0 => 1,
                0xf7 if modrm >> 3 & 6 == 0 => z,
                _ => 0,
            };
            (has_modrm, immediate)
        }
        1 => {
            let bare = matches!(code, 0x05..=0x0b | 0x30..=0x37 | 0x77 | 0x80..=0x8f | 0xa0..=0xa2);
            let bare = bare || matches!(code, 0xa8..=0xaa | 0xc8..=0xcf | 0x0e);
            let immediate = match code {
                0x80..=0x8f => z,
                0x70..=0x73 | 0xa4 | 0xac | 0xba | 0xc2 | 0xc4..=0xc6 | 0x0f => 1,
                _ => 0,
            };
            (!bare, immediate)
        }
        2 => (true, 0),
        _ => (true, 1),
    }
}

/// A block of code that grows.
pub struct Assembler {
    bytes: Vec<u8>,
    bits: u32,
    /// Where each begins.
    starts: Vec<usize>,
}

impl Assembler {
    pub fn new(bits: u32) -> Self {
        Self { bytes: Vec::new(), bits, starts: Vec::new() }
    }

    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }

    /// MOV of an immediate to one of the first eight registers, as wide as there is.
    fn load(&mut self, register: u8, value: u64) {
        let opcode = 0xb8 | register & 7;
        match self.bits {
            64 => self.bytes.extend([0x48, opcode]),
            32 => self.bytes.push(opcode),
            _ => self.bytes.extend([0x66, opcode]),
        }
        let bytes = value.to_le_bytes();
        self.bytes.extend(if self.bits == 64 { &bytes[..] } else { &bytes[..4] });
    }

    /// PUSH of an immediate of the code's width.
    fn push(&mut self, value: u32) {
        self.bytes.push(0x68);
        let bytes = value.to_le_bytes();
        self.bytes.extend(if self.bits == 16 { &bytes[..2] } else { &bytes[..] });
    }

    /// With 32-bit operands and addresses in 16-bit code too.
    fn wide(&mut self, bytes: &[u8]) {
        if self.bits == 16 {
            self.bytes.extend([0x66, 0x67]);
        }
        self.bytes.extend(bytes);
    }

    pub fn emit(&mut self, instruction: &Instruction) {
        let bits = self.bits;
        self.starts.push(self.bytes.len());
        let pick = |list: &[u16], n: u8| list[usize::from(n) % list.len()];
        let code_at = |offset: u16| layout::CODE + u64::from(offset % layout::CODE_SIZE);
        let out = &mut self.bytes;
        match *instruction {
            Instruction::Raw(bytes) => out.extend(bytes),
            Instruction::Any(map, opcode, form) => {
                form.emit(out, bits, u16::from(map & 3) << 8 | u16::from(opcode), false);
            }
            Instruction::Integer(n, form)
            | Instruction::Integer2(n, form)
            | Instruction::Integer3(n, form)
            | Instruction::Integer4(n, form) => {
                form.emit(out, bits, pick(INTEGER, n), false);
            }
            Instruction::Lock(n, form) => form.emit(out, bits, pick(LOCKED, n), true),
            Instruction::System(n, form) | Instruction::System2(n, form) => {
                form.emit(out, bits, pick(SYSTEM, n), false);
            }
            Instruction::Far(n, form) => form.emit(out, bits, pick(FAR, n), false),
            Instruction::String(n, form) => form.emit(out, bits, pick(STRING, n), false),
            Instruction::X87(n, form) => form.emit(out, bits, 0xd8 | u16::from(n & 7), false),
            Instruction::Simd(n, form) => {
                let opcode = match n {
                    0..0x30 => 0x110 + u16::from(n % 0x20),
                    0x30..0x70 => 0x150 + u16::from(n % 0x30),
                    _ => 0x1c0 + u16::from(n % 0x40),
                };
                form.emit(out, bits, opcode, false);
            }
            Instruction::Simd2(n, form) => {
                form.emit(out, bits, 0x200 + (u16::from(n >> 7) << 8) + u16::from(n & 0x7f), false);
            }
            Instruction::Load(register, value) | Instruction::Load2(register, value) => {
                // The stack pointer less often than others.
                let register = if register & 0x38 != 0 && register & 7 == 4 { 0 } else { register };
                self.load(register, value.get());
            }
            Instruction::Msr { index, value, read } => {
                let value = value.get();
                self.load(1, index.get().into());
                self.load(0, value & 0xffff_ffff);
                self.load(2, value >> 32);
                self.bytes.extend([0x0f, if read { 0x32 } else { 0x30 }]);
            }
            Instruction::Control { register, flip, value } => {
                let register = [0, 0, 3, 4, 4, 8, 2, 3][usize::from(register & 7)];
                // CR8 takes a prefix.
                let prefix: &[u8] = if register == 8 && bits == 64 { &[0x44] } else { &[] };
                let modrm = 0xc0 | (register & 7) << 3;
                match value {
                    Some(value) => self.load(0, value.get()),
                    None => {
                        out.extend(prefix);
                        out.extend([0x0f, 0x20, modrm]);
                        // XOR EAX with one or two bits.
                        let flip = 1 << (flip & 31) | 1 << (flip >> 8 & 31);
                        if bits == 16 {
                            out.push(0x66);
                        }
                        out.push(0x35);
                        out.extend(u32::to_le_bytes(flip));
                    }
                }
                self.bytes.extend(prefix);
                self.bytes.extend([0x0f, 0x22, modrm]);
            }
            Instruction::Debug { register, value } => {
                let modrm = 0xc0 | (register & 7) << 3;
                // What DR6 and DR7 cannot hold faults.
                let mask = if register & 7 >= 4 { 0xffff_ffff } else { u64::MAX };
                self.load(0, value.get() & mask);
                self.bytes.extend([0x0f, 0x23, modrm]);
            }
            Instruction::Store { address, value } => {
                self.load(3, address.get());
                self.wide(&[0xc7, 0x03]);
                self.bytes.extend(value.to_le_bytes());
            }
            Instruction::Patch { offset, value } => {
                self.load(3, code_at(offset));
                self.wide(&[0xc7, 0x03]);
                self.bytes.extend(value.to_le_bytes());
            }
            Instruction::Jump(offset) => {
                self.load(0, code_at(offset));
                self.bytes.extend([0xff, 0xe0]);
            }
            Instruction::Again(back) => {
                let place = self.starts.len().saturating_sub(usize::from(back >> 1) % 16 + 1);
                let distance = self.starts[place] as i64 - (self.bytes.len() as i64 + 2);
                let opcode = if back & 1 == 0 { 0xe2 } else { 0x75 };
                self.bytes.extend([opcode, i8::try_from(distance).unwrap_or(-2).cast_unsigned()]);
            }
            Instruction::Iret { cs, ss, flags, offset } => {
                let selector = |n: u8| u32::from(SELECTORS[usize::from(n) % SELECTORS.len()]);
                self.push(selector(ss));
                self.push(layout::STACK as u32);
                self.push(flags & 0x3_ffff);
                self.push(selector(cs));
                self.push(code_at(offset) as u32);
                if bits == 64 {
                    self.bytes.push(0x48);
                }
                self.bytes.push(0xcf);
            }
            Instruction::FarJump { selector, offset } => {
                // By RETF, which all widths have.
                self.push(u32::from(SELECTORS[usize::from(selector) % SELECTORS.len()]));
                self.push(code_at(offset) as u32);
                if bits == 64 {
                    self.bytes.push(0x48);
                }
                self.bytes.push(0xcb);
            }
            Instruction::Selector { register, selector } => {
                self.load(0, SELECTORS[usize::from(selector) % SELECTORS.len()].into());
                match register & 15 {
                    8 => self.bytes.extend([0x0f, 0x00, 0xd0]),
                    9 => self.bytes.extend([0x0f, 0x00, 0xd8]),
                    10 => self.bytes.extend([0x0f, 0x02, 0xd0]),
                    11 => self.bytes.extend([0x0f, 0x03, 0xd0]),
                    12 => self.bytes.extend([0x0f, 0x00, 0xe0]),
                    13 => self.bytes.extend([0x0f, 0x00, 0xe8]),
                    register => self.bytes.extend([0x8e, 0xc0 | (register & 7) << 3]),
                }
            }
            Instruction::Interrupt(vector) => out.extend([0xcd, vector]),
            Instruction::Repeat { operation, count, source, destination, backward } => {
                self.load(1, count.get());
                self.load(6, source.get());
                self.load(7, destination.get());
                self.bytes.push(if backward { 0xfd } else { 0xfc });
                self.bytes.push(if operation & 0x80 != 0 { 0xf2 } else { 0xf3 });
                if bits == 64 && operation & 0x40 != 0 {
                    self.bytes.push(0x48);
                }
                if bits == 16 && operation & 0x40 != 0 {
                    self.bytes.push(0x67);
                }
                self.bytes.push(STRING_OPCODES[usize::from(operation & 0x3f) % STRING_OPCODES.len()]);
            }
            Instruction::Port { port, form } => {
                self.load(2, port.into());
                if form & 8 != 0 {
                    self.bytes.push(0x66);
                }
                self.bytes.push([0xec, 0xed, 0xee, 0xef][usize::from(form & 3)]);
            }
            Instruction::Apic { register, value, read } => {
                self.load(3, layout::APIC + u64::from(register & 0x3f) * 16);
                if read {
                    self.wide(&[0x8b, 0x03]);
                } else {
                    self.wide(&[0xc7, 0x03]);
                    self.bytes.extend(value.to_le_bytes());
                }
            }
            Instruction::Invalidate(value) => {
                self.load(3, value.get());
                self.wide(&[0x0f, 0x01, 0x3b]);
            }
            Instruction::Hypercall(nr) => {
                self.load(0, u64::from(nr & 7));
                self.bytes.extend([0x0f, 0x01, if nr & 8 == 0 { 0xc1 } else { 0xd9 }]);
            }
            Instruction::Enable => out.push(0xfb),
            Instruction::Halt => out.push(0xf4),
            Instruction::EndOfPage(before) => {
                let end = out.len().next_multiple_of(4096);
                let target = end.saturating_sub(usize::from(before & 15));
                if target > out.len() + 5 && target < usize::from(layout::CODE_SIZE) - 64 {
                    // A near JMP over the padding.
                    let distance = target - out.len() - if bits == 16 { 3 } else { 5 };
                    out.push(0xe9);
                    let bytes = (distance as u32).to_le_bytes();
                    out.extend(if bits == 16 { &bytes[..2] } else { &bytes[..] });
                    out.resize(target, 0x90);
                }
            }
        }
    }
}
