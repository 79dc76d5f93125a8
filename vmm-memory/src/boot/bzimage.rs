//! bzImage: the Linux setup header and what it locates in the file.
//!
//! Offsets and meanings are those of Documentation/arch/x86/boot.rst. The header is hostile; the fields
//! that a later step computes with are checked when the header is read.

use linux_loader::loader::bootparam;
use vm_memory::ByteValued;

use super::error::{BootError, slice};

const SECTOR: u64 = 512;
/// Offset of `setup_header` in the file and in `boot_params`.
const HEADER_OFFSET: u64 = 0x1f1;
/// "HdrS".
pub(super) const HEADER_MAGIC: u32 = 0x5372_6448;
pub(super) const BOOT_FLAG: u16 = 0xaa55;
/// The first protocol version with `cmdline_size`; Linux 2.6.22.
const MIN_VERSION: u16 = 0x0206;
const VERSION_PAYLOAD: u16 = 0x0208;
const VERSION_INIT_SIZE: u16 = 0x020a;
const VERSION_XLOADFLAGS: u16 = 0x020c;
/// Entry point of the 64-bit protocol, from the start of the protected-mode kernel.
pub(super) const ENTRY_64: u64 = 0x200;
/// Where the protected-mode kernel goes if the header is too old to say.
const DEFAULT_ADDRESS: u64 = 0x10_0000;

/// The setup header of a bzImage, checked (Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header").
#[derive(Debug, Clone)]
pub struct SetupHeader {
    raw: bootparam::setup_header,
    /// Size of the boot sector and the real-mode code.
    setup_size: u64,
    /// Size of the protected-mode kernel that the file holds.
    kernel_size: u64,
}

/// Whether `file` claims to be a bzImage.
pub(super) fn is_bzimage(file: &[u8]) -> bool {
    file.get(0x1fe..0x200) == Some(BOOT_FLAG.to_le_bytes().as_slice())
        && file.get(0x202..0x206) == Some(HEADER_MAGIC.to_le_bytes().as_slice())
}

impl SetupHeader {
    /// Reads and checks the header of `file`, for which [`is_bzimage`] holds.
    pub(super) fn parse(file: &[u8]) -> Result<Self, BootError> {
        // The jump at 0x200 skips the header, so its displacement tells where the header ends.
        let jump = slice(file, "setup header jump", 0x201, 1)?;
        let header_end = 0x202 + u64::from(jump.first().copied().unwrap_or_default());
        let known = size_of::<bootparam::setup_header>() as u64;
        let length = (header_end - HEADER_OFFSET).min(known);
        let bytes = slice(file, "setup header", HEADER_OFFSET, length)?;
        let mut raw = bootparam::setup_header::default();
        for (to, from) in raw.as_mut_slice().iter_mut().zip(bytes) {
            *to = *from;
        }

        let version = raw.version;
        if version < MIN_VERSION {
            return Err(BootError::field("setup header version", version.into(), "at least 0x206"));
        }
        if u32::from(raw.loadflags) & u32::from(bootparam::LOADED_HIGH) == 0 {
            return Err(BootError::field(
                "setup header loadflags",
                raw.loadflags.into(),
                "bit 0 (LOADED_HIGH) set: a zImage is not supported",
            ));
        }
        if version < VERSION_XLOADFLAGS {
            raw.xloadflags = 0;
        }
        if version < VERSION_INIT_SIZE {
            raw.pref_address = DEFAULT_ADDRESS;
            raw.init_size = 0;
        }
        if version < VERSION_PAYLOAD {
            raw.payload_offset = 0;
            raw.payload_length = 0;
        }
        // A count of 0 means 4, for boot sectors older than the field.
        let sectors = if raw.setup_sects == 0 { 4 } else { u64::from(raw.setup_sects) };
        let setup_size = (sectors + 1) * SECTOR;
        let file_size = file.len() as u64;
        let declared = u64::from(raw.syssize) * 16;
        // The size is in units of 16 bytes, so the last unit need not be whole. What follows it, such as a
        // signature, is not part of the kernel.
        let available =
            file_size.checked_sub(setup_size).filter(|size| size.next_multiple_of(16) >= declared);
        let Some(available) = available else {
            return Err(BootError::Truncated {
                what: "protected-mode kernel (setup_sects, syssize)".into(),
                offset: setup_size,
                length: declared,
                file_size,
            });
        };
        let kernel_size = available.min(declared);
        if kernel_size <= ENTRY_64 {
            return Err(BootError::field("setup header syssize", raw.syssize.into(), "at least 0x21"));
        }
        let header = Self { raw, setup_size, kernel_size };
        header.check_addresses()?;
        Ok(header)
    }

