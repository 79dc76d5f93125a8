use crate::translate::core::Reason;
use crate::translate::cpu::{RBX, RSP, cr0};
use crate::translate::exception::{Exception, vector};
use crate::translate::flags::bits;
use crate::translate::segment::index;
use crate::translate::test_support::*;
use crate::vcpu::Halt;

const IRETQ: [u8; 2] = [0x48, 0xcf];
/// CALL FAR [RBX] and JMP FAR [RBX]
const CALL_INDIRECT: [u8; 2] = [0xff, 0x1b];
const JMP_INDIRECT: [u8; 2] = [0xff, 0x2b];
const TARGET: u64 = 0x9000;

/// JMP FAR of 32-bit code.
fn jump(selector: u16, offset: u32) -> Vec<u8> {
    direct(0xea, selector, offset)
}

fn call(selector: u16, offset: u32) -> Vec<u8> {
    direct(0x9a, selector, offset)
}

fn direct(opcode: u8, selector: u16, offset: u32) -> Vec<u8> {
    let mut code = vec![opcode];
    code.extend(offset.to_le_bytes());
    code.extend(selector.to_le_bytes());
    code
}

/// Leaves a frame for IRETQ at the top of the stack.
fn frame(guest: &mut Guest, words: [u64; 5]) {
    for (slot, word) in words.into_iter().enumerate() {
        guest.write::<8>(STACK + slot as u64 * 8, word);
    }
}

fn selectors(guest: &Guest) -> (u16, u16) {
    (guest.core.cpu.cs().selector, guest.core.cpu.segment(index::SS).selector)
}

#[test]
fn iretq_to_user_drops_inner_segments() {
    let mut guest = Guest::long();
    guest.core.cpu.segment_mut(index::FS).selector = 0;
    guest.core.cpu.segment_mut(index::FS).attributes = 0;
    guest.core.cpu.segment_mut(index::FS).base = 0x7777;
    *guest.core.cpu.segment_mut(index::ES) = guest.segment(USER_DATA);
    guest.core.cpu.segment_mut(index::GS).base = 0x8888;
    guest.core.cpu.nmi_masked = true;
    frame(&mut guest, [TARGET, USER_CODE_64.into(), bits::IF | bits::RF | 2, 0x5555, USER_DATA.into()]);
    guest.execute(&IRETQ).unwrap();
    assert_eq!(selectors(&guest), (USER_CODE_64, USER_DATA));
    let cpu = &guest.core.cpu;
    assert_eq!((cpu.rip, cpu.r(RSP), cpu.flags.get()), (TARGET, 0x5555, bits::IF | bits::RF | 2));
    assert_eq!(cpu.segment(index::DS).selector, 0);
    assert_eq!(cpu.segment(index::ES).selector, USER_DATA);
    // What a model-specific register put there stays.
    assert_eq!(cpu.segment(index::FS).base, 0x7777);
    let gs = cpu.segment(index::GS);
    assert_eq!((gs.selector, gs.is_unusable(), gs.base), (0, true, 0x8888));
    assert!(!cpu.nmi_masked && guest.core.mode.cpl == 3);
}

#[test]
fn iretq_to_compatibility_mode_and_to_a_null_stack() {
    let mut guest = Guest::long();
    frame(&mut guest, [TARGET, USER_CODE_32.into(), 2, 0xffff_ffff_0000_7000, USER_DATA.into()]);
    guest.execute(&IRETQ).unwrap();
    assert_eq!((guest.core.mode.code_bits, guest.core.cpu.r(RSP)), (32, 0x7000));
    let mut guest = Guest::long();
    frame(&mut guest, [TARGET, CODE_64.into(), 2, 0x7001, 0]);
    guest.execute(&IRETQ).unwrap();
    assert_eq!((guest.core.mode.cpl, guest.core.cpu.r(RSP)), (0, 0x7001));
}

