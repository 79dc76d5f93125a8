//! Guest access to the registers: the page of xAPIC mode, and MSRs.
//!
//! Every call that a guest can make also first lets the timer catch up, so a change finds it in the state of `now`.

use super::base::{ApicBase, MSR_APIC_BASE, Mode};
use super::inbox::logical_x2apic_id;
use super::local::{LocalApic, Registers, error, initial_xapic_id};
use super::lvt::Lvt;
use super::message::{Delivery, Destination, Message};
use super::register::{DFR_FIXED, ICR_HIGH_BITS, ICR_LOW_BITS, MsrWrite, Register, svr};
use super::timer::MSR_TSC_DEADLINE;
use super::vectors::FIRST_LEGAL;
use super::{halves, joined, low_byte};
use crate::vcpu::MsrFault;

const FIRST_X2APIC_MSR: u32 = 0x800;
const LAST_X2APIC_MSR: u32 = 0x8ff;

/// Bytes of the register page.
const PAGE_SIZE: u64 = 0x1000;

/// Version 0x14, entries 0 to 5 of the local vector table (Intel SDM 3A 12.4.8).
const VERSION: u32 = 5 << 16 | 0x14;
const VERSION_SUPPRESSES_EOI_BROADCAST: u32 = 1 << 24;

/// What the run loop must do after a write. Whatever it is, the next deadline and what is pending may have changed.
#[must_use]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ApicAction {
    /// Nothing.
    None,
    /// Send this message with [`deliver`](super::deliver), as the sender.
    Ipi(Message),
    /// Tell the I/O APICs of the end of this level-triggered interrupt.
    Eoi(u8),
    /// Mode or page changed: what is cached of [`LocalApic::mode`] and [`LocalApic::page`] is stale.
    BaseChanged,
}

impl LocalApic {
    /// A load from `offset` in the register page, of any width. Registers are 32 bits at multiples of 16; the
    /// bytes between read as 0 (the processor leaves these loads undefined, Intel SDM 3A 12.4.1). A reserved
    /// register reads as 0 and is an error in the error status register. The other modes have no page: all
    /// ones.
    pub(crate) fn mmio_read(&mut self, offset: u64, data: &mut [u8], now: u64, tsc: u64) {
        if self.mode() != Mode::Xapic {
            data.fill(0xff);
            return;
        }
        self.expire(now, tsc);
        let mut loaded: Option<(u64, [u8; 4])> = None;
        let mut offset = offset;
        for byte in data {
            let number = offset / 16;
            // Each register is read once, however many bytes are.
            let value = match loaded {
                Some((last, value)) if last == number => value,
                _ => self.page_register(offset).map_or(0, |register| self.read(register, now)).to_le_bytes(),
            };
            loaded = Some((number, value));
            *byte = value.into_iter().chain([0; 12]).nth(usize::from(low_nibble(offset))).unwrap_or(0);
            offset = offset.wrapping_add(1);
        }
    }

    /// A store to `offset` in the register page. Only aligned ones of 4 bytes do something; the processor
    /// leaves the others undefined (Intel SDM 3A 12.4.1). Read-only registers ignore it; reserved ones are an
    /// error in the error status register.
    pub(crate) fn mmio_write(&mut self, offset: u64, data: &[u8], now: u64, tsc: u64) -> ApicAction {
        if self.mode() != Mode::Xapic {
            return ApicAction::None;
        }
        let &[a, b, c, d] = data else { return ApicAction::None };
        if low_nibble(offset) != 0 {
            return ApicAction::None;
        }
        self.expire(now, tsc);
        match self.page_register(offset) {
            Some(register) => self.write(register, u32::from_le_bytes([a, b, c, d]), now),
            None => ApicAction::None,
        }
    }

    /// Whether [`LocalApic::msr_read`] and [`LocalApic::msr_write`] are in charge of an MSR: IA32_APIC_BASE,
    /// IA32_TSC_DEADLINE, and the x2APIC range in every mode.
    pub(crate) fn owns_msr(index: u32) -> bool {
        matches!(index, MSR_APIC_BASE | MSR_TSC_DEADLINE | FIRST_X2APIC_MSR..=LAST_X2APIC_MSR)
    }

    /// RDMSR of IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register.
    ///
    /// # Errors
    /// #GP for registers that are reserved, write-only, or absent in this mode, and for all other MSRs.
    pub(crate) fn msr_read(&mut self, index: u32, now: u64, tsc: u64) -> Result<u64, MsrFault> {
        match index {
            MSR_APIC_BASE => return Ok(self.base.value()),
            MSR_TSC_DEADLINE if self.features.tsc_deadline => {
                self.expire(now, tsc);
                return Ok(self.registers.timer.tsc_deadline());
            }
            _ => {}
        }
        let register = self.x2apic_register(index)?;
        if !register.msr_readable() {
            return Err(MsrFault);
        }
        self.expire(now, tsc);
        if register == Register::CommandLow {
            return Ok(self.registers.command);
        }
        Ok(self.read(register, now).into())
    }

