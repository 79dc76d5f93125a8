//! ELF kernels: what is accepted, what each protocol finds in memory, and what errors say.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]
#![cfg(feature = "boot")]

mod boot_support;

use boot_support::elf::{ElfBuilder, PHDR_64, flat_kernel, multiboot_kernel, pvh_kernel};
use boot_support::{dirty_memory, patch, read, read_string, read_u32, read_u64};
use vm_memory::GuestAddress;
use vmm_memory::boot::{Boot, BootError, BootItem, BootProtocol, E820Kind, ImageFormat, KernelImage};

const MIB: usize = 1 << 20;

fn parse_error(file: Vec<u8>) -> String {
    KernelImage::parse(file).unwrap_err().to_string()
}

/// The error for the file of `flat_kernel` with `bytes` at `offset`.
fn patched_error(offset: usize, bytes: &[u8]) -> String {
    let mut file = flat_kernel();
    patch(&mut file, offset, bytes);
    parse_error(file)
}

#[test]
fn formats_and_protocols_are_told_apart() {
    use BootProtocol::{Flat64, Multiboot1, Pvh};
    for (file, format, protocols) in [
        (pvh_kernel(), ImageFormat::Elf64, vec![Pvh, Flat64]),
        (flat_kernel(), ImageFormat::Elf64, vec![Flat64]),
        (multiboot_kernel(3), ImageFormat::Elf32, vec![Multiboot1]),
        (ElfBuilder::new(false, 0x10_0000).segment(0x10_0000, b"x", 1).build(), ImageFormat::Elf32, vec![]),
    ] {
        let kernel = KernelImage::parse(&file).unwrap();
        assert_eq!((kernel.format(), kernel.protocols()), (format, protocols));
    }
}

#[test]
fn bytes_may_be_borrowed_from_any_address() {
    let mut shifted = vec![0];
    shifted.extend(pvh_kernel());
    let kernel = KernelImage::parse(&shifted[1..]).unwrap();
    assert_eq!(kernel.bytes().as_ptr(), shifted[1..].as_ptr(), "nothing is copied");
    assert_eq!(kernel.xen_notes().unwrap().phys32_entry(), Some(0x10_0010));
}

#[test]
fn segments_are_loaded_and_bss_is_zeroed() {
    let file = flat_kernel();
    let kernel = KernelImage::parse(&file).unwrap();
    let memory = dirty_memory(8 * MIB);
    let entry = Boot::new(&kernel).load(&memory).unwrap();
    assert_eq!(read(&memory, 0x10_0000, 0x40), [0x90; 0x40]);
    assert_eq!(read(&memory, 0x10_0040, 4), [0xaa; 4], "nothing past the segment is touched");
    assert_eq!(read(&memory, 0x20_0000, 6), *b"data\0\0");
    assert_eq!(read(&memory, 0x20_0004, 0x2ffc), vec![0; 0x2ffc]);
    assert_eq!(read(&memory, 0x20_3000, 1), [0xaa]);
    assert_eq!(entry.kernel, GuestAddress(0x10_0000)..GuestAddress(0x20_3000));
    assert_eq!((entry.entry, entry.info), (GuestAddress(0x10_0000), GuestAddress(0)));
}

#[test]
fn bss_larger_than_a_write_is_zeroed_to_its_last_byte() {
    let file = ElfBuilder::new(true, 0x10_0000).segment(0x10_0000, b"x", 0x3_0001).build();
    let memory = dirty_memory(8 * MIB);
    Boot::new(&KernelImage::parse(&file).unwrap()).load(&memory).unwrap();
    assert_eq!(read(&memory, 0x10_0001, 0x3_0000), vec![0; 0x3_0000]);
    assert_eq!(read(&memory, 0x13_0001, 1), [0xaa]);
}

#[test]
fn a_flat_guest_gets_a_gdt_an_identity_map_and_a_stack() {
    let file = flat_kernel();
    let memory = dirty_memory(8 * MIB);
    let entry = Boot::new(&KernelImage::parse(&file).unwrap()).load(&memory).unwrap();

    let gdt = entry.gdt.unwrap();
    assert_eq!((gdt.code, gdt.data, gdt.tss, gdt.limit), (0x10, 0x18, 0x20, 47));
    let descriptor = |selector: u16| read_u64(&memory, gdt.base.0 + u64::from(selector));
    assert_eq!(descriptor(0), 0);
    assert_eq!(descriptor(gdt.code), 0x00af_9b00_0000_ffff);
    assert_eq!(descriptor(gdt.data), 0x00cf_9300_0000_ffff);

    let top = entry.page_tables.unwrap().0;
    for address in [0, 0x1234_5678, 0x3fff_ffff, 0x4000_0000, 0xffff_ffff_u64] {
        assert_eq!(translate(&memory, top, address), Some(address), "{address:#x}");
    }
    assert_eq!(translate(&memory, top, 0x1_0000_0000), None);

    let stack = entry.stack.unwrap().0;
    assert_eq!(stack % 16, 0);
    read(&memory, stack - 0x1_0000, 0x1_0000);
}

