use crate::translate::cpu::{RSP, cr4};
use crate::translate::exception::{Exception, vector};
use crate::translate::flags::bits;
use crate::translate::memory::Reach;
use crate::translate::test_support::*;

/// Executes POPFQ of `image`; RFLAGS then.
fn popfq(guest: &mut Guest, image: u64) -> u64 {
    guest.core.cpu.set_r(RSP, STACK);
    guest.write::<8>(STACK, image);
    guest.execute(&[0x9d]).unwrap();
    assert_eq!(guest.core.cpu.r(RSP), STACK + 8);
    guest.core.cpu.flags.get()
}

#[test]
fn popf_changes_what_the_level_allows() {
    let mut guest = Guest::long();
    let all = bits::ALL & !(bits::RF | bits::VM | bits::VIF | bits::VIP);
    assert_eq!(popfq(&mut guest, u64::MAX), all);
    guest.core.cpu.flags.set(bits::IF);
    guest.set_segments(USER_CODE_64, USER_DATA);
    assert_eq!(popfq(&mut guest, u64::MAX), all & !bits::IOPL);
    assert_eq!(popfq(&mut guest, 0), bits::FIXED | bits::IF);
    guest.core.cpu.flags.set(bits::IOPL | bits::IF);
    assert_eq!(popfq(&mut guest, 0), bits::FIXED | bits::IOPL);
}

#[test]
fn narrow_popf_leaves_the_upper_half() {
    let mut guest = Guest::long();
    guest.core.cpu.flags.set(bits::AC | bits::ID);
    guest.write::<2>(STACK, 0);
    guest.execute(&[0x66, 0x9d]).unwrap();
    assert_eq!(guest.core.cpu.flags.get(), bits::AC | bits::ID | bits::FIXED);
    assert_eq!(guest.core.cpu.r(RSP), STACK + 2);
}

#[test]
fn popf_lifts_smap() {
    let mut guest = Guest::long();
    guest.core.cpu.cr4 |= cr4::SMAP;
    guest.core.update_mode();
    assert_eq!(guest.core.mode.reach, Reach::Supervisor);
    // The stack is a page of level 3.
    assert_eq!(guest.fault(&[0x9d]).vector, vector::PF);
    guest.core.cpu.cr4 &= !cr4::SMAP;
    guest.core.update_mode();
    guest.write::<8>(STACK, bits::AC);
    guest.core.cpu.cr4 |= cr4::SMAP;
    guest.execute(&[0x9d]).unwrap();
    assert_eq!(guest.core.mode.reach, Reach::SupervisorAll);
}

#[test]
fn pushf_hides_vm_and_rf() {
    let mut guest = Guest::long();
    guest.core.cpu.flags.set(bits::RF | bits::ZF | bits::IF);
    guest.execute(&[0x9c]).unwrap();
    assert_eq!(guest.read::<8>(STACK - 8), bits::FIXED | bits::ZF | bits::IF);
}

#[test]
fn sti_holds_interrupts_off_once() {
    let mut guest = Guest::long();
    guest.execute(&[0xfb]).unwrap();
    assert!(guest.core.cpu.shadow_sti && guest.core.cpu.flags.control(bits::IF));
    guest.core.cpu.shadow_sti = false;
    guest.execute(&[0xfb]).unwrap();
    assert!(!guest.core.cpu.shadow_sti);
    guest.execute(&[0xfa]).unwrap();
    assert!(!guest.core.cpu.flags.control(bits::IF));
}

#[test]
fn interrupt_flag_belongs_to_iopl() {
    let mut guest = Guest::long();
    guest.set_segments(USER_CODE_64, USER_DATA);
    for code in [0xfa, 0xfb] {
        assert_eq!(guest.fault(&[code]), Exception::with_error(vector::GP, 0));
    }
    guest.core.cpu.flags.set(bits::IOPL);
    guest.execute(&[0xfb]).unwrap();
    assert!(guest.core.cpu.flags.control(bits::IF));
}
