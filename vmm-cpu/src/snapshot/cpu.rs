//! A vCPU.

use vmm_memory::snapshot::StateError;
use vmm_memory::snapshot::mirror::{Mirrored, VersionMap, Versionize, VersionizeResult};
use vmm_memory::{snapshot_mirror, snapshot_numbered};

use crate::state::{
    BackendBlob, CpuState, DescriptorTable, ExceptionEvent, ExceptionStage, GeneralRegisters, InterruptEvent,
    InterruptShadow, LocalApicState, Msr, NmiState, PendingEvents, RunState, Segment, SystemRegisters,
    XSAVE_HEADER_END, XSAVE_MAX, XsaveArea,
};

snapshot_mirror!(Cpu of CpuState {
    general: GeneralRegisters,
    system: SystemRegisters,
    xsave: XsaveArea,
    msrs: Vec<Msr>,
    local_apic: Option<LocalApicState>,
    events: PendingEvents,
    run_state: RunState,
    backend: Option<BackendBlob>,
});

snapshot_mirror!(General of GeneralRegisters {
    rax: u64, rbx: u64, rcx: u64, rdx: u64, rsi: u64, rdi: u64, rsp: u64, rbp: u64,
    r8: u64, r9: u64, r10: u64, r11: u64, r12: u64, r13: u64, r14: u64, r15: u64,
    rip: u64, rflags: u64,
});

snapshot_mirror!(System of SystemRegisters {
    cs: Segment, ds: Segment, es: Segment, fs: Segment, gs: Segment, ss: Segment, tr: Segment, ldtr: Segment,
    gdtr: DescriptorTable, idtr: DescriptorTable,
    cr0: u64, cr2: u64, cr3: u64, cr4: u64, cr8: u64, efer: u64, apic_base: u64,
    dr: [u64; 4], dr6: u64, dr7: u64, xcr0: u64,
});

snapshot_mirror!(SegmentRegister of Segment {
    selector: u16, base: u64, limit: u32, kind: u8, code_or_data: bool, dpl: u8, present: bool, available: bool,
    long: bool, big: bool, granularity: bool, unusable: bool,
});

snapshot_mirror!(Table of DescriptorTable { base: u64, limit: u16 });

snapshot_mirror!(ModelSpecific of Msr { index: u32, value: u64 });

snapshot_mirror!(LocalApic of LocalApicState { registers: [u32; 64] });

snapshot_mirror!(Pending of PendingEvents {
    exception: Option<ExceptionEvent>,
    interrupt: Option<InterruptEvent>,
    nmi: NmiState,
    shadow: InterruptShadow,
    intr: bool,
    sipi_vector: u8,
});

snapshot_mirror!(Exception of ExceptionEvent {
    vector: u8, error_code: Option<u32>, stage: ExceptionStage, payload: Option<u64>,
});

snapshot_mirror!(Interrupt of InterruptEvent { vector: u8, software: bool });

snapshot_mirror!(Nmi of NmiState { injected: bool, pending: bool, masked: bool });

snapshot_mirror!(Shadow of InterruptShadow { sti: bool, mov_ss: bool });

snapshot_mirror!(Blob of BackendBlob { backend: String, version: u32, data: Vec<u8> });

snapshot_numbered!(ExceptionStage { Pending = 0, Injected = 1 });
snapshot_numbered!(RunState { Running = 0, Halted = 1, WaitForInit = 2, WaitForSipi = 3 });

impl Mirrored for XsaveArea {
    type Mirror = Vec<u8>;

    fn mirror(&self) -> Vec<u8> {
        self.bytes().to_vec()
    }

    fn from_mirror(mirror: Vec<u8>) -> Result<Self, StateError> {
        let len = mirror.len();
        Self::from_bytes(mirror).ok_or_else(|| {
            format!("{len} bytes; an area in standard format has {XSAVE_HEADER_END} to {XSAVE_MAX}").into()
        })
    }
}
