//! Against the host's processor, and what faults leave behind.

use crate::translate::core::Reason;
use crate::translate::cpu::{RAX, RBX, RCX, RDX, RSP, cr0, cr4};
use crate::translate::exception::vector;
use crate::translate::flags::bits;
use crate::translate::ops::misc::bench::{Bench, HOLE, RAM};
use crate::translate::segment::index;
use crate::translate::test_support::{CODE_64, DATA, Guest, HOLE as GUEST_HOLE, USER_CODE_64, USER_DATA};

#[cfg(target_arch = "x86_64")]
mod against_host {
    use crate::translate::flags::bits;
    use crate::translate::ops::misc::bench::{Bench, Native, Numbers, native};

    fn compare(natives: &[Native]) {
        let (mut bench, mut numbers) = (Bench::new(64), Numbers(11));
        for native in natives {
            for round in 0..300 {
                let mut before = numbers.registers();
                if round % 3 == 0 {
                    // CMPXCHG finds what it expects, in 32 bits at least.
                    before[1] = before[1] & !0xffff_ffff | before[0] & 0xffff_ffff;
                }
                bench.compare(native, before, bits::STATUS);
            }
        }
    }

    #[test]
    fn moves() {
        compare(&[
            native!(0x88 0xc8),
            native!(0x88 0xe1),
            native!(0x66 0x89 0xc8),
            native!(0x89 0xc8),
            native!(0x48 0x89 0xc8),
            native!(0xb4 0x81),
            native!(0x66 0xb8 0x34 0x92),
            native!(0x48 0xc7 0xc0 0x00 0x00 0x00 0x80),
            native!(0x66 0x0f 0xb6 0xc5),
            native!(0x0f 0xb6 0xc1),
            native!(0x48 0x0f 0xb7 0xc1),
            native!(0x66 0x0f 0xbe 0xc5),
            native!(0x0f 0xbe 0xc1),
            native!(0x48 0x0f 0xbf 0xc1),
            native!(0x48 0x63 0xc1),
            native!(0x63 0xc1),
            native!(0x48 0x8d 0x44 0x88 0xfd),
            native!(0x67 0x48 0x8d 0x44 0x88 0xfd),
            native!(0x8d 0x44 0x48 0x7f),
            native!(0x66 0x8d 0x04 0x88),
            native!(0x67 0x66 0x8d 0x04 0x50),
            native!(0x48 0x91),
            native!(0x91),
            native!(0x66 0x91),
            native!(0x86 0xe1),
            native!(0x87 0xd0),
        ]);
    }

    #[test]
    fn exchanges() {
        compare(&[
            native!(0x0f 0xc0 0xc8),
            native!(0x0f 0xc0 0xe5),
            native!(0x66 0x0f 0xc1 0xc8),
            native!(0x0f 0xc1 0xc8),
            native!(0x48 0x0f 0xc1 0xc8),
            native!(0x0f 0xc1 0xc0),
            native!(0x0f 0xc0 0xc4),
            native!(0x0f 0xb0 0xd1),
            native!(0x0f 0xb0 0xd4),
            native!(0x66 0x0f 0xb1 0xd1),
            native!(0x0f 0xb1 0xd1),
            native!(0x48 0x0f 0xb1 0xd1),
            native!(0x0f 0xb1 0xc0),
            native!(0x0f 0xb1 0xc2),
        ]);
    }

    #[test]
    fn conditions() {
        compare(&[
            native!(0x0f 0x90 0xc4),
            native!(0x0f 0x91 0xc0),
            native!(0x0f 0x92 0xc0),
            native!(0x0f 0x93 0xc0),
            native!(0x0f 0x94 0xc0),
            native!(0x0f 0x95 0xc0),
            native!(0x0f 0x96 0xc0),
            native!(0x0f 0x97 0xc0),
            native!(0x0f 0x98 0xc0),
            native!(0x0f 0x99 0xc0),
            native!(0x0f 0x9a 0xc0),
            native!(0x0f 0x9b 0xc0),
            native!(0x0f 0x9c 0xc0),
            native!(0x0f 0x9d 0xc0),
            native!(0x0f 0x9e 0xc0),
            native!(0x0f 0x9f 0xc5),
            native!(0x0f 0x40 0xc1),
            native!(0x48 0x0f 0x42 0xc1),
            native!(0x66 0x0f 0x44 0xc1),
            native!(0x0f 0x47 0xc1),
            native!(0x0f 0x4a 0xc1),
            native!(0x48 0x0f 0x4c 0xc1),
            native!(0x66 0x0f 0x4f 0xc1),
            native!(0x0f 0x4e 0xc1),
        ]);
    }
}

