//! Stack frames, word by word.

use super::*;
use crate::translate::cpu::RSP;
use crate::translate::flags::bits;
use crate::translate::memory::PAGE;
use crate::translate::segment::{SegmentRegister, attribute, index};
use crate::translate::test_support::*;

const HANDLER: u64 = 0x9000;
/// Byte 5 of a present interrupt gate of level 0, of a trap gate.
const INTERRUPT: u64 = 0x8e;
const TRAP: u64 = 0x8f;
const FLAGS: u64 = bits::FIXED | bits::IF | bits::ZF;

fn with_flags(mut guest: Guest) -> Guest {
    guest.core.cpu.flags.set(FLAGS);
    guest
}

fn take(guest: &mut Guest, event: Event) {
    guest.machine().take(event).unwrap();
}

fn rsp(guest: &Guest) -> u64 {
    guest.core.cpu.r(RSP)
}

/// Puts a 64-bit guest to level 3.
fn to_user(guest: &mut Guest) {
    guest.set_segments(USER_CODE_64, USER_DATA);
}

#[test]
fn long_mode_frame_is_aligned() {
    let mut guest = with_flags(Guest::long());
    guest.gate(0x20, CODE_64, 0xffff_8000_0000_9000, INTERRUPT, 0);
    guest.core.cpu.set_r(RSP, STACK - 3);
    guest.core.cpu.shadow_sti = true;
    take(&mut guest, Event::External { vector: 0x20 });
    assert_eq!(rsp(&guest), STACK - 16 - 40);
    let frame = [CODE, CODE_64.into(), FLAGS, STACK - 3, DATA.into()];
    assert_eq!(guest.words::<8, 5>(rsp(&guest)), frame);
    let cpu = &guest.core.cpu;
    assert_eq!((cpu.rip, cpu.flags.get()), (0xffff_8000_0000_9000, FLAGS & !bits::IF));
    assert_eq!(cpu.segment(index::SS).selector, DATA);
    assert!(!cpu.shadow_sti);
}

#[test]
fn long_mode_page_fault_has_error_code_and_resume_flag() {
    let mut guest = with_flags(Guest::long());
    guest.gate(vector::PF, CODE_64, HANDLER, TRAP, 0);
    take(&mut guest, Event::Exception(Exception::page_fault(0xdead_b000, 2)));
    assert_eq!(rsp(&guest), STACK - 48);
    let frame = [2, CODE, CODE_64.into(), FLAGS | bits::RF, STACK, DATA.into()];
    assert_eq!(guest.words::<8, 6>(rsp(&guest)), frame);
    // A trap gate leaves interrupts on.
    assert_eq!((guest.core.cpu.cr2, guest.core.cpu.flags.get()), (0xdead_b000, FLAGS));
}

#[test]
fn long_mode_switches_to_the_inner_stack_with_a_null_ss() {
    let mut guest = with_flags(Guest::long());
    to_user(&mut guest);
    guest.gate(vector::GP, CODE_64, HANDLER, INTERRUPT, 0);
    take(&mut guest, Event::Exception(Exception::with_error(vector::GP, 0x18)));
    assert_eq!(rsp(&guest), INNER_STACK - 48);
    let frame = [0x18, CODE, USER_CODE_64.into(), FLAGS | bits::RF, STACK, USER_DATA.into()];
    assert_eq!(guest.words::<8, 6>(rsp(&guest)), frame);
    let cpu = &guest.core.cpu;
    assert_eq!((cpu.segment(index::SS).selector, guest.core.mode.cpl), (0, 0));
    assert_eq!(cpu.cs().selector, CODE_64);
}

#[test]
fn stack_pointer_of_32_bit_code_is_pushed_as_such() {
    let mut guest = with_flags(Guest::long());
    to_user(&mut guest);
    let cs = guest.core.cpu.segment_mut(index::CS);
    cs.attributes = cs.attributes & !attribute::LONG | attribute::BIG;
    guest.core.update_mode();
    guest.core.cpu.set_r(RSP, 0xbf84_f8c9_584c_3461);
    guest.gate(vector::GP, CODE_64, HANDLER, INTERRUPT, 0);
    take(&mut guest, Event::Exception(Exception::with_error(vector::GP, 0)));
    assert_eq!(guest.read::<8>(INNER_STACK - 16), 0x584c_3461);
}