    fn check_addresses(&self) -> Result<(), BootError> {
        let alignment = self.raw.kernel_alignment;
        if self.is_relocatable() && (!alignment.is_power_of_two() || alignment < 0x1000) {
            let allowed = "a power of two, at least 0x1000";
            return Err(BootError::field("setup header kernel_alignment", alignment.into(), allowed));
        }
        let preferred = self.preferred_address();
        if preferred < DEFAULT_ADDRESS || preferred > u64::from(u32::MAX) {
            let allowed = "0x100000 to 0xffffffff";
            return Err(BootError::field("setup header pref_address", preferred, allowed));
        }
        Ok(())
    }

    /// Boot protocol version, major in the high byte: 0x20f is 2.15.
    pub fn version(&self) -> u16 {
        self.raw.version
    }

    /// Whether the kernel has the 64-bit entry point (`xloadflags` bit 0, `XLF_KERNEL_64`).
    pub fn is_64bit(&self) -> bool {
        self.raw.xloadflags & bootparam::XLF_KERNEL_64 != 0
    }

    /// Whether the kernel runs at addresses other than [`preferred_address`](Self::preferred_address).
    pub fn is_relocatable(&self) -> bool {
        self.raw.relocatable_kernel != 0
    }

    /// `kernel_alignment`: alignment in bytes of the load address of a relocatable kernel.
    pub fn kernel_alignment(&self) -> u64 {
        self.raw.kernel_alignment.into()
    }

    /// `pref_address`: guest-physical address at which the kernel would like to be, below 4 GiB.
    pub fn preferred_address(&self) -> u64 {
        self.raw.pref_address
    }

    /// Bytes that the kernel needs from its load address on before it reads the memory map: `init_size`, or
    /// the size of the kernel in the file if that is more.
    pub fn init_size(&self) -> u64 {
        u64::from(self.raw.init_size).max(self.kernel_size)
    }

    /// `cmdline_size`: longest command line in bytes, without the NUL.
    pub fn command_line_limit(&self) -> u64 {
        self.raw.cmdline_size.into()
    }

    /// `initrd_addr_max`: highest guest-physical address that the initrd may occupy.
    pub fn initrd_address_max(&self) -> u64 {
        self.raw.initrd_addr_max.into()
    }

    /// Largest decompressed kernel that fits the memory the image asks for; no limit before version 2.10.
    pub(super) fn payload_limit(&self) -> u64 {
        if self.raw.init_size == 0 { u64::MAX } else { self.init_size() }
    }

    /// The raw header, as `boot_params` wants it.
    pub(super) fn raw(&self) -> bootparam::setup_header {
        self.raw
    }

    /// The protected-mode kernel in `file`.
    pub(super) fn kernel<'f>(&self, file: &'f [u8]) -> Result<&'f [u8], BootError> {
        slice(file, "protected-mode kernel (setup_sects, syssize)", self.setup_size, self.kernel_size)
    }

    /// Whether the header says where the payload is: not before version 2.08, nor in a kernel that has none.
    pub(super) fn has_payload(&self) -> bool {
        // Four bytes are the size of the output.
        self.raw.payload_length > 4
    }

    /// The compressed payload in `file`, its four bytes of output size included.
    pub(super) fn payload<'f>(&self, file: &'f [u8]) -> Result<&'f [u8], BootError> {
        let (offset, length) = (self.raw.payload_offset, self.raw.payload_length);
        if !self.has_payload() {
            return Err(BootError::NoPayload { length });
        }
        let kernel = self.kernel(file)?;
        let end = u64::from(offset) + u64::from(length);
        if end > self.kernel_size {
            return Err(BootError::field(
                "setup header payload_offset + payload_length",
                end,
                format!("at most {:#x}, the size of the protected-mode kernel", self.kernel_size),
            ));
        }
        slice(kernel, "payload (payload_offset, payload_length)", offset.into(), length.into())
    }
}