/// Walks 4-level page tables with pages of 2 MiB.
fn translate(memory: &boot_support::Memory, top: u64, address: u64) -> Option<u64> {
    let mut table = top;
    for shift in [39, 30] {
        let entry = read_u64(memory, table + (address >> shift & 511) * 8);
        if entry & 3 != 3 {
            return None;
        }
        table = entry & !0xfff;
    }
    let entry = read_u64(memory, table + (address >> 21 & 511) * 8);
    (entry & 0x83 == 0x83).then_some((entry & !0x1f_ffff) + (address & 0x1f_ffff))
}

#[test]
fn a_pvh_guest_finds_everything_from_start_info() {
    let file = pvh_kernel();
    let kernel = KernelImage::parse(&file).unwrap();
    let memory = dirty_memory(8 * MIB);
    let entry = Boot::new(&kernel)
        .command_line("console=ttyS0")
        .module(b"second", "two")
        .initrd(&[7; 5000])
        .rsdp(GuestAddress(0xe_0000))
        .reserve(GuestAddress(0x7f_0000)..GuestAddress(0x80_0000))
        .reserve_as(GuestAddress(0x7e_0000)..GuestAddress(0x7f_0000), E820Kind::Acpi)
        .load(&memory)
        .unwrap();
    assert_eq!((entry.protocol, entry.entry), (BootProtocol::Pvh, GuestAddress(0x10_0010)));
    assert_eq!((entry.page_tables, entry.stack), (None, None));
    assert_eq!(entry.gdt.map(|gdt| (gdt.code, gdt.data)), Some((8, 16)));

    let info = entry.info.0;
    assert_eq!([0, 4, 8, 12].map(|offset| read_u32(&memory, info + offset)), [0x336e_c578, 1, 0, 2]);
    let [modules, command_line, rsdp, map] = [16, 24, 32, 40].map(|offset| read_u64(&memory, info + offset));
    assert_eq!(read_string(&memory, command_line), "console=ttyS0");
    assert_eq!(rsdp, 0xe_0000);

    let (initrd, size) = entry.initrd.unwrap();
    assert_eq!((initrd.0, size), (0x7d_e000, 5000), "right below the reserved memory");
    assert_eq!([0, 8, 16].map(|offset| read_u64(&memory, modules + offset)), [initrd.0, 5000, 0]);
    assert_eq!(read(&memory, initrd.0, 5000), [7; 5000]);
    let second = read_u64(&memory, modules + 32);
    assert_eq!(entry.modules, [(GuestAddress(second), 6)]);
    assert_eq!(read(&memory, second, 6), b"second");
    assert_eq!(read_string(&memory, read_u64(&memory, modules + 48)), "two");

    let entries = u64::from(read_u32(&memory, info + 48));
    let table: Vec<_> = (0..entries)
        .map(|index| map + index * 24)
        .map(|at| (read_u64(&memory, at), read_u64(&memory, at + 8), read_u32(&memory, at + 16)))
        .collect();
    assert_eq!(
        table,
        [(0, 0xa_0000, 1), (0x10_0000, 0x6e_0000, 1), (0x7e_0000, 0x1_0000, 3), (0x7f_0000, 0x1_0000, 2)]
    );
    let told: Vec<_> =
        entry.memory_map.iter().map(|entry| (entry.start.0, entry.size, entry.kind.wire())).collect();
    assert_eq!(told, table);
}

#[test]
fn a_pvh_guest_given_nothing_finds_zeroes() {
    let file = pvh_kernel();
    let memory = dirty_memory(8 * MIB);
    let entry = Boot::new(&KernelImage::parse(&file).unwrap()).load(&memory).unwrap();
    assert_eq!([12, 16, 20, 24, 28, 32].map(|at| read_u32(&memory, entry.info.0 + at)), [0; 6]);
}

