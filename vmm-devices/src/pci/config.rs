//! Configuration space of a function with a type 0 header (PCI 3.0, 6.1; PCIe 7.5): 1024 registers of 32 bits.
//!
//! Which bits a guest may write is decided when the space is built, bit by bit. From then on a write is a few mask operations, so
//! there is nothing that a guest could do to what it may not change.

use crate::bus::{BusRange, halves};
use crate::error::StateError;
use crate::pci::PciError;
use crate::pci::bar::{BARS, Bar, BarKind};
use crate::pci::capability::{Capability, CapabilityOffset, CapabilityWrite, List};
use crate::pci::intx::{InterruptPin, Intx};

const DEVICE: &str = "PCI configuration space";

/// Bytes of configuration space.
pub const CONFIG_SIZE: u16 = 4096;
const REGISTERS: usize = 1024;

// Registers, by offset (PCI 3.0, figure 6-1).
const IDS: u16 = 0x00;
const COMMAND_STATUS: u16 = 0x04;
const CLASS_REVISION: u16 = 0x08;
pub(super) const HEADER_TYPE: u16 = 0x0c;
const BAR_0: u16 = 0x10;
const SUBSYSTEM: u16 = 0x2c;
const CAPABILITIES: u16 = 0x34;
const INTERRUPT: u16 = 0x3c;
const STANDARD: u16 = 0x40;
const EXTENDED: u16 = 0x100;

// Command register (6.2.2). What PCIe hardwires to zero is not there.
const IO_SPACE: u32 = 1;
const MEMORY_SPACE: u32 = 1 << 1;
const BUS_MASTER: u32 = 1 << 2;
const PARITY_RESPONSE: u32 = 1 << 6;
const SYSTEM_ERROR: u32 = 1 << 8;
const INTERRUPT_DISABLE: u32 = 1 << 10;

// Status register (6.2.3), the high half.
const INTERRUPT_STATUS: u32 = 1 << 19;
const CAPABILITIES_LIST: u32 = 1 << 20;
/// Errors, which are reported by setting and taken note of by writing ones.
const ERRORS: u32 = 0xf900_0000;

const CACHE_LINE_SIZE: u32 = 0xff;
const INTERRUPT_LINE: u32 = 0xff;

/// Who a function is: the registers that never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Identity {
    /// Who made it, as the PCI-SIG numbers them; not 0xffff.
    pub vendor: u16,
    /// What it is, as the vendor numbers them.
    pub device: u16,
    /// Base class, sub-class and programming interface (PCI 3.0, appendix D).
    pub class: [u8; 3],
    /// Revision of the device.
    pub revision: u8,
    /// Who made the board, and which one it is: 0 and 0 if nobody says.
    pub subsystem: [u16; 2],
}

impl Identity {
    /// A function of revision 0 without a subsystem.
    pub const fn new(vendor: u16, device: u16, class: [u8; 3]) -> Self {
        Self { vendor, device, class, revision: 0, subsystem: [0, 0] }
    }

    /// Its revision.
    #[must_use]
    pub const fn revision(self, revision: u8) -> Self {
        Self { revision, ..self }
    }

