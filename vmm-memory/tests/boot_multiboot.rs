//! Multiboot 1: ELF and binary images, and the information that they get.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]
#![cfg(feature = "boot")]

mod boot_support;

use boot_support::elf::{ElfBuilder, multiboot_kernel};
use boot_support::{Memory, dirty_memory, multiboot_header, read, read_string, read_u32, read_u64};
use vm_memory::GuestAddress;
use vmm_memory::boot::{Boot, BootEntry, BootError, BootItem, BootProtocol, ImageFormat, KernelImage};

const MIB: usize = 1 << 20;
const ADDRESSES: u32 = 1 << 16;

fn load(file: &[u8], memory: &Memory) -> Result<BootEntry, BootError> {
    Boot::new(&KernelImage::parse(file)?).load(memory)
}

#[test]
fn an_elf32_is_loaded_and_entered() {
    let memory = dirty_memory(16 * MIB);
    let entry = load(&multiboot_kernel(0), &memory).unwrap();
    assert_eq!((entry.protocol, entry.entry), (BootProtocol::Multiboot1, GuestAddress(0x40_000c)));
    assert_eq!(entry.kernel, GuestAddress(0x40_0000)..GuestAddress(0x40_2000));
    assert_eq!(read_u32(&memory, 0x40_0000), 0x1bad_b002);
    assert_eq!(read(&memory, 0x40_00ff, 0x101)[1..], [0; 0x100]);
    assert_eq!(entry.gdt.map(|gdt| (gdt.code, gdt.data)), Some((8, 16)));
    assert_eq!((entry.page_tables, entry.stack), (None, None));
}

#[test]
fn the_information_says_what_was_given() {
    let file = multiboot_kernel(0b11);
    let kernel = KernelImage::parse(&file).unwrap();
    let memory = dirty_memory(16 * MIB);
    let entry = Boot::new(&kernel)
        .command_line("kernel -v")
        .initrd(&[5; 100])
        .module(&[6; 5000], "symbols")
        .reserve(GuestAddress(0xff_0000)..GuestAddress(0x100_0000))
        .load(&memory)
        .unwrap();
    let word = |offset: u64| u64::from(read_u32(&memory, entry.info.0 + offset));
    assert_eq!(word(0), 0b10_0100_1101, "memory, command line, modules, memory map, loader name");
    assert_eq!((word(4), word(8)), (640, (0xff_0000 - 0x10_0000) >> 10));
    assert_eq!(read_string(&memory, word(16)), "kernel -v");
    assert_eq!(read_string(&memory, word(64)), "vmm-memory");

    assert_eq!(word(20), 2);
    let module =
        |index: u64| [0, 4, 8, 12].map(|field| u64::from(read_u32(&memory, word(24) + index * 16 + field)));
    let [start, end, string, reserved] = module(0);
    assert_eq!((start, end, reserved), (0x40_2000, 0x40_2064, 0), "page-aligned, right behind the kernel");
    assert_eq!((read(&memory, start, 100), read_string(&memory, string)), (vec![5; 100], String::new()));
    let [start, end, string, _] = module(1);
    assert_eq!((start, end), (0x40_3000, 0x40_4388));
    assert_eq!(
        (read(&memory, start, 5000), read_string(&memory, string).as_str()),
        (vec![6; 5000], "symbols")
    );
    assert_eq!(entry.initrd, Some((GuestAddress(0x40_2000), 100)));
    assert_eq!(entry.modules, [(GuestAddress(0x40_3000), 5000)]);

    let mut at = word(48);
    let mut map = Vec::new();
    while at < word(48) + word(44) {
        map.push((read_u64(&memory, at + 4), read_u64(&memory, at + 12), read_u32(&memory, at + 20)));
        at += u64::from(read_u32(&memory, at)) + 4;
    }
    assert_eq!(at, word(48) + word(44));
    assert_eq!(map, [(0, 0xa_0000, 1), (0x10_0000, 0xef_0000, 1), (0xff_0000, 0x1_0000, 2)]);
}

#[test]
fn a_binary_is_loaded_by_its_address_fields() {
    let mut file = vec![0xf4; 0x300];
    let header = multiboot_header(ADDRESSES, &[0x20_0100, 0x20_0080, 0x20_0200, 0x20_1000, 0x20_0090]);
    boot_support::patch(&mut file, 0x100, &header);
    let kernel = KernelImage::parse(&file).unwrap();
    assert_eq!(
        (kernel.format(), kernel.protocols()),
        (ImageFormat::MultibootBinary, vec![BootProtocol::Multiboot1])
    );
    let memory = dirty_memory(16 * MIB);
    let entry = Boot::new(&kernel).load(&memory).unwrap();
    assert_eq!(entry.entry, GuestAddress(0x20_0090));
    assert_eq!(entry.kernel, GuestAddress(0x20_0080)..GuestAddress(0x20_1000));
    assert_eq!(read(&memory, 0x20_0080, 0x180), file[0x80..0x200]);
    assert_eq!(read(&memory, 0x20_0200, 0xe00), [0; 0xe00]);
    assert_eq!((read(&memory, 0x20_007f, 1), read(&memory, 0x20_1000, 1)), (vec![0xaa], vec![0xaa]));
}

