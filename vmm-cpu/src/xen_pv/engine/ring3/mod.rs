//! [`Ring3`]: the engine over any backend of this crate that executes long mode.
//!
//! Guest kernel and guest programs run in ring 3. Whatever needs the VMM enters ring 0 (on one kind of KVM, SYSCALL stays
//! in ring 3) at a stub of two bytes, an OUT, whose port says what it is; the stub never goes on, since the engine sets
//! all registers before the guest runs again.

mod context;
mod control;
mod held;
mod mmu;
mod probe;
#[cfg(feature = "snapshot")]
mod saved;
mod shim;

use std::sync::Arc;

use vmm_memory::GuestRam;
use vmm_memory::vm_memory::GuestAddress;

use self::context::{PAGE_FAULT, canonical, low16};
use self::mmu::Flush;
use self::shim::Shim;
use super::descriptors::{Descriptors, FLAT_CS64, FLAT_SS, STUB_CS, STUB_SS, TASK_STATE};
use super::exits::{Exits, Signals};
use super::machine::Above;
use super::native::XCR0_KNOWN;
use super::private::{self, Private};
use super::{Context, EngineCapabilities, EngineExit};
use crate::error::{Error, Result};
use crate::state::{DescriptorTable, GeneralRegisters, Segment, SystemRegisters, rflags};
use crate::vcpu::{Halt, Vcpu};

mod msr {
    pub(super) const TSC: u32 = 0x10;
    pub(super) const STAR: u32 = 0xc000_0081;
    pub(super) const LSTAR: u32 = 0xc000_0082;
    pub(super) const CSTAR: u32 = 0xc000_0083;
    pub(super) const FMASK: u32 = 0xc000_0084;
}

/// PG, AM, WP, NE, ET, MP, PE.
const CR0: u64 = 0x8005_0033;
/// OSXMMEXCPT, OSFXSR, PAE. Without global pages: a guest kernel's would outlive the change to the user root.
const CR4: u64 = 0x620;
const CR4_FSGSBASE: u64 = 1 << 16;
const CR4_OSXSAVE: u64 = 1 << 18;
/// NXE, LMA, LME, SCE.
const EFER: u64 = 0xd01;

/// Flags that SYSCALL clears: TF, IF, DF, IOPL, NT, AC.
const SYSCALL_CLEARS: u64 = 0x0004_7700;

/// Stays in the guest that one operation of the engine, or one stub, may take. Each ends early by a kick only, of which
/// there are few: those that come before the last one was answered count as one.
const MAX_STAYS: u32 = 1000;

/// One virtual processor in ring 3 of another backend's.
#[derive(Debug)]
pub struct Ring3 {
    vcpu: Box<dyn Vcpu>,
    index: u32,
    ram: GuestRam,
    private: Private,
    capabilities: EngineCapabilities,
    store_in_guest: bool,
    /// Keeps the engine's memory where it is.
    _above: Arc<Above>,
    shim: Option<Shim>,
    signals: Arc<Signals>,
    context: Context,
    descriptors: Descriptors,
    /// What the processor holds, as far as the engine set it; segments of the guest aside.
    system: SystemRegisters,
    kernel_root: GuestAddress,
    user_root: Option<GuestAddress>,
    flush: Flush,
    /// Entries of page tables that were stored since the guest ran, where that is to be shown to who shadows them.
    stored: Vec<u64>,
    /// Debug registers or XCR0 are other than the processor's.
    rare_changed: bool,
    /// XCR0 is what the host has, whatever the engine sets.
    xcr0_fixed: bool,
    crashed: bool,
}

/// How a stay in the guest ended, before the context is looked at.
enum Stay {
    /// By an OUT to this port.
    Port(u8),
    /// By a kick, or for nothing.
    Interrupted,
    /// The guest cannot go on.
    Crashed,
}

