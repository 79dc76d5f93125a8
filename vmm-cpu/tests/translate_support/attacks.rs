//! Single attacks: each was, or could have been, a way to hurt the host or to confuse the interpreter.

use std::sync::Arc;

use vmm_cpu::state::{DescriptorTable, ExceptionEvent, GeneralRegisters, InterruptEvent};
use vmm_cpu::{EmptyBus, Error, GuestAccess, Halt, InterruptMode, Vcpu, VcpuIo, Vm};
use vmm_memory::GuestRegion;
use vmm_memory::vm_memory::{Bytes, GuestAddress, GuestMemoryRegion, MemoryRegionAddress};

use super::flat::{self, Flat, SIZE};
use crate::own_process;

/// A task whose debug trap flag is set traps as soon as it is entered. If its handler is that task, this goes on for
/// ever; the busy bit, which would end it, is in memory that cannot be written.
#[test]
fn a_debug_task_that_traps_into_itself_answers_kicks() {
    let mut machine = Flat::new(0x6000, &[0xf1, 0xf4]);
    let table = flat::rom(0x10_0000, 0x1000);
    let tss: u64 = 0x0000_8900_3000_0067;
    let descriptors: [u64; 6] =
        [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, tss, tss, 0x0000_8900_3100_0067];
    for (at, descriptor) in (0..).step_by(8).zip(descriptors) {
        flat::fill(&table, at, &descriptor.to_le_bytes());
    }
    machine.vm.map_memory(table, GuestAccess::ReadOnly).unwrap();
    // Vector 1 is a task gate to the task at 0x3100.
    machine.write(0x2008, &0x0000_8500_0028_0000_u64.to_le_bytes());
    for (offset, value) in
        [(0x20, 0x6000_u32), (0x24, 2), (0x38, 0x9000), (0x4c, 8), (0x50, 0x10), (0x64, 0x60_0001)]
    {
        machine.write(0x3100 + offset, &value.to_le_bytes());
    }
    let mut system = machine.vcpu.system_registers().unwrap();
    system.gdtr = DescriptorTable { base: 0x10_0000, limit: 0x2f };
    machine.vcpu.set_system_registers(&system).unwrap();
    for _ in 0..3 {
        assert_eq!(machine.run_once(&mut EmptyBus), Halt::Interrupted);
        // What is on its way is part of the state.
        let state = machine.vcpu.save().unwrap();
        machine.vcpu.restore(&state).unwrap();
    }
    assert_eq!(machine.vcpu.system_registers().unwrap().tr.base, 0x3100, "the task was entered");
}

/// Fifteen bytes of an instruction that is longer, at the end of a page.
#[test]
fn an_instruction_that_is_too_long_faults_at_the_end_of_a_page() {
    for before in 1..=20 {
        let at = 0x7000 - before;
        let mut machine = Flat::new(at, &[0x66; 40]);
        // #GP: HLT at 0x5000, which is seen by where it is. #UD: HLT elsewhere.
        machine.write(0x2000 + 6 * 8, &0x0000_8e00_0008_5100_u64.to_le_bytes());
        machine.write(0x5100, &[0xf4]);
        machine.write(0x2000 + 13 * 8, &0x0000_8e00_0008_5000_u64.to_le_bytes());
        machine.write(0x1008, &0x00cf_9b00_0000_ffff_u64.to_le_bytes());
        machine.write(0x5000, &[0xf4]);
        assert_eq!(machine.run(), Halt::Halted, "{before} bytes before the end");
        // The processor says #GP; the decoder does not tell such an instruction from one that does not exist.
        let rip = machine.vcpu.registers().unwrap().rip;
        assert!(matches!(rip, 0x5001 | 0x5101), "{rip:#x}, {before} bytes before the end");
    }
}

