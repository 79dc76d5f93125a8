//! PVH: `hvm_start_info` (Xen public/arch-x86/hvm/start_info.h, version 1).

use linux_loader::loader::start_info::{
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Address, ByteValued, GuestAddress, GuestMemoryBackend};

use super::super::cpu_tables::write_gdt_32;
use super::super::error::{BootError, BootItem};
use super::super::image::BootProtocol;
use super::super::loader::{Boot, BootEntry};
use super::super::room::{ANYWHERE_32, HIGH_32, Request};
use super::super::target::{Tables, Target};

/// Where `hvm_start_info` and its tables go if nothing else is there.
const INFO_ADDRESS: u64 = 0x6000;

pub(in super::super) fn load<M: GuestMemoryBackend>(
    boot: &Boot<'_>,
    target: &mut Target<'_, M>,
) -> Result<BootEntry, BootError> {
    let extracted = boot.kernel.extract_elf()?;
    let kernel = extracted.as_ref().unwrap_or(boot.kernel);
    let elf = kernel.elf().ok_or_else(|| boot.not_offered(BootProtocol::Pvh))?;
    let note = elf.notes.phys32_entry().ok_or_else(|| boot.not_offered(BootProtocol::Pvh))?;
    let entry = elf.check_entry("Xen note PHYS32_ENTRY", note.into())?;

    let range = target.load_segments(kernel)?;
    let mut loaded = BootEntry::new(BootProtocol::Pvh, entry, range, &target.map)?;
    loaded.gdt = Some(write_gdt_32(target)?);
    // A bzImage says how high its initrd may be, whichever way it is started.
    let top = boot.kernel.setup_header().map_or(HIGH_32.end, |header| header.initrd_address_max() + 1);
    let window = HIGH_32.start..HIGH_32.end.min(top);
    let mut placed = Vec::with_capacity(boot.modules.len());
    for module in &boot.modules {
        placed.push((module.item, target.load_high(module.item, module.bytes, window.clone())?));
    }
    loaded.set_modules(&placed);
    loaded.info = write_start_info(boot, target, &placed)?;
    Ok(loaded)
}

fn write_start_info<M: GuestMemoryBackend>(
    boot: &Boot<'_>,
    target: &mut Target<'_, M>,
    placed: &[(BootItem, (GuestAddress, u64))],
) -> Result<GuestAddress, BootError> {
    let item = BootItem::BootInfo;
    let texts = boot.modules.iter().map(|module| module.text.len() + 1);
    let size = Tables::size_of(texts.chain([
        size_of::<hvm_start_info>(),
        boot.command_line.len() + 1,
        placed.len() * size_of::<hvm_modlist_entry>(),
        target.map.len() * size_of::<hvm_memmap_table_entry>(),
    ]));
    let base = target.room.place(Request { item, size, align: 8 }, INFO_ADDRESS, &ANYWHERE_32)?;

    // An address of 0 means that there is none.
    let mut tables = Tables::new(base, size_of::<hvm_start_info>());
    let mut modules = Vec::new();
    for (module, &(_, (address, size))) in boot.modules.iter().zip(placed) {
        let cmdline_paddr = if module.text.is_empty() { 0 } else { tables.push_string(&module.text) };
        let entry = hvm_modlist_entry { paddr: address.raw_value(), size, cmdline_paddr, reserved: 0 };
        modules.extend_from_slice(entry.as_slice());
    }
    let mut memmap = Vec::new();
    for entry in &target.map {
        let entry = hvm_memmap_table_entry {
            addr: entry.start.raw_value(),
            size: entry.size,
            type_: entry.kind.wire(),
            reserved: 0,
        };
        memmap.extend_from_slice(entry.as_slice());
    }
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        flags: 0,
        nr_modules: count("number of modules", placed.len())?,
        modlist_paddr: if placed.is_empty() { 0 } else { tables.push(&modules) },
        cmdline_paddr: if boot.command_line.is_empty() { 0 } else { tables.push_string(&boot.command_line) },
        rsdp_paddr: boot.rsdp.map_or(0, |rsdp| rsdp.raw_value()),
        memmap_paddr: tables.push(&memmap),
        memmap_entries: count("number of memory map entries", target.map.len())?,
        reserved: 0,
    };
    target.write(item, base, &tables.finish(info.as_slice()))?;
    Ok(GuestAddress(base))
}

fn count(what: &'static str, count: usize) -> Result<u32, BootError> {
    u32::try_from(count).map_err(|_| BootError::field(what, count as u64, "at most 0xffffffff"))
}
