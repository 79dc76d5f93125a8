//! Every x87 instruction against the host's: the same state, operand and control word, awkward and
//! random, exceptions masked and unmasked. The whole state afterwards has to agree.
#![allow(clippy::cast_possible_truncation, reason = "random bits are cut to size")]
#![allow(unsafe_code, reason = "the host's own instructions are what is compared with")]

use std::arch::asm;

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, MemorySize, Mnemonic};

use super::super::float::tests::Random;
use super::f80::F80;
use super::image::Layout;
use super::state::{C0, C1, C2, C3};
use super::tests::Machine;
use super::*;

type Native = fn(&mut [u8; 108], &mut Machine);

/// Runs the instruction `A B`, preceded by an operand size prefix where `A16` is set. A memory operand is
/// at RSI.
fn native<const A16: bool, const A: u8, const B: u8>(image: &mut [u8; 108], machine: &mut Machine) {
    let (mut ax, mut flags) = (u64::from(machine.ax), machine.flags);
    // SAFETY: only x87 instructions come here. They access at most 108 bytes at RSI, which `memory` has;
    // FRSTOR and FNSAVE access the image. FNSAVE leaves the unit as compiled code expects it, and an
    // exception the instruction leaves pending is gone before any instruction looks.
    unsafe {
        asm!(
            "push {flags}",
            "popfq",
            "frstor [rdi]",
            ".if {a16}",
            ".byte 0x66",
            ".endif",
            ".byte {a}, {b}",
            "fnsave [rdi]",
            "pushfq",
            "pop {flags}",
            a16 = const A16 as u8,
            a = const A,
            b = const B,
            flags = inout(reg) flags,
            in("rdi") image.as_mut_ptr(),
            in("rsi") machine.memory.as_mut_ptr(),
            inout("rax") ax,
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
        );
    }
    machine.ax = (ax & 0xffff) as u16;
    machine.flags = flags & 0x45;
}

struct Case {
    instruction: Instruction,
    native: Native,
}

fn case(a16: bool, a: u8, b: u8, native: Native) -> Option<Case> {
    let bytes = [0x66, a, b];
    let bytes = if a16 { &bytes[..] } else { &bytes[1..] };
    let instruction = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
    // FRSTPM is for the 287 XL; later processors differ in what they make of it.
    let known = !instruction.is_invalid() && instruction.code() != Code::Frstpm;
    known.then_some(Case { instruction, native })
}

macro_rules! forms {
    ($cases:ident, $($a:literal)*) => { $(forms!(@row $cases, $a,
        0x06 0x0e 0x16 0x1e 0x26 0x2e 0x36 0x3e
        0xc0 0xc1 0xc2 0xc3 0xc4 0xc5 0xc6 0xc7 0xc8 0xc9 0xca 0xcb 0xcc 0xcd 0xce 0xcf
        0xd0 0xd1 0xd2 0xd3 0xd4 0xd5 0xd6 0xd7 0xd8 0xd9 0xda 0xdb 0xdc 0xdd 0xde 0xdf
        0xe0 0xe1 0xe2 0xe3 0xe4 0xe5 0xe6 0xe7 0xe8 0xe9 0xea 0xeb 0xec 0xed 0xee 0xef
        0xf0 0xf1 0xf2 0xf3 0xf4 0xf5 0xf6 0xf7 0xf8 0xf9 0xfa 0xfb 0xfc 0xfd 0xfe 0xff
    );)* };
    (@row $cases:ident, $a:literal, $($b:literal)*) => {
        $($cases.extend(case(false, $a, $b, native::<false, $a, $b>));)*
    };
}

/// Every instruction there is.
fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    forms!(cases, 0xd8 0xd9 0xda 0xdb 0xdc 0xdd 0xde 0xdf);
    cases.extend(case(true, 0xd9, 0x26, native::<true, 0xd9, 0x26>));
    cases.extend(case(true, 0xd9, 0x36, native::<true, 0xd9, 0x36>));
    cases.extend(case(true, 0xdd, 0x26, native::<true, 0xdd, 0x26>));
    cases.extend(case(true, 0xdd, 0x36, native::<true, 0xdd, 0x36>));
    cases
}

const fn f80(sign_exponent: u16, significand: u64) -> F80 {
    F80 { significand, sign_exponent }
}