/// Code that was decoded before its memory went away and came back is still watched for changes.
#[test]
fn code_in_memory_that_came_back_can_be_changed() {
    // CALL 0x7000; MOV EBX, EAX; MOV [0x7001], DL; CALL 0x7000; HLT.
    let code =
        [0xe8, 0xfb, 0x0f, 0, 0, 0x89, 0xc3, 0x88, 0x15, 0x01, 0x70, 0, 0, 0xe8, 0xee, 0x0f, 0, 0, 0xf4];
    let mut machine = Flat::new(0x6000, &code);
    // MOV EAX, 1; RET.
    machine.write(0x7000, &[0xb8, 1, 0, 0, 0, 0xc3]);
    for round in 1..4 {
        let general = machine.vcpu.registers().unwrap();
        machine.go_on(&GeneralRegisters { rip: 0x6000, rdx: round + 1, ..general });
        assert_eq!(machine.run(), Halt::Halted);
        let general = machine.vcpu.registers().unwrap();
        assert_eq!((general.rbx, general.rax), (round, round + 1));
        let ram = machine.vm.unmap_memory(GuestAddress(0)).unwrap();
        machine.vm.map_memory(ram, GuestAccess::ReadWrite).unwrap();
    }
}

/// A store through a mapping that refuses writes on the host would end the process.
#[test]
fn memory_that_the_host_cannot_write_is_not_writable() {
    let mut machine = Flat::new(0x6000, &[0xc7, 0x05, 0, 0, 0x10, 0, 1, 2, 3, 4, 0xf4]);
    let rom = flat::rom(0x10_0000, 0x1000);
    match machine.vm.map_memory(rom, GuestAccess::ReadWrite) {
        Ok(()) => panic!("a region was accepted whose host mapping is read-only"),
        Err(error @ Error::InvalidArgument { .. }) => {
            assert!(error.to_string().contains("0x100000"), "{error}")
        }
        Err(error) => panic!("{error:?}"),
    }
    assert_eq!(machine.run(), Halt::Halted);
}

/// Stores of every width and kind around both ends of a region, and at the end of the address space.
#[test]
fn accesses_across_the_ends_of_a_region_are_split() {
    #[derive(Default)]
    struct Log(Vec<(u64, Vec<u8>)>);
    impl VcpuIo for Log {
        fn mmio_write(&mut self, gpa: GuestAddress, data: &[u8]) {
            self.0.push((gpa.0, data.to_vec()));
        }
    }
    for end in [SIZE, 0] {
        for back in 0..=20_u64 {
            let at = end.wrapping_sub(back) & 0xffff_ffff;
            let at = u32::try_from(at).unwrap().to_le_bytes();
            for (code, bytes) in [
                // MOV byte, word and doubleword, MOVQ, MOVUPS, and LOCK ADD.
                (&[0xc6, 0x03, 0xaa][..], 1),
                (&[0x66, 0xc7, 0x03, 0xaa, 0xaa], 2),
                (&[0xc7, 0x03, 0xaa, 0xaa, 0xaa, 0xaa], 4),
                (&[0x66, 0x0f, 0xd6, 0x03], 8),
                (&[0x0f, 0x11, 0x03], 16),
                (&[0xf0, 0x83, 0x03, 0x01], 4),
                (&[0xf0, 0x0f, 0xc7, 0x0b], 8),
                (&[0x0f, 0xae, 0x03], 512),
            ] {
                let mut program = vec![0xbb];
                program.extend(at);
                program.extend(code);
                program.push(0xf4);
                let mut machine = Flat::new(0x6000, &program);
                let mut system = machine.vcpu.system_registers().unwrap();
                system.cr4 |= 0x600;
                machine.vcpu.set_system_registers(&system).unwrap();
                // Twice, since the second time the TLB knows the pages.
                for _ in 0..2 {
                    let general = machine.vcpu.registers().unwrap();
                    machine.go_on(&GeneralRegisters { rip: 0x6000, ..general });
                    let mut log = Log::default();
                    if machine.run_with(&mut log) != Halt::Halted {
                        // The last bytes of the segment: #GP, which has no handler.
                        continue;
                    }
                    for (gpa, data) in log.0 {
                        let (first, last) = (gpa, gpa + data.len() as u64 - 1);
                        assert!(first >= SIZE && first >> 12 == last >> 12, "{gpa:#x} {data:x?} {bytes}");
                    }
                }
            }
        }
    }
}

