use super::super::abi::mmu::entry;
use super::super::abi::nr;
use super::super::abi::vcpu::TrapInfo;
use super::super::abi::{PAGE_SIZE, event};
use super::super::engine::Context;
use super::super::test_support::{DIRECT, FREE, Guest, L1, L2, L3, L4, STACK};
use super::super::vcpu_abi::Callback;
use super::*;

const HANDLER: u64 = 0xffff_ffff_8123_4560;
const USER_RIP: u64 = 0x40_1000;
const KERNEL_SP: u64 = DIRECT + 0x9_0008;

/// A domain with handlers for all exceptions, in kernel mode.
fn guest() -> Guest {
    let mut guest = Guest::new();
    for (vector, trap) in (0..).zip(guest.vcpu.traps.iter_mut().take(32)) {
        *trap = TrapInfo { vector, flags: 0, cs: 0x10, pad: 0, address: HANDLER + u64::from(vector) };
    }
    guest.engine.context().kernel_sp = KERNEL_SP;
    guest.engine.context.cs = FLAT_CS64;
    guest.engine.context.ss = FLAT_SS64;
    guest.engine.context.gs_base = 0x11;
    guest.engine.context.other_gs_base = 0x22;
    guest.engine.context.general.rflags = 0x246;
    guest.engine.context.general.rcx = 0xcc;
    guest.engine.context.general.r11 = 0xbb;
    guest.set_mask(false);
    guest
}

/// The same, in a program.
fn in_user() -> Guest {
    let mut guest = guest();
    guest.engine.user_root = Some((FREE + 100) * PAGE_SIZE);
    guest.engine.context = Context {
        mode: GuestMode::User,
        cs: 0x33,
        ss: 0x2b,
        gs_base: 0x22,
        other_gs_base: 0x11,
        ..guest.engine.context
    };
    guest.engine.context.general.rip = USER_RIP;
    guest.engine.context.general.rsp = 0x7fff_0000;
    guest
}

fn frame<const WORDS: usize>(guest: &Guest) -> [u64; WORDS] {
    guest.get(guest.engine.context.general.rsp)
}

#[test]
fn an_exception_of_the_kernel_stays_on_its_stack() {
    let mut guest = guest();
    let rip = guest.engine.context.general.rip;
    assert_eq!(guest.exception(0, 0, 0), Action::Continue);
    let general = guest.engine.context.general;
    assert_eq!((general.rip, general.rsp), (HANDLER, STACK - 7 * 8));
    assert_eq!(frame(&guest), [0xcc, 0xbb, rip, 0xe030, 0x246, STACK, FLAT_SS64.into()]);
    assert_eq!(guest.info_byte(shared_info::UPCALL_MASK), 0, "a trap masks events on demand only");
}

#[test]
fn an_exception_of_a_program_goes_to_the_kernel_stack() {
    let mut guest = in_user();
    guest.vcpu.traps[13].flags = 4;
    assert_eq!(guest.exception(13, 0x18, 0), Action::Continue);
    let context = guest.engine.context;
    assert_eq!(context.mode, GuestMode::Kernel);
    assert_eq!((context.gs_base, context.other_gs_base), (0x11, 0x22));
    assert_eq!((context.cs, context.ss), (FLAT_CS64, FLAT_SS64));
    // The stack is aligned to 16 bytes, then come eight words.
    assert_eq!(context.general.rsp, (KERNEL_SP & !15) - 8 * 8);
    assert_eq!(frame(&guest), [0xcc, 0xbb, 0x18, USER_RIP, 0x33, 0x246, 0x7fff_0000, 0x2b]);
    assert_eq!(guest.info_byte(shared_info::UPCALL_MASK), 1);
}

