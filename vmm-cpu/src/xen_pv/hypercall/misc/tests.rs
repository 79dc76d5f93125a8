use super::super::super::abi::nr::*;
use super::super::super::abi::{FIRST_RESERVED_GDT_ENTRY as RESERVED, vcpu};
use super::super::super::test_support::{DIRECT, FRAMES, FREE, Guest, L1};
use super::*;

const KERNEL: u64 = 0xffff_ffff_8100_0000;
/// A 64-bit code segment of level 0, as Linux has it.
const CODE: u64 = 0x00af_9b00_0000_ffff;

#[test]
fn traps_are_set_and_cleared() {
    let mut guest = Guest::new();
    let trap =
        |vector, flags| TrapInfo { vector, flags, cs: 0x10, pad: 0, address: KERNEL + u64::from(vector) };
    let table = guest.put(&[trap(3, 3), trap(14, 4), trap(255, 0), TrapInfo::default(), trap(9, 0)]);
    assert_eq!(guest.call(SET_TRAP_TABLE, &[table]), Ok(0));
    let traps = &guest.vcpu.traps;
    assert_eq!((traps[3].dpl(), traps[3].masks_events(), traps[3].address), (3, false, KERNEL + 3));
    assert_eq!((traps[14].dpl(), traps[14].masks_events()), (0, true));
    assert_eq!((traps[255].address, traps[9].address), (KERNEL + 255, 0), "the table has ended");
    assert_eq!(guest.call(SET_TRAP_TABLE, &[0]), Ok(0));
    assert!(guest.vcpu.traps.iter().all(|trap| trap.address == 0));
    assert_eq!(guest.call(SET_TRAP_TABLE, &[8]), Err(Errno::EFAULT));
    let table = guest.put(&[trap(1, 0); 300]);
    assert_eq!(guest.call(SET_TRAP_TABLE, &[table]), Err(Errno::EINVAL), "it does not end");
    let table = guest.put(&TrapInfo { address: 1 << 47, ..trap(1, 0) });
    assert_eq!(guest.call(SET_TRAP_TABLE, &[table]), Err(Errno::EINVAL), "no address");
}

#[test]
fn callbacks_are_registered() {
    let mut guest = Guest::new();
    for (kind, errno) in [(0, None), (1, None), (2, None), (3, None), (4, None), (5, None), (7, None)]
        .into_iter()
        .chain([6, 8, 0xffff].map(|kind| (kind, Some(Errno::ENOSYS))))
    {
        let at = guest.put(&CallbackRegister { kind, flags: 1, pad: 0, address: KERNEL + u64::from(kind) });
        assert_eq!(guest.call(CALLBACK_OP, &[0, at]).err(), errno, "type {kind}");
    }
    let vcpu = &guest.vcpu;
    assert_eq!(vcpu.syscall.rip, KERNEL + 2);
    assert!(vcpu.syscall.masks_events);
    assert_eq!((vcpu.event.rip, vcpu.failsafe.rip, vcpu.nmi.rip), (KERNEL, KERNEL + 1, KERNEL + 4));
    assert_eq!((vcpu.sysenter.rip, vcpu.syscall32.rip), (KERNEL + 5, KERNEL + 7));
    let nmi = guest.put(&4_u32);
    assert_eq!(guest.call(CALLBACK_OP, &[1, nmi]), Ok(0));
    assert_eq!(guest.vcpu.nmi.rip, 0);
    let event = guest.put(&0_u32);
    assert_eq!(guest.call(CALLBACK_OP, &[1, event]), Err(Errno::EINVAL));
    assert_eq!(guest.call(CALLBACK_OP, &[0, 8]), Err(Errno::EFAULT));
    assert_eq!(guest.call(CALLBACK_OP, &[2, 0]), Err(Errno::ENOSYS));
    let at = guest.put(&CallbackRegister { kind: 0, address: 1 << 63, ..Default::default() });
    assert_eq!(guest.call(CALLBACK_OP, &[0, at]), Err(Errno::EINVAL));
    assert_eq!(guest.call(SET_CALLBACKS, &[KERNEL + 8, KERNEL + 16, KERNEL + 24]), Ok(0));
    assert_eq!((guest.vcpu.event.rip, guest.vcpu.syscall.rip), (KERNEL + 8, KERNEL + 24));
    assert_eq!(guest.call(SET_CALLBACKS, &[1 << 63, 0, 0]), Err(Errno::EINVAL));
}

