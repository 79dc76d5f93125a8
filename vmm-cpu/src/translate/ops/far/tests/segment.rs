use crate::translate::cpu::{RAX, RBX, RSP, TableRegister, cr4};
use crate::translate::exception::{Exception, vector};
use crate::translate::flags::bits;
use crate::translate::segment::{attribute, index};
use crate::translate::test_support::*;

/// MOV DS, AX and MOV SS, AX.
const MOV_DS: [u8; 2] = [0x8e, 0xd8];
const MOV_SS: [u8; 2] = [0x8e, 0xd0];

fn with_ax(guest: &mut Guest, selector: u16) {
    guest.core.cpu.set_r(RAX, selector.into());
}

#[test]
fn loading_sets_the_accessed_bit() {
    let mut guest = Guest::protected();
    guest.descriptor(FREE, 0x12cf_9234_5678_ffff);
    with_ax(&mut guest, FREE);
    guest.execute(&MOV_DS).unwrap();
    let ds = *guest.core.cpu.segment(index::DS);
    assert_eq!((ds.base, ds.limit, ds.selector), (0x1234_5678, u32::MAX, FREE));
    assert!(ds.has(attribute::ACCESSED));
    assert_eq!(guest.read::<1>(GDT + u64::from(FREE) + 5), 0x93);
}

#[test]
fn bad_selectors_fault_and_change_nothing() {
    let mut guest = Guest::protected();
    let before = guest.core.cpu.segments;
    // Execute-only code, a TSS, code of level 0 asked for with level 3, beyond the table, in a missing LDT.
    guest.descriptor(FREE, 0x00cf_9900_0000_ffff);
    for selector in [FREE, TASK, CODE_32 | 3, 0x1000, 0x14] {
        with_ax(&mut guest, selector);
        assert_eq!(guest.fault(&MOV_DS), Exception::with_error(vector::GP, selector & !3), "{selector:#x}");
    }
    guest.descriptor(FREE, 0x00cf_1300_0000_ffff);
    with_ax(&mut guest, FREE);
    assert_eq!(guest.fault(&MOV_DS), Exception::with_error(vector::NP, FREE));
    assert_eq!(guest.fault(&MOV_SS), Exception::with_error(vector::SS, FREE));
    for selector in [0, 3, USER_DATA, CODE_32, DATA | 1] {
        with_ax(&mut guest, selector);
        assert_eq!(guest.fault(&MOV_SS), Exception::with_error(vector::GP, selector & !3), "{selector:#x}");
    }
    assert_eq!(guest.core.cpu.segments, before);
}

#[test]
fn null_empties_a_data_segment() {
    let mut guest = Guest::protected();
    with_ax(&mut guest, 2);
    guest.execute(&MOV_DS).unwrap();
    assert_eq!(guest.core.cpu.segment(index::DS).selector, 2);
    // MOV AL, [0x8000]
    assert_eq!(guest.fault(&[0xa0, 0, 0x80, 0, 0]), Exception::with_error(vector::GP, 0));
}

#[test]
fn null_stack_segments_are_for_inner_64_bit_code() {
    let mut guest = Guest::long();
    with_ax(&mut guest, 0);
    guest.execute(&MOV_SS).unwrap();
    assert!(guest.core.cpu.shadow_mov_ss && guest.core.mode.cpl == 0);
    with_ax(&mut guest, 1);
    assert_eq!(guest.fault(&MOV_SS), Exception::with_error(vector::GP, 0));
    guest.set_segments(CODE_32, DATA);
    with_ax(&mut guest, 0);
    assert_eq!(guest.fault(&MOV_SS), Exception::with_error(vector::GP, 0));
    guest.set_segments(USER_CODE_64, USER_DATA);
    with_ax(&mut guest, 3);
    assert_eq!(guest.fault(&MOV_SS), Exception::with_error(vector::GP, 0));
}

#[test]
fn segments_move_by_stack_and_far_pointer() {
    let mut guest = Guest::protected();
    // PUSH DS, POP ES, with 16 bits.
    guest.core.cpu.segment_mut(index::DS).selector = USER_DATA;
    guest.execute(&[0x66, 0x1e]).unwrap();
    assert_eq!((guest.core.cpu.r(RSP), guest.read::<2>(STACK - 2)), (STACK - 2, USER_DATA.into()));
    guest.execute(&[0x66, 0x07]).unwrap();
    assert_eq!((guest.core.cpu.r(RSP), guest.core.cpu.segment(index::ES).selector), (STACK, USER_DATA));
    // LFS EAX, [EBX]
    guest.core.cpu.set_r(RBX, 0xa000);
    guest.write::<4>(0xa000, 0x8765_4321);
    guest.write::<2>(0xa004, u64::from(DATA));
    guest.execute(&[0x0f, 0xb4, 0x03]).unwrap();
    assert_eq!((guest.core.cpu.r(RAX), guest.core.cpu.segment(index::FS).selector), (0x8765_4321, DATA));
    // MOV EAX, FS extends; MOV [EBX], FS stores two bytes.
    guest.core.cpu.set_r(RAX, u64::MAX);
    guest.execute(&[0x8c, 0xe0]).unwrap();
    assert_eq!(guest.core.cpu.r(RAX), u64::from(DATA));
    guest.execute(&[0x8c, 0x23]).unwrap();
    assert_eq!(guest.read::<4>(0xa000), 0x8765_0000 | u64::from(DATA));
}

