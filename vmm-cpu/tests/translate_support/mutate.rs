//! Changes of registers and of saved states, as an input describes them.

use vmm_cpu::state::{
    CpuState, ExceptionEvent, ExceptionStage, GeneralRegisters, InterruptEvent, LocalApicState, Msr,
    RunState, XsaveArea,
};

use super::guest::{Mutation, Value};
use super::layout;

/// Changes one of the general registers, RFLAGS or RIP.
pub fn change_general(general: &mut GeneralRegisters, register: u8, value: u64) {
    let g = general;
    let registers = [
        &mut g.rax,
        &mut g.rbx,
        &mut g.rcx,
        &mut g.rdx,
        &mut g.rsi,
        &mut g.rdi,
        &mut g.rsp,
        &mut g.rbp,
        &mut g.r8,
        &mut g.r9,
        &mut g.r15,
        &mut g.rflags,
        &mut g.rip,
    ];
    let count = registers.len();
    for (n, place) in registers.into_iter().enumerate() {
        if n == usize::from(register) % count {
            *place = value;
        }
    }
}

/// Changes a state.
pub fn mutate(state: &mut CpuState, mutation: &Mutation) {
    let control = |state: &mut CpuState, n: u8, change: &dyn Fn(&mut u64)| {
        let s = &mut state.system;
        let [d0, d1, d2, d3] = &mut s.dr;
        let registers = [
            &mut s.cr0,
            &mut s.cr2,
            &mut s.cr3,
            &mut s.cr4,
            &mut s.cr8,
            &mut s.efer,
            &mut s.apic_base,
            d0,
            d1,
            d2,
            d3,
            &mut s.dr6,
            &mut s.dr7,
            &mut s.xcr0,
        ];
        let count = registers.len();
        for (index, register) in registers.into_iter().enumerate() {
            if index == usize::from(n) % count {
                change(register);
            }
        }
    };
    match *mutation {
        Mutation::General(register, value) => change_general(&mut state.general, register, value.get()),
        Mutation::Control(n, value) => control(state, n, &|register| *register = value.get()),
        Mutation::ControlBit(n, bit) => control(state, n, &|register| *register ^= 1 << (bit & 63)),
        Mutation::Segment(change) => layout::change_segment(&mut state.system, &change),
        Mutation::Table(n, base, limit) => {
            let table = if n & 1 == 0 { &mut state.system.gdtr } else { &mut state.system.idtr };
            (table.base, table.limit) = (base.get(), limit);
        }
        Mutation::Xsave(at, byte) => {
            let mut bytes = state.xsave.bytes().to_vec();
            bytes.resize(bytes.len().max(576 + usize::from(at >> 12) * 1000), 0x5a);
            let at = usize::from(at) % bytes.len().min(640);
            bytes[at] = byte;
            state.xsave = XsaveArea::from_bytes(bytes).unwrap();
        }
        Mutation::Msr(index, value) => {
            state.msrs.retain(|msr| msr.index != index.get());
            state.msrs.push(Msr { index: index.get(), value: value.get() });
        }
        Mutation::Apic(register, value) => {
            if let Some(apic) = &mut state.local_apic {
                apic.registers[usize::from(register & 63)] = value;
            }
        }
        Mutation::NoApic => state.local_apic = None,
        Mutation::AnApic => {
            state.local_apic.get_or_insert_with(LocalApicState::default);
        }
        Mutation::Exception { vector, error, pending, payload } => {
            let mut event = ExceptionEvent::injected(vector & 0x3f, error);
            if pending {
                event.stage = ExceptionStage::Pending;
            }
            event.payload = payload.map(Value::get);
            state.events.exception = Some(event);
        }
        Mutation::Interrupt { vector, software } => {
            state.events.interrupt = Some(InterruptEvent::new(vector, software));
        }
        Mutation::Nmi(bits) => {
            let events = &mut state.events;
            events.nmi.injected = bits & 1 != 0;
            events.nmi.pending = bits & 2 != 0;
            events.nmi.masked = bits & 4 != 0;
            events.shadow.sti = bits & 8 != 0;
            events.shadow.mov_ss = bits & 16 != 0;
            events.intr = bits & 32 != 0;
        }
        Mutation::Run(n) => {
            let states = [RunState::Running, RunState::Halted, RunState::WaitForInit, RunState::WaitForSipi];
            state.run_state = states[usize::from(n & 3)];
        }
    }
}