#[test]
fn the_frame_tells_whether_events_were_masked() {
    let mut guest = guest();
    guest.set_mask(true);
    guest.engine.context.general.rflags = 0x5_4346; // with TF, NT, RF, AC
    assert_eq!(guest.exception(0, 0, 0), Action::Continue);
    let [.., cs, flags, _, _] = frame::<7>(&guest);
    assert_eq!(cs, 0xe030 | 1 << 32);
    assert_eq!(flags, 0x5_4146, "IF shows the mask");
    assert_eq!(guest.engine.context.general.rflags & (rflags::TF | NT | RF | AC), 0);
}

#[test]
fn a_page_fault_tells_its_address_and_who_made_it() {
    for (mut guest, expected) in [(guest(), 0), (in_user(), PF_USER)] {
        assert_eq!(guest.exception(14, PF_USER | PF_WRITE, 0x1234), Action::Continue);
        let [_, _, code, ..] = frame::<8>(&guest);
        assert_eq!(code, u64::from(PF_WRITE | expected));
        let cr2 = guest.domain.memory.load(guest.vcpu.info() + shared_info::CR2).unwrap();
        assert_eq!(cr2, 0x1234);
    }
}

#[test]
fn no_handler_no_stack_no_guest() {
    let mut no_handler = Guest::new();
    assert!(matches!(no_handler.exception(14, 0, 0x77), Action::Crash(text) if text.contains("0x77")));
    assert_eq!(no_handler.domain.shutdown_reason(), Some(super::super::abi::sched::ShutdownReason::Crash));
    for stack in [0, 8, 0xffff_8100_0000_1000, 1 << 63, DIRECT, u64::MAX] {
        let mut no_stack = guest();
        no_stack.engine.context.general.rsp = stack;
        assert!(matches!(no_stack.exception(0, 0, 0), Action::Crash(_)), "{stack:#x}");
        let mut no_stack = in_user();
        no_stack.engine.context().kernel_sp = stack;
        assert!(matches!(no_stack.exception(0, 0, 0), Action::Crash(_)), "{stack:#x}");
    }
    let mut crashed = guest();
    let exit = super::super::engine::EngineExit::Crashed;
    assert!(matches!(crashed.vcpu.handle_exit(&mut crashed.engine, exit).unwrap(), Action::Crash(_)));
}

#[test]
fn events_are_delivered_when_they_may() {
    let mut guest = guest();
    guest.vcpu.event = Callback { rip: HANDLER, masks_events: false };
    let at = guest.put(&event::Pair::default());
    guest.call(nr::EVENT_CHANNEL_OP, &[event::evtchnop::BIND_IPI, at]).unwrap();
    let port = guest.get::<event::Pair>(at).second;
    guest.domain.unmask(port).unwrap();
    guest.set_mask(true);
    guest.domain.set_pending(port);
    let rip = guest.engine.context.general.rip;
    assert_eq!(guest.before_entry(), Action::Continue);
    assert_eq!(guest.engine.context.general.rip, rip, "masked");
    guest.set_mask(false);
    assert_eq!(guest.before_entry(), Action::Continue);
    assert_eq!(guest.engine.context.general.rip, HANDLER);
    assert_eq!(guest.info_byte(shared_info::UPCALL_MASK), 1, "an event masks");
    let [.., cs, _, _, _] = frame::<7>(&guest);
    assert_eq!(cs >> 32, 0);
    let rsp = guest.engine.context.general.rsp;
    assert_eq!(guest.before_entry(), Action::Continue);
    assert_eq!(guest.engine.context.general.rsp, rsp, "once");
}

#[test]
fn an_nmi_comes_through_the_mask() {
    let mut guest = guest();
    guest.set_mask(true);
    assert_eq!(guest.call(nr::VCPU_OP, &[11, 0, 0]), Ok(0));
    let rip = guest.engine.context.general.rip;
    guest.before_entry();
    assert_eq!(guest.engine.context.general.rip, rip, "nobody wants it yet");
    guest.vcpu.nmi = Callback { rip: HANDLER, masks_events: false };
    guest.before_entry();
    assert_eq!(guest.engine.context.general.rip, HANDLER);
    let rsp = guest.engine.context.general.rsp;
    guest.before_entry();
    assert_eq!(guest.engine.context.general.rsp, rsp);
}

