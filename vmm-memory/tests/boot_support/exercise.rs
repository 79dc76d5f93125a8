//! What every image must survive: shared by the robustness test and the fuzz target.
//!
//! Uses nothing but the public API, so that the fuzz target can include this file.

use vmm_memory::boot::{Boot, BootEntry, BootProtocol, KernelImage};
use vmm_memory::vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// How the images are started.
#[derive(Debug, Clone)]
pub struct Options {
    /// RAM as pairs of start and size.
    pub ram: Vec<(u64, usize)>,
    /// The protocol; `None` for the image's own choice.
    pub protocol: Option<BootProtocol>,
    pub command_line: String,
    pub initrd: Option<usize>,
    /// Sizes of modules; each gets the command line as its string.
    pub modules: Vec<usize>,
    pub rsdp: Option<u64>,
    /// Start and end.
    pub reserved: Vec<(u64, u64)>,
}

/// Every protocol, and the choice of the image.
pub const PROTOCOLS: [Option<BootProtocol>; 5] = [
    None,
    Some(BootProtocol::Pvh),
    Some(BootProtocol::Linux64),
    Some(BootProtocol::Multiboot1),
    Some(BootProtocol::Flat64),
];

impl Options {
    /// 32 MiB of RAM and nothing that some protocol does not carry.
    pub fn plain(protocol: Option<BootProtocol>) -> Self {
        Self {
            ram: vec![(0, 32 << 20)],
            protocol,
            command_line: String::new(),
            initrd: None,
            modules: Vec::new(),
            rsdp: None,
            reserved: Vec::new(),
        }
    }
}

/// Parses and loads `bytes`, and checks what must hold of any image that was accepted. Returns whether it was.
pub fn exercise(bytes: &[u8], options: &Options) -> bool {
    let kernel = match KernelImage::parse(bytes) {
        Ok(kernel) => kernel,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return false;
        }
    };
    check_image(&kernel);

    let ranges: Vec<_> = options.ram.iter().map(|&(start, size)| (GuestAddress(start), size)).collect();
    let Ok(memory) = GuestMemoryMmap::<()>::from_ranges(&ranges) else { return false };
    let files: Vec<_> = options.modules.iter().map(|&size| vec![0x11; size]).collect();
    let initrd = options.initrd.map(|size| vec![0x22; size]);

    let mut boot = Boot::new(&kernel);
    if !options.command_line.is_empty() {
        boot = boot.command_line(options.command_line.as_str());
    }
    if let Some(initrd) = &initrd {
        boot = boot.initrd(initrd);
    }
    for file in &files {
        boot = boot.module(file, options.command_line.as_str());
    }
    if let Some(rsdp) = options.rsdp {
        boot = boot.rsdp(GuestAddress(rsdp));
    }
    for &(start, end) in &options.reserved {
        boot = boot.reserve(GuestAddress(start)..GuestAddress(end));
    }
    if let Some(protocol) = options.protocol {
        boot = boot.protocol(protocol);
    }
    match boot.load(&memory) {
        Ok(entry) => {
            check_entry(&kernel, &entry, &memory, options);
            assert_eq!(entry.initrd.map(|(_, size)| size), initrd.map(|initrd| initrd.len() as u64));
            assert_eq!(entry.modules.len(), files.len());
            true
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            false
        }
    }
}

fn check_image(kernel: &KernelImage<'_>) {
    assert!(!format!("{kernel:?} {} {:?}", kernel.format(), kernel.protocols()).is_empty());
    let mut end = 0;
    for segment in kernel.segments() {
        assert!(segment.paddr >= end && segment.memsz > 0 && segment.filesz <= segment.memsz, "{segment:?}");
        assert_eq!(kernel.segment_bytes(segment).map(<[u8]>::len).ok(), usize::try_from(segment.filesz).ok());
        end = segment.physical().end;
    }
    if let Ok(Some(payload)) = kernel.payload() {
        assert!(payload.compressed_size() < kernel.bytes().len());
    }
}

fn check_entry(kernel: &KernelImage<'_>, entry: &BootEntry, memory: &GuestMemoryMmap<()>, options: &Options) {
    assert!(entry.kernel.contains(&entry.entry), "{entry:?}");
    assert!(entry.entry.0 <= u32::MAX.into());
    if let Some(protocol) = options.protocol {
        assert_eq!(entry.protocol, protocol);
    }

    // What is placed beside the kernel lies in RAM, outside the legacy hole, and apart from everything else.
    let mut placed: Vec<(u64, u64)> = options.reserved.clone();
    placed.push((0xa_0000, 0x10_0000));
    // Address fields of a multiboot header replace the segments.
    let by_address = kernel.multiboot_header().is_some_and(|header| header.has_addresses());
    if entry.protocol != BootProtocol::Multiboot1 || !by_address {
        placed.extend(kernel.segments().iter().map(|segment| (segment.paddr, segment.physical().end)));
    }
    let own = [
        entry.gdt.map(|gdt| (gdt.base.0, u64::from(gdt.limit) + 1)),
        (entry.protocol != BootProtocol::Flat64).then_some((entry.info.0, 56)),
        entry.page_tables.map(|top| (top.0, 6 * 4096)),
        entry.stack.map(|stack| (stack.0 - 0x1_0000, 0x1_0000)),
        entry.initrd.map(|(start, size)| (start.0, size)),
    ];
    let modules = entry.modules.iter().map(|&(start, size)| (start.0, size));
    for (start, size) in own.into_iter().flatten().chain(modules).filter(|&(_, size)| size > 0) {
        let end = start + size;
        assert!(end <= 1 << 32, "{start:#x} {entry:?}");
        assert!(memory.check_range(GuestAddress(start), usize::try_from(size).unwrap_or(usize::MAX)));
        for &(other, other_end) in &placed {
            assert!(
                end <= other || other_end <= start,
                "{start:#x}..{end:#x} {other:#x}..{other_end:#x} {entry:?}"
            );
        }
        placed.push((start, end));
    }
    if let Some(top) = entry.page_tables {
        let directory: u64 = memory.read_obj(top).unwrap_or_default();
        assert_eq!(directory, top.0 + 0x1003);
    }

    let mut end = 0;
    for entry in &entry.memory_map {
        assert!(entry.start.0 >= end && entry.size > 0, "{entry:?}");
        end = entry.start.0 + entry.size;
    }
    // No byte of the map is RAM that is not there.
    let ram: u64 = memory.iter().map(GuestMemoryRegion::len).sum();
    let told = entry.memory_map.iter().filter(|entry| entry.kind.wire() == 1).map(|entry| entry.size);
    assert!(told.sum::<u64>() <= ram);
}
