//! An interrupt between any two instructions: one after each number of instructions, in a program whose flags are live across
//! instructions. What its handler sees is what the interpreter has there when it stops after that many.

use std::collections::BTreeSet;

use iced_x86::code_asm::{
    CodeAssembler, al, byte_ptr, cl, dword_ptr, eax, ebx, ecx, edx, ptr, qword_ptr, r8, r10, r11, r12, rax,
    rbp, rbx, rcx, rdi, rdx, rsi, rsp, xmm0, xmmword_ptr,
};
use vmm_cpu::state::{CpuState, GeneralRegisters};
use vmm_cpu::{EmptyBus, ExactStop, Halt, InterruptMode, VcpuIo};

use super::machine::{Bus, CODE, DATA, Device, Machine, PAGE, Ram, STACK, Tier, Trap, WINDOW, entry};
use super::program::{Code, Made, assemble, here, labelled};

/// Vector of the timer of the local APIC.
const VECTOR: u64 = 0x40;
const IF: u64 = 1 << 9;
/// A function of another page.
const FUNCTION: u64 = CODE + PAGE;
/// Rounds: the first through code that is new, the others through code that is linked.
const ROUNDS: u32 = 3;

/// Flags that live across many instructions, calls and the stack, strings, locked instructions, interrupts that are off for
/// a while, and the shadow of STI.
fn body(a: &mut CodeAssembler) -> Made {
    let (mut over, mut inner, mut done) = (a.create_label(), a.create_label(), a.create_label());
    a.mov(rdi, DATA)?;
    a.lea(rsi, ptr(rdi + 0x80))?;
    a.mov(rax, 0x8000_0000_0000_0001_u64)?;
    a.add(rax, rax)?;
    a.lea(rdx, ptr(rax + 5))?;
    a.mov(qword_ptr(rdi), rdx)?;
    a.adc(rdx, qword_ptr(rdi))?;
    a.push(rdx)?;
    a.seto(byte_ptr(rdi + 8))?;
    a.pushfq()?;
    a.sbb(rbx, 3)?;
    a.pop(r8)?;
    a.inc(dword_ptr(rdi + 16))?;
    a.jc(over)?;
    a.dec(rbx)?;
    a.set_label(&mut over)?;
    a.rcl(qword_ptr(rdi + 24), 3)?;
    a.call(FUNCTION)?;
    a.cmovs(rdx, rbx)?;
    a.pop(r10)?;
    // Strings, repeated and not.
    a.mov(r12, rcx)?;
    a.mov(ecx, 5)?;
    a.rep().movsb()?;
    a.lodsd()?;
    a.stosq()?;
    a.mov(ecx, 3)?;
    a.cmp(eax, edx)?;
    a.repne().scasb()?;
    a.setne(cl)?;
    a.add(byte_ptr(rdi), cl)?;
    // Interrupts off, and the shadows of STI and POPF.
    a.cli()?;
    a.xadd(dword_ptr(rsi), eax)?;
    a.sti()?;
    a.adc(ebx, ebx)?;
    a.pushfq()?;
    a.cli()?;
    a.rol(rbx, 7)?;
    a.popfq()?;
    a.adc(ebx, edx)?;
    // On already: no shadow.
    a.sti()?;
    a.setc(al)?;
    // A short loop.
    a.mov(ecx, 4)?;
    a.set_label(&mut inner)?;
    a.shr(rbx, 1)?;
    a.adc(qword_ptr(rdi), 0)?;
    a.loop_(inner)?;
    a.mov(rcx, r12)?;
    a.mov(rax, qword_ptr(rdi))?;
    a.lock().cmpxchg(qword_ptr(rdi), rbx)?;
    a.jne(done)?;
    a.lock().bts(dword_ptr(rdi), 5)?;
    a.set_label(&mut done)?;
    a.movq(xmm0, rax)?;
    a.paddq(xmm0, xmmword_ptr(DATA + 0x40))?;
    a.movups(xmmword_ptr(rdi + 0x21), xmm0)?;
    a.imul_2(edx, ebx)?;
    a.xchg(qword_ptr(rdi + 8), rdx)
}

/// Turns interrupts on, arms the timer for what is in R11, and runs [`body`] a few times.
fn program() -> (Code, [u64; 2]) {
    labelled(CODE, |a| {
        // Enabled by its spurious-interrupt vector register; TSC-deadline mode.
        a.mov(rax, WINDOW)?;
        a.mov(dword_ptr(rax + 0xf0), 0x1ff)?;
        a.mov(dword_ptr(rax + 0x320), (2 << 17 | VECTOR) as u32)?;
        a.mov(ecx, 0x6e0)?;
        a.mov(rax, r11)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.xor(eax, eax)?;
        a.mov(ecx, ROUNDS)?;
        a.sti()?;
        let begin = here(a)?;
        a.nop()?;
        let again = here(a)?;
        body(a)?;
        a.dec(ecx)?;
        a.jne(again)?;
        let end = here(a)?;
        a.cli()?;
        a.hlt()?;
        Ok([begin, end])
    })
}

