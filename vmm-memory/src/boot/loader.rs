//! The request to start an image, and what came of it.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use vm_memory::{Address, GuestAddress, GuestMemoryBackend};

use super::cpu_tables::GdtLocation;
use super::e820::{E820Entry, E820Kind, Reserved};
use super::error::{BootError, BootItem};
use super::image::{BootProtocol, ImageFormat, KernelImage};
use super::protocol;
use super::target::Target;

/// A further file for the guest, with the string that belongs to it.
pub(super) struct Module<'a> {
    pub(super) item: BootItem,
    pub(super) bytes: &'a [u8],
    pub(super) text: Cow<'a, str>,
}

/// How to start a kernel: what it is given, and where it may not be put.
///
/// Nothing is checked before [`load`](Self::load).
pub struct Boot<'a> {
    pub(super) kernel: &'a KernelImage<'a>,
    pub(super) command_line: Cow<'a, str>,
    /// The initrd, if any, comes first.
    pub(super) modules: Vec<Module<'a>>,
    pub(super) rsdp: Option<GuestAddress>,
    reserved: Vec<Reserved>,
    protocol: Option<BootProtocol>,
}

impl fmt::Debug for Boot<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let modules: Vec<_> = self.modules.iter().map(|module| (module.item, module.bytes.len())).collect();
        f.debug_struct("Boot")
            .field("kernel", &self.kernel)
            .field("command_line", &self.command_line)
            .field("modules", &modules)
            .field("rsdp", &self.rsdp)
            .field("reserved", &self.reserved)
            .field("protocol", &self.protocol)
            .finish()
    }
}

impl<'a> Boot<'a> {
    /// A start of `kernel` by the best protocol that it offers, with nothing else.
    pub fn new(kernel: &'a KernelImage<'a>) -> Self {
        Self {
            kernel,
            command_line: Cow::Borrowed(""),
            modules: Vec::new(),
            rsdp: None,
            reserved: Vec::new(),
            protocol: None,
        }
    }

    /// The kernel's command line, without a NUL. The default is empty.
    ///
    /// Longest length in bytes: what the setup header says for a bzImage, 2047 otherwise for PVH and Linux
    /// 64-bit (Linux would cut the rest off), 4095 for multiboot. A flat 64-bit guest gets none. Most
    /// multiboot kernels take the first word for their own name and skip it.
    #[must_use]
    pub fn command_line(mut self, text: impl Into<Cow<'a, str>>) -> Self {
        self.command_line = text.into();
        self
    }

    /// The initial RAM disk; for PVH and multiboot the first module. A second call replaces the first.
    #[must_use]
    pub fn initrd(mut self, bytes: &'a [u8]) -> Self {
        self.modules.retain(|module| module.item != BootItem::Initrd);
        self.modules.insert(0, Module { item: BootItem::Initrd, bytes, text: Cow::Borrowed("") });
        self
    }

    /// A further module with its string of up to 4095 bytes, for PVH and multiboot. Modules keep their order.
    #[must_use]
    pub fn module(mut self, bytes: &'a [u8], text: impl Into<Cow<'a, str>>) -> Self {
        let count = self.modules.iter().filter(|module| module.item != BootItem::Initrd).count();
        self.modules.push(Module { item: BootItem::Module(count), bytes, text: text.into() });
        self
    }

    /// Guest-physical address of the ACPI root pointer, for PVH and Linux 64-bit. The tables are the
    /// caller's, and so is the range that holds them: see [`reserve_as`](Self::reserve_as).
    #[must_use]
    pub fn rsdp(mut self, address: GuestAddress) -> Self {
        self.rsdp = Some(address);
        self
    }

    /// A range that is reserved in the guest's memory map and in which nothing is placed, in RAM or not.
    #[must_use]
    pub fn reserve(self, range: Range<GuestAddress>) -> Self {
        self.reserve_as(range, E820Kind::Reserved)
    }

    /// Like [`reserve`](Self::reserve), with another kind in the memory map.
    #[must_use]
    pub fn reserve_as(mut self, range: Range<GuestAddress>, kind: E820Kind) -> Self {
        self.reserved.push(Reserved { start: range.start, end: range.end, kind });
        self
    }

    /// The protocol to use instead of the first of [`KernelImage::protocols`].
    #[must_use]
    pub fn protocol(mut self, protocol: BootProtocol) -> Self {
        self.protocol = Some(protocol);
        self
    }

    /// Writes the kernel and all that it is given into `memory`.
    ///
    /// Every region of `memory` is taken for RAM and must be writable on the host, as in the memory that
    /// [`GuestRam`](crate::GuestRam) shows to devices: `vm-memory` does not survive a write to another.
    ///
    /// # Errors
    ///
    /// Errors of the request ([`BootError::CommandLineTooLong`], [`BootError::NotCarried`], ...), of the
    /// image where only this protocol looks, and of placement ([`BootError::NoRoom`],
    /// [`BootError::Collision`], [`BootError::NotRam`]). After an error `memory` may hold a part.
    pub fn load<M: GuestMemoryBackend>(&self, memory: &M) -> Result<BootEntry, BootError> {
        let protocol = match self.protocol {
            Some(protocol) => protocol,
            None => self.default_protocol()?,
        };
        self.check_strings(protocol)?;
        let mut target = Target::new(memory, &self.reserved)?;
        match protocol {
            BootProtocol::Pvh => protocol::pvh::load(self, &mut target),
            BootProtocol::Linux64 => protocol::linux64::load(self, &mut target),
            BootProtocol::Multiboot1 => protocol::multiboot1::load(self, &mut target),
            BootProtocol::Flat64 => protocol::flat64::load(self, &mut target),
        }
    }

