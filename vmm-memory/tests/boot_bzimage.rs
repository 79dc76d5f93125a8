//! bzImages: the Linux 64-bit protocol, and the ELF kernel inside.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]
#![cfg(feature = "boot")]

mod boot_support;

use boot_support::bzimage::{BzImageBuilder, SETUP_SIZE};
use boot_support::{dirty_memory, patch, read, read_string, read_u32, read_u64};
use vm_memory::GuestAddress;
use vmm_memory::boot::{Boot, BootError, BootItem, BootProtocol, Compression, ImageFormat, KernelImage};

const MIB: usize = 1 << 20;

#[test]
fn the_setup_header_is_read() {
    let file = BzImageBuilder { trailer: 100, payload: vec![0; 5], ..Default::default() }.build();
    let kernel = KernelImage::parse(&file).unwrap();
    assert_eq!(kernel.format(), ImageFormat::BzImage);
    assert_eq!(kernel.protocols(), [BootProtocol::Linux64, BootProtocol::Pvh]);
    let header = kernel.setup_header().unwrap();
    assert_eq!((header.version(), header.is_64bit(), header.is_relocatable()), (0x020f, true, true));
    assert_eq!((header.preferred_address(), header.init_size()), (0x100_0000, 0x40_0000));
    assert_eq!((header.kernel_alignment(), header.command_line_limit()), (0x20_0000, 2047));
    assert!(kernel.segments().is_empty() && kernel.xen_notes().is_none());
}

#[test]
fn boot_params_say_what_was_given() {
    let file = BzImageBuilder { trailer: 100, ..Default::default() }.build();
    let kernel = KernelImage::parse(&file).unwrap();
    let memory = dirty_memory(64 * MIB);
    let entry = Boot::new(&kernel)
        .command_line("console=ttyS0 panic=-1")
        .initrd(&[9; 4097])
        .rsdp(GuestAddress(0xe_0000))
        .reserve(GuestAddress(0xfec0_0000)..GuestAddress(0xfec0_1000))
        .load(&memory)
        .unwrap();
    assert_eq!(entry.protocol, BootProtocol::Linux64);
    assert_eq!(entry.entry, GuestAddress(0x100_0200));
    assert_eq!(entry.kernel, GuestAddress(0x100_0000)..GuestAddress(0x140_0000));
    assert_eq!(read(&memory, 0x100_0000, 0x240), [0xcc; 0x240]);
    assert_eq!(read(&memory, 0x100_0240, 1), [0xaa], "what follows the kernel in the file is not loaded");

    let params = entry.info.0;
    // The header as in the file, but for what the loader fills in.
    assert_eq!(read(&memory, params + 0x1fe, 2), [0x55, 0xaa]);
    assert_eq!(read(&memory, params + 0x202, 6), *b"HdrS\x0f\x02");
    assert_eq!(read(&memory, params + 0x210, 2), [0xff, 1], "type_of_loader, loadflags");
    assert_eq!(read_u32(&memory, params + 0x214), 0x100_0000, "code32_start");
    assert_eq!(read_u64(&memory, params + 0x250), 0, "setup_data");
    assert_eq!(read(&memory, params + 0x1ef, 1), [0], "sentinel");
    assert_eq!(read(&memory, params, 0x70), [0; 0x70]);
    assert_eq!(read_string(&memory, read_u32(&memory, params + 0x228).into()), "console=ttyS0 panic=-1");
    assert_eq!(read_u64(&memory, params + 0x70), 0xe_0000);

    let (initrd, size) = entry.initrd.unwrap();
    assert_eq!((initrd.0, size), (0x3ff_e000, 4097));
    assert_eq!([0x218, 0x21c].map(|at| read_u32(&memory, params + at)), [0x3ff_e000, 4097]);
    assert_eq!(read(&memory, initrd.0, 4097), [9; 4097]);

    assert_eq!(read(&memory, params + 0x1e8, 1), [3]);
    let table = [0, 1, 2].map(|index| params + 0x2d0 + index * 20);
    let table =
        table.map(|at| (read_u64(&memory, at), read_u64(&memory, at + 8), read_u32(&memory, at + 16)));
    assert_eq!(table, [(0, 0xa_0000, 1), (0x10_0000, 0x3f0_0000, 1), (0xfec0_0000, 0x1000, 2)]);

    let gdt = entry.gdt.unwrap();
    assert_eq!((gdt.code, gdt.data), (0x10, 0x18));
    assert_eq!(read_u64(&memory, gdt.base.0 + 0x10), 0x00af_9b00_0000_ffff);
    assert!(entry.page_tables.is_some());
}

