//! Telling what a kernel image is and what it offers.

use std::borrow::Cow;
use std::fmt;

use super::bzimage::{self, SetupHeader};
use super::elf::{ElfImage, LoadSegment};
use super::error::{BootError, slice};
use super::multiboot::MultibootHeader;
use super::notes::XenNotes;
use super::payload::Payload;

/// The file format of a kernel image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ImageFormat {
    /// An ELF file for x86-64.
    Elf64,
    /// An ELF file for i386.
    Elf32,
    /// A Linux bzImage.
    BzImage,
    /// Any other file with a multiboot 1 header that holds address fields.
    MultibootBinary,
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Elf64 => "ELF64",
            Self::Elf32 => "ELF32",
            Self::BzImage => "bzImage",
            Self::MultibootBinary => "multiboot binary",
        })
    }
}

/// How a guest is started: what is in memory and in registers at its first instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum BootProtocol {
    /// Xen's PVH: 32-bit protected mode without paging, `hvm_start_info` in EBX (Xen docs/misc/pvh.pandoc).
    Pvh,
    /// Linux's 64-bit protocol: long mode, `boot_params` in RSI (Documentation/arch/x86/boot.rst).
    Linux64,
    /// Multiboot 1: 32-bit protected mode without paging, magic in EAX, information in EBX (0.6.96).
    Multiboot1,
    /// A freestanding 64-bit program: long mode with the first 4 GiB mapped one to one, and a stack.
    Flat64,
}

impl fmt::Display for BootProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pvh => "PVH",
            Self::Linux64 => "the Linux 64-bit boot protocol",
            Self::Multiboot1 => "multiboot 1",
            Self::Flat64 => "flat 64-bit entry",
        })
    }
}

#[derive(Debug, Clone)]
enum Kind {
    Elf { elf: Box<ElfImage>, multiboot: Option<MultibootHeader> },
    BzImage(SetupHeader),
    Multiboot(MultibootHeader),
}

/// A kernel image whose headers have been read and checked.
///
/// The bytes stay where they are, borrowed or owned; they are copied once, into guest memory.
#[derive(Clone)]
pub struct KernelImage<'a> {
    bytes: Cow<'a, [u8]>,
    kind: Kind,
}

impl fmt::Debug for KernelImage<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The bytes are megabytes.
        f.debug_struct("KernelImage").field("size", &self.bytes.len()).field("kind", &self.kind).finish()
    }
}

impl<'a> KernelImage<'a> {
    /// Tells the format of `bytes` and reads the headers.
    ///
    /// Formats are tried in this order: ELF by its magic, bzImage by its boot flag and "HdrS", any file
    /// with a multiboot 1 header that holds address fields.
    ///
    /// # Errors
    ///
    /// [`BootError::Unrecognised`] for any other file; otherwise an error that names the field that is out
    /// of range. What only one protocol needs is checked when that protocol is used.
    pub fn parse(bytes: impl Into<Cow<'a, [u8]>>) -> Result<Self, BootError> {
        let bytes = bytes.into();
        let multiboot = MultibootHeader::find(&bytes);
        let kind = if bytes.starts_with(b"\x7fELF") {
            Kind::Elf { elf: Box::new(ElfImage::parse(&bytes)?), multiboot }
        } else if bzimage::is_bzimage(&bytes) {
            Kind::BzImage(SetupHeader::parse(&bytes)?)
        } else {
            match multiboot.filter(MultibootHeader::has_addresses) {
                Some(header) => Kind::Multiboot(header),
                None => return Err(BootError::Unrecognised { length: bytes.len() }),
            }
        };
        Ok(Self { bytes, kind })
    }