const REGISTERS: [F80; 40] = [
    f80(0, 0),
    f80(0, 1),
    f80(0, 0x7fff_ffff_ffff_ffff),
    f80(0, 0x4000_0000_0000_0000),
    f80(0, 0x8000_0000_0000_0000), // pseudo-denormal
    f80(0, 0xc000_0000_0000_0001),
    f80(1, 0x8000_0000_0000_0000), // smallest normal
    f80(1, 0xffff_ffff_ffff_ffff),
    f80(2, 0x8000_0000_0000_0001),
    f80(0x2000, 0x8000_0000_0000_0001), // products of these are tiny
    f80(0x1fff, 0xffff_ffff_ffff_ffff),
    f80(0x3fff, 0x8000_0000_0000_0000), // 1
    f80(0x3fff, 0x8000_0000_0000_0001),
    f80(0x3ffe, 0xffff_ffff_ffff_ffff),
    f80(0x3ffe, 0x8000_0000_0000_0000), // 0.5
    f80(0x3fff, 0xc000_0000_0000_0000), // 1.5
    f80(0x4000, 0xa000_0000_0000_0000), // 2.5
    f80(0x400d, 0xffff_0000_0000_0000), // 32767.5
    f80(0x400e, 0x8000_0000_0000_0000), // 32768
    f80(0x401e, 0x8000_0000_0000_0000), // 2^31
    f80(0x401d, 0xffff_ffff_0000_0000),
    f80(0x403e, 0x8000_0000_0000_0000), // 2^63
    f80(0x403d, 0xffff_ffff_ffff_ffff),
    f80(0x403a, 0xde0b_6b3a_763f_fff0), // 10^18 - 1
    f80(0x403a, 0xde0b_6b3a_7640_0000), // 10^18
    f80(0x403a, 0xde0b_6b3a_763f_fff8), // 10^18 - 0.5
    f80(0x3f81, 0x8000_0000_0000_0000), // smallest normal single
    f80(0x3f80, 0xffff_ffff_ffff_ffff),
    f80(0x407e, 0xffff_ff7f_ffff_ffff), // rounds to the largest single
    f80(0x3c01, 0x8000_0000_0000_0000), // smallest normal double
    f80(0x43fe, 0xffff_ffff_ffff_fc00),
    f80(0x7ffe, 0xffff_ffff_ffff_ffff), // largest
    f80(0x7fff, 0x8000_0000_0000_0000), // infinity
    f80(0x7fff, 0xc000_0000_0000_0000), // quiet NaN
    f80(0x7fff, 0xd234_5678_9abc_def0),
    f80(0x7fff, 0x8000_0000_0000_0001), // signalling NaN
    f80(0x7fff, 0xa234_5678_9abc_def0),
    f80(0x7fff, 0x4000_0000_0000_0000), // pseudo-NaN
    f80(0x7fff, 0),                     // pseudo-infinity
    f80(0x4000, 0x7000_0000_0000_0000), // unnormal
];

fn register(random: &mut Random) -> F80 {
    let bits = random.next();
    let sign = (bits & 0x8000) as u16;
    match bits >> 32 & 7 {
        0 | 1 => {
            let exponent = 0x3ff0 + (bits >> 20 & 0x1f) as u16;
            f80(sign | exponent, random.next() | 1 << 63)
        }
        2 => f80(sign | (bits >> 20 & 0x7fff) as u16, random.next() | 1 << 63),
        // Few significant bits: exact results.
        3 => f80(sign | (0x3fe0 + (bits >> 20 & 0x3f) as u16), random.next() << 52 | 1 << 63),
        _ => {
            let value = random.pick(&REGISTERS);
            f80(value.sign_exponent | sign, value.significand)
        }
    }
}

fn memory(random: &mut Random) -> [u8; 128] {
    let mut memory = [0; 128];
    for chunk in memory.chunks_mut(8) {
        chunk.copy_from_slice(&random.next().to_le_bytes());
    }
    match random.next() % 6 {
        0 => memory[..10].copy_from_slice(&register(random).to_bytes()),
        1 => {
            let singles = [
                0u32, 1, 0x7fffff, 0x800000, 0x3f800000, 0x7f7fffff, 0x7f800000, 0x7fc00001, 0x7f800001,
                0x7fa12345,
            ];
            let sign = (random.next() & 0x8000_0000) as u32;
            memory[..4].copy_from_slice(&(random.pick(&singles) | sign).to_le_bytes());
        }
        2 => {
            let doubles = [
                0u64,
                1,
                0xf_ffff_ffff_ffff,
                1 << 52,
                0x3ff0 << 48,
                0x7fef_ffff_ffff_ffff,
                0x7ff0 << 48,
                0x7ff8_0000_0000_0001,
                0x7ff0_0000_0000_0001,
            ];
            memory[..8].copy_from_slice(&(random.pick(&doubles) | random.next() & 1 << 63).to_le_bytes());
        }
        3 => memory[..8]
            .copy_from_slice(&random.pick(&[0u64, 1, u64::MAX, 1 << 63, 0x8000_0000, 0x8000]).to_le_bytes()),
        4 => {
            for byte in &mut memory[..10] {
                *byte = (random.next() % 10 * 16 + random.next() % 10) as u8;
            }
        }
        _ => {}
    }
    memory
}