#[test]
fn address_fields_win_over_elf_headers_of_either_class() {
    for is_64 in [false, true] {
        let headers = if is_64 { 0x80 } else { 0x60 };
        let mut code = multiboot_header(ADDRESSES, &[0x30_0000, 0x30_0000, 0, 0, 0x30_0020]);
        code.resize(0x80, 0xf4);
        let file = ElfBuilder::new(is_64, 0x50_0000).segment(0x50_0000, &code, 0x80).build();
        let kernel = KernelImage::parse(&file).unwrap();
        assert_eq!(kernel.multiboot_header().unwrap().offset(), headers);
        assert_eq!(kernel.protocols()[0], BootProtocol::Multiboot1);
        let memory = dirty_memory(16 * MIB);
        let entry = Boot::new(&kernel).load(&memory).unwrap();
        assert_eq!(entry.entry, GuestAddress(0x30_0020));
        assert_eq!(read_u32(&memory, 0x30_0000), 0x1bad_b002);
        assert_eq!(read(&memory, 0x50_0000, 1), [0xaa]);
    }
}

#[test]
fn an_elf64_with_a_header_is_loaded_by_its_segments() {
    let mut code = multiboot_header(0, &[]);
    code.resize(0x80, 0xf4);
    let file = ElfBuilder::new(true, 0x50_0010).segment(0x50_0000, &code, 0x80).build();
    let entry = load(&file, &dirty_memory(16 * MIB)).unwrap();
    assert_eq!((entry.protocol, entry.entry), (BootProtocol::Multiboot1, GuestAddress(0x50_0010)));
}

#[test]
fn unknown_requirements_are_refused() {
    let memory = dirty_memory(16 * MIB);
    for flags in [0, 0b111, 0x00fe_0000] {
        assert!(load(&multiboot_kernel(flags), &memory).is_ok(), "{flags:#x}");
    }
    for flags in [0b1000, 0x8000] {
        let error = load(&multiboot_kernel(flags), &memory).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("multiboot header flags is {flags:#x}; allowed: bits 0, 1, 2")),
            "{error}"
        );
    }
    assert!(KernelImage::parse(multiboot_kernel(4)).unwrap().multiboot_header().unwrap().wants_video_mode());
}

#[test]
fn the_information_makes_room_for_a_kernel_in_low_memory() {
    let mut code = multiboot_header(0, &[]);
    code.resize(0x9_0000, 0xf4);
    let file = ElfBuilder::new(false, 0x500).segment(0x500, &code, 0x9_0000).build();
    let memory = dirty_memory(16 * MIB);
    let entry = load(&file, &memory).unwrap();
    assert_eq!(read(&memory, 0x500, 0x9_0000), code);
    assert!(entry.info.0 >= 0x9_0500);
}

#[test]
fn a_kernel_over_the_legacy_hole_is_refused() {
    let mut code = multiboot_header(0, &[]);
    code.resize(0x80, 0xf4);
    let file = ElfBuilder::new(false, 0x9_ff90).segment(0x9_ff90, &code, 0x80).build();
    let error = load(&file, &dirty_memory(16 * MIB)).unwrap_err();
    assert!(matches!(error, BootError::Collision { with: BootItem::LegacyHole, .. }), "{error}");
}

#[test]
fn a_module_that_does_not_fit_is_named() {
    let file = multiboot_kernel(0);
    let kernel = KernelImage::parse(&file).unwrap();
    let big = vec![0; 12 * MIB];
    let error =
        Boot::new(&kernel).module(b"", "").module(&big, "").load(&dirty_memory(16 * MIB)).unwrap_err();
    let text = error.to_string();
    assert!(text.starts_with("no room for module 1: 0xc00000 bytes"), "{text}");
    assert!(text.ends_with("the largest free range there is 0xbfe000 bytes"), "{text}");
}

#[test]
fn an_rsdp_is_not_carried_and_long_command_lines_are_bounded() {
    let file = multiboot_kernel(0);
    let kernel = KernelImage::parse(&file).unwrap();
    let memory = dirty_memory(16 * MIB);
    let error = Boot::new(&kernel).rsdp(GuestAddress(0xe_0000)).load(&memory).unwrap_err();
    assert_eq!(error.to_string(), "multiboot 1 has no way to pass the ACPI RSDP to the guest");
    assert!(Boot::new(&kernel).command_line("x".repeat(4095)).load(&memory).is_ok());
    assert!(Boot::new(&kernel).command_line("x".repeat(4096)).load(&memory).is_err());
}
