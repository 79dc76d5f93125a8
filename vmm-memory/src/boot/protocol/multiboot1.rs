//! Multiboot 1: the information structure (Multiboot Specification 0.6.96, section 3.3).

use std::ops::Range;

use vm_memory::{Address, GuestAddress, GuestMemoryBackend};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{Immutable, IntoBytes};

use super::super::cpu_tables::write_gdt_32;
use super::super::e820::{E820Entry, E820Kind};
use super::super::error::{BootError, BootItem, slice};
use super::super::image::BootProtocol;
use super::super::loader::{Boot, BootEntry};
use super::super::multiboot::FlatImage;
use super::super::room::{ANYWHERE_32, HIGH_32, Request};
use super::super::target::{Tables, Target, address32};

/// Where the information and its tables go if nothing else is there.
const INFO_ADDRESS: u64 = 0x6000;
const LOADER_NAME: &str = "vmm-memory";

const INFO_MEMORY: u32 = 1 << 0;
const INFO_COMMAND_LINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MEMORY_MAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;

#[derive(IntoBytes, Immutable, Default)]
#[repr(C)]
struct Information {
    flags: U32,
    mem_lower: U32,
    mem_upper: U32,
    boot_device: U32,
    cmdline: U32,
    mods_count: U32,
    mods_addr: U32,
    syms: [U32; 4],
    mmap_length: U32,
    mmap_addr: U32,
    drives_length: U32,
    drives_addr: U32,
    config_table: U32,
    boot_loader_name: U32,
    apm_table: U32,
    /// VBE and framebuffer fields up to offset 116, whose flags stay 0.
    video: [U32; 11],
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct ModuleEntry {
    start: U32,
    end: U32,
    string: U32,
    reserved: U32,
}

#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct MemoryMapEntry {
    /// Size of the rest of the entry.
    size: U32,
    address: U64,
    length: U64,
    kind: U32,
}

pub(in super::super) fn load<M: GuestMemoryBackend>(
    boot: &Boot<'_>,
    target: &mut Target<'_, M>,
) -> Result<BootEntry, BootError> {
    let protocol = BootProtocol::Multiboot1;
    let header = boot.kernel.multiboot_header().ok_or_else(|| boot.not_offered(protocol))?;
    if boot.rsdp.is_some() {
        return Err(BootError::NotCarried { item: BootItem::Rsdp, protocol });
    }
    header.check_flags()?;
    // The address fields win over the headers of the executable format.
    let (entry, kernel) = match (header.flat_image(boot.kernel.bytes())?, boot.kernel.elf()) {
        (Some(image), _) => load_flat(boot, &image, target)?,
        (None, Some(elf)) => (elf.physical_entry()?, target.load_segments(boot.kernel)?),
        (None, None) => return Err(boot.not_offered(protocol)),
    };
    let mut loaded = BootEntry::new(protocol, entry, kernel, &target.map)?;
    loaded.gdt = Some(write_gdt_32(target)?);

    // Modules go right behind the kernel, as other loaders have it: small kernels map little more.
    let start = loaded.kernel_end().max(HIGH_32.start);
    let mut placed = Vec::with_capacity(boot.modules.len());
    for module in &boot.modules {
        let window = start..HIGH_32.end.max(start);
        placed.push((module.item, target.load_low(module.item, module.bytes, window)?));
    }
    loaded.set_modules(&placed);
    loaded.info = write_information(boot, target, &placed)?;
    Ok(loaded)
}

fn load_flat<M: GuestMemoryBackend>(
    boot: &Boot<'_>,
    image: &FlatImage,
    target: &mut Target<'_, M>,
) -> Result<(u64, Range<GuestAddress>), BootError> {
    let FlatImage { offset, load, bss_end, entry } = image;
    let item = BootItem::Kernel;
    target.room.claim(item, load.start..*bss_end)?;
    let bytes = slice(boot.kernel.bytes(), "multiboot image", *offset, load.end - load.start)?;
    target.write(item, load.start, bytes)?;
    target.zero(item, load.end..*bss_end)?;
    Ok((*entry, GuestAddress(load.start)..GuestAddress(*bss_end)))
}

fn write_information<M: GuestMemoryBackend>(
    boot: &Boot<'_>,
    target: &mut Target<'_, M>,
    placed: &[(BootItem, (GuestAddress, u64))],
) -> Result<GuestAddress, BootError> {
    let item = BootItem::BootInfo;
    let texts = boot.modules.iter().map(|module| module.text.len() + 1);
    let size = Tables::size_of(texts.chain([
        size_of::<Information>(),
        LOADER_NAME.len() + 1,
        boot.command_line.len() + 1,
        placed.len() * size_of::<ModuleEntry>(),
        target.map.len() * size_of::<MemoryMapEntry>(),
    ]));
    let base = target.room.place(Request { item, size, align: 8 }, INFO_ADDRESS, &ANYWHERE_32)?;
    let field = |address| address32("address in the multiboot information", address).map(U32::new);

    let mut tables = Tables::new(base, size_of::<Information>());
    let mut modules = Vec::new();
    for (module, &(_, (address, size))) in boot.modules.iter().zip(placed) {
        let entry = ModuleEntry {
            start: field(address.raw_value())?,
            end: field(address.raw_value().saturating_add(size))?,
            string: field(tables.push_string(&module.text))?,
            reserved: U32::new(0),
        };
        modules.extend_from_slice(entry.as_bytes());
    }
    let mut map = Vec::new();
    for entry in &target.map {
        let entry = MemoryMapEntry {
            size: U32::new(20),
            address: U64::new(entry.start.raw_value()),
            length: U64::new(entry.size),
            kind: U32::new(entry.kind.wire()),
        };
        map.extend_from_slice(entry.as_bytes());
    }
    let (lower, upper) = memory_sizes(&target.map);
    let flags = INFO_MEMORY | INFO_COMMAND_LINE | INFO_MODULES | INFO_MEMORY_MAP | INFO_LOADER_NAME;
    let information = Information {
        flags: U32::new(flags),
        mem_lower: U32::new(lower),
        mem_upper: U32::new(upper),
        cmdline: field(tables.push_string(&boot.command_line))?,
        mods_count: field(placed.len() as u64)?,
        mods_addr: field(tables.push(&modules))?,
        mmap_length: field(map.len() as u64)?,
        mmap_addr: field(tables.push(&map))?,
        boot_loader_name: field(tables.push_string(LOADER_NAME))?,
        ..Information::default()
    };
    target.write(item, base, &tables.finish(information.as_bytes()))?;
    Ok(GuestAddress(base))
}

/// `mem_lower` and `mem_upper`: KiB of RAM from 0 (at most 640), and from 1 MiB to the first hole.
fn memory_sizes(map: &[E820Entry]) -> (u32, u32) {
    let kib_from = |start: u64| {
        let ram = map.iter().find(|entry| entry.start.raw_value() == start && entry.kind == E820Kind::Ram);
        ram.map_or(0, |entry| u32::try_from(entry.size >> 10).unwrap_or(u32::MAX))
    };
    (kib_from(0).min(640), kib_from(0x10_0000))
}