#[test]
fn iretq_faults_change_nothing() {
    let gp = |error| Exception::with_error(vector::GP, error);
    let (code, data) = (u64::from(USER_CODE_64), u64::from(USER_DATA));
    let cases = [
        ([0x8000_0000_0000, code, 2, 0, data], gp(0)),
        ([TARGET, 0, 2, 0, data], gp(0)),
        ([TARGET, code & !3, 2, 0, data], gp(USER_CODE_64 & !3)),
        ([TARGET, data, 2, 0, data], gp(USER_DATA & !3)),
        ([TARGET, code, 2, 0, 0], gp(0)),
        ([TARGET, code, 2, 0, DATA.into()], gp(DATA)),
        ([TARGET, code, 2, 0, code], gp(USER_CODE_64 & !3)),
    ];
    for (words, exception) in cases {
        let mut guest = Guest::long();
        let before = guest.core.cpu.segments;
        frame(&mut guest, words);
        assert_eq!(guest.fault(&IRETQ), exception, "{words:x?}");
        assert_eq!(
            (guest.core.cpu.segments, guest.core.cpu.r(RSP), guest.core.cpu.rip),
            (before, STACK, CODE)
        );
    }
    let mut guest = Guest::long();
    guest.core.cpu.flags.set(bits::NT);
    assert_eq!(guest.fault(&IRETQ), gp(0));
    let mut guest = Guest::long();
    guest.core.cpu.set_r(RSP, HOLE - 8);
    assert_eq!(guest.fault(&IRETQ).cr2, Some(HOLE + 8), "the flags come first");
}

#[test]
fn far_returns_look_at_the_selector_first() {
    let mut guest = Guest::long();
    guest.core.cpu.set_r(RSP, HOLE);
    assert_eq!(guest.fault(&[0x48, 0xcb]).cr2, Some(HOLE + 8));
    assert_eq!(guest.fault(&[0xcb]).cr2, Some(HOLE + 4));
}

#[test]
fn real_mode_call_and_return() {
    let mut guest = Guest::real();
    guest.execute(&[0x9a, 0x34, 0x12, 0x00, 0x20]).unwrap();
    assert_eq!(guest.words::<2, 2>(STACK - 6), [CODE + 5, 0]);
    assert_eq!((guest.core.cpu.cs().base, guest.core.cpu.rip), (0x2_0000, 0x1234));
    // RETF 4
    guest.execute(&[0xca, 4, 0]).unwrap();
    assert_eq!((guest.core.cpu.cs().base, guest.core.cpu.rip), (0, CODE + 5));
    // The stack pointer has 16 bits.
    assert_eq!(guest.core.cpu.r(RSP), 2);
}

#[test]
fn jumps_between_code_widths() {
    let mut guest = Guest::protected();
    guest.descriptor(FREE, 0x0000_9b00_0000_ffff);
    guest.execute(&jump(FREE, 0x9000)).unwrap();
    assert_eq!((guest.core.mode.code_bits, guest.core.cpu.rip), (16, 0x9000));
    let mut guest = Guest::long();
    guest.set_segments(CODE_32, DATA);
    guest.execute(&jump(CODE_64, 0x9000)).unwrap();
    assert_eq!((guest.core.mode.code_bits, guest.core.cpu.rip), (64, 0x9000));
    // Back with a far pointer in memory.
    guest.core.cpu.set_r(RBX, 0xa000);
    guest.write::<4>(0xa000, 0x8123);
    guest.write::<2>(0xa004, CODE_32.into());
    guest.execute(&JMP_INDIRECT).unwrap();
    assert_eq!((guest.core.mode.code_bits, guest.core.cpu.rip), (32, 0x8123));
}

