//! [`LocalApic`]: what it does with interrupts (Intel SDM 3A 12.8). Guest access to its registers is in `access`.

use std::sync::Arc;

use super::base::{ApicBase, Mode};
use super::inbox::{Address, Events, Inbox, Interrupts};
use super::low_byte;
use super::lvt::{Lint, LocalDelivery, LocalVectorTable, Lvt};
use super::register::svr;
use super::timer::{Deadline, Timer};
use super::vectors::{FIRST_LEGAL, ILLEGAL_BITS, Vectors, class};

/// Bits of the error status register (Intel SDM 3A 12.5.3). The lower ones exist on older processors only; bit 4,
/// lowest-priority messages that cannot be sent, is never set since they can.
pub(super) mod error {
    pub(in super::super) const SEND_ILLEGAL_VECTOR: u32 = 1 << 5;
    pub(in super::super) const RECEIVE_ILLEGAL_VECTOR: u32 = 1 << 6;
    pub(in super::super) const ILLEGAL_REGISTER: u32 = 1 << 7;
    pub(in super::super) const ALL: u32 = 0xff;
}

/// What a local APIC offers; CPUID and the I/O APICs must agree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ApicFeatures {
    /// x2APIC mode (CPUID.1:ECX bit 21).
    pub(crate) x2apic: bool,
    /// The timer's TSC-deadline mode (CPUID.1:ECX bit 24).
    pub(crate) tsc_deadline: bool,
    /// Suppression of EOI broadcasts (bit 24 of the version register). The I/O APICs must have EOI registers.
    pub(crate) suppress_eoi_broadcast: bool,
    /// Width of guest-physical addresses, which bounds IA32_APIC_BASE.
    pub(crate) gpa_bits: u8,
}

/// The registers that INIT resets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Registers {
    pub(super) task_priority: u8,
    /// Bits 24 to 31 of LDR in xAPIC mode.
    pub(super) logical_id: u8,
    /// Bits 28 to 31 of DFR.
    pub(super) model: u8,
    pub(super) spurious: u32,
    pub(super) in_service: Vectors,
    pub(super) trigger_mode: Vectors,
    pub(super) request: Vectors,
    /// What reads of the error status register return: errors up to the last write to it.
    pub(super) error_status: u32,
    /// Errors since.
    pub(super) errors: u32,
    /// An error interrupt was raised; a write to the error status register arms the next.
    pub(super) error_raised: bool,
    pub(super) command: u64,
    pub(super) lvt: LocalVectorTable,
    pub(super) timer: Timer,
}

impl Registers {
    /// Intel SDM 3A 12.4.7.1.
    pub(super) fn at_reset(bootstrap: bool) -> Self {
        Self {
            task_priority: 0,
            logical_id: 0,
            model: 0xf,
            spurious: svr::RESET,
            in_service: Vectors::default(),
            trigger_mode: Vectors::default(),
            request: Vectors::default(),
            error_status: 0,
            errors: 0,
            error_raised: false,
            command: 0,
            lvt: LocalVectorTable::at_reset(bootstrap),
            timer: Timer::default(),
        }
    }

    pub(super) fn software_enabled(&self) -> bool {
        self.spurious & svr::ENABLED != 0
    }
}

/// The local APIC of one vCPU, owned by the thread that runs it. Other threads reach it by its [`Inbox`].
#[derive(Debug)]
pub(crate) struct LocalApic {
    pub(super) inbox: Arc<Inbox>,
    pub(super) features: ApicFeatures,
    pub(super) bootstrap: bool,
    pub(super) base: ApicBase,
    /// The ID in xAPIC mode, which software may change. INIT and disabling keep it; x2APIC mode goes back to
    /// the first.
    pub(super) xapic_id: u8,
    /// Levels of LINT0 and LINT1.
    pins: [bool; 2],
    pub(super) registers: Registers,
}

impl LocalApic {
    /// A local APIC as after RESET. `bootstrap`: of the bootstrap processor; its LINT0 then is open for a PIC's
    /// interrupts, as firmware leaves it, since guests are started without any.
    pub(crate) fn new(inbox: Arc<Inbox>, features: ApicFeatures, bootstrap: bool) -> Self {
        let apic = Self {
            xapic_id: initial_xapic_id(&inbox),
            inbox,
            features,
            bootstrap,
            base: ApicBase::at_reset(bootstrap),
            pins: [false; 2],
            registers: Registers::at_reset(bootstrap),
        };
        apic.publish();
        apic
    }

    /// RESET (Intel SDM 3A 12.4.7.1 and 12.12.5.1). What was posted before is gone.
    #[cfg_attr(not(test), allow(dead_code, reason = "virtual machines are created anew so far"))]
    pub(crate) fn reset(&mut self) {
        self.base = ApicBase::at_reset(self.bootstrap);
        self.xapic_id = initial_xapic_id(&self.inbox);
        self.init();
        self.inbox.take_events();
    }

