//! Attacks of 64-bit code, which can be translated, on each tier.

use std::sync::Arc;

use iced_x86::code_asm::{
    CodeAssembler, byte_ptr, dword_ptr, eax, ecx, edi, esi, qword_ptr, rcx, rsi, xmm0, xmmword_ptr,
};
use vmm_cpu::state::{GeneralRegisters, Segment};
use vmm_cpu::{CpuModel, EmptyBus, ExactStop, GuestAccess, Halt, VmConfig};
use vmm_memory::vm_memory::{Bytes, MemoryRegionAddress};

use super::attacks::take_away_and_put_back;
use super::flat::{self, Flat};
use super::guest::Tier;
use super::{alone, resident};
use crate::own_process;

/// Page tables.
const TABLES: u64 = 0x1_0000;

/// The first 32 MiB in large pages, each where it is, for everybody.
fn map_all(machine: &mut Flat) {
    machine.write(TABLES, &(TABLES + 0x1007).to_le_bytes());
    machine.write(TABLES + 0x1000, &(TABLES + 0x2007).to_le_bytes());
    for page in 0..16_u64 {
        machine.write(TABLES + 0x2000 + page * 8, &(page << 21 | 0x87).to_le_bytes());
    }
}

/// Blocks and translations are kept by how much there is in them.
#[test]
fn a_guest_that_runs_through_much_code_takes_little_memory() {
    if !own_process::is_it(
        "translate_support::translated::a_guest_that_runs_through_much_code_takes_little_memory",
    ) {
        return;
    }
    let size: u32 = 4 << 20;
    let code = flat::region(0x100_0000, size.into());
    // 63 NOPs and RET, again and again.
    let mut piece = [0x90; 64];
    piece[63] = 0xc3;
    for at in (0..u64::from(size)).step_by(64) {
        code.write_slice(&piece, MemoryRegionAddress(at)).unwrap();
    }
    // MOV EDI, start; CALL RDI; INC EDI; TEST EDI, 7; JNZ; ADD EDI, 56; CMP EDI, end; JB; HLT.
    let mut program = vec![0xbf, 0, 0, 0, 1, 0xff, 0xd7, 0xff, 0xc7, 0xf7, 0xc7, 7, 0, 0, 0, 0x75, 0xf4];
    program.extend([0x83, 0xc7, 56, 0x81, 0xff]);
    program.extend((0x100_0000 + size).to_le_bytes());
    program.extend([0x72, 0xe9, 0xf4]);
    for tier in Tier::ALL {
        let mut machine = Flat::long(tier, TABLES, 0x6000);
        map_all(&mut machine);
        machine.write(0x6000, &program);
        machine.vm.map_memory(Arc::clone(&code), GuestAccess::ReadWrite).unwrap();
        let before = resident();
        assert_eq!(machine.run(), Halt::Halted);
        assert_eq!(machine.vcpu.registers().unwrap().rdi, u64::from(0x100_0000 + size));
        let grown = resident().saturating_sub(before) >> 20;
        let most = if tier == Tier::Interpreted { 128 } else { 256 };
        assert!(grown < most, "{tier:?}: grown by {grown} MiB");
    }
}

/// A page of code at any number of linear addresses: what is kept about each is bounded, whether its code is translated
/// there or is new each time.
#[test]
fn a_guest_that_runs_at_many_addresses_takes_little_memory() {
    const FRAME: u64 = 0x8000;
    const INSTRUCTIONS: u64 = 250_000;
    if !own_process::is_it(
        "translate_support::translated::a_guest_that_runs_at_many_addresses_takes_little_memory",
    ) {
        return;
    }
    // ADD RDI, 0x1000; JMP RDI. Or the same with an INC of what is in the code itself, which is new each time.
    let codes: [&[u8]; 2] = [
        &[0x48, 0x81, 0xc7, 0, 0x10, 0, 0, 0xff, 0xe7],
        &[0x48, 0x81, 0xc7, 0, 0x10, 0, 0, 0xfe, 0x47, 12, 0x41, 0xb8, 0, 0, 0, 0, 0xff, 0xe7],
    ];
    for (tier, code) in
        [Tier::AtOnce, Tier::Later].into_iter().flat_map(|tier| codes.map(|code| (tier, code)))
    {
        // Every entry of every table leads to the next table, that of the last one to the frame.
        let mut machine = Flat::long(tier, TABLES, 0x40_0000);
        for level in 0..4 {
            let next = if level == 3 { FRAME } else { TABLES + (level + 1) * 0x1000 };
            for entry in 0..512 {
                machine.write(TABLES + level * 0x1000 + entry * 8, &(next | 7).to_le_bytes());
            }
        }
        machine.write(FRAME, code);
        let general = machine.vcpu.registers().unwrap();
        machine.vcpu.set_registers(&GeneralRegisters { rdi: 0x40_0000, ..general }).unwrap();
        let stop = ExactStop::none().at_instructions(INSTRUCTIONS);
        machine.vcpu.exact_stops().unwrap().stop_at(stop);
        let before = resident();
        // No watchdog: each kick would make all pages be looked up anew.
        assert_eq!(machine.vcpu.run(&mut EmptyBus).unwrap(), Halt::ExactStop);
        let grown = resident().saturating_sub(before) >> 20;
        assert!(grown < 128, "{tier:?}, {code:x?}: grown by {grown} MiB");
    }
}

