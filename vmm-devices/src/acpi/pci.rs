//! A PCI host bridge as a kernel finds it (PCI Firmware 3.3, 4; ACPI 6.5, 6.2.11 and 6.2.13).

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, CreateDWordField, Device, EISAName, Else, Equal, IO, If,
    Local, Method, Name, NotEqual, Or, Package, Path, ResourceTemplate, Return, Store, Uuid,
};
use acpi_tables::{Aml, AmlSink};

use crate::acpi::AcpiError;
use crate::acpi::device::{AcpiDevice, Resource};
use crate::acpi::dsdt::{Encoded, as_aml};
use crate::bus::BusRange;
use crate::pci::{CONFIG_PORTS, ECAM_SIZE, PciLayout, line_of};

/// The device that is the bridge.
pub(super) const ROOT_NAME: &str = "PCI0";
/// The device that stands for its configuration space.
pub(super) const ECAM_NAME: &str = "PCIM";

/// A [`HostBridge`](crate::pci::HostBridge) for the tables: bus 0 of segment 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AcpiPci {
    pub(super) layout: PciLayout,
    pub(super) interrupts: [u32; 4],
}

impl AcpiPci {
    /// A bridge with its addresses, and the inputs of the I/O APIC that its four lines lead to. Level-triggered, and
    /// not the numbers of ISA devices: 16 and up are free.
    pub fn new(layout: PciLayout, interrupts: [u32; 4]) -> Self {
        Self { layout, interrupts }
    }

    /// What the encoders, which do not check, need to hold.
    pub(super) fn check(&self) -> Result<(), AcpiError> {
        self.layout.check().map_err(|source| AcpiError::Pci { source })
    }
}

/// Motherboard resources: Linux uses no ECAM window that is not reserved by one.
pub(super) fn ecam_resource(pci: &AcpiPci) -> AcpiDevice {
    AcpiDevice::new(ECAM_NAME, "PNP0C02", 1)
        .resource(Resource::Memory { base: pci.layout.ecam.0, size: ECAM_SIZE })
}

/// What `_OSC` is called with, when it is about PCI (PCI Firmware 3.3, 4.5.1).
const OSC_PCI: &str = "33db4d5b-1ff7-401c-9657-7441c03dd766";
/// Control of the PCI Express capability. Hot-plug, power management events and errors are nobody's to control.
const GRANTED: u8 = 1 << 4;
/// Arg1 of a supported revision.
const OSC_REVISION: u8 = 1;

// First word of the answer.
const OSC_UNKNOWN_UUID: u8 = 1 << 2;
const OSC_UNKNOWN_REVISION: u8 = 1 << 3;
const OSC_MASKED: u8 = 1 << 4;

impl Aml for Encoded<&AcpiPci> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let (hid, cid) = (EISAName::new("PNP0A08"), EISAName::new("PNP0A03"));
        let hid = Name::new("_HID".into(), &hid);
        let cid = Name::new("_CID".into(), &cid);
        let zero = |name: &str| Name::new(name.into(), &0_u8);
        let (uid, segment, bus) = (zero("_UID"), zero("_SEG"), zero("_BBN"));
        let coherent = Name::new("_CCA".into(), &1_u8);
        let resources = Windows(&self.0.layout);
        let resources = Name::new("_CRS".into(), &resources);
        let routes = Routes(self.0.interrupts);
        let routes = Name::new("_PRT".into(), &routes);
        let children: Vec<&dyn Aml> =
            vec![&hid, &cid, &uid, &segment, &bus, &coherent, &resources, &routes, &Osc];
        Device::new(ROOT_NAME.into(), children).to_aml_bytes(sink);
    }
}

/// The addresses that lead to the bus. Not as prefetchable: Linux would put nothing else there.
struct Windows<'a>(&'a PciLayout);

