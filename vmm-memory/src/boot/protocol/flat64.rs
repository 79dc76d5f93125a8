//! A freestanding 64-bit ELF: long mode at `e_entry`, a stack, and nothing to read.

use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::super::cpu_tables::{write_gdt_64, write_identity_map};
use super::super::error::{BootError, BootItem};
use super::super::image::{BootProtocol, ImageFormat};
use super::super::loader::{Boot, BootEntry};
use super::super::room::{ANYWHERE_32, Request};
use super::super::target::Target;

/// Where the stack goes if nothing else is there.
const STACK_ADDRESS: u64 = 0x1_0000;
const STACK_SIZE: u64 = 0x1_0000;

pub(in super::super) fn load<M: GuestMemoryBackend>(
    boot: &Boot<'_>,
    target: &mut Target<'_, M>,
) -> Result<BootEntry, BootError> {
    let protocol = BootProtocol::Flat64;
    let elf = match boot.kernel.elf() {
        Some(elf) if boot.kernel.format() == ImageFormat::Elf64 => elf,
        _ => return Err(boot.not_offered(protocol)),
    };
    let given = [
        (!boot.command_line.is_empty()).then_some(BootItem::CommandLine),
        boot.modules.first().map(|module| module.item),
        boot.rsdp.map(|_| BootItem::Rsdp),
    ];
    if let Some(item) = given.into_iter().flatten().next() {
        return Err(BootError::NotCarried { item, protocol });
    }

    let entry = elf.physical_entry()?;
    let kernel = target.load_segments(boot.kernel)?;
    let mut loaded = BootEntry::new(protocol, entry, kernel, &target.map)?;
    loaded.gdt = Some(write_gdt_64(target)?);
    loaded.page_tables = Some(write_identity_map(target)?);
    let request = Request { item: BootItem::Stack, size: STACK_SIZE, align: 16 };
    let stack = target.room.place(request, STACK_ADDRESS, &ANYWHERE_32)?;
    loaded.stack = Some(GuestAddress(stack.saturating_add(STACK_SIZE)));
    Ok(loaded)
}
