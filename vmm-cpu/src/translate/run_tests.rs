//! The loop, with small guests that end with HLT.

use std::sync::atomic::Ordering;

use super::*;
use crate::debug::{DebugReason, DebugRequest};
use crate::exact::ExactStop;
use crate::hypervisor::ClockSource;
use crate::translate::clock::Clock;
use crate::translate::cpu::{RAX, RCX, RDI, RDX, RSI, RSP};
use crate::translate::exception::vector;
use crate::translate::memory::Added;
use crate::translate::segment::{SegmentRegister, index};
use crate::translate::signals::{Handle, Signals};
use crate::translate::test_support::{CODE, CODE_32, CODE_64, DATA, Guest, STACK, on_each_tier};
use crate::translate::vm::{Peer, Shared, TranslateVm};
use crate::vcpu::{VcpuHandle, VcpuIo};
use crate::vm::{GuestAccess, Vm};
use rustc_hash::FxHashSet;
use vmm_memory::GuestRam;
use vmm_memory::vm_memory::GuestAddress;

/// A page for handlers and what is called.
const OTHER: u64 = 0x9000;
const HLT: u8 = 0xf4;

fn put(guest: &mut Guest, gpa: u64, code: &[u8]) {
    assert!(guest.core.map().write(gpa, code));
}

/// Runs from [`CODE`] to a HLT.
fn run_code(guest: &mut Guest, code: &[u8]) {
    put(guest, CODE, code);
    assert_eq!(guest.run(), Halt::Halted);
}

/// A handler that halts at once; its address tells which.
fn handler(guest: &mut Guest, vector: u8) -> u64 {
    let at = OTHER + 16 * u64::from(vector);
    put(guest, at, &[HLT]);
    let selector = if guest.core.cpu.long_mode() { CODE_64 } else { CODE_32 };
    guest.gate(vector, selector, at, 0x8e, 0);
    at + 1
}

#[test]
fn an_instruction_of_sixteen_bytes_is_a_protection_fault() {
    // Within a page, and into the next.
    for start in [CODE, CODE - 7] {
        on_each_tier(Guest::long, |mut guest| {
            let end = handler(&mut guest, vector::GP);
            handler(&mut guest, vector::UD);
            guest.core.cpu.rip = start;
            put(&mut guest, start, &[0x66; 15]);
            put(&mut guest, start + 15, &[0x90, HLT]);
            assert_eq!(guest.run(), Halt::Halted);
            assert_eq!(guest.core.cpu.rip, end, "{start:#x}");
        });
    }
}

#[test]
fn the_step_that_follows_hlt_wakes() {
    on_each_tier(Guest::long, |mut guest| {
        let at = OTHER;
        // INC EAX, HLT.
        put(&mut guest, at, &[0xff, 0xc0, HLT]);
        guest.gate(vector::DB, CODE_64, at, 0x8e, 0);
        guest.core.cpu.flags.set_control(bits::TF, true);
        run_code(&mut guest, &[HLT]);
        assert_eq!((guest.core.cpu.r(RAX), guest.core.cpu.rip), (1, at + 3));
    });
}

#[test]
fn a_step_over_mov_ss_takes_the_next_instruction_along() {
    on_each_tier(Guest::long, |mut guest| {
        let end = handler(&mut guest, vector::DB);
        guest.core.cpu.set_r(RAX, 0x10);
        guest.core.cpu.flags.set_control(bits::TF, true);
        // MOV SS, AX; NOP; NOP.
        run_code(&mut guest, &[0x8e, 0xd0, 0x90, 0x90, HLT]);
        assert_eq!(guest.core.cpu.rip, end);
        assert_eq!(guest.read::<8>(guest.core.cpu.r(RSP)), CODE + 3);
    });
}