fn state(random: &mut Random) -> X87State {
    let mut state = X87State::default();
    let bits = random.next();
    let masks = if bits & 1 == 0 { 0x3f } else { bits >> 8 & 0x3f };
    let control = (bits >> 16 & 0x0f00 | masks) as u16;
    state.set_control(control);
    let flags = if bits & 2 == 0 { bits >> 32 & 0x7f & (masks | 0x40) } else { 0 };
    state.set_status((bits >> 40 & 0x7f00 | flags) as u16);
    state.set_tags(match bits >> 2 & 3 {
        0 | 1 => 0xff,
        // Room above the top.
        2 => !(1 << (state.top().wrapping_sub(1) & 7)),
        _ => random.next() as u8,
    });
    for value in &mut state.registers {
        *value = register(random);
    }
    state
}

fn to_image(state: &X87State) -> [u8; 108] {
    let mut image = [0; 108];
    state.write_environment(&mut image, Layout::Protected32);
    state.write_stack(&mut image[28..]);
    image
}

fn from_image(image: &[u8; 108]) -> X87State {
    let mut state = X87State::default();
    state.read_environment(image, Layout::Protected32);
    state.read_stack(&image[28..]);
    state
}

/// Clears what does not compare: the pointers, which an instruction here and there does not share.
fn without_pointers(state: X87State) -> X87State {
    X87State {
        instruction_pointer: 0,
        data_pointer: 0,
        code_selector: 0,
        data_selector: 0,
        opcode: 0,
        ..state
    }
}

/// Condition codes on which processors differ: the architecture leaves them open, or only one vendor
/// defines them.
fn undefined_conditions(mnemonic: Mnemonic, after: &X87State) -> u16 {
    match mnemonic {
        Mnemonic::Ffree | Mnemonic::Ffreep => C1,
        Mnemonic::Fcomi | Mnemonic::Fcomip | Mnemonic::Fucomi | Mnemonic::Fucomip => C1,
        Mnemonic::Fcom
        | Mnemonic::Fcomp
        | Mnemonic::Fcompp
        | Mnemonic::Fucom
        | Mnemonic::Fucomp
        | Mnemonic::Fucompp
        | Mnemonic::Ficom
        | Mnemonic::Ficomp
        | Mnemonic::Ftst
            if after.is_pending() =>
        {
            C0 | C2 | C3
        }
        _ => 0,
    }
}

/// The pointers in a stored environment.
fn hide_pointers(mnemonic: Mnemonic, wide: bool, memory: &mut [u8; 128]) {
    if matches!(mnemonic, Mnemonic::Fnstenv | Mnemonic::Fnsave) {
        memory[if wide { 12..28 } else { 6..14 }].fill(0);
    }
}

const TRANSCENDENTAL: [Mnemonic; 8] = [
    Mnemonic::F2xm1,
    Mnemonic::Fyl2x,
    Mnemonic::Fyl2xp1,
    Mnemonic::Fptan,
    Mnemonic::Fpatan,
    Mnemonic::Fsin,
    Mnemonic::Fcos,
    Mnemonic::Fsincos,
];

fn against_host(rounds: u32, seed: u64) {
    let mut random = Random(seed);
    for case in cases() {
        let mnemonic = case.instruction.mnemonic();
        if cfg!(vmm_portable) && TRANSCENDENTAL.contains(&mnemonic) {
            // Close to the host's only.
            continue;
        }
        let wide = !matches!(case.instruction.memory_size(), MemorySize::FpuEnv14 | MemorySize::FpuState94);
        for _ in 0..rounds {
            let before = state(&mut random);
            let machine = Machine {
                memory: memory(&mut random),
                ax: random.next() as u16,
                flags: random.next() & 0x45,
            };
            let (mut expected_machine, mut image) = (machine.clone(), to_image(&before));
            (case.native)(&mut image, &mut expected_machine);
            let mut expected = without_pointers(from_image(&image));
            let (mut after, mut after_machine) = (before, machine.clone());
            execute(&mut after, &case.instruction, &X87Context::default(), &mut after_machine)
                .expect("nothing is pending, memory is there");
            after = without_pointers(after);
            let undefined = undefined_conditions(mnemonic, &after);
            after.set_condition(undefined, 0);
            expected.set_condition(undefined, 0);
            if undefined != 0 && after.is_pending() {
                // Likewise in RFLAGS.
                (after_machine.flags, expected_machine.flags) = (0, 0);
            }
            hide_pointers(mnemonic, wide, &mut expected_machine.memory);
            hide_pointers(mnemonic, wide, &mut after_machine.memory);
            assert!(
                after == expected && after_machine == expected_machine,
                "{:?} {:?}\n{machine:x?}\nbefore   {}\nafter    {}\nexpected {}\n{after_machine:x?}\n{expected_machine:x?}",
                case.instruction.code(),
                case.instruction.op0_register(),
                show(&before),
                show(&after),
                show(&expected),
            );
        }
    }
}

