//! KVM's structures of a vCPU to and from the portable state.

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_PAYLOAD,
    KVM_VCPUEVENT_VALID_SHADOW, KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_X86_SHADOW_INT_MOV_SS,
    KVM_X86_SHADOW_INT_STI, Msrs, kvm_dtable, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs,
    kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcr, kvm_xcrs,
};
use kvm_ioctls::{Cap, KvmNestedStateBuffer, VcpuFd};

use super::handle::NMI;
use super::vcpu::KvmVcpu;
use super::{NAME, host, same_fields, sys};
use crate::error::{Error, Result};
use crate::hypervisor::InterruptMode;
use crate::state::{
    CpuState, DescriptorTable, ExceptionEvent, ExceptionStage, GeneralRegisters, InterruptEvent,
    InterruptShadow, LocalApicState, Msr, NmiState, PendingEvents, RunState, Segment, SystemRegisters,
    XsaveArea,
};
use crate::vcpu::Vcpu as _;

/// MSRs that have a field elsewhere in the state: APIC base, EFER, FS base, GS base.
const MSRS_WITH_A_FIELD: [u32; 4] = [0x1b, 0xc000_0080, 0xc000_0100, 0xc000_0101];

/// IA32_TIME_STAMP_COUNTER.
pub(super) const IA32_TSC: u32 = 0x10;

/// MSRs in one KVM_GET_MSRS or KVM_SET_MSRS.
const MSR_BATCH: usize = 128;

fn invalid(element: &'static str, problem: impl Into<String>) -> Error {
    Error::InvalidState { element, problem: problem.into() }
}

/// The error of an ioctl that takes a piece of state: EINVAL says that the piece is wrong.
fn refused(element: &'static str, operation: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |errno| match errno.errno() {
        libc::EINVAL => invalid(element, format!("{operation} refuses it as a state no processor can be in")),
        _ => host(operation, errno),
    }
}

pub(super) fn general_from_kvm(r: &kvm_regs) -> GeneralRegisters {
    same_fields!(r => GeneralRegisters {
        rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags,
    })
}

pub(super) fn general_to_kvm(r: &GeneralRegisters) -> kvm_regs {
    same_fields!(r => kvm_regs {
        rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags,
    })
}

fn segment_from_kvm(s: &kvm_segment) -> Segment {
    Segment {
        selector: s.selector,
        base: s.base,
        limit: s.limit,
        kind: s.type_,
        code_or_data: s.s != 0,
        dpl: s.dpl,
        present: s.present != 0,
        available: s.avl != 0,
        long: s.l != 0,
        big: s.db != 0,
        granularity: s.g != 0,
        unusable: s.unusable != 0,
    }
}

/// The type field has 4 bits and the privilege level 2 (Intel SDM 3A 3.4.5).
fn check_segment(element: &'static str, s: &Segment) -> Result<()> {
    if s.kind > 0xf || s.dpl > 3 {
        return Err(invalid(
            element,
            format!("type {:#x} (at most 0xf), privilege level {} (at most 3)", s.kind, s.dpl),
        ));
    }
    Ok(())
}

fn segment_to_kvm(s: &Segment) -> kvm_segment {
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.kind,
        present: u8::from(s.present),
        dpl: s.dpl,
        db: u8::from(s.big),
        s: u8::from(s.code_or_data),
        l: u8::from(s.long),
        g: u8::from(s.granularity),
        avl: u8::from(s.available),
        unusable: u8::from(s.unusable),
        padding: 0,
    }
}

fn table_from_kvm(t: &kvm_dtable) -> DescriptorTable {
    DescriptorTable { base: t.base, limit: t.limit }
}

fn table_to_kvm(t: &DescriptorTable) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, ..Default::default() }
}

fn read_xcr0(fd: &VcpuFd) -> u64 {
    // Without XSAVE in CPUID KVM has no XCRs to tell.
    let xcrs = fd.get_xcrs().unwrap_or_default();
    let count = usize::try_from(xcrs.nr_xcrs).unwrap_or(0);
    xcrs.xcrs.iter().take(count).find(|xcr| xcr.xcr == 0).map_or(1, |xcr| xcr.value)
}