fn machine(tier: Tier, deadline: u64) -> Machine {
    let (code, _) = program();
    let mut machine = Machine::with(tier, InterruptMode::LocalApic, &code);
    machine.ram.map(0, 0xfee0_0000 | entry::ALL);
    let function = assemble(FUNCTION, |a| {
        a.push(rbp)?;
        a.mov(rbp, rsp)?;
        a.sub(rsp, 0x18)?;
        a.mov(qword_ptr(rbp - 8), rbx)?;
        a.neg(rbx)?;
        a.leave()?;
        a.ret()
    });
    machine.ram.write(FUNCTION, &function.bytes);
    machine.ram.write(DATA, &(0..=255).map(|n: u8| n.wrapping_mul(29)).collect::<Vec<_>>());
    machine.set(|general| general.r11 = deadline);
    machine
}

/// What a run comes to.
#[derive(Debug, PartialEq)]
struct End {
    general: GeneralRegisters,
    data: Vec<u8>,
    stack: Vec<u8>,
}

impl End {
    /// But for R11, which says when the timer was to expire.
    fn of(machine: &mut Machine) -> Self {
        let mut general = machine.vcpu.registers().unwrap();
        general.r11 = 0;
        Self { general, data: machine.ram.bytes(DATA, 0x200), stack: machine.ram.bytes(STACK - 0x100, 0x100) }
    }
}

/// A run with an interrupt.
struct Seen {
    trap: Trap,
    end: End,
}

/// Lets the timer expire after so many instructions.
fn interrupted(tier: Tier, after: u64) -> Option<Seen> {
    let mut machine = machine(tier, after);
    let mut trap = None;
    let on_trap = |seen: &mut Trap, _: &Ram| assert!(trap.replace(*seen).is_none(), "a second trap");
    let mut bus = Bus { ram: machine.ram.clone(), on_trap, device: Device::default() };
    run_to_end(&mut machine, &mut bus);
    trap.map(|trap| Seen { trap, end: End::of(&mut machine) })
}

/// Runs to the HLT, which waits for ever: until a time that is far off.
fn run_to_end(machine: &mut Machine, bus: &mut dyn VcpuIo) {
    machine.vcpu.exact_stops().unwrap().stop_at(ExactStop::none().at_guest_time(1_000_000));
    assert_eq!(machine.vcpu.run(bus).unwrap(), Halt::ExactStop);
    machine.check_tier();
}

/// The interpreter's state after each number of instructions, from where interrupts are on for the first time to the end.
fn states() -> Vec<(u64, CpuState)> {
    let mut machine = machine(Tier::INTERPRETED, 0);
    let (_, [begin, end]) = program();
    let mut states = Vec::new();
    for count in 1.. {
        machine.vcpu.exact_stops().unwrap().stop_at(ExactStop::none().at_instructions(count));
        assert_eq!(machine.vcpu.run(&mut EmptyBus).unwrap(), Halt::ExactStop);
        let state = machine.vcpu.save().unwrap();
        if !states.is_empty() || state.general.rip == begin {
            let is_end = state.general.rip == end;
            states.push((count, state));
            if is_end {
                return states;
            }
        }
    }
    unreachable!("the program ends")
}

/// Whether an interrupt may come there.
fn takes_interrupts(state: &CpuState) -> bool {
    state.general.rflags & IF != 0 && !state.events.shadow.sti && !state.events.shadow.mov_ss
}

#[test]
fn the_timer_expires_after_each_number_of_instructions() {
    let states = states();
    let mut machine = machine(Tier::INTERPRETED, 0);
    run_to_end(&mut machine, &mut EmptyBus);
    let undisturbed = End::of(&mut machine);
    let boundaries = states.iter().filter(|(_, state)| takes_interrupts(state));
    let possible: BTreeSet<u64> = boundaries.map(|(_, state)| state.general.rip).collect();
    let mut seen_at = BTreeSet::new();
    for (place, (count, _)) in states.iter().enumerate() {
        let expected = states[place..].iter().find(|(_, state)| takes_interrupts(state));
        for tier in [Tier::INTERPRETED, Tier::COUNTED] {
            let what = format!("{tier:?}, after {count}");
            let Some(seen) = interrupted(tier, *count) else {
                assert!(expected.is_none(), "{what}: nothing came");
                continue;
            };
            let (_, state) = expected.unwrap();
            assert_eq!((seen.trap.vector, seen.trap.error), (VECTOR, 0), "{what}");
            // R11 is what the timer was armed for.
            let there = GeneralRegisters { r11: *count, ..state.general };
            assert_eq!(seen.trap.general, there, "{what}");
            assert_eq!(seen.end, undisturbed, "{what}");
            seen_at.insert(seen.trap.general.rip);
        }
    }
    // An interrupt came at every boundary of the program that lets one in.
    assert_eq!(seen_at, possible);
    assert!(possible.len() > 50, "{} boundaries", possible.len());
}
