//! From the description of a machine to bytes at an address.

use std::collections::BTreeSet;
use std::ops::Range;

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADT, FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vmm_memory::GuestRam;
use vmm_memory::vm_memory::{Bytes, GuestAddress};

use crate::acpi::device::AcpiDevice;
use crate::acpi::dsdt::PM_NAME;
use crate::acpi::generation::{EVENT_NAME, GENERATION_NAME, Generation};
use crate::acpi::madt::{Controllers, Override};
use crate::acpi::pci::{AcpiPci, ECAM_NAME, ROOT_NAME};
use crate::acpi::{AcpiError, dsdt};
use crate::bus::BusRange;
use crate::platform::{acpi_pm, ports, rtc};

/// Where a kernel that is not told looks for the RSDP (ACPI 6.5, 5.2.5.1).
pub const BIOS_AREA: Range<u64> = 0xe_0000..0x10_0000;

/// More processors than x86 kernels are built for.
const MAX_PROCESSORS: usize = 8192;

const OEM_ID: [u8; 6] = *b"VMMDEV";
const OEM_TABLE_ID: [u8; 8] = *b"VIRTUAL ";
const OEM_REVISION: u32 = 1;

/// Every table begins at a multiple of this: what the FACS needs, which is the most.
const ALIGNMENT: u64 = 64;
/// Bytes that the header of a table takes.
const HEADER: u32 = 36;

// FADT, IA-PC boot architecture flags (ACPI 6.5, table 5.11).
const BOOT_LEGACY_DEVICES: u16 = 1;
const BOOT_I8042: u16 = 1 << 1;
const BOOT_NO_VGA: u16 = 1 << 2;
const BOOT_NO_RTC: u16 = 1 << 5;

/// Describes a machine to its guest: processors, an I/O APIC, and what is added to it.
///
/// As it begins, the machine is that of [`platform`](crate::platform) at its usual ports: local APICs at
/// 0xfee0_0000, I/O APIC, PICs, timer on input 2, power management with the SCI on 9, and no keyboard controller.
#[derive(Clone, Debug)]
pub struct AcpiBuilder {
    apic_ids: Vec<u32>,
    local_apic: u32,
    io_apic_id: u8,
    io_apic: u32,
    pic: bool,
    i8042: bool,
    power_management: Option<(u16, u8)>,
    overrides: Vec<Override>,
    devices: Vec<AcpiDevice>,
    pci: Option<AcpiPci>,
    generation: Option<Generation>,
}

impl AcpiBuilder {
    /// A machine with a processor for each APIC ID. The first one boots.
    pub fn new(apic_ids: impl IntoIterator<Item = u32>) -> Self {
        Self {
            // One more than allowed is enough to see that.
            apic_ids: apic_ids.into_iter().take(MAX_PROCESSORS + 1).collect(),
            local_apic: 0xfee0_0000,
            io_apic_id: 0,
            io_apic: 0xfec0_0000,
            pic: true,
            i8042: false,
            power_management: Some((0x600, 9)),
            overrides: vec![
                Override { irq: 0, gsi: ports::PIT_GSI, level: false },
                Override { irq: 9, gsi: ports::ACPI_SCI, level: true },
            ],
            devices: Vec::new(),
            pci: None,
            generation: None,
        }
    }

    /// ID and guest-physical address of the I/O APIC, whose inputs are interrupts 0 to 23.
    pub fn io_apic(mut self, id: u8, address: u32) -> Self {
        (self.io_apic_id, self.io_apic) = (id, address);
        self
    }

    /// Whether there are PICs and a PIT, too (default: yes).
    pub fn legacy_pic(mut self, present: bool) -> Self {
        self.pic = present;
        self
    }

    /// Whether there is a keyboard controller to be looked for (default: no). It may be there for resets
    /// without being told.
    pub fn i8042(mut self, present: bool) -> Self {
        self.i8042 = present;
        self
    }