    /// INIT (Intel SDM 3A 12.4.7.3 and 12.12.5.1): like RESET, but mode and IDs stay. Events that
    /// [`LocalApic::drain`] has not returned yet stay as well: a SIPI may be among them.
    pub(crate) fn init(&mut self) {
        self.registers = Registers::at_reset(self.bootstrap);
        self.publish();
        self.inbox.take_interrupts();
    }

    /// The mode. CPUID.1:EDX.APIC is 0 while it is [`Mode::Disabled`].
    pub(crate) fn mode(&self) -> Mode {
        self.base.mode()
    }

    /// Guest-physical address of the register page, 4 KiB; `None` in other modes than xAPIC.
    pub(crate) fn page(&self) -> Option<u64> {
        (self.mode() == Mode::Xapic).then(|| self.base.page())
    }

    /// Takes what other threads posted. Interrupts go into IRR; the rest is the caller's.
    pub(crate) fn drain(&mut self) -> Events {
        if !self.inbox.has_posted() {
            return Events::default();
        }
        let events = self.inbox.take_events();
        self.accept_posted();
        events
    }

    /// The highest interrupt that the processor is to take, if its RFLAGS.IF lets it.
    pub(crate) fn pending(&self) -> Option<u8> {
        let vector = self.registers.request.highest()?;
        (self.mode() != Mode::Disabled && class(vector) > class(self.processor_priority())).then_some(vector)
    }

    /// The processor takes an interrupt: returns its vector, which is in service from now on. If there is none
    /// any more, it is the spurious vector, which is not in service and gets no EOI (Intel SDM 3A 12.9).
    pub(crate) fn acknowledge(&mut self) -> u8 {
        let Some(vector) = self.pending() else { return low_byte(self.registers.spurious) };
        self.registers.request.remove(vector);
        self.registers.in_service.insert(vector);
        self.publish_priority();
        vector
    }

    /// End of interrupt (Intel SDM 3A 12.8.5): returns the vector to tell I/O APICs, if it was level-triggered.
    pub(crate) fn eoi(&mut self) -> Option<u8> {
        let vector = self.registers.in_service.highest()?;
        self.registers.in_service.remove(vector);
        self.publish_priority();
        let lint0 = self.registers.lvt.get(Lvt::Lint0);
        if lint0.remote_irr() && lint0.vector() == vector {
            self.registers.lvt.set_remote_irr(Lvt::Lint0, false);
            self.sample_lint0();
        }
        let told = self.registers.spurious & svr::SUPPRESS_EOI_BROADCAST == 0;
        (told && self.registers.trigger_mode.contains(vector)).then_some(vector)
    }

    /// CR8: bits 4 to 7 of TPR.
    pub(crate) fn cr8(&self) -> u8 {
        class(self.registers.task_priority)
    }

    /// Writes CR8, of which the low 4 bits count (the others are #GP before they get here).
    pub(crate) fn set_cr8(&mut self, value: u8) {
        self.set_task_priority(value << 4);
    }

    /// Whether an asserted INTR pin interrupts the processor: LINT0 is in ExtINT mode and not masked, or the
    /// APIC is disabled, which leaves the pin to the processor.
    ///
    /// Software-disabling masks LINT0, so it ends this; after RESET, the bootstrap processor takes them
    /// although its APIC is not software-enabled yet.
    pub(crate) fn takes_ext_int(&self) -> bool {
        let lint0 = self.registers.lvt.get(Lvt::Lint0);
        self.mode() == Mode::Disabled || (!lint0.masked() && lint0.delivery() == LocalDelivery::ExtInt)
    }

    /// Drives LINT0 or LINT1. Returns the events this causes: NMI or INIT, where the pin is in that mode. With
    /// the APIC disabled, LINT1 is the processor's NMI pin. ExtINT is not among them: see
    /// [`LocalApic::takes_ext_int`].
    #[cfg_attr(not(test), allow(dead_code, reason = "the INTR pin is asked for, and NMI is posted, so far"))]
    pub(crate) fn set_pin(&mut self, pin: Lint, asserted: bool) -> Events {
        let [lint0, lint1] = &mut self.pins;
        let level = match pin {
            Lint::Lint0 => lint0,
            Lint::Lint1 => lint1,
        };
        let rising = !std::mem::replace(level, asserted) && asserted;
        let mut events = Events::default();
        if self.mode() == Mode::Disabled {
            events.nmi = rising && pin == Lint::Lint1;
            return events;
        }
        let entry = self.registers.lvt.get(pin.into());
        if entry.masked() || !rising {
            return events;
        }
        match entry.delivery() {
            // LINT1 is edge-triggered whatever its entry says.
            LocalDelivery::Fixed if pin == Lint::Lint0 && entry.level() => self.sample_lint0(),
            LocalDelivery::Fixed => self.raise(entry.vector(), false),
            LocalDelivery::Nmi => events.nmi = true,
            LocalDelivery::Init => events.init = true,
            LocalDelivery::ExtInt | LocalDelivery::Nothing => {}
        }
        events
    }