/// Pages of memory that was taken away by a callback in the middle of an instruction are not reached any more.
#[test]
fn memory_taken_away_by_a_callback_is_not_written() {
    struct Taker {
        vm: Arc<dyn Vm>,
        taken: bool,
    }
    impl VcpuIo for Taker {
        fn mmio_read(&mut self, _: GuestAddress, data: &mut [u8]) {
            data.fill(0x77);
            if !std::mem::replace(&mut self.taken, true) {
                self.vm.unmap_memory(GuestAddress(0x10_0000)).unwrap();
            }
        }
    }
    // MOV EDI, 0x100ff0; MOV ESI, 0x200ff0; MOV ECX, 12; REP MOVSD; ADD dword [0x100ffe], 1; HLT. The source is a device.
    let code = [
        0xbf, 0xf0, 0x0f, 0x10, 0, 0xbe, 0xf0, 0x0f, 0x20, 0, 0xb9, 12, 0, 0, 0, 0xf3, 0xa5, 0x83, 0x05,
        0xfe, 0x0f, 0x10, 0, 1, 0xf4,
    ];
    let mut machine = Flat::new(0x6000, &code);
    let movable = flat::region(0x10_0000, 0x2000);
    machine.vm.map_memory(Arc::clone(&movable), GuestAccess::ReadWrite).unwrap();
    let mut taker = Taker { vm: Arc::clone(&machine.vm), taken: false };
    assert_eq!(machine.run_with(&mut taker), Halt::Halted);
    let mut bytes = [0; 0x2000];
    movable.read_slice(&mut bytes, MemoryRegionAddress(0)).unwrap();
    assert!(taker.taken && bytes == [0; 0x2000]);
    // Nobody but this test holds it: neither map nor TLB.
    assert_eq!(Arc::strong_count(&movable), 1);
}

/// Two linear pages that are the same page, an instruction across them, and stores to it: its block is listed once.
#[test]
fn a_block_that_crosses_into_its_own_page_is_dropped_once() {
    use super::resident;
    if !own_process::is_it(
        "translate_support::attacks::a_block_that_crosses_into_its_own_page_is_dropped_once",
    ) {
        return;
    }
    // Paging: 0x8000 and 0x9000 are both the page at 0x8000; the rest is where it is.
    let mut machine = Flat::new(0x6000, &[]);
    machine.write(0x1_0000, &0x1_1007_u32.to_le_bytes());
    for page in 0..64_u32 {
        let frame = if page == 9 { 8 } else { page };
        machine.write(0x1_1000 + u64::from(page) * 4, &(frame << 12 | 7).to_le_bytes());
    }
    let mut system = machine.vcpu.system_registers().unwrap();
    (system.cr0, system.cr3) = (0x8000_0031, 0x1_0000);
    machine.vcpu.set_system_registers(&system).unwrap();
    // At 0x8ffd: MOV EAX, imm32, whose last two bytes are the first of the page; then RET. The loop: MOV byte [0x8000],
    // DL; CALL 0x8ffd; DEC ECX; JNZ; HLT.
    machine.write(0x8ffd, &[0xb8, 1, 2]);
    machine.write(0x8000, &[3, 4, 0xc3]);
    let code = [0x88, 0x15, 0, 0x80, 0, 0, 0xe8, 0xf2, 0x2f, 0, 0, 0xfe, 0xc2, 0x49, 0x75, 0xf0, 0xf4];
    machine.write(0x6000, &code);
    let rounds = 50_000;
    let mut before = 0;
    for half in 0..2 {
        let general = GeneralRegisters {
            rip: 0x6000,
            rsp: 0xf000,
            rcx: rounds,
            rdx: 0x55,
            rflags: 2,
            ..GeneralRegisters::default()
        };
        machine.go_on(&general);
        assert_eq!(machine.run(), Halt::Halted);
        let general = machine.vcpu.registers().unwrap();
        let last = (0x55 + rounds - 1) & 0xff;
        assert_eq!((general.rcx, general.rax), (0, 0x0403_0201 & 0xff00_ffff | last << 16));
        if half == 0 {
            before = resident();
        }
    }
    let grown = resident().saturating_sub(before);
    assert!(grown < 256 << 10, "grown by {grown} bytes");
}