    /// Where the registers of [`AcpiPm`](crate::platform::AcpiPm) are, 16 ports from `base` on, and its ISA
    /// interrupt.
    pub fn power_management(mut self, base: u16, sci: u8) -> Self {
        self.overrides.retain(|other| Some(other.irq) != self.power_management.map(|(_, sci)| sci));
        self.power_management = Some((base, sci));
        self.interrupt_override(sci, sci.into(), true)
    }

    /// There is no [`AcpiPm`](crate::platform::AcpiPm): hardware-reduced ACPI, in which Linux uses neither PIC
    /// nor PIT and cannot switch the machine off.
    pub fn without_power_management(mut self) -> Self {
        if let Some((_, sci)) = self.power_management.take() {
            self.overrides.retain(|other| other.irq != sci);
        }
        self
    }

    /// ISA interrupt `irq` is on input `gsi`, level-triggered or not. Replaces what was said of `irq` before.
    pub fn interrupt_override(mut self, irq: u8, gsi: u32, level: bool) -> Self {
        self.overrides.retain(|other| other.irq != irq);
        self.overrides.push(Override { irq, gsi, level });
        self
    }

    /// One more device.
    pub fn device(mut self, device: AcpiDevice) -> Self {
        self.devices.push(device);
        self
    }

    /// There is a PCI host bridge.
    pub fn pci(mut self, bridge: AcpiPci) -> Self {
        self.pci = Some(bridge);
        self
    }

    /// There is a [`VmGeneration`](crate::platform::VmGeneration) at `gpa`, whose line is input `gsi` of the I/O APIC, edge-triggered and its
    /// own.
    pub fn vm_generation(mut self, gpa: GuestAddress, gsi: u32) -> Self {
        self.generation = Some(Generation { gpa: gpa.0, gsi });
        self
    }

    /// Makes the tables, to be at the beginning of `area`, the RSDP first.
    ///
    /// # Errors
    /// [`AcpiError`] says what of the description cannot be, or that `area` is too small.
    pub fn build(&self, area: Range<u64>) -> Result<AcpiTables, AcpiError> {
        self.check(&area)?;
        let mut image = Image { base: area.start, bytes: Vec::new() };
        image.reserve(Rsdp::len());
        let facs = image.append(&FACS::new());
        let dsdt = image.append(&self.dsdt());
        let fadt = image.append(&self.fadt(facs, dsdt));
        let madt = image.append(&self.madt());
        let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        xsdt.add_entry(fadt.into());
        xsdt.add_entry(madt.into());
        if let Some(pci) = &self.pci {
            xsdt.add_entry(image.append(&Self::mcfg(pci)).into());
        }
        let xsdt = image.append(&xsdt);
        let mut rsdp = Vec::new();
        Rsdp::new(OEM_ID, xsdt.into()).to_aml_bytes(&mut rsdp);
        image.bytes.splice(..rsdp.len(), rsdp);

        let needed = u64::try_from(image.bytes.len()).unwrap_or(u64::MAX);
        let room = area.end - area.start;
        if needed > room {
            return Err(AcpiError::Room { needed, room });
        }
        Ok(AcpiTables { gpa: GuestAddress(area.start), bytes: image.bytes })
    }

