//! [`Vcpu`], what it calls while it runs ([`VcpuIo`]), and how others reach it ([`VcpuHandle`]).
//!
//! Threat model: everything that arrives through [`VcpuIo`] was chosen by the guest: ports,
//! addresses, lengths (1 to 8 bytes per access, as stated at each method) and data.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use vmm_memory::vm_memory::GuestAddress;

use crate::debug::{DebugStop, DebugStops};
use crate::error::Result;
use crate::exact::ExactStops;
use crate::private_memory::MemoryFault;
use crate::state::{CpuState, GeneralRegisters, SystemRegisters};

/// Why [`Vcpu::run`] came back.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Halt {
    /// The guest executed HLT and no interrupt is deliverable ([`InterruptMode::External`]; the
    /// other modes wait inside `run`). Running again without an event returns this again; see
    /// [`Vcpu::wait`].
    ///
    /// [`InterruptMode::External`]: crate::InterruptMode::External
    Halted,
    /// The guest shut down by triple fault (Intel SDM 3A 6.15, "Interrupt 8").
    Shutdown,
    /// The backend's platform asks for a reset.
    Reset,
    /// A stop that [`DebugStops`] asked for.
    Debug(DebugStop),
    /// A point that [`ExactStops`] was asked for.
    ExactStop,
    /// The guest accessed as private what it has shared memory for, or the other way round: see
    /// [`PrivateMemory`](crate::PrivateMemory). Nothing has happened yet; run again once it has what it wants.
    MemoryFault(MemoryFault),
    /// A [`VcpuHandle::kick`] arrived. No guest event is lost; run again to go on.
    Interrupted,
}

/// A model-specific register access that ends in #GP(0) in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("general-protection fault")]
pub struct MsrFault;

/// A call from the guest to its hypervisor (VMCALL / VMMCALL), with the register convention of
/// Linux KVM guests: number in RAX, arguments in RBX, RCX, RDX, RSI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Hypercall {
    /// RAX: which call.
    pub nr: u64,
    /// RBX, RCX, RDX, RSI.
    pub args: [u64; 4],
    /// Whether the guest was in 64-bit mode; otherwise only the low 32 bits mean anything.
    pub long_mode: bool,
}

impl Hypercall {
    /// A call `nr` with `args`, from 64-bit code if `long_mode`.
    pub fn new(nr: u64, args: [u64; 4], long_mode: bool) -> Self {
        Self { nr, args, long_mode }
    }
}

/// What a running vCPU asks of its VMM. Called on the thread inside [`Vcpu::run`], one call at a time.
///
/// Accesses come split: MMIO at most 8 bytes and never across a page, ascending by address; string
/// I/O as one call per page at most, `data` holding whole elements in the order of the
/// instruction. The defaults are an empty bus: reads give all ones, writes vanish, other MSRs
/// fault.
///
/// A callback may block; a kick then takes effect when it returns. A callback that wants the run
/// to end kicks the vCPU's own handle: `run` completes the instruction and returns
/// [`Halt::Interrupted`].
pub trait VcpuIo {
    /// IN and INS: fill `data`, a multiple of `size` bytes (1, 2 or 4) long.
    fn pio_read(&mut self, port: u16, size: usize, data: &mut [u8]) {
        let _ = (port, size);
        data.fill(0xff);
    }

    /// OUT and OUTS: `data` is a multiple of `size` bytes (1, 2 or 4) long.
    fn pio_write(&mut self, port: u16, size: usize, data: &[u8]) {
        let _ = (port, size, data);
    }

    /// A load of 1 to 8 bytes from a guest-physical address with no readable memory.
    fn mmio_read(&mut self, gpa: GuestAddress, data: &mut [u8]) {
        let _ = gpa;
        data.fill(0xff);
    }

    /// A store of 1 to 8 bytes to a guest-physical address with no writable memory.
    fn mmio_write(&mut self, gpa: GuestAddress, data: &[u8]) {
        let _ = (gpa, data);
    }

    /// RDMSR of a register that the backend was told to pass on ([`MsrFilter`](crate::MsrFilter)).
    ///
    /// # Errors
    /// [`MsrFault`] injects #GP(0).
    fn msr_read(&mut self, index: u32) -> Result<u64, MsrFault> {
        let _ = index;
        Err(MsrFault)
    }

    /// WRMSR of a register that the backend was told to pass on.
    ///
    /// # Errors
    /// [`MsrFault`] injects #GP(0).
    fn msr_write(&mut self, index: u32, value: u64) -> Result<(), MsrFault> {
        let _ = (index, value);
        Err(MsrFault)
    }

