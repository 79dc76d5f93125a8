//! The generation of the machine as a kernel finds it: where the number lies, and the event by which it hears of a new one ("Virtual Machine
//! Generation ID", Microsoft 2012; ACPI 6.5, 5.6.9).

use acpi_tables::aml::{
    Arg, Device, Equal, If, Interrupt, Method, Name, Notify, Package, Path, ResourceTemplate,
};
use acpi_tables::{Aml, AmlSink};

use crate::acpi::dsdt::Encoded;

/// The device that has the number.
pub(super) const GENERATION_NAME: &str = "VGEN";
/// The device that has the event.
pub(super) const EVENT_NAME: &str = "GED0";

/// What the device is called by those who look for it.
const COUNTER: &str = "VM_Gen_Counter";
/// The number is another one.
const CHANGED: u8 = 0x80;

/// Where a [`VmGeneration`](crate::platform::VmGeneration) is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Generation {
    pub(super) gpa: u64,
    pub(super) gsi: u32,
}

impl Aml for Encoded<Generation> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let Generation { gpa, gsi } = self.0;
        let [low, high] = crate::bus::halves(gpa);
        let (hid, cid) = ("VMGENCTR".to_owned(), COUNTER.to_owned());
        let hid = Name::new("_HID".into(), &hid);
        let cid_object = Name::new("_CID".into(), &cid);
        let ddn = Name::new("_DDN".into(), &cid);
        let address = Package::new(vec![&low, &high]);
        let address = Name::new("ADDR".into(), &address);
        Device::new(GENERATION_NAME.into(), vec![&hid, &cid_object, &ddn, &address]).to_aml_bytes(sink);

        let event = "ACPI0013".to_owned();
        let hid = Name::new("_HID".into(), &event);
        let uid = Name::new("_UID".into(), &0_u8);
        let interrupt = Interrupt::new(true, true, false, false, gsi);
        let resources = ResourceTemplate::new(vec![&interrupt]);
        let resources = Name::new("_CRS".into(), &resources);
        // The argument is the interrupt that came.
        let is_it = Equal::new(&Arg(0), &gsi);
        let path = Path::new(&format!("\\_SB_.{GENERATION_NAME}"));
        let notify = Notify::new(&path, &CHANGED);
        let tell = If::new(&is_it, vec![&notify]);
        let method = Method::new("_EVT".into(), 1, true, vec![&tell]);
        Device::new(EVENT_NAME.into(), vec![&hid, &uid, &resources, &method]).to_aml_bytes(sink);
    }
}