#[test]
fn the_initrd_stays_below_its_limit() {
    let file = BzImageBuilder { initrd_addr_max: 0x2ff_ffff, ..Default::default() }.build();
    let kernel = KernelImage::parse(&file).unwrap();
    let entry = Boot::new(&kernel).initrd(&[1; 4096]).load(&dirty_memory(64 * MIB)).unwrap();
    assert_eq!(entry.initrd, Some((GuestAddress(0x2ff_f000), 4096)));

    let file = BzImageBuilder { initrd_addr_max: 0x10_0000, ..Default::default() }.build();
    let kernel = KernelImage::parse(&file).unwrap();
    let error = Boot::new(&kernel).initrd(&[1; 4096]).load(&dirty_memory(64 * MIB)).unwrap_err();
    assert!(error.to_string().contains("in 0x100000..0x100001"), "{error}");
}

#[test]
fn a_relocatable_kernel_moves_up_and_another_does_not() {
    let taken = GuestAddress(0x110_0000)..GuestAddress(0x110_1000);
    let file = BzImageBuilder::default().build();
    let kernel = KernelImage::parse(&file).unwrap();
    let entry = Boot::new(&kernel).reserve(taken.clone()).load(&dirty_memory(64 * MIB)).unwrap();
    assert_eq!(entry.entry, GuestAddress(0x120_0200));

    let error = Boot::new(&kernel).load(&dirty_memory(18 * MIB)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no room for the kernel: 0x400000 bytes aligned to 0x200000 in 0x1000000..0xfffff000; \
         the largest free range there is 0x200000 bytes"
    );

    let file = BzImageBuilder { relocatable: 0, ..Default::default() }.build();
    let kernel = KernelImage::parse(&file).unwrap();
    let error = Boot::new(&kernel).reserve(taken).load(&dirty_memory(64 * MIB)).unwrap_err();
    assert!(matches!(error, BootError::Collision { item: BootItem::Kernel, .. }), "{error}");
}