impl Aml for Windows<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let last = |range: BusRange| range.base.wrapping_add(range.size.wrapping_sub(1));
        let buses = AddressSpace::new_bus_number(0_u16, 0);
        // The bridge's own, other than the rest.
        let ports = [CONFIG_PORTS].map(|range| u16::try_from(range.base).unwrap_or(u16::MAX));
        let ports = ports.map(|base| IO::new(base, base, 1, 8));
        // It was checked that each number fits.
        let io = self.0.io.and_then(|range| {
            let (base, last) = (u16::try_from(range.base).ok()?, u16::try_from(last(range)).ok()?);
            Some(AddressSpace::new_io(base, last, None))
        });
        let memory32 = [self.0.memory32].map(|range| {
            let fit = |address: u64| u32::try_from(address).unwrap_or(u32::MAX);
            let (base, last) = (fit(range.base), fit(last(range)));
            AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, base, last, None)
        });
        let memory64 = self.0.memory64.map(|range| {
            let kind = AddressSpaceCacheable::NotCacheable;
            AddressSpace::new_memory(kind, true, range.base, last(range), None)
        });
        let mut all: Vec<&dyn Aml> = vec![&buses];
        all.extend(as_aml(&ports));
        all.extend(io.as_ref().map(|io| io as &dyn Aml));
        all.extend(as_aml(&memory32));
        all.extend(memory64.as_ref().map(|memory| memory as &dyn Aml));
        ResourceTemplate::new(all).to_aml_bytes(sink);
    }
}

/// Which input each pin of each device leads to.
struct Routes([u32; 4]);

/// Device number and pin, as the table has them.
const DEVICES: u32 = 32;
const PINS: [u8; 4] = [0, 1, 2, 3];

impl Aml for Routes {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let routes: Vec<Route> = (0..DEVICES)
            .flat_map(|device| PINS.map(|pin| (device, pin)))
            .filter_map(|(device, pin)| {
                let line = line_of(u8::try_from(device).ok()?, pin);
                let gsi = *self.0.get(usize::from(line))?;
                Some(Route { device, pin, gsi })
            })
            .collect();
        Package::new(as_aml(&routes)).to_aml_bytes(sink);
    }
}

struct Route {
    device: u32,
    pin: u8,
    gsi: u32,
}

impl Aml for Route {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        // All functions of the device; a global number instead of a link device.
        let address = self.device << 16 | 0xffff;
        Package::new(vec![&address, &self.pin, &0_u8, &self.gsi]).to_aml_bytes(sink);
    }
}

/// The guest asks what it may control by itself (PCI Firmware 3.3, 4.5.1): `_OSC(UUID, revision, count, words)`.
struct Osc;

impl Aml for Osc {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let [status, wanted]: [Path; 2] = ["CDW1".into(), "CDW3".into()];
        let (words, granted) = (Arg(3), Local(0));
        let set = |bit| Or::new(&status, &status, bit);

        let status_word = CreateDWordField::new(&status, &words, &0_u8);
        let wanted_word = CreateDWordField::new(&wanted, &words, &8_u8);
        let grant = And::new(&granted, &wanted, &GRANTED);
        let (other_revision, set_revision) =
            (NotEqual::new(&Arg(1), &OSC_REVISION), set(&OSC_UNKNOWN_REVISION));
        let check_revision = If::new(&other_revision, vec![&set_revision]);
        let (less, set_masked) = (NotEqual::new(&wanted, &granted), set(&OSC_MASKED));
        let check_masked = If::new(&less, vec![&set_masked]);
        let answer = Store::new(&wanted, &granted);

        let uuid = Uuid::new(OSC_PCI);
        let is_pci = Equal::new(&Arg(0), &uuid);
        let about_pci = If::new(&is_pci, vec![&wanted_word, &grant, &check_revision, &check_masked, &answer]);
        let set_uuid = set(&OSC_UNKNOWN_UUID);
        let about_other = Else::new(vec![&set_uuid]);
        let done = Return::new(&words);
        // Serialized, because it makes names.
        Method::new("_OSC".into(), 4, true, vec![&status_word, &about_pci, &about_other, &done])
            .to_aml_bytes(sink);
    }
}
