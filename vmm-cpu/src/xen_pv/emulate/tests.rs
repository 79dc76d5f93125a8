use super::super::abi::nr;
use super::super::abi::vcpu::TrapInfo;
use super::super::test_support::{DIRECT, FREE, Guest, L1};
use super::*;
use crate::cpuid::{CpuidEntry, CpuidTable};

const HANDLER: u64 = 0xffff_ffff_8123_4560;

/// A guest kernel about to execute these bytes.
fn guest(code: &[u8]) -> Guest {
    let mut guest = Guest::new();
    for (vector, trap) in (0..).zip(guest.vcpu.traps.iter_mut().take(32)) {
        *trap = TrapInfo { vector, flags: 0, cs: 0x10, pad: 0, address: HANDLER + u64::from(vector) };
    }
    let rip = guest.put_bytes(code);
    guest.engine.context.general.rip = rip;
    guest
}

/// Lets it fault and expects that the instruction was done.
fn runs(guest: &mut Guest, len: u64) {
    let rip = guest.engine.context.general.rip;
    assert_eq!(guest.exception(13, 0, 0), Action::Continue);
    assert_eq!(guest.engine.context.general.rip, rip + len);
}

/// Lets it fault and expects that the guest hears of it.
fn faults(guest: &mut Guest) {
    assert_eq!(guest.exception(13, 0, 0), Action::Continue);
    assert_eq!(guest.engine.context.general.rip, HANDLER + 13);
}

#[test]
fn bases_are_written_and_read() {
    for (index, value) in [(msr::FS_BASE, 1_u64), (msr::GS_BASE, u64::MAX - 5), (msr::KERNEL_GS_BASE, 3)] {
        let mut guest = guest(&[0x0f, 0x30, 0x0f, 0x32]);
        let general = &mut guest.engine.context.general;
        (general.rcx, general.rax, general.rdx) = (index.into(), value | 7 << 32, value >> 32 | 7 << 32);
        runs(&mut guest, 2);
        guest.engine.context.general.rax = 0;
        runs(&mut guest, 2);
        let general = guest.engine.context.general;
        assert_eq!((general.rax, general.rdx), (value & 0xffff_ffff, value >> 32));
        let mut guest = self::guest(&[0x0f, 0x30]);
        guest.engine.context.general.rcx = index.into();
        guest.engine.context.general.rdx = 1 << 31;
        faults(&mut guest);
    }
}

#[test]
fn registers_that_are_not_there_fault_once_the_guest_can_take_it() {
    for code in [[0x0f, 0x32], [0x0f, 0x30]] {
        let mut guest = guest(&code);
        guest.engine.context.general.rcx = 0x1234;
        faults(&mut guest);
        let mut guest = self::guest(&code);
        guest.vcpu.traps.fill(TrapInfo::default());
        guest.engine.context.general.rcx = 0x1234;
        runs(&mut guest, 2);
    }
    for (index, value) in [(msr::EFER, EFER), (msr::PAT, PAT), (msr::APIC_BASE, APIC_BASE | APIC_BASE_BSP)] {
        let mut guest = guest(&[0x0f, 0x32, 0x0f, 0x30, 0x0f, 0x30]);
        guest.engine.context.general.rcx = index.into();
        runs(&mut guest, 2);
        let general = guest.engine.context.general;
        assert_eq!(general.rax | general.rdx << 32, value);
        runs(&mut guest, 2);
        if index != msr::APIC_BASE {
            guest.engine.context.general.rax ^= 1;
            faults(&mut guest);
        }
    }
}

#[test]
fn control_registers() {
    // mov rbx, cr4; mov cr4, r9; mov rbx, cr4
    let mut guest = guest(&[0x0f, 0x20, 0xe3, 0x41, 0x0f, 0x22, 0xe1, 0x0f, 0x20, 0xe3]);
    runs(&mut guest, 3);
    assert_eq!(guest.engine.context.general.rbx, CR4_AT_START);
    guest.engine.context.general.r9 = 0x4_0620;
    runs(&mut guest, 4);
    runs(&mut guest, 3);
    assert_eq!(guest.engine.context.general.rbx, 0x4_0620);
    // mov cr0, rax; mov rax, cr0; clts; mov rax, cr0
    let mut guest = self::guest(&[0x0f, 0x22, 0xc0, 0x0f, 0x20, 0xc0, 0x0f, 0x06, 0x0f, 0x20, 0xc0]);
    guest.engine.context.general.rax = CR0_TS;
    runs(&mut guest, 3);
    assert!(guest.engine.task_switched);
    runs(&mut guest, 3);
    assert_eq!(guest.engine.context.general.rax, CR0 | CR0_TS);
    runs(&mut guest, 2);
    assert!(!guest.engine.task_switched);
    runs(&mut guest, 3);
    assert_eq!(guest.engine.context.general.rax, CR0);
    // mov rax, cr3; mov cr3, rax
    let mut guest = self::guest(&[0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8]);
    runs(&mut guest, 3);
    assert_eq!(guest.engine.context.general.rax, guest.engine.kernel_root);
    faults(&mut guest);
    // mov cr8, rax
    faults(&mut self::guest(&[0x44, 0x0f, 0x22, 0xc0]));
}