#[test]
fn the_step_over_an_iret_sees_the_resume_flag_that_it_loads() {
    on_each_tier(Guest::long, |mut guest| {
        let end = handler(&mut guest, vector::DB);
        for (word, value) in
            [CODE + 2, CODE_64.into(), bits::RF | 2, STACK, DATA.into()].into_iter().enumerate()
        {
            guest.write::<8>(STACK - 0x40 + 8 * word as u64, value);
        }
        guest.core.cpu.set_r(RSP, STACK - 0x40);
        guest.core.cpu.flags.set_control(bits::TF, true);
        // IRETQ.
        run_code(&mut guest, &[0x48, 0xcf, HLT]);
        assert_eq!(guest.core.cpu.rip, end);
        assert_eq!(guest.read::<8>(guest.core.cpu.r(RSP) + 16), bits::RF | 2);
    });
}

#[test]
fn the_resume_flag_is_for_all_iterations_of_a_string_instruction() {
    for (count, expected) in [(2, bits::RF), (1, 0)] {
        on_each_tier(Guest::long, |mut guest| {
            let end = handler(&mut guest, vector::DB);
            guest.core.cpu.set_r(RCX, count);
            guest.core.cpu.set_r(RDI, OTHER);
            let flags = guest.core.cpu.flags.get();
            guest.core.cpu.flags.set(flags | bits::RF | bits::TF);
            // REP STOSB.
            run_code(&mut guest, &[0xf3, 0xaa, HLT]);
            assert_eq!(guest.core.cpu.rip, end);
            let pushed = guest.read::<8>(guest.core.cpu.r(RSP) + 16);
            assert_eq!(pushed & bits::RF, expected, "{count} elements");
        });
    }
}

#[test]
fn a_guest_breakpoint_behind_mov_ss_is_seen() {
    on_each_tier(Guest::long, |mut guest| {
        let end = handler(&mut guest, vector::DB);
        guest.core.cpu.set_r(RAX, 0x10);
        (guest.core.cpu.dr[0], guest.core.cpu.dr7) = (CODE + 2, 0x402);
        run_code(&mut guest, &[0x8e, 0xd0, 0x90, HLT]);
        assert_eq!(guest.core.cpu.rip, end);
        assert_eq!(guest.read::<8>(guest.core.cpu.r(RSP)), CODE + 2);
    });
}

#[test]
fn the_resume_flag_is_gone_when_a_breakpoint_is_set() {
    on_each_tier(Guest::long, |mut guest| {
        let end = handler(&mut guest, vector::DB);
        let flags = guest.core.cpu.flags.get();
        guest.core.cpu.flags.set(flags | bits::RF);
        (guest.core.cpu.dr[0], guest.core.cpu.dr7) = (CODE + 5, 0x400);
        guest.core.cpu.set_r(RAX, 0x402);
        // NOP; NOP; MOV DR7, RAX; NOP.
        run_code(&mut guest, &[0x90, 0x90, 0x0f, 0x23, 0xf8, 0x90, HLT]);
        assert_eq!(guest.core.cpu.rip, end);
        let frame = guest.core.cpu.r(RSP);
        assert_eq!((guest.read::<8>(frame), guest.read::<8>(frame + 16) & bits::RF), (CODE + 5, 0));
    });
}

#[test]
fn the_resume_flag_is_not_seen_behind_the_instruction_that_it_is_for() {
    on_each_tier(Guest::long, |mut guest| {
        let flags = guest.core.cpu.flags.get();
        guest.core.cpu.flags.set(flags | bits::RF);
        run_code(&mut guest, &[0x90, HLT]);
        assert_eq!(guest.core.general_registers().rflags & bits::RF, 0);
    });
}