    fn default_protocol(&self) -> Result<BootProtocol, BootError> {
        let offered = self.kernel.protocols();
        offered.first().copied().ok_or_else(|| BootError::NoProtocol { format: self.kernel.format() })
    }

    fn check_strings(&self, protocol: BootProtocol) -> Result<(), BootError> {
        // COMMAND_LINE_SIZE of Linux on x86 is 2048 with the NUL.
        const LINUX_LIMIT: usize = 2047;
        const TEXT_LIMIT: usize = 4095;

        let limit = match (protocol, self.kernel.setup_header()) {
            (BootProtocol::Multiboot1, _) => TEXT_LIMIT,
            (_, Some(header)) => usize::try_from(header.command_line_limit()).unwrap_or(usize::MAX),
            (_, None) => LINUX_LIMIT,
        };
        let modules = self.modules.iter().map(|module| (module.item, module.text.as_ref(), TEXT_LIMIT));
        let command_line = (BootItem::CommandLine, self.command_line.as_ref(), limit);
        for (item, text, limit) in modules.chain([command_line]) {
            if let Some(position) = text.bytes().position(|byte| byte == 0) {
                return Err(BootError::CommandLineNul { item, position });
            }
            if text.len() > limit {
                return Err(BootError::CommandLineTooLong { item, length: text.len(), limit, protocol });
            }
        }
        Ok(())
    }

    /// An error for a protocol that `kernel`, in its format, cannot be started by.
    pub(super) fn not_offered(&self, protocol: BootProtocol) -> BootError {
        let reason = match (protocol, self.kernel.format()) {
            (BootProtocol::Pvh, ImageFormat::Elf64 | ImageFormat::Elf32) => "it has no Xen note PHYS32_ENTRY",
            (BootProtocol::Pvh, ImageFormat::BzImage) => "its payload has no Xen note PHYS32_ENTRY",
            (BootProtocol::Pvh, _) => "it is not an ELF file and holds none",
            (BootProtocol::Linux64, ImageFormat::BzImage) => "XLF_KERNEL_64 is not set in xloadflags",
            (BootProtocol::Linux64, _) => "it is neither a bzImage nor an ELF64 file",
            (BootProtocol::Multiboot1, _) => "it has no multiboot 1 header in its first 8192 bytes",
            (BootProtocol::Flat64, _) => "it is not an ELF64 file",
        };
        BootError::NotOffered { protocol, reason }
    }
}

/// A loaded kernel: what the registers of the first vCPU must say. All that they point to is in guest memory.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BootEntry {
    /// How the guest is entered.
    pub protocol: BootProtocol,
    /// Guest-physical address of the first instruction, below 4 GiB.
    pub entry: GuestAddress,
    /// Guest-physical address of `hvm_start_info` (EBX), `boot_params` (RSI) or the multiboot information
    /// (EBX); 0 for a flat 64-bit guest.
    pub info: GuestAddress,
    /// CR3 for the protocols that start in long mode: maps the first 4 GiB one to one in pages of 2 MiB.
    pub page_tables: Option<GuestAddress>,
    /// The boot GDT.
    pub gdt: Option<GdtLocation>,
    /// Initial RSP of a flat 64-bit guest: the end of 64 KiB of memory, 16-byte aligned.
    pub stack: Option<GuestAddress>,
    /// Guest-physical memory that the kernel occupies, from its lowest to its highest byte.
    pub kernel: Range<GuestAddress>,
    /// Address and size in bytes of the initrd.
    pub initrd: Option<(GuestAddress, u64)>,
    /// Address and size in bytes of each further module, in their order.
    pub modules: Vec<(GuestAddress, u64)>,
    /// The memory map that the guest is told: ascending, disjoint. A flat guest is told none.
    pub memory_map: Vec<E820Entry>,
}

impl BootEntry {
    /// An entry with nothing beside the kernel.
    pub(super) fn new(
        protocol: BootProtocol,
        entry: u64,
        kernel: Range<GuestAddress>,
        map: &[E820Entry],
    ) -> Result<Self, BootError> {
        if entry > u64::from(u32::MAX) {
            return Err(BootError::field("entry address", entry, "below 4 GiB"));
        }
        Ok(Self {
            protocol,
            entry: GuestAddress(entry),
            info: GuestAddress(0),
            page_tables: None,
            gdt: None,
            stack: None,
            kernel,
            initrd: None,
            modules: Vec::new(),
            memory_map: map.to_vec(),
        })
    }

    /// Notes where the initrd and the modules went, given in the order of the request.
    pub(super) fn set_modules(&mut self, placed: &[(BootItem, (GuestAddress, u64))]) {
        for &(item, location) in placed {
            match item {
                BootItem::Initrd => self.initrd = Some(location),
                _ => self.modules.push(location),
            }
        }
    }

    /// End (exclusive) of the kernel.
    pub(super) fn kernel_end(&self) -> u64 {
        self.kernel.end.raw_value()
    }
}