fn show(state: &X87State) -> String {
    let stack = (0..8).map(|st| {
        let (value, mark) = (state.st(st), if state.is_empty(st) { "-" } else { "" });
        format!(" {mark}{:04x}:{:016x}", value.sign_exponent, value.significand)
    });
    format!("cw {:04x} sw {:04x}{}", state.control(), state.status(), stack.collect::<String>())
}

#[test]
fn instructions() {
    against_host(500, 0x0123_4567_89ab_cdef);
}

#[test]
#[ignore = "a minute"]
fn many_instructions() {
    against_host(30_000, 0xfeed_0123_4567_89ab);
}

/// Equal, or finite and within 2^-50 of each other.
fn close(a: F80, b: F80) -> bool {
    const UNITS: u64 = 1 << 14;
    if a == b || a.is_nan() || a.sign() != b.sign() {
        return a == b;
    }
    let key = |a: F80| u128::from(a.exponent_field()) << 63 | u128::from(a.significand & !(1 << 63));
    let denormals = a.exponent_field() == 0 && b.exponent_field() == 0;
    denormals && a.significand.abs_diff(b.significand) < UNITS || key(a).abs_diff(key(b)) < u128::from(UNITS)
}

/// Operands for which the architecture does not say what the result is.
fn is_open(mnemonic: Mnemonic, x: F80) -> bool {
    let limit = match mnemonic {
        Mnemonic::F2xm1 => 0x3fff,
        Mnemonic::Fyl2xp1 => 0x3ffd,
        _ => return false,
    };
    (limit..0x7fff).contains(&x.exponent_field())
}

#[test]
fn portable_transcendentals_are_close() {
    // Whether a result was exact, and how it was rounded, is not for double precision to know.
    let open = 0x30 | C1 | 0x8080;
    let mut random = Random(0x5555_1234);
    for mnemonic in TRANSCENDENTAL {
        for _ in 0..10_000 {
            let mut before = state(&mut random);
            before.set_control(before.control() | 0x30);
            if is_open(mnemonic, before.st(0)) {
                continue;
            }
            let (mut expected, mut after) = (before, before);
            super::host::transcendental(&mut expected, mnemonic);
            super::transcendental::transcendental(&mut after, mnemonic);
            assert!(
                (expected.status() ^ after.status()) & !open == 0
                    && expected.tags() == after.tags()
                    && (0..8).all(|st| close(expected.st(st), after.st(st))),
                "{mnemonic:?}\nbefore   {}\nafter    {}\nexpected {}",
                show(&before),
                show(&after),
                show(&expected),
            );
        }
    }
}

/// FXSAVE images against the host's.
#[test]
fn fxsave_image() {
    #[repr(align(16))]
    struct Area([u8; 512]);

    let mut random = Random(0xf5a7e);
    for _ in 0..500 {
        let before = state(&mut random);
        let (mut image, mut area) = (to_image(&before), Area([0; 512]));
        // SAFETY: FRSTOR reads the image and FXSAVE writes the area, which is 512 bytes at a multiple of
        // 16. FNINIT leaves the unit as compiled code expects it.
        unsafe {
            asm!(
                "frstor [{image}]",
                "fxsave64 [{area}]",
                "fninit",
                image = in(reg) image.as_mut_ptr(),
                area = in(reg) area.0.as_mut_ptr(),
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                options(nostack),
            );
        }
        let mut ours = [0u8; FXSAVE_X87_BYTES];
        before.to_fxsave(&mut ours, PointerFormat::Offsets);
        let hide = |image: &[u8]| [&image[..6], &image[32..160]].concat();
        assert_eq!(hide(&ours), hide(&area.0));
        assert_eq!(X87State::from_fxsave(&ours, PointerFormat::Offsets), before);
    }
}