#[test]
fn rf_that_iret_loads_is_for_one_instruction() {
    const RF: u64 = 1 << 16;
    on_each_tier(Guest::long, |mut guest| {
        let end = handler(&mut guest, vector::NMI);
        let back = OTHER + 0x800;
        put(&mut guest, back, &[HLT]);
        let cpu = &mut guest.core.cpu;
        let stack = cpu.r(RSP) - 40;
        cpu.set_r(RSP, stack);
        let (cs, ss) = (u64::from(cpu.cs().selector), u64::from(cpu.segment(index::SS).selector));
        for (value, n) in [back, cs, RF | 2, stack, ss].into_iter().zip(0..) {
            put(&mut guest, stack + 8 * n, &value.to_le_bytes());
        }
        // IRETQ, behind which an NMI waits.
        (guest.core.cpu.nmi_masked, guest.core.cpu.nmi_pending, guest.core.urgent) = (true, true, true);
        run_code(&mut guest, &[0x48, 0xcf]);
        assert_eq!(guest.core.cpu.rip, end);
        let frame = guest.core.cpu.r(RSP);
        assert_eq!((guest.read::<8>(frame), guest.read::<8>(frame + 16) & RF), (back, RF));

        // The same NMI after the HLT that follows.
        let cpu = &mut guest.core.cpu;
        (cpu.nmi_masked, cpu.activity, cpu.rip) = (true, Activity::Running, CODE);
        for (value, n) in [back, cs, RF | 2, stack, ss].into_iter().zip(0..) {
            put(&mut guest, stack + 8 * n, &value.to_le_bytes());
        }
        guest.core.cpu.set_r(RSP, stack);
        assert_eq!(guest.run(), Halt::Halted);
        (guest.core.cpu.nmi_pending, guest.core.urgent) = (true, true);
        assert_eq!(guest.run(), Halt::Halted);
        let frame = guest.core.cpu.r(RSP);
        assert_eq!((guest.read::<8>(frame), guest.read::<8>(frame + 16) & RF), (back + 1, 0));
    });
}

#[test]
fn code_ends_with_its_segment() {
    // The limit lies between two instructions, or within one.
    for (limit, fault) in [(CODE + 1, CODE + 2), (CODE + 3, CODE + 2)] {
        let mut guest = Guest::protected();
        let end = handler(&mut guest, vector::GP);
        // NOP, NOP, MOV EAX, 1, HLT: known whole from a run with another limit.
        let code = [0x90, 0x90, 0xb8, 1, 0, 0, 0, HLT];
        put(&mut guest, CODE, &code);
        assert_eq!(guest.run(), Halt::Halted);
        assert_eq!(guest.core.cpu.rip, CODE + code.len() as u64);
        guest.core.cpu.activity = Activity::Running;
        guest.core.cpu.rip = CODE;
        guest.core.cpu.segment_mut(index::CS).limit = u32::try_from(limit).unwrap();
        assert_eq!(guest.run(), Halt::Halted);
        assert_eq!(guest.core.cpu.rip, end, "{limit:#x}");
        assert_eq!(guest.read::<4>(guest.core.cpu.r(RSP) + 4), fault, "{limit:#x}");
    }
}

/// Queues an NMI at each OUT.
struct Nmi(Arc<Signals>);

impl VcpuIo for Nmi {
    fn pio_write(&mut self, _: u16, _: usize, _: &[u8]) {
        Handle::new(&self.0).nmi().unwrap();
    }
}

#[test]
fn a_handler_that_its_own_frame_overwrites_is_decoded_anew() {
    let mut guest = Guest::protected();
    // RET, NOP three times, HLT twice.
    put(&mut guest, OTHER, &[0xc3, 0x90, 0x90, 0x90, HLT, HLT]);
    guest.gate(vector::NMI, CODE_32, OTHER, 0x8e, 0);
    // CALL OTHER; MOV ESP, OTHER + 4; OUT 0x80, AL; HLT.
    put(&mut guest, CODE, &[0xe8, 0xfb, 0x0f, 0, 0, 0xbc, 0x04, 0x90, 0, 0, 0xe6, 0x80, HLT]);
    // EFLAGS land on the handler: INC ESI; ADD [EAX], AL; ADD AH, DH; HLT.
    guest.core.cpu.flags.set(bits::ZF | bits::PF);
    guest.core.cpu.set_r(RAX, STACK);
    // Nothing else makes the loop look at code anew.
    guest.core.see_epoch();
    let mut bus = Nmi(Arc::clone(&guest.core.signals));
    let halt = guest.run_with(&mut bus);
    assert_eq!(halt, Halt::Halted);
    assert_eq!((guest.core.cpu.r(RSI), guest.core.cpu.rip), (1, OTHER + 6));
}

