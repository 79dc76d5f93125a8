//! Loading a kernel image into guest memory, ready to be entered.
//!
//! ```
//! use vmm_memory::boot::{Boot, BootError, BootEntry, KernelImage};
//! use vmm_memory::GuestMemoryMap;
//!
//! fn load(kernel: &[u8], initrd: &[u8], memory: &GuestMemoryMap) -> Result<BootEntry, BootError> {
//!     let kernel = KernelImage::parse(kernel)?;
//!     Boot::new(&kernel).command_line("console=ttyS0").initrd(initrd).load(memory)
//! }
//! ```
//!
//! [`KernelImage`] tells ELF64, ELF32, bzImage and multiboot binaries apart and checks their headers.
//! [`Boot`] places the image, what it is given, and the tables that its [`BootProtocol`] wants; the
//! [`BootEntry`] that it returns is what a virtual CPU's registers are set from. All contents of memory are
//! written here, so that no backend has to know a boot protocol.
//!
//! | what | where, if that is free | otherwise |
//! |---|---|---|
//! | boot GDT | 0x500 | lowest free address |
//! | `hvm_start_info` or multiboot information, with tables and strings | 0x6000 | lowest free address |
//! | `boot_params` | 0x7000 | lowest free address |
//! | identity map, 24 KiB | 0x9000 | lowest free address |
//! | stack of a flat guest, 64 KiB | 0x10000 | lowest free address |
//! | Linux command line | 0x20000 | lowest free address |
//! | ELF segments, multiboot binaries | where the image says | refused |
//! | bzImage | its preferred address | higher, if it is relocatable |
//! | initrd and modules for Linux and PVH | as high as allowed below 4 GiB | refused |
//! | multiboot modules | behind the kernel | refused |
//!
//! "Lowest free address" is from 0x1000 to 0x9efff, then from 1 MiB on. Nothing is placed in the 640 KiB to
//! 1 MiB hole, in a reserved range, or over anything else.
//!
//! # Threat model
//!
//! The image and all that is in it is hostile, memory layout and options are the caller's own. No image
//! makes the loader panic, write outside guest memory, or allocate more than
//! [`MAX_PAYLOAD_SIZE`] and a constant factor of the image's size; an error names the field that is wrong.
//! That is why the loaders of `linux-loader`, whose errors name no field and which do not zero `.bss`, are
//! not used here; its definitions of the structures are.

mod bzimage;
mod cpu_tables;
mod e820;
mod elf;
mod error;
mod image;
mod loader;
mod multiboot;
mod notes;
mod payload;
mod protocol;
mod room;
mod target;

pub use bzimage::SetupHeader;
pub use cpu_tables::GdtLocation;
pub use e820::{E820Entry, E820Kind};
pub use elf::LoadSegment;
pub use error::{BootError, BootItem, ProducedSize};
pub use image::{BootProtocol, ImageFormat, KernelImage};
pub use loader::{Boot, BootEntry};
pub use multiboot::MultibootHeader;
pub use notes::XenNotes;
pub use payload::{Compression, MAX_PAYLOAD_SIZE, Payload};
