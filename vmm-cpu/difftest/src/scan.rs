//! Finds the forms of instructions that binaries hold, which is how `forms.txt` is made and checked.
//!
//! Executable sections are decoded from their beginnings to their ends as 64-bit code. What lies between functions is
//! decoded with them, so the result may have forms that are never executed, and lacks none that compilers place.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use iced_x86::{Code, Decoder, DecoderOptions, Instruction};
use object::{Object, ObjectSection, SectionFlags, elf};
use vmm_memory::boot::KernelImage;

/// How often each form occurs.
pub(crate) type Counts = BTreeMap<String, u64>;

/// The forms in the file at `path`: a program or vmlinux, or a bzImage, which is unpacked.
pub(crate) fn file(path: &Path) -> Result<Counts> {
    let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    scan(&bytes).with_context(|| format!("scanning {}", path.display()))
}

fn scan(bytes: &[u8]) -> Result<Counts> {
    if bytes.starts_with(&elf::ELFMAG) {
        return executable(bytes);
    }
    let image = KernelImage::parse(bytes)?;
    let unpacked = image.extract_elf()?.context("it is neither an ELF file nor a bzImage")?;
    executable(unpacked.bytes())
}

fn executable(elf: &[u8]) -> Result<Counts> {
    let file = object::read::elf::ElfFile64::<object::Endianness>::parse(elf)?;
    let mut counts = Counts::new();
    for section in file.sections() {
        let SectionFlags::Elf { sh_flags, .. } = section.flags() else { continue };
        if sh_flags.0 & elf::SHF_EXECINSTR.0 != 0 {
            decode(section.data()?, section.address(), &mut counts);
        }
    }
    anyhow::ensure!(!counts.is_empty(), "no section is executable");
    Ok(counts)
}

fn decode(bytes: &[u8], address: u64, counts: &mut Counts) {
    let mut decoder = Decoder::with_ip(64, bytes, address, DecoderOptions::AMD);
    let mut instruction = Instruction::default();
    while decoder.can_decode() {
        decoder.decode_out(&mut instruction);
        if instruction.code() != Code::INVALID {
            *counts.entry(format!("{:?}", instruction.code())).or_default() += 1;
        }
    }
}
