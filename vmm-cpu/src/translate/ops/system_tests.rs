use crate::translate::cpu::{RAX, RCX, RDX, cr0, cr4, efer};
use crate::translate::exception::vector;
use crate::translate::flags::bits;
use crate::translate::test_support::{Guest, USER_CODE_64, USER_DATA};
use crate::vm::Hypercalls;

fn user() -> Guest {
    let mut guest = Guest::long();
    guest.set_segments(USER_CODE_64, USER_DATA);
    guest
}

#[test]
fn programs_have_no_privileges() {
    // HLT, MOV CR0, MOV DR7, RDMSR, WRMSR, INVLPG, CLTS, LMSW, WBINVD.
    let codes: [&[u8]; 9] = [
        &[0xf4],
        &[0x0f, 0x22, 0xc0],
        &[0x0f, 0x23, 0xf8],
        &[0x0f, 0x32],
        &[0x0f, 0x30],
        &[0x0f, 0x01, 0x38],
        &[0x0f, 0x06],
        &[0x0f, 0x01, 0xf0],
        &[0x0f, 0x09],
    ];
    for code in codes {
        let fault = user().fault(code);
        assert_eq!((fault.vector, fault.error), (vector::GP, Some(0)), "{code:x?}");
    }
    // STAC and CLAC do not exist for them.
    for code in [[0x0f, 0x01, 0xcb], [0x0f, 0x01, 0xca]] {
        assert_eq!(user().fault(&code).vector, vector::UD, "{code:x?}");
    }
}

#[test]
fn programs_make_no_hypercalls() {
    let mut guest = user();
    guest.core.shared.passed_on.pass_on(5).unwrap();
    guest.core.cpu.set_r(RAX, 5);
    guest.execute(&[0x0f, 0x01, 0xc1]).unwrap();
    assert_eq!((guest.core.cpu.r(RAX).cast_signed(), guest.core.counts.hypercall), (-1, 0));
    let mut guest = Guest::long();
    guest.core.shared.passed_on.pass_on(5).unwrap();
    guest.core.cpu.set_r(RAX, 5);
    guest.execute(&[0x0f, 0x01, 0xc1]).unwrap();
    assert_eq!((guest.core.cpu.r(RAX).cast_signed(), guest.core.counts.hypercall), (-1000, 1));
    guest.core.cpu.set_r(RAX, 6);
    assert_eq!(guest.fault(&[0x0f, 0x01, 0xc1]).vector, vector::UD);
}

#[test]
fn control_registers_refuse_what_cannot_be() {
    let mut guest = Guest::long();
    let (old_0, old_4) = (guest.core.cpu.cr0, guest.core.cpu.cr4);
    let cases: [(&[u8], u64); 7] = [
        // Paging without protection, NW without CD, paging off in 64-bit code, high bits.
        (&[0x0f, 0x22, 0xc0], cr0::PG),
        (&[0x0f, 0x22, 0xc0], old_0 & !cr0::CD | cr0::NW),
        (&[0x0f, 0x22, 0xc0], cr0::PE),
        (&[0x0f, 0x22, 0xc0], old_0 | 1 << 32),
        // PAE off in long mode, a reserved bit, an address that is too long.
        (&[0x0f, 0x22, 0xe0], old_4 & !cr4::PAE),
        (&[0x0f, 0x22, 0xe0], old_4 | 1 << 23),
        (&[0x0f, 0x22, 0xd8], 1 << 50),
    ];
    for (code, value) in cases {
        guest.core.cpu.set_r(RAX, value);
        let fault = guest.fault(code);
        assert_eq!((fault.vector, fault.error), (vector::GP, Some(0)), "{code:x?} {value:#x}");
        assert_eq!((guest.core.cpu.cr0, guest.core.cpu.cr4), (old_0, old_4));
    }
}

#[test]
fn long_mode_begins_with_paging() {
    let mut guest = Guest::protected();
    (guest.core.cpu.efer, guest.core.cpu.cr3) = (efer::LME, 0x4000);
    let paged = guest.core.cpu.cr0 | cr0::PG;
    guest.core.cpu.set_r(RAX, paged);
    // Not without PAE.
    assert_eq!(guest.fault(&[0x0f, 0x22, 0xc0]).vector, vector::GP);
    assert_eq!(guest.core.cpu.efer, efer::LME);
    guest.core.cpu.cr4 |= cr4::PAE;
    guest.execute(&[0x0f, 0x22, 0xc0]).unwrap();
    assert_eq!((guest.core.cpu.efer, guest.core.mode.code_bits), (efer::LME | efer::LMA, 32));
    guest.core.cpu.set_r(RAX, paged & !cr0::PG);
    guest.execute(&[0x0f, 0x22, 0xc0]).unwrap();
    assert_eq!(guest.core.cpu.efer, efer::LME);
}