    /// Vendor and number of the subsystem.
    #[must_use]
    pub const fn subsystem(self, vendor: u16, device: u16) -> Self {
        Self { subsystem: [vendor, device], ..self }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Register {
    value: u32,
    /// What a reset makes of it.
    reset: u32,
    writable: u32,
    cleared_by_one: u32,
}

impl Register {
    const fn read_only(value: u32) -> Self {
        Self { value, reset: value, writable: 0, cleared_by_one: 0 }
    }

    /// What the guest can change.
    const fn changeable(self) -> u32 {
        self.writable | self.cleared_by_one
    }

    /// The guest stores `value` in the bytes that `lanes` has.
    fn write(&mut self, value: u32, lanes: u32) {
        let writable = self.writable & lanes;
        self.value = self.value & !writable | value & writable;
        self.value &= !(value & lanes & self.cleared_by_one);
    }
}

/// Puts a configuration space together.
///
/// ```
/// use vmm_devices::pci::{Bar, Capability, ConfigBuilder, Identity, InterruptPin, capability};
///
/// let mut config = ConfigBuilder::new(Identity::new(0x1234, 0x5678, [0xff, 0, 0]));
/// config.bar(0, Bar::memory64(0x4000))?;
/// config.interrupt_pin(InterruptPin::A);
/// let vendor = config.capability(Capability::new(capability::id::VENDOR, [6, 1, 0, 0]).writable([0, 0, 0xff]))?;
/// let mut config = config.build();
///
/// assert_eq!(config.register(0), 0x5678_1234);
/// let written = config.write(vendor.get() + 4, &[7, 7]);
/// assert!(written.is_some_and(|write| write.reaches(vendor, 4)));
/// assert_eq!(config.register(vendor.get() + 4), 7);
/// # Ok::<(), vmm_devices::pci::PciError>(())
/// ```
#[derive(Debug)]
pub struct ConfigBuilder {
    space: ConfigSpace,
    /// The register that points to the next capability of each list, and where that one goes.
    standard: (u16, u16),
    extended: (Option<u16>, u16),
}

impl ConfigBuilder {
    /// A function with neither BARs nor capabilities nor a pin.
    pub fn new(identity: Identity) -> Self {
        let Identity { vendor, device, class: [base, sub, interface], revision, subsystem } = identity;
        let [subsystem_vendor, subsystem] = subsystem;
        let mut space = ConfigSpace {
            registers: vec![Register::default(); REGISTERS].into_boxed_slice(),
            bars: [None; BARS],
            capabilities: Vec::new(),
            intx: None,
        };
        space.define(IDS, Register::read_only(u32::from(device) << 16 | u32::from(vendor)));
        let writable = BUS_MASTER | PARITY_RESPONSE | SYSTEM_ERROR | INTERRUPT_DISABLE;
        space.define(COMMAND_STATUS, Register { writable, cleared_by_one: ERRORS, ..Register::default() });
        let class = u32::from_le_bytes([revision, interface, sub, base]);
        space.define(CLASS_REVISION, Register::read_only(class));
        space.define(HEADER_TYPE, Register { writable: CACHE_LINE_SIZE, ..Register::default() });
        let subsystem = u32::from(subsystem) << 16 | u32::from(subsystem_vendor);
        space.define(SUBSYSTEM, Register::read_only(subsystem));
        space.define(INTERRUPT, Register { writable: INTERRUPT_LINE, ..Register::default() });
        Self { space, standard: (CAPABILITIES, STANDARD), extended: (None, EXTENDED) }
    }

    /// BAR number `index` (0 to 5) is `bar`.
    ///
    /// # Errors
    /// [`PciError::Bar`] if it cannot be that large, [`PciError::BarIndex`] if there is no such register or it is
    /// another's.
    pub fn bar(&mut self, index: usize, bar: Bar) -> Result<&mut Self, PciError> {
        bar.check(index)?;
        let wide = bar.kind() == BarKind::Memory64;
        let taken = |index: usize| self.space.register_is_bar(index);
        if index >= BARS || taken(index) || wide && (index + 1 >= BARS || taken(index + 1)) {
            return Err(PciError::BarIndex { bar: index, kind: bar.kind() });
        }
        let [low, high] = bar.writable();
        let flags = bar.flags();
        self.space.define(bar_offset(index), Register { writable: low, ..Register::read_only(flags) });
        if wide {
            let upper = Register { writable: high, ..Register::default() };
            self.space.define(bar_offset(index + 1), upper);
        }
        if let Some(slot) = self.space.bars.get_mut(index) {
            *slot = Some(bar);
        }
        // A function that answers to no ports has no bit to let it (6.2.2).
        let decoding = if bar.kind().is_io() { IO_SPACE } else { MEMORY_SPACE };
        if let Some(command) = self.space.register_mut(COMMAND_STATUS) {
            command.writable |= decoding;
        }
        Ok(self)
    }

    /// BAR number `index`, if it was said what it is.
    pub fn bar_at(&self, index: usize) -> Option<Bar> {
        self.space.bar(index)
    }

    /// The function has an interrupt pin.
    pub fn interrupt_pin(&mut self, pin: InterruptPin) -> &mut Self {
        if let Some(register) = self.space.register_mut(INTERRUPT) {
            register.reset = u32::from(pin.index() + 1) << 8;
            register.value = register.reset;
        }
        self.space.intx.get_or_insert_default();
        self
    }

    /// One more capability, at the end of its list.
    ///
    /// # Errors
    /// [`PciError::CapabilityRoom`] if it does not fit behind the others.
    pub fn capability(&mut self, capability: Capability) -> Result<CapabilityOffset, PciError> {
        let (at, end) = match capability.list {
            List::Standard(_) => (self.standard.1, EXTENDED),
            List::Extended(..) => (self.extended.1, CONFIG_SIZE),
        };
        let (size, room) = (capability.size(), end.saturating_sub(at));
        let Some(size) = u16::try_from(size).ok().filter(|size| *size <= room) else {
            return Err(PciError::CapabilityRoom { size, room });
        };
        self.link(capability.list, at, size);
        let first = match capability.list {
            List::Standard(id) => u32::from(id),
            List::Extended(id, version) => u32::from(id) | u32::from(version) << 16,
        };
        let header = capability.header();
        let word = |bytes: &[u8], register: usize| {
            let byte = |i: usize| {
                let into = (register * 4 + i).checked_sub(header)?;
                // A mask does not reach beyond the body.
                capability.body.get(into).and_then(|_| bytes.get(into)).copied()
            };
            u32::from_le_bytes([0, 1, 2, 3].map(|i| byte(i).unwrap_or(0)))
        };
        for (register, offset) in (0..).zip((at..at + size).step_by(4)) {
            let head = if register == 0 { first } else { 0 };
            let value = word(&capability.body, register) | head;
            let cleared_by_one = word(&capability.cleared_by_one, register);
            let writable = word(&capability.writable, register) & !cleared_by_one;
            self.space.define(offset, Register { value, reset: value, writable, cleared_by_one });
        }
        self.space.capabilities.push((CapabilityOffset(at), size));
        Ok(CapabilityOffset(at))
    }

    /// Puts a pointer to the capability that comes at `at` where the one before it is.
    fn link(&mut self, list: List, at: u16, size: u16) {
        let (from, pointer) = match list {
            List::Standard(_) => {
                let from = std::mem::replace(&mut self.standard, (at, at + size)).0;
                if let Some(status) = self.space.register_mut(COMMAND_STATUS) {
                    status.reset |= CAPABILITIES_LIST;
                    status.value |= CAPABILITIES_LIST;
                }
                // The pointer is the first byte of its register, and the second of a capability.
                (Some(from), u32::from(at) << if from == CAPABILITIES { 0 } else { 8 })
            }
            List::Extended(..) => {
                // The first one is where it is looked for.
                (std::mem::replace(&mut self.extended, (Some(at), at + size)).0, u32::from(at) << 20)
            }
        };
        if let Some(register) = from.and_then(|from| self.space.register_mut(from)) {
            register.reset |= pointer;
            register.value |= pointer;
        }
    }

    /// That was all.
    pub fn build(self) -> ConfigSpace {
        self.space
    }
}

fn bar_offset(index: usize) -> u16 {
    // At most 5, so at most 0x24.
    u16::try_from(index).map_or(CONFIG_SIZE, |index| index.saturating_mul(4).saturating_add(BAR_0))
}

/// Configuration space of a function. [`ConfigBuilder`] makes one.
#[derive(Debug)]
pub struct ConfigSpace {
    registers: Box<[Register]>,
    bars: [Option<Bar>; BARS],
    /// Each with its size in bytes.
    capabilities: Vec<(CapabilityOffset, u16)>,
    intx: Option<Intx>,
}

/// What of a [`ConfigSpace`] a guest can change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ConfigState {
    /// Device and vendor, so that a state is not taken for another function's.
    pub ids: u32,
    /// Offset and value of each register that is not read-only, ascending.
    pub registers: Vec<(u16, u32)>,
}

impl ConfigSpace {
    fn define(&mut self, offset: u16, register: Register) {
        if let Some(place) = self.register_mut(offset) {
            *place = register;
        }
    }