#[test]
fn pop_ss_moves_the_old_stack_pointer() {
    let mut guest = Guest::protected();
    guest.descriptor(FREE, 0x0000_9300_0000_ffff);
    guest.core.cpu.set_r(RSP, 0x1_fffc);
    guest.write::<4>(0x1_fffc, FREE.into());
    guest.execute(&[0x17]).unwrap();
    assert_eq!((guest.core.cpu.r(RSP), guest.core.mode.stack_mask), (0x2_0000, 0xffff));
    assert!(guest.core.cpu.shadow_mov_ss);
}

#[test]
fn real_mode_after_a_null_selector_has_segments() {
    let mut guest = Guest::protected();
    with_ax(&mut guest, 0);
    guest.execute(&MOV_DS).unwrap();
    guest.core.cpu.cr0 &= !1;
    guest.core.update_mode();
    with_ax(&mut guest, 0x1000);
    guest.execute(&MOV_DS).unwrap();
    let ds = guest.core.cpu.segment(index::DS);
    assert_eq!((ds.base, ds.limit, ds.is_unusable()), (0x1_0000, 0xffff, false));
}

#[test]
fn access_rights_and_limits() {
    let mut guest = Guest::long();
    let zf = |guest: &Guest| guest.core.cpu.flags.zf();
    // LAR EAX, EBX and LSL EAX, EBX.
    let (lar, lsl) = ([0x0f, 0x02, 0xc3], [0x0f, 0x03, 0xc3]);
    guest.core.cpu.set_r(RBX, CODE_64.into());
    guest.execute(&lar).unwrap();
    assert_eq!((zf(&guest), guest.core.cpu.r(RAX)), (true, 0x00af_9b00));
    guest.execute(&lsl).unwrap();
    assert_eq!((zf(&guest), guest.core.cpu.r(RAX)), (true, 0xffff_ffff));
    guest.core.cpu.set_r(RBX, TASK.into());
    guest.execute(&lsl).unwrap();
    assert_eq!((zf(&guest), guest.core.cpu.r(RAX)), (true, 0x67));
    // A call gate has rights and no limit; a 16-bit TSS is nothing in long mode; level 3 sees less.
    guest.descriptor(FREE, gate(CODE_64, 0, 0x8c));
    guest.core.cpu.set_r(RBX, FREE.into());
    guest.execute(&lar).unwrap();
    assert_eq!((zf(&guest), guest.core.cpu.r(RAX)), (true, 0x8c00));
    guest.execute(&lsl).unwrap();
    assert_eq!((zf(&guest), guest.core.cpu.r(RAX)), (false, 0x8c00));
    guest.descriptor(FREE, 0x0000_8100_0000_002b);
    guest.execute(&lar).unwrap();
    assert!(!zf(&guest));
    guest.set_segments(USER_CODE_64, USER_DATA);
    guest.core.cpu.set_r(RBX, u64::from(DATA));
    guest.execute(&lar).unwrap();
    assert!(!zf(&guest));
    // VERR and VERW EBX.
    guest.core.cpu.set_r(RBX, USER_CODE_64.into());
    guest.execute(&[0x0f, 0x00, 0xe3]).unwrap();
    assert!(zf(&guest));
    guest.execute(&[0x0f, 0x00, 0xeb]).unwrap();
    assert!(!zf(&guest));
}

#[test]
fn task_register_marks_its_segment_busy() {
    let mut guest = Guest::long();
    guest.descriptor(TASK, 0x1200_8934_5678_0067);
    guest.descriptor(TASK + 8, 0xffff_8000);
    with_ax(&mut guest, TASK);
    guest.execute(&[0x0f, 0x00, 0xd8]).unwrap();
    let tr = guest.core.cpu.tr;
    assert_eq!((tr.base, tr.limit, tr.kind()), (0xffff_8000_1234_5678, 0x67, 0xb));
    assert_eq!(guest.fault(&[0x0f, 0x00, 0xd8]), Exception::with_error(vector::GP, TASK));
    // STR EAX
    guest.execute(&[0x0f, 0x00, 0xc8]).unwrap();
    assert_eq!(guest.core.cpu.r(RAX), u64::from(TASK));
    // LLDT of a TSS, of null.
    assert_eq!(guest.fault(&[0x0f, 0x00, 0xd0]), Exception::with_error(vector::GP, TASK));
    with_ax(&mut guest, 0);
    guest.execute(&[0x0f, 0x00, 0xd0]).unwrap();
    assert!(guest.core.cpu.ldtr.is_unusable());
}

