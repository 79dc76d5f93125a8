//! What needs no x86-64 host to compare with: pending exceptions, memory that faults, pointers, images, MMX.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Mnemonic};

use super::f80::F80;
use super::*;

/// A memory operand, AX and RFLAGS: what an instruction sees and changes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Machine {
    pub(super) memory: [u8; 128],
    pub(super) ax: u16,
    pub(super) flags: u64,
}

impl X87Machine for Machine {
    type Stop = ();

    fn read(&mut self, buffer: &mut [u8]) -> Result<(), ()> {
        buffer.copy_from_slice(&self.memory[..buffer.len()]);
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), ()> {
        self.memory[..bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn set_ax(&mut self, value: u16) {
        self.ax = value;
    }

    fn set_compare_flags(&mut self, zf: bool, pf: bool, cf: bool) {
        self.flags = u64::from(zf) << 6 | u64::from(pf) << 2 | u64::from(cf);
    }

    fn flags(&self) -> u64 {
        self.flags
    }
}

/// Memory that is not there.
struct Absent;

impl X87Machine for Absent {
    type Stop = &'static str;

    fn read(&mut self, _: &mut [u8]) -> Result<(), &'static str> {
        Err("read")
    }

    fn write(&mut self, _: &[u8]) -> Result<(), &'static str> {
        Err("write")
    }

    fn set_ax(&mut self, _: u16) {}

    fn set_compare_flags(&mut self, _: bool, _: bool, _: bool) {}

    fn flags(&self) -> u64 {
        0
    }
}

fn decode(bytes: &[u8]) -> Instruction {
    Decoder::new(64, bytes, DecoderOptions::NONE).decode()
}

fn machine() -> Machine {
    Machine { memory: [0; 128], ax: 0, flags: 0 }
}

const CONTEXT: X87Context = X87Context {
    instruction_pointer: 0x1234_5678_9abc,
    code_selector: 0x10,
    data_pointer: 0xfedc_ba98_7654,
    data_selector: 0x18,
    opcode: 0x5aa,
    real_mode: false,
};

fn step(state: &mut X87State, machine: &mut Machine, bytes: &[u8]) -> Result<(), X87Stop<()>> {
    execute(state, &decode(bytes), &CONTEXT, machine)
}

#[test]
fn pending_exception_stops_what_waits() {
    let (mut state, mut machine) = (X87State::default(), machine());
    state.set_control(0x037b);
    // FLD1, FLDZ, FDIVP: the division by zero is not masked, and its operands stay.
    for bytes in [[0xd9, 0xe8], [0xd9, 0xee], [0xde, 0xf9]] {
        assert_eq!(step(&mut state, &mut machine, &bytes), Ok(()));
    }
    assert!(state.is_pending());
    assert_eq!((state.st(0), state.st(1)), (F80::zero(false), F80::ONE));
    let before = state;
    assert_eq!(step(&mut state, &mut machine, &[0xd9, 0xe8]), Err(X87Stop::Pending));
    assert_eq!(step(&mut state, &mut machine, &[0xd9, 0x28]), Err(X87Stop::Pending), "FLDCW waits");
    assert_eq!(step(&mut state, &mut machine, &[0xdf, 0xe0]), Ok(()), "FNSTSW does not");
    assert_eq!(state, before);
    assert_eq!(machine.ax, 0xb084);
    assert_eq!(step(&mut state, &mut machine, &[0xdb, 0xe2]), Ok(()), "nor does FNCLEX");
    assert!(!state.is_pending());
    // A flag that is set becomes pending when FLDCW unmasks it, and not before.
    state.set_control(0x037f);
    state.set_status(0x0004);
    assert!(!state.is_pending());
    machine.memory[..2].copy_from_slice(&0x037b_u16.to_le_bytes());
    assert_eq!(step(&mut state, &mut machine, &[0xd9, 0x28]), Ok(()));
    assert!(state.is_pending());
}

#[test]
fn absent_memory_changes_nothing() {
    let mut stopped = 0;
    for (a, modrm, full) in (0xd8..=0xdf)
        .flat_map(|a| (0..8).map(move |reg| (a, reg << 3)))
        .flat_map(|(a, m)| [(a, m, false), (a, m, true)])
    {
        let instruction = decode(&[a, modrm]);
        if instruction.is_invalid() {
            continue;
        }
        let mut state = X87State::default();
        state.set_tags(if full { 0xff } else { 0 });
        let before = state;
        let outcome = execute(&mut state, &instruction, &CONTEXT, &mut Absent);
        assert!(matches!(outcome, Err(X87Stop::Machine(_))), "{:?}: {outcome:?}", instruction.code());
        assert_eq!(state, before, "{:?}", instruction.code());
        stopped += 1;
    }
    assert_eq!(stopped, 2 * 60);
}

#[test]
fn pointers_follow_all_but_control_instructions() {
    let (mut state, mut machine) = (X87State::default(), machine());
    assert_eq!(step(&mut state, &mut machine, &[0xd9, 0x28]), Ok(()), "FLDCW");
    assert_eq!((state.instruction_pointer, state.data_pointer, state.opcode), (0, 0, 0));
    state.set_control(0x037f);
    assert_eq!(step(&mut state, &mut machine, &[0xd9, 0xe8]), Ok(()), "FLD1");
    assert_eq!((state.instruction_pointer, state.code_selector), (CONTEXT.instruction_pointer, 0x10));
    assert_eq!((state.data_pointer, state.data_selector, state.opcode), (0, 0, 0x5aa));
    assert_eq!(step(&mut state, &mut machine, &[0xd9, 0x00]), Ok(()), "FLD m32");
    assert_eq!((state.data_pointer, state.data_selector), (CONTEXT.data_pointer, 0x18));
    assert_eq!(step(&mut state, &mut machine, &[0xdb, 0xe3]), Ok(()), "FNINIT");
    assert_eq!((state.instruction_pointer, state.data_pointer, state.opcode), (0, 0, 0));
}

