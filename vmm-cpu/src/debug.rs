//! Debug stops: breakpoints, watchpoints and single step, asked for by a debugger stub.

use crate::error::Result;

/// What a debugger wants a vCPU to stop at. Replaces the previous request as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DebugRequest {
    /// Stop after one instruction.
    pub single_step: bool,
    /// Stop at INT3, before the guest's own handler sees it.
    pub software_breakpoints: bool,
    /// Hardware breakpoints and watchpoints, at most [`DebugStops::max_hardware`].
    pub hardware: Vec<HardwareStop>,
    /// While stepping, interrupts and NMIs wait: a step is an instruction of the code, never the first of a handler. One
    /// that wakes the vCPU from HLT is taken. Where [`DebugStops::can_hold_interrupts`], ignored elsewhere.
    pub hold_interrupts: bool,
}

impl DebugRequest {
    /// Nothing stops.
    pub fn none() -> Self {
        Self::default()
    }

    /// Stop after each instruction.
    #[must_use]
    pub fn step(mut self) -> Self {
        self.single_step = true;
        self
    }

    /// Stop after each instruction, and let interrupts wait meanwhile.
    #[must_use]
    pub fn step_without_interrupts(mut self) -> Self {
        self.hold_interrupts = true;
        self.step()
    }

    /// Stop at INT3.
    #[must_use]
    pub fn int3(mut self) -> Self {
        self.software_breakpoints = true;
        self
    }

    /// Stop at `stop` too.
    #[must_use]
    pub fn at(mut self, stop: HardwareStop) -> Self {
        self.hardware.push(stop);
        self
    }
}

/// One hardware breakpoint or watchpoint (Intel SDM 3B 19.2.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct HardwareStop {
    /// Linear address.
    pub address: u64,
    /// What kind of access stops.
    pub kind: HardwareStopKind,
}

impl HardwareStop {
    /// Stops before the instruction at `address`.
    pub fn execute(address: u64) -> Self {
        Self { address, kind: HardwareStopKind::Execute }
    }

    /// Stops after a write to `length` bytes (1, 2, 4 or 8, aligned) at `address`.
    pub fn write(address: u64, length: u8) -> Self {
        Self { address, kind: HardwareStopKind::Write { length } }
    }

    /// Stops after a read or write of `length` bytes (1, 2, 4 or 8, aligned) at `address`.
    pub fn access(address: u64, length: u8) -> Self {
        Self { address, kind: HardwareStopKind::Access { length } }
    }
}

/// Kind of a [`HardwareStop`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum HardwareStopKind {
    /// Instruction fetch.
    Execute,
    /// Data write of 1, 2, 4 or 8 bytes.
    Write {
        /// Length in bytes.
        length: u8,
    },
    /// Data read or write of 1, 2, 4 or 8 bytes.
    Access {
        /// Length in bytes.
        length: u8,
    },
}

/// Where and why a vCPU stopped for the debugger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DebugStop {
    /// Linear address of the next instruction (for INT3: of the INT3).
    pub rip: u64,
    /// What it was.
    pub reason: DebugReason,
}

impl DebugStop {
    /// A stop before the instruction at `rip`.
    pub fn new(rip: u64, reason: DebugReason) -> Self {
        Self { rip, reason }
    }
}

/// Reason of a [`DebugStop`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DebugReason {
    /// One instruction was executed.
    SingleStep,
    /// INT3.
    SoftwareBreakpoint,
    /// The hardware stops with these indices in [`DebugRequest::hardware`], one bit each.
    Hardware {
        /// Bit n: stop n was hit.
        hits: u8,
    },
}

/// The debug stops of one vCPU.
pub trait DebugStops {
    /// How many hardware stops there can be.
    fn max_hardware(&self) -> usize;

    /// Whether [`DebugRequest::hold_interrupts`] is honoured.
    fn can_hold_interrupts(&self) -> bool {
        false
    }

    /// Asks for stops, replacing those asked for before.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for too many hardware stops or a
    /// length or alignment that does not exist.
    fn request(&mut self, request: &DebugRequest) -> Result<()>;
}