#[test]
fn a_system_call_of_a_program() {
    let mut guest = in_user();
    guest.vcpu.syscall = Callback { rip: HANDLER, masks_events: true };
    let (action, _) = guest.syscall(39, &[]);
    assert_eq!(action, Action::Continue);
    assert_eq!(frame(&guest), [USER_RIP, 0x246, USER_RIP, 0x33, 0x246, 0x7fff_0000, 0x2b]);
    assert_eq!(guest.engine.context.general.rip, HANDLER);
    assert_eq!(guest.engine.context.general.rax, 39);
    assert_eq!(guest.info_byte(shared_info::UPCALL_MASK), 1);
    // The kernel runs with the direction flag clear; the frame has the program's.
    let mut guest = in_user();
    guest.vcpu.syscall = Callback { rip: HANDLER, masks_events: true };
    guest.engine.context.general.rflags |= rflags::DF;
    guest.syscall(39, &[]);
    let [_, r11, _, _, flags, ..] = frame::<7>(&guest);
    assert_eq!((r11 & rflags::DF, flags & rflags::DF), (rflags::DF, rflags::DF));
    assert_eq!(guest.engine.context.general.rflags & rflags::DF, 0);
    // Without an entry it is an instruction that does not exist.
    let mut guest = in_user();
    guest.syscall(39, &[]);
    assert_eq!(guest.engine.context.general.rip, HANDLER + 6);
    let [_, _, rip, ..] = frame::<7>(&guest);
    assert_eq!(rip, USER_RIP - 2);
}

#[test]
fn a_system_call_of_32_bit_code_has_an_entry_of_its_own() {
    const ENTRY_32: u64 = HANDLER + 0x1000;
    for (cs, entry_32, expected) in [
        (FLAT_CS32, ENTRY_32, ENTRY_32),
        (FLAT_CS32, 0, HANDLER),
        (FLAT_CS64, ENTRY_32, HANDLER),
        (FLAT_CS64, 0, HANDLER),
    ] {
        let mut guest = in_user();
        guest.engine.context.cs = cs;
        guest.vcpu.syscall = Callback { rip: HANDLER, masks_events: false };
        guest.vcpu.syscall32 = Callback { rip: entry_32, masks_events: true };
        guest.syscall(4, &[]);
        assert_eq!(guest.engine.context.general.rip, expected, "{cs:#x}");
        let [rcx, _, rip, in_frame, ..] = frame::<7>(&guest);
        assert_eq!((rcx, rip, in_frame), (USER_RIP, USER_RIP, cs.into()), "{cs:#x}");
        assert_eq!(guest.info_byte(shared_info::UPCALL_MASK), u8::from(expected == ENTRY_32), "{cs:#x}");
    }
}

#[test]
fn sysenter_has_an_entry_where_the_guest_wants_one() {
    // It faults as #UD on some processors and as #GP on others.
    for vector in [INVALID_OPCODE, GENERAL_PROTECTION] {
        for (entry, expected) in [(HANDLER + 0x1000, HANDLER + 0x1000), (0, HANDLER + u64::from(vector))] {
            let mut guest = in_user();
            let code = guest.put_bytes(&[0x0f, 0x34]);
            guest.engine.user_root = Some(L4 * PAGE_SIZE);
            guest.engine.context.general.rip = code;
            guest.engine.context.cs = FLAT_CS32;
            guest.engine.context.general.rflags |= rflags::TF | NT;
            guest.vcpu.sysenter = Callback { rip: entry, masks_events: true };
            assert_eq!(guest.exception(vector, 0, 0), Action::Continue);
            let context = guest.engine.context;
            assert_eq!((context.general.rip, context.mode), (expected, GuestMode::Kernel));
            if entry != 0 {
                assert_eq!(frame(&guest), [0xcc, 0xbb, 0, 3, 0x246, 0, FLAT_SS64.into()]);
                assert_eq!(guest.info_byte(shared_info::UPCALL_MASK), 1);
            }
        }
    }
    // To the kernel it is any instruction.
    let mut guest = guest();
    guest.vcpu.sysenter = Callback { rip: HANDLER + 0x1000, masks_events: false };
    let code = guest.put_bytes(&[0x0f, 0x34]);
    guest.engine.context.general.rip = code;
    guest.exception(GENERAL_PROTECTION, 0, 0);
    assert_eq!(guest.engine.context.general.rip, HANDLER + 13);
}