#[test]
fn lmsw_does_not_leave_protected_mode() {
    let mut guest = Guest::protected();
    guest.core.cpu.set_r(RAX, cr0::TS);
    guest.execute(&[0x0f, 0x01, 0xf0]).unwrap();
    assert_eq!(guest.core.cpu.cr0 & 0xf, cr0::PE | cr0::TS);
    guest.execute(&[0x0f, 0x06]).unwrap();
    assert_eq!(guest.core.cpu.cr0 & 0xf, cr0::PE);
}

#[test]
fn debug_registers_have_fixed_bits_and_a_guard() {
    let mut guest = Guest::protected();
    guest.core.cpu.set_r(RAX, 0xffff_ffff);
    // MOV DR6, EAX; MOV DR7, EAX without GD.
    guest.execute(&[0x0f, 0x23, 0xf0]).unwrap();
    assert_eq!(guest.core.cpu.dr6, 0xffff_efff);
    guest.core.cpu.set_r(RAX, 0xffff_dfff);
    guest.execute(&[0x0f, 0x23, 0xf8]).unwrap();
    assert_eq!(guest.core.cpu.dr7, 0xffff_07ff);
    guest.core.cpu.dr7 = 0x2400;
    let fault = guest.fault(&[0x0f, 0x21, 0xc0]);
    assert_eq!((fault.vector, fault.dr6), (vector::DB, 1 << 13));
    // DR4 is DR6 unless CR4.DE is on.
    guest.core.cpu.dr7 = 0x400;
    guest.execute(&[0x0f, 0x21, 0xe1]).unwrap();
    assert_eq!(guest.core.cpu.r(RCX), 0xffff_efff);
    guest.core.cpu.cr4 |= cr4::DE;
    assert_eq!(guest.fault(&[0x0f, 0x21, 0xe1]).vector, vector::UD);
}

#[test]
fn time_can_be_kept_from_programs() {
    let mut guest = user();
    guest.execute(&[0x0f, 0x31]).unwrap();
    guest.core.cpu.cr4 |= cr4::TSD;
    assert_eq!(guest.fault(&[0x0f, 0x31]).vector, vector::GP);
    let mut guest = Guest::long();
    guest.core.cpu.cr4 |= cr4::TSD;
    guest.core.cpu.set_r(RDX, u64::MAX);
    guest.execute(&[0x0f, 0x31]).unwrap();
    assert_eq!(guest.core.cpu.r(RDX), 0);
}

#[test]
fn bases_of_segments_are_canonical_and_need_permission() {
    let mut guest = user();
    // WRFSBASE RAX.
    let write = [0xf3, 0x48, 0x0f, 0xae, 0xd0];
    assert_eq!(guest.fault(&write).vector, vector::UD);
    guest.core.cpu.cr4 |= cr4::FSGSBASE;
    guest.core.cpu.set_r(RAX, 1 << 47);
    assert_eq!(guest.fault(&write).vector, vector::GP);
    guest.core.cpu.set_r(RAX, 0xffff_8000_0000_0000);
    guest.execute(&write).unwrap();
    // RDFSBASE ECX.
    guest.execute(&[0xf3, 0x0f, 0xae, 0xc1]).unwrap();
    assert_eq!(guest.core.cpu.r(RCX), 0);
}

#[test]
fn hidden_lifts_of_smap_last_until_cleared() {
    let mut guest = Guest::long();
    guest.core.cpu.cr4 |= cr4::SMAP;
    guest.core.update_mode();
    // MOV ECX, [RAX]: all pages are the user's.
    guest.core.cpu.set_r(RAX, 0x9000);
    assert_eq!(guest.fault(&[0x8b, 0x08]).error, Some(1));
    guest.execute(&[0x0f, 0x01, 0xcb]).unwrap();
    assert!(guest.core.cpu.flags.control(bits::AC));
    guest.execute(&[0x8b, 0x08]).unwrap();
    guest.execute(&[0x0f, 0x01, 0xca]).unwrap();
    assert_eq!(guest.fault(&[0x8b, 0x08]).error, Some(1));
}