fn write_xcr0(fd: &VcpuFd, value: u64) -> Result<()> {
    if read_xcr0(fd) == value {
        return Ok(());
    }
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    if let Some(first) = xcrs.xcrs.first_mut() {
        *first = kvm_xcr { xcr: 0, value, ..Default::default() };
    }
    fd.set_xcrs(&xcrs).map_err(refused("system.xcr0", "KVM_SET_XCRS"))
}

/// Linear address of the next instruction.
pub(super) fn linear(general: &GeneralRegisters, system: &SystemRegisters) -> u64 {
    match system.code_bits() {
        64 => general.rip,
        _ => system.cs.base.wrapping_add(general.rip) & u64::from(u32::MAX),
    }
}

pub(super) fn linear_rip(vcpu: &mut KvmVcpu) -> Result<u64> {
    let general = vcpu.registers()?;
    Ok(linear(&general, &read_system(vcpu)?))
}

/// Whether `gva` is canonical in the mode of `s` (Intel SDM 1 3.3.7.1): any is outside of long mode.
pub(super) fn is_canonical(s: &kvm_sregs, gva: u64) -> bool {
    const CR4_LA57: u64 = 1 << 12;
    if s.efer & SystemRegisters::EFER_LMA == 0 {
        return true;
    }
    let unused = if s.cr4 & CR4_LA57 != 0 { 64 - 57 } else { 64 - 48 };
    let sign_extended = (gva << unused).cast_signed() >> unused;
    sign_extended.cast_unsigned() == gva
}

/// Segment, table and control registers; the others are zero.
pub(super) fn read_segments(vcpu: &KvmVcpu) -> Result<SystemRegisters> {
    let s = match vcpu.synced_sregs() {
        Some(sregs) => sregs,
        None => vcpu.fd().get_sregs().map_err(|errno| host("KVM_GET_SREGS", errno))?,
    };
    Ok(SystemRegisters {
        cs: segment_from_kvm(&s.cs),
        ds: segment_from_kvm(&s.ds),
        es: segment_from_kvm(&s.es),
        fs: segment_from_kvm(&s.fs),
        gs: segment_from_kvm(&s.gs),
        ss: segment_from_kvm(&s.ss),
        tr: segment_from_kvm(&s.tr),
        ldtr: segment_from_kvm(&s.ldt),
        gdtr: table_from_kvm(&s.gdt),
        idtr: table_from_kvm(&s.idt),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        ..SystemRegisters::default()
    })
}

pub(super) fn read_system(vcpu: &KvmVcpu) -> Result<SystemRegisters> {
    let fd = vcpu.fd();
    let segments = read_segments(vcpu)?;
    let debug = fd.get_debug_regs().map_err(|errno| host("KVM_GET_DEBUGREGS", errno))?;
    Ok(SystemRegisters { dr: debug.db, dr6: debug.dr6, dr7: debug.dr7, xcr0: read_xcr0(fd), ..segments })
}

/// Defined bits of EFER (Intel SDM 3A 2.2.1, AMD APM 2 3.1.7); KVM_SET_SREGS lets the others pass.
const EFER_DEFINED: u64 = 0x0036_fd01;

/// KVM's form of segment, table and control registers, as far as KVM itself would not look at them checked.
pub(super) fn sregs_to_kvm(r: &SystemRegisters) -> Result<kvm_sregs> {
    if r.efer & !EFER_DEFINED != 0 {
        return Err(invalid("system.efer", format!("{:#x} sets bits outside of {EFER_DEFINED:#x}", r.efer)));
    }
    if r.cr8 > 0xf {
        return Err(invalid("system.cr8", format!("{:#x}, CR8 has 4 bits", r.cr8)));
    }
    for (element, segment) in [
        ("system.cs", &r.cs),
        ("system.ds", &r.ds),
        ("system.es", &r.es),
        ("system.fs", &r.fs),
        ("system.gs", &r.gs),
        ("system.ss", &r.ss),
        ("system.tr", &r.tr),
        ("system.ldtr", &r.ldtr),
    ] {
        check_segment(element, segment)?;
    }
    Ok(kvm_sregs {
        cs: segment_to_kvm(&r.cs),
        ds: segment_to_kvm(&r.ds),
        es: segment_to_kvm(&r.es),
        fs: segment_to_kvm(&r.fs),
        gs: segment_to_kvm(&r.gs),
        ss: segment_to_kvm(&r.ss),
        tr: segment_to_kvm(&r.tr),
        ldt: segment_to_kvm(&r.ldtr),
        gdt: table_to_kvm(&r.gdtr),
        idt: table_to_kvm(&r.idtr),
        cr0: r.cr0,
        cr2: r.cr2,
        cr3: r.cr3,
        cr4: r.cr4,
        cr8: r.cr8,
        efer: r.efer,
        apic_base: r.apic_base,
        interrupt_bitmap: [0; 4],
    })
}

