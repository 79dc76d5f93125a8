use crate::translate::cpu::{RAX, RCX, RSP};
use crate::translate::exception::vector;
use crate::translate::segment::index;
use crate::translate::test_support::{CODE, Guest, HOLE, STACK};

#[test]
fn sixteen_bit_code_wraps_its_targets() {
    let mut guest = Guest::real();
    guest.core.cpu.rip = 0xfff0;
    // JMP +0x20 ends at 0xfff2 + 0x20.
    guest.execute(&[0xeb, 0x20]).unwrap();
    assert_eq!(guest.core.cpu.rip, 0x12);
    // A near call with 32 bits in a 16-bit segment stays within its limit.
    guest.core.cpu.rip = CODE;
    let fault = guest.fault(&[0x66, 0xe8, 0, 0, 1, 0]);
    assert_eq!((fault.vector, guest.core.cpu.r(RSP)), (vector::GP, STACK - 2));
    guest.execute(&[0xe8, 0xfd, 0x7f]).unwrap();
    assert_eq!((guest.core.cpu.rip, guest.read::<2>(STACK - 4)), (0, CODE + 3));
}

#[test]
fn an_operand_size_of_16_bits_holds_for_near_branches_of_64_bit_code() {
    let mut guest = Guest::long();
    guest.core.cpu.rip = CODE + 0x10_0000;
    guest.execute(&[0x66, 0xeb, 0x20]).unwrap();
    assert_eq!(guest.core.cpu.rip, CODE + 0x23);
    guest.core.cpu.rip = CODE;
    guest.execute(&[0x66, 0xe8, 0x10, 0]).unwrap();
    assert_eq!((guest.core.cpu.rip, guest.core.cpu.r(RSP)), (CODE + 0x14, STACK - 2));
    assert_eq!(guest.read::<2>(STACK - 2), CODE + 4);
    guest.execute(&[0x66, 0xc3]).unwrap();
    assert_eq!((guest.core.cpu.rip, guest.core.cpu.r(RSP)), (CODE + 4, STACK));
}

#[test]
fn targets_beyond_the_limit_fault_before_anything_happens() {
    let mut guest = Guest::protected();
    guest.core.cpu.segment_mut(index::CS).limit = 0x8fff;
    guest.core.update_mode();
    let rsp = guest.core.cpu.r(RSP);
    for code in [&[0xe9, 0xfb, 0x0f, 0, 0][..], &[0xe8, 0xfb, 0x0f, 0, 0], &[0xff, 0xe0], &[0xff, 0xd0]] {
        guest.core.cpu.rip = CODE;
        guest.core.cpu.set_r(RAX, 0x9000);
        let fault = guest.fault(code);
        assert_eq!((fault.vector, fault.error), (vector::GP, Some(0)), "{code:x?}");
        assert_eq!((guest.core.cpu.r(RSP), guest.core.cpu.rip), (rsp, CODE));
    }
    // RET takes nothing off the stack.
    guest.write::<4>(rsp, 0x9000);
    assert_eq!(guest.fault(&[0xc3]).vector, vector::GP);
    assert_eq!(guest.core.cpu.r(RSP), rsp);
}

#[test]
fn loops_count_with_the_width_of_addresses() {
    let mut guest = Guest::long();
    // The counter becomes zero in 32 bits; the upper half is cleared.
    guest.core.cpu.set_r(RCX, 0xffff_ffff_0000_0001);
    guest.execute(&[0x67, 0xe2, 0x10]).unwrap();
    assert_eq!((guest.core.cpu.rip, guest.core.cpu.r(RCX)), (CODE + 3, 0));
    guest.core.cpu.rip = CODE;
    guest.core.cpu.set_r(RCX, 0xffff_ffff_0000_0001);
    guest.execute(&[0xe2, 0x10]).unwrap();
    assert_eq!((guest.core.cpu.rip, guest.core.cpu.r(RCX)), (CODE + 0x12, 0xffff_ffff_0000_0000));
    // JECXZ and JRCXZ differ about the upper half.
    guest.core.cpu.rip = CODE;
    guest.execute(&[0x67, 0xe3, 0x10]).unwrap();
    assert_eq!(guest.core.cpu.rip, CODE + 0x13);
    guest.core.cpu.rip = CODE;
    guest.execute(&[0xe3, 0x10]).unwrap();
    assert_eq!(guest.core.cpu.rip, CODE + 2);
}

#[test]
fn returns_drop_what_they_are_told() {
    let mut guest = Guest::long();
    guest.write::<8>(STACK, 0x1234);
    guest.execute(&[0xc2, 0x10, 0x80]).unwrap();
    assert_eq!((guest.core.cpu.rip, guest.core.cpu.r(RSP)), (0x1234, STACK + 8 + 0x8010));
    // To where no code can be.
    guest.core.cpu.rip = CODE;
    guest.core.cpu.set_r(RSP, STACK);
    guest.write::<8>(STACK, 1 << 47);
    let fault = guest.fault(&[0xc3]);
    assert_eq!((fault.vector, fault.error, guest.core.cpu.r(RSP)), (vector::GP, Some(0), STACK));
    guest.core.cpu.set_r(RSP, HOLE);
    assert_eq!(guest.fault(&[0xc3]).cr2, Some(HOLE));
}

#[test]
fn calls_look_at_the_stack_before_the_target() {
    let mut guest = Guest::long();
    guest.core.cpu.set_r(RAX, 1 << 63);
    guest.core.cpu.set_r(RSP, HOLE + 8);
    // CALL RAX.
    assert_eq!(guest.fault(&[0xff, 0xd0]).cr2, Some(HOLE));
    guest.core.cpu.set_r(RSP, STACK);
    assert_eq!(guest.fault(&[0xff, 0xd0]).vector, vector::GP);
    assert_eq!(guest.core.cpu.r(RSP), STACK);
}

#[test]
fn a_repeat_prefix_decides_what_loope_and_loopne_wait_for() {
    let mut guest = Guest::long();
    // LOOPE and LOOPNE, ZF clear.
    for (code, jumps) in [
        (&[0xe1, 0x20][..], false),
        (&[0xe0, 0x20], true),
        (&[0xf2, 0xe1, 0x20], true),
        (&[0xf3, 0xe1, 0x20], false),
        (&[0xf2, 0xe0, 0x20], true),
        (&[0xf3, 0xe0, 0x20], false),
    ] {
        guest.core.cpu.rip = CODE;
        guest.core.cpu.set_r(RCX, 2);
        guest.execute(code).unwrap();
        let next = CODE + code.len() as u64;
        assert_eq!(guest.core.cpu.rip, if jumps { next + 0x20 } else { next }, "{code:x?}");
        assert_eq!(guest.core.cpu.r(RCX), 1);
    }
}