    /// End of interrupt of a level-triggered `vector`, for the VMM's I/O APIC
    /// ([`InterruptMode::LocalApic`](crate::InterruptMode::LocalApic)).
    fn eoi(&mut self, vector: u8) {
        let _ = vector;
    }

    /// The vCPU accepts the interrupt that [`VcpuHandle::set_intr`] announced: the INTA cycle.
    /// Returns its vector; `None` if the controller withdrew it (nothing is delivered).
    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        None
    }

    /// A hypercall that [`Hypercalls`](crate::Hypercalls) passes on; the result goes to RAX.
    /// The default is `-KVM_ENOSYS` (-1000).
    fn hypercall(&mut self, call: &Hypercall) -> u64 {
        let _ = call;
        (-1000_i64).cast_unsigned()
    }
}

/// An empty bus: every access gets the defaults of [`VcpuIo`].
#[derive(Clone, Copy, Debug, Default)]
pub struct EmptyBus;

impl VcpuIo for EmptyBus {}

/// One virtual processor.
///
/// Owned by the thread that runs it; `&mut self` keeps everybody else out. What must reach it
/// from outside goes through [`Vcpu::handle`].
pub trait Vcpu: fmt::Debug + Send {
    /// Its index, which is also its initial APIC ID.
    fn index(&self) -> u32;

    /// Executes the guest until something ends the stay; see [`Halt`].
    ///
    /// # Errors
    /// [`Error::Unhandled`](crate::Error::Unhandled) if the backend met something it cannot
    /// execute: the state is that before the instruction, so another engine may take over.
    fn run(&mut self, io: &mut dyn VcpuIo) -> Result<Halt>;

    /// The handle by which other threads reach this vCPU. Cheap to clone, outlives the vCPU
    /// (its calls then do nothing).
    fn handle(&self) -> Arc<dyn VcpuHandle>;

    /// Waits as a halted processor does, for at most `timeout` (`None`: for ever): until INTR is
    /// asserted, an NMI is queued, or a kick arrives (which stays pending for `run`).
    /// Returns whether there was an event.
    fn wait(&mut self, timeout: Option<Duration>) -> bool;

    /// General registers, RIP and RFLAGS.
    ///
    /// # Errors
    /// Whatever the backend's host says.
    fn registers(&mut self) -> Result<GeneralRegisters>;

    /// Sets general registers, RIP and RFLAGS.
    ///
    /// # Errors
    /// Whatever the backend's host says.
    fn set_registers(&mut self, registers: &GeneralRegisters) -> Result<()>;

    /// Segment, table, control and debug registers.
    ///
    /// # Errors
    /// Whatever the backend's host says.
    fn system_registers(&mut self) -> Result<SystemRegisters>;

    /// Sets segment, table, control and debug registers.
    ///
    /// # Errors
    /// [`Error::InvalidState`](crate::Error::InvalidState) for a combination that no processor
    /// can be in.
    fn set_system_registers(&mut self, registers: &SystemRegisters) -> Result<()>;

    /// Segment, table and control registers, as [`Vcpu::system_registers`] gives them; debug registers and XCR0 in the result
    /// mean nothing. Costs less where those take requests of their own.
    ///
    /// # Errors
    /// Whatever the backend's host says.
    fn segment_registers(&mut self) -> Result<SystemRegisters> {
        self.system_registers()
    }

    /// Sets segment, table and control registers and leaves debug registers and XCR0 as they are.
    ///
    /// # Errors
    /// [`Error::InvalidState`](crate::Error::InvalidState) for a combination that no processor can be in; a backend may also
    /// leave it to the next [`Vcpu::run`] to find out, which then fails.
    fn set_segment_registers(&mut self, registers: &SystemRegisters) -> Result<()> {
        let SystemRegisters { dr, dr6, dr7, xcr0, .. } = self.system_registers()?;
        self.set_system_registers(&SystemRegisters { dr, dr6, dr7, xcr0, ..*registers })
    }

    /// Reads a model-specific register as RDMSR at privilege level 0 would, without filters.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if there is no such register.
    fn msr(&mut self, index: u32) -> Result<u64>;

    /// Writes a model-specific register, without filters.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if there is no such register or
    /// the value sets reserved bits.
    fn set_msr(&mut self, index: u32, value: u64) -> Result<()>;

    /// Guest-physical address of a guest-virtual one in the current paging mode, `None` where the
    /// guest has no mapping.
    ///
    /// # Errors
    /// Whatever the backend's host says.
    fn translate(&mut self, gva: u64) -> Result<Option<GuestAddress>>;