fn iret(guest: &mut Guest, frame: &IretContext) -> Action {
    let rsp = guest.put(frame);
    guest.engine.context.general.rsp = rsp;
    guest.syscall(nr::IRET, &[]).0
}

#[test]
fn iret_goes_back_to_a_program() {
    let mut guest = guest();
    guest.engine.user_root = Some(FREE * PAGE_SIZE);
    guest.set_mask(true);
    let frame = IretContext {
        rax: 1,
        r11: 2,
        rcx: 3,
        flags: 0,
        rip: USER_RIP,
        cs: 0x33,
        rflags: 0x3_7300 | rflags::IF,
        rsp: 0x7fff_0000,
        ss: 0x2b,
    };
    assert_eq!(iret(&mut guest, &frame), Action::Continue);
    let context = guest.engine.context;
    let general = context.general;
    assert_eq!(context.mode, GuestMode::User);
    assert_eq!((context.gs_base, context.other_gs_base), (0x22, 0x11));
    assert_eq!((context.cs, context.ss), (0x33, 0x2b));
    assert_eq!((general.rax, general.r11, general.rcx), (1, 2, 3));
    assert_eq!((general.rip, general.rsp), (USER_RIP, 0x7fff_0000));
    assert_eq!(general.rflags & (IOPL | VM), 0);
    assert_eq!(general.rflags & rflags::IF, rflags::IF);
    assert_eq!(guest.info_byte(shared_info::UPCALL_MASK), 0);
}

#[test]
fn iret_goes_back_to_the_kernel() {
    let mut guest = guest();
    let frame = IretContext {
        r11: 2,
        rcx: 3,
        flags: VGCF_IN_SYSCALL,
        rip: HANDLER,
        cs: 0xe030,
        rflags: 2,
        rsp: STACK,
        ss: 0xe028,
        ..Default::default()
    };
    assert_eq!(iret(&mut guest, &frame), Action::Continue);
    let context = guest.engine.context;
    assert_eq!(context.mode, GuestMode::Kernel);
    assert_eq!((context.cs, context.ss), (FLAT_CS64, FLAT_SS64));
    assert_eq!((context.general.r11, context.general.rcx), (0x202, HANDLER), "as SYSRET leaves them");
    assert_eq!(guest.info_byte(shared_info::UPCALL_MASK), 1, "IF was clear");
}

#[test]
fn a_frame_and_iret_are_inverse() {
    let mut guest = in_user();
    let before = guest.engine.context;
    guest.exception(3, 0, 0);
    // The kernel takes RCX and R11 from the frame and builds the rest of IRET's.
    let [rcx, r11, rip, cs, rflags, rsp, ss] = frame::<7>(&guest);
    let frame =
        IretContext { rax: before.general.rax, r11, rcx, flags: 0, rip, cs: cs & 0xffff, rflags, rsp, ss };
    assert_eq!(iret(&mut guest, &frame), Action::Continue);
    assert_eq!(
        guest.engine.context.general,
        crate::state::GeneralRegisters { rax: before.general.rax, ..before.general }
    );
    assert_eq!((guest.engine.context.cs, guest.engine.context.mode), (before.cs, before.mode));
}

