//! What a paravirtual domain adds to the states of its virtual machine and vCPUs: the backend's own parts of them, which have versions of
//! their own.

use vmm_memory::snapshot::StateFormat;
use vmm_memory::snapshot::mirror::{Family, VersionMap, Versionize, VersionizeResult};
use vmm_memory::{snapshot_mirror, snapshot_numbered, snapshot_states};

use crate::cpuid::CpuidTable;
use crate::xen_pv::saved::{
    CallbackState, ConsoleState, DescriptorState, DomainState, M2pRun, MarkRun, PeriodicState, PortKind,
    PortState, ProcessorState, RunstateState, SharedPage, TrapState, VcpuState,
};

/// The states here.
struct XenPvStates;

impl Family for XenPvStates {
    const FORMAT: StateFormat = StateFormat { name: "vmm-cpu/xen-pv", newest: 1, oldest: 1 };

    fn versions() -> VersionMap {
        VersionMap::new()
    }
}

snapshot_states!(XenPvStates: DomainState, VcpuState);

snapshot_mirror!(Domain of DomainState {
    ram: u64,
    compatibility_mode: bool,
    cpuid: CpuidTable,
    assists: u64,
    shutdown: Option<u8>,
    shutdown_code: Option<u8>,
    console: ConsoleState,
    ports: Vec<PortState>,
    grant_frames: u32,
    processors: Vec<ProcessorState>,
    shared: Vec<SharedPage>,
    marks: Vec<MarkRun>,
    m2p: Vec<M2pRun>,
});

snapshot_mirror!(Console of ConsoleState { ring: Option<u64>, port: Option<u32>, input: Vec<u8> });

snapshot_mirror!(Port of PortState { kind: PortKind, remote: u16, other: u32, vcpu: u32, sent: bool });

snapshot_numbered!(PortKind { Free = 0, Unbound = 1, Backend = 2, Bound = 3, Loop = 4, Virq = 5, Ipi = 6 });

snapshot_mirror!(Processor of ProcessorState {
    info: u64,
    info_registered: bool,
    nmi: bool,
    up: bool,
    initialised: bool,
    start: Option<Vec<u8>>,
    runstate: RunstateState,
    runstate_area: u64,
    time_area: u64,
});

snapshot_mirror!(Runstate of RunstateState { state: u32, entered: u64, time: [u64; 4] });

snapshot_mirror!(Shared of SharedPage { index: u64, bytes: Vec<u8> });

snapshot_mirror!(Marks of MarkRun { first: u64, count: u64, mark: u8 });

snapshot_mirror!(MachineToPhysical of M2pRun { first: u64, count: u64, value: u64, counts: bool });

snapshot_mirror!(Processing of VcpuState {
    online: bool,
    in_program: bool,
    selectors: [u16; 6],
    fs_base: u64,
    gs_base: u64,
    other_gs_base: u64,
    kernel_sp: u64,
    kernel_ss: u16,
    kernel_root: Option<u64>,
    user_root: Option<u64>,
    gdt_frames: Vec<u64>,
    gdt_entries: u64,
    descriptors: Vec<DescriptorState>,
    traps: Vec<TrapState>,
    event: CallbackState,
    failsafe: CallbackState,
    syscall: CallbackState,
    syscall32: CallbackState,
    sysenter: CallbackState,
    nmi: CallbackState,
    task_switched: bool,
    cr4: u64,
    iopl: u64,
    singleshot: Option<u64>,
    periodic: Option<PeriodicState>,
    system_time: u64,
});

snapshot_mirror!(Descriptor of DescriptorState { index: u16, value: u64 });

snapshot_mirror!(Trap of TrapState { vector: u8, flags: u8, cs: u16, address: u64 });

snapshot_mirror!(Callback of CallbackState { rip: u64, masks_events: bool });

snapshot_mirror!(Periodic of PeriodicState { period: u64, next: u64 });