    /// Whether an exception stands before the next instruction, on its way to the guest. Whoever changes RIP then, other
    /// than by [`Vcpu::restore`], makes it come from another place.
    ///
    /// # Errors
    /// Whatever the backend's host says.
    fn exception_pending(&mut self) -> Result<bool> {
        Ok(self.save()?.events.exception.is_some())
    }

    /// Forgets a fault that stands before the next instruction, so that RIP may be changed: it comes up again when the
    /// instruction that it belongs to is executed again. A trap, whose instruction is done, stays. Returns whether nothing
    /// is left.
    ///
    /// # Errors
    /// Whatever the backend's host says.
    fn cancel_fault(&mut self) -> Result<bool> {
        Ok(!self.exception_pending()?)
    }

    /// The whole state. A pending exit is settled first, so the result stands between two
    /// instructions (or between two iterations of a REP).
    ///
    /// # Errors
    /// Whatever the backend's host says.
    fn save(&mut self) -> Result<CpuState>;

    /// Replaces the whole state, as [`Vm::restore_vcpu`](crate::Vm::restore_vcpu) does at creation.
    ///
    /// # Errors
    /// [`Error::InvalidState`](crate::Error::InvalidState) naming the element that does not fit.
    fn restore(&mut self, state: &CpuState) -> Result<()>;

    /// Breakpoints, watchpoints, single step.
    fn debug_stops(&mut self) -> Option<&mut dyn DebugStops> {
        None
    }

    /// Stops at instruction counts and guest times.
    fn exact_stops(&mut self) -> Option<&mut dyn ExactStops> {
        None
    }

    /// Exits by kind since creation, where the backend counts them: pairs of name and count.
    fn exit_counts(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

/// Reaches a vCPU from any thread.
pub trait VcpuHandle: fmt::Debug + Send + Sync {
    /// Makes [`Vcpu::run`] (the current or the next one) return [`Halt::Interrupted`], and
    /// [`Vcpu::wait`] return. Kicks that arrive before the vCPU answers count as one; none is lost.
    fn kick(&self);

    /// Queues a non-maskable interrupt.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) if the backend cannot.
    fn nmi(&self) -> Result<()>;

    /// Drives the INTR pin. While it is asserted, the vCPU asks
    /// [`VcpuIo::acknowledge_interrupt`] for a vector whenever it can take an interrupt.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) in
    /// [`InterruptMode::Platform`](crate::InterruptMode::Platform), where the pin belongs to the
    /// backend's PIC.
    fn set_intr(&self, asserted: bool) -> Result<()>;
}

/// The instruction that a backend could not execute, with all that helps to find out why.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct UnhandledInstruction {
    /// Name of the backend.
    pub backend: &'static str,
    /// Index of the vCPU.
    pub vcpu: u32,
    /// The backend's own reason.
    pub reason: String,
    /// The bytes at the instruction pointer, as far as they could be read (at most 15).
    pub bytes: Vec<u8>,
    /// The instruction in Intel syntax; `None` if it could not be read or decoded, or feature
    /// `decode` is off.
    pub text: Option<String>,
    /// General registers before the instruction.
    pub registers: GeneralRegisters,
    /// System registers before the instruction.
    pub system: SystemRegisters,
}

impl UnhandledInstruction {
    /// Describes the instruction in `bytes` at the state's instruction pointer.
    pub fn new(
        backend: &'static str,
        vcpu: u32,
        reason: String,
        bytes: Vec<u8>,
        registers: GeneralRegisters,
        system: SystemRegisters,
    ) -> Self {
        let text = crate::decode::instruction_text(&bytes, &registers, &system);
        Self { backend, vcpu, reason, bytes, text, registers, system }
    }
}

impl fmt::Display for UnhandledInstruction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (r, s) = (&self.registers, &self.system);
        write!(f, "{}: vCPU {} cannot execute ", self.backend, self.vcpu)?;
        match &self.text {
            Some(text) => write!(f, "`{text}`")?,
            None => f.write_str("the instruction")?,
        }
        write!(f, " at {:04x}:{:016x}", s.cs.selector, r.rip)?;
        if self.bytes.is_empty() {
            f.write_str(" (its bytes could not be read)")?;
        } else {
            f.write_str(" (bytes")?;
            for byte in &self.bytes {
                write!(f, " {byte:02x}")?;
            }
            f.write_str(")")?;
        }
        write!(
            f,
            ": {}\n  {r}\n  cr0={:x} cr2={:x} cr3={:x} cr4={:x} efer={:x}",
            self.reason, s.cr0, s.cr2, s.cr3, s.cr4, s.efer
        )
    }
}

impl std::error::Error for UnhandledInstruction {}