#[test]
fn far_jumps_are_checked() {
    let mut guest = Guest::protected();
    let gp = |error| Exception::with_error(vector::GP, error);
    assert_eq!(guest.fault(&jump(0, 0)), gp(0));
    assert_eq!(guest.fault(&jump(DATA, 0)), gp(DATA));
    assert_eq!(guest.fault(&jump(USER_CODE_32, 0)), gp(USER_CODE_32 & !3));
    assert_eq!(guest.fault(&jump(CODE_32 | 1, 0)), gp(CODE_32));
    guest.descriptor(FREE, 0x0040_1b00_0000_ffff);
    assert_eq!(guest.fault(&jump(FREE, 0)), Exception::with_error(vector::NP, FREE));
    guest.descriptor(FREE, 0x0040_9b00_0000_ffff);
    assert_eq!(guest.fault(&jump(FREE, 0x1_0000)), gp(0));
    // Conforming code of level 0 runs at level 3.
    guest.descriptor(FREE, 0x00cf_9f00_0000_ffff);
    guest.set_segments(USER_CODE_32, USER_DATA);
    guest.execute(&jump(FREE, 0x9000)).unwrap();
    assert_eq!((guest.core.cpu.cs().selector, guest.core.mode.cpl), (FREE | 3, 3));
}

#[test]
fn call_gate_copies_parameters_and_return_drops_them() {
    let mut guest = Guest::protected();
    guest.descriptor(FREE, gate(CODE_32, TARGET, 0xec) | 2 << 32);
    guest.set_segments(USER_CODE_32, USER_DATA);
    guest.write::<4>(STACK, 0x1111);
    guest.write::<4>(STACK + 4, 0x2222);
    let code = call(FREE | 3, 0xdead_beef);
    guest.execute(&code).unwrap();
    assert_eq!(guest.core.cpu.r(RSP), INNER_STACK - 24);
    let next = CODE + code.len() as u64;
    let frame = [next, USER_CODE_32.into(), 0x1111, 0x2222, STACK, USER_DATA.into()];
    assert_eq!(guest.words::<4, 6>(INNER_STACK - 24), frame);
    assert_eq!((guest.core.cpu.rip, guest.core.mode.cpl), (TARGET, 0));
    *guest.core.cpu.segment_mut(index::GS) = guest.segment(DATA);
    // RETF 8
    guest.execute(&[0xca, 8, 0]).unwrap();
    assert_eq!(selectors(&guest), (USER_CODE_32, USER_DATA));
    assert_eq!((guest.core.cpu.rip, guest.core.cpu.r(RSP)), (next, STACK + 8));
    assert!(guest.core.cpu.segment(index::GS).is_unusable());
    // A jump may not go inward, and the gate has rights of its own.
    assert_eq!(guest.fault(&jump(FREE | 3, 0)), Exception::with_error(vector::GP, CODE_32));
    guest.descriptor(FREE, gate(CODE_32, TARGET, 0x8c));
    assert_eq!(guest.fault(&call(FREE, 0)), Exception::with_error(vector::GP, FREE));
}

#[test]
fn narrow_call_gate_of_the_same_level_pushes_words() {
    let mut guest = Guest::protected();
    guest.descriptor(FREE, gate(CODE_32, 0x5_9000, 0x84));
    guest.execute(&call(FREE, 0)).unwrap();
    assert_eq!(guest.core.cpu.r(RSP), STACK - 4);
    assert_eq!(guest.words::<2, 2>(STACK - 4), [CODE + 7, CODE_32.into()]);
    assert_eq!(guest.core.cpu.rip, 0x9000);
}