#[test]
fn interrupt_stack_table_is_used_at_every_level() {
    for user in [false, true] {
        let mut guest = with_flags(Guest::long());
        if user {
            to_user(&mut guest);
        }
        guest.gate(vector::NMI, CODE_64, HANDLER, INTERRUPT, 1);
        take(&mut guest, Event::Nmi);
        assert_eq!((rsp(&guest), guest.read::<8>(IST_1 - 16)), (IST_1 - 40, STACK));
        assert!(guest.core.cpu.nmi_masked);
        assert_eq!(guest.core.cpu.segment(index::SS).selector, if user { 0 } else { DATA });
    }
}

#[test]
fn interrupt_stack_beyond_the_task_is_the_tasks_fault() {
    let mut guest = Guest::long();
    guest.gate(0x20, CODE_64, HANDLER, INTERRUPT, 7);
    guest.core.cpu.tr.limit = 0x5a;
    assert!(guest.machine().deliver(Event::External { vector: 0x20 }).is_err());
    let Reason::Exception(exception) = guest.core.reason else { panic!("{:?}", guest.core.reason) };
    assert_eq!(exception, Exception::with_error(vector::TS, TASK | 1));
}

#[test]
fn software_interrupts_need_the_gates_level() {
    let mut guest = Guest::long();
    to_user(&mut guest);
    guest.gate(0x80, CODE_64, HANDLER, INTERRUPT, 0);
    assert_eq!(guest.fault(&[0xcd, 0x80]), Exception::with_error(vector::GP, 0x402));
    assert_eq!((guest.core.cpu.rip, rsp(&guest)), (CODE, STACK));
    guest.gate(0x80, CODE_64, HANDLER, INTERRUPT | 0x60, 0);
    guest.execute(&[0xcd, 0x80]).unwrap();
    assert_eq!(guest.read::<8>(INNER_STACK - 40), CODE + 2);
    assert_eq!(guest.core.cpu.rip, HANDLER);
}

#[test]
fn missing_gates_say_whose_event_it_was() {
    let mut guest = Guest::long();
    guest.gate(0x30, CODE_64, HANDLER, INTERRUPT & !0x80, 0);
    assert_eq!(guest.fault(&[0xcd, 0x30]), Exception::with_error(vector::NP, 0x182));
    guest.gate(vector::NP, CODE_64, HANDLER, INTERRUPT, 0);
    take(&mut guest, Event::External { vector: 0x30 });
    assert_eq!(guest.read::<8>(rsp(&guest)), 0x183);
    // Beyond the table.
    let mut guest = Guest::long();
    guest.core.cpu.idtr.limit = 0x2ff;
    assert_eq!(guest.fault(&[0xcd, 0x30]), Exception::with_error(vector::GP, 0x182));
}

#[test]
fn gates_must_lead_to_64_bit_code() {
    let mut guest = Guest::long();
    guest.gate(0x30, CODE_32, HANDLER, INTERRUPT, 0);
    assert_eq!(guest.fault(&[0xcd, 0x30]), Exception::with_error(vector::GP, CODE_32));
    guest.gate(0x30, CODE_64, 0x8000_0000_0000, INTERRUPT, 0);
    assert_eq!(guest.fault(&[0xcd, 0x30]), Exception::with_error(vector::GP, 0));
    guest.gate(0x30, CODE_64, HANDLER, 0x86, 0);
    assert_eq!(guest.fault(&[0xcd, 0x30]), Exception::with_error(vector::GP, 0x182));
}

#[test]
fn bad_inner_stack_becomes_a_double_fault_with_the_old_state() {
    let mut guest = with_flags(Guest::long());
    to_user(&mut guest);
    guest.write::<8>(TSS + 4, HOLE + PAGE);
    guest.gate(0x20, CODE_64, HANDLER, INTERRUPT, 0);
    guest.gate(vector::PF, CODE_64, HANDLER, INTERRUPT, 0);
    guest.gate(vector::DF, CODE_64, HANDLER + 0x100, INTERRUPT, 1);
    take(&mut guest, Event::External { vector: 0x20 });
    assert_eq!(rsp(&guest), IST_1 - 48);
    let frame = [0, CODE, USER_CODE_64.into(), FLAGS, STACK, USER_DATA.into()];
    assert_eq!(guest.words::<8, 6>(rsp(&guest)), frame);
    assert_eq!((guest.core.cpu.rip, guest.core.cpu.cr2), (HANDLER + 0x100, HOLE + PAGE - 8));
}