#[test]
fn debug_registers() {
    // mov dr7, rax; mov rbx, dr7
    let mut guest = guest(&[0x0f, 0x23, 0xf8, 0x0f, 0x21, 0xfb]);
    guest.engine.context.general.rax = 0x400;
    runs(&mut guest, 3);
    runs(&mut guest, 3);
    assert_eq!(guest.engine.context.general.rbx, 0x400);
}

#[test]
fn xsetbv_asks_the_engine() {
    for (cr4, xcr0, allowed) in [(CR4_OSXSAVE, 7, true), (0, 7, false), (CR4_OSXSAVE, 0x207, false)] {
        let mut guest = guest(&[0x0f, 0x01, 0xd1]);
        guest.vcpu.control.cr4 = cr4;
        guest.engine.context.general.rax = xcr0;
        if allowed {
            runs(&mut guest, 3);
            assert_eq!(guest.engine.xcr0, 7);
        } else {
            faults(&mut guest);
        }
    }
}

#[test]
fn ports_are_empty() {
    for (code, len, expected) in [
        (&[0xe4, 0x60][..], 2, 0x1122_3344_5566_77ff_u64),
        (&[0x66, 0xed], 2, 0x1122_3344_5566_ffff),
        (&[0xed], 1, 0xffff_ffff),
        (&[0xe4, 0x42], 2, 0x1122_3344_5566_7700),
        (&[0xe6, 0x80], 2, 0x1122_3344_5566_7788),
        (&[0xef], 1, 0x1122_3344_5566_7788),
    ] {
        let mut guest = guest(code);
        guest.engine.context.general.rax = 0x1122_3344_5566_7788;
        guest.engine.context.general.rdx = 0xffff_0cf8;
        runs(&mut guest, len);
        assert_eq!(guest.engine.context.general.rax, expected, "{code:x?}");
    }
    // String input would store.
    faults(&mut guest(&[0x6c]));
}

#[test]
fn interrupt_flag_and_caches_are_left_alone() {
    for code in [&[0xfa][..], &[0xfb], &[0x0f, 0x09], &[0x0f, 0x08]] {
        let mut guest = guest(code);
        guest.set_mask(true);
        runs(&mut guest, code.len() as u64);
        assert_eq!(guest.info_byte(shared_info::UPCALL_MASK), 1, "{code:x?}");
    }
}

#[test]
fn hlt_waits() {
    let mut guest = guest(&[0xf4]);
    let rip = guest.engine.context.general.rip;
    guest.set_mask(true);
    assert_eq!(guest.exception(13, 0, 0), Action::Block);
    assert_eq!(guest.engine.context.general.rip, rip + 1);
    assert_eq!(guest.info_byte(shared_info::UPCALL_MASK), 0);
}

#[test]
fn other_faults_are_the_guests() {
    for code in [&[0x0f, 0x01, 0x10][..], &[0x48, 0xcf], &[0xff], &[0x8e, 0xd8]] {
        faults(&mut guest(code));
    }
    // A selector that cannot be loaded.
    let mut guest = guest(&[0xfa]);
    guest.exception(13, 0x58, 0);
    assert_eq!(guest.engine.context.general.rip, HANDLER + 13);
    // Code that is not there any more.
    let mut guest = self::guest(&[]);
    guest.engine.context.general.rip = 0x1000;
    faults(&mut guest);
}

#[test]
fn programs_have_no_privileges() {
    let mut guest = guest(&[0xfa]);
    guest.engine.user_root = Some(guest.engine.kernel_root);
    guest.engine.context.mode = GuestMode::User;
    guest.engine.context().kernel_sp = DIRECT + 0x9_0000;
    faults(&mut guest);
    // Without page tables for them either.
    let mut guest = self::guest(&[0xfa]);
    guest.engine.context.mode = GuestMode::User;
    guest.engine.context().kernel_sp = DIRECT + 0x9_0000;
    faults(&mut guest);
}