#[test]
fn an_elf64_can_be_started_as_a_vmlinux() {
    let file = flat_kernel();
    let kernel = KernelImage::parse(&file).unwrap();
    let memory = dirty_memory(8 * MIB);
    let entry =
        Boot::new(&kernel).protocol(BootProtocol::Linux64).command_line("quiet").load(&memory).unwrap();
    assert_eq!(entry.entry, GuestAddress(0x10_0000));
    let params = entry.info.0;
    assert_eq!(read_u32(&memory, params + 0x202), 0x5372_6448);
    assert_eq!(read_string(&memory, read_u32(&memory, params + 0x228).into()), "quiet");
}

#[test]
fn a_virtual_entry_is_translated_by_the_code_that_holds_it() {
    let high = 0xffff_ffff_8010_0000;
    let file =
        ElfBuilder::new(true, high + 8).mapped_segment(0x10_0000, high, &[0x90; 0x40], 0x40, 5).build();
    let kernel = KernelImage::parse(&file).unwrap();
    assert_eq!(kernel.elf_entry(), Some(high + 8));
    let entry = Boot::new(&kernel).load(&dirty_memory(8 * MIB)).unwrap();
    assert_eq!(entry.entry, GuestAddress(0x10_0008));
}

#[test]
fn a_physical_entry_is_not_taken_for_an_address_in_data() {
    let file = ElfBuilder::new(true, 0x10_0008)
        .mapped_segment(0x10_0000, 0xffff_ffff_8010_0000, &[0x90; 0x40], 0x40, 5)
        // Per-CPU data of a vmlinux: virtual addresses from 0.
        .mapped_segment(0x20_0000, 0, &[1; 0x10_0100], 0x10_0100, 6)
        .build();
    let entry = Boot::new(&KernelImage::parse(&file).unwrap()).load(&dirty_memory(8 * MIB)).unwrap();
    assert_eq!(entry.entry, GuestAddress(0x10_0008));
}

#[test]
fn an_entry_outside_every_segment_is_refused() {
    for entry in [0xf_ffff, 0x10_0040, 0x20_0004] {
        let mut file = flat_kernel();
        patch(&mut file, 24, &u64::to_le_bytes(entry));
        let error = Boot::new(&KernelImage::parse(&file).unwrap()).load(&dirty_memory(8 * MIB)).unwrap_err();
        let expected = format!("e_entry {entry:#x} is outside the file content of every loaded segment");
        assert_eq!(error.to_string(), expected);
    }
    let file = ElfBuilder::new(true, 0x10_0000).segment(0x10_0000, b"x", 0x100).pvh(0x10_0001).build();
    let error = Boot::new(&KernelImage::parse(&file).unwrap()).load(&dirty_memory(8 * MIB)).unwrap_err();
    assert!(error.to_string().starts_with("Xen note PHYS32_ENTRY 0x100001"), "{error}");
}

#[test]
fn each_wrong_header_field_is_named() {
    for (offset, bytes, text) in [
        (4, vec![3], "e_ident[EI_CLASS] is 0x3"),
        (5, vec![2], "e_ident[EI_DATA] is 0x2"),
        (6, vec![0], "e_ident[EI_VERSION] is 0x0"),
        (16, vec![1, 0], "e_type is 0x1"),
        (18, vec![183, 0], "e_machine is 0xb7; allowed: 62"),
        (32, vec![0xff; 8], "program header table (e_phoff, e_phnum * e_phentsize): 0x70 bytes at offset"),
        (54, vec![32, 0], "e_phentsize is 0x20; allowed: 0x38"),
        (56, vec![0, 0], "e_phnum is 0x0"),
        (56, vec![0xff, 0xff], "e_phnum is 0xffff"),
        (56, vec![0xfe, 0xff], "program header table"),
    ] {
        let error = patched_error(offset, &bytes);
        assert!(error.contains(text), "{error}");
    }
}

#[test]
fn each_wrong_segment_field_is_named() {
    let size = flat_kernel().len();
    for (offset, value, text) in [
        (
            8,
            u64::MAX,
            format!(
                "program header 0: p_offset 0xffffffffffffffff + p_filesz 0x40 exceeds the file size {size:#x}"
            ),
        ),
        (8, size as u64 - 0x3f, format!("p_offset {:#x} + p_filesz 0x40", size - 0x3f)),
        (32, 0x41, "program header 0: p_filesz 0x41 exceeds p_memsz 0x40".to_owned()),
        (
            24,
            u64::MAX - 0x3e,
            "program header 0: p_paddr 0xffffffffffffffc1 + p_memsz 0x40 exceeds".to_owned(),
        ),
        (
            16,
            u64::MAX - 0x3e,
            "program header 0: p_vaddr 0xffffffffffffffc1 + p_memsz 0x40 exceeds".to_owned(),
        ),
        (24, 0x1f_ffc1, "program headers 0 and 1 overlap: p_paddr 0x200000 is below 0x200001".to_owned()),
        (24, 0x20_0001, "program headers 1 and 0 overlap".to_owned()),
    ] {
        let error = patched_error(PHDR_64 + offset, &u64::to_le_bytes(value));
        assert!(error.contains(&text), "{error}");
    }
    let mut file = flat_kernel();
    patch(&mut file, PHDR_64, &[6]);
    patch(&mut file, PHDR_64 + 56, &[6]);
    assert!(matches!(KernelImage::parse(file), Err(BootError::NoSegments { phnum: 2 })));
}

