//! Linux's 64-bit protocol: `boot_params`, the "zero page" (Documentation/arch/x86/boot.rst, zero-page.rst).

use std::ops::Range;

use linux_loader::loader::bootparam::{E820_MAX_ENTRIES_ZEROPAGE, boot_params, setup_header};
use vm_memory::{Address, ByteValued, GuestAddress, GuestMemoryBackend};

use super::super::bzimage::{BOOT_FLAG, ENTRY_64, HEADER_MAGIC, SetupHeader};
use super::super::cpu_tables::{write_gdt_64, write_identity_map};
use super::super::error::{BootError, BootItem};
use super::super::image::{BootProtocol, ImageFormat};
use super::super::loader::{Boot, BootEntry};
use super::super::room::{ANYWHERE_32, HIGH_32, Request};
use super::super::target::{Target, address32};
use crate::PAGE_SIZE;

const PROTOCOL: BootProtocol = BootProtocol::Linux64;
/// Where `boot_params` goes if nothing else is there.
const PARAMS_ADDRESS: u64 = 0x7000;
/// Where the command line goes if nothing else is there.
const COMMAND_LINE_ADDRESS: u64 = 0x2_0000;
/// `type_of_loader` of a loader that has no number assigned.
const UNDEFINED_LOADER: u8 = 0xff;

pub(in super::super) fn load<M: GuestMemoryBackend>(
    boot: &Boot<'_>,
    target: &mut Target<'_, M>,
) -> Result<BootEntry, BootError> {
    if let Some(module) = boot.modules.iter().find(|module| module.item != BootItem::Initrd) {
        return Err(BootError::NotCarried { item: module.item, protocol: PROTOCOL });
    }
    let (entry, kernel, mut header) = match boot.kernel.setup_header() {
        Some(header) if header.is_64bit() => load_bzimage(boot, header, target)?,
        None if boot.kernel.format() == ImageFormat::Elf64 => load_vmlinux(boot, target)?,
        _ => return Err(boot.not_offered(PROTOCOL)),
    };
    let mut loaded = BootEntry::new(PROTOCOL, entry, kernel, &target.map)?;
    loaded.gdt = Some(write_gdt_64(target)?);
    loaded.page_tables = Some(write_identity_map(target)?);

    header.type_of_loader = UNDEFINED_LOADER;
    // The image has no list of setup data to give; what it says here is not the guest's.
    header.setup_data = 0;
    if let Some(module) = boot.modules.first() {
        let top = u64::from(header.initrd_addr_max) + 1;
        let window = HIGH_32.start..HIGH_32.end.min(top);
        let (address, size) = target.load_high(module.item, module.bytes, window)?;
        header.ramdisk_image = address32("initrd address", address.raw_value())?;
        header.ramdisk_size = address32("initrd size", size)?;
        loaded.initrd = Some((address, size));
    }
    header.cmd_line_ptr = write_command_line(boot, target)?;
    loaded.info = write_boot_params(boot, target, header)?;
    Ok(loaded)
}

/// Writes the protected-mode kernel and takes all the memory that it unpacks itself into.
fn load_bzimage<M: GuestMemoryBackend>(
    boot: &Boot<'_>,
    header: &SetupHeader,
    target: &mut Target<'_, M>,
) -> Result<(u64, Range<GuestAddress>, setup_header), BootError> {
    let item = BootItem::Kernel;
    let size = header.init_size();
    let address = if header.is_relocatable() {
        // Loaded lower, the kernel would move itself up to its preferred address.
        let align = header.kernel_alignment();
        let preferred = header.preferred_address().next_multiple_of(align);
        let window = preferred..HIGH_32.end.max(preferred);
        target.room.place(Request { item, size, align }, preferred, &[window])?
    } else {
        let preferred = header.preferred_address();
        target.room.claim(item, preferred..preferred.saturating_add(size))?;
        preferred
    };
    target.write(item, address, header.kernel(boot.kernel.bytes())?)?;
    let mut raw = header.raw();
    raw.code32_start = address32("kernel load address", address)?;
    let range = GuestAddress(address)..GuestAddress(address.saturating_add(size));
    Ok((address.saturating_add(ENTRY_64), range, raw))
}

/// Writes a vmlinux, whose `e_entry` takes the same state as the entry of a bzImage.
fn load_vmlinux<M: GuestMemoryBackend>(
    boot: &Boot<'_>,
    target: &mut Target<'_, M>,
) -> Result<(u64, Range<GuestAddress>, setup_header), BootError> {
    let elf = boot.kernel.elf().ok_or_else(|| boot.not_offered(PROTOCOL))?;
    let entry = elf.physical_entry()?;
    let range = target.load_segments(boot.kernel)?;
    let header = setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        // 2.15: the kernel reads every field that is filled in here.
        version: 0x020f,
        // The value of every 64-bit kernel so far; a vmlinux does not say.
        initrd_addr_max: 0x7fff_ffff,
        kernel_alignment: 0x20_0000,
        cmdline_size: 2047,
        ..Default::default()
    };
    Ok((entry, range, header))
}

fn write_command_line<M: GuestMemoryBackend>(
    boot: &Boot<'_>,
    target: &mut Target<'_, M>,
) -> Result<u32, BootError> {
    let item = BootItem::CommandLine;
    let mut bytes = boot.command_line.as_bytes().to_vec();
    bytes.push(0);
    let request = Request { item, size: bytes.len() as u64, align: 16 };
    let address = target.room.place(request, COMMAND_LINE_ADDRESS, &ANYWHERE_32)?;
    target.write(item, address, &bytes)?;
    address32("command line address", address)
}

fn write_boot_params<M: GuestMemoryBackend>(
    boot: &Boot<'_>,
    target: &mut Target<'_, M>,
    header: setup_header,
) -> Result<GuestAddress, BootError> {
    let limit = E820_MAX_ENTRIES_ZEROPAGE;
    let entries = target.map.len();
    let too_long = BootError::MemoryMapTooLong { entries, limit, protocol: PROTOCOL };
    let mut params = boot_params { hdr: header, ..Default::default() };
    params.e820_entries = match u8::try_from(entries) {
        Ok(count) if entries <= limit => count,
        _ => return Err(too_long),
    };
    // The table is packed, so it is filled as a copy.
    let mut table = params.e820_table;
    for (slot, entry) in table.iter_mut().zip(&target.map) {
        slot.addr = entry.start.raw_value();
        slot.size = entry.size;
        slot.r#type = entry.kind.wire();
    }
    params.e820_table = table;
    params.acpi_rsdp_addr = boot.rsdp.map_or(0, |rsdp| rsdp.raw_value());

    let item = BootItem::BootInfo;
    let request = Request { item, size: size_of::<boot_params>() as u64, align: PAGE_SIZE };
    let address = target.room.place(request, PARAMS_ADDRESS, &ANYWHERE_32)?;
    target.write(item, address, params.as_slice())?;
    Ok(GuestAddress(address))
}