#[test]
fn local_descriptors_need_their_table() {
    let mut guest = Guest::protected();
    guest.descriptor(FREE, 0x0000_8200_b000_000f);
    guest.write::<8>(0xb008, 0x00cf_9300_0000_ffff);
    with_ax(&mut guest, FREE);
    guest.execute(&[0x0f, 0x00, 0xd0]).unwrap();
    with_ax(&mut guest, 0xc);
    guest.execute(&MOV_DS).unwrap();
    with_ax(&mut guest, 0x14);
    assert_eq!(guest.fault(&MOV_DS), Exception::with_error(vector::GP, 0x14));
}

#[test]
fn table_registers_by_mode() {
    let mut guest = Guest::long();
    guest.core.cpu.set_r(RBX, 0xa000);
    guest.write::<8>(0xa002, 0xffff_8000_0000_1000);
    guest.write::<2>(0xa000, 0x7f);
    // LGDT [RBX], SIDT [RBX]
    guest.execute(&[0x0f, 0x01, 0x13]).unwrap();
    assert_eq!(guest.core.cpu.gdtr, TableRegister { base: 0xffff_8000_0000_1000, limit: 0x7f });
    guest.execute(&[0x0f, 0x01, 0x0b]).unwrap();
    assert_eq!((guest.read::<2>(0xa000), guest.read::<8>(0xa002)), (0xfff, IDT));
    guest.write::<8>(0xa002, 0x8000_0000_0000);
    assert_eq!(guest.fault(&[0x0f, 0x01, 0x13]), Exception::with_error(vector::GP, 0));
    // 24 bits of base with a 16-bit operand.
    let mut guest = Guest::protected();
    guest.core.cpu.set_r(RBX, 0xa000);
    guest.write::<8>(0xa000, 0x1234_5678_00ff);
    guest.execute(&[0x66, 0x0f, 0x01, 0x1b]).unwrap();
    assert_eq!(guest.core.cpu.idtr, TableRegister { base: 0x34_5678, limit: 0xff });
}

#[test]
fn tables_are_stored_whole_or_not_at_all() {
    let mut guest = Guest::long();
    // SGDT [RBX], SIDT [RBX]: limit, base, or the end of the base in a page that is not there.
    for code in [[0x0f, 0x01, 0x03], [0x0f, 0x01, 0x0b]] {
        for (start, faults_at) in
            [(HOLE + 0x10, HOLE + 0x10), (HOLE - 1, HOLE), (HOLE - 2, HOLE), (HOLE - 9, HOLE)]
        {
            guest.core.cpu.set_r(RBX, start);
            assert_eq!(guest.fault(&code).cr2, Some(faults_at), "{code:x?} at {start:#x}");
            assert_eq!(guest.read::<8>(HOLE - 8), 0);
        }
    }
}

#[test]
fn umip_hides_tables_from_level_3() {
    let mut guest = Guest::long();
    guest.core.cpu.cr4 |= cr4::UMIP;
    guest.set_segments(USER_CODE_64, USER_DATA);
    guest.core.cpu.set_r(RBX, 0xa000);
    for code in [[0x0f, 0x01, 0x03], [0x0f, 0x01, 0x0b], [0x0f, 0x00, 0xc0], [0x0f, 0x00, 0xc8]] {
        assert_eq!(guest.fault(&code), Exception::with_error(vector::GP, 0), "{code:x?}");
    }
    guest.core.cpu.cr4 &= !cr4::UMIP;
    guest.execute(&[0x0f, 0x01, 0x03]).unwrap();
    assert_eq!(guest.read::<8>(0xa002), GDT);
}

#[test]
fn arpl_raises() {
    let mut guest = Guest::protected();
    guest.core.cpu.set_r(RAX, 0x10);
    guest.core.cpu.set_r(RBX, 0x3);
    guest.execute(&[0x63, 0xd8]).unwrap();
    assert_eq!((guest.core.cpu.r(RAX), guest.core.cpu.flags.get() & bits::ZF), (0x13, bits::ZF));
    guest.execute(&[0x63, 0xd8]).unwrap();
    assert_eq!((guest.core.cpu.r(RAX), guest.core.cpu.flags.get() & bits::ZF), (0x13, 0));
}
