//! Events that stand between two instructions.

/// How far an exception has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ExceptionStage {
    /// Recognised; its side effects (CR2, DR6) are not applied yet.
    Pending,
    /// Being delivered; side effects are applied.
    Injected,
}

/// An exception on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct ExceptionEvent {
    /// Vector, 0 to 31.
    pub vector: u8,
    /// Error code, for vectors that have one.
    pub error_code: Option<u32>,
    /// How far it has come.
    pub stage: ExceptionStage,
    /// While pending: the value that CR2 (#PF) or DR6 (#DB) will get.
    pub payload: Option<u64>,
}

impl ExceptionEvent {
    /// An exception that is being delivered.
    pub fn injected(vector: u8, error_code: Option<u32>) -> Self {
        Self { vector, error_code, stage: ExceptionStage::Injected, payload: None }
    }
}

/// An interrupt being delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct InterruptEvent {
    /// Vector.
    pub vector: u8,
    /// Whether it comes from INT n.
    pub software: bool,
}

impl InterruptEvent {
    /// An interrupt `vector`, from INT n if `software`.
    pub fn new(vector: u8, software: bool) -> Self {
        Self { vector, software }
    }
}

/// Non-maskable interrupts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct NmiState {
    /// One is being delivered.
    pub injected: bool,
    /// One is queued.
    pub pending: bool,
    /// Blocked until IRET.
    pub masked: bool,
}

/// Interrupt blocking for one instruction (Intel SDM 3A 7.8.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct InterruptShadow {
    /// By STI.
    pub sti: bool,
    /// By MOV SS or POP SS.
    pub mov_ss: bool,
}

/// What a vCPU will do before its next instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct PendingEvents {
    /// Exception on its way.
    pub exception: Option<ExceptionEvent>,
    /// Interrupt being delivered.
    pub interrupt: Option<InterruptEvent>,
    /// Non-maskable interrupts.
    pub nmi: NmiState,
    /// Interrupt shadow.
    pub shadow: InterruptShadow,
    /// Level of the INTR pin ([`VcpuHandle::set_intr`](crate::VcpuHandle::set_intr)).
    pub intr: bool,
    /// Start vector of a SIPI that arrived.
    pub sipi_vector: u8,
}