impl Ring3 {
    pub(super) fn new(
        mut vcpu: Box<dyn Vcpu>,
        ram: GuestRam,
        private: Private,
        capabilities: EngineCapabilities,
        store_in_guest: bool,
        above: Arc<Above>,
        sets_bases: bool,
    ) -> Result<Self> {
        let index = vcpu.index();
        let (gdt, gdt_limit) = private.gdt(index);
        let (idt, idt_limit) = private.idt(index);
        let shim = private.shim().map(|pages| Shim::new(*pages, index));
        let bases = if sets_bases { CR4_FSGSBASE } else { 0 };
        let os_xsave = if capabilities.xcr0 != 0 { CR4_OSXSAVE } else { 0 };
        let at_reset = vcpu.system_registers()?;
        let system = SystemRegisters {
            gdtr: DescriptorTable { base: gdt, limit: gdt_limit },
            idtr: DescriptorTable { base: idt, limit: idt_limit },
            tr: Segment::task_state(TASK_STATE, private.task_state(index)),
            ldtr: Segment::null(),
            cs: Segment::code64(STUB_CS),
            ss: Segment::data32(STUB_SS),
            cr0: CR0,
            cr3: private.own_root(),
            cr4: CR4 | os_xsave | bases,
            efer: EFER,
            ..at_reset
        };
        let mut engine = Self {
            signals: Arc::new(Signals::new(vcpu.handle())),
            vcpu,
            index,
            ram,
            private,
            capabilities,
            store_in_guest,
            _above: above,
            shim,
            context: Context {
                general: GeneralRegisters {
                    rflags: rflags::FIXED | rflags::IF,
                    ..GeneralRegisters::default()
                },
                cs: FLAT_CS64,
                ss: FLAT_SS,
                ..Context::default()
            },
            descriptors: Descriptors::new(capabilities.compatibility_mode),
            system,
            kernel_root: GuestAddress(private.own_root()),
            user_root: None,
            flush: Flush::NOTHING,
            stored: Vec::new(),
            rare_changed: false,
            xcr0_fixed: false,
            crashed: false,
        };
        engine.vcpu.set_system_registers(&system)?;
        let star = u64::from(STUB_CS) << 32;
        for (register, value) in [
            (msr::STAR, star),
            (msr::LSTAR, private.syscall(index)),
            (msr::CSTAR, private::VA_SYSCALL_32),
            (msr::FMASK, SYSCALL_CLEARS),
        ] {
            engine.vcpu.set_msr(register, value)?;
        }
        if let Some(fixed) = engine.fixed_xcr0()? {
            engine.capabilities.xcr0 = fixed & XCR0_KNOWN;
            engine.xcr0_fixed = true;
        }
        Ok(engine)
    }

    /// The registers of the processor, with segments as the guest has them.
    pub fn system_registers(&self) -> SystemRegisters {
        let (c, table) = (&self.context, &self.descriptors);
        SystemRegisters {
            cs: table.code(c.cs).unwrap_or_default(),
            ss: table.stack(c.ss).unwrap_or_default(),
            ds: table.data(c.ds),
            es: table.data(c.es),
            fs: Segment { base: canonical(c.fs_base), ..table.data(c.fs) },
            gs: Segment { base: canonical(c.gs_base), ..table.data(c.gs) },
            ..self.system
        }
    }

    /// What the in-guest fast path did, by kind, as the guest has it.
    pub fn fast_counts(&self) -> Vec<(&'static str, u64)> {
        self.shim.as_ref().map_or(Vec::new(), |shim| shim.counts().to_vec())
    }

    /// Exits of the vCPU below by kind, as [`Vcpu::exit_counts`].
    pub fn exit_counts(&self) -> Vec<(&'static str, u64)> {
        self.vcpu.exit_counts()
    }

    #[cfg(test)]
    pub(super) fn store_in_guest_for_tests(&self) -> bool {
        self.store_in_guest
    }

    /// Lets the next stay begin at `rip` in ring 0 on the tables that are loaded.
    fn set_stub_registers(&mut self, rip: u64, arguments: GeneralRegisters) -> Result<()> {
        let data = Segment::data32(STUB_SS);
        let system = SystemRegisters {
            cs: Segment::code64(STUB_CS),
            ss: data,
            ds: data,
            es: data,
            fs: Segment::null(),
            gs: Segment::null(),
            ..self.system
        };
        self.vcpu.set_segment_registers(&system)?;
        let rsp = self.private.stack_end(self.index, 0);
        self.vcpu.set_registers(&GeneralRegisters { rip, rsp, rflags: rflags::FIXED, ..arguments })
    }

    fn stay(&mut self) -> Result<Stay> {
        let doorbell = self.shim.as_ref().map(|shim| shim.pages().doorbell());
        let mut exits = Exits::new(&self.signals, doorbell);
        let halt = self.vcpu.run(&mut exits);
        let port = exits.port();
        match (halt, port) {
            (Ok(Halt::Interrupted), Some(port)) => Ok(Stay::Port(port)),
            (Ok(Halt::Interrupted), None) => Ok(Stay::Interrupted),
            // HLT and the like need ring 0, which the guest has only if it destroyed what the engine keeps.
            (Ok(halt), _) => {
                tracing::debug!(vcpu = self.index, ?halt, "xen-pv: the guest stopped");
                Ok(Stay::Crashed)
            }
            (Err(Error::Unhandled(instruction)), _) => {
                tracing::warn!(vcpu = self.index, %instruction, "xen-pv: the guest stopped");
                Ok(Stay::Crashed)
            }
            (Err(error), _) => Err(error),
        }
    }

