//! A distribution's kernel: set `VMM_TEST_KERNEL` to the path of a bzImage to run this.

#![allow(clippy::unwrap_used)]
#![cfg(feature = "decompress")]

mod boot_support;

use boot_support::{Memory, read, read_u32};
use vm_memory::GuestAddress;
use vmm_memory::boot::{Boot, BootProtocol, ImageFormat, KernelImage};

#[test]
fn a_real_kernel_is_loaded_by_both_protocols() {
    let Some(path) = std::env::var_os("VMM_TEST_KERNEL") else {
        println!("skipped: VMM_TEST_KERNEL is not set");
        return;
    };
    let kernel = KernelImage::parse(std::fs::read(path).unwrap()).unwrap();
    assert_eq!(kernel.format(), ImageFormat::BzImage);
    println!("{:?} {:?}", kernel, kernel.payload().unwrap());

    let memory = Memory::from_ranges(&[(GuestAddress(0), 512 << 20)]).unwrap();
    let initrd = vec![0x5a; 3 << 20];
    let boot = Boot::new(&kernel).command_line("console=ttyS0").initrd(&initrd);
    let entry = boot.load(&memory).unwrap();
    println!("{entry:#x?}");
    assert_eq!(entry.protocol, BootProtocol::Linux64);
    assert_eq!(read(&memory, entry.info.0 + 0x202, 4), b"HdrS");

    let start = std::time::Instant::now();
    let elf = kernel.extract_elf().unwrap().unwrap();
    println!(
        "extracted {} bytes in {:?}: {:#x?} {:#x?}",
        elf.bytes().len(),
        start.elapsed(),
        elf.segments(),
        elf.xen_notes()
    );
    assert_eq!(elf.format(), ImageFormat::Elf64);
    if elf.xen_notes().unwrap().phys32_entry().is_some() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 512 << 20)]).unwrap();
        let entry = boot.protocol(BootProtocol::Pvh).load(&memory).unwrap();
        println!("{entry:#x?}");
        assert_eq!(read_u32(&memory, entry.info.0), 0x336e_c578);
    }
}
