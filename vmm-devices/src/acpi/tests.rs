use std::process::Command;

use vmm_memory::vm_memory::{Bytes, GuestAddress};
use vmm_memory::{GuestRam, RegionConfig};

use super::*;
use crate::bus::BusRange;
use crate::pci::PciLayout;
use crate::platform::ports;

fn machine() -> AcpiBuilder {
    AcpiBuilder::new([0, 2, 300])
        .device(AcpiDevice::serial("COM1", 0, ports::COM1, ports::COM1_IRQ))
        .device(AcpiDevice::rtc())
        .device(AcpiDevice::virtio_mmio(0, 0xd000_0000, 0x200, 5))
        .device(AcpiDevice::virtio_mmio(0xabc, 0x12_0000_0000, 0x1000, 30))
}

fn machine_with_pci() -> AcpiBuilder {
    let layout = PciLayout::default().memory64(Some(BusRange::new(0x40_0000_0000, 0x20_0000_0000)));
    machine().pci(AcpiPci::new(layout, [16, 17, 18, 19]))
}

/// The tables of an image, found as a kernel finds them, by signature.
struct Parsed(Vec<(String, Vec<u8>)>);

impl Parsed {
    fn new(tables: &AcpiTables) -> Self {
        let (base, bytes) = (tables.rsdp().0, tables.bytes());
        let number = |at: usize, size: usize| {
            let mut data = [0; 8];
            data[..size].copy_from_slice(&bytes[at..at + size]);
            u64::from_le_bytes(data)
        };
        assert_eq!(&bytes[..8], b"RSD PTR ");
        assert_eq!((sum(&bytes[..20]), sum(&bytes[..36]), bytes[15]), (0, 0, 2));
        let table = |address: u64| {
            let at = usize::try_from(address - base).unwrap();
            let length = usize::try_from(number(at + 4, 4)).unwrap();
            (String::from_utf8(bytes[at..at + 4].to_vec()).unwrap(), bytes[at..at + length].to_vec(), at)
        };
        let (signature, xsdt, at) = table(number(24, 8));
        assert_eq!((signature.as_str(), sum(&xsdt)), ("XSDT", 0));
        let mut found = Vec::new();
        for entry in (36..xsdt.len()).step_by(8) {
            let (signature, data, at) = table(number(at + entry, 8));
            if signature == "FACP" {
                let (dsdt, facs) = (table(number(at + 140, 8)), table(number(at + 36, 4)));
                assert_eq!(number(at + 40, 4), number(at + 140, 8), "both pointers to the DSDT");
                assert_eq!((facs.0.as_str(), facs.1.len(), facs.2 % 64), ("FACS", 64, 0));
                found.push((dsdt.0, dsdt.1));
            }
            found.push((signature, data));
        }
        for (signature, data) in &found {
            assert_eq!(sum(data), 0, "checksum of {signature}");
        }
        Self(found)
    }