#[test]
fn iret_to_nowhere_crashes() {
    let mut lost = guest();
    lost.engine.context.general.rsp = 8;
    assert!(matches!(lost.syscall(nr::IRET, &[]).0, Action::Crash(_)));
    let mut no_root = guest();
    let frame = IretContext { cs: 0x33, ss: 0x2b, ..Default::default() };
    assert!(matches!(iret(&mut no_root, &frame), Action::Crash(_)));
}

#[test]
fn the_io_privilege_level_is_part_of_frames_on_demand() {
    let mut guest = guest();
    guest.vcpu.control.iopl = 1;
    guest.call(nr::VM_ASSIST, &[vm_assist::ENABLE, vm_assist::ARCHITECTURAL_IOPL]).unwrap();
    guest.exception(0, 0, 0);
    let [.., flags, _, _] = frame::<7>(&guest);
    assert_eq!(flags & IOPL, 1 << 12);
    let frame = IretContext { rip: HANDLER, cs: 0xe030, rflags: 3 << 12, rsp: STACK, ..Default::default() };
    iret(&mut guest, &frame);
    assert_eq!(guest.vcpu.control.iopl, 3);
}

#[test]
fn the_fpu_exception_finds_the_flag_clear() {
    let mut guest = guest();
    guest.call(nr::FPU_TASKSWITCH, &[1]).unwrap();
    guest.exception(7, 0, 0);
    assert!(!guest.engine.task_switched);
    assert_eq!(guest.engine.context.general.rip, HANDLER + 7);
}

#[test]
fn entries_without_the_user_bit_are_repaired() {
    let va = DIRECT + FREE * PAGE_SIZE;
    for (table, index) in [(L1 + 2, 0), (L2, 2), (L3, 0), (L4, (DIRECT >> 39) & 511)] {
        let mut guest = guest();
        let rip = guest.engine.context.general.rip;
        let old = guest.load(table, index);
        guest.store(table, index, old & !entry::USER);
        assert_eq!(guest.exception(14, PF_PRESENT | PF_USER, va), Action::Continue);
        assert_eq!(guest.load(table, index), old);
        assert_eq!(guest.engine.context.general.rip, rip, "it tries again");
        assert_eq!(guest.engine.flushed, [Some(va)]);
        // Nothing is left to repair: the guest hears of it.
        guest.exception(14, PF_PRESENT | PF_USER, va);
        assert_eq!(guest.engine.context.general.rip, HANDLER + 14);
    }
}

#[test]
fn a_program_is_not_helped() {
    let va = DIRECT + FREE * PAGE_SIZE;
    let mut guest = in_user();
    let old = guest.load(L1 + 2, 0);
    guest.store(L1 + 2, 0, old & !entry::USER);
    guest.exception(14, PF_PRESENT | PF_USER, va);
    assert_eq!(guest.load(L1 + 2, 0), old & !entry::USER);
    assert_eq!(guest.engine.context.general.rip, HANDLER + 14);
}

#[test]
fn stores_to_page_tables_become_possible() {
    let mut guest = guest();
    let rip = guest.engine.context.general.rip;
    let read_only = |frame: u64| (frame * PAGE_SIZE) | entry::PRESENT | entry::USER;
    // A page table and an ordinary page, both read-only.
    guest.store(L1, L2, read_only(L2));
    guest.store(L1 + 2, 0, read_only(FREE));
    let store = PF_PRESENT | PF_WRITE | PF_USER;
    assert_eq!(guest.exception(14, store, DIRECT + L2 * PAGE_SIZE), Action::Continue);
    assert_eq!(guest.load(L1, L2), read_only(L2) | entry::WRITABLE);
    assert_eq!(guest.engine.context.general.rip, rip);
    guest.exception(14, store, DIRECT + FREE * PAGE_SIZE);
    assert_eq!(guest.load(L1 + 2, 0), read_only(FREE));
    assert_eq!(guest.engine.context.general.rip, HANDLER + 14, "a fault as any other");
}