    /// WRMSR to IA32_APIC_BASE, IA32_TSC_DEADLINE or an x2APIC register.
    ///
    /// # Errors
    /// #GP for registers that are reserved, read-only, or absent in this mode, for reserved bits, for transitions of
    /// IA32_APIC_BASE that do not exist, and for all other MSRs. Nothing has changed then.
    pub(crate) fn msr_write(
        &mut self,
        index: u32,
        value: u64,
        now: u64,
        tsc: u64,
    ) -> Result<ApicAction, MsrFault> {
        match index {
            MSR_APIC_BASE => return self.write_base(value),
            MSR_TSC_DEADLINE if self.features.tsc_deadline => {
                self.expire(now, tsc);
                let mode = self.registers.lvt.get(Lvt::Timer).timer_mode();
                self.registers.timer.set_tsc_deadline(mode, value);
                // One in the past is due at once.
                self.expire(now, tsc);
                return Ok(ApicAction::None);
            }
            _ => {}
        }
        let register = self.x2apic_register(index)?;
        let (low, high) = halves(value);
        let legal = match register.msr_write(self.features.tsc_deadline, self.features.suppress_eoi_broadcast)
        {
            MsrWrite::Never => false,
            MsrWrite::Bits(bits) => high == 0 && low & !bits == 0,
            MsrWrite::Command => low & !ICR_LOW_BITS == 0,
        };
        if !legal {
            return Err(MsrFault);
        }
        self.expire(now, tsc);
        if register == Register::CommandLow {
            self.registers.command = value;
            return Ok(self.send(Message::from_command(low, high)));
        }
        Ok(self.write(register, low, now))
    }

    fn write_base(&mut self, value: u64) -> Result<ApicAction, MsrFault> {
        let (old, features) = (self.base, self.features);
        let new =
            ApicBase::checked(value, features.x2apic, features.gpa_bits).ok_or(MsrFault)?.transition(old)?;
        self.change_base(new);
        Ok(if new == old { ApicAction::None } else { ApicAction::BaseChanged })
    }

    /// Sets IA32_APIC_BASE and does what the change of mode does: a disabled APIC forgets all but its IDs; in
    /// x2APIC mode IDs are those it started with, and the destination in the command register has another
    /// format.
    pub(super) fn change_base(&mut self, new: ApicBase) {
        let old = std::mem::replace(&mut self.base, new).mode();
        if new.mode() == old {
            return;
        }
        match new.mode() {
            Mode::Disabled => {
                self.registers = Registers::at_reset(self.bootstrap);
                self.inbox.take_interrupts();
            }
            Mode::Xapic => {}
            Mode::X2apic => {
                self.registers.command &= u64::from(u32::MAX);
                (self.registers.logical_id, self.registers.model) = (0, 0xf);
                self.xapic_id = initial_xapic_id(&self.inbox);
            }
        }
        self.publish();
    }

    /// The register that an access to the page touches; noted as an error if it is reserved.
    fn page_register(&mut self, offset: u64) -> Option<Register> {
        let number = u32::try_from(offset / 16).ok().filter(|_| offset < PAGE_SIZE);
        let register = number.and_then(Register::in_page);
        if register.is_none() {
            self.log_error(error::ILLEGAL_REGISTER);
        }
        register
    }

    fn x2apic_register(&self, index: u32) -> Result<Register, MsrFault> {
        if self.mode() != Mode::X2apic || !(FIRST_X2APIC_MSR..=LAST_X2APIC_MSR).contains(&index) {
            return Err(MsrFault);
        }
        Register::in_x2apic(index - FIRST_X2APIC_MSR).ok_or(MsrFault)
    }

    /// The value of a register; those that only take writes read as 0.
    pub(super) fn read(&self, register: Register, now: u64) -> u32 {
        let registers = &self.registers;
        match register {
            Register::Id => self.id(),
            Register::Version => self.version(),
            Register::TaskPriority => registers.task_priority.into(),
            Register::ProcessorPriority => self.processor_priority().into(),
            Register::EndOfInterrupt | Register::Vestigial | Register::SelfIpi => 0,
            Register::LogicalDestination => match self.mode() {
                Mode::X2apic => logical_x2apic_id(self.inbox.x2apic_id()),
                Mode::Xapic | Mode::Disabled => u32::from(registers.logical_id) << 24,
            },
            Register::DestinationFormat => u32::from(registers.model) << 28 | DFR_FIXED,
            Register::Spurious => registers.spurious,
            Register::InService(word) => registers.in_service.word(word.into()),
            Register::TriggerMode(word) => registers.trigger_mode.word(word.into()),
            Register::Request(word) => registers.request.word(word.into()),
            Register::ErrorStatus => registers.error_status,
            Register::CommandLow => halves(registers.command).0,
            Register::CommandHigh => halves(registers.command).1,
            Register::Lvt(lvt) => registers.lvt.get(lvt).0,
            Register::InitialCount => registers.timer.initial(),
            Register::CurrentCount => {
                registers.timer.current(registers.lvt.get(Lvt::Timer).timer_mode(), now)
            }
            Register::Divide => registers.timer.divide(),
        }
    }

