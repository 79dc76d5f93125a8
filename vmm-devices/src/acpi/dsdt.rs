//! The DSDT: the sleep state S5 and the devices, in AML.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package,
    ResourceTemplate, Scope,
};
use acpi_tables::{Aml, AmlSink};

use crate::acpi::device::{AcpiDevice, InterruptTrigger, Resource};
use crate::acpi::generation::Generation;
use crate::acpi::pci::{AcpiPci, ecam_resource};
use crate::platform::acpi_pm::SLEEP_TYPE_S5;

/// All devices must have passed [`AcpiDevice::check`], and the bridge [`AcpiPci::check`].
pub(super) fn body(
    devices: &[AcpiDevice],
    power_management: Option<u16>,
    pci: Option<&AcpiPci>,
    generation: Option<Generation>,
) -> Vec<u8> {
    let mut aml = Vec::new();
    if power_management.is_some() {
        // Sleep types for PM1a and PM1b; the rest is reserved (ACPI 6.5, 7.4.2).
        let s5 = Package::new(vec![&SLEEP_TYPE_S5, &SLEEP_TYPE_S5, &0_u8, &0_u8]);
        Name::new("_S5_".into(), &s5).to_aml_bytes(&mut aml);
    }
    let mut all: Vec<AcpiDevice> = devices.to_vec();
    if let Some(base) = power_management {
        // Motherboard resources, so that nothing else is put there.
        all.push(AcpiDevice::new(PM_NAME, "PNP0C02", 0).resource(Resource::Io { base, size: PM_SIZE }));
    }
    all.extend(pci.map(ecam_resource));
    let all: Vec<Encoded<&AcpiDevice>> = all.iter().map(Encoded).collect();
    let bridge = pci.map(Encoded);
    let mut children = as_aml(&all);
    children.extend(bridge.as_ref().map(|bridge| bridge as &dyn Aml));
    let generation = generation.map(Encoded);
    children.extend(generation.as_ref().map(|generation| generation as &dyn Aml));
    Scope::new("_SB_".into(), children).to_aml_bytes(&mut aml);
    aml
}

/// The name of the device that stands for the power management ports.
pub(super) const PM_NAME: &str = "PMR0";
/// How many ports that are.
const PM_SIZE: u8 = 16;

/// AML of what was checked. Not the device itself, so that nobody encodes one that was not.
pub(super) struct Encoded<T>(pub(super) T);

pub(super) fn as_aml<T: Aml>(all: &[T]) -> Vec<&dyn Aml> {
    all.iter().map(|one| one as &dyn Aml).collect()
}

impl Aml for Encoded<&AcpiDevice> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let device = self.0;
        let eisa;
        // Three letters make a number, four stay a string (ACPI 6.5, 6.1.5).
        let hid: &dyn Aml = if device.hid.len() == 7 {
            eisa = EISAName::new(&device.hid);
            &eisa
        } else {
            &device.hid
        };
        let hid = Name::new("_HID".into(), hid);
        let uid = Name::new("_UID".into(), &device.uid);
        let coherent = Name::new("_CCA".into(), &1_u8);
        let resources: Vec<Encoded<Resource>> = device.resources.iter().copied().map(Encoded).collect();
        let resources = Name::new("_CRS".into(), &ResourceTemplate::new(as_aml(&resources)));

        let mut children: Vec<&dyn Aml> = vec![&hid, &uid];
        if device.coherent {
            children.push(&coherent);
        }
        children.push(&resources);
        Device::new(device.name.as_str().into(), children).to_aml_bytes(sink);
    }
}

impl Aml for Encoded<Resource> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        match self.0 {
            Resource::Io { base, size } => IO::new(base, base, 1, size).to_aml_bytes(sink),
            Resource::Memory { base, size } => match (u32::try_from(base), u32::try_from(size)) {
                (Ok(base), Ok(size)) => Memory32Fixed::new(true, base, size).to_aml_bytes(sink),
                _ => {
                    // Not empty and not beyond the end: it was checked.
                    let last = base.wrapping_add(size.wrapping_sub(1));
                    AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, base, last, None)
                        .to_aml_bytes(sink);
                }
            },
            Resource::Interrupt { gsi, trigger } => {
                Interrupt::new(true, trigger == InterruptTrigger::Edge, false, false, gsi).to_aml_bytes(sink);
            }
        }
    }
}