#[test]
fn a_32_bit_segment_may_not_pass_4_gib() {
    let file = ElfBuilder::new(false, 0).segment(0xffff_f000, b"x", 0x1000).build();
    assert!(KernelImage::parse(file).is_ok());
    let file = ElfBuilder::new(false, 0).segment(0xffff_f000, b"x", 0x1001).build();
    assert!(parse_error(file).ends_with("p_paddr 0xfffff000 + p_memsz 0x1001 exceeds 0xffffffff"));
}

#[test]
fn damaged_notes_are_refused() {
    // The note segment is the first: its name size, descriptor size and alignment in turn.
    let notes = PHDR_64 + 3 * 56 + 8;
    for (offset, bytes, text) in [
        (notes, vec![0xff; 4], "program header 0 (PT_NOTE): Invalid ELF note namesz"),
        (notes + 4, vec![0xff; 4], "program header 0 (PT_NOTE): Invalid ELF note descsz"),
        (PHDR_64 + 48, vec![16], "program header 0 (PT_NOTE): p_align is 0x10"),
        (PHDR_64 + 32, vec![0, 0, 0x10], "program header 0 (PT_NOTE): p_offset, p_filesz: 0x100000 bytes"),
        (PHDR_64 + 32, vec![1, 0, 0x10], "p_filesz of all note segments so far is 0x100001"),
    ] {
        let mut file = pvh_kernel();
        patch(&mut file, offset, &bytes);
        let error = parse_error(file);
        assert!(error.contains(text), "{error}");
    }
}

#[test]
fn xen_notes_of_a_paravirtual_kernel_are_read() {
    let file = ElfBuilder::new(true, 0x10_0000)
        .segment(0x10_0000, b"x", 1)
        .note(6, b"linux\0")
        .note(1, &0xffff_ffff_82ab_c180_u64.to_le_bytes())
        .note(15, &0x80_0000_0000_u64.to_le_bytes())
        .note(16, &1_u32.to_le_bytes())
        .note(13, &[1_u64.to_le_bytes(), 1_u64.to_le_bytes()].concat())
        .build();
    let kernel = KernelImage::parse(file).unwrap();
    let notes = kernel.xen_notes().unwrap();
    assert_eq!(notes.guest_os(), Some("linux"));
    assert_eq!((notes.entry(), notes.init_p2m()), (Some(0xffff_ffff_82ab_c180), Some(0x80_0000_0000)));
    assert_eq!((notes.mod_start_pfn(), notes.l1_mfn_valid()), (Some(true), Some((1, 1))));
    assert_eq!((notes.phys32_entry(), notes.hypercall_page()), (None, None));
}

#[test]
fn tables_make_room_for_a_kernel_in_low_memory() {
    let file = ElfBuilder::new(true, 0x500).segment(0x500, &[0x90; 0x2_0000], 0x3_0000).build();
    let kernel = KernelImage::parse(&file).unwrap();
    let memory = dirty_memory(8 * MIB);
    let entry = Boot::new(&kernel).load(&memory).unwrap();
    assert_eq!(entry.kernel, GuestAddress(0x500)..GuestAddress(0x3_0500));
    assert!(entry.gdt.unwrap().base >= entry.kernel.end);
    assert!(entry.page_tables.unwrap() >= entry.kernel.end);
    assert_eq!(read(&memory, 0x500, 0x2_0000), vec![0x90; 0x2_0000]);
}

#[test]
fn a_guest_without_low_memory_can_be_started() {
    let file = pvh_kernel();
    let memory = boot_support::Memory::from_ranges(&[(GuestAddress(0x10_0000), 4 * MIB)]).unwrap();
    let entry = Boot::new(&KernelImage::parse(&file).unwrap()).load(&memory).unwrap();
    assert_eq!(entry.info.0 & !0xfff, 0x10_0000, "behind the code");
}