    /// Executes one of the engine's operations in the guest; a guest that does not come back from it has crashed.
    fn operate(&mut self, rip: u64, arguments: GeneralRegisters) -> Result<()> {
        self.set_stub_registers(rip, arguments)?;
        for _ in 0..MAX_STAYS {
            match self.stay()? {
                Stay::Port(private::PORT_OPERATION) => return Ok(()),
                Stay::Interrupted => {}
                Stay::Port(port) => {
                    let frame = self.frame(port.wrapping_sub(private::PORT_EXCEPTION))?;
                    tracing::debug!(
                        vcpu = self.index,
                        rip,
                        port,
                        ?frame,
                        "xen-pv: an operation of the engine went astray"
                    );
                    break;
                }
                Stay::Crashed => break,
            }
        }
        tracing::debug!(vcpu = self.index, rip, "xen-pv: an operation of the engine has no end");
        self.crashed = true;
        Ok(())
    }

    /// Whether an exception has to be delivered before RIP may be changed. With a shim, which gets some without an exit, a
    /// fault is forgotten instead, so that the next stay begins with it.
    fn is_exception_on_its_way(&mut self) -> Result<bool> {
        if self.shim.is_some() { Ok(!self.vcpu.cancel_fault()?) } else { self.vcpu.exception_pending() }
    }

    fn crash(&mut self, why: &'static str) -> EngineExit {
        tracing::debug!(vcpu = self.index, why, "xen-pv: the guest crashed");
        self.crashed = true;
        EngineExit::Crashed
    }

    /// One stay of the guest, from its context to its context.
    fn run_guest(&mut self) -> Result<EngineExit> {
        if let Some(exit) = self.load_context()? {
            return Ok(exit);
        }
        let (mut in_stub, mut stays_in_stub) = (false, 0);
        while !self.crashed {
            if !in_stub {
                // An operation may have taken the vCPU's kick.
                self.signals.renew_kick();
            }
            let stay = self.stay()?;
            let general = self.vcpu.registers()?;
            let system = self.vcpu.segment_registers()?;
            if !self.take_shim(&system)? {
                return Ok(self.crash("nonsense in the shim's data"));
            }
            match stay {
                Stay::Port(private::PORT_SHIM) => {
                    let exit = self.shim_exit(&general, false, &system)?;
                    return Ok(exit.unwrap_or_else(|| self.crash("the shim's doorbell rang elsewhere")));
                }
                Stay::Port(private::PORT_SYSCALL) => {
                    self.take_segments(&system);
                    let from_32 = general.rip & !0xf == private::VA_SYSCALL_32;
                    return Ok(self.syscall_exit(general, from_32));
                }
                Stay::Port(port) => {
                    let vector = port.wrapping_sub(private::PORT_EXCEPTION);
                    if vector >= private::EXCEPTIONS {
                        return Ok(self.crash("a port that no stub uses"));
                    }
                    self.take_segments(&system);
                    return self.exception_exit(vector, general);
                }
                Stay::Crashed => return Ok(self.crash("it cannot go on")),
                // It is delivered first: with another RIP it would come from there.
                Stay::Interrupted if self.is_exception_on_its_way()? && stays_in_stub < MAX_STAYS => {
                    (in_stub, stays_in_stub) = (true, stays_in_stub + 1);
                }
                Stay::Interrupted
                    if let Some(exit) = self.shim_exit(&general, system.cs.dpl == 0, &system)? =>
                {
                    // Where the shim is done it is a kick that was waited for, or one for nothing.
                    if exit == EngineExit::Interrupted {
                        self.signals.take_kick();
                    }
                    return Ok(exit);
                }
                // Between two instructions of a stub, the first of which is its last.
                Stay::Interrupted if Private::is_entry_page(general.rip) && stays_in_stub < MAX_STAYS => {
                    (in_stub, stays_in_stub) = (true, stays_in_stub + 1);
                }
                Stay::Interrupted if system.cs.dpl != 3 => return Ok(self.crash("it is in ring 0")),
                Stay::Interrupted => {
                    in_stub = false;
                    if self.store_in_guest
                        && self.signals.is_wanted()
                        && let Some((vector, at_stub)) = self.held_trap(&system)?
                    {
                        // Whoever kicked still waits: the next run looks.
                        self.take_segments(&system);
                        return self.exception_exit(vector, at_stub);
                    }
                    if self.crashed {
                        return Ok(EngineExit::Crashed);
                    }
                    if self.signals.take_kick() {
                        self.take_segments(&system);
                        self.context.general = general;
                        (self.context.cs, self.context.ss) = (system.cs.selector, system.ss.selector);
                        return Ok(EngineExit::Interrupted);
                    }
                    if let Some(wanted) = self.signals.flush_wanted() {
                        self.reload_root()?;
                        self.signals.flushed(wanted);
                        self.vcpu.set_segment_registers(&system)?;
                        self.vcpu.set_registers(&general)?;
                    }
                }
            }
        }
        Ok(EngineExit::Crashed)
    }
}

fn memory_error(source: vmm_memory::vm_memory::GuestMemoryError) -> Error {
    Error::Backend { backend: super::super::NAME, source: Box::new(source) }
}