#[test]
fn triple_fault_shuts_down() {
    let mut guest = Guest::long();
    guest.core.cpu.idtr.limit = 0;
    let halt = guest.machine().deliver_exception(Exception::new(vector::UD));
    assert_eq!(halt, Some(Halt::Shutdown));
    assert_eq!((guest.core.cpu.rip, rsp(&guest)), (CODE, STACK));
}

#[test]
fn faults_combine_as_the_manual_says() {
    let fault = |vector| Event::Exception(Exception::new(vector));
    let combined = |first, second| combine(&fault(first), Exception::new(second)).map(|next| next.vector);
    assert_eq!(combined(vector::UD, vector::GP), Some(vector::GP));
    assert_eq!(combined(vector::GP, vector::NP), Some(vector::DF));
    assert_eq!(combined(vector::DE, vector::PF), Some(vector::PF));
    assert_eq!(combined(vector::PF, vector::PF), Some(vector::DF));
    assert_eq!(combined(vector::PF, vector::SS), Some(vector::DF));
    assert_eq!(combined(vector::PF, vector::DB), Some(vector::DB));
    assert_eq!(combined(vector::DF, vector::PF), None);
    assert_eq!(combined(vector::DF, vector::GP), None);
}

#[test]
fn debug_exceptions_leave_their_cause_in_dr6() {
    let mut guest = Guest::long();
    guest.gate(vector::DB, CODE_64, HANDLER, INTERRUPT, 0);
    guest.core.cpu.dr6 = 0xffff_0ff3;
    guest.core.cpu.dr7 = 1 << 13 | 0x400;
    take(&mut guest, Event::Exception(Exception::debug(1 << 14 | 8)));
    assert_eq!((guest.core.cpu.dr6, guest.core.cpu.dr7), (0xffff_4ff8, 0x400));
    // A trap has no resume flag.
    assert_eq!(guest.read::<8>(rsp(&guest) + 16) & bits::RF, 0);
}

#[test]
fn int1_takes_along_what_mov_ss_put_off() {
    let mut guest = Guest::protected();
    guest.gate(vector::DB, CODE_32, HANDLER, 0x8e, 0);
    guest.core.cpu.dr6 = 0;
    // Of the guest and of a debugger.
    guest.core.watch_hits = 0x102;
    take(&mut guest, Event::Int1);
    assert_eq!((guest.core.cpu.dr6, guest.core.watch_hits), (2, 0x100));
    // That of INT n comes in the handler.
    guest.core.watch_hits = 2;
    take(&mut guest, Event::Software { vector: vector::DB });
    assert_eq!(guest.core.watch_hits, 2);
}

#[test]
fn real_mode_frame() {
    let mut guest = with_flags(Guest::real());
    guest.write::<4>(0x21 * 4, 0x1234_5678);
    guest.core.cpu.idtr.limit = 0x3ff;
    guest.execute(&[0xcd, 0x21]).unwrap();
    assert_eq!(rsp(&guest), STACK - 8);
    assert_eq!(guest.words::<2, 3>(rsp(&guest)), [CODE + 2, 0, FLAGS]);
    let cpu = &guest.core.cpu;
    assert_eq!((cpu.cs().selector, cpu.cs().base, cpu.rip), (0x1234, 0x12340, 0x5678));
    assert!(!cpu.flags.control(bits::IF));
    // IRET goes back.
    guest.execute(&[0xcf]).unwrap();
    let cpu = &guest.core.cpu;
    assert_eq!((cpu.cs().selector, cpu.rip, rsp(&guest)), (0, CODE + 2, STACK - 2));
    assert_eq!(cpu.flags.get(), FLAGS);
}

#[test]
fn real_mode_exceptions_push_no_error_code() {
    let mut guest = Guest::real();
    guest.write::<4>(u64::from(vector::GP) * 4, 0x9000);
    take(&mut guest, Event::Exception(Exception::with_error(vector::GP, 5)));
    assert_eq!(rsp(&guest), STACK - 8);
    assert_eq!(guest.core.cpu.rip, 0x9000);
}