#[test]
fn each_wrong_field_is_named() {
    let plain = || BzImageBuilder::default();
    for (builder, text) in [
        (BzImageBuilder { version: 0x205, ..plain() }, "version is 0x205; allowed: at least 0x206"),
        (BzImageBuilder { loadflags: 0, ..plain() }, "loadflags is 0x0; allowed: bit 0 (LOADED_HIGH)"),
        (BzImageBuilder { alignment: 0, ..plain() }, "kernel_alignment is 0x0; allowed: a power of two"),
        (BzImageBuilder { alignment: 0x3000, ..plain() }, "kernel_alignment is 0x3000"),
        (BzImageBuilder { pref_address: 0x1000, ..plain() }, "pref_address is 0x1000"),
        (BzImageBuilder { pref_address: 1 << 32, ..plain() }, "pref_address is 0x100000000"),
    ] {
        let error = KernelImage::parse(builder.build()).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
    let mut file = plain().build();
    patch(&mut file, 0x1f4, &[0xff, 0xff]);
    let error = KernelImage::parse(&file[..]).unwrap_err().to_string();
    assert!(error.contains("(setup_sects, syssize): 0xffff0 bytes at offset 0x600 exceed"), "{error}");
    patch(&mut file, 0x1f4, &[0x20, 0]);
    let error = KernelImage::parse(&file[..]).unwrap_err().to_string();
    assert!(error.contains("syssize is 0x20; allowed: at least 0x21"), "{error}");
    let short = KernelImage::parse(&file[..0x220]).unwrap_err().to_string();
    assert!(short.starts_with("setup header: 0x7b bytes at offset 0x1f1"), "{short}");
}

#[test]
fn the_last_unit_of_the_kernel_may_be_short() {
    let mut file = BzImageBuilder::default().build();
    file.truncate(file.len() - 15);
    assert!(KernelImage::parse(&file[..]).is_ok());
    file.truncate(file.len() - 1);
    assert!(matches!(KernelImage::parse(&file[..]), Err(BootError::Truncated { .. })));
}

#[test]
fn a_kernel_without_the_64_bit_entry_does_not_offer_it() {
    for builder in [
        BzImageBuilder { xloadflags: 0, ..Default::default() },
        // The field means something else in this version.
        BzImageBuilder { version: 0x20b, ..Default::default() },
    ] {
        let file = builder.build();
        let kernel = KernelImage::parse(&file).unwrap();
        assert_eq!(kernel.protocols(), []);
        let error = Boot::new(&kernel).load(&dirty_memory(MIB)).unwrap_err();
        assert!(matches!(error, BootError::NoProtocol { format: ImageFormat::BzImage }), "{error}");
        let boot = Boot::new(&kernel).protocol(BootProtocol::Linux64);
        let error = boot.load(&dirty_memory(64 * MIB)).unwrap_err().to_string();
        assert!(error.ends_with("XLF_KERNEL_64 is not set in xloadflags"), "{error}");
    }
}

#[test]
fn the_command_line_limit_is_the_header_s() {
    let file = BzImageBuilder { cmdline_size: 10, ..Default::default() }.build();
    let kernel = KernelImage::parse(&file).unwrap();
    let memory = dirty_memory(64 * MIB);
    assert!(Boot::new(&kernel).command_line("0123456789").load(&memory).is_ok());
    let error = Boot::new(&kernel).command_line("0123456789a").load(&memory).unwrap_err();
    assert!(matches!(error, BootError::CommandLineTooLong { length: 11, limit: 10, .. }), "{error}");
}

#[test]
fn linux_takes_no_modules_and_at_most_128_map_entries() {
    let file = BzImageBuilder::default().build();
    let kernel = KernelImage::parse(&file).unwrap();
    let memory = dirty_memory(64 * MIB);
    let error = Boot::new(&kernel).module(b"x", "").load(&memory).unwrap_err();
    assert!(matches!(error, BootError::NotCarried { item: BootItem::Module(0), .. }), "{error}");

    // Each reserved range above RAM is an entry; RAM itself is two.
    let mut boot = Boot::new(&kernel);
    for index in 0..126_u64 {
        let start = 0x8000_0000 + index * 0x2000;
        boot = boot.reserve(GuestAddress(start)..GuestAddress(start + 0x1000));
    }
    assert_eq!(boot.load(&memory).unwrap().memory_map.len(), 128);
    let error = boot.reserve(GuestAddress(0x7000_0000)..GuestAddress(0x7000_1000)).load(&memory).unwrap_err();
    assert!(matches!(error, BootError::MemoryMapTooLong { entries: 129, limit: 128, .. }), "{error}");
}

#[test]
fn an_image_without_payload_says_so() {
    let kernel = KernelImage::parse(BzImageBuilder::default().build()).unwrap();
    assert!(matches!(kernel.payload(), Err(BootError::NoPayload { length: 0 })));
    let builder = BzImageBuilder { payload: vec![1; 8], ..Default::default() };
    let mut file = builder.build();
    patch(&mut file, 0x24c, &[0x11]);
    let error = KernelImage::parse(&file[..]).unwrap().payload().unwrap_err().to_string();
    assert!(error.contains("payload_offset + payload_length is 0x251; allowed: at most 0x250"), "{error}");
    let old = BzImageBuilder { version: 0x207, ..builder }.build();
    assert!(matches!(KernelImage::parse(old).unwrap().payload(), Err(BootError::NoPayload { .. })));
}

#[test]
fn a_compression_that_cannot_be_undone_is_named() {
    let payload = b"BZh91AY&SY....".to_vec();
    let file = BzImageBuilder { payload, init_size: 0x7fff_ffff, ..Default::default() };
    let mut file = file.build();
    patch(&mut file, SETUP_SIZE + 0x240 + 10, &[0; 4]);
    let kernel = KernelImage::parse(file).unwrap();
    assert_eq!(kernel.payload().unwrap().unwrap().compression(), Compression::Bzip2);
    let error = kernel.extract_elf().unwrap_err().to_string();
    assert!(error.contains("[42, 5a, 68, 39, 31, 41] (bzip2)"), "{error}");
}

#[test]
fn other_formats_have_no_payload() {
    let kernel = KernelImage::parse(boot_support::elf::pvh_kernel()).unwrap();
    assert!(kernel.payload().unwrap().is_none());
    assert!(kernel.extract_elf().unwrap().is_none());
}

#[cfg(feature = "decompress")]
mod payload {
    use super::*;
    use boot_support::elf::{flat_kernel, pvh_kernel};
    use boot_support::pack;
    use vmm_memory::boot::{MAX_PAYLOAD_SIZE, ProducedSize};

    fn image(payload: Vec<u8>) -> KernelImage<'static> {
        KernelImage::parse(BzImageBuilder { payload, init_size: 0x400_0000, ..Default::default() }.build())
            .unwrap()
    }

    /// `pvh_kernel` with bytes that compress badly and make more than one block of any format.
    fn large_elf() -> Vec<u8> {
        let mut elf = pvh_kernel();
        let mut state = 1_u32;
        while elf.len() < 9 * MIB {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            elf.extend([(state >> 24) as u8, 0xe8, 0, 0, 0, 0, 0, 0]);
        }
        elf
    }

    #[test]
    fn every_format_is_extracted() {
        for (name, pack) in pack::ALL {
            let kernel = image(pack(&pvh_kernel()));
            let payload = kernel.payload().unwrap().unwrap();
            assert_eq!(
                (payload.compression().to_string().as_str(), payload.declared_size()),
                (name, pvh_kernel().len() as u64)
            );
            let elf = kernel.extract_elf().unwrap().unwrap();
            assert_eq!(elf.bytes(), pvh_kernel(), "{name}");
        }
    }

    #[test]
    fn payloads_of_many_blocks_are_extracted() {
        let elf = large_elf();
        for (name, pack) in pack::ALL.into_iter().chain([("lz4", pack::lz4_with_end_mark as pack::Pack)]) {
            let extracted = image(pack(&elf)).extract_elf().unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(extracted.unwrap().bytes() == elf, "{name}");
        }
    }

    #[test]
    fn pvh_uses_the_elf_inside() {
        let kernel = image(pack::lz4(&pvh_kernel()));
        let memory = dirty_memory(64 * MIB);
        let boot = Boot::new(&kernel).protocol(BootProtocol::Pvh).command_line("x").initrd(&[1; 4096]);
        let entry = boot.load(&memory).unwrap();
        assert_eq!((entry.protocol, entry.entry), (BootProtocol::Pvh, GuestAddress(0x10_0010)));
        assert_eq!(read(&memory, 0x20_0000, 4), *b"data");
        assert_eq!(read_u32(&memory, entry.info.0), 0x336e_c578);

        let kernel = image(pack::lz4(&flat_kernel()));
        let error = Boot::new(&kernel).protocol(BootProtocol::Pvh).load(&memory).unwrap_err().to_string();
        assert!(error.ends_with("its payload has no Xen note PHYS32_ENTRY"), "{error}");
    }

    #[test]
    fn a_payload_that_is_no_elf_is_refused() {
        let error = image(pack::gzip(b"not an ELF file")).extract_elf().unwrap_err().to_string();
        assert!(error.contains("e_ident magic of the payload is 0x20746f6e"), "{error}");
    }

    #[test]
    fn more_output_than_the_image_asks_memory_for_is_refused() {
        let file = BzImageBuilder {
            payload: pack::zstd(&vec![0; 0x2_0001]),
            init_size: 0x2_0000,
            ..Default::default()
        };
        let error = KernelImage::parse(file.build()).unwrap().extract_elf().unwrap_err().to_string();
        assert_eq!(
            error,
            "the payload declares 0x20001 bytes of output, above the limit 0x20000 set by init_size"
        );

        let file = BzImageBuilder { payload: vec![0xff; 64], init_size: u32::MAX, ..Default::default() };
        let error = KernelImage::parse(file.build()).unwrap().extract_elf().unwrap_err();
        assert!(matches!(error, BootError::PayloadTooLarge { limit: MAX_PAYLOAD_SIZE, .. }), "{error}");
    }

    #[test]
    fn a_bomb_is_stopped_at_the_size_it_declares() {
        let bomb = vec![0; 32 * MIB];
        for (name, pack) in pack::ALL {
            let mut payload = pack(&bomb);
            let at = payload.len() - 4;
            patch(&mut payload, at, &4096_u32.to_le_bytes());
            let error = image(payload).extract_elf().unwrap_err();
            let more =
                matches!(error, BootError::PayloadSize { declared: 4096, produced: ProducedSize::More, .. });
            assert!(more, "{name}: {error}");
        }
    }

    #[test]
    fn less_output_than_declared_is_refused() {
        let elf = pvh_kernel();
        for (name, pack) in pack::ALL.into_iter().filter(|&(name, _)| name != "gzip") {
            let mut payload = pack(&elf);
            let at = payload.len() - 4;
            patch(&mut payload, at, &u32::try_from(elf.len() + 1).unwrap().to_le_bytes());
            let error = image(payload).extract_elf().unwrap_err();
            let expected = ProducedSize::Bytes(elf.len() as u64);
            let less = matches!(error, BootError::PayloadSize { produced, .. } if produced == expected);
            assert!(less, "{name}: {error}");
        }
    }

    #[test]
    fn damage_is_noticed_in_every_format() {
        let elf = pvh_kernel();
        for (name, pack) in pack::ALL {
            let payload = pack(&elf);
            for cut in 6..payload.len() - 4 {
                let mut short = payload[..cut].to_vec();
                short.extend(&payload[payload.len() - 4..]);
                assert!(image(short).extract_elf().is_err(), "{name} cut at {cut}");
            }
        }
    }

    #[test]
    fn lz4_blocks_that_produce_nothing_cost_next_to_nothing() {
        let mut payload = 0x184c_2102_u32.to_le_bytes().to_vec();
        for _ in 0..1_000_000 {
            payload.extend([1, 0, 0, 0, 0]);
        }
        let start = std::time::Instant::now();
        let error = image(pack::with_size(payload, 0x300_0000)).extract_elf().unwrap_err();
        assert!(matches!(error, BootError::PayloadSize { produced: ProducedSize::Bytes(0), .. }), "{error}");
        assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
    }

    #[test]
    fn checksums_are_compared() {
        // Formats with a checksum: a change of literal data must not pass unseen.
        for (name, pack) in [("gzip", pack::gzip as pack::Pack), ("zstd", pack::zstd), ("xz", pack::xz)] {
            let elf = pvh_kernel();
            let payload = pack(&elf);
            for at in 0..payload.len() - 4 {
                let mut changed = payload.clone();
                changed[at] ^= 0x10;
                if let Ok(extracted) = image(changed).extract_elf() {
                    assert_eq!(extracted.unwrap().bytes(), elf, "{name} changed at {at}");
                }
            }
        }
    }
}
