use iced_x86::Code;

use super::*;
use crate::case::{CODE, DATA, STACK};
use crate::start;

/// A case of this code, with small numbers in its registers.
pub(crate) fn case(mode: Mode, code: &[u8]) -> Case {
    let mut general: [u64; 16] = std::array::from_fn(|index| index as u64);
    general[4] = STACK.start + 0x800;
    let mut fxsave = [0; 512];
    fxsave[..2].copy_from_slice(&0x37f_u16.to_le_bytes());
    fxsave[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
    let registers = Registers { general, rflags: 0, fs_base: 0, gs_base: 0, fxsave };
    let code = code.to_vec();
    let instructions = vec![(Code::INVALID, 0)];
    let mut case =
        Case { mode, instructions, code, address: CODE.start + 0x100, registers, memory: Vec::new() };
    start::normalize(&mut case);
    case
}

fn run(native: &mut Native, case: &Case) -> Outcome {
    let prepared = start::prepare(case).unwrap();
    native.start([&prepared]).unwrap();
    native.finish(&[(case, &prepared)]).unwrap().remove(0).unwrap()
}

#[test]
fn endings() {
    let mut native = Native::new().unwrap();
    let exception = |vector, error_code, address| Ending::Exception { vector, error_code, address };
    let long: &[(&[u8], Ending)] = &[
        (&[0x90], Ending::Completed),
        // INT3, INT1, UD2, HLT, INT 5, DIV EAX by zero in EAX.
        (&[0xcc], exception(3, 0, 0)),
        (&[0xf1], exception(1, 0, 0)),
        (&[0x0f, 0x0b], exception(6, 0, 0)),
        (&[0xf4], exception(13, 0, 0)),
        (&[0xcd, 0x05], exception(13, 0x2a, 0)),
        (&[0xf7, 0xf0], exception(0, 0, 0)),
        // SYSCALL, INT 80h, SYSENTER.
        (&[0x0f, 0x05], Ending::SystemCall),
        // MOV AL, [READ_ONLY + 5], then a store to it.
        (&[0x8a, 0x04, 0x25, 0x05, 0x00, 0x20, 0x10], Ending::Completed),
        (&[0x88, 0x04, 0x25, 0x05, 0x00, 0x20, 0x10], exception(14, 7, 0x1020_0005)),
        // JMP to itself.
        (&[0xeb, 0xfe], Ending::TimedOut),
    ];
    for (code, ending) in long {
        let outcome = run(&mut native, &case(Mode::Long, code));
        assert_eq!(outcome.ending, *ending, "{code:02x?}");
    }
    // INC EAX; then AAA, which 64-bit mode lacks.
    let outcome = run(&mut native, &case(Mode::Compatibility, &[0x40, 0x37]));
    assert_eq!((outcome.ending, outcome.registers.general[0]), (Ending::Completed, 1));
    assert_eq!(outcome.selectors, [0x2b, 0x23, 0x2b, 0x2b, 0x2b, 0x2b]);
}

#[test]
fn stores_are_seen_and_taken_back() {
    let mut native = Native::new().unwrap();
    // MOV [DATA + 9], AL.
    let mut storing = case(Mode::Long, &[0x88, 0x04, 0x25, 0x09, 0x00, 0x10, 0x10]);
    storing.registers.general[0] = 0x5a;
    storing.memory = vec![(DATA.start + 8, vec![1; 8])];
    for _ in 0..2 {
        let outcome = run(&mut native, &storing);
        assert_eq!(outcome.stores, [(DATA.start + 8, vec![1, 0x5a, 1, 1, 1, 1, 1, 1])]);
        let outcome = run(&mut native, &case(Mode::Long, &[0x90]));
        assert_eq!(outcome.stores, []);
    }
}

#[test]
fn flags_that_hurt_are_for_the_case_alone() {
    let mut native = Native::new().unwrap();
    for flags in [0x100, 0x4000, 0x4_0000, 0x400, 0x24_4cd5] {
        let mut case = case(Mode::Long, &[0x90]);
        case.registers.rflags = flags;
        start::normalize(&mut case);
        let outcome = run(&mut native, &case);
        let expected = if flags & 0x100 != 0 {
            Ending::Exception { vector: 1, error_code: 0, address: 0 }
        } else {
            Ending::Completed
        };
        assert_eq!(outcome.ending, expected);
        assert_eq!(outcome.registers.rflags & !0x1_0000, flags | 0x202);
    }
}

#[test]
fn child_that_dies_is_replaced() {
    let mut native = Native::new().unwrap();
    let case = case(Mode::Long, &[0x90]);
    let prepared = start::prepare(&case).unwrap();
    native.start([&prepared]).unwrap();
    native.reap();
    // Dead without having been waited for: as by a case.
    native.spawn().unwrap();
    let pid = native.child.unwrap();
    // SAFETY: a child of ours.
    unsafe { libc::kill(pid, libc::SIGKILL) };
    let answers = native.finish(&[(&case, &prepared)]).unwrap();
    assert_eq!(answers[0].as_ref().unwrap().ending, Ending::Completed);
}