fn page_fault(bench: &mut Bench, code: &[u8]) -> u64 {
    match bench.run(code) {
        Err(Reason::Exception(exception)) if exception.vector == vector::PF => exception.cr2.unwrap(),
        other => panic!("{code:x?}: {other:?}"),
    }
}

#[test]
fn a_fault_leaves_everything_as_it_was() {
    // PUSH RAX, POP [RAX], CALL to itself, XADD [RAX], CMPXCHG, XCHG, ADD, CMPXCHG8B.
    let codes: [&[u8]; 8] = [
        &[0x50],
        &[0x8f, 0x00],
        &[0xe8, 0, 0, 0, 0],
        &[0x48, 0x0f, 0xc1, 0x08],
        &[0x48, 0x0f, 0xb1, 0x08],
        &[0x48, 0x87, 0x08],
        &[0x48, 0x01, 0x08],
        &[0x0f, 0xc7, 0x08],
    ];
    for code in codes {
        // The last four bytes lie in the hole.
        let mut bench = Bench::new(64);
        let stack = if code == [0x8f, 0x00] { 0x8000 } else { HOLE + 4 };
        bench.set(&[(RAX, HOLE - 4), (RCX, 5), (RDX, 6), (RSP, stack)]);
        bench.poke(HOLE - 8, &[0xaa; 8]);
        bench.core.cpu.flags.set(0x8d7);
        // A push that straddles the edge writes downwards from within the hole.
        assert_eq!(page_fault(&mut bench, code), HOLE, "{code:x?}");
        assert_eq!([bench.r(RAX), bench.r(RCX), bench.r(RDX), bench.r(RSP)], [HOLE - 4, 5, 6, stack]);
        assert_eq!(bench.peek(HOLE - 8, 8), [0xaa; 8], "{code:x?}");
        assert_eq!(bench.core.cpu.flags.get(), 0x8d7);
    }
}

#[test]
fn a_device_is_not_read_if_the_rest_of_the_access_faults() {
    let mut bench = Bench::new(64);
    bench.set(&[(RAX, 2 * RAM - 2)]);
    // MOV ECX, [RAX].
    assert_eq!(page_fault(&mut bench, &[0x8b, 0x08]), 2 * RAM);
    assert!(bench.devices.log.is_empty(), "{:?}", bench.devices.log);
}

#[test]
fn read_modify_write_of_devices_is_a_read_and_a_write() {
    for code in [&[0x48, 0x01, 0x08][..], &[0xf0, 0x48, 0x01, 0x08], &[0x48, 0x0f, 0xc1, 0x08]] {
        let mut bench = Bench::new(64);
        bench.set(&[(RAX, RAM), (RCX, 1)]);
        bench.run(code).unwrap();
        let read = vec![0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17];
        let mut written = read.clone();
        written[0] = 0x11;
        assert_eq!(bench.devices.log, [(RAM, read), (RAM, written)], "{code:x?}");
    }
}

#[test]
fn the_stack_pointer_in_operands() {
    let mut bench = Bench::new(64);
    bench.poke(0x8000, &0x1234_u64.to_le_bytes());
    bench.set(&[(RSP, 0x8000)]);
    // POP [RSP]: the address is that after the pop.
    bench.run(&[0x8f, 0x04, 0x24]).unwrap();
    assert_eq!((bench.r(RSP), bench.peek(0x8008, 2)), (0x8008, vec![0x34, 0x12]));
    // PUSH RSP pushes what it was.
    bench.run(&[0x54]).unwrap();
    assert_eq!(bench.peek(0x8000, 2), [0x08, 0x80]);
    // POP RSP takes the word as it is.
    bench.poke(0x8000, &0x5000_u64.to_le_bytes());
    bench.run(&[0x5c]).unwrap();
    assert_eq!(bench.r(RSP), 0x5000);
    // PUSH with a 16-bit operand.
    bench.set(&[(RAX, 0x1_2345)]);
    bench.run(&[0x66, 0x50]).unwrap();
    assert_eq!((bench.r(RSP), bench.peek(0x4ffe, 2)), (0x4ffe, vec![0x45, 0x23]));
}

