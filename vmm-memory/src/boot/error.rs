//! What can be wrong with an image, or with the request to place it.

use std::borrow::Cow;
use std::fmt;

use vm_memory::GuestMemoryError;

use super::{BootProtocol, Compression, ImageFormat};

/// A thing that is placed in guest memory, as errors name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum BootItem {
    /// The loadable segment of this program header (index in the ELF program header table).
    Segment(usize),
    /// A kernel that is one block: a bzImage or a multiboot image with address fields.
    Kernel,
    /// The command line, with its terminating NUL.
    CommandLine,
    /// The initial RAM disk.
    Initrd,
    /// A further boot module, by its position among the calls of `Boot::module`.
    Module(usize),
    /// `hvm_start_info`, `boot_params` or the multiboot information, with the tables it points to.
    BootInfo,
    /// The identity map of the first 4 GiB.
    PageTables,
    /// The boot GDT.
    Gdt,
    /// The initial stack.
    Stack,
    /// The ACPI root pointer.
    Rsdp,
    /// A range that the caller reserved.
    Reserved,
    /// The PC's 640 KiB to 1 MiB area, which holds video memory and firmware instead of RAM.
    LegacyHole,
}

impl fmt::Display for BootItem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Segment(index) => write!(f, "the segment of program header {index}"),
            Self::Kernel => f.write_str("the kernel"),
            Self::CommandLine => f.write_str("the command line"),
            Self::Initrd => f.write_str("the initrd"),
            Self::Module(index) => write!(f, "module {index}"),
            Self::BootInfo => f.write_str("the boot information"),
            Self::PageTables => f.write_str("the identity map"),
            Self::Gdt => f.write_str("the boot GDT"),
            Self::Stack => f.write_str("the boot stack"),
            Self::Rsdp => f.write_str("the ACPI RSDP"),
            Self::Reserved => f.write_str("a reserved range"),
            Self::LegacyHole => f.write_str("the 640 KiB to 1 MiB hole"),
        }
    }
}