#[test]
fn code_that_is_known_is_watched_after_its_memory_was_mapped_anew() {
    let mut guest = Guest::protected();
    // INC EAX; RET.
    put(&mut guest, OTHER, &[0x40, 0xc3]);
    // CALL; MOV [OTHER], DL, which is the opcode of DEC EAX; CALL; HLT.
    put(&mut guest, CODE, &[0xe8, 0xfb, 0x0f, 0, 0, 0x88, 0x15, 0, 0x90, 0, 0]);
    put(&mut guest, CODE + 11, &[0xe8, 0xf0, 0x0f, 0, 0, HLT]);
    guest.core.cpu.set_r(RDX, 0x48);
    assert_eq!(guest.run(), Halt::Halted);
    assert_eq!(guest.core.cpu.r(RAX), 0);
    // Now the other way round; the code that is called is what it was.
    guest.core.cpu.set_r(RDX, 0x40);
    let vm = TranslateVm(Arc::clone(&guest.core.shared));
    let region = vm.unmap_memory(GuestAddress(0)).unwrap();
    vm.map_memory(region, GuestAccess::ReadWrite).unwrap();
    guest.core.see_epoch();
    guest.core.cpu.activity = Activity::Running;
    guest.core.cpu.rip = CODE;
    assert_eq!(guest.run(), Halt::Halted);
    assert_eq!(guest.core.cpu.r(RAX), 0);
}

#[test]
fn pages_whose_code_is_gone_are_written_at_full_speed_again() {
    let mut guest = Guest::protected();
    put(&mut guest, OTHER, &[0x40, 0xc3]);
    // CALL; MOV BYTE PTR [OTHER], 0; HLT.
    let code = [0xe8, 0xfb, 0x0f, 0, 0, 0xc6, 0x05, 0x00, 0x90, 0, 0, 0, HLT];
    put(&mut guest, CODE, &code);
    assert_eq!(guest.run(), Halt::Halted);
    let map = Arc::clone(guest.core.map());
    let slot = map.slot(OTHER).unwrap();
    assert!(slot.code.is_watched(slot.page(CODE)) && !slot.code.is_watched(slot.page(OTHER)));
}

/// A vCPU of a machine of two, and the signals of the other one, which is in the guest.
fn beside_another() -> (Core, Arc<Signals>) {
    let clock = Clock::new(None, ClockSource::Deterministic);
    let shared = Arc::new(Shared::new(
        crate::cpuid::CpuidTable::default(),
        InterruptMode::External,
        2,
        clock,
        crate::translate::TranslateOptions::default(),
    ));
    let ram = GuestRam::builder().ram(1 << 20).build().unwrap();
    let vm = TranslateVm(Arc::clone(&shared));
    vm.map_memory(ram.regions().remove(0), GuestAccess::ReadWrite).unwrap();
    let core = Core::new(0, Arc::clone(&shared), Arc::new(Signals::new()), None);
    let other = Arc::new(Signals::new());
    shared.peers().push(Peer { index: 1, signals: Arc::clone(&other) });
    other.enter_guest();
    (core, other)
}

#[test]
fn a_page_that_another_vcpu_is_about_to_watch_is_not_taken_for_watched() {
    let (mut core, other) = beside_another();
    let shared = Arc::clone(&core.shared);
    // The other one has got as far as this.
    let map = Arc::clone(core.map());
    let slot = map.slot(CODE).unwrap();
    assert_eq!(slot.code.add(slot.page(CODE), 1), Added::Unsettled);
    let before = shared.epoch();
    assert_eq!(core.watch_code(CODE), Watch::Unsettled, "stores of the other may still go unseen");
    assert!(shared.epoch() > before && other.wants_attention());
    // It is not asked again.
    let asked = shared.epoch();
    assert_eq!(core.watch_code(CODE), Watch::Unsettled);
    assert_eq!(shared.epoch(), asked);
    other.saw(asked);
    assert_eq!([core.watch_code(CODE), core.watch_code(CODE)], [Watch::Settled; 2]);
    assert_eq!(shared.epoch(), asked);
}

