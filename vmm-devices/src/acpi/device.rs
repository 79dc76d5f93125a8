//! Devices that a guest cannot find by itself, as the DSDT lists them.

use crate::acpi::AcpiError;
use crate::bus::BusRange;

/// How an interrupt is signalled. All are active high.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InterruptTrigger {
    /// By a rising edge, as on the ISA bus.
    Edge,
    /// By a level that lasts until the device is served.
    Level,
}

/// What a device occupies (ACPI 6.5, 6.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Resource {
    /// Ports.
    Io {
        /// First port.
        base: u16,
        /// How many, 1 to 255.
        size: u8,
    },
    /// Guest-physical addresses.
    Memory {
        /// First address.
        base: u64,
        /// How many bytes, at least 1.
        size: u64,
    },
    /// An interrupt of the device's own.
    Interrupt {
        /// Its global number: the input of the I/O APIC.
        gsi: u32,
        /// How it is signalled.
        trigger: InterruptTrigger,
    },
}

/// One device of the DSDT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiDevice {
    pub(super) name: String,
    pub(super) hid: String,
    pub(super) uid: u32,
    pub(super) coherent: bool,
    pub(super) resources: Vec<Resource>,
}

impl AcpiDevice {
    /// A device `name` (four characters) with hardware ID `hid` (such as `PNP0501`), the one with
    /// number `uid` of its kind. [`AcpiBuilder::build`](super::AcpiBuilder::build) checks both.
    pub fn new(name: impl Into<String>, hid: impl Into<String>, uid: u32) -> Self {
        Self { name: name.into(), hid: hid.into(), uid, coherent: false, resources: Vec::new() }
    }

    /// One more resource.
    pub fn resource(mut self, resource: Resource) -> Self {
        self.resources.push(resource);
        self
    }

    /// The device sees memory as the processors do: `_CCA`, needed by those that access memory themselves.
    pub fn coherent(mut self) -> Self {
        self.coherent = true;
        self
    }

    /// A 16550 serial port at ports `range`, on ISA interrupt `irq`.
    pub fn serial(name: impl Into<String>, uid: u32, range: BusRange, irq: u32) -> Self {
        Self::new(name, "PNP0501", uid)
            .resource(io(range))
            .resource(Resource::Interrupt { gsi: irq, trigger: InterruptTrigger::Edge })
    }

    /// The real-time clock at its usual place.
    pub fn rtc() -> Self {
        use crate::platform::ports;
        Self::new("RTC0", "PNP0B00", 0)
            .resource(io(ports::RTC))
            .resource(Resource::Interrupt { gsi: ports::RTC_IRQ, trigger: InterruptTrigger::Edge })
    }

    /// Virtio device number `uid` (0 to 4095) over MMIO, which Linux knows as `LNRO0005`: `size` bytes of registers
    /// at `base` (Virtio 1.3, 4.2.2) and the level-triggered interrupt `gsi`.
    pub fn virtio_mmio(uid: u32, base: u64, size: u64, gsi: u32) -> Self {
        // From 4096 on the name is too long, which `build` says.
        Self::new(format!("V{uid:03X}"), "LNRO0005", uid)
            .coherent()
            .resource(Resource::Memory { base, size })
            .resource(Resource::Interrupt { gsi, trigger: InterruptTrigger::Level })
    }

    /// What the encoder, which does not check, needs to hold.
    pub(super) fn check(&self) -> Result<(), AcpiError> {
        let mut characters = self.name.bytes();
        let starts = characters.next().is_some_and(|first| first.is_ascii_uppercase() || first == b'_');
        let rest = |c: u8| c.is_ascii_uppercase() || c.is_ascii_digit() || c == b'_';
        if self.name.len() != 4 || !starts || !characters.all(rest) {
            return Err(AcpiError::Name { name: self.name.clone() });
        }
        let (letters, digits) =
            self.hid.split_at_checked(self.hid.len().saturating_sub(4)).unwrap_or_default();
        let has_letters = matches!(letters.len(), 3 | 4) && letters.bytes().all(|c| c.is_ascii_uppercase());
        let has_digits = digits.bytes().all(|c| c.is_ascii_digit() || (b'A'..=b'F').contains(&c));
        if !has_letters || !has_digits {
            return Err(AcpiError::HardwareId { name: self.name.clone(), hid: self.hid.clone() });
        }
        self.resources.iter().try_for_each(|resource| self.check_resource(*resource))
    }

    fn check_resource(&self, resource: Resource) -> Result<(), AcpiError> {
        let (base, size, last) = match resource {
            Resource::Io { base, size } => (u64::from(base), u64::from(size), 0xffff),
            Resource::Memory { base, size } => (base, size, u64::MAX),
            Resource::Interrupt { .. } => return Ok(()),
        };
        match size.checked_sub(1).and_then(|following| base.checked_add(following)) {
            Some(end) if end <= last => Ok(()),
            _ => Err(AcpiError::Resource { name: self.name.clone(), base, size, last }),
        }
    }
}

/// A range of the port bus as a resource. One that is too large for ports becomes an empty one, which
/// [`AcpiDevice::check`] refuses.
fn io(range: BusRange) -> Resource {
    match (u16::try_from(range.base), u8::try_from(range.size)) {
        (Ok(base), Ok(size)) => Resource::Io { base, size },
        _ => Resource::Io { base: 0, size: 0 },
    }
}
