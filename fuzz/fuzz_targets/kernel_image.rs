//! A kernel image and a request to start it, both hostile.
//!
//! The last bytes of the input are the request, the rest is the image: a file with a few bytes appended is a
//! seed.

#![no_main]

use arbitrary::{Arbitrary, Unstructured};
use libfuzzer_sys::fuzz_target;

// The robustness test of vmm-memory uses the rest.
#[allow(dead_code)]
#[path = "../../vmm-memory/tests/boot_support/exercise.rs"]
mod exercise;

use exercise::{Options, PROTOCOLS, exercise};

/// How many bytes of the input are the request.
const REQUEST_SIZE: usize = 24;

#[derive(Debug, Arbitrary)]
struct Request {
    protocol: u8,
    layout: u8,
    command_line: u8,
    initrd: Option<u16>,
    modules: [Option<u8>; 2],
    rsdp: bool,
    reserved: [Option<(u16, u16)>; 2],
}

impl Request {
    fn options(&self) -> Options {
        let megabytes = 16 + usize::from(self.layout >> 2) % 49;
        let ram = match self.layout & 3 {
            0 | 1 => vec![(0, megabytes << 20)],
            // No low memory, and a gap.
            2 => vec![(0x10_0000, 7 << 20), (0xa0_0000, megabytes << 20)],
            // A kernel may lie across regions, and some RAM is above 4 GiB.
            _ => vec![(0, 0x10_0000), (0x10_0000, megabytes << 20), (1 << 32, 1 << 20)],
        };
        let reserved = self.reserved.iter().flatten();
        Options {
            ram,
            protocol: PROTOCOLS[usize::from(self.protocol) % PROTOCOLS.len()],
            command_line: "x".repeat(usize::from(self.command_line)),
            initrd: self.initrd.map(|size| usize::from(size) << 4),
            modules: self.modules.iter().flatten().map(|&size| usize::from(size) << 6).collect(),
            rsdp: self.rsdp.then_some(0xe_0000),
            // Units of 256 bytes reach all but the end of the RAM.
            reserved: reserved
                .map(|&(start, size)| (u64::from(start) << 8, (u64::from(start) + u64::from(size)) << 8))
                .collect(),
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let (image, request) = data.split_at(data.len().saturating_sub(REQUEST_SIZE));
    let Ok(request) = Request::arbitrary(&mut Unstructured::new(request)) else { return };
    exercise(image, &request.options());
});