pub(super) fn write_system(vcpu: &KvmVcpu, r: &SystemRegisters) -> Result<()> {
    let fd = vcpu.fd();
    let sregs = sregs_to_kvm(r)?;
    fd.set_sregs(&sregs).map_err(refused("system", "KVM_SET_SREGS"))?;
    vcpu.shared.page.set_cr8(r.cr8);
    let mut debug = fd.get_debug_regs().map_err(|errno| host("KVM_GET_DEBUGREGS", errno))?;
    if (debug.db, debug.dr6, debug.dr7) != (r.dr, r.dr6, r.dr7) {
        (debug.db, debug.dr6, debug.dr7) = (r.dr, r.dr6, r.dr7);
        fd.set_debug_regs(&debug).map_err(refused("system.dr", "KVM_SET_DEBUGREGS"))?;
    }
    write_xcr0(fd, r.xcr0)
}

fn msr_list(entries: &[kvm_msr_entry]) -> Result<Msrs> {
    Msrs::from_entries(entries)
        .map_err(|error| Error::Backend { backend: NAME, source: format!("{error:?}").into() })
}

/// All MSRs of `indices` that this vCPU has.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let (batch, _) = rest.split_at(rest.len().min(MSR_BATCH));
        let entries: Vec<_> =
            batch.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut list = msr_list(&entries)?;
        let read = fd.get_msrs(&mut list).map_err(|errno| host("KVM_GET_MSRS", errno))?;
        found.extend(
            list.as_slice().iter().take(read).map(|entry| Msr { index: entry.index, value: entry.data }),
        );
        // KVM stops at the first register that it does not have: go on behind it.
        let done = if read < batch.len() { read + 1 } else { read };
        rest = rest.get(done..).unwrap_or_default();
    }
    Ok(found)
}

/// Writes MSRs in the given order. A register that cannot be written is right if it holds the value already.
fn write_msrs(fd: &VcpuFd, msrs: &[Msr]) -> Result<()> {
    let mut rest = msrs;
    while !rest.is_empty() {
        let (batch, _) = rest.split_at(rest.len().min(MSR_BATCH));
        let entries: Vec<_> = batch
            .iter()
            .map(|msr| kvm_msr_entry { index: msr.index, data: msr.value, ..Default::default() })
            .collect();
        let written = fd.set_msrs(&msr_list(&entries)?).map_err(|errno| host("KVM_SET_MSRS", errno))?;
        let mut done = written;
        if let Some(stuck) = batch.get(written) {
            let current = read_msrs(fd, &[stuck.index])?;
            if current.first().is_none_or(|msr| msr.value != stuck.value) {
                return Err(invalid(
                    "msrs",
                    format!(
                        "MSR {:#x} cannot become {:#x} here, it is {current:x?}",
                        stuck.index, stuck.value
                    ),
                ));
            }
            done += 1;
        }
        rest = rest.get(done..).unwrap_or_default();
    }
    Ok(())
}

fn lapic_from_kvm(lapic: &kvm_lapic_state) -> LocalApicState {
    let mut state = LocalApicState::default();
    for (register, bytes) in state.registers.iter_mut().zip(lapic.regs.chunks(16)) {
        let mut word = [0; 4];
        word.iter_mut().zip(bytes).for_each(|(to, from)| *to = from.cast_unsigned());
        *register = u32::from_le_bytes(word);
    }
    state
}

fn lapic_to_kvm(state: &LocalApicState) -> kvm_lapic_state {
    let mut lapic = kvm_lapic_state { regs: [0; 1024] };
    for (register, bytes) in state.registers.iter().zip(lapic.regs.chunks_mut(16)) {
        bytes.iter_mut().zip(register.to_le_bytes()).for_each(|(to, from)| *to = from.cast_signed());
    }
    lapic
}