/// Code that is looked up anew again and again is listed once.
#[test]
fn a_guest_that_invalidates_its_code_takes_no_memory() {
    const ROUNDS: u64 = 2_000_000;
    if !own_process::is_it("translate_support::translated::a_guest_that_invalidates_its_code_takes_no_memory")
    {
        return;
    }
    // INVLPG [RDI]; CALL RDI; DEC ECX; JNZ to the start; HLT. And RET, in the page that is called.
    let code = [0x0f, 0x01, 0x3f, 0xff, 0xd7, 0xff, 0xc9, 0x75, 0xf7, 0xf4];
    let mut machine = Flat::long(Tier::AtOnce, TABLES, 0x6000);
    for (at, entry) in [(0, TABLES + 0x1007), (0x1000, TABLES + 0x2007), (0x2000, TABLES + 0x3007)] {
        machine.write(TABLES + at, &u64::to_le_bytes(entry));
    }
    for page in 0..64_u64 {
        machine.write(TABLES + 0x3000 + page * 8, &(page << 12 | 7).to_le_bytes());
    }
    machine.write(0x6000, &code);
    machine.write(0x7000, &[0xc3]);
    let general = machine.vcpu.registers().unwrap();
    machine.vcpu.set_registers(&GeneralRegisters { rdi: 0x7000, rcx: ROUNDS, ..general }).unwrap();
    let before = resident();
    // No watchdog: a kick would make everything be looked up anew.
    assert_eq!(machine.vcpu.run(&mut EmptyBus).unwrap(), Halt::Halted);
    let grown = resident().saturating_sub(before);
    assert!(grown < 4 << 20, "grown by {grown} bytes");
}

/// As `attacks::memory_taken_away_by_another_thread_is_not_written`, at privilege levels 0 and 3: at that, memory may be
/// mapped in the address window.
#[test]
fn memory_taken_away_from_translated_code_is_not_written() {
    const AT: u64 = 0x10_0000;
    const LENGTH: u64 = 0x4000;
    const FUNCTION: u64 = 0x7000;
    let _alone = alone();
    let mut a = CodeAssembler::new(64).unwrap();
    let code = |a: &mut CodeAssembler| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(edi, AT as u32)?;
        a.mov(ecx, 0x1000)?;
        a.inc(esi)?;
        a.mov(eax, esi)?;
        a.rep().stosd()?;
        a.mov(qword_ptr(AT + 0x1008), rsi)?;
        a.add(qword_ptr(AT + 0x2ffc), rcx)?;
        a.lock().xadd(dword_ptr(AT + 0x10), eax)?;
        a.lock().cmpxchg8b(qword_ptr(AT + 0x20))?;
        a.movups(xmmword_ptr(AT + 0xffc), xmm0)?;
        a.call(FUNCTION)?;
        a.mov(dword_ptr(FUNCTION + 1), esi)?;
        a.mov(byte_ptr(FUNCTION + 0x800), iced_x86::code_asm::al)?;
        a.jmp(again)
    };
    code(&mut a).unwrap();
    let program = a.assemble(0x6000).unwrap();
    for (tier, user) in [(Tier::AtOnce, false), (Tier::AtOnce, true), (Tier::Window, true)] {
        let config = VmConfig::new(CpuModel::Host).vcpus(2);
        let mut machine = Flat::long_with(tier, &config, TABLES, 0x6000);
        map_all(&mut machine);
        machine.write(0x6000, &program);
        machine.write(FUNCTION, &[0xb8, 0, 0, 0, 0, 0xc3]);
        if user {
            let mut system = machine.vcpu.system_registers().unwrap();
            system.cs = Segment { dpl: 3, ..Segment::code64(0x33) };
            system.ss = Segment { dpl: 3, ..Segment::data32(0x2b) };
            machine.vcpu.set_system_registers(&system).unwrap();
        }
        let Flat { vcpu: first, vm, ram: _ram } = machine;
        let mut vcpus = [first, vm.create_vcpu(1).unwrap()];
        let state = vcpus[0].save().unwrap();
        vcpus[1].restore(&state).unwrap();
        let general = vcpus[0].registers().unwrap();
        vcpus[1].set_registers(&GeneralRegisters { rsp: 0xa000, ..general }).unwrap();
        take_away_and_put_back(&*vm, vcpus, &flat::region(AT, LENGTH));
    }
}