    fn check(&self, area: &Range<u64>) -> Result<(), AcpiError> {
        let &Range { start, end } = area;
        if !start.is_multiple_of(ALIGNMENT) || start > end || end > 1 << 32 {
            return Err(AcpiError::Area { start, end });
        }
        let count = self.apic_ids.len();
        if !(1..=MAX_PROCESSORS).contains(&count) {
            return Err(AcpiError::Processors { count, max: MAX_PROCESSORS });
        }
        let mut ids = BTreeSet::from([u32::MAX]);
        if let Some(&id) = self.apic_ids.iter().find(|&&id| !ids.insert(id)) {
            return Err(AcpiError::ApicId { id });
        }
        if let Some(&Override { irq, .. }) = self.overrides.iter().find(|other| other.irq > 15) {
            return Err(AcpiError::IsaInterrupt { irq });
        }
        let mut names = BTreeSet::new();
        if let Some((base, _)) = self.power_management {
            names.insert(PM_NAME);
            if base > 0xfff0 {
                let name = PM_NAME.to_owned();
                return Err(AcpiError::Resource { name, base: base.into(), size: 16, last: 0xffff });
            }
        }
        if let Some(pci) = &self.pci {
            pci.check()?;
            names.extend([ROOT_NAME, ECAM_NAME]);
        }
        if let Some(Generation { gpa, .. }) = self.generation {
            names.extend([GENERATION_NAME, EVENT_NAME]);
            let size = crate::platform::VM_GENERATION_SIZE;
            if !gpa.is_multiple_of(8) || gpa.checked_add(size).is_none() {
                let name = GENERATION_NAME.to_owned();
                return Err(AcpiError::Resource { name, base: gpa, size, last: u64::MAX });
            }
        }
        // This many devices make tables larger than any area, before they are made.
        let room = end - start;
        let least = u64::try_from(self.devices.len()).unwrap_or(u64::MAX).saturating_mul(32);
        if least > room {
            return Err(AcpiError::Room { needed: least, room });
        }
        for device in &self.devices {
            device.check()?;
            if !names.insert(device.name.as_str()) {
                return Err(AcpiError::SameName { name: device.name.clone() });
            }
        }
        Ok(())
    }