    /// The file format.
    pub fn format(&self) -> ImageFormat {
        match &self.kind {
            Kind::Elf { elf, .. } if elf.is_64 => ImageFormat::Elf64,
            Kind::Elf { .. } => ImageFormat::Elf32,
            Kind::BzImage(_) => ImageFormat::BzImage,
            Kind::Multiboot(_) => ImageFormat::MultibootBinary,
        }
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The protocols that the image offers, best first; may be empty.
    ///
    /// | format | protocols |
    /// |---|---|
    /// | ELF64 | PVH with its note, multiboot 1 with its header, flat otherwise and as last choice |
    /// | ELF32 | PVH with its note, multiboot 1 with its header |
    /// | bzImage | Linux 64-bit if the kernel has that entry; PVH if it has a payload, which is extracted then |
    /// | multiboot binary | multiboot 1 |
    ///
    /// An ELF64 can also be asked for [`BootProtocol::Linux64`], which starts a vmlinux at its `e_entry`;
    /// nothing in the file tells that it is one, so it is not in this list.
    pub fn protocols(&self) -> Vec<BootProtocol> {
        let mut offered = Vec::new();
        match &self.kind {
            Kind::Elf { elf, multiboot } => {
                if elf.notes.phys32_entry().is_some() {
                    offered.push(BootProtocol::Pvh);
                }
                if multiboot.is_some() {
                    offered.push(BootProtocol::Multiboot1);
                }
                if elf.is_64 {
                    offered.push(BootProtocol::Flat64);
                }
            }
            Kind::BzImage(header) => {
                if header.is_64bit() {
                    offered.push(BootProtocol::Linux64);
                }
                if header.has_payload() {
                    offered.push(BootProtocol::Pvh);
                }
            }
            Kind::Multiboot(_) => offered.push(BootProtocol::Multiboot1),
        }
        offered
    }

    /// The loadable segments of an ELF, ascending by physical address and disjoint; empty for other formats.
    pub fn segments(&self) -> &[LoadSegment] {
        self.elf().map_or(&[], |elf| &elf.segments)
    }

    /// The bytes that the file supplies for `segment`; the rest up to `memsz` is zero.
    ///
    /// # Errors
    ///
    /// [`BootError::Truncated`] if `segment` is of another image and does not fit this one.
    pub fn segment_bytes(&self, segment: &LoadSegment) -> Result<&[u8], BootError> {
        // An empty segment may have any offset.
        let offset = if segment.filesz == 0 { 0 } else { segment.offset };
        slice(&self.bytes, "segment (p_offset, p_filesz)", offset, segment.filesz)
    }

    /// `e_entry` of an ELF, as it is in the file.
    pub fn elf_entry(&self) -> Option<u64> {
        self.elf().map(|elf| elf.entry)
    }

    /// The Xen notes of an ELF; of a bzImage only the extracted ELF has them.
    pub fn xen_notes(&self) -> Option<&XenNotes> {
        self.elf().map(|elf| &elf.notes)
    }

    /// The multiboot 1 header.
    pub fn multiboot_header(&self) -> Option<&MultibootHeader> {
        match &self.kind {
            Kind::Elf { multiboot, .. } => multiboot.as_ref(),
            Kind::Multiboot(header) => Some(header),
            Kind::BzImage(_) => None,
        }
    }

    /// The setup header of a bzImage.
    pub fn setup_header(&self) -> Option<&SetupHeader> {
        match &self.kind {
            Kind::BzImage(header) => Some(header),
            _ => None,
        }
    }

    /// The compressed payload of a bzImage; `None` for other formats.
    ///
    /// # Errors
    ///
    /// [`BootError::NoPayload`] if the image has none, [`BootError::Field`] if it reaches past the kernel.
    pub fn payload(&self) -> Result<Option<Payload<'_>>, BootError> {
        match self.setup_header() {
            Some(header) => Payload::new(header.payload(&self.bytes)?, header.payload_limit()).map(Some),
            None => Ok(None),
        }
    }

    /// The ELF kernel inside a bzImage, decompressed; `None` for other formats.
    ///
    /// The output is at most as large as the image declares, as the memory that it asks for (`init_size`),
    /// and as [`MAX_PAYLOAD_SIZE`](super::MAX_PAYLOAD_SIZE).
    ///
    /// # Errors
    ///
    /// Those of [`payload`](Self::payload); [`BootError::PayloadTooLarge`] above a limit;
    /// [`BootError::UnsupportedCompression`], also when the crate is built without the feature
    /// `decompress`; [`BootError::Decompress`] and [`BootError::PayloadSize`] for damaged data; the errors
    /// of [`parse`](Self::parse) for the result, which must be an ELF.
    pub fn extract_elf(&self) -> Result<Option<KernelImage<'static>>, BootError> {
        let Some(payload) = self.payload()? else { return Ok(None) };
        let bytes = payload.decompress()?;
        if !bytes.starts_with(b"\x7fELF") {
            let first = bytes.iter().take(4).rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
            return Err(BootError::field("e_ident magic of the payload", first, "0x464c457f (\"\\x7fELF\")"));
        }
        KernelImage::parse(bytes).map(Some)
    }

    pub(super) fn elf(&self) -> Option<&ElfImage> {
        match &self.kind {
            Kind::Elf { elf, .. } => Some(elf),
            _ => None,
        }
    }
}