#[test]
fn an_instruction_at_the_end_of_memory() {
    let mut guest = guest(&[]);
    guest.store(L1 + 2, 1, 0);
    let rip = DIRECT + FREE * 4096 + 4095;
    guest.domain.memory.write(FREE * 4096 + 4095, &[0xfa]).unwrap();
    guest.engine.context.general.rip = rip;
    runs(&mut guest, 1);
}

#[test]
fn cpuid_with_xens_prefix() {
    let code = [0x0f, 0x0b, b'x', b'e', b'n', 0x0f, 0xa2];
    let mut guest = guest(&code);
    let rip = guest.engine.context.general.rip;
    let general = &mut guest.engine.context.general;
    general.rax = 0xffff_ffff_4000_0000;
    assert_eq!(guest.exception(6, 0, 0), Action::Continue);
    let general = guest.engine.context.general;
    assert_eq!(
        (general.rip, general.rax, general.rbx),
        (rip + 7, 0x4000_0002, u32::from_le_bytes(*b"XenV").into())
    );
    // Linux looks for OSXSAVE before it sets it, and uses no XSAVE otherwise.
    for cr4 in [0, CR4_OSXSAVE] {
        guest.vcpu.control.cr4 = cr4;
        guest.engine.context.general.rip = rip;
        guest.engine.context.general.rax = 1;
        guest.exception(6, 0, 0);
        let ecx = low(guest.engine.context.general.rcx);
        for feature in [Feature::XSAVE, Feature::OSXSAVE, Feature::HYPERVISOR] {
            assert_ne!(ecx & feature.mask(), 0, "{feature} with CR4 {cr4:#x}");
        }
    }
    // A leaf that is not there.
    guest.engine.context.general.rip = rip;
    guest.engine.context.general.rax = 0x1234;
    guest.exception(6, 0, 0);
    assert_eq!(guest.engine.context.general.rbx, 0);
    // The prefix alone is what it says.
    let mut guest = self::guest(&code[..5]);
    guest.exception(6, 0, 0);
    assert_eq!(guest.engine.context.general.rip, HANDLER + 6);
}

#[test]
fn a_processor_without_xsave_shows_no_osxsave() {
    let leaf = CpuidEntry::new(1, None, [0, 0, Feature::OSXSAVE.mask(), 0]);
    let mut guest = Guest::with(|config| config.cpuid = CpuidTable::new(vec![leaf]));
    guest.vcpu.control.cr4 = CR4_OSXSAVE;
    guest.engine.context.general.rip = guest.put_bytes(&[0x0f, 0x0b, b'x', b'e', b'n', 0x0f, 0xa2]);
    guest.engine.context.general.rax = 1;
    assert_eq!(guest.exception(6, 0, 0), Action::Continue);
    assert_eq!(guest.engine.context.general.rcx, 0);
}

#[test]
fn int_reaches_handlers_that_allow_it() {
    for (vector, error_code) in [(13, 0x80 << 3 | 2), (6, 0)] {
        for (dpl, mode, allowed) in [
            (0, GuestMode::Kernel, false),
            (1, GuestMode::Kernel, true),
            (1, GuestMode::User, false),
            (3, GuestMode::User, true),
        ] {
            let mut guest = guest(&[0xcd, 0x80]);
            guest.engine.user_root = Some(guest.engine.kernel_root);
            guest.engine.context.mode = mode;
            guest.engine.context().kernel_sp = DIRECT + 0x9_0000;
            guest.vcpu.traps[0x80] =
                TrapInfo { vector: 0x80, flags: dpl, address: HANDLER + 0x80, ..Default::default() };
            let rip = guest.engine.context.general.rip;
            assert_eq!(guest.exception(vector, error_code, 0), Action::Continue);
            let rsp = guest.engine.context.general.rsp;
            if allowed {
                assert_eq!(guest.engine.context.general.rip, HANDLER + 0x80);
                assert_eq!(guest.get::<u64>(rsp + 16), rip + 2);
            } else {
                assert_eq!(guest.engine.context.general.rip, HANDLER + 13, "level {dpl}, {mode:?}");
                assert_eq!(guest.get::<u64>(rsp + 16), 0x80 << 3 | 2);
            }
        }
    }
    assert_eq!(guest(&[]).call(nr::XEN_VERSION, &[7, 0]), Ok(4096));
}