/// Why an image was refused or could not be placed.
///
/// Addresses in messages are guest-physical, sizes are in bytes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// The bytes are in none of the known formats.
    #[error(
        "no kernel image: {length} bytes with no ELF magic, no bzImage setup header (0xaa55 at 0x1fe, \
         \"HdrS\" at 0x202) and no multiboot 1 header with address fields in the first 8192 bytes"
    )]
    Unrecognised {
        /// Size of the input.
        length: usize,
    },

    /// A structure reaches past the end of the file.
    #[error("{what}: {length:#x} bytes at offset {offset:#x} exceed the file size {file_size:#x}")]
    Truncated {
        /// The structure, by the names of the fields that locate it.
        what: Cow<'static, str>,
        /// Where it starts in the file.
        offset: u64,
        /// How long it is.
        length: u64,
        /// Size of the file.
        file_size: u64,
    },

    /// A field has a value outside its range.
    #[error("{field} is {value:#x}; allowed: {allowed}")]
    Field {
        /// The field, by its name in the specification.
        field: Cow<'static, str>,
        /// The value found.
        value: u64,
        /// What would have been accepted.
        allowed: Cow<'static, str>,
    },

    /// The file content of a segment reaches past the end of the file.
    #[error(
        "program header {index}: p_offset {offset:#x} + p_filesz {filesz:#x} exceeds the file size {file_size:#x}"
    )]
    SegmentOutsideFile {
        /// Index in the program header table.
        index: usize,
        /// `p_offset`.
        offset: u64,
        /// `p_filesz`.
        filesz: u64,
        /// Size of the file.
        file_size: u64,
    },

    /// A segment has more bytes in the file than in memory.
    #[error("program header {index}: p_filesz {filesz:#x} exceeds p_memsz {memsz:#x}")]
    SegmentSize {
        /// Index in the program header table.
        index: usize,
        /// `p_filesz`.
        filesz: u64,
        /// `p_memsz`.
        memsz: u64,
    },

    /// A segment wraps around the end of the address space of its ELF class.
    #[error("program header {index}: {field} {address:#x} + p_memsz {memsz:#x} exceeds {limit:#x}")]
    SegmentWraps {
        /// Index in the program header table.
        index: usize,
        /// `p_paddr` or `p_vaddr`.
        field: &'static str,
        /// Its value.
        address: u64,
        /// `p_memsz`.
        memsz: u64,
        /// Last address of the class: 2^32 - 1 or 2^64 - 1.
        limit: u64,
    },

    /// Two segments claim the same physical memory.
    #[error(
        "program headers {first} and {second} overlap: p_paddr {second_paddr:#x} is below {first_end:#x}, \
         the end of the other segment"
    )]
    SegmentsOverlap {
        /// Index of the segment that starts lower.
        first: usize,
        /// Index of the segment that starts higher.
        second: usize,
        /// Physical end (exclusive) of the lower one.
        first_end: u64,
        /// `p_paddr` of the higher one.
        second_paddr: u64,
    },

    /// An ELF file has nothing to load.
    #[error("no program header of type PT_LOAD with a p_memsz above 0 among e_phnum {phnum}")]
    NoSegments {
        /// Number of program headers.
        phnum: usize,
    },

    /// An entry address points outside the bytes that the image loads.
    #[error("{field} {entry:#x} is outside the file content of every loaded segment")]
    EntryOutsideImage {
        /// Where the entry address was found.
        field: &'static str,
        /// The entry address.
        entry: u64,
    },

    /// A note segment or a Xen note is malformed.
    #[error("{place}: {problem}")]
    Note {
        /// The note, or the program header that holds it.
        place: Cow<'static, str>,
        /// What is wrong.
        problem: Cow<'static, str>,
    },

    /// The image has no entry point for any protocol.
    #[error(
        "an image of format {format} has no known entry without a PVH note, a multiboot 1 header \
         or, in a bzImage, XLF_KERNEL_64 or a payload"
    )]
    NoProtocol {
        /// The image's format.
        format: ImageFormat,
    },

    /// The image cannot be started by the requested protocol.
    #[error("the image does not offer {protocol}: {reason}")]
    NotOffered {
        /// The protocol that was asked for.
        protocol: BootProtocol,
        /// What the image lacks.
        reason: &'static str,
    },

    /// The protocol has no place for something that was given.
    #[error("{protocol} has no way to pass {item} to the guest")]
    NotCarried {
        /// What was given.
        item: BootItem,
        /// The protocol in use.
        protocol: BootProtocol,
    },

    /// A command line or module string is too long.
    #[error("{item} is {length} bytes long; {protocol} allows {limit} without the NUL")]
    CommandLineTooLong {
        /// The command line, or the module whose string it is.
        item: BootItem,
        /// Length in bytes without a NUL.
        length: usize,
        /// Longest accepted length.
        limit: usize,
        /// The protocol in use.
        protocol: BootProtocol,
    },

    /// A command line or module string has a NUL inside.
    #[error("the string of {item} has a NUL at byte {position}; none is allowed")]
    CommandLineNul {
        /// The command line, or the module whose string it is.
        item: BootItem,
        /// Byte offset of the first NUL.
        position: usize,
    },

    /// There is no free memory of the needed size.
    #[error(
        "no room for {item}: {size:#x} bytes aligned to {align:#x} in {from:#x}..{to:#x}; \
         the largest free range there is {largest:#x} bytes"
    )]
    NoRoom {
        /// What was to be placed.
        item: BootItem,
        /// Its size.
        size: u64,
        /// Its alignment.
        align: u64,
        /// Lowest acceptable address.
        from: u64,
        /// End (exclusive) of the acceptable range.
        to: u64,
        /// Size of the largest free piece of that range.
        largest: u64,
    },

    /// Something with a fixed address is not wholly in RAM.
    #[error("{item} needs {start:#x}..{end:#x}, which is not all guest RAM")]
    NotRam {
        /// What was to be placed.
        item: BootItem,
        /// First address.
        start: u64,
        /// End (exclusive).
        end: u64,
    },

    /// Something with a fixed address collides with something placed before.
    #[error("{item} needs {start:#x}..{end:#x}, which overlaps {with} at {with_start:#x}..{with_end:#x}")]
    Collision {
        /// What was to be placed.
        item: BootItem,
        /// First address.
        start: u64,
        /// End (exclusive).
        end: u64,
        /// What is there already.
        with: BootItem,
        /// Its first address.
        with_start: u64,
        /// Its end (exclusive).
        with_end: u64,
    },

    /// Two reserved ranges overlap.
    #[error("reserved ranges {first:#x}..{first_end:#x} and {second:#x}..{second_end:#x} overlap")]
    ReservedOverlap {
        /// Start of the lower range.
        first: u64,
        /// End (exclusive) of the lower range.
        first_end: u64,
        /// Start of the higher range.
        second: u64,
        /// End (exclusive) of the higher range.
        second_end: u64,
    },

    /// The memory map has more entries than the protocol's table.
    #[error("the memory map has {entries} entries; {protocol} allows {limit}")]
    MemoryMapTooLong {
        /// Number of entries.
        entries: usize,
        /// Entries that the table holds.
        limit: usize,
        /// The protocol in use.
        protocol: BootProtocol,
    },

    /// A bzImage has no payload that could be extracted.
    #[error(
        "the bzImage has no payload: payload_length is {length:#x}; allowed: at least 5 (boot protocol 2.08)"
    )]
    NoPayload {
        /// `payload_length`.
        length: u32,
    },

    /// The payload is compressed in a way that this build cannot undo.
    #[error("a payload with magic {magic:02x?} ({compression}) cannot be decompressed by this build")]
    UnsupportedCompression {
        /// What the magic says.
        compression: Compression,
        /// The payload's first bytes, as many as there are.
        magic: [u8; 6],
    },

    /// The payload declares more output than is acceptable.
    #[error("the payload declares {size:#x} bytes of output, above the limit {limit:#x} set by {limit_from}")]
    PayloadTooLarge {
        /// Size in the payload's last four bytes.
        size: u64,
        /// Largest accepted size.
        limit: u64,
        /// Where the limit comes from: `init_size` or the crate's own cap.
        limit_from: &'static str,
    },

    /// The payload's output is not as long as declared.
    #[error("the {compression} payload declares {declared:#x} bytes of output and produces {produced}")]
    PayloadSize {
        /// How the payload is compressed.
        compression: Compression,
        /// Size in the payload's last four bytes.
        declared: u64,
        /// What came out.
        produced: ProducedSize,
    },

    /// The compressed data is damaged.
    #[error("the {compression} payload cannot be decompressed: {problem}")]
    Decompress {
        /// How the payload is compressed.
        compression: Compression,
        /// What the decompressor said.
        problem: String,
    },

    /// Guest memory refused a write.
    #[error("writing {item} at {address:#x}: {source}")]
    Write {
        /// What was being written.
        item: BootItem,
        /// Where.
        address: u64,
        /// What vm-memory said.
        source: GuestMemoryError,
    },
}