#[test]
fn new_code_of_another_vcpu_does_not_make_this_one_look_up_its_own() {
    let (mut core, _other) = beside_another();
    let shared = Arc::clone(&core.shared);
    core.see_epoch();
    let before = core.tlb.generation();
    let asked = shared.ask_others(1);
    core.see_epoch();
    assert_eq!((core.tlb.generation(), core.signals.last_seen()), (before, asked));
    let vm = TranslateVm(Arc::clone(&shared));
    core.signals.leave_guest();
    shared.peers().clear();
    vm.unmap_memory(GuestAddress(0)).unwrap();
    core.see_epoch();
    assert_ne!(core.tlb.generation(), before);
}

#[test]
fn a_store_to_the_second_page_just_before_it_is_watched_is_not_missed() {
    let (mut core, other) = beside_another();
    let shared = Arc::clone(&core.shared);
    let function = CODE + 0xfff;
    core.cpu.cr0 |= 1;
    *core.cpu.segment_mut(index::CS) = SegmentRegister::from_descriptor(CODE_32, 0x00cf_9b00_0000_ffff);
    core.update_mode();
    let map = Arc::clone(core.map());
    for round in 1..800_u32 {
        // Code of the first page is watched already.
        assert!(map.write(CODE, &[HLT]) && map.write(function, &[0xb8, 0, 0, 0, 0]));
        core.watch_code(CODE);
        other.saw(shared.epoch());
        assert_eq!(core.watch_code(CODE), Watch::Settled);
        other.take_attention();
        let mut cache = BlockCache::new();
        let begin = std::sync::Barrier::new(2);
        std::thread::scope(|scope| {
            // The other vCPU, asked to notice stores to the second page, makes one that it does not notice first.
            scope.spawn(|| {
                begin.wait();
                while !other.wants_attention() {
                    std::hint::spin_loop();
                }
                for _ in 0..round % 256 {
                    std::hint::spin_loop();
                }
                map.store(CODE + 0x1000, round);
                other.saw(shared.epoch());
            });
            let mut bus = crate::vcpu::EmptyBus;
            let mut m = Machine::new(&mut core, &mut bus);
            begin.wait();
            assert!(find(&mut m, &mut cache, function).is_ok());
        });
        if let Some(id) = cache.find(function, core.stamp()) {
            let mut code = [0; 5];
            assert!(map.read(function, &mut code));
            assert_eq!(*cache.get(id).unwrap().bytes, code, "remembered in round {round}");
        }
        core.forget_code(CODE + 0x1000);
    }
}

#[test]
fn an_aligned_quadword_of_code_is_fetched_at_once() {
    let mut guest = Guest::protected();
    let map = Arc::clone(guest.core.map());
    // NOP; MOV AL, 1, or MOV CL, 2; HLT.
    let codes = [[0x90, 0xb0, 1, HLT, HLT, HLT, HLT, HLT], [0x90, 0xb1, 2, HLT, HLT, HLT, HLT, HLT]];
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for code in codes.iter().cycle().take_while(|_| !done.load(Ordering::Relaxed)) {
                map.store(CODE, u64::from_le_bytes(*code));
            }
        });
        let mut seen = FxHashSet::default();
        for _ in 0..100_000 {
            let block = block::build(&mut guest.machine(), CODE + 1, CODE + 1, Watch::Settled).unwrap();
            seen.insert(block.bytes[..2].to_vec());
        }
        done.store(true, Ordering::Relaxed);
        // Whatever it is while nothing is written yet.
        seen.remove(&vec![0, 0]);
        assert!(seen.iter().all(|seen| codes.iter().any(|code| code[1..3] == **seen)), "{seen:x?}");
    });
}

/// What another vCPU had been told of changed code whenever the VMM was asked for a vector.
struct Told {
    other: Arc<Signals>,
    told: Vec<usize>,
}

impl VcpuIo for Told {
    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        self.told.push(self.other.take_code_stores().len());
        None
    }
}

