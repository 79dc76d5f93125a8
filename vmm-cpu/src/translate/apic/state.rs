//! Conversion to and from the portable state.
//!
//! What it does not hold: IA32_APIC_BASE and IA32_TSC_DEADLINE, which have places of their own in
//! [`CpuState`](crate::state::CpuState); errors that no write to the error status register has shown yet; the
//! levels of LINT0 and LINT1, which whoever drives them drives again. The timer is saved by its current count,
//! so a restored one has the ticks left that the saved one had, from the time of the restore on.

use super::base::ApicBase;
use super::inbox::{Inbox, logical_x2apic_id};
use super::local::{LocalApic, Registers, error, initial_xapic_id};
use super::lvt::{LocalVectorTable, Lvt};
use super::register::{DFR_FIXED, ICR_HIGH_BITS, ICR_LOW_BITS, Register, svr};
use super::timer::{DIVIDE_BITS, Timer};
use super::vectors::{ILLEGAL_BITS, Vectors};
use super::{Mode, joined, low_byte};
use crate::error::{Error, Result};
use crate::state::LocalApicState;

/// Numbers of registers in the page.
mod number {
    pub(super) const ID: u32 = 0x02;
    pub(super) const TASK_PRIORITY: u32 = 0x08;
    pub(super) const LOGICAL_DESTINATION: u32 = 0x0d;
    pub(super) const DESTINATION_FORMAT: u32 = 0x0e;
    pub(super) const SPURIOUS: u32 = 0x0f;
    pub(super) const IN_SERVICE: u32 = 0x10;
    pub(super) const TRIGGER_MODE: u32 = 0x18;
    pub(super) const REQUEST: u32 = 0x20;
    pub(super) const ERROR_STATUS: u32 = 0x28;
    pub(super) const COMMAND_LOW: u32 = 0x30;
    pub(super) const COMMAND_HIGH: u32 = 0x31;
    pub(super) const LVT: u32 = 0x32;
    pub(super) const INITIAL_COUNT: u32 = 0x38;
    pub(super) const CURRENT_COUNT: u32 = 0x39;
    pub(super) const DIVIDE: u32 = 0x3e;
}

impl LocalApic {
    /// The registers at `now` nanoseconds and the time-stamp counter's value `tsc`. Interrupts on their way are
    /// in IRR then; what else was posted is left to [`LocalApic::drain`], which goes first.
    ///
    /// Elements that are no register in any mode, and those that only take writes, are 0.
    pub(crate) fn save(&mut self, now: u64, tsc: u64) -> LocalApicState {
        self.expire(now, tsc);
        self.accept_posted();
        let mut state = LocalApicState::default();
        for (number, element) in (0..).zip(&mut state.registers) {
            *element = Register::in_page(number).map_or(0, |register| self.read(register, now));
        }
        state
    }

    /// Takes over registers and IA32_APIC_BASE; on an error nothing has changed. A counting timer has the
    /// current count left at `now` nanoseconds (a periodic one at 0 starts a period); a TSC-deadline timer is
    /// disarmed until IA32_TSC_DEADLINE is written. What the inbox holds stays there.
    ///
    /// Version, processor priority and elements that are no register are ignored: other backends differ there.
    ///
    /// # Errors
    /// [`Error::InvalidState`] naming the register and its value.
    pub(crate) fn restore(&mut self, apic_base: u64, state: &LocalApicState, now: u64) -> Result<()> {
        let base = self.check_base(apic_base)?;
        let page = Page(state);
        let xapic_id = page.xapic_id(base.mode(), &self.inbox)?;
        let registers = page.registers(self, base.mode(), now)?;
        self.base = base;
        self.xapic_id = xapic_id;
        self.registers = if base.mode() == Mode::Disabled {
            // It has no state to come back to but CR8.
            Registers { task_priority: registers.task_priority, ..Registers::at_reset(self.bootstrap) }
        } else {
            registers
        };
        self.publish();
        Ok(())
    }

    /// Sets IA32_APIC_BASE from outside of the guest: any mode from any other.
    ///
    /// # Errors
    /// [`Error::InvalidState`] for reserved bits and for x2APIC mode without the enable bit.
    pub(crate) fn load_base(&mut self, value: u64) -> Result<()> {
        let base = self.check_base(value)?;
        self.change_base(base);
        Ok(())
    }

    fn check_base(&self, value: u64) -> Result<ApicBase> {
        let features = self.features;
        ApicBase::checked(value, features.x2apic, features.gpa_bits).ok_or_else(|| Error::InvalidState {
            element: "system.apic_base",
            problem: format!(
                "{value:#x} has a reserved bit or a mode that does not exist; allowed are bits 8, 11, 10 with 11{}, \
                 and a page below 2^{}",
                if features.x2apic { "" } else { " (not here: no x2APIC)" },
                features.gpa_bits
            ),
        })
    }
}

/// A register page that may hold anything.
struct Page<'a>(&'a LocalApicState);

