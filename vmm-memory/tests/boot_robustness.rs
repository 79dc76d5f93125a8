//! No image makes the loader panic or take long: small valid images, damaged in every place.

#![allow(clippy::unwrap_used, clippy::indexing_slicing)]
#![cfg(feature = "boot")]

mod boot_support;

use std::time::{Duration, Instant};

use boot_support::bzimage::{BzImageBuilder, SETUP_SIZE};
use boot_support::elf::{ElfBuilder, flat_kernel, multiboot_kernel, pvh_kernel};
use boot_support::exercise::{Options, PROTOCOLS, exercise};
use boot_support::multiboot_header;
use vmm_memory::boot::BootProtocol;

/// Valid images of every kind, small so that every byte of them can be changed.
fn images() -> Vec<(&'static str, Vec<u8>)> {
    let mut binary = multiboot_header(1 << 16, &[0x10_0000, 0x10_0000, 0, 0x10_4000, 0x10_0020]);
    binary.resize(0x80, 0xf4);
    let elf32_pvh =
        ElfBuilder::new(false, 0x10_0000).segment(0x10_0000, b"code", 0x1000).pvh(0x10_0000).build();
    let small = |payload| BzImageBuilder { payload, init_size: 0x10_0000, ..Default::default() }.build();
    #[cfg_attr(not(feature = "decompress"), allow(unused_mut))]
    let mut images = vec![
        ("pvh", pvh_kernel()),
        ("flat", flat_kernel()),
        ("multiboot", multiboot_kernel(3)),
        ("binary", binary),
        ("elf32 pvh", elf32_pvh),
        ("bzImage", small(Vec::new())),
    ];
    #[cfg(feature = "decompress")]
    for (name, pack) in boot_support::pack::ALL {
        images.push((name, small(pack(&pvh_kernel()))));
    }
    images
}

/// The protocols worth trying with an image: all for an ELF, both kinds of start for a bzImage.
fn options() -> Vec<Options> {
    let mut options: Vec<_> = PROTOCOLS.into_iter().map(Options::plain).collect();
    let mut full = Options::plain(None);
    full.command_line = "x".to_owned();
    full.initrd = Some(5000);
    options.push(full);
    options
}

#[test]
fn every_image_is_accepted_undamaged() {
    for (name, image) in images() {
        assert!(options().iter().any(|options| exercise(&image, options)), "{name}");
    }
}

#[test]
fn no_truncation_panics() {
    for (_, image) in images() {
        for length in 0..image.len() {
            // Headers decide; in the long rest of a bzImage every eighth length is enough.
            if length < 0x280 || length % 8 == 0 {
                exercise(&image[..length], &Options::plain(None));
                exercise(&image[..length], &Options::plain(Some(BootProtocol::Pvh)));
            }
        }
    }
}

/// The bytes of an image that the loader looks at: not the boot sector's code, the rest of the real-mode
/// code, or the fill of the kernel.
fn is_looked_at(image: &[u8], at: usize) -> bool {
    image[..4] == *b"\x7fELF" || image.len() < SETUP_SIZE || {
        (0x1f0..0x270).contains(&at) || at >= SETUP_SIZE && image[at] != 0xcc
    }
}

#[test]
fn no_change_of_a_byte_panics() {
    let options = options();
    for (_, image) in images() {
        let mut changed = image.clone();
        for at in (0..image.len()).filter(|&at| is_looked_at(&image, at)) {
            for (index, value) in
                [0, 0xff, image[at] ^ 0x80, image[at].wrapping_add(1)].into_iter().enumerate()
            {
                changed[at] = value;
                exercise(&changed, &options[(at + index) % options.len()]);
            }
            // The protocol that decompresses, if there is anything to decompress.
            exercise(&changed, &Options::plain(Some(BootProtocol::Pvh)));
            changed[at] = image[at];
        }
    }
}

#[test]
fn no_extreme_word_panics() {
    let words = [0, 1, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 0xffff_f000];
    for (_, image) in images() {
        let mut changed = image.clone();
        for at in (0..image.len().min(0x270) - 8).step_by(4).filter(|&at| is_looked_at(&image, at)) {
            for low in words {
                for high in [0, 1, 0xffff_ffff_u32] {
                    changed[at..at + 4].copy_from_slice(&u32::to_le_bytes(low));
                    changed[at + 4..at + 8].copy_from_slice(&high.to_le_bytes());
                    exercise(&changed, &Options::plain(None));
                }
            }
            changed[at..at + 8].copy_from_slice(&image[at..at + 8]);
        }
    }
}

#[test]
fn many_headers_take_no_more_than_linear_time() {
    // As many segments as the format allows, each its own page of RAM or nothing, in descending order.
    let mut builder = ElfBuilder::new(true, 0x10_0000);
    for index in (0..65_534_u64).rev() {
        builder = builder.segment(0x10_0000 + index * 0x100, b"x", 0x100);
    }
    let file = builder.build();
    let start = Instant::now();
    assert!(exercise(&file, &Options::plain(None)));
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

/// Writes the images, each with requests as the fuzz target `kernel_image` reads them behind it.
#[test]
#[ignore = "writes the fuzz target's seeds instead of testing"]
fn write_fuzz_seeds() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/kernel_image");
    std::fs::create_dir_all(corpus).unwrap();
    for (name, image) in images() {
        for protocol in 0..u8::try_from(PROTOCOLS.len()).unwrap() {
            let mut seed = image.clone();
            seed.push(protocol);
            seed.resize(image.len() + 24, 0);
            std::fs::write(format!("{corpus}/{name}-{protocol}"), seed).unwrap();
        }
    }
}