#[test]
fn what_does_not_fit_is_named_with_its_size() {
    let file = pvh_kernel();
    let kernel = KernelImage::parse(&file).unwrap();
    let memory = dirty_memory(4 * MIB);
    let initrd = vec![0; 3 * MIB];
    let error = Boot::new(&kernel).initrd(&initrd).load(&memory).unwrap_err().to_string();
    assert!(error.starts_with("no room for the initrd: 0x300000 bytes"), "{error}");
    assert!(error.ends_with("the largest free range there is 0x1fd000 bytes"), "{error}");

    let memory = dirty_memory(2 * MIB);
    let error = Boot::new(&kernel).load(&memory).unwrap_err().to_string();
    assert_eq!(error, "the segment of program header 2 needs 0x200000..0x203000, which is not all guest RAM");

    let memory = dirty_memory(4 * MIB);
    let reserved = GuestAddress(0x20_2fff)..GuestAddress(0x20_4000);
    let error = Boot::new(&kernel).reserve(reserved).load(&memory).unwrap_err();
    assert!(matches!(error, BootError::Collision { with: BootItem::Reserved, .. }), "{error}");
}

#[test]
fn a_protocol_that_the_image_lacks_is_refused() {
    let memory = dirty_memory(8 * MIB);
    let flat = flat_kernel();
    let multiboot = multiboot_kernel(0);
    for (file, protocol, text) in [
        (&flat, BootProtocol::Pvh, "the image does not offer PVH: it has no Xen note PHYS32_ENTRY"),
        (&flat, BootProtocol::Multiboot1, "multiboot 1: it has no multiboot 1 header"),
        (&multiboot, BootProtocol::Flat64, "it is not an ELF64 file"),
        (&multiboot, BootProtocol::Linux64, "it is neither a bzImage nor an ELF64 file"),
    ] {
        let kernel = KernelImage::parse(file).unwrap();
        let error = Boot::new(&kernel).protocol(protocol).load(&memory).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
    let neither = ElfBuilder::new(false, 0x10_0000).segment(0x10_0000, b"x", 1).build();
    let error = Boot::new(&KernelImage::parse(neither).unwrap()).load(&memory).unwrap_err();
    assert!(matches!(error, BootError::NoProtocol { format: ImageFormat::Elf32 }), "{error}");
}

#[test]
fn what_a_flat_guest_cannot_be_given_is_refused() {
    let file = flat_kernel();
    let kernel = KernelImage::parse(&file).unwrap();
    let memory = dirty_memory(8 * MIB);
    for (boot, item) in [
        (Boot::new(&kernel).command_line("x"), BootItem::CommandLine),
        (Boot::new(&kernel).initrd(b"x"), BootItem::Initrd),
        (Boot::new(&kernel).module(b"x", ""), BootItem::Module(0)),
        (Boot::new(&kernel).rsdp(GuestAddress(0xe_0000)), BootItem::Rsdp),
    ] {
        let error = boot.load(&memory).unwrap_err();
        assert!(matches!(error, BootError::NotCarried { item: found, .. } if found == item), "{error}");
    }
    assert!(Boot::new(&kernel).command_line("").load(&memory).is_ok());
}

#[test]
fn command_lines_are_checked() {
    let file = pvh_kernel();
    let kernel = KernelImage::parse(&file).unwrap();
    let memory = dirty_memory(8 * MIB);
    assert!(Boot::new(&kernel).command_line("x".repeat(2047)).load(&memory).is_ok());
    let error = Boot::new(&kernel).command_line("x".repeat(2048)).load(&memory).unwrap_err();
    assert_eq!(error.to_string(), "the command line is 2048 bytes long; PVH allows 2047 without the NUL");
    let error = Boot::new(&kernel).command_line("ab\0c").load(&memory).unwrap_err();
    assert_eq!(error.to_string(), "the string of the command line has a NUL at byte 2; none is allowed");
    let error = Boot::new(&kernel).module(b"", "m".repeat(4096)).load(&memory).unwrap_err();
    assert!(matches!(error, BootError::CommandLineTooLong { item: BootItem::Module(0), .. }), "{error}");
}

#[test]
fn bytes_of_no_format_are_refused() {
    for bytes in [&b""[..], b"MZ", &[0; 9000]] {
        let error = KernelImage::parse(bytes).unwrap_err();
        assert!(matches!(error, BootError::Unrecognised { length } if length == bytes.len()), "{error}");
    }
    let error = KernelImage::parse(&b"\x7fELF"[..]).unwrap_err().to_string();
    assert_eq!(error, "ELF header e_ident: 0x10 bytes at offset 0x0 exceed the file size 0x4");
}
