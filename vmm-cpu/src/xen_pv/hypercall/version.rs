//! `xen_version` (public/version.h).

use super::super::abi::errno::Errno;
use super::super::abi::{features, nr};
use super::{Call, Done, Outcome};

/// Xen 4.17.
const VERSION: u64 = 4 << 16 | 17;

const CAPABILITIES: &str = "xen-3.0-x86_64 ";

mod command {
    pub(super) const VERSION: u64 = 0;
    pub(super) const EXTRAVERSION: u64 = 1;
    pub(super) const COMPILE_INFO: u64 = 2;
    pub(super) const CAPABILITIES: u64 = 3;
    pub(super) const CHANGESET: u64 = 4;
    pub(super) const PLATFORM_PARAMETERS: u64 = 5;
    pub(super) const GET_FEATURES: u64 = 6;
    pub(super) const PAGESIZE: u64 = 7;
    pub(super) const GUEST_HANDLE: u64 = 8;
}

/// Where the platform's own address range starts.
const HYPERVISOR_START: u64 = 0xffff_8000_0000_0000;

impl Call<'_> {
    /// Arguments: command, structure.
    pub(super) fn xen_version(&mut self, args: &mut [u64; 6]) -> Outcome {
        let [command, at, ..] = *args;
        let value = match command {
            command::VERSION => VERSION,
            command::EXTRAVERSION => self.text::<16>(at, "")?,
            command::COMPILE_INFO => {
                // Compiler, who, domain, date: 64 + 16 + 32 + 32 bytes.
                self.space().write_bytes(at, &[0; 144])?;
                0
            }
            command::CAPABILITIES => self.text::<1024>(at, CAPABILITIES)?,
            command::CHANGESET => self.text::<64>(at, "")?,
            command::PLATFORM_PARAMETERS => {
                self.space().write(at, &HYPERVISOR_START)?;
                0
            }
            command::GET_FEATURES => {
                let submap: u32 = self.space().read(at)?;
                if submap != 0 {
                    return Err(Errno::EINVAL.into());
                }
                self.space().write(at.checked_add(4).ok_or(Errno::EFAULT)?, &features::ALL)?;
                0
            }
            command::PAGESIZE => super::super::abi::PAGE_SIZE,
            command::GUEST_HANDLE => {
                self.space().write_bytes(at, &[0; 16])?;
                0
            }
            _ => return self.unknown(nr::XEN_VERSION),
        };
        Ok(Done::Value(value))
    }

    fn text<const SIZE: usize>(&self, at: u64, text: &str) -> Result<u64, Errno> {
        let mut field = [0; SIZE];
        // One byte stays for the end.
        for (to, from) in field.iter_mut().take(SIZE - 1).zip(text.bytes()) {
            *to = from;
        }
        self.space().write_bytes(at, &field)?;
        Ok(0)
    }
}

#[cfg(test)]
mod tests;