    fn dsdt(&self) -> Sdt {
        let body = dsdt::body(
            &self.devices,
            self.power_management.map(|(base, _)| base),
            self.pci.as_ref(),
            self.generation,
        );
        // Revision 2: integers have 64 bits.
        let mut table = Sdt::new(*b"DSDT", HEADER, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        table.append_slice(&body);
        table
    }

    fn madt(&self) -> Sdt {
        let mut table = Sdt::new(*b"APIC", HEADER, 5, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        let controllers = Controllers {
            apic_ids: &self.apic_ids,
            local_apic: self.local_apic,
            io_apic_id: self.io_apic_id,
            io_apic: self.io_apic,
            pic: self.pic,
            overrides: &self.overrides,
        };
        controllers.append_to(&mut table);
        table
    }

    /// Where configuration space is in memory (PCI Firmware 3.3, 4.1.2): bus 0 of segment 0.
    fn mcfg(pci: &AcpiPci) -> MCFG {
        let mut table = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        table.add_ecam(pci.layout.ecam.0, 0, 0, 0);
        table
    }

    fn fadt(&self, facs: u32, dsdt: u32) -> FADT {
        let mut table = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
            .firmware_ctrl_32(facs)
            .dsdt_64(dsdt.into())
            .flag(Flags::Wbinvd)
            .flag(Flags::ProcC1)
            // Not that there is a sleep button: that there is none among the fixed events.
            .flag(Flags::SlpButton)
            // The RTC wakes nobody by a fixed event: the machine does not sleep.
            .flag(Flags::FixRtc)
            .flag(Flags::Headless);
        // Also in the old place, for those who look there.
        table.dsdt = dsdt.into();
        let rtc = ports::RTC.base;
        let has_rtc = self.devices.iter().any(|device| device.occupies_port(rtc));
        table.iapc_boot_arch = (BOOT_NO_VGA
            | if self.pic { BOOT_LEGACY_DEVICES } else { 0 }
            | if self.i8042 { BOOT_I8042 } else { 0 }
            | if has_rtc { 0 } else { BOOT_NO_RTC })
        .into();
        table.century = if has_rtc { rtc::CENTURY_REGISTER } else { 0 };
        match self.power_management {
            Some((base, sci)) => add_power_management(table, base, sci),
            // Without fixed hardware, the tables have to say that there is none.
            None => table.flag(Flags::HwReducedAcpi).flag(Flags::PwrButton),
        }
        .finalize()
    }
}

/// The registers of [`AcpiPm`](crate::platform::AcpiPm), in the old and in the extended form.
fn add_power_management(mut table: FADTBuilder, base: u16, sci: u8) -> FADTBuilder {
    let port = |offset: u16| u32::from(base) + u32::from(offset);
    let register = |bits: u8, access: AccessSize, offset: u16| {
        GAS::new(AddressSpace::SystemIo, bits, 0, access, port(offset).into())
    };
    table.sci_int = u16::from(sci).into();
    table.pm1a_evt_blk = port(acpi_pm::EVENT_BLOCK).into();
    table.pm1_evt_len = 4;
    table.x_pm1a_evt_blk = register(32, AccessSize::WordAccess, acpi_pm::EVENT_BLOCK);
    table.pm1a_cnt_blk = port(acpi_pm::CONTROL_BLOCK).into();
    table.pm1_cnt_len = 2;
    table.x_pm1a_cnt_blk = register(16, AccessSize::WordAccess, acpi_pm::CONTROL_BLOCK);
    table.pm_tmr_blk = port(acpi_pm::TIMER_BLOCK).into();
    table.pm_tmr_len = 4;
    table.x_pm_tmr_blk = register(32, AccessSize::DwordAccess, acpi_pm::TIMER_BLOCK);
    table.reset_reg = register(8, AccessSize::ByteAccess, acpi_pm::RESET_REGISTER);
    table.reset_value = acpi_pm::RESET_VALUE;
    // Values above these say that there are no such states (ACPI 6.5, table 5.9).
    table.p_lvl2_lat = 101_u16.into();
    table.p_lvl3_lat = 1001_u16.into();
    table.flag(Flags::ResetRegSup).flag(Flags::TmrValExt)
}

impl AcpiDevice {
    fn occupies_port(&self, port: u64) -> bool {
        use crate::acpi::device::Resource;
        self.resources
            .iter()
            .any(|resource| matches!(*resource, Resource::Io { base, .. } if u64::from(base) == port))
    }
}

/// Tables under construction.
struct Image {
    base: u64,
    bytes: Vec<u8>,
}

impl Image {
    /// Room at the end, so aligned.
    fn reserve(&mut self, length: usize) {
        self.bytes.resize(self.bytes.len() + length, 0);
    }

    /// Appends a table and gives its address.
    fn append(&mut self, table: &dyn Aml) -> u32 {
        let at = self.base.saturating_add(u64::try_from(self.bytes.len()).unwrap_or(u64::MAX));
        let padding = at.next_multiple_of(ALIGNMENT) - at;
        self.reserve(usize::try_from(padding).unwrap_or(0));
        table.to_aml_bytes(&mut self.bytes);
        // An address that does not fit is beyond the area, which `build` then says.
        u32::try_from(at + padding).unwrap_or(u32::MAX)
    }
}

/// The tables, for one place in guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiTables {
    gpa: GuestAddress,
    bytes: Vec<u8>,
}

impl AcpiTables {
    /// Where the RSDP is: what a boot protocol tells the kernel.
    pub fn rsdp(&self) -> GuestAddress {
        self.gpa
    }

    /// The tables as they are to stand from [`rsdp`](Self::rsdp) on.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The guest-physical addresses that they take, which the memory map has as reserved or as ACPI data.
    pub fn range(&self) -> BusRange {
        BusRange::new(self.gpa.0, u64::try_from(self.bytes.len()).unwrap_or(u64::MAX))
    }

    /// Writes them into guest memory.
    ///
    /// # Errors
    /// [`AcpiError::Memory`] if there is no RAM at all of their addresses.
    pub fn write_to(&self, ram: &GuestRam) -> Result<(), AcpiError> {
        ram.memory()
            .write_slice(&self.bytes, self.gpa)
            .map_err(|source| AcpiError::Memory { gpa: self.gpa.0, source })
    }
}