    /// Writes a register in either mode; bits that do not exist are dropped, and read-only registers keep their
    /// value.
    fn write(&mut self, register: Register, value: u32, now: u64) -> ApicAction {
        let [low, .., high] = value.to_le_bytes();
        match register {
            Register::Id => {
                self.xapic_id = high;
                self.publish();
            }
            Register::TaskPriority => self.set_task_priority(low),
            Register::EndOfInterrupt => return self.eoi().map_or(ApicAction::None, ApicAction::Eoi),
            Register::LogicalDestination => {
                self.registers.logical_id = high;
                self.publish();
            }
            Register::DestinationFormat => {
                self.registers.model = high >> 4;
                self.publish();
            }
            Register::Spurious => self.write_spurious(value),
            Register::ErrorStatus => {
                self.registers.error_status = std::mem::take(&mut self.registers.errors);
                self.registers.error_raised = false;
            }
            Register::CommandLow => {
                let (_, destination) = halves(self.registers.command);
                let low = value & ICR_LOW_BITS;
                self.registers.command = joined(low, destination);
                return self.send(Message::from_command(low, destination >> 24));
            }
            Register::CommandHigh => {
                let (low, _) = halves(self.registers.command);
                self.registers.command = joined(low, value & ICR_HIGH_BITS);
            }
            Register::Lvt(lvt) => self.write_lvt(lvt, value, now),
            Register::InitialCount => {
                let mode = self.registers.lvt.get(Lvt::Timer).timer_mode();
                self.registers.timer.set_initial(mode, value, now);
            }
            Register::Divide => {
                let mode = self.registers.lvt.get(Lvt::Timer).timer_mode();
                self.registers.timer.set_divide(mode, value, now);
            }
            Register::SelfIpi => {
                let delivery = Delivery::Fixed { vector: low, level: false };
                return self.send(Some(Message { destination: Destination::Sender, delivery }));
            }
            Register::Version
            | Register::ProcessorPriority
            | Register::Vestigial
            | Register::InService(_)
            | Register::TriggerMode(_)
            | Register::Request(_)
            | Register::CurrentCount => {}
        }
        ApicAction::None
    }

    fn write_spurious(&mut self, value: u32) {
        if value & svr::ENABLED == 0 && self.registers.software_enabled() {
            // What is on its way is still accepted (Intel SDM 3A 12.4.7.2).
            self.accept_posted();
            self.registers.lvt.mask_all();
        }
        self.registers.spurious = value & svr::writable(self.features.suppress_eoi_broadcast);
        self.publish();
    }

    fn write_lvt(&mut self, lvt: Lvt, value: u32, now: u64) {
        let old = self.registers.lvt.get(lvt);
        self.registers.lvt.write(lvt, value, self.features.tsc_deadline);
        if !self.registers.software_enabled() {
            self.registers.lvt.mask(lvt);
        }
        let new = self.registers.lvt.get(lvt);
        match lvt {
            Lvt::Timer => self.registers.timer.change_mode(old.timer_mode(), new.timer_mode(), now),
            Lvt::Lint0 => self.sample_lint0(),
            Lvt::Thermal | Lvt::Performance | Lvt::Lint1 | Lvt::Error => {}
        }
    }

    /// Sends what the command register says. What is for the sender alone is accepted here and now.
    fn send(&mut self, message: Option<Message>) -> ApicAction {
        let Some(message) = message else { return ApicAction::None };
        let to_itself = message.destination == Destination::Sender;
        match message.delivery {
            Delivery::Fixed { vector, .. } | Delivery::LowestPriority { vector, .. }
                if vector < FIRST_LEGAL =>
            {
                let received = if to_itself { error::RECEIVE_ILLEGAL_VECTOR } else { 0 };
                self.log_error(error::SEND_ILLEGAL_VECTOR | received);
                ApicAction::None
            }
            Delivery::Fixed { vector, .. } | Delivery::LowestPriority { vector, .. } if to_itself => {
                if self.registers.software_enabled() {
                    self.raise(vector, false);
                }
                ApicAction::None
            }
            _ => ApicAction::Ipi(message),
        }
    }

    fn id(&self) -> u32 {
        match self.mode() {
            Mode::X2apic => self.inbox.x2apic_id(),
            Mode::Xapic | Mode::Disabled => u32::from(self.xapic_id) << 24,
        }
    }

    fn version(&self) -> u32 {
        let suppresses = self.features.suppress_eoi_broadcast;
        VERSION | if suppresses { VERSION_SUPPRESSES_EOI_BROADCAST } else { 0 }
    }
}

/// Bits 0 to 3.
fn low_nibble(value: u64) -> u8 {
    low_byte(halves(value).0) & 0xf
}