impl Page<'_> {
    fn get(&self, number: u32) -> u32 {
        usize::try_from(number).ok().and_then(|number| self.0.registers.get(number)).copied().unwrap_or(0)
    }

    /// The element if only `bits` are set.
    fn bits(&self, number: u32, bits: u32) -> Result<u32> {
        let value = self.get(number);
        if value & !bits == 0 { Ok(value) } else { Err(refused(number, value, format!("bits {bits:#x}"))) }
    }

    /// A set of vectors without the reserved ones.
    fn vectors(&self, number: u32) -> Result<Vectors> {
        self.bits(number, !ILLEGAL_BITS)?;
        Ok(Vectors::from_words([0, 1, 2, 3, 4, 5, 6, 7].map(|word| self.get(number + word))))
    }

    /// The ID in xAPIC mode. In x2APIC mode the page has the other one, which is this vCPU's or none.
    fn xapic_id(&self, mode: Mode, inbox: &Inbox) -> Result<u8> {
        let (id, x2apic_id) = (self.get(number::ID), inbox.x2apic_id());
        match mode {
            Mode::X2apic if id == x2apic_id => Ok(initial_xapic_id(inbox)),
            Mode::X2apic => Err(refused(number::ID, id, format!("{x2apic_id:#x}, the ID of this vCPU"))),
            Mode::Xapic | Mode::Disabled => {
                let [.., high] = self.bits(number::ID, 0xff00_0000)?.to_le_bytes();
                Ok(high)
            }
        }
    }

    fn registers(&self, apic: &LocalApic, mode: Mode, now: u64) -> Result<Registers> {
        let features = apic.features;
        let [task_priority, ..] = self.bits(number::TASK_PRIORITY, 0xff)?.to_le_bytes();
        let format = self.get(number::DESTINATION_FORMAT);
        if format & DFR_FIXED != DFR_FIXED {
            return Err(refused(number::DESTINATION_FORMAT, format, format!("bits {DFR_FIXED:#x} all set")));
        }
        let mut lvt = LocalVectorTable::at_reset(false);
        for (number, entry) in (number::LVT..).zip(Lvt::ALL) {
            let bits = entry.writable(features.tsc_deadline) | entry.read_only();
            lvt.load(entry, self.bits(number, bits)?);
        }
        Ok(Registers {
            task_priority,
            logical_id: self.logical_id(mode, apic.inbox.x2apic_id())?,
            model: if mode == Mode::X2apic { 0xf } else { low_byte(format >> 28) },
            spurious: self.bits(number::SPURIOUS, svr::writable(features.suppress_eoi_broadcast))?,
            in_service: self.vectors(number::IN_SERVICE)?,
            trigger_mode: self.vectors(number::TRIGGER_MODE)?,
            request: self.vectors(number::REQUEST)?,
            error_status: self.bits(number::ERROR_STATUS, error::ALL)?,
            errors: 0,
            error_raised: false,
            command: self.command(mode),
            timer: self.timer(&lvt, now)?,
            lvt,
        })
    }

    /// Bits 24 to 31 of LDR in xAPIC mode. In x2APIC mode LDR follows from the ID.
    fn logical_id(&self, mode: Mode, x2apic_id: u32) -> Result<u8> {
        let value = self.get(number::LOGICAL_DESTINATION);
        match mode {
            Mode::X2apic => {
                let expected = logical_x2apic_id(x2apic_id);
                if value == expected {
                    Ok(0)
                } else {
                    Err(refused(
                        number::LOGICAL_DESTINATION,
                        value,
                        format!("{expected:#x}, which is the ID's"),
                    ))
                }
            }
            Mode::Xapic | Mode::Disabled => {
                let [.., high] = self.bits(number::LOGICAL_DESTINATION, 0xff00_0000)?.to_le_bytes();
                Ok(high)
            }
        }
    }

    /// The command register. Nothing but the guest reads it, and other backends keep what is reserved there.
    fn command(&self, mode: Mode) -> u64 {
        let high = self.get(number::COMMAND_HIGH);
        let high = if mode == Mode::X2apic { high } else { high & ICR_HIGH_BITS };
        joined(self.get(number::COMMAND_LOW) & ICR_LOW_BITS, high)
    }

    fn timer(&self, lvt: &LocalVectorTable, now: u64) -> Result<Timer> {
        let (initial, current) = (self.get(number::INITIAL_COUNT), self.get(number::CURRENT_COUNT));
        if current > initial {
            return Err(refused(
                number::CURRENT_COUNT,
                current,
                format!("0 to {initial:#x}, the initial count"),
            ));
        }
        // Other backends keep what is reserved.
        let divide = self.get(number::DIVIDE) & DIVIDE_BITS;
        Ok(Timer::restored(lvt.get(Lvt::Timer).timer_mode(), divide, initial, current, now))
    }
}

fn refused(number: u32, value: u32, allowed: String) -> Error {
    Error::InvalidState {
        element: "local_apic",
        problem: format!("register {:#05x} is {value:#x}, allowed is {allowed}", number * 16),
    }
}
