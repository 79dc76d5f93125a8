//! A vCPU, as the trait shows it.

use std::sync::Arc;
use std::time::Duration;

use vmm_memory::vm_memory::GuestAddress;

use super::apic::{ApicFeatures, LocalApic};
use super::block::BlockCache;
use super::core::{Core, Machine};
use super::cpu::Activity;
use super::exception::Event;
use super::jit::Tier1;
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
use super::memory::Invalidated;
use super::memory::{Access, PAGE_MASK, Paging, walk};
use super::native::Elsewhere;
use super::signals::{Handle, Signals};
use super::vm::{Peer, Shared};
use super::{cpuid, run};
use crate::cpuid::Feature;
use crate::debug::{DebugRequest, DebugStops, HardwareStopKind};
use crate::error::{Error, Result};
use crate::exact::{ExactStop, ExactStops};
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
use crate::state::XsaveArea;
use crate::state::{CpuState, GeneralRegisters, SystemRegisters, rflags};
use crate::vcpu::{Halt, Vcpu, VcpuHandle, VcpuIo};

/// Hardware stops of a debugger.
const MAX_HARDWARE: usize = 4;

/// What left the interpreter, since the vCPU's creation.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) pio_in: u64,
    pub(crate) pio_out: u64,
    pub(crate) mmio_read: u64,
    pub(crate) mmio_write: u64,
    pub(crate) msr: u64,
    pub(crate) hypercall: u64,
    pub(crate) eoi: u64,
    pub(crate) halt: u64,
    pub(crate) debug: u64,
    pub(crate) interrupt: u64,
    pub(crate) interrupted: u64,
    /// Pages of code whose stores are not looked at any more.
    pub(crate) pages_checked: u64,
}

/// A vCPU that is interpreted.
#[derive(Debug)]
pub(crate) struct TranslateVcpu {
    core: Core,
    cache: BlockCache,
    /// `None` where nothing is translated.
    tier1: Option<Tier1>,
    /// What runs programs instead.
    elsewhere: Elsewhere,
    signals: Arc<Signals>,
}

impl TranslateVcpu {
    pub(crate) fn new(index: u32, shared: Arc<Shared>) -> Self {
        let signals = Arc::new(Signals::new());
        shared.peers().push(Peer { index, signals: Arc::clone(&signals) });
        let features = ApicFeatures {
            x2apic: shared.cpuid.has(Feature::X2APIC),
            tsc_deadline: shared.cpuid.has(Feature::TSC_DEADLINE),
            suppress_eoi_broadcast: true,
            gpa_bits: u8::try_from(cpuid::GPA_BITS).unwrap_or(u8::MAX),
        };
        let inbox = usize::try_from(index).ok().and_then(|index| shared.inboxes.get(index));
        let apic = inbox.map(|inbox| LocalApic::new(Arc::clone(inbox), features, index == 0));
        let waits = apic.is_some() && index > 0;
        let tier1 = Tier1::new(&shared);
        let traced = shared.options.digest;
        let mut core = Core::new(index, shared, Arc::clone(&signals), apic);
        // A digest is of blocks that begin where they do without checks.
        core.checks_code = tier1.is_some() && !traced;
        if waits {
            core.cpu.activity = Activity::WaitForInit;
            core.cpu.apic_base &= !(1 << 8);
        }
        Self { core, cache: BlockCache::new(), tier1, elsewhere: Elsewhere::default(), signals }
    }

    /// Lets another engine run programs, whose stays `kick` ends, on a processor that starts with those vector registers.
    #[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
    pub(crate) fn with_native(
        mut self,
        native: Box<dyn super::native::Native>,
        kick: Arc<dyn VcpuHandle>,
        vectors: XsaveArea,
    ) -> Self {
        self.elsewhere = Elsewhere(Some(native));
        self.signals.set_native(kick);
        self.core.tlb.invalidated = Some(Invalidated::default());
        self.core.extended = Some(vectors);
        self.core.asks_native = true;
        self
    }
}

/// In the guest until dropped, also by a panic of a callback.
struct InGuest(Arc<Signals>);

impl InGuest {
    fn enter(core: &mut Core) -> Self {
        let this = Self(Arc::clone(&core.signals));
        core.enter_guest();
        this
    }
}

impl Drop for InGuest {
    fn drop(&mut self) {
        self.0.leave_guest();
    }
}

impl Drop for TranslateVcpu {
    fn drop(&mut self) {
        let index = self.core.index;
        self.core.shared.peers().retain(|peer| peer.index != index);
    }
}

impl Vcpu for TranslateVcpu {
    fn index(&self) -> u32 {
        self.core.index
    }

    fn run(&mut self, io: &mut dyn VcpuIo) -> Result<Halt> {
        if self.core.shared.clock.is_paused() {
            return Err(Error::unsupported("running a vCPU", "the clock is paused"));
        }
        let _in_guest = InGuest::enter(&mut self.core);
        let Self { core, cache, tier1, elsewhere, .. } = self;
        run::run(&mut Machine::new(core, io), cache, tier1, elsewhere)
    }

    fn handle(&self) -> Arc<dyn VcpuHandle> {
        Arc::new(Handle::new(&self.signals))
    }