/// An event that was about to be delivered when the run was kicked is saved again.
#[test]
fn events_on_their_way_are_part_of_the_state() {
    let mut machine = Flat::new(0x6000, &[0xf4]);
    let good = machine.vcpu.save().unwrap();
    for vector in [0, 6, 13, 14] {
        let mut state = good.clone();
        state.events.exception = Some(ExceptionEvent::injected(vector, (vector > 8).then_some(4)));
        machine.vcpu.restore(&state).unwrap();
        machine.vcpu.handle().kick();
        assert_eq!(machine.run_once(&mut EmptyBus), Halt::Interrupted);
        assert_eq!(machine.vcpu.save().unwrap().events, state.events);
    }
    let mut state = good.clone();
    state.events.interrupt = Some(InterruptEvent::new(0x80, true));
    machine.vcpu.restore(&state).unwrap();
    assert_eq!(machine.vcpu.save().unwrap().events, state.events);
}

/// INIT that a processor sends itself by a store in the middle of a block.
#[test]
fn a_processor_that_resets_itself_goes_on_where_reset_does() {
    // MOV [0xfee00300], 0x4500 to itself; then ADD EAX, 1; HLT.
    let mut code = vec![0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe, 0x00, 0x45, 0, 0];
    code.extend([0x83, 0xc0, 0x01, 0xf4]);
    let mut machine = Flat::with(&flat::config(InterruptMode::LocalApic), 0x6000, &code);
    let top = flat::region(0xffff_f000, 0x1000);
    // Where reset goes on: HLT.
    top.write_slice(&[0xf4], MemoryRegionAddress(0xff0)).unwrap();
    machine.vm.map_memory(top, GuestAccess::ReadWrite).unwrap();
    // There its local APIC waits for an interrupt; a kick may come before it got so far.
    for _ in 0..10_000 {
        assert_eq!(machine.run_once(&mut EmptyBus), Halt::Interrupted);
        if machine.vcpu.registers().unwrap().rip == 0xfff1 {
            break;
        }
    }
    let (general, system) = (machine.vcpu.registers().unwrap(), machine.vcpu.system_registers().unwrap());
    assert_eq!((general.rip, general.rax, system.cs.base), (0xfff1, 0, 0xffff_0000));
}

/// A guest can get to an address that is not canonical, between two instructions.
#[test]
fn a_guest_at_an_address_that_is_not_canonical_can_be_restored() {
    let mut machine = Flat::new(0x6000, &[0xf4]);
    let general = machine.vcpu.registers().unwrap();
    machine.vcpu.set_registers(&GeneralRegisters { rip: 0x8000_0000_0000, ..general }).unwrap();
    let state = machine.vcpu.save().unwrap();
    machine.vcpu.restore(&state).unwrap();
    assert_eq!(machine.run(), Halt::Shutdown);
}