#[test]
fn others_know_of_changed_code_before_the_vmm_is_called() {
    let (mut core, other) = beside_another();
    let map = Arc::clone(core.map());
    let slot = map.slot(OTHER).unwrap();
    slot.code.add(slot.page(OTHER), 1);
    // STI; MOV [OTHER], AL; HLT.
    assert!(map.write(CODE, &[0xfb, 0xa2, 0x00, 0x90, HLT]));
    core.cpu.segment_mut(index::CS).load_real(0);
    core.cpu.rip = CODE;
    core.update_mode();
    core.signals.intr.set(true);
    let mut bus = Told { other, told: Vec::new() };
    let halt = run(
        &mut Machine::new(&mut core, &mut bus),
        &mut BlockCache::new(),
        &mut None,
        &mut Elsewhere::default(),
    )
    .unwrap();
    assert_eq!((halt, bus.told), (Halt::Halted, vec![1]));
}

#[test]
fn counted_time_is_exact_within_a_block_and_after_a_stay() {
    on_each_tier(Guest::long, |mut guest| {
        // NOP five times, RDTSC, HLT.
        run_code(&mut guest, &[0x90, 0x90, 0x90, 0x90, 0x90, 0x0f, 0x31, HLT]);
        assert_eq!((guest.core.cpu.r(RAX), guest.core.cpu.r(RDX)), (5, 0));
    });
    on_each_tier(Guest::long, |mut guest| {
        guest.core.debug = DebugRequest::none().step();
        put(&mut guest, CODE, &[0x90, 0x90]);
        match guest.run() {
            Halt::Debug(stop) => assert_eq!(stop.reason, DebugReason::SingleStep),
            other => panic!("{other:?}"),
        }
        assert_eq!(guest.core.shared.clock.nanoseconds(), 1);
    });
}

#[test]
fn what_comes_first_is_looked_at_first() {
    let mut guest = Guest::long();
    guest.core.shared.clock.advance(1000);
    assert_eq!(guest.core.next_budget(), 1 << 20);
    guest.core.deadline = Some(1500);
    assert_eq!(guest.core.next_budget(), 500);
    guest.core.stop = ExactStop::none().at_guest_time(1400).at_instructions(300);
    assert_eq!(guest.core.next_budget(), 300);
    guest.core.instructions = 50;
    guest.core.told = 50;
    assert_eq!(guest.core.next_budget(), 250);
    guest.core.stop.instructions = None;
    assert_eq!(guest.core.next_budget(), 400);
}

/// Where a device asks for the time.
struct Stamps {
    clock: Arc<Clock>,
    seen: Vec<u64>,
}

impl VcpuIo for Stamps {
    fn mmio_write(&mut self, _: GuestAddress, _: &[u8]) {
        self.seen.push(self.clock.nanoseconds());
    }
}

#[test]
fn devices_see_the_time_before_the_instruction_wherever_its_block_begins() {
    // NOP five times, MOV [0x800000], EAX, HLT.
    let code = [0x90, 0x90, 0x90, 0x90, 0x90, 0xa3, 0, 0, 0x80, 0, HLT];
    for stop in [None, Some(2), Some(4), Some(5)] {
        let mut guest = Guest::protected();
        put(&mut guest, CODE, &code);
        let mut stamps = Stamps { clock: Arc::clone(&guest.core.shared.clock), seen: Vec::new() };
        guest.core.stop.instructions = stop;
        while guest.run_with(&mut stamps) != Halt::Halted {}
        assert_eq!(stamps.seen, [5], "{stop:?}");
        assert_eq!(guest.core.retired(), 7);
        // Likewise MOV [0x20000], EAX, which leads there.
        on_each_tier(Guest::long, |mut guest| {
            guest.write::<8>(entry(0x2_0000), 0x80_0007);
            put(&mut guest, CODE, &[0x90, 0x90, 0x90, 0x90, 0x90, 0x89, 0x04, 0x25, 0, 0, 2, 0, HLT]);
            let mut stamps = Stamps { clock: Arc::clone(&guest.core.shared.clock), seen: Vec::new() };
            guest.core.stop.instructions = stop;
            while guest.run_with(&mut stamps) != Halt::Halted {}
            assert_eq!((stamps.seen, guest.core.retired()), (vec![5], 7), "{stop:?}");
        });
    }
}