    /// When [`LocalApic::expire`] is due. A masked timer goes on, but nobody need wake for it.
    ///
    /// Changes with every access by the guest and with [`LocalApic::expire`], `init`, `reset` and `restore`.
    pub(crate) fn next_deadline(&self) -> Deadline {
        let entry = self.registers.lvt.get(Lvt::Timer);
        if entry.masked() { Deadline::None } else { self.registers.timer.deadline(entry.timer_mode()) }
    }

    /// Raises the timer's interrupt if it is due at `now` nanoseconds and the time-stamp counter's value `tsc`.
    /// Periods that were missed count once.
    pub(crate) fn expire(&mut self, now: u64, tsc: u64) {
        let entry = self.registers.lvt.get(Lvt::Timer);
        if self.registers.timer.take_fired(entry.timer_mode(), now, tsc) && !entry.masked() {
            self.raise(entry.vector(), false);
        }
    }

    /// PPR (Intel SDM 3A 12.8.3.1).
    pub(super) fn processor_priority(&self) -> u8 {
        let serviced = self.registers.in_service.highest().unwrap_or(0);
        let task = self.registers.task_priority;
        if class(task) >= class(serviced) { task } else { serviced & 0xf0 }
    }

    pub(super) fn set_task_priority(&mut self, value: u8) {
        self.registers.task_priority = value;
        self.publish_priority();
    }

    /// Accepts an interrupt (Intel SDM 3A 12.8.4): IRR, and TMR with its trigger mode.
    pub(super) fn raise(&mut self, vector: u8, level: bool) {
        if vector < FIRST_LEGAL {
            self.log_error(error::RECEIVE_ILLEGAL_VECTOR);
            return;
        }
        self.registers.request.insert(vector);
        if level {
            self.registers.trigger_mode.insert(vector);
        } else {
            self.registers.trigger_mode.remove(vector);
        }
    }

    /// Notes errors, and raises the error interrupt unless one was raised since the last write to the error status
    /// register (Intel SDM 3A 12.5.3).
    pub(super) fn log_error(&mut self, bits: u32) {
        self.registers.errors |= bits;
        let entry = self.registers.lvt.get(Lvt::Error);
        if entry.masked() || self.registers.error_raised {
            return;
        }
        // Before raising: an illegal vector in the entry is an error that comes back here.
        self.registers.error_raised = true;
        self.raise(entry.vector(), false);
    }

    /// Raises LINT0's interrupt if the pin is asserted, level-triggered, and the one before had its EOI.
    pub(super) fn sample_lint0(&mut self) {
        let [asserted, _] = self.pins;
        let entry = self.registers.lvt.get(Lvt::Lint0);
        let due = asserted && entry.level() && entry.delivery() == LocalDelivery::Fixed;
        if due && !entry.masked() && !entry.remote_irr() {
            if entry.vector() >= FIRST_LEGAL {
                self.registers.lvt.set_remote_irr(Lvt::Lint0, true);
            }
            self.raise(entry.vector(), true);
        }
    }

    /// Moves posted interrupts into IRR. A disabled APIC drops them: they were on their way while it was disabled.
    pub(super) fn accept_posted(&mut self) {
        let Interrupts { edge, level } = self.inbox.take_interrupts();
        if self.mode() == Mode::Disabled || !self.registers.software_enabled() {
            return;
        }
        let illegal = Vectors::from_words([ILLEGAL_BITS, 0, 0, 0, 0, 0, 0, 0]);
        let registers = &mut self.registers;
        registers.trigger_mode.remove_all(&edge);
        for set in [edge, level] {
            registers.request.insert_all(&set);
        }
        registers.trigger_mode.insert_all(&level);
        registers.request.remove_all(&illegal);
        registers.trigger_mode.remove_all(&illegal);
        if (edge.word(0) | level.word(0)) & ILLEGAL_BITS != 0 {
            self.log_error(error::RECEIVE_ILLEGAL_VECTOR);
        }
    }

    pub(super) fn address(&self) -> Address {
        Address {
            mode: self.mode(),
            software_enabled: self.registers.software_enabled(),
            xapic_id: self.xapic_id,
            logical_id: self.registers.logical_id,
            model: self.registers.model,
        }
    }

    /// Lets other threads know of a change of address or priority.
    pub(super) fn publish(&self) {
        self.inbox.publish(self.address());
        self.publish_priority();
    }

    fn publish_priority(&self) {
        self.inbox.publish_priority(self.processor_priority());
    }
}

/// The ID in xAPIC mode after RESET (Intel SDM 3A 12.12.5.1).
pub(super) fn initial_xapic_id(inbox: &Inbox) -> u8 {
    low_byte(inbox.x2apic_id())
}