fn events_from_kvm(e: &kvm_vcpu_events, intr: bool) -> PendingEvents {
    let stage = if e.exception.injected != 0 {
        Some(ExceptionStage::Injected)
    } else if e.exception.pending != 0 {
        Some(ExceptionStage::Pending)
    } else {
        None
    };
    let shadow = u32::from(e.interrupt.shadow);
    PendingEvents {
        exception: stage.map(|stage| ExceptionEvent {
            vector: e.exception.nr,
            error_code: (e.exception.has_error_code != 0).then_some(e.exception.error_code),
            stage,
            payload: (e.exception_has_payload != 0).then_some(e.exception_payload),
        }),
        interrupt: (e.interrupt.injected != 0)
            .then_some(InterruptEvent { vector: e.interrupt.nr, software: e.interrupt.soft != 0 }),
        nmi: NmiState {
            injected: e.nmi.injected != 0,
            pending: e.nmi.pending != 0,
            masked: e.nmi.masked != 0,
        },
        shadow: InterruptShadow {
            sti: shadow & KVM_X86_SHADOW_INT_STI != 0,
            mov_ss: shadow & KVM_X86_SHADOW_INT_MOV_SS != 0,
        },
        intr,
        sipi_vector: e.sipi_vector.to_le_bytes()[0],
    }
}

/// What the events of a vCPU say of interrupts that are held off.
#[cfg(feature = "translate")]
pub(super) fn interrupt_shadow(e: &kvm_vcpu_events) -> InterruptShadow {
    events_from_kvm(e, false).shadow
}

pub(super) fn shadow_to_kvm(shadow: InterruptShadow) -> u8 {
    let [sti, ..] = KVM_X86_SHADOW_INT_STI.to_le_bytes();
    let [mov_ss, ..] = KVM_X86_SHADOW_INT_MOV_SS.to_le_bytes();
    let sti = if shadow.sti { sti } else { 0 };
    sti | if shadow.mov_ss { mov_ss } else { 0 }
}

fn events_to_kvm(events: &PendingEvents, payloads: bool, local_apic: bool) -> kvm_vcpu_events {
    let mut e = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SHADOW,
        sipi_vector: u32::from(events.sipi_vector),
        ..Default::default()
    };
    if local_apic {
        e.flags |= KVM_VCPUEVENT_VALID_SIPI_VECTOR;
    }
    if payloads {
        e.flags |= KVM_VCPUEVENT_VALID_PAYLOAD;
    }
    if let Some(exception) = events.exception {
        // A kernel that does not know pending exceptions applies their side effects at once and injects.
        let pending = exception.stage == ExceptionStage::Pending && payloads;
        e.exception.injected = u8::from(!pending);
        e.exception.pending = u8::from(pending);
        e.exception.nr = exception.vector;
        e.exception.has_error_code = u8::from(exception.error_code.is_some());
        e.exception.error_code = exception.error_code.unwrap_or(0);
        if let (true, Some(payload)) = (pending, exception.payload) {
            e.exception_has_payload = 1;
            e.exception_payload = payload;
        }
    }
    if let Some(interrupt) = events.interrupt {
        e.interrupt.injected = 1;
        e.interrupt.nr = interrupt.vector;
        e.interrupt.soft = u8::from(interrupt.software);
    }
    e.interrupt.shadow = shadow_to_kvm(events.shadow);
    e.nmi.injected = u8::from(events.nmi.injected);
    e.nmi.pending = u8::from(events.nmi.pending);
    e.nmi.masked = u8::from(events.nmi.masked);
    e
}

fn run_state_to_kvm(state: RunState) -> u32 {
    match state {
        RunState::Running => KVM_MP_STATE_RUNNABLE,
        RunState::Halted => KVM_MP_STATE_HALTED,
        RunState::WaitForInit => KVM_MP_STATE_UNINITIALIZED,
        RunState::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
    }
}

fn has_local_apic(vcpu: &KvmVcpu) -> bool {
    vcpu.vm.interrupts != InterruptMode::External
}

/// Refuses to save a vCPU that runs, or may run, guests of its own.
fn check_not_nested(vcpu: &KvmVcpu) -> Result<()> {
    if !vcpu.vm.fd.check_extension(Cap::NestedState) {
        return Ok(());
    }
    let mut nested = KvmNestedStateBuffer::empty();
    match vcpu.fd().nested_state(&mut nested) {
        Ok(None) => Ok(()),
        Ok(Some(_)) => Err(Error::unsupported(
            "saving a vCPU with nested virtualization in use",
            "the state has no place for it",
        )),
        Err(errno) => Err(host("KVM_GET_NESTED_STATE", errno)),
    }
}