/// Page-table entry of a page in the page tables of [`Guest::long`].
fn entry(page: u64) -> u64 {
    0x7000 + page / 4096 * 8
}

#[test]
fn looking_anew_is_no_access() {
    const DATA: u64 = 0x2_0000;
    on_each_tier(Guest::long, |mut guest| {
        // MOV [0x20000], EAX; MOV ECX, [0x20000]; HLT; JMP to the start.
        let code = [0x89, 0x04, 0x25, 0, 0, 2, 0, 0x8b, 0x0c, 0x25, 0, 0, 2, 0, HLT, 0xeb, 0xef];
        put(&mut guest, CODE, &code);
        assert_eq!(guest.run(), Halt::Halted);
        for (page, bits) in [(CODE, 0x20), (DATA, 0x60)] {
            assert_eq!(guest.read::<1>(entry(page)) & 0x60, bits);
            let cleared = guest.read::<1>(entry(page)) & !0x60;
            guest.write::<1>(entry(page), cleared);
        }
        // Everything that makes the loop look again, but no flush.
        guest.core.tlb.watch_all_stores();
        guest.core.tlb.forget_lookups();
        guest.cache.clear();
        guest.core.cpu.activity = Activity::Running;
        assert_eq!(guest.run(), Halt::Halted);
        for page in [CODE, DATA] {
            assert_eq!(guest.read::<1>(entry(page)) & 0x60, 0, "{page:#x}");
        }
        guest.core.tlb.flush_all();
        guest.core.cpu.activity = Activity::Running;
        assert_eq!(guest.run(), Halt::Halted);
        for (page, bits) in [(CODE, 0x20), (DATA, 0x60)] {
            assert_eq!(guest.read::<1>(entry(page)) & 0x60, bits);
        }
    });
}

#[test]
fn a_string_instruction_that_goes_on_is_still_in_the_shadow_of_sti() {
    on_each_tier(Guest::long, |mut guest| {
        let end = handler(&mut guest, 0x20);
        guest.core.signals.intr.set(true);
        // STI; REP STOSB over the page of code, which it leaves once; HLT.
        put(&mut guest, CODE, &[0xfb, 0xf3, 0xaa, HLT]);
        guest.core.cpu.set_r(RAX, 0x90);
        guest.core.cpu.set_r(crate::translate::cpu::RDI, CODE + 0x100);
        guest.core.cpu.set_r(RCX, 0x20);
        let mut bus = Vectors;
        assert_eq!(guest.run_with(&mut bus), Halt::Halted);
        assert_eq!((guest.core.cpu.rip, guest.core.cpu.r(RCX)), (end, 0));
    });
}

/// Has an interrupt.
struct Vectors;

impl VcpuIo for Vectors {
    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        Some(0x20)
    }
}

/// Panics at every store to a device.
struct Broken;

impl VcpuIo for Broken {
    fn mmio_write(&mut self, _: GuestAddress, _: &[u8]) {
        std::panic::panic_any("no such device");
    }
}

#[test]
fn a_panic_of_a_callback_leaves_the_rest_of_the_block_to_be_run() {
    on_each_tier(Guest::long, |mut guest| {
        guest.write::<8>(entry(0x2_0000), 0x80_0007);
        // NOP; MOV [0x20000], EAX, which is the device's; INC ECX; HLT.
        put(&mut guest, CODE, &[0x90, 0x89, 0x04, 0x25, 0, 0, 2, 0, 0xff, 0xc1, HLT]);
        let mut bus = Broken;
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| guest.run_with(&mut bus)));
        assert!(result.is_err());
        assert_eq!(guest.core.cpu.rip, CODE + 8);
        assert_eq!(guest.run(), Halt::Halted);
        assert_eq!((guest.core.cpu.r(RCX), guest.core.retired()), (1, 4));
    });
}