    fn register_mut(&mut self, offset: u16) -> Option<&mut Register> {
        self.registers.get_mut(usize::from(offset / 4))
    }

    fn register_at(&self, offset: u16) -> Option<Register> {
        self.registers.get(usize::from(offset / 4)).copied()
    }

    /// The register that `offset` is in, as the guest sees it; all ones beyond the end.
    pub fn register(&self, offset: u16) -> u32 {
        let Some(Register { value, .. }) = self.register_at(offset) else { return u32::MAX };
        let asserted = offset & !3 == COMMAND_STATUS && self.intx.as_ref().is_some_and(Intx::is_asserted);
        value | if asserted { INTERRUPT_STATUS } else { 0 }
    }

    /// The guest loads from `offset`. An access is within one register: what goes beyond it is left alone.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        if offset >= CONFIG_SIZE {
            return;
        }
        let into = usize::from(offset & 3);
        for (to, from) in data.iter_mut().zip(self.register(offset).to_le_bytes().into_iter().skip(into)) {
            *to = from;
        }
    }

    /// The guest stores `data` at `offset`; which capability that was of. What goes beyond the register is dropped.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Option<CapabilityWrite> {
        let (mut value, mut lanes, mut size) = ([0; 4], [0; 4], 0);
        let bytes = value.iter_mut().zip(&mut lanes).skip(usize::from(offset & 3));
        for ((byte, lane), &written) in bytes.zip(data) {
            (*byte, *lane, size) = (written, 0xff, size + 1);
        }
        self.register_mut(offset)?.write(u32::from_le_bytes(value), u32::from_le_bytes(lanes));
        if offset & !3 == COMMAND_STATUS {
            self.gate_interrupt();
        }
        let (capability, into) = self.capabilities.iter().find_map(|&(capability, length)| {
            Some((capability, offset.checked_sub(capability.0).filter(|into| *into < length)?))
        })?;
        Some(CapabilityWrite { capability, offset: into, size })
    }

    /// The function changes a register by itself, in the bits that the guest can change.
    pub fn set_register(&mut self, offset: u16, value: u32) {
        if let Some(register) = self.register_mut(offset) {
            let bits = register.changeable();
            register.value = register.value & !bits | value & bits;
        }
        self.gate_interrupt();
    }

    fn gate_interrupt(&self) {
        if let Some(intx) = &self.intx {
            intx.set_disabled(self.register(COMMAND_STATUS) & INTERRUPT_DISABLE != 0);
        }
    }

    /// The function's pin, if it has one.
    pub fn intx(&self) -> Option<&Intx> {
        self.intx.as_ref()
    }

    /// The number of that pin, 0 to 3.
    pub(super) fn pin(&self) -> u8 {
        let [_, pin, ..] = self.register(INTERRUPT).to_le_bytes();
        pin.saturating_sub(1)
    }

    /// Whether the function may access memory and send messages (bus master enable).
    pub fn is_bus_master(&self) -> bool {
        self.register(COMMAND_STATUS) & BUS_MASTER != 0
    }

    /// BAR number `index`, if there is one.
    pub fn bar(&self, index: usize) -> Option<Bar> {
        self.bars.get(index).copied().flatten()
    }

    /// Whether the register of BAR `index` is in use, maybe as the high half of the one before.
    fn register_is_bar(&self, index: usize) -> bool {
        let wide = |bar: Bar| bar.kind() == BarKind::Memory64;
        self.bar(index).is_some() || index.checked_sub(1).and_then(|low| self.bar(low)).is_some_and(wide)
    }

    /// The address that BAR `index` holds, whether or not the function answers there.
    pub fn bar_base(&self, index: usize) -> Option<u64> {
        let low = bar_offset(index);
        let registers = [self.register(low), self.register(low.saturating_add(4))];
        Some(self.bar(index)?.base(registers))
    }

    /// Where BAR `index` is to answer: `None` if there is none, or if the command register keeps it from that.
    pub fn decoded(&self, index: usize) -> Option<BusRange> {
        let (bar, base) = (self.bar(index)?, self.bar_base(index)?);
        let enabled = if bar.kind().is_io() { IO_SPACE } else { MEMORY_SPACE };
        (self.register(COMMAND_STATUS) & enabled != 0).then(|| BusRange::new(base, bar.size()))
    }

    /// Puts BAR `index` at `base`, now and after each reset: what firmware would do.
    pub(super) fn place_bar(&mut self, index: usize, base: u64) {
        let Some(bar) = self.bar(index) else { return };
        let low = bar_offset(index);
        let registers = if bar.kind() == BarKind::Memory64 { 2 } else { 1 };
        for (offset, half) in [low, low.saturating_add(4)].into_iter().zip(halves(base)).take(registers) {
            if let Some(register) = self.register_mut(offset) {
                register.reset = register.reset & !register.writable | half & register.writable;
                register.value = register.reset;
            }
        }
    }

    /// Back to what it was before the guest. BARs are where the monitor put them, and nothing answers there.
    pub fn reset(&mut self) {
        for register in &mut self.registers {
            register.value = register.reset;
        }
        self.gate_interrupt();
    }

    /// What the guest can change. The level at the pin is the function's to save.
    pub fn state(&self) -> ConfigState {
        let changeable = (0..CONFIG_SIZE).step_by(4).zip(&self.registers).filter_map(|(offset, register)| {
            (register.changeable() != 0).then_some((offset, register.value))
        });
        ConfigState { ids: self.register(IDS), registers: changeable.collect() }
    }

    /// Goes on from a saved state. The bridge does not know before it is told:
    /// [`HostBridge::restore`](super::HostBridge::restore), or [`refresh`](super::HostBridge::refresh).
    ///
    /// # Errors
    /// [`StateError`] if it is another function's, or one with other BARs or capabilities; nothing has changed.
    pub fn restore(&mut self, state: &ConfigState) -> Result<(), StateError> {
        let ours = self.state();
        StateError::check(state.ids == ours.ids, DEVICE, "ids", state.ids, "those of the function")?;
        let count = u64::try_from(state.registers.len()).unwrap_or(u64::MAX);
        let same = state.registers.len() == ours.registers.len();
        StateError::check(same, DEVICE, "number of registers", count, "that of the function")?;
        for (&(offset, value), &(expected, _)) in state.registers.iter().zip(&ours.registers) {
            StateError::check(offset == expected, DEVICE, "offset", offset, "the function's, ascending")?;
            let register = self.register_at(offset).unwrap_or_default();
            let valid = (value ^ register.reset) & !register.changeable() == 0;
            StateError::check(valid, DEVICE, "register", value, "what the guest can write there")?;
        }
        for &(offset, value) in &state.registers {
            if let Some(register) = self.register_mut(offset) {
                register.value = value;
            }
        }
        self.gate_interrupt();
        Ok(())
    }
}

#[cfg(test)]
mod tests;