pub(super) fn save(vcpu: &KvmVcpu) -> Result<CpuState> {
    let fd = vcpu.fd();
    check_not_nested(vcpu)?;
    let local_apic = has_local_apic(vcpu);
    // First of all, since it lets KVM take a waiting INIT or SIPI.
    let mp_state = fd.get_mp_state().map_err(|errno| host("KVM_GET_MP_STATE", errno))?.mp_state;
    let run_state = match mp_state {
        KVM_MP_STATE_UNINITIALIZED => RunState::WaitForInit,
        KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_SIPI_RECEIVED => RunState::WaitForSipi,
        KVM_MP_STATE_HALTED => RunState::Halted,
        _ if vcpu.halted => RunState::Halted,
        _ => RunState::Running,
    };
    let general = general_from_kvm(&fd.get_regs().map_err(|errno| host("KVM_GET_REGS", errno))?);
    let bytes = sys::xsave(fd, vcpu.vm.xsave_size).map_err(|errno| host("KVM_GET_XSAVE", errno))?;
    let xsave = XsaveArea::from_bytes(bytes).ok_or_else(|| {
        invalid("xsave", format!("KVM's area of {} bytes is too large", vcpu.vm.xsave_size))
    })?;
    let indices: Vec<u32> =
        vcpu.vm.saved_msrs.iter().copied().filter(|index| !MSRS_WITH_A_FIELD.contains(index)).collect();
    let mut msrs = read_msrs(fd, &indices)?;
    msrs.sort_unstable_by_key(|msr| msr.index);
    if let Some(tsc) = msrs.iter_mut().find(|msr| msr.index == IA32_TSC) {
        tsc.value = tsc.value.wrapping_sub(vcpu.outstanding_pause());
    }
    let lapic = if local_apic {
        Some(lapic_from_kvm(&fd.get_lapic().map_err(|errno| host("KVM_GET_LAPIC", errno))?))
    } else {
        None
    };
    let events = fd.get_vcpu_events().map_err(|errno| host("KVM_GET_VCPU_EVENTS", errno))?;
    if events.smi.smm != 0 || events.smi.pending != 0 {
        return Err(Error::unsupported(
            "saving a vCPU in system-management mode",
            "the state has no place for it",
        ));
    }
    let mut events = events_from_kvm(&events, vcpu.shared.intr.is_high());
    // One that no run has handed to KVM yet.
    events.nmi.pending |= vcpu.shared.pending() & NMI != 0;
    Ok(CpuState {
        general,
        system: read_system(vcpu)?,
        xsave,
        msrs,
        local_apic: lapic,
        events,
        run_state,
        backend: None,
    })
}