#[test]
fn protected_mode_frame_of_the_same_level() {
    let mut guest = with_flags(Guest::protected());
    guest.gate(vector::GP, CODE_32, 0x1_9000, INTERRUPT, 0);
    take(&mut guest, Event::Exception(Exception::with_error(vector::GP, 0x77)));
    assert_eq!(rsp(&guest), STACK - 16);
    let frame = [0x77, CODE, CODE_32.into(), FLAGS | bits::RF];
    assert_eq!(guest.words::<4, 4>(rsp(&guest)), frame);
    assert_eq!(guest.core.cpu.rip, 0x1_9000);
}

#[test]
fn protected_mode_frame_of_an_inner_level() {
    let mut guest = with_flags(Guest::protected());
    guest.set_segments(USER_CODE_32, USER_DATA);
    guest.gate(0x40, CODE_32, HANDLER, INTERRUPT | 0x60, 0);
    guest.execute(&[0xcd, 0x40]).unwrap();
    assert_eq!(rsp(&guest), INNER_STACK - 20);
    let frame = [CODE + 2, USER_CODE_32.into(), FLAGS, STACK, USER_DATA.into()];
    assert_eq!(guest.words::<4, 5>(rsp(&guest)), frame);
    assert_eq!(guest.core.cpu.segment(index::SS).selector, DATA);
    // IRET goes back.
    guest.execute(&[0xcf]).unwrap();
    let cpu = &guest.core.cpu;
    assert_eq!((cpu.cs().selector, cpu.segment(index::SS).selector), (USER_CODE_32, USER_DATA));
    assert_eq!((cpu.rip, rsp(&guest), guest.core.mode.cpl), (CODE + 2, STACK, 3));
}

#[test]
fn narrow_gates_push_words() {
    let mut guest = with_flags(Guest::protected());
    guest.gate(vector::UD, CODE_32, 0x1_9000, 0x86, 0);
    take(&mut guest, Event::Exception(Exception::new(vector::UD)));
    assert_eq!(rsp(&guest), STACK - 6);
    assert_eq!(guest.words::<2, 3>(rsp(&guest)), [CODE, CODE_32.into(), FLAGS]);
    assert_eq!(guest.core.cpu.rip, 0x9000);
}

#[test]
fn inner_stack_lies_within_the_task_with_its_unused_half() {
    let mut guest = Guest::protected();
    guest.set_segments(USER_CODE_32, USER_DATA);
    guest.gate(0x40, CODE_32, HANDLER, INTERRUPT | 0x60, 0);
    // ESP0 and SS0 are at offsets 4 to 11.
    guest.core.cpu.tr.limit = 10;
    assert_eq!(guest.fault(&[0xcd, 0x40]), Exception::with_error(vector::TS, TASK));
    guest.core.cpu.tr.limit = 11;
    guest.execute(&[0xcd, 0x40]).unwrap();
    assert_eq!(guest.core.mode.cpl, 0);
}

#[test]
fn inner_stack_segment_is_judged_as_the_tasks() {
    let mut guest = Guest::protected();
    guest.set_segments(USER_CODE_32, USER_DATA);
    guest.gate(0x40, CODE_32, HANDLER, INTERRUPT | 0x60, 0);
    guest.write::<2>(TSS + 8, USER_DATA.into());
    assert_eq!(guest.fault(&[0xcd, 0x40]), Exception::with_error(vector::TS, USER_DATA & !3));
    // No room: the new stack segment's fault.
    guest.descriptor(FREE, 0x0040_9300_0000_000f);
    guest.write::<2>(TSS + 8, FREE.into());
    guest.write::<4>(TSS + 4, 0x10);
    assert_eq!(guest.fault(&[0xcd, 0x40]), Exception::with_error(vector::SS, FREE));
    assert_eq!((guest.core.cpu.rip, rsp(&guest), guest.core.mode.cpl), (CODE, STACK, 3));
}

fn virtual_8086(iopl: u64) -> Guest {
    let mut guest = Guest::protected();
    for (segment, selector) in [0x100, 0, 0x200, 0x300, 0x400, 0x500].into_iter().enumerate() {
        *guest.core.cpu.segment_mut(segment) = SegmentRegister::virtual_8086(selector);
    }
    guest.core.cpu.set_r(RSP, 0x7000);
    guest.core.cpu.flags.set(bits::FIXED | bits::VM | bits::IF | iopl << 12);
    guest.core.update_mode();
    guest
}

