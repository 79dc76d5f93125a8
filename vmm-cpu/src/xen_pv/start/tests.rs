use super::super::abi::vcpu::{TrapInfo, vcpuop};
use super::super::abi::{domid, nr};
use super::super::test_support::{FRAMES, FREE, Guest, L4};
use super::*;
use zerocopy::FromZeros;

const KERNEL: u64 = 0xffff_ffff_8100_0000;

fn initialised(context: &VcpuGuestContext) -> (Guest, VcpuAbi) {
    let mut guest = Guest::new();
    let at = guest.put(context);
    assert_eq!(guest.call(nr::VCPU_OP, &[vcpuop::INITIALISE, 1, at]), Ok(0));
    assert_eq!(guest.call(nr::VCPU_OP, &[vcpuop::UP, 1, 0]), Ok(0));
    let other = VcpuAbi::new(guest.domain.clone(), 1).unwrap();
    (guest, other)
}

#[test]
fn registers_tables_and_entries_are_loaded() {
    let mut context = VcpuGuestContext::new_zeroed();
    context.flags = vgcf::IN_KERNEL | vgcf::SYSCALL_DISABLES_EVENTS;
    context.ctrlreg[3] = L4 << 12;
    context.user_regs.rip = KERNEL;
    context.user_regs.rsp = KERNEL + 8;
    context.user_regs.rsi = 77;
    context.user_regs.cs = 0x10;
    context.user_regs.ss = 0x18;
    context.user_regs.fs = 0x23;
    context.kernel_sp = KERNEL + 16;
    context.kernel_ss = 0x18;
    context.gdt_frames[0] = FREE;
    context.gdt_ents = 16;
    context.traps[0].address = KERNEL + 1;
    context.traps[14] = TrapInfo { vector: 14, address: KERNEL + 14, ..Default::default() };
    context.event_callback_eip = KERNEL + 32;
    context.syscall_callback_eip = KERNEL + 40;
    context.gs_base_kernel = 5;
    context.gs_base_user = 6;
    context.fs_base = 7;
    context.debugreg[7] = 0x400;
    let (mut guest, mut other) = initialised(&context);
    guest.store(FREE, 3, 0x00af_9b00_0000_ffff);
    assert!(other.start(&mut guest.engine).unwrap());
    let engine = &guest.engine;
    assert_eq!((engine.kernel_root, engine.user_root), (L4 * PAGE_SIZE, None));
    assert_eq!(engine.descriptors[3], 0x00af_9b00_0000_ffff | 3 << 45);
    assert_eq!(engine.debug[7], 0x400);
    let loaded = engine.context;
    assert_eq!((loaded.general.rip, loaded.general.rsp, loaded.general.rsi), (KERNEL, KERNEL + 8, 77));
    assert_eq!((loaded.cs, loaded.ss, loaded.fs), (0x13, 0x1b, 0x23));
    assert_eq!(
        (loaded.mode, loaded.fs_base, loaded.gs_base, loaded.other_gs_base),
        (GuestMode::Kernel, 7, 5, 6)
    );
    assert_eq!(loaded.kernel_sp, KERNEL + 16);
    assert_eq!([0, 14].map(|vector: usize| other.traps[vector].address), [KERNEL + 1, KERNEL + 14]);
    assert_eq!(
        (other.event.rip, other.syscall.rip, other.syscall.masks_events),
        (KERNEL + 32, KERNEL + 40, true)
    );
    assert_eq!(other.processor().unwrap().runstate(0).state, runstate::RUNNING);
    assert!(other.start(&mut guest.engine).unwrap(), "it goes on");
}

#[test]
fn a_start_that_became_impossible_is_given_up() {
    let mut context = VcpuGuestContext::new_zeroed();
    context.ctrlreg[3] = FREE << 12;
    let (mut guest, mut other) = initialised(&context);
    guest.store(FREE, 0, FRAMES << 12 | 1);
    assert!(!other.start(&mut guest.engine).unwrap());
    assert!(!other.is_up());
}

#[test]
fn the_initial_root_is_pinned() {
    let mut guest = Guest::new();
    assert_eq!(guest.domain.tables.level(L4), 4);
    let op = super::super::abi::mmu::MmuextOp { cmd: 4, arg1: L4, ..Default::default() };
    let list = guest.put(&op);
    assert_eq!(guest.call(nr::MMUEXT_OP, &[list, 1, 0, domid::SELF.into()]), Ok(0));
    guest.store(FREE, 0, 1 << 50 | 1);
    let Guest { vcpu, engine, .. } = &mut guest;
    for frame in [FRAMES, FREE] {
        let error = vcpu.adopt_initial_root(engine, frame).unwrap_err().to_string();
        assert!(error.contains(&frame.to_string()), "{error}");
    }
}