pub(super) fn restore(vcpu: &KvmVcpu, state: &CpuState) -> Result<()> {
    let fd = vcpu.fd();
    let local_apic = has_local_apic(vcpu);
    if !local_apic && matches!(state.run_state, RunState::WaitForInit | RunState::WaitForSipi) {
        return Err(invalid("run_state", "waiting for INIT or SIPI needs a local APIC, this VM has none"));
    }
    let xsave = state.xsave.bytes();
    if xsave.get(vcpu.vm.xsave_size..).is_some_and(|beyond| beyond.iter().any(|&byte| byte != 0)) {
        return Err(invalid(
            "xsave",
            format!("it holds more than the {} bytes of this host", vcpu.vm.xsave_size),
        ));
    }
    // Bits 16 to 31 are reserved (Intel SDM 1 10.2.3); loading them would be #GP.
    if state.xsave.mxcsr() >> 16 != 0 {
        return Err(invalid("xsave", format!("MXCSR {:#x} sets bits above 15", state.xsave.mxcsr())));
    }
    write_system(vcpu, &state.system)?;
    fd.set_regs(&general_to_kvm(&state.general)).map_err(refused("general", "KVM_SET_REGS"))?;
    sys::set_xsave(fd, vcpu.vm.xsave_size, xsave).map_err(refused("xsave", "KVM_SET_XSAVE"))?;
    // Before the MSRs: the TSC deadline is that of the local APIC's timer.
    if let (true, Some(lapic)) = (local_apic, &state.local_apic) {
        fd.set_lapic(&lapic_to_kvm(lapic)).map_err(refused("local_apic", "KVM_SET_LAPIC"))?;
    }
    write_msrs(fd, &state.msrs)?;
    if local_apic {
        let mp_state = kvm_mp_state { mp_state: run_state_to_kvm(state.run_state) };
        fd.set_mp_state(mp_state).map_err(refused("run_state", "KVM_SET_MP_STATE"))?;
    }
    // Last: the registers' own ioctls drop events.
    let events = events_to_kvm(&state.events, vcpu.vm.exception_payloads, local_apic);
    fd.set_vcpu_events(&events).map_err(refused("events", "KVM_SET_VCPU_EVENTS"))?;
    vcpu.shared.intr.set(vcpu.shared.has_intr() && state.events.intr);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_survive_both_ways() {
        let segments = [
            Segment::code64(0x10),
            Segment::data32(0x18),
            Segment::real_mode(0xf000, true),
            Segment::task_state(8, 0x1234_5678_9abc),
            Segment::null(),
            Segment { dpl: 3, available: true, ..Segment::code32(0x23) },
        ];
        for segment in segments {
            assert_eq!(segment_from_kvm(&segment_to_kvm(&segment)), segment);
        }
    }

    #[test]
    fn fields_of_a_segment_have_their_widths() {
        assert!(check_segment("cs", &Segment { kind: 0xf, dpl: 3, ..Segment::code32(8) }).is_ok());
        assert!(check_segment("cs", &Segment { kind: 0x10, ..Segment::code32(8) }).is_err());
        assert!(check_segment("cs", &Segment { dpl: 4, ..Segment::code32(8) }).is_err());
    }

    #[test]
    fn events_survive_both_ways() {
        let events = PendingEvents {
            exception: Some(ExceptionEvent {
                vector: 14,
                error_code: Some(2),
                stage: ExceptionStage::Pending,
                payload: Some(0xdead_b000),
            }),
            interrupt: Some(InterruptEvent { vector: 0x80, software: true }),
            nmi: NmiState { injected: true, pending: true, masked: true },
            shadow: InterruptShadow { sti: true, mov_ss: true },
            intr: true,
            sipi_vector: 0x9a,
        };
        assert_eq!(events_from_kvm(&events_to_kvm(&events, true, true), true), events);
        let none = PendingEvents::default();
        assert_eq!(events_from_kvm(&events_to_kvm(&none, false, false), false), none);
    }

    #[test]
    fn pending_becomes_injected_where_the_kernel_knows_no_payloads() {
        let exception = ExceptionEvent {
            stage: ExceptionStage::Pending,
            payload: Some(1),
            ..ExceptionEvent::injected(1, None)
        };
        let events = PendingEvents { exception: Some(exception), ..PendingEvents::default() };
        let kvm = events_to_kvm(&events, false, false);
        assert_eq!((kvm.exception.injected, kvm.exception.pending, kvm.exception_has_payload), (1, 0, 0));
    }

    #[test]
    fn canonical_addresses_depend_on_the_mode() {
        let mut s = kvm_sregs::default();
        assert!(is_canonical(&s, 0x8000_0000_0000));
        s.efer = SystemRegisters::EFER_LMA;
        assert!(is_canonical(&s, 0x7fff_ffff_ffff) && is_canonical(&s, 0xffff_8000_0000_0000));
        assert!(!is_canonical(&s, 0x8000_0000_0000) && !is_canonical(&s, 0xfffe_8000_0000_0000));
        s.cr4 = 1 << 12;
        assert!(is_canonical(&s, 0x8000_0000_0000) && !is_canonical(&s, 0x0100_0000_0000_0000));
    }

    #[test]
    fn local_apic_registers_stand_16_bytes_apart() {
        let mut state = LocalApicState::default();
        state.registers[2] = 0x0400_0000;
        state.registers[0x3e] = 0xb;
        let kvm = lapic_to_kvm(&state);
        assert_eq!((kvm.regs[0x23], kvm.regs[0x3e0]), (4, 0xb));
        assert_eq!(lapic_from_kvm(&kvm), state);
    }
}
