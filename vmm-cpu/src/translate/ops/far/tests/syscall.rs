use crate::translate::cpu::{R11, RCX, RDX, RSP, efer};
use crate::translate::exception::{dr6, vector};
use crate::translate::flags::bits;
use crate::translate::segment::{attribute, index};
use crate::translate::test_support::*;

const SYSCALL: [u8; 2] = [0x0f, 0x05];
const SYSRETQ: [u8; 3] = [0x48, 0x0f, 0x07];
const SYSRETD: [u8; 2] = [0x0f, 0x07];
const ENTRY: u64 = 0xffff_8000_0000_9000;

fn guest() -> Guest {
    let mut guest = Guest::long();
    let cpu = &mut guest.core.cpu;
    cpu.efer |= efer::SCE;
    cpu.msr.star = 0x0023_0010_0000_0000;
    (cpu.msr.lstar, cpu.msr.cstar) = (ENTRY, ENTRY + 0x100);
    cpu.msr.fmask = bits::IF | bits::TF;
    guest.set_segments(USER_CODE_64, USER_DATA);
    guest.core.cpu.flags.set(bits::IF | bits::CF);
    guest
}

#[test]
fn there_and_back() {
    let mut guest = guest();
    guest.execute(&SYSCALL).unwrap();
    let cpu = &guest.core.cpu;
    assert_eq!((cpu.rip, cpu.r(RCX), cpu.r(R11)), (ENTRY, CODE + 2, bits::IF | bits::CF | bits::FIXED));
    assert_eq!((cpu.cs().selector, cpu.segment(index::SS).selector), (0x10, 0x18));
    assert_eq!((cpu.flags.get(), guest.core.mode.cpl), (bits::CF | bits::FIXED, 0));
    guest.execute(&SYSRETQ).unwrap();
    let cpu = &guest.core.cpu;
    assert_eq!((cpu.cs().selector, cpu.segment(index::SS).selector), (0x33, 0x2b));
    assert_eq!((cpu.rip, cpu.flags.get()), (CODE + 2, bits::IF | bits::CF | bits::FIXED));
    assert_eq!((guest.core.mode.cpl, guest.core.mode.code_bits), (3, 64));
}

#[test]
fn the_flags_that_are_left_decide_about_a_single_step() {
    let mut guest = guest();
    guest.core.trap_pending = true;
    guest.core.cpu.flags.set(bits::TF);
    guest.execute(&SYSCALL).unwrap();
    assert!(!guest.core.trap_pending);
    // There, and back with TF: the trap comes before the next instruction.
    let handler = 0xa000;
    guest.gate(vector::DB, CODE_64, handler, 0x8e, 0);
    guest.execute(&SYSRETQ).unwrap();
    let cpu = &guest.core.cpu;
    assert_eq!((cpu.rip, cpu.dr6 & dr6::BS), (handler, dr6::BS));
    let [rip, cs, flags] = guest.words::<8, 3>(INNER_STACK - 40);
    assert_eq!((rip, cs, flags), (CODE + 2, USER_CODE_64.into(), bits::TF | bits::FIXED));
    // A mask that keeps TF keeps the trap.
    guest.core.trap_pending = true;
    guest.core.cpu.msr.fmask = 0;
    guest.core.cpu.flags.set(bits::TF);
    guest.execute(&SYSCALL).unwrap();
    assert!(guest.core.trap_pending);
}

#[test]
fn compatibility_mode_has_its_own_entry() {
    let mut guest = guest();
    guest.set_segments(USER_CODE_32, USER_DATA);
    guest.execute(&SYSCALL).unwrap();
    assert_eq!((guest.core.cpu.rip, guest.core.mode.code_bits), (ENTRY + 0x100, 64));
    guest.core.cpu.set_r(RCX, 0xffff_ffff_0000_8002);
    guest.execute(&SYSRETD).unwrap();
    let cpu = &guest.core.cpu;
    assert_eq!((cpu.rip, cpu.cs().selector, guest.core.mode.code_bits), (0x8002, 0x23, 32));
}

#[test]
fn system_calls_can_be_off_and_returns_are_privileged() {
    let mut guest = guest();
    assert_eq!(guest.fault(&SYSRETQ).vector, vector::GP);
    guest.core.cpu.efer &= !efer::SCE;
    assert_eq!(guest.fault(&SYSCALL).vector, vector::UD);
}

#[test]
fn sysenter_and_sysexit() {
    let mut guest = Guest::protected();
    guest.set_segments(USER_CODE_32, USER_DATA);
    assert_eq!(guest.fault(&[0x0f, 0x34]).vector, vector::GP);
    let msr = &mut guest.core.cpu.msr;
    (msr.sysenter_cs, msr.sysenter_esp, msr.sysenter_eip) = (0x60, 0x5000, 0x6000);
    guest.core.cpu.flags.set(bits::IF | bits::SF);
    guest.execute(&[0x0f, 0x34]).unwrap();
    let cpu = &guest.core.cpu;
    assert_eq!((cpu.cs().selector, cpu.segment(index::SS).selector), (0x60, 0x68));
    assert_eq!((cpu.rip, cpu.r(RSP), cpu.flags.get()), (0x6000, 0x5000, bits::SF | bits::FIXED));
    guest.core.cpu.set_r(RCX, 0x7000);
    guest.core.cpu.set_r(RDX, 0x8000);
    guest.execute(&[0x0f, 0x35]).unwrap();
    let cpu = &guest.core.cpu;
    assert_eq!((cpu.cs().selector, cpu.segment(index::SS).selector), (0x73, 0x7b));
    assert_eq!((cpu.rip, cpu.r(RSP), guest.core.mode.cpl), (0x8000, 0x7000, 3));
    assert!(cpu.cs().has(attribute::BIG));
}

#[test]
fn sysenter_and_sysexit_are_undefined_in_long_mode() {
    for (code, data) in [(CODE_64, DATA), (USER_CODE_64, USER_DATA), (USER_CODE_32, USER_DATA)] {
        let mut guest = guest();
        guest.core.cpu.msr.sysenter_cs = 0x60;
        guest.set_segments(code, data);
        assert_eq!(guest.fault(&[0x0f, 0x34]).vector, vector::UD);
        // SYSEXIT looks at the privilege level first.
        let expected = if code == CODE_64 { vector::UD } else { vector::GP };
        assert_eq!(guest.fault(&[0x0f, 0x35]).vector, expected);
    }
    let mut guest = guest();
    guest.core.cpu.msr.sysenter_cs = 0x60;
    guest.set_segments(CODE_64, DATA);
    assert_eq!(guest.fault(&[0x48, 0x0f, 0x35]).vector, vector::UD);
}

#[test]
fn swapgs_swaps() {
    let mut guest = Guest::long();
    guest.core.cpu.msr.kernel_gs_base = 0x1234;
    guest.core.cpu.segment_mut(index::GS).base = 0x5678;
    guest.execute(&[0x0f, 0x01, 0xf8]).unwrap();
    assert_eq!((guest.core.cpu.segment(index::GS).base, guest.core.cpu.msr.kernel_gs_base), (0x1234, 0x5678));
    guest.set_segments(USER_CODE_64, USER_DATA);
    assert_eq!(guest.fault(&[0x0f, 0x01, 0xf8]).vector, vector::GP);
}