#[test]
fn sixteen_byte_exchanges_must_be_aligned() {
    let mut bench = Bench::new(64);
    bench.set(&[(RAX, 0x8008)]);
    match bench.run(&[0x48, 0x0f, 0xc7, 0x08]) {
        Err(Reason::Exception(exception)) => {
            assert_eq!((exception.vector, exception.error), (vector::GP, Some(0)))
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_access_that_leaves_canonical_addresses_is_no_page_fault() {
    let mut guest = Guest::long();
    // MOV RAX, [RBX]; MOV [RBX], RAX; MOVUPS XMM0, [RBX]; ADD [RBX], RAX; and with RSP for the base.
    for (code, stack) in [
        (&[0x48, 0x8b, 0x03][..], false),
        (&[0x48, 0x89, 0x03], false),
        (&[0x0f, 0x10, 0x03], false),
        (&[0x48, 0x01, 0x03], false),
        (&[0x48, 0x8b, 0x04, 0x24], true),
        // The prefix for DS means nothing.
        (&[0x3e, 0x48, 0x8b, 0x04, 0x24], true),
        (&[0x36, 0x48, 0x8b, 0x03], false),
    ] {
        guest.core.cpu.cr4 |= cr4::OSFXSR;
        guest.core.update_mode();
        for register in [RBX, RSP] {
            guest.core.cpu.set_r(register, 0x7fff_ffff_fffc);
        }
        let fault = guest.fault(code);
        let vector = if stack { vector::SS } else { vector::GP };
        assert_eq!((fault.vector, fault.error), (vector, Some(0)), "{code:x?}");
        guest.core.cpu.set_r(RBX, 0x7fff_ffff_fff0);
        guest.core.cpu.set_r(RSP, 0x7fff_ffff_fff0);
        assert_eq!(guest.fault(code).cr2, Some(0x7fff_ffff_fff0), "{code:x?}");
    }
}

#[test]
fn user_code_can_have_its_alignment_checked() {
    let mut guest = Guest::long();
    guest.core.cpu.cr0 |= cr0::AM;
    guest.core.cpu.cr4 |= cr4::OSFXSR;
    guest.core.cpu.flags.set_control(bits::AC, true);
    // MOV RAX, [RBX]; INC WORD [RBX]; MOVUPS XMM0, [RBX]; FLD TBYTE [RBX]; FNSTENV [RBX].
    let codes: [(&[u8], u64); 5] = [
        (&[0x48, 0x8b, 0x03], 8),
        (&[0x66, 0xff, 0x03], 2),
        (&[0x0f, 0x10, 0x03], 16),
        (&[0xdb, 0x2b], 8),
        (&[0xd9, 0x33], 4),
    ];
    for (code, alignment) in codes {
        guest.set_segments(CODE_64, DATA);
        guest.core.cpu.set_r(RBX, 0x8001);
        guest.execute(code).unwrap();
        guest.set_segments(USER_CODE_64, USER_DATA);
        let fault = guest.fault(code);
        assert_eq!((fault.vector, fault.error), (vector::AC, Some(0)), "{code:x?}");
        guest.core.cpu.set_r(RBX, GUEST_HOLE + 1);
        assert_eq!(guest.fault(code).vector, vector::AC, "{code:x?}");
        guest.core.cpu.set_r(RBX, 0x7fff_ffff_ffff);
        assert_eq!(guest.fault(code).vector, vector::GP, "{code:x?}");
        guest.core.cpu.set_r(RBX, 0x8000 + alignment);
        guest.execute(code).unwrap();
        // Twice, for what the first access may have left in the TLB.
        guest.core.cpu.set_r(RBX, 0x8001);
        assert_eq!(guest.fault(code).vector, vector::AC, "{code:x?}");
    }
    // The first word of an environment is there.
    guest.core.cpu.set_r(RBX, 0x7fff_ffff_fff9);
    assert_eq!(guest.fault(&[0xd9, 0x33]).vector, vector::AC);
}

#[test]
fn movsxd_reads_32_bits() {
    let mut guest = Guest::long();
    guest.core.cpu.set_r(RBX, GUEST_HOLE - 2);
    // MOVSXD AX, [RBX].
    assert_eq!(guest.fault(&[0x66, 0x63, 0x03]).cr2, Some(GUEST_HOLE));
}

#[test]
fn offsets_in_segments_are_canonical_themselves() {
    let mut guest = Guest::long();
    guest.core.cpu.segment_mut(index::GS).base = 0x8000_0000_8000;
    guest.core.cpu.set_r(RBX, 0xffff_8000_0000_0000);
    // MOV RAX, GS:[RBX], at 0x8000.
    guest.execute(&[0x65, 0x48, 0x8b, 0x03]).unwrap();
    guest.core.cpu.segment_mut(index::GS).base = 0xffff_7000_0000_8000;
    guest.core.cpu.set_r(RBX, 0x0000_9000_0000_0000);
    assert_eq!(guest.fault(&[0x65, 0x48, 0x8b, 0x03]).vector, vector::GP);
}
