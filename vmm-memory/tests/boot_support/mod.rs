//! Builders of small kernel images, shared by the tests of `vmm_memory::boot`.

// Each test binary uses its own part of this module, and the fuzz target includes a file of it.
#![allow(dead_code, unreachable_pub)]
#![allow(clippy::unwrap_used)]

pub mod bzimage;
pub mod elf;
pub mod exercise;
#[cfg(feature = "decompress")]
pub mod pack;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub type Memory = GuestMemoryMmap<()>;

/// RAM from 0 on, filled with 0xaa: what is not written shows.
pub fn dirty_memory(size: usize) -> Memory {
    let memory = Memory::from_ranges(&[(GuestAddress(0), size)]).unwrap();
    let fill = vec![0xaa; size];
    memory.write_slice(&fill, GuestAddress(0)).unwrap();
    memory
}

pub fn read(memory: &Memory, address: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
    bytes
}

pub fn read_u32(memory: &Memory, address: u64) -> u32 {
    u32::from_le_bytes(read(memory, address, 4).try_into().unwrap())
}

pub fn read_u64(memory: &Memory, address: u64) -> u64 {
    u64::from_le_bytes(read(memory, address, 8).try_into().unwrap())
}

/// The string at `address`, without its NUL.
pub fn read_string(memory: &Memory, address: u64) -> String {
    let bytes = (address..).map(|address| read(memory, address, 1)).take_while(|byte| byte != &[0]);
    String::from_utf8(bytes.flatten().collect()).unwrap()
}

/// Overwrites `bytes` of `file` at `offset`.
pub fn patch(file: &mut [u8], offset: usize, bytes: &[u8]) {
    file.get_mut(offset..offset + bytes.len()).unwrap().copy_from_slice(bytes);
}

/// A multiboot 1 header with these flags and, behind it, address fields if there are any.
pub fn multiboot_header(flags: u32, addresses: &[u32]) -> Vec<u8> {
    let magic: u32 = 0x1bad_b002;
    let checksum = 0_u32.wrapping_sub(magic).wrapping_sub(flags);
    [magic, flags, checksum].iter().chain(addresses).flat_map(|word| word.to_le_bytes()).collect()
}
