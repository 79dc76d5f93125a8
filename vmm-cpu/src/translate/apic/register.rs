//! The registers (Intel SDM 3A tables 12-1 and 12-6): which there are, and which of their bits may be written.
//!
//! A register's number is its offset in the page divided by 16, and its x2APIC MSR minus 0x800.

use super::lvt::Lvt;
use super::timer::DIVIDE_BITS;

/// Bits of the spurious-interrupt vector register (Intel SDM 3A figure 12-23).
pub(super) mod svr {
    /// After RESET and INIT.
    pub(in super::super) const RESET: u32 = 0xff;
    /// The APIC is software-enabled.
    pub(in super::super) const ENABLED: u32 = 1 << 8;
    /// No EOI is broadcast to I/O APICs, where the version register announces this.
    pub(in super::super) const SUPPRESS_EOI_BROADCAST: u32 = 1 << 12;
    /// Vector, software enable, focus processor checking (stored, without effect, as on current processors).
    const ALWAYS: u32 = 0x3ff;

    /// The bits that exist.
    pub(in super::super) fn writable(suppress_eoi_broadcast: bool) -> u32 {
        ALWAYS | if suppress_eoi_broadcast { SUPPRESS_EOI_BROADCAST } else { 0 }
    }
}

/// Bits of the interrupt command register's low half that software may write (Intel SDM 3A figure 12-12): all but
/// the delivery status, which is 0 always since a message is delivered at once.
pub(super) const ICR_LOW_BITS: u32 = 0xc_cfff;

/// Bits of its high half in xAPIC mode: an 8-bit destination.
pub(super) const ICR_HIGH_BITS: u32 = 0xff00_0000;

/// The bits of DFR that are not its model: ones.
pub(super) const DFR_FIXED: u32 = 0x0fff_ffff;

/// A register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Register {
    Id,
    Version,
    TaskPriority,
    ProcessorPriority,
    EndOfInterrupt,
    /// Arbitration priority and remote read, which only older processors had; touching them is no error.
    Vestigial,
    LogicalDestination,
    DestinationFormat,
    Spurious,
    /// Word 0 to 7 of ISR, TMR and IRR.
    InService(u8),
    TriggerMode(u8),
    Request(u8),
    ErrorStatus,
    CommandLow,
    CommandHigh,
    Lvt(Lvt),
    InitialCount,
    CurrentCount,
    Divide,
    SelfIpi,
}

/// What WRMSR may do with a register in x2APIC mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MsrWrite {
    /// Read-only: #GP.
    Never,
    /// #GP if any other than these bits is set.
    Bits(u32),
    /// The command register, which has all 64 bits.
    Command,
}

impl Register {
    /// The register of `number`; `None` where the numbers are reserved.
    pub(super) fn from_number(number: u32) -> Option<Self> {
        let word = u8::try_from(number & 7).unwrap_or(0);
        Some(match number {
            0x02 => Self::Id,
            0x03 => Self::Version,
            0x08 => Self::TaskPriority,
            0x09 | 0x0c => Self::Vestigial,
            0x0a => Self::ProcessorPriority,
            0x0b => Self::EndOfInterrupt,
            0x0d => Self::LogicalDestination,
            0x0e => Self::DestinationFormat,
            0x0f => Self::Spurious,
            0x10..=0x17 => Self::InService(word),
            0x18..=0x1f => Self::TriggerMode(word),
            0x20..=0x27 => Self::Request(word),
            0x28 => Self::ErrorStatus,
            0x30 => Self::CommandLow,
            0x31 => Self::CommandHigh,
            0x32 => Self::Lvt(Lvt::Timer),
            0x33 => Self::Lvt(Lvt::Thermal),
            0x34 => Self::Lvt(Lvt::Performance),
            0x35 => Self::Lvt(Lvt::Lint0),
            0x36 => Self::Lvt(Lvt::Lint1),
            0x37 => Self::Lvt(Lvt::Error),
            0x38 => Self::InitialCount,
            0x39 => Self::CurrentCount,
            0x3e => Self::Divide,
            0x3f => Self::SelfIpi,
            // 0x2f, corrected machine checks, would be entry 6 of the local vector table: the version says 5.
            _ => return None,
        })
    }

    /// The register at `number` of the page in xAPIC mode.
    pub(super) fn in_page(number: u32) -> Option<Self> {
        Self::from_number(number).filter(|register| *register != Self::SelfIpi)
    }

    /// The register behind x2APIC MSR 0x800 + `number`.
    pub(super) fn in_x2apic(number: u32) -> Option<Self> {
        Self::from_number(number).filter(|register| {
            !matches!(register, Self::Vestigial | Self::DestinationFormat | Self::CommandHigh)
        })
    }

    /// Whether RDMSR works in x2APIC mode.
    pub(super) fn msr_readable(self) -> bool {
        !matches!(self, Self::EndOfInterrupt | Self::SelfIpi)
    }

    /// What WRMSR may do in x2APIC mode. Bits that exist but that only the APIC sets are not reserved.
    pub(super) fn msr_write(self, tsc_deadline: bool, suppress_eoi_broadcast: bool) -> MsrWrite {
        match self {
            Self::TaskPriority | Self::SelfIpi => MsrWrite::Bits(0xff),
            Self::EndOfInterrupt | Self::ErrorStatus => MsrWrite::Bits(0),
            Self::Spurious => MsrWrite::Bits(svr::writable(suppress_eoi_broadcast)),
            Self::CommandLow => MsrWrite::Command,
            Self::Lvt(lvt) => MsrWrite::Bits(lvt.writable(tsc_deadline) | lvt.read_only()),
            Self::InitialCount => MsrWrite::Bits(u32::MAX),
            Self::Divide => MsrWrite::Bits(DIVIDE_BITS),
            Self::Id
            | Self::Version
            | Self::ProcessorPriority
            | Self::Vestigial
            | Self::LogicalDestination
            | Self::DestinationFormat
            | Self::InService(_)
            | Self::TriggerMode(_)
            | Self::Request(_)
            | Self::CommandHigh
            | Self::CurrentCount => MsrWrite::Never,
        }
    }
}