/// How much a decompressor produced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProducedSize {
    /// Exactly this many bytes, fewer than declared.
    Bytes(u64),
    /// More than declared; the rest was not decompressed.
    More,
}

impl fmt::Display for ProducedSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(count) => write!(f, "{count:#x}"),
            Self::More => f.write_str("more"),
        }
    }
}

impl BootError {
    pub(super) fn field(
        field: impl Into<Cow<'static, str>>,
        value: u64,
        allowed: impl Into<Cow<'static, str>>,
    ) -> Self {
        Self::Field { field: field.into(), value, allowed: allowed.into() }
    }

    pub(super) fn note(place: impl Into<Cow<'static, str>>, problem: impl Into<Cow<'static, str>>) -> Self {
        Self::Note { place: place.into(), problem: problem.into() }
    }
}

/// The bytes of `file` that start at `offset`, or an error that names `what`.
pub(super) fn slice(
    file: &[u8],
    what: impl Into<Cow<'static, str>>,
    offset: u64,
    length: u64,
) -> Result<&[u8], BootError> {
    let range = usize::try_from(offset)
        .ok()
        .zip(usize::try_from(length).ok())
        .and_then(|(start, len)| Some(start..start.checked_add(len)?));
    range.and_then(|range| file.get(range)).ok_or_else(|| BootError::Truncated {
        what: what.into(),
        offset,
        length,
        file_size: file.len() as u64,
    })
}