/// A device thread takes memory away and puts it back, looks at the log and raises interrupts, while two vCPUs write the
/// memory and each other's code.
#[test]
fn memory_taken_away_by_another_thread_is_not_written() {
    const AT: u64 = 0x10_0000;
    const LENGTH: u64 = 0x4000;
    // MOV EDI, AT; MOV ECX, 0x1000; INC ESI; MOV EAX, ESI; REP STOSD.
    let mut code = vec![0xbf, 0, 0, 0x10, 0, 0xb9, 0, 0x10, 0, 0, 0x46, 0x89, 0xf0, 0xf3, 0xab];
    // LOCK XADD [AT + 0x10], EAX; LOCK CMPXCHG8B [AT + 0x20]; MOVUPS [AT + 0xffc], XMM0.
    code.extend([0xf0, 0x0f, 0xc1, 0x05, 0x10, 0, 0x10, 0, 0xf0, 0x0f, 0xc7, 0x0d, 0x20, 0, 0x10, 0]);
    code.extend([0x0f, 0x11, 0x05, 0xfc, 0x0f, 0x10, 0]);
    // CALL 0x7000; MOV [0x7001], ESI; JMP to the start.
    let call = 0x7000 - (0x6000 + i32::try_from(code.len()).unwrap() + 5);
    code.push(0xe8);
    code.extend(call.to_le_bytes());
    code.extend([0x89, 0x35, 0x01, 0x70, 0, 0]);
    let back = -(i32::try_from(code.len()).unwrap() + 5);
    code.push(0xe9);
    code.extend(back.to_le_bytes());

    let config = vmm_cpu::VmConfig::new(vmm_cpu::CpuModel::Host).vcpus(2);
    let mut machine = Flat::with(&config, 0x6000, &code);
    machine.write(0x7000, &[0xb8, 0, 0, 0, 0, 0xc3]);
    let mut system = machine.vcpu.system_registers().unwrap();
    system.cr4 |= 0x200;
    machine.vcpu.set_system_registers(&system).unwrap();
    let Flat { vcpu: mut first, vm, ram: _ram } = machine;
    let mut second = vm.create_vcpu(1).unwrap();
    second.restore(&first.save().unwrap()).unwrap();
    let general = first.registers().unwrap();
    second.set_registers(&GeneralRegisters { rsp: 0xa000, ..general }).unwrap();

    take_away_and_put_back(&*vm, [first, second], &flat::region(AT, LENGTH));
}

/// Takes memory away and puts it back while two vCPUs run: what is away is not written.
pub fn take_away_and_put_back(vm: &dyn Vm, mut vcpus: [Box<dyn Vcpu>; 2], movable: &Arc<GuestRegion>) {
    let at = movable.start_addr();
    vm.map_memory(Arc::clone(movable), GuestAccess::ReadWrite).unwrap();
    let handles = [vcpus[0].handle(), vcpus[1].handle()];
    let contents = || {
        let mut bytes = vec![0; usize::try_from(movable.len()).unwrap()];
        movable.read_slice(&mut bytes, MemoryRegionAddress(0)).unwrap();
        bytes
    };
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for vcpu in &mut vcpus {
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(std::sync::atomic::Ordering::SeqCst) {
                    assert_eq!(vcpu.run(&mut vmm_cpu::EmptyBus).unwrap(), Halt::Interrupted);
                }
            });
        }
        let log = vm.dirty_log().unwrap();
        let mut changes = 0;
        let mut last = contents();
        for round in 0..300 {
            let logs = round % 3 == 0;
            if logs {
                log.start(at).unwrap();
            }
            std::thread::sleep(std::time::Duration::from_micros(200));
            let mut dirty = vmm_memory::PageBitmap::for_region(movable);
            log.harvest(movable, &mut dirty).unwrap();
            vm.unmap_memory(at).unwrap();
            let now = contents();
            changes += u32::from(now != last);
            std::thread::sleep(std::time::Duration::from_micros(50));
            assert!(contents() == now, "memory was written after it was taken away");
            last = now;
            vm.map_memory(Arc::clone(movable), GuestAccess::ReadWrite).unwrap();
            handles[round & 1].kick();
        }
        stop.store(true, std::sync::atomic::Ordering::SeqCst);
        for handle in &handles {
            handle.kick();
        }
        assert!(changes > 10, "the guests hardly ran: {changes}");
    });
}