#[test]
fn descriptors_get_level_3() {
    let mut guest = Guest::new();
    guest.store(FREE, 2, CODE);
    guest.store(FREE, 3, 0x0000_8900_0000_0067); // a TSS
    let list = guest.put(&[FREE, FREE + 1]);
    assert_eq!(guest.call(SET_GDT, &[list, 1024]), Ok(0));
    assert_eq!(guest.engine.descriptors[2], CODE | 3 << 45);
    assert_eq!(guest.engine.descriptors[3], 0);
    // One of the second frame is changed.
    let at = (FREE + 1) * PAGE_SIZE + 8;
    assert_eq!(guest.call(UPDATE_DESCRIPTOR, &[at, CODE]), Ok(0));
    assert_eq!(guest.engine.descriptors[513], CODE | 3 << 45);
    assert_eq!(guest.load(FREE + 1, 1), CODE | 3 << 45);
    // A shorter table takes the others away.
    assert_eq!(guest.call(SET_GDT, &[list, 2]), Ok(0));
    assert_eq!((guest.engine.descriptors[2], guest.engine.descriptors[513]), (0, 0));
    assert_eq!(guest.call(UPDATE_DESCRIPTOR, &[FREE * PAGE_SIZE + 16, CODE]), Ok(0));
    assert_eq!(guest.engine.descriptors[2], 0, "beyond the end of the table");
    assert_eq!(guest.call(SET_GDT, &[0, 0]), Ok(0));
}

#[test]
fn bad_descriptor_tables_are_refused() {
    let mut guest = Guest::new();
    let list = guest.put(&[FREE; 16]);
    assert_eq!(guest.call(SET_GDT, &[list, RESERVED]), Ok(0));
    for entries in [RESERVED + 1, 8192, u64::from(u32::MAX)] {
        assert_eq!(guest.call(SET_GDT, &[list, entries]), Err(Errno::EINVAL));
    }
    assert_eq!(guest.call(SET_GDT, &[8, 1]), Err(Errno::EFAULT));
    for frame in [FRAMES, u64::MAX, L1] {
        let list = guest.put(&frame);
        assert_eq!(guest.call(SET_GDT, &[list, 1]), Err(Errno::EINVAL), "frame {frame:#x}");
    }
    for at in [FRAMES * PAGE_SIZE, !7, FREE * PAGE_SIZE + 4, L1 * PAGE_SIZE] {
        assert_eq!(guest.call(UPDATE_DESCRIPTOR, &[at, CODE]), Err(Errno::EINVAL), "{at:#x}");
    }
    // Gates and task states need ring 0.
    assert_eq!(guest.call(UPDATE_DESCRIPTOR, &[FREE * PAGE_SIZE, 0x0000_8900_0000_0067]), Err(Errno::EINVAL));
    assert_eq!(guest.call(UPDATE_DESCRIPTOR, &[FREE * PAGE_SIZE, 0x0000_8c00_0010_0000]), Err(Errno::EINVAL));
    assert_eq!(guest.call(UPDATE_DESCRIPTOR, &[FREE * PAGE_SIZE, 0]), Ok(0));
}

#[test]
fn segment_bases() {
    let mut guest = Guest::new();
    assert_eq!(guest.call(SET_SEGMENT_BASE, &[vcpu::segbase::FS, 1]), Ok(0));
    assert_eq!(guest.call(SET_SEGMENT_BASE, &[vcpu::segbase::GS_USER, 2]), Ok(0));
    assert_eq!(guest.call(SET_SEGMENT_BASE, &[vcpu::segbase::GS_KERNEL, KERNEL]), Ok(0));
    let context = guest.engine.context;
    assert_eq!((context.fs_base, context.other_gs_base, context.gs_base), (1, 2, KERNEL));
    for which in 0..3 {
        assert_eq!(guest.call(SET_SEGMENT_BASE, &[which, 1 << 47]), Err(Errno::EINVAL));
    }
    assert_eq!(guest.call(SET_SEGMENT_BASE, &[4, 0]), Err(Errno::EINVAL));
    // A selector brings the base of its descriptor, one that cannot be loaded nothing.
    guest.engine.descriptors[5] = 0x12cf_f334_5678_ffff;
    assert_eq!(guest.call(SET_SEGMENT_BASE, &[vcpu::segbase::GS_USER_SEL, 5 << 3]), Ok(0));
    assert_eq!((guest.engine.context.gs, guest.engine.context.other_gs_base), (5 << 3 | 3, 0x1234_5678));
    for selector in [0, 3, 9 << 3, 5 << 3 | 4, 0xfffb] {
        assert_eq!(guest.call(SET_SEGMENT_BASE, &[vcpu::segbase::GS_USER_SEL, selector]), Ok(0));
        assert!(guest.engine.context.gs <= 3, "selector {selector:#x}");
        assert_eq!(guest.engine.context.other_gs_base, 0);
    }
}