#[test]
fn other_instructions_are_invalid() {
    let (mut state, mut machine) = (X87State::default(), machine());
    for bytes in [&[0x90][..], &[0x0f, 0x58, 0xc1], &[0x9b], &[0x0f, 0xae, 0x00]] {
        assert_eq!(step(&mut state, &mut machine, bytes), Err(X87Stop::Invalid), "{bytes:x?}");
    }
    let mut frstpm = Instruction::default();
    frstpm.set_code(Code::Frstpm);
    assert_eq!(frstpm.mnemonic(), Mnemonic::Frstpm);
    assert_eq!(execute(&mut state, &frstpm, &CONTEXT, &mut machine), Err(X87Stop::Invalid));
    assert_eq!(state, X87State::default());
}

fn awkward() -> X87State {
    let mut state = X87State::default();
    state.set_control(0x0c72);
    state.set_status(0x6900 | 0x20);
    state.set_tags(0b1011_0101);
    for (value, i) in state.registers.iter_mut().zip(1u16..) {
        *value = F80 { significand: u64::from(i) << 63 | u64::from(i), sign_exponent: 0x3ff0 | i };
    }
    state.instruction_pointer = 0x8_7654;
    state.code_selector = 0x1234;
    state.data_pointer = 0xa_bcde;
    state.data_selector = 0x4321;
    state.opcode = 0x345;
    state
}

/// FNSAVE and FRSTOR in every layout.
#[test]
fn environments() {
    let word =
        |machine: &Machine, at: usize| u16::from_le_bytes([machine.memory[at], machine.memory[at + 1]]);
    for (wide, real_mode) in [(true, false), (true, true), (false, false), (false, true)] {
        let context = X87Context { real_mode, ..CONTEXT };
        let form = |a, modrm| decode(&[&[0x66][..usize::from(!wide)], &[a, modrm]].concat());
        let (mut state, mut machine) = (awkward(), machine());
        if wide {
            state.instruction_pointer |= 0x1230_0000;
        }
        let before = state;
        assert_eq!(execute(&mut state, &form(0xdd, 0x30), &context, &mut machine), Ok(()));
        let initialized = X87State { registers: before.registers, ..X87State::default() };
        assert_eq!(state, initialized);
        let step = if wide { 4 } else { 2 };
        let words: [u16; 7] = std::array::from_fn(|i| word(&machine, i * step));
        assert_eq!(words[..2], [before.control(), before.status()]);
        // R0, R2, R4 hold normal numbers; the integer bit of R5 and R7 is clear.
        assert_eq!(words[2], 0b10_11_10_00_11_00_11_00);
        match (wide, real_mode) {
            (_, false) => assert_eq!(words[3..], [0x7654, 0x1234, 0xbcde, 0x4321]),
            // Linear addresses: 0x12340 + 0x87654 and 0x43210 + 0xabcde.
            (false, true) => assert_eq!(words[3..], [0x9994, 0x9345, 0xeeee, 0xe000]),
            (true, true) => {
                assert_eq!(words[3..], [0x9994, 0x9345, 0xeeee, 0xe000]);
                assert_eq!(word(&machine, 18), 0x0123);
            }
        }
        if wide && !real_mode {
            assert_eq!((word(&machine, 14), word(&machine, 18), word(&machine, 22)), (0x1238, 0x345, 10));
        }
        assert_eq!(execute(&mut state, &form(0xdd, 0x20), &context, &mut machine), Ok(()));
        let mut expected = before;
        match (wide, real_mode) {
            (true, false) => {}
            (false, false) => {
                (expected.instruction_pointer, expected.data_pointer) = (0x7654, 0xbcde);
                expected.opcode = 0;
            }
            (_, true) => {
                let high = if wide { 0x1230_0000 } else { 0 };
                (expected.instruction_pointer, expected.data_pointer) = (high | 0x9_9994, 0xe_eeee);
                (expected.code_selector, expected.data_selector) = (0, 0);
            }
        }
        assert_eq!(state, expected, "32-bit {wide}, real mode {real_mode}");
    }
}

#[test]
fn fxsave_image() {
    for format in [PointerFormat::Offsets, PointerFormat::Selectors] {
        let mut before = awkward();
        if format == PointerFormat::Offsets {
            (before.code_selector, before.data_selector) = (0, 0);
            before.instruction_pointer |= 0xffff_8000 << 32;
        }
        let mut image = [0xee; FXSAVE_X87_BYTES];
        before.to_fxsave(&mut image, format);
        assert_eq!(image[..6], [0x72, 0x0c, 0x20, 0x69, 0b1011_0101, 0]);
        assert_eq!(image[24..32], [0xee; 8], "MXCSR is not ours");
        // ST(0) is R5: TOP is 5.
        assert_eq!(image[32..42], before.registers[5].to_bytes());
        assert_eq!(X87State::from_fxsave(&image, format), before);
    }
}

#[test]
fn mmx_registers() {
    let mut state = awkward();
    assert_eq!(state.mm(2), state.registers[2].significand);
    state.enter_mmx();
    state.set_mm(2, 0x0123_4567_89ab_cdef);
    assert_eq!((state.top(), state.tags()), (0, 0xff));
    assert_eq!(state.st(2), F80 { significand: 0x0123_4567_89ab_cdef, sign_exponent: 0xffff });
    assert_eq!(state.mm(10), 0x0123_4567_89ab_cdef, "modulo 8");
    let mut state = awkward();
    assert_ne!(state.top(), 0);
    state.emms();
    assert_eq!((state.top(), state.tags()), (0, 0));
}
