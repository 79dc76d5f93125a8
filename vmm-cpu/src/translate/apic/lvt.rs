//! The local vector table (Intel SDM 3A 12.5.1).

use super::low_byte;
use super::timer::TimerMode;

/// One of the two local interrupt pins.
#[cfg_attr(not(test), allow(dead_code, reason = "nothing drives a pin so far"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lint {
    /// LINT0, where a PIC's INTR output leads.
    Lint0,
    /// LINT1, where NMI sources lead.
    Lint1,
}

/// An entry's place in the table, in the order of its registers from 0x320.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lvt {
    Timer,
    Thermal,
    Performance,
    Lint0,
    Lint1,
    Error,
}

const VECTOR: u32 = 0xff;
const DELIVERY_MODE: u32 = 7 << 8;
const DELIVERY_STATUS: u32 = 1 << 12;
const POLARITY: u32 = 1 << 13;
const REMOTE_IRR: u32 = 1 << 14;
const LEVEL: u32 = 1 << 15;
const MASKED: u32 = 1 << 16;
const PERIODIC: u32 = 1 << 17;
const TSC_DEADLINE: u32 = 1 << 18;

impl Lvt {
    /// All entries.
    pub(super) const ALL: [Self; 6] =
        [Self::Timer, Self::Thermal, Self::Performance, Self::Lint0, Self::Lint1, Self::Error];

    /// Its bits that software may write; TSC-deadline mode exists if `tsc_deadline`.
    pub(super) fn writable(self, tsc_deadline: bool) -> u32 {
        match self {
            Self::Timer => VECTOR | MASKED | PERIODIC | if tsc_deadline { TSC_DEADLINE } else { 0 },
            Self::Thermal | Self::Performance => VECTOR | DELIVERY_MODE | MASKED,
            Self::Lint0 | Self::Lint1 => VECTOR | DELIVERY_MODE | POLARITY | LEVEL | MASKED,
            Self::Error => VECTOR | MASKED,
        }
    }

    /// Its bits that exist but that only the APIC sets.
    pub(super) fn read_only(self) -> u32 {
        match self {
            Self::Lint0 | Self::Lint1 => DELIVERY_STATUS | REMOTE_IRR,
            Self::Timer | Self::Thermal | Self::Performance | Self::Error => DELIVERY_STATUS,
        }
    }
}

impl From<Lint> for Lvt {
    fn from(pin: Lint) -> Self {
        match pin {
            Lint::Lint0 => Self::Lint0,
            Lint::Lint1 => Self::Lint1,
        }
    }
}

/// What an entry does with its interrupt. Lowest priority and the reserved encodings do nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LocalDelivery {
    Fixed,
    Nmi,
    Init,
    ExtInt,
    Nothing,
}

/// An entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry(pub(super) u32);

impl Entry {
    pub(super) fn vector(self) -> u8 {
        low_byte(self.0)
    }

    pub(super) fn masked(self) -> bool {
        self.0 & MASKED != 0
    }

    pub(super) fn delivery(self) -> LocalDelivery {
        match (self.0 & DELIVERY_MODE) >> 8 {
            0 => LocalDelivery::Fixed,
            4 => LocalDelivery::Nmi,
            5 => LocalDelivery::Init,
            7 => LocalDelivery::ExtInt,
            // 2 is SMI, for which there is no system-management mode.
            _ => LocalDelivery::Nothing,
        }
    }

    /// Level-triggered; means something with [`LocalDelivery::Fixed`] only.
    pub(super) fn level(self) -> bool {
        self.0 & LEVEL != 0
    }

    /// Whether a level-triggered interrupt was accepted and waits for its EOI.
    pub(super) fn remote_irr(self) -> bool {
        self.0 & REMOTE_IRR != 0
    }

    pub(super) fn timer_mode(self) -> TimerMode {
        match (self.0 & TSC_DEADLINE != 0, self.0 & PERIODIC != 0) {
            (false, false) => TimerMode::OneShot,
            (false, true) => TimerMode::Periodic,
            (true, false) => TimerMode::TscDeadline,
            (true, true) => TimerMode::Reserved,
        }
    }
}

/// The table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LocalVectorTable([u32; 6]);

impl LocalVectorTable {
    /// All entries masked (Intel SDM 3A 12.4.7.1). With `virtual_wire`, LINT0 takes a PIC's interrupts at once: so
    /// firmware leaves the bootstrap processor (MP specification 1.4 3.6.2.2), and guests are started without any.
    pub(super) fn at_reset(virtual_wire: bool) -> Self {
        let mut table = Self([MASKED; 6]);
        if virtual_wire {
            *table.slot(Lvt::Lint0) = 7 << 8;
        }
        table
    }

    #[allow(clippy::indexing_slicing, reason = "there are as many variants as elements")]
    pub(super) fn get(&self, lvt: Lvt) -> Entry {
        Entry(self.0[lvt as usize])
    }

    /// Replaces the bits of an entry that software may write.
    pub(super) fn write(&mut self, lvt: Lvt, value: u32, tsc_deadline: bool) {
        let kept = self.get(lvt).0 & lvt.read_only();
        *self.slot(lvt) = value & lvt.writable(tsc_deadline) | kept;
    }

    /// Replaces an entry.
    pub(super) fn load(&mut self, lvt: Lvt, value: u32) {
        *self.slot(lvt) = value;
    }

    /// Notes whether a level-triggered interrupt waits for its EOI.
    pub(super) fn set_remote_irr(&mut self, lvt: Lvt, waiting: bool) {
        let slot = self.slot(lvt);
        *slot = if waiting { *slot | REMOTE_IRR } else { *slot & !REMOTE_IRR };
    }

    /// Masks all entries, as software-disabling does (Intel SDM 3A 12.4.7.2).
    pub(super) fn mask_all(&mut self) {
        for entry in &mut self.0 {
            *entry |= MASKED;
        }
    }

    /// Masks `lvt`.
    pub(super) fn mask(&mut self, lvt: Lvt) {
        *self.slot(lvt) |= MASKED;
    }

    #[allow(clippy::indexing_slicing, reason = "there are as many variants as elements")]
    fn slot(&mut self, lvt: Lvt) -> &mut u32 {
        &mut self.0[lvt as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writable_bits_are_those_of_figure_12_8() {
        let expected = [0x7_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];
        for (lvt, bits) in Lvt::ALL.into_iter().zip(expected) {
            let mut table = LocalVectorTable::at_reset(false);
            assert_eq!(table.get(lvt), Entry(0x1_0000));
            table.write(lvt, u32::MAX, true);
            assert_eq!(table.get(lvt), Entry(bits), "{lvt:?}");
        }
        assert_eq!(Lvt::Timer.writable(false), 0x3_00ff);
    }

    #[test]
    fn remote_irr_survives_writes() {
        let mut table = LocalVectorTable::at_reset(false);
        table.set_remote_irr(Lvt::Lint0, true);
        table.write(Lvt::Lint0, 0x8021, true);
        assert_eq!(table.get(Lvt::Lint0), Entry(0xc021));
        table.set_remote_irr(Lvt::Lint0, false);
        assert_eq!(table.get(Lvt::Lint0), Entry(0x8021));
    }

    #[test]
    fn virtual_wire_is_an_open_extint() {
        let lint0 = LocalVectorTable::at_reset(true).get(Lvt::Lint0);
        assert_eq!((lint0.delivery(), lint0.masked()), (LocalDelivery::ExtInt, false));
    }
}