#[test]
fn virtual_8086_frame_and_back() {
    let mut guest = virtual_8086(3);
    guest.gate(0x13, CODE_32, HANDLER, INTERRUPT | 0x60, 0);
    guest.execute(&[0xcd, 0x13]).unwrap();
    assert_eq!(rsp(&guest), INNER_STACK - 36);
    let flags = bits::FIXED | bits::VM | bits::IF | bits::IOPL;
    let frame = [CODE + 2, 0, flags, 0x7000, 0x200, 0x100, 0x300, 0x400, 0x500];
    assert_eq!(guest.words::<4, 9>(rsp(&guest)), frame);
    let cpu = &guest.core.cpu;
    assert!(cpu.segment(index::DS).is_unusable() && cpu.segment(index::GS).is_unusable());
    assert!(!cpu.virtual_8086());
    guest.execute(&[0xcf]).unwrap();
    let cpu = &guest.core.cpu;
    assert_eq!((cpu.rip, rsp(&guest), cpu.flags.get()), (CODE + 2, 0x7000, flags));
    assert_eq!((cpu.segment(index::GS).base, cpu.segment(index::SS).base), (0x5000, 0x2000));
    assert_eq!((guest.core.mode.cpl, guest.core.mode.code_bits), (3, 16));
}

#[test]
fn virtual_8086_interrupts_need_iopl() {
    let mut guest = virtual_8086(2);
    guest.gate(0x13, CODE_32, HANDLER, INTERRUPT | 0x60, 0);
    guest.gate(vector::BP, CODE_32, HANDLER, INTERRUPT | 0x60, 0);
    assert_eq!(guest.fault(&[0xcd, 0x13]), Exception::with_error(vector::GP, 0));
    assert_eq!(guest.fault(&[0xfa]), Exception::with_error(vector::GP, 0));
    assert_eq!(guest.fault(&[0x9c]), Exception::with_error(vector::GP, 0));
    guest.execute(&[0xcc]).unwrap();
    assert_eq!(guest.core.mode.cpl, 0);
}

#[test]
fn virtual_8086_gates_lead_to_level_0_only() {
    let mut guest = virtual_8086(3);
    guest.gate(0x13, USER_CODE_32, HANDLER, INTERRUPT | 0x60, 0);
    assert_eq!(guest.fault(&[0xcd, 0x13]), Exception::with_error(vector::GP, USER_CODE_32 & !3));
}

#[test]
fn task_gates_switch_tasks_and_push_the_error_code() {
    let mut guest = with_flags(Guest::protected());
    let other = 0x3800;
    guest.descriptor(FREE, 0x0000_8900_0000_0067 | other << 16);
    guest.write::<4>(other + 0x20, HANDLER);
    guest.write::<4>(other + 0x24, bits::FIXED);
    guest.write::<4>(other + 0x38, 0x1_6000);
    for (slot, selector) in [DATA, CODE_32, DATA, DATA].into_iter().enumerate() {
        guest.write::<2>(other + 0x48 + slot as u64 * 4, selector.into());
    }
    guest.gate(vector::DF, FREE, 0, 0x85, 0);
    take(&mut guest, Event::Exception(Exception::with_error(vector::DF, 0)));
    let cpu = &guest.core.cpu;
    assert_eq!((cpu.rip, rsp(&guest), guest.read::<4>(0x1_5ffc)), (HANDLER, 0x1_6000 - 4, 0));
    assert_eq!((cpu.tr.selector, cpu.flags.get()), (FREE, bits::FIXED | bits::NT));
    assert_eq!((guest.read::<2>(other), guest.read::<4>(TSS + 0x20)), (TASK.into(), CODE));
    assert_eq!(guest.read::<1>(GDT + u64::from(FREE) + 5), 0x8b);
    // IRET returns to the old task.
    guest.execute(&[0xcf]).unwrap();
    let cpu = &guest.core.cpu;
    assert_eq!((cpu.rip, rsp(&guest), cpu.tr.selector, cpu.flags.get()), (CODE, STACK, TASK, FLAGS));
    assert_eq!(guest.read::<1>(GDT + u64::from(FREE) + 5), 0x89);
    assert_eq!(guest.read::<4>(other + 0x20), HANDLER + 1);
}