    fn get(&self, signature: &str) -> &[u8] {
        &self.0.iter().find(|(other, _)| other == signature).unwrap().1
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
}

#[test]
fn pointers_lengths_and_checksums_hold() {
    for area in [BIOS_AREA, 0x7fe_0000..0x800_0000] {
        let parsed = Parsed::new(&machine().build(area).unwrap());
        assert_eq!(
            parsed.0.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(),
            ["DSDT", "FACP", "APIC"]
        );
    }
}

#[test]
fn the_fadt_says_what_the_power_management_device_does() {
    let tables = machine().power_management(0x800, 10).build(BIOS_AREA).unwrap();
    let parsed = Parsed::new(&tables);
    let fadt = parsed.get("FACP");
    assert_eq!(fadt.len(), 276);
    let u32_at = |at: usize| u32::from_le_bytes(fadt[at..at + 4].try_into().unwrap());
    assert_eq!(fadt[46..48], [10, 0]);
    assert_eq!((u32_at(56), u32_at(64), u32_at(76)), (0x800, 0x804, 0x808));
    assert_eq!(fadt[88..92], [4, 2, 0, 4]);
    assert_eq!(fadt[108], 0x32, "century");
    assert_eq!(fadt[109..111], [5, 0], "legacy devices, no VGA, no i8042, an RTC");
    // WBINVD, C1, no sleep button, no wake by the RTC, 32-bit timer, reset register, headless.
    assert_eq!(u32_at(112), 1 | 1 << 2 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 10 | 1 << 12);
    assert_eq!(fadt[116..129], [1, 8, 0, 1, 0x0c, 8, 0, 0, 0, 0, 0, 0, 1], "reset register and value");
    assert_eq!(fadt[208..220], [1, 32, 0, 3, 8, 8, 0, 0, 0, 0, 0, 0], "PM timer");
}

#[test]
fn the_defaults_are_the_usual_places() {
    let parsed = Parsed::new(&AcpiBuilder::new([0]).build(BIOS_AREA).unwrap());
    let (fadt, madt) = (parsed.get("FACP"), parsed.get("APIC"));
    assert_eq!(u64::from(u32::from_le_bytes(fadt[56..60].try_into().unwrap())), ports::ACPI_PM.base);
    assert_eq!(u32::from(u16::from_le_bytes(fadt[46..48].try_into().unwrap())), ports::ACPI_SCI);
    assert_eq!(fadt[109] & 1 << 5, 1 << 5, "no RTC was described");
    assert_eq!(u64::from(u32::from_le_bytes(madt[56..60].try_into().unwrap())), ports::IO_APIC.base);
}

#[test]
fn the_madt_lists_processors_and_overrides() {
    let parsed = Parsed::new(&machine().io_apic(3, 0xfec1_0000).build(BIOS_AREA).unwrap());
    let madt = parsed.get("APIC");
    assert_eq!(madt[36..44], [0, 0, 0xe0, 0xfe, 1, 0, 0, 0]);
    let mut entries = Vec::new();
    let mut rest = &madt[44..];
    while !rest.is_empty() {
        let (entry, after) = rest.split_at(rest[1].into());
        entries.push(entry);
        rest = after;
    }
    let expected: [&[u8]; 8] = [
        &[0, 8, 0, 0, 1, 0, 0, 0],
        &[0, 8, 1, 2, 1, 0, 0, 0],
        &[9, 16, 0, 0, 0x2c, 1, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0],
        &[1, 12, 3, 0, 0, 0, 0xc1, 0xfe, 0, 0, 0, 0],
        &[2, 10, 0, 0, 2, 0, 0, 0, 0, 0],
        &[2, 10, 0, 9, 9, 0, 0, 0, 0x0d, 0],
        &[4, 6, 0xff, 0, 0, 1],
        &[10, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0],
    ];
    assert_eq!(entries, expected);

    let parsed =
        Parsed::new(&machine().legacy_pic(false).power_management(0x600, 11).build(BIOS_AREA).unwrap());
    let madt = parsed.get("APIC");
    assert_eq!(madt[40], 0);
    assert!(madt.windows(10).any(|entry| entry == [2, 10, 0, 11, 11, 0, 0, 0, 0x0d, 0]));
    assert!(!madt.windows(4).any(|entry| entry == [2, 10, 0, 9]), "9 is an ordinary interrupt again");
}

#[test]
fn a_machine_without_fixed_hardware_says_so() {
    let fadt =
        Parsed::new(&machine().without_power_management().build(BIOS_AREA).unwrap()).get("FACP").to_vec();
    assert_ne!(fadt[114] & 1 << 4, 0);
    assert_eq!(fadt[56..60], [0; 4]);
}

#[test]
fn the_dsdt_disassembles() {
    if let Err(error) = Command::new("iasl").arg("-v").output() {
        println!("skipped: no iasl ({error})");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let machine = machine_with_pci().vm_generation(GuestAddress(0x1_000e_fff0), 23);
    let parsed = Parsed::new(&machine.build(BIOS_AREA).unwrap());
    for (signature, data) in &parsed.0 {
        std::fs::write(directory.path().join(format!("{signature}.aml")), data).unwrap();
    }
    let iasl = |arguments: &[&str]| {
        let output = Command::new("iasl").args(arguments).current_dir(directory.path()).output().unwrap();
        let text =
            [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        assert!(output.status.success(), "{text}");
        text
    };
    for signature in ["FACP", "APIC", "MCFG", "DSDT"] {
        let text = iasl(&["-d", &format!("{signature}.aml")]);
        assert!(!text.contains("rror") && !text.contains("arning"), "{text}");
    }
    let source = std::fs::read_to_string(directory.path().join("DSDT.dsl")).unwrap();
    for expected in [
        "Name (_S5, Package",
        "Device (COM1)",
        "EisaId (\"PNP0501\")",
        "\"LNRO0005\"",
        "Device (VABC)",
        "0x0000001200000FFF",
        "Interrupt (ResourceConsumer, Level, ActiveHigh, Exclusive",
        "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive",
        "Device (PCI0)",
        "EisaId (\"PNP0A08\")",
        "EisaId (\"PNP0A03\")",
        "0x0CF8,             // Range Minimum",
        "0xE8000000,         // Range Minimum",
        "0xFDFFFFFF,         // Range Maximum",
        "0x0000004000000000, // Range Minimum",
        "Method (_OSC, 4, Serialized)",
        "ToUUID (\"33db4d5b-1ff7-401c-9657-7441c03dd766\") /* PCI Host Bridge Device */",
        "Local0 = (CDW3 & 0x10)",
        "Name (_CID, \"VM_Gen_Counter\")",
        "Method (_EVT, 1, Serialized)",
        "Notify (VGEN, 0x80)",
    ] {
        assert!(source.contains(expected), "{expected} is not in\n{source}");
    }
    // And what it means compiles.
    assert!(iasl(&["-tc", "DSDT.dsl"]).contains(" 0 Errors"));
}

#[test]
fn the_generation_is_where_it_lies_and_its_event_names_it() {
    let machine = machine().vm_generation(GuestAddress(0x1_000e_fff0), 23);
    let parsed = Parsed::new(&machine.build(BIOS_AREA).unwrap());
    let dsdt = parsed.get("DSDT");
    let has = |bytes: &[u8]| dsdt.windows(bytes.len()).any(|window| window == bytes);
    assert!(has(b"\x08_HID\x0dVMGENCTR\0") && has(b"\x08_CID\x0dVM_Gen_Counter\0"));
    assert!(has(b"\x08_DDN\x0dVM_Gen_Counter\0"));
    // A package of two numbers: 0xeff0 with its upper half, and 1.
    assert!(has(b"\x08ADDR\x12\x08\x02\x0c\xf0\xff\x0e\0\x01"), "{dsdt:x?}");
    // Edge-triggered, active high, exclusive: input 23.
    assert!(has(b"\x08_HID\x0dACPI0013\0") && has(&[0x89, 6, 0, 3, 1, 23, 0, 0, 0]));
    // If (Arg0 == 23) { Notify (\_SB.VGEN, 0x80) }
    assert!(has(b"_EVT\x09\xa0\x12\x93\x68\x0a\x17\x86\x5c\x2e_SB_VGEN\x0a\x80"), "{dsdt:x?}");
    for gpa in [4, u64::MAX - 7] {
        let error = AcpiBuilder::new([0]).vm_generation(GuestAddress(gpa), 23).build(BIOS_AREA).unwrap_err();
        assert!(matches!(error, AcpiError::Resource { .. }), "{error}");
    }
    let taken = AcpiBuilder::new([0]).device(AcpiDevice::new("VGEN", "PNP0C02", 0));
    let error = taken.vm_generation(GuestAddress(8), 23).build(BIOS_AREA).unwrap_err();
    assert!(matches!(error, AcpiError::SameName { .. }), "{error}");
}

/// The routes of the tables are the wires of the bridge: Linux believes the former.
#[test]
fn pins_are_routed_as_the_bridge_wires_them() {
    let parsed = Parsed::new(&machine_with_pci().build(BIOS_AREA).unwrap());
    let dsdt = parsed.get("DSDT");
    let at = dsdt.windows(4).position(|name| name == b"_PRT").unwrap() + 4;
    // A package with a length of two bytes, then its number of elements.
    assert_eq!((dsdt[at], dsdt[at + 1] >> 6, dsdt[at + 3]), (0x12, 1, 128));
    let mut rest = &dsdt[at + 4..];
    for device in 0..32_u8 {
        for pin in 0..4_u8 {
            let (entry, after) = rest.split_at(1 + usize::from(rest[1]));
            rest = after;
            let mut expected = vec![0x12, entry[1], 4];
            match device {
                0 => expected.extend([0x0b, 0xff, 0xff]),
                _ => expected.extend([0x0c, 0xff, 0xff, device, 0]),
            }
            match pin {
                0 | 1 => expected.push(pin),
                _ => expected.extend([0x0a, pin]),
            }
            expected.extend([0, 0x0a, 16 + (device + pin) % 4]);
            assert_eq!(entry, expected, "device {device}, pin {pin}");
        }
    }
}

#[test]
fn configuration_space_is_in_the_mcfg_and_reserved() {
    let layout = PciLayout::default().ecam(GuestAddress(0xd000_0000));
    let builder = AcpiBuilder::new([0]).pci(AcpiPci::new(layout, [5, 6, 10, 11]));
    let parsed = Parsed::new(&builder.build(BIOS_AREA).unwrap());
    let entry = [0, 0, 0, 0xd0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(parsed.get("MCFG")[44..], entry, "bus 0 of segment 0");
    // Memory32Fixed, read and write.
    let reserved = [0x86, 9, 0, 1, 0, 0, 0, 0xd0, 0, 0, 0x10, 0];
    assert!(parsed.get("DSDT").windows(reserved.len()).any(|bytes| bytes == reserved));
}

#[test]
fn they_are_written_where_they_are_for() {
    let ram = GuestRam::builder().ram(2 << 20).build().unwrap();
    let tables = machine().build(BIOS_AREA).unwrap();
    tables.write_to(&ram).unwrap();
    let mut written = vec![0; tables.bytes().len()];
    ram.memory().read_slice(&mut written, tables.rsdp()).unwrap();
    assert_eq!(written, tables.bytes());
    assert_eq!(tables.range(), BusRange::new(0xe_0000, tables.bytes().len() as u64));

    let small = GuestRam::builder().region(RegionConfig::new(GuestAddress(0), 0xe_1000)).build().unwrap();
    let elsewhere = machine().build(0xf_0000..0x10_0000).unwrap();
    assert!(matches!(elsewhere.write_to(&small), Err(AcpiError::Memory { gpa: 0xf_0000, .. })));
}

#[test]
fn what_cannot_be_is_refused() {
    let build = |builder: AcpiBuilder| builder.build(BIOS_AREA).unwrap_err().to_string();
    let device = |name: &str, hid: &str| machine().device(AcpiDevice::new(name, hid, 0));
    for (error, expected) in [
        (build(AcpiBuilder::new([])), "0 processors"),
        (build(AcpiBuilder::new(0..=8192)), "8193 processors"),
        (build(AcpiBuilder::new(0..)), "8193 processors"),
        (build(AcpiBuilder::new([1, 1])), "APIC ID 0x1 is used twice"),
        (build(AcpiBuilder::new([u32::MAX])), "0xffffffff"),
        (build(device("COM1", "PNP0501")), "\"COM1\" is used twice"),
        (build(device("PMR0", "PNP0501")), "\"PMR0\" is used twice"),
        (build(device("", "PNP0501")), "device name"),
        (build(device("1ABC", "PNP0501")), "device name"),
        (build(device("ABCé", "PNP0501")), "device name"),
        (build(device("com2", "PNP0501")), "device name"),
        (build(device("COM2", "PNP05")), "hardware ID"),
        (build(device("COM2", "pnp0501")), "hardware ID"),
        (build(device("COM2", "PNP05é1")), "hardware ID"),
        (build(device("COM2", "PNP050G")), "hardware ID"),
        (build(machine().device(AcpiDevice::virtio_mmio(4096, 0, 1, 1))), "device name \"V1000\""),
        (build(machine().device(AcpiDevice::virtio_mmio(1, u64::MAX, 2, 1))), "go beyond"),
        (build(machine().device(AcpiDevice::virtio_mmio(1, 0, 0, 1))), "are none"),
        (
            build(machine().device(AcpiDevice::serial("COM2", 1, BusRange::new(0xffff, 2), 3))),
            "go beyond 0xffff",
        ),
        (build(machine().device(AcpiDevice::serial("COM2", 1, BusRange::new(0, 256), 3))), "are none"),
        (build(machine().power_management(0xfff1, 9)), "go beyond"),
        (build(machine_with_pci().device(AcpiDevice::new("PCI0", "PNP0501", 0))), "\"PCI0\" is used twice"),
        (build(machine_with_pci().device(AcpiDevice::new("PCIM", "PNP0501", 0))), "\"PCIM\" is used twice"),
        (
            build(machine().pci(AcpiPci::new(PciLayout::default().ecam(GuestAddress(1)), [0; 4]))),
            "PCI host bridge",
        ),
        (build(machine().power_management(0x600, 16)), "ISA interrupt 16"),
    ] {
        assert!(error.contains(expected), "{error:?} does not have {expected:?}");
    }
    let backwards = std::ops::Range { start: 0x1000, end: 0x40 };
    for area in [1..0x1000, backwards, 0..(1 << 32) + 1, u64::MAX - 63..u64::MAX] {
        assert!(matches!(machine().build(area), Err(AcpiError::Area { .. })));
    }
    let needed = machine().build(BIOS_AREA).unwrap().bytes().len() as u64;
    assert!(machine().build(0..needed).is_ok());
    assert!(matches!(machine().build(0..needed - 1), Err(AcpiError::Room { .. })));
    let many =
        (0..4096).fold(machine(), |builder, uid| builder.device(AcpiDevice::virtio_mmio(uid, 0, 1, 1)));
    assert!(matches!(many.build(0..0x1000), Err(AcpiError::Room { .. })));
}