#[test]
fn debug_registers() {
    let mut guest = Guest::new();
    for register in [0, 3] {
        assert_eq!(guest.call(SET_DEBUGREG, &[register, DIRECT]), Ok(0));
        assert_eq!(guest.syscall(GET_DEBUGREG, &[register]).1, DIRECT);
        assert_eq!(guest.call(SET_DEBUGREG, &[register, 0xffff_8100_0000_0000]), Err(Errno::EPERM));
    }
    assert_eq!(guest.call(SET_DEBUGREG, &[7, 0x401]), Ok(0));
    assert_eq!(guest.call(GET_DEBUGREG, &[5]), Ok(0x401));
    assert_eq!(guest.call(SET_DEBUGREG, &[7, 1 << 13]), Err(Errno::EPERM));
    for register in [6, 7] {
        assert_eq!(guest.call(SET_DEBUGREG, &[register, 1 << 32]), Err(Errno::EINVAL));
    }
    for register in [8, u64::from(u32::MAX)] {
        assert_eq!(guest.call(SET_DEBUGREG, &[register, 0]), Err(Errno::ENODEV));
        assert_eq!(guest.call(GET_DEBUGREG, &[register]), Err(Errno::ENODEV));
    }
}

#[test]
fn stack_and_fpu() {
    let mut guest = Guest::new();
    assert_eq!(guest.call(STACK_SWITCH, &[0x18, KERNEL]), Ok(0));
    assert_eq!((guest.vcpu.kernel_ss, guest.engine.context().kernel_sp), (0x1b, KERNEL));
    assert_eq!(guest.call(FPU_TASKSWITCH, &[1]), Ok(0));
    assert!(guest.engine.task_switched);
    assert_eq!(guest.call(FPU_TASKSWITCH, &[0]), Ok(0));
    assert!(!guest.engine.task_switched);
}

#[test]
fn assists() {
    let mut guest = Guest::new();
    for kind in [0, 1, 2, 4, 5] {
        assert_eq!(guest.call(VM_ASSIST, &[vm_assist::ENABLE, kind]), Ok(0));
        assert!(guest.domain.has_assist(kind));
        assert_eq!(guest.call(VM_ASSIST, &[vm_assist::DISABLE, kind]), Ok(0));
        assert!(!guest.domain.has_assist(kind));
    }
    for kind in [3, 6, 32, 64, u64::MAX] {
        assert_eq!(guest.call(VM_ASSIST, &[vm_assist::ENABLE, kind]), Err(Errno::EINVAL));
    }
    assert_eq!(guest.call(VM_ASSIST, &[2, 0]), Err(Errno::ENOSYS));
}

#[test]
fn physical_devices() {
    let mut guest = Guest::new();
    for (iopl, expected) in
        [(0_u32, Ok(0)), (3, Ok(0)), (4, Err(Errno::EINVAL)), (u32::MAX, Err(Errno::EINVAL))]
    {
        let at = guest.put(&iopl);
        assert_eq!(guest.call(PHYSDEV_OP, &[6, at]), expected);
    }
    assert_eq!(guest.vcpu.control.iopl, 3);
    let at = guest.put(&[0_u64, 65536]);
    assert_eq!(guest.call(PHYSDEV_OP, &[7, at]), Ok(0));
    let at = guest.put(&[0_u64, 65537]);
    assert_eq!(guest.call(PHYSDEV_OP, &[7, at]), Err(Errno::EINVAL));
    for command in [6, 7] {
        assert_eq!(guest.call(PHYSDEV_OP, &[command, 8]), Err(Errno::EFAULT));
    }
    for command in [5, 8, 12, 13, 24, u64::MAX] {
        assert_eq!(guest.call(PHYSDEV_OP, &[command, 0]), Err(Errno::ENOSYS));
    }
}

#[test]
fn the_old_way_to_register_for_nmi() {
    let mut guest = Guest::new();
    let at = guest.put(&[KERNEL, 0]);
    assert_eq!(guest.call(NMI_OP, &[0, at]), Ok(0));
    assert_eq!(guest.vcpu.nmi.rip, KERNEL);
    assert_eq!(guest.call(NMI_OP, &[1, 0]), Ok(0));
    assert_eq!(guest.vcpu.nmi.rip, 0);
    assert_eq!(guest.call(NMI_OP, &[0, 8]), Err(Errno::EFAULT));
    assert_eq!(guest.call(NMI_OP, &[2, 0]), Err(Errno::ENOSYS));
}

#[test]
fn hypercalls_that_are_not_there_are_counted() {
    let mut guest = Guest::new();
    for nr in [7, 11, 16, 19, 27, 31, 34, 35, 36, 37, 38, 39, 40, 41, 42, 48, 55] {
        assert_eq!(guest.call(nr, &[0; 6]), Err(Errno::ENOSYS), "hypercall {nr}");
        assert_eq!(guest.domain.unknown_hypercalls(nr), 1);
    }
    for nr in [63, 64, u64::MAX] {
        assert_eq!(guest.call(nr, &[0; 6]), Err(Errno::ENOSYS));
    }
    assert_eq!(guest.domain.unknown_hypercalls(1000), 3);
}
