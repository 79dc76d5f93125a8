//! The MADT: processors and interrupt controllers (ACPI 6.5, 5.2.12).

use acpi_tables::sdt::Sdt;

/// How an ISA interrupt differs from "same number, edge-triggered": an interrupt source override (5.2.12.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Override {
    pub(super) irq: u8,
    pub(super) gsi: u32,
    pub(super) level: bool,
}

/// What the table describes.
pub(super) struct Controllers<'a> {
    pub(super) apic_ids: &'a [u32],
    pub(super) local_apic: u32,
    pub(super) io_apic_id: u8,
    pub(super) io_apic: u32,
    pub(super) pic: bool,
    pub(super) overrides: &'a [Override],
}

// Entry types and lengths.
const LOCAL_APIC: [u8; 2] = [0, 8];
const IO_APIC: [u8; 2] = [1, 12];
const OVERRIDE: [u8; 2] = [2, 10];
const LOCAL_NMI: [u8; 2] = [4, 6];
const LOCAL_X2APIC: [u8; 2] = [9, 16];
const LOCAL_X2APIC_NMI: [u8; 2] = [10, 12];

const ENABLED: u32 = 1;
const PC_AT_COMPATIBLE: u32 = 1;
/// Active high and level-triggered; zero means as on the ISA bus.
const HIGH_LEVEL: u16 = 0b1101;
/// Local APICs have NMIs on this input.
const LINT1: u8 = 1;

impl Controllers<'_> {
    /// Appends the table's body to its header.
    pub(super) fn append_to(&self, madt: &mut Sdt) {
        let mut body = Vec::new();
        body.extend(self.local_apic.to_le_bytes());
        body.extend(if self.pic { PC_AT_COMPATIBLE } else { 0 }.to_le_bytes());
        for (uid, &id) in (0_u32..).zip(self.apic_ids) {
            processor(&mut body, uid, id);
        }
        body.extend(IO_APIC);
        body.extend([self.io_apic_id, 0]);
        body.extend(self.io_apic.to_le_bytes());
        body.extend(0_u32.to_le_bytes());
        for Override { irq, gsi, level } in self.overrides {
            body.extend(OVERRIDE);
            body.extend([0, *irq]);
            body.extend(gsi.to_le_bytes());
            body.extend(if *level { HIGH_LEVEL } else { 0_u16 }.to_le_bytes());
        }
        // All processors: 0xff, and for the larger ones 0xffff_ffff.
        body.extend(LOCAL_NMI);
        body.extend([0xff, 0, 0, LINT1]);
        if self.apic_ids.iter().any(|&id| id >= X2APIC_FROM) {
            body.extend(LOCAL_X2APIC_NMI);
            body.extend([0, 0, 0xff, 0xff, 0xff, 0xff, LINT1, 0, 0, 0]);
        }
        madt.append_slice(&body);
    }
}

/// The first APIC ID that does not fit the 8-bit form, where 255 is the broadcast.
const X2APIC_FROM: u32 = 255;

/// The short form where it fits, as the specification asks (5.2.12.12). A processor has no object in the DSDT, so
/// its number is only its own.
fn processor(body: &mut Vec<u8>, uid: u32, id: u32) {
    match (u8::try_from(uid), u8::try_from(id)) {
        (Ok(uid), Ok(id)) if u32::from(id) < X2APIC_FROM && uid != 0xff => {
            body.extend(LOCAL_APIC);
            body.extend([uid, id]);
            body.extend(ENABLED.to_le_bytes());
        }
        _ => {
            body.extend(LOCAL_X2APIC);
            body.extend([0, 0]);
            body.extend(id.to_le_bytes());
            body.extend(ENABLED.to_le_bytes());
            body.extend(uid.to_le_bytes());
        }
    }
}