    fn wait(&mut self, timeout: Option<Duration>) -> bool {
        let cpu = &self.core.cpu;
        let takes_interrupts = cpu.activity == Activity::Running || cpu.flags.control(rflags::IF);
        // One that was queued may be with the vCPU already: saved state says so too.
        let nmi = cpu.nmi_pending && !cpu.nmi_masked;
        self.signals.sleep(timeout, |signals| {
            nmi || signals.kick_pending()
                || signals.nmi_pending()
                || signals.intr.is_high() && takes_interrupts
        })
    }

    fn registers(&mut self) -> Result<GeneralRegisters> {
        Ok(self.core.general_registers())
    }

    fn set_registers(&mut self, registers: &GeneralRegisters) -> Result<()> {
        self.core.set_general_registers(registers);
        Ok(())
    }

    fn system_registers(&mut self) -> Result<SystemRegisters> {
        Ok(self.core.system_registers())
    }

    fn set_system_registers(&mut self, registers: &SystemRegisters) -> Result<()> {
        self.core.set_system_registers(registers)
    }

    fn msr(&mut self, index: u32) -> Result<u64> {
        self.core
            .msr(index)
            .ok_or_else(|| Error::invalid("MSR", format_args!("{index:#x}"), "a register of this processor"))
    }

    fn set_msr(&mut self, index: u32, value: u64) -> Result<()> {
        let done = if LocalApic::owns_msr(index) {
            self.core.set_apic_msr(index, value)
        } else {
            self.core.set_msr(index, value)
        };
        done.ok_or_else(|| {
            Error::invalid(
                "MSR",
                format_args!("{value:#x} in {index:#x}"),
                "a register of this processor and a value that it can hold",
            )
        })
    }

    fn translate(&mut self, gva: u64) -> Result<Option<GuestAddress>> {
        // The walk sets accessed bits, so it is an access of this vCPU like any other.
        let _in_guest = InGuest::enter(&mut self.core);
        let map = Arc::clone(self.core.map());
        let paging = Paging { user: false, smap_lifted: true, ..self.core.paging() };
        let canonical = !self.core.cpu.long_mode() || self.core.is_canonical(gva);
        let page = walk(&map, &paging, gva, Access::Read).ok().filter(|_| canonical);
        Ok(page.map(|page| GuestAddress(page.gpa | gva & !PAGE_MASK)))
    }

    fn exception_pending(&mut self) -> Result<bool> {
        Ok(matches!(self.core.injected, Some(Event::Exception(_))))
    }

    fn save(&mut self) -> Result<CpuState> {
        self.core.cpu.nmi_pending |= self.signals.take_nmi();
        self.core.drain_inbox();
        Ok(self.core.save_state())
    }

    fn restore(&mut self, state: &CpuState) -> Result<()> {
        self.core.load_state(state)?;
        self.signals.intr.set(state.events.intr);
        self.signals.attract();
        Ok(())
    }

    fn debug_stops(&mut self) -> Option<&mut dyn DebugStops> {
        Some(self)
    }

    fn exact_stops(&mut self) -> Option<&mut dyn ExactStops> {
        let counted = self.core.shared.clock.is_deterministic();
        counted.then_some(self as &mut dyn ExactStops)
    }

    fn exit_counts(&self) -> Vec<(&'static str, u64)> {
        let counts = &self.core.counts;
        let mut all = vec![
            ("pio-in", counts.pio_in),
            ("pio-out", counts.pio_out),
            ("mmio-read", counts.mmio_read),
            ("mmio-write", counts.mmio_write),
            ("msr", counts.msr),
            ("hypercall", counts.hypercall),
            ("eoi", counts.eoi),
            ("halt", counts.halt),
            ("debug", counts.debug),
            ("interrupt", counts.interrupt),
            ("interrupted", counts.interrupted),
            ("code-pages-checked", counts.pages_checked),
            ("instructions", self.core.instructions),
            ("tlb-fills", self.core.tlb.fills),
            ("blocks-decoded", self.cache.decoded()),
        ];
        all.extend(self.tier1.iter().flat_map(|tier1| tier1.counts(&self.core.tlb)));
        all.extend(self.elsewhere.counts());
        all.extend(self.core.digest.map(|digest| ("digest", digest)));
        all
    }
}

impl ExactStops for TranslateVcpu {
    fn instructions(&self) -> u64 {
        self.core.retired()
    }

    fn stop_at(&mut self, stop: ExactStop) {
        self.core.stop = stop;
        // The loop looks at it first.
        self.core.urgent = true;
    }
}

impl DebugStops for TranslateVcpu {
    fn max_hardware(&self) -> usize {
        MAX_HARDWARE
    }

    fn can_hold_interrupts(&self) -> bool {
        true
    }

    fn request(&mut self, request: &DebugRequest) -> Result<()> {
        if request.hardware.len() > MAX_HARDWARE {
            let allowed = format!("0 to {MAX_HARDWARE}");
            return Err(Error::invalid("number of hardware stops", request.hardware.len(), allowed));
        }
        for stop in &request.hardware {
            if let HardwareStopKind::Write { length } | HardwareStopKind::Access { length } = stop.kind {
                if !matches!(length, 1 | 2 | 4 | 8) {
                    return Err(Error::invalid("length of a watchpoint", length, "1, 2, 4 or 8 bytes"));
                }
                if !stop.address.is_multiple_of(u64::from(length)) {
                    return Err(Error::invalid(
                        "address of a watchpoint",
                        format_args!("{:#x}", stop.address),
                        format_args!("a multiple of its length, {length}"),
                    ));
                }
            }
        }
        self.core.debug = request.clone();
        self.core.reported = None;
        self.core.update_debug();
        Ok(())
    }
}