#[test]
fn long_mode_call_gate_switches_stacks() {
    let mut guest = Guest::long();
    guest.descriptor(FREE, gate(CODE_64, TARGET, 0xec));
    guest.descriptor(FREE + 8, 0xffff_8000);
    guest.set_segments(USER_CODE_64, USER_DATA);
    guest.core.cpu.set_r(RBX, 0xa000);
    guest.write::<4>(0xa000, 0);
    guest.write::<2>(0xa004, FREE.into());
    guest.execute(&CALL_INDIRECT).unwrap();
    assert_eq!(guest.core.cpu.r(RSP), INNER_STACK - 32);
    let frame = [CODE + 2, USER_CODE_64.into(), STACK, USER_DATA.into()];
    assert_eq!(guest.words::<8, 4>(INNER_STACK - 32), frame);
    assert_eq!((selectors(&guest), guest.core.cpu.rip), ((CODE_64, 0), 0xffff_8000_0000_9000));
    // RETFQ
    guest.execute(&[0x48, 0xcb]).unwrap();
    assert_eq!((selectors(&guest), guest.core.cpu.rip), ((USER_CODE_64, USER_DATA), CODE + 2));
    assert_eq!(guest.core.cpu.r(RSP), STACK);
    // The second half has a type of its own, which must be zero.
    guest.descriptor(FREE + 8, 0x0000_0100_ffff_8000);
    assert_eq!(guest.fault(&CALL_INDIRECT), Exception::with_error(vector::GP, FREE));
}

/// A 32-bit guest with a second TSS at 0x3800 of the given code segment.
fn two_tasks(code: u16) -> Guest {
    let mut guest = Guest::protected();
    guest.descriptor(FREE, 0x0000_8900_3800_0067);
    guest.write::<4>(0x3820, TARGET);
    guest.write::<4>(0x3824, 2);
    guest.write::<4>(0x3838, STACK - 0x100);
    for (slot, selector) in [DATA, code, DATA, DATA].into_iter().enumerate() {
        guest.write::<2>(0x3848 + slot as u64 * 4, selector.into());
    }
    guest
}

#[test]
fn jump_to_a_task_and_back() {
    let mut guest = two_tasks(CODE_32);
    guest.core.cpu.set_r(RBX, 0xb0b);
    guest.execute(&jump(FREE, 0)).unwrap();
    let cpu = &guest.core.cpu;
    assert_eq!((cpu.rip, cpu.r(RSP), cpu.r(RBX), cpu.tr.selector), (TARGET, STACK - 0x100, 0, FREE));
    assert!(cpu.cr0 & cr0::TS != 0 && !cpu.flags.control(bits::NT));
    assert_eq!(guest.read::<1>(GDT + u64::from(TASK) + 5), 0x89);
    guest.execute(&jump(TASK, 0)).unwrap();
    let cpu = &guest.core.cpu;
    assert_eq!((cpu.rip, cpu.r(RBX), cpu.tr.selector), (CODE + 7, 0xb0b, TASK));
    // A busy task cannot be entered.
    assert_eq!(guest.fault(&jump(TASK, 0)), Exception::with_error(vector::GP, TASK));
}

#[test]
fn what_is_wrong_with_a_task_is_its_own_exception() {
    let mut guest = two_tasks(0);
    guest.gate(vector::TS, CODE_32, 0xc000, 0x8e, 0);
    // There is no stack for the handler: the new one was not loaded.
    assert!(matches!(guest.execute(&call(FREE, 0)), Err(Reason::Halt(Halt::Shutdown))));
    assert_eq!(guest.core.cpu.tr.selector, FREE);
    // With the handler in a task, it arrives.
    let mut guest = two_tasks(0);
    let handler = FREE + 8;
    guest.descriptor(handler, 0x0000_8900_3900_0067);
    guest.write::<4>(0x3920, TARGET + 1);
    guest.write::<4>(0x3938, STACK - 0x200);
    for (slot, selector) in [DATA, CODE_32, DATA, DATA].into_iter().enumerate() {
        guest.write::<2>(0x3948 + slot as u64 * 4, selector.into());
    }
    guest.gate(vector::TS, handler, 0, 0x85, 0);
    guest.execute(&call(FREE, 0)).unwrap();
    assert_eq!((guest.core.cpu.rip, guest.core.cpu.tr.selector), (TARGET + 1, handler));
    assert_eq!(guest.read::<4>(STACK - 0x204), 0);
    assert_eq!(guest.read::<2>(0x3900), u64::from(FREE));
    assert_eq!(guest.read::<4>(0x3820), TARGET);
}
